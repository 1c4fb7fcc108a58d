"""Properties that also hold on a GPU: bfloat16's velocities and gradients, determinism, resuming, scores, memory.

Small random models, the shapes world, and nothing else; `make test-gpu`.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and is deterministic only with it

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support import tiny

from alignbench.backends import stored_embeddings
from alignbench.backends.flux import Flux
from alignbench.evaluator import Reward, Term
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.experiment.spec import Budget, Optimizer, Training
from alignbench.flow import seeded
from alignbench.methods.dancegrpo import DanceGRPO
from alignbench.methods.draft import DRaFTLV
from alignbench.methods.leapalign import LeapAlign
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts
from alignbench.rehearsal import tiny_evaluators
from alignbench.store.artefacts import Store
from alignbench.testing.evaluator_contract import random_image
from alignbench.testing.method_contract import unclocked
from alignbench.training.batches import draw_batch
from alignbench.training.checkpoint import FINAL, load_records
from alignbench.training.ema import EMA
from alignbench.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine"),
]
PROMPTS = load_prompts("shapes/train")
SIZE = 128  # pixels: 1,024 image tokens
WORDS = 64
GUIDANCE = 4.0  # a thousandfold of it is exact in bfloat16, and so is one of sigma 0.5: both are embedded so


@pytest.fixture
def deterministic():
    """Kernels that add in the same order in every run; what has none raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def accelerator() -> Accelerator:
    """A new one: another test of this process may have asked for the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Flux with real heads: 4 of 128 channels."""
    shape = {"attention_head_dim": 128, "num_attention_heads": 4, "axes_dims_rope": (16, 56, 56)}
    return tiny.flux_folder(tmp_path_factory.mktemp("flux"), **shape)


def load(folder, **settings):
    plain = {"size": SIZE, "guidance": GUIDANCE, "max_sequence_length": WORDS}
    return Flux(model=str(folder), **{**plain, **settings}).load(accelerator())


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def batch_of(flow, n=2, step=0):
    training = Training(budget=Budget(updates=1), batch=n)
    return draw_batch(flow, PROMPTS, training, step, range(n), flow.device)


def judge() -> Reward:
    return Reward(Term(HPSv2(weights="shapes")))


# ---- the network in bfloat16


def as_the_pipeline(transformer, flow, batch, sigma, dtype):
    """FluxPipeline's call of its transformer, everything in ``dtype``."""
    text, n = batch.cond.tensors["text"], len(batch)
    return transformer(
        hidden_states=batch.noise.to(dtype),
        timestep=torch.full((n,), sigma, device=flow.device, dtype=dtype),
        guidance=torch.full((n,), GUIDANCE, device=flow.device, dtype=torch.float32),
        pooled_projections=batch.cond.tensors["pooled"].to(dtype),
        encoder_hidden_states=text.to(dtype),
        txt_ids=flow._ids(0, text.shape[1]),
        img_ids=flow._ids(flow.grid, 0),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_velocity_in_bfloat16_is_as_near_to_float32_as_the_pipelines(folder, checkpointing):
    """Ours is the transformer's own answer under autocast, bit by bit, and within 2 % of float32's, as diffusers' is.

    The same weights, rounded to bfloat16, on all sides.
    """
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    flow = load(folder, tune="lora", lora_rank=4, gradient_checkpointing=checkpointing)
    batch = batch_of(flow)
    with torch.no_grad():
        ours = flow.velocity(batch.noise, 0.5, batch.cond)
        theirs = as_the_pipeline(pipe.transformer, flow, batch, 0.5, torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            same = as_the_pipeline(pipe.transformer, flow, batch, 0.5, torch.float32)
        exact = as_the_pipeline(pipe.transformer.float(), flow, batch, 0.5, torch.float32)
    assert torch.equal(ours, same.float())
    print(f"from float32: ours {relative(ours, exact):.2e}, diffusers in bfloat16 {relative(theirs, exact):.2e}")
    assert relative(theirs, exact) < 0.02
    assert relative(ours, exact) < 0.02
    assert relative(ours, exact) < 1.5 * relative(theirs, exact)


def gradient(flow, method, batch) -> torch.Tensor:
    """Return the gradient of the method's loss, all parameters in one tensor."""
    for parameter in flow.parameters():
        parameter.grad = None
    batch.step_rng.manual_seed(0)
    method.loss(flow, judge(), batch).value.backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in flow.parameters()])


@pytest.mark.parametrize("kernel", ["native", "_native_flash", "_native_efficient", "_native_cudnn"])
def test_every_kernel_of_torchs_is_as_near_to_the_plain_one(folder, kernel):
    """``backend.attention``: velocities in bfloat16 within 2 % of the plain kernel's, gradients' cosine at least 0.999.

    None of them is the plain one in disguise.
    """
    found = []
    for name in ("_native_math", kernel):
        flow = load(folder, tune="lora", lora_rank=4, attention=name)
        with torch.no_grad():
            for i, p in enumerate(flow.parameters()):
                p += 0.02 * torch.randn(p.shape, generator=seeded("adapter", i)).to(p)
        batch = batch_of(flow)
        with torch.no_grad(), torch.profiler.profile() as profile:
            v = flow.velocity(batch.noise, 0.5, batch.cond)
        plain = any("attention_math" in event.key for event in profile.key_averages())
        assert plain == (name == "_native_math")
        found.append((v, gradient(flow, LeapAlign(steps=4), batch).double()))
    (v, g), (v_kernel, g_kernel) = found
    cosine = torch.nn.functional.cosine_similarity(g, g_kernel, dim=0).item()
    print(f"{kernel}: velocities {relative(v_kernel, v):.1e} apart, cosine of gradients {cosine:.6f}")
    assert relative(v_kernel, v) < 0.02
    assert cosine >= 0.999


def test_leapaligns_gradient_in_bfloat16_points_where_float32s_does(folder):
    """The cosine of the two gradients, over all parameters, is at least 0.999."""
    found = []
    for dtype in ("float32", "bfloat16"):
        flow = load(folder, dtype=dtype)
        found.append(gradient(flow, LeapAlign(steps=4), batch_of(flow)).double())
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0).item()
    print(f"cosine {cosine:.6f}, norms {found[0].norm():.3g} and {found[1].norm():.3g}")
    assert cosine >= 0.999


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_checkpointing_saves_memory_and_keeps_the_gradient(folder, tune):
    """Less memory at the peak of a backward; the gradient of bfloat16 is the same to 1 % of its norm.

    Not the same bits: flash attention's backward adds in any order (with the plain one, nothing differs).
    """
    peaks, found = [], []
    for checkpointing in (False, True):
        flow = load(folder, tune=tune, gradient_checkpointing=checkpointing)
        if tune == "lora":
            with torch.no_grad():
                for i, p in enumerate(flow.parameters()):
                    p += 0.02 * torch.randn(p.shape, generator=seeded("adapter", i)).to(p)
        batch = batch_of(flow, 4)
        gradient(flow, LeapAlign(steps=3), batch)  # what is made once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(gradient(flow, LeapAlign(steps=3), batch))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del flow
    apart = relative(found[1], found[0])
    print(f"peaks {peaks[0] / 2**20:.0f} and {peaks[1] / 2**20:.0f} MiB, gradients {apart:.1e} apart")
    assert peaks[1] < 0.8 * peaks[0]
    assert apart < 0.01


def test_stored_embeddings_are_computed_ones_and_leave_no_encoder_behind(folder, tmp_path):
    """``backend.embeddings: stored``: the same bits, and afterwards as much of the GPU is free as before."""
    made = Flux(model=str(folder), size=SIZE, max_sequence_length=WORDS)
    device, texts = accelerator().device, ["", *(prompt.text for prompt in PROMPTS[:5])]
    before = torch.cuda.memory_allocated()
    name = stored_embeddings.prepare(Store(tmp_path), made, None, device, texts, lambda *_: None, lambda: None)
    assert torch.cuda.memory_allocated() == before
    flow = load(folder)
    ours = stored_embeddings.StoredEmbeddings(tmp_path / "embeddings" / name, flow.device)(texts).tensors
    theirs = flow.encode(texts).tensors
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# ---- training


def trained(flow, method, batches, folder=None):
    """Records and weights after ``batches`` batches in all."""
    plain = {"batch": 4, "checkpoint_every": 1, "drift_every": 2, "optimizer": Optimizer(lr=1e-4)}
    training = Training(budget=Budget(images=4 * batches), **plain)
    records = list(train(method, flow, judge(), PROMPTS, training, accelerator=accelerator(), checkpoints=folder))
    return unclocked(records), [p.detach().clone() for p in flow.parameters()]


WORLD = {"size": 32, "dtype": "float32", "guidance": 3.5}
METHODS = [LeapAlign(steps=6), DRaFTLV(steps=6), DanceGRPO(steps=6, group=4, updates_per_rollout=2)]
ADAPTERS = {"tune": "lora", "lora_rank": 4, "gradient_checkpointing": True, "size": 32}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.usefixtures("deterministic")
def test_the_same_training_twice_is_bitwise_the_same(method):
    """Every weight and every record, in the shapes world on the GPU; and the weights have moved."""
    (records, weights), (again, same) = (trained(load("shapes", **WORLD), method, 3) for _ in range(2))
    assert records == again
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights, load("shapes", **WORLD).parameters()))


@pytest.mark.parametrize("settings", [WORLD, ADAPTERS], ids=["shapes", "bfloat16"])
@pytest.mark.usefixtures("deterministic")
def test_a_resumed_training_is_the_undisturbed_one(folder, tmp_path, settings):
    """Stopped after two of four batches: every weight and every record, bitwise; with adapters in bfloat16 too."""
    model, method = ("shapes" if settings is WORLD else folder), LeapAlign(steps=4)
    records, weights = trained(load(model, **settings), method, 4)
    trained(load(model, **settings), method, 2, tmp_path)
    _, resumed = trained(load(model, **settings), method, 4, tmp_path)
    assert unclocked(load_records(tmp_path)) == records
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


HALVES = [("master", "float32"), ("stochastic", "float32"), ("stochastic", "8bit"), ("float32", "8bit")]


def halved(folder, kind, moments, batches, host=False, store=None):
    """Records, and the final weights' file if there is a store, of a bfloat16 Flux."""
    optimizer = Optimizer(lr=1e-3, ema=0.9, weights=kind, moments=moments)
    plain = {"batch": 4, "micro_batch": 2, "checkpoint_every": 1, "drift_every": None, "ema_on_host": host}
    training = Training(budget=Budget(images=4 * batches), optimizer=optimizer, **plain)
    parts = LeapAlign(steps=4), load(folder, size=32), judge(), PROMPTS, training
    records = list(train(*parts, accelerator=accelerator(), checkpoints=store))
    return unclocked(records), None if store is None else load_file(store / FINAL)


@pytest.mark.parametrize(("kind", "moments"), HALVES)
@pytest.mark.usefixtures("deterministic")
def test_weights_in_bfloat16_and_moments_in_8_bits_resume_bitwise(folder, tmp_path, kind, moments):
    """Twice the same; stopped after two of four batches the same; and so with the average following on the host, but
    for the last place of the average, which a GPU may round otherwise.
    """
    records, weights = halved(folder, kind, moments, 4, store=tmp_path / "whole")
    assert halved(folder, kind, moments, 4)[0] == records
    halved(folder, kind, moments, 2, store=tmp_path / "resumed")
    _, resumed = halved(folder, kind, moments, 4, store=tmp_path / "resumed")
    assert unclocked(load_records(tmp_path / "resumed")) == records
    again, host = halved(folder, kind, moments, 4, host=True, store=tmp_path / "host")
    assert again == records
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name])
        if name.startswith("last."):
            assert torch.equal(tensor, host[name])
        torch.testing.assert_close(tensor, host[name], rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("deterministic")
def test_masters_are_float32_under_autocast(folder, tmp_path):
    """Every record and every weight, bit by bit."""
    ends = [halved(folder, kind, "float32", 3, store=tmp_path / kind) for kind in ("float32", "master")]
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(tensor, ends[1][1][name]) for name, tensor in ends[0][1].items())


def test_the_average_follows_on_a_stream_of_its_own():
    """Bit by bit the average of weights that are copied and averaged at once, however long the GPU is busy before: it
    reads them as the updates before it left them.
    """
    rng = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(shape, device="cuda", generator=rng) for shape in ((2048, 2048), (7,), (3, 5))]
    weights.append(weights[0].bfloat16())
    busy, average = torch.randn(4096, 4096, device="cuda"), EMA(weights, 0.9, on_host=True)
    expected = [w.float().cpu() for w in weights]
    for _ in range(3):
        average.wait()
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        for w in weights:
            w.mul_(0.5).add_(1)
        average.update()
        for mean, w in zip(expected, weights):
            mean.lerp_(w.float().cpu(), 1 - 0.9)
    assert all(torch.equal(a, b) for a, b in zip(average.tensors, expected, strict=True))


# ---- scores


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "imagereward", "clipscore", "aesthetic", "base_distance"])
def test_a_gpus_scores_are_the_cpus(name, tmp_path, monkeypatch):
    """Scores as the harness requests them agree within 1e-4 of their size."""
    settings = tiny_evaluators.checkpoint(name, tmp_path)
    images, prompts = [random_image(96, 128, seed) for seed in range(6)], PROMPTS[:6]
    base = [[random_image(96, 128, seed) for seed in range(6, 12)]]

    def scores() -> np.ndarray:
        evaluator = Registry().make("evaluator", {"name": name, **settings}, "evaluator")
        frame = evaluator.score(images, prompts, *base * evaluator.paired)
        return frame[[metric.name for metric in evaluator.metrics]].to_numpy(dtype=float)

    on_gpu = scores()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = scores()
    print(f"{name}: {abs(on_gpu - on_cpu).max():.1e} apart, of {abs(on_cpu).max():.2g}")
    assert abs(on_gpu - on_cpu).max() < 1e-4 * max(1.0, abs(on_cpu).max())

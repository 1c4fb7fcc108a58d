"""Settings that save memory change no gradient beyond rounding, and do save memory."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file
from support.tiny_sweep import MEASURED, PLUGIN, sweep_file
from support.training_runs import LEAP, STEPS, run, settings
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from alignbench.analytic import AffineFlow, Quadratic
from alignbench.backends.cost.formulas import GPUS
from alignbench.evaluator import Reward, Term
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.evaluators.pickscore import PickScore
from alignbench.experiment import ids
from alignbench.experiment.document import read
from alignbench.experiment.plan import draft, resolve
from alignbench.flow import seeded
from alignbench.method import reward_gradient, reward_loss
from alignbench.planning.estimate import estimate
from alignbench.planning.observe import observe
from alignbench.plugins import Registry
from alignbench.testing.method_contract import gradients_of
from alignbench.training.batches import make_batch
from alignbench.training.checkpoint import FINAL

PATHWISE = ("bptt", "draft_k", "draft_lv", "refl", "drtune", "leapalign", "flowbp_sparse", "flowbp_bridge",
            "flowbp_lagrange", "vggflow", "adjoint_matching", "ode_adjoint_matching")  # fmt: skip


class Mirrored(Quadratic):
    name: ClassVar[str] = "mirrored"


def two_rewards(slice_size=None):
    """Two evaluators, of which one has a hinge that some images have closed."""
    reward = Reward(Term(Quadratic(target=1.0), -2.0, 2.0), Term(Mirrored(target=-1.0)))
    reward.slice_size = slice_size
    return reward


# -- the reward's gradient, image by image -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHWISE)
def test_slices_train_the_same_model(name):
    """Every method that differentiates the reward: weights after three batches and every record, to 1e-12 in float64.

    Records hold rewards, hinges, gradient norms and where on the path they arise, and what the meter counted.
    """
    ends = []
    for slice_size in (None, 1, 3):
        method = Registry().make("method", {"name": name}, "method")  # some remember what they saw
        training = settings(batches=3, reward_slice=slice_size)
        flow, records = run(method, training, flow=AffineFlow(method.steps), reward=two_rewards())
        ends.append((flow.bias.detach(), records))
    (whole, expected), *sliced = ends
    assert 0 < max(record["hinge_closed_quadratic"] for record in expected) < 1
    for bias, records in sliced:
        torch.testing.assert_close(bias, whole, rtol=1e-12, atol=1e-12)
        for a, b in zip(records, expected, strict=True):
            assert a.keys() == b.keys()
            assert all(a[k] == pytest.approx(b[k], rel=1e-12, abs=1e-12) for k in a if k not in MEASURED)


def test_a_policy_gradient_is_not_sliced():
    """It asks for no gradient of the reward: the same bits."""
    method = Registry().make("method", {"name": "dancegrpo", "group": 4, "steps": 6, "updates_per_rollout": 1}, "m")
    ends = [run(method, settings(2, reward_slice=n), flow=AffineFlow(6))[0].bias for n in (None, 1)]
    assert torch.equal(*ends)


def test_a_closed_hinge_has_no_gradient_in_slices():
    """Value zero and gradient zero for those samples, and the weight of each sample counts."""
    flow = AffineFlow(STEPS)
    batch = make_batch(flow, range(4))
    weight = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    found = []
    for slice_size in (None, 1):
        reward = Reward(Term(Quadratic(), -2.0))
        reward.slice_size = slice_size
        x = batch.noise.clone().requires_grad_()
        loss = reward_loss(flow, reward, batch, x, weight)
        loss.value.backward()
        found.append((loss.value.detach(), loss.per_sample, loss.metrics["reward"], x.grad))
    for whole, sliced in zip(*found, strict=True):
        torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=0)
    each, gradient = found[1][1], found[1][3]
    assert 0 < (each == 0).sum() < 4
    assert ((each == 0) == (gradient == 0).all(1)).all()


@pytest.fixture(scope="module")
def shapes():
    """The shapes model in fp32, and both of its scorers as one reward."""
    backend = {"name": "flux", "model": "shapes", "size": 32, "dtype": "float32", "clamp": "straight_through"}
    flow = Registry().make("backend", backend, "backend").load()
    return SimpleNamespace(flow=flow, terms=(Term(HPSv2(weights="shapes"), 0.55), Term(PickScore(weights="shapes"))))


def test_slices_of_a_real_decoder_and_reward(shapes):
    """fp32, through decoder and two CLIPs, away from the clamp: gradients of all weights to 1e-5 of their norm."""
    flow, found = shapes.flow, []
    batch = make_batch(flow, range(3))
    for slice_size in (None, 1):
        reward = Reward(*shapes.terms)
        reward.slice_size = slice_size
        for p in flow.parameters():
            p.grad = None
        v = flow.velocity(batch.noise, 1.0, batch.cond)
        loss = reward_loss(flow, reward, batch, batch.noise - v)
        loss.value.backward()
        found.append((loss.value.item(), torch.cat([g.flatten() for g in gradients_of(flow)]).double()))
    (value, whole), (other, sliced) = found
    assert other == pytest.approx(value, rel=1e-6)
    assert whole.norm() > 0
    assert (sliced - whole).norm() < 1e-5 * whole.norm()


class Kept:
    """Counts the bytes that autograd keeps, while they are kept; parameters are there anyway."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor):
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        return Held(self, tensor)

    def unpack(self, held):
        return held.tensor if isinstance(held, Held) else held


class Held:
    def __init__(self, kept, tensor) -> None:
        self.kept, self.tensor, self.size = kept, tensor, tensor.numel() * tensor.element_size()
        kept.now += self.size
        kept.peak = max(kept.peak, kept.now)

    def __del__(self) -> None:
        self.kept.now -= self.size


@pytest.mark.parametrize("ask", [reward_loss, reward_gradient])
def test_decoder_and_reward_keep_one_slice(shapes, ask):
    """The peak of what autograd saves grows with the batch, and not at all if the reward is sliced."""
    peak = {}
    for slice_size, size in itertools.product((None, 1), (1, 4)):
        batch, kept = make_batch(shapes.flow, range(size)), Kept()
        reward = Reward(*shapes.terms)
        reward.slice_size = slice_size
        with saved_tensors_hooks(kept.pack, kept.unpack):
            ask(shapes.flow, reward, batch, batch.noise.clone().requires_grad_())
        peak[slice_size, size] = kept.peak
    assert peak[None, 4] > 3.5 * peak[None, 1]
    assert peak[1, 4] < 1.02 * peak[1, 1]
    assert peak[1, 1] < 1.02 * peak[None, 1]


def test_no_slices_leave_every_id_as_it_was(tmp_path, monkeypatch):
    """The hash of a run without slices has no such key."""
    hashed = []
    monkeypatch.setattr(ids, "content_id", lambda content: hashed.append(content) or f"{len(hashed):010}")
    for training in ({}, {"reward_slice": 1}):
        resolve(read(sweep_file(tmp_path, {"base": {"training": training}})), Registry([PLUGIN]))
    found = [content["training"].get("reward_slice") for content in hashed if "training" in content]
    assert found == [None, None, 1, 1]
    assert not any("ema_on_host" in content.get("training", ()) for content in hashed)
    assert sum("reward_slice" in content.get("training", ()) for content in hashed) == 2


def test_a_plan_counts_one_slice():
    """Estimated memory: images decoded at once per image of the micro-batch."""
    usage = [observe(LEAP, settings(reward_slice=n), 1, range(1), None).mean for n in (None, 1, 2)]
    assert [u.decoded for u in usage] == [1, 1 / 8, 2 / 8]
    assert {u.decodes_grad for u in usage} == {1}


# -- adapters in bfloat16 ----------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts copies of bfloat16 to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += (args[0].dtype, made.dtype) == (torch.bfloat16, torch.float32)
        return made


def adapted(dtype):
    """The shapes model with moved adapters."""
    backend = {"name": "flux", "model": "shapes", "size": 32, "dtype": dtype, "tune": "lora", "lora_rank": 8}
    flow = Registry().make("backend", backend, "backend").load()
    with torch.no_grad():
        for i, p in enumerate(flow.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=seeded("adapter", i))
    return flow


def through(flow, x=None, cast=False):
    """A velocity, the gradient of its inner product with a fixed direction, and how often bfloat16 became float32."""
    for layer in flow.transformer.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            assert layer.cast_input_dtype_enabled is False or cast
            layer.cast_input_dtype_enabled = cast
    batch = make_batch(flow, range(2))
    for p in flow.parameters():
        p.grad = None
    with Casts() as casts:
        v = flow.velocity(batch.noise, 0.5, batch.cond)
    (v * torch.randn(v.shape, generator=seeded("direction"))).sum().backward()
    return v.detach(), gradients_of(flow), casts.count


def test_adapters_need_no_copy_of_what_enters_them():
    """Without peft's cast to float32, velocity and gradients are bitwise the same, with one copy less per adapter."""
    flow = adapted("bfloat16")
    v, gradients, copies = through(flow)
    v_cast, gradients_cast, copies_cast = through(flow, cast=True)
    assert torch.equal(v, v_cast)
    assert all(map(torch.equal, gradients, gradients_cast))
    adapters = sum("lora_A" in name for name, _ in flow.named_parameters())
    assert adapters / 2 <= copies_cast - copies <= adapters  # what a norm gives is float32 already


@pytest.mark.slow
def test_gradients_of_adapters_in_bfloat16():
    """They are float32, and near those of a network in float32: cosine above 0.999."""
    gradients = [through(adapted(dtype))[1] for dtype in ("bfloat16", "float32")]
    assert {g.dtype for g in gradients[0]} == {torch.float32}
    half, full = (torch.cat([g.flatten() for g in each]).double() for each in gradients)
    assert torch.nn.functional.cosine_similarity(half, full, dim=0) > 0.999


# -- the average and the optimizer -------------------------------------------------------------------------------------


def test_the_average_on_the_host_is_the_average(tmp_path):
    """On a CPU, where both are computed alike: the same files, bit by bit, also of a run that was resumed half-way."""
    for host in (False, True):
        folder = tmp_path / str(host)
        run(LEAP, settings(batches=2, ema_on_host=host), folder)
        run(LEAP, settings(batches=4, ema_on_host=host), folder)
    run(LEAP, settings(batches=4, ema_on_host=True), tmp_path / "whole")
    ends = [(tmp_path / name / FINAL).read_bytes() for name in ("False", "True", "whole")]
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.slow
def test_the_average_on_the_host_is_no_part_of_the_plans_memory():
    """Four bytes less for each trained weight."""
    path = "table2_geneval"
    plan = draft(read(path), Registry())
    cell = next(cell for cell in plan.cells if cell.trains)
    found = []
    for host in (False, True):
        training = structs.replace(cell.spec.training, ema_on_host=host)
        changed = dataclasses.replace(cell, spec=structs.replace(cell.spec, training=training))
        found.append(estimate(changed, plan.sweep.evaluation, plan.evaluators, GPUS["h100"]).memory)
    backend = Registry().make("backend", cell.spec.backend, "b")
    assert found[0] - found[1] == 4 * backend.cost_model.transformer.parameters


@pytest.fixture
def fused(monkeypatch):
    """AdamW as on a GPU."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **named: adamw(groups, **named | {"fused": True}))


def test_the_fused_optimizer_takes_the_same_steps(tmp_path, request):
    """Ten updates: the same weights to 1e-9 in float64, and bit by bit whether or not it was resumed on the way."""
    run(LEAP, settings(batches=10), tmp_path / "plain")
    request.getfixturevalue("fused")
    run(LEAP, settings(batches=10), tmp_path / "fused")
    run(LEAP, settings(batches=4), tmp_path / "resumed")
    run(LEAP, settings(batches=10), tmp_path / "resumed")
    plain, other = (load_file(tmp_path / name / FINAL) for name in ("plain", "fused"))
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-9)
    assert (tmp_path / "fused" / FINAL).read_bytes() == (tmp_path / "resumed" / FINAL).read_bytes()

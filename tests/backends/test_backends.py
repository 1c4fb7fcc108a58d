"""The promises of backends with guidance in two branches, each on a small random model of its family."""

import shutil
import subprocess
import sys

import msgspec
import pytest
import torch
from support.flops import counted as flops
from support.tiny import PROMPTS

from alignbench.analytic import Quadratic
from alignbench.backends.cost.formulas import Tokens
from alignbench.backends.flux2 import Flux2
from alignbench.backends.sd3 import SD3
from alignbench.backends.sit import SiT
from alignbench.config import UserError, settings
from alignbench.evaluator import Reward, Term
from alignbench.experiment.ids import build, run_id
from alignbench.experiment.spec import Budget, RunSpec, Training
from alignbench.flow import integrate
from alignbench.methods.adjoint_matching import AdjointMatching
from alignbench.methods.checkpoint import Checkpoint
from alignbench.methods.dancegrpo import DanceGRPO
from alignbench.methods.draft import DRaFTLV
from alignbench.methods.drtune import DRTune
from alignbench.methods.flowbp import FlowBPBridge, FlowBPSparse
from alignbench.methods.flowbp_lagrange import FlowBPLagrange
from alignbench.methods.flowgrpo import FlowGRPO
from alignbench.methods.leapalign import LeapAlign
from alignbench.methods.mixgrpo import MixGRPO
from alignbench.methods.refl import ReFL
from alignbench.methods.vggflow import VGGFlow
from alignbench.plugins import Registry
from alignbench.rehearsal.tiny_backends import backend
from alignbench.testing import MethodContract
from alignbench.testing.method_contract import gradients_of
from alignbench.training.meter import Meter, metered

PIPELINES = {"sd3": SD3, "flux2": Flux2}  # of diffusers
FAMILIES = PIPELINES | {"sit": SiT}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """{family: settings of its small model}, made once."""
    top = tmp_path_factory.mktemp("backends")
    found = {name: backend(name, top) | {"size": 32, "guidance": 4.0, "dtype": "float32"} for name in FAMILIES}
    names = [*PROMPTS, *(f"prompt number {i}" for i in range(998))]
    (top / "classes.txt").write_text("\n".join(names))
    found["sit"] |= {"classes": str(top / "classes.txt"), "guided_channels": 4}
    return found


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def load(small, family):
    return lambda **settings: FAMILIES[family](**{**small[family], **settings}).load()


def generators(n=2):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def some(flow):
    return flow.noise(2, generators()), flow.encode(PROMPTS)


def perturb(flow):
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))


def gradients(v, flow, *more):
    weights = [*flow.parameters(), *more]
    found = torch.autograd.grad((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum(), weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found)]


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_is_two_branches(load):
    """v = v_neg + g (v_pos - v_neg), where v_neg is the velocity of the empty prompt; at most 1 is no guidance."""
    flow = load()
    x, cond = some(flow)
    plain = flow.at(guidance=1.0)
    with torch.no_grad():
        v_pos, v_neg = plain.velocity(x, 0.5, cond), plain.velocity(x, 0.5, flow.encode(["", ""]))
        torch.testing.assert_close(flow.velocity(x, 0.5, cond), v_neg + 4 * (v_pos - v_neg), rtol=1e-5, atol=1e-5)
        assert torch.equal(flow.at(guidance=0.3).velocity(x, 0.5, cond), v_pos)
    assert (v_pos - v_neg).abs().max() > 1e-2


def test_stop_is_the_gradient_of_the_prompts_branch_alone(load):
    """In parameters and in x: "stop" gives g times the unguided gradient, "full" the formula's own."""
    stop, full = load(negative_gradient="stop"), load()
    x, cond = some(full)
    x.requires_grad_()
    plain, empty = full.at(guidance=1.0), full.encode(["", ""])
    v_pos, v_neg = plain.velocity(x, 0.5, cond), plain.velocity(x, 0.5, empty)
    exact = gradients(v_neg + 4 * (v_pos - v_neg), full, x)
    alone = gradients(4 * plain.velocity(x, 0.5, cond), full, x)
    for flow, expected in ((full, exact), (stop, alone)):
        v = flow.velocity(x, 0.5, cond)
        torch.testing.assert_close(v, v_neg + 4 * (v_pos - v_neg), rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(v, flow, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert (exact[-1] - alone[-1]).norm() > 0.1 * exact[-1].norm()
    a, b = (gradients(flow.velocity(x, 0.5, cond, reference=True), flow, x)[-1] for flow in (stop, full))
    assert torch.equal(a, b)  # the base model's is exact whatever the policy


@pytest.mark.parametrize(("changes", "spent"), [
    ({"guidance": 1.0}, (2, 2, 6)),
    ({"negative_gradient": "full"}, (4, 4, 12)),
    ({"negative_gradient": "stop"}, (4, 2, 12)),
])  # fmt: skip
def test_the_meter_counts_every_evaluation(load, changes, spent):
    """A guided velocity of two samples is four evaluations; of those of a constant branch none has a gradient.

    Those that a backward makes again are counted as such.
    """
    flow, meter = load(**changes), Meter()
    rows = []
    flow.transformer.register_forward_hook(lambda _, inputs, v: rows.append(len(v if torch.is_tensor(v) else v[0])))
    seen = metered(flow, meter)
    x, cond = some(flow)
    without, grad, again = spent
    with torch.no_grad():
        seen.velocity(x, 0.5, cond)
    assert (meter.nfe_forward, meter.nfe_grad) == (without, 0)
    v = seen.velocity(x, 0.5, cond)
    constant = without - grad
    assert (meter.nfe_forward, meter.nfe_grad) == (without + constant, grad)
    v.sum().backward()
    integrate(seen, x, flow.sigmas(3), cond, grad=True).sum().backward()
    assert meter.nfe_recomputed == again
    assert meter.nfe_forward + meter.nfe_grad + meter.nfe_recomputed == sum(rows)


def test_the_empty_prompt_is_encoded_once(load):
    """However often it guides, and in every view."""
    flow, calls = load(), []
    encode = flow._text.encode_one
    flow._text._encode = lambda prompt: calls.append(prompt) or encode(prompt)
    x, cond = some(flow)
    with torch.no_grad():
        for each in (flow, flow.at(guidance=2.0), flow.at(guidance=3.0)):
            each.velocity(x, 0.5, cond)
    assert calls == [*PROMPTS, ""]


# -- what flux.py promises too -----------------------------------------------------------------------------------------


def test_every_sample_has_its_own_sigma(load):
    """velocity with one sigma per sample equals one call per sample, to rounding; fp32."""
    flow = load()
    x, cond = some(flow)
    with torch.no_grad():
        both = flow.velocity(x, torch.tensor([0.9, 0.2]), cond)
        apart = [flow.velocity(x[i : i + 1], s, cond[i : i + 1]) for i, s in enumerate((0.9, 0.2))]
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-4, atol=1e-4)
    assert both.dtype == torch.float32


def test_fresh_lora_is_the_base(load):
    """B starts at zero, so an untrained adapter changes no bit; every kind of block has one."""
    adapted, flow = load(tune="lora", lora_rank=4), load()
    x, cond = some(flow)
    with torch.no_grad():
        assert torch.equal(adapted.velocity(x, 0.5, cond), flow.velocity(x, 0.5, cond))
    names = [name for name, _ in adapted.named_parameters()]
    assert all("lora" in name for name in names)
    blocks = {name.rpartition(".lora_")[0].partition(".")[0] for name in names}
    assert blocks == {name for name, _ in flow.transformer.named_children() if name.endswith("blocks")}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_reference_does_not_learn(load, tune):
    """After training moved the weights, reference=True is still the base, in every view, guided or not."""
    trained, flow = load(tune=tune, lora_rank=4, gradient_checkpointing=True), load()
    perturb(trained)
    x, cond = some(flow)
    for guidance in (1.0, 4.0):
        with torch.no_grad():
            base = flow.at(guidance=guidance).velocity(x, 0.5, cond)
            view = trained.at(guidance=guidance)
            assert (view.velocity(x, 0.5, cond) - base).abs().max() > 1e-3
            assert torch.equal(view.velocity(x, 0.5, cond, reference=True), base)


@pytest.mark.parametrize("negative", ["full", "stop"])
def test_checkpointing_changes_memory_not_gradients(load, negative):
    """Recomputed activations give the same gradient in every trained parameter, through network and decoder."""
    grads = []
    for checkpointing in (False, True):
        flow = load(gradient_checkpointing=checkpointing, negative_gradient=negative)
        x, cond = some(flow)
        flow.decode(x - flow.velocity(x, 1.0, cond)).square().mean().backward()
        grads.append(gradients_of(flow))
    assert any(g.abs().sum() > 0 for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_decoder_is_differentiable(load):
    """Along any direction, the gradient of decode equals its central difference."""
    flow = load()
    flow.vae.decoder.conv_out.weight.data *= 0.5
    x = 0.2 * flow.noise(1, generators(1))
    rng = torch.Generator().manual_seed(5)
    direction, weight = torch.randn(x.shape, generator=rng), torch.randn((1, 3, 32, 32), generator=rng)

    def f(t):
        return (flow.decode(x + t * direction) * weight).double().sum()

    t = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(f(t), t)
    with torch.no_grad():
        pixels = flow.decode(x)
        assert 0 < pixels.min() < pixels.max() < 1  # away from the clamp
        difference = (f(1e-3) - f(-1e-3)) / 2e-3
    assert slope.abs() > 1e-2
    torch.testing.assert_close(slope.double(), difference.double(), rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_bfloat16_trains_float32_weights(load):
    """Trained weights and velocities are fp32, frozen parts bfloat16; the velocity is near fp32's, full or LoRA."""
    exact = load()
    x, cond = some(exact)
    with torch.no_grad():
        v = exact.at(guidance=1.0).velocity(x, 0.5, cond)
    for tune in ("full", "lora"):
        half = load(dtype="bfloat16", tune=tune, lora_rank=2)
        assert {p.dtype for p in half.parameters()} == {torch.float32}
        assert half.vae.dtype == torch.bfloat16
        rough = half.at(guidance=1.0).velocity(x, 0.5, half.encode(PROMPTS))
        assert rough.dtype == torch.float32
        assert (rough - v).norm() < 0.1 * v.norm()
        half.velocity(x, 0.5, half.encode(PROMPTS)).sum().backward()
        assert any(g.abs().sum() > 0 for g in gradients_of(half))


def test_text_is_encoded_once_and_alone(load):
    """A prompt's embedding depends on neither batch nor order."""
    flow = load()
    alone, together = load().encode(PROMPTS[1:]), flow.encode([*PROMPTS, PROMPTS[0]])
    again = flow.at(guidance=2.0).encode(PROMPTS[::-1])
    for name, rows in together.tensors.items():
        assert torch.equal(rows[0], rows[2])
        assert torch.equal(rows[:2], again.tensors[name].flip(0))
        assert torch.equal(alone.tensors[name][0], rows[1])


@pytest.mark.slow
def test_published_weights_take_the_place_of_the_models(load, tmp_path):
    """A transformer that was saved, and adapters that were saved: the same velocity as before."""
    for kind, tune in (("transformer", "full"), ("lora", "lora")):
        trained = load(tune=tune, lora_rank=3, lora_alpha=3)
        perturb(trained)
        x, cond = some(trained)
        save = trained.transformer.save_pretrained if kind == "transformer" else trained.transformer.save_lora_adapter
        save(tmp_path / kind)
        flow = load()
        Checkpoint(weights=str(tmp_path / kind), kind=kind).prepare(flow)
        with torch.no_grad():
            expected = trained.velocity(x, 0.5, cond)
            torch.testing.assert_close(flow.velocity(x, 0.5, cond), expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(flow.velocity(x, 0.5, cond, reference=True), load().velocity(x, 0.5, cond))


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_transformer_costs_what_torch_counts(load, family, small):
    """Forward FLOPs, parameters, adapters and text encoders exactly; two branches are two forwards."""
    flow, made = load(), FAMILIES[family](**small[family])
    measures = made.cost_model
    assert measures.transformer.parameters == sum(p.numel() for p in flow.transformer.parameters())
    pipeline = made._pipeline()
    encoders = [getattr(pipeline, part) for part in made.models if part.startswith("text_encoder")]
    assert [e.parameters for e in measures.encoders] == [sum(p.numel() for p in each.parameters()) for each in encoders]
    x, cond = some(flow)
    tokens = measures.tokens(32, made.text_tokens)
    assert tokens == Tokens(64, made.text_tokens)
    forward = measures.transformer.forward(tokens)
    with torch.no_grad():
        flow.velocity(x, 0.5, cond)  # the empty prompt is encoded now
        assert flops(lambda: flow.at(guidance=1.0).velocity(x, 0.5, cond)) == 2 * forward
        assert flops(lambda: flow.velocity(x, 0.5, cond)) == 2 * forward * made.branches(4.0)
    adapted = load(tune="lora", lora_rank=4)
    assert sum(p.numel() for p in adapted.parameters()) == measures.transformer.adapters(made.lora_targets, 4)
    v = flow.at(guidance=1.0).velocity(x, 0.5, cond)
    seen = flops(lambda: v.sum().backward())
    assert seen == pytest.approx(2 * measures.transformer.backward(tokens, full=True), rel=0.05)  # none to the inputs


@pytest.mark.parametrize("family", PIPELINES)
def test_plans_know_the_length_of_the_text(load, family, small):
    """As many text tokens as a prompt has."""
    words = load().encode(PROMPTS).tensors["text"].shape[1]
    assert FAMILIES[family](**small[family]).text_tokens == words


# -- mistakes ----------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "SanaPipeline"}'), "holds a SanaPipeline"),
        (lambda f: truncate(f / "transformer/diffusion_pytorch_model.safetensors"), "truncated"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "text_encoder/model.safetensors").write_bytes(b""), "empty"),
        (lambda f: (f / "text_encoder/config.json").unlink(), "missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "missing or empty"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_broken_folder_is_one_clear_line(tmp_path, small, family, change, says):
    """A missing, truncated, empty or foreign file is named before anything is loaded."""
    shutil.copytree(small[family]["model"], tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(UserError) as error:
        FAMILIES[family](model=str(tmp_path / "copy"), size=32).files()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_missing_shard_is_named(tmp_path, small, family):
    """An index that names two shards, one of which is missing, is refused."""
    shutil.copytree(small[family]["model"], tmp_path / "copy")
    folder = tmp_path / "copy" / "transformer"
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "of-2.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    with pytest.raises(UserError, match=r"of-2\.safetensors is missing"):
        FAMILIES[family](model=str(tmp_path / "copy"), size=32).files()


@pytest.mark.parametrize("family", PIPELINES)
def test_weights_of_another_precision_are_not_the_models(tmp_path, small, family):
    """model.fp16.safetensors beside model.safetensors, as the hub's SD3 has it: whether it is there changes no id."""
    folder = shutil.copytree(small[family]["model"], tmp_path / "copy")
    before = FAMILIES[family](model=str(folder), size=32).files()
    shutil.copy(folder / "text_encoder/model.safetensors", folder / "text_encoder/model.fp16.safetensors")
    assert FAMILIES[family](model=str(folder), size=32).files() == before


@pytest.mark.parametrize("family", PIPELINES)
def test_wrong_settings_are_one_clear_line(load, family, small):
    """Another family's model, a size off the token grid, adapters that fit nothing: what, and what instead."""
    cls = FAMILIES[family]
    with pytest.raises(UserError, match=f"holds a FluxPipeline; {family} needs a {cls.pipeline}"):
        cls(model="shapes").files()
    with pytest.raises(UserError, match=r"backend\.size: 30 pixels are not a multiple of 4"):
        cls(model=small[family]["model"], size=30).files()
    with pytest.raises(UserError, match="size: 33 pixels"):
        load().at(size=33)
    with pytest.raises(UserError, match="nor in the hub cache"):
        cls(model="no-such-owner/no-such-model").files()
    with pytest.raises(UserError, match="lora_targets"):
        load(tune="lora", lora_targets=("attn.to_x",))


@pytest.mark.parametrize("family", PIPELINES)
def test_files_need_no_torch(small, family):
    """The check of every file imports neither torch nor diffusers; the registry knows the backend by its name."""
    code = f"""import sys; from alignbench.plugins import Registry
backend = Registry().make("backend", {{"name": {family!r}, "model": {small[family]["model"]!r}, "size": 32}}, "")
assert backend.files() and backend.cost_model and backend.deterministic is None
assert not {{"torch", "diffusers"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- methods -----------------------------------------------------------------------------------------------------------

METHODS = [
    LeapAlign(steps=4),
    ReFL(steps=4, last_n=2),
    DRaFTLV(steps=4),
    DRTune(steps=4, m=2),
    FlowBPSparse(steps=4),
    FlowBPBridge(steps=4, k=3),
    FlowBPLagrange(steps=4),
    DanceGRPO(steps=4, group=4, updates_per_rollout=2),
    FlowGRPO(steps=4, group=4),
    MixGRPO(steps=4, group=4, updates_per_rollout=2, window=2),
    VGGFlow(steps=4, reward_scale=10.0, timestep_fraction=0.4),
    VGGFlow(steps=4, reward_scale=10.0, timestep_fraction=0.4, value_net="small"),
    AdjointMatching(steps=4, late=2, early=1, lam=1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, scope="class")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name, scope="class")
class TestMethods(MethodContract):
    """Every method keeps the contract on each family, with guidance and LoRA."""

    lr = 1e-3
    updates = 20

    @pytest.fixture(autouse=True)
    def case(self, small, family, method):
        self.method, self.family, self.settings = method, FAMILIES[family], small[family]

    def flow(self):
        return self.family(**self.settings, tune="lora", lora_rank=2, lora_alpha=2).load()

    def reward(self):
        return Reward(Term(Quadratic(target=1.0)))

    def test_one_batch_equals_its_micro_batches(self) -> None:
        """In float32 with a random network: the loss and the gradient's norm agree to a hundredth."""
        (whole, *_), (split, *_) = self.run(self.flow(), 1), self.run(self.flow(), 1, self.micro)
        for name in ("loss", "grad_norm"):
            assert split[name] == pytest.approx(whole[name], rel=1e-2, abs=1e-6)


def test_what_is_of_training_alone_changes_no_base_model(family, small):
    """The untrained model's run has one id whatever the guidance and gradient of training; a trained one's differ."""
    registry, ids = Registry(), set()
    for change in ({}, {"negative_gradient": "stop"}, {"guidance": 2.0}):
        plain = settings(FAMILIES[family](**{**small[family], **change}))
        for method in ("base", "leapalign"):
            reward = {"evaluator": {"name": "hpsv2", "weights": "shapes"}, "margin": None, "weight": 1.0}
            chosen = settings(registry.make("method", {"name": method}, "method"))
            training = Training(budget=Budget(images=2), batch=2)
            parts = {"backend": plain, "method": chosen, "reward": [reward], "training": training}
            spec = RunSpec(label="any", prompts="shapes/train", **parts)
            ids.add((method, run_id(spec, build(spec, registry), registry, [])))
    assert sorted(method for method, _ in ids) == ["base", *["leapalign"] * 3]


def test_the_registry_lists_them():
    """By their names, beside flux."""
    assert {*FAMILIES, "flux"} <= set(Registry().names("backend"))

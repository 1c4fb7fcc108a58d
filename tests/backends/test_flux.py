"""The Flux backend is FluxPipeline, opened for gradients."""

import subprocess
import sys

import pytest
import torch
from support import tiny

from alignbench.backends.flux import Flux, pack, unpack
from alignbench.config import UserError
from alignbench.flow import Cond, integrate

PROMPTS = ["a photo of a red circle", "two blue square"]
WORDS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.flux_folder(tmp_path_factory.mktemp("flux"), scale=2.0)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return tiny.flux_folder(tmp_path_factory.mktemp("schnell"), guidance=False)


def load(folder, **settings):
    plain = {"size": 32, "dtype": "float32", "max_sequence_length": WORDS}
    return Flux(model=str(folder), **{**plain, **settings}).load()


@pytest.fixture(scope="module")
def flow(folder):
    return load(folder)


def generators(n=2):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def pipeline(folder, **call):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, output_type="pt", **call).images


def sample(flow, steps):
    with torch.no_grad():
        x = flow.noise(2, generators())
        return flow.decode(integrate(flow, x, flow.sigmas(steps), flow.encode(PROMPTS)))


def perturb(flow):
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))


def some(flow):
    return flow.noise(2, generators()), flow.encode(PROMPTS)


@pytest.mark.parametrize(("size", "guidance", "words"), [(32, 3.5, WORDS), (64, 1.0, WORDS), (40, 7.0, 512)])
def test_same_latents_in_same_image_out_as_the_pipeline(folder, size, guidance, words):
    """With dynamic shift and guidance on, images equal FluxPipeline's to 1e-5 in fp32, at any size and text length."""
    flow = load(folder, max_sequence_length=words).at(size=size, guidance=guidance)
    call = {"num_inference_steps": 6, "guidance_scale": guidance, "max_sequence_length": words}
    call |= {"height": size, "width": size}
    theirs = pipeline(folder, latents=flow.noise(2, generators()), **call)
    assert theirs.std() > 0.05
    assert (sample(flow, 6) - theirs).abs().max() <= 1e-5


def test_the_packaged_model_too():
    """ "shapes" loads like any other folder, and its images are FluxPipeline's."""
    flow = load("shapes", max_sequence_length=512)
    words = flow.encode(PROMPTS).tensors["text"].shape[1]
    call = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": words}
    theirs = pipeline(Flux(model="shapes").folder, latents=flow.noise(2, generators()), **call)
    assert (sample(flow, 4) - theirs).abs().max() <= 1e-5


def test_noise_is_the_pipelines_own_draw(folder, flow):
    """The same CPU generators give FluxPipeline's own initial latents, hence its own images."""
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": WORDS}
    assert (sample(flow, 2) - pipeline(folder, generator=generators(), **call)).abs().max() <= 1e-5


def test_a_model_without_guidance_embedding_works(schnell):
    """Schnell's layout (no guidance embedding, no dynamic shift) equals the pipeline too; guidance changes nothing."""
    flow = load(schnell)
    call = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": WORDS}
    theirs = pipeline(schnell, latents=flow.noise(2, generators()), **call)
    assert (sample(flow, 4) - theirs).abs().max() <= 1e-5
    assert torch.equal(sample(flow.at(guidance=9.0), 4), sample(flow, 4))
    assert torch.equal(flow.sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_the_grid_is_shifted_by_the_number_of_tokens(flow):
    """s -> e^mu s / (1 + (e^mu - 1) s), where mu is linear in tokens: 0.5 at 256, 1.15 at 4096 (FLUX.1-dev)."""
    for size in (32, 64, 256):
        tokens = (size // 4) ** 2
        shift = torch.tensor(0.5 + (tokens - 256) / (4096 - 256) * 0.65).exp()
        s = torch.linspace(1, 1 / 25, 25)
        expected = torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1)])
        torch.testing.assert_close(flow.at(size=size).sigmas(25), expected, rtol=1e-5, atol=1e-6)


def test_packing_is_a_bijection():
    """unpack(pack(z)) = z, and a token is a 2 x 2 patch of every channel."""
    z = torch.arange(2.0 * 4 * 6 * 6).view(2, 4, 6, 6)
    assert torch.equal(unpack(pack(z), 3), z)
    assert torch.equal(pack(z)[0, 1], z[0, :, :2, 2:4].reshape(-1))


def test_every_sample_has_its_own_sigma(flow):
    """velocity with one sigma per sample equals one call per sample; a number is that number for all."""
    x, cond = some(flow)
    with torch.no_grad():
        both = flow.velocity(x, torch.tensor([0.9, 0.2]), cond)
        apart = [flow.velocity(x[i : i + 1], s, cond[i : i + 1]) for i, s in enumerate((0.9, 0.2))]
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert both.dtype == torch.float32


def test_guidance_is_an_input(flow):
    """Another guidance gives another velocity; the training flow keeps its own."""
    x, cond = some(flow)
    with torch.no_grad():
        assert (flow.velocity(x, 0.5, cond) - flow.at(guidance=1.0).velocity(x, 0.5, cond)).abs().max() > 1e-4
    assert flow.guidance == 3.5


def test_fresh_lora_is_the_base(folder, flow):
    """B starts at zero, so an untrained adapter changes no bit; its A is the same in every run."""
    adapted = load(folder, tune="lora", lora_rank=4)
    x, cond = some(flow)
    with torch.no_grad():
        assert torch.equal(adapted.velocity(x, 0.5, cond), flow.velocity(x, 0.5, cond))
    again = dict(load(folder, tune="lora", lora_rank=4).named_parameters())
    assert again
    assert all("lora" in name and torch.equal(p, again[name]) for name, p in adapted.named_parameters())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_reference_does_not_learn(folder, flow, tune):
    """After training moved the weights, reference=True is still the base, in every view, with a gradient to x."""
    trained = load(folder, tune=tune, gradient_checkpointing=True)
    perturb(trained)
    x, cond = some(flow)
    with torch.no_grad():
        base = flow.velocity(x, 0.5, cond)
        assert (trained.velocity(x, 0.5, cond) - base).abs().max() > 1e-3
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    v = trained.at(guidance=3.5).velocity(x, 0.5, cond, reference=True)
    assert torch.equal(v, base)
    trained.velocity(x, 0.5, cond)  # the adapters are back, before the backward
    v.square().sum().backward()
    flow.velocity(y, 0.5, cond).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert all(p.grad is None for p in trained.parameters())
    flow.transformer.zero_grad()


def test_checkpointing_changes_memory_not_gradients(folder):
    """Recomputed activations give the same gradient in every trained parameter, through network and decoder."""
    grads = []
    for checkpointing in (False, True):
        flow = load(folder, gradient_checkpointing=checkpointing)
        x, cond = some(flow)
        flow.decode(x - flow.velocity(x, 1.0, cond)).square().mean().backward()
        grads.append([p.grad for p in flow.parameters() if p.grad is not None])
    assert len(grads[0]) > 50
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_decoder_is_differentiable(flow):
    """Along any direction, the gradient of decode equals its central difference."""
    x = 0.2 * flow.noise(1, generators(1))
    direction, weight = torch.randn(x.shape), torch.randn(1, 3, 32, 32)

    def f(t):
        pixels = flow.decode(x + t * direction)
        return (pixels * weight).double().sum()

    t = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(f(t), t)
    with torch.no_grad():
        pixels = flow.decode(x)
        assert 0 < pixels.min() < pixels.max() < 1  # away from the clamp
        difference = (f(1e-3) - f(-1e-3)) / 2e-3
    assert slope.abs() > 1e-2
    torch.testing.assert_close(slope.double(), difference.double(), rtol=2e-3, atol=2e-3)


def test_the_clamps_gradient_is_a_choice(folder, flow):
    """Hard: saturated pixels get no gradient. Straight-through: the same pixels, and all of them get one."""
    soft = load(folder, clamp="straight_through")
    bias = flow.vae.decoder.conv_out.bias
    gradients = []
    for each in (flow, soft):
        each.vae.decoder.conv_out.bias.data += 50.0  # every pixel far above 1
        x = flow.noise(1, generators(1)).requires_grad_()
        pixels = each.decode(x)
        assert torch.equal(pixels, torch.ones_like(pixels))
        gradients.append(torch.autograd.grad(pixels.square().sum(), x)[0])
    bias.data -= 50.0
    assert gradients[0].abs().max() == 0
    assert gradients[1].abs().max() > 0


def test_bfloat16_trains_float32_weights(folder, flow):
    """Autocast: trained weights and velocities are fp32, frozen parts bfloat16, the velocity is within 5 % of fp32's.

    At guidance 4 and sigma 0.5, whose thousandfold bfloat16 holds exactly. Otherwise both are rounded before they are
    embedded, as in FluxPipeline itself, and a random network is far from smooth in them.
    """
    half = load(folder, dtype="bfloat16")
    adapted = load(folder, dtype="bfloat16", tune="lora", lora_rank=2)
    assert {p.dtype for f in (half, adapted) for p in f.parameters()} == {torch.float32}
    assert half.vae.dtype == torch.bfloat16 == adapted.transformer.x_embedder.weight.dtype
    x, _ = some(flow)
    with torch.no_grad():
        exact, *rough = (f.at(guidance=4.0).velocity(x, 0.5, f.encode(PROMPTS)) for f in (flow, half, adapted))
    for v in rough:
        assert v.dtype == torch.float32
        assert (v - exact).norm() < 0.05 * exact.norm()
    half.velocity(x, 0.5, half.encode(PROMPTS)).sum().backward()
    assert half.parameters()[0].grad.dtype == torch.float32


def test_text_is_encoded_once_and_alone(folder):
    """A prompt's embedding depends on neither batch nor order, and its second use runs no encoder."""
    flow = load(folder)
    alone = load(folder).encode(PROMPTS[1:])
    together = flow.encode([*PROMPTS, PROMPTS[0]])
    calls = []
    flow._text.t5.register_forward_hook(lambda *_: calls.append(1))
    again = flow.at(size=64).encode(PROMPTS[::-1])
    assert not calls
    for name, rows in together.tensors.items():
        assert torch.equal(rows[0], rows[2])
        assert torch.equal(rows[:2], again.tensors[name].flip(0))
        assert torch.equal(alone.tensors[name][0], rows[1])


def test_the_tokenizers_length_caps_the_text(tmp_path):
    """max_sequence_length never exceeds the T5 tokenizer's own model_max_length."""
    flow = load(tiny.flux_folder(tmp_path, t5_length=16), max_sequence_length=512)
    assert flow.encode(PROMPTS).tensors["text"].shape == (2, 16, 24)


def test_only_the_transformer_is_trained(flow):
    """Full fine-tuning trains every transformer parameter and no other; a backward reaches them."""
    assert len(flow.parameters()) == len(list(flow.transformer.parameters()))
    x, cond = some(flow)
    assert isinstance(cond, Cond)
    flow.velocity(x, 0.5, cond).sum().backward()
    assert flow.transformer.proj_out.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for part in (flow.vae, flow._text.t5, flow._text.clip) for p in part.parameters())
    flow.transformer.zero_grad()


# -- mistakes ---------------------------------------------------------------------------------------------------------


def broken(folder, change):
    """The one line that ``files`` raises after ``change(folder)``."""
    change(folder)
    with pytest.raises(UserError) as error:
        Flux(model=str(folder), size=32).files()
    assert "\n" not in str(error.value)
    return str(error.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "SanaPipeline"}'), "a SanaPipeline"),
        (lambda f: truncate(f / "transformer/diffusion_pytorch_model.safetensors"), "truncated"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "text_encoder/model.safetensors").write_bytes(b""), "empty"),
        (lambda f: (f / "text_encoder_2/config.json").unlink(), "missing"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_broken_folder_is_one_clear_line(tmp_path, folder, change, says):
    """A missing, truncated, empty or foreign file is named before anything is loaded."""
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    assert says in broken(tmp_path / "copy", change)


def test_wrong_settings_are_one_clear_line(folder, flow):
    """A size off the token grid, a model that is nowhere, adapters that fit nothing: what, and what instead."""
    with pytest.raises(UserError, match=r"backend\.size: 30 pixels are not a multiple of 4"):
        Flux(model=str(folder), size=30).files()
    with pytest.raises(UserError, match="size: 33 pixels"):
        flow.at(size=33)
    with pytest.raises(UserError, match=r"there is no file or folder './nowhere'"):
        Flux(model="./nowhere").files()
    with pytest.raises(UserError, match="nor in the hub cache"):
        Flux(model="no-such-owner/no-such-model").files()
    with pytest.raises(UserError, match="lora_targets"):
        load(folder, tune="lora", lora_targets=("attn.to_x",))


def test_files_need_no_torch(folder):
    """The check of every file imports neither torch nor diffusers."""
    code = f"""import sys; from alignbench.backends.flux import Flux
assert len(Flux(model={str(folder)!r}, size=32).files()) == 14
assert not {{"torch", "diffusers"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)

"""An evaluation image is a function of (weights, protocol, prompt, index) and of nothing else."""

import hashlib

import pytest
import torch
from support import tiny

from alignbench.backends.flux import Flux
from alignbench.evaluation.images import IMAGES_PER_PASS, _images_per_pass, generate
from alignbench.evaluator import to_pil, to_tensor
from alignbench.experiment.spec import Protocol
from alignbench.flow import integrate, seeded
from alignbench.prompts import Prompt

WORDS = 16
PROMPTS = [
    Prompt(f"id{i}", f"a photo of {text}") for i, text in enumerate(["a red circle", "two blue square", "a"] * 3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def flow(folder):
    return Flux(model=str(folder), size=64, guidance=1.0, dtype="float32", max_sequence_length=WORDS).load()


def protocol(**settings):
    return Protocol(**{"prompts": "x", "images_per_prompt": 2, "steps": 3, "size": 32, **settings})


def digests(images):
    """Return {(prompt id, index): sha256 of the image's bytes}."""
    return {(prompt.id, index): hashlib.sha256(image.tobytes()).hexdigest() for prompt, index, image in images}


@pytest.fixture(scope="module")
def all_at_once(flow):
    return digests(generate(flow, PROMPTS, protocol()))


@pytest.mark.parametrize("together", [1, 3, 8])
def test_images_do_not_depend_on_the_batch(flow, all_at_once, together):
    """Generated for 1, 3 or 8 prompts at a time, images are byte-identical to those of one call for all prompts."""
    parts = [PROMPTS[i : i + together] for i in range(0, len(PROMPTS), together)]
    assert all_at_once == {k: v for part in parts for k, v in digests(generate(flow, part, protocol())).items()}


def test_images_do_not_depend_on_order_or_ranks(flow, all_at_once):
    """Reversed prompts, and three ranks' shards together, give the same bytes."""
    assert digests(generate(flow, PROMPTS[::-1], protocol())) == all_at_once
    shards = [digests(generate(flow, PROMPTS, protocol(), shard=(rank, 3))) for rank in range(3)]
    assert sum(map(len, shards)) == len(all_at_once)
    assert shards[0] | shards[1] | shards[2] == all_at_once


def test_a_resumed_run_makes_only_what_is_missing(flow, all_at_once):
    """Pairs in ``done`` are skipped; the others keep their bytes; if all are done, nothing is generated."""
    done = set(list(all_at_once)[1:8])
    rest = digests(generate(flow, PROMPTS, protocol(), done))
    assert rest == {key: value for key, value in all_at_once.items() if key not in done}
    assert list(generate(flow, PROMPTS, protocol(), set(all_at_once))) == []


def test_every_image_has_its_own_noise(flow, all_at_once):
    """Every index and prompt id has its own noise, even for equal texts; another seed changes every image."""
    assert len(set(all_at_once.values())) == len(all_at_once) == 18
    other = digests(generate(flow, PROMPTS, protocol(seed=1)))
    assert all(other[key] != value for key, value in all_at_once.items())


def test_the_protocol_sets_size_and_guidance(flow, folder):
    """Images follow the protocol's size, guidance and steps, not the training flow's, and equal FluxPipeline's."""
    from diffusers import FluxPipeline

    four_steps = protocol(images_per_prompt=1, steps=4, guidance=5.0, size=40)
    ours = next(generate(flow, PROMPTS[:1], four_steps))[2]
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 40, "width": 40, "max_sequence_length": WORDS}
    theirs = pipe(PROMPTS[0].text, generator=seeded(0, "id0", 0), **call).images[0]
    assert ours.size == theirs.size == (40, 40)
    assert (to_tensor(ours) - to_tensor(theirs)).abs().max() <= 1 / 255 + 1e-6  # one level, where rounding falls
    assert (flow.size, flow.guidance) == (64, 1.0)


@pytest.fixture(scope="module")
def trained(folder):
    """A flow whose weights differ from the base model's."""
    flow = Flux(model=str(folder), size=32, dtype="float32", max_sequence_length=WORDS).load()
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return flow


def test_all_steps_tuned_is_the_plain_sampler(trained):
    """Hybrid inference with ``tuned_steps = steps`` gives the same bytes."""
    plain = digests(generate(trained, PROMPTS[:2], protocol(steps=4)))
    assert digests(generate(trained, PROMPTS[:2], protocol(steps=4, tuned_steps=4))) == plain


@pytest.mark.parametrize("tuned", [1, 2, 3])
def test_hybrid_inference_switches_to_the_base_model(trained, tuned):
    """The trained model makes the first steps and the base model the rest: the images of a plain loop, bitwise."""
    flow, prompt = trained.at(size=32, guidance=2.0), PROMPTS[0]
    hybrid = protocol(steps=4, tuned_steps=tuned, guidance=2.0, images_per_prompt=_images_per_pass(flow))
    images = [image for _, _, image in generate(trained, [prompt], hybrid)]
    rngs = [seeded(0, prompt.id, index) for index in range(len(images))]
    x, t, cond = flow.noise(len(images), rngs), flow.sigmas(4), flow.encode([prompt.text] * len(images))
    with torch.no_grad():
        for i in range(4):
            x = x + (t[i + 1] - t[i]) * flow.velocity(x, t[i], cond, reference=i >= tuned)
        expected = [to_pil(pixels) for pixels in flow.decode(x)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    plain = next(generate(trained, [prompt], protocol(steps=4, guidance=2.0)))[2]
    assert images[0].tobytes() != plain.tobytes()


def test_the_pass_size_depends_only_on_the_image_size(flow):
    """Small images are generated 16 at a time; a 1024 px image of FLUX.1 (4096 tokens x 64) alone."""

    class Large:
        def noise(self, n, generators):
            return torch.empty(n, 4096, 64)

    assert _images_per_pass(flow) == IMAGES_PER_PASS
    assert _images_per_pass(Large()) == 1


def test_generation_has_no_side_effects(flow):
    """No graph is built, no gradient appears, and the global generator is not read or moved."""
    before = torch.get_rng_state()
    list(generate(flow, PROMPTS[:1], protocol()))
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in flow.parameters())


def test_pixels_are_rounded_to_the_nearest_level(flow):
    """to_pil then to_tensor is the identity on 8-bit levels, and moves other pixels by half a level at most."""
    levels = torch.randint(0, 256, (3, 5, 7)) / 255
    assert torch.equal(to_tensor(to_pil(levels)), levels)
    x = flow.noise(1, [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        pixels = flow.decode(integrate(flow, x, flow.sigmas(1), flow.encode(["a"])))[0]
    assert (to_tensor(to_pil(pixels)) - pixels).abs().max() <= 0.5 / 255 + 1e-6

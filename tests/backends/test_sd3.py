"""The SD3 backend is StableDiffusion3Pipeline, opened for gradients. What it shares with others: test_backends.py."""

import pytest
import torch

from alignbench.backends.cost.formulas import Model
from alignbench.backends.cost.published_configs import SD3_5_LARGE, SD3_5_MEDIUM, SD3_MEDIUM
from alignbench.backends.pipeline import unpack
from alignbench.backends.sd3 import SD3
from alignbench.config import UserError
from alignbench.flow import integrate
from alignbench.rehearsal.tiny_backends import sd3_folder

PROMPTS = ["a photo of a red circle", "two blue square"]
WORDS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """SD3.5-medium's layout, SD3-medium's without T5, and one whose shift depends on the number of tokens."""
    top = tmp_path_factory.mktemp("sd3")
    return {
        "sd3.5": sd3_folder(top / "a"),
        "no T5": sd3_folder(top / "b", t5=False, dual=()),
        "dynamic": sd3_folder(top / "c", dynamic=True),
    }


def load(folder, **settings):
    return SD3(model=str(folder), **{"size": 32, "dtype": "float32", "max_sequence_length": WORDS, **settings}).load()


def generators():
    return [torch.Generator().manual_seed(i) for i in range(2)]


def pipeline(folder, size, **call):
    from diffusers import StableDiffusion3Pipeline

    without = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, output_type="pt", max_sequence_length=WORDS, height=size, width=size, **call).images


def sample(flow, steps):
    with torch.no_grad():
        x = flow.noise(2, generators())
        return flow.decode(integrate(flow, x, flow.sigmas(steps), flow.encode(PROMPTS)))


@pytest.mark.parametrize("kind", ["sd3.5", "no T5", "dynamic"])
@pytest.mark.parametrize(("size", "guidance"), [(32, 4.5), (48, 1.0), (64, 7.0), (32, 0.0)])
def test_same_latents_in_same_image_out_as_the_pipeline(folders, kind, size, guidance):
    """Images are the pipeline's to 1e-5 in fp32, at any size, with and without guidance, T5, dual attention."""
    flow = load(folders[kind]).at(size=size, guidance=guidance)
    latents = unpack(flow.noise(2, generators()), flow.grid)
    theirs = pipeline(folders[kind], size, latents=latents, num_inference_steps=6, guidance_scale=guidance)
    assert theirs.std() > 0.05
    assert (theirs[0] - theirs[1]).abs().max() > 0.1
    assert (sample(flow, 6) - theirs).abs().max() <= 1e-5


def test_noise_is_the_pipelines_own_draw(folders):
    """The same CPU generators give the pipeline's own initial latents, hence its own images."""
    theirs = pipeline(folders["sd3.5"], 32, generator=generators(), num_inference_steps=2, guidance_scale=4.5)
    assert (sample(load(folders["sd3.5"]), 2) - theirs).abs().max() <= 1e-5


def test_training_may_have_flowbps_grid(folders):
    """linspace(1, 1/N, N), shifted by 3 and closed with 0, equals the pipeline's given those sigmas. Evaluation has
    the pipeline's own grid."""
    flow = load(folders["sd3.5"], spacing="linear")
    s = torch.linspace(1, 1 / 25, 25)
    torch.testing.assert_close(flow.sigmas(25), torch.cat([3 * s / (1 + 2 * s), torch.zeros(1)]))
    call = {"sigmas": torch.linspace(1, 1 / 5, 5).tolist(), "num_inference_steps": 5, "guidance_scale": 4.5}
    assert (sample(flow, 5) - pipeline(folders["sd3.5"], 32, generator=generators(), **call)).abs().max() <= 1e-5
    assert torch.equal(flow.at().sigmas(7), load(folders["sd3.5"]).sigmas(7))
    assert not torch.allclose(flow.at().sigmas(25), flow.sigmas(25), atol=0.05)


@pytest.mark.parametrize(
    ("published", "billions"),
    [(SD3_MEDIUM, 2.028), (SD3_5_MEDIUM, 2.243), (SD3_5_LARGE, 8.057)],
    ids=lambda v: str(v)[:5],
)
def test_the_full_size_builds_with_its_parameters(published, billions):
    """On the meta device, from the published configuration: what diffusers builds is what the plan counts.

    SD3.5-medium's published 2.5 B is these 2.243 B and a fixed table of 384 x 384 positions of 1536.
    """
    from diffusers import SD3Transformer2DModel

    config = {key: value for key, value in published["transformer"].items() if key != "_class_name"}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    with torch.device("meta"):
        network = SD3Transformer2DModel(**config, caption_projection_dim=width, sample_size=128, pos_embed_max_size=384)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert Model.read(published).transformer.parameters == count
    assert round(count / 1e9, 3) == billions
    table = sum(buffer.numel() for buffer in network.buffers())
    assert table == 384**2 * width


def test_the_published_text_encoders_are_counted():
    """CLIP-L 0.124 B and CLIP-bigG 0.695 B with their projections, T5-XXL 4.762 B: as transformers builds them."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    for part, billions in (("text_encoder", 0.124), ("text_encoder_2", 0.695)):
        config = {key: value for key, value in SD3_MEDIUM[part].items() if key not in ("model_type", "architectures")}
        with torch.device("meta"):
            encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        count = sum(parameter.numel() for parameter in encoder.parameters())
        assert count in [each.parameters for each in Model.read(SD3_MEDIUM).encoders]
        assert round(count / 1e9, 3) == billions


def test_a_size_beyond_the_positions_is_one_clear_line(folders):
    """The table of positions ends: what the largest size is."""
    with pytest.raises(
        UserError, match=r"backend\.size: 128 pixels exceed this model's 24 positions; choose at most 96"
    ):
        SD3(model=str(folders["sd3.5"]), size=128).files()


def test_the_turbo_model_gives_no_score():
    """SD3.5-large-turbo is distilled; no file says so, its name does."""
    assert "distilled" in SD3(model="stabilityai/stable-diffusion-3.5-large-turbo").deterministic
    assert SD3(model="turbo/stable-diffusion-3.5-medium").deterministic is None

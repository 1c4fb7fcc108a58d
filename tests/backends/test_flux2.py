"""The Flux2 backend is Flux2KleinPipeline, opened for gradients. What it shares with others: test_backends.py."""

import pytest
import torch
from support.tiny_sweep import PLUGIN, sweep_file

from alignbench.backends.cost.formulas import Model
from alignbench.backends.cost.published_configs import FLUX_2_KLEIN_4B, FLUX_2_KLEIN_9B
from alignbench.backends.flux2 import Flux2, unpatch
from alignbench.config import UserError
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.flow import integrate
from alignbench.plugins import Registry
from alignbench.rehearsal.tiny_backends import flux2_folder

PROMPTS = ["a photo of a red circle", "two blue square"]
WORDS = 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and a distilled one with the same weights."""
    top = tmp_path_factory.mktemp("flux2")
    return {name: flux2_folder(top / name, distilled=name == "distilled") for name in ("base", "distilled")}


def load(folder, **settings):
    return Flux2(model=str(folder), **{"size": 32, "dtype": "float32", "max_sequence_length": WORDS, **settings}).load()


def generators():
    return [torch.Generator().manual_seed(i) for i in range(2)]


def pipeline(folder, size, words=WORDS, **call):
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call |= {"output_type": "pt", "max_sequence_length": words, "height": size, "width": size}
    return pipe(prompt=PROMPTS, generator=generators(), **call).images


def sample(flow, steps):
    with torch.no_grad():
        x = flow.noise(2, generators())
        return flow.decode(integrate(flow, x, flow.sigmas(steps), flow.encode(PROMPTS)))


@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize(("size", "guidance", "words"), [(32, 4.0, WORDS), (48, 1.0, WORDS), (64, 7.0, 40)])
def test_same_noise_in_same_image_out_as_the_pipeline(folders, kind, size, guidance, words):
    """With and without guidance, at any size, also where the prompt is cut: to 1e-5 in fp32, from the same draw."""
    flow = load(folders[kind], max_sequence_length=words).at(size=size, guidance=guidance)
    theirs = pipeline(folders[kind], size, words, num_inference_steps=6, guidance_scale=guidance)
    assert theirs.std() > 0.05
    assert (theirs[0] - theirs[1]).abs().max() > 0.1
    assert (sample(flow, 6) - theirs).abs().max() <= 1e-5


def test_a_distilled_model_has_one_branch_and_no_score(folders):
    """Whatever the guidance, it is one evaluation; the base model with guidance is another velocity. By the name too,
    where no file is there."""
    flow = load(folders["distilled"])
    assert torch.equal(sample(flow.at(guidance=9.0), 4), sample(flow.at(guidance=0.0), 4))
    assert not torch.equal(sample(flow, 4), sample(load(folders["base"]), 4))
    settings = [Flux2(model=str(folders[kind])) for kind in ("base", "distilled")]
    settings += [Flux2(model=f"black-forest-labs/FLUX.2-klein-{kind}") for kind in ("base-4B", "4B", "base-9B", "9B")]
    assert [backend.branches(4.0) for backend in settings] == [2, 1, 2, 1, 2, 1]
    assert ["distilled" in (backend.deterministic or "") for backend in settings] == [False, True] * 3


def test_the_grid_is_shifted_by_tokens_and_steps(folders):
    """mu is linear in the steps between two lines in the tokens, at 10 and at 200 steps; of the second beyond 4300."""
    for size, steps in ((32, 10), (64, 25), (512, 50)):
        tokens = (size // 4) ** 2
        at_10, at_200 = 8.73809524e-5 * tokens + 1.89833333, 1.6927e-4 * tokens + 0.45666666
        mu = at_200 if tokens > 4300 else at_10 + (steps - 10) / 190 * (at_200 - at_10)
        s, shift = torch.linspace(1, 1 / steps, steps, dtype=torch.float64), torch.tensor(mu, dtype=torch.float64).exp()
        expected = torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1)]).float()
        flow = load(folders["base"]).at(size=size)
        torch.testing.assert_close(flow.sigmas(steps), expected, rtol=1e-5, atol=1e-6)


def test_a_token_is_a_patch():
    """unpatch puts channel 4c + 2i + j of a token at row i and column j of its patch in channel c."""
    tokens = torch.arange(2.0 * 9 * 8).view(2, 9, 8)
    z = unpatch(tokens, 3)
    assert z.shape == (2, 2, 6, 6)
    for token, channel in ((0, 0), (4, 5), (7, 6)):
        c, i, j = channel // 4, channel // 2 % 2, channel % 2
        assert z[1, c, 2 * (token // 3) + i, 2 * (token % 3) + j] == tokens[1, token, channel]


@pytest.mark.parametrize(
    ("published", "billions"), [(FLUX_2_KLEIN_4B, 3.876), (FLUX_2_KLEIN_9B, 9.079)], ids=["4B", "9B"]
)
def test_the_full_size_builds_with_its_parameters(published, billions):
    """On the meta device, from the published configuration: what is built is what the plan counts; Qwen3 too."""
    from diffusers import Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = {key: value for key, value in published["transformer"].items() if key != "_class_name"}
    qwen = {key: value for key, value in published["text_encoder"].items() if key != "model_type"}
    with torch.device("meta"):
        network, text_encoder = Flux2Transformer2DModel(**config), Qwen3ForCausalLM(Qwen3Config(**qwen))
    measures = Model.read(published)
    assert measures.transformer.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert round(measures.transformer.parameters / 1e9, 3) == billions
    assert measures.encoders[0].parameters == sum(parameter.numel() for parameter in text_encoder.parameters())


def test_policy_gradients_are_refused_on_a_distilled_model(folders, tmp_path):
    """When the sweep is read, with the reason; on the base model they are not."""
    for kind, folder in folders.items():
        backend = {"name": "flux2", "model": str(folder), "guidance": 4.0}
        case = {"label": "GRPO", "method": {"name": "flowgrpo", "group": 2, "steps": 3}}
        path = sweep_file(tmp_path, {"base": {"backend": backend}, "cases": [case]})
        if kind == "base":
            assert resolve(read(path), Registry([PLUGIN])).cells
        else:
            with pytest.raises(UserError, match=r"flowgrpo samples by an SDE, and .* is distilled to few steps"):
                resolve(read(path), Registry([PLUGIN]))

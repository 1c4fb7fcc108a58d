"""HPSv3: our port against the package's own inferencer, on random weights in the official layout."""

import msgspec
import numpy as np
import pytest
import torch
from official_inputs import agree, images, prompts

from alignbench import official
from alignbench.evaluator import to_tensor
from alignbench.evaluators.hpsv3 import HPSv3
from alignbench.rehearsal import tiny_qwen

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    official.install("hpsv3-official")
    folder = str(tiny_qwen.hpsv3_folder(tmp_path_factory.mktemp("hpsv3")))
    return HPSv3(weights=folder, base=folder)


def theirs(port, folder, **request):
    """The package's scores, each image with its prompt."""
    files = [folder / f"{i}.png" for i in range(len(images()))]
    for image, file in zip(images(), files):
        image.save(file)
    request = {"dtype": "float32", "batch": 1, "differentiable": False, **request}
    request |= {"checkpoint": port.checkpoint, "base": port.base_folder}
    request |= {"images": files, "prompts": [prompt.text for prompt in prompts()]}
    return np.array(official.run("hpsv3", request, folder)["scores"])


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_agree(port, tmp_path, batch):
    """Every size, mode and prompt, one by one and in padded batches."""
    agree(port.score(images(), prompts())["hpsv3"].to_numpy(), theirs(port, tmp_path, batch=batch))


@torch.no_grad()
def test_rewards_agree(port, tmp_path):
    """The tensor path, against the package's differentiable mode."""
    ours = [port.reward(to_tensor(i)[None], [p]).item() for i, p in zip(images(), prompts())]
    agree(np.array(ours), theirs(port, tmp_path, differentiable=True))


def exact_frequencies(port):
    """The port with the language model's frequencies as transformers computes them, in float32."""
    exact = msgspec.structs.replace(port)
    rotary = exact._model["model"].language_model.rotary_emb
    rotary.inv_freq.copy_(1e6 ** -(torch.arange(0, 16, 2) / 16))
    return exact


def test_half_precision_agrees(port, tmp_path):
    """As the package is set up, in bfloat16, its scores are ours; with exact frequencies they would be others."""
    official_half = theirs(port, tmp_path, dtype="bfloat16")

    def gap(evaluator):
        ours = evaluator.score(images(), prompts())["hpsv3"].to_numpy()
        return np.sqrt(np.mean((official_half - ours) ** 2))

    half, whole, exact = gap(msgspec.structs.replace(port, dtype="bfloat16")), gap(port), gap(exact_frequencies(port))
    print(f"package in bfloat16 - ours, RMS: bfloat16 {half:.4f}, float32 {whole:.4f}, exact frequencies {exact:.4f}")
    assert max(half, whole) < exact / 2


def test_the_engine_is_the_package(port):
    """``engine: official`` scores through the same script."""
    ours = port.score(images()[:3], prompts()[:3])["hpsv3"].to_numpy()
    engine = msgspec.structs.replace(port, engine="official")
    agree(ours, engine.score(images()[:3], prompts()[:3])["hpsv3"].to_numpy())

"""HPSv2.1: our port against the package's own ``score``, on random and on trained weights in the official layout."""

import json

import msgspec
import open_clip
import pytest
from official_inputs import agree, images, prompts

from alignbench import official
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.rehearsal import tiny_clip

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def environment():
    return official.install("hpsv2-official")


@pytest.fixture(scope="module", params=["random", "shapes"])
def port(request, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    return HPSv2(weights="shapes" if request.param == "shapes" else str(tiny_clip.hps_folder(folder)))


def test_scores_agree(port):
    """Every size, mode and prompt, batched by us, one by one by the package."""
    theirs = msgspec.structs.replace(port, engine="official").score(images(), prompts())
    agree(port.score(images(), prompts())["hpsv2.1"].to_numpy(), theirs["hpsv2.1"].to_numpy())


def test_the_architecture_is_the_packages(environment):
    """open_clip's ViT-H-14, which we build without a configuration file, is the one in the package."""
    (config,) = environment.glob("lib/python*/site-packages/hpsv2/src/open_clip/model_configs/ViT-H-14.json")
    assert json.loads(config.read_text()) == open_clip.get_model_config("ViT-H-14")


def test_the_answer_names_the_pinned_package(port, tmp_path):
    """The answer names the package's version, which is the one that the requirements pin."""
    request = {"checkpoint": port.checkpoint, "images": [], "prompts": []}
    answer = official.run("hpsv2", request, tmp_path)
    assert (answer["scores"], answer["versions"]["hpsv2x"]) == ([], "1.2.0")

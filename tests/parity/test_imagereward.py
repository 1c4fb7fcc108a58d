"""ImageReward: our port against the package's own ``score``, on random weights in the official layout."""

import msgspec
import numpy as np
import pytest
from official_inputs import agree, images, prompts

from alignbench import official
from alignbench.evaluators.imagereward import CHECKPOINT, CONFIG, ImageReward
from alignbench.rehearsal import tiny_imagereward

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    official.install("imagereward-official")
    folder = str(tiny_imagereward.imagereward_folder(tmp_path_factory.mktemp("image_reward")))
    return ImageReward(weights=folder, tokenizer=folder)


@pytest.fixture(scope="module")
def theirs(port):
    return msgspec.structs.replace(port, engine="official").score(images(), prompts())["imagereward"].to_numpy()


def test_scores_agree(port, theirs):
    """Every size, mode and prompt, batched by us, one by one by the package."""
    agree(port.score(images(), prompts())["imagereward"].to_numpy(), theirs)


def test_single_scores_agree_to_the_last_bit(port, theirs):
    """One by one, ours are the same operations in the same order."""
    ours = [port.score([image], [prompt])["imagereward"][0] for image, prompt in zip(images(), prompts())]
    assert np.array_equal(ours, theirs)


def test_the_answer_names_the_pinned_packages(port, tmp_path):
    """The answer names the packages' versions, which are those that the requirements pin."""
    request = {"checkpoint": port.folder / CHECKPOINT, "images": [], "prompts": []}
    beside = {"med_config": port.folder / CONFIG, "tokenizer": port.tokenizer_folder}
    answer = official.run("imagereward", {**request, **beside}, tmp_path)
    assert answer["scores"] == []
    assert (answer["versions"]["image-reward"], answer["versions"]["transformers"]) == ("1.5", "4.55.4")

"""Small checkpoints: every built-in evaluator has one and scores with it, and it is the same on every machine."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from alignbench.config import UserError
from alignbench.plugins import Registry
from alignbench.prompts import parse_prompt
from alignbench.rehearsal import random_weights, tiny_clip, tiny_evaluators
from alignbench.testing.evaluator_contract import random_image

A = [[-0.9690280556678772, 0.15309657156467438], [-0.9235105514526367, 1.3015536069869995]]  # draw("a", (2, 2))
EVALUATORS = sorted({*Registry().names("evaluator")} - {"picture_stats"})  # which has no weights
LINE = '{"prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.mark.filterwarnings("ignore:unifiedreward")  # a random judge writes no numbers
@pytest.mark.parametrize("name", EVALUATORS)
def test_every_built_in_evaluator_scores_with_its_small_checkpoint(name, folder):
    """Its files pass their checks, and every score is finite; UnifiedReward answers in words."""
    settings = tiny_evaluators.checkpoint(name, folder)
    more = {"max_new_tokens": 4} if name == "unifiedreward" else {}
    evaluator = Registry().make("evaluator", {"name": name, **settings, **more}, name)
    assert evaluator.files()
    images = [random_image(60, 80, 0), random_image(50, 40, 1)]
    base = [images] if evaluator.paired else []
    frame = evaluator.score(images, [parse_prompt(LINE, "x")] * 2, *base)
    if name == "unifiedreward":
        assert frame["raw"].str.len().gt(0).all()
    else:
        assert np.isfinite(frame[[metric.name for metric in evaluator.metrics]].to_numpy()).all()


def test_a_checkpoint_is_made_once(folder):
    """The second call returns the same settings and touches no file."""
    first = tiny_evaluators.checkpoint("aesthetic", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert tiny_evaluators.checkpoint("aesthetic", folder) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_checkpoint_is_complete_or_absent(tmp_path, monkeypatch):
    """If making it fails half way, nothing is left, and the next call makes it."""

    def half(folder):
        tiny_clip.clip_folder(folder)
        raise OSError("no space left on device")

    monkeypatch.setitem(tiny_evaluators.BUILDERS, "clipscore", half)
    with pytest.raises(OSError, match="no space"):
        tiny_evaluators.checkpoint("clipscore", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert (tmp_path / tiny_evaluators.checkpoint("clipscore", tmp_path)["weights"] / "model.safetensors").is_file()


def test_an_unknown_evaluator_is_refused_with_a_suggestion(tmp_path):
    """The error corrects a misspelt name and lists all names; nothing is made."""
    with pytest.raises(UserError, match=r"'pickscor'; did you mean 'pickscore'\? \(they exist for: aesthetic, "):
        tiny_evaluators.checkpoint("pickscor", tmp_path)
    assert not list(tmp_path.iterdir())


def test_random_numbers_are_the_same_everywhere():
    """They are PCG64's bits, the same in any numpy; no global generator is read or moved."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert random_weights.draw("a", (2, 2)).tolist() == random_weights.draw("a", (2, 2)).tolist() == A
    assert torch.equal(torch.get_rng_state(), state)
    many = random_weights.draw("b", (10_000,))
    assert abs(float(many.mean())) < 0.03
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_importing_the_names_does_not_load_torch():
    """Heavy libraries are imported only when a checkpoint is made."""
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, alignbench.rehearsal.tiny_evaluators; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

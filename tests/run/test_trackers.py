"""Trackers show what the store has, on request, and cannot harm a run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from support.tiny_sweep import alignbench, debug_sweep, sweep_file

from alignbench.config import UserError
from alignbench.run import trackers
from alignbench.run.trackers import Trackers

CONFIG = {"method": {"name": "last", "steps": 2}, "training": {"betas": [0.9, 0.99], "clip": None}}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return {tag: {step: value}} of a run's TensorBoard folder, as read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


@pytest.fixture
def accelerate(monkeypatch):
    from accelerate import PartialState

    PartialState()


def show(folder: Path, steps: range, warn=None, names=("tensorboard",), slope: float = 1.0) -> Trackers:
    """Log ``loss`` = slope * step over ``steps``."""
    shown = Trackers(names, folder, "last-0", "Last, seed 0", CONFIG, warn or pytest.fail)
    for step in steps:
        shown({"update": step, "loss": slope * step, "note": "no number"})
    shown.close()
    return shown


def test_tensorboard_shows_every_number_of_every_record(tmp_path):
    """A sweep with --track logs rewards, losses, norms and costs as in train.parquet, and its ids do not change."""
    path = sweep_file(tmp_path)
    assert debug_sweep(path, tmp_path / "store", "seed=0", "--track", "tensorboard") == 0
    (run,) = (tmp_path / "store" / "runs").glob("last-*")
    records = pd.read_parquet(run / "train.parquet")
    found = scalars(tmp_path / "store" / trackers.FOLDER / run.name)
    assert {"loss", "reward_mean", "grad_norm", "nfe_grad", "seconds"} <= set(found)
    for name in ("loss", "reward_mean", "grad_norm"):
        assert list(found[name]) == records["update"].tolist()
        assert list(found[name].values()) == pytest.approx(records[name].tolist(), rel=1e-6)
    assert alignbench("plan", path, "seed=0", store=tmp_path / "store") == 0


def test_a_resumed_run_continues_the_same_curve(tmp_path, accelerate):
    """Values logged after the last checkpoint are replaced, and the curve does not restart at step 0."""
    show(tmp_path, range(6))
    show(tmp_path, range(4, 8), slope=2.0)
    expected = {**{step: float(step) for step in range(4)}, **{step: 2.0 * step for step in range(4, 8)}}
    assert scalars(tmp_path / "tensorboard" / "last-0")["loss"] == expected
    assert len(list(tmp_path.rglob("hparams.yml"))) == 1


def test_a_tracker_that_fails_gives_a_warning_and_the_run_continues(tmp_path, accelerate, monkeypatch):
    """The warning comes once; the other trackers and the run are unaffected."""
    from accelerate.tracking import TensorBoardTracker

    told: list[str] = []

    def broken(self, values, step=None):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "log", broken)
        show(tmp_path, range(3), told.append)
    assert told == ["warning: tensorboard failed and is no longer used: OSError: the disk is full"]


def test_a_tracker_that_is_unknown_or_missing_stops_everything_before_it_starts(tmp_path, monkeypatch, capsys):
    """One line names the pip command, and no store is made."""
    with pytest.raises(UserError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        trackers.check(["tensorbord"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--track wandb: wandb is not installed; run `pip install wandb`"):
        trackers.check(["wandb"])
    monkeypatch.undo()
    words = (sweep_file(tmp_path), "--track", "nothing")
    assert alignbench("sweep", *words, store=tmp_path / "store") == 1
    assert "there is no tracker 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_settings_are_flat_for_every_tracker(tmp_path):
    """Nested names are joined, and values other than numbers, booleans and text become text."""
    found = Trackers([], tmp_path, "run", "title", CONFIG, print).config
    assert found["method.name"] == "last"
    assert (found["training.betas"], found["training.clip"]) == ("[0.9, 0.99]", "None")

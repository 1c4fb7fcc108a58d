"""Trackers show what the store has, on request, and cannot harm a run."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from support.tiny_sweep import alignbench, debug_sweep, sweep_file

from alignbench.config import UserError
from alignbench.launch.display import Display, Job, Outcome
from alignbench.reporting.score_summary import means
from alignbench.run import trackers
from alignbench.run.task import Progress
from alignbench.run.trackers import Shown, Trackers

CONFIG = {"method": {"name": "last", "steps": 2}, "training": {"betas": [0.9, 0.99], "clip": None}}
SHOWN = Shown("last-0", "Last, seed 0", "tiny", CONFIG)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return {tag: {step: value}} of a run's TensorBoard folder, as read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def show(folder: Path, steps: range, warn=None, names=("tensorboard",), slope: float = 1.0) -> Trackers:
    """Log ``loss`` = slope * step over ``steps``."""
    shown = Trackers(names, folder, SHOWN, warn or pytest.fail)
    for step in steps:
        shown.record({"update": step, "loss": slope * step, "note": "no number"})
    shown.close()
    return shown


class FakeRun:
    """A tracker's run, which keeps what it is given."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged = given, list[dict[str, Any]]()
        self.finished = False

    def log(self, numbers: dict[str, Any], step: int | None = None) -> None:
        self.logged.append({"update": step} | numbers)

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, monkeypatch) -> SimpleNamespace:
    """Return a tracker of this name, with its ``runs``."""
    module = SimpleNamespace(name=request.param, runs=list[FakeRun]())

    def init(project: str | None = None, **given: Any) -> FakeRun:
        module.runs.append(FakeRun(project=project, **given))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.slow
def test_tensorboard_shows_every_number_of_every_record(tmp_path):
    """A sweep with --track logs records as in train.parquet and scores as in the report; its ids do not change."""
    path = sweep_file(tmp_path)
    assert debug_sweep(path, tmp_path / "store", "seed=0", "--track", "tensorboard") == 0
    (run,) = (tmp_path / "store" / "runs").glob("last-*")
    records = pd.read_parquet(run / "train.parquet")
    found = scalars(tmp_path / "store" / trackers.FOLDER / run.name)
    assert {"loss", "reward_mean", "grad_norm", "nfe_grad", "seconds"} <= set(found)
    for name in ("loss", "reward_mean", "grad_norm"):
        assert list(found[name]) == records["update"].tolist()
        assert list(found[name].values()) == pytest.approx(records[name].tolist(), rel=1e-6)
    manifest = json.loads(next((tmp_path / "store/sweeps").glob("*.json")).read_text())
    (last,) = (entry for entry in manifest["runs"] if entry["id"] == run.name)
    (file,) = (tmp_path / "store/scores" / last["images"]).glob("bright@*.parquet")
    assert found["score/brightness (fraction)"] == {4: pytest.approx(pd.read_parquet(file)["brightness"].mean())}
    assert alignbench("plan", path, "seed=0", store=tmp_path / "store") == 0


def test_a_resumed_run_continues_the_same_curve(tmp_path):
    """In TensorBoard, values logged after the last checkpoint are replaced; the curve does not restart at step 0."""
    show(tmp_path, range(6))
    show(tmp_path, range(4, 8), slope=2.0)
    expected = {**{step: float(step) for step in range(4)}, **{step: 2.0 * step for step in range(4, 8)}}
    assert scalars(tmp_path / "tensorboard" / "last-0")["loss"] == expected


def test_a_resumed_run_is_drawn_once(fake, tmp_path):
    """It resumes under the same name and id, and each update is logged once, although some are made twice."""
    show(tmp_path, range(6), names=[fake.name])
    show(tmp_path, range(4, 8), names=[fake.name])
    first, second = fake.runs
    assert first.given == second.given
    assert first.given["resume"] == "allow"
    assert [entry["update"] for entry in first.logged + second.logged] == list(range(8))
    assert first.finished
    assert second.finished


def test_the_same_run_in_another_store_is_another_one(fake, tmp_path):
    """Two stores with one spec have runs of different names; so have a run and the one made after its deletion."""
    for store in ("a", "b"):
        show(tmp_path / store, range(2), names=[fake.name])
    (tmp_path / "b/runs/last-0" / trackers.FILE).unlink()
    show(tmp_path / "b", range(2), names=[fake.name])
    assert len({run.given["name"] for run in fake.runs}) == 3
    assert [len(run.logged) for run in fake.runs] == [2, 2, 2]


def test_runs_are_grouped_and_named(fake, tmp_path):
    """The group is the sweep, the name has label and seed, and settings keep their types, lists and nulls included."""
    show(tmp_path, range(1), names=[fake.name])
    given = fake.runs[0].given
    assert (given["project"], given["group"], given["config"]) == ("alignbench", "tiny", CONFIG)
    assert given["name"].startswith("Last, seed 0 (last-0-")


def test_scores_reach_the_tracker_with_their_unit(fake, tmp_path):
    """The mean of every measure that has one is logged at the number of updates of its weights."""
    from alignbench.plugins import Registry

    evaluator = Registry().make("evaluator", {"name": "geneval", "detector": "shapes"}, "evaluator")
    rows = [("p1", "color", 1.0), ("p2", "color", 0.0), ("p3", "count", 1.0)]
    frame = pd.DataFrame(rows, columns=["prompt_id", "tag", "geneval"]).assign(
        index=0, ok=True, error=None, geneval_strict=None
    )
    found = means(evaluator, frame.astype({"geneval_strict": float}))
    assert found == {"geneval (fraction)": pytest.approx(0.75)}  # the mean of the tasks' means, 1/2 and 1
    shown = Trackers([fake.name], tmp_path, SHOWN, pytest.fail)
    shown.scores(found, 50)
    assert fake.runs[0].logged == [{"update": 50, "score/geneval (fraction)": pytest.approx(0.75)}]


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_variables_of_wandb_override(fake, tmp_path, monkeypatch):
    """What WANDB_PROJECT, WANDB_NAME, WANDB_RUN_GROUP and WANDB_DIR name is left to wandb, which reads them."""
    show(tmp_path / "a", range(1), names=["wandb"])
    assert fake.runs[0].given["dir"] == str(tmp_path / "a")
    for name in ("PROJECT", "NAME", "RUN_GROUP", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    show(tmp_path / "b", range(1), names=["wandb"])
    assert fake.runs[1].given["project"] is None
    assert not {"name", "group", "dir"} & fake.runs[1].given.keys()


def test_a_tracker_that_fails_gives_a_warning_and_the_run_continues(fake, tmp_path):
    """The warning comes once; the other trackers and the run are unaffected."""
    told: list[str] = []

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    fake.init = broken
    show(tmp_path, range(3), told.append, names=[fake.name, "tensorboard"])
    assert told == [f"{fake.name} failed and is no longer used: OSError: the disk is full"]
    assert len(scalars(tmp_path / "tensorboard" / "last-0")["loss"]) == 3


def test_a_tracker_that_exits_does_not_end_the_run(fake, tmp_path):
    """Some end the process where they cannot go on; that is a warning like any other."""
    told: list[str] = []
    fake.init = lambda *_, **__: sys.exit("no such entity")
    show(tmp_path, range(3), told.append, names=[fake.name])
    assert told == [f"{fake.name} failed and is no longer used: SystemExit: no such entity"]


@pytest.mark.parametrize("kept", ['{"id": "x"}', '{"id": 5, "updates": {}}', "[]", "", '{"id": "x", "updates": []}'])
@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_a_damaged_record_of_a_tracker_does_not_end_the_run(fake, kept, tmp_path):
    """The run is drawn under a new name, and drawn there when it is resumed."""
    file = tmp_path / "runs/last-0" / trackers.FILE
    file.parent.mkdir(parents=True)
    file.write_text(kept)
    show(tmp_path, range(2), names=["wandb"])
    show(tmp_path, range(3), names=["wandb"])
    first, second = fake.runs
    assert first.given["id"] == second.given["id"] != "x"
    assert [entry["update"] for entry in first.logged + second.logged] == [0, 1, 2]


def test_jobs_that_score_one_run_at_once_draw_it_once(fake, tmp_path):
    """On a cluster the evaluators of an untrained row begin together, before any of them has kept a name."""
    jobs = [Trackers([fake.name], tmp_path, SHOWN, pytest.fail) for _ in range(2)]
    for job in jobs:
        job.scores({"brightness": 0.5}, 0)
    assert len({run.given["name"] for run in fake.runs}) == 1


def test_what_a_tracker_warns_of_is_told_once(fake, tmp_path, recwarn):
    """A tracker that goes on without its server says so by a Python warning, which becomes one of the run's."""
    told: list[str] = []

    def unreachable(project: str | None = None, **given: Any) -> FakeRun:
        warnings.warn("no server;\n continuing locally", stacklevel=2)
        run = FakeRun(**given)
        run.log = lambda *_, **__: warnings.warn("kept here", stacklevel=2)  # type: ignore[method-assign]
        return run

    fake.init = unreachable
    show(tmp_path, range(3), told.append, names=[fake.name])
    expected = ["no server; continuing locally", "kept here"]
    assert told == [f"{fake.name}: UserWarning: {text}" for text in expected]
    assert not recwarn.list


def test_who_started_a_run_reads_its_warnings(tmp_path):
    """A worker's warning is shown once where the sweep was started, while it runs or, at the latest, when it ends."""
    said: list[str] = []
    job = Job(SimpleNamespace(title="Last, seed 0"), [], tmp_path / "progress.json")  # type: ignore[arg-type]
    display, progress = Display([job], 1, log=said.append), Progress(job.progress)
    display.begin(job)
    progress("training", 0.1)
    progress.warn("wandb failed")
    display.refresh()
    progress("training", 1.0)
    display.refresh()
    progress.warn("late")
    display.end(job, Outcome(job.cell, "done"))
    assert said[:-1] == ["alignbench: Last, seed 0: wandb failed", "alignbench: Last, seed 0: late"]


def test_status_tells_what_jobs_warned_of(tmp_path):
    """On a cluster, `alignbench status` has the warnings of the latest job of each stage, with the run's title."""
    from alignbench.launch import status_table, submissions
    from alignbench.store.artefacts import Store

    for number in (1, 2):
        progress = Progress(tmp_path / f"{number}.json")
        progress.warn(f"warning {number}")
        job = submissions.JobEntry(f"{number}_0", "train", [], "last-0", str(progress.path))
        submissions.write(tmp_path / "jobs" / str(number), "tiny", "slurm", [job], "tiny")
    row = status_table.Row("Last, seed 0", "last-0", "done", "", "", "", "")
    assert status_table.warnings(Store(tmp_path), [row]) == ["Last, seed 0: warning 2"]


def test_a_tracker_that_cannot_work_stops_everything_before_it_starts(tmp_path, monkeypatch, capsys):
    """One line names what to do: a name, pip, a key; no store is made."""
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


def test_a_missing_key_stops_everything_before_it_starts(tmp_path, monkeypatch):
    """The line names the variable; without network no key is needed, and a run id for all runs is refused."""

    def login() -> None:
        raise ValueError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "HF_TOKEN", "TRACKIO_WRITE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--track wandb: .*No API key configured.; .* set WANDB_API_KEY"):
        trackers.check(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check(["wandb", "trackio"])
    monkeypatch.setenv("WANDB_RUN_ID", "x")
    with pytest.raises(UserError, match=r"WANDB_RUN_ID: .*unset it"):
        trackers.check(["wandb"])
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://localhost:1")
    with pytest.raises(UserError, match="set TRACKIO_WRITE_TOKEN"):
        trackers.check(["trackio"])

"""Milestones: weights kept on the way, and their images and scores, as complete as the final ones."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from msgspec import structs
from safetensors.torch import load_file
from support.sweep_process import PATIENCE, start, trainer, until
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, same, sweep_file, tables
from support.training_runs import LEAP, PROCESSES, STEPS, run
from support.training_runs import settings as training

from alignbench.analytic import PROMPTS, AffineFlow, QuadraticReward
from alignbench.backends.cost.formulas import GPUS
from alignbench.config import UserError, decode, merge
from alignbench.experiment import ids
from alignbench.experiment.document import read
from alignbench.experiment.plan import draft, resolve
from alignbench.experiment.spec import Budget, Protocol, Training
from alignbench.planning.estimate import estimate
from alignbench.plugins import Registry
from alignbench.reporting.analysis.results import Results
from alignbench.store import artefacts
from alignbench.store.manifest import Manifest, ManifestRun, read_manifest
from alignbench.store.stages import Stage

MILESTONES = {"base": {"training": {"milestones": [1, 3]}}}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A finished sweep of four updates with two milestones, of two prompts each, and one beyond its end."""
    folder = tmp_path_factory.mktemp("milestones")
    changes = merge(MILESTONES, {"evaluation": {"milestone_prompts": 2}, "grid": {"training.seed": [0]}})
    path = sweep_file(folder, merge(changes, {"base": {"training": {"milestones": [1, 3, 9]}}}))
    assert debug_sweep(path, folder / "store") == 0
    return folder


def manifest(folder: Path) -> Manifest:
    return read_manifest(next((folder / "store" / "sweeps").glob("*.json")))


def trained(folder: Path) -> ManifestRun:
    return manifest(folder).rows["Last"][0]


# -- settings and ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milestones", "budget", "said"),
    [
        ([2, 2], {"images": 8}, r"milestones: \[2, 2\] do not increase"),
        ([3, 1], {"images": 8}, r"milestones: \[3, 1\] do not increase"),
        ([1, 4], {"updates": 4}, "milestones: 4 is not before the end, update 4"),
        ([0], {"images": 8}, "milestones.*>= 1"),
    ],
)
def test_milestones_that_cannot_be_are_refused(milestones, budget, said):
    """One line with the place, before anything is loaded."""
    with pytest.raises(UserError, match=f"^x: base.training.*{said}"):
        decode(Training, {"budget": budget, "milestones": milestones}, "x: base.training")


def test_no_milestones_leave_every_id_as_it_was(tmp_path, monkeypatch):
    """The hash of a run without milestones has no such key, so that ids of earlier stores stand; with them it has."""
    hashed = []
    monkeypatch.setattr(ids, "content_id", lambda content: hashed.append(content) or f"{len(hashed):010}")
    for changes in ({}, MILESTONES):
        resolve(read(sweep_file(tmp_path, changes)), Registry([PLUGIN]))
    runs = [content["training"] for content in hashed if "training" in content]
    kept = {"budget", "optimizer", "batch", "micro_batch", "seed"}
    assert {frozenset(run) for run in runs} == {frozenset(kept), frozenset(kept | {"milestones"})}
    assert [run.get("milestones") for run in runs] == [None, None, [1, 3], [1, 3]]
    assert not any(content.get("update") == 0 for content in hashed)


def test_an_image_set_of_a_milestone_is_one_of_its_own():
    """Its id differs from the end's and from other milestones'; the end's is that of before there were milestones."""
    found = [ids.image_set_id("run", True, Protocol(prompts="p"), PROMPTS, update) for update in (None, 1, 2)]
    assert len(set(found)) == 3
    assert ids.image_set_id("run", True, Protocol(prompts="p"), PROMPTS) == found[0]


def test_rows_that_train_nothing_have_no_milestones(swept):
    """Their weights never move; and a manifest without milestones has no such key."""
    plain = json.loads(next((swept / "store" / "sweeps").glob("*.json")).read_text())
    runs = {run["label"]: run for run in plain["runs"]}
    assert "milestones" not in runs["Base"]
    assert [part["update"] for part in runs["Last"]["milestones"]] == [1, 3, 9]


# -- training ----------------------------------------------------------------------------------------------------------


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("weights-*.safetensors")}


def test_a_milestone_is_the_end_of_a_shorter_run(tmp_path):
    """The file after update u is, byte by byte, what a run whose budget is u updates ends with."""
    long = training(12, milestones=(2, 5))
    run(LEAP, long, tmp_path / "long", milestones=tmp_path / "kept")
    assert sorted(kept(tmp_path / "kept")) == ["weights-000002.safetensors", "weights-000005.safetensors"]
    for update in (2, 5):
        short = tmp_path / f"short{update}"
        run(LEAP, training(budget=Budget(updates=update)), short)
        assert (short / "final.safetensors").read_bytes() == kept(tmp_path / "kept")[artefacts.milestone_file(update)]


def test_milestones_move_nothing(tmp_path):
    """The end of a run with milestones is that of the run without, bit by bit."""
    run(LEAP, training(6), tmp_path / "without")
    run(LEAP, training(6, milestones=(1, 2, 3, 4)), tmp_path / "with", milestones=tmp_path / "kept")
    ends = [(tmp_path / name / "final.safetensors").read_bytes() for name in ("without", "with")]
    assert ends[0] == ends[1]


def train_slowly(folder: Path, records) -> None:
    """In a process for another to kill: train with a pause in every network call, and send each record."""
    from accelerate import Accelerator

    from alignbench.training import loop

    class Slow(AffineFlow):
        def velocity(self, *args, **kwargs):
            time.sleep(0.001)
            return super().velocity(*args, **kwargs)

    parts = (LEAP, Slow(STEPS), QuadraticReward(), PROMPTS, training(25, milestones=tuple(range(1, 25))))
    places = {"checkpoints": folder / "checkpoints", "milestones": folder}
    for record in loop.train(*parts, accelerator=Accelerator(cpu=True), **places):
        records.send(record)


@pytest.mark.slow
def test_milestones_outlive_kill_9(tmp_path):
    """A process killed at a random moment, resumed: the same milestone files, bitwise, and no half-written ones."""
    given = training(25, milestones=tuple(range(1, 25)))
    run(LEAP, given, tmp_path / "whole" / "checkpoints", milestones=tmp_path / "whole")
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=train_slowly, args=(tmp_path / "resumed", theirs))
    process.start()
    for _ in range(random.randint(2, 12)):
        assert ours.poll(120)
        ours.recv()
    time.sleep(random.uniform(0, 0.02))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 2 <= len(kept(tmp_path / "resumed")) < 24
    run(LEAP, given, tmp_path / "resumed" / "checkpoints", milestones=tmp_path / "resumed")
    assert kept(tmp_path / "resumed") == kept(tmp_path / "whole")
    assert not list((tmp_path / "resumed").glob(".*.tmp"))


# -- images and scores -------------------------------------------------------------------------------------------------


def test_every_milestone_has_its_images_and_scores(swept):
    """The first prompts' images of the milestones' own weights, and a row of scores each; nothing beyond the end."""
    run, root = trained(swept), swept / "store"
    end = pd.read_parquet(root / "images" / run.images / "manifest.parquet")
    for part in run.milestones[:2]:
        found = pd.read_parquet(root / "images" / part.images / "manifest.parquet")
        pd.testing.assert_frame_equal(found.drop(columns="sha256"), end.drop(columns="sha256")[: len(found)])
        assert found["prompt_id"].nunique() == 2
        assert not set(found["sha256"]) & set(end["sha256"])
        for score, final in zip(part.scores, run.scores, strict=True):
            assert structs.replace(score, file="") == structs.replace(final, file="")
            assert len(pd.read_parquet(root / score.file)) == 2
    weights = [
        load_file(root / "runs" / run.id / name) for name in ("weights-000001.safetensors", "weights.safetensors")
    ]
    assert weights[0].keys() == weights[1].keys()
    beyond = run.milestones[2]
    assert not (root / "images" / beyond.images).exists()
    assert not artefacts.Store(root).milestone(run.id, 9).exists()


def test_a_milestone_beyond_the_end_is_said_and_not_missing(swept, capsys):
    """The run is done; its log, and what `status` counts, say that training ended before."""
    run, root = trained(swept), artefacts.Store(swept / "store")
    parts = run.artefacts(root)
    assert [part.stage.kind for part in parts] == ["run"] + ["images"] * 3 + ["scores"] * 6
    assert all(part.done for part in parts)
    assert (
        "there is no milestone at update 9: training ended after 4 updates"
        in (root.run(run.id, True).folder / "log.txt").read_text()
    )
    assert alignbench("status", store=swept / "store", plugin=False) == 0
    assert "2 done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_milestone_is_made_again(swept, tmp_path, capsys):
    """Its images alone: status says what is open, the same command makes the same bytes, and nothing is trained."""
    shutil.copytree(swept, tmp_path / "copy")
    folder, run = tmp_path / "copy", trained(swept)
    shutil.rmtree(folder / "store" / "images" / run.milestones[0].images)
    (folder / "store" / run.milestones[1].scores[0].file).unlink()
    found = Results(folder / "store", manifest(folder)).state(run)
    assert (found.state, found.reason) == ("planned", "not made yet: images, scores")
    before = [path.stat().st_mtime_ns for path in sorted(folder.rglob("weights*.safetensors"))]
    assert debug_sweep(str(folder / "tiny.yaml"), folder / "store") == 0
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("weights*.safetensors"))] == before
    same(folder / "store", swept / "store")
    same(swept / "store", folder / "store")


@pytest.mark.slow
def test_lost_weights_of_a_milestone_are_made_again(swept, tmp_path, capsys):
    """The run had reached this milestone: the missing weights are named, and the training is repeated for them."""
    shutil.copytree(swept, tmp_path / "copy")
    folder, run = tmp_path / "copy", trained(swept)
    shutil.rmtree(folder / "store" / "images" / run.milestones[0].images)
    artefacts.Store(folder / "store").milestone(run.id, 1).unlink()
    assert debug_sweep(str(folder / "tiny.yaml"), folder / "store") == 0
    assert re.search(r"weights-000001.safetensors: damaged \(it is missing\)", capsys.readouterr().err)
    same(folder / "store", swept / "store")


def test_gc_keeps_what_milestones_have(swept, capsys):
    """Nothing of a finished sweep is unused."""
    assert alignbench("gc", store=swept / "store", plugin=False) == 0
    assert "images" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_rerun_compares_milestones(swept, tmp_path, capsys):
    """Their weights, images and scores are made again and are the same."""
    assert (
        alignbench("rerun", trained(swept).id, "--into", str(tmp_path / "again"), store=swept / "store", plugin=False)
        == 0
    )
    said = capsys.readouterr().out
    assert said.count(": equal (") == 1 + 2 + 1 + 3 + 6
    assert "weights after 3 updates: equal" in said


def test_a_plan_counts_milestones(tmp_path):
    """Two milestones of half the prompts double images and scores, and triple the weights; one beyond adds none."""
    found = []
    for milestones in ([], [1, 3, 9]):
        changes = {"base": {"training": {"milestones": milestones}}, "evaluation": {"milestone_prompts": 2}}
        plan = resolve(read(sweep_file(tmp_path, changes)), Registry([PLUGIN]))
        cell = next(cell for cell in plan.cells if cell.trains)
        found.append(estimate(cell, plan.evaluation, plan.evaluators, GPUS["h100"]))
    without, with_ = found
    assert (with_.image_files, with_.weights) == (2 * without.image_files, 3 * without.weights)
    assert with_.generate == pytest.approx(2 * without.generate)
    assert (with_.train, with_.images, with_.state) == (without.train, without.images, without.state)


def test_a_rehearsal_has_a_milestone(tmp_path):
    """After the first of its two updates, whatever the sweep's; its settings are still in order."""
    from alignbench.rehearsal.sweep import rehearse

    changes = {"base": {"training": {"milestones": [50, 100], "budget": {"images": None, "updates": 300}}}}
    document = rehearse(read(sweep_file(tmp_path, changes)), tmp_path / "store")
    training = draft(document, Registry([PLUGIN])).cells[-1].spec.training
    assert (training.milestones, training.budget.updates) == ((1,), 2)


def test_milestones_ride_along_on_slurm(tmp_path):
    """A score that only a milestone lacks has its job."""
    from alignbench.launch import slurm
    from alignbench.launch.pending import PendingRun

    plan = resolve(read(sweep_file(tmp_path, MILESTONES), seeds="0"), Registry([PLUGIN]))
    place = artefacts.Store(tmp_path / "store")
    cell = next(cell for cell in plan.cells if cell.trains)
    run = plan.manifest().rows["Last"][0]
    lacking = run.artefacts(place)[-1]
    assert lacking.id == f"{cell.milestones[-1][1]}/{plan.scores[-1].file.removesuffix('.parquet')}"
    (array,) = slurm.arrays({}, [PendingRun(cell, [lacking])], plan.scored)
    assert (array.stage, array.evaluator) == (Stage.SCORE, plan.scores[-1].name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert debug_sweep(sweep_file(folder, MILESTONES), folder / "store", "--seeds", "0") == 0
    return folder / "store"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["training", "images", "scoring"])
def test_a_sweep_with_milestones_goes_on_after_kill_9(undisturbed, tmp_path, stage):
    """Killed at a milestone's weights, images or scores: the same command ends with an undisturbed store."""
    sweep_file(tmp_path, MILESTONES)
    process = start(tmp_path)
    until(tmp_path, "sweeps/*.json", process)
    first = trained(tmp_path).milestones[0].images
    run, _ = trainer(tmp_path)
    wait = {
        "training": f"runs/{run}/weights-000001.safetensors",
        "images": f"images/{first}/*.png",
        "scoring": f"scores/{first}/*",
    }
    pid = json.loads(until(tmp_path, f"locks/{run}.lock", process).read_text())["pid"]
    until(tmp_path, wait[stage], process)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(PATIENCE) == 2
    assert start(tmp_path).wait(PATIENCE) == 0
    assert tables(tmp_path / "store")[1]["state"].tolist() == ["done", "done"]
    same(tmp_path / "store", undisturbed)
    same(undisturbed, tmp_path / "store")

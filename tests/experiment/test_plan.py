"""From a sweep file to tables, by real training of the packaged model: exactly what is missing is made."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from support.sweep_process import PATIENCE, start, trainer, until
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, same, sweep_file, tables

from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.launch.pending import task
from alignbench.plugins import Registry
from alignbench.run import execute
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json


def todo(folder: Path, capsys, *words: str) -> str:
    """Return the last line of `alignbench plan`."""
    capsys.readouterr()
    assert alignbench("plan", sweep_file(folder), *words, store=folder / "store") == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_a_sweep_makes_everything_that_its_manifest_promises(swept):
    """Every run is done, every image has every score; a trained run has records, weights and costs, base has none."""
    scores, costs = tables(swept / "store")
    assert costs["state"].tolist() == ["done"] * 3
    assert costs["images"].tolist() == [0, 8, 8]
    assert costs["updates"].tolist() == [0, 4, 4]
    assert len(scores) == 3 * 4 * 3  # runs, images, metrics
    assert scores["ok"].all()
    assert set(scores["metric"]) == {"brightness", "geneval", "geneval_strict"}
    for run in (swept / "store" / "runs").iterdir():
        made = {path.name for path in run.iterdir()}
        always = {"spec.yaml", "provenance.json", "plugins", "status.json", "log.txt"}
        trained = {"train.parquet", "train.sha256", "weights.safetensors", "weights.sha256"}
        assert always >= made - trained - {"dirty.patch"}
        assert ("weights.safetensors" in made) == (not run.name.startswith("base"))
    provenance = json.loads(next((swept / "store").glob("runs/last-*/provenance.json")).read_text())
    assert provenance["packages"]["torch"]
    assert provenance["threads"] >= 1


def test_training_worked(swept):
    """Images become brighter than the base model's, in training and in evaluation: the pipeline is connected."""
    scores, costs = tables(swept / "store")
    bright = scores[scores["metric"] == "brightness"].groupby("label")["score"].mean()
    assert bright["Last"] > bright["Base"]
    trained = costs[costs["label"] == "Last"]
    assert (trained["reward_last"] > trained["reward_first"]).any()


def test_running_it_twice_makes_nothing_and_says_so(swept, capsys):
    """The second time nothing is trained, generated or scored, and no file changes."""
    before = {path: path.stat().st_mtime_ns for path in (swept / "store").rglob("*.p*") if path.is_file()}
    assert debug_sweep(str(swept / "tiny.yaml"), swept / "store") == 0
    assert "3 runs: 0 to train, 0 image sets to make, 0 scores to compute" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (swept / "store").rglob("*.p*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("evaluation.protocol.guidance=2.0", "3 runs: 0 to train, 3 image sets to make, 6 scores to compute"),
        ("evaluation.evaluators[0].power=2.0", "3 runs: 0 to train, 0 image sets to make, 3 scores to compute"),
        ("training.optimizer.lr=0.01", "3 runs: 2 to train, 2 image sets to make, 4 scores to compute"),
        ("training.checkpoint_every=2", "3 runs: 0 to train, 0 image sets to make, 0 scores to compute"),
    ],
)
def test_a_change_makes_exactly_what_depends_on_it_stale(swept, capsys, change, line):
    """Guidance affects images and scores; an evaluator, its scores; the learning rate, trained runs only."""
    assert todo(swept, capsys, change) == line


def test_the_store_is_a_function_of_the_sweep(swept, tmp_path):
    """Made again from nothing, weights, records, images and scores are the same bits."""
    assert debug_sweep(sweep_file(tmp_path), tmp_path / "store", "seed=1") == 0
    same(tmp_path / "store", swept / "store")


@pytest.mark.slow
def test_generation_resumes_where_it_stopped(copy, swept, capsys):
    """After a kill between two images, the finished ones stay, the missing ones are made, and the set is the same."""
    for folder in (copy / "store" / "images").iterdir():
        (folder / "manifest.parquet").unlink()
        kept, *lost = sorted(folder.glob("*.png"))
        before = kept.stat().st_mtime_ns
        for image in lost:
            image.unlink()
        (folder / ".half.png.1.tmp").write_bytes(b"half an image")
    assert "0 to train, 3 image sets" in todo(copy, capsys)
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    same(copy / "store", swept / "store")
    assert kept.stat().st_mtime_ns == before


def flip(path: Path) -> Path:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def shuffled(path: Path) -> Path:
    """Write the rows of a score file in another order: each image has another one's score."""
    frame = pd.read_parquet(path)
    frame["brightness"] = frame["brightness"].to_numpy()[::-1]
    frame.to_parquet(path, index=False)
    return path


def trained(store: Path) -> Path:
    return next(path.parent for path in sorted(store.glob("runs/last-*/weights.safetensors")))


def image_of(store: Path, run: Path) -> Path:
    """Return the table of a run's images."""
    found = (path for path in store.glob("images/*/protocol.json") if json.loads(path.read_text())["run"] == run.name)
    return next(found).with_name("manifest.parquet")


def damaged_weights(store: Path) -> Path:
    run = trained(store)
    shutil.rmtree(image_of(store, run).parent)  # else nothing would read them
    return flip(run / "weights.safetensors")


def damaged_image(store: Path) -> Path:
    shutil.rmtree(store / "scores")
    return flip(next((store / "images").glob("*/*-0.png")))


@pytest.mark.parametrize(
    ("damage", "made"),
    [
        pytest.param(damaged_weights, "0 to train, 1 image sets", id="weights"),
        pytest.param(damaged_image, "0 image sets to make, 6 scores", id="an image"),
        pytest.param(lambda store: shuffled(next(store.glob("scores/*/bright@*.parquet"))), "1 scores", id="scores"),
        pytest.param(lambda store: flip(next(store.glob("images/*/manifest.parquet"))), "1 image sets", id="a table"),
    ],
)
def test_what_is_damaged_is_named_and_made_again_by_the_same_command(copy, swept, capsys, damage, made):
    """The sweep, run again, ends well, with the bits that were there before; the damaged file is kept beside them."""
    path = damage(copy / "store")
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    said = capsys.readouterr().err
    assert f"{path}: damaged (its content is not what was written)" in said.replace(str(copy.resolve()), str(copy))
    assert made in said
    assert path.with_name(f"{path.name}.damaged").is_file()
    same(copy / "store", swept / "store")
    assert todo(copy, capsys) == "3 runs: 0 to train, 0 image sets to make, 0 scores to compute"


@pytest.mark.slow
def test_a_job_of_one_stage_leaves_what_is_damaged_to_the_next_sweep(copy, swept):
    """A cluster's job that makes images finds the weights damaged: the run is marked, and a sweep trains it again."""
    path = damaged_weights(copy / "store")
    store, plan = Store(copy / "store"), resolve(read(sweep_file(copy)), Registry([PLUGIN]))
    cell = next(cell for cell in plan.cells if cell.id == path.parent.name)
    about = {"scores": [], "plugins": [PLUGIN], "threads": 1, "progress": str(copy / "progress.json")}
    found = execute(task(plan, store, cell, None, **about, stages=["images"]))
    assert found["state"] == "failed"
    assert re.fullmatch(rf"generation: it needs {cell.id}, which is missing: .*: damaged .*anew", found["reason"])
    assert not store.run(cell.id, True).done
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    same(copy / "store", swept / "store")


@pytest.mark.parametrize("status", [b'{"state": "do', b'{"state": "failed", "reason": "the disk is full"}'])
def test_a_broken_status_does_not_repeat_a_training(copy, swept, capsys, status):
    """While weights and records are whole, only the status is written again, with what they say."""
    run = trained(copy / "store")
    before = (run / "weights.safetensors").stat().st_mtime_ns
    updates = read_json(run / "status.json")["updates"]
    (run / "status.json").write_bytes(status)
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    assert (run / "weights.safetensors").stat().st_mtime_ns == before
    found = read_json(run / "status.json")
    assert (found["state"], found["updates"]) == ("done", updates)
    same(copy / "store", swept / "store")


@pytest.mark.slow
def test_damaged_records_are_not_reported(copy, swept, capsys):
    """A report refuses them; the sweep puts them aside, says what is lost, and trains nothing."""
    words = ("--out", str(copy / "out"), "--store", str(copy / "store"))
    flip(trained(copy / "store") / "train.parquet")
    assert alignbench("report", sweep_file(copy), *words, plugin=False) == 1
    assert "train.parquet: damaged (its content is not what was written)" in capsys.readouterr().err
    assert "0 to train, 0 image sets to make, 0 scores" in todo(copy, capsys)
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    assert "train.parquet: damaged; reports leave its costs out, the weights are whole" in capsys.readouterr().err
    assert alignbench("report", sweep_file(copy), *words, plugin=False) == 0


def test_new_ids_are_announced(copy, capsys):
    """If a plug-in's content changed since the last sweep, one line says that runs have other ids; else none does."""
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    assert "other ids" not in capsys.readouterr().err
    manifest = next((copy / "store" / "sweeps").glob("tiny*.json"))
    manifest.write_text(manifest.read_text().replace("bright@", "bright@0"))
    assert debug_sweep(sweep_file(copy), copy / "store") == 0
    assert "3 of 3 runs have other ids than at the last sweep: " in capsys.readouterr().err


def test_a_failed_run_is_listed_and_retried_and_stops_no_other(tmp_path, monkeypatch, capsys):
    """It has a reason and exit code 2, and the others finish; the next sweep retries this run only."""
    cases = [{"label": "Bad", "method": {"name": "stopped"}}, {"label": "Good", "method": {"name": "last"}}]
    path = sweep_file(tmp_path, {"cases": cases, "grid": {"training.seed": [0]}})
    monkeypatch.setenv("ALIGNBENCH_TEST_STOP", "2:RuntimeError")
    assert debug_sweep(path, tmp_path / "store") == 2
    said = capsys.readouterr().err
    assert "Bad, seed 0 failed: training: RuntimeError: stopped on demand (log: " in said
    _, costs = tables(tmp_path / "store")
    assert costs["state"].tolist() == ["failed", "done"]
    assert costs["reason"][0] == "training: RuntimeError: stopped on demand"
    log = next((tmp_path / "store").glob("runs/stopped-*/log.txt")).read_text()
    assert "RuntimeError: stopped on demand" in log

    monkeypatch.delenv("ALIGNBENCH_TEST_STOP")
    assert debug_sweep(path, tmp_path / "store") == 0
    assert "2 runs: 1 to train, 1 image sets to make, 2 scores to compute" in capsys.readouterr().err
    assert tables(tmp_path / "store")[1]["state"].tolist() == ["done", "done"]


@pytest.mark.slow
def test_an_evaluator_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    """Its scores are missing with a reason, and the others are made; a single bad image is not ok, with its error."""
    evaluators = [{"name": "broken"}, {"name": "bright"}]
    changes = {"cases": [{"label": "Base", "method": {"name": "base"}}], "evaluation": {"evaluators": evaluators}}
    path = sweep_file(tmp_path, changes)
    monkeypatch.setenv("ALIGNBENCH_TEST_BROKEN", "1")
    assert debug_sweep(path, tmp_path / "store") == 2
    assert "scoring: RuntimeError: the judge is ill" in capsys.readouterr().err
    assert set(tables(tmp_path / "store")[0]["metric"]) == {"brightness"}

    monkeypatch.delenv("ALIGNBENCH_TEST_BROKEN")
    assert debug_sweep(path, tmp_path / "store") == 0
    scores, costs = tables(tmp_path / "store")
    assert costs["state"].tolist() == ["done"]
    assert scores[scores["metric"] == "worth"]["ok"].tolist() == [True, False, True, True]


def test_what_failed_for_a_passing_reason_is_scored_again(copy, monkeypatch, capsys):
    """The run counts as failed, console and report say how many rows are empty and why, and only these are redone."""
    base = [{"label": "Base", "method": {"name": "base"}}]
    path = sweep_file(copy, {"cases": base, "evaluation": {"evaluators": [{"name": "away"}]}})
    monkeypatch.setenv("ALIGNBENCH_TEST_AWAY", "2")
    assert debug_sweep(path, copy / "store") == 2
    lacking = "2 of 4 images lack a score: nobody is there"
    said = capsys.readouterr().err
    assert f"Base failed: scoring: away: {lacking}; the same command scores only these again" in said
    assert f"alignbench: Base, away: {lacking}\n" in said
    assert tables(copy / "store")[0]["ok"].tolist() == [False, False, True, True]
    assert alignbench("status", path, store=copy / "store", plugin=False) == 2
    assert (
        alignbench("report", path, "--format", "md", "--out", str(copy / "out"), store=copy / "store", plugin=False)
        == 0
    )
    report = (copy / "out" / "tiny-SUBSET.md").read_text()
    assert f"- Base, away: {lacking}\n" in report
    assert "**failed**: scoring: away" in report
    capsys.readouterr()

    monkeypatch.delenv("ALIGNBENCH_TEST_AWAY")
    assert debug_sweep(path, copy / "store") == 0
    said = capsys.readouterr().err
    assert "1 scores to compute" in said
    assert "lack a score" not in said
    (file,) = (copy / "store").glob("scores/*/away@*.parquet")
    assert pd.read_parquet(file)["raw"].tolist() == ["shown 2"] * 2 + ["shown 4"] * 2
    assert not list(file.parent.glob("away@*.parts"))
    assert alignbench("status", path, store=copy / "store", plugin=False) == 0


def test_an_interrupted_training_run_resumes_bitwise(tmp_path, monkeypatch, capsys):
    """Ctrl-C in batch 2 gives exit code 130 and no recorded failure; resuming gives the undisturbed weights."""
    changes = {"cases": [{"label": "S", "method": {"name": "stopped"}}], "grid": {"training.seed": [0]}}
    for name in ("calm", "stopped"):
        (tmp_path / name).mkdir()
    calm, stopped = (sweep_file(tmp_path / name, changes) for name in ("calm", "stopped"))
    assert debug_sweep(calm, tmp_path / "calm" / "store") == 0
    monkeypatch.setenv("ALIGNBENCH_TEST_STOP", "2:KeyboardInterrupt")
    assert debug_sweep(stopped, tmp_path / "stopped" / "store") == 130
    assert "interrupted; run the same command again" in capsys.readouterr().err
    assert tables(tmp_path / "stopped" / "store")[1]["state"].tolist() == ["planned"]
    monkeypatch.delenv("ALIGNBENCH_TEST_STOP")
    assert debug_sweep(stopped, tmp_path / "stopped" / "store") == 0
    same(tmp_path / "calm" / "store", tmp_path / "stopped" / "store")


def test_inputs_that_change_during_a_sweep_are_noticed(tmp_path):
    """A worker that finds other prompts than the sweep was planned with does not store its work under the old id."""
    from alignbench.experiment.document import read
    from alignbench.experiment.plan import resolve
    from alignbench.launch.local import launch
    from alignbench.plugins import Registry
    from alignbench.store.artefacts import Store

    prompts = tmp_path / "p.txt"
    prompts.write_text("a photo of a circle\n")
    changes = {"base": {"prompts": str(prompts)}, "cases": [{"label": "Last", "method": {"name": "last"}}]}
    plan = resolve(read(sweep_file(tmp_path, changes), seeds="0"), Registry([PLUGIN]))
    prompts.write_text("a photo of a square\n")
    (outcome,) = launch(plan, plan.cells, Store(tmp_path / "store"), launcher="debug", plugins=[PLUGIN])
    assert outcome.state == "failed"
    assert "changed since the sweep was started" in outcome.reason


@pytest.mark.parametrize("what", ["evaluator", "prompts"])
def test_what_scores_depend_on_may_not_change_before_them(copy, what):
    """A worker that finds another evaluator than was planned, or images of other prompts, stores no score."""
    from alignbench.launch.local import launch

    store, plan = copy / "store", resolve(read(sweep_file(copy)), Registry([PLUGIN]))
    cell = plan.cells[0]
    if what == "evaluator":
        plan.scores[0] = plan.scores[0]._replace(file="bright@1-0123456789.parquet")
    else:
        protocol = store / "images" / cell.images / "protocol.json"
        protocol.write_text(json.dumps({**json.loads(protocol.read_text()), "prompts_digest": "0123"}))
        (store / "scores" / cell.images / plan.scores[0].file).unlink()
    (outcome,) = launch(plan, [cell], Store(store), launcher="debug", plugins=[PLUGIN])
    assert outcome.state == "failed"
    assert "changed since" in outcome.reason
    assert not (store / "scores" / cell.images / plan.scores[0].file).exists()


def test_one_run_in_the_foreground(swept, tmp_path, capsys):
    """`alignbench run --method last` makes one run of the sweep and prints its scores; the sweep then has it."""
    assert alignbench("run", sweep_file(tmp_path), "--method", "last", "seed=1", store=tmp_path / "store") == 0
    out = capsys.readouterr().out
    assert "| brightness" in out
    same(tmp_path / "store", swept / "store")
    assert todo(tmp_path, capsys) == "3 runs: 1 to train, 2 image sets to make, 4 scores to compute"


def test_report_and_status_of_a_finished_sweep(swept, capsys, tmp_path):
    """`report` prints the table and names its files; `status` counts; both take the sweep file and the same words."""
    path = str(swept / "tiny.yaml")
    assert alignbench("report", path, "--out", str(tmp_path), store=swept / "store", plugin=False) == 0
    out = capsys.readouterr().out
    assert "| Last" in out
    assert "SUBSET" in out
    assert {line.rpartition("/")[2] for line in out.splitlines() if line.startswith("written: ")} == {
        path.name for path in tmp_path.iterdir()
    }
    assert alignbench("status", store=swept / "store", plugin=False) == 0
    assert "3 done" in capsys.readouterr().out
    assert alignbench("status", path, store=swept / "store", plugin=False) == 0
    assert re.search(r"^Last, seed 1  last-\w+  done$", capsys.readouterr().out, re.MULTILINE)
    assert alignbench("report", path, "training.batch=1", store=swept / "store", plugin=False) == 1
    assert "was not run in" in capsys.readouterr().err


def worker(folder: Path) -> int:
    """Return the pid of the process that trains, or makes or scores images of, the trained run."""
    run, images = trainer(folder)
    locks = (folder / "store" / "locks").glob("*.lock")
    return next(json.loads(path.read_text())["pid"] for path in locks if run in path.name or images in path.name)


STAGES = {
    "training": "runs/{run}/checkpoints/step_*.pt",
    "images": "images/{images}/*.png",
    "scoring": "scores/{images}/*",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["ctrl-c", "kill -9 the worker", "kill -9 the sweep"])
def test_whatever_is_killed_the_same_command_resumes(swept, tmp_path, stage, how):
    """After Ctrl-C or kill -9 during training, generation or scoring, the store ends as if undisturbed."""
    sweep_file(tmp_path)
    process = start(tmp_path)
    until(tmp_path, "sweeps/*.json", process)
    run, images = trainer(tmp_path)
    until(tmp_path, STAGES[stage].format(run=run, images=images), process)
    if how == "ctrl-c":
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert (tmp_path / "stderr").read_text().splitlines()[-1].startswith("alignbench: interrupted")
    elif how == "kill -9 the sweep":
        process.kill()
        process.wait()
    else:
        os.kill(worker(tmp_path), signal.SIGKILL)
        assert process.wait(PATIENCE) == 2
        assert "Last, seed 0 failed: the worker was killed while" in (tmp_path / "stderr").read_text()
        assert tables(tmp_path / "store")[1]["state"].tolist() == ["done", "failed"]
    assert start(tmp_path).wait(PATIENCE) == 0
    assert tables(tmp_path / "store")[1]["state"].tolist() == ["done", "done"]
    same(tmp_path / "store", swept / "store")


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(swept, tmp_path):
    """Both succeed, every run is trained once, and the store equals that of one sweep."""
    sweep_file(tmp_path)
    both = [start(tmp_path), start(tmp_path)]
    assert [process.wait(PATIENCE) for process in both] == [0, 0]
    same(tmp_path / "store", swept / "store")
    assert list((tmp_path / "store" / "locks").iterdir()) == []

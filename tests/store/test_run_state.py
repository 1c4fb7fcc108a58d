"""A run has one state, whichever verb shows it."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
from support.tiny_sweep import alignbench

from alignbench.launch import cleanup, slurm, status_table, submissions
from alignbench.store.artefacts import Store
from alignbench.store.files import write_json
from alignbench.store.locks import Lock
from alignbench.store.manifest import ManifestRun, read_manifest
from alignbench.store.run_state import STATES, Job, Jobs, run_state

PENDING = slurm.LiveJob("PENDING", "Priority", 0, "1:00:00")


@pytest.fixture
def tiny(copy) -> tuple[Store, ManifestRun]:
    """Return the store of the finished tiny sweep and one of its runs, without the run's weights."""
    store = Store(copy / "store")
    run = read_manifest(store.manifests()[0]).by_seed["Last", 0]
    shutil.rmtree(store.root / "runs" / run.id)
    return store, run


def record(store: Store, *made: str, launcher: str = "slurm") -> None:
    """Record a submitted job that makes these artefacts."""
    ticket = {"job": "7_0", "stage": "train", "makes": list(made), "run": made[0], "progress": "/none"}
    about = {"sweep": store.manifests()[0].stem, "launcher": launcher, "name": "alignbench-tiny", "options": {}}
    about |= {"submitted": time.time(), "host": "login", "pid": 1, "tickets": [ticket]}
    write_json(store.root / "jobs" / "tiny-1" / submissions.FILE, about)


def shown_states(capsys, swept: Path, store: Store) -> dict[str, str]:
    """Return {verb: the state that it shows for the run}."""
    name, states = store.manifests()[0].stem, {}
    commands = {
        "status": ((name,), r"^Last, seed 0 +\S+ +(unknown here|\w+)"),
        "plan": ((str(swept / "tiny.yaml"),), r"^Last, seed 0 +(unknown here|\w+)"),
        "report": (
            (name, "--format", "md", "--out", str(store.root.parent / "out")),
            r"^- Last, seed 0: \*\*(unknown here|\w+)\*\*",
        ),
    }
    for verb, (words, pattern) in commands.items():
        alignbench(verb, *words, store=store.root, plugin=verb == "plan")
        state = re.search(pattern, capsys.readouterr().out, re.MULTILINE)
        states[verb] = state[1] if state else "done"  # the report names only runs that are not done
    return states


@pytest.mark.parametrize(
    ("state", "failed", "job", "live"),
    [
        ("planned", False, False, None),
        ("failed", True, False, None),
        ("queued", False, True, PENDING),
        ("queued", True, True, PENDING),  # a retry
        ("requeued", False, True, PENDING._replace(restarts=1)),
        ("running", True, True, PENDING._replace(state="RUNNING")),
        ("stale", False, True, None),
    ],
)
def test_every_verb_says_the_same_state(tiny, swept, monkeypatch, capsys, state, failed, job, live):
    """status, plan and report agree, whether training failed or not, and was submitted to SLURM or not."""
    store, run = tiny
    monkeypatch.setattr(slurm, "live", lambda names: {"7_0": live} if list(names) and live else {})
    monkeypatch.setattr(slurm, "accounted", lambda jobs: dict.fromkeys(jobs, "TIMEOUT"))
    if failed:
        run.weights(store).fail("loss is nan", "log.txt")
    if job:
        record(store, run.id)
    assert shown_states(capsys, swept, store) == dict.fromkeys(("status", "plan", "report"), state)


def test_a_machine_without_slurm_does_not_know_what_became_of_jobs(tiny, swept, monkeypatch, capsys):
    """Every verb says "unknown here" and where to ask, nothing is made again or cancelled, and gc keeps its files."""
    store, run = tiny
    record(store, run.id, "of a sweep that is gone")
    monkeypatch.setenv("PATH", "/nowhere")
    assert shown_states(capsys, swept, store) == dict.fromkeys(("status", "plan", "report"), "unknown here")
    name = store.manifests()[0].stem
    assert alignbench("status", name, store=store.root, plugin=False) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "there is no squeue on this machine; ask on a login node" in shown
    assert "7_0 was submitted on login" in shown
    assert alignbench("retry", str(swept / "tiny.yaml"), store=store.root) == 3
    assert "no run has failed or was lost; Last, seed 0: unknown here: there is no squeue" in capsys.readouterr().err
    assert alignbench("cancel", str(swept / "tiny.yaml"), store=store.root) == 1
    assert "unknown here: there is no squeue on this machine" in capsys.readouterr().err
    assert [entry.sweep for entry in submissions.read(store) if cleanup._live(entry)] == [name]


def test_every_verb_says_that_a_run_is_being_made(tiny, swept, capsys):
    """A held lock on a missing part means running, whatever failed before."""
    store, run = tiny
    run.weights(store).fail("loss is nan", "log.txt")
    lock = Lock(run.weights(store).lock)
    assert lock.try_acquire()
    assert shown_states(capsys, swept, store) == dict.fromkeys(("status", "plan", "report"), "running")
    lock.release()


def test_every_verb_says_done_without_querying_slurm(copy, swept, monkeypatch, capsys):
    """If nothing is missing, SLURM is not queried, even if a job was submitted for it."""
    store = Store(copy / "store")
    record(store, read_manifest(store.manifests()[0]).by_seed["Last", 0].id)
    monkeypatch.setattr(slurm, "live", lambda names: pytest.fail("was asked"))
    assert shown_states(capsys, swept, store) == dict.fromkeys(("status", "plan", "report"), "done")


def test_slurm_is_queried_once_and_only_for_its_own_jobs(tiny, monkeypatch):
    """All runs of a sweep take one query; records of a local launch take none."""
    store, run = tiny
    asked = []
    monkeypatch.setattr(slurm, "live", lambda names: asked.append(list(names)) or {})
    monkeypatch.setattr(slurm, "accounted", lambda jobs: asked.append(sorted(jobs)) or {})
    manifest = read_manifest(store.manifests()[0])
    shutil.rmtree(store.root / "runs")
    for launcher, questions in (("slurm", [["alignbench-tiny"], ["7_0"]]), ("local", [[]])):
        asked.clear()
        record(store, run.id, launcher=launcher)
        status_table.rows(store, manifest)
        assert [question for question in asked if question] == [question for question in questions if question]


def test_a_failure_that_no_job_retries_precedes_pending_jobs(tiny):
    """If weights are queued, but a score failed that no job will make again, the run is failed, to be noticed."""
    store, run = tiny
    run.weights(store).fail("an old failure", "log.txt")
    score = run.artefacts(store)[-1]
    score.product.unlink()
    score.fail("no memory", "log.txt")
    waiting = Job("7_0", "train", "/none", pending=True, reason="Dependency")
    found = run_state(store, run, lambda: Jobs(live={run.id: waiting}))
    assert (found.state, found.reason, found.at) == ("failed", "no memory", score)
    found = run_state(store, run, lambda: Jobs(live={run.id: waiting, score.id: waiting}))
    assert (found.state, found.reason, found.at) == ("queued", "waits for the previous stage", run.weights(store))
    assert [part.stage.kind for part in found.missing] == ["run", "scores"]


def test_a_lost_job_says_how_it_ended(tiny):
    """The reason has SLURM's word and what to do; a worker of a local sweep has no job that could be lost."""
    store, run = tiny
    found = run_state(store, run, lambda: Jobs(latest={run.id: Job("7_0", "train", "/none")}, ended={"7_0": "OOM"}))
    assert found.state == "stale"
    assert found.reason == "job 7_0 has ended (OOM) without having made it; `alignbench retry` makes it"
    waiting = Job("9_0", "train", "/none", pending=True)  # of another sweep, which shares the weights
    lost = Jobs(
        live={run.id: waiting}, latest={run.images: Job("7_0", "generate", "/none")}, ended={"7_0": "CANCELLED"}
    )
    (store.root / "images" / run.images / "manifest.parquet").unlink()
    assert run_state(store, run, lambda: lost).state == "stale"
    found = run_state(store, run, lambda: Jobs(latest={run.id: Job("", "", "/none")}))
    assert (found.state, found.reason) == ("planned", "not made yet: run, images")


def test_done_means_that_nothing_is_missing(tiny):
    """The fast check of a run agrees with the full one, whichever of its files is removed."""
    store, run = tiny
    other = read_manifest(store.manifests()[0]).by_seed["Last", 1]
    paths = [part.product for part in other.artefacts(store)] + [other.weights(store).status]
    assert run_state(store, other).state == "done"
    for path in paths:
        kept = path.read_bytes()
        path.unlink()
        found = run_state(store, other)
        assert (found.state, found.missing) == ("planned", other.missing(store))
        assert found.missing
        path.write_bytes(kept)
    assert {run_state(store, each).state for each in (run, other)} <= set(STATES)

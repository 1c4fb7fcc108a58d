"""Files are whole or absent, one process at a time makes an artefact, and a failure is never a result."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from alignbench.config import UserError
from alignbench.reporting.analysis.results import COSTS, Results
from alignbench.store import locks as stores
from alignbench.store.artefacts import Store, locked
from alignbench.store.files import read_frame, read_json, write, write_frame, write_json
from alignbench.store.locks import Lock, LockLost, alive
from alignbench.store.manifest import Manifest, ManifestMetric, ManifestRun, ManifestScore


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# -- whole files or none ----------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    """Whatever goes wrong while writing, readers see the old content, and no temporary file is left."""
    path = tmp_path / "a" / "file"
    write(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write(path, half)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]
    write(path, b"new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch, code):
    """The error names what is full and what to do, without a traceback, and no half-written file is left."""

    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk; free some and run the same command again"):
        write(tmp_path / "file", "content")
    assert os.listdir(tmp_path) == []


def test_a_kill_while_writing_leaves_no_file_of_that_name(tmp_path):
    """After kill -9 in the middle of a write, the file does not exist; a second try succeeds."""
    code = (
        "import os, pathlib, sys; from alignbench.store.files import write\n"
        "write(pathlib.Path(sys.argv[1]), lambda p: (p.write_text('half'), os.kill(os.getpid(), 9)))"
    )
    path = tmp_path / "file"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert not path.exists()
    write(path, "whole")
    assert path.read_text() == "whole"


def test_damaged_json_is_no_json(tmp_path):
    """A file truncated by a power failure counts as absent."""
    (tmp_path / "a.json").write_text('{"state": "do')
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "b.json") is None
    assert read_json(tmp_path) is None


@pytest.mark.parametrize("content", ['"done"', "[]", "3", "null"])
def test_json_that_is_not_an_object_is_no_status(store, content):
    """Whatever the file of a status holds, the run is neither done nor failed; a failure may lack its reason."""
    run = store.run("refl-0", trains=True)
    write(run.product, b"weights")
    write(run.status, content)
    assert (run.done, run.state, run.failure) == (False, None, None)
    write(run.status, '{"state": "failed", "reason": null}')
    assert run.failure == "no reason was recorded"


def test_a_damaged_table_is_named(tmp_path):
    """The error says which file to delete."""
    write(tmp_path / "manifest.parquet", b"PAR1 cut")
    with pytest.raises(UserError, match=r"manifest.parquet: cannot be read .*; delete it, and run the sweep again$"):
        read_frame(tmp_path / "manifest.parquet")


@pytest.mark.parametrize("place", ["store", "store/below"])
def test_a_store_that_is_a_file(tmp_path, place):
    """A store that is a file, or lies below one, is refused in one line, and the file stays as it was."""
    (tmp_path / "store").write_text("mine")
    with pytest.raises(UserError, match=r"^--store .*name a folder"):
        Store(tmp_path / place).check_writable()
    assert (tmp_path / "store").read_text() == "mine"


def test_a_store_without_permission(tmp_path, monkeypatch):
    """The folder that is not writable is named; os.access is patched, since root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(UserError, match=rf"^--store .*{tmp_path} is not writable"):
        Store(tmp_path / "store").check_writable()


def test_checking_a_store_writes_nothing(store):
    """`plan` and `validate` leave no folder behind."""
    store.check_writable()
    assert not store.root.exists()
    store.open()
    assert os.listdir(store.root) == []


# -- done, failed, missing --------------------------------------------------------------------------------------------


def test_a_run_is_done_only_when_its_status_says_so(store):
    """Weights alone, or a status alone, are not a finished run."""
    run = store.run("refl-0", trains=True)
    write(run.product, b"weights")
    assert not run.done
    run.succeed()
    assert run.done
    run.product.unlink()
    assert not run.done


def test_a_failure_is_shown_and_never_done(store):
    """A recorded failure has its reason and log; a later success replaces it."""
    run = store.run("refl-0", trains=True)
    write(run.product, b"weights of an attempt that failed later")
    run.fail("training: out of memory", "log.txt")
    assert not run.done
    assert run.failure == "training: out of memory"
    assert read_json(run.status)["log"] == "log.txt"
    run.succeed()
    assert (run.done, run.failure) == (True, None)


def manifest() -> Manifest:
    file, metrics = "scores/i0/e@1-0.parquet", [ManifestMetric("m")]
    score = ManifestScore(evaluator="e", version="1", file=file, metrics=metrics, role="train")
    run = ManifestRun(label="R", method="refl", seed=0, id="refl-0", images="i0", scores=[score])
    base = ManifestRun(label="B", method="base", seed=-1, id="base-0", images="i1", scores=[])
    return Manifest(name="s", runs=[run, base])


def test_results_follow_the_files(store):
    """A run goes from planned to failed to done as artefacts appear; scores and costs come back as two tidy frames."""
    results = Results(store.root, manifest())
    run, base = manifest().runs
    assert results.state(run)[:2] == ("planned", "not made yet: run, images, scores")
    store.run("refl-0", True).fail("training: nan", "log")
    assert results.state(run)[:2] == ("failed", "training: nan")
    assert results.costs["state"].tolist() == ["failed", "planned"]
    assert len(results.scores) == 0

    costs = {name: [1, 2] for name in COSTS}
    records = pd.DataFrame({"update": [0, 1], "reward_mean": [0.25, 0.75], **costs})
    write_frame(store.root / "runs" / "refl-0" / "train.parquet", records)
    write(store.run("refl-0", True).product, b"weights")
    store.run("refl-0", True).succeed()
    write_frame(store.images("i0").product, pd.DataFrame({"prompt_id": ["p"]}))
    scores = pd.DataFrame({"prompt_id": ["p"], "tag": ["t"], "index": [0], "m": [0.5], "ok": [True], "error": [None]})
    write_frame(store.scores("i0", "e@1-0.parquet").product, scores)
    store.run("base-0", False).succeed()
    write_frame(store.images("i1").product, pd.DataFrame({"prompt_id": ["p"]}))

    results = Results(store.root, manifest())
    assert [results.state(r)[:2] for r in (run, base)] == [("done", ""), ("done", "")]
    assert results.scores.to_dict("records") == [
        {"label": "R", "method": "refl", "seed": 0, "run": "refl-0", "evaluator": "e", "metric": "m",
         "prompt_id": "p", "tag": "t", "index": 0, "score": 0.5, "ok": True}
    ]  # fmt: skip
    costs = results.costs.set_index("run")
    assert costs.loc["refl-0", ["updates", "nfe_grad", "reward_first", "reward_last"]].tolist() == [2, 2, 0.25, 0.75]
    assert costs.loc["base-0", ["updates", "nfe_grad"]].tolist() == [0, 0]


def test_a_run_that_is_being_made_is_running(store):
    """A live lock on any missing part makes the run running."""
    results, run = Results(store.root, manifest()), manifest().runs[0]
    lock = Lock(store.images("i0").lock)
    assert lock.try_acquire()
    assert results.state(run)[:2] == ("running", "")
    lock.release()
    assert results.state(run).state == "planned"


# -- locks ------------------------------------------------------------------------------------------------------------


def test_one_maker_at_a_time_and_the_second_reuses(store):
    """If several threads want a run, it is made once; the others wait, learn who holds it, and find it done."""
    run, made, waited = store.run("refl-0", trains=True), [], []

    def make() -> None:
        with locked(run, waited.append) as lock:
            if lock is not None:
                time.sleep(0.3)
                made.append(threading.get_ident())
                write(run.product, b"weights")
                run.succeed()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert f"process {os.getpid()}" in waited[0]
    assert not run.lock.exists()


def test_a_dead_process_holds_nothing(store):
    """kill -9 of a holder on this machine is noticed at once."""
    path = store.run("refl-0", trains=True).lock
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_json(path, {"host": os.uname().nodename, "pid": gone.pid, "time": "", "token": "x"})
    lock = Lock(path)
    assert lock.try_acquire()
    lock.check()
    lock.release()


def test_another_machines_lock_counts_while_it_beats(store, monkeypatch):
    """A holder elsewhere is trusted until it was silent for ten minutes, and while we watched it ourselves."""
    path = store.run("refl-0", trains=True).lock
    write_json(path, {"host": "elsewhere", "pid": 1, "time": "", "token": "x"})
    monkeypatch.setattr(stores, "WATCHED", 0.2)
    lock = Lock(path)
    assert not lock.try_acquire()
    silent = time.time() - stores.STALE - 1
    os.utime(path, (silent, silent))
    assert not lock.try_acquire()
    time.sleep(0.3)
    assert lock.try_acquire()


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_takes_no_lock_from_its_holder(store, monkeypatch, jump):
    """With a clock a day ahead or behind, a holder that keeps beating keeps its lock; one that stops loses it."""
    path = store.run("refl-0", trains=True).lock
    write_json(path, {"host": "elsewhere", "pid": 1, "time": "", "token": "x"})
    monkeypatch.setattr(stores, "WATCHED", 0.2)
    monkeypatch.setattr(stores, "STALE", 0.6)
    lock = Lock(path)
    for beat in range(10):
        os.utime(path, (time.time() + jump + beat, time.time() + jump + beat))
        assert not lock.try_acquire()
        time.sleep(0.1)
    time.sleep(0.7)
    assert lock.try_acquire()


def test_a_requeued_job_takes_over_from_itself(store, monkeypatch):
    """SLURM starts a requeued job only after it ended: its earlier start holds nothing, on whichever machine."""
    path = store.run("refl-0", trains=True).lock
    write_json(path, {"host": "elsewhere", "pid": 1, "job": ["7", "0"], "time": "", "token": "x"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not Lock(path).try_acquire()  # held by another rank of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Lock(path).try_acquire()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x", "host": 1}', "no json"])
def test_an_invalid_lock_file_does_not_lock(store, text):
    """A foreign or half-written file in place of a lock is removed."""
    path = store.run("refl-0", trains=True).lock
    write(path, text)
    assert Lock(path).try_acquire()


def test_of_many_that_notice_a_stale_lock_one_takes_it_over(store, monkeypatch):
    """Taking over a dead holder's lock is a race that at most one wins; if none did, the next attempt does."""
    monkeypatch.setattr(stores, "WATCHED", 0.0)
    path = store.run("refl-0", trains=True).lock
    for _ in range(20):
        write_json(path, {"host": "elsewhere", "pid": 1, "time": "", "token": "x"})
        os.utime(path, (0, 0))
        won, start = [], threading.Barrier(8)

        def take(won=won, start=start) -> None:
            lock = Lock(path)
            start.wait()
            if lock.try_acquire():
                won.append(lock)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) <= 1
        again = Lock(path)
        assert bool(won) != again.try_acquire()  # a process that came too early for the removal tries again
        (won[0] if won else again).release()


def test_a_holder_that_was_stopped_too_long_notices(store, monkeypatch):
    """After a takeover the old holder can neither mark anything as done nor remove the new lock."""
    monkeypatch.setattr(stores, "WATCHED", 0.0)
    path = store.run("refl-0", trains=True).lock
    old, new = Lock(path), Lock(path)
    assert old.try_acquire()
    os.utime(path, (0, 0))
    assert new.try_acquire()
    with pytest.raises(LockLost):
        old.check()
    old.release()
    new.check()
    new.release()


def test_a_failure_inside_releases_the_lock(store):
    """The next process need not wait for a heartbeat to expire."""
    run = store.run("refl-0", trains=True)
    with pytest.raises(KeyboardInterrupt), locked(run):
        raise KeyboardInterrupt
    assert not run.lock.exists()
    assert os.listdir(run.lock.parent) == []


def test_alive():
    """This process is alive; a child that ended is not, even before it is waited for."""
    assert alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.time() + 20
    while alive(child.pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(child.pid)  # a zombie: it has not been waited for
    child.wait()


def test_the_lock_file_names_its_holder(store):
    """The file has the process of the holder, for users who wonder who it is."""
    lock = Lock(store.run("refl-0", trains=True).lock)
    assert lock.try_acquire()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()

"""Files are whole or absent, one process at a time makes an artefact, and a failure is never a result."""

from __future__ import annotations

import errno
import hashlib
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
from alignbench.store.artefacts import Store, check_images, locked, set_aside
from alignbench.store.files import (
    Damaged,
    check_frame,
    is_whole,
    move,
    read_frame,
    read_json,
    write,
    write_frame,
    write_json,
)
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
    """The error names the file, and the command that makes it again."""
    write(tmp_path / "manifest.parquet", b"PAR1 cut")
    with pytest.raises(Damaged, match=r"manifest.parquet: damaged \(it cannot be read: .*; run its sweep .* anew$"):
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# -- finished files carry their hashes ---------------------------------------------------------------------------------


def table(path: Path) -> pd.DataFrame:
    """Write a table and return it."""
    frame = pd.DataFrame({"prompt_id": ["a", "b", "c"], "index": 0, "m": [0.5, 0.25, 0.125], "ok": True})
    write_frame(path, frame)
    return frame


def test_no_bit_of_a_table_flips_unnoticed(tmp_path):
    """Each of a hundred flipped bits, a truncation and an empty file are damage; the file as written is not."""
    path = tmp_path / "scores.parquet"
    pd.testing.assert_frame_equal(table(path), read_frame(path))
    whole = path.read_bytes()
    flipped = (
        whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        for place in range(0, len(whole), len(whole) // 100)
    )
    for content in (*flipped, whole[:-9], b""):
        path.write_bytes(content)
        with pytest.raises(Damaged, match=rf"^{path}: damaged \(its content is not what was written\); run its sweep"):
            read_frame(path)
        assert not is_whole(path)
    path.write_bytes(whole)
    assert is_whole(path)


@pytest.mark.parametrize(
    "rewritten",
    [
        pytest.param(lambda frame: frame[::-1], id="permuted"),
        pytest.param(lambda frame: frame[:2], id="truncated"),
        pytest.param(lambda frame: frame.assign(m=frame["m"].to_numpy()[::-1]), id="other scores"),
    ],
)
def test_a_table_that_another_program_wrote_is_damaged(tmp_path, rewritten):
    """A valid file with other rows is not what was written."""
    path = tmp_path / "scores.parquet"
    rewritten(table(path)).to_parquet(path, index=False)
    with pytest.raises(Damaged, match="not what was written"):
        read_frame(path)


@pytest.mark.parametrize("content", [None, "", "0" * 64 + "  scores.parquet\n" * 2, "half a li"])
def test_a_damaged_hash_is_no_damage_of_its_file(tmp_path, content):
    """It is written twice; if the two differ or are gone, the file is read like one without, of an earlier version.

    Of such a file only the format is checked.
    """
    path = tmp_path / "scores.parquet"
    frame, seal = table(path), tmp_path / "scores.sha256"
    seal.unlink() if content is None else seal.write_text(content)
    pd.testing.assert_frame_equal(frame, read_frame(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Damaged, match="it cannot be read: "):
        read_frame(path)


def test_a_hash_is_that_of_sha256sum(tmp_path):
    """Its file is in the format of that program, and moves with the file that it belongs to."""
    table(tmp_path / "a.parquet")
    move(tmp_path / "a.parquet", tmp_path / "b.parquet")
    line = f"{hashlib.sha256((tmp_path / 'b.parquet').read_bytes()).hexdigest()}  b.parquet\n"
    assert (tmp_path / "b.sha256").read_text() == line * 2
    assert is_whole(tmp_path / "b.parquet")


def test_what_is_damaged_is_marked_once(store):
    """A damaged score file is kept under another name, and is to be made; what was made again meanwhile stays."""
    scores = store.scores("i0", "e@1-0.parquet")

    def check() -> None:
        check_frame(scores.product)

    assert set_aside(scores, check) == ""  # it is not made yet
    table(scores.product)
    assert set_aside(scores, check) == ""
    scores.product.write_bytes(b"PAR1")
    assert set_aside(scores, check) == f"{scores.product}: damaged (its content is not what was written)"
    assert not scores.done
    assert scores.failure.startswith(f"{scores.product}: damaged (its content")
    assert scores.product.with_name("e@1-0.parquet.damaged").read_bytes() == b"PAR1"

    calls = []

    def made_again() -> None:
        calls.append(scores)
        if len(calls) == 1:  # another process makes it before this one has the lock
            table(scores.product)
            raise Damaged(scores.product)

    table(scores.product)
    scores.status.unlink()
    assert set_aside(scores, made_again) == ""
    assert len(calls) == 2
    assert scores.done


def test_images_are_checked_by_their_table(store):
    """All damaged and missing images are found at once; the others stay, and only the table is gone."""
    images = store.images("i0")
    rows = []
    for name in ("a-0.png", "b-0.png", "c-0.png"):
        write(images.folder / name, name)
        rows.append({"file": name, "sha256": hashlib.sha256(name.encode()).hexdigest()})
    write_frame(
        images.product, pd.DataFrame([*rows, {"file": "", "sha256": ""}])
    )  # an imported one that was unreadable
    check_images(images)
    (images.folder / "b-0.png").write_text("another image")
    (images.folder / "c-0.png").unlink()
    what = set_aside(images, lambda: check_images(images))
    assert what == f"{images.folder / 'b-0.png'} and 1 more: damaged (its content is not what was written)"
    left = {"a-0.png", "b-0.png.damaged", "manifest.sha256", "status.json"}
    assert {path.name for path in images.folder.iterdir()} == left

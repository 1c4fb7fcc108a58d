"""The store: content-addressed folders on a plain, possibly shared, disk.

Three kinds of artefact: runs, image sets and scores. Each is either done or not there: files are written under a
temporary name, flushed and renamed, and the file that says "done" comes last. A failure is recorded beside the
artefact, shown, and tried again; it never counts as done. One process at a time makes an artefact: it holds a lock.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError
from alignbench.stages import Stage

if TYPE_CHECKING:
    import pandas as pd

BEAT = 15.0  # seconds between heartbeats of a lock
STALE = 600.0  # seconds without a heartbeat after which its holder counts as gone
WATCHED = 3 * BEAT  # seconds in which whoever takes over has seen none itself: clocks differ, and jump
FULL = (errno.ENOSPC, errno.EDQUOT)


# -- whole files or none ----------------------------------------------------------------------------------------------


def write(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write ``path`` whole or not at all. ``content``: bytes, text, or what writes to the path it is given.

    UserError if the disk is full or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path | str, error: OSError) -> str:
    """One line for a disk that does not take more."""
    if error.errno in FULL:
        return f"{path}: no space left on the disk; free some and run the same command again, finished work is kept"
    return f"{path}: cannot be written: {error.strerror or error}; choose another --store, or mend its permissions"


def flush(path: Path) -> None:
    """See to it that a file's content, or a folder's names, outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    write(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any] | None:
    """None where there is no such file, or no whole one (a disk that lost power)."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    write(path, lambda temporary: frame.to_parquet(temporary, index=False))


# -- artefacts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artefact:
    """A run, an image set or a score file. ``product``: the file whose presence makes it done."""

    stage: Stage  # that makes it
    id: str
    folder: Path
    product: Path
    status: Path  # {"state": "done" | "failed", "reason", "log", "time"}
    lock: Path

    @property
    def done(self) -> bool:
        return self.product.exists() and (self.stage is not Stage.TRAIN or self.state == "done")

    @property
    def state(self) -> str | None:
        return (read_json(self.status) or {}).get("state")

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None after a success, and before any attempt."""
        found = read_json(self.status) or {}
        return found.get("reason", "no reason was recorded") if found.get("state") == "failed" else None

    @property
    def busy(self) -> bool:
        """Is somebody making it right now?"""
        return _holder(self.lock) is not None

    def succeed(self, **facts: Any) -> None:
        """Say that it is done: the last thing that is written."""
        write_json(self.status, {"state": "done", "time": _now(), **facts})

    def fail(self, reason: str, log: str) -> None:
        write_json(self.status, {"state": "failed", "reason": reason, "log": log, "time": _now()})


class Store:
    """The folder and what is where in it."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def run(self, id: str, trains: bool) -> Artefact:
        """``trains``: a run that trained has weights; one that trains nothing is its status alone."""
        folder = self.root / "runs" / id
        status = folder / "status.json"
        product = folder / "weights.safetensors" if trains else status
        return Artefact(Stage.TRAIN, id, folder, product, status, self._lock(id))

    def milestone(self, run: str, update: int) -> Path:
        """The weights that a run had after ``update`` updates, in the same form as those of its end."""
        return self.root / "runs" / run / milestone_file(update)

    def images(self, id: str) -> Artefact:
        folder = self.root / "images" / id
        return Artefact(
            Stage.GENERATE, id, folder, folder / "manifest.parquet", folder / "status.json", self._lock(f"images-{id}")
        )

    def scores(self, images: str, file: str) -> Artefact:
        """``file``: ``<evaluator>@<version>-<id>.parquet``."""
        folder = self.root / "scores" / images
        stem = file.removesuffix(".parquet")
        return Artefact(
            Stage.SCORE,
            f"{images}/{stem}",
            folder,
            folder / file,
            folder / f"{stem}.status.json",
            self._lock(f"scores-{images}-{stem}"),
        )

    @property
    def tables(self) -> Path:
        """Where a sweep's scores and records of training are kept as one file each, in a folder of its name."""
        return self.root / "tables"

    @property
    def embeddings(self) -> Path:
        """Where prompts' embeddings are, in a folder for each way to compute them."""
        return self.root / "embeddings"

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def check_writable(self) -> None:
        """UserError unless files can be made in the store. Writes nothing itself."""
        place = self.root.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            what = "it is a file" if place == self.root.absolute() else f"{place} is not a folder"
            raise UserError(f"--store {self.root}: cannot be used, {what}; name a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--store {self.root}: {place} is not writable; choose another folder")

    def open(self) -> None:
        """Make the folder, and prove that a file can be written. UserError otherwise."""
        self.check_writable()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"alignbench")
        except OSError as error:
            raise UserError(f"--store {cannot_write(self.root, error)}") from None

    def manifests(self) -> list[Path]:
        """Those of every sweep that was run here, latest first."""
        found = (self.root / "sweeps").glob("*.json")
        return sorted(found, key=lambda path: -path.stat().st_mtime)


def milestone_file(update: int) -> str:
    return f"weights-{update:06}.safetensors"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# -- locks ------------------------------------------------------------------------------------------------------------


class LockLost(Exception):
    """Somebody else took over: this process was stopped for longer than STALE."""


class Lock:
    """Held: one process makes this artefact. A thread keeps it fresh; a holder that died is noticed by the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._seen = (float("nan"), 0.0)  # the holder's last heartbeat, and since when we have seen none after it

    @property
    def held(self) -> bool:
        """By anybody, right now."""
        return _holder(self.path) is not None

    def check(self) -> None:
        """LockLost unless it is still ours. Asked before anything is declared done."""
        if (read_json(self.path) or {}).get("token") != self.token:
            raise LockLost(f"{self.path}: another process took this over while this one was stopped")

    def try_acquire(self) -> bool:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "time": _now(), "token": self.token}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._abandoned():
                self._remove_stale()
            _create(self.path, json.dumps(me))
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(cannot_write(self.path, error)) from error
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self._ended.set()
        with suppress(LockLost):
            self.check()
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        with suppress(LockLost):
            while not self._ended.wait(BEAT):
                self.check()
                with suppress(OSError):
                    os.utime(self.path)

    def _remove_stale(self) -> None:
        """By one of several that noticed: without the guard the second would remove the first one's new lock."""
        guard = self.path.with_suffix(".guard")
        with suppress(OSError):
            if time.time() - guard.stat().st_mtime > STALE:
                guard.unlink()
        _create(guard, "")
        try:
            if self._abandoned():  # not if absent: the next may be creating its own right now
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _abandoned(self) -> bool:
        """Is there a lock whose holder is known to be gone, or was not heard of for too long?"""
        try:
            beat = self.path.stat().st_mtime
        except OSError:
            return False
        found = _read_lock(self.path)
        if found is None or _gone(found):
            return True
        if beat != self._seen[0]:
            self._seen = (beat, time.monotonic())
        silent = time.monotonic() - self._seen[1]
        if silent < WATCHED:
            return False
        return silent > STALE or time.time() - beat > STALE or _job_ended(found.get("job"))


def locks_held(root: Path) -> list[Path]:
    """Those of a store's locks that somebody holds right now."""
    return [path for path in (root / "locks").glob("*.lock") if _holder(path) is not None]


def _create(path: Path, text: str) -> None:
    """Make a file that is complete as soon as it is there. FileExistsError if there is one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text)
        os.link(temporary, path)  # like O_EXCL, but never seen half-written
    finally:
        temporary.unlink(missing_ok=True)


def _holder(lock: Path) -> str | None:
    """ "host, process 12" of the live process that holds ``lock``; None if there is none."""
    found = _read_lock(lock)
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return None
    if found is None or age > STALE or _gone(found):
        return None
    return f"{found['host']}, process {found['pid']}"


def _read_lock(path: Path) -> dict[str, Any] | None:
    """None for what is no lock of ours."""
    found = read_json(path)
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) and "host" in found else None


def _gone(holder: dict[str, Any]) -> bool:
    """Is this holder known to have ended: a process of this machine, or an earlier start of this very SLURM job?"""
    if holder["host"] == socket.gethostname() and not alive(holder["pid"]):
        return True
    job, start = holder.get("job") or ("", "")
    mine = _job() or ("", "")
    return bool(job) and job == mine[0] and start != mine[1]


def _job_ended(job: Any) -> bool:
    """Does SLURM say that a holder's job, which may be on another machine, is over?"""
    if not job or shutil.which("squeue") is None:
        return False
    twice = f"{job[0]},{job[0]}"  # an unknown job is no error then
    words = ["squeue", "--noheader", "--jobs", twice, "--format", "%T"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    return asked.returncode == 0 and not asked.stdout.strip()


def _job() -> list[str] | None:
    """This process's SLURM job, and how often it was started before; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def alive(pid: int) -> bool:
    """Is there such a process here? One that ended but was not yet waited for is not alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True


@contextmanager
def locked(artefact: Artefact, waiting: Callable[[str], Any] = lambda holder: None) -> Iterator[Lock | None]:
    """Hold the artefact's lock; None if it was done meanwhile. ``waiting`` is told who holds it, every second."""
    with held(artefact.lock, waiting, lambda: artefact.done) as lock:
        yield None if artefact.done else lock


@contextmanager
def held(
    path: Path, waiting: Callable[[str], Any] = lambda holder: None, done: Callable[[], bool] = lambda: False
) -> Iterator[Lock]:
    """Hold the lock ``path``, or stop waiting for it once ``done``. ``waiting``: as for ``locked``."""
    lock = Lock(path)
    while not done() and not lock.try_acquire():
        waiting(_holder(path) or "another process")
        time.sleep(1.0)
    try:
        yield lock
    finally:
        lock.release()


def reached(store: Store, run: str, update: int) -> bool:
    """False if the run of that id has ended before that update: then there is nothing of it, and nothing is missing."""
    status = read_json(store.run(run, True).status) or {}
    return status.get("state") != "done" or update <= status.get("updates", update)

"""Locks on a shared disk: one process makes an artefact, and a holder that died is noticed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignbench.config import UserError
from alignbench.store.files import cannot_write, read_json

BEAT = 15.0  # seconds between heartbeats of a lock
STALE = 600.0  # seconds without a heartbeat after which its holder counts as gone
WATCHED = 3 * BEAT  # seconds in which whoever takes over has seen none itself: clocks differ, and jump


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


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
        return holder(self.path) is not None

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
    return [path for path in (root / "locks").glob("*.lock") if holder(path) is not None]


def _create(path: Path, text: str) -> None:
    """Make a file that is complete as soon as it is there. FileExistsError if there is one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text)
        os.link(temporary, path)  # like O_EXCL, but never seen half-written
    finally:
        temporary.unlink(missing_ok=True)


def holder(lock: Path) -> str | None:
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
def held(
    path: Path, waiting: Callable[[str], Any] = lambda holder: None, done: Callable[[], bool] = lambda: False
) -> Iterator[Lock]:
    """Hold the lock ``path``, or stop waiting for it once ``done``. ``waiting``: as for ``locked``."""
    lock = Lock(path)
    while not done() and not lock.try_acquire():
        waiting(holder(path) or "another process")
        time.sleep(1.0)
    try:
        yield lock
    finally:
        lock.release()

"""Locks on a shared disk: only one process makes an artefact, and a holder that died is noticed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignbench.config import UserError
from alignbench.store.files import cannot_write, read_json
from alignbench.store.shell import NoAnswer, slurm_command

BEAT = 15.0  # seconds between heartbeats of a lock
STALE = 600.0  # seconds without a heartbeat after which its holder counts as gone
WATCHED = 3 * BEAT  # seconds without a heartbeat that a process must see itself before it takes over: clocks jump


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class LockLost(Exception):
    """Another process took the lock over, because this one was suspended for longer than STALE."""


class Lock:
    """Lock file of an artefact, held by the only process that makes it.

    A thread keeps it fresh; the next process that wants it notices a holder that died.
    """

    def __init__(self, path: Path, token: str = "") -> None:
        """Make a lock that is not held yet. ``token``: that of the process which holds it for this one, too."""
        self.path = path
        self.token = token or uuid.uuid4().hex
        self._ended = threading.Event()
        self._seen = (float("nan"), 0.0)  # the holder's last heartbeat, and the time at which we first saw it

    @property
    def held(self) -> bool:
        """True while any live process holds it."""
        return holder(self.path) is not None

    def check(self) -> None:
        """Raise LockLost unless this process still holds it. Called before anything is marked as done."""
        if (read_json(self.path) or {}).get("token") != self.token:
            raise LockLost(f"{self.path}: another process took this over while this one was stopped")

    def try_acquire(self) -> bool:
        """Take the lock if it is free or abandoned, and return whether that worked. Raise UserError on disk errors."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "time": timestamp(), "token": self.token}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._abandoned():
                self._remove_stale()
            create(self.path, json.dumps(me))
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(cannot_write(self.path, error)) from error
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        """Remove the lock if this process still holds it."""
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
        """Remove an abandoned lock, under a guard: else a second process would remove the first one's new lock."""
        guard = self.path.with_suffix(".guard")
        with suppress(OSError):
            if time.time() - guard.stat().st_mtime > STALE:
                guard.unlink()
        create(guard, "")
        try:
            if self._abandoned():  # not if absent: another process may be creating its own right now
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _abandoned(self) -> bool:
        """Return whether the lock exists and its holder is gone or has been silent for too long."""
        try:
            beat = self.path.stat().st_mtime
        except OSError:
            return False
        content = _read_lock(self.path)
        if content is None or _gone(content):
            return True
        if beat != self._seen[0]:
            self._seen = (beat, time.monotonic())
        silent = time.monotonic() - self._seen[1]
        if silent < WATCHED:
            return False
        return silent > STALE or time.time() - beat > STALE or _job_ended(content.get("job"))


def locks_held(root: Path) -> list[Path]:
    """Return the paths of the locks of a store that a live process holds."""
    return [path for path in (root / "locks").glob("*.lock") if holder(path) is not None]


def create(path: Path, text: str) -> None:
    """Make a file that is complete as soon as it exists. Raise FileExistsError if it exists already."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text)
        os.link(temporary, path)  # like O_EXCL, but never seen half-written
    finally:
        temporary.unlink(missing_ok=True)


def holder(lock: Path) -> str | None:
    """Return "host, process 12" for the live process that holds ``lock``; None if there is none."""
    content = _read_lock(lock)
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return None
    if content is None or age > STALE or _gone(content):
        return None
    return f"{content['host']}, process {content['pid']}"


def _read_lock(path: Path) -> dict[str, Any] | None:
    """Return the content of a lock file, or None if it is not a valid one."""
    content = read_json(path)
    is_lock = isinstance(content, dict) and isinstance(content.get("pid"), int) and "host" in content
    return content if is_lock else None


def _gone(holder: dict[str, Any]) -> bool:
    """Return whether a holder is known to have ended: a process on this machine, or an earlier start of our job."""
    if holder["host"] == socket.gethostname() and not alive(holder["pid"]):
        return True
    job, start = holder.get("job") or ("", "")
    our_job, our_start = _job() or ("", "")
    return bool(job) and job == our_job and start != our_start


def _job_ended(job: Any) -> bool:
    """Return whether SLURM says that a holder's job, possibly on another machine, has ended."""
    if not job:
        return False
    twice = f"{job[0]},{job[0]}"  # a list: for a single unknown job, squeue would exit with an error
    try:
        asked = slurm_command("squeue", "--all", "--noheader", "--jobs", twice, "--format", "%T")
    except NoAnswer:
        return False
    return asked.returncode == 0 and not asked.stdout.strip()


def _job() -> list[str] | None:
    """Return the SLURM job of this process and how often it was restarted; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def alive(pid: int) -> bool:
    """Return whether this machine runs such a process. A zombie (ended, but not waited for) is not alive."""
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
    """Hold the lock ``path``, or stop waiting for it once ``done()``. ``waiting``: as for ``artefacts.locked``."""
    lock = Lock(path)
    while not done() and not lock.try_acquire():
        waiting(holder(path) or "another process")
        time.sleep(1.0)
    try:
        yield lock
    finally:
        lock.release()

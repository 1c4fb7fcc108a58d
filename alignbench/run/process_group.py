"""The processes that execute one run together: they exchange plain data, wait for each other, and end together.

All ranks share a key-value store, which rank 0 hosts; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say where. Messages
between stages go through it rather than through collectives: they never time out, and whoever waits for one notices
stops, failures and ranks that were killed. A rank that fails writes its reason there before it leaves the others alone
in a collective. Each rank has a heartbeat in the store.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alignbench.config import Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(minutes=30)  # timeout of a collective: ranks wait while rank 0 writes a large checkpoint
START = 600.0  # seconds within which all ranks must have started
BEAT = 1.0  # seconds between heartbeats
SILENT = 60  # beats missed by a rank that counts as ended
ROLL_CALL = 10.0  # seconds to answer a roll call, which is taken when something else went wrong, too
GRACE = 20.0  # seconds for a rank to notice by itself that another one failed
POLL = 0.1
FAILURE, STOPPED, LEFT = "failure", "asked to stop", "left"


class OtherFailed(Exception):
    """Another rank failed or has ended; the message is the reason."""


def ended(rank: int) -> str:
    """Return the reason that ``rank`` gives by its silence."""
    return f"rank {rank} has ended; see its log"


class ProcessGroup:
    """Group of the ``size`` processes of a run, as seen by one of them. A single one starts nothing and never waits.

    ``stop`` is polled while this process waits.
    """

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.is_main = self.rank == 0
        self.main_ended = False  # True once rank 0 was found to have ended
        self.on_deadlock: Callable[[str], Any] = lambda reason: None  # called before this process exits
        self._stop = stop
        self._store: Any = None  # once this process has joined the others
        self._messages = 0
        self._counts = Counter[str]()
        self._ended = threading.Event()

    @cached_property
    def accelerator(self) -> Accelerator:
        import torch
        from accelerate import Accelerator

        self.join()
        cpu = self.size > 1 and not torch.cuda.is_available()  # accelerate must be told to use CPUs for several ranks
        if cpu:  # else accelerate would choose another number of threads
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        return Accelerator(cpu=cpu)

    def join(self) -> None:
        """Wait until all ranks have started, and make torch's process group."""
        if self.size == 1 or self._store is not None:
            return
        import torch
        from torch.distributed import PrefixStore

        job = os.environ.get("SLURM_JOB_ID", "")  # another job on this node may have the same port
        self._store = PrefixStore(f"alignbench {job}", self._connect(self.is_main))
        threading.Thread(target=self._watch, daemon=True).start()
        started = time.monotonic()

        def give_up(rank: int) -> None:
            if time.monotonic() - started > START:
                raise OtherFailed(f"rank {rank} has not started within {START:.0f} seconds; see its log")

        self._send(f"started {self.rank}", "here")
        for rank in range(self.size):
            self._await(f"started {rank}", functools.partial(give_up, rank))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = self._connect(False)  # a connection of its own: torch blocks it while it waits, and hearts must beat
        store.set_timeout(PATIENCE)
        torch.distributed.init_process_group(
            backend, store=PrefixStore(f"torch {job}", store), rank=self.rank, world_size=self.size, timeout=PATIENCE
        )

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what ``make`` returns on rank 0 (plain data). Raise as ``check`` does."""
        if self.size == 1:
            return make()
        self.join()
        self._messages += 1
        key = f"message {self._messages}"
        if not self.is_main:
            return json.loads(self._await(key))
        value = make()
        self._send(key, json.dumps(value))
        return value

    def barrier(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Wait for all ranks. Raise as ``check`` does. ``meanwhile`` is called while this one waits."""
        if self.size == 1:
            return
        self.join()
        self._messages += 1
        self._send(f"message {self._messages}, {self.rank}", "here")
        for rank in range(self.size):
            self._await(f"message {self._messages}, {rank}", meanwhile)

    def count(self, what: str, more: int = 0) -> int:
        """Add ``more`` to a count that all ranks share, and return it."""
        self._counts[what] += more
        return self._counts[what] if self.size == 1 else self._ask("add", f"count {what}", more)

    def check(self) -> None:
        """Raise OtherFailed if another rank failed or has ended, Interrupted if any rank was asked to stop."""
        self._raise(self._failure())
        if self._stop():
            self._raise(self._roll_call())  # a rank was killed, and SLURM therefore ends the others
            raise Interrupted

    def abort(self, reason: str, certain: bool = True) -> str:
        """Tell the other ranks why this one ends. Return the reason of the rank that ended first.

        Not ``certain``: this may be the consequence of another rank's end (a broken connection), which is looked for.
        """
        if self.size > 1 and self._store is not None:
            try:
                reason = (None if certain else self._roll_call()) or reason
                reason = self._ask("compare_set", FAILURE, "", reason).decode()
                if self.is_main:
                    self._wait_until_told()
            except OtherFailed as error:
                reason = reason if certain else str(error)
        self._ended.set()
        return reason

    def close(self) -> None:
        """Wait for all ranks and destroy the process group; from then on this process is on its own.

        After a failure the group is left as it is, because not all ranks would join and the process ends soon.
        """
        if self._store is not None and not self._ended.is_set():
            import torch

            self.barrier()
            torch.distributed.destroy_process_group()
            if self.is_main:  # the last to leave, as it hosts the store
                for rank in range(1, self.size):
                    self._await(f"closed {rank}")
            self._ended.set()
            if not self.is_main:
                self._send(f"closed {self.rank}", "here")
        self.size = 1

    # -- the store ----------------------------------------------------------------------------------------------------

    def _connect(self, host: bool) -> Any:
        """Return a connection to the store, once rank 0 hosts it; with ``host``, begin to."""
        from torch.distributed import TCPStore

        address, port, started = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), time.monotonic()
        while True:
            try:
                return TCPStore(address, port, self.size, host, timedelta(seconds=5), wait_for_workers=False)
            except RuntimeError:
                if host:
                    raise
            self.check()
            if time.monotonic() - started > START:
                raise OtherFailed(f"rank 0 has not started within {START:.0f} seconds; see its log")

    def _ask(self, operation: str, *arguments: Any) -> Any:
        """Return the store's answer. Raise OtherFailed if it is gone, and rank 0 with it."""
        try:
            return getattr(self._store, operation)(*arguments)
        except RuntimeError as error:
            self.main_ended = True
            raise OtherFailed(ended(0)) from error

    def _send(self, key: str, message: str) -> None:
        """Write a message. Raise Interrupted if a rank has stopped waiting for it."""
        if self._ask("compare_set", key, "", message).decode() == LEFT:
            raise Interrupted

    def _await(self, key: str, meanwhile: Callable[[], Any] = lambda: None) -> str:
        """Return a message once it is there. Raise as ``check`` does.

        A rank that stops waiting leaves LEFT in the message's place: then its sender stops, too, instead of going on to
        a collective in which it would be alone.
        """
        while not self._ask("check", [key]):
            try:
                self.check()
            except Interrupted:
                self._send(key, LEFT)
            meanwhile()
            time.sleep(POLL)
        message = self._ask("get", key).decode()
        if message == LEFT:
            raise Interrupted
        return message

    def _failure(self) -> str | None:
        """Return why the first rank that failed or stopped did so; None if none has."""
        if self.size == 1 or self._store is None or not self._ask("check", [FAILURE]):
            return None
        return self._ask("get", FAILURE).decode()

    def _raise(self, reason: str | None) -> None:
        if reason == STOPPED:
            raise Interrupted
        if reason is not None:
            raise OtherFailed(reason)

    def _wait_until_told(self) -> None:
        """Wait until the other ranks have read the reason, because the store ends with rank 0."""
        told = [f"told {rank}" for rank in range(1, self.size)]
        for _ in range(int(5 * BEAT / POLL)):
            if self._ask("check", told):
                return
            time.sleep(POLL)

    # -- heartbeats ---------------------------------------------------------------------------------------------------

    def _beats(self) -> list[int]:
        """Return how often each rank's heart has beaten; 0 for a rank that has not started."""
        return [self._ask("add", f"beat {rank}", 0) for rank in range(self.size)]

    def _roll_call(self) -> str | None:
        """Return the reason of a rank that failed, or which rank gives no sign of life; None if all are well."""
        if self.size == 1 or self._store is None:
            return None
        before = self._beats()
        silent = [rank for rank, beat in enumerate(before) if beat]
        for _ in range(int(ROLL_CALL / POLL)):
            if (reason := self._failure()) is not None:
                return reason
            beats = self._beats()
            silent = [rank for rank in silent if beats[rank] == before[rank]]
            if not silent:
                return None
            time.sleep(POLL)
        return ended(silent[0])

    def _watch(self) -> None:
        """Let this rank's heart beat, and on rank 0 notice ranks whose heart has stopped.

        Once a rank has failed, end this process if it does not notice: it is stuck in a collective.
        """
        missed, last = [0] * self.size, [0] * self.size  # missed beats are counted, not seconds: jobs are suspended
        reason = None
        while reason is None:
            try:
                self._ask("add", f"beat {self.rank}", 1)
                reason = self._failure()
                if self.is_main and reason is None:
                    beats = self._beats()
                    missed = [n + 1 if beat and beat == old else 0 for n, beat, old in zip(missed, beats, last)]
                    last = beats
                    if max(missed) >= SILENT:
                        dead = ended(missed.index(max(missed)))
                        reason = self._ask("compare_set", FAILURE, "", dead).decode()
                elif reason is not None:
                    self._ask("set", f"told {self.rank}", "")
            except OtherFailed as error:
                reason = str(error)
            if self._ended.wait(BEAT):
                return
        if reason != STOPPED and not self._ended.wait(GRACE):
            self.on_deadlock(reason)
            os._exit(1)

"""The processes that execute one run together: they exchange plain data, wait for each other, and end together.

accelerate starts the process group from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Messages between
stages go through the group's key-value store rather than through collectives: they never time out, and a rank that
fails in the middle of a collective can still report why.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(minutes=30)  # timeout of a collective: ranks wait while rank 0 writes a large checkpoint
GRACE = 20.0  # seconds for a rank to notice by itself that another one failed
POLL = 0.1
FAILURE, STOPPED = "failure", "asked to stop"


class OtherFailed(Exception):
    """Another rank failed; the message is that rank's reason."""


class ProcessGroup:
    """Group of the ``size`` processes of a run, as seen by one of them. A single one starts nothing and never waits."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.is_main = self.rank == 0
        self.on_deadlock: Callable[[str], Any] = lambda reason: None  # called before this process exits
        self._messages = 0
        self._ended = threading.Event()

    @cached_property
    def accelerator(self) -> Accelerator:
        import torch
        from accelerate import Accelerator, InitProcessGroupKwargs

        cpu = self.size > 1 and not torch.cuda.is_available()  # accelerate must be told to use CPUs for several ranks
        return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])

    @cached_property
    def _store(self) -> Any:
        """Key-value store of all ranks. Making it starts the process group, and a thread that listens for failures."""
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        assert self.accelerator.num_processes == self.size
        store = PrefixStore("alignbench", _get_default_store())
        threading.Thread(target=self._listen, args=(store,), daemon=True).start()
        return store

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what ``make`` returns on rank 0 (plain data). Raise OtherFailed if rank 0 fails."""
        if self.size == 1:
            return make()
        self._messages += 1
        key = f"message {self._messages}"
        if self.is_main:
            value = make()
            self._store.set(key, json.dumps(value))
            return value
        return json.loads(self._await(key))

    def barrier(self) -> None:
        """Wait for all ranks. Raise OtherFailed if one of them fails instead."""
        if self.size > 1:
            self._messages += 1
            self._store.set(f"message {self._messages}, {self.rank}", "here")
            for rank in range(self.size):
                self._await(f"message {self._messages}, {rank}")

    def abort(self, reason: str) -> str:
        """Tell the other ranks why this one fails. Return the reason of the rank that failed first."""
        self._ended.set()
        if self.size == 1:
            return reason
        try:
            return self._store.compare_set(FAILURE, "", reason).decode()
        except RuntimeError:  # rank 0, which hosts the store, has ended
            return reason

    def check(self) -> None:
        """Raise OtherFailed if another rank failed."""
        if self.size > 1 and self._store.check([FAILURE]):
            raise OtherFailed(self._store.get(FAILURE).decode())

    def close(self) -> None:
        """Wait for all ranks and destroy the process group; from then on this process is on its own.

        After a failure the group is left as it is, because not all ranks would join and the process ends soon.
        """
        if "_store" in self.__dict__ and not self._ended.is_set():
            import torch

            self.barrier()
            self._ended.set()
            torch.distributed.destroy_process_group()
        self.size = 1

    def _await(self, key: str) -> str:
        while not self._store.check([key]):
            self.check()
            time.sleep(POLL)
        return self._store.get(key).decode()

    def _listen(self, store: Any) -> None:
        """End this process if another rank failed and this one is stuck in a collective waiting for it."""
        while not self._ended.wait(1.0):
            try:
                reason = store.get(FAILURE).decode() if store.check([FAILURE]) else None
            except RuntimeError:
                reason = "rank 0 has ended"
            if reason is not None and not self._ended.wait(GRACE):
                self.on_deadlock(reason)
                os._exit(1)

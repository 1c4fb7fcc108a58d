"""The processes that make one run together: how they exchange plain data, wait for one another, and all end.

accelerate starts the process group from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Messages between
stages go through that group's key-value store, not through collectives: they wait as long as it takes, and a rank that
failed in the middle of a collective can still say why.
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

PATIENCE = timedelta(minutes=30)  # for one collective: ranks wait while rank 0 writes a large checkpoint
GRACE = 20.0  # seconds for a rank to notice by itself that another one has failed
POLL = 0.1
FAILURE, STOPPED = "failure", "asked to stop"


class OtherFailed(Exception):
    """Another rank failed. Its text is that rank's reason."""


class ProcessGroup:
    """This process and the others of its run, ``size`` in all. A process alone starts nothing and never waits."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.is_main = self.rank == 0
        self.on_deadlock: Callable[[str], Any] = lambda reason: None  # called before this process gives up a collective
        self._messages = 0
        self._ended = threading.Event()

    @cached_property
    def accelerator(self) -> Accelerator:
        import torch
        from accelerate import Accelerator, InitProcessGroupKwargs

        alone = self.size == 1 or torch.cuda.is_available()  # else accelerate waits to be told that CPUs are meant
        return Accelerator(cpu=not alone, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])

    @cached_property
    def _store(self) -> Any:
        """The key-value store of all ranks, made with the process group; a thread begins to listen for failures."""
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        assert self.accelerator.num_processes == self.size
        store = PrefixStore("alignbench", _get_default_store())
        threading.Thread(target=self._listen, args=(store,), daemon=True).start()
        return store

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what ``make`` returns on rank 0 (plain data). OtherFailed if rank 0 fails."""
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
        """Wait until all ranks are here. OtherFailed if one of them failed instead."""
        if self.size > 1:
            self._messages += 1
            self._store.set(f"message {self._messages}, {self.rank}", "here")
            for rank in range(self.size):
                self._await(f"message {self._messages}, {rank}")

    def abort(self, reason: str) -> str:
        """Tell the others why this rank fails. Returns the reason of the rank that failed first."""
        self._ended.set()
        if self.size == 1:
            return reason
        try:
            return self._store.compare_set(FAILURE, "", reason).decode()
        except RuntimeError:  # rank 0 keeps the store, and is gone
            return reason

    def check(self) -> None:
        """Raise OtherFailed if another rank failed."""
        if self.size > 1 and self._store.check([FAILURE]):
            raise OtherFailed(self._store.get(FAILURE).decode())

    def close(self) -> None:
        """Leave the process group, once all ranks are done with it: from here on this process is alone.

        After a failure the group is left as it is: not everybody would come to end it, and the process ends soon.
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
        """End this process if another rank failed and this one waits for it in a collective, where nobody can come."""
        while not self._ended.wait(1.0):
            try:
                reason = store.get(FAILURE).decode() if store.check([FAILURE]) else None
            except RuntimeError:
                reason = "rank 0 has ended"
            if reason is not None and not self._ended.wait(GRACE):
                self.on_deadlock(reason)
                os._exit(1)

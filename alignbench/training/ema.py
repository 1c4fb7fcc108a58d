"""The exponential moving average of the trained weights, beside them or in the host's memory.

On the host it follows in a thread of its own, while the next batch is made: torch gives up the interpreter's lock in
copies and sums. Weights may change again, and the average be read, only after ``wait``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from alignbench.training.fsdp import local
from alignbench.training.precision import upcast


class Average:
    """Starts as ``weights``, of which each rank has its own parts; weights in bfloat16 are averaged in float32."""

    def __init__(self, weights: Sequence[Tensor], decay: float, on_host: bool) -> None:
        self.weights, self.decay, self.on_host = list(weights), decay, on_host
        self._thread = ThreadPoolExecutor(1, "average")
        self._under_way: Future[None] | None = None
        self.restart(self.weights)

    def restart(self, values: Sequence[Tensor]) -> None:
        """From ``values`` instead, which are kept as the weights are: in parts or not."""
        self.wait()
        self._tensors = [self._kept(value) for value in values]

    def _kept(self, value: Tensor) -> Tensor:
        """A copy as the average of it is kept: on the host, this rank's part."""
        value = upcast(value.detach())
        return local(value).to("cpu", copy=True) if self.on_host else value.clone()

    @property
    def tensors(self) -> list[Tensor]:
        """Of each weight; on the host, of this rank's part."""
        self.wait()
        return self._tensors

    def follow(self) -> None:
        """One step after the weights, as they now are. On the host it is under way when this returns."""
        self.wait()
        means, now = ([local(t.detach()) for t in tensors] for tensors in (self._tensors, self.weights))
        if self.on_host:
            self._under_way = self._thread.submit(self._lerp, means, now, _event(now))
        elif any(w.dtype == torch.bfloat16 for w in now):
            for mean, w in zip(means, now):  # one at a time: there need not be room for a second copy of all
                mean.lerp_(upcast(w), 1 - self.decay)
        else:
            torch._foreach_lerp_(means, now, 1 - self.decay)

    def wait(self) -> None:
        """Until the average has followed. What went wrong in its thread is raised here."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _lerp(self, means: list[Tensor], now: list[Tensor], ready: torch.cuda.Event | None) -> None:
        """In the thread: one weight at a time, through one pinned buffer, on a stream beside the computation's."""
        if ready is None:
            for mean, w in zip(means, now):
                mean.lerp_(upcast(w), 1 - self.decay)
            return
        size = max(w.nbytes for w in now)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.Stream(now[0].device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for mean, w in zip(means, now):
                here = buffer[: w.nbytes].view(w.dtype).view(w.shape)
                here.copy_(w, non_blocking=True)
                stream.synchronize()
                mean.lerp_(upcast(here), 1 - self.decay)


def _event(now: Sequence[Tensor]) -> torch.cuda.Event | None:
    """At which the weights are as they now are, on the GPU; None on a CPU, where they already are."""
    if not any(w.is_cuda for w in now):
        return None
    event = torch.cuda.Event()
    event.record()
    return event

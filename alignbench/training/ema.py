"""The exponential moving average of the trained weights, beside them or in host memory.

On the host, a thread updates it while the next batch is made: torch releases the interpreter's lock during copies and
sums. Weights may change again, and the average may be read, only after ``wait``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from alignbench.training.fsdp import local_tensor
from alignbench.training.precision import upcast


class EMA:
    """The average of ``weights``, which it equals at first. Of sharded weights each rank averages its own shards.

    Weights in bfloat16 are averaged in float32.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, on_host: bool) -> None:
        self.weights, self.decay, self.on_host = list(weights), decay, on_host
        self._thread = ThreadPoolExecutor(1, "average")
        self._pending: Future[None] | None = None
        self.reset(self.weights)

    def reset(self, values: Sequence[Tensor]) -> None:
        """Make the average equal ``values``, which are sharded exactly as the weights are."""
        self.wait()
        self._tensors = [self._copy(value) for value in values]

    def _copy(self, value: Tensor) -> Tensor:
        value = upcast(value.detach())
        return local_tensor(value).to("cpu", copy=True) if self.on_host else value.clone()

    @property
    def tensors(self) -> list[Tensor]:
        """The average of each weight; on the host, of this rank's shard alone."""
        self.wait()
        return self._tensors

    def update(self) -> None:
        """Move the average one step towards the current weights. On the host, return while this is still running."""
        self.wait()
        means, weights = ([local_tensor(t.detach()) for t in tensors] for tensors in (self._tensors, self.weights))
        if self.on_host:
            self._pending = self._thread.submit(self._lerp, means, weights, _record_event(weights))
        elif any(w.dtype == torch.bfloat16 for w in weights):
            for mean, w in zip(means, weights):  # one at a time: there may be no room for a second copy of all
                mean.lerp_(upcast(w), 1 - self.decay)
        else:
            torch._foreach_lerp_(means, weights, 1 - self.decay)

    def wait(self) -> None:
        """Block until the last ``update`` has finished. An error in its thread is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _lerp(self, means: list[Tensor], weights: list[Tensor], ready: torch.cuda.Event | None) -> None:
        """Update the means in the thread, one weight at a time through one pinned buffer, on a stream of its own."""
        if ready is None:
            for mean, w in zip(means, weights):
                mean.lerp_(upcast(w), 1 - self.decay)
            return
        size = max(w.nbytes for w in weights)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.Stream(weights[0].device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for mean, w in zip(means, weights):
                staged = buffer[: w.nbytes].view(w.dtype).view(w.shape)
                staged.copy_(w, non_blocking=True)
                stream.synchronize()
                mean.lerp_(upcast(staged), 1 - self.decay)


def _record_event(weights: Sequence[Tensor]) -> torch.cuda.Event | None:
    """Record the event at which a GPU has computed the current weights; None on a CPU, which has them already."""
    if not any(w.is_cuda for w in weights):
        return None
    event = torch.cuda.Event()
    event.record()
    return event

"""The exponential moving average of the trained weights, beside them or in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignbench.halves import wide
from alignbench.shards import local


class Average:
    """Starts as ``weights``, of which each rank has its own parts; weights in bfloat16 are averaged in float32."""

    def __init__(self, weights: Sequence[Tensor], decay: float, on_host: bool) -> None:
        self.decay, self.on_host = decay, on_host
        self.weights = list(weights)
        self.tensors = [self.kept(w) for w in self.weights]

    def kept(self, w: Tensor) -> Tensor:
        """A copy of ``w``, as the average of it is kept: on the host, this rank's part."""
        w = wide(w.detach())
        return local(w).to("cpu", copy=True) if self.on_host else w.clone()

    def follow(self) -> None:
        """One step after the weights, as they now are."""
        average, now = ([local(t.detach()) for t in tensors] for tensors in (self.tensors, self.weights))
        if not self.on_host and all(w.dtype != torch.bfloat16 for w in now):
            torch._foreach_lerp_(average, now, 1 - self.decay)
            return
        for mean, w in zip(average, now):  # one at a time: there need not be room for a second copy of all
            mean.lerp_(wide(w).to(mean.device), 1 - self.decay)

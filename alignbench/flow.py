"""The one calling convention for every model, and the one integration that all methods differentiate.

t = 1 is noise, t = 0 the image; v = noise - image; ``x_next = x + (sigma_next - sigma) * v``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignbench.prompts import Prompt


@dataclass(frozen=True)
class Cond:
    """Text conditioning: named tensors that share the leading (sample) dimension B."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor) -> Cond:
        return Cond({name: t[index] for name, t in self.tensors.items()})


class Flow(Protocol):
    """A text-to-image flow model, or an analytic toy."""

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """v(x, sigma, cond), shape of ``x``. ``sigma``: a number, or one per sample (B,). ``reference``: the base model."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The sampler's grid, 1 -> 0: (steps + 1,) values, shifted as the model's own sampler shifts them."""
        ...

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """n initial latents x_1 ~ N(0, I), sample i drawn on the CPU from ``generators[i]``."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond: ...

    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> pixels (B, 3, H, W) in [0, 1], differentiable."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        ...


@dataclass(frozen=True)
class Batch:
    """What one loss sees: B samples whose prompts, noise and randomness the harness drew from (seed, step, rank)."""

    prompts: Sequence[Prompt]
    cond: Cond
    noise: Tensor  # (B, ...) initial latents
    rngs: Sequence[torch.Generator]  # one per sample, so that a draw does not depend on how the batch was split
    step_rng: torch.Generator  # equal on all ranks and micro-batches: every choice that changes which network calls happen
    step: int  # optimizer-batch number, from 0

    def __len__(self) -> int:
        return len(self.prompts)

    def randn_like(self, x: Tensor) -> Tensor:
        """Fresh N(0, I) of ``x``'s shape, row i from sample i's own generator (on the CPU, then moved)."""
        rows = [torch.randn(x.shape[1:], generator=rng, dtype=x.dtype) for rng in self.rngs]
        return torch.stack(rows).to(x.device)

    def grouped(self, size: int) -> Batch:
        """The same number of samples from the first B/size prompts, each repeated ``size`` times with its prompt's noise."""
        index = torch.arange(len(self) // size).repeat_interleave(size)
        prompts = [self.prompts[i] for i in index.tolist()]
        return Batch(prompts, self.cond[index], self.noise[index], self.rngs, self.step_rng, self.step)

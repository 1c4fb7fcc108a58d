"""Analytic flows and rewards with closed forms, for proofs of methods, for plans, and for tests of plug-ins.

Latents are (B, dim), in float64, and are their own pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignbench.evaluator import Evaluator, Prompt, Reward, Term
from alignbench.flow import Cond, Flow, counted, recomputing, seeded

PROMPTS = tuple(Prompt(f"p{i}", f"prompt number {i}") for i in range(7))


def shifted(steps: int, shift: float = 3.0) -> Tensor:
    """Return (steps + 1,) float64 sigmas from 1 to 0 with unequal steps, shifted as in SD3's sampler."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


class Toy:
    """Base class of the analytic flows: (B, dim) float64 latents that are their own pixels.

    Subclasses set ``dim``, hold their trained parameters as attributes, and define ``velocity``; see ``flow.Flow``.
    """

    dim: int

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return (n, dim) noise, row i from ``generators[i]``."""
        return torch.stack([torch.randn(self.dim, generator=generators[i], dtype=torch.float64) for i in range(n)])

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Return a small shift (B, dim) of the velocity, a function of each text."""
        rows = [torch.randn(self.dim, generator=seeded("prompt", text), dtype=torch.float64) for text in prompts]
        return Cond({"shift": 0.1 * torch.stack(rows)})

    def decode(self, x0: Tensor) -> Tensor:
        """Return the latents."""
        return x0

    def sigmas(self, steps: int) -> Tensor:
        """Return the (steps + 1,) sigmas of ``shifted``."""
        return shifted(steps)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters with their names."""
        return ((name, p) for name, p in vars(self).items() if isinstance(p, nn.Parameter))

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters."""
        return [p for _, p in self.named_parameters()]


class AffineFlow(Toy):
    """The flow v(x, t_i, c) = A x + b_i + c: affine in the latent, with one bias for every step of its grid.

    ``bias`` (steps, dim) starts at zero and is trained; ``A`` (dim, dim) is fixed and not symmetric, so that a Jacobian
    cannot be mistaken for its transpose.
    """

    def __init__(self, steps: int, dim: int = 3, grid: Tensor | None = None) -> None:
        """Make a flow for ``steps`` sampler steps on ``grid``, (steps + 1,) sigmas; None: that of ``shifted``."""
        generator = seeded("AffineFlow", dim)
        self.dim, self.grid = dim, shifted(steps) if grid is None else grid
        self.A = 0.5 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.bias = nn.Parameter(torch.zeros(steps, dim, dtype=torch.float64))
        self.base = self.bias.detach().clone()

    def sigmas(self, steps: int) -> Tensor:
        """Return the grid. Raise ValueError for another number of steps."""
        if steps != len(self.bias):
            raise ValueError(f"this flow was made for {len(self.bias)} steps, not {steps}")
        return self.grid

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """Return A x + b_i + c with the bias of the grid point nearest to ``sigma``."""
        bias = self.base if reference else self.bias
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        nearest = (self.grid[:-1] - sigma).abs().argmin(1)
        return x @ self.A.T + bias[nearest] + cond.tensors["shift"]


class GaussianFlow(Toy):
    """The exact velocity of data N(bias, std^2 I): linear in x, so that the sampler's moments have closed forms.

    ``bias`` (dim,) starts at zero and is trained. The prompt has no influence.
    """

    def __init__(self, std: float = 0.5, dim: int = 3) -> None:
        """Make the flow of data with mean zero and deviation ``std``."""
        self.std, self.dim = std, dim
        self.bias = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.base = self.bias.detach().clone()

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """Return E[noise - image | x], in closed form."""
        mean = self.base if reference else self.bias
        t = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        return (t - (1 - t) * self.std**2) / variance * (x - (1 - t) * mean) - mean


class Quadratic(Evaluator):
    """The score -|x - target|^2 / 2 of latents that are their own pixels."""

    name: ClassVar[str] = "quadratic"
    version: ClassVar[str] = "1"
    differentiable: ClassVar[bool] = True
    target: float = 1.0  # in every dimension

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the (B,) scores."""
        return -(pixels - self.target).square().flatten(1).sum(1) / 2


class QuadraticReward(Reward):
    """A reward of one ``Quadratic``, whose gradient is target - x."""

    def __init__(self, target: float = 1.0, margin: float | None = None) -> None:
        """Make the reward; ``margin``: that of its hinge, or None."""
        super().__init__(Term(Quadratic(target=target), margin))


class CallLog:
    """A flow that records every network call in ``calls``: (rows, with gradient, of the base model).

    Forwards that are repeated for a backward pass are not recorded.
    """

    def __init__(self, flow: Flow) -> None:
        """Record the calls of ``flow``."""
        self._flow = flow
        self.calls: list[tuple[int, bool, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """Return the flow's velocity, and record the call."""
        v, evaluations = counted(self._flow.velocity, x, sigma, cond, reference=reference)
        if not recomputing.get():
            self.calls += [(rows, grad, reference) for rows, grad in evaluations]
        return v

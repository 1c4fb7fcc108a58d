"""Analytic flows and rewards with closed forms: they prove methods, plan sweeps and test plug-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignbench.evaluator import Evaluator, Reward, Term
from alignbench.flow import Cond, Flow, counted, recomputing, seeded
from alignbench.prompts import Prompt

PROMPTS = tuple(Prompt(f"p{i}", f"prompt number {i}") for i in range(7))


def shifted(steps: int, shift: float = 3.0) -> Tensor:
    """(steps + 1,) float64 sigmas, 1 -> 0, with unequal steps: as SD3's sampler shifts them."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


class Toy:
    """What the analytic flows share: float64 latents (B, dim) that are their own pixels."""

    dim: int

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.dim, generator=generators[i], dtype=torch.float64) for i in range(n)])

    def encode(self, prompts: Sequence[str]) -> Cond:
        rows = [torch.randn(self.dim, generator=seeded("prompt", text), dtype=torch.float64) for text in prompts]
        return Cond({"shift": 0.1 * torch.stack(rows)})

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def sigmas(self, steps: int) -> Tensor:
        return shifted(steps)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in vars(self).items() if isinstance(p, nn.Parameter))

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]


class AffineFlow(Toy):
    """v(x, t_i, c) = A x + b_i + c: affine in the latent, with a bias of its own for every step of its grid.

    ``bias`` (steps, dim) starts at zero and is trained; ``A`` is fixed and not symmetric, so that a Jacobian cannot be
    mistaken for its transpose.
    """

    def __init__(self, steps: int, dim: int = 3, grid: Tensor | None = None) -> None:
        generator = seeded("AffineFlow", dim)
        self.dim, self.grid = dim, shifted(steps) if grid is None else grid
        self.A = 0.5 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.bias = nn.Parameter(torch.zeros(steps, dim, dtype=torch.float64))
        self.base = self.bias.detach().clone()

    def sigmas(self, steps: int) -> Tensor:
        if steps != len(self.bias):
            raise ValueError(f"this flow was made for {len(self.bias)} steps, not {steps}")
        return self.grid

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        bias = self.base if reference else self.bias
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        nearest = (self.grid[:-1] - sigma).abs().argmin(1)
        return x @ self.A.T + bias[nearest] + cond.tensors["shift"]


class GaussianFlow(Toy):
    """The exact velocity of data N(bias, std^2 I): linear in x, so that the sampler's moments have closed forms."""

    def __init__(self, std: float = 0.5, dim: int = 3) -> None:
        self.std, self.dim = std, dim
        self.bias = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.base = self.bias.detach().clone()

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        mean = self.base if reference else self.bias
        t = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        return (t - (1 - t) * self.std**2) / variance * (x - (1 - t) * mean) - mean


class Quadratic(Evaluator):
    """-|x - target|^2 / 2 of latents that are their own pixels."""

    name: ClassVar[str] = "quadratic"
    version: ClassVar[str] = "1"
    differentiable: ClassVar[bool] = True
    target: float = 1.0  # in every dimension

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return -(pixels - self.target).square().flatten(1).sum(1) / 2


class QuadraticReward(Reward):
    """A reward whose gradient is target - x."""

    def __init__(self, target: float = 1.0, margin: float | None = None) -> None:
        super().__init__(Term(Quadratic(target=target), margin))


class CallLog:
    """A flow that notes every network call: rows, whether with gradient."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.calls: list[tuple[int, bool, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        v, evaluations = counted(self._flow.velocity, x, sigma, cond, reference=reference)
        if not recomputing.get():
            self.calls += [(rows, grad, reference) for rows, grad in evaluations]
        return v

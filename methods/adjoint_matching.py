"""Adjoint Matching: fine-tuning as stochastic optimal control, by regression on the lean adjoint (arXiv 2409.08861).

In alignbench's sign and time (t = 1 noise, v = noise - image) the memoryless process moves by -(2 v + x / (1 - t + h))
per unit of time, with noise sigma = sqrt(2 (t + h) / (1 - t + h)); h, the step, keeps both finite at t = 1. Departures:
1. The loss is a mean over trained steps, not a sum: their number does not change the learning rate's meaning.
2. The reward is computed on the image that the last velocity predicts; a memoryless move to t = 0 without its noise
   would leave some of the earlier noise in the image.
3. The reward enters through its loss: with a margin, images above it have no terminal cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from alignbench.flow import euler
from alignbench.method import Loss, Pathwise, require, reward_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class AdjointMatching(Pathwise):
    """Regression on the lean adjoint; sampled memorylessly, its optimum is the base distribution times exp(lam R)."""

    name: ClassVar[str] = "adjoint_matching"
    title: ClassVar[str] = "Adjoint Matching"
    paper: ClassVar[str] = "arXiv 2409.08861"
    stochastic: ClassVar[bool] = True
    steps: int = 40
    lam: float = 1000.0  # the reward's multiplier; the paper: 1000, 2500, 12500
    late: int = 10  # number of last steps, all trained
    early: int = 10  # number of other steps trained, drawn for each batch
    loss_clip: float | None = None  # a sample's loss at a step has no gradient above it; the paper: 1.6 lam^2
    grid: Literal["uniform", "model"] = "uniform"  # sigmas of the rollout

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.lam > 0, "method.lam", f"{self.lam} rewards nothing", "choose a positive number")
        require(0 <= self.late <= self.steps, "method.late", f"{self.late} of {self.steps} steps", "choose fewer")
        room = self.steps - self.late
        require(0 <= self.early <= room, "method.early", f"{self.early} of the {room} others", f"choose 0 to {room}")
        require(self.late + self.early > 0, "method.early", "no step would be trained", "choose 1 or more")

    def draw(self, rng: torch.Generator) -> list[int]:
        """Return the trained steps: the last ones, and some of the others."""
        others = self.steps - self.late
        return sorted(torch.randperm(others, generator=rng)[: self.early].tolist()) + list(range(others, self.steps))

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
        uniform = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        t = uniform if self.grid == "uniform" else flow.sigmas(self.steps).double()
        kappa = self.draw(batch.step_rng)
        x = self.rollout(flow, batch, t)
        scores, gradient = reward_gradient(flow, reward, batch, x[-1])
        adjoints, base = self.lean_adjoints(flow, batch, t, x, self.lam * gradient)
        yield self.losses(flow, batch, t, kappa, x, adjoints, base, reward.value(scores).mean())

    @torch.no_grad()
    def rollout(self, flow: Flow, batch: Batch, t: Tensor) -> list[Tensor]:
        """Return x_0, ..., x_{N-1} of the memoryless process with the current model, and the predicted image."""
        x = [batch.noise]
        for i in range(self.steps - 1):
            h, kept = float(t[i] - t[i + 1]), float(1 - t[i + 1])
            v = flow.velocity(x[i], t[i], batch.cond).to(x[i].dtype)
            x.append(x[i] - h * (2 * v + x[i] / kept) + h**0.5 * sigma(t, i) * batch.randn_like(x[i]))
        return [*x, euler(x[-1], flow.velocity(x[-1], t[-2], batch.cond), t[-2], 0.0)]

    def lean_adjoints(
        self, flow: Flow, batch: Batch, t: Tensor, x: list[Tensor], a: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return a_0, ..., a_{N-1}, from a_N = ``a`` through the base model's drift alone, and the base velocities."""
        adjoints, base = [], []
        for i in reversed(range(self.steps)):
            h, kept = float(t[i] - t[i + 1]), float(1 - t[i + 1])
            x_i = x[i].detach().requires_grad_()
            v = flow.velocity(x_i, t[i], batch.cond, reference=True)
            (back,) = torch.autograd.grad(v, x_i, a.to(v.dtype))
            a = a - h * (2 * back.to(a.dtype) + a / kept)
            adjoints.append(a)
            base.append(v.detach().to(a.dtype))
        return adjoints[::-1], base[::-1]

    def losses(
        self,
        flow: Flow, batch: Batch, t: Tensor, kappa: list[int],
        x: list[Tensor], a: list[Tensor], base: list[Tensor], reward: Tensor,
    ) -> Iterator[Loss]:  # fmt: skip
        """Yield |2 (v - v_base) / sigma - sigma a|^2 per trained step: zero at v = v_base + sigma^2 a / 2."""
        for i in kappa:
            v = flow.velocity(x[i], t[i], batch.cond).to(x[i].dtype)
            miss = (2 / sigma(t, i)) * (v - base[i]) - sigma(t, i) * a[i]
            losses = miss.square().flatten(1).sum(1)
            if self.loss_clip is not None:
                losses = losses.clamp(max=self.loss_clip)
            yield Loss(losses.mean() / len(kappa), {"reward": reward}, losses.detach())


def sigma(t: Tensor, i: int) -> float:
    """Return the noise per square root of time, sqrt(2 (t + h) / (1 - t + h)), where 1 - t + h = 1 - t_next."""
    h = float(t[i] - t[i + 1])
    return (2 * (float(t[i]) + h) / (1 - float(t[i]) + h)) ** 0.5

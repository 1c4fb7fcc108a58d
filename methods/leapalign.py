"""LeapAlign: two leaps through a real trajectory carry the gradient to any step (arXiv 2604.15311, CVPR 2026).

Letters and equation numbers are the paper's (v2). Departures:
1. Distances d_j and d_0 are taken in the latents' precision (fp32); the released code takes them in fp64.
The hinge of eq. 11 (lambda) belongs to the reward: ``reward.margin``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from alignbench.flow import euler, integrate, scale_grad, straight_through
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class LeapAlign(Pathwise):
    """noise -> x_k -leap-> x_j -leap-> x_0, pinned to the sampler's own latents."""

    name: ClassVar[str] = "leapalign"
    alpha: float = 0.3  # share of the nested gradient that is kept (eq. 9)
    tau: float = 0.1  # smallest distance in the weight (eq. 12)

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.steps >= 2, "method.steps", "two distinct steps are needed", "choose 2 or more")
        require(0 <= self.alpha <= 1, "method.alpha", f"{self.alpha} is not a share", "choose 0 to 1")
        require(self.tau > 0, "method.tau", f"{self.tau} does not bound the weight", "choose a positive number")

    def draw(self, rng: torch.Generator) -> tuple[int, int]:
        """Steps (k, j) with k first: uniform over pairs of executed steps, so that sigma_j is never 0."""
        k, j = torch.randperm(self.steps, generator=rng)[:2].sort().values.tolist()
        return k, j

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c = flow.sigmas(self.steps), batch.cond
        k, j = self.draw(batch.step_rng)

        x_k = integrate(flow, batch.noise, t[: k + 1], c)
        v_k = flow.velocity(x_k, t[k], c)  # with gradient, and the sampler's own call: no forward is made twice
        leap_j = euler(x_k, v_k, t[k], t[j])  # eq. 4
        x_j = integrate(flow, euler(x_k, v_k.detach(), t[k], t[k + 1]), t[k + 1 : j + 1], c)
        at_j = straight_through(x_j, leap_j)  # eq. 6

        v_j = flow.velocity(scale_grad(at_j, self.alpha), t[j], c)  # eq. 9
        leap_0 = euler(at_j, v_j, t[j], 0.0)
        x_0 = integrate(flow, euler(x_j, v_j.detach(), t[j], t[j + 1]), t[j + 1 :], c)
        at_0 = straight_through(x_0, leap_0)  # eq. 7

        d_j, d_0 = distance(x_j, leap_j), distance(x_0, leap_0)
        w = 1 / (d_j.clamp(min=self.tau) + d_0.clamp(min=self.tau))  # eq. 12
        value, metrics = reward_loss(flow, reward, batch, at_0, w)  # eq. 11, 13
        return Loss(value, metrics | {"leap_miss_j": d_j.mean(), "leap_miss_0": d_0.mean(), "weight": w.mean()})


def distance(x: Tensor, leap: Tensor) -> Tensor:
    """(B,) mean absolute difference per sample, without gradient."""
    return (x - leap).detach().abs().flatten(1).mean(1)

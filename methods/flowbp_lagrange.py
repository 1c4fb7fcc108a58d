"""FlowBP-Lagrange: LeapAlign with leaps that integrate a polynomial through several velocities (arXiv 2606.11075).

Letters are LeapAlign's (arXiv 2604.15311). Defaults are the released FLUX.1-dev settings. Departures from the released
code, in addition to those of FlowBP-Sparse:
1. ``tail`` bounds the whole draw of k and j, not only the active steps: the start of a leap is always active.
2. ``mode`` alone sets the number of active steps, which is never zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from alignbench.flow import euler, integrate, randint, scale_grad, straight_through
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Cond, Flow


class FlowBPLagrange(Pathwise):
    """LeapAlign with each leap a quadrature over ``order`` of the sampler's own velocities."""

    name: ClassVar[str] = "flowbp_lagrange"
    title: ClassVar[str] = "FlowBP-Lagrange"
    paper: ClassVar[str] = "arXiv 2606.11075"
    alpha: float = 0.1  # share of the nested gradient that is kept
    tau: float = 0.2  # smallest distance in the weight; Klein: 0.1
    order: int = 3  # velocities per leap: exact for polynomials in sigma of degree order - 1
    mode: Literal["start", "midpoint", "all"] = "midpoint"  # with gradient: the first, the first two, or all
    support_scale: float = 0.25  # factor of all velocities' gradients but the first's
    rescale: float = 0.5  # 1: active velocities represent the whole leap, 0: themselves; SD3.5-M, Klein: 0
    anchor: float = 1.0  # from k to j: 0 is LeapAlign's straight leap, 1 the quadrature
    pair: Literal["dirichlet", "uniform"] = "dirichlet"  # distribution of k and j
    concentration: tuple[float, float, float] = (2.5, 6.0, 2.0)  # of the lengths image to j, j to k, k to noise
    max_j: int | None = None  # steps from j to the image, at most; SD3.5-M: 10
    tail: float = 1.0  # share of the steps, at the image's end, where k and j lie; Klein: 0.7

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(0 < self.tail <= 1, "method.tail", f"{self.tail} is not a share", "choose more than 0, at most 1")
        require(
            self.room >= 3, "method.steps", f"{self.room} steps do not make 3 parts", "choose more or a larger tail"
        )
        require(self.order >= 1, "method.order", f"{self.order} velocities per leap", "choose 1 or more")
        require(self.tau > 0, "method.tau", f"{self.tau} does not bound the weight", "choose more than 0")
        require(min(self.concentration) > 0, "method.concentration", f"{self.concentration} defines no Dirichlet",
                "choose three positive numbers")  # fmt: skip
        require(self.max_j is None or self.max_j >= 2, "method.max_j", f"{self.max_j} leaves no j", "choose 2 or more")
        what = "only pair: dirichlet limits j"
        require(self.max_j is None or self.pair == "dirichlet", "method.max_j", what, "choose null")
        for field in ("alpha", "support_scale", "rescale", "anchor"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"method.{field}", f"{value} is not a share", "choose 0 to 1")

    @property
    def room(self) -> int:
        """Number of steps where k and j may lie."""
        return math.ceil(self.tail * self.steps - 1e-9)

    def draw(self, rng: torch.Generator) -> tuple[int, int]:
        """Return the steps (k, j), noisier first; step 0 starts from the noise."""
        if self.pair == "uniform":
            k, j = torch.randperm(self.room, generator=rng)[:2].sort().values.tolist()
            return self.steps - self.room + k, self.steps - self.room + j
        shares = np.random.default_rng(randint(0, 2**31 - 1, rng)).dirichlet(self.concentration)
        lengths = (shares * self.room).round().clip(1).astype(int)
        lengths[shares.argmax()] += self.room - lengths.sum()
        after, between, _ = lengths.tolist()
        j = self.steps - 1 - min(after, (self.max_j or self.steps) - 1)
        return j - between, j

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c = flow.sigmas(self.steps), batch.cond
        k, j = self.draw(batch.step_rng)
        x_k = integrate(flow, batch.noise, t[: k + 1], c)
        at_j, d_j = self.leap(flow, c, t[k : j + 1], x_k, self.anchor)
        at_0, d_0 = self.leap(flow, c, t[j:], at_j)
        w = 1 / (d_j.clamp(min=self.tau) + d_0.clamp(min=self.tau))
        loss = reward_loss(flow, reward, batch, at_0, w)
        misses = {"leap_miss_j": d_j.mean(), "leap_miss_0": d_0.mean(), "weight": w.mean()}
        return loss._replace(metrics={**loss.metrics, **misses})

    def leap(self, flow: Flow, c: Cond, t: Tensor, at: Tensor, anchor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the sampler's latents at t[-1] with the leap's gradient, and the leap's (B,) distances from them."""
        support = spread(len(t) - 1, self.order)
        weight = dict(zip(support, quadrature(t[support], t[-1])))
        active = support[: {"start": 1, "midpoint": 2, "all": None}[self.mode]]
        total, reached = (sum(abs(weight[i]) for i in nodes) for nodes in (support, active))
        rho = 1 + self.rescale * (total / max(reached, 1e-8) - 1)  # a node's weight can be zero
        x, moved = at.detach(), torch.zeros_like(at)
        for i in range(len(t) - 1):
            with torch.set_grad_enabled(i in active):
                v = flow.velocity(scale_grad(at, self.alpha) if i == 0 else x, t[i], c)
            if i == 0:
                straight = euler(at, v, t[0], t[-1])
            if i in support:
                scaled = scale_grad(v, rho * (1 if i == 0 else self.support_scale))
                moved = moved + weight[i] * scaled.to(x.dtype)
            x = euler(x, v.detach(), t[i], t[i + 1])
        leap = torch.lerp(straight, at + moved, anchor)
        return straight_through(x, leap), (x - leap).detach().abs().flatten(1).mean(1)


def spread(length: int, n: int) -> list[int]:
    """Return at most n distinct steps of 0, ..., length - 1, evenly spaced from the first to the last."""
    return [int(i) for i in torch.linspace(0, length - 1, min(n, length)).round()]


def quadrature(nodes: Tensor, end: Tensor) -> list[float]:
    """Return W with sum_i W_i p(nodes[i]) = integral of p from nodes[0] to ``end`` for degrees below len(nodes)."""
    nodes, end = nodes.double().cpu(), end.double().cpu()
    powers = torch.arange(len(nodes), dtype=torch.float64)
    u = (nodes - nodes[0]) / (end - nodes[0])  # on [0, 1] powers are best conditioned
    return ((end - nodes[0]) * torch.linalg.solve(u[None] ** powers[:, None], 1 / (powers + 1))).tolist()

"""Deterministic adjoint matching: regress the velocity's change on the value gradient along the sampler's own ODE.

The control problem is J = sum_i h_i phi(delta_i) - R(x_N) with delta = v - v_base. Its stationarity condition,
delta_i = grad phi*(p_{i+1}) with p the adjoint, becomes a regression. The idea is that of arXiv 2605.06583 ("directly
regress the control toward a value-gradient-induced target"), of which only the abstract was at hand: what follows is
derived from that sentence, and none of it is claimed to be that paper's algorithm. Choices:
1. The target of step i is taken from p_{i+1}, which makes the discrete problem's solution exactly stationary.
2. Any convex phi: the loss is Fenchel and Young's, phi(delta) + phi*(p) - <p, delta>, which for the quadratic is
   beta / 2 |delta - p / beta|^2, and is zero at the target alone.
3. Truncation to the last k steps: earlier ones are left alone, or trained on the earliest adjoint at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from alignbench.flow import euler, straight_through
from alignbench.method import Loss, Pathwise, require, reward_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class ODEAdjointMatching(Pathwise):
    """At the base model its gradient is that of back-propagation through the last k steps, for any quadratic phi."""

    name: ClassVar[str] = "ode_adjoint_matching"
    k: int = 3  # the last steps, through which the adjoint is carried
    beta: float = 1.0  # price of departing from the base model, in the reward's unit per squared latent
    adjoint: Literal["lean", "policy"] = "lean"  # through the base model's velocity, or the gradient of cost-to-go
    solver: Literal["euler", "heun"] = "euler"  # of the rollout, and of the step map whose transpose carries p
    q: float = 2.0  # phi = beta / q |delta|^q, of a sample's norm; 2: the quadratic
    sparsity: float = 0.0  # with q = 2, adds sparsity |delta|_1: changes smaller than it is worth are not made
    early: Literal["skip", "freeze"] = "skip"  # steps before the last k: not trained, or on p_{N-k}

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"cannot carry the adjoint through {self.k} steps of {self.steps}"
        require(1 <= self.k <= self.steps, "method.k", what, f"choose 1 to {self.steps}")
        require(self.beta > 0, "method.beta", f"{self.beta} does not hold the model", "choose a positive number")
        require(self.q > 1, "method.q", f"|delta|^{self.q} has no unique target", "choose more than 1")
        require(self.sparsity >= 0, "method.sparsity", f"{self.sparsity} rewards change", "choose 0 or more")
        require(self.sparsity == 0 or self.q == 2, "method.sparsity", f"is defined for q = 2, not {self.q}",
                "choose q 2, or sparsity 0")  # fmt: skip

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
        t = flow.sigmas(self.steps)
        x, velocities = self.rollout(flow, batch, t)
        scores, p = reward_gradient(flow, reward, batch, x[-1])
        adjoints, base = {}, {}
        for i in reversed(range(self.steps - self.k, self.steps)):
            adjoints[i] = p
            p, base[i] = self.carried(flow, batch, t[i], t[i + 1], x[i], velocities[i], p)
        trained = range(0 if self.early == "freeze" else self.steps - self.k, self.steps)
        yield (
            self.matched(flow, batch, t[i], t[i + 1], x[i], adjoints.get(i, p), base.get(i), reward.value(scores))
            for i in trained
        )

    @torch.no_grad()
    def rollout(self, flow: Flow, batch: Batch, t: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """x_0, ..., x_N of the sampler under the model as it is, and each step's velocities in order."""
        x, velocities = [batch.noise], []
        for at, to in itertools.pairwise(t):
            calls: list[Tensor] = []

            def velocity(y: Tensor, s: Tensor, calls: list[Tensor] = calls) -> Tensor:
                calls.append(flow.velocity(y, s, batch.cond))
                return calls[-1]

            x.append(self.step(velocity, x[-1], at, to))
            velocities.append(calls)
        return x, velocities

    def step(self, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, at: Tensor, to: Tensor) -> Tensor:
        """One step of the solver. Heun's last is Euler's, as in diffusers: no network is asked about t = 0."""
        v = velocity(x, at)
        if self.solver == "heun" and to > 0:
            v = (v + velocity(euler(x, v, at, to), to)) / 2
        return euler(x, v, at, to)

    def carried(
        self, flow: Flow, batch: Batch, at: Tensor, to: Tensor, x: Tensor, velocities: list[Tensor], p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """p_i from p_{i+1}, and the base velocity at x_i.

        The transpose of the step map applied to p. lean: delta is held fixed, so that only the base velocity has a
        Jacobian; policy: the velocity as it is has, and the slope of h phi(delta) is added.
        """
        base: list[Tensor] = []
        delta: list[Tensor] = []

        def velocity(y: Tensor, s: Tensor) -> Tensor:
            base.append(flow.velocity(y, s, batch.cond, reference=True))
            if self.adjoint == "lean":
                return straight_through(velocities[len(base) - 1], base[-1])
            v = flow.velocity(y, s, batch.cond)
            delta.append(v - base[-1])
            return v

        x = x.detach().requires_grad_()
        cost = (self.step(velocity, x, at, to) * p).sum()
        if delta:
            cost = cost + (at - to) * self.phi(delta[0]).sum()
        (carried,) = torch.autograd.grad(cost, x)
        return carried, base[0].detach()

    def matched(
        self,
        flow: Flow, batch: Batch, at: Tensor, to: Tensor, x: Tensor, p: Tensor, base: Tensor | None, value: Tensor,
    ) -> Loss:  # fmt: skip
        """h (phi(delta) + phi*(p) - <p, delta>), with gradient through delta alone."""
        if base is None:
            with torch.no_grad():
                base = flow.velocity(x, at, batch.cond, reference=True)
        delta = flow.velocity(x, at, batch.cond) - base
        each = (at - to) * (self.phi(delta) + self.conjugate(p) - (p * delta).flatten(1).sum(1))
        return Loss(each.mean(), {"reward": value.mean()}, each.detach())

    def phi(self, delta: Tensor) -> Tensor:
        """(B,) running costs."""
        d = delta.flatten(1)
        power = (d.square().sum(1) + 1e-30) ** (self.q / 2)  # at zero too the slope of a power below 2 is finite
        return self.beta / self.q * power + self.sparsity * d.abs().sum(1)

    def conjugate(self, p: Tensor) -> Tensor:
        """(B,) phi*(p) = sup over delta of <p, delta> - phi(delta)."""
        q = self.q / (self.q - 1)
        norm = (p.flatten(1).abs() - self.sparsity).relu().square().sum(1).sqrt()
        return self.beta ** (1 - q) / q * norm**q

"""Deterministic adjoint matching: regress the velocity's change on the value gradient along the sampler's own ODE.

The control problem is J = sum_i h_i phi(delta_i) - R(x_N) with delta = v - v_base. Its stationarity condition,
delta_i = grad phi*(p_{i+1}) with p the adjoint, becomes a regression. The idea is that of arXiv 2605.06583 ("directly
regress the control toward a value-gradient-induced target"), of which only the abstract was at hand: what follows is
derived from that sentence, and none of it is claimed to be that paper's algorithm. Choices:
1. The target of step i is taken from p_{i+1}, which makes the discrete problem's solution exactly stationary. Heun's
   two velocities have a target each: the gradient with respect to the velocity itself says which.
2. Any convex phi: the loss is Fenchel and Young's, phi(delta) + phi*(p) - <p, delta>, which for the quadratic is
   beta / 2 |delta - p / beta|^2, and is zero at the target alone.
3. Truncation to the last k steps: earlier ones are left alone, or trained on the earliest adjoint at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch

from alignbench.flow import euler, straight_through
from alignbench.method import Loss, Pathwise, require, reward_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class Call(NamedTuple):
    """A network call of the rollout, and the weight of its velocity in the step: h, or h / 2."""

    x: Tensor
    t: Tensor
    weight: Tensor
    v: Tensor


class Match(NamedTuple):
    """A call, the adjoint that its delta is matched with, and the base velocity there if it is known."""

    call: Call
    p: Tensor
    base: Tensor | None


class ODEAdjointMatching(Pathwise):
    """At the base model its gradient is that of back-propagation through the last k steps, for any quadratic phi."""

    name: ClassVar[str] = "ode_adjoint_matching"
    title: ClassVar[str] = "Deterministic adjoint matching"
    paper: ClassVar[str] = "after arXiv 2605.06583"
    k: int = 3  # the last steps, through which the adjoint is carried
    beta: float = 1.0  # price of departing from the base model, in the reward's unit per squared latent
    adjoint: Literal["lean", "policy"] = "lean"  # through the base model's velocity, or the gradient of cost-to-go
    solver: Literal["euler", "heun"] = "euler"  # of the rollout, and of the step map whose transpose carries p
    q: float = 2.0  # phi = beta / q |delta|^q, of a sample's norm; 2: the quadratic
    sparsity: float = 0.0  # with q = 2, adds sparsity |delta|_1: changes smaller than it is worth are not made
    before: Literal["skip", "freeze"] = "skip"  # steps before the last k: not trained, or on p_{N-k}

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
        t, first = flow.sigmas(self.steps), self.steps - self.k
        path = self.rollout(flow, batch, t)
        x_0 = self.stepped(path[-1], t[-2], t[-1])
        scores, p = reward_gradient(flow, reward, batch, x_0)
        matches: list[Match] = []
        for i in reversed(range(first, self.steps)):
            p, found = self.carried(flow, batch, t[i], t[i + 1], path[i], p)
            matches += found
        if self.before == "freeze":
            matches += [Match(call, p, None) for calls in path[:first] for call in calls]
        yield (self.matched(flow, batch, match, reward.value(scores).mean()) for match in matches)

    @torch.no_grad()
    def rollout(self, flow: Flow, batch: Batch, t: Tensor) -> list[list[Call]]:
        """The sampler under the model as it is: each step's network calls, one for Euler, two for Heun.

        Heun's last step is Euler's, as in diffusers: no network is asked about t = 0.
        """
        x, path = batch.noise, []
        for at, to in itertools.pairwise(t):
            twice = self.solver == "heun" and to > 0
            calls = [Call(x, at, (at - to) / (1 + twice), flow.velocity(x, at, batch.cond))]
            if twice:
                y = euler(x, calls[0].v, at, to)
                calls.append(Call(y, to, calls[0].weight, flow.velocity(y, to, batch.cond)))
            path.append(calls)
            x = self.stepped(calls, at, to)
        return path

    def stepped(self, calls: list[Call], at: Tensor, to: Tensor) -> Tensor:
        """Where a step ends: x less each call's velocity times its weight."""
        return calls[0].x - sum(call.weight * call.v for call in calls)

    def carried(
        self, flow: Flow, batch: Batch, at: Tensor, to: Tensor, calls: list[Call], p: Tensor
    ) -> tuple[Tensor, list[Match]]:
        """p_i from p_{i+1} = ``p``, and what each call of the step is to be matched with.

        Both are gradients of <x_{i+1}, p>, with respect to x_i and to the calls' velocities. lean: delta is held fixed,
        so that only the base velocity has a Jacobian; policy: the velocity as it is has, and what the calls cost is
        added.
        """
        x = calls[0].x.detach().requires_grad_()
        y, cost, used, base = x, torch.zeros((), dtype=x.dtype, device=x.device), [], []
        for call in calls:
            base.append(flow.velocity(y, call.t, batch.cond, reference=True))
            if self.adjoint == "lean":
                v = straight_through(call.v, base[-1])
            else:
                v = flow.velocity(y, call.t, batch.cond)
                cost = cost + call.weight * self.phi(v - base[-1]).sum()
            used.append(v.view_as(v))  # apart from what its own cost is made of
            y = euler(x, used[0], at, to)
        end = x - sum(call.weight * v for call, v in zip(calls, used))
        carried, *pulls = torch.autograd.grad((end * p).sum() + cost, [x, *used])
        matches = [Match(call, -pull / call.weight, v.detach()) for call, pull, v in zip(calls, pulls, base)]
        return carried, matches

    def matched(self, flow: Flow, batch: Batch, match: Match, value: Tensor) -> Loss:
        """weight (phi(delta) + phi*(p) - <p, delta>), with gradient through delta alone."""
        (x, t, weight, _), p, base = match
        if base is None:
            with torch.no_grad():
                base = flow.velocity(x, t, batch.cond, reference=True)
        delta = flow.velocity(x, t, batch.cond) - base
        each = weight * (self.phi(delta) + self.conjugate(p) - (p * delta).flatten(1).sum(1))
        return Loss(each.mean(), {"reward": value}, each.detach())

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

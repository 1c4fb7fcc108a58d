"""Deterministic adjoint matching: regress the velocity's change on the value gradient along the sampler's own ODE.

The control problem is J = sum_i h_i phi(delta_i) - R(x_N) with delta = v - v_base. Its stationarity condition,
delta_i = grad phi*(p_{i+1}) with p the adjoint, becomes a regression. The idea is that of arXiv 2605.06583 ("directly
regress the control toward a value-gradient-induced target"). Only its abstract was available: what follows is derived
from that sentence, and is not claimed to be that paper's algorithm. Choices:
1. The target of step i is taken from p_{i+1}, which makes the discrete problem's solution exactly stationary. Each of
   Heun's two velocities has its own target, given by the gradient with respect to that velocity.
2. Any convex phi: the loss is Fenchel and Young's, phi(delta) + phi*(p) - <p, delta>, which for the quadratic is
   beta / 2 |delta - p / beta|^2, and is zero at the target alone.
3. Truncation to the last k steps: earlier ones are not trained, or trained on the earliest adjoint, p_{N-k}.
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
    """Network call of the rollout, with the weight of its velocity in the step: h, or h / 2."""

    x: Tensor
    t: Tensor
    weight: Tensor
    v: Tensor


class Match(NamedTuple):
    """Call, the adjoint that its delta is matched with, and the base velocity there if known."""

    call: Call
    p: Tensor
    base: Tensor | None


class ODEAdjointMatching(Pathwise):
    """Regression on the adjoint; at the base model, for quadratic phi, its gradient is that of DRaFT-K."""

    name: ClassVar[str] = "ode_adjoint_matching"
    title: ClassVar[str] = "Deterministic adjoint matching"
    paper: ClassVar[str] = "after arXiv 2605.06583"
    k: int = 3  # number of last steps through which the adjoint is carried
    beta: float = 1.0  # price of departing from the base model, in the reward's unit per squared latent
    adjoint: Literal["lean", "policy"] = "lean"  # through the base model's velocity, or the gradient of cost-to-go
    solver: Literal["euler", "heun"] = "euler"  # solver of the rollout, and of the step map whose transpose carries p
    q: float = 2.0  # phi = beta / q |delta|^q with a sample's norm; 2: the quadratic
    sparsity: float = 0.0  # with q = 2, adds sparsity |delta|_1, so that small changes are not made
    before: Literal["skip", "freeze"] = "skip"  # steps before the last k are not trained, or trained on p_{N-k}

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
        x_0 = self.step_end(path[-1])
        scores, p = reward_gradient(flow, reward, batch, x_0)
        matches: list[Match] = []
        for i in reversed(range(first, self.steps)):
            p, step_matches = self.adjoint_step(flow, batch, t[i], t[i + 1], path[i], p)
            matches += step_matches
        if self.before == "freeze":
            matches += [Match(call, p, None) for calls in path[:first] for call in calls]
        yield (self.matching_loss(flow, batch, match, reward.value(scores).mean()) for match in matches)

    @torch.no_grad()
    def rollout(self, flow: Flow, batch: Batch, t: Tensor) -> list[list[Call]]:
        """Run the sampler with the current model; return each step's network calls, one for Euler, two for Heun.

        Heun's last step is Euler's, as in diffusers: the network is not called at t = 0.
        """
        x, path = batch.noise, []
        for at, to in itertools.pairwise(t):
            twice = self.solver == "heun" and to > 0
            calls = [Call(x, at, (at - to) / (1 + twice), flow.velocity(x, at, batch.cond))]
            if twice:
                y = euler(x, calls[0].v, at, to)
                calls.append(Call(y, to, calls[0].weight, flow.velocity(y, to, batch.cond)))
            path.append(calls)
            x = self.step_end(calls)
        return path

    def step_end(self, calls: list[Call]) -> Tensor:
        """Return the end of a step: x minus each call's velocity times its weight."""
        return calls[0].x - sum(call.weight * call.v for call in calls)

    def adjoint_step(
        self, flow: Flow, batch: Batch, at: Tensor, to: Tensor, calls: list[Call], p: Tensor
    ) -> tuple[Tensor, list[Match]]:
        """Return p_i from p_{i+1} = ``p``, and the match of each call of the step.

        Both are gradients of <x_{i+1}, p>, with respect to x_i and to the calls' velocities. lean: delta is held fixed,
        so that only the base velocity has a Jacobian; policy: the current velocity has one, and the running costs of
        the calls are added.
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
            used.append(v.view_as(v))  # a node of its own, separate from the one in its cost
            y = euler(x, used[0], at, to)
        end = x - sum(call.weight * v for call, v in zip(calls, used))
        carried, *pulls = torch.autograd.grad((end * p).sum() + cost, [x, *used])
        matches = [Match(call, -pull / call.weight, v.detach()) for call, pull, v in zip(calls, pulls, base)]
        return carried, matches

    def matching_loss(self, flow: Flow, batch: Batch, match: Match, value: Tensor) -> Loss:
        """Return the loss weight (phi(delta) + phi*(p) - <p, delta>), with gradient through delta alone."""
        (x, t, weight, _), p, base = match
        if base is None:
            with torch.no_grad():
                base = flow.velocity(x, t, batch.cond, reference=True)
        delta = flow.velocity(x, t, batch.cond) - base
        losses = weight * (self.phi(delta) + self.conjugate(p) - (p * delta).flatten(1).sum(1))
        return Loss(losses.mean(), {"reward": value}, losses.detach())

    def phi(self, delta: Tensor) -> Tensor:
        """Return (B,) running costs."""
        d = delta.flatten(1)
        power = (d.square().sum(1) + 1e-30) ** (self.q / 2)  # keeps the slope of powers below 2 finite at zero
        return self.beta / self.q * power + self.sparsity * d.abs().sum(1)

    def conjugate(self, p: Tensor) -> Tensor:
        """Return (B,) phi*(p) = sup over delta of <p, delta> - phi(delta)."""
        q = self.q / (self.q - 1)
        norm = (p.flatten(1).abs() - self.sparsity).relu().square().sum(1).sqrt()
        return self.beta ** (1 - q) / q * norm**q

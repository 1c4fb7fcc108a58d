"""VGG-Flow: match the velocity's change to the gradient of the value function (arXiv 2512.05116, NeurIPS 2025).

The control problem is min integral of |v - v_base|^2 / (2 Rs) - R(x_N). Its optimum is v* = v_base + Rs G with G the
gradient of the cost-to-go; G is guessed from the predicted image, -eta_t grad R(x0hat), and a value network may add the
rest, nu. Defaults are the released settings of the Aesthetic run. Departures from the released code:
1. No value network as the default (nu = 0). The option is a small network of our own, not a second text-to-image model;
   its output is n = Rs nu, in units of velocity, so that its learning rate does not depend on Rs.
2. Its consistency loss takes the value-gradient equation along the optimal path, dG/dtau = J_base^T G with tau = 1 - t:
   one finite difference of 0.01 in t and one vector-Jacobian product, both of constants but for nu. Released: finite
   differences of two different definitions of the reward's gradient, with a step beyond the number format's precision.
3. The quantile that clips reward gradients is of the whole batch, over all ranks, and averaged over batches.
4. Trained steps are stratified over the steps between the first and the last one, and never coincide.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from alignbench.flow import euler, randint
from alignbench.method import GatherBatch, Loss, Pathwise, require, reward_gradient
from alignbench.networks import LatentNet

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Cond, Flow

DT = 0.01  # of the finite difference along the path
KEPT = 0.9  # of the running quantile, from batch to batch


class Visit(NamedTuple):
    """A trained step: where the rollout was, and Rs times the clipped gradient of -R at the image predicted there."""

    t: Tensor
    x: Tensor
    gradient: Tensor


class VGGFlow(Pathwise):
    """One regression per trained step; the reward's gradient reaches the model as a number, not through a graph."""

    name: ClassVar[str] = "vggflow"
    title: ClassVar[str] = "VGG-Flow"
    paper: ClassVar[str] = "arXiv 2512.05116, NeurIPS 2025"
    steps: int = 20
    reward_scale: float = 1e4  # Rs: how far the reward may pull; its meaning depends on the reward's unit
    eta_schedule: Literal["linear", "quadratic", "constant"] = (
        "linear"  # trust in the predicted image: 1 - t, its square, or 1
    )
    timestep_fraction: float = 0.25  # of the steps, trained beside the last one
    clip_quantile: float | None = 0.8  # of the reward gradients' norms, where they are clipped
    value_net: Literal["none", "small"] = "none"
    width: int = 64  # of the value network
    consistency: float = 1.0  # weight of its equation
    boundary: float = 1.0  # weight of n = 0 at the image

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.steps >= 2, "method.steps", "the first step is never trained", "choose 2 or more")
        require(
            self.reward_scale > 0, "method.reward_scale", f"{self.reward_scale} pulls nowhere", "choose more than 0"
        )
        what = f"{self.timestep_fraction} of {self.steps} steps do not fit between the first and the last"
        require(0 <= self.others <= self.steps - 2, "method.timestep_fraction", what, "choose another share")
        q = self.clip_quantile
        require(
            q is None or 0 < q <= 1, "method.clip_quantile", f"{q} is no quantile", "choose more than 0, to 1, or null"
        )
        require(self.width >= 1, "method.width", f"{self.width} channels are none", "choose 1 or more")

    @property
    def others(self) -> int:
        """Trained steps beside the last one."""
        return int(self.steps * self.timestep_fraction)

    def draw(self, rng: torch.Generator) -> list[int]:
        """The trained steps: one of each stratum, and the last; never the first, which is pure noise."""
        edges = [1 + i * (self.steps - 2) // max(1, self.others) for i in range(self.others + 1)]
        return [randint(a, b - 1, rng) for a, b in itertools.pairwise(edges)] + [self.steps - 1]

    def updates(
        self, flow: Flow, reward: Reward, batch: Batch
    ) -> Generator[Iterable[Loss] | GatherBatch, Tensor, None]:
        t, trained = flow.sigmas(self.steps), self.draw(batch.step_rng)
        visits, x, scores = [], batch.noise, None
        for i in range(self.steps):
            with torch.no_grad():
                v = flow.velocity(x, t[i], batch.cond)
            if i in trained:
                scores, gradient = reward_gradient(flow, reward, batch, euler(x, v, t[i], 0.0))
                visits.append(Visit(t[i], x, gradient))
            x = euler(x, v, t[i], t[i + 1])
        assert scores is not None  # of the last step, whose predicted image is the sampler's
        if self.clip_quantile is not None:
            norms = torch.cat([visit.gradient.flatten(1).norm(dim=1) for visit in visits])
            self.move_limit(batch.step, (yield GatherBatch(norms)))
        visits = [visit._replace(gradient=self.pull(visit.gradient)) for visit in visits]
        yield self.losses(flow, reward, batch, visits, x, reward.value(scores).mean())

    def losses(
        self, flow: Flow, reward: Reward, batch: Batch, visits: list[Visit], x_0: Tensor, value: Tensor
    ) -> Iterator[Loss]:
        """|v - v*|^2 per trained step; with a value network its two losses too."""
        for visit in visits:
            n = self.rest(visit.x, visit.t, batch.cond) if self.value_net == "small" else None
            x = visit.x.detach().requires_grad_(n is not None)
            with torch.set_grad_enabled(n is not None):
                base = flow.velocity(x, visit.t, batch.cond, reference=True)
            g = self.trust(visit.t) * visit.gradient + (0 if n is None else n.detach())
            each = (flow.velocity(visit.x, visit.t, batch.cond) - (base + g).detach()).square().flatten(1).mean(1)
            yield Loss(each.mean() / len(visits), {"reward": value}, each.detach())
            if n is not None:
                (pulled,) = torch.autograd.grad(base, x, g.to(base.dtype))
                yield self.consistent(flow, reward, batch, visit, n, base.detach() + g, pulled, len(visits))
        if self.value_net == "small":
            still = self.rest(x_0, torch.zeros((), dtype=x_0.dtype, device=x_0.device), batch.cond)
            each = still.square().flatten(1).mean(1)
            yield Loss(self.boundary * each.mean(), {"boundary": each.detach().mean()})

    def consistent(
        self,
        flow: Flow, reward: Reward, batch: Batch, visit: Visit, n: Tensor, v: Tensor, pulled: Tensor, count: int,
    ) -> Loss:  # fmt: skip
        """Squared residual of dG/dtau = J_base^T G along dx/dtau = -v*, times Rs^2, with gradient into n alone.

        ``v``: v* there; ``pulled``: J_base^T of Rs G.
        """
        t, x, gradient = visit
        dt = min(DT, float(t))
        there = euler(x, v, t, t - dt)
        with torch.no_grad():
            predicted = euler(there, flow.velocity(there, t - dt, batch.cond), t - dt, 0.0)
        _, gradient_there = reward_gradient(flow, reward, batch, predicted)
        g = self.trust(t) * gradient + n
        g_there = self.trust(t - dt) * self.pull(gradient_there) + self.rest(there, t - dt, batch.cond)
        each = ((g_there - g) / dt - pulled).square().flatten(1).mean(1)
        return Loss(self.consistency * each.mean() / count, {"consistency": each.detach().mean()})

    def pull(self, gradient: Tensor) -> Tensor:
        """Rs times each sample's gradient, which counts as no longer than the limit."""
        if self.clip_quantile is None:
            return self.reward_scale * gradient
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
        shorter = (self.state["limit"] / norm).clamp(max=1)
        return self.reward_scale * shorter.view(-1, *[1] * (gradient.ndim - 1)) * gradient

    def trust(self, t: Tensor) -> Tensor:
        """eta_t."""
        return {"linear": 1 - t, "quadratic": (1 - t) ** 2, "constant": torch.ones_like(t)}[self.eta_schedule]

    # ---- the value network, and what is remembered between batches

    def modules(self, flow: Flow) -> dict[str, nn.Module]:
        if self.value_net == "none":
            return {}
        latent, cond = flow.noise(1, [torch.Generator()]), flow.encode([""])
        text = sum(tensor.shape[-1] for tensor in cond.tensors.values())
        self.nets["value"] = LatentNet(latent.shape[-1], text, self.width).to(latent.dtype)
        return dict(self.nets)

    def rest(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """n = Rs nu, what the value network adds at (x, t)."""
        return self.nets["value"](x, t, cond)

    @cached_property
    def nets(self) -> dict[str, nn.Module]:
        return {}

    @cached_property
    def state(self) -> dict[str, Any]:
        return {}

    def move_limit(self, step: int, norms: Tensor) -> None:
        """The running quantile follows batch ``step``, whose norms these are, once for all its micro-batches.

        A closed hinge has no gradient, and does not count.
        """
        alive = norms[norms > 0].double()
        if self.state.get("step") == step or not len(alive):
            self.state.setdefault("limit", 0.0)
            return
        now = torch.quantile(alive, self.clip_quantile or 1.0).item()
        before = self.state.get("limit") or now
        self.state.update(step=step, limit=KEPT * before + (1 - KEPT) * now)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.update(state)

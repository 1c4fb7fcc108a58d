"""VGG-Flow: match the velocity's change to the gradient of the value function (arXiv 2512.05116, NeurIPS 2025).

The control problem is min integral of |v - v_base|^2 / (2 Rs) - R(x_N). Its optimum is v* = v_base + Rs G with G the
gradient of the cost-to-go. G is approximated from the predicted image by -eta_t grad R(x0hat); a value network may add
the rest, nu. Defaults are the released settings of the Aesthetic run. Departures from the released code:
1. No value network by default (nu = 0). The option is a small network of our own, not a second text-to-image model;
   its output is n = Rs nu, in units of velocity, so that its learning rate does not depend on Rs.
2. Its consistency loss takes the value-gradient equation along the optimal path, dG/dtau = J_base^T G with tau = 1 - t:
   one finite difference of 0.01 in t and one vector-Jacobian product, where all but nu is constant. Released: finite
   differences of two different definitions of the reward's gradient, with a step beyond the number format's precision.
3. The quantile that clips reward gradients is that of the whole batch, over all ranks, averaged over batches.
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

DT = 0.01  # step of the finite difference along the path
KEPT = 0.9  # decay of the running quantile, from batch to batch


class Visit(NamedTuple):
    """Trained step: t and x of the rollout, and Rs times the clipped gradient of -R at the image predicted there."""

    t: Tensor
    x: Tensor
    gradient: Tensor


class VGGFlow(Pathwise):
    """Regression at each trained step; the reward's gradient is a constant target, not part of a graph."""

    name: ClassVar[str] = "vggflow"
    title: ClassVar[str] = "VGG-Flow"
    paper: ClassVar[str] = "arXiv 2512.05116, NeurIPS 2025"
    steps: int = 20
    reward_scale: float = 1e4  # Rs: the reward's strength; its meaning depends on the reward's unit
    eta_schedule: Literal["linear", "quadratic", "constant"] = (
        "linear"  # trust in the predicted image: 1 - t, its square, or 1
    )
    timestep_fraction: float = 0.25  # share of the steps, trained in addition to the last one
    clip_quantile: float | None = 0.8  # quantile of the reward gradients' norms at which they are clipped
    value_net: Literal["none", "small"] = "none"
    width: int = 64  # channels of the value network
    consistency: float = 1.0  # weight of its consistency loss
    boundary: float = 1.0  # weight of its boundary loss, n = 0 at the image

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.steps >= 2, "method.steps", "the first step is never trained", "choose 2 or more")
        require(
            self.reward_scale > 0, "method.reward_scale", f"{self.reward_scale} has no effect", "choose more than 0"
        )
        what = f"{self.timestep_fraction} of {self.steps} steps do not fit between the first and the last"
        require(0 <= self.others <= self.steps - 2, "method.timestep_fraction", what, "choose another share")
        q = self.clip_quantile
        require(q is None or 0 < q <= 1, "method.clip_quantile", f"{q} is not a quantile", "choose up to 1, or null")
        require(self.width >= 1, "method.width", f"{self.width} channels", "choose 1 or more")

    @property
    def others(self) -> int:
        """Number of trained steps besides the last one."""
        return int(self.steps * self.timestep_fraction)

    def draw(self, rng: torch.Generator) -> list[int]:
        """Return the trained steps: one of each stratum, and the last; never the first, which is pure noise."""
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
        assert scores is not None  # they are the last step's, whose predicted image is the sampler's
        if self.clip_quantile is not None:
            norms = torch.cat([visit.gradient.flatten(1).norm(dim=1) for visit in visits])
            self.update_limit(batch.step, (yield GatherBatch(norms)))
        visits = [visit._replace(gradient=self.pull(visit.gradient)) for visit in visits]
        yield self.losses(flow, reward, batch, visits, x, reward.value(scores).mean())

    def losses(
        self, flow: Flow, reward: Reward, batch: Batch, visits: list[Visit], x_0: Tensor, value: Tensor
    ) -> Iterator[Loss]:
        """Yield |v - v*|^2 per trained step, and with a value network its two losses."""
        for visit in visits:
            n = self.rest(visit.x, visit.t, batch.cond) if self.value_net == "small" else None
            x = visit.x.detach().requires_grad_(n is not None)
            with torch.set_grad_enabled(n is not None):
                base = flow.velocity(x, visit.t, batch.cond, reference=True)
            g = self.trust(visit.t) * visit.gradient + (0 if n is None else n.detach())
            losses = (flow.velocity(visit.x, visit.t, batch.cond) - (base + g).detach()).square().flatten(1).mean(1)
            yield Loss(losses.mean() / len(visits), {"reward": value}, losses.detach())
            if n is not None:
                (pulled,) = torch.autograd.grad(base, x, g.to(base.dtype))
                yield self.consistency_loss(flow, reward, batch, visit, n, base.detach() + g, pulled, len(visits))
        if self.value_net == "small":
            n = self.rest(x_0, torch.zeros((), dtype=x_0.dtype, device=x_0.device), batch.cond)
            losses = n.square().flatten(1).mean(1)
            yield Loss(self.boundary * losses.mean(), {"boundary": losses.detach().mean()})

    def consistency_loss(
        self,
        flow: Flow, reward: Reward, batch: Batch, visit: Visit, n: Tensor, v: Tensor, pulled: Tensor, count: int,
    ) -> Loss:  # fmt: skip
        """Return Rs^2 times the squared residual of dG/dtau = J_base^T G along dx/dtau = -v*; only n has a gradient.

        ``v``: v* at the visit; ``pulled``: J_base^T Rs G.
        """
        t, x, gradient = visit
        dt = min(DT, float(t))
        x_next = euler(x, v, t, t - dt)
        with torch.no_grad():
            predicted = euler(x_next, flow.velocity(x_next, t - dt, batch.cond), t - dt, 0.0)
        _, gradient_next = reward_gradient(flow, reward, batch, predicted)
        g = self.trust(t) * gradient + n
        g_next = self.trust(t - dt) * self.pull(gradient_next) + self.rest(x_next, t - dt, batch.cond)
        losses = ((g_next - g) / dt - pulled).square().flatten(1).mean(1)
        return Loss(self.consistency * losses.mean() / count, {"consistency": losses.detach().mean()})

    def pull(self, gradient: Tensor) -> Tensor:
        """Return Rs times each sample's gradient, clipped to the limit."""
        if self.clip_quantile is None:
            return self.reward_scale * gradient
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
        factor = (self.state["limit"] / norm).clamp(max=1)
        return self.reward_scale * factor.view(-1, *[1] * (gradient.ndim - 1)) * gradient

    def trust(self, t: Tensor) -> Tensor:
        """Return eta_t, the trust in the predicted image."""
        return {"linear": 1 - t, "quadratic": (1 - t) ** 2, "constant": torch.ones_like(t)}[self.eta_schedule]

    # ---- the value network, and the state kept between batches

    def modules(self, flow: Flow) -> dict[str, nn.Module]:
        if self.value_net == "none":
            return {}
        latent, cond = flow.noise(1, [torch.Generator()]), flow.encode([""])
        text = sum(tensor.shape[-1] for tensor in cond.tensors.values())
        self.nets["value"] = LatentNet(latent.shape[-1], text, self.width).to(latent.dtype)
        return dict(self.nets)

    def rest(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return n = Rs nu, the value network's addition at (x, t)."""
        return self.nets["value"](x, t, cond)

    @cached_property
    def nets(self) -> dict[str, nn.Module]:
        return {}

    @cached_property
    def state(self) -> dict[str, Any]:
        return {}

    def update_limit(self, step: int, norms: Tensor) -> None:
        """Update the running quantile by the norms of batch ``step``, once for all its micro-batches.

        Zero norms, those of a closed hinge, do not count.
        """
        positive = norms[norms > 0].double()
        if self.state.get("step") == step or not len(positive):
            self.state.setdefault("limit", 0.0)
            return
        new = torch.quantile(positive, self.clip_quantile or 1.0).item()
        old = self.state.get("limit") or new
        self.state.update(step=step, limit=KEPT * old + (1 - KEPT) * new)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.update(state)

"""LeapAlign: leaps along a real trajectory carry the gradient to any step (arXiv 2604.15311, CVPR 2026).

Letters and equation numbers are the paper's (v2). The defaults are its method; every other value is one of its
ablations (figures 4 and 6). Departures, and choices where the paper is silent:
1. Distances d_j and d_0 are computed in the latents' precision (fp32); released: in fp64.
2. With one leap or one distance the weight is 1 / max(d, tau); with three leaps there are three distances, and alpha
   discounts the inputs of the second and the third.
3. ``timesteps`` and ``distance`` are shares of the sampler's steps, not of sigma (figures 4e and 4f do not say which).
The hinge of eq. 11 (lambda, table 5) belongs to the reward: ``reward.margin``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from alignbench.flow import euler, integrate, randint, scale_grad, straight_through
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class LeapAlign(Pathwise):
    """Gradient through leaps, noise -> x_k -leap-> x_j -leap-> x_0, pinned to the sampler's own latents."""

    name: ClassVar[str] = "leapalign"
    title: ClassVar[str] = "LeapAlign"
    paper: ClassVar[str] = "arXiv 2604.15311, CVPR 2026"
    alpha: float = 0.3  # share of the nested gradient that is kept (eq. 9; figure 4a)
    tau: float = 0.1  # smallest distance in the weight (eq. 12)
    leaps: Literal[1, 2, 3] = 2  # figure 4b
    reward_input: Literal["x_0", "leap"] = "x_0"  # the sampler's image, or the last leap's prediction (figure 4c)
    similarity: Literal["both", "d_j", "d_0", "none"] = "both"  # distances in a sample's weight (figure 4d)
    timesteps: tuple[float, float] = (0.0, 1.0)  # range of steps to draw from, 0: image, 1: noise (figure 4e)
    distance: float | None = None  # from k to j as a share of the steps; None: random (figure 4f)
    single_step_at_k: bool = True  # False: only the nested gradient reaches k (eq. 14; figure 6)

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(0 <= self.alpha <= 1, "method.alpha", f"{self.alpha} is not a share", "choose 0 to 1")
        require(self.tau > 0, "method.tau", f"{self.tau} does not bound the weight", "choose a positive number")
        low, high = self.timesteps
        require(
            0 <= low < high <= 1, "method.timesteps", f"[{low}, {high}] is not within [0, 1]", "choose 0 <= low < high"
        )
        room = len(self.allowed)
        what = f"{self.leaps} distinct steps are needed, but {room} of {self.steps} lie in the range"
        require(room >= self.leaps, "method.steps", what, "choose more steps, or a wider range")
        what = f"d_j is the distance after the first of two leaps, but leaps is {self.leaps}"
        require(self.similarity != "d_j" or self.leaps > 1, "method.similarity", what, "choose d_0, both or none")
        require(self.single_step_at_k or self.leaps > 1, "method.single_step_at_k", "one leap has no nested gradient",
                "choose true")  # fmt: skip
        if self.distance is not None:
            require(self.leaps == 2, "method.distance", f"it separates two steps, not {self.leaps}", "choose 2 leaps")
            what = f"{self.distance} of {self.steps} steps is less than one, or exceeds the range"
            require(1 <= self.gap < room, "method.distance", what, "choose a smaller share, or a wider range")

    @property
    def allowed(self) -> range:
        """Steps to draw from, by default all; step 0 starts from the noise, and sigma_j is never 0."""
        low, high = map(self.count, self.timesteps)
        return range(self.steps - high, self.steps - low)

    @property
    def gap(self) -> int:
        """Number of steps from k to j if ``distance`` fixes it."""
        return self.count(self.distance or 0)

    def count(self, share: float) -> int:
        """Return the number of whole steps in a share of them; 0.29 of 100 is 29, not 28."""
        return int(share * self.steps + 1e-9)

    def draw(self, rng: torch.Generator) -> tuple[int, ...]:
        """Return the steps that leaps start from, noisiest first: uniform over sets of allowed steps."""
        steps = self.allowed
        if self.distance is None:
            chosen = torch.randperm(len(steps), generator=rng)[: self.leaps].sort().values
            return tuple(steps[i] for i in chosen.tolist())
        k = steps[randint(0, len(steps) - 1 - self.gap, rng)]
        return k, k + self.gap

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c = flow.sigmas(self.steps), batch.cond
        starts = self.draw(batch.step_rng)
        x = at = integrate(flow, batch.noise, t[: starts[0] + 1], c)
        distances = []
        for k, j in itertools.pairwise([*starts, self.steps]):  # the last leap ends at the image: t[steps] = 0
            v_k = flow.velocity(scale_grad(at, self.alpha), t[k], c)  # eq. 9; also the sampler's own call
            leap = euler(at if self.single_step_at_k else x, v_k, t[k], t[j])  # eq. 3 to 5, 14
            x = integrate(flow, euler(x, v_k.detach(), t[k], t[k + 1]), t[k + 1 : j + 1], c)
            at = straight_through(x, leap)  # eq. 6, 7
            distances.append((x - leap).detach().abs().flatten(1).mean(1))  # d_j, d_0: (B,)
        w = self.weight(distances)
        loss = reward_loss(flow, reward, batch, at if self.reward_input == "x_0" else leap, w)  # eq. 11, 13
        misses = {f"leap_miss_{name}": d.mean() for name, d in zip([*"ji"[: self.leaps - 1], "0"], distances)}
        return loss._replace(metrics=loss.metrics | misses | {"weight": w.mean()})

    def weight(self, distances: list[Tensor]) -> Tensor:
        """Return (B,) similarities of leaps and trajectory (eq. 12), large where the leaps are accurate."""
        used = {"both": distances, "d_j": distances[:1], "d_0": distances[-1:], "none": []}[self.similarity]
        if not used:
            return torch.ones_like(distances[0])
        return 1 / torch.stack([d.clamp(min=self.tau) for d in used]).sum(0)

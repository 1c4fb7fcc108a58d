"""FlowBP-Sparse and -Bridge: a few steps of the sampler carry the gradient, rescaled to the whole (arXiv 2606.11075).

Defaults are the released FLUX.1-dev settings; SD3.5-M's and FLUX.2-Klein-9B's stand beside them. Departures from the
released code:
1. An active step is the sampler's own call, made with gradient; released: the step is forwarded a second time after
   the rollout. The gradient is the same, and k forwards are saved.
2. Latents stay in fp32 between the steps; released: bf16.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

from alignbench.flow import euler, scale_grad
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class FlowBP(Pathwise):
    """What both share: which steps are active, how their gradients are scaled, and the path through them."""

    k: int = 3  # active steps
    late_bias: float = 2.0  # a step's chance to be active grows with its number to this power; Bridge: on each side
    rescale: float = 1.0  # 1: active steps stand for the whole path, 0: for themselves
    tail: float = 1.0  # share of the steps, at the image's end, that may be active

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(0 < self.tail <= 1, "method.tail", f"{self.tail} is no share of the steps", "choose more than 0, to 1")
        room = len(self.window)
        what = f"{self.k} active steps do not fit into {room}"
        require(1 <= self.k <= room, "method.k", what, f"choose 1 to {room}")
        require(self.late_bias >= 0, "method.late_bias", f"{self.late_bias} prefers early steps", "choose 0 or more")
        require(0 <= self.rescale <= 1, "method.rescale", f"{self.rescale} is not a share", "choose 0 to 1")

    @property
    def window(self) -> range:
        """The steps that may be active; step 0 is the noise."""
        return range(self.steps - math.ceil(self.tail * self.steps - 1e-9), self.steps)

    def chosen(self, steps: range, n: int, first: int, rng: torch.Generator) -> set[int]:
        """n of ``steps``, without replacement, with weights first^late_bias, (first + 1)^late_bias, ..."""
        if n == 0:
            return set()
        weights = torch.arange(first, first + len(steps), dtype=torch.float64) ** self.late_bias
        return {steps[i] for i in torch.multinomial(weights, n, generator=rng).tolist()}

    def rho(self, t: Tensor, active: set[int]) -> float:
        """What active steps' gradients are multiplied by: 1 + rescale (all of the window / the active part - 1)."""
        h = [float(t[i] - t[i + 1]) for i in range(self.steps)]
        return 1 + self.rescale * (sum(h[i] for i in self.window) / sum(h[i] for i in active) - 1)

    def path(self, flow: Flow, batch: Batch, active: set[int], bridge: int | None = None, alpha: float = 0.0) -> Tensor:
        """x_N, bitwise the sampler's. Gradient reaches it through active velocities alone, and into their input at none

        but the step ``bridge``, where a share ``alpha`` of it does.
        """
        t, c, x = flow.sigmas(self.steps), batch.cond, batch.noise
        rho = self.rho(t, active)
        for i in range(self.steps):
            with torch.set_grad_enabled(i in active):
                v = flow.velocity(scale_grad(x, alpha) if i == bridge else x.detach(), t[i], c)
            x = euler(x, scale_grad(v, rho), t[i], t[i + 1])
        return x


class FlowBPSparse(FlowBP):
    """k steps, each by itself: no gradient flows from one into another."""

    name: ClassVar[str] = "flowbp_sparse"  # SD3.5-M: k 4, late_bias 1, rescale 0.5; Klein: 4, 2, 0
    title: ClassVar[str] = "FlowBP-Sparse"
    paper: ClassVar[str] = "arXiv 2606.11075"

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        active = self.chosen(self.window, self.k, self.window.start + 1, batch.step_rng)
        return reward_loss(flow, reward, batch, self.path(flow, batch, active))


class FlowBPBridge(FlowBP):
    """Steps before and after a random step j, and through j's input a share of the nested gradient between them."""

    name: ClassVar[str] = "flowbp_bridge"  # SD3.5-M: alpha 0.5, late_bias 4, rescale 0; Klein: 1, k 3, 4, 0.5
    title: ClassVar[str] = "FlowBP-Bridge"
    paper: ClassVar[str] = "arXiv 2606.11075"
    k: int = 5
    alpha: float = 0.1  # share of the nested gradient that is kept

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.k >= 2, "method.k", "a bridge has two ends", "choose 2 or more")
        require(0 <= self.alpha <= 1, "method.alpha", f"{self.alpha} is not a share", "choose 0 to 1")

    def draw(self, rng: torch.Generator) -> tuple[int, set[int]]:
        """The step j, the later one of a uniform pair, and the active steps: some before it, it, and some after."""
        steps = self.window
        place = int(torch.randperm(len(steps), generator=rng)[:2].max())
        j, before, after = steps[place], steps[:place], steps[place + 1 :]
        n = round(self.k * len(before) / len(steps))
        n = min(max(n, 1, self.k - 1 - len(after)), self.k - 1, len(before))
        return j, {j} | self.chosen(before, n, 1, rng) | self.chosen(after, self.k - 1 - n, 1, rng)

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        j, active = self.draw(batch.step_rng)
        return reward_loss(flow, reward, batch, self.path(flow, batch, active, j, self.alpha))

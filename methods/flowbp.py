"""FlowBP-Sparse and -Bridge: a few steps of the sampler carry the gradient, rescaled to the whole (arXiv 2606.11075).

Defaults are the released FLUX.1-dev settings; comments give those for SD3.5-M and FLUX.2-Klein-9B. Departures from the
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
    """Base of both: choose the active steps, scale their gradients, and run the path through them."""

    k: int = 3  # active steps
    late_bias: float = 2.0  # exponent of the step's number in its weight to be active; Bridge: on each side
    rescale: float = 1.0  # 1: active steps represent the whole path, 0: themselves
    tail: float = 1.0  # share of the steps, at the image's end, that may be active

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(0 < self.tail <= 1, "method.tail", f"{self.tail} is not a share", "choose more than 0, at most 1")
        room = len(self.window)
        what = f"{self.k} active steps do not fit into {room}"
        require(1 <= self.k <= room, "method.k", what, f"choose 1 to {room}")
        require(self.late_bias >= 0, "method.late_bias", f"{self.late_bias} prefers early steps", "choose 0 or more")
        require(0 <= self.rescale <= 1, "method.rescale", f"{self.rescale} is not a share", "choose 0 to 1")

    @property
    def window(self) -> range:
        """Steps that may be active; step 0 starts from the noise."""
        return range(self.steps - math.ceil(self.tail * self.steps - 1e-9), self.steps)

    def chosen(self, steps: range, n: int, first: int, rng: torch.Generator) -> set[int]:
        """Draw n of ``steps`` without replacement, with weights first^late_bias, (first + 1)^late_bias, ..."""
        if n == 0:
            return set()
        weights = torch.arange(first, first + len(steps), dtype=torch.float64) ** self.late_bias
        return {steps[i] for i in torch.multinomial(weights, n, generator=rng).tolist()}

    def rho(self, t: Tensor, active: set[int]) -> float:
        """Return the factor of active steps' gradients: 1 + rescale (length of the window / of active steps - 1)."""
        h = [float(t[i] - t[i + 1]) for i in range(self.steps)]
        return 1 + self.rescale * (sum(h[i] for i in self.window) / sum(h[i] for i in active) - 1)

    def path(self, flow: Flow, batch: Batch, active: set[int], bridge: int | None = None, alpha: float = 0.0) -> Tensor:
        """Return x_N, bitwise the sampler's, with gradient through the active velocities alone.

        Their inputs are detached, except at the step ``bridge``, whose input takes a share ``alpha`` of the gradient.
        """
        t, c, x = flow.sigmas(self.steps), batch.cond, batch.noise
        rho = self.rho(t, active)
        for i in range(self.steps):
            with torch.set_grad_enabled(i in active):
                v = flow.velocity(scale_grad(x, alpha) if i == bridge else x.detach(), t[i], c)
            x = euler(x, scale_grad(v, rho), t[i], t[i + 1])
        return x


class FlowBPSparse(FlowBP):
    """Gradient through k single steps: none flows from one step into another."""

    name: ClassVar[str] = "flowbp_sparse"  # SD3.5-M: k 4, late_bias 1, rescale 0.5; Klein: 4, 2, 0
    title: ClassVar[str] = "FlowBP-Sparse"
    paper: ClassVar[str] = "arXiv 2606.11075"

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        active = self.chosen(self.window, self.k, self.window.start + 1, batch.step_rng)
        return reward_loss(flow, reward, batch, self.path(flow, batch, active))


class FlowBPBridge(FlowBP):
    """FlowBP-Sparse around a random step j, with a share of the nested gradient through j's input."""

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
        """Return step j, the later of a uniform pair, and the active steps: j, and steps before and after it."""
        steps = self.window
        place = int(torch.randperm(len(steps), generator=rng)[:2].max())
        j, before, after = steps[place], steps[:place], steps[place + 1 :]
        n = round(self.k * len(before) / len(steps))
        n = min(max(n, 1, self.k - 1 - len(after)), self.k - 1, len(before))
        return j, {j} | self.chosen(before, n, 1, rng) | self.chosen(after, self.k - 1 - n, 1, rng)

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        j, active = self.draw(batch.step_rng)
        return reward_loss(flow, reward, batch, self.path(flow, batch, active, j, self.alpha))

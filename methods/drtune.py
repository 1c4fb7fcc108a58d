"""DRTune: train k steps through the additive path alone, and stop early (Wu et al. 2024, arXiv 2405.00760).

Settings are those of the LeapAlign paper (arXiv 2604.15311, appendix E). Departures:
1. A draw without a trained step before the stop would leave nothing to train, and is repeated. This never happens with
   the default k, m and steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from alignbench.flow import euler, randint
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class DRTune(Pathwise):
    """Gradient through k single steps: the network's input is detached, so that no Jacobian of the network enters."""

    name: ClassVar[str] = "drtune"
    title: ClassVar[str] = "DRTune"
    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2405.00760"
    k: int = 2  # equally spaced trained steps
    m: int = 11  # the sampler stops at one of the last m steps, and predicts the image from there
    draw_in_prefix: bool = False  # True: draw the k steps among the executed ones, as FlowBP does

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"the sampler cannot stop at one of the last {self.m} of {self.steps} steps"
        require(1 <= self.m <= self.steps, "method.m", what, f"choose 1 to {self.steps}")
        room = self.steps - self.m + 1 if self.draw_in_prefix else self.steps
        what = f"{self.k} trained steps do not fit into {room}"
        require(1 <= self.k <= room, "method.k", what, f"choose 1 to {room}")

    def draw(self, rng: torch.Generator) -> tuple[set[int], int]:
        """Return the trained steps and the step to stop at; step 0 starts from the noise."""
        while True:
            stop = self.steps - randint(1, self.m, rng)
            length = stop + 1 if self.draw_in_prefix else self.steps
            gap = length // self.k
            last = length - randint(1, length - (self.k - 1) * gap, rng)
            trained = {last - i * gap for i in range(self.k)}
            if min(trained) <= stop:
                return trained, stop

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c, x = flow.sigmas(self.steps), batch.cond, batch.noise
        trained, stop = self.draw(batch.step_rng)
        for i in range(stop + 1):
            with torch.set_grad_enabled(i in trained):
                v = flow.velocity(x.detach(), t[i], c)
            x = euler(x, v, t[i], t[i + 1] if i < stop else 0.0)
        return reward_loss(flow, reward, batch, x)

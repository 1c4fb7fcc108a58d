"""ReFL: reward the image that one late step predicts (Xu et al. 2023, arXiv 2304.05977).

This is the flow-matching form of the LeapAlign paper (arXiv 2604.15311, appendix E). Departures from Xu et al.:
1. No pre-training loss, as in their released script and in LeapAlign ("EMA is sufficient"): the anchor is weaker.
2. The step is one of the last 11 of 25 flow steps, not of the last 10 of 40 diffusion steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from alignbench.flow import euler, integrate, randint
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    import torch

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class ReFL(Pathwise):
    """Gradient through one velocity, at a random late step where the sampler stops."""

    name: ClassVar[str] = "refl"
    title: ClassVar[str] = "ReFL"
    paper: ClassVar[str] = "Xu et al. 2023, arXiv 2304.05977"
    last_n: int = 11  # number of last steps from which the step is drawn

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"the last {self.last_n} of {self.steps} steps do not exist"
        require(1 <= self.last_n <= self.steps, "method.last_n", what, f"choose 1 to {self.steps}")

    def draw(self, rng: torch.Generator) -> int:
        """Return the trained step s: 0 is the first, steps - 1 the last."""
        return self.steps - randint(1, self.last_n, rng)

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c = flow.sigmas(self.steps), batch.cond
        s = self.draw(batch.step_rng)
        x_s = integrate(flow, batch.noise, t[: s + 1], c)
        x_0 = euler(x_s, flow.velocity(x_s, t[s], c), t[s], 0.0)
        return reward_loss(flow, reward, batch, x_0)

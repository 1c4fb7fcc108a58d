"""Flow-GRPO: a stochastic sampler with the flow's marginals turns the flow into a policy (arXiv 2505.05470).

Defaults are the released SD3.5-M settings for GenEval (geneval_sd3), on the model's own grid. Departures from the
released code:
1. The last move is a plain Euler step. Released: it has noise too, which is negligible on SD3's grid (its last sigma is
   near 0) but would be visible in the images on a grid that ends with a long step.
2. Each of the two updates gets its share of every group. Released: a random half of all images.
3. A sample with advantage zero is trained too, on the KL term alone. Released: it is left out; here the network calls
   must not depend on the rewards.
4. Several rewards are normalised each by itself. Released: their weighted sum is (``aggregate: reward``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from alignbench.method import require
from alignbench.policy import GroupRelative

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Batch


class FlowGRPO(GroupRelative):
    """GRPO with few, noisy steps, advantages in units of the whole batch, and a KL term to the base model."""

    name: ClassVar[str] = "flowgrpo"
    title: ClassVar[str] = "Flow-GRPO"
    paper: ClassVar[str] = "arXiv 2505.05470"
    steps: int = 10
    group: int = 24
    same_noise: bool = False
    sde: Literal["dance", "flow"] = "flow"
    eta: float = 0.7
    shift: float | None = None
    updates_per_rollout: int = 2
    timestep_fraction: float = 0.99  # share of the steps, from the noise on: 9 of 10
    std: Literal["group", "batch"] = "batch"
    beta: float = 0.04

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"{self.timestep_fraction} of {self.steps} steps is less than one, or includes the last"
        require(1 <= self.trained < self.steps, "method.timestep_fraction", what, "choose more than 0, less than 1")

    @property
    def trained(self) -> int:
        """Number of moves trained per sample."""
        return int(self.steps * self.timestep_fraction)

    def moves(self, part: Batch, noisy: range) -> Tensor:
        return super().moves(part, noisy[: self.trained])

    def unit(self, rewards: Tensor) -> Tensor:
        return rewards.std(-1, correction=0, keepdim=True) + 1e-4

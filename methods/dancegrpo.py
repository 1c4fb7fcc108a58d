"""DanceGRPO: policy gradient of a stochastic sampler, relative to a group of images of one prompt (arXiv 2505.07818).

Defaults are the released FLUX.1-dev settings (finetune_flux_grpo.sh). Departures from the released code:
1. Advantages are computed in float64 around the group's first reward, so that equal rewards give exactly zero; in fp32
   rounding alone gives advantages of up to +-0.7.
2. Initial noise is shared within a group, not across the prompts of a rank.
3. The network sees sigma itself, not sigma truncated to a thousandth.
4. The samples of an update form one batch of the network in the rollout too, so that the ratio starts at 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from alignbench.method import require
from alignbench.policy import GroupRelative

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Batch


class DanceGRPO(GroupRelative):
    """GRPO with noise on every move; each sample draws the moves that are trained."""

    name: ClassVar[str] = "dancegrpo"
    title: ClassVar[str] = "DanceGRPO"
    paper: ClassVar[str] = "arXiv 2505.07818"
    steps: int = 16
    updates_per_rollout: int = 3  # released: 12 images, a step every 4
    timestep_fraction: float = 0.6  # of the moves, drawn per sample

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"{self.timestep_fraction} of {self.steps - 1} moves is less than one or more than all"
        require(1 <= self.trained <= self.steps - 1, "method.timestep_fraction", what, "choose more than 0, at most 1")

    @property
    def trained(self) -> int:
        """Number of moves trained per sample."""
        return int((self.steps - 1) * self.timestep_fraction)

    def noisy(self, batch: Batch) -> range:
        return range(self.steps)  # includes the last, though the image is taken before its noise

    def moves(self, part: Batch, noisy: range) -> Tensor:
        """Return each sample's moves in the order of its own permutation, without the last move."""
        order = torch.stack([torch.randperm(len(noisy) - 1, generator=rng) for rng in part.rngs])
        return order.T[: self.trained]

"""DanceGRPO: policy gradient over a stochastic sampler, relative to a group of images of one prompt (arXiv 2505.07818).

Defaults are the released FLUX.1-dev settings (finetune_flux_grpo.sh). Departures from the released code:
1. Advantages are taken in float64 around the group's first reward, so that equal rewards give exactly zero; in fp32
   rounding alone gives advantages of up to +-0.7.
2. Initial noise is shared within a group, not across the prompts of a rank.
3. The network sees sigma itself, not sigma truncated to a thousandth.
4. The samples of an update go through the network together, in the rollout as in the update: the ratio starts at 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

import torch

from alignbench.flow import integrate_sde, log_normal, sde_step
from alignbench.method import AlignMethod, Loss, require

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow, Trajectory


class DanceGRPO(AlignMethod):
    """Sample a group, compare its members' rewards, and make the better ones' noisy moves more likely."""

    name: ClassVar[str] = "dancegrpo"
    steps: int = 16
    group: int = 12  # images per prompt, all from the same noise
    eta: float = 0.3  # noise of the SDE, on every step
    shift: float | None = 3.0  # of the training grid, t = shift u / (1 + (shift - 1) u); None: the model's own grid
    updates_per_rollout: int = 3  # each from its share of every group (released: 12 images, a step every 4)
    timestep_fraction: float = 0.6  # of the moves, drawn per sample
    clip: float = 1e-4  # of the ratio
    advantage_clip: float = 5.0

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.steps >= 2, "method.steps", "the last move is never trained", "choose 2 or more")
        require(self.group >= 2, "method.group", "a group of 1 has nothing to compare", "choose 2 or more")
        what = f"{batch} samples per micro-batch do not make whole groups of {self.group}"
        require(batch % self.group == 0, "method.group", what, f"choose a multiple of {self.group} for the batch")
        what = f"a group of {self.group} does not split into {self.updates_per_rollout} equal updates"
        parts = self.updates_per_rollout
        require(parts >= 1 and self.group % parts == 0, "method.updates_per_rollout", what, "choose a divisor")
        what = f"{self.timestep_fraction} of {self.steps - 1} moves is none or more than all"
        require(1 <= self.trained <= self.steps - 1, "method.timestep_fraction", what, "choose more than 0, at most 1")
        require(self.eta > 0, "method.eta", f"{self.eta} leaves no noise to learn from", "choose a positive number")

    @property
    def trained(self) -> int:
        """Moves trained per sample."""
        return int((self.steps - 1) * self.timestep_fraction)

    def grid(self, flow: Flow) -> Tensor:
        """(steps + 1,) sigmas, 1 -> 0."""
        if self.shift is None:
            return flow.sigmas(self.steps)
        u = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
        batch, t = batch.grouped(self.group), self.grid(flow)
        share = self.group // self.updates_per_rollout
        shares = torch.arange(len(batch)).view(-1, self.updates_per_rollout, share)  # (groups, updates, share)
        parts = [batch.select(shares[:, u].flatten()) for u in range(self.updates_per_rollout)]
        paths = [integrate_sde(flow, part, t, self.eta) for part in parts]
        with torch.no_grad():
            scores = [reward.value(reward(flow.decode(path.x_0), part.prompts)) for part, path in zip(parts, paths)]
        rewards = torch.stack([score.view(-1, share) for score in scores], 1)
        advantages = self.advantages(rewards.flatten(1)).view_as(rewards)
        for u, (part, path) in enumerate(zip(parts, paths)):
            yield self.losses(flow, part, path, t, advantages[:, u].flatten(), rewards.mean())

    def advantages(self, rewards: Tensor) -> Tensor:
        """(groups, group) rewards -> normalised within each group and clipped, in float64."""
        r = rewards.double() - rewards.double()[:, :1]
        a = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)
        return a.clamp(-self.advantage_clip, self.advantage_clip)

    def gain(self, advantage: Tensor, ratio: Tensor) -> Tensor:
        """(B,) clipped surrogate to maximise: once a ratio has moved far enough the good way, it has no gradient."""
        return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - self.clip, 1 + self.clip))

    def losses(
        self, flow: Flow, part: Batch, path: Trajectory, t: Tensor, advantage: Tensor, reward: Tensor
    ) -> Iterator[Loss]:
        """One loss per trained move; sample b's moves come in the order of its own permutation."""
        moves = self.steps - 1  # the last move ends at sigma 0, where its likelihood is far too sharp to learn from
        order = torch.stack([torch.randperm(moves, generator=rng) for rng in part.rngs])
        rows, advantage = torch.arange(len(part)), advantage.to(path.log_prob.dtype)
        for i in order.T[: self.trained]:
            at, to = t[i].to(part.noise), t[i + 1].to(part.noise)
            x, x_next = path.states[rows, i], path.states[rows, i + 1]
            mean, std = sde_step(x, flow.velocity(x, at, part.cond), at, to, self.eta)
            ratio = (log_normal(x_next, mean, std) - path.log_prob[rows, i]).exp()
            gain = self.gain(advantage, ratio)
            off = (ratio.detach() - 1).abs()
            clipped = (off > self.clip).double().mean()
            yield Loss(-gain.mean() / self.trained, {"reward": reward, "ratio_off": off.mean(), "clipped": clipped})

"""The common part of policy-gradient methods: groups, advantages, the clipped surrogate, the loss of one noisy move.

Sample a group of images of one prompt with noise in some moves of the sampler, compare their rewards, and make the
moves that led to better images more likely. A subclass says which moves are noisy and which of them are trained.

Letters: B samples of a micro-batch, N sampler steps, M rewards, b samples of one update. A move is one sampler step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch

from alignbench.flow import integrate_sde, log_normal, sde_step
from alignbench.method import AlignMethod, GatherBatch, Loss, require

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow, Trajectory


class Schedule(NamedTuple):
    """The grid and the noise with which one batch is sampled.

    - ``t``: (N + 1,) sigmas from 1 to 0.
    - ``noisy``: the moves that draw noise.
    - ``eta``: (N,) noise of each move per square root of time; 0 for a step of the plain sampler.
    """

    t: Tensor
    noisy: range
    eta: Tensor


class GroupRelative(AlignMethod):
    """GRPO on a flow: a policy gradient whose baseline is the mean reward of the images of the same prompt.

    Subclasses override ``noisy`` and ``moves``, and rarely ``unit``, ``rollout`` or ``gain``.
    """

    stochastic: ClassVar[bool] = True
    group: int = 12  # images per prompt
    same_noise: bool = True  # True: the images of a group start from the same noise
    sde: Literal["dance", "flow"] = "dance"  # noise per square root of time: eta, or eta sqrt(t / (1 - t))
    eta: float = 0.3
    shift: float | None = 3.0  # of the training grid, t = shift u / (1 + (shift - 1) u); None: the model's own grid
    updates_per_rollout: int = 1  # each from its share of every group
    std: Literal["group", "batch"] = "group"  # the rewards whose standard deviation is the unit of advantages
    aggregate: Literal["advantage", "reward"] = "advantage"  # several rewards: normalise, then sum; or sum first
    advantage_clip: float = 5.0
    clip: float = 1e-4  # range of the likelihood ratio: 1 - clip to 1 + clip
    beta: float = 0.0  # weight of the KL divergence from the base model; 0: the base model is never called

    def check(self, batch: int, differentiable: bool) -> None:
        """Raise UserError unless micro-batches are whole groups, groups split evenly, and there is noise to learn."""
        super().check(batch, differentiable)
        require(self.steps >= 2, "method.steps", "the last move is never trained", "choose 2 or more")
        require(self.group >= 2, "method.group", "a group of 1 has nothing to compare", "choose 2 or more")
        what = f"{batch} samples per micro-batch do not make whole groups of {self.group}"
        require(batch % self.group == 0, "method.group", what, f"choose micro-batches of a multiple of {self.group}")
        what = f"a group of {self.group} does not split into {self.updates_per_rollout} equal updates"
        parts = self.updates_per_rollout
        require(parts >= 1 and self.group % parts == 0, "method.updates_per_rollout", what, "choose a divisor")
        require(self.eta > 0, "method.eta", f"{self.eta} leaves no noise to learn from", "choose a positive number")
        require(self.shift is None or self.shift > 0, "method.shift", f"{self.shift} gives no grid from 1 to 0",
                "choose a positive number, or null")  # fmt: skip
        for field in ("clip", "advantage_clip"):
            value = getattr(self, field)
            require(value > 0, f"method.{field}", f"{value} leaves no gradient", "choose a positive number")
        what = f"{self.beta} would reward moving away from the base model"
        require(self.beta >= 0, "method.beta", what, "choose 0 or more")

    # ---- what a subclass chooses

    def noisy(self, batch: Batch) -> range:
        """Return the moves that draw noise; by default all but the last.

        The last one ends at sigma 0, where its likelihood is far too sharp to learn from.
        """
        return range(self.steps - 1)

    def moves(self, part: Batch, noisy: range) -> Tensor:
        """Return (k, B) moves to train: one loss per row, one move per sample in it. By default all noisy moves."""
        return torch.tensor(noisy)[:, None].expand(-1, len(part))

    def unit(self, rewards: Tensor) -> Tensor:
        """Return the unit of advantages: the standard deviation of ``rewards`` along the last dimension, kept as 1."""
        return rewards.std(-1, keepdim=True) + 1e-8

    def rollout(self, flow: Flow, part: Batch, schedule: Schedule) -> Trajectory:
        """Sample ``part``. Return states and likelihoods up to the last noisy move at least, and the final latents."""
        return integrate_sde(flow, part, schedule.t, schedule.eta)

    # ---- one batch

    def updates(
        self, flow: Flow, reward: Reward, batch: Batch
    ) -> Generator[Iterable[Loss] | GatherBatch, Tensor, None]:
        """Sample and score the groups once, then yield the losses of ``updates_per_rollout`` updates."""
        schedule = self.schedule(flow, batch)
        parts = self.parts(batch)
        paths = [self.rollout(flow, part, schedule) for part in parts]
        with torch.no_grad():
            scores = [reward(flow.decode(path.x_0), part.prompts) for part, path in zip(parts, paths)]
        rewards, weights = self.rewards(reward, scores)
        everyone = (yield from gather_rewards(rewards)) if self.std == "batch" else None
        advantages = self.advantages(rewards, weights, everyone).unflatten(1, (len(parts), -1))
        for u, (part, path) in enumerate(zip(parts, paths)):
            yield self.losses(flow, part, path, schedule, advantages[:, u].flatten())

    def schedule(self, flow: Flow, batch: Batch) -> Schedule:
        """Return grid, noisy moves and noise levels for ``batch``; moves that are not noisy have level 0."""
        t, noisy = self.grid(flow), self.noisy(batch)
        eta = torch.zeros(self.steps, dtype=torch.float64)
        eta[noisy.start : noisy.stop] = self.levels(t)[noisy.start : noisy.stop]
        return Schedule(t, noisy, eta)

    def grid(self, flow: Flow) -> Tensor:
        """Return the (N + 1,) sigmas of the training grid, from 1 to 0, shifted by ``shift``."""
        if self.shift is None:
            return flow.sigmas(self.steps)
        u = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def levels(self, t: Tensor) -> Tensor:
        """Return (N,) noise levels eta of the moves on the grid ``t``, as if all were noisy.

        Flow-SDE (arXiv 2505.05470) would be infinite at t = 1; there, 1 - t is taken from the next move.
        """
        at = t[:-1].double()
        if self.sde == "dance":
            return torch.full_like(at, self.eta)
        return self.eta * (at / (1 - torch.where(at < 1, at, at[1]))).sqrt()

    def parts(self, batch: Batch) -> list[Batch]:
        """Return the samples of each update: the same share of every group.

        They pass through the network together, in the rollout as in the update, so that the ratio starts at exactly 1.
        """
        grouped = batch.grouped(self.group)
        if not self.same_noise:
            grouped = dataclasses.replace(grouped, noise=batch.noise)
        shares = torch.arange(len(batch)).view(-1, self.updates_per_rollout, self.group // self.updates_per_rollout)
        return [grouped.select(shares[:, u].flatten()) for u in range(self.updates_per_rollout)]

    # ---- advantages

    def rewards(self, reward: Reward, scores: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (M, groups, group) rewards to normalise, and (M,) weights with which their advantages are summed.

        ``scores``: (M, b) scores of each update's samples. With ``aggregate`` "reward", M is 1 in both results.
        """
        weights = torch.tensor([term.weight for term in reward.terms], dtype=torch.float64)
        if self.aggregate == "reward":
            scores, weights = [reward.value(score)[None] for score in scores], torch.ones(1, dtype=torch.float64)
        share = self.group // self.updates_per_rollout
        return torch.stack([score.unflatten(1, (-1, share)) for score in scores], 2).flatten(2), weights

    def advantages(self, rewards: Tensor, weights: Tensor, everyone: Tensor | None = None) -> Tensor:
        """Return (groups, group) advantages: differences from the group's mean in units of ``unit``, summed, clipped.

        ``rewards``: (M, groups, group); ``weights``: (M,), for the sum over M. ``everyone``: (M, 1, B) rewards of the
        whole batch, if their deviation is the unit. Computed in float64 relative to the group's first reward, so that
        equal rewards give exactly zero; rounding in fp32 alone would give up to +-0.7.
        """
        r = rewards.double() - rewards.double()[..., :1]
        a = (r - r.mean(-1, keepdim=True)) / self.unit(r if everyone is None else everyone)
        total = (weights.to(a)[:, None, None] * a).sum(0)
        return total.clamp(-self.advantage_clip, self.advantage_clip)

    # ---- the objective

    def losses(
        self, flow: Flow, part: Batch, path: Trajectory, schedule: Schedule, advantage: Tensor
    ) -> Iterator[Loss]:
        """Yield one loss per row of ``moves``; their sum is a mean over samples and trained moves.

        ``path``: the rollout of ``part``; ``advantage``: (b,) advantages of its samples. Metrics: "ratio_off", the mean
        of |ratio - 1|; "clipped", the fraction of ratios outside the clip range; "kl", if ``beta`` is positive.
        """
        rows, advantage = torch.arange(len(part)), advantage.to(path.log_prob)
        moves = self.moves(part, schedule.noisy)
        for i in moves:
            at, to, eta = (s.to(part.noise) for s in (schedule.t[i], schedule.t[i + 1], schedule.eta[i]))
            x, x_next = path.states[rows, i], path.states[rows, i + 1]
            mean, std = sde_step(x, flow.velocity(x, at, part.cond), at, to, eta)
            ratio = (log_normal(x_next, mean, std) - path.log_prob[rows, i]).exp()
            loss = -self.gain(advantage, ratio)
            off = (ratio.detach() - 1).abs()
            metrics: dict[str, float | Tensor] = {
                "ratio_off": off.mean(),
                "clipped": (off > self.clip).double().mean(),
            }
            if self.beta > 0:
                with torch.no_grad():
                    base, _ = sde_step(x, flow.velocity(x, at, part.cond, reference=True), at, to, eta)
                kl = kl_divergence(mean, base, eta)
                loss = loss + self.beta * kl
                metrics["kl"] = kl.detach().mean()
            yield Loss(loss.mean() / len(moves), metrics)

    def gain(self, advantage: Tensor, ratio: Tensor) -> Tensor:
        """Return the (b,) clipped surrogate to maximise (PPO): no gradient once a ratio moved far the good way."""
        return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - self.clip, 1 + self.clip))


def gather_rewards(rewards: Tensor) -> Generator[GatherBatch, Tensor, Tensor]:
    """Gather (M, groups, group) rewards of this micro-batch; return (M, 1, B) of the whole batch, in float64."""
    rows = []
    for row in rewards.double():
        everyone = yield GatherBatch(row.flatten())
        rows.append(everyone)
    return torch.stack(rows)[:, None]


def kl_divergence(mean: Tensor, base: Tensor, eta: Tensor) -> Tensor:
    """Return the (B,) KL divergences of moves from the base model's, as in Flow-GRPO (arXiv 2505.05470).

    ``mean``, ``base``: (B, ...) means of the two moves. A mean over the latent's dimensions, with deviation eta in
    place of eta sqrt(h), where h is the length of the step; so this is h times the true divergence, per dimension.
    """
    return (mean - base).square().flatten(1).mean(1) / (2 * eta.square())

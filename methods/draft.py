"""BPTT, DRaFT-K, DRaFT-LV: differentiate all or the last steps of the sampler (Clark et al. 2024, arXiv 2309.17400).

These are the flow-matching forms of the LeapAlign paper (arXiv 2604.15311, appendix E). Departures from Clark et al.:
1. The sampler is the flow's deterministic Euler, not DDIM with 50 steps.
2. DRaFT-LV runs one backward per copy and adds the gradients: the same sum, with the memory of one network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from alignbench.flow import euler, integrate
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class DRaFTK(Pathwise):
    """Exact back-propagation through the last k steps of the sampler."""

    name: ClassVar[str] = "draft_k"
    title: ClassVar[str] = "DRaFT-K"
    paper: ClassVar[str] = "Clark et al. 2024, arXiv 2309.17400"
    k: int = 1

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"cannot back-propagate through {self.k} of {self.steps} steps"
        require(1 <= self.k <= self.steps, "method.k", what, f"choose 1 to {self.steps}")

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c = flow.sigmas(self.steps), batch.cond
        first = self.steps - self.k
        x = integrate(flow, batch.noise, t[: first + 1], c)
        x_0 = integrate(flow, x, t[first:], c, grad=True)
        return reward_loss(flow, reward, batch, x_0)


class BPTT(Pathwise):
    """Exact back-propagation through the whole sampler, recomputing each step to hold one at a time in memory."""

    name: ClassVar[str] = "bptt"
    title: ClassVar[str] = "Back-propagation through time"

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        x_0 = integrate(flow, batch.noise, flow.sigmas(self.steps), batch.cond, grad=True)
        return reward_loss(flow, reward, batch, x_0)


class DRaFTLV(Pathwise):
    """DRaFT-1 with lower variance: n re-noised copies of its image also pass through the last step."""

    name: ClassVar[str] = "draft_lv"
    title: ClassVar[str] = "DRaFT-LV"
    paper: ClassVar[str] = "Clark et al. 2024, arXiv 2309.17400"
    n: int = 2  # re-noised copies
    lv_reduction: Literal["sum", "mean"] = "sum"  # over the image and its copies; the paper sums

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        require(self.n >= 0, "method.n", f"{self.n} re-noised copies", "choose 0 or more")

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
        yield self.losses(flow, reward, batch)

    def losses(self, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Loss]:
        """Yield the sampled image's loss, then one per copy; the recorded reward is that of the sampled image."""
        t, c = flow.sigmas(self.steps), batch.cond
        scale = 1.0 if self.lv_reduction == "sum" else 1.0 / (self.n + 1)
        last = t[self.steps - 1]
        x = integrate(flow, batch.noise, t[: self.steps], c)
        x_0 = euler(x, flow.velocity(x, last, c), last, 0.0)
        yield reward_loss(flow, reward, batch, x_0, scale)
        x_0 = x_0.detach()
        for _ in range(self.n):
            x = (1 - last) * x_0 + last * batch.randn_like(x_0)
            copy_0 = euler(x, flow.velocity(x, last, c), last, 0.0)
            yield Loss(reward_loss(flow, reward, batch, copy_0, scale).value)

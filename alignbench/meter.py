"""Cost is measured, not declared: wrappers around the flow and the reward count what a method does."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alignbench.config import UserError
from alignbench.evaluator import Reward

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Cond, Flow
    from alignbench.prompts import Prompt


@dataclass
class Meter:
    """Running totals of one rank. Counts are per sample: a forward of B rows counts B."""

    nfe_forward: int = 0  # network forwards without gradient
    nfe_grad: int = 0  # network forwards that a backward can go through
    decodes: int = 0
    reward_calls: int = 0
    images: int = 0  # training images sampled
    seconds: float = 0.0  # of wall clock, in training batches alone
    peak_memory_bytes: int = 0  # of the accelerator; on a CPU, of the whole process

    def state_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def see_memory(self, device: torch.device) -> None:
        """Raise the recorded peak to what was used by now."""
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes on Linux
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)


class MeteredFlow:
    """A flow that counts. Everything but ``velocity`` and ``decode`` is the flow's own."""

    def __init__(self, flow: Flow, meter: Meter) -> None:
        self._flow, self._meter = flow, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        v = self._flow.velocity(x, sigma, cond, reference=reference)
        if v.requires_grad:
            self._meter.nfe_grad += len(x)
        else:
            self._meter.nfe_forward += len(x)
        return v

    def decode(self, x0: Tensor) -> Tensor:
        self._meter.decodes += len(x0)
        return self._flow.decode(x0)


class MeteredReward(Reward):
    """A reward that counts, and stops the run at the first score that is not a number."""

    def __init__(self, reward: Reward, meter: Meter) -> None:
        super().__init__(reward.evaluator, reward.margin)
        self._reward, self._meter = reward, meter

    def __call__(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        score = self._reward(pixels, prompts)
        self._meter.reward_calls += len(score)
        bad = [(p.id, s) for p, s in zip(prompts, score.tolist()) if not math.isfinite(s)]
        if bad:
            listed = ", ".join(f"{s} for prompt {name!r}" for name, s in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"the reward is not finite ({listed}{more}); lower optimizer.lr, or look at these images")
        return score

    def loss(self, score: Tensor) -> Tensor:
        return self._reward.loss(score)


def metered(flow: Flow, meter: Meter) -> Flow:
    """``flow``, counting into ``meter``: a method that is handed this cannot forget to."""
    return MeteredFlow(flow, meter)


def metered_reward(reward: Reward, meter: Meter) -> Reward:
    """``reward``, counting into ``meter`` and refusing scores that are not finite."""
    return MeteredReward(reward, meter)

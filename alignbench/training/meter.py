"""Costs, measured and not declared: wrappers around the flow and the reward count what a method does."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alignbench.config import UserError
from alignbench.evaluator import Reward
from alignbench.flow import counted, recomputing

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Cond, Flow
    from alignbench.prompts import Prompt

    Scores = list[tuple[Tensor, Tensor, Tensor]]


@dataclass
class Meter:
    """Running totals of one rank. Counts are per sample: a forward of B rows counts B.

    A velocity with classifier-free guidance in two branches is two forwards.
    """

    nfe_forward: int = 0  # network forwards without gradient
    nfe_grad: int = 0  # network forwards with gradient
    nfe_recomputed: int = 0  # forwards repeated in a backward to save memory: they take time, but are not NFE
    decodes: int = 0
    reward_calls: int = 0
    images: int = 0  # training images sampled
    seconds: float = 0.0  # of training batches alone: wall-clock time; on a CPU, the process's CPU time
    peak_memory_bytes: int = 0  # of the accelerator; on a CPU, of the whole process

    def state_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def update_peak_memory(self, device: torch.device) -> None:
        """Raise the recorded peak to that of the process so far."""
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes on Linux
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)


class Watch:
    """Diagnostics that every method's records get: rewards, closed hinges, and where on the path gradients arise."""

    def __init__(self) -> None:
        self.scores: Scores = []  # (M, B) scores, (B,) values, (M, B) closed, of a batch
        self.gradients: list[tuple[Tensor, Tensor]] = []  # sigma (B,), norm of dL/dv (B,), of an update
        self.hinged = False  # True once the method used the loss, and so the hinge; policy gradients do not
        self.backward = False  # True in the harness's backward, as opposed to gradients that a method takes itself

    def add_gradient(self, sigma: float | Tensor, gradient: Tensor) -> None:
        if self.backward:
            norms = gradient.detach().flatten(1).norm(dim=1)
            self.gradients.append((torch.as_tensor(sigma).to(norms).expand(len(norms)), norms))

    def gradient_sums(self) -> dict[str, float]:
        """Return the sum over samples of |dL/dv| for each fifth of the path, and clear the gradients."""
        sums = torch.zeros(FIFTHS, dtype=torch.float64)
        for sigma, norms in self.gradients:
            fifth = (sigma * FIFTHS - 1e-6).ceil().long().clamp(1, FIFTHS) - 1  # a rounded 0.6 belongs below
            sums.index_add_(0, fifth.cpu(), norms.double().cpu())
        self.gradients.clear()
        return dict(zip(GRAD_SHARES, sums.tolist(), strict=True))

    def reward_means(self, reward: Reward, parts: Scores | None = None) -> dict[str, float]:
        """Return statistics of all images scored in this batch so far; {} if there are none.

        ``parts``: the scores of all ranks, in order; None for one rank.
        """
        parts = self.scores if parts is None else parts
        if not parts:
            return {}
        scores, values, closed = (torch.cat(column, -1).double() for column in zip(*parts))
        means = {"reward_mean": values.mean().item()}
        hinged = self.hinged and any(term.margin is not None for term in reward.terms)
        if hinged:
            means |= {"hinge_closed": closed.mean().item(), "reward_std": values.std(correction=0).item()}
        if len(reward.terms) > 1:
            for term, score, shut in zip(reward.terms, scores, closed, strict=True):
                name = term.evaluator.name
                means[f"reward_{name}"] = score.mean().item()
                if hinged:
                    means[f"hinge_closed_{name}"] = shut.mean().item()
                    means[f"reward_std_{name}"] = score.std(correction=0).item()
        return means


FIFTHS = 5
GRAD_SHARES = tuple(f"grad_share_{i / FIFTHS:.1f}_{(i + 1) / FIFTHS:.1f}" for i in range(FIFTHS))  # by sigma


class MeteredFlow:
    """A flow that counts its calls. Everything but ``velocity`` and ``decode`` is passed through."""

    def __init__(self, flow: Flow, meter: Meter, watch: Watch) -> None:
        self._flow, self._meter, self._watch = flow, meter, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        v, evaluations = counted(self._flow.velocity, x, sigma, cond, reference=reference)
        for rows, grad in evaluations:
            if recomputing.get():
                self._meter.nfe_recomputed += rows
            elif grad:
                self._meter.nfe_grad += rows
            else:
                self._meter.nfe_forward += rows
        if v.requires_grad and not recomputing.get():
            v.register_hook(functools.partial(self._watch.add_gradient, sigma))
        return v

    def decode(self, x0: Tensor) -> Tensor:
        self._meter.decodes += len(x0)
        return self._flow.decode(x0)


class MeteredReward(Reward):
    """A reward that counts its calls, and raises UserError at the first score that is not finite."""

    def __init__(self, reward: Reward, meter: Meter, watch: Watch, slice_size: int | None) -> None:
        super().__init__(*reward.terms)
        self.slice_size = slice_size
        self._reward, self._meter, self._watch = reward, meter, watch

    def __call__(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = self._reward(pixels, prompts)
        self._meter.reward_calls += scores.shape[1]
        for term, row in zip(self.terms, scores.tolist(), strict=True):
            self._require_finite(term.evaluator.name, prompts, row)
        detached = scores.detach()
        self._watch.scores.append((detached.cpu(), self.value(detached).cpu(), self.hinge_closed(detached).cpu()))
        return scores

    def _require_finite(self, evaluator: str, prompts: Sequence[Prompt], row: list[float]) -> None:
        bad = [f"{s} for prompt {p.id!r}" for p, s in zip(prompts, row, strict=True) if not math.isfinite(s)]
        if bad:
            listed = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            what = f"the reward {evaluator} is not finite ({listed})"
            raise UserError(f"{what}; lower optimizer.lr, or look at these images")

    def loss(self, scores: Tensor) -> Tensor:
        self._watch.hinged = True
        return self._reward.loss(scores)


def metered(flow: Flow, meter: Meter, watch: Watch | None = None) -> Flow:
    """Return ``flow``, counting its calls in ``meter``."""
    return MeteredFlow(flow, meter, watch or Watch())


def metered_reward(reward: Reward, meter: Meter, watch: Watch | None = None, slice_size: int | None = None) -> Reward:
    """Return ``reward``, counting in ``meter`` and refusing non-finite scores; ``slice_size``: as in ``Reward``."""
    return MeteredReward(reward, meter, watch or Watch(), slice_size)

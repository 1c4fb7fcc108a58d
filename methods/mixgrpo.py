"""MixGRPO: noise and training only inside a window that slides along the sampler's steps (arXiv 2507.21802).

Defaults are the released FLUX.1-dev settings (finetune_flux_grpo_MixGRPO.sh). MixGRPO-Flash is ``compress: 0.4``, and
Flash* ``compress: 0.2`` with ``strategy: frozen``. Departures from the released code, beside DanceGRPO's:
1. Every window is whole and ends before the last move; after the last window it starts again at the noise. Released:
   the window shrinks at the end, to a single move. In the paper's 300 batches the window never comes that far.
2. The shortened rest has the paper's number of steps, on those sigmas of the grid that are nearest to even spacing.
   Released: one step fewer, on a new grid.
3. The strategies that shorten the window's stay as it moves on ("decay", "exp_decay") are left out. With the released
   constants "exp_decay" first differs from "progressive" at batch 373, beyond the paper's 300.
4. A step without noise draws no random numbers.
5. The window's noise is Flow-SDE, as in the paper's first versions; later ones use coefficients-preserving sampling.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from alignbench.flow import euler, integrate_sde, randint
from alignbench.method import require
from alignbench.policy import GroupRelative

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Batch, Cond, Flow, Trajectory
    from alignbench.policy import Schedule


class MixGRPO(GroupRelative):
    """GRPO with an SDE on the moves l, ..., l + window - 1, which are trained, and the ODE before and after."""

    name: ClassVar[str] = "mixgrpo"
    title: ClassVar[str] = "MixGRPO"
    paper: ClassVar[str] = "arXiv 2507.21802"
    sde: Literal["dance", "flow"] = "flow"
    eta: float = 0.7
    updates_per_rollout: int = 4
    window: int = 4  # moves
    strategy: Literal["progressive", "random", "frozen"] = "progressive"  # l advances, is drawn, or stays at the noise
    stride: int = 1  # progressive: number of moves by which l advances ...
    iters_per_window: int = 25  # ... after this many batches
    compress: float = 1.0  # below 1: DPM-Solver++ takes this share of the steps after the window

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"{self.window} moves are less than one, or more than the {self.steps - 1} before the last"
        require(1 <= self.window < self.steps, "method.window", what, f"choose 1 to {self.steps - 1}")
        for field in ("stride", "iters_per_window"):
            value = getattr(self, field)
            require(value >= 1, f"method.{field}", f"{value} never advances", "choose 1 or more, or strategy frozen")
        what = f"{self.compress} is not a share"
        require(0 < self.compress <= 1, "method.compress", what, "choose more than 0, at most 1")

    def noisy(self, batch: Batch) -> range:
        """Return the window: a function of the batch's number alone, or drawn."""
        last = self.steps - 1 - self.window
        if self.strategy == "random":
            first = randint(0, last, batch.step_rng)
        else:
            starts = range(0, last + 1, self.stride) if self.strategy == "progressive" else range(1)
            first = starts[batch.step // self.iters_per_window % len(starts)]
        return range(first, first + self.window)

    def rollout(self, flow: Flow, part: Batch, schedule: Schedule) -> Trajectory:
        if self.compress == 1:
            return super().rollout(flow, part, schedule)
        t, end = schedule.t, schedule.noisy.stop
        path = integrate_sde(flow, part, t[: end + 1], schedule.eta[:end])
        rest = thinned(t[end:], max(1, round((self.steps - end) * self.compress)))
        x_0 = dpm_solver(flow, path.states[:, -1], rest, part.cond, (t[end - 1], path.x_0))
        return dataclasses.replace(path, x_0=x_0)


def thinned(t: Tensor, steps: int) -> Tensor:
    """Return (steps + 1,) of the grid's sigmas, evenly spread over it, with both ends."""
    return t[torch.linspace(0, len(t) - 1, steps + 1, dtype=torch.float64).round().long()]


@torch.no_grad()
def dpm_solver(flow: Flow, x: Tensor, t: Tensor, cond: Cond, before: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Integrate from t[0] to t[-1] by DPM-Solver++(2M), arXiv 2211.01095; ``before``: an earlier (sigma, x0hat).

    x_next = x0hat + (t_next / t) (x - x0hat) is Euler's step. Here x0hat is first extrapolated by half a step in
    lambda = log((1 - t) / t), along the line through it and the previous one; but not in the step to t = 0, whose
    length in lambda is infinite.
    """
    for at, to in itertools.pairwise(t):
        predicted = x_0 = euler(x, flow.velocity(x, at, cond), at, 0.0)
        if before is not None and to > 0:
            h, h_before = torch.logit(at) - torch.logit(to), torch.logit(before[0]) - torch.logit(at)
            x_0 = predicted + h / h_before / 2 * (predicted - before[1])
        x, before = x_0 + to / at * (x - x_0), (at, predicted)
    return x

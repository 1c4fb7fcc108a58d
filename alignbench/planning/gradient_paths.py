"""The ticks of LeapAlign's table 1: gradient paths of direct-gradient methods, measured on an analytic flow.

    python -m alignbench.planning.gradient_paths table2 > reports/measured-table1.csv

The flow has one bias per sampler step; the gradient of a bias shows whether that step is trained, and how strongly.
"""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING

import torch
from msgspec.structs import replace

from alignbench.analytic import AffineFlow, QuadraticReward
from alignbench.experiment.document import read
from alignbench.experiment.plan import draft
from alignbench.method import AlignMethod, Pathwise, each_update
from alignbench.plugins import Registry
from alignbench.training.batches import make_batch

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Cond

DRAWS = 24  # batches, each with its own draw of the trained steps


class RecordingFlow(AffineFlow):
    """An affine flow that records the last sampler step taken.

    ``linked``: whether gradient flows into the network's input. ``field``: whether the velocity depends on the latent.
    """

    def __init__(self, steps: int, linked: bool = True, field: bool = True) -> None:
        super().__init__(steps)
        self.linked, self.last = linked, -1  # last: index of the latest step taken
        if not field:
            self.A = torch.zeros_like(self.A)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        t = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[0]
        self.last = max(self.last, int((self.grid[:-1] - t).abs().argmin()))
        return super().velocity(x if self.linked else x.detach(), sigma, cond, reference=reference)


def ticks(method: AlignMethod) -> dict[str, bool]:
    """Return the four columns of table 1, each true if it holds in any of DRAWS batches."""
    batches = [_ticks(method, step) for step in range(DRAWS)]
    return {name: any(batch[name] for batch in batches) for name in batches[0]}


def _ticks(method: AlignMethod, step: int) -> dict[str, bool]:
    flow, unlinked = RecordingFlow(method.steps), RecordingFlow(method.steps, linked=False)
    gradient = _gradient(method, flow, step)
    trained = gradient.abs().sum(1).nonzero().flatten().tolist()
    return {
        "Early Steps": min(trained) < method.steps / 2,
        "Nested Gradient": not torch.allclose(gradient, _gradient(method, unlinked, step)),
        "Leap Trajectory": _leaps(method, step, [i for i in trained if i < flow.last]),
        "Multi-Step": len(trained) > 1,
    }


def _leaps(method: AlignMethod, step: int, trained: list[int]) -> bool:
    """Return whether any trained step but the last moves the image by something other than its own length.

    In a field that does not depend on the latent, a bias moves the image in proportion to the length of its step:
    that of the sampler, unless the step leaps over some of those that follow. Lengths are known only up to the weight
    of the sample, so a single trained step cannot show a leap. The last step taken may jump straight to the image.
    """
    flow = RecordingFlow(method.steps, field=False)
    carried = _gradient(method, flow, step)[trained] / (flow.grid[:-1] - flow.grid[1:])[trained, None]
    return not torch.allclose(carried, carried[:1].expand_as(carried))


def _gradient(method: AlignMethod, flow: RecordingFlow, step: int) -> Tensor:
    """Return the gradient of the biases, (steps, dim), from one sample of batch ``step``."""
    for losses in each_update(method, flow, QuadraticReward(), make_batch(flow, [0], step)):
        for loss in losses:
            loss.value.backward()
    return flow.bias.grad if flow.bias.grad is not None else torch.zeros_like(flow.bias)


def main() -> None:
    """Print the ticks of a sweep's trained direct-gradient rows, in the format of the published tables."""
    if len(sys.argv) != 2:
        sys.exit("python -m alignbench.planning.gradient_paths SWEEP: name one sweep, as table2")
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    write(["method", "metric", "value", "se"])
    for cell in draft(read(sys.argv[1]), Registry()).cells:
        if isinstance(cell.method, Pathwise):
            for name, holds in ticks(replace(cell.method)).items():
                write([cell.spec.label, name, "yes" if holds else "no", ""])


if __name__ == "__main__":
    main()

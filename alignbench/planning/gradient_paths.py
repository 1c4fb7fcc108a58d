"""What a direct-gradient method's gradient does, measured on an analytic flow: the ticks of LeapAlign's table 1.

    python -m alignbench.planning.gradient_paths table2 > reports/measured-table1.csv

The flow has one bias per sampler step, whose gradient says whether, and how far, that step is trained.
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


class Seen(AffineFlow):
    """``linked``: does gradient flow into the network's input? ``field``: does the velocity depend on the latent?"""

    def __init__(self, steps: int, linked: bool = True, field: bool = True) -> None:
        super().__init__(steps)
        self.linked, self.last = linked, -1  # last: the latest step that was made
        if not field:
            self.A = torch.zeros_like(self.A)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        t = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[0]
        self.last = max(self.last, int((self.grid[:-1] - t).abs().argmin()))
        return super().velocity(x if self.linked else x.detach(), sigma, cond, reference=reference)


def ticks(method: AlignMethod) -> dict[str, bool]:
    """The four columns of table 1, each true if it is so in any of DRAWS batches."""
    found = [_ticks(method, step) for step in range(DRAWS)]
    return {name: any(each[name] for each in found) for name in found[0]}


def _ticks(method: AlignMethod, step: int) -> dict[str, bool]:
    flow = Seen(method.steps)
    gradient = _gradient(method, flow, step)
    trained = gradient.abs().sum(1).nonzero().flatten().tolist()
    return {
        "Early Steps": min(trained) < method.steps / 2,
        "Nested Gradient": not torch.allclose(gradient, _gradient(method, Seen(method.steps, linked=False), step)),
        "Leap Trajectory": _leaps(method, step, [i for i in trained if i < flow.last]),
        "Multi-Step": len(trained) > 1,
    }


def _leaps(method: AlignMethod, step: int, trained: list[int]) -> bool:
    """Do steps that others follow move the image by anything but their own length?

    In a field that does not depend on the latent, a bias reaches the image in proportion to how far its step carries
    it: the sampler's own length, unless the step leaps over some of those that follow. Lengths are known up to the
    weight of the sample, so that a single trained step cannot show it. The last step made may reach for the image.
    """
    flow = Seen(method.steps, field=False)
    carried = _gradient(method, flow, step)[trained] / (flow.grid[:-1] - flow.grid[1:])[trained, None]
    return not torch.allclose(carried, carried[:1].expand_as(carried))


def _gradient(method: AlignMethod, flow: Seen, step: int) -> Tensor:
    """(steps, dim): of the biases, by one sample of batch ``step``."""
    for losses in each_update(method, flow, QuadraticReward(), make_batch(flow, [0], step)):
        for loss in losses:
            loss.value.backward()
    return flow.bias.grad if flow.bias.grad is not None else torch.zeros_like(flow.bias)


def main() -> None:
    """The trained direct-gradient rows of a sweep, as the published tables are written."""
    if len(sys.argv) != 2:
        sys.exit("python -m alignbench.planning.gradient_paths SWEEP: name one sweep, as table2")
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    write(["method", "metric", "value", "se"])
    for cell in draft(read(sys.argv[1]), Registry()).cells:
        if isinstance(cell.method, Pathwise):
            for name, is_so in ticks(replace(cell.method)).items():
                write([cell.spec.label, name, "yes" if is_so else "no", ""])


if __name__ == "__main__":
    main()

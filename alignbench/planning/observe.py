"""A method watched on a toy flow: how many network calls it makes, and how many graphs it keeps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from msgspec.structs import replace

from alignbench.config import settings
from alignbench.digests import content_id

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.experiment.spec import Training
    from alignbench.flow import Cond, Flow
    from alignbench.method import AlignMethod

RUNS = 24  # batches at most that a method is watched for: the mean of what is drawn per batch is then known to 3 %
Negative = Literal["full", "stop"] | None  # gradient of the second branch of classifier-free guidance; None: no branch


class Usage(NamedTuple):
    """Per training image, as the meter counts."""

    forward: float  # network evaluations without gradient ...
    grad: float  # ... with it ...
    recomputed: float  # ... and those made a second time for a backward
    decodes: float
    decodes_grad: float  # of the decodes, those with gradient
    rewards: float  # images that all rewards together look at
    live: float  # evaluations whose graphs are kept at once, at most
    reference: float  # evaluations of the base model
    decoded: float  # images decoded at once with gradient, at most
    backwards: float  # backward passes of one update, at most


def not_estimable(error: Exception) -> str:
    """Why a method is not estimated: whatever a plug-in's code raises on a flow that is no pipeline's."""
    return f"its method does not run on the toy flow ({type(error).__name__}: {error})"


class Watched(NamedTuple):
    """A method's first batches, or all of them if they are few."""

    usage: list[Usage]
    updates: list[int]

    @property
    def mean(self) -> Usage:
        columns = list(zip(*self.usage))
        means = Usage(*(sum(column) / len(column) for column in columns))
        most = {name: max(getattr(usage, name) for usage in self.usage) for name in ("live", "decoded", "backwards")}
        return means._replace(**most)

    def batches(self, training: Training, per_image: float) -> int:
        """How many the budget lasts. ``per_image``: seconds."""
        budget, batch = training.budget, training.batch
        if budget.updates:
            return self._until(budget.updates, self.updates)
        if budget.nfe:
            return self._until(budget.nfe, [batch * (usage.forward + usage.grad) for usage in self.usage])
        images = budget.images or (budget.gpu_seconds or 0) / per_image
        return -(-int(images) // batch)

    def made(self, batches: int) -> float:
        """Updates in so many batches."""
        return batches * sum(self.updates) / len(self.updates)

    def _until(self, budget: float, spent: Sequence[float]) -> int:
        """Batches until ``budget`` is spent, where the n-th spends ``spent[n]``, and later ones the mean."""
        total = 0.0
        for n, cost in enumerate(spent, 1):
            total += cost
            if total >= budget:
                return n
        mean = total / len(spent)
        return len(spent) + int(-(-(budget - total) // mean))


@functools.cache
def _kept() -> dict[str, Watched]:
    return {}


def watch_once(method: AlignMethod, training: Training, terms: int, negative: Negative = None) -> Watched:
    """As ``watch``, for as many batches as the budget can last; remembered for runs that differ in nothing it sees."""
    parts = {key: getattr(training, key) for key in ("budget", "batch", "micro_batch", "reward_slice")}
    key = content_id([settings(method), parts, terms, negative])
    if key not in _kept():
        method = replace(method)  # which may remember what it sees
        first = watch(method, training, terms, range(1), negative)
        count = first.batches(training, 1.0) if not training.budget.gpu_seconds else RUNS
        rest = watch(method, training, terms, range(1, min(RUNS, count)), negative)
        _kept()[key] = Watched(first.usage + rest.usage, first.updates + rest.updates)
    return _kept()[key]


def watch(method: AlignMethod, training: Training, terms: int, steps: range, negative: Negative) -> Watched:
    """Batches of training, of each one micro-batch, with a toy of three numbers a picture in the model's place.

    ``negative``: the toy is guided in two branches, with this gradient of the second.
    """
    import torch

    from alignbench.analytic import PROMPTS, GaussianFlow, Quadratic
    from alignbench.evaluator import Reward, Term
    from alignbench.method import each_update
    from alignbench.training.batches import draw_batch
    from alignbench.training.meter import Meter, metered, metered_reward

    size = min(training.micro_batch or training.batch, training.batch)
    found = Watched([], [])
    for step in steps:
        flow, meter = Probe(GaussianFlow(), negative), Meter()
        toys = [Term(Quadratic()) for _ in range(terms)]
        reward = metered_reward(Reward(*toys), meter, slice_size=training.reward_slice)
        batch = draw_batch(flow, PROMPTS, training, step, range(size), torch.device("cpu"))
        updates = backwards = 0
        for losses in each_update(method, metered(flow, meter), reward, batch):
            updates, passes = updates + 1, 0
            for loss in losses:
                loss.value.backward()
                passes += 1
                del loss
            backwards = max(backwards, passes)
        counts = (meter.nfe_forward, meter.nfe_grad, meter.nfe_recomputed, meter.decodes)
        live = max(0, flow.peak - meter.nfe_recomputed)  # of those that are made again, nothing is kept before
        totals = (*counts, flow.decodes_grad, meter.reward_calls, live, flow.reference, flow.decoded, backwards)
        found.usage.append(Usage(*(n / size for n in totals)))
        found.updates.append(updates)
    return found


class Probe:
    """A flow that sees how many evaluations' graphs are alive at once, in samples."""

    def __init__(self, flow: Flow, negative: Negative) -> None:
        self._flow, self._negative = flow, negative
        self.alive = self.peak = self.decodes_grad = self.decoded = self.reference = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        from alignbench.flow import guided

        def evaluate() -> Tensor:
            v = self._flow.velocity(x, sigma, cond, reference=reference)
            self.reference += len(x) * reference
            return _mark(v, Graph(self, len(x))) if v.requires_grad else v

        if self._negative is None:
            return evaluate()
        return guided(evaluate, evaluate, 1.0, "full" if reference else self._negative)

    def decode(self, x0: Tensor) -> Tensor:
        import torch

        rows = len(x0) * (x0.requires_grad and torch.is_grad_enabled())
        self.decodes_grad, self.decoded = self.decodes_grad + rows, max(self.decoded, rows)
        return self._flow.decode(x0)


class Graph:
    """What is kept of one evaluation, until a backward went through it or nobody can any more."""

    def __init__(self, probe: Probe, rows: int) -> None:
        self.probe, self.rows = probe, rows
        probe.alive += rows
        probe.peak = max(probe.peak, probe.alive)

    def free(self) -> None:
        self.probe.alive -= self.rows
        self.rows = 0

    __del__ = free


def _mark(v: Tensor, graph: Graph) -> Tensor:
    """``v``, whose node of autograd's graph owns ``graph``."""
    import torch

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.graph = graph
            return v.view_as(v)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            ctx.graph.free()
            return gradient

    return Mark.apply(v)

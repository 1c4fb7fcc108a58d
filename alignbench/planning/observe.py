"""Network calls and autograd graphs of a method, counted by running it on a toy flow.

How often a method calls the network is not declared anywhere: its own code runs on an analytic flow, with the random
draws of real training, and is counted. Plug-in methods are therefore estimated exactly as built-in ones are.
"""

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

MAX_BATCHES = 24  # batches that a method is observed for, at most: enough to know the mean of a random draw to 3 %
NegativeGradient = Literal["full", "stop"] | None  # of the second branch of classifier-free guidance; None: no branch


class Usage(NamedTuple):
    """Counts per training image, as the meter takes them."""

    forward: float  # network evaluations without gradient
    grad: float  # network evaluations with gradient
    recomputed: float  # network evaluations repeated for a backward pass
    decodes: float
    decodes_grad: float  # decodes with gradient, included in ``decodes``
    rewards: float  # images scored, summed over all rewards
    live: float  # maximum number of evaluations whose graphs are alive at once
    reference: float  # evaluations of the base model
    decoded: float  # maximum number of images decoded at once with gradient
    backwards: float  # maximum number of backward passes in one update


def not_estimable(error: Exception) -> str:
    """Return why a method cannot be estimated, given what its code raised on the toy flow."""
    return f"its method does not run on the toy flow ({type(error).__name__}: {error})"


def negative_gradient(backend: Any) -> NegativeGradient:
    """Return how the gradient of the second guidance branch is treated; None if training has no second branch."""
    return backend.negative_gradient if backend.branches(backend.guidance) == 2 else None


class Observation(NamedTuple):
    """Counts of a method's first batches, or of all its batches if there are few. One list entry per batch."""

    usage: list[Usage]
    updates: list[int]

    @property
    def mean(self) -> Usage:
        """Mean over the batches; the maximum where ``Usage`` holds a maximum."""
        columns = list(zip(*self.usage))
        means = Usage(*(sum(column) / len(column) for column in columns))
        maxima = {name: max(getattr(usage, name) for usage in self.usage) for name in ("live", "decoded", "backwards")}
        return means._replace(**maxima)

    def batches(self, training: Training, seconds_per_image: float) -> int:
        """Return the number of batches until the budget is spent."""
        budget, batch = training.budget, training.batch
        if budget.updates:
            return self._until(budget.updates, self.updates)
        if budget.nfe:
            return self._until(budget.nfe, [batch * (usage.forward + usage.grad) for usage in self.usage])
        images = budget.images or (budget.gpu_seconds or 0) / seconds_per_image
        return -(-int(images) // batch)

    def updates_in(self, batches: int) -> float:
        """Return the expected number of updates in that many batches."""
        return batches * sum(self.updates) / len(self.updates)

    def _until(self, budget: float, costs: Sequence[float]) -> int:
        """Return the number of batches until ``budget`` is spent: batch n costs ``costs[n]``, later ones the mean."""
        total = 0.0
        for n, cost in enumerate(costs, 1):
            total += cost
            if total >= budget:
                return n
        mean = total / len(costs)
        return len(costs) + int(-(-(budget - total) // mean))


@functools.cache
def _cache() -> dict[str, Observation]:
    return {}


def observe_cached(
    method: AlignMethod, training: Training, terms: int, negative: NegativeGradient = None
) -> Observation:
    """Observe as many batches as the budget can last; runs that agree in all relevant settings share the result."""
    fields = {key: getattr(training, key) for key in ("budget", "batch", "micro_batch", "reward_slice")}
    key = content_id([settings(method), fields, terms, negative])
    if key not in _cache():
        method = replace(method)  # a fresh copy, since methods may keep state
        first = observe(method, training, terms, range(1), negative)
        count = first.batches(training, 1.0) if not training.budget.gpu_seconds else MAX_BATCHES
        rest = observe(method, training, terms, range(1, min(MAX_BATCHES, count)), negative)
        _cache()[key] = Observation(first.usage + rest.usage, first.updates + rest.updates)
    return _cache()[key]


def observe(
    method: AlignMethod, training: Training, terms: int, steps: range, negative: NegativeGradient
) -> Observation:
    """Train on the batches ``steps``, one micro-batch each, with a toy model of three numbers per image, and count.

    ``terms``: number of rewards. ``negative``: if given, the toy model is guided with two branches, and this is the
    gradient of the second.
    """
    import torch

    from alignbench.analytic import PROMPTS, GaussianFlow, Quadratic
    from alignbench.evaluator import Reward, Term
    from alignbench.method import each_update
    from alignbench.training.batches import draw_batch
    from alignbench.training.meter import Meter, metered, metered_reward

    size = min(training.micro_batch or training.batch, training.batch)
    observation = Observation([], [])
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
        live = max(0, flow.peak - meter.nfe_recomputed)  # a recomputed evaluation keeps no graph until its backward
        totals = (*counts, flow.decodes_grad, meter.reward_calls, live, flow.reference, flow.decoded, backwards)
        observation.usage.append(Usage(*(n / size for n in totals)))
        observation.updates.append(updates)
    return observation


class Probe:
    """Wrapper of a flow that counts, in samples, the evaluations whose graphs are alive at once."""

    def __init__(self, flow: Flow, negative: NegativeGradient) -> None:
        self._flow, self._negative = flow, negative
        self.alive = self.peak = self.decodes_grad = self.decoded = self.reference = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        from alignbench.flow import guided

        def evaluate() -> Tensor:
            v = self._flow.velocity(x, sigma, cond, reference=reference)
            self.reference += len(x) * reference
            return _attach(v, LiveGraph(self, len(x))) if v.requires_grad else v

        if self._negative is None:
            return evaluate()
        return guided(evaluate, evaluate, 1.0, "full" if reference else self._negative)

    def decode(self, x0: Tensor) -> Tensor:
        import torch

        rows = len(x0) * (x0.requires_grad and torch.is_grad_enabled())
        self.decodes_grad, self.decoded = self.decodes_grad + rows, max(self.decoded, rows)
        return self._flow.decode(x0)


class LiveGraph:
    """The graph of one evaluation, alive until a backward pass has used it or its last reference is gone."""

    def __init__(self, probe: Probe, rows: int) -> None:
        self.probe, self.rows = probe, rows
        probe.alive += rows
        probe.peak = max(probe.peak, probe.alive)

    def free(self) -> None:
        self.probe.alive -= self.rows
        self.rows = 0

    __del__ = free


def _attach(v: Tensor, graph: LiveGraph) -> Tensor:
    """Return ``v`` with an autograd node that owns ``graph`` and frees it in its backward."""
    import torch

    class Attach(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.graph = graph
            return v.view_as(v)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            ctx.graph.free()
            return gradient

    return Attach.apply(v)

"""What a sweep will cost before it is started: network evaluations measured on a toy, the rest by arithmetic.

How often a method calls the network is not declared anywhere: its own code is run once on an analytic flow, with the
draws that training will make, and counted. So plug-in methods are estimated as the built-in ones are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from alignbench.config import UserError, settings
from alignbench.cost import GPU, Model
from alignbench.prompts import load_prompts
from alignbench.promptsets import SETS
from alignbench.spec import content_id

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.evaluator import Evaluator
    from alignbench.flow import Cond, Flow
    from alignbench.method import AlignMethod
    from alignbench.plugins import Registry
    from alignbench.spec import Evaluation, Training
    from alignbench.sweep import Cell

RUNS = 24  # batches at most that a method is watched for: the mean of what is drawn per batch is then known to 3 %
TOY = 100e6  # bytes: an evaluator of less is no published one, and takes no time worth a plan
PNG = 2.0  # bytes per pixel of a photograph; drawings take less
HOUR = 3600.0
Negative = Literal["full", "stop"] | None  # gradient of the second branch of classifier-free guidance; None: no branch


class Estimate(NamedTuple):
    """Of one run. Hours are of one GPU, the rest bytes. ``usage``: of training; None where nothing is trained."""

    images: int = 0  # training images
    usage: Usage | None = None
    train: float = 0.0  # hours
    generate: float = 0.0
    score: float = 0.0
    memory: float = 0.0  # peak, of training or of sampling
    weights: int = 0  # of the trained weights' files, milestones and all, their headers left out
    state: int = 0  # of the checkpoints that are there while it trains
    pictures: float = 0.0
    unknown: str = ""  # why there is no estimate of it


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


def estimate(cell: Cell, evaluation: Evaluation, registry: Registry, gpu: GPU) -> Estimate:
    """What a run will cost on one ``gpu``. Needs no file; those of the model that are there are looked at."""
    backend = registry.make("backend", cell.spec.backend, "backend")
    model: Model | None = getattr(backend, "measures", None)
    if model is None:
        return Estimate(unknown=f"the measures of backend {cell.spec.backend['name']} are not known")
    method = registry.make("method", cell.spec.method, "method")
    plan = Pieces(cell, evaluation, backend, model, gpu, registry)
    found = plan.sampled()
    return plan.trained(found, method) if method.trains else found


class Pieces(NamedTuple):
    """What an estimate is put together from."""

    cell: Cell
    evaluation: Evaluation
    backend: Any
    model: Model
    gpu: GPU
    registry: Registry

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return getattr(self.gpu, self.backend.dtype) * 1e12

    @property
    def itemsize(self) -> int:
        return 2 if self.backend.dtype == "bfloat16" else 4

    @property
    def frozen(self) -> float:
        """Bytes of text encoders and autoencoder."""
        return self.model.frozen * self.itemsize

    def sampled(self) -> Estimate:
        """Evaluation: pictures made and scored."""
        protocol, model = self.cell.protocol, self.model
        tokens = model.tokens(protocol.size, self.backend.text_tokens)
        images = prompt_count(protocol.prompts, self.evaluation.limit) * protocol.images_per_prompt
        steps = protocol.steps * self.backend.branches(protocol.guidance)
        flops = steps * model.transformer.forward(tokens) + model.decoder.forward(protocol.size)
        flops += model.encode(tokens.text) / protocol.images_per_prompt
        judges = [self.registry.make("evaluator", plain, "evaluator") for plain in self.evaluation.evaluators]
        memory = self.frozen + model.transformer.parameters * self.itemsize
        return Estimate(
            generate=images * flops / self.rate / HOUR,
            score=images * sum(map(seconds, judges)) / HOUR,
            memory=memory + model.transformer.block(tokens, self.itemsize),
            pictures=images * protocol.size**2 * PNG,
        )

    @property
    def share_at_milestones(self) -> float:
        """Of the evaluation's pictures: how many are made at a milestone."""
        name, fewer = self.cell.protocol.prompts, self.evaluation.at_milestones
        return prompt_count(name, fewer.limit) / prompt_count(name, self.evaluation.limit)

    def trained(self, found: Estimate, method: AlignMethod) -> Estimate:
        """``found``, and training."""
        training, terms = self.cell.spec.training, len(self.cell.spec.rewards)
        try:
            watched = watch_once(method, training, terms, self.cell.spec.method["name"], self.negative)
        except Exception as error:  # whatever a plug-in's code raises on a flow that is no pipeline's
            return Estimate(unknown=f"its method does not run on the toy flow ({type(error).__name__}: {error})")
        per_image = self.seconds_per_image(watched.mean)
        batches, usage = watched.batches(training, per_image), watched.mean
        trained, memory = self.trained_parameters, self.memory(usage)
        copies = 1 if training.optimizer.ema is None else 2
        reached = sum(update <= watched.made(batches) for update in training.milestones)
        sets = 1 + reached * self.share_at_milestones
        return found._replace(
            generate=found.generate * sets,
            score=found.score * sets,
            pictures=found.pictures * sets,
            images=training.batch * batches,
            usage=usage,
            train=training.batch * batches * per_image / HOUR,
            memory=max(found.memory, memory),
            weights=4 * trained * copies * (1 + reached),
            state=4 * trained * (copies + 2) * training.keep,
        )

    @property
    def negative(self) -> Negative:
        """What becomes of the gradient of a second branch, if training has one."""
        return self.backend.negative_gradient if self.backend.branches(self.backend.guidance) == 2 else None

    @property
    def trained_parameters(self) -> int:
        backend, transformer = self.backend, self.model.transformer
        full = backend.tune == "full"
        return transformer.parameters if full else transformer.adapters(backend.lora_targets, backend.lora_rank)

    def seconds_per_image(self, usage: Usage) -> float:
        """Of training."""
        backend, model = self.backend, self.model
        tokens = model.tokens(backend.size, backend.text_tokens)
        again = 1 if backend.gradient_checkpointing else 0
        forward = model.transformer.forward(tokens)
        with_gradient = (1 + again) * forward + model.transformer.backward(tokens, backend.tune == "full")
        flops = (usage.forward + usage.recomputed) * forward + usage.grad * with_gradient
        flops += (usage.decodes + (1 + again) * usage.decodes_grad) * model.decoder.forward(backend.size)
        flops += model.encode(tokens.text)
        rewards = [
            self.registry.make("evaluator", part["evaluator"], "reward.evaluator") for part in self.cell.spec.rewards
        ]
        backward = 3 if usage.decodes_grad else 1
        return flops / self.rate + usage.rewards * backward * sum(map(seconds, rewards)) / len(rewards)

    def memory(self, usage: Usage) -> float:
        """Bytes at the peak of training: weights, gradients, AdamW, average, base model, and what autograd keeps."""
        backend, training, model = self.backend, self.cell.spec.training, self.model
        tokens, item = model.tokens(backend.size, backend.text_tokens), self.itemsize
        network, trained = model.transformer.parameters, self.trained_parameters
        total = self.frozen + 4 * trained * (4 + (training.optimizer.ema is not None and not training.ema_on_host))
        if backend.tune == "lora":
            total += network * item
        else:
            total += network * 2 * (item == 2)  # autocast's copies of the weights
            total += network * item * (training.drift_every is not None or usage.reference > 0)  # the base model
        size = min(training.micro_batch or training.batch, training.batch)
        kept = usage.live * model.transformer.kept(tokens, item, backend.gradient_checkpointing)
        kept += model.transformer.block(tokens, item)
        kept += usage.decoded * model.decoder.kept(backend.size, item, backend.gradient_checkpointing)
        return total + size * kept


def prompt_count(name: str, limit: int | None) -> int:
    """How many prompts a list has, also if its file is not there yet."""
    try:
        count = len(load_prompts(name))
    except UserError:
        if name not in SETS:
            raise
        count = SETS[name].size
    return min(count, limit or count)


def seconds(evaluator: Evaluator) -> float:
    """Of one GPU for one picture: what the class says of the published weights, nothing for a toy's."""
    try:
        files = evaluator.files()
        small = sum(path.stat().st_size for path in files) < TOY
    except (UserError, OSError):  # not there yet: the published ones
        small = False
    return 0.0 if small else evaluator.seconds_per_image or 0.0


# -- how often a method calls the network ------------------------------------------------------------------------------


class Watched(NamedTuple):
    """A method's first batches, or all of them if they are few."""

    usage: list[Usage]
    updates: list[int]

    @property
    def mean(self) -> Usage:
        columns = list(zip(*self.usage))
        means = Usage(*(sum(column) / len(column) for column in columns))
        most = {name: max(getattr(usage, name) for usage in self.usage) for name in ("live", "decoded")}
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


def watch_once(method: AlignMethod, training: Training, terms: int, name: str, negative: Negative = None) -> Watched:
    """As ``watch``, for as many batches as the budget can last; remembered for runs that differ in their seed alone."""
    key = content_id([name, settings(method), settings(training) | {"seed": 0}, terms, negative])
    if key not in _kept():
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

    from alignbench.evaluator import Reward, Term
    from alignbench.meter import Meter, metered, metered_reward
    from alignbench.testing import PROMPTS, GaussianFlow, Quadratic, each_update
    from alignbench.train import draw_batch

    size = min(training.micro_batch or training.batch, training.batch)
    found = Watched([], [])
    for step in steps:
        flow, meter = Probe(GaussianFlow(), negative), Meter()
        toys = [Term(Quadratic()) for _ in range(terms)]
        reward = metered_reward(Reward(*toys), meter, at_once=training.reward_slice)
        batch = draw_batch(flow, PROMPTS, training, step, range(size), torch.device("cpu"))
        updates = 0
        for losses in each_update(method, metered(flow, meter), reward, batch):
            updates += 1
            for loss in losses:
                loss.value.backward()
                del loss
        counts = (meter.nfe_forward, meter.nfe_grad, meter.nfe_recomputed, meter.decodes)
        live = max(0, flow.peak - meter.nfe_recomputed)  # of those that are made again, nothing is kept before
        totals = (*counts, flow.decodes_grad, meter.reward_calls, live, flow.reference, flow.decoded)
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

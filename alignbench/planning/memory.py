"""An estimate of the memory that training takes on a GPU, part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from alignbench.backends.cost.counted import count_model
from alignbench.backends.cost.formulas import Model
from alignbench.config import UserError
from alignbench.experiment.ids import build

if TYPE_CHECKING:
    from alignbench.evaluator import Evaluator
    from alignbench.experiment.ids import Parts
    from alignbench.experiment.spec import RunSpec, Training
    from alignbench.plugins import Registry
from alignbench.planning.observe import Negative, Usage, not_estimable, watch_once

TOY = 100e6  # bytes: an evaluator of less is no published one, and takes no time worth a plan
ITEM = {"bfloat16": 2, "float32": 4}  # bytes
WEIGHTS = {"float32": (4, 0), "master": (2, 4), "stochastic": (2, 0)}  # bytes: the network's, and its master
MOMENTS = {"float32": 8.0, "8bit": 2 + 8 / 256}  # bytes of both, of a weight; in 8 bits with a scale per block
MEMORY_ERROR = 0.1  # of the peak of training: what was measured on one H200 is within 3 %, the rest was never measured


class Memory(NamedTuple):
    """Of one GPU that trains, in bytes and by part. ``graphs``, ``work``: per image of the micro-batch of ``size``.

    With FSDP, of what is kept in parts the GPU's own.
    """

    frozen: float  # text encoders and autoencoder, and under LoRA the network
    trained: float  # weights, of the network and the optimizer, and gradients
    optimizer: float  # AdamW's moments
    average: float
    base: float  # the untrained model, where adapters cannot be switched off to get it
    casts: float  # autocast's copies of trained weights; with FSDP the whole network, gathered
    rewards: float  # their weights; what autograd keeps of them is less than the decoder's, and not counted
    graphs: float  # of the evaluations that wait for a backward at once
    work: float  # beside them: the block or the decoder that is at work
    update: float  # what AdamW takes beside what is fixed, less what is free while it works
    size: int

    @property
    def fixed(self) -> float:
        """What does not grow with the micro-batch."""
        return sum(self[:7])

    @property
    def image(self) -> float:
        return self.graphs + self.work

    @property
    def peak(self) -> float:
        """In a backward, or in AdamW's update."""
        return self.fixed + max(self.size * self.image, self.update)

    def largest(self, room: float) -> int:
        """Images of the largest micro-batch whose peak is within ``room``; 0: none."""
        if self._replace(size=0).peak > room:
            return 0
        return int((room - self.fixed) // self.image)


def measures(backend: Any) -> Any:
    """Return a ``cost.Model``, or what torch counts in its place (``counted``). UserError if neither is known."""
    found = getattr(backend, "cost_model", None) or count_model(backend)
    if found is None:
        raise UserError(f"the measures of backend {backend.name} are not known")
    return found


def training_memory(spec: RunSpec, registry: Registry, ranks: int = 1, parallel: str = "ddp") -> Memory:
    """Of each of ``ranks`` that train with DDP or FSDP. UserError if it is not known, or nothing is trained."""
    parts = build(spec, registry)
    backend, method = parts.backend, parts.method
    try:
        model = measures(backend)
    except UserError as error:
        raise UserError(f"{spec.label}: no estimate: {error}") from None
    if not method.trains:
        raise UserError(f"{spec.label}: no estimate: it trains nothing")
    share = replace(spec.training, batch=max(1, spec.training.batch // ranks))
    try:
        usage = watch_once(method, share, len(parts.rewards), negative(backend)).mean
    except Exception as error:
        raise UserError(f"{spec.label}: no estimate: {not_estimable(error)}") from error
    found = memory(share, parts, model, usage)
    return in_parts(found, backend, model, ranks) if parallel == "fsdp" and ranks > 1 else found


def memory(training: Training, parts: Parts, model: Model, usage: Usage) -> Memory:
    """What one GPU holds at the peak of training, from what the method keeps (``usage``)."""
    backend = parts.backend
    tune_all, item = backend.tune == "full", ITEM[backend.dtype]
    optimizer, size = training.optimizer, min(training.micro_batch or training.batch, training.batch)
    tokens, checkpointing = model.tokens(backend.size, backend.text_tokens), backend.gradient_checkpointing
    network, trained = model.transformer.parameters, trained_parameters(backend, model)
    compared = training.drift_every is not None or usage.reference > 0
    decoder = usage.decoded * model.decoder.activation_bytes(backend.size, item, checkpointing)
    alone = optimizer.weights == "stochastic"
    once = size == training.batch and round(usage.backwards * size) <= 1
    casts = network * 2 * (tune_all and item == 2 and optimizer.weights == "float32")
    whole_at_once = not alone and optimizer.moments == "float32"  # else one tensor at a time
    return Memory(
        frozen=(model.frozen + network * (not tune_all)) * item,
        trained=trained * (sum(WEIGHTS[optimizer.weights]) + (2 if alone and once else 4)),
        optimizer=trained * MOMENTS[optimizer.moments],
        average=4 * trained * (optimizer.ema is not None and not training.ema_on_host),
        base=network * item * (tune_all and compared),
        casts=casts,
        rewards=sum(held(term.evaluator) for term in parts.rewards),
        graphs=usage.live * model.transformer.activation_bytes(tokens, item, checkpointing),
        work=max(model.transformer.block_bytes(tokens, item), decoder),
        update=4 * trained * whole_at_once - casts,
        size=size,
    )


def in_parts(whole: Memory, backend: Any, model: Model, ranks: int) -> Memory:
    """Of each of ``ranks`` that share by FSDP what one GPU would have whole: weights gathered in the type of the
    computation until the update (``shards``), everything else of the networks, with gradients and moments, in parts.
    """
    network = model.transformer.parameters * ITEM[backend.dtype]
    kept = 0.0 if backend.tune == "full" else network
    return whole._replace(
        frozen=whole.frozen - kept + kept / ranks,
        trained=whole.trained / ranks,
        optimizer=whole.optimizer / ranks,
        average=whole.average / ranks,
        base=whole.base / ranks,
        casts=network,
        update=(whole.update + whole.casts) / ranks,
    )


def trained_parameters(backend: Any, model: Model) -> int:
    transformer = model.transformer
    full = backend.tune == "full"
    return transformer.parameters if full else transformer.adapters(backend.lora_targets, backend.lora_rank)


def negative(backend: Any) -> Negative:
    """What becomes of the gradient of a second branch, if training has one."""
    return backend.negative_gradient if backend.branches(backend.guidance) == 2 else None


def seconds(evaluator: Evaluator) -> float:
    """Of one GPU for one picture: what the class says of the published weights, nothing for a toy's."""
    return 0.0 if _weights(evaluator) is not None else evaluator.seconds_per_image or 0.0


def held(evaluator: Evaluator) -> float:
    """Bytes of its weights on a GPU: what the class says of the published ones, a toy's files."""
    toy = _weights(evaluator)
    return toy if toy is not None else 1e9 * (evaluator.gigabytes or 0.0)


def _weights(evaluator: Evaluator) -> float | None:
    """Bytes of a toy's files; None for published ones, there or not."""
    try:
        found = sum(path.stat().st_size for path in evaluator.files())
    except (UserError, OSError):
        return None
    return found if found < TOY else None

"""An estimate of the GPU memory that training takes, part by part.

Sizes come from the arithmetic of ``backends.cost``; what a method keeps alive comes from ``observe``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from alignbench.backends.cost.counted import count_model
from alignbench.backends.cost.formulas import Model
from alignbench.config import UserError
from alignbench.experiment.ids import build
from alignbench.planning.observe import Usage, negative_gradient, not_estimable, observe_cached

if TYPE_CHECKING:
    from alignbench.evaluator import Evaluator
    from alignbench.experiment.ids import Parts
    from alignbench.experiment.spec import RunSpec, Training
    from alignbench.plugins import Registry

TOY_BYTES = 100e6  # an evaluator with smaller files is a toy, not a published one, and takes no noticeable time
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
WEIGHT_BYTES = {"float32": (4, 0), "master": (2, 4), "stochastic": (2, 0)}  # per weight: network, and master copy
MOMENT_BYTES = {"float32": 8.0, "8bit": 2 + 8 / 256}  # per weight, both moments; in 8 bits with a scale per block
MEMORY_ERROR = 0.1  # of the training peak: within 3 % of what was measured on one H200; the rest was never measured


class Memory(NamedTuple):
    """Memory of one training GPU in bytes, by part; with FSDP, this GPU's shards of what is sharded.

    ``graphs`` and ``work`` are per image of the micro-batch, which has ``size`` images.
    """

    frozen: float  # text encoders and autoencoder, and under LoRA the network
    trained: float  # weights of the network and the optimizer, and gradients
    optimizer: float  # AdamW's moments
    ema: float
    base: float  # copy of the untrained model, where switching adapters off does not restore it
    casts: float  # autocast's copies of trained weights; with FSDP the whole network, gathered
    rewards: float  # their weights; their activations are smaller than the decoder's and not counted
    graphs: float  # autograd graphs alive at once
    work: float  # beside the graphs: the block or the decoder whose backward is running
    update: float  # AdamW's workspace beside ``fixed``, less what is free during the update
    size: int

    @property
    def fixed(self) -> float:
        """The part that does not grow with the micro-batch."""
        return sum(self[:7])

    @property
    def per_image(self) -> float:
        return self.graphs + self.work

    @property
    def peak(self) -> float:
        """The peak, either in a backward or in AdamW's update."""
        return self.fixed + max(self.size * self.per_image, self.update)

    def largest_micro_batch(self, room: float) -> int:
        """Return the size of the largest micro-batch whose peak is within ``room`` bytes; 0 if none is."""
        if self._replace(size=0).peak > room:
            return 0
        return int((room - self.fixed) // self.per_image)


def cost_model(backend: Any) -> Any:
    """Return the backend's ``cost.Model``, else what torch counts in its place. Raise UserError if neither is known."""
    model = getattr(backend, "cost_model", None) or count_model(backend)
    if model is None:
        raise UserError(f"the measures of backend {backend.name} are not known")
    return model


def training_memory(spec: RunSpec, registry: Registry, ranks: int = 1, parallel: str = "ddp") -> Memory:
    """Return the memory of each of ``ranks`` GPUs that train with DDP or FSDP.

    Raise UserError if it cannot be estimated, or if nothing is trained.
    """
    parts = build(spec, registry)
    backend, method = parts.backend, parts.method
    try:
        model = cost_model(backend)
    except UserError as error:
        raise UserError(f"{spec.label}: no estimate: {error}") from None
    if not method.trains:
        raise UserError(f"{spec.label}: no estimate: it trains nothing")
    share = replace(spec.training, batch=max(1, spec.training.batch // ranks))
    try:
        usage = observe_cached(method, share, len(parts.rewards), negative_gradient(backend)).mean
    except Exception as error:
        raise UserError(f"{spec.label}: no estimate: {not_estimable(error)}") from error
    memory = estimate_memory(share, parts, model, usage)
    return shard(memory, backend, model, ranks) if parallel == "fsdp" and ranks > 1 else memory


def estimate_memory(training: Training, parts: Parts, model: Model, usage: Usage) -> Memory:
    """Return what one GPU holds at the peak of training, given what the method keeps alive (``usage``)."""
    backend = parts.backend
    tune_all, item = backend.tune == "full", ITEM_BYTES[backend.dtype]
    optimizer, size = training.optimizer, min(training.micro_batch or training.batch, training.batch)
    tokens, checkpointing = model.tokens(backend.size, backend.text_tokens), backend.gradient_checkpointing
    network, trained = model.transformer.parameters, trained_parameters(backend, model)
    needs_base = training.drift_every is not None or usage.reference > 0
    decoder = usage.decoded * model.decoder.activation_bytes(backend.size, item, checkpointing)
    stochastic = optimizer.weights == "stochastic"
    single_backward = size == training.batch and round(usage.backwards * size) <= 1
    casts = network * 2 * (tune_all and item == 2 and optimizer.weights == "float32")
    all_tensors_at_once = not stochastic and optimizer.moments == "float32"  # else one tensor at a time
    return Memory(
        frozen=(model.frozen + network * (not tune_all)) * item,
        trained=trained * (sum(WEIGHT_BYTES[optimizer.weights]) + (2 if stochastic and single_backward else 4)),
        optimizer=trained * MOMENT_BYTES[optimizer.moments],
        ema=4 * trained * (optimizer.ema is not None and not training.ema_on_host),
        base=network * item * (tune_all and needs_base),
        casts=casts,
        rewards=sum(weight_bytes(term.evaluator) for term in parts.rewards),
        graphs=usage.live * model.transformer.activation_bytes(tokens, item, checkpointing),
        work=max(model.transformer.block_bytes(tokens, item), decoder),
        update=4 * trained * all_tensors_at_once - casts,
        size=size,
    )


def shard(whole: Memory, backend: Any, model: Model, ranks: int) -> Memory:
    """Return the memory of each of ``ranks`` GPUs under FSDP, given that of a single GPU.

    Weights are gathered in the compute dtype until the update; everything else of the network is sharded, with
    gradients, moments and EMA.
    """
    network = model.transformer.parameters * ITEM_BYTES[backend.dtype]
    frozen_network = 0.0 if backend.tune == "full" else network
    return whole._replace(
        frozen=whole.frozen - frozen_network + frozen_network / ranks,
        trained=whole.trained / ranks,
        optimizer=whole.optimizer / ranks,
        ema=whole.ema / ranks,
        base=whole.base / ranks,
        casts=network,
        update=(whole.update + whole.casts) / ranks,
    )


def trained_parameters(backend: Any, model: Model) -> int:
    """Return the number of trained parameters: all of the transformer's, or its LoRA adapters'."""
    transformer = model.transformer
    full = backend.tune == "full"
    return transformer.parameters if full else transformer.adapters(backend.lora_targets, backend.lora_rank)


def weight_bytes(evaluator: Evaluator) -> float:
    """Return the bytes of an evaluator's weights on a GPU: of a toy its files, else what its class declares."""
    toy = toy_bytes(evaluator)
    return toy if toy is not None else 1e9 * (evaluator.gigabytes or 0.0)


def toy_bytes(evaluator: Evaluator) -> float | None:
    """Return the bytes of a toy evaluator's files; None for published weights, present or not."""
    try:
        total = sum(path.stat().st_size for path in evaluator.files())
    except (UserError, OSError):
        return None
    return total if total < TOY_BYTES else None

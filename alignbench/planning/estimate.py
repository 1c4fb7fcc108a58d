"""The cost of a run before it starts: GPU-hours, memory and disk.

Network evaluations are counted on a toy flow (``observe``); the rest is arithmetic on the model's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.backends.cost.formulas import GPU, Model
from alignbench.config import UserError
from alignbench.planning.memory import (
    ITEM_BYTES,
    MOMENT_BYTES,
    WEIGHT_BYTES,
    cost_model,
    estimate_memory,
    toy_bytes,
    trained_parameters,
)
from alignbench.planning.observe import Usage, negative_gradient, not_estimable, observe_cached
from alignbench.prompts import evaluation_prompts
from alignbench.prompts.public import SETS

if TYPE_CHECKING:
    from alignbench.evaluator import Evaluator
    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.spec import Evaluation

PNG = 2.0  # bytes per pixel of a photograph; drawings take less
HOUR = 3600.0


class CostEstimate(NamedTuple):
    """The estimated cost of one run: hours of one GPU, sizes in bytes."""

    images: int = 0  # training images
    usage: Usage | None = None  # of training; None if nothing is trained
    train: float = 0.0  # hours
    generate: float = 0.0  # hours
    score: float = 0.0  # hours
    memory: float = 0.0  # peak of training or sampling, whichever is larger
    weights: int = 0  # files of the trained weights, with milestones, without their headers
    state: int = 0  # checkpoints kept while it trains
    image_files: float = 0.0
    unknown: str = ""  # why the run cannot be estimated


def estimate(cell: PlannedRun, evaluation: Evaluation, evaluators: Sequence[Evaluator], gpu: GPU) -> CostEstimate:
    """Return the cost of a run on one ``gpu``. No file is required; the model's are read where they are present.

    ``evaluators``: those of the evaluation, already built.
    """
    try:
        model = cost_model(cell.backend)
    except UserError as error:
        return CostEstimate(unknown=str(error))
    estimator = Estimator(cell, evaluation, evaluators, model, gpu)
    evaluated = estimator.evaluation_cost()
    return estimator.add_training(evaluated) if cell.method.trains else evaluated


class Estimator(NamedTuple):
    """The inputs of an estimate, and its arithmetic."""

    cell: PlannedRun
    evaluation: Evaluation
    evaluators: Sequence[Evaluator]
    model: Model
    gpu: GPU

    @property
    def backend(self) -> Any:
        return self.cell.backend

    @property
    def rate(self) -> float:
        """Speed of the GPU in FLOP/s, in the backend's dtype."""
        return getattr(self.gpu, self.backend.dtype) * 1e12

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.backend.dtype]

    @property
    def frozen(self) -> float:
        """Size of text encoders and autoencoder in bytes."""
        return self.model.frozen * self.itemsize

    def evaluation_cost(self) -> CostEstimate:
        """Return the cost of generating and scoring the evaluation's images."""
        protocol, model = self.cell.protocol, self.model
        tokens = model.tokens(protocol.size, self.backend.text_tokens)
        images = prompt_count(protocol.prompts, self.evaluation.limit) * protocol.images_per_prompt
        steps = protocol.steps * self.backend.branches(protocol.guidance)
        flops = steps * model.transformer.forward(tokens) + model.decoder.forward(protocol.size)
        flops += model.encode(tokens.text) / protocol.images_per_prompt
        memory = self.frozen + model.transformer.parameters * self.itemsize
        return CostEstimate(
            generate=images * flops / self.rate / HOUR,
            score=images * sum(map(scoring_seconds, self.evaluators)) / HOUR,
            memory=memory + model.transformer.block_bytes(tokens, self.itemsize),
            image_files=images * protocol.size**2 * PNG,
        )

    @property
    def share_at_milestones(self) -> float:
        """Fraction of the evaluation's images that are generated at each milestone."""
        name, at_milestones = self.cell.protocol.prompts, self.evaluation.at_milestones
        return prompt_count(name, at_milestones.limit) / prompt_count(name, self.evaluation.limit)

    def add_training(self, evaluated: CostEstimate) -> CostEstimate:
        """Return the cost of the whole run, given that of evaluating its final weights."""
        training, rewards = self.cell.spec.training, self.cell.rewards
        try:
            observation = observe_cached(self.cell.method, training, len(rewards), negative_gradient(self.backend))
        except Exception as error:
            return CostEstimate(unknown=not_estimable(error))
        seconds = self.training_seconds(observation.mean)
        batches, usage = observation.batches(training, seconds), observation.mean
        trained = trained_parameters(self.backend, self.model)
        memory = estimate_memory(training, self.cell.parts, self.model, usage)
        network, master = WEIGHT_BYTES[training.optimizer.weights]
        kept, ema = master or network, 4 * (training.optimizer.ema is not None)
        reached = sum(update <= observation.updates_in(batches) for update in training.milestones)
        image_sets = 1 + reached * self.share_at_milestones
        return evaluated._replace(
            generate=evaluated.generate * image_sets,
            score=evaluated.score * image_sets,
            image_files=evaluated.image_files * image_sets,
            images=training.batch * batches,
            usage=usage,
            train=training.batch * batches * seconds / HOUR,
            memory=max(evaluated.memory, memory.peak),
            weights=trained * (kept + ema) * (1 + reached),
            state=int(trained * (kept + ema + MOMENT_BYTES[training.optimizer.moments])) * training.keep,
        )

    def training_seconds(self, usage: Usage) -> float:
        """Return the seconds of training per image."""
        backend, model = self.backend, self.model
        tokens = model.tokens(backend.size, backend.text_tokens)
        recomputed = 1 if backend.gradient_checkpointing else 0
        forward = model.transformer.forward(tokens)
        with_gradient = (1 + recomputed) * forward + model.transformer.backward(tokens, backend.tune == "full")
        flops = (usage.forward + usage.recomputed) * forward + usage.grad * with_gradient
        flops += (usage.decodes + (1 + recomputed) * usage.decodes_grad) * model.decoder.forward(backend.size)
        flops += model.encode(tokens.text)
        rewards = [scoring_seconds(term.evaluator) for term in self.cell.rewards]
        backward = 3 if usage.decodes_grad else 1
        return flops / self.rate + usage.rewards * backward * sum(rewards) / len(rewards)


def prompt_count(name: str, limit: int | None) -> int:
    """Return how many different prompts a list has, at most ``limit``; for a public set, even before it is fetched."""
    try:
        count = len(evaluation_prompts(name))
    except UserError:
        if name not in SETS:
            raise
        count = SETS[name].size
    return min(count, limit or count)


def scoring_seconds(evaluator: Evaluator) -> float:
    """Return the seconds of one GPU per image, as the evaluator's class declares them; 0 for toy weights."""
    return 0.0 if toy_bytes(evaluator) is not None else evaluator.seconds_per_image or 0.0

"""What a sweep will cost before it is started: network evaluations measured on a toy, the rest by arithmetic.

How often a method calls the network is not declared anywhere: its own code is run once on an analytic flow, with the
draws that training will make, and counted. So plug-in methods are estimated as the built-in ones are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.backends.cost.formulas import GPU, Model
from alignbench.config import UserError
from alignbench.prompts import load_prompts
from alignbench.prompts.public import SETS

if TYPE_CHECKING:
    from alignbench.evaluator import Evaluator
    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.spec import Evaluation
from alignbench.planning.memory import ITEM, MOMENTS, WEIGHTS, measures, memory, negative, seconds, trained_parameters
from alignbench.planning.observe import Usage, not_estimable, watch_once

PNG = 2.0  # bytes per pixel of a photograph; drawings take less
HOUR = 3600.0


class CostEstimate(NamedTuple):
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


def estimate(cell: PlannedRun, evaluation: Evaluation, evaluators: Sequence[Evaluator], gpu: GPU) -> CostEstimate:
    """What a run will cost on one ``gpu``. Needs no file; those of the model that are there are looked at.

    ``evaluators``: those of the evaluation, built.
    """
    try:
        model = measures(cell.backend)
    except UserError as error:
        return CostEstimate(unknown=str(error))
    plan = Pieces(cell, evaluation, evaluators, model, gpu)
    found = plan.sampled()
    return plan.trained(found) if cell.method.trains else found


class Pieces(NamedTuple):
    """What an estimate is put together from."""

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
        """FLOP/s."""
        return getattr(self.gpu, self.backend.dtype) * 1e12

    @property
    def itemsize(self) -> int:
        return ITEM[self.backend.dtype]

    @property
    def frozen(self) -> float:
        """Bytes of text encoders and autoencoder."""
        return self.model.frozen * self.itemsize

    def sampled(self) -> CostEstimate:
        """Evaluation: pictures made and scored."""
        protocol, model = self.cell.protocol, self.model
        tokens = model.tokens(protocol.size, self.backend.text_tokens)
        images = prompt_count(protocol.prompts, self.evaluation.limit) * protocol.images_per_prompt
        steps = protocol.steps * self.backend.branches(protocol.guidance)
        flops = steps * model.transformer.forward(tokens) + model.decoder.forward(protocol.size)
        flops += model.encode(tokens.text) / protocol.images_per_prompt
        memory = self.frozen + model.transformer.parameters * self.itemsize
        return CostEstimate(
            generate=images * flops / self.rate / HOUR,
            score=images * sum(map(seconds, self.evaluators)) / HOUR,
            memory=memory + model.transformer.block_bytes(tokens, self.itemsize),
            pictures=images * protocol.size**2 * PNG,
        )

    @property
    def share_at_milestones(self) -> float:
        """Of the evaluation's pictures: how many are made at a milestone."""
        name, fewer = self.cell.protocol.prompts, self.evaluation.at_milestones
        return prompt_count(name, fewer.limit) / prompt_count(name, self.evaluation.limit)

    def trained(self, found: CostEstimate) -> CostEstimate:
        """``found``, and training."""
        training, rewards = self.cell.spec.training, self.cell.rewards
        try:
            watched = watch_once(self.cell.method, training, len(rewards), negative(self.backend))
        except Exception as error:
            return CostEstimate(unknown=not_estimable(error))
        per_image = self.seconds_per_image(watched.mean)
        batches, usage = watched.batches(training, per_image), watched.mean
        trained = trained_parameters(self.backend, self.model)
        held_at_once = memory(training, self.cell.parts, self.model, usage)
        network, held = WEIGHTS[training.optimizer.weights]
        last, average = held or network, 4 * (training.optimizer.ema is not None)
        reached = sum(update <= watched.made(batches) for update in training.milestones)
        sets = 1 + reached * self.share_at_milestones
        return found._replace(
            generate=found.generate * sets,
            score=found.score * sets,
            pictures=found.pictures * sets,
            images=training.batch * batches,
            usage=usage,
            train=training.batch * batches * per_image / HOUR,
            memory=max(found.memory, held_at_once.peak),
            weights=trained * (last + average) * (1 + reached),
            state=int(trained * (last + average + MOMENTS[training.optimizer.moments])) * training.keep,
        )

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
        rewards = [seconds(term.evaluator) for term in self.cell.rewards]
        backward = 3 if usage.decodes_grad else 1
        return flops / self.rate + usage.rewards * backward * sum(rewards) / len(rewards)


def prompt_count(name: str, limit: int | None) -> int:
    """How many prompts a list has, also if its file is not there yet."""
    try:
        count = len(load_prompts(name))
    except UserError:
        if name not in SETS:
            raise
        count = SETS[name].size
    return min(count, limit or count)

"""Checks of a sweep that need the files of models and prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignbench import prompts as prompt_lists
from alignbench.config import (
    UserError,
)
from alignbench.experiment import margins
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.spec import (
    Evaluation,
    Training,
    check_weights,
)
from alignbench.prompts import Prompt


def load(name: str, where: str) -> list[Prompt]:
    """A prompt list, or UserError with the place that names it."""
    return prompt_lists.load_prompts(name, where)


def check_settings(cell: PlannedRun, where: str) -> None:
    """Raise UserError for settings that cannot work, as a batch without whole groups, a reward without gradient."""
    method, training = cell.method, cell.spec.training
    if not method.trains:
        return
    differentiable = all(term.evaluator.differentiable for term in cell.rewards)
    for size in _micro_batches(training):
        prefixed(where, method.check, size, differentiable)
    check_weights(training.optimizer, cell.spec.backend, where)


def check_run(cell: PlannedRun, where: str) -> None:
    """Raise UserError for what fails before a model is loaded: weights, prompts, a model that has no score."""
    backend, method = cell.parts[:2]
    prefixed(where, backend.files)
    prefixed(where, method.files)
    if not method.trains:
        return
    if method.stochastic and (why := getattr(backend, "deterministic", None)):
        raise UserError(
            f"{where}: method.name: {method.name} samples by an SDE, and {why}; "
            "choose a model that is not distilled, or a method that follows the ODE"
        )
    prompts = load(cell.spec.prompts, f"{where}: prompts")
    _check_prompts(cell.spec.prompts, prompts, backend)
    for evaluator, margin, _ in cell.rewards:
        prefixed(where, evaluator.files)
        prefixed(where, evaluator.check, prompts)
        if why := margins.impossible(margin, evaluator.reward_range):
            raise UserError(f"{where}: reward.margin: {evaluator.name}: {why}")


def check_evaluation(cell: PlannedRun, evaluation: Evaluation, where: str) -> None:
    """Raise UserError for what would fail when a run's images are made."""
    protocol, training = cell.protocol, cell.spec.training
    if protocol.tuned_steps is not None and protocol.tuned_steps > protocol.steps:
        raise UserError(
            f"{where}: {cell.spec.label}: evaluation.protocol.tuned_steps: {protocol.tuned_steps} are more than "
            f"the sampler's {protocol.steps} steps; choose 1 to {protocol.steps}"
        )
    if cell.trains and protocol.weights == "ema" and training.optimizer.ema is None:
        raise UserError(
            f"{where}: evaluation.protocol.weights: 'ema', but {cell.spec.label} keeps no average "
            "(training.optimizer.ema is off); choose last"
        )
    if hasattr(cell.backend, "check_size"):
        cell.backend.check_size(protocol.size, f"{where}: evaluation.protocol.size")
    prompts = load(protocol.prompts, f"{where}: evaluation.protocol.prompts")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        what = f"{protocol.prompts} repeats prompts, whose pictures would count more than once"
        raise UserError(f"{where}: evaluation.protocol.prompts: {what}; choose a list for evaluation")
    _check_prompts(protocol.prompts, prompts[: evaluation.limit], cell.backend)


def prefixed(where: str, check: Callable[..., Any], *arguments: Any) -> None:
    """Run ``check``; put ``where`` before what its UserError says."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _micro_batches(training: Training) -> set[int]:
    """Sizes of the micro-batches on one rank."""
    size = min(training.micro_batch or training.batch, training.batch)
    return {size, training.batch % size or size}


def _check_prompts(name: str, prompts: list[Prompt], backend: Any) -> None:
    """The model can read every prompt: by its own rule, and its text encoders' tokenizers can spell it."""
    if hasattr(backend, "check_prompts"):
        backend.check_prompts(prompts, str(prompt_lists.locate(name, "prompts")))
    files = [path for path in backend.files() if path.name == "tokenizer.json"]
    prompt_lists.check_vocabulary(prompts, name, files)

"""Checks of a planned run: its settings, then what needs the files of models and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignbench import prompts as prompt_lists
from alignbench.config import Missing, UserError
from alignbench.experiment import margins
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.spec import (
    Evaluation,
    Training,
    check_weight_dtype,
)
from alignbench.plugins import blamed
from alignbench.prompts import Prompt, evaluation_prompts, load_prompts


def check_settings(cell: PlannedRun, where: str) -> None:
    """Raise UserError for settings that cannot work: a batch that is not whole groups, a reward without gradient."""
    method, training = cell.method, cell.spec.training
    if not method.trains:
        return
    differentiable = all(term.evaluator.differentiable for term in cell.rewards)
    for size in _micro_batches(training):
        run_check(where, method.check, size, differentiable)
    check_weight_dtype(training.optimizer, cell.spec.backend, where)


def check_run(cell: PlannedRun, where: str) -> None:
    """Raise UserError if weights are missing, prompts cannot be used, or method, model and reward do not fit."""
    backend, method = cell.parts[:2]
    run_check(where, backend.files)
    run_check(where, method.files)
    if not method.trains:
        return
    if method.stochastic and (why := getattr(backend, "deterministic", None)):
        raise UserError(
            f"{where}: method.name: {method.name} samples by an SDE, and {why}; "
            "choose a model that is not distilled, or a method that follows the ODE"
        )
    prompts = load_prompts(cell.spec.prompts, f"{where}: prompts")
    _check_prompts(cell.spec.prompts, prompts, backend)
    for evaluator, margin, _ in cell.rewards:
        run_check(where, evaluator.files)
        run_check(where, evaluator.check, prompts)
        if why := margins.never_opens(margin, evaluator.reward_range):
            raise UserError(f"{where}: reward.margin: {evaluator.name}: {why}")


def check_evaluation(cell: PlannedRun, evaluation: Evaluation, where: str) -> None:
    """Raise UserError for anything that would fail when a run's images are generated."""
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
    prompts = evaluation_prompts(protocol.prompts, f"{where}: evaluation.protocol.prompts")
    _check_prompts(protocol.prompts, prompts[: evaluation.limit], cell.backend)


def repeated_prompts(cell: PlannedRun) -> Iterator[str]:
    """Yield how many prompts of a run's lists repeat earlier ones."""
    lists = {"evaluation.protocol.prompts": (cell.protocol.prompts, "evaluation uses each once")}
    if cell.trains and cell.spec.prompts not in prompt_lists.GENERATED:
        lists["prompts"] = (cell.spec.prompts, "training draws them as often as they are listed")
    for key, (name, use) in lists.items():
        all_of_it, distinct = load_prompts(name), evaluation_prompts(name)
        if count := len(all_of_it) - len(distinct):
            yield f"{key}: {count} of {len(all_of_it)} prompts of {name} repeat an earlier one; {use}"


def cut_prompts(cell: PlannedRun, evaluation: Sequence[Prompt]) -> Iterator[str]:
    """Yield how many prompts of a run are longer than a text encoder of its model reads."""
    lists = {cell.protocol.prompts: evaluation}
    if cell.trains:
        lists[cell.spec.prompts] = load_prompts(cell.spec.prompts)
    limits = cell.backend.text_limits() if hasattr(cell.backend, "text_limits") else {}
    for name, prompts in lists.items():
        for encoder, limit in limits.items():
            if cut := prompt_lists.longer_than(limit, prompts, cell.backend.folder / encoder):
                what = f"{len(cut)} of {len(prompts)} prompts of {name} are longer than the {limit} tokens of {encoder}"
                yield f"backend: {what}; the model does not read their ends; the first is '{cut[0].text[:60]}...'"


def run_check(where: str, check: Callable[..., Any], *arguments: Any) -> None:
    """Call ``check``; prefix its UserError with ``where``. What a plug-in's own code raises is one, too."""
    with blamed(check, where):
        try:
            check(*arguments)
        except Missing as error:
            raise Missing(f"{where}: {error}", error.requirement) from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _micro_batches(training: Training) -> set[int]:
    """Return the sizes of the micro-batches on one rank."""
    size = min(training.micro_batch or training.batch, training.batch)
    return {size, training.batch % size or size}


def _check_prompts(name: str, prompts: list[Prompt], backend: Any) -> None:
    """Raise UserError unless the backend accepts every prompt, and its tokenizers have tokens for all of it."""
    if hasattr(backend, "check_prompts"):
        backend.check_prompts(prompts, str(prompt_lists.locate(name, "prompts")))
    files = [path for path in backend.files() if path.name == "tokenizer.json"]
    prompt_lists.check_vocabulary(prompts, name, files)

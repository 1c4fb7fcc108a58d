"""THE training loop: batches in, one record per optimizer update out. It knows no method by name.

Batch t is drawn from (seed, t, sample) alone: the same prompts and noise for every method, micro-batch size, device
and number of ranks, and a resumed run needs no generator state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from alignbench.config import Interrupted, UserError
from alignbench.evaluator import Reward
from alignbench.experiment.margins import BATCHES, hinge_warnings
from alignbench.experiment.spec import Training, check_fsdp
from alignbench.flow import Flow
from alignbench.method import AlignMethod
from alignbench.prompts import Prompt
from alignbench.training.batches import shares
from alignbench.training.checkpoint import FINAL
from alignbench.training.meter import metered, metered_reward
from alignbench.training.state import Record, TrainState


def train(
    method: AlignMethod,
    flow: Flow,
    reward: Reward,
    prompts: Sequence[Prompt],
    training: Training,
    *,
    accelerator: Accelerator,
    checkpoints: Path | None = None,
    milestones: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    sharded: bool = False,
    warn: Callable[[str], Any] = warnings.warn,
) -> Iterator[Record]:
    """Train ``flow`` in place until the budget is spent; yield one record per optimizer update, costs as totals so far.

    With ``checkpoints`` the state is saved there every ``checkpoint_every`` batches and at the end, the last one that
    is whole is resumed bitwise (only new records are yielded: ``load_records`` has the earlier ones), and once all
    records are consumed ``final.safetensors`` holds the trained weights and their average. A method with ``trains =
    False`` yields and writes nothing. UserError for settings that cannot work, and for losses, rewards or gradients
    that are not finite; the last checkpoint is then kept.

    ``milestones``: the folder into which the weights go, as ``weights-<updates>.safetensors``, as soon as an update of
    ``training.milestones`` is done; a resumed run writes the same bytes again.

    ``stop`` is asked after every batch. If it says yes on any rank, the state is saved at once, and on every rank
    Interrupted is raised after that batch's records. ``sharded``: several ranks keep a part of every weight each
    (FSDP2), which only changes rounding; ``flow`` stays in parts, and is of no use to one rank alone afterwards.
    ``warn`` is told once of hinges that look like a margin in a wrong unit.
    """
    if not method.trains:
        return
    check(method, reward, training, accelerator)
    if sharded and accelerator.num_processes > 1:
        check_fsdp(training, "fsdp")
    method.prepare(flow)  # before the average starts from the weights, and before a resume replaces them
    run = TrainState(method, flow, training, accelerator, sharded, milestones)
    if checkpoints is not None:
        run.resume(checkpoints)
    flow = metered(flow, run.meter, run.watch)
    reward = metered_reward(reward, run.meter, run.watch, training.reward_slice)
    while not run.finished:
        records = list(run.advance(flow, reward, prompts))
        stopped = run.anywhere(stop) and not run.finished
        if checkpoints is not None and (run.finished or stopped or run.step % training.checkpoint_every == 0):
            run.save(checkpoints)
        if accelerator.is_main_process and (run.step == BATCHES or (run.finished and run.step < BATCHES)):
            margins = {term.evaluator.name: term.margin for term in reward.terms}
            for line in hinge_warnings(run.records, margins):
                warn(line)
        yield from records
        if stopped:
            raise Interrupted(f"training: stopped after {run.step} batches")
    if run.ema is not None:
        run.ema.wait()
    if checkpoints is not None:
        run.save_weights(checkpoints / FINAL)


def check(method: AlignMethod, reward: Reward, training: Training, accelerator: Accelerator) -> None:
    """UserError for settings that cannot work together. Needs no model."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        precision = accelerator.mixed_precision
        raise UserError(f"accelerate mixed_precision: {precision} would need loss scaling; choose 'no' or 'bf16'")
    for size in {len(samples) for samples in shares(training, accelerator)}:
        method.check(size, reward.differentiable)

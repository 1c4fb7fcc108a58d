"""The training loop of every method: batches in, one record per optimizer update out. It knows no method by name.

Batch t is drawn from (seed, t, sample) alone: prompts and noise are the same for every method, micro-batch size,
device and number of ranks, and a resumed run needs no generator state.
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
from alignbench.training.batches import micro_batches
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

    ``checkpoints``: the folder where the state is saved every ``checkpoint_every`` batches and at the end. The last
    intact state there is resumed bitwise (only new records are yielded: ``load_records`` returns the earlier ones).
    Once all records are consumed, ``final.safetensors`` there holds the trained weights and their average.

    ``milestones``: the folder where the weights are saved, as ``weights-<updates>.safetensors``, after each update in
    ``training.milestones``; a resumed run writes the same bytes again.

    ``stop`` is called after every batch. If it returns True on any rank, the state is saved at once, and every rank
    raises Interrupted after that batch's records. ``sharded``: with several ranks, each keeps a shard of every weight
    (FSDP2), which only changes rounding; ``flow`` stays sharded, so no rank can use it alone afterwards. ``warn`` is
    called once for hinges that suggest a margin in the wrong unit.

    A method with ``trains = False`` yields and writes nothing. UserError for settings that cannot work, and for losses,
    rewards or gradients that are not finite; the last checkpoint is then kept.
    """
    if not method.trains:
        return
    check(method, reward, training, accelerator)
    if sharded and accelerator.num_processes > 1:
        check_fsdp(training, "fsdp")
    method.prepare(flow)  # before the EMA copies the weights, and before resuming replaces them
    run = TrainState(method, flow, training, accelerator, sharded, milestones)
    if checkpoints is not None:
        run.resume(checkpoints)
    flow = metered(flow, run.meter, run.watch)
    reward = metered_reward(reward, run.meter, run.watch, training.reward_slice)
    while not run.finished:
        records = list(run.train_batch(flow, reward, prompts))
        stopped = run.any_rank(stop) and not run.finished
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
    """Raise UserError for settings that cannot work together. Needs no model."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        precision = accelerator.mixed_precision
        raise UserError(f"accelerate mixed_precision: {precision} would need loss scaling; choose 'no' or 'bf16'")
    for size in {len(samples) for samples in micro_batches(training, accelerator)}:
        method.check(size, reward.differentiable)

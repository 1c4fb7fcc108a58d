"""Batches of prompts and noise that depend only on seed, step and sample."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from alignbench.analytic import PROMPTS
from alignbench.config import UserError
from alignbench.experiment.spec import Budget, Training
from alignbench.flow import Batch, Flow, seeded
from alignbench.prompts import Prompt


def make_batch(flow: Flow, samples: Sequence[int], step: int = 0, seed: int = 0) -> Batch:
    """Return the batch that training would draw: ``samples`` of global batch ``step``, on the CPU."""
    training = Training(budget=Budget(updates=1), batch=len(PROMPTS), seed=seed)
    return draw_batch(flow, PROMPTS, training, step, samples, torch.device("cpu"))


def micro_batches(training: Training, accelerator: Accelerator) -> list[range]:
    """Return the samples of a global batch that each micro-batch of this rank has. UserError if they do not divide."""
    ranks, batch = accelerator.num_processes, training.batch
    if batch < 1 or batch % ranks:
        raise UserError(f"training.batch: {batch} samples do not divide among {ranks} ranks; choose a multiple")
    local = batch // ranks
    size = training.micro_batch or local
    if not 1 <= size <= local:
        raise UserError(f"training.micro_batch: {size} is not within this rank's {local} samples; choose 1 to {local}")
    first = accelerator.process_index * local
    return [range(i, min(i + size, first + local)) for i in range(first, first + local, size)]


def draw_batch(
    flow: Flow, prompts: Sequence[Prompt], training: Training, step: int, samples: Sequence[int], device: torch.device
) -> Batch:
    """Return ``samples`` of global batch ``step``, each with its own noise and generator."""
    seed = training.seed
    drawn = [prompts[prompt_index(seed, step * training.batch + i, len(prompts))] for i in samples]
    noise = flow.noise(len(samples), [seeded("noise", seed, step, i) for i in samples]).to(device)
    with torch.no_grad():
        cond = flow.encode([prompt.text for prompt in drawn])
    rngs = [seeded("sample", seed, step, i) for i in samples]
    return Batch(drawn, cond, noise, rngs, seeded("step", seed, step), step)


def prompts_within_budget(prompts: Sequence[Prompt], training: Training) -> list[Prompt]:
    """Return the prompts that a budget of images or updates lets batches draw; all for a budget of another kind."""
    budget, batch = training.budget, training.batch
    batches = budget.updates or -(-(budget.images or 0) // batch)  # each makes at least one update
    samples = min(batches * batch or len(prompts), len(prompts))
    return [prompts[i] for i in sorted(prompt_index(training.seed, n, len(prompts)) for n in range(samples))]


def prompt_index(seed: int, n: int, count: int) -> int:
    """Return which of ``count`` prompts the run's n-th sample gets: every epoch is a new permutation."""
    epoch, position = divmod(n, count)
    return _permutation(seed, epoch, count)[position]


@functools.lru_cache(maxsize=2)  # a batch spans at most a few epochs; recomputing one is cheap
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=seeded("prompts", seed, epoch)).tolist()

"""A sweep as SLURM job arrays: one per stage and resource shape, each task waiting for its own predecessor alone.

submitit writes the batch files and submits them. Their command is ``python -m alignbench.run.slurm_job``, which reads
its task from JSON: a store is shared, and a pickle in it would be code that anybody with write access can put there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.config import UserError
from alignbench.store.artefacts import Artefact
from alignbench.store.stages import Stage

if TYPE_CHECKING:
    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.roles import Score
from alignbench.experiment.resources import MAX_ARRAY_TASKS, Resources, resources


class PendingRun(NamedTuple):
    """A cell with what of it is missing."""

    cell: PlannedRun
    todo: Sequence[Artefact]


@dataclass
class Array:
    """Jobs of one stage. Task i works on ``cells[i]``, once task i of ``after`` has succeeded."""

    stage: Stage
    cells: list[PlannedRun]
    resources: Resources
    after: Array | None = None
    evaluator: str = ""
    files: Sequence[str] = ()  # of its scores, below their image sets
    job: str = ""  # SLURM's id, once submitted
    number: int = 0

    @property
    def title(self) -> str:
        return f"{self.stage.verb} {self.evaluator}".strip()

    def stages(self, cell: PlannedRun) -> list[Stage]:
        """Return what the job of ``cell`` does."""
        untrained = self.stage is Stage.GENERATE and not cell.trains
        return [Stage.TRAIN, Stage.GENERATE] if untrained else [self.stage]


@dataclass
class _Chain:
    """Cells that go through the same stages with the same resources."""

    train: Resources | None
    generate: Resources | None
    works: list[PendingRun]


def arrays(
    slurm: dict[str, Any], works: Iterable[PendingRun], scored: Callable[[PlannedRun], Sequence[Score]]
) -> list[Array]:
    """All that is missing, predecessors first. Rows that share weights and images are worked on once.

    ``scored``: the evaluators of a cell, in the same order for all.
    """
    found: list[Array] = []
    for chain in _chains(slurm, works):
        for start in range(0, len(chain.works), MAX_ARRAY_TASKS):
            found += _arrays_of(slurm, chain, chain.works[start : start + MAX_ARRAY_TASKS], scored)
    for number, array in enumerate(found):
        array.number = number
    return found


def _chains(slurm: dict[str, Any], works: Iterable[PendingRun]) -> list[_Chain]:
    chains: list[_Chain] = []
    seen = set[tuple[str, str]]()
    for work in works:
        if (work.cell.id, work.cell.images) in seen:
            continue
        seen.add((work.cell.id, work.cell.images))
        stages = {part.stage for part in work.todo}
        if not work.cell.trains and Stage.TRAIN in stages:  # the job that makes the images puts it on record
            stages = stages - {Stage.TRAIN} | {Stage.GENERATE}
        train, generate = (
            resources(slurm, stage, work.cell) if stage in stages else None for stage in (Stage.TRAIN, Stage.GENERATE)
        )
        chain = next((c for c in chains if (c.train, c.generate) == (train, generate)), None)
        if chain is None:
            chains.append(chain := _Chain(train, generate, []))
        chain.works.append(work)
    return chains


def _arrays_of(
    slurm: dict[str, Any], chain: _Chain, works: Sequence[PendingRun], scored: Callable[[PlannedRun], Sequence[Score]]
) -> Iterator[Array]:
    cells = [work.cell for work in works]
    last = None
    for stage, wanted in ((Stage.TRAIN, chain.train), (Stage.GENERATE, chain.generate)):
        if wanted is not None:
            yield (last := Array(stage, cells, wanted, last))
    for column in zip(*(scored(cell) for cell in cells)):
        pairs = [(work.cell, score) for work, score in zip(works, column) if _lacks(work, score)]
        if pairs:  # all of them wherever images are missing: then tasks of both arrays correspond
            (first, score), files = pairs[0], [score.file for _, score in pairs]
            asked = resources(slurm, Stage.SCORE, first, score.name)
            yield Array(Stage.SCORE, [cell for cell, _ in pairs], asked, last, score.name, files)


def _lacks(work: PendingRun, score: Score) -> bool:
    sets = [work.cell.images, *(images for _, images in work.cell.milestones)]
    names = {f"{images}/{score.file.removesuffix('.parquet')}" for images in sets}
    return any(part.id in names for part in work.todo)


def check() -> None:
    """UserError unless jobs can be submitted from here."""
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise UserError(
            f"--launcher slurm: there is no {missing[0]} on this machine; start it on a login node of a SLURM cluster, "
            "or choose --launcher local"
        )


def submit(array: Array, folder: Path, name: str, environment: dict[str, str]) -> None:
    """Hand an array to SLURM; its id is noted in it. ``environment``: of its jobs, beside the one of this process.

    UserError with SLURM's own words if it is refused.
    """
    import submitit

    if "%" in str(folder):
        raise UserError(f"{folder}: SLURM would read the % as a pattern; choose a store without one in its path")
    executor = submitit.SlurmExecutor(folder)
    extra: dict[str, Any] = {"chdir": os.getcwd(), "requeue": True}
    if array.after is not None:
        extra |= {"dependency": f"aftercorr:{array.after.job}", "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=name,
        setup=[*(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), *array.resources.setup],
        additional_parameters=extra | array.resources.additional,
        **array.resources.options(),
    )
    executor.parameters["map_count"] = len(array.cells)
    # until Python listens to it, the signal of the time limit would end the task
    words = ["bash", "-c", 'trap "" USR2; exec "$@"', "job"]
    words += [sys.executable, "-P", "-u", "-m", "alignbench.run.slurm_job", str(folder / f"{array.number}.json")]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, and raises it
            array.job = executor._submit_command(shlex.join(words)).job_id
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refused the jobs that {array.title}: {_refusal(str(error))}") from None


def _refusal(text: str) -> str:
    lines = [line.split("error:", 1)[1].strip() for line in text.splitlines() if "error:" in line]
    return "; ".join(dict.fromkeys(lines)) or " ".join(text.split())[-300:]


def cancel(jobs: Sequence[str]) -> None:
    """End them. Unknown and finished ones are no error."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)


class Live(NamedTuple):
    """A job that has not ended."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    restarts: int
    left: str  # of its time, as SLURM prints it


def live(names: Iterable[str]) -> dict[str, Live]:
    """``12_3`` -> of every job called one of ``names`` that has not ended. UserError if SLURM does not answer."""
    chosen = sorted(set(names))
    if not chosen or shutil.which("squeue") is None:
        return {}
    columns = "ArrayJobID:|,ArrayTaskID:|,State:|,RestartCnt:|,TimeLeft:|,Reason:"
    words = ["squeue", "--noheader", "--array", f"--name={','.join(chosen)}", "-O", columns]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"SLURM does not answer: {_refusal(done.stderr)}; try again")
    found = {}
    for line in done.stdout.splitlines():
        array, task, state, restarts, left, reason = (part.strip() for part in line.split("|", 5))
        found[f"{array}_{task}"] = Live(state, reason, int(restarts or 0), left)
    return found


def ended(job: str) -> str:
    """How a job ended, in SLURM's words (``TIMEOUT``), as far as it remembers."""
    if shutil.which("sacct") is None:
        return ""
    done = subprocess.run(
        ["sacct", "-X", "-P", "-n", "-o", "State", "-j", job], capture_output=True, text=True, check=False
    )
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    return re.sub(r" by \d+", "", lines[0].strip()) if lines else ""

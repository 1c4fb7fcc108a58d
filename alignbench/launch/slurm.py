"""A sweep as SLURM job arrays: one per stage and set of resources; each task waits only for its own predecessor.

submitit writes the batch files and submits them. Their command is ``python -m alignbench.run.slurm_job``, which reads
its task from JSON: a store is shared, and with a pickle anyone with write access could plant code in it.
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
from alignbench.experiment.resources import MAX_ARRAY_TASKS, Resources, resources
from alignbench.store.stages import Stage

if TYPE_CHECKING:
    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.roles import Score
    from alignbench.launch.pending import PendingRun


@dataclass
class Array:
    """A job array of one stage. Task i works on ``cells[i]`` once task i of ``after`` has succeeded."""

    stage: Stage
    cells: list[PlannedRun]
    resources: Resources
    after: Array | None = None
    evaluator: str = ""
    files: Sequence[str] = ()  # its score files, relative to the folders of their image sets
    job: str = ""  # SLURM's job id, once submitted
    number: int = 0

    @property
    def title(self) -> str:
        """The stage and, when scoring, the evaluator, as in ``score hpsv2``."""
        return f"{self.stage.verb} {self.evaluator}".strip()

    def stages(self, cell: PlannedRun) -> list[Stage]:
        """Return the stages that the job of ``cell`` runs."""
        untrained = self.stage is Stage.GENERATE and not cell.trains
        return [Stage.TRAIN, Stage.GENERATE] if untrained else [self.stage]


@dataclass
class _Chain:
    """Runs that go through the same stages with the same resources."""

    train: Resources | None
    generate: Resources | None
    runs: list[PendingRun]


def arrays(
    slurm: dict[str, Any], pending: Iterable[PendingRun], scored: Callable[[PlannedRun], Sequence[Score]]
) -> list[Array]:
    """Return the arrays that make all that is missing, predecessors first. Rows that share a run are made once.

    ``scored``: returns the evaluators of a cell, in the same order for all cells.
    """
    made: list[Array] = []
    for chain in _chains(slurm, pending):
        for start in range(0, len(chain.runs), MAX_ARRAY_TASKS):
            made += _arrays_of(slurm, chain, chain.runs[start : start + MAX_ARRAY_TASKS], scored)
    for number, array in enumerate(made):
        array.number = number
    return made


def _chains(slurm: dict[str, Any], pending: Iterable[PendingRun]) -> list[_Chain]:
    chains: list[_Chain] = []
    seen = set[tuple[str, str]]()
    for run in pending:
        if (run.cell.id, run.cell.images) in seen:
            continue
        seen.add((run.cell.id, run.cell.images))
        stages = {artefact.stage for artefact in run.missing}
        if not run.cell.trains and Stage.TRAIN in stages:  # recorded by the job that generates the images
            stages = stages - {Stage.TRAIN} | {Stage.GENERATE}
        train, generate = (
            resources(slurm, stage, run.cell) if stage in stages else None for stage in (Stage.TRAIN, Stage.GENERATE)
        )
        chain = next((c for c in chains if (c.train, c.generate) == (train, generate)), None)
        if chain is None:
            chains.append(chain := _Chain(train, generate, []))
        chain.runs.append(run)
    return chains


def _arrays_of(
    slurm: dict[str, Any], chain: _Chain, runs: Sequence[PendingRun], scored: Callable[[PlannedRun], Sequence[Score]]
) -> Iterator[Array]:
    cells = [run.cell for run in runs]
    last = None
    for stage, requested in ((Stage.TRAIN, chain.train), (Stage.GENERATE, chain.generate)):
        if requested is not None:
            yield (last := Array(stage, cells, requested, last))
    for column in zip(*(scored(cell) for cell in cells)):
        pairs = [(run.cell, score) for run, score in zip(runs, column) if _lacks(run, score)]
        if pairs:  # where images are missing, so are all scores: then the tasks of both arrays correspond
            (first, score), files = pairs[0], [score.file for _, score in pairs]
            requested = resources(slurm, Stage.SCORE, first, score.name)
            yield Array(Stage.SCORE, [cell for cell, _ in pairs], requested, last, score.name, files)


def _lacks(run: PendingRun, score: Score) -> bool:
    sets = [run.cell.images, *(images for _, images in run.cell.milestones)]
    names = {f"{images}/{score.file.removesuffix('.parquet')}" for images in sets}
    return any(artefact.id in names for artefact in run.missing)


def check() -> None:
    """Raise UserError unless jobs can be submitted from this machine."""
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise UserError(
            f"--launcher slurm: there is no {missing[0]} on this machine; start it on a login node of a SLURM cluster, "
            "or choose --launcher local"
        )


def submit(array: Array, folder: Path, name: str, environment: dict[str, str]) -> None:
    """Submit an array to SLURM and set its ``job``. ``environment``: variables added to this process' environment.

    Raise UserError with SLURM's own message if it is refused.
    """
    import submitit

    if "%" in str(folder):
        raise UserError(f"{folder}: SLURM would read the % as a pattern; choose a store without % in its path")
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
    # the signal sent before the time limit would end the task until Python handles it
    words = ["bash", "-c", 'trap "" USR2; exec "$@"', "job"]
    words += [sys.executable, "-P", "-u", "-m", "alignbench.run.slurm_job", str(folder / f"{array.number}.json")]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, and also raises it
            array.job = executor._submit_command(shlex.join(words)).job_id
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refused the jobs that {array.title}: {_refusal(str(error))}") from None


def _refusal(text: str) -> str:
    lines = [line.split("error:", 1)[1].strip() for line in text.splitlines() if "error:" in line]
    return "; ".join(dict.fromkeys(lines)) or " ".join(text.split())[-300:]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs. Unknown and finished ones are ignored."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)


class LiveJob(NamedTuple):
    """A SLURM job that has not ended."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    restarts: int
    left: str  # time left, as SLURM prints it


def live(names: Iterable[str]) -> dict[str, LiveJob]:
    """Return the jobs with one of these names that have not ended, by id (``12_3``).

    Raise UserError if SLURM does not answer.
    """
    chosen = sorted(set(names))
    if not chosen or shutil.which("squeue") is None:
        return {}
    columns = "ArrayJobID:|,ArrayTaskID:|,State:|,RestartCnt:|,TimeLeft:|,Reason:"
    words = ["squeue", "--noheader", "--array", f"--name={','.join(chosen)}", "-O", columns]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"SLURM does not answer: {_refusal(done.stderr)}; try again")
    jobs = {}
    for line in done.stdout.splitlines():
        array, task, state, restarts, left, reason = (part.strip() for part in line.split("|", 5))
        jobs[f"{array}_{task}"] = LiveJob(state, reason, int(restarts or 0), left)
    return jobs


def final_state(job: str) -> str:
    """Return how a job ended, in SLURM's words (``TIMEOUT``); "" if SLURM does not know."""
    if shutil.which("sacct") is None:
        return ""
    done = subprocess.run(
        ["sacct", "-X", "-P", "-n", "-o", "State", "-j", job], capture_output=True, text=True, check=False
    )
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    return re.sub(r" by \d+", "", lines[0].strip()) if lines else ""

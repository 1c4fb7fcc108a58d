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
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.config import UserError, decode
from alignbench.experiment.resources import ODD, Resources, Slurm, resources
from alignbench.run.code_snapshot import Snapshot
from alignbench.store.shell import NoAnswer, slurm_answer, slurm_command, slurm_error, slurm_shell
from alignbench.store.stages import Stage

if TYPE_CHECKING:
    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.roles import Score
    from alignbench.launch.pending import PendingRun

# SLURM's states of jobs that have not ended, those that wait first
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ACTIVE = (*WAITING, *("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "STAGE_OUT"))
ENDED = "Invalid job id|already"  # in scancel's errors about a job that has ended


@dataclass(eq=False)  # an array is itself, whatever it holds
class Array:
    """A job array of one stage. Task ``tasks[i]`` works on ``cells[i]``, once task ``tasks[i]`` of ``after`` succeeded.

    ``after``: an array of this submission, or SLURM's id of an earlier one.
    """

    stage: Stage
    resources: Resources
    evaluator: str = ""
    after: Array | str = ""
    cells: list[PlannedRun] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # score files, relative to the folders of the image sets
    job: str = ""  # SLURM's job id, once submitted
    number: int = 0

    @property
    def title(self) -> str:
        """The stage and, when scoring, the evaluator, as in ``score hpsv2``."""
        return f"{self.stage.verb} {self.evaluator}".strip()

    @property
    def kind(self) -> tuple[Any, ...]:
        """The properties that the tasks of one array have in common."""
        return self.stage, self.resources, self.evaluator, self.after

    @property
    def waits_for(self) -> str:
        """SLURM's id of the array that this one waits for; "" for none."""
        return self.after.job if isinstance(self.after, Array) else self.after

    def stages(self, cell: PlannedRun) -> list[Stage]:
        """Return the stages that the job of ``cell`` runs."""
        untrained = self.stage is Stage.GENERATE and not cell.trains
        return [Stage.TRAIN, Stage.GENERATE] if untrained else [self.stage]


class _Slot(NamedTuple):
    """A task that makes an artefact, of an array of this submission or (by its id) of an earlier one."""

    array: Array | str
    task: int


def arrays(
    slurm: dict[str, Any],
    pending: Iterable[PendingRun],
    scored: Callable[[PlannedRun], Sequence[Score]],
    live: Mapping[str, str] | None = None,
) -> list[Array]:
    """Return the arrays that make all that is missing, predecessors first.

    ``scored``: returns the evaluators of a cell. ``live``: artefacts and the queued or running jobs (``12_3``) that
    make them; these are not made again, and what needs them waits for that job. So do rows that share a run.
    """
    size, made = decode(Slurm, slurm, "slurm").array_size, list[Array]()
    making = {id: _Slot(job.partition("_")[0], int(job.partition("_")[2])) for id, job in (live or {}).items()}
    for run in pending:
        cell, lacking = run.cell, _lacking(run)
        before: _Slot | None = None  # the task that makes what the next one needs
        for stage in (Stage.TRAIN, Stage.GENERATE):
            ids = lacking.get(stage, [])
            slots = {making.get(id) for id in ids}
            slot = slots.pop() if len(slots) == 1 else None
            if ids and slot is None:
                slot = _add(made, size, Array(stage, resources(slurm, stage, cell)), cell, before)
                making |= dict.fromkeys(ids, slot)
            before = slot or before
        for score in scored(cell):
            names = {f"{images}/{score.file.removesuffix('.parquet')}" for images in _image_sets(cell)}
            if ids := [id for id in lacking.get(Stage.SCORE, []) if id in names and id not in making]:
                like = Array(Stage.SCORE, resources(slurm, Stage.SCORE, cell, score.name), score.name)
                making |= dict.fromkeys(ids, _add(made, size, like, cell, before, score.file))
    for number, array in enumerate(made):
        array.number = number
    return made


def _lacking(run: PendingRun) -> dict[Stage, list[str]]:
    """Return the artefacts that a run lacks, by the stage whose job makes them."""
    lacking: dict[Stage, list[str]] = {}
    for artefact in run.missing:
        untrained = artefact.stage is Stage.TRAIN and not run.cell.trains  # recorded by the job that makes the images
        stage = Stage.GENERATE if untrained else artefact.stage
        if stage is not Stage.GENERATE or artefact.id in (run.cell.id, *_image_sets(run.cell)):  # not another row's
            lacking.setdefault(stage, []).append(artefact.id)
    return lacking


def _image_sets(cell: PlannedRun) -> list[str]:
    return [cell.images, *(images for _, images in cell.milestones)]


def _add(made: list[Array], size: int, like: Array, cell: PlannedRun, before: _Slot | None, file: str = "") -> _Slot:
    """Add a task for ``cell`` to an array like ``like``, a new one if need be. It has the number of its predecessor."""
    like.after = before.array if before else ""
    for array in made:
        task = before.task if before else len(array.cells)
        if array.kind == like.kind and task not in array.tasks and (before or task < size):
            break
    else:
        made.append(array := like)
        task = before.task if before else 0
    array.cells.append(cell)
    array.tasks.append(task)
    array.files.append(file)
    return _Slot(array, task)


def check() -> None:
    """Raise UserError unless jobs can be submitted from this machine."""
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise UserError(
            f"--launcher slurm: there is no {missing[0]} on this machine; start it on a login node of a SLURM cluster, "
            "or choose --launcher local"
        )


def check_paths(store: Path) -> None:
    """Raise UserError for a store, or a folder to work in, whose path SLURM would misread."""
    for what, path in (("--store", store.resolve()), ("this folder", Path.cwd())):
        if odd := re.search(ODD, str(path)):
            raise UserError(f"{what} {str(path)!r}: SLURM takes no path with {odd[0]!r}; choose another folder")


def submit(array: Array, folder: Path, name: str, code: Snapshot) -> None:
    """Submit an array, whose jobs run ``code``, to SLURM and set its ``job``.

    Raise UserError with SLURM's own message if it is refused.
    """
    import submitit

    class Executor(submitit.SlurmExecutor):
        _get_job_id_from_submission_command = staticmethod(_job_id)  # its own takes any number that follows "job"

    executor = Executor(folder)
    executor.update_parameters(**_parameters(array, folder, name))
    # the signal sent before the time limit would end the task until Python handles it
    interpreter = shlex.split(array.resources.python) if array.resources.python else [sys.executable]
    words = ["bash", "-c", 'trap "" USR2; exec "$@"', "job", *code.python(interpreter)]
    words += ["-m", "alignbench.run.slurm_job", str(folder / f"{array.number}.json")]
    try:
        # submitit prints what sbatch says, and also raises it
        with slurm_shell(), contextlib.redirect_stderr(io.StringIO()):
            array.job = executor._submit_command(shlex.join(words)).job_id
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        said = slurm_error(str(error))
        raise UserError(f"SLURM refused the jobs that {array.title}: {said}{_remedy(said)}") from None


def _job_id(string: str | bytes) -> str:
    """Return the id of the job that sbatch submitted. Raise UserError unless it names one."""
    text = string if isinstance(string, str) else string.decode(errors="replace")
    found = re.findall(r"(?m)^Submitted batch job (\d+)\b", text)
    if len(found) != 1:
        what = "which does not name one job; if it submitted any, cancel them by hand"
        raise UserError(f"sbatch says '{' '.join(text.split())[-300:]}', {what}")
    return found[0]


def _remedy(said: str) -> str:
    """Return which setting answers SLURM's refusal, if one does."""
    if "job array specification" in said:
        return "; lower slurm.array_size below the cluster's MaxArraySize"
    return "; set slurm.submit_limit to the jobs that you may have in the queue" if "SubmitJob" in said else ""


def _parameters(array: Array, folder: Path, name: str) -> dict[str, Any]:
    """Return submitit's parameters of an array: its own defaults give way to what the sweep says."""
    log, request = f"{str(folder).replace('%', '%%')}/%A_%a", array.resources
    width = min(len(array.cells), request.array_parallelism)
    options: dict[str, str] = {
        "array": f"{_ranges(array.tasks)}%{width}",
        "output": f"{log}_0_log.out",
        "chdir": os.getcwd(),
        "requeue": "",
        **({"dependency": f"aftercorr:{array.waits_for}", "kill-on-invalid-dep": "yes"} if array.waits_for else {}),
        **request.options(),
    }
    return {
        "job_name": name,
        **dict.fromkeys(("time", "wckey")),  # else five minutes, and "submitit"
        "stderr_to_stdout": True,
        "setup": request.setup,
        "srun_args": ["--kill-on-bad-exit=1", f"--output={log}_%t_log.out", *request.srun_options()],
        "additional_parameters": {key.replace("-", "_"): text or True for key, text in options.items()},
    }


def _ranges(tasks: Iterable[int]) -> str:
    """Return numbers as SLURM writes them, as in ``0-3,7``."""
    runs = groupby(enumerate(sorted(tasks)), lambda pair: pair[1] - pair[0])
    ends = [[task for _, task in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def _tasks(text: str) -> list[int]:
    """Return the numbers in ``0-3,7`` or ``0-9:3``. Raise ValueError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs. Finished ones are ignored; raise UserError if SLURM refuses or does not answer."""
    if not jobs:
        return
    done = slurm_command("scancel", *jobs)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if not re.search(ENDED, line)]
    if done.returncode != 0 and (said or not lines):
        why = slurm_error("\n".join(said)) or f"exit code {done.returncode}"
        raise UserError(f"scancel says {why}; jobs may still be in the queue: see `squeue --me`, and try again")


class LiveJob(NamedTuple):
    """A SLURM job that has not ended."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    restarts: int
    left: str  # time left, as SLURM prints it

    @property
    def waits(self) -> bool:
        return self.state in WAITING


def live(names: Iterable[str]) -> dict[str, LiveJob]:
    """Return the jobs with one of these names that have not ended, by id (``12_3``).

    Raise NoAnswer if SLURM cannot be asked or does not answer.
    """
    chosen = sorted(set(names))
    if not chosen:
        return {}
    columns = "ArrayJobID:|,ArrayTaskID:|,State:|,RestartCnt:|,TimeLeft:|,Reason:"
    words = ["squeue", "--noheader", "--all", "--array", f"--name={','.join(chosen)}", "-O", columns]
    return slurm_answer(*words, read=_queue)


def _queue(text: str) -> dict[str, LiveJob]:
    """Return the jobs that squeue lists. Raise ValueError for a line that does not describe one."""
    jobs = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("CLUSTER: "):
            continue
        parts = [part.strip() for part in line.split("|", 5)]
        if len(parts) != 6 or not parts[0].isdigit() or not (parts[3] or "0").isdigit():
            raise ValueError(f"'{line.strip()[:100]}', which is not a job")
        array, task, state, restarts, left, reason = parts
        jobs[f"{array}_{task}"] = LiveJob(state, reason, int(restarts or 0), left)
    return jobs


def accounted(jobs: Iterable[str]) -> dict[str, str]:
    """Return the states of jobs (``12_3``) in SLURM's words, as far as its accounting knows them."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    ids = ",".join(sorted({job.partition("_")[0] for job in wanted}, key=int))
    try:
        text = slurm_command("sacct", "--allusers", "-X", "-P", "-n", "-o", "JobID,State", "-j", ids).stdout
    except NoAnswer:
        return {}
    states: dict[str, str] = {}
    whole: dict[str, str] = {}  # an array that was cancelled before any of its tasks began is one line
    for line in text.splitlines():
        id, _, state = line.strip().partition("|")
        state = re.sub(r" by \d+", "", state).strip()
        if found := re.fullmatch(r"(\d+)_\[([\d,:-]+)(%\d+)?\]", id):
            states |= {f"{found[1]}_{task}": state for task in _tasks(found[2])}
        elif id.isdigit():
            whole[id] = state
        else:
            states[id] = state
    found_states = {job: states.get(job, whole.get(job.partition("_")[0], "")) for job in wanted}
    return {job: state for job, state in found_states.items() if state}

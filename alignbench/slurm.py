"""A sweep as SLURM job arrays: one per stage and resource shape, each task waiting for its own predecessor alone.

submitit writes the batch files and submits them. Their command is ``python -m alignbench.run.slurm_job``, which reads
its task from JSON: a store is shared, and a pickle in it would be code that anybody with write access can put there.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from msgspec import Meta, field

from alignbench.config import Config, UserError, decode, join, load_yaml, merge
from alignbench.plugins import Registry
from alignbench.spec import Count
from alignbench.stages import Stage, Verb
from alignbench.store import Artefact

if TYPE_CHECKING:
    from alignbench.sweep import Cell, Score

LARGEST = 1000  # tasks of an array; SLURM's default MaxArraySize is 1001
Time = Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern=r"^(\d+-)?\d{1,2}(:\d\d){1,2}$")]


class Resources(Config):
    """What a job asks SLURM for. What is not set is the cluster's default."""

    partition: str | None = None
    nodes: Count = 1
    gpus_per_node: Annotated[int, Meta(ge=0)] = 0
    tasks_per_node: Count | None = None  # ranks on a node; None: one per GPU, or one
    cpus_per_task: Count | None = None
    time: Time | None = None  # minutes, minutes:seconds, hours:minutes:seconds or days-hours:minutes[:seconds]
    mem: str | None = None  # of a node, as in 64G
    constraint: str | None = None
    qos: str | None = None
    account: str | None = None
    array_parallelism: Count = 256  # tasks of an array at a time
    setup: list[str] = field(default_factory=list)  # lines of shell before the job's own command
    additional: dict[str, Any] = field(default_factory=dict)  # further options of sbatch
    signal: Count = 90  # seconds before its end in which a job saves what it has
    parallel: Literal["ddp", "fsdp"] = "ddp"  # how the ranks of a training share the model

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def seconds(self) -> float:
        """Of ``time``; infinite if it is not set."""
        if not isinstance(self.time, str):
            return math.inf if self.time is None else 60 * self.time
        days, _, clock = self.time.rpartition("-")
        hours, minutes, *seconds = map(int, clock.split(":"))
        if not days and not seconds:  # minutes:seconds
            return 60 * hours + minutes
        return 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + sum(seconds)

    def options(self) -> dict[str, Any]:
        """submitit's names for them."""
        same = ("partition", "nodes", "cpus_per_task", "time", "mem", "constraint", "qos", "account")
        chosen = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        gpus = {"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}
        return {
            "time": None,  # else submitit's own: five minutes
            **chosen,
            **gpus,
            "ntasks_per_node": self.ranks_per_node,
            "array_parallelism": self.array_parallelism,
            "signal_delay_s": self.signal,
            "stderr_to_stdout": True,
            "srun_args": [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else None,  # not inherited
        }


class Slurm(Resources):
    """The same for all jobs, and what some of them want instead: by stage, backend, method (training), evaluator."""

    stages: dict[Verb, dict[str, Any]] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluators: dict[str, dict[str, Any]] = field(default_factory=dict)


SECTIONS = ("stages", "backends", "methods", "evaluators")


def check_options(options: Any, where: str, registry: Registry) -> None:
    """UserError for a setting that does not exist, or is for a method, evaluator or backend that does not."""
    checked = decode(Slurm, options, where)
    for section in SECTIONS:
        for name, own in getattr(checked, section).items():
            if section != "stages":
                registry.entry(section.removesuffix("s"), name, join(where, section))  # type: ignore[arg-type]
            decode(Resources, own, join(where, f"{section}.{name}"))


def read(sweep: dict[str, Any], file: str | None, registry: Registry) -> dict[str, Any]:
    """A sweep's ``slurm`` (checked already) with the cluster file laid over it."""
    if file is None:
        return sweep
    cluster = load_yaml(Path(file))
    check_options(cluster, f"{file}: ", registry)
    return merge(sweep, cluster)


def resources(slurm: dict[str, Any], stage: Stage, cell: Cell, evaluator: str = "") -> Resources:
    """Of one job: what all get, then what its stage, its backend, and its method or evaluator want instead."""
    own: dict[str, Any] = {key: value for key, value in slurm.items() if key not in SECTIONS}
    wishes = [("stages", str(stage.verb))]
    if stage is not Stage.SCORE:
        wishes.append(("backends", cell.spec.backend["name"]))
    if stage is Stage.TRAIN:
        wishes.append(("methods", cell.spec.method["name"]))
    if evaluator:
        wishes.append(("evaluators", evaluator))
    for section, name in wishes:
        own = merge(own, slurm.get(section, {}).get(name) or {})
    found = decode(Resources, own, "slurm")
    if found.seconds <= found.signal:
        what = f"{stage.verb}: {found.time} is no longer than the {found.signal} s before its end in which it saves"
        raise UserError(f"slurm.time: {what}; raise time, or lower signal")
    return found


# -- arrays -----------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """A cell with what of it is missing."""

    cell: Cell
    todo: Sequence[Artefact]


@dataclass
class Array:
    """Jobs of one stage. Task i works on ``cells[i]``, once task i of ``after`` has succeeded."""

    stage: Stage
    cells: list[Cell]
    resources: Resources
    after: Array | None = None
    evaluator: str = ""
    files: Sequence[str] = ()  # of its scores, below their image sets
    job: str = ""  # SLURM's id, once submitted
    number: int = 0

    @property
    def title(self) -> str:
        return f"{self.stage.verb} {self.evaluator}".strip()

    def stages(self, cell: Cell) -> list[Stage]:
        """Return what the job of ``cell`` does."""
        untrained = self.stage is Stage.GENERATE and not cell.trains
        return [Stage.TRAIN, Stage.GENERATE] if untrained else [self.stage]


@dataclass
class _Chain:
    """Cells that go through the same stages with the same resources."""

    train: Resources | None
    generate: Resources | None
    works: list[Work]


def arrays(slurm: dict[str, Any], works: Iterable[Work], scored: Callable[[Cell], Sequence[Score]]) -> list[Array]:
    """All that is missing, predecessors first. Rows that share weights and images are worked on once.

    ``scored``: the evaluators of a cell, in the same order for all.
    """
    found: list[Array] = []
    for chain in _chains(slurm, works):
        for start in range(0, len(chain.works), LARGEST):
            found += _arrays_of(slurm, chain, chain.works[start : start + LARGEST], scored)
    for number, array in enumerate(found):
        array.number = number
    return found


def _chains(slurm: dict[str, Any], works: Iterable[Work]) -> list[_Chain]:
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
    slurm: dict[str, Any], chain: _Chain, works: Sequence[Work], scored: Callable[[Cell], Sequence[Score]]
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


def _lacks(work: Work, score: Score) -> bool:
    sets = [work.cell.images, *(images for _, images in work.cell.milestones)]
    names = {f"{images}/{score.file.removesuffix('.parquet')}" for images in sets}
    return any(part.id in names for part in work.todo)


# -- submission -------------------------------------------------------------------------------------------------------


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


# -- what SLURM knows of submitted jobs -------------------------------------------------------------------------------


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

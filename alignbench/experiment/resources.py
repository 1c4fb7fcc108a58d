"""Resources that each stage requests from SLURM, from the sweep's ``slurm:`` section and a cluster file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, field

from alignbench.config import Config, UserError, decode, join, load_yaml, merge
from alignbench.experiment.spec import Count
from alignbench.plugins import Registry
from alignbench.store.stages import Stage, Verb

if TYPE_CHECKING:
    from alignbench.experiment.cells import PlannedRun

MAX_ARRAY_TASKS = 1000  # tasks of an array; SLURM's default MaxArraySize is 1001
CLOCK = r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE"
TIME_FORM = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds] or UNLIMITED"
Time = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=rf"^(?i:{CLOCK})\Z", description=TIME_FORM)]
MEMORY_FORM = "megabytes, a number with K, M, G or T such as 64G, or 0 for all memory of a node"
Memory = (
    Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^(?i:[0-9]+([KMGT]B?)?)\Z", description=MEMORY_FORM)]
)


class Resources(Config):
    """Resources that a job requests from SLURM. Those that are not set have the cluster's defaults."""

    partition: str | None = None
    nodes: Count = 1
    gpus_per_node: Annotated[int, Meta(ge=0)] = 0
    tasks_per_node: Count | None = None  # ranks on a node; None: one per GPU, or one without GPUs
    cpus_per_task: Count | None = None
    time: Time | None = None  # in SLURM's forms; 0: no limit
    mem: Memory | None = None  # per node, in SLURM's forms
    constraint: str | None = None
    qos: str | None = None
    account: str | None = None
    array_parallelism: Count = 256  # tasks of an array that run at the same time
    setup: list[str] = field(default_factory=list)  # lines of shell before the job's own command
    additional: dict[str, Any] = field(default_factory=dict)  # further options of sbatch
    signal: Count = 90  # seconds before its time limit at which a job starts to save its work
    parallel: Literal["ddp", "fsdp"] = "ddp"  # how the ranks of a training run share the model

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def seconds(self) -> float:
        """``time`` in seconds; infinite if it is not set."""
        if self.time is None or str(self.time).upper() in ("0", "UNLIMITED", "INFINITE"):
            return math.inf
        days, dash, clock = str(self.time).rpartition("-")
        fields = [int(part) for part in clock.split(":")]
        if not dash and len(fields) < 3:  # minutes[:seconds]
            fields.insert(0, 0)
        hours, minutes, seconds = [*fields, 0, 0][:3]
        return 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds

    def options(self) -> dict[str, Any]:
        """Return the options under submitit's names."""
        same = ("partition", "nodes", "cpus_per_task", "time", "mem", "constraint", "qos", "account")
        chosen = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        gpus = {"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}
        return {
            "time": None,  # else submitit's default: five minutes
            **chosen,
            **gpus,
            "ntasks_per_node": self.ranks_per_node,
            "array_parallelism": self.array_parallelism,
            "signal_delay_s": self.signal,
            "stderr_to_stdout": True,
            "srun_args": [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else None,  # not inherited
        }


class Slurm(Resources):
    """Resources of all jobs, with exceptions by stage, backend, method (training) and evaluator."""

    stages: dict[Verb, dict[str, Any]] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluators: dict[str, dict[str, Any]] = field(default_factory=dict)


SECTIONS = ("stages", "backends", "methods", "evaluators")


def check_options(options: Any, where: str, registry: Registry) -> None:
    """Raise UserError for an unknown setting, or settings of an unknown method, evaluator or backend."""
    checked = decode(Slurm, options, where)
    for section in SECTIONS:
        for name, own in getattr(checked, section).items():
            if section != "stages":
                registry.entry(section.removesuffix("s"), name, join(where, section))  # type: ignore[arg-type]
            decode(Resources, own, join(where, f"{section}.{name}"))


def read(sweep: dict[str, Any], file: str | None, registry: Registry) -> dict[str, Any]:
    """Return a sweep's ``slurm`` section (already checked), overridden by the cluster file."""
    if file is None:
        return sweep
    cluster = load_yaml(Path(file))
    check_options(cluster, f"{file}: ", registry)
    return merge(sweep, cluster)


def resources(slurm: dict[str, Any], stage: Stage, cell: PlannedRun, evaluator: str = "") -> Resources:
    """Return the resources of one job: the common ones, overridden by stage, then backend, then method or evaluator."""
    merged: dict[str, Any] = {key: value for key, value in slurm.items() if key not in SECTIONS}
    overrides = [("stages", str(stage.verb))]
    if stage is not Stage.SCORE:
        overrides.append(("backends", cell.spec.backend["name"]))
    if stage is Stage.TRAIN:
        overrides.append(("methods", cell.spec.method["name"]))
    if evaluator:
        overrides.append(("evaluators", evaluator))
    for section, name in overrides:
        merged = merge(merged, slurm.get(section, {}).get(name) or {})
    job = decode(Resources, merged, "slurm")
    if job.seconds <= job.signal:
        what = f"{stage.verb}: {job.time} is not longer than the {job.signal} s reserved for saving at the end"
        raise UserError(f"slurm.time: {what}; raise time or lower signal")
    return job

"""Resources that each stage requests from SLURM, from the sweep's ``slurm:`` section and a cluster file."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, field

from alignbench.config import Config, UserError, decode, join, load_yaml, merge
from alignbench.experiment.spec import Count
from alignbench.plugins import Registry
from alignbench.store.stages import Stage, Verb

if TYPE_CHECKING:
    from alignbench.experiment.cells import PlannedRun

Option = str | int | float | bool | list[str | int] | None
SETTINGS = {  # option of sbatch and srun -> the setting that it would contradict
    **{name: name for name in ("partition", "nodes", "constraint", "qos", "account", "time", "signal")},
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "mem"),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cpus_per_task"),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "tasks-per-node", "ntasks-per-gpu"), "tasks_per_node"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres"), "gpus_per_node"),
}
ODD = r"[\\\n\r]"  # what SLURM does not take in an option of a batch file, quoted or not
ALWAYS = ("nodes", "tasks_per_node", "signal")  # settings that every job states, set or not
OURS = (
    *("array", "chdir", "cluster", "clusters", "dependency", "error", "job-name", "kill-on-bad-exit"),
    *("kill-on-invalid-dep", "no-requeue", "open-mode", "output", "parsable", "requeue", "test-only", "wait", "wrap"),
)
SHORT = {"n": "ntasks", "N": "nodes", "c": "cpus-per-task", "o": "output", "e": "error", "D": "chdir", "G": "gpus"}
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
    gpus_per_node: Annotated[int, Meta(ge=0)] | str = 0  # with or without their type: 4, or a100:4
    tasks_per_node: Count | None = None  # ranks on a node; None: one per GPU, or one without GPUs
    cpus_per_task: Count | None = None
    time: Time | None = None  # in SLURM's forms; 0: no limit
    mem: Memory | None = None  # per node, in SLURM's forms
    constraint: str | None = None
    qos: str | None = None
    account: str | None = None
    array_parallelism: Count = 256  # tasks of an array that run at the same time
    setup: list[str] = field(default_factory=list)  # lines of shell before the job's own command
    srun: list[str] = field(default_factory=list)  # further words of srun, such as --container-image=IMAGE
    python: str | None = None  # the command that starts Python in the job, in a container; None: this interpreter
    additional: dict[str, Option] = field(default_factory=dict)  # further options of sbatch; false and null: none
    signal: Count = 90  # seconds before its time limit at which a job starts to save its work
    parallel: Literal["ddp", "fsdp"] = "ddp"  # how the ranks of a training run share the model

    def __post_init__(self) -> None:
        """Raise UserError for what SLURM would not take, or an option that says what a setting or alignbench says."""
        gpus = str(self.gpus_per_node)
        if not re.fullmatch(r"([\w.-]+:)?\d+", gpus):
            raise UserError(f"gpus_per_node: '{gpus}' is neither a number of GPUs (4) nor a type and a number (a100:4)")
        if self.python is not None and not _words(self.python):
            raise UserError(f"python: '{self.python}' is not a command; write for instance python3")
        for where, option, value in self._further_options():
            self._check_option(where, option, value)
        for name, text in self.options().items():
            if odd := re.search(ODD, text):
                raise UserError(f"{name}: SLURM takes no text with {odd[0]!r}")

    def _further_options(self) -> Iterator[tuple[str, str, str]]:
        """Yield the place, the long name and the value of every option of ``additional`` and ``srun``."""
        names = [key.replace("_", "-") for key in self.additional]
        for (key, value), name in zip(self.additional.items(), names):
            if not re.fullmatch(r"[a-z][a-z0-9-]+", name) or names.count(name) > 1:
                raise UserError(f"additional.{key}: write sbatch's option once, in full and without leading dashes")
            if value is not None:
                yield f"additional.{key}", name, str(_text(value))
        for word in self.srun:
            option, _, text = word.partition("=")
            if not word or (word.startswith("-") and re.search(r"\s", option)):
                raise UserError(f"srun: '{word}' is not one word; write --option=value")
            short = SHORT.get(option[1:2], "") if option.startswith("-") else ""
            if long := option[2:] if option.startswith("--") else short:
                yield f"srun: {word}", long, text

    def _check_option(self, where: str, option: str, text: str) -> None:
        """Raise UserError if an option, possibly abbreviated, says what a setting or alignbench itself says."""
        known = (*SETTINGS, *OURS)
        rival = option if option in known else next((own for own in known if own.startswith(option)), None)
        if rival is None or (rival == "gres" and not re.search(r"(^|[,:/])gpu\b", text)):
            return
        if rival in OURS:
            raise UserError(f"{where}: alignbench itself sets --{rival}; leave it out")
        setting = SETTINGS[rival]
        value = getattr(self, setting)
        if value or (value == 0 and setting in ("mem", "time")):  # 0: all memory, no limit
            raise UserError(f"{where}: the setting {setting} says it, too ({value}); leave one of them out")
        if setting in ALWAYS:
            raise UserError(f"{where}: write the setting {setting} instead")
        if setting == "gpus_per_node" and self.tasks_per_node is None:
            what = "one rank is started for each GPU of the setting gpus_per_node"
            raise UserError(f"{where}: {what}; write that instead (4, or a100:4), or set tasks_per_node, too")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, int(str(self.gpus_per_node).rpartition(":")[2]))

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

    def options(self) -> dict[str, str]:
        """Return the options of sbatch and their values; "" for an option without one."""
        same = ("partition", "nodes", "cpus_per_task", "time", "mem", "constraint", "qos", "account")
        chosen: dict[str, Option] = {name: getattr(self, name) for name in same}
        chosen |= {"gpus_per_node": self.gpus_per_node or None, "ntasks_per_node": self.ranks_per_node}
        chosen |= {"signal": f"USR2@{self.signal}", **self.additional}
        texts = {name.replace("_", "-"): _text(value) for name, value in chosen.items()}
        return {name: text for name, text in texts.items() if text is not None}

    def srun_options(self) -> list[str]:
        """Return the words between srun and the job's command."""
        inherited = [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []  # not by srun itself
        return [*inherited, *self.srun]


def _text(value: Option) -> str | None:
    """Return an option's value as sbatch takes it; "" if it has none, None if the option is left out."""
    if value is None or value is False or value == []:
        return None
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is True else str(value)


def _words(command: str) -> list[str]:
    """Return the words of a shell command; none if its quotes do not match."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


class Slurm(Resources):
    """Resources of all jobs, with exceptions by stage, backend, method (training) and evaluator."""

    array_size: Count = 1000  # tasks of an array; SLURM's MaxArraySize is one more, 1001 by default
    submit_limit: Count | None = None  # jobs of this store in the queue at a time, if a QOS or an account limits them
    stages: dict[Verb, dict[str, Any]] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluators: dict[str, dict[str, Any]] = field(default_factory=dict)


SECTIONS = ("stages", "backends", "methods", "evaluators")
LIMITS = ("array_size", "submit_limit")  # of a submission, not of a job


def check_options(options: Any, where: str, registry: Registry) -> None:
    """Raise UserError for an unknown setting, or settings of an unknown method, evaluator or backend."""
    checked = decode(Slurm, options, where)
    for section in SECTIONS:
        for name, own in getattr(checked, section).items():
            if section != "stages":
                registry.entry(section.removesuffix("s"), name, join(where, section))  # type: ignore[arg-type]
            decode(Resources, own, join(where, f"{section}.{name}"))
            decode(Resources, merge(_common(options), own), join(where, f"{section}.{name}"))


def _common(slurm: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that hold for all jobs."""
    return {key: value for key, value in slurm.items() if key not in (*SECTIONS, *LIMITS)}


def read(sweep: dict[str, Any], file: str | None, registry: Registry) -> dict[str, Any]:
    """Return a sweep's ``slurm`` section (already checked), overridden by the cluster file."""
    if file is None:
        return sweep
    cluster = load_yaml(Path(file))
    check_options(cluster, f"{file}: ", registry)
    merged = merge(sweep, cluster)
    check_options(merged, f"the sweep's slurm with {file}: ", registry)
    return merged


def resources(slurm: dict[str, Any], stage: Stage, cell: PlannedRun, evaluator: str = "") -> Resources:
    """Return the resources of one job: the common ones, overridden by stage, then backend, then method or evaluator."""
    merged = _common(slurm)
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

"""The state of a run: one answer for every verb, from what the store has and from what is known of its jobs.

What job records and SLURM say comes in as plain data: the store lies below both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from alignbench.store.artefacts import Artefact, Store
from alignbench.store.files import read_json
from alignbench.store.manifest import ManifestRun

STATES = ("done", "running", "requeued", "queued", "planned", "stale", "failed")
LOST = ("failed", "stale")  # the states that `alignbench retry` mends
WAITING = {"Dependency": "waits for the stage before", "None": "", "Priority": "", "Resources": ""}  # SLURM's reasons


class Job(NamedTuple):
    """A job that was handed out, and what SLURM says of it if it has not ended."""

    id: str  # SLURM's "12_3"; "" for a worker of a local sweep
    stage: str  # what it does, as "score hpsv2"
    progress: str  # the file in which it says how far it is
    pending: bool = False
    reason: str = ""  # why it waits
    restarts: int = 0
    left: str = ""  # of its time, as SLURM prints it


@dataclass(frozen=True)
class Jobs:
    """The jobs of a sweep by the ids of the artefacts that they make; by default, none was handed out."""

    live: Mapping[str, Job] = field(default_factory=dict)  # those that have not ended
    latest: Mapping[str, Job] = field(default_factory=dict)  # the last one handed out, ended or not
    ending: Callable[[str], str] = lambda job: ""  # how a job ended, in SLURM's words


class RunState(NamedTuple):
    """What there is to say of a run as a whole."""

    state: str  # one of STATES
    reason: str = ""  # why it failed, waits or was lost
    missing: Sequence[Artefact] = ()  # in the order in which they are made
    at: Artefact | None = None  # the one that is being made, is waited for, failed or was lost
    job: Job | None = None  # who makes it, or was to make it


def run_state(store: Store, run: ManifestRun, jobs: Callable[[], Jobs] = Jobs) -> RunState:
    """Return the state of a run. ``jobs`` is called only if something is missing: it may have to ask SLURM."""
    if _whole(store, run) or not (missing := run.missing(store)):
        return RunState("done")
    return _unfinished(missing, jobs())


def _whole(store: Store, run: ManifestRun) -> bool:
    """Is everything there? As ``run.missing``, but with few objects, for the thousands of runs that are done."""
    if run.milestones or run.imported:
        return False
    root = str(store.root)
    files = [f"images/{run.images}/manifest.parquet", *(score.file for score in run.scores)]
    files += [f"images/{score.base}/manifest.parquet" for score in run.scores if score.base is not None]
    files += [f"runs/{run.id}/weights.safetensors"] if run.trained else []
    if not all(os.path.exists(f"{root}/{file}") for file in files):
        return False
    return (read_json(f"{root}/runs/{run.id}/status.json") or {}).get("state") == "done"


def _unfinished(missing: Sequence[Artefact], jobs: Jobs) -> RunState:
    """A job at work or a held lock beats an old failure, which beats jobs that wait for others."""
    live = [(part, jobs.live[part.id]) for part in missing if part.id in jobs.live]
    for part, job in live:
        if not job.pending:
            return RunState("running", "", missing, part, job)
    for part in missing:
        if part.busy:
            return RunState("running", "", missing, part, jobs.latest.get(part.id))
    for part in missing:
        if part.id not in jobs.live and (reason := part.failure) is not None:
            return RunState("failed", reason, missing, part)
    for part, job in live:
        why = WAITING.get(job.reason, job.reason)
        return RunState("requeued" if job.restarts else "queued", why, missing, part, job)
    for part in missing:
        if (lost := jobs.latest.get(part.id)) is not None and lost.id:
            how = jobs.ending(lost.id)
            why = f"job {lost.id} has ended{f' ({how})' if how else ''} without having made it"
            return RunState("stale", f"{why}; alignbench retry makes it", missing, part, lost)
    kinds = ", ".join(dict.fromkeys(part.stage.kind for part in missing))
    return RunState("planned", f"not made yet: {kinds}", missing, missing[0])

"""The state of a run: one answer for every verb, from the contents of the store and what is known about its jobs.

Information from job records and SLURM is passed in as plain data, because this package may import neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from alignbench.store.artefacts import Artefact, Store
from alignbench.store.files import read_json
from alignbench.store.manifest import ManifestRun

UNKNOWN = "unknown here"  # a job was submitted, and this machine cannot ask SLURM
STATES = ("done", "running", "requeued", "queued", UNKNOWN, "planned", "stale", "failed")
LOST = ("failed", "stale")  # the states in which `alignbench retry` runs it again
WAITING = {  # SLURM's reason -> the one shown
    "Dependency": "waits for the previous stage",
    "None": "",
    "Priority": "",
    "Resources": "",
}


class Job(NamedTuple):
    """Submitted job and, if it has not ended, what SLURM says about it."""

    id: str  # as in SLURM, "12_3"; "" for a worker of a local sweep
    stage: str  # what it does, for instance "score hpsv2"
    progress: str  # path of its progress file
    pending: bool = False
    reason: str = ""  # why it is pending
    restarts: int = 0
    left: str = ""  # remaining time, as SLURM prints it
    host: str = ""  # where it was submitted


@dataclass(frozen=True)
class Jobs:
    """Jobs of a sweep, keyed by the ids of the artefacts that they make; by default, none was submitted."""

    live: Mapping[str, Job] = field(default_factory=dict)  # jobs that have not ended
    latest: Mapping[str, Job] = field(default_factory=dict)  # the job submitted last, ended or not
    ended: Mapping[str, str] = field(default_factory=dict)  # job id -> how the job ended, in SLURM's words
    unknown: str = ""  # why SLURM cannot be asked; "" if it was


class RunState(NamedTuple):
    """State of a run as a whole, with its reason."""

    state: str  # one of STATES
    reason: str = ""  # why the run failed, waits or was lost
    missing: Sequence[Artefact] = ()  # in the order in which they are made
    at: Artefact | None = None  # the artefact that decides the state: being made, awaited, failed or lost
    job: Job | None = None  # the job that makes this artefact, or should have made it


def run_state(store: Store, run: ManifestRun, jobs: Callable[[], Jobs] = Jobs) -> RunState:
    """Return the state of a run. ``jobs`` is called only if something is missing, because it may query SLURM."""
    if _is_complete(store, run) or not (missing := run.missing(store)):
        return RunState("done")
    return _unfinished(missing, jobs())


def _is_complete(store: Store, run: ManifestRun) -> bool:
    """Return whether the run has everything. Agrees with ``run.missing`` but makes few objects, for thousands of runs.

    May return False for a complete run that has milestones or was imported.
    """
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
    """Return the state of an incomplete run.

    A running job or a held lock takes precedence over an old failure or a lost job, and these over pending jobs.
    """
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
    for part in missing:
        lost = jobs.latest.get(part.id)
        if lost is not None and lost.id and part.id not in jobs.live and not part.done:  # made while SLURM was asked
            if jobs.unknown:
                why = f"{jobs.unknown} (job {lost.id} was submitted on {lost.host})"
                return RunState(UNKNOWN, why, missing, part, lost)
            how = jobs.ended.get(lost.id, "")
            why = f"job {lost.id} has ended{f' ({how})' if how else ''} without having made it"
            return RunState("stale", f"{why}; `alignbench retry` makes it", missing, part, lost)
    for part, job in live:
        why = WAITING.get(job.reason, job.reason)
        return RunState("requeued" if job.restarts else "queued", why, missing, part, job)
    kinds = ", ".join(dict.fromkeys(part.stage.kind for part in missing))
    return RunState("planned", f"not made yet: {kinds}", missing, missing[0])

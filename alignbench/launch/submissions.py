"""Records of launches: which job makes which artefact, readable from any machine that shares the store.

``jobs/<sweep>-<time>-<pid>/jobs.json`` lists the jobs of one launch under the key ``tickets``: a job, the artefacts
that it makes, and the file in which it reports its progress. With the store, and what SLURM says of its jobs, that
determines the state of a run.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from alignbench.launch import slurm
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json, write_json
from alignbench.store.machine import user
from alignbench.store.run_state import Job, Jobs

FILE = "jobs.json"
JOB = re.compile(r"(\d+_\d+)?")


class JobEntry(NamedTuple):
    """One job of a launch."""

    job: str  # SLURM's "12_3"; "" for a worker of a local sweep
    stage: str  # "train", "generate" or "score", with the evaluator
    makes: list[str]  # ids of artefacts
    run: str  # run id
    progress: str  # file


class Submission(NamedTuple):
    """The record of one launch, to SLURM or on this machine."""

    folder: Path
    sweep: str  # stem of its manifest
    launcher: str
    name: str  # of its jobs in SLURM
    options: dict[str, Any]  # resources, as resolved from sweep and cluster file
    submitted: float
    host: str
    pid: int  # of the process that submitted it
    jobs: list[JobEntry]


def write(
    folder: Path, sweep: str, launcher: str, jobs: Sequence[JobEntry], name: str = "", options: Any = None
) -> None:
    """Record a launch; called again whenever it has submitted more jobs."""
    origin = {"host": socket.gethostname(), "pid": os.getpid(), "user": user()}
    about = {"sweep": sweep, "launcher": launcher, "name": name, "options": options or {}, "submitted": time.time()}
    write_json(folder / FILE, about | origin | {"tickets": [job._asdict() for job in jobs]})


def read(store: Store, sweep: str | None = None) -> list[Submission]:
    """Return all launches, or those of one sweep, latest first. Unreadable and invalid records are skipped."""
    records = []
    for path in (store.root / "jobs").glob(f"*/{FILE}"):
        with suppress(TypeError, KeyError, OSError, msgspec.ValidationError):
            data = read_json(path) or {}
            jobs = [[entry[key] for key in JobEntry._fields] for entry in data["tickets"]]
            about = data | {"folder": path.parent, "jobs": jobs}
            record = msgspec.convert([about[key] for key in Submission._fields], Submission)
            if all(JOB.fullmatch(entry.job) for entry in record.jobs):
                records.append(record)
    chosen = [record for record in records if sweep is None or record.sweep == sweep]
    return sorted(chosen, key=lambda record: -record.submitted)


def live_jobs(submissions: Iterable[Submission]) -> dict[str, tuple[JobEntry, slurm.LiveJob]]:
    """Return the artefacts that queued or running SLURM jobs will make, with their jobs. SLURM is asked once."""
    on_slurm = [submission for submission in submissions if submission.launcher == "slurm"]
    live = slurm.live(submission.name for submission in on_slurm)
    jobs = [job for submission in reversed(on_slurm) for job in submission.jobs]
    return {artefact: (job, live[job.job]) for job in jobs if job.job in live for artefact in job.makes}


def known_jobs(submissions: Sequence[Submission]) -> Callable[[], Jobs]:
    """Return the callable that ``run_state`` expects, for a sweep's submissions, latest first. SLURM is asked once."""

    @functools.cache
    def ask() -> Jobs:
        live = {artefact: _job(entry, job) for artefact, (entry, job) in live_jobs(submissions).items()}
        jobs = [job for submission in reversed(submissions) for job in submission.jobs]
        latest = {artefact: _job(job) for job in jobs for artefact in job.makes}
        return Jobs(live, latest, slurm.final_state)

    return ask


def _job(entry: JobEntry, live: slurm.LiveJob | None = None) -> Job:
    status = (live.state == "PENDING", live.reason, live.restarts, live.left) if live else ()
    return Job(entry.job, entry.stage, entry.progress, *status)

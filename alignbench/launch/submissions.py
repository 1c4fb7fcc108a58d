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
import sys
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from alignbench.launch import slurm
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json, write_json
from alignbench.store.machine import user
from alignbench.store.manifest import Manifest
from alignbench.store.run_state import Job, Jobs
from alignbench.store.shell import NoAnswer

FILE = "jobs.json"
NOT_LISTED = "squeue does not list it, but sacct does"
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
    """Return all launches, or those of one sweep, latest first. Skip unreadable and invalid records, and say so."""
    records = []
    for folder in (store.root / "jobs").glob("*"):
        path = folder / FILE
        try:
            if (data := read_json(path)) is not None or path.exists():
                records.append(_submission(folder, data or {}))
        except OSError as error:
            _remark(path, f"cannot be read: {error.strerror}")
        except (TypeError, KeyError, ValueError):
            _remark(path, "is not a record of jobs")
    chosen = [record for record in records if sweep is None or record.sweep == sweep]
    return sorted(chosen, key=lambda record: -record.submitted)


def _submission(folder: Path, data: dict[str, Any]) -> Submission:
    """Return a launch from its record. Raise TypeError, KeyError or ValueError if the record is invalid."""
    jobs = [[entry[key] for key in JobEntry._fields] for entry in data["tickets"]]
    about = data | {"folder": folder, "jobs": jobs}
    record = msgspec.convert([about[key] for key in Submission._fields], Submission)
    if odd := next((entry.job for entry in record.jobs if not JOB.fullmatch(entry.job)), None):
        raise ValueError(odd)
    return record


@functools.cache
def _remark(path: Path, why: str) -> None:
    """Print, once, that the jobs of a launch are not known."""
    print(f"alignbench: {path}: {why}; its jobs are taken for not submitted", file=sys.stderr)


def queued(records: Iterable[Submission]) -> set[str]:
    """Return the jobs of these launches that SLURM lists. Raise NoAnswer if it cannot be asked."""
    on_slurm = [record for record in records if record.launcher == "slurm"]
    return slurm.live({record.name for record in on_slurm}).keys() & {e.job for r in on_slurm for e in r.jobs}


class SlurmJobs(NamedTuple):
    """SLURM's answer about the jobs that make some artefacts."""

    live: dict[str, tuple[JobEntry, slurm.LiveJob]]  # artefact -> the queued or running job that makes it
    ended: dict[str, str]  # job -> how it ended, in SLURM's words


def slurm_jobs(submissions: Iterable[Submission], wanted: Container[str]) -> SlurmJobs:
    """Ask SLURM, once, about the jobs that make the artefacts ``wanted``. Raise NoAnswer if that is not possible.

    A job that squeue does not list, but accounting calls queued or running, has not ended.
    """
    on_slurm = [record for record in submissions if record.launcher == "slurm"]
    entries = [(id, job) for record in reversed(on_slurm) for job in record.jobs for id in job.makes if id in wanted]
    listed = slurm.live({record.name for record in on_slurm}) if entries else {}
    states = slurm.accounted({job.job for _, job in entries} - listed.keys())
    unlisted = {job: slurm.LiveJob(state, NOT_LISTED, 0, "") for job, state in states.items() if state in slurm.ACTIVE}
    live = listed | unlisted
    return SlurmJobs({id: (job, live[job.job]) for id, job in entries if job.job in live}, states)


def known_jobs(store: Store, manifest: Manifest) -> Callable[[], Jobs]:
    """Return the callable that ``run_state`` expects, for the runs of a sweep, whichever sweep submitted their jobs."""

    @functools.cache
    def ask() -> Jobs:
        wanted = {artefact.id for run in manifest.runs for artefact in run.missing(store)}
        records = read(store)
        latest = {
            id: _job(entry)._replace(host=record.host)
            for record in reversed(records)
            for entry in record.jobs
            for id in entry.makes
            if id in wanted
        }
        try:
            live, ended = slurm_jobs(records, wanted)
        except NoAnswer as error:
            return Jobs({}, latest, unknown=str(error))
        return Jobs({id: _job(entry, status) for id, (entry, status) in live.items()}, latest, ended)

    return ask


def _job(entry: JobEntry, live: slurm.LiveJob | None = None) -> Job:
    status = (live.waits, live.reason, live.restarts, live.left) if live else ()
    return Job(entry.job, entry.stage, entry.progress, *status)

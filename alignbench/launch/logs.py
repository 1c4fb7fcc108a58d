"""Logs of runs: the run's log files, or what SLURM kept of jobs that ended before they could open one."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

from alignbench.config import UserError, did_you_mean
from alignbench.launch import submissions
from alignbench.store.artefacts import Store
from alignbench.store.locks import alive
from alignbench.store.shell import NoAnswer


def read(store: Store, run: str, follow: bool = False) -> Iterator[str]:
    """Yield what a run's jobs have written so far; with ``follow``, also what they write until none is left.

    ``run``: a run id, or the beginning of one. Raise UserError if there is no such run, or nothing was written.
    """
    folder = _run_folder(store, run)
    files = [folder / "log.txt", *sorted(folder.glob("log.rank*.txt"))]
    files = [file for file in files if file.is_file()] or _job_output(store, folder.name)
    if not files and not follow:
        raise UserError(f"{folder.name}: nothing was written yet")
    positions = dict.fromkeys(files, 0)
    while True:
        for file, position in positions.items():
            with file.open(encoding="utf-8", errors="replace") as opened:
                opened.seek(position)
                yield opened.read()
                positions[file] = opened.tell()
        if not follow or not _active(store, folder.name):
            return
        time.sleep(1.0)
        positions |= {file: 0 for file in [folder / "log.txt"] if file.is_file() and file not in positions}


def _run_folder(store: Store, run: str) -> Path:
    """Return the folder of the run whose id is, or uniquely begins with, ``run``."""
    launched = {job.run for submission in submissions.read(store) for job in submission.jobs}
    known = sorted(launched | {path.name for path in (store.root / "runs").glob("*")})
    matches = [id for id in known if id == run] or [id for id in known if id.startswith(run)]
    if not matches:
        raise UserError(f"{run}: there is no such run{did_you_mean(run, known, 'runs')}")
    if len(matches) > 1:
        raise UserError(f"{run}: several run ids begin with it: {', '.join(matches)}")
    return store.root / "runs" / matches[0]


def _job_output(store: Store, run: str) -> list[Path]:
    """Return what SLURM kept of jobs that ended before they could open the run's log."""
    return [
        file
        for submission in submissions.read(store)
        for job in submission.jobs
        if job.run == run and job.job
        for file in sorted(submission.folder.glob(f"{job.job}_*_log.*"))
    ]


def _active(store: Store, run: str) -> bool:
    """Return whether a job makes an artefact of this run, or is about to."""
    launches = [record for record in submissions.read(store) if any(job.run == run for job in record.jobs)]
    wanted = {id for record in launches for job in record.jobs if job.run == run for id in job.makes}
    try:
        if submissions.slurm_jobs(launches, wanted).live:
            return True
    except NoAnswer:  # it may still be active
        return True
    return any(
        record.launcher != "slurm" and record.host == socket.gethostname() and alive(record.pid) for record in launches
    )

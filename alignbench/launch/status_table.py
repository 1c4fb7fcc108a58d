"""What was handed out for whom: a record of each launch in the store, from which any machine tells how far it is.

``jobs/<sweep>-<time>-<pid>/jobs.json`` lists tickets: a job, the artefact that it makes, and the file in which it says
how far it is. Together with the store and, for SLURM's jobs, with what SLURM says, that is a run's state.
"""

from __future__ import annotations

import functools
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, did_you_mean
from alignbench.launch import slurm
from alignbench.launch.submissions import JobEntry, Submission, submissions, under_way
from alignbench.store.artefacts import Store
from alignbench.store.locks import alive
from alignbench.store.manifest import Manifest, ManifestRun
from alignbench.store.run_state import LOST, STATES, Job, Jobs, run_state
from alignbench.store.text_table import printable, text_table


def handed_out(records: Sequence[Submission]) -> Callable[[], Jobs]:
    """Return what ``run_state`` asks: the jobs of a sweep's records, latest record first. SLURM is asked once."""

    @functools.cache
    def ask() -> Jobs:
        live = {id: _job(ticket, job) for id, (ticket, job) in under_way(records).items()}
        tickets = [ticket for record in reversed(records) for ticket in record.tickets]
        latest = {id: _job(ticket) for ticket in tickets for id in ticket.makes}
        return Jobs(live, latest, slurm.ended)

    return ask


def _job(ticket: JobEntry, live: slurm.Live | None = None) -> Job:
    said = (live.state == "PENDING", live.reason, live.restarts, live.left) if live else ()
    return Job(ticket.job, ticket.stage, ticket.progress, *said)


class Row(NamedTuple):
    """One run of a sweep."""

    title: str
    id: str
    state: str  # one of STATES
    step: str  # what is made now, and how far it is
    left: str  # of the job's time
    job: str
    reason: str


def rows(store: Store, manifest: Manifest, records: Sequence[Submission]) -> list[Row]:
    """Every run of a manifest. ``records``: those of its sweep, latest first."""
    jobs = handed_out(records)
    return [_row(store, run, jobs) for run in manifest.runs]


def _row(store: Store, run: ManifestRun, jobs: Callable[[], Jobs]) -> Row:
    state, reason, missing, at, job = run_state(store, run, jobs)
    step, left = job.stage if job else "", ""
    if state == "running" and at:
        step, left = (progress(job), job.left) if job else (at.stage.verb, "")
    elif state == "planned":
        step, reason = ", ".join(dict.fromkeys(part.stage.verb for part in missing)), ""
    return Row(run.title, run.id, state, step, left, job.id if job else "", reason)


def progress(job: Job) -> str:
    """``training 45%, update 22, reward 0.612``."""
    said: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        said = json.loads(Path(job.progress).read_text(encoding="utf-8"))
    if "stage" not in said:
        return f"{job.stage}, starting"
    share = "" if said.get("share") is None else f" {said['share']:.0%}"
    detail = f", {said['detail']}" if said.get("detail") else ""
    return f"{said['stage']}{share}{detail}"


def exit_code(rows: Iterable[Row]) -> int:
    """0 all done, 2 some failed or were lost, 3 some are still to come."""
    states = {row.state for row in rows}
    return 2 if states & set(LOST) else 3 if states - {"done"} else 0


def summary(rows: Sequence[Row]) -> str:
    """``10 done, 2 queued``."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a text table without the columns that are empty everywhere, and below it their summary."""
    heads = ("run", "folder", "state", "step", "time left", "job", "reason")
    kept = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    shown = text_table([[row[i] for i in kept] for row in (heads, *rows)], fold=True)
    return f"{shown}\n{summary(rows)}"


def follow(store: Store, manifest: Manifest, sweep: str, every: float = 5.0) -> None:
    """Show how far a sweep is until nothing of it is queued or running. Ctrl-C ends this, not the jobs."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        before: dict[str, str] = {}
        while True:
            found = rows(store, manifest, submissions(store, sweep))
            for row in found:
                if row.state in ("done", *LOST) and before.get(row.id) not in (None, row.state):
                    end = f"{row.title}: {row.state}{f' ({row.reason})' if row.reason else ''}"
                    console.print(printable(end), markup=False, highlight=False)
            before = {row.id: row.state for row in found}
            if not {row.state for row in found} & {"running", "requeued", "queued"}:
                return
            if console.is_terminal:
                live.update(Text(table(found)), refresh=True)
            time.sleep(every)


def log(store: Store, run: str, follow: bool = False) -> Iterator[str]:
    """What a run's jobs have written so far; with ``follow``, what they go on to write until none is left."""
    folder = _run_folder(store, run)
    files = [folder / "log.txt", *sorted(folder.glob("log.rank*.txt"))]
    files = [file for file in files if file.is_file()] or _job_output(store, folder.name)
    if not files and not follow:
        raise UserError(f"{folder.name}: nothing was written yet")
    read = dict.fromkeys(files, 0)
    while True:
        for file, place in read.items():
            with file.open(encoding="utf-8", errors="replace") as opened:
                opened.seek(place)
                yield opened.read()
                read[file] = opened.tell()
        if not follow or not _active(store, folder.name):
            return
        time.sleep(1.0)
        read |= {file: 0 for file in [folder / "log.txt"] if file.is_file() and file not in read}


def _run_folder(store: Store, run: str) -> Path:
    """Of the run whose folder's name is, or begins with, ``run``."""
    launched = {ticket.run for record in submissions(store) for ticket in record.tickets}
    known = sorted(launched | {path.name for path in (store.root / "runs").glob("*")})
    found = [name for name in known if name == run] or [name for name in known if name.startswith(run)]
    if len(found) != 1:
        what = (
            f"several runs begin so: {', '.join(found)}"
            if found
            else f"there is no such run{did_you_mean(run, known, 'runs')}"
        )
        raise UserError(f"{run}: {what}")
    return store.root / "runs" / found[0]


def _job_output(store: Store, run: str) -> list[Path]:
    """What SLURM kept of jobs that ended before they could open the run's own log."""
    found = []
    for record in submissions(store):
        for ticket in record.tickets:
            if ticket.run == run and ticket.job:
                found += sorted(record.folder.glob(f"{ticket.job}_*_log.*"))
    return found


def _active(store: Store, run: str) -> bool:
    """Is somebody making something of this run, or about to?"""
    mine = [record for record in submissions(store) if any(ticket.run == run for ticket in record.tickets)]
    if any(ticket.run == run for ticket, _ in under_way(mine).values()):
        return True
    return any(
        record.launcher != "slurm" and record.host == socket.gethostname() and alive(record.pid) for record in mine
    )

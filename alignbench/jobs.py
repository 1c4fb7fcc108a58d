"""What was handed out for whom: a record of each launch in the store, from which any machine tells how far it is.

``jobs/<sweep>-<time>-<pid>/jobs.json`` lists tickets: a job, the artefact that it makes, and the file in which it says
how far it is. Together with the store and, for SLURM's jobs, with what SLURM says, that is a run's state.
"""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from alignbench import slurm
from alignbench.config import UserError, did_you_mean
from alignbench.manifest import Manifest, ManifestRun
from alignbench.run_state import LOST, STATES, Job, Jobs, run_state
from alignbench.store import Store, alive, read_json, write_json

RECORD = "jobs.json"
JOB = re.compile(r"(\d+_\d+)?")


class Ticket(NamedTuple):
    """One job's share of a launch."""

    job: str  # SLURM's "12_3"; "" for a worker of a local sweep
    stage: str  # "train", "generate" or "score"
    makes: list[str]  # ids of artefacts
    run: str
    progress: str  # file


class Record(NamedTuple):
    """One launch."""

    folder: Path
    sweep: str  # stem of its manifest
    launcher: str
    name: str  # of its jobs in SLURM
    options: dict[str, Any]  # resources, as resolved from sweep and cluster file
    submitted: float
    host: str
    pid: int  # of the process that handed it out
    tickets: list[Ticket]


def write(
    folder: Path, sweep: str, launcher: str, tickets: Sequence[Ticket], name: str = "", options: Any = None
) -> None:
    """Put a launch on record; again whenever it has handed out more."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "user": getpass.getuser()}
    about = {"sweep": sweep, "launcher": launcher, "name": name, "options": options or {}, "submitted": time.time()}
    write_json(folder / RECORD, about | here | {"tickets": [ticket._asdict() for ticket in tickets]})


def records(store: Store, sweep: str | None = None) -> list[Record]:
    """Of all launches, or of a sweep's, latest first. What cannot be read (somebody else's file) is passed over."""
    found = []
    for path in (store.root / "jobs").glob(f"*/{RECORD}"):
        with suppress(TypeError, KeyError, ValueError, OSError):
            data = read_json(path) or {}
            tickets = [Ticket(**ticket) for ticket in data.pop("tickets")]
            if all(JOB.fullmatch(ticket.job) for ticket in tickets):
                about = {key: data[key] for key in Record._fields if key not in ("folder", "tickets")}
                found.append(Record(folder=path.parent, tickets=tickets, **about))
    chosen = [record for record in found if sweep is None or record.sweep == sweep]
    return sorted(chosen, key=lambda record: -record.submitted)


def under_way(records: Iterable[Record]) -> dict[str, tuple[Ticket, slurm.Live]]:
    """Artefact -> the job of SLURM's that will make it."""
    records = [record for record in records if record.launcher == "slurm"]
    live = slurm.live(record.name for record in records)
    tickets = [ticket for record in reversed(records) for ticket in record.tickets]
    return {id: (ticket, live[ticket.job]) for ticket in tickets if ticket.job in live for id in ticket.makes}


def handed_out(records: Sequence[Record]) -> Callable[[], Jobs]:
    """Return what ``run_state`` asks: the jobs of a sweep's records, latest record first. SLURM is asked once."""

    @functools.cache
    def ask() -> Jobs:
        live = {id: _job(ticket, job) for id, (ticket, job) in under_way(records).items()}
        tickets = [ticket for record in reversed(records) for ticket in record.tickets]
        latest = {id: _job(ticket) for ticket in tickets for id in ticket.makes}
        return Jobs(live, latest, slurm.ended)

    return ask


def _job(ticket: Ticket, live: slurm.Live | None = None) -> Job:
    said = (live.state == "PENDING", live.reason, live.restarts, live.left) if live else ()
    return Job(ticket.job, ticket.stage, ticket.progress, *said)


# -- states -----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One run of a sweep."""

    title: str
    id: str
    state: str  # one of STATES
    step: str  # what is made now, and how far it is
    left: str  # of the job's time
    job: str
    reason: str


def rows(store: Store, manifest: Manifest, records: Sequence[Record]) -> list[Row]:
    """Every run of a manifest. ``records``: those of its sweep, latest first."""
    jobs = handed_out(records)
    return [_row(store, run, jobs) for run in manifest.runs]


def _row(store: Store, run: ManifestRun, jobs: Callable[[], Jobs]) -> Row:
    state, reason, missing, at, job = run_state(store, run, jobs)
    step, left = job.stage if job else "", ""
    if state == "running" and at:
        step, left = (progress(job), job.left) if job else (slurm.STAGES[at.kind], "")
    elif state == "planned":
        step, reason = ", ".join(dict.fromkeys(slurm.STAGES[part.kind] for part in missing)), ""
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
    """Columns as wide as their content; without those that are empty everywhere."""
    heads = ("run", "folder", "state", "step", "time left", "job", "reason")
    shown = [heads, *([_plain(entry) for entry in row] for row in rows)]
    kept = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in shown[1:])]
    widths = {i: max(len(row[i]) for row in shown) for i in kept}
    lines = ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in shown]
    return "\n".join([*lines, summary(rows)])


def _plain(text: str) -> str:
    """In one line, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def follow(store: Store, manifest: Manifest, sweep: str, every: float = 5.0) -> None:
    """Show how far a sweep is until nothing of it is queued or running. Ctrl-C ends this, not the jobs."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        before: dict[str, str] = {}
        while True:
            found = rows(store, manifest, records(store, sweep))
            for row in found:
                if row.state in ("done", *LOST) and before.get(row.id) not in (None, row.state):
                    end = f"{row.title}: {row.state}{f' ({row.reason})' if row.reason else ''}"
                    console.print(_plain(end), markup=False, highlight=False)
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
    launched = {ticket.run for record in records(store) for ticket in record.tickets}
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
    for record in records(store):
        for ticket in record.tickets:
            if ticket.run == run and ticket.job:
                found += sorted(record.folder.glob(f"{ticket.job}_*_log.*"))
    return found


def _active(store: Store, run: str) -> bool:
    """Is somebody making something of this run, or about to?"""
    mine = [record for record in records(store) if any(ticket.run == run for ticket in record.tickets)]
    if any(ticket.run == run for ticket, _ in under_way(mine).values()):
        return True
    return any(
        record.launcher != "slurm" and record.host == socket.gethostname() and alive(record.pid) for record in mine
    )

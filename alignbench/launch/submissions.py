"""Records of what was submitted: which job makes which artefact."""

from __future__ import annotations

import getpass
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.launch import slurm
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json, write_json

RECORD = "jobs.json"
JOB = re.compile(r"(\d+_\d+)?")


class JobEntry(NamedTuple):
    """One job's share of a launch."""

    job: str  # SLURM's "12_3"; "" for a worker of a local sweep
    stage: str  # "train", "generate" or "score"
    makes: list[str]  # ids of artefacts
    run: str
    progress: str  # file


class Submission(NamedTuple):
    """One launch."""

    folder: Path
    sweep: str  # stem of its manifest
    launcher: str
    name: str  # of its jobs in SLURM
    options: dict[str, Any]  # resources, as resolved from sweep and cluster file
    submitted: float
    host: str
    pid: int  # of the process that handed it out
    tickets: list[JobEntry]


def write(
    folder: Path, sweep: str, launcher: str, tickets: Sequence[JobEntry], name: str = "", options: Any = None
) -> None:
    """Put a launch on record; again whenever it has handed out more."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "user": getpass.getuser()}
    about = {"sweep": sweep, "launcher": launcher, "name": name, "options": options or {}, "submitted": time.time()}
    write_json(folder / RECORD, about | here | {"tickets": [ticket._asdict() for ticket in tickets]})


def submissions(store: Store, sweep: str | None = None) -> list[Submission]:
    """Of all launches, or of a sweep's, latest first. What cannot be read (somebody else's file) is passed over."""
    found = []
    for path in (store.root / "jobs").glob(f"*/{RECORD}"):
        with suppress(TypeError, KeyError, ValueError, OSError):
            data = read_json(path) or {}
            tickets = [JobEntry(**ticket) for ticket in data.pop("tickets")]
            if all(JOB.fullmatch(ticket.job) for ticket in tickets):
                about = {key: data[key] for key in Submission._fields if key not in ("folder", "tickets")}
                found.append(Submission(folder=path.parent, tickets=tickets, **about))
    chosen = [record for record in found if sweep is None or record.sweep == sweep]
    return sorted(chosen, key=lambda record: -record.submitted)


def under_way(records: Iterable[Submission]) -> dict[str, tuple[JobEntry, slurm.Live]]:
    """Artefact -> the job of SLURM's that will make it."""
    records = [record for record in records if record.launcher == "slurm"]
    live = slurm.live(record.name for record in records)
    tickets = [ticket for record in reversed(records) for ticket in record.tickets]
    return {id: (ticket, live[ticket.job]) for ticket in tickets if ticket.job in live for id in ticket.makes}

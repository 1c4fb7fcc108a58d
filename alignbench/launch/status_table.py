"""The table of `alignbench status`: the state of each run of a sweep, from the store, its launches and SLURM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from alignbench.launch import submissions
from alignbench.launch.display import progress_text
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json
from alignbench.store.manifest import Manifest, ManifestRun
from alignbench.store.run_state import LOST, STATES, UNKNOWN, Job, Jobs, run_state
from alignbench.store.text_table import printable, text_table


class Row(NamedTuple):
    """The status of one run of a sweep."""

    title: str
    id: str
    state: str  # one of STATES
    step: str  # what is being made, and its progress
    left: str  # time left of the job
    job: str
    reason: str


def rows(store: Store, manifest: Manifest) -> list[Row]:
    """Return a row for every run of a manifest."""
    jobs = submissions.known_jobs(store, manifest)
    return [_row(store, run, jobs) for run in manifest.runs]


def _row(store: Store, run: ManifestRun, jobs: Callable[[], Jobs]) -> Row:
    state, reason, missing, at, job = run_state(store, run, jobs)
    step, left = job.stage if job else "", ""
    if state == "running" and at:
        step, left = (progress(job), job.left) if job else (at.stage.verb, "")
    elif state == "planned":
        step, reason = ", ".join(dict.fromkeys(artefact.stage.verb for artefact in missing)), ""
    return Row(run.title, run.id, state, step, left, job.id if job else "", reason)


def progress(job: Job) -> str:
    """Return the progress that a job reports, as in ``training 45%, update 22, reward 0.612``."""
    report = read_json(job.progress) or {}
    return progress_text(report) if "stage" in report else f"{job.stage}, starting"


def warnings(store: Store, rows: Iterable[Row]) -> list[str]:
    """Return what the latest jobs of each run have warned of."""
    titles, records = {row.id: row.title for row in rows}, reversed(submissions.read(store))
    latest = {(job.run, job.stage): job for record in records for job in record.jobs if job.run in titles}
    reports = ((job, read_json(job.progress) or {}) for job in latest.values())
    return [f"{titles[job.run]}: {text}" for job, report in reports for text in report.get("warnings", [])]


def exit_code(rows: Iterable[Row]) -> int:
    """Return 0 if all runs are done, 2 if some failed or were lost, 3 if some are still pending."""
    states = {row.state for row in rows}
    return 2 if states & set(LOST) else 3 if states - {"done"} else 0


def summary(rows: Sequence[Row]) -> str:
    """Return the number of runs in each state, as in ``10 done, 2 queued``."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a text table without the columns that are empty everywhere, and below it their summary."""
    heads = ("run", "folder", "state", "step", "time left", "job", "reason")
    columns = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    text = text_table([[row[i] for i in columns] for row in (heads, *rows)], fold=True)
    return f"{text}\n{summary(rows)}"


def follow(store: Store, manifest: Manifest, every: float = 5.0) -> None:
    """Show the status of a sweep until none of its runs is queued or running. Ctrl-C ends the display, not the jobs.

    While SLURM does not answer, they may be.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        before: dict[str, str] = {}
        while True:
            current = rows(store, manifest)
            for row in current:
                if row.state in ("done", UNKNOWN, *LOST) and before.get(row.id) not in (None, row.state):
                    line = f"{row.title}: {row.state}{f' ({row.reason})' if row.reason else ''}"
                    console.print(printable(line), markup=False, highlight=False)
            before = {row.id: row.state for row in current}
            if not {row.state for row in current} & {"running", "requeued", "queued", UNKNOWN}:
                return
            if console.is_terminal:
                live.update(Text(table(current)), refresh=True)
            time.sleep(every)

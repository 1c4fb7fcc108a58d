"""Progress of runs on this machine: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.experiment.cells import PlannedRun
from alignbench.store.artefacts import Artefact
from alignbench.store.stages import Stage

PLAIN_EVERY = 15.0  # seconds between lines where the output is not a terminal
SHARES = {Stage.TRAIN: 0.7, Stage.GENERATE: 0.2, Stage.SCORE: 0.1}  # rough shares of a run's time, for the time left


class Outcome(NamedTuple):
    """The result of a run."""

    cell: PlannedRun
    state: str  # "done" or "failed"
    reason: str = ""  # of the failure; what was damaged and is made again


@dataclass
class Job:
    """A run that is being made on this machine, or waits for its turn."""

    cell: PlannedRun
    missing: list[Artefact]
    progress: Path  # the file in which its worker reports progress
    started: float = field(default_factory=time.time)
    handle: Any = None  # submitit's job
    slot: int = 0  # worker slot, which determines the GPU

    def read(self) -> dict[str, Any]:
        """Return the worker's latest progress report."""
        with suppress(OSError, ValueError):
            return json.loads(self.progress.read_text())
        return {"stage": "starting", "share": None, "detail": ""}

    def share(self) -> float:
        """Return the finished share of all of this job's stages, 0 to 1."""
        counts = Counter(artefact.stage for artefact in self.missing)
        weights = {artefact.id: SHARES[artefact.stage] / counts[artefact.stage] for artefact in self.missing}
        done = sum(weights[artefact.id] for artefact in self.missing if artefact.done)
        current = next((weights[artefact.id] for artefact in self.missing if not artefact.done), 0.0)
        return min(1.0, (done + current * (self.read()["share"] or 0.0)) / sum(weights.values()))

    def note(self) -> str:
        """Return the progress and time left, as in ``training 45%, update 22, reward 0.612, about 30 s left``."""
        share, elapsed = self.share(), time.time() - self.started
        left = f", about {duration(elapsed / share - elapsed)} left" if share > 0.1 else ""
        return progress_text(self.read()) + left


def progress_text(report: Mapping[str, Any]) -> str:
    """Return a worker's progress report as text, as in ``training 45%, update 22, reward 0.612``."""
    share = "" if report.get("share") is None else f" {report['share']:.0%}"
    detail = f", {report['detail']}" if report.get("detail") else ""
    return f"{report['stage']}{share}{detail}"


def duration(seconds: float) -> str:
    """Return a time as text, as in ``1 h 05 min``, ``5 min 02 s`` or ``7 s``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Display:
    """Progress of a queue of runs, as bars with time left or as occasional lines; each finished run gets a line."""

    def __init__(self, queue: Sequence[Job], total: int, bars: Any = None, log: Callable[[str], Any] = print) -> None:
        self.queue, self.total = list(queue), total
        self.finished = total - len(self.queue)
        self.running: list[Job] = []
        self.bars, self.log = bars, log
        self.started = self._logged = time.time()
        self._rows: dict[int, Any] = {}
        if bars is not None:
            self._overall = bars.add_task("all runs", total=1.0, note="")

    def begin(self, job: Job) -> None:
        job.started = time.time()
        self.running.append(job)
        if self.bars is not None:
            self._rows[id(job)] = self.bars.add_task(job.cell.title, total=1.0, note="starting")

    def end(self, job: Job, outcome: Outcome) -> None:
        self.running.remove(job)
        self.finished += 1
        if self.bars is not None:
            self.bars.remove_task(self._rows.pop(id(job)))
        elapsed = duration(time.time() - job.started)
        result = f"done in {elapsed}" if outcome.state == "done" else f"FAILED after {elapsed}"
        result += f": {outcome.reason}" if outcome.reason else ""
        self.log(f"[{self.finished}/{self.total}] {job.cell.title}: {result}")

    def share(self) -> float:
        """Return the finished share of the whole queue, 0 to 1."""
        ended = len(self.queue) - (self.total - self.finished)
        return (ended + sum(job.share() for job in self.running)) / len(self.queue)

    def left(self) -> str:
        """Return the estimated time left for the whole queue, as text."""
        share, elapsed = self.share(), time.time() - self.started
        return f"about {duration(elapsed / share - elapsed)} left" if share > 0.01 else "time left not known yet"

    def refresh(self) -> None:
        """Update the bars; without a terminal, log a line if the last one is PLAIN_EVERY seconds old."""
        if self.bars is not None:
            for job in self.running:
                self.bars.update(self._rows[id(job)], completed=job.share(), note=job.note())
            note = f"{self.finished} of {self.total} runs, {self.left()}"
            self.bars.update(self._overall, completed=self.share(), note=note)
            self.bars.refresh()
        elif time.time() - self._logged > PLAIN_EVERY:
            self._logged = time.time()
            states = "; ".join(f"{job.cell.title}: {job.note()}" for job in self.running)
            self.log(f"{self.finished} of {self.total} runs done, {self.left()}; {states}")

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Keep the display up to date while this thread works."""
        ended = threading.Event()

        def loop() -> None:
            while not ended.wait(0.5):
                self.refresh()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def show(queue: Sequence[Job], total: int) -> Iterator[Display]:
    """Show the progress of ``queue`` on stderr. ``total``: number of runs, with those that are done already."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Display(queue, total, log=lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}")
    # no refresh thread: it would write while the output of a child process is being redirected
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        yield Display(queue, total, bars, lambda line: console.print(line, markup=False, highlight=False))

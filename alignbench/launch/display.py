"""Progress of a local sweep, as bars on a terminal and as lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alignbench.launch.pending import Job, Outcome, duration

PLAIN_EVERY = 15.0  # seconds between lines where the output is no terminal


class Display:
    """Bars with time left on a terminal; elsewhere a line now and then, and one for each run that ends."""

    def __init__(self, queue: Sequence[Job], total: int, bars: Any = None, say: Callable[[str], Any] = print) -> None:
        self.queue, self.total = list(queue), total
        self.finished = total - len(self.queue)
        self.running: list[Job] = []
        self.bars, self.say = bars, say
        self.started = self._said = time.time()
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
        took = duration(time.time() - job.started)
        end = f"done in {took}" if outcome.state == "done" else f"FAILED after {took}: {outcome.reason}"
        self.say(f"[{self.finished}/{self.total}] {job.cell.title}: {end}")

    def share(self) -> float:
        """Of everything that was to do, 0 to 1."""
        ended = len(self.queue) - (self.total - self.finished)
        return (ended + sum(job.share() for job in self.running)) / len(self.queue)

    def left(self) -> str:
        share, elapsed = self.share(), time.time() - self.started
        return f"about {duration(elapsed / share - elapsed)} left" if share > 0.01 else "time left not known yet"

    def refresh(self) -> None:
        if self.bars is not None:
            for job in self.running:
                self.bars.update(self._rows[id(job)], completed=job.share(), note=job.note())
            note = f"{self.finished} of {self.total} runs, {self.left()}"
            self.bars.update(self._overall, completed=self.share(), note=note)
            self.bars.refresh()
        elif time.time() - self._said > PLAIN_EVERY:
            self._said = time.time()
            states = "; ".join(f"{job.cell.title}: {job.note()}" for job in self.running)
            self.say(f"{self.finished} of {self.total} runs done, {self.left()}; {states}")

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Keep showing while this thread works."""
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
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Display(queue, total, say=lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}")
    # no refreshing thread: it would write while a child's output is being redirected
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        yield Display(queue, total, bars, lambda line: console.print(line, markup=False, highlight=False))

"""Runs as submitit jobs: ``slurm`` (arrays, and this process ends), ``local`` (worker processes, a few at a time) or
``debug`` (in this process, one by one).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignbench import jobs as records
from alignbench import provenance, slurm
from alignbench.config import UserError, did_you_mean, settings
from alignbench.jobs import Ticket
from alignbench.run import Task, execute
from alignbench.snapshot import Snapshot, take
from alignbench.spec import check_parts, check_ranks
from alignbench.store import Artefact, Store, write_json
from alignbench.sweep import Cell, Plan

LAUNCHERS = ("local", "debug", "slurm")
FOREVER = 60 * 24 * 365  # minutes; submitit's own default would end a job after five
POLL = 0.2  # seconds
PLAIN_EVERY = 15.0  # seconds between lines where the output is no terminal
STAGES = {"run": 0.7, "images": 0.2, "scores": 0.1}  # rough shares of a run's time, for the time left


class Outcome(NamedTuple):
    cell: Cell
    state: str  # "done" or "failed"
    reason: str = ""


@dataclass
class Job:
    """A cell on its way."""

    cell: Cell
    todo: list[Artefact]
    progress: Path
    started: float = field(default_factory=time.time)
    handle: Any = None  # submitit's
    slot: int = 0

    def read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return json.loads(self.progress.read_text())
        return {"stage": "starting", "share": None, "detail": ""}

    def share(self) -> float:
        """Of all of this job's stages, 0 to 1."""
        weights = {part.id: STAGES[part.kind] / sum(p.kind == part.kind for p in self.todo) for part in self.todo}
        done = sum(weights[part.id] for part in self.todo if part.done)
        current = next((weights[part.id] for part in self.todo if not part.done), 0.0)
        return min(1.0, (done + current * (self.read()["share"] or 0.0)) / sum(weights.values()))

    def note(self) -> str:
        """``training 45%, update 22, reward 0.612, about 30 s left``."""
        said, share, elapsed = self.read(), self.share(), time.time() - self.started
        part = "" if said["share"] is None else f" {said['share']:.0%}"
        detail = f", {said['detail']}" if said["detail"] else ""
        left = f", about {duration(elapsed / share - elapsed)} left" if share > 0.1 else ""
        return f"{said['stage']}{part}{detail}{left}"


def cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def check_launcher(name: str) -> None:
    """UserError unless there is such a launcher, and it works on this machine."""
    if name not in LAUNCHERS:
        raise UserError(f"--launcher: there is no launcher '{name}'{did_you_mean(name, LAUNCHERS, 'launchers')}")
    if name == "slurm":
        slurm.check()


def unfinished(plan: Plan, cells: Sequence[Cell], store: Store) -> list[slurm.Work]:
    """The cells of which something is missing, and what."""
    runs = plan.manifest().by_seed
    works = (slurm.Work(cell, runs[cell.spec.label, cell.seed].missing(store)) for cell in cells)
    return [work for work in works if work.todo]


def new_folder(plan: Plan, store: Store) -> Path:
    """Of one launch, in the store."""
    return store.root.resolve() / "jobs" / f"{plan.document.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def task(plan: Plan, store: Store, cell: Cell, code: Snapshot | None, **more: Any) -> dict[str, Any]:
    """What a worker gets for ``cell``: plain data. ``more``: further fields of Task."""
    return Task(
        store=str(store.root.resolve()),
        run=cell.id,
        images=cell.images,
        milestones=cell.milestones,
        trains=cell.trains,
        spec=settings(cell.spec),
        evaluation=settings(plan.evaluation) | {"protocol": settings(cell.protocol)},
        command=sys.argv,
        **({"plugins": code.plugins, "code": provenance.code(code.given)} if code else {}) | more,
    )._asdict()


# -- slurm ------------------------------------------------------------------------------------------------------------


def submit(
    plan: Plan,
    cells: Sequence[Cell],
    store: Store,
    options: dict[str, Any],
    plugins: Sequence[str],
    track: Sequence[str] = (),
) -> int:
    """Hand all that is missing, and not under way already, to SLURM; how many jobs that makes.

    UserError if SLURM refuses one: those submitted before it by this call are cancelled.
    """
    coming = records.under_way(records.records(store))
    # a row of which one part is under way and another is not is handed out whole: then each part waits for what it
    # needs, and whoever comes second to a part finds it made, or its lock held
    works = [work for work in unfinished(plan, cells, store) if any(part.id not in coming for part in work.todo)]
    arrays = slurm.arrays(options, works, plan.scored)
    for array in arrays:
        if array.stage == "run":
            for cell in array.cells:
                where, ranks = f"{plan.document.path}: {cell.title}", array.resources.ranks
                check_ranks(cell.spec.training, ranks, where)
                check_parts(cell.spec.training, array.resources.parallel if ranks > 1 else "ddp", f"{where}: training")
    if not arrays:
        return 0
    code = take(store.root, plugins)
    folder, name = new_folder(plan, store), f"alignbench-{plan.document.name}"
    tickets: list[Ticket] = []
    try:
        for array in arrays:
            _write_tasks(plan, store, array, folder, code, track)
            slurm.submit(array, folder, name, code.environment())
            tickets += _tickets(store, array, folder)
            records.write(folder, Path(plan.document.manifest).stem, "slurm", tickets, name, options)
    except BaseException:  # a half of the jobs would be a sweep that nobody asked for
        slurm.cancel([array.job for array in arrays if array.job])
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sum(len(array.cells) for array in arrays)


def _progress(folder: Path, array: slurm.Array, index: int) -> str:
    return str(folder / f"{array.number}-{index}.progress.json")


def _write_tasks(
    plan: Plan, store: Store, array: slurm.Array, folder: Path, code: Snapshot, track: Sequence[str]
) -> None:
    tasks = [
        task(
            plan, store, cell, code,
            scores=[score._asdict() for score in plan.scored(cell) if score.file in array.files],
            stages=array.stages(cell),
            threads=array.resources.cpus_per_task or 1,
            parallel=array.resources.parallel,
            track=list(track),
            progress=_progress(folder, array, i),
            own_log=True,
        )
        for i, cell in enumerate(array.cells)
    ]  # fmt: skip
    write_json(folder / f"{array.number}.json", {"tasks": tasks})


def _tickets(store: Store, array: slurm.Array, folder: Path) -> list[Ticket]:
    def makes(cell: Cell, stage: str) -> list[Artefact]:
        if stage == "run":
            return [store.run(cell.id, cell.trains)]
        sets = [cell.images, *(images for _, images in cell.milestones)]
        if stage == "images":
            return [store.images(images) for images in sets]
        return [store.scores(images, array.files[array.cells.index(cell)]) for images in sets]

    return [
        Ticket(
            job=f"{array.job}_{i}",
            stage=array.title,
            makes=[part.id for stage in array.stages(cell) for part in makes(cell, stage)],
            run=cell.id,
            progress=_progress(folder, array, i),
        )
        for i, cell in enumerate(array.cells)
    ]


# -- local and debug --------------------------------------------------------------------------------------------------


def launch(
    plan: Plan,
    cells: Sequence[Cell],
    store: Store,
    *,
    launcher: str = "local",
    jobs: int | None = None,
    plugins: Sequence[str] = (),
    track: Sequence[str] = (),
) -> list[Outcome]:
    """Make what is missing of ``cells``, here. A run that fails is reported and does not stop the others."""
    works = unfinished(plan, cells, store)
    folder = new_folder(plan, store)
    queue = [Job(cell, list(todo), folder / f"{cell.id}-{n}.json") for n, (cell, todo) in enumerate(works)]
    busy = {id(job.cell) for job in queue}
    outcomes = [Outcome(cell, "done") for cell in cells if id(cell) not in busy]
    if not queue:
        return outcomes
    gpus = _gpus() if launcher == "local" else []
    jobs = min(jobs or len(gpus) or cores(), len(queue)) if launcher == "local" else 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // jobs))
    tickets = [Ticket("", "", [part.id for part in job.todo], job.cell.id, str(job.progress)) for job in queue]
    records.write(folder, Path(plan.document.manifest).stem, launcher, tickets)
    # submitit's files hold pickles: in a folder of this user's own, never in a store that others can write to
    with tempfile.TemporaryDirectory(prefix="alignbench-") as private:
        work = Launch(plan, store, Path(private), queue, jobs, threads, gpus, list(plugins), track)
        try:
            with show(queue, len(cells)) as display:
                outcomes += (work.debug if launcher == "debug" else work.local)(display)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


@dataclass
class Launch:
    """The queue of one sweep."""

    plan: Plan
    store: Store
    folder: Path  # submitit's files
    queue: list[Job]
    jobs: int
    threads: int
    gpus: list[int]
    plugins: list[str]
    track: Sequence[str]
    code: Snapshot | None = None  # what workers run; None: this process's own modules

    def task(self, job: Job, launcher: int | None) -> dict[str, Any]:
        return task(
            self.plan, self.store, job.cell, self.code,
            scores=[score._asdict() for score in self.plan.scored(job.cell)],
            threads=self.threads,
            track=list(self.track),
            progress=str(job.progress),
            launcher=launcher,
            own_log=launcher is not None,
            **({} if self.code else {"plugins": [str(Path(path).resolve()) for path in self.plugins]}),
        )  # fmt: skip

    def debug(self, display: Display) -> list[Outcome]:
        """One by one in this process."""
        import submitit

        executor = submitit.DebugExecutor(self.folder)
        outcomes = []
        for job in self.queue:
            display.begin(job)
            with display.in_background():
                result = executor.submit(execute, self.task(job, None)).result()
            outcomes.append(settle(job, result, str(self.store.root / "runs" / job.cell.id / "log.txt")))
            display.end(job, outcomes[-1])
        return outcomes

    def local(self, display: Display) -> list[Outcome]:
        """At most ``jobs`` worker processes at a time; the next starts when one ends."""
        self.code = take(self.store.root, self.plugins)
        waiting, running = list(self.queue), list[Job]()
        outcomes = []
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.pop(0)
                    job.slot = min(set(range(self.jobs)) - {other.slot for other in running})
                    self._submit(job)
                    running.append(job)
                    display.begin(job)
                for job in [job for job in running if job.handle.done()]:
                    running.remove(job)
                    outcomes.append(self._collect(job))
                    display.end(job, outcomes[-1])
                display.refresh()
                time.sleep(POLL)
        except BaseException:
            cancel(running)
            raise
        return outcomes

    def _submit(self, job: Job) -> None:
        import submitit

        executor = submitit.LocalExecutor(self.folder)
        mine = [self.gpus[job.slot % len(self.gpus)]] if self.gpus else []
        executor.update_parameters(timeout_min=FOREVER, gpus_per_node=len(mine), visible_gpus=mine)
        variables = {"OMP_NUM_THREADS": str(self.threads), **(self.code.environment() if self.code else {})}
        with _environment(**variables), _child_output(self.folder / "submitit.log"):
            job.handle = executor.submit(execute, self.task(job, os.getpid()))

    def _collect(self, job: Job) -> Outcome:
        """What a finished worker said, or that it ended without a word."""
        paths, log = job.handle.paths, self.store.root / "runs" / job.cell.id / "log.txt"
        if not paths.result_pickle.exists():
            reason = f"the worker was killed while {job.read()['stage']}: kill -9, or out of memory"
            return settle(job, {"state": "failed", "reason": reason}, str(log))
        error = job.handle.exception()
        if error is None:
            return settle(job, job.handle.result(), str(log))
        lines = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", str(error), re.MULTILINE) or ["no reason given"]
        with suppress(OSError):  # submitit's own files go when the sweep ends
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").write(str(error))
        reason = f"the worker could not start: {lines[-1][:300]}"
        return settle(job, {"state": "failed", "reason": reason}, str(log))


def settle(job: Job, result: dict[str, Any], log: str) -> Outcome:
    """The outcome of a worker; a failure that it could not put on record itself is recorded here."""
    missing = [part for part in job.todo if not part.done]
    if not missing:
        return Outcome(job.cell, "done")
    if result["state"] == "failed" and all(part.failure is None for part in missing):
        missing[0].fail(result["reason"], log)
    return Outcome(job.cell, result["state"], result["reason"])


def cancel(running: Sequence[Job]) -> None:
    """Interrupt the workers and wait until they are gone: submitit's controller kills those that do not end in time."""
    for job in running:
        job.handle.cancel()
    deadline = time.time() + 10
    while time.time() < deadline and not all(job.handle.done() for job in running):
        time.sleep(0.05)


def _gpus() -> list[int]:
    """Numbers of the GPUs that this process may use; a worker gets one of them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return list(range(torch.cuda.device_count()))
    try:
        return [int(number) for number in visible.split(",")]
    except ValueError:
        raise UserError(f"CUDA_VISIBLE_DEVICES: '{visible}' names devices by id; use their numbers") from None


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _child_output(log: Path) -> Iterator[None]:
    """Children started meanwhile write to ``log``: submitit's controller would print a traceback at every Ctrl-C."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, handle):
            os.close(descriptor)


# -- what is shown ----------------------------------------------------------------------------------------------------


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


def duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


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

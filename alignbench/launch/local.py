"""Launch of runs on this machine, as submitit jobs: ``local`` in worker processes, ``debug`` one by one in this one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignbench.config import UserError, did_you_mean
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.plan import Plan
from alignbench.launch import slurm, submissions
from alignbench.launch.display import Display, Job, Outcome, show
from alignbench.launch.pending import new_folder, task, unfinished
from alignbench.launch.submissions import JobEntry
from alignbench.run import execute
from alignbench.run.code_snapshot import Snapshot, take
from alignbench.store.artefacts import Store

LAUNCHERS = ("local", "debug", "slurm")
FOREVER = 60 * 24 * 365  # minutes; submitit's own default would end a job after five
POLL = 0.2  # seconds


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def check_launcher(name: str) -> None:
    """Raise UserError unless the launcher exists and works on this machine."""
    if name not in LAUNCHERS:
        raise UserError(f"--launcher: there is no launcher '{name}'{did_you_mean(name, LAUNCHERS, 'launchers')}")
    if name == "slurm":
        slurm.check()


def launch(
    plan: Plan,
    cells: Sequence[PlannedRun],
    store: Store,
    *,
    launcher: str = "local",
    jobs: int | None = None,
    plugins: Sequence[str] = (),
    track: Sequence[str] = (),
) -> list[Outcome]:
    """Make what is missing of ``cells`` on this machine. A run that fails is reported and does not stop the others."""
    folder = new_folder(plan, store)
    queue = [
        Job(run.cell, list(run.missing), folder / f"{run.cell.id}-{n}.json")
        for n, run in enumerate(unfinished(plan, cells, store))
    ]
    queued = {id(job.cell) for job in queue}
    outcomes = [Outcome(cell, "done") for cell in cells if id(cell) not in queued]
    if not queue:
        return outcomes
    gpus = _gpus() if launcher == "local" else []
    jobs = min(jobs or len(gpus) or cores(), len(queue)) if launcher == "local" else 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // jobs))
    entries = [
        JobEntry("", "", [artefact.id for artefact in job.missing], job.cell.id, str(job.progress)) for job in queue
    ]
    submissions.write(folder, Path(plan.document.manifest).stem, launcher, entries)
    # submitit's files hold pickles: they go to a private folder, never to a store that others can write to
    with tempfile.TemporaryDirectory(prefix="alignbench-") as private:
        local_launch = LocalLaunch(plan, store, Path(private), queue, jobs, threads, gpus, list(plugins), track)
        try:
            with show(queue, len(cells)) as display:
                outcomes += (local_launch.run_here if launcher == "debug" else local_launch.run_workers)(display)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


@dataclass
class LocalLaunch:
    """One launch of a sweep on this machine."""

    plan: Plan
    store: Store
    folder: Path  # submitit's files
    queue: list[Job]
    jobs: int  # worker processes at a time
    threads: int  # of each worker
    gpus: list[int]  # numbers of the GPUs to share out, one per worker
    plugins: list[str]
    track: Sequence[str]
    code: Snapshot | None = None  # the code that workers run; None: the modules of this process

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

    def run_here(self, display: Display) -> list[Outcome]:
        """Run the queue one by one in this process."""
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

    def run_workers(self, display: Display) -> list[Outcome]:
        """Run the queue in at most ``jobs`` worker processes at a time; the next starts when one ends."""
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

        executor = submitit.LocalExecutor(self.folder, python=shlex.join(self.code.python()) if self.code else None)
        gpus = [self.gpus[job.slot % len(self.gpus)]] if self.gpus else []
        executor.update_parameters(timeout_min=FOREVER, gpus_per_node=len(gpus), visible_gpus=gpus)
        variables = {"OMP_NUM_THREADS": str(self.threads), "PYTHONSAFEPATH": "1"}
        with _environment(**variables), _child_output(self.folder / "submitit.log"):
            job.handle = executor.submit(execute, self.task(job, os.getpid()))

    def _collect(self, job: Job) -> Outcome:
        """Return the outcome of a finished worker, also of one that was killed or could not start."""
        paths, log = job.handle.paths, self.store.root / "runs" / job.cell.id / "log.txt"
        if not paths.result_pickle.exists():
            reason = f"the worker was killed while {job.read()['stage']}: kill -9, or out of memory"
            return settle(job, {"state": "failed", "reason": reason}, str(log))
        error = job.handle.exception()
        if error is None:
            return settle(job, job.handle.result(), str(log))
        lines = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", str(error), re.MULTILINE) or ["no reason given"]
        with suppress(OSError):  # submitit's files are deleted when the launch ends
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").write(str(error))
        reason = f"the worker could not start: {lines[-1][:300]}"
        return settle(job, {"state": "failed", "reason": reason}, str(log))


def settle(job: Job, result: dict[str, Any], log: str) -> Outcome:
    """Return the outcome of a worker. A failure that it could not record itself is recorded here."""
    missing = [artefact for artefact in job.missing if not artefact.done]
    if not missing:
        return Outcome(job.cell, "done", result["reason"] if result["state"] == "done" else "")
    if result["state"] == "failed" and all(artefact.failure is None for artefact in missing):
        missing[0].fail(result["reason"], log)
    return Outcome(job.cell, result["state"], result["reason"])


def cancel(running: Sequence[Job]) -> None:
    """Interrupt the workers and wait until they end; submitit's controller kills those that do not end in time."""
    for job in running:
        job.handle.cancel()
    deadline = time.time() + 10
    while time.time() < deadline and not all(job.handle.done() for job in running):
        time.sleep(0.05)


def _gpus() -> list[int]:
    """Return the numbers of the GPUs that this process may use; each worker gets one."""
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
    """Redirect the output of children started meanwhile to ``log``.

    Otherwise submitit's controller would print a traceback at every Ctrl-C.
    """
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

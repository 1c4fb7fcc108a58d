"""The worker process, which executes the stages of a task in order: plain data in, plain data out."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignbench.config import Interrupted, UserError
from alignbench.run.image_stage import generate
from alignbench.run.score_stage import score
from alignbench.run.session import RunSession
from alignbench.run.task import Failed, Task
from alignbench.run.train_stage import train
from alignbench.store.locks import alive
from alignbench.store.stages import Stage


def execute(task: dict[str, Any], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Execute the stages of a task. ``stop`` is polled wherever stopping loses no work.

    Returns {"state": "done" | "failed" | "interrupted", "reason", "made": kinds of the artefacts made}. Failures are
    not raised: the reason is recorded in the store and returned, and other evaluators still run. If a finished file
    proves to be damaged, the stages are executed a second time, to make it again.
    """
    try:
        session = RunSession(Task(**task), stop)
    except UserError as error:  # a plug-in that changed under the sweep
        return {"state": "failed", "reason": str(error), "made": []}
    with _process(session.task, session.log(session.run.id)):
        alone = session.group.size == 1
        state = _execute(session)
        if session.damaged and alone and state != "interrupted":  # of several ranks, the next sweep makes it again
            session.failures.clear()
            session.unload()  # it may have weights that were read before
            state = _execute(session)
        session.group.close()  # not after an unexpected exception: then this process must not wait for the others
    state = "failed" if session.failures else state
    reasons = session.failures or [f"made again: {what}" for what in session.damaged]
    return {"state": state, "reason": "; ".join(reasons), "made": session.made}


def _execute(session: RunSession) -> str:
    """Execute every stage once, up to the first that fails. Return "done" unless a stop was requested."""
    try:
        for kind in session.task.stages:
            STAGES[kind](session)
    except Interrupted:
        return "interrupted"
    except Failed as failure:
        session.failures.append(str(failure))
    return "done"


def _generate(session: RunSession) -> None:
    """Make the final images, then those of the milestones."""
    generate(session, session.end)
    for target in session.milestones():
        generate(session, target)


def _score(session: RunSession) -> None:
    """Score on rank 0; the other ranks are done."""
    session.group.close()
    if session.group.is_main:
        _generate_base(session)
        score(session, [session.end, *session.milestones()])


def _generate_base(session: RunSession) -> None:
    """Make the base model's images for paired evaluators, by the same code as for the base model's own row."""
    if session.base is not None:
        session.unload()  # two models are never held at once; scoring needs neither
        with suppress(Failed):  # the scores that need them report it
            generate(session, session.base)
        session.unload()


STAGES = {Stage.TRAIN.kind: train, Stage.GENERATE.kind: _generate, Stage.SCORE.kind: _score}


@contextmanager
def _process(task: Task, log: Path) -> Iterator[None]:
    """Set the number of threads, send output to the run's log on request, and end a local worker with its launcher."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if task.own_log:
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(handle, sys.stdout.fileno())
            os.dup2(handle, sys.stderr.fileno())
    if task.launcher is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the sweep is a shell's background job
        threading.Thread(target=_end_with, args=(task.launcher,), daemon=True).start()
    import torch

    torch.set_num_threads(task.threads)
    yield


def _end_with(launcher: int, every: float = 1.0, ended: Callable[[int], bool] = lambda pid: not alive(pid)) -> None:
    """Interrupt this process once ``launcher`` has ended, since its result would be lost."""
    while not ended(launcher):
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10 * every)
    os._exit(130)

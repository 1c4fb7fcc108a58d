"""Entry point of a SLURM job: ``python -m alignbench.run.slurm_job TASKS.json`` does task SLURM_ARRAY_TASK_ID.

Before its time limit (SIGUSR2) a job saves its work and asks SLURM to requeue it; when asked to end (SIGTERM, by
scancel) it saves its work and ends. Exit codes: 0 done, 1 failed (SLURM then starts no dependent job), 143 ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

DONE, FAILED, ENDED = 0, 1, 128 + signal.SIGTERM
PATIENCE = 60.0  # seconds in which a shared disk shows a new file to all nodes


class Signals:
    """Record of the last signal. Calling it returns whether to stop at the next place where all work is saved."""

    def __init__(self) -> None:
        self.seen: int | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number

    def __call__(self) -> bool:
        return self.seen is not None


def main(file: str) -> int:
    """Execute this job's task and return the exit code. Rank 0 acts for all."""
    signals = Signals()  # before anything slow: an early signal would end the process
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        print("SLURM_ARRAY_TASK_ID is not set: let the container, or the setup lines, pass SLURM's variables on")
        return FAILED
    task = _task(Path(file))
    if task is None:
        print(f"{file}: not visible on {socket.gethostname()}; the store must lie on a disk that all nodes share")
        return FAILED
    if not task["stages"]:
        return DONE
    rank = _join_ranks()
    from alignbench.run import execute

    result = execute(task, signals)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # all is saved; a signal during exit would look like a failure
    print(f"{result['state']}{': ' + result['reason'] if result['reason'] else ''}", flush=True)
    if result["state"] == "interrupted":
        return ENDED if signals.seen == signal.SIGTERM else _requeue(rank)
    return DONE if result["state"] == "done" else FAILED


def _task(file: Path) -> dict[str, Any] | None:
    """Return this job's task, once this node sees its file; None if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):  # absent, or shown in part
            return json.loads(file.read_text(encoding="utf-8"))["tasks"][os.environ["SLURM_ARRAY_TASK_ID"]]
        time.sleep(1)
    return None


def _join_ranks() -> int:
    """Return the rank of this process; with several ranks, set the environment variables that accelerate reads."""
    from alignbench.store.shell import leave_ranks

    leave_ranks()
    ranks, rank = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_PROCID", 0))
    if ranks > 1:
        first = os.environ["SLURM_LAUNCH_NODE_IPADDR"]  # of the job's first node, whose name may be known to SLURM only
        port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000  # differs between jobs that share a node
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=os.environ["SLURM_LOCALID"],
            MASTER_ADDR=first, MASTER_PORT=str(port),
        )  # fmt: skip
    return rank


def _requeue(rank: int) -> int:
    """Ask SLURM to requeue this task, upon which it ends this process. Return FAILED if it refuses."""
    from alignbench.store.shell import NoAnswer, slurm_answer

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the signal by which SLURM ends it; all is saved
    if rank != 0:
        return DONE
    # not SLURM_JOB_ID: for the last task of an array it is the id of the array, and all tasks would be requeued
    task = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        slurm_answer("scontrol", "requeue", task)
    except NoAnswer as error:
        print(f"the job's time is up, and it is not requeued ({error}); `alignbench retry` resumes it", flush=True)
        return FAILED
    time.sleep(60)  # SLURM ends this process meanwhile
    return DONE


if __name__ == "__main__":
    code = main(sys.argv[1])
    if code == DONE:
        sys.exit()
    sys.stdout.flush()
    os._exit(code)  # torch's own exit would wait for ranks that wait for this one in a collective

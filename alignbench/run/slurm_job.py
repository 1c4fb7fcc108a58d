"""What a SLURM job runs: ``python -m alignbench.run.slurm_job TASKS.json``, task SLURM_ARRAY_TASK_ID of that file.

Before its time limit (SIGUSR2) a job saves what it has and asks to be queued again; when it is to end (SIGTERM, as of
scancel) it saves what it has. Exit code: 0 done, 1 failed (SLURM then starts nothing that depends on it), 143 ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

DONE, FAILED, ENDED = 0, 1, 128 + signal.SIGTERM


class Signals:
    """Which signal has come. Called, it says whether to stop at the next place where all that was done is kept."""

    def __init__(self) -> None:
        self.seen: int | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number

    def __call__(self) -> bool:
        return self.seen is not None


def main(file: str) -> int:
    """Do this job's task. Rank 0 speaks for all."""
    signals = Signals()  # before anything slow: an early signal would end the process
    task = json.loads(Path(file).read_text(encoding="utf-8"))["tasks"][int(os.environ["SLURM_ARRAY_TASK_ID"])]
    if not task["stages"]:
        return DONE
    rank = _join_ranks()
    from alignbench.run import execute

    result = execute(task, signals)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # all is saved; one that comes while Python ends would look a failure
    print(f"{result['state']}{': ' + result['reason'] if result['reason'] else ''}", flush=True)
    if result["state"] == "interrupted":
        return ENDED if signals.seen == signal.SIGTERM else _again(rank)
    return DONE if result["state"] == "done" else FAILED


def _join_ranks() -> int:
    """This process's rank. Of several, each is told what accelerate wants to know, in the environment."""
    ranks, rank = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_PROCID", 0))
    if ranks > 1:
        first = os.environ["SLURM_LAUNCH_NODE_IPADDR"]  # of the job's first node; its name may be SLURM's alone
        port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000  # of no two jobs that share a node
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=os.environ["SLURM_LOCALID"],
            MASTER_ADDR=first, MASTER_PORT=str(port),
        )  # fmt: skip
    return rank


def _again(rank: int) -> int:
    """Have SLURM queue this task again; it ends this process then."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that is how, and all is saved
    if rank != 0:
        return DONE
    # not SLURM_JOB_ID: an array's last task has the array's own id there, and all tasks would be queued again
    task = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    asked: Any = subprocess.run(["scontrol", "requeue", task], capture_output=True, text=True)
    if asked.returncode == 0:
        time.sleep(60)  # SLURM ends this process meanwhile
        return DONE
    print(f"the job's time is over, and SLURM does not queue it again: {asked.stderr.strip()}", flush=True)
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

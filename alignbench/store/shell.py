"""The shell that started this process, without what other launchers left in its environment.

Inside ``salloc``, ``torchrun`` or ``mpirun`` dozens of variables describe the surrounding job, and a user's own hold
defaults and filters of SLURM's commands. None of them is about our jobs, which are described by the sweep alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from alignbench.config import UserError

T = TypeVar("T")
TRIES, PAUSE = 3, 2.0  # how often SLURM is asked, and the seconds in between
LIMIT = 120.0  # seconds that a command of SLURM may take: its own limits are shorter
OF_SLURM = re.compile(r"(SLURMD?|SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SCANCEL|SCONTROL)_")
OF_THE_CLUSTER = re.compile(r"SLURM_(CONF|CONF_SERVER|CLUSTERS|JWT|SACK_\w+)")  # name it, or give access to it
OF_THE_ALLOCATION = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
OF_RANKS = re.compile(
    r"((LOCAL|GROUP|ROLE|NODE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|MASTER_(ADDR|PORT)|FORK_LAUNCHED"
    r"|(TORCHELASTIC|ACCELERATE|PMI|PMIX|OMPI_COMM_WORLD|MV2_COMM_WORLD|MPI)_\w+"
)


class NoAnswer(UserError):
    """SLURM cannot be asked from this machine, or does not answer."""


def leave_ranks() -> None:
    """Remove the variables by which a surrounding launcher makes a process one rank of several, or sets accelerate."""
    for name in [name for name in os.environ if OF_RANKS.fullmatch(name)]:
        del os.environ[name]


def slurm_environment() -> dict[str, str]:
    """Return the environment of SLURM's commands, which jobs inherit: ours, of SLURM's what names the cluster."""
    given = dict(os.environ)
    kept = {name: text for name, text in given.items() if not OF_SLURM.match(name) or OF_THE_CLUSTER.fullmatch(name)}
    if "SLURM_JOB_ID" in given:
        kept = {name: text for name, text in kept.items() if name not in OF_THE_ALLOCATION}
    if "SBATCH_CLUSTERS" in given:  # of which only sbatch knows
        kept.setdefault("SLURM_CLUSTERS", given["SBATCH_CLUSTERS"])
    return kept | {"SLURM_BITSTR_LEN": "0"}  # else lists of tasks are cut short


@contextlib.contextmanager
def slurm_shell() -> Iterator[None]:
    """Give this process the environment of SLURM's commands for a while."""
    given = dict(os.environ)
    try:
        _replace_environment(slurm_environment())
        yield
    finally:
        _replace_environment(given)


def _replace_environment(variables: Mapping[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def ignored_defaults() -> list[str]:
    """Return the variables of this shell that would set options of sbatch, and are not passed on."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_") and name != "SBATCH_CLUSTERS")


def slurm_command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, and return its output and exit code. Raise NoAnswer if it is missing or hangs."""
    if shutil.which(words[0]) is None:
        raise NoAnswer(f"unknown here: there is no {words[0]} on this machine; ask on a login node of the cluster")
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": LIMIT}
    try:
        return subprocess.run(words, env=slurm_environment(), encoding="utf-8", errors="replace", **options)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"SLURM does not answer: {words[0]} takes more than {LIMIT:.0f} seconds; try again") from None


def slurm_answer(*words: str, read: Callable[[str], T] = str) -> T:  # type: ignore[assignment]  # T is str by default
    """Return what ``read`` makes of a command's output. Ask again if it fails, or if ``read`` raises ValueError.

    Raise NoAnswer with SLURM's own words after some tries.
    """
    for left in reversed(range(TRIES)):
        done = slurm_command(*words)
        problem = slurm_error(done.stderr)
        if done.returncode == 0:
            try:
                return read(done.stdout)
            except ValueError as error:
                problem = f"{words[0]} says {error}"
        if left:
            time.sleep(PAUSE)
    raise NoAnswer(f"SLURM does not answer: {problem}; try again")


def slurm_error(text: str) -> str:
    """Return the errors among what a command of SLURM printed, as one line."""
    lines = re.findall(r"(?m)^.*?\b(?:error|fatal):\s*(.*?)\s*$", text)
    return "; ".join(dict.fromkeys(lines)) or " ".join(text.split())[-300:]

"""Execution of one run: train, generate images, score; a stage is skipped if the store has its result.

A worker process gets a task (plain data) and calls ``execute``. Modules load on first use, because a SLURM job has to
handle signals before anything slow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignbench.run.task import Task
    from alignbench.run.worker import execute

__all__ = ["Task", "execute"]
_HOME = {"Task": "task", "execute": "worker"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'alignbench.run' has no attribute '{name}'")
    return getattr(import_module(f"alignbench.run.{_HOME[name]}"), name)

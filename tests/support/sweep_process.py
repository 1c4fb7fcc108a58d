"""Sweeps in separate processes, for tests that interrupt or kill them."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.tiny_sweep import PLUGIN

PATIENCE = 900  # seconds, for a machine that is busy with something else


def start(folder: Path) -> subprocess.Popen[str]:
    """Start `alignbench sweep` with two workers, for the base model and one training run."""
    words = ["sweep", str(folder / "tiny.yaml"), "--seeds", "0", "--plugin", PLUGIN, "--store", str(folder / "store")]
    command = [sys.executable, "-m", "alignbench.cli", *words, "-j", "2"]
    # background jobs of a shell ignore Ctrl-C, and their children inherit that
    obey_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=(folder / "stderr").open("w"), text=True, preexec_fn=obey_ctrl_c)


def until(folder: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    """Return a file of the store that matches ``pattern``, once it exists."""
    while process.poll() is None:
        if files := sorted((folder / "store").glob(pattern)):
            return files[0]
        time.sleep(0.01)
    raise AssertionError(f"ended before there was {pattern}: {(folder / 'said').read_text()}")


def trainer(folder: Path) -> tuple[str, str]:
    """Return the ids of the run that trains and of its image set."""
    manifest = json.loads(next((folder / "store" / "sweeps").glob("*.json")).read_text())
    return next((run["id"], run["images"]) for run in manifest["runs"] if run["label"] == "Last")

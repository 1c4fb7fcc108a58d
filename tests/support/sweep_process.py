"""Sweeps in processes of their own, to be interrupted and killed."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.tiny_sweep import PLUGIN

# -- worker processes, interrupted and killed -------------------------------------------------------------------------


PATIENCE = 900  # seconds, for a machine that is busy with something else


def start(folder: Path) -> subprocess.Popen[str]:
    """`alignbench sweep` with two workers: the base model, and one training."""
    words = ["sweep", str(folder / "tiny.yaml"), "--seeds", "0", "--plugin", PLUGIN, "--store", str(folder / "store")]
    command = [sys.executable, "-m", "alignbench.cli", *words, "-j", "2"]
    # a shell's background jobs ignore Ctrl-C, and what they start inherits that
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=(folder / "said").open("w"), text=True, preexec_fn=heed)


def until(folder: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    """Wait for a file of the store, and give it."""
    while process.poll() is None:
        if found := sorted((folder / "store").glob(pattern)):
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"ended before there was {pattern}: {(folder / 'said').read_text()}")


def trainer(folder: Path) -> tuple[str, str]:
    """Ids of the run that trains and of its images."""
    manifest = json.loads(next((folder / "store" / "sweeps").glob("*.json")).read_text())
    return next((run["id"], run["images"]) for run in manifest["runs"] if run["label"] == "Last")

"""Optional experiment trackers: a copy of every training record goes to TensorBoard, Weights & Biases or trackio.

The store remains the source of truth: no id, result or failure depends on a tracker.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignbench.config import UserError, did_you_mean, flatten

NAMES = ("tensorboard", "wandb", "trackio")  # as in accelerate's ``log_with`` and in pip
PROJECT = "alignbench"
FOLDER = "tensorboard"  # in the store; has a folder per run


def check(names: Sequence[str]) -> None:
    """Raise UserError unless every tracker is known and installed."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"--track: there is no tracker '{name}'{did_you_mean(name, NAMES, 'trackers')}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: {name} is not installed; run `pip install {name}`")


class Trackers:
    """Trackers of one run. One that fails is reported once, through ``warn``, and no longer used."""

    def __init__(
        self, names: Sequence[str], store: Path, run: str, title: str, config: Mapping[str, Any], warn: Callable
    ) -> None:
        self.store, self.run, self.title, self.warn = store, run, title, warn
        plain = bool | int | float | str  # what every tracker accepts
        self.config = {key: value if isinstance(value, plain) else str(value) for key, value in flatten(config)}
        self.names = list(names)
        self.open: dict[str, Any] = {}

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of one record at its update. The first record gives the update at which a run resumes."""
        step = record["update"]
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        for name in list(self.names):
            with self._harmless(name):
                if name not in self.open:
                    self.open[name] = self._start(name, step)
                self.open[name].log(numbers, step=step)

    def close(self) -> None:
        for name in list(self.names):
            if name in self.open:
                with self._harmless(name):
                    self.open.pop(name).finish()

    def _start(self, name: str, step: int) -> Any:
        """Return accelerate's tracker for this run, whose history continues from ``step``."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        make = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":  # purges what an interrupted attempt logged after its last checkpoint
            tracker = make(self.run, logging_dir=str(self.store / FOLDER), purge_step=step)
        else:
            own = {"id": self.run, "dir": str(self.store)} if name == "wandb" else {}
            shown = f"{self.title} ({self.run})"
            tracker = make(PROJECT, name=shown, config=self.config, resume="allow", **own)
        tracker.start()
        if name == "tensorboard" and step == 0:  # a second time, it would appear as another run
            tracker.store_init_configuration(self.config)
        return tracker

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises, the run continues
            self.names.remove(name)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.warn(f"warning: {name} failed and is no longer used: {why}")

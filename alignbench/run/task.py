"""A worker's task as plain data, the image sets that it asks for, and its progress file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.experiment.spec import Evaluation, Protocol, RunSpec
from alignbench.prompts import Prompt, evaluation_prompts


class Task(NamedTuple):
    """A run and the stages to execute, as plain data (``_asdict``) that crosses the process boundary."""

    store: str
    run: str  # id of the run
    images: str  # id of its image set
    trains: bool
    spec: dict[str, Any]  # RunSpec
    evaluation: dict[str, Any]
    scores: list[dict[str, Any]]  # evaluators: settings, name, version, file, metrics, role
    plugins: list[str]
    threads: int
    progress: str  # path of the progress file
    command: list[str]
    parallel: str = "ddp"  # how several ranks share the model in training: "ddp" or "fsdp"
    stages: Sequence[str] = ("run", "images", "scores")  # kinds of Stage
    own_log: bool = False  # True: output goes to the run's log
    launcher: int | None = None  # pid of the launcher; a local worker ends with it
    code: dict[str, Any] | None = None  # ``provenance.code()`` where the sweep was started; None: computed here
    track: Sequence[str] = ()  # names of trackers, among ``trackers.NAMES``
    milestones: Sequence[Sequence[Any]] = ()  # (update, id of its image set)
    update: int | None = None  # the milestone that ``images`` belongs to; None: the end


@dataclass(frozen=True)
class Target:
    """Image set to make: the weights, the prompts and the protocol."""

    id: str
    run: str  # id of the run that has the weights
    spec: RunSpec
    trained: bool  # False: the weights are those that the backend loads
    update: int | None  # the milestone at which the weights were kept; None: the end
    evaluation: Evaluation

    @property
    def protocol(self) -> Protocol:
        return self.evaluation.protocol

    @cached_property
    def prompts(self) -> list[Prompt]:
        return evaluation_prompts(self.protocol.prompts)[: self.evaluation.limit]


class Failed(Exception):
    """A stage failed, and the reason (the message) is recorded in the store."""


class Progress:
    """Writer of a run's progress file, which the displays read."""

    def __init__(self, path: Path | None) -> None:
        self.path = path  # None: another rank writes it
        self._last = 0.0

    def __call__(self, stage: str, share: float | None = None, detail: str = "") -> None:
        """Write the progress, at most three times a second. ``share``: finished part of this stage, 0 to 1."""
        now = time.time()
        if self.path is None or (now - self._last < 0.3 and share is not None and share < 1):
            return
        self._last = now
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # progress is not worth a failure
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"stage": stage, "share": share, "detail": detail, "time": now}))
            temporary.replace(self.path)

"""A worker's task as plain data, the image sets that it asks for, and the file that tells how far it is."""

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
from alignbench.prompts import Prompt, load_prompts


class Task(NamedTuple):
    """One run and what to make of it, as it crosses the process boundary: plain data (``_asdict``)."""

    store: str
    run: str  # ids of the run and of its image set
    images: str
    trains: bool
    spec: dict[str, Any]  # RunSpec
    evaluation: dict[str, Any]
    scores: list[dict[str, Any]]  # evaluators: settings, name, version, file, metrics, role
    plugins: list[str]
    threads: int
    progress: str  # file that tells how far this is
    command: list[str]
    parallel: str = "ddp"  # how several ranks share the model in training: or "fsdp"
    stages: Sequence[str] = ("run", "images", "scores")  # kinds of Stage
    own_log: bool = False  # True: what is printed goes to the run's log
    launcher: int | None = None  # pid without which a local worker ends
    code: dict[str, Any] | None = None  # ``provenance.code()`` where the sweep was started; None: asked here
    track: Sequence[str] = ()  # of ``trackers.NAMES``
    milestones: Sequence[Sequence[Any]] = ()  # (update, id of its image set)
    update: int | None = None  # the milestone that ``images`` belongs to; None: the end


@dataclass(frozen=True)
class Target:
    """An image set: whose weights make it, for which prompts, and how."""

    id: str
    run: str  # id of the run whose weights they are
    spec: RunSpec
    trained: bool  # False: the model as its backend loads it
    update: int | None  # the milestone at which the weights were kept; None: the end
    evaluation: Evaluation

    @property
    def protocol(self) -> Protocol:
        return self.evaluation.protocol

    @cached_property
    def prompts(self) -> list[Prompt]:
        return load_prompts(self.protocol.prompts)[: self.evaluation.limit]


class Failed(Exception):
    """A stage failed, and its reason (the text) is on record."""


class Progress:
    """Tells in a small file how far a run is; whoever shows it reads that file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path  # None: another rank tells it
        self._last = 0.0

    def __call__(self, stage: str, share: float | None = None, detail: str = "") -> None:
        """``share``: of this stage, 0 to 1. At most three times a second reach the disk."""
        now = time.time()
        if self.path is None or (now - self._last < 0.3 and share is not None and share < 1):
            return
        self._last = now
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # progress is not worth a failure
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"stage": stage, "share": share, "detail": detail, "time": now}))
            temporary.replace(self.path)

"""Planned runs with work left, and the tasks that make what is missing."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import settings
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.plan import Plan
from alignbench.launch import slurm
from alignbench.run import Task, provenance
from alignbench.run.code_snapshot import Snapshot
from alignbench.store.artefacts import Artefact, Store
from alignbench.store.stages import Stage

SHARES = {Stage.TRAIN: 0.7, Stage.GENERATE: 0.2, Stage.SCORE: 0.1}  # rough shares of a run's time, for the time left


class Outcome(NamedTuple):
    cell: PlannedRun
    state: str  # "done" or "failed"
    reason: str = ""


@dataclass
class Job:
    """A cell on its way."""

    cell: PlannedRun
    todo: list[Artefact]
    progress: Path
    started: float = field(default_factory=time.time)
    handle: Any = None  # submitit's
    slot: int = 0

    def read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return json.loads(self.progress.read_text())
        return {"stage": "starting", "share": None, "detail": ""}

    def share(self) -> float:
        """Of all of this job's stages, 0 to 1."""
        counts = Counter(part.stage for part in self.todo)
        weights = {part.id: SHARES[part.stage] / counts[part.stage] for part in self.todo}
        done = sum(weights[part.id] for part in self.todo if part.done)
        current = next((weights[part.id] for part in self.todo if not part.done), 0.0)
        return min(1.0, (done + current * (self.read()["share"] or 0.0)) / sum(weights.values()))

    def note(self) -> str:
        """``training 45%, update 22, reward 0.612, about 30 s left``."""
        said, share, elapsed = self.read(), self.share(), time.time() - self.started
        part = "" if said["share"] is None else f" {said['share']:.0%}"
        detail = f", {said['detail']}" if said["detail"] else ""
        left = f", about {duration(elapsed / share - elapsed)} left" if share > 0.1 else ""
        return f"{said['stage']}{part}{detail}{left}"


def unfinished(plan: Plan, cells: Sequence[PlannedRun], store: Store) -> list[slurm.PendingRun]:
    """The cells of which something is missing, and what."""
    runs = plan.manifest().by_seed
    works = (slurm.PendingRun(cell, runs[cell.spec.label, cell.seed].missing(store)) for cell in cells)
    return [work for work in works if work.todo]


def new_folder(plan: Plan, store: Store) -> Path:
    """Of one launch, in the store."""
    return store.root.resolve() / "jobs" / f"{plan.document.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def task(plan: Plan, store: Store, cell: PlannedRun, code: Snapshot | None, **more: Any) -> dict[str, Any]:
    """What a worker gets for ``cell``: plain data. ``more``: further fields of Task."""
    return Task(
        store=str(store.root.resolve()),
        run=cell.id,
        images=cell.images,
        milestones=cell.milestones,
        trains=cell.trains,
        spec=settings(cell.spec),
        evaluation=settings(plan.evaluation) | {"protocol": settings(cell.protocol)},
        command=sys.argv,
        **({"plugins": code.plugins, "code": provenance.code(code.given)} if code else {}) | more,
    )._asdict()


def duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

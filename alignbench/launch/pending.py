"""Planned runs with artefacts still missing, and the tasks that make them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import settings
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.plan import Plan
from alignbench.run import Task, provenance
from alignbench.run.code_snapshot import Snapshot
from alignbench.store.artefacts import Artefact, Store, set_aside
from alignbench.store.files import check_frame, is_whole
from alignbench.store.manifest import ManifestRun
from alignbench.store.stages import Stage


class PendingRun(NamedTuple):
    """A planned run and its missing artefacts, in the order in which they are made."""

    cell: PlannedRun
    missing: Sequence[Artefact]


def unfinished(plan: Plan, cells: Sequence[PlannedRun], store: Store) -> list[PendingRun]:
    """Return the runs with missing artefacts."""
    runs = plan.manifest().by_seed
    pending = (PendingRun(cell, runs[cell.spec.label, cell.seed].missing(store)) for cell in cells)
    return [run for run in pending if run.missing]


def set_damaged_aside(runs: Sequence[ManifestRun], store: Store) -> Iterator[str]:
    """Check the finished tables of ``runs``; mark those that are damaged as not made, and yield a line for each."""
    for artefact in {part.lock: part for run in runs for part in run.artefacts(store)}.values():
        if artefact.stage is not Stage.TRAIN:
            what = set_aside(artefact, partial(check_frame, artefact.product))
            if what:
                yield f"{what}; made again"
        elif (records := artefact.folder / "train.parquet").is_file() and artefact.done and not is_whole(records):
            records.replace(records.with_name(f"{records.name}.damaged"))
            yield f"{records}: damaged; reports leave its costs out, the weights are whole (delete both to train again)"


def new_folder(plan: Plan, store: Store) -> Path:
    """Return a new folder name in the store for the files of one launch."""
    return store.root.resolve() / "jobs" / f"{plan.document.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def task(plan: Plan, store: Store, cell: PlannedRun, code: Snapshot | None, **more: Any) -> dict[str, Any]:
    """Return the task of a worker that makes ``cell``, as plain data. ``more``: further fields of Task."""
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

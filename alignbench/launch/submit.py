"""Submission of a sweep to SLURM: which arrays, their tasks, and the record of the jobs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.checks import check_job
from alignbench.experiment.plan import Plan
from alignbench.launch import slurm, submissions
from alignbench.launch.pending import new_folder, task, unfinished
from alignbench.launch.submissions import JobEntry
from alignbench.run.code_snapshot import Snapshot, take
from alignbench.store.artefacts import Artefact, Store
from alignbench.store.files import write_json
from alignbench.store.stages import Stage


def submit(
    plan: Plan,
    cells: Sequence[PlannedRun],
    store: Store,
    options: dict[str, Any],
    plugins: Sequence[str],
    track: Sequence[str] = (),
) -> int:
    """Submit all that is missing and not already queued or running, and return the number of jobs.

    Raise UserError if SLURM refuses an array; the arrays that this call has already submitted are cancelled.
    """
    live = submissions.live_jobs(submissions.read(store))
    # a run of which only some artefacts are under way is submitted whole: each job then waits for what it needs, and
    # the second job to reach an artefact finds it made, or its lock held
    pending = [
        run for run in unfinished(plan, cells, store) if any(artefact.id not in live for artefact in run.missing)
    ]
    arrays = slurm.arrays(options, pending, plan.scored)
    for array in arrays:
        if array.stage is Stage.TRAIN:
            for cell in array.cells:
                check_job(cell, array.resources, f"{plan.document.path}: {cell.title}")
    if not arrays:
        return 0
    code = take(store.root, plugins)
    folder, name = new_folder(plan, store), f"alignbench-{plan.document.name}"
    jobs: list[JobEntry] = []
    try:
        for array in arrays:
            _write_tasks(plan, store, array, folder, code, track)
            slurm.submit(array, folder, name, code.environment())
            jobs += _job_entries(store, array, folder)
            submissions.write(folder, Path(plan.document.manifest).stem, "slurm", jobs, name, options)
    except BaseException:  # a sweep is submitted whole or not at all
        slurm.cancel([array.job for array in arrays if array.job])
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sum(len(array.cells) for array in arrays)


def _progress(folder: Path, array: slurm.Array, index: int) -> str:
    return str(folder / f"{array.number}-{index}.progress.json")


def _write_tasks(
    plan: Plan, store: Store, array: slurm.Array, folder: Path, code: Snapshot, track: Sequence[str]
) -> None:
    tasks = [
        task(
            plan, store, cell, code,
            scores=[score._asdict() for score in plan.scored(cell) if score.file in array.files],
            stages=[stage.kind for stage in array.stages(cell)],
            threads=array.resources.cpus_per_task or 1,
            parallel=array.resources.parallel,
            track=list(track),
            progress=_progress(folder, array, i),
            own_log=True,
        )
        for i, cell in enumerate(array.cells)
    ]  # fmt: skip
    write_json(folder / f"{array.number}.json", {"tasks": tasks})


def _job_entries(store: Store, array: slurm.Array, folder: Path) -> list[JobEntry]:
    def artefacts(cell: PlannedRun, stage: Stage) -> list[Artefact]:
        if stage is Stage.TRAIN:
            return [store.run(cell.id, cell.trains)]
        sets = [cell.images, *(images for _, images in cell.milestones)]
        if stage is Stage.GENERATE:
            return [store.images(images) for images in sets]
        return [store.scores(images, array.files[array.cells.index(cell)]) for images in sets]

    return [
        JobEntry(
            job=f"{array.job}_{i}",
            stage=array.title,
            makes=[artefact.id for stage in array.stages(cell) for artefact in artefacts(cell, stage)],
            run=cell.id,
            progress=_progress(folder, array, i),
        )
        for i, cell in enumerate(array.cells)
    ]

"""Submission of a sweep to SLURM: which arrays, their tasks, and the record of the jobs."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from alignbench.config import UserError, decode
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.checks import check_job
from alignbench.experiment.plan import Plan
from alignbench.experiment.resources import Slurm
from alignbench.launch import slurm, submissions
from alignbench.launch.pending import PendingRun, new_folder, task, unfinished
from alignbench.launch.submissions import JobEntry, Submission
from alignbench.run.code_snapshot import Snapshot, take
from alignbench.store.artefacts import Artefact, Store
from alignbench.store.files import write_json
from alignbench.store.shell import ignored_defaults
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
    pending, records = unfinished(plan, cells, store), submissions.read(store)
    wanted = {artefact.id for run in pending for artefact in run.missing}
    under_way = submissions.slurm_jobs(records, wanted).live
    arrays = _affordable(plan, pending, options, {id: job.job for id, (job, _) in under_way.items()}, records)
    for array in arrays:
        if array.stage is Stage.TRAIN:
            for cell in array.cells:
                check_job(cell, array.resources, f"{plan.document.path}: {cell.title}")
    if not arrays:
        return 0
    if ignored := ignored_defaults():
        what = "jobs ask for what the sweep's slurm settings and --slurm say"
        print(f"alignbench: ignored: {', '.join(ignored)}; {what}", file=sys.stderr)
    code = take(store.root, plugins)
    folder, name = new_folder(plan, store), f"alignbench-{plan.document.name}"
    jobs: list[JobEntry] = []
    try:
        for array in arrays:
            _write_tasks(plan, store, array, folder, code, track)
            slurm.submit(array, folder, name, code)
            jobs += _job_entries(store, array, folder)
            submissions.write(folder, Path(plan.document.manifest).stem, "slurm", jobs, name, options)
    except BaseException as error:  # a sweep is submitted whole or not at all
        submitted = [array.job for array in arrays if array.job]
        try:
            slurm.cancel(submitted)
        except UserError as left:  # their record stays, too
            what = f"the jobs {', '.join(submitted)} were submitted and could not be cancelled"
            raise UserError(f"{error or 'interrupted'}; {what}: {left}") from error
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sum(len(array.cells) for array in arrays)


def _affordable(
    plan: Plan,
    pending: Sequence[PendingRun],
    options: dict[str, Any],
    live: dict[str, str],
    records: Sequence[Submission],
) -> list[slurm.Array]:
    """Return the arrays of as many runs as ``submit_limit`` allows, and say how many are left for another time."""
    arrays = slurm.arrays(options, pending, plan.scored, live)
    limit = decode(Slurm, options, "slurm").submit_limit
    if limit is None or not arrays:
        return arrays
    jobs = Counter(id(cell) for array in arrays for cell in array.cells)
    queued = {*live.values(), *submissions.queued(records)}  # other sweeps' jobs count, too
    free = limit - len(queued)
    ends = list(accumulate(jobs[id(run.cell)] for run in pending))
    fit = sum(end <= free for end in ends)
    if fit < len(pending):
        if not queued and not fit:
            raise UserError(f"slurm.submit_limit: {limit} jobs, but the first run alone needs {ends[0]}; raise it")
        left = f"slurm.submit_limit: {len(pending) - fit} of {len(pending)} runs do not fit into {limit} jobs at a time"
        print(f"alignbench: {left}; type the same command again when some have ended", file=sys.stderr)
    return slurm.arrays(options, pending[:fit], plan.scored, live)


def _progress(folder: Path, array: slurm.Array, index: int) -> str:
    return str(folder / f"{array.number}-{array.tasks[index]}.progress.json")


def _write_tasks(
    plan: Plan, store: Store, array: slurm.Array, folder: Path, code: Snapshot, track: Sequence[str]
) -> None:
    tasks = [
        task(
            plan, store, cell, code,
            scores=[score._asdict() for score in plan.scored(cell) if score.file == array.files[i]],
            stages=[stage.kind for stage in array.stages(cell)],
            threads=array.resources.cpus_per_task or 1,
            parallel=array.resources.parallel,
            track=list(track),
            progress=_progress(folder, array, i),
            own_log=True,
        )
        for i, cell in enumerate(array.cells)
    ]  # fmt: skip
    write_json(folder / f"{array.number}.json", {"tasks": dict(zip(map(str, array.tasks), tasks))})


def _job_entries(store: Store, array: slurm.Array, folder: Path) -> list[JobEntry]:
    def artefacts(cell: PlannedRun, file: str, stage: Stage) -> list[Artefact]:
        if stage is Stage.TRAIN:
            return [store.run(cell.id, cell.trains)]
        sets = [cell.images, *(images for _, images in cell.milestones)]
        if stage is Stage.GENERATE:
            return [store.images(images) for images in sets]
        return [store.scores(images, file) for images in sets]

    return [
        JobEntry(
            job=f"{array.job}_{array.tasks[i]}",
            stage=array.title,
            makes=[artefact.id for stage in array.stages(cell) for artefact in artefacts(cell, array.files[i], stage)],
            run=cell.id,
            progress=_progress(folder, array, i),
        )
        for i, cell in enumerate(array.cells)
    ]

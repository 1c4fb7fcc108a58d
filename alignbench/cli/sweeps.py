"""Verbs that execute the runs of a sweep, watch them, and clean up."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignbench.cli.common import (
    DONE,
    ONLY,
    RUN,
    SOME_FAILED,
    STORE,
    TRACK,
    Request,
    Verb,
    complete_methods,
    print_gaps,
    readable_store,
    resolve,
    selected,
    slurm_options,
    summary,
    sweep_options,
    usable_store,
)

if TYPE_CHECKING:
    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.plan import Plan
    from alignbench.store.artefacts import Store
    from alignbench.store.manifest import Manifest, ManifestRun


@click.command("sweep", cls=Verb, short_help="Run everything a sweep still needs: train, generate, score.")
@ONLY
@click.option(
    "--launcher",
    metavar="LAUNCHER",
    default="local",
    shell_complete=lambda _, __, word: [name for name in ("local", "debug", "slurm") if name.startswith(word)],
    help="local (default): worker processes; debug: in this process; slurm: submit to a cluster and exit.",
)
@slurm_options
@TRACK
@sweep_options()
def sweep(
    request: Request,
    only: Sequence[str],
    launcher: str,
    slurm: str | None,
    wait: bool,
    jobs: int | None,
    track: Sequence[str],
) -> int:
    """Run everything of a sweep that the store does not have yet: train, generate, score."""
    from alignbench.config import UserError
    from alignbench.launch.local import check_launcher
    from alignbench.run import trackers

    check_launcher(launcher)
    trackers.check(track)
    if launcher != "slurm" and (slurm is not None or wait):
        option = "--wait" if slurm is None else "--slurm"
        raise UserError(f"{option}: --launcher {launcher} ignores it; leave it out, or choose --launcher slurm")
    store = request.store()
    plan = request.plan()
    cells = selected(plan, only)
    if launcher == "slurm":
        return _submit(request, plan, cells, store, _resources(request, plan, slurm), track, wait)
    code = _make(request, plan, cells, store, launcher, jobs, track)
    print(f"the table: alignbench report {plan.document.command}", file=sys.stderr)
    return code


@click.command("run", cls=Verb, short_help="Execute one run in the foreground.")
@click.option(
    "--method",
    metavar="METHOD",
    required=True,
    shell_complete=complete_methods,
    help="A method of the sweep, or any other with its defaults.",
)
@TRACK
@sweep_options(optional=True)
def run(request: Request, method: str, track: Sequence[str]) -> int:
    """Execute one run in the foreground: the first of a sweep (default: quickstart) with --method."""
    from alignbench.reporting.analysis.results import Results
    from alignbench.reporting.score_summary import run_summary
    from alignbench.run import trackers

    trackers.check(track)
    store = request.store()
    plan = resolve(request.with_method(method, "quickstart"), request.registry())
    cell = next(cell for cell in plan.cells if cell.spec.method["name"] == method)
    code = _make(request, plan, [cell], store, "debug", None, track)
    manifest = plan.manifest()
    made = manifest.by_seed[cell.spec.label, cell.seed]
    print(run_summary(made, Results(store.root, manifest.only([made])).scores))
    print(f"{store.root / 'runs' / cell.id}" + (f" (seed {cell.seed})" if cell.trains else ""))
    return code


@click.command("status", cls=Verb, short_help="Show what is planned, running, done or failed, and why.")
@sweep_options(optional=True, plugins=False)
def status(request: Request) -> int:
    """Show the state of every sweep in the store, or of each run of one sweep with its jobs on the cluster."""
    from alignbench.config import UserError
    from alignbench.launch import status_table
    from alignbench.store.manifest import read_manifest

    store = readable_store(request.folder)
    if request.words:
        _, manifest = request.manifest(store)
        rows = status_table.rows(store, manifest)
        print(status_table.table(rows))
        print_gaps(store, manifest.runs)
        for line in status_table.warnings(store, rows):
            print(f"alignbench: {line}", file=sys.stderr)
        return status_table.exit_code(rows)
    for path in store.manifests():
        try:
            manifest = read_manifest(path)
        except UserError as error:  # concerns one sweep; the others are still shown
            print(f"alignbench: {error}", file=sys.stderr)
            continue
        rows = status_table.rows(store, manifest)
        print(f"{path.stem}: {status_table.summary(rows)}  (alignbench report {manifest.sweep or path.stem})")
    if not store.manifests():
        print(f"no sweep was run in {store.root} yet; try: alignbench sweep quickstart")
    return DONE


@click.command("logs", cls=Verb, short_help="Print a run's log.")
@RUN
@click.option("-f", "--follow", is_flag=True, help="Follow the log as it grows, until the run ends.")
@STORE
def logs(run: str, follow: bool, store: str) -> int:
    """Print what a run's jobs have written. RUN is a run id (a folder in the store's runs/) or its beginning."""
    from alignbench.launch.logs import read

    for text in read(readable_store(store), run, follow):
        print(text, end="", flush=True)
    return DONE


@click.command("cancel", cls=Verb, short_help="Cancel a sweep's jobs on the cluster.")
@ONLY
@sweep_options()
def cancel(request: Request, only: Sequence[str]) -> int:
    """Cancel a sweep's jobs on the cluster. Finished work is kept, and `alignbench retry` resumes from there."""
    from alignbench.launch import slurm, submissions

    store = readable_store(request.folder)
    name, manifest = request.manifest(store)
    wanted = {artefact.id for run in manifest.runs for artefact in run.missing(store)}
    live = submissions.slurm_jobs(submissions.read(store, name), wanted).live
    chosen = {cell.id for cell in selected(request.plan(), only)} if only else None
    ended = sorted({job.job for job, _ in live.values() if chosen is None or job.run in chosen})
    slurm.cancel(ended)
    print(f"{len(ended)} jobs cancelled" if ended else "no job of this sweep is queued or running on a cluster")
    return DONE


@click.command("retry", cls=Verb, short_help="Retry runs that failed or were lost.")
@ONLY
@slurm_options
@TRACK
@sweep_options()
def retry(
    request: Request, only: Sequence[str], slurm: str | None, wait: bool, jobs: int | None, track: Sequence[str]
) -> int:
    """Retry the runs that failed or were lost, with the launcher used before."""
    from alignbench.launch import status_table, submissions
    from alignbench.launch.local import check_launcher
    from alignbench.run import trackers
    from alignbench.store.run_state import LOST, UNKNOWN

    trackers.check(track)
    store = request.store()
    name, manifest = request.manifest(store)
    records = submissions.read(store, name)
    latest = next((record for record in records if record.launcher == "slurm"), None)
    plan, rows = request.plan(), status_table.rows(store, manifest)
    again = {row.id for row in rows if row.state in LOST}
    cells = [cell for cell in selected(plan, only) if cell.id in again]
    if not cells:
        unknown = next((f"; {row.title}: {row.reason}" for row in rows if row.state == UNKNOWN), "")
        print(f"no run has failed or was lost{unknown}", file=sys.stderr)
        return status_table.exit_code(rows)
    if latest is None:
        return _make(request, plan, cells, store, "local", jobs, track)
    check_launcher("slurm")
    options = _resources(request, plan, slurm) if slurm else latest.options
    return _submit(request, plan, cells, store, options, track, wait)


@click.command("rerun", cls=Verb, short_help="Repeat a finished run and compare the results bit by bit.")
@RUN
@click.option("--into", metavar="DIR", help="A new store for the repeated run (default: STORE/reruns/RUN-1, -2, ...).")
@STORE
def rerun(run: str, into: str | None, store: str) -> int:
    """Repeat a finished run from its own records, and report for every part whether it is identical bit by bit.

    RUN is a run id (a folder in the store's runs/) or its beginning. Uses the code that made the run if the store has
    a copy.
    """
    from alignbench.launch import rerun

    place = readable_store(store)
    remark, copy = rerun.original_code(place, run)
    if remark:
        print(remark, flush=True)
    if copy:
        return rerun.run_with(copy, ["rerun", run, "--store", store, *(["--into", into] if into else [])])
    code = DONE
    for line in rerun.rerun(place, run, Path(into) if into else None):
        print(line, flush=True)
        code = SOME_FAILED if isinstance(line, rerun.Verdict) and line.differs else code
    return code


@click.command("gc", cls=Verb, short_help="Delete files that no sweep in the store needs any longer.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@STORE
def gc(yes: bool, store: str) -> int:
    """List what no sweep in the store refers to, with sizes, and delete it once you confirm."""
    from alignbench.launch import cleanup

    place = usable_store(store)
    items = cleanup.unused(place)
    for item in items:
        print(f"{cleanup.human_size(item.size):>9}  {item.what}: {item.why}")
    if not items:
        print(f"{place.root}: there is nothing to delete")
        return DONE
    what = f"{len(items)} items, {cleanup.human_size(sum(item.size for item in items))}"
    if not yes and not sys.stdin.isatty():
        print(f"{what}; nothing was deleted: pass --yes, or confirm on a terminal")
        return DONE
    if not yes and input(f"{what}: delete them? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was deleted")
        return DONE
    gone = list(cleanup.delete(place, items))
    print(f"deleted: {len(gone)} of {what}")
    return DONE


# -- helpers ----------------------------------------------------------------------------------------------------------


def _record(request: Request, plan: Plan, cells: Sequence[PlannedRun], store: Store) -> Manifest:
    """Write the manifest, print how much is to be done, what changed and what is damaged; return the manifest."""
    from alignbench.launch.pending import set_damaged_aside
    from alignbench.store.manifest import changed_ids, write_manifest

    store.open()
    manifest, path = plan.manifest(request.plugins), store.root / "sweeps" / plan.document.manifest
    chosen = {(cell.spec.label, cell.seed) for cell in cells}
    damaged = set_damaged_aside([manifest.by_seed[key] for key in chosen], store)
    for line in filter(None, [changed_ids(path, manifest), *damaged]):
        print(f"alignbench: {line}", file=sys.stderr)
    write_manifest(path, manifest)
    print(summary(store, plan, cells), file=sys.stderr)
    return manifest


def _make(
    request: Request,
    plan: Plan,
    cells: Sequence[PlannedRun],
    store: Store,
    launcher: str,
    jobs: int | None,
    track: Sequence[str],
) -> int:
    """Execute what is missing on this machine, print the failures, and return the exit code."""
    from alignbench.launch.local import launch

    manifest = _record(request, plan, cells, store)
    outcomes = launch(plan, cells, store, launcher=launcher, jobs=jobs, plugins=request.plugins, track=track)
    print_gaps(store, _runs(manifest, cells))
    failed = [outcome for outcome in outcomes if outcome.state != "done"]
    for outcome in failed:
        log = store.root / "runs" / outcome.cell.id / "log.txt"
        print(f"alignbench: {outcome.cell.title} failed: {outcome.reason} (log: {log})", file=sys.stderr)
    if failed:
        print(f"alignbench: {len(failed)} of {len(outcomes)} runs failed; the next sweep retries them", file=sys.stderr)
    return SOME_FAILED if failed else DONE


def _runs(manifest: Manifest, cells: Sequence[PlannedRun]) -> list[ManifestRun]:
    chosen = {(cell.spec.label, cell.seed) for cell in cells}
    return [run for run in manifest.runs if (run.label, run.seed) in chosen]


def _resources(request: Request, plan: Plan, file: str | None) -> dict[str, Any]:
    from alignbench.experiment import resources

    return resources.read(plan.document.data.get("slurm", {}), file, request.registry())


def _submit(
    request: Request,
    plan: Plan,
    cells: Sequence[PlannedRun],
    store: Store,
    options: dict[str, Any],
    track: Sequence[str],
    wait: bool,
) -> int:
    """Submit what is missing to SLURM and return the exit code; with ``wait``, only after all jobs have ended."""
    from alignbench.launch import slurm, status_table
    from alignbench.launch.submit import submit
    from alignbench.store.run_state import LOST

    slurm.check_paths(store.root)
    manifest = _record(request, plan, cells, store)
    shown = manifest.only(_runs(manifest, cells))
    count = submit(plan, cells, store, options, request.plugins, track)
    print(f"{count} jobs submitted; alignbench status {plan.document.command}", file=sys.stderr)
    if wait:
        status_table.follow(store, shown)
    print_gaps(store, shown.runs)
    rows = status_table.rows(store, shown)
    for line in status_table.warnings(store, rows):
        print(f"alignbench: {line}", file=sys.stderr)
    for row in rows:
        if row.state in LOST:
            print(f"alignbench: {row.title} {row.state}: {row.reason}", file=sys.stderr)
    return status_table.exit_code(rows)

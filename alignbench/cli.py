"""The command line. Heavy modules load inside the verbs, so that help, lists and reports come at once."""

from __future__ import annotations

import argparse
import atexit
import functools
import gc as collector
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError

if TYPE_CHECKING:
    from alignbench.manifest import Manifest
    from alignbench.plugins import Registry
    from alignbench.store import Store
    from alignbench.sweep import Cell, Document, Draft, Plan

DONE, USAGE, SOME_FAILED, SOME_PENDING, INTERRUPTED = 0, 1, 2, 3, 130
EPILOG = """\
SWEEP is a YAML file, or the name of a packaged one (see `alignbench ls sweeps`). Settings on the command line beat the
file: training.batch=8 (every run), evaluation.protocol.steps=10, grid.training.seed=[0,1], seed=3.
Exit codes: 0 all done, 1 a mistake in what was asked (nothing was run), 2 some runs (of check-method: promises; of
doctor: checks) failed, 3 some are still to come, 130 interrupted.
"""
KINDS = ("methods", "evaluators", "backends", "prompts", "sweeps")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    arguments = parse(argv)
    try:
        return arguments.verb(arguments)
    except UserError as error:
        print(f"alignbench: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("alignbench: interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the output was piped into `head`
        sys.stdout = None  # type: ignore[assignment]  # nothing more to flush
        return DONE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand anywhere: argparse itself takes them only right after the sweep."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if not hasattr(arguments, "words") or any(word.startswith("-") for word in rest):
        rest and top.error(f"unknown: {' '.join(rest)}")
    else:
        arguments.words += rest
    return arguments


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line and exit code 1, as for every other mistake."""
        print(f"alignbench: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(USAGE)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="alignbench",
        description="Fair comparison of methods that align flow-matching text-to-image models with human preferences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(metavar="VERB", required=True, title="verbs", parser_class=Parser)
    add = {name: _verb(verbs, name, function) for name, function in VERBS.items()}
    for name in ("run", "sweep", "status", "report", "validate", "plan", "fit", "cancel", "retry"):
        _document(add[name], optional=name in ("run", "status", "fit"))
    for name in ("run", "sweep", "ls", "validate", "plan", "fit", "score", "import", "cancel", "retry", "doctor"):
        add[name].add_argument("--plugin", metavar="FILE", action="append", default=[], help=PLUGIN)
    stored = ("run", "sweep", "status", "report", "validate", "plan", "fit", "cancel", "retry", "logs", "rerun", "gc")
    for name in (*stored, "import", "compare"):
        add[name].add_argument(
            "--store", metavar="DIR", default="store", help="where results are kept (default: store)"
        )
    for name in ("sweep", "plan", "fit", "cancel", "retry"):
        add[name].add_argument("--only", metavar="KEY=VALUE", nargs="+", default=[], help=ONLY)
    for name in ("run", "sweep", "retry"):
        add[name].add_argument("--track", metavar="TRACKER", action="append", default=[], help=TRACK)
    for name in ("plan", "fit"):
        add[name].add_argument("--gpu", default="h100", help="whose speed and memory to assume: h100, h200 or a100")
    add["fit"].add_argument("--ranks", type=_count, default=1, metavar="N", help="GPUs that share a run (default: 1)")
    add["fit"].add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="how they share the model")
    add["sweep"].add_argument("--launcher", default="local", help=LAUNCHER)
    for name in ("sweep", "retry"):
        add[name].add_argument("--slurm", metavar="FILE", help="what jobs ask SLURM for (YAML; beats the sweep's own)")
        add[name].add_argument("--wait", action="store_true", help="stay until all of SLURM's jobs have ended")
        add[name].add_argument(
            "-j", "--jobs", type=_count, metavar="N", help="local workers at a time (default: GPUs or cores)"
        )
    add["logs"].add_argument("run", metavar="RUN", help="folder below the store's runs/, or how its name begins")
    add["logs"].add_argument("-f", "--follow", action="store_true", help="go on as the run goes on")
    for name in ("run", "fit"):
        add[name].add_argument("--method", required=name == "run", help=METHOD)
    add["report"].add_argument("--out", metavar="DIR", help="where to write the report (default: outputs/<sweep>)")
    add["report"].add_argument("--format", metavar="A,B", help="only these: md, csv, tex, png (default: all)")
    add["new-method"].add_argument("name", metavar="NAME", help="as in a sweep's YAML, for instance my_method")
    add["check-method"].add_argument("file", metavar="FILE", help="a Python file with methods of your own")
    add["check-method"].add_argument("--settings", metavar="A=B", action="append", default=[], help=SETTINGS)
    add["check-method"].add_argument("--traceback", action="store_true", help="say where a broken promise went wrong")
    add["score"].add_argument("folder", metavar="FOLDER", help="of pictures")
    add["score"].add_argument("words", nargs="*", metavar="EVALUATOR.SETTING=VALUE", help="as pickscore.weights=shapes")
    add["score"].add_argument("--prompts", metavar="LIST", help="a .txt or .jsonl file, or a list's name")
    add["score"].add_argument("-e", "--evaluators", metavar="A,B", required=True, help="evaluators or metrics")
    add["score"].add_argument("--out", metavar="FILE", default="scores.csv", help="table to write (.csv or .parquet)")
    _import_options(add["import"])
    add["compare"].add_argument("a", metavar="A", help=SIDE)
    add["compare"].add_argument("b", metavar="B", help="the same, of this sweep or another")
    add["compare"].add_argument("-e", "--evaluators", metavar="M,N", help="only these metrics or evaluators")
    add["compare"].add_argument("--out", metavar="DIR", help="write compare.md, .csv and .png (the pictures) into it")
    add["gc"].add_argument("--yes", action="store_true", help="delete without asking")
    add["rerun"].add_argument("run", metavar="RUN", help="a folder's name below runs/, or the beginning of one")
    add["rerun"].add_argument("--into", metavar="DIR", help="a new store for it (default: STORE/reruns/RUN-1, -2, ...)")
    add["doctor"].add_argument("words", nargs="*", metavar="EVALUATOR.SETTING=VALUE", help="as hpsv3.weights=FOLDER")
    add["doctor"].add_argument("-e", "--evaluators", metavar="A,B", help="only these evaluators or metrics")
    add["doctor"].add_argument("--install", metavar="NAME", help="make an official package's environment, as shown")
    add["doctor"].add_argument("--references", metavar="DIR", help=REFERENCES)
    add["ls"].add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    return top


SIDE = "SWEEP:LABEL, a label that one sweep alone has, or a run's id or the beginning of one"
LAUNCHER = "local: worker processes; debug: in this process; slurm: jobs of a cluster, submitted, then this ends"
TRACK = "show training in tensorboard, wandb or trackio, too; may be given several times"
REFERENCES = "pictures with published scores (default: ~/.cache/alignbench/references)"
PLUGIN = "a Python file with methods or evaluators of your own; may be given several times"
REHEARSE = "the whole sweep with small stand-ins for its models: to see that all of it works; stamped REHEARSAL"
METHOD = "of the sweep's cases, or any method with its defaults"
SETTINGS = "a setting of the methods, instead of its default, as in steps=5; may be given several times"
ONLY = "run only these: method=refl, '!seed=2', or any setting's path; several values of one key are alternatives"


def _verb(verbs: Any, name: str, function: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=function.__doc__.partition("\n")[0], description=function.__doc__, epilog=EPILOG)
    verb.set_defaults(verb=function)
    return verb


def _document(verb: argparse.ArgumentParser, optional: bool) -> None:
    words = "sweep, then settings as path.to.setting=value"
    verb.add_argument("words", nargs="*" if optional else "+", metavar="SWEEP [a.b=c]", help=words)
    verb.add_argument("--seeds", metavar="0,1,...", help="training seeds, instead of the file's")
    verb.add_argument("--limit", metavar="N", type=_count, help="the first N evaluation prompts only; stamped SUBSET")
    verb.add_argument("--rehearse", action="store_true", help=REHEARSE)


def _import_options(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("kind", choices=("images", "flowbp", "unirl", "geneval"), metavar="KIND", help="images, flowbp, unirl, geneval")
    add("path", metavar="PATH", help="a folder of pictures; else a file of scores, or the folder that it is in")
    add("words", nargs="*", metavar="EVALUATOR.SETTING=VALUE", help="as pickscore.weights=shapes")
    add("--label", metavar="NAME", required=True, help="the row of the table")
    add("--sweep", metavar="NAME", default="imported", help="what the table is called (default: imported)")
    add(
        "--prompts",
        metavar="LIST",
        help="a .txt or .jsonl file, or a list's name; images in GenEval's layout need none",
    )
    add("--images", metavar="DIR", help="where the pictures are, if not where the file says")
    add("-e", "--evaluators", metavar="A,B", help="score the pictures with these evaluators or metrics, too")
    add("--seed", type=int, metavar="N", help="of training, 0, 1, ... (default: one training of unknown seed)")
    add("--base", action="store_true", help="the model before any training: what the others are compared with")
    add("--trained-on", metavar="A,B", help="the rewards of its training, as hpsv2.1 (default: unknown)")
    add(
        "--protocol", metavar="A=B,...", default="", help="how pictures were made: steps, guidance, size, weights, seed"
    )
    add("--replace", action="store_true", help="put this in the place of a row of the same label and seed")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


# -- verbs ------------------------------------------------------------------------------------------------------------


def sweep(arguments: argparse.Namespace) -> int:
    """Make everything of a sweep that is not in the store yet: train, generate, score."""
    from alignbench.launch import check_launcher

    check_launcher(arguments.launcher)
    store = _store(arguments)
    plan = _plan(arguments)
    cells = _selected(plan, arguments.only)
    if arguments.launcher == "slurm":
        return _hand_out(arguments, plan, cells, store, _resources(arguments, plan))
    code = _make(arguments, plan, cells, store, arguments.launcher, arguments.jobs)
    print(f"the table: alignbench report {plan.document.command}", file=sys.stderr)
    return code


def run(arguments: argparse.Namespace) -> int:
    """Make one run in the foreground: the first of a sweep (default: quickstart) with --method."""
    from alignbench.results import Results

    store = _store(arguments)
    plan = _resolve(_with_method(arguments, "quickstart"), _registry(arguments))
    cell = next(cell for cell in plan.cells if cell.spec.method["name"] == arguments.method)
    code = _make(arguments, plan, [cell], store, "debug", None)
    manifest = plan.manifest()
    results = Results(store.root, manifest.only([run for run in manifest.runs if run.id == cell.id]))
    means = results.scores.groupby("metric", sort=False)["score"].mean()
    for metric, mean in means.items():
        print(f"{metric}: {mean:.4f}")
    print(f"{store.root / 'runs' / cell.id}" + (f" (seed {cell.seed})" if cell.trains else ""))
    return code


def status(arguments: argparse.Namespace) -> int:
    """What the store has: of every sweep run in it, or of each run of one, with what the cluster says of its jobs."""
    from alignbench import jobs
    from alignbench.manifest import read_manifest

    store = _store(arguments)
    if arguments.words:
        name, manifest = _named_manifest(arguments, store)
        rows = jobs.rows(store, manifest, jobs.records(store, name))
        print(jobs.table(rows))
        return jobs.exit_code(rows)
    for path in store.manifests():
        try:
            manifest = read_manifest(path)
        except UserError as error:  # of one sweep; the others are shown
            print(error, file=sys.stderr)
            continue
        rows = jobs.rows(store, manifest, jobs.records(store, path.stem))
        print(f"{path.stem}: {jobs.summary(rows)}  (alignbench report {manifest.sweep or path.stem})")
    if not store.manifests():
        print(f"no sweep was run in {store.root} yet; try: alignbench sweep quickstart")
    return DONE


def logs(arguments: argparse.Namespace) -> int:
    """Print what a run's jobs have written; with -f, go on until it has ended."""
    from alignbench import jobs

    for text in jobs.log(_store(arguments), arguments.run, arguments.follow):
        print(text, end="", flush=True)
    return DONE


def cancel(arguments: argparse.Namespace) -> int:
    """End a sweep's jobs on the cluster. What they have made stays, and `alignbench retry` goes on from there."""
    from alignbench import jobs, slurm

    store = _store(arguments)
    name, _ = _named_manifest(arguments, store)
    coming = jobs.under_way(jobs.records(store, name))
    chosen = {cell.id for cell in _selected(_plan(arguments), arguments.only)} if arguments.only else None
    ended = sorted({ticket.job for ticket, _ in coming.values() if chosen is None or ticket.run in chosen})
    slurm.cancel(ended)
    print(f"{len(ended)} jobs cancelled" if ended else "no job of this sweep is queued or running on a cluster")
    return DONE


def retry(arguments: argparse.Namespace) -> int:
    """Make what failed or was lost once more, in the way it was made before."""
    from alignbench import jobs
    from alignbench.launch import check_launcher
    from alignbench.run_state import LOST

    store = _store(arguments)
    name, manifest = _named_manifest(arguments, store)
    records = jobs.records(store, name)
    latest = next((record for record in records if record.launcher == "slurm"), None)
    plan = _plan(arguments)
    again = {row.id for row in jobs.rows(store, manifest, records) if row.state in LOST}
    cells = [cell for cell in _selected(plan, arguments.only) if cell.id in again]
    if not cells:
        print("nothing has failed or was lost", file=sys.stderr)
        return jobs.exit_code(jobs.rows(store, manifest, records))
    if latest is None:
        return _make(arguments, plan, cells, store, "local", arguments.jobs)
    check_launcher("slurm")
    options = _resources(arguments, plan) if arguments.slurm else latest.options
    return _hand_out(arguments, plan, cells, store, options)


def uncollected(verb: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """``verb`` without Python's search for cycles among a million objects, all of them kept: a tenth of its time."""

    @functools.wraps(verb)
    def run(arguments: argparse.Namespace) -> int:
        before = collector.isenabled()
        collector.disable()
        atexit.register(_end)
        try:
            return verb(arguments)
        finally:
            if before:
                collector.enable()

    return run


def _end() -> None:
    """No last search either, unless torch is there: its libraries complain of what is left over."""
    if "torch" not in sys.modules:
        collector.freeze()


@uncollected
def report(arguments: argparse.Namespace) -> int:
    """Print the table of a sweep from what the store has, and write it in every format: page, tables, picture grid."""
    from alignbench import jobs
    from alignbench.report import FORMATS, build, check_formats
    from alignbench.results import Results
    from alignbench.store import Store

    formats = arguments.format.split(",") if arguments.format else FORMATS
    check_formats(formats)
    store = Store(arguments.store)  # may be read-only
    name, manifest = _named_manifest(arguments, store)
    results = Results(store.root, manifest, jobs.handed_out(jobs.records(store, name)), sweep=name)
    paths = build(results, Path(arguments.out or f"outputs/{manifest.name}"), formats)
    if "md" in formats:
        print(paths[0].read_text(encoding="utf-8"))
    print("\n".join(f"written: {path}" for path in paths))
    return DONE


def ls(arguments: argparse.Namespace) -> int:
    """What can be named in a sweep, with a line on each. Imports none of it."""
    registry = _registry(arguments)
    for kind in [arguments.kind] if arguments.kind else KINDS:
        if not arguments.kind:
            print(f"{kind}:")
        listed = _listed(kind, registry)
        width = max(len(name) for name, _ in listed)
        for name, text in listed:
            print(f"  {name:<{width}} {text}".rstrip())
    return DONE


def validate(arguments: argparse.Namespace) -> int:
    """Check a sweep file with its plug-ins, weights, prompts and store. Makes nothing."""
    from alignbench.planning import shopping
    from alignbench.sweep import draft, missing

    _store(arguments)
    document, registry = _read(arguments), _registry(arguments)
    gaps = missing(draft(document, registry), registry)
    if len(gaps) > 1:  # one is told with its place, as for every other mistake
        print("\n".join(shopping(gaps)), file=sys.stderr)
        return USAGE
    plan = _resolve(document, registry)
    evaluators = ", ".join(score.name for score in plan.scores)
    print(f"{plan.document.path}: fine; {len(plan.cells)} runs, {len(plan.prompts)} prompts, scored by {evaluators}")
    return DONE


def plan(arguments: argparse.Namespace) -> int:
    """Every run of a sweep: state, GPU-hours, memory, disk; and all that is missing. Makes nothing.

    The exit code is 1 as long as something is missing.
    """
    from alignbench import jobs
    from alignbench.planning import gpu_named, page
    from alignbench.sweep import draft, missing

    gpu = gpu_named(arguments.gpu)
    store, registry, document = _store(arguments), _registry(arguments), _read(arguments)
    drafted = draft(document, registry)
    gaps = missing(drafted, registry)
    plan = None if gaps else _resolve(document, registry)
    cells = _selected(plan or drafted, arguments.only)
    handed_out = jobs.handed_out(jobs.records(store, Path(document.manifest).stem))
    print(page(drafted, plan, cells, store, registry, gpu, gaps, handed_out))
    if plan is not None:
        print(_summary(store, plan, cells))
    return USAGE if gaps else DONE


def fit(arguments: argparse.Namespace) -> int:
    """Does training fit a GPU: memory by part, the largest micro-batch, and what would make it fit. Makes nothing.

    Of a sweep (default: table2), or of one method with its settings. Needs no weights. The exit code is 2 if a run does
    not fit.
    """
    from alignbench.fitting import Group, page
    from alignbench.planning import gpu_named
    from alignbench.sweep import draft

    gpu, registry = gpu_named(arguments.gpu), _registry(arguments)
    drafted = draft(_with_method(arguments, "table2"), registry)
    cells = [cell for cell in _selected(drafted, arguments.only) if cell.trains]
    if arguments.method:
        cells = [cell for cell in cells if cell.spec.method["name"] == arguments.method]
    ranks = Group(arguments.ranks, arguments.parallel)
    text, fits = page(drafted.document.name, [cell.spec for cell in cells], registry, gpu, ranks)
    print(text)
    return DONE if fits else SOME_FAILED


def new_method(arguments: argparse.Namespace) -> int:
    """Write a small working method and its test into this folder, to start from."""
    from alignbench.authoring import new_method

    for path in new_method(arguments.name, Path()):
        print(f"written: {path}")
    print(f"now put your method into {arguments.name}.py, then:")
    print(f"  alignbench check-method {arguments.name}.py  (or: pytest test_{arguments.name}.py)")
    print(f"  alignbench run quickstart --method {arguments.name} --plugin {arguments.name}.py")
    return DONE


def check_method(arguments: argparse.Namespace) -> int:
    """Check every method in a file against what training relies on, one line per promise."""
    from alignbench.authoring import check_methods

    code = DONE
    for name, verdicts in check_methods(arguments.file, arguments.settings):
        print(f"{name}:")
        for verdict in verdicts:
            print(f"{verdict}{verdict.details if arguments.traceback else ''}", flush=True)
            code = SOME_FAILED if verdict.reason else code
    return code


def score(arguments: argparse.Namespace) -> int:
    """Score a folder of pictures: a table with a row per picture and metric, and means with their intervals.

    FOLDER holds GenEval's layout, alignbench's own file names, or in the order of their names the same number of
    pictures for every prompt of --prompts; a .jsonl list may name each picture's "file" instead.
    """
    from alignbench import scoring

    evaluators = scoring.judges(_registry(arguments), arguments.evaluators, arguments.words)
    chosen = scoring.pictures(Path(arguments.folder), arguments.prompts)
    for evaluator in evaluators:
        evaluator.check([picture.prompt for picture in chosen])
    bases = [scoring.partners(evaluator, chosen, arguments.prompts) for evaluator in evaluators]
    scored = [(judge, scoring.score_pictures(judge, chosen, base)) for judge, base in zip(evaluators, bases)]
    for path in scoring.save(scored, Path(arguments.out), arguments.plugin):
        print(f"written: {path}", file=sys.stderr)
    print(scoring.summary(scored).markdown())
    return DONE if all(frame["ok"].all() for _, frame in scored) else SOME_FAILED


def import_(arguments: argparse.Namespace) -> int:
    """Put pictures and scores that were made elsewhere into the store, as a row of a sweep of their own.

    KIND is images (a folder, in any layout that `alignbench score` reads), flowbp (its scores.json), unirl (its
    scores.jsonl) or geneval (results.jsonl of evaluate_images.py). What nobody told is marked unknown.
    """
    from alignbench import importing, scoring

    store, registry = _store(arguments), _registry(arguments)
    given = arguments.evaluators
    if arguments.words and not given:
        raise UserError(f"{arguments.words[0]}: is a setting of no evaluator; name it with -e")
    judges = scoring.judges(registry, given, arguments.words) if given else []
    run, changed = importing.add(store, importing.asked(arguments), judges, registry)
    print("\n".join(importing.told(run, changed)))
    print(f"the table: alignbench report {arguments.sweep} --store {arguments.store}")
    return DONE


def compare(arguments: argparse.Namespace) -> int:
    """Compare two rows or runs: paired differences per metric, and the prompts in which they differ most."""
    from alignbench import compare
    from alignbench.store import Store

    store = Store(arguments.store)
    a, b = compare.find(store, arguments.a), compare.find(store, arguments.b)
    results, remarks = compare.compare(store, a, b, arguments.evaluators.split(",") if arguments.evaluators else ())
    text = compare.page(store, a, b, results, remarks)
    paths = compare.build(store, a, b, results, text, Path(arguments.out)) if arguments.out else []
    print(text, end="")
    print("".join(f"written: {path}\n" for path in paths), end="")
    return DONE


def rerun(arguments: argparse.Namespace) -> int:
    """Make a finished run again from its own records, and say whether every part is the same, bit by bit.

    Uses the code that made it, if the store has a copy. Exit code 0: all equal, 2: something differs.
    """
    from alignbench import rerun
    from alignbench.store import Store

    store = Store(arguments.store)
    remark, copy = rerun.elsewhere(store, arguments.run)
    remark and print(remark, flush=True)
    if copy:
        into = ["--into", arguments.into] if arguments.into else []
        return rerun.again_with(copy, ["rerun", arguments.run, "--store", arguments.store, *into])
    code = DONE
    for said in rerun.rerun(store, arguments.run, Path(arguments.into) if arguments.into else None):
        print(said, flush=True)
        code = SOME_FAILED if isinstance(said, rerun.Verdict) and said.differs else code
    return code


def gc(arguments: argparse.Namespace) -> int:
    """List what no sweep of the store refers to, with sizes, and delete it once you agree."""
    from alignbench import gc
    from alignbench.store import Store

    store = Store(arguments.store)
    items = gc.unused(store)
    for item in items:
        print(f"{gc.shown(item.size):>9}  {item.what}: {item.why}")
    if not items:
        print(f"{store.root}: there is nothing to delete")
        return DONE
    what = f"{len(items)} items, {gc.shown(sum(item.size for item in items))}"
    if not arguments.yes and not sys.stdin.isatty():
        print(f"{what}; nothing was deleted: say --yes, or answer on a terminal")
        return DONE
    if not arguments.yes and input(f"{what}: delete them? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was deleted")
        return DONE
    gone = list(gc.delete(store, items))
    print(f"deleted: {len(gone)} of {what}")
    return DONE


def doctor(arguments: argparse.Namespace) -> int:
    """Look at packages, weights and official engines, and whether evaluators still compute what they did.

    Golden scores are of small random checkpoints, on pictures made here: they need no weights. Missing weights are
    named with the command that fetches them, and are not wrong; exit code 2 if something is.
    """
    from alignbench import doctor, official, scoring
    from alignbench.config import cache

    if arguments.install:
        official.install(arguments.install)
        return DONE
    registry = _registry(arguments)
    names = arguments.evaluators or ",".join(registry.names("evaluator"))
    chosen = scoring.evaluator_settings(registry, names, arguments.words)
    references = Path(arguments.references) if arguments.references else cache() / "references"
    lines = []
    for line in doctor.look(registry, chosen, references):
        lines.append(line)
        print(f"{line.part}: {line.verdict}", file=sys.stderr)
    print(doctor.table(lines))
    print(f"\n{doctor.UNTRIED}")
    return SOME_FAILED if any(line.verdict == doctor.WRONG for line in lines) else DONE


VERBS = {
    "run": run,
    "sweep": sweep,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "retry": retry,
    "report": report,
    "ls": ls,
    "validate": validate,
    "plan": plan,
    "fit": fit,
    "score": score,
    "import": import_,
    "compare": compare,
    "rerun": rerun,
    "gc": gc,
    "doctor": doctor,
    "new-method": new_method,
    "check-method": check_method,
}


# -- their parts ------------------------------------------------------------------------------------------------------


def _store(arguments: argparse.Namespace) -> Store:
    """The store, proven usable; nothing is written to it."""
    from alignbench.store import Store

    store = Store(arguments.store)
    store.check_writable()
    return store


def _registry(arguments: argparse.Namespace) -> Registry:
    from alignbench.plugins import Registry

    return Registry(arguments.plugin)


def _read(arguments: argparse.Namespace, default: str | None = None) -> Document:
    from alignbench.sweep import read

    files = [word for word in arguments.words if "=" not in word]
    if len(files) > 1 or not (files or default):
        raise UserError(f"command line: name one sweep, got {', '.join(files) or 'none'}")
    assignments = [word for word in arguments.words if "=" in word]
    document = read(files[0] if files else str(default), assignments, arguments.seeds, arguments.limit)
    if not arguments.rehearse:
        return document
    from alignbench.rehearsal import rehearse

    return rehearse(document, Path(arguments.store))


def _with_method(arguments: argparse.Namespace, default: str) -> Document:
    """The sweep, which has a case of ``--method`` if that is given: with its defaults, if it had none."""
    from alignbench.sweep import Document

    document, name = _read(arguments, default), arguments.method
    cases = document.data.get("cases") or []
    if not name or any((case.get("method") or {}).get("name") == name for case in cases):
        return document
    cases = [*cases, {"label": name, "method": {"name": name}}]
    return Document(document.path, document.data | {"cases": cases}, document.run_sets, document.command)


def _resolve(document: Document, registry: Registry) -> Plan:
    from alignbench.sweep import resolve, warnings_of

    plan = resolve(document, registry)
    for line in warnings_of(plan, registry):
        print(f"alignbench: {line}", file=sys.stderr)
    return plan


def _plan(arguments: argparse.Namespace) -> Plan:
    return _resolve(_read(arguments), _registry(arguments))


def _selected(plan: Plan | Draft, only: Sequence[str]) -> list[Cell]:
    from alignbench.sweep import select

    return select(plan.cells, only)


def _make(
    arguments: argparse.Namespace, plan: Plan, cells: Sequence[Cell], store: Store, launcher: str, jobs: int | None
) -> int:
    """Record the manifest, make what is missing, name what failed."""
    from alignbench import trackers
    from alignbench.launch import launch
    from alignbench.manifest import write_manifest

    trackers.check(arguments.track)
    store.open()
    write_manifest(store.root / "sweeps" / plan.document.manifest, plan.manifest(arguments.plugin))
    print(_summary(store, plan, cells), file=sys.stderr)
    outcomes = launch(plan, cells, store, launcher=launcher, jobs=jobs, plugins=arguments.plugin, track=arguments.track)
    failed = [outcome for outcome in outcomes if outcome.state != "done"]
    for outcome in failed:
        log = store.root / "runs" / outcome.cell.id / "log.txt"
        print(f"alignbench: {outcome.cell.title} failed: {outcome.reason} (log: {log})", file=sys.stderr)
    if failed:
        print(
            f"alignbench: {len(failed)} of {len(outcomes)} runs failed; they are tried again next time", file=sys.stderr
        )
    return SOME_FAILED if failed else DONE


def _resources(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    from alignbench import slurm

    return slurm.read(plan.document.data.get("slurm", {}), arguments.slurm, _registry(arguments))


def _hand_out(
    arguments: argparse.Namespace, plan: Plan, cells: Sequence[Cell], store: Store, options: dict[str, Any]
) -> int:
    """Submit what is missing to SLURM and end; with --wait, stay until it is made."""
    from alignbench import jobs, trackers
    from alignbench.launch import submit
    from alignbench.manifest import write_manifest
    from alignbench.run_state import LOST

    trackers.check(arguments.track)
    store.open()
    manifest = plan.manifest(arguments.plugin)
    path = store.root / "sweeps" / plan.document.manifest
    write_manifest(path, manifest)
    print(_summary(store, plan, cells), file=sys.stderr)
    count = submit(plan, cells, store, options, arguments.plugin, arguments.track)
    print(f"{count} jobs submitted; alignbench status {plan.document.command}", file=sys.stderr)
    chosen = {(cell.spec.label, cell.seed) for cell in cells}
    shown = manifest.only([run for run in manifest.runs if (run.label, run.seed) in chosen])
    if arguments.wait:
        jobs.follow(store, shown, path.stem)
    rows = jobs.rows(store, shown, jobs.records(store, path.stem))
    for row in rows:
        if row.state in LOST:
            print(f"alignbench: {row.title} {row.state}: {row.reason}", file=sys.stderr)
    return jobs.exit_code(rows)


def _summary(store: Store, plan: Plan, cells: Sequence[Cell]) -> str:
    """``6 runs: 0 to train, 0 image sets to make, 0 scores to compute``."""
    runs = plan.manifest().by_seed
    parts = {part.lock: part for cell in cells for part in runs[cell.spec.label, cell.seed].missing(store)}
    trained = {cell.id for cell in cells if cell.trains}
    train = sum(part.kind == "run" and part.id in trained for part in parts.values())
    images, scores = (sum(part.kind == kind for part in parts.values()) for kind in ("images", "scores"))
    return f"{len(cells)} runs: {train} to train, {images} image sets to make, {scores} scores to compute"


def _named_manifest(arguments: argparse.Namespace, store: Store) -> tuple[str, Manifest]:
    """Name and manifest of a sweep that was run: by its file and the same settings, or by what `status` calls it."""
    from alignbench.manifest import read_manifest

    word = arguments.words[0]
    named = store.root / "sweeps" / f"{word}.json"
    path = named if named.is_file() else store.root / "sweeps" / _read(arguments).manifest
    if not path.is_file():
        known = ", ".join(path.stem for path in store.manifests())
        raise UserError(
            f"{' '.join(arguments.words)}: was not run in {store.root} as it stands; "
            f"run `alignbench sweep` with the same words (in the store: {known or 'nothing'})"
        )
    return path.stem, read_manifest(path)


def _listed(kind: str, registry: Registry) -> list[tuple[str, str]]:
    from alignbench.prompts import GENERATED, SHAPES, SPLITS
    from alignbench.promptsets import SETS
    from alignbench.sweep import sweeps

    if kind == "prompts":
        shapes = [(f"shapes/{split}", str(SHAPES / f"{split}.jsonl")) for split in SPLITS]
        made = [(name, "made on demand") for name in GENERATED]
        return [*shapes, *made, *((name, f"{chosen.about} ({chosen.repository})") for name, chosen in SETS.items())]
    if kind == "sweeps":
        return [(name, str(path)) for name, path in sweeps().items()]
    names = registry.names(kind.removesuffix("s"))  # type: ignore[arg-type]
    return [(name, registry.entries[kind.removesuffix("s"), name].doc) for name in names]


if __name__ == "__main__":
    sys.exit(main())

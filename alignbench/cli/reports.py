"""Verbs that turn scores and images, made here or elsewhere, into tables."""

from __future__ import annotations

import atexit
import functools
import gc as collector
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from alignbench.cli.common import (
    DONE,
    PLUGIN,
    SOME_FAILED,
    STORE,
    Choice,
    Request,
    Verb,
    print_gaps,
    readable_store,
    registry,
    settings_words,
    sweep_options,
    usable_store,
)


def without_gc(verb: Callable[..., int]) -> Callable[..., int]:
    """Run ``verb`` without garbage collection, a tenth of its time: it makes a million objects and keeps them all."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> int:
        was_enabled = collector.isenabled()
        collector.disable()
        atexit.register(_skip_last_collection)
        try:
            return verb(*args, **kwargs)
        finally:
            if was_enabled:
                collector.enable()

    return run


def _skip_last_collection() -> None:
    """Skip the collection at exit too, unless torch is loaded: its libraries complain about leftover objects."""
    if "torch" not in sys.modules:
        collector.freeze()


@click.command("report", cls=Verb, short_help="Write a sweep's report: Markdown, CSV, LaTeX, HTML, plots.")
@click.option("--out", metavar="DIR", help="Folder for the report (default: outputs/<sweep>).")
@click.option(
    "--format", "formats", metavar="A,B", help="Formats among md, csv, tex, html, svg, png, data (default: all)."
)
@sweep_options(plugins=False)
@without_gc
def report(request: Request, out: str | None, formats: str | None) -> int:
    """Print a sweep's table from what the store has, and write it in all formats: tables, data, page, image grid."""
    from alignbench.launch import submissions
    from alignbench.reporting.analysis.results import Results
    from alignbench.reporting.report import FORMATS, build, check_formats

    chosen = formats.split(",") if formats else FORMATS
    check_formats(chosen)
    store = readable_store(request.folder)
    name, manifest = request.manifest(store)
    results = Results(store.root, manifest, submissions.known_jobs(store, manifest), sweep=name)
    paths = build(results, Path(out or f"outputs/{manifest.name}"), chosen)
    if "md" in chosen:
        print(paths[0].read_text(encoding="utf-8"))
    print("\n".join(f"written: {path}" for path in paths))
    return DONE


@click.command("compare", cls=Verb, short_help="Compare two rows or runs, paired prompt by prompt.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("-e", "--evaluators", metavar="M,N", help="Compare only these metrics or evaluators.")
@click.option("--out", metavar="DIR", help="Write compare.md, .csv and .png (the images) to this folder.")
@STORE
def compare(a: str, b: str, evaluators: str | None, out: str | None, store: str) -> int:
    """Compare two rows or runs: paired differences per metric, and the prompts on which they differ most.

    A and B are each SWEEP:LABEL, a label that only one sweep has, or a run id or its beginning.
    """
    from alignbench.reporting import compare
    from alignbench.reporting.analysis import pairs

    place = readable_store(store)
    left, right = pairs.find(place, a), pairs.find(place, b)
    pair, remarks = pairs.compare(place, left, right, evaluators.split(",") if evaluators else ())
    text = compare.page(place, left, right, pair, remarks)
    paths = compare.build(place, left, right, pair, text, Path(out)) if out else []
    print(text, end="")
    print("".join(f"written: {path}\n" for path in paths), end="")
    return DONE


@click.command("score", cls=Verb, short_help="Score a folder of images: a table, and means with intervals.")
@click.argument("folder", metavar="FOLDER")
@settings_words
@click.option("-e", "--evaluators", metavar="A,B", required=True, help="Evaluators or metrics.")
@click.option("--prompts", metavar="LIST", help="A .txt or .jsonl file, or the name of a prompt list.")
@click.option("--out", metavar="FILE", default="scores.csv", help="Table to write, .csv or .parquet (scores.csv).")
@PLUGIN
def score(
    folder: str, words: Sequence[str], evaluators: str, prompts: str | None, out: str, plugin: Sequence[str]
) -> int:
    """Score a folder of images: a table with a row per image and metric, and means with confidence intervals.

    FOLDER has GenEval's layout, alignbench's own file names, or names in which a number counts the prompts of
    --prompts; that list may name each image's "file" instead. See docs/importing.md. Example of an evaluator's
    setting: pickscore.weights=shapes. What is scored is kept beside the table as long as a score is missing: the
    same command then scores only what is missing for a reason that may have passed, and images that have changed.
    """
    from alignbench.evaluation import folders, scoring
    from alignbench.reporting import score_summary
    from alignbench.store.score_gaps import describe

    score_summary.check_out(Path(out))
    known = registry(plugin)
    chosen = scoring.make_evaluators(known, evaluators, list(words))
    images, remarks = folders.read_folder(Path(folder), prompts)
    for evaluator in chosen:
        evaluator.check([image.prompt for image in images])
    bases = [scoring.base_images(evaluator, images, prompts) for evaluator in chosen]
    parts = Path(out).with_suffix(".parts")
    scored, errors = scoring.score_with_all(chosen, images, bases, parts, known)
    print("".join(f"{folder}: {remark}\n" for remark in remarks), end="", file=sys.stderr)
    if scored:
        for path in score_summary.save(scored, Path(out), list(plugin)):
            print(f"written: {path}", file=sys.stderr)
        print(score_summary.summary(scored))
    complete = not errors and all(frame["ok"].all() for _, frame in scored)
    if complete:
        shutil.rmtree(parts, ignore_errors=True)
    for evaluator, frame in scored:
        if not frame["ok"].all():
            what = describe(list(frame["error"].dropna()), len(frame))
            print(f"alignbench: {evaluator.name}: {what}", file=sys.stderr)
    if parts.exists():
        print(f"what was scored is kept in {parts}; the same command scores only the rest", file=sys.stderr)
    for error in errors[1:]:
        print(f"alignbench: {' '.join(str(error).split())}", file=sys.stderr)
    if errors:
        raise errors[0]
    return DONE if complete else SOME_FAILED


@click.command("import", cls=Verb, short_help="Import images or scores made elsewhere as a row of a table.")
@click.argument("kind", metavar="KIND", type=Choice(("images", "flowbp", "unirl", "geneval")))
@click.argument("path", metavar="PATH")
@settings_words
@click.option("--label", metavar="NAME", required=True, help="Name of the row.")
@click.option("--sweep", metavar="NAME", default="imported", help="Name of the table (default: imported).")
@click.option(
    "--prompts",
    metavar="LIST",
    help="A .txt or .jsonl file, or the name of a prompt list; not needed for images in GenEval's layout.",
)
@click.option("--images", metavar="DIR", help="Folder of the images, if not the one that the file names.")
@click.option("-e", "--evaluators", metavar="A,B", help="Also score the images with these evaluators or metrics.")
@click.option("--seed", type=int, metavar="N", help="Training seed, 0, 1, ... (default: one run of unknown seed).")
@click.option("--base", is_flag=True, help="This row is the untrained model, with which the others are compared.")
@click.option("--trained-on", metavar="A,B", help="Rewards it was trained on, for instance hpsv2.1 (default: unknown).")
@click.option(
    "--protocol", metavar="A=B,...", default="", help="How the images were made: steps, guidance, size, weights, seed."
)
@click.option("--replace", is_flag=True, help="Replace the row with the same label and seed.")
@PLUGIN
@STORE
def import_(**given: Any) -> int:
    """Import images and scores made elsewhere into the store, as a row of an imported sweep.

    KIND is images (a folder in any layout that `alignbench score` reads), flowbp (its scores.json), unirl (its
    scores.jsonl) or geneval (results.jsonl of evaluate_images.py). PATH is the folder of images, or the file of scores
    or its folder. Anything that the files do not state is marked unknown.
    """
    from alignbench.config import UserError
    from alignbench.evaluation import import_rows, scoring

    asked = SimpleNamespace(**given)
    store, known = usable_store(asked.store), registry(asked.plugin)
    if asked.words and not asked.evaluators:
        raise UserError(f"{asked.words[0]}: there is no evaluator for this setting; name one with -e")
    evaluators = scoring.make_evaluators(known, asked.evaluators, list(asked.words)) if asked.evaluators else []
    run, changed = import_rows.import_row(store, import_rows.parse_request(asked), evaluators, known)
    print("\n".join(import_rows.summary_lines(run, changed)))
    print_gaps(store, [run])
    print(f"the table: alignbench report {asked.sweep} --store {asked.store}")
    return SOME_FAILED if run.missing(store) else DONE

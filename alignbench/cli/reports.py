"""Verbs that turn scores and images, ours or others', into tables."""

from __future__ import annotations

import atexit
import functools
import gc as collector
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
    registry,
    settings_words,
    sweep_options,
    usable_store,
)


def uncollected(verb: Callable[..., int]) -> Callable[..., int]:
    """Run ``verb`` without Python's search for cycles: a million objects, all of them kept, and a tenth of its time."""

    @functools.wraps(verb)
    def run(*given: Any, **named: Any) -> int:
        before = collector.isenabled()
        collector.disable()
        atexit.register(_end)
        try:
            return verb(*given, **named)
        finally:
            if before:
                collector.enable()

    return run


def _end() -> None:
    """Skip the last search too, unless torch is there: its libraries complain of what is left over."""
    if "torch" not in sys.modules:
        collector.freeze()


@click.command("report", cls=Verb, short_help="Write a sweep's tables: markdown, CSV, LaTeX, HTML, plots.")
@click.option("--out", metavar="DIR", help="Folder for the report (default: outputs/<sweep>).")
@click.option("--format", "formats", metavar="A,B", help="Only these of md, csv, tex, html, svg, png (default: all).")
@sweep_options(plugins=False)
@uncollected
def report(request: Request, out: str | None, formats: str | None) -> int:
    """Print a sweep's table from what the store has, and write it in every format: tables, web page, image grid."""
    from alignbench.launch import status_table, submissions
    from alignbench.reporting.analysis.results import Results
    from alignbench.reporting.report import FORMATS, build, check_formats
    from alignbench.store.artefacts import Store

    chosen = formats.split(",") if formats else FORMATS
    check_formats(chosen)
    store = Store(request.folder)  # may be read-only
    store.check_folder()
    name, manifest = request.manifest(store)
    results = Results(store.root, manifest, status_table.handed_out(submissions.submissions(store, name)), sweep=name)
    paths = build(results, Path(out or f"outputs/{manifest.name}"), chosen)
    if "md" in chosen:
        print(paths[0].read_text(encoding="utf-8"))
    print("\n".join(f"written: {path}" for path in paths))
    return DONE


@click.command("compare", cls=Verb, short_help="Compare two rows or runs, paired prompt by prompt.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("-e", "--evaluators", metavar="M,N", help="Only these metrics or evaluators.")
@click.option("--out", metavar="DIR", help="Write compare.md, .csv and .png (the images) into this folder.")
@STORE
def compare(a: str, b: str, evaluators: str | None, out: str | None, store: str) -> int:
    """Compare two rows or runs: paired differences per metric, and the prompts in which they differ most.

    A and B are each SWEEP:LABEL, a label that only one sweep has, or a run's id or how it begins.
    """
    from alignbench.reporting import compare
    from alignbench.reporting.analysis import pairs
    from alignbench.store.artefacts import Store

    place = Store(store)
    left, right = pairs.find(place, a), pairs.find(place, b)
    found, remarks = pairs.compare(place, left, right, evaluators.split(",") if evaluators else ())
    text = compare.page(place, left, right, found, remarks)
    paths = compare.build(place, left, right, found, text, Path(out)) if out else []
    print(text, end="")
    print("".join(f"written: {path}\n" for path in paths), end="")
    return DONE


@click.command("score", cls=Verb, short_help="Score any folder of images: a table, means with intervals.")
@click.argument("folder", metavar="FOLDER")
@settings_words
@click.option("-e", "--evaluators", metavar="A,B", required=True, help="Evaluators or metrics.")
@click.option("--prompts", metavar="LIST", help="A .txt or .jsonl file, or the name of a prompt list.")
@click.option("--out", metavar="FILE", default="scores.csv", help="Table to write, .csv or .parquet (scores.csv).")
@PLUGIN
def score(
    folder: str, words: Sequence[str], evaluators: str, prompts: str | None, out: str, plugin: Sequence[str]
) -> int:
    """Score a folder of images: a table with a row per image and metric, and means with their intervals.

    FOLDER has GenEval's layout, alignbench's own file names, or, in the order of their names, the same number of images
    for every prompt of --prompts; a .jsonl list may name each image's "file" instead. Settings of an evaluator:
    pickscore.weights=shapes.
    """
    from alignbench.evaluation import folders, scoring
    from alignbench.reporting import score_summary

    chosen = scoring.make_evaluators(registry(plugin), evaluators, list(words))
    images = folders.folder_images(Path(folder), prompts)
    for evaluator in chosen:
        evaluator.check([image.prompt for image in images])
    bases = [scoring.base_images(evaluator, images, prompts) for evaluator in chosen]
    scored = [(evaluator, scoring.score_images(evaluator, images, base)) for evaluator, base in zip(chosen, bases)]
    for path in score_summary.save(scored, Path(out), list(plugin)):
        print(f"written: {path}", file=sys.stderr)
    print(score_summary.summary(scored).markdown())
    return DONE if all(frame["ok"].all() for _, frame in scored) else SOME_FAILED


@click.command("import", cls=Verb, short_help="Import images or scores made elsewhere as a row of a table.")
@click.argument("kind", metavar="KIND", type=Choice(("images", "flowbp", "unirl", "geneval")))
@click.argument("path", metavar="PATH")
@settings_words
@click.option("--label", metavar="NAME", required=True, help="Name of the row.")
@click.option("--sweep", metavar="NAME", default="imported", help="Name of the table (default: imported).")
@click.option(
    "--prompts",
    metavar="LIST",
    help="A .txt or .jsonl file, or the name of a prompt list; images in GenEval's layout need none.",
)
@click.option("--images", metavar="DIR", help="Folder of the images, if not where the file says.")
@click.option("-e", "--evaluators", metavar="A,B", help="Also score the images with these evaluators or metrics.")
@click.option("--seed", type=int, metavar="N", help="Training seed, 0, 1, ... (default: one run of unknown seed).")
@click.option("--base", is_flag=True, help="The model before any training, with which the others are compared.")
@click.option("--trained-on", metavar="A,B", help="Rewards of its training, for instance hpsv2.1 (default: unknown).")
@click.option(
    "--protocol", metavar="A=B,...", default="", help="How the images were made: steps, guidance, size, weights, seed."
)
@click.option("--replace", is_flag=True, help="Replace the row of the same label and seed.")
@PLUGIN
@STORE
def import_(**given: Any) -> int:
    """Import images and scores that were made elsewhere into the store, as a row of a sweep of their own.

    KIND is images (a folder in any layout that `alignbench score` reads), flowbp (its scores.json), unirl (its
    scores.jsonl) or geneval (results.jsonl of evaluate_images.py). PATH is the folder of images, or the file of scores
    or its folder. What the files do not say is marked unknown.
    """
    from alignbench.config import UserError
    from alignbench.evaluation import import_rows, scoring

    asked = SimpleNamespace(**given)
    store, known = usable_store(asked.store), registry(asked.plugin)
    if asked.words and not asked.evaluators:
        raise UserError(f"{asked.words[0]}: is a setting of no evaluator; name it with -e")
    evaluators = scoring.make_evaluators(known, asked.evaluators, list(asked.words)) if asked.evaluators else []
    run, changed = import_rows.import_row(store, import_rows.parse_request(asked), evaluators, known)
    print("\n".join(import_rows.summary_lines(run, changed)))
    print(f"the table: alignbench report {asked.sweep} --store {asked.store}")
    return DONE

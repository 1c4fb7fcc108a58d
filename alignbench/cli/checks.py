"""Verbs that inspect before anything is run: what exists, what a sweep needs, what works on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignbench.cli.common import (
    DONE,
    GPU,
    ONLY,
    PLUGIN,
    SOME_FAILED,
    USAGE,
    Choice,
    Count,
    Request,
    Verb,
    complete_methods,
    registry,
    selected,
    settings_words,
    summary,
    sweep_options,
    warned,
)

if TYPE_CHECKING:
    from alignbench.plugins import Registry

KINDS = ("methods", "evaluators", "backends", "prompts", "sweeps")


@click.command("ls", cls=Verb, short_help="List methods, evaluators, backends, prompts and sweeps.")
@click.argument("kind", metavar="[KIND]", required=False, type=Choice(KINDS))
@PLUGIN
def ls(kind: str | None, plugin: Sequence[str]) -> int:
    """List what a sweep can name, one line each; methods with their full names and papers.

    KIND is one of methods, evaluators, backends, prompts, sweeps (default: all).
    """
    known = registry(plugin)
    for chosen in [kind] if kind else KINDS:
        if not kind:
            print(f"{chosen}:")
        lines = _listed(chosen, known)
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            print(f"  {name:<{width}} {text}".rstrip())
    return DONE


@click.command("validate", cls=Verb, short_help="Check a sweep file, its plug-ins, weights and prompts.")
@sweep_options()
def validate(request: Request) -> int:
    """Check a sweep file with its plug-ins, weights, prompts and store. Writes nothing."""
    from alignbench.experiment.plan import completed, draft, missing
    from alignbench.planning.plan_page import describe_missing

    request.store()
    drafted = draft(request.document(), request.registry())
    gaps = missing(drafted)
    if len(gaps) > 1:  # a single one is reported below with its place, like every other mistake
        print("\n".join(describe_missing(gaps)), file=sys.stderr)
        return USAGE
    plan = warned(completed(drafted))
    evaluators = ", ".join(score.name for score in plan.scores)
    print(f"{plan.document.path}: fine; {len(plan.cells)} runs, {len(plan.prompts)} prompts, scored by {evaluators}")
    for line in plan.document.inherited.replaced:
        print(f"  replaces {line}")
    return DONE


@click.command("plan", cls=Verb, short_help="Show each run's state and cost, and what is missing.")
@ONLY
@GPU
@sweep_options()
def plan(request: Request, only: Sequence[str], gpu: str) -> int:
    """Show every run of a sweep with its state, GPU-hours, memory and disk, and everything to fetch. Writes nothing.

    The exit code is 1 as long as something has to be fetched.
    """
    from alignbench.experiment.plan import completed, draft, missing
    from alignbench.launch import submissions
    from alignbench.planning.plan_page import gpu_named, page

    assumed, store = gpu_named(gpu), request.store()
    drafted = draft(request.document(), request.registry())
    gaps = missing(drafted)
    plan = None if gaps else warned(completed(drafted))
    cells = selected(plan or drafted, only)
    jobs = submissions.known_jobs(submissions.read(store, Path(drafted.document.manifest).stem))
    print(page(drafted, plan, cells, store, assumed, gaps, jobs))
    if plan is not None:
        print(summary(store, plan, cells))
    return USAGE if gaps else DONE


@click.command("fit", cls=Verb, short_help="Check whether training fits a GPU, and what would help.")
@click.option(
    "--method",
    metavar="METHOD",
    shell_complete=complete_methods,
    help="A method of the sweep, or any other with its defaults.",
)
@ONLY
@GPU
@click.option("--ranks", type=Count(), default=1, metavar="N", help="GPUs per run (default: 1).")
@click.option(
    "--parallel", type=Choice(("ddp", "fsdp")), default="ddp", help="How they share the model (default: ddp)."
)
@sweep_options(optional=True)
def fit(request: Request, method: str | None, only: Sequence[str], gpu: str, ranks: int, parallel: str) -> int:
    """Check whether training fits a GPU: memory by part, the largest micro-batch, and what would make it fit.

    Checks a sweep (default: table2), or one method with its settings. Needs no weights and writes nothing. The exit
    code is 2 if a run does not fit.
    """
    from alignbench.experiment.plan import draft
    from alignbench.planning.fit_page import Group, page
    from alignbench.planning.plan_page import gpu_named

    assumed, known = gpu_named(gpu), request.registry()
    drafted = draft(request.with_method(method, "table2"), known)
    cells = [cell for cell in selected(drafted, only) if cell.trains]
    if method is not None:
        cells = [cell for cell in cells if cell.spec.method["name"] == method]
    specs = [cell.spec for cell in cells]
    text, fits = page(drafted.document.name, specs, known, assumed, Group(ranks, parallel))
    print(text)
    return DONE if fits else SOME_FAILED


@click.command("doctor", cls=Verb, short_help="Check packages, weights and evaluators on this machine.")
@settings_words
@click.option("-e", "--evaluators", metavar="A,B", help="Check only these evaluators or metrics.")
@click.option("--install", metavar="NAME", help="Create the environment of an official package, as named in the table.")
@click.option(
    "--references", metavar="DIR", help="Images with published scores (default: ~/.cache/alignbench/references)."
)
@PLUGIN
def doctor(
    words: Sequence[str], evaluators: str | None, install: str | None, references: str | None, plugin: Sequence[str]
) -> int:
    """Check packages, weights and official engines, and that evaluators reproduce their golden scores.

    Golden scores come from tiny random checkpoints and images made here, so they need no weights. Missing weights are
    listed with the command that fetches them and are not an error; the exit code is 2 if a check fails. Example of an
    evaluator's setting: hpsv3.weights=FOLDER.
    """
    from alignbench import official
    from alignbench.config import cache
    from alignbench.evaluation import scoring
    from alignbench.rehearsal import doctor

    if install:
        official.install(install)
        return DONE
    known = registry(plugin)
    names = evaluators or ",".join(known.names("evaluator"))
    chosen = scoring.evaluator_settings(known, names, list(words))
    lines = []
    for line in doctor.run_checks(known, chosen, Path(references) if references else cache() / "references"):
        lines.append(line)
        print(f"{line.part}: {line.verdict}", file=sys.stderr)
    print(doctor.table(lines))
    print(f"\n{doctor.UNTRIED}")
    return SOME_FAILED if any(line.verdict == doctor.WRONG for line in lines) else DONE


@click.command("new-method", cls=Verb, short_help="Write a working method and its test as a template.")
@click.argument("name", metavar="NAME")
def new_method(name: str) -> int:
    """Write a small working method and its test into this folder, as a template.

    NAME is the method's name in a sweep's YAML, for instance my_method.
    """
    from alignbench.testing.scaffold import new_method

    for path in new_method(name, Path()):
        print(f"written: {path}")
    print(f"now put your method into {name}.py, then:")
    print(f"  alignbench check-method {name}.py  (or: pytest test_{name}.py)")
    print(f"  alignbench run quickstart --method {name} --plugin {name}.py")
    return DONE


@click.command("check-method", cls=Verb, short_help="Check a method against what training relies on.")
@click.argument("file", metavar="FILE")
@click.option(
    "--settings",
    metavar="A=B",
    multiple=True,
    help="Override a default setting of the methods, for instance steps=5; repeatable.",
)
@click.option("--traceback", is_flag=True, help="Show where a broken promise went wrong.")
def check_method(file: str, settings: Sequence[str], traceback: bool) -> int:
    """Check every method in a Python file against what training relies on, one line per promise."""
    from alignbench.testing.scaffold import check_methods

    code = DONE
    for name, verdicts in check_methods(file, list(settings)):
        print(f"{name}:")
        for verdict in verdicts:
            print(f"{verdict}{verdict.details if traceback else ''}", flush=True)
            code = SOME_FAILED if verdict.reason else code
    return code


def _listed(kind: str, registry: Registry) -> list[tuple[str, str]]:
    """Return (name, description) of everything of a kind."""
    from alignbench.experiment.document import sweeps
    from alignbench.prompts import GENERATED, SHAPES, SPLITS
    from alignbench.prompts.public import SETS

    if kind == "prompts":
        shapes = [(f"shapes/{split}", str(SHAPES / f"{split}.jsonl")) for split in SPLITS]
        made = [(name, "made on demand") for name in GENERATED]
        return [*shapes, *made, *((name, f"{chosen.about} ({chosen.repository})") for name, chosen in SETS.items())]
    if kind == "sweeps":
        return [(name, str(path)) for name, path in sweeps().items()]
    names = registry.names(kind.removesuffix("s"))  # type: ignore[arg-type]
    return [(name, registry.entries[kind.removesuffix("s"), name].about) for name in names]

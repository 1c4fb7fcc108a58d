"""Shared parts of the verbs: exit codes, options, help, completion, and the sweep named on the command line."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from alignbench.experiment.cells import PlannedRun
    from alignbench.experiment.document import Document
    from alignbench.experiment.plan import Draft, Plan
    from alignbench.plugins import Registry
    from alignbench.store.artefacts import Store
    from alignbench.store.manifest import Manifest, ManifestRun

DONE, USAGE, SOME_FAILED, SOME_PENDING, INTERRUPTED = 0, 1, 2, 3, 130
EPILOG = """\
SWEEP is a YAML file or the name of a packaged sweep (see `alignbench ls sweeps`). Command-line settings override the
file, for example training.batch=8 (every run), evaluation.protocol.steps=10, grid.training.seed=[0,1], seed=3.
"""
EXIT_CODES = """\
Exit codes. 0: everything is done. 1: invalid request, nothing was run. 2: some runs failed (check-method: a promise is
broken; doctor: a check failed; fit: a run does not fit; rerun: something differs). 3: some runs are still pending.
130: interrupted.
"""


class Verb(click.Command):
    """Verb of the command line, which accepts its arguments and options in any order."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if ctx.resilient_parsing else list(self._spelt_out(ctx, args)))

    def invoke(self, ctx: click.Context) -> Any:
        from alignbench.store.shell import leave_ranks  # imported late: --help needs none of it

        leave_ranks()
        return super().invoke(ctx)

    def _spelt_out(self, ctx: click.Context, args: Sequence[str]) -> Iterator[str]:
        """Yield ``args`` with one value per option: ``--only a b`` as ``--only a --only b``, ``-e=a`` as ``-e a``.

        Raise UsageError if an option lacks its value, which click would take from the next option, if a flag has one,
        or if an option of one value is repeated: click would ignore the first.
        """
        known = {name: option for option in self.params if isinstance(option, click.Option) for name in option.opts}
        rest, given = list(args), set[str | None]()
        while rest and rest[0] != "--":
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            option = known.get(name)
            if option is None or option.is_flag:
                if option and equals:
                    raise click.UsageError(f"{name}: takes no value; leave out '={value}'", ctx)
                yield word
                continue
            if option.name in given and not option.multiple:
                form = f"{name} {option.make_metavar(ctx)}"
                raise click.UsageError(f"{name}: is given twice; give it once, as {form}", ctx)
            given.add(option.name)
            values = [value] if equals else []
            while rest and not equals and not _is_option(rest[0]) and (not values or isinstance(option, Several)):
                values.append(rest.pop(0))
            if not values:
                raise click.UsageError(f"{name}: its value {option.make_metavar(ctx)} is missing", ctx)
            for value in values:
                yield from (name, value)
        yield from rest

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        takes_sweep = any(option.name == "rehearse" for option in self.params)
        write_paragraphs(formatter, *([EPILOG] if takes_sweep else []), EXIT_CODES)


class Several(click.Option):
    """Option that takes all words up to the next option."""


class Choice(click.Choice[str]):
    """Choice among names; the error for an unknown name suggests the nearest one."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        from alignbench.config import did_you_mean

        return f"there is no '{value}'{did_you_mean(str(value), self.choices, 'choose from')}"


class Count(click.ParamType):
    """Parameter type of whole numbers of 1 or more."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"'{value}' is not a whole number of 1 or more", param, ctx)
        return int(value)


def _is_option(word: str) -> bool:
    return re.match(r"-[^\d.]", word) is not None


def write_paragraphs(formatter: click.HelpFormatter, *texts: str) -> None:
    """Write each text as a separate, wrapped paragraph."""
    for text in texts:
        formatter.write_paragraph()
        formatter.write_text(" ".join(text.split()))


# -- completion -------------------------------------------------------------------------------------------------------


def complete_sweeps(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return matching sweeps, packaged or in the store; if none matches, let the shell complete file names."""
    from click.shell_completion import CompletionItem

    from alignbench.experiment.document import sweeps

    stored = (path.stem for path in Path(ctx.params.get("store") or "store").glob("sweeps/*.json"))
    names = sorted(name for name in {*sweeps(), *stored} if name.startswith(incomplete))
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def complete_methods(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of matching methods, including those of plug-ins."""
    from alignbench.plugins import Registry

    names = Registry(ctx.params.get("plugin") or ()).names("method")
    return [name for name in names if name.startswith(incomplete)]


def complete_runs(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the ids of matching runs in the store."""
    return sorted(path.name for path in Path(ctx.params.get("store") or "store").glob(f"runs/{incomplete}*"))


# -- shared options ---------------------------------------------------------------------------------------------------

STORE = click.option(
    "--store", metavar="DIR", default="store", type=str, help="Folder that keeps the results (default: store)."
)
PLUGIN = click.option(
    "--plugin",
    metavar="FILE",
    multiple=True,
    help="Python file with your own methods, evaluators or backends; repeatable.",
)
ONLY = click.option(
    "--only",
    cls=Several,
    metavar="KEY=VALUE...",
    multiple=True,
    help="Select runs: method=refl, '!seed=2', or the path of any setting; values of the same key are alternatives.",
)
TRACK = click.option(
    "--track",
    metavar="TRACKER",
    multiple=True,
    help="Also log training and scores to tensorboard, wandb or trackio; repeatable.",
)
GPU = click.option(
    "--gpu", metavar="GPU", default="h100", help="GPU whose speed and memory to assume: h100 (default), h200 or a100."
)
RUN = click.argument("run", metavar="RUN", shell_complete=complete_runs)


def slurm_options(verb: Callable[..., int]) -> Callable[..., int]:
    """Add ``--slurm``, ``--wait`` and ``-j``."""
    options = (
        click.option("--slurm", metavar="FILE", help="YAML file with SLURM resources; overrides those of the sweep."),
        click.option("--wait", is_flag=True, help="Wait until all SLURM jobs have ended."),
        click.option(
            "-j", "--jobs", type=Count(), metavar="N", help="Local workers in parallel (default: GPUs or cores)."
        ),
    )
    return functools.reduce(lambda function, option: option(function), reversed(options), verb)


def settings_words(verb: Callable[..., int]) -> Callable[..., int]:
    """Add the settings of evaluators as positional arguments."""
    return click.argument("words", nargs=-1, metavar="[EVALUATOR.SETTING=VALUE]...")(verb)


def sweep_options(optional: bool = False, plugins: bool = True) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Add the sweep, its settings and its store; the verb receives them as one ``Request``."""
    metavar = "[SWEEP] [a.b=c]..." if optional else "SWEEP [a.b=c]..."
    options = (
        click.argument("words", nargs=-1, required=not optional, metavar=metavar, shell_complete=complete_sweeps),
        click.option("--seeds", metavar="0,1,...", help="Training seeds; overrides those of the file."),
        click.option(
            "--limit", type=Count(), metavar="N", help="Use only the first N evaluation prompts; stamped SUBSET."
        ),
        click.option(
            "--rehearse",
            is_flag=True,
            help="Rehearse the whole sweep with tiny models in place of its own; stamped REHEARSAL.",
        ),
        *([PLUGIN] if plugins else []),
        STORE,
    )

    def decorate(verb: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(verb)
        def run(
            words: Sequence[str],
            seeds: str | None,
            limit: int | None,
            rehearse: bool,
            store: str,
            plugin: Sequence[str] = (),
            **own: Any,
        ) -> int:
            return verb(Request(list(words), seeds, limit, rehearse, store, list(plugin)), **own)

        return functools.reduce(lambda function, option: option(function), reversed(options), run)

    return decorate


# -- the sweep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Sweep as named on the command line. ``words``: the sweep and its settings; ``folder``: the store."""

    words: list[str]
    seeds: str | None
    limit: int | None
    rehearse: bool
    folder: str
    plugins: list[str]

    def store(self) -> Store:
        return usable_store(self.folder)

    def registry(self) -> Registry:
        return registry(self.plugins)

    def document(self, default: str | None = None) -> Document:
        """Read the sweep, or ``default`` if none is named. Raise UserError if several are named."""
        from alignbench.config import UserError
        from alignbench.experiment.document import read

        files = [word for word in self.words if "=" not in word]
        if len(files) > 1 or not (files or default):
            raise UserError(f"command line: name one sweep, got {', '.join(files) or 'none'}")
        assignments = [word for word in self.words if "=" in word]
        document = read(files[0] if files else str(default), assignments, self.seeds, self.limit)
        if not self.rehearse:
            return document
        from alignbench.rehearsal.sweep import rehearse

        return rehearse(document, Path(self.folder))

    def with_method(self, name: str | None, default: str) -> Document:
        """Read the sweep; if it has no case of the method ``name``, add one with the method's defaults."""
        from dataclasses import replace

        from alignbench.experiment.document import decoded

        document = self.document(default)
        if name is None or any(case.method.get("name") == name for case in decoded(document).cases):
            return document
        cases = [*document.data["cases"], {"label": name, "method": {"name": name}}]
        return replace(document, data=document.data | {"cases": cases})

    def plan(self) -> Plan:
        return resolve(self.document(), self.registry())

    def manifest(self, store: Store) -> tuple[str, Manifest]:
        """Return the name and the manifest of a sweep that was run, named by file and settings or as in `status`.

        Raise UserError if the store has no such sweep.
        """
        from alignbench.config import UserError
        from alignbench.store.manifest import read_manifest

        by_name = store.root / "sweeps" / f"{self.words[0]}.json"
        if by_name.is_file():
            return by_name.stem, read_manifest(by_name)
        document = self.document()
        path = store.root / "sweeps" / document.manifest
        if not path.is_file():
            known = ", ".join(path.stem for path in store.manifests())
            raise UserError(
                f"{document.command}: was not run in {store.root} as it stands; "
                f"run `alignbench sweep` with the same words (in the store: {known or 'nothing'})"
            )
        return path.stem, read_manifest(path)


def readable_store(folder: str) -> Store:
    """Return the store, which may be read-only."""
    from alignbench.store.artefacts import Store

    store = Store(folder)
    store.check_folder()
    return store


def usable_store(folder: str) -> Store:
    """Return the store. Raise UserError unless it can be written to; writes nothing."""
    from alignbench.store.artefacts import Store

    store = Store(folder)
    store.check_writable()
    return store


def registry(plugins: Sequence[str]) -> Registry:
    """Return the registry of built-in parts and ``plugins`` (paths)."""
    from alignbench.plugins import Registry

    return Registry(plugins)


def resolve(document: Document, registry: Registry) -> Plan:
    """Resolve a sweep and print its warnings."""
    from alignbench.experiment.plan import resolve

    return warned(resolve(document, registry))


def warned(plan: Plan) -> Plan:
    """Print the warnings of a plan and return the plan."""
    from alignbench.experiment.plan import warnings_of

    for line in warnings_of(plan):
        print(f"alignbench: {line}", file=sys.stderr)
    return plan


def selected(plan: Plan | Draft, only: Sequence[str]) -> list[PlannedRun]:
    """Return the runs of a plan or draft that ``--only`` selects; all of them if it is empty."""
    from alignbench.experiment.cells import select

    return select(plan.cells, only)


def print_gaps(store: Store, runs: Iterable[ManifestRun]) -> None:
    """Print how many images of the runs lack scores, and why, to stderr: one line per run and evaluator."""
    from alignbench.store.score_gaps import gaps

    for gap in gaps(store.root, runs):
        print(f"alignbench: {gap}", file=sys.stderr)


def summary(store: Store, plan: Plan, cells: Sequence[PlannedRun]) -> str:
    """Return ``6 runs: 0 to train, 0 image sets to make, 0 scores to compute``."""
    from alignbench.store.stages import Stage

    runs = plan.manifest().by_seed
    parts = {part.lock: part for cell in cells for part in runs[cell.spec.label, cell.seed].missing(store)}
    trained = {cell.id for cell in cells if cell.trains}
    train = sum(part.stage is Stage.TRAIN and part.id in trained for part in parts.values())
    images, scores = (sum(part.stage is it for part in parts.values()) for it in (Stage.GENERATE, Stage.SCORE))
    return f"{len(cells)} runs: {train} to train, {images} image sets to make, {scores} scores to compute"

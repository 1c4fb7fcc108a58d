"""The report of a sweep: one table, what it supports, what is missing, and how to make it again.

A pure function of the store: no model is loaded, and the same scores give the same bytes. What is particular to a sweep
(title, introduction, questions, published tables) stands in ``SWEEPS`` of a module of ``alignbench.reports``, under the
sweep's name; without it the report is generic.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from alignbench.config import UserError, did_you_mean
from alignbench.reporting import curves_section, image_grid, improvement_section, published_section
from alignbench.reporting.analysis.comparison import Analysis, analyse
from alignbench.reporting.analysis.published import Reference, load, load_curve
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.disclosures import (
    budgets_note,
    coverage_section,
    hybrid_note,
    imports_section,
    made_with,
    missing_section,
    moments_note,
    overrides_section,
    protocol_section,
    settings_section,
    warnings_section,
)
from alignbench.reporting.findings import (
    answers,
    changes_section,
    hacking_section,
    one_training_note,
    seeds_note,
    task_sections,
)
from alignbench.reporting.html import page
from alignbench.reporting.plots import draw
from alignbench.reporting.table import Section, Table, escape
from alignbench.reporting.tables import changes_table, hacked, main_table, marks, task_table, tidy
from alignbench.store.files import write
from alignbench.store.manifest import Manifest

REPORTS = "alignbench.reports"
LEGEND = """\
Every cell is a mean with its 95 % interval: a bootstrap over prompts (all images of a prompt together; for scores
marked "by task" within each task) and training seeds. **Bold**: the best mean of a column, if its paired gain over
{base} survives Holm's correction for the {count} methods compared. (=): not distinguishable from the bold one, by the
same rule. No bold in a column: the best mean is not shown to be better than {base}. [train]: the reward that the
methods were trained on; [held-out]: a scorer that took no part in training; [check]: an automatic check of what the
prompt asks. Costs are those of training alone, means over finished seeds; NFE counts network evaluations per image,
summed over images.
"""


class Words(NamedTuple):
    """What a report module says about its sweep."""

    title: str
    intro: str = ""
    questions: Sequence[tuple[str, Sequence[str]]] = ()
    published: Sequence[str] = ()  # stems of files below reports/published: tables ...
    curves: Sequence[str] = ()  # ... and curves


FORMATS = ("md", "csv", "tex", "html", "svg", "png")


def build(results: Results, out: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write what ``formats`` names into ``out``; the paths, the page first. UserError for a format there is not.

    md: ``<name>.md``; csv: ``<name>.csv``, and ``<name>-published.csv`` if the sweep has published numbers beside its
    own; tex: the tables, ``<name>.tex``; html: all of it with the pictures, ``<name>.html``, which needs none of the
    other files; png: the picture grid, ``<name>-grid.png``, if there is any picture; png, svg: the figures,
    ``<name>-<figure>``.
    """
    check_formats(formats)
    manifest = results.manifest
    name = manifest.name
    analysis = analyse(manifest, results.scores)
    words = _words(name)
    published = [load(stem) for stem in words.published]
    picture = _picture_grid(results, analysis) if {"html", "png"} & set(formats) else None
    link = f"{name}-grid.png"
    drawn = draw.figures(results, analysis) if {"html", "svg", "png"} & set(formats) else []
    said: list[Section] = []
    if {"md", "html"} & set(formats):
        course = curves_section.sections(results, analysis, [load_curve(stem) for stem in words.curves])
        said = sections(
            manifest, results.costs, analysis, link if picture else None, made_with(results), course, published
        )
    contents: dict[str, Any] = {}
    if "md" in formats:
        shown = said if "png" in formats else [part for part in said if not _shows(part, link)]
        contents[f"{name}.md"] = markdown(shown)
    if "csv" in formats:
        contents[f"{name}.csv"] = tidy(analysis, results.costs).csv()
        if published:
            contents[f"{name}-published.csv"] = published_section.tidy(published, manifest, analysis).csv()
    if "tex" in formats:
        contents[f"{name}.tex"] = latex(manifest, results.costs, analysis, published)
    if picture and "png" in formats:
        contents[link] = lambda temporary: picture.save(temporary, "PNG")
    for figure in drawn:
        contents |= {
            f"{name}-{figure.name}.{kind}": getattr(figure, kind) for kind in ("svg", "png") if kind in formats
        }
    for file, content in contents.items():
        write(out / file, content)
    paths = [out / file for file in contents]
    if "html" in formats:
        flagged = {label: hacked(analysis, label) for label in analysis.trained}
        images = {link: picture} if picture else {}
        paths.append(page.build(results, analysis, out, sections=said, hacked=flagged, figures=drawn, images=images))
    return paths


def check_formats(formats: Sequence[str]) -> None:
    for unknown in set(formats) - set(FORMATS):
        raise UserError(f"--format: there is no format '{unknown}'{did_you_mean(unknown, FORMATS, 'formats')}")


def _shows(part: Section, file: str) -> bool:
    """Return whether a section shows the image of that file."""
    return isinstance(part, str) and f"]({file})" in part


def markdown(said: Sequence[Section]) -> str:
    """The whole page as text."""
    texts = [section.markdown() if isinstance(section, Table) else section for section in said]
    return "\n\n".join(text.strip("\n") for text in texts) + "\n"


def sections(
    manifest: Manifest,
    costs: pd.DataFrame,
    analysis: Analysis,
    picture: str | None = None,
    origins: Sequence[str] = (),
    course: Sequence[Section] = (),
    published: Sequence[Reference] = (),
) -> list[Section]:
    """All that is said. The first line says how to make it again; ``origins``: what the runs were made with.

    ``course``: sections on what happened over the course of training.
    """
    words = _words(manifest.name)
    alike = "same prompts" if manifest.imported else "same prompts and noise"
    found: list[Section] = [
        f"Made by `{regenerate(manifest)}`",
        f"# {'REHEARSAL: ' * manifest.rehearsal}{escape(words.title)}",
        REHEARSED if manifest.rehearsal else "",
        f"**SUBSET: only the first {manifest.subset} evaluation prompts.**" if manifest.subset else "",
        words.intro.strip(),
        *answers(words.questions, analysis),
        "## Results (REHEARSAL)" if manifest.rehearsal else "## Results",
        main_table(analysis, costs, marks(manifest)),
        LEGEND.format(base=escape(analysis.base or "a base model (none in this sweep)"), count=len(analysis.compared)),
        NEUTRAL_NOTE if any(measure.higher_is_better is None for measure in analysis.measures) else "",
        hybrid_note(manifest),
        moments_note(manifest),
        budgets_note(analysis, costs),
        f"![{alike}, one row per method]({picture})\n\n{GRID_NOTE}" if picture else "",
        *published_section.sections(manifest, analysis, published),
        *changes_section(analysis, manifest.imported),
        one_training_note(manifest),
        *improvement_section.sections(analysis),
        *hacking_section(analysis, costs),
        *course,
        *task_sections(analysis),
        *imports_section(manifest),
        *overrides_section(manifest),
        *settings_section(manifest),
        *warnings_section(costs),
        *missing_section(analysis, costs),
        *coverage_section(manifest, analysis),
        *protocol_section(manifest, analysis, origins),
    ]
    return [section for section in found if section]


REHEARSED = """\
**REHEARSAL: small random models stand in for the real ones, and almost nothing was trained. That everything ran is all
that this page shows; no number in it means anything.**"""
NEUTRAL_NOTE = "A column without an arrow: neither direction is better in itself, nothing in it is bold."
GRID_NOTE = """\
Pictures of the lowest training seed that has any, first image of each prompt; the prompts were drawn by the hash of
their id, tasks in turn."""


def regenerate(manifest: Manifest) -> str:
    """The commands that make the report from nothing."""
    if manifest.imported:
        return " && ".join([*(run.command for run in manifest.runs), f"alignbench report {manifest.sweep}"])
    plugins = "".join(f" --plugin {path}" for path in manifest.plugins)
    return f"alignbench sweep {manifest.sweep}{plugins} && alignbench report {manifest.sweep}"


def latex(
    manifest: Manifest,
    costs: pd.DataFrame,
    analysis: Analysis,
    published: Sequence[Reference] = (),
) -> str:
    """The page's tables, each by itself, to be taken into a paper."""
    tables = {"Results": main_table(analysis, costs, marks(manifest))}
    tables |= {
        f"Published numbers, {each.name}": published_section.beside(each, manifest, analysis) for each in published
    }
    if analysis.base is not None:
        tables |= {"Paired change": changes_table(analysis), **improvement_section.tables(analysis)}
    tables |= {
        f"{measure.name}, by task": task_table(analysis, measure) for measure in analysis.measures if measure.by_task
    }
    stamp = page.stamps(manifest)
    stamp += [note.strip("*")] if (note := seeds_note(analysis)) else []
    head = [f"Made by {regenerate(manifest)}", r"Needs \usepackage{booktabs}", *stamp]
    comments = [f"% {' '.join(line.split())}" for line in head]
    return "\n".join(
        ["\n".join(comments), *(f"% {' '.join(name.split())}\n{table.latex()}" for name, table in tables.items())]
    )


def _words(name: str) -> Words:
    """What the reports say of the sweep; a subset or a rehearsal asks the same questions."""
    name = name.removesuffix("-SUBSET").removesuffix("-REHEARSAL")
    folder = importlib.import_module(REPORTS).__path__
    modules = [importlib.import_module(f"{REPORTS}.{module.name}") for module in pkgutil.iter_modules(folder)]
    found = {name: entry for module in modules for name, entry in module.SWEEPS.items()}
    return Words(**found[name]) if name in found else Words(f"Sweep {name}")


def _picture_grid(results: Results, analysis: Analysis) -> Any:
    """One row per method, from its lowest seed that has pictures; None without any picture."""
    sets = {label: _image_set(results, label) for label in analysis.labels}
    known = pd.concat([found for found in sets.values() if found is not None] or [pd.DataFrame()])
    if known.empty:
        return None
    known = known.drop_duplicates("prompt_id")
    tags = known["tag"].fillna("").astype(str).tolist()
    chosen = image_grid.choose(known["prompt_id"].tolist(), tags)
    about = known.set_index("prompt_id").loc[chosen]
    files = {label: dict(zip(found["prompt_id"], found["path"])) for label, found in sets.items() if found is not None}
    stamp = "REHEARSAL " * results.manifest.rehearsal
    rows = [(stamp + label, [files.get(label, {}).get(prompt) for prompt in chosen]) for label in analysis.labels]
    return image_grid.draw(rows, list(zip(about["tag"].fillna("").str.replace("_", " "), about["text"])))


def _image_set(results: Results, label: str) -> pd.DataFrame | None:
    """Pictures of index 0 of the label's lowest finished seed: prompt_id, tag, text, path."""
    for run in sorted(results.manifest.rows.get(label, []), key=lambda run: run.seed):
        folder = results.store / "images" / run.images
        if (folder / "manifest.parquet").is_file():
            found = pd.read_parquet(folder / "manifest.parquet")
            found = found[found["index"] == found["index"].min()]
            paths = [folder / file for file in found["file"]]
            return found.assign(path=[path if path.is_file() else None for path in paths])
    return None

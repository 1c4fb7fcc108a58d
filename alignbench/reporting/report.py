"""The report of a sweep: one table, what it supports, what is missing, and how to reproduce it.

A pure function of the store: no model is loaded, and the same scores give the same bytes. Text specific to a sweep
(title, introduction, questions, published tables) is kept under the sweep's name in ``SWEEPS`` of a module of
``alignbench.reports``; a sweep without an entry gets a generic report.
"""

from __future__ import annotations

import html
import importlib
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from alignbench.config import UserError, did_you_mean
from alignbench.reporting import curves_section, data, headline, improvement_section, published_section
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
    roles_note,
    seeds_differ_note,
    settings_section,
    warnings_section,
)
from alignbench.reporting.findings import (
    answers,
    banner,
    changes_section,
    hacking_section,
    task_sections,
)
from alignbench.reporting.html import page
from alignbench.reporting.plots import draw, image_grid
from alignbench.reporting.plots.scores import FOREST_MARKS
from alignbench.reporting.tables import (
    changes_table,
    costs_note,
    costs_section,
    costs_table,
    hacked,
    legend,
    main_table,
    marks,
    task_table,
    tidy,
)
from alignbench.reporting.text import latex as tex
from alignbench.reporting.text import names
from alignbench.reporting.text.table import Section, Table, escape
from alignbench.store.files import read_frame, write
from alignbench.store.manifest import Manifest
from alignbench.store.score_gaps import Gap

REPORTS = "alignbench.reports"


class Words(NamedTuple):
    """Text of a report module about its sweep."""

    title: str
    intro: str = ""
    questions: Sequence[tuple[str, Sequence[str]]] = ()
    published: Sequence[str] = ()  # stems of files below reports/published: tables ...
    curves: Sequence[str] = ()  # ... and curves


FORMATS = ("md", "csv", "tex", "html", "svg", "png", "data")


def build(results: Results, out: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write the report into ``out`` in each of ``formats`` and return the paths. UserError for an unknown format.

    md: ``<name>.md``; csv: ``<name>.csv``, ``<name>-pairs.csv`` with all pairs of rows, and ``<name>-published.csv`` if
    the sweep is compared with published numbers; tex: the tables, ``<name>.tex``; html: everything in one file that
    needs no other, ``<name>.html``; png: the image grid, ``<name>-grid.png``, if there are images; png, svg: the
    figures, ``<name>-<figure>``; data: every score of every image, ``<name>-scores.parquet``, and each training run,
    ``<name>-seeds.csv`` and ``<name>-costs.csv``.
    """
    check_formats(formats)
    manifest = results.manifest
    name = manifest.name
    analysis = analyse(manifest, results.scores)
    words = _words(name)
    published = [load(stem) for stem in words.published]
    grid = _image_grid(results, analysis) if {"html", "png"} & set(formats) else None
    link, forest = f"{name}-grid.png", f"{name}-forest.png"
    drawn = draw.figures(results, analysis) if {"html", "svg", "png"} & set(formats) else []
    text: list[Section] = []
    pairs = improvement_section.pairs_sections(analysis) if "html" in formats else []  # too wide for markdown
    if {"md", "html"} & set(formats):
        curves = curves_section.sections(results, analysis, [load_curve(stem) for stem in words.curves])
        shown, origins = link if grid else None, made_with(results)
        first = next((f"![{escape(figure.caption)}]({forest})" for figure in drawn if figure.name == "forest"), "")
        text = sections(
            manifest, results.costs, analysis, shown, origins, curves, published, pairs, first, results.gaps
        )
    contents: dict[str, Any] = {}
    if "md" in formats:
        kept = [section for section in text if not any(section is part for part in pairs)]
        kept = kept if "png" in formats else [section for section in kept if not _shows(section, link, forest)]
        contents[f"{name}.md"] = markdown(kept)
    if "csv" in formats:
        contents[f"{name}.csv"] = tidy(analysis, results.costs).csv()
        if published:
            contents[f"{name}-published.csv"] = published_section.tidy(published, manifest, analysis).csv()
    if "tex" in formats:
        contents[f"{name}.tex"] = latex(manifest, results.costs, analysis, published)
    if grid and "png" in formats:
        contents[link] = lambda temporary: grid.save(temporary, "PNG")
    if "csv" in formats:
        contents[f"{name}-pairs.csv"] = improvement_section.tidy_pairs(analysis).csv()
    for figure in drawn:
        contents |= {
            f"{name}-{figure.name}.{kind}": getattr(figure, kind) for kind in ("svg", "png") if kind in formats
        }
    if "data" in formats:
        contents |= {f"{name}-{file}": content for file, content in data.files(results, analysis).items()}
    for file, content in contents.items():
        write(out / file, content)
    paths = [out / file for file in contents]
    if "html" in formats:
        flagged = {label: hacked(analysis, label) for label in analysis.trained}
        images = {link: grid} if grid else {}
        paths.append(page.build(results, analysis, out, sections=text, hacked=flagged, figures=drawn, images=images))
    return paths


def check_formats(formats: Sequence[str]) -> None:
    """Raise UserError for the first of ``formats`` that does not exist."""
    for unknown in set(formats) - set(FORMATS):
        raise UserError(f"--format: there is no format '{unknown}'{did_you_mean(unknown, FORMATS, 'formats')}")


def _shows(section: Section, *files: str) -> bool:
    """Return whether a section shows one of these images."""
    return isinstance(section, str) and any(f"]({file})" in section for file in files)


def markdown(sections: Sequence[Section]) -> str:
    """Return the whole report as one text."""
    texts = [section.markdown() if isinstance(section, Table) else section for section in sections]
    return "\n\n".join(text.strip("\n") for text in texts) + "\n"


def sections(
    manifest: Manifest,
    costs: pd.DataFrame,
    analysis: Analysis,
    grid: str | None = None,
    origins: Sequence[str] = (),
    curves: Sequence[Section] = (),
    published: Sequence[Reference] = (),
    pairs: Sequence[Section] = (),
    forest: str = "",
    gaps: Sequence[Gap] = (),
) -> list[Section]:
    """Return all sections of the report, in order. The first line is the command that reproduces it.

    ``grid``: file of the image grid; ``origins``: software and hardware of the runs; ``curves``: the sections about
    the course of training; ``pairs``: those about all pairs of rows; ``forest``: the figure of paired changes, as
    markdown; ``gaps``: images without scores.
    """
    words = _words(manifest.name)
    alike = "same prompts" if manifest.imported else "same prompts and noise"
    parts: list[Section] = [
        f"Made by `{regenerate(manifest)}`",
        f"# {'REHEARSAL: ' * manifest.rehearsal}{escape(words.title)}",
        REHEARSED if manifest.rehearsal else "",
        f"**SUBSET: only the first {manifest.subset} evaluation prompts.**" if manifest.subset else "",
        banner(analysis),
        *headline.sections(analysis, costs, manifest),
        f"{forest}\n\n{escape(FOREST_MARKS)}" if forest else "",
        words.intro.strip(),
        *answers(words.questions, analysis),
        "## Results (REHEARSAL)" if manifest.rehearsal else "## Results",
        main_table(analysis, marks(manifest)),
        legend(analysis),
        NEUTRAL_NOTE if any(measure.higher_is_better is None for measure in analysis.measures) else "",
        hybrid_note(manifest),
        moments_note(manifest),
        roles_note(analysis),
        seeds_differ_note(analysis),
        budgets_note(analysis, costs),
        f"![{alike}, one row per method]({grid})\n\n{GRID_NOTE}" if grid else "",
        *costs_section(analysis, costs),
        *published_section.sections(manifest, analysis, published),
        *changes_section(analysis, manifest.imported),
        *improvement_section.order_section(analysis),
        *pairs,
        *improvement_section.sections(analysis),
        *hacking_section(analysis, costs),
        *curves,
        *task_sections(analysis),
        *imports_section(manifest),
        *overrides_section(manifest),
        *settings_section(manifest),
        *warnings_section(manifest, costs),
        *missing_section(analysis, costs),
        *coverage_section(manifest, analysis, gaps),
        *protocol_section(manifest, analysis, origins),
    ]
    return [part for part in parts if part]


REHEARSED = """\
**REHEARSAL: tiny random models replace the real ones, and almost nothing was trained. This page only shows that
everything ran; no number in it means anything.**"""
NEUTRAL_NOTE = "A column without an arrow: neither direction is better in itself, and nothing is bold."
GRID_NOTE = """\
The first image of each prompt, from the lowest training seed that has images; prompts were selected by the hash of
their id, taking tasks in turn."""


def regenerate(manifest: Manifest) -> str:
    """Return the commands that make the report from scratch."""
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
    """Return the report's tables as LaTeX floats, one after the other, ready for a paper."""
    name, base = manifest.name, analysis.base
    main = main_table(analysis, marks(manifest))
    spent, _ = costs_table(costs)
    floats = [("results", [tex.Part("", main)], _results_caption(analysis))]
    if spent.rows:
        floats.append(("costs", [tex.Part("", spent)], f"Costs of training. {_plain(costs_note(analysis, costs))}"))
    for reference in published:
        shown = published_section.beside(reference, manifest, analysis)
        floats.append((reference.name, [tex.Part("", shown)], f"Published numbers, {reference.name}."))
    if base is not None and analysis.compared:
        parts = [
            tex.Part(f"{names.title(measure)} [{measure.role}]", changes_table(analysis, measure))
            for measure in analysis.measures
        ]
        floats.append(("changes", parts, f"Paired change against {base}. {CHANGES_CAPTION}"))
    if improvement_section.ranked(analysis):
        order = tex.Part("", improvement_section.order_table(analysis))
        floats.append(("order", [order], f"Order of the methods. {ORDER_CAPTION}"))
    for title, table in improvement_section.tables(analysis).items():
        floats.append((title, [tex.Part("", table)], f"{title}. {CAPTIONS.get(title, '')}".strip()))
    for measure in analysis.measures:
        if measure.by_task:
            part = tex.Part("", task_table(analysis, measure))
            floats.append((f"{measure.name}-tasks", [part], f"{names.title(measure)}. {TASKS_CAPTION}"))
    stamps, weights = page.stamps(manifest), _plain(banner(analysis))
    comments = [f"% {' '.join(line.split())}" for line in (f"Made by {regenerate(manifest)}", f"Needs {tex.PACKAGES}")]
    made = [
        tex.floats(parts, " ".join(filter(None, [caption, weights * (label != "costs"), *stamps])), f"{name}-{label}")
        for label, parts, caption in floats
    ]
    return "\n".join(["\n".join(comments), *made])


def _results_caption(analysis: Analysis) -> str:
    """Return the caption of the main table: what is in a cell, and what its marks mean."""
    base = analysis.base
    units = [f"{names.measure_name(measure)}: {measure.unit}" for measure in analysis.measures if measure.unit]
    below = f"the paired change against {base} (for {base}: of its mean)" if base else "the mean"
    toy = any(measure.world for measure in analysis.measures)
    parts = [
        f"Results: means; in small print the 95 % interval of {below}.",
        RESULTS_CAPTION.format(base=base, count=len(analysis.compared)) if base else "",
        "(shapes): a small scorer or checker of the shapes world, not the published one." if toy else "",
        f"Units: {'; '.join(units)}." if units else "",
    ]
    return " ".join(filter(None, parts))


RESULTS_CAPTION = (
    "Bold: the leader of a column, if its paired gain over {base} is significant (Holm's correction for the {count} "
    "rows compared; never for a single training run). Underlined: the leader otherwise, and the rows not separable "
    "from it (all pairs, Holm), which does not mean equal; without marks, nothing is separable from the leader."
)
CHANGES_CAPTION = (
    "Mean difference for the same prompts, with its 95 % interval; p after Holm's correction over the rows of a "
    "measure."
)
ORDER_CAPTION = (
    "Best and worst rank that the decisions about all pairs leave open (jointly 95 %). Rows that share a letter are "
    "not separable, which does not mean equal."
)
TASKS_CAPTION = "Means by task with 95 % intervals. Overall: the unweighted mean over the tasks."
CAPTIONS = {
    "Probability of improvement": (
        "The share of images that score better than the base model's of the same prompt and noise, with its 95 % "
        "interval; a tie counts half. Bold: different from 0.5 after Holm's correction over all cells."
    ),
    "Gain over all held-out measures": "Interquartile mean of paired gains, in standard deviations of base's prompts.",
}


def _plain(markdown: str) -> str:
    """Return a note without its markup, on one line."""
    return " ".join(html.unescape(re.sub(r"\*\*|\\(?=\W|_)", "", markdown)).split())


def _words(name: str) -> Words:
    """Return the sweep's words; a subset or a rehearsal has those of the full sweep."""
    name = name.removesuffix("-SUBSET").removesuffix("-REHEARSAL")
    folder = importlib.import_module(REPORTS).__path__
    modules = [importlib.import_module(f"{REPORTS}.{module.name}") for module in pkgutil.iter_modules(folder)]
    entries = {name: entry for module in modules for name, entry in module.SWEEPS.items()}
    return Words(**entries[name]) if name in entries else Words(f"Sweep {name}")


def _image_grid(results: Results, analysis: Analysis) -> Any:
    """Return the grid, one row per method, from its lowest seed that has images; None without any image."""
    sets = {label: _image_set(results, label) for label in analysis.labels}
    known = pd.concat([images for images in sets.values() if images is not None] or [pd.DataFrame()])
    if known.empty:
        return None
    known = known.drop_duplicates("prompt_id")
    tags = known["tag"].fillna("").astype(str).tolist()
    chosen = image_grid.choose(known["prompt_id"].tolist(), tags)
    about = known.set_index("prompt_id").loc[chosen]
    files = {
        label: dict(zip(images["prompt_id"], images["path"])) for label, images in sets.items() if images is not None
    }
    stamp = "REHEARSAL " * results.manifest.rehearsal
    rows = [(stamp + label, [files.get(label, {}).get(prompt) for prompt in chosen]) for label in analysis.labels]
    return image_grid.draw(rows, list(zip(about["tag"].fillna("").str.replace("_", " "), about["text"])))


def _image_set(results: Results, label: str) -> pd.DataFrame | None:
    """Return the first images of the label's lowest seed that has any: prompt_id, tag, text, path."""
    for run in sorted(results.manifest.rows.get(label, []), key=lambda run: run.seed):
        folder = results.store / "images" / run.images
        if (folder / "manifest.parquet").is_file():
            images = read_frame(folder / "manifest.parquet")
            images = images[images["index"] == images["index"].min()]
            paths = [folder / file for file in images["file"]]
            return images.assign(path=[path if path.is_file() else None for path in paths])
    return None

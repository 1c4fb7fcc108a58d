"""The report of a sweep: one table, what it supports, what is missing, and how to make it again.

A pure function of the store: no model is loaded, and the same scores give the same bytes. What is particular to a sweep
(title, introduction, questions, published tables) stands in ``SWEEPS`` of a module of ``alignbench.reports``, under the
sweep's name; without it the report is generic.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from alignbench import curves, effects, grid, page, plots, references, stats, store
from alignbench.analysis import Analysis, Comparison, Measure, analyse, better, worse
from alignbench.config import UserError, did_you_mean
from alignbench.manifest import UNTRAINED, Manifest, ManifestRun
from alignbench.results import Results
from alignbench.table import DECIMALS, Cell, Column, Section, Table, escape, interval, number

REPORTS = "alignbench.reports"
MIB = 2**20
DAGGER, DOUBLE_DAGGER = "†", "‡"
COSTS = (  # (column of the costs frame, title, unit, divisor, decimals)
    ("nfe_forward", "NFE without gradient", "", 1, 0),
    ("nfe_grad", "NFE with gradient", "", 1, 0),
    ("images", "images", "", 1, 0),
    ("reward_calls", "reward calls", "", 1, 0),
    ("decodes", "decodes", "", 1, 0),
    ("seconds", "time", "s", 1, 0),
    ("peak_memory_bytes", "peak memory", "MiB", MIB, 0),
)
NO_COSTS = [Cell()] * len(COSTS)
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
    own; tex: the tables, ``<name>.tex``; html: all of it with the pictures, ``<name>.html``; png: the picture grid,
    ``<name>-grid.png``, if there is any picture; png, svg: the figures, ``<name>-<figure>``.
    """
    check_formats(formats)
    manifest = results.manifest
    name = manifest.name
    analysis = analyse(manifest, results.scores)
    words = _words(name)
    published = [references.load(stem) for stem in words.published]
    picture = _picture_grid(results, analysis) if "png" in formats else None
    drawn = plots.figures(results, analysis) if {"html", "svg", "png"} & set(formats) else []
    said: list[Section] = []
    if {"md", "html"} & set(formats):
        link = f"{name}-grid.png" if picture else None
        course = curves.sections(results, analysis, [references.load_curve(stem) for stem in words.curves])
        said = sections(manifest, results.costs, analysis, link, made_with(results), course, published)
    contents: dict[str, Any] = {}
    if "md" in formats:
        contents[f"{name}.md"] = markdown(said)
    if "csv" in formats:
        contents[f"{name}.csv"] = tidy(analysis, results.costs).csv()
        if published:
            contents[f"{name}-published.csv"] = references.tidy(published, manifest, analysis).csv()
    if "tex" in formats:
        contents[f"{name}.tex"] = latex(manifest, results.costs, analysis, published)
    if picture:
        contents[f"{name}-grid.png"] = lambda temporary: picture.save(temporary, "PNG")
    for figure in drawn:
        contents |= {
            f"{name}-{figure.name}.{kind}": getattr(figure, kind) for kind in ("svg", "png") if kind in formats
        }
    for file, content in contents.items():
        store.write(out / file, content)
    paths = [out / file for file in contents]
    if "html" in formats:
        flagged = {label: hacked(analysis, label) for label in analysis.trained}
        paths.append(page.build(results, analysis, out, sections=said, hacked=flagged, figures=drawn))
    return paths


def check_formats(formats: Sequence[str]) -> None:
    for unknown in set(formats) - set(FORMATS):
        raise UserError(f"--format: there is no format '{unknown}'{did_you_mean(unknown, FORMATS, 'formats')}")


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
    published: Sequence[references.Reference] = (),
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
        *_answers(words.questions, analysis),
        "## Results (REHEARSAL)" if manifest.rehearsal else "## Results",
        main_table(analysis, costs, marks(manifest)),
        LEGEND.format(base=escape(analysis.base or "a base model (none in this sweep)"), count=len(analysis.compared)),
        NEUTRAL_NOTE if any(measure.higher_is_better is None for measure in analysis.measures) else "",
        _hybrid_note(manifest),
        _moments_note(manifest),
        _budgets(analysis, costs),
        *([f"![{alike}, one row per method]({picture})", GRID_NOTE] if picture else []),
        *references.sections(manifest, analysis, published),
        *_changes_section(analysis, manifest.imported),
        _one_training_note(manifest),
        *effects.sections(analysis),
        *_hacking_section(analysis, costs),
        *course,
        *_task_sections(analysis),
        *_imports_section(manifest),
        *_notes_section(manifest),
        *_settings_section(manifest),
        *_warnings_section(costs),
        *_missing_section(analysis, costs),
        *_coverage_section(manifest, analysis),
        *_protocol_section(manifest, analysis, origins),
    ]
    return [section for section in found if section]


REHEARSED = """\
**REHEARSAL: small random models stand in for the real ones, and almost nothing was trained. That everything ran is all
that this page shows; no number in it means anything.**"""
NEUTRAL_NOTE = "A column without an arrow: neither direction is better in itself, nothing in it is bold."
POOLED_NOTE = """\
Few seeds say little of how much trainings differ: the spread between them is the larger of a method's own and that of
all methods together. The interval of a method whose trainings differ many times more than the others' is too short
(simulated: 78 to 88 % instead of 95 % with two seeds, 85 to 89 % with three, 90 to 92 % with five)."""
GRID_NOTE = """\
Pictures of the lowest training seed that has any, first image of each prompt; the prompts were drawn by the hash of
their id, tasks in turn."""


def regenerate(manifest: Manifest) -> str:
    """The commands that make the report from nothing."""
    if manifest.imported:
        return " && ".join([*(run.command for run in manifest.runs), f"alignbench report {manifest.sweep}"])
    plugins = "".join(f" --plugin {path}" for path in manifest.plugins)
    return f"alignbench sweep {manifest.sweep}{plugins} && alignbench report {manifest.sweep}"


def made_with(results: Results) -> list[str]:
    """Software and hardware of the finished runs: one text for each that differs from the others."""
    found = dict[str, None]()
    for origin in results.origins.values():
        changed = f"with changes (code {origin['code']})" if origin.get("dirty") else ""
        code = " ".join(filter(None, ["alignbench", origin["alignbench"], origin["revision"], changed]))
        packages = [f"{name} {version}" for name, version in origin["packages"].items()]
        machine = [origin["machine"], *origin["devices"], f"{origin['processes']} x {origin['threads']} threads"]
        found[", ".join([code, f"Python {origin['python']}", *packages, *machine])] = None
    return list(found)


def title(measure: Measure) -> str:
    return measure.name + (", by task" if measure.by_task else "")


def main_table(analysis: Analysis, costs: pd.DataFrame, marked: Mapping[str, str] | None = None) -> Table:
    """One row per method: training reward, held-out scores, checks, costs. ``marked``: label -> marks of footnotes."""
    columns = [Column("method"), *map(_column, analysis.measures)]
    columns += [Column(name, unit, decimals=decimals) for _, name, unit, _, decimals in COSTS]
    best = {measure: analysis.best(measure) for measure in analysis.measures}
    rows, spent = [], _cost_cells(costs)
    for label in analysis.labels:
        cells = [_mean_cell(analysis, measure, label, *best[measure]) for measure in analysis.measures]
        flag = (marked or {}).get(label, "") + " **(reward hacking)**" * bool(hacked(analysis, label))
        rows.append([Cell(label, mark=flag + _seeds_mark(analysis, label)), *cells, *spent.get(label, NO_COSTS)])
    return Table(columns, rows)


def marks(manifest: Manifest) -> dict[str, str]:
    """label -> the marks of its footnotes, for rows that have any."""
    found = dict.fromkeys(hybrid(manifest), f" {DAGGER}")
    return found | {label: found.get(label, "") + f" {DOUBLE_DAGGER}" for label in eight_bit(manifest)}


def eight_bit(manifest: Manifest) -> list[str]:
    """The rows that were trained with AdamW's moments in 8 bits."""
    found = dict[str, None]()
    for run in manifest.runs:
        optimizer = run.settings.get("training", {}).get("optimizer", {})
        if run.trained and optimizer.get("moments") == "8bit":
            found[run.label] = None
    return [*found]


def _moments_note(manifest: Manifest) -> str:
    if not (labels := eight_bit(manifest)):
        return ""
    rows = escape(_and(labels))
    return f"{DOUBLE_DAGGER} AdamW with moments in 8 bits, which is not the optimizer of the papers: {rows}."


def hybrid(manifest: Manifest) -> dict[str, str]:
    """label -> ``the first 30 of 50 steps``, for rows whose last steps are the base model's."""
    tuned = [(run.label, run.protocol.get("tuned_steps"), run.protocol["steps"]) for run in manifest.runs]
    return {label: f"the first {some} of {steps} steps" for label, some, steps in tuned if some not in (None, steps)}


def _hybrid_note(manifest: Manifest) -> str:
    rows = "; ".join(f"{escape(label)}, {what}" for label, what in hybrid(manifest).items())
    return f"{DAGGER} Hybrid inference: the row makes these steps, the base model the rest: {rows}." if rows else ""


def _seeds_mark(analysis: Analysis, label: str) -> str:
    """How many planned seeds the row rests on, where it is not all. A measure that it has no score of has its dash."""
    planned = len(analysis.seeds[label])
    counts = [found[label].seeds for found in analysis.means.values()]
    used = min(filter(None, counts), default=0 if counts else planned)
    return "" if used == planned else f" ({used} of {planned} seeds)"


def _column(measure: Measure) -> Column:
    decimals = DECIMALS.get(measure.unit, 3)
    return Column(title(measure), measure.unit, measure.higher_is_better, measure.role, decimals)


def _mean_cell(analysis: Analysis, measure: Measure, label: str, best: str | None, close: Sequence[str]) -> Cell:
    mark = "(=)" if label in close else ""
    return _estimate_cell(analysis.means[measure][label], measure)._replace(bold=label == best, mark=mark)


def _estimate_cell(found: stats.Estimate, measure: Measure) -> Cell:
    """A mean and its interval; a share's interval ends where shares end."""
    lo, hi = (min(max(limit, 0.0), 1.0) if measure.unit == "fraction" else limit for limit in (found.lo, found.hi))
    return Cell(found.mean, lo, hi)


def _cost_cells(costs: pd.DataFrame) -> dict[str, list[Cell]]:
    """label -> means over its trainings; a label of which nothing is done is not there."""
    means = _label_means(costs, [column for column, *_ in COSTS])
    done = costs.loc[costs["state"] == "done", "label"].unique()
    unknown = {str(label): [Cell("unknown")] * len(COSTS) for label in done}  # somebody else's weights, as far as seen
    return unknown | {
        label: [Cell(mean[column] / divisor) for column, _, _, divisor, _ in COSTS] for label, mean in means.items()
    }


def _label_means(costs: pd.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """label -> column -> mean over the trainings that came to their end; nan where no training has a value."""
    done = costs.loc[costs["images"].notna(), ["label", *columns]]
    numbers = done.assign(**{column: pd.to_numeric(done[column]).astype(float) for column in columns})
    means = numbers.groupby("label", sort=False)[list(columns)].mean()
    return {str(label): dict(zip(columns, row)) for label, row in zip(means.index, means.to_numpy().tolist())}


def _trainings(costs: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The rows of trainings that came to their end, whatever became of their pictures."""
    return costs[costs["label"].isin(labels) & costs["images"].notna()]


def tidy(analysis: Analysis, costs: pd.DataFrame) -> Table:
    """One row per method and measure, and one per method and cost; differences are paired, against base."""
    names = [
        "method",
        "metric",
        "role",
        "unit",
        "mean",
        "lo",
        "hi",
        "se",
        "se_prompts",
        "prompts",
        "seeds",
        "between_trainings",
    ]
    names += ["change", "change_lo", "change_hi", "change_se", "change_se_prompts", "p", "p_holm", "verdict"]
    names += ["improved", "improved_lo", "improved_hi", "improved_p", "improved_p_holm", "improved_verdict"]
    rows: list[list[Cell]] = []
    for measure in analysis.measures:
        for label in analysis.labels:
            mean = analysis.means[measure][label]
            start: list[float | str | None] = [label, measure.name, measure.role, measure.unit, *mean[:4]]
            start += [mean.se_prompts, mean.prompts, mean.seeds, _between_trainings(analysis, measure, label)]
            row = [*start, *_tidy_change(analysis, measure, label)]
            row += _tidy_improved(analysis, measure, label)
            rows.append(list(map(Cell, row)))
    for label, gain in analysis.gains.items():
        start = [label, effects.IQM, "summary", "SD of base", *[None] * 5, gain.estimate.prompts, gain.estimate.seeds]
        start.append(_between_trainings(analysis, analysis.summed[0], label))
        told = [*start, *_tidy_compared(gain), *[None] * 6]
        rows.append(list(map(Cell, told)))
    spent = _cost_cells(costs)
    for label in analysis.labels:
        for (column, _, unit, _, _), cell in zip(COSTS, spent.get(label, NO_COSTS)):
            value = None if isinstance(cell.value, str) else cell.value
            start = [label, column.removesuffix("_bytes"), "cost", unit, value]
            rows.append([*map(Cell, start), *[Cell()] * (len(names) - len(start))])
    return Table([Column(name) for name in names], rows)


def _between_trainings(analysis: Analysis, measure: Measure, label: str) -> str:
    """Whether the errors of a row contain how much trainings differ: "none" where nothing was trained."""
    if label not in analysis.trained:
        return "none"
    known = max(analysis.means[measure][each].seeds for each in analysis.trained) > 1
    return "in se" if known else "unknown"


def _tidy_change(analysis: Analysis, measure: Measure, label: str) -> list[float | str | None]:
    change = analysis.changes[measure].get(label)
    return [None] * 8 if change is None else _tidy_compared(change)


def _tidy_compared(change: Comparison) -> list[float | str | None]:
    found = change.estimate
    return [*found[:3], found.se, found.se_prompts, found.p, change.p_holm, change.verdict]


def _tidy_improved(analysis: Analysis, measure: Measure, label: str) -> list[float | str | None]:
    share = analysis.improved.get(measure, {}).get(label)
    return [None] * 6 if share is None else [*share.estimate[:3], share.estimate.p, share.p_holm, share.verdict]


def latex(
    manifest: Manifest,
    costs: pd.DataFrame,
    analysis: Analysis,
    published: Sequence[references.Reference] = (),
) -> str:
    """The page's tables, each by itself, to be taken into a paper."""
    tables = {"Results": main_table(analysis, costs, marks(manifest))}
    tables |= {f"Published numbers, {each.name}": references.beside(each, manifest, analysis) for each in published}
    if analysis.base is not None:
        tables |= {"Paired change": changes_table(analysis), **effects.tables(analysis)}
    tables |= {
        f"{measure.name}, by task": _task_table(analysis, measure) for measure in analysis.measures if measure.by_task
    }
    stamp = page.stamps(manifest)
    stamp += [note.strip("*")] if (note := _seeds_note(analysis)) else []
    head = [f"Made by {regenerate(manifest)}", r"Needs \usepackage{booktabs}", *stamp]
    comments = [f"% {' '.join(line.split())}" for line in head]
    return "\n".join(
        ["\n".join(comments), *(f"% {' '.join(name.split())}\n{table.latex()}" for name, table in tables.items())]
    )


def _answers(questions: Sequence[tuple[str, Sequence[str]]], analysis: Analysis) -> list[str]:
    """Per question one sentence for each measure that was not trained on, and the evidence below it."""
    sections = []
    for subject, named in questions:
        rivals = [rival for rival in named if rival in analysis.labels]
        if subject not in analysis.labels or not rivals:
            continue
        lines = [f"## Does {escape(subject)} beat {escape(_and(rivals))}?"]
        directed = [measure for measure in analysis.measures if measure.higher_is_better is not None]
        lines += [_answer(subject, rivals, measure, analysis) for measure in reversed(directed)]
        sections += [lines[0], "\n".join(lines[1:]), "Verdicts: Holm's correction over the methods named, p < 0.05."]
    return sections


def _answer(subject: str, rivals: Sequence[str], measure: Measure, analysis: Analysis) -> str:
    results = dict(zip(rivals, analysis.compare(measure, [(subject, rival) for rival in rivals])))
    said = {
        "better than": [rival for rival in rivals if better(results[rival], measure)],
        "worse than": [rival for rival in rivals if worse(results[rival], measure)],
        "not distinguishable from": [rival for rival in rivals if results[rival].verdict == "cannot tell"],
        "not compared with": [r for r in rivals if results[r].verdict in ("not measured", "spread unknown")],
    }
    verdict = "; ".join(f"{words} {escape(_and(found))}" for words, found in said.items() if found)
    short = "Yes" if len(said["better than"]) == len(rivals) else "Partly" if said["better than"] else "Not shown"
    if said["worse than"] and not said["better than"]:
        short = "No"
    evidence = "; ".join(f"{escape(r)} {_change(result.estimate, measure)}" for r, result in results.items())
    return f"- {escape(title(measure))} [{measure.role}]: **{short}**: {verdict}. Paired differences: {evidence}."


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _change(estimate: stats.Estimate, measure: Measure) -> str:
    return interval(*estimate[:3], DECIMALS.get(measure.unit, 3) + 1, signed=True)


def _budgets(analysis: Analysis, costs: pd.DataFrame) -> str:
    """Whether the methods really had equal budgets, from what was measured."""
    done = _trainings(costs, analysis.trained)
    if not analysis.trained:
        return ""
    if done.empty and costs["state"].eq("done").all():
        return "What the trainings cost is unknown."
    if done.empty:
        return "**No training run has finished.**"
    images = pd.to_numeric(done["images"])
    if images.nunique() == 1:
        return f"All methods are compared at equal images: {number(images.iloc[0], 0)} per training run."
    per = done.assign(images=images).groupby("label", sort=False)["images"].mean()
    listed = ", ".join(f"{escape(str(label))} {number(count, 0)}" for label, count in per.items())
    return f"**The numbers of training images differ**: {listed}."


def _changes_section(analysis: Analysis, imported: bool = False) -> list[Section]:
    if analysis.base is None:
        return ["## Paired change", "The sweep has no untrained method to compare with."]
    noise = "noise unknown" if imported else "same noise"
    note = f"""\
Image by image: same prompt, {noise}. The p-value tests "no change" (t on the bootstrap's standard error,
Satterthwaite's degrees of freedom) and is corrected for all methods of one measure; up and down: p < 0.05.
*SE, prompts* takes these very trainings as given; *SE, prompts and seeds* is for trainings with any seed."""
    heading = f"## Paired change against {escape(analysis.base)}"
    return [heading, changes_table(analysis), note, _seeds_note(analysis)]


def changes_table(analysis: Analysis) -> Table:
    """One row per measure and method: the paired change against base, its errors and its verdict."""
    columns = [Column("measure"), Column("method"), Column(f"change against {analysis.base}")]
    columns += [Column("SE, prompts"), Column("SE, prompts and seeds"), Column("p, Holm"), Column("verdict")]
    rows = []
    for measure in analysis.measures:
        more = DECIMALS.get(measure.unit, 3) + 1
        for label, change in analysis.changes[measure].items():
            errors = [change.estimate.se_prompts, change.estimate.se]
            p = effects.p_text(change.p_holm)
            texts = [_change(change.estimate, measure), *(number(error, more) for error in errors), p, change.verdict]
            bold = change.verdict in ("up", "down")
            rows.append([Cell(f"{title(measure)} [{measure.role}]"), Cell(label), *map(Cell, texts[:-1])])
            rows[-1].append(Cell(texts[-1], bold=bold))
    return Table(columns, rows)


def _seeds_note(analysis: Analysis) -> str:
    changes = [(label, change) for found in analysis.changes.values() for label, change in found.items()]
    used = [change.estimate.seeds for label, change in changes if label in analysis.trained]
    if max(used, default=0) == 1:
        return "**One training seed: how much trainings differ is unknown, and no interval here contains it.**"
    return POOLED_NOTE if max(used, default=0) > 1 else ""


def _one_training_note(manifest: Manifest) -> str:
    """Of weights that are somebody else's there is one training, and nobody knows how much others would differ."""
    whose = list(dict.fromkeys(run.label for run in manifest.runs if run.published))
    what = "one training, of unknown seed: how much trainings differ is unknown, and no interval of it contains it.**"
    return f"**Of {escape(_and(whose))} there is {what}" if whose else ""


def _imports_section(manifest: Manifest) -> list[str]:
    """Where imported rows are from, what is known of them, and what is missing."""
    lines = []
    for run in manifest.runs if manifest.imported else ():
        known = [f"{key} = {run.protocol[key]} ({where})" for key, where in run.known_from.items()]
        unknown = [key for key, value in run.protocol.items() if value == "unknown"]
        about = [run.imported, run.training, *known]
        about += [f"unknown: {', '.join(unknown)}"] if unknown else []
        about += [f"said to be trained on {', '.join(run.trained_on)}"] if run.trained_on else []
        lines.append(f"- {escape(run.label)}: {escape('; '.join(about))}")
        lines += [f"  - {escape(remark)}" for remark in run.remarks]
    return ["## Imported rows", "\n".join(lines), IMPORTED_NOTE] if lines else []


IMPORTED_NOTE = """\
These pictures and scores were made elsewhere. A score with a name in brackets is that project's own, as its file has
it: neither its version nor its weights are proven. [unknown]: nobody said whether a row was trained on it."""


def hacked(analysis: Analysis, label: str) -> list[Measure]:
    """The measures that fell (after Holm) although the training reward rose; empty if it did not rise, or none fell."""
    changes = {measure: found[label] for measure, found in analysis.changes.items() if label in found}
    trained = label in analysis.trained  # else nobody knows on what
    rose = trained and any(better(change, measure) for measure, change in changes.items() if measure.role == "train")
    return [m for m, change in changes.items() if rose and m.role != "train" and worse(change, m)]


def _hacking_section(analysis: Analysis, costs: pd.DataFrame) -> list[Section]:
    if not analysis.trained:
        return []
    columns = [Column("method"), Column("reward, first 10 % of updates", decimals=4)]
    columns += [Column("reward, last 10 %", decimals=4), Column("change", decimals=4, signed=True)]
    rows, means = [], _label_means(costs, ["reward_first", "reward_last"])
    for label in analysis.trained:
        first, last = means.get(label, {"first": math.nan, "last": math.nan}).values()
        rows.append([Cell(label), Cell(first), Cell(last), Cell(last - first)])
    lines = [_hacking_line(analysis, label) for label in analysis.trained if analysis.base is not None]
    note = "Means over finished seeds, of the reward on the pictures that the method itself made while it trained."
    return ["## Training reward, and reward hacking", Table(columns, rows), note, "\n".join(lines)]


def _hacking_line(analysis: Analysis, label: str) -> str:
    verdicts = {m: found[label].verdict for m, found in analysis.changes.items()}
    told = ", ".join(f"{escape(title(m))} [{m.role}] {verdict}" for m, verdict in verdicts.items())
    fell = hacked(analysis, label)
    if fell:
        names = escape(_and([title(measure) for measure in fell]))
        return f"- **REWARD HACKING, {escape(label)}: the training reward rose while {names} fell.** ({told})"
    return f"- {escape(label)}: no reward hacking shown ({told})."


def _task_sections(analysis: Analysis) -> list[Section]:
    sections: list[Section] = []
    for measure in analysis.measures:
        if not measure.by_task:
            continue
        heading = f"## {escape(measure.name)} [{measure.role}], by task"
        sections += [heading, _task_table(analysis, measure)]
    return sections


def _task_table(analysis: Analysis, measure: Measure) -> Table:
    tasks = analysis.tasks(measure)
    columns = [Column("method"), *(Column(task.replace("_", " ")) for task in tasks), Column("mean of tasks")]
    rows = []
    for label in analysis.labels:
        found = [*(means[label] for means in tasks.values()), analysis.means[measure][label]]
        rows.append([Cell(label), *(_estimate_cell(each, measure) for each in found)])
    return Table(columns, rows)


def _notes_section(manifest: Manifest) -> list[str]:
    """Every exception of the sweep with its reason, and the methods that it holds for."""
    found: dict[str, dict[str, None]] = {}
    for run in manifest.runs:
        for note in run.notes:
            text = f"{escape(_flat(note.set))}. {escape(note.reason)}"
            found.setdefault(text, {})[run.label] = None
    every = len(manifest.rows)
    whom = {text: "all methods" if len(labels) == every else escape(_and([*labels])) for text, labels in found.items()}
    lines = [f"- {whom[text]}: {text}" for text in found]
    return ["## Overrides, and why", "\n".join(lines)] if lines else []


def _flat(settings: dict[str, Any], prefix: str = "") -> str:
    """``{"a": {"b": 1}}`` -> ``a.b = 1``; a setting that is off (None) is shown as ``none``: it may be a departure."""
    nested = [
        _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} = {_said(value)}"
        for key, value in settings.items()
        if value not in ({}, [])
    ]
    return ", ".join(nested)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _settings_section(manifest: Manifest) -> list[str]:
    """What every run was made with, as resolved: once for what all runs share, then what is each method's own."""
    shared = {part: _of_runs(manifest.runs, part) for part in ("backend", "reward", "prompts", "training")}
    lines = [f"- {part}, {escape(text)}" for part, texts in shared.items() if len(texts) == 1 for text in texts]
    for label, mine in manifest.rows.items():
        own = [
            *_of_runs(mine, "method"),
            *(text for p, ts in shared.items() if len(ts) > 1 for text in _of_runs(mine, p)),
        ]
        lines.append(f"- {escape(label)}: {escape('; '.join(own))}")
    return ["## Settings, as resolved", "\n".join(lines)] if shared["backend"] else []


def _of_runs(runs: Sequence[ManifestRun], part: str) -> list[str]:
    """The different settings of ``part`` over runs, as text; the training seed is no difference."""
    found = dict[str, None]()
    for run in runs:
        value = run.settings.get(part, {})
        if part == "training":
            value = {key: setting for key, setting in value.items() if key != "seed"}
        found[_flat(value) if isinstance(value, dict) else f"{value}"] = None
    return [text for text in found if text]


def _warnings_section(costs: pd.DataFrame) -> list[str]:
    """What training records show to be hardly meant."""
    warned = [run for run in costs.to_dict("records") if isinstance(run.get("warning"), str) and run["warning"]]
    lines = [f"- **{escape(run['label'])}, seed {run['seed']}**: {escape(run['warning'])}" for run in warned]
    return ["## Warnings", "\n".join(lines)] if lines else []


SILENT = {"running": "it is being made", "queued": "it waits for its turn", "requeued": "it waits to go on"}


def _missing_section(analysis: Analysis, costs: pd.DataFrame) -> list[str]:
    lines = []
    for run in costs[costs["state"] != "done"].to_dict("records"):
        seed = "" if run["seed"] == UNTRAINED else f", seed {run['seed']}"
        reason = run.get("reason")
        why = reason if isinstance(reason, str) and reason else SILENT.get(run["state"], "no reason was recorded")
        lines.append(f"- {escape(run['label'])}{seed}: **{escape(run['state'])}**: {escape(why)}")
    return ["## Runs that are not in the numbers", "\n".join(lines)] if lines else []


def _coverage_section(manifest: Manifest, analysis: Analysis) -> list[str]:
    """Scores that are absent or not ok, and prompts that pairing left out."""
    images = manifest.prompts * manifest.protocol["images_per_prompt"]
    lines = []
    for measure in analysis.measures:
        for label in analysis.labels:
            valid, expected = analysis.coverage(measure, label, images)
            change = analysis.changes[measure].get(label)
            dropped = [analysis.means[measure][label].dropped, change.estimate.dropped if change else 0]
            if valid != expected or any(dropped):
                text = f"- {escape(title(measure))}, {escape(label)}: {valid} of {expected} scores; "
                lines.append(f"{text}prompts left out: {dropped[0]} of the mean, {dropped[1]} of the paired change")
    complete = f"Complete: every picture of every run has every score ({images} pictures a run)."
    rule = (
        "A prompt is left out if some seed, or one side of a pair, has no valid score of it; so is a seed without any."
    )
    return ["## Coverage", "\n".join(lines) if lines else complete, rule if lines else ""]


def _protocol_section(manifest: Manifest, analysis: Analysis, origins: Sequence[str]) -> list[str]:
    known = sorted({seed for label in analysis.trained for seed in analysis.seeds[label]})
    seeds = [*map(str, known), *["unknown"] * any(run.published for run in manifest.runs)]
    facts: dict[str, Any] = {"training seeds": ", ".join(seeds) or "none"}
    facts |= {"evaluation, number of prompts": manifest.prompts}
    protocol = {key: value for key, value in manifest.protocol.items() if value is not None}
    facts |= {f"evaluation, {key.replace('_', ' ')}": value for key, value in protocol.items()}
    facts |= {"training reward": manifest.training_evaluator}
    versions = dict.fromkeys(f"{m.evaluator} {m.version}" for m in analysis.measures)  # one may stand there twice
    facts |= {"evaluators": ", ".join(versions)}
    facts |= {"intervals": f"95 %, {stats.DRAWS:,} bootstrap draws, seed 0"}
    lines = [f"- {escape(key)}: {escape(value)}" for key, value in facts.items()]
    lines += _departures(manifest)
    lines += [f"- made with {escape(origin)}" for origin in origins]
    differ = "**The runs were made with different software or hardware: their seconds may not compare.**"
    return ["## Protocol", "\n".join(lines), differ if len(origins) > 1 else ""]


def _departures(manifest: Manifest) -> list[str]:
    """The rows whose pictures were made in another way than the others'; the reasons stand with the overrides."""
    found = dict[str, None]()
    for run in manifest.runs:
        own = {key: value for key, value in run.protocol.items() if value != manifest.protocol.get(key)}
        if own:
            found[f"- **but {escape(run.label)}**: {escape(_flat(own).replace('_', ' '))}"] = None
    return list(found)


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
    chosen = grid.choose(known["prompt_id"].tolist(), tags)
    about = known.set_index("prompt_id").loc[chosen]
    files = {label: dict(zip(found["prompt_id"], found["path"])) for label, found in sets.items() if found is not None}
    stamp = "REHEARSAL " * results.manifest.rehearsal
    rows = [(stamp + label, [files.get(label, {}).get(prompt) for prompt in chosen]) for label in analysis.labels]
    return grid.draw(rows, list(zip(about["tag"].fillna("").str.replace("_", " "), about["text"])))


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

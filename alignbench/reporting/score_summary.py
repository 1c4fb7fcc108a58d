"""Tables of scores of one set of images: one row per image, and means with intervals, the same as a report's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.config import UserError, settings
from alignbench.plugins import Registry
from alignbench.reporting.analysis.comparison import Analysis, Measure, analyse
from alignbench.reporting.tables import estimate_cell
from alignbench.reporting.text.names import decimals, title
from alignbench.reporting.text.table import Cell, Column, Table, interval, listed
from alignbench.store.manifest import UNTRAINED, Manifest, ManifestMetric, ManifestRun, ManifestScore

ONE_RUN = "one training run: no interval accounts for how much training runs differ"


def tidy(scored: Sequence[tuple[Any, pd.DataFrame]]) -> pd.DataFrame:
    """Return one row per image and metric."""
    frames = []
    for evaluator, frame in scored:
        about = [name for name in ("file", "prompt_id", "tag", "index", "ok", "error", "raw") if name in frame]
        for metric in evaluator.metrics:
            part = frame[about].assign(evaluator=evaluator.name, metric=metric.name, score=frame[metric.name])
            frames.append(part)
    return pd.concat(frames, ignore_index=True)


def save(scored: Sequence[tuple[Any, pd.DataFrame]], out: Path, plugins: Sequence[str] = ()) -> list[Path]:
    """Write the tidy table as .csv or .parquet, and a .json with the evaluators' settings, versions and weight hashes.

    Return both paths. UserError for any other ending.
    """
    from alignbench.experiment.ids import score_content
    from alignbench.store.files import write, write_frame, write_json

    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: choose a name that ends in .csv or .parquet")
    table, about = tidy(scored), out.with_suffix(".json")
    write(out, table.to_csv(index=False)) if out.suffix == ".csv" else write_frame(out, table)
    registry = Registry(plugins)
    write_json(about, {evaluator.name: score_content(evaluator, registry) for evaluator, _ in scored})
    return [out, about]


def summary(scored: Sequence[tuple[Any, pd.DataFrame]]) -> str:
    """Return a table with a row per metric: the mean with its interval over prompts, and what it rests on."""
    entries = [
        ManifestScore(
            evaluator=evaluator.name,
            settings=settings(evaluator),
            version=evaluator.version,
            file="",
            metrics=[ManifestMetric(*metric) for metric in evaluator.metrics],
            role="unknown",
        )
        for evaluator, _ in scored
    ]
    run = ManifestRun(id="", label="images", method="", seed=UNTRAINED, published=True, images="", scores=entries)
    return run_summary(run, tidy(scored).assign(label=run.label, seed=run.seed))


def run_summary(run: ManifestRun, scores: pd.DataFrame) -> str:
    """Return the same table for a run of a sweep, by the analysis that its report makes. ``scores``: of this run."""
    analysis = analyse(Manifest(name="", cases=[run.label], runs=[run]), scores)
    rows: list[list[Cell]] = []
    notes = [ONE_RUN] if run.trained else []
    for measure in analysis.measures:
        own = scores[(scores["evaluator"] == measure.evaluator) & (scores["metric"] == measure.name)]
        found = analysis.means[measure][run.label]
        name = Column(title(measure), measure.unit, measure.higher_is_better).header
        _, lo, hi, *_ = estimate_cell(found, measure)
        shown = interval(found.mean, lo, hi, decimals(measure))
        counts = [len(own), int((~own["ok"].eq(True)).sum()), found.prompts, found.dropped]
        rows.append([Cell(name), Cell(shown), *(Cell(str(count)) for count in counts)])
        notes += [*_notes(analysis, measure, run.label), *_note_uneven(own, measure)]
    columns = ["metric", "mean [95 % interval]", "images", "failed", "prompts", "prompts without a score"]
    return "\n".join([Table([Column(name) for name in columns], rows).markdown(), *notes])


def _note_uneven(own: pd.DataFrame, measure: Measure) -> Iterator[str]:
    """Yield the mean over images if it may differ from the table's, in which every prompt counts alike."""
    scored = own[own["ok"].eq(True)]
    counts = scored.groupby("prompt_id").size()
    if counts.nunique() > 1:
        means = scored.groupby("tag" if measure.by_task else "metric", observed=True)["score"].mean()
        official = ", as in GenEval's own script," if measure.by_task else ""
        yield (
            f"{title(measure)}: prompts have {counts.min()} to {counts.max()} images and count alike; "
            f"if every image counts alike{official} the mean is {means.mean():.{decimals(measure)}f}"
        )


def _notes(analysis: Analysis, measure: Measure, label: str) -> Iterator[str]:
    """Yield why a mean or its interval is unknown."""
    found = analysis.means[measure][label]
    tasks = analysis.tasks(measure) if measure.by_task and analysis.scored(measure, label) else {}
    counts = {task: means[label].prompts for task, means in tasks.items()} or {"": found.prompts}
    if np.isnan(found.mean):
        empty = [task for task, count in counts.items() if task and not count]
        yield f"{title(measure)}: no mean, since no image{' of ' * bool(empty)}{listed(empty)} has a score"
    elif np.isnan(found.lo):
        few = min(counts, key=counts.__getitem__)
        yield f"{title(measure)}: no interval, since {few or 'the list'} has too few prompts ({counts[few]})"

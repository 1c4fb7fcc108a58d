"""Sections of the report about the course of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Analysis, Measure
from alignbench.reporting.analysis.learning_curves import (
    AXES,
    DIVERGENCE,
    PROFILE,
    Divergence,
    LearningCurve,
    Reached,
    changes,
    common,
    cost_totals,
    directed,
    divergences,
    drifts,
    equal_cost,
    learning_curves,
    nan_mean,
    normalised,
    process_count,
    profile,
    reward_at,
    target,
    time_to,
    trained_runs,
    training,
)
from alignbench.reporting.analysis.published import Point, Printed, Reference, departures
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.analysis.stats import Array, MeanEstimate
from alignbench.reporting.findings import levels
from alignbench.reporting.tables import estimate_cell, harmed
from alignbench.reporting.text.names import change_decimals, decimals, measure_name, title
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, interval, listed, number
from alignbench.store.artefacts import Store, milestone_expected
from alignbench.store.manifest import Manifest


def sections(results: Results, analysis: Analysis, published: Sequence[Reference] = ()) -> list[Section]:
    """Return the chapter; empty if nothing was trained. ``published``: curves to compare with ours."""
    if not trained_runs(results):
        return []
    curves = learning_curves(results, analysis)
    records = training(results) if curves or published else pd.DataFrame()
    parts: list[Section] = ["## Over the course of training", _weights_note(analysis)]
    parts += _reward_section(results, analysis)
    if not curves:
        lacking = "there is no untrained method to compare with" if analysis.base is None else "no milestone has scores"
        planned = any(run.milestones for run in results.manifest.runs)
        why = f"Scores are known at the end of training only: {lacking}."
        parts.append(why if planned else "Without `training.milestones`, scores are known at the end of training only.")
    else:
        parts += [
            *_equal_cost_section(curves, analysis),
            *_target_section(curves, analysis),
            *_steps_section(curves, analysis, records),
            *_divergence_section(curves, analysis),
        ]
    beside = [part for curve in published for part in _published_section(curve, results.manifest, curves, records)]
    sections = [*parts, *beside, *_profile_section(analysis), *_unreached(results)]
    return [section for section in sections if section]


def _weights_note(analysis: Analysis) -> str:
    """Return the warning that curves are those of single training runs; "" if runs are known to differ so much."""
    alone = [label for label in analysis.trained if analysis.of_weights(label)]
    what = "These curves are of one training run each: another run may cross, reach or diverge elsewhere."
    return f"**{what} Every interval below is over prompts only.**" if alone else ""


def _reward_section(results: Results, analysis: Analysis) -> list[Section]:
    """Return the training reward at the largest cost that all runs reached, and at half of it."""
    trained: dict[str, list[dict[str, Array]]] = {}
    for run in sorted(trained_runs(results), key=lambda run: run.seed):
        records = results.training_records[run.id]
        trained.setdefault(run.label, []).append(records | cost_totals(records, process_count(results, run)))
    largest = {axis: min(float(run[axis].max()) for runs in trained.values() for run in runs) for axis in AXES}
    points = [(axis, share * largest[axis]) for axis in AXES for share in (0.5, 1.0)]
    columns = [Column("method")]
    columns += [Column(f"{_short(cost)} {AXES[axis]}", decimals=4) for axis, cost in points]
    rows = []
    for label in filter(trained.__contains__, analysis.trained):
        means = [np.array([reward_at(run, axis, cost) for run in trained[label]]) for axis, cost in points]
        rows.append([Cell(label), *(Cell(_known(float(nan_mean(seeds, 0)))) for seeds in means)])
    note = """\
Training reward at equal cost, on the images that each method generated during training, at the largest cost that all
training runs reached and at half of it; means over seeds and over the updates within 5 % of the cost."""
    return ["### Training reward against cost", Table(columns, rows), note]


def _short(cost: float) -> str:
    return number(cost, 0) if cost >= 10 or cost == int(cost) else number(cost, 2)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _column(measure: Measure) -> Column:
    about = (measure.unit, measure.higher_is_better, measure.role, decimals(measure))
    return Column(title(measure), *about, key=measure.name)


def _equal_cost_section(curves: Sequence[LearningCurve], analysis: Analysis) -> list[Section]:
    """Return a table for each kind of cost of which some methods spent more than others."""
    parts: list[Section] = []
    for axis, name in AXES.items():
        cost = common(curves, axis)
        beyond = [curve.label for curve in curves if np.nanmax(curve.costs[axis][-1]) > 1.01 * cost]
        if not beyond:
            continue
        chosen = directed(analysis)
        means = {measure: equal_cost(curves, measure, axis) for measure in chosen}
        rows = [
            [Cell(curve.label), *(estimate_cell(means[measure][curve.label], measure) for measure in chosen)]
            for curve in curves
        ]
        parts += [f"**At {_short(cost)} {name}, the most that every method reached:**"]
        parts += [Table([Column("method"), *map(_column, chosen)], rows)]
    if not parts:
        return []
    note = "Scores are interpolated linearly between milestones, prompt by prompt; nothing is extrapolated."
    return ["### Scores at equal cost", *parts, note]


def _target_section(curves: Sequence[LearningCurve], analysis: Analysis) -> list[Section]:
    rows = []
    for measure in directed(analysis):
        gain = target(curves, measure)
        if gain is None:
            rows.append(
                [Cell(f"{title(measure)} [{measure.role}]"), Cell("no method gains"), *[Cell()] * (len(AXES) + 1)]
            )
            continue
        shown = number(gain, change_decimals(measure), signed=True)
        for curve in curves:
            cells = [Cell(_reached(time_to(curve, measure, axis, gain))) for axis in AXES]
            rows.append([Cell(f"{title(measure)} [{measure.role}]"), Cell(shown), Cell(curve.label), *cells])
    columns = [Column("measure"), Column("target gain"), Column("method"), *map(Column, AXES.values())]
    note = f"""\
The target is half of the largest final gain over the base model of any method. Each cost is the first at which a
method's mean gain reaches the target, interpolated linearly between milestones, with a 95 % interval over resamples of
{levels(analysis)}."""
    return ["### Cost of half the best gain", Table(columns, rows), note]


def _reached(crossing: Reached) -> str:
    """Return ``240 [180, 300]``, ``240 [180, not reached]``, or ``240 [unknown]`` where the spread is unknown."""
    cost, lo, hi = (_short(value) if np.isfinite(value) else "not reached" for value in crossing)
    if np.isnan(crossing.cost):
        return "unknown"
    if np.isnan(crossing.lo):
        return f"{cost} [unknown]"
    if cost == "not reached":
        return cost if lo == "not reached" else f"{cost} [from {lo}]"
    return f"{cost} [{lo}, {hi}]"


def _steps_section(curves: Sequence[LearningCurve], analysis: Analysis, records: pd.DataFrame) -> list[Section]:
    """Return changes against the base model and the network's drift, one row per method and step."""
    columns = [Column("method"), Column("update", decimals=0)]
    columns += [
        Column(title(measure), measure.unit, measure.higher_is_better, measure.role, key=measure.name)
        for measure in analysis.measures
    ]
    columns.append(Column("drift", decimals=4))
    moved = {measure: changes(curves, measure) for measure in analysis.measures}
    rows = []
    for curve in curves:
        drift = drifts(curve, records)
        for k, update in enumerate(curve.updates[1:]):
            texts = [_change(moved[measure][curve.label][k], measure) for measure in analysis.measures]
            rows.append([Cell(curve.label), Cell(float(update)), *map(Cell, texts), Cell(_known(float(drift[k + 1])))])
    note = """\
Paired changes against the base model on the milestones' prompts, with 95 % intervals. *drift*: how far the network's
output has moved from the base model's, |v - v_base|^2 / |v_base|^2, measured during training."""
    return ["### Milestone by milestone", Table(columns, rows), note]


def _change(estimate: MeanEstimate, measure: Measure) -> str:
    return interval(*estimate[:3], change_decimals(measure), signed=True)


def _divergence_section(curves: Sequence[LearningCurve], analysis: Analysis) -> list[Section]:
    by_label = divergences(curves)
    if not by_label:
        return []
    measures = [m for m in analysis.measures if any(m in divergence for divergence in by_label.values())]
    columns = [Column("method"), *(Column(title(measure), role=measure.role, key=measure.name) for measure in measures)]
    rows, losses = [], []
    for label, divergence in by_label.items():
        bold = not analysis.of_weights(label)
        found = [divergence.get(measure) for measure in measures]
        cells = [Cell(_diverged(d), bold=bold and d.update is not None) if d else Cell("trained on") for d in found]
        rows.append([Cell(label), *cells])
        lost = [measure_name(m) for m in harmed(analysis, label) if m in divergence and divergence[m].update is None]
        losses += [(label, lost)] if lost else []
    note = DIVERGENCE.format(resampled=levels(analysis))
    worse = "\n".join(f"- {escape(label)}: {escape(listed(names))}" for label, names in losses)
    heading = "### Where reward and quality diverge"
    return [
        heading,
        Table(columns, rows),
        note,
        *([LOST.format(base=escape(analysis.base or "")), worse] if worse else []),
    ]


LOST = """\
No divergence, yet worse than {base} at the end of training (paired change on all prompts, Holm). The score fell without
the reward rising at the same time, or fell in steps too small to be shown one by one:"""


def _diverged(divergence: Divergence) -> str:
    """Return ``update 50 [40, 60; 98 %]``, ``no [50, never; 12 %]``, or ``no [unknown]`` without a known spread."""
    where = "no" if divergence.update is None else f"update {_short(divergence.update)}"
    if np.isnan(divergence.share):
        return f"{where} [unknown]"
    lo, hi = ("never" if np.isinf(limit) else _short(limit) for limit in (divergence.lo, divergence.hi))
    return f"{where} [{lo if lo == hi else f'{lo}, {hi}'}; {divergence.share:.0%}]"


def _profile_section(analysis: Analysis) -> list[Section]:
    scores = normalised(analysis)
    if not scores:
        return []
    columns = [Column("method"), *(Column(f"above {tau:g}", decimals=2) for tau in PROFILE)]
    rows = []
    for label in analysis.trained:
        own = [by_label[label] for by_label in scores.values() if len(by_label[label])]
        if own:
            share, lo, hi = profile(own, np.array(PROFILE))
            lo, hi = np.where(lo < hi, (lo, hi), np.nan)  # resamples that all agree tell nothing of other runs
            rows.append([Cell(label), *(Cell(float(a), float(b), float(c)) for a, b, c in zip(share, lo, hi))])
    drawn = """\
Pointwise 95 % bands from resampling seeds within each measure (Agarwal et al. 2021); unknown where all resamples agree,
and for a row with one seed, whose share is one of measures, not of training runs."""
    note = f"""\
Share of runs (measure x training seed) whose final score exceeds a threshold; 0 is the base model, 1 the best mean of
that measure. Measures: {", ".join(escape(measure_name(measure)) for measure in scores)}. {drawn}"""
    return ["### Performance profile", Table(columns, rows), note]


def _unreached(results: Results) -> list[Section]:
    """Return the milestones that a training run did not reach."""
    store, lines = Store(results.store), []
    for run in results.manifest.runs:
        beyond = [part.update for part in run.milestones if not milestone_expected(store, run.id, part.update)]
        if beyond:
            named = ", ".join(map(str, beyond))
            lines.append(f"- {escape(run.title)}: training ended before update {named}")
    return ["Milestones that were not reached:", "\n".join(lines)] if lines else []


def _published_section(
    reference: Reference, manifest: Manifest, curves: Sequence[LearningCurve], records: pd.DataFrame
) -> list[Section]:
    """Return each point of a published curve beside ours at the same update."""
    source, rows, reasons = reference.source, [], []
    for method in dict.fromkeys(point.method for point in reference.points):
        known = reference.labels(method)
        for label in [label for label in manifest.rows if label in known] or [""]:
            points = [point for point in reference.points if point.method == method]
            rows += [_beside(point, source.metrics[point.metric], label, curves, records) for point in points]
            runs = manifest.rows.get(label)
            if runs and (why := departures(reference.protocol(method), manifest, runs[0])):
                reasons.append(f"- {escape(label)}, protocol differs: {escape('; '.join(why))}")
    columns = [Column("published row"), Column("our row"), Column("metric"), Column("update", decimals=0)]
    columns += [Column("ours", decimals=4), Column("published", decimals=4)]
    note = "The published values were read off a figure, so no verdict is drawn from them."
    heading = f"### {escape(source.citation)}, {escape(source.place)}"
    return [heading, escape(source.url), escape(source.note), Table(columns, rows), note, "\n".join(reasons)]


def _beside(
    point: Point, printed: Printed, label: str, curves: Sequence[LearningCurve], records: pd.DataFrame
) -> list[Cell]:
    """Return the row of a published point.

    Ours is the training reward within 5 % of the update for ``reward_mean``, a milestone's score for other metrics.
    """
    ours = Cell("not run")
    own = records[records["label"] == label]
    if printed.metric == "reward_mean" and own["update"].max() >= point.update:
        seeds = [reward_at(run, "update", point.update) for _, run in own.groupby("seed")]
        ours = Cell(_known(float(np.nanmean(seeds)) * printed.scale))
    for curve in curves:
        steps = np.flatnonzero(curve.updates == point.update)
        measure = next((measure for measure in curve.values if measure.name == printed.metric), None)
        if curve.label == label and measure is not None and len(steps):
            mean = stats.mean_interval(curve.values[measure][steps[0]], curve.strata(measure))
            ours = Cell(mean.mean * printed.scale, mean.lo * printed.scale, mean.hi * printed.scale)
    about: list[float | str | None] = [point.method, label or "not run", point.metric, point.update]
    return [*map(Cell, about), ours, Cell(point.value)]

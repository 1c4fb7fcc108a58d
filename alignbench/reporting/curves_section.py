"""The report's sections about the course of training."""

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
from alignbench.reporting.table import DECIMALS, Cell, Column, Section, Table, escape, interval, number
from alignbench.store.artefacts import Store, reached
from alignbench.store.manifest import Manifest


def sections(results: Results, analysis: Analysis, published: Sequence[Reference] = ()) -> list[Section]:
    """Markdown for the report; empty if nothing was trained. ``published``: curves to set beside ours."""
    if not trained_runs(results):
        return []
    found = learning_curves(results, analysis)
    records = training(results) if found or published else pd.DataFrame()
    parts: list[Section] = ["## Over the course of training", *_reward_section(results, analysis)]
    if not found:
        lacking = "there is no untrained method to compare with" if analysis.base is None else "no milestone is there"
        planned = any(run.milestones for run in results.manifest.runs)
        why = f"Of the scores only the end is known: {lacking}."
        parts.append(why if planned else "Without `training.milestones`, only the end of the scores is known.")
    else:
        parts += [
            *_equal_cost_section(found, analysis),
            *_target_section(found, analysis),
            *_steps_section(found, analysis, records),
            *_parting_section(found),
        ]
    beside = [part for curve in published for part in _published_section(curve, results.manifest, found, records)]
    return [*parts, *beside, *_profile_section(analysis), *_unreached(results)]


def _reward_section(results: Results, analysis: Analysis) -> list[Section]:
    """The training reward at half of, and at, the largest cost that all runs reached."""
    trained: dict[str, list[dict[str, Array]]] = {}
    for run in sorted(trained_runs(results), key=lambda run: run.seed):
        records = results.trainings[run.id]
        trained.setdefault(run.label, []).append(records | cost_totals(records, process_count(results, run)))
    largest = {axis: min(float(run[axis].max()) for runs in trained.values() for run in runs) for axis in AXES}
    points = [(axis, share * largest[axis]) for axis in AXES for share in (0.5, 1.0)]
    columns = [Column("method")]
    columns += [Column(f"{_short(cost)} {AXES[axis]}", decimals=4) for axis, cost in points]
    rows = []
    for label in filter(trained.__contains__, analysis.trained):
        means = [np.array([reward_at(run, axis, cost) for run in trained[label]]) for axis, cost in points]
        rows.append([Cell(label), *(Cell(_known(float(nan_mean(each, 0)))) for each in means)])
    note = """\
Training reward at equal cost, on the pictures that each method made while it trained: at half of, and at, the largest
cost that all trainings reached; means over seeds, and over the updates within 5 % of the cost."""
    return ["### Training reward against cost", Table(columns, rows), note]


def _short(cost: float) -> str:
    return number(cost, 0) if cost >= 10 or cost == int(cost) else number(cost, 2)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _column(measure: Measure) -> Column:
    decimals = DECIMALS.get(measure.unit, 3)
    return Column(measure.name, measure.unit, measure.higher_is_better, measure.role, decimals)


def _equal_cost_section(found: Sequence[LearningCurve], analysis: Analysis) -> list[Section]:
    """One table for each cost that stops some method before its end."""
    parts: list[Section] = []
    for axis, name in AXES.items():
        cost = common(found, axis)
        beyond = [course.label for course in found if np.nanmax(course.costs[axis][-1]) > 1.01 * cost]
        if not beyond:
            continue
        chosen = directed(analysis)
        means = {measure: equal_cost(found, measure, axis) for measure in chosen}
        rows = [
            [Cell(course.label), *(_mean_cell(means[measure][course.label], measure) for measure in chosen)]
            for course in found
        ]
        parts += [f"**At {_short(cost)} {name}, the most that every method reached:**"]
        parts += [Table([Column("method"), *map(_column, chosen)], rows)]
    if not parts:
        return []
    note = "Between milestones a score is interpolated linearly, prompt by prompt; nothing is extrapolated."
    return ["### Scores at equal cost", *parts, note]


def _mean_cell(found: MeanEstimate, measure: Measure) -> Cell:
    """A mean and its interval; a share's interval ends where shares end."""
    low, high = (0.0, 1.0) if measure.unit == "fraction" else (-np.inf, np.inf)
    return Cell(found.mean, max(found.lo, low), min(found.hi, high))


def _target_section(found: Sequence[LearningCurve], analysis: Analysis) -> list[Section]:
    rows = []
    for measure in directed(analysis):
        gain = target(found, measure)
        if gain is None:
            rows.append(
                [Cell(f"{measure.name} [{measure.role}]"), Cell("no method gains"), *[Cell()] * (len(AXES) + 1)]
            )
            continue
        shown = number(gain, DECIMALS.get(measure.unit, 3) + 1, signed=True)
        for course in found:
            cells = [Cell(_reached(time_to(course, measure, axis, gain))) for axis in AXES]
            rows.append([Cell(f"{measure.name} [{measure.role}]"), Cell(shown), Cell(course.label), *cells])
    columns = [Column("measure"), Column("target gain"), Column("method"), *map(Column, AXES.values())]
    note = """\
The target is half of the largest gain over the base model that any method ends with. Costs are the first at which a
method's mean gain is that large, linear between milestones, with 95 % of the resamples of prompts and seeds."""
    return ["### Cost of half the best gain", Table(columns, rows), note]


def _reached(found: Reached) -> str:
    """Return ``240 [180, 300]``, ``240 [180, not reached]``, or ``240 [unknown]`` where the spread is unknown."""
    if np.isnan(found.cost):
        return "unknown"
    if np.isnan(found.lo):
        return f"{_short(found.cost) if np.isfinite(found.cost) else 'not reached'} [unknown]"
    lo, hi = (_short(limit) if np.isfinite(limit) else "not reached" for limit in (found.lo, found.hi))
    if not np.isfinite(found.cost):
        return "not reached" if lo == "not reached" else f"not reached [from {lo}]"
    return f"{_short(found.cost)} [{lo}, {hi}]"


def _steps_section(found: Sequence[LearningCurve], analysis: Analysis, records: pd.DataFrame) -> list[Section]:
    """Every step of every method: changes against the base model, and the drift of its weights."""
    columns = [Column("method"), Column("update", decimals=0)]
    columns += [
        Column(measure.name, measure.unit, measure.higher_is_better, measure.role) for measure in analysis.measures
    ]
    columns.append(Column("drift", decimals=4))
    moved = {measure: changes(found, measure) for measure in analysis.measures}
    rows = []
    for course in found:
        drift = drifts(course, records)
        for k, update in enumerate(course.updates[1:]):
            texts = [_change(moved[measure][course.label][k], measure) for measure in analysis.measures]
            rows.append([Cell(course.label), Cell(float(update)), *map(Cell, texts), Cell(_known(float(drift[k + 1])))])
    note = """\
Paired changes against the base model, on the milestones' prompts, with 95 % intervals. *drift*: how far the network's
output has moved from the base model's, |v - v_base|^2 / |v_base|^2, in training."""
    return ["### Milestone by milestone", Table(columns, rows), note]


def _change(estimate: MeanEstimate, measure: Measure) -> str:
    return interval(*estimate[:3], DECIMALS.get(measure.unit, 3), signed=True)


def _parting_section(found: Sequence[LearningCurve]) -> list[Section]:
    parted = divergences(found)
    if not parted:
        return []
    measures = list(next(iter(parted.values())))
    columns = [Column("method"), *(Column(measure.name, role=measure.role) for measure in measures)]
    rows = []
    for label, mine in parted.items():
        cells = [Cell(_parted(mine[measure]), bold=mine[measure].update is not None) for measure in measures]
        rows.append([Cell(label), *cells])
    return ["### Where reward and quality part", Table(columns, rows), DIVERGENCE]


def _parted(found: Divergence) -> str:
    """Return ``update 50 [40, 60; 98 %]``, ``no [50, never; 12 %]``, or ``no [unknown]`` without a known spread."""
    where = "no" if found.update is None else f"update {_short(found.update)}"
    if np.isnan(found.share):
        return f"{where} [unknown]"
    lo, hi = ("never" if np.isinf(limit) else _short(limit) for limit in (found.lo, found.hi))
    return f"{where} [{lo if lo == hi else f'{lo}, {hi}'}; {found.share:.0%}]"


def _profile_section(analysis: Analysis) -> list[Section]:
    scores = normalised(analysis)
    if not scores:
        return []
    columns = [Column("method"), *(Column(f"above {tau:g}", decimals=2) for tau in PROFILE)]
    rows = []
    for label in analysis.trained:
        mine = [found[label] for found in scores.values() if len(found[label])]
        if mine:
            share, lo, hi = profile(mine, np.array(PROFILE))
            bands = zip(*(map(_known, map(float, each)) for each in (share, lo, hi)))
            rows.append([Cell(label), *(Cell(*band) for band in bands)])
    note = f"""\
Share of runs (measure x training seed) whose score at the end exceeds a threshold: 0 is the base model, 1 the best mean
of that measure. Measures: {", ".join(escape(measure.name) for measure in scores)}. Pointwise 95 % bands: seeds drawn
again within each measure (Agarwal et al. 2021)."""
    return ["### Performance profile", Table(columns, rows), note]


def _unreached(results: Results) -> list[Section]:
    """Milestones that lie beyond a training's end."""
    store, lines = Store(results.store), []
    for run in results.manifest.runs:
        beyond = [part.update for part in run.milestones if not reached(store, run.id, part.update)]
        if beyond:
            named = ", ".join(map(str, beyond))
            lines.append(f"- {escape(run.title)}: training ended before update {named}")
    return ["Milestones that are not there:", "\n".join(lines)] if lines else []


def _published_section(
    curve: Reference, manifest: Manifest, found: Sequence[LearningCurve], records: pd.DataFrame
) -> list[Section]:
    """Every point of a published curve with ours at the very same update."""
    source, rows, reasons = curve.source, [], []
    for method in dict.fromkeys(point.method for point in curve.points):
        known = curve.labels(method)
        for label in [label for label in manifest.rows if label in known] or [""]:
            points = [point for point in curve.points if point.method == method]
            rows += [_beside(point, source.metrics[point.metric], label, found, records) for point in points]
            runs = manifest.rows.get(label)
            if runs and (why := departures(curve.protocol(method), manifest, runs[0])):
                reasons.append(f"- {escape(label)}, protocol differs: {escape('; '.join(why))}")
    columns = [Column("published row"), Column("our row"), Column("metric"), Column("update", decimals=0)]
    columns += [Column("ours", decimals=4), Column("published", decimals=4)]
    note = "The published values were read off a picture, and no verdict is drawn from them."
    heading = f"### {escape(source.citation)}, {escape(source.place)}"
    return [heading, escape(source.url), escape(source.note), Table(columns, rows), note, "\n".join(reasons)]


def _beside(
    point: Point, printed: Printed, label: str, found: Sequence[LearningCurve], records: pd.DataFrame
) -> list[Cell]:
    """``reward_mean`` is the training reward, within 5 % of the update; any other metric that of a milestone."""
    ours = Cell("not run")
    mine = records[records["label"] == label]
    if printed.metric == "reward_mean" and mine["update"].max() >= point.update:
        seeds = [reward_at(run, "update", point.update) for _, run in mine.groupby("seed")]
        ours = Cell(_known(float(np.nanmean(seeds)) * printed.scale))
    for course in found:
        steps = np.flatnonzero(course.updates == point.update)
        measure = next((measure for measure in course.values if measure.name == printed.metric), None)
        if course.label == label and measure is not None and len(steps):
            mean = stats.mean_interval(course.values[measure][steps[0]], course.strata(measure))
            ours = Cell(mean.mean * printed.scale, mean.lo * printed.scale, mean.hi * printed.scale)
    about: list[float | str | None] = [point.method, label or "not run", point.metric, point.update]
    return [*map(Cell, about), ours, Cell(point.value)]

"""Figures about the final scores: paired changes, quality against cost, swept hyperparameters, profiles."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from alignbench.reporting.analysis import learning_curves
from alignbench.reporting.plots.labels import name_points
from alignbench.reporting.plots.style import (
    GROUND,
    INK,
    PANEL,
    Figure,
    colour,
    draw_legend,
    finish,
    label_rows,
    legend_height,
    make_panels,
    mark_values,
    measure_title,
    method_style,
    new_canvas,
    primary_first,
    set_scale,
    shorten_ticks,
)
from alignbench.reporting.tables import spending
from alignbench.reporting.text.names import measure_name
from alignbench.reporting.text.table import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alignbench.reporting.analysis.comparison import Analysis, Measure
    from alignbench.reporting.analysis.stats import MeanEstimate
    from alignbench.reporting.analysis.swept import Line, Swept


def _whisker(axes: Axes, mean: float, lo: float, hi: float, y: float, shade: str) -> None:
    """Draw the interval, if it is known."""
    if np.isfinite(lo) and np.isfinite(hi):
        axes.plot([lo, hi], [y, y], color=shade, linewidth=0.9, solid_capstyle="butt", zorder=1.5)


def draw_forest(analysis: Analysis, labels: Sequence[str], stamp: str) -> Figure | None:
    """Draw paired changes of ``labels`` against base, a panel per measure, the primary one first; None without any."""
    measures = [
        m for m in primary_first(analysis) if any(np.isfinite(c.estimate.mean) for c in analysis.changes[m].values())
    ]
    if not measures or analysis.base is None:
        return None
    rows = -(-len(measures) // 2)
    with new_canvas(rows * (0.38 + 0.15 * len(labels)) + 0.1, stamp) as canvas:
        for axes, measure in zip(make_panels(canvas, len(measures), sharey=True), measures):
            for y, label in enumerate(labels):
                _forest_row(axes, analysis, measure, label, y)
            axes.axvline(0, color=INK, linewidth=0.6, zorder=0)
            axes.set_title(measure_title(measure, PANEL))
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
            shorten_ticks(axes.xaxis)
        caption = (
            f"Paired change of every score against {analysis.base} (line at 0), with 95 % intervals. {FOREST_MARKS} "
            f"{_decided(analysis, measures, labels)}"
        )
        return finish(canvas, "forest", f"Paired change against {analysis.base}", caption)


FOREST_MARKS = (
    "Filled: p < 0.05 after Holm's correction; open: cannot tell. Small dots: single training seeds, over the prompts "
    "that all seeds have."
)


def _decided(analysis: Analysis, measures: Sequence[Measure], labels: Sequence[str]) -> str:
    """Return how many rows went up and down on each measure."""
    told = []
    of = " (these weights)" if all(map(analysis.of_weights, labels)) else ""
    for measure in measures:
        verdicts = [analysis.changes[measure][label].verdict for label in labels]
        counts = [f"{verdicts.count(way)} {way}" for way in ("up", "down") if way in verdicts]
        own = " (these weights)" * (not of and all(analysis.of_weights(label, measure=measure) for label in labels))
        told += [f"{measure_name(measure)} {' and '.join(counts)}{own}"] if counts else []
    return f"Of {len(labels)}{of}: {'; '.join(told)}." if told else f"No change is significant{of}."


def _forest_row(axes: Axes, analysis: Analysis, measure: Measure, label: str, y: float) -> None:
    """Draw a row's change with its interval, and below it a dot for each training seed, if there are several."""
    change, shade = analysis.changes[measure][label], colour(label, analysis.labels)
    if not np.isfinite(change.estimate.mean):
        return
    _whisker(axes, *change.estimate[:3], y - 0.08, shade)
    sure = change.verdict in ("up", "down")
    face = {} if sure else {"markerfacecolor": GROUND, "markeredgecolor": shade, "markeredgewidth": 0.8}
    axes.plot(
        [change.estimate.mean], [y - 0.08], **method_style(label, analysis, linestyle="none", markersize=4.2, **face)
    )
    seeds = analysis.seed_changes(measure, label)
    if len(seeds) > 1:
        dots = [*seeds.values()]
        axes.plot(dots, [y + 0.3] * len(dots), ".", color=shade, markersize=2.8, markeredgewidth=0, alpha=0.8)


def draw_tradeoff(analysis: Analysis, costs: pd.DataFrame, stamp: str) -> Figure | None:
    """Draw the paired change on the primary measure against the cost of training; None for fewer than two rows."""
    measure = analysis.primary
    if measure is None or analysis.base is None:
        return None
    changes = {label: change.estimate for label, change in analysis.changes[measure].items()}
    known = [label for label, change in changes.items() if np.isfinite(change.mean)]
    spent = {name: {k: cost for k, cost in by.items() if k in known} for name, by in _spent(costs).items()}
    panels = {name: by_label for name, by_label in spent.items() if len(set(by_label.values())) > 1}
    if not panels:
        return None
    sign = -1.0 if measure.higher_is_better is False else 1.0
    with new_canvas(2.1 * len(panels), stamp) as canvas:
        drawn, fronts = make_panels(canvas, len(panels), columns=1), []
        for axes, (name, by_label) in zip(drawn, panels.items()):
            fronts.append(_front(by_label, {label: sign * changes[label].mean for label in by_label}))
            for label, cost in by_label.items():
                draw_bar(axes, changes[label], cost, colour(label, analysis.labels))
                look = method_style(label, analysis, linestyle="none", markersize=4.5)
                axes.plot([cost], [changes[label].mean], **look)
            axes.axhline(0, color=INK, linewidth=0.6, zorder=0)
            stairs = np.array(_steps([(by_label[label], changes[label].mean) for label in fronts[-1]]))
            axes.plot(stairs[:, [0, 2]].T, stairs[:, [1, 3]].T, color=INK, linewidth=0.6, alpha=0.5, zorder=1)
            axes.margins(x=0.12, y=0.12)
            set_scale(axes, [*by_label.values()])
            axes.set_xlabel(name)
            shorten_ticks(axes.yaxis)
        label_rows(drawn, f"change, {measure_title(measure)}")
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")
        for axes, by_label, front in zip(drawn, panels.values(), fronts):
            points = [(cost, changes[label].mean, label) for label, cost in by_label.items()]
            bars = [(cost, changes[label].lo, cost, changes[label].hi) for label, cost in by_label.items()]
            steps = _steps([(by_label[label], changes[label].mean) for label in front])
            zero = (axes.get_xlim()[0], 0.0, axes.get_xlim()[1], 0.0)
            name_points(canvas, axes, points, [*(bar for bar in bars if np.isfinite(bar).all()), *steps, zero])
        best = "; ".join(f"{name}: {listed(front)}" for name, front in zip(panels, fronts))
        caption = (
            f"Paired change in {measure_name(measure)} [{measure.role}] over {analysis.base} (line at 0), with 95 % "
            "intervals, against the cost of training, a mean over finished training runs. Steps: rows whose mean no "
            f"row of equal or lower cost reaches ({best}). Means alone decide that, so chance has a part in it."
        )
        return finish(canvas, "tradeoff", "Quality against cost", caption)


def _spent(costs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return name of a cost -> label -> mean over finished training runs; times only if all are of equal devices."""
    spent = spending(costs)
    time = "GPU-seconds" if spent.kind == "GPU" else f"{spent.kind} time, s"
    totals = {
        "network evaluations (NFE)": {k: mean["nfe_forward"] + mean["nfe_grad"] for k, mean in spent.means.items()},
        time: {k: mean["time"] for k, mean in spent.means.items() if len(spent.devices) == 1},
    }
    return {name: {k: total for k, total in by_label.items() if total > 0} for name, by_label in totals.items()}


def _front(spent: dict[str, float], means: dict[str, float]) -> list[str]:
    """Return the rows, from cheap to dear, whose mean no row of equal or lower cost reaches; larger is better."""
    front: list[str] = []
    for label in sorted(spent, key=lambda label: (spent[label], -means[label])):
        if not front or means[label] > means[front[-1]]:
            front.append(label)
    return front


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, ...]]:
    """Return the lines (x, y, x, y) of a staircase through the points: level, then upright."""
    lines: list[tuple[float, ...]] = [(*points[0], *points[0])]
    for (x, y), (u, v) in itertools.pairwise(points):
        lines += [(x, y, u, y), (u, y, u, v)]
    return lines


def draw_bar(axes: Axes, found: MeanEstimate, x: float, shade: str, **more: Any) -> None:
    """Draw a vertical interval, if it is known."""
    if np.isfinite(found.lo) and np.isfinite(found.hi):
        axes.plot([x, x], [found.lo, found.hi], color=shade, linewidth=0.9, solid_capstyle="butt", zorder=1.5, **more)


def draw_swept(axis: Swept, analysis: Analysis, stamp: str) -> Figure | None:
    """Draw every score against a hyperparameter, the primary measure first; None without any score."""
    estimates = {measure: _changes_or_means(analysis, measure) for measure in primary_first(analysis)}
    labels = [label for line in axis.lines for _, label in line.points]
    measures = [m for m, by_label in estimates.items() if any(np.isfinite(by_label[label].mean) for label in labels)]
    if not measures:
        return None
    names = [line.name for line in axis.lines]
    legend = legend_height(names) if len(names) > 1 else 0.0
    with new_canvas(-(-len(measures) // 2) * 1.25 + 0.2 + legend, stamp) as canvas:
        for axes, measure in zip(make_panels(canvas, len(measures), axis.name), measures):
            for i, line in enumerate(axis.lines):
                aside = DODGE * (i - (len(axis.lines) - 1) / 2)
                _swept_line(axes, analysis, measure, line, estimates[measure], aside)
            axes.margins(x=0.12)
            if analysis.base:
                axes.axhline(0, color=INK, linewidth=0.6, zorder=0)
            axes.set_title(measure_title(measure, PANEL))
            mark_values(axes, axis.values)
            shorten_ticks(axes.yaxis)
            axes.autoscale_view()
        what = f"Paired change of every score against {analysis.base} (line at 0)" if analysis.base else "Every score"
        if len(names) > 1:
            draw_legend(canvas, [line.points[0][1] for line in axis.lines], analysis, names=names)
        top = [f"{line.name}: {_best(line, measures[0], estimates[measures[0]])}" for line in axis.lines]
        caption = (
            f"{what} against {axis.path}, with 95 % intervals; small dots: single training seeds. Rows on a line "
            f"differ in nothing else. Best mean of {measure_name(measures[0])}, separable from the others or not: "
            f"{'; '.join(top)}."
        )
        safe = re.sub(r"[^\w.-]", "_", axis.path)
        return finish(canvas, f"swept-{safe}", f"Scores against {axis.name}", caption)


def _changes_or_means(analysis: Analysis, measure: Measure) -> dict[str, MeanEstimate]:
    if analysis.base is None:
        return analysis.means[measure]
    return {label: change.estimate for label, change in analysis.changes[measure].items()}


DODGE = 2.5  # points (1/72 inch) between lines, so that their intervals do not cover each other


def _swept_line(
    axes: Axes, analysis: Analysis, measure: Measure, line: Line, found: dict[str, MeanEstimate], aside: float
) -> None:
    """Draw a line, ``aside`` points to the right, with intervals, and dots for training seeds if there are several."""
    from matplotlib.transforms import ScaledTranslation

    first = line.points[0][1]
    shade = colour(first, analysis.labels)
    moved = [
        axes.transData + ScaledTranslation((aside + more) / 72, 0, axes.figure.dpi_scale_trans)
        for more in (0, 4 if aside == 0 else 1.5)
    ]
    points = [(value, found[label], label) for value, label in line.points if np.isfinite(found[label].mean)]
    means = [each.mean for _, each, _ in points]
    axes.plot([x for x, *_ in points], means, **method_style(first, analysis, transform=moved[0]))
    for x, each, label in points:
        draw_bar(axes, each, x, shade, transform=moved[0])
        seeds = analysis.seed_changes(measure, label) if analysis.base else {}
        heights = [each.mean, each.lo, each.hi, *seeds.values()]  # what is drawn aside does not set the axes by itself
        axes.update_datalim([(x, height) for height in heights if np.isfinite(height)])
        if len(seeds) > 1:
            axes.plot([x] * len(seeds), [*seeds.values()], ".", color=shade, markersize=2.4, transform=moved[1])


def _best(line: Line, measure: Measure, found: dict[str, MeanEstimate]) -> str:
    """Return the number with the best mean, as text; "unknown" without any."""
    sign = -1 if measure.higher_is_better is False else 1
    means = [(sign * found[label].mean, value) for value, label in line.points if np.isfinite(found[label].mean)]
    return f"{max(means)[1]:g}" if means else "unknown"


def draw_profiles(analysis: Analysis, stamp: str) -> Figure | None:
    """Draw performance profiles of the final scores; None without any gain."""
    scores = learning_curves.normalised(analysis)
    if not scores:
        return None
    every = np.concatenate([seeds for by_label in scores.values() for seeds in by_label.values()])
    taus = np.linspace(min(0.0, float(every.min())) - 0.05, max(1.0, float(every.max())) + 0.05, 241)
    labels = [label for label in analysis.trained if any(len(by_label[label]) for by_label in scores.values())]
    with new_canvas(1.75 + legend_height(labels), stamp) as canvas:
        axes = canvas.subplots()
        halves = []
        for label in labels:
            own = [by_label[label] for by_label in scores.values() if len(by_label[label])]
            share, lo, hi = learning_curves.profile(own, taus)
            shade = colour(label, analysis.labels)
            if np.isfinite(lo).all():
                axes.fill_between(taus, lo, hi, color=shade, alpha=0.12, linewidth=0, step=None)
            axes.plot(taus, share, **method_style(label, analysis, markevery=40))
            halves.append(f"{label} {share[int(np.abs(taus - 0.5).argmin())]:.0%}")
        axes.set_xlabel(f"normalised score \u03c4 (0: {analysis.base}, 1: best mean)")
        axes.set_ylabel("share of runs above \u03c4")
        axes.set_ylim(-0.03, 1.03)
        draw_legend(canvas, labels, analysis)
        names = listed([measure_name(measure) for measure in scores])
        several = max(analysis.scored_seeds.values(), default=0) > 1
        bands = ", with pointwise 95 % bands" if several else "; with one training run each, a share of measures only"
        caption = (
            f"Performance profiles at the end of training: the share of runs (measure x training seed; {names})"
            f" whose normalised score exceeds a threshold{bands}. "
            f"Above one half: {', '.join(halves)}."
        )
        return finish(canvas, "profiles", "Performance profiles", caption)

"""Figures about the final scores: an overview, a forest plot of paired changes, performance profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alignbench.reporting.analysis import learning_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alignbench.reporting.analysis.comparison import Analysis
from alignbench.reporting.plots.style import (
    GRID,
    GROUND,
    INK,
    Figure,
    colour,
    draw_legend,
    finish,
    legend_height,
    listed,
    make_panels,
    measure_title,
    method_style,
    new_canvas,
    shorten_ticks,
)


def draw_overview(analysis: Analysis, stamp: str) -> Figure | None:
    """In place of the papers' radar charts (LeapAlign's figure 1b), whose areas depend on the order of their axes."""
    rows = []
    for measure in learning_curves.directed(analysis):
        sign = 1.0 if measure.higher_is_better else -1.0
        changes = {label: change.estimate for label, change in analysis.changes[measure].items()}
        best = max((sign * each.mean for each in changes.values() if np.isfinite(each.mean)), default=0.0)
        if best > 0:
            scaled = {label: sign * np.array(each[:3]) / best for label, each in changes.items()}
            rows.append((measure, scaled))
    if not rows:
        return None
    labels = [label for label in analysis.compared if any(np.isfinite(scaled[label][0]) for _, scaled in rows)]
    height = 0.5 + len(rows) * (0.12 + 0.075 * len(labels)) + legend_height(labels)
    with new_canvas(height, stamp) as canvas:
        axes = canvas.subplots()
        for row, (_, scaled) in enumerate(rows):
            for i, label in enumerate(labels):
                mean, *limits = scaled[label]
                if np.isfinite(mean):
                    y = row + 0.7 * (i / max(len(labels) - 1, 1) - 0.5)
                    look = method_style(label, analysis, linestyle="none", markersize=4.5)
                    _whisker(axes, mean, min(limits), max(limits), y, colour(label, analysis.labels))
                    axes.plot([mean], [y], **look)
        for at, style in ((0, "-"), (1, (0, (2, 2)))):
            axes.axvline(at, color=INK, linewidth=0.6, linestyle=style, zorder=0)
        axes.set_yticks(range(len(rows)), [measure_title(measure) for measure, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.6)
        axes.set_xlabel(f"0: {analysis.base}, 1: best mean")
        draw_legend(canvas, labels, analysis, linestyle="none")
        best_of = [
            f"{measure.name}: {max(labels, key=lambda label: _finite(scaled[label][0]))}" for measure, scaled in rows
        ]
        caption = (
            f"Every score at the end of training, scaled so that {analysis.base} is 0 and the best mean is 1; bars are "
            f"95 % intervals of the paired change. Best means: {'; '.join(best_of)}."
        )
        return finish(canvas, "overview", "All scores at the end", caption)


def _finite(value: float) -> float:
    return value if np.isfinite(value) else -np.inf


def _whisker(axes: Axes, mean: float, lo: float, hi: float, y: float, shade: str) -> None:
    """A 95 % interval, if it is known."""
    if np.isfinite(lo) and np.isfinite(hi):
        axes.plot([lo, hi], [y, y], color=shade, linewidth=0.9, solid_capstyle="butt", zorder=1.5)


def draw_forest(analysis: Analysis, stamp: str) -> Figure | None:
    """Paired changes against base, a panel per measure."""
    measures = [m for m in analysis.measures if any(np.isfinite(c.estimate.mean) for c in analysis.changes[m].values())]
    if not measures or analysis.base is None:
        return None
    labels = analysis.compared
    rows = -(-len(measures) // 2)
    with new_canvas(rows * (0.38 + 0.125 * len(labels)) + 0.1, stamp) as canvas:
        for axes, measure in zip(make_panels(canvas, len(measures), sharey=True), measures):
            for y, label in enumerate(labels):
                change = analysis.changes[measure][label]
                if np.isfinite(change.estimate.mean):
                    shade = colour(label, analysis.labels)
                    _whisker(axes, *change.estimate[:3], y, shade)
                    sure = change.verdict in ("up", "down")
                    face = {} if sure else {"markerfacecolor": GROUND, "markeredgecolor": shade, "markeredgewidth": 0.8}
                    axes.plot(
                        [change.estimate.mean],
                        [y],
                        **method_style(label, analysis, linestyle="none", markersize=4.5, **face),
                    )
            axes.axvline(0, color=INK, linewidth=0.6, zorder=0)
            axes.set_title(measure_title(measure))
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            shorten_ticks(axes.xaxis)
        verdicts = [
            f"{measure.name}: {listed(told)}"
            for measure in measures
            if (
                told := [
                    f"{label} {c.verdict}"
                    for label, c in analysis.changes[measure].items()
                    if c.verdict in ("up", "down")
                ]
            )
        ]
        said = f" Told apart: {'; '.join(verdicts)}." if verdicts else " None of the changes can be told from zero."
        caption = (
            f"Paired change of every score against {analysis.base} (line at 0), with 95 % intervals over prompts and "
            f"training seeds. Filled: p < 0.05 after Holm's correction; open: cannot tell.{said}"
        )
        return finish(canvas, "forest", f"Paired change against {analysis.base}", caption)


def draw_profiles(analysis: Analysis, stamp: str) -> Figure | None:
    scores = learning_curves.normalised(analysis)
    if not scores:
        return None
    every = np.concatenate([each for found in scores.values() for each in found.values()])
    taus = np.linspace(min(0.0, float(every.min())) - 0.05, max(1.0, float(every.max())) + 0.05, 241)
    labels = [label for label in analysis.trained if any(len(found[label]) for found in scores.values())]
    with new_canvas(1.75 + legend_height(labels), stamp) as canvas:
        axes = canvas.subplots()
        halves = []
        for label in labels:
            share, lo, hi = learning_curves.profile(
                [found[label] for found in scores.values() if len(found[label])], taus
            )
            shade = colour(label, analysis.labels)
            if np.isfinite(lo).all():
                axes.fill_between(taus, lo, hi, color=shade, alpha=0.12, linewidth=0, step=None)
            axes.plot(taus, share, **method_style(label, analysis, markevery=40))
            halves.append(f"{label} {share[int(np.abs(taus - 0.5).argmin())]:.0%}")
        axes.set_xlabel(f"normalised score \u03c4 (0: {analysis.base}, 1: best mean)")
        axes.set_ylabel("share of runs above \u03c4")
        axes.set_ylim(-0.03, 1.03)
        draw_legend(canvas, labels, analysis)
        names = listed([measure.name for measure in scores])
        caption = (
            f"Performance profiles at the end of training: the share of runs (measure x training seed; of {names})"
            " whose normalised score exceeds a threshold, with pointwise 95 % bands. "
            f"Above one half: {', '.join(halves)}."
        )
        return finish(canvas, "profiles", "Performance profiles", caption)

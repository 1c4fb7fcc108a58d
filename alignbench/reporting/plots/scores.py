"""Figures about the final scores: an overview, a forest plot of paired changes, performance profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alignbench.reporting.analysis import learning_curves
from alignbench.reporting.findings import levels
from alignbench.reporting.plots.style import (
    GRID,
    GROUND,
    INK,
    Figure,
    colour,
    draw_legend,
    finish,
    finite,
    legend_height,
    make_panels,
    measure_title,
    method_style,
    new_canvas,
    shorten_ticks,
)
from alignbench.reporting.text.table import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alignbench.reporting.analysis.comparison import Analysis


def draw_overview(analysis: Analysis, stamp: str) -> Figure | None:
    """Draw all final scores on one scale; None without any gain.

    Replaces the papers' radar charts (LeapAlign's figure 1b), whose areas depend on the order of their axes.
    """
    rows = []
    for measure in learning_curves.directed(analysis):
        sign = 1.0 if measure.higher_is_better else -1.0
        changes = {label: change.estimate for label, change in analysis.changes[measure].items()}
        best = max((sign * change.mean for change in changes.values() if np.isfinite(change.mean)), default=0.0)
        if best > 0:
            scaled = {label: sign * np.array(change[:3]) / best for label, change in changes.items()}
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
            f"{measure.name}: {max(labels, key=lambda label: finite(scaled[label][0]))}" for measure, scaled in rows
        ]
        caption = (
            f"Final scores, scaled so that {analysis.base} is 0 and the best mean is 1; bars are "
            f"95 % intervals of the paired change. Best means: {'; '.join(best_of)}."
        )
        return finish(canvas, "overview", "All final scores", caption)


def _whisker(axes: Axes, mean: float, lo: float, hi: float, y: float, shade: str) -> None:
    """Draw the interval, if it is known."""
    if np.isfinite(lo) and np.isfinite(hi):
        axes.plot([lo, hi], [y, y], color=shade, linewidth=0.9, solid_capstyle="butt", zorder=1.5)


def draw_forest(analysis: Analysis, stamp: str) -> Figure | None:
    """Draw paired changes against base, one panel per measure; None without any."""
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
            f"{measure.name}: {listed(significant)}"
            for measure in measures
            if (
                significant := [
                    f"{label} {c.said}" for label, c in analysis.changes[measure].items() if c.verdict in ("up", "down")
                ]
            )
        ]
        summary = f" Significant: {'; '.join(verdicts)}." if verdicts else " No change is significant."
        caption = (
            f"Paired change of every score against {analysis.base} (line at 0), with 95 % intervals over "
            f"{levels(analysis)}. Filled: p < 0.05 after Holm's correction; open: cannot tell.{summary}"
        )
        return finish(canvas, "forest", f"Paired change against {analysis.base}", caption)


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
        names = listed([measure.name for measure in scores])
        several = max(analysis.scored_seeds.values(), default=0) > 1
        bands = ", with pointwise 95 % bands" if several else "; with one training run each, a share of measures only"
        caption = (
            f"Performance profiles at the end of training: the share of runs (measure x training seed; {names})"
            f" whose normalised score exceeds a threshold{bands}. "
            f"Above one half: {', '.join(halves)}."
        )
        return finish(canvas, "profiles", "Performance profiles", caption)

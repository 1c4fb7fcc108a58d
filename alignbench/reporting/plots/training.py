"""Figures about the course of training: rewards, scores against cost, reward hacking and drift."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from alignbench.reporting.analysis import learning_curves
from alignbench.reporting.analysis.learning_curves import AXES, Divergence, LearningCurve
from alignbench.reporting.analysis.stats import curve_draws
from alignbench.reporting.plots.labels import lines_height, many, name_lines
from alignbench.reporting.plots.style import (
    INK,
    LINES,
    MARKERS,
    PANEL,
    Figure,
    colour,
    finish,
    finite,
    label_rows,
    make_panels,
    measure_title,
    method_style,
    new_canvas,
    shorten_ticks,
)
from alignbench.reporting.tables import harmed
from alignbench.reporting.text.names import decimals, measure_name
from alignbench.reporting.text.table import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alignbench.reporting.analysis.comparison import Analysis, Measure


def draw_training(records: pd.DataFrame, analysis: Analysis, stamp: str) -> Figure | None:
    """Draw the training reward against four costs: means over seeds, smoothed over a tenth of training."""
    known = set(records["label"].unique())
    labels = [label for label in analysis.trained if label in known]
    if not labels or "reward_mean" not in records:
        return None
    with new_canvas(lines_height(len(AXES), labels, 1.28), stamp) as canvas:
        panels = make_panels(canvas, len(AXES), columns=1 if many(labels) else 2, sharey=True)
        for axes, (axis, name) in zip(panels, AXES.items()):
            for label in labels:
                costs, rewards = _smoothed(records[records["label"] == label], axis)
                axes.plot(costs, rewards, **method_style(label, analysis, markevery=max(1, len(costs) // 5)))
            axes.set_xlabel(name)
            axes.set_xlim(left=0)
            shorten_ticks(axes.xaxis)
            shorten_ticks(axes.yaxis)
        label_rows(panels, "training reward")
        name_lines(canvas, panels, labels, analysis)
        ends = [f"{label} {_last(records[records['label'] == label]):.4g}" for label in labels]
        caption = (
            "Training reward on the images that each method generated during training, against updates, images, "
            "network evaluations (NFE) and device-seconds; means over seeds and a tenth of training. "
            f"Last tenth: {', '.join(ends)}."
        )
        return finish(canvas, "training", "Training reward against cost", caption)


def _smoothed(records: pd.DataFrame, axis: str) -> tuple[Any, Any]:
    """Return mean cost and mean reward over seeds, by update; rewards as a centred mean over a tenth of the updates."""
    means = records.groupby("update", sort=True).agg(cost=(axis, "mean"), reward=("reward_mean", "mean"))
    window = max(1, len(means) // 10)
    return means["cost"].to_numpy(), means["reward"].rolling(window, center=True, min_periods=1).mean().to_numpy()


def _last(records: pd.DataFrame) -> float:
    return float(records.loc[records["update"] > 0.9 * records["update"].max(), "reward_mean"].mean())


def draw_costs(curves: Sequence[LearningCurve], measure: Measure, analysis: Analysis, stamp: str) -> Figure | None:
    """Draw one score against four costs, starting from the base model."""
    if not curves:
        return None
    labels = [curve.label for curve in curves]
    means = {curve.label: _interval(curve, measure) for curve in curves}
    start = means[labels[-1]][0][0]  # base's mean
    with new_canvas(lines_height(len(AXES), labels, 1.28), stamp) as canvas:
        panels = make_panels(canvas, len(AXES), columns=1 if many(labels) else 2, sharey=True)
        for axes, (axis, name) in zip(panels, AXES.items()):
            for curve in curves:
                mean, lo, hi = means[curve.label]
                shade = colour(curve.label, analysis.labels)
                axes.fill_between(curve.cost(axis), lo, hi, color=shade, alpha=0.12, linewidth=0)
                axes.plot(curve.cost(axis), mean, **method_style(curve.label, analysis))
            axes.axhline(start, color=INK, linewidth=0.5, zorder=0)
            axes.set_xlabel(name)
            axes.set_xlim(left=0)
            shorten_ticks(axes.xaxis)
            shorten_ticks(axes.yaxis)
        label_rows(panels, measure_title(measure))
        name_lines(canvas, panels, labels, analysis)
        digits = decimals(measure)
        ends = [f"{label} {mean[-1]:.{digits}f}" for label, (mean, _, _) in means.items()]
        caption = (
            f"{measure_name(measure)} [{measure.role}] at every milestone, against updates, images, network "
            f"evaluations (NFE) and device-seconds, with 95 % intervals of the paired change against {analysis.base} "
            f"(line at {start:.{digits}f}). At the end: {', '.join(ends)}."
        )
        safe = re.sub(r"[^\w.-]", "_", measure.name)
        return finish(canvas, f"cost-{safe}", f"{measure_name(measure)} against cost", caption)


def _interval(curve: LearningCurve, measure: Measure) -> tuple[Any, Any, Any]:
    """Return (K,) means, and the limits of base's mean plus the paired change."""
    sign = -1.0 if measure.higher_is_better is False else 1.0
    gains, draws = curve.gains(measure)
    start = _base(curve, measure)
    lo, hi = np.quantile(sign * draws, [0.025, 0.975], axis=0) if np.isfinite(gains).all() else (np.nan * gains,) * 2
    return start + sign * gains, start + lo, start + hi


def _base(curve: LearningCurve, measure: Measure) -> float:
    return float(curve_draws(curve.values[measure], curve.strata(measure), draws=2)[0][0])


def draw_hacking(curves: Sequence[LearningCurve], analysis: Analysis, stamp: str) -> Figure | None:
    """Draw the scaled gain of every score, one panel per method, and mark where it diverges from the reward."""
    by_label = learning_curves.divergences(curves) if curves else {}
    if not by_label:
        return None
    measures = learning_curves.directed(analysis)
    scale = {m: max(float(np.nanmax(np.abs(c.gains(m)[0]))) for c in curves) or 1.0 for m in measures}
    styles = dict(zip([m for m in measures if m.role != "train"], cycle(zip(LINES[1:], MARKERS))))
    from matplotlib.lines import Line2D

    with new_canvas(-(-len(curves) // 2) * 1.15 + 0.25 + 0.12 * -(-(len(measures) + 1) // 2), stamp) as canvas:
        panels = make_panels(canvas, len(curves), "updates", sharex=True, sharey=True)
        for axes, curve in zip(panels, curves):
            shade = colour(curve.label, analysis.labels)
            for measure in measures:
                gains = curve.gains(measure)[0] / scale[measure]
                style, mark = styles.get(measure, ("-", ""))
                width = 1.8 if measure.role == "train" else 0.9
                axes.plot(
                    curve.updates, gains, color=shade, linestyle=style, marker=mark, linewidth=width, markersize=2.5
                )
                _mark_divergence(axes, curve, by_label[curve.label].get(measure), gains)
            axes.axhline(0, color=INK, linewidth=0.5, zorder=0)
            axes.set_title(curve.label, color=INK)
            shorten_ticks(axes.xaxis)
        label_rows(panels, "scaled gain")
        handles = [
            Line2D([], [], color=INK, linestyle=styles.get(m, ("-", ""))[0], marker=styles.get(m, ("-", ""))[1],
                   linewidth=1.8 if m.role == "train" else 0.9, markersize=2.5, label=f"{measure_name(m)} [{m.role}]")
            for m in measures
        ]  # fmt: skip
        handles.append(Line2D([], [], **RING, label="diverges from the reward"))
        canvas.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, handlelength=3)
        diverged = [
            f"{label}: {measure_name(measure)} from update {divergence.update:g}"
            for label, by_measure in by_label.items()
            for measure, divergence in by_measure.items()
            if divergence.update is not None
        ]
        summary = f"Diverging: {'; '.join(diverged)}." if diverged else "No score is shown to diverge from the reward."
        lost = {label: [measure_name(m) for m in harmed(analysis, label)] for label in by_label}
        worse = [f"{label}: {listed(names)}" for label, names in lost.items() if names]
        summary += f" Worse than {analysis.base} at the end: {'; '.join(worse)}." if worse else ""
        caption = (
            f"Gain of every score over {analysis.base} at each milestone, one panel per method, as a share of the "
            "largest of any method. Thick: the training reward; circles: the first step at which a score is "
            f"significantly below its own earlier maximum while the reward still rises. {summary}"
        )
        return finish(canvas, "hacking", "Where reward and quality diverge", caption)


RING: Any = {"marker": "o", "markersize": 6, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}


def _mark_divergence(axes: Axes, curve: LearningCurve, divergence: Divergence | None, gains: Any) -> None:
    if divergence is not None and divergence.update is not None:
        k = int(np.flatnonzero(curve.updates == divergence.update)[0])
        axes.plot([divergence.update], [gains[k]], **RING)


def draw_signs(curves: Sequence[LearningCurve], analysis: Analysis, records: pd.DataFrame, stamp: str) -> Figure | None:
    """Draw what is neither good nor bad in itself: distance from the base model, image statistics, drift."""
    neutral = [measure for measure in analysis.measures if measure.higher_is_better is None]
    if not curves:
        return None
    labels = [curve.label for curve in curves]
    panels: list[tuple[str, Callable[[LearningCurve], tuple[Any, Any, Any]]]] = [
        (measure_name(measure), partial(_interval, measure=measure)) for measure in neutral
    ]
    panels.append(("drift of the network", lambda curve: (learning_curves.drifts(curve, records),) * 3))
    with new_canvas(lines_height(len(panels), labels, 1.2), stamp) as canvas:
        drawn = make_panels(canvas, len(panels), "updates", columns=1 if many(labels) else 2)
        for axes, (title, values) in zip(drawn, panels):
            for curve in curves:
                mean, lo, hi = values(curve)
                shade = colour(curve.label, analysis.labels)
                axes.fill_between(curve.updates, lo, hi, color=shade, alpha=0.12, linewidth=0)
                axes.plot(curve.updates, mean, **method_style(curve.label, analysis))
            axes.set_title(title)
            axes.set_xlim(left=0)
            shorten_ticks(axes.xaxis)
            shorten_ticks(axes.yaxis)
        name_lines(canvas, drawn, labels, analysis)
        names = listed([title for title, _ in panels])
        ends = {curve.label: float(learning_curves.drifts(curve, records)[-1]) for curve in curves}
        moved = f" Largest drift at the end: {max(ends, key=lambda label: finite(ends[label]))}." if ends else ""
        caption = f"Signs of change over training that are neither good nor bad in themselves: {names}.{moved}"
        return finish(canvas, "signs", "Signs of change", caption)


def draw_scatter(curves: Sequence[LearningCurve], analysis: Analysis, stamp: str) -> Figure | None:
    """Draw other scores against the training reward: each method's path from the base model to its end."""
    rewards = [measure for measure in learning_curves.directed(analysis) if measure.role == "train"]
    others = [measure for measure in learning_curves.directed(analysis) if measure.role != "train"]
    if not curves or not rewards or not others:
        return None
    reward, labels = rewards[0], [curve.label for curve in curves]
    with new_canvas(lines_height(len(others), labels, 1.3), stamp) as canvas:
        columns = 1 if many(labels) else 2
        panels = make_panels(canvas, len(others), measure_title(reward), columns, sharex=True)
        for axes, measure in zip(panels, others):
            for curve in curves:
                across, up = (_interval(curve, axis)[0] for axis in (reward, measure))
                axes.plot(across, up, **method_style(curve.label, analysis, marker="", linewidth=0.8))
                axes.plot(
                    across[1:-1], up[1:-1], **method_style(curve.label, analysis, linestyle="none", markersize=1.8)
                )
                axes.plot(across[-1:], up[-1:], **method_style(curve.label, analysis, linestyle="none", markersize=5))
            axes.plot(across[:1], up[:1], marker="*", markersize=6, color=INK, linestyle="none", zorder=3)
            axes.set_title(measure_title(measure, PANEL))
            shorten_ticks(axes.xaxis)
            shorten_ticks(axes.yaxis)
        name_lines(canvas, panels, labels, analysis)
        caption = (
            f"Other scores against the training reward {measure_name(reward)}, on the same evaluation images: from "
            f"{analysis.base} (star) through the milestones (small) to the end (large). A path that turns down while "
            "moving right trades quality for reward."
        )
        return finish(canvas, "scatter", "Other scores against the training reward", caption)

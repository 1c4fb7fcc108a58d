"""Names in plots: beside points or at the ends of lines, placed so that they do not cover each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignbench.reporting.plots.style import COLOURS, INK, draw_legend, legend_height, method_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

    from alignbench.reporting.analysis.comparison import Analysis

RINGS = (4.5, 9.0, 15.0, 22.0, 30.0, 40.0, 52.0)  # distances of a name from its point, in points (1/72 inch)
ANGLES = np.deg2rad([20, -20, 160, -160, 50, -50, 130, -130, 90, -90])  # the sides first
SIZE = 5.5
LINKED = 8.0  # beyond this distance, a line leads from the name to its point
NAME, POINT, LINE = 10.0, 6.0, 2.0  # what it costs to cover one pixel of these


def name_points(
    canvas: Canvas, axes: Axes, points: Sequence[tuple[float, float, str]], lines: Sequence[tuple[float, ...]]
) -> None:
    """Write the name of each point (x, y, name) where it covers the least, from the top of the plot down.

    ``lines``: upright or level lines (x, y, x, y) that names avoid if they can. The layout must be final.
    """
    scale = canvas.dpi / 72
    frame = np.array(axes.get_window_extent().extents)
    to_pixels, back = axes.transData, axes.transData.inverted()
    at = [np.array(to_pixels.transform((x, y))) for x, y, _ in points]
    taken = [(POINT, _box(place, np.full(2, 3 * scale))) for place in at]
    for line in lines:
        ends = np.array(to_pixels.transform(np.array(line).reshape(2, 2)))
        taken.append((LINE, _box(ends.mean(0), np.ptp(ends, axis=0) / 2 + scale / 2)))
    for place, (x, y, name) in sorted(zip(at, points), key=lambda pair: (-pair[0][1], pair[0][0])):
        text = axes.text(x, y, name, fontsize=SIZE, color=INK, ha="center", va="center", zorder=4)
        half = np.array(text.get_window_extent().size) / 2
        best, least = (place, 0.0), np.inf
        for ring, angle in itertools.product(RINGS, ANGLES.tolist()):
            step = np.array([np.cos(angle), np.sin(angle)])
            centre = place + step * ring * scale + np.sign(np.round(step, 9)) * half * np.abs(step) ** 0.5
            box = _box(centre, half)
            if (box[:2] < frame[:2]).any() or (box[2:] > frame[2:]).any():
                continue
            cost = sum(weight * _overlap(box, other) for weight, other in taken) + (ring * scale) ** 2 / 20
            if cost < least:
                best, least = (centre, ring), cost
        across, up = back.transform(best[0]).tolist()
        text.set_position((across, up))
        taken.append((NAME, _box(best[0], half)))
        if best[1] > LINKED:
            ends = np.array(back.transform(np.array([place, np.clip(place, *taken[-1][1].reshape(2, 2))])))
            axes.plot(*ends.T, color=INK, linewidth=0.35, alpha=0.6, zorder=1.2, scalex=False, scaley=False)


def many(labels: Sequence[str]) -> bool:
    """Return whether there are more methods than colours, so that a legend would have to be matched by shape."""
    return len(labels) > len(COLOURS)


def lines_height(count: int, labels: Sequence[str], panel: float) -> float:
    """Return the height of a figure of ``count`` panels of lines, ``panel`` inches each, with their names."""
    if many(labels):
        return count * (0.35 + 1.35 * SIZE / 72 * len(labels))
    return -(-count // 2) * panel + 0.2 + legend_height(labels)


def name_lines(canvas: Canvas, panels: Sequence[Axes], labels: Sequence[str], analysis: Analysis) -> None:
    """Name the methods' lines: in a legend below the figure, or if there are many, at their ends right of each panel.

    A line is found by its label; of several, the last one drawn has the end.
    """
    if not many(labels):
        draw_legend(canvas, labels, analysis)
        return
    place: dict[str, Any] = {"va": "center", "fontsize": SIZE, "color": INK}
    texts = [{k: axes.text(1.08, 0.5, k, transform=axes.transAxes, **place) for k in labels} for axes in panels]
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    for axes, names in zip(panels, texts):
        gap = 1.2 * SIZE * canvas.dpi / 72 / axes.get_window_extent().height
        ends = {label: _end(axes, label) for label in labels}
        heights = _spread({label: end[1] for label, end in ends.items() if end is not None}, gap)
        for label, name in names.items():
            name.set_visible(label in heights)
        for label, height in heights.items():
            names[label].set_y(height)
            look = method_style(label, analysis, linestyle="-", linewidth=0.3, markevery=[2])
            across, up = ends[label] or (0.0, 0.0)
            axes.plot([across, 1.03, 1.055], [up, height, height], transform=axes.transAxes, clip_on=False, **look)


def _end(axes: Axes, label: str) -> tuple[float, float] | None:
    """Return the last known point of the label's line, as shares of the panel; None without any."""
    for line in reversed(axes.lines):
        points = np.array(line.get_xydata(), float) if line.get_label() == label else np.empty((0, 2))
        points = points[np.isfinite(points).all(1)]
        if len(points):
            across, up = axes.transAxes.inverted().transform(axes.transData.transform(points[-1])).tolist()
            return across, up
    return None


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Return the heights in the same order, at least ``gap`` apart, and none above 1 as long as there is room."""
    order = sorted(heights, key=lambda label: heights[label])
    spread: list[float] = []
    for label in order:
        spread.append(max(heights[label], spread[-1] + gap) if spread else heights[label])
    for i in range(len(spread) - 1, -1, -1):
        spread[i] = min(spread[i], 1 - (len(spread) - 1 - i) * gap)
    return dict(zip(order, spread))


def _box(centre: NDArray, half: NDArray) -> NDArray:
    return np.concatenate([centre - half, centre + half])


def _overlap(a: NDArray, b: NDArray) -> float:
    """Return the area that two boxes share."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(width * height) if width > 0 and height > 0 else 0.0

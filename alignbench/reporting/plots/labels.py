"""Names beside the points of a plot, placed so that they cover neither each other nor the points."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from alignbench.reporting.plots.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

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


def _box(centre: NDArray, half: NDArray) -> NDArray:
    return np.concatenate([centre - half, centre + half])


def _overlap(a: NDArray, b: NDArray) -> float:
    """Return the area that two boxes share."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(width * height) if width > 0 and height > 0 else 0.0

"""Exact detector of coloured shapes: it does the work of GenEval's detector and colour classifier without a network.

It analyses by synthesis: each connected component gets the palette colour that best explains its pixels; then every
kind of shape is drawn with the component's area and centroid, and the one that leaves the least unexplained wins.
Blended, smeared or superimposed shapes are explained by none: they are junk. The verdict is evaluators/geneval.py's.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from alignbench.shapes.scene import AREA, BACKGROUND, CENTROID, COLOURS, SHAPES, SIZE, coverage

DETECT = 0.3  # GenEval's threshold: a component with a higher score is an object, any other is junk
JUNK = 0.45  # unexplained area / area at which the score has fallen to DETECT; see _score
SPECK = 3.0  # components of less ink than this (in pixels) are noise, neither object nor junk

_NAMES = tuple(COLOURS)
_INK = np.array([COLOURS[c] for c in _NAMES]) - BACKGROUND  # [6, 3]
_INK_SQ = (_INK**2).sum(1)
_EIGHT = np.ones((3, 3), int)


class Detection(NamedTuple):
    """Connected component: kind, colour, score in [0, 1], box (x0, y0, x1, y1) in pixels, unexplained area / area."""

    label: str
    color: str
    score: float
    box: tuple[float, float, float, float]
    residual: float

    @property
    def junk(self) -> bool:
        """True if no kind of shape explains the component."""
        return self.score <= DETECT


def detect(image: np.ndarray) -> list[Detection]:
    """Return all components of an image, junk included, best first; image: [H, W, 3], uint8 or float in [0, 1]."""
    pixels = image.astype(np.float64) / (255.0 if image.dtype == np.uint8 else 1.0)
    offset = pixels - BACKGROUND
    alpha, error = _unmix(offset)  # [6, H, W] each
    ink = np.abs(offset).max(-1)
    labels, n = ndimage.label(ink > 0.3, _EIGHT)
    components = []
    for index, window in enumerate(ndimage.find_objects(labels, n), start=1):
        window = tuple(slice(max(s.start - 2, 0), s.stop + 2) for s in window)
        own = ~((labels[window] != index) & (labels[window] > 0))  # pixels of other components are left out
        components.append(_explain(alpha[(slice(None), *window)], error[(slice(None), *window)], own, window))
    return sorted((c for c in components if c), key=lambda c: -c.score)


def _unmix(offset: np.ndarray):
    """Return for each palette colour the share of ink that best explains each pixel, and the distance it leaves."""
    dot = np.einsum("hwc,kc->khw", offset, _INK)
    alpha = np.clip(dot / _INK_SQ[:, None, None], 0, 1.1)
    rest = offset[None] - alpha[..., None] * _INK[:, None, None]
    return np.clip(alpha, 0, 1), np.sqrt((rest**2).sum(-1))


def _explain(alpha, error, own, window) -> Detection | None:
    """Choose the colour by the least error over the component, then the kind by the smallest unexplained area."""
    colour = int(np.argmin((error * own).sum((1, 2))))
    a, off = alpha[colour] * own, error[colour] * own
    a = np.where(a > 0.1, a, 0)  # below: noise and the decoder's faint halo
    area = a.sum()
    if area < SPECK:
        return None
    ys = np.arange(window[0].start, window[0].start + a.shape[0]) + 0.5
    xs = np.arange(window[1].start, window[1].start + a.shape[1]) + 0.5
    cx, cy = (a.sum(0) * xs).sum() / area, (a.sum(1) * ys).sum() / area
    stain = np.maximum(off - 0.15, 0).sum() / area  # ink of a colour outside the palette
    best = min((_fit(kind, a, area, xs, ys, cx, cy) for kind in SHAPES), key=lambda f: f[0])
    residual = best[0] + stain
    return Detection(best[1], _NAMES[colour], _score(residual), best[2], residual)


def _fit(kind, a, area, xs, ys, cx, cy):
    """Draw one kind with this area and centroid; return (unexplained area / area, kind, box)."""
    radius = float(np.clip(np.sqrt(area / AREA[kind]), 2.8, 4.3))
    y = cy - CENTROID[kind] * radius
    drawn = coverage(kind, radius, xs[None, :] - cx, ys[:, None] - y)
    half = 0.85 * radius if kind == "square" else radius
    return float(np.abs(a - drawn).sum() / area), kind, (cx - half, y - half, cx + half, y + half)


def _score(residual: float) -> float:
    """Return 1 for a perfect shape, 0.9 at 38 % of JUNK, DETECT at JUNK; quadratic, to forgive a little noise."""
    return float(max(0.0, 1 - (1 - DETECT) * (residual / JUNK) ** 2))


assert SIZE == 32  # the radius limits in _fit are in pixels of this size

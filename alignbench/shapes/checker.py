"""An exact checker of shape pictures: what GenEval's detector and colour classifier do, without a network.

Analysis by synthesis: each connected component gets the palette colour that explains its pixels, then every kind of
shape is drawn with the component's own area and centroid, and the kind that leaves the least unexplained is the
answer. No component explains well what is blended, smeared or superimposed: that is junk, and it counts.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from alignbench.shapes.scene import AREA, BACKGROUND, CENTROID, COLOURS, SHAPES, SIZE, coverage

DETECT = 0.3  # GenEval's score thresholds: an object counts above .3, and above .9 where objects are counted
COUNT = 0.9
JUNK = 0.45  # unexplained area / area at which the score has fallen to DETECT; see _score
SPECK = 3.0  # components of less ink than this (in pixels) are noise, neither object nor junk
MARGIN, CLEAR = 0.1, 0.5  # GenEval's position rule

_NAMES = tuple(COLOURS)
_INK = np.array([COLOURS[c] for c in _NAMES]) - BACKGROUND  # [6, 3]
_INK_SQ = (_INK**2).sum(1)
_EIGHT = np.ones((3, 3), int)


class Detection(NamedTuple):
    """One component: kind, colour, score in [0, 1], box (x0, y0, x1, y1) in pixels, unexplained share of its area."""

    label: str
    color: str
    score: float
    box: tuple[float, float, float, float]
    residual: float


def check(image: np.ndarray) -> list[Detection]:
    """Every component of a picture, junk included, best first; image: [H, W, 3], uint8 or float in [0, 1]."""
    pixels = image.astype(np.float64) / (255.0 if image.dtype == np.uint8 else 1.0)
    offset = pixels - BACKGROUND
    alpha, error = _unmix(offset)  # [6, H, W] each
    ink = np.abs(offset).max(-1)
    labels, n = ndimage.label(ink > 0.3, _EIGHT)
    found = []
    for index, where in enumerate(ndimage.find_objects(labels, n), start=1):
        where = tuple(slice(max(s.start - 2, 0), s.stop + 2) for s in where)
        mine = ~((labels[where] != index) & (labels[where] > 0))  # other components' pixels are not this one's
        found.append(_explain(alpha[(slice(None), *where)], error[(slice(None), *where)], mine, where))
    return sorted((d for d in found if d), key=lambda d: -d.score)


def detect(image: np.ndarray) -> list[Detection]:
    """The objects GenEval would see: detections above its threshold."""
    return [d for d in check(image) if d.score > DETECT]


def _unmix(offset: np.ndarray):
    """For each palette colour: the share of ink that best explains each pixel, and the distance it leaves."""
    dot = np.einsum("hwc,kc->khw", offset, _INK)
    alpha = np.clip(dot / _INK_SQ[:, None, None], 0, 1.1)
    rest = offset[None] - alpha[..., None] * _INK[:, None, None]
    return np.clip(alpha, 0, 1), np.sqrt((rest**2).sum(-1))


def _explain(alpha, error, mine, where) -> Detection | None:
    """Colour by least error over the component, then kind by the smallest unexplained area."""
    colour = int(np.argmin((error * mine).sum((1, 2))))
    a, off = alpha[colour] * mine, error[colour] * mine
    a = np.where(a > 0.1, a, 0)  # below: noise and the decoder's faint halo
    area = a.sum()
    if area < SPECK:
        return None
    ys = np.arange(where[0].start, where[0].start + a.shape[0]) + 0.5
    xs = np.arange(where[1].start, where[1].start + a.shape[1]) + 0.5
    cx, cy = (a.sum(0) * xs).sum() / area, (a.sum(1) * ys).sum() / area
    stain = np.maximum(off - 0.15, 0).sum() / area  # ink of a colour the palette does not have
    best = min((_fit(kind, a, area, xs, ys, cx, cy) for kind in SHAPES), key=lambda f: f[0])
    residual = best[0] + stain
    return Detection(best[1], _NAMES[colour], _score(residual), best[2], residual)


def _fit(kind, a, area, xs, ys, cx, cy):
    """(unexplained area / area, kind, box) of one kind drawn with this area and centroid."""
    radius = float(np.clip(np.sqrt(area / AREA[kind]), 2.8, 4.3))
    y = cy - CENTROID[kind] * radius
    drawn = coverage(kind, radius, xs[None, :] - cx, ys[:, None] - y)
    half = 0.85 * radius if kind == "square" else radius
    return float(np.abs(a - drawn).sum() / area), kind, (cx - half, y - half, cx + half, y + half)


def _score(residual: float) -> float:
    """1 for a perfect shape, COUNT at 38 % of JUNK, DETECT at JUNK, 0 beyond; quadratic, as noise is forgiven."""
    return float(max(0.0, 1 - (1 - DETECT) * (residual / JUNK) ** 2))


# ---------------------------------------------------------------------------------------------------- GenEval's rules


def relations(a, b) -> set[str]:
    """How box a lies relative to box b, by GenEval's rule (evaluate_images.py, `relative_position`)."""
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    dims = (a[1] - a[0]) + (b[1] - b[0])
    revised = np.maximum(np.abs(offset) - MARGIN * dims, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    names = {"left of": dx < -CLEAR, "right of": dx > CLEAR, "above": dy < -CLEAR, "below": dy > CLEAR}
    return {name for name, holds in names.items() if holds}


def satisfies(found: list[Detection], metadata: dict) -> bool:
    """GenEval's verdict on what `check` found: everything asked for is there; more may be."""
    threshold = COUNT if metadata["tag"] == "counting" else DETECT
    groups = []
    for clause in metadata["include"]:
        same = [d for d in found if d.label == clause["class"] and d.score > threshold]
        mine = same[: clause["count"]]
        groups.append(mine)
        if len(mine) < clause["count"]:
            return False
        if "color" in clause and any(d.color != clause["color"] for d in mine):
            return False
        if "position" in clause:
            name, other = clause["position"]
            if any(name not in relations(d.box, o.box) for d in mine for o in groups[other]):
                return False
    return not any(
        sum(d.label == c["class"] and d.score > threshold for d in found) >= c["count"]
        for c in metadata.get("exclude", ())
    )


def exactly(found: list[Detection], metadata: dict) -> bool:
    """`satisfies`, and nothing else: the exact number of objects and no junk."""
    exact = len(found) == sum(c["count"] for c in metadata["include"])
    return exact and all(d.score > DETECT for d in found) and satisfies(found, metadata)


def correct(image: np.ndarray, metadata: dict) -> bool:
    """GenEval's own, lenient verdict on a picture."""
    return satisfies(check(image), metadata)


def strict(image: np.ndarray, metadata: dict) -> bool:
    """The strict verdict on a picture: lenient conditions and nothing extra."""
    return exactly(check(image), metadata)


def junk(image: np.ndarray) -> int:
    """How many components are no shape at all."""
    return sum(d.score <= DETECT for d in check(image))


assert SIZE == 32  # the radius limits in _fit are in pixels of this size

"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does the picture hold what the prompt says, by an object detector.

The verification is the official benchmark's ``evaluation/evaluate_images.py``, as pure functions over detections; the
detector is a part. Only the exact one for the shapes world is built yet; the official Mask2Former is not.
``geneval_strict``, beside it, also forbids anything extra in the picture: the official rule can be raised by adding
objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from alignbench.config import UserError
from alignbench.evaluator import Evaluator, Metric, to_pil

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection's score must exceed it
MAX_OBJECTS = 16  # per class
POSITION_THRESHOLD = 0.1  # of the summed box sizes: how far apart counts as apart
DETECTORS = ("shapes",)


class Detection(Protocol):
    """One object: class label, colour name (or None), box (left, top, right, bottom) in pixels, confidence."""

    @property
    def label(self) -> str: ...
    @property
    def color(self) -> str | None: ...
    @property
    def box(self) -> Sequence[float]: ...
    @property
    def score(self) -> float: ...


Objects = Mapping[str, Sequence[Detection]]


class GenEval(Evaluator):
    """GenEval's verification. ``detector``: "shapes", the packaged world's exact one."""

    name: ClassVar[str] = "geneval"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("geneval", "fraction", by_task=True),
        Metric("geneval_strict", "fraction", by_task=True),
    )

    detector: str  # no default: the detector decides what the number means

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise UserError(
                f"geneval.detector: '{self.detector}' is not built yet, nor is the official Mask2Former; "
                f"there is: {', '.join(DETECTORS)}"
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt must carry its GenEval line."""
        for prompt in prompts:
            _metadata(prompt)

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image: 1.0 if the picture is right, else 0.0, by the official and by the strict rule."""
        import pandas as pd

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        self.check(prompts)
        rows = [self._verdicts(image.convert("RGB"), _metadata(prompt)) for image, prompt in zip(images, prompts)]
        return pd.DataFrame(rows, columns=[metric.name for metric in self.metrics], dtype="float64")

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> (B,) of 0.0 and 1.0 by the official rule. Not differentiable."""
        verdicts = [self._verdicts(to_pil(image), _metadata(prompt))[0] for image, prompt in zip(pixels, prompts)]
        return pixels.new_tensor(verdicts)

    def _verdicts(self, image: Image, metadata: dict[str, Any]) -> tuple[float, float]:
        import numpy as np

        from alignbench.shapes import checker

        pixels = np.asarray(image)
        objects = group(checker.detect(pixels), metadata["tag"])
        return float(correct(objects, metadata)), float(checker.strict(pixels, metadata))


def _metadata(prompt: Prompt) -> dict[str, Any]:
    """The prompt's GenEval line. UserError if it has none."""
    if not prompt.metadata or "include" not in prompt.metadata or "tag" not in prompt.metadata:
        raise UserError(
            f"geneval: prompt '{prompt.text}' has no GenEval metadata (tag, include); use a GenEval prompt set"
        )
    return prompt.metadata


# -- the official verification ----------------------------------------------------------------------------------------


def group(detections: Iterable[Detection], tag: str) -> Objects:
    """Detections above the threshold of task ``tag``, by class, most confident first, at most 16 of each."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda detection: -detection.score):
        if found.score > threshold and len(objects.setdefault(found.label, [])) < MAX_OBJECTS:
            objects[found.label].append(found)
    return objects


def correct(
    objects: Objects, metadata: Mapping[str, Any], color_of: Callable[[Detection], str | None] = lambda d: d.color
) -> bool:
    """Whether every include clause holds and no exclude clause is violated."""
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        matched.append(_match(objects, clause, matched, color_of))
    excluded = metadata.get("exclude", ())
    extra = any(len(objects.get(clause["class"], ())) >= clause["count"] for clause in excluded)
    return not extra and all(found is not None for found in matched)


def _match(
    objects: Objects,
    clause: Mapping[str, Any],
    earlier: Sequence[Sequence[Detection] | None],
    color_of: Callable[[Detection], str | None],
) -> Sequence[Detection] | None:
    """The clause's ``count`` most confident objects, or None if they are too few, of other colours or elsewhere."""
    found = objects.get(clause["class"], ())[: clause["count"]]
    if len(found) < clause["count"]:
        return None
    if "color" in clause and [color_of(each) for each in found].count(clause["color"]) < clause["count"]:
        return None
    if "position" in clause:
        relation, target = clause["position"]
        others = earlier[target]
        if others is None or not all(relation in relations(a.box, b.box) for a in found for b in others):
            return None
    return found


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box ``a`` lies seen from box ``b``: left of, right of, above, below; none where they are too close.

    The distance of the centres less a margin, divided by the *whole* distance: the official rule, in both places.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    reach = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    revised = [math.copysign(max(abs(o) - POSITION_THRESHOLD * r, 0), o) for o, r in zip(offset, reach)]
    if all(abs(r) < 1e-3 for r in revised):
        return set()
    dx, dy = (r / math.hypot(*offset) for r in revised)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def overall(scores: Mapping[str, Iterable[float]]) -> float:
    """GenEval's headline from scores by task: the unweighted mean of the task means, not the mean over images."""
    means = [sum(values) / len(values) for values in map(list, scores.values())]
    return sum(means) / len(means)

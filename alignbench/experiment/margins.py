"""Warnings about the hinge relu(margin - score), from settings and from records: it never opens, or the unit is wrong.

A hinge that never closes is normal: LeapAlign's margin of 0.55 lies above all HPSv2.1 scores, so that the loss is plain
maximisation. A hinge that never opens is an error: nothing is learnt from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BATCHES = 10  # of a run, after which its hinges are checked
FAR = 100.0  # standard deviations from mean score to margin; published margins: 1 (ImageReward) to 13 (PickScore)


def never_opens(margin: float | None, scores: tuple[float, float] | None) -> str | None:
    """Return why a hinge cannot open for scores in this range; None if it can, or if the range is unknown."""
    if margin is None or scores is None or margin > scores[0]:
        return None
    return f"scores lie in {_range(scores)}, so a hinge at {margin:g} can never open; is the unit right?"


def never_closes(margin: float | None, scores: tuple[float, float] | None) -> str | None:
    """Return why a hinge never closes for scores in this range; None if it may, or if the range is unknown."""
    if margin is None or scores is None or margin <= scores[1]:
        return None
    return f"scores lie in {_range(scores)}, so a hinge at {margin:g} never closes; is the unit right?"


def _range(scores: tuple[float, float]) -> str:
    return f"[{scores[0]:g}, {scores[1]:g}]"


def hinge_warnings(records: Sequence[Mapping[Any, Any]], margins: dict[str, float | None]) -> list[str]:
    """Return one warning per suspicious hinge in the first batches of a run. ``margins``: evaluator -> margin.

    Records of methods that do not use the hinge lack ``hinge_closed`` and give no warning.
    """
    warnings = []
    for name, margin in margins.items():
        suffix = "" if len(margins) == 1 else f"_{name}"
        first = [r for r in records if _number(r.get(f"hinge_closed{suffix}")) and r["step"] < BATCHES]
        if margin is None or not first:
            continue
        mean = statistics.fmean(r[f"reward{suffix or '_mean'}"] for r in first)
        batches = len({r["step"] for r in first})
        if all(r[f"hinge_closed{suffix}"] == 1 for r in first):
            what = f"was closed for every image of the first {batches} batches: margin {margin:g} is below all scores"
            warnings.append(f"the hinge of {name} {what} (mean {mean:.3g}); is the unit right?")
        elif (spread := _spread(first, suffix)) and margin - mean > FAR * spread:
            what = f"margin {margin:g} is {(margin - mean) / spread:.0f} standard deviations above the scores"
            warnings.append(f"the hinge of {name} will never close: {what} (mean {mean:.3g}); is the unit right?")
    return warnings


def _spread(records: Sequence[Mapping[Any, Any]], suffix: str) -> float:
    """Return the standard deviation of the scores of all images, from the means and deviations of the batches."""
    within = statistics.fmean(r[f"reward_std{suffix}"] ** 2 for r in records)
    return (within + statistics.pvariance([r[f"reward{suffix or '_mean'}"] for r in records])) ** 0.5


def _number(value: Any) -> bool:
    return value is not None and value == value  # a table holds nan where a record lacks the value

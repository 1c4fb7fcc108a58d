"""Hinges relu(margin - score) that can never open, or that only a wrong unit explains; from settings and from records.

A hinge that never closes is normal: LeapAlign's margin of 0.55 lies above all of HPSv2.1's scores, and the loss is then
plain maximisation. One that never opens is not: it teaches nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BATCHES = 10  # after so many of a run its hinges are judged
FAR = 100.0  # standard deviations from the mean score to a margin; published margins: 1 (ImageReward) to 13 (PickScore)


def impossible(margin: float | None, scores: tuple[float, float] | None) -> str | None:
    """Why a hinge cannot open for scores within the range; None if it can, or if nothing is known of the scores."""
    if margin is None or scores is None or margin > scores[0]:
        return None
    return f"scores lie in {_range(scores)}, so a hinge at {margin:g} can never open; is the unit right?"


def pointless(margin: float | None, scores: tuple[float, float] | None) -> str | None:
    """Why a hinge never closes for scores within the range; None if it may."""
    if margin is None or scores is None or margin <= scores[1]:
        return None
    return f"scores lie in {_range(scores)}, so a hinge at {margin:g} never closes; is the unit right?"


def _range(scores: tuple[float, float]) -> str:
    return f"[{scores[0]:g}, {scores[1]:g}]"


def complaints(records: Sequence[Mapping[Any, Any]], margins: dict[str, float | None]) -> list[str]:
    """What is odd about the hinges in the first batches of a run: a line each. ``margins``: by evaluator.

    Of a method that does not use the hinge, records have no ``hinge_closed``, and nothing is odd.
    """
    found = []
    for name, margin in margins.items():
        own = "" if len(margins) == 1 else f"_{name}"
        seen = [r for r in records if _number(r.get(f"hinge_closed{own}")) and r["step"] < BATCHES]
        if margin is None or not seen:
            continue
        mean = statistics.fmean(r[f"reward{own or '_mean'}"] for r in seen)
        batches = len({r["step"] for r in seen})
        if all(r[f"hinge_closed{own}"] == 1 for r in seen):
            what = f"was closed for every image of the first {batches} batches: margin {margin:g} is below all scores"
            found.append(f"the hinge of {name} {what} (mean {mean:.3g}); is the unit right?")
        elif (spread := _spread(seen, own)) and margin - mean > FAR * spread:
            what = f"margin {margin:g} is {(margin - mean) / spread:.0f} standard deviations above the scores"
            found.append(f"the hinge of {name} will never close: {what} (mean {mean:.3g}); is the unit right?")
    return found


def _spread(records: Sequence[Mapping[Any, Any]], own: str) -> float:
    """Standard deviation of all images' scores, from the batches' means and deviations."""
    within = statistics.fmean(r[f"reward_std{own}"] ** 2 for r in records)
    return (within + statistics.pvariance([r[f"reward{own or '_mean'}"] for r in records])) ** 0.5


def _number(value: Any) -> bool:
    return value is not None and value == value  # of a record without it, a table holds nan

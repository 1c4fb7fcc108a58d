"""Evaluators of a sweep with their roles: trained on, held out, or a check."""

from __future__ import annotations

from typing import Any, NamedTuple


class Score(NamedTuple):
    """Evaluator of a sweep, with the name of its score file in ``scores/<image set>/``."""

    settings: dict[str, Any]
    name: str
    version: str
    file: str
    metrics: list[dict[str, Any]]
    role: str  # "train", "held-out" or "check"
    base: str | None = None  # for a paired evaluator, the image set to compare with; "" until filled in for a cell

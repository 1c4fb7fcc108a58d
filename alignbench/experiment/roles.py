"""Evaluators of a sweep and their roles: trained on, held out, or a check."""

from __future__ import annotations

from typing import Any, NamedTuple


class Score(NamedTuple):
    """One evaluator of a sweep, and the file of its scores below ``scores/<image set>/``."""

    settings: dict[str, Any]
    name: str
    version: str
    file: str
    metrics: list[dict[str, Any]]
    role: str  # "train", "held-out" or "check"
    base: str | None = None  # of a paired evaluator: the image set that it compares with, as filled in for a cell

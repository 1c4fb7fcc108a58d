"""Prompts: where they come from, and which ones a step sees."""

from __future__ import annotations

from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """One prompt. ``tag`` is its task (GenEval's six, or a style); ``metadata`` is GenEval's line, when there is one."""

    id: str
    text: str
    tag: str = ""
    metadata: dict[str, Any] | None = None

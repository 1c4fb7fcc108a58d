"""Prompts that tiny backends can encode."""

from __future__ import annotations

PROMPTS = ["a photo of a red circle", "two blue square"]  # names of classes, too

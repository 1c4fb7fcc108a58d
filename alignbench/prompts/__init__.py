"""Prompts: lists of them, public sets by name, and GenEval's generator."""

from alignbench.prompts.lists import (
    BYTES,
    CLASSES,
    GENERATED,
    SHAPES,
    SPLITS,
    Prompt,
    check_vocabulary,
    classes,
    digest,
    load_prompts,
    locate,
    parse_prompt,
    prompt_id,
)

__all__ = [
    "BYTES",
    "CLASSES",
    "GENERATED",
    "SHAPES",
    "SPLITS",
    "Prompt",
    "check_vocabulary",
    "classes",
    "digest",
    "load_prompts",
    "locate",
    "parse_prompt",
    "prompt_id",
]

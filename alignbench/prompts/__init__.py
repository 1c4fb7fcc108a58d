"""Prompts: lists in files, packaged and public sets by name, and GenEval's generator.

A list is named by the path of a file (text, JSON, a table; see ``formats``), as a packaged list
("shapes/train", "shapes/val", "shapes/test"), as a generated one ("geneval/train", "geneval/test", "imagenet/classes"),
or as a public set ("hpdv2/test", "drawbench", ...). ``alignbench ls prompts`` shows all names.
"""

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
    evaluation_prompts,
    load_prompts,
    locate,
    longer_than,
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
    "evaluation_prompts",
    "load_prompts",
    "locate",
    "longer_than",
    "parse_prompt",
    "prompt_id",
]

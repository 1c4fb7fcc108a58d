"""The three stages of a run and their names."""

from __future__ import annotations

from enum import Enum
from typing import Literal

Verb = Literal["train", "generate", "score"]


class Stage(Enum):
    """Stage of a run; the members are in the order of execution."""

    TRAIN = "run", "train", "training"
    GENERATE = "images", "generate", "generation"
    SCORE = "scores", "score", "scoring"

    def __init__(self, kind: str, verb: Verb, noun: str) -> None:
        self.kind = kind  # names the artefact that the stage makes, and the stage in a task
        self.verb: Verb = verb  # names the stage in a sweep's ``slurm`` section, in job records and in tables
        self.noun = noun  # begins the reason of a failure

"""The three stages of a run, and the words that each of them goes by."""

from __future__ import annotations

from enum import Enum
from typing import Literal

Verb = Literal["train", "generate", "score"]


class Stage(Enum):
    """One of the stages, in the order of a run."""

    TRAIN = "run", "train", "training"
    GENERATE = "images", "generate", "generation"
    SCORE = "scores", "score", "scoring"

    def __init__(self, kind: str, verb: Verb, noun: str) -> None:
        self.kind = kind  # of the artefact that it makes; in a task, the stage itself
        self.verb: Verb = verb  # in a sweep's ``slurm`` section, in job records and in tables
        self.noun = noun  # begins the reason of a failure

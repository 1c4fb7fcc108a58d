"""Evaluators score images for tables; a Reward is an evaluator's differentiable side, as a training signal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from alignbench.config import Config

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt


class Metric(NamedTuple):
    """One column of a table. ``by_task``: the unweighted mean of the task means (GenEval), not the mean over images."""

    name: str
    unit: str
    higher_is_better: bool = True
    by_task: bool = False


class Evaluator(Config):
    """Scores (image, prompt) pairs with the official preprocessing. Heavy imports belong inside the methods."""

    name: ClassVar[str]
    version: ClassVar[str]  # of model and preprocessing: part of every score's id
    metrics: ClassVar[tuple[Metric, ...]]
    differentiable: ClassVar[bool] = False

    def files(self) -> list[Path]:
        """The weight and configuration files that determine the score. UserError if one is missing or unreadable."""
        return []

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image, one column per metric (by ``Metric.name``)."""
        raise NotImplementedError

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> (B,) scores, in the unit of ``metrics[0]``; differentiable if the class says so."""
        raise NotImplementedError


class Reward:
    """A training reward: an evaluator and, for direct-gradient methods, the hinge relu(margin - score)."""

    def __init__(self, evaluator: Evaluator, margin: float | None = None) -> None:
        self.evaluator = evaluator
        self.margin = margin

    def __call__(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) scores."""
        return self.evaluator.reward(pixels, prompts)

    def loss(self, score: Tensor) -> Tensor:
        """(B,) per-sample losses: ``relu(margin - score)``, or ``-score`` without a margin (LeapAlign eq. 11)."""
        return -score if self.margin is None else (self.margin - score).relu()

"""Evaluators score images for tables; a Reward is an evaluator's differentiable side, as a training signal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from alignbench.config import Config

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt


class Metric(NamedTuple):
    """One column of a table. ``by_task``: the unweighted mean of the task means (GenEval), not the mean over images.

    ``higher_is_better``: None where neither direction is better in itself; then nothing wins and nothing loses.
    """

    name: str
    unit: str
    higher_is_better: bool | None = True
    by_task: bool = False


TEXTS = ("raw", "error")  # columns of text that may stand behind the metrics: a judge's words, why there is no score


class Evaluator(Config):
    """Scores (image, prompt) pairs with the official preprocessing. Heavy imports belong inside the methods."""

    name: ClassVar[str]
    version: ClassVar[str]  # of model and preprocessing: part of every score's id
    metrics: ClassVar[tuple[Metric, ...]]
    differentiable: ClassVar[bool] = False
    seconds_per_image: ClassVar[float | None] = None  # on one GPU with the published weights, roughly: for plans alone
    gigabytes: ClassVar[float | None] = None  # of the published weights there, for plans too
    reward_range: ClassVar[tuple[float, float] | None] = None  # that no ``reward`` leaves: margins are checked by it
    paired: ClassVar[bool] = False  # True: ``score(images, prompts, base)``, and a setting ``base: str | None = None``

    def files(self) -> list[Path]:
        """The weight and configuration files that determine the score. UserError if one is missing or unreadable."""
        return []

    def check(self, prompts: Sequence[Prompt]) -> None:
        """UserError for the first prompt that this evaluator cannot score. Cheap: called before any model is loaded."""

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image, one column per metric (by ``Metric.name``). NaN: this image could not be scored.

        The columns of text in TEXTS may follow. A ``paired`` evaluator is handed a third sequence, ``base``: to each
        image the base model's picture of the same prompt and noise.
        """
        raise NotImplementedError

    def probe(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row of numbers per image, for `alignbench doctor`: they change if a library changes what is computed.

        The scores; an evaluator overrides this if its own are too coarse to show that. A paired one compares with the
        next picture.
        """
        base = [[*images[1:], images[0]]] if self.paired else []
        return self.score(images, prompts, *base)[[metric.name for metric in self.metrics]]

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> (B,) scores: ``metrics[0]``, in its unit unless a setting names another.

        Differentiable if the class says so.
        """
        raise NotImplementedError


class Term(NamedTuple):
    """One part of a training reward. ``margin``: of the hinge relu(margin - score); None: plain -score."""

    evaluator: Evaluator
    margin: float | None = None
    weight: float = 1.0


class Reward:
    """A training reward: one evaluator or several (M), each with its hinge and its weight. Weights sum to one."""

    at_once: int | None = None  # images that are decoded and differentiated at a time; None: all that there are

    def __init__(self, *terms: Term) -> None:
        total = sum(term.weight for term in terms)
        self.terms = tuple(term._replace(weight=term.weight / total) for term in terms)

    @property
    def differentiable(self) -> bool:
        return all(term.evaluator.differentiable for term in self.terms)

    def __call__(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(M, B) scores of (B, 3, H, W) pixels: a row per evaluator, so that per-sample weights (B,) broadcast."""
        import torch

        return torch.stack([term.evaluator.reward(pixels, prompts) for term in self.terms])

    def value(self, scores: Tensor) -> Tensor:
        """(M, B) scores -> (B,) weighted means: what is maximised when every hinge is open."""
        return sum(term.weight * score for term, score in zip(self.terms, scores, strict=True))  # type: ignore[return-value]

    def loss(self, scores: Tensor) -> Tensor:
        """(M, B) scores -> (B,) weighted means of ``relu(margin - score)``, or of ``-score`` (LeapAlign eq. 11)."""
        parts = (-s if t.margin is None else (t.margin - s).relu() for t, s in zip(self.terms, scores, strict=True))
        return sum(term.weight * part for term, part in zip(self.terms, parts))  # type: ignore[return-value]

    def closed(self, scores: Tensor) -> Tensor:
        """(M, B) booleans: does this score teach nothing any more, because its hinge is closed?"""
        import torch

        margins = [float("inf") if term.margin is None else term.margin for term in self.terms]
        return scores >= torch.tensor(margins, dtype=scores.dtype, device=scores.device)[:, None]


SCORED_AT_ONCE = {"cuda": 32, "cpu": 8}  # images per pass: what caches hold; no score depends on it beyond rounding


def in_batches(
    score: Callable[[Sequence[Image], Sequence[Prompt]], Tensor],
    images: Sequence[Image],
    prompts: Sequence[Prompt],
    column: str,
) -> pd.DataFrame:
    """One row per image: ``score`` applied to batches of (images, prompts) without gradient, as column ``column``."""
    import pandas as pd
    import torch

    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    rows: list[float] = []
    at_once = SCORED_AT_ONCE[device().type]
    with torch.no_grad(), exact():
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            rows += score(images[part], prompts[part]).double().tolist()
    return pd.DataFrame({column: rows}, dtype="float64")


def warn_of_cut(name: str, prompts: Sequence[Prompt], limit: int, tokens: Callable[[str], int]) -> None:
    """One warning that counts the distinct prompts longer than the ``limit``, whose ends no score depends on."""
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    cut = [text for text in texts if tokens(text) > limit]
    if cut:
        what = f"{len(cut)} of {len(texts)} prompts are longer than {limit} tokens, their ends are not read"
        warnings.warn(f"{name}: {what}; the first is '{cut[0][:60]}...'", stacklevel=3)


def device() -> torch.device:
    """Where images are scored: this process's GPU when there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def exact() -> Iterator[None]:
    """No TF32, which GPUs use in convolutions unless told otherwise: a score must not depend on the machine."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def each(work: Callable[[Image], Image], images: Sequence[Image]) -> list[Image]:
    """``work`` of Pillow's on every image, in as many threads as torch may use: Pillow works outside Python's lock."""
    import torch

    apart = list({id(image): image for image in images}.values())  # reading one image in two threads would spoil it
    threads = min(torch.get_num_threads(), len(apart))
    if threads <= 1:
        return [work(image) for image in images]
    with ThreadPoolExecutor(threads) as pool:
        done = dict(zip(map(id, apart), pool.map(work, apart)))
    return [done[id(image)] for image in images]


def as_rgb(image: Image) -> Image:
    return image.convert("RGB")


def to_tensor(image: Image, device: torch.device | str = "cpu") -> Tensor:
    """Any PIL image -> (3, H, W) in [0, 1], as torchvision's ToTensor after ``convert("RGB")``."""
    import numpy as np
    import torch

    levels = torch.from_numpy(np.array(image.convert("RGB"))).to(device)  # a quarter of what floats would be
    return levels.permute(2, 0, 1).float() / 255


def check_range(pixels: Tensor) -> Tensor:
    """``pixels``, proven to be on the scale [0, 1] (within rounding). ValueError otherwise."""
    low, high = float(pixels.detach().amin()), float(pixels.detach().amax())
    if low < -0.01 or high > 1.01:
        raise ValueError(f"pixels must lie in [0, 1]; these lie in [{low:.3g}, {high:.3g}]")
    return pixels


def to_pil(pixels: Tensor) -> Image:
    """(3, H, W) in [0, 1] -> an 8-bit RGB image, rounded to nearest as diffusers does."""
    import torch
    from PIL import Image

    levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

"""Evaluators, which score images for tables, and rewards, which use them as a training signal.

Pixels are (B, 3, H, W) tensors in [0, 1]; images are PIL images of any size and mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from alignbench.config import Config

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from PIL.Image import Image
    from torch import Tensor


class Prompt(NamedTuple):
    """A prompt.

    - ``id``: from ``prompt_id``; ``text``: the prompt itself.
    - ``tag``: its task, such as one of GenEval's six, or its style; may be empty.
    - ``metadata``: the whole object on its line of a .jsonl file; None for other lists.
    """

    id: str
    text: str
    tag: str = ""
    metadata: dict[str, Any] | None = None


class Metric(NamedTuple):
    """One column of a table.

    ``name``: the column of the data frame that ``Evaluator.score`` returns; ``unit``: shown beside it.

    ``higher_is_better``: None if neither direction is better in itself; then no row is called better or worse.

    ``by_task``: True for the unweighted mean of the task means (GenEval); False for the mean over images.
    """

    name: str
    unit: str
    higher_is_better: bool | None = True
    by_task: bool = False


TEXTS = ("raw", "error")  # optional text columns after the metrics: a judge's answer; why there is no score


class Evaluator(Config):
    """A scorer of (image, prompt) pairs with the official preprocessing. Its fields are its settings.

    Subclasses set ``name``, ``version`` and ``metrics``, and define ``score``; ``reward`` too if the evaluator can be
    a training reward. Import heavy packages (torch, transformers) inside the methods: sweeps are checked without them.

    - ``name``: chooses the evaluator in YAML.
    - ``version``: that of model and preprocessing; part of every score's id.
    - ``metrics``: the columns of ``score``, in order; the first one is the training reward.
    - ``differentiable``: True if ``reward`` has a gradient.
    - ``seconds_per_image``, ``gigabytes``: rough time and memory of the published weights on one GPU; for plans only.
    - ``reward_range``: bounds of ``reward``; margins are checked against them.
    - ``paired``: True if ``score`` compares with the base model's images; it then takes a third argument ``base``, and
      the class has a setting ``base: str | None = None``.
    - ``unhashed``: settings that change no number, such as the address of a server; they are in no id.
    - ``reward_only``: settings that change ``reward`` but no score; they are in no score's id.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    differentiable: ClassVar[bool] = False
    seconds_per_image: ClassVar[float | None] = None
    gigabytes: ClassVar[float | None] = None
    reward_range: ClassVar[tuple[float, float] | None] = None
    paired: ClassVar[bool] = False
    unhashed: ClassVar[tuple[str, ...]] = ()
    reward_only: ClassVar[tuple[str, ...]] = ()

    def files(self) -> list[Path]:
        """Return the weight and configuration files that determine the score; they are hashed into its id.

        Raise UserError if one is missing or unreadable.
        """
        return []

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for the first prompt that cannot be scored. Cheap: called before any model is loaded."""

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image and one column per metric, named by ``Metric.name``.

        NaN marks an image that could not be scored. The text columns of TEXTS may follow. All images of a prompt come
        in one call. A ``paired`` evaluator gets a third sequence, ``base``: for each image, the base model's image for
        the same prompt and noise.
        """
        raise NotImplementedError

    def probe(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row of numbers per image for `alignbench doctor`, which change if a library changes the scores.

        By default the scores; override it if they are too coarse to show a change. A paired evaluator compares each
        image with the next one.
        """
        base = [[*images[1:], images[0]]] if self.paired else []
        return self.score(images, prompts, *base)[[metric.name for metric in self.metrics]]

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the (B,) values of ``metrics[0]`` for (B, 3, H, W) pixels in [0, 1].

        In the metric's unit, unless a setting chooses another one. Differentiable with respect to ``pixels`` if the
        class sets ``differentiable``.
        """
        raise NotImplementedError


class Term(NamedTuple):
    """One evaluator in a training reward.

    ``margin``: that of the hinge loss relu(margin - score); None: the loss is -score. ``weight``: relative to the
    other terms.
    """

    evaluator: Evaluator
    margin: float | None = None
    weight: float = 1.0


class Reward:
    """A training reward of one or more evaluators (M), each with a hinge and a weight.

    ``terms`` holds the terms with their weights divided by the sum, so that they sum to one. ``slice_size`` is the
    number of images that are decoded and differentiated at a time; None: all images of the micro-batch.
    """

    slice_size: int | None = None

    def __init__(self, *terms: Term) -> None:
        """Make a reward of these terms; their weights are normalised."""
        total = sum(term.weight for term in terms)
        self.terms = tuple(term._replace(weight=term.weight / total) for term in terms)

    @property
    def differentiable(self) -> bool:
        """True if every evaluator has a gradient."""
        return all(term.evaluator.differentiable for term in self.terms)

    def __call__(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the (M, B) scores of (B, 3, H, W) pixels in [0, 1]: a row per evaluator.

        Per-sample weights (B,) therefore broadcast.
        """
        import torch

        return torch.stack([term.evaluator.reward(pixels, prompts) for term in self.terms])

    def value(self, scores: Tensor) -> Tensor:
        """Return the (B,) weighted means of (M, B) scores, which training maximises while every hinge is open."""
        return sum(term.weight * score for term, score in zip(self.terms, scores, strict=True))  # type: ignore[return-value]

    def loss(self, scores: Tensor) -> Tensor:
        """Return the (B,) losses of (M, B) scores: weighted means of ``relu(margin - score)`` (LeapAlign eq. 11).

        A term without a margin contributes ``-score``.
        """
        parts = (-s if t.margin is None else (t.margin - s).relu() for t, s in zip(self.terms, scores, strict=True))
        return sum(term.weight * part for term, part in zip(self.terms, parts))  # type: ignore[return-value]

    def hinge_closed(self, scores: Tensor) -> Tensor:
        """Return (M, B) booleans: True where the score has reached its margin, so that it has no gradient."""
        import torch

        margins = [float("inf") if term.margin is None else term.margin for term in self.terms]
        return scores >= torch.tensor(margins, dtype=scores.dtype, device=scores.device)[:, None]


SCORED_AT_ONCE = {"cuda": 32, "cpu": 8}  # images per forward pass, to fit caches; it changes scores by rounding only


def in_batches(
    score: Callable[[Sequence[Image], Sequence[Prompt]], Tensor],
    images: Sequence[Image],
    prompts: Sequence[Prompt],
    column: str,
) -> pd.DataFrame:
    """Return a data frame with one row per image and one column, ``column``: ``score`` applied batch by batch.

    ``score``: maps b images and their b prompts to (b,) scores. It is called without gradient and without TF32.
    """
    import pandas as pd
    import torch

    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    rows: list[float] = []
    at_once = SCORED_AT_ONCE[device().type]
    with torch.no_grad(), without_tf32():
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            rows += score(images[part], prompts[part]).double().tolist()
    return pd.DataFrame({column: rows}, dtype="float64")


def warn_of_cut(name: str, prompts: Sequence[Prompt], limit: int, tokens: Callable[[str], int]) -> None:
    """Warn once if prompts are longer than ``limit`` tokens, so that their ends are not read; say how many.

    ``name``: the evaluator, for the warning; ``tokens``: the length of a text in tokens.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    cut = [text for text in texts if tokens(text) > limit]
    if cut:
        what = f"{len(cut)} of {len(texts)} prompts are longer than {limit} tokens; their ends are not read"
        warnings.warn(f"{name}: {what}; the first is '{cut[0][:60]}...'", stacklevel=3)


def device() -> torch.device:
    """Return the device on which images are scored: this process's GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Turn TF32 off within a ``with`` block: GPUs use it in convolutions by default, and scores would depend on it."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def map_images(work: Callable[[Image], Image], images: Sequence[Image]) -> list[Image]:
    """Return ``work(image)`` for every image, in as many threads as torch may use.

    For Pillow's operations, which release the GIL.
    """
    import torch

    distinct = list({id(image): image for image in images}.values())  # loading an image is not thread-safe
    threads = min(torch.get_num_threads(), len(distinct))
    if threads <= 1:
        return [work(image) for image in images]
    with ThreadPoolExecutor(threads) as pool:
        done = dict(zip(map(id, distinct), pool.map(work, distinct)))
    return [done[id(image)] for image in images]


def as_rgb(image: Image) -> Image:
    """Return the image in mode RGB."""
    return image.convert("RGB")


def to_tensor(image: Image, device: torch.device | str = "cpu") -> Tensor:
    """Return a PIL image of any mode as (3, H, W) float32 in [0, 1], as torchvision's ToTensor gives it for RGB."""
    import numpy as np
    import torch

    levels = torch.from_numpy(np.array(image.convert("RGB"))).to(device)  # bytes: a quarter of the transfer
    return levels.permute(2, 0, 1).float() / 255


def check_range(pixels: Tensor) -> Tensor:
    """Return ``pixels``. Raise ValueError unless they lie in [0, 1], within 0.01."""
    low, high = float(pixels.detach().amin()), float(pixels.detach().amax())
    if low < -0.01 or high > 1.01:
        raise ValueError(f"pixels must lie in [0, 1]; these lie in [{low:.3g}, {high:.3g}]")
    return pixels


def to_pil(pixels: Tensor) -> Image:
    """Return (3, H, W) pixels in [0, 1] as an 8-bit RGB image, rounded to nearest as in diffusers."""
    import torch
    from PIL import Image

    levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

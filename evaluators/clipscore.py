"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718): the cosine of image and prompt by OpenAI's CLIP ViT-L/14.

Departures:
1. It is the plain cosine, as papers on text-to-image training print it; the paper's max(0, 2.5 cos) rescales it.
2. Preprocessing and tokens are those of the hub's ``CLIPProcessor``. Its centre crop differs by up to one pixel from
   that of OpenAI's package where the border is odd, and its tokenizer does not unescape HTML.
QuickGELU, which OpenAI's models need, is part of the hub's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from alignbench import clip, weights
from alignbench.clip import Clip
from alignbench.config import Requirement
from alignbench.evaluator import Evaluator, Metric, check_range, device, in_batches, warn_of_cut

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt


class CLIPScore(Evaluator):
    """CLIPScore, about 0.2 to 0.35. ``weights``: a hub id or a folder with a CLIPModel and its processor."""

    name: ClassVar[str] = "clipscore"
    seconds_per_image: ClassVar[float | None] = 0.02
    gigabytes: ClassVar[float | None] = 1.7
    version: ClassVar[str] = "1-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("clipscore", "cosine"),)
    reward_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    differentiable: ClassVar[bool] = True

    weights: str = "openai/clip-vit-large-patch14"
    revision: str | None = None

    def requirements(self) -> list[Requirement]:
        files = ["config.json", "model.safetensors", *clip.HUB_FILES]
        return [weights.requirement(self.weights, "clipscore.weights", revision=self.revision, files=files)]

    @cached_property
    def folder(self) -> Path:
        """Folder of the CLIPModel; UserError if it cannot be found."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        files = weights.model_files(self.folder, "clipscore.weights")
        return sorted({*files, *clip.processor_files(self.folder, "clipscore.weights")})

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: the cosine, after the official preprocessing."""

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            return self._clip.cosine(self._clip.official(images).to(device()), prompts)

        warn_of_cut(self.name, prompts, self._clip.limit, self._clip.tokens)
        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) cosines; differentiable."""
        return self._clip.cosine(self._clip.preprocess(check_range(pixels)), prompts)

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.folder, "clipscore.weights")

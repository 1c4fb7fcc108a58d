"""LAION's aesthetic predictor v2 (Schuhmann et al. 2022, arXiv 2210.08402): a linear head on CLIP's image feature.

The head has five linear layers without activations, on the unit feature of OpenAI's CLIP ViT-L/14. Prompts are ignored.
Departure: images are prepared by the hub's ``CLIPProcessor``, whose centre crop differs by up to one pixel from that of
OpenAI's package where the border is odd.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alignbench import clip, weights
from alignbench.clip import Clip, linear_head
from alignbench.config import Requirement, UserError
from alignbench.evaluator import Evaluator, Metric, check_range, device, in_batches

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

HEAD = "~/.cache/alignbench/sac+logos+ava1-l14-linearMSE.pth"
SOURCE = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
WIDTH = 768  # width of the features that the head was trained on


class Aesthetic(Evaluator):
    """LAION's aesthetic score, about 1 to 10. ``weights``: the head's .pth file; ``clip``: a hub id or a folder."""

    name: ClassVar[str] = "aesthetic"
    seconds_per_image: ClassVar[float | None] = 0.02
    gigabytes: ClassVar[float | None] = 1.7
    version: ClassVar[str] = "2-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("aesthetic", "1-10"),)
    differentiable: ClassVar[bool] = True

    weights: str = HEAD
    clip: str = "openai/clip-vit-large-patch14"
    clip_revision: str | None = None

    def requirements(self) -> list[Requirement]:
        path, files = Path(self.weights).expanduser(), ["config.json", "model.safetensors", *clip.HUB_FILES]
        fetch = f"curl --create-dirs -Lo {path} {SOURCE}"
        text = f"aesthetic.weights: there is no file {path}; fetch it once with `{fetch}`"
        return [
            Requirement(path.name, text, fetch, found=path if path.is_file() else None),
            weights.requirement(self.clip, "aesthetic.clip", revision=self.clip_revision, files=files),
        ]

    @cached_property
    def head(self) -> Path:
        """The head's file; UserError if it does not exist."""
        return self.requirements()[0].path

    @cached_property
    def folder(self) -> Path:
        """Folder of the CLIPModel; UserError if it cannot be found."""
        return self.requirements()[1].path

    def files(self) -> list[Path]:
        files = weights.check([self.head], "aesthetic.weights")
        files += weights.model_files(self.folder, "aesthetic.clip")
        self._check_clip()
        return list(dict.fromkeys([*files, *clip.processor_files(self.folder, "aesthetic.clip")]))

    def _check_clip(self) -> None:
        """Raise UserError for features that the head was not trained on: scores would be plausible but wrong."""
        config = json.loads((self.folder / "config.json").read_text())
        width = config.get("projection_dim")
        activation = config.get("vision_config", {}).get("hidden_act", "quick_gelu")  # transformers' default
        if (width, activation) != (WIDTH, "quick_gelu"):
            what = f"has {width} features with {activation}, but the head reads {WIDTH} with quick_gelu"
            raise UserError(f"aesthetic.clip: {self.folder} {what}; choose openai/clip-vit-large-patch14")

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image, independent of its prompt."""

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            return self._score(self._clip.official(images).to(device()))

        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) scores; differentiable."""
        return self._score(self._clip.preprocess(check_range(pixels)))

    def _score(self, pixels: Tensor) -> Tensor:
        return self._head.to(pixels.device)["layers"](self._clip.images(pixels))[:, 0]

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.folder, "aesthetic.clip")

    @cached_property
    def _head(self) -> Any:
        head = linear_head(WIDTH)
        weights.fill(head, weights.load(self.head, "aesthetic.weights"), self.head, "aesthetic.weights")
        return head.eval().requires_grad_(False)

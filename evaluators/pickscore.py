"""PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) times the cosine of CLIP ViT-H-14 features.

Departures from the snippet in PickScore's README:
1. Text features are computed prompt by prompt and cached; image i is compared with prompt i alone.
2. ``get_*_features`` returns an output object since transformers 5; its ``pooler_output`` is the projected feature.
3. Images are resized with Pillow, as the official processor did; transformers 5's default resizes with torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from alignbench import clip, weights
from alignbench.clip import Clip
from alignbench.config import Requirement
from alignbench.evaluator import Evaluator, Metric, check_range, device, in_batches, warn_of_cut

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the README's


class PickScore(Evaluator):
    """PickScore. ``weights``: a hub id, a folder with a transformers CLIPModel, or "shapes".

    Tables hold the logit (18-26 for real images). As a training reward, LeapAlign's margin 0.4 assumes
    ``reward_unit: cosine``.
    """

    name: ClassVar[str] = "pickscore"
    seconds_per_image: ClassVar[float | None] = 0.02
    gigabytes: ClassVar[float | None] = 3.9
    version: ClassVar[str] = "1-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("pickscore", "logit"),)
    differentiable: ClassVar[bool] = True
    reward_only: ClassVar[tuple[str, ...]] = ("reward_unit",)

    weights: str = "yuvalkirstain/PickScore_v1"
    revision: str | None = None
    processor: str | None = None  # folder or hub id; None: next to the weights, or else LAION's, as in the README
    reward_unit: Literal["logit", "cosine"] = "logit"

    @property
    def reward_range(self) -> tuple[float, float]:  # type: ignore[override]  # depends on a setting here
        return (-1.0, 1.0) if self.reward_unit == "cosine" else (-100.0, 100.0)  # CLIP caps its scale at 100

    def requirements(self) -> list[Requirement]:
        model = weights.requirement(self.weights, "pickscore.weights", shapes="pickscore", revision=self.revision)
        if self.processor is None and model.found and any((model.found / n).exists() for n in clip.PROCESSOR_FILES):
            return [model]
        name, where = self.processor or PROCESSOR, "pickscore.processor"
        return [model, weights.requirement(name, where, shapes="pickscore", files=clip.HUB_FILES)]

    @cached_property
    def folder(self) -> Path:
        """Folder of the CLIPModel; UserError if it cannot be found."""
        return self.requirements()[0].path

    @cached_property
    def processor_folder(self) -> Path:
        """Folder of image preprocessing and tokenizer; UserError if it cannot be found."""
        return self.requirements()[-1].path

    def files(self) -> list[Path]:
        files = weights.model_files(self.folder, "pickscore.weights")
        return sorted({*files, *clip.processor_files(self.processor_folder, "pickscore.processor")})

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: the logit, after the official preprocessing."""

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            return self._clip.scale * self._clip.cosine(self._clip.official(images).to(device()), prompts)

        warn_of_cut(self.name, prompts, self._clip.limit, self._clip.tokens)
        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) scores in ``reward_unit``; differentiable."""
        cosine = self._clip.cosine(self._clip.preprocess(check_range(pixels)), prompts)
        return cosine if self.reward_unit == "cosine" else self._clip.scale * cosine

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.processor_folder, "pickscore.weights")

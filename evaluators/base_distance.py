"""Distance of an image from the base model's: the squared distance of their unit CLIP features, |f - f_base|^2.

Both images have the same prompt, noise and sampler; 0 means that alignment changed nothing that CLIP sees. Method
papers report this movement as an FID against the base model's samples (VGG-Flow). Differences from that:
1. Images are paired. An FID compares two clouds of features: it misses images that change places within them, and does
   not tell what became of one prompt's image.
2. No Gaussian is assumed and no covariance estimated: a few images are enough, and the mean has an interval.
3. Features are CLIP's, not Inception's; the unit is |f - f_base|^2 = 2 (1 - cosine), from 0 to 4.

A larger distance is neither better nor worse in itself: the column has no arrow, and no method wins it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from alignbench import clip, weights
from alignbench.clip import Clip
from alignbench.config import Requirement
from alignbench.evaluator import Evaluator, Metric

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from alignbench.prompts import Prompt


class BaseDistance(Evaluator):
    """CLIP distance of an image from the base model's image of the same prompt and noise.

    ``weights``: a CLIPModel, or "shapes". ``base``: for `alignbench score` alone, the folder of the base model's
    images; a sweep makes its own.
    """

    name: ClassVar[str] = "base_distance"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("base_distance", "squared distance", higher_is_better=None),)
    paired: ClassVar[bool] = True

    weights: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    base: str | None = None

    def requirements(self) -> list[Requirement]:
        files, where = ["config.json", "model.safetensors", *clip.HUB_FILES], "base_distance.weights"
        return [weights.requirement(self.weights, where, shapes="pickscore", revision=self.revision, files=files)]

    @cached_property
    def folder(self) -> Path:
        """Folder of the CLIPModel; UserError if it cannot be found."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        files = weights.model_files(self.folder, "base_distance.weights")
        return sorted({*files, *clip.processor_files(self.folder, "base_distance.weights")})

    def score(  # type: ignore[override]  # paired: the harness passes the base model's images
        self, images: Sequence[Image], prompts: Sequence[Prompt], base: Sequence[Image]
    ) -> pd.DataFrame:
        """Return one row per image: its squared distance from its partner in ``base``."""
        import pandas as pd

        distances = (self._clip.features(images) - self._clip.features(base)).square().sum(-1)
        return pd.DataFrame({self.metrics[0].name: distances.tolist()}, dtype="float64")

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.folder, "base_distance.weights")

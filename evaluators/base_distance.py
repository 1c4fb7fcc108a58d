"""How far a picture has moved from the base model's: the squared distance of unit CLIP features, |f - f_base|^2.

Both pictures have the same prompt, noise and sampler; 0 means that alignment changed nothing that CLIP sees. Method
papers report this movement as an FID against the base model's samples (VGG-Flow). Differences from that:
1. Paired, picture by picture: an FID compares two clouds of features and sees no picture that changed places within
   them, nor what this prompt's picture became.
2. No Gaussian is assumed, and no covariance is estimated: it works for few pictures; its mean has an interval.
3. CLIP's features and not Inception's; the unit is |f - f_base|^2 = 2 (1 - cosine), from 0 to 4.

Further away is neither better nor worse in itself: the column has no arrow, and no method wins in it.
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
    """How far a picture has moved from the base model's picture of the same prompt and noise, for CLIP's eyes.

    ``weights``: a CLIPModel, or "shapes". ``base``: for `alignbench score` alone, the folder of the base model's
    pictures; a sweep makes its own.
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
        """Where the CLIPModel lies. UserError if nowhere."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        found = weights.model_files(self.folder, "base_distance.weights")
        return sorted({*found, *clip.processor_files(self.folder, "base_distance.weights")})

    def score(  # type: ignore[override]  # paired: the harness hands the base model's pictures in
        self, images: Sequence[Image], prompts: Sequence[Prompt], base: Sequence[Image]
    ) -> pd.DataFrame:
        """One row per image: its squared distance from its partner in ``base``."""
        import pandas as pd

        apart = (self._clip.features(images) - self._clip.features(base)).square().sum(-1)
        return pd.DataFrame({self.metrics[0].name: apart.tolist()}, dtype="float64")

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.folder, "base_distance.weights")

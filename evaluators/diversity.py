"""Diversity of the images of one prompt: squared distances of their CLIP features.

An image's value is the mean of |f_i - f_j|^2 over the other images j of its prompt, for unit features f; the mean over
images is the mean over ordered pairs ("CLIP diversity"). ``form: dreamsim`` halves it: sum_ij |e_i - e_j|^2 /
(2 n (n - 1)), the form in which the authors of Adjoint Matching report DreamSim's variance. A reward that rises while
this falls is the usual sign of a collapse onto one image per prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from alignbench import clip, weights
from alignbench.clip import Clip
from alignbench.config import Requirement
from alignbench.evaluator import Evaluator, Metric

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt


class Diversity(Evaluator):
    """CLIP diversity of a prompt's images, undefined for a single one. ``weights``: a CLIPModel, or "shapes"."""

    name: ClassVar[str] = "diversity"
    seconds_per_image: ClassVar[float | None] = 0.02
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("diversity", "squared distance"),)
    by_prompt: ClassVar[bool] = True

    weights: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    form: Literal["pairs", "dreamsim"] = "pairs"  # dreamsim: half of it

    def requirements(self) -> list[Requirement]:
        files, where = ["config.json", "model.safetensors", *clip.HUB_FILES], "diversity.weights"
        return [weights.requirement(self.weights, where, shapes="pickscore", revision=self.revision, files=files)]

    @cached_property
    def folder(self) -> Path:
        """Folder of the CLIPModel; UserError if it cannot be found."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        files = weights.model_files(self.folder, "diversity.weights")
        return sorted({*files, *clip.processor_files(self.folder, "diversity.weights")})

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: its mean squared distance from the others of its prompt; nan if there are none."""
        import pandas as pd

        features = self.features(images)
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt.id].append(row)
        values = [float("nan")] * len(images)
        for rows in groups.values():
            if len(rows) > 1:
                means = (features[rows][:, None] - features[rows][None]).square().sum(-1).sum(1) / (len(rows) - 1)
                for row, value in zip(rows, means.tolist()):
                    values[row] = value / (2 if self.form == "dreamsim" else 1)
        return pd.DataFrame({self.metrics[0].name: values}, dtype="float64")

    def features(self, images: Sequence[Image]) -> Tensor:
        """Return (B, D) unit features in float64."""
        return self._clip.features(images)

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.folder, "diversity.weights")

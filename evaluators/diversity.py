"""How different the pictures of one prompt are from one another: squared distances of CLIP features.

A picture's value is the mean of |f_i - f_j|^2 over the other pictures j of its prompt, for unit features f; the mean
over pictures is the mean over ordered pairs ("CLIP diversity"). ``form: dreamsim`` halves it: sum_ij |e_i - e_j|^2 /
(2 n (n - 1)), the form in which the authors of Adjoint Matching report DreamSim's variance. A reward that rises while
this falls is the usual sign of a collapse onto one picture per prompt.
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
    """Of the pictures of one prompt; a prompt with a single picture has none. ``weights``: a CLIPModel, or "shapes"."""

    name: ClassVar[str] = "diversity"
    seconds_per_image: ClassVar[float | None] = 0.02
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("diversity", "squared distance"),)

    weights: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    form: Literal["pairs", "dreamsim"] = "pairs"  # dreamsim: half of it

    def requirements(self) -> list[Requirement]:
        files, where = ["config.json", "model.safetensors", *clip.HUB_FILES], "diversity.weights"
        return [weights.requirement(self.weights, where, shapes="pickscore", revision=self.revision, files=files)]

    @cached_property
    def folder(self) -> Path:
        """Where the CLIPModel lies. UserError if nowhere."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        found = weights.model_files(self.folder, "diversity.weights")
        return sorted({*found, *clip.processor_files(self.folder, "diversity.weights")})

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image: its mean squared distance from the others of its prompt among ``images``."""
        import pandas as pd

        features = self.features(images)
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt.id].append(row)
        found = [float("nan")] * len(images)
        for rows in groups.values():
            if len(rows) > 1:
                apart = (features[rows][:, None] - features[rows][None]).square().sum(-1).sum(1) / (len(rows) - 1)
                for row, value in zip(rows, apart.tolist()):
                    found[row] = value / (2 if self.form == "dreamsim" else 1)
        return pd.DataFrame({self.metrics[0].name: found}, dtype="float64")

    def features(self, images: Sequence[Image]) -> Tensor:
        """(B, D) unit features, in float64."""
        return self._clip.features(images)

    @cached_property
    def _clip(self) -> Clip:
        self.files()
        return Clip(self.folder, self.folder, "diversity.weights")

"""PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) x cosine of a CLIP ViT-H-14's features.

Departures from the snippet in PickScore's README:
1. Text features are computed prompt by prompt and cached; image i meets prompt i, never all against all.
2. ``get_*_features`` returns an output object since transformers 5: its ``pooler_output`` is the projected feature.
3. Images are resized with Pillow, as the official processor did; transformers 5's default resizes with torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench import weights
from alignbench.evaluator import Evaluator, Metric, check_range, device, in_batches

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the README's
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class PickScore(Evaluator):
    """PickScore. ``weights``: a hub id, a folder with a transformers CLIPModel, or "shapes".

    Tables hold the logit (18-26 for real images). As a training reward, LeapAlign's margin 0.4 assumes
    ``reward_unit: cosine``.
    """

    name: ClassVar[str] = "pickscore"
    version: ClassVar[str] = "1-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("pickscore", "logit"),)
    differentiable: ClassVar[bool] = True

    weights: str = "yuvalkirstain/PickScore_v1"
    revision: str | None = None
    processor: str | None = None  # folder or hub id; None: beside the weights, or else LAION's, as in the README
    reward_unit: Literal["logit", "cosine"] = "logit"

    @cached_property
    def folder(self) -> Path:
        """Where the CLIPModel lies. UserError if nowhere."""
        return weights.locate(self.weights, "pickscore.weights", shapes="pickscore", revision=self.revision)

    @cached_property
    def processor_folder(self) -> Path:
        """Where image preprocessing and tokenizer lie. UserError if nowhere."""
        if self.processor is None and any((self.folder / name).exists() for name in PROCESSOR_FILES):
            return self.folder
        return weights.locate(self.processor or PROCESSOR, "pickscore.processor", shapes="pickscore")

    def files(self) -> list[Path]:
        found = weights.model_files(self.folder, "pickscore.weights")
        names = [*PROCESSOR_FILES, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
        beside = [self.processor_folder / name for name in names if (self.processor_folder / name).exists()]
        return sorted({*found, *weights.check(beside, "pickscore.processor")})

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image: the logit, after the official preprocessing."""

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            rgb = [image.convert("RGB") for image in images]
            pixels = self._image_processor(images=rgb, return_tensors="pt")["pixel_values"].to(device())
            return self._scale * self._cosine(pixels, prompts)

        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> (B,) scores in ``reward_unit``, differentiable."""
        cosine = self._cosine(self.preprocess(check_range(pixels)), prompts)
        return cosine if self.reward_unit == "cosine" else self._scale * cosine

    def preprocess(self, pixels: Tensor) -> Tensor:
        """The processor's steps on tensors: shortest edge (bicubic, antialiased), centre crop, normalisation.

        Pillow rounds to 8 bits after each of its two resize passes, this does not: normalised pixels differ by up to
        about 0.14, on average by 0.004.
        """
        from torchvision.transforms.functional import InterpolationMode as Mode
        from torchvision.transforms.functional import crop, normalize, resize

        processor = self._image_processor
        pixels = resize(pixels.float(), [processor.size["shortest_edge"]], Mode.BICUBIC, antialias=True)
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2  # torchvision's own rounds up
        pixels = crop(pixels, top, left, height, width)
        return normalize(pixels, processor.image_mean, processor.image_std)

    def _cosine(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        import torch

        model = self._model.to(pixels.device)
        image = _unit(model.get_image_features(pixel_values=pixels))
        text = torch.stack([self._text(prompt.text) for prompt in prompts]).to(pixels.device)
        return (image * text).sum(-1)

    def _text(self, prompt: str) -> Tensor:
        """(D,) unit feature, computed once per prompt and kept on the CPU."""
        import torch

        if prompt not in self._texts:
            tokens = self._tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            with torch.no_grad():
                features = self._model.get_text_features(**tokens.to(self._model.device))
            self._texts[prompt] = _unit(features)[0].cpu()
        return self._texts[prompt]

    @cached_property
    def _texts(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _scale(self) -> float:
        return float(self._model.logit_scale.exp())

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import CLIPImageProcessorPil

        return CLIPImageProcessorPil.from_pretrained(self.processor_folder, local_files_only=True)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.processor_folder, local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import CLIPModel

        self.files()
        with weights.quiet():
            model = CLIPModel.from_pretrained(self.folder, dtype=torch.float32, local_files_only=True)
        return model.eval().requires_grad_(False)


def _unit(features: Any) -> Tensor:
    """(B, D) projected features of length one."""
    import torch

    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    return features / features.norm(dim=-1, keepdim=True)

"""A frozen CLIP of transformers for evaluators, with the official preprocessing and a differentiable one.

D is the size of the shared embedding space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench import weights
from alignbench.config import UserError
from alignbench.evaluator import SCORED_AT_ONCE, as_rgb, device, map_images

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.evaluator import Prompt

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FILES = (*PROCESSOR_FILES, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
HUB_FILES = ("preprocessor_config.json", "tokenizer_config.json", "vocab.json", "merges.txt")  # OpenAI's repositories


class Clip:
    """A CLIPModel with its image processor and tokenizer, frozen, in float32, loaded at first use."""

    def __init__(self, folder: Path, processor_folder: Path, where: str) -> None:
        """Take the model in ``folder``, image processor and tokenizer in ``processor_folder``.

        ``where``: the setting that an error names.
        """
        self.folder, self.processor_folder, self.where = folder, processor_folder, where
        self._texts: dict[str, Tensor] = {}  # unit features, computed once per prompt and kept on the CPU

    def images(self, pixels: Tensor) -> Tensor:
        """Return (B, D) image features of length one for (B, 3, h, w) preprocessed pixels, differentiably."""
        return _unit(self.model.to(pixels.device).get_image_features(pixel_values=pixels))

    def features(self, images: Sequence[Image]) -> Tensor:
        """Return (B, D) image features of length one, after the official preprocessing.

        In float64 on the CPU, without gradient.
        """
        import torch

        rows = [] if images else [torch.zeros(0, 1, dtype=torch.float64)]
        at_once = SCORED_AT_ONCE[device().type]
        with torch.no_grad():
            for start in range(0, len(images), at_once):
                pixels = self.official(images[start : start + at_once]).to(device())
                rows.append(self.images(pixels).double().cpu())
        return torch.cat(rows)

    def cosine(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the (B,) cosines of image i and prompt i for (B, 3, h, w) preprocessed pixels, differentiably."""
        import torch

        image = self.images(pixels)
        text = torch.stack([self.text(prompt.text) for prompt in prompts]).to(pixels.device)
        return (image * text).sum(-1)

    def official(self, images: Sequence[Image]) -> Tensor:
        """Return (B, 3, h, w) preprocessed pixels, resized with Pillow as by the official processors."""
        return self.image_processor(images=map_images(as_rgb, images), return_tensors="pt")["pixel_values"]

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Return (B, 3, h, w) preprocessed pixels for (B, 3, H, W) pixels in [0, 1], differentiably.

        The processor's steps on tensors: resize the shortest edge (bicubic, antialiased), crop the centre, normalise.
        Unlike Pillow, it does not round to 8 bits after each of two resize passes: normalised pixels differ by up to
        about 0.14, on average by 0.004.
        """
        from torchvision.transforms.functional import InterpolationMode as Mode
        from torchvision.transforms.functional import crop, normalize, resize

        processor = self.image_processor
        pixels = resize(pixels.float(), [processor.size["shortest_edge"]], Mode.BICUBIC, antialias=True)
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2  # torchvision's own rounds up
        pixels = crop(pixels, top, left, height, width)
        return normalize(pixels, processor.image_mean, processor.image_std)

    @cached_property
    def limit(self) -> int:
        """Number of tokens of a prompt that are read, start and end included; 77 in OpenAI's models."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config.get("text_config", {}).get("max_position_embeddings", 77)  # transformers' default

    def tokens(self, text: str) -> int:
        """Return the length of ``text`` in tokens, not truncated, start and end included."""
        return len(self.tokenizer.tokenize(text)) + 2

    def text(self, prompt: str) -> Tensor:
        """Return the (D,) feature of a text, of length one, without gradient. Computed once per text."""
        import torch

        if prompt not in self._texts:
            tokens = self.tokenizer(prompt, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
            with torch.no_grad():
                features = self.model.get_text_features(**tokens.to(self.model.device))
            self._texts[prompt] = _unit(features)[0].cpu()
        return self._texts[prompt]

    @cached_property
    def scale(self) -> float:
        """Factor of cosines in CLIP's logits."""
        return float(self.model.logit_scale.exp())

    @cached_property
    def image_processor(self) -> Any:
        """Image processor of transformers, with Pillow as its backend."""
        from transformers import CLIPImageProcessorPil

        return CLIPImageProcessorPil.from_pretrained(self.processor_folder, local_files_only=True)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of transformers."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.processor_folder, local_files_only=True)

    @cached_property
    def model(self) -> Any:
        """Model of transformers. Raises UserError if a weight is missing or left over."""
        import torch
        from transformers import CLIPModel

        return weights.pretrained(CLIPModel, self.folder, self.where, torch.float32)


def processor_files(folder: Path, where: str) -> list[Path]:
    """Return the files in ``folder`` that determine preprocessing and tokens.

    Raise UserError if one is unreadable, or if none says how images are prepared.
    """
    files = weights.check([folder / name for name in FILES if (folder / name).exists()], where)
    if not any(path.name in PROCESSOR_FILES for path in files):
        raise UserError(f"{where}: {folder} has no {PROCESSOR_FILES[0]}, which says how images are prepared")
    return files


def linear_head(width: int) -> Any:
    """Return LAION's aesthetic predictor, five linear layers without activations; ImageReward has the same head.

    A ModuleDict whose ``layers`` map (B, width) features to (B, 1) scores. Weights are random until loaded.
    """
    from torch.nn import Identity, Linear, ModuleDict, Sequential

    gap = Identity()  # dropout in training; it counts in the official names layers.{0,2,4,6,7}
    wide = (Linear(width, 1024), gap, Linear(1024, 128), gap, Linear(128, 64), gap)
    return ModuleDict({"layers": Sequential(*wide, Linear(64, 16), Linear(16, 1))})


def _unit(features: Any) -> Tensor:
    """Return (B, D) projected features, scaled to length one."""
    import torch

    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    return features / features.norm(dim=-1, keepdim=True)

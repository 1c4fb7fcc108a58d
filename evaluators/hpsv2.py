"""HPSv2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine of an open_clip ViT-H-14's image and text features.

This is a port: the ``hpsv2`` package does not import on today's stack. ``engine: official`` scores with the package's
code, in a separate environment. Departures of the port from ``hpsv2.score``:
1. ``antialias=True`` is pinned in the resize. The package leaves it to torchvision, whose default, and so the scores,
   changed in 0.17.
2. fp32 everywhere; the package uses fp16 autocast on GPUs.
3. Images without three channels are converted to RGB; the package crashes on RGBA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench import official, weights
from alignbench.config import Requirement, UserError
from alignbench.evaluator import (
    Evaluator,
    Metric,
    as_rgb,
    check_range,
    device,
    in_batches,
    map_images,
    to_tensor,
    warn_of_cut,
)

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

CHECKPOINT = "HPS_v2.1_compressed.pt"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP


class HPSv2(Evaluator):
    """HPSv2.1. ``weights``: a hub id, a folder with HPS_v2.1_compressed.pt, a .pt file, or "shapes".

    An ``open_clip_config.json`` next to the weights defines their architecture; without one ``architecture`` does.
    """

    name: ClassVar[str] = "hpsv2"
    seconds_per_image: ClassVar[float | None] = 0.02
    gigabytes: ClassVar[float | None] = 3.9
    version: ClassVar[str] = "2.1-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("hpsv2.1", "cosine"),)
    reward_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    weights: str = "xswu/HPSv2"
    revision: str | None = None
    architecture: str = "ViT-H-14"
    engine: Literal["alignbench", "official"] = "alignbench"  # official: for tables only, without gradient

    @property
    def differentiable(self) -> bool:  # type: ignore[override]  # depends on a setting here
        return self.engine == "alignbench"

    def requirements(self) -> list[Requirement]:
        files, where = [CHECKPOINT], "hpsv2.weights"
        return [weights.requirement(self.weights, where, shapes="hpsv2", revision=self.revision, files=files)]

    @cached_property
    def checkpoint(self) -> Path:
        """The weight file; UserError if it cannot be found, or is not HPSv2.1's by its name."""
        path = self.requirements()[0].path
        if not path.is_dir():
            return path
        if (path / CHECKPOINT).exists():
            return path / CHECKPOINT
        raise UserError(f"hpsv2.weights: {path} has no {CHECKPOINT}; name the .pt file itself")

    def files(self) -> list[Path]:
        config = self.checkpoint.with_name("open_clip_config.json")
        return weights.check([self.checkpoint, *[config] * config.exists()], "hpsv2.weights")

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: ``reward`` of 8-bit pixels, since the official resize works on tensors too."""
        import torch

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            pixels = [self.preprocess(to_tensor(image, device())[None]) for image in map_images(as_rgb, images)]
            return self._cosine(torch.cat(pixels), prompts)

        warn_of_cut(
            self.name, prompts, self._tokenizer.context_length, lambda text: len(self._tokenizer.encode(text)) + 2
        )
        if self.engine == "official":
            return official.score("hpsv2", self.metrics[0].name, self.checkpoint, images, prompts)
        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) cosines; differentiable."""
        official.refuse_reward(self.name, self.engine)
        return self._cosine(self.preprocess(check_range(pixels)), prompts)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Apply HPSv2's ResizeMaxSize (bicubic, antialiased, longest side to the model's, black borders); normalise."""
        from torchvision.transforms.functional import InterpolationMode as Mode
        from torchvision.transforms.functional import normalize, pad, resize

        side = self._config["vision_cfg"]["image_size"]
        scale = side / max(pixels.shape[-2:])
        height, width = (round(length * scale) for length in pixels.shape[-2:])
        pixels = resize(pixels.float(), [height, width], Mode.BICUBIC, antialias=True)
        left, top = (side - width) // 2, (side - height) // 2
        pixels = pad(pixels, [left, top, side - width - left, side - height - top], fill=0)
        return normalize(pixels, MEAN, STD)

    def _cosine(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        import torch

        model = self._model.to(pixels.device)
        image = model.encode_image(pixels, normalize=True)
        text = torch.stack([self._text(prompt.text) for prompt in prompts]).to(pixels.device)
        return (image * text).sum(-1)

    def _text(self, prompt: str) -> Tensor:
        """Return the prompt's (D,) unit feature, computed once and cached on the CPU."""
        import torch

        if prompt not in self._texts:
            model = self._model
            tokens = self._tokenizer(prompt).to(model.logit_scale.device)
            end = int(tokens.argmax()) + 1  # attention is causal: padding after the end token has no effect
            with torch.no_grad():
                x = model.token_embedding(tokens[:, :end]) + model.positional_embedding[:end]
                x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:end, :end]))[0, -1]
                self._texts[prompt] = torch.nn.functional.normalize(x @ model.text_projection, dim=-1).cpu()
        return self._texts[prompt]

    @cached_property
    def _texts(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _config(self) -> dict[str, Any]:
        """Model configuration in open_clip's form."""
        import open_clip

        file = self.checkpoint.with_name("open_clip_config.json")
        if file.exists():
            config = json.loads(file.read_text())
            return config.get("model_cfg", config)
        config = open_clip.get_model_config(self.architecture)
        if config is None:
            raise UserError(f"hpsv2.architecture: open_clip has no '{self.architecture}'; HPSv2.1 is a ViT-H-14")
        return config

    @cached_property
    def _tokenizer(self) -> Any:
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=self._config["text_cfg"].get("context_length", 77))

    @cached_property
    def _model(self) -> Any:
        import torch
        from open_clip import CLIP

        self.files()
        state = weights.load(self.checkpoint, "hpsv2.weights")
        with torch.device("meta"):  # skips seconds of drawing a billion random numbers to be replaced
            model = CLIP(**self._config)
        weights.fill(model, state.get("state_dict", state), self.checkpoint, "hpsv2.weights", assign=True)
        n = model.context_length
        model.attn_mask = torch.full((n, n), float("-inf")).triu(1)  # causal; the only buffer missing from checkpoints
        return model.to(device()).float().eval().requires_grad_(False)

"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP's text encoder attends to the image; a head scores its output.

This is a port to transformers' BLIP: the ``image-reward`` package needs transformers <= 4.55. ``engine: official``
scores with the package's code, in a separate environment. Departures of the port from ``ImageReward.score``:
1. Images are scored in batches; the package takes one image after another.
2. Images become RGB before they are resized, not after: only images with a palette or transparency differ.
3. Weights are loaded strictly; the package ignores missing and unexpected tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench import official, weights
from alignbench.clip import linear_head
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

CHECKPOINT, CONFIG = "ImageReward.pt", "med_config.json"
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json")
SIDE, LIMIT = 224, 35  # pixels; tokens of a prompt that are read, start and end included
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # the package's constants for raw scores
HEAD = 64  # channels per attention head of the vision transformer: ViT-L has 16 heads for 1024 channels
RENAMED = {  # BLIP's names -> transformers'
    "visual_encoder.cls_token": "visual_encoder.embeddings.class_embedding",
    "visual_encoder.pos_embed": "visual_encoder.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "visual_encoder.embeddings.patch_embedding",
    "visual_encoder.norm": "visual_encoder.post_layernorm",
    "visual_encoder.blocks": "visual_encoder.encoder.layers",
    ".attn.qkv": ".self_attn.qkv",
    ".attn.proj": ".self_attn.projection",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
}
TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(Evaluator):
    """ImageReward v1.0. ``weights``: a hub id or a folder with ImageReward.pt and med_config.json.

    Scores are standardised: about N(0, 1), mostly between -2 and 2. As a training reward, ReFL's margin is 2.0.
    """

    name: ClassVar[str] = "imagereward"
    seconds_per_image: ClassVar[float | None] = 0.02
    gigabytes: ClassVar[float | None] = 1.8
    version: ClassVar[str] = "1.0-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("imagereward", "standardised"),)

    weights: str = "THUDM/ImageReward"
    revision: str | None = None
    tokenizer: str = "google-bert/bert-base-uncased"  # a hub id or a folder with BERT's vocab.txt
    engine: Literal["alignbench", "official"] = "alignbench"  # official: for tables only, without gradient

    @property
    def differentiable(self) -> bool:  # type: ignore[override]  # depends on a setting here
        return self.engine == "alignbench"

    def requirements(self) -> list[Requirement]:
        files = [CHECKPOINT, CONFIG]
        return [
            weights.requirement(self.weights, "imagereward.weights", revision=self.revision, files=files),
            weights.requirement(self.tokenizer, "imagereward.tokenizer", files=TOKENIZER_FILES),
        ]

    @cached_property
    def folder(self) -> Path:
        """Folder of weights and configuration; UserError if it cannot be found."""
        return self.requirements()[0].path

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Folder of the vocabulary; UserError if it cannot be found."""
        return self.requirements()[1].path

    def files(self) -> list[Path]:
        files = weights.check([self.folder / CHECKPOINT, self.folder / CONFIG], "imagereward.weights")
        vocabulary, config = (self.tokenizer_folder / name for name in TOKENIZER_FILES)
        return files + weights.check([vocabulary, *[config] * config.exists()], "imagereward.tokenizer")

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: the standardised score, after the official preprocessing."""

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            return self._scores(self.prepare(images).to(device()), prompts)

        warn_of_cut(self.name, prompts, LIMIT, lambda text: len(self._tokenizer.tokenize(text)) + 2)
        if self.engine == "official":
            settings = {"med_config": self.folder / CONFIG, "tokenizer": self.tokenizer_folder}
            checkpoint = self.folder / CHECKPOINT
            return official.score("imagereward", self.metrics[0].name, checkpoint, images, prompts, **settings)
        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) standardised scores; differentiable."""
        official.refuse_reward(self.name, self.engine)
        return self._scores(self.preprocess(check_range(pixels)), prompts)

    def prepare(self, images: Sequence[Image]) -> Tensor:
        """Preprocess images by Pillow, as the package does."""
        import torch
        from torchvision.transforms.functional import normalize

        squares = map_images(lambda image: _square(as_rgb(image)), images)
        return normalize(torch.stack([to_tensor(square) for square in squares]), MEAN, STD)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Preprocess tensors in the same steps: shortest edge (bicubic, antialiased), centre crop, normalisation."""
        from torchvision.transforms.functional import normalize

        return normalize(_square(pixels.float()), MEAN, STD)

    def _scores(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        import torch

        model = self._model.to(pixels.device)
        image = model["visual_encoder"](pixels).last_hidden_state
        settings = {"padding": "max_length", "truncation": True, "max_length": LIMIT, "return_tensors": "pt"}
        text = self._tokenizer([prompt.text for prompt in prompts], **settings).to(pixels.device)
        states = model["text_encoder"](
            text.input_ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=image.device),
        ).last_hidden_state
        raw = model["mlp"]["layers"](states[:, 0])[:, 0]
        return (raw - SCORE_MEAN) / SCORE_STD

    @cached_property
    def _tokenizer(self) -> Any:
        """BERT's tokenizer, with the two tokens that BLIP appends to its vocabulary."""
        from transformers import BertTokenizer

        tokenizer = BertTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from torch.nn import ModuleDict
        from transformers import BlipTextModel, BlipVisionModel

        self.files()
        path = self.folder / CHECKPOINT
        state = _renamed(weights.load(path, "imagereward.weights"))
        try:
            vision = _vision_config(state)
        except KeyError as error:
            raise UserError(f"imagereward.weights: {path} is not ImageReward's: it has no tensor {error}") from None
        text = _text_config(json.loads((self.folder / CONFIG).read_text()), vision.hidden_size)
        parts = {
            "visual_encoder": BlipVisionModel(vision),
            "text_encoder": BlipTextModel(text, add_pooling_layer=False),
            "mlp": linear_head(text.hidden_size),
        }
        model = ModuleDict(parts)
        weights.fill(model, state, path, "imagereward.weights")
        return model.eval().requires_grad_(False)


def _square(image: Any) -> Any:
    """Resize an image or a batch of pixels and crop the middle square, SIDE pixels wide."""
    from torchvision.transforms.functional import InterpolationMode as Mode
    from torchvision.transforms.functional import center_crop, resize

    return center_crop(resize(image, [SIDE], Mode.BICUBIC, antialias=True), [SIDE])


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the official checkpoint under transformers' names, without unused tensors."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        name = name.removeprefix("blip.")
        if name.startswith("visual_encoder."):
            for old, new in RENAMED.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def _text_config(official: Mapping[str, Any], vision_width: int) -> Any:
    """Return med_config.json as transformers' config; ``is_decoder`` is its word for cross-attention in every layer."""
    from transformers import BlipTextConfig

    known = {key: official[key] for key in TEXT_KEYS}
    return BlipTextConfig(**known, encoder_hidden_size=vision_width, is_decoder=True)


def _vision_config(state: Mapping[str, Tensor]) -> Any:
    """Return the vision transformer's config, read off its weights: ViT-L/16 for the official checkpoint."""
    from transformers import BlipVisionConfig

    prefix = "visual_encoder.embeddings."
    patch = state[prefix + "patch_embedding.weight"]
    width, patch_size = patch.shape[0], patch.shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["visual_encoder.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("self_attn.qkv.weight") for name in state),
        num_attention_heads=width // HEAD,
        patch_size=patch_size,
        image_size=patch_size * math.isqrt(state[prefix + "position_embedding"].shape[1] - 1),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )

"""FLUX.1 (dev, schnell, all models in their layout) as a Flow: ``FluxPipeline``'s arithmetic, with gradients.

Latents are packed: (B, tokens, channels), fp32. For a 1024 px image of FLUX.1-dev that is (B, 4096, 64).
The arithmetic follows diffusers' ``FluxPipeline.__call__``; a test checks that they agree to 1e-5.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from alignbench import weights
from alignbench.backends.cost.published_configs import FLUX_1_DEV
from alignbench.backends.kernels import Network
from alignbench.backends.pipeline import (
    TWO_STREAMS,
    Pipeline,
    PipelineBackend,
    PipelineFlow,
    PromptEncoder,
    pack,
    token_ids,
    unpack,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignbench.flow import Cond

HUB = "black-forest-labs/FLUX.1-dev"


class Flux(PipelineBackend):
    """A FluxPipeline folder or hub id, and how it is trained. ``size``, ``guidance``: for training only."""

    name: ClassVar[str] = "flux"
    pipeline: ClassVar[str] = "FluxPipeline"
    network: ClassVar[str] = "FluxTransformer2DModel"
    models: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    dispatches: ClassVar[bool] = True
    published: ClassVar = {HUB: FLUX_1_DEV}

    model: str = HUB  # or a folder, or "shapes"
    size: int = 720  # pixels, square, during training (LeapAlign section 6.1)
    guidance: float = 3.5  # ignored by models without a guidance embedding (schnell)
    max_sequence_length: int = 512  # T5 tokens; never more than the tokenizer's own model_max_length
    lora_targets: tuple[str, ...] = TWO_STREAMS

    @property
    def text_tokens(self) -> int:
        """T5 tokens per prompt."""
        config = {}
        if not weights.absent(self):
            with suppress(OSError):  # then the tokenizer has its default length
                config = json.loads((self.folder / "tokenizer_2" / "tokenizer_config.json").read_text())
        return min(self.max_sequence_length, config.get("model_max_length", self.max_sequence_length))

    def text_limits(self) -> dict[str, int]:
        return {"tokenizer": self.tokenizer_limit("tokenizer"), "tokenizer_2": self.text_tokens}

    @property
    def deterministic(self) -> str | None:
        """Why the model's velocity gives no score, hence no SDE; None if it does. Read from its configuration alone."""
        transformer, scheduler = self.read("transformer"), self.read("scheduler", "scheduler_config.json")
        if transformer.get("guidance_embeds") or scheduler.get("use_dynamic_shifting"):
            return None
        return f"{self.model} is distilled to few steps, as FLUX.1-schnell is: its velocity gives no score"

    def text(self, pipeline: Pipeline, device: torch.device) -> FluxPromptEncoder:
        return FluxPromptEncoder(pipeline, self.max_sequence_length, device)

    def flow(self, pipeline: Pipeline, text: PromptEncoder, device: torch.device) -> FluxFlow:
        return FluxFlow(pipeline, self, text, device)


class FluxFlow(PipelineFlow):
    """A loaded FluxPipeline as a ``Flow``. Its guidance is an input of the network."""

    def __init__(self, pipeline: Pipeline, settings: Flux, text: PromptEncoder, device: torch.device) -> None:
        super().__init__(pipeline, settings, text, device)
        self._ids = lru_cache(self._make_ids)

    def _evaluate(self, network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        import torch

        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=self.device)
        text = cond.tensors["text"]
        return network(
            hidden_states=x,
            timestep=time * 1000 / 1000,  # as FluxPipeline rounds it: the embedding multiplies by 1000 again
            guidance=guidance,
            pooled_projections=cond.tensors["pooled"],
            encoder_hidden_states=text,
            txt_ids=self._ids(0, text.shape[1]),
            img_ids=self._ids(self.grid, 0),
            return_dict=False,
        )[0]

    def sigmas(self, steps: int) -> Tensor:
        """Return FluxPipeline's grid: linspace(1, 1/N, N), shifted by token count as the scheduler says, then 0."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler, config = copy.copy(self.scheduler), self.scheduler.config
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(self.grid**2, *(config.get(name, default) for name, default in names.items()))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return n packed latents ~ N(0, I), sample i from ``generators[i]``, as FluxPipeline draws them on the CPU."""
        import torch

        channels, side = self.transformer.config.in_channels // 4, 2 * self.grid
        rows = [torch.randn((channels, side, side), generator=generators[i]) for i in range(n)]
        return pack(torch.stack(rows)).to(self.device)

    def decode(self, x0: Tensor) -> Tensor:
        """Decode packed latents to pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        config = self.vae.config
        return self._pixels(unpack(x0, self.grid) / config.scaling_factor + config.shift_factor)

    def _make_ids(self, grid: int, words: int) -> Tensor:
        """Return positions (words + grid^2, 3): zeros for text, (0, row, column) for image tokens."""
        import torch

        axis = torch.arange(grid, dtype=torch.float32)
        image = torch.stack(torch.meshgrid(torch.zeros(1), axis, axis, indexing="ij"), -1)
        return torch.cat([torch.zeros(words, 3), image.reshape(-1, 3)]).to(self.device)


class FluxPromptEncoder(PromptEncoder):
    """Encoder to T5 states "text" (L, D), 4 MB for FLUX.1-dev in bfloat16, and CLIP's "pooled" (P)."""

    def __init__(self, pipeline: Pipeline, length: int, device: torch.device) -> None:
        super().__init__(device)
        self.clip, self.clip_tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.t5, self.t5_tokenizer = pipeline.text_encoder_2, pipeline.tokenizer_2
        self.length = min(length, self.t5_tokenizer.model_max_length)

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        import torch

        with torch.no_grad():
            text = self.t5(token_ids(self.t5_tokenizer, prompt, self.length, self.device))[0]
            words = self.clip_tokenizer.model_max_length
            pooled = self.clip(token_ids(self.clip_tokenizer, prompt, words, self.device)).pooler_output
        return {"text": text[0].cpu(), "pooled": pooled[0].cpu()}

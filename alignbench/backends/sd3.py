"""Stable Diffusion 3 and 3.5 as a Flow: ``StableDiffusion3Pipeline``'s arithmetic, with gradients.

Latents are packed: (B, tokens, channels), fp32, as FLUX.1's are. For a 512 px image that is (B, 1024, 64).
The arithmetic follows diffusers' ``StableDiffusion3Pipeline.__call__``; a test checks that they agree to 1e-5.
Departures:
1. The branches of guidance are two calls rather than one with twice the batch, so that each can have its own gradient;
   they are combined in fp32.
2. There is no skip-layer guidance.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from alignbench.backends.cost.published_configs import SD3_5_LARGE, SD3_5_MEDIUM, SD3_MEDIUM
from alignbench.backends.kernels import Network
from alignbench.backends.pipeline import (
    TWO_STREAMS,
    GuidedBackend,
    Pipeline,
    PipelineFlow,
    PromptEncoder,
    pack,
    token_ids,
    unpack,
)
from alignbench.config import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignbench.flow import Cond

CLIP_TOKENS = 77


class SD3(GuidedBackend):
    """A StableDiffusion3Pipeline folder or hub id. ``size``, ``guidance`` and ``spacing`` are for training only."""

    name: ClassVar[str] = "sd3"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    network: ClassVar[str] = "SD3Transformer2DModel"
    models: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")  # T5: zeros take its place
    published: ClassVar = {
        "stabilityai/stable-diffusion-3-medium-diffusers": SD3_MEDIUM,
        "stabilityai/stable-diffusion-3.5-medium": SD3_5_MEDIUM,
        "stabilityai/stable-diffusion-3.5-large": SD3_5_LARGE,
    }
    training_only: ClassVar[tuple[str, ...]] = (*GuidedBackend.training_only, "spacing")

    model: str = "stabilityai/stable-diffusion-3.5-medium"  # or a folder
    size: int = 512  # pixels, square, during training (LeapAlign appendix B, FlowBP)
    guidance: float = 4.5  # classifier-free if above 1; the value of SD3.5-medium's model card
    max_sequence_length: int = 256  # T5 tokens
    spacing: Literal["pipeline", "linear"] = "pipeline"  # before the shift: to 1 / 1000, or 1 / steps as in FlowBP
    lora_targets: tuple[str, ...] = TWO_STREAMS

    def check_size(self, size: int, where: str) -> None:
        """Raise UserError unless ``size`` pixels are a whole number of tokens within the model's positions."""
        super().check_size(size, where)
        tokens = self.read("transformer")["pos_embed_max_size"]
        largest = tokens * 2 ** len(self.read("vae")["block_out_channels"])
        if size > largest:
            raise UserError(f"{where}: {size} pixels exceed this model's {tokens} positions; choose at most {largest}")

    @property
    def text_tokens(self) -> int:
        """Tokens per prompt: CLIP's and T5's."""
        return CLIP_TOKENS + self.max_sequence_length

    def text_limits(self) -> dict[str, int]:
        words = self.tokenizer_limit("tokenizer")  # the pipeline cuts for both CLIPs at the first one's length
        limits = {"tokenizer": words, "tokenizer_2": words, "tokenizer_3": self.max_sequence_length}
        return {part: limits[part] for part in self.present(self.tokenizers)}

    @property
    def deterministic(self) -> str | None:
        """Why the model's velocity gives no score, hence no SDE; None if it does. Only the model's name tells."""
        if "turbo" not in Path(self.model).name:
            return None
        return f"{self.model} is distilled to few steps, as SD3.5-large-turbo is: its velocity gives no score"

    def text(self, pipeline: Pipeline, device: torch.device) -> SD3PromptEncoder:
        width = self.read("transformer")["joint_attention_dim"]
        return SD3PromptEncoder(pipeline, self.max_sequence_length, width, device)

    def flow(self, pipeline: Pipeline, text: PromptEncoder, device: torch.device) -> SD3Flow:
        return SD3Flow(pipeline, self, text, device)


class SD3Flow(PipelineFlow):
    """A loaded StableDiffusion3Pipeline as a ``Flow``."""

    def __init__(self, pipeline: Pipeline, settings: SD3, text: PromptEncoder, device: torch.device) -> None:
        super().__init__(pipeline, settings, text, device)
        self._spacing = settings.spacing

    def at(self, *, size: int | None = None, guidance: float | None = None) -> Self:
        """Return the same model at another size or guidance, for evaluation, and with the pipeline's own grid."""
        view = super().at(size=size, guidance=guidance)
        view._spacing = "pipeline"
        return view

    def _evaluate(self, network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        v = network(
            hidden_states=unpack(x, self.grid),
            timestep=time * 1000,
            encoder_hidden_states=cond.tensors["text"],
            pooled_projections=cond.tensors["pooled"],
            return_dict=False,
        )[0]
        return pack(v)

    def sigmas(self, steps: int) -> Tensor:
        """Return the scheduler's own grid or linspace(1, 1/N, N), shifted as its config says, then 0."""
        import numpy as np
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler, config = copy.copy(self.scheduler), self.scheduler.config
        shift: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16}
            values = (config.get(name, default) for name, default in names.items())
            shift = {"mu": calculate_shift(self.grid**2, *values)}
        if self._spacing == "pipeline":
            scheduler.set_timesteps(steps, **shift)
        else:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
        return scheduler.sigmas

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return n packed latents ~ N(0, I), sample i from ``generators[i]``, as the pipeline draws them on the CPU."""
        import torch

        shape = self.transformer.config.in_channels, 2 * self.grid, 2 * self.grid
        return pack(torch.stack([torch.randn(shape, generator=generators[i]) for i in range(n)])).to(self.device)

    def decode(self, x0: Tensor) -> Tensor:
        """Decode packed latents to pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        config = self.vae.config
        return self._pixels(unpack(x0, self.grid) / config.scaling_factor + config.shift_factor)


class SD3PromptEncoder(PromptEncoder):
    """Encoder to "text" (L, D), both CLIPs' concatenated states followed by T5's, and CLIP projections "pooled" (P)."""

    def __init__(self, pipeline: Pipeline, length: int, width: int, device: torch.device) -> None:
        super().__init__(device)
        self.clips = (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)
        self.t5_tokenizer, self.t5 = pipeline.tokenizer_3, pipeline.text_encoder_3
        self.length, self.width = length, width

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        import torch
        from torch.nn.functional import pad

        words = self.clips[0][0].model_max_length  # the pipeline truncates for both CLIPs at the first one's length
        with torch.no_grad():
            clips = [
                encoder(token_ids(tokenizer, prompt, words, self.device), output_hidden_states=True)
                for tokenizer, encoder in self.clips
            ]
            states = torch.cat([clip.hidden_states[-2] for clip in clips], -1)[0]
            if self.t5 is None:
                t5 = torch.zeros(self.length, self.width).to(states)
            else:
                t5 = self.t5(token_ids(self.t5_tokenizer, prompt, self.length, self.device))[0][0]
        text = torch.cat([pad(states, (0, t5.shape[-1] - states.shape[-1])), t5])
        return {"text": text.cpu(), "pooled": torch.cat([clip.text_embeds for clip in clips], -1)[0].cpu()}

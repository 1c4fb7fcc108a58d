"""FLUX.2 [klein] as a Flow: ``Flux2KleinPipeline``'s arithmetic, with gradients.

Latents are packed: (B, tokens, channels), fp32. For a 512 px image that is (B, 1024, 128).
The arithmetic follows diffusers' ``Flux2KleinPipeline.__call__``; a test checks that they agree to 1e-5. Departure: the
branches of guidance are combined in fp32. The distilled models have one branch, whatever the guidance.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from alignbench import weights
from alignbench.backends.cost.published_configs import FLUX_2_KLEIN_4B, FLUX_2_KLEIN_9B
from alignbench.backends.kernels import Network
from alignbench.backends.pipeline import GuidedBackend, Pipeline, PipelineFlow, PromptEncoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignbench.flow import Cond

HUB = "black-forest-labs/FLUX.2-klein"
PUBLISHED = {f"{HUB}-base-4B": FLUX_2_KLEIN_4B, f"{HUB}-base-9B": FLUX_2_KLEIN_9B}
DISTILLED = {f"{HUB}-4B": FLUX_2_KLEIN_4B, f"{HUB}-9B": FLUX_2_KLEIN_9B}
CHAT = 12  # tokens of Qwen3's chat template around a prompt
LAYERS = (9, 18, 27)  # of Qwen3: their hidden states condition the transformer
SINGLE_BLOCKS = 24  # in klein 9B; 4B has 20


class Flux2(GuidedBackend):
    """A Flux2KleinPipeline folder or hub id, and how it is trained. ``size``, ``guidance``: for training only."""

    name: ClassVar[str] = "flux2"
    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    network: ClassVar[str] = "Flux2Transformer2DModel"
    models: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    dispatches: ClassVar[bool] = True
    published: ClassVar = PUBLISHED | DISTILLED

    model: str = f"{HUB}-base-9B"  # or a folder
    size: int = 512  # pixels, square, during training (FlowBP)
    guidance: float = 4.0  # classifier-free if above 1; the pipeline's and FlowBP's value
    max_sequence_length: int = 512  # tokens of Qwen3, its chat template included
    lora_targets: tuple[str, ...] = (  # the attention of both streams, and their feed-forward layers
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        # single blocks fuse both; "attn.to_out" alone would also match a ModuleList of the double blocks
        *("attn.to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(SINGLE_BLOCKS))),
    )

    @property
    def text_tokens(self) -> int:
        """Tokens per prompt."""
        return self.max_sequence_length

    def text_limits(self) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length - CHAT}

    @property
    def distilled(self) -> bool:
        """True for a model distilled to few steps: by ``model_index.json`` or, before it is fetched, by its name."""
        return self.model in DISTILLED if weights.absent(self) else bool(self.index.get("is_distilled"))

    def branches(self, guidance: float) -> int:
        return 1 if self.distilled else super().branches(guidance)

    @property
    def deterministic(self) -> str | None:
        """Why the model's velocity gives no score, hence no SDE; None if it does. Read from its configuration alone."""
        return f"{self.model} is distilled to few steps: its velocity gives no score" if self.distilled else None

    def text(self, pipeline: Pipeline, device: torch.device) -> Flux2PromptEncoder:
        return Flux2PromptEncoder(pipeline, self.max_sequence_length, device)

    def flow(self, pipeline: Pipeline, text: PromptEncoder, device: torch.device) -> Flux2Flow:
        return Flux2Flow(pipeline, self, text, device)


class Flux2Flow(PipelineFlow):
    """A loaded Flux2KleinPipeline as a ``Flow``."""

    def __init__(self, pipeline: Pipeline, settings: Flux2, text: PromptEncoder, device: torch.device) -> None:
        super().__init__(pipeline, settings, text, device)
        self._ids = lru_cache(self._make_ids)

    def _evaluate(self, network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text = cond.tensors["text"]
        return network(
            hidden_states=x,
            timestep=time * 1000 / 1000,  # as the pipeline rounds it: the network multiplies by 1000 again
            encoder_hidden_states=text,
            txt_ids=self._ids(0, text.shape[1]),
            img_ids=self._ids(self.grid, 0),
            return_dict=False,
        )[0]

    def sigmas(self, steps: int) -> Tensor:
        """Return the pipeline's grid: linspace(1, 1/N, N), shifted by the numbers of tokens and steps, then 0."""
        import numpy as np
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        scheduler = copy.copy(self.scheduler)
        mu = compute_empirical_mu(image_seq_len=self.grid**2, num_steps=steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return n packed latents ~ N(0, I), sample i from ``generators[i]``, as the pipeline draws them on the CPU."""
        import torch

        shape = self.transformer.config.in_channels, self.grid, self.grid
        rows = [torch.randn(shape, generator=generators[i]) for i in range(n)]
        return torch.stack(rows).flatten(2).transpose(1, 2).contiguous().to(self.device)

    def decode(self, x0: Tensor) -> Tensor:
        """Decode packed latents to pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        norm = self.vae.bn  # only its stored statistics are used
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt().to(x0)
        return self._pixels(unpatch(x0 * std + norm.running_mean.to(x0), self.grid))

    def _make_ids(self, grid: int, words: int) -> Tensor:
        """Return positions (words + grid^2, 4): (0, 0, 0, i) for text, (0, row, column, 0) for image tokens."""
        import torch

        one = torch.zeros(1, dtype=torch.int64)
        text = torch.cartesian_prod(one, one, one, torch.arange(words))
        image = torch.cartesian_prod(one, torch.arange(grid), torch.arange(grid), one)
        return torch.cat([text, image]).to(self.device)


class Flux2PromptEncoder(PromptEncoder):
    """Encoder to "text" (L, 3D), the states of three Qwen3 layers: 12.6 MB per prompt for klein 9B in bfloat16."""

    def __init__(self, pipeline: Pipeline, length: int, device: torch.device) -> None:
        super().__init__(device, cached=1024)
        self.qwen, self.tokenizer, self.length = pipeline.text_encoder, pipeline.tokenizer, length

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        import torch

        messages = [{"role": "user", "content": prompt}]
        chat = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        inputs = self.tokenizer(
            self.tokenizer.apply_chat_template(messages, **chat),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        with torch.no_grad():  # without the language head, whose logits are not needed
            states = self.qwen.model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        return {"text": torch.cat([states[layer][0] for layer in LAYERS], -1).cpu()}


def unpatch(tokens: Tensor, grid: int) -> Tensor:
    """Turn tokens, each a 2 x 2 patch channel by channel, into latents: (B, grid^2, 4C) -> (B, C, 2 grid, 2 grid)."""
    b, _, channels = tokens.shape
    z = tokens.transpose(1, 2).reshape(b, channels // 4, 2, 2, grid, grid).permute(0, 1, 4, 2, 5, 3)
    return z.reshape(b, channels // 4, 2 * grid, 2 * grid)

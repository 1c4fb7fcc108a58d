"""FLUX.1 (dev, schnell, all models in their layout) as a Flow: ``FluxPipeline``'s arithmetic, opened for gradients.

Latents are packed: (B, tokens, channels), fp32. For a 1024 px image of FLUX.1-dev that is (B, 4096, 64).
The arithmetic follows diffusers' ``FluxPipeline.__call__``; a test holds the two together to 1e-5.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench import weights
from alignbench.config import Config, Missing, UserError
from alignbench.cost import FLUX_1_DEV, Model

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from alignbench.flow import Cond

Pipeline = Any  # diffusers.FluxPipeline, whose parts type checkers cannot see
Network = Any  # diffusers.FluxTransformer2DModel
Split = Callable[[Network, Sequence[Network], Any, bool], None]  # network, blocks, computing type, is it trained?

HUB = "black-forest-labs/FLUX.1-dev"
MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
PROMPTS_KEPT = 4096  # encoded prompts in host memory; FLUX.1-dev's are 4 MB each in bfloat16


class Flux(Config):
    """A FluxPipeline folder or hub id, and how it is trained. ``size``, ``guidance``: of training, not evaluation."""

    name: ClassVar[str] = "flux"
    training_only: ClassVar[tuple[str, ...]] = (  # settings that do not change the untrained model's images
        *("size", "guidance", "lora_rank", "lora_alpha", "lora_targets", "clamp", "gradient_checkpointing"),
    )
    model: str = HUB  # or a folder, or "shapes"
    revision: str | None = None
    size: int = 720  # pixels, square, during training (LeapAlign section 6.1)
    guidance: float = 3.5  # ignored by models without a guidance embedding (schnell)
    max_sequence_length: int = 512  # T5 tokens; never more than the tokenizer's own model_max_length
    tune: Literal["full", "lora"] = "full"
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = (  # the attention of both streams, and their feed-forward layers
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    dtype: Literal["float32", "bfloat16"] = (
        "bfloat16"  # of frozen weights and of autocast; trained weights stay float32
    )
    clamp: Literal["hard", "straight_through"] = "hard"  # gradient of the final clamp to [0, 1]: zero outside, or one
    gradient_checkpointing: bool = False  # of the transformer's blocks and of the decoder

    @cached_property
    def folder(self) -> Path:
        """Where the pipeline lies. UserError if nowhere."""
        return weights.locate(self.model, "backend.model", shapes="model", revision=self.revision)

    def files(self) -> list[Path]:
        """Every file that determines the model, checked without loading it. UserError for the first bad one."""
        index = self.folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"backend.model: {self.folder} has no model_index.json; flux needs a FluxPipeline folder")
        weights.check([index], "backend.model")
        kind = json.loads(index.read_text()).get("_class_name")
        if kind != "FluxPipeline":
            raise UserError(f"backend.model: {self.folder} holds a {kind}; flux needs a FluxPipeline")
        self.check_size(self.size, "backend.size")
        found = [index, *weights.check([self.folder / "scheduler" / "scheduler_config.json"], "backend.model")]
        for part in MODELS:
            found += weights.model_files(self.folder / part, "backend.model")
        for part in TOKENIZERS:
            kept = [path for path in (self.folder / part).glob("*") if path.is_file()]
            if not kept:
                raise UserError(f"backend.model: {self.folder / part} is missing or empty")
            found += weights.check(kept, "backend.model")
        return found

    def check_size(self, size: int, where: str) -> None:
        """UserError unless ``size`` pixels are a whole number of tokens."""
        if size < self.patch or size % self.patch:
            what = f"{size} pixels are not a multiple of {self.patch}, the side of this model's tokens"
            raise UserError(f"{where}: {what}")

    @property
    def patch(self) -> int:
        """Pixels along a token's side: the autoencoder's factor x packing's 2."""
        config = self.folder / "vae" / "config.json"
        weights.check([config], "backend.model")
        return 2 ** len(json.loads(config.read_text())["block_out_channels"])

    @property
    def measures(self) -> Model | None:
        """For plans: by its configuration, or FLUX.1-dev's published one where that is not there. None: not known."""
        try:
            files = {part: self.folder / part / "config.json" for part in MODELS}
        except Missing:
            return Model.read(FLUX_1_DEV) if self.model == HUB else None
        weights.check(files.values(), "backend.model")
        return Model.read({part: json.loads(path.read_text()) for part, path in files.items()})

    @property
    def text_tokens(self) -> int:
        """T5 tokens of a prompt."""
        try:
            config = json.loads((self.folder / "tokenizer_2" / "tokenizer_config.json").read_text())
        except (Missing, OSError):
            config = {}
        return min(self.max_sequence_length, config.get("model_max_length", self.max_sequence_length))

    @property
    def deterministic(self) -> str | None:
        """Why this model gives no score, hence no SDE; None where it does. Read from its configuration alone."""
        parts = [self.folder / "transformer" / "config.json", self.folder / "scheduler" / "scheduler_config.json"]
        weights.check(parts, "backend.model")
        transformer, scheduler = (json.loads(path.read_text()) for path in parts)
        if transformer.get("guidance_embeds") or scheduler.get("use_dynamic_shifting"):
            return None
        return f"{self.model} is distilled to few steps, as FLUX.1-schnell is: its velocity gives no score"

    def load(self, accelerator: Accelerator | None = None) -> FluxFlow:
        """The model on ``accelerator``'s device (the CPU without one), ready to train."""
        import torch

        self.files()
        device = torch.device("cpu") if accelerator is None else accelerator.device
        pipeline = self._pipeline().to(device)
        for part in MODELS:
            getattr(pipeline, part).requires_grad_(False).eval()
        if self.tune == "lora":
            self._add_lora(pipeline.transformer)
        else:
            pipeline.transformer.requires_grad_(True)
        if self.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        return FluxFlow(pipeline, self, device)

    def _pipeline(self) -> Pipeline:
        import torch
        from diffusers import FluxPipeline

        frozen = getattr(torch, self.dtype)
        trained = torch.float32 if self.tune == "full" else frozen
        with weights.quiet():
            return FluxPipeline.from_pretrained(
                self.folder, dtype={"transformer": trained, "default": frozen}, local_files_only=True
            )

    def _base(self, device: torch.device) -> Network:
        """The untouched transformer, read again from disk: training has already moved the one in memory."""
        import torch
        from diffusers import FluxTransformer2DModel

        with weights.quiet():
            base = FluxTransformer2DModel.from_pretrained(
                self.folder, subfolder="transformer", dtype=getattr(torch, self.dtype), local_files_only=True
            )
        return base.to(device).requires_grad_(False).eval()

    def _add_lora(self, transformer: Network) -> None:
        """Adapters in float32, the same on every rank and in every run: A random from a fixed seed, B zero."""
        import torch
        from peft import LoraConfig

        config = LoraConfig(r=self.lora_rank, lora_alpha=self.lora_alpha, target_modules=list(self.lora_targets))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                transformer.add_adapter(config)
            except ValueError as error:
                raise UserError(f"backend.lora_targets: {' '.join(str(error).split())}") from None
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()


class FluxFlow:
    """A loaded pipeline as a ``Flow``. Views made by ``at`` share weights, adapters and encoded prompts."""

    def __init__(self, pipeline: Pipeline, settings: Flux, device: torch.device) -> None:
        self.device = device
        self.size, self.guidance = settings.size, settings.guidance
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.scheduler = pipeline.scheduler
        self._settings = settings
        self._text = Text(pipeline, settings.max_sequence_length, device)
        # The base model, where switching adapters off does not give it: None until it is used. Shared by all views.
        self._apart: dict[str, Network | None] = {"base": None} if settings.tune == "full" else {}
        self._split: Split | None = None  # what keeps a part of a network on each rank, once told to
        self._ids = lru_cache(self._make_ids)

    def at(self, *, size: int | None = None, guidance: float | None = None) -> FluxFlow:
        """The same model at another image size or guidance, for evaluation. UserError for an impossible size."""
        view = copy.copy(self)
        view.size = self.size if size is None else size
        view.guidance = self.guidance if guidance is None else guidance
        self._settings.check_size(view.size, "size")
        return view

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return self.size // 2 ** len(self.vae.config.block_out_channels)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """v(x, sigma, cond), fp32, shape of ``x`` (B, tokens, channels). ``sigma``: a number or one per sample."""
        import torch

        time = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x))
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=self.device)
        text = cond.tensors["text"]
        with self._network(reference) as network, self._autocast():
            v = network(
                hidden_states=x,
                timestep=time * 1000 / 1000,  # FluxPipeline's own rounding: the embedding multiplies by 1000 again
                guidance=guidance,
                pooled_projections=cond.tensors["pooled"],
                encoder_hidden_states=text,
                txt_ids=self._ids(0, text.shape[1]),
                img_ids=self._ids(self.grid, 0),
                return_dict=False,
            )[0]
        return v.float()

    def sigmas(self, steps: int) -> Tensor:
        """FluxPipeline's grid: linspace(1, 1/N, N), shifted by token count as the scheduler's config says, then 0."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler, config = copy.copy(self.scheduler), self.scheduler.config
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(self.grid**2, *(config.get(name, default) for name, default in names.items()))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """n packed latents ~ N(0, I), sample i from ``generators[i]``: FluxPipeline's own draw from CPU generators."""
        import torch

        channels, side = self.transformer.config.in_channels // 4, 2 * self.grid
        rows = [torch.randn((channels, side, side), generator=generators[i]) for i in range(n)]
        return pack(torch.stack(rows)).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Text conditioning: T5 states "text" (B, L, D), CLIP's "pooled" (B, P). Each prompt is encoded once, alone."""
        return self._text(prompts)

    def decode(self, x0: Tensor) -> Tensor:
        """Packed latents -> pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        config = self.vae.config
        z = unpack(x0, self.grid) / config.scaling_factor + config.shift_factor
        pixels = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float() * 0.5 + 0.5
        if self._settings.clamp == "hard":
            return pixels.clamp(0, 1)
        from alignbench.flow import straight_through

        return straight_through(pixels.clamp(0, 1), pixels)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trained parameters, by the names that diffusers gives them."""
        return ((name, p) for name, p in self.transformer.named_parameters() if p.requires_grad)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def shard(self, split: Split) -> None:
        """Several ranks keep a part of the transformer each, and so of the base's own copy if there is one."""
        self._split = split
        split(self.transformer, _blocks(self.transformer), self._dtype, True)

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self._settings.dtype)

    def load_transformer(self, files: Sequence[Path]) -> None:
        """Put published weights in the transformer's place. UserError for a name or a shape that does not fit."""
        from safetensors.torch import load_file

        from alignbench.checkpoint import copy_parameters

        self._check_config([path for path in files if path.name == "config.json"])
        shards = [path for path in files if path.suffix == ".safetensors"]
        stored = {name: tensor for path in shards for name, tensor in load_file(path).items()}  # mapped, not read yet
        own = self.transformer.state_dict()
        plain = {name.replace(".base_layer", ""): tensor for name, tensor in own.items() if ".lora_" not in name}
        copy_parameters(plain, stored, shards[0])
        self._apart.setdefault("base", None)

    def load_lora(self, files: Sequence[Path]) -> None:
        """Put published adapters on. UserError for a name or a shape that does not fit."""
        from alignbench.adapters import read_lora

        adapters = read_lora(files, dict(self.transformer.named_modules()))
        self.transformer.load_lora_adapter(adapters, prefix=None, adapter_name="published")
        self.transformer.set_adapter("published")
        for name, parameter in self.transformer.named_parameters():
            if ".published." in name:
                parameter.data = parameter.data.float()

    def _check_config(self, configs: Sequence[Path]) -> None:
        """UserError for a setting that differs from this model's: not all of them show in the weights' shapes."""
        ours = json.loads(self.transformer.to_json_string())
        for path in configs:
            theirs = json.loads(path.read_text())
            common = [key for key in theirs.keys() & ours.keys() if key == "_class_name" or key[0] != "_"]
            if odd := sorted(key for key in common if theirs[key] != ours[key]):
                what = f"{odd[0]} is {theirs[odd[0]]} and the model's is {ours[odd[0]]}"
                raise UserError(f"{path}: {what}; these are weights of another model")

    def _autocast(self):
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._settings.dtype == "bfloat16")

    @contextmanager
    def _network(self, reference: bool) -> Iterator[Network]:
        """The transformer as trained, or as it was before training: without its adapters, or read again from disk."""
        if not reference:
            yield self.transformer
        elif "base" in self._apart:
            if self._apart["base"] is None:
                self._apart["base"] = self._settings._base(self.device)
                if self._split is not None:
                    self._split(self._apart["base"], _blocks(self._apart["base"]), self._dtype, False)
            yield self._apart["base"]
        else:
            checkpointing = self.transformer.gradient_checkpointing
            self.transformer.disable_adapters()
            self.transformer.gradient_checkpointing = False  # a recomputation would run after the adapters are back
            try:
                yield self.transformer
            finally:
                self.transformer.enable_adapters()
                self.transformer.gradient_checkpointing = checkpointing

    def _make_ids(self, grid: int, words: int) -> Tensor:
        """(words + grid^2, 3) positions: zeros for text, (0, row, column) for image tokens."""
        import torch

        axis = torch.arange(grid, dtype=torch.float32)
        image = torch.stack(torch.meshgrid(torch.zeros(1), axis, axis, indexing="ij"), -1)
        return torch.cat([torch.zeros(words, 3), image.reshape(-1, 3)]).to(self.device)


def _blocks(transformer: Network) -> list[Network]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


class Text:
    """The two text encoders. One prompt at a time: an embedding must not depend on its neighbours' rounding."""

    def __init__(self, pipeline: Pipeline, length: int, device: torch.device) -> None:
        self.clip, self.clip_tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.t5, self.t5_tokenizer = pipeline.text_encoder_2, pipeline.tokenizer_2
        self.length = min(length, self.t5_tokenizer.model_max_length)
        self.device = device
        self._encode = lru_cache(PROMPTS_KEPT)(self._encode_one)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        import torch

        from alignbench.flow import Cond

        pairs = [self._encode(prompt) for prompt in prompts]
        text, pooled = (torch.stack(rows).to(self.device) for rows in zip(*pairs))
        return Cond({"text": text, "pooled": pooled})

    def _encode_one(self, prompt: str) -> tuple[Tensor, Tensor]:
        import torch

        def ids(tokenizer, length: int) -> Tensor:
            return tokenizer(
                prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids.to(self.device)

        with torch.no_grad():
            text = self.t5(ids(self.t5_tokenizer, self.length))[0]
            pooled = self.clip(ids(self.clip_tokenizer, self.clip_tokenizer.model_max_length)).pooler_output
        return text[0].cpu(), pooled[0].cpu()


def pack(z: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, h * w, 4C): every 2 x 2 patch becomes a token."""
    b, c, height, width = z.shape
    z = z.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, height // 2 * (width // 2), 4 * c)


def unpack(tokens: Tensor, grid: int) -> Tensor:
    """The inverse of ``pack`` for a square of ``grid`` x ``grid`` tokens."""
    b, _, channels = tokens.shape
    z = tokens.view(b, grid, grid, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, channels // 4, 2 * grid, 2 * grid)

"""Diffusers' pipelines as backends: files, loading, adapters, the base model and encoded prompts.

Latents are packed: (B, tokens, channels), fp32. Each backend adds how its pipeline encodes a prompt, calls its network,
spaces its sigmas and decodes.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from alignbench import weights
from alignbench.backends.cost.counted import Outline
from alignbench.backends.cost.formulas import Model, has_formulas
from alignbench.backends.kernels import (
    Network,
    check_attention,
    check_compiler,
    compile_blocks,
    set_attention,
    transformer_blocks,
    try_attention,
)
from alignbench.config import Config, Requirement, UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from alignbench.flow import Cond

Pipeline = Any  # a diffusers pipeline, whose attributes type checkers cannot see
Shard = Callable[[Network, Sequence[Network], Any, bool], None]  # (network, blocks, dtype of computation, trained)

INDEX = "model_index.json"
BACKENDS = {"FluxPipeline": "flux", "StableDiffusion3Pipeline": "sd3", "Flux2KleinPipeline": "flux2"}
# Settings that do not change the untrained model's images.
TRAINING_ONLY = ("size", "guidance", "lora_rank", "lora_alpha", "lora_targets", "clamp", "gradient_checkpointing")

TWO_STREAMS = (  # LoRA targets: attention and feed-forward layers of both streams
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)


class PipelineBackend(Config):
    """A pipeline, by its folder or hub id, and how it is trained. ``size``, ``guidance``: for training only."""

    pipeline: ClassVar[str]  # diffusers' class, as model_index.json names it ...
    network: ClassVar[str]  # ... and that of its transformer
    models: ClassVar[tuple[str, ...]]  # subfolders with weights
    tokenizers: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()  # those that a model_index.json may have as null
    published: ClassVar[Mapping[str, Mapping[str, Any]]]  # hub id -> configurations by subfolder, for plans
    training_only: ClassVar[tuple[str, ...]] = TRAINING_ONLY
    refused: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "dtype": {"float16": "float16 ends at 65,504, which activations exceed, and its gradients vanish unscaled"}
    }
    dispatches: ClassVar[bool] = False  # True if diffusers can choose the network's attention kernel
    text_version: ClassVar[str] = "1"  # changes whenever the same files give a prompt another embedding

    model: str  # or a folder
    size: int  # pixels, square, during training
    guidance: float
    lora_targets: tuple[str, ...]
    revision: str | None = None
    tune: Literal["full", "lora"] = "full"
    lora_rank: int = 32
    lora_alpha: int = 64
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of frozen weights and autocast; trained ones stay float32
    clamp: Literal["hard", "straight_through"] = "hard"  # gradient of the final clamp to [0, 1]: zero outside, or one
    gradient_checkpointing: bool = False  # of the transformer's blocks and of the decoder
    compile: bool = False  # torch.compile the transformer's blocks: faster, but rounding differs
    attention: str = "native"  # the transformer's attention kernel, by diffusers' name; native: torch's choice
    # computed: each prompt is encoded when first needed. stored: all prompts are encoded before the model is loaded and
    # kept in the store, so that text encoders take no memory beside the transformer. Same bits; not part of the run id.
    embeddings: Literal["computed", "stored"] = "computed"

    def requirements(self) -> list[Requirement]:
        return [weights.requirement(self.model, "backend.model", shapes="model", revision=self.revision)]

    @cached_property
    def folder(self) -> Path:
        """The pipeline's local folder. UserError if there is none."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        """Return every file that determines the model, checked without loading it. UserError for the first bad one."""
        path = self.folder / INDEX
        needs = f"{self.name} needs a {self.pipeline}"  # type: ignore[attr-defined]  # of the backend's class
        if not path.is_file():
            raise UserError(f"backend.model: {self.folder} has no {INDEX}; {needs} folder")
        if (kind := self.index.get("_class_name")) != self.pipeline:
            instead = f"choose backend.name: {BACKENDS[kind]}" if kind in BACKENDS else f"no backend reads a {kind}"
            raise UserError(f"backend.model: {self.folder} holds a {kind}; {needs}; {instead}")
        self.check_size(self.size, "backend.size")
        check_attention(self.attention, self.name, self.dispatches)  # type: ignore[attr-defined]
        paths = [path, *weights.check([self.folder / "scheduler" / "scheduler_config.json"], "backend.model")]
        for part in self.present(self.models):
            if part not in self.encoders:
                paths += weights.model_files(self.folder / part, "backend.model")
        return paths + self.text_files()

    @property
    def encoders(self) -> list[str]:
        """Subfolders of the text encoders."""
        return [part for part in self.present(self.models) if part.startswith("text_encoder")]

    def text_files(self) -> list[Path]:
        """Return every file that determines a prompt's embedding. UserError for the first bad one."""
        paths = [path for part in self.encoders for path in weights.model_files(self.folder / part, "backend.model")]
        for part in self.present(self.tokenizers):
            files = [path for path in (self.folder / part).glob("*") if path.is_file()]
            if not files:
                raise UserError(f"backend.model: {self.folder / part} is missing or empty")
            paths += weights.check(files, "backend.model")
        return paths

    def text_limits(self) -> dict[str, int]:
        """Return how many tokens of a prompt, start and end included, the model reads: {tokenizer's folder: limit}."""
        return {}

    def tokenizer_limit(self, part: str) -> int:
        """Return the limit that a tokenizer's own configuration gives."""
        file = "tokenizer_config.json"
        config = self.read(part, file) if (self.folder / part / file).is_file() else {}
        return config.get("model_max_length", sys.maxsize)

    @property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json: the class of every part, and settings. UserError if it cannot be read."""
        return self.read(".", INDEX)

    def present(self, parts: Sequence[str]) -> list[str]:
        """Return ``parts`` without the optional ones that this model lacks."""
        return [part for part in parts if part not in self.optional or self.index.get(part, [None])[0] is not None]

    def check_size(self, size: int, where: str) -> None:
        """Raise UserError unless ``size`` pixels are a whole number of tokens."""
        if size < self.patch or size % self.patch:
            what = f"{size} pixels are not a multiple of {self.patch}, the side of this model's tokens"
            raise UserError(f"{where}: {what}")

    @property
    def patch(self) -> int:
        """Pixels along a token's side: the autoencoder's factor, times 2 for packing."""
        return 2 ** len(self.read("vae")["block_out_channels"])

    def read(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """Return the configuration of a part. UserError if it cannot be read."""
        path = self.folder / part / file
        weights.check([path], "backend.model")
        return json.loads(path.read_text())

    @property
    def cost_model(self) -> Model | None:
        """Formulas for plans, from the model's configuration or, before it is fetched, the published one.

        None if there are no formulas. Text encoders are left out if they are not loaded beside the transformer.
        """
        configs: Mapping[str, Any]
        if weights.absent(self):
            configs = self.published.get(self.model, {})
        else:
            configs = {part: self.read(part) for part in self.present(self.models)}
        if not configs or not has_formulas(configs):
            return None
        model = Model.read(configs)
        return model._replace(encoders=()) if self.embeddings == "stored" else model

    def outline(self) -> Outline:
        """Return the model built from its configurations, without weights: for plans of models without formulas."""
        import diffusers
        import torch

        with torch.device("meta"):
            parts = {part: self._weightless(part) for part in self.present(self.models)}
        absent = dict.fromkeys(set(self.optional) - set(self.present(self.optional)))
        with weights.quiet():
            pipeline = getattr(diffusers, self.pipeline).from_pretrained(
                self.folder, local_files_only=True, **parts, **absent
            )
        flow = self.flow(pipeline, self.text(pipeline, torch.device("cpu")), torch.device("cpu"))
        encoders = [parts[part] for part in self.encoders]
        computed = self.embeddings == "computed"
        return Outline(flow, pipeline.transformer, [pipeline.vae, *encoders * computed], encoders * (not computed))

    def _weightless(self, part: str) -> Network:
        """Return a part of the pipeline, built from its configuration alone."""
        library, name = self.index[part]
        kind, config = getattr(importlib.import_module(library), name), self.read(part)
        module = kind.from_config(config) if library == "diffusers" else kind(kind.config_class.from_dict(config))
        return module.requires_grad_(False).eval()

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def branches(self, guidance: float) -> int:
        """Return the network evaluations for one velocity: two with classifier-free guidance."""
        return 1

    def load(self, accelerator: Accelerator | None = None, text: PromptEncoder | None = None) -> PipelineFlow:
        """Return the model on ``accelerator``'s device (the CPU without one), ready to train.

        ``text``: as for ``load_pipeline``.
        """
        pipeline, device = self.load_pipeline(accelerator, text)
        return self.flow(pipeline, text or self.text(pipeline, device), device)

    def load_pipeline(
        self, accelerator: Accelerator | None, text: PromptEncoder | None = None
    ) -> tuple[Pipeline, torch.device]:
        """Return the pipeline, prepared for training, and its device: ``accelerator``'s, or the CPU.

        ``text``: encodes prompts in place of the pipeline's text encoders, which are then not loaded.
        """
        import torch

        self.files()
        device = torch.device("cpu") if accelerator is None else accelerator.device
        try_attention(self.attention, self._dtype, self.read("transformer").get("attention_head_dim", 64), device)
        if self.compile:
            check_compiler(device)
        pipeline = self._pipeline(() if text is None else (*self.encoders, *self.tokenizers)).to(device)
        self.prepare(pipeline)
        return pipeline, device

    def prepare(self, pipeline: Pipeline) -> None:
        """Make the transformer ready to train, and freeze everything else."""
        _freeze(pipeline, self.present(self.models))
        if self.tune == "lora":
            self._add_lora(pipeline.transformer)
        else:
            pipeline.transformer.requires_grad_(True)
        if self.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        if self.dispatches:
            set_attention(pipeline.transformer, self.attention)
        if self.compile:
            compile_blocks(pipeline.transformer)

    def load_text_encoders(self, device: torch.device) -> PromptEncoder:
        """Return what encodes prompts, loading only the pipeline's text encoders."""
        self.files()
        pipeline = self._pipeline(("transformer", "vae")).to(device)
        _freeze(pipeline, self.encoders)
        return self.text(pipeline, device)

    def text(self, pipeline: Pipeline, device: torch.device) -> PromptEncoder:
        """Return what encodes prompts with a loaded pipeline's text encoders."""
        raise NotImplementedError

    def flow(self, pipeline: Pipeline, text: PromptEncoder, device: torch.device) -> PipelineFlow:
        """Return a loaded pipeline as a ``Flow``."""
        raise NotImplementedError

    def _pipeline(self, without: Sequence[str] = ()) -> Pipeline:
        """Load the pipeline, except for the parts in ``without``."""
        import diffusers
        import torch

        frozen = self._dtype
        trained = torch.float32 if self.tune == "full" else frozen
        absent = set(self.optional) - set(self.present(self.optional))
        with weights.quiet():
            return getattr(diffusers, self.pipeline).from_pretrained(
                self.folder,
                dtype={"transformer": trained, "default": frozen},
                local_files_only=True,
                **dict.fromkeys([*without, *absent]),  # None: otherwise diffusers asks for them
            )

    def base(self, device: torch.device) -> Network:
        """Return the untrained transformer, read from disk again: the one in memory may have been trained."""
        import diffusers

        with weights.quiet():
            base = getattr(diffusers, self.network).from_pretrained(
                self.folder, subfolder="transformer", dtype=self._dtype, local_files_only=True
            )
        if self.dispatches:
            set_attention(base, self.attention)
        return base.to(device).requires_grad_(False).eval()

    def _add_lora(self, transformer: Network) -> None:
        """Add adapters in float32, the same on every rank and in every run: A is drawn with a fixed seed, B is zero."""
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
        _disable_input_casts(transformer)


class GuidedBackend(PipelineBackend):
    """A pipeline with classifier-free guidance: above 1, every velocity takes a second evaluation of the network."""

    training_only: ClassVar[tuple[str, ...]] = (*TRAINING_ONLY, "negative_gradient")

    negative_gradient: Literal["full", "stop"] = "full"  # full: also through the evaluation of the empty prompt

    def branches(self, guidance: float) -> int:
        return 2 if guidance > 1 else 1


class PipelineFlow:
    """A loaded pipeline as a ``Flow``. Views made by ``at`` share weights, adapters and encoded prompts."""

    def __init__(self, pipeline: Pipeline, settings: Any, text: PromptEncoder, device: torch.device) -> None:
        self.device = device
        self.size, self.guidance = settings.size, settings.guidance
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.scheduler = pipeline.scheduler
        self._settings, self._text = settings, text
        # A separate base model, if disabling adapters does not give it; None until it is used. Shared by all views.
        self._separate: dict[str, Network | None] = {"base": None} if settings.tune == "full" else {}
        self._shard: Shard | None = None  # shards a network, once ``shard`` was called
        self._empty = lru_cache(lambda: text([""]))  # on the device: needed in every guided call

    def at(self, *, size: int | None = None, guidance: float | None = None) -> Self:
        """Return the same model at another image size or guidance, for evaluation. UserError for an impossible size."""
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
        """Return v(x, sigma, cond), fp32, shape of ``x`` (B, tokens, channels). ``sigma``: a number or one per sample.

        With guidance in two branches: v_neg + guidance (v_pos - v_neg), where v_neg is for the empty prompt. The base
        model's gradient is always exact: ``negative_gradient`` concerns training alone.
        """
        import torch

        from alignbench.flow import Cond, guided

        time = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x))
        if self._settings.branches(self.guidance) == 1:
            with self._network(reference) as network, self._autocast():
                return self._evaluate(network, x, time, cond).float()
        empty = Cond({name: t.expand(len(x), *t.shape[1:]) for name, t in self._empty().tensors.items()})
        with self._network(reference) as network, self._autocast():
            return guided(
                lambda: self._evaluate(network, x, time, cond).float(),
                lambda: self._evaluate(network, x, time, empty).float(),
                self.scale,
                "full" if reference else self._settings.negative_gradient,
            )

    @property
    def scale(self) -> float | Tensor:
        """The factor of v_pos - v_neg."""
        return self.guidance

    def _evaluate(self, network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Evaluate ``network`` once at the sigmas ``time`` (B,), as the pipeline does."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Return text conditioning. Each prompt is encoded once, on its own."""
        return self._text(prompts)

    def _pixels(self, z: Tensor) -> Tensor:
        """Decode the autoencoder's latents to pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        pixels = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float() * 0.5 + 0.5
        if self._settings.clamp == "hard":
            return pixels.clamp(0, 1)
        from alignbench.flow import straight_through

        return straight_through(pixels.clamp(0, 1), pixels)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the trained parameters, with the names that diffusers gives them."""
        return ((name, p) for name, p in self.transformer.named_parameters() if p.requires_grad)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def shard(self, shard: Shard) -> None:
        """Shard the transformer over ranks with ``shard``, and later the separate base model if there is one."""
        if self._settings.compile:
            raise UserError("backend.compile: compiled blocks cannot be sharded (fsdp); choose ddp, or false")
        self._shard = shard
        shard(self.transformer, transformer_blocks(self.transformer), self.dtype, True)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's computation; its inputs and outputs are float32."""
        import torch

        return getattr(torch, self._settings.dtype)

    def load_transformer(self, files: Sequence[Path]) -> None:
        """Replace the transformer's weights by published ones. UserError for a name or shape that does not fit."""
        from safetensors.torch import load_file

        from alignbench.weights import copy_parameters

        self._check_config([path for path in files if path.name == "config.json"])
        paths = [path for path in files if path.suffix == ".safetensors"]
        stored = {name: tensor for path in paths for name, tensor in load_file(path).items()}  # mapped, not read yet
        own = self.transformer.state_dict()
        plain = {name.replace(".base_layer", ""): tensor for name, tensor in own.items() if ".lora_" not in name}
        copy_parameters(plain, stored, paths[0])
        self._separate.setdefault("base", None)

    def load_lora(self, files: Sequence[Path]) -> None:
        """Add published adapters. UserError for a name or shape that does not fit."""
        from alignbench.backends.lora import read_lora

        adapters = read_lora(files, dict(self.transformer.named_modules()))
        self.transformer.load_lora_adapter(adapters, prefix=None, adapter_name="published")
        self.transformer.set_adapter("published")
        for name, parameter in self.transformer.named_parameters():
            if ".published." in name:
                parameter.data = parameter.data.float()
        _disable_input_casts(self.transformer)

    def _check_config(self, configs: Sequence[Path]) -> None:
        """Raise UserError for a setting that differs from this model's: not every one shows in the weights' shapes."""
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
        """Yield the transformer as trained, or the base model: without its adapters, or read from disk again."""
        if not reference:
            yield self.transformer
        elif "base" in self._separate:
            if self._separate["base"] is None:
                base = self._separate["base"] = self._settings.base(self.device)
                if self._settings.compile:
                    compile_blocks(base)
                if self._shard is not None:
                    self._shard(base, transformer_blocks(base), self.dtype, False)
            yield self._separate["base"]
        else:
            checkpointing = self.transformer.gradient_checkpointing
            self.transformer.disable_adapters()
            self.transformer.gradient_checkpointing = False  # recomputation would run with adapters enabled
            try:
                yield self.transformer
            finally:
                self.transformer.enable_adapters()
                self.transformer.gradient_checkpointing = checkpointing


def _freeze(pipeline: Pipeline, parts: Sequence[str]) -> None:
    """Disable gradients, and cuDNN's attention, so that text encoders compute the same bits whatever else is loaded."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward accesses illegal memory (torch 2.11, H200)
    for part in parts:
        if (module := getattr(pipeline, part)) is not None:
            module.requires_grad_(False).eval()


def _disable_input_casts(transformer: Network) -> None:
    """Stop peft from casting adapters' inputs to float32, which autocast casts back: this changes no bit."""
    for layer in transformer.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = False


class PromptEncoder:
    """An encoder of prompts that caches the last ``cached`` embeddings in host memory.

    It encodes one prompt at a time: an embedding must not depend on the rounding of others in a batch.
    """

    def __init__(self, device: torch.device, cached: int = 4096) -> None:
        self.device = device
        self._encode = lru_cache(cached)(self.encode_one)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        import torch

        from alignbench.flow import Cond

        rows = [self._encode(prompt) for prompt in prompts]
        return Cond({name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]})

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """Return the conditioning of one prompt, on the CPU, without the batch dimension."""
        raise NotImplementedError


def token_ids(tokenizer: Any, prompt: str, length: int, device: torch.device) -> Tensor:
    """Return token ids (1, length), padded or truncated."""
    return tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids.to(device)


def pack(z: Tensor) -> Tensor:
    """Turn every 2 x 2 patch into a token: (B, C, 2h, 2w) -> (B, h * w, 4C)."""
    b, c, height, width = z.shape
    z = z.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, height // 2 * (width // 2), 4 * c)


def unpack(tokens: Tensor, grid: int) -> Tensor:
    """Invert ``pack`` for a square of ``grid`` x ``grid`` tokens."""
    b, _, channels = tokens.shape
    z = tokens.view(b, grid, grid, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, channels // 4, 2 * grid, 2 * grid)

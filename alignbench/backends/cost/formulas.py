"""The cost of a model, by formulas from its configuration alone: parameters, FLOPs, bytes.

A multiply-add is two FLOPs. As in torch's FlopCounterMode, only matrix products, attention and convolutions count.
Nothing here loads a model or imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

TIME_CHANNELS = 256  # of the sinusoidal embedding of t and of guidance
FLASH_BACKWARD = 2.5  # FLOPs of attention's backward per FLOP of its forward: the scores are recomputed
SAVED_RESNET = 8.4  # feature maps that autograd saves for a decoder's residual block
# The same at the peak of a checkpointed backward, for the largest stage alone. Measured with FLUX.1-dev on one H200:
# 9.9 at 512 px, 9.4 at 720 px, 9.1 at 1024 px, 9.6 with 16 images of 720 px. On a CPU it is 8.5: seven for the graph of
# the stage's blocks, one for that of later layers, the rest for gradients. The excess on a GPU seems to be cuDNN's
# workspace.
PEAK_RESNET = 9.5

Rows = Literal["image", "text", "both", "sample"]


class Linear(NamedTuple):
    """A linear layer of a transformer, by its name. ``rows``: the tokens that it is applied to, or once per sample."""

    name: str
    n_in: int
    n_out: int
    rows: Rows
    bias: bool = True

    @property
    def parameters(self) -> int:
        return (self.n_in + self.bias) * self.n_out


class Tokens(NamedTuple):
    """Numbers of tokens in one sample."""

    image: int
    text: int

    @property
    def both(self) -> int:
        return self.image + self.text

    def rows(self, linear: Linear) -> int:
        return 1 if linear.rows == "sample" else getattr(self, linear.rows)


STREAMS: tuple[tuple[Rows, tuple[str, ...], str], ...] = (  # of a double block: attention and feed-forward layers
    ("image", ("to_q", "to_k", "to_v", "to_out.0"), "ff"),
    ("text", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "ff_context"),
)


@dataclass(frozen=True)
class Transformer:
    """A transformer: ``double`` blocks, with a stream each for image and text, then ``single`` ones with one stream."""

    double: int
    single: int
    heads: int
    head: int  # channels per head
    channels: int  # per image token
    text: int  # width of the text encoder's states

    @property
    def width(self) -> int:
        return self.heads * self.head

    def linears(self) -> list[Linear]:
        """Return every linear layer, with the name that diffusers gives it."""
        raise NotImplementedError

    @property
    def norms(self) -> int:
        """Parameters of the norms of queries and keys."""
        return self.head * (4 * self.double + 2 * self.single)

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears()) + self.norms

    def adapters(self, targets: Sequence[str], rank: int) -> int:
        """Return the parameters of LoRA adapters on the layers that peft finds for ``targets``."""
        return sum(rank * (linear.n_in + linear.n_out) for linear in self.linears() if is_target(linear.name, targets))

    def products(self, tokens: Tokens) -> int:
        """Return the FLOPs of the linear layers in one sample's forward."""
        return sum(2 * linear.n_in * linear.n_out * tokens.rows(linear) for linear in self.linears())

    def attention(self, tokens: Tokens) -> int:
        """Return the FLOPs of attention in one sample's forward: queries by keys, and weights by values."""
        return (self.double + self.single) * 4 * tokens.both**2 * self.width

    def forward(self, tokens: Tokens) -> float:
        """Return the FLOPs of one sample's forward."""
        return float(self.products(tokens) + self.attention(tokens))

    def backward(self, tokens: Tokens, full: bool) -> float:
        """Return the FLOPs of a backward to all weights (``full``), or to activations alone (LoRA without adapters)."""
        return (2 if full else 1) * self.products(tokens) + FLASH_BACKWARD * self.attention(tokens)

    def activation_bytes(self, tokens: Tokens, itemsize: int, checkpointing: bool) -> float:
        """Return the bytes that autograd saves in one sample's forward."""
        if checkpointing:
            return (self.double + self.single) * tokens.both * self.width * itemsize
        return self.saved_vectors(tokens) * self.width * itemsize

    def saved_vectors(self, tokens: Tokens) -> float:
        """Return how many vectors of length ``width`` autograd saves in all blocks.

        Counted in one block's graph, in bfloat16 with flash attention.
        """
        raise NotImplementedError

    def block_bytes(self, tokens: Tokens, itemsize: int) -> float:
        """Return the bytes that one block takes while it computes one sample."""
        return self.saved_vectors(tokens) / (self.double + self.single) * self.width * itemsize


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Return whether peft puts an adapter on the layer ``name``."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


@dataclass(frozen=True)
class FluxTransformer(Transformer):
    """FLUX.1's FluxTransformer2DModel."""

    pooled: int
    guidance: bool

    SAVED_DOUBLE, SAVED_SINGLE = 28.2, 25.2  # vectors per token and block

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> FluxTransformer:
        """Read ``transformer/config.json``; missing entries have diffusers' defaults."""
        return cls(
            config.get("num_layers", 19),
            config.get("num_single_layers", 38),
            config.get("num_attention_heads", 24),
            config.get("attention_head_dim", 128),
            config.get("in_channels", 64),
            config.get("joint_attention_dim", 4096),
            config.get("pooled_projection_dim", 768),
            config.get("guidance_embeds", False),
        )

    def linears(self) -> list[Linear]:
        d = self.width
        embedders = ["timestep_embedder", *["guidance_embedder"] * self.guidance]
        found = [
            Linear("x_embedder", self.channels, d, "image"),
            Linear("context_embedder", self.text, d, "text"),
            *(Linear(f"time_text_embed.{name}.linear_1", TIME_CHANNELS, d, "sample") for name in embedders),
            *(Linear(f"time_text_embed.{name}.linear_2", d, d, "sample") for name in embedders),
            Linear("time_text_embed.text_embedder.linear_1", self.pooled, d, "sample"),
            Linear("time_text_embed.text_embedder.linear_2", d, d, "sample"),
            Linear("norm_out.linear", d, 2 * d, "sample"),
            Linear("proj_out", d, self.channels, "image"),
        ]
        for i in range(self.double):
            block = f"transformer_blocks.{i}"
            for (rows, names, ff), norm in zip(STREAMS, ("norm1", "norm1_context")):
                found.append(Linear(f"{block}.{norm}.linear", d, 6 * d, "sample"))
                found += (Linear(f"{block}.attn.{name}", d, d, rows) for name in names)
                found.append(Linear(f"{block}.{ff}.net.0.proj", d, 4 * d, rows))
                found.append(Linear(f"{block}.{ff}.net.2", 4 * d, d, rows))
        for i in range(self.single):
            block = f"single_transformer_blocks.{i}"
            found.append(Linear(f"{block}.norm.linear", d, 3 * d, "sample"))
            found += (Linear(f"{block}.attn.{name}", d, d, "both") for name in ("to_q", "to_k", "to_v"))
            found.append(Linear(f"{block}.proj_mlp", d, 4 * d, "both"))
            found.append(Linear(f"{block}.proj_out", 5 * d, d, "both"))
        return found

    def saved_vectors(self, tokens: Tokens) -> float:
        return (self.double * self.SAVED_DOUBLE + self.single * self.SAVED_SINGLE) * tokens.both

    def block_bytes(self, tokens: Tokens, itemsize: int) -> float:
        return self.SAVED_DOUBLE * tokens.both * self.width * itemsize


@dataclass(frozen=True)
class SD3Transformer(Transformer):
    """An SD3Transformer2DModel. Its first ``dual`` blocks also attend within the image; its last drops the text."""

    pooled: int
    dual: int
    qk_norm: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> SD3Transformer:
        """Read ``transformer/config.json``; missing entries have diffusers' defaults."""
        return cls(
            config.get("num_layers", 18),
            0,
            config.get("num_attention_heads", 18),
            config.get("attention_head_dim", 64),
            config.get("in_channels", 16) * config.get("patch_size", 2) ** 2,
            config.get("joint_attention_dim", 4096),
            config.get("pooled_projection_dim", 2048),
            len(config.get("dual_attention_layers", ())),
            config.get("qk_norm") is not None,
        )

    @property
    def norms(self) -> int:
        return self.head * (4 * self.double + 2 * self.dual) * self.qk_norm

    def linears(self) -> list[Linear]:
        d = self.width
        found = [
            Linear("pos_embed.proj", self.channels, d, "image"),  # a convolution whose patches do not overlap
            Linear("context_embedder", self.text, d, "text"),
            Linear("time_text_embed.timestep_embedder.linear_1", TIME_CHANNELS, d, "sample"),
            Linear("time_text_embed.timestep_embedder.linear_2", d, d, "sample"),
            Linear("time_text_embed.text_embedder.linear_1", self.pooled, d, "sample"),
            Linear("time_text_embed.text_embedder.linear_2", d, d, "sample"),
            Linear("norm_out.linear", d, 2 * d, "sample"),
            Linear("proj_out", d, self.channels, "image"),
        ]
        for i in range(self.double):
            block, dual, last = f"transformer_blocks.{i}", i < self.dual, i == self.double - 1
            found.append(Linear(f"{block}.norm1.linear", d, (9 if dual else 6) * d, "sample"))
            found.append(Linear(f"{block}.norm1_context.linear", d, (2 if last else 6) * d, "sample"))
            for rows, names, ff in STREAMS:
                used = names[:3] if last and rows == "text" else names
                found += (Linear(f"{block}.attn.{name}", d, d, rows) for name in used)
                if used == names:
                    found.append(Linear(f"{block}.{ff}.net.0.proj", d, 4 * d, rows))
                    found.append(Linear(f"{block}.{ff}.net.2", 4 * d, d, rows))
            if dual:
                found += (Linear(f"{block}.attn2.{name}", d, d, "image") for name in STREAMS[0][1])
        return found

    def attention(self, tokens: Tokens) -> int:
        return super().attention(tokens) + self.dual * 4 * tokens.image**2 * self.width

    def saved_vectors(self, tokens: Tokens) -> float:
        both, alone = (29.1, 14.1) if self.qk_norm else (21.1, 6.0)
        return self.double * both * tokens.both + self.dual * alone * tokens.image


@dataclass(frozen=True)
class Flux2Transformer(Transformer):
    """A Flux2Transformer2DModel: no biases, one modulation shared by all blocks, gated feed-forward layers."""

    mlp: int  # width of the feed-forward layers
    guidance: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Flux2Transformer:
        """Read ``transformer/config.json``; missing entries have diffusers' defaults."""
        heads, head = config.get("num_attention_heads", 48), config.get("attention_head_dim", 128)
        return cls(
            config.get("num_layers", 8),
            config.get("num_single_layers", 48),
            heads,
            head,
            config.get("in_channels", 128),
            config.get("joint_attention_dim", 15360),
            int(heads * head * config.get("mlp_ratio", 3.0)),
            config.get("guidance_embeds", True),
        )

    def linears(self) -> list[Linear]:
        d, embedders = self.width, ["timestep_embedder", *["guidance_embedder"] * self.guidance]
        found = [
            Linear("x_embedder", self.channels, d, "image"),
            Linear("context_embedder", self.text, d, "text"),
            *(Linear(f"time_guidance_embed.{name}.linear_1", TIME_CHANNELS, d, "sample") for name in embedders),
            *(Linear(f"time_guidance_embed.{name}.linear_2", d, d, "sample") for name in embedders),
            Linear("double_stream_modulation_img.linear", d, 6 * d, "sample"),
            Linear("double_stream_modulation_txt.linear", d, 6 * d, "sample"),
            Linear("single_stream_modulation.linear", d, 3 * d, "sample"),
            Linear("norm_out.linear", d, 2 * d, "sample"),
            Linear("proj_out", d, self.channels, "image"),
        ]
        for i in range(self.double):
            block = f"transformer_blocks.{i}"
            for rows, names, ff in STREAMS:
                found += (Linear(f"{block}.attn.{name}", d, d, rows) for name in names)
                found.append(Linear(f"{block}.{ff}.linear_in", d, 2 * self.mlp, rows))
                found.append(Linear(f"{block}.{ff}.linear_out", self.mlp, d, rows))
        for i in range(self.single):
            block = f"single_transformer_blocks.{i}.attn"
            found.append(Linear(f"{block}.to_qkv_mlp_proj", d, 3 * d + 2 * self.mlp, "both"))
            found.append(Linear(f"{block}.to_out", d + self.mlp, d, "both"))
        return [linear._replace(bias=False) for linear in found]

    def saved_vectors(self, tokens: Tokens) -> float:
        return (self.double * 32.1 + self.single * 31.1) * tokens.both


@dataclass(frozen=True)
class SiTTransformer(Transformer):
    """A SiTNetwork: one stream of image tokens, conditioned on a label."""

    classes: int
    out: int  # channels per output token

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> SiTTransformer:
        """Read a configuration such as SIT_XL_2's."""
        heads, token = config["heads"], 4 * config["channels"]
        out = 2 * token if config["learn_sigma"] else token
        return cls(0, config["depth"], heads, config["width"] // heads, token, 0, config["classes"], out)

    @property
    def norms(self) -> int:
        return 0

    @property
    def parameters(self) -> int:
        return super().parameters + (self.classes + 1) * self.width

    def linears(self) -> list[Linear]:
        d = self.width
        found = [
            Linear("x_embedder.proj", self.channels, d, "image"),  # a convolution whose patches do not overlap
            Linear("t_embedder.mlp.0", TIME_CHANNELS, d, "sample"),
            Linear("t_embedder.mlp.2", d, d, "sample"),
            Linear("final_layer.adaLN_modulation.1", d, 2 * d, "sample"),
            Linear("final_layer.linear", d, self.out, "image"),
        ]
        for i in range(self.single):
            block = f"blocks.{i}"
            found += [
                Linear(f"{block}.adaLN_modulation.1", d, 6 * d, "sample"),
                Linear(f"{block}.attn.qkv", d, 3 * d, "image"),
                Linear(f"{block}.attn.proj", d, d, "image"),
                Linear(f"{block}.mlp.fc1", d, 4 * d, "image"),
                Linear(f"{block}.mlp.fc2", 4 * d, d, "image"),
            ]
        return found

    def saved_vectors(self, tokens: Tokens) -> float:
        return self.single * 24.1 * tokens.image


TRANSFORMERS: dict[str, Callable[[Mapping[str, Any]], Transformer]] = {
    "FluxTransformer2DModel": FluxTransformer.read,
    "SD3Transformer2DModel": SD3Transformer.read,
    "Flux2Transformer2DModel": Flux2Transformer.read,
    "SiTNetwork": SiTTransformer.read,
}


class Decoder(NamedTuple):
    """The decoder of an AutoencoderKL or AutoencoderKLFlux2. ``widths``: channels per stage, the image's side first."""

    widths: tuple[int, ...]
    layers: int
    latent: int
    attends: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Decoder:
        """Read ``vae/config.json``."""
        widths = tuple(config.get("decoder_block_out_channels") or config["block_out_channels"])
        return cls(
            widths,
            config.get("layers_per_block", 1),
            config["latent_channels"],
            config.get("mid_block_add_attention", True),
        )

    @property
    def scale(self) -> int:
        """Pixels along a token's side: the decoder's factor, times two for packing."""
        return 2 ** len(self.widths)

    def resnets(self, size: int) -> list[tuple[int, int, int]]:
        """Return (channels in, channels out, positions) of every residual block for an image of ``size`` pixels."""
        deep, place = self.widths[-1], (size // (self.scale // 2)) ** 2
        blocks, before = [(deep, deep, place)] * 2, deep
        for i, width in enumerate(reversed(self.widths)):
            blocks += [(before if n == 0 else width, width, place * 4**i) for n in range(self.layers + 1)]
            before = width
        return blocks

    @property
    def parameters(self) -> int:
        """Parameters of the whole autoencoder, about: the encoder has one block less in every stage."""
        deep = self.widths[-1]
        blocks = [9 * (n_in + n_out) * n_out for n_in, n_out, _ in self.resnets(self.scale // 2)]
        resized = sum(9 * width * width for width in self.widths[1:])
        return round(
            (sum(blocks) + resized + 9 * self.latent * deep + 4 * deep * deep) * (1 + self.layers / (self.layers + 1))
        )

    def forward(self, size: int) -> float:
        """Return the FLOPs of decoding one image."""
        deep, place, pixels = self.widths[-1], (size // (self.scale // 2)) ** 2, size**2
        total = 2 * 9 * self.latent * deep * place + 2 * 9 * self.widths[0] * 3 * pixels
        for n_in, n_out, positions in self.resnets(size):
            total += 2 * 9 * (n_in + n_out) * n_out * positions + (2 * n_in * n_out * positions if n_in != n_out else 0)
        for i, width in enumerate(list(reversed(self.widths))[:-1]):  # a convolution follows each upsampling
            total += 2 * 9 * width * width * place * 4 ** (i + 1)
        if self.attends:
            total += 4 * 2 * deep * deep * place + 4 * place**2 * deep
        return float(total)

    def activation_bytes(self, size: int, itemsize: int, checkpointing: bool) -> float:
        """Return the bytes that autograd saves for one decoded image; checkpointed, the largest stage's at its peak."""
        stages: dict[int, int] = {}
        for _, n_out, positions in self.resnets(size):
            stages[positions] = stages.get(positions, 0) + n_out * positions
        maps = PEAK_RESNET * max(stages.values()) if checkpointing else SAVED_RESNET * sum(stages.values())
        return maps * itemsize


TEXT_ENCODERS = {"t5": "t5", "qwen3": "qwen3", "clip_text_model": "clip"}  # model_type -> reader
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLFlux2")


class TextEncoder(NamedTuple):
    """The cost of a T5 encoder, CLIP text model or Qwen3."""

    parameters: int
    applied: int  # parameters of matrices that multiply every token
    width: int  # of attention
    layers: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> TextEncoder:
        """Read the encoder's ``config.json``."""
        return getattr(cls, TEXT_ENCODERS[config["model_type"]])(config)

    @classmethod
    def t5(cls, config: Mapping[str, Any]) -> TextEncoder:
        d, layers, inner = config["d_model"], config["num_layers"], config["num_heads"] * config["d_kv"]
        gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
        block = 4 * d * inner + (3 if gated else 2) * d * config["d_ff"]
        rest = config["vocab_size"] * d + config["relative_attention_num_buckets"] * config["num_heads"]
        return cls(layers * (block + 2 * d) + d + rest, layers * block, inner, layers)

    @classmethod
    def clip(cls, config: Mapping[str, Any]) -> TextEncoder:
        d, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        block = 4 * d * d + 2 * d * hidden
        small = 4 * d + d + hidden + 4 * d  # biases, and two norms
        rest = (config["vocab_size"] + config["max_position_embeddings"] + 2) * d
        if config.get("architectures") == ["CLIPTextModelWithProjection"]:
            rest += d * config["projection_dim"]
        return cls(layers * (block + small) + rest, layers * block, d, layers)

    @classmethod
    def qwen3(cls, config: Mapping[str, Any]) -> TextEncoder:
        d, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
        inner, shared = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        block = 2 * d * inner + 2 * d * shared + 3 * d * config["intermediate_size"]
        words = config["vocab_size"] * d * (1 if config.get("tie_word_embeddings") else 2)
        return cls(layers * (block + 2 * d + 2 * head) + d + words, layers * block, inner, layers)

    def forward(self, tokens: int) -> float:
        """Return the FLOPs of one prompt."""
        return 2.0 * self.applied * tokens + 4.0 * self.layers * tokens**2 * self.width


def has_formulas(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether ``Model.read`` has formulas for each of these parts."""
    encoders = [config.get("model_type") for part, config in configs.items() if part.startswith("text_encoder")]
    return (
        configs["transformer"].get("_class_name", "FluxTransformer2DModel") in TRANSFORMERS
        and configs["vae"].get("_class_name", "AutoencoderKL") in AUTOENCODERS
        and all(kind in TEXT_ENCODERS for kind in encoders)
    )


class Model(NamedTuple):
    """The cost of a pipeline's parts, for plans."""

    transformer: Transformer
    decoder: Decoder
    encoders: tuple[TextEncoder, ...]

    @classmethod
    def read(cls, configs: Mapping[str, Mapping[str, Any]]) -> Model:
        """Read the ``config.json`` of each part."""
        read = TRANSFORMERS[configs["transformer"].get("_class_name", "FluxTransformer2DModel")]
        encoders = [TextEncoder.read(config) for part, config in configs.items() if part.startswith("text_encoder")]
        return cls(read(configs["transformer"]), Decoder.read(configs["vae"]), tuple(encoders))

    def tokens(self, size: int, text: int) -> Tokens:
        """Return the tokens of a ``size`` px image with a prompt of ``text`` tokens."""
        return Tokens((size // self.decoder.scale) ** 2, text)

    @property
    def frozen(self) -> int:
        """Parameters of text encoders and autoencoder."""
        return sum(encoder.parameters for encoder in self.encoders) + self.decoder.parameters

    def encode(self, text: int) -> float:
        """Return at most the FLOPs of one prompt of ``text`` tokens: a CLIP reads fewer."""
        return sum(encoder.forward(text) for encoder in self.encoders)


class GPU(NamedTuple):
    """A GPU as plans assume it: sustained TFLOP/s in bfloat16 and float32, and memory in GB."""

    name: str
    bfloat16: float
    float32: float
    memory: float
    why: str


GPUS = {
    "h100": GPU(
        "H100",
        300,
        40,
        80,
        "uncompiled FLUX.1-dev at 1024 px makes about 313: 6.7 s for 28 steps, published by PyTorch",
    ),
    "h200": GPU("H200", 300, 40, 141, "computes as the H100 does"),
    "a100": GPU("A100", 140, 15, 80, "the H100's share of its peak, 312"),
}

"""What a FLUX.1-shaped model costs, by arithmetic on its configuration alone: parameters, FLOPs, bytes.

A multiply-add is two FLOPs. Only matrix products, attention and convolutions are counted, as torch's FlopCounterMode
does. Nothing here loads a model or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

TIME_CHANNELS = 256  # of the sinusoidal embedding of t and of guidance
FLASH_BACKWARD = 2.5  # FLOPs of attention's backward per FLOP of its forward: the scores are computed once more
# Counted in a block's graph with flash attention, in tokens times width: what autograd keeps for the backward.
KEPT_DOUBLE, KEPT_SINGLE = 28.2, 25.2
KEPT_RESNET = 8.4  # feature maps that autograd keeps of a decoder's residual block

FLUX_1_DEV: dict[str, dict[str, Any]] = {  # what of its published config.json files matters here
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16},
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "max_position_embeddings": 77,
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu",
    },
}


class Linear(NamedTuple):
    """A layer of a transformer by its name. ``rows``: what it is applied to, once each."""

    name: str
    n_in: int
    n_out: int
    rows: Literal["image", "text", "both", "sample"]

    @property
    def parameters(self) -> int:
        return (self.n_in + 1) * self.n_out


class Tokens(NamedTuple):
    """Of one sample."""

    image: int
    text: int

    @property
    def both(self) -> int:
        return self.image + self.text

    def rows(self, linear: Linear) -> int:
        return 1 if linear.rows == "sample" else getattr(self, linear.rows)


class Transformer(NamedTuple):
    """A FluxTransformer2DModel: ``double`` blocks with a stream each for image and text, ``single`` ones with one."""

    double: int
    single: int
    heads: int
    head: int  # channels of one
    channels: int  # of an image token
    text: int  # width of the text states
    pooled: int
    guidance: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Transformer:
        """From ``transformer/config.json``; what is not in it has diffusers' default."""
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

    @property
    def width(self) -> int:
        return self.heads * self.head

    def linears(self) -> list[Linear]:
        """Every linear layer, by the name that diffusers gives it."""
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
            for rows, norm, names, ff in (
                ("image", "norm1", ("to_q", "to_k", "to_v", "to_out.0"), "ff"),
                ("text", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "ff_context"),
            ):
                found.append(Linear(f"{block}.{norm}.linear", d, 6 * d, "sample"))
                found += (Linear(f"{block}.attn.{name}", d, d, rows) for name in names)  # type: ignore[arg-type]
                found.append(Linear(f"{block}.{ff}.net.0.proj", d, 4 * d, rows))  # type: ignore[arg-type]
                found.append(Linear(f"{block}.{ff}.net.2", 4 * d, d, rows))  # type: ignore[arg-type]
        for i in range(self.single):
            block = f"single_transformer_blocks.{i}"
            found.append(Linear(f"{block}.norm.linear", d, 3 * d, "sample"))
            found += (Linear(f"{block}.attn.{name}", d, d, "both") for name in ("to_q", "to_k", "to_v"))
            found.append(Linear(f"{block}.proj_mlp", d, 4 * d, "both"))
            found.append(Linear(f"{block}.proj_out", 5 * d, d, "both"))
        return found

    @property
    def parameters(self) -> int:
        """Linear layers, and the norms of queries and keys."""
        norms = self.head * (4 * self.double + 2 * self.single)
        return sum(linear.parameters for linear in self.linears()) + norms

    def adapters(self, targets: Sequence[str], rank: int) -> int:
        """Parameters of LoRA adapters on the layers that peft finds for ``targets``."""
        return sum(rank * (linear.n_in + linear.n_out) for linear in self.linears() if _meant(linear.name, targets))

    def products(self, tokens: Tokens) -> int:
        """FLOPs of the linear layers, forward, one sample."""
        return sum(2 * linear.n_in * linear.n_out * tokens.rows(linear) for linear in self.linears())

    def attention(self, tokens: Tokens) -> int:
        """FLOPs of queries times keys and of weights times values, forward, one sample."""
        return (self.double + self.single) * 4 * tokens.both**2 * self.width

    def forward(self, tokens: Tokens) -> float:
        return float(self.products(tokens) + self.attention(tokens))

    def backward(self, tokens: Tokens, full: bool) -> float:
        """With gradients of all weights, or (LoRA) of activations alone; the adapters' own are left out."""
        return (2 if full else 1) * self.products(tokens) + FLASH_BACKWARD * self.attention(tokens)

    def kept(self, tokens: Tokens, itemsize: int, checkpointing: bool) -> float:
        """Bytes that autograd keeps of one forward of one sample."""
        widths = self.double + self.single if checkpointing else self.double * KEPT_DOUBLE + self.single * KEPT_SINGLE
        return widths * tokens.both * self.width * itemsize

    def block(self, tokens: Tokens, itemsize: int) -> float:
        """Bytes of one double block at work, one sample."""
        return KEPT_DOUBLE * tokens.both * self.width * itemsize


def _meant(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


class Decoder(NamedTuple):
    """The decoder of an AutoencoderKL. ``widths``: as in ``block_out_channels``, the image's side first."""

    widths: tuple[int, ...]
    layers: int
    latent: int
    attends: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Decoder:
        """From ``vae/config.json``."""
        widths, layers = tuple(config["block_out_channels"]), config.get("layers_per_block", 1)
        return cls(widths, layers, config["latent_channels"], config.get("mid_block_add_attention", True))

    @property
    def scale(self) -> int:
        """Pixels along the side of a transformer's token: the decoder's factor, times two of packing."""
        return 2 ** len(self.widths)

    def resnets(self, size: int) -> list[tuple[int, int, int]]:
        """(channels in, channels out, positions) of every residual block, for an image of ``size`` pixels."""
        deep, place = self.widths[-1], (size // (self.scale // 2)) ** 2
        found, before = [(deep, deep, place)] * 2, deep
        for i, width in enumerate(reversed(self.widths)):
            found += [(before if n == 0 else width, width, place * 4**i) for n in range(self.layers + 1)]
            before = width
        return found

    @property
    def parameters(self) -> int:
        """Of the whole autoencoder, about: the encoder has a block less in every stage."""
        deep = self.widths[-1]
        blocks = [9 * (n_in + n_out) * n_out for n_in, n_out, _ in self.resnets(self.scale // 2)]
        resized = sum(9 * width * width for width in self.widths[1:])
        return round(
            (sum(blocks) + resized + 9 * self.latent * deep + 4 * deep * deep) * (1 + self.layers / (self.layers + 1))
        )

    def forward(self, size: int) -> float:
        """FLOPs of one image."""
        deep, place, pixels = self.widths[-1], (size // (self.scale // 2)) ** 2, size**2
        total = 2 * 9 * self.latent * deep * place + 2 * 9 * self.widths[0] * 3 * pixels
        for n_in, n_out, here in self.resnets(size):
            total += 2 * 9 * (n_in + n_out) * n_out * here + (2 * n_in * n_out * here if n_in != n_out else 0)
        for i, width in enumerate(list(reversed(self.widths))[:-1]):  # the upsampled map goes through a convolution
            total += 2 * 9 * width * width * place * 4 ** (i + 1)
        if self.attends:
            total += 4 * 2 * deep * deep * place + 4 * place**2 * deep
        return float(total)

    def kept(self, size: int, itemsize: int, checkpointing: bool) -> float:
        """Bytes that autograd keeps of one decoded image; with checkpointing about a third (of its blocks the last)."""
        maps = sum(n_out * here for _, n_out, here in self.resnets(size))
        return KEPT_RESNET * maps * itemsize / (3 if checkpointing else 1)


class TextEncoder(NamedTuple):
    """A T5 encoder or a CLIP text model, as far as its cost goes."""

    parameters: int  # all of them
    applied: int  # of matrices, to every token
    width: int  # of attention
    layers: int

    @classmethod
    def t5(cls, config: Mapping[str, Any]) -> TextEncoder:
        """From ``text_encoder_2/config.json``."""
        d, layers, inner = config["d_model"], config["num_layers"], config["num_heads"] * config["d_kv"]
        gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
        block = 4 * d * inner + (3 if gated else 2) * d * config["d_ff"]
        rest = config["vocab_size"] * d + config["relative_attention_num_buckets"] * config["num_heads"]
        return cls(layers * (block + 2 * d) + d + rest, layers * block, inner, layers)

    @classmethod
    def clip(cls, config: Mapping[str, Any]) -> TextEncoder:
        """From ``text_encoder/config.json``."""
        d, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        block = 4 * d * d + 2 * d * hidden
        small = 4 * d + d + hidden + 4 * d  # biases, and two norms
        rest = (config["vocab_size"] + config["max_position_embeddings"] + 2) * d
        return cls(layers * (block + small) + rest, layers * block, d, layers)

    def forward(self, tokens: int) -> float:
        """FLOPs of one prompt."""
        return 2.0 * self.applied * tokens + 4.0 * self.layers * tokens**2 * self.width


class Model(NamedTuple):
    """A FluxPipeline."""

    transformer: Transformer
    decoder: Decoder
    t5: TextEncoder
    clip: TextEncoder

    @classmethod
    def read(cls, configs: Mapping[str, Mapping[str, Any]]) -> Model:
        """From the ``config.json`` of each part."""
        return cls(
            Transformer.read(configs["transformer"]),
            Decoder.read(configs["vae"]),
            TextEncoder.t5(configs["text_encoder_2"]),
            TextEncoder.clip(configs["text_encoder"]),
        )

    def tokens(self, size: int, text: int) -> Tokens:
        return Tokens((size // self.decoder.scale) ** 2, text)


class GPU(NamedTuple):
    """What a plan assumes of a GPU: sustained TFLOP/s with bfloat16 and with float32, and gigabytes."""

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

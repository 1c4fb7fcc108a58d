"""SiT's network: a DiT with adaLN-zero blocks, with the names of its official checkpoint.

Written from the arithmetic of github.com/willisma/SiT, models.py at a87098c3. Departures:
1. The position embedding is a buffer, and never trained.
2. Labels are never dropped: that belongs to pretraining, but the official code does it whenever the network is in
   training mode.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

PATCH = 2
TIME_CHANNELS = 256  # of the sinusoidal embedding of t
PERIOD = 10000


class SiTNetwork(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The network (z, t, label) -> image - noise, at z = t image + (1 - t) noise: SiT's own time and sign."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        side: int,  # tokens along the image
        channels: int = 4,
        classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        out = (2 if learn_sigma else 1) * channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, PATCH, PATCH)})
        mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})  # the last: no class
        self.register_buffer("pos_embed", position_embedding(side, width)[None])
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(width, PATCH**2 * out), "adaLN_modulation": _ada(width, 2)}
        )
        self.gradient_checkpointing = False

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """The blocks, under diffusers' name."""
        return self.blocks

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return image - noise in the shape of ``z`` (B, C, 2 side, 2 side); ``t`` and ``label``: (B,).

        A variance learnt beside the velocity (learn_sigma) is dropped.
        """
        c = self.t_embedder["mlp"](time_embedding(t)) + self.y_embedder["embedding_table"](label)
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        tokens = self.final_layer["linear"](modulate(x, shift, scale))
        b, channels, height, width = z.shape
        v = tokens.view(b, height // PATCH, width // PATCH, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
        return v.reshape(b, -1, height, width)[:, :channels]


class Block(nn.Module):
    """Attention and a feed-forward layer; t and label give shift, scale and gate of both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = _ada(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate * self.attn(modulate(x, shift, scale))
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class Attention(nn.Module):
    """Self-attention of ``heads`` heads, with one layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class SiTPipeline(nn.Module):
    """The transformer and autoencoder, in the place of a diffusers pipeline, which SiT lacks."""

    scheduler = None  # its grid is linear

    def __init__(self, transformer: SiTNetwork, vae: nn.Module) -> None:
        super().__init__()
        self.transformer, self.vae = transformer, vae


def _ada(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def time_embedding(t: Tensor) -> Tensor:
    """Embed t (B,) as cosines, then sines, at falling frequencies: (B, TIME_CHANNELS). t is not multiplied by 1000."""
    frequencies = torch.exp(
        -math.log(PERIOD) * torch.arange(TIME_CHANNELS // 2, dtype=torch.float32, device=t.device) * 2 / TIME_CHANNELS
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def position_embedding(side: int, width: int) -> Tensor:
    """Return (side^2, width): sines and cosines of the column, then of the row, a quarter of the width each."""
    frequencies = PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) * 4 / width)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).reshape(side**2, width).float()

"""SiT's network: a DiT with adaLN-zero blocks, under the names that its official checkpoint has.

Written from the arithmetic of github.com/willisma/SiT, models.py at a87098c3. Departures:
1. The table of positions is a buffer: it is never trained, whatever is.
2. No label is ever dropped: that belongs to pretraining, and the official code does it whenever the network is in
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
WAVES = 256  # numbers of the sinusoidal embedding of t
PERIOD = 10000


class SiTNetwork(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """(z, t, label) -> image - noise, at z = t image + (1 - t) noise: SiT's own time and sign."""

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
        mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})  # the last: no class
        self.register_buffer("pos_embed", positions(side, width)[None])
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(width, PATCH**2 * out), "adaLN_modulation": _ada(width, 2)}
        )
        self.gradient_checkpointing = False

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """The blocks, by diffusers' name."""
        return self.blocks

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """``z`` (B, C, 2 side, 2 side), ``t`` and ``label`` (B,) -> the shape of ``z``.

        Where a variance was learnt beside the velocity (learn_sigma), it is dropped.
        """
        c = self.t_embedder["mlp"](waves(t)) + self.y_embedder["embedding_table"](label)
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        tokens = self.final_layer["linear"](modulated(x, shift, scale))
        b, channels, height, width = z.shape
        v = tokens.view(b, height // PATCH, width // PATCH, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
        return v.reshape(b, -1, height, width)[:, :channels]


class Block(nn.Module):
    """Attention, then a feed-forward layer; shift, scale and gate of both come from t and label."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = _ada(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate * self.attn(modulated(x, shift, scale))
        return x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp))


class Attention(nn.Module):
    """Of ``heads`` heads, with one layer for queries, keys and values."""

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


class Parts(nn.Module):
    """What takes a pipeline's place: SiT has none of diffusers'."""

    scheduler = None  # its grid is linear

    def __init__(self, transformer: SiTNetwork, vae: nn.Module) -> None:
        super().__init__()
        self.transformer, self.vae = transformer, vae


def _ada(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def waves(t: Tensor) -> Tensor:
    """(B,) -> (B, WAVES): cosines, then sines, of t at falling frequencies; t itself is not multiplied by 1000."""
    frequencies = torch.exp(
        -math.log(PERIOD) * torch.arange(WAVES // 2, dtype=torch.float32, device=t.device) * 2 / WAVES
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def positions(side: int, width: int) -> Tensor:
    """(side^2, width): sines, then cosines, of the column, then of the row; in a quarter of the width each."""
    frequencies = PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) * 4 / width)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).reshape(side**2, width).float()

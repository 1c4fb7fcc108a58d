"""A tiny random Mask2Former in the layout of GenEval's detector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alignbench.rehearsal.random_weights import draw
from alignbench.rehearsal.tiny_clip import clip_folder

if TYPE_CHECKING:
    from torch import Tensor


def mask2former_state(
    embed: int = 8,
    depths: tuple[int, ...] = (1, 1, 2, 1),
    heads: tuple[int, ...] = (1, 2, 4, 8),
    width: int = 32,
    encoder: int = 1,
    decoder: int = 2,
    inner: tuple[int, int] = (16, 24),
    queries: int = 20,
) -> dict[str, Tensor]:
    """Return random tensors, by mmdet 3.x's names, of a Mask2Former for 80 classes with a Swin of window 7."""
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int, bias: bool = True, scale: float | None = None) -> None:
        state[f"{name}.weight"] = draw(name, shape) * (scale or math.prod(shape[1:]) ** -0.5)
        if bias:
            state[f"{name}.bias"] = draw(f"{name}.bias", shape[:1]) * 0.1

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * draw(name, (size,))
        state[f"{name}.bias"] = 0.2 * draw(f"{name}.bias", (size,))

    def ffn(name: str, size: int, hidden: int) -> None:
        put(f"{name}.ffn.layers.0.0", hidden, size)
        put(f"{name}.ffn.layers.1", size, hidden)

    put("backbone.patch_embed.projection", embed, 3, 4, 4)
    norm("backbone.patch_embed.norm", embed)
    for stage, (depth, head) in enumerate(zip(depths, heads)):
        size = embed * 2**stage
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            table, index = (f"{name}.attn.w_msa.relative_position_{what}" for what in ("bias_table", "index"))
            state[table] = draw(table, (169, head))
            state[index] = swin_index(7)
            put(f"{name}.attn.w_msa.qkv", 3 * size, size)
            put(f"{name}.attn.w_msa.proj", size, size)
            norm(f"{name}.norm1", size)
            norm(f"{name}.norm2", size)
            ffn(name, size, 4 * size)
        if stage < 3:
            norm(f"backbone.stages.{stage}.downsample.norm", 4 * size)
            put(f"backbone.stages.{stage}.downsample.reduction", 2 * size, 4 * size, bias=False)
        norm(f"backbone.norm{stage}", size)
    pixel, panoptic = "panoptic_head.pixel_decoder", "panoptic_head"
    for number, stage in enumerate((3, 2, 1)):
        put(f"{pixel}.input_convs.{number}.conv", width, embed * 2**stage, 1, 1)
        norm(f"{pixel}.input_convs.{number}.gn", width)
    for layer in range(encoder):
        name = f"{pixel}.encoder.layers.{layer}"
        put(f"{name}.self_attn.sampling_offsets", 8 * 3 * 4 * 2, width)
        put(f"{name}.self_attn.attention_weights", 8 * 3 * 4, width)
        put(f"{name}.self_attn.value_proj", width, width)
        put(f"{name}.self_attn.output_proj", width, width)
        ffn(name, width, inner[0])
        for number in range(2):
            norm(f"{name}.norms.{number}", width)
    put(f"{pixel}.level_encoding", 3, width, bias=False)
    put(f"{pixel}.lateral_convs.0.conv", width, embed, 1, 1, bias=False)
    norm(f"{pixel}.lateral_convs.0.gn", width)
    put(f"{pixel}.output_convs.0.conv", width, width, 3, 3, bias=False)
    norm(f"{pixel}.output_convs.0.gn", width)
    put(f"{pixel}.mask_feature", width, width, 1, 1)
    for layer in range(decoder):
        name = f"{panoptic}.transformer_decoder.layers.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for what, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
                joint = f"{name}.{attention}.attn.in_proj_{what}"
                state[joint] = draw(joint, shape) * 0.2
            put(f"{name}.{attention}.attn.out_proj", width, width)
        ffn(name, width, inner[1])
        for number in range(3):
            norm(f"{name}.norms.{number}", width)
    norm(f"{panoptic}.transformer_decoder.post_norm", width)
    for name in ("query_embed", "query_feat"):
        put(f"{panoptic}.{name}", queries, width, bias=False, scale=1)
    put(f"{panoptic}.level_embed", 3, width, bias=False, scale=1)
    put(f"{panoptic}.cls_embed", 81, width, scale=1)
    for number in (0, 2, 4):
        put(f"{panoptic}.mask_embed.{number}", width, width)
    return state


def swin_index(window: int) -> Tensor:
    """Return Swin's relative_position_index: the row of the bias table for each pair (i, j) of a window's pixels."""
    import torch

    y, x = (torch.arange(window**2).div(window, rounding_mode="floor"), torch.arange(window**2) % window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def mask2former_file(path: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Save a checkpoint as OpenMMLab publishes it: in torch's older format, with a ``meta`` of plain values."""
    import torch

    meta = {"env_info": "", "config": "", "epoch": 1, "CLASSES": ("person", "bicycle"), "PALETTE": None}
    checkpoint = {"meta": meta, "state_dict": mask2former_state() if state is None else state}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    return path


DETECTOR_FILE = "mask2former.pth"


def geneval_folder(folder: Path) -> Path:
    """Save a Mask2Former, and the CLIP that classifies colours."""
    clip_folder(folder / "clip")
    return mask2former_file(folder / DETECTOR_FILE)

"""AdamW's moments in 8 bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861, section 2).

A block of 256 numbers shares one float32 scale, its largest magnitude; each number becomes the nearest of 256 levels,
which are denser near zero. Both moments of a weight take 2.03 bytes.

Departures, both small:
1. The second moment has no level at zero (Li et al. 2023, arXiv 2309.01507, section 3.2: the zero-point problem).
   Otherwise values below 1.6e-7 of their block's largest would become zero, and the next update would divide the first
   moment by eps.
2. The padding of a last, shorter block is kept: at most 255 bytes per tensor.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
SMALL = 4096  # elements; smaller tensors stay in float32, as in the paper's own library (bitsandbytes)
DECADES = 7


@functools.cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 levels of dynamic tree quantization, ascending: in [-1, 1] if ``signed``, else in (0, 1].

    Decade e below 1, [0.1, 1] 10^-e, is split into 2^(6 - e) equal intervals (twice as many if unsigned), whose
    midpoints are levels; 1 is a level too, and for signed numbers 0.
    """
    midpoints = []
    for e in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (DECADES - 1 - e + (not signed)) + 1, dtype=torch.float64)
        midpoints.append((edges[1:] + edges[:-1]) / 2 * 10.0**-e)
    positive = torch.cat(midpoints)
    ends = torch.tensor([0.0, 1.0] if signed else [1.0], dtype=torch.float64)
    unsorted = torch.cat([-positive, positive, ends]) if signed else torch.cat([positive, ends])
    return unsorted.sort().values.float().to(device)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (blocks, 256) in uint8 and scales (blocks, 1) in float32. ``signed``: False for numbers >= 0."""
    grid = levels(signed, x.device)
    blocks = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.bucketize(scaled, (grid[1:] + grid[:-1]) / 2, out_int32=True).to(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool, like: Tensor) -> Tensor:
    """Return the numbers that ``quantize`` encoded, in shape and dtype of ``like``; blocks of zeros are exact."""
    numbers = levels(signed, codes.device)[codes.int()] * scale
    return numbers.flatten()[: like.numel()].view_as(like).to(like.dtype)

"""AdamW's moments in 8 bits: block-wise dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861, section 2).

A block of 256 numbers has one float32 scale, its largest magnitude, and each number the nearest of 256 levels, which
stand closer where numbers are smaller: 2.03 bytes for both moments of a weight.

Departures, both small:
1. The second moment has no level at zero (Li et al. 2023, arXiv 2309.01507, section 3.2: the zero-point problem). Below
   1.6e-7 of its block's largest it would become zero, and the next update be a first moment divided by eps.
2. The padding of a last, shorter block is kept: at most 255 bytes of a tensor.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
SMALL = 4096  # numbers: tensors of fewer stay in float32, as in the paper's own library (bitsandbytes)
DECADES = 7


@functools.cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """The levels, ascending, in [-1, 1] or (0, 1]: dynamic tree quantisation, without or with the sign's bit for more.

    Decade e below 1 is split linearly, [0.1, 1] 10^-e into 2^(6 - e) parts with their middles as levels, or twice as
    many without a sign; and there are 1, and for signed numbers 0.
    """
    found = []
    for e in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (DECADES - 1 - e + (not signed)) + 1, dtype=torch.float64)
        found.append((edges[1:] + edges[:-1]) / 2 * 10.0**-e)
    positive = torch.cat(found)
    ends = torch.tensor([0.0, 1.0] if signed else [1.0], dtype=torch.float64)
    every = torch.cat([-positive, positive, ends]) if signed else torch.cat([positive, ends])
    return every.sort().values.float().to(device)


def quantised(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes (blocks, 256) in uint8, scales (blocks, 1) in float32). ``signed`` is False for numbers that are >= 0."""
    grid = levels(signed, x.device)
    blocks = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    shares = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.bucketize(shares, (grid[1:] + grid[:-1]) / 2, out_int32=True).to(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool, like: Tensor) -> Tensor:
    """What ``quantised`` made codes of, in shape and type of ``like``; a block of zeros exactly."""
    numbers = levels(signed, codes.device)[codes.int()] * scale
    return numbers.flatten()[: like.numel()].view_as(like).to(like.dtype)

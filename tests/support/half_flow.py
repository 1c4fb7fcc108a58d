"""A flow with bfloat16 weights and a closed form."""

from __future__ import annotations

import torch

from alignbench.analytic import AffineFlow


class HalfFlow(AffineFlow):
    """A flow that reports bfloat16 and has bfloat16 weights, but otherwise computes in float64."""

    dtype = torch.bfloat16

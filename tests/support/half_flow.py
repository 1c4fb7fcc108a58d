"""A flow with bfloat16 weights and a closed form."""

from __future__ import annotations

import torch

from alignbench.analytic import AffineFlow


class HalfFlow(AffineFlow):
    """Says that it computes in bfloat16; but for its weights it does so in float64."""

    dtype = torch.bfloat16

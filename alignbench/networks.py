"""Networks that a method may train beside the flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from alignbench.flow import Cond


class LatentNet(nn.Module):
    """A small network on latents, time and text, whose output is zero at initialisation.

    The same layers are applied to every token; each token also sees the mean of all tokens, the mean of each text
    tensor, and t. ``channels``: size of a token; ``text``: sum of the widths of the text tensors; ``width``: size of
    the two hidden layers.
    """

    def __init__(self, channels: int, text: int, width: int) -> None:
        """Make the layers; the last one starts at zero."""
        super().__init__()
        self.first = nn.Linear(2 * channels + text + 1, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return a tensor of the shape of ``x``: (B, ..., channels) latents. ``t``: (B, 1) or a single number."""
        tokens = x.reshape(len(x), -1, x.shape[-1])
        texts = [c.reshape(len(c), -1, c.shape[-1]).mean(1).to(x) for c in cond.tensors.values()]
        time = t.to(x).expand(len(x), 1)  # not embedded: sinusoids would be arbitrary between the steps
        shared = torch.cat([tokens.mean(1), *texts, time], 1)[:, None].expand(-1, tokens.shape[1], -1)
        hidden = nn.functional.silu(self.first(torch.cat([tokens, shared], 2)))
        return self.last(nn.functional.silu(self.second(hidden))).view_as(x)

"""Trained weights in bfloat16: beside float32 masters, or rounded stochastically and alone.

Plain bfloat16 stalls: an update below half of a weight's last place (1/512 to 1/256 of it) is rounded away, every time.
Only tensors of two and more dimensions become bfloat16: those that autocast would cast at each use, and embedding
tables. Vectors (biases, the scales of norms) stay as they are, so that a FLUX.1 with masters computes what the float32
one does under autocast, bit by bit, and casts nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignbench.config import UserError

Kind = Literal["float32", "master", "stochastic"]


class Weights:
    """A flow's trained weights. ``held``: as the optimizer, the average and checkpoints have them, by name.

    float32: the network's own. master: as they were loaded, and the network has them rounded to nearest. stochastic:
    the network's own, in bfloat16. UserError for a flow that computes in another type.
    """

    def __init__(self, flow: Any, kind: Kind) -> None:
        network: dict[str, nn.Parameter] = dict(flow.named_parameters())
        self.held = dict(network)
        self._masters: list[tuple[nn.Parameter, nn.Parameter]] = []  # (the network's, its master)
        self._alone: list[nn.Parameter] = []
        if kind == "float32":
            return
        if getattr(flow, "dtype", None) != torch.bfloat16:
            raise UserError(f"training.optimizer.weights: {kind!r} needs a backend that computes in bfloat16")
        for name, p in network.items():
            if p.ndim < 2:
                continue
            master = nn.Parameter(p.detach())
            p.data = p.detach().bfloat16()
            if kind == "master":
                p.grad_dtype = master.dtype  # uses in one backward, and backwards, add up in it
                self.held[name] = master
                self._masters.append((p, master))
            else:
                self._alone.append(p)

    def begin(self) -> None:
        """Before an update's first backward, which leaves gradients in bfloat16 where weights have no masters."""
        for p in self._alone:
            p.grad_dtype = p.dtype

    def widen(self) -> None:
        """Before any other backward of it: gradients become float32, and what comes is added in it."""
        for p in self._alone:
            if p.grad_dtype != torch.float32:
                gradient, p.grad = p.grad, None
                p.grad_dtype = torch.float32
                p.grad = None if gradient is None else gradient.float()

    def hand_over(self) -> None:
        """Masters get the gradients of what was made of them."""
        for p, master in self._masters:
            master.grad, p.grad = p.grad, None

    @torch.no_grad()
    def follow(self) -> None:
        """The network's weights are made of their masters again, rounded to nearest."""
        for p, master in self._masters:
            p.copy_(master)


def upcast(t: Tensor) -> Tensor:
    """``t`` in float32 if it is in bfloat16."""
    return t.float() if t.dtype == torch.bfloat16 else t


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Of all gradients together, in float32 where some are in bfloat16."""
    if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    return torch.stack([torch.linalg.vector_norm(upcast(gradient)) for gradient in gradients]).norm()


def stochastic_round(x: Tensor, rng: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down at random, so that the mean over draws of ``rng`` is x.

    Of the 32 bits of a number bfloat16 has the upper 16. A uniform draw of 16 bits, added to the lower ones, carries
    into the upper ones with the probability of exactly what is cut off (Gupta et al. 2015, arXiv 1502.02551, section
    3.1). What bfloat16 represents stays as it is.
    """
    noise = torch.randint(2**16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    return noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()

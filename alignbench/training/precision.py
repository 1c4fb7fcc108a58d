"""Trained weights in bfloat16: with float32 masters, or without them and rounded stochastically.

Plain bfloat16 stalls: an update below half a unit in a weight's last place (1/512 to 1/256 of it) is always rounded
away. Only tensors of two or more dimensions become bfloat16: those that autocast would cast at each use, and embedding
tables. Vectors (biases, the scales of norms) stay in float32, so that FLUX.1 with masters computes bit for bit what it
computes in float32 under autocast, without the casts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignbench.config import UserError

Kind = Literal["float32", "master", "stochastic"]


class Weights:
    """A flow's trained weights. ``parameters``: those that the optimizer, the EMA and checkpoints use, by name.

    float32: the network's own. master: float32 masters, which the network has rounded to nearest. stochastic: the
    network's own, in bfloat16. UserError for the last two if the flow does not compute in bfloat16.
    """

    def __init__(self, flow: Any, kind: Kind) -> None:
        network: dict[str, nn.Parameter] = dict(flow.named_parameters())
        self.parameters = dict(network)
        self._masters: list[tuple[nn.Parameter, nn.Parameter]] = []  # (the network's, its master)
        self._unmastered: list[nn.Parameter] = []
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
                p.grad_dtype = master.dtype  # gradients add up in it, within a backward and over several
                self.parameters[name] = master
                self._masters.append((p, master))
            else:
                self._unmastered.append(p)

    def start_update(self) -> None:
        """Let the update's first backward leave bfloat16 gradients on weights without masters."""
        for p in self._unmastered:
            p.grad_dtype = p.dtype

    def upcast_gradients(self) -> None:
        """Convert gradients to float32, in which the update's further backwards add theirs."""
        for p in self._unmastered:
            if p.grad_dtype != torch.float32:
                gradient, p.grad = p.grad, None
                p.grad_dtype = torch.float32
                p.grad = None if gradient is None else gradient.float()

    def gradients_to_masters(self) -> None:
        """Move the gradients of the network's weights to their masters."""
        for p, master in self._masters:
            master.grad, p.grad = p.grad, None

    @torch.no_grad()
    def masters_to_network(self) -> None:
        """Copy the masters to the network's weights, rounded to nearest."""
        for p, master in self._masters:
            p.copy_(master)


def upcast(t: Tensor) -> Tensor:
    """Return a bfloat16 tensor in float32, any other as it is."""
    return t.float() if t.dtype == torch.bfloat16 else t


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, computed in float32 if any is in bfloat16."""
    if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    return torch.stack([torch.linalg.vector_norm(upcast(gradient)) for gradient in gradients]).norm()


def stochastic_round(x: Tensor, rng: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down at random, so that the mean over draws of ``rng`` is x.

    bfloat16 has the upper 16 of a number's 32 bits. A uniform draw of 16 bits, added to the lower ones, carries into
    the upper ones with a probability equal to the fraction cut off (Gupta et al. 2015, arXiv 1502.02551, section 3.1).
    Numbers that bfloat16 represents stay as they are.
    """
    noise = torch.randint(2**16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    return noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()

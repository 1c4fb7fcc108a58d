"""FSDP2: every rank keeps a part of each weight, and gathers the whole once per update, not once per network call.

torch's own ``fully_shard`` and not accelerate's plug-in around it, which wraps model and optimizer in one ``prepare``:
here the optimizer is the loop's own, several backward passes make an update, and what a forward gathered stays until
that update's step. accelerate still makes the process group. All that is used is public since torch 2.7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignbench.config import UserError


class Shards:
    """The networks of a flow, in parts: of the weights' own type in their parts, of the computation's once gathered."""

    def __init__(self, flow: Any, accelerator: Accelerator) -> None:
        if not hasattr(flow, "shard"):
            raise UserError("parallel: fsdp needs a backend with shard(); choose ddp")
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._trained: list[Any] = []  # FSDPModules
        flow.shard(self.split)

    def split(self, network: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype, trained: bool) -> None:
        """Keep a part of ``network``. ``blocks``: its modules that are gathered at a time.

        Of a network that is not trained, each block is given up again after its use.
        """
        # inputs stay as they are: a sigma in bfloat16 would be another one
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*blocks, network):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=not trained, mp_policy=policy)
            if trained:
                self._trained.append(module)
        if trained:
            network.set_reshard_after_backward(False)  # type: ignore[operator]  # fully_shard made it an FSDPModule

    def give_up(self) -> None:
        """Free what was gathered: the next network call gathers the weights as they then are."""
        for module in self._trained:
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; all of a tensor that is not in parts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """All of a tensor. One in parts is gathered by all ranks together, for those that ``keep`` it, in host memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if keep else None


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which is whole, as ``like`` is kept: in parts or not. No rank waits for another."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def as_part(part: Tensor, like: Tensor) -> Tensor:
    """``part`` of a tensor as ``local`` gives it, on any device, in its place among the ranks' again."""
    if not isinstance(like, DTensor) or isinstance(part, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        part.to(like.device), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def average(gradients: Iterable[Tensor], accelerator: Accelerator, largest: int = 2**25) -> None:
    """Replace each by its mean over ranks, in place; a collective takes many at a time, up to ``largest`` numbers."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (
            gradient.dtype != bucket[0].dtype or sum(map(Tensor.numel, bucket)) + gradient.numel() > largest
        ):
            _average(bucket, accelerator)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _average(bucket, accelerator)


def _average(bucket: list[Tensor], accelerator: Accelerator) -> None:
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), "mean")
    assert isinstance(flat, Tensor)
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
        gradient.copy_(part.view_as(gradient))

"""FSDP2: every rank keeps a shard of each weight, and gathers all of it once per update, not once per network call.

This uses torch's own ``fully_shard`` rather than accelerate's plug-in, which wraps model and optimizer in one
``prepare``: here the optimizer belongs to the loop, an update may take several backward passes, and gathered weights
stay until its optimizer step. accelerate still makes the process group. Everything used is public since torch 2.7.
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
    """A flow's sharded networks. Shards have the dtype of the weights, gathered weights that of the computation."""

    def __init__(self, flow: Any, accelerator: Accelerator) -> None:
        if not hasattr(flow, "shard"):
            raise UserError("parallel: fsdp needs a backend with shard(); choose ddp")
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._trained: list[Any] = []  # FSDPModules
        flow.shard(self.shard)

    def shard(self, network: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype, trained: bool) -> None:
        """Shard ``network`` in place. ``blocks``: the modules that are gathered one at a time.

        Blocks of a network that is not trained are resharded after each use.
        """
        # inputs are not cast: a sigma rounded to bfloat16 would be another sigma
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*blocks, network):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=not trained, mp_policy=policy)
            if trained:
                self._trained.append(module)
        if trained:
            network.set_reshard_after_backward(False)  # type: ignore[operator]  # fully_shard made it an FSDPModule

    def reshard(self) -> None:
        """Free the gathered weights: the next network call gathers the updated ones."""
        for module in self._trained:
            module.reshard()


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing memory; an unsharded tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor, keep: bool) -> Tensor | None:
    """Return all of a tensor. All ranks gather a sharded one together; those that ``keep`` it get it in host memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if keep else None


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return an unsharded ``tensor``, sharded as ``like`` is. Needs no communication between ranks."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def from_local(shard: Tensor, like: Tensor) -> Tensor:
    """Return the sharded tensor of which ``shard``, on any device, is this rank's; the inverse of ``local_tensor``."""
    if not isinstance(like, DTensor) or isinstance(shard, DTensor):
        return shard
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        shard.to(like.device), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def average_gradients(gradients: Iterable[Tensor], accelerator: Accelerator, largest: int = 2**25) -> None:
    """Replace gradients by their means over ranks, in place; one collective takes up to ``largest`` elements."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (
            gradient.dtype != bucket[0].dtype or sum(map(Tensor.numel, bucket)) + gradient.numel() > largest
        ):
            _average_bucket(bucket, accelerator)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _average_bucket(bucket, accelerator)


def _average_bucket(bucket: list[Tensor], accelerator: Accelerator) -> None:
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), "mean")
    assert isinstance(flat, Tensor)
    for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
        gradient.copy_(mean.view_as(gradient))

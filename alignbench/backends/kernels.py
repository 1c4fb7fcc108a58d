"""Compilation and attention kernels of a transformer's blocks, checked before the model is loaded."""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

Network = Any  # a transformer or one of its modules, whose attributes type checkers cannot see
COMPILER = "inductor"
VARIANTS = 64  # per block: with and without gradient and adapters, for every batch and image size; torch's default is 8


def transformer_blocks(transformer: Network) -> list[Network]:
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile lacks its compiler, which torch would report only once the model is loaded."""
    kind, variable, names = ("C", "CC", "gcc clang") if device.type == "cuda" else ("C++", "CXX", "g++ clang++")
    wanted = shlex.split(os.environ.get(variable, ""))[:1] or names.split()
    if COMPILER == "inductor" and not any(map(shutil.which, wanted)):
        what = f"there is no {kind} compiler ({' or '.join(wanted)}), which torch.compile needs"
        raise UserError(f"backend.compile: {what}; install one, or choose false")


def compile_blocks(transformer: Network) -> None:
    """Compile each kind of block once for every set of input shapes.

    Blocks with adapters and without (the base model) are separate variants that are both kept: switching between them,
    as every measurement of the drift does, recompiles nothing, and both round alike.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in transformer_blocks(transformer):
        block.compile(fullgraph=True, dynamic=False, backend=COMPILER)


def check_attention(name: str, backend: str, dispatches: bool) -> None:
    """Raise UserError for a kernel that diffusers does not know, lacks the package for, or cannot set here."""
    if name == "native":
        return
    if not dispatches:
        raise UserError(f"backend.attention: the attention of {backend} is always torch's; choose native")
    from diffusers.models import attention_dispatch

    known = [kernel.value for kernel in attention_dispatch.AttentionBackendName]
    if name not in known:
        raise UserError(f"backend.attention: there is no kernel '{name}'{did_you_mean(name, known, 'kernels')}")
    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        raise UserError(f"backend.attention: {_line(error)} Or choose native") from None


def try_attention(name: str, dtype: torch.dtype, head: int, device: torch.device) -> None:
    """Raise UserError unless the kernel gives values and gradients on ``device``, for heads of ``head`` channels.

    On a GPU torch's own choice must be a fused kernel: the plain one keeps every attention score, 84 GB for one image
    of FLUX.1-dev at 720 px.
    """
    import torch
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    native = name == "native"
    if native and device.type != "cuda":
        return
    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]) if native else nullcontext()
    x = torch.ones(1, 16, 1, head, dtype=dtype, device=device, requires_grad=True)
    try:
        with fused, attention_backend(name):
            dispatch_attention_fn(x, x, x).sum().backward()
    except Exception as error:  # packages raise errors of many kinds
        where = f"{device.type}, for {str(dtype).removeprefix('torch.')} and heads of {head} channels"
        instead = "choose backend.dtype: float32" if native else "choose native"
        raise UserError(f"backend.attention: {name} does not work on {where} ({_line(error)}); {instead}") from error


def set_attention(transformer: Network, name: str) -> None:
    """Set the attention kernel of one transformer alone: diffusers would set it for every model."""
    from diffusers.models.attention_dispatch import attention_backend
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hide the warning that the feature is experimental
    try:
        with attention_backend("native"):
            transformer.set_attention_backend(name)
    finally:
        logging.set_verbosity(verbosity)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

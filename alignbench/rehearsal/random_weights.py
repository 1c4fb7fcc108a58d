"""Random weights that do not depend on torch's generators, and the folders that they are saved in."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.digests import content_id
from alignbench.plugins import digest

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def source_digest() -> str:
    """Return the hash of the modules that make tiny models. Their folders' names contain it."""
    here = Path(__file__)
    return content_id([digest(path) for path in sorted([here, *here.parent.glob("tiny_*.py")])])


def make(build: Callable[[Path], Any], folder: Path) -> None:
    """Call ``build`` so that ``folder`` appears complete or not at all. Two processes may make the same folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        build(unfinished := Path(temporary) / "made")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process made the same content first
                raise


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return uniform numbers of mean 0 and variance 1 that depend, to the last bit, only on ``name`` and ``shape``."""
    import numpy as np
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    uniform = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    return torch.from_numpy(uniform * np.float32(12**0.5)).reshape(shape)


SHARPER = 4.0  # factor on query norms, without which random attention weighs all tokens alike


def random_state(shapes: Mapping[str, tuple[int, ...]], gain: float = 1.0) -> dict[str, Tensor]:
    """Return random weights by name, layers with about the given gain; vectors are around 1 (weights) or 0 (biases)."""

    def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return float(name.endswith("weight")) + 0.1 * draw(name, shape)
        return gain * draw(name, shape) / math.prod(shape[1:]) ** 0.5

    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def randomised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with random weights in place of its own; scalars and integer tensors stay."""
    kept = {name: t for name, t in state.items() if not t.ndim or not t.is_floating_point()}
    return {**random_state({n: tuple(t.shape) for n, t in state.items() if n not in kept}), **kept}


def save_randomised(model: Any, folder: Path) -> None:
    """Save a transformers model in ``folder`` with random weights, seeded by the names that the hub's files have."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = randomised(load_file(path))
    sharp = {name: SHARPER * t for name, t in state.items() if name.endswith("q_norm.weight")}
    save_file({**state, **sharp}, path, metadata={"format": "pt"})


def linear_shapes(prefix: str, *sizes: tuple[str, int, int]) -> Shapes:
    """Return {name: shape} of linear layers (name, inputs, outputs)."""
    weights: Shapes = {f"{prefix}{name}.weight": (outputs, inputs) for name, inputs, outputs in sizes}
    return weights | {f"{prefix}{name}.bias": (outputs,) for name, inputs, outputs in sizes}


def norm_shapes(*names: tuple[str, int]) -> Shapes:
    """Return {name: shape} of normalisation layers (name, size)."""
    return {f"{name}.{kind}": (size,) for name, size in names for kind in ("weight", "bias")}

"""LoRA adapters from a file, read strictly: no tensor is ignored, and no key either.

Contradictions about their strength are refused. If nothing says it, it is 1, as in diffusers, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignbench import weights
from alignbench.backends.lora_config import STATE, check_companions, check_targets, sources, strengths
from alignbench.backends.lora_names import XLABS, convert, own_layer, pairs
from alignbench.config import UserError

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
BASE = "base_model_name_or_path"  # peft's key of the model that adapters were trained on
Layers = Mapping[str, tuple[int, int]]  # outputs and inputs of a model's linear layers, by name


class Lora(NamedTuple):
    """Adapters of a model.

    ``tensors``: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` in float32, B multiplied by the strength.
    ``stated``: False if nothing says the strength, which is then 1, as in diffusers.
    ``base``: the model that they were trained on, if anything says it.
    """

    tensors: dict[str, Tensor]
    stated: bool
    base: str | None


def read_lora(
    files: Sequence[Path],
    layers: Layers,
    pipeline: str,
    *,
    alpha: float | None = None,
    scale: float | None = None,
    named: bool = False,
) -> Lora:
    """Return the adapters in ``files``, as ``weights.published`` returns them.

    ``layers``: those of the model. ``pipeline``: diffusers' class, whose converter knows other trainers' names.
    ``alpha``, ``scale``: in place of the file's alpha; in place of alpha / rank. ``named``: the row names the file.
    Raise UserError for a name, a shape, a value or a key that cannot be honoured.
    """
    paths = [file for file in files if file.suffix == ".safetensors"]
    decided = alpha is not None or scale is not None
    tensors, metadata = _read(paths)
    path = paths[0]
    check_companions(path.parent, files, {} if decided else metadata, named, decided)
    found = pairs(tensors, path)
    for layer, pair in found.items():
        _check_ranks(path, layer, tensors[pair.a], tensors[pair.b])
    alphas = {own_layer(layer): _alpha(path, pair.alpha, tensors) for layer, pair in found.items() if pair.alpha}
    ranks = {own_layer(layer): len(tensors[pair.a]) for layer, pair in found.items()}
    said = sources(files, path, metadata, bool(alphas), decided)
    strength = strengths(said, ranks, alphas, path, alpha, scale)
    if not any(tensors[pair.b].any() for pair in found.values()):
        raise UserError(f"{path}: every lora_B is zero, as before training: the row would be the base model")
    scaled: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for layer, pair in found.items():
        b = tensors[pair.b] * strength.factors[own_layer(layer)]
        for name, (down, up) in convert(layer, tensors[pair.a], b, layers, pipeline, path).items():
            if name in origins:
                raise UserError(f"{path}: {origins[name]} and {layer} are both adapters of {name}; keep one")
            _check_shapes(path, name, down, up, layers[name])
            origins[name] = layer
            scaled |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    native = all(own_layer(layer) == name for name, layer in origins.items())
    for source in said:
        check_targets(source, ranks, layers if native else ranks)
    base = next((source.settings[BASE] for source in said if source.settings.get(BASE)), None)
    return Lora(scaled, strength.stated or all(XLABS.match(layer) for layer in found), base)


def _read(paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors in float32, and the headers' free text. UserError for what is not a finite number."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = weights.header(path)
        metadata |= header.metadata
        for name, (dtype, _) in header.tensors.items():
            if dtype not in FLOATS and not name.endswith(".alpha"):
                raise UserError(f"{path}: {name} is {dtype}, not floating-point numbers; save the adapters in float32")
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name).float() for name in header.tensors}
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{path}: {name} has values that are not finite; its training has failed")
        tensors |= found
    if not tensors:
        raise UserError(f"{paths[0]}: there are no tensors in it; fetch it again")
    return tensors, metadata


def _alpha(path: Path, name: str, tensors: Mapping[str, Tensor]) -> float:
    """Return an alpha. UserError unless it is one positive number."""
    if tensors[name].numel() != 1 or tensors[name].item() <= 0:
        raise UserError(f"{path}: {name} is not one positive number; {STATE}, and leave the alphas out of the file")
    return tensors[name].item()


def _check_ranks(path: Path, layer: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] > 0:
        what = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not make a pair of matrices"
        raise UserError(f"{path}: {layer}: {what}; only adapters of linear layers are read")


def _check_shapes(path: Path, layer: str, a: Tensor, b: Tensor, shape: tuple[int, int]) -> None:
    """Raise UserError unless A and B fit the layer."""
    wanted = (len(a), shape[1]), (shape[0], len(a))
    if (a.shape, b.shape) != wanted:
        raise UserError(
            f"{path}: {layer}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit the model's layer, "
            f"which needs {wanted[0]} and {wanted[1]}; are they adapters of this model?"
        )

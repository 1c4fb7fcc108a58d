"""LoRA adapters from a file in diffusers' or peft's layout, read strictly: no name is ignored, no scale is guessed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from alignbench.config import UserError

NAME = re.compile(r"(base_model\.model\.)?(transformer\.)?(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")
METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configuration in a safetensors header


def read_lora(files: Sequence[Path], layers: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Return ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` in float32, B multiplied by the adapter's scale.

    ``layers``: the model's modules by name. UserError for a name or shape that does not fit them.
    """
    path = next(file for file in files if file.suffix == ".safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        config = _config(files, file.metadata() or {})
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None or not hasattr(layers.get(match["layer"]), "in_features"):
            raise UserError(f"{path}: {name} is not a lora_A, lora_B or alpha of a linear layer of the model")
        adapters.setdefault(match["layer"], {})[match["part"]] = tensor.float()
    scaled = {}
    for layer, parts in adapters.items():
        a, b = _check_pair(path, layer, parts, layers[layer])
        scaled[f"{layer}.lora_A.weight"] = a
        scaled[f"{layer}.lora_B.weight"] = b * _scale(layer, len(a), parts.get("alpha"), config)
    return scaled


def _config(files: Sequence[Path], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return peft's configuration, from the file beside the adapters or from their header; {} if there is neither."""
    beside = next((file for file in files if file.name == "adapter_config.json"), None)
    if beside is not None:
        return json.loads(beside.read_text())
    return {key.removeprefix("transformer."): value for key, value in json.loads(metadata.get(METADATA, "{}")).items()}


def _check_pair(path: Path, layer: str, parts: Mapping[str, Tensor], module: Any) -> tuple[Tensor, Tensor]:
    """Return A and B. UserError if one is missing, or does not fit the layer."""
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in parts:
            raise UserError(f"{path}: {layer}.{part} is missing, although its counterpart is there")
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    wanted = (len(a), module.in_features), (module.out_features, len(a))
    if (a.shape, b.shape) != wanted:
        raise UserError(
            f"{path}: {layer}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit the model's layer, "
            f"which needs {wanted[0]} and {wanted[1]}; are they adapters of this model?"
        )
    return a, b


def _scale(layer: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    """Return the factor of B A: alpha / rank, or 1 if alpha is not given anywhere, as in diffusers."""
    patterns = config.get("alpha_pattern") or {}
    listed = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
    known = config.get("lora_alpha", rank) if listed is None else listed
    value = known if alpha is None else alpha.item()
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)

"""LoRA adapters from a file in diffusers' or peft's layout, strictly: no name is ignored, no strength is guessed."""

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
    """``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` in float32, B times the adapter's strength.

    ``layers``: the model's modules by name. UserError for a name or a shape that does not fit them.
    """
    path = next(file for file in files if file.suffix == ".safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        config = _config(files, file.metadata() or {})
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None or not hasattr(layers.get(match["layer"]), "in_features"):
            raise UserError(f"{path}: {name} is no lora_A, lora_B or alpha of a linear layer of the model")
        found.setdefault(match["layer"], {})[match["part"]] = tensor.float()
    ready = {}
    for layer, parts in found.items():
        a, b = _fitting(path, layer, parts, layers[layer])
        ready[f"{layer}.lora_A.weight"] = a
        ready[f"{layer}.lora_B.weight"] = b * _strength(layer, len(a), parts.get("alpha"), config)
    return ready


def _config(files: Sequence[Path], metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration of the adapters: of the file beside them, or of the header; empty where there is neither."""
    beside = next((file for file in files if file.name == "adapter_config.json"), None)
    if beside is not None:
        return json.loads(beside.read_text())
    return {key.removeprefix("transformer."): value for key, value in json.loads(metadata.get(METADATA, "{}")).items()}


def _fitting(path: Path, layer: str, parts: Mapping[str, Tensor], module: Any) -> tuple[Tensor, Tensor]:
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in parts:
            raise UserError(f"{path}: {layer}.{part} is missing, its other half is there")
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    wanted = (len(a), module.in_features), (module.out_features, len(a))
    if (a.shape, b.shape) != wanted:
        raise UserError(
            f"{path}: {layer}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit the model's layer, "
            f"which needs {wanted[0]} and {wanted[1]}; are they adapters of this model?"
        )
    return a, b


def _strength(layer: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    """The factor before B A: alpha / rank, and one where nothing says what alpha is, as in diffusers."""
    patterns = config.get("alpha_pattern") or {}
    listed = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
    known = config.get("lora_alpha", rank) if listed is None else listed
    value = known if alpha is None else alpha.item()
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)

"""Names of adapters' tensors: what each is, and the model's own layer for it, by diffusers' converters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alignbench.config import UserError
from alignbench.weights import unheard

if TYPE_CHECKING:
    from torch import Tensor

PART = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora_A(?:\.(?P<a>[^.]+))?|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight|"
    r"(?P<up>lora_B(?:\.(?P<b>[^.]+))?|lora_up|lora\.up|lora_linear_layer\.up|up)\.weight|"
    r"(?P<alpha>alpha))"
)
PREFIX = re.compile(r"(base_model\.model\.)?(model\.)?(diffusion_model\.|transformer\.)?")
OTHERS = {  # what a tensor is that is not a part of LoRA, by its name
    r"dora_scale|lora_magnitude_vector": "a magnitude of DoRA",
    r"hada_": "a part of LoHa",
    r"lokr_": "a part of LoKr",
    r"oft_|boft_": "a part of OFT",
    r"lora_mid|lora_t\d": "a convolution of LoCon",
    r"lora_[AB].*\.bias|lora_(up|down)\.bias": "a bias of adapters (lora_bias)",
    r"\.diff(_b)?$": "the difference of a whole weight",
    r"query_norm|key_norm|norm_(added_)?[qk]": "a changed norm, as in Black Forest Labs' control adapters",
    r"scale_weight|weight_scale|scaled_fp8|absmax|quant": "a scale of quantized weights",
    r"modules_to_save": "a whole module (modules_to_save)",
}
TEXT_ENCODERS = re.compile(
    r"(base_model\.model\.)?(text_encoders?(_\d)?\.|text_model\.|lora_te\d?_|te\d?\.|t5xxl|clip_[lg])"
)
UNET = re.compile(r"(unet\.|lora_unet_(down|up|mid|input|output|middle)_|(.*\.)?(down|up)_blocks\.|.*input_blocks)")
BFL = re.compile(
    r"(lora_unet_)?(double_blocks|single_blocks|(img|txt|time|vector|guidance)_in|final_layer|\w+_stream_mod)"
)
XLABS = re.compile(r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.")  # its trainer has no alpha
FORMATS = {  # the origin of names that are not the model's
    r"(ema|last)\.": "alignbench's own weights of a run",
    r"lycoris_": "LyCORIS",
    r"lora_transformer_": "OneTrainer",
    r"lora_unet_": "sd-scripts (kohya)",
    r".*\.processor\.": "XLabs or old diffusers",
    r"(.*\.)?joint_blocks": "Stability AI's own names",
    r"(.*\.)?(double|single)_blocks": "Black Forest Labs' own names",
    r"(model\.)?diffusion_model\.": "ComfyUI or ai-toolkit",
}


class Pair(NamedTuple):
    """The names of one layer's tensors in a file: A, B and, if there is one, alpha."""

    a: str
    b: str
    alpha: str | None


def pairs(names: Iterable[str], path: Path) -> dict[str, Pair]:
    """Return the tensors of every adapted layer, under the file's name of the layer.

    Raise UserError for a tensor that is not a part of LoRA, half an adapter, and several adapters in one file.
    """
    found: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for name in sorted(names):
        if TEXT_ENCODERS.match(name):
            what = "it belongs to a text encoder, which stays the base model's; keep the transformer's tensors only"
            raise UserError(f"{path}: {name} is not a lora_A, lora_B or alpha of a linear layer of the model: {what}")
        match = PART.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: {name} is not a lora_A, lora_B or alpha{_other(name)}")
        part = next(part for part in ("down", "up", "alpha") if match[part])
        parts = found.setdefault(match["layer"], {})
        adapters |= {adapter for adapter in (match["a"], match["b"]) if adapter}
        if part in parts and len(adapters) < 2:
            raise UserError(f"{path}: {name} and {parts[part]} are the same part of one layer; keep one")
        parts[part] = name
    if len(adapters) > 1:
        raise UserError(
            f"{path}: it has {len(adapters)} adapters ({', '.join(sorted(adapters))}); save one of them alone"
        )
    for layer, parts in found.items():
        if lacking := [part for part in ("down", "up") if part not in parts]:
            word = {"down": "lora_A", "up": "lora_B"}[lacking[0]]
            whole = f"{layer}.{word}.weight"
            raise UserError(f"{path}: {whole} is missing, although its counterpart is there")
    return {layer: Pair(parts["down"], parts["up"], parts.get("alpha")) for layer, parts in found.items()}


def _other(name: str) -> str:
    """Return what a tensor is that is not a part of LoRA, and the remedy."""
    what = next((what for pattern, what in OTHERS.items() if re.search(pattern, name)), "")
    remedy = "merge the adapters into the model, and load it with kind: transformer"
    if what:
        return f" of a linear layer of the model: it is {what}, which is not read; {remedy}"
    return (
        f" of a linear layer of the model; if it is one of the whole weights, choose kind: transformer; else {remedy}"
    )


def own_layer(layer: str) -> str:
    """Return a layer's name in a file without the prefixes that peft, diffusers and trainers set before it."""
    return layer[PREFIX.match(layer).end() :]  # type: ignore[union-attr]  # it matches the empty text, too


def convert(
    layer: str, a: Tensor, b: Tensor, layers: Collection[str], pipeline: str, path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by the model's layers for one layer of the file: several where the file has them fused.

    ``pipeline``: diffusers' class, whose converter knows the names of other trainers. UserError if it does not.
    """
    if own_layer(layer) in layers:
        return {own_layer(layer): (a, b)}
    if UNET.match(layer):
        raise UserError(f"{path}: {layer}: adapters of a UNet (Stable Diffusion 1, 2, XL), not of this model")
    try:
        found = _converted(layer, a, b, pipeline)
    except (ValueError, KeyError, IndexError, AssertionError, NotImplementedError, RuntimeError):
        found = {}
    whole = sum(len(part) for _, part in found.values()) == len(b)
    if found and whole and set(found) <= set(layers):
        return found
    known = next((name for pattern, name in FORMATS.items() if re.match(pattern, layer)), "")
    what = f"{known}: " if known else ""
    remedy = "rename it to diffusers' names, <layer>.lora_A.weight and <layer>.lora_B.weight"
    unknown = f"is not a lora_A, lora_B or alpha of a linear layer of the model: {what}diffusers converts no such name"
    raise UserError(f"{path}: {layer}.lora_A.weight {unknown} for {pipeline}; {remedy}")


def _converted(layer: str, a: Tensor, b: Tensor, pipeline: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what diffusers' converters make of one layer: A and B by the model's layers."""
    import diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    state = convert_unet_state_dict_to_peft({f"{layer}.down.weight": a, f"{layer}.up.weight": b})
    if not all(PART.fullmatch(name) and ".lora_" in name for name in state):  # not an old name of diffusers
        reader = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
        if reader is None:
            return {}
        with unheard():
            state = reader(_spelled(layer, a, b, pipeline))
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = PART.fullmatch(name)
        if match is None or match["alpha"]:
            return {}
        found.setdefault(own_layer(match["layer"]), {})["down" if match["down"] else "up"] = tensor
    return {name: (parts["down"], parts["up"]) for name, parts in found.items()}


def _spelled(layer: str, a: Tensor, b: Tensor, pipeline: str) -> Mapping[str, Tensor]:
    """Return the tensors under the names by which the converter of ``pipeline`` recognises their format."""
    import torch

    plain = own_layer(layer)
    if ".processor." in layer:
        return {f"{plain}.down.weight": a, f"{plain}.up.weight": b}
    if layer.startswith("lora_transformer_"):
        alpha = torch.tensor(float(len(a)))  # the strength is in B already
        return {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b, f"{layer}.alpha": alpha}
    if BFL.match(plain) and pipeline == "FluxPipeline":  # one of its converters reads parts of a model, too
        flat = f"lora_unet_{plain.removeprefix('lora_unet_').replace('.', '_')}"
        return {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
    if layer.startswith("lora_unet_"):
        return {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b}
    return {f"diffusion_model.{plain}.lora_A.weight": a, f"diffusion_model.{plain}.lora_B.weight": b}

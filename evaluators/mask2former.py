"""mmdet's Mask2Former (Cheng et al. 2022, arXiv 2112.01527) without mmdet: its checkpoint in transformers' classes.

Pre- and postprocessing are those of mmdet 2.27.0, GenEval's environment; transformers' image processor is not used,
since it stretches images, does not pad, and assigns every pixel to one object. Departures:
1. It also runs on CPUs, in fp32; the official script runs on GPUs only.
2. cv2's bilinear resize is reimplemented in numpy, bit for bit, so that OpenCV is not needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench import weights
from alignbench.config import UserError
from alignbench.evaluator import device
from alignbench.prompts.geneval import CLASSES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCALE = (800, 1333)  # largest shorter and longer side of resized images
MULTIPLE, GREY = 32, 128  # sides are padded to this multiple, right and below, with this value before normalisation
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # for red, green and blue
ONE = 2048  # cv2's weights are in fixed point, in units of 1 / ONE
PER_IMAGE = 100  # number of pairs of query and class that are kept
POINTS, LEVELS = 4, 3  # deformable attention's constants; with them its tensors give the number of heads


class Detection(NamedTuple):
    """Detected object: class, box (left, top, right, bottom) around its mask (H, W), confidence; no colour."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray
    color: str | None = None


class Detections(NamedTuple):
    """The PER_IMAGE best pairs of query and class: class numbers, scores, boxes (n, 4) and masks (n, H, W)."""

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


class Mask2Former:
    """Detector with the weights in ``checkpoint``. ``where``: the setting that an error names."""

    def __init__(self, checkpoint: Path, where: str) -> None:
        self.model = load(checkpoint, where).to(device())

    def detect(self, image: np.ndarray, above: float = 0.0) -> list[Detection]:
        """Return the objects with a score above ``above`` in an (H, W, 3) 8-bit RGB image."""
        import torch

        pixels, inside = prepare(image)
        with torch.no_grad(), torch.random.fork_rng(devices=()):  # transformers 5.17 draws unused numbers
            answer = self.model(pixel_values=pixels.to(self.model.device))
            logits = answer.class_queries_logits[0], answer.masks_queries_logits[0]
            detections = read(*logits, padded=tuple(pixels.shape[-2:]), inside=inside, size=image.shape[:2])
        keep = detections.scores > above
        labels, scores, boxes, masks = (tensor[keep].cpu().numpy() for tensor in detections)
        rows = zip(labels.tolist(), scores.tolist(), boxes.tolist(), masks)
        return [Detection(CLASSES[label], tuple(box), score, mask) for label, score, box, mask in rows]


# -- before the network -----------------------------------------------------------------------------------------------


def prepare(image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """Map an (H, W, 3) 8-bit RGB image to (1, 3, h, w) network input, and the image's height and width in it."""
    import numpy as np
    import torch

    short, long = sorted(image.shape[:2])
    scale = min(SCALE[0] / short, SCALE[1] / long)
    height, width = (int(side * scale + 0.5) for side in image.shape[:2])
    border = ((0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0))
    padded = np.pad(resize(image, height, width), border, constant_values=GREY)
    pixels = (torch.from_numpy(padded).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    return pixels.permute(2, 0, 1)[None].contiguous(), (height, width)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return ``cv2.resize(image, (width, height))`` of an 8-bit image: bilinear, in fixed point, not antialiased."""
    import numpy as np

    (rows, down), (columns, across) = _taps(image.shape[0], height), _taps(image.shape[1], width)
    across[:, columns[0] == columns[1]] = [[ONE], [0]]  # cv2 does this beyond the left and right border only
    wide = sum(image.astype(np.int32)[:, at] * weight[:, None] for at, weight in zip(columns, across))
    both = sum((weight[:, None, None] * (wide[at] >> 4)) >> 16 for at, weight in zip(rows, down))
    return ((both + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two of ``old`` pixels around each of ``new`` ones (2, new), and their weights in units of 1 / ONE."""
    import numpy as np

    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(at)
    share = at - first
    both = np.stack([first, first + 1]).clip(0, old - 1).astype(int)
    return both, np.rint(np.stack([1 - share, share]) * ONE).astype(np.int32)


# -- after it ---------------------------------------------------------------------------------------------------------


def read(
    classes: Tensor, masks: Tensor, *, padded: tuple[int, ...], inside: tuple[int, int], size: tuple[int, ...]
) -> Detections:
    """Map (Q, C + 1) class and (Q, h, w) mask logits to detections, with masks of the original ``size``.

    A query may appear under several classes. Its score is the probability of the class times the mean probability of
    the pixels inside the mask.
    """
    from torch.nn.functional import interpolate

    pairs = classes.softmax(-1)[:, :-1]
    scores, best = pairs.flatten().topk(PER_IMAGE)
    logits = interpolate(masks[None], padded, mode="bilinear", align_corners=False)
    logits = logits[:, :, : inside[0], : inside[1]]
    logits = interpolate(logits, size, mode="bilinear", align_corners=False)[0][best // pairs.shape[1]]
    solid = (logits > 0).to(logits)
    certain = (logits.sigmoid() * solid).flatten(1).sum(1) / (solid.flatten(1).sum(1) + 1e-6)
    return Detections(best % pairs.shape[1], scores * certain, _boxes(solid.bool()), solid.bool())


def _boxes(masks: Tensor) -> Tensor:
    """Map (n, H, W) masks to (n, 4) boxes: first column and row, last ones plus one; zeros for an empty mask."""
    import torch

    edges = []
    for line in (masks.any(1), masks.any(2)):
        first, last = line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
        edges.append(torch.stack([first, last * line.any(1)]))
    return torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1).float()


# -- the checkpoint ---------------------------------------------------------------------------------------------------

BODY, HEAD = "model.pixel_level_module", "model.transformer_module"
RULES = (  # mmdet's names, of 3.x and of 2.x (attentions, ffns) -> the hub's names of transformers' Mask2Former
    (r"^backbone\.patch_embed\.projection", rf"{BODY}.encoder.embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed\.norm", rf"{BODY}.encoder.embeddings.norm"),
    (r"^backbone\.stages", rf"{BODY}.encoder.encoder.layers"),
    *((rf"^backbone\.norm{i}", f"{BODY}.encoder.hidden_states_norms.stage{i + 1}") for i in range(4)),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.w_msa\.(qkv|relative_position_bias_table)", r".attention.self.\1"),
    (r"\.attn\.w_msa\.proj", ".attention.output.dense"),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0", r"\1.intermediate.dense"),
    (r"(blocks\.\d+)\.ffn\.layers\.1", r"\1.output.dense"),
    (r"^panoptic_head\.pixel_decoder", f"{BODY}.decoder"),
    (r"input_convs\.(\d)\.conv", r"input_projections.\1.0"),
    (r"input_convs\.(\d)\.gn", r"input_projections.\1.1"),
    (r"lateral_convs\.0\.conv", "adapter_1.0"),
    (r"lateral_convs\.0\.gn", "adapter_1.1"),
    (r"output_convs\.0\.conv", "layer_1.0"),
    (r"output_convs\.0\.gn", "layer_1.1"),
    (r"mask_feature\.", "mask_projection."),
    (r"level_encoding\.weight", "level_embed"),
    (r"(\.encoder\.layers\.\d+)\.attentions\.0", r"\1.self_attn"),
    (r"(\.encoder\.layers\.\d+)\.norms\.0", r"\1.self_attn_layer_norm"),
    (r"(\.encoder\.layers\.\d+)\.norms\.1", r"\1.final_layer_norm"),
    (r"^panoptic_head\.transformer_decoder", f"{HEAD}.decoder"),
    (r"(\.decoder\.layers\.\d+)\.(?:cross_attn|attentions\.0)\.attn", r"\1.cross_attn"),
    (r"(\.decoder\.layers\.\d+)\.(?:self_attn|attentions\.1)\.attn", r"\1.self_attn"),
    (r"(\.decoder\.layers\.\d+)\.norms\.0", r"\1.cross_attn_layer_norm"),
    (r"(\.decoder\.layers\.\d+)\.norms\.1", r"\1.self_attn_layer_norm"),
    (r"(\.decoder\.layers\.\d+)\.norms\.2", r"\1.final_layer_norm"),
    (r"\.(?:ffn|ffns\.0)\.layers\.0\.0", ".fc1"),
    (r"\.(?:ffn|ffns\.0)\.layers\.1", ".fc2"),
    (r"\.post_norm\.", ".layernorm."),
    (r"^panoptic_head\.query_embed", f"{HEAD}.queries_embedder"),
    (r"^panoptic_head\.query_feat", f"{HEAD}.queries_features"),
    (r"^panoptic_head\.level_embed", f"{HEAD}.level_embed"),
    (r"^panoptic_head\.cls_embed", "class_predictor"),
    (r"^panoptic_head\.mask_embed\.0", f"{HEAD}.decoder.mask_predictor.mask_embedder.0.0"),
    (r"^panoptic_head\.mask_embed\.2", f"{HEAD}.decoder.mask_predictor.mask_embedder.1.0"),
    (r"^panoptic_head\.mask_embed\.4", f"{HEAD}.decoder.mask_predictor.mask_embedder.2.0"),
)
UNUSED = {f"{BODY}.encoder.swin.layernorm.weight", f"{BODY}.encoder.swin.layernorm.bias", "criterion.empty_weight"}


def load(checkpoint: Path, where: str) -> Any:
    """Return the frozen model, sized by the checkpoint's tensors, with all of its weights."""
    _check_name(checkpoint, where)
    stored = weights.load(checkpoint, where)
    try:
        state = convert(stored.get("state_dict", stored))
        model, info = _fill(architecture(state), state)
    except (AttributeError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {checkpoint} is not mmdet's Mask2Former with a Swin: {reason}") from None
    missing, unexpected = sorted(set(info["missing_keys"]) - UNUSED), sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise UserError(f"{where}: {checkpoint}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")
    return model.eval().requires_grad_(False)


def _fill(config: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """Return the model and its missing and unexpected keys, without transformers' printed report of them."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    settings: Any = {"config": config, "state_dict": dict(state), "output_loading_info": True}
    try:
        with weights.quiet():
            model_and_info: Any = Mask2FormerForUniversalSegmentation.from_pretrained(None, **settings)
            return model_and_info
    finally:
        logging.set_verbosity(verbosity)


def _check_name(checkpoint: Path, where: str) -> None:
    """Raise UserError if the name ends, as OpenMMLab's do, with a sha256's first digits, and not with this file's."""
    named = re.search(r"-([0-9a-f]{8})\.pth$", checkpoint.name)
    with checkpoint.open("rb") as file:
        if named and not hashlib.file_digest(file, "sha256").hexdigest().startswith(named[1]):
            raise UserError(
                f"{where}: {checkpoint} is damaged: its sha256 does not begin with {named[1]}; download it again"
            )


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of mmdet 2.x or 3.x under the hub's names, in transformers' order of channels."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("relative_position_index"):
            continue
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        converted |= _split(name, _merged(tensor) if ".downsample." in name else tensor)
    return converted


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split a joint tensor of query, key and value where transformers has three."""
    if ".qkv." in name:
        names = [name.replace("qkv", part) for part in ("query", "key", "value")]
    elif ".self_attn.in_proj_" in name:
        names = [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"]
    else:
        return {name: tensor}
    return dict(zip(names, tensor.chunk(3)))


def _merged(tensor: Tensor) -> Tensor:
    """Reorder four neighbours' channels: mmdet's are channel by channel, Swin's neighbour by neighbour, down first."""
    return tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2).contiguous()


def architecture(state: Mapping[str, Tensor]) -> Any:
    """Return the configuration of converted tensors; raise KeyError or ValueError if they are not Mask2Former's."""
    from transformers import Mask2FormerConfig

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in state)

    labels, width = state["class_predictor.weight"].shape
    if labels != len(CLASSES) + 1:
        raise ValueError(f"it knows {labels - 1} classes, not COCO's {len(CLASSES)}")
    pixels, queries = f"{BODY}.decoder", f"{HEAD}.decoder"
    deformable = f"{pixels}.encoder.layers.0"
    settings: Any = {
        "backbone_config": _swin(state, count),
        "num_labels": labels - 1,
        "hidden_dim": width,
        "feature_size": width,
        "mask_feature_size": len(state[f"{pixels}.mask_projection.bias"]),
        "num_attention_heads": len(state[f"{deformable}.self_attn.attention_weights.bias"]) // (POINTS * LEVELS),
        "encoder_layers": count(rf"{pixels}\.encoder\.layers\.\d+\.fc1\.bias"),
        "encoder_feedforward_dim": len(state[f"{deformable}.fc1.bias"]),
        "decoder_layers": count(rf"{queries}\.layers\.\d+\.fc1\.bias") + 1,  # transformers counts the queries too
        "dim_feedforward": len(state[f"{queries}.layers.0.fc1.bias"]),
        "num_queries": len(state[f"{HEAD}.queries_features.weight"]),
    }
    return Mask2FormerConfig(**settings)


def _swin(state: Mapping[str, Tensor], count: Callable[[str], int]) -> Any:
    from transformers import SwinConfig

    encoder, table = f"{BODY}.encoder", "attention.self.relative_position_bias_table"
    tables = [state[f"{encoder}.encoder.layers.{stage}.blocks.0.{table}"] for stage in range(4)]
    settings: Any = {
        "embed_dim": len(state[f"{encoder}.embeddings.norm.weight"]),
        "depths": [count(rf"{encoder}\.encoder\.layers\.{stage}\.blocks\.\d+\.{table}") for stage in range(4)],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (round(len(tables[0]) ** 0.5) + 1) // 2,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    return SwinConfig(**settings)

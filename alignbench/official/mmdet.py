"""The Mask2Former of mmdet on the CPU, in the environment mmdet-official: ``python -I mmdet.py request.json``.

mmdet 3.3.0 is the newest version that installs beside today's torch; GenEval requires 2.27.0. Networks and
post-processing are the same in both. Image preparation is set to that of 2.27.0: resized in 8 bits and padded with grey
before normalisation (3.3.0 resizes in floats and pads with zeros after it). mmcv's compiled operators are not needed,
since it computes deformable attention in PyTorch on the CPU. The sizes of the networks are read from the checkpoint.

In the answer, ``scores`` holds the detections' scores of each image, and ``arrays`` a file per image with the network's
inputs and outputs and the detections.
"""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Absent(types.ModuleType):
    """A module in place of mmcv's compiled operators, which are imported by name and never called."""

    def __getattr__(self, name: str) -> Any:
        """Return None for every operator."""
        if name.startswith("__"):
            raise AttributeError(name)
        return None


absent = Absent("mmcv._ext")
absent.__spec__ = ModuleSpec("mmcv._ext", None)  # mmengine looks for it
sys.modules["mmcv._ext"] = absent
import mmcv  # noqa: E402 - after the lines above
import mmdet  # noqa: E402
from mmcv.transforms import BaseTransform  # noqa: E402
from mmdet.apis import inference_detector, init_detector  # noqa: E402
from mmdet.registry import TRANSFORMS  # noqa: E402
from mmengine.config import Config  # noqa: E402

CONFIG = ".mim/configs/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"


@TRANSFORMS.register_module()
class PadGrey(BaseTransform):
    """The Pad(size_divisor=32, pad_val=(128, 128, 128)) of 2.27.0; that of 3.x counts padding as part of the image."""

    def transform(self, results: dict) -> dict:
        """Pad the image, and leave its recorded size as it is."""
        return {**results, "img": mmcv.impad_to_multiple(results["img"], 32, pad_val=(128, 128, 128))}


def configuration(state: dict) -> Config:
    """Return the packaged configuration of Mask2Former with Swin-S, with the checkpoint's sizes."""
    config = Config.fromfile(Path(mmdet.__file__).parent / CONFIG)

    def count(pattern: str, at: int) -> int:
        return len({name.split(".")[at] for name in state if name.startswith(pattern)})

    head, width = "panoptic_head", state["panoptic_head.query_feat.weight"].shape[1]
    stages = [f"backbone.stages.{i}.blocks." for i in range(4)]
    heads = [state[f"{stage}0.attn.w_msa.relative_position_bias_table"].shape[1] for stage in stages]
    channels = [len(state[f"backbone.norm{i}.weight"]) for i in range(4)]
    config.model.backbone.update(embed_dims=channels[0], depths=[count(stage, 4) for stage in stages], num_heads=heads)
    model = config.model[head]
    model.update(in_channels=channels, feat_channels=width, out_channels=width)
    model.num_queries = len(state[f"{head}.query_feat.weight"])
    parts = {"pixel_decoder.encoder": model.pixel_decoder.encoder, "transformer_decoder": model.transformer_decoder}
    for name, part in parts.items():
        part.num_layers = count(f"{head}.{name}.layers.", name.count(".") + 3)
        for settings in part.layer_cfg.values():
            settings.embed_dims = width
        part.layer_cfg.ffn_cfg.feedforward_channels = len(state[f"{head}.{name}.layers.0.ffn.layers.0.0.bias"])
    for encoding in (model.positional_encoding, model.pixel_decoder.positional_encoding):
        encoding.num_feats = width // 2
    load, resize, *_, pack = config.test_dataloader.dataset.pipeline
    config.test_dataloader.dataset.pipeline = [{**load, "to_float32": False}, resize, {"type": "PadGrey"}, pack]
    return config


def detector(checkpoint: str) -> Any:
    """Return mmdet's model with every tensor of the checkpoint loaded."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model = init_detector(configuration(state), checkpoint, palette="coco", device="cpu")
    model.load_state_dict(state)  # strictly: init_detector only warns
    return model


def main(request: dict) -> None:
    """Detect objects in the request's images and write the answer."""
    model = detector(request["checkpoint"])
    seen: dict[str, torch.Tensor] = {}
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.update(pixels=inputs[0]))
    model.panoptic_head.register_forward_hook(
        lambda module, inputs, answer: seen.update(class_logits=answer[0][-1], mask_logits=answer[1][-1])
    )
    scores, arrays = [], []
    for number, image in enumerate(request["images"]):
        objects = inference_detector(model, image).pred_instances
        parts = {"labels": objects.labels, "scores": objects.scores, "boxes": objects.bboxes, "masks": objects.masks}
        arrays.append(str(Path(request["output"]).with_name(f"{number}.npz")))
        np.savez(arrays[-1], **{name: part.numpy() for name, part in {**seen, **parts}.items()})
        scores.append(objects.scores.tolist())
    versions = {name: version(name) for name in ("mmdet", "mmcv-lite", "mmengine", "torch", "opencv-python-headless")}
    Path(request["output"]).write_text(json.dumps({"scores": scores, "arrays": arrays, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

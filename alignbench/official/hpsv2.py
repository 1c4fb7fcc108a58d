"""The ``score`` function of hpsv2, in the environment hpsv2-official: ``python -I hpsv2.py request.json``.

The package's code runs unmodified, except that two steps are skipped which change no score: it downloads LAION's 3.9 GB
ViT-H-14 only to overwrite it with the checkpoint, and it reads the checkpoint again for every prompt. On a GPU it uses
fp16 autocast. An ``open_clip_config.json`` beside the checkpoint replaces the architecture ViT-H-14.
"""

import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from hpsv2 import img_score
from hpsv2.src.open_clip import factory


def prepare(checkpoint: Path) -> None:
    """Set the architecture, and skip the download and the repeated reading of the checkpoint."""
    beside = checkpoint.with_name("open_clip_config.json")
    if beside.exists():
        config = json.loads(beside.read_text())
        factory._MODEL_CONFIGS["ViT-H-14"] = config.get("model_cfg", config)
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, pretrained, **settings: create(name, None, **settings)
    torch.load = functools.cache(torch.load)  # type: ignore[assignment]


def main(request: dict) -> None:
    """Score the request's images and write the answer."""
    prepare(Path(request["checkpoint"]))
    pairs = zip(request["prompts"], request["images"])
    scores = [img_score.score(image, prompt, cp=request["checkpoint"])[0] for prompt, image in pairs]
    versions = {name: version(name) for name in ("hpsv2x", "torch", "torchvision", "pillow")}
    Path(request["output"]).write_text(json.dumps({"scores": [float(s) for s in scores], "versions": versions}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

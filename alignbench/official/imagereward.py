"""ImageReward's ``score``, in the environment imagereward-official: ``python -I imagereward.py request.json``.

The request also has ``med_config`` (a file) and ``tokenizer`` (a folder with BERT's vocab.txt). The package's scoring
code runs unmodified, but its training loop, which needs diffusers and datasets, is not imported, and the name
'bert-base-uncased', which it has hard-coded, leads to that folder. A checkpoint other than ViT-L/16 gets a vision
transformer of its own shape, with 64 channels per head as in ViT-L.
"""

import json
import os
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.modules["ImageReward.ReFL"] = types.ModuleType("ImageReward.ReFL")
import ImageReward  # noqa: E402 - after the line above
from ImageReward.models.BLIP import blip_pretrain  # noqa: E402
from ImageReward.models.BLIP.vit import VisionTransformer  # noqa: E402


def fit(checkpoint: str) -> None:
    """Make the package build the checkpoint's vision transformer, if that is not its ViT-L/16."""
    state = torch.load(checkpoint, map_location="cpu", mmap=True)
    width = state["blip.visual_encoder.cls_token"].shape[-1]
    depth = len({name.split(".")[3] for name in state if name.startswith("blip.visual_encoder.blocks.")})
    if (width, depth) != (1024, 24):
        vit = VisionTransformer(224, 16, embed_dim=width, depth=depth, num_heads=width // 64)
        blip_pretrain.create_vit = lambda *settings: (vit, width)


def load(request: dict) -> Any:
    """Return the model, loaded in a folder where 'bert-base-uncased' leads to the request's tokenizer."""
    request = {key: os.path.abspath(request[key]) for key in ("checkpoint", "med_config", "tokenizer")}
    fit(request["checkpoint"])
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(request["tokenizer"], Path(folder) / "bert-base-uncased")
        os.chdir(folder)
        model = ImageReward.load(request["checkpoint"], med_config=request["med_config"])
        os.chdir(before)
    return model


def main(request: dict) -> None:
    """Score the request's images and write the answer."""
    model = load(request)
    with torch.no_grad():
        scores = [model.score(prompt, image) for prompt, image in zip(request["prompts"], request["images"])]
    versions = {name: version(name) for name in ("image-reward", "transformers", "torch", "torchvision", "pillow")}
    Path(request["output"]).write_text(json.dumps({"scores": scores, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

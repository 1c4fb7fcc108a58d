"""Tiny random CLIP models and heads in the layouts of HPSv2.1, PickScore, CLIPScore and the aesthetic predictor."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from alignbench.rehearsal.random_weights import Shapes, linear_shapes, random_state, randomised, save_randomised


def clip_tokenizer() -> Any:
    """Return a character-level CLIP tokenizer without merges; ids 0 and 1 are the start and end tokens."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *(c + "</w>" for c in letters), ",", ",</w>", ".", ".</w>"]
    vocab = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


HPS_CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 80, "head_width": 40, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def hps_folder(folder: Path) -> Path:
    """Save HPS_v2.1_compressed.pt in the official layout ({"state_dict": open_clip tensors in fp16}) and its config."""
    import torch
    from open_clip import CLIP

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in randomised(CLIP(**HPS_CONFIG).state_dict()).items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": HPS_CONFIG}))
    return folder


def pickscore_folder(folder: Path) -> Path:
    """Save a two-layer CLIPModel with LAION's activation."""
    return clip_folder(folder, hidden_act="gelu")


def clip_folder(folder: Path, hidden_act: str = "quick_gelu", features: int = 32) -> Path:
    """Save a two-layer CLIPModel with its processor as transformers does, by default with OpenAI's activation."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = clip_tokenizer()
    size = {"shortest_edge": 56}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 56, "width": 56}), tokenizer)
    shared = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act}
    text: dict[str, Any] = {
        "hidden_size": 32,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision: dict[str, Any] = {"hidden_size": 48, "image_size": 56, "patch_size": 14}
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, **vision},
        projection_dim=features,
        logit_scale_init_value=4.6,
    )
    save_randomised(CLIPModel(config), folder)
    processor.save_pretrained(folder)
    return folder


HEAD_SIZES = ((0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1))  # LAION's, and ImageReward's


def head_shapes(prefix: str = "") -> Shapes:
    """Return {name: shape} of the head's five linear layers."""
    return linear_shapes(f"{prefix}layers.", *((str(i), inputs, outputs) for i, inputs, outputs in HEAD_SIZES))


def aesthetic_head(path: Path) -> Path:
    """Save a head in LAION's .pth layout: a plain state dict of its five linear layers."""
    import torch

    torch.save(random_state(head_shapes(), gain=1.5), path)
    return path


HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


def aesthetic_folder(folder: Path) -> Path:
    """Save an aesthetic head, and a CLIP with the number of features that it reads."""
    clip_folder(folder / "clip", features=768)
    return aesthetic_head(folder / HEAD_FILE)

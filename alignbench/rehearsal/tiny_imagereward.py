"""A tiny random ImageReward model in the layout of its checkpoint."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from alignbench.rehearsal.random_weights import Shapes, linear_shapes, norm_shapes, random_state
from alignbench.rehearsal.tiny_clip import head_shapes


def imagereward_shapes(width: int, depth: int, layers: int, inner: int, words: int) -> Shapes:
    """Return {name: shape} of every tensor of ImageReward.pt, for a vision transformer and a BERT of these sizes."""
    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    shapes: Shapes = {
        f"{vit}cls_token": (1, 1, width),
        f"{vit}pos_embed": (1, 197, width),
        f"{vit}patch_embed.proj.weight": (width, 3, 16, 16),
        f"{vit}patch_embed.proj.bias": (width,),
        f"{bert}embeddings.word_embeddings.weight": (words, 768),
        f"{bert}embeddings.position_embeddings.weight": (512, 768),
    }
    shapes |= norm_shapes((f"{vit}norm", width), (f"{bert}embeddings.LayerNorm", 768))
    for i in range(depth):
        at = f"{vit}blocks.{i}."
        mlp = (("mlp.fc1", width, 4 * width), ("mlp.fc2", 4 * width, width))
        shapes |= linear_shapes(at, ("attn.qkv", width, 3 * width), ("attn.proj", width, width), *mlp)
        shapes |= norm_shapes((f"{at}norm1", width), (f"{at}norm2", width))
    for i in range(layers):
        at = f"{bert}encoder.layer.{i}."
        for kind, source in (("attention", 768), ("crossattention", width)):
            keys = ((f"{kind}.self.key", source, 768), (f"{kind}.self.value", source, 768))
            shapes |= linear_shapes(at, (f"{kind}.self.query", 768, 768), *keys, (f"{kind}.output.dense", 768, 768))
            shapes |= norm_shapes((f"{at}{kind}.output.LayerNorm", 768))
        shapes |= linear_shapes(at, ("intermediate.dense", 768, inner), ("output.dense", inner, 768))
        shapes |= norm_shapes((f"{at}output.LayerNorm", 768))
    shapes |= linear_shapes("blip.", ("vision_proj", width, 256), ("text_proj", 768, 256))
    return shapes | head_shapes("mlp.")


def imagereward_folder(folder: Path, width: int = 128, depth: int = 2, layers: int = 2, inner: int = 96) -> Path:
    """Save ImageReward.pt, med_config.json and BERT's vocab.txt in the official layout; scores are about 1 in size."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{c}" for c in letters), *"!&;.,'", "a", "red", "circle", "blue", "##s", "cafe"]
    words = list(dict.fromkeys(words))
    state = random_state(imagereward_shapes(width, depth, layers, inner, len(words) + 2))
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    config: dict[str, Any] = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": 768,
    }
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 12, "pad_token_id": 0}
    config |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "vocab_size": len(words) + 2}
    config |= {"encoder_width": 768, "add_cross_attention": True, "type_vocab_size": 2, "initializer_range": 0.02}
    config |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    return folder

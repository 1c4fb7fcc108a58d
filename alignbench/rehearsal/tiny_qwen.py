"""Tiny random Qwen-VL models in the layouts of HPSv3 and UnifiedReward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignbench.rehearsal.random_weights import Shapes, linear_shapes, norm_shapes, random_state, save_randomised

QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
QWEN_CHAT = (  # renders a question with images as Qwen2-VL's and Qwen2.5-VL's own templates do
    "{% if messages[0].role == 'user' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(folder: Path) -> dict[str, int | None]:
    """Save a tokenizer of bytes without merges and of Qwen's special tokens; return {special token: id}."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    config |= {"model_max_length": 32768, "additional_special_tokens": list(QWEN_SPECIAL[1:])}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": QWEN_CHAT}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_CHAT}))
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}


def qwen2vl_base(folder: Path, width: int = 64) -> Path:
    """Save the files of Qwen2-VL-7B-Instruct that HPSv3 reads: configuration, tokenizer and preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = qwen_tokenizer(folder)
    vision: dict[str, Any] = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": width,
        "num_heads": 2,
        "mlp_ratio": 2,
        "in_chans": 3,
    }
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_act": "quick_gelu"}
    config: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": vision,
    }
    config |= {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": [width // 32, *[3 * width // 64] * 2]}}
    config |= {"max_position_embeddings": 32768, "tie_word_embeddings": False, "use_cache": True}
    config |= {"vocab_size": 320, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    config |= {f"{name}_id": ids[f"<|{token}|>"] for name, token in QWEN_TOKENS.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR))
    return folder


QWEN_TOKENS = {
    "image_token": "image_pad",
    "video_token": "video_pad",
    "vision_start_token": "vision_start",
    "vision_end_token": "vision_end",
}
QWEN_PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def hpsv3_shapes(words: int, width: int = 64, inner: int = 96, layers: int = 2) -> Shapes:
    """Return {name: shape} of every tensor of HPSv3.safetensors for ``qwen2vl_base``, named as in transformers 4.45."""
    tower, kv = 32, width // 2
    shapes: Shapes = {
        "visual.patch_embed.proj.weight": (tower, 3, 2, 14, 14),
        "model.embed_tokens.weight": (words, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (words, width),
    }
    for i in range(2):
        at = f"visual.blocks.{i}."
        attention = (("attn.qkv", tower, 3 * tower), ("attn.proj", tower, tower))
        shapes |= linear_shapes(at, *attention, ("mlp.fc1", tower, 2 * tower), ("mlp.fc2", 2 * tower, tower))
        shapes |= norm_shapes((f"{at}norm1", tower), (f"{at}norm2", tower))
    merger = (("mlp.0", 4 * tower, 4 * tower), ("mlp.2", 4 * tower, width))
    shapes |= linear_shapes("visual.merger.", *merger) | norm_shapes(("visual.merger.ln_q", tower))
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= linear_shapes(at, *((f"self_attn.{x}_proj", width, n) for x, n in zip("qkv", (width, kv, kv))))
        weights: Shapes = {"self_attn.o_proj": (width, width), "mlp.down_proj": (width, inner)}
        weights |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        weights |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"{at}{name}.weight": shape for name, shape in weights.items()}
    return shapes | linear_shapes("rm_head.", ("0", width, 1024), ("3", 1024, 16), ("5", 16, 2))


def hpsv3_folder(folder: Path) -> Path:
    """Save HPSv3.safetensors in the official layout (bfloat16, the head in float32) and its base model's files."""
    from safetensors.torch import save_file

    qwen2vl_base(folder)
    state = random_state(hpsv3_shapes(256 + len(QWEN_SPECIAL) + 1), gain=1.5)
    state = {name: t if name.startswith("rm_head") else t.bfloat16() for name, t in state.items()}
    save_file(state, folder / "HPSv3.safetensors", metadata={"format": "pt"})
    return folder


def qwen_vl_folder(folder: Path, kind: str = "Qwen2_5_VL") -> Path:
    """Save a Qwen2_5_VL or Qwen3_VL of two layers that generates text, with random weights, in the hub's layout."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    ids = qwen_tokenizer(folder)
    patch = 16 if kind == "Qwen3_VL" else 14
    names = kind.replace("3_VL", "3VL")
    text: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 64,
    }
    vision |= {"patch_size": patch, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
    tokens = {f"{name}_id": ids[f"<|{token}|>"] for name, token in QWEN_TOKENS.items()}
    config = getattr(transformers, f"{names}Config")(text_config=text, vision_config=vision, **tokens)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    save_randomised(model, folder)
    named = {"patch_size": patch, "processor_class": f"{names}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR | named))
    return folder

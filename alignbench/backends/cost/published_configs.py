"""Configurations of published models, for plans before any of their files is fetched."""

from __future__ import annotations

from typing import Any

CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
T5_XXL: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}
VAE_16: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16}

FLUX_1_DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "vae": VAE_16,
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
}

PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
CLIP_BIG_G = {**CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}


def _sd3(**transformer: Any) -> dict[str, dict[str, Any]]:
    """Return a Stable Diffusion 3 whose transformer differs from SD3-medium's in these settings."""
    default = {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    }
    clips = {"text_encoder": CLIP_L | PROJECTED, "text_encoder_2": CLIP_BIG_G | PROJECTED}
    return {"transformer": default | transformer, "vae": VAE_16, **clips, "text_encoder_3": T5_XXL}


SD3_MEDIUM = _sd3()
SD3_5_MEDIUM = _sd3(dual_attention_layers=range(13), qk_norm="rms_norm")
SD3_5_LARGE = _sd3(num_layers=38, num_attention_heads=38, qk_norm="rms_norm")


def _klein(double: int, single: int, heads: int, qwen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a FLUX.2 [klein] with these blocks, heads and text encoder."""
    transformer = {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": 128,
        "joint_attention_dim": 3 * qwen["hidden_size"],
        "guidance_embeds": False,
    }
    encoder = {"model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 36, "head_dim": 128}
    encoder |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    return {"transformer": transformer, "vae": {**VAE_16, "latent_channels": 32}, "text_encoder": encoder | qwen}


QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
FLUX_2_KLEIN_4B = _klein(5, 20, 24, QWEN3_4B)
FLUX_2_KLEIN_9B = _klein(8, 24, 32, QWEN3_8B)

VAE_4: dict[str, Any] = {**VAE_16, "latent_channels": 4}  # sd-vae-ft-mse and -ema

SIT_XL_2: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "SiTNetwork",
        "depth": 28,
        "width": 1152,
        "heads": 16,
        "side": 16,
        "channels": 4,
        "classes": 1000,
        "learn_sigma": True,
    },
    "vae": VAE_4,
}

"""Tiny random flow models in the official layout, built by the tests, and prompts that they can encode."""

from __future__ import annotations

import string
from pathlib import Path

import torch

from alignbench.rehearsal.tiny_clip import clip_tokenizer

FLUX_DEV_SCHEDULER = {  # scheduler/scheduler_config.json of FLUX.1-dev
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX_SCHNELL_SCHEDULER = {**FLUX_DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}
PROMPTS = ["a photo of a red circle", "two blue square"]  # also the names of classes
WORDS = [f"▁{word}" for word in ("a", "photo", "of", "red", "green", "blue", "circle", "square", "two", "above")]


def t5_tokenizer(length: int = 512):
    """Return a T5 tokenizer that knows WORDS and single letters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(word, -3.0) for word in WORDS] + [(c, -6.0) for c in string.ascii_lowercase]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def flux_parts(guidance: bool = True, t5_length: int = 512, scale: float = 1.0, **transformer_config) -> dict:
    """Return the parts of a FluxPipeline with 2 + 2 blocks; ``scale`` > 1 makes the random velocity less trivial."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer(t5_length)
    shape = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2}
    shape |= {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    shape |= {"joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": guidance}
    transformer = FluxTransformer2DModel(**{**shape, **transformer_config})
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(scale)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.5)  # pixels well inside [0, 1]
    text = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": clip,
        "text_encoder_2": T5EncoderModel(t5_config),
        "tokenizer_2": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(**(FLUX_DEV_SCHEDULER if guidance else FLUX_SCHNELL_SCHEDULER)),
    }


def flux_folder(folder: Path, **options) -> Path:
    """Save a FluxPipeline; a 32 px image is 8 x 8 = 64 tokens of 16 channels (2x autoencoder, 2 x 2 packing)."""
    from diffusers import FluxPipeline

    FluxPipeline(**flux_parts(**options)).save_pretrained(folder)
    return folder


def mmdet_2(state: dict) -> dict:
    """Return mmdet 3.x's state dict under the names of 2.x, whose layers number their attentions in order."""
    renamed = {}
    for name, tensor in state.items():
        if ".pixel_decoder.encoder." in name:
            name = name.replace(".self_attn.", ".attentions.0.").replace(".ffn.", ".ffns.0.")
        if ".transformer_decoder." in name:
            name = name.replace(".cross_attn.", ".attentions.0.").replace(".self_attn.", ".attentions.1.")
            name = name.replace(".ffn.", ".ffns.0.")
        renamed[name] = tensor
    return renamed

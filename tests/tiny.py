"""Tiny random models in the official layouts, built at test time from the real configuration classes."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch

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
WORDS = [f"▁{word}" for word in ("a", "photo", "of", "red", "green", "blue", "circle", "square", "two", "above")]


def clip_tokenizer():
    """A byte-level CLIP tokenizer without merges: ids 0..1 are the start and end tokens."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *(c + "</w>" for c in letters), ",", ",</w>", ".", ".</w>"]
    vocab = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer(length: int = 512):
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(word, -3.0) for word in WORDS] + [(c, -6.0) for c in string.ascii_lowercase]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def flux_parts(guidance: bool = True, t5_length: int = 512, scale: float = 1.0) -> dict:
    """The parts of a FluxPipeline with 2 + 2 blocks; ``scale`` > 1 makes the random velocity field less trivial."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer(t5_length)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
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
    """A FluxPipeline folder: 2x autoencoder and 2x2 packing, so a 32 px image is 8 x 8 = 64 tokens of 16 channels."""
    from diffusers import FluxPipeline

    FluxPipeline(**flux_parts(**options)).save_pretrained(folder)
    return folder


HPS_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 80, "head_width": 40, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def hps_folder(folder: Path) -> Path:
    """HPS_v2.1_compressed.pt in the official layout ({"state_dict": open_clip tensors in fp16}) and its config."""
    from open_clip import CLIP

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in CLIP(**HPS_CONFIG).state_dict().items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": HPS_CONFIG}))
    return folder


def pickscore_folder(folder: Path) -> Path:
    """A two-layer CLIPModel with its processor, saved by transformers."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    size = {"shortest_edge": 56}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 56, "width": 56}), tokenizer)
    shared = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"hidden_size": 32, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 48, "image_size": 56, "patch_size": 14}
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, **vision},
        projection_dim=32,
        logit_scale_init_value=4.6,
    )
    CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

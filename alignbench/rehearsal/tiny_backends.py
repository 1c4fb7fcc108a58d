"""Small random models of the backends' families, as pipeline folders in the official layout, for rehearsals and tests.

FLUX.1's is the packaged shapes model. The others' images mean nothing, but every line of code between a prompt and an
image runs. Like the checkpoints of tiny_evaluators.py, they are the same on every machine.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignbench import weights
from alignbench.rehearsal import random_weights, tiny_clip, tiny_qwen


def backend(name: str, folder: Path) -> dict[str, Any]:
    """Return settings that point the built-in backend ``name`` at its small model; make it in ``folder`` if missing."""
    if name == "flux":
        return {"model": "shapes", "max_sequence_length": 16}
    made = folder.resolve() / f"{name}-{random_weights.source_digest()[:8]}"
    if not made.exists():
        with weights.quiet():
            random_weights.make(BUILDERS[name], made)
    if name == "sit":
        return {"model": str(made), "vae": str(made / "vae"), "heads": 2}
    return {"model": str(made), "max_sequence_length": LENGTHS[name]}


def randomise(module: Any) -> None:
    """Set the parameters to random numbers seeded by their names; buffers stay."""
    module.load_state_dict(random_weights.randomised(dict(module.named_parameters())), strict=False)


def autoencoder(cls: Any, channels: int, **settings: Any) -> Any:
    """Return an AutoencoderKL (or ``cls``) with two levels: a 32 px image becomes 16 x 16 latents, 8 x 8 tokens."""
    import torch

    vae = cls(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )
    randomise(vae)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.2)  # pixels well inside [0, 1]
    return vae


def t5_tokenizer(words: tuple[str, ...] = ()) -> Any:
    """Return a T5 tokenizer that knows ``words`` and single characters."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(c, -6.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def sd3_folder(folder: Path, *, t5: bool = True, dynamic: bool = False, dual: tuple[int, ...] = (0, 1)) -> Path:
    """Save a StableDiffusion3Pipeline with three blocks, and return its folder.

    ``t5``: with the third text encoder. ``dynamic``: shift the sampling grid by the number of tokens. ``dual``: blocks
    with a second attention within the image, as in SD3.5-medium.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip, sizes, words = tiny_clip.clip_tokenizer(), (16, 24), t5_tokenizer(("a", "photo", "of"))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=sum(sizes),
        pos_embed_max_size=24,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    encoders: list[Any] = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=size,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=size,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        for size in sizes
    ]
    t5_config = T5Config(
        vocab_size=len(words), d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    encoders += [T5EncoderModel(t5_config) if t5 else None]
    for module in filter(None, (transformer, *encoders)):
        randomise(module)
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=autoencoder(
            AutoencoderKL,
            4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        text_encoder=encoders[0],
        tokenizer=clip,
        text_encoder_2=encoders[1],
        tokenizer_2=clip,
        text_encoder_3=encoders[2],
        tokenizer_3=words if t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


QWEN3_CHAT = (  # Qwen3's template for turns without tools, with thinking on or off
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def flux2_folder(folder: Path, *, distilled: bool = False) -> Path:
    """Save a Flux2KleinPipeline with 2 + 2 blocks and a Qwen3 as deep as it is read; return the folder."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    (folder / "tokenizer").mkdir(parents=True)
    ids = tiny_qwen.qwen_tokenizer(folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokenizer.chat_template = QWEN3_CHAT
    text_encoder: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = autoencoder(AutoencoderKLFlux2, 4)
    with torch.no_grad():  # a new one has mean 0 and variance 1, which would hide a missing normalisation
        vae.bn.running_mean.copy_(0.3 * random_weights.draw("bn.running_mean", (16,)))
        vae.bn.running_var.copy_(1 + 0.3 * random_weights.draw("bn.running_var", (16,)))
    randomise(text_encoder)
    randomise(transformer)
    pipeline: Any = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)
    return folder


def sit_folder(folder: Path) -> Path:
    """Save a SiT of two blocks for 32 px, as official checkpoint and as published weights, with its autoencoder."""
    import torch
    from diffusers import AutoencoderKL

    from alignbench.backends.sit_network import SiTNetwork

    network = SiTNetwork(depth=2, width=32, heads=2, side=8)
    randomise(network)
    network.save_pretrained(folder / "transformer")
    torch.save(network.state_dict(), folder / "SiT-XL-2-256x256.pt")
    autoencoder(AutoencoderKL, 4).save_pretrained(folder / "vae")
    return folder


BUILDERS: dict[str, Callable[[Path], Any]] = {"sd3": sd3_folder, "flux2": flux2_folder, "sit": sit_folder}
PROMPTS = {"sit": "imagenet/classes"}  # of families whose models cannot read shapes/train and shapes/test
LENGTHS = {"sd3": 16, "flux2": 128}  # tokens of a prompt; Qwen3's chat template alone takes 60

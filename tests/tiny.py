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


def hps_folder(folder: Path, config: dict = HPS_CONFIG) -> Path:
    """HPS_v2.1_compressed.pt in the official layout ({"state_dict": open_clip tensors in fp16}) and its config."""
    from open_clip import CLIP

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in CLIP(**config).state_dict().items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


def pickscore_folder(folder: Path) -> Path:
    """A two-layer CLIPModel with LAION's activation."""
    return clip_folder(folder, hidden_act="gelu")


def clip_folder(folder: Path, hidden_act: str = "quick_gelu", features: int = 32) -> Path:
    """A two-layer CLIPModel with its processor, saved by transformers. OpenAI's activation by default."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    size = {"shortest_edge": 56}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 56, "width": 56}), tokenizer)
    shared = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act}
    text = {"hidden_size": 32, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 48, "image_size": 56, "patch_size": 14}
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, **vision},
        projection_dim=features,
        logit_scale_init_value=4.6,
    )
    CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def linear_shapes(prefix: str, *sizes: tuple[str, int, int]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of linear layers (name, inputs, outputs)."""
    weights = {f"{prefix}{name}.weight": (outputs, inputs) for name, inputs, outputs in sizes}
    return weights | {f"{prefix}{name}.bias": (outputs,) for name, inputs, outputs in sizes}


def norm_shapes(*names: tuple[str, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (size,) for name, size in names for kind in ("weight", "bias")}


HEAD_SIZES = ((0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1))  # LAION's, and ImageReward's


def head_shapes(prefix: str = "") -> dict[str, tuple[int, ...]]:
    return linear_shapes(f"{prefix}layers.", *((str(i), inputs, outputs) for i, inputs, outputs in HEAD_SIZES))


def random_state(shapes: dict[str, tuple[int, ...]], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Random weights of about unit gain; the weights of norms (one dimension) lie around 1."""
    torch.manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return float(name.endswith("weight")) + 0.1 * torch.randn(shape)
        return gain * torch.randn(shape) / max(shape[-1], 1) ** 0.5

    return {name: draw(name, shape) for name, shape in shapes.items()}


def aesthetic_head(path: Path) -> Path:
    """LAION's .pth layout: a plain state dict of its five linear layers."""
    torch.save(random_state(head_shapes(), gain=1.5), path)
    return path


def imagereward_shapes(width: int, depth: int, layers: int, inner: int, words: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of ImageReward.pt, for a vision transformer and a BERT of these sizes."""
    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
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
    """ImageReward.pt, med_config.json and BERT's vocab.txt in the official layout. The head makes scores of about 1."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{c}" for c in letters), *"!&;.,'", "a", "red", "circle", "blue", "##s", "cafe"]
    words = list(dict.fromkeys(words))
    state = random_state(imagereward_shapes(width, depth, layers, inner, len(words) + 2))
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": 768}
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 12, "pad_token_id": 0}
    config |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "vocab_size": len(words) + 2}
    config |= {"encoder_width": 768, "add_cross_attention": True, "type_vocab_size": 2, "initializer_range": 0.02}
    config |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    return folder


def mask2former_state(
    embed=8, depths=(1, 1, 2, 1), heads=(1, 2, 4, 8), width=32, encoder=1, decoder=2, inner=(16, 24), queries=20
) -> dict:
    """Random tensors under mmdet 3.x's names for a Mask2Former with Swin, whose window is 7; 80 classes."""
    generator, state = torch.Generator().manual_seed(0), {}

    def put(name, *shape, bias=True, scale=None):
        scale = scale or torch.tensor(shape[1:]).prod().item() ** -0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def norm(name, size):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)

    def ffn(name, size, hidden):
        put(f"{name}.ffn.layers.0.0", hidden, size)
        put(f"{name}.ffn.layers.1", size, hidden)

    put("backbone.patch_embed.projection", embed, 3, 4, 4)
    norm("backbone.patch_embed.norm", embed)
    for stage, (depth, head) in enumerate(zip(depths, heads)):
        size = embed * 2**stage
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            table, index = (f"{name}.attn.w_msa.relative_position_{what}" for what in ("bias_table", "index"))
            state[table] = torch.randn(169, head, generator=generator)
            state[index] = swin_index(7)
            put(f"{name}.attn.w_msa.qkv", 3 * size, size)
            put(f"{name}.attn.w_msa.proj", size, size)
            norm(f"{name}.norm1", size)
            norm(f"{name}.norm2", size)
            ffn(name, size, 4 * size)
        if stage < 3:
            norm(f"backbone.stages.{stage}.downsample.norm", 4 * size)
            put(f"backbone.stages.{stage}.downsample.reduction", 2 * size, 4 * size, bias=False)
        norm(f"backbone.norm{stage}", size)
    pixel, head = "panoptic_head.pixel_decoder", "panoptic_head"
    for number, stage in enumerate((3, 2, 1)):
        put(f"{pixel}.input_convs.{number}.conv", width, embed * 2**stage, 1, 1)
        norm(f"{pixel}.input_convs.{number}.gn", width)
    for layer in range(encoder):
        name = f"{pixel}.encoder.layers.{layer}"
        put(f"{name}.self_attn.sampling_offsets", 8 * 3 * 4 * 2, width)
        put(f"{name}.self_attn.attention_weights", 8 * 3 * 4, width)
        put(f"{name}.self_attn.value_proj", width, width)
        put(f"{name}.self_attn.output_proj", width, width)
        ffn(name, width, inner[0])
        for number in range(2):
            norm(f"{name}.norms.{number}", width)
    put(f"{pixel}.level_encoding", 3, width, bias=False)
    put(f"{pixel}.lateral_convs.0.conv", width, embed, 1, 1, bias=False)
    norm(f"{pixel}.lateral_convs.0.gn", width)
    put(f"{pixel}.output_convs.0.conv", width, width, 3, 3, bias=False)
    norm(f"{pixel}.output_convs.0.gn", width)
    put(f"{pixel}.mask_feature", width, width, 1, 1)
    for layer in range(decoder):
        name = f"{head}.transformer_decoder.layers.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for what, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
                state[f"{name}.{attention}.attn.in_proj_{what}"] = torch.randn(shape, generator=generator) * 0.2
            put(f"{name}.{attention}.attn.out_proj", width, width)
        ffn(name, width, inner[1])
        for number in range(3):
            norm(f"{name}.norms.{number}", width)
    norm(f"{head}.transformer_decoder.post_norm", width)
    for name in ("query_embed", "query_feat"):
        put(f"{head}.{name}", queries, width, bias=False, scale=1)
    put(f"{head}.level_embed", 3, width, bias=False, scale=1)
    put(f"{head}.cls_embed", 81, width, scale=1)
    for number in (0, 2, 4):
        put(f"{head}.mask_embed.{number}", width, width)
    return state


def swin_index(window: int) -> torch.Tensor:
    """Swin's relative_position_index: which row of the table the pair (i, j) of a window's pixels reads."""
    y, x = (torch.arange(window**2).div(window, rounding_mode="floor"), torch.arange(window**2) % window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def mmdet_2(state: dict) -> dict:
    """mmdet 3.x's names as 2.x has them: its layers number their attentions, in the order in which they run."""
    renamed = {}
    for name, tensor in state.items():
        if ".pixel_decoder.encoder." in name:
            name = name.replace(".self_attn.", ".attentions.0.").replace(".ffn.", ".ffns.0.")
        if ".transformer_decoder." in name:
            name = name.replace(".cross_attn.", ".attentions.0.").replace(".self_attn.", ".attentions.1.")
            name = name.replace(".ffn.", ".ffns.0.")
        renamed[name] = tensor
    return renamed


def mask2former_file(path: Path, state: dict | None = None) -> Path:
    """A checkpoint as OpenMMLab publishes it: in torch's older format, with a ``meta`` of plain values."""
    meta = {"env_info": "", "config": "", "epoch": 1, "CLASSES": ("person", "bicycle"), "PALETTE": None}
    checkpoint = {"meta": meta, "state_dict": mask2former_state() if state is None else state}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    return path


QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
QWEN_CHAT = (  # what Qwen2-VL's and Qwen2.5-VL's templates say about one turn with images
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(folder: Path) -> dict[str, int]:
    """tokenizer.json and its configuration: bytes without merges, then Qwen's special tokens. Returns their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"model_max_length": 32768, "additional_special_tokens": list(QWEN_SPECIAL[1:])}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": QWEN_CHAT}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_CHAT}))
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}


def qwen2vl_base(folder: Path, width: int = 64) -> Path:
    """What HPSv3 reads of Qwen2-VL-7B-Instruct, in the hub's layout: configuration, tokenizer and preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = qwen_tokenizer(folder)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "in_chans": 3}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_act": "quick_gelu"}
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": vision}
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


def hpsv3_shapes(words: int, width: int = 64, inner: int = 96, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Every tensor of HPSv3.safetensors for ``qwen2vl_base``, by the names of transformers 4.45."""
    tower, kv = 32, width // 2
    shapes: dict[str, tuple[int, ...]] = {
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
        weights = {"self_attn.o_proj": (width, width), "mlp.down_proj": (width, inner)}
        weights |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        weights |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"{at}{name}.weight": shape for name, shape in weights.items()}
    return shapes | linear_shapes("rm_head.", ("0", width, 1024), ("3", 1024, 16), ("5", 16, 2))


def hpsv3_folder(folder: Path) -> Path:
    """HPSv3.safetensors in the official layout (bfloat16, the head in float32), and its base model's files."""
    from safetensors.torch import save_file

    qwen2vl_base(folder)
    state = random_state(hpsv3_shapes(256 + len(QWEN_SPECIAL) + 1), gain=1.5)
    state = {name: t if name.startswith("rm_head") else t.bfloat16() for name, t in state.items()}
    save_file(state, folder / "HPSv3.safetensors", metadata={"format": "pt"})
    return folder


def judge_folder(folder: Path, kind: str, gain: float) -> Path:
    """A Qwen2_5_VL or Qwen3_VL of two layers that can be asked, with random weights, in the hub's layout.

    ``gain``: of its matrices, so that it does not say the same of everything.
    """
    import transformers

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    ids = qwen_tokenizer(folder)
    patch = 16 if kind == "Qwen3_VL" else 14
    names = kind.replace("3_VL", "3VL")
    text = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"patch_size": patch, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
    tokens = {f"{name}_id": ids[f"<|{token}|>"] for name, token in QWEN_TOKENS.items()}
    config = getattr(transformers, f"{names}Config")(text_config=text, vision_config=vision, **tokens)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim == 1 else gain)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    named = {"patch_size": patch, "processor_class": f"{names}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR | named))
    return folder

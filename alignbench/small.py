"""Small random checkpoints of the built-in evaluators, in the official layouts: for rehearsals, the doctor, and tests.

Their numbers mean nothing, but every line of code between a picture and its score runs, with the official files' names
and tensors. They are the same on every machine: random numbers are PCG64's raw bits, which numpy promises to keep,
seeded by each tensor's name.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError, did_you_mean
from alignbench.plugins import digest

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def checkpoint(evaluator: str, folder: Path) -> dict[str, Any]:
    """Settings that point the built-in ``evaluator`` at its small checkpoint.

    It is made in a folder of its own within ``folder``, whole or not at all, unless it is there. ``hpsv2`` and
    ``pickscore`` have packaged ones, trained for the shapes world. GenEval's is Mask2Former with its CLIP; its shapes
    detector has no weights. UserError, with all names, for any other evaluator: plug-ins have none.
    """
    if evaluator in PACKAGED:
        return {"weights": "shapes"}
    if evaluator not in MADE:
        known = did_you_mean(evaluator, sorted({*PACKAGED, *MADE}), "they exist for")
        raise UserError(f"there is no small checkpoint for the evaluator '{evaluator}'{known}")
    made = folder.resolve() / f"{evaluator}-{digest(Path(__file__))[:8]}"
    if not made.exists():
        make(MADE[evaluator], made)
    return _settings(evaluator, made)


def make(build: Callable[[Path], Any], folder: Path) -> None:
    """``build(folder)``, whole or not at all. Two processes may make the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        build(unfinished := Path(temporary) / "made")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same content
                raise


def _settings(evaluator: str, made: Path) -> dict[str, Any]:
    """Where in the folder ``made`` the evaluator finds what."""
    places = {
        "imagereward": {"weights": made, "tokenizer": made},
        "hpsv3": {"weights": made, "base": made},
        "aesthetic": {"weights": made / HEAD_FILE, "clip": made / "clip"},
        "geneval": {"detector": made / DETECTOR_FILE, "clip": made / "clip"},
    }
    return {name: str(path) for name, path in places.get(evaluator, {"weights": made}).items()}


# -- random tensors ---------------------------------------------------------------------------------------------------


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers of mean 0 and variance 1 that depend on ``name`` and ``shape`` alone, to the last bit."""
    import numpy as np
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    uniform = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    return torch.from_numpy(uniform * np.float32(12**0.5)).reshape(shape)


SHARPER = 4.0  # queries that are normalised: else random attention sees everything alike


def random_state(shapes: Mapping[str, tuple[int, ...]], gain: float = 1.0) -> dict[str, Tensor]:
    """Random weights by name, of about the given gain; of one dimension: around 1 (norms' weights) or around 0."""

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return float(name.endswith("weight")) + 0.1 * draw(name, shape)
        return gain * draw(name, shape) / math.prod(shape[1:]) ** 0.5

    return {name: one(name, shape) for name, shape in shapes.items()}


def randomised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with random weights in place of its own; single numbers and indices stay."""
    kept = {name: t for name, t in state.items() if not t.ndim or not t.is_floating_point()}
    return {**random_state({n: tuple(t.shape) for n, t in state.items() if n not in kept}), **kept}


def _save(model: Any, folder: Path) -> None:
    """A transformers model in ``folder``, its weights made random under the names that the hub's files have."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = randomised(load_file(path))
    sharp = {name: SHARPER * t for name, t in state.items() if name.endswith("q_norm.weight")}
    save_file({**state, **sharp}, path, metadata={"format": "pt"})


def linear_shapes(prefix: str, *sizes: tuple[str, int, int]) -> Shapes:
    """{name: shape} of linear layers (name, inputs, outputs)."""
    weights: Shapes = {f"{prefix}{name}.weight": (outputs, inputs) for name, inputs, outputs in sizes}
    return weights | {f"{prefix}{name}.bias": (outputs,) for name, inputs, outputs in sizes}


def norm_shapes(*names: tuple[str, int]) -> Shapes:
    return {f"{name}.{kind}": (size,) for name, size in names for kind in ("weight", "bias")}


# -- CLIP, and what is built on it ------------------------------------------------------------------------------------


def clip_tokenizer() -> Any:
    """A byte-level CLIP tokenizer without merges: ids 0..1 are the start and end tokens."""
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
    """HPS_v2.1_compressed.pt in the official layout ({"state_dict": open_clip tensors in fp16}) and its config."""
    import torch
    from open_clip import CLIP

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in randomised(CLIP(**HPS_CONFIG).state_dict()).items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": HPS_CONFIG}))
    return folder


def pickscore_folder(folder: Path) -> Path:
    """A two-layer CLIPModel with LAION's activation."""
    return clip_folder(folder, hidden_act="gelu")


def clip_folder(folder: Path, hidden_act: str = "quick_gelu", features: int = 32) -> Path:
    """A two-layer CLIPModel with its processor, saved by transformers. OpenAI's activation by default."""
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
    _save(CLIPModel(config), folder)
    processor.save_pretrained(folder)
    return folder


HEAD_SIZES = ((0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1))  # LAION's, and ImageReward's


def head_shapes(prefix: str = "") -> Shapes:
    return linear_shapes(f"{prefix}layers.", *((str(i), inputs, outputs) for i, inputs, outputs in HEAD_SIZES))


def aesthetic_head(path: Path) -> Path:
    """LAION's .pth layout: a plain state dict of its five linear layers."""
    import torch

    torch.save(random_state(head_shapes(), gain=1.5), path)
    return path


HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


def aesthetic_folder(folder: Path) -> Path:
    """The head, and a CLIP with as many features as it reads."""
    clip_folder(folder / "clip", features=768)
    return aesthetic_head(folder / HEAD_FILE)


def imagereward_shapes(width: int, depth: int, layers: int, inner: int, words: int) -> Shapes:
    """Every tensor of ImageReward.pt, for a vision transformer and a BERT of these sizes."""
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
    """ImageReward.pt, med_config.json and BERT's vocab.txt in the official layout. The head makes scores of about 1."""
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


def mask2former_state(
    embed: int = 8,
    depths: tuple[int, ...] = (1, 1, 2, 1),
    heads: tuple[int, ...] = (1, 2, 4, 8),
    width: int = 32,
    encoder: int = 1,
    decoder: int = 2,
    inner: tuple[int, int] = (16, 24),
    queries: int = 20,
) -> dict[str, Tensor]:
    """Random tensors under mmdet 3.x's names for a Mask2Former with Swin, whose window is 7; 80 classes."""
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int, bias: bool = True, scale: float | None = None) -> None:
        state[f"{name}.weight"] = draw(name, shape) * (scale or math.prod(shape[1:]) ** -0.5)
        if bias:
            state[f"{name}.bias"] = draw(f"{name}.bias", shape[:1]) * 0.1

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * draw(name, (size,))
        state[f"{name}.bias"] = 0.2 * draw(f"{name}.bias", (size,))

    def ffn(name: str, size: int, hidden: int) -> None:
        put(f"{name}.ffn.layers.0.0", hidden, size)
        put(f"{name}.ffn.layers.1", size, hidden)

    put("backbone.patch_embed.projection", embed, 3, 4, 4)
    norm("backbone.patch_embed.norm", embed)
    for stage, (depth, head) in enumerate(zip(depths, heads)):
        size = embed * 2**stage
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            table, index = (f"{name}.attn.w_msa.relative_position_{what}" for what in ("bias_table", "index"))
            state[table] = draw(table, (169, head))
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
    pixel, panoptic = "panoptic_head.pixel_decoder", "panoptic_head"
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
        name = f"{panoptic}.transformer_decoder.layers.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for what, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
                joint = f"{name}.{attention}.attn.in_proj_{what}"
                state[joint] = draw(joint, shape) * 0.2
            put(f"{name}.{attention}.attn.out_proj", width, width)
        ffn(name, width, inner[1])
        for number in range(3):
            norm(f"{name}.norms.{number}", width)
    norm(f"{panoptic}.transformer_decoder.post_norm", width)
    for name in ("query_embed", "query_feat"):
        put(f"{panoptic}.{name}", queries, width, bias=False, scale=1)
    put(f"{panoptic}.level_embed", 3, width, bias=False, scale=1)
    put(f"{panoptic}.cls_embed", 81, width, scale=1)
    for number in (0, 2, 4):
        put(f"{panoptic}.mask_embed.{number}", width, width)
    return state


def swin_index(window: int) -> Tensor:
    """Swin's relative_position_index: which row of the table the pair (i, j) of a window's pixels reads."""
    import torch

    y, x = (torch.arange(window**2).div(window, rounding_mode="floor"), torch.arange(window**2) % window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def mask2former_file(path: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """A checkpoint as OpenMMLab publishes it: in torch's older format, with a ``meta`` of plain values."""
    import torch

    meta = {"env_info": "", "config": "", "epoch": 1, "CLASSES": ("person", "bicycle"), "PALETTE": None}
    checkpoint = {"meta": meta, "state_dict": mask2former_state() if state is None else state}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    return path


DETECTOR_FILE = "mask2former.pth"


def geneval_folder(folder: Path) -> Path:
    """Mask2Former, and the CLIP that names colours."""
    clip_folder(folder / "clip")
    return mask2former_file(folder / DETECTOR_FILE)


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


def qwen_tokenizer(folder: Path) -> dict[str, int | None]:
    """tokenizer.json and its configuration: bytes without merges, then Qwen's special tokens. Returns their ids."""
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
    """What HPSv3 reads of Qwen2-VL-7B-Instruct, in the hub's layout: configuration, tokenizer and preprocessing."""
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
    """Every tensor of HPSv3.safetensors for ``qwen2vl_base``, by the names of transformers 4.45."""
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
    """HPSv3.safetensors in the official layout (bfloat16, the head in float32), and its base model's files."""
    from safetensors.torch import save_file

    qwen2vl_base(folder)
    state = random_state(hpsv3_shapes(256 + len(QWEN_SPECIAL) + 1), gain=1.5)
    state = {name: t if name.startswith("rm_head") else t.bfloat16() for name, t in state.items()}
    save_file(state, folder / "HPSv3.safetensors", metadata={"format": "pt"})
    return folder


def judge_folder(folder: Path, kind: str = "Qwen2_5_VL") -> Path:
    """A Qwen2_5_VL or Qwen3_VL of two layers that can be asked, with random weights, in the hub's layout."""
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
    _save(model, folder)
    named = {"patch_size": patch, "processor_class": f"{names}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR | named))
    return folder


PACKAGED = ("hpsv2", "pickscore")
MADE: dict[str, Callable[[Path], Any]] = {
    "aesthetic": aesthetic_folder,
    "clipscore": clip_folder,
    "diversity": clip_folder,
    "base_distance": clip_folder,
    "geneval": geneval_folder,
    "hpsv3": hpsv3_folder,
    "imagereward": imagereward_folder,
    "unifiedreward": judge_folder,
}

"""Train the small FLUX of the shapes world: text encoders, autoencoder, flow, in diffusers' FluxPipeline layout.

Two departures from plain pretraining leave errors for alignment to repair:
1. Caption noise. With probability `miss_rate` one attribute of an image contradicts its caption, so the base model's
   errors are semantic (a wrong colour, count or side in a clean image), not smears.
2. The guidance embedding carries that probability: contradictions are less frequent at higher guidance. Guidance then
   means adherence to the prompt, as in FLUX.1-dev, whose guidance is distilled.
The text encoders are trained to name the attributes of the object each token belongs to, then frozen: a flow of this
size learns binding and layout last, and should not have to learn language too.
"""

# mypy: ignore-errors
# the reason: diffusers' lazy imports hide that its models are torch modules

import copy
import itertools
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from alignbench.plugins import Registry
from alignbench.shapes import ASSETS, MAX_TEXT
from alignbench.shapes import checker as C
from alignbench.shapes import scene as S

GENEVAL = Registry().get("evaluator", "geneval", "alignbench.shapes.build")  # the evaluator that judges every sweep
WORDS = ["a", "photo", "of", "and", "left", "right", "above", "below", "two", "three", "four"]
WORDS += [*S.COLOURS, *S.SHAPES, *S.PLURALS.values()]
SCHEDULER = {  # FLUX.1-dev's scheduler_config.json
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def replace_folder(folder: Path, fill) -> None:
    """Call fill(temporary folder), then replace `folder` with it: readers never see half of a checkpoint."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for file in filter(Path.is_file, temporary.rglob("*")):
        file.chmod(0o644)  # safetensors writes 0600, which an installed package would keep
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def prompts(work: Path) -> None:
    """Make assets/prompts: three files of GenEval metadata."""
    replace_folder(ASSETS / "prompts", S.write_prompts)


def captions() -> tuple[list[dict], np.ndarray]:
    """Return the captions that training may see, with weights: largest for position and attributes, the hardest."""
    parts = S.splits()
    own, extra = parts["train"] + parts["spare"], S.auxiliary()
    share = dict(zip(S.TASKS, (0.05, 0.12, 0.10, 0.13, 0.14, 0.24), strict=True))
    extra_share = {"counting": 0.10, "position": 0.12}
    items, weight = [], []
    for group, shares in ((own, share), (extra, extra_share)):
        for task, mass in shares.items():
            same = [m for m in group if m["tag"] == task]
            items += same
            weight += [mass / len(same)] * len(same)
    weight = np.array(weight)
    return items, weight / weight.sum()


# ---------------------------------------------------------------------------------------------------- text encoders


def t5_tokenizer(folder: Path) -> None:
    """Save a unigram vocabulary of whole words in T5TokenizerFast's layout."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"▁{w}", -2.0) for w in dict.fromkeys(WORDS))]
    T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=MAX_TEXT).save_pretrained(folder)


def clip_tokenizer(folder: Path, words: list[str], length: int) -> None:
    """Train a BPE vocabulary until each word is one token; save it in CLIPTokenizer's layout."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(dict.fromkeys(words))] * 2, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = [*sorted(model["vocab"], key=model["vocab"].get), "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(vocab)}, merges=merges, model_max_length=length)
    tokenizer.save_pretrained(folder)


SLOTS = {"shape": S.SHAPES, "colour": tuple(S.COLOURS), "role": S.RELATIONS}
WIDTHS = {"shape": 6, "colour": 7, "count": 5, "role": 5}  # one more than there are values: 'none'
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _object(clause: dict | None, role: str | None) -> list[int]:
    """Return the class numbers [shape, colour, count, role]; 0 is none."""
    if clause is None:
        return [0, 0, 0, 0]
    colour = clause.get("color")
    return [
        1 + S.SHAPES.index(clause["class"]),
        1 + SLOTS["colour"].index(colour) if colour else 0,
        clause["count"],
        1 + S.RELATIONS.index(role) if role else 0,
    ]


def slots(meta: dict) -> list[list[int]]:
    """Return the two objects of a sentence in the order it names them, [2][4]."""
    first, second = meta["include"][0], (meta["include"] + [None])[1]
    if second and "position" in second:  # 'a photo of a B left of a A': include is [A, B]
        relation = second["position"][0]
        return [_object(second, relation), _object(first, OPPOSITE[relation])]
    return [_object(first, None), _object(second, None)]


def token_slots(meta: dict) -> np.ndarray:
    """Return for each T5 token the attributes of the object whose phrase it is in, [MAX_TEXT, 4]; -1: no label."""
    out = np.full((MAX_TEXT, 4), -1)
    objects, which, nouns = slots(meta), 0, set(S.SHAPES) | set(S.PLURALS.values())
    for i, word in enumerate(meta["prompt"].split()):
        if i >= 3:  # after 'a photo of'
            out[i] = objects[which]
        which += word in nouns and which == 0
    return out


class Heads(nn.Module):
    """Linear read-outs of the attributes of n objects."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.n, self.out = n, nn.Linear(width, n * sum(WIDTHS.values()))

    def loss(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden [B, width] and target [B, n, 4] (-1: ignored) to the cross entropy and the exact rows [B, n]."""
        parts = self.out(hidden).view(len(hidden), self.n, -1).split(list(WIDTHS.values()), -1)
        loss = sum(
            F.cross_entropy(p.flatten(0, 1), target[..., k].flatten(), ignore_index=-1) for k, p in enumerate(parts)
        )
        right = torch.stack([(p.argmax(-1) == target[..., k]) | (target[..., k] < 0) for k, p in enumerate(parts)])
        return loss, right.all(0).all(-1)


def build_text(folder: Path):
    """Return untrained encoders and their tokenizers, which are saved in `folder`."""
    t5_tokenizer(folder / "tokenizer_2")
    clip_tokenizer(folder / "tokenizer", WORDS, MAX_TEXT)
    clip_words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5_words = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_words),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=16,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            projection_dim=64,
            num_attention_heads=4,
            max_position_embeddings=MAX_TEXT,
            hidden_act="gelu",
            bos_token_id=clip_words.bos_token_id,
            eos_token_id=clip_words.eos_token_id,
            pad_token_id=clip_words.pad_token_id,
        )
    )
    return clip, clip_words, t5, t5_words


def load_text(folder: Path):
    """Return (CLIP, its tokenizer, T5, its tokenizer), frozen."""
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().requires_grad_(False)
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval().requires_grad_(False)
    return (
        clip,
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        t5,
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )


def tokens(tokenizer, texts: list[str]) -> Tensor:
    """Return [B, MAX_TEXT] ids, padded as FluxPipeline pads."""
    length = {"padding": "max_length", "max_length": MAX_TEXT, "truncation": True}
    return tokenizer(texts, return_tensors="pt", **length).input_ids


def text(work: Path, steps: int = 1500) -> None:
    """Pretrain both encoders on the training sentences; measure on the held-out ones."""
    items, weight = captions()
    held = [m for name in ("val", "test") for m in S.splits()[name]]
    clip, clip_words, t5, t5_words = build_text(work)
    data = {}
    for name, group in (("train", items), ("held", held)):
        texts = [m["prompt"] for m in group]
        data[name] = (
            tokens(clip_words, texts), tokens(t5_words, texts),
            torch.tensor([slots(m) for m in group]), torch.tensor(np.stack([token_slots(m) for m in group])),
        )  # fmt: skip
    # CLIP's pooled vector and T5's end and padding tokens name the whole sentence, T5's words their own object
    heads = nn.ModuleDict({"pooled": Heads(64, 2), "rest": Heads(64, 2), "word": Heads(64, 1)})
    parameters = [*clip.parameters(), *t5.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = np.random.default_rng(1)
    for step in range(steps):
        rows = torch.from_numpy(rng.choice(len(items), 64, p=weight))
        loss, _ = text_loss(clip, t5, heads, [d[rows] for d in data["train"]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 300 == 299:
            with torch.no_grad():
                accuracy = text_loss(clip, t5, heads, data["held"])[1]
            print(f"  text {step + 1}: loss {loss.item():.4f}, held-out exact {accuracy}", flush=True)
    clip.save_pretrained(work / "text_encoder")
    t5.save_pretrained(work / "text_encoder_2")


def text_loss(clip, t5, heads, batch):
    """Return the sum of the three read-outs' losses, and the share of sentences each reads without a mistake."""
    clip_ids, t5_ids, whole, words = batch
    pooled = clip(clip_ids).pooler_output
    hidden = t5(t5_ids).last_hidden_state
    length = (t5_ids != 0).sum(1)  # the end token is at length - 1
    rest = torch.arange(MAX_TEXT)[None] >= length[:, None] - 1
    whole_rest = whole[:, None].expand(-1, MAX_TEXT, -1, -1)[rest]
    l1, ok1 = heads["pooled"].loss(pooled, whole)
    l2, ok2 = heads["rest"].loss(hidden[rest], whole_rest)
    l3, ok3 = heads["word"].loss(hidden.flatten(0, 1), words.flatten(0, 1)[:, None])
    return l1 + l2 + l3, [round(ok.float().mean().item(), 3) for ok in (ok1, ok2, ok3)]


# ---------------------------------------------------------------------------------------------------- autoencoder


def scenes_to_pixels(scenes) -> Tensor:
    """Render scenes as [B, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(np.stack([S.render(s) for s in scenes])).permute(0, 3, 1, 2) * 2 - 1


def build_autoencoder() -> AutoencoderKL:
    """Return an autoencoder with f = 4 and 4 channels; 2x2 of its 8x8 latent are one 8-pixel cell. 0.4 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=S.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def free_scene(rng: np.random.Generator):
    """Draw mostly grid scenes; one in four is off the grid, overlaps included, so that decoding stays sane there."""
    if rng.random() < 0.75:
        return S.random_scene(rng)
    names = list(S.COLOURS)
    return tuple(
        S.Shape(S.SHAPES[rng.integers(5)], names[rng.integers(6)], *rng.uniform(4, 28, 2), rng.uniform(3.2, 3.9))
        for _ in range(rng.integers(1, 5))
    )


def autoencoder(work: Path, steps: int = 1100) -> None:
    """Train by ink-weighted L1 and squared error with a small KL; store the latents' mean and spread in the config."""
    model = build_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(2)
    for step in range(steps):
        x = scenes_to_pixels([free_scene(rng) for _ in range(32)])
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample(generator)).sample
        weight = 1 + 3 * ((x - (2 * S.BACKGROUND - 1)).abs().amax(1, keepdim=True) > 0.1)
        loss = (weight * (y - x).abs()).mean() + 2 * (weight * (y - x) ** 2).mean() + 4e-3 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  autoencoder {step + 1}: loss {loss.item():.4f}", flush=True)
    measure_autoencoder(model.eval(), rng)
    model.save_pretrained(work / "vae")


@torch.no_grad()
def measure_autoencoder(model: AutoencoderKL, rng: np.random.Generator) -> None:
    """Set shift and scale from latents of prompts' scenes; print the error of a round trip."""
    items, weight = captions()
    metas = [items[i] for i in rng.choice(len(items), 512, p=weight)]
    x = scenes_to_pixels([S.sample_scene(rng, m) for m in metas])
    z = model.encode(x).latent_dist.mean
    model.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))
    y = model.decode(z).sample.clamp(-1, 1)
    images = to_numpy(y)
    exact = np.mean([GENEVAL.judge_shapes(C.detect(i), m)[1] for i, m in zip(images, metas, strict=True)])
    psnr = -10 * np.log10(((y - x) ** 2).mean().item() / 4)
    spread = z.flatten(2).std((0, 2)).tolist()
    print(
        f"  autoencoder: {psnr:.1f} dB, strict {exact:.3f}, channel spread {spread}, kept {model.config.scaling_factor}"
    )


def to_numpy(pixels: Tensor) -> np.ndarray:
    """Map [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded as in FluxPipeline's postprocessing."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------------------- flow

TASK_NOISE = {  # factor of the miss rate by task: large models seldom fail at single shapes, often at relations
    "single_object": 0.3, "two_object": 0.6, "counting": 0.9, "colors": 0.8, "position": 1.1, "color_attr": 1.1,
}  # fmt: skip
GUIDANCE = (1.0, 5.0)


def miss_rate(guidance, low: float, high: float):
    """Return the share of contradicted captions at a guidance in [1, 5]: from `high` down to `low`, linear."""
    return high + (low - high) * (guidance - GUIDANCE[0]) / (GUIDANCE[1] - GUIDANCE[0])


@torch.no_grad()
def latents(work: Path, n: int = 32_768) -> None:
    """Encode n captions, each with a true and a contradicting scene: latents.pt [n, 2, 16, 16], packed, in fp16."""
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    items, weight = captions()
    rng = np.random.default_rng(3)
    rows = rng.choice(len(items), n, p=weight)
    out = torch.empty(n, 2, 16, 16, dtype=torch.float16)
    for start in range(0, n, 256):
        metas = [items[i] for i in rows[start : start + 256]]
        for k, wanted in enumerate((metas, [S.corrupt(rng, m) for m in metas])):
            z = vae.encode(scenes_to_pixels([S.sample_scene(rng, m) for m in wanted])).latent_dist.mean
            out[start : start + 256, k] = pack((z - vae.config.shift_factor) * vae.config.scaling_factor).half()
    clip, clip_words, t5, t5_words = load_text(work)
    texts = [m["prompt"] for m in items]
    pooled = clip(tokens(clip_words, texts)).pooler_output
    hidden = t5(tokens(t5_words, texts)).last_hidden_state
    noise = torch.tensor([TASK_NOISE[m["tag"]] for m in items])
    torch.save({"latents": out, "rows": torch.from_numpy(rows), "pooled": pooled, "hidden": hidden, "noise": noise},
               work / "latents.pt")  # fmt: skip


def pack(z: Tensor) -> Tensor:
    """Map [B, 4, 8, 8] to [B, 16, 16] tokens, as FluxPipeline packs 2x2 patches."""
    return FluxPipeline._pack_latents(z, len(z), 4, 8, 8)


def unpack(x: Tensor) -> Tensor:
    """Invert `pack`."""
    return FluxPipeline._unpack_latents(x, S.SIZE, S.SIZE, 4)


IMAGE_IDS = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
TEXT_IDS = torch.zeros(MAX_TEXT, 3)


def build_flow() -> FluxTransformer2DModel:
    """Return an untrained transformer of FLUX.1-dev's class, 1.9 M parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def velocity(model, x: Tensor, t: Tensor, guidance: Tensor, pooled: Tensor, hidden: Tensor) -> Tensor:
    """Return dx/dt at time t in [0, 1] (1 is noise), [B, 16, 16]."""
    return model(
        hidden_states=x, timestep=t, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=hidden,
        txt_ids=TEXT_IDS, img_ids=IMAGE_IDS, return_dict=False,
    )[0]  # fmt: skip


@dataclass(frozen=True)
class FlowSettings:
    """Settings of pretraining; `rates` gives its two phases of caption noise."""

    steps: int = 6000
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 150
    decay: int = 1200  # number of last steps, in which the rate falls linearly to zero
    ema: float = 0.999
    snapshot: int = 1000
    rates: tuple[tuple[int, float, float], ...] = ((2000, 0.15, 0.75), (99_999, 0.08, 0.50))
    # (until step, miss rate at guidance 5, at guidance 1); lowered at step 2,000, where GenEval was 0.30

    def missed(self, step: int, guidance: Tensor) -> Tensor:
        """Return the miss rate of these guidances at this step."""
        _, low, high = next(r for r in self.rates if step < r[0])
        return miss_rate(guidance, low, high)


def draw_times(n: int, generator: torch.Generator) -> Tensor:
    """Draw 60 % from sigmoid(N(1, 1)), 40 % uniform: times near the noise decide layout, those near 0 sharpness."""
    late = torch.sigmoid(torch.randn(n, generator=generator) + 1.0)
    uniform = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.6, late, uniform).clamp(0.001, 0.999)


def flow_batch(data: dict, s: FlowSettings, step: int, generator: torch.Generator):
    """Draw (x_t, target velocity, t, guidance, pooled, hidden); the guidance sets the rate of contradicted captions."""
    i = torch.randint(len(data["rows"]), (s.batch,), generator=generator)
    caption = data["rows"][i]
    guidance = torch.empty(s.batch).uniform_(*GUIDANCE, generator=generator)
    rate = s.missed(step, guidance) * data["noise"][caption]
    wrong = (torch.rand(s.batch, generator=generator) < rate).long()
    x0 = data["latents"][i, wrong].float()
    noise = torch.randn(x0.shape, generator=generator)
    t = draw_times(s.batch, generator)
    xt = x0 + t[:, None, None] * (noise - x0)
    return xt, noise - x0, t, guidance, data["pooled"][caption], data["hidden"][caption]


def flow(work: Path, s: FlowSettings = FlowSettings()) -> None:
    """Train by flow matching on cached latents; every `snapshot` steps save the EMA and print GenEval; resume."""
    model = build_flow()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.99), weight_decay=0.01)
    fast = torch.compile(model) if shutil.which("g++") else model  # a quarter faster on a CPU
    data, first = torch.load(work / "latents.pt"), 0
    state = work / "flow-state.pt"
    if state.exists():
        saved = torch.load(state)
        first = saved["step"]
        for part, name in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(saved[name])
    start = time.perf_counter()
    for step in range(first, s.steps):
        generator = torch.Generator().manual_seed(10_000 + step)  # seeded by step, so that resuming repeats no draw
        rate = min((step + 1) / s.warmup, (s.steps - step) / s.decay, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * rate
        loss = flow_step(fast, average, optimizer, flow_batch(data, s, step, generator), s)
        if step % 200 == 199:
            print(f"  flow {step + 1}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
        if step % s.snapshot == s.snapshot - 1:
            average.save_pretrained(work / f"flow-{step + 1:05d}")
            parts = {"model": model, "average": average, "optimizer": optimizer}
            torch.save({"step": step + 1} | {k: v.state_dict() for k, v in parts.items()}, state)
            print(f"  flow {step + 1}: {quick_geneval(work, average)}", flush=True)
    average.save_pretrained(work / "flow-final")


def flow_step(model, average, optimizer, batch, s: FlowSettings) -> float:
    """Make one AdamW update and update the EMA."""
    xt, target, t, guidance, pooled, hidden = batch
    loss = ((velocity(model, xt, t, guidance, pooled, hidden) - target) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - s.ema)
    return loss.item()


# ---------------------------------------------------------------------------------------------------- sampling


def sigmas(steps: int) -> Tensor:
    """Return [steps + 1] sigmas from 1 to 0, shifted as FluxPipeline does for 16 image tokens."""
    slope = (SCHEDULER["max_shift"] - SCHEDULER["base_shift"]) / (4096 - 256)
    shift = np.exp(16 * slope + SCHEDULER["base_shift"] - 256 * slope)
    t = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1)])


class World:
    """Frozen parts around a transformer: texts in, images out, in fp32 and without a pipeline's overhead."""

    def __init__(self, folder: Path):
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        self.clip, self.clip_words, self.t5, self.t5_words = load_text(folder)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return pooled [B, 64] and per-token [B, MAX_TEXT, 64] embeddings."""
        pooled = self.clip(tokens(self.clip_words, texts)).pooler_output
        return pooled, self.t5(tokens(self.t5_words, texts)).last_hidden_state

    def decode(self, x: Tensor) -> Tensor:
        """Map packed latents to pixels in [-1, 1]; differentiable, not clamped."""
        return self.vae.decode(unpack(x) / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample

    @torch.no_grad()
    def sample(self, model, texts: list[str], seed: int, guidance: float = 3.5, steps: int = 25) -> Tensor:
        """Integrate by Euler from seeded noise; return packed latents [B, 16, 16]."""
        x = torch.randn(len(texts), 16, 16, generator=torch.Generator().manual_seed(seed))
        pooled, hidden = self.encode(texts)
        g, s = torch.full((len(texts),), guidance), sigmas(steps)
        for a, b in itertools.pairwise(s):
            x = x + (b - a) * velocity(model, x, a.expand(len(x)), g, pooled, hidden)
        return x

    @torch.no_grad()
    def images(self, model, metas: list[dict], seed: int, **options) -> np.ndarray:
        """Return uint8 [B, 32, 32, 3], one image per metadata."""
        parts = [metas[i : i + 128] for i in range(0, len(metas), 128)]
        samples = [self.sample(model, [m["prompt"] for m in p], seed + k, **options) for k, p in enumerate(parts)]
        return np.concatenate([to_numpy(self.decode(x)) for x in samples])


def geneval(images: np.ndarray, metas: list[dict]) -> dict:
    """Return GenEval by task and overall, and the shares: strict, with junk, right relations given both objects."""
    by_task = {t: [] for t in S.TASKS}
    exact, dirty, sides = [], [], []
    for image, meta in zip(images, metas, strict=True):
        components = C.detect(image)
        official, strict = GENEVAL.judge_shapes(components, meta)
        by_task[meta["tag"]].append(official)
        exact.append(strict)
        dirty.append(any(c.junk for c in components))
        if meta["tag"] == "position":
            bare = {"tag": "two_object", "include": [S.clause(c["class"]) for c in meta["include"]]}
            if GENEVAL.judge_shapes(components, bare)[0]:
                sides.append(official)
    tasks = {t: round(float(np.mean(v)), 3) for t, v in by_task.items() if v}
    out = {"overall": round(float(np.mean(list(tasks.values()))), 3), "strict": round(float(np.mean(exact)), 3)}
    out |= {"junk": round(float(np.mean(dirty)), 3), "side_given_both": round(float(np.mean(sides or [0])), 3)}
    return out | tasks


def quick_geneval(work: Path, model, per_prompt: int = 4, split: str = "val", seed: int = 0, **options) -> dict:
    """Return GenEval of a transformer on a held-out split."""
    world = World(work)
    metas = [m for m in S.splits()[split] for _ in range(per_prompt)]
    return geneval(world.images(model, metas, seed, **options), metas)


def export(work: Path, source: str = "flow-final") -> None:
    """Make assets/model from the work folder, with weights rounded to fp16."""

    def fill(folder: Path) -> None:
        pipeline.to(torch.float16).save_pretrained(folder)
        for config in folder.glob("*/config.json"):  # diffusers records the path of each part
            plain = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
            config.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
        for part in ("text_encoder", "text_encoder_2"):
            load_as_float32(folder / part)

    clip, clip_words, t5, t5_words = load_text(work)
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        AutoencoderKL.from_pretrained(work / "vae"),
        clip, clip_words, t5, t5_words,
        FluxTransformer2DModel.from_pretrained(work / source),
    )  # fmt: skip
    replace_folder(ASSETS / "model", fill)


def load_as_float32(folder: Path) -> None:
    """Make transformers read these fp16 weights as fp32 by default, as diffusers does."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")

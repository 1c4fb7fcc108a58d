"""Train the two scorers of the shapes world, in the checkpoint layouts of HPSv2.1 and PickScore.

Both predict GenEval's strict verdict: whether an image shows exactly what the caption says. They share no weights, no
data, no seed and no architecture, since one trains models and the other judges them.

A scorer that has only seen good images is easily hacked. So each also sees corrupted images, samples and one-step
predictions of the base model, and, twice, the results of gradient ascent on its own score.
"""

# mypy: ignore-errors
# the reason: diffusers' lazy imports hide that its models are torch modules

import copy
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from scipy import ndimage
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from alignbench.shapes import ASSETS
from alignbench.shapes import build_model as B
from alignbench.shapes import checker as C
from alignbench.shapes import scene as S

MEAN = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
STD = torch.tensor(OPENAI_DATASET_STD)[:, None, None]
PER_IMAGE = 8  # captions asked about each image
NO_CELL = -100  # a cell without a label


@dataclass(frozen=True)
class Mixture:
    """Training data of a scorer: the number of images of each kind, the base model's snapshots, the seed."""

    seed: int
    renders: int
    rebuilt: int
    corrupted: int
    sampled: int  # per snapshot, and as many one-step predictions
    hacked: int  # per refresh and attack
    snapshots: tuple[str, ...]
    steps: tuple[int, ...]  # optimizer steps before the first refresh and after each


# ---------------------------------------------------------------------------------------------------- the scorers


class Hps(nn.Module):
    """Scorer in open_clip.CLIP: one patch per cell, open_clip's 49408-token vocabulary (3.2 MB in fp16)."""

    config = {  # noqa: RUF012  plain JSON
        "embed_dim": 96,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 4, "width": 112, "head_width": 28},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    vision_width, text_width = 112, 32

    def __init__(self):
        super().__init__()
        self.net = open_clip.CLIP(**self.config)
        sentences = [m["prompt"] for items in S.splits().values() for m in items]
        self.used = open_clip.tokenize(sentences).unique()  # sorted, so the end token keeps the largest id
        self.net.token_embedding = nn.Embedding(len(self.used), 32)  # the full table would dominate a step's cost
        nn.init.normal_(self.net.token_embedding.weight, std=0.02)

    def tokens(self, texts: list[str]) -> Tensor:
        """Return [B, 16] rows of the small table; with causal attention the cut is exact."""
        return torch.searchsorted(self.used, open_clip.tokenize(texts)[:, :16].contiguous())

    def image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalised pixels to embedding [B, 96] and patch tokens [B, 16, width]."""
        v = self.net.visual
        pooled, patches = v._pool(v.transformer(v._embeds(x)))
        return pooled @ v.proj, patches

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedding [B, 96] and end token's state [B, 32], as `CLIP.encode_text` on the first 16 positions."""
        net, n = self.net, ids.shape[1]
        x = net.token_embedding(ids) + net.positional_embedding[:n]
        x = net.ln_final(net.transformer(x, attn_mask=net.attn_mask[:n, :n]))
        end = x[torch.arange(len(x)), ids.argmax(-1)]
        return end @ net.text_projection, end

    def save(self, folder: Path, work: Path) -> None:
        """Save HPS_v2.1_compressed.pt in fp16, with rows of unused tokens zeroed, and open_clip_config.json."""
        state = {k: v.half() for k, v in self.net.state_dict().items()}
        table = torch.zeros(49408, 32, dtype=torch.float16)
        table[self.used] = state["token_embedding.weight"]
        state["token_embedding.weight"] = table
        torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": self.config}, indent=2) + "\n")


class Pick(nn.Module):
    """Scorer in transformers' CLIPModel: four patches per cell, its own word vocabulary."""

    vision_width, text_width = 64, 64

    def __init__(self, work: Path):
        super().__init__()
        folder = work / "pickscore-tokenizer"
        if not folder.exists():
            B.clip_tokenizer(folder, B.WORDS[::-1], 24)
        self.words = CLIPTokenizer.from_pretrained(folder)
        special = {f"{k}_token_id": getattr(self.words, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        text = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"vocab_size": len(self.words), "max_position_embeddings": 24, "hidden_act": "gelu"}
        vision = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
        vision |= {"image_size": 32, "patch_size": 4, "hidden_act": "gelu", "projection_dim": 64}
        config = CLIPConfig(
            text_config=text | special | {"projection_dim": 64}, vision_config=vision, projection_dim=64
        )
        self.net = CLIPModel(config)

    def tokens(self, texts: list[str]) -> Tensor:
        """Return [B, L] ids; with causal attention padding has no effect."""
        return self.words(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids

    def image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalised pixels to embedding [B, 64] and cell tokens [B, 16, width] (means of four patches)."""
        out = self.net.vision_model(x)
        patches = out.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        return self.net.visual_projection(out.pooler_output), F.avg_pool2d(patches, 2).flatten(2).transpose(1, 2)

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedding [B, 64] and end token's state [B, 64]."""
        pooled = self.net.text_model(ids).pooler_output
        return self.net.text_projection(pooled), pooled

    def save(self, folder: Path, work: Path) -> None:
        """Save model and processor by save_pretrained, in fp16."""
        copy.deepcopy(self.net).half().save_pretrained(folder)
        B.load_as_float32(folder)
        size = {"shortest_edge": 32}
        crop = {"height": 32, "width": 32}
        CLIPProcessor(CLIPImageProcessor(size=size, crop_size=crop), self.words).save_pretrained(folder)


class Heads(nn.Module):
    """Heads used in training only: scale and bias, read-outs of each cell's content and of the sentence."""

    def __init__(self, scorer):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-3.0))
        self.cells = nn.Linear(scorer.vision_width, len(S.SHAPES) + len(S.COLOURS) + 2)
        self.slots = B.Heads(scorer.text_width, 2)


def score(scorer, pixels: Tensor, ids: Tensor) -> Tensor:
    """Return cosines [B] of images ([B, 3, 32, 32] in [0, 1]) and captions."""
    image = F.normalize(scorer.image((pixels - MEAN) / STD)[0], dim=-1)
    return (image * F.normalize(scorer.text(ids)[0], dim=-1)).sum(-1)


# ---------------------------------------------------------------------------------------------------- labelled images


class Captions:
    """Sentences that training may use, with their weights, and true and false ones for an image."""

    def __init__(self):
        self.items, self.weight = B.captions()
        self.index = {m["prompt"]: i for i, m in enumerate(self.items)}

    def draw(self, rng, n: int) -> list[dict]:
        """Draw the metadata of n captions."""
        return [self.items[i] for i in rng.choice(len(self.items), n, p=self.weight)]

    def describing(self, components: list[C.Detection]) -> list[int]:
        """Return candidates for true sentences about an image; the strict verdict decides."""
        kinds, shades = [d.label for d in components], sorted({d.color for d in components})  # in a fixed order
        out = []
        if len(set(kinds)) == 1 and len(kinds) <= 4:
            include = S.clause(kinds[0], len(kinds))
            out += [S.sentence([include]), *(S.sentence([include | {"color": c}]) for c in shades)]
        if len(components) == 2 and len(set(kinds)) == 2:
            for a, b in itertools.permutations(components):
                out += [S.sentence([S.clause(a.label), S.clause(b.label)])]
                out += [S.sentence([S.clause(a.label, 1, a.color), S.clause(b.label, 1, b.color)])]
                for r in S.RELATIONS:
                    out += [S.sentence([S.clause(a.label), S.clause(b.label, 1, None, r)])]
                    out += [S.sentence([S.clause(a.label, 1, a.color), S.clause(b.label, 1, b.color, r)])]
        return [self.index[p] for p in out if p in self.index]

    def ask(self, rng, components: list[C.Detection], own: dict | None) -> tuple[list[int], list[bool]]:
        """Return PER_IMAGE captions and their strict verdicts on an image: its own, true ones, near misses, any."""
        asked = [self.index[own["prompt"]]] if own and own["prompt"] in self.index else []
        true = [i for i in self.describing(components) if self.strict(components, i)]
        rng.shuffle(true)
        asked += true[: PER_IMAGE // 2 - 1]
        source = [self.items[i] for i in asked] or self.draw(rng, 1)
        for _ in range(20):
            near = S.corrupt(rng, source[rng.integers(len(source))])["prompt"]
            if near in self.index and len(asked) < PER_IMAGE - 1:
                asked.append(self.index[near])
        asked += [self.index[m["prompt"]] for m in self.draw(rng, PER_IMAGE - len(asked))]
        return asked, [self.strict(components, i) for i in asked]

    def strict(self, components: list[C.Detection], index: int) -> bool:
        """Return the strict verdict on an image's components for the caption with this index."""
        return B.GENEVAL.judge_shapes(components, self.items[index])[1]


def cells(components: list[C.Detection]) -> np.ndarray:
    """Return each cell's kind and colour, [16, 2], 0 for nothing; NO_CELL everywhere if a component is junk."""
    out = np.zeros((4, 4, 2), int)
    if any(d.junk for d in components):
        out[:] = NO_CELL
    else:
        for d in components:
            x, y = (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2
            at = int(np.clip(y // S.CELL, 0, 3)), int(np.clip(x // S.CELL, 0, 3))
            out[at] = 1 + S.SHAPES.index(d.label), 1 + list(S.COLOURS).index(d.color)
    return out.reshape(16, 2)


def labelled(rng, captions: Captions, images: np.ndarray, metas: list) -> dict[str, Tensor]:
    """Label images (uint8 [B, 32, 32, 3]) by the strict verdict on captions; an image's own metadata may be None."""
    asked, answers, inside = [], [], []
    for image, meta in zip(images, metas, strict=True):
        components = C.detect(image)
        a, b = captions.ask(rng, components, meta)
        asked.append(a)
        answers.append(b)
        inside.append(cells(components))
    return {
        "images": torch.from_numpy(images),
        "asked": torch.tensor(asked),
        "answers": torch.tensor(answers),
        "cells": torch.from_numpy(np.stack(inside)),
    }


def join(parts: list[dict]) -> dict[str, Tensor]:
    """Concatenate labelled sets."""
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Clip and round float images in [0, 1]."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)


def damage(rng, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Damage image a in one of seven ways, some of them with image b; float [32, 32, 3]."""
    way = rng.integers(7)
    if way == 0:
        return a + rng.uniform(0.2, 0.8) * (b - a)
    if way == 1:  # superimposed: mostly extra objects, some of them touching
        return np.minimum(a, b)
    if way == 2:
        y, x = rng.integers(0, 24, 2)
        h, w = rng.integers(4, 12, 2)
        a = a.copy()
        a[y : y + h, x : x + w] = b[y : y + h, x : x + w] if rng.random() < 0.5 else rng.random(3)
        return a
    if way == 3:
        return a + rng.uniform(0.05, 0.3) * rng.standard_normal(a.shape)
    if way == 4:
        return ndimage.gaussian_filter(a, (*rng.uniform(0.5, 2, 2), 0))
    if way == 5:  # faint or over-inked
        return S.BACKGROUND + rng.uniform(0.2, 1.3) * (a - S.BACKGROUND)
    return np.roll(a, tuple(rng.integers(-6, 7, 2)), (0, 1))


def drawn(rng, captions: Captions, world: B.World, mix: Mixture) -> list[tuple[np.ndarray, list]]:
    """Return renders, autoencoder reconstructions and damaged renders, each as (images, own captions)."""
    kinds = []
    for n in (mix.renders, mix.rebuilt, mix.corrupted, mix.corrupted):
        metas = captions.draw(rng, n)
        scenes = [S.sample_scene(rng, m) if rng.random() < 0.8 else B.free_scene(rng) for m in metas]
        kinds.append((np.stack([S.render(s) for s in scenes]), metas))
    (clean, m0), (again, m1), (a, m2), (b, _) = kinds
    x = torch.from_numpy(again).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        rebuilt = [B.to_numpy(world.vae.decode(world.vae.encode(p).latent_dist.mean).sample) for p in x.split(256)]
    spoilt = np.stack([damage(rng, p, q) for p, q in zip(a, b, strict=True)])
    return [(as_uint8(clean), m0), (np.concatenate(rebuilt), m1), (as_uint8(spoilt), m2)]


@torch.no_grad()
def sampled(rng, captions, world: B.World, model, n: int) -> tuple[np.ndarray, list]:
    """Return n samples of a transformer at random guidance and step counts, and n one-step predictions."""
    images, metas = [], []
    for _ in range(0, n, 128):
        group = captions.draw(rng, 128)
        x0, mid = rollout(world, model, [m["prompt"] for m in group], rng, steps=int(rng.integers(10, 26)))
        images += [B.to_numpy(world.decode(x0)), B.to_numpy(world.decode(mid))]
        metas += group + group
    return np.concatenate(images), metas


@torch.no_grad()
def rollout(world: B.World, model, texts: list[str], rng, steps: int) -> tuple[Tensor, Tensor]:
    """Return final latents, and each sample's one-step prediction x_t - t v at a random time below .9."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    x = torch.randn(len(texts), 16, 16, generator=generator)
    g = torch.empty(len(texts)).uniform_(*B.GUIDANCE, generator=generator)
    pooled, hidden = world.encode(texts)
    s = B.sigmas(steps)
    allowed = (s[:-1] < 0.9).nonzero().flatten()
    stop = allowed[torch.randint(len(allowed), (len(texts),), generator=generator)]
    middle = torch.zeros_like(x)
    for k, (a, b) in enumerate(itertools.pairwise(s)):
        v = B.velocity(model, x, a.expand(len(x)), g, pooled, hidden)
        middle = torch.where((stop == k)[:, None, None], x - a * v, middle)
        x = x + (b - a) * v
    return x, middle


# ---------------------------------------------------------------------------------------------------- attacks


def reward(scorer, world: B.World, x: Tensor, ids: Tensor) -> Tensor:
    """Return the differentiable scores of decoded latents [B], as a training method would compute them."""
    return score(scorer, (world.decode(x) / 2 + 0.5).clamp(0, 1), ids)


def attack_latents(rng, captions, world, scorer, model, n: int) -> tuple[np.ndarray, list]:
    """Return samples whose latents climbed the score for 4 to 16 Adam steps."""
    images, metas = [], []
    for _ in range(0, n, 128):
        group = captions.draw(rng, 128)
        texts = [m["prompt"] for m in group]
        x, _ = rollout(world, model, texts, rng, steps=12)
        x.requires_grad_(True)
        optimizer, ids = torch.optim.Adam([x], lr=float(rng.uniform(0.04, 0.15))), scorer.tokens(texts)
        for _ in range(int(rng.integers(4, 17))):
            optimizer.zero_grad()
            (-reward(scorer, world, x, ids).sum()).backward()
            optimizer.step()
        images.append(B.to_numpy(world.decode(x.detach())))
        metas += group
    return np.concatenate(images), metas


def attack_model(rng, captions, world, scorer, model, n: int, updates: int) -> tuple[np.ndarray, list]:
    """Return samples of a copy of the transformer, fine-tuned on the score of its late one-step predictions."""
    model, batch = copy.deepcopy(model).train().requires_grad_(True), 24
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(np.exp(rng.uniform(np.log(1e-4), np.log(4e-4)))))
    for _ in range(updates):
        texts = [m["prompt"] for m in captions.draw(rng, batch)]
        steps, late = 10, int(rng.integers(3, 9))
        s, (pooled, hidden) = B.sigmas(steps), world.encode(texts)
        x = torch.randn(batch, 16, 16, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
        g = torch.full((batch,), 3.5)
        with torch.no_grad():
            for a, b in itertools.pairwise(s[: late + 1]):
                x = x + (b - a) * B.velocity(model, x, a.expand(batch), g, pooled, hidden)
        x0 = x - s[late] * B.velocity(model, x, s[late].expand(batch), g, pooled, hidden)
        optimizer.zero_grad()
        (-reward(scorer, world, x0, scorer.tokens(texts)).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return sampled(rng, captions, world, model.eval(), n)


# ---------------------------------------------------------------------------------------------------- training


def train(scorer, heads: Heads, captions: Captions, data: dict, rng, steps: int, lr: float) -> None:
    """Train by binary cross entropy of scale * cosine + bias over all pairs of image and asked caption."""
    ids = scorer.tokens([m["prompt"] for m in captions.items])
    slots = torch.tensor([B.slots(m) for m in captions.items])
    parameters = [*scorer.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    for step in range(steps):
        rows = torch.randint(len(data["images"]), (64,), generator=generator)
        x = data["images"][rows].permute(0, 3, 1, 2) / 255
        x = x + torch.rand(64, 1, 1, 1, generator=generator) * 0.06 * torch.randn(x.shape, generator=generator)
        asked, inverse = data["asked"][rows].unique(return_inverse=True)
        image, patches = scorer.image((x - MEAN) / STD)
        caption, end = scorer.text(ids[asked])
        cosine = (F.normalize(image, dim=-1)[:, None] * F.normalize(caption, dim=-1)[inverse]).sum(-1)
        logit = heads.scale.exp() * cosine + heads.bias
        loss = F.binary_cross_entropy_with_logits(logit, data["answers"][rows].float())
        inside, seen = heads.cells(patches).split([len(S.SHAPES) + 1, len(S.COLOURS) + 1], -1), data["cells"][rows]
        aux = sum(F.cross_entropy(p.flatten(0, 1), seen[..., k].flatten()) for k, p in enumerate(inside))
        total = loss + 0.3 * aux + 0.05 * heads.slots.loss(end, slots[asked])[0]
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            scale = heads.scale.exp().item()
            print(f"    {step + 1}: loss {loss.item():.3f}, cells {aux.item():.3f}, scale {scale:.1f}", flush=True)


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the probability that a true pair scores above a false one."""
    order = scores.argsort().argsort() + 1.0
    n1, n0 = truth.sum(), (~truth).sum()
    return float((order[truth].sum() - n1 * (n1 + 1) / 2) / max(n1 * n0, 1))


@torch.no_grad()
def judge(scorer, images: np.ndarray, metas: list) -> dict:
    """Return AUCs against the verdicts on images' own captions, and the spread of scores."""
    ids = scorer.tokens([m["prompt"] for m in metas])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    s = torch.cat([score(scorer, a, b) for a, b in zip(x.split(256), ids.split(256), strict=True)]).numpy()
    verdicts = [B.GENEVAL.judge_shapes(C.detect(i), m) for i, m in zip(images, metas, strict=True)]
    lenient, truth = np.array(verdicts).T
    return {
        "auc": round(auc(s, truth), 3),
        "auc_lenient": round(auc(s, lenient), 3),
        "true": round(float(truth.mean()), 3),
        "score": [round(float(q), 3) for q in np.percentile(s, (5, 25, 50, 75, 95))],
        "mean_true_false": [round(float(s[truth].mean()), 3), round(float(s[~truth].mean()), 3)],
    }


class HeldOut(Captions):
    """Captions of the validation split with equal weights, for measurements only."""

    def __init__(self):
        self.items = S.splits()["val"]
        self.weight = np.full(len(self.items), 1 / len(self.items))
        self.index = {m["prompt"]: i for i, m in enumerate(self.items)}


def measure(name: str, scorer, world, model, seed: int = 99) -> None:
    """Print AUCs on validation prompts: base samples, and samples of fresh attacks on this scorer."""
    rng, held = np.random.default_rng(seed), HeldOut()
    metas = held.items * 4
    print(f"  {name} on base samples: {judge(scorer, world.images(model, metas, seed), metas)}", flush=True)
    images, metas = attack_latents(rng, held, world, scorer, model, 256)
    print(f"  {name} on climbed latents: {judge(scorer, images, metas)}", flush=True)
    images, metas = attack_model(rng, held, world, scorer, model, 256, 40)
    print(f"  {name} on an attacked model: {judge(scorer, images, metas)}", flush=True)


def build(name: str, scorer, work: Path, mix: Mixture) -> None:
    """Train, refresh with attacks on the current scorer, save after each round."""
    rng, captions, world = np.random.default_rng(mix.seed), Captions(), B.World(work)
    bases = [FluxTransformer2DModel.from_pretrained(work / s).eval().requires_grad_(False) for s in mix.snapshots]
    heads = Heads(scorer)
    sets = [labelled(rng, captions, *part) for part in drawn(rng, captions, world, mix)]
    sets += [labelled(rng, captions, *sampled(rng, captions, world, base, mix.sampled)) for base in bases]
    print(
        f"  {name}: {[len(s['images']) for s in sets]} images, {sets[-1]['answers'].float().mean():.3f} true",
        flush=True,
    )
    for round_, steps in enumerate(mix.steps):
        if round_:
            for attack, options in (
                (attack_latents, {}),
                (attack_model, {"updates": 30}),
                (attack_model, {"updates": 60}),
            ):
                images_and_metas = attack(rng, captions, world, scorer, bases[-1], mix.hacked, **options)
                sets.append(labelled(rng, captions, *images_and_metas))
        train(scorer, heads, captions, join(sets), rng, steps, 1.5e-3 if round_ == 0 else 7e-4)
        if isinstance(scorer, Pick):
            scorer.net.logit_scale.data = heads.scale.data.clone()
        replace_scorer(name, scorer, work)
        measure(f"{name} round {round_}", scorer, world, bases[-1])
        torch.save({"scorer": scorer.state_dict(), "heads": heads.state_dict()}, work / f"{name}.pt")


def replace_scorer(name: str, scorer, work: Path) -> None:
    """Replace assets/<name>, whole or not at all."""
    B.replace_folder(ASSETS / name, lambda folder: scorer.save(folder, work))


HPS_MIX = Mixture(
    seed=11, renders=5000, rebuilt=2500, corrupted=4000, sampled=1536, hacked=512,
    snapshots=("flow-02000", "flow-04000", "flow-final"), steps=(2500, 1000, 1000),
)  # fmt: skip
PICK_MIX = Mixture(
    seed=29, renders=3500, rebuilt=3500, corrupted=3000, sampled=2048, hacked=512,
    snapshots=("flow-03000", "flow-05000"), steps=(2500, 1000, 1000),
)  # fmt: skip


def hpsv2(work: Path, mix: Mixture = HPS_MIX) -> None:
    """Make assets/hpsv2, the training scorer."""
    build("hpsv2", Hps(), work, mix)


def pickscore(work: Path, mix: Mixture = PICK_MIX) -> None:
    """Make assets/pickscore, the held-out scorer."""
    torch.manual_seed(1)  # another initialisation than hpsv2's
    build("pickscore", Pick(work), work, mix)


def report(work: Path) -> None:
    """Print GenEval of the shipped fp16 weights on both held-out splits at three guidances, and once of fp32."""
    model = FluxTransformer2DModel.from_pretrained(ASSETS / "model/transformer", torch_dtype=torch.float32).eval()
    for split, guidance in itertools.product(("val", "test"), (1.5, 3.5, 5.0)):
        result = B.quick_geneval(ASSETS / "model", model, 8, split, seed=500, guidance=guidance)
        print(f"  {split}, guidance {guidance}: {result}", flush=True)
    model = FluxTransformer2DModel.from_pretrained(work / "flow-final").eval()
    print(f"  test, guidance 3.5, before rounding: {B.quick_geneval(work, model, 8, 'test', seed=500)}", flush=True)

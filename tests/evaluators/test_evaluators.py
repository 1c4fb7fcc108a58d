"""Evaluators equal the official computation; rewards equal scores; GenEval's rules hold."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from alignbench import weights
from alignbench.config import UserError, settings
from alignbench.evaluator import Reward, Term, to_tensor
from alignbench.evaluators import geneval
from alignbench.evaluators.aesthetic import Aesthetic
from alignbench.evaluators.clipscore import CLIPScore
from alignbench.evaluators.geneval import GenEval
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.evaluators.imagereward import ImageReward
from alignbench.evaluators.pickscore import PickScore
from alignbench.prompts import Prompt
from alignbench.rehearsal import tiny_clip, tiny_imagereward
from alignbench.shapes import scene
from alignbench.testing import EvaluatorContract
from alignbench.testing.evaluator_contract import random_image

SIZES = [(64, 64), (100, 60), (60, 100), (256, 256), (33, 47)]  # (height, width): larger, smaller and not square
TEXTS = ["a red circle", "Two blue squares &amp; a Triangle, café!", "a", "x " * 100, "a red circle"]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def images():
    return [random_image(*size, seed=i) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    return HPSv2(weights=str(tiny_clip.hps_folder(tmp_path_factory.mktemp("hps"))))


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    return PickScore(weights=str(tiny_clip.pickscore_folder(tmp_path_factory.mktemp("pick"))))


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    folder = str(tiny_imagereward.imagereward_folder(tmp_path_factory.mktemp("image_reward")))
    return ImageReward(weights=folder, tokenizer=folder)


@pytest.fixture(scope="module")
def clip_score(tmp_path_factory):
    return CLIPScore(weights=str(tiny_clip.clip_folder(tmp_path_factory.mktemp("clip"))))


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    folder = tiny_clip.clip_folder(tmp_path_factory.mktemp("aesthetic") / "clip", features=768)
    return Aesthetic(weights=str(tiny_clip.aesthetic_head(folder.with_name("head.pth"))), clip=str(folder))


@pytest.fixture(scope="module", params=["hps", "pick", "image_reward", "clip_score", "aesthetic"])
def scorer(request):
    return request.getfixturevalue(request.param)


LINES = [line for task in scene.grammar().values() for line in task[::7]]  # some prompts of every task


def pixels(n, side=80):
    return torch.stack([to_tensor(random_image(side, side, seed)) for seed in range(n)])


# -- HPSv2.1 ----------------------------------------------------------------------------------------------------------


def hps_by_hand(folder, image, text):
    """Return the cosine of open_clip's features; the image fits a square by its longer side, centred on black."""
    import open_clip
    from torchvision.transforms import functional as V

    model = open_clip.CLIP(**tiny_clip.HPS_CONFIG).eval()
    model.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    pixels = to_tensor(image.convert("RGB"))
    rows, columns = (round(length * (56 / max(image.size))) for length in pixels.shape[1:])
    top, left = (56 - rows) // 2, (56 - columns) // 2
    square = torch.zeros(3, 56, 56)
    fitted = V.resize(pixels, [rows, columns], V.InterpolationMode.BICUBIC, antialias=True)
    square[:, top : top + rows, left : left + columns] = fitted
    square = V.normalize(square, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        seen, read, _ = model(square[None], open_clip.tokenize([text]))
    return float(seen[0] @ read[0])


def test_hps_equals_the_official_computation(hps, images):
    """Scores of five sizes, odd characters and a long prompt are within 1e-6 of the package's rule, step by step."""
    ours = hps.score(images, PROMPTS)["hpsv2.1"]
    theirs = [hps_by_hand(hps.checkpoint.parent, i, t) for i, t in zip(images, TEXTS)]
    assert np.abs(ours - theirs).max() < 1e-6
    assert np.ptp(theirs) > 0.01  # the random model does tell images apart


def test_hps_loads_a_file_a_folder_or_an_architecture(hps, tmp_path, images):
    """The .pt file itself scores like its folder; without a configuration beside it, ``architecture`` is used."""
    file = hps.checkpoint.parent / "HPS_v2.1_compressed.pt"
    assert HPSv2(weights=str(file)).score(images[:1], PROMPTS[:1]).equals(hps.score(images[:1], PROMPTS[:1]))
    alone = HPSv2(weights=str(shutil.copy(file, tmp_path)))
    with pytest.raises(UserError, match="is not this architecture"):
        HPSv2(weights=alone.weights, architecture="ViT-S-32-alt").score(images[:1], PROMPTS[:1])
    with pytest.raises(UserError, match="open_clip has no 'ViT-X'"):
        HPSv2(weights=alone.weights, architecture="ViT-X").score(images[:1], PROMPTS[:1])


# -- PickScore --------------------------------------------------------------------------------------------------------


def pickscore_by_hand(folder, image, text):
    """Return the cosine of transformers' two features times the temperature, with Pillow's preprocessing."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=[image.convert("RGB")], return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)([text], truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        seen, read = model.get_image_features(**pixels), model.get_text_features(**tokens)
        cosine = F.cosine_similarity(seen.pooler_output, read.pooler_output)
        return float(model.logit_scale.exp() * cosine)


def test_pickscore_equals_the_official_computation(pick, images):
    """Scores of five sizes and odd prompts are within 1e-4 of the rule of its README, on a scale of 100."""
    ours = pick.score(images, PROMPTS)["pickscore"]
    theirs = [pickscore_by_hand(pick.folder, i, t) for i, t in zip(images, TEXTS)]
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.ptp(theirs) > 1


def test_pickscore_preprocessing_is_pillows(pick):
    """Bicubic shortest edge, centre crop, mean and std equal those made by hand with Pillow, to 1e-6."""
    image = random_image(100, 160, seed=0)
    edge = image.resize((int(56 * 160 / 100), 56), Image.BICUBIC)
    left = (edge.width - 56) // 2
    x = to_tensor(edge.crop((left, 0, left + 56, 56)))
    processor = pick._clip.image_processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    ours = torch.as_tensor(processor(images=[image], return_tensors="pt")["pixel_values"])[0]
    torch.testing.assert_close(ours, (x - mean[:, None, None]) / std[:, None, None], rtol=0, atol=1e-6)


def test_pickscores_tensor_path_is_near_pillows(pick, images):
    """Normalised pixels of the differentiable path differ from the official ones by 0.006 on average, 0.25 at most."""
    for image in images:
        official = torch.as_tensor(pick._clip.image_processor(images=[image], return_tensors="pt")["pixel_values"])
        gap = (pick._clip.preprocess(to_tensor(image)[None]) - official).abs()
        assert gap.mean() < 0.006
        assert gap.max() < 0.25


def test_pickscores_reward_unit(pick):
    """The cosine is the logit divided by exp(logit_scale), as LeapAlign's margin of 0.4 needs it."""
    cosine = PickScore(weights=pick.weights, reward_unit="cosine")
    logit = pick.reward(pixels(2), PROMPTS[:2])
    torch.testing.assert_close(logit, cosine.reward(pixels(2), PROMPTS[:2]) * float(np.exp(4.6)))


# -- ImageReward ------------------------------------------------------------------------------------------------------


def openai_pixels(image, side):
    """Restate OpenAI's and ImageReward's preprocessing with Pillow and plain arithmetic."""
    scale = side / min(image.size)
    width, height = (side if length == min(image.size) else int(scale * length) for length in image.size)
    image = image.convert("RGB").resize((width, height), Image.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    x = to_tensor(image.crop((left, top, left + side, top + side)))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (x - mean[:, None, None]) / std[:, None, None]


def attend(q, k, v, heads, mask=None):
    """Attend over (tokens, channels); ``mask``: visible keys."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    logits = logits if mask is None else logits.masked_fill(~mask, -1e4)
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


def official_imagereward(folder, image, text):
    """Restate ImageReward.score on its tensor names: vit.py, med.py with cross-attention, MLP, standardisation."""
    from transformers import BertTokenizer

    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    config = json.loads((folder / "med_config.json").read_text())

    def linear(name, x):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)

    vit = "blip.visual_encoder."
    patches = F.conv2d(
        openai_pixels(image, 224)[None], *(state[f"{vit}patch_embed.proj.{k}"] for k in ("weight", "bias")), stride=16
    )
    x = torch.cat([state[vit + "cls_token"][0], patches[0].flatten(1).T]) + state[vit + "pos_embed"][0]
    for i in range(2):
        at = f"{vit}blocks.{i}."
        q, k, v = linear(at + "attn.qkv", norm(at + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(at + "attn.proj", attend(q, k, v, x.shape[-1] // 64))
        x = x + linear(at + "mlp.fc2", F.gelu(linear(at + "mlp.fc1", norm(at + "norm2", x, 1e-6))))
    seen = norm(vit + "norm", x, 1e-6)

    tokens = BertTokenizer(str(folder / "vocab.txt"))(text, padding="max_length", truncation=True, max_length=35)
    ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"]).bool()
    bert = "blip.text_encoder."
    x = state[bert + "embeddings.word_embeddings.weight"][ids]
    x = norm(bert + "embeddings.LayerNorm", x + state[bert + "embeddings.position_embeddings.weight"][:35], 1e-12)
    for i in range(2):
        at = f"{bert}encoder.layer.{i}."
        for kind, source, keys in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if source is None else source
            q, k, v = (linear(f"{at}{kind}.self.{p}", y) for p, y in (("query", x), ("key", source), ("value", source)))
            read = linear(f"{at}{kind}.output.dense", attend(q, k, v, config["num_attention_heads"], keys))
            x = norm(f"{at}{kind}.output.LayerNorm", x + read, 1e-12)
        wide = F.gelu(linear(at + "intermediate.dense", x))
        x = norm(at + "output.LayerNorm", x + linear(at + "output.dense", wide), 1e-12)
    score = x[0]
    for i in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{i}", score)
    return ((score - 0.16717362830052426) / 1.0333394966054072).item()


@pytest.mark.slow
def test_imagereward_equals_the_official_computation(image_reward, images):
    """Scores of five sizes, odd characters and a long prompt are within 2e-6 of the package's, on a scale of 1."""
    ours = image_reward.score(images, PROMPTS)["imagereward"]
    theirs = [official_imagereward(image_reward.folder, i, t) for i, t in zip(images, TEXTS)]
    assert np.abs(ours - theirs).max() < 2e-6
    assert np.ptp(theirs) > 0.1


def test_imagereward_depends_on_image_and_prompt(image_reward, images):
    """Another image or another prompt changes the score."""
    same, image, text = image_reward.score([images[0]] * 2 + [images[3]], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])[
        "imagereward"
    ]
    assert abs(same - image) > 1e-3
    assert abs(same - text) > 1e-3


def test_imagereward_reads_35_tokens(image_reward, images):
    """Only 33 words and the two end tokens count: later words change nothing, earlier ones do."""
    words = [["red"] * 33, ["red"] * 33 + ["blue"] * 9, ["red"] * 32 + ["blue"]]
    texts = [Prompt(str(i), " ".join(line)) for i, line in enumerate(words)]
    with pytest.warns(UserWarning, match="imagereward: 1 of 3 prompts are longer than 35 tokens"):
        whole, longer, other = image_reward.score(images[:1] * 3, texts)["imagereward"]
    assert whole == pytest.approx(longer, abs=1e-6)
    assert abs(whole - other) > 1e-4


def test_imagereward_refuses_another_checkpoint(image_reward, tmp_path, images):
    """Missing tensors are named, whereas the package would score with random weights."""
    folder = shutil.copytree(image_reward.folder, tmp_path / "copy")
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    del state["mlp.layers.7.bias"]
    for wrong, says in ((state, "Missing.*mlp.layers.7.bias"), ({"a": torch.zeros(1)}, "is not ImageReward's")):
        torch.save(wrong, folder / "ImageReward.pt")
        with pytest.raises(UserError, match=rf"imagereward.weights: .*{says}"):
            msgspec.structs.replace(image_reward, weights=str(folder)).score(images[:1], PROMPTS[:1])


# -- CLIPScore and the aesthetic predictor ----------------------------------------------------------------------------


def as_open_clip(model, quick_gelu):
    """Load the same weights into open_clip's own ViT, whose code is independent of transformers'."""
    import open_clip

    def stack(source, target, ours, layers):
        parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        parts["self_attn.out_proj"] = "attn.out_proj"
        found = {}
        for i in range(layers):
            at, to = f"{source}.encoder.layers.{i}.", f"{target}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                found |= {f"{to}{b}.{kind}": ours[f"{at}{a}.{kind}"] for a, b in parts.items()}
                found[f"{to}attn.in_proj_{kind}"] = torch.cat([ours[f"{at}self_attn.{p}_proj.{kind}"] for p in "qkv"])
        return found

    ours = model.state_dict()
    state = stack("vision_model", "visual.", ours, 2) | stack("text_model", "", ours, 2)
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms["ln_final"] = "text_model.final_layer_norm"
    names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in norms.items() for kind in ("weight", "bias")}
    state |= {a: ours[b] for a, b in names.items()}
    state |= {"visual.proj": ours["visual_projection.weight"].T, "text_projection": ours["text_projection.weight"].T}
    vision = {"image_size": 56, "layers": 2, "width": 48, "head_width": 24, "patch_size": 14, "mlp_ratio": 64 / 48}
    text = {"vocab_size": len(ours[names["token_embedding.weight"]]), "width": 32}
    text |= {"heads": 2, "layers": 2, "mlp_ratio": 2.0, "pool_type": "eos", "eos_id": 1}
    twin = open_clip.CLIP(model.config.projection_dim, vision, text, quick_gelu=quick_gelu).eval()
    twin.load_state_dict(state)
    return twin


def open_clip_cosine(twin, tokenizer, image, text):
    tokens = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    tokens = F.pad(tokens, (0, 77 - tokens.shape[1]))
    with torch.no_grad():
        features = twin.encode_image(openai_pixels(image, 56)[None], normalize=True)
        return (features * twin.encode_text(tokens, normalize=True)).sum().item()


def test_clipscore_is_the_cosine_of_a_quickgelu_model(clip_score, images):
    """It equals open_clip's ViT with QuickGELU and OpenAI's preprocessing to 1e-6; with GELU it would differ."""
    ours = clip_score.score(images[:4], PROMPTS[:4])["clipscore"]
    model, tokenizer = clip_score._clip.model, clip_score._clip.tokenizer
    quick, gelu = (as_open_clip(model, quick_gelu) for quick_gelu in (True, False))
    theirs = [open_clip_cosine(quick, tokenizer, i, t) for i, t in zip(images, TEXTS[:4])]
    assert np.abs(ours - theirs).max() < 1e-6
    other = [open_clip_cosine(gelu, tokenizer, i, t) for i, t in zip(images, TEXTS[:4])]
    assert np.abs(ours - other).max() > 1e-5


def test_a_clip_with_missing_weights_is_refused(clip_score, tmp_path, images):
    """Missing weights are named, whereas transformers would score with random ones."""
    folder = shutil.copytree(clip_score.folder, tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    state["more.weight"] = state.pop("visual_projection.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"clipscore.weights: .*missing.*visual_projection.weight.*more.weight"):
        CLIPScore(weights=str(folder)).score(images[:1], PROMPTS[:1])


def test_the_aesthetic_score_is_affine_in_the_unit_feature(aesthetic, images):
    """Without activations between its layers, their product is one row and an offset: scores agree to 1e-5."""
    state = torch.load(aesthetic.weights, weights_only=True)
    row, offset = torch.eye(768), torch.zeros(768)
    for i in (0, 2, 4, 6, 7):
        row, offset = (
            state[f"layers.{i}.weight"] @ row,
            state[f"layers.{i}.weight"] @ offset + state[f"layers.{i}.bias"],
        )
    twin = as_open_clip(aesthetic._clip.model, quick_gelu=True)
    pixels = torch.stack([openai_pixels(image, 56) for image in images[:4]])
    with torch.no_grad():
        theirs = twin.encode_image(pixels, normalize=True) @ row[0] + offset
    ours = aesthetic.score(images[:4], PROMPTS[:4])["aesthetic"]
    assert np.abs(ours - theirs.numpy()).max() < 1e-5
    assert np.ptp(ours) > 0.01


def test_the_aesthetic_head_needs_openais_clip(aesthetic, clip_score, tmp_path):
    """Other features than ViT-L/14's 768, or GELU, would give plausible nonsense and are refused before loading."""
    gelu = tiny_clip.clip_folder(tmp_path / "gelu", "gelu", 768)
    for folder, has in ((clip_score.folder, "32 features with quick_gelu"), (gelu, "768 features with gelu")):
        with pytest.raises(UserError, match=has):
            Aesthetic(weights=aesthetic.weights, clip=str(folder)).files()
    with pytest.raises(
        UserError, match=r"aesthetic.weights: there is no file .*fetch it once with `curl .*linearMSE.pth`"
    ):
        Aesthetic(weights=str(tmp_path / "head.pth"), clip=aesthetic.clip).files()


def test_a_head_of_another_layout_is_refused(aesthetic, tmp_path, images):
    """Missing and unexpected tensors are named; a file with pickled objects is not opened."""
    state = torch.load(aesthetic.weights, weights_only=True)
    state["layers.8.weight"] = state.pop("layers.7.weight")
    torch.save(state, tmp_path / "other.pth")
    torch.save({"head": SimpleNamespace()}, tmp_path / "objects.pth")
    for name, says in (("other.pth", r"Missing.*7.weight.*Unexpected.*8.weight"), ("objects.pth", "more than tensors")):
        with pytest.raises(UserError, match=says):
            Aesthetic(weights=str(tmp_path / name), clip=aesthetic.clip).score(images[:1], PROMPTS[:1])


# -- the evaluators' contract -----------------------------------------------------------------------------------------


class TestHPSv2(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, hps):
        self.evaluator = hps


class TestPickScore(EvaluatorContract):
    unit = float(np.exp(4.6))  # table in logits, reward in cosines

    @pytest.fixture(autouse=True)
    def _evaluator(self, pick):
        self.evaluator = PickScore(weights=pick.weights, reward_unit="cosine")


class TestImageReward(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, image_reward):
        self.evaluator = image_reward


class TestCLIPScore(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, clip_score):
        self.evaluator = clip_score


class TestAesthetic(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, aesthetic):
        self.evaluator = aesthetic


class TestGenEval(EvaluatorContract):
    """The contract on renders of the shapes world: every other image shows its prompt, the rest a neighbour's."""

    evaluator = GenEval(detector="shapes")

    def prompts(self):
        return [Prompt(str(i), line["prompt"], line["tag"], line) for i, line in enumerate(LINES[:5])]

    def images(self):
        rng = np.random.default_rng(0)
        shown = [LINES[i + i % 2] for i in range(5)]
        pixels = [scene.render(scene.sample_scene(rng, line)) for line in shown]
        return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]

    def test_it_tells_right_from_wrong(self):
        """Verdicts hold by both rules."""
        assert self.evaluator.score(self.images(), self.prompts()).to_numpy().tolist() == [
            [1, 1],
            [0, 0],
            [1, 1],
            [0, 0],
            [1, 1],
        ]


def test_the_reward_has_a_gradient_in_every_pixel(scorer):
    """The gradient is finite, and equals the central difference along a random direction."""
    x = pixels(1, side=40).mul(0.8).add(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.reward(x, PROMPTS[:1]).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.99
    direction = gradient.sign()
    with torch.no_grad():
        up, down = (scorer.reward(x + step * direction, PROMPTS[:1]).double() for step in (1e-3, -1e-3))
    slope = (gradient * direction).double().sum()
    assert abs((up - down) / 2e-3 - slope) < 0.02 * slope


def test_the_reward_refuses_other_scales(scorer):
    """Pixels in 0..255 or -1..1 would give a plausible wrong number: they are refused."""
    for wrong in (pixels(1) * 255, pixels(1) * 2 - 1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            scorer.reward(wrong, PROMPTS[:1])


def test_padding_after_a_text_does_not_matter(hps):
    """Attention is causal, so leaving out the padding changes text features only by rounding."""
    model = hps._model
    for text in ("", "a red circle", "a red circle beside a blue square, oil on canvas", "x " * 100):
        with torch.no_grad():
            padded = model.encode_text(hps._tokenizer(text), normalize=True)[0]
        torch.testing.assert_close(hps._text(text), padded, rtol=0, atol=1e-6)


def test_the_hinge_is_closed_above_the_margin(hps):
    """relu(margin - score): slope -1 below the margin, 0 above; without a margin the loss is -score."""
    scores = torch.tensor([[0.2, 0.9]], requires_grad=True)
    reward = Reward(Term(hps, margin=0.55))
    loss = reward.loss(scores)
    torch.testing.assert_close(loss, torch.tensor([0.35, 0.0]))
    assert torch.autograd.grad(loss.sum(), scores)[0].tolist() == [[-1, 0]]
    assert reward.hinge_closed(scores).tolist() == [[False, True]]
    assert Reward(Term(hps)).loss(scores).tolist() == (-scores[0]).tolist()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"junk" * 99)])
def test_a_spoilt_weight_file_is_one_clear_line(scorer, tmp_path, spoil):
    """``files`` names a truncated, empty or foreign file before anything is loaded."""
    copy = shutil.copytree(scorer.files()[0].parent, tmp_path / "copy")
    (heavy,) = (p for p in copy.iterdir() if p.suffix in (".pt", ".pth", ".safetensors"))
    spoil(heavy)
    name = heavy if Path(scorer.weights).is_file() else copy
    with pytest.raises(UserError, match=r"cannot be read: .*(empty|truncated)") as error:
        msgspec.structs.replace(scorer, weights=str(name)).files()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scorer", ["hps", "pick", "image_reward", "clip_score"], indirect=True)
def test_missing_weights_say_what_to_do(scorer, tmp_path):
    """A folder without weights, a missing path and a hub id that was never fetched are one-line errors."""
    for name, says in [
        (str(tmp_path), "has no|is missing"),
        ("./x", "there is no file or folder"),
        ("a/b", "hf download a/b"),
    ]:
        with pytest.raises(UserError, match=says):
            msgspec.structs.replace(scorer, weights=name).files()


@pytest.mark.slow
def test_files_need_no_torch(hps, pick, image_reward, clip_score, aesthetic):
    """The checks of every evaluator import neither torch nor transformers."""
    made = [hps, pick, image_reward, clip_score, aesthetic]
    calls = "\n".join(f"assert make({settings(evaluator)!r}).files()" for evaluator in made)
    code = f"""import sys
from alignbench.plugins import Registry
make = lambda settings: Registry().make("evaluator", settings, "")
{calls}
make({{"name": "geneval", "detector": "shapes"}}).check([])
assert not {{"torch", "transformers", "open_clip"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pickled_code_runs_only_if_the_file_is_trusted(tmp_path, monkeypatch):
    """The variable must hold the file's own hash, which the error states; then the file is read."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "trap.pt"
    torch.save({"meta": Trap(), "tensor": torch.ones(2)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for value in ("", "1", "0" * 64):
        monkeypatch.setenv("ALIGNBENCH_TRUST", value)
        with pytest.raises(UserError, match=f"runs its code; if you trust it: ALIGNBENCH_TRUST={digest}"):
            weights.load(path, "x.weights")
        assert not (tmp_path / "sprung").exists()
    monkeypatch.setenv("ALIGNBENCH_TRUST", digest)
    assert weights.load(path, "x.weights")["tensor"].tolist() == [1, 1]
    assert (tmp_path / "sprung").exists()


def test_a_smaller_clip_truncates_earlier():
    """The shapes world's PickScore has 24 positions: longer prompts are truncated there and counted, as at 77."""
    pick, image = PickScore(weights="shapes"), random_image(64, 64, 0)
    with pytest.warns(UserWarning, match="pickscore: 1 of 1 prompts are longer than 24 tokens"):
        (long,) = pick.score([image], [Prompt("p", "red circle " * 60)])["pickscore"]
    with pytest.warns(UserWarning, match="1 of 1"):
        assert pick.score([image], [Prompt("p", "red circle " * 40)])["pickscore"].tolist() == [long]


# -- official engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["hps", "image_reward"], indirect=True)
def test_the_official_engine_says_how_to_install_it(scorer, images, monkeypatch, tmp_path):
    """Without its environment, scoring is a one-line error; the files that determine the score are the same."""
    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path))
    official = msgspec.structs.replace(scorer, engine="official")
    assert official.files() == scorer.files()
    with pytest.raises(UserError, match=f"run `alignbench doctor --install {scorer.name}-official`"):
        official.score(images[:1], PROMPTS[:1])


@pytest.mark.parametrize("scorer", ["hps", "image_reward"], indirect=True)
def test_the_official_engine_gives_no_reward(scorer):
    """It says so before training (``differentiable``), and ``reward`` refuses."""
    official = msgspec.structs.replace(scorer, engine="official")
    assert (scorer.differentiable, official.differentiable) == (True, False)
    with pytest.raises(UserError, match=f"{scorer.name}.engine: 'official' gives no training reward"):
        official.reward(pixels(1), PROMPTS[:1])


# -- GenEval ----------------------------------------------------------------------------------------------------------


def thing(label, x=0.0, y=0.0, color="red", score=0.95, side=10.0):
    """Return a detection whose box of ``side`` pixels is centred on (x, y)."""
    half = side / 2
    return SimpleNamespace(label=label, color=color, score=score, box=(x - half, y - half, x + half, y + half))


def verdict(things, tag, *include, exclude=()):
    return geneval.correct(geneval.group(things, tag), {"tag": tag, "include": include, "exclude": exclude})


def wants(label, count=1, **more):
    return {"class": label, "count": count, **more}


def test_an_object_must_be_there():
    """single_object and two_object: every class is found above 0.3, whatever else is in the image."""
    assert verdict([thing("dog"), thing("cat")], "single_object", wants("dog"))
    assert not verdict([thing("cat")], "single_object", wants("dog"))
    assert not verdict([thing("dog", score=0.3)], "single_object", wants("dog"))  # strictly above
    assert verdict([thing("dog", score=0.31)], "single_object", wants("dog"))
    assert verdict([thing("dog"), thing("cat")], "two_object", wants("dog"), wants("cat"))
    assert not verdict([thing("dog")], "two_object", wants("dog"), wants("cat"))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_counting_is_exact(n):
    """n objects above 0.9 and not n + 1: include says at least n, exclude says fewer than n + 1."""
    clause, beyond = wants("dog", n), [wants("dog", n + 1)]
    right = [verdict([thing("dog")] * k, "counting", clause, exclude=beyond) for k in range(7)]
    assert right == [k == n for k in range(7)]
    doubtful = [thing("dog", score=0.9)] * 3  # below the counting threshold: not counted
    assert verdict([thing("dog")] * n + doubtful, "counting", clause, exclude=beyond)


def test_colour_is_judged_on_the_most_confident_objects():
    """The top ``count`` objects must all have the colour; less confident ones are ignored."""
    red, blue = thing("dog"), thing("dog", color="blue", score=0.5)
    assert verdict([blue, red], "colors", wants("dog", color="red"))
    assert not verdict([blue, red], "colors", wants("dog", color="blue"))
    assert not verdict([red, blue], "colors", wants("dog", 2, color="red"))
    assert verdict([red, red, blue], "colors", wants("dog", 2, color="red"))


def test_attributes_bind_to_their_objects():
    """color_attr: a red dog and a blue cat are not a blue dog and a red cat."""
    things = [thing("dog", color="red"), thing("cat", color="blue")]
    assert verdict(things, "color_attr", wants("dog", color="red"), wants("cat", color="blue"))
    assert not verdict(things, "color_attr", wants("dog", color="blue"), wants("cat", color="red"))


def test_a_colour_classifier_can_be_handed_in():
    """``color_of`` names colours for a detector that does not."""
    objects = geneval.group([thing("dog", color=None)], "colors")
    metadata = {"tag": "colors", "include": [wants("dog", color="green")]}
    assert not geneval.correct(objects, metadata)
    assert geneval.correct(objects, metadata, color_of=lambda found: "green")


def test_position_compares_all_with_all():
    """Every found object must stand in the relation to every object of the earlier clause."""
    dog, cat = wants("dog"), wants("cat", position=["left of", 0])
    assert verdict([thing("dog", 50), thing("cat", 0)], "position", dog, cat)
    assert not verdict([thing("dog", 0), thing("cat", 50)], "position", dog, cat)
    two = wants("cat", 2, position=["left of", 0])
    assert verdict([thing("dog", 50), thing("cat", 0), thing("cat", 5)], "position", dog, two)
    assert not verdict([thing("dog", 50), thing("cat", 0), thing("cat", 99)], "position", dog, two)
    assert not verdict([thing("cat", 0)], "position", dog, cat)  # its target was not found


def test_at_most_sixteen_of_a_class_are_kept_best_first():
    """group sorts by confidence and keeps 16."""
    found = geneval.group([thing("dog", score=0.31 + 0.01 * i) for i in range(40)], "colors")["dog"]
    assert [round(each.score, 2) for each in found] == [round(0.70 - 0.01 * i, 2) for i in range(16)]


def boxes(n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        (x0, x1), (y0, y1) = (sorted((rng.uniform(0, 99), rng.uniform(0, 99))) for _ in range(2))
        yield x0, y0, x1, y1


# Box a is centred on the origin. Along each axis the distance of the centres loses a tenth of both sides together; what
# is left, divided by the distance of the centres in the plane, has to exceed a half.
RELATIONS = {  # case: (centre of b, its sides, the sides of a, the relations of a to b)
    "apart": ((10, 0), (10, 10), (10, 10), {"left of"}),  # 10 - 2 = 8; 8 / 10
    "on the other side": ((-10, 0), (10, 10), (10, 10), {"right of"}),
    "over": ((0, 10), (10, 10), (10, 10), {"above"}),
    "under": ((0, -10), (10, 10), (10, 10), {"below"}),
    "at the same place": ((0, 0), (10, 10), (10, 10), set()),
    "within the margin": ((2, 0), (10, 10), (10, 10), set()),  # 2 - 2 = 0
    "exactly a half": ((4, 0), (10, 10), (10, 10), set()),  # 2 / 4
    "beyond a half": ((5, 0), (10, 10), (10, 10), {"left of"}),  # 3 / 5
    "diagonal": ((10, 10), (10, 10), (10, 10), {"left of", "above"}),  # 8 / 14.1 = 0.57 twice
    "diagonal and near": ((6, 6), (10, 10), (10, 10), set()),  # 4 / 8.5 = 0.47 twice
    "more above than left": ((6, 8), (10, 10), (10, 10), {"above"}),  # 4 / 10 and 6 / 10
    "more left than above": ((8, 6), (10, 10), (10, 10), {"left of"}),  # 6 / 10 and 4 / 10
    "right and below": ((-30, -40), (10, 10), (10, 10), {"right of", "below"}),  # 28 / 50 and 38 / 50
    "a wide neighbour": ((10, 0), (50, 10), (10, 10), set()),  # 10 - 6 = 4; 4 / 10
    "a wide neighbour farther off": ((15, 0), (50, 10), (10, 10), {"left of"}),  # 15 - 6 = 9; 9 / 15
    "a wide neighbour over": ((0, 10), (50, 10), (10, 10), {"above"}),  # its height counts: 10 - 2 = 8; 8 / 10
    "points": ((3, 4), (0, 0), (0, 0), {"left of", "above"}),  # 3 / 5 and 4 / 5
    "points that touch": ((0.0009, 0), (0, 0), (0, 0), set()),  # below a thousandth of a pixel there is no direction
    "corners the wrong way round": ((10, 0), (-10, 10), (10, -10), {"left of"}),
}


@pytest.mark.parametrize("case", RELATIONS)
def test_relations_are_those_computed_by_hand(case):
    """Margins, the half, the diagonal and unequal sizes, with the quotients beside each case."""
    (x, y), (wide, high), (a_wide, a_high), expected = RELATIONS[case]
    a = (-a_wide / 2, -a_high / 2, a_wide / 2, a_high / 2)
    assert geneval.relations(a, (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)) == expected


DOG, CAT, CAR = wants("dog"), wants("cat"), wants("car")
VERDICTS = {  # case: (objects of the image, what is included, what is excluded, the verdict)
    "nothing is asked for": ([], [], [], True),
    "nothing is there": ([], [DOG], [], False),
    "others do not matter": ([thing("dog"), thing("cat"), thing("car")], [DOG, CAT], [], True),
    "one of three is missing": ([thing("dog"), thing("car")], [DOG, CAT, CAR], [], False),
    "more than asked for": ([thing("dog")] * 3, [wants("dog", 2)], [], True),
    "as many as excluded": ([thing("dog")] * 3, [wants("dog", 2)], [wants("dog", 3)], False),
    "an excluded class": ([thing("dog"), thing("cat")], [DOG], [CAT], False),
    "an excluded class that is not there": ([thing("dog")], [DOG], [CAT], True),
    "fewer than excluded": ([thing("dog"), thing("cat")], [DOG], [wants("cat", 2)], True),
    "two of a colour": ([thing("dog")] * 2, [wants("dog", 2, color="red")], [], True),
    "a second of another colour": (
        [thing("dog"), thing("dog", color="blue")],
        [wants("dog", 2, color="red")],
        [],
        False,
    ),
    "the third is blue": (
        [thing("dog"), thing("dog"), thing("dog", color="blue", score=0.4)],
        [wants("dog", 2, color="red")],
        [],
        True,
    ),
    "the surer one is blue": (
        [thing("dog", score=0.4), thing("dog", color="blue")],
        [wants("dog", color="red")],
        [],
        False,
    ),
    "placed by the second object": (
        [thing("dog"), thing("cat", 50), thing("car", 25)],
        [DOG, CAT, wants("car", position=["left of", 1])],
        [],
        True,
    ),
    "placed by the first object": (
        [thing("dog"), thing("cat", 50), thing("car", 25)],
        [DOG, CAT, wants("car", position=["left of", 0])],
        [],
        False,
    ),
    "a surer one elsewhere": (
        [thing("dog", 50), thing("cat", 0, score=0.4), thing("cat", 99)],
        [DOG, wants("cat", position=["left of", 0])],
        [],
        False,
    ),
    "its target has another colour": (
        [thing("dog", 50, color="blue"), thing("cat", 0)],
        [wants("dog", color="red"), wants("cat", position=["left of", 0])],
        [],
        False,
    ),
    "colour and place": (
        [thing("dog", 50), thing("cat", 0, color="blue")],
        [DOG, wants("cat", color="blue", position=["left of", 0])],
        [],
        True,
    ),
    "colour, but another place": (
        [thing("dog", 50), thing("cat", 99, color="blue")],
        [DOG, wants("cat", color="blue", position=["left of", 0])],
        [],
        False,
    ),
    "a place for two, and one is too near": (
        [thing("dog", 50), thing("dog", 4), thing("cat", 0)],
        [wants("dog", 2), wants("cat", position=["left of", 0])],
        [],
        False,
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_are_those_found_by_hand(case):
    """A class needs its number of objects; the surest of them need colour and place; nothing excluded may be there."""
    things, include, exclude, expected = VERDICTS[case]
    assert verdict(things, "two_object", *include, exclude=exclude) == expected


def test_relations_mirror():
    """Flipping the image swaps left and right; swapping the boxes swaps both pairs; a transpose swaps the axes."""
    flip = {"left of": "right of", "right of": "left of"}
    swap = {**flip, "above": "below", "below": "above"}
    turn = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    seen = set()
    for a, b in zip(boxes(1000, seed=0), boxes(1000, seed=1)):
        found = geneval.relations(a, b)
        seen |= found
        mirrored = geneval.relations(*((100 - c[2], c[1], 100 - c[0], c[3]) for c in (a, b)))
        assert mirrored == {flip.get(r, r) for r in found}
        assert geneval.relations(b, a) == {swap[r] for r in found}
        assert geneval.relations(*((c[1], c[0], c[3], c[2]) for c in (a, b))) == {turn[r] for r in found}
    assert seen == set(swap)


def test_touching_boxes_have_no_relation():
    """Boxes closer than a tenth of their summed sizes have no relation; diagonal neighbours may have two."""
    assert geneval.relations((0, 0, 10, 10), (1.9, 0, 11.9, 10)) == set()
    assert geneval.relations((0, 0, 10, 10), (50, 50, 60, 60)) == {"left of", "above"}


def test_overall_is_the_mean_of_task_means():
    """A task with more images does not weigh more."""
    assert geneval.overall({"a": [1, 1, 1, 1], "b": [0]}) == 0.5
    assert geneval.overall({"a": iter([1, 0]), "b": [1, 1, 1, 0], "c": [0]}) == pytest.approx((0.5 + 0.75) / 3)


def test_the_shapes_detector_judges_renders():
    """A render of the prompt is right, one in which something else was changed is wrong; strict implies official."""
    rng = np.random.default_rng(1)
    evaluator = GenEval(detector="shapes")
    for line in LINES[::3]:
        prompt = Prompt("0", line["prompt"], line["tag"], line)
        shown = (line, scene.corrupt(rng, line), LINES[rng.integers(len(LINES))])
        pixels = [(scene.render(scene.sample_scene(rng, each)) * 255).round().astype(np.uint8) for each in shown]
        verdicts = evaluator.score([Image.fromarray(each) for each in pixels], [prompt] * 3)
        assert verdicts[:2].to_numpy().tolist() == [[1.0, 1.0], [0.0, 0.0]]
        assert (verdicts["geneval"] >= verdicts["geneval_strict"]).all()


def test_geneval_needs_its_metadata():
    """A prompt without a GenEval line is named, before anything is scored."""
    with pytest.raises(UserError, match="prompt 'a dog' has no GenEval metadata"):
        GenEval(detector="shapes").check([Prompt("0", "a dog")])

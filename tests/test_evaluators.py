"""Evaluators equal the official computation; rewards equal scores; GenEval's rules hold."""

import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from alignbench.config import UserError
from alignbench.evaluator import Reward, Term, to_tensor
from alignbench.evaluators import geneval
from alignbench.evaluators.geneval import GenEval
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.evaluators.pickscore import PickScore
from alignbench.prompts import Prompt
from alignbench.shapes import checker, scene
from alignbench.testing import EvaluatorContract, picture

SIZES = [(64, 64), (100, 60), (60, 100), (256, 256), (33, 47)]  # (height, width): larger, smaller and not square
TEXTS = ["a red circle", "Two blue squares &amp; a Triangle, café!", "a", "x " * 100, "a red circle"]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def images():
    return [picture(*size, seed=i) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    return HPSv2(weights=str(tiny.hps_folder(tmp_path_factory.mktemp("hps"))))


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    return PickScore(weights=str(tiny.pickscore_folder(tmp_path_factory.mktemp("pick"))))


@pytest.fixture(scope="module", params=["hps", "pick"])
def scorer(request):
    return request.getfixturevalue(request.param)


LINES = [line for task in scene.grammar().values() for line in task[::7]]  # some prompts of every task


def pixels(n, side=80):
    return torch.stack([to_tensor(picture(side, side, seed)) for seed in range(n)])


# -- HPSv2.1 ----------------------------------------------------------------------------------------------------------


def official_hps(folder, image, text):
    """hpsv2.score restated: its transform (img_score.py, image_transform with resize_longest_max) and its cosine."""
    import open_clip
    from torchvision.transforms import functional as F

    model = open_clip.CLIP(**tiny.HPS_CONFIG).eval()
    model.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    x = F.to_tensor(image.convert("RGB"))
    height, width = x.shape[1:]
    scale = 56 / float(max(height, width))
    new_size = tuple(round(dim * scale) for dim in (height, width))
    x = F.resize(x, new_size, F.InterpolationMode.BICUBIC, antialias=True)
    pad_h, pad_w = 56 - new_size[0], 56 - new_size[1]
    x = F.pad(x, padding=[pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2], fill=0)
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    x = (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        outputs = model(x[None], open_clip.tokenize([text]))
    return (outputs[0] @ outputs[1].T).item()


def test_hps_equals_the_official_computation(hps, images):
    """Five sizes, odd characters and an over-long prompt: within 1e-6 of hpsv2's own preprocessing and cosine."""
    ours = hps.score(images, PROMPTS)["hpsv2.1"]
    theirs = [official_hps(hps.checkpoint.parent, i, t) for i, t in zip(images, TEXTS)]
    assert np.abs(ours - theirs).max() < 1e-6
    assert np.ptp(theirs) > 0.01  # the random model does tell images apart


def test_hps_reads_a_file_a_folder_or_an_architecture(hps, tmp_path, images):
    """The .pt file itself scores like its folder; without a configuration beside it, ``architecture`` is used."""
    file = hps.checkpoint.parent / "HPS_v2.1_compressed.pt"
    assert HPSv2(weights=str(file)).score(images[:1], PROMPTS[:1]).equals(hps.score(images[:1], PROMPTS[:1]))
    alone = HPSv2(weights=str(shutil.copy(file, tmp_path)))
    with pytest.raises(UserError, match="is not this architecture"):
        HPSv2(weights=alone.weights, architecture="ViT-S-32-alt").score(images[:1], PROMPTS[:1])
    with pytest.raises(UserError, match="open_clip has no 'ViT-X'"):
        HPSv2(weights=alone.weights, architecture="ViT-X").score(images[:1], PROMPTS[:1])


# -- PickScore --------------------------------------------------------------------------------------------------------


def official_pickscore(folder, image, text):
    """The README's calc_probs before its softmax, with Pillow's preprocessing and transformers 5's pooler_output."""
    from transformers import AutoProcessor, CLIPImageProcessorPil, CLIPModel

    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    processor.image_processor = CLIPImageProcessorPil.from_pretrained(folder)
    settings = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    image_inputs = processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")
    text_inputs = processor.tokenizer([text], **settings)
    with torch.no_grad():
        image_embs = model.get_image_features(**image_inputs).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**text_inputs).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)[0]).item()


def test_pickscore_equals_the_official_computation(pick, images):
    """Five sizes and odd prompts: within 1e-4 of the README's snippet, on a scale of 100."""
    ours = pick.score(images, PROMPTS)["pickscore"]
    theirs = [official_pickscore(pick.folder, i, t) for i, t in zip(images, TEXTS)]
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.ptp(theirs) > 1


def test_pickscore_preprocessing_is_pillows(pick):
    """Shortest edge bicubic, centre crop, mean and std, done by hand with Pillow: equal to 1e-6."""
    image = picture(100, 160, seed=0)
    edge = image.resize((int(56 * 160 / 100), 56), Image.BICUBIC)
    left = (edge.width - 56) // 2
    x = to_tensor(edge.crop((left, 0, left + 56, 56)))
    processor = pick._image_processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    ours = torch.as_tensor(processor(images=[image], return_tensors="pt")["pixel_values"])[0]
    torch.testing.assert_close(ours, (x - mean[:, None, None]) / std[:, None, None], rtol=0, atol=1e-6)


def test_pickscores_tensor_path_is_near_pillows(pick, images):
    """Normalised pixels of the differentiable path: on average within 0.006 of the official ones, at most 0.25."""
    for image in images:
        official = torch.as_tensor(pick._image_processor(images=[image], return_tensors="pt")["pixel_values"])
        gap = (pick.preprocess(to_tensor(image)[None]) - official).abs()
        assert gap.mean() < 0.006
        assert gap.max() < 0.25


def test_pickscores_reward_unit(pick):
    """The cosine is the logit divided by exp(logit_scale), as LeapAlign's margin of 0.4 needs it."""
    cosine = PickScore(weights=pick.weights, reward_unit="cosine")
    logit = pick.reward(pixels(2), PROMPTS[:2])
    torch.testing.assert_close(logit, cosine.reward(pixels(2), PROMPTS[:2]) * float(np.exp(4.6)))


# -- what evaluators promise -------------------------------------------------------------------------------------------


class TestHPSv2(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, hps):
        self.evaluator = hps


class TestPickScore(EvaluatorContract):
    unit = float(np.exp(4.6))  # table in logits, reward in cosines

    @pytest.fixture(autouse=True)
    def _evaluator(self, pick):
        self.evaluator = PickScore(weights=pick.weights, reward_unit="cosine")


class TestGenEval(EvaluatorContract):
    """On renders of the shapes world: every other one shows its own prompt, the rest show their neighbour's."""

    evaluator = GenEval(detector="shapes")

    def prompts(self):
        return [Prompt(str(i), line["prompt"], line["tag"], line) for i, line in enumerate(LINES[:5])]

    def images(self):
        rng = np.random.default_rng(0)
        shown = [LINES[i + i % 2] for i in range(5)]
        pixels = [scene.render(scene.sample_scene(rng, line)) for line in shown]
        return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]

    def test_it_tells_right_from_wrong(self):
        """By both rules."""
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


def test_the_hinge_is_closed_above_the_margin(hps):
    """relu(margin - score): slope -1 below the margin, 0 above; without a margin the loss is -score."""
    scores = torch.tensor([[0.2, 0.9]], requires_grad=True)
    reward = Reward(Term(hps, margin=0.55))
    loss = reward.loss(scores)
    torch.testing.assert_close(loss, torch.tensor([0.35, 0.0]))
    assert torch.autograd.grad(loss.sum(), scores)[0].tolist() == [[-1, 0]]
    assert reward.closed(scores).tolist() == [[False, True]]
    assert Reward(Term(hps)).loss(scores).tolist() == (-scores[0]).tolist()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"junk" * 99)])
def test_a_spoilt_weight_file_is_one_clear_line(scorer, tmp_path, spoil):
    """Truncated, empty or of another kind: named by ``files`` before anything is loaded."""
    source = scorer.files()[0].parent
    shutil.copytree(source, tmp_path / "copy")
    (heavy,) = (p for p in (tmp_path / "copy").iterdir() if p.suffix in (".pt", ".safetensors"))
    spoil(heavy)
    with pytest.raises(UserError, match=r"cannot be read: .*(empty|truncated)") as error:
        type(scorer)(weights=str(tmp_path / "copy")).files()
    assert "\n" not in str(error.value)


def test_missing_weights_say_what_instead(scorer, tmp_path):
    """A folder without weights, a path that is not there, a hub id that was never fetched."""
    for name, says in [(str(tmp_path), "has no"), ("./x", "there is no file or folder"), ("a/b", "hf download a/b")]:
        with pytest.raises(UserError, match=says):
            type(scorer)(weights=name).files()


def test_files_need_no_torch(hps, pick):
    """The checks of both evaluators import neither torch nor transformers."""
    code = f"""import sys
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.evaluators.pickscore import PickScore
from alignbench.evaluators.geneval import GenEval
assert HPSv2(weights={hps.weights!r}).files() and PickScore(weights={pick.weights!r}).files()
GenEval(detector="shapes").check([])
assert not {{"torch", "transformers", "open_clip"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- GenEval ----------------------------------------------------------------------------------------------------------


def thing(label, x=0.0, y=0.0, color="red", score=0.95, side=10.0):
    """A detection whose box of ``side`` pixels is centred on (x, y)."""
    half = side / 2
    return SimpleNamespace(label=label, color=color, score=score, box=(x - half, y - half, x + half, y + half))


def verdict(things, tag, *include, exclude=()):
    return geneval.correct(geneval.group(things, tag), {"tag": tag, "include": include, "exclude": exclude})


def wants(label, count=1, **more):
    return {"class": label, "count": count, **more}


def test_an_object_must_be_there():
    """single_object and two_object: every class is found above 0.3, whatever else is in the picture."""
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
    """The top ``count`` objects must all have the colour; less confident ones are not looked at."""
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
    """Where the detector knows no colours, ``color_of`` does."""
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


def official_relations(box_a, box_b):
    """evaluate_images.py's relative_position, word for word."""
    boxes = np.array([box_a, box_b])[:, :4].reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=-2)
    dim_a, dim_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = center_a - center_b
    revised_offset = np.maximum(np.abs(offset) - 0.1 * (dim_a + dim_b), 0) * np.sign(offset)
    if np.all(np.abs(revised_offset) < 1e-3):
        return set()
    dx, dy = revised_offset / np.linalg.norm(offset)
    relations = set()
    if dx < -0.5:
        relations.add("left of")
    if dx > 0.5:
        relations.add("right of")
    if dy < -0.5:
        relations.add("above")
    if dy > 0.5:
        relations.add("below")
    return relations


def boxes(n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        (x0, x1), (y0, y1) = (sorted((rng.uniform(0, 99), rng.uniform(0, 99))) for _ in range(2))
        yield x0, y0, x1, y1


def test_relations_are_the_official_ones():
    """On 4,000 random pairs of boxes, and on coinciding ones."""
    for a, b in zip(boxes(4000, seed=0), boxes(4000, seed=1)):
        assert geneval.relations(a, b) == official_relations(a, b)
        assert geneval.relations(a, a) == set()


def test_relations_mirror():
    """Flipping the picture swaps left and right; swapping the boxes swaps both pairs; a transpose swaps the axes."""
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
    """Closer than a tenth of the summed sizes: no relation; diagonal neighbours may have two."""
    assert geneval.relations((0, 0, 10, 10), (1.9, 0, 11.9, 10)) == set()
    assert geneval.relations((0, 0, 10, 10), (50, 50, 60, 60)) == {"left of", "above"}


def test_overall_is_the_mean_of_task_means():
    """Not the mean over images: a task with more images weighs no more."""
    assert geneval.overall({"a": [1, 1, 1, 1], "b": [0]}) == 0.5
    assert geneval.overall({"a": iter([1, 0]), "b": [1, 1, 1, 0], "c": [0]}) == pytest.approx((0.5 + 0.75) / 3)


def test_the_shapes_detector_and_the_official_rules_agree():
    """On renders of other prompts too, GenEval's verdict equals the checker's own; strict implies official."""
    rng = np.random.default_rng(1)
    evaluator, right = GenEval(detector="shapes"), 0
    for line in LINES[::3]:
        for shown in (line, LINES[rng.integers(len(LINES))], scene.corrupt(rng, line)):
            pixels = (scene.render(scene.sample_scene(rng, shown)) * 255).round().astype(np.uint8)
            image, prompt = Image.fromarray(pixels), Prompt("0", line["prompt"], line["tag"], line)
            official, strict = evaluator.score([image], [prompt]).iloc[0]
            assert official == checker.correct(pixels, line)
            assert official >= strict
            right += official
    assert len(LINES[::3]) <= right < 3 * len(LINES[::3])


def test_geneval_needs_its_metadata():
    """A prompt without a GenEval line is named, before anything is scored."""
    with pytest.raises(UserError, match="prompt 'a dog' has no GenEval metadata"):
        GenEval(detector="shapes").check([Prompt("0", "a dog")])
    with pytest.raises(UserError, match=r"'mask2former' is not built yet.*there is: shapes"):
        GenEval(detector="mask2former")

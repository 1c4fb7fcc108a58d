"""GenEval's official detector without mmdet: its inputs, outputs, checkpoint and colours."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support import tiny

from alignbench.config import UserError
from alignbench.evaluators import geneval, mask2former
from alignbench.evaluators.geneval import Colors, GenEval
from alignbench.evaluators.mask2former import Mask2Former
from alignbench.prompts import Prompt
from alignbench.prompts.geneval import CLASSES, COLORS
from alignbench.rehearsal import tiny_clip, tiny_mask2former
from alignbench.testing import EvaluatorContract
from alignbench.testing.evaluator_contract import random_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_mask2former.mask2former_file(tmp_path_factory.mktemp("detector") / "mask2former.pth")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def fifth(monkeypatch):
    """The same code at a fifth of the input size."""
    monkeypatch.setattr(mask2former, "SCALE", (160, 266))


# -- preprocessing ----------------------------------------------------------------------------------------------------


def cv2_resize(image, height, width):
    """Restate cv2's fixed-point bilinear resize by pixel: weights in 2048ths, 4 bits dropped, then 16, then 2."""

    def taps(old, new):
        for i in range(new):
            at = np.float32((i + 0.5) * (old / new) - 0.5)
            yield math.floor(at), at - np.float32(math.floor(at))

    def fixed(share):
        return round(float(np.float32(1 - share) * 2048)), round(float(share * 2048))

    result = np.zeros((height, width, 3), np.uint8)
    old_height, old_width = image.shape[:2]
    for i, (row, down) in enumerate(taps(old_height, height)):
        for j, (column, across) in enumerate(taps(old_width, width)):
            if column < 0 or column >= old_width - 1:
                column, across = min(max(column, 0), old_width - 1), np.float32(0)
            for channel in range(3):
                total = 2
                for r, weight in zip((row, row + 1), fixed(down)):
                    line = image[min(max(r, 0), old_height - 1), :, channel].astype(int)
                    a, b = line[column], line[min(column + 1, old_width - 1)]
                    wide = a * fixed(across)[0] + b * fixed(across)[1]
                    total += ((wide >> 4) * weight) >> 16
                result[i, j, channel] = total >> 2
    return result


@pytest.mark.parametrize(("old", "new"), [((7, 5), (19, 23)), ((20, 31), (9, 8)), ((1, 1), (3, 2)), ((6, 9), (6, 9))])
def test_resizing_is_cv2s(old, new):
    """Enlarging, shrinking, one pixel and the same size (the identity) equal plain loops, bitwise."""
    image = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    resized = mask2former.resize(image, *new)
    assert np.array_equal(resized, cv2_resize(image, *new))
    assert old != new or np.array_equal(resized, image)


def test_halving_averages_four_pixels_and_nothing_is_antialiased():
    """Half the size is the rounded mean of each 2 x 2 block; a quarter, that of each block's middle 2 x 2."""
    image = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    blocks = image.reshape(8, 2, 12, 2, 3).astype(int).sum((1, 3))
    assert np.array_equal(mask2former.resize(image, 8, 12), (blocks + 2) // 4)
    middle = image.reshape(4, 4, 6, 4, 3)[:, 1:3, :, 1:3].astype(int).sum((1, 3))
    assert np.array_equal(mask2former.resize(image, 4, 6), (middle + 2) // 4)


@pytest.mark.parametrize(
    ("size", "inside", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((720, 720), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((768, 512), (1200, 800), (1216, 800)),
        ((100, 1000), (133, 1333), (160, 1344)),  # 133.3 rounds to 133
    ],
)
def test_images_fit_without_stretching(size, inside, padded):
    """Images are as large as fits (800, 1333), and padded right and below to multiples of 32."""
    pixels, found = mask2former.prepare(np.zeros((*size, 3), np.uint8))
    assert (found, tuple(pixels.shape)) == (inside, (1, 3, *padded))


def test_the_network_sees_red_first():
    """Red, green and blue use their own mean and deviation; the padding is grey 128, normalised."""
    image = np.zeros((100, 90, 3), np.uint8)
    image[:] = (250, 100, 20)
    pixels, (height, width) = mask2former.prepare(image)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    for part, color in ((pixels[0, :, :height, :width], [250, 100, 20]), (pixels[0, :, height:], [128, 128, 128])):
        assert part.numel()
        assert torch.equal(part, ((torch.tensor(color) - mean) / std)[:, None, None].expand_as(part))


# -- outputs ----------------------------------------------------------------------------------------------------------


def stretch(grid, height, width):
    """Interpolate a list of rows bilinearly, with aligned pixel centres, in plain loops."""

    def taps(i, old, new):
        at = max((i + 0.5) * old / new - 0.5, 0)
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    rows = []
    for i in range(height):
        top, bottom, down = taps(i, len(grid), height)
        row = []
        for j in range(width):
            left, right, across = taps(j, len(grid[0]), width)
            upper = grid[top][left] * (1 - across) + grid[top][right] * across
            lower = grid[bottom][left] * (1 - across) + grid[bottom][right] * across
            row.append(upper * (1 - down) + lower * down)
        rows.append(row)
    return rows


def read_plainly(classes, masks, padded, inside, size):
    """Return (score, label, box, pixels) of the best 100 pairs of query and class, best first."""
    pairs = []
    for query, logits in enumerate(classes):
        total = sum(math.exp(x) for x in logits)
        pairs += [(math.exp(x) / total, query, label) for label, x in enumerate(logits[:-1])]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        whole = stretch(masks[query], *padded)
        grid = stretch([row[: inside[1]] for row in whole[: inside[0]]], *size)
        solid = {(i, j): x for i, row in enumerate(grid) for j, x in enumerate(row) if x > 0}
        certain = sum(1 / (1 + math.exp(-x)) for x in solid.values()) / (len(solid) + 1e-6)
        ys, xs = [i for i, _ in solid], [j for _, j in solid]
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1) if solid else (0, 0, 0, 0)
        found.append((probability * certain, label, box, set(solid)))
    return found


def test_outputs_are_decoded_as_by_mmdet():
    """Scores, classes, boxes and pixels equal plain loops; a query without pixels has score 0 and no box."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(4, 41, generator=generator, dtype=torch.float64)
    masks = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64) * 3
    masks[2] = -1
    shapes = {"padded": (20, 24), "inside": (17, 21), "size": (9, 13)}
    found = mask2former.read(classes, masks, **shapes)
    plain = read_plainly(classes.tolist(), masks.tolist(), **shapes)
    assert len(found.scores) == len(plain) == 100
    for label, score, box, mask, (expected, name, edges, solid) in zip(*found, plain):
        assert score.item() == pytest.approx(expected, rel=1e-12)
        assert (label, tuple(box.tolist())) == (name, edges)
        assert {tuple(at) for at in mask.nonzero().tolist()} == solid
    assert any(score == 0 and edges == (0, 0, 0, 0) for score, _, edges, _ in plain)


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def test_both_generations_of_names_mean_the_same():
    """mmdet 2.x's names and 3.x's convert to the same tensors, and no value is lost."""
    state = tiny_mask2former.mask2former_state()
    new, old = mask2former.convert(state), mask2former.convert(tiny.mmdet_2(state))
    assert tiny.mmdet_2(state).keys() != state.keys()
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in new)
    weights = (tensor for name, tensor in state.items() if not name.endswith("relative_position_index"))
    assert sum(map(torch.sum, new.values())) == pytest.approx(float(sum(map(torch.sum, weights))), rel=1e-4)


def test_channels_of_merged_patches_are_reordered():
    """mmdet unfolds 2 x 2 patches channel by channel; the converted norm and projection on Swin's own merging agree."""
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(0)
    x = torch.randn(1, 6, 8, 10, dtype=torch.float64)  # (B, C, H, W)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    norm, reduction = torch.nn.LayerNorm(24).double(), torch.nn.Linear(24, 12, bias=False).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    theirs = reduction(norm(unfolded))
    merging = SwinPatchMerging(6).double()
    tensors = {"norm.weight": norm.weight, "norm.bias": norm.bias, "reduction.weight": reduction.weight}
    merging.load_state_dict({name: mask2former._merged(tensor) for name, tensor in tensors.items()})
    torch.testing.assert_close(merging(x.permute(0, 2, 3, 1).flatten(1, 2), (8, 10)), theirs)


def test_the_size_is_the_checkpoints():
    """Depths, heads, window, widths and queries are read off the tensors' shapes."""
    config = mask2former.architecture(mask2former.convert(tiny_mask2former.mask2former_state()))
    swin = config.backbone_config
    assert (swin.embed_dim, list(swin.depths), list(swin.num_heads)) == (8, [1, 1, 2, 1], [1, 2, 4, 8])
    assert (swin.window_size, config.num_labels, config.num_queries, config.num_attention_heads) == (7, 80, 20, 8)
    assert (config.encoder_layers, config.decoder_layers, config.hidden_dim) == (1, 3, 32)
    assert (config.encoder_feedforward_dim, config.dim_feedforward, config.mask_feature_size) == (16, 24, 32)


@pytest.mark.slow
def test_the_official_size_is_transformers_default():
    """Swin-S's tensors give the configuration that transformers has for Mask2Former, but for the backbone."""
    from transformers import Mask2FormerConfig

    swin = {"embed": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}
    rest = {"width": 256, "encoder": 6, "decoder": 9, "inner": (1024, 2048), "queries": 100}
    config = mask2former.architecture(mask2former.convert(tiny_mask2former.mask2former_state(**swin, **rest)))
    found, default = config.to_dict(), Mask2FormerConfig(num_labels=80).to_dict()
    assert {key for key in default if found[key] != default[key]} == {"backbone_config"}
    backbone = config.backbone_config
    assert (backbone.embed_dim, list(backbone.depths), list(backbone.num_heads)) == (96, [2, 2, 18, 2], [3, 6, 12, 24])


MMDET = [  # the class, pixels and score of the best objects in random_image(60, 80, seed=3)
    (77, 3177, 0.783256),
    (77, 3164, 0.757747),
    (77, 2637, 0.746276),
    (77, 2416, 0.712849),
    (77, 2496, 0.711984),
]


@pytest.mark.slow
def test_the_converted_model_finds_what_mmdet_finds(checkpoint):
    """Classes, masks and scores of the five best objects, as mmdet 3.3.0 itself gave them for this checkpoint."""
    found = sorted(
        Mask2Former(checkpoint, "x").detect(np.asarray(random_image(60, 80, seed=3))), key=lambda d: -d.score
    )
    assert [each.label for each in found[:5]] == [CLASSES[label] for label, _, _ in MMDET]
    assert [each.mask.sum() for each in found[:5]] == pytest.approx([pixels for _, pixels, _ in MMDET], abs=1)
    assert [each.score for each in found[:5]] == pytest.approx([score for _, _, score in MMDET], abs=2e-5)


def test_only_objects_above_the_threshold_are_returned(checkpoint, fifth):
    """``above`` drops objects, and changes no other."""
    detector, image = Mask2Former(checkpoint, "x"), np.asarray(random_image(40, 50, seed=0))
    every, few = detector.detect(image), detector.detect(image, above=0.3)
    assert 0 < len(few) < len(every) == 100
    assert [each[:3] for each in few] == [each[:3] for each in every if each.score > 0.3]
    assert all(each.mask.shape == (40, 50) and each.mask.dtype == bool for each in few)


def spoilt(change):
    state = tiny_mask2former.mask2former_state()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            spoilt(lambda s: s.pop("panoptic_head.mask_embed.2.bias")),
            r"missing \['model.*mask_embedder.1.0.bias'\], un",
        ),
        (spoilt(lambda s: s.update(extra=torch.zeros(2))), r"missing nothing, unexpected \['extra'\]"),
        (spoilt(lambda s: s.pop("panoptic_head.cls_embed.weight")), "not mmdet's Mask2Former .*class_predictor.weight"),
        (spoilt(lambda s: s.update({"panoptic_head.cls_embed.weight": torch.zeros(134, 32)})), "knows 133 classes"),
        (
            spoilt(lambda s: s.update({"panoptic_head.query_embed.weight": torch.zeros(3, 32)})),
            "not mmdet's Mask2Former",
        ),
        ({"blip.weight": torch.zeros(2)}, "not mmdet's Mask2Former with a Swin"),
    ],
)
def test_another_checkpoint_is_one_clear_line(state, says, tmp_path):
    """Missing and unexpected tensors are named; another model, size or set of classes is reported."""
    path = tiny_mask2former.mask2former_file(tmp_path / "other.pth", state)
    with pytest.raises(UserError, match=says) as error:
        mask2former.load(path, "geneval.detector")
    assert str(error.value).startswith(f"geneval.detector: {path}")
    assert "\n" not in str(error.value)


def test_no_code_of_a_checkpoint_runs(tmp_path):
    """A pickled object other than tensors and plain data is refused, and what it would have run is not run."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"meta": Trap(), "state_dict": {}}, tmp_path / "trap.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="holds more than tensors and plain data"):
        mask2former.load(tmp_path / "trap.pth", "geneval.detector")
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_download_is_recognised_by_its_name(checkpoint, tmp_path):
    """OpenMMLab's names end with the first digits of the sha256; files that do not match are refused."""
    import hashlib

    right = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
    mask2former.load(shutil.copy(checkpoint, tmp_path / f"m-{right}.pth"), "x")
    with pytest.raises(UserError, match="is damaged: its sha256 does not begin with 01234567"):
        mask2former.load(shutil.copy(checkpoint, tmp_path / "m-01234567.pth"), "x")


# -- GenEval with it --------------------------------------------------------------------------------------------------


def evaluator(checkpoint, clip_folder):
    return GenEval(detector=str(checkpoint), clip=str(clip_folder))


class TestGenEvalByMask2Former(EvaluatorContract):
    """The contract with prompts that, for every other image, name the detected object and CLIP's colour."""

    @pytest.fixture(autouse=True)
    def _evaluator(self, checkpoint, clip_folder, fifth):
        self.evaluator = evaluator(checkpoint, clip_folder)

    def prompts(self):
        return [Prompt(str(i), "", "colors", line) for i, line in enumerate(map(self.line, range(5), self.images()))]

    def line(self, number, image):
        found = self.evaluator._mask2former.detect(np.asarray(image))
        objects = geneval.group(found, "colors")
        best = next(iter(objects.values()))[0]
        color = self.evaluator._colors.name(image, best)
        other = COLORS[(COLORS.index(color) + 1) % 10]
        return {
            "tag": "colors",
            "include": [{"class": best.label, "count": 1, "color": other if number % 2 else color}],
        }

    def test_it_tells_right_from_wrong(self):
        """Verdicts hold by the official rule."""
        assert self.evaluator.score(self.images(), self.prompts())["geneval"].tolist() == [1, 0, 1, 0, 1]


class Painted:
    """A detector for painted images, whose objects and masks are known."""

    def __init__(self, *things):
        self.things = [thing if len(thing) == 3 else (*thing, 0.95) for thing in things]

    def detect(self, image, above):
        for label, box, score in self.things:
            mask = np.zeros(image.shape[:2], bool)
            mask[box[1] : box[3], box[0] : box[2]] = True
            yield mask2former.Detection(label, tuple(map(float, box)), score, mask)


class Averages:
    """A colour classifier that uses the mean of the crop."""

    def name(self, image, found):
        red, _, blue = np.asarray(geneval.cut_out(image, found)).reshape(-1, 3).mean(0)
        return "red" if red > blue else "blue"


DOG, CAT = (10, 40, 30, 60), (60, 40, 80, 60)  # the dog stands left of the cat
TWICE = [("dog", DOG), ("dog", CAT)]


@pytest.mark.parametrize(
    ("tag", "include", "exclude", "things", "verdicts"),
    [
        ("single_object", [("dog", 1)], [], [("dog", DOG)], (1, 1)),
        ("single_object", [("dog", 1)], [], [("dog", DOG, 0.3)], (0, 0)),
        ("single_object", [("dog", 1)], [], [*TWICE, ("cat", CAT)], (1, 0)),
        ("single_object", [("dog", 1)], [], [("dog", DOG), ("cat", CAT)], (1, 1)),
        ("two_object", [("dog", 1), ("cat", 1)], [], [("dog", DOG), ("cat", CAT)], (1, 1)),
        ("two_object", [("dog", 1), ("cat", 1)], [], TWICE, (0, 0)),
        ("counting", [("dog", 2)], [("dog", 3)], TWICE, (1, 1)),
        ("counting", [("dog", 2)], [("dog", 3)], [*TWICE, ("dog", (0, 0, 9, 9), 0.9)], (1, 1)),
        ("counting", [("dog", 2)], [("dog", 3)], [*TWICE, ("dog", (0, 0, 9, 9), 0.91)], (0, 0)),
        ("colors", [("dog", 1, {"color": "red"})], [], [("dog", DOG)], (1, 1)),
        ("colors", [("dog", 1, {"color": "blue"})], [], [("dog", DOG)], (0, 0)),
        ("position", [("cat", 1), ("dog", 1, {"position": ["left of", 0]})], [], [("dog", DOG), ("cat", CAT)], (1, 1)),
        ("position", [("cat", 1), ("dog", 1, {"position": ["above", 0]})], [], [("dog", DOG), ("cat", CAT)], (0, 0)),
        ("color_attr", [("dog", 1, {"color": "red"}), ("cat", 1, {"color": "blue"})], [], "pair", (1, 1)),
        ("color_attr", [("dog", 1, {"color": "blue"}), ("cat", 1, {"color": "red"})], [], "pair", (0, 0)),
    ],
)
def test_each_task_is_verified_on_masks(tag, include, exclude, things, verdicts, monkeypatch):
    """All six tasks hold on a white image with a red square on the left and a blue one on the right."""
    image = Image.new("RGB", (100, 100), "white")
    for box, color in ((DOG, "red"), (CAT, "blue")):
        ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=color)
    things = [("dog", DOG), ("cat", CAT)] if things == "pair" else things
    monkeypatch.setattr(GenEval, "_mask2former", Painted(*things))
    monkeypatch.setattr(GenEval, "_colors", Averages())
    line = {"tag": tag, "include": [{"class": c, "count": n, **dict(*more)} for c, n, *more in include]}
    line["exclude"] = [{"class": c, "count": n} for c, n in exclude]
    scores = GenEval(detector="painted").score([image], [Prompt("0", "", tag, line)])
    assert scores.to_numpy().tolist() == [list(verdicts)]


def test_a_turned_photograph_is_turned_back(monkeypatch):
    """The detector sees images upright, rotated by EXIF, as mmdet and the official script read files."""
    image = random_image(30, 40, seed=0)
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    seen = []
    monkeypatch.setattr(GenEval, "_mask2former", SimpleNamespace(detect=lambda image, above: seen.append(image) or []))
    line = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    GenEval(detector="x").score([turned, image], [Prompt("0", "", "colors", line)] * 2)
    assert np.array_equal(seen[0], np.rot90(np.asarray(image), -1))
    assert np.array_equal(seen[1], np.asarray(image))


# -- colours ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colors(clip_folder):
    return Colors(geneval.Clip(clip_folder, clip_folder, "geneval.clip"))


def test_an_object_is_cut_out_on_grey():
    """The crop is the object's box, with #999 outside the mask."""
    image, mask = random_image(30, 40, seed=1), np.zeros((30, 40), bool)
    mask[5:12, 8:20], mask[6, 9] = True, False
    cut = np.asarray(geneval.cut_out(image, mask2former.Detection("dog", (8.0, 5.0, 20.0, 12.0), 1.0, mask)))
    expected = np.where(mask[..., None], np.asarray(image), 0x99)[5:12, 8:20]
    assert np.array_equal(cut, expected)


@pytest.mark.parametrize("size", [(64, 64), (100, 61), (61, 100), (9, 33), (57, 58), (1, 7)])
def test_crops_are_prepared_as_by_open_clip(colors, size):
    """Shortest edge, centre crop (odd borders too) and normalisation equal open_clip's transform, bitwise."""
    from open_clip.transform import image_transform

    processor = colors.model.image_processor
    official = image_transform(56, is_train=False, mean=tuple(processor.image_mean), std=tuple(processor.image_std))
    image = random_image(*size, seed=2)
    torch.testing.assert_close(colors.prepare(image), official(image), rtol=0, atol=1e-6)


def unit(features):
    return torch.nn.functional.normalize(features.pooler_output[0], dim=0)


def test_a_colour_is_the_mean_of_three_sentences(colors):
    """A colour's row is the normalised mean of three sentences' normalised features, computed one by one."""
    rows = colors.classifier("dog")
    for color, row in zip(COLORS, rows, strict=True):
        sentences = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        tokens = [colors.model.tokenizer(sentence, return_tensors="pt") for sentence in sentences]
        with torch.no_grad():
            mean = sum(unit(colors.model.model.get_text_features(**each)) for each in tokens) / 3
        torch.testing.assert_close(row, torch.nn.functional.normalize(mean, dim=0))
    assert len(rows.unique(dim=0)) == 10


def test_the_nearest_colour_is_named(colors, monkeypatch):
    """If the ten colours' features are those of ten images, each image gets its own colour."""
    images = [random_image(48, 48, seed) for seed in range(10)]
    with torch.no_grad():
        inputs = [colors.prepare(image)[None] for image in images]
        rows = torch.stack([unit(colors.model.model.get_image_features(pixel_values=x)) for x in inputs])
    monkeypatch.setitem(colors._classifiers, "dog", rows)
    whole = mask2former.Detection("dog", (0, 0, 48, 48), 1.0, np.ones((48, 48), bool))
    assert [colors.name(image, whole) for image in images] == list(COLORS)


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_name_the_detector_and_clip(checkpoint, clip_folder):
    """The shapes detector needs no files; Mask2Former needs its checkpoint and CLIP's folder."""
    assert GenEval(detector="shapes").files() == []
    files = evaluator(checkpoint, clip_folder).files()
    assert checkpoint in files
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert evaluator(checkpoint.parent, clip_folder).files() == files  # a folder with one .pth


def test_missing_files_say_how_to_get_them(checkpoint, clip_folder, tmp_path):
    """No detector, none or several in a folder, no CLIP, a GELU CLIP and a foreign file are one-line errors."""
    shutil.copy(checkpoint, tmp_path / "a.pth")
    shutil.copy(checkpoint, tmp_path / "b.pth")
    (tmp_path / "empty").mkdir()
    junk = tmp_path / "other" / "junk.pth"
    junk.parent.mkdir()
    junk.write_bytes(b"junk" * 9)
    gelu = tiny_clip.clip_folder(tmp_path / "gelu", "gelu")
    cases = [
        (
            ("mask2former", clip_folder),
            r"no file or folder 'mask2former'.*or 'shapes'.*curl -LO https://.*c9d0c4f2.pth",
        ),
        (("a/b", clip_folder), r"hf download a/b"),
        ((tmp_path, clip_folder), r"has 2 .pth files"),
        ((tmp_path / "empty", clip_folder), r"has 0 .pth files"),
        ((junk, clip_folder), r"junk.pth cannot be read"),
        ((checkpoint, "a/b"), r"geneval.clip: 'a/b'.*hf download a/b config.json"),
        ((checkpoint, gelu), r"vision_config.hidden_act is 'gelu'|text_config.hidden_act is 'gelu'"),
    ]
    for settings, says in cases:
        with pytest.raises(UserError, match=says):
            evaluator(*settings).files()

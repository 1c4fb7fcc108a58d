"""The shapes world: its checker is exact, its splits are disjoint, its model and scorers load in plain layouts."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from alignbench.evaluators import geneval
from alignbench.prompts.geneval import scene
from alignbench.shapes import ASSETS, MAX_TEXT
from alignbench.shapes import checker as C
from alignbench.shapes import scene as S


def everything():
    splits = S.splits()
    return splits["train"] + splits["val"] + splits["test"]


def as_uint8(image):
    return (image * 255).round().astype(np.uint8)


def verdicts(image, metadata):
    """GenEval's official and strict verdict."""
    return geneval.GenEval.judge_shapes(C.detect(image), metadata)


def test_the_checker_is_right_on_ground_truth():
    """Renders of every prompt pass the lenient and the strict check, at least 99 in 100."""
    rng = np.random.default_rng(0)
    pairs = [(as_uint8(S.render(S.sample_scene(rng, m))), m) for m in everything()]
    official, strict = np.mean([verdicts(i, m) for i, m in pairs], 0)
    assert official >= 0.99
    assert strict >= 0.99


def test_the_checker_survives_noise():
    """Pixel noise of sd .05 changes at most 1 verdict in 100."""
    rng = np.random.default_rng(1)
    pairs = [(S.render(S.sample_scene(rng, m)), m) for m in everything()[::2]]
    noisy = [(np.clip(i + 0.05 * rng.standard_normal(i.shape), 0, 1), m) for i, m in pairs]
    assert np.mean([verdicts(i, m)[1] for i, m in noisy]) >= 0.99


def test_one_attribute_changed_is_false():
    """An image of a corrupted caption never satisfies the caption."""
    rng = np.random.default_rng(2)
    for m in everything():
        image = S.render(S.sample_scene(rng, S.corrupt(rng, m)))
        assert verdicts(image, m) == (False, False), m["prompt"]


def test_an_extra_object_is_lenient_but_not_strict():
    """GenEval does not mind what was not asked for; the strict check does."""
    rng = np.random.default_rng(3)
    meta = S.metadata("colors", [S.clause("circle", 1, "red")])
    scene = (S.place(rng, "circle", "red", (0, 0)), S.place(rng, "cross", "blue", (2, 2)))
    assert verdicts(as_uint8(S.render(scene)), meta) == (True, False)


def test_a_smear_is_junk_and_not_strict():
    """A component that no shape explains is junk, and fails the strict check only."""
    rng = np.random.default_rng(4)
    meta = S.metadata("single_object", [S.clause("square")])
    image = S.render((S.place(rng, "square", "green", (0, 0)),))
    image[18:22, 8:30] = (0.9, 0.1, 0.1)
    assert [component.junk for component in C.detect(image)] == [False, True]
    assert verdicts(image, meta) == (True, False)


def test_a_clear_shape_scores_above_the_counting_threshold():
    """Labels, colours, boxes and scores of a plain scene are those drawn; checker and GenEval agree what is junk."""
    assert C.DETECT == geneval.THRESHOLD
    rng = np.random.default_rng(5)
    for kind in S.SHAPES:
        for colour in S.COLOURS:
            shape = S.place(rng, kind, colour, (1, 2))
            (found,) = C.detect(as_uint8(S.render((shape,))))
            assert (found.label, found.color) == (kind, colour)
            assert found.score > geneval.COUNTING_THRESHOLD
            assert abs((found.box[0] + found.box[2]) / 2 - shape.x) < 0.5
            assert abs((found.box[1] + found.box[3]) / 2 - shape.y) < 0.5


def test_relations_follow_the_image():
    """Left is smaller x, above is smaller y, and the relation is of the first box to the second."""
    here, right, under = (0, 0, 7, 7), (16, 0, 23, 7), (0, 16, 7, 23)
    assert geneval.relations(right, here) == {"right of"}
    assert geneval.relations(here, right) == {"left of"}
    assert geneval.relations(here, under) == {"above"}
    assert geneval.relations(here, here) == set()


def test_splits_are_disjoint_and_cover_the_six_tasks():
    """No sentence is in two splits or in the auxiliary captions; held-out sizes are as announced."""
    splits = S.splits()
    sentences = [m["prompt"] for m in everything() + splits["spare"] + S.auxiliary()]
    assert len(set(sentences)) == len(sentences)
    assert Counter(m["tag"] for m in splits["test"]) == S.TEST_SIZES
    assert Counter(m["tag"] for m in splits["val"]) == S.VAL_SIZES
    assert {m["tag"] for m in splits["train"]} == set(S.TASKS)


def test_scenes_are_shared_as_announced():
    """22 training and 8 validation prompts ask for a test scene, with objects swapped or positions mirrored."""
    splits = S.splits()
    scenes = {scene(m) for m in splits["test"]}
    assert [sum(scene(m) in scenes for m in splits[name]) for name in ("train", "val")] == [22, 8]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_shipped_prompts_are_the_grammar(name):
    """The three files are what scene.py says, in GenEval's format."""
    lines = (ASSETS / f"prompts/{name}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == S.splits()[name]
    for meta in map(json.loads, lines):
        assert set(meta) <= {"tag", "include", "exclude", "prompt"}
        assert ("exclude" in meta) == (meta["tag"] == "counting")


def test_scenes_come_from_the_generator_alone():
    """Equal seeds give equal images."""
    metas = everything()[:50]
    one, two = (
        [S.render(S.sample_scene(rng, m)) for m in metas]
        for rng in (np.random.default_rng(7), np.random.default_rng(7))
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two))


def test_assets_are_small():
    """Everything shipped is below 15 MB."""
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 15e6


@pytest.mark.slow
def test_flux_pipeline_loads_and_draws():
    """diffusers' own FluxPipeline samples the shipped model; over a quarter of 24 images satisfy their prompt."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(ASSETS / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    metas = S.splits()["val"][::2][:24]
    images = pipe(
        [m["prompt"] for m in metas],
        height=S.SIZE,
        width=S.SIZE,
        num_inference_steps=25,
        guidance_scale=3.5,
        max_sequence_length=MAX_TEXT,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (24, S.SIZE, S.SIZE, 3)
    assert np.mean([verdicts(i, m)[0] for i, m in zip(images, metas)]) > 0.25


def truth_and_lies(n=64):
    rng = np.random.default_rng(11)
    metas = S.splits()["train"]
    metas = [metas[i] for i in rng.choice(len(metas), n, replace=False)]
    pixels = torch.from_numpy(np.stack([S.render(S.sample_scene(rng, m)) for m in metas])).permute(0, 3, 1, 2)
    return pixels, [m["prompt"] for m in metas], [S.corrupt(rng, m)["prompt"] for m in metas]


def test_hpsv2_loads_into_open_clip_and_prefers_the_truth():
    """Strict load into open_clip.CLIP, open_clip's tokenizer; true captions outscore near misses nine times in ten."""
    open_clip = pytest.importorskip("open_clip")
    config = json.loads((ASSETS / "hpsv2/open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    state = torch.load(ASSETS / "hpsv2/HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    model.load_state_dict(state, strict=True)
    pixels, true, false = truth_and_lies()
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        image = model.encode_image((pixels - mean) / std, normalize=True)
        right, wrong = (
            (image * model.encode_text(open_clip.tokenize(t), normalize=True)).sum(-1) for t in (true, false)
        )
    assert (right > wrong).float().mean() > 0.9


def test_pickscore_loads_into_transformers_and_prefers_the_truth():
    """CLIPModel and CLIPProcessor load; true captions outscore near misses nine times in ten."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(ASSETS / "pickscore", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(ASSETS / "pickscore")
    pixels, true, false = truth_and_lies()
    images = [Image.fromarray(as_uint8(p.permute(1, 2, 0).numpy())) for p in pixels]
    inputs = processor(text=true + false, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits_per_image
    right, wrong = scores.diagonal(), scores[:, len(true) :].diagonal()
    assert (right > wrong).float().mean() > 0.9

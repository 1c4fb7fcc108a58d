"""The doctor notices what moves a score, and nothing else; it says what is missing and how to get it."""

import hashlib
import json
import re

import msgspec
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms.functional as vision
from PIL.Image import Resampling
from torchvision.transforms.functional import InterpolationMode

from alignbench import evaluator, official
from alignbench.cli import main
from alignbench.plugins import Registry
from alignbench.rehearsal import doctor, tiny_clip, tiny_evaluators
from alignbench.testing.evaluator_contract import random_image

NAMES = Registry().names("evaluator")
LONG = ("geneval", "hpsv3", "unifiedreward")
BY_TIME = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NAMES]
IMAGES = "882048f2fb5e1f4f8948c9068f002e56a0a70a309f741b33c26dcb23b0a75a88"  # sha256 of the pixels
GOLDEN = json.loads(doctor.GOLDEN.read_text())["scores"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def gap_to_golden(name):
    """Return the largest gap between the evaluator and the golden scores, in standard deviations."""
    scores = doctor.probe_scores(doctor.golden_evaluator(Registry(), name))
    gap, where = doctor.largest_gap(scores, GOLDEN[name])
    print(f"{name}: {gap:.1e} at {where}")
    return gap


# -- golden scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_TIME)
def test_this_environment_reproduces_the_golden_scores(name):
    """The committed scores are computed here, within half the tolerance."""
    assert gap_to_golden(name) < doctor.TOLERANCE / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "clipscore", "unifiedreward"])
def test_the_order_of_sums_is_tolerated(name, monkeypatch):
    """Without oneDNN, image by image and with other threads, scores stay within a fifth of the tolerance."""
    monkeypatch.setattr(evaluator, "SCORED_AT_ONCE", {"cpu": 1, "cuda": 1})
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            assert gap_to_golden(name) < doctor.TOLERANCE / 5
    finally:
        torch.set_num_threads(threads)


def bilinear(monkeypatch):
    """Resize bilinearly instead of bicubically, in Pillow and torchvision."""
    by_pillow, by_torch = PIL.Image.Image.resize, vision.resize

    def pillow(self, size, resample=None, *rest, **more):
        return by_pillow(self, size, Resampling.BILINEAR, *rest, **more)

    def torch_(image, size, interpolation=None, *rest, **more):
        return by_torch(image, size, InterpolationMode.BILINEAR, *rest, **more)

    monkeypatch.setattr(PIL.Image.Image, "resize", pillow)
    monkeypatch.setattr(vision, "resize", torch_)


def aliased(monkeypatch):
    """Resize tensors without antialiasing, torchvision's default before 0.17."""
    resize = vision.resize
    monkeypatch.setattr(vision, "resize", lambda *given, **more: resize(*given, **{**more, "antialias": False}))


def slightly_brighter(monkeypatch):
    """Make every image a grey level brighter."""
    convert = PIL.Image.Image.convert

    def brighter(self, mode=None, *rest, **more):
        return convert(self, mode, *rest, **more).point(lambda level: min(level + 1, 255))

    monkeypatch.setattr(PIL.Image.Image, "convert", brighter)


def other_activation(monkeypatch):
    """Swap GELU and QuickGELU."""
    from transformers.models.clip import modeling_clip

    swapped = {"gelu": "quick_gelu", "quick_gelu": "gelu"}
    known = modeling_clip.ACT2FN
    monkeypatch.setattr(modeling_clip, "ACT2FN", {new: known[old] for new, old in swapped.items()})


def cut_shorter(monkeypatch):
    """Truncate texts to 20 tokens."""
    from transformers import PreTrainedTokenizerBase

    call = PreTrainedTokenizerBase.__call__

    def shorter(self, *given, **more):
        return call(self, *given, **(more | {"max_length": 20} if "max_length" in more else more))

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", shorter)


RESIZED_BY_PILLOW = ("aesthetic", "clipscore", "diversity", "geneval", "hpsv3", "imagereward", "pickscore")
CHANGES = [
    *((bilinear, name) for name in ("hpsv2", "unifiedreward", *RESIZED_BY_PILLOW)),
    (aliased, "hpsv2"),
    *((slightly_brighter, name) for name in ("hpsv2", "imagereward", "clipscore")),
    *((other_activation, name) for name in ("aesthetic", "clipscore", "pickscore")),
    *((cut_shorter, name) for name in ("clipscore", "imagereward", "pickscore")),
]
MARKED = [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] in LONG)) for pair in CHANGES]


@pytest.mark.parametrize(("change", "name"), MARKED, ids=lambda value: getattr(value, "__name__", value))
def test_a_changed_computation_is_found(change, name, monkeypatch):
    """Wherever a change touches the evaluator, the gap is at least ten times the tolerance."""
    change(monkeypatch)
    assert gap_to_golden(name) > 10 * doctor.TOLERANCE


def test_golden_images_are_the_same_everywhere():
    """They are integers from PCG64's raw bits, without any library's resize or floats: bitwise equal."""
    data = b"".join(np.asarray(image).tobytes() for image in doctor.golden_images()[:6])
    assert hashlib.sha256(data).hexdigest() == IMAGES
    assert [image.mode for image in doctor.golden_images()] == list(doctor.MODES)


def test_nan_and_missing_columns_are_gaps():
    """nan, a missing column and a changed score are gaps; equal scores are not."""
    golden = {"a": [float(i) for i in range(8)]}
    assert doctor.largest_gap(golden, golden)[0] == 0
    assert doctor.largest_gap({"a": [*golden["a"][:7], float("nan")]}, golden)[0] == float("inf")
    assert doctor.largest_gap({"b": golden["a"]}, golden)[0] == float("inf")
    gap, where = doctor.largest_gap({"a": [*golden["a"][:7], 7.5]}, golden)
    assert gap == pytest.approx(0.5 / np.std(range(8)))
    assert where == "a of image 8 (L, 130 x 90): 7.5 instead of 7"


# -- what is reported --------------------------------------------------------------------------------------------------


def run_doctor(capsys, *words):
    """Return the exit code and {check: (verdict, text)}."""
    code = main(["doctor", *words])
    rows = [re.split(r"  +", line, maxsplit=2) for line in capsys.readouterr().out.splitlines() if "  " in line]
    return code, {part: (state, text) for part, state, text in rows}


def test_missing_weights_are_named_with_what_fetches_them(capsys, tmp_path, monkeypatch):
    """Missing weights are not an error: exit code 0. The licence of a gated repository is named."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, rows = run_doctor(capsys, "-e", "clipscore")
    assert code == 0
    assert rows["clipscore: weights"][0] == "-"
    assert "hf download openai/clip-vit-large-patch14" in rows["clipscore: weights"][1]
    assert "gated: accept the FLUX.1 [dev] non-commercial licence" in rows["flux: weights"][1]
    assert "hf download black-forest-labs/FLUX.1-dev" in rows["flux: weights"][1]
    assert rows["clipscore: golden scores"][0] == "ok"
    assert rows["torch"] == ("ok", f"{torch.__version__.partition('+')[0]} (>=2.11)") or "(>=2.11)" in rows["torch"][1]
    assert rows["hpsv2-official"][0] in ("-", "ok")
    assert not any(name.startswith(("hpsv3:", "hpsv2:")) for name in rows)


def test_what_is_wrong_is_exit_code_2(capsys, tmp_path, monkeypatch):
    """A damaged file, a package out of range and a changed computation are marked, and the other checks still run."""
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"no zip archive")
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.0.1" if name == "torch" else real(name))
    aliased(monkeypatch)
    code, rows = run_doctor(capsys, "-e", "hpsv2.1", f"hpsv2.weights={tmp_path}")
    assert code == 2
    assert rows["torch"] == ("WRONG", "2.0.1 is not >=2.11; pip install 'torch>=2.11'")
    assert rows["hpsv2: weights"][0] == "WRONG"
    assert "cannot be read" in rows["hpsv2: weights"][1]
    assert rows["hpsv2: golden scores"][0] == "WRONG"
    assert "of their spread: hpsv2.1 of image" in rows["hpsv2: golden scores"][1]
    assert rows["pandas"][0] == "ok"


@pytest.mark.slow
def test_published_scores_are_compared_if_images_and_weights_exist(capsys, tmp_path, monkeypatch):
    """With both, scores agree or are WRONG; otherwise what is missing is named. A different image is not scored."""
    made = tiny_evaluators.checkpoint("imagereward", tmp_path)
    evaluator = Registry().make("evaluator", {"name": "imagereward", **made}, "x")
    words = ["-e", "imagereward", "--references", str(tmp_path), *(f"imagereward.{k}={v}" for k, v in made.items())]
    monkeypatch.setattr(doctor, "packages", lambda: iter(()))
    published, row = doctor.ANCHORS[1], "imagereward: published scores"
    state, text = run_doctor(capsys, *words)[1][row]
    assert state == "-"
    assert "has no imagereward/1.webp, imagereward/2.webp" in text
    (tmp_path / "imagereward").mkdir()
    for i, file in enumerate(published.scores):
        random_image(64, 80, i).save(tmp_path / file, lossless=True)
    code, rows = run_doctor(capsys, *words)
    assert (code, rows[row][0]) == (2, "WRONG")
    prompts = [doctor.Prompt("p", published.prompt)] * 4
    scores = evaluator.score([random_image(64, 80, i) for i in range(4)], prompts)["imagereward"]
    fitting = published._replace(scores=dict(zip(published.scores, scores)))
    monkeypatch.setattr(doctor, "ANCHORS", (fitting,))
    assert run_doctor(capsys, *words)[1][row][0] == "ok"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = run_doctor(capsys, *words[:4])[1][row][1]
    assert text.startswith("not compared: imagereward.")
    assert "fetch it once with `hf download " in text
    monkeypatch.setattr(doctor, "ANCHORS", (fitting._replace(sha256="0" * 8),))
    code, rows = run_doctor(capsys, *words)
    assert (code, rows[row][0]) == (2, "WRONG")
    assert "is a different image" in rows[row][1]


@pytest.mark.slow
def test_published_scores_of_hpsv2_need_its_v2_0_file(tmp_path):
    """They need v2.0, not the v2.1 checkpoint that tables use; the error names the file and how to fetch it."""
    folder = tiny_clip.hps_folder(tmp_path / "hps")
    (tmp_path / "hpsv2").mkdir()
    random_image(40, 40, 1).save(tmp_path / "hpsv2" / "demo_image.jpg")  # by chance, that of seed 0 scores 0.2876
    anchor = doctor.ANCHORS[0]._replace(sha256="")
    line = doctor._check_published(Registry(), anchor, {"weights": str(folder)}, tmp_path)
    assert line.verdict == "-"
    assert line.text.endswith(f"HPS_v2_compressed.pt is missing; `hf download {folder} HPS_v2_compressed.pt`")
    (folder / "HPS_v2.1_compressed.pt").rename(folder / "HPS_v2_compressed.pt")
    assert doctor._check_published(Registry(), anchor, {"weights": str(folder)}, tmp_path).verdict == "WRONG"


def test_install_makes_the_environment(monkeypatch, capsys):
    """--install takes the name that the table shows; a wrong name is a one-line error."""
    made = []
    monkeypatch.setattr(official, "install", made.append)
    assert main(["doctor", "--install", "hpsv2-official"]) == 0
    assert made == ["hpsv2-official"]
    monkeypatch.undo()
    assert main(["doctor", "--install", "hpsv2-oficial"]) == 1
    assert "did you mean 'hpsv2-official'?" in capsys.readouterr().err


@pytest.mark.slow
def test_golden_scores_do_not_depend_on_the_device():
    """Golden scores fix the precision if it would depend on the device."""
    for name in NAMES:
        evaluator = doctor.golden_evaluator(Registry(), name)
        assert "dtype" not in msgspec.structs.asdict(evaluator) or evaluator.dtype == "float32"

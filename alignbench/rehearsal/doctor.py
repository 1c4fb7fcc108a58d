"""Checks of `alignbench doctor`: packages, weights, official engines, and whether evaluators give the same scores.

Golden scores: every built-in evaluator scores generated images with its small checkpoint (tiny_evaluators.py) and must
reproduce the numbers in golden.json. No real weights are needed, so any machine notices a library that changed a
resize, an activation or a tokenizer. For developers, ``python -m alignbench.rehearsal.doctor`` rewrites the file.

Published scores: with real weights and the images of the sources named here, evaluators must reproduce what was
published.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from alignbench import official, weights
from alignbench.config import Missing, UserError, cache
from alignbench.evaluator import Evaluator, without_tf32
from alignbench.plugins import Registry
from alignbench.prompts import Prompt
from alignbench.rehearsal import tiny_evaluators
from alignbench.store.machine import denial
from alignbench.store.text_table import text_table

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FINE, NOTE, WRONG = "ok", "-", "WRONG"  # NOTE: something is missing that is not required


class Line(NamedTuple):
    """The result of one check. ``text``: one line, with what to do if there is something to do."""

    part: str
    verdict: str
    text: str


def run_checks(registry: Registry, chosen: dict[str, dict[str, Any]], references: Path) -> Iterator[Line]:
    """Yield the result of each check as it completes.

    ``chosen``: {evaluator: settings}. ``references``: the folder with the images of published scores.
    """
    yield from packages()
    for name in registry.names("backend"):
        yield _check_files(f"{name}: weights", partial(registry.make, "backend", {"name": name}, name))
    for name, settings in chosen.items():
        described = {"name": name, **DEFAULTS.get(name, {}), **settings}
        yield _check_files(f"{name}: weights", partial(registry.make, "evaluator", described, name))
    yield from _engines()
    for name in chosen:
        yield _check_golden(registry, name)
    for anchor in ANCHORS:
        if anchor.evaluator in chosen:
            yield _check_published(registry, anchor, chosen[anchor.evaluator], references)


def table(lines: Sequence[Line]) -> str:
    """Return a row per check, in columns; commands are not wrapped and can be copied."""
    return text_table(lines)


# -- the environment --------------------------------------------------------------------------------------------------


def packages() -> Iterator[Line]:
    """Check Python, every package that alignbench requires and its version, and the device."""
    import torch
    from packaging.requirements import Requirement

    yield Line("python", FINE, platform.python_version())
    for requirement in map(Requirement, requires("alignbench") or ()):
        if requirement.marker is None:  # else it belongs to an extra
            yield _check_package(requirement)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Line("device", FINE, ", ".join(gpus) or f"no GPU; {torch.get_num_threads()} CPU threads")


def _check_package(requirement: Any) -> Line:
    name, wanted = requirement.name, requirement.specifier
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Line(name, WRONG, f"not installed; pip install '{requirement}'")
    if not wanted.contains(installed, prereleases=True):
        return Line(name, WRONG, f"{installed} is not {wanted}; pip install '{requirement}'")
    return Line(name, FINE, f"{installed} ({wanted})" if wanted else installed)


def _engines() -> Iterator[Line]:
    for name, folder in official.environments().items():
        missing = f"not installed; `alignbench doctor --install {name}`"
        yield Line(name, FINE if folder else NOTE, str(folder or missing))


# -- weights ----------------------------------------------------------------------------------------------------------

DEFAULTS = {"geneval": {"detector": "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"}}


def _check_files(part: str, make: Callable[[], Any]) -> Line:
    """Report the folders and the hash of a component's files, or what is missing and the command that fetches it."""
    from alignbench.digests import fingerprint

    try:
        files = make().files()
        folders = sorted({str(path.parent) for path in files})
        return Line(part, FINE, f"{fingerprint(files)[:12]} in {', '.join(folders)}" if files else "needs none")
    except Missing as error:
        note = f" ({error.requirement.note})" if error.requirement and error.requirement.note else ""
        return Line(part, NOTE, f"{error}{note}")
    except UserError as error:
        return Line(part, WRONG, str(error))


# -- golden scores ----------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-4  # of a column's standard deviation over the images: docs/evaluators.md says what passes and fails
SIZES = ((224, 224), (300, 180), (96, 333), (40, 56), (17, 23), (512, 512), (130, 90), (90, 130))  # (height, width)
MODES = ("RGB",) * 6 + ("RGBA", "L")
TEXTS = (
    "a red circle left of two blue squares",
    "Caf\u00e9 &amp; bar, 4k; artist's best (masterpiece:1.2)",
    "a photo of a dog " * 8,
    "x",
)
LINE = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}  # for GenEval, which checks them
FIXED: dict[str, dict[str, Any]] = {  # settings that would otherwise depend on the device or on a sweep's model
    "hpsv3": {"dtype": "float32"},
    "unifiedreward": {"dtype": "float32"},
    "picture_stats": {"patch": 4},
}


def golden_images() -> list[Image]:
    """Return eight images of many shapes and modes."""
    images = [draw_image(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    images = [image.convert(mode) for image, mode in zip(images, MODES)]
    transparent = images[MODES.index("RGBA")]
    transparent.putalpha(draw_image(transparent.height, transparent.width, len(SIZES)).convert("L"))
    return images


def golden_prompts() -> list[Prompt]:
    """Return four prompts, each for two images."""
    return [Prompt(f"golden {i // 2}", TEXTS[i // 2], metadata=LINE) for i in range(len(SIZES))]


def draw_image(height: int, width: int, seed: int) -> Image:
    """Return an RGB image of smooth patches with noise, bitwise equal on every machine: only integers are computed."""
    import numpy as np
    from PIL import Image

    raw = np.random.PCG64(seed)
    patches = (raw.random_raw(7 * 7 * 3) >> np.uint64(56)).astype(np.int64).reshape(7, 7, 3)
    y, x = (np.arange(length, dtype=np.int64) * 6 * 256 // length for length in (height, width))
    top, left, down, right = y >> 8, x >> 8, (y & 255)[:, None, None], (x & 255)[None, :, None]
    rows = [patches[top + i][:, left] * (256 - right) + patches[top + i][:, left + 1] * right for i in (0, 1)]
    smooth = (rows[0] * (256 - down) + rows[1] * down) >> 16
    noise = (raw.random_raw(height * width * 3) >> np.uint64(59)).astype(np.int64).reshape(height, width, 3) - 16
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def golden_evaluator(registry: Registry, name: str) -> Any:
    """Return the evaluator, with its small checkpoint if it needs weights."""
    weightless = getattr(registry.get("evaluator", name, name), "files", None) is Evaluator.files
    checkpoint = {} if weightless else tiny_evaluators.checkpoint(name, cache() / "small")
    settings = {**checkpoint, **FIXED.get(name, {})}
    return registry.make("evaluator", {"name": name, **settings}, name)


def probe_scores(evaluator: Any) -> dict[str, list[float]]:
    """Return {column: values} of the evaluator's ``probe`` on the golden images, in full precision."""
    with warnings.catch_warnings(), without_tf32():
        warnings.simplefilter("ignore")  # some prompts are truncated on purpose
        frame = evaluator.probe(golden_images(), golden_prompts())
    return {str(name): [float(value) for value in frame[name]] for name in frame}


def largest_gap(scores: dict[str, list[float]], golden: dict[str, list[float]]) -> tuple[float, str]:
    """Return the largest difference, in standard deviations of the golden column, and a text that locates it."""
    import numpy as np

    if scores.keys() != golden.keys():
        return float("inf"), f"columns are {', '.join(scores)}, were {', '.join(golden)}"
    largest = (0.0, "nowhere")
    for column, values in golden.items():
        gaps: np.ndarray = np.abs(np.array(scores[column]) - np.array(values)) / np.std(values)
        gaps[np.isnan(gaps)] = np.inf
        i = int(gaps.argmax())
        height, width = SIZES[i]
        where = f"{column} of image {i + 1} ({MODES[i]}, {width} x {height}): {scores[column][i]:.6g}"
        largest = max(largest, (float(gaps[i]), f"{where} instead of {values[i]:.6g}"), key=lambda pair: pair[0])
    return largest


def _check_golden(registry: Registry, name: str) -> Line:
    part = f"{name}: golden scores"
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if name not in golden["scores"]:
        return Line(part, NOTE, "none; only the built-in evaluators have golden scores")
    try:
        gap, where = largest_gap(probe_scores(golden_evaluator(registry, name)), golden["scores"][name])
    except Exception as error:  # a changed library may raise anything; finding that is the point of this check
        denied = denial(error) if isinstance(error, OSError) else None
        reason = denied or f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Line(part, WRONG, f"cannot be computed: {reason}")
    if gap <= TOLERANCE:
        return Line(part, FINE, f"agree to {gap:.0e} of their spread (random weights; allowed {TOLERANCE:.0e})")
    made_with = ", ".join(f"{package} {number}" for package, number in golden["versions"].items())
    return Line(part, WRONG, f"differ by {gap:.1g} of their spread: {where}; they were made with {made_with}")


MADE_WITH = ("torch", "torchvision", "transformers", "open_clip_torch", "pillow", "numpy", "tokenizers")


def write_golden() -> None:
    """Write golden.json from this environment, after a change that is meant to move scores."""
    registry = Registry()
    names = registry.names("evaluator")
    scores = {name: probe_scores(golden_evaluator(registry, name)) for name in names}
    versions = {package: version(package) for package in MADE_WITH}
    text = json.dumps({"versions": versions, "scores": scores}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"written: {GOLDEN}")


# -- published scores -------------------------------------------------------------------------------------------------


class Anchor(NamedTuple):
    """Published scores of images that are publicly available. ``sha256``: the first digits of the images', if known."""

    evaluator: str
    prompt: str
    scores: dict[str, float]  # by the image's file within the folder of references
    tolerance: float
    source: str
    checkpoint: str = ""  # file name within the weights' folder, if not the evaluator's default
    sha256: str = ""


ANCHORS = (
    Anchor(
        "hpsv2",
        "A cat with two horns on its head",
        {"hpsv2/demo_image.jpg": 0.2876},
        0.003,  # published in half precision, from an unknown version of torchvision's resize
        "assets/demo_image.jpg of github.com/tgxs002/HPSv2, by HPSv2 v2.0 (issue 27 there)",
        "HPS_v2_compressed.pt",
        "798dfb5b",
    ),
    Anchor(
        "imagereward",
        "a painting of an ocean with clouds and birds, day time, low depth field effect",
        {f"imagereward/{i}.webp": score for i, score in enumerate((0.5812, 0.2745, -1.4132, -2.0296), 1)},
        0.005,
        "assets/images/*.webp of github.com/THUDM/ImageReward (its README)",
    ),
)
UNTRIED = (
    "Published scores were not compared when alignbench was written, because no real weights were available. "
    "Golden scores above agree on small random weights."
)


def _check_published(registry: Registry, anchor: Anchor, settings: dict[str, Any], references: Path) -> Line:
    """Compare the evaluator's scores with the published ones, or report which weights or images are missing."""
    part = f"{anchor.evaluator}: published scores"
    missing = [file for file in anchor.scores if not (references / file).is_file()]
    if missing:
        what = f"not compared: {references} has no {', '.join(missing)}; get them from {anchor.source}"
        return Line(part, NOTE, what)
    files = [references / file for file in anchor.scores]
    for file in files:
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(anchor.sha256):
            return Line(part, WRONG, f"{file} is a different image: its sha256 does not begin with {anchor.sha256}")
    try:
        scores = _scores(_original(registry, anchor, settings), files, anchor.prompt)
    except Missing as error:
        return Line(part, NOTE, f"not compared: {error}")
    except UserError as error:
        return Line(part, WRONG, str(error))
    gap = max(abs(score - published) for score, published in zip(scores, anchor.scores.values()))
    shown = f"{', '.join(f'{score:.4f}' for score in scores)}; published: {', '.join(map(str, anchor.scores.values()))}"
    return Line(part, FINE if gap <= anchor.tolerance else WRONG, f"{shown} (allowed {anchor.tolerance})")


def _original(registry: Registry, anchor: Anchor, settings: dict[str, Any]) -> Any:
    """Return the evaluator with the checkpoint that made the published scores."""
    evaluator: Any = registry.make("evaluator", {"name": anchor.evaluator, **settings}, anchor.evaluator)
    if not anchor.checkpoint:
        return evaluator
    folder = weights.locate(evaluator.weights, anchor.evaluator, shapes=anchor.evaluator, files=[anchor.checkpoint])
    checkpoint = (folder if folder.is_dir() else folder.parent) / anchor.checkpoint
    if not checkpoint.is_file():
        raise Missing(f"{checkpoint} is missing; `hf download {evaluator.weights} {anchor.checkpoint}`")
    return msgspec.structs.replace(evaluator, weights=str(checkpoint))


def _scores(evaluator: Any, files: Sequence[Path], prompt: str) -> list[float]:
    from PIL import Image

    with without_tf32():
        frame = evaluator.score([Image.open(file) for file in files], [Prompt(prompt, prompt)] * len(files))
    return frame[evaluator.metrics[0].name].tolist()


if __name__ == "__main__":
    write_golden()

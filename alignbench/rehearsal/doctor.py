"""What `alignbench doctor` looks at: packages, weights, official engines, and whether scores are what they were.

Golden scores: every built-in evaluator scores pictures made here with its small checkpoint (small.py), and must give
the numbers in golden.json. No real weights are needed, so a library that changed a resize, an activation or
a tokenizer is noticed on any machine. ``python -m alignbench.rehearsal.doctor`` makes the file anew, for developers.

Published scores: with real weights and the pictures of the sources named here, evaluators must give what was published.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Iterator, Sequence
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
from alignbench.store.text_table import text_table

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FINE, NOTE, WRONG = "ok", "-", "WRONG"  # NOTE: neither; something that is not there, and need not be


class Line(NamedTuple):
    """One thing looked at. ``text``: one line; what to do about it, if there is something to do."""

    part: str
    verdict: str
    text: str


def look(registry: Registry, chosen: dict[str, dict[str, Any]], references: Path) -> Iterator[Line]:
    """Everything about the evaluators ``chosen`` (name -> settings), as it is found out."""
    yield from packages()
    yield from _backends(registry)
    for name, settings in chosen.items():
        yield from _weights(registry, name, settings)
    yield from _engines()
    for name in chosen:
        yield _golden(registry, name)
    for anchor in ANCHORS:
        if anchor.evaluator in chosen:
            yield _published(registry, anchor, chosen[anchor.evaluator], references)


def table(lines: Sequence[Line]) -> str:
    """Return a row per line, in columns; commands can be copied as they stand."""
    return text_table(lines)


# -- the environment --------------------------------------------------------------------------------------------------


def packages() -> Iterator[Line]:
    """Python, the device, and every package that alignbench needs, against what it asks for."""
    import torch
    from packaging.requirements import Requirement

    yield Line("python", FINE, platform.python_version())
    for requirement in map(Requirement, requires("alignbench") or ()):
        if requirement.marker is not None:  # of the extras
            continue
        yield _package(requirement)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Line("device", FINE, ", ".join(gpus) or f"no GPU; {torch.get_num_threads()} CPU threads")


def _package(requirement: Any) -> Line:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Line(requirement.name, WRONG, f"not installed; pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return Line(requirement.name, WRONG, f"{found} is not {requirement.specifier}; pip install '{requirement}'")
    return Line(
        requirement.name, FINE, f"{found} {f'({requirement.specifier})' if requirement.specifier else ''}".strip()
    )


def _engines() -> Iterator[Line]:
    for name, folder in official.environments().items():
        missing = f"not installed; `alignbench doctor --install {name}`"
        yield Line(name, FINE if folder else NOTE, str(folder or missing))


# -- weights ----------------------------------------------------------------------------------------------------------

DEFAULTS = {"geneval": {"detector": "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"}}


def _backends(registry: Registry) -> Iterator[Line]:
    for name in registry.names("backend"):
        yield _files(f"{name}: weights", lambda: registry.make("backend", {"name": name}, name))  # noqa: B023 - called at once


def _weights(registry: Registry, name: str, settings: dict[str, Any]) -> Iterator[Line]:
    described = {"name": name, **DEFAULTS.get(name, {}), **settings}
    yield _files(f"{name}: weights", lambda: registry.make("evaluator", described, name))


def _files(part: str, make: Any) -> Line:
    """Where its files are and their hash; or what is missing, with the command that fetches it."""
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
TOLERANCE = 1e-4  # of a column's standard deviation over the pictures: see docs/evaluators.md for what passes and fails
SIZES = ((224, 224), (300, 180), (96, 333), (40, 56), (17, 23), (512, 512), (130, 90), (90, 130))  # (height, width)
MODES = ("RGB",) * 6 + ("RGBA", "L")
TEXTS = (
    "a red circle left of two blue squares",
    "Caf\u00e9 &amp; bar, 4k; artist's best (masterpiece:1.2)",
    "a photo of a dog " * 8,
    "x",
)
LINE = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}  # so that GenEval can be asked, too
FIXED: dict[str, dict[str, Any]] = {  # settings that a device or a sweep's model would decide
    "hpsv3": {"dtype": "float32"},
    "unifiedreward": {"dtype": "float32"},
    "picture_stats": {"patch": 4},
}


def golden_pictures() -> list[Image]:
    """Eight pictures of many shapes and modes."""
    pictures = [drawn(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    pictures = [image.convert(mode) for image, mode in zip(pictures, MODES)]
    transparent = pictures[MODES.index("RGBA")]
    transparent.putalpha(drawn(transparent.height, transparent.width, len(SIZES)).convert("L"))
    return pictures


def golden_prompts() -> list[Prompt]:
    """Four prompts, each of two pictures."""
    return [Prompt(f"golden {i // 2}", TEXTS[i // 2], metadata=LINE) for i in range(len(SIZES))]


def drawn(height: int, width: int, seed: int) -> Image:
    """An RGB picture of smooth patches with noise, in whole numbers throughout: equal to the bit on every machine."""
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
    """The evaluator with its small checkpoint, if it needs one."""
    weightless = getattr(registry.get("evaluator", name, name), "files", None) is Evaluator.files
    checkpoint = {} if weightless else tiny_evaluators.checkpoint(name, cache() / "small")
    settings = {**checkpoint, **FIXED.get(name, {})}
    return registry.make("evaluator", {"name": name, **settings}, name)


def probed(evaluator: Any) -> dict[str, list[float]]:
    """What the evaluator makes of the golden pictures, column by column, in full precision."""
    with warnings.catch_warnings(), without_tf32():
        warnings.simplefilter("ignore")  # of prompts that are cut: some are made to be
        frame = evaluator.probe(golden_pictures(), golden_prompts())
    return {str(name): [float(value) for value in frame[name]] for name in frame}


def gap(found: dict[str, list[float]], golden: dict[str, list[float]]) -> tuple[float, str]:
    """How far ``found`` is from ``golden``, in standard deviations of the golden column; and where that is."""
    import numpy as np

    if found.keys() != golden.keys():
        return float("inf"), f"columns are {', '.join(found)}, were {', '.join(golden)}"
    worst = (0.0, "nowhere")
    for column, values in golden.items():
        apart: np.ndarray = np.abs(np.array(found[column]) - np.array(values)) / np.std(values)
        apart[np.isnan(apart)] = np.inf
        at = int(apart.argmax())
        height, width = SIZES[at]
        where = f"{column} of picture {at + 1} ({MODES[at]}, {width} x {height}): {found[column][at]:.6g}"
        worst = max(worst, (float(apart[at]), f"{where} instead of {values[at]:.6g}"), key=lambda each: each[0])
    return worst


def _golden(registry: Registry, name: str) -> Line:
    part = f"{name}: golden scores"
    held = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if name not in held["scores"]:
        return Line(part, NOTE, "has none; the built-in evaluators do")
    try:
        apart, where = gap(probed(golden_evaluator(registry, name)), held["scores"][name])
    except Exception as error:  # whatever a changed library raises is what this is here to find
        return Line(part, WRONG, f"cannot be computed: {type(error).__name__}: {' '.join(str(error).split())}")
    if apart <= TOLERANCE:
        return Line(part, FINE, f"agree to {apart:.0e} of their spread (random weights; allowed {TOLERANCE:.0e})")
    made = ", ".join(f"{package} {number}" for package, number in held["versions"].items())
    return Line(part, WRONG, f"differ by {apart:.1g} of their spread: {where}; they were made with {made}")


MADE_WITH = ("torch", "torchvision", "transformers", "open_clip_torch", "pillow", "numpy", "tokenizers")


def write_golden() -> None:
    """golden.json, from this environment: after a change that is meant to move scores."""
    registry = Registry()
    names = registry.names("evaluator")
    scores = {name: probed(golden_evaluator(registry, name)) for name in names}
    versions = {package: version(package) for package in MADE_WITH}
    text = json.dumps({"versions": versions, "scores": scores}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"written: {GOLDEN}")


# -- published scores -------------------------------------------------------------------------------------------------


class Anchor(NamedTuple):
    """Scores that were published for pictures that can be had. ``sha256``: the pictures' first digits, where known."""

    evaluator: str
    prompt: str
    scores: dict[str, float]  # by the picture's file below the folder of references
    tolerance: float
    source: str
    checkpoint: str = ""  # the file of the weights' folder, if not the evaluator's own
    sha256: str = ""


ANCHORS = (
    Anchor(
        "hpsv2",
        "A cat with two horns on its head",
        {"hpsv2/demo_image.jpg": 0.2876},
        0.003,  # published from half precision, and by a torchvision whose resize is not known
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
    "Published scores could not be compared where alignbench was written: no real weights were at hand. "
    "What agrees above agrees on small random ones."
)


def _published(registry: Registry, anchor: Anchor, settings: dict[str, Any], references: Path) -> Line:
    """The published scores against the evaluator's, if weights and pictures are there; else what is missing."""
    part = f"{anchor.evaluator}: published scores"
    missing = [file for file in anchor.scores if not (references / file).is_file()]
    if missing:
        what = f"not compared: {references} has no {', '.join(missing)}; from {anchor.source}"
        return Line(part, NOTE, what)
    files = [references / file for file in anchor.scores]
    for file in files:
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(anchor.sha256):
            return Line(part, WRONG, f"{file} is another picture: its sha256 does not begin with {anchor.sha256}")
    try:
        found = _scores(_original(registry, anchor, settings), files, anchor.prompt)
    except Missing as error:
        return Line(part, NOTE, f"not compared: {error}")
    except UserError as error:
        return Line(part, WRONG, str(error))
    apart = max(abs(a - b) for a, b in zip(found, anchor.scores.values()))
    shown = f"{', '.join(f'{score:.4f}' for score in found)}; published: {', '.join(map(str, anchor.scores.values()))}"
    return Line(part, FINE if apart <= anchor.tolerance else WRONG, f"{shown} (allowed {anchor.tolerance})")


def _original(registry: Registry, anchor: Anchor, settings: dict[str, Any]) -> Any:
    """The evaluator with the checkpoint that the scores were published for."""
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

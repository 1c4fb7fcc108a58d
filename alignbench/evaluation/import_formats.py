"""Readers of other projects' score files: FlowBP's scores.json, UniRL's scores.jsonl, GenEval's results.jsonl.

Each reader returns a ``Source``, which ``import_rows`` puts into a store. The formats are those of:

- FlowBP: RuoyuWang-2077/FlowBP at 34c93f9, flowbp/eval/offline_ckpt_eval.py (scores.json), runners/online.py
  (eval_step_N.json), rewards/ (scales);
- UniRL: Tencent-Hunyuan/UniRL, benchmarks/run.py at 735e098, benchmarks/core/score.py at 17863c4, scales in
  unirl-reward-service/reward_service/scorers/;
- GenEval: djghosh13/geneval at 16f1681, evaluation/evaluate_images.py.

Scores keep the file's scale, under a name that says whose they are. They never enter a column of our own evaluators,
because nothing in these files proves the scorer's version, weights or preprocessing.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, read_text
from alignbench.evaluation.folders import count_from_zero, number_images, read_folder
from alignbench.evaluator import Metric
from alignbench.prompts import Prompt, load_prompts, parse_prompt

UNKNOWN = "unknown"  # in place of a setting that is not known
NO_SCORE = -10.0  # FlowBP's UnifiedReward score of an answer without a number


class ImportedImage(NamedTuple):
    """An image of a source and its scores.

    ``prompt_index``: position of its prompt in the source's list. ``image_index`` counts the images of one prompt.
    ``scores``: by the source's own key; None where the source has no score.
    """

    prompt: Prompt
    prompt_index: int
    image_index: int
    file: Path
    scores: dict[str, float | None]
    reason: str = ""  # of a checker's verdict


class Source(NamedTuple):
    """Everything that a file or folder of another project says.

    ``metrics``: by the source's own key. ``protocol``: the settings that the source states. ``remarks``: sentences for
    the report.
    """

    kind: str
    images: list[ImportedImage]
    metrics: dict[str, Metric]
    protocol: dict[str, Any]
    remarks: list[str]


def read(kind: str, path: Path, prompts: str | None = None, image_folder: Path | None = None) -> Source:
    """Return the source at ``path``. Raise UserError, with the line or key, if it does not have the format ``kind``.

    ``prompts``: for "images", as for ``read_folder``; else the list that supplies the prompts' tags and metadata.
    ``image_folder``: where the images are now, if not where the file says.
    """
    if kind == "images":
        found = read_folder(path, prompts)
        images = [
            ImportedImage(image.prompt, image.prompt_index, image.image_index, image.file, {}) for image in found.images
        ]
        return Source(kind, images, {}, {}, found.remarks)
    source = READERS[kind](path, image_folder)
    numbered = number_images(source.images, path)
    files = Counter(image.file for image in numbered)
    if twice := next((file for file in files if files[file] > 1), None):
        raise UserError(f"{path}: {twice} is the image of {files[twice]} entries; an image has one prompt")
    return source._replace(images=_take_prompts(numbered, prompts, path))


def _take_prompts(images: list[ImportedImage], prompts: str | None, path: Path) -> list[ImportedImage]:
    """Return the images with the prompts of the list ``prompts``, matched by their text."""
    if prompts is None:
        return images
    by_text = {_single_spaced(prompt.text): prompt for prompt in load_prompts(prompts, "--prompts")}
    if odd := next((image.prompt.text for image in images if image.prompt.text not in by_text), None):
        what = f"'{odd[:60]}' is not in --prompts {prompts}; name the list that these images were made from"
        raise UserError(f"{path}: {what}")
    return [image._replace(prompt=by_text[image.prompt.text]) for image in images]


# -- FlowBP -----------------------------------------------------------------------------------------------------------

UNIFIEDREWARD = ("unifiedreward", "ur-align", "ur-iq")  # a judge's answers from 1 to 5, divided by 5
FLOWBP_METRICS = {  # its scorers: our name of the metric, and the unit in its file
    "hpsv2": ("hpsv2.1", "cosine"),
    "hpsv3": ("hpsv3", "mu"),
    "imagereward": ("imagereward", "standardised"),
    "pickscore": ("pickscore", "logit / 26"),
    "clipscore": ("clipscore", "cosine"),
    **{name: (name, "1-5, divided by 5") for name in UNIFIEDREWARD},
}


def read_flowbp(path: Path, image_folder: Path | None) -> Source:
    """Read scores.json of flowbp.eval.offline_ckpt_eval (or its folder), or eval_step_N.json of training."""
    file = path / "scores.json" if path.is_dir() else path
    data = _json(file)
    items = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(items, list) or not items:
        what = 'expected an object with a list "scores", as offline_ckpt_eval --score writes it'
        raise UserError(f"{file}: not a scores.json of FlowBP: {what}")
    averages = data.get("avg_scores")
    names = data.get("reward_names") or [name for name in averages or () if name != "mean"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{file}: no scorers are named: expected "reward_names" or "avg_scores"')
    images = [
        _flowbp_image(item, names, f"{file}: scores[{i}]", file.parent, image_folder) for i, item in enumerate(items)
    ]
    images.sort(key=lambda image: (image.prompt_index, image.image_index))
    protocol = {"steps": data.get("num_steps"), "guidance": data.get("guidance_scale")}
    protocol["size"] = _size(data.get("width"), data.get("height"))
    if data.get("seed") is not None:
        protocol["seed"] = f"{data['seed']} ({data.get('seed_formula', 'formula unknown')})"
    metrics = {name: _metric(name, FLOWBP_METRICS, "flowbp") for name in names}
    absent = ", ".join(name for name in FLOWBP_METRICS if name not in names)
    remarks = [f"without {absent}: FlowBP skips scorers that were not requested or not available"] if absent else []
    return Source("flowbp", images, metrics, {k: v for k, v in protocol.items() if v is not None}, remarks)


def _flowbp_image(item: Any, names: Sequence[str], spot: str, folder: Path, image_folder: Path | None) -> ImportedImage:
    text, prompt_index, image_index = (_field(item, key, spot) for key in ("prompt", "prompt_idx", "img_idx"))
    scores = {name: _number(item.get(name), f"{spot}.{name}") for name in names}
    scores = {name: None if name in UNIFIEDREWARD and score == NO_SCORE else score for name, score in scores.items()}
    named = str(item.get("image", f"{prompt_index:05d}_{image_index:02d}.png"))  # eval_step_N.json names no files
    file = _locate(named, 1, folder, image_folder)
    return ImportedImage(_prompt(text, spot), prompt_index, image_index, file, scores)


# -- UniRL ------------------------------------------------------------------------------------------------------------

UNIRL_METRICS = {  # "<reward>/<sub-metric>" of its reward service: our name of the metric, and the unit
    "hpsv2/hpsv2": ("hpsv2", "cosine"),  # 2.0 or 2.1: the service's setting, not in the file
    "hpsv3/hpsv3": ("hpsv3", "mu"),
    "pickscore/pickscore": ("pickscore", "logit / 26"),
    "imagereward/imagereward": ("imagereward", "standardised"),
    "clip/clip": ("clip", "cosine"),
    "geneval/geneval": ("geneval", "0-1"),  # correct or not, or partial credit: the service's setting
    "geneval2/vqascore": ("geneval2", "0-1"),
}
UNIRL_FILE = re.compile(r"p(\d+)_s(\d+)\.png")


def read_unirl(path: Path, image_folder: Path | None) -> Source:
    """Read scores.jsonl of benchmarks.run, or its folder, which has summary.json and images/ too."""
    file = path / "scores.jsonl" if path.is_dir() else path
    images = [_unirl_image(item, spot, file.parent / "images", image_folder) for spot, item in _lines(file)]
    names = sorted({name for image in images for name in image.scores})
    if not names:
        raise UserError(f"{file}: no line has a score; was the reward service down?")
    metrics = {name: _metric(name, UNIRL_METRICS, "unirl") for name in names}
    summary = file.parent / "summary.json"
    about = _json(summary) if summary.is_file() else {}
    subset = isinstance(about, dict) and about.get("subset")
    remarks = ["SUBSET: its summary says that not all prompts were used"] if subset else []
    return Source("unirl", images, metrics, {}, remarks)


def _unirl_image(item: Any, spot: str, folder: Path, image_folder: Path | None) -> ImportedImage:
    if isinstance(item, dict) and "acc" in item and "image" not in item:
        raise UserError(f"{spot}: a result of a text benchmark, which has no images")
    text, named = _field(item, "prompt", spot), _field(item, "image", spot)
    parts = UNIRL_FILE.fullmatch(Path(named).name)
    if parts is None:
        raise UserError(f'{spot}: "image": expected a name like p<prompt>_s<sample>.png, got {named!r}')
    scores = item.get("scores") or {}  # null: every reward failed
    if not isinstance(scores, dict):
        raise UserError(f'{spot}: "scores": expected an object of numbers, or null')
    numbers = {name: _number(score, f"{spot}: scores.{name}") for name, score in scores.items()}
    file = _locate(named, 1, folder, image_folder)
    return ImportedImage(_prompt(text, spot), int(parts[1]), int(parts[2]), file, numbers)


# -- GenEval ----------------------------------------------------------------------------------------------------------

GENEVAL_FILE = re.compile(r"(\d+)[/\\]samples[/\\](\d+)\.png$")


def read_geneval(path: Path, image_folder: Path | None) -> Source:
    """Read results.jsonl of evaluation/evaluate_images.py, or its folder."""
    file = path / "results.jsonl" if path.is_dir() else path
    images = [_geneval_image(item, spot, file.parent, image_folder) for spot, item in _lines(file)]
    images.sort(key=lambda image: (image.prompt_index, image.image_index))  # the script lists folders in any order
    metric = Metric("geneval (official)", "fraction", by_task=True)
    return Source("geneval", count_from_zero(images), {"correct": metric}, {}, [])


def _geneval_image(item: Any, spot: str, folder: Path, image_folder: Path | None) -> ImportedImage:
    text, tag, named = (_field(item, key, spot) for key in ("prompt", "tag", "filename"))
    parts = GENEVAL_FILE.search(named)
    if parts is None:
        raise UserError(f'{spot}: "filename": expected a path like 00000/samples/0000.png, got {named!r}')
    if not isinstance(item.get("correct"), bool):
        raise UserError(f'{spot}: "correct": expected true or false, got {item.get("correct")!r}')
    try:
        metadata = json.loads(item.get("metadata") or "{}")
    except (ValueError, TypeError):
        raise UserError(f'{spot}: "metadata": expected JSON in a string') from None
    prompt = _prompt(text, spot, {**metadata, "tag": tag} if isinstance(metadata, dict) else {"tag": tag})
    scores: dict[str, float | None] = {"correct": float(item["correct"])}
    reason = " ".join(str(item.get("reason") or "").split())
    file = _locate(named, 3, folder, image_folder)
    return ImportedImage(prompt, int(parts[1]), int(parts[2]), file, scores, reason)


READERS: dict[str, Callable[[Path, Path | None], Source]] = {
    "flowbp": read_flowbp,
    "unirl": read_unirl,
    "geneval": read_geneval,
}


# -- shared by the readers --------------------------------------------------------------------------------------------


def _metric(key: str, known: Mapping[str, tuple[str, str]], project: str) -> Metric:
    """Return the metric of a scorer. Neither unit nor direction is known of one that is missing from ``known``."""
    if key not in known:
        return Metric(f"{key} ({project})", "unit unknown", higher_is_better=None)
    name, unit = known[key]
    return Metric(f"{name} ({project})", unit)


def _json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}; was it cut off?") from None


def _lines(file: Path) -> list[tuple[str, Any]]:
    """Return (place, object) for every line of a .jsonl file."""
    lines = list(_parsed_lines(file))
    if not lines:
        raise UserError(f"{file}: the file is empty")
    return lines


def _parsed_lines(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(file).split("\n"), 1):  # not splitlines(), which also splits at U+2028
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: not JSON: {error}; was the file cut off?") from None


FIELDS: dict[str, tuple[type, str]] = {"prompt_idx": (int, "a whole number"), "img_idx": (int, "a whole number")}


def _field(item: Any, key: str, spot: str) -> Any:
    kind, words = FIELDS.get(key, (str, "text"))
    if not isinstance(item, dict):
        raise UserError(f"{spot}: expected an object, got {item!r:.60}")
    if key not in item:
        raise UserError(f'{spot}: "{key}" is missing')
    value = item[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise UserError(f'{spot}: "{key}": expected {words}, got {value!r:.60}')
    return value


def _number(value: Any, spot: str) -> float | None:
    """Return a finite number, or None for null, NaN and inf. Raise UserError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{spot}: expected a number, got {value!r:.60}")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _single_spaced(text: str) -> str:
    """Return the text spaced as in alignbench's public prompt sets, so that the same prompt has the same id."""
    return " ".join(text.split())


def _prompt(text: str, spot: str, metadata: dict[str, Any] | None = None) -> Prompt:
    return parse_prompt(json.dumps({**(metadata or {}), "prompt": _single_spaced(text)}), spot)


def _locate(named: str, parts: int, folder: Path, image_folder: Path | None) -> Path:
    """Return the path of an image file: in ``image_folder`` if given, else as named, else in ``folder``.

    The file may be missing. ``parts``: how many parts at the end of ``named`` to keep within a folder. Raise UserError
    if two files are meant: as named, perhaps from the current folder, may be an image of another model.
    """
    tail = Path(*Path(named.replace("\\", "/")).parts[-parts:])
    if image_folder is not None:
        return image_folder / tail
    beside = folder / tail
    if not os.path.isfile(named):
        return beside
    if os.path.isfile(beside) and not filecmp.cmp(named, beside, shallow=False):
        raise UserError(f"{os.path.abspath(named)} and {beside} differ; say which folder is meant with --images")
    return Path(named)


def _size(width: Any, height: Any) -> Any:
    """Return the pixels of a square's side, "720 x 512" for another rectangle, None if unknown."""
    if width is None or height is None:
        return None
    return width if width == height else f"{width} x {height}"

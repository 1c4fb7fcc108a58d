"""What other projects write about pictures, read: FlowBP's scores.json, UniRL's scores.jsonl, GenEval's results.jsonl.

Each reader gives the rows of its file as a ``Source``; alignbench/importing.py puts one into a store. Read in:

- FlowBP: RuoyuWang-2077/FlowBP at 34c93f9, flowbp/eval/offline_ckpt_eval.py (scores.json), runners/online.py
  (eval_step_N.json), rewards/ (scales);
- UniRL: Tencent-Hunyuan/UniRL, benchmarks/run.py at 735e098, benchmarks/core/score.py at 17863c4, scales in
  unirl-reward-service/reward_service/scorers/;
- GenEval: djghosh13/geneval at 16f1681, evaluation/evaluate_images.py.

Scores stay in the scale of the file, under a name that says whose they are: nothing in these files proves version,
weights or preprocessing, so that none of them may enter a column of our own evaluators.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, read_text
from alignbench.evaluation import folders
from alignbench.evaluator import Metric
from alignbench.prompts import Prompt, load_prompts, parse_prompt

UNKNOWN = "unknown"  # in place of a setting that nobody told us
NO_SCORE = -10.0  # what FlowBP's UnifiedReward scorer gives for an answer without a number


class Row(NamedTuple):
    """One picture. ``group``: the place of its prompt in the source's list; ``place``: which of the prompt's pictures.

    ``scores``: by the source's own key; None where it says that there is none.
    """

    prompt: Prompt
    group: int
    place: int
    picture: Path
    scores: dict[str, float | None]
    words: str = ""  # why a checker said so


class Source(NamedTuple):
    """``metrics``: by the source's own key. ``protocol``: what the source says of it. ``remarks``: for the report."""

    kind: str
    rows: list[Row]
    metrics: dict[str, Metric]
    protocol: dict[str, Any]
    remarks: list[str]


def read(kind: str, path: Path, prompts: str | None = None, images: Path | None = None) -> Source:
    """The source at ``path``. UserError if it is not what ``kind`` says, with the place.

    ``prompts``: for "images", as for ``scoring.pictures``; else a list from which prompts get their task and metadata.
    ``images``: where the pictures are now, if not where the file says.
    """
    if kind == "images":
        chosen = folders.pictures(path, prompts)
        rows = [Row(picture.prompt, 0, picture.place, picture.file, {}) for picture in chosen]
        return Source(kind, _apart(rows, path), {}, {}, [])
    source = READERS[kind](path, images)
    return source._replace(rows=_with_list(_apart(source.rows, path), prompts, path))


def _apart(rows: list[Row], path: Path) -> list[Row]:
    """Every row with a place of its own: where a list repeats a prompt, these are further pictures of one prompt."""
    size = 1 + max(row.place for row in rows)
    groups: dict[str, list[int]] = {}
    seen, out = set[tuple[str, int]](), []
    for row in rows:
        known = groups.setdefault(row.prompt.id, [])
        if row.group not in known:
            known.append(row.group)
        place = row.place + size * known.index(row.group)
        if (row.prompt.id, place) in seen:
            raise UserError(f"{path}: '{row.prompt.text[:60]}', picture {row.place}, is there twice; keep one of them")
        seen.add((row.prompt.id, place))
        out.append(row._replace(place=place))
    return out


def _with_list(rows: list[Row], prompts: str | None, path: Path) -> list[Row]:
    """The rows with the prompts of a list, found by their text."""
    if prompts is None:
        return rows
    known = {_plain(prompt.text): prompt for prompt in load_prompts(prompts, "--prompts")}
    if odd := next((row.prompt.text for row in rows if row.prompt.text not in known), None):
        raise UserError(f"{path}: '{odd[:60]}' is not in --prompts {prompts}; name the list that these pictures are of")
    return [row._replace(prompt=known[row.prompt.text]) for row in rows]


# -- FlowBP -----------------------------------------------------------------------------------------------------------

JUDGED = ("unifiedreward", "ur-align", "ur-iq")  # five scales in words, divided by 5
FLOWBP = {  # its scorers: our name of the metric, the scale in its file
    "hpsv2": ("hpsv2.1", "cosine"),
    "hpsv3": ("hpsv3", "mu"),
    "imagereward": ("imagereward", "standardised"),
    "pickscore": ("pickscore", "logit / 26"),
    "clipscore": ("clipscore", "cosine"),
    **{name: (name, "1-5, divided by 5") for name in JUDGED},
}


def flowbp(path: Path, images: Path | None) -> Source:
    """scores.json of flowbp.eval.offline_ckpt_eval, or eval_step_N.json of training; a folder that has the former."""
    file = path / "scores.json" if path.is_dir() else path
    data = _json(file)
    items = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(items, list) or not items:
        what = 'expected an object with a list "scores", as offline_ckpt_eval --score writes it'
        raise UserError(f"{file}: is no scores.json of FlowBP: {what}")
    averages = data.get("avg_scores")
    names = data.get("reward_names") or [name for name in averages or () if name != "mean"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{file}: names no scorer: expected "reward_names" or "avg_scores"')
    rows = [_flowbp_row(item, names, f"{file}: scores[{i}]", file.parent, images) for i, item in enumerate(items)]
    rows.sort(key=lambda row: (row.group, row.place))
    protocol = {"steps": data.get("num_steps"), "guidance": data.get("guidance_scale")}
    protocol["size"] = _size(data.get("width"), data.get("height"))
    if data.get("seed") is not None:
        protocol["seed"] = f"{data['seed']} ({data.get('seed_formula', 'formula unknown')})"
    metrics = {name: _metric(*FLOWBP[name], "flowbp") if name in FLOWBP else _strange(name, "flowbp") for name in names}
    absent = ", ".join(name for name in FLOWBP if name not in names)
    remarks = (
        [f"without {absent}: FlowBP passes over scorers that were not asked for or not available"] if absent else []
    )
    return Source("flowbp", rows, metrics, {k: v for k, v in protocol.items() if v is not None}, remarks)


def _flowbp_row(item: Any, names: Sequence[str], spot: str, folder: Path, images: Path | None) -> Row:
    text, group, place = (_field(item, key, spot) for key in ("prompt", "prompt_idx", "img_idx"))
    scores = {name: _number(item.get(name), f"{spot}.{name}") for name in names}
    scores = {name: None if name in JUDGED and score == NO_SCORE else score for name, score in scores.items()}
    named = str(item.get("image", f"{group:05d}_{place:02d}.png"))  # eval_step_N.json names none
    return Row(_prompt(text, spot), group, place, _picture(named, 1, folder, images), scores)


# -- UniRL ------------------------------------------------------------------------------------------------------------

UNIRL = {  # "<reward>/<sub-metric>" of its reward service
    "hpsv2/hpsv2": ("hpsv2", "cosine"),  # 2.0 or 2.1: the service's setting, not in the file
    "hpsv3/hpsv3": ("hpsv3", "mu"),
    "pickscore/pickscore": ("pickscore", "logit / 26"),
    "imagereward/imagereward": ("imagereward", "standardised"),
    "clip/clip": ("clip", "cosine"),
    "geneval/geneval": ("geneval", "0-1"),  # correct or not, or partial credit: the service's setting
    "geneval2/vqascore": ("geneval2", "0-1"),
}
UNIRL_FILE = re.compile(r"p(\d+)_s(\d+)\.png")


def unirl(path: Path, images: Path | None) -> Source:
    """scores.jsonl of benchmarks.run; or its folder, with summary.json and images/ in it."""
    file = path / "scores.jsonl" if path.is_dir() else path
    rows = [_unirl_row(item, spot, file.parent / "images", images) for spot, item in _lines(file)]
    names = sorted({name for row in rows for name in row.scores})
    if not names:
        raise UserError(f"{file}: no line has a score; was the reward service down?")
    metrics = {name: _metric(*UNIRL[name], "unirl") if name in UNIRL else _strange(name, "unirl") for name in names}
    summary = file.parent / "summary.json"
    about = _json(summary) if summary.is_file() else {}
    subset = isinstance(about, dict) and about.get("subset")
    return Source(
        "unirl", rows, metrics, {}, ["SUBSET: its summary says that not all prompts were used"] * bool(subset)
    )


def _unirl_row(item: Any, spot: str, folder: Path, images: Path | None) -> Row:
    if isinstance(item, dict) and "acc" in item and "image" not in item:
        raise UserError(f"{spot}: is of a benchmark of texts; there are no pictures in it")
    text, named = _field(item, "prompt", spot), _field(item, "image", spot)
    parts = UNIRL_FILE.fullmatch(Path(named).name)
    if parts is None:
        raise UserError(f'{spot}: "image": {named!r} is not called p<prompt>_s<sample>.png, as UniRL\'s are')
    scores = item.get("scores") or {}  # null: every reward failed
    if not isinstance(scores, dict):
        raise UserError(f'{spot}: "scores": expected an object of numbers, or null')
    numbers = {name: _number(score, f"{spot}: scores.{name}") for name, score in scores.items()}
    return Row(_prompt(text, spot), int(parts[1]), int(parts[2]), _picture(named, 1, folder, images), numbers)


# -- GenEval ----------------------------------------------------------------------------------------------------------

GENEVAL_FILE = re.compile(r"(\d+)[/\\]samples[/\\](\d+)\.png$")


def geneval(path: Path, images: Path | None) -> Source:
    """results.jsonl of evaluation/evaluate_images.py; a folder that has it."""
    file = path / "results.jsonl" if path.is_dir() else path
    rows = [_geneval_row(item, spot, file.parent, images) for spot, item in _lines(file)]
    rows.sort(key=lambda row: (row.group, row.place))  # the script lists folders as they come
    metric = Metric("geneval (official)", "fraction", by_task=True)
    return Source("geneval", rows, {"correct": metric}, {}, [])


def _geneval_row(item: Any, spot: str, folder: Path, images: Path | None) -> Row:
    text, tag, named = (_field(item, key, spot) for key in ("prompt", "tag", "filename"))
    parts = GENEVAL_FILE.search(named)
    if parts is None:
        raise UserError(f'{spot}: "filename": {named!r} is not of the form 00000/samples/0000.png, as GenEval\'s are')
    if not isinstance(item.get("correct"), bool):
        raise UserError(f'{spot}: "correct": expected true or false, got {item.get("correct")!r}')
    try:
        metadata = json.loads(item.get("metadata") or "{}")
    except (ValueError, TypeError):
        raise UserError(f'{spot}: "metadata" is not JSON, as GenEval\'s is') from None
    prompt = _prompt(text, spot, {**metadata, "tag": tag} if isinstance(metadata, dict) else {"tag": tag})
    picture = _picture(named, 3, folder, images)
    return Row(
        prompt,
        int(parts[1]),
        int(parts[2]),
        picture,
        {"correct": float(item["correct"])},
        " ".join(str(item.get("reason") or "").split()),
    )


READERS: dict[str, Callable[[Path, Path | None], Source]] = {"flowbp": flowbp, "unirl": unirl, "geneval": geneval}
KINDS = ("images", *READERS)


# -- their parts ------------------------------------------------------------------------------------------------------


def _metric(name: str, unit: str, whose: str) -> Metric:
    return Metric(f"{name} ({whose})", unit)


def _strange(name: str, whose: str) -> Metric:
    """Of a scorer that is not in the code we read: neither its scale is known, nor which direction is better."""
    return Metric(f"{name} ({whose})", "unit unknown", higher_is_better=None)


def _json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}; was it cut off?") from None


def _lines(file: Path) -> list[tuple[str, Any]]:
    """(place, object) of every line of a .jsonl file."""
    found = list(_parsed(file))
    if not found:
        raise UserError(f"{file}: the file is empty")
    return found


def _parsed(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(file).split("\n"), 1):  # not splitlines(): it splits at U+2028, too
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
    """None for what is no finite number: null, NaN, inf. UserError for text and the like."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{spot}: expected a number, got {value!r:.60}")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def _plain(text: str) -> str:
    """Spaces as alignbench's public prompt sets have them, so that the same prompt has the same id."""
    return " ".join(text.split())


def _prompt(text: str, spot: str, metadata: dict[str, Any] | None = None) -> Prompt:
    return parse_prompt(json.dumps({**(metadata or {}), "prompt": _plain(text)}), spot)


def _picture(named: str, parts: int, folder: Path, images: Path | None) -> Path:
    """Where the picture is: in ``images``, if given; else as named, or beside its file. May be missing.

    ``parts``: how many of the last parts of its name are told apart there.
    """
    tail = Path(*Path(named.replace("\\", "/")).parts[-parts:])
    if images is not None:
        return images / tail
    return next((place for place in (Path(named), folder / tail) if os.path.isfile(place)), folder / tail)


def _size(width: Any, height: Any) -> Any:
    """Pixels of a square; "720 x 512" of another rectangle; None if not told."""
    if width is None or height is None:
        return None
    return width if width == height else f"{width} x {height}"

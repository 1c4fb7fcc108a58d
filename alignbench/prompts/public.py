"""Public prompt sets by name, read from the hub's cache: none is shipped whose licence does not allow it.

Every list is a function of one file of one dataset repository; what is drawn from it is drawn with a fixed seed. The
content of the list, not its name, is part of every id.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import random
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from alignbench.config import Requirement, UserError, read_text

Rows = Iterable[tuple[str, str]]  # text, tag


class PromptSet(NamedTuple):
    """``file`` of the hub dataset ``repository``; ``parse``: its text -> prompts with their tags; ``licence``: told."""

    repository: str
    file: str
    size: int
    parse: Callable[[str], Rows]
    licence: str
    about: str


def hpdv2(text: str) -> Rows:
    """test.json: a list of objects with "prompt"; blocks of 100 by style, the order of the 400 is the file's."""
    return ((item["prompt"], "") for item in json.loads(text))


HPDV2_TRAIN = 50_000


def hpdv2_train(text: str) -> Rows:
    """train.json: a list of comparisons with "prompt": 50,000 of its distinct prompts, drawn with seed 0 from those in
    the order of their text that hold no control and no Chinese character, which FLUX.1's T5 cannot read. The LeapAlign
    paper samples as many and does not say which; the code that it builds on drops Chinese ones too."""
    distinct = sorted({" ".join(item["prompt"].split()) for item in json.loads(text)})
    readable = [prompt for prompt in distinct if prompt and not any(map(_unreadable, prompt))]
    chosen = random.Random("hpdv2 train").sample(readable, HPDV2_TRAIN)
    return ((prompt, "") for prompt in chosen)


def _unreadable(character: str) -> bool:
    if character.isascii():
        return not character.isprintable()
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    return category in ("Cc", "Cs", "Zl", "Zp") or name.startswith("CJK")


def mjhq_500(text: str) -> Rows:
    """meta_data.json: {image: {"category", "prompt"}}: 50 of each of the ten categories, drawn with seed 0 from the
    distinct prompts in the order of their text. The LeapAlign paper holds out 500 and does not say which."""
    by_category: dict[str, set[str]] = {}
    for item in json.loads(text).values():
        by_category.setdefault(item["category"], set()).add(item["prompt"].strip())
    for category, prompts in sorted(by_category.items()):
        chosen = random.Random(f"mjhq {category}").sample(sorted(prompts), 50)
        yield from ((prompt, category) for prompt in chosen)


MJHQ_TRAIN = 25_000


def mjhq_train(text: str) -> Rows:
    """meta_data.json: 25,000 of the distinct readable prompts that ``mjhq_500`` leaves, drawn with seed 0. The
    LeapAlign paper trains on all 29,500 that are left; how many of them are distinct is not stated."""
    held_out = {" ".join(prompt.split()) for prompt, _ in mjhq_500(text)}
    distinct = sorted({" ".join(item["prompt"].split()) for item in json.loads(text).values()})
    left = [prompt for prompt in distinct if prompt and prompt not in held_out and not any(map(_unreadable, prompt))]
    chosen = random.Random("mjhq train").sample(left, MJHQ_TRAIN)
    return ((prompt, "") for prompt in chosen)


def drawbench(text: str) -> Rows:
    """drawbench.json of the HPDv2 benchmark: a list of texts, without DrawBench's categories."""
    return ((prompt, "") for prompt in json.loads(text))


def parti(text: str) -> Rows:
    """PartiPrompts.tsv: Prompt, Category, Challenge, Note; no quoting."""
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    return ((row["Prompt"], row["Category"]) for row in rows)


SETS = {
    "hpdv2/test": PromptSet("ymhao/HPDv2", "test.json", 400, hpdv2, "Apache-2.0", "HPDv2's whole test split"),
    "hpdv2/train": PromptSet(
        "ymhao/HPDv2", "train.json", HPDV2_TRAIN, hpdv2_train, "Apache-2.0", "50,000 prompts of HPDv2's training split"
    ),
    "mjhq/500": PromptSet(
        "playgroundai/MJHQ-30K", "meta_data.json", 500, mjhq_500, "none stated", "50 prompts of each MJHQ-30K category"
    ),
    "mjhq/train": PromptSet(
        *("playgroundai/MJHQ-30K", "meta_data.json", MJHQ_TRAIN, mjhq_train, "none stated"),
        "25,000 prompts of MJHQ-30K that are not in mjhq/500",
    ),
    "drawbench": PromptSet(
        "zhwang/HPDv2", "benchmark/drawbench.json", 200, drawbench, "none stated", "DrawBench, as in HPDv2's benchmark"
    ),
    "partiprompts": PromptSet(
        "nateraw/parti-prompts", "PartiPrompts.tsv", 1632, parti, "Apache-2.0", "PartiPrompts (P2)"
    ),
}


def rows(name: str, where: str) -> list[tuple[str, str]]:
    """(text, tag) of the set's prompts; repeated texts once. UserError with the command that gets a missing file."""
    path = cached(SETS[name], where)
    stat = path.stat()
    return _rows(name, path, (stat.st_size, stat.st_mtime_ns), where)


@functools.lru_cache(maxsize=4)  # a sweep asks for the same lists once per run, and one of them lies in a large file
def _rows(name: str, path: Path, state: tuple[int, int], where: str) -> list[tuple[str, str]]:
    """``state``: of the file, so that a changed one is read again."""
    chosen = SETS[name]
    try:
        found = list(dict.fromkeys((" ".join(text.split()), tag) for text, tag in chosen.parse(read_text(path))))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: {path} is not the {chosen.file} of {chosen.repository} ({error!r})") from None
    if abs(len(found) - chosen.size) > chosen.size // 100:  # a repeated line or two is the set's own
        raise UserError(f"{where}: {path} has {len(found)} prompts instead of {chosen.size}; fetch it again")
    return found


def cached(chosen: PromptSet, where: str) -> Path:
    """The file in the hub's cache. Nothing is downloaded unasked."""
    from huggingface_hub import hf_hub_download

    what, licence = f"{chosen.file} of {chosen.repository}", f"licence: {chosen.licence}"
    command = f"hf download --repo-type dataset {chosen.repository} {chosen.file}"
    text = f"{where}: {what} is not in the hub cache; fetch it once with `{command}` ({licence})"
    try:
        found = Path(hf_hub_download(chosen.repository, chosen.file, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both
        found = None
    return Requirement(what, text, command, licence, found).path

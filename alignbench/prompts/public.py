"""Public prompt sets by name, read from the hub's cache. None is shipped, since some licences do not allow it.

Every list is a function of one file of one dataset repository; random draws have a fixed seed. The content of the list,
not its name, is part of every id.
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
    """A list of prompts in one file of a hub dataset."""

    repository: str  # hub id of the dataset
    file: str
    size: int  # number of prompts
    parse: Callable[[str], Rows]  # text of the file -> prompts with their tags
    licence: str  # as stated by the dataset; shown before it is fetched
    about: str


def hpdv2(text: str) -> Rows:
    """Return the 400 prompts of HPDv2's test.json, in its order; its four blocks of 100 are styles, without tags."""
    return ((item["prompt"], "") for item in json.loads(text))


HPDV2_TRAIN = 50_000


def hpdv2_train(text: str) -> Rows:
    """Return 50,000 distinct prompts of HPDv2's train.json, drawn with a fixed seed from the sorted prompts.

    Prompts with control or Chinese characters, which FLUX.1's T5 cannot read, are left out. The LeapAlign paper samples
    as many and does not say which; the code on which it builds leaves out Chinese ones, too.
    """
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
    """Yield 50 distinct prompts of each of the ten categories of MJHQ-30K's meta_data.json, with the category as tag.

    Drawn with a fixed seed from the sorted prompts. The LeapAlign paper holds out 500 and does not say which.
    """
    by_category: dict[str, set[str]] = {}
    for item in json.loads(text).values():
        by_category.setdefault(item["category"], set()).add(item["prompt"].strip())
    for category, prompts in sorted(by_category.items()):
        chosen = random.Random(f"mjhq {category}").sample(sorted(prompts), 50)
        yield from ((prompt, category) for prompt in chosen)


MJHQ_TRAIN = 25_000


def mjhq_train(text: str) -> Rows:
    """Return 25,000 distinct readable prompts of MJHQ-30K that are not in ``mjhq_500``, drawn with a fixed seed.

    The LeapAlign paper trains on all 29,500 that are left; it does not say how many of them are distinct.
    """
    held_out = {" ".join(prompt.split()) for prompt, _ in mjhq_500(text)}
    distinct = sorted({" ".join(item["prompt"].split()) for item in json.loads(text).values()})
    left = [prompt for prompt in distinct if prompt and prompt not in held_out and not any(map(_unreadable, prompt))]
    chosen = random.Random("mjhq train").sample(left, MJHQ_TRAIN)
    return ((prompt, "") for prompt in chosen)


def drawbench(text: str) -> Rows:
    """Return the prompts in drawbench.json of the HPDv2 benchmark, which has no categories."""
    return ((prompt, "") for prompt in json.loads(text))


def parti(text: str) -> Rows:
    """Return the prompts of PartiPrompts.tsv, with their category as tag."""
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
    """Return (text, tag) of every prompt of a set, without repetitions.

    Raise Missing, with the command that fetches it, for a file that is absent; UserError for one of other content.
    """
    path = cached(SETS[name], where)
    stat = path.stat()
    return _rows(name, path, (stat.st_size, stat.st_mtime_ns), where)


@functools.lru_cache(maxsize=4)  # a sweep asks for the same lists once per run, and one of them lies in a large file
def _rows(name: str, path: Path, state: tuple[int, int], where: str) -> list[tuple[str, str]]:
    """Read a set. ``state``: size and modification time, so that a changed file is read again."""
    chosen = SETS[name]
    try:
        prompts = list(dict.fromkeys((" ".join(text.split()), tag) for text, tag in chosen.parse(read_text(path))))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: {path} is not the {chosen.file} of {chosen.repository} ({error!r})") from None
    if abs(len(prompts) - chosen.size) > chosen.size // 100:  # the sets themselves repeat a line or two
        raise UserError(f"{where}: {path} has {len(prompts)} prompts instead of {chosen.size}; fetch it again")
    return prompts


def cached(chosen: PromptSet, where: str) -> Path:
    """Return a set's file in the hub's cache. Raise Missing if it is not there; nothing is downloaded."""
    from huggingface_hub import hf_hub_download

    what, licence = f"{chosen.file} of {chosen.repository}", f"licence: {chosen.licence}"
    command = f"hf download --repo-type dataset {chosen.repository} {chosen.file}"
    text = f"{where}: {what} is not in the hub cache; fetch it once with `{command}` ({licence})"
    try:
        found = Path(hf_hub_download(chosen.repository, chosen.file, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both
        found = None
    return Requirement(what, text, command, licence, found).path

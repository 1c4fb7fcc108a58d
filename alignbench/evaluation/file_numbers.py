"""Numbers in the names of image files: which of them counts the prompts.

Names are read by their numbers, never by their letters: ``10.png`` follows ``9.png``. All names have to be formed
alike, so that a contact sheet among them is noticed. Names that allow two readings, or none, are refused.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError

PROMPT_WORDS = {"p", "prompt", "prompts", "caption"}
OTHER_WORDS = {"s", "seed", "iter", "iteration", "rank", "gpu", "device", "worker"}  # their numbers never count prompts
SETTING_WORDS = {  # images that differ in these have no mean in common
    *("step", "steps", "epoch", "ckpt", "checkpoint", "update"),
    *("cfg", "guidance", "scale", "strength", "alpha", "lora"),
}
REMEDY = 'write a .jsonl list with "prompt" and "file" in every line'


class NumberedFile(NamedTuple):
    """A file, the text around the numbers in its name, and the numbers."""

    file: Path
    text: tuple[str, ...]
    numbers: tuple[int, ...]


def places(files: Sequence[Path], prompts: int, source: str) -> list[tuple[Path, int, int]]:
    """Return (file, position of its prompt, index among the prompt's images), prompt by prompt.

    The number that counts the prompts from 0 or 1, without a gap, is the one called "prompt" or "p", or else the only
    one that can: as many values as there are prompts, and not a seed or the like. Every prompt has the same number of
    images. Raise UserError for other names, and for images of several steps or settings. ``prompts``: their number;
    ``source``: the list's name.
    """
    folder, numbered = files[0].parent, sorted(map(_read, files), key=lambda each: each.numbers)
    _check_names(numbered)
    if prompts == 1:
        return [(each.file, 0, index) for index, each in enumerate(numbered)]
    fields = _counting_fields(numbered)
    if not fields:
        raise UserError(f"{folder}: {_no_count(numbered)}, so they do not say which prompt is whose; {REMEDY}")
    per_prompt, rest = divmod(len(files), prompts)
    if rest or not per_prompt:
        what = f"{len(files)} images cannot be divided equally among the {prompts} prompts of {source}"
        raise UserError(f"{folder}: {what}; name the list that they were made from, or {REMEDY}")
    counts = Counter(each.numbers[fields[0]] for each in numbered)
    if len(counts) == prompts and min(counts.values()) < per_prompt:
        what = f"by the numbers in their names prompts have {min(counts.values())} to {max(counts.values())} images"
        raise UserError(f"{folder}: {what}; make the missing ones, or {REMEDY}")
    if len(counts) == len(files) and len(fields) == 1 and per_prompt > 1:
        what = f"the names only count {len(files)} images of {prompts} prompts: those of a prompt may follow each other"
        raise UserError(f"{folder}: {what}, or come in rounds; call them <prompt>_<image>.png, or {REMEDY}")
    if len(counts) != prompts:
        what = f"the names of the images count {len(counts)} prompts, but {source} has {prompts}"
        raise UserError(f"{folder}: {what}; name the list that they were made from, or {REMEDY}")
    if per_prompt > 1 and len(_rivals(numbered, fields, prompts)) > 1:
        what = "either number in the names of the images may count the prompts"
        raise UserError(f"{folder}: {what}; call them prompt<number>_seed<number>.png, or {REMEDY}")
    numbered.sort(key=lambda each: each.numbers[fields[0]])  # those of one prompt stay in the order of all numbers
    return [(each.file, *divmod(i, per_prompt)) for i, each in enumerate(numbered)]


def _read(file: Path) -> NumberedFile:
    parts = re.split("([0-9]+)", file.stem.casefold())
    return NumberedFile(file, tuple(parts[::2]), tuple(map(int, parts[1::2])))


def _check_names(numbered: Sequence[NumberedFile]) -> None:
    """Raise UserError for a name that is formed unlike the others, and for two that have the same numbers."""
    ((text, _),) = Counter(each.text for each in numbered).most_common(1)
    usual = next(each for each in numbered if each.text == text)
    if odd := next((each for each in numbered if each.text != text), None):
        what = f"its name is formed unlike the others' ({usual.file.name})"
        raise UserError(f"{odd.file}: {what}; move it elsewhere if it shows no prompt, or {REMEDY}")
    for one, other in itertools.pairwise(numbered):
        if one.numbers == other.numbers:
            names = sorted([one.file.name, other.file.name])
            raise UserError(f"{one.file.parent}: {names[0]} and {names[1]} have the same numbers; keep one of them")


def _counting_fields(numbered: Sequence[NumberedFile]) -> list[int]:
    """Return the positions of the numbers that may count the prompts, likeliest first."""
    columns = list(zip(*(each.numbers for each in numbered)))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    words = {i: _word(numbered[0].text[: i + 1]) for i in varying}
    settings = [i for i in varying if words[i] in SETTING_WORDS]
    if settings and len(varying) > 1:
        names = [min(numbered, key=lambda each: each.numbers[settings[0]]).file.name]
        names += [max(numbered, key=lambda each: each.numbers[settings[0]]).file.name]
        what = f"{names[0]} and {names[1]} differ in '{words[settings[0]]}'"
        raise UserError(f"{numbered[0].file.parent}: {what}; put images that were made differently into folders apart")
    if named := [i for i in varying if words[i] in PROMPT_WORDS]:
        varying = named
    elif len(varying) > 1:
        varying = [i for i in varying if words[i] not in OTHER_WORDS]
    return [i for i in varying if first_gap(columns[i]) is None]


def _rivals(numbered: Sequence[NumberedFile], fields: Sequence[int], prompts: int) -> list[int]:
    """Return which of ``fields`` have as many values as there are prompts, the same number of times each."""
    counts = [(i, Counter(each.numbers[i] for each in numbered)) for i in fields]
    return [i for i, values in counts if len(values) == prompts and len(set(values.values())) == 1]


def _word(text: Sequence[str]) -> str:
    """Return the last word before a number, or before one of which it is the fraction. ``text``: around the numbers."""
    before = text[-2] if text[-1] == "." and len(text) > 1 else text[-1]
    return (re.findall("[a-z]+", before) or [""])[-1]


def first_gap(numbers: Sequence[int]) -> int | None:
    """Return the first number that is missing if ``numbers`` count from 0 or 1; None if none is."""
    known = set(numbers)
    start = min(min(known), 1)
    return next((i for i in range(start, max(known)) if i not in known), None)


def counts_otherwise(names: Sequence[str]) -> bool:
    """Return whether names or ids, one for each line of a list, count from 0 or 1 in another order than the lines."""
    read = [_read(Path(name)) for name in names]
    numbers = [each.numbers for each in read]
    if len({each.text for each in read}) > 1 or {*map(len, numbers)} != {1} or len({*numbers}) < len(numbers):
        return False
    return numbers != sorted(numbers) and first_gap([number for (number,) in numbers]) is None


def _no_count(numbered: Sequence[NumberedFile]) -> str:
    columns = [column for column in zip(*(each.numbers for each in numbered)) if len(set(column)) > 1]
    if not columns:
        return "the names of the images have no numbers that differ"
    return f"the numbers in the names of the images leave out {first_gap(columns[0])}"

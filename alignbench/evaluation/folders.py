"""Folders of images made elsewhere, and which image belongs to which prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError, read_text
from alignbench.prompts import Prompt, load_prompts, parse_prompt

OURS = re.compile(r"([0-9a-f]{12})-(\d+)")  # stems of alignbench's own files: prompt id and index
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Picture(NamedTuple):
    """A picture of a prompt. ``place``: which of the prompt's pictures, from 0."""

    file: Path
    prompt: Prompt
    place: int


def pictures(folder: Path, prompts: str | None = None) -> list[Picture]:
    """The pictures of ``folder`` with their prompts. UserError if it is not clear which belongs to which.

    Without ``prompts``: GenEval's layout (``00000/metadata.jsonl`` beside ``00000/samples/*.png``). With a .jsonl file
    whose lines name a "file": these files. With any other list: files called ``<prompt id>-<index>``, as alignbench
    names its own, or else all files in the order of their names, the same number for every prompt.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the one that holds the pictures")
    if prompts is None:
        return _geneval(folder)
    if named := _named(folder, prompts):
        return named
    listed = load_prompts(prompts, "--prompts")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: there are no pictures in it ({', '.join(SUFFIXES)})")
    return _by_id(files, listed, prompts) or _in_order(files, listed, prompts)


def _geneval(folder: Path) -> list[Picture]:
    found = []
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        prompt = parse_prompt(read_text(metadata).strip(), f"{metadata}:1")
        samples = sorted(path for path in (metadata.parent / "samples").glob("*") if path.suffix.lower() in SUFFIXES)
        found += [Picture(file, prompt, index) for index, file in enumerate(samples)]
    if not found:
        raise UserError(
            f"{folder}: has no */metadata.jsonl with samples/ beside it; name the prompts with --prompts FILE"
        )
    return found


def _named(folder: Path, prompts: str) -> list[Picture]:
    """Of a .jsonl file with a "file" in every line; [] for other lists."""
    path = Path(prompts)
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    lines = read_text(path).splitlines()
    if not lines or '"file"' not in lines[0]:
        return []
    found, seen = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        prompt = parse_prompt(line, f"{path}:{number}")
        file = folder / str((prompt.metadata or {}).get("file"))
        if not file.is_file():
            raise UserError(f'{path}:{number}: "file": {file} is missing')
        seen[prompt.id] = seen.get(prompt.id, -1) + 1
        found.append(Picture(file, prompt, seen[prompt.id]))
    return found


def _by_id(files: Sequence[Path], prompts: Sequence[Prompt], name: str) -> list[Picture]:
    """Files called ``<prompt id>-<index>``; [] if none is."""
    known = {prompt.id: prompt for prompt in prompts}
    parts = [OURS.fullmatch(file.stem) for file in files]
    if not any(parts):
        return []
    for file, part in zip(files, parts):
        if part is None or part[1] not in known:
            raise UserError(f"{file}: is not of a prompt of {name}, as its neighbours' names are; give their own list")
    return [Picture(file, known[part[1]], int(part[2])) for file, part in zip(files, parts) if part]


def _in_order(files: Sequence[Path], prompts: Sequence[Prompt], name: str) -> list[Picture]:
    each, rest = divmod(len(files), len(prompts))
    if rest or not each:
        raise UserError(
            f"{files[0].parent}: {len(files)} pictures are no equal number for each of the {len(prompts)} prompts of "
            f'{name}; write a .jsonl file with "prompt" and "file" in every line'
        )
    return [Picture(file, prompts[i // each], i % each) for i, file in enumerate(files)]

"""Folders of images made elsewhere: which image belongs to which prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError, read_text
from alignbench.prompts import Prompt, load_prompts, parse_prompt

OUR_STEM = re.compile(r"([0-9a-f]{12})-(\d+)")  # alignbench's own file names: prompt id and image index
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class FolderImage(NamedTuple):
    """An image file and its prompt. ``image_index`` counts the images of one prompt from 0."""

    file: Path
    prompt: Prompt
    image_index: int


def folder_images(folder: Path, prompts: str | None = None) -> list[FolderImage]:
    """Return the images of ``folder`` with their prompts. Raise UserError if it is unclear which belongs to which.

    Without ``prompts``: GenEval's layout (``00000/metadata.jsonl`` beside ``00000/samples/*.png``). With a .jsonl file
    whose lines name a "file": those files. With any other list: files called ``<prompt id>-<index>``, as alignbench
    names its own, or else all files in the order of their names, the same number for every prompt.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the folder that holds the images")
    if prompts is None:
        return _geneval_images(folder)
    if images := _named_images(folder, prompts):
        return images
    prompt_list = load_prompts(prompts, "--prompts")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: the folder contains no images ({', '.join(SUFFIXES)})")
    return _images_by_id(files, prompt_list, prompts) or _images_in_order(files, prompt_list, prompts)


def _geneval_images(folder: Path) -> list[FolderImage]:
    images = []
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        prompt = parse_prompt(read_text(metadata).strip(), f"{metadata}:1")
        samples = sorted(path for path in (metadata.parent / "samples").glob("*") if path.suffix.lower() in SUFFIXES)
        images += [FolderImage(file, prompt, index) for index, file in enumerate(samples)]
    if not images:
        raise UserError(
            f"{folder}: there is no */metadata.jsonl with samples/ beside it; name the prompts with --prompts FILE"
        )
    return images


def _named_images(folder: Path, prompts: str) -> list[FolderImage]:
    """Return the images that a .jsonl list names with a "file" in every line; [] for other lists."""
    path = Path(prompts)
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    lines = read_text(path).splitlines()
    if not lines or '"file"' not in lines[0]:
        return []
    images, last_index = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        prompt = parse_prompt(line, f"{path}:{number}")
        file = folder / str((prompt.metadata or {}).get("file"))
        if not file.is_file():
            raise UserError(f'{path}:{number}: "file": {file} is missing')
        last_index[prompt.id] = last_index.get(prompt.id, -1) + 1
        images.append(FolderImage(file, prompt, last_index[prompt.id]))
    return images


def _images_by_id(files: Sequence[Path], prompts: Sequence[Prompt], source: str) -> list[FolderImage]:
    """Return the images of files called ``<prompt id>-<index>``; [] if no file is. ``source``: the list's name."""
    by_id = {prompt.id: prompt for prompt in prompts}
    matches = [OUR_STEM.fullmatch(file.stem) for file in files]
    if not any(matches):
        return []
    for file, match in zip(files, matches):
        if match is None or match[1] not in by_id:
            raise UserError(
                f"{file}: the name does not begin with the id of a prompt of {source}, as other names here do; "
                "name the list that these images were made from"
            )
    return [FolderImage(file, by_id[match[1]], int(match[2])) for file, match in zip(files, matches) if match]


def _images_in_order(files: Sequence[Path], prompts: Sequence[Prompt], source: str) -> list[FolderImage]:
    per_prompt, rest = divmod(len(files), len(prompts))
    if rest or not per_prompt:
        raise UserError(
            f"{files[0].parent}: {len(files)} images cannot be divided equally among the {len(prompts)} prompts of "
            f'{source}; write a .jsonl file with "prompt" and "file" in every line'
        )
    return [FolderImage(file, prompts[i // per_prompt], i % per_prompt) for i, file in enumerate(files)]

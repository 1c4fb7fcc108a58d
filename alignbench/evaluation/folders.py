"""Folders of images made elsewhere: which image belongs to which prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, read_text
from alignbench.prompts import Prompt, load_prompts, parse_prompt

OUR_STEM = re.compile(r"([0-9a-f]{12})-(\d+)")  # alignbench's own file names: prompt id and image index
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class FolderImage(NamedTuple):
    """An image file and its prompt. ``image_index`` counts the images of one prompt from 0.

    ``prompt_index``: position of its prompt in the list, which may have it again.
    """

    file: Path
    prompt: Prompt
    image_index: int
    prompt_index: int = 0


def folder_images(folder: Path, prompts: str | None = None) -> list[FolderImage]:
    """Return the images of ``folder`` with their prompts. Raise UserError if it is unclear which belongs to which.

    Without ``prompts``: GenEval's layout (``00000/metadata.jsonl`` beside ``00000/samples/*.png``). With a .jsonl file
    whose lines name a "file": those files. With any other list: files called ``<prompt id>-<index>``, as alignbench
    names its own, or else all files in the order of their names, the same number for every prompt. A prompt that the
    list repeats has further images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the folder that holds the images")
    return number_images(_found(folder, prompts), folder)


def number_images(images: Sequence[Any], path: Path) -> list[Any]:
    """Return the images with unique (prompt, image index): a prompt that the list repeats has further images.

    ``images``: of any type that has ``prompt``, ``prompt_index`` and ``image_index``. Raise UserError if an image
    appears twice. ``path``: where they were found.
    """
    size = 1 + max(image.image_index for image in images)
    positions: dict[str, list[int]] = {}
    seen, numbered = set[tuple[str, int]](), []
    for image in images:
        known = positions.setdefault(image.prompt.id, [])
        if image.prompt_index not in known:
            known.append(image.prompt_index)
        index = image.image_index + size * known.index(image.prompt_index)
        if (image.prompt.id, index) in seen:
            what = f"'{image.prompt.text[:60]}', image {image.image_index}, appears twice; keep one of them"
            raise UserError(f"{path}: {what}")
        seen.add((image.prompt.id, index))
        numbered.append(image._replace(image_index=index))
    return numbered


def _found(folder: Path, prompts: str | None) -> list[FolderImage]:
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
    for number, metadata in enumerate(sorted(folder.glob("*/metadata.jsonl"))):
        prompt = parse_prompt(read_text(metadata).strip(), f"{metadata}:1")
        samples = sorted(path for path in (metadata.parent / "samples").glob("*") if path.suffix.lower() in SUFFIXES)
        images += [FolderImage(file, prompt, index, number) for index, file in enumerate(samples)]
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
    places = (divmod(i, per_prompt) for i in range(len(files)))
    return [FolderImage(file, prompts[place], index, place) for file, (place, index) in zip(files, places)]

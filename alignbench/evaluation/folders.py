"""Folders of images made elsewhere: which image belongs to which prompt."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, read_text
from alignbench.evaluation.file_numbers import REMEDY, counts_otherwise, first_gap, places
from alignbench.prompts import Prompt, formats, load_prompts, parse_prompt

OUR_STEM = re.compile(r"([0-9a-f]{12})-(\d+)")  # alignbench's own file names: prompt id and image index
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLE = re.compile("[0-9]{1,15}")  # stem of an image in GenEval's layout
FILE_KEYS = (  # of a list's line: the name of its image
    *("file", "file_name", "filename", "file_path", "filepath", "image", "image_file", "image_path"),
    *("img", "img_path", "path"),
)
NAMED = re.compile(rf"\S+({'|'.join(map(re.escape, SUFFIXES))})\b", re.IGNORECASE)  # text that begins with a name
SHOWN = 3  # examples in a remark


class FolderImage(NamedTuple):
    """An image file and its prompt. ``image_index`` counts the images of one prompt from 0.

    ``prompt_index``: position of its prompt in the list, which may have it again.
    """

    file: Path
    prompt: Prompt
    image_index: int
    prompt_index: int = 0


class ImageFolder(NamedTuple):
    """The images of a folder, and remarks: how they were paired with prompts, and what was left out."""

    images: list[FolderImage]
    remarks: list[str]


def folder_images(folder: Path, prompts: str | None = None) -> list[FolderImage]:
    """Return the images of ``read_folder``."""
    return read_folder(folder, prompts).images


def read_folder(folder: Path, prompts: str | None = None) -> ImageFolder:
    """Return the images of ``folder`` with their prompts. Raise UserError if it is unclear which belongs to which.

    Without ``prompts``: GenEval's layout (``00000/metadata.jsonl`` beside ``00000/samples/0000.png``). With a list that
    names an image in every line (FILE_KEYS): those images. With any other list: files called ``<prompt id>-<index>``,
    as alignbench names its own, or else files whose names count the prompts (``places``). A prompt that the list
    repeats has further images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the folder that holds the images")
    found = _geneval_images(folder) if prompts is None else _listed_images(folder, prompts)
    return found._replace(images=number_images(found.images, folder))


def number_images(images: Sequence[Any], path: Path) -> list[Any]:
    """Return the images with unique (prompt, image index): a prompt that the list repeats has further images.

    ``images``: of any type that has ``prompt``, ``prompt_index`` and ``image_index``. Raise UserError if an image
    appears twice, or a prompt under two tasks. ``path``: where they were found.
    """
    size = 1 + max(image.image_index for image in images)
    positions: dict[str, list[int]] = {}
    tags: dict[str, str] = {}
    seen, numbered = set[tuple[str, int]](), []
    for image in images:
        text, tag = image.prompt.text[:60], tags.setdefault(image.prompt.id, image.prompt.tag)
        if tag != image.prompt.tag:
            raise UserError(f"{path}: '{text}' has the tag '{tag}' and '{image.prompt.tag}'; give it one of them")
        known = positions.setdefault(image.prompt.id, [])
        if image.prompt_index not in known:
            known.append(image.prompt_index)
        index = image.image_index + size * known.index(image.prompt_index)
        if (image.prompt.id, index) in seen:
            raise UserError(f"{path}: '{text}', image {image.image_index}, appears twice; keep one of them")
        seen.add((image.prompt.id, index))
        numbered.append(image._replace(image_index=index))
    return numbered


def count_from_zero(images: Sequence[Any]) -> list[Any]:
    """Return the images with an index from 0 in place of any number. ``images``: as for ``number_images``.

    If some prompt has all the numbers that occur, a number is the same index for every prompt, also for those that lack
    an image. If not (images named by seeds of their own), each prompt's images are counted by themselves.
    """
    by_prompt: dict[int, set[int]] = {}
    for image in images:
        by_prompt.setdefault(image.prompt_index, set()).add(image.image_index)
    everywhere = set().union(*by_prompt.values())
    if everywhere in by_prompt.values():
        by_prompt = dict.fromkeys(by_prompt, everywhere)
    ranks = {prompt: {number: i for i, number in enumerate(sorted(known))} for prompt, known in by_prompt.items()}
    return [image._replace(image_index=ranks[image.prompt_index][image.image_index]) for image in images]


def is_image(path: Path) -> bool:
    """Return whether the file counts as an image. Hidden ones do not: macOS writes ``._0.png`` beside ``0.png``."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _deeper_images(folder: Path) -> list[Path]:
    """Return the images in subfolders that are not hidden."""
    below = [path for path in folder.rglob("*") if path.parent != folder and is_image(path)]
    return sorted(path for path in below if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def _remark_left_out(paths: Iterable[Path], folder: Path, why: str) -> list[str]:
    names = sorted(str(path.relative_to(folder)) for path in paths)
    if not names:
        return []
    shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
    return [f"left out {len(names)} image{'s' * (len(names) > 1)} {why}: {shown}"]


# -- GenEval's layout -------------------------------------------------------------------------------------------------


def _geneval_images(folder: Path) -> ImageFolder:
    """Read numbered folders with a metadata.jsonl, and in samples/ the images whose names are numbers.

    This is what the official script counts. It does not look at other files, such as a contact sheet; a folder without
    metadata or samples is an error.
    """
    folders = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folders = [path for path in folders if (path / "metadata.jsonl").is_file() or (path / "samples").is_dir()]
    if not any((path / "metadata.jsonl").is_file() for path in folders):
        raise UserError(
            f"{folder}: there is no */metadata.jsonl with samples/ beside it; name the prompts with --prompts FILE"
        )
    if odd := next((path for path in sorted(folders) if not re.fullmatch("[0-9]+", path.name)), None):
        raise UserError(f"{odd}: GenEval's folders have numbers for names; rename it, or move it elsewhere")
    images, others = list[FolderImage](), list[Path]()
    for path in sorted(folders, key=lambda path: (int(path.name), path.name)):
        if not (path / "metadata.jsonl").is_file():
            raise UserError(f"{path}: there is no metadata.jsonl beside samples/; it says what the prompt is")
        prompt = parse_prompt(read_text(path / "metadata.jsonl").strip(), f"{path / 'metadata.jsonl'}:1")
        files = [file for file in (path / "samples").glob("*") if is_image(file)]
        samples = [file for file in files if SAMPLE.fullmatch(file.stem)]
        if not samples:
            what = "no images are in samples/ (0000.png, ...)"
            raise UserError(f"{path}: {what}; make them, or move the folder elsewhere to leave its prompt out")
        others += set(files) - set(samples)
        images += [FolderImage(file, prompt, int(file.stem), int(path.name)) for file in samples]
    images.sort(key=lambda image: (image.prompt_index, image.image_index, image.file))
    gap = first_gap([int(path.name) for path in folders])
    remarks = [] if gap is None else [f"the numbers of the folders leave out {gap}: were all prompts made?"]
    remarks += _remark_left_out(others, folder, "without a number for a name")
    return ImageFolder(count_from_zero(images), remarks)


# -- lists of prompts -------------------------------------------------------------------------------------------------


def _listed_images(folder: Path, prompts: str) -> ImageFolder:
    rows = _rows(prompts)
    files = sorted(filter(is_image, folder.iterdir()))
    if key := _file_key(rows, folder, prompts):
        return _named_images(folder, files, rows, key, prompts)
    prompt_list = [prompt for _, prompt in rows]
    deeper = _deeper_images(folder)
    if not files:
        if any(folder.glob("*/metadata.jsonl")):
            raise UserError(f"{folder}: GenEval's layout (*/metadata.jsonl) has its own prompts; leave --prompts out")
        more = f"; its subfolders have: name one of them, such as {deeper[0].parent}, or {REMEDY}" if deeper else ""
        raise UserError(f"{folder}: the folder contains no images ({', '.join(SUFFIXES)}){more}")
    if images := _images_by_id(files, prompt_list, prompts):
        absent = len({prompt.id for prompt in prompt_list} - {image.prompt.id for image in images})
        remarks = [f"{absent} of the {len(prompt_list)} prompts of {prompts} have no image"] * bool(absent)
    else:
        _check_order(rows, prompts)
        images = [
            FolderImage(file, prompt_list[place], index, place)
            for file, place, index in places(files, len(prompt_list), prompts)
        ]
        shown = [f"{image.file.name} with '{image.prompt.text[:60]}'" for image in [*images[:2], *images[2:][-1:]]]
        remarks = [f"paired by the numbers in the names of the images: {', '.join(shown)}"]
    return ImageFolder(images, [*remarks, *_remark_left_out(deeper, folder, "in subfolders")])


def _rows(prompts: str) -> list[tuple[str, Prompt]]:
    """Return (place, prompt) for every line of the list, which may repeat prompts."""
    found, path = load_prompts(prompts, "--prompts"), Path(prompts)
    spots = (line.spot for line in formats.read(path)) if path.is_file() else itertools.repeat(prompts)
    return list(zip(spots, found))


def _file_key(rows: Sequence[tuple[str, Prompt]], folder: Path, source: str) -> str | None:
    """Return the key under which the list names images; None if it names none. Raise UserError if it has several."""
    keys = dict.fromkeys(
        key
        for _, prompt in rows
        for key, value in (prompt.metadata or {}).items()
        if key != "prompt" and _names_image(key, value, folder)
    )
    if len(keys) > 1 and "file" not in keys:
        quoted = " and ".join(f'"{key}"' for key in keys)
        raise UserError(f'{source}: images are named under {quoted}; name those of this folder under "file"')
    return "file" if "file" in keys else next(iter(keys), None)


def _names_image(key: str, value: Any, folder: Path) -> bool:
    """Return whether a list's entry names an image: by its key, or because it looks like the name of an image.

    HPDv2's lists have several images of other models in every line, Pick-a-Pic's have addresses in the web: those are
    not of this folder.
    """
    if isinstance(value, list):
        return any(isinstance(name, str) and os.path.isfile(folder / name) for name in value)
    if value is None or (isinstance(value, str) and "://" in value):
        return False
    known = key.strip().lower().replace(" ", "_") in FILE_KEYS
    return known or (isinstance(value, str) and value.lower().endswith(SUFFIXES))


def _check_order(rows: Sequence[tuple[str, Prompt]], source: str) -> None:
    """Raise UserError if the list itself counts its prompts in another order, or if its prompts begin with file names.

    Then a number in a file name has two readings.
    """
    columns: dict[str, list[str]] = {}
    for _, prompt in rows:
        for key, value in _entries(prompt.metadata or {}):
            columns.setdefault(key, []).append(value)
    for key, values in columns.items():
        if len(values) == len(rows) and counts_otherwise(values):
            what = f'"{key}" counts the prompts in another order than the lines, so numbers in names have two readings'
            raise UserError(f'{source}: {what}; sort the lines by it, or name each line\'s image under "file"')
    if all(NAMED.match(prompt.text) for _, prompt in rows):
        raise UserError(f"{rows[0][0]}: the prompt begins with the name of an image; {REMEDY}")


def _entries(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of the texts and numbers in a list's line, nested or alone in a list."""
    for key, value in data.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", entry) for inner, entry in _entries(value))
        elif isinstance(value, str | int) and not isinstance(value, bool):
            yield key, str(value)


def _named_images(
    folder: Path, files: Sequence[Path], rows: Sequence[tuple[str, Prompt]], key: str, source: str
) -> ImageFolder:
    images, counts, lines = list[FolderImage](), Counter[str](), dict[Path, str]()
    for spot, prompt in rows:
        file = _locate((prompt.metadata or {}).get(key), folder, Path(source).parent, f'{spot}: "{key}"')
        if first := lines.get(_place(file)):
            raise UserError(f'{spot}: "{key}": {file} is already the image of {first}; an image has one prompt')
        lines[_place(file)] = spot
        images.append(FolderImage(file, prompt, counts[prompt.id]))
        counts[prompt.id] += 1
    unnamed = [file for file in files if _place(file) not in lines]
    return ImageFolder(images, _remark_left_out(unnamed, folder, f"that {source} does not name"))


def _locate(name: Any, folder: Path, beside: Path, spot: str) -> Path:
    """Return the file within ``folder`` that a list in the folder ``beside`` calls ``name``. ``spot``: for errors.

    A list may have been written for other images of the same names, so a file elsewhere is an error.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"{spot}: expected the name of an image, as in other lines, got {name!r:.60}")
    found = {_place(path): path for path in (beside / name, folder / name) if os.path.isfile(path)}
    within = [path for place, path in found.items() if place.is_relative_to(folder.resolve())]
    if len(within) == 1:
        return within[0]
    if within:
        raise UserError(f"{spot}: {within[0]} and {within[1]} exist; give the whole path of the image")
    if found:
        raise UserError(f"{spot}: {next(iter(found.values()))} is not in {folder}; name the folder that holds it")
    raise UserError(f"{spot}: {folder / name!s:.200} is missing")


def _place(file: Path) -> Path:
    """Return the absolute path of a file. A link to an image counts where the link is."""
    return file.parent.resolve() / file.name


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

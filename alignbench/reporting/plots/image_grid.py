"""The image grid: one column per prompt and noise, one row per method."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GAP = 4
FONT = 13
LINE = FONT + 3
CAPTION_LINES = 5
SMALLEST, LARGEST = 112, 192  # pixels of a tile
INK, GREY, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def choose(prompts: Sequence[str], tags: Sequence[str], count: int = 10) -> list[str]:
    """Return ``count`` prompt ids, taking tasks in turn and prompts by the hash of their id: by rule, not by eye."""
    by_task: dict[str, list[str]] = {}
    for prompt, tag in sorted(zip(prompts, tags), key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        by_task.setdefault(tag, []).append(prompt)
    turns = sorted((place, task) for task, members in by_task.items() for place in range(len(members)))[:count]
    return [by_task[task][place] for task, place in sorted((task, place) for place, task in turns)]


def draw(rows: Sequence[tuple[str, Sequence[Path | None]]], captions: Sequence[tuple[str, str]]) -> Image.Image:
    """Draw the grid. ``rows``: (label, an image file or None per column); ``captions``: (task, prompt) per column."""
    tile = _tile_size(rows)
    font = ImageFont.load_default(FONT)
    left = 2 * GAP + math.ceil(max((font.getlength(_clean(label)) for label, _ in rows), default=0))
    wrapped = [_wrap(prompt, font, tile, CAPTION_LINES) for _, prompt in captions]
    top = 2 * GAP + LINE * (1 + max(map(len, wrapped), default=0))
    sheet = Image.new("RGB", (left + len(captions) * (tile + GAP), top + len(rows) * (tile + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, (task, _) in enumerate(captions):
        x = left + column * (tile + GAP)
        pen.text((x, GAP), _wrap(task, font, tile, 1)[0], GREY, font)
        for line, text in enumerate(wrapped[column]):
            pen.text((x, GAP + LINE * (line + 1)), text, INK, font)
    for row, (label, files) in enumerate(rows):
        y = top + row * (tile + GAP)
        pen.text((GAP, y + (tile - FONT) // 2), _clean(label), INK, font)
        for column, file in enumerate(files):
            sheet.paste(_tile(file, tile, font), (left + column * (tile + GAP), y))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Return one image with the sheets below one another."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _tile_size(rows: Sequence[tuple[str, Sequence[Path | None]]]) -> int:
    """Return a multiple of a small image's side, so that pixels stay square; at most LARGEST for large images."""
    first = next((image for _, files in rows for file in files if (image := _read(file)) is not None), None)
    if first is None:
        return SMALLEST
    side = max(first.size)
    return side * math.ceil(SMALLEST / side) if side < SMALLEST else min(side, LARGEST)


def _read(file: Path | None) -> Image.Image | None:
    """Return the image; None without a file, or if it cannot be read as an image."""
    if file is None:
        return None
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _tile(file: Path | None, tile: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    image = _read(file)
    if image is None:
        missing = Image.new("RGB", (tile, tile), (225, 225, 225))
        ImageDraw.Draw(missing).text((GAP, tile // 2 - FONT // 2), "no image", GREY, font)
        return missing
    larger = image.width <= tile and tile % image.width == 0
    return image.resize((tile, tile), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _clean(text: str) -> str:
    return " ".join(text.split())


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Return at most ``lines`` lines, and at least one, of ``width`` pixels, with an ellipsis where text is cut."""
    done, current = [], ""
    for word in _clean(text).split(" "):
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            done.append(current)
            current = word
        else:
            current = longer
    done.append(current)
    if len(done) > lines:
        done = [*done[: lines - 1], f"{done[lines - 1]} …"]
    return [_fit(line, font, width) for line in done]


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"

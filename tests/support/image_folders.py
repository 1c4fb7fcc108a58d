"""Folders of small images to score or import."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

TEXTS = ["a red circle", "two blue squares", "a green ring"]


def draw(folder: Path, names: Sequence[str], size: int = 8) -> None:
    """Write an image under each name, each brighter than the one before."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (20 * i,) * 3).save(path)

"""Read image files as 8-bit RGB, or say why one cannot be scored."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 2**25  # pixels of the largest image that is read, as 8192 x 4096: evaluators need 40 bytes for each
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16-bit grey; 16-bit colours it reads as 8 bits itself


def read_image(file: Path | IO[bytes]) -> Image | str:
    """Return the image as a viewer shows it, in RGB, or a text that says why it cannot be read.

    It is turned as its EXIF data say. Of 16 bits the upper 8 are read. Transparency is ignored, as by the official
    packages. One of several images in a file is not chosen, and one of more than LARGEST pixels not decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if problem := _problem(image):
                return problem
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # Pillow raises many types, depending on what the file contains
        return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def pixel_count(file: Path) -> int:
    """Return the number of pixels of an image file, from its head; 0 if ``read_image`` will not decode it."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return 0 if _problem(image) else image.width * image.height
    except Exception:  # as above
        return 0


def _problem(image: Image) -> str:
    """Return why an opened image is not decoded; "" if nothing speaks against it."""
    pixels = image.width * image.height
    if pixels > LARGEST:
        return f"cannot be read: {pixels / 1e6:.0f} megapixels, more than {LARGEST / 1e6:.0f}; scale it down"
    if getattr(image, "is_animated", False):
        return "cannot be read: the file holds several images; save one of them"
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return f"cannot be read: pixels of mode {image.mode} have no known white; save 8 bits per channel"
    return ""


def _rgb(image: Image) -> Image:
    """Return the image in RGB; Pillow alone would make everything above 255 white."""
    import numpy as np
    from PIL import Image as Pillow

    if image.mode == "RGB":
        image.load()  # a copy of a large image would be large
        return image
    if image.mode in (*DEEP, "I"):
        return Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of transparency lost from a palette
    return image.convert("RGB")

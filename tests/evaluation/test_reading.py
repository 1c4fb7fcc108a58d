"""Image files: every kind is read as a viewer shows it, or marked with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from alignbench.evaluation.reading import LARGEST, pixel_count, read_image
from alignbench.testing.evaluator_contract import random_image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image, kind="PNG", **options):
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def claiming(width, height):
    """Return a PNG of one pixel whose head claims another size."""
    data = saved(Image.new("1", (1, 1))).getvalue()
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def levels(image):
    return np.asarray(image)


def test_sixteen_bits_keep_their_brightness():
    """A grey PNG of 16 bits has the upper eight of each pixel, as one of 8 bits and as 16-bit colours have them."""
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert (levels(read_image(saved(deep))) == GREY[..., None]).all()
    colours = b"P6 16 16 65535\n" + np.repeat(GREY.astype(">u2") * 257, 3).astype(">u2").tobytes()
    grey = b"P5 16 16 65535\n" + (GREY.astype(">u2") * 257).astype(">u2").tobytes()
    for data in (colours, grey):
        assert (levels(read_image(io.BytesIO(data))) == GREY[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_all_modes_are_read_as_rgb(mode):
    """As Pillow converts them; transparency is ignored, in palettes too."""
    image = random_image(16, 16, 0).convert(mode)
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    file = saved(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    assert (levels(read_image(file)) == levels(image.convert("RGB"))).all()


def test_an_image_is_turned_as_exif_says():
    """A camera's image that lies on its side is read upright, like in every viewer."""
    image = random_image(8, 24, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    assert (levels(read_image(saved(image, exif=exif))) == levels(image.rotate(-90, expand=True))).all()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cannot identify"),
        (b"hello", "cannot identify"),
        (saved(random_image(40, 40, 0)).getvalue()[:800], "truncated"),
        (claiming(12_500, 12_500), "156 megapixels, more than 34; scale it down"),
        (claiming(20_000, 10_000), "exceeds limit"),
        (saved(Image.new("F", (4, 4)), "TIFF").getvalue(), "mode F have no known white"),
        (saved(Image.new("I", (4, 4)), "TIFF").getvalue(), "mode I have no known white"),
        (
            saved(Image.new("L", (4, 4)), "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 9)]).getvalue(),
            "several images",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_has_a_reason(data, says):
    """Empty, foreign, truncated, too large, of unknown brightness, or several in one: a text, and no error."""
    assert says in read_image(io.BytesIO(data))
    assert pixel_count(io.BytesIO(data)) in (0, 1600)  # the truncated one's head is whole


def test_the_largest_image_is_read():
    """The limit itself is allowed, and its pixels are counted from the head."""
    file = saved(Image.new("1", (LARGEST // 4096, 4096)))
    assert pixel_count(file) == LARGEST
    assert read_image(file).size == (LARGEST // 4096, 4096)

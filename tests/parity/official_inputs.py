"""Pictures and prompts on which ports have gone wrong before, and how closely a port must agree."""

import numpy as np
from PIL import Image

from alignbench.prompts import Prompt
from alignbench.testing.evaluator_contract import random_image

SIZES = {  # (height, width)
    "square": (512, 512),
    "large": (1024, 1024),
    "wide": (512, 768),
    "wide, odd": (364, 531),
    "tall": (768, 512),
    "tall, odd": (301, 224),
    "panorama": (90, 700),
    "tiny": (17, 23),
    "one pixel": (1, 1),
    "exact": (224, 224),
}
TEXTS = [
    "a red circle",
    "Two blue squares &amp; a Triangle, café!",
    "a",
    "",
    "x " * 100,
    "日本語 emoji 🎨 naïve — “quotes”",
    "A CAT with two horns on its head, 4k; artstation's best (masterpiece:1.2)",
    "red  \n\t  blue",
    "[ENC] a [DEC] red [MASK]",
    "can't won't I'm &lt;tag&gt; <|endoftext|>",
]


def images() -> list[Image.Image]:
    """Return an RGB image of every size, then grey, transparent, palette, black-and-white and CMYK ones, as RGB."""
    rgb = [random_image(*size, seed=i) for i, size in enumerate(SIZES.values())]
    other = [random_image(90, 130, seed=i).convert(mode) for i, mode in enumerate(("L", "RGBA", "P", "1", "CMYK"))]
    other[1].putalpha(Image.linear_gradient("L").resize(other[1].size))
    return rgb + [image.convert("RGB") for image in other]


def prompts() -> list[Prompt]:
    """Return as many prompts as images."""
    return [Prompt(f"p{i}", TEXTS[i % len(TEXTS)]) for i in range(len(images()))]


def agree(ours: np.ndarray, official: np.ndarray) -> None:
    """Within 1e-5, relatively, on scores that differ from one another. Prints by how much they differ."""
    gap = np.abs(ours - official)
    relative = gap / np.abs(official)
    print(f"{len(ours)} scores, largest difference: relative {relative.max():.2e}, absolute {gap.max():.2e}")
    assert np.ptp(official) > 0.1
    assert relative.max() <= 1e-5

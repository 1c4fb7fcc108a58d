"""A made-up store with images that resemble photographs, for the page's tests and benchmark."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pandas as pd
from msgspec import structs
from numpy.typing import NDArray
from PIL import Image
from support.report_tables import TASKS, costs, manifest, scores, stored

from alignbench.reporting.analysis.results import Results

PLACES = ("mountain lake", "desert canyon", "pine forest in fog", "green valley", "rocky coast", "snowy ridge")
TIMES = ("at dawn", "at noon", "in the evening", "under a red sky", "after rain", "in winter light")
LABELS = ("base", "ReFL", "DRaFT-LV", "DRTune", "LeapAlign", "DanceGRPO", "MixGRPO", "VGG-Flow")


def noise(rng: np.random.Generator, shape: tuple[int, ...], slope: float) -> NDArray:
    """Return unit-variance noise with amplitude ~ frequency^-slope; photographs have slope 1."""
    grids = np.meshgrid(*(np.fft.fftfreq(size) * size for size in shape), indexing="ij")
    frequency = np.sqrt(sum(grid**2 for grid in grids))
    frequency.flat[0] = np.inf
    field = np.fft.ifftn(np.fft.fftn(rng.normal(size=shape)) / frequency**slope).real
    return field / field.std()


def scene(prompt: int, method: int, side: int) -> Image.Image:
    """Draw ridges under a sky. The prompt sets the place, the method its colours, contrast and grain."""
    rng = np.random.default_rng(prompt)
    hue, taste = rng.random(), np.random.default_rng((method, 7))
    saturation, contrast = taste.uniform(0.25, 0.75), taste.uniform(0.75, 1.15)
    hue += taste.uniform(-0.04, 0.04)
    row = np.linspace(0, 1, side)[:, None, None]
    low, high = (np.array(colorsys.hsv_to_rgb(hue % 1, saturation * s, v)) for s, v in ((0.35, 0.98), (0.9, 0.75)))
    image = np.broadcast_to(high + (low - high) * row, (side, side, 3)).copy()
    image += 0.06 * noise(rng, (side, side), 1.6)[:, :, None]
    for depth in range(4):
        ridge = 0.35 + 0.14 * depth + 0.07 * noise(rng, (side,), 1.3)
        below = np.arange(side)[:, None] > ridge[None] * side
        color = colorsys.hsv_to_rgb((hue + 0.45 + 0.05 * depth) % 1, saturation, 0.72 - 0.16 * depth)
        texture = 1 + 0.22 * noise(rng, (side, side), 1.0 + 0.2 * taste.random())
        image[below] = (np.array(color) * texture[:, :, None])[below]
    image = 0.5 + (image - 0.5) * contrast
    return Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))


def prompt_text(prompt: int) -> str:
    scenery = f"A photograph of a {PLACES[prompt % 6]} {TIMES[prompt // 6 % 6]}"
    return f"{scenery}, number {prompt}" + ", wide angle, very detailed, with a small wooden house on the left" * (
        prompt % 3 == 0
    )


def make(
    root: Path, labels=LABELS, prompts=24, images=1, side=256, seeds=(0, 1), different=None, name="made_up"
) -> Results:
    """Write the store's images in ``root``; return its results. ``different``: number of images that are not links."""
    plan = manifest(seeds=seeds, labels=labels, name=name)
    protocol = plan.protocol | {"images_per_prompt": images, "size": side}
    plan = structs.replace(plan, prompts=prompts, protocol=protocol)
    made: list[Path] = []
    for number, run in enumerate(plan.runs):
        folder = root / "images" / run.images
        folder.mkdir(parents=True)
        rows = []
        for prompt in range(prompts):
            for index in range(images):
                file = folder / f"p{prompt:04d}-{index}.png"
                if different is None or len(made) < different:
                    scene(prompt + 1000 * index, number, side).save(file, compress_level=1)
                    made.append(file)
                else:
                    file.hardlink_to(made[(number * 31 + prompt * images + index) % different])
                row = {"prompt_id": f"p{prompt:04d}", "index": index, "tag": TASKS[prompt % 6], "file": file.name}
                rows.append(row | {"text": prompt_text(prompt)})
        pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
    return stored(root, plan, scores(plan, prompts, images), costs(plan))

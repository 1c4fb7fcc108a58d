"""Contents of the page's gallery: thumbnails, scores, and the disagreement of evaluators on each prompt.

Images come in layers: a layer holds one training seed and one image index of every prompt and method. The first layer
is always included, the others as long as the byte budget allows; the page names those left out.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from alignbench.reporting.analysis.comparison import Analysis
from alignbench.store.files import read_frame

if TYPE_CHECKING:
    from alignbench.reporting.analysis.results import Results

BUDGET = 40_000_000  # bytes of all thumbnails of a page, before base64 adds a third
SIDES = (256, 192, 128)  # pixels of a thumbnail: the largest that keeps the first layer within the budget
EXACT = 64  # images of at most this side are kept losslessly
QUALITY = 75  # WebP
SAMPLE = 24  # images from which the size of a layer is estimated
UNREADABLE = "the file cannot be read as an image"


class Place(NamedTuple):
    """Position of an image: indices into the gallery's methods, training seeds, images and prompts."""

    method: int
    seed: int
    image: int
    prompt: int


@dataclass
class Gallery:
    """Prompts of a sweep in order, and the images of each."""

    methods: list[str]
    seeds: list[list[int]]  # of each method
    prompts: list[str] = field(default_factory=list)  # ids
    about: dict[str, tuple[str, str]] = field(default_factory=dict)  # prompt id -> (text, task)
    images: list[int] = field(default_factory=list)  # image indices, sorted
    files: dict[Place, Path] = field(default_factory=dict)
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)  # (method, seed) -> why it has no images

    def layers(self) -> list[tuple[int, int]]:
        """Return (seed, image) of the first layer and of every other one that has an image."""
        return sorted({(0, 0)} | {(place.seed, place.image) for place in self.files})

    def places(self, layer: tuple[int, int]) -> Iterator[Place]:
        """Yield every cell of a layer, prompt by prompt, skipping methods without that training seed."""
        seed, image = layer
        for prompt in range(len(self.prompts)):
            for method, seeds in enumerate(self.seeds):
                if seed < len(seeds):
                    yield Place(method, seed, image, prompt)

    def why(self, place: Place) -> str:
        """Return the reason why there is no image."""
        return self.reasons.get((place.method, place.seed), "this method has no image of this prompt")


def collect(results: Results, analysis: Analysis) -> Gallery:
    """Return the images listed in the store. Prompts are ordered as in the image sets, then those with only scores."""
    gallery = Gallery(analysis.labels, [analysis.seeds[label] for label in analysis.labels])
    states = {row["run"]: row for row in results.costs.to_dict("records")}
    lists: dict[tuple[int, int], pd.DataFrame] = {}
    for method, label in enumerate(gallery.methods):
        for number, seed in enumerate(gallery.seeds[method]):
            run = results.manifest.by_seed[label, seed]
            folder = results.store / "images" / run.images
            if (folder / "manifest.parquet").is_file():
                images = read_frame(folder / "manifest.parquet")
                lists[method, number] = images.assign(path=[folder / file for file in images["file"]])
            else:
                state = states[run.id]
                gallery.reasons[method, number] = _reason(state["state"], state["reason"])
    scored = results.scores[["prompt_id", "tag"]].drop_duplicates().sort_values("prompt_id").assign(text="")
    frames = [images[["prompt_id", "text", "tag"]] for images in lists.values()]
    known = pd.concat([*frames, scored]).drop_duplicates("prompt_id").fillna("").astype(str)
    gallery.prompts = known["prompt_id"].tolist()
    gallery.about = dict(zip(gallery.prompts, zip(known["text"].tolist(), known["tag"].tolist())))
    gallery.images = sorted({int(i) for frame in [*lists.values(), results.scores] for i in frame["index"].unique()})
    for (method, number), images in lists.items():
        rows, columns = _where(images["prompt_id"], gallery.prompts), _where(images["index"], gallery.images)
        for prompt, image, file in zip(rows, columns, images["path"]):
            gallery.files[Place(method, number, int(image), int(prompt))] = file
    return gallery


def _where(column: pd.Series, known: Sequence[Any]) -> NDArray:
    """Return (rows,) positions of the column's values in ``known``, -1 for others."""
    return pd.Index(known).get_indexer(pd.Index(column))


def _reason(state: str, reason: Any) -> str:
    if state == "done":
        return "the store no longer has these images"
    waits = dict.fromkeys(("queued", "requeued"), "the run is queued")
    text = {"failed": "the run failed", "running": "the run is in progress", **waits}.get(state, "the run is missing")
    return f"{text}: {reason}" if isinstance(reason, str) and reason else text


# -- scores -----------------------------------------------------------------------------------------------------------


def cube(gallery: Gallery, analysis: Analysis, scores: pd.DataFrame) -> NDArray:
    """Return scores (measure, method, prompt, seed, image); nan where missing or not ok."""
    most = max(map(len, gallery.seeds), default=0)
    shape = (len(analysis.measures), len(gallery.methods), len(gallery.prompts), most, len(gallery.images))
    values = np.full(shape, np.nan)
    valid = scores[scores["ok"].eq(True).fillna(False).to_numpy(bool)]
    runs = {(label, seed): i for label, seeds in analysis.seeds.items() for i, seed in enumerate(seeds)}
    measures = {(measure.evaluator, measure.name): i for i, measure in enumerate(analysis.measures)}
    axes = [
        np.array([measures.get(pair, -1) for pair in zip(valid["evaluator"], valid["metric"])], int),
        _where(valid["label"], gallery.methods),
        _where(valid["prompt_id"], gallery.prompts),
        np.array([runs.get(pair, -1) for pair in zip(valid["label"], valid["seed"].astype(int))], int),
        _where(valid["index"], gallery.images),
    ]
    known = np.all([axis >= 0 for axis in axes], axis=0)
    values[tuple(axis[known] for axis in axes)] = valid["score"].to_numpy(float, na_value=np.nan)[known]
    return np.where(np.isfinite(values), values, np.nan)


def disagreement(values: NDArray, evaluators: Sequence[str], signs: Sequence[int]) -> NDArray:
    """Return (P,) 1 - the mean of Kendall's tau-b over all pairs of measures of different evaluators; in [0, 2].

    ``values``: (measure, method, prompt), means over a prompt's images; ``signs``: 1 if higher is better, -1 if lower,
    0 if neither (such a measure is ignored). Each tau compares two measures' rankings of the methods that have both; it
    is undefined if either measure ties all methods. nan for a prompt if no tau is defined.
    """
    first, second = np.triu_indices(values.shape[1], 1)
    order = np.sign(values[:, first] - values[:, second]) * np.reshape(signs, (-1, 1, 1))
    ranks = [i for i, sign in enumerate(signs) if sign]
    pairs = [(a, b) for a, b in itertools.combinations(ranks, 2) if evaluators[a] != evaluators[b]]
    taus = np.full((len(pairs), values.shape[2]), np.nan)
    for row, (a, b) in enumerate(pairs):
        both = np.isfinite(order[a] + order[b])
        x, y = np.where(both, order[a], 0), np.where(both, order[b], 0)
        told = np.sqrt((x**2).sum(0) * (y**2).sum(0))
        np.divide((x * y).sum(0), told, out=taus[row], where=told > 0)
    counts = np.isfinite(taus).sum(0)
    return np.where(counts > 0, 1 - np.nansum(taus, 0) / np.maximum(counts, 1), np.nan)


# -- thumbnails -------------------------------------------------------------------------------------------------------


def thumbnail(file: Path, side: int) -> bytes | str:
    """Return the image as PNG if small, else as WebP of at most ``side`` pixels; if unreadable, the reason as text."""
    if not file.is_file():
        return "the file is missing"
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return UNREADABLE
    encoded = io.BytesIO()
    if max(image.size) <= EXACT:
        image.save(encoded, "PNG", optimize=True)
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        image.save(encoded, "WEBP", quality=QUALITY, method=2)
    return encoded.getvalue()


def thumbnails(gallery: Gallery) -> tuple[dict[tuple[int, int], dict[Place, bytes | str]], int]:
    """Return layer -> cell -> thumbnail or reason, for the layers within the budget, and the thumbnails' side."""
    made: dict[tuple[int, int], dict[Place, bytes | str]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def encode(files: Sequence[Path], side: int) -> list[bytes | str]:
            return list(pool.map(thumbnail, files, itertools.repeat(side)))

        def weight(layer: tuple[int, int], side: int) -> float:
            files = [gallery.files[place] for place in gallery.places(layer) if place in gallery.files]
            return len(files) * _mean_size(encode(files[:: len(files) // SAMPLE + 1], side))

        first, *others = gallery.layers()
        side = next((side for side in SIDES if weight(first, side) <= BUDGET), SIDES[-1])
        spent = 0.0
        for layer in [first, *others]:
            if made and spent + weight(layer, side) > BUDGET:
                break
            places = [place for place in gallery.places(layer) if place in gallery.files]
            encoded = encode([gallery.files[place] for place in places], side)
            made[layer] = {place: gallery.why(place) for place in gallery.places(layer)}
            made[layer].update(zip(places, encoded))
            spent += len(encoded) * _mean_size(encoded)
    return made, side


def _mean_size(encoded: Sequence[bytes | str]) -> float:
    """Return the mean bytes per cell; a cell without an image has none."""
    return sum(len(cell) for cell in encoded if isinstance(cell, bytes)) / max(len(encoded), 1)

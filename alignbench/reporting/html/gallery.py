"""What the page's gallery shows: every picture as a thumbnail, its scores, and how far evaluators disagree on a prompt.

Pictures come in layers: one training seed and one image index of every prompt and method. The first layer is always
there, the others as far as the budget of bytes allows; which are left out is said.
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

if TYPE_CHECKING:
    from alignbench.reporting.analysis.results import Results

BUDGET = 40_000_000  # bytes of all thumbnails of a page; base64 makes a third more of it
SIDES = (256, 192, 128)  # pixels of a thumbnail: the largest with which the first layer keeps the budget
EXACT = 64  # up to this side a picture is kept as it is, every pixel
QUALITY = 75  # WebP
SAMPLE = 24  # pictures from which the size of a layer is foretold
UNREADABLE = "the file cannot be read as a picture"


class Place(NamedTuple):
    """Where a picture stands: numbers into the gallery's methods, training seeds, images and prompts."""

    method: int
    seed: int
    image: int
    prompt: int


@dataclass
class Gallery:
    """All prompts of a sweep, in their order, and what there is of each."""

    methods: list[str]
    seeds: list[list[int]]  # of each method
    prompts: list[str] = field(default_factory=list)  # ids
    about: dict[str, tuple[str, str]] = field(default_factory=dict)  # prompt id -> (text, task)
    images: list[int] = field(default_factory=list)  # image indices, sorted
    files: dict[Place, Path] = field(default_factory=dict)
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)  # (method, seed) -> why it has no pictures

    def layers(self) -> list[tuple[int, int]]:
        """(seed, image): the first, and every other one that has a picture."""
        return sorted({(0, 0)} | {(place.seed, place.image) for place in self.files})

    def places(self, layer: tuple[int, int]) -> Iterator[Place]:
        """Every cell of a layer, prompt by prompt, a method's without that training seed left out."""
        seed, image = layer
        for prompt in range(len(self.prompts)):
            for method, seeds in enumerate(self.seeds):
                if seed < len(seeds):
                    yield Place(method, seed, image, prompt)

    def why(self, place: Place) -> str:
        """Why there is no picture."""
        return self.reasons.get((place.method, place.seed), "this method has no picture of this prompt")


def collect(results: Results, analysis: Analysis) -> Gallery:
    """The pictures that the store lists. Prompts stand in the order of the image sets, then those known by scores."""
    gallery = Gallery(analysis.labels, [analysis.seeds[label] for label in analysis.labels])
    states = {row["run"]: row for row in results.costs.to_dict("records")}
    lists: dict[tuple[int, int], pd.DataFrame] = {}
    for method, label in enumerate(gallery.methods):
        for number, seed in enumerate(gallery.seeds[method]):
            run = results.manifest.by_seed[label, seed]
            folder = results.store / "images" / run.images
            if (folder / "manifest.parquet").is_file():
                found = pd.read_parquet(folder / "manifest.parquet")
                lists[method, number] = found.assign(path=[folder / file for file in found["file"]])
            else:
                state = states[run.id]
                gallery.reasons[method, number] = _reason(state["state"], state["reason"])
    scored = results.scores[["prompt_id", "tag"]].drop_duplicates().sort_values("prompt_id").assign(text="")
    frames = [found[["prompt_id", "text", "tag"]] for found in lists.values()]
    known = pd.concat([*frames, scored]).drop_duplicates("prompt_id").fillna("").astype(str)
    gallery.prompts = known["prompt_id"].tolist()
    gallery.about = dict(zip(gallery.prompts, zip(known["text"].tolist(), known["tag"].tolist())))
    gallery.images = sorted({int(i) for frame in [*lists.values(), results.scores] for i in frame["index"].unique()})
    for (method, number), found in lists.items():
        rows, columns = _where(found["prompt_id"], gallery.prompts), _where(found["index"], gallery.images)
        for prompt, image, file in zip(rows, columns, found["path"]):
            gallery.files[Place(method, number, int(image), int(prompt))] = file
    return gallery


def _where(found: pd.Series, known: Sequence[Any]) -> NDArray:
    """(rows,): the place of each among ``known``, -1 for others."""
    return pd.Index(known).get_indexer(pd.Index(found))


def _reason(state: str, reason: Any) -> str:
    if state == "done":
        return "the store no longer has these pictures"
    waits = dict.fromkeys(("queued", "requeued"), "the run is queued")
    said = {"failed": "the run failed", "running": "the run is being made", **waits}.get(state, "the run is missing")
    return f"{said}: {reason}" if isinstance(reason, str) and reason else said


# -- scores -----------------------------------------------------------------------------------------------------------


def cube(gallery: Gallery, analysis: Analysis, scores: pd.DataFrame) -> NDArray:
    """(measure, method, prompt, seed, image) -> score; nan where there is none, or it is not ok."""
    most = max(map(len, gallery.seeds), default=0)
    shape = (len(analysis.measures), len(gallery.methods), len(gallery.prompts), most, len(gallery.images))
    values = np.full(shape, np.nan)
    found = scores[scores["ok"].eq(True).fillna(False).to_numpy(bool)]
    trainings = {(label, seed): i for label, seeds in analysis.seeds.items() for i, seed in enumerate(seeds)}
    measures = {(measure.evaluator, measure.name): i for i, measure in enumerate(analysis.measures)}
    axes = [
        np.array([measures.get(pair, -1) for pair in zip(found["evaluator"], found["metric"])], int),
        _where(found["label"], gallery.methods),
        _where(found["prompt_id"], gallery.prompts),
        np.array([trainings.get(pair, -1) for pair in zip(found["label"], found["seed"].astype(int))], int),
        _where(found["index"], gallery.images),
    ]
    known = np.all([axis >= 0 for axis in axes], axis=0)
    values[tuple(axis[known] for axis in axes)] = found["score"].to_numpy(float, na_value=np.nan)[known]
    return np.where(np.isfinite(values), values, np.nan)


def disagreement(values: NDArray, evaluators: Sequence[str], signs: Sequence[int]) -> NDArray:
    """(P,): 1 - the mean of Kendall's tau-b over all pairs of measures of different evaluators; in [0, 2].

    ``values``: (measure, method, prompt), means over a prompt's images; ``signs``: 1 if higher is better, -1 if lower,
    0 if neither (then the measure ranks nothing). Each tau is between two measures' rankings of the methods that have
    both; a pair in which one side does not tell any two methods apart has none. nan if no pair has one.
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
    """The picture as PNG if it is small, else as WebP of at most ``side`` pixels; a text says why there is none."""
    if not file.is_file():
        return "the file is missing"
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return UNREADABLE
    encoded = io.BytesIO()
    if max(picture.size) <= EXACT:
        picture.save(encoded, "PNG", optimize=True)
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        picture.save(encoded, "WEBP", quality=QUALITY, method=2)
    return encoded.getvalue()


def thumbnails(gallery: Gallery) -> tuple[dict[tuple[int, int], dict[Place, bytes | str]], int]:
    """Layer -> what stands in each of its cells, for the layers within the budget; and the thumbnails' side."""
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
            found = encode([gallery.files[place] for place in places], side)
            made[layer] = {place: gallery.why(place) for place in gallery.places(layer)}
            made[layer].update(zip(places, found))
            spent += len(found) * _mean_size(found)
    return made, side


def _mean_size(encoded: Sequence[bytes | str]) -> float:
    """Bytes of a cell; one without a picture has none."""
    return sum(len(found) for found in encoded if isinstance(found, bytes)) / max(len(encoded), 1)

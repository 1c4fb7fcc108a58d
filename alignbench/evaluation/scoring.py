"""Score images, from a sweep or from any folder.

Files are read in threads. An image that cannot be read or scored is marked with its error; all others are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignbench.config import UserError, did_you_mean, parse_assignment
from alignbench.evaluation.folders import FolderImage, folder_images
from alignbench.plugins import Registry
from alignbench.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

T = TypeVar("T")

READERS = 8  # threads that decode images while the model scores others
PER_PASS = 128  # images in memory at a time


def in_threads(function: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
    """Yield ``map(function, *arguments)`` in order, computed in threads: Pillow decodes without holding the GIL."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(function, *arguments)


def read_image(file: Path) -> Image | str:
    """Return the image in RGB, or a text that says why it cannot be read."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many types, depending on what the file contains
        return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def score_rows(
    evaluator: Any, images: Sequence[Image | str], prompts: Sequence[Prompt], base: Sequence[Image | str] | None = None
) -> pd.DataFrame:
    """Return a row per image: the evaluator's metrics, "ok", "error", and "raw" if the evaluator keeps answers.

    ``base``: the images that a paired evaluator compares with. A text in place of an image is its error. If the
    evaluator fails, images are scored one by one, so that a bad image does not cost the others their scores. If it
    fails for every image, its error is raised.
    """
    import pandas as pd

    names = [metric.name for metric in evaluator.metrics]
    unreadable = [next((image for image in row if isinstance(image, str)), None) for row in zip(images, base or images)]
    good = [i for i, error in enumerate(unreadable) if error is None]
    columns = [images, prompts] if base is None else [images, prompts, base]
    scores = _score(evaluator, *([column[i] for i in good] for column in columns))
    scores = scores.set_index(pd.Index(good, dtype=int)).reindex(range(len(images)))
    frame = scores[names].astype(float)
    frame["ok"] = frame[names].notna().all(axis=1)
    reported = scores["error"] if "error" in scores else [None] * len(scores)
    errors = [_error(*causes) for causes in zip(unreadable, frame["ok"], reported)]
    frame["error"] = pd.Series(errors, frame.index, object)
    return frame.join(scores["raw"].astype(object)) if "raw" in scores else frame


def _error(unreadable: str | None, ok: bool, reported: Any) -> str | None:
    if unreadable is not None:
        return unreadable
    return None if ok else str(reported) if isinstance(reported, str) and reported else "the score is not a number"


def _score(evaluator: Any, *columns: Sequence[Any]) -> pd.DataFrame:
    """Return the evaluator's table. ``columns``: images, prompts and, if it is paired, the base model's images."""
    count = len(columns[0])
    try:
        return _checked(evaluator, evaluator.score(*columns), count)
    except UserError:
        raise
    except Exception:
        if count < 2:
            raise
        return _score_one_by_one(evaluator, *columns)


def _score_one_by_one(evaluator: Any, *columns: Sequence[Any]) -> pd.DataFrame:
    import pandas as pd

    rows, failures = [], []
    for row in zip(*columns):
        try:
            rows.append(_checked(evaluator, evaluator.score(*([item] for item in row)), 1))
        except Exception as error:
            failures.append(error)
            line = " ".join(str(error).split()) or type(error).__name__
            rows.append(pd.DataFrame({"error": [f"{type(error).__name__}: {line}"]}))
    if len(failures) == len(rows):
        raise failures[0]
    return pd.concat(rows, ignore_index=True)


def _checked(evaluator: Any, frame: pd.DataFrame, count: int) -> pd.DataFrame:
    missing = [metric.name for metric in evaluator.metrics if metric.name not in frame]
    if len(frame) != count or missing:
        what = f"no column '{missing[0]}'" if missing else f"{len(frame)} rows"
        raise UserError(f"evaluator {evaluator.name}: returned {what} for {count} images; return one row per image")
    return frame.reset_index(drop=True)


def base_images(evaluator: Any, images: Sequence[FolderImage], prompts: str | None = None) -> list[FolderImage] | None:
    """Return for each image that of the same prompt and index in ``evaluator.base``; None if it is not paired.

    Raise UserError unless both folders hold the same prompts and indices. ``prompts``: as for ``folder_images``.
    """
    if not evaluator.paired:
        return None
    where = f"{evaluator.name}.base"
    if evaluator.base is None:
        raise UserError(f"{where}: name the folder of the base model's images, {where}=FOLDER")
    ours = {(image.prompt.id, image.image_index): image for image in images}
    theirs = {(image.prompt.id, image.image_index): image for image in folder_images(Path(evaluator.base), prompts)}
    if unpaired := ours.keys() ^ theirs.keys():
        image = (ours | theirs)[min(unpaired)]
        what = f"'{image.prompt.text[:60]}', image {image.image_index}, is in only one of the two folders"
        raise UserError(f"{where}: {evaluator.base}: {what}; images are paired by prompt and index")
    return [theirs[image.prompt.id, image.image_index] for image in images]


def score_images(
    evaluator: Any, images: Sequence[FolderImage], base: Sequence[FolderImage] | None = None
) -> pd.DataFrame:
    """Return a row per image: file, prompt_id, tag, index, and the columns of ``score_rows``.

    The images of one prompt come together, wherever they stand in ``images``. ``base``: what ``base_images`` returns.
    """
    import pandas as pd

    order = {prompt: rank for rank, prompt in enumerate(dict.fromkeys(image.prompt.id for image in images))}
    images, *bases = (
        sorted(side, key=lambda image: order[image.prompt.id]) for side in (images, base) if side is not None
    )
    frames = []
    for rows in passes([image.prompt.id for image in images]):
        sides = [side[rows] for side in (images, *bases)]
        pixels = [list(in_threads(read_image, [image.file for image in side])) for side in sides]
        scores = score_rows(evaluator, pixels[0], [image.prompt for image in sides[0]], *pixels[1:])
        about = [(str(image.file), image.prompt.id, image.prompt.tag, image.image_index) for image in sides[0]]
        frames.append(pd.DataFrame(about, columns=["file", "prompt_id", "tag", "index"]).join(scores))
    return pd.concat(frames, ignore_index=True)


def passes(prompts: Sequence[str]) -> Iterator[slice]:
    """Yield slices of at most ``PER_PASS`` rows that keep a prompt's images together.

    ``prompts``: the prompt id of each row. Only a prompt with more than ``PER_PASS`` images is split.
    """
    start = 0
    while start < len(prompts):
        end = min(start + PER_PASS, len(prompts))
        if end < len(prompts):
            first = end
            while first > start and prompts[first - 1] == prompts[end]:
                first -= 1
            end = first if first > start else end
        yield slice(start, end)
        start = end


def make_evaluators(registry: Registry, names: str, assignments: Sequence[str]) -> list[Any]:
    """Return the evaluators that the command line names, their weights checked. Raise UserError for a mistake.

    ``names``: evaluators or metrics, ``hpsv2.1,pickscore``. ``assignments``: settings, ``pickscore.weights=shapes``.
    """
    chosen = evaluator_settings(registry, names, assignments)
    evaluators = [registry.make("evaluator", {"name": name, **given}, f"-e {name}") for name, given in chosen.items()]
    for evaluator in evaluators:
        evaluator.files()
    return evaluators


def evaluator_settings(registry: Registry, names: str, assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {evaluator: its assigned settings}. Arguments as for ``make_evaluators``."""
    known = {name: name for name in registry.names("evaluator")}
    for name in list(known):
        metrics = getattr(registry.get("evaluator", name, "-e"), "metrics", ())
        if isinstance(metrics, tuple):  # else a property, which depends on settings
            known |= {metric.name: name for metric in metrics}
    chosen = []
    for word in names.split(","):
        if word not in known:
            raise UserError(f"-e {word}: there is no such evaluator or metric{did_you_mean(word, sorted(known))}")
        chosen.append(known[word])
    settings: dict[str, dict[str, Any]] = {name: {} for name in dict.fromkeys(chosen)}
    for place, value in map(parse_assignment, assignments):
        name, _, field = place.partition(".")
        if known.get(name) not in settings or not field:
            raise UserError(f"{place}: write <evaluator>.<setting>=<value>; the evaluators are {', '.join(settings)}")
        settings[known[name]][field] = value
    return settings

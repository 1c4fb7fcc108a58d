"""Score images, from a sweep or from any folder.

Files are read in threads. An image that cannot be read or scored is marked with its error; all others are scored. The
scores of each pass are written before the next: whatever stops the work, the same call continues it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignbench.config import UserError, did_you_mean, parse_assignment
from alignbench.digests import content_id
from alignbench.evaluation.folders import FolderImage, folder_images
from alignbench.evaluation.reading import pixel_count, read_image
from alignbench.experiment.ids import score_content
from alignbench.plugins import Registry
from alignbench.prompts import Prompt
from alignbench.store.artefacts import Artefact
from alignbench.store.files import is_whole, read_frame, write_frame, write_json
from alignbench.store.score_gaps import describe

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

T = TypeVar("T")

READERS = 8  # threads that decode images while the model scores others
PER_PASS = 128  # images scored at a time, at most ...
PIXELS_PER_PASS = PER_PASS * 2**20  # ... their pixels ...
SECONDS_PER_PASS = 512.0  # ... and the time for them, as far as known: it is lost if the process is killed


def in_threads(function: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
    """Yield ``map(function, *arguments)`` in order, computed in threads: Pillow decodes without holding the GIL."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(function, *arguments)


def score_rows(
    evaluator: Any, images: Sequence[Image | str], prompts: Sequence[Prompt], base: Sequence[Image | str] | None = None
) -> pd.DataFrame:
    """Return a row per image: the evaluator's metrics, "ok", "error", "passing", and "raw" if it keeps answers.

    ``base``: the images that a paired evaluator compares with. A text in place of an image is its error. If the
    evaluator fails, images are scored one by one, so that a bad image does not cost the others their scores. If it
    fails for a plain image too, its error is raised.
    """
    import numpy as np
    import pandas as pd

    names = [metric.name for metric in evaluator.metrics]
    unreadable = [next((image for image in row if isinstance(image, str)), None) for row in zip(images, base or images)]
    good = [i for i, error in enumerate(unreadable) if error is None]
    columns = [images, prompts] if base is None else [images, prompts, base]
    scores = _score(evaluator, *([column[i] for i in good] for column in columns)) if good else pd.DataFrame()
    scores = scores.set_index(pd.Index(good, dtype=int)).reindex(range(len(images)))
    frame = scores.reindex(columns=names).astype(float)
    frame["ok"] = np.isfinite(frame.to_numpy()).all(axis=1)
    notes = scores.reindex(columns=["error", "passing"]).astype(object)
    errors = [_error(*causes) for causes in zip(unreadable, frame["ok"], notes["error"])]
    frame["error"] = pd.Series(errors, frame.index, object)
    frame["passing"] = notes["passing"].eq(True) & ~frame["ok"]
    return frame.join(scores["raw"].astype(object)) if "raw" in scores else frame


def _error(unreadable: str | None, ok: bool, reported: Any) -> str | None:
    if unreadable is not None:
        return unreadable
    return None if ok else str(reported) if isinstance(reported, str) and reported else "the score is not a number"


def _score(evaluator: Any, *columns: Sequence[Any]) -> pd.DataFrame:
    """Return the evaluator's table. ``columns``: images, prompts and, if it is paired, the base model's images."""
    try:
        return _checked(evaluator, evaluator.score(*columns), len(columns[0]))
    except UserError:
        raise
    except Exception:
        if not _scores_plain_image(evaluator, *columns):
            raise
        return _score_one_by_one(evaluator, *columns)


def _scores_plain_image(evaluator: Any, _: Sequence[Image], prompts: Sequence[Prompt], *base: Sequence[Image]) -> bool:
    from PIL import Image

    plain = [Image.new("RGB", (512, 512), "grey")]
    try:
        evaluator.score(plain, prompts[:1], *([plain] if base else []))
    except Exception:
        return False
    return True


def _score_one_by_one(evaluator: Any, *columns: Sequence[Any]) -> pd.DataFrame:
    """Return the evaluator's table, with the errors of the images for which it fails."""
    import pandas as pd

    rows: list[pd.DataFrame] = []
    for row in zip(*columns):
        try:
            rows.append(_checked(evaluator, evaluator.score(*([item] for item in row)), 1))
        except Exception as error:
            line = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
            rows.append(pd.DataFrame({"failed": [True], "error": [line], "passing": [_is_passing(error)]}))
    frame = pd.concat(rows, ignore_index=True)
    good = [i for i, row in enumerate(rows) if "failed" not in row]
    if evaluator.by_prompt and good:  # alone, an image has another score
        scored = _checked(evaluator, evaluator.score(*([column[i] for i in good] for column in columns)), len(good))
        frame = pd.concat([frame.drop(index=good), scored.set_index(pd.Index(good, dtype=int))]).sort_index()
    return frame.drop(columns="failed", errors="ignore")


def _is_passing(error: Exception) -> bool:
    """Return whether another try may succeed: memory, a disk or a network was not there (the images are in memory)."""
    return isinstance(error, (OSError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"  # torch's


def _checked(evaluator: Any, frame: pd.DataFrame, count: int) -> pd.DataFrame:
    missing = [metric.name for metric in evaluator.metrics if metric.name not in frame]
    if len(frame) != count or missing:
        what = f"no column '{missing[0]}'" if missing else f"{len(frame)} rows"
        raise UserError(f"evaluator {evaluator.name}: returned {what} for {count} images; return one row per image")
    return frame.reset_index(drop=True)


# -- pass by pass -----------------------------------------------------------------------------------------------------


class Kept:
    """Rows of a table of scores under way: a folder with a file for each pass. Each row has a ``key``."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which need not exist."""
        self.folder = folder

    def rows(self) -> pd.DataFrame:
        """Return the latest row for every key, by key."""
        import pandas as pd

        files = [file for file in sorted(self.folder.glob("pass-*.parquet")) if is_whole(file)]
        if not files:
            return pd.DataFrame({"passing": []}, dtype=bool)
        rows = pd.concat(map(read_frame, files), ignore_index=True)
        return rows.drop_duplicates("key", keep="last").set_index("key")

    def add(self, rows: pd.DataFrame) -> None:
        """Write the rows of a pass."""
        number = len(list(self.folder.glob("pass-*.parquet")))
        write_frame(self.folder / f"pass-{number:06}.parquet", rows)

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def score_kept(
    evaluator: Any,
    keys: Sequence[str],
    prompts: Sequence[str],
    files: Sequence[Sequence[Path]],
    kept: Kept,
    score: Callable[[list[int]], pd.DataFrame],
    after: Callable[[float], Any] = lambda share: None,
) -> pd.DataFrame:
    """Return the rows of all ``keys``, in order: those in ``kept``, and others from ``score``, pass by pass.

    Rows that failed for a passing reason are scored again. ``prompts``: the prompt id of each row, those of one prompt
    together; ``files``: its images; ``score``: from indices of rows to their table; ``after``: called with the share
    done after each pass.
    """
    known = kept.rows()
    settled = set(known.index[~known["passing"]])
    todo = [i for i, key in enumerate(keys) if key not in settled]
    if evaluator.by_prompt:
        unsettled = {prompts[i] for i in todo}
        todo = [i for i, prompt in enumerate(prompts) if prompt in unsettled]
    pixels = list(in_threads(lambda i: sum(map(pixel_count, files[i])), todo))
    for part in passes(evaluator, [prompts[i] for i in todo], pixels):
        rows = todo[part]
        kept.add(score(rows).assign(key=[keys[i] for i in rows]))
        after((len(keys) - len(todo) + part.stop) / len(keys))
    return kept.rows().loc[list(keys)].reset_index(drop=True)


def kept_beside(artefact: Artefact) -> Kept:
    """Return where the rows of a score file are kept until it is complete."""
    return Kept(artefact.product.with_suffix(".parts"))


def write_scores(artefact: Artefact, table: pd.DataFrame, about: dict[str, Any], log: str = "") -> str:
    """Write a score file, and ``about``, what made it. Return why some rows are to be scored again, "" if none are.

    That is recorded first, because a table without a failure beside it is done. ``log``: a path, for the record.
    """
    errors = list(table["error"][table["passing"]])
    again = f"{describe(errors, len(table))}; the same command scores only these again" if errors else ""
    if again:
        artefact.fail(again, log)
    write_json(artefact.product.with_suffix(".json"), about)
    write_frame(artefact.product, table.drop(columns="passing"))
    if not again:
        artefact.status.unlink(missing_ok=True)
        kept_beside(artefact).remove()
    return again


def passes(evaluator: Any, prompts: Sequence[str], pixels: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows to score at a time, within the limits above, that keep a prompt's images together.

    ``prompts``: the prompt id of each row; ``pixels``: those of its images. A prompt whose images exceed the limits is
    split, unless the evaluator scores images ``by_prompt``.
    """
    seconds = evaluator.seconds_per_image or 0.0

    def fits(start: int, end: int) -> bool:
        count = end - start
        return count <= min(PER_PASS, SECONDS_PER_PASS / (seconds or 1)) and sum(pixels[start:end]) <= PIXELS_PER_PASS

    start = 0
    while start < len(prompts):
        end = start + 1
        while end < len(prompts) and fits(start, end + 1):
            end += 1
        if end < len(prompts):
            first = last = end
            while first > start and prompts[first - 1] == prompts[end]:
                first -= 1
            while last < len(prompts) and prompts[last] == prompts[start]:
                last += 1
            end = first if first > start else last if evaluator.by_prompt else end
        yield slice(start, end)
        start = end


# -- a folder of images -----------------------------------------------------------------------------------------------


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


def score_with_all(
    evaluators: Sequence[Any],
    images: Sequence[FolderImage],
    bases: Sequence[Sequence[FolderImage] | None],
    parts: Path,
    registry: Registry,
) -> tuple[list[tuple[Any, pd.DataFrame]], list[Exception]]:
    """Return each evaluator with its table, and the errors of those that failed: they do not stop the others.

    ``bases``: what ``base_images`` returns for each; ``parts``: a folder for rows until the tables are complete.
    """
    scored, errors = [], []
    for evaluator, base in zip(evaluators, bases):
        kept = Kept(parts / f"{evaluator.name}-{content_id(score_content(evaluator, registry))}")
        try:
            scored.append((evaluator, score_images(evaluator, images, kept, base)))
        except Exception as error:
            errors.append(error)
    return scored, errors


def score_images(
    evaluator: Any, images: Sequence[FolderImage], kept: Kept, base: Sequence[FolderImage] | None = None
) -> pd.DataFrame:
    """Return a row per image: file, prompt_id, tag, index, and the columns of ``score_rows``.

    The images of one prompt come together, wherever they stand in ``images``. ``kept``: where rows are kept until the
    table is written; ``base``: what ``base_images`` returns.
    """
    import pandas as pd

    order = {prompt: rank for rank, prompt in enumerate(dict.fromkeys(image.prompt.id for image in images))}
    sides = [sorted(side, key=lambda image: order[image.prompt.id]) for side in (images, base) if side is not None]
    images = sides[0]
    files = [[image.file for image in row] for row in zip(*sides)]

    def score(rows: list[int]) -> pd.DataFrame:
        pixels = [list(in_threads(read_image, [side[i].file for i in rows])) for side in sides]
        scores = score_rows(evaluator, pixels[0], [images[i].prompt for i in rows], *pixels[1:])
        about = [(str(i.file), i.prompt.id, i.prompt.tag, i.image_index) for i in (images[i] for i in rows)]
        return pd.DataFrame(about, columns=["file", "prompt_id", "tag", "index"]).join(scores)

    prompts = [image.prompt.id for image in images]
    return score_kept(evaluator, _row_keys(evaluator, images, files), prompts, files, kept, score)


def _row_keys(evaluator: Any, images: Sequence[FolderImage], files: Sequence[Sequence[Path]]) -> list[str]:
    """Return hashes of all that a row depends on besides the evaluator: image, prompt, and the files' contents."""
    digests = in_threads(lambda row: [_digest(file) for file in row], files)
    keys = [_hash([*image, digest]) for image, digest in zip(images, digests)]
    if not evaluator.by_prompt:
        return keys
    together: dict[str, list[str]] = {}
    for image, key in zip(images, keys):
        together.setdefault(image.prompt.id, []).append(key)
    return [_hash([key, together[image.prompt.id]]) for image, key in zip(images, keys)]


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _digest(file: Path) -> str:
    """Return the hash of a file, "" if it cannot be read."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return ""


# -- evaluators by name -----------------------------------------------------------------------------------------------


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

"""Score pictures, a sweep's or anybody's: files are read in threads, a bad one is marked, every other one is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignbench.config import UserError, did_you_mean, parse_assignment
from alignbench.plugins import Registry
from alignbench.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
from alignbench.evaluation.folders import Picture, pictures

T = TypeVar("T")

READERS = 8  # threads that decode pictures while the model scores others
PER_PASS = 128  # pictures in memory at a time


def in_threads(function: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
    """``map`` in order, several at a time: pictures are decoded without holding Python's lock."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(function, *arguments)


def read_picture(file: Path) -> Image | str:
    """The file's picture in RGB, or what is wrong with it."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # whatever Pillow raises for whatever the file holds
        return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def score_rows(
    evaluator: Any, images: Sequence[Image | str], prompts: Sequence[Prompt], base: Sequence[Image | str] | None = None
) -> pd.DataFrame:
    """A row per picture: the evaluator's metrics, "ok", "error", and "raw" if it keeps answers.

    ``base``: of a paired evaluator, the pictures to compare with. Text in place of a picture is its error. If the
    evaluator fails, pictures are scored one by one, so that one bad picture costs no other its score. If it fails for
    all of them, the error is the evaluator's, and raised.
    """
    import pandas as pd

    names = [metric.name for metric in evaluator.metrics]
    wrong = [
        next((picture for picture in row if isinstance(picture, str)), None) for row in zip(images, base or images)
    ]
    good = [i for i, error in enumerate(wrong) if error is None]
    columns = [images, prompts] if base is None else [images, prompts, base]
    found = _scored(evaluator, *([column[i] for i in good] for column in columns))
    found = found.set_index(pd.Index(good, dtype=int)).reindex(range(len(images)))
    frame = found[names].astype(float)
    frame["ok"] = frame[names].notna().all(axis=1)
    told = found["error"] if "error" in found else [None] * len(found)
    frame["error"] = pd.Series(
        [_error(bad, ok, error) for bad, ok, error in zip(wrong, frame["ok"], told)], frame.index, object
    )
    return frame.join(found["raw"].astype(object)) if "raw" in found else frame


def _error(wrong: str | None, ok: bool, told: Any) -> str | None:
    if wrong is not None:
        return wrong
    return None if ok else str(told) if isinstance(told, str) and told else "the score is not a number"


def _scored(evaluator: Any, *columns: Sequence[Any]) -> pd.DataFrame:
    """``columns``: images, prompts, and of a paired evaluator the base model's images."""
    count = len(columns[0])
    try:
        return _checked(evaluator, evaluator.score(*columns), count)
    except UserError:
        raise
    except Exception:
        if count < 2:
            raise
        return _one_by_one(evaluator, *columns)


def _one_by_one(evaluator: Any, *columns: Sequence[Any]) -> pd.DataFrame:
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
        raise UserError(f"evaluator {evaluator.name}: made {what} for {count} images; one row per image")
    return frame.reset_index(drop=True)


def partners(evaluator: Any, chosen: Sequence[Picture], prompts: str | None = None) -> list[Picture] | None:
    """To each picture that of its prompt and index in the folder ``evaluator.base``; None if it is not paired.

    UserError unless both folders hold the same prompts and indices. ``prompts``: as for ``pictures``.
    """
    if not evaluator.paired:
        return None
    where = f"{evaluator.name}.base"
    if evaluator.base is None:
        raise UserError(f"{where}: name the folder of the base model's pictures, {where}=FOLDER")
    found = {(p.prompt.id, p.place): p for p in pictures(Path(evaluator.base), prompts)}
    wanted = {(p.prompt.id, p.place): p for p in chosen}
    if odd := [*(wanted.keys() - found.keys()), *(found.keys() - wanted.keys())]:
        one = (wanted | found)[min(odd)]
        what = f"'{one.prompt.text[:60]}', picture {one.place}, is in one of the two folders alone"
        raise UserError(f"{where}: {evaluator.base}: {what}; pictures are paired by prompt and index")
    return [found[p.prompt.id, p.place] for p in chosen]


def score_pictures(evaluator: Any, chosen: Sequence[Picture], base: Sequence[Picture] | None = None) -> pd.DataFrame:
    """A row per picture: file, prompt_id, tag, index, and what ``score_rows`` has of it. ``base``: its ``partners``."""
    import pandas as pd

    frames = []
    for part in passes([picture.prompt.id for picture in chosen]):
        here = chosen[part]
        columns = [list(in_threads(read_picture, [p.file for p in c[part]])) for c in (chosen, base) if c is not None]
        found = score_rows(evaluator, columns[0], [p.prompt for p in here], *columns[1:])
        about = [(str(p.file), p.prompt.id, p.prompt.tag, p.place) for p in here]
        frames.append(pd.DataFrame(about, columns=["file", "prompt_id", "tag", "index"]).join(found))
    return pd.concat(frames, ignore_index=True)


def passes(prompts: Sequence[str]) -> Iterator[slice]:
    """Slices of at most ``PER_PASS`` rows that part no run of equal prompt ids, unless one alone is longer."""
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


def judges(registry: Registry, names: str, assignments: Sequence[str]) -> list[Any]:
    """``hpsv2.1,pickscore`` (metrics or evaluators), with ``pickscore.weights=shapes``: proven usable."""
    chosen = evaluator_settings(registry, names, assignments)
    made = [registry.make("evaluator", {"name": name, **own}, f"-e {name}") for name, own in chosen.items()]
    for evaluator in made:
        evaluator.files()
    return made


def evaluator_settings(registry: Registry, names: str, assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Evaluators by name, with the settings that the assignments give them."""
    known = {name: name for name in registry.names("evaluator")}
    for name in list(known):
        metrics = getattr(registry.get("evaluator", name, "-e"), "metrics", ())
        if isinstance(metrics, tuple):  # of some evaluators, settings decide
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
            raise UserError(f"{place}: write <evaluator>.<setting>=<value>, of {', '.join(settings)}")
        settings[known[name]][field] = value
    return settings

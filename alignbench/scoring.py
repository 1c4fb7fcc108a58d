"""Score pictures, a sweep's or anybody's: files are read in threads, a bad one is marked, every other one is scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from alignbench.config import UserError, did_you_mean, parse_assignment, read_text
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, load_prompts, parse_prompt
from alignbench.stats import mean_interval
from alignbench.table import Cell, Column, Table, interval

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from PIL.Image import Image

T = TypeVar("T")

READERS = 8  # threads that decode pictures while the model scores others
PER_PASS = 128  # pictures in memory at a time
OURS = re.compile(r"([0-9a-f]{12})-(\d+)")  # stems of alignbench's own files: prompt id and index
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Picture(NamedTuple):
    """A picture of a prompt. ``place``: which of the prompt's pictures, from 0."""

    file: Path
    prompt: Prompt
    place: int


# -- a folder and its prompts -----------------------------------------------------------------------------------------


def pictures(folder: Path, prompts: str | None = None) -> list[Picture]:
    """The pictures of ``folder`` with their prompts. UserError if it is not clear which belongs to which.

    Without ``prompts``: GenEval's layout (``00000/metadata.jsonl`` beside ``00000/samples/*.png``). With a .jsonl file
    whose lines name a "file": these files. With any other list: files called ``<prompt id>-<index>``, as alignbench
    names its own, or else all files in the order of their names, the same number for every prompt.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the one that holds the pictures")
    if prompts is None:
        return _geneval(folder)
    if named := _named(folder, prompts):
        return named
    listed = load_prompts(prompts, "--prompts")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: there are no pictures in it ({', '.join(SUFFIXES)})")
    return _by_id(files, listed, prompts) or _in_order(files, listed, prompts)


def _geneval(folder: Path) -> list[Picture]:
    found = []
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        prompt = parse_prompt(read_text(metadata).strip(), f"{metadata}:1")
        samples = sorted(path for path in (metadata.parent / "samples").glob("*") if path.suffix.lower() in SUFFIXES)
        found += [Picture(file, prompt, index) for index, file in enumerate(samples)]
    if not found:
        raise UserError(
            f"{folder}: has no */metadata.jsonl with samples/ beside it; name the prompts with --prompts FILE"
        )
    return found


def _named(folder: Path, prompts: str) -> list[Picture]:
    """Of a .jsonl file with a "file" in every line; [] for other lists."""
    path = Path(prompts)
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    lines = read_text(path).splitlines()
    if not lines or '"file"' not in lines[0]:
        return []
    found, seen = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        prompt = parse_prompt(line, f"{path}:{number}")
        file = folder / str((prompt.metadata or {}).get("file"))
        if not file.is_file():
            raise UserError(f'{path}:{number}: "file": {file} is missing')
        seen[prompt.id] = seen.get(prompt.id, -1) + 1
        found.append(Picture(file, prompt, seen[prompt.id]))
    return found


def _by_id(files: Sequence[Path], prompts: Sequence[Prompt], name: str) -> list[Picture]:
    """Files called ``<prompt id>-<index>``; [] if none is."""
    known = {prompt.id: prompt for prompt in prompts}
    parts = [OURS.fullmatch(file.stem) for file in files]
    if not any(parts):
        return []
    for file, part in zip(files, parts):
        if part is None or part[1] not in known:
            raise UserError(f"{file}: is not of a prompt of {name}, as its neighbours' names are; give their own list")
    return [Picture(file, known[part[1]], int(part[2])) for file, part in zip(files, parts) if part]


def _in_order(files: Sequence[Path], prompts: Sequence[Prompt], name: str) -> list[Picture]:
    each, rest = divmod(len(files), len(prompts))
    if rest or not each:
        raise UserError(
            f"{files[0].parent}: {len(files)} pictures are no equal number for each of the {len(prompts)} prompts of "
            f'{name}; write a .jsonl file with "prompt" and "file" in every line'
        )
    return [Picture(file, prompts[i // each], i % each) for i, file in enumerate(files)]


# -- scores -----------------------------------------------------------------------------------------------------------


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


# -- the verb ---------------------------------------------------------------------------------------------------------


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


def tidy(scored: Sequence[tuple[Any, pd.DataFrame]]) -> pd.DataFrame:
    """One row per picture and metric."""
    import pandas as pd

    frames = []
    for evaluator, frame in scored:
        about = [name for name in ("file", "prompt_id", "tag", "index", "ok", "error", "raw") if name in frame]
        for metric in evaluator.metrics:
            part = frame[about].assign(evaluator=evaluator.name, metric=metric.name, score=frame[metric.name])
            frames.append(part)
    return pd.concat(frames, ignore_index=True)


def save(scored: Sequence[tuple[Any, pd.DataFrame]], out: Path, plugins: Sequence[str] = ()) -> list[Path]:
    """The tidy table as .csv or .parquet, and beside it what made it: settings, versions and weight files' hash."""
    from alignbench.spec import evaluator_content
    from alignbench.store import write, write_frame, write_json

    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: choose a name that ends in .csv or .parquet")
    table, about = tidy(scored), out.with_suffix(".json")
    write(out, table.to_csv(index=False)) if out.suffix == ".csv" else write_frame(out, table)
    registry = Registry(plugins)
    write_json(about, {evaluator.name: evaluator_content(evaluator, registry) for evaluator, _ in scored})
    return [out, about]


def summary(scored: Sequence[tuple[Any, pd.DataFrame]]) -> Table:
    """A row per metric: mean with its interval over prompts, and how many pictures could not be scored."""
    columns = [
        Column("metric"),
        Column("mean [95 % interval]"),
        Column("pictures"),
        Column("prompts"),
        Column("failed"),
    ]
    rows = []
    for evaluator, frame in scored:
        for metric in evaluator.metrics:
            values, tags = cube(frame, metric.name)
            found = mean_interval(values, tags if metric.by_task else None)
            shown = interval(found.mean, found.lo, found.hi, 4)
            counts = [len(frame), frame["prompt_id"].nunique(), int((~frame["ok"]).sum())]
            rows.append([Cell(f"{metric.name}, {metric.unit}"), Cell(shown), *(Cell(str(n)) for n in counts)])
    return Table(columns, rows)


def cube(frame: pd.DataFrame, metric: str) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """(P, I, 1) scores, nan where there is none, and (P,) tasks."""
    wide = frame.assign(score=frame[metric].where(frame["ok"])).pivot(
        index="prompt_id", columns="index", values="score"
    )
    tags = frame.drop_duplicates("prompt_id").set_index("prompt_id")["tag"].reindex(wide.index)
    return wide.to_numpy(float)[..., None], tags.to_numpy(str)

"""Import images and scores made elsewhere as a row of an *imported sweep* of the store: `alignbench import`.

The sweep is its manifest, ``sweeps/<name>.json``, which is written last; a row is a run without weights. Images are
copied into the store, so that a report needs nothing else. Imported scores keep the name of the project that made them;
``-e`` scores the images here. Whatever is not known (training seeds, costs, protocol settings) is the text "unknown".
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import structs

from alignbench.config import UserError, decode, parse_yaml, settings
from alignbench.digests import content_id
from alignbench.evaluation import scoring
from alignbench.evaluation.folders import FolderImage
from alignbench.evaluation.import_formats import UNKNOWN, ImportedImage, Source, read
from alignbench.experiment.document import sweeps
from alignbench.experiment.ids import score_content
from alignbench.experiment.spec import Protocol
from alignbench.plugins import Registry
from alignbench.store.artefacts import Artefact, Store, check_images, locked, set_aside
from alignbench.store.files import check_frame, read_frame, write, write_frame, write_json
from alignbench.store.locks import Lock
from alignbench.store.manifest import (
    UNTRAINED,
    Manifest,
    ManifestMetric,
    ManifestRun,
    ManifestScore,
    as_read,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    import pandas as pd

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of a sweep file
STATED, MEASURED = "as stated by the importer", "measured on the images"
SETTINGS = ("steps", "guidance", "size", "weights", "seed")  # of the protocol: those that a source or user may state
SHOWN = 3  # examples in a remark


class ImportRequest(NamedTuple):
    """The arguments of `alignbench import`.

    ``seed``: the training seed; None for one training run of unknown seed. ``command``: the command line as typed.
    """

    kind: str
    path: Path
    label: str
    sweep: str
    command: str
    seed: int | None = None
    base: bool = False
    trained_on: Sequence[str] = ()
    protocol: str = ""
    prompts: str | None = None
    images: Path | None = None
    replace: bool = False


def parse_request(arguments: Any) -> ImportRequest:
    """Return the request that command-line arguments make."""
    words = ["alignbench", "import", arguments.kind, arguments.path, *arguments.words, "--label", arguments.label]
    words += ["--sweep", arguments.sweep]
    named = {"prompts": "--prompts", "images": "--images", "evaluators": "-e", "trained_on": "--trained-on"}
    for name, option in {**named, "seed": "--seed", "protocol": "--protocol"}.items():
        value = getattr(arguments, name)
        words += [] if value in (None, "") else [option, str(value)]
    words += ["--base"] * arguments.base + [word for file in arguments.plugin for word in ("--plugin", file)]
    return ImportRequest(
        kind=arguments.kind,
        path=Path(arguments.path),
        label=arguments.label,
        sweep=arguments.sweep,
        command=shlex.join(words),
        seed=arguments.seed,
        base=arguments.base,
        trained_on=arguments.trained_on.split(",") if arguments.trained_on else (),
        protocol=arguments.protocol,
        prompts=arguments.prompts,
        images=Path(arguments.images) if arguments.images else None,
        replace=arguments.replace,
    )


class Inspection(NamedTuple):
    """The hash and size in pixels of an image file; ``sha256`` is "" and ``error`` a text if it cannot be read."""

    sha256: str
    size: tuple[int, int] | None
    error: str | None


def import_row(
    store: Store, request: ImportRequest, evaluators: Sequence[Any], registry: Registry
) -> tuple[ManifestRun, bool]:
    """Add the row to its sweep unless it is there. Return its run in the manifest, and whether anything changed.

    ``evaluators``: our own, to score the images with. Raise UserError for a mistake, before anything is written.
    """
    _check(store, request)
    source = read(request.kind, request.path, request.prompts, request.images)
    for evaluator in evaluators:
        if evaluator.paired:
            what = "compares with the base model's images of the same noise, which is unknown for imported images"
            raise UserError(f"-e {evaluator.name}: {what}; leave it out")
        evaluator.check([image.prompt for image in source.images])
    inspections = list(scoring.in_threads(_inspect, [image.file for image in source.images]))
    run = _run(request, source, inspections, evaluators, registry)
    store.open()
    with _sweep_lock(store, request.sweep):
        old = _read_sweep(store, request.sweep)
        runs = _merge(old.runs if old else [], run, request)
        _set_damaged_aside(store, run)
        own = [_own_scores(run.images, evaluator, registry, source.images, store) for evaluator in evaluators]
        _copy_images(store, run, source.images, inspections)
        for file, frame, about in [*_imported_scores(run.images, source), *filter(None, own)]:
            if not (store.root / file).is_file():
                write_json((store.root / file).with_suffix(".json"), about)
                write_frame(store.root / file, frame)
        new = _manifest(store, request.sweep, runs)
        if new != old:
            write_manifest(_path(store, request.sweep), new)
    return next(row for row in new.runs if row.id == run.id), new != old


def summary_lines(run: ManifestRun, changed: bool) -> list[str]:
    """Return the lines that tell the user what was imported."""
    metrics = [metric.name for score in run.scores for metric in score.metrics]
    head = f"{run.title}: {'imported' if changed else 'already imported, nothing changed'}; scores: "
    return [
        head + (", ".join(metrics) or "none (only a gallery; add scores with -e)"),
        *(f"  {r}" for r in run.remarks),
    ]


def _path(store: Store, sweep: str) -> Path:
    return store.root / "sweeps" / f"{sweep}.json"


def _read_sweep(store: Store, sweep: str) -> Manifest | None:
    """Return the sweep's manifest, or None if it has none yet."""
    path = _path(store, sweep)
    return read_manifest(path) if path.exists() else None


def _check(store: Store, request: ImportRequest) -> None:
    if not NAME.fullmatch(request.sweep):
        raise UserError(f"--sweep {request.sweep!r}: becomes a file name; use letters, digits, '_', '-' and '.'")
    other = _read_sweep(store, request.sweep)
    if request.sweep in sweeps() or (other is not None and not other.imported):
        raise UserError(f"--sweep {request.sweep}: this name belongs to a sweep that alignbench runs; choose another")
    if not request.label.strip() or not request.label.isprintable():
        raise UserError(f"--label {request.label!r}: give the row a name, on one line")
    if request.label != " ".join(request.label.split()):
        raise UserError(f"--label {request.label!r}: tables would not show its extra spaces; leave them out")
    if request.seed is not None and request.seed < 0:
        raise UserError(f"--seed {request.seed}: number training runs 0, 1, ...; leave --seed out if it is unknown")
    if request.base and (request.seed is not None or request.trained_on):
        raise UserError("--base: this is the model before any training; leave --seed and --trained-on out")


@contextmanager
def _sweep_lock(store: Store, sweep: str) -> Iterator[None]:
    """Hold the sweep's lock: an import reads its manifest and writes it again, so only one may run at a time."""
    lock = Lock(store.root / "locks" / f"import-{sweep}.lock")
    while not lock.try_acquire():
        time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


# -- the run ----------------------------------------------------------------------------------------------------------


def _run(
    request: ImportRequest,
    source: Source,
    inspections: Sequence[Inspection],
    evaluators: Sequence[Any],
    registry: Registry,
) -> ManifestRun:
    """Return the row as a run of a manifest, equal for equal content."""
    filed = {key: (value, f"from its {source.kind} file") for key, value in source.protocol.items()}
    stated = {key: (value, STATED) for key, value in _stated(request.protocol).items()}
    if clash := next((key for key in stated if key in filed and filed[key][0] != stated[key][0]), None):
        what = f"{request.path} says {filed[clash][0]}; leave it out"
        raise UserError(f"--protocol {clash}={stated[clash][0]}: {what}")
    size, remarks = _measured_size(inspections), list(source.remarks)
    if size is not None and "size" in stated and stated["size"][0] != size:
        raise UserError(f"--protocol size={stated['size'][0]}: the images are {size} pixels; leave it out")
    if size is not None and "size" in filed and filed["size"][0] != size:
        remarks.append(
            f"the images are {size} pixels, but its file says {filed['size'][0]}: are they the scored images?"
        )
    known = {"size": (size, MEASURED)} if size is not None else {}
    known |= filed | stated
    content = [
        (image.prompt.text, image.prompt.tag, image.image_index, inspection.sha256)
        for image, inspection in zip(source.images, inspections)
    ]
    image_set = content_id({"imported": content})
    imported = _imported_entries(image_set, source)
    return ManifestRun(
        id=f"imported-{content_id([request.label, request.seed, image_set, [entry.file for entry in imported]])}",
        label=request.label,
        method="imported",
        seed=UNTRAINED if request.seed is None else request.seed,
        published=not request.base and request.seed is None,  # compared as published weights are
        imported=source.kind,
        command=request.command,
        trained_on=list(request.trained_on),
        protocol={
            "prompts": request.prompts or UNKNOWN,
            "images_per_prompt": max(Counter((i.prompt.id, i.prompt_index) for i in source.images).values()),
            **{key: known[key][0] if key in known else UNKNOWN for key in SETTINGS},
        },
        known_from={key: known[key][1] for key in SETTINGS if key in known},
        remarks=[*remarks, *_gaps(source, inspections)],
        images=image_set,
        image_count=len(source.images),
        scores=[*imported, *(_own_entry(image_set, evaluator, registry) for evaluator in evaluators)],
    )


def _stated(text: str) -> dict[str, Any]:
    """Return the settings in ``steps=50,guidance=3.5``, checked like those of a sweep's protocol."""
    parts = [part.partition("=") for part in text.split(",")] if text else []
    for key, _, value in parts:
        if key not in SETTINGS or not value:
            raise UserError(f"--protocol {text}: write setting=value,...; the settings are {', '.join(SETTINGS)}")
    plain = {key: parse_yaml(value, f"--protocol {key}") for key, _, value in parts}
    checked = settings(decode(Protocol, {"prompts": "", **plain}, "--protocol"))
    return {key: checked[key] for key in plain}


def _inspect(file: Path) -> Inspection:
    image = scoring.read_image(file) if os.path.isfile(file) else f"there is no file {file}"
    if isinstance(image, str):
        return Inspection("", None, image)
    return Inspection(hashlib.sha256(file.read_bytes()).hexdigest(), image.size, None)


def _measured_size(inspections: Sequence[Inspection]) -> Any:
    """Return the pixels of square images' sides, "720 x 512" for other shapes, None if no image is readable."""
    sizes = {inspection.size for inspection in inspections if inspection.size}
    if len(sizes) > 1:
        return "of several sizes"
    return next((width if width == height else f"{width} x {height}" for width, height in sizes), None)


def _gaps(source: Source, inspections: Sequence[Inspection]) -> list[str]:
    """Return remarks that count unreadable images, repeated prompts, uneven numbers and missing scores."""
    images, remarks = source.images, []
    if errors := [inspection.error for inspection in inspections if inspection.error]:
        shown = "; ".join(errors[:SHOWN])
        remarks.append(f"{len(errors)} of {len(images)} images are missing or cannot be read: {shown}")
    prompts = {image.prompt.id for image in images}
    if repeats := len({(image.prompt.id, image.prompt_index) for image in images}) - len(prompts):
        remarks.append(f"its list repeats {repeats} prompts: all images of one prompt are counted together")
    counts = sorted(Counter(image.prompt.id for image in images).values())
    if counts[0] < counts[-1]:
        remark = f"its prompts have {counts[0]} to {counts[-1]} images and count alike in every mean"
        if source.kind == "geneval":
            remark += f"; if every image counts alike, as in GenEval's own script, it is {_official_mean(source):.4f}"
        remarks.append(remark)
    for key, metric in source.metrics.items():
        if missing := sum(image.scores.get(key) is None for image in images):
            remarks.append(f"{metric.name}: {missing} of {len(images)} images have no score")
    return remarks


def _official_mean(source: Source) -> float:
    """Return the mean of the task means over images of GenEval's verdicts, as its own summary has it."""
    by_task: dict[str, list[float]] = {}
    for image in source.images:
        by_task.setdefault(image.prompt.tag, []).append(image.scores["correct"] or 0.0)
    return fmean(map(fmean, by_task.values()))


# -- scores -----------------------------------------------------------------------------------------------------------


def _imported_scores(image_set: str, source: Source) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Yield (file, table, settings) for every metric of the source."""
    import pandas as pd

    for (key, metric), entry in zip(source.metrics.items(), _imported_entries(image_set, source)):
        scores = [image.scores.get(key) for image in source.images]
        about = [(image.prompt.id, image.prompt.tag, image.image_index) for image in source.images]
        frame = pd.DataFrame(about, columns=["prompt_id", "tag", "index"])
        frame[metric.name] = pd.Series(scores, dtype=float)
        frame["ok"] = frame[metric.name].notna()
        frame["error"] = pd.Series(["the source has no score" if x is None else None for x in scores], dtype=object)
        frame["raw"] = pd.Series([image.reason or None for image in source.images], dtype=object)
        yield entry.file, frame, entry.settings


def _imported_entries(image_set: str, source: Source) -> list[ManifestScore]:
    """Return a manifest entry for every metric of the source. File names contain a hash of the scores."""
    entries = []
    for key, metric in source.metrics.items():
        rows = [[image.prompt.id, image.image_index, image.scores.get(key), image.reason] for image in source.images]
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", metric.name).strip("-")
        file = f"scores/{image_set}/{slug}@{source.kind}-{content_id(rows)}.parquet"
        about = {"imported": source.kind, "key": key}
        entries.append(_entry(metric.name, "of unknown version", file, [metric], about))
    return entries


def _entry(evaluator: str, version: str, file: str, metrics: Sequence[Any], about: dict[str, Any]) -> ManifestScore:
    columns = [ManifestMetric(*metric) for metric in metrics]
    return ManifestScore(evaluator=evaluator, settings=about, version=version, file=file, metrics=columns, role=UNKNOWN)


def _own_entry(image_set: str, evaluator: Any, registry: Registry) -> ManifestScore:
    stem = f"{evaluator.name}@{evaluator.version}-{content_id(score_content(evaluator, registry))}"
    file = f"scores/{image_set}/{stem}.parquet"
    return _entry(evaluator.name, evaluator.version, file, evaluator.metrics, settings(evaluator))


def _own_scores(
    image_set: str, evaluator: Any, registry: Registry, images: Sequence[ImportedImage], store: Store
) -> tuple[str, pd.DataFrame, dict[str, Any]] | None:
    """Return (file, table, what made it) for one of our evaluators; None if the store has the file."""
    file = _own_entry(image_set, evaluator, registry).file
    if (store.root / file).is_file():
        return None
    files = [FolderImage(image.file, image.prompt, image.image_index) for image in images]
    frame = scoring.score_images(evaluator, files).drop(columns="file")
    return file, frame, {"evaluator": score_content(evaluator, registry) | {"name": evaluator.name}}


def _set_damaged_aside(store: Store, run: ManifestRun) -> None:
    """Have everything of a row made again that is in the store but damaged; say what."""
    images = store.images(run.images)
    checks: list[tuple[Artefact, Callable[[], Any]]] = [(images, partial(check_images, images))]
    for scores in (store.scores(run.images, Path(entry.file).name) for entry in run.scores):
        checks.append((scores, partial(check_frame, scores.product)))
    for artefact, check in checks:
        if what := set_aside(artefact, check):
            artefact.status.unlink(missing_ok=True)  # nothing has failed
            print(f"alignbench: {what}; imported again", file=sys.stderr)


# -- images -----------------------------------------------------------------------------------------------------------


def _copy_images(
    store: Store, run: ManifestRun, images: Sequence[ImportedImage], inspections: Sequence[Inspection]
) -> None:
    """Copy all readable images into the store. The image set's manifest has a row for the others too, with the error.

    Raise UserError if a file has changed since it was inspected.
    """
    import pandas as pd

    with locked(store.images(run.images)) as lock:
        if lock is None:
            return
        artefact, table = store.images(run.images), []
        for image, (sha256, _, error) in zip(images, inspections):
            name = f"{image.prompt.id}-{image.image_index}{image.file.suffix.lower()}" if sha256 else ""
            if name:
                data = image.file.read_bytes()
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise UserError(f"{image.file}: the file changed during the import; import it again")
                write(artefact.folder / name, data)
            prompt = image.prompt
            table.append((prompt.id, prompt.tag, prompt.text, image.image_index, name, sha256, error))
        names = ["prompt_id", "tag", "text", "index", "file", "sha256", "error"]
        lock.check()
        write_frame(artefact.product, pd.DataFrame(table, columns=names).astype({"error": object}))


# -- the manifest -----------------------------------------------------------------------------------------------------


def _merge(runs: Sequence[ManifestRun], run: ManifestRun, request: ImportRequest) -> list[ManifestRun]:
    """Return ``runs`` with ``run`` among them.

    Importing the same content again may add scores of our own. Raise UserError if the label has other content, unless
    the request says to replace it.
    """
    label, seed = run.label, run.seed
    names = {as_read(label), as_read(run.title)}
    if like := next(
        (old for old in runs if old.label != label and names & {*map(as_read, (old.label, old.title))}), None
    ):
        raise UserError(f"--label {label}: reads like the row '{like.label}'; use that label, or another one")
    same_label = [old for old in runs if old.label == label]
    if not request.replace and any(old.seed != seed and UNTRAINED in (old.seed, seed) for old in same_label):
        what = "has training runs with a seed and one without; number them all with --seed 0, 1, ..., or use --replace"
        raise UserError(f"--label {label}: {what}")
    replaced = [old for old in same_label if old.seed == seed or (request.replace and UNTRAINED in (old.seed, seed))]
    old = next((old for old in replaced if old.seed == seed), None)
    changes = _differences(old, run) if old else []
    if changes and not request.replace:
        raise UserError(
            f"--label {label}: is in the imported sweep '{request.sweep}' with other content ({', '.join(changes)}); "
            "use --replace, or choose another --label or --sweep"
        )
    if old and not changes:
        run = structs.replace(old, scores=_merge_scores(old.scores, run.scores, request.replace))
    merged = [other for other in runs if other not in replaced]
    for entry in run.scores:
        _check_same_evaluator(entry, [score for other in merged for score in other.scores])
    merged.insert(runs.index(replaced[0]) if replaced else len(runs), run)
    return merged


def _merge_scores(old: Sequence[ManifestScore], new: Sequence[ManifestScore], replace: bool) -> list[ManifestScore]:
    """Return the scores of one row, the new ones in place of old ones by the same evaluator."""
    if not replace:
        for entry in new:
            _check_same_evaluator(entry, old)
    return list({entry.evaluator: entry for entry in [*old, *new]}.values())


def _differences(old: ManifestRun, new: ManifestRun) -> list[str]:
    """Name what differs between two imports of one row, apart from our own scores and from paths as typed."""
    names = {"imported": "kind", "published": "--base", "trained_on": "--trained-on", "images": "images"}
    fields = [name for key, name in names.items() if getattr(old, key) != getattr(new, key)]
    protocols = [{key: run.protocol[key] for key in SETTINGS} for run in (old, new)]
    imported = [[entry.file for entry in run.scores if entry.imported] for run in (old, new)]
    return [*fields, *["protocol"] * (protocols[0] != protocols[1]), *["scores"] * (imported[0] != imported[1])]


def _check_same_evaluator(entry: ManifestScore, others: Sequence[ManifestScore]) -> None:
    """Raise UserError if a column would mix settings, versions or weights of one of our evaluators.

    The name of a score file contains their hash.
    """
    for other in others:
        same = other.evaluator == entry.evaluator
        if same and not entry.imported and Path(other.file).name != Path(entry.file).name:
            what = "other rows of this sweep were scored with other settings, weights or another version"
            raise UserError(f"-e {entry.evaluator}: {what}; use the same, or another --sweep")


def _manifest(store: Store, name: str, runs: Sequence[ManifestRun]) -> Manifest:
    """Return a manifest like that of a sweep that ran here. A setting that differs between rows is "differs"."""
    rewards = sorted({word for run in runs for word in run.trained_on})
    all_stated = all(run.trained_on or run.is_base for run in runs)
    protocols = [run.protocol for run in runs]
    shared = {
        key: value if all(p[key] == value for p in protocols) else "differs" for key, value in protocols[0].items()
    }
    return Manifest(
        name=name,
        sweep=name,
        imported=True,
        training_evaluator=", ".join([*rewards, *[UNKNOWN] * (not all_stated)]) or UNKNOWN,
        protocol=shared | {"images_per_prompt": max(p["images_per_prompt"] for p in protocols)},
        prompts=len(set().union(*(_prompt_ids(store, run.images) for run in runs))),
        cases=list(dict.fromkeys(run.label for run in runs)),
        runs=[
            structs.replace(run, scores=[_with_role(entry, rewards, all_stated) for entry in run.scores])
            for run in runs
        ],
    )


def _with_role(entry: ManifestScore, rewards: Sequence[str], all_stated: bool) -> ManifestScore:
    """Return the entry with its role.

    "train" if a row was trained on this metric, whoever scored it; "held-out" if all rows state other rewards.
    """
    names = {entry.evaluator.partition(" (")[0], entry.settings.get("key")}
    names |= {metric.name.partition(" (")[0] for metric in entry.metrics}
    role = "train" if names & set(rewards) else "held-out" if all_stated else UNKNOWN
    return structs.replace(entry, role=role)


def _prompt_ids(store: Store, image_set: str) -> set[str]:
    file = store.images(image_set).product
    return set(read_frame(file)["prompt_id"]) if file.is_file() else set()

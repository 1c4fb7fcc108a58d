"""Pictures and scores that were made elsewhere become a row of an *imported sweep* of the store: `alignbench import`.

The sweep is its manifest, ``sweeps/<name>.json``; a row is a run of it without weights. Pictures are copied into the
store, so that a report stands on its own; scores keep the name of whose they are, or are made here by ``-e``. What
nobody told is the text "unknown": seeds of training, costs, settings of the protocol. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import structs

from alignbench.config import UserError, decode, parse_yaml, settings
from alignbench.digests import content_id
from alignbench.evaluation import folders, scoring
from alignbench.evaluation.import_formats import UNKNOWN, Row, Source, read
from alignbench.experiment.document import sweeps
from alignbench.experiment.ids import evaluator_content
from alignbench.experiment.spec import Protocol
from alignbench.plugins import Registry
from alignbench.store.artefacts import Store, locked
from alignbench.store.files import write, write_frame, write_json
from alignbench.store.locks import Lock
from alignbench.store.manifest import (
    UNTRAINED,
    Manifest,
    ManifestMetric,
    ManifestRun,
    ManifestScore,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    import pandas as pd

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # as of a sweep file's
STATED, MEASURED = "as stated by the importer", "measured on the pictures"
SETTINGS = ("steps", "guidance", "size", "weights", "seed")  # of the protocol, that may be known or stated
SHOWN = 3  # examples in a remark


class Wanted(NamedTuple):
    """What was asked for. ``seed``: of training; None: one training of unknown seed. ``command``: as typed."""

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


def asked(arguments: Any) -> Wanted:
    """From the command line."""
    words = ["alignbench", "import", arguments.kind, arguments.path, *arguments.words, "--label", arguments.label]
    words += ["--sweep", arguments.sweep]
    named = {"prompts": "--prompts", "images": "--images", "evaluators": "-e", "trained_on": "--trained-on"}
    for name, option in {**named, "seed": "--seed", "protocol": "--protocol"}.items():
        value = getattr(arguments, name)
        words += [] if value in (None, "") else [option, str(value)]
    words += ["--base"] * arguments.base + [word for file in arguments.plugin for word in ("--plugin", file)]
    return Wanted(
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


class Look(NamedTuple):
    """A picture file. ``sha256`` "" and an ``error`` if it cannot be read."""

    sha256: str
    size: tuple[int, int] | None
    error: str | None


def add(store: Store, wanted: Wanted, judges: Sequence[Any], registry: Registry) -> tuple[ManifestRun, bool]:
    """Make the row, or see that it is there. Its run in the manifest, and whether anything changed.

    ``judges``: our own evaluators, which score the pictures.
    """
    _check(store, wanted)
    source = read(wanted.kind, wanted.path, wanted.prompts, wanted.images)
    for judge in judges:
        if judge.paired:
            what = "compares with the base model's pictures of the same noise, and of imported ones nobody knows that"
            raise UserError(f"-e {judge.name}: {what}; leave it out")
        judge.check([row.prompt for row in source.rows])
    looks = list(scoring.in_threads(_look, [row.picture for row in source.rows]))
    run = _run(wanted, source, looks, judges, registry)
    store.open()
    with _holding(store, wanted.sweep):
        old = _known(store, wanted.sweep)
        runs = _with(old.runs if old else [], run, wanted)
        own = [_judged(run.images, judge, registry, source.rows, store) for judge in judges]
        _keep_pictures(store, run, source.rows, looks)
        for file, frame, about in [*_foreign(run.images, source), *filter(None, own)]:
            if not (store.root / file).is_file():
                write_json((store.root / file).with_suffix(".json"), about)
                write_frame(store.root / file, frame)
        new = _manifest(store, wanted.sweep, runs)
        if new != old:
            write_manifest(_path(store, wanted.sweep), new)
    return next(found for found in new.runs if found.id == run.id), new != old


def told(run: ManifestRun, changed: bool) -> list[str]:
    """What the row is, in lines."""
    metrics = [metric.name for score in run.scores for metric in score.metrics]
    head = f"{run.title}: {'imported' if changed else 'is there already, nothing changed'}; scores: "
    return [head + (", ".join(metrics) or "none (a gallery alone; -e scores it)"), *(f"  {r}" for r in run.remarks)]


def _path(store: Store, sweep: str) -> Path:
    return store.root / "sweeps" / f"{sweep}.json"


def _known(store: Store, sweep: str) -> Manifest | None:
    """Read the sweep's manifest, if it has one already."""
    path = _path(store, sweep)
    return read_manifest(path) if path.exists() else None


def _check(store: Store, wanted: Wanted) -> None:
    if not NAME.fullmatch(wanted.sweep):
        raise UserError(f"--sweep {wanted.sweep!r}: becomes a file name; use letters, digits, '_', '-' and '.'")
    other = _known(store, wanted.sweep)
    if wanted.sweep in sweeps() or (other is not None and not other.imported):
        raise UserError(f"--sweep {wanted.sweep}: is the name of a sweep that alignbench makes; choose another")
    if not wanted.label.strip() or not wanted.label.isprintable():
        raise UserError(f"--label {wanted.label!r}: give the row a name, on one line")
    if wanted.seed is not None and wanted.seed < 0:
        raise UserError(f"--seed {wanted.seed}: number trainings 0, 1, ...; leave it out if it is not known")
    if wanted.base and (wanted.seed is not None or wanted.trained_on):
        raise UserError("--base: is the model before any training; leave --seed and --trained-on out")


@contextmanager
def _holding(store: Store, sweep: str) -> Iterator[None]:
    """One import into a sweep at a time: each reads its manifest and writes it again."""
    lock = Lock(store.root / "locks" / f"import-{sweep}.lock")
    while not lock.try_acquire():
        time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


# -- the run ----------------------------------------------------------------------------------------------------------


def _run(
    wanted: Wanted, source: Source, looks: Sequence[Look], judges: Sequence[Any], registry: Registry
) -> ManifestRun:
    """The row as a run of a manifest, the same for the same content."""
    told = {key: (value, f"from its {source.kind} file") for key, value in source.protocol.items()}
    stated = {key: (value, STATED) for key, value in _stated(wanted.protocol).items()}
    if clash := next((key for key in stated if key in told and told[key][0] != stated[key][0]), None):
        what = f"{wanted.path} says {told[clash][0]}; leave it out"
        raise UserError(f"--protocol {clash}={stated[clash][0]}: {what}")
    size, remarks = _measured(looks), list(source.remarks)
    if size is not None and "size" in stated and stated["size"][0] != size:
        raise UserError(f"--protocol size={stated['size'][0]}: the pictures are {size} pixels; leave it out")
    if size is not None and "size" in told and told["size"][0] != size:
        remarks.append(
            f"the pictures are {size} pixels, its file says {told['size'][0]}: are they those that were scored?"
        )
    known = {"size": (size, MEASURED)} if size is not None else {}
    known |= told | stated
    pictures = [(row.prompt.text, row.prompt.tag, row.place, look.sha256) for row, look in zip(source.rows, looks)]
    images = content_id({"imported": pictures})
    foreign = _foreign_entries(images, source)
    return ManifestRun(
        id=f"imported-{content_id([wanted.label, wanted.seed, images, [entry.file for entry in foreign]])}",
        label=wanted.label,
        method="imported",
        seed=UNTRAINED if wanted.seed is None else wanted.seed,
        published=not wanted.base and wanted.seed is None,  # compared as published weights are
        imported=source.kind,
        command=wanted.command,
        trained_on=list(wanted.trained_on),
        protocol={
            "prompts": wanted.prompts or UNKNOWN,
            "images_per_prompt": max(row.place for row in source.rows) + 1,
            **{key: known[key][0] if key in known else UNKNOWN for key in SETTINGS},
        },
        known_from={key: known[key][1] for key in SETTINGS if key in known},
        remarks=[*remarks, *_losses(source, looks)],
        images=images,
        scores=[*foreign, *(_own_entry(images, judge, registry) for judge in judges)],
    )


def _stated(text: str) -> dict[str, Any]:
    """``steps=50,guidance=3.5``, checked as a sweep's protocol is."""
    parts = [part.partition("=") for part in text.split(",")] if text else []
    for key, _, value in parts:
        if key not in SETTINGS or not value:
            raise UserError(f"--protocol {text}: write setting=value,..., of {', '.join(SETTINGS)}")
    plain = {key: parse_yaml(value, f"--protocol {key}") for key, _, value in parts}
    checked = settings(decode(Protocol, {"prompts": "", **plain}, "--protocol"))
    return {key: checked[key] for key in plain}


def _look(file: Path) -> Look:
    picture = scoring.read_picture(file) if os.path.isfile(file) else f"there is no file {file}"
    if isinstance(picture, str):
        return Look("", None, picture)
    return Look(hashlib.sha256(file.read_bytes()).hexdigest(), picture.size, None)


def _measured(looks: Sequence[Look]) -> Any:
    """Pixels of square pictures; "720 x 512" of others; None without any."""
    sizes = {look.size for look in looks if look.size}
    if len(sizes) > 1:
        return "of several sizes"
    return next((width if width == height else f"{width} x {height}" for width, height in sizes), None)


def _losses(source: Source, looks: Sequence[Look]) -> list[str]:
    """What is missing, counted."""
    remarks = []
    if bad := [look.error for look in looks if look.error]:
        remarks.append(f"{len(bad)} of {len(looks)} pictures are not there: {'; '.join(map(str, bad[:SHOWN]))}")
    twice = len({(row.prompt.id, row.group) for row in source.rows}) - len({row.prompt.id for row in source.rows})
    if twice:
        remarks.append(f"{twice} prompts are repeated in its list: their pictures count as further ones of one prompt")
    for key, metric in source.metrics.items():
        if lost := sum(row.scores.get(key) is None for row in source.rows):
            remarks.append(f"{metric.name}: {lost} of {len(looks)} pictures have no score")
    return remarks


# -- scores -----------------------------------------------------------------------------------------------------------


def _foreign(images: str, source: Source) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """(file, table, what it is) of every metric of the source."""
    import pandas as pd

    for (key, metric), entry in zip(source.metrics.items(), _foreign_entries(images, source)):
        found = [row.scores.get(key) for row in source.rows]
        about = [(row.prompt.id, row.prompt.tag, row.place) for row in source.rows]
        frame = pd.DataFrame(about, columns=["prompt_id", "tag", "index"])
        frame[metric.name] = pd.Series(found, dtype=float)
        frame["ok"] = frame[metric.name].notna()
        frame["error"] = pd.Series(["the source has no score" if x is None else None for x in found], dtype=object)
        frame["raw"] = pd.Series([row.words or None for row in source.rows], dtype=object)
        yield entry.file, frame, entry.settings


def _foreign_entries(images: str, source: Source) -> list[ManifestScore]:
    """Of every metric of the source, for the manifest. The file's name is of its content."""
    entries = []
    for key, metric in source.metrics.items():
        content = content_id([[row.prompt.id, row.place, row.scores.get(key), row.words] for row in source.rows])
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", metric.name).strip("-")
        file = f"scores/{images}/{slug}@{source.kind}-{content}.parquet"
        own = {"imported": source.kind, "key": key}
        entries.append(_entry(metric.name, "of unknown version", file, [metric], own))
    return entries


def _entry(evaluator: str, version: str, file: str, metrics: Sequence[Any], own: dict[str, Any]) -> ManifestScore:
    columns = [ManifestMetric(*metric) for metric in metrics]
    return ManifestScore(evaluator=evaluator, settings=own, version=version, file=file, metrics=columns, role=UNKNOWN)


def _own_entry(images: str, judge: Any, registry: Registry) -> ManifestScore:
    stem = f"{judge.name}@{judge.version}-{content_id(evaluator_content(judge, registry))}"
    file = f"scores/{images}/{stem}.parquet"
    return _entry(judge.name, judge.version, file, judge.metrics, settings(judge))


def _judged(
    images: str, judge: Any, registry: Registry, rows: Sequence[Row], store: Store
) -> tuple[str, pd.DataFrame, dict[str, Any]] | None:
    """(file, table, what made it) of one of our evaluators; None if the store has it."""
    file = _own_entry(images, judge, registry).file
    if (store.root / file).is_file():
        return None
    chosen = [folders.Picture(row.picture, row.prompt, row.place) for row in rows]
    frame = scoring.score_pictures(judge, chosen).drop(columns="file")
    return file, frame, {"evaluator": evaluator_content(judge, registry) | {"name": judge.name}}


# -- pictures ---------------------------------------------------------------------------------------------------------


def _keep_pictures(store: Store, run: ManifestRun, rows: Sequence[Row], looks: Sequence[Look]) -> None:
    """Copies of all readable pictures; of the others a row of the manifest that says why there is none."""
    import pandas as pd

    with locked(store.images(run.images)) as lock:
        if lock is None:
            return
        artefact, table = store.images(run.images), []
        for row, look in zip(rows, looks):
            name = f"{row.prompt.id}-{row.place}{row.picture.suffix.lower()}" if look.sha256 else ""
            if name:
                data = row.picture.read_bytes()
                if hashlib.sha256(data).hexdigest() != look.sha256:
                    raise UserError(f"{row.picture}: was changed while it was imported; import it again")
                write(artefact.folder / name, data)
            about = (row.prompt.id, row.prompt.tag, row.prompt.text, row.place, name, look.sha256, look.error)
            table.append(about)
        names = ["prompt_id", "tag", "text", "index", "file", "sha256", "error"]
        lock.check()
        write_frame(artefact.product, pd.DataFrame(table, columns=names).astype({"error": object}))


# -- the manifest -----------------------------------------------------------------------------------------------------


def _with(runs: Sequence[ManifestRun], run: ManifestRun, wanted: Wanted) -> list[ManifestRun]:
    """``runs`` and this one. The same content again may bring more of our own scores; other content is refused."""
    label, seed = run.label, run.seed
    same = [old for old in runs if old.label == label]
    if not wanted.replace and any(old.seed != seed and UNTRAINED in (old.seed, seed) for old in same):
        what = "has trainings with a seed and one without; number all of them with --seed 0, 1, ..., or say --replace"
        raise UserError(f"--label {label}: {what}")
    here = [old for old in same if old.seed == seed or (wanted.replace and UNTRAINED in (old.seed, seed))]
    old = next((old for old in here if old.seed == seed), None)
    differs = _differs(old, run) if old else []
    if differs and not wanted.replace:
        raise UserError(
            f"--label {label}: is in the imported sweep '{wanted.sweep}' with other content ({', '.join(differs)}); "
            "say --replace, or choose another --label or --sweep"
        )
    if old and not differs:
        run = structs.replace(old, scores=_more(old.scores, run.scores, wanted.replace))
    others = [other for other in runs if other not in here]
    for entry in run.scores:
        _refuse_other_judge(entry, [score for other in others for score in other.scores])
    others.insert(runs.index(here[0]) if here else len(runs), run)
    return others


def _more(old: Sequence[ManifestScore], new: Sequence[ManifestScore], replace: bool) -> list[ManifestScore]:
    """The scores of one row, with those that came now."""
    if not replace:
        for entry in new:
            _refuse_other_judge(entry, old)
    return list({entry.evaluator: entry for entry in [*old, *new]}.values())


def _differs(old: ManifestRun, new: ManifestRun) -> list[str]:
    """The parts in which two imports of one row differ, but for our own scores, and for paths as typed."""
    names = {"imported": "kind", "published": "--base", "trained_on": "--trained-on", "images": "pictures"}
    found = [name for key, name in names.items() if getattr(old, key) != getattr(new, key)]
    protocols = [{key: run.protocol[key] for key in SETTINGS} for run in (old, new)]
    foreign = [[entry.file for entry in run.scores if entry.imported] for run in (old, new)]
    return [*found, *["protocol"] * (protocols[0] != protocols[1]), *["scores"] * (foreign[0] != foreign[1])]


def _refuse_other_judge(entry: ManifestScore, known: Sequence[ManifestScore]) -> None:
    """One column, one judge: of our evaluators the file's name tells settings, version and weights."""
    for other in known:
        same = other.evaluator == entry.evaluator
        if same and not entry.imported and Path(other.file).name != Path(entry.file).name:
            what = "other rows of this sweep were scored with other settings, weights or version of it"
            raise UserError(f"-e {entry.evaluator}: {what}; use the same, or another --sweep")


def _manifest(store: Store, name: str, runs: Sequence[ManifestRun]) -> Manifest:
    """As of a sweep that was made here. A setting in which rows differ is said to, and told row by row."""
    rewards = sorted({word for run in runs for word in run.trained_on})
    told = all(run.trained_on or run.is_base for run in runs)
    protocols = [run.protocol for run in runs]
    shared = {
        key: value if all(p[key] == value for p in protocols) else "differs" for key, value in protocols[0].items()
    }
    return Manifest(
        name=name,
        sweep=name,
        imported=True,
        training_evaluator=", ".join([*rewards, *[UNKNOWN] * (not told)]) or UNKNOWN,
        protocol=shared | {"images_per_prompt": max(p["images_per_prompt"] for p in protocols)},
        prompts=len(set().union(*(_prompts(store, run.images) for run in runs))),
        cases=list(dict.fromkeys(run.label for run in runs)),
        runs=[structs.replace(run, scores=[_with_role(entry, rewards, told) for entry in run.scores]) for run in runs],
    )


def _with_role(entry: ManifestScore, rewards: Sequence[str], told: bool) -> ManifestScore:
    """ "train" if a row was said to be trained on it, whoever scored; "held-out" if it is known that none was."""
    names = {entry.evaluator.partition(" (")[0], entry.settings.get("key")}
    names |= {metric.name.partition(" (")[0] for metric in entry.metrics}
    role = "train" if names & set(rewards) else "held-out" if told else UNKNOWN
    return structs.replace(entry, role=role)


def _prompts(store: Store, images: str) -> set[str]:
    import pandas as pd

    file = store.images(images).product
    return set(pd.read_parquet(file, columns=["prompt_id"])["prompt_id"]) if file.is_file() else set()

"""Repetition of a finished run from its own records, and a bitwise comparison of the two where possible."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import structs

from alignbench.config import UserError, decode
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.ids import build
from alignbench.experiment.spec import Protocol, RunSpec
from alignbench.launch.display import Job, show
from alignbench.launch.local import settle
from alignbench.plugins import Registry
from alignbench.run import Task, code_snapshot, execute, provenance
from alignbench.store.artefacts import Artefact, Store, check_images
from alignbench.store.files import Damaged, check_file, read_json
from alignbench.store.manifest import ManifestRun, ManifestScore, read_manifest
from alignbench.store.stages import Stage

if TYPE_CHECKING:
    import pandas as pd

MEASURED = ["seconds", "peak_memory_bytes"]  # columns of a record that may differ between equal runs
ENVIRONMENT = ("python", "os", "devices", "driver", "cuda", "threads", "processes")  # may explain a difference


class Verdict(NamedTuple):
    """The comparison of one part of a run; ``differs`` says how it differs, "" if it is equal."""

    part: str
    size: str  # ``24 tensors``
    differs: str

    def __str__(self) -> str:
        return f"{self.part}: {f'differ: {self.differs}' if self.differs else f'equal ({self.size})'}"


# -- what was recorded ------------------------------------------------------------------------------------------------


def find_run(store: Store, name: str) -> str:
    """Return the id of the run that is called ``name``, or the only one that begins with it.

    Raise UserError, with the runs that exist, if there is none or more than one.
    """
    known = sorted(path.name for path in (store.root / "runs").glob("*") if path.is_dir())
    matches = [id for id in known if id == name] or [id for id in known if id.startswith(name)]
    if len(matches) != 1:
        what = f"there is no run '{name}'" if not matches else f"'{name}' begins the names of {len(matches)} runs"
        raise UserError(f"{store.root / 'runs'}: {what} (runs: {', '.join(matches or known) or 'none'})")
    return matches[0]


class RecordedRun(NamedTuple):
    """A run as the sweeps of a store record it."""

    run: ManifestRun
    limit: int | None  # number of prompts in the evaluation
    milestone_prompts: int | None  # number of prompts at milestones


def recorded_runs(store: Store, id: str) -> list[RecordedRun]:
    """Return the run as the store's sweeps record it, once for each of its image sets, with the scores of all sweeps.

    Raise UserError if no sweep has it, if it is not finished, or if an earlier version of this program did not record
    enough.
    """
    by_images: dict[str, RecordedRun] = {}
    for manifest in map(read_manifest, store.manifests()):
        for run in (run for run in manifest.runs if run.id == id):
            key = " ".join(image_set.images for image_set in run.image_sets)
            before = by_images.get(key, RecordedRun(run, manifest.subset, manifest.milestone_prompts))
            by_images[key] = before._replace(run=_with_scores(before.run, run))
    folder = store.root / "runs" / id
    if not by_images:
        raise UserError(f"{folder}: no sweep of this store has it, so its evaluation is not known")
    origin = read_json(folder / provenance.FILE) or {}
    runs = [recorded.run for recorded in by_images.values()]
    if "code" not in origin or not all(score.settings for run in runs for score in run.scores):
        raise UserError(f"{folder}: its records lack the code or an evaluator; run its sweep again")
    if not all(run.weights(store).done for run in runs):
        raise UserError(f"{folder}: is not finished, so there is nothing to compare with")
    return list(by_images.values())


def _with_scores(run: ManifestRun, other: ManifestRun) -> ManifestRun:
    """Return ``run`` with the additional scores of ``other``, which has the same image sets."""

    def both(one: Sequence[ManifestScore], two: Sequence[ManifestScore]) -> list[ManifestScore]:
        return [*one, *(score for score in two if score not in one)]

    milestones = [
        structs.replace(milestone, scores=both(milestone.scores, counterpart.scores))
        for milestone, counterpart in zip(run.milestones, other.milestones, strict=True)
    ]
    return structs.replace(run, scores=both(run.scores, other.scores), milestones=milestones)


def find_snapshot(store: Store, digest: str) -> code_snapshot.Snapshot | None:
    """Return the store's snapshot of the code with that digest; None if it has none."""
    for folder in sorted((store.root / code_snapshot.CODE).glob("[0-9a-f]*")):
        files = code_snapshot.read(folder)
        own = {name: content for name, content in files.items() if not name.startswith(code_snapshot.PLUGINS + "/")}
        if code_snapshot.digest(own) == digest:
            return code_snapshot.Snapshot(folder.resolve(), [], [])
    return None


def differences(origin: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has changed around the run since it was made, and may explain a difference."""
    now = provenance.made_by(provenance.code()) | provenance.machine(1)
    now["threads"] = origin["threads"]  # the rerun uses the same number
    for name, version in origin["packages"].items():
        if (installed := now["packages"].get(name)) != version:
            yield f"{name}: was {version}, is {installed}"
    for name in ENVIRONMENT:
        if origin.get(name) != now[name]:
            yield f"{name}: was {origin.get(name)}, is {now[name]}"


# -- the rerun --------------------------------------------------------------------------------------------------------


def rerun(store: Store, name: str, into: Path | None) -> Iterator[Verdict | str]:
    """Make a run again, with the running code, in the fresh store ``into`` (None: below ``reruns/``).

    Yield remarks, then a verdict on each part. Raise UserError if ``into`` is not empty.
    """
    id = find_run(store, name)
    records = recorded_runs(store, id)
    origin = read_json(store.root / "runs" / id / provenance.FILE) or {}
    yield from differences(origin)
    fresh = Store(into) if into else Store(_next(store.root / "reruns", id))
    if fresh.root.exists() and any(fresh.root.iterdir()):
        raise UserError(f"--into {fresh.root}: is not empty; name a folder that is empty or new")
    fresh.open()
    yield f"made again in {fresh.root}"
    failures = [reason for record in records if (reason := _make(store, fresh, record, origin))]
    yield from failures
    for n, record in enumerate(records):
        yield from compare(store, fresh, record.run, first=n == 0)


def original_code(store: Store, name: str) -> tuple[str, code_snapshot.Snapshot | None]:
    """Return a remark on the code that made a run and the snapshot of it to use; ("", None) if it is the running code.

    The snapshot is None if the store has none.
    """
    id = find_run(store, name)
    recorded_runs(store, id)
    original = (read_json(store.root / "runs" / id / provenance.FILE) or {})["code"]
    running = code_snapshot.digest(code_snapshot.package())
    if original == running:
        return "", None
    snapshot = find_snapshot(store, original)
    using = f"using the copy {snapshot.path}" if snapshot else "the store has no copy of the former: using the latter"
    return f"code: was {original}, is {running}; {using}", snapshot


def run_with(snapshot: code_snapshot.Snapshot, words: list[str]) -> int:
    """Run the command line with the code of a snapshot, and return its exit code."""
    sys.stdout.flush()
    return subprocess.run([*snapshot.python(), "-m", "alignbench.cli", *words], check=False).returncode


def _next(folder: Path, id: str) -> Path:
    """Return the first of ``<id>-1``, ``<id>-2``, ... that does not exist."""
    number = 1
    while (folder / f"{id}-{number}").exists():
        number += 1
    return folder / f"{id}-{number}"


def _make(store: Store, fresh: Store, recorded: RecordedRun, origin: Mapping[str, Any]) -> str:
    """Train, generate and score. Return the reason if something failed, else ""."""
    run, spec = recorded.run, decode(RunSpec, recorded.run.settings, "spec")
    folder = store.root / "runs" / run.id
    plugins = [str((folder / row["copy"]).resolve()) for row in origin["plugins"] if not row["installed"]]
    cell = PlannedRun(spec, run.seed, decode(Protocol, run.protocol, "protocol"), build(spec, Registry(plugins)))
    job = Job(cell, run.missing(fresh), fresh.root / "jobs" / "rerun.json")
    task = Task(
        store=str(fresh.root.resolve()),
        run=run.id,
        images=run.images,
        trains=run.trained,
        spec=run.settings,
        milestones=[(milestone.update, milestone.images) for milestone in run.milestones],
        evaluation={
            "protocol": run.protocol,
            "evaluators": [score.settings for score in run.scores],
            "limit": recorded.limit,
            "milestone_prompts": recorded.milestone_prompts,
        },
        scores=[_score(score) for score in run.scores],
        plugins=plugins,
        threads=origin["threads"],
        progress=str(job.progress.resolve()),
        command=sys.argv,
    )
    with show([job], 1) as display:
        display.begin(job)
        with display.in_background():
            result = execute(task._asdict())
        outcome = settle(job, result, str(fresh.root / "runs" / run.id / "log.txt"))
        display.end(job, outcome)
    return outcome.reason


def _score(score: ManifestScore) -> dict[str, Any]:
    """Return a score as a task holds it."""
    about = msgspec.to_builtins(score)
    return {"name": about.pop("evaluator"), **about, "file": Path(score.file).name}


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(store: Store, fresh: Store, run: ManifestRun, first: bool = True) -> Iterator[Verdict]:
    """Yield a verdict on every part that the store has. ``first``: compare the weights, too, which image sets share."""
    import pandas as pd

    repeated = {(artefact.stage, artefact.id): artefact for artefact in run.artefacts(fresh)}
    for old in run.artefacts(store):
        new: Artefact | None = repeated.get((old.stage, old.id))
        if not old.done or (old.stage is Stage.TRAIN and not (run.trained and first)):
            continue
        part = "weights" if old.stage is Stage.TRAIN else f"{old.stage.kind} {old.id}"
        if new is None or not new.done:
            yield Verdict(part, "", "not made")
        elif damage := _damage(old):
            yield Verdict(part, "", damage)
        elif old.stage is Stage.TRAIN:
            yield _weights(old.product, new.product)
            for update in (milestone.update for milestone in run.milestones):
                paths = [place.milestone(old.id, update) for place in (store, fresh)]
                if paths[0].is_file():
                    verdict = _weights(*paths) if paths[1].is_file() else Verdict("", "", "not made")
                    yield verdict._replace(part=f"weights after {update} updates")
            frames = (pd.read_parquet(it.folder / "train.parquet").drop(columns=MEASURED) for it in (old, new))
            yield _frames("records", *frames)
        elif old.stage is Stage.GENERATE:
            yield _images(part, old.folder, new.folder)
        else:
            yield _frames(part, pd.read_parquet(old.product), pd.read_parquet(new.product))


def _damage(old: Artefact) -> str:
    """Return what is damaged of a finished artefact, "" for nothing."""
    try:
        check_images(old) if old.stage is Stage.GENERATE else check_file(old.product)
    except Damaged as damage:
        return damage.what
    return ""


def _weights(old: Path, new: Path) -> Verdict:
    """Compare tensor by tensor, so that large files need little memory."""
    from safetensors import safe_open

    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        names = sorted(before.keys())
        if names != sorted(after.keys()):
            return Verdict("weights", "", "other tensors")
        different, largest = 0, 0.0
        for name in names:
            a, b = before.get_tensor(name), after.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return Verdict("weights", "", f"{name} is {b.dtype} {tuple(b.shape)}")
            if not bool((a == b).all()):
                different, largest = different + 1, max(largest, float((a.double() - b.double()).abs().max()))
    what = f"{different} of {len(names)} tensors, by at most {largest:.3g}"
    return Verdict("weights", f"{len(names)} tensors", what if different else "")


def _frames(part: str, old: pd.DataFrame, new: pd.DataFrame) -> Verdict:
    """Compare every value of every row, numbers and texts alike."""
    size = f"{len(old)} rows"
    if list(old.columns) != list(new.columns):
        return Verdict(part, size, f"other columns ({', '.join(sorted({*old.columns} ^ {*new.columns}))})")
    if len(old) != len(new):
        return Verdict(part, size, f"{size}, now {len(new)}")
    different = []
    for name in old.columns:
        a, b = old[name], new[name]
        if not bool(((a == b) | (a.isna() & b.isna())).all()):
            numeric = a.dtype.kind in "if" and b.dtype.kind in "if"
            how = f"by at most {(a - b).abs().max():.3g}" if numeric else f"in {(a != b).sum()} rows"
            different.append(f"{name} {how}")
    return Verdict(part, size, ", ".join(different))


def _images(part: str, old: Path, new: Path) -> Verdict:
    """Compare images by sha256, and those that differ by their largest difference in 255 levels."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    before, after = (pd.read_parquet(folder / "manifest.parquet").set_index("file") for folder in (old, new))
    if list(before.index) != list(after.index):
        return Verdict(part, "", "other images")
    different = [str(file) for file in before.index if before.loc[file, "sha256"] != after.loc[file, "sha256"]]
    levels = 0
    for file in different:
        a, b = (np.asarray(Image.open(folder / file).convert("RGB"), dtype=int) for folder in (old, new))
        levels = max(levels, int(np.abs(a - b).max()))
    what = f"{len(different)} of {len(before)}, by at most {levels} of 255 levels"
    return Verdict(part, f"{len(before)} images", what if different else "")

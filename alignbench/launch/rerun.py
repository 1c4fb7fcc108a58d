"""A finished run made again from its own records, and compared with what it was: bit by bit where that is possible."""

from __future__ import annotations

import os
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
from alignbench.launch.display import show
from alignbench.launch.local import settle
from alignbench.launch.pending import Job
from alignbench.plugins import Registry
from alignbench.run import Task, code_snapshot, execute, provenance
from alignbench.store.artefacts import Artefact, Store
from alignbench.store.files import read_json
from alignbench.store.manifest import ManifestRun, ManifestScore, read_manifest
from alignbench.store.stages import Stage

if TYPE_CHECKING:
    import pandas as pd

MEASURED = ["seconds", "peak_memory_bytes"]  # of a record: what two equal runs may differ in
ENVIRONMENT = ("python", "os", "devices", "driver", "cuda", "threads", "processes")  # what may explain a difference


class Verdict(NamedTuple):
    """One part of a run: ``differs`` says how; "" if it is the same."""

    part: str
    size: str  # ``24 tensors``
    differs: str

    def __str__(self) -> str:
        return f"{self.part}: {f'differ: {self.differs}' if self.differs else f'equal ({self.size})'}"


# -- what was recorded ------------------------------------------------------------------------------------------------


def find(store: Store, name: str) -> str:
    """The run of that name, or of the only name that begins so. UserError that lists what there is."""
    known = sorted(path.name for path in (store.root / "runs").glob("*") if path.is_dir())
    found = [id for id in known if id == name] or [id for id in known if id.startswith(name)]
    if len(found) != 1:
        what = f"there is no run '{name}'" if not found else f"'{name}' begins the names of {len(found)} runs"
        raise UserError(f"{store.root / 'runs'}: {what} (runs: {', '.join(found or known) or 'none'})")
    return found[0]


class Recorded(NamedTuple):
    """A run as sweeps have it. ``limit``: how many of the prompts, ``milestone_prompts``: at milestones."""

    run: ManifestRun
    limit: int | None
    milestone_prompts: int | None


def recorded(store: Store, id: str) -> list[Recorded]:
    """The run as every sweep of the store has it, once for each of its image sets, with the scores of all sweeps.

    UserError if no sweep has it, or if an earlier version of this program did not record enough.
    """
    found: dict[str, Recorded] = {}
    for manifest in map(read_manifest, store.manifests()):
        for run in (run for run in manifest.runs if run.id == id):
            key = " ".join(part.images for part in run.image_sets)
            before = found.get(key, Recorded(run, manifest.subset, manifest.milestone_prompts))
            found[key] = before._replace(run=_with_scores(before.run, run))
    if not found:
        raise UserError(f"{store.root / 'runs' / id}: no sweep of this store has it, its evaluation is not known")
    origin = read_json(store.root / "runs" / id / provenance.FILE) or {}
    runs = [each.run for each in found.values()]
    if "code" not in origin or not all(score.settings for run in runs for score in run.scores):
        raise UserError(f"{store.root / 'runs' / id}: its records lack the code or an evaluator; run its sweep again")
    if not all(run.weights(store).done for run in runs):
        raise UserError(f"{store.root / 'runs' / id}: is not finished, there is nothing to compare with")
    return list(found.values())


def _with_scores(run: ManifestRun, other: ManifestRun) -> ManifestRun:
    """Return ``run`` with the scores that ``other``, of the same image sets, has beside its own."""

    def both(one: Sequence[ManifestScore], two: Sequence[ManifestScore]) -> list[ManifestScore]:
        return [*one, *(score for score in two if score not in one)]

    milestones = [
        structs.replace(part, scores=both(part.scores, mine.scores))
        for part, mine in zip(run.milestones, other.milestones, strict=True)
    ]
    return structs.replace(run, scores=both(run.scores, other.scores), milestones=milestones)


def copy_of(store: Store, digest: str) -> code_snapshot.Snapshot | None:
    """The copy of the code with that digest in the store, if there is one."""
    for folder in sorted((store.root / code_snapshot.CODE).glob("[0-9a-f]*")):
        files = code_snapshot.read(folder)
        own = {name: content for name, content in files.items() if not name.startswith(code_snapshot.PLUGINS + "/")}
        if code_snapshot.digest(own) == digest:
            return code_snapshot.Snapshot(folder.resolve(), [], [])
    return None


def differences(origin: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was when the run was made, and may explain a difference."""
    here = provenance.made_by(provenance.code()) | provenance.machine(1)
    here["threads"] = origin["threads"]  # it is made again with as many
    for name, version in origin["packages"].items():
        if (mine := here["packages"].get(name)) != version:
            yield f"{name}: was {version}, is {mine}"
    for name in ENVIRONMENT:
        if origin.get(name) != here[name]:
            yield f"{name}: was {origin.get(name)}, is {here[name]}"


# -- made again -------------------------------------------------------------------------------------------------------


def rerun(store: Store, name: str, into: Path | None) -> Iterator[Verdict | str]:
    """Make a run again, with the running code, in the fresh store ``into`` (None: below ``reruns/``).

    Yields remarks, then a verdict on each part. UserError if ``into`` is not empty.
    """
    id = find(store, name)
    runs = recorded(store, id)
    origin = read_json(store.root / "runs" / id / provenance.FILE) or {}
    yield from differences(origin)
    fresh = Store(into) if into else Store(_next(store.root / "reruns", id))
    if fresh.root.exists() and any(fresh.root.iterdir()):
        raise UserError(f"--into {fresh.root}: there is something in it; name a folder that is empty or new")
    fresh.open()
    yield f"made again in {fresh.root}"
    failures = [reason for each in runs if (reason := _make(store, fresh, each, origin))]
    yield from failures
    for n, each in enumerate(runs):
        yield from compare(store, fresh, each.run, first=n == 0)


def elsewhere(store: Store, name: str) -> tuple[str, code_snapshot.Snapshot | None]:
    """A remark on the code that made a run, "" if it is the running one; and the copy of it to use, if there is one."""
    id = find(store, name)
    recorded(store, id)
    made = (read_json(store.root / "runs" / id / provenance.FILE) or {})["code"]
    mine = code_snapshot.digest(code_snapshot.package())
    if made == mine:
        return "", None
    copy = copy_of(store, made)
    using = f"using the copy {copy.path}" if copy else "the store has no copy of that: using this"
    return f"code: was {made}, is {mine}; {using}", copy


def again_with(copy: code_snapshot.Snapshot, words: list[str]) -> int:
    """The same command line by the code of a copy; its exit code."""
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "alignbench.cli", *words]
    return subprocess.run(command, env=os.environ | copy.environment(), check=False).returncode


def _next(folder: Path, id: str) -> Path:
    """The first of ``<id>-1``, ``<id>-2``, ... that is not there."""
    number = 1
    while (folder / f"{id}-{number}").exists():
        number += 1
    return folder / f"{id}-{number}"


def _make(store: Store, fresh: Store, recorded: Recorded, origin: Mapping[str, Any]) -> str:
    """Train, generate and score. Why not, if something failed; else ""."""
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
        milestones=[(part.update, part.images) for part in run.milestones],
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
    """As a worker gets it."""
    about = msgspec.to_builtins(score)
    return {"name": about.pop("evaluator"), **about, "file": Path(score.file).name}


# -- compared ---------------------------------------------------------------------------------------------------------


def compare(store: Store, fresh: Store, run: ManifestRun, first: bool = True) -> Iterator[Verdict]:
    """A verdict on every part that the store has. ``first``: of the run's image sets; weights are compared once."""
    import pandas as pd

    again = {(part.stage, part.id): part for part in run.artefacts(fresh)}
    for old in run.artefacts(store):
        new: Artefact | None = again.get((old.stage, old.id))
        if not old.done or (old.stage is Stage.TRAIN and not (run.trained and first)):
            continue
        part = "weights" if old.stage is Stage.TRAIN else f"{old.stage.kind} {old.id}"
        if new is None or not new.done:
            yield Verdict(part, "", "they were not made")
        elif old.stage is Stage.TRAIN:
            yield _weights(old.product, new.product)
            for update in (part.update for part in run.milestones):
                paths = [place.milestone(old.id, update) for place in (store, fresh)]
                if paths[0].is_file():
                    verdict = _weights(*paths) if paths[1].is_file() else Verdict("", "", "they were not made")
                    yield verdict._replace(part=f"weights after {update} updates")
            frames = (pd.read_parquet(it.folder / "train.parquet").drop(columns=MEASURED) for it in (old, new))
            yield _frames("records", *frames)
        elif old.stage is Stage.GENERATE:
            yield _images(part, old.folder, new.folder)
        else:
            yield _frames(part, pd.read_parquet(old.product), pd.read_parquet(new.product))


def _weights(old: Path, new: Path) -> Verdict:
    """Tensor by tensor, so that two large files need no memory."""
    from safetensors import safe_open

    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        names = sorted(before.keys())
        if names != sorted(after.keys()):
            return Verdict("weights", "", "other tensors")
        odd, largest = 0, 0.0
        for name in names:
            a, b = before.get_tensor(name), after.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return Verdict("weights", "", f"{name} is {b.dtype} {tuple(b.shape)}")
            if not bool((a == b).all()):
                odd, largest = odd + 1, max(largest, float((a.double() - b.double()).abs().max()))
    what = f"{odd} of {len(names)} tensors, by at most {largest:.3g}"
    return Verdict("weights", f"{len(names)} tensors", what if odd else "")


def _frames(part: str, old: pd.DataFrame, new: pd.DataFrame) -> Verdict:
    """Every value of every row; numbers and texts alike."""
    size = f"{len(old)} rows"
    if list(old.columns) != list(new.columns):
        return Verdict(part, size, f"other columns ({', '.join(sorted({*old.columns} ^ {*new.columns}))})")
    if len(old) != len(new):
        return Verdict(part, size, f"{size}, now {len(new)}")
    odd = []
    for name in old.columns:
        a, b = old[name], new[name]
        if not bool(((a == b) | (a.isna() & b.isna())).all()):
            number = a.dtype.kind in "if" and b.dtype.kind in "if"
            odd.append(f"{name} by at most {(a - b).abs().max():.3g}" if number else f"{name} in {(a != b).sum()} rows")
    return Verdict(part, size, ", ".join(odd))


def _images(part: str, old: Path, new: Path) -> Verdict:
    """By sha256; of pictures that differ, by how many of 255 levels."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    before, after = (pd.read_parquet(folder / "manifest.parquet").set_index("file") for folder in (old, new))
    if list(before.index) != list(after.index):
        return Verdict(part, "", "other pictures")
    odd = [str(file) for file in before.index if before.loc[file, "sha256"] != after.loc[file, "sha256"]]
    levels = 0
    for file in odd:
        a, b = (np.asarray(Image.open(folder / file).convert("RGB"), dtype=int) for folder in (old, new))
        levels = max(levels, int(np.abs(a - b).max()))
    what = f"{len(odd)} of {len(before)}, by at most {levels} of 255 levels"
    return Verdict(part, f"{len(before)} pictures", what if odd else "")

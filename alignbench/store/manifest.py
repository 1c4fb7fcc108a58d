"""The manifest of a sweep: every run with its settings and the ids of everything that it makes.

The store keeps it as ``sweeps/<name>.json``. Reports, plots and most verbs read it instead of the sweep file, which
needs no method, evaluator or torch. Manifests of earlier versions lack some keys, and those of imported sweeps have
others; ``read_manifest`` decodes all of them into one type, so that readers need not check which keys exist.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field, structs

from alignbench.config import UserError
from alignbench.store.artefacts import Artefact, Store, milestone_expected
from alignbench.store.files import write_json

UNTRAINED = -1  # the seed of a run that trains nothing
ROLES = ("train", "held-out", "check", "unknown")  # in the order of a table's columns; unknown: so are imported rows
IMPORTED_ONLY = ("imported", "command", "trained_on", "known_from", "remarks", "image_count")  # keys of a run
MADE_ONLY = ("milestone_prompts", "plugins")  # keys of a manifest that is not imported


class ManifestMetric(Struct, frozen=True):
    """Column of a score file, as its evaluator describes it."""

    name: str
    unit: str = ""
    higher_is_better: bool | None = True
    by_task: bool = False


class ManifestScore(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Scores of one image set by one evaluator."""

    evaluator: str
    settings: dict[str, Any] = field(default_factory=dict)  # empty: an early version did not record them
    version: str
    file: str  # below the store
    metrics: list[ManifestMetric]
    role: str  # one of ROLES
    base: str | None = None  # for a paired evaluator, id of the image set to compare with

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            structs.force_setattr(self, "role", "unknown")

    @property
    def imported(self) -> bool:
        return "imported" in self.settings


class ManifestMilestone(Struct, frozen=True):
    """Images and scores of a run's weights after ``update`` updates."""

    update: int
    images: str
    scores: list[ManifestScore]


class ManifestNote(Struct, frozen=True, omit_defaults=True):
    """Override that applies to a run: those of its settings that hold there, with its reason."""

    set: dict[str, Any]
    reason: str
    origin: str = ""  # of an inherited reason: where it was written, if other settings hold there


class ManifestRun(Struct, frozen=True, kw_only=True):
    """Run of a sweep. ``images``: id of its image set. The fields are in the order of the file."""

    id: str
    label: str  # the row of the table
    method: str
    seed: int  # training seed, or UNTRAINED
    published: bool = False  # True for published weights, whose training is unknown
    imported: str = ""  # kind of source, for instance "flowbp"; "" for a run made here
    command: str = ""  # the import command
    trained_on: list[str] = field(default_factory=list)  # rewards, as stated at import
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)  # early versions recorded only the sweep's
    known_from: dict[str, str] = field(default_factory=dict)  # imported protocol setting -> its source
    notes: list[ManifestNote] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # on the import
    images: str
    image_count: int = 0  # of an imported run; 0: all images of all prompts, as planned
    scores: list[ManifestScore]
    milestones: list[ManifestMilestone] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        """True if its weights come from training with a known seed."""
        return self.seed != UNTRAINED

    @property
    def is_base(self) -> bool:
        """True if its weights are those of the untrained base model."""
        return not self.trained and not self.published

    @property
    def title(self) -> str:
        """Label and seed, ``LeapAlign, seed 3``; only the label if it was not trained."""
        return f"{self.label}, seed {self.seed}" if self.trained else self.label

    @property
    def training(self) -> str:
        """Description of its training: "seed 3", "not trained" or "training unknown"."""
        return f"seed {self.seed}" if self.trained else "training unknown" if self.published else "not trained"

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """Training rewards, each as {evaluator, margin, weight}; empty for an imported run."""
        reward = self.settings.get("reward", [])
        return reward if isinstance(reward, list) else [reward]

    @property
    def image_sets(self) -> list[ManifestRun | ManifestMilestone]:
        """Objects that have ``images`` and ``scores``: the finished run, then its milestones."""
        return [self, *self.milestones]

    def weights(self, store: Store) -> Artefact:
        """Return the artefact of its weights."""
        return store.run(self.id, self.trained)

    def artefacts(self, store: Store) -> list[Artefact]:
        """Return all its artefacts in the order in which they are made; for an imported run, without weights."""
        sets: list[ManifestRun | ManifestMilestone] = [self]
        sets += (part for part in self.milestones if milestone_expected(store, self.id, part.update))
        bases = [score.base for score in self.scores if score.base is not None]
        images = dict.fromkeys([*(part.images for part in sets), *bases])
        scores = [store.scores(part.images, Path(score.file).name) for part in sets for score in part.scores]
        weights = [] if self.imported else [self.weights(store)]
        return [*weights, *map(store.images, images), *scores]

    def missing(self, store: Store) -> list[Artefact]:
        """Return the artefacts that are not made yet, in order."""
        return [part for part in self.artefacts(store) if not part.done]


class Manifest(Struct, frozen=True, kw_only=True, dict=True):
    """Resolved sweep. The fields are in the order of the file."""

    name: str
    sweep: str = ""  # what to type after `alignbench sweep`
    imported: bool = False
    world: str | None = None  # name of the model
    training_evaluator: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    subset: int | None = None  # number of evaluation prompts, if not all are used
    milestone_prompts: int | None = None
    rehearsal: bool = False
    prompts: int = 0  # number of evaluation prompts
    primary: str = ""  # metric that the sweep names as its primary measure
    cases: list[str] = field(default_factory=list)  # labels, in the order of the table
    runs: list[ManifestRun]
    plugins: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)  # lists of the sweep that it extends, and what replaces them
    remarks: list[str] = field(default_factory=list)  # warnings about its rows, as `validate` prints them

    def __post_init__(self) -> None:
        own = [run if run.protocol else structs.replace(run, protocol=self.protocol) for run in self.runs]
        structs.force_setattr(self, "runs", own)

    @cached_property
    def by_seed(self) -> dict[tuple[str, int], ManifestRun]:
        """Mapping (label, seed) -> run."""
        return {(run.label, run.seed): run for run in self.runs}

    @cached_property
    def rows(self) -> dict[str, list[ManifestRun]]:
        """Mapping label -> its runs, in the order of the file."""
        rows: dict[str, list[ManifestRun]] = {}
        for run in self.runs:
            rows.setdefault(run.label, []).append(run)
        return rows

    def only(self, runs: Sequence[ManifestRun]) -> Manifest:
        """Return the same sweep with only these runs."""
        return structs.replace(self, runs=list(runs))


def as_read(name: str) -> str:
    """Return the name of a row as readers take it, who see neither case, extra spaces nor invisible characters."""
    shown = "".join(c for c in unicodedata.normalize("NFKC", name) if c.isprintable() or c.isspace())
    return " ".join(shown.split()).casefold()


def read_manifest(path: Path) -> Manifest:
    """Decode a manifest, ignoring unknown keys. Raise UserError if the file is damaged or not a manifest."""
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path}: is damaged, or not a manifest: {what}; delete it and run its sweep again") from None
    if len(manifest.by_seed) < len(manifest.runs):
        twice = next(run.title for run in manifest.runs if manifest.by_seed[run.label, run.seed] is not run)
        raise UserError(f"{path}: two runs are called '{twice}'; give each row its own label and run its sweep again")
    for label, runs in manifest.rows.items():
        if len(methods := {(run.method, run.trained): run.method for run in runs}) > 1:
            what = f"the row '{label}' averages runs of several cases ({', '.join(methods.values())})"
            raise UserError(f"{path}: {what}; give each its own label and run its sweep again")
    return manifest


def changed_ids(path: Path, manifest: Manifest) -> str:
    """Return a line if runs of the manifest in ``path`` have other ids now, although no setting changed; else ""."""
    try:
        before = read_manifest(path).by_seed if path.exists() else {}
    except UserError:
        return ""
    pairs = [(before[key], run) for key, run in manifest.by_seed.items() if key in before]
    changed = sum(_ids(old) != _ids(new) for old, new in pairs)
    why = "a model, reward, prompt list or plug-in has other content, or an earlier version computed them"
    return f"{changed} of {len(pairs)} runs have other ids than at the last sweep: {why}" if changed else ""


def _ids(run: ManifestRun) -> list[Any]:
    return [(part.images, [score.file for score in part.scores]) for part in run.image_sets]


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_json(path, manifest_data(manifest))


def manifest_data(manifest: Manifest) -> dict[str, Any]:
    """Return the content of the file: all fields in order, except those that only the other kind of sweep has.

    Milestones, the primary measure, replaced lists and remarks are left out if there are none, as in earlier versions.
    """
    absent, absent_in_runs = (MADE_ONLY, ()) if manifest.imported else (("imported",), IMPORTED_ONLY)
    data = {key: value for key, value in msgspec.to_builtins(manifest).items() if key not in absent}
    data = {key: value for key, value in data.items() if value or key not in ("primary", "replaced", "remarks")}
    data["runs"] = [
        {key: value for key, value in run.items() if key not in absent_in_runs and (value or key != "milestones")}
        for run in data["runs"]
    ]
    return data

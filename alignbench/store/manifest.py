"""The manifest of a sweep: every run with its settings, and the ids of all that it makes.

It lies in the store as ``sweeps/<name>.json``, and reports, plots and most verbs read it in place of the sweep file:
that takes no method, evaluator or torch. Manifests of earlier versions lack some keys, those of imported sweeps have
others; ``read_manifest`` decodes all of them into one type, so that no reader asks what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field, structs

from alignbench.config import UserError
from alignbench.store.artefacts import Artefact, Store, reached
from alignbench.store.files import write_json

UNTRAINED = -1  # the seed of a run that trains nothing
IMPORTED_ONLY = ("imported", "command", "trained_on", "known_from", "remarks")  # keys of a run
MADE_ONLY = ("milestone_prompts", "plugins")  # keys of a manifest that is not imported


class ManifestMetric(Struct, frozen=True):
    """One column of a score file, as its evaluator describes it."""

    name: str
    unit: str = ""
    higher_is_better: bool | None = True
    by_task: bool = False


class ManifestScore(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One evaluator's scores of one image set."""

    evaluator: str
    settings: dict[str, Any] = field(default_factory=dict)  # empty: an early version did not record them
    version: str
    file: str  # below the store
    metrics: list[ManifestMetric]
    role: str  # "train", "held-out", "check" or "unknown"
    base: str | None = None  # id of the image set that a paired evaluator compares with

    @property
    def imported(self) -> bool:
        return "imported" in self.settings


class ManifestMilestone(Struct, frozen=True):
    """The images and scores of a run's weights after ``update`` updates."""

    update: int
    images: str
    scores: list[ManifestScore]


class ManifestNote(Struct, frozen=True):
    """An override that applies to a run, and its reason."""

    set: dict[str, Any]
    reason: str


class ManifestRun(Struct, frozen=True, kw_only=True):
    """One run of a sweep. ``images``: id of its image set. The order of the fields is that of the file."""

    id: str
    label: str  # the row of the table
    method: str
    seed: int  # of training, or UNTRAINED
    published: bool = False  # somebody else's weights, with training of which nothing is known
    imported: str = ""  # the kind of source, as "flowbp"; "" for a run that is made here
    command: str = ""  # of its import
    trained_on: list[str] = field(default_factory=list)  # as stated at its import
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)  # the sweep's, where an early version recorded no other
    known_from: dict[str, str] = field(default_factory=dict)  # imported protocol setting -> who says so
    notes: list[ManifestNote] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # on its import
    images: str
    scores: list[ManifestScore]
    milestones: list[ManifestMilestone] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        """Tell whether training with a known seed made its weights."""
        return self.seed != UNTRAINED

    @property
    def is_base(self) -> bool:
        """Tell whether its weights are the base model's own: trained neither here nor by somebody else."""
        return not self.trained and not self.published

    @property
    def title(self) -> str:
        """``LeapAlign, seed 3``; the label alone if it was not trained."""
        return f"{self.label}, seed {self.seed}" if self.trained else self.label

    @property
    def training(self) -> str:
        """``seed 3``, "not trained" or "training unknown"."""
        return f"seed {self.seed}" if self.trained else "training unknown" if self.published else "not trained"

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """Every reward of its training as {evaluator, margin, weight}; none if it was imported."""
        found = self.settings.get("reward", [])
        return found if isinstance(found, list) else [found]

    @property
    def image_sets(self) -> list[ManifestRun | ManifestMilestone]:
        """Everything that has ``images`` and ``scores``: the run at its end, then its milestones."""
        return [self, *self.milestones]

    def weights(self, store: Store) -> Artefact:
        return store.run(self.id, self.trained)

    def artefacts(self, store: Store) -> list[Artefact]:
        """List all that it consists of, in the order in which it is made. Imported weights are elsewhere."""
        sets: list[ManifestRun | ManifestMilestone] = [self]
        sets += (part for part in self.milestones if reached(store, self.id, part.update))
        bases = [score.base for score in self.scores if score.base is not None]
        images = dict.fromkeys([*(part.images for part in sets), *bases])
        scores = [store.scores(part.images, Path(score.file).name) for part in sets for score in part.scores]
        weights = [] if self.imported else [self.weights(store)]
        return [*weights, *map(store.images, images), *scores]

    def missing(self, store: Store) -> list[Artefact]:
        """List what of it is not made yet."""
        return [part for part in self.artefacts(store) if not part.done]


class Manifest(Struct, frozen=True, kw_only=True, dict=True):
    """A sweep, resolved. The order of the fields is that of the file."""

    name: str
    sweep: str = ""  # what to type after `alignbench sweep`
    imported: bool = False
    world: str | None = None  # the model
    training_evaluator: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    subset: int | None = None  # evaluation prompts, where not all are used
    milestone_prompts: int | None = None
    rehearsal: bool = False
    prompts: int = 0  # of the evaluation
    cases: list[str] = field(default_factory=list)  # labels, in the order of the table
    runs: list[ManifestRun]
    plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = [run if run.protocol else structs.replace(run, protocol=self.protocol) for run in self.runs]
        structs.force_setattr(self, "runs", own)

    @cached_property
    def by_seed(self) -> dict[tuple[str, int], ManifestRun]:
        """(label, seed) -> the run."""
        return {(run.label, run.seed): run for run in self.runs}

    @cached_property
    def rows(self) -> dict[str, list[ManifestRun]]:
        """Label -> its runs, in the order of the file."""
        found: dict[str, list[ManifestRun]] = {}
        for run in self.runs:
            found.setdefault(run.label, []).append(run)
        return found

    def only(self, runs: Sequence[ManifestRun]) -> Manifest:
        """Return the same sweep with these runs alone."""
        return structs.replace(self, runs=list(runs))


def read_manifest(path: Path) -> Manifest:
    """Decode a manifest. UserError if the file is not a whole one; keys that nobody knows are passed over."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path}: is damaged, or not a manifest: {what}; delete it, and run its sweep again") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_json(path, plain(manifest))


def plain(manifest: Manifest) -> dict[str, Any]:
    """Return what the file holds: all fields in their order, except those that only the other kind of sweep has."""
    absent, of_runs = (MADE_ONLY, ()) if manifest.imported else (("imported",), IMPORTED_ONLY)
    found = {key: value for key, value in msgspec.to_builtins(manifest).items() if key not in absent}
    found["runs"] = [
        {key: value for key, value in run.items() if key not in of_runs and (value or key != "milestones")}
        for run in found["runs"]
    ]
    return found

"""Artefacts of the store: training runs, image sets and scores, each done or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignbench.config import UserError
from alignbench.store.files import cannot_write, read_json, write_json
from alignbench.store.locks import Lock, _now, held, holder
from alignbench.store.stages import Stage


@dataclass(frozen=True)
class Artefact:
    """A run, an image set or a score file. ``product``: the file whose presence makes it done."""

    stage: Stage  # that makes it
    id: str
    folder: Path
    product: Path
    status: Path  # {"state": "done" | "failed", "reason", "log", "time"}
    lock: Path

    @property
    def done(self) -> bool:
        return self.product.exists() and (self.stage is not Stage.TRAIN or self.state == "done")

    @property
    def state(self) -> str | None:
        return (read_json(self.status) or {}).get("state")

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None after a success, and before any attempt."""
        found = read_json(self.status) or {}
        return found.get("reason", "no reason was recorded") if found.get("state") == "failed" else None

    @property
    def busy(self) -> bool:
        """Is somebody making it right now?"""
        return holder(self.lock) is not None

    def succeed(self, **facts: Any) -> None:
        """Say that it is done: the last thing that is written."""
        write_json(self.status, {"state": "done", "time": _now(), **facts})

    def fail(self, reason: str, log: str) -> None:
        write_json(self.status, {"state": "failed", "reason": reason, "log": log, "time": _now()})


class Store:
    """The folder and what is where in it."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def run(self, id: str, trains: bool) -> Artefact:
        """``trains``: a run that trained has weights; one that trains nothing is its status alone."""
        folder = self.root / "runs" / id
        status = folder / "status.json"
        product = folder / "weights.safetensors" if trains else status
        return Artefact(Stage.TRAIN, id, folder, product, status, self._lock(id))

    def milestone(self, run: str, update: int) -> Path:
        """The weights that a run had after ``update`` updates, in the same form as those of its end."""
        return self.root / "runs" / run / milestone_file(update)

    def images(self, id: str) -> Artefact:
        folder = self.root / "images" / id
        return Artefact(
            Stage.GENERATE, id, folder, folder / "manifest.parquet", folder / "status.json", self._lock(f"images-{id}")
        )

    def scores(self, images: str, file: str) -> Artefact:
        """``file``: ``<evaluator>@<version>-<id>.parquet``."""
        folder = self.root / "scores" / images
        stem = file.removesuffix(".parquet")
        return Artefact(
            Stage.SCORE,
            f"{images}/{stem}",
            folder,
            folder / file,
            folder / f"{stem}.status.json",
            self._lock(f"scores-{images}-{stem}"),
        )

    @property
    def tables(self) -> Path:
        """Where a sweep's scores and records of training are kept as one file each, in a folder of its name."""
        return self.root / "tables"

    @property
    def embeddings(self) -> Path:
        """Where prompts' embeddings are, in a folder for each way to compute them."""
        return self.root / "embeddings"

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def check_folder(self) -> Path:
        """Return the store's folder, or the folder that it would be made in. Raise UserError if a file is there."""
        place = self.root.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            what = "it is a file" if place == self.root.absolute() else f"{place} is not a folder"
            raise UserError(f"--store {self.root}: cannot be used, {what}; name a folder")
        return place

    def check_writable(self) -> None:
        """Raise UserError unless files can be made in the store. Write nothing."""
        place = self.check_folder()
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--store {self.root}: {place} is not writable; choose another folder")

    def open(self) -> None:
        """Make the folder, and prove that a file can be written. UserError otherwise."""
        self.check_writable()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"alignbench")
        except OSError as error:
            raise UserError(f"--store {cannot_write(self.root, error)}") from None

    def manifests(self) -> list[Path]:
        """Those of every sweep that was run here, latest first."""
        found = (self.root / "sweeps").glob("*.json")
        return sorted(found, key=lambda path: -path.stat().st_mtime)


def milestone_file(update: int) -> str:
    return f"weights-{update:06}.safetensors"


@contextmanager
def locked(artefact: Artefact, waiting: Callable[[str], Any] = lambda holder: None) -> Iterator[Lock | None]:
    """Hold the artefact's lock; None if it was done meanwhile. ``waiting`` is told who holds it, every second."""
    with held(artefact.lock, waiting, lambda: artefact.done) as lock:
        yield None if artefact.done else lock


def reached(store: Store, run: str, update: int) -> bool:
    """False if the run of that id has ended before that update: then there is nothing of it, and nothing is missing."""
    status = read_json(store.run(run, True).status) or {}
    return status.get("state") != "done" or update <= status.get("updates", update)

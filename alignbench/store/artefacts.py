"""Artefacts of the store: runs, image sets and scores, each either done or absent."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignbench.config import UserError
from alignbench.store.files import Damaged, cannot_write, read_frame, read_json, write_json
from alignbench.store.locks import Lock, held, holder, timestamp
from alignbench.store.stages import Stage


@dataclass(frozen=True)
class Artefact:
    """Run, image set or score file. ``product``: the file whose presence marks it as done."""

    stage: Stage  # the stage that makes it
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
        """Reason why the last attempt failed; None after a success and before any attempt."""
        status = read_json(self.status) or {}
        return str(status.get("reason") or "no reason was recorded") if status.get("state") == "failed" else None

    @property
    def busy(self) -> bool:
        """True while a live process is making it."""
        return holder(self.lock) is not None

    def succeed(self, **facts: Any) -> None:
        """Record that it is done, with ``facts``. Must be written last."""
        write_json(self.status, {"state": "done", "time": timestamp(), **facts})

    def fail(self, reason: str, log: str) -> None:
        """Record that it failed. ``log``: path of the log that says more."""
        write_json(self.status, {"state": "failed", "reason": reason, "log": log, "time": timestamp()})


class Store:
    """Folder of results and the places of its artefacts."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def run(self, id: str, trains: bool) -> Artefact:
        """Return the run ``id``. ``trains``: whether it has weights; a run that trains nothing is only its status."""
        folder = self.root / "runs" / id
        status = folder / "status.json"
        product = folder / "weights.safetensors" if trains else status
        return Artefact(Stage.TRAIN, id, folder, product, status, self._lock(id))

    def milestone(self, run: str, update: int) -> Path:
        """Return the path of a run's weights after ``update`` updates; the file has the format of the final weights."""
        return self.root / "runs" / run / milestone_file(update)

    def images(self, id: str) -> Artefact:
        """Return the image set ``id``."""
        folder = self.root / "images" / id
        return Artefact(
            Stage.GENERATE, id, folder, folder / "manifest.parquet", folder / "status.json", self._lock(f"images-{id}")
        )

    def scores(self, images: str, file: str) -> Artefact:
        """Return the scores of an image set. ``file``: ``<evaluator>@<version>-<id>.parquet``."""
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
        """Folder of consolidated tables: per sweep a folder with all its scores and training records, one file each."""
        return self.root / "tables"

    @property
    def embeddings(self) -> Path:
        """Folder of prompt embeddings, with a subfolder for each way to compute them."""
        return self.root / "embeddings"

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def check_folder(self) -> Path:
        """Return the store's folder, or the one that it would be made in. Raise UserError if a file is there."""
        place = self.root.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            what = "it is a file" if place == self.root.absolute() else f"{place} is not a folder"
            raise UserError(f"--store {self.root}: cannot be used, {what}; name a folder")
        return place

    def check_writable(self) -> None:
        """Raise UserError unless files can be made in the store. Writes nothing."""
        place = self.check_folder()
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--store {self.root}: {place} is not writable; choose another folder")

    def open(self) -> None:
        """Make the folder and write a temporary file to it. Raise UserError if that fails."""
        self.check_writable()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"alignbench")
        except OSError as error:
            raise UserError(f"--store {cannot_write(self.root, error)}") from None

    def manifests(self) -> list[Path]:
        """Return the paths of the manifests of all sweeps that were run in this store, latest first."""
        paths = (self.root / "sweeps").glob("*.json")
        return sorted(paths, key=lambda path: -path.stat().st_mtime)


def milestone_file(update: int) -> str:
    """Return the file name of a milestone's weights in the run's folder."""
    return f"weights-{update:06}.safetensors"


@contextmanager
def locked(artefact: Artefact, waiting: Callable[[str], Any] = lambda holder: None) -> Iterator[Lock | None]:
    """Hold the artefact's lock; yield None if the artefact was done meanwhile.

    ``waiting`` is called every second with the holder.
    """
    with held(artefact.lock, waiting, lambda: artefact.done) as lock:
        yield None if artefact.done else lock


def set_aside(artefact: Artefact, check: Callable[[], Any]) -> str:
    """Mark an artefact as not done if ``check`` raises Damaged, and return what is damaged, "" for nothing.

    It is then made again. The damaged files are kept as ``<name>.damaged``.
    """
    if not artefact.done or _damage(check) is None:
        return ""
    with held(artefact.lock):
        damage = _damage(check) if artefact.done else None  # else another process has marked it
        if damage is None:
            return ""
        artefact.fail(str(damage), "")
        for path in damage.paths:
            with suppress(FileNotFoundError):
                path.replace(path.with_name(f"{path.name}.damaged"))
        if artefact.stage is Stage.GENERATE:  # the other images stay where they are
            artefact.product.unlink(missing_ok=True)
    return damage.what


def _damage(check: Callable[[], Any]) -> Damaged | None:
    try:
        check()
    except Damaged as damage:
        return damage
    return None


def check_images(images: Artefact) -> None:
    """Raise Damaged if the table of an image set, or any of its images, is not what was written."""
    table = read_frame(images.product)
    listed = ((images.folder / file, sha256) for file, sha256 in zip(table["file"], table["sha256"]) if file)
    if damaged := [path for path, sha256 in listed if _sha256(path) != sha256]:
        raise Damaged(*damaged)


def _sha256(path: Path) -> str:
    """Return the hash of a file, "" if it is missing."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def milestone_expected(store: Store, run: str, update: int) -> bool:
    """Return False if the run ended before that update, so that nothing of its milestone exists or is missing."""
    status = read_json(store.run(run, True).status) or {}
    return status.get("state") != "done" or update <= status.get("updates", update)

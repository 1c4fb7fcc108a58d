"""What a store holds and no sweep refers to any more: found, and deleted if asked. What is being made is left alone."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError
from alignbench.launch import slurm, submissions
from alignbench.run import code_snapshot, provenance, trackers
from alignbench.store.artefacts import Store
from alignbench.store.locks import Lock, alive, locks_held
from alignbench.store.manifest import Manifest, read_manifest
from alignbench.store.stages import Stage

SETTLED = 3600.0  # seconds after which a half-written file's writer is gone


class Item(NamedTuple):
    """``paths`` go together; ``lock``: is held while they are deleted."""

    what: str
    paths: list[Path]
    why: str
    lock: Path | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        files = (file for path in self.paths for file in ([path] if path.is_file() else path.rglob("*")))
        return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def unused(store: Store) -> list[Item]:
    """Everything that could go. UserError if a manifest cannot be read: then nobody knows what it refers to."""
    manifests = [_read(path) for path in store.manifests()]
    parts = [part for manifest in manifests for run in manifest.runs for part in run.artefacts(store)]
    live = [record for record in submissions.submissions(store) if _live(record)]
    kept = {part.id for part in parts} | {id for record in live for ticket in record.tickets for id in ticket.makes}
    found = [*_runs(store, kept), *_images(store, kept), *_scores(store, kept)]
    found += [
        Item(f"checkpoints of {part.id}", [part.folder / "checkpoints"], "the run is finished", part.lock)
        for part in {part.lock: part for part in parts}.values()
        if part.stage is Stage.TRAIN and part.done and (part.folder / "checkpoints").is_dir()
    ]
    gone = [path for item in found for path in item.paths]
    if not live and not locks_held(store.root):  # else a worker may just be starting from one
        found += _snapshots(store, gone)
        found += _embeddings(store, gone)
    sweeps = {path.stem for path in store.manifests()}
    found += _launches(store, sweeps, live)
    found += [
        Item(f"tables {folder.name}", [folder], "its sweep is gone")
        for folder in _folders(store.tables)
        if folder.name not in sweeps
    ]
    found += _reruns(store)
    found += _halves(store, [*gone, *(path for item in found for path in item.paths)])
    return [item for item in found if item.lock is None or not Lock(item.lock).held]


def delete(store: Store, items: Iterable[Item]) -> Iterator[Item]:
    """Delete those of ``items`` that are unused still; yields each one that is gone."""
    still = {item.what for item in unused(store)}
    for item in items:
        lock = Lock(item.lock) if item.lock else None
        if item.what not in still or (lock and not lock.try_acquire()):
            continue
        try:
            for path in item.paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be deleted: {error.strerror}") from None
        finally:
            if lock:
                lock.release()
        yield item


def _read(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except UserError:
        what = "cannot be read, so what it needs is not known; mend or delete it first"
        raise UserError(f"{path}: {what}") from None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


NOBODY = "no sweep refers to it"


def _runs(store: Store, kept: set[str]) -> Iterator[Item]:
    for folder in _folders(store.root / "runs"):
        if folder.name not in kept:
            curves = store.root / trackers.FOLDER / folder.name
            paths = [folder, *([curves] if curves.exists() else [])]
            yield Item(f"run {folder.name}", paths, NOBODY, store.run(folder.name, True).lock)


def _images(store: Store, kept: set[str]) -> Iterator[Item]:
    for folder in _folders(store.root / "images"):
        if folder.name not in kept:
            yield Item(f"images {folder.name}", [folder], NOBODY, store.images(folder.name).lock)


def _scores(store: Store, kept: set[str]) -> Iterator[Item]:
    """A score's table, what made it, a failure's record, and the parts of one that was not finished."""
    for folder in _folders(store.root / "scores"):
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("[!.]*")):
            files.setdefault(path.name.removesuffix(".status.json").removesuffix(path.suffix), []).append(path)
        for stem, paths in files.items():
            if f"{folder.name}/{stem}" not in kept:
                lock = store.scores(folder.name, f"{stem}.parquet").lock
                yield Item(f"scores {folder.name}/{stem}", paths, NOBODY, lock)
        if not any(folder.iterdir()):
            yield Item(f"scores {folder.name}", [folder], "it is empty")


def _snapshots(store: Store, gone: list[Path]) -> Iterator[Item]:
    """Copies of code with which nothing that stays was made, and from which no job was submitted."""
    records = [*(store.root / "runs").glob(f"*/{provenance.FILE}"), *(store.root / "images").glob("*/protocol.json")]
    records += (store.root / "scores").glob("*/*.json")
    kept = [path for path in records if not any(path == other or path.is_relative_to(other) for other in gone)]
    kept += (path for path in (store.root / "jobs").rglob("*") if path.is_file())
    texts = [path.read_bytes() for path in kept]
    for folder in _folders(store.root / code_snapshot.CODE):
        if not any(folder.name.encode() in text for text in texts):
            yield Item(f"code {folder.name}", [folder], "nothing that is here was made with it")


def _embeddings(store: Store, gone: list[Path]) -> Iterator[Item]:
    """Prompts' embeddings that no run which stays was made with: they can be computed again."""
    records = [path for path in (store.root / "runs").glob(f"*/{provenance.FILE}") if path.parent not in gone]
    texts = [path.read_bytes() for path in records]
    for folder in _folders(store.embeddings):
        if not any(folder.name.encode() in text for text in texts):
            yield Item(f"embeddings {folder.name}", [folder], "no run that is here was made with them")


def _live(record: submissions.Submission) -> bool:
    """Is a launch under way? One of which that cannot be known is."""
    if record.launcher != "slurm":
        return record.host != socket.gethostname() or alive(record.pid)
    try:
        return bool({ticket.job for ticket in record.tickets} & slurm.live([record.name]).keys())
    except (UserError, OSError):  # this machine cannot ask
        return True


def _launches(store: Store, sweeps: set[str], live: list[submissions.Submission]) -> Iterator[Item]:
    """Empty folders of launches, and those of ended launches of a sweep that is gone."""
    records = {record.folder.resolve(): record for record in submissions.submissions(store)}
    for folder in _folders(store.root / "jobs"):
        record = records.get(folder.resolve())
        if not any(folder.iterdir()):
            yield Item(f"jobs {folder.name}", [folder], "it is empty")
        elif record is not None and record not in live and record.sweep not in sweeps:
            yield Item(f"jobs {folder.name}", [folder], "its sweep is gone")


def _reruns(store: Store) -> Iterator[Item]:
    for folder in _folders(store.root / "reruns"):
        if not locks_held(folder):
            yield Item(f"rerun {folder.name}", [folder], NOBODY)


def _halves(store: Store, gone: list[Path]) -> Iterator[Item]:
    """Half-written files and folders whose writer was killed."""
    for path in sorted(store.root.rglob(".*.tmp")):
        inside = any(path.is_relative_to(other) for other in gone)
        if not inside and time.time() - path.lstat().st_mtime > SETTLED:
            yield Item(f"half {path.relative_to(store.root)}", [path], "its writer is gone")


def shown(size: float) -> str:
    """``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

"""Cleanup of a store: what no sweep refers to any more is listed, and deleted on request; active work is kept."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError
from alignbench.launch import submissions
from alignbench.run import code_snapshot, provenance, trackers
from alignbench.store.artefacts import Store
from alignbench.store.locks import Lock, alive, locks_held
from alignbench.store.manifest import Manifest, read_manifest
from alignbench.store.shell import NoAnswer
from alignbench.store.stages import Stage

SETTLED = 3600.0  # seconds after which the writer of a half-written file is presumed dead
UNREFERENCED = "no sweep refers to it"


class Item(NamedTuple):
    """Paths that can be deleted together, and why; ``lock`` is held while they are deleted."""

    what: str
    paths: list[Path]
    why: str
    lock: Path | None = None

    @property
    def size(self) -> int:
        """Total size in bytes."""
        files = (file for path in self.paths for file in ([path] if path.is_file() else path.rglob("*")))
        return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def unused(store: Store) -> list[Item]:
    """Return everything that can be deleted. Raise UserError if a manifest cannot be read: its needs are unknown."""
    manifests = [_read(path) for path in store.manifests()]
    artefacts = [artefact for manifest in manifests for run in manifest.runs for artefact in run.artefacts(store)]
    live = [record for record in submissions.read(store) if _live(record)]
    kept = {artefact.id for artefact in artefacts} | {id for record in live for job in record.jobs for id in job.makes}
    items = [*_runs(store, kept), *_images(store, kept), *_scores(store, kept)]
    items += [
        Item(f"checkpoints of {run.id}", [run.folder / "checkpoints"], "the run is finished", run.lock)
        for run in {artefact.lock: artefact for artefact in artefacts}.values()
        if run.stage is Stage.TRAIN and run.done and (run.folder / "checkpoints").is_dir()
    ]
    gone = [path for item in items for path in item.paths]
    if not live and not locks_held(store.root):  # otherwise a worker may just be starting from one
        items += _snapshots(store, gone)
        items += _embeddings(store, gone)
    sweeps = {path.stem for path in store.manifests()}
    items += _launches(store, sweeps, live)
    items += [
        Item(f"tables {folder.name}", [folder], "its sweep is gone")
        for folder in _folders(store.tables)
        if folder.name not in sweeps
    ]
    items += _reruns(store)
    items += _half_written(store, [*gone, *(path for item in items for path in item.paths)])
    return [item for item in items if item.lock is None or not Lock(item.lock).held]


def delete(store: Store, items: Iterable[Item]) -> Iterator[Item]:
    """Delete those of ``items`` that are still unused, and yield each deleted one."""
    still_unused = {item.what for item in unused(store)}
    for item in items:
        lock = Lock(item.lock) if item.lock else None
        if item.what not in still_unused or (lock and not lock.try_acquire()):
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
        what = "cannot be read, so what it needs is not known; repair or delete it first"
        raise UserError(f"{path}: {what}") from None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def _runs(store: Store, kept: set[str]) -> Iterator[Item]:
    for folder in _folders(store.root / "runs"):
        if folder.name not in kept:
            curves = store.root / trackers.FOLDER / folder.name
            paths = [folder, *([curves] if curves.exists() else [])]
            yield Item(f"run {folder.name}", paths, UNREFERENCED, store.run(folder.name, True).lock)


def _images(store: Store, kept: set[str]) -> Iterator[Item]:
    for folder in _folders(store.root / "images"):
        if folder.name not in kept:
            yield Item(f"images {folder.name}", [folder], UNREFERENCED, store.images(folder.name).lock)


def _scores(store: Store, kept: set[str]) -> Iterator[Item]:
    """Yield the files of each unused score: its table, its provenance, the record of a failure, unfinished pieces."""
    for folder in _folders(store.root / "scores"):
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("[!.]*")):
            files.setdefault(path.name.removesuffix(".status.json").removesuffix(path.suffix), []).append(path)
        for stem, paths in files.items():
            if f"{folder.name}/{stem}" not in kept:
                lock = store.scores(folder.name, f"{stem}.parquet").lock
                yield Item(f"scores {folder.name}/{stem}", paths, UNREFERENCED, lock)
        if not any(folder.iterdir()):
            yield Item(f"scores {folder.name}", [folder], "it is empty")


def _snapshots(store: Store, gone: list[Path]) -> Iterator[Item]:
    """Yield the code snapshots that made nothing of what is kept, and that no submitted job uses."""
    records = [*(store.root / "runs").glob(f"*/{provenance.FILE}"), *(store.root / "images").glob("*/protocol.json")]
    records += (store.root / "scores").glob("*/*.json")
    kept = [path for path in records if not any(path == other or path.is_relative_to(other) for other in gone)]
    kept += (path for path in (store.root / "jobs").rglob("*") if path.is_file())
    texts = [path.read_bytes() for path in kept]
    for folder in _folders(store.root / code_snapshot.CODE):
        if not any(folder.name.encode() in text for text in texts):
            yield Item(f"code {folder.name}", [folder], "nothing in this store was made with it")


def _embeddings(store: Store, gone: list[Path]) -> Iterator[Item]:
    """Yield the prompt embeddings that no kept run was made with; they can be computed again."""
    records = [path for path in (store.root / "runs").glob(f"*/{provenance.FILE}") if path.parent not in gone]
    texts = [path.read_bytes() for path in records]
    for folder in _folders(store.embeddings):
        if not any(folder.name.encode() in text for text in texts):
            yield Item(f"embeddings {folder.name}", [folder], "no run in this store was made with them")


def _live(record: submissions.Submission) -> bool:
    """Return whether a launch is still active; if that cannot be known, assume that it is."""
    if record.launcher != "slurm":
        return record.host != socket.gethostname() or alive(record.pid)
    try:
        return bool(submissions.slurm_jobs([record], {id for job in record.jobs for id in job.makes}).live)
    except NoAnswer:
        return True


def _launches(store: Store, sweeps: set[str], live: list[submissions.Submission]) -> Iterator[Item]:
    """Yield the folders of launches that are empty, or whose launch has ended and whose sweep is gone."""
    records = {record.folder.resolve(): record for record in submissions.read(store)}
    for folder in _folders(store.root / "jobs"):
        record = records.get(folder.resolve())
        if not any(folder.iterdir()):
            yield Item(f"jobs {folder.name}", [folder], "it is empty")
        elif record is not None and record not in live and record.sweep not in sweeps:
            yield Item(f"jobs {folder.name}", [folder], "its sweep is gone")


def _reruns(store: Store) -> Iterator[Item]:
    for folder in _folders(store.root / "reruns"):
        if not locks_held(folder):
            yield Item(f"rerun {folder.name}", [folder], UNREFERENCED)


def _half_written(store: Store, gone: list[Path]) -> Iterator[Item]:
    """Yield half-written files and folders whose writer was killed."""
    for path in sorted(store.root.rglob(".*.tmp")):
        inside = any(path.is_relative_to(other) for other in gone)
        if not inside and time.time() - path.lstat().st_mtime > SETTLED:
            yield Item(f"half {path.relative_to(store.root)}", [path], "its writer is gone")


def human_size(size: float) -> str:
    """Return a number of bytes as text, as in ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

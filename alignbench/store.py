"""The store: content-addressed folders on a plain, possibly shared, disk.

Three kinds of artefact: runs, image sets and scores. Each is either done or not there: files are written under a
temporary name, flushed and renamed, and the file that says "done" comes last. A failure is recorded beside the
artefact, shown, and tried again; it never counts as done. One process at a time makes an artefact: it holds a lock.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError
from alignbench.stages import Stage

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Columns = dict[str, NDArray[Any]]

BEAT = 15.0  # seconds between heartbeats of a lock
STALE = 600.0  # seconds without a heartbeat after which its holder counts as gone
WATCHED = 3 * BEAT  # seconds in which whoever takes over has seen none itself: clocks differ, and jump
FULL = (errno.ENOSPC, errno.EDQUOT)


# -- whole files or none ----------------------------------------------------------------------------------------------


def write(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write ``path`` whole or not at all. ``content``: bytes, text, or what writes to the path it is given.

    UserError if the disk is full or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path | str, error: OSError) -> str:
    """One line for a disk that does not take more."""
    if error.errno in FULL:
        return f"{path}: no space left on the disk; free some and run the same command again, finished work is kept"
    return f"{path}: cannot be written: {error.strerror or error}; choose another --store, or mend its permissions"


def flush(path: Path) -> None:
    """See to it that a file's content, or a folder's names, outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    write(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any] | None:
    """None where there is no such file, or no whole one (a disk that lost power)."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """As parquet. Numbers as they are in memory, for ``Reader``; texts once each, compressed."""
    texts = [name for name, dtype in frame.dtypes.items() if dtype.kind not in "biuf"]
    how: dict[str, Any] = {"use_dictionary": texts, "compression": dict.fromkeys(texts, "snappy")}
    write(path, lambda temporary: frame.to_parquet(temporary, index=False, write_statistics=False, **how))


# -- artefacts --------------------------------------------------------------------------------------------------------


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
        return _holder(self.lock) is not None

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
    def embeddings(self) -> Path:
        """Where prompts' embeddings are, in a folder for each way to compute them."""
        return self.root / "embeddings"

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def check_writable(self) -> None:
        """UserError unless files can be made in the store. Writes nothing itself."""
        place = self.root.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            what = "it is a file" if place == self.root.absolute() else f"{place} is not a folder"
            raise UserError(f"--store {self.root}: cannot be used, {what}; name a folder")
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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# -- locks ------------------------------------------------------------------------------------------------------------


class LockLost(Exception):
    """Somebody else took over: this process was stopped for longer than STALE."""


class Lock:
    """Held: one process makes this artefact. A thread keeps it fresh; a holder that died is noticed by the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._seen = (float("nan"), 0.0)  # the holder's last heartbeat, and since when we have seen none after it

    @property
    def held(self) -> bool:
        """By anybody, right now."""
        return _holder(self.path) is not None

    def check(self) -> None:
        """LockLost unless it is still ours. Asked before anything is declared done."""
        if (read_json(self.path) or {}).get("token") != self.token:
            raise LockLost(f"{self.path}: another process took this over while this one was stopped")

    def try_acquire(self) -> bool:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "time": _now(), "token": self.token}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._abandoned():
                self._remove_stale()
            _create(self.path, json.dumps(me))
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(cannot_write(self.path, error)) from error
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self._ended.set()
        with suppress(LockLost):
            self.check()
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        with suppress(LockLost):
            while not self._ended.wait(BEAT):
                self.check()
                with suppress(OSError):
                    os.utime(self.path)

    def _remove_stale(self) -> None:
        """By one of several that noticed: without the guard the second would remove the first one's new lock."""
        guard = self.path.with_suffix(".guard")
        with suppress(OSError):
            if time.time() - guard.stat().st_mtime > STALE:
                guard.unlink()
        _create(guard, "")
        try:
            if self._abandoned():  # not if absent: the next may be creating its own right now
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _abandoned(self) -> bool:
        """Is there a lock whose holder is known to be gone, or was not heard of for too long?"""
        try:
            beat = self.path.stat().st_mtime
        except OSError:
            return False
        found = _read_lock(self.path)
        if found is None or _gone(found):
            return True
        if beat != self._seen[0]:
            self._seen = (beat, time.monotonic())
        silent = time.monotonic() - self._seen[1]
        if silent < WATCHED:
            return False
        return silent > STALE or time.time() - beat > STALE or _job_ended(found.get("job"))


def locks_held(root: Path) -> list[Path]:
    """Those of a store's locks that somebody holds right now."""
    return [path for path in (root / "locks").glob("*.lock") if _holder(path) is not None]


def _create(path: Path, text: str) -> None:
    """Make a file that is complete as soon as it is there. FileExistsError if there is one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text)
        os.link(temporary, path)  # like O_EXCL, but never seen half-written
    finally:
        temporary.unlink(missing_ok=True)


def _holder(lock: Path) -> str | None:
    """ "host, process 12" of the live process that holds ``lock``; None if there is none."""
    found = _read_lock(lock)
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return None
    if found is None or age > STALE or _gone(found):
        return None
    return f"{found['host']}, process {found['pid']}"


def _read_lock(path: Path) -> dict[str, Any] | None:
    """None for what is no lock of ours."""
    found = read_json(path)
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) and "host" in found else None


def _gone(holder: dict[str, Any]) -> bool:
    """Is this holder known to have ended: a process of this machine, or an earlier start of this very SLURM job?"""
    if holder["host"] == socket.gethostname() and not alive(holder["pid"]):
        return True
    job, start = holder.get("job") or ("", "")
    mine = _job() or ("", "")
    return bool(job) and job == mine[0] and start != mine[1]


def _job_ended(job: Any) -> bool:
    """Does SLURM say that a holder's job, which may be on another machine, is over?"""
    if not job or shutil.which("squeue") is None:
        return False
    twice = f"{job[0]},{job[0]}"  # an unknown job is no error then
    words = ["squeue", "--noheader", "--jobs", twice, "--format", "%T"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    return asked.returncode == 0 and not asked.stdout.strip()


def _job() -> list[str] | None:
    """This process's SLURM job, and how often it was started before; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def alive(pid: int) -> bool:
    """Is there such a process here? One that ended but was not yet waited for is not alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True


@contextmanager
def locked(artefact: Artefact, waiting: Callable[[str], Any] = lambda holder: None) -> Iterator[Lock | None]:
    """Hold the artefact's lock; None if it was done meanwhile. ``waiting`` is told who holds it, every second."""
    with held(artefact.lock, waiting, lambda: artefact.done) as lock:
        yield None if artefact.done else lock


@contextmanager
def held(
    path: Path, waiting: Callable[[str], Any] = lambda holder: None, done: Callable[[], bool] = lambda: False
) -> Iterator[Lock]:
    """Hold the lock ``path``, or stop waiting for it once ``done``. ``waiting``: as for ``locked``."""
    lock = Lock(path)
    while not done() and not lock.try_acquire():
        waiting(_holder(path) or "another process")
        time.sleep(1.0)
    try:
        yield lock
    finally:
        lock.release()


# -- tables of scores -------------------------------------------------------------------------------------------------

PLACE = {"prompt_id": "large_string", "tag": "large_string", "index": "int64"}  # which picture a row is of, as arrow


def read_scores(root: Path, files: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> pd.DataFrame:
    """One row per image and metric of the score files that are there. ``files``: runs of a manifest, each with a score.

    Texts are categorical: there are a thousand times as many rows as names, and one file for each run and evaluator.
    """
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    readers: dict[tuple[str, ...], Reader] = {}
    places: dict[Layout, int] = {}
    used, values, facts = [], [], []
    for run, score in files:
        names = tuple(metric["name"] for metric in score["metrics"])
        if names not in readers:
            readers[names] = Reader(names, PLACE | dict.fromkeys(names, "double") | {"ok": "bool"})
        found = readers[names].read(f"{root}/{score['file']}")
        if found is None:
            continue
        layout, numbers = found
        place = places.setdefault(layout, len(places))
        for name in names:
            used.append(place)
            values.append(numbers[name] if name in numbers else layout.columns[name])
            facts.append([run[key] for key in ("label", "method", "seed", "id")] + [score["evaluator"], name])
    order = ["label", "method", "seed", "run", "evaluator", "metric", *PLACE, "score", "ok"]
    if not values:
        return pd.DataFrame({name: [] for name in order})
    columns: dict[str, Any] = {"score": np.concatenate(values)}
    counts = [len(each) for each in values]
    for name, each in zip(order, zip(*facts)):
        codes, texts = pd.factorize(np.array(each, object))
        column = np.repeat(codes.astype(np.int32), counts)
        whole = name == "seed"
        columns[name] = texts.astype(int)[column] if whole else pd.Categorical.from_codes(column, pd.Index(texts))
    starts = np.cumsum([0, *(layout.table.num_rows for layout in places)])
    rows = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in used])
    shared = pa.concat_tables([layout.table.select([*PLACE, "ok"]) for layout in places]).combine_chunks()
    for name, each in zip(shared.column_names, shared.columns):
        each = each.dictionary_encode() if name in ("prompt_id", "tag") else each
        columns[name] = each.to_pandas().take(rows).array
    return pd.DataFrame(columns, columns=order)


def read_columns(files: dict[str, str]) -> dict[str, Columns]:
    """Those of the parquet files that are there, by the names that they are given here. Numbers that lack are nan."""
    reader, found = Reader(), {}
    for key, path in files.items():
        if (read := reader.read(path)) is not None:
            layout, numbers = read
            found[key] = layout.columns | numbers
    return found


class Reader:
    """Reads small parquet files, most of which differ from the one before in nothing but numbers.

    Only the others are decoded: ``write_frame`` puts numbers into a file as they are in memory, so they are found where
    those of the file before were, if every other byte is the same. ``numbers``: which columns may differ, by default
    all. ``types``: which columns are there, as which type of arrow's, by default all, each as it is.
    """

    def __init__(self, numbers: Iterable[str] | None = None, types: dict[str, str] | None = None) -> None:
        self.numbers, self.types = numbers, types
        self.layout: Layout | None = None

    def read(self, path: str) -> tuple[Layout, Columns] | None:
        """A file that lies like this one, and the numbers that are this one's own; None if there is no such file.

        UserError if it is not whole.
        """
        import pyarrow as pa

        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
            if self.layout is None or not self.layout.fits(content):
                self.layout = Layout(content, self.numbers, self.types)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it, and run the sweep again") from None
        return self.layout, self.layout.read(content)


class Layout:
    """A parquet file as its bytes lie: which are the numbers of a column, and what all others say."""

    def __init__(self, content: bytes, numbers: Iterable[str] | None, types: dict[str, str] | None) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        source = parquet.ParquetFile(pa.BufferReader(content))
        table = source.read(columns=list(types) if types else None, use_threads=False)
        wanted = pa.schema(types.items()) if types else table.schema
        self.table = table if table.schema == wanted else table.select(wanted.names).cast(wanted)
        self.length = len(content)
        self.numbers: dict[str, tuple[slice, Any]] = {}  # name -> where, and numpy's type
        for name, end in _plain(source.metadata):
            if name not in (table.column_names if numbers is None else numbers):
                continue
            column = table[name]
            if column.null_count or column.type != self.table[name].type:
                continue  # the bytes are fewer, or mean something else
            values = column.to_numpy()
            here = slice(end - values.nbytes, end)
            if values.dtype.kind in "if" and content[here] == values.tobytes():
                self.numbers[name] = here, values.dtype
        ends = [0, *(end for here, _ in self.numbers.values() for end in (here.start, here.stop)), len(content)]
        self.rest = [(here, content[here]) for here in map(slice, ends[::2], ends[1::2])]

    def fits(self, content: bytes) -> bool:
        """Is all but the numbers the same?"""
        return len(content) == self.length and all(content[here] == same for here, same in self.rest)

    @cached_property
    def columns(self) -> Columns:
        """Of the file that it was made from, all."""
        return {name: column.to_numpy() for name, column in zip(self.table.column_names, self.table.columns)}

    def read(self, content: bytes) -> Columns:
        """The numbers of a file that fits."""
        import numpy as np

        return {name: np.frombuffer(content[here], dtype) for name, (here, dtype) in self.numbers.items()}


def _plain(about: Any) -> Iterator[tuple[str, int]]:
    """The columns of a parquet file that are there in one piece and as they are, and where they end."""
    if about.num_row_groups != 1:
        return
    for chunk in map(about.row_group(0).column, range(about.num_columns)):
        encoded = chunk.has_dictionary_page or not {"PLAIN", "RLE"}.issuperset(chunk.encodings)
        if chunk.compression == "UNCOMPRESSED" and not encoded:
            yield chunk.path_in_schema, chunk.data_page_offset + chunk.total_compressed_size


def reached(store: Store, run: str, update: int) -> bool:
    """False if the run of that id has ended before that update: then there is nothing of it, and nothing is missing."""
    status = read_json(store.run(run, True).status) or {}
    return status.get("state") != "done" or update <= status.get("updates", update)

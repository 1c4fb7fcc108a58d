"""Hashes of content: ids of plain data, and fingerprints of files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from alignbench.config import UserError, cache


def content_id(content: Any) -> str:
    """Return ten hex digits of the sha256 of plain data, as canonical JSON. Raise ValueError for nan and inf.

    A collision becomes likely at about a million ids.
    """
    plain = json.dumps(msgspec.to_builtins(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()[:10]


LARGE = 64 * 2**20  # bytes: digests of larger files are kept on disk, for other processes
LONG = 2**30  # bytes: reading a larger file takes seconds, and is announced
SETTLED = 2.0  # seconds since a file's last change, after which a further one changes its times on any file system


def fingerprint(files: Iterable[Path]) -> str:
    """Return one sha256 of the files' contents and of their names relative to their common folder.

    So it does not depend on where the folder lies. Raise UserError if a file cannot be read.
    """
    files = list(files)
    top = os.path.commonpath([path.parent for path in files]) if files else ""
    named = sorted((os.path.relpath(path, top), file_digest(path)) for path in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's whole content. Raise UserError if it cannot be read, or changes meanwhile.

    A file is read again only if its size, inode or times have changed; those of large files are kept with the digest
    in the user's cache. A restored modification time does not hide a change: no program can set the time of change.
    """
    try:
        file = _state(path)
        if known := _known.get(file) or _kept(file):
            return known
        started = time.time_ns()
        digest = _read(path, file.size)
        if _state(path) != file:
            raise UserError(f"{path}: changed while it was read; wait until it is written, then start again")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if started - file.changed > SETTLED * 1e9:  # else it may change once more without a change of its times
        _known[file] = digest
        _keep(file, digest)
    return digest


class _State(NamedTuple):
    """A file, and what changes whenever its content does; times in nanoseconds."""

    place: str  # real path
    size: int
    modified: int
    changed: int
    inode: int


_known: dict[_State, str] = {}  # digests, in this process


def _state(path: Path) -> _State:
    place = os.path.realpath(path)
    stat = os.stat(place)
    return _State(place, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _read(path: Path, size: int) -> str:
    """Return the sha256 of a file, with a line on stderr, its time included, if that takes long."""
    started = time.monotonic()
    if size >= LONG:
        print(f"alignbench: hashing {path} ({size / 1e9:.1f} GB), once", end="", file=sys.stderr, flush=True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= LONG:
        print(f": {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return digest


# -- digests of large files, one small file each in the user's cache ---------------------------------------------------


def _record(file: _State) -> Path:
    return cache() / "digests" / f"{hashlib.sha256(file.place.encode()).hexdigest()[:32]}.json"


def _kept(file: _State) -> str | None:
    """Return a large file's digest from the cache; None if it is not there, damaged, or written by another user."""
    if file.size < LARGE:
        return None
    with suppress(OSError, RuntimeError, ValueError, TypeError), _record(file).open("rb") as record:
        content, check = json.load(record)
        mine = os.fstat(record.fileno()).st_uid == os.getuid()
        if mine and check == content_id(content) and content[0] == list(file):
            return str(content[1])
    return None


def _keep(file: _State, digest: str) -> None:
    """Keep a large file's digest. Where the cache cannot be written, every process reads the file anew."""
    if file.size < LARGE:
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        record, content = _record(file), [file, digest]
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=record.parent)  # for this user's eyes only
        try:
            with open(handle, "w") as out:
                json.dump([content, content_id(content)], out)
            os.replace(temporary, record)  # whole, whoever else writes it
        finally:
            Path(temporary).unlink(missing_ok=True)

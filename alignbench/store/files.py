"""Files that are written whole or not at all.

The store consists of content-addressed folders on an ordinary, possibly shared, disk, with three kinds of artefact:
runs, image sets and scores. Each is either done or absent: files are written under a temporary name, flushed and
renamed, and the file that marks the artefact as done comes last. A failure is recorded beside the artefact, shown and
retried; it never counts as done. Only one process at a time makes an artefact, and holds its lock.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError

if TYPE_CHECKING:
    import pandas as pd

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write(path: Path, content: bytes | str | Callable[[Path], Any], *, sealed: bool = False) -> None:
    """Write ``path`` whole or not at all. ``content``: bytes, text, or a function that writes to the path it is given.

    ``sealed``: write its hash beside it, so that later damage is noticed.

    Raise UserError if the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)
        if sealed:
            with temporary.open("rb") as file:
                _write_seal(path, hashlib.file_digest(file, "sha256").hexdigest())
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path | str, error: OSError) -> str:
    """Return one line that says why ``path`` cannot be written and what to do."""
    if error.errno in DISK_FULL:
        return f"{path}: no space left on the disk; free some and run the same command again, finished work is kept"
    return f"{path}: cannot be written: {error.strerror or error}; choose another folder, or fix its permissions"


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    write(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is none, because the file is absent, truncated or damaged."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


# -- finished files and their hashes -----------------------------------------------------------------------------------


class Damaged(UserError):
    """Finished files whose content is not what was written. ``what``: the first one and the reason, no remedy."""

    def __init__(self, *paths: Path, why: str = "its content is not what was written") -> None:
        """Make the error about these files."""
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        self.paths, self.what = paths, f"{paths[0]}{others}: damaged ({why})"
        super().__init__(f"{self.what}; run its sweep or import again, which makes it anew")


def _seal(path: Path) -> Path:
    """Return the file beside a finished file that holds its hash, as ``sha256sum --check`` reads it."""
    return path.with_suffix(".sha256")


def _write_seal(path: Path, sha256: str) -> None:
    write(_seal(path), f"{sha256}  {path.name}\n" * 2)  # twice, so that damage to this file is no damage to that one


def _sealed(path: Path) -> str | None:
    """Return the hash recorded for a file; None if there is none, as beside files of earlier versions."""
    try:
        lines = _seal(path).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return lines[0].partition(" ")[0] if len(lines) == 2 and lines[0] == lines[1] else None


def check_file(path: Path) -> None:
    """Raise Damaged if a finished file is missing or is not what was written."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise Damaged(path, why="it is missing") from None
    if found != (_sealed(path) or found):
        raise Damaged(path)


def move(path: Path, target: Path) -> None:
    """Rename a finished file, with its hash."""
    if (sha256 := _sealed(path)) is not None:
        _write_seal(target, sha256)
    path.replace(target)


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table, with its hash beside it."""
    write(path, lambda temporary: frame.to_parquet(temporary, index=False), sealed=True)


def check_content(path: Path, content: bytes) -> bytes:
    """Return the ``content`` of a finished file. Raise Damaged if it is not what was written."""
    sha256 = _sealed(path)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise Damaged(path)
    return content


def read_frame(path: Path) -> pd.DataFrame:
    """Return a table that ``write_frame`` has written. Raise Damaged if it is not what was written."""
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(io.BytesIO(check_content(path, path.read_bytes())))
    except (pa.ArrowException, OSError) as error:
        raise Damaged(path, why=f"it cannot be read: {error}") from None


def is_whole(path: Path) -> bool:
    """Return whether a table is there and undamaged."""
    try:
        check_frame(path)
    except Damaged:
        return False
    return True


def check_frame(path: Path) -> None:
    """Raise Damaged if a table is not what was written or, where no hash was recorded, cannot be read."""
    if _sealed(path) is None:
        read_frame(path)
    check_file(path)

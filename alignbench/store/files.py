"""Files that are written whole or not at all.

The store consists of content-addressed folders on an ordinary, possibly shared, disk, with three kinds of artefact:
runs, image sets and scores. Each is either done or absent: files are written under a temporary name, flushed and
renamed, and the file that marks the artefact as done comes last. A failure is recorded beside the artefact, shown and
retried; it never counts as done. Only one process at a time makes an artefact, and holds its lock.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError
from alignbench.store.machine import DISK_FULL

if TYPE_CHECKING:
    import pandas as pd


def write(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write ``path`` whole or not at all. ``content``: bytes, text, or a function that writes to the path it is given.

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


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    write(path, lambda temporary: frame.to_parquet(temporary, index=False))


def read_frame(path: Path) -> pd.DataFrame:
    """Return a table that ``write_frame`` has written. Raise UserError if it is damaged."""
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and run the sweep again") from None

"""Hashes of content: ids of plain data, and fingerprints of files."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from alignbench.config import UserError


def content_id(content: Any) -> str:
    """Return ten hex digits of the sha256 of plain data, as canonical JSON. Raise ValueError for nan and inf.

    A collision becomes likely at about a million ids.
    """
    plain = json.dumps(msgspec.to_builtins(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()[:10]


WHOLE = 256 * 2**20  # bytes: larger files are sampled
SAMPLE = 16 * 2**20  # bytes of head, middle and tail each


def fingerprint(files: Iterable[Path]) -> str:
    """Return one sha256 of the files' contents and of their names relative to their common folder.

    So it does not depend on where the folder lies. Raise UserError if a file cannot be read.
    """
    files = list(files)
    top = os.path.commonpath([path.parent for path in files]) if files else ""
    named = sorted((os.path.relpath(path, top), file_digest(path)) for path in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file; above 256 MB, that of its size, head, middle and tail (16 MB each).

    Cached in memory by path, size and modification time. Raise UserError if it cannot be read.
    """
    try:
        stat = path.stat()
        return _content_digest(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@functools.cache
def _content_digest(path: str, size: int, mtime: int) -> str:
    """Return what ``file_digest`` describes; ``mtime`` is a key of the cache."""
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sampled = hashlib.sha256(str(size).encode())
        for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
            file.seek(start)
            sampled.update(file.read(SAMPLE))
        return sampled.hexdigest()

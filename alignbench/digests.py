"""Hashes of content: ten hex digits of plain data, one digest of files."""

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
    """Ten hex digits of the canonical JSON of plain data: a million ids before a clash becomes likely."""
    plain = json.dumps(msgspec.to_builtins(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()[:10]


WHOLE = 256 * 2**20  # bytes: larger files are sampled
SAMPLE = 16 * 2**20


def fingerprint(files: Iterable[Path]) -> str:
    """One digest of content and of names below the files' common folder. UserError if one cannot be read."""
    files = list(files)
    top = os.path.commonpath([path.parent for path in files]) if files else ""
    named = sorted((os.path.relpath(path, top), file_digest(path)) for path in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256; of a large file as ``_content_digest`` says. UserError if it cannot be read."""
    try:
        stat = path.stat()
        return _content_digest(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@functools.cache
def _content_digest(path: str, size: int, mtime: int) -> str:
    """sha256 of the content; of a file over 256 MB: of its size, head, middle and tail."""
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
            file.seek(start)
            found.update(file.read(SAMPLE))
        return found.hexdigest()

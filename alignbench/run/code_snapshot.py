"""A copy of the code in the store, which the workers of a sweep run, whatever is edited meanwhile.

``<store>/code/<digest>/alignbench/...`` is the running package with its methods, evaluators, reports and sweeps where
an import looks for them, ``<store>/code/<digest>/plugins/`` the plug-in files. The digest covers every name and byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError
from alignbench.store.files import cannot_write

PARTS = ("", "methods", "evaluators", "reports", "sweeps")  # packages, each possibly in a separate folder
CODE, PLUGINS = "code", "plugins"  # folders in the store and in a snapshot
START = """\
import os, runpy, sys, time
code, patience = sys.argv[1], time.monotonic() + 60  # a shared disk may show a new folder late
while not os.path.isdir(code):
    if time.monotonic() > patience:
        sys.exit(f"{code}: not visible on {os.uname().nodename}; the store must lie on a disk that all nodes share")
    time.sleep(1)
sys.path.insert(0, code)
del sys.argv[: sys.argv.index("-m") + 1]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Snapshot(NamedTuple):
    """Copy of the code. ``plugins``: paths of the copied plug-ins; ``given``: the originals, in the same order."""

    path: Path
    plugins: list[str]
    given: list[str]

    def python(self, interpreter: Sequence[str] = (sys.executable,)) -> list[str]:
        """Return the words of a Python that runs this code, ahead of any installed; ``-m``, a module and words follow.

        Not PYTHONPATH: a colon in a path would split it, and the shell of a job or a container may set another.
        """
        return [*interpreter, "-P", "-B", "-u", "-c", START, str(self.path)]


def take(store: Path, plugins: Sequence[str] = ()) -> Snapshot:
    """Copy the running code and ``plugins`` (paths) into the store, whole or not at all, unless the copy exists.

    Raise UserError if a file cannot be read or written, or if the existing copy was changed.
    """
    copies = plugin_names(plugins)
    files = package() | {name: _read(Path(path)) for name, path in zip(copies, plugins)}
    folder = store.resolve() / CODE / digest(files)
    if not folder.exists():
        _write(folder, files)
    check(folder)
    return Snapshot(folder, [str(folder / name) for name in copies], list(plugins))


def check(folder: Path) -> None:
    """Raise UserError unless the content of a snapshot matches its name."""
    if not folder.is_dir() or digest(read(folder)) != folder.name:
        raise UserError(f"{folder}: not the code that was copied there; delete this folder")


def running() -> str | None:
    """Return the name of the snapshot that this process runs from; None for a checkout or an installed package."""
    home = Path(__file__).parents[2]
    return home.name if home.parent.name == CODE and re.fullmatch("[0-9a-f]{16}", home.name) else None


def package() -> dict[str, bytes]:
    """Return every file of the running package, including data, by its path in a snapshot (``alignbench/flow.py``)."""
    files: dict[str, bytes] = {}
    for part in PARTS:
        spec = find_spec(f"alignbench.{part}".rstrip("."))
        if spec is None or spec.origin is None:
            raise UserError(f"alignbench.{part}: missing from this installation; reinstall alignbench")
        files |= read(Path(spec.origin).parent, f"alignbench/{part}".rstrip("/") + "/")
    return files


def read(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Return the files of a folder by their relative paths, without hidden files and compiled Python."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if not any(part.startswith((".", "__pycache__")) for part in name.parts)]
    return {f"{prefix}{name.as_posix()}": _read(folder / name) for name in kept}


def digest(files: Mapping[str, bytes]) -> str:
    """Return a hash, of sixteen hex digits, of every name and content."""
    named = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def plugin_names(plugins: Sequence[str]) -> list[str]:
    """Return the paths of plug-ins in a snapshot; files of the same name get a folder each."""
    names = [Path(path).name for path in plugins]
    return [f"{PLUGINS}/{name}" if names.count(name) == 1 else f"{PLUGINS}/{i}/{name}" for i, name in enumerate(names)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder under a temporary name and rename it; if two processes do so at once, either result is right."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o444)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

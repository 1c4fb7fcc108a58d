"""Checkpoints: resumable training states, and final weights, each file whole or absent.

The last few states are kept, each named by its batch and its hash: a state that the disk damaged is noticed, and the
one before it is used. Nothing here unpickles objects: states hold tensors and plain data (``weights_only``), weights
are safetensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alignbench.config import UserError
from alignbench.store.files import Damaged, check_file, flush, write
from alignbench.weights import copy_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Flow

FINAL = "final.safetensors"  # in a run's checkpoint folder, once training is finished
STATE = re.compile(r"step_(\d+)-([0-9a-f]{16})\.pt")  # batches done, first digits of the content's sha256


def _replace(path: Path, content: Callable[[Path], object], *, sealed: bool = False) -> None:
    """Write a file as ``store.files.write`` does. UserError also for a full disk that torch or safetensors reports.

    A file has one writer, so temporary files of its name come from a killed writer, and are removed.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    try:
        write(path, content, sealed=sealed)
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        if isinstance(error.__context__, KeyboardInterrupt):  # torch's writer cannot end a file that is interrupted
            raise error.__context__ from None
        why = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({why}); free space there, or choose another store") from error


class _HashingFile:
    """A writable file that hashes what is written, before the disk can damage it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def saved_states(folder: Path) -> list[Path]:
    """Return the folder's training states, whole or damaged, the latest batch first."""
    paths = [path for path in folder.glob("step_*.pt") if STATE.fullmatch(path.name)]
    return sorted(paths, key=_batches, reverse=True)


def _batches(path: Path) -> int:
    match = STATE.fullmatch(path.name)
    assert match
    return int(match[1])


def save_state(folder: Path, state: dict[str, Any], keep: int = 1) -> Path:
    """Add a training state, then remove all but the last ``keep``; return its path.

    ``state``: "step", tensors and plain data. One rename makes the file appear, complete and under its hash, so that a
    kill always leaves a valid state.
    """
    fresh, digest = folder / "step.new", ""

    def content(path: Path) -> None:
        nonlocal digest
        with path.open("wb") as file:
            hashed = _HashingFile(file)
            torch.save(state, hashed)  # type: ignore[arg-type]  # it needs only these methods of a file
            digest = hashed.sha256.hexdigest()[:16]

    _replace(fresh, content)
    path = fresh.replace(folder / f"step_{state['step']:06}-{digest}.pt")
    flush(folder)
    earlier = [other for other in saved_states(folder) if _batches(other) < state["step"]]
    # a later state is damaged, or training was resumed from one before it
    for other in set(saved_states(folder)) - {path, *earlier[: keep - 1]}:
        other.unlink(missing_ok=True)
    return path


def read_state(path: Path, *, verify: bool = True, mapped: bool = True) -> dict[str, Any]:
    """Return a training state on the CPU, read or ``mapped``. UserError if unreadable or (with ``verify``) damaged."""
    match = STATE.fullmatch(path.name)
    assert match
    try:
        if verify:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest()[:16] != match[2]:
                    raise UserError(f"{path}: a damaged checkpoint (its content has changed since it was written)")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds of errors for files that it cannot read
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({line[:80]})") from error


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of every update up to the folder's last training state; [] if there is none.

    UserError if that state is damaged: an earlier one would lack records.
    """
    paths = saved_states(folder)
    return read_state(paths[0])["records"] if paths else []


def save_weights(named: Mapping[str, Tensor], path: Path, ema: Sequence[Tensor] | None = None) -> None:
    """Write the trained parameters as "last.<name>", and their averages (in the same order) as "ema.<name>"."""
    tensors = {f"last.{name}": p.detach() for name, p in named.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": mean for name, mean in zip(named, ema, strict=True)}
    contiguous = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    _replace(path, lambda temporary: save_file(contiguous, temporary), sealed=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of ``save_weights``. Raise Damaged if it is not what was written."""
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Damaged(path, why=f"it cannot be read: {error}") from error


def load_weights(flow: Flow, path: Path, which: str = "ema") -> None:
    """Copy trained weights, "ema" or "last", into ``flow``.

    Raise Damaged if the file is not what was written, UserError unless names and shapes match exactly.
    """
    tensors = read_weights(path)
    stored = {name.removeprefix(f"{which}."): t for name, t in tensors.items() if name.startswith(f"{which}.")}
    if not stored:
        kinds = ", ".join(sorted({name.split(".")[0] for name in tensors}))
        raise UserError(f"{path}: there are no {which!r} weights in it; choose one of: {kinds}")
    copy_parameters(dict(flow.named_parameters()), stored, path)

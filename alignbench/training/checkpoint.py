"""Files that are whole or absent: resumable training states, and final weights.

The last few states are kept, each named by its batch and its hash: what a disk damages is noticed, and the one before
it serves. Nothing here unpickles objects: states hold tensors and plain data (``weights_only``), weights are
safetensors.
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
from alignbench.store.files import flush, write

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Flow
from alignbench.weights import copy_parameters

FINAL = "final.safetensors"  # in a run's checkpoint folder once training is over
STATE = re.compile(r"step_(\d+)-([0-9a-f]{16})\.pt")  # beside it: batches done, head of the content's sha256


def _replace(path: Path, content: Callable[[Path], object]) -> None:
    """``store.write``, for libraries that report a full disk in their own way. UserError if the disk does not take it.

    A file has one writer, so temporary files of that name are a killed writer's, and removed.
    """
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    try:
        write(path, content)
    except (RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for a disk that is full
        why = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({why}); free space there, or choose another store") from error


class _Hashed:
    """A file to write to that hashes what passes, before a disk can damage it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def states(folder: Path) -> list[Path]:
    """The folder's training states, whole or damaged, the latest batch first."""
    found = [path for path in folder.glob("step_*.pt") if STATE.fullmatch(path.name)]
    return sorted(found, key=_batches, reverse=True)


def _batches(path: Path) -> int:
    match = STATE.fullmatch(path.name)
    assert match
    return int(match[1])


def save_state(folder: Path, state: dict[str, Any], keep: int = 1) -> Path:
    """Add a training state, then remove all but the last ``keep``. ``state``: "step", tensors and plain data.

    One rename makes it appear, whole and under its hash: there is no moment at which a kill leaves no valid state.
    """
    fresh, digest = folder / "step.new", ""

    def content(path: Path) -> None:
        nonlocal digest
        with path.open("wb") as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)  # type: ignore[arg-type]  # of a file it needs no more than these methods
            digest = hashed.sha256.hexdigest()[:16]

    _replace(fresh, content)
    path = fresh.replace(folder / f"step_{state['step']:06}-{digest}.pt")
    flush(folder)
    earlier = [other for other in states(folder) if _batches(other) < state["step"]]
    for other in set(states(folder)) - {path, *earlier[: keep - 1]}:  # a later one: damaged, or it had been resumed
        other.unlink(missing_ok=True)
    return path


def read_state(path: Path, *, verify: bool = True, mapped: bool = True) -> dict[str, Any]:
    """A training state on the CPU, read or ``mapped``. UserError if it is damaged (where ``verify``) or unreadable."""
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
    except Exception as error:  # torch raises many kinds for what it does not take
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({line[:80]})") from error


def load_records(folder: Path) -> list[dict[str, Any]]:
    """The records of every update up to the folder's last training state; [] where there is none.

    UserError if that one is damaged: an earlier one's records would be too few.
    """
    found = states(folder)
    return read_state(found[0])["records"] if found else []


def save_weights(named: Mapping[str, Tensor], path: Path, ema: Sequence[Tensor] | None = None) -> None:
    """The trained parameters, as they are ("last.<name>") and averaged ("ema.<name>", in the same order)."""
    tensors = {f"last.{name}": p.detach() for name, p in named.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": average for name, average in zip(named, ema, strict=True)}
    contiguous = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    _replace(path, lambda temporary: save_file(contiguous, temporary))


def load_weights(flow: Flow, path: Path, which: str = "ema") -> None:
    """Put trained weights into ``flow``: "ema" or "last". UserError if the file does not have exactly these."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable weight file ({error}); train the run again") from error
    stored = {name.removeprefix(f"{which}."): t for name, t in tensors.items() if name.startswith(f"{which}.")}
    if not stored:
        kinds = ", ".join(sorted({name.split(".")[0] for name in tensors}))
        raise UserError(f"{path}: there are no {which!r} weights in it; choose one of: {kinds}")
    copy_parameters(dict(flow.named_parameters()), stored, path)

"""Files that are whole or absent: resumable training states, and final weights.

Nothing here unpickles objects: states hold tensors and plain data (``weights_only``), weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alignbench.config import UserError
from alignbench.store import write

if TYPE_CHECKING:
    from torch import Tensor

    from alignbench.flow import Flow

STATE = "state.pt"  # in a run's checkpoint folder: the last batch boundary
FINAL = "final.safetensors"  # beside it once training is over


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


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the folder's training state. ``state``: tensors and plain data."""
    _replace(folder / STATE, lambda path: torch.save(state, path))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The folder's training state on the CPU, or None where there is none. UserError if it cannot be read."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable checkpoint ({line[:80]}); delete it to train from the start"
        ) from error


def load_records(folder: Path) -> list[dict[str, Any]]:
    """The records of every update up to the folder's training state; [] where there is none."""
    state = load_state(folder)
    return [] if state is None else state["records"]


def save_weights(flow: Flow, path: Path, ema: list[Tensor] | None = None) -> None:
    """The trained parameters, as they are ("last.<name>") and averaged ("ema.<name>", in the same order)."""
    named = list(flow.named_parameters())
    tensors = {f"last.{name}": p.detach() for name, p in named}
    if ema is not None:
        tensors |= {f"ema.{name}": average for (name, _), average in zip(named, ema, strict=True)}
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


def copy_parameters(into: Mapping[str, Tensor], stored: dict[str, Tensor], where: Path) -> None:
    """In place. UserError unless names and shapes are the same."""
    shapes = {name: tuple(p.shape) for name, p in into.items()}
    found = {name: tuple(t.shape) for name, t in stored.items()}
    if odd := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        detail = (
            f"{odd[0]} is {found.get(odd[0], 'absent')} in the file and {shapes.get(odd[0], 'absent')} in the model"
        )
        raise UserError(f"{where}: {len(odd)} parameters do not fit the model ({detail}); is it the same backend?")
    with torch.no_grad():
        for name, p in into.items():
            p.copy_(stored[name])

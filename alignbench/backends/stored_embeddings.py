"""Prompts' embeddings in a store: made once by the text encoders alone, then read from disk, row by row.

    store/embeddings/<backend>-<id>/   about.json, and files of about a gigabyte: <digest of its prompts>.safetensors

The id hashes all that an embedding's bits depend on. A file has a row of every tensor for each of its prompts; its
header says which prompts these are, with a checksum of each row, which is compared whenever the row is read. Files are
mapped into memory, so what is held of them is what was read lately, in the page cache that all processes share.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from alignbench.backends.pipeline import Text
from alignbench.config import UserError
from alignbench.digests import content_id, fingerprint
from alignbench.store.artefacts import Store
from alignbench.store.files import write, write_json
from alignbench.store.locks import held

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 2**30  # bytes of a file's rows: it is put together in memory


def about(backend: Any, source: str | None, device: torch.device) -> dict[str, Any]:
    """All that a prompt's embedding depends on, to the last bit.

    ``backend``: the settings of one that is derived from PipelineBackend; ``source``: the digest of a plug-in's code.
    """
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {
        "backend": backend.name,
        "version": backend.text_version,
        "source": source,
        "files": fingerprint(backend.text_files()),
        "dtype": backend.dtype,
        "tokens": backend.text_tokens,
        "width": backend.read("transformer").get("joint_attention_dim"),  # of SD3's zeros, where it has no T5
        "device": f"{device.type}, {on}",
        **{package: version(package) for package in ("torch", "transformers", "tokenizers")},
    }


def name(backend: Any, source: str | None, device: torch.device) -> str:
    """Of a backend's folder."""
    facts = about(backend, source, device)
    return f"{facts['backend']}-{content_id(facts)}"


def prepare(
    store: Store,
    backend: Any,
    source: str | None,
    device: torch.device,
    prompts: Sequence[str],
    progress: Callable[[str, float | None], Any],
    may_stop: Callable[[], Any],
) -> str:
    """Encode those of ``prompts`` that the store does not have; the folder's name. The encoders are gone afterwards.

    Of several processes one encodes, and the others wait for it. ``progress`` is told what is going on, and the share
    of it that is done; ``may_stop`` may raise where nothing is lost. UserError if the disk cannot take them all, or
    holds a damaged file.
    """
    folder = store.embeddings / name(backend, source, device)
    if not Stored(folder, device).missing(prompts):
        return folder.name

    def waiting(holder: str) -> None:
        progress(f"waiting for the prompts' embeddings, {holder}", None)
        may_stop()

    with held(store.root / "locks" / f"embeddings-{folder.name}.lock", waiting):
        missing = Stored(folder, device).missing(prompts)  # by now
        if missing:
            for half in folder.glob(".*.tmp"):  # of a process that was killed while writing
                half.unlink()
            write_json(folder / "about.json", about(backend, source, device))
            progress("loading the text encoders", None)
            encode(folder, backend.text_alone(device), missing, progress, may_stop)
    gc.collect()  # modules refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return folder.name


def encode(
    folder: Path,
    text: Text,
    prompts: Sequence[str],
    progress: Callable[[str, float], Any],
    may_stop: Callable[[], Any],
) -> None:
    """Add the embeddings of ``prompts``, file by file; what is written stays, wherever this ends."""
    rows: dict[str, dict[str, Tensor]] = {}
    first = text.encode_one(prompts[0])
    size = sum(tensor.nbytes for tensor in first.values())
    _check_space(folder, size, len(prompts))
    for done, prompt in enumerate(prompts, 1):
        rows[prompt] = text.encode_one(prompt) if done > 1 else first
        if done == len(prompts) or (len(rows) + 1) * size > SHARD:
            _write(folder, rows)
            rows.clear()
            may_stop()
        progress("encoding prompts", done / len(prompts))


def _check_space(folder: Path, size: int, count: int) -> None:
    free = shutil.disk_usage(folder).free
    if size * count > free:
        what = f"the embeddings of {count:,} prompts take {size * count / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
        raise UserError(f"{folder}: {what}; free some, name fewer prompts, or choose backend.embeddings: computed")


def _write(folder: Path, rows: dict[str, dict[str, Tensor]]) -> None:
    """One file, whole or not at all."""
    names = next(iter(rows.values()))
    facts = {"prompts": list(rows), "checksums": list(map(_checksum, rows.values()))}
    tensors = {name: torch.stack([row[name] for row in rows.values()]) for name in names}
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]  # no line breaks within prompts
    write(folder / f"{digest}.safetensors", save(tensors, {key: json.dumps(value) for key, value in facts.items()}))


def _checksum(row: dict[str, Tensor]) -> int:
    found = 0
    for name in sorted(row):
        found = zlib.crc32(row[name].contiguous().view(torch.uint8).numpy().data, found)
    return found


class Row(NamedTuple):
    """Where a prompt's embedding lies."""

    path: Path
    file: Any  # open, mapped
    number: int
    checksum: int


class Stored(Text):
    """Encoded prompts, read from a folder as they are asked for. UserError for a file that is damaged."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(device, kept=0)
        self.folder = folder
        self.rows: dict[str, Row] = {}
        for path in sorted(folder.glob("[!.]*.safetensors")):
            with _refusing(path):
                file = safe_open(path, framework="pt")
                prompts, checksums = (json.loads(file.metadata()[key]) for key in ("prompts", "checksums"))
            for i, (prompt, checksum) in enumerate(zip(prompts, checksums, strict=True)):
                self.rows[prompt] = Row(path, file, i, checksum)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are not here, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self.rows:
            what = f"there is no embedding of the prompt {prompt!r}, which neither training nor evaluation named"
            raise UserError(f"{self.folder}: {what}; choose backend.embeddings: computed")
        place = self.rows[prompt]
        with _refusing(place.path):
            row = {name: place.file.get_slice(name)[place.number] for name in place.file.keys()}  # noqa: SIM118 - a file
            if _checksum(row) != place.checksum:
                raise SafetensorError("its content has changed since it was written")
        return row


@contextlib.contextmanager
def _refusing(path: Path):
    try:
        yield
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        text = f"damaged ({why}); delete it and run the same command again, which encodes its prompts once more"
        raise UserError(f"{path}: {text}") from error

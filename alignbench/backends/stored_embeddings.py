"""Prompt embeddings in a store: made once by the text encoders alone, then read from disk, row by row.

    store/embeddings/<backend>-<id>/   about.json, and files of about a gigabyte: <digest of its prompts>.safetensors

The id hashes everything that an embedding's bits depend on. A file has a row of every tensor for each of its prompts;
its header lists the prompts and a checksum of each row, which is verified at every read. Files are memory-mapped: only
rows read recently take memory, in the page cache that all processes share.
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

from alignbench.backends.pipeline import PromptEncoder
from alignbench.config import UserError
from alignbench.digests import content_id, fingerprint
from alignbench.store.artefacts import Store
from alignbench.store.files import write, write_json
from alignbench.store.locks import held

if TYPE_CHECKING:
    from torch import Tensor

FILE_BYTES = 2**30  # of a file's rows, which are collected in memory


def cache_key(backend: Any, source: str | None, device: torch.device) -> dict[str, Any]:
    """Return everything that the bits of a prompt's embedding depend on.

    ``backend``: settings derived from PipelineBackend; ``source``: the digest of a plug-in's code.
    """
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {
        "backend": backend.name,
        "version": backend.text_version,
        "source": source,
        "files": fingerprint(backend.text_files()),
        "dtype": backend.dtype,
        "tokens": backend.text_tokens,
        "width": backend.read("transformer").get("joint_attention_dim"),  # of the zeros of an SD3 without T5
        "device": f"{device.type}, {model}",
        **{package: version(package) for package in ("torch", "transformers", "tokenizers")},
    }


def folder_name(backend: Any, source: str | None, device: torch.device) -> str:
    """Return the name of the folder of a backend's embeddings."""
    key = cache_key(backend, source, device)
    return f"{key['backend']}-{content_id(key)}"


def prepare(
    store: Store,
    backend: Any,
    source: str | None,
    device: torch.device,
    prompts: Sequence[str],
    progress: Callable[[str, float | None], Any],
    may_stop: Callable[[], Any],
) -> str:
    """Encode the prompts that the store lacks, free the encoders, and return the folder's name.

    One of several processes encodes, and the others wait. ``progress`` is called with the activity and the share done;
    ``may_stop`` is called at points where it may raise without losing work. UserError if the disk is too small or holds
    a damaged file.
    """
    folder = store.embeddings / folder_name(backend, source, device)
    if not StoredEmbeddings(folder, device).missing(prompts):
        return folder.name

    def waiting(holder: str) -> None:
        progress(f"waiting for the prompts' embeddings, {holder}", None)
        may_stop()

    with held(store.root / "locks" / f"embeddings-{folder.name}.lock", waiting):
        missing = StoredEmbeddings(folder, device).missing(prompts)  # another process may have encoded some
        if missing:
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
                leftover.unlink()
            write_json(folder / "about.json", cache_key(backend, source, device))
            progress("loading the text encoders", None)
            encode(folder, backend.load_text_encoders(device), missing, progress, may_stop)
    gc.collect()  # modules have reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return folder.name


def encode(
    folder: Path,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    progress: Callable[[str, float], Any],
    may_stop: Callable[[], Any],
) -> None:
    """Add the embeddings of ``prompts``, file by file; files already written stay, however this ends."""
    rows: dict[str, dict[str, Tensor]] = {}
    first = encoder.encode_one(prompts[0])
    size = sum(tensor.nbytes for tensor in first.values())
    _check_space(folder, size, len(prompts))
    for done, prompt in enumerate(prompts, 1):
        rows[prompt] = encoder.encode_one(prompt) if done > 1 else first
        if done == len(prompts) or (len(rows) + 1) * size > FILE_BYTES:
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
    """Write one file of rows, whole or not at all."""
    names = next(iter(rows.values()))
    header = {"prompts": list(rows), "checksums": list(map(_checksum, rows.values()))}
    tensors = {name: torch.stack([row[name] for row in rows.values()]) for name in names}
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]  # prompts have no line breaks
    write(folder / f"{digest}.safetensors", save(tensors, {key: json.dumps(value) for key, value in header.items()}))


def _checksum(row: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(row):
        checksum = zlib.crc32(row[name].contiguous().view(torch.uint8).numpy().data, checksum)
    return checksum


class Row(NamedTuple):
    """The place of a prompt's embedding, and its checksum."""

    path: Path
    file: Any  # open and memory-mapped
    number: int
    checksum: int


class StoredEmbeddings(PromptEncoder):
    """Encoded prompts, read from a folder when needed. UserError for a damaged file."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(device, cached=0)
        self.folder = folder
        self.rows: dict[str, Row] = {}
        for path in sorted(folder.glob("[!.]*.safetensors")):
            with _refuse_damage(path):
                file = safe_open(path, framework="pt")
                prompts, checksums = (json.loads(file.metadata()[key]) for key in ("prompts", "checksums"))
            for i, (prompt, checksum) in enumerate(zip(prompts, checksums, strict=True)):
                self.rows[prompt] = Row(path, file, i, checksum)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts without an embedding, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self.rows:
            what = f"there is no embedding of the prompt {prompt!r}, which neither training nor evaluation uses"
            raise UserError(f"{self.folder}: {what}; choose backend.embeddings: computed")
        place = self.rows[prompt]
        with _refuse_damage(place.path):
            row = {name: place.file.get_slice(name)[place.number] for name in place.file.keys()}  # noqa: SIM118 - not a mapping
            if _checksum(row) != place.checksum:
                raise SafetensorError("its content has changed since it was written")
        return row


@contextlib.contextmanager
def _refuse_damage(path: Path):
    """Turn errors of reading ``path`` into a UserError."""
    try:
        yield
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        text = f"damaged ({why}); delete it and run the same command again, which encodes its prompts once more"
        raise UserError(f"{path}: {text}") from error

"""Reader of a sweep's many small tables, score files and training records, as one table.

A sweep of a thousand runs has six thousand such files, which take longer to decode than the rest of its report. The
result is therefore cached in one file, together with a digest of every byte that it was read from. The cache is used
only while the digest matches: if any file is changed, removed or added, all are read again.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from alignbench.config import UserError
from alignbench.store.files import check_content, read_json, write, write_json

Columns = dict[str, NDArray[Any]]

IMAGE = {"prompt_id": "large_string", "tag": "large_string", "index": "int64"}  # the image of a row; Arrow types
FACTS = ("label", "method", "seed", "run", "evaluator")


class ScoreFile(NamedTuple):
    """A score file, and the facts about its rows in the sweep's table."""

    label: str
    method: str
    seed: int
    run: str  # id
    evaluator: str
    metrics: tuple[str, ...]  # columns of the file
    path: str  # below the store


def read_scores(root: Path | str, files: Iterable[ScoreFile], kept: Path | None = None) -> pd.DataFrame:
    """Return one row per image and metric of the score files that exist. UserError if one is damaged.

    Text columns are categorical, since rows outnumber names a thousandfold. ``kept``: path of the cache.
    """
    files = list(files)
    paths = [f"{root}/{file.path}" for file in files]
    return _consolidated(kept, files, paths, lambda contents: _score_table(files, contents))


def read_columns(files: dict[str, str], kept: Path | None = None) -> dict[str, Columns]:
    """Return key -> columns of the parquet files that exist; missing numbers are nan.

    UserError if a file is damaged. ``kept``: path of the cache.
    """
    table = _consolidated(kept, list(files), list(files.values()), lambda contents: _stacked(files, contents))
    return {
        row["key"]: {name.partition(" ")[2]: row[name] for name in row["columns"]} for row in table.to_dict("records")
    }


# -- reading ----------------------------------------------------------------------------------------------------------

Contents = Iterator[tuple[str, bytes | None]]  # path and content of each file; None if it does not exist


def _score_table(files: Sequence[ScoreFile], contents: Contents) -> pd.DataFrame:
    pieces, facts = [], []
    for file, (path, content) in zip(files, contents):
        if content is None:
            continue
        table = _decode(path, content, IMAGE | dict.fromkeys(file.metrics, "double") | {"ok": "bool"})
        for name in file.metrics:
            pieces.append(table.select([*IMAGE, "ok"]).append_column("score", table[name]))
            facts.append([getattr(file, fact) for fact in FACTS] + [name])
    order = [*FACTS, "metric", *IMAGE, "score", "ok"]
    if not pieces:
        return pd.DataFrame({name: [] for name in order})
    counts = [piece.num_rows for piece in pieces]
    columns: dict[str, Any] = {}
    for name, each in zip(order, zip(*facts)):
        codes, values = pd.factorize(np.array(each, object))
        column = np.repeat(codes.astype(np.int32), counts)
        whole = name == "seed"
        columns[name] = values.astype(int)[column] if whole else pd.Categorical.from_codes(column, pd.Index(values))
    rows = pa.concat_tables(pieces).combine_chunks()
    for name, each in zip(rows.column_names, rows.columns):
        columns[name] = (each.dictionary_encode() if name in ("prompt_id", "tag") else each).to_pandas().array
    return pd.DataFrame(columns, columns=order)


def _stacked(keys: Iterable[str], contents: Contents) -> pd.DataFrame:
    """Stack tables of unlike columns: one row per file, one column per name and type, whose entries are arrays."""
    rows = []
    for key, (path, content) in zip(keys, contents):
        if content is not None:
            arrays = {name: column.to_numpy() for name, column in _named(_decode(path, content))}
            typed = {f"{array.dtype} {name}": array for name, array in arrays.items()}
            rows.append({"key": key, "columns": list(typed), **typed})
    return pd.DataFrame(rows)


def _named(table: pa.Table) -> Iterable[tuple[str, pa.ChunkedArray]]:
    return zip(table.column_names, table.columns)


def _decode(path: str, content: bytes, types: dict[str, str] | None = None) -> pa.Table:
    """Return a parquet file's columns, or only those in ``types`` (Arrow types). UserError if some are missing."""
    try:
        file = parquet.ParquetFile(pa.BufferReader(check_content(Path(path), content)))
        table = file.read(columns=list(types) if types else None, use_threads=False)
        wanted = pa.schema(types.items()) if types else table.schema
        return table if table.schema == wanted else table.select(wanted.names).cast(wanted)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and run the sweep again") from None


# -- cache ------------------------------------------------------------------------------------------------------------


def _consolidated(
    kept: Path | None, about: Any, paths: Sequence[str], read: Callable[[Contents], pd.DataFrame]
) -> pd.DataFrame:
    """Return the result of ``read``, from the cache if it was made from the same ``about`` and the same bytes."""
    if kept is None:
        return read(_contents(paths, hashlib.sha256()))
    if (cached := _load(kept, about, paths)) is not None:
        return cached
    sources = _digest(about)
    table = read(_contents(paths, sources))  # the digest of the bytes decoded, which may have changed since _load
    if len(table):
        with suppress(UserError, pa.ArrowException):  # if the store is read-only or full, read again next time
            _keep(kept, table, sources.hexdigest())
    return table


def _digest(about: Any) -> hashlib._Hash:
    """Return a digest started with what determines the table besides the files: this module, and ``about``."""
    return hashlib.sha256(Path(__file__).read_bytes() + repr(about).encode())


def _contents(paths: Iterable[str], digest: hashlib._Hash) -> Contents:
    """Yield the path and content of every file, updating the digest."""
    for path in paths:
        content = None
        with suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            content = file.read()
        digest.update(b"absent" if content is None else b"%d bytes:" % len(content))
        digest.update(content or b"")
        yield path, content


def _load(kept: Path, about: Any, paths: Sequence[str]) -> pd.DataFrame | None:
    """Return the cached table; None if it is missing, damaged, or was made from something else."""
    with suppress(OSError, pa.ArrowException):
        record = read_json(kept.with_suffix(".json"))
        if record is None:
            return None
        sources = _digest(about)
        for _ in _contents(paths, sources):
            pass
        content = kept.with_suffix(".feather").read_bytes()
        if record == _record(sources.hexdigest(), content):
            return pd.read_feather(io.BytesIO(content))
    return None


def _keep(kept: Path, table: pd.DataFrame, sources: str) -> None:
    """Write the table in Arrow's own format, which preserves types and the order of categories; then its record."""
    file = io.BytesIO()
    table.to_feather(file)
    write(kept.with_suffix(".feather"), file.getvalue())
    write_json(kept.with_suffix(".json"), _record(sources, file.getvalue()))


def _record(sources: str, content: bytes) -> dict[str, str]:
    return {"sources": sources, "table": hashlib.sha256(content).hexdigest()}

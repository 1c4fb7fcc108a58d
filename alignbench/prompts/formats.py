"""Prompt files as people keep and publish them: text, JSON, tables. Each is read into lines of text, tag and metadata.

In tables and objects the prompt's name is ``prompt``, ``prompts``, ``caption``, ``captions`` or ``text``, in any case;
a table's tag is its column ``tag`` or ``category``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, read_text

PLAIN = ("string", "large_string", "int8", "int16", "int32", "int64")  # parquet's columns that describe a prompt
TEXT, TAG = ("prompt", "prompts", "caption", "captions", "text"), ("tag", "category")


class Line(NamedTuple):
    """A prompt as written. ``spot``: file and line, for errors; ``metadata``: the whole object or row, if it is one."""

    spot: str
    text: str
    tag: str = ""
    metadata: dict[str, Any] | None = None


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of a prompt file, in order. Raise UserError for the first that is unusable."""
    return READERS[path.suffix.lower()](path)


def column(names: Iterable[str], known: Sequence[str], spot: str) -> str:
    """Return the one name that is known, in any case. Raise UserError for none and for several."""
    names = [name for name in names if isinstance(name, str)]
    found = [name for name in names if name.strip().lower() in known]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{spot}: prompts may be in {' or '.join(map(repr, found))}; rename or remove all but one")
    shown = ", ".join(name[:40] for name in names[:12]) or "none"
    raise UserError(f"{spot}: nothing here is called {', '.join(known)}; name one of these so: {shown}")


def from_object(data: Any, spot: str, tags: Sequence[str] = TAG[:1]) -> Line:
    """Return the prompt of an object, under "prompt" or the one key of another known name, with its tag.

    Raise UserError if it has none. ``tags``: names of the tag, the first that is there.
    """
    if not isinstance(data, dict):
        raise UserError(f'{spot}: expected an object with a text "prompt"')
    text = data.get("prompt" if "prompt" in data else column(data, TEXT, spot))
    tag = next((data[name] for name in tags if name in data), "")
    if not isinstance(text, str):
        raise UserError(f'{spot}: expected an object with a text "prompt"')
    if not isinstance(tag, str):
        raise UserError(f'{spot}: "tag" is {tag!r}; it must be text')
    return Line(spot, text, tag, data)


def parse_json(text: str, spot: str) -> Any:
    """Return JSON as plain data. Raise UserError if it is not."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{spot}: not JSON: {error}") from None


def _text(path: Path) -> Iterator[Line]:
    """Yield the lines of a text. Raise UserError if the first one shows that the file is of another format."""
    lines = list(_lines(path))
    first = lines[0].text.strip()
    if re.fullmatch(r'\{\s*".*\}', first):
        raise UserError(f"{lines[0].spot}: {first[:40]!r} is JSON, not a prompt; name the file .jsonl")
    names = [name.strip().strip('"').lower() for name in re.split(r"[,;\t]", first)]
    if len(lines) > 1 and {*names} & {*TEXT} and all(re.fullmatch(r"\w*", name) for name in names):
        raise UserError(
            f"{lines[0].spot}: {first[:40]!r} names columns; name the file .csv or .tsv, or remove the line"
        )
    return iter(lines)


def _lines(path: Path) -> Iterator[Line]:
    lines = read_text(path).rstrip().split("\n")  # not splitlines(): it also splits at U+2028 and others
    return (Line(f"{path}:{number}", line) for number, line in enumerate(lines, 1))


def _json_lines(path: Path) -> Iterator[Line]:
    return (json_line(line, spot) for spot, line, *_ in _lines(path))


def json_line(line: str, spot: str) -> Line:
    """Return the prompt on a line of a .jsonl file. Raise UserError for a line that is unusable."""
    if not line.strip():
        raise UserError(f"{spot}: the line is empty; remove it")
    return from_object(parse_json(line, spot), spot)


def _json(path: Path) -> Iterator[Line]:
    """Yield the prompts of a list of texts or objects, {key: object}, or {"prompts": list}."""
    data = parse_json(read_text(path), str(path))
    if isinstance(data, dict) and not all(isinstance(value, dict) for value in data.values()):
        data = data[column(data, TEXT, str(path))]
    if not isinstance(data, list | dict):
        raise UserError(f'{path}: expected a list of prompts, or of objects with a text "prompt"')
    for key, item in data.items() if isinstance(data, dict) else enumerate(data):
        spot = f"{path}: [{key}]"
        about = {"key": key, **item} if isinstance(data, dict) and isinstance(item, dict) else item
        yield Line(spot, item) if isinstance(item, str) else from_object(about, spot, TAG)


def _comma_separated(path: Path) -> Iterator[Line]:
    text = read_text(path)
    first = text.lstrip().partition("\n")[0]
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in ",;\t"}
    known = [delimiter for delimiter, names in headers.items() if {name.strip().lower() for name in names} & {*TEXT}]
    return _table(path, _rows(path, text, known[0] if known else ",", skipinitialspace=True))


def _tab_separated(path: Path) -> Iterator[Line]:
    """Yield a table's prompts, with quotes as they stand unless the file needs them or quotes every field."""
    text = read_text(path)
    plain = list(_rows(path, text, "\t", quoting=csv.QUOTE_NONE))
    fields = [field for _, row in plain for field in row if field]
    opened = [field for field in fields if field.startswith('"')]
    needed = any(len(field) < 2 or field[-1] != '"' or '"' in field[1:-1] for field in opened)
    if needed or len(opened) == len(fields):
        try:
            return _table(path, iter(list(_rows(path, text, "\t"))))
        except UserError:
            pass  # a quote within a prompt
    return _table(path, iter(plain))


def _rows(path: Path, text: str, delimiter: str, **options: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not empty, each with its line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **options)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = f"not a table: {error}; put a text in quotes, and write quotes within it twice"
            raise UserError(f"{path}:{reader.line_num}: {what}") from None
        if row:
            yield reader.line_num, row


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Line]:
    _, names = next(rows, (1, []))
    text = names.index(column(names, TEXT, f"{path}:1"))
    lower = [name.strip().lower() for name in names]
    tag = next((lower.index(name) for name in TAG if name in lower), len(names))
    for number, row in rows:
        if not text < len(row) <= len(names):
            what = f"{len(row)} fields, where the first line names {len(names)}"
            raise UserError(f"{path}:{number}: {what}; put a text that contains the separator in quotes")
        yield Line(f"{path}:{number}", row[text], row[tag] if tag < len(row) else "", dict(zip(names, row)))


def _parquet(path: Path) -> Iterator[Line]:
    """Yield the prompts of a parquet file. Of further columns those of texts and whole numbers are read, not images."""
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        text = column(schema.names, TEXT, str(path))
        tag = next((name for known in TAG for name in schema.names if name.strip().lower() == known), None)
        plain = [field.name for field in schema if str(field.type).removeprefix("u") in PLAIN]
        table = pyarrow.parquet.read_table(path, columns=list(dict.fromkeys([text, *([tag] if tag else []), *plain])))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    for number, row in enumerate(rows):
        if not isinstance(row[text], str):
            raise UserError(f"{path}: row {number}: {text} is {row[text]!r}; it must be text")
        name = row[tag] if tag else None
        yield Line(f"{path}: row {number}", row[text], "" if name is None else str(name), row)


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
}

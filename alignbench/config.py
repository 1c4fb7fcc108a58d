"""Strict settings: unknown keys, wrong types and typos are errors that say where, what, and what instead."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml


class UserError(Exception):
    """A mistake that the user can mend. Its text is one clear line: where, what, what instead."""


class Requirement(typing.NamedTuple):
    """Files that have to be on this machine, and the command that fetches them."""

    what: str  # a repository, a file
    text: str = ""  # what an error says if they are absent
    command: str = ""
    note: str = ""  # what to accept or to know before
    found: Path | None = None  # where they lie; None: they are absent

    @property
    def path(self) -> Path:
        """Return where they lie. Raise Missing if they are absent."""
        if self.found is None:
            raise Missing(self.text, self)
        return self.found


class Missing(UserError):
    """A file that was never put on this machine. ``requirement``: what a command fetches; None if no command does."""

    def __init__(self, text: str, requirement: Requirement | None = None) -> None:
        super().__init__(text)
        self.requirement = requirement


class Interrupted(Exception):
    """Somebody asked for a stop. No failure: what is done is saved, and the same task goes on from there."""


def cache() -> Path:
    """Where what is made once per machine is kept: $ALIGNBENCH_CACHE, or ~/.cache/alignbench."""
    return Path(os.environ.get("ALIGNBENCH_CACHE") or "~/.cache/alignbench").expanduser().resolve()


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _KeywordOnly(msgspec.StructMeta):
    """msgspec's ``kw_only`` holds for one class, not for its subclasses; settings want it everywhere."""

    def __new__(mcls, name: str, bases: tuple, namespace: dict, **kwargs: Any) -> type:
        return super().__new__(mcls, name, bases, namespace, **{"kw_only": True, **kwargs})


class Config(msgspec.Struct, metaclass=_KeywordOnly, frozen=True, forbid_unknown_fields=True, dict=True):
    """Base of everything a user can set. Frozen: a run's settings never change after they were hashed.

    ``dict=True`` lets subclasses keep a loaded model in a ``functools.cached_property``; only the fields are settings.
    """

    def requirements(self) -> list[Requirement]:
        """Return what has to be fetched once, there or absent. Raise UserError for a name that leads nowhere."""
        return []


C = TypeVar("C", bound=Config)


def settings(config: Config) -> dict[str, Any]:
    """Every field of ``config`` as plain data, defaults included, headed by its ``name`` when the class has one."""
    name = class_name(type(config))
    return ({"name": name} if name else {}) | msgspec.json.decode(msgspec.json.encode(config))


def class_name(cls: type[Config]) -> str | None:
    """The ``name`` by which a method, an evaluator or a backend is chosen in YAML; None for other settings."""
    name = getattr(cls, "name", None)
    return name if isinstance(name, str) else None


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(cls: type[C], data: Any, where: str) -> C:
    """``data`` as ``cls``, strictly. ``where``: the place to name in errors, as in ``sweeps/x.yaml: base.training``."""
    _check_finite(data, where)
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise UserError(_explain(cls, data, where, str(error))) from None
    except UserError as error:
        raise UserError(f"{join(where, '')}: {error}") from None


def join(where: str, path: str) -> str:
    """``sweeps/x.yaml: base`` and ``training.lr`` -> ``sweeps/x.yaml: base.training.lr``."""
    if not path:
        return where.rstrip(": ")
    return where + path if where.endswith((" ", ".")) or path.startswith("[") else f"{where}.{path}"


def did_you_mean(word: str, known: Iterable[str], what: str = "known") -> str:
    """The tail of an error about ``word``: the nearest known name, if near, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    return f"{guess} ({what}: {', '.join(known) or 'none'})"


_AT = re.compile(r" - at `(key` in `)?\$(?P<path>.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*)`")
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")
_WORDS = {
    "object": "settings (key: value)",
    "array": "a list",
    "null": "nothing",
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
}


def _explain(cls: type[Config], data: Any, where: str, message: str) -> str:
    """msgspec's message as one line in our own words, with the full path and what would be right."""
    at = _AT.search(message)
    path = at["path"].lstrip(".") if at else ""
    owner = _class_at(cls, path)
    title = class_name(owner) or owner.__name__.lower()
    text = message[: at.start()] if at else message
    if unknown := _UNKNOWN.match(text):
        field = unknown["field"]
        spot = join(where, f"{path}.{field}".lstrip("."))
        return f"{spot}: {title} has no such setting{did_you_mean(field, owner.__struct_fields__, 'settings')}"
    if missing := _MISSING.match(text):
        return f"{join(where, path)}: '{missing['field']}' is missing; {title} cannot do without it"
    text = re.sub(r"`([^`]*)`", lambda m: " or ".join(_WORDS.get(w, w) for w in m[1].split(" | ")), text)
    instead = _choices(cls, path) + _refused(cls, data, path)
    return f"{join(where, path)}: {text[0].lower()}{text[1:]}{_shown(data, path)}{instead}"


def _parts(path: str) -> list[str | int]:
    return [int(i) if i else key for key, i in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]


def _shown(data: Any, path: str) -> str:
    """`` (0.5)``: the offending value, when it is short enough to help."""
    try:
        for part in _parts(path):
            data = data[part]
    except (KeyError, IndexError, TypeError):
        return ""
    return f" ({data!r})" if isinstance(data, bool | int | float | str) and len(repr(data)) < 60 else ""


def _types_at(cls: type[Config], path: str) -> list[Any]:
    """The types that the setting at ``path`` may have: union members apart, ``Annotated`` unwrapped."""
    found: list[Any] = [cls]
    for part in _parts(path):
        owner = next((t for t in found if isinstance(t, type) and issubclass(t, Config)), None)
        hints = typing.get_type_hints(owner) if owner else {}
        found = list(_members(hints[part])) if part in hints else []
    return found


def _members(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member)
    else:
        yield hint


def _class_at(cls: type[Config], path: str) -> type[Config]:
    return next((t for t in _types_at(cls, path) if isinstance(t, type) and issubclass(t, Config)), cls)


def _choices(cls: type[Config], path: str) -> str:
    values = [v for t in _types_at(cls, path) if typing.get_origin(t) is typing.Literal for v in typing.get_args(t)]
    return f"; choose one of {', '.join(map(str, values))}" if values else ""


def _refused(cls: type[Config], data: Any, path: str) -> str:
    """Why a value that people try is none of them, if the class says so: ``refused``, {setting: {value: why}}."""
    reasons = getattr(cls, "refused", {}).get(path, {})
    return f" ({reasons[data[path]]})" if reasons and data[path] in reasons else ""


def _check_finite(data: Any, where: str) -> None:
    """nan and inf are valid YAML, valid floats, and never a setting."""
    if isinstance(data, float) and not math.isfinite(data):
        raise UserError(f"{where}: {data} is not a number that can be used here")
    if isinstance(data, dict):
        for key, value in data.items():
            _check_finite(value, join(where, str(key)))
    if isinstance(data, list | tuple):
        for i, value in enumerate(data):
            _check_finite(value, join(where, f"[{i}]"))


# -- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: ``1e-5`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor` may repeat
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _at(key_node.start_mark, f"the key {key!r} is not text; put it in quotes")
            if key in seen:
                raise _at(key_node.start_mark, f"the key '{key}' is already set on line {seen[key]}; keep one of them")
            seen[key] = line
        return super().construct_mapping(node, deep)


def _at(mark: yaml.Mark, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """``text`` as plain data. UserError with line number for a syntax error or a key given twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where
        raise UserError(f"{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def load_yaml(path: Path, packaged: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """A YAML file of settings. What it ``extends`` is read first and overlaid, key by key.

    ``extends: other.yaml`` is relative to the file; ``extends: name`` is one of ``packaged``.
    """
    return _load_yaml(path, packaged or {}, ())


def _load_yaml(path: Path, packaged: Mapping[str, Path], chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in chain)}")
    data = parse_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected settings (key: value), got {type(data).__name__}")
    if "extends" not in data:
        return data
    parent = data.pop("extends")
    beside = path.parent / str(parent)
    if not beside.exists() and parent not in packaged:
        raise UserError(f"{path}: extends: there is no file {beside}{did_you_mean(parent, packaged, 'packaged')}")
    found = beside if beside.exists() else packaged[parent]
    return merge(_load_yaml(found, packaged, (*chain, path.resolve())), data)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; UserError when that cannot be had."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, key by key; lists and single values are replaced whole."""
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


# -- dotted paths -----------------------------------------------------------------------------------------------------


def parse_assignment(text: str) -> tuple[str, Any]:
    """``training.batch=8`` -> ("training.batch", 8); the value is read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*", path):
        raise UserError(f"command line: {text!r} is not of the form path.to.setting=value")
    return path, parse_yaml(value, f"command line: {path}")


def put(data: dict[str, Any], path: str, value: Any, where: str) -> dict[str, Any]:
    """A copy of ``data`` with ``value`` at the dotted ``path`` (list items as ``cases[2]``)."""
    head, *rest = _parts(path)
    return _put(data, head, rest, value, where)


def _put(data: Any, head: str | int, rest: list[str | int], value: Any, where: str) -> Any:
    if isinstance(head, int):
        if not isinstance(data, list) or head >= len(data):
            size = f"a list of {len(data)}" if isinstance(data, list) else "no list"
            raise UserError(f"{where}: there is no item [{head}]; this is {size}")
        out: Any = list(data)
        inner = data[head]
    else:
        if not isinstance(data, dict):
            raise UserError(f"{where}: '{head}' is no setting of {data!r}")
        out, inner = dict(data), data.get(head, {})
    out[head] = _put(inner, rest[0], rest[1:], value, where) if rest else value
    return out


def pick(data: dict[str, Any], path: str) -> Any:
    """The value at the dotted ``path``; KeyError when there is none."""
    found: Any = data
    for part in _parts(path):
        try:
            found = found[part]
        except (TypeError, IndexError):
            raise KeyError(path) from None
    return found

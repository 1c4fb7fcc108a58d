"""Strict settings, and the errors that users see.

Unknown keys, wrong types and typos are errors of one line that says where, what, and what instead. ``where`` arguments
name the place for these errors, for instance ``sweeps/x.yaml: base.training``.
"""

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
    """A mistake that the user can correct. Its text is one clear line: where, what, what instead."""


class Requirement(typing.NamedTuple):
    """Files that have to be on this machine, and the command that fetches them.

    - ``what``: a repository or a file.
    - ``text``: the error message if it is absent; ``command``: fetches it; ``note``: a licence to accept, or the like.
    - ``found``: the file or folder; None if it is absent.
    """

    what: str
    text: str = ""
    command: str = ""
    note: str = ""
    found: Path | None = None

    @property
    def path(self) -> Path:
        """The file or folder. Raises Missing if it is absent."""
        if self.found is None:
            raise Missing(self.text, self)
        return self.found


class Missing(UserError):
    """A file that is not on this machine. ``requirement``: how to fetch it; None if no command does."""

    def __init__(self, text: str, requirement: Requirement | None = None) -> None:
        """Make the error with this text."""
        super().__init__(text)
        self.requirement = requirement


class Interrupted(Exception):
    """A stop was requested. Not a failure: progress is saved, and the task resumes from there."""


def cache() -> Path:
    """Return the folder for files that are made once per machine: $ALIGNBENCH_CACHE, or ~/.cache/alignbench."""
    return Path(os.environ.get("ALIGNBENCH_CACHE") or "~/.cache/alignbench").expanduser().resolve()


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _KeywordOnly(msgspec.StructMeta):
    """A metaclass that makes all fields keyword-only; msgspec's ``kw_only`` does not extend to subclasses."""

    def __new__(mcls, name: str, bases: tuple, namespace: dict, **kwargs: Any) -> type:
        return super().__new__(mcls, name, bases, namespace, **{"kw_only": True, **kwargs})


class Config(msgspec.Struct, metaclass=_KeywordOnly, frozen=True, forbid_unknown_fields=True, dict=True):
    """Base class of all settings: each annotated field is one; ``ClassVar`` attributes are not.

    Frozen: settings never change after they were hashed into a run's id. Subclasses may keep a loaded model in a
    ``functools.cached_property``; only the fields are settings.
    """

    def requirements(self) -> list[Requirement]:
        """Return the files that have to be fetched once, present or absent.

        Raise UserError for a name that is neither a file nor something that can be fetched.
        """
        return []


C = TypeVar("C", bound=Config)


def settings(config: Config) -> dict[str, Any]:
    """Return every field as plain data, defaults included; first the ``name``, if the class has one."""
    name = class_name(type(config))
    return ({"name": name} if name else {}) | msgspec.json.decode(msgspec.json.encode(config))


def class_name(cls: type[Config]) -> str | None:
    """Return the ``name`` by which a method, an evaluator or a backend is chosen in YAML; None for other settings."""
    name = getattr(cls, "name", None)
    return name if isinstance(name, str) else None


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(cls: type[C], data: Any, where: str) -> C:
    """Return plain ``data`` as an instance of ``cls``, strictly.

    Raise UserError for an unknown or missing key, a wrong type, nan or inf.
    """
    _check_finite(data, where)
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise UserError(_explain(cls, data, where, str(error))) from None
    except UserError as error:
        raise UserError(f"{join(where, '')}: {error}") from None


def join(where: str, path: str) -> str:
    """Return ``where`` extended by a dotted path: ``x.yaml: base`` and ``training.lr`` -> ``x.yaml: base.training.lr``.

    An empty path returns ``where`` without its trailing colon.
    """
    if not path:
        return where.rstrip(": ")
    return where + path if where.endswith((" ", ".")) or path.startswith("[") else f"{where}.{path}"


def did_you_mean(word: str, known: Iterable[str], what: str = "known") -> str:
    """Return the end of an error about ``word``: the nearest known name, if one is near, and the list of all.

    ``what`` heads the list: ``; did you mean 'leapalign'? (methods: draft, leapalign, refl)``.
    """
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
    """Return msgspec's message as one line in our own words, with the full path and what would be right."""
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
        return f"{join(where, path)}: '{missing['field']}' is missing; {title} needs it"
    text = re.sub(r"`([^`]*)`", lambda m: " or ".join(_WORDS.get(w, w) for w in m[1].split(" | ")), text)
    instead = _choices(cls, path) + _refused(cls, data, path)
    return f"{join(where, path)}: {text[0].lower()}{text[1:]}{_shown(data, path)}{instead}"


def _parts(path: str) -> list[str | int]:
    return [int(i) if i else key for key, i in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]


def _shown(data: Any, path: str) -> str:
    """Return the offending value in brackets, `` (0.5)``, if it is short enough to help."""
    try:
        for part in _parts(path):
            data = data[part]
    except (KeyError, IndexError, TypeError):
        return ""
    return f" ({data!r})" if isinstance(data, bool | int | float | str) and len(repr(data)) < 60 else ""


def _types_at(cls: type[Config], path: str) -> list[Any]:
    """Return the types that the setting at ``path`` may have: union members one by one, ``Annotated`` unwrapped."""
    allowed: list[Any] = [cls]
    for part in _parts(path):
        owner = next((t for t in allowed if isinstance(t, type) and issubclass(t, Config)), None)
        hints = typing.get_type_hints(owner) if owner else {}
        allowed = list(_members(hints[part])) if part in hints else []
    return allowed


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
    """Return why a plausible value is not allowed, if the class says so in ``refused``: {setting: {value: why}}."""
    reasons = getattr(cls, "refused", {}).get(path, {})
    return f" ({reasons[data[path]]})" if reasons and data[path] in reasons else ""


def _check_finite(data: Any, where: str) -> None:
    """Raise UserError for nan and inf, which are valid YAML and valid floats, but never a setting."""
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
    """A loader of YAML 1.1 as people write it: ``1e-5`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping. Raise an error with the line for a key that is not text or is given twice."""
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
    """Return YAML ``text`` as plain data. Raise UserError with the line number for bad syntax or a key given twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where
        raise UserError(f"{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def load_yaml(path: Path, packaged: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Return the settings in a YAML file, laid over those of the file that it ``extends``, key by key.

    ``extends: other.yaml`` is relative to the file; ``extends: name`` is one of ``packaged``, {name: path}. Raise
    UserError for a file that cannot be read, is not a mapping, or extends itself.
    """
    return _load_yaml(path, packaged or {}, ())


def _load_yaml(path: Path, packaged: Mapping[str, Path], chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: extends itself, via {' -> '.join(p.name for p in chain)}")
    data = parse_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected settings (key: value), got {type(data).__name__}")
    if "extends" not in data:
        return data
    parent = data.pop("extends")
    beside = path.parent / str(parent)
    if not beside.exists() and parent not in packaged:
        raise UserError(f"{path}: extends: there is no file {beside}{did_you_mean(parent, packaged, 'packaged')}")
    extended = beside if beside.exists() else packaged[parent]
    return merge(_load_yaml(extended, packaged, (*chain, path.resolve())), data)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raise UserError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return ``top`` laid over ``base``, key by key at every depth; lists and single values are replaced whole."""
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


# -- dotted paths -----------------------------------------------------------------------------------------------------


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return path and value of ``training.batch=8``: ("training.batch", 8). The value is read as YAML.

    Raise UserError for any other form.
    """
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*", path):
        raise UserError(f"command line: {text!r} is not of the form path.to.setting=value")
    return path, parse_yaml(value, f"command line: {path}")


def put(data: dict[str, Any], path: str, value: Any, where: str) -> dict[str, Any]:
    """Return a copy of ``data`` with ``value`` at the dotted ``path`` (list items as ``cases[2]``).

    Missing keys are made. Raise UserError if the path goes through a list item that does not exist or a single value.
    """
    head, *rest = _parts(path)
    return _put(data, head, rest, value, where)


def _put(data: Any, head: str | int, rest: list[str | int], value: Any, where: str) -> Any:
    if isinstance(head, int):
        if not isinstance(data, list) or head >= len(data):
            size = f"a list of {len(data)}" if isinstance(data, list) else "not a list"
            raise UserError(f"{where}: there is no item [{head}]; this is {size}")
        out: Any = list(data)
        inner = data[head]
    else:
        if not isinstance(data, dict):
            raise UserError(f"{where}: {data!r} has no setting '{head}'")
        out, inner = dict(data), data.get(head, {})
    out[head] = _put(inner, rest[0], rest[1:], value, where) if rest else value
    return out


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested settings with its path, as ``pick`` takes it: ("training.optimizer.lr", 1e-5)."""
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for i, part in enumerate(value):
                yield from flatten(part, f"{path}[{i}].")
        else:
            yield path, value


def pick(data: dict[str, Any], path: str) -> Any:
    """Return the value at the dotted ``path``. Raise KeyError if there is none."""
    value: Any = data
    for part in _parts(path):
        try:
            value = value[part]
        except (TypeError, IndexError):
            raise KeyError(path) from None
    return value

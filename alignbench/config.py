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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

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
    _check_plain(data, where)
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
    path = _with_key(cls, data, at["path"].lstrip("."), message) if at else ""
    owner = _class_at(cls, path)
    title = class_name(owner) or owner.__name__.lower()
    text = message[: at.start()] if at else message
    if unknown := _UNKNOWN.match(text):
        field = unknown["field"]
        spot = join(where, f"{path}.{field}".lstrip("."))
        return f"{spot}: {title} has no such setting{did_you_mean(field, owner.__struct_fields__, 'settings')}"
    if missing := _MISSING.match(text):
        return f"{join(where, path)}: '{missing['field']}' is missing; {title} needs it"
    quotes = "; put it in quotes" * bool(re.match(r"Expected `str( \| null)?`, got `(int|float|bool)`", text))
    text = re.sub(r"`([^`]*)`", lambda m: " or ".join(_WORDS.get(w, w) for w in m[1].split(" | ")), text)
    if form := _form(cls, path):
        text = re.sub(r"Expected text matching regex .*", "wrong form", text)
    instead = _choices(cls, path) + form + _refused(cls, data, path) + quotes
    return f"{join(where, path)}: {text[0].lower()}{text[1:]}{_shown(data, path)}{instead}"


def _with_key(cls: type[Config], data: Any, path: str, message: str) -> str:
    """Return ``path`` with the key for which msgspec writes ``[...]``: the one that is wrong alone, too."""
    above, dots, below = path.partition("[...]")
    for key, value in pick(data, above).items() if dots else ():
        try:
            msgspec.convert(put(data, above, {key: value}, ""), cls)
        except msgspec.ValidationError as error:
            if str(error) == message:
                return f"{above}.{key}{below}"
    return path


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
        allowed = [hint for owner in allowed for hint in _hints(owner, part)]
    return allowed


def _hints(owner: Any, part: str | int) -> Iterator[Any]:
    """Yield the types that an item of a list, a value of a mapping, or a setting of a class may have."""
    if isinstance(owner, type) and issubclass(owner, Config):
        yield from _members(typing.get_type_hints(owner).get(str(part)))
    elif typing.get_origin(owner) in (list, tuple, dict):
        yield from _members(typing.get_args(owner)[-1 if typing.get_origin(owner) is dict else 0])


def _members(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member)
    else:
        yield hint


def _class_at(cls: type[Config], path: str) -> type[Config]:
    return next((t for t in _types_at(cls, path) if isinstance(t, type) and issubclass(t, Config)), cls)


def _choices(cls: type[Config], path: str) -> str:
    types = _types_at(cls, path)
    types += [typing.get_args(t)[0] for t in types if typing.get_origin(t) is dict]  # of its keys
    values = [v for t in types if typing.get_origin(t) is typing.Literal for v in typing.get_args(t)]
    return f"; choose one of {', '.join(map(str, values))}" if values else ""


def _form(cls: type[Config], path: str) -> str:
    """Return the description of the setting's form in its ``Meta``, in words: for those that have a pattern."""
    name = path.rpartition(".")[2]
    owner = _class_at(cls, path.rpartition(".")[0])
    hints = _members(typing.get_type_hints(owner, include_extras=True).get(name))
    metas = (meta for hint in hints for meta in getattr(hint, "__metadata__", ()))
    return next((f"; choose {meta.description}" for meta in metas if meta.description), "")


def _refused(cls: type[Config], data: Any, path: str) -> str:
    """Return why a plausible value is not allowed, if the class says so in ``refused``: {setting: {value: why}}."""
    reasons = getattr(cls, "refused", {}).get(path, {})
    return f" ({reasons[data[path]]})" if reasons and str(data[path]) in reasons else ""


def _check_plain(data: Any, where: str) -> None:
    """Raise UserError for what YAML can say and a setting cannot be: nan, inf, more than 64 bits, half a character."""
    if isinstance(data, float) and not math.isfinite(data):
        raise UserError(f"{where}: {data} is not a number that can be used here")
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        raise UserError(f"{where}: a whole number of {data.bit_length()} bits; choose one of at most 63")
    if isinstance(data, str) and not data.isascii() and any("\ud800" <= character <= "\udfff" for character in data):
        raise UserError(f"{where}: {data!r} holds half of a surrogate pair; write the whole character")
    if isinstance(data, dict):
        for key, value in data.items():
            _check_plain(key, where)
            _check_plain(value, join(where, str(key)))
    if isinstance(data, list | tuple):
        for i, value in enumerate(data):
            _check_plain(value, join(where, f"[{i}]"))


# -- YAML -------------------------------------------------------------------------------------------------------------

DEPTH, NODES = 50, 100_000  # of nested settings; of settings in a file, those that aliases repeat included
TAG = "tag:yaml.org,2002:"
DIGITS = "[0-9]*(?:_[0-9]+)*"
SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {  # type -> (its spelling, what it may begin with, value)
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (rf"[-+]?(0|[1-9]{DIGITS}|0x[0-9a-fA-F]+)", "-+0123456789", lambda text: int(text, 0)),
    "float": (
        rf"[-+]?([0-9]{DIGITS}\.[0-9]*|\.[0-9]+|[0-9]{DIGITS}(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+0123456789.",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
}


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2's types: what looks like a time, a date or an octal number is text, and so is ``yes``.

    YAML 1.1 reads ``12:00:00`` in base 60, ``010`` in base 8 and ``no`` as false. As people write it, ``1e-5`` and
    ``1_000`` are numbers. Refused with the line: a key that is not text or is given twice, an alias of what contains
    it, aliases that repeat each other into millions of settings, and every type but text, numbers, lists and mappings.
    """

    yaml_implicit_resolvers: ClassVar = {}  # type: ignore[misc]  # a class's own, whatever its stubs say
    yaml_constructors: ClassVar = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"{TAG}str", f"{TAG}seq", f"{TAG}map", None)
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[yaml.Node, int] = {}  # nodes of what is complete, aliases counted again

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self.depth == DEPTH:
            raise _at(event.start_mark, f"brackets or settings are nested more than {DEPTH} deep")
        self.depth += 1
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.sizes[node] = self._size(node)
        elif node not in self.sizes:
            raise _at(event.start_mark, f"the alias *{event.anchor} stands inside of what it refers to")
        if self.sizes[node] > NODES:
            raise _at(event.start_mark, f"aliases repeat this into more than {NODES:,} settings; write them out")
        return node

    def _size(self, node: yaml.Node) -> int:
        """Return the number of nodes in a complete node. Raise an error for a key that is not text, or given twice."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self.sizes[item] for item in node.value)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == f"{TAG}merge":  # `<<: *anchor` may repeat
                continue
            if key.tag != f"{TAG}str" or not isinstance(key, yaml.ScalarNode):
                written = (key.value or "null") if isinstance(key, yaml.ScalarNode) else "like this"
                raise _at(key.start_mark, f"the key {written} is not text; put it in quotes")
            if key.value in seen:
                what = f"the key '{key.value}' is already set on line {seen[key.value]}; keep one of them"
                raise _at(key.start_mark, what)
            seen[key.value] = key.start_mark.line + 1
        return 1 + sum(self.sizes[key] + self.sizes[value] for key, value in node.value)


def _at(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _scalar(kind: str) -> Callable[[_Loader, yaml.Node], Any]:
    """Return the constructor of a type; it also checks what stands behind an explicit tag, ``!!int x``."""
    spelling, _, value = SCALARS[kind]

    def construct(loader: _Loader, node: Any) -> Any:
        text = loader.construct_scalar(node)
        try:
            if re.fullmatch(spelling, text):
                return value(text)
        except ValueError:  # Python converts no more than 4,300 digits
            text = f"{text[:20]}..."
        raise _at(node.start_mark, f"{text!r} is not a value of the type {kind}")

    return construct


for _kind, (_spelling, _first, _) in SCALARS.items():
    _starts = [*_first, *([""] if _kind == "null" else [])]  # "": of what is left out
    _Loader.add_implicit_resolver(f"{TAG}{_kind}", re.compile(rf"({_spelling})\Z"), _starts)
    _Loader.add_constructor(f"{TAG}{_kind}", _scalar(_kind))
_Loader.add_implicit_resolver(f"{TAG}merge", re.compile(r"<<\Z"), ["<"])


def parse_yaml(text: str, where: str) -> Any:
    """Return YAML ``text`` as plain data. Raise UserError, with the line, for what cannot be read or is unclear."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where
        raise UserError(f"{line}: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where}:{number}: the character U+{error.character:04X} is not text; remove it") from None


def load_yaml(path: Path, packaged: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Return the settings in a YAML file, laid over those of the file that it ``extends``, as ``merge`` does."""
    data: dict[str, Any] = {}
    for file, own in load_chain(path, packaged or {}).items():
        data = merge(data, own, f"{file}: ")
    return data


def load_chain(path: Path, packaged: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the settings of a YAML file and of all files that it extends, by file: the last one is ``path``.

    ``extends: other.yaml`` is relative to the file; ``extends: name`` is one of ``packaged``, {name: path}. Raise
    UserError for a file that cannot be read, is not a mapping, or extends itself.
    """
    files: dict[Path, dict[str, Any]] = {}
    while True:
        data = parse_yaml(read_text(path), str(path))
        if not isinstance(data, dict):
            got = "nothing" if data is None else f"{_WORDS.get(type(data).__name__, type(data).__name__)}"
            raise UserError(f"{path}: expected settings (key: value), got {got}")
        files[path] = {key: value for key, value in data.items() if key != "extends"}
        if "extends" not in data:
            return {str(path): files[path] for path in reversed(files)}
        parent = data["extends"]
        if not isinstance(parent, str) or not parent:
            raise UserError(f"{path}: extends: {parent!r} is not the name of a file; a sweep extends a single one")
        beside = path.parent / parent
        if not beside.exists() and parent not in packaged:
            raise UserError(f"{path}: extends: there is no file {beside}{did_you_mean(parent, packaged, 'packaged')}")
        path = beside if beside.exists() else packaged[parent]
        if path.resolve() in [file.resolve() for file in files]:
            raise UserError(f"{path}: extends itself, via {' -> '.join(file.name for file in files)}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte-order mark.

    Raise UserError if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null character in the name
        raise UserError(f"{str(path)!r}: cannot be read: {error}") from None


def merge(base: dict[str, Any], top: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Return ``top`` laid over ``base``, key by key at every depth; lists and single values are replaced whole.

    A key that ends in ``+`` appends its list to that of ``base``: ``overrides+: [...]``. Raise UserError, with
    ``where``, if there is none.
    """
    out = dict(base)
    for key, value in top.items():
        place, name = join(where, key), key.removesuffix("+")
        if name != key:
            if not isinstance(value, list) or not isinstance(base.get(name), list) or name in top:
                raise UserError(f"{place}: appends to an inherited list '{name}', and there is none; leave out the +")
            out[name] = [*base[name], *value]
        elif isinstance(value, dict) and isinstance(out.get(key, {}), dict):
            out[key] = merge(out.get(key, {}), value, place)
        else:
            out[key] = value
    return out


# -- dotted paths -----------------------------------------------------------------------------------------------------


def is_path(text: str) -> bool:
    """Return whether ``text`` is a dotted path: ``training.batch``, ``cases[1].method.alpha``."""
    return re.fullmatch(r"[A-Za-z_]\w*(\.\w+|\[[0-9]{1,9}\])*", text) is not None


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return path and value of ``training.batch=8``: ("training.batch", 8). The value is read as YAML.

    Raise UserError for any other form.
    """
    path, equals, value = text.partition("=")
    if not equals or not is_path(path):
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

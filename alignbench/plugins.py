"""The registry of names that a sweep can use: built-in classes, plug-in files, and installed packages.

Names are read from source text, so that listing them imports nothing; only the classes that a sweep uses are imported.
A class is found if it stands at the top level of its file, has ``name = "..."`` in its body, and derives from
``AlignMethod``, ``Evaluator`` or ``PipelineBackend``, directly or through another class that does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alignbench.config import Config, UserError, class_name, decode, did_you_mean, read_text, settings

Kind = Literal["method", "evaluator", "backend"]
GROUP = "alignbench.plugins"  # entry points of installed packages: each names a module
BUILT_IN: dict[str, Kind | None] = {  # package -> kind of the classes that derive from Config directly
    "alignbench.methods": None,
    "alignbench.evaluators": None,
    "alignbench.backends": "backend",
}
ROOTS: dict[str, Kind] = {
    "AlignMethod": "method",
    "Pathwise": "method",
    "GroupRelative": "method",
    "Evaluator": "evaluator",
    "PipelineBackend": "backend",
    "GuidedBackend": "backend",
}

BASES = "AlignMethod, Evaluator or PipelineBackend"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class Entry(NamedTuple):
    """A class that a sweep can name, as read from its source text."""

    kind: Kind
    name: str
    cls: str  # name of the class
    doc: str  # first line of the docstring
    path: Path  # of the file that defines it
    module: str  # to import; for a plug-in file, a name made from its content
    plugin: bool  # True: not shipped with alignbench, so its source is hashed into a run's id
    title: str = ""  # full name of a method ...
    paper: str = ""  # ... and where it was published

    @property
    def about(self) -> str:
        """Line for lists: ``LeapAlign (arXiv 2604.15311): first line of the docstring``, as far as these are given."""
        head = f"{self.title or self.cls} ({self.paper})" if self.paper else self.title
        return ": ".join(filter(None, [head, self.doc]))


class Registry:
    """All classes that can be named, in ``entries``: (kind, name) -> Entry."""

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        """Read the built-in files, the installed packages, and the plug-in files at these paths.

        Raise UserError for a file that cannot be parsed, has no such class, or reuses a name.
        """
        self.plugins = [str(Path(path).resolve()) for path in plugins]
        self.entries: dict[tuple[str, str], Entry] = {}
        kinds: dict[str, Kind] = dict(ROOTS)  # class name -> kind, growing as classes are found
        for path, module, plain in _built_in_files():
            self._add(_scan(path, module, False, kinds, plain))
        for point in entry_points(group=GROUP):
            self._add(_scan(_module_file(point.value), point.value, True, kinds))
        for path in map(Path, self.plugins):
            entries = list(_scan(path, f"alignbench_plugin_{path.stem}_{digest(path)[:8]}", True, kinds))
            if not entries:
                raise UserError(f"{path}: no class in it derives from {BASES} and sets name = '...'")
            self._add(entries)

    def _add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if not NAME.fullmatch(entry.name):
                what = f"{entry.cls}.name: {entry.name[:80]!r} becomes part of file names"
                raise UserError(f"{entry.path}: {what}; use at most 64 letters, digits, '_', '-' and '.'")
            known = self.entries.setdefault((entry.kind, entry.name), entry)
            if known is not entry:
                taken = f"the {entry.kind} '{entry.name}' already exists in {known.path}"
                raise UserError(f"{entry.path}: {taken}; choose another name")

    def names(self, kind: Kind) -> list[str]:
        """Return all names of a kind, sorted."""
        return sorted(name for k, name in self.entries if k == kind)

    def entry(self, kind: Kind, name: Any, where: str) -> Entry:
        """Return the entry of this name. Raise UserError, with the nearest name and all of them, if there is none."""
        if not isinstance(name, str) or (kind, name) not in self.entries:
            known = did_you_mean(str(name), self.names(kind), f"{kind}s")
            raise UserError(f"{where}: there is no {kind} '{name}'{known}")
        return self.entries[kind, name]

    def get(self, kind: Kind, name: str, where: str) -> type[Config]:
        """Import and return the class of this name. Raise UserError if there is none or if the import fails."""
        entry = self.entry(kind, name, where)
        cls = getattr(_import(entry), entry.cls)
        if class_name(cls) != name or not issubclass(cls, Config):
            raise UserError(f"{entry.path}: {entry.cls} is not a class of settings with name = '{name}'")
        return cls

    def make(self, kind: Kind, plain: Any, where: str) -> Any:
        """Return ``{name: ..., field: ...}`` as an instance, strictly. Raise UserError as ``config.decode`` does."""
        if not isinstance(plain, dict) or "name" not in plain:
            raise UserError(f"{where}: expected settings with a 'name'{did_you_mean('', self.names(kind), f'{kind}s')}")
        cls = self.get(kind, plain["name"], f"{where}.name")
        with blamed(cls, where):
            return decode(cls, {key: value for key, value in plain.items() if key != "name"}, where)

    def source(self, kind: Kind, name: str) -> str | None:
        """Return the sha256 of the file that defines a plug-in; None for built-ins: their revision is recorded."""
        entry = self.entries[kind, name]
        return digest(entry.path) if entry.plugin else None


class Builder:
    """A registry that builds equal settings only once: later calls share the object.

    Shared objects are for reading settings and for checks. A method may keep state, so a run needs its own instance.
    """

    def __init__(self, registry: Registry) -> None:
        """Build with ``registry``."""
        self.registry = registry
        self._built: dict[str, Any] = {}

    def make(self, kind: Kind, plain: Any, where: str) -> Any:
        """Return the instance that ``Registry.make`` would build; equal settings give the same object."""
        key = f"{kind} {plain!r}"
        if key not in self._built:
            made = self.registry.make(kind, plain, where)
            self._built[key] = self._built.setdefault(f"{kind} {settings(made)!r}", made)
        return self._built[key]


def digest(path: Path) -> str:
    """Return the sha256 of a text file. Raise UserError if it cannot be read."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def _built_in_files() -> Iterator[tuple[Path, str, Kind | None]]:
    for package, plain in BUILT_IN.items():
        folder = _module_file(package).parent
        for path in sorted(folder.glob("[!_]*.py")):
            yield path, f"{package}.{path.stem}", plain


def _module_file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"entry point {GROUP}: there is no module '{module}'; reinstall the package that names it")
    return Path(spec.origin)


def _scan(path: Path, module: str, plugin: bool, kinds: dict[str, Kind], plain: Kind | None = None) -> Iterator[Entry]:
    """Yield the entries that a file defines. ``plain``: the kind of classes that derive from Config directly."""
    try:
        tree = ast.parse(read_text(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: not valid Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null character; nested too deeply
        raise UserError(f"{path}: not valid Python: {error or type(error).__name__}") from None
    local = dict(kinds) | ({"Config": plain} if plain else {})
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        bases = (base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases)
        kind = next((local[base] for base in bases if base in local), None)
        if kind is None:
            continue
        local[node.name] = kinds[node.name] = kind
        if (name := _literal(node, "name")) is not None:
            doc = (ast.get_docstring(node) or "").partition("\n")[0]
            title, paper = (_literal(node, field) or "" for field in ("title", "paper"))
            yield Entry(kind, name, node.name, doc, path, module, plugin, title, paper)


def _literal(node: ast.ClassDef, field: str) -> str | None:
    """Return the text of ``field = "..."`` or ``field: ClassVar[str] = "..."`` in a class body."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if any(isinstance(t, ast.Name) and t.id == field for t in targets) and isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
    return None


def _import(entry: Entry) -> Any:
    if entry.module in sys.modules:
        return sys.modules[entry.module]
    try:
        if not entry.module.startswith("alignbench_plugin_"):
            return importlib.import_module(entry.module)
        spec = importlib.util.spec_from_file_location(entry.module, entry.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[entry.module] = module  # msgspec resolves annotations through it
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the author's file raises
        sys.modules.pop(entry.module, None)
        where = f"{entry.path}{_line(error, entry.path)}"
        raise UserError(f"{where}: cannot be imported: {_said(error)}") from error


@contextmanager
def blamed(part: Any, where: str) -> Iterator[None]:
    """Turn whatever the code of a plug-in raises into a UserError with its file and line; leave bugs of ours alone.

    ``part``: a class of settings, an instance, or a method of one; ``where``: the setting that names it.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        owner = getattr(part, "__self__", part)
        module = sys.modules.get((owner if isinstance(owner, type) else type(owner)).__module__)
        path = Path(getattr(module, "__file__", None) or "")
        if module is None or module.__name__.startswith("alignbench.") or not (line := _line(error, path)):
            raise
        raise UserError(f"{where}: {path}{line}: {_said(error)}; correct the plug-in") from error


def _line(error: BaseException, path: Path) -> str:
    """Return the last line of a file that an error passed, as ``:12``; "" if it passed none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f":{lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

"""Imports between packages: the storeys of docs/design.md, computed from the syntax trees."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STOREYS = (  # a package imports from itself and from the storeys above it; the contract is the root folder
    "contract",
    "official prompts shapes store",
    "experiment",
    "backends training evaluation reporting",
    "planning testing rehearsal",
    "run",
    "launch",
    "cli",
)
BESIDE = {  # the folders beside the harness, and what they may import of it
    "methods": "contract methods",
    "evaluators": "contract prompts shapes official evaluators",
    "reports": "reporting.text.table reports",
}
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "open_clip", "torchvision"}
LIGHT = {  # packages behind help, lists, status and report
    *("cli", "launch", "run", "planning", "rehearsal", "experiment", "store", "reporting"),
    *("prompts", "official", "evaluators", "reports"),
}
LARGEST = 12  # files in a folder


def files() -> dict[str, Path]:
    """Return every module below ``alignbench.`` and its file; a package is its ``__init__.py``."""
    homes = {"": ROOT / "alignbench"} | {f"{name}.": ROOT / name for name in BESIDE}
    found = {
        prefix + ".".join(path.relative_to(home).with_suffix("").parts): path
        for prefix, home in homes.items()
        for path in sorted(home.rglob("*.py"))
    }
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in found.items()}


FILES = files()


def imports(node: ast.AST, inside: bool = True) -> Iterator[str]:
    """Yield the modules imported at run time; with ``inside`` also those imported within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            submodules = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from [name if name.removeprefix("alignbench.") in FILES else str(child.module) for name in submodules]
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        if inside or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, inside)


@functools.cache
def imported(module: str, inside: bool = True) -> frozenset[str]:
    """Return what a module imports; our own modules without the leading ``alignbench.``."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    return frozenset(name.removeprefix("alignbench.") for name in imports(tree, inside)) - {module, "alignbench"}


def package(module: str) -> str:
    head, dot, _ = module.partition(".")
    return head if dot or (FILES[module].name == "__init__.py" and module) else "contract"


def test_files_have_no_cycle():
    """The graph of imports between files, those inside functions included, can be sorted."""
    TopologicalSorter({name: imported(name) & FILES.keys() for name in FILES}).prepare()


@pytest.mark.parametrize("module", [name for name in FILES if package(name) not in BESIDE])
def test_packages_import_upwards_in_the_list_only(module):
    """Each package stands on one storey, and imports from its own modules and from storeys above it in the list."""
    storey = {name: i for i, names in enumerate(STOREYS) for name in names.split()}
    mine = package(module)
    for name in imported(module) & FILES.keys():
        other = package(name)
        assert other == mine or storey.get(other, 99) < storey[mine], f"{module} imports {name}"


@pytest.mark.parametrize("folder", BESIDE)
def test_what_stands_beside_the_harness_imports_little_of_it(folder):
    """A method imports only the contract; an evaluator also prompts, shapes and official; a report only its tables."""
    allowed = BESIDE[folder].split()
    for module in (name for name in FILES if package(name) == folder):
        for name in imported(module) & FILES.keys():
            assert package(name) in allowed or name in allowed, f"{module} imports {name}"


def test_naming_things_is_light():
    """No module behind help, lists, status or report imports torch at its top, nor does what it imports there."""
    scripts = ("official.", "planning.gradient_paths")  # run by themselves
    reached = {name for name in FILES if package(name) in LIGHT and not name.startswith(scripts)}
    while new := {n for name in reached for n in imported(name, inside=False) & FILES.keys()} - reached:
        reached |= new
    for module in reached:
        heavy = {name.partition(".")[0] for name in imported(module, inside=False)} & HEAVY
        assert not heavy, f"{module} imports {heavy} at its top"


def test_rooms_are_small():
    """No package holds more than twelve files."""
    rooms = Counter(FILES[name].parent for name in FILES if package(name) not in BESIDE)
    assert max(rooms.values()) <= LARGEST, {str(room): count for room, count in rooms.items() if count > LARGEST}

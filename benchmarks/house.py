"""Measure the structure of a checkout, so that before and after stand side by side.

    python benchmarks/house.py                              this checkout
    python benchmarks/house.py OLD NEW --json FILE          a column each; FILE keeps the numbers
    python benchmarks/house.py benchmarks/results/house-before.json .        kept numbers as columns, too
    python benchmarks/house.py --timed                      also the time of `--help` and of a report on 1,000 runs

Everything but the last two groups is read from syntax trees, so the layout does not matter and nothing is imported.
"Code" is alignbench, methods, evaluators and reports; tests and benchmarks count in the first group only.

Imports are those at run time, inside functions too, without `if TYPE_CHECKING`. `from a.b import c` is an import of
the module a.b.c if there is one, otherwise of a.b; that a.b.c also runs the `__init__` of a and a.b does not count.
Folders beside alignbench/ have the names that pyproject.toml gives them: methods/refl.py is alignbench.methods.refl. A
package is a folder. Cycles are the groups of files (or packages) that all reach each other; floors, the longest chain
of imports once each such group counts as one.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

CODE = ("alignbench", "methods", "evaluators", "reports")
FOLDERS = (*CODE, "tests", "benchmarks")
WRITTEN = ("alignbench", "methods", "evaluators")  # where words and docstrings are counted
FRAGMENT = re.compile(r"(Of|Those of|What|Where|Whether|Which|That|How far|Not|With what|From what)\b")
WORDS = re.compile(r"\b(pictures?|nobody|somebody|trainings)\b", re.IGNORECASE)
BLOCK = 6  # lines
SWEEPS = ("quickstart", "shapes_methods")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

Graph = Mapping[str, set[str]]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkouts", nargs="*", metavar="CHECKOUT", help="folders, or files that --json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers here")
    parser.add_argument("--timed", action="store_true", help="also time `--help` and `report`: some minutes")
    arguments = parser.parse_args(words)
    columns: dict[str, dict[str, Any]] = {}
    for place in map(Path, arguments.checkouts or [Path(__file__).parent.parent]):
        if place.suffix == ".json":
            columns |= json.loads(place.read_text(encoding="utf-8"))
        else:
            columns[revision(place)] = measure(place) | (timed(place) if arguments.timed else {})
    if arguments.json:
        arguments.json.write_text(json.dumps(columns, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(columns))


def revision(root: Path) -> str:
    """Return the commit's short name, with a + if files differ from it; of no repository, the folder's name."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or root.resolve().name


def measure(root: Path) -> dict[str, Any]:
    """Measure everything that needs no clock."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(root, CODE)}
    return {
        **sizes(root),
        **graphs(imports(root, trees)),
        **functions(root, trees),
        **repetition(trees),
        **docstrings(tree for path, tree in trees.items() if path.relative_to(root).parts[0] in WRITTEN),
        **vocabulary(sources(root, WRITTEN)),
        **{f"Registry.make calls, {sweep}": made(root, sweep, trees) for sweep in SWEEPS},
    }


def sources(root: Path, folders: Iterable[str]) -> list[Path]:
    """Return the Python files below these folders of a checkout."""
    found = (path for folder in folders for path in sorted((root / folder).rglob("*.py")))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]


# -- files ------------------------------------------------------------------------------------------------------------


def sizes(root: Path) -> dict[str, Any]:
    """Count files and lines per folder, per top folder, and in all."""
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for path in sources(root, FOLDERS):
        inside = path.relative_to(root)
        for place in {inside.parent.as_posix(), f"{inside.parts[0]}, in all", "total"}:
            files[place] += 1
            lines[place] += len(path.read_text(encoding="utf-8").splitlines())
    rooms = [(n, place) for place, n in files.items() if place.partition("/")[0] in CODE]
    largest, room = max(rooms, default=(0, ""))
    each = {f"{place}: files, lines": [files[place], lines[place]] for place in sorted(files)}
    return each | {"largest folder of code, files": [largest, room]}


# -- imports ----------------------------------------------------------------------------------------------------------


def module_name(inside: Path) -> str:
    """Return the dotted name of a file, given its path in the checkout."""
    parts = inside.with_suffix("").parts
    parts = parts if parts[0] == "alignbench" else ("alignbench", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(root: Path, trees: Mapping[Path, ast.Module]) -> dict[str, set[str]]:
    """Return which file imports which, by their paths in the checkout."""
    inside = [path.relative_to(root) for path in trees]
    modules = {module_name(path): path.as_posix() for path in inside}
    graph: dict[str, set[str]] = {}
    for path, tree in zip(inside, trees.values()):
        package = module_name(path.parent / "__init__.py").split(".")
        found = (modules.get(name) or modules.get(name.rpartition(".")[0]) for name in imported(tree, package))
        graph[path.as_posix()] = {other for other in found if other} - {path.as_posix()}
    return graph


def imported(node: ast.AST, package: Sequence[str]) -> Iterator[str]:
    """Yield a dotted name for every name imported at run time: of `from a import b`, a.b. ``package``: the file's."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from imported(ast.Module([other], []), package)
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = list(package[: len(package) - child.level + 1]) if child.level else []
            start = ".".join([*base, *([child.module] if child.module else [])])
            yield from (f"{start}.{alias.name}" for alias in child.names)
        yield from imported(child, package)


def graphs(files: Graph) -> dict[str, Any]:
    """Floors and cycles of imports, between files and between packages."""
    packages: dict[str, set[str]] = defaultdict(set)
    for file, others in files.items():
        here = file.rpartition("/")[0]
        packages[here] |= {other.rpartition("/")[0] for other in others} - {here}
    found: dict[str, Any] = {}
    for name, graph in (("files", files), ("packages", packages)):
        groups = components(graph)
        rings = sorted(sorted(group) for group in groups if len(group) > 1)
        found[f"floors of imports between {name}"] = floors(graph, groups)
        found[f"cycles of imports between {name}"] = [len(rings), *(" ".join(ring) for ring in rings)]
    return found


def components(graph: Graph) -> list[frozenset[str]]:
    """Return the strongly connected components."""
    reach = {start: reachable(graph, start) for start in graph}
    return list({frozenset({a, *(b for b in reach[a] if a in reach[b])}) for a in graph})


def reachable(graph: Graph, start: str) -> set[str]:
    """Return all that ``start`` imports, directly or by way of others."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def floors(graph: Graph, groups: Iterable[frozenset[str]]) -> int:
    """Return the number of nodes on the longest chain in the graph of components."""
    group = {node: found for found in groups for node in found}
    below = {found: {group[other] for node in found for other in graph[node]} - {found} for found in group.values()}
    height: dict[frozenset[str], int] = {}
    for found in TopologicalSorter(below).static_order():
        height[found] = 1 + max((height[other] for other in below[found]), default=0)
    return max(height.values(), default=0)


# -- functions, repetition, words -------------------------------------------------------------------------------------


def functions(root: Path, trees: Mapping[Path, ast.Module]) -> dict[str, Any]:
    """Count functions of code, and the lines that they have."""
    lengths = sorted(
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(root).as_posix()}: {node.name}")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTION) and node.end_lineno
    )
    if not lengths:
        return {}
    return {
        "functions": len(lengths),
        "function, median lines": lengths[len(lengths) // 2][0],
        "function, 90th percentile of lines": lengths[len(lengths) * 9 // 10][0],
        "function, longest": list(lengths[-1]),
    }


def repetition(trees: Mapping[Path, ast.Module]) -> dict[str, Any]:
    """Return the share of code lines in a block of six that stands in another place too, in percent."""
    files = [code_lines(path.read_text(encoding="utf-8"), tree) for path, tree in trees.items()]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for i, lines in enumerate(files):
        for k in range(len(lines) - BLOCK + 1):
            places[tuple(lines[k : k + BLOCK])].append((i, k))
    repeated = {(i, k + j) for found in places.values() if len(found) > 1 for i, k in found for j in range(BLOCK)}
    return {"code lines in repeated blocks, %": percent(len(repeated), sum(map(len, files)))}


def code_lines(text: str, tree: ast.Module) -> list[str]:
    """Return the lines with white space folded, without blank ones, comments, imports and lone punctuation."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    passed = {i for node in nodes for i in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    folded = (" ".join(line.split()) for i, line in enumerate(text.splitlines(), 1) if i not in passed)
    return [line for line in folded if re.search(r"\w", line) and not line.startswith("#")]


def docstrings(trees: Iterable[ast.Module]) -> dict[str, Any]:
    """Count docstrings of classes and functions, and those that begin as a fragment does."""
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (*FUNCTION, ast.ClassDef)))
    found = [text for node in nodes if (text := ast.get_docstring(node))]
    fragments = sum(bool(FRAGMENT.match(text)) for text in found)
    return {
        "docstrings": len(found),
        "docstrings that are fragments": fragments,
        "docstrings that are fragments, %": percent(fragments, len(found)),
    }


def vocabulary(paths: Iterable[Path]) -> dict[str, int]:
    """Count words that have a better one."""
    found = Counter(
        word.lower().replace("pictures", "picture")
        for path in paths
        for word in WORDS.findall(path.read_text(encoding="utf-8"))
    )
    return {f"word: {word}": found[word] for word in ("picture", "nobody", "somebody", "trainings")}


def percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


# -- what needs the code to run ---------------------------------------------------------------------------------------

AT_HOME = """\
import os, sys
sys.path.insert(0, os.getcwd())
import alignbench
alignbench.__path__.append(os.getcwd())  # methods and its sisters are this checkout's, whatever is installed
"""
COUNT = """\
import importlib
from alignbench.plugins import Registry
calls, make = 0, Registry.make
def counted(self, *args, **kwargs):
    global calls
    calls += 1
    return make(self, *args, **kwargs)
Registry.make = counted
read, resolve = (getattr(importlib.import_module(m), name) for m, name in zip(sys.argv[2:], ("read", "resolve")))
resolve(read(sys.argv[1]), Registry())
print(calls)
"""
REPORT = """\
import json, pathlib, sys
sys.path.insert(0, "benchmarks")
import report
root = pathlib.Path(sys.argv[1])
report.make(root)
print(json.dumps(report.measure(root, 3)["measured"]["alignbench report"]))
"""


def made(root: Path, sweep: str, trees: Mapping[Path, ast.Module]) -> int | None:
    """Return how many times resolving a packaged sweep decodes settings; None if the checkout cannot resolve one."""
    homes = [home(root, trees, name, gives) for name, gives in (("read", "Document"), ("resolve", "Plan"))]
    return int(child(root, AT_HOME + COUNT, sweep, *filter(None, homes))) if all(homes) else None


def home(root: Path, trees: Mapping[Path, ast.Module], name: str, gives: str) -> str | None:
    """Return the module whose top level has ``def name(...) -> gives``; None if there is none."""
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, FUNCTION) and node.name == name and node.returns and ast.unparse(node.returns) == gives:
                return module_name(path.relative_to(root))
    return None


def python(root: Path) -> str:
    """Return the checkout's own Python, or this one."""
    own = root.resolve() / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def child(root: Path, code: str, *words: str) -> str:
    """Run ``code`` in the checkout, and return what it printed."""
    command = [python(root), "-c", code, *words]
    return subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout


def timed(root: Path, rounds: int = 15) -> dict[str, Any]:
    """Time `alignbench --help` against a bare start of Python, and a report on 1,000 runs; needs CHECKOUT/.venv."""
    bin = Path(python(root)).parent
    bare, ours = [str(bin / "python"), "-c", "pass"], [str(bin / "alignbench"), "--help"]
    used = [seconds(command) for _ in range(rounds + 1) for command in (bare, ours)][2:]  # the first pair warms up
    ratios = [help / start for start, help in zip(used[::2], used[1::2])]
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(child(root, REPORT, folder))
    return {
        "--help, CPU of a bare Python's start": round(statistics.median(ratios), 2),
        "report on 1,000 runs, CPU s": round(found["cpu"], 2),
        "report on 1,000 runs, peak MB": round(found["mb"]),
    }


def seconds(command: Sequence[str]) -> float:
    """Return the CPU seconds of one process, which other work on the machine alters less than the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# -- the table --------------------------------------------------------------------------------------------------------


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all measures as Markdown, a column per checkout; folders that only one of them has are in it too."""
    names = list(dict.fromkeys(name for measures in columns.values() for name in measures))
    folders = sorted(name for name in names if name.endswith(": files, lines"))
    rows = [
        [name, *(cell(measures.get(name)) for measures in columns.values())]
        for name in [*folders, *(name for name in names if name not in folders)]
    ]
    heads = ["measure", *columns]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [heads, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    return "\n".join(f"| {' | '.join(entry.ljust(w) for entry, w in zip(line, widths))} |" for line in lines)


def cell(value: Any) -> str:
    """Write a measure in one cell: of a list only the beginning of its texts."""
    if isinstance(value, list):
        shown = ", ".join(cell(each) for each in value[:2])
        return shown if len(shown) <= 72 else f"{shown[:69]}..."
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    main()

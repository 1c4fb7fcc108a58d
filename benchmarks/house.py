"""Measure the structure of a checkout, to compare before and after.

    python benchmarks/house.py                              this checkout
    python benchmarks/house.py OLD NEW --json FILE          a column each; FILE keeps the numbers
    python benchmarks/house.py benchmarks/results/house-before.json .        stored numbers as a column too
    python benchmarks/house.py --timed                      also the time of `--help` and of a report on 1,000 runs

All but the last two groups are read from syntax trees: any layout works, and nothing is imported. "Code" is alignbench,
methods, evaluators and reports; tests and benchmarks count only in the first group.

Imports are those at run time, also inside functions, but not under `if TYPE_CHECKING`. `from a.b import c` imports the
module a.b.c if it exists, otherwise a.b; running the `__init__` of a and a.b does not count. Folders beside alignbench/
have the names that pyproject.toml gives them: methods/refl.py is alignbench.methods.refl. A package is a folder. A
cycle is a group of files (or packages) that all reach each other. Floors are the length of the longest chain of
imports, where a cycle counts as one.
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
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
    """Return the short commit hash, with a + if files differ from it, or the folder's name outside a repository."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or root.resolve().name


def measure(root: Path) -> dict[str, Any]:
    """Return all measures except those of time."""
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
    paths = (path for folder in folders for path in sorted((root / folder).rglob("*.py")))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]


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
    counts = {f"{place}: files, lines": [files[place], lines[place]] for place in sorted(files)}
    return counts | {"largest folder of code, files": [largest, room]}


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
    """Count floors and cycles of imports, between files and between packages."""
    packages: dict[str, set[str]] = defaultdict(set)
    for file, others in files.items():
        package = file.rpartition("/")[0]
        packages[package] |= {other.rpartition("/")[0] for other in others} - {package}
    measures: dict[str, Any] = {}
    for name, graph in (("files", files), ("packages", packages)):
        groups = components(graph)
        rings = sorted(sorted(group) for group in groups if len(group) > 1)
        measures[f"floors of imports between {name}"] = floors(graph, groups)
        measures[f"cycles of imports between {name}"] = [len(rings), *(" ".join(ring) for ring in rings)]
    return measures


def components(graph: Graph) -> list[frozenset[str]]:
    """Return the strongly connected components."""
    reach = {start: reachable(graph, start) for start in graph}
    return list({frozenset({a, *(b for b in reach[a] if a in reach[b])}) for a in graph})


def reachable(graph: Graph, start: str) -> set[str]:
    """Return everything that ``start`` imports, directly or indirectly."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def floors(graph: Graph, groups: Iterable[frozenset[str]]) -> int:
    """Return the number of nodes on the longest chain in the graph of components."""
    home = {node: group for group in groups for node in group}
    below = {group: {home[other] for node in group for other in graph[node]} - {group} for group in home.values()}
    height: dict[frozenset[str], int] = {}
    for group in TopologicalSorter(below).static_order():
        height[group] = 1 + max((height[other] for other in below[group]), default=0)
    return max(height.values(), default=0)


# -- functions, repetition, words -------------------------------------------------------------------------------------


def functions(root: Path, trees: Mapping[Path, ast.Module]) -> dict[str, Any]:
    """Count the functions of the code and their lines."""
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
    """Return the percentage of code lines that are part of a block of six lines found elsewhere too."""
    files = [code_lines(path.read_text(encoding="utf-8"), tree) for path, tree in trees.items()]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for i, lines in enumerate(files):
        for k in range(len(lines) - BLOCK + 1):
            places[tuple(lines[k : k + BLOCK])].append((i, k))
    repeated = {(i, k + j) for same in places.values() if len(same) > 1 for i, k in same for j in range(BLOCK)}
    return {"code lines in repeated blocks, %": percent(len(repeated), sum(map(len, files)))}


def code_lines(text: str, tree: ast.Module) -> list[str]:
    """Return lines with white space folded, leaving out blank lines, comments, imports and lone punctuation."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    skipped = {i for node in nodes for i in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    folded = (" ".join(line.split()) for i, line in enumerate(text.splitlines(), 1) if i not in skipped)
    return [line for line in folded if re.search(r"\w", line) and not line.startswith("#")]


def docstrings(trees: Iterable[ast.Module]) -> dict[str, Any]:
    """Count docstrings of classes and functions, and those that begin like a fragment."""
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (*FUNCTION, ast.ClassDef)))
    texts = [text for node in nodes if (text := ast.get_docstring(node))]
    fragments = sum(bool(FRAGMENT.match(text)) for text in texts)
    return {
        "docstrings": len(texts),
        "docstrings that are fragments": fragments,
        "docstrings that are fragments, %": percent(fragments, len(texts)),
    }


def vocabulary(paths: Iterable[Path]) -> dict[str, int]:
    """Count words for which there is a better one."""
    counts = Counter(
        word.lower().replace("pictures", "picture")
        for path in paths
        for word in WORDS.findall(path.read_text(encoding="utf-8"))
    )
    return {f"word: {word}": counts[word] for word in ("picture", "nobody", "somebody", "trainings")}


def percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


# -- what needs the code to run ---------------------------------------------------------------------------------------

AT_HOME = """\
import os, sys
sys.path.insert(0, os.getcwd())
import alignbench
alignbench.__path__.append(os.getcwd())  # methods, evaluators and reports of this checkout, not installed ones
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
    """Count how often resolving a packaged sweep decodes settings; None if the checkout cannot resolve one."""
    modules = [module_of(root, trees, name, gives) for name, gives in (("read", "Document"), ("resolve", "Plan"))]
    return int(child(root, AT_HOME + COUNT, sweep, *filter(None, modules))) if all(modules) else None


def module_of(root: Path, trees: Mapping[Path, ast.Module], name: str, gives: str) -> str | None:
    """Return the module that defines ``def name(...) -> gives`` at its top level; None if no module does."""
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
    """Time `alignbench --help` against starting Python, and a report on 1,000 runs. Needs CHECKOUT/.venv."""
    bin = Path(python(root)).parent
    bare, ours = [str(bin / "python"), "-c", "pass"], [str(bin / "alignbench"), "--help"]
    used = [seconds(command) for _ in range(rounds + 1) for command in (bare, ours)][2:]  # the first pair warms up
    ratios = [help / start for start, help in zip(used[::2], used[1::2])]
    with tempfile.TemporaryDirectory() as folder:
        used_by_report = json.loads(child(root, REPORT, folder))
    return {
        "--help, CPU of a bare Python's start": round(statistics.median(ratios), 2),
        "report on 1,000 runs, CPU s": round(used_by_report["cpu"], 2),
        "report on 1,000 runs, peak MB": round(used_by_report["mb"]),
    }


def seconds(command: Sequence[str]) -> float:
    """Return the CPU seconds of one process, which depend less on other load than wall-clock seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# -- the table --------------------------------------------------------------------------------------------------------


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of all measures, a column per checkout, with every folder that any of them has."""
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
    """Format a measure for one cell; of a list, only the beginning."""
    if isinstance(value, list):
        shown = ", ".join(cell(entry) for entry in value[:2])
        return shown if len(shown) <= 72 else f"{shown[:69]}..."
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    main()

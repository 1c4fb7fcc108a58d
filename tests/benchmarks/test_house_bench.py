"""benchmarks/house.py measures a tiny tree correctly."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "house.py"
SAME = "".join(f"    x = x * {i} + 1\n    # {{note}}\n    ()\n" for i in range(6))  # six lines of code
TREE = {
    "alignbench/__init__.py": "",
    "alignbench/base.py": '"""Nobody counts."""\nimport os\n\n\ndef one():\n    """Return a picture of pictures."""\n',
    "alignbench/top.py": (
        "from typing import TYPE_CHECKING\n"
        "from alignbench import base, rooms\n"
        "if TYPE_CHECKING:\n"
        "    from alignbench.methods import last\n"
        "def late():\n"
        '    """What is imported late."""\n'
        "    from alignbench.rooms.left import there\n"
    ),
    "alignbench/rooms/__init__.py": "from .left import there\n",
    "alignbench/rooms/left.py": f"from . import right\nfrom ..base import one\ndef there(x):\n{SAME.format(note='a')}",
    "alignbench/rooms/right.py": "import alignbench.rooms.left\nclass Right:\n    '''Those of somebody.'''\n",
    "methods/last.py": f"from alignbench.top import late\ndef loss( x ):\n{SAME.format(note='b')}    return late\n",
    "tests/test_it.py": "import alignbench\n" * 3,
    "tests/.hidden/skip.py": "not Python at all (\n",
}


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("benchmark_house", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def found(house, tree) -> dict[str, Any]:
    return house.measure(tree)


def parsed(paths) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in paths}


def test_files_and_lines_are_counted_per_folder(found):
    """A folder counts its own files, "in all" those of its subfolders too; hidden folders are skipped."""
    assert found["alignbench: files, lines"] == [3, 13]
    assert found["alignbench/rooms: files, lines"] == [3, 25]
    assert found["alignbench, in all: files, lines"] == [6, 38]
    assert found["tests: files, lines"] == [1, 3]
    assert found["total: files, lines"] == [8, 62]
    assert found["largest folder of code, files"] == [3, "alignbench/rooms"]


def test_imports_are_resolved_to_files(house, tree):
    """Imports resolve to submodules if they exist, relative and late ones included, but not under TYPE_CHECKING."""
    trees = parsed(house.sources(tree, house.CODE))
    rooms = "alignbench/rooms"
    assert house.imports(tree, trees) == {
        "alignbench/__init__.py": set(),
        "alignbench/base.py": set(),
        "alignbench/top.py": {"alignbench/base.py", f"{rooms}/__init__.py", f"{rooms}/left.py"},
        f"{rooms}/__init__.py": {f"{rooms}/left.py"},
        f"{rooms}/left.py": {f"{rooms}/right.py", "alignbench/base.py"},
        f"{rooms}/right.py": {f"{rooms}/left.py"},
        "methods/last.py": {"alignbench/top.py"},
    }


def test_floors_and_cycles_of_the_condensed_graph(found, house):
    """base < left = right < rooms < top < last; a package and a root that import each other are a cycle."""
    assert found["floors of imports between files"] == 5
    assert found["cycles of imports between files"] == [1, "alignbench/rooms/left.py alignbench/rooms/right.py"]
    assert found["floors of imports between packages"] == 2
    assert found["cycles of imports between packages"] == [1, "alignbench alignbench/rooms"]
    line = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert house.floors(line, house.components(line)) == 3
    ring = {"a": {"b"}, "b": {"a"}}
    assert house.floors(ring, house.components(ring)) == 1
    assert house.graphs({})["floors of imports between files"] == 0


def test_a_functions_lines_are_counted_from_def_to_end(found):
    """The tree has four functions of 2, 3, 19 and 20 lines."""
    assert found["functions"] == 4
    assert found["function, median lines"] == 19
    assert found["function, longest"] == [20, "methods/last.py: loss"]


def test_a_block_of_six_lines_found_twice_is_repeated(found, house, tmp_path):
    """Blank lines, comments, imports and lone punctuation in between do not hide it; five lines are not a block."""
    assert found["code lines in repeated blocks, %"] == round(100 * 12 / 23, 2)
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\ny = 2\nz = 3\nu = 4\nv = 5\n")
    assert set(house.repetition(parsed(tmp_path.glob("*.py"))).values()) == {0.0}
    text = "x  =  1\n\n# no\n()\nimport os\nfrom a import (\n  b,\n)\n"
    assert house.code_lines(text, ast.parse(text)) == ["x = 1"]


def test_words_and_fragments_are_counted(found):
    """Whole words count in either case; fragments are found by the first word of a function's or class's docstring."""
    assert [found[f"word: {word}"] for word in ("picture", "nobody", "somebody", "trainings")] == [2, 1, 1, 0]
    assert found["docstrings"] == 3
    assert found["docstrings that are fragments"] == 2
    assert found["docstrings that are fragments, %"] == 66.67


def test_a_checkout_that_cannot_resolve_a_sweep_has_no_calls(found):
    """A tree without ``read(...) -> Document`` and ``resolve(...) -> Plan`` gets None, not a number."""
    assert found["Registry.make calls, quickstart"] is None


@pytest.mark.slow
def test_calls_of_make_are_counted_in_the_checkout(house):
    """Resolving this checkout's quickstart calls ``make`` at least once for each of its eleven runs."""
    trees = parsed(house.sources(ROOT, house.CODE))
    assert house.made(ROOT, "quickstart", trees) >= 11


def test_stored_numbers_are_a_column(house, tree, tmp_path, capsys):
    """A file of --json stands for its checkout: the table has a column for each, and a row per folder."""
    kept = tmp_path / "kept.json"
    house.main([str(tree), "--json", str(kept)])
    (name,) = json.loads(kept.read_text())
    assert name == tree.name
    capsys.readouterr()
    other = {"other": {"functions": 1832, "gone: files, lines": [67, 18035]}}
    kept.write_text(json.dumps(other))
    house.main([str(kept), str(tree)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["measure", "other", name]
    assert ["functions", "1,832", "4"] in rows
    assert ["gone: files, lines", "67, 18,035", ""] in rows
    assert ["largest folder of code, files", "", "3, alignbench/rooms"] in rows


def test_a_commit_with_changes_has_a_plus(house, tmp_path):
    """A repository's column is named by its commit, with a + if files differ from it."""
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "one"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = house.revision(tmp_path)
    (tmp_path / "file").write_text("")
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True)
    assert house.revision(tmp_path) == f"{clean}+"

"""The README keeps its promises when followed by a reader: its code blocks are files, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignbench.cli.main import cli

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> dict[str, str]:
    """Return the fenced blocks of a language by the file that their first line names: ``# name.py``."""
    found = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return dict(found)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Return a folder with the files that the README shows."""
    files = blocks("python") | blocks("yaml")
    assert {"my_method.py", "test_my_method.py", "my_sweep.yaml"} <= files.keys()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_method_is_as_short_as_promised(example):
    """The README's method has at most 20 lines of code."""
    lines = (example / "my_method.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 20


@pytest.mark.slow
def test_the_method_of_the_readme_passes_the_contract(example):
    """The README's method and test file, copied into an empty folder, pass with pytest alone."""
    done = run(example, "pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_method_of_the_readme_gets_a_row(example):
    """``alignbench sweep my_sweep.yaml --plugin my_method.py`` and ``report`` put the README's method into a table."""
    small = ["training.budget.images=24", "--limit", "6", "--seeds", "0"]
    words = ["alignbench.cli", "sweep", "my_sweep.yaml", *small, "--plugin", "my_method.py"]
    done = run(example, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(example, "alignbench.cli", "report", "my_sweep.yaml", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| AnyStep +\|", done.stdout, re.MULTILINE)
    assert " --plugin my_method.py && " in done.stdout.splitlines()[0]


def test_every_command_of_the_readme_exists():
    """Each ``alignbench VERB`` that the README and the docs show is a verb of the command line."""
    verbs = set(cli.commands)
    docs = [README, *(README.parent / "docs").glob("*.md")]
    code = re.compile(r"```\n(.*?)```|`([^`\n]+)`", re.DOTALL)  # blocks without a language, and inline
    text = "\n".join("\n".join(pair) for path in docs for pair in code.findall(path.read_text(encoding="utf-8")))
    shown = set(re.findall(r"(?m)^alignbench ([a-z][\w-]*)", text))
    assert shown
    assert shown <= verbs

"""The two commands for authors: the files written work as they are, and a broken promise is told in a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_sweep import alignbench

from alignbench.testing import MethodContract

ROOT = Path(__file__).parents[2]
PROMISES = [name for name in vars(MethodContract) if name.startswith("test_")]
BROKEN = """
from typing import ClassVar

import torch

from alignbench import AlignMethod, Loss
from alignbench.methods.refl import ReFL


class Lawful(ReFL):
    name: ClassVar[str] = "lawful"
    steps: int = 4
    last_n: int = 2


class Doubtful(Lawful):
    name: ClassVar[str] = "doubtful"

    def loss(self, flow, reward, batch):
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value * len(batch), metrics)


class Raising(Lawful):
    name: ClassVar[str] = "raising"

    def loss(self, flow, reward, batch):
        raise RuntimeError("shapes (3,) and (4,)\\ndo not fit")


class Still(AlignMethod):
    name: ClassVar[str] = "still"
    trains: ClassVar[bool] = False
"""
NEEDY = """
from typing import ClassVar

from alignbench.methods.refl import ReFL


class Needy(ReFL):
    name: ClassVar[str] = "needy"
    steps: int = 4
    last_n: int = 2
    strength: float
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> int:
    return alignbench(*words, plugin=False)


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["my_method", "x", "CamelCase", "a_name_of_forty_letters_as_many_as_allow"])
def test_what_is_written_passes_ruff(folder, capsys, name):
    """The files pass this project's lint rules and ruff's own, and are formatted at this project's line length."""
    assert call("new-method", name) == 0
    said = capsys.readouterr().out
    assert f"written: {name}.py" in said
    assert f"alignbench check-method {name}.py" in said
    rules = "E,F,W,I,B,UP,C4,SIM,RUF,PT,NPY,PD002"
    for options in (["check"], ["check", "--select", rules], ["format", "--check"]):
        done = ran("ruff", *options, "--isolated", "--line-length", "120", ".")
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_what_is_written_keeps_every_promise(folder, capsys):
    """Its own test passes under pytest, ``check-method`` says ok once per promise, and a sweep can name it."""
    assert call("new-method", "my_method") == 0
    done = ran("pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py")
    assert done.returncode == 0, done.stdout
    assert f"{len(PROMISES)} passed" in done.stdout
    capsys.readouterr()
    assert call("check-method", "my_method.py", "--settings", "steps=4", "--settings", "k=2") == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "my_method:"
    assert len(lines) == len(PROMISES)
    assert all(line.startswith("ok     ") for line in lines)
    assert call("ls", "methods", "--plugin", "my_method.py") == 0
    assert "my_method" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("1x", "'1x' cannot name a file and a class; choose at most 40 letters, digits and underscores"),
        ("a-b", "'a-b' cannot name a file"),
        ("../a", "'../a' cannot name a file"),
        ("class", "'class' cannot name a file"),
        ("größe", "'größe' cannot name a file"),
        ("x" * 41, "cannot name a file"),
        ("leapalign", "the method 'leapalign' already exists in "),
        ("json", "Python already has a module 'json'"),
        ("pathwise", "the class would be called Pathwise, which is already in use"),
        ("mine", "mine.py: already exists; choose another name, or remove it"),
        ("yours", "test_yours.py: already exists"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(folder, capsys, name, line):
    """A bad identifier, a taken name, an existing file: one line of error, and the folder stays as it is."""
    for file in ("mine.py", "test_yours.py"):
        (folder / file).write_text("mine")
    assert call("new-method", name) == 1
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ["mine.py", "test_yours.py"], "mine"
    )


@pytest.mark.slow
def test_broken_promises_are_sentences(folder, capsys):
    """Every method of the file, one line per promise; an exception is its type and message, on one line; code 2."""
    (folder / "broken.py").write_text(BROKEN)
    assert call("check-method", "broken.py") == 2
    out = capsys.readouterr().out
    lawful, doubtful, raising, still = sections(out)
    assert [line[:3] for line in lawful] == ["ok "] * len(PROMISES)
    wrong = [line for line in doubtful if line.startswith("FAILED")]
    assert len(wrong) == 1
    assert wrong[0].startswith("FAILED One batch of 4 gives the gradients, the updates and the records of four batches")
    assert ": in the records loss is " in wrong[0]
    assert len(raising) == len(PROMISES)
    assert all(line.endswith(": RuntimeError: shapes (3,) and (4,) do not fit") for line in raising)
    assert still == ["ok     It trains nothing, so nothing else is promised"]
    assert "Traceback" not in out


def sections(out: str) -> list[list[str]]:
    """Return the lines below each method's name."""
    found: list[list[str]] = []
    for line in out.splitlines():
        if line.endswith(":") and " " not in line:
            found.append([])
        else:
            found[-1].append(line)
    return found


@pytest.mark.slow
def test_a_traceback_is_there_when_asked_for(folder, capsys):
    """``--traceback`` shows the line of the author's file."""
    (folder / "broken.py").write_text(BROKEN)
    assert call("check-method", "broken.py", "--traceback") == 2
    out = capsys.readouterr().out
    assert "Traceback (most recent call last)" in out
    assert 'broken.py", line' in out


@pytest.mark.slow
def test_settings(folder, capsys):
    """A method without defaults says what it needs; with it, it is checked; a setting of no method is an error."""
    (folder / "needy.py").write_text(NEEDY)
    assert call("check-method", "needy.py") == 1
    assert "needy: 'strength' is missing; needy needs it; set it with --settings" in capsys.readouterr().err
    assert call("check-method", "needy.py", "--settings", "strength=1.0") == 0
    assert capsys.readouterr().out.count("ok     ") == len(PROMISES)
    assert call("check-method", "needy.py", "--settings", "strenth=1.0") == 1
    assert "--settings strenth: no method of needy.py has it; did you mean 'strength'?" in capsys.readouterr().err
    assert call("check-method", "needy.py", "--settings", "strength") == 1
    assert "'strength' is not of the form path.to.setting=value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (None, "mine.py: cannot be read"),
        ("x = 1\n", "no class in it derives from AlignMethod, Evaluator or PipelineBackend and sets"),
        (
            "import nowhere_at_all\nfrom alignbench import AlignMethod\nclass M(AlignMethod):\n    name = 'm'\n",
            "nowhere",
        ),
        ("from alignbench import Evaluator\nclass M(Evaluator):\n    name = 'm'\n", "mine.py: has no method"),
    ],
)
def test_a_file_without_methods(folder, capsys, source, line):
    """No file, no class, a failing import, only an evaluator: each is one line of error."""
    if source is not None:
        (folder / "mine.py").write_text(source)
    assert call("check-method", "mine.py") == 1
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1

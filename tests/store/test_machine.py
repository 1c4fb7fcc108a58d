"""What the machine lacks is one line that names what to set, whatever the verb."""

from __future__ import annotations

import errno
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignbench.store import machine


@pytest.fixture
def nameless(monkeypatch) -> None:
    """Be a user without an entry in the password file, and without variables that name it."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_name_is_its_number(nameless, tmp_path):
    """Records of launches and runs have the number, so that nothing fails after jobs were submitted."""
    from alignbench.launch import submissions
    from alignbench.store.files import read_json

    assert machine.user() == str(os.getuid())
    submissions.write(tmp_path, "tiny", "slurm", [])
    assert (read_json(tmp_path / submissions.FILE) or {})["user"] == str(os.getuid())


def test_a_user_without_a_home_is_told_to_set_it(nameless, monkeypatch):
    """Without HOME and without an entry nothing starts; with HOME all is well."""
    assert "set HOME to a folder" in str(machine.obstacle())
    monkeypatch.setenv("HOME", "/")
    assert machine.obstacle() is None


C = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("before", "variables", "line"),
    [
        ("", {"PYTHONOPTIMIZE": "2"}, "PYTHONOPTIMIZE"),
        ("", C, "set PYTHONUTF8=1"),
        ('rmdir "$PWD";', {}, "the current folder cannot be used"),
    ],
)
def test_every_verb_is_refused_in_one_line(before, variables, line, tmp_path):
    """Python without docstrings, text that is not UTF-8, a deleted folder: exit code 1 and one line."""
    (folder := tmp_path / "here").mkdir()
    command = f"{before} {sys.executable} -m alignbench.cli --help"
    environment = os.environ | variables
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert line in done.stderr


def test_a_file_is_never_written_to_by_who_writes_to_a_closed_output(tmp_path):
    """With all streams closed, files that a verb opens get other numbers than those of the streams."""
    code = f"from alignbench.cli import main; main(['--version']); f = open({str(tmp_path / 'f')!r}, 'w')"
    command = f'{sys.executable} -c "{code}; f.write(str(f.fileno()))" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command]).returncode == 0
    assert int((tmp_path / "f").read_text()) > 2


def test_every_character_can_be_printed(tmp_path):
    """Where the output is not UTF-8, other characters are escaped, and the verb ends well."""
    plugin = tmp_path / "mine.py"
    source = 'class M(AlignMethod):\n    """Größer ↑."""\n    name = "mine"\n'
    plugin.write_text(f"from alignbench import AlignMethod\n{source}", encoding="utf-8")
    command = [sys.executable, "-m", "alignbench.cli", "ls", "methods", "--plugin", str(plugin)]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Größer \\u2191.".encode("latin-1") in done.stdout


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the output cannot be written: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/.cache"), r"/.cache: Permission denied; .*HOME, TMPDIR"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), r"/tmp/x: No space left on device; .*TMPDIR"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in []"), "found in .*; set TMPDIR to"),
    ],
)
def test_what_the_machine_denies_is_one_line(error, line):
    """It has the file, the reason, and the variables that choose another folder."""
    assert re.search(line, str(machine.denial(error)))


def test_other_errors_are_not_the_machines(tmp_path):
    """A file that is not there is a mistake of the program, and keeps its traceback."""
    with pytest.raises(FileNotFoundError) as caught:
        Path(tmp_path / "none").read_text()
    assert machine.denial(caught.value) is None

"""The workers of a sweep run the code that the sweep was started with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.tiny_sweep import PLUGIN

from alignbench.config import UserError
from alignbench.plugins import Registry, digest
from alignbench.run import code_snapshot

ROOT = Path(__file__).parents[2]
FACTS = """
import json, alignbench, alignbench.methods, alignbench.run.provenance
from alignbench import official, prompts, weights
from alignbench.experiment import document
from alignbench.plugins import Registry
from alignbench.cli.common import EPILOG
print(json.dumps({
    "home": alignbench.__file__, "entries": [str(entry.path) for entry in Registry().entries.values()],
    "sweeps": [str(path) for path in document.sweeps().values()], "environments": list(official.environments()),
    "prompts": len(prompts.load_prompts("shapes/test")), "model": str(weights.locate("shapes", "", shapes="model")),
    "epilog": EPILOG, "version": alignbench.run.provenance.installed("alignbench"),
}))
"""


def facts(taken: code_snapshot.Snapshot, folder: Path) -> dict:
    """Return facts about the code that a new interpreter in ``folder`` runs, whatever its user put on the path."""
    (folder / "facts.py").write_text(FACTS)
    done = subprocess.run(
        [*taken.python(), "-m", "facts"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def taken(tmp_path):
    return code_snapshot.take(tmp_path / "it's 50%: a store", [PLUGIN])


def test_a_snapshot_holds_every_file_and_nothing_else(taken):
    """It has the code and data of every package, read-only, without compiled files."""
    tracked = ["alignbench", "methods", "evaluators", "reports", "sweeps"]
    mine = {path for folder in tracked for path in (ROOT / folder).rglob("*") if path.is_file()}
    mine = {path for path in mine if "__pycache__" not in path.parts}
    copied = [path for path in taken.path.rglob("*") if path.is_file()]
    assert len(copied) == len(mine) + 1
    assert {"hpsv3.py", "quickstart.yaml", "requirements-hpsv2.txt", "bright_plugin.py"} <= {
        path.name for path in copied
    }
    assert all(path.stat().st_mode & 0o222 == 0 for path in copied)


def test_a_new_interpreter_runs_the_snapshot_and_finds_its_data_there(taken, tmp_path):
    """Modules, sweeps, prompts, model and scripts of other environments come from it, not from the editable install."""
    found = facts(taken, tmp_path)
    inside = [found["home"], found["model"], *found["entries"], *found["sweeps"]]
    assert all(Path(path).is_relative_to(taken.path) for path in inside)
    assert len(found["entries"]) == len(Registry().entries)
    assert found["environments"]
    assert found["prompts"] > 0
    assert found["version"]
    assert not list(taken.path.rglob("__pycache__"))


@pytest.mark.slow
def test_a_snapshot_that_is_not_visible_yet_is_awaited(tmp_path):
    """A shared disk may show it late; no other code runs instead."""
    late = code_snapshot.Snapshot(tmp_path / "late", [], [])
    process = subprocess.Popen([*late.python(), "-m", "mine", "a b"], stdout=subprocess.PIPE, text=True)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.py").write_text("import sys; print(__name__, sys.argv[1:], sys.flags.safe_path)\n")
    time.sleep(0.3)
    assert process.poll() is None
    (tmp_path / "made").rename(late.path)
    assert process.communicate(timeout=60)[0] == "__main__ ['a b'] True\n"


@pytest.mark.slow
def test_later_edits_do_not_change_a_snapshot(tmp_path):
    """After its checkout is edited, an interpreter that runs the snapshot behaves as before."""
    checkout = tmp_path / "checkout"
    for part in ("", *code_snapshot.PARTS[1:]):
        shutil.copytree(ROOT / (part or "alignbench"), checkout / "alignbench" / part, dirs_exist_ok=True)
    script = "from pathlib import Path; from alignbench.run.code_snapshot import take; "
    script += f"print(take(Path({str(tmp_path)!r})).path)"
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    ask = [sys.executable, "-c", script]

    def take() -> code_snapshot.Snapshot:
        made = subprocess.run(ask, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert made.returncode == 0, made.stderr
        return code_snapshot.Snapshot(Path(made.stdout.strip()), [], [])

    before = take()
    assert take() == before
    common = checkout / "alignbench" / "cli" / "common.py"
    common.write_text(common.read_text().replace('EPILOG = """', 'EPILOG = """edited '))
    after = take()
    assert after.path != before.path
    assert not facts(before, tmp_path)["epilog"].startswith("edited")
    assert facts(after, tmp_path)["epilog"].startswith("edited")


def test_the_command_line_runs_from_a_read_only_snapshot(taken, tmp_path):
    """The command line lists the snapshot's methods and the plug-in's, with every folder read-only."""
    folders = [taken.path, *(path for path in taken.path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        done = subprocess.run(
            [*taken.python(), "-m", "alignbench.cli", "ls", "methods", "--plugin", *taken.plugins],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "leapalign" in done.stdout
    assert "stopped" in done.stdout
    assert not list(taken.path.rglob("__pycache__"))


def test_a_plug_in_keeps_its_bytes(taken):
    """Its digest, and with it every id, is that of the original."""
    assert [digest(Path(path)) for path in taken.plugins] == [digest(Path(PLUGIN))]
    assert Registry(taken.plugins).source("method", "last") == Registry([PLUGIN]).source("method", "last")


def test_plug_ins_of_one_name_do_not_replace_each_other(tmp_path):
    """Two files called mine.py are both copied, each with its own content."""
    paths = [tmp_path / str(i) / "mine.py" for i in range(2)]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"# {i}\n")
    copies = code_snapshot.take(tmp_path / "store", [str(path) for path in paths]).plugins
    assert [Path(copy).read_text() for copy in copies] == ["# 0\n", "# 1\n"]


def test_the_name_is_the_content(tmp_path, taken):
    """The same code is copied once; another plug-in, or another byte in one, makes another snapshot."""
    store = taken.path.parents[1]
    born = taken.path.stat().st_ctime_ns
    assert code_snapshot.take(store, [PLUGIN]) == taken
    assert taken.path.stat().st_ctime_ns == born
    assert code_snapshot.take(store).path != taken.path
    other = tmp_path / "bright.py"
    other.write_bytes(Path(PLUGIN).read_bytes() + b"\n")
    assert code_snapshot.take(store, [str(other)]).path not in (taken.path, code_snapshot.take(store).path)


def test_sweeps_that_start_at_once_share_one_snapshot(tmp_path):
    """Four threads at a time all get the same whole folder, and nothing half-made is left."""
    found: list[code_snapshot.Snapshot] = []
    threads = [threading.Thread(target=lambda: found.append(code_snapshot.take(tmp_path, [PLUGIN]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert [path.name for path in (tmp_path / "code").iterdir()] == [found[0].path.name]


def test_a_snapshot_that_was_changed_is_refused(taken, tmp_path):
    """Its name would no longer match the code."""
    path = Path(taken.plugins[0])
    path.chmod(0o644)
    path.write_text("# something else\n")
    with pytest.raises(UserError, match="not the code that was copied there"):
        code_snapshot.take(taken.path.parents[1], [PLUGIN])


def test_a_full_or_forbidden_disk_leaves_nothing_half_made(tmp_path, monkeypatch):
    """One line says why, and the next attempt starts clean."""

    def full(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="no space left"):
            code_snapshot.take(tmp_path)
    assert list((tmp_path / "code").iterdir()) == []
    assert code_snapshot.take(tmp_path).path.is_dir()

"""Cleanup deletes what no sweep refers to, and nothing else."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from support.tiny_sweep import PLUGIN, alignbench

from alignbench.config import UserError
from alignbench.launch import cleanup, submissions
from alignbench.run import code_snapshot
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json, write_json
from alignbench.store.locks import Lock


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(store: Path) -> list[str]:
    return sorted(item.what for item in cleanup.unused(Store(store)))


def old(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - 2 * cleanup.SETTLED,) * 2)


def littered(store: Path) -> list[str]:
    """Leave an item of every kind that can be deleted, and return what ``unused`` should call each."""
    write_json(store / "runs" / "refl-0" / "status.json", {"state": "failed", "reason": "x"})
    write_json(store / "images" / "0000000000" / "protocol.json", {})
    images = next((store / "scores").iterdir())
    write_json(images / "old@1-0.status.json", {"state": "failed"})
    (images / "old@1-0.parquet").write_bytes(b"x")
    run = min(path.parent for path in store.glob("runs/*/weights.safetensors"))
    (run / "checkpoints").mkdir()
    code = code_snapshot.take(store, [PLUGIN]).path.name
    (store / "jobs" / "tiny-1").mkdir(parents=True)
    (store / "reruns" / "last-1").mkdir(parents=True)
    write_json(store / "tables" / "gone-1" / "scores.json", {})
    old(store / "images" / images.name / ".x.png.1-ab.tmp")
    (store / "images" / images.name / ".y.png.1-ab.tmp").write_bytes(b"being written")
    expected = ["run refl-0", "images 0000000000", f"scores {images.name}/old@1-0", f"checkpoints of {run.name}"]
    expected += [f"code {code}", "jobs tiny-1", "rerun last-1", f"half images/{images.name}/.x.png.1-ab.tmp"]
    return sorted([*expected, "tables gone-1"])


def test_a_finished_store_has_nothing_to_delete(swept, capsys):
    """A sweep refers to everything in a finished store."""
    assert alignbench("gc", store=swept / "store", plugin=False) == 0
    assert "there is nothing to delete" in capsys.readouterr().out


@pytest.mark.slow
def test_unused_items_go_and_the_report_stays_the_same(copy, capsys):
    """With --yes every kind of leftover is deleted; every other file, and the report, is unchanged."""
    store = copy / "store"

    def report() -> str:
        out = copy / "out"
        name = next(path.stem for path in (store / "sweeps").iterdir())
        assert alignbench("report", name, "--out", str(out), store=store, plugin=False) == 0
        capsys.readouterr()
        text = {name: data for name, data in files(out).items() if name.endswith((".md", ".csv"))}
        shutil.rmtree(out)
        return str(text)

    expected_report = report()
    before = files(store)
    assert {path.suffix for path in store.glob("tables/tiny-*/scores.*")} == {".feather", ".json"}
    expected = littered(store)
    assert names(store) == expected
    assert alignbench("gc", store=store, plugin=False) == 0  # no terminal
    assert "nothing was deleted" in capsys.readouterr().out
    assert names(store) == expected
    assert alignbench("gc", "--yes", store=store, plugin=False) == 0
    assert f"deleted: {len(expected)} of {len(expected)} items" in capsys.readouterr().out
    after = files(store)
    young = [name for name in after if name.endswith(".y.png.1-ab.tmp")]
    assert len(young) == 1  # may still be being written
    assert {name: data for name, data in after.items() if name not in young} == before
    assert report() == expected_report


def test_a_manifest_deleted_by_hand_frees_its_runs(copy):
    """All runs, images and scores of the only sweep can go."""
    store = copy / "store"
    shutil.rmtree(store / "sweeps")
    kinds = [what.split()[0] for what in names(store)]
    assert (kinds.count("run"), kinds.count("images"), kinds.count("scores")) == (3, 3, 6)
    list(cleanup.delete(Store(store), cleanup.unused(Store(store))))
    assert not [path for path in files(store) if path.startswith(("runs/", "images/")) or path.endswith(".parquet")]


def test_what_another_sweep_needs_stays(copy):
    """When one of two sweeps that share runs is deleted, only what it alone had can go."""
    store = copy / "store"
    (path,) = (store / "sweeps").iterdir()
    manifest = read_json(path) or {}
    write_json(store / "sweeps" / "less.json", manifest | {"runs": manifest["runs"][:2]})
    assert names(store) == []
    path.unlink()
    freed = manifest["runs"][2]
    assert f"run {freed['id']}" in names(store)
    assert len([what for what in names(store) if not what.startswith("tables")]) == 1 + 1 + 2


def test_what_is_being_made_is_left_alone(copy):
    """A held lock keeps its run and every code snapshot; an active launch keeps what it will make."""
    store = Store(copy / "store")
    expected = littered(store.root)
    lock = Lock(store.run("refl-0", True).lock)
    assert lock.try_acquire()
    left = {what for what in expected if what.startswith(("run refl", "code "))}
    assert names(store.root) == sorted(set(expected) - left)
    lock.release()
    listed = cleanup.unused(store)
    folder = store.root / "jobs" / "mine"
    submissions.write(folder, "gone", "local", [submissions.JobEntry("", "", ["refl-0"], "refl-0", "")])
    assert names(store.root) == sorted(set(expected) - left)
    gone = {item.what for item in cleanup.delete(store, listed)}  # it began after the list was made
    assert gone == set(expected) - left
    record = read_json(folder / submissions.FILE) or {}
    write_json(folder / submissions.FILE, record | {"pid": 2**22 + 1})
    assert names(store.root) == sorted([*left, "jobs mine"])


def test_code_that_something_was_made_with_stays(copy):
    """A snapshot stays as long as a record or a job names it; one without plug-ins is named by the code's digest."""
    store = copy / "store"
    code_snapshot.take(store)
    code = code_snapshot.take(store, [PLUGIN]).path.name
    assert names(store) == [f"code {code}"]
    path = next(store.glob("scores/*/*.json"))
    record = read_json(path) or {}
    write_json(path, record | {"made_by": record["made_by"] | {"snapshot": code}})
    assert names(store) == []


def test_a_manifest_that_cannot_be_read_stops_everything(copy):
    """Its contents are not known, so nothing may be deleted."""
    (path,) = (copy / "store" / "sweeps").iterdir()
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read, so what it needs is not known"):
        cleanup.unused(Store(copy / "store"))


def test_sizes_are_readable():
    """Bytes are printed in the largest unit that fits."""
    assert [cleanup.human_size(size) for size in (12, 1500, 2.5e9)] == ["12 B", "1.5 kB", "2.5 GB"]

"""A run can be repeated from its records, and every difference is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, sweep_file

from alignbench.config import UserError
from alignbench.launch import rerun
from alignbench.run import code_snapshot
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json, write_frame, write_json


def trained(store: Path) -> str:
    """Return the id of a trained run."""
    return min(path.parent.name for path in store.glob("runs/*/weights.safetensors"))


def verdicts(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("weights", "records", "images", "scores"))]


@pytest.mark.slow
def test_a_run_made_again_is_the_same(copy, capsys):
    """Weights, records, images and all scores are bitwise equal; the whole run is made in a store of its own."""
    store = copy / "store"
    before = sorted(path for path in store.rglob("*") if path.is_file())
    name = trained(store)
    assert alignbench("rerun", name[:-1], "--into", str(copy / "again"), store=store, plugin=False) == 0
    said = verdicts(capsys.readouterr().out)
    assert len(said) == 2 + 1 + 2
    assert all(": equal (" in line for line in said)
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before
    made = copy / "again" / "runs" / name
    assert json.loads((made / "provenance.json").read_text())["plugins"][0]["sha256"]
    with pytest.raises(UserError, match="is not empty"):
        next(iter(rerun.rerun(Store(store), name, copy / "again")))


@pytest.mark.slow
def test_a_run_without_training_is_made_again_below_the_store_by_default(copy, capsys):
    """Its images and scores are compared; a second rerun gets a folder of its own."""
    store = copy / "store"
    name = next(path.name for path in store.glob("runs/base-*"))
    (store / "reruns" / f"{name}-1").mkdir(parents=True)
    assert alignbench("rerun", "base", store=store, plugin=False) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in verdicts(said)] == ["images", "scores", "scores"]
    assert (store / "reruns" / f"{name}-2" / "runs" / name).is_dir()


def test_every_difference_is_reported_with_its_size(copy):
    """One tensor, record, image and score are changed: the verdict on each part says by how much."""
    store, other = Store(copy / "store"), Store(copy / "other")
    shutil.copytree(store.root, other.root)
    name = trained(store.root)
    ((run, *_),) = rerun.recorded_runs(store, name)
    assert [v.differs for v in rerun.compare(store, other, run)] == [""] * 5
    path = other.root / "runs" / name / "weights.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    save_file(weights | {first: weights[first] + 0.5}, path)
    records = pd.read_parquet(path.with_name("train.parquet"))
    write_frame(path.with_name("train.parquet"), records.assign(loss=records["loss"] + 0.25, seconds=1e9))
    table = other.root / "images" / run.images / "manifest.parquet"
    manifest = pd.read_parquet(table)
    image = table.with_name(manifest["file"][0])
    Image.open(image).point(lambda level: level ^ 4).save(image)
    manifest.loc[0, "sha256"] = "0" * 64
    write_frame(table, manifest)
    file = other.root / next(score.file for score in run.scores if score.evaluator == "bright")
    scores = pd.read_parquet(file)
    write_frame(file, scores.assign(brightness=scores["brightness"] + 2.0))
    changes = {
        verdict.part.partition(" ")[0]: str(verdict) for verdict in rerun.compare(store, other, run) if verdict.differs
    }
    assert changes["weights"] == f"weights: differ: 1 of {len(weights)} tensors, by at most 0.5"
    assert changes["records"] == "records: differ: loss by at most 0.25"
    assert changes["images"].endswith("differ: 1 of 4, by at most 4 of 255 levels")
    assert changes["scores"].endswith("differ: brightness by at most 2")
    assert len(changes) == 4
    write_frame(file, scores.iloc[1:])
    assert any("4 rows, now 3" in v.differs for v in rerun.compare(store, other, run))
    file.unlink()
    assert any(v.differs == "not made" for v in rerun.compare(store, other, run))


@pytest.mark.slow
def test_changed_code_is_reported_and_its_snapshot_used(copy, capfd):
    """A run made by other code is made again by the store's snapshot of that code, with equal results."""
    store = Store(copy / "store")
    name = trained(store.root)
    old = copy / "old"
    shutil.copytree(code_snapshot.take(copy, [PLUGIN]).path, old / "0")
    cli = old / "0" / "alignbench" / "cli" / "common.py"
    cli.chmod(0o644)
    cli.write_text(cli.read_text() + "\n# as it was\n")
    files = code_snapshot.read(old / "0")
    kept = store.root / "code" / code_snapshot.digest(files)
    kept.parent.mkdir()
    (old / "0").rename(kept)
    digest = code_snapshot.digest({name: data for name, data in files.items() if not name.startswith("plugins/")})
    provenance = store.root / "runs" / name / "provenance.json"
    write_json(provenance, (read_json(provenance) or {}) | {"code": digest})
    assert alignbench("rerun", name, "--into", str(copy / "again"), store=store.root, plugin=False) == 0
    said = capfd.readouterr().out
    assert f"code: was {digest}, is {code_snapshot.digest(code_snapshot.package())}; using the copy {kept}" in said
    assert len(verdicts(said)) == 5
    made = json.loads((copy / "again" / "runs" / name / "provenance.json").read_text())
    assert (made["code"], made["snapshot"]) == (digest, kept.name)
    shutil.rmtree(kept)
    assert rerun.original_code(store, name)[0].endswith("the store has no copy of the former: using the latter")


def test_what_differs_around_a_run_is_named(copy):
    """Other packages or another machine are named before the verdicts, since they may explain them."""
    store = copy / "store"
    origin = read_json(store / "runs" / trained(store) / "provenance.json") or {}
    assert list(rerun.differences(origin)) == []
    changed = origin | {"packages": origin["packages"] | {"torch": "1.0"}, "devices": ["NVIDIA H100"], "processes": 8}
    assert [line.partition(",")[0] for line in rerun.differences(changed)] == [
        "torch: was 1.0",
        "devices: was ['NVIDIA H100']",
        "processes: was 8",
    ]


def test_a_run_that_cannot_be_made_again_is_refused_with_the_reason(copy, capsys):
    """Refused: no such run, an ambiguous id, an unfinished run, incomplete records, a run of no sweep."""
    store = copy / "store"
    name = trained(store)

    def refused(word: str) -> str:
        assert alignbench("rerun", word, store=store, plugin=False) == 1
        return capsys.readouterr().err

    assert "there is no run 'lst' (runs: base-" in refused("lst")
    assert "'last' begins the names of 2 runs (runs: last-" in refused("last")
    status, provenance = (store / "runs" / name / file for file in ("status.json", "provenance.json"))
    kept = status.read_text()
    status.write_text('{"state": "failed", "reason": "x"}')
    assert "is not finished" in refused(name)
    status.write_text(kept)
    origin = read_json(provenance) or {}
    write_json(provenance, {key: value for key, value in origin.items() if key != "code"})
    assert "its records lack the code" in refused(name)
    shutil.rmtree(store / "sweeps")
    assert "no sweep of this store has it" in refused(name)
    assert not (store / "reruns").exists()


@pytest.mark.slow
def test_paired_scores_are_made_again(tmp_path, capsys):
    """The base model's images are made in the new store, too, and scores that depend on them are equal."""
    paired = {"evaluation": {"evaluators": [{"name": "base_distance", "weights": "shapes"}]}}
    path = sweep_file(tmp_path, {**paired, "grid": {"training.seed": [0]}})
    assert debug_sweep(path, tmp_path / "store", "--only", "method=last") == 0
    name = trained(tmp_path / "store")
    assert alignbench("rerun", name, "--into", str(tmp_path / "again"), store=tmp_path / "store", plugin=False) == 0
    said = verdicts(capsys.readouterr().out)
    assert [line.split()[0].rstrip(":") for line in said] == ["weights", "records", "images", "images", "scores"]
    assert all(": equal (" in line for line in said)

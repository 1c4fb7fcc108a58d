"""A store made by an older version (see old_store/README.md) keeps its states, numbers and ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

OLD = Path(__file__).with_name("old_store")
STATE = re.compile(r"([\w]+-[0-9a-f]{10})\W+(done|running|requeued|queued|planned|stale|failed)\b")
HALF_MADE = "leapalign-c610a2967e"  # LeapAlign, seed 0: interrupted after 4 of 6 updates, with a milestone after 3
SWEEP = ("old.yaml", "--store", "store", "--launcher", "debug")


@pytest.fixture
def copy(tmp_path) -> Path:
    """Unpack the old store in a new folder, beside its sweep file and prompts."""
    for file in OLD.glob("*.[yj]*"):
        shutil.copy(file, tmp_path)
    with tarfile.open(OLD / "store.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def alignbench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as users do, in a separate process."""
    command = [sys.executable, "-m", "alignbench.cli", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def contents(store: Path, *kinds: str) -> dict[str, str]:
    """Return the hash of every file in these folders of the store."""
    files = (path for kind in kinds for path in sorted((store / kind).rglob("*")) if path.is_file())
    return {path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifests(store: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (store / "sweeps").glob("*.json")}


def ids(manifest: dict[str, Any]) -> list[Any]:
    """Return the ids of every run, its images and its scores, including those of its milestones."""
    return [
        [run["label"], run["seed"], part.get("update"), run["id"], part["images"], [s["file"] for s in part["scores"]]]
        for run in manifest["runs"]
        for part in [run, *run.get("milestones", [])]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["old.yaml", "elsewhere"])
def test_every_run_is_in_the_state_that_it_was_in(copy, sweep):
    """`status` shows the old states: done, failed with its reason, half made, never begun, imported."""
    said = alignbench(copy, "status", sweep, "--store", "store")
    before = (OLD / "reports" / f"{Path(sweep).stem}-status.txt").read_text()
    assert said.returncode == {"old.yaml": 2, "elsewhere": 0}[sweep], said.stderr
    assert STATE.findall(said.stdout) == STATE.findall(before)
    assert len(STATE.findall(before)) == {"old.yaml": 7, "elsewhere": 2}[sweep]
    for reason in re.findall(r"the reward .*", before):
        assert reason in " ".join(said.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["old.yaml", "elsewhere"])
def test_every_mean_and_every_cost_is_the_old_one(copy, sweep):
    """`report` gives the means, paired changes, shares, counts and costs that it gave; intervals have a newer model."""
    name = Path(sweep).stem
    said = alignbench(copy, "report", sweep, "--store", "store", "--out", "out", "--format", "csv")
    assert said.returncode == 0, said.stderr
    kept = ["method", "metric", "mean", "prompts", "seeds", "change", "improved"]
    before, after = (pd.read_csv(folder / f"{name}.csv")[kept] for folder in (OLD / "reports", copy / "out"))
    assert len(before) == {"old": 51, "elsewhere": 19}[name]
    before, after = (
        table[table["metric"] != "iqm_gain"].sort_values(["method", "metric"], ignore_index=True)
        for table in (before, after)
    )
    pd.testing.assert_frame_equal(after, before, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_every_id_is_the_old_one_so_that_finished_rows_are_not_made_again(copy):
    """The sweep file gives the ids that the store has: finished rows are not made again, and no file changes."""
    before, files = manifests(copy / "store"), contents(copy / "store", "runs", "images", "scores")
    next((copy / "store" / "sweeps").glob("old-*.json")).unlink()  # `sweep` writes it again
    done = alignbench(copy, "sweep", *SWEEP, "--only", "method=base", "method=refl")
    assert done.returncode == 0, done.stderr
    assert "3 runs: 0 to train, 0 image sets to make, 0 scores to compute" in done.stderr
    assert contents(copy / "store", "runs", "images", "scores") == files
    after = manifests(copy / "store")
    assert after.keys() == before.keys()
    assert {name: ids(manifest) for name, manifest in after.items()} == {
        name: ids(manifest) for name, manifest in before.items()
    }
    assert sum(len(ids(manifest)) for manifest in before.values()) == 1 + 6 * 2 + 2


@pytest.mark.slow
def test_a_half_made_run_resumes_from_its_checkpoint(copy):
    """Records up to the checkpoint stay, including measured seconds; the last two updates match the old code's."""
    import torch

    run = copy / "store" / "runs" / HALF_MADE
    checkpoint = max((run / "checkpoints").glob("step_*.pt"))
    earlier = pd.DataFrame(torch.load(checkpoint, weights_only=True)["records"])
    files = contents(copy / "store", "runs", "images", "scores")
    assert earlier["update"].tolist() == [0, 1, 2, 3]

    done = alignbench(copy, "sweep", *SWEEP, "--only", "method=leapalign", "training.seed=0")
    assert done.returncode == 0, done.stderr
    assert "1 runs: 1 to train" in done.stderr
    records = pd.read_parquet(run / "train.parquet")
    assert records["update"].tolist() == [0, 1, 2, 3, 4, 5]
    pd.testing.assert_frame_equal(records[:4], earlier, check_exact=True)  # trained again, "seconds" would differ
    assert records["reward_mean"][4:].tolist() == pytest.approx([0.05838797, 0.4152621], rel=1e-2)  # the old code's

    after = contents(copy / "store", "runs", "images", "scores")
    gone = {name for name in files if after.get(name) != files[name]}
    assert all(name.startswith(f"runs/{HALF_MADE}/") for name in gone)
    assert f"runs/{HALF_MADE}/weights-000003.safetensors" not in gone  # the milestone
    states = dict(STATE.findall(alignbench(copy, "status", "old.yaml", "--store", "store").stdout))
    assert states[HALF_MADE] == "done"

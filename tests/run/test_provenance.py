"""Every artefact records the code, packages, files and machine that made it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from support.tiny_sweep import PLUGIN

from alignbench.experiment.ids import score_content
from alignbench.plugins import Registry
from alignbench.run import code_snapshot, provenance
from alignbench.weights import SHAPES


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """Return a checkout that resembles this project, in which ``provenance`` takes itself to be."""
    (tmp_path / "alignbench").mkdir()
    (tmp_path / "methods").mkdir()
    (tmp_path / "alignbench" / "flow.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "alignbench" / "run" / "provenance.py"))
    return tmp_path


def test_a_clean_checkout_is_its_revision(checkout):
    """Nothing differs; files that are not code (notes, a store) do not count."""
    (checkout / "notes.txt").write_text("mine")
    found = provenance.code()
    assert found["revision"] == git(checkout, "rev-parse", "HEAD")
    assert (found["diff"], found["untracked"], provenance.dirty(found)) == ("", {}, False)


def test_a_changed_checkout_is_its_revision_and_the_difference(checkout):
    """The diff, applied to the revision, gives the changed code; new files are named with their sha256."""
    flow, new = checkout / "alignbench" / "flow.py", checkout / "methods" / "mine é.py"
    flow.write_text("x = 2\n")
    new.write_text("y = 1\n")
    found = provenance.code()
    assert provenance.dirty(found)
    assert found["untracked"] == {"methods/mine é.py": hashlib.sha256(b"y = 1\n").hexdigest()}
    git(checkout, "checkout", "-q", "--", ".")
    (checkout / "patch").write_text(found["diff"])
    git(checkout, "apply", "patch")
    assert flow.read_text() == "x = 2\n"


def test_without_a_checkout_git_says_nothing_and_the_digest_stands(tmp_path, monkeypatch):
    """An installed package, or a machine without git: None is not "clean"."""
    before = provenance.code()["digest"]
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "alignbench" / "run" / "provenance.py"))
    found = provenance.code()
    assert found["digest"] == before == code_snapshot.digest(code_snapshot.package())
    assert found["revision"] is found["diff"] is found["untracked"] is provenance.dirty(found) is None
    provenance._code.cache_clear()
    (tmp_path / ".git").mkdir()  # git refuses this one
    assert provenance.code()["revision"] is None


def test_a_run_names_code_packages_machine_and_files(swept):
    """provenance.json of a trained run has everything needed to make it again, with weight files by hash."""
    (folder,) = (path.parent for path in (swept / "store").glob("runs/last-*/weights.safetensors") if seed(path) == 0)
    found = json.loads((folder / "provenance.json").read_text())
    assert found["code"] == code_snapshot.digest(code_snapshot.package())
    assert {"command", "host", "user", "os", "python", "devices", "driver", "cuda", "threads", "processes"} <= set(
        found
    )
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "tokenizers", "submitit"):
        assert found["packages"][package]
    files = found["weights"]["flux"]["files"]
    (weights,) = (path for path in files if path.endswith("transformer/diffusion_pytorch_model.safetensors"))
    assert files[weights]["sha256"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert Path(weights).is_relative_to(SHAPES)
    assert found["attempts"][-1]["ended"] >= found["attempts"][-1]["started"]


def seed(weights: Path) -> int:
    return 0 if "seed: 0" in (weights.parent / "spec.yaml").read_text() else 1


def test_a_run_keeps_its_plug_ins(swept):
    """The copy equals the file that was used, byte by byte, and its origin is recorded."""
    for path in (swept / "store").glob("runs/*/provenance.json"):
        (plugin,) = json.loads(path.read_text())["plugins"]
        assert plugin["path"] == PLUGIN
        assert (path.parent / plugin["copy"]).read_bytes() == Path(PLUGIN).read_bytes()
        assert not plugin["installed"]


def test_images_and_scores_name_their_makers(swept):
    """Every image set and score file records its code; a score also its evaluator and the evaluator's files."""
    digest = code_snapshot.digest(code_snapshot.package())
    for path in (swept / "store").glob("images/*/protocol.json"):
        (maker,) = json.loads(path.read_text())["made_by"]
        assert maker["code"] == digest
    tables = list((swept / "store").glob("scores/*/*.parquet"))
    assert len(tables) == 3 * 2
    registry = Registry([PLUGIN])
    for path in tables:
        found = json.loads(path.with_suffix(".json").read_text())
        assert found["made_by"]["code"] == digest
        evaluator = registry.make("evaluator", found["evaluator"]["settings"], "")
        assert found["evaluator"] == score_content(evaluator, registry) | {"name": evaluator.name}
        assert found["weights"]["digest"] == found["evaluator"]["files"]
        assert len(found["weights"]["files"]) == len(evaluator.files())


def test_every_attempt_is_remembered(tmp_path, monkeypatch):
    """A run that was requeued on another machine records where it began and where it ended."""
    code = provenance.code() | {"diff": "a change"}
    registry = Registry()
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        provenance.begin(tmp_path, 0.0, provenance.made_by(code) | provenance.machine(1), code, registry)
    provenance.end(tmp_path, 0.0)
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert [attempt["slurm"]["job"] for attempt in found["attempts"]] == ["7", "8"]
    assert ["ended" in attempt for attempt in found["attempts"]] == [False, True]
    assert (tmp_path / "dirty.patch").read_text() == "a change"
    provenance.begin(tmp_path, 0.0, provenance.made_by(code) | provenance.machine(1), code | {"diff": ""}, registry)
    assert not (tmp_path / "dirty.patch").exists()


def test_the_driver_version_is_parsed(tmp_path):
    """Both spellings of the kernel module's version line are read; None without a driver."""
    file = tmp_path / "version"
    assert provenance._driver(file) is None
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (builder@host)",
    ):
        file.write_text(line)
        assert provenance._driver(file) == "535.104.05"

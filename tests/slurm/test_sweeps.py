"""Sweeps on a real SLURM, disturbed in every way it knows: nothing is lost, and nothing is made twice.

Weights, records, images and scores are bitwise equal to those of the same sweep run undisturbed in one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from safetensors.numpy import load_file
from support.tiny_sweep import PLUGIN, same, sweep_file

from alignbench.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

HELD = str(Path(__file__).with_name("held.py"))
PLUGINS = ["--plugin", PLUGIN, "--plugin", HELD]
PATIENCE = 900  # seconds, enough for a busy machine
TAGS = ("requeued", "cancelled", "killed", "drained", *(f"calm{i}" for i in range(5)))
LIMITED = ("yields", "late")
BATCHES = [0, 1, 2, 3]
FINAL = "weights.safetensors"
IMAGES = 2


def case(tag: str) -> dict[str, Any]:
    """Return a case of a sweep; those in LIMITED have their own resources."""
    if tag == "base":
        return {"label": "base", "method": {"name": "base"}}
    return {"label": tag, "method": {"name": "limited" if tag in LIMITED else "held", "tag": tag}}


def document(folder: Path, *tags: str, **changes: Any) -> str:
    """Write the file of a sweep of these runs, and return its path."""
    evaluators = {"evaluators": changes.pop("evaluators", [{"name": "counted"}])}
    sweep = {
        "base": {"training": {"budget": {"images": len(BATCHES)}, "batch": 1}},
        "cases": [case(tag) for tag in tags],
        "grid": {"training.seed": [0]},
        "evaluation": evaluators | {"limit": IMAGES},
    }
    return sweep_file(folder, sweep | changes)


@dataclass
class Sweep:
    """A sweep file, its store, and the folder through which the test plug-in is controlled."""

    cluster: Cluster
    file: str
    store: Path
    hold: Path

    def run(self, verb: str, *words: str) -> tuple[int, str]:
        """Run a verb of the command line, and return its exit code and output."""
        plugins = [] if verb == "status" else PLUGINS
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main([verb, self.file, "--store", str(self.store), *plugins, *words])
        return code, output.getvalue()

    def submit(self) -> None:
        assert self.run("sweep", "--launcher", "slurm")[0] == 3

    def states(self) -> dict[str, str]:
        """Return the row of every run in `alignbench status`, from its state on."""
        rows = [line.split(maxsplit=1) for line in self.run("status")[1].splitlines()[1:-1]]
        return {title.rstrip(","): rest for title, rest in rows}

    def end(self) -> int:
        """Wait until no job is left, hurrying requeued ones, and return the exit code of `status`."""

        def over() -> int | None:
            for row in self.cluster.squeue():
                if row.reason == "BeginTime":
                    self.cluster.hurry(row.id)
            code, _ = self.run("status")
            return None if code == 3 or self.alive() else code + 1

        return self.cluster.wait(over, PATIENCE, every=1.0) - 1

    def alive(self) -> bool:
        return any(row.state in ("PENDING", "RUNNING", "COMPLETING") for row in self.cluster.squeue())

    def job(self, tag: str) -> str:
        """Return the id of the job that trains a run."""
        manifest = json.loads(next((self.store / "sweeps").glob("*.json")).read_text())
        run = next(run["id"] for run in manifest["runs"] if run["label"] == tag)
        tickets = json.loads(next((self.store / "jobs").glob("*/jobs.json")).read_text())["tickets"]
        return next(ticket["job"] for ticket in tickets if (ticket["run"], ticket["stage"]) == (run, "train"))

    def row(self, tag: str) -> Any:
        (row,) = self.cluster.squeue(self.job(tag))
        return row

    def stop_at(self, tag: str, batch: int) -> Path:
        """Make a training run wait in a batch as long as the returned file exists."""
        path = self.hold / f"{tag}.hold-{batch}"
        path.touch()
        return path

    def batches(self, tag: str) -> list[int]:
        """Return all batches that were started, in order, by any process."""
        log = self.hold / f"{tag}.log"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def reached(self, tag: str, batch: int) -> None:
        self.cluster.wait(lambda: batch in self.batches(tag), PATIENCE)


@pytest.fixture(scope="session")
def calm(tmp_path_factory, cluster) -> Path:
    """Return the store of all runs, made undisturbed in this process."""
    folder = tmp_path_factory.mktemp("calm")
    file = document(folder, "base", *LIMITED, *TAGS)
    assert main(["sweep", file, "--store", str(folder / "store"), *PLUGINS, "--launcher", "debug"]) == 0
    return folder / "store"


@pytest.fixture
def prepare(cluster, tmp_path, monkeypatch) -> Iterator[Callable[..., Sweep]]:
    """Yield a function that makes sweeps; cancel what a failed test leaves in the queue."""

    def make(*tags: str, folder: Path = tmp_path, store: Path | None = None, **changes: Any) -> Sweep:
        hold = folder / "hold"
        hold.mkdir()
        monkeypatch.setenv("ALIGNBENCH_TEST_HOLD", str(hold))
        return Sweep(cluster, document(folder, *tags, **changes), store or folder / "store", hold)

    yield make
    cluster.cancel("--user=root")


def test_a_sweep_survives_all_that_slurm_does_to_its_jobs(prepare, cluster, calm):
    """Disturbed jobs lose no more than the batch that was cut short, and the store equals the undisturbed one.

    Of twelve runs one is requeued, one signalled before its time limit, one runs past it, one is cancelled and one
    killed; a node is drained and slurmctld restarted under the others. The three that end are listed with the reason,
    and `retry` makes them and no others.
    """
    slow = {"time": 2, "signal": 80}
    sweep = prepare(*LIMITED, *TAGS, "base", slurm={"methods": {"limited": slow}})  # the slowest first
    held = {tag: sweep.stop_at(tag, 2) for tag in ("requeued", "cancelled", "killed", "drained")}
    held["late"] = sweep.stop_at("late", 0)  # its first batch: it never gets to handling the signal
    (sweep.hold / "yields.slow").touch()
    sweep.submit()
    for tag in held:
        sweep.reached(tag, 0 if tag == "late" else 2)
    cluster._run("scontrol", "update", f"jobid={sweep.job('late')}", "TimeLimit=1")

    node = sweep.row("drained").node
    cluster.drain(node)
    cluster.restart_controller()
    assert sweep.row("drained").state == "RUNNING"
    held["drained"].unlink()
    cluster.wait(lambda: sweep.row("drained").state == "COMPLETED")
    cluster.resume(node)

    cluster.kill_job_process(sweep.job("killed"))
    cluster.cancel(sweep.job("cancelled"))
    cluster.requeue(sweep.job("requeued"))
    cluster.wait(lambda: sweep.row("yields").restarts > 0, PATIENCE)
    (sweep.hold / "yields.slow").unlink()
    cluster.wait(lambda: sweep.row("late").state == "TIMEOUT", PATIENCE)
    for path in held.values():
        path.unlink(missing_ok=True)

    assert sweep.end() == 2
    states = sweep.states()
    lost = {"cancelled": "CANCELLED", "killed": "FAILED", "late": "TIMEOUT"}
    assert {tag for tag, row in states.items() if " done" not in f" {row}"} == set(lost)
    for tag, how in lost.items():
        assert f"({how})" in states[tag]
    before = {path: path.stat().st_mtime_ns for path in sweep.store.glob("[irs][mu]*/*/*.p*")}
    assert sweep.run("retry")[0] == 3
    assert sweep.end() == 0

    same(calm, sweep.store)
    same(sweep.store, calm)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    for tag in ("drained", "yields", *TAGS[4:]):
        assert sweep.batches(tag) == BATCHES
    for tag in ("requeued", "cancelled"):  # SIGTERM comes first: a batch that finishes in time is kept
        assert sweep.batches(tag) in (BATCHES, [0, 1, 2, 2, 3])
    assert sweep.batches("killed") == [0, 1, 2, 2, 3]
    assert sweep.batches("late") == [0, 0, 1, 2, 3]
    assert (sweep.hold / "scored.log").read_text().split() == [str(IMAGES)] * 12
    assert list((sweep.store / "locks").iterdir()) == []


def test_a_plug_in_that_fails_holds_back_its_own_scores_alone(prepare, calm):
    """Other scores are made, and the status has the reason; once it is repaired, `retry` makes only its scores."""
    sweep = prepare("base", evaluators=[{"name": "counted"}, {"name": "bright"}])
    shutil.copytree(calm, sweep.store, ignore=shutil.ignore_patterns("sweeps", "scores", "jobs"))
    (sweep.hold / "broken").touch()
    sweep.submit()
    assert sweep.end() == 2
    assert "the judge is ill" in sweep.states()["base"]
    (made,) = sweep.store.glob("scores/*/*.parquet")
    assert made.name.startswith("bright@")
    (sweep.hold / "broken").unlink()
    before = made.stat().st_mtime_ns
    assert sweep.run("retry")[0] == 3
    assert sweep.end() == 0
    assert made.stat().st_mtime_ns == before
    (mended,) = sweep.store.glob("scores/*/counted@*.parquet")
    assert mended.read_bytes() == (calm / mended.relative_to(sweep.store)).read_bytes()


def test_a_disk_that_fills_up_costs_nothing_that_was_made(prepare, cluster, calm, tmp_path):
    """When the disk fills up during training, the run is reported, and with space again `retry` resumes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)], check=True)
    try:
        sweep = prepare("calm0", store=disk / "store")
        hold = sweep.stop_at("calm0", 2)
        sweep.submit()
        sweep.reached("calm0", 2)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(2**16)):
                pass
        hold.unlink()
        assert sweep.end() == 2
        assert "done" not in sweep.states()["calm0"]
        (disk / "filler").unlink()
        assert sweep.run("retry")[0] == 3
        assert sweep.end() == 0
        assert sweep.batches("calm0") == [0, 1, 2, 2, 3]
        same(sweep.store, calm)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_tasks_of_one_job_are_one_run(prepare, tmp_path):
    """Two ranks on a node train and generate together; the weights equal those of one process, up to rounding."""
    training = {"training": {"budget": {"images": 8}, "batch": 2}}
    both = {"stages": {"train": {"tasks_per_node": 2}, "generate": {"tasks_per_node": 2}}}
    sweep = prepare("calm1", base=training, slurm=both)
    sweep.submit()
    assert sweep.end() == 0, sweep.run("status")[1]
    (run,) = sweep.store.glob("runs/held-*")
    assert json.loads((run / "provenance.json").read_text())["processes"] == 2
    assert len(list(sweep.store.glob("images/*/*.png"))) == IMAGES

    (tmp_path / "alone").mkdir()
    alone = document(tmp_path / "alone", "calm1", base=training)
    assert main(["sweep", alone, "--store", str(tmp_path / "alone"), *PLUGINS, "--launcher", "debug"]) == 0
    ours, theirs = (load_file(store / "runs" / run.name / FINAL) for store in (sweep.store, tmp_path / "alone"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert abs(ours[name] - value).max() < 1e-4, name


SHELL = {
    "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "77", "SLURM_NTASKS": "7", "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "nowhere", "SBATCH_EXPORT": "NONE", "SQUEUE_STATES": "FAILED",
    "SQUEUE_USERS": "nobody", "SQUEUE_PARTITION": "short", "SQUEUE_FORMAT": "%i", "WORLD_SIZE": "4", "RANK": "1",
    "LOCAL_RANK": "1", "PMI_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "fp16",
}  # fmt: skip


def test_two_sweeps_typed_inside_an_allocation_share_a_training_run(prepare, cluster, calm, tmp_path, monkeypatch):
    """The shell's filters, defaults and ranks reach neither SLURM nor the jobs, nor does an odd path disturb them.

    The second sweep, with other images, waits for the first one's training. Tasks that are cancelled in bulk say so,
    and the next retry or sweep makes the rest.
    """
    evaluation = {"evaluators": [{"name": "counted"}], "limit": IMAGES, "protocol": {"steps": 3}}
    folders = [tmp_path / name for name in ("second", "first")]
    for folder in folders:
        folder.mkdir()
    store = tmp_path / "it's 50%: a store"
    second = prepare("calm1", folder=folders[0], store=store, name="second", evaluation=evaluation)
    first = prepare("base", "calm1", folder=folders[1], store=store)  # its folder controls the runs of both
    held = first.stop_at("calm1", 2)
    with monkeypatch.context() as shell:
        for name, value in SHELL.items():
            shell.setenv(name, value)
        first.submit()
        second.submit()
        assert "0 jobs submitted" in first.run("sweep", "--launcher", "slurm")[1]
    records = [json.loads(path.read_text()) for path in sorted(store.glob("jobs/*/jobs.json"))]
    stages = {record["sweep"].partition("-")[0]: [t["stage"] for t in record["tickets"]] for record in records}
    assert stages == {
        "tiny": ["generate", "score counted", "train", "generate", "score counted"],
        "second": ["generate", "score counted"],
    }
    first.reached("calm1", 2)
    training = next(t["job"] for record in records for t in record["tickets"] if t["stage"] == "train")
    cluster.cancel(training.partition("_")[0])
    assert first.end() == 2
    for sweep in (first, second):
        assert "(CANCELLED)" in sweep.states()["calm1"]
    held.unlink()
    assert first.run("retry")[0] == 3
    second.submit()
    assert [sweep.end() for sweep in (first, second)] == [0, 0]
    assert first.batches("calm1") == [0, 1, 2, 2, 3]
    (weights,) = store.glob(f"runs/*/{FINAL}")
    ours, theirs = load_file(weights), load_file(calm / weights.relative_to(store))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


# -- two users on one store -------------------------------------------------------------------------------------------


def submitters() -> list[list[str]]:
    """Return the command prefixes of two users; empty (root) if others cannot read this checkout or its Python."""
    become = [["runuser", "-u", user, "-g", "users", "--"] for user in ("games", "news")]  # without root's rights
    reads = "import alignbench.cli; open(__import__('sys').argv[1])"
    can = subprocess.run([*become[0], sys.executable, "-c", reads, PLUGIN], capture_output=True)
    return become if can.returncode == 0 else [[], []]


def test_two_users_sweeps_at_once_share_the_work(prepare, cluster, calm):
    """Two Unix users share a group-writable store and runs: each run is made once, and both sweeps finish."""
    shared = cluster.folder / "shared"  # pytest's folders are readable only by root
    sweeps = []
    for words, tags in zip(submitters(), (("base", "calm1"), ("calm1", "calm2"))):
        folder = shared / "-".join(tags)
        folder.mkdir(parents=True)
        sweeps.append((words, prepare(*tags, folder=folder, store=shared / "store")))
    hold = sweeps[0][1].hold
    for path in (hold, shared):
        path.mkdir(exist_ok=True)
        shutil.chown(path, group="users")
        path.chmod(0o2775)
    for user in ("games", "news"):
        cluster.admit(user)
    environment = os.environ | {"ALIGNBENCH_TEST_HOLD": str(hold), "HOME": str(shared)}
    command = [sys.executable, "-m", "alignbench.cli", "sweep"]
    options = ["--store", str(shared / "store"), *PLUGINS, "--launcher", "slurm"]
    both = [
        subprocess.Popen([*words, *command, sweep.file, *options], env=environment, umask=0o002)
        for words, sweep in sweeps
    ]
    assert [process.wait(PATIENCE) for process in both] == [3, 3]
    assert [sweep.end() for _, sweep in sweeps] == [0, 0]
    same(shared / "store", calm)
    logs = {path.stem: path.read_text().split() for path in hold.glob("calm*.log")}
    assert logs == {tag: [str(batch) for batch in BATCHES] for tag in ("calm1", "calm2")}
    assert (hold / "scored.log").read_text().split() == [str(IMAGES)] * 3
    if sweeps[0][0]:
        owners = {path.owner() for path in (shared / "store" / "runs").iterdir()}
        assert owners <= {"games", "news"}

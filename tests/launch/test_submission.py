"""Requests to SLURM and the reading of its answers; tests/slurm does the same with a real SLURM."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_sweep import PLUGIN, alignbench, sweep_file

from alignbench.config import UserError
from alignbench.experiment import resources
from alignbench.experiment.document import read
from alignbench.experiment.plan import Plan, resolve
from alignbench.experiment.resources import Resources
from alignbench.launch import local, slurm, status_table, submissions
from alignbench.launch import submit as submit_module
from alignbench.launch.pending import unfinished
from alignbench.launch.slurm import arrays
from alignbench.plugins import Registry
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json, write, write_json
from alignbench.store.stages import Stage


def planned(folder: Path, **changes) -> Plan:
    return resolve(read(sweep_file(folder, changes)), Registry([PLUGIN]))


def ask(folder: Path, slurm_settings: dict, **changes) -> list[slurm.Array]:
    plan = planned(folder, **changes)
    return arrays(slurm_settings, unfinished(plan, plan.cells, Store(folder / "store")), plan.scored)


def test_one_array_per_stage_and_a_predecessor_for_every_task(tmp_path):
    """The i-th tasks of training, generation and each evaluator share a run; each waits only for its predecessor."""
    found = ask(tmp_path, {})
    assert [array.title for array in found] == [
        "generate", "score bright", "score geneval",  # base trains nothing
        "train", "generate", "score bright", "score geneval",
    ]  # fmt: skip
    train, generate, *scores = found[3:]
    assert found[0].after is train.after is None
    assert generate.after is train
    assert all(score.after is generate for score in scores)
    assert {tuple(cell.id for cell in array.cells) for array in found[3:]} == {tuple(c.id for c in train.cells)}
    assert len(train.cells) == 2


def test_only_what_is_missing_is_asked_for(tmp_path):
    """If one score is missing, its evaluator's array is the only one, and waits for nothing."""
    plan, store = planned(tmp_path), Store(tmp_path / "store")
    for cell in plan.cells:
        run = store.run(cell.id, cell.trains)
        write(run.product, b"weights")
        run.succeed()
        write(store.images(cell.images).product, b"manifest")
        for score in plan.scores[1:]:
            write(store.scores(cell.images, score.file).product, b"scores")
    (only,) = arrays({}, unfinished(plan, plan.cells, store), plan.scored)
    assert (only.title, only.after, len(only.cells)) == ("score bright", None, 3)


def test_rows_that_are_the_same_run_are_worked_on_once(tmp_path):
    """Two labels with the same content share one job per stage."""
    twice = [{"label": name, "method": {"name": "base"}} for name in ("A", "B")]
    assert [len(array.cells) for array in ask(tmp_path, {}, cases=twice)] == [1, 1, 1]


def test_resources_are_laid_over_one_another(tmp_path):
    """Later settings win: all jobs, then stage, backend, method (training only) and evaluator."""
    settings = {
        "partition": "gpu",
        "time": 60,
        "stages": {"train": {"gpus_per_node": 8}, "score": {"time": "00:10:00"}},
        "backends": {"flux": {"mem": "64G"}},
        "methods": {"last": {"nodes": 2, "parallel": "fsdp"}},
        "evaluators": {"bright": {"partition": "cpu"}},
    }
    found = {array.title: array.resources for array in ask(tmp_path, settings)}
    assert found["train"] == Resources(partition="gpu", time=60, gpus_per_node=8, mem="64G", nodes=2, parallel="fsdp")
    assert found["train"].ranks == 16
    assert found["generate"] == Resources(partition="gpu", time=60, mem="64G")
    assert found["score bright"] == Resources(partition="cpu", time="00:10:00")


@pytest.mark.parametrize(
    ("time", "seconds"), [(90, 5400), ("10:30", 630), ("01:00:01", 3601), ("1-02:30", 95_400), ("1-00:00:05", 86_405)]
)
def test_a_time_is_read_as_slurm_reads_it(time, seconds):
    """All forms of sbatch's --time are understood."""
    assert Resources(time=time).seconds == seconds


def test_a_job_that_would_be_told_to_save_at_its_start_is_refused(tmp_path):
    """Such a job would be requeued after every batch."""
    with pytest.raises(UserError, match=r"slurm.time: generate: 1 is not longer than the 90 s .* lower signal"):
        ask(tmp_path, {"time": 1})
    assert ask(tmp_path, {"time": 1, "signal": 20})


def test_methods_with_other_resources_have_their_own_arrays(tmp_path):
    """The images of a run still wait for its training."""
    cases = [{"label": name, "method": {"name": name}} for name in ("last", "stopped")]
    settings = {"methods": {"stopped": {"mem": "1G"}}}
    found = [array for array in ask(tmp_path, settings, cases=cases) if array.stage is not Stage.SCORE]
    assert [(a.title, a.cells[0].spec.label) for a in found] == [
        ("train", "last"), ("generate", "last"), ("train", "stopped"), ("generate", "stopped"),
    ]  # fmt: skip
    assert [found.index(a.after) if a.after else None for a in found] == [None, 0, None, 2]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"partiton": "gpu"}, r"slurm.partiton: .* did you mean 'partition'"),
        ({"time": "an hour"}, r"slurm.time: "),
        ({"gpus_per_node": -1}, r"slurm.gpus_per_node: expected a whole number >= 0"),
        ({"methods": {"lats": {}}}, r"slurm.methods: there is no method 'lats'; did you mean 'last'"),
        ({"evaluators": {"bright": {"memory": "1G"}}}, r"slurm.evaluators.bright.memory: "),
        ({"stages": {"training": {}}}, r"slurm.stages: "),
    ],
)
def test_a_mistake_in_what_is_asked_is_found_with_the_sweep(tmp_path, settings, line):
    """A mistake is reported before anything is submitted, whichever launcher is chosen."""
    with pytest.raises(UserError, match=line):
        planned(tmp_path, slurm=settings)


def test_a_cluster_file_overrides_the_sweep(tmp_path):
    """It overrides key by key; a mistake in it names the file."""
    file = tmp_path / "a100.yaml"
    file.write_text("partition: a100\nmethods: {last: {mem: 1G}}\n")
    registry = Registry([PLUGIN])
    own = {"partition": "gpu", "time": 5, "methods": {"last": {"nodes": 2}}}
    assert resources.read(own, str(file), registry) == {
        "partition": "a100", "time": 5, "methods": {"last": {"nodes": 2, "mem": "1G"}},
    }  # fmt: skip
    file.write_text("partitoin: a100\n")
    with pytest.raises(UserError, match=r"a100.yaml: partitoin: "):
        resources.read(own, str(file), registry)


def test_resources_are_part_of_no_id(tmp_path):
    """A sweep with another `slurm` section has the same runs and manifest."""
    one, other = planned(tmp_path), planned(tmp_path, slurm={"mem": "1G"})
    assert one.document.manifest == other.document.manifest
    assert [cell.id for cell in one.cells] == [cell.id for cell in other.cells]


def test_active_jobs_are_not_submitted_again_unless_more_is_missing(tmp_path, monkeypatch):
    """A row that is queued whole is skipped; a row queued in part, as when sweeps share a run, is submitted whole."""
    plan, store, asked = planned(tmp_path), Store(tmp_path / "store"), []

    def submit(array, *words) -> None:
        array.job = str(10 + len(asked))
        asked.append(array.title)

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "cancel", lambda jobs: None)
    monkeypatch.setattr(slurm, "live", lambda names: live)
    live: dict[str, slurm.LiveJob] = {}
    assert submit_module.submit(plan, plan.cells, store, {}, [PLUGIN]) == 2 + 3 * 3
    jobs = submissions.read(store)[0].jobs
    live = {job.job: slurm.LiveJob("PENDING", "Priority", 0, "") for job in jobs}
    assert submit_module.submit(plan, plan.cells, store, {}, [PLUGIN]) == 0
    asked.clear()
    live = {job.job: live[job.job] for job in jobs if job.stage == "train"}
    assert submit_module.submit(plan, plan.cells[1:], store, {}, [PLUGIN]) == 2 * 4
    assert asked == ["train", "generate", "score bright", "score geneval"]


def test_a_batch_that_does_not_divide_among_ranks_is_refused_before_submission(tmp_path, monkeypatch, capsys):
    """Rows are comparable only with equal batches, so none is rounded to fit a node."""
    monkeypatch.setattr(slurm, "check", lambda: None)
    file = sweep_file(tmp_path, {"slurm": {"stages": {"train": {"gpus_per_node": 3}}}})
    assert alignbench("sweep", file, "--launcher", "slurm", store=tmp_path / "store") == 1
    assert "Last, seed 0: training.batch: 2 samples do not divide among 3 ranks" in capsys.readouterr().err


GROUPS = {  # four ranks of three samples, where a group has twelve images
    "cases": [{"label": "GRPO", "method": {"name": "dancegrpo", "steps": 3, "group": 12, "updates_per_rollout": 1}}],
    "base": {"training": {"batch": 12, "budget": {"images": 24}}},
    "slurm": {"stages": {"train": {"gpus_per_node": 4}}},
}


def test_groups_that_do_not_divide_among_ranks_are_refused_before_submission(tmp_path, monkeypatch, capsys):
    """The error names the ranks and their share; `validate` warns, as another launcher may be meant."""
    monkeypatch.setattr(slurm, "check", lambda: None)
    file = sweep_file(tmp_path, GROUPS)
    problem = (
        "GRPO{}: 4 ranks with 3 samples each: method.group: 3 samples per micro-batch do not make whole groups of 12"
    )
    assert alignbench("sweep", file, "--launcher", "slurm", store=tmp_path / "store") == 1
    assert problem.format(", seed 0") in capsys.readouterr().err
    assert not (tmp_path / "store" / "jobs").exists()
    assert alignbench("validate", file) == 0
    assert "slurm: " + problem.format("") in capsys.readouterr().err
    fits = {"slurm": {"stages": {"train": {"gpus_per_node": 1}}}}
    assert alignbench("validate", sweep_file(tmp_path, GROUPS | fits)) == 0
    assert "ranks" not in capsys.readouterr().err


def test_a_machine_without_slurm_says_what_to_do(tmp_path, monkeypatch, capsys):
    """The error is one line, and nothing is written."""
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert alignbench("sweep", sweep_file(tmp_path), "--launcher", "slurm", store=tmp_path / "store") == 1
    assert "there is no sbatch on this machine" in (error := capsys.readouterr().err)
    assert "--launcher local" in error
    assert not (tmp_path / "store").exists()


def test_the_batch_file_asks_for_it_and_holds_no_pickle(tmp_path, monkeypatch):
    """It has array, dependency, signal and resources, quotes odd paths, and its command reads JSON."""
    folder, tools = tmp_path / "it's a store; echo", tmp_path / "bin"
    folder.mkdir()
    tools.mkdir()
    for name in ("sbatch", "srun"):
        (tools / name).write_text("#!/bin/sh\necho Submitted batch job 7\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    train, generate = ask(tmp_path, {"time": 60, "mem": "2G"})[3:5]
    train.job = "6"
    slurm.submit(generate, folder, "alignbench-tiny", {"PYTHONPATH": "/a b"})
    assert generate.job == "7"
    text = (folder / "7_submission.sh").read_text()
    for line in (
        "#SBATCH --array=0-1%2", "#SBATCH --dependency=aftercorr:6", "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --signal=USR2@90", "#SBATCH --time=60", "#SBATCH --mem=2G", "#SBATCH --requeue",
        "export PYTHONPATH='/a b'",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert " --kill-on-bad-exit=1 " in next(line for line in text.splitlines() if line.startswith("srun "))
    assert subprocess.run(["bash", "-n", folder / "7_submission.sh"], check=False).returncode == 0
    assert not list(folder.glob("*.pkl"))


# -- what other users may have written --------------------------------------------------------------------------------


def record(store: Store, **changes) -> None:
    entry = {"job": "7_0", "stage": "train", "makes": ["last-1"], "run": "last-1", "progress": "/none"}
    data = {"sweep": "tiny-1", "launcher": "slurm", "name": "alignbench-tiny", "options": {}, "submitted": time.time()}
    data |= {"host": "login", "pid": 1, "tickets": [entry | changes]}
    write_json(store.root / "jobs" / f"tiny-{len(changes)}" / submissions.FILE, data)


def test_an_invalid_record_is_skipped(tmp_path):
    """Records with unsafe job ids, missing keys, wrong types or invalid JSON are skipped, and the others are read."""
    store = Store(tmp_path)
    record(store)
    record(store, job="7_0; rm -rf ~")
    write_json(tmp_path / "jobs" / "half" / submissions.FILE, {"sweep": "tiny-1"})
    write(tmp_path / "jobs" / "broken" / submissions.FILE, b"\x80\x04pickle")
    write(tmp_path / "jobs" / "list" / submissions.FILE, "[]")
    valid = read_json(tmp_path / "jobs" / "tiny-0" / submissions.FILE) or {}
    entry = valid["tickets"][0]
    for place, change in enumerate(
        ({"submitted": "x"}, {"pid": "x"}, {"tickets": 3}, {"tickets": [entry | {"makes": 5}]})
    ):
        write_json(tmp_path / "jobs" / f"wrong-{place}" / submissions.FILE, valid | change)
    assert [submission.jobs[0].job for submission in submissions.read(store, "tiny-1")] == ["7_0"]


def test_a_row_is_one_line_without_control_characters():
    """A reason may contain text from a judge or a file name."""
    row = status_table.Row("Last", "last-1", "failed", "", "", "", "a\nb\x1b[2J\u202ec")
    line = status_table.table([row]).splitlines()[1]
    assert line.endswith("a b [2J c")
    assert "\x1b" not in line


def test_exit_codes():
    """Exit codes: 0 all done, 2 some failed or lost, 3 some pending."""

    def code(*states: str) -> int:
        return status_table.exit_code([status_table.Row("", "", state, "", "", "", "") for state in states])

    assert [code("done"), code("done", "queued"), code("queued", "failed"), code("stale"), code("planned")] == [
        0, 3, 2, 2, 3,
    ]  # fmt: skip


@pytest.mark.slow
def test_no_pickle_lies_in_a_store(tmp_path):
    """A local sweep passes work through a private folder of its user."""
    assert alignbench("sweep", sweep_file(tmp_path), "--only", "method=base", store=tmp_path / "store") == 0
    assert not [path for path in (tmp_path / "store").rglob("*") if path.suffix in (".pkl", ".pickle")]
    assert not list((tmp_path / "store" / "jobs").iterdir())


@pytest.mark.parametrize("name", ["../x", "a'; echo foo", "x" * 300, "ä/ö", ".hidden", ""])
def test_a_name_that_is_not_a_file_name_is_refused(tmp_path, name):
    """A method's name becomes part of a folder name, so it is checked when the plug-in is read."""
    plugin = tmp_path / "odd.py"
    plugin.write_text(f"from alignbench import AlignMethod\nclass Odd(AlignMethod):\n    name = {name!r}\n")
    with pytest.raises(UserError, match=r"odd.py: Odd.name: .* becomes part of file names"):
        Registry([str(plugin)])


@pytest.mark.parametrize("label", ["../x", "a'; echo foo", "x" * 300, "名前 ✓ é"])
def test_a_rows_label_may_be_anything(tmp_path, label):
    """A label is only displayed; file names come from content."""
    (array, *_) = ask(tmp_path, {}, cases=[{"label": label, "method": {"name": "base"}}])
    assert array.cells[0].spec.label == label
    assert array.cells[0].id.startswith("base-")


def test_a_job_without_stages_ends_at_once(tmp_path):
    """Such a job, used to measure overhead, does not import torch."""
    file = tmp_path / "0.json"
    file.write_text(json.dumps({"tasks": [{"stages": []}]}))
    script = "import sys; from alignbench.run.slurm_job import main; "
    script += f"sys.exit(main({str(file)!r}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env={"SLURM_ARRAY_TASK_ID": "0"}, check=False)
    assert done.returncode == 0


# -- threads of local workers -----------------------------------------------------------------------------------------


def test_the_same_command_gives_a_run_the_same_threads(tmp_path):
    """A run keeps the number it was begun with, if this machine has as many cores; else it takes the launch's."""
    launch = local.LocalLaunch(None, Store(tmp_path), tmp_path, [], 1, 7, [], [], ())
    job = SimpleNamespace(cell=SimpleNamespace(id="last-1"))
    assert launch._threads(job) == 7
    for begun, kept in ((local.cores(), local.cores()), (local.cores() + 1, 7)):
        write_json(tmp_path / "runs" / "last-1" / "provenance.json", {"threads": begun})
        assert launch._threads(job) == kept

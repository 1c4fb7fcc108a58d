"""Requests to SLURM and the reading of its answers; tests/slurm does the same with a real SLURM."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_sweep import PLUGIN, alignbench, sweep_file

from alignbench.config import UserError, decode
from alignbench.experiment import resources
from alignbench.experiment.document import read
from alignbench.experiment.plan import Plan, resolve
from alignbench.experiment.resources import Resources
from alignbench.launch import local, slurm, status_table, submissions
from alignbench.launch import submit as submit_module
from alignbench.launch.pending import unfinished
from alignbench.launch.slurm import arrays
from alignbench.plugins import Registry
from alignbench.run import slurm_job
from alignbench.run.code_snapshot import Snapshot
from alignbench.store import shell
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
    assert found[0].after == train.after == ""
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
    assert (only.title, only.after, len(only.cells)) == ("score bright", "", 3)


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
        ({"gpus_per_node": "gpu:a100:4"}, r"gpus_per_node: 'gpu:a100:4' is neither a number of GPUs \(4\) nor a type"),
        ({"methods": {"lats": {}}}, r"slurm.methods: there is no method 'lats'; did you mean 'last'"),
        ({"evaluators": {"bright": {"memory": "1G"}}}, r"slurm.evaluators.bright.memory: "),
        ({"stages": {"training": {}}}, r"slurm.stages: "),
    ],
)
def test_a_mistake_in_what_is_asked_is_found_with_the_sweep(tmp_path, settings, line):
    """A mistake is reported before anything is submitted, whichever launcher is chosen."""
    with pytest.raises(UserError, match=line):
        planned(tmp_path, slurm=settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mem": "2G", "additional": {"mem-per-cpu": "1G"}}, r"additional.mem-per-cpu: the setting mem .*\(2G\)"),
        ({"time": 60, "additional": {"time": "1:00"}}, r"additional.time: the setting time .*\(60\)"),
        ({"partition": "a", "additional": {"part": "b"}}, r"additional.part: the setting partition .*\(a\)"),
        ({"partition": "a", "srun": ["--partition=b"]}, r"srun: --partition=b: the setting partition"),
        (
            {"gpus_per_node": "a100:4", "additional": {"gres": "gpu:a100:4"}},
            r"additional.gres: .*gpus_per_node .*a100:4",
        ),
        (
            {"additional": {"gres": ["nvme:1", "gpu:4"]}},
            r"additional.gres: one rank is started for each GPU of .*write",
        ),
        ({"additional": {"ntasks_per_node": 4}}, r"additional.ntasks_per_node: write the setting tasks_per_node"),
        ({"srun": ["-n4"]}, r"srun: -n4: write the setting tasks_per_node"),
        ({"additional": {"no-requeue": True}}, r"additional.no-requeue: alignbench itself sets --no-requeue"),
        (
            {"additional": {"mail-type": "END", "mail_type": "BEGIN"}},
            r"additional.mail-type: write sbatch's option once",
        ),
        ({"additional": {"--exclusive": True}}, r"additional.--exclusive: write sbatch's option once, in full"),
        ({"additional": {"comment": "a\nb"}}, r"comment: SLURM takes no text with"),
        ({"srun": ["--container-image x.sqsh"]}, r"srun: .* is not one word; write --option=value"),
        ({"python": "'python"}, r"python: ''python' is not a command"),
    ],
)
def test_what_is_said_twice_is_refused_with_both_names(settings, line):
    """Of two contradicting lines SLURM takes the last one, and GPUs of unknown number would get one rank."""
    with pytest.raises(UserError, match=line):
        decode(Resources, settings, "slurm")


def test_what_all_jobs_ask_for_is_set_beside_what_a_stage_asks_for(tmp_path):
    """The contradiction is found with the sweep, or with the cluster file."""
    stages = {"stages": {"train": {"mem": "2G"}}}
    with pytest.raises(UserError, match=r"slurm.stages.train: additional.mem-per-gpu: the setting mem"):
        resources.check_options({"additional": {"mem-per-gpu": "1G"}} | stages, "slurm", Registry())
    file = tmp_path / "a100.yaml"
    file.write_text("additional: {mem-per-gpu: 1G}\n")
    with pytest.raises(UserError, match=r"the sweep's slurm with .*a100.yaml: stages.train: additional.mem-per-gpu"):
        resources.read(stages, str(file), Registry())


def test_options_have_the_values_that_yaml_gives_them():
    """True and "" are options without a value, false and null leave one out, a list is what SLURM writes as one."""
    further = {
        "exclusive": True,
        "hold": "",
        "overcommit": False,
        "nice": None,
        "mail_type": ["END", "FAIL"],
        "exclude": [],
    }
    found = Resources(gpus_per_node="a100:4", additional=further | {"gres": "nvme:1", "switches": 1})
    assert found.ranks == 4
    assert found.options() == {
        "nodes": "1", "gpus-per-node": "a100:4", "ntasks-per-node": "4", "signal": "USR2@90",
        "exclusive": "", "hold": "", "mail-type": "END,FAIL", "gres": "nvme:1", "switches": "1",
    }  # fmt: skip
    assert Resources(tasks_per_node=4, additional={"gres": "gpu:4"}).ranks == 4


@pytest.mark.slow
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


class Queue:
    """A SLURM that accepts every array and starts no job, in place of the commands that this module calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.submitted: list[slurm.Array] = []
        self.live: dict[str, slurm.LiveJob] = {}
        self.accounted: dict[str, str] = {}
        monkeypatch.setattr(slurm, "submit", self.submit)
        monkeypatch.setattr(slurm, "cancel", lambda jobs: None)
        monkeypatch.setattr(slurm, "live", lambda names: self.live)
        monkeypatch.setattr(
            slurm, "accounted", lambda jobs: {j: self.accounted[j] for j in jobs if j in self.accounted}
        )

    def submit(self, array: slurm.Array, *words) -> None:
        array.job = str(10 + len(self.submitted))
        self.submitted.append(array)
        self.live |= {f"{array.job}_{task}": slurm.LiveJob("PENDING", "Priority", 0, "") for task in array.tasks}

    def asked(self) -> list[tuple[str, str, list[int]]]:
        """Return title, predecessor and tasks of the arrays submitted since the last call."""
        arrays, self.submitted = self.submitted, []
        return [(array.title, array.waits_for, array.tasks) for array in arrays]


@pytest.fixture
def queue(monkeypatch) -> Queue:
    return Queue(monkeypatch)


def submitted(plan: Plan, store: Store, options: dict | None = None) -> int:
    return submit_module.submit(plan, plan.cells, store, options or {}, [PLUGIN])


def test_what_is_queued_is_awaited_rather_than_submitted_again(tmp_path, queue):
    """If only the trainings are still queued, images and scores are submitted, and task i waits for training i."""
    plan, store = planned(tmp_path), Store(tmp_path / "store")
    assert submitted(plan, store) == 3 + 2 * 4
    train = next(array for array in queue.submitted if array.title == "train")
    queue.asked()
    assert submitted(plan, store) == 0
    queue.live = {job: live for job, live in queue.live.items() if job == f"{train.job}_1"}
    assert submit_module.submit(plan, [cell for cell in plan.cells if cell.trains][1:], store, {}, [PLUGIN]) == 3
    (generate, *_), asked = queue.submitted, queue.asked()
    assert asked == [
        ("generate", train.job, [1]), ("score bright", generate.job, [1]), ("score geneval", generate.job, [1]),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_second_sweep_waits_for_the_first_ones_training_runs(tmp_path, queue):
    """It makes other images of the same weights, so it submits no training, and its tasks wait for the queued ones."""
    store = Store(tmp_path / "store")
    submitted(planned(tmp_path), store)
    train = next(array for array in queue.submitted if array.title == "train")
    queue.asked()
    other = planned(tmp_path, name="other", evaluation={"protocol": {"steps": 3}})
    submitted(other, store)
    asked = queue.asked()
    assert "train" not in [title for title, _, _ in asked]
    assert ("generate", train.job, train.tasks) in asked
    assert {row.state for row in status_table.rows(store, other.manifest())} == {"queued"}


def test_rows_that_share_a_training_run_have_one_job_for_it(tmp_path):
    """The second row, with another guidance of evaluation, waits for the first one's training job."""
    cases = [{"label": name, "method": {"name": "last"}} for name in ("A", "B")]
    overrides = [{"match": {"label": "B"}, "set": {"evaluation.protocol.guidance": 2.0}, "reason": "its paper"}]
    found = [array for array in ask(tmp_path, {}, cases=cases, overrides=overrides) if array.stage is not Stage.SCORE]
    train = found[0]
    assert [(array.title, array.after, array.tasks) for array in found] == [
        ("train", "", [0, 1]), ("generate", train, [0, 1]), ("generate", train, [0, 1]),
    ]  # fmt: skip


def test_nothing_is_lost_that_accounting_calls_running(tmp_path, queue):
    """A job that squeue does not list, as another user's may be, is neither submitted again nor stale."""
    plan, store = planned(tmp_path), Store(tmp_path / "store")
    submitted(plan, store)
    queue.accounted, queue.live = dict.fromkeys(queue.live, "RUNNING"), {}
    assert submitted(plan, store) == 0
    manifest = plan.manifest()
    assert {row.state for row in status_table.rows(store, manifest)} == {"running"}
    queue.accounted = dict.fromkeys(queue.accounted, "CANCELLED")
    rows = status_table.rows(store, manifest)
    assert {row.state for row in rows} == {"stale"}
    assert all("has ended (CANCELLED)" in row.reason for row in rows)


@pytest.mark.slow
def test_arrays_and_the_queue_have_the_sizes_that_the_cluster_allows(tmp_path, queue, capsys):
    """``array_size`` splits arrays, task by task; ``submit_limit`` leaves runs for later, and says how many."""
    assert [array.tasks for array in ask(tmp_path, {"array_size": 1}) if array.title == "train"] == [[0], [0]]
    plan, store = planned(tmp_path), Store(tmp_path / "store")
    assert submitted(plan, store, {"submit_limit": 8}) == 4 + 3
    assert "1 of 3 runs do not fit into 8 jobs at a time; type the same command again" in capsys.readouterr().err
    queue.live = {}
    with pytest.raises(UserError, match="submit_limit: 2 jobs, but the first run alone needs"):
        submitted(plan, store, {"submit_limit": 2})


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


@pytest.mark.slow
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


def test_jobs_of_another_sweep_count_against_the_limit_of_the_queue(tmp_path, queue):
    """A QOS limits a user's jobs, whichever sweep they belong to."""
    store = Store(tmp_path / "store")
    submitted(planned(tmp_path), store)
    assert len(queue.live) == 11
    other = planned(tmp_path, name="other", evaluation={"protocol": {"steps": 3}})
    assert submitted(other, store, {"submit_limit": 14}) == 3
    assert submitted(other, store, {"submit_limit": 14}) == 0


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
    container = {"srun": ["--container-image=a b.sqsh"], "python": "singularity exec img python3"}
    train, generate = ask(tmp_path, {"time": 60, "mem": "2G", **container})[3:5]
    train.job = "6"
    slurm.submit(generate, folder, "alignbench-tiny", Snapshot(Path("/a: b"), [], []))
    assert generate.job == "7"
    text = (folder / "7_submission.sh").read_text()
    for line in (
        "#SBATCH --array=0-1%2", "#SBATCH --dependency=aftercorr:6", "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --signal=USR2@90", "#SBATCH --time=60", "#SBATCH --mem=2G", "#SBATCH --requeue",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "srun --unbuffered " in text
    assert " --kill-on-bad-exit=1 " in text
    assert "'--container-image=a b.sqsh'" in text
    assert "job singularity exec img python3 -P -B -u -c" in text
    assert text.count("'/a: b'") == 1
    assert subprocess.run(["bash", "-n", folder / "7_submission.sh"], check=False).returncode == 0
    assert not list(folder.glob("*.pkl"))


class Tools:
    """Commands of SLURM that answer with ``text``, by name, and record their environment."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    def __call__(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\nenv > {self.folder}/{name}.env\ncat <<'END'\n{text}\nEND\n")
        (self.folder / name).chmod(0o755)

    def environment(self, name: str) -> dict[str, str]:
        lines = (self.folder / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Tools:
    monkeypatch.setattr(shell, "PAUSE", 0.0)
    folder = tmp_path / "bin"
    folder.mkdir()
    return Tools(folder, monkeypatch)


@pytest.mark.slow
def test_a_sweep_asks_for_what_its_file_says_inside_an_allocation_too(tmp_path, tools, monkeypatch, capsys):
    """Jobs and SLURM's commands see neither the allocation nor defaults nor filters, and what was ignored is named."""
    given = {"SLURM_MEM_PER_CPU": "1", "SBATCH_TIMELIMIT": "1", "SQUEUE_STATES": "FAILED", "SLURM_JOB_ID": "3"}
    for name, value in (given | {"SLURM_CONF": "/etc/s", "WORLD_SIZE": "4", "KEPT": "1"}).items():
        monkeypatch.setenv(name, value)
    tools("sbatch", "Submitted batch job 7 on cluster far")
    tools("srun", "")
    tools("sacct", "")
    tools("squeue", "7|0|PENDING|0|1:00:00|Priority\n\nCLUSTER: far\n7|1|PENDING|0|1:00:00|Priority")
    file = sweep_file(tmp_path, {"slurm": {"mem": "2G"}, "cases": [{"label": "Base", "method": {"name": "base"}}]})
    assert alignbench("sweep", file, "--launcher", "slurm", store=tmp_path / "store") == 3
    assert "ignored: SBATCH_TIMELIMIT; jobs ask for what the sweep's slurm settings" in capsys.readouterr().err
    assert alignbench("sweep", file, "--launcher", "slurm", store=tmp_path / "store") == 3
    assert "0 jobs submitted" in capsys.readouterr().err
    for command in ("sbatch", "squeue"):
        seen = tools.environment(command)
        assert not (given.keys() | {"WORLD_SIZE"}) & seen.keys()
        assert (seen["SLURM_CONF"], seen["KEPT"]) == ("/etc/s", "1")


BASE = {"cases": [{"label": "Base", "method": {"name": "base"}}]}


def test_a_jobs_id_is_the_one_that_sbatch_says(tmp_path, tools, capsys):
    """A site's wrapper may print more, and numbers of its own; where no job is named, that is an error."""
    for name in ("srun", "squeue", "sacct"):
        tools(name, "")
    tools("sbatch", "Checking job 1 of 2 for its budget\nSubmitted batch job 77\nSee https://x/job 5")
    alignbench("sweep", sweep_file(tmp_path, BASE), "--launcher", "slurm", store=tmp_path / "store")
    assert {job.job for job in submissions.read(Store(tmp_path / "store"))[0].jobs} == {"77_0"}
    tools("sbatch", "Checking job 1 of 2 for its budget")
    assert alignbench("sweep", sweep_file(tmp_path, BASE), "--launcher", "slurm", store=tmp_path / "other") == 1
    assert "sbatch says 'Checking job 1 of 2 for its budget', which does not name one job" in capsys.readouterr().err


def test_jobs_that_are_left_after_a_refusal_are_named_with_its_reason(tmp_path, tools, capsys):
    """If SLURM refuses the second array and does not cancel the first, both errors are told and the record stays."""
    for name in ("srun", "squeue", "sacct"):
        tools(name, "")
    (tools.folder / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Unable to contact it' >&2; exit 1\n")
    mark, once = tmp_path / "once", "echo Submitted batch job 77"
    refusal = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    (tools.folder / "sbatch").write_text(f"#!/bin/sh\n[ -e {mark} ] && {{ {refusal}; }}; touch {mark}; {once}\n")
    for name in ("scancel", "sbatch"):
        (tools.folder / name).chmod(0o755)
    assert alignbench("sweep", sweep_file(tmp_path, BASE), "--launcher", "slurm", store=tmp_path / "store") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "QOSMaxSubmitJobPerUserLimit; set slurm.submit_limit" in line
    assert "the jobs 77 were submitted and could not be cancelled: scancel says Unable to contact" in line
    assert submissions.read(Store(tmp_path / "store"))[0].jobs[0].job == "77_0"


def test_a_line_that_is_no_job_is_not_a_lost_job(tools):
    """A message among squeue's lines is one error, instead of a job that would be submitted again."""
    for line in (
        "slurm_load_jobs error: Unexpected message",
        "7|0|RUNNING|none|1:00|x",
        "a_0|0|RUNNING|0|1:00|x",
        "7|0",
    ):
        tools("squeue", f"7|1|RUNNING|0|1:00:00|None\n{line}")
        with pytest.raises(UserError, match=r"SLURM does not answer: squeue says '.*', which is not a job; try again"):
            slurm.live(["alignbench-tiny"])


def test_tasks_that_were_cancelled_in_bulk_are_known_one_by_one(tools):
    """Accounting has one line for those that never began: a range, or the whole array."""
    tools("sacct", "7_0|COMPLETED\n7_[1-3,5%2]|CANCELLED by 0\n8|CANCELLED by 1000\n9_4|NODE_FAIL")
    found = slurm.accounted(["7_0", "7_2", "7_5", "7_4", "8_0", "8_31", "9_4", "10_0"])
    assert found == {
        "7_0": "COMPLETED", "7_2": "CANCELLED", "7_5": "CANCELLED", "8_0": "CANCELLED", "8_31": "CANCELLED",
        "9_4": "NODE_FAIL",
    }  # fmt: skip
    assert tools.environment("sacct")["SLURM_BITSTR_LEN"] == "0"  # else a long range ends in three dots


def test_jobs_that_cannot_be_cancelled_are_an_error(tools):
    """It is one line; those that have ended meanwhile are ignored."""
    (tools.folder / "scancel").write_text('#!/bin/sh\necho "scancel: error: $TEXT" >&2; exit 1\n')
    (tools.folder / "scancel").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT", "Kill job error on job id 7: Job/step already completing or completed")
        slurm.cancel(["7_0"])
        patch.setenv("TEXT", "Unable to contact slurm controller (connect failure)")
        with pytest.raises(UserError, match=r"Unable to contact slurm controller .*; jobs may still be in the queue"):
            slurm.cancel(["7_0"])
        patch.setenv("TEXT", "Kill job error on job id 7: Access/permission denied")
        with pytest.raises(UserError, match=r"^scancel says Kill job error .*: Access/permission denied; jobs may"):
            slurm.cancel(["7_0"])
    (tools.folder / "scancel").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(UserError, match=r"^scancel says exit code 3; jobs may still be in the queue"):
        slurm.cancel(["7_0"])


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["back\\slash", "line\nbreak"])
def test_a_path_that_slurm_misreads_is_refused_before_anything_is_written(tmp_path, tools, odd, capsys):
    """Its error is one line."""
    for name in ("sbatch", "srun", "squeue"):
        tools(name, "")
    assert alignbench("sweep", sweep_file(tmp_path), "--launcher", "slurm", store=tmp_path / odd) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "SLURM takes no path with" in line
    assert not (tmp_path / odd / "sweeps").exists()


# -- in the job -------------------------------------------------------------------------------------------------------


def test_a_task_file_that_is_not_visible_yet_is_awaited(tmp_path, monkeypatch, capsys):
    """A shared disk may show it late; if it never does, one line says so, and the job fails."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setattr(slurm_job, "Signals", lambda: None)
    monkeypatch.setattr(slurm_job, "PATIENCE", 0.0)
    assert slurm_job.main(str(tmp_path / "0.json")) == slurm_job.FAILED
    assert "0.json: not visible on" in capsys.readouterr().out
    monkeypatch.setattr(slurm_job, "PATIENCE", 60.0)
    task = json.dumps({"tasks": {"3": {"stages": []}}})
    (tmp_path / "0.json").write_text(task[:9])  # only its beginning
    monkeypatch.setattr(slurm_job.time, "sleep", lambda seconds: (tmp_path / "0.json").write_text(task))
    assert slurm_job.main(str(tmp_path / "0.json")) == slurm_job.DONE


def test_a_container_that_hides_the_job_is_one_line(tmp_path, monkeypatch, capsys):
    """Without SLURM's variables a job knows neither its task nor its ranks."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(slurm_job, "Signals", lambda: None)
    assert slurm_job.main(str(tmp_path / "0.json")) == slurm_job.FAILED
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("SLURM_ARRAY_TASK_ID is not set: let the container")


def test_a_node_without_scontrol_ends_the_job_with_one_line(monkeypatch, capsys):
    """It says how to resume the run."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(slurm_job.signal, "signal", lambda number, action: None)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.setenv(name, "1")
    assert slurm_job._requeue(0) == slurm_job.FAILED
    (line,) = capsys.readouterr().out.splitlines()
    assert "it is not requeued (unknown here: there is no scontrol on this machine" in line
    assert "`alignbench retry` resumes it" in line


def test_ranks_of_a_job_are_slurms(monkeypatch):
    """Whatever the submitting shell, or a line of ``setup``, has exported."""
    monkeypatch.setattr(slurm_job.os, "environ", {"WORLD_SIZE": "8", "PMI_SIZE": "8", "SLURM_PROCID": "0"})
    assert slurm_job._join_ranks() == 0
    assert "WORLD_SIZE" not in slurm_job.os.environ
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "n",
        "SLURM_JOB_ID": "5",
    }
    slurm_job.os.environ.update(job | {"RANK": "7", "ACCELERATE_USE_FSDP": "1"})
    assert slurm_job._join_ranks() == 1
    assert (slurm_job.os.environ["WORLD_SIZE"], slurm_job.os.environ["RANK"]) == ("2", "1")
    assert not {"PMI_SIZE", "ACCELERATE_USE_FSDP"} & slurm_job.os.environ.keys()


# -- what other users may have written --------------------------------------------------------------------------------


def record(store: Store, **changes) -> None:
    entry = {"job": "7_0", "stage": "train", "makes": ["last-1"], "run": "last-1", "progress": "/none"}
    data = {"sweep": "tiny-1", "launcher": "slurm", "name": "alignbench-tiny", "options": {}, "submitted": time.time()}
    data |= {"host": "login", "pid": 1, "tickets": [entry | changes]}
    write_json(store.root / "jobs" / f"tiny-{len(changes)}" / submissions.FILE, data)


def test_an_invalid_record_is_skipped(tmp_path, capsys):
    """Records with unsafe job ids, missing keys, wrong types or invalid JSON are named, and the others are read."""
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
    (tmp_path / "jobs" / "begins").mkdir()  # its record is not there yet
    for _ in range(2):
        assert [submission.jobs[0].job for submission in submissions.read(store, "tiny-1")] == ["7_0"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 + 3 + 4
    assert all(line.endswith(".json: is not a record of jobs; its jobs are taken for not submitted") for line in told)


def test_a_record_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    """Another user's launch, with a umask of 077, would be submitted a second time without a word."""
    store = Store(tmp_path)
    record(store)

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(submissions, "read_json", denied)
    assert submissions.read(store) == []
    assert "jobs.json: cannot be read: Permission denied; its jobs are taken for" in capsys.readouterr().err


def test_a_row_is_one_line_without_control_characters():
    """A reason may contain text from a judge or a file name."""
    row = status_table.Row("Last", "last-1", "failed", "", "", "", "a\nb\x1b[2J\u202ec")
    line = status_table.table([row]).splitlines()[1]
    assert line.endswith("a b [2J c")
    assert "\x1b" not in line


def test_who_waits_for_jobs_waits_while_slurm_does_not_answer(tmp_path, monkeypatch, capsys):
    """A controller that restarts does not end `--wait`; that it did not answer is told."""
    states = [("queued", ""), ("unknown here", "SLURM does not answer"), ("running", ""), ("done", "")]
    row = partial(status_table.Row, "Last", "last-1", step="", left="", job="")
    rows = [row(state=state, reason=reason) for state, reason in states]
    monkeypatch.setattr(status_table, "rows", lambda *_: [rows.pop(0)])
    status_table.follow(Store(tmp_path), None, every=0.0)  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == ["Last: unknown here (SLURM does not answer)", "Last: done"]


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
    store = tmp_path / "a store: 50%"
    assert alignbench("sweep", sweep_file(tmp_path), "--only", "method=base", store=store) == 0
    assert not [path for path in store.rglob("*") if path.suffix in (".pkl", ".pickle")]
    assert not list((store / "jobs").iterdir())


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
    file.write_text(json.dumps({"tasks": {"0": {"stages": []}}}))
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

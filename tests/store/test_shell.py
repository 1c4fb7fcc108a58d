"""What the shell that starts a process has in its environment is not about our jobs, unless it names the cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignbench.store import shell
from alignbench.store.shell import NoAnswer, leave_ranks, slurm_answer, slurm_environment


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Return a function that puts a command of SLURM on the path, as a shell script."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(shell, "PAUSE", 0.0)

    def make(name: str, script: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize(
    "variable",
    [
        *("SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_EXPORT_ENV", "SLURM_TIME_FORMAT", "SLURM_HINT"),
        *("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_EXPORT", "SRUN_CPUS_PER_TASK", "SALLOC_PARTITION"),
        *("SQUEUE_STATES", "SQUEUE_USERS", "SQUEUE_PARTITION", "SQUEUE_FORMAT", "SQUEUE_FORMAT2", "SQUEUE_NAMES"),
        *("SACCT_FEDERATION", "SCANCEL_PARTITION", "SCONTROL_ALL", "SLURMD_NODENAME"),
    ],
)
def test_filters_and_defaults_of_the_shell_do_not_reach_slurm(monkeypatch, variable):
    """Neither its commands nor the jobs, which inherit sbatch's environment, see them."""
    monkeypatch.setenv(variable, "1")
    assert variable not in slurm_environment()


def test_what_names_the_cluster_reaches_slurm_and_so_does_the_rest(monkeypatch):
    """Also the name that only sbatch reads, for the other commands have to ask the same cluster."""
    given = {
        "SLURM_CONF": "/a",
        "SLURM_JWT": "b",
        "SLURM_SACK_SOCKET": "/c",
        "HF_HOME": "/d",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, value in (given | {"SBATCH_CLUSTERS": "far"}).items():
        monkeypatch.setenv(name, value)
    assert given.items() <= slurm_environment().items()
    assert slurm_environment()["SLURM_CLUSTERS"] == "far"
    monkeypatch.setenv("SLURM_CLUSTERS", "near")
    assert slurm_environment()["SLURM_CLUSTERS"] == "near"


def test_the_devices_of_a_surrounding_allocation_are_not_those_of_its_jobs(monkeypatch):
    """Inside salloc CUDA_VISIBLE_DEVICES was set by that allocation."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "CUDA_VISIBLE_DEVICES" not in slurm_environment()


def test_an_answer_that_cannot_be_read_is_asked_for_again(tool, tmp_path):
    """The second answer counts; after the last, one line has SLURM's words."""
    tool("squeue", f"echo x >> {tmp_path}/asked; test $(wc -l < {tmp_path}/asked) = 2 && echo 5 || echo five")
    assert slurm_answer("squeue", read=int) == 5
    with pytest.raises(NoAnswer, match=r"SLURM does not answer: squeue says .*'five\\n'; try again"):
        slurm_answer("squeue", read=int)
    tool("squeue", "echo 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(NoAnswer, match=r"does not answer: Unable to contact slurm controller .*; try again"):
        slurm_answer("squeue")


def test_a_command_that_hangs_is_no_answer(tool, monkeypatch):
    """It is ended, and one line says so; it does not read what is typed for alignbench."""
    monkeypatch.setattr(shell, "LIMIT", 0.1)
    tool("squeue", "exec sleep 60")
    with pytest.raises(NoAnswer, match="SLURM does not answer: squeue takes more than 0 seconds; try again"):
        slurm_answer("squeue")
    monkeypatch.setattr(shell, "LIMIT", 60.0)
    tool("squeue", "cat; echo end")
    assert slurm_answer("squeue") == "end\n"


def test_a_machine_without_slurm_cannot_know(monkeypatch):
    """The line says where to ask."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoAnswer, match="unknown here: there is no squeue on this machine; ask on a login node"):
        slurm_answer("squeue")


@pytest.mark.parametrize(
    "variable",
    [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR"),
        *("TORCHELASTIC_RUN_ID", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"),
    ],
)
def test_a_surrounding_launcher_is_left(monkeypatch, variable):
    """Its variables would make this process wait for ranks that nobody starts; others stay."""
    monkeypatch.setenv(variable, "4")
    monkeypatch.setenv("RANKING", "1")
    leave_ranks()
    assert variable not in os.environ
    assert "RANKING" in os.environ

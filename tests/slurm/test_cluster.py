"""The test cluster behaves as the launcher expects of any SLURM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cluster as module
import pytest
from cluster import NODES, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

HERE = Path(__file__).parent
COUNT = "echo ${SLURM_RESTART_COUNT:-0} >> restarts-$SLURM_ARRAY_TASK_ID"


def test_a_task_waits_for_its_own_predecessor_and_falls_with_it(cluster, tmp_path):
    """With two linked arrays, the successor of a failed task is cancelled and the others run; sacct agrees."""
    options = ["--array=0-2%2", "-c1", "-o", "/dev/null", "-D", str(tmp_path)]
    first = cluster.sbatch(*options, script="test $SLURM_ARRAY_TASK_ID != 1 && touch first-$SLURM_ARRAY_TASK_ID")
    after = [f"--dependency=aftercorr:{first}", "--kill-on-invalid-dep=yes"]
    second = cluster.sbatch(*options, *after, script="test -e first-$SLURM_ARRAY_TASK_ID")
    expected = {first: ("COMPLETED", "FAILED", "COMPLETED"), second: ("COMPLETED", "CANCELLED", "COMPLETED")}
    for job, states in expected.items():
        wanted = {f"{job}_{task}": state for task, state in enumerate(states)}
        assert cluster.ended(job) == wanted
        cluster.wait(lambda job=job, wanted=wanted: cluster.sacct(job) == wanted)


def test_a_requeued_task_keeps_its_id_and_its_successor_waits(cluster, tmp_path):
    """It restarts, and the restart is counted; its successor runs after the second, successful end."""
    options = ["--array=0-0", "-c1", "-o", "/dev/null", "-D", str(tmp_path)]
    first = cluster.sbatch(*options, "--requeue", script=f"{COUNT}; [ $SLURM_RESTART_COUNT ] || exec sleep 600")
    after = [f"--dependency=aftercorr:{first}", "--kill-on-invalid-dep=yes"]
    second = cluster.sbatch(*options, *after, script="cp restarts-0 copy-0")
    cluster.wait((tmp_path / "restarts-0").exists)
    cluster.requeue(f"{first}_0")
    assert cluster.ended(second) == {f"{second}_0": "COMPLETED"}
    assert (tmp_path / "copy-0").read_text().split() == ["0", "1"]
    assert [row.restarts for row in cluster.squeue(first)] == [1]


def test_the_controller_and_a_node_go_and_come_back(cluster, tmp_path):
    """A restart of slurmctld or a drained node ends no job, and new jobs go to the other node."""
    job = cluster.sbatch("-c1", "-w", NODES[0], "-o", "/dev/null", "-D", str(tmp_path), script="touch on; sleep 3")
    cluster.wait((tmp_path / "on").exists)
    cluster.restart_controller()
    cluster.drain(NODES[0])
    try:
        other = cluster.sbatch("-c1", "-o", "/dev/null", script="true")
        assert cluster.ended(other) == {other: "COMPLETED"}
        assert [row.node for row in cluster.squeue(other)] == [NODES[1]]
        assert cluster.ended(job) == {job: "COMPLETED"}
    finally:
        cluster.resume(NODES[0])
    cluster.wait(lambda: cluster.nodes()[NODES[0]] == "idle")


def test_a_process_that_is_killed_is_a_failed_job(cluster, tmp_path):
    """A job whose Python is killed with -9 ends as FAILED."""
    job = cluster.sbatch("-c1", "-o", "/dev/null", script=f"srun {sys.executable} -c 'import time; time.sleep(600)'")
    cluster.kill_job_process(job)
    assert cluster.ended(job) == {job: "FAILED"}


PAUSED = """
import cluster, time
def pause(made):
    print(made.folder, flush=True)
    time.sleep(600)
cluster.Cluster._start_database = pause
with cluster.running():
    pass
"""


def test_nothing_of_a_cluster_outlives_the_process_that_started_it(cluster):
    """If it is killed with -9 in the middle of a start, no daemon and no folder stay behind."""
    process = subprocess.Popen([sys.executable, "-c", PAUSED], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert module.owned(folder)
    process.kill()
    process.wait()
    cluster.wait(lambda: not module.owned(folder) and not folder.exists(), timeout=30)


def test_a_start_that_fails_says_what_the_daemons_said(cluster, tmp_path, monkeypatch):
    """NoCluster has the logs, and nothing is left running."""
    monkeypatch.setattr(module, "ACCOUNTING", module.ACCOUNTING + "NoSuchLine=1\n")
    with pytest.raises(module.NoCluster, match=r"(?s)slurmdbd -D: ended with 1.*NoSuchLine"):
        Cluster(tmp_path / "bad").start()
    assert module.owned(tmp_path / "bad") == []
    assert not (tmp_path / "bad").exists()

"""Measure what alignbench and submitit add to SLURM: an array of 500 empty runs, against 500 times ``true``.

    python benchmarks/slurm_soak.py [--runs 500]

The benchmark starts a SLURM of its own (as root on Debian, see tests/slurm/cluster.py). A run's job is the real one,
``srun python -m alignbench.run.slurm_job`` on a copy of the code, with a task without stages: it reads the task and
exits without importing torch. Every job must succeed, exactly once. Results go to benchmarks/results/slurm-soak.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "slurm"))

from arguments import parse  # noqa: E402
from cluster import CPUS, NODES, Cluster, running  # noqa: E402  # beside the tests, not in the package

from alignbench.experiment import resources  # noqa: E402
from alignbench.launch import slurm  # noqa: E402
from alignbench.run.code_snapshot import take  # noqa: E402
from alignbench.store.files import write_json  # noqa: E402
from alignbench.store.stages import Stage  # noqa: E402


def ours(folder: Path, runs: int) -> str:
    """Submit empty runs as the launcher does; return the array's id."""
    cells: list[Any] = [None] * runs  # are not read
    array = slurm.Array(Stage.TRAIN, resources.Resources(), cells=cells, tasks=list(range(runs)))
    code = take(folder)
    jobs = folder / "jobs" / "soak"
    write_json(jobs / "0.json", {"tasks": {str(task): {"stages": []} for task in array.tasks}})
    slurm.submit(array, jobs, "soak", code)
    return array.job


def plain(cluster: Cluster, runs: int) -> str:
    """Submit as many jobs of one ``srun true`` each; return the array's id."""
    return cluster.sbatch(f"--array=0-{runs - 1}", "--output=/dev/null", script="srun true")


def measure(cluster: Cluster, name: str, job: str, runs: int, submitted: float) -> dict[str, Any]:
    """Wait for an array; return wall-clock seconds until its last job ended, and SLURM's seconds per job."""
    accepted = time.monotonic()
    waiting = ["squeue", "--noheader", "--array", "--jobs", f"{job},{job}"]
    while subprocess.run(waiting, capture_output=True, text=True, check=True).stdout.strip():
        time.sleep(1.0)
    ended = time.monotonic()
    words = ["sacct", "-X", "-P", "-n", "-D", "-j", job, "-o", "JobID,State,ElapsedRaw"]

    def accounted() -> list[list[str]] | None:
        rows = [line.split("|") for line in subprocess.check_output(words, text=True).splitlines()]
        return rows if len(rows) >= runs and all(row[1] != "RUNNING" for row in rows) else None

    rows = cluster.wait(accounted)
    states = sorted({state for _, state, _ in rows})
    if len(rows) != runs or states != ["COMPLETED"]:
        raise SystemExit(f"{name}: {len(rows)} jobs, {', '.join(states)}; {runs} COMPLETED were expected")
    return {
        "jobs": name,
        "runs": runs,
        "submit_seconds": accepted - submitted,
        "seconds": ended - submitted,
        "seconds_per_run": (ended - submitted) / runs,
        "job_seconds": sum(int(elapsed) for *_, elapsed in rows) / runs,
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), ":").partition(":")[2]
    return {
        "date": date.today().isoformat(),
        "cpu": model.strip() or platform.processor(),
        "cores": os.cpu_count(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "slurm": subprocess.check_output(["sbatch", "--version"], text=True).split()[-1],
        "at a time": f"{len(NODES) * CPUS} jobs",
    }


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [f"# {rows[0]['runs']} runs that do nothing, on SLURM", ""]
    lines += [*(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["| jobs | to submit | until all have ended | per run | of a job |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        figures = (row[key] for key in ("submit_seconds", "seconds", "seconds_per_run", "job_seconds"))
        lines.append(f"| {row['jobs']} | " + " | ".join(f"{figure:.2f} s" for figure in figures) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    arguments = parse(parser)
    runs = arguments.runs
    with running() as cluster, tempfile.TemporaryDirectory() as folder:
        about, rows = machine(), []
        for name in ("srun true", "alignbench"):
            start = time.monotonic()
            job = plain(cluster, runs) if name == "srun true" else ours(Path(folder), runs)
            rows.append(measure(cluster, name, job, runs, start))
            print(json.dumps(rows[-1]), flush=True)
        pickles = list(Path(folder).rglob("*.pkl"))
    if pickles:
        raise SystemExit(f"pickles in the store: {pickles}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "slurm-soak.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (arguments.out / "slurm-soak.md").write_text(table(about, rows))
    print(table(about, rows))


if __name__ == "__main__":
    main()

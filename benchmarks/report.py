"""Time a report on 1,000 runs and 1,000,000 scores, against pandas reading the same numbers.

    python benchmarks/report.py        makes the store in a temporary folder, measures, writes benchmarks/results

The store has 111 methods with nine training seeds and a base, five evaluators and 200 prompts; the same scores are also
written as CSV and JSONL, file by file. Every measurement is a process with one thread that reads files from the page
cache: `alignbench report --format md` (states, costs, provenance, intervals, corrections, every table), the first after
new scores (which decodes every file) and the next (which reads the stored tables); and a script that one would write by
hand: read every file, concatenate, average by method and metric. Seconds are CPU seconds, which depend less on other
load than wall-clock seconds. Ratios are taken within a round; medians over rounds are shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from arguments import parse

from alignbench.reporting.analysis.results import COSTS
from alignbench.store import files
from alignbench.store.manifest import UNTRAINED

METHODS, SEEDS, PROMPTS = 111, 9, 200
EVALUATORS = (
    ("hpsv2", "train"),
    ("pickscore", "held-out"),
    ("imagereward", "held-out"),
    ("clipscore", "held-out"),
    ("geneval", "check"),
)
BY_HAND = """\
import glob, sys, pandas as pd
read = {"csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True)}[sys.argv[2]]
frames = [read(path).assign(run=path) for path in sorted(glob.glob(f"{sys.argv[1]}/*/*.{sys.argv[2]}"))]
frame = pd.concat(frames)
print(frame.groupby(["label", "metric"])["score"].mean().unstack())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", metavar="DIR", help="make the store in DIR, or use the one in it")
    arguments = parse(parser, free=["keep"])
    root = Path(arguments.keep or tempfile.mkdtemp())
    try:
        if not (root / "store").exists():
            make(root)
        show(measure(root, arguments.rounds), arguments.out)
    finally:
        if not arguments.keep:
            shutil.rmtree(root)


def make(root: Path) -> None:
    """Write the store, and the same scores in ``csv`` and ``jsonl``."""
    rng = np.random.default_rng(0)
    prompts = pd.DataFrame(
        {
            "prompt_id": [f"p{i:04d}" for i in range(PROMPTS)],
            "tag": [f"task{i % 6}" for i in range(PROMPTS)],
            "index": 0,
        }
    )
    common = {name: rng.normal(size=PROMPTS) for name, _ in EVALUATORS}
    runs = []
    for label in ["base", *(f"method {i:03d}" for i in range(METHODS))]:
        for seed in [UNTRAINED] if label == "base" else range(SEEDS):
            run = planned(label, seed)
            runs.append(run)
            finish(root / "store", run)
            for score in run["scores"]:
                name = score["evaluator"]
                frame = prompts.assign(**{name: common[name] + rng.normal(size=PROMPTS)}, ok=True, error="")
                files.write_frame(root / "store" / score["file"], frame)
                plain = frame.rename(columns={name: "score"}).assign(label=label, seed=seed, metric=name)
                for kind in ("csv", "jsonl"):
                    (root / kind / run["images"]).mkdir(parents=True, exist_ok=True)
                plain.to_csv(root / "csv" / run["images"] / f"{name}.csv", index=False)
                plain.to_json(root / "jsonl" / run["images"] / f"{name}.jsonl", orient="records", lines=True)
    protocol = {
        "prompts": "made up",
        "images_per_prompt": 1,
        "steps": 50,
        "guidance": 3.5,
        "weights": "ema",
        "size": 720,
    }
    about = {"name": "bench", "sweep": "bench", "protocol": protocol, "training_evaluator": "hpsv2", "prompts": PROMPTS}
    files.write_json(
        root / "store/sweeps/bench.json",
        {**about, "cases": list(dict.fromkeys(r["label"] for r in runs)), "runs": runs},
    )


def planned(label: str, seed: int) -> dict:
    """Return one run of a manifest."""
    id = f"{label.replace(' ', '-')}-{seed}"
    settings = {
        "backend": {"name": "flux", "model": "made up"},
        "method": {"name": label},
        "training": {"batch": 64, "seed": max(seed, 0)},
    }
    scores = [
        {
            "evaluator": name,
            "version": "1",
            "role": role,
            "file": f"scores/{id}/{name}@1-00000000.parquet",
            "metrics": [{"name": name, "unit": "", "higher_is_better": True, "by_task": name == "geneval"}],
        }
        for name, role in EVALUATORS
    ]
    return {
        "id": id,
        "label": label,
        "method": label,
        "seed": seed,
        "settings": settings,
        "notes": [],
        "images": id,
        "scores": scores,
    }


def finish(root: Path, run: dict) -> None:
    """Write the files of a finished run, apart from scores."""
    folder = root / "runs" / run["id"]
    files.write_json(folder / "status.json", {"state": "done"})
    origin = {
        "alignbench": "0.1.0",
        "revision": None,
        "python": "3.11",
        "packages": {"torch": "2.11"},
        "machine": "one",
    }
    files.write_json(folder / "provenance.json", {**origin, "devices": [], "processes": 1, "threads": 1})
    files.write_frame(
        root / "images" / run["images"] / "manifest.parquet",
        pd.DataFrame({"prompt_id": ["p0000"], "index": [0], "file": ["0.png"], "tag": ["task0"], "text": [""]}),
    )
    if run["seed"] != UNTRAINED:
        records = {name: np.arange(300.0) for name in COSTS} | {
            "update": np.arange(300),
            "reward_mean": np.linspace(0, 1, 300),
        }
        files.write_frame(folder / "train.parquet", pd.DataFrame(records))
        files.write(folder / "weights.safetensors", b"")


def measure(root: Path, rounds: int) -> dict:
    """Return medians of seconds, megabytes and ratios. Every round runs all commands in turn."""
    bin = Path(sys.executable).parent
    words = ["bench", "--store", root / "store", "--format", "md", "--out", root / "out"]
    commands = {
        "alignbench report, the first": [bin / "alignbench", "report", *words],
        "alignbench report": [bin / "alignbench", "report", *words],
        "pandas, CSV": [sys.executable, "-c", BY_HAND, root / "csv", "csv"],
        "pandas, JSONL": [sys.executable, "-c", BY_HAND, root / "jsonl", "jsonl"],
        "alignbench --help": [bin / "alignbench", "--help"],
    }
    rounds_of: dict[str, list] = {name: [] for name in commands}
    for i in range(rounds + 1):
        for name, command in commands.items():
            if name.endswith("the first"):
                shutil.rmtree(root / "store" / "tables", ignore_errors=True)
            used = run(list(map(str, command)))
            if i:  # the first round fills the page cache
                rounds_of[name].append(used)
    medians = {
        name: {key: statistics.median(used[key] for used in uses) for key in ("seconds", "cpu", "mb")}
        for name, uses in rounds_of.items()
    }
    for name in ("pandas, CSV", "pandas, JSONL"):
        ratios = [theirs["cpu"] / ours["cpu"] for theirs, ours in zip(rounds_of[name], rounds_of["alignbench report"])]
        medians[name]["times as long"] = statistics.median(ratios)
    return {
        "runs": METHODS * SEEDS + 1,
        "scores": (METHODS * SEEDS + 1) * PROMPTS * len(EVALUATORS),
        "rounds": rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "measured": medians,
    }


WATCH = """\
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"""


def run(command: list[str]) -> dict[str, float]:
    """Return wall-clock and CPU seconds and peak resident memory (MB) of one process, its start included."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_IO_THREADS"), "1")
    start = time.perf_counter()
    watched = [sys.executable, "-c", WATCH, *command]
    done = subprocess.run(watched, env=os.environ | threads, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    cpu, mb = map(float, done.stdout.split())
    return {"seconds": seconds, "cpu": cpu, "mb": mb}


def show(results: dict, out: Path) -> None:
    """Print the results, and write report.json and .md."""
    rows = []
    for name, used in results["measured"].items():
        ratio = f"{used['times as long']:.1f}" if "times as long" in used else ""
        rows.append(f"| {name} | {used['cpu']:.2f} | {used['seconds']:.2f} | {used['mb']:.0f} | {ratio} |")
    head = f"{results['runs']:,} runs, {results['scores']:,} scores; medians of {results['rounds']} rounds"
    head += f"; {results['machine']}.\n"
    lines = [
        "# A report against pandas",
        "",
        head,
        "| command | CPU, s | clock, s | peak memory, MB | CPU, times ours |",
    ]
    text = "\n".join([*lines, "| --- | --: | --: | --: | --: |", *rows]) + "\n"
    print(text)
    files.write(out / "report.md", text)
    files.write_json(out / "report.json", results)


if __name__ == "__main__":
    main()

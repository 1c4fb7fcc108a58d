"""Made-up results with known effects, for tests of reports."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
from msgspec import structs
from PIL import Image, ImageDraw

from alignbench.reporting import report
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.analysis.results import COSTS, Results
from alignbench.store import files
from alignbench.store.manifest import UNTRAINED, Manifest, write_manifest

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
LABELS = ("base", "ReFL", "DRaFT-LV", "DRTune", "LeapAlign", "DanceGRPO")
METRICS = (  # evaluator, role, name, unit, by task, level, spread
    ("geneval", "check", "geneval", "fraction", True, 0.6, 0.1),
    ("geneval", "check", "geneval_strict", "fraction", True, 0.5, 0.1),
    ("hpsv2", "train", "hpsv2.1", "cosine", False, 0.28, 0.02),
    ("pickscore", "held-out", "pickscore", "logit", False, 21.0, 1.0),
)
GAINS = {"ReFL": (1, -1), "DRaFT-LV": (0.5, 0.5), "DRTune": (0.5, 0.5), "LeapAlign": (1.5, 1.5), "DanceGRPO": (0, 0)}


def manifest(seeds=(0, 1), labels=LABELS, name="made_up"):
    entries = {}
    for evaluator, role, metric, unit, by_task, *_ in METRICS:
        entry = {"evaluator": evaluator, "version": "1", "role": role, "file": "", "metrics": []}
        about = {"name": metric, "unit": unit, "higher_is_better": True, "by_task": by_task}
        entries.setdefault(evaluator, entry)["metrics"].append(about)
    runs = []
    for label in labels:
        for seed in [UNTRAINED] if label == "base" else seeds:
            notes = [{"set": {"training.batch": 16}, "reason": "four groups of four"}] if label == "DanceGRPO" else []
            run = {"id": f"{label}-{seed}".replace("\0", ""), "label": label, "method": label.lower(), "seed": seed}
            shared = {"backend": {"name": "flux", "model": "shapes", "revision": None}}
            training = {"batch": 16, "budget": {"images": 480, "nfe": None}, "seed": max(seed, 0)}
            run["settings"] = {**shared, "method": {"name": label.lower(), "steps": 8}, "training": training}
            runs.append({**run, "notes": notes, "images": f"{label}{seed}", "scores": list(entries.values())})
    protocol = {
        "prompts": "shapes/test",
        "images_per_prompt": 2,
        "steps": 8,
        "guidance": 3.5,
        "weights": "ema",
        "size": 32,
    }
    about = {"name": name, "sweep": f"sweeps/{name}.yaml", "protocol": protocol}
    plain = {**about, "training_evaluator": "hpsv2", "prompts": 60, "cases": list(labels), "runs": runs}
    return msgspec.convert(plain, Manifest)


def scores(plan, prompts=60, images=2):
    """Return scores with a common part for all methods, and gains (training reward, others) of GAINS, in spreads."""
    rng = np.random.default_rng(0)
    frames = []
    for evaluator, role, metric, _, _, level, spread in METRICS:
        common = level + spread * rng.normal(size=(prompts, images))
        for run in plan.runs:
            gain = GAINS.get(run.label, (0, 0))[role != "train"] * spread
            noise = 0 if not run.trained else rng.normal(size=(prompts, images)) * spread
            prompt, index = np.indices((prompts, images)).reshape(2, -1)
            columns = {"label": run.label, "method": run.method, "seed": run.seed, "run": run.id}
            columns |= {"evaluator": evaluator, "metric": metric, "prompt_id": [f"p{i:04d}" for i in prompt]}
            columns |= {"tag": [TASKS[i % 6] for i in prompt], "index": index, "score": (common + gain + noise).ravel()}
            frames.append(pd.DataFrame({**columns, "ok": True}))
    return pd.concat(frames, ignore_index=True)


def costs(plan):
    rows = []
    for run in plan.runs:
        row = {"label": run.label, "method": run.method, "seed": run.seed}
        row |= {"run": run.id, "state": "done", "reason": ""}
        work = int(run.trained)
        row |= {"updates": 30 * work, "images": 480 * work, "nfe_forward": 9600 * work, "nfe_grad": 960 * work}
        row |= {"decodes": 480 * work, "reward_calls": 480 * work, "seconds": 41.0 * work}
        first, last = (0.25, 0.28) if work else (np.nan, np.nan)
        rows.append(row | {"peak_memory_bytes": 2**29 * work, "reward_first": first, "reward_last": last})
    return pd.DataFrame(rows)


def results(folder=None, **options):
    plan = manifest(**options)
    return stored(folder, plan, scores(plan), costs(plan))


def stored(folder, plan, scores, costs):
    """Return results with these scores and costs, whatever ``folder`` contains."""
    made = Results(folder or "absent", plan)
    made.scores, made.costs = scores, costs
    return made


def draw_images(root, plan, prompts=60):
    """Write the image sets of the store: discs with a colour for each run and prompt."""
    for number, run in enumerate(plan.runs):
        folder = root / "images" / run.images
        folder.mkdir(parents=True)
        rows = []
        for prompt in range(prompts):
            text = (
                f"a photo of a {['red circle', 'blue square above a yellow triangle', 'four green stars'][prompt % 3]}"
            )
            row = {
                "prompt_id": f"p{prompt:04d}",
                "index": 0,
                "tag": TASKS[prompt % 6],
                "text": text,
                "file": f"{prompt}.png",
            }
            rows.append(row)
            image = Image.new("RGB", (32, 32), (30, 30, 30))
            color = tuple(np.random.default_rng((number, prompt)).integers(60, 255, 3).tolist())
            ImageDraw.Draw(image).ellipse((6, 6, 6 + 2 * (number % 10) + 4, 24), fill=color)
            image.save(folder / f"{prompt}.png")
        pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")


def page(results):
    """Return the report in Markdown."""
    analysis = analyse(results.manifest, results.scores)
    return report.markdown(report.sections(results.manifest, results.costs, analysis))


def section(text, heading):
    return text.split(f"\n## {heading}")[1].split("\n## ")[0]


def row_of(table, label):
    return next(line for line in table.splitlines() if line.startswith(f"| {label}"))


def with_runs(plan, change):
    """Return the manifest with the fields ``change(run)`` set in each of its runs."""
    return structs.replace(plan, runs=[structs.replace(run, **change(run)) for run in plan.runs])


def with_files(plan, file="scores/{images}/{evaluator}.parquet"):
    """Return the manifest with a file and its evaluator's settings for every score."""

    def filed(run, score):
        own = {"file": file.format(images=run.images, evaluator=score.evaluator), "settings": {"name": score.evaluator}}
        return structs.replace(score, **own)

    return with_runs(plan, lambda run: {"scores": [filed(run, score) for score in run.scores]})


def on_disk(root: Path, given: Results) -> Manifest:
    """Write a store with what ``given`` has, and return its manifest."""
    plan, frame = with_files(given.manifest), given.scores
    draw_images(root, plan, frame["prompt_id"].nunique())
    for run in plan.runs:
        mine = frame[(frame["run"] == run.id)]
        for score in run.scores:
            part = mine[mine["evaluator"] == score.evaluator]
            wide = part.pivot(index=["prompt_id", "tag", "index"], columns="metric", values="score").reset_index()
            files.write_frame(root / score.file, wide.assign(ok=True, error=""))
        folder = root / "runs" / run.id
        files.write_json(folder / "status.json", {"state": "done"})
        if run.trained:
            row = given.costs[given.costs["run"] == run.id].iloc[0]
            record = {name: [row[name]] for name in COSTS} | {"update": [29], "reward_mean": [0.25]}
            files.write_frame(folder / "train.parquet", pd.DataFrame(record))
            files.write(folder / "weights.safetensors", b"")
        origin = {"alignbench": "0.1.0", "revision": None, "python": "3.11.9", "packages": {"torch": "2.15"}}
        origin |= {"machine": "Linux x86_64, 2 cores", "devices": [], "processes": 1, "threads": 1}
        files.write_json(folder / "provenance.json", origin)
    write_manifest(root / "sweeps" / f"{plan.name}-1.json", plan)
    return plan

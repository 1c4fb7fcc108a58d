"""A made-up store with milestones, whose methods have known gains over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from alignbench.reporting.analysis.results import Results
from alignbench.store import files
from alignbench.store.manifest import Manifest

UPDATES = (10, 20, 30, 40, 50, 60)  # the last is the end
TASKS = ("single_object", "two_object", "counting")
METHODS = ("Base", "ReFL", "DRaFT-LV", "DRTune", "LeapAlign", "DanceGRPO")
METRICS = (  # evaluator, role, name, unit, higher is better, by task, level, spread
    ("hpsv2", "train", "hpsv2.1", "cosine", True, False, 0.28, 0.02),
    ("pickscore", "held-out", "pickscore", "logit", True, False, 21.0, 1.0),
    ("clip", "held-out", "diversity", "squared distance", True, False, 0.4, 0.05),
    ("geneval", "check", "geneval", "fraction", True, True, 0.6, 0.1),
    ("clip", "held-out", "base_distance", "squared distance", None, False, 0.0, 0.02),
    ("picture_stats", "check", "grid_energy", "contrast", None, False, 0.0, 0.1),
    ("picture_stats", "check", "saturation", "fraction", None, False, 0.4, 0.05),
)
# at the end, in spreads: training reward, other scores, and the share of training after which the others fall
GAINS = {
    "ReFL": (2.0, 0.8, 0.5),
    "DRaFT-LV": (1.0, 0.6, None),
    "DRTune": (0.8, 0.5, None),
    "LeapAlign": (1.6, 1.5, None),
    "DanceGRPO": (0.4, 0.3, None),
}
NFE = {"ReFL": (12, 1), "DRaFT-LV": (24, 1), "DRTune": (20, 5), "LeapAlign": (23, 2), "DanceGRPO": (16, 9)}


def gain(label: str, metric: str, update: float) -> float:
    """Return a method's gain over the base model after ``update`` updates, in spreads."""
    if label == "Base" or update == 0:
        return 0.0
    reward, other, fold = GAINS[label]
    share = update / UPDATES[-1]
    if metric == "hpsv2.1":
        return reward * share
    if metric in ("base_distance", "grid_energy", "saturation"):
        return 2 * share * reward
    if metric == "diversity":
        return -reward * share if fold is not None else -0.2 * share
    return other * share if fold is None or share <= fold else other * (2 * fold - share)


def made(
    root: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    prompts: int = 48,
    images: int = 2,
    milestones: bool = True,
    noise: float = 0.3,
    labels: tuple[str, ...] = METHODS,
) -> Results:
    """Write the store and return its results. ``noise``: spread of an image's score around the base model's."""
    plan: dict[str, Any] = {"name": "made_up", "sweep": "made_up.yaml", "cases": list(labels), "runs": []}
    plan |= {"protocol": {"images_per_prompt": images, "steps": 8}, "prompts": prompts, "training_evaluator": "hpsv2"}
    common = np.random.default_rng(0).normal(size=(len(METRICS), prompts, images))
    for label in labels:
        for seed in (-1,) if label == "Base" else seeds:
            rng = np.random.default_rng([METHODS.index(label), seed + 1])
            seed_effect = 0 if seed == -1 else 0.1 * rng.normal(size=len(METRICS))
            steps = [*UPDATES] if label != "Base" else [0]
            parts = []
            for update in steps if milestones or label == "Base" else steps[-1:]:
                name = f"{label}{seed}-{update}"
                parts.append({"update": update, "images": name, "scores": _scores(name)})
                values = common + (0 if seed == -1 else noise * rng.normal(size=common.shape))
                for n, (_, _, metric, *_) in enumerate(METRICS):
                    values[n] += gain(label, metric, update) + (seed_effect[n] if label != "Base" else 0)
                _write(root, parts[-1]["scores"], values)
            run = {"id": f"{label}-{seed}", "label": label, "method": label.lower(), "seed": seed, "notes": []}
            run |= {"settings": {}, "images": parts[-1]["images"], "scores": parts[-1]["scores"]}
            plan["runs"].append(run | ({"milestones": parts[:-1]} if parts[:-1] else {}))
            _train(root, label, seed, rng)
    return Results(root, msgspec.convert(plan, Manifest))


def _scores(images: str) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for evaluator, role, name, unit, better, by_task, *_ in METRICS:
        file = f"scores/{images}/{evaluator}@1-x.parquet"
        entry = {"evaluator": evaluator, "version": "1", "role": role, "file": file, "metrics": []}
        about = {"name": name, "unit": unit, "higher_is_better": better, "by_task": by_task}
        entries.setdefault(evaluator, entry)["metrics"].append(about)
    return list(entries.values())


def _write(root: Path, entries: list[dict[str, Any]], values: np.ndarray) -> None:
    place = {metric: n for n, (_, _, metric, *_) in enumerate(METRICS)}
    prompt, index = np.indices(values.shape[1:]).reshape(2, -1)
    about = {
        "prompt_id": [f"p{i:04d}" for i in prompt],
        "tag": [TASKS[i % 3] for i in prompt],
        "index": index,
        "ok": True,
    }
    for entry in entries:
        columns = dict(about)
        for metric in entry["metrics"]:
            n = place[metric["name"]]
            columns[metric["name"]] = (METRICS[n][6] + METRICS[n][7] * values[n]).ravel()
        files.write_frame(root / entry["file"], pd.DataFrame(columns))


def _train(root: Path, label: str, seed: int, rng: np.random.Generator) -> None:
    folder = root / "runs" / f"{label}-{seed}"
    files.write_json(folder / "status.json", {"state": "done", "updates": UPDATES[-1]})
    if seed == -1:
        return
    update = np.arange(UPDATES[-1])
    forward, grad = NFE[label]
    frame = pd.DataFrame({"update": update, "images": (update + 1) * 16, "nfe_recomputed": 0, "decodes": update + 1})
    frame["nfe_forward"], frame["nfe_grad"] = frame["images"] * forward, frame["images"] * grad
    frame["seconds"] = (update + 1) * (forward + 3 * grad) / 10
    frame["reward_calls"], frame["peak_memory_bytes"] = frame["images"], 2**29
    frame["drift"] = 0.002 * GAINS[label][0] * (update + 1)
    rewards = [gain(label, "hpsv2.1", i + 1) for i in update]
    frame["reward_mean"] = 0.28 + 0.02 * (np.array(rewards) + 0.3 * rng.normal(size=len(update)))
    files.write_frame(folder / "train.parquet", frame)
    files.write_json(
        folder / "provenance.json",
        {
            "alignbench": "0.1.0",
            "revision": None,
            "python": "3.11",
            "packages": {},
            "machine": "m",
            "devices": [],
            "processes": 2,
            "threads": 1,
        },
    )
    files.write(folder / "weights.safetensors", b"")

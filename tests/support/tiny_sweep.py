"""A sweep of the packaged model that takes seconds, and helpers to run it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignbench.config import merge

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow so small a model down
MEASURED = ["seconds", "peak_memory_bytes"]  # columns that may differ between equal runs
PLUGIN = str(Path(__file__).with_name("bright_plugin.py"))
SWEEP: dict[str, Any] = {
    "schema": 1,
    "name": "tiny",
    "base": {
        "backend": {"name": "flux", "model": "shapes", "size": 32, "max_sequence_length": 16, "dtype": "float32"},
        "reward": {"evaluator": {"name": "bright"}},
        "prompts": "shapes/train",
        "training": {"budget": {"images": 8}, "batch": 2, "checkpoint_every": 1, "optimizer": {"lr": 1.0e-3}},
    },
    "grid": {"training.seed": [0, 1]},
    "cases": [
        {"label": "Base", "method": {"name": "base"}},
        {"label": "Last", "method": {"name": "last"}},
    ],
    "evaluation": {
        "protocol": {"prompts": "shapes/test", "images_per_prompt": 1, "steps": 2, "guidance": 3.5, "size": 32},
        "evaluators": [{"name": "bright"}, {"name": "geneval", "detector": "shapes"}],
        "limit": 4,
    },
}


def sweep_file(folder: Path, changes: dict[str, Any] | None = None, name: str = "tiny.yaml") -> str:
    """Write the tiny sweep with ``changes`` merged into it, and return its path."""
    path = folder / name
    path.write_text(yaml.safe_dump(merge(SWEEP, changes or {}), sort_keys=False))
    return str(path)


def alignbench(*words: str, store: Path | None = None, plugin: bool = True) -> int:
    """Run the command line in this process, with ``store`` and the test plug-in; return the exit code."""
    from alignbench.cli import main

    verb, *rest = words
    options = [*(["--store", str(store)] if store else []), *(["--plugin", PLUGIN] if plugin else [])]
    return main([verb, *rest, *options])


def debug_sweep(path: str, store: Path, *words: str) -> int:
    """Run `alignbench sweep` in this process; return the exit code."""
    return alignbench("sweep", path, *words, "--launcher", "debug", store=store)


def tables(store: Path, name: str = "tiny") -> Sequence[Any]:
    """Return the tables of scores and costs of the latest sweep in ``store``."""
    from alignbench.reporting.analysis.results import Results
    from alignbench.store.artefacts import Store
    from alignbench.store.manifest import read_manifest

    results = Results(store, read_manifest(Store(store).manifests()[0]))
    return results.scores, results.costs


def same(left: Path, right: Path) -> None:
    """Assert that two stores have bitwise the same weights, records, images and scores."""
    import pandas as pd
    from safetensors.numpy import load_file

    for path in sorted(left.glob("runs/*/weights*.safetensors")):
        a, b = load_file(path), load_file(right / path.relative_to(left))
        assert a.keys() == b.keys()
        assert all((a[name] == b[name]).all() for name in a)
    for path in sorted(left.glob("runs/*/train.parquet")):
        frames = [pd.read_parquet(p).drop(columns=MEASURED) for p in (path, right / path.relative_to(left))]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    for pattern in ("images/*/manifest.parquet", "scores/*/*.parquet"):
        for path in sorted(left.glob(pattern)):
            pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(right / path.relative_to(left)))

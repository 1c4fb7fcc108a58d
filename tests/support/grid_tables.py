"""Made-up results of a sweep over hyperparameters, for tests of reports."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from msgspec import structs
from support import report_tables

from alignbench.store.manifest import Manifest


def swept(grid: dict[str, list[float]], seeds: tuple[int, ...] = (0, 1)) -> tuple[Manifest, pd.DataFrame]:
    """Return the manifest and the scores of one method at every point of a grid over its settings.

    Scores rise with the logarithm of the first number up to 1, and fall beyond.
    """
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    names = {", ".join(["LeapAlign", *(f"{name}={value}" for name, value in point.items())]): point for point in points}
    plan = report_tables.manifest(seeds=seeds, labels=("base", *names))

    def settings(run):
        method = {"name": "leapalign", "steps": 8, **names.get(run.label, {})}
        return {"method": "leapalign", "settings": {**run.settings, "method": method}}

    plan = report_tables.with_runs(plan, settings)
    scores = report_tables.scores(plan)
    first = {label: next(iter(point.values())) for label, point in names.items()}
    for evaluator, _, metric, *_, spread in report_tables.METRICS:
        for label, value in first.items():
            rows = (scores["label"] == label) & (scores["metric"] == metric) & (scores["evaluator"] == evaluator)
            scores.loc[rows, "score"] += spread * (1 - abs(np.log10(value)))
    return structs.replace(plan, cases=["base", *names]), scores

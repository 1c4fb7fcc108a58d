"""Tables of scores from ``alignbench score``: one row per image, and means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError
from alignbench.plugins import Registry
from alignbench.reporting.analysis.stats import mean_interval
from alignbench.reporting.text.table import Cell, Column, Table, interval

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


def tidy(scored: Sequence[tuple[Any, pd.DataFrame]]) -> pd.DataFrame:
    """Return one row per image and metric."""
    import pandas as pd

    frames = []
    for evaluator, frame in scored:
        about = [name for name in ("file", "prompt_id", "tag", "index", "ok", "error", "raw") if name in frame]
        for metric in evaluator.metrics:
            part = frame[about].assign(evaluator=evaluator.name, metric=metric.name, score=frame[metric.name])
            frames.append(part)
    return pd.concat(frames, ignore_index=True)


def save(scored: Sequence[tuple[Any, pd.DataFrame]], out: Path, plugins: Sequence[str] = ()) -> list[Path]:
    """Write the tidy table as .csv or .parquet, and a .json with the evaluators' settings, versions and weight hashes.

    Return both paths. UserError for any other ending.
    """
    from alignbench.experiment.ids import evaluator_content
    from alignbench.store.files import write, write_frame, write_json

    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: choose a name that ends in .csv or .parquet")
    table, about = tidy(scored), out.with_suffix(".json")
    write(out, table.to_csv(index=False)) if out.suffix == ".csv" else write_frame(out, table)
    registry = Registry(plugins)
    write_json(about, {evaluator.name: evaluator_content(evaluator, registry) for evaluator, _ in scored})
    return [out, about]


def summary(scored: Sequence[tuple[Any, pd.DataFrame]]) -> Table:
    """Return a row per metric: the mean with its interval over prompts, and the number of failed images."""
    columns = [
        Column("metric"),
        Column("mean [95 % interval]"),
        Column("images"),
        Column("prompts"),
        Column("failed"),
    ]
    rows = []
    for evaluator, frame in scored:
        for metric in evaluator.metrics:
            values, tags = cube(frame, metric.name)
            mean = mean_interval(values, tags if metric.by_task else None)
            shown = interval(mean.mean, mean.lo, mean.hi, 4)
            counts = [len(frame), frame["prompt_id"].nunique(), int((~frame["ok"]).sum())]
            rows.append([Cell(f"{metric.name}, {metric.unit}"), Cell(shown), *(Cell(str(n)) for n in counts)])
    return Table(columns, rows)


def cube(frame: pd.DataFrame, metric: str) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return (P, I, 1) scores, nan where missing or failed, and (P,) tasks."""
    wide = frame.assign(score=frame[metric].where(frame["ok"])).pivot(
        index="prompt_id", columns="index", values="score"
    )
    tags = frame.drop_duplicates("prompt_id").set_index("prompt_id")["tag"].reindex(wide.index)
    return wide.to_numpy(float)[..., None], tags.to_numpy(str)

"""Tables of the scores of any images: one row per image, and means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError
from alignbench.plugins import Registry
from alignbench.reporting.analysis.stats import mean_interval
from alignbench.reporting.table import Cell, Column, Table, interval

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


def tidy(scored: Sequence[tuple[Any, pd.DataFrame]]) -> pd.DataFrame:
    """One row per picture and metric."""
    import pandas as pd

    frames = []
    for evaluator, frame in scored:
        about = [name for name in ("file", "prompt_id", "tag", "index", "ok", "error", "raw") if name in frame]
        for metric in evaluator.metrics:
            part = frame[about].assign(evaluator=evaluator.name, metric=metric.name, score=frame[metric.name])
            frames.append(part)
    return pd.concat(frames, ignore_index=True)


def save(scored: Sequence[tuple[Any, pd.DataFrame]], out: Path, plugins: Sequence[str] = ()) -> list[Path]:
    """The tidy table as .csv or .parquet, and beside it what made it: settings, versions and weight files' hash."""
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
    """A row per metric: mean with its interval over prompts, and how many pictures could not be scored."""
    columns = [
        Column("metric"),
        Column("mean [95 % interval]"),
        Column("pictures"),
        Column("prompts"),
        Column("failed"),
    ]
    rows = []
    for evaluator, frame in scored:
        for metric in evaluator.metrics:
            values, tags = cube(frame, metric.name)
            found = mean_interval(values, tags if metric.by_task else None)
            shown = interval(found.mean, found.lo, found.hi, 4)
            counts = [len(frame), frame["prompt_id"].nunique(), int((~frame["ok"]).sum())]
            rows.append([Cell(f"{metric.name}, {metric.unit}"), Cell(shown), *(Cell(str(n)) for n in counts)])
    return Table(columns, rows)


def cube(frame: pd.DataFrame, metric: str) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """(P, I, 1) scores, nan where there is none, and (P,) tasks."""
    wide = frame.assign(score=frame[metric].where(frame["ok"])).pivot(
        index="prompt_id", columns="index", values="score"
    )
    tags = frame.drop_duplicates("prompt_id").set_index("prompt_id")["tag"].reindex(wide.index)
    return wide.to_numpy(float)[..., None], tags.to_numpy(str)

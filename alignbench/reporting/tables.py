"""Tables of the report: results, paired changes, scores by task, and the tidy CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from alignbench.reporting import improvement_section
from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Analysis, Comparison, Measure, better, worse
from alignbench.reporting.text.table import DECIMALS, Cell, Column, Table, interval, number
from alignbench.store.manifest import Manifest

MIB = 2**20
DAGGER, DOUBLE_DAGGER = "†", "‡"
COSTS = (  # (column of the costs frame, title, unit, divisor, decimals)
    ("nfe_forward", "NFE without gradient", "", 1, 0),
    ("nfe_grad", "NFE with gradient", "", 1, 0),
    ("images", "images", "", 1, 0),
    ("reward_calls", "reward calls", "", 1, 0),
    ("decodes", "decodes", "", 1, 0),
    ("seconds", "time", "s", 1, 0),
    ("peak_memory_bytes", "peak memory", "MiB", MIB, 0),
)
NO_COSTS = [Cell()] * len(COSTS)


def title(measure: Measure) -> str:
    """Return the measure's name, marked if it is a mean of task means."""
    return measure.name + (", by task" if measure.by_task else "")


def main_table(analysis: Analysis, costs: pd.DataFrame, marked: Mapping[str, str] | None = None) -> Table:
    """Return the main table: training reward, held-out scores, checks and costs, one row per method.

    ``marked``: label -> footnote marks.
    """
    columns = [Column("method"), *map(_column, analysis.measures)]
    columns += [Column(name, unit, decimals=decimals) for _, name, unit, _, decimals in COSTS]
    rows, spent = [], _cost_cells(costs)
    for label in analysis.labels:
        cells = [_mean_cell(analysis, measure, label) for measure in analysis.measures]
        fell = f" **({what})**" if (what := flag(analysis, label)) else ""
        noted = (marked or {}).get(label, "") + fell + _seeds_mark(analysis, label)
        rows.append([Cell(label, mark=noted), *cells, *spent.get(label, NO_COSTS)])
    return Table(columns, rows)


def marks(manifest: Manifest) -> dict[str, str]:
    """Return label -> footnote marks, for rows that have any."""
    daggers = dict.fromkeys(hybrid(manifest), f" {DAGGER}")
    return daggers | {label: daggers.get(label, "") + f" {DOUBLE_DAGGER}" for label in eight_bit(manifest)}


def eight_bit(manifest: Manifest) -> list[str]:
    """Return the labels of rows trained with 8-bit AdamW moments."""
    labels = dict[str, None]()
    for run in manifest.runs:
        optimizer = run.settings.get("training", {}).get("optimizer", {})
        if run.trained and optimizer.get("moments") == "8bit":
            labels[run.label] = None
    return [*labels]


def hybrid(manifest: Manifest) -> dict[str, str]:
    """Return label -> ``the first 30 of 50 steps``, for rows whose last steps are the base model's."""
    tuned = [(run.label, run.protocol.get("tuned_steps"), run.protocol["steps"]) for run in manifest.runs]
    return {label: f"the first {own} of {steps} steps" for label, own, steps in tuned if own not in (None, steps)}


def _seeds_mark(analysis: Analysis, label: str) -> str:
    """Return `` (2 of 3 seeds)`` if the row has fewer seeds than planned; a measure without scores has its dash."""
    planned = len(analysis.seeds[label])
    counts = [found[label].seeds for found in analysis.means.values()]
    used = min(filter(None, counts), default=0 if counts else planned)
    return "" if used == planned else f" ({used} of {planned} seeds)"


def _column(measure: Measure) -> Column:
    decimals = DECIMALS.get(measure.unit, 3)
    return Column(title(measure), measure.unit, measure.higher_is_better, measure.role, decimals)


def _mean_cell(analysis: Analysis, measure: Measure, label: str) -> Cell:
    return estimate_cell(analysis.means[measure][label], measure)._replace(bold=label == analysis.bold(measure))


def estimate_cell(found: stats.MeanEstimate, measure: Measure) -> Cell:
    """Return a cell with the mean and its interval, clipped to [0, 1] for a fraction."""
    lo, hi = (min(max(limit, 0.0), 1.0) if measure.unit == "fraction" else limit for limit in (found.lo, found.hi))
    return Cell(found.mean, lo, hi)


def _cost_cells(costs: pd.DataFrame) -> dict[str, list[Cell]]:
    """Return label -> mean costs over its training runs, for labels with a finished run."""
    means = label_means(costs, [column for column, *_ in COSTS])
    done = costs.loc[costs["state"] == "done", "label"].unique()
    unknown = {str(label): [Cell("unknown")] * len(COSTS) for label in done}  # published weights, where no costs follow
    return unknown | {
        label: [Cell(mean[column] / divisor) for column, _, _, divisor, _ in COSTS] for label, mean in means.items()
    }


def label_means(costs: pd.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return label -> column -> mean over training runs that reached their end; nan where none has a value."""
    done = costs.loc[costs["images"].notna(), ["label", *columns]]
    numbers = done.assign(**{column: pd.to_numeric(done[column]).astype(float) for column in columns})
    means = numbers.groupby("label", sort=False)[list(columns)].mean()
    return {str(label): dict(zip(columns, row)) for label, row in zip(means.index, means.to_numpy().tolist())}


def finished_runs(costs: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Return the rows of training runs that reached their end, whether or not images were generated."""
    return costs[costs["label"].isin(labels) & costs["images"].notna()]


def tidy(analysis: Analysis, costs: pd.DataFrame) -> Table:
    """Return all numbers in long form: a row per method and measure, and per method and cost; changes against base."""
    names = [
        "method",
        "metric",
        "role",
        "unit",
        "mean",
        "lo",
        "hi",
        "se",
        "se_prompts",
        "prompts",
        "seeds",
        "between_trainings",
    ]
    names += ["change", "change_lo", "change_hi", "change_se", "change_se_prompts", "p", "p_holm", "verdict"]
    names += ["improved", "improved_lo", "improved_hi", "improved_p", "improved_p_holm", "improved_verdict"]
    rows: list[list[Cell]] = []
    for measure in analysis.measures:
        for label in analysis.labels:
            mean = analysis.means[measure][label]
            start: list[float | str | None] = [label, measure.name, measure.role, measure.unit, *mean[:4]]
            start += [mean.se_prompts, mean.prompts, mean.seeds, _between_trainings(analysis, label)]
            row = [*start, *_tidy_change(analysis, measure, label)]
            row += _tidy_improved(analysis, measure, label)
            rows.append(list(map(Cell, row)))
    for label, gain in analysis.gains.items():
        start = [
            label,
            improvement_section.IQM,
            "summary",
            "SD of base",
            *[None] * 5,
            gain.estimate.prompts,
            gain.estimate.seeds,
        ]
        start.append(_between_trainings(analysis, label))
        rows.append(list(map(Cell, [*start, *_tidy_compared(gain), *[None] * 6])))
    spent = _cost_cells(costs)
    for label in analysis.labels:
        for (column, _, unit, _, _), cell in zip(COSTS, spent.get(label, NO_COSTS)):
            value = None if isinstance(cell.value, str) else cell.value
            start = [label, column.removesuffix("_bytes"), "cost", unit, value]
            rows.append([*map(Cell, start), *[Cell()] * (len(names) - len(start))])
    return Table([Column(name) for name in names], rows)


def _between_trainings(analysis: Analysis, label: str) -> str:
    """Return whether a row's errors include the spread between training runs: in se, unknown, or none if untrained."""
    if analysis.of_weights(label):
        return "unknown"
    return "in se" if label in analysis.trained else "none"


def _tidy_change(analysis: Analysis, measure: Measure, label: str) -> list[float | str | None]:
    change = analysis.changes[measure].get(label)
    return [None] * 8 if change is None else _tidy_compared(change)


def _tidy_compared(change: Comparison) -> list[float | str | None]:
    estimate = change.estimate
    errors = [estimate.se, estimate.se_prompts]
    return [*estimate[:3], *errors, estimate.p, change.p_holm, change.verdict]


def _tidy_improved(analysis: Analysis, measure: Measure, label: str) -> list[float | str | None]:
    share = analysis.improved.get(measure, {}).get(label)
    return [None] * 6 if share is None else [*share.estimate[:3], share.estimate.p, share.p_holm, share.verdict]


def change_text(estimate: stats.MeanEstimate, measure: Measure) -> str:
    """Return a signed change with its interval, to one digit more than the measure's means."""
    return interval(*estimate[:3], DECIMALS.get(measure.unit, 3) + 1, signed=True)


def changes_table(analysis: Analysis) -> Table:
    """Return the paired changes against base with errors and verdict, one row per measure and method."""
    columns = [Column("measure"), Column("method"), Column(f"change against {analysis.base}")]
    columns += [Column("SE, prompts"), Column("SE, prompts and seeds"), Column("p, Holm"), Column("verdict")]
    rows = []
    for measure in analysis.measures:
        more = DECIMALS.get(measure.unit, 3) + 1
        for label, change in analysis.changes[measure].items():
            errors = [change.estimate.se_prompts, change.estimate.se]
            p = improvement_section.p_text(change.p_holm)
            texts = [
                change_text(change.estimate, measure),
                *(number(error, more) for error in errors),
                p,
                change.verdict,
            ]
            bold = change.verdict in ("up", "down")
            rows.append([Cell(f"{title(measure)} [{measure.role}]"), Cell(label), *map(Cell, texts[:-1])])
            rows[-1].append(Cell(texts[-1], bold=bold))
    return Table(columns, rows)


def harmed(analysis: Analysis, label: str) -> list[Measure]:
    """Return the measures that fell (after Holm), whatever the training reward did."""
    changes = {measure: changes[label] for measure, changes in analysis.changes.items() if label in changes}
    return [measure for measure, change in changes.items() if worse(change, measure)]


def hacked(analysis: Analysis, label: str) -> list[Measure]:
    """Return the measures that fell while a reward of the row's own training rose; empty if none is known to rise."""
    rewards = analysis.trained_on(label) if label in analysis.trained and analysis.base is not None else []
    rose = any(better(analysis.changes[reward][label], reward) for reward in rewards)
    return [measure for measure in harmed(analysis, label) if rose and measure not in rewards]


def flag(analysis: Analysis, label: str) -> str:
    """Return the mark of a row with scores that fell: "reward hacking", else "worse than base"; "" if none fell."""
    what = "reward hacking" if hacked(analysis, label) else "worse than base" if harmed(analysis, label) else ""
    return f"{what}, these weights" if what and analysis.of_weights(label) else what


def task_table(analysis: Analysis, measure: Measure) -> Table:
    """Return the measure's mean for each task, and their mean, one row per method."""
    tasks = analysis.tasks(measure)
    columns = [Column("method"), *(Column(task.replace("_", " ")) for task in tasks), Column("mean of tasks")]
    rows = []
    for label in analysis.labels:
        estimates = [*(means[label] for means in tasks.values()), analysis.means[measure][label]]
        rows.append([Cell(label), *(estimate_cell(estimate, measure) for estimate in estimates)])
    return Table(columns, rows)

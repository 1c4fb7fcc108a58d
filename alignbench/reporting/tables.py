"""Tables of the report: results, costs, paired changes, scores by task, and the tidy CSV."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from alignbench.reporting import improvement_section
from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Analysis, Comparison, Measure, better, worse
from alignbench.reporting.text import names
from alignbench.reporting.text.names import title
from alignbench.reporting.text.numbers import ABSENT, UNKNOWN, interval, number
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape
from alignbench.store.manifest import Manifest

GIB = 2**30
HOUR = 3600
UNEVEN = 1.5  # between two runs of one row, more than this factor is not the method's doing
DAGGER, DOUBLE_DAGGER = "†", "‡"
COSTS = (  # (column of the costs frame, unit in the tidy table, divisor)
    ("nfe_forward", "", 1),
    ("nfe_grad", "", 1),
    ("images", "", 1),
    ("reward_calls", "", 1),
    ("decodes", "", 1),
    ("seconds", "s", 1),
    ("peak_memory_bytes", "MiB", 2**20),
)
NO_COSTS = [Cell()] * len(COSTS)


# -- results ----------------------------------------------------------------------------------------------------------


def main_table(analysis: Analysis, marked: Mapping[str, str] | None = None) -> Table:
    """Return the main table: training reward, held-out scores and checks, one row per method.

    ``marked``: label -> footnote marks.
    """
    columns = [Column("method"), *map(_column, analysis.measures)]
    rows = []
    for label in analysis.labels:
        cells = [_mean_cell(analysis, measure, label) for measure in analysis.measures]
        fell = f" **({what})**" if (what := flag(analysis, label)) else ""
        rows.append([Cell(label, mark=(marked or {}).get(label, "") + fell + _seeds_mark(analysis, label)), *cells])
    return Table(columns, rows)


def legend(analysis: Analysis) -> str:
    """Return what cells, marks and columns of the main table mean, worded for what its intervals can speak of."""
    rows = analysis.compared or analysis.labels
    alone = [label for label in rows if analysis.of_weights(label)]
    base = escape(analysis.base) if analysis.base else ""
    changes = f", and on the HTML page below it, Δ, the paired change against {base}" if base else ""
    bold = BOLD.format(base=base, count=len(analysis.compared)) if base else NO_BASE
    drawn = 'prompts drawn again (all images of a prompt together; within each task for scores marked "by task")'
    if set(alone) == set(rows):
        scope, bold = THESE_WEIGHTS.format(drawn=drawn), NO_BOLD
    else:
        scope = METHODS.format(drawn=drawn) + (SOME_WEIGHTS.format(rows=escape(", ".join(alone))) if alone else "")
    fewer = FEWER if any(_prompts_mark(analysis, measure, k) for measure in analysis.measures for k in rows) else ""
    toy = TOY if any(measure.world for measure in analysis.measures) else ""
    text = f"Every cell is a mean with its 95 % interval{changes}. {scope} {bold} {MARKS} {fewer} {ROLES} {toy}"
    text = " ".join(text.split())
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


THESE_WEIGHTS = """\
There is one training run of each method, so intervals and marks speak of *these weights* with {drawn}: how much
another training run would differ is unknown."""
METHODS = "Intervals are for {drawn} and other training runs."
SOME_WEIGHTS = " A row of a single training run speaks of these weights alone: {rows}."
BOLD = """\
**Bold**: the leader of a column, if its paired gain over {base} survives Holm's correction for the {count} rows
compared."""
NO_BOLD = "Nothing is bold, because one training run cannot show that a method is better."
NO_BASE = "Nothing is bold, because the sweep has no base model to compare with."
MARKS = """\
(top), shaded on the page: the leader and the rows not separable from it, by the paired differences of all pairs after
Holm's correction; this does not mean equal. A column without (top) has no leader that is separable from any row."""
FEWER = "A number of prompts: the row rests on fewer prompts than others, so its mean is not comparable with theirs."
ROLES = """\
[train]: the reward that the methods were trained on; [held-out]: a scorer that played no part in training; [check]: an
automatic check of what the prompt asks for."""
TOY = "(shapes): a small scorer or checker of the shapes world, not the published one."


def leaders(analysis: Analysis, measure: Measure) -> list[str]:
    """Return the leader and the rows not separable from it; empty without a leader.

    Empty too if these are all rows, unless the leader is bold: then it would seem to be the only one.
    """
    ranking = analysis.rankings[measure]
    return ranking.top if len(ranking.top) < len(ranking.order) or analysis.bold(measure) else []


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
    decimals, arrow = names.decimals(measure), measure.higher_is_better
    return Column(title(measure), measure.unit, arrow, measure.role, decimals, key=measure.name)


def _mean_cell(analysis: Analysis, measure: Measure, label: str) -> Cell:
    change = analysis.changes[measure].get(label)
    return estimate_cell(analysis.means[measure][label], measure)._replace(
        bold=label == analysis.bold(measure),
        top=label in leaders(analysis, measure),
        change=None if change is None else change.estimate[:3],
        mark=_prompts_mark(analysis, measure, label),
    )


def _prompts_mark(analysis: Analysis, measure: Measure, label: str) -> str:
    """Return `` (51 prompts)`` if the row's mean rests on fewer prompts than another row's."""
    used = {row: mean.prompts for row, mean in analysis.means[measure].items()}
    return _prompts(used[label]) if 0 < used[label] < max(used.values()) else ""


def _prompts(count: int) -> str:
    return f" ({count:,} prompt{'s' * (count != 1)})"


def estimate_cell(found: stats.MeanEstimate, measure: Measure) -> Cell:
    """Return a cell with the mean and its interval, clipped to [0, 1] for a fraction."""
    lo, hi = (min(max(limit, 0.0), 1.0) if measure.unit == "fraction" else limit for limit in (found.lo, found.hi))
    return Cell(found.mean, lo, hi)


# -- costs ------------------------------------------------------------------------------------------------------------


class Spending(NamedTuple):
    """Costs of the finished training runs of each row, and the devices that these ran on.

    ``means``: label -> means over runs of ``processes`` and the columns of COSTS, and the median of ``time``, which is
    seconds x processes: a run beside other work on its machine takes longer, and the median hardly moves.
    """

    means: dict[str, dict[str, float]]
    devices: list[str | None]  # distinct ones; None: not recorded
    uneven: list[str]  # rows whose runs took different times for the same number of images

    @property
    def kind(self) -> str:
        """The kind of all devices: GPU or CPU; "device" if they differ in kind, or if one is not recorded."""
        kinds = {name and ("CPU" if name.startswith("CPU") else "GPU") for name in self.devices}
        return (kinds.pop() if len(kinds) == 1 else None) or "device"


def spending(costs: pd.DataFrame) -> Spending:
    """Return what training cost, for all rows with a training run that reached its end."""
    frame = costs.reindex(columns=list(dict.fromkeys([*costs.columns, "device", "processes"])))
    frame = frame[pd.to_numeric(frame["images"]).fillna(0) > 0]
    processes = pd.to_numeric(frame["processes"]).astype(float)
    time = pd.to_numeric(frame["seconds"]).astype(float) * processes.fillna(1.0)  # of early runs, which had one process
    frame = frame.assign(processes=processes, time=time)
    devices = [None if pd.isna(device) else str(device) for device in frame["device"].drop_duplicates()]
    means = label_means(frame, ["processes", *(column for column, *_ in COSTS)])
    by_label = frame.assign(pace=frame["time"] / pd.to_numeric(frame["images"])).groupby("label", sort=False)
    for label, median in by_label["time"].median().items():
        means[str(label)]["time"] = float(median)
    pace = by_label["pace"].agg(["min", "max"])
    return Spending(means, devices, [str(label) for label in pace.index[pace["max"] > UNEVEN * pace["min"]]])


def cost_multiples(costs: pd.DataFrame) -> dict[str, float]:
    """Return label -> cost of training relative to the cheapest trained row; empty if it cannot be compared.

    The cost is the median time of a run on all devices together (seconds x processes), which counts all that a method
    does: sampling, backward, decoding, rewards. It is fair on equal devices only, so runs on different ones give
    nothing; ``spending(costs).uneven`` names the rows whose times cannot be trusted.
    """
    spent = spending(costs)
    times = {label: mean["time"] for label, mean in spent.means.items() if mean["time"] > 0}
    return {label: time / min(times.values()) for label, time in times.items()} if len(spent.devices) == 1 else {}


def costs_table(costs: pd.DataFrame) -> tuple[Table, dict[str, str]]:
    """Return the costs of training, one row per trained method, and {title: value} of columns with a single value.

    The latter are left out of the table.
    """
    spent, multiples = spending(costs), cost_multiples(costs)
    hours = max((mean["time"] for mean in spent.means.values()), default=0.0) >= HOUR
    unit, divisor = ("h", HOUR) if hours else ("s", 1)
    per_gpu = " per GPU" if spent.kind == "GPU" else ""
    counted = [
        (Column("GPUs" if spent.kind == "GPU" else "processes", decimals=0, key="processes"), "processes", 1),
        (Column("peak memory" + per_gpu, "GiB", decimals=2, key="peak_memory_gib"), "peak_memory_bytes", GIB),
        (Column("NFE without gradient", decimals=0, key="nfe_forward"), "nfe_forward", 1),
        (Column("NFE with gradient", decimals=0, key="nfe_grad"), "nfe_grad", 1),
        (Column("images", decimals=0, key="images"), "images", 1),
        (Column("reward calls", decimals=0, key="reward_calls"), "reward_calls", 1),
        (Column("decodes", decimals=0, key="decodes"), "decodes", 1),
    ]
    named = f"GPU-{'hours' if hours else 'seconds'}" if spent.kind == "GPU" else f"{spent.kind} time, {unit}"
    columns = [Column("method"), Column(named, decimals=2 if hours else 0, key="device_time")]
    columns += [Column("relative to the cheapest", decimals=2, key="relative")] * bool(multiples)
    constant: dict[str, str] = {}
    kept = []
    for column, name, size in counted:
        shown = {number(mean[name] / size, column.decimals) for mean in spent.means.values()}
        if shown == {ABSENT}:
            continue
        if len(spent.means) > 1 and len(shown) == 1:
            constant[", ".join(filter(None, [column.title, column.unit]))] = shown.pop()
        else:
            kept.append((column, name, size))
    rows = []
    for label, mean in spent.means.items():
        cells = [Cell(label), Cell(mean["time"] / divisor)]
        cells += [Cell(multiples.get(label))] * bool(multiples)
        rows.append([*cells, *(Cell(mean[name] / size) for _, name, size in kept)])
    return Table([*columns, *(column for column, *_ in kept)], rows), constant


def costs_note(analysis: Analysis, costs: pd.DataFrame) -> str:
    """Return what the costs mean, what is the same for all rows, and which rows' costs are unknown."""
    spent, (_, constant) = spending(costs), costs_table(costs)
    devices = [device or "a device that was not recorded" for device in spent.devices]
    same = ", ".join(f"{name}: {value}" for name, value in constant.items())
    unknown = [label for label in analysis.compared if label not in spent.means]
    relative = "Relative to the cheapest: time, of trained rows."
    if len(devices) > 1:
        relative = "**Times on different devices are not comparable**, so none is set in relation to another."
    parts = [
        "Of training alone; means over finished training runs, of times the median. Time is seconds times the number",
        "of processes (one per GPU), and counts all that a method does: sampling, backward, decoding, rewards.",
        relative,
        UNEVEN_NOTE.format(rows=escape(", ".join(spent.uneven)), factor=UNEVEN) if spent.uneven else "",
        "NFE: evaluations of the network per image, summed over images.",
        f"Measured on {escape('; '.join(devices))}." if devices else "",
        f"The same in every row: {same}." if same else "",
        f"Without costs: {escape(', '.join(unknown))}." if unknown else "",
    ]
    return "\n".join(filter(None, parts))


UNEVEN_NOTE = """\
**The times per image of the runs of {rows} differ by more than a factor of {factor}, so other work ran beside some of
them: these times, and what is relative to them, are rough.**"""


def costs_section(analysis: Analysis, costs: pd.DataFrame) -> list[Section]:
    """Return the section on the costs of training; empty if no training run has reached its end."""
    table, _ = costs_table(costs)
    return ["## Costs of training", table, costs_note(analysis, costs)] if table.rows else []


def _cost_cells(costs: pd.DataFrame) -> dict[str, list[Cell]]:
    """Return label -> mean costs over its training runs, for labels with a finished run."""
    means = label_means(costs, [column for column, *_ in COSTS])
    done = costs.loc[costs["state"] == "done", "label"].unique()
    unknown = {str(label): [Cell("unknown")] * len(COSTS) for label in done}  # published weights, where no costs follow
    return unknown | {
        label: [Cell(mean[column] / divisor) for column, _, divisor in COSTS] for label, mean in means.items()
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
    headings = [
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
    headings += ["change", "change_lo", "change_hi", "change_se", "change_se_prompts", "p", "p_holm", "verdict"]
    headings += ["improved", "improved_lo", "improved_hi", "improved_p", "improved_p_holm", "improved_verdict"]
    rows: list[list[Cell]] = []
    for measure in analysis.measures:
        for label in analysis.labels:
            mean = analysis.means[measure][label]
            start: list[float | str | None] = [label, measure.name, measure.role, measure.unit, *mean[:4]]
            between = _between_trainings(analysis, label, analysis.of_weights(label, measure=measure))
            start += [mean.se_prompts, mean.prompts, mean.seeds, between]
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
        start.append(_between_trainings(analysis, label, gain.weights))
        rows.append(list(map(Cell, [*start, *_tidy_compared(gain), *[None] * 6])))
    spent = _cost_cells(costs)
    for label in analysis.labels:
        for (column, unit, _), cell in zip(COSTS, spent.get(label, NO_COSTS)):
            value = None if isinstance(cell.value, str) else cell.value
            start = [label, column.removesuffix("_bytes"), "cost", unit, value]
            rows.append([*map(Cell, start), *[Cell()] * (len(headings) - len(start))])
    return Table([Column(name) for name in headings], rows)


def _between_trainings(analysis: Analysis, label: str, unknown: bool) -> str:
    """Return whether a row's errors include the spread between training runs: in se, unknown, or none if untrained."""
    if unknown:
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


# -- paired changes ---------------------------------------------------------------------------------------------------


def change_text(estimate: stats.MeanEstimate, measure: Measure) -> str:
    """Return a signed change with its interval."""
    return interval(*estimate[:3], names.change_decimals(measure), signed=True)


def changes_sections(analysis: Analysis) -> list[Section]:
    """Return a heading and a table of paired changes against base for each measure."""
    parts: list[Section] = []
    for measure in analysis.measures:
        parts += [f"### {escape(title(measure))} [{measure.role}]", changes_table(analysis, measure)]
    return [*parts, UNSTABLE if any(analysis.unstable.get(measure) for measure in analysis.measures) else ""]


UNSTABLE = "(unstable): the training runs of this row differ more than those of the others."


def changes_table(analysis: Analysis, measure: Measure) -> Table:
    """Return the paired changes of one measure against base with errors and verdict, one row per method."""
    more = names.change_decimals(measure)
    columns = [Column("method"), Column(f"change against {analysis.base}", decimals=more, signed=True, key="change")]
    columns += [Column("SE, prompts", decimals=more, key="se_prompts")]
    columns += [Column("SE, prompts and seeds", decimals=more, key="se"), Column("p, Holm", key="p_holm")]
    columns += [Column("verdict")]
    rows = []
    for label, change in analysis.changes[measure].items():
        found = change.estimate
        measured = math.isfinite(found.mean)
        seeds = Cell(text=UNKNOWN) if change.weights else _error_cell(found.se)
        errors = [_error_cell(found.se_prompts), seeds, _p_cell(change.p_holm)] if measured else [Cell()] * 3
        mark = " (unstable)" * (label in analysis.unstable.get(measure, [])) + _fewer_pairs(analysis, measure, label)
        bold = change.verdict in ("up", "down") and not change.weights
        rows.append([Cell(label, mark=mark), Cell(*found[:3]), *errors, Cell(change.said, bold=bold)])
    return Table(columns, rows)


def _error_cell(error: float) -> Cell:
    return Cell(error) if math.isfinite(error) else Cell(text=UNKNOWN)


def _p_cell(p: float) -> Cell:
    return Cell(p, text=improvement_section.p_text(p))


def _fewer_pairs(analysis: Analysis, measure: Measure, label: str) -> str:
    """Return `` (51 prompts)`` if the row's change rests on fewer prompts than another row's."""
    used = {row: change.estimate.prompts for row, change in analysis.changes[measure].items()}
    return _prompts(used[label]) if 0 < used[label] < max(used.values()) else ""


def harmed(analysis: Analysis, label: str) -> list[Measure]:
    """Return the measures that fell (after Holm), whatever the training reward did."""
    changes = {measure: changes[label] for measure, changes in analysis.changes.items() if label in changes}
    return [measure for measure, change in changes.items() if worse(change, measure)]


def hacked(analysis: Analysis, label: str) -> list[Measure]:
    """Return the measures that fell while a reward of the row's own training rose; empty if none is known to rise."""
    rewards = analysis.trained_on(label) if label in analysis.trained and analysis.base is not None else []
    rose = any(better(analysis.changes[reward][label], reward) for reward in rewards)
    return [measure for measure in harmed(analysis, label) if rose and measure not in rewards]


def got_worse(measures: Sequence[Measure]) -> str:
    """Return what these measures did that changed for the worse: a score of which lower is better did not fall."""
    return "got worse" if any(measure.higher_is_better is False for measure in measures) else "fell"


def flag(analysis: Analysis, label: str) -> str:
    """Return the mark of a row with scores that fell: "reward hacking", else "worse than base"; "" if none fell."""
    what = "reward hacking" if hacked(analysis, label) else "worse than base" if harmed(analysis, label) else ""
    return f"{what}, these weights" if what and analysis.of_weights(label) else what


def _size_mark(count: int | None) -> str:
    return "" if count is None else f" ({count} prompt{'s' * (count != 1)})"


def task_table(analysis: Analysis, measure: Measure) -> Table:
    """Return the measure's mean for each task, and their mean, one row per method.

    A task with too few prompts for an interval has their number in its heading, and means alone.
    """
    tasks, tags = analysis.tasks(measure), analysis.scores[measure].tags
    chosen = names.in_order(tasks)
    sizes = {task: int((tags == task).sum()) for task in chosen}
    few = {task: size for task, size in sizes.items() if size < stats.FEW and measure.unit == "fraction"}
    decimals = names.decimals(measure)
    columns = [Column("method")]
    for task in chosen:
        columns.append(Column(names.task_name(task) + _size_mark(few.get(task)), decimals=decimals, key=task))
    columns += [Column(names.OVERALL, decimals=decimals, key="overall")]
    rows = []
    for label in analysis.labels:
        cells = [
            Cell(tasks[task][label].mean) if task in few else estimate_cell(tasks[task][label], measure)
            for task in chosen
        ]
        rows.append([Cell(label), *cells, estimate_cell(analysis.means[measure][label], measure)])
    return Table(columns, rows)

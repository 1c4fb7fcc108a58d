"""Two summaries of the paired changes: the probability that an image improves on base, and a gain over all measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignbench.reporting.analysis.comparison import Analysis, Comparison, Measure
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, interval, listed, number

IQM = "iqm_gain"
NOTE = """\
The share of images that score better than the base model's image of the same prompt and noise; a tie counts half, and
0.5 means no difference (Agarwal et al. 2021, paired). **Bold**: different from 0.5 with p < 0.05 after Holm's
correction over all cells of this table{weights}. Intervals as above. The size of a gain does not matter here."""
GAIN_NOTE = """\
Over what is known to be held out for every row, with one vote for each evaluator: {votes}.{left_out} Each gain is
paired and in units of the standard deviation over prompts of the base model's scores, so that it does not depend on the
other methods; the number is the interquartile mean of the votes (Agarwal et al. 2021), the mean of their middle half.
The interval covers the images and training runs of that half; p is corrected for the {count} methods.{weights}"""
LEFT_OUT = {  # role -> why its measures do not count
    "train": "a row was trained on it",
    "unknown": "unknown whether a row was trained on it",
}


def sections(analysis: Analysis) -> list[Section]:
    """Return the sections of both summaries; empty without a base model to compare with."""
    if not analysis.improved:
        return []
    weights = any(analysis.of_weights(label) for label in analysis.compared)
    parts: list[Section] = [
        f"## Probability of improvement over {escape(analysis.base or '')}",
        improvement_table(analysis),
        NOTE.format(weights="; never a single training run" * weights),
    ]
    if not analysis.gains:
        why = "none varies between prompts" if analysis.held_out else "none is known to be held out for every row"
        return [*parts, f"No summary over held-out measures: {why}.{_left_out(analysis)}"]
    note = GAIN_NOTE.format(
        votes=", ".join(map(_vote, votes(analysis.summed))),
        left_out=_left_out(analysis),
        count=len(analysis.gains),
        weights=" A row that is a single training run: its verdict speaks of these weights." * weights,
    )
    return [*parts, "## Gain over all held-out measures", gain_table(analysis), note]


def votes(measures: Sequence[Measure]) -> list[list[Measure]]:
    """Return the measures grouped by their evaluator, each of which has one vote in the gain."""
    by_evaluator: dict[str, list[Measure]] = {}
    for measure in measures:
        by_evaluator.setdefault(measure.evaluator, []).append(measure)
    return list(by_evaluator.values())


def _vote(measures: Sequence[Measure]) -> str:
    names = listed([escape(measure.name) for measure in measures])
    return names if len(measures) == 1 else f"the mean of {names}"


def _left_out(analysis: Analysis) -> str:
    """Return the sentence on measures with a better direction that do not count, and why; "" if all do."""
    others = [m for m in analysis.measures if m.higher_is_better is not None and m not in analysis.summed]
    why = [f"{escape(m.name)} ({LEFT_OUT.get(m.role, 'does not vary between prompts')})" for m in others]
    return f" Left out: {', '.join(why)}." if why else ""


def tables(analysis: Analysis) -> dict[str, Table]:
    """Return the tables of the sections, by title."""
    titled = {"Probability of improvement": improvement_table(analysis)} if analysis.improved else {}
    return titled | ({"Gain over all held-out measures": gain_table(analysis)} if analysis.gains else {})


def improvement_table(analysis: Analysis) -> Table:
    """Return the probability of improvement over base, one row per method and one column per measure."""
    columns = [
        Column("method"),
        *(Column(f"{measure.name}{', by task' * measure.by_task}", role=measure.role) for measure in analysis.improved),
    ]
    rows = []
    for label in analysis.compared:
        shares = [column[label] for column in analysis.improved.values()]
        rows.append([Cell(label), *(Cell(*share.estimate[:3], bold=_significant(share)) for share in shares)])
    return Table(columns, rows)


def gain_table(analysis: Analysis) -> Table:
    """Return the gain over all held-out measures, one row per method."""
    columns = [Column(name) for name in ("method", "gain, SD of base", "p, Holm", "verdict")]
    rows = []
    for label, gain in analysis.gains.items():
        texts = [interval(*gain.estimate[:3], 3, signed=True), p_text(gain.p_holm)]
        rows.append([Cell(label), *map(Cell, texts), Cell(gain.said, bold=_significant(gain))])
    return Table(columns, rows)


def _significant(comparison: Comparison) -> bool:
    """Return whether the verdict is up or down, and one on the method: of a single training run nothing is bold."""
    return comparison.verdict in ("up", "down") and not comparison.weights


def p_text(p: float) -> str:
    """Return a p-value to three digits, ``<0.001`` below that."""
    return "<0.001" if not math.isnan(p) and p < 0.001 else number(p)

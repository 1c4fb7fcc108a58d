"""Two summaries of the paired changes: the probability that an image improves on base, and a gain over all measures."""

from __future__ import annotations

import math

from alignbench.reporting.analysis.comparison import Analysis, Comparison
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, interval, number

IQM = "iqm_gain"
NOTE = """\
The share of images that score better than the base model's image of the same prompt and noise; a tie counts half, and
0.5 means no difference (Agarwal et al. 2021, paired). **Bold**: different from 0.5 with p < 0.05 after Holm's
correction over all cells of this table. Intervals as above. The size of a gain does not matter here."""
GAIN_NOTE = """\
The interquartile mean (Agarwal et al. 2021) over {measures}: the mean of the middle half of a method's paired gains,
each in units of the standard deviation over prompts of the base model's scores, so that a gain does not depend on the
other methods. The training reward is excluded. The interval covers the images and training runs of that middle half; p
is corrected for the {count} methods."""


def sections(analysis: Analysis) -> list[Section]:
    """Return the sections of both summaries; empty without a base model to compare with."""
    if not analysis.improved:
        return []
    parts: list[Section] = [
        f"## Probability of improvement over {escape(analysis.base or '')}",
        improvement_table(analysis),
        NOTE,
    ]
    if not analysis.gains:
        return [*parts, "No summary over measures: no held-out measure varies between prompts."]
    names = ", ".join(escape(measure.name) for measure in analysis.summed)
    note = GAIN_NOTE.format(measures=names, count=len(analysis.gains))
    return [*parts, "## Gain over all held-out measures", gain_table(analysis), note]


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
        rows.append([Cell(label), *map(Cell, texts), Cell(gain.verdict, bold=_significant(gain))])
    return Table(columns, rows)


def _significant(comparison: Comparison) -> bool:
    return comparison.verdict in ("up", "down")


def p_text(p: float) -> str:
    """Return a p-value to three digits, ``<0.001`` below that."""
    return "<0.001" if not math.isnan(p) and p < 0.001 else number(p)

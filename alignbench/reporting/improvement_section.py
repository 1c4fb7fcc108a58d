"""Two summaries of the paired changes: how probably a picture is better than base's, and a gain over all measures."""

from __future__ import annotations

import math

from alignbench.reporting.analysis.comparison import Analysis, Comparison
from alignbench.reporting.table import Cell, Column, Section, Table, escape, interval, number

IQM = "iqm_gain"
NOTE = """\
Of the pictures of one prompt, noise and training seed, the share that scores better than base's; a tie counts half, and
0.5 is no difference (Agarwal et al. 2021, paired). **Bold**: different from 0.5 after Holm's correction over all cells
of this table, p < 0.05. Intervals as above, and as for any picture the size of a gain plays no part."""
GAIN_NOTE = """\
The interquartile mean (Agarwal et al. 2021) over {measures}: of the methods' paired gains, in standard deviations over
prompts of base's scores (so that no other method moves them), the middle half. The training reward has no part in it.
The interval is that of the middle half's pictures and trainings; p is corrected for the {count} methods."""


def sections(analysis: Analysis) -> list[Section]:
    """Both tables; nothing without a base to compare with."""
    if not analysis.improved:
        return []
    found: list[Section] = [
        f"## Probability of improvement over {escape(analysis.base or '')}",
        improvement_table(analysis),
        NOTE,
    ]
    if not analysis.gains:
        return [*found, "No summary over measures: no measure that nobody trained on has a spread over prompts."]
    names = ", ".join(escape(measure.name) for measure in analysis.summed)
    note = GAIN_NOTE.format(measures=names, count=len(analysis.gains))
    return [*found, "## Gain over all held-out measures", gain_table(analysis), note]


def tables(analysis: Analysis) -> dict[str, Table]:
    """The same as tables, by title."""
    found = {"Probability of improvement": improvement_table(analysis)} if analysis.improved else {}
    return found | ({"Gain over all held-out measures": gain_table(analysis)} if analysis.gains else {})


def improvement_table(analysis: Analysis) -> Table:
    columns = [
        Column("method"),
        *(Column(f"{measure.name}{', by task' * measure.by_task}", role=measure.role) for measure in analysis.improved),
    ]
    rows = []
    for label in analysis.compared:
        found = [column[label] for column in analysis.improved.values()]
        rows.append([Cell(label), *(Cell(*each.estimate[:3], bold=_told(each)) for each in found)])
    return Table(columns, rows)


def gain_table(analysis: Analysis) -> Table:
    columns = [Column(name) for name in ("method", "gain, SD of base", "p, Holm", "verdict")]
    rows = []
    for label, gain in analysis.gains.items():
        texts = [interval(*gain.estimate[:3], 3, signed=True), p_text(gain.p_holm)]
        rows.append([Cell(label), *map(Cell, texts), Cell(gain.verdict, bold=_told(gain))])
    return Table(columns, rows)


def _told(comparison: Comparison) -> bool:
    return comparison.verdict in ("up", "down")


def p_text(p: float) -> str:
    return "<0.001" if not math.isnan(p) and p < 0.001 else number(p)

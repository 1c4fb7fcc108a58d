"""Summaries of paired differences: the order of the methods, all pairs, the probability of improvement, a gain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Analysis, Comparison, Measure, better, worse
from alignbench.reporting.analysis.stats import MeanEstimate
from alignbench.reporting.text import names
from alignbench.reporting.text.numbers import UNKNOWN, limits, number, significant
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, listed

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
    shares = [share for column in analysis.improved.values() for share in column.values()]
    weights = any(found.weights for found in (*shares, *analysis.gains.values()))
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
    named = listed([escape(names.measure_name(measure)) for measure in measures])
    return named if len(measures) == 1 else f"the mean of {named}"


def _left_out(analysis: Analysis) -> str:
    """Return the sentence on measures with a better direction that do not count, and why; "" if all do."""
    others = [m for m in analysis.measures if m.higher_is_better is not None and m not in analysis.summed]
    why = [f"{escape(names.measure_name(m))} ({LEFT_OUT.get(m.role, 'does not vary between prompts')})" for m in others]
    return f" Left out: {', '.join(why)}." if why else ""


def tables(analysis: Analysis) -> dict[str, Table]:
    """Return the tables of the sections, by title."""
    titled = {"Probability of improvement": improvement_table(analysis)} if analysis.improved else {}
    return titled | ({"Gain over all held-out measures": gain_table(analysis)} if analysis.gains else {})


def improvement_table(analysis: Analysis) -> Table:
    """Return the probability of improvement over base, one row per method and one column per measure."""
    columns = [
        Column("method"),
        *(Column(names.title(measure), role=measure.role, key=measure.name) for measure in analysis.improved),
    ]
    rows = []
    for label in analysis.compared:
        shares = [column[label] for column in analysis.improved.values()]
        rows.append([Cell(label), *(Cell(*share.estimate[:3], bold=_significant(share)) for share in shares)])
    return Table(columns, rows)


def gain_table(analysis: Analysis) -> Table:
    """Return the gain over all held-out measures, one row per method."""
    columns = [Column("method"), Column("gain", "SD of base", signed=True), Column("p, Holm"), Column("verdict")]
    rows = []
    for label, gain in analysis.gains.items():
        numbers = [Cell(*gain.estimate[:3]), Cell(gain.p_holm, text=p_text(gain.p_holm))]
        rows.append([Cell(label), *numbers, Cell(gain.said, bold=_significant(gain))])
    return Table(columns, rows)


def _significant(comparison: Comparison) -> bool:
    """Return whether the verdict is up or down, and one on the method: of a single training run nothing is bold."""
    return comparison.verdict in ("up", "down") and not comparison.weights


def p_text(p: float) -> str:
    """Return a p-value to three digits, ``<0.001`` below that."""
    return UNKNOWN if math.isnan(p) else "<0.001" if p < 0.001 else number(p)


# -- all pairs --------------------------------------------------------------------------------------------------------

FEW = 8  # rows of a matrix whose cells have room for an interval
SIGNS = {True: "▲", False: "▼"}
ORDER_NOTE = """\
Best and worst rank that the decisions about all pairs leave open{weights}; with a probability of 95 % all ranks of a
measure hold. Rows that share a letter are not separable, which does not mean equal.{fewer}"""
FEWER = " {measure}: means over the {count} prompts that every row is scored on."
PAIRS_NOTE = """\
All pairs, a table for each measure. Above the diagonal: the mean paired difference, row minus column, with its decision
after Holm's correction over all pairs: ▲ the row is better, ▼ the column is better, ○ not separable, ? no decision is
possible. Below it: the probability of improvement, the share of images that score better in the row than in the column
of the same prompt and noise (a tie counts half). Rows are in the order of their means.{weights}"""


def ranked(analysis: Analysis) -> list[Measure]:
    """Return the measures by which at least two rows can be put in order."""
    return [measure for measure in analysis.measures if len(analysis.rankings[measure].order) > 1]


def order_section(analysis: Analysis) -> list[Section]:
    """Return the section on the order of the methods; empty if there are no two rows to order."""
    if not (measures := ranked(analysis)):
        return []
    weights = " (of these weights, where a row is a single training run)" * _any_weights(analysis, measures)
    fewer = [
        FEWER.format(measure=escape(names.measure_name(measure)), count=analysis.rankings[measure].prompts)
        for measure in measures
        if analysis.rankings[measure].fewer
    ]
    note = ORDER_NOTE.format(weights=weights, fewer="".join(fewer))
    return ["## Order of the methods", order_table(analysis), note]


def order_table(analysis: Analysis) -> Table:
    """Return the ranks that remain possible and the letters of each row, one column per measure with an order."""
    columns = [Column(names.title(measure), role=measure.role, key=measure.name) for measure in ranked(analysis)]
    rows = [
        [Cell(label), *(_rank_cell(analysis, measure, label) for measure in ranked(analysis))]
        for label in analysis.compared or analysis.labels
    ]
    return Table([Column("method"), *columns], rows)


def _rank_cell(analysis: Analysis, measure: Measure, label: str) -> Cell:
    ranking = analysis.rankings[measure]
    if label not in ranking.ranks:
        return Cell("not measured")
    best, worst = ranking.ranks[label]
    ranks = f"{best}" if best == worst else f"{best}–{worst}"
    return Cell(best, text=f"{ranks}, {ranking.letters[label]}")


def pairs_sections(analysis: Analysis) -> list[Section]:
    """Return a note, and a heading and a matrix of all pairs for each measure with an order."""
    if not (measures := ranked(analysis)):
        return []
    weights = " Decisions on a single training run are on these weights." * _any_weights(analysis, measures)
    parts: list[Section] = [PAIRS_NOTE.format(weights=weights)]
    for measure in measures:
        parts += [f"### All pairs, {escape(names.title(measure))} [{measure.role}]", pairs_table(analysis, measure)]
    return parts


def _any_weights(analysis: Analysis, measures: list[Measure]) -> bool:
    return any(pair.weights for measure in measures for pair in analysis.pairs[measure].values())


def pairs_table(analysis: Analysis, measure: Measure) -> Table:
    """Return the matrix of all pairs: differences above the diagonal, probabilities of improvement below it."""
    order = analysis.rankings[measure].order
    shares = improvements(analysis, measure)
    rows = []
    for i, row in enumerate(order):
        cells = [Cell(row), Cell(str(i + 1))]
        for j, column in enumerate(order):
            if i == j:
                cells.append(Cell(text="·"))
            elif i < j:
                pair = _facing(analysis, measure, row, column)
                cells.append(_difference_cell(pair, measure, len(order) <= FEW))
            else:
                share = shares[row, column]
                ends = f" {limits(*share[1:3], 2)}" * (len(order) <= FEW and math.isfinite(share.mean))
                cells.append(Cell(share.mean, text=number(share.mean, 2) + ends))
        rows.append(cells)
    heads = [Column(f"{i + 1}. {row}" if len(order) <= FEW else f"{i + 1}", key=row) for i, row in enumerate(order)]
    return Table([Column("method"), Column("no."), *heads], rows)


def _difference_cell(pair: Comparison, measure: Measure, roomy: bool) -> Cell:
    """Return a difference with its decision; its interval or, if there is no room for one, two significant digits."""
    found, more = pair.estimate, names.change_decimals(measure)
    if not math.isfinite(found.mean):
        return Cell(text="not measured")
    ends = f" {limits(*found[1:3], more, True)}" * roomy
    shown = f"{number(found.mean, more, True) if roomy else significant(found.mean)} {_sign(pair, measure)}{ends}"
    return Cell(found.mean, text=shown, bold=_significant(pair))


def _facing(analysis: Analysis, measure: Measure, a: str, b: str) -> Comparison:
    """Return the comparison a - b, whichever of the two stands first in the order of the table."""
    pairs = analysis.pairs[measure]
    if (a, b) in pairs:
        return pairs[a, b]
    pair = pairs[b, a]
    found = pair.estimate
    return pair._replace(estimate=found._replace(mean=-found.mean, lo=-found.hi, hi=-found.lo))


def _sign(pair: Comparison, measure: Measure) -> str:
    if better(pair, measure) or worse(pair, measure):
        return SIGNS[better(pair, measure)]
    return "○" if pair.verdict in ("cannot tell", "identical") else "?"


def improvements(analysis: Analysis, measure: Measure) -> dict[tuple[str, str], MeanEstimate]:
    """Return (a, b) -> the share of images on which a scores better than b, both ways round, of all rows compared."""
    data = analysis.scores[measure]
    rows = analysis.compared or analysis.labels
    strata = data.tags if measure.by_task else None
    sign = -1 if measure.higher_is_better is False else 1
    shares: dict[tuple[str, str], MeanEstimate] = {}
    for place, b in enumerate(rows):
        for trained in (0, 1, 2):  # rows of the pair; their training runs vary in other ways
            chosen = [a for a in rows[:place] if len({a, b} & set(analysis.trained)) == trained]
            signed = [sign * data.values[a] for a in chosen]
            found = stats.improvements(signed, sign * data.values[b], strata, runs=trained > 0) if chosen else []
            for a, share in zip(chosen, found):
                shares[a, b] = share
                shares[b, a] = share._replace(mean=1 - share.mean, lo=1 - share.hi, hi=1 - share.lo)
    return shares


def tidy_pairs(analysis: Analysis) -> Table:
    """Return all pairs of all measures in full precision, one row each, with the probability of improvement."""
    headings = ["metric", "a", "b", "difference", "lo", "hi", "se", "p", "p_holm", "verdict", "speaks_of"]
    headings += ["prompts", "seeds", "improved", "improved_lo", "improved_hi"]
    return Table([Column(name) for name in headings], [[*map(Cell, row)] for row in _tidy_pairs(analysis)])


def _tidy_pairs(analysis: Analysis) -> Iterator[list[float | str | None]]:
    for measure in analysis.measures:
        shares = improvements(analysis, measure) if analysis.pairs[measure] else {}
        for (a, b), pair in analysis.pairs[measure].items():
            found, of = pair.estimate, "weights" if pair.weights else "methods"
            yield [
                *(measure.name, a, b, *found[:3], found.se, found.p, pair.p_holm, pair.verdict, of),
                *(found.prompts, found.seeds, *shares[a, b][:3]),
            ]

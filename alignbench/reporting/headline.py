"""The report's first screen: one answer on the primary measure, in words and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from alignbench.reporting.analysis.comparison import Analysis, Measure, better, worse
from alignbench.reporting.analysis.stats import MeanEstimate
from alignbench.reporting.analysis.swept import all_on_lines
from alignbench.reporting.tables import change_text, cost_multiples, estimate_cell, got_worse, hacked, harmed, spending
from alignbench.reporting.text import names
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, interval, listed
from alignbench.store.manifest import Manifest

NAMED = 4  # rows that a sentence names; of more it gives the number


def sections(analysis: Analysis, costs: pd.DataFrame, manifest: Manifest) -> list[Section]:
    """Return the answer, and the headline table with its legend if any row has a score on the primary measure."""
    measure = analysis.primary
    if measure is None:
        return [_without_primary(manifest)]
    told = answer(analysis, measure, costs)
    rows = _scored(analysis, measure)
    if not rows or _all_alike(analysis, measure, rows):
        return [told]
    first = {"check": "the first check", "held-out": "the first held-out score"}.get(measure.role, "")
    chosen = "as the sweep says" if manifest.primary else f"{first}, since the sweep names none"
    return [told, table(analysis, measure, costs, manifest), _legend(analysis, measure, costs, chosen)]


def rows_in_order(analysis: Analysis, manifest: Manifest) -> list[str]:
    """Return the compared rows, the best on the primary measure first; of a hyperparameter's sweep, in its own order.

    Rows without a place there come last. Without a base model, all rows are compared.
    """
    rows = analysis.compared or analysis.labels
    if analysis.primary is None or all_on_lines(manifest):
        return list(rows)
    order = analysis.rankings[analysis.primary].order
    return sorted(rows, key=lambda label: order.index(label) if label in order else len(order))


# -- the answer in words ----------------------------------------------------------------------------------------------


def answer(analysis: Analysis, measure: Measure, costs: pd.DataFrame) -> str:
    """Return who is best on ``measure``, over whom that is not shown, at what cost, and what this study could see."""
    rows = _scored(analysis, measure)
    if not rows:
        others = f" other than {escape(analysis.base)}" if analysis.base else ""
        what = f"no row{others} has a score on {_name(measure)}"
        return f"**Nothing can be concluded: {what if analysis.compared else 'there is no row to compare'}.**"
    if len(rows) == 1 and analysis.base is None:
        return f"**Nothing can be compared: only {escape(rows[0])} has a score on {_name(measure)}.**"
    if _all_alike(analysis, measure, rows):
        what = f"every score on {_name(measure)} is that of {escape(analysis.base or '')} on the same image"
        return f"**Nothing can be concluded: {what}.**"
    ranking = analysis.rankings[measure]
    leader = ranking.leader
    if not ranking.order:
        return f"**The rows cannot be ranked on {_name(measure)}: too few prompts have a score of every row.**"
    if leader is None:
        first, shared = escape(ranking.order[0]), _count(ranking.prompts, "prompt")
        why = f"{first} has the best mean over the {shared} of all rows, but loses to a row on the prompts of both"
        return f"**No row leads on {_name(measure)}**: {why}. {_sensitivity(analysis, measure, rows)}"
    result = _result(analysis, measure, leader)
    result = f"**{result[0].upper()}{result[1:]}.**"
    aside = _sentence([_cost(analysis, costs, leader), _harm(analysis, leader), *_gaps(analysis, measure, leader)])
    return " ".join(filter(None, [result, aside, _sensitivity(analysis, measure, rows)]))


def _without_primary(manifest: Manifest) -> str:
    if manifest.primary:
        what = f"the primary measure of this sweep, {escape(manifest.primary)}, is not among its scores"
        return f"**Nothing can be concluded: {what}.**"
    return (
        "**Nothing can be concluded: every score is the reward that a row was trained on, of unknown role, or neither "
        "good nor bad in itself.**"
    )


def _result(analysis: Analysis, measure: Measure, leader: str) -> str:
    """Return the leader, its paired change, and the rows from which it is not separable."""
    row = _Subject(escape(leader), analysis.of_weights(leader, measure=measure))
    alone = len(_scored(analysis, measure)) == 1
    best = f"{row} {row.verb('has', 'have')} the best {_name(measure)}"
    change = analysis.changes[measure].get(leader)
    if change is None:
        found = estimate_cell(analysis.means[measure][leader], measure)
        mean = interval(analysis.means[measure][leader].mean, found.lo, found.hi, names.decimals(measure))
        return f"{best}, {mean}{_rivals(analysis, measure, leader)}; without a base model, no change can be given"
    base = escape(analysis.base or "")
    size = f"{change_text(change.estimate, measure)} against {base}"
    if alone:
        best = f"{row} {row.verb('has', 'have')} a score on {_name(measure)}"
    if change.verdict == "not measured":
        return f"{best}, but no prompt has a score of both it and {base}"
    if change.verdict == "spread unknown":
        return f"{best}, {size}, but {_count(change.estimate.prompts, 'prompt')} cannot show a difference"
    if better(change, measure):
        gain = f"{row} {row.verb('improves', 'improve')} {_name(measure)}"
        return f"{gain}: {size}" if alone else f"{best}: {size}{_rivals(analysis, measure, leader)}"
    if worse(change, measure):
        which = f"{row}{'' if alone else ', the best,'} {row.verb('is', 'are')} worse than {base}"
        return f"No row improves {_name(measure)}: {which}, {size}"
    if gained := [label for label in analysis.compared if better(analysis.changes[measure][label], measure)]:
        return f"{best}, {size}, which is not shown to be a gain; shown to be better than {base}: {_some(gained)}"
    if alone:
        return f"{row} {row.verb('is', 'are')} not separable from {base} on {_name(measure)}: {size}"
    lost = [label for label in analysis.compared if worse(analysis.changes[measure][label], measure)]
    which = "No row is shown to be better than" if lost else "No row is separable from"
    return f"{which} {base} on {_name(measure)}: the best mean is that of {row}, {size}"


class _Subject(NamedTuple):
    """A row as the subject of a sentence: its method, or these weights, a plural, where it is one training run."""

    name: str
    plural: bool

    def __str__(self) -> str:
        return f"{'these weights of ' * self.plural}{self.name}"

    def verb(self, singular: str, plural: str) -> str:
        return plural if self.plural else singular


def _rivals(analysis: Analysis, measure: Measure, leader: str) -> str:
    ranking = analysis.rankings[measure]
    alike = [label for label in ranking.top if label != leader]
    others = len(ranking.order) - 1
    if not alike:
        return ", better than every other row" + " with a score" * (
            others < len(analysis.compared or analysis.labels) - 1
        )
    return f", not separable from {_some(alike)}" + f", of {others} other rows" * (len(alike) > NAMED)


def _some(labels: Sequence[str]) -> str:
    """Return the names, or the first ones and the number of the others."""
    if len(labels) <= NAMED:
        return escape(listed(list(labels)))
    return f"{escape(', '.join(labels[: NAMED - 1]))} and {len(labels) - NAMED + 1} more"


def _cost(analysis: Analysis, costs: pd.DataFrame, leader: str) -> str:
    """Return the cost of the leader's training relative to the cheapest row; "" if only one row was trained here."""
    multiples = cost_multiples(costs)
    if leader not in multiples:
        if leader in analysis.trained and len(spending(costs).devices) > 1:
            return "costs of training cannot be compared, since devices differ"
        return "the cost of its training is unknown" if len(analysis.trained) > 1 or not analysis.trained else ""
    if len(multiples) < 2:
        return ""
    if multiples[leader] < 1.005:
        return "no row took less time to train"
    cheapest = min(multiples, key=lambda label: multiples[label])
    return f"training took {_times(multiples[leader])} times as long as that of the cheapest, {escape(cheapest)}"


def _harm(analysis: Analysis, label: str) -> str:
    """Return whether the row hacks its reward, or what else it worsens."""
    if fell := hacked(analysis, label):
        return f"**reward hacking: its training reward rose while {_names(fell)} {got_worse(fell)}**"
    if fell := harmed(analysis, label):
        return f"worse than {escape(analysis.base or '')} on {_names(fell)}"
    verdicts = {changes[label].verdict for changes in analysis.changes.values() if label in changes}
    if verdicts <= {"not measured", "spread unknown"}:
        return "whether any score got worse cannot be told" if analysis.base else ""
    return "no score is shown to be worse"


def _sensitivity(analysis: Analysis, measure: Measure, rows: Sequence[str]) -> str:
    """Return the size of a change that this study would have found."""
    changes = [analysis.changes[measure][label] for label in rows if label in analysis.changes[measure]]
    if not changes:
        return ""
    trained = [label for label in rows if label in analysis.trained]
    seeds = [analysis.changes[measure][label].estimate.seeds for label in trained]
    sizes = [_range(seeds, "training seed")] if trained else []
    sizes.append(_range([change.estimate.prompts for change in changes], "prompt"))
    size = analysis.detectable(measure)
    if not np.isfinite(size):
        return f"With {listed(sizes)}, it is unknown what difference could have been seen."
    what = "true change of these weights" if all(change.weights for change in changes) else "true change"
    found = f"{size:.2g} is found with a probability of 80 %, a smaller one less often"
    return f"With {listed(sizes)}, a {what} of {found}."


def _sentence(parts: Iterable[str]) -> str:
    text = "; ".join(filter(None, parts))
    start = next((i for i, c in enumerate(text) if c.isalpha()), 0)
    return f"{text[:start]}{text[start : start + 1].upper()}{text[start + 1 :]}." if text else ""


# -- the table --------------------------------------------------------------------------------------------------------


def table(analysis: Analysis, measure: Measure, costs: pd.DataFrame, manifest: Manifest) -> Table:
    """Return the headline table, one row per compared row: change, gain over held-out measures, rank, cost, flags."""
    ranking, multiples = analysis.rankings[measure], cost_multiples(costs)
    based = analysis.base is not None
    columns = [Column("method")]
    about = (measure.unit, measure.higher_is_better, measure.role)
    what = f"{'change in ' * based}{names.measure_name(measure)}"
    columns.append(
        Column(what, *about, names.change_decimals(measure) if based else names.decimals(measure), signed=based)
    )
    columns += [Column("gain, held-out measures", "SD of base", True, signed=True)] if analysis.gains else []
    ranked, timed = len(ranking.order) > 1, len(multiples) > 1
    columns += [Column("rank")] * ranked + [Column("time to train")] * timed + [Column("flag")]
    rows = []
    for label in rows_in_order(analysis, manifest):
        found = analysis.changes[measure][label].estimate if based else analysis.means[measure][label]
        first = _cell(found) if based else estimate_cell(found, measure)
        cells = [Cell(label), first._replace(bold=label == analysis.bold(measure))]
        cells += [_cell(analysis.gains[label].estimate)] if analysis.gains else []
        cells += [Cell(_rank(ranking.ranks.get(label)))] * ranked
        cells += [Cell(f"{_times(multiples[label])}×" if label in multiples else None)] * timed
        rows.append([*cells, Cell("; ".join(flags(analysis, measure, label)) or "none")])
    return Table(columns, rows)


def _cell(found: MeanEstimate) -> Cell:
    """Return the mean and its interval; one of no width, from scores that are all alike, is unknown."""
    return Cell(*found[:3]) if found.lo < found.hi else Cell(found.mean, np.nan, np.nan)


def flags(analysis: Analysis, measure: Measure, label: str) -> list[str]:
    """Return what a reader must know before trusting a row."""
    found = []
    if fell := hacked(analysis, label):
        found.append(f"reward hacking: {_names(fell, plain=True)} {got_worse(fell)}")
    elif fell := harmed(analysis, label):
        found.append(f"worse than {analysis.base} on {_names(fell, plain=True)}")
    return found + _gaps(analysis, measure, label)


def _gaps(analysis: Analysis, measure: Measure, label: str) -> list[str]:
    """Return what the row's numbers rest on, where that is less or less certain than for the others."""
    found = []
    if uneven := [m for m, labels in analysis.unstable.items() if label in labels]:
        found.append(f"unstable between seeds on {_names(uneven, plain=True)}")
    ranking = analysis.rankings[measure]
    if label in ranking.fewer:
        most = max(analysis.means[measure][other].prompts for other in _scored(analysis, measure))
        found.append(f"{ranking.fewer[label]} of {most} prompts")
    used, planned = analysis.means[measure][label].seeds, len(analysis.seeds[label])
    if used and label not in _scored(analysis, measure):
        found.append("some task has no score")
    if used < planned:
        found.append(f"{used} of {planned} seeds")
    alone = [k for k in analysis.compared or analysis.labels if _is_one_run(analysis, measure, k)]
    if label in alone and len(alone) < len(_scored(analysis, measure)):
        found.append("one training run")
    return found


def _is_one_run(analysis: Analysis, measure: Measure, label: str) -> bool:
    once = label in analysis.trained and analysis.means[measure][label].seeds == 1
    return once or analysis.of_weights(label, measure=measure)


def _times(multiple: float) -> str:
    return f"{multiple:.2f}" if multiple < 9.995 else f"{multiple:,.1f}"


def _rank(ends: tuple[int, int] | None) -> str | None:
    if ends is None:
        return None
    return f"{ends[0]} to {ends[1]}" if ends[0] < ends[1] else f"{ends[0]}"


def _legend(analysis: Analysis, measure: Measure, costs: pd.DataFrame, chosen: str) -> str:
    by_task = " It is the mean of task means." if measure.by_task else ""
    parts = [f"The primary measure is {_name(measure)}: {chosen}.{by_task}"]
    if analysis.base:
        parts.append(
            f"Change: same prompt and noise, row minus {escape(analysis.base)}, with its 95 % interval"
            + ("; **bold**: the best row, if its gain is shown." if analysis.bold(measure) else ".")
        )
    if analysis.gains:
        parts.append(f"Gain: over {_names(analysis.summed)}, in standard deviations of the base model's scores.")
    if len(analysis.rankings[measure].order) > 1:
        parts.append("Rank: the places that the comparisons of all pairs leave open (95 %, all rows together).")
    if len(cost_multiples(costs)) > 1:
        parts.append("Time to train: on all devices together, relative to the cheapest row.")
    return " ".join(parts)


# -- words ------------------------------------------------------------------------------------------------------------


def _scored(analysis: Analysis, measure: Measure) -> list[str]:
    rows = analysis.compared if analysis.base else analysis.labels
    return [label for label in rows if np.isfinite(analysis.means[measure][label].mean)]


def _all_alike(analysis: Analysis, measure: Measure, rows: Sequence[str]) -> bool:
    """Return whether every score is that of base on the same image."""
    values = analysis.scores[measure].values
    gaps = [values[label] - values[analysis.base] for label in rows] if analysis.base else [np.array([np.nan])]
    return all((gap[np.isfinite(gap)] == 0).all() and np.isfinite(gap).any() for gap in gaps)


def _name(measure: Measure) -> str:
    return f"{escape(names.measure_name(measure))} [{measure.role}]"


def _names(measures: Iterable[Measure], plain: bool = False) -> str:
    text = listed([names.measure_name(measure) for measure in measures])
    return text if plain else escape(text)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _range(numbers: Sequence[int], what: str) -> str:
    """Return ``2 to 5 seeds``."""
    low, high = min(numbers), max(numbers)
    return _count(high, what) if low == high else f"{low:,} to {_count(high, what)}"

"""Sections of the report about what its numbers support: answers, changes, reward hacking, tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from alignbench.reporting.analysis.comparison import Analysis, Measure, better, worse
from alignbench.reporting.analysis.stats import FEW
from alignbench.reporting.tables import (
    change_text,
    changes_sections,
    got_worse,
    hacked,
    harmed,
    label_means,
    task_table,
    title,
)
from alignbench.reporting.text import names
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, listed

ONE_RUN = """\
every interval and verdict speaks of the weights that were scored, not of the methods; another training run may reverse
them."""
SOME_RUNS = """\
one training run each. What this report says of them speaks of the weights that were scored, not of the methods; another
training run may reverse it."""


def banner(analysis: Analysis) -> str:
    """Return the warning that stands before the first number if rows are a single training run; else ""."""
    alone, compared = single_runs(analysis), analysis.compared or analysis.labels
    if not alone:
        return _once_scored(analysis)
    scored = [label for label in compared if _is_scored(analysis, label)]
    if set(alone) != set(scored):
        words = SOME_RUNS.replace("run each", "run") if len(alone) == 1 else SOME_RUNS
        return "\n\n".join(filter(None, [f"**{escape(listed(alone))}: {words}**", _once_scored(analysis)]))
    unknown = all(label in analysis.published for label in alone)
    return f"**One training {'run of unknown seed' if unknown else 'seed'}: {ONE_RUN}**"


def _once_scored(analysis: Analysis) -> str:
    """Return the warning on measures of which no row has two training runs, though it has on others; else ""."""
    if max(analysis.scored_seeds.values(), default=0) < 2:
        return ""
    once = [
        measure
        for measure, spread in analysis.spreads.items()
        if spread is None and any(analysis.means[measure][label].seeds for label in analysis.trained)
    ]
    return f"**{_names(once)}: scored for one training run of each row. Here {ONE_RUN}**" if once else ""


def single_runs(analysis: Analysis) -> list[str]:
    """Return the rows with scores about which only these weights can be spoken of: one training run, spread unknown."""
    return [label for label in analysis.labels if analysis.of_weights(label) and _is_scored(analysis, label)]


def _is_scored(analysis: Analysis, label: str) -> bool:
    return any(found[label].seeds for found in analysis.means.values())


def levels(analysis: Analysis) -> str:
    """Return what intervals generalize over: "prompts and training seeds", or "prompts" if no row has two seeds."""
    return "prompts and training seeds" if max(analysis.scored_seeds.values(), default=0) > 1 else "prompts"


class Simulated(NamedTuple):
    """Result of simulated studies in which the runs of one method differ four or ten times as much as all others'.

    Six methods, 70 prompts; in percent, from docs/statistics.md.
    """

    covered: str  # intervals of that method that hold the truth
    false: str  # studies without any effect in which some row is called up or down


FEW_SEEDS = {2: Simulated("82 to 84", "15 to 16"), 3: Simulated("87 to 91", "9 to 10"), 5: Simulated("91", "6")}
POOLED = """\
How much training runs differ is estimated over all methods together, {seeds} seeds of {methods} methods here, and a
method's own spread counts where it is clearly larger."""
ALONE = "How much training runs differ is estimated from the {seeds} seeds of one method, the only one here."
UNSTABLE = """\
If the runs of one method differ four to ten times as much as those of the others, its 95 % interval holds the truth in
{} % of simulated studies, and {} % of studies without any effect call some row up or down."""
ONE_DEGREE = """\
**Two methods with two seeds: what their difference says of training runs rests on one degree of freedom.** It may not
be separable although their changes are far apart; a third seed helps most."""
FOUND_UNSTABLE = "**Here the training runs of {} differ more than those of the others.**"
BORROWED = "{} has a single training seed: the spread of its runs is taken from the other methods."


def few_seeds_note(analysis: Analysis) -> str:
    """Return the note on how the spread between training runs is known; "" if nothing is said of trained methods."""
    seeds = {k: n for k, n in analysis.scored_seeds.items() if n and k in analysis.compared}
    if max(seeds.values(), default=0) < 2:
        return ""
    notes = few_seeds(min(n for n in seeds.values() if n > 1), len(seeds))
    unstable = dict.fromkeys(label for labels in analysis.unstable.values() for label in labels)
    notes += [FOUND_UNSTABLE.format(escape(listed([*unstable])))] if unstable else []
    notes += [BORROWED.format(escape(label)) for label, n in seeds.items() if n == 1]
    return "\n".join(notes)


def few_seeds(seeds: int, methods: int) -> list[str]:
    """Return what is known of intervals with this many training seeds and trained methods."""
    simulated = FEW_SEEDS[max(count for count in FEW_SEEDS if count <= seeds)]
    if methods == 1:
        return [ALONE.format(seeds=seeds)]
    pair = [ONE_DEGREE] * (methods == seeds == 2)
    return [POOLED.format(seeds=seeds, methods=methods), *pair, UNSTABLE.format(*simulated)]


VERDICTS = """\
Verdicts: p < 0.05 after Holm's correction over the methods named here. Tables of all pairs correct over more, and may
separate fewer. Not separable does not mean equal."""


def answers(questions: Sequence[tuple[str, Sequence[str]]], analysis: Analysis) -> list[str]:
    """Return a heading for each question, and below it an answer with its evidence for each measure.

    Where a row is a single training run there is no question about methods: the heading names the weights.
    """
    sections = []
    for subject, named in questions:
        rivals = [rival for rival in named if rival in analysis.labels]
        if subject not in analysis.labels or not rivals:
            continue
        against = escape(listed(rivals))
        asked = f"Does {escape(subject)} beat {against}?"
        weights = f"{escape(subject)} against {against}: the weights that were scored"
        directed = [measure for measure in analysis.measures if measure.higher_is_better is not None]
        lines = [_answer(subject, rivals, measure, analysis) for measure in reversed(directed)]
        heading = weights if analysis.of_weights(subject, *rivals) else asked
        sections += [f"## {heading}", "\n".join(lines), VERDICTS]
    return sections


def _answer(subject: str, rivals: Sequence[str], measure: Measure, analysis: Analysis) -> str:
    results = dict(zip(rivals, analysis.compare(measure, [(subject, rival) for rival in rivals])))
    verdicts = {
        "better than": [rival for rival in rivals if better(results[rival], measure)],
        "worse than": [rival for rival in rivals if worse(results[rival], measure)],
        "not separable from": [rival for rival in rivals if results[rival].verdict == "cannot tell"],
        "identical to": [rival for rival in rivals if results[rival].verdict == "identical"],
        "not compared with": [r for r in rivals if results[r].verdict in ("not measured", "spread unknown")],
    }
    verdict = "; ".join(f"{words} {escape(listed(rows))}" for words, rows in verdicts.items() if rows)
    won = verdicts["better than"]
    short = "Yes" if len(won) == len(rivals) else "Partly" if won else "Not shown"
    if verdicts["worse than"] and not won:
        short = "No"
    if any(result.weights for result in results.values()) or analysis.of_weights(subject, *rivals):
        short = "These weights"
    evidence = "; ".join(f"{escape(r)} {change_text(result.estimate, measure)}" for r, result in results.items())
    return f"- {escape(title(measure))} [{measure.role}]: **{short}**: {verdict}. Paired differences: {evidence}."


def changes_section(analysis: Analysis, imported: bool = False) -> list[Section]:
    """Return the section on paired changes against the base model."""
    if analysis.base is None:
        return ["## Paired change", "The sweep has no untrained method to compare with."]
    noise = "noise unknown" if imported else "same noise"
    alone = any(change.weights for changes in analysis.changes.values() for change in changes.values())
    unknown = " It is unknown for a row that is a single training run." if alone else ""
    note = f"""\
Image by image: same prompt, {noise}. The p-value tests "no change" (t statistic with the bootstrap's standard error
and Satterthwaite's degrees of freedom), corrected over all methods of a measure; up and down: p < 0.05. *SE, prompts*
takes these training runs as given; *SE, prompts and seeds* generalizes to training runs with any seed.{unknown}"""
    heading = f"## Paired change against {escape(analysis.base)}"
    return [heading, *changes_sections(analysis), note, few_seeds_note(analysis)]


HACKING_NOTE = """\
*Reward hacking*: the reward that a method was trained on rose while another score fell. *Worse than {base}*: a score
fell, and the reward is not shown to have risen: not hacking, but a loss all the same. All by the paired changes above;
a score that is not shown to fall may have fallen."""


def hacking_section(analysis: Analysis, costs: pd.DataFrame) -> list[Section]:
    """Return the section on the training reward, and on the scores that each method lowered."""
    if not analysis.trained and not analysis.compared:
        return []
    parts: list[Section] = ["## Training reward, and reward hacking"]
    if analysis.trained:
        columns = [Column("method"), Column("reward, first 10 % of updates", decimals=4)]
        columns += [Column("reward, last 10 %", decimals=4), Column("change", decimals=4, signed=True)]
        rows, means = [], label_means(costs, ["reward_first", "reward_last"])
        for label in analysis.trained:
            first, last = means.get(label, {"first": math.nan, "last": math.nan}).values()
            rows.append([Cell(label), Cell(first), Cell(last), Cell(last - first)])
        note = "Means over finished seeds of the reward on the images that the method generated during training."
        parts += [Table(columns, rows), note, _rewards_note(analysis)]
    lines = [_hacking_line(analysis, label) for label in analysis.compared]
    return [*parts, "\n".join(lines), HACKING_NOTE.format(base=escape(analysis.base or "")) if lines else ""]


def _rewards_note(analysis: Analysis) -> str:
    """Return which rows were trained on which scores, if that differs; else ""."""
    by_label = {k: [names.measure_name(m) for m in analysis.trained_on(k)] for k in analysis.trained}
    if len(set(map(tuple, by_label.values()))) < 2:
        return ""
    told = "; ".join(f"{escape(k)} {escape(listed(v)) if v else 'none of these scores'}" for k, v in by_label.items())
    return f"The rows were trained on different rewards: {told}. A score that any row was trained on is marked [train]."


def _hacking_line(analysis: Analysis, label: str) -> str:
    """Return the line of one method, one of three: reward hacking, worse than base, or nothing shown to fall."""
    verdicts = {m: found[label].verdict for m, found in analysis.changes.items()}
    told = ", ".join(f"{escape(title(m))} [{m.role}] {verdict}" for m, verdict in verdicts.items())
    name = escape(label) + " (these weights)" * analysis.of_weights(label)
    rewards = analysis.trained_on(label) if label in analysis.trained else []
    if fell := hacked(analysis, label):
        return (
            f"- **REWARD HACKING, {name}: the training reward rose while {_names(fell)} {got_worse(fell)}.** ({told})"
        )
    if lost := harmed(analysis, label):
        reward = ", whatever the reward did" * bool(set(lost) - set(rewards)) if rewards else "; its reward is unknown"
        return f"- **{name}: worse than {escape(analysis.base or '')} on {_names(lost)}{reward}.** ({told})"
    hacking = "no reward hacking shown, and no score shown to fall" if rewards else "no score shown to fall"
    return f"- {name}: {hacking} ({told})."


def _names(measures: Sequence[Measure]) -> str:
    return escape(listed([title(measure) for measure in measures]))


FEW_PROMPTS = f"Fewer than {FEW} prompts: no interval, since they say too little about other prompts of their task."


def task_sections(analysis: Analysis) -> list[Section]:
    """Return a heading and a table for each measure that is averaged by task."""
    sections: list[Section] = []
    for measure in analysis.measures:
        if not measure.by_task:
            continue
        heading = f"## {escape(names.measure_name(measure))} [{measure.role}], by task"
        least = min(Counter(analysis.scores[measure].tags.tolist()).values(), default=FEW)
        note = FEW_PROMPTS if least < FEW and measure.unit == "fraction" else ""
        sections += [heading, task_table(analysis, measure), note]
    return sections

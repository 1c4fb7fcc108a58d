"""Sections of the report about what its numbers support: answers, changes, reward hacking, tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from alignbench.reporting import names
from alignbench.reporting.analysis.comparison import Analysis, Measure, better, worse
from alignbench.reporting.tables import change_text, changes_sections, hacked, label_means, task_table, title
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, listed
from alignbench.store.manifest import Manifest

POOLED_NOTE = """\
Few seeds say little about how much training runs differ, so the spread between runs is taken as the larger of the
method's own and that of all methods pooled. If the runs of one method differ many times more than those of the others,
its interval is too short (simulated coverage: 78 to 88 % instead of 95 % with two seeds, 85 to 89 % with three, 90 to
92 % with five)."""

VERDICTS = "Verdicts: p < 0.05 after Holm's correction over the methods named."


def answers(questions: Sequence[tuple[str, Sequence[str]]], analysis: Analysis) -> list[str]:
    """Return a heading for each question, and below it an answer with its evidence for each measure."""
    sections = []
    for subject, named in questions:
        rivals = [rival for rival in named if rival in analysis.labels]
        if subject not in analysis.labels or not rivals:
            continue
        lines = [f"## Does {escape(subject)} beat {escape(listed(rivals))}?"]
        directed = [measure for measure in analysis.measures if measure.higher_is_better is not None]
        lines += [_answer(subject, rivals, measure, analysis) for measure in reversed(directed)]
        sections += [lines[0], "\n".join(lines[1:]), VERDICTS]
    return sections


def _answer(subject: str, rivals: Sequence[str], measure: Measure, analysis: Analysis) -> str:
    results = dict(zip(rivals, analysis.compare(measure, [(subject, rival) for rival in rivals])))
    verdicts = {
        "better than": [rival for rival in rivals if better(results[rival], measure)],
        "worse than": [rival for rival in rivals if worse(results[rival], measure)],
        "not distinguishable from": [rival for rival in rivals if results[rival].verdict == "cannot tell"],
        "not compared with": [r for r in rivals if results[r].verdict in ("not measured", "spread unknown")],
    }
    verdict = "; ".join(f"{words} {escape(listed(names))}" for words, names in verdicts.items() if names)
    won = verdicts["better than"]
    short = "Yes" if len(won) == len(rivals) else "Partly" if won else "Not shown"
    if verdicts["worse than"] and not won:
        short = "No"
    evidence = "; ".join(f"{escape(r)} {change_text(result.estimate, measure)}" for r, result in results.items())
    return f"- {escape(title(measure))} [{measure.role}]: **{short}**: {verdict}. Paired differences: {evidence}."


def changes_section(analysis: Analysis, imported: bool = False) -> list[Section]:
    """Return the section on paired changes against the base model."""
    if analysis.base is None:
        return ["## Paired change", "The sweep has no untrained method to compare with."]
    noise = "noise unknown" if imported else "same noise"
    note = f"""\
Image by image: same prompt, {noise}. The p-value tests "no change" (t statistic with the bootstrap's standard error
and Satterthwaite's degrees of freedom), corrected over all methods of a measure; up and down: p < 0.05. *SE, prompts*
takes these training runs as given; *SE, prompts and seeds* generalizes to training runs with any seed."""
    heading = f"## Paired change against {escape(analysis.base)}"
    return [heading, *changes_sections(analysis), note, seeds_note(analysis)]


def seeds_note(analysis: Analysis) -> str:
    """Return the warning about few seeds; empty if nothing was trained."""
    changes = [(label, change) for found in analysis.changes.values() for label, change in found.items()]
    used = [change.estimate.seeds for label, change in changes if label in analysis.trained]
    if max(used, default=0) == 1:
        return "**One training seed: how much training runs differ is unknown, and no interval here accounts for it.**"
    return POOLED_NOTE if max(used, default=0) > 1 else ""


def one_run_note(manifest: Manifest) -> str:
    """Return the warning about published weights: a single training run, whose spread is unknown; or ""."""
    labels = list(dict.fromkeys(run.label for run in manifest.runs if run.published))
    what = "one training run of unknown seed: how much runs differ is unknown, and no interval accounts for it."
    return f"**{escape(listed(labels))}: {what}**" if labels else ""


def hacking_section(analysis: Analysis, costs: pd.DataFrame) -> list[Section]:
    """Return the section on the training reward, with a verdict on reward hacking for each trained method."""
    if not analysis.trained:
        return []
    columns = [Column("method"), Column("reward, first 10 % of updates", decimals=4)]
    columns += [Column("reward, last 10 %", decimals=4), Column("change", decimals=4, signed=True)]
    rows, means = [], label_means(costs, ["reward_first", "reward_last"])
    for label in analysis.trained:
        first, last = means.get(label, {"first": math.nan, "last": math.nan}).values()
        rows.append([Cell(label), Cell(first), Cell(last), Cell(last - first)])
    lines = [_hacking_line(analysis, label) for label in analysis.trained if analysis.base is not None]
    note = "Means over finished seeds of the reward on the images that the method generated during training."
    return ["## Training reward, and reward hacking", Table(columns, rows), note, "\n".join(lines)]


def _hacking_line(analysis: Analysis, label: str) -> str:
    verdicts = {m: found[label].verdict for m, found in analysis.changes.items()}
    told = ", ".join(f"{escape(title(m))} [{m.role}] {verdict}" for m, verdict in verdicts.items())
    fell = hacked(analysis, label)
    if fell:
        names = escape(listed([title(measure) for measure in fell]))
        return f"- **REWARD HACKING, {escape(label)}: the training reward rose while {names} fell.** ({told})"
    return f"- {escape(label)}: no reward hacking shown ({told})."


def task_sections(analysis: Analysis) -> list[Section]:
    """Return a heading and a table for each measure that is averaged by task."""
    sections: list[Section] = []
    for measure in analysis.measures:
        if not measure.by_task:
            continue
        heading = f"## {escape(names.measure_name(measure))} [{measure.role}], by task"
        sections += [heading, task_table(analysis, measure)]
    return sections

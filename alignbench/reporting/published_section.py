"""Sections of the report that compare our numbers with published ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alignbench.reporting.analysis.comparison import Analysis, Measure
from alignbench.reporting.analysis.published import (
    DIFFERS,
    NOT_STATED,
    WITHIN,
    Comparison,
    Reference,
    compare,
)
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, interval, number
from alignbench.store.manifest import Manifest

NOTE = """\
What would another lab's training run give on the same prompts, with a seed and noise of its own? Ours and the
difference, ours minus theirs, are in the published unit; published is as printed. Around the difference stands the
**replication error**: image noise and the spread between training runs, both on both sides, and half a unit of the last
printed digit. A printed standard error replaces our estimate for their side if it is larger. The base model and
released weights are taken to be the same weights on both sides, where only images vary.

- **within replication error (x)**: the difference is at most x, as in 95 % of true agreements or more. **differs**: it
  is larger.
- one training run: no verdict: how much training runs differ is unknown.
- spread unknown: with one image per prompt, the spread over prompts is an upper bound of image noise; what exceeds it
  differs, about the rest nothing is known. Nor is it if all scores are equal.
- protocol differs: the row was made under another protocol; the difference is shown, but no conclusion is drawn.
- not run: published, but not among this sweep's numbers. no reference: ours, but not published there.

Verdicts are not corrected for multiple comparisons: of 30 numbers that truly agree, up to 1.5 are expected to be called
"differs", and several at once where they score the same images."""
ONE_SEED = "**One training run per row: no verdict on trained rows.**"


def sections(manifest: Manifest, analysis: Analysis, references: Sequence[Reference]) -> list[Section]:
    """Return the chapter "Published numbers"; empty if the sweep names no published table."""
    if not references:
        return []
    lines: list[Section] = ["## Published numbers", NOTE]
    seeds = [analysis.means[measure][label].seeds for measure in analysis.measures for label in analysis.trained]
    if max(seeds, default=0) == 1:
        lines.append(ONE_SEED)
    for reference in references:
        source = reference.source
        rows = compare(reference, manifest, analysis)
        reasons = list(dict.fromkeys(row.reasons for row in rows if row.reasons))
        silent = [path for path, stated in source.protocol.items() if stated == NOT_STATED]
        lines += [f"### {escape(source.citation)}, {escape(source.place)}", escape(source.url)]
        lines += [escape(source.note)] if source.note else []
        lines.append(shown(reference, rows, reasons))
        lines.append("\n".join(f"- ({i + 1}) {escape('; '.join(why))}" for i, why in enumerate(reasons)))
        lines.append(f"Not stated there: {escape(', '.join(silent))}." if silent else "")
    unprinted = _unprinted(analysis.measures, references)
    return [*lines, f"Without a published number: {escape(', '.join(unprinted))}." if unprinted else ""]


def shown(reference: Reference, rows: Sequence[Comparison], reasons: Sequence[tuple[str, ...]] = ()) -> Table:
    """Return one row per published number, and per number of ours without one. ``reasons`` are cited by number."""
    columns = [
        Column(name) for name in ("published row", "our row", "metric", "ours", "published", "difference", "verdict")
    ]
    cells = []
    for row in rows:
        printed = reference.source.metrics.get(row.metric)
        decimals = printed.decimals if printed else 4
        theirs = row.published
        published = f"{theirs.value} ± {theirs.se}" if theirs and theirs.se else theirs.value if theirs else None
        texts = [row.method or None, row.label or None, row.metric, number(row.ours.mean, decimals), published]
        texts.append(_difference(row, decimals + 1))
        verdict = f"{row.verdict} ({reasons.index(row.reasons) + 1})" if row.reasons in reasons else row.verdict
        verdict += f" ({number(row.error, decimals + 1)})" if row.verdict == WITHIN else ""
        cells.append([*map(Cell, texts), Cell(verdict, bold=row.verdict in (WITHIN, DIFFERS))])
    return Table(columns, cells)


def _difference(row: Comparison, decimals: int) -> str:
    """Return the difference with its interval; where only a bound of that is known, it is shown if it is exceeded."""
    error = math.nan if row.bound and row.verdict != DIFFERS else row.error
    return interval(row.difference, row.difference - error, row.difference + error, decimals, signed=True)


def beside(reference: Reference, manifest: Manifest, analysis: Analysis) -> Table:
    """Return one published table beside ours, without the reasons why protocols differ."""
    return shown(reference, compare(reference, manifest, analysis))


def tidy(references: Sequence[Reference], manifest: Manifest, analysis: Analysis) -> Table:
    """Return all comparisons in full precision, one row each."""
    names = [
        "place",
        "method",
        "label",
        "metric",
        "published",
        "published_se",
        "rounding",
        "ours",
        "ours_lo",
        "ours_hi",
    ]
    names += ["prompts", "seeds", "difference", "replication_error", "error_is_bound", "verdict", "protocol_differs_in"]
    rows = []
    for reference in references:
        for row in compare(reference, manifest, analysis):
            theirs, ours = row.published, row.ours
            printed = [theirs.value, theirs.se, theirs.rounding] if theirs else [None] * 3
            values: list[Any] = [reference.name, row.method, row.label, row.metric, *printed, *ours[:3]]
            error = [row.error, "yes" if row.bound else "no"] if not math.isnan(row.error) else [None] * 2
            values += [ours.prompts, ours.seeds, row.difference, *error, row.verdict, "; ".join(row.reasons)]
            rows.append(list(map(Cell, values)))
    return Table([Column(name) for name in names], rows)


def _unprinted(measures: Sequence[Measure], references: Sequence[Reference]) -> list[str]:
    printed = {printed.metric for reference in references for printed in reference.source.metrics.values()}
    return [measure.name for measure in measures if measure.name not in printed]

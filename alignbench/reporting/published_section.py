"""Sections of the report that compare our numbers with published ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignbench.reporting.analysis.comparison import Analysis, Measure
from alignbench.reporting.analysis.published import (
    AGREES,
    DIFFERS,
    NOT_STATED,
    Comparison,
    Reference,
    compare,
)
from alignbench.reporting.text.table import Cell, Column, Section, Table, escape, interval
from alignbench.store.manifest import Manifest

NOTE = """\
Ours with its 95 % interval, in the published unit; published as printed; the difference, ours minus theirs, with that
interval widened by half a unit of the last printed digit (and by the published standard error, if there is one).
**agrees**: the interval of the difference contains zero; **differs**: it does not. Verdicts are not corrected for
multiple comparisons. Without a printed standard error, chance in the published number is unknown and missing from the
interval: of rows that truly agree, one in six or more is called "differs". protocol differs: the row was made under
another protocol than the published one; the difference is shown, but no conclusion is drawn. not run: published, but
not among this sweep's numbers. no reference: ours, but not published there."""
ONE_SEED = "**One training seed: neither our intervals nor these verdicts account for how much training runs differ.**"


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
        texts = [row.method or None, row.label or None, row.metric, interval(*row.ours[:3], decimals), published]
        texts.append(interval(*row.difference, decimals + 1, signed=True))
        verdict = f"{row.verdict} ({reasons.index(row.reasons) + 1})" if row.reasons in reasons else row.verdict
        cells.append([*map(Cell, texts), Cell(verdict, bold=row.verdict in (AGREES, DIFFERS))])
    return Table(columns, cells)


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
    names += ["prompts", "seeds", "difference", "difference_lo", "difference_hi", "verdict", "protocol_differs_in"]
    rows = []
    for reference in references:
        for row in compare(reference, manifest, analysis):
            theirs, ours = row.published, row.ours
            printed = [theirs.value, theirs.se, theirs.rounding] if theirs else [None] * 3
            values: list[Any] = [reference.name, row.method, row.label, row.metric, *printed, *ours[:3]]
            values += [ours.prompts, ours.seeds, *row.difference, row.verdict, "; ".join(row.reasons)]
            rows.append(list(map(Cell, values)))
    return Table([Column(name) for name in names], rows)


def _unprinted(measures: Sequence[Measure], references: Sequence[Reference]) -> list[str]:
    printed = {printed.metric for reference in references for printed in reference.source.metrics.values()}
    return [measure.name for measure in measures if measure.name not in printed]

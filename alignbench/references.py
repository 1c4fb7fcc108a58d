"""Published numbers beside ours: what was printed, where, how it was made, and whether ours agree.

A published table is two things in ``reports/published``: ``<paper>-<place>.csv`` (method, metric, value, se; the value
as printed, trailing zeros kept) and its entry in ``sources.yaml``. A report module names the tables that its sweep
makes again (``PUBLISHED``). Nothing is filled in: a row or a cell without a partner is shown as that.

When do two numbers agree? Let ours be x = a + e with a 95 % interval [x - l, x + u], and the published y = b + e' + r,
where r is rounding, at most half a unit of the last printed digit (h). Then a - b = (x - y) - e + e' + r, so

    [x - y - sqrt(l^2 + (1.96 se')^2) - h,  x - y + sqrt(u^2 + (1.96 se')^2) + h]

holds a - b with a probability of at least 95 %, se' being the standard error of y. They agree if it contains zero.
Few tables print se'. Then e' is unknown, no interval for a - b can be had, and se' = 0 asks something weaker: whether
the very number that was printed is one that our interval allows. It is the stricter question: if both sides measured
the same thing equally well, the difference has sqrt(2) times our error, and 2 (1 - Phi(1.96 / sqrt(2))) = 17 % of true
agreements are called "differs", not 5 %; more if ours is a mean over several trainings and theirs is one.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from alignbench.analysis import Analysis, Measure
from alignbench.config import Config, UserError, decode, did_you_mean, parse_yaml, pick, read_text
from alignbench.manifest import Manifest, ManifestRun
from alignbench.stats import Estimate
from alignbench.table import Cell, Column, Section, Table, escape, interval

COLUMNS = ["method", "metric", "value", "se"]
CURVE = ["method", "update", "metric", "value"]  # of a published curve, read off a picture: no verdict is drawn from it
NOT_STATED = "not stated"
AGREES, DIFFERS, PROTOCOL, UNKNOWN = "agrees", "differs", "protocol differs", "spread unknown"
NO_REFERENCE, NOT_RUN = "no reference", "not run"
EVALUATION = ("evaluation.", "backend.name", "backend.model")  # all that shapes the pictures of a row without training
NOTE = """\
Ours with its 95 % interval, in the published unit; published as printed; the difference, ours minus theirs, with that
interval widened by half a unit of the last printed digit (and by the published standard error, where there is one).
**agrees**: it contains zero; **differs**: it does not. Each verdict stands for itself, without correction for their
number. Where no published standard error is printed, chance in the published number is unknown and not in the
interval: of rows that agree in truth, one in six or more is called "differs". protocol differs: the row was made in
another way than the published one; the difference is shown and nothing is concluded from it. not run: published,
and not in this sweep's numbers. no reference: ours, and not published there."""
ONE_SEED = "**One training seed: our intervals do not contain how much trainings differ, nor do these verdicts.**"


class Printed(Config):
    """A published metric in our terms: printed value = ``scale`` x ours. ``task``: the mean of one task of ours."""

    metric: str
    scale: Annotated[float, Meta(gt=0)] = 1.0
    decimals: Annotated[int, Meta(ge=0, le=10)] = 4
    task: str | None = None


class Row(Config):
    """A published method: our labels (none given: its own name), and where its protocol is not the table's."""

    labels: list[str] | None = None
    protocol: dict[str, Any] = msgspec.field(default_factory=dict)


class Source(Config):
    """Where a table was printed, how its numbers were made, and what its names are called here."""

    citation: str
    url: str
    place: str
    protocol: dict[str, Any]  # path of a setting, as in a sweep -> value, or "not stated"
    metrics: dict[str, Printed]  # by printed name
    methods: dict[str, str | list[str] | Row] = msgspec.field(default_factory=dict)  # by printed name: our labels
    note: str = ""


class Figure(NamedTuple):
    """One printed number. ``value`` and ``se`` as printed; ``se`` is empty where none is."""

    method: str
    metric: str
    value: str
    se: str = ""

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit."""
        mantissa, _, exponent = self.value.lower().partition("e")
        return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


class Point(NamedTuple):
    """One point of a published curve, as read off its picture."""

    method: str
    update: int
    metric: str
    value: float


class Reference(NamedTuple):
    """A published table, or a published curve, which has points in place of figures."""

    name: str
    source: Source
    figures: Sequence[Figure] = ()
    points: Sequence[Point] = ()

    def labels(self, method: str) -> list[str]:
        """Our rows of a published method."""
        found = self.source.methods.get(method, method)
        labels = found.labels if isinstance(found, Row) else found
        return [labels] if isinstance(labels, str) else [method] if labels is None else labels

    def protocol(self, method: str) -> dict[str, Any]:
        """What is stated of how the method's numbers were made."""
        found = self.source.methods.get(method)
        return self.source.protocol | (found.protocol if isinstance(found, Row) else {})


class Comparison(NamedTuple):
    """One published number and ours, in the published unit; one of them may be missing."""

    method: str  # as printed; empty: only ours
    label: str  # ours; empty: this sweep has no such row
    metric: str  # as printed
    ours: Estimate
    figure: Figure | None
    difference: tuple[float, float, float]  # with its limits; nan where it is not known
    verdict: str
    reasons: tuple[str, ...] = ()  # how the protocol differs


# -- reading ----------------------------------------------------------------------------------------------------------


def published() -> Path:
    """The folder of the packaged tables."""
    found = importlib.util.find_spec("alignbench.reports")
    folders = (found and found.submodule_search_locations) or ["reports"]
    return Path(folders[0]) / "published"


def load(name: str, folder: Path | None = None) -> Reference:
    """A published table by the stem of its file. UserError where file and entry are not what they should be."""
    folder = folder or published()
    source = _source(name, folder)
    return Reference(name, source, _figures(folder / f"{name}.csv"))


def load_curve(name: str, folder: Path | None = None) -> Reference:
    """A published curve by the stem of its file. UserError where file and entry are not what they should be."""
    folder = folder or published()
    path = folder / f"{name}.csv"
    rows = list(filter(None, csv.reader(io.StringIO(read_text(path)))))
    if rows[:1] != [CURVE]:
        raise UserError(f"{path}:1: expected the columns {','.join(CURVE)}")
    points = [Point(method, int(update), metric, float(value)) for method, update, metric, value in rows[1:]]
    return Reference(name, _source(name, folder), points=points)


def _source(name: str, folder: Path) -> Source:
    sources = parse_yaml(read_text(folder / "sources.yaml"), str(folder / "sources.yaml")) or {}
    if name not in sources:
        raise UserError(f"{folder / 'sources.yaml'}: there is no table '{name}'{did_you_mean(name, sources, 'tables')}")
    return decode(Source, sources[name], f"{folder / 'sources.yaml'}: {name}")


def _figures(path: Path) -> list[Figure]:
    reader = csv.reader(io.StringIO(read_text(path)))
    if next(reader, []) != COLUMNS:
        raise UserError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
    found: dict[tuple[str, str], Figure] = {}
    for row in filter(None, reader):
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}:{reader.line_num}: expected {len(COLUMNS)} fields, got {len(row)}")
        figure = Figure(*row)
        for field, text in (("value", figure.value), ("se", figure.se or "0")):
            if not _is_number(text):
                raise UserError(f"{path}:{reader.line_num}: {field}: '{text}' is not a number; leave out such a row")
        if figure[:2] in found:
            raise UserError(f"{path}:{reader.line_num}: {figure.method}, {figure.metric} was there before")
        found[figure[:2]] = figure
    return list(found.values())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and text == text.strip() and "_" not in text
    except ValueError:
        return False


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(reference: Reference, manifest: Manifest, analysis: Analysis) -> list[Comparison]:
    """Every published number with ours, in the order of the paper, then our rows of which it prints nothing."""
    metrics = list(dict.fromkeys([figure.metric for figure in reference.figures] + list(reference.source.metrics)))
    ours = {metric: _means(analysis, reference.source.metrics.get(metric)) for metric in metrics}
    rows = []
    for figure in reference.figures:
        known = [label for label in reference.labels(figure.method) if label in analysis.labels]
        for label in known or [""]:
            rows.append(_compared(reference, manifest, figure, label, ours[figure.metric].get(label, Estimate())))
    paired = {(row.label, row.metric) for row in rows}
    for label in analysis.labels:
        for metric in metrics:
            mean = ours[metric].get(label)
            if mean is not None and (label, metric) not in paired:
                rows.append(Comparison("", label, metric, mean, None, _unknown(), NO_REFERENCE))
    return rows


def _means(analysis: Analysis, printed: Printed | None) -> dict[str, Estimate]:
    """label -> our mean in the printed unit; nothing where this sweep does not measure it."""
    measure = next((m for m in analysis.measures if printed and m.name == printed.metric), None)
    if printed is None or measure is None:
        return {}
    means = analysis.averages(measure, printed.task) if printed.task else analysis.means[measure]
    scale = printed.scale
    return {
        label: found._replace(mean=found.mean * scale, lo=found.lo * scale, hi=found.hi * scale, se=found.se * scale)
        for label, found in means.items()
        if not math.isnan(found.mean)
    }


def _compared(reference: Reference, manifest: Manifest, figure: Figure, label: str, ours: Estimate) -> Comparison:
    if math.isnan(ours.mean):
        return Comparison(figure.method, label, figure.metric, ours, figure, _unknown(), NOT_RUN)
    reasons = departures(reference.protocol(figure.method), manifest, manifest.rows[label][0])
    if ours.dropped:
        reasons.append(f"prompts left out here: {ours.dropped}")
    found = difference(ours, figure)
    verdict = AGREES if found[1] <= 0 <= found[2] else UNKNOWN if math.isnan(found[1]) else DIFFERS
    if reasons:
        verdict = PROTOCOL
    return Comparison(figure.method, label, figure.metric, ours, figure, found, verdict, tuple(reasons))


def _unknown() -> tuple[float, float, float]:
    return math.nan, math.nan, math.nan


def difference(ours: Estimate, figure: Figure) -> tuple[float, float, float]:
    """Ours minus the published value, with the limits that are derived on this module's first page."""
    theirs = 1.96 * float(figure.se or 0)
    middle = ours.mean - float(figure.value)
    down, up = (math.hypot(side, theirs) + figure.rounding for side in (ours.mean - ours.lo, ours.hi - ours.mean))
    return middle, middle - down, middle + up


def departures(protocol: dict[str, Any], manifest: Manifest, run: ManifestRun) -> list[str]:
    """Every stated setting that this run was not made with, as ``path: value there; value here``.

    A row that trains nothing has the settings of its sweep's trainings, which made no picture of it: what counts there
    is the model and the evaluation.
    """
    found = ["REHEARSAL: small random models"] if manifest.rehearsal else []
    if manifest.subset:
        found.append(f"SUBSET: the first {manifest.subset} evaluation prompts")
    for path, stated in protocol.items():
        counts = run.trained or path.startswith(EVALUATION)
        mine = _setting(run, path)
        if counts and stated != NOT_STATED and not _equal(stated, mine):
            found.append(f"{path}: {_said(stated)} there, {_said(mine)} here")
    return found


def _setting(run: ManifestRun, path: str) -> Any:
    """The run's resolved value; None where it has none. ``reward`` alone is the evaluators' names."""
    if path == "reward":
        return [part["evaluator"]["name"] for part in run.rewards]
    try:
        return pick({**run.settings, "evaluation": run.protocol}, path)
    except KeyError:
        return None


def _equal(stated: Any, mine: Any) -> bool:
    if isinstance(stated, list) or isinstance(mine, list):
        left, right = (value if isinstance(value, list) else [value] for value in (stated, mine))
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(stated, (int, float)) and isinstance(mine, (int, float)):
        return math.isclose(stated, mine, rel_tol=1e-9)
    return stated == mine


def _said(value: Any) -> str:
    return "none" if value in (None, []) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- showing ----------------------------------------------------------------------------------------------------------


def sections(manifest: Manifest, analysis: Analysis, references: Sequence[Reference]) -> list[Section]:
    """ "Published numbers"; empty if the sweep names no published table."""
    if not references:
        return []
    lines: list[Section] = ["## Published numbers", NOTE]
    trained = [
        found.seeds
        for m in analysis.measures
        for label, found in analysis.means[m].items()
        if label in analysis.trained
    ]
    if max(trained, default=0) == 1:
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
    """One row per published number, and per number of ours without one; ``reasons`` are referred to by their number."""
    columns = [
        Column(name) for name in ("published row", "our row", "metric", "ours", "published", "difference", "verdict")
    ]
    shown = []
    for row in rows:
        printed = reference.source.metrics.get(row.metric)
        decimals = printed.decimals if printed else 4
        figure = row.figure
        published = f"{figure.value} ± {figure.se}" if figure and figure.se else figure.value if figure else None
        texts = [row.method or None, row.label or None, row.metric, interval(*row.ours[:3], decimals), published]
        texts.append(interval(*row.difference, decimals + 1, signed=True))
        verdict = f"{row.verdict} ({reasons.index(row.reasons) + 1})" if row.reasons in reasons else row.verdict
        shown.append([*map(Cell, texts), Cell(verdict, bold=row.verdict in (AGREES, DIFFERS))])
    return Table(columns, shown)


def beside(reference: Reference, manifest: Manifest, analysis: Analysis) -> Table:
    """One published table with ours; what differs in the protocol stands in the page."""
    return shown(reference, compare(reference, manifest, analysis))


def tidy(references: Sequence[Reference], manifest: Manifest, analysis: Analysis) -> Table:
    """The same in full precision: one row per comparison."""
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
            figure, ours = row.figure, row.ours
            printed = [figure.value, figure.se, figure.rounding] if figure else [None] * 3
            values: list[Any] = [reference.name, row.method, row.label, row.metric, *printed, *ours[:3]]
            values += [ours.prompts, ours.seeds, *row.difference, row.verdict, "; ".join(row.reasons)]
            rows.append(list(map(Cell, values)))
    return Table([Column(name) for name in names], rows)


def _unprinted(measures: Sequence[Measure], references: Sequence[Reference]) -> list[str]:
    printed = {printed.metric for reference in references for printed in reference.source.metrics.values()}
    return [measure.name for measure in measures if measure.name not in printed]

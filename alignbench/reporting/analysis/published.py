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

from alignbench.config import Config, UserError, decode, did_you_mean, parse_yaml, pick, read_text
from alignbench.reporting.analysis.comparison import Analysis
from alignbench.reporting.analysis.stats import MeanEstimate
from alignbench.store.manifest import Manifest, ManifestRun

COLUMNS = ["method", "metric", "value", "se"]
CURVE = ["method", "update", "metric", "value"]  # of a published curve, read off a picture: no verdict is drawn from it
NOT_STATED = "not stated"
AGREES, DIFFERS, PROTOCOL, UNKNOWN = "agrees", "differs", "protocol differs", "spread unknown"
NO_REFERENCE, NOT_RUN = "no reference", "not run"
EVALUATION = ("evaluation.", "backend.name", "backend.model")  # all that shapes the pictures of a row without training


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


class PublishedNumber(NamedTuple):
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
    figures: Sequence[PublishedNumber] = ()
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
    ours: MeanEstimate
    figure: PublishedNumber | None
    difference: tuple[float, float, float]  # with its limits; nan where it is not known
    verdict: str
    reasons: tuple[str, ...] = ()  # how the protocol differs


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


def _figures(path: Path) -> list[PublishedNumber]:
    reader = csv.reader(io.StringIO(read_text(path)))
    if next(reader, []) != COLUMNS:
        raise UserError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
    found: dict[tuple[str, str], PublishedNumber] = {}
    for row in filter(None, reader):
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}:{reader.line_num}: expected {len(COLUMNS)} fields, got {len(row)}")
        figure = PublishedNumber(*row)
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


def compare(reference: Reference, manifest: Manifest, analysis: Analysis) -> list[Comparison]:
    """Every published number with ours, in the order of the paper, then our rows of which it prints nothing."""
    metrics = list(dict.fromkeys([figure.metric for figure in reference.figures] + list(reference.source.metrics)))
    ours = {metric: _means(analysis, reference.source.metrics.get(metric)) for metric in metrics}
    rows = []
    for figure in reference.figures:
        known = [label for label in reference.labels(figure.method) if label in analysis.labels]
        for label in known or [""]:
            rows.append(_compared(reference, manifest, figure, label, ours[figure.metric].get(label, MeanEstimate())))
    paired = {(row.label, row.metric) for row in rows}
    for label in analysis.labels:
        for metric in metrics:
            mean = ours[metric].get(label)
            if mean is not None and (label, metric) not in paired:
                rows.append(Comparison("", label, metric, mean, None, _unknown(), NO_REFERENCE))
    return rows


def _means(analysis: Analysis, printed: Printed | None) -> dict[str, MeanEstimate]:
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


def _compared(
    reference: Reference, manifest: Manifest, figure: PublishedNumber, label: str, ours: MeanEstimate
) -> Comparison:
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


def difference(ours: MeanEstimate, figure: PublishedNumber) -> tuple[float, float, float]:
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

"""Comparison of our numbers with published ones: what was printed, where, how it was made, and whether ours agree.

A published table consists of two parts in ``reports/published``: ``<paper>-<place>.csv`` (method, metric, value, se;
values as printed, with trailing zeros) and its entry in ``sources.yaml``. A report module names the tables that its
sweep reproduces (``published``). Nothing is filled in: a row or cell without a counterpart is shown as such.

When do two numbers agree? The question is what another lab's training run would give on the same prompts: its noise and
its seed are its own, the prompts are not. Let ``replication.Chance`` of ours - theirs have the half width c, and let r
be half a unit of the last printed digit. If both sides measure the same thing, ours and theirs are at most c + r apart
in 95 % of cases: "within replication error (c + r)". Beyond it they differ.

The base model and released weights have no training seed: theirs are taken to be the same weights, and only images
vary. A trained row has no verdict unless some row of the table has a second training run. A printed standard error
replaces our estimate for their side if it is larger, as it may leave out images or training runs. With one image per
prompt there is only an upper bound of c: beyond it the numbers differ, within it the spread is unknown.
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
import numpy as np
from msgspec import Meta

from alignbench.config import Config, UserError, decode, did_you_mean, parse_yaml, pick, read_text
from alignbench.reporting.analysis.comparison import Analysis, Measure
from alignbench.reporting.analysis.replication import Chance, Study
from alignbench.reporting.analysis.stats import MeanEstimate
from alignbench.store.manifest import Manifest, ManifestRun

COLUMNS = ["method", "metric", "value", "se"]
CURVE = ["method", "update", "metric", "value"]  # of a published curve, read off a figure: no verdict is drawn from it
NOT_STATED = "not stated"
WITHIN, DIFFERS, PROTOCOL, UNKNOWN = "within replication error", "differs", "protocol differs", "spread unknown"
NO_REFERENCE, NOT_RUN, ONE_RUN = "no reference", "not run", "one training run: no verdict"
EVALUATION = ("evaluation.", "backend.name", "backend.model")  # all that determines an untrained row's images


class Printed(Config):
    """A published metric in our terms: printed value = ``scale`` x ours. ``task``: our mean over that task alone."""

    metric: str
    scale: Annotated[float, Meta(gt=0)] = 1.0
    decimals: Annotated[int, Meta(ge=0, le=10)] = 4
    task: str | None = None


class Row(Config):
    """A published method: our labels (by default its own name), and the settings that deviate from the table's."""

    labels: list[str] | None = None
    protocol: dict[str, Any] = msgspec.field(default_factory=dict)


class Source(Config):
    """Origin of a table: where it was printed, how its numbers were made, and how its names map to ours."""

    citation: str
    url: str
    place: str
    protocol: dict[str, Any]  # path of a setting, as in a sweep -> value, or "not stated"
    metrics: dict[str, Printed]  # by printed name
    methods: dict[str, str | list[str] | Row] = msgspec.field(default_factory=dict)  # by printed name: our labels
    note: str = ""


class PublishedNumber(NamedTuple):
    """One printed number. ``value`` and ``se`` are as printed; ``se`` is empty if there is none."""

    method: str
    metric: str
    value: str
    se: str = ""

    @property
    def rounding(self) -> float:
        """Half a unit in the last printed digit."""
        mantissa, _, exponent = self.value.lower().partition("e")
        return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


class Point(NamedTuple):
    """One point of a published curve, read off its figure."""

    method: str
    update: int
    metric: str
    value: float


class Reference(NamedTuple):
    """A published table, or a published curve, which has points instead of numbers."""

    name: str
    source: Source
    numbers: Sequence[PublishedNumber] = ()
    points: Sequence[Point] = ()

    def labels(self, method: str) -> list[str]:
        """Return the labels of our rows for a published method."""
        entry = self.source.methods.get(method, method)
        labels = entry.labels if isinstance(entry, Row) else entry
        return [labels] if isinstance(labels, str) else [method] if labels is None else labels

    def protocol(self, method: str) -> dict[str, Any]:
        """Return the settings stated for the method's numbers."""
        entry = self.source.methods.get(method)
        return self.source.protocol | (entry.protocol if isinstance(entry, Row) else {})


class Comparison(NamedTuple):
    """One published number and ours, in the published unit; one of them may be missing."""

    method: str  # as printed; empty: only ours
    label: str  # ours; empty: this sweep has no such row
    metric: str  # as printed
    ours: MeanEstimate
    published: PublishedNumber | None
    verdict: str
    difference: float = math.nan  # ours - published
    error: float = math.nan  # replication error of the difference, rounding included; nan if unknown
    bound: bool = False  # the error is at most this
    reasons: tuple[str, ...] = ()  # how the protocol differs


def published() -> Path:
    """Return the folder of the packaged tables."""
    spec = importlib.util.find_spec("alignbench.reports")
    folders = (spec and spec.submodule_search_locations) or ["reports"]
    return Path(folders[0]) / "published"


def load(name: str, folder: Path | None = None) -> Reference:
    """Return a published table, given the stem of its file. UserError if the file or its entry is invalid."""
    folder = folder or published()
    source = _source(name, folder)
    return Reference(name, source, _numbers(folder / f"{name}.csv"))


def load_curve(name: str, folder: Path | None = None) -> Reference:
    """Return a published curve, given the stem of its file. UserError if the file or its entry is invalid."""
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


def _numbers(path: Path) -> list[PublishedNumber]:
    reader = csv.reader(io.StringIO(read_text(path)))
    if next(reader, []) != COLUMNS:
        raise UserError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
    numbers: dict[tuple[str, str], PublishedNumber] = {}
    for row in filter(None, reader):
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}:{reader.line_num}: expected {len(COLUMNS)} fields, got {len(row)}")
        number = PublishedNumber(*row)
        for field, text in (("value", number.value), ("se", number.se or "0")):
            if not _is_number(text):
                raise UserError(f"{path}:{reader.line_num}: {field}: '{text}' is not a number; leave out such a row")
        if number[:2] in numbers:
            raise UserError(f"{path}:{reader.line_num}: {number.method}, {number.metric} appears twice")
        numbers[number[:2]] = number
    return list(numbers.values())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and text == text.strip() and "_" not in text
    except ValueError:
        return False


def compare(reference: Reference, manifest: Manifest, analysis: Analysis) -> list[Comparison]:
    """Compare every published number with ours, in the order of the paper; then list our numbers not printed there."""
    metrics = list(dict.fromkeys([number.metric for number in reference.numbers] + list(reference.source.metrics)))
    ours = {metric: _ours(analysis, reference.source.metrics.get(metric)) for metric in metrics}
    rows = []
    for number in reference.numbers:
        known = [label for label in reference.labels(number.method) if label in analysis.labels]
        for label in known or [""]:
            rows.append(_compared(reference, manifest, number, label, ours[number.metric]))
    paired = {(row.label, row.metric) for row in rows}
    for label in analysis.labels:
        for metric in metrics:
            if label in ours[metric].means and (label, metric) not in paired:
                rows.append(Comparison("", label, metric, ours[metric].means[label], None, NO_REFERENCE))
    return rows


class _Ours(NamedTuple):
    """Our side of a published metric: label -> mean in the printed unit, and what chance does to it."""

    means: dict[str, MeanEstimate]
    scale: float = 1.0
    study: Study | None = None  # None if this sweep does not measure the metric


def _ours(analysis: Analysis, printed: Printed | None) -> _Ours:
    """Return our side of a metric."""
    measure = next((m for m in analysis.measures if printed and m.name == printed.metric), None)
    if printed is None or measure is None:
        return _Ours({})
    means = analysis.averages(measure, printed.task) if printed.task else analysis.means[measure]
    scale = printed.scale
    scaled = {
        label: mean._replace(mean=mean.mean * scale, lo=mean.lo * scale, hi=mean.hi * scale, se=mean.se * scale)
        for label, mean in means.items()
        if not math.isnan(mean.mean)
    }
    return _Ours(scaled, scale, _study(analysis, measure, printed.task))


def _study(analysis: Analysis, measure: Measure, task: str | None) -> Study:
    data = analysis.scores[measure]
    chosen = data.tags == task if task else np.full(len(data.tags), True)
    strata = data.tags[chosen] if measure.by_task and not task else None
    return Study({label: data.values[label][chosen] for label in analysis.labels}, analysis.trained, strata)


def _compared(reference: Reference, manifest: Manifest, number: PublishedNumber, label: str, ours: _Ours) -> Comparison:
    mean = ours.means.get(label, MeanEstimate())
    if ours.study is None or math.isnan(mean.mean):
        return Comparison(number.method, label, number.metric, mean, number, NOT_RUN)
    run, protocol = manifest.rows[label][0], reference.protocol(number.method)
    reasons = departures(protocol, manifest, run)
    if mean.dropped:
        reasons.append(f"prompts left out here: {mean.dropped}")
    images = protocol.get("evaluation.images_per_prompt")
    chance = ours.study.chance(label, images if isinstance(images, int) else None, float(number.se or 0) / ours.scale)
    difference = mean.mean - float(number.value)
    error = replication_error(chance, number, ours.scale)
    verdict = PROTOCOL if reasons else judged(difference, error, chance.bound)
    if verdict == UNKNOWN and ours.study.is_one_run(label):
        verdict = ONE_RUN
    about = (number.method, label, number.metric, mean, number, verdict)
    return Comparison(*about, difference, error, chance.bound, tuple(reasons))


def replication_error(chance: Chance, number: PublishedNumber, scale: float = 1.0) -> float:
    """Return the difference, in the printed unit, that chance and rounding exceed in 5 % of true agreements."""
    return scale * chance.half_width() + number.rounding


def judged(difference: float, error: float, bound: bool = False) -> str:
    """Return the verdict on a difference; with an upper bound of the error there is only one if it is exceeded."""
    if math.isnan(error):
        return UNKNOWN
    if abs(difference) > error:
        return DIFFERS
    return UNKNOWN if bound else WITHIN


def departures(protocol: dict[str, Any], manifest: Manifest, run: ManifestRun) -> list[str]:
    """Return every stated setting that differs in this run, as ``path: value there, value here``.

    An untrained row carries its sweep's training settings, which do not affect its images: only the model and the
    evaluation count there.
    """
    reasons = ["REHEARSAL: tiny random models"] if manifest.rehearsal else []
    if manifest.subset:
        reasons.append(f"SUBSET: the first {manifest.subset} evaluation prompts")
    for path, stated in protocol.items():
        counts = run.trained or path.startswith(EVALUATION)
        ours = _setting(run, path)
        if counts and stated != NOT_STATED and not _equal(stated, ours):
            reasons.append(f"{path}: {_text(stated)} there, {_text(ours)} here")
    return reasons


def _setting(run: ManifestRun, path: str) -> Any:
    """Return the run's resolved value, None if it has none; for ``reward``, the names of the evaluators."""
    if path == "reward":
        return [part["evaluator"]["name"] for part in run.rewards]
    try:
        return pick({**run.settings, "evaluation": run.protocol}, path)
    except KeyError:
        return None


def _equal(stated: Any, ours: Any) -> bool:
    if isinstance(stated, list) or isinstance(ours, list):
        left, right = (value if isinstance(value, list) else [value] for value in (stated, ours))
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(stated, (int, float)) and isinstance(ours, (int, float)):
        return math.isclose(stated, ours, rel_tol=1e-9)
    return stated == ours


def _text(value: Any) -> str:
    return "none" if value in (None, []) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)

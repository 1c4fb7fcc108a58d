"""Data of a sweep as pandas frames, for plots and tables of your own: ``alignbench.load``.

The numbers are those of the sweep's report, in full precision. A training seed of -1 means that the row was not trained
here: it is the base model, published weights, or an imported row.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import pandas as pd

from alignbench.config import UserError, did_you_mean, flatten
from alignbench.experiment import document
from alignbench.reporting import tables
from alignbench.reporting.analysis import pairs
from alignbench.reporting.analysis.comparison import Analysis, analyse
from alignbench.reporting.analysis.pairs import Difference, Side
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.text.table import Cell, Column, Table
from alignbench.store.artefacts import Store
from alignbench.store.files import read_frame
from alignbench.store.manifest import ManifestRun, read_manifest

SCORES = (
    *("label", "method", "seed", "run", "evaluator", "metric", "role", "unit", "higher_is_better"),
    *("prompt_id", "prompt", "tag", "index", "score", "ok"),
)
TEXTS = ("label", "method", "run", "evaluator", "metric", "prompt_id", "tag")  # few names, a thousand rows each


def load(store: Path | str, sweep: Path | str) -> SweepData:
    """Return the data of a sweep, as far as ``store`` has it.

    ``sweep``: its file or its name, or that of an imported sweep; of several with the same name, the full one that
    `alignbench status` shows. UserError if the store has no such sweep.
    """
    root, word = Store(store), str(sweep)
    root.check_folder()
    paths = {path.stem: path for path in root.manifests()}
    if not paths:
        raise UserError(f"{root.root}: contains no sweep, run or imported; name another store")
    if word.endswith((".yaml", ".yml")):
        word = Path(document.read(word).manifest).stem
    manifests = {word: read_manifest(paths[word])} if word in paths else {k: read_manifest(p) for k, p in paths.items()}
    found = pairs.matching(manifests, word)
    if len(found) > 1:
        raise UserError(f"{sweep}: matches several sweeps: {', '.join(found)}; give the full name of one")
    if not found:
        names = dict.fromkeys([*(manifest.name for manifest in manifests.values()), *manifests])
        raise UserError(f"{sweep}: was not run in {root.root} as it stands{did_you_mean(word, names, 'sweeps')}")
    return SweepData(Results(root.root, manifests[found[0]], sweep=found[0]), found[0])


class SweepData:
    """Scores, runs and comparisons of one sweep. Each frame is read once; change a copy of it, not the frame."""

    def __init__(self, results: Results, name: str) -> None:
        """Wrap the results of a sweep. ``name``: stem of its manifest's file."""
        self.name = name
        self._results = results

    def __repr__(self) -> str:
        """Return the name of the sweep and its rows."""
        return f"<{self.name}: {', '.join(self._results.manifest.cases)}>"

    @cached_property
    def _analysis(self) -> Analysis:
        return analyse(self._results.manifest, self._results.scores)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of the report."""
        return [measure.name for measure in self._analysis.measures]

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each image and metric; a score with ``ok`` False counts in no mean."""
        return scores_frame(self._results, self._analysis)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each run: its state, what training cost, and every setting under its path."""
        manifest = self._results.manifest
        rows = [{"training": run.training} | dict(_settings(run)) for run in manifest.runs]
        return pd.concat([self._results.costs, pd.DataFrame(rows)], axis=1)

    @cached_property
    def seeds(self) -> pd.DataFrame:
        """A row for each metric and training run: its mean, and its paired change against the base model."""
        return seeds_frame(self._analysis)

    def table(self) -> pd.DataFrame:
        """Return the report's table in long form: means, changes and their intervals by label and metric, then costs.

        ``role`` is "summary" for the gain over all held-out metrics and "cost" for costs.
        """
        found = tables.tidy(self._analysis, self._results.costs)
        rows = [[cell.value for cell in row] for row in found.rows]
        names = [column.title for column in found.columns]
        return pd.DataFrame(rows, columns=names).rename(columns={"method": "label"})

    @overload
    def compare(self, a: str, b: str, metric: str) -> Difference: ...

    @overload
    def compare(self, a: str, b: str, metric: None = None) -> pd.DataFrame: ...

    def compare(self, a: str, b: str, metric: str | None = None) -> Difference | pd.DataFrame:
        """Return the paired difference a - b of two rows, or of two runs named by their ids.

        The numbers are those of `alignbench compare`. Without ``metric``: a frame with a row for each, and Holm's
        correction over all of them. UserError for a row, run or metric that the sweep does not have.
        """
        if metric is not None and metric not in self.metrics:
            raise UserError(f"{metric}: {self.name} has no such metric{did_you_mean(metric, self.metrics, 'metrics')}")
        sides, known = (self._side(a), self._side(b)), (self._analysis, self._results.scores)
        if metric is not None and any(metric not in _metrics(side) for side in sides):
            raise UserError(f"{metric}: was not scored for both {a} and {b}")
        only = [] if metric is None else [metric]
        results, left_out = pairs.compare(Store(self._results.store), *sides, only, known)
        for remark in left_out if metric is None else ():
            warnings.warn(remark, stacklevel=2)
        if metric is None:
            return pd.DataFrame([result.difference for result in results])
        found = next(result.difference for result in results if result.measure.name == metric)
        return found._replace(p_holm=found.p)  # an evaluator of this name may have other metrics, not asked for

    def _side(self, word: str) -> Side:
        manifest = self._results.manifest
        if run := next((run for run in manifest.runs if run.id == word), None):
            return Side(self.name, manifest, [run], False)
        return pairs.row(self.name, manifest, word, word)


def _metrics(side: Side) -> set[str]:
    return {metric.name for run in side.runs for score in run.scores for metric in score.metrics}


def _settings(run: ManifestRun) -> Iterable[tuple[str, Any]]:
    """Yield settings and evaluation protocol of a run by their paths, as on the command line; lists become text."""
    about = {key: value for key, value in run.settings.items() if key != "label"}
    for path, value in flatten(about | {"evaluation": {"protocol": run.protocol}}):
        yield path, str(value) if isinstance(value, list | dict) else value


# -- files of the report ----------------------------------------------------------------------------------------------


def files(results: Results, analysis: Analysis) -> dict[str, bytes | str]:
    """Return the contents of the report's files of data by the ends of their names."""
    scores = io.BytesIO()
    scores_frame(results, analysis).to_parquet(scores, index=False, compression="zstd")
    return {
        "scores.parquet": scores.getvalue(),
        "seeds.csv": _csv(seeds_frame(analysis)),
        "costs.csv": _csv(results.costs),
    }


def scores_frame(results: Results, analysis: Analysis) -> pd.DataFrame:
    """Return a row for each image and metric, with the metric's role, unit and direction, and the prompt's text."""
    scores, measures = results.scores, analysis.measures
    known = pd.MultiIndex.from_arrays([[m.evaluator for m in measures], [m.name for m in measures]])
    place = known.get_indexer(pd.MultiIndex.from_frame(scores[["evaluator", "metric"]]))
    facts = [(m.role, m.unit, m.higher_is_better) for m in measures]
    about = pd.DataFrame(facts, columns=["role", "unit", "higher_is_better"])
    about = about.astype({"role": "category", "unit": "category", "higher_is_better": "boolean"})
    frame = pd.concat([scores, about.take(place).set_index(scores.index)], axis=1)
    texts = _texts(results, set(scores["prompt_id"].unique()))
    frame["prompt"] = frame["prompt_id"].map(texts).astype("category")
    return frame[list(SCORES)].astype(dict.fromkeys(TEXTS, "category"))


def _texts(results: Results, wanted: set[str]) -> dict[str, str]:
    """Return prompt id -> text, as far as an image set of the sweep has it."""
    texts: dict[str, str] = {}
    for images in dict.fromkeys(run.images for run in results.manifest.runs):
        artefact = Store(results.store).images(images)
        if wanted <= texts.keys():
            break
        if artefact.done:
            table = read_frame(artefact.product)
            texts |= zip(table["prompt_id"], table["text"])
    return texts


def seeds_frame(analysis: Analysis) -> pd.DataFrame:
    """Return a row for each metric and training run: its mean, and its paired change against the base model."""
    names = ["label", "seed", "metric", "role", "unit", "higher_is_better", "mean", "change"]
    rows = []
    for measure in analysis.measures:
        about = [measure.name, measure.role, measure.unit, measure.higher_is_better]
        for label in analysis.labels:
            changes = analysis.seed_changes(measure, label) if label in analysis.compared else {}
            for seed, mean in analysis.seed_means(measure, label).items():
                rows.append([label, seed, *about, mean, changes.get(seed)])
    return pd.DataFrame(rows, columns=names)


def _csv(frame: pd.DataFrame) -> str:
    """Return a frame as the text of a CSV file that is safe to open in a spreadsheet."""
    whole = frame.convert_dtypes().astype(object)
    cells = whole.where(whole.notna(), None).to_numpy().tolist()
    return Table([Column(str(name)) for name in frame], [[*map(Cell, row)] for row in cells]).csv()

"""Paired comparison of two rows or runs of a store: `alignbench compare A B`.

Differences A - B per metric, and the prompts on which the two differ most. Two rows of one sweep get the same numbers
as in its report; rows of two sweeps are compared on metrics of evaluators with equal settings, weights and version.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from msgspec import structs

from alignbench.config import UserError, did_you_mean
from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Analysis, Comparison, Measure, analyse
from alignbench.reporting.analysis.results import Results
from alignbench.store import artefacts
from alignbench.store.files import read_frame
from alignbench.store.manifest import UNTRAINED, Manifest, ManifestRun, ManifestScore, read_manifest

Analysed = tuple[Analysis, pd.DataFrame]  # and the scores that were analysed
TOP = 5  # prompts per metric
UNKNOWN = "unknown"


class Side(NamedTuple):
    """A row with all its training runs (``whole``), or one of them. ``sweep``: stem of its manifest's file."""

    sweep: str
    manifest: Manifest
    runs: list[ManifestRun]
    whole: bool

    @property
    def label(self) -> str:
        return self.runs[0].label

    @property
    def title(self) -> str:
        seeds = [str(run.seed) for run in self.runs if run.trained]
        what = f"seeds {', '.join(seeds)}" if len(seeds) > 1 else self.runs[0].training
        return f"{self.label} of {self.sweep}, {what}"

    @property
    def protocol(self) -> dict[str, Any]:
        return {"model": self.manifest.world or UNKNOWN} | self.runs[0].protocol


class Result(NamedTuple):
    """A comparison on one measure. ``higher``: the share of prompts on which A's mean is higher; a tie counts half."""

    measure: Measure
    means: tuple[stats.MeanEstimate, stats.MeanEstimate]
    change: Comparison
    higher: float
    pairs: pd.DataFrame  # as from ``_pairs``

    @property
    def difference(self) -> Difference:
        """The same in plain numbers."""
        measure, estimate = self.measure, self.change.estimate
        about = (measure.name, measure.evaluator, measure.role, measure.unit)
        (a, a_lo, a_hi, *_), (b, b_lo, b_hi, *_) = self.means
        return Difference(
            *about,
            *(a, a_lo, a_hi, b, b_lo, b_hi),
            *(estimate.mean, estimate.lo, estimate.hi, estimate.se, estimate.df, estimate.p),
            *(estimate.prompts, estimate.seeds, estimate.dropped),
            p_holm=float(self.change.p_holm),
            verdict=self.change.verdict,
            a_higher=self.higher,
            of_weights=self.change.weights,
        )


class Difference(NamedTuple):
    """A result in plain numbers: both means and their paired difference a - b, each with its 95 % interval.

    ``p_holm``: corrected over the metrics compared with it. ``of_weights``: it speaks of the very weights that were
    scored, not of what another training run would give.
    """

    metric: str
    evaluator: str
    role: str
    unit: str
    a: float
    a_lo: float
    a_hi: float
    b: float
    b_lo: float
    b_hi: float
    difference: float
    lo: float
    hi: float
    se: float
    df: float
    p: float
    prompts: int
    seeds: int
    dropped: int  # prompts left out
    p_holm: float
    verdict: str
    a_higher: float  # share of prompts on which a's mean is higher
    of_weights: bool


class Disagreement(NamedTuple):
    """A prompt on which the two differ: means over its images, and the pair of images that differs most."""

    prompt: str
    a: float
    b: float
    images: tuple[Path | None, Path | None]


def find(root: artefacts.Store, word: str) -> Side:
    """Return the side named by ``SWEEP:LABEL``, a unique label, or a run id or its beginning.

    UserError, with the alternatives, if the name is unknown or ambiguous.
    """
    manifests = {path.stem: read_manifest(path) for path in root.manifests()}
    if not manifests:
        raise UserError(f"{root.root}: contains no sweep, run or imported; name another --store")
    named, colon, label = word.partition(":")
    if colon and (sweeps := matching(manifests, named)):
        if len(sweeps) > 1:
            raise UserError(f"{word}: '{named}' matches several sweeps: {', '.join(sweeps)}; give the full name of one")
        return row(sweeps[0], manifests[sweeps[0]], label, word)
    ids = {run.id: name for name, manifest in reversed(manifests.items()) for run in manifest.runs}  # the latest wins
    if word in ids:
        return _run(manifests, ids[word], word)
    sweeps = [name for name, manifest in manifests.items() if word in manifest.cases]
    if len(sweeps) > 1:
        raise UserError(
            f"{word}: is a row of several sweeps; name one: {', '.join(f'{name}:{word}' for name in sweeps)}"
        )
    if sweeps:
        return row(sweeps[0], manifests[sweeps[0]], word, word)
    chosen = sorted(id for id in ids if word and id.startswith(word))
    if len(chosen) > 1:
        raise UserError(f"{word}: matches several runs: {', '.join(chosen)}; name one")
    if chosen:
        return _run(manifests, ids[chosen[0]], chosen[0])
    if colon:
        names = dict.fromkeys(manifest.name for manifest in manifests.values())
        raise UserError(f"{word}: there is no sweep '{named}'{did_you_mean(named, names, 'sweeps')}")
    labels = dict.fromkeys(label for manifest in manifests.values() for label in manifest.cases)
    raise UserError(f"{word}: there is no such row or run{did_you_mean(word, labels, 'rows')}")


def matching(manifests: dict[str, Manifest], name: str) -> list[str]:
    """Return the manifests whose file name is ``name``; else whose sweep has that name; else that begin with it."""
    by_name = [stem for stem, manifest in manifests.items() if manifest.name == name]
    return [name] if name in manifests else by_name or [stem for stem in manifests if name and stem.startswith(name)]


def row(sweep: str, manifest: Manifest, label: str, word: str) -> Side:
    """Return a row with all its runs. UserError, which begins with ``word``, if the sweep does not have it."""
    if label not in manifest.rows:
        raise UserError(f"{word}: {sweep} has no row '{label}'{did_you_mean(label, manifest.cases, 'rows')}")
    return Side(sweep, manifest, manifest.rows[label], True)


def _run(manifests: dict[str, Manifest], sweep: str, id: str) -> Side:
    """Return one run. UserError if its weights made several sets of images."""
    places = [(name, run) for name, manifest in manifests.items() for run in manifest.runs if run.id == id]
    if len({run.images for _, run in places}) > 1:
        rows = ", ".join(dict.fromkeys(f"{name}:{run.label}" for name, run in places))
        raise UserError(f"{id}: made several sets of images; name a row: {rows}")
    return Side(sweep, manifests[sweep], [next(run for name, run in places if name == sweep)], False)


def compare(
    root: artefacts.Store, a: Side, b: Side, only: Sequence[str] = (), known: Analysed | None = None
) -> tuple[list[Result], list[str]]:
    """Compare the two on every measure they share; return results and remarks on the measures left out.

    ``only``: metrics or evaluators to compare on. ``known``: the analysis and the scores of A's sweep, if they are at
    hand. UserError if there is nothing to compare.
    """
    if a.runs == b.runs:
        raise UserError(f"{a.title}: cannot be compared with itself; name two")
    judges = [{score.evaluator: _judge(score) for run in side.runs for score in run.scores} for side in (a, b)]
    both = [name for name in judges[0] if name in judges[1]]
    remarks = [f"{name}: scored for A only" for name in judges[0] if name not in judges[1]]
    remarks += [f"{name}: scored for B only" for name in judges[1] if name not in judges[0]]
    other = [name for name in both if judges[0][name] != judges[1][name]]
    remarks += [f"{name}: scored with different settings, weights or versions; not compared" for name in other]
    analysis, frame, labels = _analysed(root, a, b, known)
    measures = [measure for measure in analysis.measures if measure.evaluator in set(both) - set(other)]
    if not measures:
        raise UserError(f"{a.title} and {b.title} have no score in common ({'; '.join(remarks) or 'none has any'})")
    measures = _chosen(measures, only)
    found = [analysis.compare(measure, [labels])[0] for measure in measures]
    holm = stats.holm([change.estimate.p for change in found])
    changes = [change._replace(p_holm=float(p)) for change, p in zip(found, holm)]
    return [_result(analysis, frame, measure, change, labels) for measure, change in zip(measures, changes)], remarks


def _judge(score: ManifestScore) -> str:
    """Return a key that is equal for equal settings, weights and version of the evaluator.

    Our score files are named by these; imported scores carry them in their settings.
    """
    if score.imported:
        return str(score.settings)
    return Path(score.file).stem.removesuffix(f"-{score.base}")


def _chosen(measures: Sequence[Measure], only: Sequence[str]) -> list[Measure]:
    names = {name: None for measure in measures for name in (measure.name, measure.evaluator)}
    if unknown := next((word for word in only if word not in names), None):
        raise UserError(f"-e {unknown}: not a score of both{did_you_mean(unknown, names)}")
    return [m for m in measures if not only or m.name in only or m.evaluator in only]


def _analysed(
    root: artefacts.Store, a: Side, b: Side, known: Analysed | None
) -> tuple[Analysis, pd.DataFrame, tuple[str, str]]:
    """Return the analysis, all scores, and the labels of the two in them.

    Two rows of one sweep get the analysis of the whole sweep, which pools the spread between training runs as its
    report does; any others get one of the two alone. A single run stands for itself, not for runs with any seed.
    """
    if a.sweep == b.sweep and a.whole and b.whole:
        if known is None:
            frame = Results(root.root, a.manifest, sweep=a.sweep).scores
            known = analyse(a.manifest, frame), frame
        return *known, (a.label, b.label)
    runs = [
        structs.replace(run, label=label, **({} if side.whole else {"seed": UNTRAINED, "published": not run.is_base}))
        for label, side in zip("AB", (a, b))
        for run in side.runs
    ]
    manifest = Manifest(name="", cases=["A", "B"], runs=runs)
    frame = Results(root.root, manifest).scores
    return analyse(manifest, frame), frame, ("A", "B")


def _result(
    analysis: Analysis, frame: pd.DataFrame, measure: Measure, change: Comparison, labels: tuple[str, str]
) -> Result:
    means = analysis.means[measure]
    pairs = _pairs(frame, measure, labels)
    gaps = _by_prompt(pairs)["difference"]
    higher = float(((gaps > 0) + 0.5 * (gaps == 0)).mean()) if len(gaps) else np.nan
    return Result(measure, (means[labels[0]], means[labels[1]]), change, higher, pairs)


def _pairs(frame: pd.DataFrame, measure: Measure, labels: tuple[str, str]) -> pd.DataFrame:
    """Return a row per pair of images with valid scores: prompt_id, index, run_a, run_b, score_a, score_b, difference.

    Training runs pair by seed; a side that was not trained, or whose training is unknown, pairs with every seed. As in
    the estimates, a prompt that lacks a pair for some seed is left out.
    """
    scores = frame[(frame["evaluator"] == measure.evaluator) & (frame["metric"] == measure.name)]
    scores = scores[scores["ok"].eq(True) & np.isfinite(scores["score"].astype(float))].astype(
        {"prompt_id": object, "run": object}  # categorical in a frame read from a store
    )
    sides = [scores[scores["label"] == label][["prompt_id", "index", "seed", "run", "score"]] for label in labels]
    trained = all(not side["seed"].eq(UNTRAINED).any() for side in sides)
    place = ["prompt_id", "index", *(["seed"] if trained else [])]
    pairs = sides[0].merge(sides[1], on=place, suffixes=("_a", "_b"))
    runs = pairs["run_a"] + " " + pairs["run_b"]
    pairs = pairs[runs.groupby(pairs["prompt_id"]).transform("nunique") == runs.nunique()]
    return pairs.assign(difference=pairs["score_a"] - pairs["score_b"])


def _by_prompt(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return prompt_id -> score_a, score_b, difference: means over the images of a seed, then over seeds."""
    columns = ["score_a", "score_b", "difference"]
    return pairs.groupby(["prompt_id", "run_a", "run_b"])[columns].mean().groupby("prompt_id").mean()


def disagreements(root: artefacts.Store, a: Side, b: Side, result: Result, top: int = TOP) -> list[Disagreement]:
    """Return the ``top`` prompts whose means differ most, largest difference first; equal means are left out."""
    means = _by_prompt(result.pairs)
    order = means["difference"].abs().sort_values(ascending=False, kind="stable").index[:top]
    files = [{run.id: _images(root, run) for run in side.runs} for side in (a, b)]
    cases = []
    for prompt in order:
        score_a, score_b, gap = means.loc[prompt]
        if gap == 0:
            break
        pairs = result.pairs[result.pairs["prompt_id"] == prompt]
        pair = pairs.loc[(np.sign(gap) * pairs["difference"]).idxmax()]
        place = (prompt, pair["index"])
        shown = [known[pair[run]].get(place, ("", None)) for known, run in zip(files, ("run_a", "run_b"))]
        text = shown[0][0] or shown[1][0] or f"prompt {prompt}"
        cases.append(Disagreement(text, float(score_a), float(score_b), (shown[0][1], shown[1][1])))
    return cases


def _images(root: artefacts.Store, run: ManifestRun) -> dict[tuple[str, int], tuple[str, Path | None]]:
    """Return (prompt id, index) -> the prompt's text and the image file, None if it is missing."""
    artefact = root.images(run.images)
    if not artefact.done:
        return {}
    table = read_frame(artefact.product)
    paths = [artefact.folder / file for file in table["file"]]
    shown = [path if path.is_file() else None for path in paths]
    return dict(zip(zip(table["prompt_id"], table["index"]), zip(table["text"], shown)))


def protocols(a: Side, b: Side) -> list[str]:
    """Return how the evaluation protocols of the two differ, and what is unknown about them."""
    left, right = a.protocol, b.protocol
    keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) is not None or right.get(key) is not None]
    values = {key: (left.get(key, UNKNOWN), right.get(key, UNKNOWN)) for key in keys}
    lines = [
        f"{'not the same ' * (UNKNOWN not in (x, y))}{_words(key)}: {_said(x)} and {_said(y)}"
        for key, (x, y) in values.items()
        if x != y
    ]
    if unknown := [_words(key) for key, pair in values.items() if pair == (UNKNOWN, UNKNOWN)]:
        lines.append(f"unknown for both: {', '.join(unknown)}")
    return [*lines, _noise(a, b, values)]


def _noise(a: Side, b: Side, values: dict[str, tuple[Any, Any]]) -> str:
    """Return whether pairs share their noise, which depends on seed, prompt, index and the model's latent size."""
    if any(run.imported for run in (*a.runs, *b.runs)):
        return "pairs share the prompt; whether they share the noise is unknown, since images were made elsewhere"
    if any(x != y for key in ("model", "size", "seed") for x, y in [values.get(key, (None, None))]):
        return "pairs share the prompt but not the noise"
    return "pairs share the prompt and the noise"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _said(value: Any) -> str:
    return "none" if value is None else str(value)

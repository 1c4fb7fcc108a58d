"""Means, paired changes and verdicts, computed from the store's scores; the source of the numbers in every report."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
from msgspec import structs
from numpy.typing import NDArray

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.ranking import Ranking, rank
from alignbench.reporting.analysis.run_spread import ALPHA, RunSpread
from alignbench.reporting.analysis.stats import MeanEstimate
from alignbench.reporting.text import names
from alignbench.store.manifest import ROLES, UNTRAINED, Manifest, ManifestRun, ManifestScore


class Measure(NamedTuple):
    """One metric of one evaluator, as the sweep uses it."""

    evaluator: str
    name: str
    unit: str = ""
    higher_is_better: bool | None = True  # None: neither direction is better
    by_task: bool = False
    role: str = "held-out"
    version: str = ""
    world: str = ""  # "shapes": scored by the shapes world's own small model or checker, not by the published one


class Scores(NamedTuple):
    """Scores of one measure. ``values[label]``: (P, I, S), nan where missing or not ok; S = 1 if untrained."""

    prompts: NDArray  # (P,) ids, sorted
    tags: NDArray  # (P,) tasks
    values: dict[str, stats.Array]


class Comparison(NamedTuple):
    """A paired difference, its p-value after Holm over the comparisons made with it, and its verdict."""

    estimate: MeanEstimate
    p_holm: float
    equal: float = 0.0  # the mean if there is no difference
    weights: bool = False  # it speaks of the very weights that were scored, not of what another training run would give

    @property
    def verdict(self) -> str:
        """One of: up, down, cannot tell, identical, not measured, spread unknown."""
        if np.isnan(self.estimate.mean):
            return "not measured"
        if np.isnan(self.p_holm):
            same = self.estimate.mean == self.equal and self.estimate.se == 0
            return "identical" if same else "spread unknown"
        if self.p_holm >= ALPHA or self.estimate.mean == self.equal:
            return "cannot tell"
        return "up" if self.estimate.mean > self.equal else "down"

    @property
    def said(self) -> str:
        """The verdict in words; with one training run it is one on these weights."""
        return f"{self.verdict} (these weights)" if self.weights and self.verdict in ("up", "down") else self.verdict


@dataclass(frozen=True)
class Analysis:
    """Numbers of one sweep: ``means[measure][label]``, and if there is a ``base``, what changed against it.

    That is ``changes[measure][label]``, ``improved[measure][label]`` (the probability of improvement) and
    ``gains[label]`` (over the measures ``summed``). ``pairs[measure][a, b]``: the paired difference a - b of two
    compared rows, a before b in the order of the table, with Holm over all pairs of the measure. ``primary``: the
    measure that the first screen speaks of, None if nothing independent of the training reward was measured.
    ``published``: rows whose weights come from elsewhere, from one training run of unknown seed. ``rewards``: the
    [train] measures that a row itself was trained on, which differ where rows have different rewards.
    """

    labels: list[str]
    base: str | None  # the first row without training and without weights of its own
    seeds: dict[str, list[int]]  # planned training seeds of each label
    measures: list[Measure]
    scores: dict[Measure, Scores]
    means: dict[Measure, dict[str, MeanEstimate]] = field(default_factory=dict)
    changes: dict[Measure, dict[str, Comparison]] = field(default_factory=dict)
    improved: dict[Measure, dict[str, Comparison]] = field(default_factory=dict)
    gains: dict[str, Comparison] = field(default_factory=dict)
    summed: list[Measure] = field(default_factory=list)
    pairs: dict[Measure, dict[tuple[str, str], Comparison]] = field(default_factory=dict)
    rankings: dict[Measure, Ranking] = field(default_factory=dict)
    primary: Measure | None = None
    published: list[str] = field(default_factory=list)
    rewards: dict[str, list[Measure]] = field(default_factory=dict)

    @functools.cached_property
    def trained(self) -> list[str]:
        """Labels of the rows trained here."""
        return [label for label in self.labels if self.seeds[label] != [UNTRAINED]]

    @functools.cached_property
    def compared(self) -> list[str]:
        """Labels of all rows compared with base, trained or not."""
        return [label for label in self.labels if self.base not in (None, label)]

    def compare(self, measure: Measure, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """Return paired differences first - second, with Holm over exactly these pairs."""
        values = self.scores[measure].values
        strata = self.scores[measure].tags if measure.by_task else None
        place = {label: i for i, label in enumerate(self.trained)}
        spread = self.spreads[measure]
        rows = [[place[label] for label in pair if label in place] for pair in pairs]
        runs = [spread.of(*trained) if spread else None for trained in rows]
        estimates = stats.mean_intervals([values[a] - values[b] for a, b in pairs], strata, runs=runs)
        holm = stats.holm([estimate.p for estimate in estimates])
        weights = [self.of_weights(*pair, measure=measure) for pair in pairs]
        return list(map(Comparison, estimates, holm, itertools.repeat(0.0), weights))

    @functools.cached_property
    def spreads(self) -> dict[Measure, RunSpread | None]:
        """How much the training runs of the rows trained here differ, by measure; None if none has two runs."""
        return {
            measure: stats.runs_of([data.values[k] for k in self.trained], data.tags if measure.by_task else None)
            for measure, data in self.scores.items()
        }

    @functools.cached_property
    def unstable(self) -> dict[Measure, list[str]]:
        """Rows whose training runs differ more than those of all other rows (F test), by measure."""
        return {m: [self.trained[i] for i in found.unstable] if found else [] for m, found in self.spreads.items()}

    def probabilities(self) -> dict[Measure, dict[str, Comparison]]:
        """Return the probability of improvement over base, with Holm over all methods and measures together."""
        shares: dict[tuple[Measure, str], MeanEstimate] = {}
        directed = [measure for measure in self.measures if measure.higher_is_better is not None]
        for measure in directed if self.base else []:
            data = self.scores[measure]
            sign = 1 if measure.higher_is_better else -1
            for labels, runs in self._kinds():
                signed = [sign * data.values[label] for label in labels]
                strata = data.tags if measure.by_task else None
                estimates = stats.improvements(signed, sign * data.values[self.base or ""], strata, runs=runs)
                shares |= zip([(measure, label) for label in labels], estimates)
        holm = dict(zip(shares, stats.holm([share.p for share in shares.values()])))
        return {
            m: {k: Comparison(shares[m, k], holm[m, k], 0.5, self.of_weights(k, measure=m)) for k in self.compared}
            for m in directed
            if self.base
        }

    def _kinds(self) -> list[tuple[list[str], bool]]:
        """Return (labels, runs): rows trained here, which have training runs, and the others."""
        trained = [label for label in self.compared if label in self.trained]
        return [(trained, True), ([label for label in self.compared if label not in trained], False)]

    def summary(self) -> tuple[list[Measure], dict[str, Comparison]]:
        """Return the held-out measures and, over these, the interquartile mean of each row's gains over base.

        Only what is known to be held out for every row counts, and each evaluator has one vote: the mean of its
        measures' gains. Gains are in units of the standard deviation over prompts of base's scores, so they do not
        depend on other rows.
        """
        scales = {measure: self._spread_of_base(measure) for measure in self.held_out if self.base}
        chosen = [measure for measure, scale in scales.items() if scale > 0]
        if not chosen:
            return [], {}
        prompts = functools.reduce(np.intersect1d, [self.scores[measure].prompts for measure in chosen])
        rows = {m: np.searchsorted(self.scores[m].prompts, prompts) for m in chosen}
        by_task = [measure.by_task for measure in chosen]
        strata = next((self.scores[measure].tags[rows[measure]] for measure in chosen if measure.by_task), None)
        votes = [measure.evaluator for measure in chosen]
        estimates: dict[str, MeanEstimate] = {}
        weights = set(self.published)
        for labels, runs in self._kinds():
            parts = []
            for label in labels:
                gains = [self._gain(m, label)[rows[m]] / scales[m] for m in chosen]
                parts.append(stats.interquartile_mean(gains, by_task, strata, votes))
            spread = stats.runs_of(parts, strata) if runs else None
            between = [spread.of(i) if spread else None for i in range(len(parts))]
            weights |= {*labels} if runs and not spread else set()
            estimates |= zip(labels, stats.mean_intervals(parts, strata, runs=between))
        holm = stats.holm([estimates[label].p for label in self.compared])
        compared = zip(self.compared, holm)
        return chosen, {label: Comparison(estimates[label], p, weights=label in weights) for label, p in compared}

    @functools.cached_property
    def held_out(self) -> list[Measure]:
        """Measures with a better direction that are known to be independent of every row's training reward."""
        return [m for m in self.measures if m.role in ("held-out", "check") and m.higher_is_better is not None]

    def trained_on(self, label: str) -> list[Measure]:
        """Return the measures that the row was trained on; all [train] ones where its own reward is not recorded."""
        return self.rewards.get(label, [measure for measure in self.measures if measure.role == "train"])

    def _gain(self, measure: Measure, label: str) -> stats.Array:
        values = self.scores[measure].values
        return (1 if measure.higher_is_better else -1) * (values[label] - values[self.base or ""])

    def _spread_of_base(self, measure: Measure) -> float:
        """Return the standard deviation over prompts of base's prompt means; 0 if undefined."""
        means = stats.prompt_means(self.scores[measure].values[self.base or ""])
        known = means[~np.isnan(means)]
        return float(known.std(ddof=1)) if len(known) > 1 else 0.0

    def averages(self, measure: Measure, task: str | None = None) -> dict[str, MeanEstimate]:
        """Return label -> mean over all prompts, or over those of one task."""
        data = self.scores[measure]
        chosen = np.full(len(data.tags), True) if task is None else data.tags == task
        strata = data.tags[chosen] if measure.by_task and task is None else None
        values = {label: data.values[label][chosen] for label in self.labels}
        spread = stats.runs_of([values[label] for label in self.trained], strata)
        rows = [[self.trained.index(label)] if label in self.trained else [] for label in self.labels]
        runs = [spread.of(*trained) if spread else None for trained in rows]
        fraction = measure.unit == "fraction"
        return dict(zip(self.labels, stats.mean_intervals([*values.values()], strata, runs=runs, fraction=fraction)))

    def tasks(self, measure: Measure) -> dict[str, dict[str, MeanEstimate]]:
        """Return task -> label -> mean over the task's prompts."""
        return {str(task): self.averages(measure, str(task)) for task in np.unique(self.scores[measure].tags)}

    def bold(self, measure: Measure) -> str | None:
        """Return the leader if its gain over base is shown, for the method and not only for these weights.

        A row trained once is never bold, even if other rows show how much training runs differ.
        """
        leader = self.rankings[measure].leader
        change = self.changes[measure].get(leader or "")
        if change is None or change.weights or not better(change, measure):
            return None
        return leader if leader not in self.trained or change.estimate.seeds > 1 else None

    def of_weights(self, *labels: str, measure: Measure | None = None) -> bool:
        """Return whether a comparison of these rows speaks of the scored weights only: some row is one training run.

        ``measure``: on this one, of which no row may have two runs though it has two on others; by default on any.
        """
        return any(self._one_run(label, measure) for label in labels)

    def _one_run(self, label: str, measure: Measure | None) -> bool:
        """Return whether the row's weights come from training, and how much its training runs differ is unknown."""
        unknown = self.spreads[measure] is None if measure else max(self.scored_seeds.values(), default=0) < 2
        return label in self.published or (label in self.trained and unknown)

    @functools.cached_property
    def scored_seeds(self) -> dict[str, int]:
        """Number of training seeds, of those planned, of which each row trained here has a score."""
        grids = {k: [~np.isnan(data.values[k]).all((0, 1)) for data in self.scores.values()] for k in self.trained}
        return {label: max((int(seeds.sum()) for seeds in grid), default=0) for label, grid in grids.items()}

    def all_pairs(self, measure: Measure) -> dict[tuple[str, str], Comparison]:
        """Return the paired differences of all pairs of compared rows (of all rows without a base), Holm over all."""
        pairs = list(itertools.combinations(self.compared or self.labels, 2))
        return dict(zip(pairs, self.compare(measure, pairs)))

    def ranking(self, measure: Measure) -> Ranking:
        """Return the order of the rows of ``pairs``; empty for a measure of which neither direction is better."""
        if measure.higher_is_better is None:
            return Ranking()
        sign = 1 if measure.higher_is_better else -1
        rows = [k for k in self.compared or self.labels if np.isfinite(self.means[measure][k].mean)]
        means, prompts = self._common_means(measure, rows)
        wins = [(a, b) for (a, b), pair in self.pairs[measure].items() if better(pair, measure)]
        wins += [(b, a) for (a, b), pair in self.pairs[measure].items() if worse(pair, measure)]
        used = {label: self.means[measure][label].prompts for label in rows}
        return rank({label: sign * mean for label, mean in means.items()}, wins, prompts, used)

    def _common_means(self, measure: Measure, labels: Sequence[str]) -> tuple[dict[str, float], int]:
        """Return label -> mean over the common prompts of ``labels``, scored with each of their seeds; and how many.

        Empty if there is no such prompt, or, for a mean of task means, none of some task.
        """
        data = self.scores[measure]
        grids = {label: stats.prompt_means(data.values[label]) for label in labels}
        grids = {label: grid[:, ~np.isnan(grid).all(0)] for label, grid in grids.items()}
        whole = np.all([~np.isnan(grid).any(1) for grid in grids.values()], axis=0) if grids else np.array([], bool)
        tasks = data.tags if measure.by_task else np.zeros(len(data.tags))
        by_task = [whole & (tasks == task) for task in np.unique(tasks)] if whole.any() else []
        if not by_task or not all(task.any() for task in by_task):
            return {}, 0
        means = {k: float(np.mean([grid[task].mean() for task in by_task])) for k, grid in grids.items()}
        return means, int(whole.sum())

    def seed_changes(self, measure: Measure, label: str) -> dict[int, float]:
        """Return training seed -> paired change against base with this seed, over the prompts of ``changes``."""
        values = self.scores[measure].values
        return self._by_seed(measure, label, values[label] - values[self.base or ""])

    def seed_means(self, measure: Measure, label: str) -> dict[int, float]:
        """Return training seed -> mean of this training run, over the prompts of ``means``."""
        return self._by_seed(measure, label, self.scores[measure].values[label])

    def _by_seed(self, measure: Measure, label: str, values: stats.Array) -> dict[int, float]:
        """Return training seed -> mean of ``values``; empty where their mean over seeds is unknown."""
        grid = stats.prompt_means(values)
        seeds = ~np.isnan(grid).all(0)
        whole = ~np.isnan(grid[:, seeds]).any(1) & seeds.any()
        tags = self.scores[measure].tags if measure.by_task else np.zeros(len(grid))
        if not whole.any() or {*tags[whole]} != {*tags}:  # as for the mean: not one over fewer tasks
            return {}
        by_task = [grid[whole & (tags == task)][:, seeds].mean(0) for task in np.unique(tags)]
        return dict(zip(np.array(self._axis(label))[seeds].tolist(), np.mean(by_task, axis=0).tolist()))

    def _axis(self, label: str) -> list[int]:
        """Return the training seeds of the last axis of the row's scores."""
        return [UNTRAINED] if label not in self.trained else sorted({s for k in self.trained for s in self.seeds[k]})

    def detectable(self, measure: Measure) -> float:
        """Return the true paired change against base that this study finds with a probability of 80 %.

        Median over the rows, at the level of Holm's first step, for the errors that were observed; nan if unknown.
        """
        estimates = [change.estimate for change in self.changes[measure].values() if change.estimate.se > 0]
        sizes = [stats.detectable(found.se, found.df, ALPHA / len(estimates)) for found in estimates]
        return float(np.median(sizes)) if sizes else np.nan

    def scored(self, measure: Measure, label: str) -> int:
        """Return the number of the row's images that have a valid score."""
        return int((~np.isnan(self.scores[measure].values[label])).sum())


def better(comparison: Comparison, measure: Measure) -> bool:
    """Return whether the change is significant and an improvement."""
    return comparison.verdict == {True: "up", False: "down", None: None}[measure.higher_is_better]


def worse(comparison: Comparison, measure: Measure) -> bool:
    """Return whether the change is significant and a deterioration."""
    return comparison.verdict == {True: "down", False: "up", None: None}[measure.higher_is_better]


def analyse(manifest: Manifest, scores: pd.DataFrame) -> Analysis:
    """Return all means, and all paired changes against base with Holm over the rows of each measure."""
    labels = list(dict.fromkeys([*manifest.cases, *manifest.rows]))
    rows = {label: manifest.rows.get(label, []) for label in labels}
    seeds = {label: sorted({run.seed for run in runs}) for label, runs in rows.items()}
    base = next((label for label, runs in rows.items() if runs and all(run.is_base for run in runs)), None)
    measures = _measures(manifest)
    primary = _primary(measures, manifest.primary)
    published = [label for label, runs in rows.items() if any(run.published for run in runs)]
    rewards = {label: _trained_on(measures, runs) for label, runs in rows.items()}
    data = cubes(scores, measures, seeds)
    return completed(
        Analysis(labels, base, seeds, measures, data, primary=primary, published=published, rewards=rewards)
    )


def completed(analysis: Analysis) -> Analysis:
    """Fill in all means, changes and summaries of the analysis's scores, and return it."""
    for measure in analysis.measures:
        analysis.means[measure] = analysis.averages(measure)
        pairs = [(label, analysis.base) for label in analysis.compared if analysis.base is not None]
        analysis.changes[measure] = dict(zip([a for a, _ in pairs], analysis.compare(measure, pairs)))
        analysis.pairs[measure] = analysis.all_pairs(measure)
        analysis.rankings[measure] = analysis.ranking(measure)
    analysis.improved.update(analysis.probabilities())
    summed, gains = analysis.summary()
    analysis.summed.extend(summed)
    analysis.gains.update(gains)
    return analysis


def _primary(measures: Sequence[Measure], named: str = "") -> Measure | None:
    """Return the measure of this name; by default the first check, else the first held-out one that has a direction."""
    if named:
        return next((measure for measure in measures if measure.name == named), None)
    directed = [measure for measure in measures if measure.higher_is_better is not None]
    return next((m for role in ("check", "held-out") for m in directed if m.role == role), None)


def _measures(manifest: Manifest) -> list[Measure]:
    """Return every metric that some run is scored on: by role, then in the papers' order, then in the sweep's.

    A metric whose role differs between rows has the one that claims least: it is held out only if it is so for all.
    """
    measures: dict[tuple[str, str], Measure] = {}
    for score in (score for run in manifest.runs for score in run.scores):
        settings = score.settings or {"world": manifest.world}  # an early version did not record them
        world = "shapes" if "shapes" in settings.values() else ""
        for metric in score.metrics:
            about = {"role": score.role, "version": score.version, "world": world, **structs.asdict(metric)}
            known = measures.setdefault((score.evaluator, metric.name), Measure(score.evaluator, **about))
            least = min(known.role, score.role, key=("train", "unknown", "check", "held-out").index)
            both = known._replace(role=least, world=known.world or world)  # one scorer of a world marks the column
            measures[score.evaluator, metric.name] = both
    return sorted(measures.values(), key=lambda measure: (ROLES.index(measure.role), names.place(measure.name)))


def _trained_on(measures: Sequence[Measure], runs: Sequence[ManifestRun]) -> list[Measure]:
    """Return the [train] measures that a row was trained on: all of them if it was trained on rewards not recorded."""
    rewarded = [measure for measure in measures if measure.role == "train"]
    named = {part["evaluator"]["name"] for run in runs for part in run.rewards}
    named |= {word for run in runs for word in run.trained_on}
    own = {score.evaluator for run in runs for score in run.scores if _names(score) & named}
    if not named:
        return rewarded if any(run.trained for run in runs) else []
    return [measure for measure in rewarded if measure.evaluator in own]


def _names(score: ManifestScore) -> set[str]:
    """Return the names under which a reward can be this score: of its evaluator, its metrics, or its file's column."""
    words = [score.evaluator, *(metric.name for metric in score.metrics), score.settings.get("key")]
    return {name for word in words if isinstance(word, str) for name in (word, word.partition(" (")[0])}


def cubes(frame: pd.DataFrame, measures: Sequence[Measure], seeds: dict[str, list[int]]) -> dict[Measure, Scores]:
    """Return the scores of ``frame`` as arrays, by measure. ``seeds``: the planned training seeds of every label."""
    training_seeds = sorted({seed for planned in seeds.values() for seed in planned if seed != UNTRAINED})
    score = frame["score"].to_numpy(float, na_value=np.nan)
    valid = frame["ok"].eq(True).fillna(False).to_numpy(bool) & np.isfinite(score)
    score = np.where(valid, score, np.nan)
    codes = {name: _codes(frame[name]) for name in ("evaluator", "metric", "label", "prompt_id", "tag")}
    by_measure = {}
    for measure in measures:
        rows = np.flatnonzero(_is(codes["evaluator"], measure.evaluator) & _is(codes["metric"], measure.name))
        part = {name: (column[rows], known) for name, (column, known) in codes.items()}
        index, seed = (frame[name].to_numpy()[rows] for name in ("index", "seed"))
        by_measure[measure] = _cube(part, index, seed, score[rows], seeds, training_seeds)
    return by_measure


Codes = tuple[NDArray, NDArray]  # code of each row (-1: missing), and the value of each code


def _codes(column: pd.Series) -> Codes:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes.to_numpy(), column.cat.categories.to_numpy(object)
    codes, known = pd.factorize(column)
    return codes, np.asarray(known, object)


def _is(codes: Codes, value: str) -> NDArray:
    """Return a mask of the rows that have this value."""
    return codes[0] == next(iter(np.flatnonzero(codes[1] == value)), -2)


def _cube(
    part: dict[str, Codes],
    index: NDArray,
    seed: NDArray,
    score: NDArray,
    seeds: dict[str, list[int]],
    training_seeds: list[int],
) -> Scores:
    """Return one measure's scores as arrays on common axes, so that pairing is subtraction and nan drops a pair."""
    codes, known = part["prompt_id"]
    used = np.unique(codes)  # among the prompts of all measures
    used = used[np.argsort(known[used])] if len(used) else used
    place = np.zeros(len(known), int)
    place[used] = np.arange(len(used))
    row = place[codes] if len(used) else codes
    image, images = pd.factorize(index, sort=True)
    tags = np.full(len(used), "", object)
    tag, names = part["tag"]
    tags[row] = np.append(names, "")[tag]  # code -1: none
    label, labels = part["label"]
    order = np.argsort(label, kind="stable")
    ends = np.searchsorted(label[order], np.arange(len(labels) + 1))
    rows = dict(zip(labels, np.split(order, ends)[1:]))  # the first piece has code -1 and is empty
    values = {}
    for name, planned in seeds.items():
        axis = [UNTRAINED] if planned == [UNTRAINED] else training_seeds
        cube = np.full((len(used), len(images), max(len(axis), 1)), np.nan)
        own = rows.get(name, order[:0])
        own = own[np.isin(seed[own], axis)]
        cube[row[own], image[own], np.searchsorted(axis, seed[own])] = score[own]
        values[name] = cube
    return Scores(known[used] if len(used) else np.array([], object), tags.astype(str), values)

"""What happens over the course of training: scores against what they cost, and where reward and quality part.

A course is one method's row of steps: the base model (update 0), every milestone, the end. All its numbers are paired
as the report's are: same prompts, same noise, same training seeds. Between steps a score is interpolated linearly, and
never beyond the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import ALPHA, Analysis, Measure, cubes
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.analysis.stats import Array, MeanEstimate
from alignbench.store.manifest import UNTRAINED, ManifestRun

AXES = {"update": "updates", "images": "images", "nfe": "NFE", "gpu_seconds": "GPU-seconds"}  # costs, and their names
LEVEL = 0.95
PROFILE = (0.0, 0.25, 0.5, 0.75, 1.0)  # thresholds of the printed performance profile
RUNS = ["label", "method", "seed", "run"]
TEXTS = dict.fromkeys(("label", "method", "run", "evaluator", "metric", "prompt_id", "tag"), object)
SCORES = [*RUNS, "update", "evaluator", "metric", "prompt_id", "tag", "index", "score", "ok"]


def training(results: Results) -> pd.DataFrame:
    """Every update of every run, costs as totals so far.

    ``update`` counts the updates done; ``nfe`` is the sum of both kinds; ``gpu_seconds`` is seconds x processes. What
    else the records hold (``reward_mean``, ``drift``, ...) follows.
    """
    runs = trained_runs(results)
    if not runs:
        return pd.DataFrame({name: [] for name in [*RUNS, *AXES]})
    tables = [pd.DataFrame(results.trainings[run.id]) for run in runs]
    found = pd.concat(tables, ignore_index=True)
    facts = [(run.label, run.method, run.seed, run.id, process_count(results, run)) for run in runs]
    *about, processes = (np.repeat(np.array(each, object), [len(t) for t in tables]) for each in zip(*facts))
    costs = cost_totals(found, processes.astype(float))
    rest = found.drop(columns=[name for name in costs if name in found])
    return pd.DataFrame({**dict(zip(RUNS, about)), **costs}).join(rest).astype({"seed": int})


def trained_runs(results: Results) -> list[ManifestRun]:
    """The runs of the manifest that have records of training."""
    return [run for run in results.manifest.runs if run.trained and run.id in results.trainings]


def process_count(results: Results, run: ManifestRun) -> int:
    return results.origins.get(run.id, {}).get("processes", 1)


def cost_totals(records: Mapping[str, Any] | pd.DataFrame, processes: Any) -> dict[str, Any]:
    """Axis -> totals so far, of columns of records."""
    return {
        "update": records["update"] + 1,
        "images": records["images"],
        "nfe": records["nfe_forward"] + records["nfe_grad"],
        "gpu_seconds": records["seconds"] * processes,
    }


def milestones(results: Results, records: pd.DataFrame | None = None) -> pd.DataFrame:
    """The scores of every milestone, of every end and (update 0) of the untrained model: a row per image and metric."""
    records = training(results) if records is None else records
    ends: dict[Any, Any] = records.groupby("run")["update"].max().to_dict()
    frames = []
    for run in results.manifest.runs:
        for part in run.milestones:
            if part.update != ends.get(run.id):  # else the end has the same, of all prompts
                frames.append(results.read((run, score) for score in part.scores).assign(update=part.update))
    untrained = {run.id: 0 for run in results.manifest.runs if not run.trained}
    last = results.scores.assign(update=results.scores["run"].astype(object).map(ends | untrained))
    parts = [part.astype(TEXTS) for part in (*frames, last.dropna(subset="update")) if len(part)]
    return pd.concat(parts or [pd.DataFrame({name: [] for name in SCORES})], ignore_index=True)[SCORES]


class LearningCurve(NamedTuple):
    """One method's K steps: base model, milestones, end; with S training seeds, on the milestones' prompts."""

    label: str
    seeds: list[int]
    updates: Array  # (K,) means over seeds
    costs: dict[str, Array]  # axis -> (K, S); 0 at the base model, nan where a seed has no such step
    values: dict[Measure, Array]  # (K, P, I, S)
    tags: dict[Measure, Any]  # (P,)

    def strata(self, measure: Measure) -> Any:
        return self.tags[measure] if measure.by_task else None

    def gains(self, measure: Measure) -> tuple[Array, Array]:
        """Paired changes against the base model, better ones positive: (K,) and their joint resamples (draws, K)."""
        sign = -1.0 if measure.higher_is_better is False else 1.0
        values = self.values[measure]
        return stats.curve_draws(sign * (values - values[:1]), self.strata(measure))

    def cost(self, axis: str) -> Array:
        """(K,) means over seeds."""
        return nan_mean(self.costs[axis], 1)


def learning_curves(results: Results, analysis: Analysis, records: pd.DataFrame | None = None) -> list[LearningCurve]:
    """Of every trained method with at least one milestone; none without a base model to start from."""
    if not any(run.milestones for run in results.manifest.runs):
        return []
    records = training(results) if records is None else records
    frame = milestones(results, records)
    ends = records.groupby(["label", "seed"])["update"].max()
    on_the_way = frame[frame["update"].gt(0) & ~_is_end(frame, ends)]
    if on_the_way.empty or analysis.base is None:
        return []
    shared = set(on_the_way["prompt_id"])
    for _, part in on_the_way.groupby("run"):
        shared &= set(part["prompt_id"])
    frame = frame[frame["prompt_id"].isin(shared)]
    steps = {
        label: sorted(on_the_way.loc[on_the_way["label"] == label, "update"].unique()) for label in analysis.trained
    }
    step = np.where(_is_end(frame, ends), "end", frame["update"].astype(int).astype(str))
    keyed = frame.assign(label=frame["label"].astype(str) + " @ " + step)
    keys = {
        label: [f"{label} @ {int(update)}" for update in steps[label]] + [f"{label} @ end"]
        for label in analysis.trained
    }
    seeds = {key: analysis.seeds[label] for label in keys for key in keys[label]}
    base = f"{analysis.base} @ 0"
    data = cubes(keyed, analysis.measures, seeds | {base: [UNTRAINED]})
    axis = sorted({seed for found in seeds.values() for seed in found})
    found = []
    for label in analysis.trained:
        if not steps[label] or label not in set(records["label"]):
            continue
        values = {}
        for measure, scores in data.items():
            parts = [scores.values[base], *(scores.values[key] for key in keys[label])]
            values[measure] = np.stack(np.broadcast_arrays(*parts))
        costs = _costs(records[records["label"] == label], steps[label], axis)
        updates = nan_mean(costs["update"], 1)
        found.append(LearningCurve(label, axis, updates, costs, values, {m: scores.tags for m, scores in data.items()}))
    return found


def _is_end(frame: pd.DataFrame, ends: pd.Series) -> NDArray[np.bool_]:
    last = pd.MultiIndex.from_frame(frame[["label", "seed"]]).map(ends.to_dict())
    return np.asarray(frame["update"].to_numpy(float) == np.asarray(last, float))


def _costs(records: pd.DataFrame, updates: Sequence[float], seeds: Sequence[int]) -> dict[str, Array]:
    """axis -> (K, S): totals after each of ``updates``, and at the end."""
    costs = {axis: np.full((len(updates) + 2, len(seeds)), np.nan) for axis in AXES}
    for column, seed in enumerate(seeds):
        mine = records[records["seed"] == seed].set_index("update", drop=False)
        for axis in AXES if len(mine) else ():
            found = mine[axis].reindex(np.asarray(updates)).to_numpy(float)
            costs[axis][:, column] = [0.0, *found, float(mine[axis].iloc[-1])]
    return costs


def nan_mean(values: Array, axis: int) -> Array:
    """Over what is there; nan where nothing is."""
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def common(found: Sequence[LearningCurve], axis: str) -> float:
    """The largest cost that every training of every course reached."""
    return min(float(np.nanmin(course.costs[axis][-1])) for course in found)


def at(course: LearningCurve, measure: Measure, axis: str, cost: float) -> Array:
    """(P, I, S) scores at a cost, each seed's between its own two steps beside it; nan beyond its last."""
    values, costs = course.values[measure], course.costs[axis]
    found = np.full(values.shape[1:], np.nan)
    for seed in range(values.shape[-1]):
        known = np.flatnonzero(~np.isnan(costs[:, seed]))
        where = costs[known, seed]
        if len(known) < 2 or not where[0] <= cost <= where[-1]:
            continue
        above = int(np.clip(np.searchsorted(where, cost), 1, len(known) - 1))
        share = (cost - where[above - 1]) / (where[above] - where[above - 1])
        low, high = (values[known[i], ..., seed] for i in (above - 1, above))
        found[..., seed] = low if share == 0 else high if share == 1 else (1 - share) * low + share * high
    return found


def equal_cost(found: Sequence[LearningCurve], measure: Measure, axis: str) -> dict[str, MeanEstimate]:
    """label -> mean at ``common``, with its interval over prompts and seeds."""
    cost = common(found, axis)
    values = {course.label: at(course, measure, axis, cost) for course in found}
    strata = found[0].strata(measure)
    pooled = stats.pool_seeds(values.values(), strata)
    return {label: stats.mean_interval(each, strata, pooled=pooled) for label, each in values.items()}


class Reached(NamedTuple):
    """A cost with its interval; inf: not reached."""

    cost: float
    lo: float
    hi: float


def target(found: Sequence[LearningCurve], measure: Measure) -> float | None:
    """Half of the largest gain over the base model that a method ends with; None if no method gains.

    Not what the weakest method ends with: that may be no better than the base model, which is there at no cost.
    """
    best = max((float(course.gains(measure)[0][-1]) for course in found), default=np.nan)
    return best / 2 if best > 0 else None


def time_to(course: LearningCurve, measure: Measure, axis: str, gain: float) -> Reached:
    """The first cost at which the mean gain over the base model is ``gain``; percentiles of the resampled curves'.

    The target itself is taken as given.
    """
    mean, draws = course.gains(measure)
    costs = course.cost(axis)
    lo, hi = _quantiles(crossing(draws, costs, gain))
    return Reached(float(crossing(mean[None], costs, gain)[0]), lo, hi)


def crossing(curves: Array, costs: Array, level: float) -> Array:
    """(N,) first costs at which ``curves`` (N, K), linear between their points, reach ``level``; inf: never."""
    found = np.where(curves[:, 0] >= level, costs[0], np.inf)
    for k in range(1, len(costs)):
        low, high = curves[:, k - 1], curves[:, k]
        first = np.isinf(found) & (high >= level)
        with np.errstate(invalid="ignore", divide="ignore"):
            between = costs[k - 1] + (level - low) / (high - low) * (costs[k] - costs[k - 1])
        found = np.where(first, between, found)
    return np.where(np.isnan(curves).any(1), np.nan, found)


def _quantiles(values: Array) -> tuple[float, float]:
    """The middle 95 %; of values that are there, so that inf stays inf and is never averaged."""
    lo, hi = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], method="inverted_cdf")
    return float(lo), float(hi)


def normalised(analysis: Analysis) -> dict[Measure, dict[str, Array]]:
    """Scores at the end, one for each training seed, scaled by measure: the base model is 0, the best mean is 1.

    Of the measures that were not trained on (of all, if there are no others), where some method is better than base.
    """
    directed = [measure for measure in analysis.measures if measure.higher_is_better is not None]
    chosen = [measure for measure in directed if measure.role != "train"] or directed
    found = {}
    for measure in chosen if analysis.base is not None else ():
        data, sign = analysis.scores[measure], 1.0 if measure.higher_is_better else -1.0
        base = data.values[str(analysis.base)]
        gains = {
            label: sign * _seed_means(data.values[label] - base, data.tags, measure.by_task)
            for label in analysis.trained
        }
        best = max((float(np.mean(each)) for each in gains.values() if len(each)), default=0.0)
        if best > 0:
            found[measure] = {label: each / best for label, each in gains.items()}
    return found


def _seed_means(values: Array, tags: Any, by_task: bool) -> Array:
    """(S,) means over prompts, of the seeds that have any score; of task means where a measure is one."""
    if not len(tags):
        return np.array([])
    prompts = nan_mean(values, 1)
    groups = [tags == tag for tag in np.unique(tags)] if by_task else [np.full(len(tags), True)]
    means = np.mean([nan_mean(prompts[group], 0) for group in groups], axis=0)
    return means[~np.isnan(means)]


def profile(scores: Sequence[Array], taus: Array, draws: int = 2000, seed: int = 0) -> tuple[Array, Array, Array]:
    """Share of a method's (measure, seed) runs whose normalised score exceeds each of ``taus``, with 95 % bands.

    Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", section 4.2; the pointwise bands are their
    stratified bootstrap: seeds are drawn again within every measure. ``scores``: of each measure (S,). With a single
    seed there is no band: nan.
    """
    share = np.mean(np.concatenate(scores)[:, None] > taus, axis=0)
    if all(len(each) < 2 for each in scores):
        return share, np.full(len(taus), np.nan), np.full(len(taus), np.nan)
    chosen = _resamples(tuple(map(len, scores)), draws, seed)
    again = np.concatenate([each[rows] for each, rows in zip(scores, chosen)], axis=1)
    shares = np.stack([(again > tau).mean(1) for tau in taus])
    lo, hi = np.quantile(shares, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=1)
    return share, lo, hi


@lru_cache(maxsize=8)
def _resamples(sizes: tuple[int, ...], draws: int, seed: int) -> list[NDArray[np.int64]]:
    """(draws, n) indices for each of ``sizes``: the same for all methods."""
    rng = np.random.default_rng(seed)
    return [rng.integers(n, size=(draws, n)) for n in sizes]


def changes(found: Sequence[LearningCurve], measure: Measure) -> dict[str, list[MeanEstimate]]:
    """label -> paired change against the base model after each step but the first."""
    result: dict[str, list[MeanEstimate]] = {course.label: [] for course in found}
    for k in range(1, max(len(course.updates) for course in found)):
        chosen = {c.label: c.values[measure] for c in found if k < len(c.updates) - 1}
        _add_changes(result, {label: v[k] - v[0] for label, v in chosen.items()}, found[0].strata(measure))
    ends = {course.label: course.values[measure][-1] - course.values[measure][0] for course in found}
    _add_changes(result, ends, found[0].strata(measure))
    return result


def _add_changes(result: dict[str, list[MeanEstimate]], values: dict[str, Array], strata: Any) -> None:
    pooled = stats.pool_seeds(values.values(), strata)
    for label, each in values.items():
        result[label].append(stats.mean_interval(each, strata, pooled=pooled))


class Divergence(NamedTuple):
    """The first update at which one measure diverges from the training reward, None if it never does.

    The other fields describe resamples, and are nan where the spread over prompts is unknown.
    """

    update: float | None
    share: float  # of the resamples in which it diverges
    lo: float  # limits of the update over resamples; inf: never
    hi: float


DIVERGENCE = """\
A score that was not trained on parts from the reward at the first step (milestone or end) at which the training
reward is above all earlier steps, the base model among them, while this score is significantly below its own earlier
maximum: paired over prompts and seeds against the step of that maximum, p < 0.05 after Holm's correction over all
such tests of the method. The earlier maximum is itself picked from noise; with a score that never moves, 2 of 100
simulated trainings of three seeds were called parted, and with two seeds few real ones can be. In brackets: the
middle 95 % of the update at which the same happens in resamples of prompts and seeds, where a score has to fall by as
many standard errors as the weakest of the method's falls that Holm let pass, and the share of resamples in which it
does."""


def divergences(found: Sequence[LearningCurve]) -> dict[str, dict[Measure, Divergence]]:
    """label -> measure -> where it parts from the training reward, by the rule of ``PARTING``.

    Empty if no evaluator of the sweep was trained on. Where a method has fewer than three seeds, the spread between
    trainings is that of all methods.
    """
    measures = [measure for measure in found[0].values if measure.higher_is_better is not None]
    rewards = [measure for measure in measures if measure.role == "train"]
    others = [measure for measure in measures if measure.role != "train"]
    return {course.label: _partings(course, found, rewards, others) for course in found} if rewards and others else {}


def _partings(
    course: LearningCurve, found: Sequence[LearningCurve], rewards: Sequence[Measure], others: Sequence[Measure]
) -> dict[Measure, Divergence]:
    curves = {measure: course.gains(measure) for measure in (*rewards, *others)}
    steps = range(1, len(course.updates))
    rose = {k: any(curves[m][0][k] > curves[m][0][:k].max() for m in rewards) for k in steps}
    falls = {(k, m): _fall(course, found, m, k, int(curves[m][0][:k].argmax())) for k in steps for m in others}
    tests = [(k, m) for k, m in falls if rose[k]]
    p_holm = dict(zip(tests, stats.holm([falls[test].p for test in tests])))
    again = {k: np.any([curves[m][1][:, k] > curves[m][1][:, :k].max(1) for m in rewards], axis=0) for k in steps}
    cut = max([ALPHA / max(len(tests), 1), *(falls[test].p for test, p in p_holm.items() if p < ALPHA)])
    result = {}
    for m in others:
        fell = [k for k in steps if rose[k] and p_holm[k, m] < ALPHA and falls[k, m].mean < 0]
        draws, firsts = curves[m][1], np.full(len(curves[m][1]), np.inf)
        for k in steps:
            needed = falls[k, m].se * stdtrit(falls[k, m].df, 1 - cut / 2)
            parts = again[k] & (draws[:, k] - draws[:, :k].max(1) < -needed) & np.isinf(firsts)
            firsts = np.where(parts, course.updates[k], firsts)
        update = float(course.updates[fell[0]]) if fell else None
        known = not any(np.isnan(curves[measure][1]).any() for measure in (m, *rewards))
        spread = (float(np.isfinite(firsts).mean()), *_quantiles(firsts)) if known else (np.nan, np.nan, np.nan)
        result[m] = Divergence(update, *spread)
    return result


def _fall(course: LearningCurve, found: Sequence[LearningCurve], measure: Measure, k: int, before: int) -> MeanEstimate:
    """Paired change from step ``before`` to step ``k``, a worse score negative."""
    sign = -1.0 if measure.higher_is_better is False else 1.0
    alike = [other.values[measure] for other in found if len(other.updates) == len(course.updates)]
    strata = course.strata(measure)
    pooled = stats.pool_seeds((values[k] - values[before] for values in alike), strata)
    values = sign * course.values[measure]
    return stats.paired_difference(values[k], values[before], strata, pooled=pooled)


def reward_at(records: Mapping[str, Any] | pd.DataFrame, axis: str, cost: float) -> float:
    """Mean training reward of one run around a cost: over the updates within a twentieth of it on either side."""
    if "reward_mean" not in records:
        return np.nan
    where = np.asarray(records[axis], float)  # a total: it never falls
    first, end = where.searchsorted(0.95 * cost), where.searchsorted(1.05 * cost, "right")
    near = np.asarray(records["reward_mean"], float)[first:end]
    known = near[~np.isnan(near)]
    return float(known.mean()) if len(known) else np.nan


def directed(analysis: Analysis) -> list[Measure]:
    return [measure for measure in analysis.measures if measure.higher_is_better is not None]


def drifts(course: LearningCurve, records: pd.DataFrame) -> Array:
    """(K,) mean over seeds of the drift that training last saw at each step; 0 for the base model."""
    found = np.full(course.costs["update"].shape, np.nan)
    for column, updates in enumerate(course.costs["update"].T):
        mine = records[(records["label"] == course.label) & (records["seed"] == course.seeds[column])]
        if len(mine) and "drift" in mine:
            drift = mine.set_index("update")["drift"].reindex(updates[1:])
            found[:, column] = [0.0, *pd.to_numeric(drift).to_numpy(float)]
    return nan_mean(found, 1)

"""Learning curves: scores over the course of training against their cost, and where reward and quality diverge.

A curve is one method's sequence of steps: the base model (update 0), every milestone, the end. All its numbers are
paired as in the report: same prompts, same noise, same training seeds. Scores are interpolated linearly between steps,
and never extrapolated beyond the last.
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

AXES = {
    "update": "updates",
    "images": "images",
    "nfe": "NFE",
    "gpu_seconds": "device-seconds",
}  # costs, and their names
LEVEL = 0.95
PROFILE = (0.0, 0.25, 0.5, 0.75, 1.0)  # thresholds of the printed performance profile
RUNS = ["label", "method", "seed", "run"]
TEXTS = dict.fromkeys(("label", "method", "run", "evaluator", "metric", "prompt_id", "tag"), object)
SCORES = [*RUNS, "update", "evaluator", "metric", "prompt_id", "tag", "index", "score", "ok"]


def training(results: Results) -> pd.DataFrame:
    """Return every update of every run, with costs as totals so far.

    ``update`` counts the updates done; ``nfe`` is the sum of both kinds; ``gpu_seconds`` is seconds x processes. Other
    columns of the records (``reward_mean``, ``drift``, ...) follow.
    """
    runs = trained_runs(results)
    if not runs:
        return pd.DataFrame({name: [] for name in [*RUNS, *AXES]})
    tables = [pd.DataFrame(results.training_records[run.id]) for run in runs]
    records = pd.concat(tables, ignore_index=True)
    facts = [(run.label, run.method, run.seed, run.id, process_count(results, run)) for run in runs]
    *about, processes = (np.repeat(np.array(fact, object), [len(t) for t in tables]) for fact in zip(*facts))
    costs = cost_totals(records, processes.astype(float))
    rest = records.drop(columns=[name for name in costs if name in records])
    return pd.DataFrame({**dict(zip(RUNS, about)), **costs}).join(rest).astype({"seed": int})


def trained_runs(results: Results) -> list[ManifestRun]:
    """Return the runs of the manifest that have training records."""
    return [run for run in results.manifest.runs if run.trained and run.id in results.training_records]


def process_count(results: Results, run: ManifestRun) -> int:
    """Return the number of processes, one per GPU, that trained the run."""
    return results.origins.get(run.id, {}).get("processes", 1)


def cost_totals(records: Mapping[str, Any] | pd.DataFrame, processes: Any) -> dict[str, Any]:
    """Return axis -> totals so far, from the columns of ``records``."""
    return {
        "update": records["update"] + 1,
        "images": records["images"],
        "nfe": records["nfe_forward"] + records["nfe_grad"],
        "gpu_seconds": records["seconds"] * processes,
    }


def milestones(results: Results, records: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the scores of the base model (update 0), every milestone and every end, one row per image and metric."""
    records = training(results) if records is None else records
    ends: dict[Any, Any] = records.groupby("run")["update"].max().to_dict()
    frames = []
    for run in results.manifest.runs:
        for part in run.milestones:
            if part.update != ends.get(run.id):  # the end is scored on all prompts
                frames.append(results.read((run, score) for score in part.scores).assign(update=part.update))
    untrained = {run.id: 0 for run in results.manifest.runs if not run.trained}
    last = results.scores.assign(update=results.scores["run"].astype(object).map(ends | untrained))
    parts = [part.astype(TEXTS) for part in (*frames, last.dropna(subset="update")) if len(part)]
    return pd.concat(parts or [pd.DataFrame({name: [] for name in SCORES})], ignore_index=True)[SCORES]


class LearningCurve(NamedTuple):
    """A method's K steps (base model, milestones, end) with S training seeds, on the milestones' prompts."""

    label: str
    seeds: list[int]
    updates: Array  # (K,) means over seeds
    costs: dict[str, Array]  # axis -> (K, S); 0 at the base model, nan for seeds without the step
    values: dict[Measure, Array]  # (K, P, I, S)
    tags: dict[Measure, Any]  # (P,)
    rewards: Sequence[Measure] | None = None  # that the method was trained on; None: all whose role is "train"

    def strata(self, measure: Measure) -> Any:
        """Return the task of each prompt, or None if the measure is not averaged by task."""
        return self.tags[measure] if measure.by_task else None

    def gains(self, measure: Measure) -> tuple[Array, Array]:
        """Return paired changes against the base model, improvements positive: (K,) and joint resamples (draws, K)."""
        sign = -1.0 if measure.higher_is_better is False else 1.0
        values = self.values[measure]
        return stats.curve_draws(sign * (values - values[:1]), self.strata(measure))

    def cost(self, axis: str) -> Array:
        """Return (K,) mean costs over seeds."""
        return nan_mean(self.costs[axis], 1)


def learning_curves(results: Results, analysis: Analysis, records: pd.DataFrame | None = None) -> list[LearningCurve]:
    """Return the curve of every trained method with a milestone; empty without a base model to start from."""
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
    axis = sorted({seed for planned in seeds.values() for seed in planned})
    curves = []
    for label in analysis.trained:
        if not steps[label] or label not in set(records["label"]):
            continue
        values = {}
        for measure, scores in data.items():
            parts = [scores.values[base], *(scores.values[key] for key in keys[label])]
            values[measure] = np.stack(np.broadcast_arrays(*parts))
        costs = _costs(records[records["label"] == label], steps[label], axis)
        updates = nan_mean(costs["update"], 1)
        tags = {measure: scores.tags for measure, scores in data.items()}
        curves.append(LearningCurve(label, axis, updates, costs, values, tags, analysis.trained_on(label)))
    return curves


def _is_end(frame: pd.DataFrame, ends: pd.Series) -> NDArray[np.bool_]:
    last = pd.MultiIndex.from_frame(frame[["label", "seed"]]).map(ends.to_dict())
    return np.asarray(frame["update"].to_numpy(float) == np.asarray(last, float))


def _costs(records: pd.DataFrame, updates: Sequence[float], seeds: Sequence[int]) -> dict[str, Array]:
    """Return axis -> (K, S) totals at the base model, after each of ``updates``, and at the end."""
    costs = {axis: np.full((len(updates) + 2, len(seeds)), np.nan) for axis in AXES}
    for column, seed in enumerate(seeds):
        own = records[records["seed"] == seed].set_index("update", drop=False)
        for axis in AXES if len(own) else ():
            totals = own[axis].reindex(np.asarray(updates)).to_numpy(float)
            costs[axis][:, column] = [0.0, *totals, float(own[axis].iloc[-1])]
    return costs


def nan_mean(values: Array, axis: int) -> Array:
    """Return the mean over ``axis``, ignoring nan; nan if all are."""
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def common(curves: Sequence[LearningCurve], axis: str) -> float:
    """Return the largest cost that every training run of every curve reached."""
    return min(float(np.nanmin(curve.costs[axis][-1])) for curve in curves)


def at(curve: LearningCurve, measure: Measure, axis: str, cost: float) -> Array:
    """Return (P, I, S) scores at a cost, interpolated for each seed between its own steps; nan beyond its last."""
    values, costs = curve.values[measure], curve.costs[axis]
    scores = np.full(values.shape[1:], np.nan)
    for seed in range(values.shape[-1]):
        known = np.flatnonzero(~np.isnan(costs[:, seed]))
        where = costs[known, seed]
        if len(known) < 2 or not where[0] <= cost <= where[-1]:
            continue
        above = int(np.clip(np.searchsorted(where, cost), 1, len(known) - 1))
        share = (cost - where[above - 1]) / (where[above] - where[above - 1])
        low, high = (values[known[i], ..., seed] for i in (above - 1, above))
        scores[..., seed] = low if share == 0 else high if share == 1 else (1 - share) * low + share * high
    return scores


def equal_cost(curves: Sequence[LearningCurve], measure: Measure, axis: str) -> dict[str, MeanEstimate]:
    """Return label -> mean score at the ``common`` cost, with its interval over prompts and seeds."""
    cost = common(curves, axis)
    values = {curve.label: at(curve, measure, axis, cost) for curve in curves}
    fraction, strata = measure.unit == "fraction", curves[0].strata(measure)  # as in the table of results
    return dict(zip(values, stats.mean_intervals([*values.values()], strata, fraction=fraction)))


class Reached(NamedTuple):
    """Cost at which a target is reached, with its interval; inf: not reached."""

    cost: float
    lo: float
    hi: float


def target(curves: Sequence[LearningCurve], measure: Measure) -> float | None:
    """Return half of the largest final gain over the base model; None if no method gains.

    The final gain of the weakest method would not do: the base model may reach it at no cost.
    """
    best = max((float(curve.gains(measure)[0][-1]) for curve in curves), default=np.nan)
    return best / 2 if best > 0 else None


def time_to(curve: LearningCurve, measure: Measure, axis: str, gain: float) -> Reached:
    """Return the first cost at which the mean gain reaches ``gain``, with percentiles over resampled curves.

    The target itself is taken as given.
    """
    mean, draws = curve.gains(measure)
    costs = curve.cost(axis)
    lo, hi = _quantiles(crossing(draws, costs, gain))
    return Reached(float(crossing(mean[None], costs, gain)[0]), lo, hi)


def crossing(curves: Array, costs: Array, level: float) -> Array:
    """Return (N,) first costs at which ``curves`` (N, K), linear between points, reach ``level``; inf: never."""
    firsts = np.where(curves[:, 0] >= level, costs[0], np.inf)
    for k in range(1, len(costs)):
        low, high = curves[:, k - 1], curves[:, k]
        new = np.isinf(firsts) & (high >= level)
        with np.errstate(invalid="ignore", divide="ignore"):
            between = costs[k - 1] + (level - low) / (high - low) * (costs[k] - costs[k - 1])
        firsts = np.where(new, between, firsts)
    return np.where(np.isnan(curves).any(1), np.nan, firsts)


def _quantiles(values: Array) -> tuple[float, float]:
    """Return the limits of the middle 95 %; each is one of ``values``, so that inf is never averaged."""
    lo, hi = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], method="inverted_cdf")
    return float(lo), float(hi)


def normalised(analysis: Analysis) -> dict[Measure, dict[str, Array]]:
    """Return the final score of each training seed, scaled so that the base model is 0 and the best mean is 1.

    Only measures on which some method beats base are included; those trained on only if there are no others.
    """
    directed = [measure for measure in analysis.measures if measure.higher_is_better is not None]
    chosen = [measure for measure in directed if measure.role != "train"] or directed
    scores = {}
    for measure in chosen if analysis.base is not None else ():
        data, sign = analysis.scores[measure], 1.0 if measure.higher_is_better else -1.0
        base = data.values[str(analysis.base)]
        gains = {
            label: sign * _seed_means(data.values[label] - base, data.tags, measure.by_task)
            for label in analysis.trained
        }
        best = max((float(np.mean(gain)) for gain in gains.values() if len(gain)), default=0.0)
        if best > 0:
            scores[measure] = {label: gain / best for label, gain in gains.items()}
    return scores


def _seed_means(values: Array, tags: Any, by_task: bool) -> Array:
    """Return means over prompts (or over task means, if ``by_task``) of the seeds that have any score."""
    if not len(tags):
        return np.array([])
    prompts = nan_mean(values, 1)
    groups = [tags == tag for tag in np.unique(tags)] if by_task else [np.full(len(tags), True)]
    means = np.mean([nan_mean(prompts[group], 0) for group in groups], axis=0)
    return means[~np.isnan(means)]


def profile(scores: Sequence[Array], taus: Array, draws: int = 2000, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return the share of (measure, seed) runs whose normalised score exceeds each of ``taus``, with 95 % bands.

    Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", section 4.2; the pointwise bands are their
    stratified bootstrap, which resamples seeds within every measure. ``scores``: (S,) for each measure. With a single
    seed the bands are nan.
    """
    share = np.mean(np.concatenate(scores)[:, None] > taus, axis=0)
    if all(len(seeds) < 2 for seeds in scores):
        return share, np.full(len(taus), np.nan), np.full(len(taus), np.nan)
    chosen = _resamples(tuple(map(len, scores)), draws, seed)
    again = np.concatenate([seeds[rows] for seeds, rows in zip(scores, chosen)], axis=1)
    shares = np.stack([(again > tau).mean(1) for tau in taus])
    lo, hi = np.quantile(shares, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=1)
    return share, lo, hi


@lru_cache(maxsize=8)
def _resamples(sizes: tuple[int, ...], draws: int, seed: int) -> list[NDArray[np.int64]]:
    """Return (draws, n) indices for each of ``sizes``, shared by all methods."""
    rng = np.random.default_rng(seed)
    return [rng.integers(n, size=(draws, n)) for n in sizes]


def changes(curves: Sequence[LearningCurve], measure: Measure) -> dict[str, list[MeanEstimate]]:
    """Return label -> paired change against the base model at each step after it."""
    result: dict[str, list[MeanEstimate]] = {curve.label: [] for curve in curves}
    for k in range(1, max(len(curve.updates) for curve in curves)):
        chosen = {c.label: c.values[measure] for c in curves if k < len(c.updates) - 1}
        _add_changes(result, {label: v[k] - v[0] for label, v in chosen.items()}, curves[0].strata(measure))
    ends = {curve.label: curve.values[measure][-1] - curve.values[measure][0] for curve in curves}
    _add_changes(result, ends, curves[0].strata(measure))
    return result


def _add_changes(result: dict[str, list[MeanEstimate]], values: dict[str, Array], strata: Any) -> None:
    for label, estimate in zip(values, stats.mean_intervals([*values.values()], strata)):
        result[label].append(estimate)


class Divergence(NamedTuple):
    """The first update at which one measure diverges from the training reward, None if it never does.

    The other fields describe resamples, and are nan where the spread over prompts is unknown.
    """

    update: float | None
    share: float  # of the resamples in which it diverges
    lo: float  # limits of the update over resamples; inf: never
    hi: float


DIVERGENCE = """\
A score that was not trained on diverges from the reward at the first step (milestone or end) at which the training
reward exceeds all earlier steps, including the base model, while the score is significantly below its own earlier
maximum: paired over {resampled} against the step of that maximum, p < 0.05 after Holm's correction over all such tests
of the method. *no*: they are not shown to part; the score may still have fallen without the reward rising. The earlier
maximum is itself selected from noise: of 100 simulated methods with three seeds and a score that never moves, 2 were
said to diverge; with two seeds, few real divergences can be detected. In brackets: the middle 95 % of the update of
divergence over resamples of {resampled}, in which a score must fall by as many standard errors as the weakest of the
method's falls that passed Holm's correction, and the share of resamples in which it diverges."""


def divergences(curves: Sequence[LearningCurve]) -> dict[str, dict[Measure, Divergence]]:
    """Return label -> measure -> where it diverges from the method's own reward, by the rule of ``DIVERGENCE``.

    A method is left out unless some measure was its reward and another was not. The spread between training runs is
    pooled over methods.
    """
    result = {}
    for curve in curves:
        measures = [measure for measure in curve.values if measure.higher_is_better is not None]
        trained_on = [m for m in measures if m.role == "train"] if curve.rewards is None else curve.rewards
        rewards = [measure for measure in measures if measure in trained_on]
        others = [measure for measure in measures if measure not in trained_on]
        if rewards and others:
            result[curve.label] = _divergences(curve, curves, rewards, others)
    return result


def _divergences(
    curve: LearningCurve, curves: Sequence[LearningCurve], rewards: Sequence[Measure], others: Sequence[Measure]
) -> dict[Measure, Divergence]:
    gains = {measure: curve.gains(measure) for measure in (*rewards, *others)}
    steps = range(1, len(curve.updates))
    rose = {k: any(gains[m][0][k] > gains[m][0][:k].max() for m in rewards) for k in steps}
    falls = {(k, m): _fall(curve, curves, m, k, int(gains[m][0][:k].argmax())) for k in steps for m in others}
    tests = [(k, m) for k, m in falls if rose[k]]
    p_holm = dict(zip(tests, stats.holm([falls[test].p for test in tests])))
    again = {k: np.any([gains[m][1][:, k] > gains[m][1][:, :k].max(1) for m in rewards], axis=0) for k in steps}
    cut = max([ALPHA / max(len(tests), 1), *(falls[test].p for test, p in p_holm.items() if p < ALPHA)])
    result = {}
    for m in others:
        fell = [k for k in steps if rose[k] and p_holm[k, m] < ALPHA and falls[k, m].mean < 0]
        draws, firsts = gains[m][1], np.full(len(gains[m][1]), np.inf)
        for k in steps:
            needed = falls[k, m].se * stdtrit(falls[k, m].df, 1 - cut / 2)
            diverged = again[k] & (draws[:, k] - draws[:, :k].max(1) < -needed) & np.isinf(firsts)
            firsts = np.where(diverged, curve.updates[k], firsts)
        update = float(curve.updates[fell[0]]) if fell else None
        known = not any(np.isnan(gains[measure][1]).any() for measure in (m, *rewards))
        spread = (float(np.isfinite(firsts).mean()), *_quantiles(firsts)) if known else (np.nan, np.nan, np.nan)
        result[m] = Divergence(update, *spread)
    return result


def _fall(curve: LearningCurve, curves: Sequence[LearningCurve], measure: Measure, k: int, before: int) -> MeanEstimate:
    """Return the paired change from step ``before`` to step ``k``, negative for a worse score."""
    sign = -1.0 if measure.higher_is_better is False else 1.0
    alike = [other for other in curves if len(other.updates) == len(curve.updates)]
    changes = [sign * (other.values[measure][k] - other.values[measure][before]) for other in alike]
    own = next(i for i, other in enumerate(alike) if other is curve)
    return stats.mean_intervals(changes, curve.strata(measure))[own]


def reward_at(records: Mapping[str, Any] | pd.DataFrame, axis: str, cost: float) -> float:
    """Return one run's mean training reward over the updates whose cost is within 5 % of ``cost``."""
    if "reward_mean" not in records:
        return np.nan
    where = np.asarray(records[axis], float)  # a total: it never falls
    first, end = where.searchsorted(0.95 * cost), where.searchsorted(1.05 * cost, "right")
    near = np.asarray(records["reward_mean"], float)[first:end]
    known = near[~np.isnan(near)]
    return float(known.mean()) if len(known) else np.nan


def directed(analysis: Analysis) -> list[Measure]:
    """Return the measures of which one direction is better."""
    return [measure for measure in analysis.measures if measure.higher_is_better is not None]


def drifts(curve: LearningCurve, records: pd.DataFrame) -> Array:
    """Return the (K,) drift recorded at each step, a mean over seeds; 0 for the base model."""
    by_seed = np.full(curve.costs["update"].shape, np.nan)
    for column, updates in enumerate(curve.costs["update"].T):
        own = records[(records["label"] == curve.label) & (records["seed"] == curve.seeds[column])]
        if len(own) and "drift" in own:
            drift = own.set_index("update")["drift"].reindex(updates[1:])
            by_seed[:, column] = [0.0, *pd.to_numeric(drift).to_numpy(float)]
    return nan_mean(by_seed, 1)

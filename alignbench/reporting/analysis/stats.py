"""Means, paired differences and their uncertainty, for scores that share prompts and training seeds.

The data of one method and one metric is an array (P prompts, I images of a prompt, S training seeds). What varies is
the prompt, the training run, and their interaction; the images of one prompt are one cluster. Prompts are *crossed*
with seeds (every seed is scored on the same prompts), so one resample of prompts serves all seeds and all methods.

    variance = prompts + max(0, runs - interaction) / S

where *prompts* is the variance of the mean estimated from the spread of the prompts' means over seeds, *runs* that of
one training run (``run_spread``: pooled over methods, with what their seeds share), and both contain the interaction,
which is therefore subtracted once (as in two-way analysis of variance; resampling rows and columns together counts it
three times: Owen, "The pigeonhole bootstrap", 2007, eq. 9). The degrees of freedom are Satterthwaite's.

Three departures from the plain percentile bootstrap:
1. resampled prompt weights are rescaled by sqrt(n / (n - 1)) (Rao and Wu 1988), which makes the bootstrap's variance
   equal the clustered closed form in expectation, even in small strata;
2. the runs' contribution is drawn from a normal: two seeds have three distinct resamples, too few for quantiles;
3. percentile distances are expanded by t_df / z (Hesterberg 2015).
With a single training seed and no method that has two, the variance between runs is unknown and left out: the interval
is one for these weights. Prompts count as independent draws (within their tasks), so a set with many near-copies of one
prompt has fewer than it seems.

The mean of a *fraction* has a Wilson interval instead, as if from p (1 - p) / variance independent trials (from as many
as there are prompts if all agree; Korn and Graubard 1998 for clusters), since a resample of ones is all ones.

An interval of width zero is not given: where nothing varies, the spread is unknown. docs/statistics.md has simulated
coverages and error rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

from alignbench.reporting.analysis import run_spread
from alignbench.reporting.analysis.run_spread import RunSpread, RunVariance

Array = NDArray[np.float64]

DRAWS = 4000  # bootstrap resamples: the error of a 95 % limit is about 2 % of the interval's width
PRIOR = 8  # degrees of freedom that the variance of all tasks lends to that of one
FEW = 5  # prompts below which a fraction has no interval


class MeanEstimate(NamedTuple):
    """A mean with its uncertainty and sample sizes.

    Limits are nan where the spread is unknown: a stratum has one prompt (then ``se`` and ``p`` are, too), or nothing
    varies (``se`` is 0; p is that of a sign test, nan for a mean of zero).
    """

    mean: float = np.nan
    lo: float = np.nan
    hi: float = np.nan
    se: float = np.nan
    df: float = np.nan  # Satterthwaite's degrees of freedom
    p: float = np.nan  # two-sided, of "the true mean is zero": t = mean / se on df degrees of freedom
    prompts: int = 0  # used
    seeds: int = 0  # used
    dropped: int = 0  # prompts left out: some seed, or one side of a pair, has no valid score
    se_prompts: float = np.nan  # prompts as clusters, the trained seeds taken as given


class Levels(NamedTuple):
    """Means of L arrays and their closed-form variances by level; (L,) unless stated."""

    mean: Array
    prompts: Array  # variance of the mean
    noise: Array  # half the variance of that estimate
    interaction: Array  # variance of a mean under one seed from the interaction; nan with one seed
    columns: Array  # (L, S) means under one seed; nan for a seed without scores
    rows: Array  # (L, P) contributions of prompts to the mean, minus their stratum's; 0 for prompts left out
    used: NDArray[np.int64]  # prompts
    dropped: NDArray[np.int64]
    seeds: NDArray[np.int64]


def mean_interval(
    values: ArrayLike, strata: ArrayLike | None = None, *, fraction: bool = False, seed: int = 0, draws: int = DRAWS
) -> MeanEstimate:
    """Return the mean of ``values`` (P, I, S) over prompts and seeds with a 95 % interval; nan: missing score.

    ``strata`` (P,): the task of every prompt. The mean is then the unweighted mean of the task means (GenEval), and
    prompts are resampled within their task; a task without any score makes the mean nan, not one over fewer tasks.
    ``fraction``: scores lie between 0 and 1, and so do the limits.

    A prompt's score under one seed is the mean of its valid images. Seeds without any score are left out, and so are
    prompts that lack a score under one of the remaining seeds; ``dropped`` counts these prompts.
    """
    return mean_intervals([values], strata, fraction=fraction, draws=draws, seed=seed)[0]


def mean_intervals(
    arrays: Sequence[ArrayLike],
    strata: ArrayLike | None = None,
    *,
    runs: Sequence[RunVariance | None] | None = None,
    fraction: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[MeanEstimate]:
    """Return ``mean_interval`` of each array; all share their resamples, so that one matrix product serves them.

    ``runs``: the variance between training runs of each array, None for no training. By default it is estimated from
    ``arrays``, taken as rows that share their seeds.
    """
    if not len(arrays):
        return []
    levels = _levels(arrays, strata)
    if runs is None:
        spread = _runs(levels)
        runs = [spread.of(i) if spread else None for i in range(len(arrays))]
    between, noise = _between(levels, runs)
    se = np.sqrt(levels.prompts + between)
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.maximum(se**4 / (levels.noise + noise), 1.0)
        df = np.where(se > 0, df, np.nan)
        p = 2 * stdtr(df, -np.abs(levels.mean) / se)
    se = np.where(se <= 1e-12 * np.abs(levels.mean), 0.0, se)  # rounding of equal numbers is no spread
    lo, hi = _wilson(levels, between, se, df) if fraction else _percentiles(levels, between, df, strata, draws, seed)
    unknown = ~(se > 0)
    lo, hi = (np.where(unknown & ~np.full(len(se), fraction), np.nan, limit) for limit in (lo, hi))
    signs = np.where((se == 0) & (levels.mean != 0), 0.5 ** (levels.used - 1.0), np.nan)  # every prompt changed alike
    p, df = np.where(unknown, signs, p), np.where(unknown, np.nan, df)
    columns = (levels.mean, lo, hi, se, df, p, levels.used, levels.seeds, levels.dropped, np.sqrt(levels.prompts))
    return [MeanEstimate(*row) for row in zip(*(column.tolist() for column in columns))]


def _between(levels: Levels, runs: Sequence[RunVariance | None]) -> tuple[Array, Array]:
    """Return the runs' part of each mean's variance, and half the variance of that estimate."""
    between, noise = np.zeros(len(runs)), np.zeros(len(runs))
    for i, run in enumerate(runs):
        if run is not None and levels.seeds[i]:
            interaction = run.interaction if levels.seeds[i] == 1 else levels.interaction[i]
            between[i] = np.maximum(run.value - interaction, 0.0) / levels.seeds[i]
            noise[i] = run.noise / levels.seeds[i] ** 2
    return between, noise


def _percentiles(
    levels: Levels, between: Array, df: Array, strata: ArrayLike | None, draws: int, seed: int
) -> tuple[Array, Array]:
    sizes, place = _strata(levels.rows.shape[1], strata)
    deviations = levels.rows[:, place] @ _prompt_weights(sizes, draws, seed).T
    deviations = deviations + np.sqrt(between)[:, None] * _normal(draws, seed)
    limits = np.quantile(deviations, [0.025, 0.975], axis=1) * (stdtrit(df, 0.975) / ndtri(0.975))
    return levels.mean + limits[0], levels.mean + limits[1]


def _wilson(levels: Levels, between: Array, se: Array, df: Array) -> tuple[Array, Array]:
    """Return Wilson's limits for as many independent trials as have the means' standard errors; nan for few prompts.

    Where all scores are 0 or all are 1, their spread says nothing: a trial per prompt, with two successes and two
    failures added, has the variance, and that ``between`` training runs is added to it.
    """
    p, n = np.clip(levels.mean, 0.0, 1.0), levels.used
    end = (p < 1e-12) | (p > 1 - 1e-12)
    with np.errstate(invalid="ignore", divide="ignore"):
        added = (n * p + 2) / (n + 4)
        at_end = added * (1 - added) / (added * (1 - added) / n + between)
        trials = np.where(end, at_end, p * (1 - p) / se**2)
        square = stdtrit(np.where(end, n - 1.0, df), 0.975) ** 2
        middle = (p + square / (2 * trials)) / (1 + square / trials)
        reach = np.sqrt(square * p * (1 - p) / trials + (square / trials) ** 2 / 4) / (1 + square / trials)
    enough = (n >= FEW) & ~np.isnan(se) & (end | (se > 0))
    lo, hi = (np.where(enough, limit, np.nan) for limit in (middle - reach, middle + reach))
    return np.clip(lo, 0.0, 1.0), np.clip(hi, 0.0, 1.0)


def paired_difference(
    values: ArrayLike, baseline: ArrayLike, strata: ArrayLike | None = None, *, draws: int = DRAWS, seed: int = 0
) -> MeanEstimate:
    """Return ``mean_interval`` of values - baseline, image by image: same prompt, same noise, same training seed.

    An untrained baseline has one seed, (P, I, 1), which pairs with every seed. A pair with nan on either side is left
    out. Seeds pair by number: runs with the same seed saw the same batches, whose common effect cancels.
    """
    difference = np.asarray(values, float) - np.asarray(baseline, float)
    return mean_interval(difference, strata, draws=draws, seed=seed)


def runs_of(arrays: Sequence[ArrayLike], strata: ArrayLike | None = None) -> RunSpread | None:
    """Return the spread between the training runs of rows (P, I, S) that share their seeds; None with one run each."""
    return _runs(_levels(arrays, strata)) if len(arrays) else None


def _runs(levels: Levels) -> RunSpread | None:
    apart = levels.columns - levels.mean[:, None]
    rounding = 1e-12 * np.abs(np.nan_to_num(levels.columns)).max(initial=0.0)  # of equal numbers is no spread
    apart = np.where(np.abs(apart) <= rounding, 0.0, apart)
    return run_spread.estimate(apart, np.nan_to_num(levels.interaction), levels.used)


def curve_draws(
    values: ArrayLike, strata: ArrayLike | None = None, *, draws: int = DRAWS, seed: int = 0
) -> tuple[Array, Array]:
    """Return means (K,) of ``values`` (K, P, I, S) and joint resamples (draws, K), for statistics of whole curves.

    One resample of prompts and of seeds serves all K points, so differences along a curve are paired, and so are curves
    on the same prompts. The variance of each point is that of prompts plus its own of the seeds, without the expansion
    for few seeds. Only prompts and seeds that every point has are used: nan without any. The resamples are nan where
    the spread is unknown, as with a single prompt in a stratum.
    """
    points = np.asarray(values, float)
    whole = ~np.isnan(points).all(2)  # (K, P, S)
    seeds = whole.any(axis=1).all(0)
    usable = whole[:, :, seeds].all((0, 2))
    points = np.where(usable[None, :, None, None] & seeds[None, None, None, :], points, np.nan)
    levels, count = _levels(list(points), strata), int(seeds.sum())
    unknown = np.full((draws, len(points)), np.nan)
    if np.isnan(levels.prompts).any():
        return levels.mean, unknown
    sizes, place = _strata(points.shape[1], strata)
    deviations = _prompt_weights(sizes, draws, seed) @ levels.rows[:, place].T
    if count > 1:
        columns = levels.columns[:, seeds]
        apart, raw = columns - levels.mean[:, None], columns.var(axis=1, ddof=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # the prompts' part contains the interaction
            own = np.where(raw > 0, np.sqrt(np.maximum(raw - levels.interaction, 0.0) / raw), 0.0)
        deviations = deviations + _normals(draws, count, seed) @ (apart * own[:, None]).T / np.sqrt(count * (count - 1))
    return levels.mean, levels.mean + deviations


def improvements(
    arrays: Sequence[ArrayLike],
    baseline: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    runs: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[MeanEstimate]:
    """Return P(X > Y) of each array X against ``baseline`` Y (Agarwal et al. 2021, section 4.3, but paired).

    This is the share of images that score higher than the baseline's of the same prompt, noise and training seed; a tie
    counts half. Intervals are as for means, clipped to [0, 1]. If all prompts agree, their spread is uninformative, and
    the far end of the interval is the exact one of P successes in P trials (Clopper and Pearson 1934). ``p`` tests
    1 / 2; it is at least 2^(1 - P), the smallest value that a test of P signs can give. ``runs``: the arrays are
    training runs; False if nothing was trained.
    """
    base = np.asarray(baseline, float)
    signs = [np.sign(np.asarray(values, float) - base) / 2 for values in arrays]
    between = None if runs else [None] * len(signs)
    estimates = mean_intervals(signs, strata, runs=between, draws=draws, seed=seed)
    return [_share(estimate) for estimate in estimates]


def _share(centred: MeanEstimate) -> MeanEstimate:
    """Return the share in [0, 1] whose ``centred`` estimate, minus 1 / 2, is given."""
    lo, hi, p = max(centred.lo, -0.5), min(centred.hi, 0.5), centred.p
    if centred.se == 0 and abs(centred.mean) > 0.5 - 1e-12:
        reach = 0.025 ** (1 / centred.prompts)
        lo, hi = (reach - 0.5, 0.5) if centred.mean > 0 else (-0.5, 0.5 - reach)
        p = 0.0
    p = np.maximum(p, 0.5 ** (centred.prompts - 1)) if centred.prompts else np.nan
    return centred._replace(mean=centred.mean + 0.5, lo=lo + 0.5, hi=hi + 0.5, p=float(p))


def interquartile_weights(values: ArrayLike) -> Array:
    """Return the weight of each of n numbers in their interquartile mean, the mean of the middle half.

    A quarter of the mass is cut from either end, even if n / 4 is not an integer; equal numbers share their weights.
    """
    values = np.asarray(values, float)
    n = len(values)
    ends = np.clip(np.arange(n + 1) / n, 0.25, 0.75)
    by_rank = np.diff(ends) * 2
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.bincount(place, by_rank[np.argsort(np.argsort(values, kind="stable"))]) / count)[place]


def interquartile_mean(
    gains: Sequence[ArrayLike],
    by_task: Sequence[bool],
    strata: ArrayLike | None = None,
    votes: Sequence[str] | None = None,
) -> Array:
    """Return (P, 1, S) contributions of prompts and seeds to the interquartile mean of M measures' mean gains.

    ``gains``: M arrays (P, I, S) in one unit; the mean gain of a ``by_task`` measure is the mean of its task means.
    ``votes``: measures of the same name have one vote together, their mean; by default each has its own. The
    mean of the result (by ``strata``, if given) is the interquartile mean, and its spread is that of the interquartile
    mean with the measures' ranks held fixed, an error of second order since ranks change only where gains are equal.
    Prompts and seeds for which some measure has no score are nan.
    """
    grid = np.stack([prompt_means(np.asarray(gain, float)) for gain in gains])  # (M, P, S)
    seeds = (~np.isnan(grid)).any(axis=1).all(0)
    prompts = np.flatnonzero(~np.isnan(grid[:, :, seeds]).any((0, 2)) & seeds.any())
    parts = np.full((grid.shape[1], 1, grid.shape[2]), np.nan)
    if len(prompts):
        kept = grid[:, prompts][:, :, seeds]
        even = np.full(kept.shape[1], 1 / kept.shape[1])  # a prompt's share of a mean over prompts
        groups = np.zeros(len(prompts), int) if strata is None else np.asarray(strata)[prompts]
        _, task, count = np.unique(groups, return_inverse=True, return_counts=True)
        tasks = 1 / (len(count) * count[task])  # and of a mean of task means
        shares = np.stack([tasks if grouped else even for grouped in by_task])
        means = np.einsum("mp,mps->m", shares, kept) / kept.shape[2]
        _, vote, voters = np.unique(
            range(len(means)) if votes is None else votes, return_inverse=True, return_counts=True
        )
        weights = (interquartile_weights(np.bincount(vote, means) / voters) / voters)[vote]
        parts[np.ix_(prompts, np.array([0]), seeds)] = np.einsum("m,mp,mps->ps", weights, shares / tasks, kept)[:, None]
    return parts


def clustered_se(values: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Return the closed-form standard error of the mean, with prompts as clusters and training seeds as given."""
    return float(np.sqrt(_levels([values], strata).prompts[0]))


def two_level_se(values: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Return the unbiased closed-form standard error over prompts *and* training seeds, from this array alone."""
    levels = _levels([values], strata)
    if levels.seeds[0] < 2:
        return float(np.sqrt(levels.prompts[0]))
    runs = np.nanvar(levels.columns[0], ddof=1) - levels.interaction[0]
    return float(np.sqrt(levels.prompts[0] + max(runs, 0.0) / levels.seeds[0]))


def detectable(se: float, df: float, alpha: float, power: float = 0.8) -> float:
    """Return the true difference that a two-sided t test at level ``alpha`` finds with probability ``power``."""
    return float(se * (stdtrit(df, 1 - alpha / 2) + stdtrit(df, power)))


def holm(p_values: ArrayLike) -> Array:
    """Return Holm's step-down adjusted p-values; rejecting those <= alpha keeps the family-wise error <= alpha.

    nan stays nan and does not count as a comparison.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # argsort puts nan last
    adjusted = np.full(p.shape, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def prompt_means(values: Array) -> Array:
    """Return (P, S) means of the valid images of (P, I, S) ``values``; nan without any."""
    if values.shape[1] == 1:
        return values[:, 0]
    valid = ~np.isnan(values)
    count = valid.sum(1)
    return np.where(count > 0, np.where(valid, values, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def _strata(prompts: int, strata: ArrayLike | None) -> tuple[tuple[int, ...], NDArray[np.intp]]:
    """Return the number of prompts in each stratum, and the order that sorts prompts by stratum."""
    groups = np.zeros(prompts, int) if strata is None else np.asarray(strata)
    return tuple(np.unique(groups, return_counts=True)[1].tolist()), np.argsort(groups, kind="stable")


def _levels(arrays: Sequence[ArrayLike], strata: ArrayLike | None) -> Levels:
    """Return the (stratified) means of arrays (P, I, S) with nan, and their variances.

    Arrays may have different gaps and different numbers of seeds. A variance is nan if a stratum has one prompt.
    """
    by_array = [prompt_means(np.asarray(values, float)) for values in arrays]
    width = max(means.shape[1] for means in by_array)
    grids: Array = np.full((len(arrays), by_array[0].shape[0], width), np.nan)
    for grid, means in zip(grids, by_array):
        grid[:, : means.shape[1]] = means
    present: NDArray[Any] = ~np.isnan(grids)
    has = np.asarray(present.any(axis=1))  # (L, S) seeds
    used = (present | ~np.expand_dims(has, 1)).all(axis=2) & has.any(axis=1, keepdims=True)  # (L, P) prompts
    seeds = has.sum(1)
    cells: NDArray[Any] = np.expand_dims(used, 2) & np.expand_dims(has, 1)
    grids = np.where(cells, grids, 0.0)
    _, member = np.unique(np.zeros(used.shape[1]) if strata is None else np.asarray(strata), return_inverse=True)
    inside = np.eye(member.max(initial=0) + 1)[member]  # (P, T)
    n = used @ inside  # (L, T) prompts of a stratum
    with np.errstate(invalid="ignore", divide="ignore"):
        per_prompt = used / (n.shape[1] * n)[:, member]  # weight of a prompt in the mean
        columns = np.where(has, np.einsum("lp,lps->ls", per_prompt, grids), np.nan)
        rows = grids.sum(2) / seeds[:, None]
        stratum = np.einsum("lps,pt->lts", grids, inside) / n[:, :, None]
        row = np.where(used, rows - (np.einsum("lp,pt->lt", rows, inside) / n)[:, member], 0.0)
        residual = np.where(cells, grids - row[:, :, None] - stratum[:, member], 0.0)
        squares, df = (row**2) @ inside, n - 1  # (L, T)
        prior = np.minimum(PRIOR, df.sum(1, keepdims=True) - df)  # degrees of freedom lent by the other strata
        pooled = squares.sum(1, keepdims=True) / df.sum(1, keepdims=True)
        unscaled = squares / df / n / n.shape[1] ** 2
        by_stratum = np.maximum(squares / df, (squares + prior * pooled) / (df + prior)) / n / n.shape[1] ** 2
        interaction = (residual**2).sum(2) @ inside / df / (seeds - 1)[:, None] / n / n.shape[1] ** 2
        full = np.bincount(member, minlength=n.shape[1])  # the draws are rescaled for strata of this size
        rescaled = np.sqrt(
            n / df * (full - 1) / full * by_stratum.sum(1, keepdims=True) / unscaled.sum(1, keepdims=True)
        )
        return Levels(
            mean=np.where(has.any(axis=1), (columns * has).sum(1, where=has) / seeds, np.nan),
            prompts=by_stratum.sum(1),
            noise=(by_stratum**2 / (df + prior)).sum(1),
            interaction=np.where(seeds > 1, interaction.sum(1), np.nan),
            columns=columns,
            rows=np.where(used & (row != 0), row * per_prompt * rescaled[:, member], 0.0),
            used=used.sum(1),
            dropped=(~used).sum(1),
            seeds=seeds,
        )


@lru_cache(maxsize=2)  # 4,000 x 30,000 prompts are 1 GB
def _prompt_weights(sizes: tuple[int, ...], draws: int, seed: int) -> Array:
    """Return (draws, P) rescaled resampling counts minus one, drawn within each stratum and shared by all methods."""
    rng = np.random.default_rng((seed, *sizes))
    blocks = [(rng.multinomial(n, np.full(n, 1 / n), draws) - 1.0) * np.sqrt(n / max(n - 1, 1)) for n in sizes if n]
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((draws, 0))


@lru_cache(maxsize=8)
def _normal(draws: int, seed: int) -> Array:
    """Return (draws,) standard normal numbers for the level of training seeds."""
    return np.random.default_rng((seed, draws)).standard_normal(draws)


@lru_cache(maxsize=8)
def _normals(draws: int, count: int, seed: int) -> Array:
    """Return (draws, count) standard normal numbers, one per training seed, shared by all points of a curve."""
    return np.random.default_rng((seed, draws, count)).standard_normal((draws, count))

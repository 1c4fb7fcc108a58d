"""Means, paired differences and their uncertainty, for scores that share prompts and training seeds.

The data of one method and one metric is an array (P prompts, I images of a prompt, S training seeds). What varies is
the prompt, the training seed, and their interaction; the images of one prompt are one cluster. Prompts are *crossed*
with seeds (every seed is scored on the same prompts), so one resample of prompts serves all seeds.

    variance = prompts + max(0, seeds - interaction)

where *prompts* and *seeds* are the variances of the mean estimated from the spread of the row and column means. Both
contain the interaction, which is therefore subtracted once (as in two-way analysis of variance; resampling rows and
columns together counts it three times: Owen, "The pigeonhole bootstrap", 2007, eq. 9).

Three departures from the plain percentile bootstrap, because seeds are few:
1. resampled prompt weights are rescaled by sqrt(n / (n - 1)) (Rao and Wu 1988), which makes the bootstrap's variance
   equal the clustered closed form in expectation, even in small strata;
2. the seeds' contribution is drawn from a normal: two seeds have three distinct resamples, too few for quantiles;
3. percentile distances are expanded by t_df / z (Hesterberg 2015), with Satterthwaite's df for the two levels.
Few seeds say little about how much training runs differ: unless the true spread is small, a 95 % interval of a single
method covers 92-95 % with three seeds and 86-97 % with two, and in 10 % of sweeps with three seeds at least one of five
methods that change nothing is called different. ``SeedSpread`` therefore pools the variance between seeds over the
methods of a table, and the larger of own and pooled variance counts, whatever the number of seeds. Simulated with 60
prompts, normal and heavy-tailed scores, with and without tasks: intervals cover 94-97 % and false differences stay at
5 % if methods have similar spreads between runs. A method whose runs differ many times more than those of all others
is covered in 78-88 % of cases with two seeds, 85-89 % with three, 90-92 % with five. With one seed and no pool, the
variance between runs is unknown and left out. Prompts count as independent draws (within their tasks), so a set with
many near-copies of one prompt has fewer than it seems.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

Array = NDArray[np.float64]

DRAWS = 4000  # bootstrap resamples: the error of a 95 % limit is about 2 % of the interval's width


class MeanEstimate(NamedTuple):
    """A mean with its uncertainty and sample sizes. With one prompt in a stratum the spread is unknown: nan."""

    mean: float = np.nan
    lo: float = np.nan
    hi: float = np.nan
    se: float = np.nan  # of the bootstrap draws
    df: float = np.nan  # Satterthwaite's degrees of freedom
    p: float = np.nan  # two-sided, of "the true mean is zero": t = mean / se on df degrees of freedom
    prompts: int = 0  # used
    seeds: int = 0  # used
    dropped: int = 0  # prompts left out: some seed, or one side of a pair, has no valid score
    se_prompts: float = np.nan  # closed form, prompts as clusters, the trained seeds taken as given


class SeedSpread(NamedTuple):
    """Variance between training runs, pooled over methods; per seed, so a mean over S seeds has 1 / S of it."""

    variance: float  # interaction subtracted, at least zero
    raw: float  # with the interaction
    df: int


class Levels(NamedTuple):
    """Closed-form variances of the means of L arrays, by level, and the means themselves; (L,) unless stated."""

    mean: Array
    prompts: Array
    seeds: Array  # interaction subtracted, at least zero
    raw_seeds: Array  # with the interaction
    interaction: Array
    df: Array
    rows: Array  # (L, P) prompt means, minus the mean of their stratum
    weights: Array  # (P,) a prompt's share of the mean


class Block(NamedTuple):
    """Arrays of a list that have scores for the same prompts and seeds: full grids, sorted by stratum."""

    members: list[int]  # positions in the list
    grids: Array  # (L, P', S') prompt means
    groups: NDArray  # (P',) the stratum of each prompt
    dropped: int  # prompts left out

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of prompts in each stratum."""
        return tuple(np.unique(self.groups, return_counts=True)[1].tolist())


def mean_interval(
    values: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    pooled: SeedSpread | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> MeanEstimate:
    """Return the mean of ``values`` (P, I, S) over prompts and seeds with a bootstrap interval; nan: missing score.

    ``strata`` (P,): the task of every prompt. The mean is then the unweighted mean of the task means (GenEval), and
    prompts are resampled within their task; a task without any score makes the mean nan, not one over fewer tasks.

    ``pooled``: the variance between training runs pooled over methods; the larger of pooled and own variance counts.

    A prompt's score under one seed is the mean of its valid images. Seeds without any score are left out, and so are
    prompts that lack a score under one of the remaining seeds; ``dropped`` counts these prompts.
    """
    return mean_intervals([values], strata, pooled=pooled, level=level, draws=draws, seed=seed)[0]


def mean_intervals(
    arrays: Sequence[ArrayLike],
    strata: ArrayLike | None = None,
    *,
    pooled: SeedSpread | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[MeanEstimate]:
    """Return ``mean_interval`` of each array; all share their resamples, so that one matrix product serves them."""
    results = [MeanEstimate()] * len(arrays)
    tasks = 0 if strata is None else len(np.unique(np.asarray(strata)))
    for block in _blocks(arrays, strata):
        _, prompts, seeds = block.grids.shape
        rests_on = {"prompts": prompts, "seeds": seeds, "dropped": block.dropped}
        if block.grids.size == 0 or len(block.sizes) < tasks:
            estimates = [MeanEstimate(**rests_on)] * len(block.members)
        else:
            estimates = _estimates(block, pooled, level, draws, seed)
        for place, estimate in zip(block.members, estimates):
            results[place] = estimate._replace(**rests_on)
    return results


def _estimates(block: Block, pooled: SeedSpread | None, level: float, draws: int, seed: int) -> list[MeanEstimate]:
    levels = _levels(block, pooled)
    deviations = _draws(levels, block.sizes, draws, seed)
    stretch = stdtrit(levels.df, 0.5 + level / 2) / ndtri(0.5 + level / 2)
    lo, hi = levels.mean + np.quantile(deviations, [0.5 - level / 2, 0.5 + level / 2], axis=1) * stretch
    se = deviations.std(axis=1)
    p = _p_value(levels.mean, se, levels.df)
    columns = zip(levels.mean, lo, hi, se, levels.df, p, np.sqrt(levels.prompts))
    names = ("mean", "lo", "hi", "se", "df", "p", "se_prompts")
    return [MeanEstimate(**dict(zip(names, map(float, row)))) for row in columns]  # type: ignore[arg-type]


def paired_difference(
    values: ArrayLike,
    baseline: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    pooled: SeedSpread | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> MeanEstimate:
    """Return ``mean_interval`` of values - baseline, image by image: same prompt, same noise, same training seed.

    An untrained baseline has one seed, (P, I, 1), which pairs with every seed. A pair with nan on either side is left
    out. Seeds pair by number: runs with the same seed saw the same batches, whose common effect cancels.
    """
    difference = np.asarray(values, float) - np.asarray(baseline, float)
    return mean_interval(difference, strata, pooled=pooled, level=level, draws=draws, seed=seed)


def curve_draws(
    values: ArrayLike, strata: ArrayLike | None = None, *, draws: int = DRAWS, seed: int = 0
) -> tuple[Array, Array]:
    """Return means (K,) of ``values`` (K, P, I, S) and joint resamples (draws, K), for statistics of whole curves.

    One resample of prompts and of seeds serves all K points, so differences along a curve are paired, and so are curves
    on the same prompts. The variance of each point is that of ``mean_interval``, without the expansion for few seeds.
    Only prompts and seeds that every point has are used: nan without any. The resamples are nan where the spread is
    unknown, as with a single prompt in a stratum.
    """
    points = np.asarray(values, float)
    whole = ~np.isnan(points).all(2)  # (K, P, S)
    seeds = whole.any(1).all(0)
    usable = whole[:, :, seeds].all((0, 2))
    points = np.where(usable[None, :, None, None] & seeds[None, None, None, :], points, np.nan)
    block = next(_blocks(list(points), strata))  # a single one: all points now have the same gaps
    if block.grids.size == 0:
        return np.full(len(points), np.nan), np.full((draws, len(points)), np.nan)
    levels, count = _levels(block), block.grids.shape[2]
    if min(block.sizes) < 2:
        return levels.mean, np.full((draws, len(points)), np.nan)
    deviations = _prompt_weights(block.sizes, draws, seed) @ (levels.rows * levels.weights).T
    if count > 1:
        apart = np.einsum("p,kps->ks", levels.weights, block.grids) - levels.mean[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):  # the prompts' part contains the interaction
            own = np.where(levels.raw_seeds > 0, np.sqrt(levels.seeds / levels.raw_seeds), 0.0)
        deviations = deviations + _normals(draws, count, seed) @ (apart * own[:, None]).T / np.sqrt(count * (count - 1))
    return levels.mean, levels.mean + deviations


def improvements(
    arrays: Sequence[ArrayLike],
    baseline: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    pooled: bool = True,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[MeanEstimate]:
    """Return P(X > Y) of each array X against ``baseline`` Y (Agarwal et al. 2021, section 4.3, but paired).

    This is the share of images that score higher than the baseline's of the same prompt, noise and training seed; a tie
    counts half. Intervals are as for means, clipped to [0, 1]. If all prompts agree, their spread is uninformative, and
    the far end of the interval is the exact one of P successes in P trials (Clopper and Pearson 1934). ``p`` tests
    1 / 2; it is at least 2^(1 - P), the smallest value that a test of P signs can give. ``pooled``: use the spread
    between training runs pooled over all arrays where it is larger than an array's own.
    """
    base = np.asarray(baseline, float)
    signs = [np.sign(np.asarray(values, float) - base) / 2 for values in arrays]
    spread = pool_seeds(signs, strata) if pooled else None
    estimates = mean_intervals(signs, strata, pooled=spread, level=level, draws=draws, seed=seed)
    return [_share(estimate, 0.5 - level / 2) for estimate in estimates]


def _share(centred: MeanEstimate, tail: float) -> MeanEstimate:
    """Return the share in [0, 1] whose ``centred`` estimate, minus 1 / 2, is given."""
    lo, hi = max(centred.lo, -0.5), min(centred.hi, 0.5)
    if centred.se < 1e-12 and abs(centred.mean) > 0.5 - 1e-12:
        reach = tail ** (1 / centred.prompts)
        lo, hi = (reach - 0.5, 0.5) if centred.mean > 0 else (-0.5, 0.5 - reach)
    p = max(centred.p, 0.5 ** (centred.prompts - 1)) if centred.prompts else np.nan
    return centred._replace(mean=centred.mean + 0.5, lo=lo + 0.5, hi=hi + 0.5, p=p)


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
    seeds = (~np.isnan(grid)).any(1).all(0)
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


def pool_seeds(arrays: Iterable[ArrayLike], strata: ArrayLike | None = None) -> SeedSpread | None:
    """Return the mean variance between seeds of independent ``arrays`` (P, I, S), with S - 1 degrees of freedom each.

    None if no array has two seeds.
    """
    blocks = [block for block in _blocks(list(arrays), strata) if block.grids.size and block.grids.shape[2] > 1]
    return _pooled([(_levels(block), block.grids.shape[2]) for block in blocks], 1.0) if blocks else None


def pool_pairs(arrays: Sequence[ArrayLike], strata: ArrayLike | None = None) -> SeedSpread | None:
    """Return the mean variance between seeds of all differences of two of k ``arrays``.

    None if fewer than two have two seeds. The k (k - 1) / 2 differences have (k - 1) (S - 1) degrees of freedom in
    total. For full arrays no differences are computed: as a variance is quadratic, the sum over pairs of Q(a - b) is k
    times the sum of Q(a - mean of all).
    """
    able = [block for block in _blocks(arrays, strata) if block.grids.size and block.grids.shape[2] > 1]
    members = sorted(place for block in able for place in block.members)
    if len(members) < 2:
        return None
    if len(able) == 1:
        grids = able[0].grids
        centred = able[0]._replace(grids=grids - grids.mean(0))
        return _pooled([(_levels(centred), grids.shape[2])], 2 * len(members) / (len(members) - 1), 1)
    pairs = [np.asarray(arrays[a], float) - np.asarray(arrays[b], float) for a, b in itertools.combinations(members, 2)]
    spread = pool_seeds(pairs, strata)
    return spread and spread._replace(df=round(spread.df * 2 / len(members)))


def _pooled(blocks: Sequence[tuple[Levels, int]], factor: float, lost: int = 0) -> SeedSpread:
    """Return the mean spread over arrays, times ``factor``; ``lost``: how many arrays the others determine."""
    raw = factor * float(np.mean(np.concatenate([seeds * levels.raw_seeds for levels, seeds in blocks])))
    interaction = factor * float(np.mean(np.concatenate([seeds * levels.interaction for levels, seeds in blocks])))
    df = sum((seeds - 1) * (len(levels.mean) - lost) for levels, seeds in blocks)
    return SeedSpread(max(0.0, raw - interaction), raw, df)


def clustered_se(values: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Return the closed-form standard error of the mean, with prompts as clusters and training seeds as given."""
    levels = _closed_form(values, strata)
    return float(np.sqrt(levels.prompts[0])) if levels else np.nan


def two_level_se(values: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Return the closed-form standard error over prompts *and* training seeds, the limit of the bootstrap's."""
    levels = _closed_form(values, strata)
    return float(np.sqrt(levels.prompts[0] + levels.seeds[0])) if levels else np.nan


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


def _blocks(arrays: Sequence[ArrayLike], strata: ArrayLike | None) -> Iterator[Block]:
    """Yield full grids of prompt means of arrays (P, I, S) with nan, grouping arrays that have the same gaps."""
    by_gaps: dict[tuple[bytes, bytes], list[tuple[int, Array]]] = {}
    for place, values in enumerate(arrays):
        means = prompt_means(np.asarray(values, float))
        seeds = (~np.isnan(means)).any(0)
        prompts = ~np.isnan(means[:, seeds]).any(1) & seeds.any()
        by_gaps.setdefault((prompts.tobytes(), seeds.tobytes()), []).append((place, means))
    for (prompt_bytes, seed_bytes), members in by_gaps.items():
        prompts, seeds = (np.frombuffer(mask, bool) for mask in (prompt_bytes, seed_bytes))
        groups = (np.zeros(len(prompts), int) if strata is None else np.asarray(strata))[prompts]
        order = np.argsort(groups, kind="stable")
        grids = np.stack([means for _, means in members])[:, prompts][:, order][:, :, seeds]
        yield Block([place for place, _ in members], grids, groups[order], int((~prompts).sum()))


def _closed_form(values: ArrayLike, strata: ArrayLike | None) -> Levels | None:
    block = next(_blocks([values], strata))
    return _levels(block) if block.grids.size else None


def _levels(block: Block, pooled: SeedSpread | None = None) -> Levels:
    """Return the variances of the (stratified) means of full grids; nan if a stratum has one prompt."""
    grids, sizes = block.grids, block.sizes
    n_seeds = grids.shape[2]
    n = np.asarray(sizes, float)
    member = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    weights = 1.0 / (len(sizes) * n)[member]
    columns = np.einsum("p,lps->ls", weights, grids)
    stratum = np.add.reduceat(grids, starts, axis=1) / n[:, None]  # (L, T, S)
    rows = grids.mean(2) - stratum.mean(2)[:, member]
    residual = grids - rows[:, :, None] - stratum[:, member]
    with np.errstate(invalid="ignore", divide="ignore"):
        by_stratum = np.add.reduceat(rows**2, starts, axis=1) / (n - 1) / n / len(sizes) ** 2  # (L, T)
        prompts = by_stratum.sum(1)
        raw = columns.var(axis=1, ddof=1) / n_seeds if n_seeds > 1 else np.zeros(len(grids))
        spread = np.add.reduceat((residual**2).sum(2), starts, axis=1) / (n - 1) / max(n_seeds - 1, 1)
        interaction = (spread / (n * n_seeds)).sum(1) / len(sizes) ** 2  # of the mean
        seeds = np.maximum(raw - interaction, 0.0)
        noise = (by_stratum**2 / (n - 1)).sum(1)
        if pooled is None:
            noise += raw**2 / max(n_seeds - 1, 1)
        else:
            seeds = np.maximum(seeds, pooled.variance / n_seeds)
            noise += (pooled.raw / n_seeds) ** 2 / pooled.df
        df = np.where(noise > 0, np.maximum((prompts + seeds) ** 2 / noise, 1.0), np.inf)
    return Levels(columns.mean(1), prompts, seeds, raw, interaction, df, rows, weights)


def _draws(levels: Levels, sizes: tuple[int, ...], draws: int, seed: int) -> Array:
    """Return (L, draws) deviations of resampled means from the mean; nan if the prompts' spread is unknown."""
    if min(sizes) < 2:
        return np.full((len(levels.mean), draws), np.nan)
    deviations = (levels.rows * levels.weights) @ _prompt_weights(sizes, draws, seed).T
    return deviations + np.sqrt(levels.seeds)[:, None] * _normal(draws, seed)


@lru_cache(maxsize=8)
def _prompt_weights(sizes: tuple[int, ...], draws: int, seed: int) -> Array:
    """Return (draws, P) rescaled resampling counts minus one, drawn within each stratum and shared by all methods."""
    rng = np.random.default_rng((seed, *sizes))
    blocks = [(rng.multinomial(n, np.full(n, 1 / n), draws) - 1.0) * np.sqrt(n / (n - 1)) for n in sizes]
    return np.concatenate(blocks, axis=1)


@lru_cache(maxsize=8)
def _normal(draws: int, seed: int) -> Array:
    """Return (draws,) standard normal numbers for the level of training seeds."""
    return np.random.default_rng((seed, draws)).standard_normal(draws)


@lru_cache(maxsize=8)
def _normals(draws: int, count: int, seed: int) -> Array:
    """Return (draws, count) standard normal numbers, one per training seed, shared by all points of a curve."""
    return np.random.default_rng((seed, draws, count)).standard_normal((draws, count))


def _p_value(mean: Array, se: Array, df: Array) -> Array:
    """Return the two-sided p-value of t; without any spread, 1 if the mean is zero, else 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        tails = 2 * stdtr(df, -np.abs(mean) / se)
    return np.where(se == 0, np.where(mean == 0, 1.0, 0.0), tails)

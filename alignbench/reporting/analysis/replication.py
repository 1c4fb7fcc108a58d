"""Chance in the difference of two studies that score the same prompts: how far may a replication lie from ours?

Ours is a mean over P prompts, I images of each and S training runs, theirs one over the same prompts, I' images and one
training run. With the prompts fixed, a score is y_pis = m_p + r_ps + e_pis: a training run has an effect r_ps on each
prompt, whose mean over the prompts (seed and prompt x seed together) is the run's own; e_pis is the noise of an image,
which our runs partly share, since image i of a prompt has the same starting noise in all of them. If both studies
measure the same thing, then

    var(ours - theirs) = R (1 / S + 1) + U + V / I'

    U: variance of our mean due to image noise: of each prompt, the variance over i of the mean over s of y_pis, over I
    V: the same of one training run with one image per prompt: of each prompt, the variance over i of y_pis
    R: variance between training runs, B - E. B is the variance of the S run means. It contains the noise that they do
       not share, E = (V / I - U) S / (S - 1)

U and V are sums over prompts with squared weights of the mean: 1 / P^2, or by task 1 / (T P_t)^2. B is pooled over the
trained rows. Rows of one seed share effects, so its degrees of freedom are those of a crossed layout (seed, and row x
seed): n / (f^2 + (1 - f)^2 / (K - 1)) for K rows with n = S - 1 each, where f is the share of the squares that the mean
over rows has. This is n if all effects are shared, and K n if none are. As few runs say little about f, one degree of
freedom with f = 1 is added. The larger of own and pooled B counts; if a row's runs differ more than those of the others
(F test at 30 %), its own alone, with its own n.

The half width is the root of the sum of t^2 v over v = B (1 / S + 1) and the rest of the variance, each with Student's
t for its own degrees of freedom. That is conservative. With joint degrees of freedom (Satterthwaite), two or three
training runs that happen to be alike would hide B, and up to 13 % of true agreements would be called different.

Scores of 0 and 1 that are all alike would have no variance. So p (1 - p) is taken with two successes and two failures
added (Agresti and Coull 1998), and the share of it that lies within prompts, V / (p (1 - p)), as if four more prompts
with even odds and independent images had been seen.

With one image per prompt, noise cannot be told from what prompts differ by. The spread over prompts has both, so it is
an upper bound of the noise (``bound``): beyond it two studies differ, within it nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import fdtrc, stdtrit

from alignbench.reporting.analysis.stats import Array, prompt_means

ODD = 0.3  # level of the test by which a row's training runs differ more than those of the others
EVEN = 1.0  # four pseudo-prompts with a variance of 1 / 4, for scores of 0 and 1


class Part(NamedTuple):
    """An estimated variance with its degrees of freedom."""

    variance: float
    df: float


class Chance(NamedTuple):
    """Chance in the difference of ours and theirs: the parts of its variance, none if it is unknown."""

    parts: tuple[Part, ...] = ()
    bound: bool = False  # the true variance is at most this

    def half_width(self, level: float = 0.95) -> float:
        """Return the distance that two studies of the same truth exceed with a probability of 1 - ``level``, or nan."""
        squares = [variance * float(stdtrit(df, 0.5 + level / 2)) ** 2 for variance, df in self.parts if variance]
        return math.sqrt(sum(squares)) if squares else math.nan


class Noise(NamedTuple):
    """Image noise in a row's mean by task; summed over tasks, these are U and V of the module."""

    ours: Array  # (T,)
    single: Array  # (T,)
    df: Array  # (T,)
    bound: bool


class Study:
    """Scores of one measure: label -> (P, I, S), nan where missing. ``trained``: labels whose runs were trained here.

    ``strata`` (P,): the task of every prompt if the mean is one of task means.
    """

    def __init__(self, values: Mapping[str, Array], trained: Collection[str], strata: ArrayLike | None = None) -> None:
        self._values = values
        self._trained = trained
        self._strata = strata
        means = {label: self._run_means(label) for label in trained}
        self._means = {label: found for label, found in means.items() if np.count_nonzero(~np.isnan(found)) > 1}

    def is_one_run(self, label: str) -> bool:
        """Return whether the row was trained and no row shows how much training runs differ."""
        return label in self._trained and not self._means

    def chance(self, label: str, images: int | None = None, se: float = 0.0) -> Chance:
        """Return the chance in the row's mean minus that of one other training run (of the same weights if untrained).

        ``images``: theirs per prompt, by default as many as ours. ``se``: their standard error if they state it; it
        counts if it is larger than what we estimate for them, since it may leave out images or training runs.
        """
        values, groups = self._whole(label)
        if not values.size or self.is_one_run(label):
            return Chance()
        per_prompt, seeds = values.shape[1:]
        noise = _noise(values, groups)
        theirs = noise.single / (images or per_prompt)
        if np.isnan(theirs).any():
            return Chance()
        runs, apart = Part(0.0, np.inf), 0.0
        if label in self._trained:
            runs = self._runs(label)
            if seeds > 1 and not noise.bound:
                apart = max(0.0, float((noise.single / per_prompt - noise.ours).sum()) * seeds / (seeds - 1))
        share = 1 / seeds + 1
        printed = se**2 > max(0.0, runs.variance - apart) + theirs.sum()
        if printed:
            share, theirs = 1 / seeds, np.zeros_like(theirs)
        between = share * max(runs.variance, apart)
        parts = noise.ours + theirs
        left = max(0.0, float(parts.sum()) - share * apart)
        df = parts.sum() ** 2 / (parts**2 / noise.df).sum() if parts.any() else np.inf
        known = Part(se**2 if printed else 0.0, np.inf)
        return Chance((Part(between, runs.df), Part(left, float(df)), known), noise.bound)

    def _whole(self, label: str) -> tuple[Array, NDArray]:
        """Return the scores of seeds that have any, for prompts scored under each of them; and the tasks of these."""
        values = np.asarray(self._values[label], float)
        grid = prompt_means(values)
        seeds = ~np.isnan(grid).all(0)
        whole = ~np.isnan(grid[:, seeds]).any(1) & seeds.any()
        groups = np.zeros(len(values), int) if self._strata is None else np.asarray(self._strata)
        return values[whole][:, :, seeds], groups[whole]

    def _run_means(self, label: str) -> Array:
        """Return the (S,) means of the row's training runs; nan for seeds without scores."""
        values, groups = self._whole(label)
        seeds = ~np.isnan(prompt_means(self._values[label])).all(0)
        means = np.full(seeds.shape, np.nan)
        if values.size:
            grid = prompt_means(values)
            means[seeds] = np.mean([grid[groups == group].mean(0) for group in np.unique(groups)], axis=0)
        return means

    def _runs(self, label: str) -> Part:
        pooled = _pooled(list(self._means.values()))
        if label not in self._means:
            return pooled
        own = _pooled([self._means[label]])
        others = [means for other, means in self._means.items() if other != label]
        if others and own.variance > 0:
            rest = _pooled(others)
            if rest.variance == 0 or fdtrc(own.df, rest.df, own.variance / rest.variance) < ODD:
                return own
        return Part(max(own.variance, pooled.variance), pooled.df)


def _pooled(rows: list[Array]) -> Part:
    """Return the mean variance between the runs of K rows, with the degrees of freedom of a crossed layout."""
    means = np.stack(rows)
    apart = np.nan_to_num(means - np.nanmean(means, axis=1, keepdims=True))
    n = np.count_nonzero(~np.isnan(means)) / len(rows) - 1
    total = (apart**2).sum()
    shared = len(rows) * (apart.mean(0) ** 2).sum() / total if total > 0 else 1.0
    shared = (n * shared + 1) / (n + 1)
    return Part(float(total / (n * len(rows))), n / (shared**2 + (1 - shared) ** 2 / max(len(rows) - 1, 1)))


def _noise(values: Array, groups: NDArray) -> Noise:
    """Return the image noise of (P, I, S) scores in which every prompt has a valid image under every seed."""
    tasks = [values[groups == task] for task in np.unique(groups)]
    bound = not all(_repeated(scores).any() for scores in tasks)
    binary = bool(np.isin(values[~np.isnan(values)], (0, 1)).all())
    parts = []
    for scores in tasks:
        single, ours, df = _over_prompts(scores) if bound else _within_prompts(scores)
        if binary:
            single, ours, df = _of_shares(scores, single, ours, bound)
        weight = len(scores) * len(tasks) ** 2
        parts.append((ours / weight, single / weight, df))
    columns = np.array(parts, float).T
    return Noise(columns[0], columns[1], columns[2], bound)


def _repeated(values: Array) -> NDArray:
    """Return a mask of the prompts that have two images under every seed."""
    mask: NDArray = ((~np.isnan(values)).sum(1) > 1).all(1)
    return mask


def _within_prompts(values: Array) -> tuple[float, float, float]:
    """Return a prompt's average variance of one image and of our mean over images and seeds, with their df."""
    values = values[_repeated(values)]
    valid = ~np.isnan(values)
    count = valid.sum(1, keepdims=True)
    apart = np.where(valid, values - prompt_means(values)[:, None], 0.0)
    single = (apart**2).sum(1) / (count - 1)[:, 0]
    ours = ((apart / np.sqrt(count * (count - 1))).mean(2) ** 2).sum(1)
    return float(single.mean()), float(ours.mean()), float(len(values) * (values.shape[1] - 1))


def _over_prompts(values: Array) -> tuple[float, float, float]:
    """Return the variances over prompts of one image and of our mean, with their df; nan with one prompt."""
    if len(values) < 2:
        return np.nan, np.nan, np.nan
    grid = prompt_means(values)
    most = int((~np.isnan(values)).sum(1).max())
    return float(grid.var(axis=0, ddof=1).mean() * most), float(grid.mean(1).var(ddof=1)), len(values) - 1.0


def _of_shares(values: Array, single: float, ours: float, bound: bool) -> tuple[float, float, float]:
    """Return both variances for scores of 0 and 1, as in the module's docstring."""
    size, images = values.shape[:2]
    share, count = np.nanmean(values), size * images
    safe = (share * count + 2) / (count + 4)
    most = float(safe * (1 - safe))
    df = max(count - 1.0, 1.0)
    if bound:
        return most, most, df
    within = (size * single + EVEN) / (size * share * (1 - share) + EVEN)
    kept = (size * ours * images + EVEN) / (size * single + EVEN)  # of the noise, in the mean over seeds
    return within * most, kept * within * most / images, df

"""How much training runs differ: variances between the runs of rows that share their training seeds.

The mean of row m under seed s, over the same prompts for every s, is

    x_ms = mean_m + shared_s + own_ms + interaction_ms,

where *shared* is what a seed does to all rows alike (they see the same prompts and noise at every step), *own* is what
it does to this row, and *interaction* is the noise of finitely many prompts and images. Two-way analysis of variance
over M rows and S seeds gives the mean squares

    between seeds   MS_s, expected  own^2 + M shared^2,  on S - 1 degrees of freedom
    residual        MS_r, expected  own^2,               on (M - 1) (S - 1)

(each with the interaction's variance added). A row differs from an untrained one by MS_s / M + (1 - 1 / M) MS_r per
run, two rows differ by 2 MS_r: the shared effect cancels. Satterthwaite's degrees of freedom follow from the parts. Not
every row needs every seed; M is then the effective number of rows, df / df_s of the sums of squares within rows.

Three corrections, whose constants were chosen by simulation (docs/statistics.md):

1. A mean square on f = 1 or 2 degrees of freedom is often far too small, and Satterthwaite's formula then trusts the
   prompts alone. It is therefore multiplied by k(f) = 1 + 5 / f^3; of MS_s, what exceeds 2 MS_r.
2. Rows need not have equal spreads. A row's own variance s_m^2 on f degrees of freedom counts beyond the pool by
   max(0, s_m^2 - (1 + 3 / f) pool), the pool being that of all other rows.
3. A row is *unstable* if the F test of its variance against that of all others has p < 0.05 / M. The row with the
   smallest p is then left out of the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

Array = NDArray[np.float64]

ALPHA = 0.05


@dataclass(frozen=True)
class RunVariance:
    """Variance between the runs of one quantity, per run, with the interaction of prompts and seeds in it."""

    value: float
    noise: float  # half the variance of this estimate: value^2 / df, summed over its independent parts
    interaction: float = 0.0  # the mean interaction of the rows it was estimated from

    def __add__(self, other: RunVariance) -> RunVariance:
        return RunVariance(self.value + other.value, self.noise + other.noise, self.interaction + other.interaction)


NOTHING = RunVariance(0.0, 0.0)


@dataclass(frozen=True)
class RunSpread:
    """Variances between the training runs of rows, pooled over them. Rows without two runs take part in the result."""

    pooled: RunVariance  # of one row
    residual: RunVariance | None  # of a difference of two; None if the seeds' shared effect cannot be told apart
    excess: Mapping[int, RunVariance] = field(default_factory=dict)  # row -> what its own variance adds to the pool
    unstable: list[int] = field(default_factory=list)  # rows whose runs differ more than those of the others

    def of(self, *rows: int) -> RunVariance | None:
        """Return the variance of a row's mean, or of the difference of two rows; None for no row: nothing was trained.

        The difference from an untrained row is that of the row alone.
        """
        if not rows:
            return None
        if len(rows) == 2 and self.residual is None:
            return self._total(self.pooled, rows[:1]) + self._total(self.pooled, rows[1:])
        return self._total(self.pooled if len(rows) == 1 or self.residual is None else self.residual, rows)

    def _total(self, pooled: RunVariance, rows: Sequence[int]) -> RunVariance:
        return functools.reduce(RunVariance.__add__, (self.excess.get(row, NOTHING) for row in rows), pooled)


def estimate(means: Array, interaction: Array, prompts: NDArray[np.int64] | None = None) -> RunSpread | None:
    """Return the spread from ``means`` (M, S) of rows under seeds, nan where a row has no such run.

    ``interaction`` (M,): the variance of a mean under one seed from the interaction. ``prompts`` (M,): of each row; one
    with less than half of the most prompts says too little of its runs, and takes the others' spread. None if no row
    has two runs.
    """
    df = (~np.isnan(means)).sum(1) - 1
    rows = np.flatnonzero(df > 0)
    if prompts is not None and len(rows):
        rows = rows[2 * prompts[rows] >= prompts[rows].max()]
    if not len(rows):
        return None
    means, interaction, df = means[rows], interaction[rows], df[rows]
    variances = np.nanvar(means, axis=1, ddof=1)
    outlier = _outlier(variances, df, interaction)
    kept = np.array([m for m in range(len(rows)) if m != outlier])
    total, df_total = float((variances * df)[kept].sum()), int(df[kept].sum())
    within, df_within = _residual(means[kept])
    between, df_between = max(total - within, 0.0), df_total - df_within
    noise = float(interaction[kept].mean())
    own_square = within / df_within if df_within else 0.0
    effective = df_total / df_between  # rows
    shared = _guarded(between / df_between, df_between, 2 * own_square) / effective
    rest = (1 - 1 / effective) * own_square
    pooled = RunVariance(shared + rest, shared**2 / df_between + rest**2 / max(df_within, 1), noise)
    residual = None
    if df_within:
        difference = 2 * _guarded(own_square, df_within)
        residual = RunVariance(difference, difference**2 / df_within, noise)
    excess = {}
    for m, row in enumerate(rows.tolist()) if len(rows) > 2 else ():
        others = total / df_total if m == outlier else (total - variances[m] * df[m]) / (df_total - df[m])
        beyond = variances[m] - (1 + 3 / df[m]) * max(others, interaction[m])
        if beyond > 0:
            excess[row] = RunVariance(float(beyond), float(beyond**2 / df[m]))
    return RunSpread(pooled, residual, excess, [int(rows[outlier])] if outlier is not None else [])


def _factor(df: int) -> float:
    return 1 + 5 / df**3


def _guarded(mean_square: float, df: int, reference: float = 0.0) -> float:
    return mean_square + (_factor(df) - 1) * max(mean_square - reference, 0.0)


def _outlier(own: Array, df: NDArray[np.int64], least: Array) -> int | None:
    """Return the row whose variance is larger than that of all others by an F test; None if there is none.

    ``least`` (M,): what the others' variance is taken as at least, the row's own interaction.
    """
    if len(own) < 3:
        return None
    rest = df.sum() - df
    others = np.maximum(((own * df).sum() - own * df) / rest, least)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(own > 0, fdtrc(df, rest, own / others), 1.0)
    worst = int(np.argmin(p))
    return worst if p[worst] < ALPHA / len(own) else None


def _residual(means: Array) -> tuple[float, int]:
    """Return the residual sum of squares of rows plus seeds, fitted to all cells that exist, and its df."""
    row, seed = np.nonzero(~np.isnan(means))
    design = np.concatenate([np.eye(means.shape[0])[row], np.eye(means.shape[1])[seed]], axis=1)
    values = means[row, seed]
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fitted) ** 2).sum()), len(values) - int(rank)

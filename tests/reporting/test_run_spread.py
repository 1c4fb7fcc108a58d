"""Claims about the variances between training runs: closed forms, and effects that cancel."""

import numpy as np
import pytest

from alignbench.reporting.analysis.run_spread import estimate

NONE = np.zeros(20)


def shifted(rows, seeds, shared=0.0, own=1.0, rng=0):
    rng = np.random.default_rng(rng)
    return rng.normal(size=(rows, 1)) * 3 + rng.normal(size=seeds) * shared + rng.normal(size=(rows, seeds)) * own


def two_way(means):
    """Mean squares between seeds and residual, by the textbook's formulas for a full table."""
    rows, seeds = means.shape
    centred = means - means.mean(1, keepdims=True)
    between = rows * (centred.mean(0) ** 2).sum() / (seeds - 1)
    return between, ((centred - centred.mean(0)) ** 2).sum() / (rows - 1) / (seeds - 1)


def test_a_full_table_has_the_mean_squares_of_two_way_analysis():
    """With five seeds and equal rows, the row's variance is MS_s k / M + (1 - 1 / M) MS_r; a pair's is 2 k MS_r."""
    means = shifted(6, 5, shared=0.02, own=0.1)
    between, residual = two_way(means)
    found = estimate(means, NONE[:6])
    factor = 1 + 5 / 64
    shared = between + (factor - 1) * max(between - 2 * residual, 0)
    assert found.pooled.value == pytest.approx(shared / 6 + residual * 5 / 6)
    assert found.pooled.noise == pytest.approx((shared / 6) ** 2 / 4 + (residual * 5 / 6) ** 2 / 20)
    assert found.residual.value == pytest.approx(2 * residual * (1 + 5 / 20**3))
    assert found.residual.noise == pytest.approx(found.residual.value**2 / 20)


def test_what_seeds_share_cancels_in_pairs_and_not_in_rows():
    """An effect of the seed on all rows alike leaves every pair's variance as it is, and raises every row's."""
    means = shifted(6, 3)
    moved = means + 10 * np.array([0.0, 1.0, 5.0])
    before, after = estimate(means, NONE[:6]), estimate(moved, NONE[:6])
    assert after.residual.value == pytest.approx(before.residual.value)
    assert after.of(0).value > 20 * before.of(0).value


def test_a_shared_effect_has_the_degrees_of_freedom_of_the_seeds():
    """If only seeds differ, the estimate has S - 1 degrees of freedom, however many rows show it; if only runs differ,
    it has nearly all M (S - 1)."""
    seeds = np.tile(np.random.default_rng(0).normal(size=4), (18, 1)) + np.arange(18)[:, None]
    only = estimate(seeds, NONE[:18]).pooled
    assert only.value**2 / only.noise == pytest.approx(3)
    df = []
    for i in range(50):
        own = estimate(shifted(18, 4, rng=i), NONE[:18]).pooled
        df.append(own.value**2 / own.noise)
    assert np.median(df) > 45


def test_without_shared_effects_the_pool_is_unbiased_within_its_guard():
    """Over 400 tables with six seeds the mean variance of a row is the true one, but for its guard and outliers."""
    found = np.mean([estimate(shifted(5, 6, rng=i), NONE[:5]).pooled.value for i in range(400)])
    assert 0.94 <= found <= 1.08


def test_rows_need_not_share_every_seed():
    """A table with holes has the residual of the least-squares fit of rows plus seeds; a row with one run joins in."""
    means = shifted(4, 5)
    means[0, 3:] = means[1, 0] = np.nan
    means[3, 1:] = np.nan
    row, seed = np.nonzero(~np.isnan(means[:3]))
    design = np.hstack([np.eye(3)[row], np.eye(5)[seed]])
    left = means[row, seed] - design @ np.linalg.pinv(design) @ means[row, seed]
    df = len(row) - np.linalg.matrix_rank(design)
    found = estimate(means, NONE[:4])
    assert found.residual.value == pytest.approx(2 * left @ left / df * (1 + 5 / df**3))
    assert found.of(3) == found.pooled


def test_seeds_that_no_two_rows_share_leave_nothing_to_tell_apart():
    """Rows with seeds of their own say how much runs differ, not how much of it is shared: a pair has both parts."""
    means = np.full((2, 4), np.nan)
    means[0, :2], means[1, 2:] = [0, 1], [5, 7]
    found = estimate(means, NONE[:2])
    assert found.residual is None
    assert found.of(0, 1).value == pytest.approx(2 * found.of(0).value)


@pytest.mark.parametrize("rows", [1, 4])
def test_one_seed_says_nothing(rows):
    """Rows with one run each have no spread, and nothing trained has none either."""
    assert estimate(shifted(rows, 1), NONE[:rows]) is None
    assert estimate(shifted(3, 3), NONE[:3]).of() is None


def test_an_unstable_row_is_named_and_leaves_the_pool():
    """A row whose runs differ thirty times more than the others' is flagged, keeps its own spread, and takes nothing
    from the others: their variance is the one without it."""
    means = shifted(6, 4, own=0.1)
    means[2] *= 30
    found, without = estimate(means, NONE[:6]), estimate(np.delete(means, 2, 0), NONE[:5])
    assert found.unstable == [2]
    assert found.pooled == without.pooled
    assert found.of(2).value > 0.9 * means[2].var(ddof=1)
    assert found.of(0, 1) == without.of(0, 1)


def test_equal_rows_are_rarely_called_unstable():
    """Of 400 tables of rows with equal spreads, at most 5 % flag one (6 % with the simulation's error)."""
    for seeds in (2, 3):
        flagged = [bool(estimate(shifted(6, seeds, rng=i), NONE[:6]).unstable) for i in range(400)]
        assert np.mean(flagged) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_rows_that_never_differ_have_no_spread():
    """Runs that are all equal have variance zero, and nothing is divided by it."""
    found = estimate(np.ones((3, 4)) * np.arange(3)[:, None], NONE[:3])
    assert [found.pooled.value, found.residual.value] == pytest.approx([0, 0], abs=1e-12)
    assert not found.unstable


def test_a_row_on_few_prompts_takes_the_spread_of_the_others():
    """A row with less than half of the prompts, whose runs seem to differ widely, changes nothing for the others."""
    means = shifted(5, 3, own=0.1)
    means[4] *= 10
    found = estimate(means, NONE[:5], np.array([60, 60, 60, 60, 3]))
    assert found == estimate(means[:4], NONE[:4], np.full(4, 60))
    assert found.of(4) == found.pooled

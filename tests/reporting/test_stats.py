"""Claims about means, intervals and corrections; simulations have seeds of their own and fixed tolerances."""

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binomtest, t, trim_mean

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.run_spread import RunVariance

TASKS = np.repeat(np.arange(6), [4, 10, 7, 5, 12, 6])


def crossed(rng, prompts, seeds, sd, runs=1, images=1):
    """(runs, P, I, S) normal scores with variances of prompt, training seed and interaction; the true mean is zero."""
    prompt = rng.normal(size=(runs, prompts, 1, 1)) * sd[0]
    seed = rng.normal(size=(runs, 1, 1, seeds)) * sd[1]
    return prompt + seed + rng.normal(size=(runs, prompts, images, seeds)) * sd[2]


def coverage(sd, prompts=60, seeds=3, runs=500, strata=None):
    data = crossed(np.random.default_rng(0), prompts, seeds, sd, runs)
    found = [stats.mean_interval(values, strata, draws=1000) for values in data]
    return np.mean([each.lo <= 0 <= each.hi for each in found])


def test_where_nothing_varies_the_spread_is_unknown():
    """Equal scores everywhere have a mean and no interval: width zero claims too much. p is the sign test's."""
    found = stats.mean_interval(np.full((44, 4, 3), 0.3), TASKS)
    assert found.mean == pytest.approx(0.3)
    assert np.isnan([found.lo, found.hi]).all()
    assert found.p == 2.0**-43
    assert (found.se, found.prompts, found.seeds, found.dropped) == (0, 44, 3, 0)


def test_a_method_equals_itself_exactly():
    """The paired difference of a method with itself is exactly zero, without an interval."""
    values = np.random.default_rng(1).normal(size=(44, 4, 2))
    found = stats.paired_difference(values, values, TASKS)
    assert (found.mean, found.se) == (0, 0)
    assert np.isnan([found.lo, found.hi, found.p]).all()


def test_a_shift_that_hardly_varies_is_found_however_noisy_the_scores():
    """A difference that is almost the same in every image is certain."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(44, 4, 2))
    found = stats.paired_difference(values + 0.5 + 0.001 * rng.normal(size=values.shape), values)
    assert found[:3] == pytest.approx((0.5, 0.5, 0.5), abs=0.001)
    assert found.p < 1e-6


def test_by_task_is_the_mean_of_task_means():
    """With strata the mean is the unweighted mean of the task means, whatever the tasks' sizes."""
    values = np.random.default_rng(2).normal(size=(44, 4, 2)) + TASKS[:, None, None]
    by_task = np.mean([values[task == TASKS].mean() for task in range(6)])
    assert stats.mean_interval(values, TASKS).mean == pytest.approx(by_task)
    assert stats.mean_interval(values).mean == pytest.approx(values.mean())


def test_strata_take_the_differences_between_tasks_out():
    """Tasks that differ widely, with nothing else varying, leave no uncertainty: every resample keeps every task."""
    values = np.broadcast_to(TASKS[:, None, None], (44, 4, 2))
    assert stats.mean_interval(values, TASKS).se == 0
    assert stats.mean_interval(values).se > 0.1


def test_a_task_without_scores_is_not_averaged_away():
    """If one task has no valid score at all, the mean by task is nan rather than the mean of five."""
    values = np.ones((44, 4, 2))
    values[TASKS == 3] = np.nan
    found = stats.mean_interval(values, TASKS)
    assert np.isnan(found.mean)
    assert found.dropped == 5


@pytest.mark.parametrize(("seeds", "strata"), [(1, None), (1, TASKS), (2, TASKS), (5, None)])
def test_bootstrap_agrees_with_the_closed_form(seeds, strata):
    """The interval is t_df times the closed-form standard error wide, within 5 %; with one seed that is the clustered
    one, with several the unbiased two-level one, raised by at most the guard for few degrees of freedom."""
    values = crossed(np.random.default_rng(3), 44, seeds, (1, 0.5, 1), images=4)[0]
    found = stats.mean_interval(values, strata)
    assert found.hi - found.lo == pytest.approx(2 * t.ppf(0.975, found.df) * found.se, rel=0.05)
    raised = np.sqrt(1 + 5 / (seeds - 1) ** 3) if seeds > 1 else 1
    unbiased = stats.two_level_se(values, strata)
    assert unbiased - 1e-12 <= found.se <= raised * unbiased + 1e-12
    if seeds == 1:
        assert unbiased == stats.clustered_se(values, strata)


def test_clustered_error_is_that_of_the_prompt_means():
    """On balanced data the clustered error is sd(prompt means) / sqrt(P); taking images as independent gives less."""
    values = crossed(np.random.default_rng(4), 200, 1, (1, 0, 1), images=4)[0]
    means = values.mean((1, 2))
    assert stats.clustered_se(values) == pytest.approx(means.std(ddof=1) / np.sqrt(200))
    assert stats.clustered_se(values) > 1.5 * values.std() / np.sqrt(values.size)


def test_two_level_variance_is_unbiased():
    """Over 2,000 simulated studies the mean squared two-level error is the true variance of the mean within 5 %."""
    sd, prompts, seeds = (1, 0.3, 1), 30, 4
    data = crossed(np.random.default_rng(5), prompts, seeds, sd, runs=2000)
    true = sd[0] ** 2 / prompts + sd[1] ** 2 / seeds + sd[2] ** 2 / prompts / seeds
    assert np.mean([stats.two_level_se(values) ** 2 for values in data]) == pytest.approx(true, rel=0.05)


def test_the_interval_covers():
    """In 92 to 98 % of 500 simulated studies with three seeds, the 95 % interval holds the true mean."""
    assert 0.92 <= coverage((1, 0.15, 1)) <= 0.98


def test_many_at_once_are_each_alone():
    """Arrays of different gaps and seeds, in one call, have the means and errors that each has in a call of its own.

    (Given the spread between training runs; by default that is pooled over the arrays.)
    """
    rng = np.random.default_rng(16)
    arrays = [crossed(rng, 44, seeds, (1, 0.5, 1), images=2)[0] for seeds in (3, 1, 3, 3)]
    arrays[2][5], arrays[3][:] = np.nan, np.nan
    together = stats.mean_intervals(arrays, TASKS, runs=[None] * 4)
    alone = [stats.mean_intervals([each], TASKS, runs=[None])[0] for each in arrays]
    assert np.array(together) == pytest.approx(np.array(alone), nan_ok=True)


def test_gaps_of_one_array_move_no_other():
    """All arrays share their resamples, whatever is missing in some: a complete one keeps its interval to the bit."""
    rng = np.random.default_rng(16)
    arrays = [crossed(rng, 44, 3, (1, 0.5, 1))[0] for _ in range(3)]
    before = stats.mean_intervals(arrays, TASKS, runs=[None] * 3)
    arrays[1][rng.random(arrays[1].shape) < 0.1] = np.nan
    after = stats.mean_intervals(arrays, TASKS, runs=[None] * 3)
    assert np.array(after)[[0, 2]] == pytest.approx(np.array(before)[[0, 2]], rel=1e-12)
    assert after[1].dropped > 5


@pytest.mark.parametrize("strata", [None, TASKS])
def test_gaps_leave_the_interval_of_what_remains(strata):
    """An array with gaps has the mean and standard error of the array without those prompts, and its limits but for
    other resamples."""
    values = crossed(np.random.default_rng(21), 44, 2, (1, 0.2, 1))[0]
    gaps = np.r_[3, 9, 17, 29, 43]
    left = np.delete(np.arange(44), gaps)
    whole = stats.mean_interval(values[left], None if strata is None else strata[left])
    values[gaps] = np.nan
    found = stats.mean_interval(values, strata)
    assert (found.mean, found.se, found.p) == pytest.approx((whole.mean, whole.se, whole.p))
    assert found[1:3] == pytest.approx(whole[1:3], abs=0.06 * (whole.hi - whole.lo))


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_spread_of_training_runs_counts_once_per_run(seeds):
    """Runs that differ with variance v add v / S to the squared error of a mean over S of them."""
    values = np.broadcast_to(np.random.default_rng(14).normal(size=(44, 2, 1)), (44, 2, seeds))
    alone, wide = (stats.mean_intervals([values], runs=[run])[0] for run in (None, RunVariance(0.5, 0.05)))
    assert wide.se**2 - alone.se**2 == pytest.approx(0.5 / seeds)


def test_a_fraction_stays_within_its_range():
    """Of 20 prompts that all succeed, the interval is Wilson's: [n / (n + t^2), 1]; it never leaves [0, 1]."""
    found = stats.mean_interval(np.ones((20, 4, 1)), fraction=True)
    assert (found.lo, found.hi) == pytest.approx((20 / (20 + t.ppf(0.975, 19) ** 2), 1))
    values = (np.random.default_rng(0).random((20, 1, 1)) < 0.9).astype(float)
    assert 0 < stats.mean_interval(values, fraction=True).lo < stats.mean_interval(values, fraction=True).hi <= 1


def test_a_fraction_at_its_end_has_an_interval_whatever_the_runs_of_others():
    """All ones: the interval ends at 1, and reaches lower the more the training runs of other rows differ."""
    ones = np.ones((20, 2, 3))
    limits = [
        stats.mean_intervals([ones], runs=[RunVariance(spread, spread**2 / 2)], fraction=True)[0][1:3]
        for spread in (0.0, 0.01, 0.1)
    ]
    assert [hi for _, hi in limits] == [1, 1, 1]
    assert 1 > limits[0][0] > limits[1][0] > limits[2][0] > 0


@pytest.mark.slow
def test_a_fraction_of_many_prompts_is_a_mean():
    """With 2,000 prompts, Wilson's interval and the bootstrap's are the same to a hundredth of their width."""
    values = (np.random.default_rng(0).random((2000, 2, 1)) < 0.6).astype(float)
    a, b = stats.mean_interval(values, fraction=True), stats.mean_interval(values)
    assert a[:3] == pytest.approx(b[:3], abs=0.03 * (b.hi - b.lo))


def test_a_fraction_of_a_few_prompts_has_no_interval():
    """Two prompts, or four, say too little about a fraction; five say something."""
    values = np.random.default_rng(0).integers(2, size=(5, 4, 2)).astype(float)
    for prompts in (1, 2, 4):
        assert np.isnan(stats.mean_interval(values[:prompts], fraction=True).lo)
    assert stats.mean_interval(values, fraction=True).lo < stats.mean_interval(values, fraction=True).hi


def test_pairing_is_sharper_than_not_pairing():
    """A gain hidden by the spread of prompts is found by pairing: its error is that of the differences."""
    rng = np.random.default_rng(7)
    base = rng.normal(size=(100, 1, 1)) * 5 + rng.normal(size=(100, 4, 1)) * 0.1
    better = base + 0.1 + rng.normal(size=(100, 4, 3)) * 0.1
    assert stats.paired_difference(better, base).lo > 0
    assert stats.mean_interval(better).se > 20 * stats.paired_difference(better, base).se


def test_an_untrained_method_meets_every_seed():
    """A baseline of one seed is paired with each seed of a method, as if it were repeated."""
    rng = np.random.default_rng(8)
    values, base = rng.normal(size=(44, 4, 3)), rng.normal(size=(44, 4, 1))
    assert stats.paired_difference(values, base) == stats.paired_difference(values, np.repeat(base, 3, axis=2))


def test_missing_scores_are_left_out_in_pairs():
    """A missing score removes its pair; a prompt without any score is dropped and counted; a seed without any score is
    dropped, and no prompt with it."""
    rng = np.random.default_rng(9)
    values, base = rng.normal(size=(44, 4, 3)), rng.normal(size=(44, 4, 1))
    base[0, 1] = np.nan  # one image
    values[1, :, 2] = np.nan  # one prompt under one seed
    values[:, :, 1] = np.nan  # one training run that failed
    found = stats.paired_difference(values, base)
    kept = np.r_[0, 2:44]
    difference = (values - base)[np.ix_(kept, range(4), [0, 2])]
    assert found.mean == pytest.approx(np.nanmean(difference, axis=1).mean())
    assert (found.prompts, found.seeds, found.dropped) == (43, 2, 1)


def test_order_does_not_matter():
    """Permuting prompts (with their tasks), images and seeds changes neither mean nor error beyond resampling noise."""
    rng = np.random.default_rng(10)
    values = rng.normal(size=(44, 4, 3)) + TASKS[:, None, None]
    order = rng.permutation(44)
    moved = values[order][:, [2, 0, 3, 1]][:, :, [1, 2, 0]]
    a, b = stats.mean_interval(values, TASKS), stats.mean_interval(moved, TASKS[order])
    assert a.mean == pytest.approx(b.mean)
    assert stats.two_level_se(values, TASKS) == pytest.approx(stats.two_level_se(moved, TASKS[order]))
    assert (a.lo, a.hi) == pytest.approx((b.lo, b.hi), abs=0.05 * (a.hi - a.lo))


def test_one_prompt_and_no_prompt_have_no_interval():
    """One prompt has a mean and no spread; no prompt has neither; nothing is divided by zero."""
    one = stats.mean_interval(np.ones((1, 4, 2)))
    assert one.mean == 1
    assert np.isnan([one.lo, one.hi, one.se, one.p]).all()
    assert np.isnan(stats.mean_interval(np.full((3, 4, 2), np.nan)).mean)
    assert stats.mean_interval(np.empty((0, 0, 1))).prompts == 0


def test_a_curve_with_one_prompt_in_a_task_has_means_and_no_resamples():
    """One prompt in all, or in one of the tasks: the means are exact, every resample is nan."""
    values = np.random.default_rng(0).normal(size=(3, 4, 2, 2))
    for points, strata, wanted in (
        (values[:, :1], None, values[:, :1].mean((1, 2, 3))),
        (values, np.array(["a", "a", "a", "b"]), (values[:, :3].mean((1, 2, 3)) + values[:, 3].mean((1, 2))) / 2),
    ):
        means, draws = stats.curve_draws(points, strata, draws=7)
        assert means == pytest.approx(wanted)
        assert draws.shape == (7, 3)
        assert np.isnan(draws).all()


def test_holm_by_hand():
    """0.01, 0.04, 0.03, 0.005 of four: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1 raised to the 0.06 before it."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9, 0.7]) == pytest.approx([1, 1, 1])


def test_holm_ignores_what_was_not_tested():
    """nan stays nan and does not count as a comparison; nothing in, nothing out."""
    assert stats.holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert stats.holm([]).size == 0


def test_the_same_data_give_the_same_numbers():
    """The bootstrap's draws come from a fixed seed: two calls agree to the bit, another seed differs a little."""
    values = np.random.default_rng(11).normal(size=(44, 4, 3))
    stats._prompt_weights.cache_clear()
    first = stats.mean_interval(values)
    stats._prompt_weights.cache_clear()
    assert stats.mean_interval(values) == first
    assert stats.mean_interval(values, seed=1).lo != first.lo


# ------------------------------------------------------------------------------------ improvement, interquartile mean


@pytest.mark.slow
def test_the_probability_of_improvement_is_that_of_normal_data():
    """Paired differences N(d, s): the share of images that win tends to Phi(d / s), on each side of one half."""
    rng = np.random.default_rng(17)
    base = rng.normal(size=(20000, 1, 1)) * 10
    for shift in (-1.0, 0.0, 0.5):
        better = base + rng.normal(shift, 2, size=base.shape)
        found = stats.improvements([better], base)[0]
        assert found.mean == pytest.approx(ndtr(shift / 2), abs=0.01)
        assert found.lo < ndtr(shift / 2) < found.hi


def test_improvement_is_symmetric_and_ties_count_half():
    """P(X > Y) + P(Y > X) = 1; a method has probability one half against itself, without a spread."""
    rng = np.random.default_rng(18)
    a, b = np.round(rng.normal(size=(2, 44, 2, 3)))
    ahead, behind = stats.improvements([a], b, TASKS)[0], stats.improvements([b], a, TASKS)[0]
    assert ahead.mean + behind.mean == pytest.approx(1)
    assert (ahead.p, ahead.se) == pytest.approx((behind.p, behind.se))
    same = stats.improvements([a], a)[0]
    assert (same.mean, same.se) == (0.5, 0)
    assert np.isnan([same.lo, same.hi, same.p]).all()


@pytest.mark.parametrize("prompts", [1, 3, 20])
def test_winning_every_prompt_is_no_certainty(prompts):
    """P wins of P prompts: the interval is Clopper and Pearson's, and p is no less than a sign test's 2^(1 - P)."""
    found = stats.improvements([np.ones((prompts, 2, 1))], np.zeros((prompts, 2, 1)))[0]
    if prompts == 1:  # no spread is known of a single prompt
        assert np.isnan([found.lo, found.p]).all()
        return
    exact = binomtest(prompts, prompts).proportion_ci(method="exact")
    assert (found.mean, found.lo, found.hi) == pytest.approx((1, exact.low, exact.high))
    assert found.p == pytest.approx(2.0 ** (1 - prompts))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 12])
def test_the_interquartile_mean_cuts_a_quarter_from_either_end(n):
    """Weights sum to one and are symmetric; for n = 4 k it is the mean trimmed by k at either end; equal values weigh
    alike, and the result is continuous where two values pass each other."""
    values = np.random.default_rng(n).normal(size=n)
    weights = stats.interquartile_weights(values)
    assert weights.sum() == pytest.approx(1)
    assert stats.interquartile_weights(-values) == pytest.approx(weights)
    if n % 4 == 0:
        assert weights @ values == pytest.approx(trim_mean(values, 0.25))
    assert np.ptp(stats.interquartile_weights(np.ones(n))) == 0


@pytest.mark.parametrize("by_task", [(False,) * 5, (True,) * 5, (False, True, True, False, True)])
def test_the_parts_of_an_interquartile_mean_have_its_mean(by_task):
    """The mean of what prompts and seeds add is the interquartile mean of the measures' own means, by task or not; a
    prompt that one measure lacks is left out of all."""
    rng = np.random.default_rng(19)
    gains = [rng.normal(size=(44, 2, 3)) + 0.3 * i for i in range(5)]
    gains[2][7], gains[3][9, 0] = np.nan, np.nan
    strata = TASKS if any(by_task) else None
    kept = np.delete(np.arange(44), 7)
    means = [stats.mean_interval(gain[kept], TASKS[kept] if each else None).mean for gain, each in zip(gains, by_task)]
    found = stats.mean_interval(stats.interquartile_mean(gains, by_task, strata), strata)
    assert found.mean == pytest.approx(stats.interquartile_weights(means) @ means)
    assert (found.prompts, found.seeds, found.dropped) == (43, 3, 1)

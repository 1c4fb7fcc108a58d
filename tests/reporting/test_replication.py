"""Claims about how far another study of the same prompts may lie from ours."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtrit

from alignbench.reporting.analysis.replication import Study

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"
TASKS = np.repeat(np.arange(3), [2, 8, 10])


def half(values, trained=True, strata=None, label="a", **theirs):
    rows = values if isinstance(values, dict) else {"a": values}
    return Study(rows, list(rows) if trained else [], strata).chance(label, **theirs).half_width()


def t(df):
    return stdtrit(df, 0.975)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(("strata", "sizes"), [(None, [20]), (TASKS, [2, 8, 10])])
def test_untrained_rows_differ_by_image_noise_alone(strata, sizes):
    """For one set of weights the variance is 2 s^2 / (P I), by task the mean over tasks of such; how much prompts
    differ does not matter."""
    values = normal(20, 4, 1)
    ends = np.cumsum([0, *sizes])
    within = [values[a:b].var(axis=1, ddof=1).mean() / (b - a) for a, b in itertools.pairwise(ends)]
    parts = 2 * np.array(within) / 4 / len(sizes) ** 2
    df = parts.sum() ** 2 / (parts**2 / (3 * np.array(sizes))).sum()
    assert half(values, False, strata) == pytest.approx(t(df) * np.sqrt(parts.sum()))
    assert half(values + 100 * normal(20, 1, 1, seed=1), False, strata) == pytest.approx(half(values, False, strata))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_without_image_noise_it_is_the_prediction_interval_of_a_training_run(seeds):
    """If images of a prompt are alike, the half width is t(S - 1) sd sqrt(1 + 1 / S), where sd is that of the run
    means: what a run does to single prompts stays in, since the other study has the same prompts."""
    runs = normal(20, 1, seeds) + 0.3 * normal(seeds, seed=1)
    expected = t(seeds - 1) * runs.mean((0, 1)).std(ddof=1) * np.sqrt(1 + 1 / seeds)
    assert half(np.repeat(runs, 4, axis=1)) == pytest.approx(expected)


def test_noise_that_training_runs_share_is_not_averaged_out():
    """All runs start from the same noise: if that is all that images depend on, three runs know as much as one."""
    once = normal(20, 4, 1)
    assert half(np.repeat(once, 3, axis=2)) == pytest.approx(half(once, trained=False))


def test_noise_that_runs_do_not_share_is_in_the_spread_of_their_means():
    """If it is all that varies, the spread of three run means is noise E = s^2 / (P I) with 2 degrees of freedom. The
    larger of spread and noise counts, on average (1 + 1 / e) E, and nearly nothing is left beside it."""
    parts = [Study({"a": normal(20, 4, 3, seed=i)}, ["a"]).chance("a").parts for i in range(600)]
    runs, images, _ = np.mean([[part.variance for part in each] for each in parts], axis=0)
    assert runs == pytest.approx((1 + 1 / 3) * (1 + np.exp(-1)) / 80, rel=0.1)
    assert images < 0.15 * runs


def test_their_images_and_their_error_count():
    """Twice as many images there halve the noise on their side; a printed standard error replaces our estimate of
    their side if it is larger, and changes nothing if it is not."""
    values = normal(20, 4, 1)
    ours = half(values, False) ** 2 / 2
    assert half(values, False, images=8) ** 2 == pytest.approx(1.5 * ours)
    assert half(values, False, se=10.0) == pytest.approx(1.96 * 10, rel=1e-3)
    assert half(values, False, se=1e-6) == half(values, False)


def test_one_training_run_says_nothing_about_others():
    """A trained row has no half width if no row has two runs; with such a row, one run has the pooled spread."""
    values = np.repeat(normal(20, 1, 2), 4, axis=1)
    alone = values[:, :, :1].repeat(2, axis=2)
    alone[:, :, 1] = np.nan
    assert math.isnan(half(alone))
    pair = half({"a": alone, "b": values})
    assert pair == pytest.approx(t(1) * values.mean((0, 1)).std(ddof=1) * np.sqrt(2))


def test_the_spread_of_training_runs_is_pooled():
    """Of five rows, those with effects of their own add their degrees of freedom, those that share all effects have
    the runs' own; a row whose runs differ ten times more than those of the others is judged by itself."""

    def width(effects):
        rows = {str(k): np.broadcast_to(np.array(run, float), (20, 4, 3)) for k, run in enumerate(effects)}
        return half(rows, label="0")

    own = [(-1, 0, 1), (0, 1, -1), (1, -1, 0), (-1, 1, 0), (0, -1, 1)]
    assert width([(-1, 0, 1)] * 5) == pytest.approx(t(2) * np.sqrt(4 / 3))
    assert width(own) < 0.7 * t(2) * np.sqrt(4 / 3)
    assert width([(-10, 0, 10), *own[1:]]) == pytest.approx(10 * t(2) * np.sqrt(4 / 3))


def test_one_image_per_prompt_gives_an_upper_bound():
    """With one image, noise and prompts cannot be told apart: the half width is that of prompts drawn again, marked as
    a bound; with one prompt there is none."""
    values = normal(20, 1, 1)
    chance = Study({"a": values}, []).chance("a")
    assert chance.bound
    assert chance.half_width() == pytest.approx(t(19) * values.std(ddof=1) * np.sqrt(2 / 20))
    assert math.isnan(half(values[:1], False))


def test_perfect_scores_are_not_certain():
    """If 320 images are all right, three wrong ones elsewhere are chance and four are not; a constant that is not a
    share has no known spread."""
    assert 3 < 320 * half(np.ones((80, 4, 1)), False) < 4
    assert math.isnan(half(np.full((80, 4, 1), 0.5), False))


def test_a_prompt_that_lost_images_takes_the_noise_of_the_others():
    """A prompt with one valid image does not show its noise, so the others' average stands for it."""
    values = normal(20, 4, 1)
    part = values.copy()
    part[0, 1:] = np.nan
    assert half(part, False) == pytest.approx(half(values[1:], False) * np.sqrt(19 / 20))


# ------------------------------------------------------------------------------------------------------- simulations


def studies(count, prompts, seeds, rows, run, shared, noise, bias=0.0, seed=0, binary=False, wild=1.0):
    """Return the share of ``count`` studies whose first row is called different from one other training run.

    ``run``: SD of a training run's effects on all prompts, and on single ones; ``shared``: share of the former that all
    rows have in common; ``noise``: SD of an image's noise, three quarters of whose variance comes from its start.
    ``wild``: factor of ``run`` in the first row.
    """
    rng = np.random.default_rng(seed)
    differ = 0
    for _ in range(count):
        prompt = rng.normal(size=(prompts, 1, 1)) + (1.5 if binary else 0)
        start = rng.normal(size=(prompts, 4, 1)) * noise * np.sqrt(0.75)
        common = rng.normal(size=seeds) * run * np.sqrt(shared)
        values = {}
        for k in range(rows):
            own = common + rng.normal(size=seeds) * run * np.sqrt(1 - shared)
            own = own + rng.normal(size=(prompts, 1, seeds)) * run
            values[str(k)] = (
                prompt + own * (wild if k == 0 else 1.0) + start + rng.normal(size=(prompts, 4, seeds)) * noise / 2
            )
        theirs = prompt[:, :, 0] + bias + (rng.normal() + rng.normal(size=(prompts, 1))) * run * wild
        theirs = theirs + rng.normal(size=(prompts, 4)) * noise
        if binary:
            values, theirs = {k: (scores > 0) * 1.0 for k, scores in values.items()}, theirs > 0
        width = half(values, run > 0, label="0")
        differ += abs(values["0"].mean() - theirs.mean()) > width
    return differ / count


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("run", "shared"), [(0.15, 0.0), (0.15, 0.7), (0.03, 0.5)])
def test_true_agreements_of_trained_rows_rarely_differ(seeds, rows, run, shared):
    """At most 6 % of true agreements with another lab's single training run are called "differs", whether training
    runs or images vary more, and whether or not rows share the effects of a seed; docs/statistics.md has the rates."""
    rate = studies(1000, 70, seeds, rows, run, shared, 0.7)
    assert rate <= 0.06
    cells = [rows, run, f"{100 * shared:.0f} %", *[r"\S+ %"] * (2, 3, 5).index(seeds), f"{100 * rate:.1f} %"]
    assert re.search(r"\| " + r" \| ".join(map(str, cells)) + r" \|", PAGE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [20, 70, 400])
def test_true_agreements_of_untrained_rows_rarely_differ(prompts):
    """At most 6 % of true agreements on the same weights are called "differs", and no fewer than 4 %."""
    assert 0.04 <= studies(2000, prompts, 1, 1, 0.0, 0.0, 0.7) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "seeds", "run"), [(2, 1, 0.0), (20, 1, 0.0), (80, 1, 0.0), (80, 2, 0.2), (80, 3, 0.2)]
)
def test_true_agreements_of_shares_rarely_differ(prompts, seeds, run):
    """The same for scores of 0 and 1, most of which are 1."""
    assert studies(1000, prompts, seeds, 6, run, 0.0, 0.7, binary=True) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_true_agreements_of_a_row_with_unstable_training_differ_in_a_tenth(seeds):
    """If the runs of one row of six differ four times as much as those of the others, at most 10 % of its true
    agreements are called "differs"; docs/statistics.md has the rates."""
    rate = studies(1000, 70, seeds, 6, 0.15, 0.3, 0.7, wild=4.0)
    assert rate <= 0.1
    assert f"{100 * rate:.1f} % with {seeds} seeds" in PAGE.read_text()


@pytest.mark.slow
def test_a_small_bias_of_an_untrained_row_is_found():
    """A tenth of the prompts' SD is found in 95 % of cases and more, with 400 prompts and 4 images whose SD is 0.7 of
    that. (Were prompts drawn again, the half width would be 0.104 of their SD: 44 %.)"""
    found = studies(1000, 400, 1, 1, 0.0, 0.0, 0.7, bias=0.1)
    assert found >= 0.95
    assert f"is found in {100 * found:.1f} % of cases" in PAGE.read_text()

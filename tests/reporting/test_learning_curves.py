"""Claims about learning curves: frames, equal costs, targets, profiles, and where reward and quality diverge."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from support import fake_learning_curves as made_up
from support.report_tables import with_runs

from alignbench.config import UserError
from alignbench.reporting import curves_section, report
from alignbench.reporting.analysis import learning_curves, published, stats
from alignbench.reporting.analysis.comparison import Measure, analyse
from alignbench.reporting.analysis.learning_curves import LearningCurve
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.text.table import Table
from alignbench.store import files
from alignbench.store.manifest import ManifestMilestone

END = made_up.UPDATES[-1]
LABELS = ("Base", "ReFL", "LeapAlign", "DanceGRPO")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(results, analysis, courses) of four methods, three seeds, five milestones."""
    results = made_up.made(tmp_path_factory.mktemp("whole"), prompts=24, labels=LABELS)
    analysis = analyse(results.manifest, results.scores)
    return results, analysis, learning_curves.learning_curves(results, analysis)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The same without milestones, one seed."""
    results = made_up.made(tmp_path_factory.mktemp("bare"), seeds=(0,), prompts=12, milestones=False, labels=LABELS)
    return results, analyse(results.manifest, results.scores)


def named(analysis, name):
    return next(measure for measure in analysis.measures if measure.name == name)


def toy(values, costs=None, role="held-out", **more):
    """A course of one measure: ``values`` (K, P, I, S); costs 0, 1, 2, ... unless given (K, S)."""
    values = np.asarray(values, float)
    seeds = values.shape[-1]
    costs = (
        np.repeat(np.arange(len(values), dtype=float)[:, None], seeds, 1) if costs is None else np.asarray(costs, float)
    )
    measure = Measure("e", "m", role=role, **more)
    tags = np.full(values.shape[1], "")
    return LearningCurve(
        "x",
        list(range(seeds)),
        costs.mean(1),
        dict.fromkeys(learning_curves.AXES, costs),
        {measure: values},
        {measure: tags},
    ), measure


# -- frames ------------------------------------------------------------------------------------------------------------


def test_every_update_of_every_run_has_its_costs(whole):
    """Updates count from one; NFE is the sum of both kinds; GPU-seconds are seconds times processes."""
    results, _, _ = whole
    frame = learning_curves.training(results)
    assert len(frame) == 3 * 3 * END
    mine = frame[(frame["label"] == "LeapAlign") & (frame["seed"] == 1)]
    assert mine["update"].tolist() == list(range(1, END + 1))
    assert (mine["nfe"] == mine["images"] * 25).all()
    assert (mine["gpu_seconds"] == 2 * mine["seconds"]).all()
    assert {"reward_mean", "drift", "nfe_forward", "nfe_grad"} <= set(frame)


def test_milestones_end_and_base_are_in_one_frame(whole):
    """Every run has its five milestones and its end, the base row is update 0, and no image is there twice."""
    results, _, _ = whole
    frame = learning_curves.milestones(results)
    assert sorted(frame.loc[frame["label"] == "Base", "update"].unique()) == [0]
    assert sorted(frame.loc[frame["label"] == "ReFL", "update"].unique()) == list(made_up.UPDATES)
    assert not frame.duplicated(["run", "update", "metric", "prompt_id", "index"]).any()
    end = frame[frame["update"] == END].drop(columns="update").reset_index(drop=True)
    given = results.scores[results.scores["seed"] >= 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(end, given[end.columns].astype(learning_curves.TEXTS))


@pytest.mark.slow
def test_a_milestone_at_the_very_end_is_the_end(whole, tmp_path):
    """It is counted once, with all its prompts."""
    results, _, _ = whole

    def with_end(run):
        return [*run.milestones, ManifestMilestone(END, run.images, run.scores)] if run.milestones else []

    manifest = with_runs(results.manifest, lambda run: {"milestones": with_end(run)})
    again = Results(results.store, manifest)
    pd.testing.assert_frame_equal(learning_curves.milestones(again), learning_curves.milestones(results))


# -- courses -----------------------------------------------------------------------------------------------------------


def test_a_course_ends_where_the_report_does(whole):
    """Its last paired change against base is the report's own, up to rounding, for every method and measure."""
    _, analysis, found = whole
    for measure in analysis.measures:
        moved = learning_curves.changes(found, measure)
        for course in found:
            assert moved[course.label][-1] == pytest.approx(analysis.changes[measure][course.label].estimate, rel=1e-9)


@pytest.mark.slow
def test_fewer_prompts_at_milestones_are_the_prompts_of_the_whole_course(whole, tmp_path):
    """Base and end are then those of these prompts alone: a course never compares different prompts."""
    results, analysis, found = whole
    shutil.copytree(results.store, tmp_path / "store")
    for run in results.manifest.runs:
        for score in (score for part in run.milestones for score in part.scores):
            path = tmp_path / "store" / score.file
            frame = pd.read_parquet(path)
            files.write_frame(path, frame[frame["prompt_id"] < "p0010"])
    again = learning_curves.learning_curves(Results(tmp_path / "store", results.manifest), analysis)
    for course, full in zip(again, found, strict=True):
        for measure in course.values:
            np.testing.assert_array_equal(course.values[measure], full.values[measure][:, :10])


def test_the_variance_of_a_curves_point_is_that_of_a_mean(whole):
    """curve_draws at every point: the mean of mean_interval exactly, and the unbiased two-level standard error to the
    draws' precision."""
    _, _, found = whole
    for course in found[:2]:
        for measure, values in course.values.items():
            mean, draws = stats.curve_draws(values, course.strata(measure))
            for k, each in enumerate(values):
                estimate = stats.mean_interval(each, course.strata(measure))
                assert mean[k] == pytest.approx(estimate.mean, rel=1e-12)
                two_level = stats.two_level_se(each, course.strata(measure))
                assert draws[:, k].std() == pytest.approx(two_level, rel=0.06)


def test_resampled_curves_are_paired(whole):
    """A curve plus a constant has the same resamples plus that constant: differences along it have no spread."""
    _, _, found = whole
    values = next(iter(found[0].values.values()))[0]
    mean, draws = stats.curve_draws(np.stack([values, values + 3.0]))
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 3.0, atol=1e-12)
    assert mean[1] - mean[0] == pytest.approx(3)


# -- equal cost --------------------------------------------------------------------------------------------------------


def test_between_steps_a_score_is_linear_and_beyond_the_last_unknown():
    """At the steps' own costs it is their score; half-way the mean of both; beyond: nan. Each seed its own."""
    values = np.random.default_rng(0).normal(size=(3, 4, 2, 2))
    course, measure = toy(values, [[0, 0], [10, 20], [30, 40]])
    np.testing.assert_array_equal(learning_curves.at(course, measure, "nfe", 10)[..., 0], values[1, ..., 0])
    np.testing.assert_allclose(learning_curves.at(course, measure, "nfe", 10)[..., 1], values[:2, ..., 1].mean(0))
    np.testing.assert_array_equal(learning_curves.at(course, measure, "nfe", 30)[..., 0], values[2, ..., 0])
    assert np.isnan(learning_curves.at(course, measure, "nfe", 30.1)[..., 0]).all()
    assert np.isfinite(learning_curves.at(course, measure, "nfe", 30.1)[..., 1]).all()
    assert learning_curves.common([course], "nfe") == 30


def test_equal_updates_are_the_end_and_equal_nfe_is_not(whole):
    """All methods ended at the same update, so there the scores are the final ones; at equal NFE only ReFL's are."""
    _, analysis, found = whole
    measure = named(analysis, "pickscore")
    same = learning_curves.equal_cost(found, measure, "update")
    assert {label: each.mean for label, each in same.items()} == {
        label: each.mean for label, each in analysis.means[measure].items() if label != "Base"
    }
    nfe = learning_curves.equal_cost(found, measure, "nfe")
    geneval = named(analysis, "geneval")  # a fraction, whose limits are Wilson's there as here
    for label, each in learning_curves.equal_cost(found, geneval, "update").items():
        assert each[:3] == pytest.approx(analysis.means[geneval][label][:3], rel=1e-9)
    assert learning_curves.common(found, "nfe") == 13 * 16 * END
    assert nfe["ReFL"].mean == same["ReFL"].mean
    assert nfe["LeapAlign"].mean < same["LeapAlign"].mean


@pytest.mark.parametrize(("level", "cost"), [(-1, 0), (0, 0), (1, 5), (2, 10), (2.5, 15), (3, 20), (3.1, np.inf)])
def test_the_first_crossing_of_a_broken_line(level, cost):
    """0, 2, 3 at costs 0, 10, 20: the closed form; above all of it: never."""
    assert learning_curves.crossing(np.array([[0.0, 2, 3]]), np.array([0.0, 10, 20]), level)[0] == cost


def test_a_curve_that_falls_again_has_still_reached_it():
    """The first crossing counts, whatever comes after; a curve that is not known crosses nothing known."""
    lines = np.array([[0.0, 2, 0], [0, 0, 2], [0, np.nan, 2]])
    found = learning_curves.crossing(lines, np.array([0.0, 1, 2]), 1.0)
    assert found[:2].tolist() == [0.5, 1.5]
    assert np.isnan(found[2])


def test_time_to_target(whole):
    """The method with the best gain reaches half of it half-way here; its interval holds that; the weakest: inf."""
    _, analysis, found = whole
    measure = named(analysis, "pickscore")
    gain = learning_curves.target(found, measure)
    by_label = {course.label: course for course in found}
    assert gain == by_label["LeapAlign"].gains(measure)[0][-1] / 2
    reached = learning_curves.time_to(by_label["LeapAlign"], measure, "update", gain)
    assert reached.lo <= reached.cost <= reached.hi
    assert reached.lo < END / 2 < reached.hi
    assert learning_curves.time_to(by_label["LeapAlign"], measure, "nfe", gain).cost == pytest.approx(
        reached.cost * 16 * 25
    )
    assert np.isinf(learning_curves.time_to(by_label["DanceGRPO"], measure, "update", gain).cost)
    assert learning_curves.target(found, named(analysis, "diversity")) is None


def test_a_lower_score_that_is_better_is_a_gain():
    """The sign follows the measure: a falling score that should fall reaches its target."""
    course, measure = toy(np.array([3.0, 2, 1])[:, None, None, None] + np.zeros((3, 4, 1, 1)), higher_is_better=False)
    assert learning_curves.target([course], measure) == 1
    assert learning_curves.time_to(course, measure, "nfe", 1.0).cost == 1


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_a_performance_profile_counts_runs():
    """The share of runs above tau, from a plain count; it never rises; bands hold it; one seed has none."""
    rng = np.random.default_rng(0)
    scores, taus = [rng.normal(size=5), rng.normal(size=3) + 1], np.linspace(-2, 3, 21)
    share, lo, hi = learning_curves.profile(scores, taus)
    flat = np.concatenate(scores)
    assert share.tolist() == [(flat > tau).mean() for tau in taus]
    assert (np.diff(share) <= 0).all()
    assert ((lo <= share) & (share <= hi)).all()
    assert np.isnan(learning_curves.profile([np.array([0.5])], taus)[1]).all()


def test_normalised_scores_have_base_at_zero_and_the_best_mean_at_one(whole):
    """Scores are normalised by measure, without the training reward and measures on which no method gains."""
    _, analysis, _ = whole
    found = learning_curves.normalised(analysis)
    assert [measure.name for measure in found] == ["pickscore", "geneval"]
    for measure, scores in found.items():
        means = {label: each.mean() for label, each in scores.items()}
        assert max(means.values()) == pytest.approx(1)
        for label, each in means.items():
            best = max(analysis.changes[measure][other].estimate.mean for other in scores)
            assert each == pytest.approx(analysis.changes[measure][label].estimate.mean / best)


# -- where reward and quality diverge ----------------------------------------------------------------------------------


def test_reward_hacking_is_found_at_its_step(whole):
    """ReFL's other scores fall from half-way on while its reward rises: diverging soon after; LeapAlign's never do."""
    _, analysis, found = whole
    by_label = learning_curves.divergences(found)
    pickscore = named(analysis, "pickscore")
    hacked, fair = by_label["ReFL"][pickscore], by_label["LeapAlign"][pickscore]
    assert hacked.update in (40, 50, 60)
    assert hacked.lo <= hacked.update <= hacked.hi
    assert hacked.share > 0.9
    assert fair.update is None
    assert fair.share < 0.1
    assert np.isinf(fair.hi)


def test_no_rise_of_the_reward_no_divergence():
    """A score that falls while the reward falls too is no hacking; a flat score is none either."""
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(4, 30, 2, 3))
    down, up = -np.arange(4.0)[:, None, None, None] + noise, np.arange(4.0)[:, None, None, None] + noise
    for reward, score, update in ((down, down, None), (up, 0 * up + noise, None), (up, down, 1.0)):
        course, measure = toy(score)
        trained, other = toy(reward, role="train")
        course = course._replace(
            values={other: trained.values[other]} | course.values, tags={other: course.tags[measure]} | course.tags
        )
        assert learning_curves.divergences([course])["x"][measure].update == update


def test_noise_rarely_diverges():
    """Reward up, another score that never moves: at most one in ten made-up methods is called diverging."""
    called = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        reward = np.arange(5.0)[:, None, None, None] + 0.1 * rng.normal(size=(5, 40, 2, 3))
        course, measure = toy(rng.normal(size=(5, 40, 2, 3)))
        _, trained = toy(reward, role="train")
        course = course._replace(
            values={trained: reward} | course.values, tags={trained: course.tags[measure]} | course.tags
        )
        called += learning_curves.divergences([course])["x"][measure].update is not None
    assert called <= 6


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_tells_the_course_after_the_hacking_section(whole, tmp_path):
    """All parts are there, in their place, twice alike."""
    results, _, _ = whole
    text, again = (report.build(results, tmp_path / name)[0].read_text() for name in ("a", "b"))
    assert text == again
    heads = [line for line in text.splitlines() if line.startswith("##")]
    start = heads.index("## Over the course of training")
    assert heads[start - 1] == "## Training reward, and reward hacking"
    assert [head.removeprefix("### ") for head in heads[start + 1 : start + 7]] == [
        "Training reward against cost",
        "Scores at equal cost",
        "Cost of half the best gain",
        "Milestone by milestone",
        "Where reward and quality diverge",
        "Performance profile",
    ]
    assert "not reached" in text
    assert "**At 12,480 NFE, the most that every method reached:**" in text


def test_without_milestones_one_line_says_so(bare):
    """The training reward against cost is still shown."""
    text = report.markdown(curves_section.sections(*bare))
    assert "Without `training.milestones`, scores are known at the end of training only." in text
    assert "### Training reward against cost" in text
    assert "### Milestone by milestone" not in text


def test_nothing_trained_says_nothing(tmp_path, bare):
    """No record, no section."""
    results, analysis = bare
    assert curves_section.sections(Results(tmp_path, results.manifest), analysis) == []


@pytest.mark.slow
def test_an_unreached_milestone_is_named(whole, tmp_path):
    """With its run, and where the training ended before it."""
    results, analysis, _ = whole
    beyond = ManifestMilestone(90, "none", [])
    chosen = results.manifest.runs[1]
    manifest = with_runs(results.manifest, lambda run: {"milestones": [*run.milestones, *[beyond] * (run is chosen)]})
    text = report.markdown(curves_section.sections(Results(results.store, manifest), analysis))
    assert "- ReFL, seed 0: training ended before update 90" in text


@pytest.mark.slow
def test_half_a_store_makes_sections(whole, tmp_path):
    """Runs without records, milestones without scores, a seed that is missing: what is there is told."""
    results, _, _ = whole
    shutil.copytree(results.store, tmp_path / "store")
    runs = results.manifest.by_seed
    shutil.rmtree(tmp_path / "store" / "runs" / runs["ReFL", 0].id)
    for part in runs["LeapAlign", 1].milestones[:2]:
        for score in part.scores:
            (tmp_path / "store" / score.file).unlink()
    for run in results.manifest.rows["DanceGRPO"]:
        shutil.rmtree(tmp_path / "store" / "runs" / run.id)
    half = Results(tmp_path / "store", results.manifest)
    text = report.markdown(curves_section.sections(half, analyse(half.manifest, half.scores)))
    assert "### Where reward and quality diverge" in text
    assert "nan" not in text


@pytest.mark.slow
def test_a_task_with_one_prompt_leaves_intervals_unknown(tmp_path):
    """The means over tasks still cross the target; no interval, share or "never" is claimed for them."""
    results = made_up.made(tmp_path, prompts=4, seeds=(0, 1))  # two of three tasks have one prompt
    analysis = analyse(results.manifest, results.scores)
    found = learning_curves.learning_curves(results, analysis)
    said = report.markdown(curves_section.sections(results, analysis))
    geneval = next(measure for measure in analysis.measures if measure.name == "geneval")
    best = max(found, key=lambda curve: curve.gains(geneval)[0][-1])
    gain = learning_curves.target(found, geneval)
    assert gain == best.gains(geneval)[0][-1] / 2
    reached = learning_curves.time_to(best, geneval, "update", gain)
    assert np.isfinite(reached.cost)
    assert np.isnan([reached.lo, reached.hi]).all()
    assert all(np.isnan(each[geneval][1:]).all() for each in learning_curves.divergences(found).values())
    lines = [line for line in said.splitlines() if line.startswith("| GenEval, by task [check]")]
    assert len(lines) == len(found)
    assert all(line.count("[unknown]") == len(learning_curves.AXES) for line in lines)
    assert "nan" not in said
    assert report.build(results, tmp_path / "out", ["svg"])


@pytest.mark.slow
def test_curves_need_no_torch_and_no_matplotlib():
    """Importing them, and making a report, loads neither."""
    code = "import sys, alignbench.reporting.report; sys.exit(bool({'torch', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- published curves --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_published_curve_stands_beside_ours(whole):
    """At the very updates: a milestone's mean with its interval in the printed unit, the reward; else "not run"."""
    results, analysis, found = whole
    metrics = {"P": {"metric": "pickscore", "scale": 2.0}, "R": {"metric": "reward_mean"}}
    about = {"citation": "A", "url": "http://x", "place": "Figure 1", "protocol": {"training.batch": 3}}
    source = published.decode(published.Source, {**about, "metrics": metrics, "methods": {"Leap": "LeapAlign"}}, "s")
    step = made_up.UPDATES[1]
    points = [("Leap", step, "P", 7.0), ("Leap", step, "R", 1.0), ("Leap", 10**6, "P", 8.0), ("Other", step, "P", 9.0)]
    curve = published.Reference("c", source, points=[published.Point(*point) for point in points])
    said = curves_section.sections(results, analysis, [curve])
    heading = said.index("### A, Figure 1")
    table = next(part for part in said[heading:] if isinstance(part, Table))
    milestone, reward, beyond, other = table.rows
    course = next(each for each in found if each.label == "LeapAlign")
    measure = next(measure for measure in course.values if measure.name == "pickscore")
    mean = stats.mean_interval(course.values[measure][list(course.updates).index(step)], course.strata(measure))
    assert milestone[4][:3] == pytest.approx((2 * mean.mean, 2 * mean.lo, 2 * mean.hi))
    records = learning_curves.training(results)
    near = records[(records["label"] == "LeapAlign") & records["update"].between(0.95 * step, 1.05 * step)]
    assert reward[4].value == pytest.approx(near.groupby("seed")["reward_mean"].mean().mean())
    assert [row[4].value for row in (beyond, other)] == ["not run", "not run"]
    assert any("LeapAlign, protocol differs: training.batch: 3 there" in str(part) for part in said[heading:])


@pytest.mark.parametrize("name", ["leapalign-fig1a", "leapalign-fig5"])
def test_packaged_curves_can_be_read(name):
    """Every point has a number and a metric that its entry maps; a table is no curve."""
    curve = published.load_curve(name)
    assert {point.metric for point in curve.points} == curve.source.metrics.keys()
    with pytest.raises(UserError, match=r"expected the columns method,update"):
        published.load_curve("leapalign-table2")

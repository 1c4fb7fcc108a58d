"""Margins in a wrong unit are reported: before a model is loaded if the range of scores shows it, else from records."""

import pytest
import torch
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, sweep_file
from support.training_runs import LEAP, run, settings

from alignbench.analytic import Quadratic, QuadraticReward
from alignbench.config import UserError
from alignbench.evaluator import Reward, Term
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.evaluators.pickscore import PickScore
from alignbench.experiment.document import read
from alignbench.experiment.margins import hinge_warnings, never_closes, never_opens
from alignbench.experiment.plan import resolve, warnings_of
from alignbench.plugins import Registry
from alignbench.prompts import Prompt
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json
from alignbench.training.meter import Meter, Watch, metered_reward

PUBLISHED = {  # margin; mean and spread of the reward's scores on real images, roughly
    "hpsv2": (0.55, 0.30, 0.03),
    "hpsv3": (13.5, 10.0, 3.0),
    "pickscore": (0.4, 0.21, 0.015),
    "imagereward": (2.0, 0.5, 1.0),
}


def records(mean, std, closed=0.0, batches=10, name=""):
    key = f"_{name}" if name else ""
    record = {f"reward{key or '_mean'}": mean, f"reward_std{key}": std, f"hinge_closed{key}": closed}
    return [{"step": step, **record} for step in range(batches)]


def whole_run(batches, margin):
    """Return the warnings of a run of ``batches``."""
    warnings = []
    run(LEAP, settings(batches=batches), reward=QuadraticReward(margin=margin), warn=warnings.append)
    return warnings


# ---- from settings


@pytest.mark.parametrize(
    ("margin", "scores", "opens", "closes"),
    [(0.55, (-1, 1), True, True), (-1, (-1, 1), False, True), (26, (-1, 1), True, False), (13.5, None, True, True)],
)
def test_a_hinge_opens_above_the_least_score_and_closes_below_the_greatest(margin, scores, opens, closes):
    """At or below the minimum it never opens, above the maximum it never closes; an unknown range is accepted."""
    assert (never_opens(margin, scores) is None) == opens
    assert (never_closes(margin, scores) is None) == closes
    assert never_opens(None, scores) is never_closes(None, scores) is None


def test_a_cosine_is_within_one_and_a_logit_within_a_hundred():
    """Ranges follow the unit of the reward."""
    assert HPSv2().reward_range == PickScore(reward_unit="cosine").reward_range == (-1, 1)
    assert PickScore().reward_range == (-100, 100)


def reward_of(margin):
    return {"base": {"reward": {"evaluator": {"name": "hpsv2", "weights": "shapes"}, "margin": margin}}}


@pytest.mark.slow
def test_a_hinge_that_cannot_open_is_refused(tmp_path):
    """It is an error before any model is loaded; the published margin gives neither error nor warning."""
    with pytest.raises(
        UserError, match=r"reward.margin: hpsv2: scores lie in \[-1, 1\], so a hinge at -1 can never open"
    ):
        resolve(read(sweep_file(tmp_path, reward_of(-1.0))), Registry([PLUGIN]))
    plan = resolve(read(sweep_file(tmp_path, reward_of(0.55))), Registry([PLUGIN]))
    assert warnings_of(plan) == []


def test_a_hinge_that_cannot_close_is_reported_once(tmp_path, capsys):
    """`validate` succeeds, with one line for the whole sweep."""
    assert alignbench("validate", sweep_file(tmp_path, reward_of(26.0))) == 0
    said = capsys.readouterr().err
    assert "reward.margin: hpsv2: scores lie in [-1, 1], so a hinge at 26 never closes; is the unit right?" in said
    assert said.count("\n") == 1


# ---- from records


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_margins_give_no_warning(name):
    """LeapAlign's hinges never close, as in the paper."""
    margin, mean, std = PUBLISHED[name]
    assert hinge_warnings(records(mean, std), {name: margin}) == []


def test_a_hinge_that_was_always_closed():
    """A margin for cosines closes for every image if scores are logits; one open image in ten batches is accepted."""
    told = hinge_warnings(records(21.3, 1.0, closed=1.0), {"pickscore": 0.4})
    assert told == [
        "the hinge of pickscore was closed for every image of the first 10 batches: "
        "margin 0.4 is below all scores (mean 21.3); is the unit right?"
    ]
    assert hinge_warnings([*records(21.3, 1.0, closed=1.0)[:9], *records(21.3, 1.0, closed=0.9)[9:]], {"p": 0.4}) == []


def test_a_margin_far_above_all_scores():
    """A margin for logits is far above cosines; without any spread, nothing is far."""
    (told,) = hinge_warnings(records(0.21, 0.015), {"pickscore": 26.0})
    assert "margin 26 is 1719 standard deviations above the scores (mean 0.21)" in told
    assert hinge_warnings(records(0.21, 0.0), {"pickscore": 26.0}) == []


def test_each_of_several_hinges_is_judged_by_its_own_scores():
    """The wrong hinge is named, the other is not."""
    both = [a | b for a, b in zip(records(0.3, 0.03, name="hpsv2"), records(21.0, 1.0, 1.0, name="pickscore"))]
    (told,) = hinge_warnings(both, {"hpsv2": 0.55, "pickscore": 0.4})
    assert told.startswith("the hinge of pickscore was closed")


def test_training_warns_once():
    """The warning comes after ten batches, or at the end of a shorter run, with the text made from the records."""
    (told,) = whole_run(12, margin=-1e6)
    assert "was closed for every image of the first 10 batches: margin -1e+06 is below all scores" in told
    (told,) = whole_run(2, margin=-1e6)
    assert "the first 2 batches" in told
    assert whole_run(12, margin=None) == []
    assert whole_run(12, margin=1.0) == []


def test_a_method_that_uses_no_hinge_is_not_warned_of_it():
    """Policy gradients see only scores: their records have no closed hinges, with or without a margin."""
    watch = Watch()
    reward = metered_reward(Reward(Term(Quadratic(), -1e6)), Meter(), watch)
    scores = reward(torch.zeros(3, 2, dtype=torch.float64), [Prompt("p", "p")] * 3)
    assert "hinge_closed" not in watch.reward_means(reward)
    reward.loss(scores)
    assert watch.reward_means(reward)["hinge_closed"] == 1


@pytest.mark.slow
def test_log_terminal_and_report_show_the_warning(tmp_path, capsys):
    """A real run with a margin below every score gives one line in each, with the run's name."""
    changes = {"base": {"reward": {"margin": -0.5}}, "cases": [{"label": "Last", "method": {"name": "last"}}]}
    path = sweep_file(tmp_path, changes | {"grid": {"training.seed": [0]}})
    assert debug_sweep(path, tmp_path / "store") == 0
    line = "the hinge of bright was closed for every image of the first 4 batches: margin -0.5 is below all scores"
    assert capsys.readouterr().err.count(f"alignbench: Last, seed 0: {line}") == 1
    (run_,) = read_json(Store(tmp_path / "store").manifests()[0])["runs"]
    assert (tmp_path / "store" / "runs" / run_["id"] / "log.txt").read_text().count(f"warning: {line}") == 1
    assert alignbench("report", path, "--out", str(tmp_path), store=tmp_path / "store", plugin=False) == 0
    assert f"- **Last, seed 0**: {line}" in capsys.readouterr().out

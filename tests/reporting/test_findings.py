"""Claims about what a report concludes: of these weights or of methods, of losses and hacking, of held-out gains."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs
from support.report_tables import LABELS, manifest, page, results, row_of, scores, section, stored, with_runs

from alignbench.reporting import disclosures, findings, improvement_section, report, tables
from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import analyse
from alignbench.store.manifest import UNTRAINED

ONE_SEED = "**One training seed: every interval and verdict speaks of the weights that were scored, not of the methods;"


def analysed(given):
    return analyse(given.manifest, given.scores)


def named(analysis, name):
    return next(measure for measure in analysis.measures if measure.name == name)


def shifted(given, label, **by_metric):
    """Add to the row's scores of each metric, given as ``hpsv2_1`` for ``hpsv2.1``."""
    for metric, shift in by_metric.items():
        mine = (given.scores["label"] == label) & (given.scores["metric"] == metric.replace("_1", ".1"))
        given.scores.loc[mine, "score"] += shift
    return given


# ------------------------------------------------------------------------------------------ these weights, or methods


def test_one_seed_is_said_before_the_first_number():
    """With one training seed the first sentence says that everything speaks of the weights, before any answer or
    table; with two it is nowhere."""
    text = page(results(seeds=(0,), name="quickstart"))
    assert text.index(ONE_SEED) < text.index("All methods start") < text.index("\n## ")
    assert "these weights" not in page(results()).lower()
    assert "One training" not in page(results())


def test_one_seed_answers_no_question_about_methods():
    """The heading asks nothing of the method, the answer is worded for the weights, and no Yes, Partly or No."""
    text = page(results(seeds=(0,), name="quickstart"))
    assert "## LeapAlign against ReFL, DRaFT-LV and DRTune: the weights that were scored" in text
    assert "[check]: **These weights**: better than ReFL, DRaFT-LV and DRTune." in text
    for word in ("Does LeapAlign", "**Yes**", "**Partly**", "**No**", "**Not shown**"):
        assert word not in text
    assert "[check]: **Yes**" in page(results(name="quickstart"))


def test_one_seed_has_no_bold_cell():
    """Neither means, nor probabilities of improvement, nor the verdict of a gain are bold."""
    text = page(results(seeds=(0,)))
    tables_of = [section(text, heading) for heading in ("Results", "Probability of improvement", "Gain over all")]
    rows = [row for part in tables_of for row in part.splitlines() if row.startswith("| ")]
    assert rows
    assert not [row for row in rows if "**" in row.replace("**(reward hacking, these weights)**", "")]
    assert "up (these weights)" in section(text, "Gain over all")


def test_hacking_of_one_seed_is_of_these_weights():
    """The line and the mark in the table say of what they speak."""
    text = page(results(seeds=(0,)))
    assert "- **REWARD HACKING, ReFL (these weights): the training reward rose while PickScore" in text
    assert "**(reward hacking, these weights)**" in row_of(section(text, "Results"), "ReFL")


def test_a_single_run_among_several_is_named():
    """Published weights beside rows with two seeds: the warning names them alone, and only verdicts on them are on
    weights."""
    plan = with_runs(manifest(), lambda run: {"published": run.label == "ReFL"})
    runs = [structs.replace(run, seed=UNTRAINED) if run.label == "ReFL" else run for run in plan.runs]
    plan = plan.only([run for run in runs if run.id != "ReFL-1"])
    given = stored(None, plan, scores(plan), results().costs)
    analysis = analysed(given)
    assert findings.single_runs(analysis) == ["ReFL"]
    assert page(given).count("**ReFL: one training run. What this report says of them speaks of the weights") == 1
    assert "**One training" not in page(given)
    [(heading, lines, _)] = [findings.answers([("LeapAlign", ("ReFL", "DRTune"))], analysis)]
    assert heading == "## LeapAlign against ReFL and DRTune: the weights that were scored"
    assert "**Yes**" not in lines
    assert findings.answers([("LeapAlign", ("DRTune",))], analysis)[0] == "## Does LeapAlign beat DRTune?"


def test_seeds_that_are_only_planned_show_nothing():
    """Of two planned seeds one has scores so far: how much runs differ is as unknown as if one were planned."""
    given = results()
    given.scores = given.scores[given.scores["seed"] < 1]
    assert ONE_SEED in page(given)
    assert analysed(given).bold(named(analysed(given), "pickscore")) is None


def test_a_measure_scored_for_one_seed_speaks_of_weights():
    """Of two seeds all scores are there, but PickScore's for one: its verdicts alone are on weights."""
    given = results()
    given.scores = given.scores[(given.scores["metric"] != "pickscore") | (given.scores["seed"] < 1)]
    analysis = analysed(given)
    weights = {m.name: change["LeapAlign"].weights for m, change in analysis.changes.items()}
    assert weights == {"hpsv2.1": False, "pickscore": True, "geneval": False, "geneval_strict": False}
    assert analysis.bold(named(analysis, "pickscore")) is None
    assert "[held-out]: **These weights**" in page(stored(None, manifest(name="quickstart"), given.scores, given.costs))


def test_what_rests_on_such_a_measure_is_on_weights_too():
    """Its probabilities of improvement and the gain that counts it are not bold, the summary's file says that the
    spread is unknown, and the page warns before its first number; of the other measures nothing changes."""
    given = results()
    whole = analysed(given).improved
    given.scores = given.scores[(given.scores["metric"] != "pickscore") | (given.scores["seed"] < 1)]
    analysis = analysed(given)
    for measure, shares in analysis.improved.items():
        assert {share.weights for share in shares.values()} == {measure.name == "pickscore"}
        same = {label: share.estimate for label, share in whole[measure].items()}
        assert measure.name == "pickscore" or {label: share.estimate for label, share in shares.items()} == same
    assert all(gain.weights for gain in analysis.gains.values())
    text = page(given)
    assert "**" not in row_of(section(text, "Gain over all held-out"), "LeapAlign")
    assert text.index("**PickScore: scored for one training run of each row.") < text.index("| LeapAlign")
    tidy = tables.tidy(analysis, given.costs)
    place = [column.title for column in tidy.columns].index("between_trainings")
    known = {(row[1].value, row[place].value) for row in tidy.rows if row[0].value == "ReFL" and row[2].value != "cost"}
    assert {metric for metric, between in known if between == "unknown"} == {"pickscore", improvement_section.IQM}
    assert "scored for one training run" not in page(results())


def test_a_score_of_which_lower_is_better_gets_worse():
    """It did not fall: its verdict is up, and the words beside it do not say the contrary."""
    plan = manifest(labels=("base", "ReFL", "DRaFT-LV", "DRTune"))
    lower = [[structs.replace(metric, higher_is_better=False) for metric in s.metrics] for s in plan.runs[0].scores]
    scored = [
        structs.replace(score, metrics=metrics if score.evaluator == "pickscore" else score.metrics)
        for score, metrics in zip(plan.runs[0].scores, lower)
    ]
    given = stored(None, with_runs(plan, lambda run: {"scores": scored}), scores(plan), results().costs)
    text = page(given)
    assert "- **REWARD HACKING, DRTune: the training reward rose while PickScore got worse.** (HPSv2.1" in text
    assert "PickScore [held-out] up" in text
    assert "PickScore fell" not in text


def test_a_row_trained_once_is_never_bold():
    """Beside rows with two runs its gain is judged by their spread, but bold is for methods that were trained twice."""
    plan = manifest(labels=("base", "ReFL", "DRaFT-LV", "LeapAlign"))
    frame = scores(plan)
    once = plan.only([run for run in plan.runs if run.id != "LeapAlign-1"])
    for made, bold in ((plan, "LeapAlign"), (once, None)):
        analysis = analyse(made, frame[frame["run"].isin([run.id for run in made.runs])])
        measure = named(analysis, "geneval")
        assert analysis.rankings[measure].leader == "LeapAlign"
        assert analysis.changes[measure]["LeapAlign"].said == "up"
        assert analysis.bold(measure) == bold


def test_an_untrained_row_is_no_training_run():
    """A second row of the base model, under another protocol, has no other training run that could reverse it."""
    plan = manifest(labels=("base", "ReFL", "DRTune"))
    guided = [structs.replace(run, seed=UNTRAINED) for run in plan.runs if run.id == "ReFL-0"]
    plan = plan.only([run for run in plan.runs if run.label != "ReFL"] + guided)
    analysis = analyse(plan, scores(plan))
    assert "ReFL" in analysis.compared
    assert findings.single_runs(analysis) == []


def test_not_separable_is_the_word():
    """A rival that cannot be told apart is not separable, and the note says that this does not mean equal."""
    text = page(results(name="quickstart"))
    given = results(name="quickstart")
    given.scores["label"] = given.scores["label"].replace({"DRTune": "LeapAlign", "LeapAlign": "DRTune"})
    assert "not separable from DRaFT-LV" in page(given)
    assert "does not mean equal" in text
    assert "distinguishable" not in text


def test_figures_of_few_seeds_follow_the_counts():
    """The note has the figures of the largest simulated number of seeds that is not larger, and names unstable rows."""
    assert f"in\n{findings.FEW_SEEDS[2].covered} %" in " ".join(findings.few_seeds(2, 6))
    assert f"in\n{findings.FEW_SEEDS[3].covered} %" in " ".join(findings.few_seeds(4, 6))
    assert findings.ONE_DEGREE in findings.few_seeds(2, 2)
    assert findings.ONE_DEGREE not in findings.few_seeds(2, 3) + findings.few_seeds(3, 2)
    analysis = analysed(results())
    analysis.unstable[analysis.measures[0]] = ["DRTune"]
    assert "Here the training runs of DRTune differ more" in findings.few_seeds_note(analysis)
    assert findings.few_seeds_note(analysed(results(seeds=(0,)))) == ""


def test_a_row_with_one_seed_among_rows_with_two_borrows_their_spread():
    """It is said by name."""
    plan = manifest()
    plan = plan.only([run for run in plan.runs if run.id != "DRTune-1"])
    analysis = analyse(plan, scores(plan))
    assert "DRTune has a single training seed: the spread of its runs is taken" in findings.few_seeds_note(analysis)
    assert "ReFL has a single" not in findings.few_seeds_note(analysis)


# --------------------------------------------------------------------------------------------------- losses and hacking


def test_a_collapse_is_a_loss_whatever_the_reward_did():
    """Three cases in one line each: the reward rose and others fell; others fell and it did not rise; nothing fell."""
    given = shifted(results(), "DanceGRPO", geneval_strict=-0.5, hpsv2_1=-0.1)
    text = page(given)
    hacking = section(text, "Training reward")
    assert "- **REWARD HACKING, ReFL: the training reward rose while" in hacking
    fell = "HPSv2.1 and GenEval strict, by task"
    assert f"- **DanceGRPO: worse than base on {fell}, whatever the reward did.** (HPSv2.1" in hacking
    assert "- LeapAlign: no reward hacking shown, and no score shown to fall" in hacking
    assert "DanceGRPO: no reward hacking" not in text
    assert "**(worse than base)**" in row_of(section(text, "Results"), "DanceGRPO")
    analysis = analysed(given)
    assert [tables.flag(analysis, k) for k in LABELS] == ["", "reward hacking", "", "", "", "worse than base"]


def test_the_loss_of_weights_from_elsewhere_is_said():
    """Their training reward is unknown, so it cannot be called hacking; that scores fell is said all the same."""
    plan = with_runs(manifest(), lambda run: {"published": run.label == "ReFL"})
    runs = [structs.replace(run, seed=UNTRAINED) if run.label == "ReFL" else run for run in plan.runs]
    plan = plan.only([run for run in runs if run.id != "ReFL-1"])
    text = page(stored(None, plan, scores(plan), results().costs))
    assert "- **ReFL (these weights): worse than base on PickScore, GenEval, by task and" in text
    assert "its reward is unknown.**" in text


def test_hacking_is_judged_by_the_rows_own_reward():
    """ReFL was trained on PickScore, the others on HPSv2: PickScore's rise is ReFL's reward, HPSv2's fall its hacking;
    a rise of HPSv2 in ReFL and a fall of PickScore is none."""
    plan = manifest(labels=("base", "ReFL", "DRTune"))
    for run in plan.runs:
        reward = "pickscore" if run.label == "ReFL" else "hpsv2"
        run.settings["reward"] = {"evaluator": {"name": reward}, "margin": 1.0, "weight": 1.0}
        for score in run.scores:
            structs.force_setattr(score, "role", "check" if score.evaluator == "geneval" else "train")
    given = stored(None, plan, scores(plan), results(labels=("base", "ReFL", "DRTune")).costs)
    assert tables.hacked(analysed(given), "ReFL") == []
    given = shifted(given, "ReFL", pickscore=3, hpsv2_1=-0.2)
    assert tables.hacked(analysed(given), "ReFL")[0].name == "hpsv2.1"
    assert "trained on different rewards: ReFL PickScore; DRTune HPSv2.1" in page(given)
    assert [measure.name for measure in analysed(given).summed] == ["geneval", "geneval_strict"]


# -------------------------------------------------------------------------------------------- the gain over held-out


def gains(roles, by_metric, images=2, prompts=60):
    """Return the gain of a row whose every score is base's plus a constant, in base's SD over prompts: its closed form
    needs no draw."""
    plan = manifest(labels=("base", "ReFL"), seeds=(0, 1))
    plan = with_runs(
        plan,
        lambda run: {"scores": [structs.replace(s, role=roles.get(s.evaluator, s.role)) for s in run.scores]},
    )
    frame = scores(plan, prompts, images)
    for metric, constant in by_metric.items():
        base = frame[(frame["metric"] == metric) & (frame["label"] == "base")]
        sd = base.groupby("prompt_id")["score"].mean().std(ddof=1)
        mine = (frame["metric"] == metric) & (frame["label"] == "ReFL")
        key = base.set_index(["prompt_id", "index"])["score"]
        rows = list(zip(frame.loc[mine, "prompt_id"], frame.loc[mine, "index"]))
        frame.loc[mine, "score"] = key.loc[rows].to_numpy() + constant * sd
    return analyse(plan, frame)


CONSTANT = {"geneval": 0.25, "geneval_strict": 0.75, "pickscore": 1.5, "hpsv2.1": 9.0}


def test_each_evaluator_has_one_vote():
    """GenEval's two columns are averaged to 0.5 before they meet PickScore's 1.5: the gain is 1, which is not the
    interquartile mean of all three."""
    found = gains({}, CONSTANT).gains["ReFL"]
    assert found.estimate.mean == pytest.approx(1.0)
    alone = stats.interquartile_weights([0.25, 0.75, 1.5]) @ [0.25, 0.75, 1.5]
    assert alone != pytest.approx(1.0)


@pytest.mark.parametrize("role", ["unknown", "train"])
def test_only_what_is_known_to_be_held_out_counts(role):
    """Without PickScore, which may have been trained on, GenEval's vote alone is left; the note says what was not
    counted, and why."""
    analysis = gains({"pickscore": role}, CONSTANT)
    assert analysis.gains["ReFL"].estimate.mean == pytest.approx(0.5)
    note = improvement_section.sections(analysis)[-1]
    assert "the mean of GenEval and GenEval strict." in note
    assert f"PickScore ({improvement_section.LEFT_OUT[role]})" in note


def test_nothing_known_to_be_held_out_gives_no_gain():
    """The section says so in place of a number."""
    analysis = gains({"pickscore": "unknown", "geneval": "unknown"}, CONSTANT)
    assert analysis.gains == {}
    text = improvement_section.sections(analysis)[-1]
    assert text.startswith("No summary over held-out measures: none is known to be held out for every row.")


def test_a_score_is_held_out_only_if_it_is_for_every_row():
    """PickScore is marked held out in base's row and unknown in ReFL's: it is unknown, whichever comes first."""
    plan = manifest(labels=("base", "ReFL"))
    for label, other in (("base", "ReFL"), ("ReFL", "base")):
        mixed = with_runs(
            plan,
            lambda run, label=label: {
                "scores": [
                    structs.replace(s, role="unknown" if s.evaluator == "pickscore" and run.label == label else s.role)
                    for s in run.scores
                ]
            },
        )
        analysis = analyse(mixed, scores(plan))
        assert named(analysis, "pickscore").role == "unknown", other
        assert [measure.name for measure in analysis.held_out] == ["geneval", "geneval_strict"]


def test_votes_are_means_within_a_vote():
    """Of four evaluators, one with three columns, the gain is the mean of the two middle votes."""
    means = np.array([0.0, 3.0, 6.0, 1.0, 2.0, 50.0])  # the first three are one vote: 3
    values = [np.full((4, 1, 1), mean) for mean in means]
    parts = stats.interquartile_mean(values, [False] * 6, None, ["a", "a", "a", "b", "c", "d"])
    assert stats.mean_interval(parts).mean == pytest.approx((2 + 3) / 2)


# --------------------------------------------------------------------------------------------------------- disclosures


def test_seeds_that_differ_between_rows_are_listed():
    """Equal seeds are listed once; else each list with its rows."""
    assert "- training seeds: 0, 1\n" in page(results())
    plan = manifest(labels=("base", "ReFL", "DRTune"))
    plan = plan.only([run for run in plan.runs if run.id != "DRTune-1"])
    text = disclosures.protocol_section(plan, analyse(plan, scores(plan)), [])[1]
    assert "- training seeds: 0, 1 (ReFL); 0 (DRTune)\n" in text


@pytest.mark.slow
def test_the_warning_is_in_every_form_of_the_report(tmp_path):
    """Markdown, page and LaTeX say that one training seed speaks of its weights."""
    report.build(results(seeds=(0,)), tmp_path, ["md", "html", "tex"])
    for kind in ("md", "html", "tex"):
        text = " ".join((tmp_path / f"made_up.{kind}").read_text().split())
        assert "One training" in text, kind
        assert "weights" in text, kind

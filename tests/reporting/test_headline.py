"""Claims about the report's first screen: it answers, and where nothing can be said, it says that and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from msgspec import structs
from support import grid_tables, report_tables

from alignbench.reporting import headline, report
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.analysis.swept import all_on_lines, swept
from alignbench.reporting.plots.scores import draw_forest, draw_swept, draw_tradeoff
from alignbench.reporting.tables import hacked
from alignbench.reporting.text import names
from alignbench.reporting.text.table import listed


def first_screen(plan, scores, costs=None):
    """Return (sentence, headline table as rows of texts, text below it) as the report has them."""
    costs = report_tables.costs(plan) if costs is None else costs
    told, *rest = headline.sections(analyse(plan, scores), costs, plan)
    rows = [line.strip("| ").split("|") for line in rest[0].markdown().splitlines()[2:]] if rest else []
    return told, [[cell.strip() for cell in row] for row in rows], rest[1] if rest else ""


def dearer(costs, seconds):
    """Return the costs with these seconds, by label."""
    return costs.assign(seconds=[seconds.get(label, spent) for label, spent in zip(costs["label"], costs["seconds"])])


def test_the_sentence_is_made_of_the_papers_questions():
    """Who is best, by how much, over whom that is not shown, at what cost, with what harm, and what could be seen.

    Every number is one of the analysis.
    """
    plan = report_tables.manifest(seeds=(0, 1, 2), labels=("base", "ReFL", "DRaFT-LV", "DRTune"))
    scores, costs = report_tables.scores(plan), report_tables.costs(plan)
    analysis = analyse(plan, scores)
    told, *_ = first_screen(plan, scores, dearer(costs, {"DRaFT-LV": 82.0}))
    geneval = analysis.primary
    ranking = analysis.rankings[geneval]
    assert (geneval.name, ranking.leader, ranking.top[1:]) == ("geneval", "DRaFT-LV", ["DRTune"])
    change = analysis.changes[geneval]["DRaFT-LV"].estimate
    assert told.startswith(f"**DRaFT-LV has the best GenEval [check]: {change.mean:+.4f} [{change.lo:+.4f}, ")
    assert "against base, not separable from DRTune.**" in told
    assert "Training took 2.00 times as long as that of the cheapest, ReFL; no score is shown to be worse." in told
    assert f"With 3 training seeds and 60 prompts, a true change of {analysis.detectable(geneval):.2g} is" in told


def test_the_table_is_in_the_order_of_the_primary_measure():
    """Best first; each row with change, rank interval, multiple of the cheapest and flag; bold as in the results."""
    plan = report_tables.manifest(seeds=(0, 1, 2))
    scores = report_tables.scores(plan)
    costs = dearer(report_tables.costs(plan), {"LeapAlign": 61.5})
    analysis = analyse(plan, scores)
    _, rows, legend = first_screen(plan, scores, costs)
    assert [row[0] for row in rows] == analysis.rankings[analysis.primary].order
    assert [row[1].startswith("**") for row in rows] == [True, False, False, False, False]
    assert (rows[0][3:], rows[-1][3:5]) == (["1", "1.50×", "none"], ["5", "1.00×"])
    assert rows[-1][5] == "reward hacking: PickScore, GenEval and GenEval strict fell"
    assert "the first check, since the sweep names none" in legend


def test_the_sweep_decides_which_measure_is_primary():
    """Sentence and table speak of the named one; one that was not scored leaves nothing to conclude."""
    plan = structs.replace(report_tables.manifest(), primary="pickscore")
    scores = report_tables.scores(plan)
    told, rows, legend = first_screen(plan, scores)
    assert told.startswith("**LeapAlign has the best PickScore [held-out]: ")
    assert len(rows) == 5
    assert "as the sweep says" in legend
    told, rows, _ = first_screen(structs.replace(plan, primary="hpsv3"), scores)
    assert (told, rows) == (
        "**Nothing can be concluded: the primary measure of this sweep, hpsv3, is not among its scores.**",
        [],
    )


def test_one_training_run_speaks_of_these_weights():
    """Neither the sentence names the method as the better one, nor is any row bold."""
    plan = report_tables.manifest(seeds=(0,))
    told, rows, _ = first_screen(plan, report_tables.scores(plan))
    assert told.startswith("**These weights of LeapAlign have the best GenEval [check]: +")
    assert "a true change of these weights of 0.0" in told
    assert not any("**" in cell for row in rows for cell in row)


def test_what_a_reader_must_know_is_a_flag():
    """Fewer prompts, missing seeds, a fall without any gain of the reward, and a row of a single run among others."""
    plan = report_tables.manifest(seeds=(0, 1, 2))
    scores = report_tables.scores(plan)
    scores = scores[~((scores["label"] == "LeapAlign") & (scores["prompt_id"] < "p0012") & (scores["seed"] == 0))]
    scores = scores[~((scores["label"] == "DRTune") & (scores["seed"] == 2))]
    fallen = (scores["label"] == "DanceGRPO") & (scores["metric"] == "geneval_strict")
    scores.loc[fallen, "score"] -= 0.3
    flags = {row[0]: row[-1] for row in first_screen(plan, scores)[1]}
    assert flags["LeapAlign"] == "48 of 60 prompts"
    assert flags["DRTune"] == "2 of 3 seeds"
    assert flags["DanceGRPO"] == "worse than base on GenEval strict"
    analysis = analyse(plan, scores)
    vars(analysis)["unstable"] = {analysis.primary: ["DRaFT-LV"]}
    assert headline.flags(analysis, analysis.primary, "DRaFT-LV") == ["unstable between seeds on GenEval"]


def test_no_gain_is_said_as_such():
    """A best row that is not separable from base, or is worse than base, does not lead."""
    plan = report_tables.manifest(seeds=(0, 1, 2), labels=("base", "DanceGRPO"))
    told, *_ = first_screen(plan, report_tables.scores(plan))
    assert told.startswith("**DanceGRPO is not separable from base on GenEval [check]: ")
    plan = report_tables.manifest(seeds=(0, 1, 2), labels=("base", "ReFL"))
    told, *_ = first_screen(plan, report_tables.scores(plan))
    assert told.startswith("**No row improves GenEval [check]: ReFL is worse than base, -0.1")
    fell = [names.measure_name(measure) for measure in hacked(analyse(plan, report_tables.scores(plan)), "ReFL")]
    assert fell
    assert f"Reward hacking: its training reward rose while {listed(fell)} fell" in told


def unknown_roles(plan):
    return report_tables.with_runs(
        plan, lambda run: {"scores": [structs.replace(score, role="unknown") for score in run.scores]}
    )


def twice(plan):
    """Return the manifest with a second row of the same label."""
    return structs.replace(plan, runs=[*plan.runs, *plan.rows["ReFL"]])


BAD = {
    "one prompt": (lambda plan: plan, lambda scores: scores[scores["prompt_id"] == "p0000"], "1 prompt cannot show"),
    "all missing": (lambda plan: plan, lambda scores: scores.assign(ok=False), "no row other than base has a score"),
    "no scores": (lambda plan: plan, lambda scores: scores[:0], "no row other than base has a score"),
    "constant": (
        lambda plan: plan,
        lambda scores: scores.assign(score=1.0),
        "every score on GenEval [check] is",
    ),
    "unknown roles": (unknown_roles, lambda scores: scores, "Nothing can be concluded: every score is"),
    "one label twice": (twice, lambda scores: scores, "GenEval"),
    "no common prompt": (
        lambda plan: plan,
        lambda scores: scores[(scores["label"] != "ReFL") == (scores["prompt_id"] < "p0030")],
        "too few prompts have a score of every row",
    ),
    "other seeds": (
        lambda plan: plan,
        lambda scores: scores[(scores["label"] != "ReFL") | (scores["seed"] == 1)],
        "With 1 ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_words(case, seeds):
    """What cannot be concluded is said; no traceback, no nan, no interval of no width in the first screen or a plot."""
    change, scored, words = BAD[case]
    plan = change(report_tables.manifest(seeds=seeds))
    scores = scored(report_tables.scores(plan))
    analysis, costs = analyse(plan, scores), report_tables.costs(plan)
    parts = headline.sections(analysis, costs, plan)
    text = report.markdown(parts)
    assert words in text
    assert not re.search(r"\bnan\b|\binf\b", text)
    assert not re.search(r"\[([-+\d.]+), \1\]", text)
    rows = headline.rows_in_order(analysis, plan)
    for figure in (draw_forest(analysis, rows, ""), draw_tradeoff(analysis, dearer(costs, {"ReFL": 9.0}), "")):
        assert figure is None or not re.search(r"\bnan\b", figure.caption)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("base",), "Nothing can be concluded: there is no row to compare."),
        (("ReFL",), "Nothing can be compared: only ReFL has a score on GenEval [check]."),
        (("ReFL", "LeapAlign"), "LeapAlign has the best GenEval [check], 0.7"),
        (("base", "LeapAlign"), "LeapAlign improves GenEval [check]: +0.1"),
    ],
)
def test_too_few_rows_are_told_in_words(labels, words):
    """Only base, only one row, no base, one method: each has its sentence, and no column that compares nothing."""
    plan = report_tables.manifest(seeds=(0, 1, 2), labels=labels)
    told, rows, legend = first_screen(plan, report_tables.scores(plan))
    assert words in told
    assert ("Rank" in legend) == ("LeapAlign" in labels and "ReFL" in labels)
    assert all(len(row) > 1 for row in rows)


# -- hyperparameters --------------------------------------------------------------------------------------------------


def test_a_swept_number_is_found_in_the_settings():
    """Three values or more on a line, by value; of a grid over two numbers each has a line for every other value."""
    plan, _ = grid_tables.swept({"alpha": [1.0, 0.1, 0.3]})
    [axis] = swept(plan)
    assert (axis.path, axis.values) == ("method.alpha", [0.1, 0.3, 1.0])
    assert [(line.name, [value for value, _ in line.points]) for line in axis.lines] == [("LeapAlign", axis.values)]
    plan, _ = grid_tables.swept({"lam": [1.0, 2.0, 3.0], "tau": [0.1, 0.2, 0.4]})
    lines = {axis.name: [line.name for line in axis.lines] for axis in swept(plan)}
    assert lines["lam"] == ["LeapAlign, tau=0.1", "LeapAlign, tau=0.2", "LeapAlign, tau=0.4"]
    assert lines["tau"] == ["LeapAlign, lam=1.0", "LeapAlign, lam=2.0", "LeapAlign, lam=3.0"]
    assert swept(grid_tables.swept({"alpha": [0.1, 0.3]})[0]) == []
    assert swept(report_tables.manifest()) == []


def test_a_row_that_differs_in_another_setting_is_on_no_line():
    """An override for one value would make the line one of two settings."""
    plan, _ = grid_tables.swept({"alpha": [0.1, 0.3, 1.0, 3.0]})

    def other_rate(run):
        method = {**run.settings["method"], "steps": 9} if run.label.endswith("3.0") else run.settings["method"]
        return {"settings": {**run.settings, "method": method}}

    changed = report_tables.with_runs(plan, other_rate)
    assert [axis.values for axis in swept(changed)] == [[0.1, 0.3, 1.0]]
    assert (all_on_lines(plan), all_on_lines(changed)) == (True, False)


def test_rows_of_a_swept_hyperparameter_stay_in_the_grids_order():
    """In the headline table, too, where other sweeps have the best row first; the rank says which is best."""
    plan, scores = grid_tables.swept({"alpha": [0.1, 0.3, 1.0, 3.0]})
    _, rows, _ = first_screen(plan, scores)
    assert [row[0] for row in rows] == [f"LeapAlign, alpha={value}" for value in (0.1, 0.3, 1.0, 3.0)]
    assert rows[2][3].startswith("1")


@pytest.mark.slow
def test_the_plot_of_a_hyperparameter_has_every_measure():
    """A panel per measure on an axis spaced as the values are, and the number of the best mean in its caption."""
    plan, scores = grid_tables.swept({"alpha": [0.1, 1.0, 10.0]})
    analysis = analyse(plan, scores)
    [axis] = swept(plan)
    figure = draw_swept(axis, analysis, "")
    assert figure.name == "swept-method.alpha"
    assert "LeapAlign: 1." in figure.caption
    bare = draw_swept(axis, analyse(*without_base(plan, scores)), "")
    assert "Every score against method.alpha" in bare.caption
    empty = analyse(plan, scores.assign(score=np.nan))
    assert draw_swept(axis, empty, "") is None


def without_base(plan, scores):
    runs = [run for run in plan.runs if run.label != "base"]
    return structs.replace(plan, runs=runs, cases=plan.cases[1:]), scores[scores["label"] != "base"]


def lacking(scores, metric, label, lost):
    """Return the scores without the row's scores of this metric on the prompts of which ``lost`` holds."""
    return scores[~((scores["metric"] == metric) & (scores["label"] == label) & lost(scores))]


def test_a_row_without_a_mean_is_not_beaten():
    """A row that lacks a whole task is in no comparison: the leader is better than the rows with a score, and the row's
    flag says why it has no number."""
    plan = report_tables.manifest(labels=("base", "ReFL", "DRaFT-LV", "DRTune"))
    whole = report_tables.scores(plan)
    told, rows, _ = first_screen(plan, lacking(whole, "geneval", "DRTune", lambda f: f["tag"] == "counting"))
    assert "better than every other row with a score.**" in told
    assert {row[0]: row[-1] for row in rows}["DRTune"] == "some task has no score"
    told, rows, _ = first_screen(plan, lacking(whole, "geneval", "DRTune", lambda f: f["ok"]))
    assert "better than every other row with a score.**" in told
    assert {row[0]: row[-1] for row in rows}["DRTune"] == "0 of 2 seeds"


def test_fewer_prompts_are_flagged_where_rows_cannot_be_ranked():
    """Two rows that share no prompt give no order, but each still rests on half of the prompts."""
    plan = report_tables.manifest(labels=("base", "ReFL", "DRaFT-LV", "DRTune"))
    scores = lacking(report_tables.scores(plan), "geneval", "ReFL", lambda f: f["prompt_id"] < "p0030")
    told, rows, _ = first_screen(plan, lacking(scores, "geneval", "DRTune", lambda f: f["prompt_id"] >= "p0030"))
    assert told.startswith("**The rows cannot be ranked on GenEval")
    flags = {row[0]: row[-1] for row in rows}
    assert "30 of 60 prompts" in flags["ReFL"]
    assert "30 of 60 prompts" in flags["DRTune"]
    assert "prompts" not in flags["DRaFT-LV"]


def test_a_row_trained_once_among_others_is_flagged():
    """Its change leans on the other rows' runs, so the table says that it is one run."""
    plan = report_tables.manifest(labels=("base", "ReFL", "DRaFT-LV", "LeapAlign"))
    plan = plan.only([run for run in plan.runs if run.id != "LeapAlign-1"])
    told, rows, _ = first_screen(plan, report_tables.scores(plan))
    assert "LeapAlign has the best GenEval" in told
    assert {row[0]: "one training run" in row[-1] for row in rows} == {
        "LeapAlign": True,
        "DRaFT-LV": False,
        "ReFL": False,
    }

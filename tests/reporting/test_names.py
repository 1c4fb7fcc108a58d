"""Claims about how measures are printed: the papers' names, order and decimals, and no toy scorer under a real name."""

from pathlib import Path

import pytest
import yaml
from msgspec import structs
from support.report_tables import manifest, scores, with_runs

from alignbench.reporting.analysis.comparison import Measure, analyse
from alignbench.reporting.text import names

SOURCES = Path(__file__).parents[2] / "reports/published/sources.yaml"


def printed():
    """Return (column, metric, task or None, scale, decimals) of every column of LeapAlign's tables."""
    tables = yaml.safe_load(SOURCES.read_text())
    return [
        (column, about["metric"], about.get("task"), about["scale"], about["decimals"])
        for name, table in tables.items()
        if name.startswith("leapalign-table")
        for column, about in table["metrics"].items()
    ]


@pytest.mark.parametrize(("column", "metric", "task", "scale", "decimals"), printed())
def test_a_column_is_called_what_the_paper_calls_it(column, metric, task, scale, decimals):
    """Name and resolution are the paper's; two decimals in per cent are four of a fraction."""
    measure = Measure("e", metric)
    if metric == "geneval":
        expected = names.task_name(task) if task else names.OVERALL
        assert expected == column
    else:
        assert names.measure_name(measure) == column
    assert names.decimals(measure) == decimals + (2 if scale == 100 else 0)


def test_columns_stand_in_the_papers_order():
    """By role, then as in LeapAlign's table 2, then as the sweep has them; GenEval's tasks as in its table."""
    shuffled = ["own_b", "imagereward", "ur_iq_acs", "hpsv3", "own_a", "ur_align_acs", "pickscore", "hpsv2.1"]
    wanted = ["hpsv2.1", "hpsv3", "pickscore", "ur_align_acs", "ur_iq_acs", "imagereward", "own_b", "own_a"]
    assert sorted(shuffled, key=names.place) == wanted
    tasks = ["zoo", "color_attr", "colors", "position", "counting", "two_object", "single_object", "ants"]
    titles = [names.task_name(task) for task in names.in_order(tasks)]
    assert titles[:6] == ["Single Obj.", "Two Obj.", "Counting", "Colors", "Position", "Attr. Binding"]
    assert titles[6:] == ["ants", "zoo"]
    analysis = analyse(manifest(), scores(manifest()))
    assert [measure.name for measure in analysis.measures] == ["hpsv2.1", "pickscore", "geneval", "geneval_strict"]


def test_scorers_of_the_shapes_world_are_marked():
    """A measure that any row scores with the shapes world's scorer says so in its name; others do not."""
    toy = {"hpsv2": {"weights": "shapes"}, "geneval": {"detector": "shapes"}, "pickscore": {"weights": "yuvalkirstain"}}

    def scored(run):
        settings = toy if run.label == "LeapAlign" else {}
        return {"scores": [structs.replace(s, settings=settings.get(s.evaluator, {})) for s in run.scores]}

    plan = with_runs(manifest(), scored)
    shown = [names.measure_name(measure) for measure in analyse(plan, scores(plan)).measures]
    assert shown == ["HPSv2.1 (shapes)", "PickScore", "GenEval (shapes)", "GenEval strict (shapes)"]
    early = structs.replace(manifest(), world="shapes")  # its manifest did not record the scorers' settings
    assert all(measure.world == "shapes" for measure in analyse(early, scores(early)).measures)


def test_what_is_not_known_keeps_its_name():
    """A plug-in's metric prints its own name in the decimals of its unit, and an import keeps its source."""
    assert names.measure_name(Measure("mine", "my_metric")) == "my_metric"
    assert (names.decimals(Measure("mine", "my", "logit")), names.change_decimals(Measure("mine", "my", "logit"))) == (
        2,
        3,
    )
    assert names.measure_name(Measure("flowbp", "hpsv2.1 (flowbp)")) == "HPSv2.1 (flowbp)"

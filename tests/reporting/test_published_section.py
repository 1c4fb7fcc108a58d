"""Claims about published numbers beside ours."""

from io import StringIO
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from support.report_tables import costs, manifest, scores, stored

from alignbench.config import UserError
from alignbench.reporting import published_section, report
from alignbench.reporting.analysis import published
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.analysis.published import Printed, PublishedNumber, Reference, Row, Source
from alignbench.reporting.analysis.replication import Chance, Part, Study

HERE = {"backend.model": "shapes", "training.batch": 16, "evaluation.steps": 8, "evaluation.size": 32}


def source(**changes):
    about = {"citation": "A paper", "url": "https://example.org/a_b", "place": "Table 1", "protocol": HERE}
    metrics = {"PickScore x 10": Printed(metric="pickscore", scale=10, decimals=1)}
    metrics |= {"Counting": Printed(metric="geneval", task="counting", scale=100, decimals=2)}
    return Source(**{**about, "metrics": metrics, **changes})


def table(*figures, **changes):
    return Reference("paper-table1", source(**changes), [PublishedNumber(*figure) for figure in figures])


def given(**options):
    plan = manifest(**options)
    frame = scores(plan)
    return SimpleNamespace(manifest=plan, scores=frame, analysis=analyse(plan, frame))


def verdicts(reference, made):
    rows = published.compare(reference, made.manifest, made.analysis)
    return {(row.method, row.label, row.metric): row.verdict for row in rows}


# ------------------------------------------------------------------------------------------------------- the verdicts


@pytest.mark.parametrize("gap", [0.0, 1.04, -1.04, 1.06, -1.06])
def test_a_number_is_within_error_as_far_as_chance_and_rounding_reach(gap):
    """With a half width of 1 and one printed decimal, 1.04 is within the replication error and 1.06 differs. If 1 is
    only an upper bound, nothing is within error, and what is beyond differs all the same; if nothing is known, nothing
    is said."""
    chance = Chance((Part(1 / 1.96**2, np.inf),))
    error = published.replication_error(chance, PublishedNumber("m", "a", "2.0"))
    assert error == pytest.approx(1.05, abs=1e-4)
    assert published.judged(gap, error) == ("differs" if abs(gap) > 1.05 else "within replication error")
    assert published.judged(gap, error, bound=True) == ("differs" if abs(gap) > 1.05 else "spread unknown")
    assert (
        published.judged(gap, published.replication_error(Chance(), PublishedNumber("m", "a", "1"))) == "spread unknown"
    )


@pytest.mark.parametrize(
    ("value", "half"), [("0.3078", 5e-5), ("99.380", 5e-4), ("12", 0.5), ("1.2e-3", 5e-5), ("-4.0", 0.05)]
)
def test_rounding_is_half_a_unit_of_the_last_printed_digit(value, half):
    """Trailing zeros count: 99.380 was rounded to thousandths."""
    assert PublishedNumber("m", "a", value).rounding == pytest.approx(half)


def test_every_number_finds_its_partner_or_says_that_it_has_none():
    """A published row that is in the sweep, one that is not, a metric that was not measured, and rows of ours that the
    paper does not have: each has its own verdict, and nothing is filled in."""
    made = given()
    mean = next(found["ReFL"].mean for m, found in made.analysis.means.items() if m.name == "pickscore")
    figures = [("ReFL", "PickScore x 10", f"{10 * mean:.2f}"), ("DRTune", "PickScore x 10", "999.0")]
    figures += [("Other", "PickScore x 10", "1.0"), ("ReFL", "FID", "3.2"), ("Ours", "Counting", "0.00")]
    found = verdicts(table(*figures, methods={"Ours": ["LeapAlign", "DanceGRPO"]}), made)
    assert found["ReFL", "ReFL", "PickScore x 10"] == "within replication error"
    assert found["DRTune", "DRTune", "PickScore x 10"] == "differs"
    assert found["Other", "", "PickScore x 10"] == "not run"
    assert found["ReFL", "ReFL", "FID"] == "not run"
    assert found["Ours", "LeapAlign", "Counting"] == found["Ours", "DanceGRPO", "Counting"] == "differs"
    assert found["", "LeapAlign", "PickScore x 10"] == "no reference"
    assert found["", "base", "Counting"] == "no reference"
    assert len(found) == 6 + 4 + 4  # published numbers, one for two of our rows; ours without one


def test_ours_stand_in_the_published_unit():
    """Scale and task are applied to mean, interval and error: counting in percent is 100 times that task's."""
    made = given()
    row = next(r for r in published.compare(table(("ReFL", "Counting", "50.00")), made.manifest, made.analysis))
    measure = next(measure for measure in made.analysis.measures if measure.name == "geneval")
    expected = made.analysis.averages(measure, "counting")["ReFL"]
    assert row.ours[:4] == pytest.approx(tuple(100 * value for value in expected[:4]))
    assert row.difference == pytest.approx(row.ours.mean - 50)
    data = made.analysis.scores[measure]
    study = Study({k: scores[data.tags == "counting"] for k, scores in data.values.items()}, made.analysis.trained)
    assert row.error == pytest.approx(100 * study.chance("ReFL").half_width() + 0.005)


def test_trained_rows_need_a_second_training_run():
    """In a sweep of one seed no trained row has a verdict, however far off the printed number is; base has one."""
    made = given(seeds=(0,))
    figures = [(label, "PickScore x 10", "999.0") for label in ("base", "ReFL")]
    rows = published.compare(table(*figures), made.manifest, made.analysis)
    assert [row.verdict for row in rows[:2]] == ["differs", "one training run: no verdict"]
    assert np.isnan(rows[1].error)
    assert np.isfinite(rows[1].difference)


def test_one_image_per_prompt_leaves_near_numbers_undecided():
    """Base with one image of each prompt: a number near ours is undecided, a far one differs, and the page shows no
    interval that is only a bound, except where it is exceeded."""
    made = given()
    made.analysis = analyse(made.manifest, made.scores[made.scores["index"] == 0])
    mean = next(found["base"].mean for m, found in made.analysis.means.items() if m.name == "pickscore")
    for value, verdict, ends in ((10 * mean, "spread unknown", "[unknown]"), (999.0, "differs", "]")):
        reference = table(("base", "PickScore x 10", f"{value:.1f}"))
        rows = published.compare(reference, made.manifest, made.analysis)
        assert rows[0].verdict == verdict
        assert rows[0].bound
        assert published_section.shown(reference, rows).rows[0][5].value.endswith(ends)


def test_the_verdict_shows_the_replication_error():
    """On the page and in LaTeX its half width stands in brackets, with one more digit than was printed; in the CSV it
    has a column."""
    made = given()
    mean = next(found["ReFL"].mean for m, found in made.analysis.means.items() if m.name == "pickscore")
    reference = table(("ReFL", "PickScore x 10", f"{10 * mean:.1f}"))
    row = published.compare(reference, made.manifest, made.analysis)[0]
    words = f"within replication error ({row.error:.2f})"
    shown = published_section.beside(reference, made.manifest, made.analysis)
    assert f"**{words}**" in shown.markdown()
    assert words in shown.latex()
    tidy = pd.read_csv(StringIO(published_section.tidy([reference], made.manifest, made.analysis).csv()))
    assert tidy.loc[0, "replication_error"] == pytest.approx(row.error)
    assert tidy.loc[0, "error_is_bound"] == "no"


# ------------------------------------------------------------------------------------------------------- the protocol


def test_any_stated_setting_that_differs_takes_the_verdict():
    """However well numbers agree: a row made in another way is "protocol differs", with path and both values; what a
    paper does not state, and the numbers 8 and 8.0, differ in nothing."""
    made = given()
    figure = ("ReFL", "PickScore x 10", "210.0")
    same = table(figure, protocol={**HERE, "evaluation.steps": 8.0, "training.optimizer.clip": "not stated"})
    assert "protocol differs" not in verdicts(same, made).values()
    other = published.compare(table(figure, protocol={**HERE, "evaluation.steps": 50}), made.manifest, made.analysis)[0]
    assert (other.verdict, other.reasons) == ("protocol differs", ("evaluation.steps: 50 there, 8 here",))
    assert np.isfinite([other.difference, other.error]).all()  # it is shown, and nothing is concluded from it


def test_a_row_of_its_own_protocol_overrides_the_tables():
    """A published method may have been made otherwise than the rest of its table."""
    made = given()
    wrong = {**HERE, "training.batch": 64}
    figures = [("ReFL", "PickScore x 10", "210.0"), ("DRTune", "PickScore x 10", "210.0")]
    rows = published.compare(
        table(*figures, protocol=wrong, methods={"DRTune": Row(protocol={"training.batch": 16})}),
        made.manifest,
        made.analysis,
    )
    assert [bool(row.reasons) for row in rows[:2]] == [True, False]


def test_an_untrained_row_has_no_training_to_differ_in():
    """Base is compared although the sweep's training is not the paper's; its images have to be made alike."""
    made = given()
    figure = ("base", "PickScore x 10", "210.0")
    assert (
        "protocol differs"
        not in verdicts(table(figure, protocol={**HERE, "training.batch": 1, "reward": "x"}), made).values()
    )
    assert "protocol differs" in verdicts(table(figure, protocol={**HERE, "evaluation.size": 512}), made).values()


@pytest.mark.slow
def test_rehearsals_subsets_and_missing_prompts_are_never_compared():
    """A rehearsal, a subset of prompts, and a mean over fewer prompts than it should have are other protocols."""
    figure = ("ReFL", "PickScore x 10", "210.0")
    for mark in ({"rehearsal": True}, {"subset": 60}):
        made = given()
        made.manifest = structs.replace(made.manifest, **mark)
        assert verdicts(table(figure), made)["ReFL", "ReFL", "PickScore x 10"] == "protocol differs"
    made = given()
    frame = made.scores
    gone = (frame["label"] == "ReFL") & (frame["prompt_id"] == "p0003")
    made.analysis = analyse(made.manifest, frame[~gone])
    row = published.compare(table(figure), made.manifest, made.analysis)[0]
    assert (row.verdict, row.reasons) == ("protocol differs", ("prompts left out here: 1",))


# ----------------------------------------------------------------------------------------------- the page and the files


def test_leapaligns_table_is_as_printed():
    """Trailing zeros are kept, the GenEval means are those of the six tasks to the last digit, and no row has an
    error."""
    general, tasks = published.load("leapalign-table2"), published.load("leapalign-table2-geneval")
    printed = {figure[:2]: figure.value for figure in [*general.numbers, *tasks.numbers]}
    assert printed["LeapAlign", "HPSv2.1"] == "0.4092"
    assert printed["Flux", "HPSv3"] == "13.5020"
    assert len(printed) == 7 * 13
    assert {figure.se for figure in general.numbers} == {""}
    for method in dict.fromkeys(figure.method for figure in tasks.numbers):
        overall, *six = [float(figure.value) for figure in tasks.numbers if figure.method == method]
        assert overall == pytest.approx(np.mean(six) / 100, abs=1e-4)


@pytest.mark.slow
def test_the_page_has_the_published_numbers(tmp_path, monkeypatch):
    """A sweep whose module names a table has it on its page, in its LaTeX and as a CSV; reasons stand below by number;
    one without has none of it."""
    plan = manifest(name="table2", seeds=(0,))
    made = stored(tmp_path, plan, scores(plan), costs(plan))
    paths = report.build(made, tmp_path / "out", ["md", "csv", "tex"])
    assert [path.name for path in paths] == [
        *("table2.md", "table2.csv", "table2-published.csv", "table2.tex", "table2-pairs.csv")
    ]
    text = paths[0].read_text()
    assert "| protocol differs (1) |" in text
    assert "- (1) backend.model: black-forest-labs/FLUX.1-dev there, shapes here;" in text
    assert "Without a published number: geneval, geneval_strict." in text
    assert "One training run per row: no verdict on trained rows" in text
    frame = pd.read_csv(paths[2], dtype=str, keep_default_na=False)
    assert frame.loc[frame["published"] != "", "published"].str.endswith("0").any()  # as printed
    assert set(frame["verdict"]) == {"protocol differs", "not run", "no reference"}
    assert "0.4092" in paths[3].read_text()
    other = manifest(name="made_up")
    text = report.markdown(report.sections(other, costs(other), analyse(other, scores(other))))
    assert "Published numbers" not in text


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("method,metric,value\na,b,1", "expected the columns method,metric,value,se"),
        ("method,metric,value,se\na,b,about 3,", "p.csv:2: value: 'about 3' is not a number"),
        ("method,metric,value,se\na,b,1", "expected 4 fields, got 3"),
        ("method,metric,value,se\na,b,1,\na,b,2,", "a, b appears twice"),
        ("method,metric,value,se\na,b,nan,", "is not a number"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, csv, message):
    """A malformed table is refused, with file and line; so are an unknown name and a misspelt setting."""
    (tmp_path / "p.csv").write_text(csv + "\n")
    entry = "p: {citation: c, url: u, place: t, protocol: {}, metrics: {b: {metric: pickscore}}}\n"
    (tmp_path / "sources.yaml").write_text(entry)
    with pytest.raises(UserError, match=message):
        published.load("p", tmp_path)
    with pytest.raises(UserError, match="there is no table 'q'"):
        published.load("q", tmp_path)
    (tmp_path / "sources.yaml").write_text(entry.replace("place:", "plaze:"))
    with pytest.raises(UserError, match=r"did you mean 'place'"):
        published.load("p", tmp_path)

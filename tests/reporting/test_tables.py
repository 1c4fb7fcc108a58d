"""Claims about the tables: marks, costs, paired changes, all pairs, and bad input, which is answered in words."""

import re

import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from support.report_tables import LABELS, costs, manifest, page, results, row_of, scores, section, stored

from alignbench.reporting import improvement_section, report, tables
from alignbench.reporting.analysis import results as store_results
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.text.numbers import interval, limits, significant


def analysis_of(given):
    return analyse(given.manifest, given.scores)


# ------------------------------------------------------------------------------------------------------------ results


def test_the_top_group_is_marked_and_never_called_equal():
    """(top) stands at the leader and at what is not separable from it, and no sign says that two rows are equal."""
    given = results()
    mine = given.scores["label"] == "DRTune"
    rival = given.scores[given.scores["label"] == "LeapAlign"]["score"].to_numpy()
    given.scores.loc[mine, "score"] = rival + np.random.default_rng(0).normal(size=mine.sum()) * 0.01
    analysis, text = analysis_of(given), page(given)
    hps = analysis.measures[0]
    assert analysis.rankings[hps].top == [k for k in analysis.rankings[hps].order if k in ("DRTune", "LeapAlign")]
    table = section(text, "Results")
    marked = [label for label in LABELS if "(top)" in row_of(table, label).split("|")[2]]
    assert marked == ["DRTune", "LeapAlign"]
    assert "(=)" not in text
    assert "this does not mean equal" in " ".join(table.split())


def test_a_column_in_which_nothing_is_separable_has_no_mark():
    """If every row is in the top group, or none leads, the mark would say nothing and is left out."""
    given = results()
    given.scores["score"] = given.scores.groupby(["metric", "prompt_id", "index"])["score"].transform("mean")
    assert "(top)" not in section(page(given), "Results").split("Every cell")[0]


def test_the_legend_speaks_of_what_the_intervals_can_speak_of():
    """With one seed: these weights, nothing bold; with several: other training runs, and when a leader is bold."""
    one, several = (" ".join(tables.legend(analysis_of(results(seeds=seeds))).split()) for seeds in ((0,), (0, 1)))
    assert "speak of *these weights*" in one
    assert "Nothing is bold" in one
    assert "training runs." not in one
    assert "other training runs" in several
    assert "these weights" not in several
    assert "**" not in section(page(results(seeds=(0,))), "Results").split("Every cell")[0].replace(
        "**(reward hacking, these weights)**", ""
    )


@pytest.mark.slow
def test_a_row_of_fewer_prompts_says_how_many():
    """A mean over 51 prompts beside means over 60 has its number in the cell, and the legend says why."""
    given = results()
    few = (given.scores["label"] == "ReFL") & (given.scores["metric"] == "pickscore")
    given.scores = given.scores[~(few & (given.scores["prompt_id"] < "p0009"))]
    table = section(page(given), "Results")
    assert row_of(table, "ReFL").count("(51 prompts)") == 1
    assert table.count("(51 prompts)") == 1
    assert "A number of prompts" in table
    assert "A number of prompts" not in section(page(results()), "Results")
    assert "(51 prompts)" in section(page(given), "Paired change").split("### PickScore")[1].split("###")[0]


def test_a_bold_leader_never_seems_to_be_the_only_one():
    """If all rows gain alike, the leader is bold, and the others are marked as not separable from it."""
    given = results()
    frame = given.scores
    keys = ["metric", "prompt_id", "index"]
    level = frame[frame["label"] == "LeapAlign"].groupby(keys)["score"].mean().rename("level")
    frame = frame.join(level, on=keys)
    noise = np.random.default_rng(0).normal(size=len(frame)) * 1e-4
    trained = frame["label"] != "base"
    given.scores = frame.assign(score=frame["score"].where(~trained, frame["level"] + noise)).drop(columns="level")
    analysis, table = analysis_of(given), section(page(given), "Results")
    hps = analysis.measures[0]
    assert analysis.bold(hps)
    assert len(analysis.rankings[hps].top) == 5
    assert sum("(top)" in row_of(table, label).split("|")[2] for label in LABELS) == 5


# -------------------------------------------------------------------------------------------------------------- costs


def spent(frame, **columns):
    """Return the costs with columns set for the rows of each label."""
    for name, values in columns.items():
        frame[name] = frame["label"].map(values) if isinstance(values, dict) else values
    return frame


def test_costs_are_relative_to_the_cheapest_trained_row():
    """Multiples are of seconds times processes; base, which is not trained, is not the cheapest, nor in the table."""
    frame = spent(costs(manifest()), device="NVIDIA H200", processes={"ReFL": 2})
    frame.loc[frame["label"] == "DRTune", "seconds"] = 20.5
    multiples = tables.cost_multiples(frame)
    assert multiples == {"ReFL": 4, "DRaFT-LV": 2, "DRTune": 1, "LeapAlign": 2, "DanceGRPO": 2}
    table, _ = tables.costs_table(frame)
    assert [row[0].value for row in table.rows] == list(LABELS[1:])


def test_a_disturbed_run_does_not_set_the_time():
    """One of three runs took ten times as long: the row's time is the median, and the note names the row."""
    plan = manifest(seeds=(0, 1, 2))
    frame = spent(costs(plan), device="NVIDIA H200", processes=1)
    frame.loc[frame["run"] == "DRTune-1", "seconds"] = 410.0
    assert tables.cost_multiples(frame)["DRTune"] == 1
    assert tables.spending(frame).uneven == ["DRTune"]
    assert "The times per image of the runs of DRTune differ" in tables.costs_note(analyse(plan, scores(plan)), frame)
    assert tables.spending(costs(plan)).uneven == []


@pytest.mark.parametrize(
    ("device", "seconds", "title"),
    [
        ("NVIDIA H200", 41.0, "GPU-seconds"),
        ("NVIDIA H200", 7200.0, "GPU-hours"),
        ("CPU, Linux x86_64, 2 cores, threads per process: 1", 41.0, "CPU time, s"),
        (None, 41.0, "device time, s"),
    ],
)
def test_time_is_called_by_its_device(device, seconds, title):
    """Hours of GPUs are GPU-hours; a CPU's time is not called GPU-seconds, nor that of an unknown device."""
    frame = spent(costs(manifest()), device=device, seconds=seconds, processes=1)
    table, constant = tables.costs_table(frame)
    assert table.columns[1].title == title
    assert ("GPUs" in constant) == (device == "NVIDIA H200")


def test_times_on_different_devices_are_not_compared():
    """Rows that ran on different machines have no multiples, and the note says that their times are not comparable."""
    frame = spent(costs(manifest()), device={"ReFL": "NVIDIA A100", "DRTune": "NVIDIA H200"}, processes=1)
    assert tables.cost_multiples(frame) == {}
    note = tables.costs_note(analysis_of(results()), frame)
    assert "not comparable" in note
    assert "NVIDIA A100; a device that was not recorded; NVIDIA H200" in note


def test_what_is_the_same_in_every_row_is_said_once():
    """Images, NFE and calls that are equal in all rows are in the note, not in columns; unequal ones are columns."""
    given = results()
    text = section(page(given), "Costs of training")
    assert "images: 480, reward calls: 480, decodes: 480" in text
    assert "images" not in text.splitlines()[2]
    given.costs.loc[given.costs["label"] == "ReFL", "images"] = 240
    assert "images" in section(page(given), "Costs of training").splitlines()[2]
    assert "| base" not in text


def test_rows_without_costs_are_named():
    """Published weights and failed runs have no costs: the note names them; without any run there is no section."""
    given = results()
    given.costs.loc[given.costs["label"] == "DRTune", ["images", "seconds"]] = np.nan
    assert "Without costs: DRTune." in section(page(given), "Costs of training")
    given.costs["images"] = np.nan
    assert "## Costs of training" not in page(given)


def test_the_device_is_that_of_the_runs_provenance():
    """A run with GPUs has their names, one without its machine and threads, an unrecorded one None."""
    about = {"devices": ["H200", "H200"], "machine": "Linux, 16 cores", "threads": 1, "processes": 2}
    assert store_results.machine(about) == {"device": "H200", "processes": 2}
    cpu = store_results.machine({**about, "devices": []})
    assert cpu == {"device": "CPU, Linux, 16 cores, threads per process: 1", "processes": 2}
    assert store_results.machine({}) == {"device": None, "processes": None}


# -------------------------------------------------------------------------------------------------- changes and pairs


def test_changes_are_grouped_by_measure():
    """Each measure has a heading and a table with a row per method; with one seed its spread over seeds is unknown."""
    several, one = (section(page(results(seeds=seeds)), "Paired change") for seeds in ((0, 1), (0,)))
    assert re.findall(r"^### (.*)", several, re.MULTILINE) == [
        *("HPSv2.1 [train]", "PickScore [held-out]", "GenEval, by task [check]", "GenEval strict, by task [check]")
    ]
    assert several.count("| LeapAlign") == 4
    assert "unknown" not in several.split("Image by image")[0]
    rows = [line for line in one.splitlines() if line.startswith("| LeapAlign")]
    assert [row.split("|")[4].strip() for row in rows] == ["unknown"] * 4
    assert [row.split("|")[6].strip() for row in rows] == ["up (these weights)"] * 4


def test_unstable_rows_are_flagged():
    """A row whose runs differ more than others' is marked in the table of that measure, and a line explains it."""
    given = results()
    analysis = analysis_of(given)
    analysis.unstable[analysis.measures[1]] = ["DRTune"]
    text = report.markdown(tables.changes_sections(analysis))
    assert text.count("| DRTune (unstable)") == 1
    assert tables.UNSTABLE in text


def test_pairs_are_seen_from_both_sides():
    """Above the diagonal row - column of every pair, as decided; below it the probability that the row improves."""
    analysis = analysis_of(results())
    for measure in analysis.measures:
        order, table = analysis.rankings[measure].order, improvement_section.pairs_table(analysis, measure)
        means = {label: found.mean for label, found in analysis.means[measure].items()}
        shares = improvement_section.improvements(analysis, measure)
        for i, row in enumerate(table.rows):
            assert row[0].value == order[i]
            for j, cell in enumerate(row[2:]):
                if i < j:
                    assert cell.value == pytest.approx(means[order[i]] - means[order[j]])
                    forward = analysis.pairs[measure].get((order[i], order[j]))
                    pair = forward or analysis.pairs[measure][order[j], order[i]]
                    assert ("▲" in cell.text) == (pair.verdict in ("up", "down"))
                elif i > j:
                    assert cell.value == shares[order[i], order[j]].mean


def test_the_probability_of_a_pair_is_the_share_of_images():
    """P(a > b) is the share of images on which a is better, ties half, and 1 - P(b > a); lower may be better."""
    given = results()
    analysis = analysis_of(given)
    measure = analysis.measures[1]
    a, b = (analysis.scores[measure].values[label] for label in ("ReFL", "LeapAlign"))
    share = improvement_section.improvements(analysis, measure)
    expected = ((a > b) + (a == b) / 2).mean()
    assert share["ReFL", "LeapAlign"].mean == pytest.approx(expected)
    assert share["LeapAlign", "ReFL"].mean == pytest.approx(1 - expected)


@pytest.mark.slow
def test_all_pairs_are_in_the_page_and_in_a_file_but_not_in_the_markdown(tmp_path):
    """The page has a matrix per measure, the CSV a row per pair and measure; the markdown has ranks and letters."""
    paths = {path.name: path for path in report.build(results(tmp_path), tmp_path / "out", ("md", "csv", "html"))}
    frame = pd.read_csv(paths["made_up-pairs.csv"])
    assert len(frame) == 4 * 10
    assert set(frame["speaks_of"]) == {"methods"}
    assert frame["improved"].between(0, 1).all()
    assert paths["made_up.html"].read_text().count("All pairs, ") >= 4
    text = paths["made_up.md"].read_text()
    assert "All pairs" not in text
    order = section(text, "Order of the methods")
    assert [cell.strip() for cell in row_of(order, "LeapAlign").split("|")[2:-1]] == ["1, a"] * 4


# ---------------------------------------------------------------------------------------------------------- bad input


def bad(kind):
    """Return results that support little."""
    one = manifest(labels=("base", "ReFL")) if kind == "one method" else manifest()
    if kind == "one seed":
        one = manifest(seeds=(0,))
    frame = scores(one)
    if kind == "one prompt":
        frame = frame[frame["prompt_id"] == "p0000"]
    elif kind == "one image":
        frame = frame[(frame["prompt_id"] == "p0000") & (frame["index"] == 0)]
    elif kind == "constant":
        frame["score"] = 0.5
    elif kind == "all missing":
        frame["score"] = np.nan
    elif kind == "seeds that differ":
        seeds = {"ReFL": {0: 7}, "DRTune": {0: 3, 1: 4}}
        frame["seed"] = [seeds.get(label, {}).get(seed, seed) for label, seed in zip(frame["label"], frame["seed"])]
        one = structs.replace(
            one, runs=[structs.replace(run, seed=seeds.get(run.label, {}).get(run.seed, run.seed)) for run in one.runs]
        )
    return stored(None, one, frame, costs(one))


KINDS = ("one prompt", "one image", "one method", "one seed", "constant", "all missing", "seeds that differ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_words(kind, tmp_path):
    """Whatever is missing: all formats are made, nothing is nan, no interval has equal ends, and every row is there."""
    given = bad(kind)
    for path in report.build(given, tmp_path / "out", ("md", "csv", "tex", "html")):
        text = path.read_text()
        if path.suffix == ".html":
            text = re.sub(r"<script.*?</script>|<style.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)
        if path.suffix != ".csv":
            ends = re.findall(r"\[([-+−$]*[\d.,]+), ([-+−$]*[\d.,]+)\]", text)
            assert [pair for pair in ends if pair[0] == pair[1]] == []
    table = section((tmp_path / "out/made_up.md").read_text(), "Results")
    assert all(row_of(table, label) for label in given.manifest.cases)


def test_a_point_is_not_an_interval():
    """An interval without width is said in words, one narrower than its decimals with its width, an unknown one so."""
    assert interval(0.5, 0.5, 0.5) == "0.500 [no spread]"
    assert interval(0.5, 0.49999, 0.50001) == "0.500 [within 0.001]"
    assert interval(0.5, 0.499, 0.501) == "0.500 [0.499, 0.501]"
    assert limits(None, None) == limits(np.nan, np.nan) == "[unknown]"


def test_significant_digits():
    """Two digits that count, with a sign and without an exponent; nothing is minus zero."""
    shown = [significant(value) for value in (1.7250, -0.00061, 123.4, 0.0, -1e-9, 12345.6)]
    assert shown == ["+1.7", "-0.00061", "+120", "0", "0", "+12,000"]


def test_a_task_of_two_prompts_has_its_number_and_no_interval():
    """A fraction over two prompts is a mean alone, under a heading with their number; larger tasks keep intervals."""
    given = results()
    analysis = analysis_of(given)
    measure = next(each for each in analysis.measures if each.by_task)
    few = str(np.unique(analysis.scores[measure].tags)[0])
    kept = np.flatnonzero(analysis.scores[measure].tags == few)[2:]
    prompts = set(analysis.scores[measure].prompts[kept])
    analysis = analyse(given.manifest, given.scores[~given.scores["prompt_id"].isin(prompts)])
    table = tables.task_table(analysis, measure)
    column = next(i for i, each in enumerate(table.columns) if each.key == few)
    assert table.columns[column].title.endswith(" (2 prompts)")
    assert all(row[column].lo is None for row in table.rows)
    assert all(np.isfinite(row[-1].lo) for row in table.rows)

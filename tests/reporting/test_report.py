"""Claims about tables, reports and image grids, on a made-up store."""

import csv
import io
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from PIL import Image
from support.report_tables import (
    LABELS,
    TASKS,
    costs,
    draw_images,
    manifest,
    on_disk,
    page,
    results,
    row_of,
    scores,
    section,
    stored,
    with_runs,
)

from alignbench import cli
from alignbench.reporting import disclosures, report, tables
from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Measure, analyse
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.plots import image_grid
from alignbench.reporting.text.table import Cell, Column, Table, escape, interval, number
from alignbench.store import files
from alignbench.store.manifest import UNTRAINED, ManifestNote

# ---------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (
            {2, 3},
            "ReFL: 0, 1; DRTune: 2, 3. Two trained rows are compared over the seeds that both have. These share none",
        ),
        ({1, 2}, "ReFL: 0, 1; DRTune: 1, 2. Two trained rows are compared over the seeds that both have."),
        ({0, 1}, ""),
    ],
)
def test_training_seeds_that_differ_are_said(seeds, said):
    """The page has each row's seeds, and which rows are not compared at all because they share none."""
    plan = manifest((0, 1, 2, 3), ("base", "ReFL", "DRTune"))
    kept = {"ReFL": {0, 1}, "DRTune": seeds, "base": {UNTRAINED}}
    plan = structs.replace(plan, runs=[run for run in plan.runs if run.seed in kept[run.label]])
    text = page(stored(None, plan, scores(plan), costs(plan)))
    assert ("**The training seeds differ**: " in text) == bool(said)
    assert said in text
    assert ("not even that it is small: ReFL and DRTune." in text) == (seeds == {2, 3})
    assert "nan" not in text


def test_an_unknown_role_is_neither_reward_nor_held_out():
    """The page says of which scores it is unknown, and none of them is the primary measure."""
    plan = manifest((0, 1), ("base", "ReFL"))
    plan = with_runs(plan, lambda run: {"scores": [structs.replace(score, role="unknown") for score in run.scores]})
    text = page(stored(None, plan, scores(plan), costs(plan)))
    assert "[unknown]: it is not known whether a row was trained on this score" in text
    assert analyse(plan, scores(plan)).primary is None
    assert "[held-out]" not in section(text, "Paired change")
    assert "nan" not in text


def test_the_first_line_makes_the_report_again():
    """The page begins with the two commands that make it from nothing."""
    first = page(results()).splitlines()[0]
    assert first == "Made by `alignbench sweep sweeps/made_up.yaml && alignbench report sweeps/made_up.yaml`"


def test_every_method_has_its_row_and_every_measure_its_role():
    """The table has methods in the sweep's order, the training reward first, then held-out scores, then checks."""
    table = section(page(results()), "Results")
    assert [line.split()[1] for line in table.splitlines()[4:10]] == list(LABELS)
    header = table.splitlines()[2]
    order = ["HPSv2.1, cosine ↑ [train]", "PickScore, logit ↑ [held-out]", "GenEval, by task, fraction ↑ [check]"]
    places = [header.index(title) for title in order]
    assert places == sorted(places)


def test_bold_needs_a_gain_that_survives_holm():
    """The best mean is bold where its paired gain over base survives; where no method moved, nothing is."""
    given = results()
    table = section(page(given), "Results")
    assert row_of(table, "LeapAlign").count("**") == 8
    assert "**" not in row_of(table, "DanceGRPO")
    given.scores["score"] = given.scores.groupby(["metric", "prompt_id", "index"])["score"].transform("mean")
    assert "**0" not in section(page(given), "Results").split("Every cell")[0]


def test_the_verdicts_are_those_of_the_paired_changes():
    """Up, down and "cannot tell" follow the gains that were put in, and CSV and page agree."""
    analysis = analyse(manifest(), scores(manifest()))
    verdicts = {m.name: {k: v.verdict for k, v in found.items()} for m, found in analysis.changes.items()}
    assert verdicts["hpsv2.1"]["ReFL"] == "up"
    assert verdicts["pickscore"]["ReFL"] == "down"
    assert verdicts["pickscore"]["LeapAlign"] == "up"
    assert verdicts["pickscore"]["DanceGRPO"] == "cannot tell"


def test_published_weights_are_compared_like_any_row():
    """They are not base, though they stand first and train nothing; their change has the prompts' spread alone.

    What is said of trained methods does not depend on them, but for Holm's count.
    """
    plan = manifest(labels=("ReFL", "base", "LeapAlign", "DRTune"))
    first, *rest = [run for run in plan.runs if (run.label, run.seed) != ("ReFL", 1)]
    published = plan.only([structs.replace(first, seed=UNTRAINED, published=True), *rest])
    frame = scores(published)
    mine = frame["label"] == "ReFL"
    frame.loc[mine, "score"] += np.random.default_rng(1).normal(size=mine.sum())
    given = analyse(published, frame)
    without = structs.replace(plan, runs=rest, cases=["base", "LeapAlign", "DRTune"])
    alone = analyse(without, frame[~mine])
    assert (given.base, given.compared) == ("base", ["ReFL", "LeapAlign", "DRTune"])
    for measure in given.measures:
        data, changes = given.scores[measure], given.changes[measure]
        strata = data.tags if measure.by_task else None
        expected = stats.paired_difference(data.values["ReFL"], data.values["base"], strata)
        assert changes["ReFL"].estimate == pytest.approx(expected)
        for label in alone.compared:
            assert alone.changes[measure][label].estimate == pytest.approx(changes[label].estimate)


@pytest.mark.slow
def test_hybrid_inference_is_marked():
    """A row whose last steps are the base model's has a dagger, a footnote and a line in the protocol; others none."""
    given = results()
    own = {"DRTune": {"tuned_steps": 5}}
    given.manifest = with_runs(given.manifest, lambda run: {"protocol": run.protocol | own.get(run.label, {})})
    text = page(given)
    assert [label for label in LABELS if "†" in row_of(section(text, "Results"), label)] == ["DRTune"]
    assert "† Hybrid inference: the row takes these steps, the base model the rest: DRTune, the first 5 of 8" in text
    assert "- **but DRTune**: tuned steps = 5" in section(text, "Protocol")
    assert "†" not in page(results())


def test_moments_in_8_bits_are_marked():
    """A row that was trained with them has a double dagger and a footnote, beside any other; the base has none."""
    given = results()
    for run in given.manifest.runs:
        own = "8bit" if run.label in ("base", "DRTune") else "float32"
        run.settings["training"]["optimizer"] = {"moments": own}
    hybrid = {"DRTune": {"tuned_steps": 5}}
    given.manifest = with_runs(given.manifest, lambda run: {"protocol": run.protocol | hybrid.get(run.label, {})})
    text = page(given)
    assert [label for label in LABELS if "‡" in row_of(section(text, "Results"), label)] == ["DRTune"]
    assert "| DRTune † ‡" in text
    assert "‡ AdamW with 8-bit moments, which is not the papers' optimizer: DRTune." in text
    assert "‡" not in page(results())


def test_a_reward_that_rises_while_the_rest_falls_is_flagged():
    """A method whose training reward rose while held-out scores fell is named as hacking, in its row too."""
    text = page(results())
    assert "**REWARD HACKING, ReFL: the training reward rose while PickScore, GenEval, by task and" in text
    assert "LeapAlign: no reward hacking shown, and no score shown to fall" in text
    assert "(reward hacking)" in row_of(section(text, "Results"), "ReFL")
    assert "(reward hacking)" not in row_of(section(text, "Results"), "LeapAlign")


def test_the_sweeps_own_question_is_answered_from_the_numbers():
    """The quickstart asks about LeapAlign; the answer follows the scores, yes as well as not shown."""
    given = results(name="quickstart")
    assert "[check]: **Yes**: better than ReFL, DRaFT-LV and DRTune." in page(given)
    swap = {"LeapAlign": "DanceGRPO", "DanceGRPO": "LeapAlign"}
    given.scores["label"] = given.scores["label"].replace(swap)
    answer = section(page(given), "Does LeapAlign beat")
    assert "**Yes**" not in answer
    assert "worse than DRaFT-LV and DRTune" in answer


def test_overrides_show_their_reason_once():
    """An exception is printed with its reason and its methods, once, however many seeds carry it."""
    given = results()
    text = page(given)
    assert text.count("four groups of four") == 1
    assert "- DanceGRPO: training.batch = 16. four groups of four" in text
    notes = [ManifestNote({"training.optimizer.lr": 1e-4}, "a small model")]
    given.manifest = with_runs(given.manifest, lambda run: {"notes": notes})
    assert section(page(given), "Overrides").count("all methods: training.optimizer.lr = 0.0001. a small model") == 1


def test_settings_are_printed_as_resolved():
    """Shared settings are printed once, a method's own in its line; training seeds are not printed."""
    text = section(page(results()), "Settings")
    assert text.count("backend, name = flux, model = shapes") == 1
    assert text.count("training, batch = 16, budget.images = 480") == 1
    assert "- LeapAlign: name = leapalign, steps = 8" in text


def test_a_subset_says_so():
    """A quick look at a few prompts is marked as such at the head of the page, and asks the sweep's own questions."""
    given = results(name="quickstart-SUBSET")
    given.manifest = structs.replace(given.manifest, subset=60)
    text = page(given)
    assert text.splitlines()[4] == "**SUBSET: only the first 60 evaluation prompts.**"
    assert "Does LeapAlign beat" in text


def test_unequal_budgets_are_said():
    """Equal images are stated as measured; if one method trained on fewer, the page says so."""
    given = results()
    assert "equal images: 480 per training run" in page(given)
    given.costs.loc[given.costs["label"] == "ReFL", "images"] = 240
    assert "**The numbers of training images differ**: ReFL 240, DRaFT-LV 480" in page(given)


def test_one_seed_is_said():
    """With one training seed the page says that the variance between training runs is unknown."""
    assert "One training seed" in page(results(seeds=(0,)))
    assert "One training seed" not in page(results(seeds=(0, 1, 2)))


# ----------------------------------------------------------------------------------------------- what went wrong shows


def test_a_failed_run_appears_with_its_reason():
    """A run that failed is listed with its reason; its method says how many seeds are left, and keeps its row."""
    given = results()
    failed = given.costs["run"] == "LeapAlign-1"
    given.costs.loc[failed, ["state", "reason"]] = ["failed", "loss is nan at step 7 | see log"]
    given.scores = given.scores[given.scores["run"] != "LeapAlign-1"]
    text = page(given)
    assert "- LeapAlign, seed 1: **failed**: loss is nan at step 7 \\| see log" in text
    assert "(1 of 2 seeds)" in row_of(section(text, "Results"), "LeapAlign")


def test_a_method_without_any_score_keeps_its_row():
    """A method whose every run failed shows dashes, not nothing and not zeros."""
    given = results()
    mine = given.costs["label"] == "DRTune"
    given.costs.loc[mine, "state"] = "missing"
    given.costs.loc[mine, given.costs.columns[given.costs.columns.get_loc("updates") :]] = np.nan
    given.scores = given.scores[given.scores["label"] != "DRTune"]
    text = page(given)
    cells = row_of(section(text, "Results"), "DRTune").split("|")[2:-1]
    assert {cell.strip() for cell in cells} == {"—"}
    assert "- DRTune, seed 0: **missing**: no reason was recorded" in text
    assert "not measured" in section(text, "Paired change")


def test_an_invalid_score_does_not_vanish():
    """A nan and a row that is not ok are left out in pairs and counted in the coverage; complete scores say so."""
    given = results()
    assert "Complete: every image" in page(given)
    mine = (given.scores["label"] == "ReFL") & (given.scores["metric"] == "pickscore") & (given.scores["seed"] == 0)
    rows = given.scores.index[mine & (given.scores["prompt_id"] == "p0003")]
    given.scores.loc[rows[0], "score"] = np.nan
    given.scores.loc[rows[1], "ok"] = False
    text = page(given)
    assert "- PickScore, ReFL: 238 of 240 scores; prompts left out: 1 of the mean, 1 of the paired change" in text
    assert "nan" not in text


def test_an_empty_store_makes_a_report():
    """Before anything ran the report has every row, no number, and lists every run as missing."""
    given = results()
    given.scores = given.scores.iloc[:0]
    given.costs = given.costs.assign(state="missing", images=np.nan)
    text = page(given)
    assert "**No training run has finished.**" in text
    assert text.count("**missing**") == 11
    assert "nan" not in text


def test_a_sweep_without_base_has_no_bold():
    """Without an untrained method nothing can be shown to be better than it, and the page says so."""
    text = page(results(labels=LABELS[1:]))
    assert "no untrained method to compare with" in text
    assert "**2" not in section(text, "Results")


def test_rows_in_any_order_give_the_same_report():
    """The report is a function of the scores, not of the order in which they were written."""
    given = results()
    expected = page(given)
    given.scores = given.scores.sample(frac=1, random_state=0)
    assert page(given) == expected


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("text", ["a|b", "`x`", "two\nlines", "<b>", "*bold*", "[link](x)", "\u202egnp", "\\"])
def test_no_label_breaks_the_table(text):
    """Pipes, code, line breaks, HTML, emphasis, links and direction marks in a label stay text in one cell."""
    table = Table([Column("method"), Column("score")], [[Cell(text), Cell(1.0)]]).markdown()
    assert len(table.splitlines()) == 3
    row = table.splitlines()[2].replace("\\\\", "").replace("\\|", "")
    assert row.count("|") == 3
    assert "<b>" not in row
    assert "\u202e" not in row


def test_ordinary_names_are_left_alone():
    """Names such as geneval_strict, roles in brackets, comparisons and signed numbers need no escape."""
    for name in ("geneval_strict", "DRaFT-LV", "hpsv2.1 [train]", "emoji 🙂", "-0.1 [-0.2, +0.1]", "<0.001"):
        assert escape(name) == name


def test_numbers_are_shown_in_their_decimals():
    """Fixed decimals, thousands separators, signs on changes; never -0.000, never nan."""
    assert interval(0.28149, 0.2799, 0.2834) == "0.281 [0.280, 0.283]"
    assert interval(-0.0001, -0.01, 0.01, 3, True) == "0.000 [-0.010, +0.010]"
    assert interval(0.5, np.nan, np.nan) == "0.500 [unknown]"
    assert number(123456, 0) == "123,456"
    assert number(float("nan")) == interval(np.nan, 0, 1) == "—"


def test_csv_keeps_every_digit_and_every_name():
    """CSV is read back as written: ten digits, limits apart, quotes and line breaks in names, empty if unmeasured."""
    name = 'a "quoted", name\nof two lines'
    table = Table([Column("method"), Column("score")], [[Cell(name), Cell(1 / 3, 0.25, 0.5)], [Cell("b"), Cell()]])
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows == [
        ["method", "score", "score_lo", "score_hi"],
        [name, "0.3333333333", "0.25", "0.5"],
        ["b", "", "", ""],
    ]


@pytest.mark.slow
def test_the_tidy_file_has_one_row_per_method_and_measure(tmp_path):
    """pandas reads the CSV back: six methods by four measures and seven costs, and five gains over measures; base has
    no change; roles are named, and what is known of the spread between training runs."""
    report.build(results(tmp_path), tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out/made_up.csv", keep_default_na=False, na_values=[""])
    assert len(frame) == 6 * (4 + 7) + 5
    assert not frame.duplicated(["method", "metric"]).any()
    measured = frame[~frame["role"].isin(["cost", "summary"])]
    told = measured.groupby("method")["between_trainings"].unique().str.join("")
    assert told.to_dict() == {label: "none" if label == "base" else "in se" for label in LABELS}
    shares = measured[measured["method"] != "base"]
    assert (shares.loc[shares["improved_verdict"] == "up", "improved"] > 0.5).all()
    assert (shares.loc[shares["improved_verdict"] == "down", "improved"] < 0.5).all()
    assert set(shares["improved_verdict"]) > {"cannot tell"}
    assert measured[measured["method"] == "base"]["change"].isna().all()
    assert measured[measured["method"] != "base"]["p_holm"].notna().all()
    assert (measured["lo"] <= measured["mean"]).all()
    assert set(measured["prompts"]) == {60}


# ------------------------------------------------------------------------------------------------------ files and speed


@pytest.mark.slow
def test_the_grid_has_a_row_per_method_and_a_column_per_prompt(tmp_path):
    """Ten prompts of all tasks, six methods, 32 px images enlarged four times with their pixels intact."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    paths = report.build(given, tmp_path / "out")
    names = [path.name for path in paths]
    assert names[:4] == ["made_up.md", "made_up.csv", "made_up.tex", "made_up-grid.png"]
    assert names[-1] == "made_up.html"
    with Image.open(paths[3]) as sheet:
        side, gap = 128, image_grid.GAP
        assert sheet.height == 2 * gap + image_grid.LINE * (1 + 3) + 6 * (side + gap)  # task, and three lines of prompt
        left = sheet.width - 10 * (side + gap)
        assert 50 < left < 150
        assert (np.asarray(sheet)[-gap - side : -gap, left : left + side] == 30).all(2).any()
    assert "(made_up-grid.png)" in paths[0].read_text()
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.slow
def test_a_page_alone_is_the_page_of_the_whole_report(tmp_path):
    """``--format html`` gives the bytes that all formats give, grid included, and no other file; markdown without png
    names no file that is not there."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    whole = report.build(given, tmp_path / "out")[-1].read_bytes()
    alone = report.build(given, tmp_path / "alone", ["html"])
    assert list((tmp_path / "alone").iterdir()) == alone
    assert b'<img class="grid"' in whole
    assert alone[0].read_bytes() == whole
    text, _ = report.build(given, tmp_path / "both", ["md", "html"])
    assert "grid" not in text.read_text()


@pytest.mark.slow
def test_a_missing_image_leaves_a_grey_tile(tmp_path):
    """A method without images, or with damaged ones, keeps its row in the grid."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    for seed in (0, 1):
        (tmp_path / f"images/ReFL{seed}/manifest.parquet").unlink()
    for file in (tmp_path / "images").glob("B*/*.png"):
        file.write_bytes(b"cut off")
    with Image.open(report.build(given, tmp_path / "out", ["png"])[0]) as sheet:
        row = np.asarray(sheet)[-5 * 132 : -5 * 132 + 128, -132:-4]
    assert (row[:8] == 225).all()


@pytest.mark.parametrize("prompt", ["a | b\n`c`", "emoji 🙂 and שלום", "x" * 300, "", "word " * 100])
def test_any_prompt_can_stand_over_a_column(prompt):
    """Pipes, line breaks, emoji, right-to-left text, endless words and nothing at all fit over a tile of the grid."""
    sheet = image_grid.draw([(prompt[:20], [None, None])], [("task", prompt), ("", "b")])
    assert (
        sheet.height
        <= 2 * image_grid.GAP + image_grid.LINE * (1 + image_grid.CAPTION_LINES) + image_grid.SMALLEST + image_grid.GAP
    )


def test_prompts_of_the_grid_are_chosen_by_rule():
    """Every task is shown, as evenly as ten allow, and the order in which prompts come does not matter."""
    prompts, tags = [f"p{i}" for i in range(60)], [TASKS[i % 6] for i in range(60)]
    chosen = image_grid.choose(prompts, tags)
    counts = pd.Series(tags, prompts)[chosen].value_counts()
    assert len(set(chosen)) == 10
    assert counts.min() == 1
    assert counts.max() == 2
    assert image_grid.choose(prompts[::-1], tags[::-1]) == chosen
    assert image_grid.choose(["a"], [""]) == ["a"]


@pytest.mark.slow
def test_a_report_is_made_twice_alike(tmp_path):
    """The same store gives the same bytes: the pages, the CSV and the images."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    first = [path.read_bytes() for path in report.build(given, tmp_path / "a")]
    assert [path.read_bytes() for path in report.build(given, tmp_path / "b")] == first


@pytest.mark.slow
def test_a_store_on_disk_is_read(tmp_path):
    """The page of a real store is the page of its frames."""
    given = results(tmp_path)
    plan = on_disk(tmp_path, given)
    text = report.build(Results(tmp_path, plan), tmp_path / "out")[0].read_text()
    assert text.count("- made with alignbench 0.1.0, Python 3.11.9, torch 2.15, Linux x86_64, 2 cores") == 1
    assert "different software" not in text
    assert section(text, "Results").startswith(section(page(given), "Results").rstrip())
    assert section(text, "Paired change") == section(page(given), "Paired change")
    assert "not in the numbers" not in text


@pytest.mark.slow
@pytest.mark.parametrize("writable", [True, False])
def test_the_report_stays_the_same_however_its_scores_were_read(tmp_path, writable, monkeypatch, capsys):
    """The first, and the next from kept tables: byte for byte; of a read-only store as well, where none are kept."""
    root = tmp_path / "store"
    plan = on_disk(root, results(root))
    expected = [path.read_bytes() for path in report.build(Results(root, plan), tmp_path / "a", ("md", "csv"))]
    made = ("made_up.md", "made_up.csv", "made_up-pairs.csv")
    if not writable:
        files.write(root / "tables", "a file where a folder would be: also root cannot write there")
        monkeypatch.setattr(os, "access", lambda place, mode: False)
    for _ in range(2):
        words = ["made_up-1", "--store", str(root), "--format", "md,csv", "--out", str(tmp_path / "b")]
        assert cli.main(["report", *words]) == 0
        assert [(tmp_path / "b" / name).read_bytes() for name in made] == expected
        kept = sorted(path.name for path in root.glob("tables/made_up-1/*"))
        names = ["scores.feather", "scores.json", "training.feather", "training.json"]
        assert kept == (names if writable else [])
        capsys.readouterr()


@pytest.mark.slow
def test_reports_need_no_torch():
    """Importing the report, and every report module beside it, loads no torch."""
    code = (
        "import sys; from alignbench.reporting import report; report._words('table2'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_large_sweep_is_quick():
    """30 runs of 300 prompts x 4 images and four measures (144,000 scores) are a page within five seconds."""
    plan = manifest(seeds=range(6))
    large = stored(None, plan, scores(plan, 300, 4), costs(plan))
    start = time.process_time()
    page(large)
    assert time.process_time() - start < 5


def test_the_interval_of_a_share_ends_where_shares_end():
    """Two prompts give a t-interval that reaches beyond 1; what is printed of a fraction stays within [0, 1]."""
    wide = stats.mean_interval(np.array([0.75, 1.0])[:, None, None])
    assert wide.lo < 0
    assert wide.hi > 1
    share, cosine = (tables.estimate_cell(wide, Measure("e", "m", unit=unit)) for unit in ("fraction", "cosine"))
    assert (share.lo, share.hi) == (0, 1)
    assert (cosine.lo, cosine.hi) == (wide.lo, wide.hi)


def test_a_setting_that_an_override_switches_off_is_shown():
    """``shift: null`` is a departure like any other."""
    assert disclosures._flat({"method": {"shift": None}, "steps": 3}) == "method.shift = none, steps = 3"

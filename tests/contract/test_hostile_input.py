"""Names and prompts that look like markup, and stores with gaps, in every format of a report."""

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest
from support.latex import structure_errors
from support.report_tables import costs, manifest, page, results, scores, section, stored, with_files

from alignbench.config import UserError
from alignbench.reporting import report
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.text.latex import tex
from alignbench.reporting.text.table import Cell, Column, Table
from alignbench.store.files import write_frame
from alignbench.store.manifest import Manifest, ManifestMetric, ManifestRun, ManifestScore

NAMES = (
    *("a|b", "`x`", "two\nlines", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>"),
    *(
        "[a](javascript:x)",
        r"\input{/etc/passwd}",
        "50% & more_of #1 $x^2$ {~}",
        "=1+2",
        "@SUM(A1)",
        "+cmd|' /C calc'!A0",
    ),
    *("\u202egnp.exe", "שלום", "[0.5ex]", "*", "--", "emoji 🙂", "\x00\x07bell"),
)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_markup_in_any_format(tmp_path, name):
    """A method of any name has its row in the page, the CSV and the LaTeX, and is text in each of them."""
    plan = manifest(seeds=(0, 1), labels=("base", "ReFL", name))
    frame = scores(plan)
    frame["tag"] = frame["tag"].replace("counting", name)
    found = stored(tmp_path, plan, frame, costs(plan))
    paths = report.build(found, tmp_path / "out", ("md", "csv", "tex"))
    text, table, latex, pairs = (path.read_text() for path in paths)
    headings = ("Results", "Costs of training", "Paired change", "Order", "Probability of", "GenEval [check], by task")
    for part in (part for heading in headings for part in section(text, heading).split("\n### ")):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1  # as many cells in each row
    assert not re.search(r"<(script|img|/)", text)
    assert "\u202e" not in text
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == 3 * (4 + 7) + 2
    rows += csv.DictReader(io.StringIO(pairs))
    for field in (value for row in rows for value in row.values() if not re.fullmatch(r"[-+0-9.e]*", value)):
        assert not field.startswith(("=", "+", "-", "@", "\t", "\r"))
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert not structure_errors(latex)
    assert r"\input{" not in "".join(body)


@pytest.mark.parametrize("name", NAMES)
def test_latex_has_no_special_character_left(name):
    """Every special character is escaped, only ASCII and Latin letters remain, and braces are balanced.

    Brackets and stars cannot become arguments of a row's end.
    """
    shown = tex(name)
    bare = re.sub(r"\\text\w+\{\}|\\[%_&#${}]|\{[\[\]*]\}|-\{\}|\$\\\w+\$", "", shown)
    assert not re.search(r"[\\%_&#$^~{}\[\]*<>|\"]", bare)
    assert all(c.isascii() or "À" <= c <= "ÿ" for c in shown)
    assert not re.search(r"[\x00-\x1f]", shown)


def test_latex_shows_what_markdown_shows():
    """Means, intervals, bold, marks and arrows are the same; numbers stand in S columns; missing values are dashes."""
    columns = [Column("m_1"), Column("score", "cosine", True, "train", 2), Column("change", signed=True, decimals=1)]
    rows = [
        [Cell("a"), Cell(1.5, -1, 2, bold=True, mark=" (51 prompts)"), Cell(-0.26)],
        [Cell("b"), Cell(), Cell(0.26)],
    ]
    lines = Table(columns, rows).latex().splitlines()
    assert lines[0] == r"\begin{tabular}{@{}lS[table-format=1.2]S[table-format=+1.1]@{}}"
    assert lines[2] == r" & \multicolumn{1}{c}{training reward} &  \\"
    assert lines[4] == r"m\_1 & {score $\uparrow$} & {change} \\"
    assert lines[6] == r"a & \bfseries 1.50 & -0.3 \\[-0.5ex]"
    assert lines[7] == r" & {\tiny {[$-$1.00, 2.00]}, (51 prompts)} &  \\[0.3ex]"
    assert lines[8] == r"b & {\textemdash{}} & +0.3 \\"


def test_numbers_are_no_formulas():
    """Negative numbers stay numbers in the CSV, also as text; text that a spreadsheet would execute gets a quote."""
    table = Table([Column("=x"), Column("y")], [[Cell("-0.30"), Cell(-0.3)], [Cell("-a"), Cell("a=b")]])
    assert table.csv() == "'=x,y\n-0.30,-0.3\n'-a,a=b\n"


def test_different_prompts_are_paired_where_both_have_them():
    """A method that was scored on other prompts keeps its own mean; its change uses the common prompts only.

    The page says how many prompts were left out.
    """
    given = results()
    frame = given.scores
    number = frame["prompt_id"].str[1:].astype(int)
    mine, base = frame["label"] == "ReFL", frame["label"] == "base"
    given.scores = frame[~(mine & (number < 10)) & ~(base & (number >= 50))]
    analysis = analyse(given.manifest, given.scores)
    for measure in analysis.measures:
        assert analysis.means[measure]["ReFL"].prompts == 50
        assert analysis.changes[measure]["ReFL"].estimate.prompts == 40
        assert analysis.improved[measure]["ReFL"].estimate.prompts == 40
    assert analysis.gains["ReFL"].estimate.prompts == 40
    text = section(page(given), "Coverage")
    assert "- PickScore, ReFL: 200 of 240 scores; prompts left out: 10 of the mean, 20 of the paired change" in text


@pytest.mark.slow
def test_gaps_leave_no_hole_in_the_page(tmp_path):
    """Every format is made, no number is nan, and everything that is missing is named.

    The gaps: scores that are nan, a missing seed, a method and a measure without scores, an evaluator without a file.
    """
    given = results(tmp_path)
    frame, plan = given.scores, given.manifest
    frame.loc[frame.index[::7], "score"] = np.nan
    frame.loc[frame.index[3::11], "score"] = np.inf
    gone = (frame["label"] == "DRTune") | (frame["run"] == "ReFL-1") | (frame["metric"] == "pickscore")
    given.scores = frame[~gone]
    given.costs.loc[given.costs["label"] == "DRTune", ["state", "reason"]] = ["failed", "out of memory"]
    paths = report.build(given, tmp_path / "out")
    for path in paths:
        assert path.suffix in (".png", ".parquet") or "nan" not in path.read_text()
    text = paths[0].read_text()
    assert "DRTune, seed 0: **failed**: out of memory" in text
    assert "- PickScore, LeapAlign: 0 of 240 scores" in text
    assert len(plan.cases) == len([line for line in section(text, "Results").splitlines() if line.startswith("| ")]) - 2


@pytest.mark.parametrize("kind", ["nothing", "no folder"])
def test_a_store_where_nothing_is_done_has_a_report(tmp_path, kind):
    """Before anything has run, every format can be made, with every run listed as missing."""
    plan = with_files(manifest())
    root = tmp_path / "store"
    if kind == "nothing":
        root.mkdir()
    paths = report.build(Results(root, plan), tmp_path / "out")
    assert [path.suffix for path in paths] == [".md", ".csv", ".tex", ".csv", ".parquet", ".csv", ".csv", ".html"]
    assert paths[0].read_text().count("**planned**: not made yet") == 11
    assert not any("nan" in path.read_text() for path in paths[:4])


def test_a_damaged_score_file_is_named(tmp_path):
    """A file that is not parquet is an error with its path, neither a traceback nor a missing score."""
    plan = with_files(manifest(), "scores/x.parquet")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read .*run the sweep again"):
        report.build(Results(tmp_path, plan), tmp_path / "out")


def test_only_the_formats_that_were_asked_for_are_written(tmp_path):
    """One format is one file; an unknown one is refused with a suggestion, before anything is written."""
    given = results(tmp_path)
    assert [path.name for path in report.build(given, tmp_path / "a", ("tex",))] == ["made_up.tex"]
    with pytest.raises(
        UserError,
        match=r"there is no format 'cvs'; did you mean 'csv'\? \(formats: md, csv, tex, html, svg, png, data\)",
    ):
        report.build(given, tmp_path / "b", ("md", "cvs"))
    assert not (tmp_path / "b").exists()


def test_scores_read_from_files_are_those_that_were_written(tmp_path):
    """Two metrics of one file, whole numbers, a missing tag and a file without rows come back as they were."""
    texts = {"prompt_id": ["p1", "p0"], "tag": ["t", None], "index": [0, 1], "ok": [True, False]}
    full = pd.DataFrame({**texts, "m": [1, 2], "n": [0.5, np.nan]})
    runs = []
    for name, frame in {"a": full, "b": full.iloc[:0], "c": full.assign(tag=None)}.items():
        write_frame(tmp_path / f"{name}.parquet", frame)
        metrics = [ManifestMetric("m"), ManifestMetric("n")]
        files = [f"{name}.parquet", "missing.parquet"]
        entries = [
            ManifestScore(evaluator="e", version="1", role="check", file=file, metrics=metrics) for file in files
        ]
        runs.append(ManifestRun(id=name, label=name, method="x", seed=3, images=name, scores=entries))
    found = Results(tmp_path, Manifest(name="s", runs=runs)).scores
    assert found["score"].tolist() == pytest.approx([1, 2, 0.5, np.nan] * 2, nan_ok=True)
    assert found["metric"].tolist() == ["m", "m", "n", "n"] * 2
    assert found["label"].tolist() == ["a"] * 4 + ["c"] * 4
    assert found["prompt_id"].tolist() == ["p1", "p0"] * 4
    assert found["tag"].isna().tolist() == [False, True] * 2 + [True] * 4
    assert set(found["seed"]) == {3}

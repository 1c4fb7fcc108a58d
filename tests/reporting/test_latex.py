"""Claims about the LaTeX of a report: its structure, its marks, and that a two-column paper takes it as it is."""

import re

import numpy as np
import pytest
from msgspec import structs
from support import report_tables
from support.latex import COMPILER, compile_errors, structure_errors
from support.report_tables import costs, manifest, scores

from alignbench.reporting import report
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.text import latex
from alignbench.reporting.text.table import Cell, Column, Table

MEASURES = (  # evaluator, role, name, unit, by task, level, spread
    ("hpsv2", "train", "hpsv2.1", "cosine", False, 0.28, 0.02),
    ("hpsv3", "held-out", "hpsv3", "mu", False, 13.0, 1.0),
    ("pickscore", "held-out", "pickscore", "logit", False, 22.0, 1.0),
    ("unifiedreward", "held-out", "ur_align_acs", "1-5", False, 3.4, 0.2),
    ("imagereward", "held-out", "imagereward", "standardised", False, 1.0, 0.3),
    ("geneval", "check", "geneval", "fraction", True, 0.6, 0.1),
)
MANY = (
    *("ReFL", "DRaFT-LV", "DRTune", "LeapAlign", "DanceGRPO", "MixGRPO, published", "FlowGRPO", "FlowBP-Sparse"),
    *("FlowBP-Bridge", "FlowBP-Lagrange", "VGG-Flow", "Adjoint Matching", "ODE Adjoint Matching", "BPTT", "DRaFT-K"),
    *("MixGRPO Flash", "DiffusionNFT", "LeapAlign, margin=0.95"),
)


def made(monkeypatch, methods=5, seeds=(0, 1)):
    """Return the LaTeX of a sweep with six measures and this many methods, and its analysis."""
    monkeypatch.setattr(report_tables, "METRICS", MEASURES)
    rng = np.random.default_rng(3)
    if methods > 5:
        monkeypatch.setattr(report_tables, "GAINS", {label: tuple(rng.normal(size=2)) for label in MANY})
    plan = manifest(labels=("base", *MANY[:methods]), seeds=seeds)
    analysis = analyse(plan, scores(plan))
    return report.latex(plan, costs(plan), analysis), analysis


def captions(text):
    return re.findall(r"\\caption\{(.*)\}", text)


@pytest.mark.parametrize(("methods", "seeds"), [(5, (0, 1)), (18, (0, 1)), (5, (0,)), (1, (0,))])
def test_every_row_has_its_columns_and_every_number_its_place(monkeypatch, methods, seeds):
    """Environments and braces close, rows have as many cells as columns, S columns contain what siunitx can read."""
    text, _ = made(monkeypatch, methods, seeds)
    assert structure_errors(text) == []
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(labels) == len(set(labels)) == text.count(r"\begin{table*}")
    assert "nan" not in text


def test_structure_is_checked():
    """The checks of this file find a lost cell, a lost brace, and a word in a column of numbers."""
    text = Table([Column("m"), Column("x")], [[Cell("a"), Cell(1.0)]]).latex()
    assert structure_errors(text) == []
    assert structure_errors(text.replace("a & 1.000", "a"))
    assert structure_errors(text.replace("1.000", "{1.000"))
    assert structure_errors(text.replace("1.000", "one"))


@pytest.mark.slow
@pytest.mark.skipif(
    COMPILER is None, reason="neither pdflatex nor tectonic is installed; the structure is tested above"
)
@pytest.mark.parametrize(("methods", "seeds"), [(5, (0, 1)), (18, (0, 1)), (5, (0,))])
def test_a_paper_takes_it(monkeypatch, tmp_path, methods, seeds):
    """In a two-column paper nothing is an error, wider than the text, or higher than the page."""
    text, _ = made(monkeypatch, methods, seeds)
    assert compile_errors(text, tmp_path / "paper") == []


@pytest.mark.slow
def test_bold_and_underlined_follow_the_decisions(monkeypatch):
    """A column's bold number is the row that is shown to lead, its underlined ones are the rest of the top group."""
    text, analysis = made(monkeypatch, 18)
    table = text.split(r"\end{table*}")[0]
    for place, measure in enumerate(analysis.measures, 1):
        column = {
            line.split(" & ")[0]: line.split(" & ")[place] for line in table.splitlines() if line.count(" & ") == 6
        }
        bold = [label for label, cell in column.items() if r"\bfseries" in cell]
        lined = [label for label, cell in column.items() if r"\underline" in cell]
        assert bold == [analysis.bold(measure)]
        assert set(bold + lined) == set(analysis.rankings[measure].top)


def test_one_training_run_is_said_in_the_caption(monkeypatch):
    """With one seed nothing is bold but words, and each caption that reports a comparison names the weights."""
    text, _ = made(monkeypatch, seeds=(0,))
    assert r"\bfseries" not in text
    first = [caption for caption in captions(text) if "(continued" not in caption]
    said = ["One training seed: every interval and verdict speaks of the weights that were scored" in c for c in first]
    assert said == ["Costs" not in caption for caption in first]
    several, _ = made(monkeypatch, seeds=(0, 1))
    assert "these weights" not in several
    assert "One training" not in several


def test_rehearsals_and_subsets_are_said_in_every_caption():
    """A stamp of the page stands in the caption of every table, where it cannot be lost with a comment."""
    plan = structs.replace(manifest(), subset=60)
    text = report.latex(plan, costs(plan), analyse(plan, scores(plan)))
    assert captions(text)
    assert all("SUBSET: the first 60 prompts" in caption for caption in captions(text))


def test_columns_that_are_too_many_stand_below_the_others():
    """Twenty columns become panels, each with the row's name first; none is lost, and one caption serves them all."""
    columns = [Column("method"), *(Column(f"measure {i}", decimals=4) for i in range(20))]
    rows = [[Cell(f"row {j}"), *(Cell(i + j / 10, i - 1.0, i + 1.0) for i in range(20))] for j in range(3)]
    text = Table(columns, rows).latex("All.", "many")
    assert structure_errors(text) == []
    assert [f"measure {i}" in text for i in range(20)] == [True] * 20
    assert text.count(r"\begin{tabular}") > 1
    assert text.count("row 1") == text.count(r"\begin{tabular}")


def test_rows_that_are_too_many_continue_under_the_same_number():
    """A table of two hundred rows is several floats with labels of their own, and the first one's number."""
    rows = [[Cell(f"row {i}"), Cell(float(i))] for i in range(200)]
    text = Table([Column("method"), Column("x")], rows).latex("All.", "long")
    floats = text.count(r"\begin{table*}")
    assert floats == -(-200 // latex.LINES)
    assert text.count(r"\addtocounter{table}{-1}") == floats - 1
    assert [f"row {i} &" in text for i in range(200)] == [True] * 200

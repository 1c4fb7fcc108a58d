"""Claims about figures: stable bytes and colours, readable without colour, and made from half a store as well."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from msgspec import structs
from PIL import Image
from support import fake_learning_curves as made_up

from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.plots import draw, style
from alignbench.store.manifest import write_manifest

LABELS = ("Base", "ReFL", "LeapAlign")
NAMES = ["forest", "tradeoff", "training", "cost-hpsv2.1", "cost-pickscore", "cost-diversity", "cost-geneval"]
NAMES += ["hacking", "signs", "scatter", "profiles"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(results, analysis, figures) of three methods, two seeds, five milestones."""
    results = made_up.made(tmp_path_factory.mktemp("drawn"), seeds=(0, 1), prompts=12, labels=LABELS)
    analysis = analyse(results.manifest, results.scores)
    return results, analysis, draw.figures(results, analysis)


def test_every_kind_of_figure_is_there(drawn):
    """Each with a title, and a caption of a few sentences that can stand for it."""
    _, _, figures = drawn
    assert [figure.name for figure in figures] == NAMES
    for figure in figures:
        assert figure.title
        assert 80 < len(figure.caption) < 900
        assert "nan" not in figure.caption


def test_figures_are_a_column_wide_on_a_light_ground(drawn):
    """3.3 inches at 200 dpi; opaque, so that a dark page does not shine through; the SVG is XML of the same width."""
    _, _, figures = drawn
    for figure in figures:
        with Image.open(io.BytesIO(figure.png)) as image:
            assert image.width == round(style.WIDTH * style.DPI)
            pixels = np.asarray(image.convert("RGBA"))
        assert (pixels[..., 3] == 255).all()
        assert (pixels[0, 0, :3] == 255).all()
        assert ET.fromstring(figure.svg).get("width") == f"{style.WIDTH * 72:g}pt"
        assert "<text" not in figure.svg
        assert "font-family" not in figure.svg


@pytest.mark.slow
def test_the_same_numbers_are_the_same_bytes(drawn, tmp_path):
    """Also in a process of its own, and where a user's matplotlibrc says otherwise; no date, no program's version."""
    results, _, figures = drawn
    write_manifest(tmp_path / "manifest.json", results.manifest)
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 7\nfont.size: 30\n")
    code = f"""
from pathlib import Path
from alignbench.reporting import report
from alignbench.store.manifest import read_manifest
from alignbench.reporting.analysis.results import Results
report.build(Results({str(results.store)!r}, read_manifest(Path("manifest.json"))), Path("out"), ["svg", "png"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    for figure in figures:
        path = tmp_path / "out" / f"{results.manifest.name}-{figure.name}.svg"
        assert path.read_text() == figure.svg
        assert path.with_suffix(".png").read_bytes() == figure.png
        assert not re.search(r"\b20\d\d-\d\d-\d\d|Matplotlib v", figure.svg)


def test_a_method_has_one_look_everywhere():
    """The row's position alone sets it; line with colour, and line with marker, each tell 35 rows apart."""
    labels = [f"method {i}" for i in range(35)]
    assert style.colour("method 3", labels) == style.colour("method 3", labels[:5]) == style.COLOURS[3]
    looks = [(style.colour(x, labels), style.line(x, labels)) for x in labels]
    assert len(set(map(str, looks))) == 35
    grey = [(style.marker(x, labels), str(style.line(x, labels))) for x in labels]
    assert len(set(grey)) == 35


def test_colours_are_those_of_the_rows(drawn):
    """In every figure with methods, each trained method's colour occurs, and no colour of a row that is not there."""
    _, analysis, figures = drawn
    present = {style.colour(label, analysis.labels).lower() for label in analysis.trained}
    absent = {each.lower() for each in style.COLOURS[len(LABELS) :]}
    for figure in figures:
        used = set(re.findall(r"#[0-9a-f]{6}", figure.svg))
        assert present <= used, figure.name
        assert not absent & used, figure.name


@pytest.mark.slow
def test_without_milestones_the_end_is_drawn(tmp_path):
    """The figures of the end and the training reward; one seed has no band and still a profile."""
    results = made_up.made(tmp_path, seeds=(0,), prompts=8, milestones=False, labels=LABELS)
    names = [figure.name for figure in draw.figures(results, analyse(results.manifest, results.scores))]
    assert names == ["forest", "tradeoff", "training", "profiles"]


def test_an_empty_store_draws_nothing(drawn, tmp_path):
    """No figure, and no error."""
    empty = Results(tmp_path, drawn[0].manifest)
    assert draw.figures(empty, analyse(empty.manifest, empty.scores)) == []


@pytest.mark.slow
def test_importing_plots_imports_no_matplotlib():
    """A report as markdown asks for colours at most."""
    code = "import sys, alignbench.reporting.plots.draw; sys.exit(bool({'torch', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_rehearsal_is_stamped_on_every_figure(drawn):
    """Each is drawn otherwise than without the word, and so is a subset's, with another one."""
    results, analysis, figures = drawn
    marked = [structs.replace(results.manifest, **mark) for mark in ({"rehearsal": True}, {"subset": 1})]
    stamped = [draw.figures(Results(results.store, manifest), analysis) for manifest in marked]
    assert all(len({each.svg for each in same}) == 3 for same in zip(figures, *stamped, strict=True))

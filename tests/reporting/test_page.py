"""Claims about the report as a web page: what it says, what it holds, and what happens on a click."""

from __future__ import annotations

import base64
import html
import io
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from PIL import Image
from scipy.stats import kendalltau
from support import photo_store
from support.report_page import NASTY, Reader, built, data_of, spoil
from support.report_tables import draw_images, results

from alignbench.reporting import report, tables
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.html import gallery, page
from alignbench.reporting.text import markdown
from alignbench.reporting.text.table import Cell, Column, Table, escape

# ------------------------------------------------------------------------------------------------------ text and tables


@pytest.mark.parametrize("text", [*NASTY, "a_b_c", "[x](y)", "[^1]", "# no heading", "- no list", "+1", "~x~", "a\\b"])
def test_html_undoes_what_markdown_escapes(text):
    """``markdown.inline`` undoes ``table.escape``: the reader sees the text, and no element arises."""
    shown = markdown.inline(escape(text))
    assert "<" not in shown
    assert html.unescape(shown) == " ".join(text.replace("\u202e", "").split())


def test_our_markdown_becomes_html():
    """Headings, lists, bold, italic, code, links and images; a paragraph all in bold is an alarm."""
    named = lambda words, file: f"{words}:{file}"  # noqa: E731
    text = "## A *b*\n\n- one **two**\n- `a<b` \\*\n\n**Mind\nthis.**\n\nsee [x](https://a.b/c) and [y](javascript:1)"
    assert markdown.blocks(text, named) == (
        "<h2>A <em>b</em></h2>\n<ul>\n<li>one <strong>two</strong></li>\n<li><code>a&lt;b</code> *</li>\n</ul>\n"
        '<p class="alarm"><strong>Mind\nthis.</strong></p>\n'
        '<p>see <a href="https://a.b/c" rel="noopener noreferrer">x</a> and [y](javascript:1)</p>'
    )
    assert markdown.blocks("![a](é-b.png)", named) == "a:é-b.png"


@pytest.mark.parametrize(
    "text",
    [
        *("<script>alert(1)</script>", "[y](javascript:1)", "[y](data:text/html,x)", "[y](//a.b)", "<https://a.b>"),
        *("![y](../../secret.png)", "![y](https:x.png)", "| a |\n|---|\n| b |", "> a", "    a", "a\n---", "<!-- a -->"),
    ],
)
def test_what_reports_are_not_written_in_is_text(text):
    """HTML, links that lead neither to the web nor to an image beside the report, tables, quotes: one paragraph."""
    shown = markdown.blocks(text, lambda words, file: "<img>")
    assert shown.startswith("<p>")
    assert shown.count("<") == 2
    assert html.unescape(shown) == f"<p>{text.strip()}</p>"


def test_a_heading_in_bold_is_no_alarm():
    """Only a paragraph is one; a chapter's heading stays what the page looks for."""
    assert markdown.blocks("## **a**\n\n**b** c **d**", str.join) == (
        "<h2><strong>a</strong></h2>\n<p><strong>b</strong> c <strong>d</strong></p>"
    )


def test_a_table_is_one_for_those_who_do_not_see_it():
    """Caption, headings of columns and rows; numbers to the right, intervals small, marks kept, absence in words."""
    columns = [Column("method"), Column("score", "logit", True, "check", 2), Column("note")]
    rows = [
        [Cell("a<b", mark=" **(x)**"), Cell(1.234, 1.0, 2.0, bold=True), Cell("up", bold=True)],
        [Cell("c"), Cell(1.0, 0.5, 1.5, mark=" (9 prompts)", top=True, change=(0.2, 0.1, 0.3)), Cell("")],
        [Cell("d"), Cell(), Cell("free text")],
    ]
    text = Table(columns, rows).html("Of <all>")
    assert "<caption>Of &lt;all&gt;</caption>" in text
    assert '<th scope="row"><bdi>a&lt;b</bdi> <strong>(x)</strong></th>' in text
    assert '<td class="number" data-value="1.234"><strong>1.23</strong> <small>[1.00, 2.00]</small></td>' in text
    assert '<td class="number top" data-value="1">1.00 <small>[0.50, 1.50]</small>' in text
    assert '<span class="sr"> (top), not separable from the leader</span> (9 prompts)' in text
    assert "Δ </span>+0.20 <small>[+0.10, +0.30]</small></span></td>" in text
    assert '<th scope="col" data-key="score" class="number">' in text
    assert '<span aria-hidden="true">—</span><span class="sr">not measured</span>' in text
    assert text.count('scope="col"') == 3
    assert '<span class="sr">, higher is better</span>' in text


def test_nothing_that_the_markdown_says_is_missing_in_the_page(tmp_path):
    """Every word and number of the markdown is in the page, at least as often; so are the stamps."""
    given = results(tmp_path, name="quickstart")
    remarks = ["Found: method.weights: nothing says how strong"]
    given.manifest = structs.replace(given.manifest, rehearsal=True, subset=60, remarks=remarks)
    given.costs.loc[3, ["state", "reason"]] = ["failed", "loss is nan at step 7 | see log"]
    given.costs["warning"] = "a hinge was closed"
    given.scores.loc[given.scores.index[5], "score"] = np.nan
    analysis = analyse(given.manifest, given.scores)
    said = report.sections(given.manifest, given.costs, analysis, origins=["one machine", "another"])
    text = page.build(given, analysis, tmp_path / "out", sections=said, hacked={}).read_text()
    words = lambda text: pd.Series(re.findall(r"[\w.,%]*\w", text)).value_counts()  # noqa: E731
    wanted = words(html.unescape(re.sub(r"\\(?=\W|_)|^\|[-| :]*$", "", report.markdown(said), flags=re.MULTILINE)))
    found = words(Reader(text).text).reindex(wanted.index, fill_value=0)
    assert wanted[found < wanted].to_dict() == {}
    assert len(wanted) > 300
    assert "- Found: method.weights: nothing says how strong" in report.markdown(said)
    assert '<p class="stamp">REHEARSAL' in text
    assert '<p class="stamp">SUBSET: the first 60 prompts</p>' in text


def test_plots_stand_in_the_page_each_with_its_own_ids():
    """Two SVGs that use the same ids: both are in the page, every id is there once, references follow, captions are
    alternative texts."""
    svg = '<?xml version="1.0"?><!DOCTYPE svg><svg><path id="p"/><use xlink:href="#p"/><g clip-path="url(#p)"/></svg>'
    figures = [SimpleNamespace(name=name, title=name, caption="up & <down>", svg=svg, png=b"") for name in ("a.1", "b")]
    [(_, text)] = page._plots(figures)
    assert re.findall(r'\sid="([^"]*)"', text) == ["a-1-p", "b-p"]
    assert re.findall(r"#([\w-]+)", text) == ["a-1-p", "a-1-p", "b-p", "b-p"]
    assert "<?xml" not in text
    assert text.count('aria-label="up &amp; &lt;down&gt;"') == 2


def test_the_hacking_panel_says_what_rose_and_what_fell(tmp_path):
    """A method whose training reward rose while others fell is named; the signs are the paired changes' verdicts."""
    given = results(tmp_path)
    analysis = analyse(given.manifest, given.scores)
    [(name, text)] = page._panel(analysis, {label: tables.hacked(analysis, label) for label in analysis.trained})
    rows = dict(zip(analysis.compared, re.findall(r"<tr.*?</tr>", text, re.DOTALL)[1:]))
    assert name == page.PANEL
    assert "PickScore, GenEval, GenEval strict fell" in rows["ReFL"]
    assert "fell" not in rows["LeapAlign"]
    for label, row in rows.items():
        verdicts = re.findall(r'<td class="(\w+)"><span aria-hidden="true">.</span> ([^<]*)', row)
        assert [verdict for _, verdict in verdicts] == [c[label].verdict for c in analysis.changes.values()]
        assert all((kind == "good") == (verdict == "up") for kind, verdict in verdicts)


# ------------------------------------------------------------------------------------------------------- images, scores


def test_disagreement_is_one_minus_the_mean_tau():
    """Against SciPy, pair by pair, with ties, gaps, a score where lower is better and one that ranks nothing."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (5, 6, 30)).astype(float)
    values[rng.random(values.shape) < 0.15] = np.nan
    values[:, :, 0] = np.nan
    evaluators, signs = ["a", "a", "b", "c", "d"], [1, 1, -1, 1, 0]
    found = gallery.disagreement(values, evaluators, signs)
    for prompt in range(30):
        taus = []
        for one, other in [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
            x, y = signs[one] * values[one, :, prompt], signs[other] * values[other, :, prompt]
            both = np.isfinite(x + y)
            taus.append(kendalltau(x[both], y[both]).statistic if both.sum() > 1 else np.nan)
        expected = 1 - np.nanmean(taus) if np.isfinite(taus).any() else np.nan
        np.testing.assert_allclose(found[prompt], expected, atol=1e-12)
    assert np.isnan(found[0])


def test_evaluators_that_agree_and_that_do_not():
    """0 where all rank alike, 2 where two rank oppositely, undefined with one evaluator or one method."""
    up, down = np.arange(4.0)[:, None], -np.arange(4.0)[:, None]
    assert gallery.disagreement(np.stack([up, up]), "ab", [1, 1]) == [0]
    assert gallery.disagreement(np.stack([up, down]), "ab", [1, 1]) == [2]
    assert gallery.disagreement(np.stack([up, down]), "ab", [1, -1]) == [0]
    assert np.isnan(gallery.disagreement(np.stack([up, down]), "aa", [1, 1]))
    assert np.isnan(gallery.disagreement(np.stack([up, up])[:, :1], "ab", [1, 1]))


def test_the_scores_in_the_page_are_those_of_the_store(tmp_path):
    """Means over the page's own scores are the report's means; an invalid score is absent."""
    given = photo_store.make(tmp_path, prompts=6, images=2, side=32, labels=photo_store.LABELS[:3])
    given.scores.loc[given.scores.index[0], "ok"] = False
    data = data_of(built(given, tmp_path))
    analysis = analyse(given.manifest, given.scores)
    for measure, named in zip(analysis.measures, data["scores"]):
        assert [len(flat) for flat in named] == [6 * 2 * 2] * 3
        for label, flat in list(zip(data["methods"], named))[1:]:
            mean = np.mean([value for value in flat if value is not None])
            np.testing.assert_allclose(mean, analysis.means[measure][label].mean, atol=1e-4)
    lost = data["scores"][data["measures"].index(next(m for m in data["measures"] if m["name"] == "GenEval"))][0]
    assert sum(value is None for value in lost) == 6 * 2 + 1  # base has no second training run


@pytest.mark.parametrize(
    ("side", "kind", "size"), [(32, "PNG", 32), (64, "PNG", 64), (90, "WEBP", 90), (600, "WEBP", 256)]
)
def test_thumbnails(tmp_path, side, kind, size):
    """Small images stay as they are, every pixel; larger ones are WebP of at most 256, and look the same."""
    image = photo_store.scene(3, 1, side)
    image.save(tmp_path / "a.png")
    made = gallery.thumbnail(tmp_path / "a.png", 256)
    with Image.open(io.BytesIO(made)) as found:
        assert (found.format, found.size) == (kind, (size, size))
        wanted = image.resize((size, size), Image.Resampling.LANCZOS)
        error = np.abs(np.asarray(found.convert("RGB"), float) - np.asarray(wanted, float)).mean()
    assert error == 0 if kind == "PNG" else error < 6


def test_an_image_that_cannot_be_read_says_why(tmp_path):
    """No file, no image, half an image: the cell's text is the reason; the reason names no folder."""
    photo_store.scene(0, 0, 128).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    assert gallery.thumbnail(tmp_path / "none.png", 256) == "the file is missing"
    assert gallery.thumbnail(tmp_path / "half.png", 256) == gallery.UNREADABLE
    assert gallery.thumbnail(tmp_path / "text.png", 256) == gallery.UNREADABLE


@pytest.mark.slow
def test_further_images_come_as_far_as_the_budget_allows(tmp_path, monkeypatch):
    """The first layer is always there, as large as the budget allows; what is left out is said by seed and index."""
    given = photo_store.make(tmp_path, prompts=4, images=2, side=300, labels=photo_store.LABELS[:2])
    text = built(given, tmp_path)
    assert "This page contains every image, as thumbnails of at most 256 pixels." in text
    layer = len(re.findall(r'id="t\d-0"', text))
    assert layer == 4
    monkeypatch.setattr(gallery, "BUDGET", 8 * 6000)
    text = built(given, tmp_path)
    assert re.search(
        r"contains 1 of 4 sets.*at most (192|128) pixels.*Left out to limit its size: image 1 of seed 0; image 0", text
    )
    monkeypatch.setattr(gallery, "BUDGET", 1)
    assert "at most 128 pixels" in built(given, tmp_path)


@pytest.mark.slow
def test_every_row_holds_its_own_methods_images(tmp_path):
    """Line by line, the base64 of a row is the image of that prompt by that method, as the store has it."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    (tmp_path / "images/ReFL0/2.png").unlink()
    text = built(given, tmp_path)
    rows = dict(re.findall(r'<script type="text/plain" id="t0-(\d+)">(.*?)</script>', text, re.DOTALL))
    methods, prompts = data_of(text)["methods"], data_of(text)["prompts"]
    assert rows["2"].splitlines()[1] == "!the%20file%20is%20missing"
    for number in (0, 2, 59):
        for label, line in zip(methods, rows[str(number)].splitlines()):
            if line.startswith("!"):
                continue
            encoded, file = line.split()
            folder = f"{label}{-1 if label == 'base' else 0}"
            assert file == f"{folder}/{int(prompts[number][0][1:])}.png"
            shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(Image.open(tmp_path / "images" / file)))


def test_a_page_does_not_tell_of_folders_far_away(tmp_path):
    """Originals are looked for beside the page only; no path of this machine is in it."""
    given = results(tmp_path / "project/store")
    analysis = analyse(given.manifest, given.scores)
    for out, expected in (
        ("project/outputs/x", "../../store/images"),
        ("project/store/out", "../images"),
        ("a/b/c", None),
    ):
        assert page._originals(given, tmp_path / out) == expected
    text = page.build(given, analysis, tmp_path / "a/b/c", sections=[], hacked={}).read_text()
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_no_text_becomes_markup(tmp_path):
    """Hostile prompts, labels, tasks and reasons: the page has our scripts alone and no handler, and drops nothing."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    spoil(given, tmp_path)
    text = built(given, tmp_path)
    reader = Reader(text)
    scripts = [attributes.get("type") for tag, attributes in reader.elements if tag == "script"]
    assert scripts.count(None) == 1
    assert set(scripts) == {None, "application/json", "text/plain"}
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert "<img src=x" not in text
    assert "failed: </script><script>alert(1)</script>" in reader.text
    assert NASTY[0] in reader.text
    assert len(data_of(text)["prompts"]) == 120  # the other method's prompts are rows of their own


def test_an_empty_store_makes_a_page(tmp_path):
    """Before anything ran there is a page, with every method and reason, and no image."""
    given = results(tmp_path)
    given.scores = given.scores.iloc[:0]
    given.costs = given.costs.assign(state="missing", reason="not made yet", images=np.nan)
    text = built(given, tmp_path)
    assert "The store has no images yet." in text
    assert data_of(text)["prompts"] == []
    assert Reader(text).text.count("not made yet") == 11


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    """No address of any host is in it; its policy lets it connect nowhere, and run no script but its own."""
    given = results(tmp_path)
    text = built(given, tmp_path)
    assert not re.findall(r"(?:https?:)?//\w+\.\w+", re.sub(r'id="t\d.*', "", text))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy
    assert not [tag for tag, _ in Reader(text).elements if tag in ("link", "iframe", "object", "base")][1:]

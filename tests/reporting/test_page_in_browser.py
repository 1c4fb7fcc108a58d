"""Claims about the report's page in a browser: what happens on a click, a key, a link, in print and on a phone."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs
from scipy.stats import binomtest
from support import photo_store
from support.browser import Visit, browser, chromium, until
from support.report_page import NASTY, Reader, built, data_of, spoil
from support.report_tables import TASKS, draw_images, results

from alignbench.reporting import report, tables
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.html import page
from alignbench.reporting.text.table import Cell, Column, Table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chrome():
    try:
        chromium()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A page of three methods, two seeds and twelve prompts, with a figure that is higher than a sheet of paper."""
    root = tmp_path_factory.mktemp("small")
    given = photo_store.make(root / "store", prompts=12, side=32, labels=photo_store.LABELS[:3])
    analysis = analyse(given.manifest, given.scores)
    svg = '<svg viewBox="0 0 100 900" width="100pt" height="900pt"><rect width="100" height="900"/></svg>'
    figure = SimpleNamespace(name="high", title="High", caption="High.", svg=svg, png=b"")
    sections = report.sections(given.manifest, given.costs, analysis)
    hacked = {label: tables.hacked(analysis, label) for label in analysis.trained}
    return page.build(given, analysis, root / "out", sections=sections, hacked=hacked, figures=[figure])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A page of five methods, two seeds, 24 prompts with two images each."""
    root = tmp_path_factory.mktemp("page")
    given = photo_store.make(root / "store", prompts=24, images=2, side=96, labels=photo_store.LABELS[:5])
    return report.build(given, root / "outputs/made_up")[-1]


@pytest.fixture
def visit(chrome, made):
    """Open the page; at the end nothing may have been complained of, and nothing requested from elsewhere."""
    visits = []

    def opened(fragment: str = "", path: Path = made, **context):
        visits.append(Visit(chrome, path, fragment, **context))
        return visits[-1].page

    yield opened
    for one in visits:
        assert one.complaints == []
        one.context.close()


def names(web) -> list[str]:
    """The rows' prompts. As text_content, here and below: a row that is not yet drawn has no inner_text."""
    return web.locator("#rows h3").all_text_contents()


def go(web, view: str) -> None:
    """Change the view by its link; the address changes a moment later."""
    web.locator(f".bar [data-view={view}]").click()
    until(web, f"!byId('{view}').hidden")


def shown_methods(web) -> list[str]:
    """Return the methods of the first row, once it is filled."""
    until(web, "document.querySelector('.row figure') !== null")
    return web.locator(".row").first.locator("figcaption > b").all_text_contents()


def press(web, selector: str) -> None:
    """Click without Playwright's scrolling."""
    web.locator(selector).first.evaluate("(element) => element.click()")


def settled(web, expression: str, expected) -> None:
    """Wait until an expression has a value."""
    until(web, f"JSON.stringify({expression}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}", 5)


def test_back_closes_an_enlarged_image(visit, small):
    """Opening is one entry of the history: Back closes it and Forward opens it; steps add none; a key or the button
    goes back over it; the focus returns to the image. The address names what is shown, and so does the title."""
    web = visit("#report", path=small)
    press(web, "[data-view=pictures]")
    until(web, "document.querySelector('.row figure')")
    before = web.evaluate("history.length")
    press(web, ".row >> nth=0 >> .thumb >> nth=1")
    web.keyboard.press("ArrowDown")
    settled(web, "[location.hash, history.length]", ["#pictures&zoom=p0001&of=ReFL", before + 1])
    assert web.title() == "ReFL – Images – Sweep made_up"
    web.go_back()
    settled(web, "[zoom.open, location.hash, byId('pictures').hidden]", [False, "#pictures", False])
    settled(web, "document.activeElement.closest('[data-prompt]')?.dataset.prompt", "1")
    assert web.title() == "Images – Sweep made_up"
    web.go_forward()
    settled(web, "[zoom.open, byId('zoom-name').textContent]", [True, "ReFL"])
    for close in (lambda: web.keyboard.press("Escape"), lambda: web.click("#zoom-close")):
        close()
        settled(web, "[zoom.open, location.hash, history.length]", [False, "#pictures", before + 1])
        press(web, ".row >> nth=0 >> .thumb >> nth=2")
    web.keyboard.press("Escape")
    settled(web, "location.hash", "#pictures")
    web.go_back()
    settled(web, "[zoom.open, byId('report').hidden, history.length]", [False, False, before + 1])
    assert web.title() == "Sweep made_up"


def test_a_link_to_an_image_is_followed_in_a_tab_that_shows_another(visit, small):
    """The dialog shows what the new address names; without an entry of its own it closes in place; a link to an image
    that the page does not have says so."""
    web = visit("#pictures&zoom=p0000&of=ReFL", path=small)
    settled(web, "[zoom.open, byId('zoom-name').textContent]", [True, "ReFL"])
    web.evaluate("location.hash = '#pictures&zoom=p0003&of=DRaFT-LV'")
    settled(web, "[looked.prompt, byId('zoom-name').textContent]", [3, "DRaFT-LV"])
    web.click("#zoom-close")
    settled(web, "[zoom.open, location.hash]", [False, "#pictures"])
    web.evaluate("location.hash = '#pictures&zoom=p0099&of=ReFL'")
    until(web, "byId('count').textContent.endsWith('The image that the link names is not in this page.')")
    assert not web.evaluate("zoom.open")


def test_flicker_shows_two_methods_and_does_not_flash(visit, small):
    """The second method is never the first, wherever one steps and whatever was chosen; a key held down turns once."""
    web = visit("#pictures&zoom=p0000&of=ReFL", path=small)
    until(web, "zoom.open")
    web.select_option("#zoom-second", label="DRaFT-LV")
    for _ in range(3):
        web.keyboard.press("ArrowRight")
        name = web.locator("#zoom-name").inner_text()
        assert name not in web.locator("#zoom-second option").all_inner_texts()
        web.keyboard.press("f")
        assert web.locator("#zoom-name").inner_text() != name
        web.keyboard.press("f")
    for _ in range(4):
        web.keyboard.down("f")  # which repeats
    assert web.locator("#flicker").get_attribute("aria-pressed") == "true"
    web.keyboard.up("f")


def test_a_view_is_found_again_as_it_was_left(visit, small):
    """Theme and scroll position survive a change of views, Back and a reload; the link that skips the header keeps the
    view."""
    web = visit("", path=small)
    web.evaluate("scrollTo(0, 700)")
    press(web, "[data-view=pictures]")
    settled(web, "[byId('report').hidden, scrollY]", [True, 0])
    web.evaluate("scrollTo(0, 300)")
    press(web, ".skip")
    settled(web, "[location.hash, document.activeElement.id]", ["#pictures", "main"])
    press(web, "[data-view=report]")
    settled(web, "scrollY", 700)
    web.go_back()
    settled(web, "[byId('pictures').hidden, scrollY]", [False, 300])
    press(web, "#theme")
    web.reload()
    settled(web, "[document.documentElement.dataset.theme, byId('pictures').hidden, scrollY]", ["dark", False, 300])
    assert web.locator("#theme").get_attribute("aria-pressed") == "true"
    press(web, "#theme")
    settled(web, "localStorage.getItem('alignbench theme')", None)


def test_votes_of_two_tabs_add_up(visit, small):
    """Each tab's vote stands beside the other's; a pair on the screen stays; undoing takes back one's own vote; once a
    result was seen in this browser, later votes say so, after a reload too."""
    one = visit("#blind", path=small)
    two = one.context.new_page()
    two.goto(small.as_uri() + "#blind")
    for tab in (one, two):
        tab.click("#setup button")
    question = two.locator("#question").inner_text()
    one.click("[data-vote=left]")
    until(two, "byId('votes').textContent.includes('1 votes')")
    assert two.locator("#question").inner_text() == question
    assert two.locator("#undo").is_disabled()
    two.click("[data-vote=right]")
    two.click("[data-vote=tie]")
    stored = "JSON.parse(localStorage.getItem(PLACE)).map((vote) => vote.vote)"
    assert two.evaluate(stored) == ["right", "tie"]
    until(one, "byId('votes').textContent.includes('2 votes')")
    one.click("[data-vote=left]")
    assert one.evaluate(stored) == ["right", "left"]  # the pair was on both screens: the later vote counts
    one.click("[data-vote=left]")
    one.click("#undo")
    two.click("#undo")
    assert two.evaluate(stored) == ["right"]
    one.click("#reveal")
    two.reload()
    two.click("#setup button")
    two.click("[data-vote=left]")
    assert two.evaluate("JSON.parse(localStorage.getItem(PLACE)).map((vote) => vote.after_result)") == [False, True]


RESULTS = ".scroll[aria-label='Table: Results'] >> "
TOOLS = "[aria-label='Table: Results, tools'] >> "


def test_a_table_is_sorted_by_its_headings(visit, small):
    """A click, or Enter, sorts the best first, then last, then as in the report; what is not measured comes last."""
    web = visit("", path=small)
    rows = lambda: web.locator(RESULTS + "tbody th bdi").all_inner_texts()  # noqa: E731
    texts = web.locator(RESULTS + "tbody td:nth-child(3)").all_inner_texts()
    level = dict(zip(rows(), (float(text.split()[0]) for text in texts)))
    head = web.locator(RESULTS + "thead th").nth(2)
    box = "document.querySelector('[aria-label=\"Table: Results\"]')"
    web.evaluate(f"{box}.querySelector('table').rows[2].cells[4].outerHTML = '<td>—</td>'")
    for direction in ("descending", "ascending"):
        head.locator("button").focus()
        web.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == direction
        assert rows() == sorted(level, key=level.get, reverse=direction == "descending")
    web.locator(RESULTS + "thead button").nth(4).click()
    assert head.get_attribute("aria-sort") is None
    assert rows()[-1] == "ReFL"
    web.locator(RESULTS + "thead button").nth(4).click()
    assert rows()[-1] == "ReFL"
    web.locator(RESULTS + "thead button").nth(4).click()
    assert rows() == ["base", "ReFL", "DRaFT-LV"]


def test_columns_are_hidden_and_shown(visit, small):
    """A wide table has a menu of its columns; what is hidden is said below it and kept; heads over several columns
    shrink with it; all come back."""
    web = visit("", path=small)
    web.click(TOOLS + ".menu summary")
    web.uncheck(TOOLS + ".menu >> text=PickScore")
    web.uncheck(TOOLS + ".menu >> text=GenEval strict")
    web.keyboard.press("Escape")
    assert web.evaluate("document.activeElement.textContent") == "Columns (2 hidden)"
    web.reload()
    heads = RESULTS + "thead th:visible"
    count = web.locator(RESULTS + "thead th").count()
    assert web.locator(heads).count() == count - 2
    assert web.locator(RESULTS + "tbody tr >> nth=1 >> td:visible").count() == count - 3
    assert web.locator(".hidden-columns:visible").all_inner_texts() == [
        "Hidden columns: PickScore, logit ↑ [held-out]; GenEval strict, by task, fraction ↑ [check]."
    ]
    web.click(TOOLS + ".menu summary")
    web.click(TOOLS + ".menu >> text=Show all")
    assert web.locator(heads).count() == count
    assert web.locator(".hidden-columns:visible").count() == 0
    found = web.evaluate(
        """() => {
          const table = document.createElement("table");
          table.innerHTML = '<thead><tr><th rowspan="2">m</th><th colspan="2">a</th><th colspan="2">b</th></tr>' +
            '<tr><th>1</th><th>2</th><th>3</th><th>4</th></tr></thead>' +
            '<tbody><tr>' + '<td>x</td>'.repeat(5) + '</tr></tbody>';
          const heads = headsOf(table);
          hideColumns(table, heads, [1, 3, 4]);
          const [, a, b] = table.rows[0].cells;
          return [heads.map((head) => head.textContent).join(""), a.colSpan, a.hidden, b.hidden];
        }"""
    )
    assert found == ["m1234", 1, False, True]


def test_a_score_leads_to_its_images(visit, small):
    """A number of a method on a measure is a link to that method's images beside base's, sorted by its gain on this
    measure; base's own to its images by score; a task's number to that task. One stop of the Tab key for each table."""
    web = visit("", path=small)
    links = web.locator(RESULTS + ".to-images")
    assert links.count() == 3 * 4
    assert web.locator(RESULTS + ".to-images:not([tabindex='-1'])").count() == 1
    links.nth(0).focus()
    web.keyboard.press("ArrowDown")
    web.keyboard.press("ArrowRight")
    web.keyboard.press("Enter")
    until(web, "!byId('pictures').hidden")
    assert shown_methods(web) == ["base", "ReFL"]
    assert web.locator("#count").inner_text() == "12 of 12 prompts, 2 of 3 methods."
    assert (
        web.locator("#how").inner_text() == "Shown: sorted by the gain of ReFL over base on PickScore; seed 0; image 0."
    )
    assert web.locator(".row >> nth=0 >> dt").all_text_contents() == ["PickScore"] * 2
    web.go_back()
    until(web, "byId('pictures').hidden")
    press(web, RESULTS + ".to-images >> nth=0")
    until(web, "byId('how').textContent.startsWith('Shown: sorted by the score of base on HPSv2.1')")
    assert shown_methods(web) == ["base"]
    assert web.evaluate("order.map((prompt) => meanScore(0, 0, prompt))") == sorted(
        web.evaluate("order.map((prompt) => meanScore(0, 0, prompt))"), reverse=True
    )
    press(web, "[data-view=report]")
    press(
        web, "[aria-label='Table: GenEval strict [check], by task'] >> tr:has-text('DRaFT-LV') >> .to-images >> nth=1"
    )
    until(web, "order.length === 2")
    assert (
        web.locator("#how")
        .inner_text()
        .startswith("Shown: two object; sorted by the gain of DRaFT-LV over base on GenEval strict")
    )


def test_a_copied_table_keeps_its_cells(visit, small):
    """As CSV and for a spreadsheet: the report's own rows, a cell for each number; as LaTeX: the report's LaTeX. So a
    selection in a table: one line for each row, intervals in cells of their own, no thousands separators."""
    web = visit("", path=small)
    web.context.grant_permissions(["clipboard-read", "clipboard-write"])
    pasted = "navigator.clipboard.readText()"
    number = web.locator(RESULTS.removesuffix(" >> ")).get_attribute("data-table")
    table = data_of(small.read_text())["tables"][int(number)]
    web.click(TOOLS + "[data-copy=csv]")
    assert list(csv.reader(io.StringIO(web.evaluate(pasted)))) == table["cells"]
    web.click(TOOLS + "[data-copy=latex]")
    assert web.evaluate(pasted) == table["latex"]
    assert table["latex"].count(r"\begin{tabular}") == 1
    web.click(TOOLS + "[data-copy=cells]")
    assert [line.split("\t") for line in web.evaluate(pasted).split("\n")] == table["cells"]
    rich = "navigator.clipboard.read().then(async ([item]) => (await item.getType('text/html')).text())"
    assert web.evaluate(rich).count("<td") == len(table["cells"]) * len(table["cells"][0])
    assert web.locator(TOOLS + ".told").inner_text() == "Copied."
    assert [len(row) for row in table["cells"]] == [1 + 4 * 3] * 4
    web.evaluate("getSelection().selectAllChildren(document.querySelector('[aria-label=\"Table: Results\"] tbody'))")
    web.keyboard.press("Control+c")
    lines = [line.split("\t") for line in web.evaluate(pasted).split("\n")]
    assert [len(line) for line in lines] == [1 + 4 * 3] * 3
    np.testing.assert_allclose(
        [float(text) for text in lines[1][1:4]], [float(t) for t in table["cells"][2][1:4]], atol=6e-4
    )


def test_what_is_printed(visit, small):
    """The images on paper are all of the view's, with what they are; a chapter may go on over a page, a figure may not,
    and none is higher than a sheet; an enlarged image is printed alone."""
    web = visit("#pictures", path=small, viewport={"width": 700, "height": 300})
    until(web, "document.querySelector('.row figure')")
    assert web.locator(".row:last-child img").count() == 0
    paper = web.pdf(format="A4")
    assert len(re.findall(rb"/Subtype ?/Image", paper)) >= 12 * 3
    web.emulate_media(media="print")
    assert web.locator(".thumb >> nth=0").is_visible()
    assert web.locator("#how").is_visible()
    assert web.locator(".bar, #controls, #theme, [type=reset]").locator("visible=true").count() == 0
    web.emulate_media(media="screen")
    press(web, ".row >> nth=0 >> .thumb >> nth=1")
    web.emulate_media(media="print")
    assert web.evaluate(
        "[...document.body.children].filter((child) => child.offsetParent || child.open).map((child) => child.id)"
    ) == ["zoom"]
    web.emulate_media(media="screen")
    web.keyboard.press("Escape")
    press(web, "[data-view=report]")
    web.emulate_media(media="print")
    style = "(selector) => getComputedStyle(document.querySelector(selector)).breakInside"
    assert [web.evaluate(style, selector) for selector in (".text > section", "figure", "tr")] == [
        "auto",
        "avoid",
        "avoid",
    ]
    assert web.evaluate("document.querySelector('.plot svg').getBoundingClientRect().height") < 22 / 2.54 * 96
    assert web.locator("thead th >> nth=0").is_visible()


def test_without_javascript(visit, small):
    """The report is there whole; what is not is said at the top, and no tab leads nowhere."""
    web = visit("", path=small, java_script_enabled=False)
    notice = web.locator("header noscript p")
    assert notice.bounding_box()["y"] < web.locator(".text").bounding_box()["y"]
    assert web.locator(".bar").is_hidden()
    assert web.locator("table").first.is_visible()


def test_heads_stay_in_view_and_no_page_is_wider_than_its_window(visit, small):
    """A table scrolls below its head and beside its first column; from 320 to 1440 pixels no view scrolls sideways."""
    web = visit("", path=small, viewport={"width": 700, "height": 300})
    corner = web.evaluate(
        """() => {
          const box = document.querySelector("[aria-label='Table: Results']"), [head] = box.querySelectorAll("th");
          box.scrollTo(20, 50);
          const [inner, outer] = [head, box].map((element) => element.getBoundingClientRect());
          return [box.scrollLeft, box.scrollTop, inner.left - outer.left, inner.top - outer.top];
        }"""
    )
    assert corner[:2] == [20, 50]
    assert max(corner[2:]) <= 2
    for width in (320, 390, 768, 1024, 1440):
        web.set_viewport_size({"width": width, "height": 800})
        for view in ("report", "pictures", "blind"):
            press(web, f"[data-view={view}]")
            settled(web, f"[byId('{view}').hidden, document.documentElement.scrollWidth]", [False, width])


def test_no_two_regions_share_a_name(small):
    """Tables under one heading are numbered; no region, nor navigation, has the name of another."""
    labels = [
        attributes["aria-label"] for _, attributes in Reader(small.read_text()).elements if "aria-label" in attributes
    ]
    assert len(labels) > 8
    assert len(set(labels)) == len(labels)
    one = Table([Column("a")], [[Cell(1.0)]])
    _, _, _, named = page._chapters(["## A\n\n### B", one, one, "text", one, "### C", one], {}, {})
    assert [name for name, _ in named] == ["B", "B (2)", "B (3)", "C"]


def test_views_and_chapters(visit):
    """Three views, one at a time; the contents lead to chapters; the back key returns."""
    web = visit()
    assert web.locator("main > .view:visible").count() == 1
    web.click("text=Protocol")
    assert web.locator("h2:has-text('Protocol')").is_visible()
    go(web, "pictures")
    assert web.locator("main > .view:visible").count() == 1
    until(web, "document.activeElement.id === 'pictures-name'")
    go(web, "blind")
    assert web.locator("[aria-current=page]").inner_text() == "Blind A/B"
    web.go_back()
    until(web, "!byId('pictures').hidden && byId('blind').hidden")
    go(web, "report")
    assert web.locator("main > .view:visible").count() == 1


def test_filters(visit):
    """Task, words and methods choose what is shown; the count says so; nothing found says so; reset brings all back."""
    web = visit("#pictures")
    assert web.locator("#count").inner_text() == "24 of 24 prompts, 5 of 5 methods."
    web.select_option("[name=task]", label="counting")
    assert len(names(web)) == 4
    assert set(web.locator(".meta > span:first-child").all_text_contents()) == {"counting"}
    web.fill("[name=search]", "DESERT green")
    assert web.locator("#count").inner_text().startswith("No prompt matches.")
    web.fill("[name=search]", "pine  fog")
    assert len(names(web)) == 4
    web.uncheck("#shown >> text=ReFL")
    assert shown_methods(web) == ["base", "DRaFT-LV", "DRTune", "LeapAlign"]
    web.click("#controls >> text=Reset")
    assert web.locator("#count").inner_text() == "24 of 24 prompts, 5 of 5 methods."
    for box in web.locator("#shown input").all():
        box.uncheck()
    assert "No method is selected." in web.locator("#count").inner_text()


def test_an_evaluator_shows_its_scores_alone(visit, made):
    """One evaluator: its score under each image is the page's own, the best of the row is bold."""
    web = visit("#pictures")
    web.select_option("[name=evaluator]", label="PickScore [held-out]")
    shown_methods(web)
    row = web.locator(".row").first
    assert set(row.locator("dt").all_text_contents()) == {"PickScore"}
    data = data_of(made.read_text())
    measure = [m["name"] for m in data["measures"]].index("PickScore")
    expected = [data["scores"][measure][method][0] for method in range(5)]
    found = [float(text.split("\n")[0].split(",")[0]) for text in row.locator("dd").all_text_contents()]
    np.testing.assert_allclose(found, expected, atol=0.006)
    assert row.locator("dd.best").count() == 1
    web.select_option("[name=image]", label="1")
    assert float(row.locator("dd").first.text_content().split(",")[0]) == pytest.approx(
        data["scores"][measure][0][1], abs=0.006
    )
    web.select_option("[name=seed]", label="seed 1")
    assert float(row.locator("dd").nth(1).text_content().split(",")[0]) == pytest.approx(
        data["scores"][measure][1][3], abs=0.006
    )


def test_sorting(visit, made):
    """Disagreement and gain come largest first, and the other way round; a random seed gives one order, another one
    another."""
    web = visit("#pictures")
    data = data_of(made.read_text())
    texts = [text for _, text, _ in data["prompts"]]
    assert names(web) == texts
    web.select_option("[name=sort]", "disagreement")
    order = sorted(range(24), key=lambda prompt: -data["disagreement"][prompt])
    assert names(web) == [texts[prompt] for prompt in order]
    web.check("[name=reverse]")
    assert [data["disagreement"][texts.index(name)] for name in names(web)] == sorted(data["disagreement"])
    web.uncheck("[name=reverse]")
    web.select_option("[name=sort]", "gain")
    web.select_option("[name=method]", label="LeapAlign")
    web.select_option("[name=by]", label="PickScore [held-out]")
    flat = np.array(data["scores"][[m["name"] for m in data["measures"]].index("PickScore")], float).reshape(5, 24, -1)
    gains = np.nanmean(flat[4], 1) - np.nanmean(flat[0], 1)
    assert names(web) == [texts[prompt] for prompt in np.argsort(-gains, kind="stable")]
    assert f"gain of LeapAlign +{gains.max():.4f}" in web.locator(".meta").first.text_content()
    web.select_option("[name=sort]", "random")
    first = names(web)
    web.fill("[name=random]", "2")
    assert sorted(names(web)) == sorted(first)
    assert names(web) != first
    web.fill("[name=random]", "1")
    assert names(web) == first


def test_a_view_can_be_linked(visit):
    """The address holds all choices: opening it again gives the same view, enlarged images included."""
    web = visit("#pictures")
    web.select_option("[name=task]", label="colors")
    web.select_option("[name=sort]", "gain")
    web.select_option("[name=method]", label="DRTune")
    web.check("[name=reverse]")
    web.uncheck("#shown >> text=DRaFT-LV")
    web.click(".row >> nth=1 >> .thumb >> nth=2")
    until(web, "location.hash.includes('zoom=')")
    address, expected = web.evaluate("location.hash"), names(web)
    again = visit(address)
    assert names(again) == expected
    assert shown_methods(again) == ["base", "ReFL", "DRTune", "LeapAlign"]
    assert again.locator("#zoom-name").inner_text() == web.locator("#zoom-name").inner_text() == "DRTune"
    assert again.locator("#zoom-prompt").inner_text() == expected[1]
    web.keyboard.press("Escape")
    until(web, "!location.hash.includes('zoom=')")
    assert visit("#pictures&task=%3Dnone&method=nobody&image=77&sort=up").locator("#rows h3").count() == 24


def test_a_link_followed_at_once_after_a_choice_is_followed(visit):
    """The address takes up a choice a moment later, and not where a link to another view came in between."""
    web = visit("#pictures")
    web.evaluate("""() => {
      const timer = setTimeout, late = [];
      window.setTimeout = (call) => late.push(call);
      form.elements.sort.value = "gain";
      form.elements.sort.dispatchEvent(new Event("input", { bubbles: true }));
      document.querySelector(".bar [data-view=blind]").click();
      late.forEach((call) => call());
      window.setTimeout = timer;
      if (!late.length) throw new Error("nothing was to be remembered");
    }""")
    until(web, "!byId('blind').hidden")
    assert web.evaluate("location.hash") == "#blind"


def test_an_image_is_enlarged_and_walked_through_by_keys(visit):
    """Enter enlarges; arrows walk through methods and prompts and round; F flickers; Escape returns the focus."""
    web = visit("#pictures")
    web.locator(".row >> nth=0 >> .thumb >> nth=1").focus()
    web.keyboard.press("Enter")
    name, prompt = web.locator("#zoom-name"), web.locator("#zoom-prompt")
    assert web.evaluate("document.activeElement.id") == "zoom-name"
    until(web, "document.querySelector('#zoom-image').src.startsWith('file:')")  # the original, 96 pixels
    assert web.evaluate("document.querySelector('#zoom-image').naturalWidth") == 96
    assert name.inner_text() == "ReFL"
    web.keyboard.press("ArrowRight")
    assert name.inner_text() == "DRaFT-LV"
    web.keyboard.press("f")
    assert name.inner_text() == "base"
    assert web.locator("#flicker").get_attribute("aria-pressed") == "true"
    web.keyboard.press("f")
    assert name.inner_text() == "DRaFT-LV"
    for _ in range(3):
        web.keyboard.press("ArrowLeft")
    assert name.inner_text() == "LeapAlign"
    web.keyboard.press("ArrowUp")
    assert prompt.inner_text() == names(web)[-1]
    for _ in range(3):
        web.keyboard.press("ArrowDown")
    assert prompt.inner_text() == names(web)[2]
    for _ in range(30):
        web.keyboard.press("Tab")
        assert web.evaluate("document.activeElement === document.body || zoom.contains(document.activeElement)")
    web.keyboard.press("Escape")
    assert web.locator("#zoom").is_hidden()
    until(web, "document.activeElement.dataset.method === '4'")
    web.keyboard.press("j")
    assert web.evaluate("document.activeElement.dataset.prompt") == "3"
    web.keyboard.press("k")
    assert web.evaluate("document.activeElement.dataset.prompt") == "2"


def test_only_rows_near_the_window_hold_images(visit):
    """At most a few rows have images; scrolled to the end, the last has and the first has not, at the same height."""
    web = visit("#pictures")
    filled = "[...document.querySelectorAll('.row')].map((row) => row.querySelectorAll('img').length)"
    until(web, f"{filled}[0] === 5")
    assert web.evaluate(filled)[-1] == 0
    web.evaluate("document.querySelector('.row:last-child').scrollIntoView()")
    until(web, f"{filled}[23] === 5 && {filled}[0] === 0")
    assert web.evaluate("document.querySelector('.row').offsetHeight") > 200


def test_the_theme_follows_the_system_and_the_button(visit):
    """Dark where the system is dark; the button turns it, and says so; ink and paper differ by 4.5 to 1 at least."""
    paper = "getComputedStyle(document.body).backgroundColor"
    bright, dark = visit(), visit(color_scheme="dark")
    assert bright.evaluate(paper) != dark.evaluate(paper)
    assert dark.locator("#theme").get_attribute("aria-pressed") == "true"
    bright.click("#theme")
    assert bright.evaluate(paper) == dark.evaluate(paper)
    assert bright.locator("#theme").get_attribute("aria-pressed") == "true"
    for web in (bright, visit()):
        for selector in ("body", ".contents a", "small", ".panel .good", ".panel .bad", ".panel tr.bad > td", "a"):
            assert contrast(web, selector) >= 4.5, selector


def contrast(web, selector) -> float:
    """WCAG 2.2's ratio of an element's text to the first background behind it that is not transparent."""
    colors = web.evaluate(
        """(selector) => {
          let element = document.querySelector(selector);
          const ink = getComputedStyle(element).color;
          let paper;
          do paper = getComputedStyle(element).backgroundColor;
          while (/, 0\\)/.test(paper) && (element = element.parentElement));
          return [ink, paper];
        }""",
        selector,
    )
    luminance = []
    for color in colors:
        channels = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminance.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


def test_a_phone(visit):
    """390 pixels wide: nothing is wider than the window, filters are folded, targets 40 pixels high, two columns."""
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    web = visit("#pictures", **phone)
    width = "document.documentElement.scrollWidth"
    assert web.evaluate(width) == 390
    assert web.locator("#filter [name=task]").is_hidden()
    web.tap("#controls summary")
    assert web.locator("#filter [name=task]").is_visible()
    small = """(selector) => [...document.querySelectorAll(selector)]
      .filter((element) => element.offsetParent && element.offsetHeight < 40).map((element) => element.outerHTML)"""
    assert (
        web.evaluate(
            small, "button, select, summary, label.button, input:not([type=checkbox], [type=file]), #shown label"
        )
        == []
    )
    edges = [web.locator(".thumb").nth(i).bounding_box()["x"] for i in range(4)]
    assert len(set(edges)) == 2
    web.tap(".thumb >> nth=1")
    assert web.locator("#zoom-name").inner_text() == "ReFL"
    assert web.evaluate("zoom.scrollWidth") <= 390
    web.tap("#zoom-close")
    go(web, "report")
    assert web.evaluate(width) == 390
    go(web, "blind")
    web.tap("#setup button")
    assert web.evaluate(width) == 390
    assert web.evaluate(small, "#blind button, #blind .button") == []


@pytest.mark.parametrize(("wins", "count"), [(0, 1), (1, 1), (3, 10), (50, 100), (399, 400)])
def test_the_win_rates_interval_is_wilsons(visit, wins, count):
    """The script's interval is SciPy's; without a vote there is none; half wins lie between whole ones."""
    web = visit()
    expected = binomtest(wins, count).proportion_ci(method="wilson")
    found = web.evaluate("([wins, count]) => wilson(wins, count)", [wins, count])
    np.testing.assert_allclose(found, [wins / count, *expected], atol=1e-12)
    assert web.evaluate("wilson(0, 0)") is None
    assert web.evaluate("wilson(3.5, 10)")[0] == 0.35


def test_a_blind_comparison(visit, made, tmp_path):
    """Votes by keys and buttons, undone, skipped; names only in the result; the result is the count of the votes;
    exported as CSV and JSON, kept over a reload, deleted, imported again."""
    web = visit("#blind")
    web.select_option("#setup [name=first]", label="LeapAlign")
    web.select_option("#setup [name=second]", label="DRTune")
    web.click("#setup button")
    data = data_of(made.read_text())
    prompts = {text: prompt for prompt, text, _ in data["prompts"]}
    cast = []
    for number, key in enumerate(["ArrowLeft", "ArrowRight", "t", "s", "ArrowDown", "ArrowLeft", "ArrowLeft"]):
        assert web.locator("#progress").inner_text() == f"Pair {number + 1} of 24"
        assert not {"LeapAlign", "DRTune"} & set(re.findall(r"[\w-]+", web.locator("#ballot").inner_text()))
        cast.append((prompts[web.locator("#question").inner_text()], key))
        web.keyboard.press(key)
    web.keyboard.press("u")
    cast.pop()
    web.click("[data-vote=right]")
    web.click("#undo")
    assert web.locator("#votes").inner_text() == "5 votes, 1 skipped."
    assert web.locator("#result").is_hidden()
    with web.expect_download() as saved:
        web.click("#save-csv")
    saved.value.save_as(tmp_path / "votes.csv")
    rows = list(csv.DictReader((tmp_path / "votes.csv").read_text().splitlines()))
    words = {"ArrowLeft": "left", "ArrowRight": "right", "t": "tie", "ArrowDown": "tie", "s": "skip"}
    assert [(row["prompt"], row["vote"]) for row in rows] == [(prompt, words[key]) for prompt, key in cast]
    assert all({row["left"], row["right"]} == {"LeapAlign", "DRTune"} for row in rows)
    with web.expect_download() as saved:
        web.click("#save-json")
    saved.value.save_as(tmp_path / "votes.json")
    assert len(json.loads((tmp_path / "votes.json").read_text())["votes"]) == 6
    web.click("#reveal")
    cells = web.locator("#result tbody tr").inner_text().split()
    wins, losses = (sum(row.get(row["vote"]) == label for row in rows) for label in ("LeapAlign", "DRTune"))
    assert cells[:6] == ["LeapAlign", "DRTune", *map(str, (wins, 2, losses, 1))]
    rate = (wins + 1) / 5
    assert cells[6] == f"{rate:.3f}"
    assert cells[7:] == [
        "[{:.3f},".format(web.evaluate(f"wilson({wins + 1}, 5)")[1]),
        "{:.3f}]".format(web.evaluate(f"wilson({wins + 1}, 5)")[2]),
    ]
    web.reload()
    assert web.locator("#votes").inner_text() == "5 votes, 1 skipped."
    web.click("#clear")
    assert "No votes yet." in web.locator("#votes").inner_text()
    web.set_input_files("#load", tmp_path / "votes.json")
    until(web, "byId('votes').textContent.startsWith('6 votes read.')")
    web.click("#reveal")
    assert web.locator("#result tbody tr").inner_text().split() == cells
    (tmp_path / "bad.json").write_text('{"votes": 3}')
    web.set_input_files("#load", tmp_path / "bad.json")
    until(web, "byId('votes').textContent.startsWith('This file contains no alignbench votes')")
    (tmp_path / "other.json").write_text((tmp_path / "votes.json").read_text().replace(data["digest"], "0"))
    web.set_input_files("#load", tmp_path / "other.json")
    until(web, "byId('votes').textContent.startsWith('These votes belong to another page')")
    web.click("#clear")


def test_sides_and_order_are_drawn_from_the_seed(visit):
    """Every pair once; each side about as often; the same seed gives the same ballots, another one others."""
    web = visit("#blind")
    drawn = [web.evaluate(f"makeBallots([[1, 2], [0, 3]], '', {seed})") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({ballot["key"] for ballot in drawn[0]}) == len(drawn[0]) == 48
    assert 10 < sum(ballot["left"] < ballot["right"] for ballot in drawn[0]) < 38
    web.select_option("#setup [name=first]", label="every pair of methods")
    web.select_option("#setup [name=task]", label="counting")
    web.click("#setup button")
    assert web.locator("#progress").inner_text() == "Pair 1 of 40"


@pytest.mark.parametrize("what", ["nasty", "empty", "without base"])
def test_bad_input_in_the_browser(visit, tmp_path, what):
    """Hostile texts, missing images, an empty store, no base: no script of theirs runs, no error, all views work."""
    given = results(tmp_path)
    draw_images(tmp_path, given.manifest)
    if what == "nasty":
        spoil(given, tmp_path)
    if what == "empty":
        given = results(tmp_path / "none")
        given.scores, given.costs = given.scores.iloc[:0], given.costs.assign(state="missing", images=np.nan)
    if what == "without base":
        runs = [run for run in given.manifest.runs if run.label != "base"]
        cases = [label for label in given.manifest.cases if label != "base"]
        given.manifest = structs.replace(given.manifest, runs=runs, cases=cases)
        given.scores = given.scores[given.scores["label"] != "base"]
        given.costs = given.costs[given.costs["label"] != "base"]
    built(given, tmp_path)
    web = visit("#pictures", path=tmp_path / "out/made_up.html")
    count = web.locator("#rows h3").count()
    assert count == {"nasty": 120, "empty": 0, "without base": 60}[what]
    if what == "nasty":
        web.wait_for_selector(".thumb.absent")
        assert "No image: the run failed: </script>" in web.locator(".absent").first.text_content()
        assert NASTY[1] in names(web)
        web.fill("[name=search]", "</script>")
        assert 0 < web.locator("#rows h3").count() < 120
        until(web, "location.hash.includes('search=')")
        web.reload()
        assert web.input_value("[name=search]") == "</script>"
        web.click("#controls >> text=Reset")
    if count:
        web.click("button.thumb >> nth=0")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "f", "Escape"):
            web.keyboard.press(key)
    for sort in ("disagreement", "random"):
        web.select_option("[name=sort]", sort)
    assert web.locator("option[value=gain]").count() == (what != "without base")
    go(web, "blind")
    web.click("#setup button")
    web.keyboard.press("ArrowLeft")
    web.click("#reveal")
    go(web, "report")
    assert web.locator("h1").inner_text()


def test_tasks_of_the_made_up_store_are_all_offered(visit):
    """Every task can be chosen, and no other."""
    web = visit("#pictures")
    offered = web.locator("#filter [name=task] option").all_inner_texts()
    assert offered == ["all tasks", *(task.replace("_", " ") for task in TASKS)]

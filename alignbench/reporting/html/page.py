"""The report as one HTML file that opens from disk and needs no network: tables, plots, images, a blind comparison.

``page.html`` is the template, ``page.css`` the style, ``page.js`` the script; all three are inlined. A policy in the
head forbids all connections and all other scripts. Thumbnails are stored at the end as base64, one element per prompt's
row, and are decoded only when their row comes near the window.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignbench.reporting.analysis.comparison import Analysis, Measure, better, worse
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.html import gallery
from alignbench.reporting.html.gallery import Gallery, Place
from alignbench.reporting.tables import flag, got_worse, harmed
from alignbench.reporting.text import markdown, names
from alignbench.reporting.text.table import Table
from alignbench.store import files
from alignbench.store.manifest import UNTRAINED, Manifest

HERE = Path(__file__).parent
WEBP_SIDE = 16383  # pixels; the format allows no more
PANEL = "Reward hacking at a glance"
PANEL_NOTE = """\
Paired change against {base}, after Holm's correction (p < 0.05). Reward hacking: the training reward rose while another
score fell. Worse than base: a score fell, and the reward is not shown to have risen. An empty circle means no evidence
of either direction; it does not prove that nothing changed."""


class Figure(Protocol):
    """A plot. ``caption`` also serves as its alternative text."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def svg(self) -> str: ...


def build(
    results: Results,
    analysis: Analysis,
    out: Path,
    *,
    sections: Sequence[str | Table],
    hacked: Mapping[str, Sequence[Measure]],
    figures: Sequence[Figure] = (),
    images: Mapping[str, Image.Image] | None = None,
) -> Path:
    """Write ``<name>.html`` into ``out`` and return its path.

    ``sections``: the report's text and tables; ``images``: file name -> image, for the images that the text shows;
    ``figures``: those that the text does not show as ``<name>-<figure>.png`` have a chapter of their own;
    ``hacked``: method -> the measures that fell while its training reward rose.
    """
    files_of = {f"{results.manifest.name}-{figure.name}.png": figure for figure in figures}
    shows = [section for section in sections if isinstance(section, str)]
    placed = {file: figure for file, figure in files_of.items() if any(f"]({file})" in text for text in shows)}
    title, lead, chapters, regions = _chapters(sections, images or {}, placed)
    after = next((i + 1 for i, (name, _) in enumerate(chapters) if name.startswith("Results")), len(chapters))
    chapters[after:after] = _panel(analysis, hacked) + _plots([f for f in figures if f not in placed.values()])
    shown = gallery.collect(results, analysis)
    layers, side = gallery.thumbnails(shown)
    data = _data(results, analysis, shown, list(layers), out)
    data["tables"] = [_copied(table) | _led(table, name, analysis, shown) for name, table in regions]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    parts = {
        "policy": _policy(script),
        "title": title,
        "plain_title": markdown.text(_plain(title)),
        "stamps": "".join(f'<p class="stamp">{markdown.text(text)}</p>' for text in stamps(results.manifest)),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "lead": lead,
        "contents": "".join(f'<li><a href="#s{i}">{name}</a></li>' for i, (name, _) in enumerate(chapters)),
        "chapters": "".join(_chapter(i, *chapter) for i, chapter in enumerate(chapters)),
        "held": markdown.text(_held(shown, list(layers), side)),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
        "images": "".join(_rows(shown, layers)),
    }
    path = out / f"{results.manifest.name}.html"
    frame = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    files.write(path, frame.substitute(parts))
    return path


def _policy(script: str) -> str:
    """Return the policy: fetch nothing; allow images of the page and originals beside it, and the styles of SVG."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = {"default-src": "'none'", "script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'"}
    rules |= {"img-src": "data: file: 'self'", "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {rule}" for name, rule in rules.items())


# -- text and tables --------------------------------------------------------------------------------------------------


def _chapters(
    sections: Sequence[str | Table], images: Mapping[str, Image.Image], placed: Mapping[str, Figure]
) -> tuple[str, str, list[tuple[str, str]], list[tuple[str, Table]]]:
    """Return (title, text before the first heading, [(heading, body of its chapter)], [(name, table)]), all HTML.

    A table is named by the last heading before it, and numbered if that is not the only one.
    """
    title, lead, near = "", "", ""

    def image(words: str, file: str) -> str:
        return _framed(placed[file]) if file in placed else _image(words, images[file])

    chapters: list[tuple[str, str]] = []
    named: list[tuple[str, Table]] = []
    for section in sections:
        if isinstance(section, Table):
            same = sum(name == near or name.startswith(f"{near} (") for name, _ in named)
            name = f"{near} ({same + 1})" if same else near or _plain(title)
            body = _scrolling(section.html(name), name, len(named))
            named.append((name, section))
        else:
            body = markdown.blocks(section, image)
            near = _plain(next(reversed(re.findall(r"<h[1-6]>(.*?)</h[1-6]>", body, re.DOTALL)), near))
        for element in re.split(r"(?=<h2>)", body):
            heading = re.match(r"<h([12])>(.*?)</h\1>\n?", element, re.DOTALL)
            rest = element[heading.end() :] if heading else element
            if heading and heading[1] == "1":
                title = heading[2]
            elif heading:
                chapters.append((heading[2], ""))
            if chapters:
                chapters[-1] = (chapters[-1][0], f"{chapters[-1][1]}{rest}\n")
            else:
                lead += f"{rest}\n"
    return title, lead, chapters, named


def _plain(element: str) -> str:
    """Return the text of our HTML."""
    return html.unescape(re.sub("<[^>]*>", "", element))


def _scrolling(table: str, name: str, number: int | None = None) -> str:
    """Return the table in a box that scrolls and takes the focus, so that the arrow keys work.

    ``number``: its place among the script's ``tables``. The number of columns sets the size of print.
    """
    own = "" if number is None else f' data-table="{number}"'
    own += ' style="--columns: {}"'.format(table.count('scope="col"'))
    label = f'aria-label="Table: {markdown.text(name)}"'
    return f'<div class="scroll" role="region" tabindex="0" {label}{own}>\n{table}</div>'


def _copied(table: Table) -> dict[str, Any]:
    """Return what is copied of a table: the rows of its CSV, and its LaTeX."""
    return {"cells": list(csv.reader(io.StringIO(table.csv()))), "latex": table.latex()}


def _led(table: Table, name: str, analysis: Analysis, shown: Gallery) -> dict[str, Any]:
    """Return which images the cells of a table are about: measure and task by column, measure and method by row.

    Measures and methods are positions, None where there is none. ``whole``: the measure that the table's name begins
    with.
    """
    measures = {text: i for i, measure in enumerate(analysis.measures) for text in _titles(measure)}
    methods = {label: i for i, label in enumerate(shown.methods)}
    tags = {tag for _, tag in shown.about.values() if tag}
    texts = [[cell.value for cell in row if isinstance(cell.value, str)] for row in table.rows]
    named = [text for text in measures if re.match(rf"{re.escape(text)}(?!\w)", name)]
    whole = measures[max(named, key=len)] if named else None
    columns = [measures.get(column.title) for column in table.columns]
    by_task = [column.key if column.key in tags else None for column in table.columns]
    own = whole if not any(by_task) else None  # a table of one measure, whose rows are all about it
    return {
        "whole": whole,
        "columns": columns,
        "tasks": by_task,
        "methods": [next((methods[text] for text in row if text in methods), None) for row in texts],
        "measures": [next((measures[text] for text in row if text in measures), own) for row in texts],
    }


def _titles(measure: Measure) -> list[str]:
    """Return what columns, rows and headings call a measure."""
    titles = [measure.name, names.measure_name(measure), names.title(measure)]
    return titles + [f"{title} [{measure.role}]" for title in titles]


def _image(words: str, original: Image.Image) -> str:
    """Return an image of the report as WebP inlined in the page."""
    image = original.convert("RGB")
    image.thumbnail((WEBP_SIDE, WEBP_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    size = f'width="{image.width}" height="{image.height}"'
    name = markdown.text(words)
    element = f'<img class="grid" src="{source}" alt="{name}" {size}>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{element}</div>'


def _chapter(number: int, name: str, body: str) -> str:
    return f'<section aria-labelledby="s{number}">\n<h2 id="s{number}" tabindex="-1">{name}</h2>\n{body}</section>\n'


def stamps(manifest: Manifest) -> list[str]:
    """Return the warnings shown at the top of every page: rehearsal, subset of prompts."""
    rehearsal = ["REHEARSAL: no number here means anything"] if manifest.rehearsal else []
    return rehearsal + ([f"SUBSET: the first {manifest.subset} prompts"] if manifest.subset else [])


def _panel(analysis: Analysis, hacked: Mapping[str, Sequence[Measure]]) -> list[tuple[str, str]]:
    """Return the chapter on which scores of which methods rose and fell; empty without a base model."""
    if not analysis.compared:
        return []
    heads = "".join(
        f'<th scope="col">{markdown.text(names.measure_name(m))} <small>[{markdown.text(m.role)}]</small></th>'
        for m in analysis.measures
    )
    rows = []
    for label in analysis.compared:
        cells = "".join(_verdict(analysis, measure, label) for measure in analysis.measures)
        lost = hacked.get(label) or harmed(analysis, label)
        worse = f"{', '.join(map(names.measure_name, lost))} {got_worse(lost)}"
        clear = "training reward unknown" if label not in analysis.trained else "not shown"
        fell = flag(analysis, label)
        said = f"<strong>{fell}</strong>: {markdown.text(worse)}" if fell else clear
        kind = ' class="bad"' if fell else ""
        name = f'<th scope="row"><bdi>{markdown.text(label)}</bdi></th>'
        rows.append(f"<tr{kind}>{name}{cells}<td>{said}</td></tr>\n")
    head = f'<tr><th scope="col">method</th>{heads}<th scope="col">reward hacking</th></tr>'
    caption = f"<caption>{PANEL}</caption>"
    table = f'<table class="panel">{caption}<thead>{head}</thead>\n<tbody>{"".join(rows)}</tbody></table>'
    note = PANEL_NOTE.format(base=markdown.text(analysis.base or ""))
    return [(PANEL, f"{_scrolling(table, PANEL)}\n<p>{note}</p>\n")]


def _verdict(analysis: Analysis, measure: Measure, label: str) -> str:
    change = analysis.changes[measure][label]
    kind = "good" if better(change, measure) else "bad" if worse(change, measure) else "none"
    sign = {"up": "▲", "down": "▼", "cannot tell": "○"}.get(change.verdict, "–")
    return f'<td class="{kind}"><span aria-hidden="true">{sign}</span> {change.said}</td>'


def _framed(figure: Figure, below: str = "") -> str:
    """Return the figure, with ``below`` it a caption."""
    drawn = f'<div role="img" aria-label="{markdown.text(figure.caption)}">{own_ids(figure.svg, figure.name)}</div>'
    return f'<figure class="plot">{drawn}\n{below}</figure>\n'


def _plots(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    parts = []
    for figure in figures:
        caption = f"<figcaption>{markdown.text(figure.caption)}</figcaption>"
        parts.append(f"<h3>{markdown.text(figure.title)}</h3>\n{_framed(figure, caption)}")
    return [("Plots", "".join(parts))] if parts else []


def own_ids(svg: str, name: str) -> str:
    """Return the SVG for use inside HTML: without declarations, and with ids and references to them made unique."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W", "-", name) + "-"
    svg = re.sub(r'(\sid=")([^"]+")', rf"\g<1>{prefix}\g<2>", svg)
    return re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}", svg)


# -- images and their scores ------------------------------------------------------------------------------------------


def _data(
    results: Results, analysis: Analysis, shown: Gallery, layers: Sequence[tuple[int, int]], out: Path
) -> dict[str, Any]:
    """Return the data of the script. ``scores[measure][method]`` is flat, in order of prompt, seed, image.

    ``key``: what addresses call a measure.
    """
    values = gallery.cube(shown, analysis, results.scores)
    signs = [{True: 1, False: -1, None: 0}[measure.higher_is_better] for measure in analysis.measures]
    apart = gallery.disagreement(_means(values), [measure.evaluator for measure in analysis.measures], signs)
    decimals = [names.decimals(measure) for measure in analysis.measures]
    metrics = [measure.name for measure in analysis.measures]
    keys = [m.name if metrics.count(m.name) == 1 else f"{m.evaluator}/{m.name}" for m in analysis.measures]
    worlds = {measure.world for measure in analysis.measures}
    measures = [
        {
            "key": key,
            "name": names.measure_name(measure),
            "short": names.measure_name(measure._replace(world="") if len(worlds) == 1 else measure),  # on each card
            "role": measure.role,
            "unit": measure.unit,
            "sign": sign,
            "decimals": places,
        }
        for key, measure, sign, places in zip(keys, analysis.measures, signs, decimals)
    ]
    scores = [[_rounded(cube.ravel(), places + 2) for cube in cubes] for cubes, places in zip(values, decimals)]
    data = {
        "name": results.manifest.name,
        "methods": shown.methods,
        "seeds": [[None if seed == UNTRAINED else seed for seed in seeds] for seeds in shown.seeds],
        "base": analysis.labels.index(analysis.base) if analysis.base is not None else None,
        "measures": measures,
        "prompts": [[prompt, *shown.about[prompt]] for prompt in shown.prompts],
        "indices": shown.images,
        "layers": layers,
        "scores": scores,
        "disagreement": _rounded(apart, 4),
        "originals": _originals(results, out),
    }
    digest = hashlib.sha256(json.dumps([data["name"], data["methods"], shown.prompts, scores]).encode()).hexdigest()
    return {**data, "digest": digest[:12]}


def _means(values: NDArray) -> NDArray:
    """Return (measure, method, prompt) means over the scores of a prompt's seeds and images; nan without any."""
    counts = np.isfinite(values).sum((3, 4))
    return np.where(counts > 0, np.nansum(values, (3, 4)) / np.maximum(counts, 1), np.nan)


def _rounded(values: NDArray, decimals: int) -> list[float | None]:
    return [None if np.isnan(value) else round(value, decimals) for value in values.tolist()]


def _originals(results: Results, out: Path) -> str | None:
    """Return the path from the page to the store's images, or None if far: a shared page must not reveal folders."""
    path = Path(os.path.relpath(str(results.store / "images"), str(out))).as_posix()
    return None if path.startswith(("/", "../../../")) else quote(path)


def _held(shown: Gallery, layers: Sequence[tuple[int, int]], side: int) -> str:
    """Return the sentence on which images the page contains, and which were left out."""
    total = shown.layers()
    if not shown.files:
        return "The store has no images yet."
    counted = f"{len(layers)} of {len(total)} sets of images (one training seed and one image index each)"
    which = "every image" if len(layers) == len(total) else counted
    text = f"This page contains {which}, as thumbnails of at most {side} pixels."
    left = [f"image {shown.images[index]} of {_run_name(shown, seed)}" for seed, index in total[len(layers) :]]
    return f"{text} Left out to limit its size: {'; '.join(left)}." if left else text


def _run_name(shown: Gallery, number: int) -> str:
    """Return ``seed 3``, or ``training run 1`` if methods have different seeds."""
    seeds = {seeds[number] for seeds in shown.seeds if len(seeds) > number and seeds != [UNTRAINED]}
    return f"seed {seeds.pop()}" if len(seeds) == 1 else f"training run {number + 1}"


def _rows(shown: Gallery, layers: Mapping[tuple[int, int], Mapping[Place, bytes | str]]) -> Iterator[str]:
    """Yield one element per row. A line for each method: base64 and the original's path, or "!" and a reason."""
    for number, ((seed, index), cells) in enumerate(layers.items()):
        for prompt in range(len(shown.prompts)):
            places = [Place(method, seed, index, prompt) for method in range(len(shown.methods))]
            lines = "\n".join(_line(shown, place, cells.get(place, "this method has no such seed")) for place in places)
            yield f'<script type="text/plain" id="t{number}-{prompt}">{lines}</script>\n'


def _line(shown: Gallery, place: Place, cell: bytes | str) -> str:
    if isinstance(cell, str):
        return f"!{quote(cell, errors='replace')}"
    file = shown.files[place]
    return f"{base64.b64encode(cell).decode()} {quote(f'{file.parent.name}/{file.name}', errors='replace')}"

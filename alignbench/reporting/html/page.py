"""The report as one HTML file that opens from disk and needs no network: tables, plots, pictures, a blind comparison.

``page.html`` is the frame, ``page.css`` its looks, ``page.js`` what moves; all three are put into the file. A policy in
its head forbids every connection, and every script but that one. Thumbnails stand at the end as base64, one element
for a prompt's row, and become pictures only when their row comes near the window.
"""

from __future__ import annotations

import base64
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
from alignbench.reporting.html import gallery, markdown
from alignbench.reporting.html.gallery import Gallery, Place
from alignbench.reporting.table import DECIMALS, Table
from alignbench.store import files
from alignbench.store.manifest import UNTRAINED, Manifest

HERE = Path(__file__).parent
WEBP_SIDE = 16383  # pixels; the format allows no more
PANEL = "Reward hacking at a glance"
PANEL_NOTE = """\
Paired change against {base}, after Holm's correction (p < 0.05). Reward hacking: the training reward rose while another
score fell. An empty circle is no evidence of either direction, and no proof that nothing changed."""


class Figure(Protocol):
    """A plot. ``caption`` is its text for those who do not see it, too."""

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
    """Write ``<name>.html`` into ``out``.

    ``sections``: what the report says, in markdown and tables, with ``images`` by the names of their files. ``hacked``:
    method -> the measures that fell while its training reward rose.
    """
    title, lead, chapters = _chapters(sections, images or {})
    after = next((i + 1 for i, (name, _) in enumerate(chapters) if name.startswith("Results")), len(chapters))
    chapters[after:after] = _panel(analysis, hacked) + _plots(figures)
    shown = gallery.collect(results, analysis)
    layers, side = gallery.thumbnails(shown)
    data = _data(results, analysis, shown, list(layers), out)
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
        "pictures": "".join(_rows(shown, layers)),
    }
    path = out / f"{results.manifest.name}.html"
    frame = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    files.write(path, frame.substitute(parts))
    return path


def _policy(script: str) -> str:
    """Nothing is fetched. Pictures: those in the page, and the originals beside it; styles: SVG has them everywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = {"default-src": "'none'", "script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'"}
    rules |= {"img-src": "data: file: 'self'", "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {rule}" for name, rule in rules.items())


# -- what the report says ---------------------------------------------------------------------------------------------


def _chapters(
    sections: Sequence[str | Table], images: Mapping[str, Image.Image]
) -> tuple[str, str, list[tuple[str, str]]]:
    """(title, what stands before the first heading, [(heading, the rest of its chapter)]), all HTML."""
    title, lead = "", ""
    found: list[tuple[str, str]] = []
    for section in sections:
        if isinstance(section, Table):
            name = found[-1][0] if found else title
            body = _scrolling(section.html(_plain(name)), _plain(name))
        else:
            body = markdown.blocks(section, lambda words, file: _picture(words, images[file]))
        for element in re.split(r"(?=<h2>)", body):
            heading = re.match(r"<h([12])>(.*?)</h\1>\n?", element, re.DOTALL)
            rest = element[heading.end() :] if heading else element
            if heading and heading[1] == "1":
                title = heading[2]
            elif heading:
                found.append((heading[2], ""))
            if found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{rest}\n")
            else:
                lead += f"{rest}\n"
    return title, lead, found


def _plain(element: str) -> str:
    """The text of some HTML of ours."""
    return html.unescape(re.sub("<[^>]*>", "", element))


def _scrolling(table: str, name: str) -> str:
    """A wide table scrolls within its box; the box takes the focus, so that the arrow keys scroll it."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {markdown.text(name)}">\n{table}</div>'


def _picture(words: str, original: Image.Image) -> str:
    """Return an image of the report as WebP within the page."""
    picture = original.convert("RGB")
    picture.thumbnail((WEBP_SIDE, WEBP_SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    size = f'width="{picture.width}" height="{picture.height}"'
    name = markdown.text(words)
    image = f'<img class="grid" src="{source}" alt="{name}" {size}>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{image}</div>'


def _chapter(number: int, name: str, body: str) -> str:
    return f'<section aria-labelledby="s{number}">\n<h2 id="s{number}" tabindex="-1">{name}</h2>\n{body}</section>\n'


def stamps(manifest: Manifest) -> list[str]:
    """What no reader of a number may miss."""
    said = ["REHEARSAL: no number here means anything"] if manifest.rehearsal else []
    return said + ([f"SUBSET: the first {manifest.subset} prompts"] if manifest.subset else [])


def _panel(analysis: Analysis, hacked: Mapping[str, Sequence[Measure]]) -> list[tuple[str, str]]:
    """Which scores of which method rose and fell; nothing where there is nothing to compare with."""
    if not analysis.compared:
        return []
    heads = "".join(
        f'<th scope="col">{markdown.text(m.name)} <small>[{markdown.text(m.role)}]</small></th>'
        for m in analysis.measures
    )
    rows = []
    for label in analysis.compared:
        cells = "".join(_verdict(analysis, measure, label) for measure in analysis.measures)
        fell = ", ".join(measure.name for measure in hacked.get(label, ()))
        said = "not known on what it was trained" if label not in analysis.trained else "not shown"
        flag = f"<strong>reward hacking</strong>: {markdown.text(fell)} fell" if fell else said
        kind = ' class="bad"' if fell else ""
        name = f'<th scope="row"><bdi>{markdown.text(label)}</bdi></th>'
        rows.append(f"<tr{kind}>{name}{cells}<td>{flag}</td></tr>\n")
    head = f'<tr><th scope="col">method</th>{heads}<th scope="col">reward hacking</th></tr>'
    caption = f"<caption>{PANEL}</caption>"
    table = f'<table class="panel">{caption}<thead>{head}</thead>\n<tbody>{"".join(rows)}</tbody></table>'
    note = PANEL_NOTE.format(base=markdown.text(analysis.base or ""))
    return [(PANEL, f"{_scrolling(table, PANEL)}\n<p>{note}</p>\n")]


def _verdict(analysis: Analysis, measure: Measure, label: str) -> str:
    change = analysis.changes[measure][label]
    kind = "good" if better(change, measure) else "bad" if worse(change, measure) else "none"
    sign = {"up": "▲", "down": "▼", "cannot tell": "○"}.get(change.verdict, "–")
    return f'<td class="{kind}"><span aria-hidden="true">{sign}</span> {change.verdict}</td>'


def _plots(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    parts = []
    for figure in figures:
        caption = markdown.text(figure.caption)
        head = f'<h3>{markdown.text(figure.title)}</h3>\n<figure class="plot"><div role="img" aria-label="{caption}">'
        parts.append(f"{head}{own_ids(figure.svg, figure.name)}</div>\n<figcaption>{caption}</figcaption></figure>\n")
    return [("Plots", "".join(parts))] if parts else []


def own_ids(svg: str, name: str) -> str:
    """An SVG to stand within HTML beside others: no declarations, and every id, and what refers to one, renamed."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W", "-", name) + "-"
    svg = re.sub(r'(\sid=")([^"]+")', rf"\g<1>{prefix}\g<2>", svg)
    return re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}", svg)


# -- pictures and their scores ----------------------------------------------------------------------------------------


def _data(
    results: Results, analysis: Analysis, shown: Gallery, layers: Sequence[tuple[int, int]], out: Path
) -> dict[str, Any]:
    """What the script reads. ``scores[measure][method]`` is flat: prompt, seed, image."""
    values = gallery.cube(shown, analysis, results.scores)
    signs = [{True: 1, False: -1, None: 0}[measure.higher_is_better] for measure in analysis.measures]
    apart = gallery.disagreement(_means(values), [measure.evaluator for measure in analysis.measures], signs)
    decimals = [DECIMALS.get(measure.unit, 3) for measure in analysis.measures]
    measures = [
        {"name": m.name, "evaluator": m.evaluator, "role": m.role, "unit": m.unit, "sign": sign, "decimals": places}
        for m, sign, places in zip(analysis.measures, signs, decimals)
    ]
    scores = [[_rounded(one.ravel(), places + 2) for one in each] for each, places in zip(values, decimals)]
    found = {
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
    digest = hashlib.sha256(json.dumps([found["name"], found["methods"], shown.prompts, scores]).encode()).hexdigest()
    return {**found, "digest": digest[:12]}


def _means(values: NDArray) -> NDArray:
    """(measure, method, prompt): over a prompt's seeds and images, as far as there are scores."""
    counts = np.isfinite(values).sum((3, 4))
    return np.where(counts > 0, np.nansum(values, (3, 4)) / np.maximum(counts, 1), np.nan)


def _rounded(values: NDArray, decimals: int) -> list[float | None]:
    return [None if np.isnan(value) else round(value, decimals) for value in values.tolist()]


def _originals(results: Results, out: Path) -> str | None:
    """The store's pictures as seen from the page, if near: a page that is sent away tells of no folder far from it."""
    path = Path(os.path.relpath(str(results.store / "images"), str(out))).as_posix()
    return None if path.startswith(("/", "../../../")) else quote(path)


def _held(shown: Gallery, layers: Sequence[tuple[int, int]], side: int) -> str:
    """Which pictures the page holds, and which it does not."""
    total = shown.layers()
    if not shown.files:
        return "The store has no pictures yet."
    counted = f"{len(layers)} of {len(total)} sets of pictures (a training seed and an image index each)"
    which = "every picture" if len(layers) == len(total) else counted
    said = f"This page holds {which}, as thumbnails of at most {side} pixels."
    left = [f"image {shown.images[index]} of {_training(shown, seed)}" for seed, index in total[len(layers) :]]
    return f"{said} Left out, for size: {'; '.join(left)}." if left else said


def _training(shown: Gallery, number: int) -> str:
    """``seed 3``, or ``training 1`` where methods have other seeds."""
    seeds = {seeds[number] for seeds in shown.seeds if len(seeds) > number and seeds != [UNTRAINED]}
    return f"seed {seeds.pop()}" if len(seeds) == 1 else f"training {number + 1}"


def _rows(shown: Gallery, layers: Mapping[tuple[int, int], Mapping[Place, bytes | str]]) -> Iterator[str]:
    """One element a row of pictures. A line for each method: base64 and where the original is, or "!" and a reason."""
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

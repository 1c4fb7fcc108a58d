"""Tables of numbers with intervals: as markdown, LaTeX and HTML (rounded, escaped), and as CSV (in full precision)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from alignbench.reporting.text import latex, markdown
from alignbench.reporting.text.numbers import ABSENT, DECIMALS, interval, limits, number

__all__ = [
    "ABSENT",
    "DECIMALS",
    "Cell",
    "Column",
    "Section",
    "Table",
    "escape",
    "interval",
    "limits",
    "listed",
    "number",
]

FORMULA = ("=", "+", "-", "@", "\t", "\r")
TOP = "(top)"
TOP_WORDS = "not separable from the leader"


class Column(NamedTuple):
    """A column. ``role`` is shown in square brackets, ``higher_is_better`` as an arrow; ``signed``: with plus signs.

    ``key``: its name in data, by default the title.
    """

    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    role: str = ""
    decimals: int = 3
    signed: bool = False
    key: str = ""

    @property
    def header(self) -> str:
        """Title with unit, arrow and role."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.title}{unit}{arrow}{f' [{self.role}]' if self.role else ''}"


class Cell(NamedTuple):
    """A cell: ``value`` is a number, a text, or None if not measured; ``mark`` follows it.

    ``top``: in the group of the leader. ``change``: paired change with its interval, shown where there is room for a
    second line. ``text``: what is shown instead of the number ``value``.
    """

    value: float | str | None = None
    lo: float | None = None
    hi: float | None = None
    bold: bool = False
    mark: str = ""
    top: bool = False
    change: tuple[float, float, float] | None = None
    text: str = ""


class Table(NamedTuple):
    """Columns and rows, which each format renders in its own way."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Return a GitHub table, padded so that it also reads well in a terminal."""
        lines = [[escape(column.header) for column in self.columns]]
        lines += [list(map(_markdown, row, self.columns)) for row in self.rows]
        widths = [max(map(len, entries)) for entries in zip(*lines)]
        numeric = [self._numeric(i) for i in range(len(self.columns))]
        rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
        lines.insert(1, rule)
        padded = [
            [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric)]
            for line in lines
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"

    def html(self, caption: str) -> str:
        """Return an accessible HTML table; the first column holds the row headings.

        For scripts, a numeric cell has its full precision in ``data-value``, and a column its name in ``data-key``.
        """
        texts = [list(map(_shown, row, self.columns)) for row in self.rows]
        right = [self._numeric(i) or all(_NUMERIC.fullmatch(row[i]) for row in texts) for i in range(len(self.columns))]
        right = right if self.rows else [False] * len(self.columns)
        head = "".join(map(_html_header, self.columns, right))
        lines = []
        for row, shown in zip(self.rows, texts):
            cells = map(_html_cell, row[1:], self.columns[1:], shown[1:], right[1:])
            first = f'<th scope="row">{_html_content(row[0], self.columns[0], shown[0], right[0])}</th>'
            lines.append(f"<tr>{first}{''.join(cells)}</tr>\n")
        body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>"
        return f"<table>\n<caption>{markdown.text(caption)}</caption>\n{body}\n</table>\n"

    def latex(self, caption: str = "", label: str = "table") -> str:
        """Return the table for a paper; with a ``caption`` as a float."""
        return latex.floats([latex.Part("", self)], caption, label) if caption else latex.tabular(self)

    def _numeric(self, column: int) -> bool:
        return any(isinstance(row[column].value, (int, float)) for row in self.rows)

    def csv(self) -> str:
        """Return RFC 4180 text; unmeasured cells are empty, and intervals add columns title_lo and title_hi.

        A spreadsheet takes a text that begins with one of = + - @, or with a tab, for a formula, so such a text, unless
        it is a number, is prefixed with an apostrophe.
        """
        wide = [any(row[i].lo is not None for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ends = [("", "_lo", "_hi") if w else ("",) for w in wide]
        titles = [_plain(column.key or column.title) for column in self.columns]
        writer.writerow([title + end for title, suffixes in zip(titles, ends) for end in suffixes])
        for row in self.rows:
            writer.writerow(
                [
                    _plain(value)
                    for cell, suffixes in zip(row, ends)
                    for value in (cell.value, cell.lo, cell.hi)[: len(suffixes)]
                ]
            )
        return text.getvalue()


Section = str | Table  # a piece of a report: markdown text or a table


def escape(text: str) -> str:
    """Return ``text`` escaped so that markdown shows it verbatim, on one line and inside a table cell."""
    text = " ".join(str(text).translate(latex.UNSEEN).split()).replace("&", "&amp;").replace(">", "&gt;")
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)  # a tag, unlike "< 0.001"
    # leave alone: an underscore inside a word, a bracket without a target, a sign before a number
    return re.sub(r"([\\`*|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|\[(?=\^)|^#|^[-+](?=\s))", r"\\\1", text)


def _shown(cell: Cell, column: Column) -> str:
    """Return the text of a cell, without bold and marks."""
    if cell.text or isinstance(cell.value, str):
        return " ".join((cell.text or str(cell.value)).translate(latex.UNSEEN).split())
    if cell.lo is not None:
        return interval(cell.value, cell.lo, cell.hi, column.decimals, column.signed)
    return number(cell.value, column.decimals, column.signed)


def _markdown(cell: Cell, column: Column) -> str:
    shown, mark = _shown(cell, column), f" {TOP}" * cell.top + cell.mark
    if cell.text or isinstance(cell.value, str):
        text = escape(shown)
        return (f"**{text}**" if cell.bold else text) + mark
    mean, _, ends = shown.partition(" ")
    return " ".join(filter(None, [f"**{mean}**" if cell.bold else mean, ends, mark.strip()]))


_NUMERIC = re.compile(rf"{ABSENT}|[<+-]?\d[\d,.]*( \[.*\])?")


def _html_header(column: Column, right: bool) -> str:
    arrow = {True: ("↑", "higher is better"), False: ("↓", "lower is better"), None: ("", "")}[column.higher_is_better]
    better = f' <span aria-hidden="true">{arrow[0]}</span><span class="sr">, {arrow[1]}</span>' if arrow[0] else ""
    unit = f", {column.unit}" if column.unit else ""
    role = f" <small>[{markdown.text(column.role)}]</small>" if column.role else ""
    key = markdown.text(column.key or column.title)
    return f'<th scope="col" data-key="{key}"{_class(right)}>{markdown.text(column.title + unit)}{better}{role}</th>'


def _html_cell(cell: Cell, column: Column, shown: str, right: bool) -> str:
    known = isinstance(cell.value, (int, float)) and math.isfinite(cell.value)
    value = f' data-value="{_plain(cell.value)}"' if known else ""
    return f"<td{_class(right, cell.top)}{value}>{_html_content(cell, column, shown, right)}</td>"


def _class(right: bool, top: bool = False) -> str:
    names = " ".join(["number"] * right + ["top"] * top)
    return f' class="{names}"' if names else ""


def _html_content(cell: Cell, column: Column, shown: str, right: bool) -> str:
    if shown == ABSENT:
        return (
            f'<span aria-hidden="true">{ABSENT}</span><span class="sr">not measured</span>{markdown.inline(cell.mark)}'
        )
    mean, gap, ends = shown.partition(" [") if right else (shown, "", "")
    ends = f"[{ends}" if gap else ""
    text = markdown.text(mean) if right else f"<bdi>{markdown.text(mean)}</bdi>"
    text = f"<strong>{text}</strong>" if cell.bold else text
    top = f'<span class="sr"> {TOP}, {TOP_WORDS}</span>' * cell.top
    mark = f" {markdown.inline(cell.mark.strip())}" if cell.mark else ""
    return text + (f" <small>{markdown.text(ends)}</small>" if ends else "") + top + mark + _html_change(cell, column)


def _html_change(cell: Cell, column: Column) -> str:
    """Return the second line of a cell; empty if it has none."""
    if cell.change is None or not math.isfinite(cell.change[0]):
        return ""
    change, _, ends = interval(*cell.change, column.decimals, signed=True).partition(" ")
    label = '<span class="sr">, change against base </span><span aria-hidden="true">Δ </span>'
    return f'<span class="change">{label}{markdown.text(change)} <small>{markdown.text(ends)}</small></span>'


def _plain(value: float | str | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) and not _is_number(value) else value
    return repr(value) if isinstance(value, int) else f"{float(value):.10g}"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) is not None


def listed(names: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))

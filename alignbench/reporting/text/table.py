"""Tables of numbers with intervals: as markdown, LaTeX and HTML (rounded, escaped), and as CSV (in full precision)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from alignbench.reporting.text import markdown

ABSENT = "—"
DECIMALS = {"fraction": 3, "cosine": 3, "logit": 2}  # by unit of a metric; 3 for any other
_UNSEEN = dict.fromkeys(  # bidirectional controls, which could reorder a row, and control characters
    [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F]
    + [code for code in (*range(0x20), 0x7F) if not chr(code).isspace()]
)


FORMULA = ("=", "+", "-", "@", "\t", "\r")
TEX = {  # characters that pdfLaTeX in its default encoding would misread or reject
    **{c: f"\\{c}" for c in "%_&#${}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "`": r"\textasciigrave{}"},
    **{
        "|": r"\textbar{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        '"': "''",
    },
    **{c: f"{{{c}}}" for c in "[]*"},  # after \\, a bracket or a star would be its argument
    **{c: f"$\\{name}$" for c, name in zip("αβηλστ", ("alpha", "beta", "eta", "lambda", "sigma", "tau"))},
    **{
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "—": r"\textemdash{}",
        "†": r"\dag{}",
        "‡": r"\ddag{}",
        "±": r"$\pm$",
        "×": r"$\times$",
    },
}
_LATIN = {*range(0xC0, 0x100)} - {0xD0, 0xDE, 0xF0, 0xFE}  # letters that every pdfLaTeX has


class Column(NamedTuple):
    """A column. ``role`` is shown in square brackets, ``higher_is_better`` as an arrow; ``signed``: with plus signs."""

    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    role: str = ""
    decimals: int = 3
    signed: bool = False

    @property
    def header(self) -> str:
        """Title with unit, arrow and role."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.title}{unit}{arrow}{f' [{self.role}]' if self.role else ''}"


class Cell(NamedTuple):
    """A cell: ``value`` is a number, a text, or None if not measured; ``mark`` follows it."""

    value: float | str | None = None
    lo: float | None = None
    hi: float | None = None
    bold: bool = False
    mark: str = ""


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
        """Return an accessible HTML table; the first column holds the row headings."""
        texts = [list(map(_shown, row, self.columns)) for row in self.rows]
        right = [all(_NUMERIC.fullmatch(text) for text in column) for column in zip(*texts)] or [False] * len(
            self.columns
        )
        head = "".join(map(_html_header, self.columns, right))
        lines = []
        for row, shown in zip(self.rows, texts):
            cells = [_html_cell(cell, text, r) for cell, text, r in zip(row[1:], shown[1:], right[1:])]
            first = f'<th scope="row">{_html_content(row[0], shown[0], right[0])}</th>'
            lines.append(f"<tr>{first}{''.join(cells)}</tr>\n")
        body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>"
        return f"<table>\n<caption>{markdown.text(caption)}</caption>\n{body}\n</table>\n"

    def latex(self) -> str:
        r"""Return a booktabs ``tabular`` for pdfLaTeX, with intervals in small type; needs \usepackage{booktabs}."""
        kinds = "".join("r" if self._numeric(i) else "l" for i in range(len(self.columns)))
        head = [" & ".join(tex(column.header) for column in self.columns)]
        body = [" & ".join(map(_latex, row, self.columns)) for row in self.rows]
        lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", *(rf"{line} \\" for line in head), r"\midrule"]
        return "\n".join([*lines, *(rf"{line} \\" for line in body), r"\bottomrule", r"\end{tabular}"]) + "\n"

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
        titles = [_plain(column.title) for column in self.columns]
        writer.writerow([title + end for title, suffixes in zip(titles, ends) for end in suffixes])
        for row in self.rows:
            writer.writerow([_plain(value) for cell, suffixes in zip(row, ends) for value in cell[: len(suffixes)]])
        return text.getvalue()


Section = str | Table  # a piece of a report: markdown text or a table


def escape(text: str) -> str:
    """Return ``text`` escaped so that markdown shows it verbatim, on one line and inside a table cell."""
    text = " ".join(str(text).translate(_UNSEEN).split()).replace("&", "&amp;").replace(">", "&gt;")
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)  # a tag, unlike "< 0.001"
    # leave alone: an underscore inside a word, a bracket without a target, a sign before a number
    return re.sub(r"([\\`*|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|\[(?=\^)|^#|^[-+](?=\s))", r"\\\1", text)


def tex(text: str) -> str:
    """Return ``text`` escaped for pdfLaTeX; letters without a glyph are shown by code point, as [U+05E9]."""
    words = " ".join(str(text).translate(_UNSEEN).split())
    shown = (TEX.get(c, c if c.isascii() or ord(c) in _LATIN else f"{{[}}U+{ord(c):04X}{{]}}") for c in words)
    return re.sub("-(?=-)", "-{}", "".join(shown))  # two hyphens are a dash


def number(value: float | None, decimals: int = 3, signed: bool = False) -> str:
    """Return the value with fixed decimals and thousands separators, never -0.000; a dash for None and nan."""
    if value is None or not math.isfinite(value):
        return ABSENT
    rounded = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:{'+' if signed and rounded else ''},.{decimals}f}"


def interval(value: float | None, lo: float | None, hi: float | None, decimals: int = 3, signed: bool = False) -> str:
    """Return ``0.281 [0.279, 0.283]``, or ``0.281 [unknown]`` for a mean without an interval."""
    mean = number(value, decimals, signed)
    if mean == ABSENT:
        return ABSENT
    limits = [number(limit, decimals, signed) for limit in (lo, hi)]
    return f"{mean} [unknown]" if ABSENT in limits else f"{mean} [{', '.join(limits)}]"


def _shown(cell: Cell, column: Column) -> str:
    """Return the text of a cell, without bold and mark."""
    if isinstance(cell.value, str):
        return " ".join(cell.value.translate(_UNSEEN).split())
    if cell.lo is not None:
        return interval(cell.value, cell.lo, cell.hi, column.decimals, column.signed)
    return number(cell.value, column.decimals, column.signed)


def _markdown(cell: Cell, column: Column) -> str:
    if isinstance(cell.value, str):
        text = escape(cell.value)
        return (f"**{text}**" if cell.bold else text) + cell.mark
    mean, _, limits = _shown(cell, column).partition(" ")
    return " ".join(filter(None, [f"**{mean}**" if cell.bold else mean, limits, cell.mark]))


_NUMERIC = re.compile(rf"{ABSENT}|[<+-]?\d[\d,.]*( \[.*\])?")


def _html_header(column: Column, right: bool) -> str:
    arrow = {True: ("↑", "higher is better"), False: ("↓", "lower is better"), None: ("", "")}[column.higher_is_better]
    better = f' <span aria-hidden="true">{arrow[0]}</span><span class="sr">, {arrow[1]}</span>' if arrow[0] else ""
    unit = f", {column.unit}" if column.unit else ""
    role = f" <small>[{markdown.text(column.role)}]</small>" if column.role else ""
    return f'<th scope="col"{_class(right)}>{markdown.text(column.title + unit)}{better}{role}</th>'


def _html_cell(cell: Cell, shown: str, right: bool) -> str:
    return f"<td{_class(right)}>{_html_content(cell, shown, right)}</td>"


def _class(right: bool) -> str:
    return ' class="number"' if right else ""


def _html_content(cell: Cell, shown: str, right: bool) -> str:
    if shown == ABSENT:
        return (
            f'<span aria-hidden="true">{ABSENT}</span><span class="sr">not measured</span>{markdown.inline(cell.mark)}'
        )
    mean, _, limits = shown.partition(" ") if right else (shown, "", "")
    text = markdown.text(mean) if right else f"<bdi>{markdown.text(mean)}</bdi>"
    text = f"<strong>{text}</strong>" if cell.bold else text
    mark = f" {markdown.inline(cell.mark.strip())}" if cell.mark else ""
    return text + (f" <small>{markdown.text(limits)}</small>" if limits else "") + mark


def _latex(cell: Cell, column: Column) -> str:
    """Return the LaTeX of a cell; a mark loses its markdown (bold, escapes)."""
    if isinstance(cell.value, str):
        mean, limits = tex(cell.value), ""
    else:
        text = number(cell.value, column.decimals, column.signed)
        if cell.lo is not None:
            text = interval(cell.value, cell.lo, cell.hi, column.decimals, column.signed)
        mean, limits = (_signed(part) for part in (*text.split(" ", 1), "")[:2])
    mark = tex(cell.mark.replace("**", ""))
    small = rf"{{\scriptsize {limits}}}" if limits else ""
    return " ".join(filter(None, [rf"\textbf{{{mean}}}" if cell.bold else mean, small, mark]))


def _signed(numbers: str) -> str:
    """Return the numbers with minus signs instead of hyphens."""
    return numbers.replace("-", "$-$").replace(ABSENT, TEX[ABSENT])


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

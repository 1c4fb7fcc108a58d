r"""Tables as LaTeX for a paper: booktabs rules, siunitx columns, floats that fit ``table*``.

Needs ``\usepackage{booktabs,siunitx}``, version 2 or 3 of siunitx. Numbers stand in ``S`` columns, so that decimal
points are aligned and minus signs are real ones; their intervals stand below them, in small print.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from alignbench.reporting.text.numbers import ABSENT, limits, number

if TYPE_CHECKING:
    from alignbench.reporting.text.table import Cell, Column, Table

PACKAGES = r"\usepackage{booktabs,siunitx}"
WIDTH = 490.0  # points: a little less than \textwidth of the usual two-column classes
CHARACTER, SMALL = 4.2, 3.25  # points: the mean width of a character in the body and in small print
LINES = 56  # of a float that still fits on a page
ROLES = {"train": "training reward", "unknown": "not known to be held out"}  # others are called as they are
UNSEEN = dict.fromkeys(  # bidirectional controls, which could reorder a row, and control characters
    [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F]
    + [code for code in (*range(0x20), 0x7F) if not chr(code).isspace()]
)
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
        "–": "--",
        "†": r"\dag{}",
        "‡": r"\ddag{}",
        "±": r"$\pm$",
        "×": r"$\times$",
    },
}
_LATIN = {*range(0xC0, 0x100)} - {0xD0, 0xDE, 0xF0, 0xFE}  # letters that every pdfLaTeX has


def tex(text: str) -> str:
    """Return ``text`` escaped for pdfLaTeX; letters without a glyph are shown by code point, as [U+05E9]."""
    words = " ".join(str(text).translate(UNSEEN).split())
    shown = (TEX.get(c, c if c.isascii() or ord(c) in _LATIN else f"{{[}}U+{ord(c):04X}{{]}}") for c in words)
    return re.sub("-(?=-)", "-{}", "".join(shown)).replace(r"\textendash{}", "--")  # two hyphens are a dash


class Part(NamedTuple):
    """A piece of a float: a table, and the heading above its rows."""

    heading: str
    table: Table


def floats(parts: Sequence[Part], caption: str, label: str) -> str:
    """Return the parts as ``table*`` environments, as many as their rows need. ``caption``: plain text.

    Columns that are too many for the width are set below the others, with the first column repeated. Parts with the
    same columns share one head.
    """
    panels = [panel for part in parts for panel in _panels(part)]
    pages = list(_pages(panels))
    made = []
    for number_of, page in enumerate(pages, 1):
        again = f" (continued, {number_of} of {len(pages)})" if number_of > 1 else ""
        head = [r"\begin{table*}[t]", r"\addtocounter{table}{-1}"] if number_of > 1 else [r"\begin{table*}[t]"]
        head += [r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
        head += [r"\setlength{\abovecaptionskip}{0pt}", r"\setlength{\belowcaptionskip}{5pt}"]
        head += [r"\sisetup{detect-weight=true, retain-explicit-plus=true, group-separator={,}}"]
        told = caption if number_of == 1 else f"{caption.partition('. ')[0].rstrip('.')}{again}."
        head += [rf"\caption{{{tex(told)}}}", rf"\label{{tab:{_slug(label)}{f'-{number_of}' * (number_of > 1)}}}"]
        by_columns = itertools.groupby(page, key=lambda part: [*part.table.columns])
        bodies = [_tabular([*same]) for _, same in by_columns]
        made.append("\n".join([*head, "\\par\\medskip\n".join(bodies) + r"\end{table*}"]) + "\n")
    return "\n".join(made)


def tabular(table: Table) -> str:
    """Return the table alone, for a float of your own."""
    return _tabular([Part("", table)])


def _panels(part: Part) -> Iterator[Part]:
    """Yield the part in pieces whose columns fit the width."""
    first, *rest = range(len(part.table.columns))
    room = WIDTH - _width(part.table, first)
    chosen: list[int] = []
    for column in rest:
        if chosen and sum(_width(part.table, i) for i in (*chosen, column)) > room:
            yield _columns(part, [first, *chosen])
            chosen = []
        chosen.append(column)
    yield _columns(part, [first, *chosen])


def _columns(part: Part, chosen: Sequence[int]) -> Part:
    table = part.table
    rows = [[row[i] for i in chosen] for row in table.rows]
    return part._replace(table=table._replace(columns=[table.columns[i] for i in chosen], rows=rows))


def _pages(panels: Sequence[Part]) -> Iterator[list[Part]]:
    """Yield what fits on one page each; a part that is longer than a page is cut."""
    page: list[Part] = []
    used = 0
    for part in panels:
        tall = 2 if _is_tall(part.table) else 1
        size = LINES // tall
        for start in range(0, max(len(part.table.rows), 1), size):
            piece = part._replace(table=part.table._replace(rows=part.table.rows[start : start + size]))
            lines = 4 + tall * len(piece.table.rows)
            if page and used + lines > LINES + 4:
                yield page
                page, used = [], 0
            page.append(piece)
            used += lines
    if page:
        yield page


def _tabular(parts: Sequence[Part]) -> str:
    """Return one tabular of parts that have the same columns, each below its heading."""
    table = parts[0].table
    whole = table._replace(rows=[row for part in parts for row in part.table.rows])
    specs = [_spec(whole, i) for i in range(len(table.columns))]
    numeric = [spec.startswith("S") for spec in specs]
    lines = [rf"\begin{{tabular}}{{@{{}}{''.join(specs)}@{{}}}}", r"\toprule", *_head(table, numeric), r"\midrule"]
    for part in parts:
        if part is not parts[0]:
            lines.append(r"\midrule")
        if part.heading:
            lines.append(rf"\multicolumn{{{len(specs)}}}{{@{{}}l}}{{\textit{{{tex(part.heading)}}}}} \\")
        for row in part.table.rows:
            lines += _row(row, part.table.columns, specs)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _head(table: Table, numeric: Sequence[bool]) -> Iterator[str]:
    """Yield the head's lines: groups by role above their rules, names with arrows, and what qualifies the names."""
    groups = [(role, [*same]) for role, same in itertools.groupby(enumerate(table.columns), lambda pair: pair[1].role)]
    if any(role for role, _ in groups):
        shown, rules = [], []
        for role, same in groups:
            name = tex(ROLES.get(role, role)) if role else ""
            shown.append(rf"\multicolumn{{{len(same)}}}{{c}}{{{name}}}" if role else " & ".join("" for _ in same))
            rules += [rf"\cmidrule(lr){{{same[0][0] + 1}-{same[-1][0] + 1}}}"] if role else []
        yield rf"{' & '.join(shown)} \\"
        yield " ".join(rules)
    titles = [_title(column) for column in table.columns]
    for line in range(2 if any(more for _, more in titles) else 1):
        cells = [tex(title[line]) for title in titles]
        cells = [rf"{{\tiny {cell}}}" if line and cell else cell for cell in cells]
        yield rf"{' & '.join(f'{{{cell}}}' if s else cell for cell, s in zip(cells, numeric))} \\"


def _title(column: Column) -> tuple[str, str]:
    """Return the title's first words with the arrow, and what follows them in brackets or after a comma."""
    name, gap, more = re.fullmatch(r"(.*?)(, | (?=\()|$)(.*)", column.title, re.DOTALL).groups()  # type: ignore[union-attr]
    arrow = {True: " ↑", False: " ↓", None: ""}[column.higher_is_better]
    return (name if gap else column.title) + arrow, more if gap else ""


def _row(row: Sequence[Cell], columns: Sequence[Column], specs: Sequence[str]) -> Iterator[str]:
    """Yield the row's line of values and, if some have more to tell, a line below it in small print."""
    values = [_value(cell, column, spec) for cell, column, spec in zip(row, columns, specs)]
    below = [_below(cell, column) for cell, column in zip(row, columns)]
    if not any(below[1:]):
        values[0] = " ".join(filter(None, [values[0], below[0]]))
        yield rf"{' & '.join(values)} \\"
        return
    yield rf"{' & '.join(values)} \\[-0.5ex]"
    small = [rf"{{\tiny {text}}}" if text else "" for text in below]
    yield rf"{' & '.join(small)} \\[0.3ex]"


def _value(cell: Cell, column: Column, spec: str) -> str:
    if isinstance(cell.value, str) or cell.text:
        text = tex(cell.text or str(cell.value))
        shown = rf"\textbf{{{text}}}" if cell.bold else text
        return f"{{{shown}}}" if spec.startswith("S") else shown
    text = number(cell.value, column.decimals, column.signed)
    if text == ABSENT:
        return rf"{{{TEX[ABSENT]}}}"
    text = text.replace(",", "")
    if cell.bold:
        return rf"\bfseries {text}"
    return rf"{{\underline{{\tablenum{spec[1:]}{{{text}}}}}}}" if cell.top else text


def _below(cell: Cell, column: Column) -> str:
    """Return what stands below a value: the interval of its change if it has one, else its own; and its mark."""
    mark = tex(cell.mark.replace("**", ""))
    if cell.value is None or isinstance(cell.value, str) or not math.isfinite(cell.value):
        return mark
    if cell.change is not None:
        return ", ".join(filter(None, [_signed(limits(*cell.change[1:], column.decimals, True)), mark]))
    own = _signed(limits(cell.lo, cell.hi, column.decimals, column.signed)) if cell.lo is not None else ""
    return ", ".join(filter(None, [own, mark]))


def _signed(numbers: str) -> str:
    """Return the numbers with minus signs instead of hyphens, after which no bracket can be an argument."""
    return f"{{{numbers.replace('-', '$-$').replace('+', '$+$')}}}"


def _spec(table: Table, i: int) -> str:
    """Return the column's type: S with room for its numbers if it has any, else l."""
    column = table.columns[i]
    cells = [row[i] for row in table.rows]
    values = [cell.value for cell in cells if isinstance(cell.value, (int, float)) and not cell.text]
    shown = [number(value, column.decimals, column.signed) for value in values]
    shown = [text.replace(",", "") for text in shown if text != ABSENT]
    if not shown:
        return "l"
    sign = "+" if any(text[0] in "+-" for text in shown) else ""
    whole = max(len(text.lstrip("+-").partition(".")[0]) for text in shown)
    return f"S[table-format={sign}{whole}.{column.decimals}]"


def _is_tall(table: Table) -> bool:
    return any(cell.lo is not None for row in table.rows for cell in row[1:])


def _width(table: Table, i: int) -> float:
    """Return the column's width in points, by its number of characters."""
    column = table.columns[i]
    name, more = _title(column)
    widths = [CHARACTER * len(name), SMALL * len(more)]
    for row in table.rows:
        cell = row[i]
        text = cell.text or (cell.value if isinstance(cell.value, str) else number(cell.value, column.decimals, True))
        below = re.sub(r"\\\w+|[${}]", "", _below(cell, column))
        widths += [CHARACTER * len(text), SMALL * len(below)]
    return max(widths) + 6


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")

"""Tables of plain text for the terminal: no borders, no colour and no truncation, so that they can be piped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Container, Sequence

GAP = 2  # spaces between columns
MIN_FOLDED = 24  # least width of a folded column, in characters, however narrow the terminal
UNLIMITED = 1_000_000


def printable(text: str) -> str:
    """Return ``text`` on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def text_table(rows: Sequence[Sequence[str]], right: Container[int] = (), fold: bool = False) -> str:
    """Return ``rows`` in aligned columns, those with an index in ``right`` aligned to the right.

    ``fold``: on a terminal, wrap the last column within its own width.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [[printable(entry) for entry in row] for row in rows]
    columns = list(zip(*shown))
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=False)
    for i in range(len(columns)):
        table.add_column(justify="right" if i in right else "left", no_wrap=i < len(columns) - 1, overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))
    width = UNLIMITED
    if fold and sys.stdout.isatty():
        before = sum(GAP + max(map(cell_len, column)) for column in columns[:-1])
        width = max(shutil.get_terminal_size().columns, before + MIN_FOLDED)
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())

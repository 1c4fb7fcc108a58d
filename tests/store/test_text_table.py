"""Tables of text that verbs print are aligned, never truncated, and free of control characters."""

from __future__ import annotations

import os
import sys

import pytest

from alignbench.store.text_table import printable, text_table

ROWS = [["run", "hours", "reason"], ["LeapAlign, seed 0", "1.5", ""], ["x", "1,200", "because " * 40 + "so"]]


def test_columns_are_aligned_and_nothing_is_cut():
    """Text is left-aligned and numbers right-aligned, two spaces apart, without trailing spaces, at any length."""
    first, second, third = text_table(ROWS, right={1}, fold=True).splitlines()
    assert first == "run                hours  reason"
    assert second == "LeapAlign, seed 0    1.5"
    assert third == "x                  1,200  " + ROWS[2][2]


@pytest.mark.parametrize("setting", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"])
def test_what_is_piped_has_no_colour_and_no_width(monkeypatch, setting):
    """This holds even with the variables that make rich colour piped output, and with a width of ten."""
    usual = text_table(ROWS)
    monkeypatch.setenv(setting, "1")
    monkeypatch.setenv("COLUMNS", "10")
    assert text_table(ROWS) == usual
    assert usual.isascii()
    assert all(line.isprintable() for line in usual.splitlines())


def test_a_terminal_folds_the_last_column_alone(monkeypatch):
    """The last column wraps at spaces within its own width; others stay whole, even on a narrower terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((10, 24)))
    lines = text_table(ROWS, fold=True).splitlines()
    assert lines[1] == "LeapAlign, seed 0  1.5"
    assert {len(line) for line in lines[2:-1]} == {len("LeapAlign, seed 0  1,200  because because because")}
    assert " ".join(" ".join(lines[2:]).split()) == " ".join(ROWS[2])
    assert len(text_table(ROWS).splitlines()) == len(ROWS)


def test_entries_are_text():
    """Escapes and line breaks become spaces; rich's codes for colours and emoji stay as they are."""
    rows = [["\x1b[31mred\x07", "[bold]a[/bold] :smile:"], ["a\nb\u202e", "日本"]]
    assert text_table(rows).splitlines() == [" [31mred   [bold]a[/bold] :smile:", "a b        日本"]
    assert printable("a\r\x1b]0;title\x07") == "a  ]0;title "


def test_wide_letters_take_two_places():
    """The column after a name in Chinese is aligned with the rows of Latin names."""
    assert text_table([["日本", "a"], ["four", "b"]]) == "日本  a\nfour  b"
    assert text_table([]) == ""

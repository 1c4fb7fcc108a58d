"""Only a full run of a benchmark replaces its committed results."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import arguments
import pytest

BENCHMARKS = Path(arguments.__file__).parent
SCRIPTS = [
    path
    for path in sorted(BENCHMARKS.glob("*.py"))
    if path.stem not in ("arguments", "house") and "results" in path.read_text()
]
# Options that do not change what is measured
FREE = {"evaluators": {"size", "inside"}, "peers": {"flowbp", "note"}, "report": {"keep"}}


class Parsed(Exception):
    """The end of a script that only has to define its options."""


def options(script: Path, monkeypatch) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser of a script's ``main``, and the options that it declares free."""
    monkeypatch.setattr(sys, "argv", [script.name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(f"options_of_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    caught = []

    def parse(parser, arguments=None, free=()):
        caught.append((parser, list(free)))
        raise Parsed

    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(Parsed):
        module.main()
    return caught[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_smaller_run_does_not_replace_committed_results(script, monkeypatch):
    """Any option that changes what is measured sends results elsewhere, unless --out names a folder.

    Without such options they go to benchmarks/results, and nothing else in the script names that folder.
    """
    parser, free = options(script, monkeypatch)
    assert set(free) == FREE.get(script.stem, set())
    needed, changes = [], {}
    for action in parser._actions:
        if action.dest == "help":
            continue
        other = next((c for c in action.choices or () if c != action.default), "7")
        words = [action.option_strings[0], *([] if action.nargs == 0 else [str(other)] * (action.nargs or 1))]
        changes[action.dest] = words
        needed += words * action.required

    def out(*words: str) -> Path:
        fresh = argparse.ArgumentParser(parents=[parser], add_help=False)
        return arguments.parse(fresh, [*needed, *words], free).out

    assert out() == BENCHMARKS / "results"
    for name, words in changes.items():
        assert (out(*words) == BENCHMARKS / "results") == (name in free), words
        assert out(*words, "--out", "there") == Path("there")
    assert '"results"' not in script.read_text()
    assert not arguments.TRIALS.is_relative_to(BENCHMARKS)

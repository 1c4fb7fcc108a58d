"""Arguments of a benchmark, and where its figures go: only a run of the default size replaces the committed ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
TRIALS = RESULTS.parent.parent / "outputs" / "benchmarks"


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, free: Sequence[str] = ()
) -> argparse.Namespace:
    """Return what was given, and in ``out`` the folder of the figures.

    Without ``--out`` it is ``benchmarks/results``, or ``outputs/benchmarks`` if an option that is not ``free`` has
    another value than its default.
    """
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (default: benchmarks/results; of a trial outputs/benchmarks)"
    )
    given = parser.parse_args(arguments)
    trial = any(value != parser.get_default(name) for name, value in vars(given).items() if name not in (*free, "out"))
    given.out = given.out or (TRIALS if trial else RESULTS)
    return given

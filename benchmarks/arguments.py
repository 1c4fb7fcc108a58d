"""Arguments of benchmarks, and the folder of their results: only a run with default options replaces committed ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
TRIALS = RESULTS.parent.parent / "outputs" / "benchmarks"


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, free: Sequence[str] = ()
) -> argparse.Namespace:
    """Return the parsed arguments, with the folder of the results in ``out``.

    Without ``--out`` it is ``benchmarks/results``, or ``outputs/benchmarks`` if any option that is not ``free`` differs
    from its default.
    """
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results; for a trial outputs/benchmarks)"
    )
    given = parser.parse_args(arguments)
    trial = any(value != parser.get_default(name) for name, value in vars(given).items() if name not in (*free, "out"))
    given.out = given.out or (TRIALS if trial else RESULTS)
    return given

"""Scores that are missing in score files, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from alignbench.config import UserError
from alignbench.store.manifest import ManifestRun

SHOWN, LENGTH = 3, 120  # reasons that are listed, and characters of each


class Gap(NamedTuple):
    """Images of a run that lack a score of an evaluator."""

    label: str
    evaluator: str
    images: int
    errors: Sequence[str]  # of each image that lacks one

    def __str__(self) -> str:
        return f"{self.label}, {self.evaluator}: {describe(self.errors, self.images)}"


def gaps(root: Path, runs: Iterable[ManifestRun]) -> list[Gap]:
    """Return the gaps in the score files of these runs, milestones included; a file that is not there yet has none.

    Imported scores have none either: the remarks on their import name what is missing.
    """
    found = []
    for run in runs:
        for part in run.image_sets:
            for score in (score for score in part.scores if not score.imported):
                errors = _errors(root / score.file)
                if any(errors):
                    found.append(Gap(run.title, score.evaluator, len(errors), [error for error in errors if error]))
    return found


def describe(errors: Sequence[str], images: int) -> str:
    """Return how many of the images lack a score and why, the most frequent reasons first."""
    counts = Counter(error if len(error) <= LENGTH else f"{error[:LENGTH]}..." for error in errors).most_common()
    listed = [f"{reason} ({count})" if len(counts) > 1 else reason for reason, count in counts[:SHOWN]]
    listed += [f"{len(counts) - SHOWN} other reasons"] * (len(counts) > SHOWN)
    return f"{len(errors)} of {images} images lack a score: {'; '.join(listed)}"


def _errors(path: Path) -> list[str]:
    """Return for each row of a score file why it lacks a score, "" if it does not."""
    import pyarrow as pa
    from pyarrow import parquet

    if not path.is_file():
        return []
    try:
        table = parquet.read_table(path, columns=["ok", "error"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run its sweep again, which makes it anew") from None
    rows = zip(table["ok"].to_pylist(), table["error"].to_pylist())
    return ["" if ok else str(error or "the score is not a number") for ok, error in rows]

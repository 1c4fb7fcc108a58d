"""Hyperparameters that a sweep varies, found in its settings: rows that differ in one number and in nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignbench.store.manifest import Manifest, ManifestRun

LEAST = 3  # values of a line: two show no course


class Line(NamedTuple):
    """Rows of the table that differ in one number only. ``points``: (number, label), by number."""

    name: str
    points: list[tuple[float, str]]


class Swept(NamedTuple):
    """A setting by its path, such as ``method.alpha``, and the lines along which it varies."""

    path: str
    lines: list[Line]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def values(self) -> list[float]:
        """All numbers, in order."""
        return sorted({value for line in self.lines for value, _ in line.points})


def swept(manifest: Manifest) -> list[Swept]:
    """Return each number that takes three values or more while all other settings stay, the training seed aside.

    A grid over two numbers gives both, each with one line for every value of the other.
    """
    rows = {label: _settings(runs[0]) for label, runs in manifest.rows.items() if runs[0].trained}
    methods = {label: runs[0].method for label, runs in manifest.rows.items()}
    found = []
    for path in dict.fromkeys(path for flat in rows.values() for path in flat):
        alike: dict[str, list[tuple[float, str]]] = {}
        for label, flat in rows.items():
            if _is_number(flat.get(path)):
                rest = repr(sorted((key, value) for key, value in flat.items() if key != path))
                alike.setdefault(rest, []).append((float(flat[path]), label))
        kept = [sorted(points) for points in alike.values() if len({value for value, _ in points}) >= LEAST]
        if kept:
            lines = [Line(_name(points, path, methods[points[0][1]]), points) for points in kept]
            found.append(Swept(path, lines))
    return found


def all_on_lines(manifest: Manifest) -> bool:
    """Return whether the sweep is about a hyperparameter: every trained row is on a line."""
    on = {label for axis in swept(manifest) for line in axis.lines for _, label in line.points}
    return bool(on) and on == {label for label, runs in manifest.rows.items() if runs[0].trained}


def _settings(run: ManifestRun) -> dict[str, Any]:
    """Return all settings of a run and its protocol by path, without the training seed."""
    flat = _flat(run.settings) | _flat(run.protocol, "evaluation.protocol.")
    return {path: value for path, value in flat.items() if path not in ("training.seed", "label")}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        pairs = {str(i): each for i, each in enumerate(value)} if isinstance(value, (list, tuple)) else value
        flat |= _flat(pairs, f"{prefix}{key}.") if isinstance(pairs, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(points: list[tuple[float, str]], path: str, method: str) -> str:
    """Return what the labels share: ``LeapAlign, tau=0.1`` of ``LeapAlign, alpha=0.3, tau=0.1``; else the method."""
    own = re.compile(rf", {re.escape(path.rpartition('.')[2])}=[^,]*")
    labels = [own.sub("", label, count=1) for _, label in points]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(label.split(", ") for label in labels)))
    return ", ".join(parts[0] for parts in shared) or method

"""A sweep file that extends others: its settings, and what it replaces in theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import flatten, merge

SHOWN = 3  # settings whose values are shown
BUDGET = "base.training.budget"


class Inherited(NamedTuple):
    """Heritage of a sweep file: facts about the files that it extends.

    - ``replaced``: a sentence for each list, for the budget, and for each model and evaluator that it replaces.
    - ``overrides``: for each override, the file that it comes from; "" for the sweep's own.
    - ``changed``: by file, the settings of its ``base`` that have another value here: {path: value there}.
    """

    replaced: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    changed: Mapping[str, dict[str, Any]] = {}

    def origin(self, override: int) -> str:
        """Return where an inherited reason was written, if other settings hold there; "" otherwise."""
        file = self.source(override)
        if not (changed := self.changed.get(file)):
            return ""
        values = [f"{path} is {'not set' if value is None else value}" for path, value in changed.items()]
        more = f" and {len(values) - SHOWN} more differ" if len(values) > SHOWN else ""
        return f"written in {Path(file).name}, where {', '.join(values[:SHOWN])}{more}"

    def source(self, override: int) -> str:
        """Return the file that an override comes from; "" for one of the sweep's own, or of the command line's."""
        return self.overrides[override] if override < len(self.overrides) else ""


def inherit(files: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], Inherited]:
    """Return the settings of the last of ``files``, each laid over the one before it, and what it inherits."""
    data: dict[str, Any] = {}
    before, sources, bases = data, list[str](), dict[str, dict[str, Any]]()
    for file, own in files.items():
        before, data = data, _overlaid(data, own, file)
        if isinstance(overrides := data.get("overrides"), list):
            sources = [] if "overrides" in own else sources
            sources += [file] * (len(overrides) - len(sources))
        bases[file] = _settings(data)
    *parents, own_file = files
    final = _settings(data)
    changed = {
        file: {path: base.get(path) for path in {**base, **final} if base.get(path) != final.get(path)}
        for file, base in bases.items()
    }
    replaced = [f"{what} of {Path(parents[-1]).name}" for what in _replaced(before, data)] if parents else []
    origins = ["" if file == own_file else file for file in sources]
    return data, Inherited(tuple(replaced), tuple(origins), changed)


def _overlaid(data: dict[str, Any], own: dict[str, Any], file: str) -> dict[str, Any]:
    """Return a file's settings laid over the inherited ones. A budget of another kind replaces theirs."""
    merged = merge(data, own, f"{file}: ")
    if any(value is not None for value in _at(own, BUDGET).values()):
        merged["base"]["training"]["budget"] = _at(own, BUDGET)
    return merged


def _at(data: Any, path: str) -> dict[str, Any]:
    """Return the mapping at a dotted path; {} if there is none."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    return dict(flatten(_at(data, "base"), "base."))


def _replaced(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Yield ``overrides: 1 (training.batch) in place of 2 (training.optimizer.lr; method.shift)``, and the like."""
    for path, old, new in _pairs(before, after):
        if isinstance(old, list) and isinstance(new, list):
            if new[: len(old)] != old:
                yield f"{path}: {_summary(new)} in place of {_summary(old)}"
        elif isinstance(old, list | dict):
            yield f"{path}: {_summary(new)} in place of {_summary(old)}"
        elif path.endswith(".name") and old != new:
            yield f"{path}: {new} in place of {old}{_kept(before, after, path)}"
    old_budget, new_budget = ({k: v for k, v in _at(data, BUDGET).items() if v is not None} for data in (before, after))
    if old_budget and old_budget.keys() != new_budget.keys():
        kinds = [" ".join(f"{kind} {n}" for kind, n in budget.items()) for budget in (new_budget, old_budget)]
        yield f"{BUDGET}: {' in place of '.join(kinds)}"


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, old and new value of every setting that both have; below what is a mapping in both, each alone."""
    for key, value in old.items():
        other = new.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _pairs(value, other, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, other


def _kept(before: dict[str, Any], after: dict[str, Any], path: str) -> str:
    """Return which settings of a model, method or evaluator the one in its place has as well; "" if none.

    An evaluator's margin and weight stand around it.
    """
    place = path.removesuffix(".name")
    around = [place, place.removesuffix(".evaluator")] if place.endswith(".evaluator") else [place]
    both = [(_at(before, where), _at(after, where)) for where in around]
    kept = [key for old, new in both for key in old if key != "evaluator" and key in new and old[key] == new[key]]
    return f", with the same {', '.join(kept)}" if kept else ""


def _summary(items: Any) -> str:
    if isinstance(items, dict):
        return ", ".join(f"{key} {_name(value)}" for key, value in items.items() if not isinstance(value, list))
    if not isinstance(items, list):
        return "none" if items is None else str(items)
    if not any(isinstance(item, dict) for item in items):
        return str(items) if items else "none"
    return f"{len(items)} ({'; '.join(map(_name, items))})"


def _name(item: Any) -> str:
    """Return a case's label, an evaluator's name, or the paths that an override sets."""
    if not isinstance(item, dict):
        return str(item)
    sets = item.get("set")
    return str(item.get("label") or item.get("name") or ", ".join(sets if isinstance(sets, dict) else item))

"""Sweep files as written, with the changes made on the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignbench.config import UserError, decode, did_you_mean, load_chain, merge, parse_assignment, put
from alignbench.digests import content_id
from alignbench.experiment.inheritance import BUDGET, Inherited, inherit
from alignbench.experiment.spec import Sweep

RUN_PARTS = ("backend", "method", "reward", "prompts", "training")


@dataclass(frozen=True)
class Document:
    """Sweep file as written, with the changes made on the command line. Reading it imports no method and no torch."""

    path: str  # as typed
    data: dict[str, Any]
    run_sets: list[tuple[str, Any]] = field(default_factory=list)  # assignments for every run; they override all others
    command: str = ""  # what to type after `alignbench sweep` or `alignbench report`
    rehearsal: bool = False  # tiny models in place of all models: the numbers mean nothing
    inherited: Inherited = field(default_factory=Inherited)
    typed: list[str] = field(default_factory=list)  # settings and axes that the command line sets

    @property
    def name(self) -> str:
        """Name of the manifest and of the report's files."""
        name = str(self.data.get("name", "sweep"))
        limited = isinstance(self.data.get("evaluation"), dict) and self.data["evaluation"].get("limit")
        return f"{name}-SUBSET" if limited else name

    @property
    def manifest(self) -> str:
        """File name of the manifest in ``sweeps/``; it depends on the document alone, not on code or weights."""
        content = {key: value for key, value in self.data.items() if key != "slurm"}
        return f"{self.name}-{content_id([content, self.run_sets])}.json"


def read(path: str, assignments: Sequence[str] = (), seeds: str | None = None, limit: int | None = None) -> Document:
    """Read a sweep file, or a packaged sweep by its name, and apply the command line's changes.

    Raise UserError if it cannot be read, or for an unknown setting on the command line.
    """
    data, inherited = inherit(load_chain(_find(path), sweeps()))
    words = [path, *assignments]
    if seeds is not None:
        assignments = [*assignments, f"grid={{training.seed: [{seeds}]}}"]
        words += ["--seeds", seeds]
    if limit is not None:
        assignments = [*assignments, f"evaluation.limit={limit}"]
        words += ["--limit", str(limit)]
    run_sets, typed = [], list[str]()
    for place, value in map(parse_assignment, assignments):
        place = "training.seed" if place == "seed" else place
        typed.append(place)
        head = place.partition(".")[0].partition("[")[0]
        if head in RUN_PARTS:
            run_sets.append((place, value))
            grid = data.get("grid")
            if isinstance(grid, dict):  # the command line overrides the file: one value replaces the axis
                data = {**data, "grid": {axis: values for axis, values in grid.items() if axis != place}}
        elif head not in Sweep.__struct_fields__:
            known = [*RUN_PARTS, *Sweep.__struct_fields__]
            raise UserError(
                f"command line: {place}: there is no setting '{head}'{did_you_mean(head, known, 'settings')}"
            )
        elif head == "grid":
            axis = place.removeprefix("grid").removeprefix(".")
            grid = {axis: value} if axis else value
            typed += grid if isinstance(grid, dict) else []
            data = merge(data, {"grid": grid}, "command line: ")
        else:
            if place.startswith(f"{BUDGET}.") and value is not None:
                data = put(data, BUDGET, {}, f"command line: {place}")
            data = put(data, place, value, f"command line: {place}")
            if place.startswith("evaluation.protocol."):  # takes precedence over a row's overrides, too
                run_sets.append((place, value))
    return Document(path, data, run_sets, " ".join(words), inherited=inherited, typed=typed)


def decoded(document: Document) -> Sweep:
    """Return the document as a sweep, whose parts are not checked yet. Raise UserError for the first mistake.

    A case that sets more than its method is one: that is an exception without a reason.
    """
    cases = document.data.get("cases")
    for i, case in enumerate(cases if isinstance(cases, list) else []):
        odd = [key for key in case if key in RUN_PARTS and key != "method"] if isinstance(case, dict) else []
        if odd:
            raise UserError(
                f"{document.path}: cases[{i}].{odd[0]}: rows would be unequal; a case has only a label and a method, "
                "exceptions go under 'overrides' with a reason"
            )
    return decode(Sweep, document.data, f"{document.path}: ")


def _find(path: str) -> Path:
    file, packaged = Path(path), sweeps()
    if path in packaged and not file.is_file():
        return packaged[path]
    if not path or not (file.suffix or len(file.parts) > 1 or file.exists()):
        known = did_you_mean(path, packaged, "packaged sweeps")
        raise UserError(f"{path or repr(path)}: there is no such file, and no packaged sweep of this name{known}")
    return file


def sweeps() -> dict[str, Path]:
    """Return the packaged sweep files by name."""
    spec = importlib.util.find_spec("alignbench.sweeps")
    folders = (spec and spec.submodule_search_locations) or []
    return {file.stem: file for folder in folders for file in sorted(Path(folder).glob("*.yaml"))}

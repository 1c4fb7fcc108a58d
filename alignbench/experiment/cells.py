"""Planned runs: one per case and point of the grid, with all settings resolved."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignbench.config import (
    UserError,
    decode,
    did_you_mean,
    is_path,
    join,
    parse_assignment,
    pick,
    put,
    settings,
)
from alignbench.digests import content_id
from alignbench.evaluator import Evaluator, Term
from alignbench.experiment.document import RUN_PARTS, Document
from alignbench.experiment.ids import Parts, build
from alignbench.experiment.spec import (
    Override,
    Protocol,
    RewardSettings,
    RunSpec,
    Sweep,
    Training,
)
from alignbench.method import AlignMethod
from alignbench.plugins import Builder, Registry
from alignbench.store.manifest import (
    UNTRAINED,
)

CELL_PARTS = (*RUN_PARTS, "evaluation")
SAMPLER = ("steps", "guidance", "weights", "tuned_steps")  # protocol settings that may differ between rows


@dataclass(frozen=True)
class PlannedRun:
    """Run of a sweep. ``seed``: training seed, or UNTRAINED. ``notes``: the overrides that apply, with reasons."""

    spec: RunSpec
    seed: int
    protocol: Protocol
    parts: Parts  # shared by all cells with the same settings: for queries only, never to be run
    notes: list[dict[str, Any]] = field(default_factory=list)
    overrides: tuple[int, ...] = ()  # indices of the overrides in ``notes``
    published: bool = False  # True for published weights, whose training is unknown
    id: str = ""  # id of the weights: the name of the run's folder in runs/
    images: str = ""  # id of its image set
    base: str = ""  # id of the untrained model's image set under the same protocol
    milestones: tuple[tuple[int, str], ...] = ()  # (update, id of its image set)

    @property
    def backend(self) -> Any:
        return self.parts.backend

    @property
    def method(self) -> AlignMethod:
        return self.parts.method

    @property
    def rewards(self) -> tuple[Term, ...]:
        return self.parts.rewards

    @property
    def trains(self) -> bool:
        return self.seed != UNTRAINED

    @property
    def title(self) -> str:
        return f"{self.spec.label}, seed {self.seed}" if self.trains else self.spec.label


def cells_of(sweep: Sweep, document: Document, builder: Builder) -> list[PlannedRun]:
    """Return every run of a sweep, without ids. Raise UserError for the first wrong setting."""
    cells = [cell for index, _ in enumerate(sweep.cases) for cell in _case(sweep, document, index, builder)]
    _refuse_duplicates(cells, document.path)
    _refuse_unused(sweep, document, cells, builder.registry)
    return cells


def _case(sweep: Sweep, document: Document, index: int, builder: Builder) -> Iterator[PlannedRun]:
    """Yield the cells of a case: one per point of the grid, or a single one if its method trains nothing.

    The grid comes before overrides, which may match its values, and again after them, so that a row has what its label
    says; the command line comes last.
    """
    where, case = document.path, sweep.cases[index]
    method = builder.make("method", case.method, f"{where}: cases[{index}].method")
    evaluation = {"protocol": settings(sweep.evaluation.protocol)}
    raw = {**settings(sweep.base), "method": settings(method), "evaluation": evaluation}
    raw = {part: _complete(part, raw[part], builder, f"{where}: base") for part in CELL_PARTS}
    axes = sweep.grid if method.trains else {}
    for values in itertools.product(*axes.values()):
        run, label, own, applied = raw, case.label, dict[str, Any](), dict[int, dict[str, Any]]()
        for axis, value in zip(axes, values):
            run = _set(run, axis, value, builder, f"{where}: grid")
            own[axis] = pick(run, axis)
            label += "" if axis == "training.seed" else f", {axis.rpartition('.')[2]}={value}"
        for i, override in enumerate(sweep.overrides):
            if matches(override.match, label, run, method.trains, f"{where}: overrides[{i}].match"):
                run = _override(run, override, builder, f"{where}: overrides[{i}]")
                applied[i] = {axis: pick(run, axis) for axis in override.set}
        for axis, value in own.items():
            run = _set(run, axis, value, builder, f"{where}: grid") if _value(run, axis) != value else run
        if odd := [axis for axis, value in own.items() if _value(run, axis) != value]:
            raise UserError(f"{where}: grid: {odd[0]}: another axis sets the same; keep one of them")
        for axis, value in document.run_sets:
            if not axis.startswith("method.") or axis.split(".")[1] in method.__struct_fields__:
                run = _set(run, axis, value, builder, "command line", CELL_PARTS)
        protocol = decode(Protocol, run["evaluation"]["protocol"], f"{where}: evaluation.protocol")
        parts = {part: run[part] for part in RUN_PARTS}
        spec = decode(RunSpec, {"label": label, **parts}, f"{where}: cases[{index}]")
        seed = spec.training.seed if method.trains else UNTRAINED
        notes = dict(_notes(sweep, document, run, applied))
        yield PlannedRun(spec, seed, protocol, build(spec, builder), [*notes.values()], tuple(notes))


def _notes(
    sweep: Sweep, document: Document, run: dict[str, Any], applied: dict[int, dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the overrides that apply to a run, by index, with the settings that hold there: others were set again."""
    for i, values in applied.items():
        override, origin = sweep.overrides[i], document.inherited.origin(i)
        held = {axis: override.set[axis] for axis, value in values.items() if _value(run, axis) == value}
        if held:
            yield i, {"set": held, "reason": override.reason, **({"origin": origin} if origin else {})}


def _value(run: dict[str, Any], axis: str) -> Any:
    """Return a setting of a run; a run of another method or backend may lack it."""
    try:
        return pick(run, axis)
    except KeyError:
        return None


def _override(run: dict[str, Any], override: Override, builder: Builder, where: str) -> dict[str, Any]:
    if not override.reason.strip():
        unequal = [
            axis for axis in override.set if override.match and axis.startswith(("training.batch", "training.budget"))
        ]
        what = f"{unequal[0]} would be unequal between rows" if unequal else "an exception needs a reason"
        raise UserError(f"{where}: {what}; say why with 'reason: ...', which the report prints")
    for axis, value in override.set.items():
        if axis.startswith("evaluation") and axis.removeprefix("evaluation.protocol.") not in SAMPLER:
            allowed = ", ".join(f"evaluation.protocol.{name}" for name in SAMPLER)
            what = "must be the same for every row, or images cannot be paired"
            raise UserError(f"{where}.set: {axis}: {what}; choose from {allowed}")
        run = _set(run, axis, value, builder, f"{where}.set", CELL_PARTS)
    return run


def _set(
    run: dict[str, Any], axis: str, value: Any, builder: Builder, where: str, parts: Sequence[str] = RUN_PARTS
) -> dict[str, Any]:
    """Return ``run`` with one setting of its ``parts`` changed and checked, so that an error names that setting."""
    if not is_path(axis):
        raise UserError(f"{where}: {axis!r} is not a setting's path; write, for instance, training.batch")
    head = axis.partition(".")[0].partition("[")[0]
    if head not in parts:
        raise UserError(f"{where}: {axis}: a run has no such setting{did_you_mean(head, parts, 'settings')}")
    if axis.startswith("training.budget.") and value is not None:  # exactly one is set: another kind replaces it
        run = put(run, "training.budget", {}, where)
    changed = put(run, axis, value, f"{where}: {axis}")
    return changed | {head: _complete(head, changed[head], builder, f"{where}: ")}


def _complete(part: str, raw: Any, builder: Builder, where: str) -> Any:
    """Return one part of a run, strictly decoded and with defaults filled in."""
    place = join(where, part)
    if part in ("backend", "method"):
        return settings(builder.make(part, raw, place))  # type: ignore[arg-type]  # both are kinds
    if part == "reward":
        return _complete_reward(raw, builder, place)
    if part == "training":
        return settings(decode(Training, raw, place))
    if part == "evaluation":
        return {"protocol": settings(decode(Protocol, raw["protocol"], join(place, "protocol")))}
    return raw


def _complete_reward(raw: Any, builder: Builder, where: str) -> Any:
    if not isinstance(raw, list):
        return _complete_term(raw, builder, where)
    if not raw:
        raise UserError(f"{where}: the list is empty; give at least one evaluator")
    return [_complete_term(part, builder, f"{where}[{i}]") for i, part in enumerate(raw)]


def _complete_term(raw: Any, builder: Builder, where: str) -> dict[str, Any]:
    reward = decode(RewardSettings, raw, where)
    evaluator = builder.make("evaluator", reward.evaluator, join(where, "evaluator"))
    if type(evaluator).reward is Evaluator.reward:
        place = join(where, "evaluator")
        raise UserError(f"{place}: {evaluator.name} gives scores but no reward; choose an evaluator with a reward")
    return {**settings(reward), "evaluator": settings(evaluator)}


def matches(match: dict[str, Any], label: str, run: dict[str, Any], trains: bool, where: str) -> bool:
    """Return whether a run fits ``{method: refl, training.seed: 1}``. ``method``: a method's name or a row's label.

    A run that trains nothing has no seed.
    """
    if not trains and match.keys() & {"seed", "training.seed"}:
        return False
    return all(_matches_one(key, value, label, run, where) for key, value in match.items())


def _matches_one(key: str, value: Any, label: str, run: dict[str, Any], where: str) -> bool:
    if key in ("method", "label"):
        return value in (run["method"]["name"], label) if key == "method" else value == label
    try:
        return pick(run, "training.seed" if key == "seed" else key) == value
    except KeyError:
        if key.partition(".")[0] in RUN_PARTS:
            return False  # another method's setting
        raise UserError(f"{where}: a run has no '{key}'; use method, label, seed, or a setting's path") from None


def select(cells: Iterable[PlannedRun], patterns: Sequence[str]) -> list[PlannedRun]:
    """Return the cells that ``--only 'method=refl' '!seed=2'`` selects: any value per key, all keys, no ``!pattern``.

    Raise UserError if no cell is left.
    """
    wanted: dict[str, list[Any]] = {}
    unwanted = []
    for pattern in patterns:
        key, value = parse_assignment(pattern.removeprefix("!"))
        if pattern.startswith("!"):
            unwanted.append((key, value))
        else:
            wanted.setdefault(key, []).append(value)

    def fits(cell: PlannedRun, key: str, value: Any) -> bool:
        if key in ("seed", "training.seed"):
            return cell.seed == value
        return _matches_one(key, value, cell.spec.label, settings(cell.spec), "--only")

    cells = list(cells)
    chosen = [
        cell
        for cell in cells
        if all(any(fits(cell, key, value) for value in values) for key, values in wanted.items())
        and not any(fits(cell, key, value) for key, value in unwanted)
    ]
    if not chosen:
        labels = ", ".join(dict.fromkeys(cell.spec.label for cell in cells))
        hint = "; settings to change go before --only" if len(patterns) > 1 else ""
        raise UserError(f"--only {' '.join(patterns)}: matches no run (rows: {labels}){hint}")
    return chosen


def distinct(cells: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return one of each group of cells that differ only in the seed: checks of one hold for the others."""
    return list({_but_seed(cell): cell for cell in cells}.values())


def _but_seed(cell: PlannedRun) -> str:
    plain = settings(cell.spec) | {"protocol": settings(cell.protocol)}
    return content_id(plain | {"training": plain["training"] | {"seed": 0}})


def _refuse_duplicates(cells: Sequence[PlannedRun], where: str) -> None:
    seen = set[tuple[str, int]]()
    for cell in cells:
        name = " ".join(cell.spec.label.split()), cell.seed  # as tables show it
        if name in seen:
            raise UserError(f"{where}: two runs are called '{cell.title}'; give each case its own label")
        seen.add(name)


def _refuse_unused(sweep: Sweep, document: Document, cells: Sequence[PlannedRun], registry: Registry) -> None:
    """Raise UserError for a setting that reaches no run: it is a typo, or something else takes precedence."""
    labels = [case.label for case in sweep.cases]
    for i, override in enumerate(sweep.overrides):
        where = f"{document.path}: overrides[{i}]"
        for key in {"method", "label"} & override.match.keys():
            known = [*labels, *(registry.names("method") if key == "method" else [])]
            if (value := override.match[key]) not in known:
                raise UserError(f"{where}.match.{key}: there is no '{value}'{did_you_mean(str(value), known)}")
        if not override.set:
            raise UserError(f"{where}.set: sets nothing; give a setting's path and its value, or remove the override")
        if document.rehearsal or _typed(override, document):
            continue
        if document.inherited.source(i):  # it may match rows that this sweep lacks
            _refuse_beaten(i, override, document, cells)
        elif not _reaches(i, override, cells):
            what = "no run matches it, or none that it changes" if override.match else "no run uses it"
            what = f"reaches no run: {what}, or the grid or a later override sets the same"
            raise UserError(f"{where}: {what}; correct it, or remove it")
    for axis, _ in document.run_sets:
        fields = {name for cell in cells for name in cell.spec.method if name != "name"}
        own = axis.partition(".")[2].partition(".")[0]
        if axis.startswith("method.") and own not in fields:
            raise UserError(
                f"command line: {axis}: no method of this sweep has it{did_you_mean(own, sorted(fields), 'settings')}"
            )


def _reaches(i: int, override: Override, cells: Sequence[PlannedRun]) -> bool:
    """Return whether an override determines a run. Those that train nothing use their model and evaluation alone."""
    untrained = any(axis.startswith(("backend", "method", "evaluation")) for axis in override.set)
    return any(i in cell.overrides and (cell.trains or untrained) for cell in cells)


def _typed(override: Override, document: Document) -> bool:
    """Return whether the command line changes what the override matches or sets: then it may reach no run."""
    keys = {"training.seed" if key == "seed" else key for key in [*override.match, *override.set]}
    keys |= {"cases"} if keys & {"method", "label"} else set()
    pairs = itertools.product(keys, document.typed)
    return any(_covers(key, place) or _covers(place, key) for key, place in pairs)


def _covers(path: str, other: str) -> bool:
    return f"{other}.".startswith((f"{path}.", f"{path}["))


def _refuse_beaten(i: int, override: Override, document: Document, cells: Sequence[PlannedRun]) -> None:
    """Raise UserError if an inherited override leaves no run with a value that this sweep's ``base`` sets anew."""
    file = document.inherited.source(i)
    anew = [axis for axis in override.set if f"base.{axis}" in document.inherited.changed[file]]
    trained = [settings(cell.spec) for cell in cells if cell.trains]
    for axis in anew if any(i in cell.overrides for cell in cells if cell.trains) else ():
        value = _value(document.data["base"], axis)
        if value is not None and all(_value(run, axis) != value for run in trained):
            what = f"reaches no run, since an override of {file} sets it"
            remedy = "set it in one of your own (overrides+: ...), with a reason"
            raise UserError(f"{document.path}: base.{axis}: {what}; {remedy}")

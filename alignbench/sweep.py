"""From a sweep file to its cells: every run with all settings resolved, its ids, and what was overridden and why.

Everything that can be wrong is found here, before any model is loaded.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec import structs

from alignbench import hinge, slurm, weights
from alignbench import prompts as prompt_lists
from alignbench.config import (
    Config,
    Missing,
    Requirement,
    UserError,
    decode,
    did_you_mean,
    join,
    load_yaml,
    merge,
    parse_assignment,
    pick,
    put,
    settings,
)
from alignbench.digests import content_id
from alignbench.evaluator import Evaluator, Term
from alignbench.manifest import (
    UNTRAINED,
    Manifest,
    ManifestMetric,
    ManifestMilestone,
    ManifestNote,
    ManifestRun,
    ManifestScore,
)
from alignbench.method import AlignMethod
from alignbench.plugins import NAME, Builder, Registry
from alignbench.prompts import Prompt
from alignbench.spec import (
    BASE,
    Evaluation,
    Override,
    Parts,
    Protocol,
    RewardSettings,
    RunSpec,
    Sweep,
    Training,
    base_of,
    build,
    check_weights,
    evaluator_content,
    image_set_id,
    run_id,
)

# -- roles ------------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """One evaluator of a sweep, and the file of its scores below ``scores/<image set>/``."""

    settings: dict[str, Any]
    name: str
    version: str
    file: str
    metrics: list[dict[str, Any]]
    role: str  # "train", "held-out" or "check"
    base: str | None = None  # of a paired evaluator: the image set that it compares with, as filled in for a cell


# -- document ---------------------------------------------------------------------------------------------------------


RUN_PARTS = ("backend", "method", "reward", "prompts", "training")


@dataclass(frozen=True)
class Document:
    """A sweep file as written, with what the command line changed. Reading it imports no method and no torch."""

    path: str  # as typed
    data: dict[str, Any]
    run_sets: list[tuple[str, Any]] = field(default_factory=list)  # assignments that hold for every run, last of all
    command: str = ""  # what to type after `alignbench sweep` or `alignbench report`
    rehearsal: bool = False  # small stand-ins for all models: no number means anything

    @property
    def name(self) -> str:
        """Of the manifest and of the report's files."""
        name = str(self.data.get("name", "sweep"))
        limited = isinstance(self.data.get("evaluation"), dict) and self.data["evaluation"].get("limit")
        return f"{name}-SUBSET" if limited else name

    @property
    def manifest(self) -> str:
        """File name of the manifest below ``sweeps/``: the same for the same document, whatever stands behind it."""
        made = {key: value for key, value in self.data.items() if key != "slurm"}
        return f"{self.name}-{content_id([made, self.run_sets])}.json"


def read(path: str, assignments: Sequence[str] = (), seeds: str | None = None, limit: int | None = None) -> Document:
    """A sweep file, or a packaged one by its name, with command-line changes. UserError if it cannot be read."""
    data = load_yaml(_find(path), sweeps())
    words = [path, *assignments]
    if seeds is not None:
        assignments = [*assignments, f"grid={{training.seed: [{seeds}]}}"]
        words += ["--seeds", seeds]
    if limit is not None:
        assignments = [*assignments, f"evaluation.limit={limit}"]
        words += ["--limit", str(limit)]
    run_sets = []
    for place, value in map(parse_assignment, assignments):
        place = "training.seed" if place == "seed" else place
        head = place.partition(".")[0].partition("[")[0]
        if head in RUN_PARTS:
            run_sets.append((place, value))
            grid = data.get("grid")
            if isinstance(grid, dict):  # the command line beats the file: one value instead of the axis
                data = {**data, "grid": {axis: values for axis, values in grid.items() if axis != place}}
        elif head not in Sweep.__struct_fields__:
            known = [*RUN_PARTS, *Sweep.__struct_fields__]
            raise UserError(
                f"command line: {place}: there is no setting '{head}'{did_you_mean(head, known, 'settings')}"
            )
        elif head == "grid":
            axis = place.removeprefix("grid").removeprefix(".")
            data = merge(data, {"grid": {axis: value} if axis else value})
        else:
            data = put(data, place, value, "command line")
            if place.startswith("evaluation.protocol."):  # beats the overrides of single rows, too
                run_sets.append((place, value))
    return Document(path, data, run_sets, " ".join(words))


def _find(path: str) -> Path:
    packaged = sweeps().get(path)
    return packaged if packaged and not Path(path).is_file() else Path(path)


def sweeps() -> dict[str, Path]:
    """The packaged sweep files by name."""
    found = importlib.util.find_spec("alignbench.sweeps")
    folders = (found and found.submodule_search_locations) or []
    return {file.stem: file for folder in folders for file in sorted(Path(folder).glob("*.yaml"))}


# -- cells ------------------------------------------------------------------------------------------------------------


CELL_PARTS = (*RUN_PARTS, "evaluation")
SAMPLER = ("steps", "guidance", "weights", "tuned_steps")  # what of the protocol a row may have of its own


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. ``seed``: of training, or UNTRAINED. ``notes``: the overrides that apply, with reasons."""

    spec: RunSpec
    seed: int
    protocol: Protocol
    parts: Parts  # built, and shared with every cell that has the same settings: to be asked, not to be run
    notes: list[dict[str, Any]] = field(default_factory=list)
    published: bool = False  # are its weights somebody else's, with training of which nothing is known?
    id: str = ""  # of the weights: the name of its folder below runs/
    images: str = ""  # id of its image set
    base: str = ""  # id of the image set that the untrained model makes in the same way
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


def cells_of(sweep: Sweep, document: Document, builder: Builder) -> list[Cell]:
    """Return every run of a sweep, without ids. Raise UserError for the first setting that is wrong."""
    cells = [cell for index, _ in enumerate(sweep.cases) for cell in _case(sweep, document, index, builder)]
    _refuse_twins(cells, document.path)
    _refuse_idle(sweep, document, cells, builder.registry)
    return cells


def _case(sweep: Sweep, document: Document, index: int, builder: Builder) -> Iterator[Cell]:
    """Yield the cells of one case: one per point of the grid, or a single one if its method trains nothing."""
    where, case = document.path, sweep.cases[index]
    method = builder.make("method", case.method, f"{where}: cases[{index}].method")
    evaluation = {"protocol": settings(sweep.evaluation.protocol)}
    raw = {**settings(sweep.base), "method": settings(method), "evaluation": evaluation}
    raw = {part: _complete(part, raw[part], builder, f"{where}: base") for part in CELL_PARTS}
    axes = sweep.grid if method.trains else {}
    for values in itertools.product(*axes.values()):
        run, label, notes = raw, case.label, []
        for axis, value in zip(axes, values):
            run = _set(run, axis, value, builder, f"{where}: grid")
            label += "" if axis == "training.seed" else f", {axis.rpartition('.')[2]}={value}"
        for i, override in enumerate(sweep.overrides):
            if matches(override.match, label, run, f"{where}: overrides[{i}].match"):
                run = _override(run, override, builder, f"{where}: overrides[{i}]")
                notes.append({"set": override.set, "reason": override.reason})
        for axis, value in document.run_sets:
            if not axis.startswith("method.") or axis.split(".")[1] in method.__struct_fields__:
                run = _set(run, axis, value, builder, "command line", CELL_PARTS)
        protocol = decode(Protocol, run["evaluation"]["protocol"], f"{where}: evaluation.protocol")
        own = {part: run[part] for part in RUN_PARTS}
        spec = decode(RunSpec, {"label": label, **own}, f"{where}: cases[{index}]")
        seed = spec.training.seed if method.trains else UNTRAINED
        yield Cell(spec, seed, protocol, build(spec, builder), notes)


def _override(run: dict[str, Any], override: Override, builder: Builder, where: str) -> dict[str, Any]:
    if not override.reason.strip():
        unequal = [
            axis for axis in override.set if override.match and axis.startswith(("training.batch", "training.budget"))
        ]
        what = f"{unequal[0]} would be unequal between rows" if unequal else "an exception needs its reason"
        raise UserError(f"{where}: {what}; say why with 'reason: ...', the report prints it")
    for axis, value in override.set.items():
        if axis.startswith("evaluation") and axis.removeprefix("evaluation.protocol.") not in SAMPLER:
            own = ", ".join(f"evaluation.protocol.{name}" for name in SAMPLER)
            raise UserError(f"{where}.set: {axis}: all rows share it, or their images are no pairs; choose of {own}")
        run = _set(run, axis, value, builder, f"{where}.set", CELL_PARTS)
    return run


def _set(
    run: dict[str, Any], axis: str, value: Any, builder: Builder, where: str, parts: Sequence[str] = RUN_PARTS
) -> dict[str, Any]:
    """Return ``run`` with one setting of its ``parts`` changed, checked at once, so that an error names the culprit."""
    head = axis.partition(".")[0].partition("[")[0]
    if head not in parts:
        raise UserError(f"{where}: {axis}: a run has no such setting{did_you_mean(head, parts, 'settings')}")
    changed = put(run, axis, value, f"{where}: {axis}")
    return changed | {head: _complete(head, changed[head], builder, f"{where}: ")}


def _complete(part: str, raw: Any, builder: Builder, where: str) -> Any:
    """Return one part of a run decoded strictly and written out again, defaults included."""
    place = join(where, part)
    if part in ("backend", "method"):
        return settings(builder.make(part, raw, place))  # type: ignore[arg-type]  # one of the two
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
        known = join(where, "evaluator")
        raise UserError(f"{known}: {evaluator.name} scores for tables alone; choose an evaluator that gives a reward")
    return {**settings(reward), "evaluator": settings(evaluator)}


def matches(match: dict[str, Any], label: str, run: dict[str, Any], where: str) -> bool:
    """Does a run fit ``{method: refl, training.seed: 1}``? ``method`` is a method's name or a row's label."""
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


def select(cells: Iterable[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that ``--only 'method=refl' '!seed=2'`` means: any value of a key, all keys, and no ``!pattern``."""
    wanted: dict[str, list[Any]] = {}
    unwanted = []
    for pattern in patterns:
        key, value = parse_assignment(pattern.removeprefix("!"))
        if pattern.startswith("!"):
            unwanted.append((key, value))
        else:
            wanted.setdefault(key, []).append(value)

    def fits(cell: Cell, key: str, value: Any) -> bool:
        if key in ("seed", "training.seed"):
            return cell.seed == value
        return _matches_one(key, value, cell.spec.label, settings(cell.spec), "--only")

    cells = list(cells)
    found = [
        cell
        for cell in cells
        if all(any(fits(cell, key, value) for value in values) for key, values in wanted.items())
        and not any(fits(cell, key, value) for key, value in unwanted)
    ]
    if not found:
        labels = ", ".join(dict.fromkeys(cell.spec.label for cell in cells))
        hint = "; settings to change go before --only" if len(patterns) > 1 else ""
        raise UserError(f"--only {' '.join(patterns)}: matches no run (rows: {labels}){hint}")
    return found


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """Return one of the cells that differ in the seed alone: what can be checked of one holds for the others."""
    return list({_but_seed(cell): cell for cell in cells}.values())


def _but_seed(cell: Cell) -> str:
    plain = settings(cell.spec) | {"protocol": settings(cell.protocol)}
    return content_id(plain | {"training": plain["training"] | {"seed": 0}})


def _refuse_twins(cells: Sequence[Cell], where: str) -> None:
    seen = set[tuple[str, int]]()
    for cell in cells:
        if (cell.spec.label, cell.seed) in seen:
            raise UserError(f"{where}: two runs are called '{cell.title}'; give each case its own label")
        seen.add((cell.spec.label, cell.seed))


def _refuse_idle(sweep: Sweep, document: Document, cells: Sequence[Cell], registry: Registry) -> None:
    """A setting that reaches no run is a typing mistake; a known method that this sweep leaves out is none."""
    labels = [case.label for case in sweep.cases]
    for i, override in enumerate(sweep.overrides):
        for key in {"method", "label"} & override.match.keys():
            known = [*labels, *(registry.names("method") if key == "method" else [])]
            if (value := override.match[key]) not in known:
                where = f"{document.path}: overrides[{i}].match.{key}"
                raise UserError(f"{where}: there is no '{value}'{did_you_mean(str(value), known)}")
    for axis, _ in document.run_sets:
        fields = {name for cell in cells for name in cell.spec.method if name != "name"}
        own = axis.partition(".")[2].partition(".")[0]
        if axis.startswith("method.") and own not in fields:
            raise UserError(
                f"command line: {axis}: no method of this sweep has it{did_you_mean(own, sorted(fields), 'settings')}"
            )


# -- checks -----------------------------------------------------------------------------------------------------------


def load(name: str, where: str) -> list[Prompt]:
    """A prompt list, or UserError with the place that names it."""
    return prompt_lists.load_prompts(name, where)


def check_settings(cell: Cell, where: str) -> None:
    """Raise UserError for settings that cannot work, as a batch without whole groups, a reward without gradient."""
    method, training = cell.method, cell.spec.training
    if not method.trains:
        return
    differentiable = all(term.evaluator.differentiable for term in cell.rewards)
    for size in _micro_batches(training):
        prefixed(where, method.check, size, differentiable)
    check_weights(training.optimizer, cell.spec.backend, where)


def check_run(cell: Cell, where: str) -> None:
    """Raise UserError for what fails before a model is loaded: weights, prompts, a model that has no score."""
    backend, method = cell.parts[:2]
    prefixed(where, backend.files)
    prefixed(where, method.files)
    if not method.trains:
        return
    if method.stochastic and (why := getattr(backend, "deterministic", None)):
        raise UserError(
            f"{where}: method.name: {method.name} samples by an SDE, and {why}; "
            "choose a model that is not distilled, or a method that follows the ODE"
        )
    prompts = load(cell.spec.prompts, f"{where}: prompts")
    _check_prompts(cell.spec.prompts, prompts, backend)
    for evaluator, margin, _ in cell.rewards:
        prefixed(where, evaluator.files)
        prefixed(where, evaluator.check, prompts)
        if why := hinge.impossible(margin, evaluator.reward_range):
            raise UserError(f"{where}: reward.margin: {evaluator.name}: {why}")


def check_evaluation(cell: Cell, evaluation: Evaluation, where: str) -> None:
    """Raise UserError for what would fail when a run's images are made."""
    protocol, training = cell.protocol, cell.spec.training
    if protocol.tuned_steps is not None and protocol.tuned_steps > protocol.steps:
        raise UserError(
            f"{where}: {cell.spec.label}: evaluation.protocol.tuned_steps: {protocol.tuned_steps} are more than "
            f"the sampler's {protocol.steps} steps; choose 1 to {protocol.steps}"
        )
    if cell.trains and protocol.weights == "ema" and training.optimizer.ema is None:
        raise UserError(
            f"{where}: evaluation.protocol.weights: 'ema', but {cell.spec.label} keeps no average "
            "(training.optimizer.ema is off); choose last"
        )
    if hasattr(cell.backend, "check_size"):
        cell.backend.check_size(protocol.size, f"{where}: evaluation.protocol.size")
    prompts = load(protocol.prompts, f"{where}: evaluation.protocol.prompts")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        what = f"{protocol.prompts} repeats prompts, whose pictures would count more than once"
        raise UserError(f"{where}: evaluation.protocol.prompts: {what}; choose a list for evaluation")
    _check_prompts(protocol.prompts, prompts[: evaluation.limit], cell.backend)


def prefixed(where: str, check: Callable[..., Any], *arguments: Any) -> None:
    """Run ``check``; put ``where`` before what its UserError says."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _micro_batches(training: Training) -> set[int]:
    """Sizes of the micro-batches on one rank."""
    size = min(training.micro_batch or training.batch, training.batch)
    return {size, training.batch % size or size}


def _check_prompts(name: str, prompts: list[Prompt], backend: Any) -> None:
    """The model can read every prompt: by its own rule, and its text encoders' tokenizers can spell it."""
    if hasattr(backend, "check_prompts"):
        backend.check_prompts(prompts, str(prompt_lists.locate(name, "prompts")))
    files = [path for path in backend.files() if path.name == "tokenizer.json"]
    prompt_lists.check_vocabulary(prompts, name, files)


# -- plan -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: what its manifest says, and what workers get."""

    document: Document
    evaluation: Evaluation
    evaluators: list[Evaluator]  # those of the evaluation, built
    cells: list[Cell]
    scores: list[Score]
    prompts: list[Prompt]  # of the evaluation
    training_evaluator: str

    def scored(self, cell: Cell) -> list[Score]:
        """The evaluators for one cell; the base model's pictures are part of the name of a paired one's file."""
        return [
            score
            if score.base is None
            else score._replace(base=cell.base, file=score.file.replace(".parquet", f"-{cell.base}.parquet"))
            for score in self.scores
        ]

    def manifest(self, plugins: Sequence[str] = ()) -> Manifest:
        """Return what a report is made from, without methods, evaluators or torch. ``plugins``: as typed."""
        return Manifest(
            name=self.document.name,
            sweep=self.document.command,
            world=self.cells[0].spec.backend.get("model"),
            training_evaluator=self.training_evaluator,
            protocol=settings(self.evaluation.protocol),
            subset=self.evaluation.limit,
            milestone_prompts=self.evaluation.milestone_prompts,
            rehearsal=self.document.rehearsal,
            prompts=len(self.prompts),
            cases=list(dict.fromkeys(cell.spec.label for cell in self.cells)),
            runs=[self._run(cell) for cell in self.cells],
            plugins=list(plugins),
        )

    def _run(self, cell: Cell) -> ManifestRun:
        return ManifestRun(
            id=cell.id,
            label=cell.spec.label,
            method=cell.spec.method["name"],
            seed=cell.seed,
            published=cell.published,
            settings=settings(cell.spec),
            protocol=settings(cell.protocol),
            notes=[ManifestNote(**note) for note in cell.notes],
            images=cell.images,
            scores=self._scores(cell, cell.images),
            milestones=[
                ManifestMilestone(update, images, self._scores(cell, images)) for update, images in cell.milestones
            ],
        )

    def _scores(self, cell: Cell, images: str) -> list[ManifestScore]:
        """Return those of one of the cell's image sets."""
        return [
            ManifestScore(
                evaluator=score.name,
                settings=score.settings,
                version=score.version,
                file=f"scores/{images}/{score.file}",
                metrics=[ManifestMetric(**metric) for metric in score.metrics],
                role=score.role,
                base=score.base or None,
            )
            for score in self.scored(cell)
        ]


class Draft(NamedTuple):
    """A sweep as far as it can be known without a file of any model or prompt list: its cells have no ids."""

    document: Document
    sweep: Sweep
    cells: list[Cell]
    evaluators: list[Evaluator]  # those of the evaluation, built
    builder: Builder


def draft(document: Document, registry: Registry) -> Draft:
    """Every cell, its settings checked. UserError for the first thing that is wrong, with its place."""
    where, builder = document.path, Builder(registry)
    _refuse_case_settings(document)
    sweep = decode(Sweep, document.data, f"{where}: ")
    cells = cells_of(sweep, document, builder)
    slurm.check_options(sweep.slurm, f"{where}: slurm", registry)
    for cell in distinct(cells):
        check_settings(cell, f"{where}: {cell.spec.label}")
    evaluators = [
        builder.make("evaluator", plain, f"{where}: evaluation.evaluators[{i}]")
        for i, plain in enumerate(sweep.evaluation.evaluators)
    ]
    return Draft(document, sweep, cells, evaluators, builder)


def resolve(document: Document, registry: Registry) -> Plan:
    """Every cell with its ids. UserError for the first thing that is wrong, with its place; no model is loaded."""
    return completed(draft(document, registry))


def completed(draft: Draft) -> Plan:
    """Return the plan of a draft whose files are all there. Raise UserError for the first that is not, or is wrong."""
    document, sweep, cells, evaluators, builder = draft
    where, evaluation = document.path, sweep.evaluation
    prompts = load(evaluation.protocol.prompts, f"{where}: evaluation.protocol.prompts")[: evaluation.limit]
    for cell in distinct(cells):
        check_run(cell, f"{where}: {cell.spec.label}")
        check_evaluation(cell, evaluation, where)
    scores = _scores(draft, prompts)
    fewer = prompts[: evaluation.at_milestones.limit]
    cells = [identify(cell, prompts, builder, fewer) for cell in cells]
    names = dict.fromkeys(evaluator.name for evaluator in _trained_on(cells))
    return Plan(document, evaluation, evaluators, cells, scores, prompts, ", ".join(names))


def missing(draft: Draft) -> list[Requirement]:
    """All that has to be fetched before the sweep can start, each once; UserError for what no command mends."""
    found: list[Requirement] = []
    for cell in distinct(draft.cells):
        found += [*_absent(cell.backend), *_absent(cell.method)]
        if cell.trains:
            found += _raised(load, cell.spec.prompts, f"{cell.spec.label}: prompts")
            found += [need for term in cell.rewards for need in _absent(term.evaluator)]
    found += _raised(load, draft.sweep.evaluation.protocol.prompts, "evaluation.protocol.prompts")
    found += [need for evaluator in draft.evaluators for need in _absent(evaluator)]
    return list({need.command: need for need in found}.values())


def _absent(part: Config) -> list[Requirement]:
    """Return what ``part`` lacks. Raise UserError if all is there, and cannot be used."""
    return weights.absent(part) or _raised(part.files)  # type: ignore[attr-defined]  # all three kinds have it


def _raised(check: Callable[..., Any], *arguments: Any) -> list[Requirement]:
    """Return what ``check`` raises for: plug-ins, and lists of prompts, say only so that something is missing."""
    try:
        check(*arguments)
    except Missing as error:
        if error.requirement is None:
            raise
        return [error.requirement]
    return []


def warnings_of(plan: Plan) -> list[str]:
    """What will run, and yet is hardly meant; each once."""
    found = dict[str, None]()
    for evaluator, margin, _ in (term for cell in plan.cells if cell.trains for term in cell.rewards):
        if why := hinge.pointless(margin, evaluator.reward_range):
            found[f"{plan.document.path}: reward.margin: {evaluator.name}: {why}"] = None
    return list(found)


def _refuse_case_settings(document: Document) -> None:
    """A case that sets more than its method would be an exception without a reason."""
    cases = document.data.get("cases")
    for i, case in enumerate(cases if isinstance(cases, list) else []):
        odd = [key for key in case if key in RUN_PARTS and key != "method"] if isinstance(case, dict) else []
        if odd:
            raise UserError(
                f"{document.path}: cases[{i}].{odd[0]}: rows would be unequal; a case has a label and a method, "
                "an exception stands under 'overrides' with its reason"
            )


def identify(
    cell: Cell, prompts: Sequence[Prompt], builder: Builder, at_milestones: Sequence[Prompt] | None = None
) -> Cell:
    """Return ``cell`` with the ids of its weights and of its images. ``at_milestones``: None for all prompts."""
    training_prompts = load(cell.spec.prompts, "prompts") if cell.trains else []
    name = f"{cell.spec.method['name']}-{run_id(cell.spec, cell.parts, builder.registry, training_prompts)}"
    images = image_set_id(name, cell.trains, cell.protocol, prompts)
    fewer = prompts if at_milestones is None else at_milestones
    milestones = tuple(
        (update, image_set_id(name, True, cell.protocol, fewer, update))
        for update in (cell.spec.training.milestones if cell.trains else ())
    )
    published = not cell.trains and bool(cell.method.files())
    spec, parts, protocol = base_of(cell.spec, cell.parts, cell.protocol, builder)
    base = image_set_id(f"{BASE}-{run_id(spec, parts, builder.registry, [])}", False, protocol, prompts)
    return replace(cell, published=published, id=name, images=images, base=base, milestones=milestones)


T = TypeVar("T")


def _shared(parts: Iterable[T]) -> list[T]:
    """Return every object once: a draft builds equal settings once."""
    return list({id(part): part for part in parts}.values())


def _trained_on(cells: Sequence[Cell]) -> list[Evaluator]:
    """Return every evaluator that some run is trained on."""
    return _shared(term.evaluator for cell in cells for term in cell.rewards)


def _judge(evaluator: Evaluator) -> tuple[str, list[Path]]:
    """What makes two evaluators the same opinion: in another unit it is still not held out."""
    return evaluator.name, evaluator.files()


def _fitted(evaluator: Any, cells: Sequence[Cell]) -> Any:
    """An evaluator that asks for the side of the model's tokens (``patch: None``) is told, if there is but one."""
    if getattr(evaluator, "patch", 0) is not None:
        return evaluator
    sides = {getattr(backend, "patch", None) for backend in _shared(cell.backend for cell in cells)}
    return structs.replace(evaluator, patch=sides.pop()) if len(sides) == 1 else evaluator


def _scores(draft: Draft, prompts: Sequence[Prompt]) -> list[Score]:
    """The evaluators of a sweep with their role. UserError for one that is there twice."""
    where, registry = draft.document.path, draft.builder.registry
    trained_on = [_judge(evaluator) for evaluator in _trained_on(draft.cells)]
    scores: list[Score] = []
    for i, built in enumerate(draft.evaluators):
        place = f"{where}: evaluation.evaluators[{i}]"
        evaluator = _fitted(built, draft.cells)
        if evaluator.paired and evaluator.base is not None:
            raise UserError(f"{place}.base: a sweep makes the base model's pictures itself; leave it out")
        prefixed(place, evaluator.files)
        prefixed(place, evaluator.check, prompts)
        content = evaluator_content(evaluator, registry)
        if not NAME.fullmatch(evaluator.version):
            raise UserError(f"{place}: {evaluator.name}'s version {evaluator.version!r} becomes a part of file names")
        file = f"{evaluator.name}@{evaluator.version}-{content_id(content)}.parquet"
        if file in [score.file for score in scores]:
            raise UserError(f"{place}: {evaluator.name} is there already with the same settings; remove one")
        untrained = "held-out" if evaluator.files() else "check"  # without weights it is a rule, not a learnt opinion
        role = "train" if _judge(evaluator) in trained_on else untrained
        metrics = [dict(metric._asdict()) for metric in evaluator.metrics]
        base = "" if evaluator.paired else None
        scores.append(Score(settings(evaluator), evaluator.name, evaluator.version, file, metrics, role, base))
    names = [metric["name"] for score in scores for metric in score.metrics]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{where}: evaluation.evaluators: two of them make a column '{twice}'; keep one")
    return scores

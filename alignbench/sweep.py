"""From a sweep file to its cells: every run with all settings resolved, its ids, and what was overridden and why.

Everything that can be wrong is found here, before any model is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import structs

from alignbench import hinge, slurm, weights
from alignbench import prompts as prompt_lists
from alignbench.config import (
    Missing,
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
from alignbench.evaluator import Evaluator
from alignbench.manifest import Manifest, ManifestMetric, ManifestMilestone, ManifestNote, ManifestRun, ManifestScore
from alignbench.plugins import NAME, Registry
from alignbench.prompts import Prompt
from alignbench.spec import (
    BASE,
    Evaluation,
    Override,
    Protocol,
    RewardSettings,
    RunSpec,
    Sweep,
    Training,
    base_of,
    check_weights,
    content_id,
    evaluator_content,
    image_set_id,
    run_id,
)

RUN_PARTS = ("backend", "method", "reward", "prompts", "training")
CELL_PARTS = (*RUN_PARTS, "evaluation")
SAMPLER = ("steps", "guidance", "weights", "tuned_steps")  # what of the protocol a row may have of its own
UNTRAINED = -1  # the seed of a run that trains nothing


class Score(NamedTuple):
    """One evaluator of a sweep, and the file of its scores below ``scores/<image set>/``."""

    settings: dict[str, Any]
    name: str
    version: str
    file: str
    metrics: list[dict[str, Any]]
    role: str  # "train", "held-out" or "check"
    base: str | None = None  # of a paired evaluator: the image set that it compares with, as filled in for a cell


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. ``seed``: of training, or UNTRAINED. ``notes``: the overrides that apply, with reasons."""

    spec: RunSpec
    seed: int
    protocol: Protocol
    notes: list[dict[str, Any]] = field(default_factory=list)
    published: bool = False  # are its weights somebody else's, with training of which nothing is known?
    id: str = ""  # of the weights: the name of its folder below runs/
    images: str = ""  # id of its image set
    base: str = ""  # id of the image set that the untrained model makes in the same way
    milestones: tuple[tuple[int, str], ...] = ()  # (update, id of its image set)

    @property
    def trains(self) -> bool:
        return self.seed != UNTRAINED

    @property
    def title(self) -> str:
        return f"{self.spec.label}, seed {self.seed}" if self.trains else self.spec.label


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


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: what its manifest says, and what workers get."""

    document: Document
    evaluation: Evaluation
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


def draft(document: Document, registry: Registry) -> Draft:
    """Every cell, its settings checked. UserError for the first thing that is wrong, with its place."""
    where = document.path
    _refuse_case_settings(document)
    sweep = decode(Sweep, document.data, f"{where}: ")
    cells = [cell for i, _ in enumerate(sweep.cases) for cell in _case(sweep, document, i, registry)]
    _refuse_twins(cells, where)
    _refuse_idle(sweep, document, cells, registry)
    slurm.check_options(sweep.slurm, f"{where}: slurm", registry)
    for cell in _distinct(cells):
        check_settings(cell.spec, registry, f"{where}: {cell.spec.label}")
    return Draft(document, sweep, cells)


def resolve(document: Document, registry: Registry) -> Plan:
    """Every cell with its ids. UserError for the first thing that is wrong, with its place; no model is loaded."""
    where = document.path
    _, sweep, cells = draft(document, registry)
    evaluation = sweep.evaluation
    protocol = evaluation.protocol
    prompts = load(protocol.prompts, join(f"{where}: evaluation", "protocol.prompts"))[: evaluation.limit]
    for cell in _distinct(cells):
        check_run(cell.spec, registry, f"{where}: {cell.spec.label}")
        check_evaluation(cell, evaluation, registry, where)
    scores = _scores(sweep, cells, prompts, registry, where)
    fewer = prompts[: evaluation.at_milestones.limit]
    cells = [identify(cell, prompts, registry, fewer) for cell in cells]
    return Plan(document, evaluation, cells, scores, prompts, ", ".join(_names(_trained_on(cells))))


def missing(draft: Draft, registry: Registry) -> list[Missing]:
    """All that has to be fetched before the sweep can start, each once; UserError for what no command mends."""
    needs: list[Callable[[], Any]] = []
    for cell in _distinct(draft.cells):
        spec = cell.spec
        needs += [registry.make(kind, getattr(spec, kind), kind).files for kind in ("backend", "method")]
        if cell.trains:
            needs.append(functools.partial(load, spec.prompts, f"{spec.label}: prompts"))
            needs += [registry.make("evaluator", part["evaluator"], "reward").files for part in spec.rewards]
    evaluation = draft.sweep.evaluation
    needs.append(functools.partial(load, evaluation.protocol.prompts, "evaluation.protocol.prompts"))
    needs += [registry.make("evaluator", plain, "evaluation.evaluators").files for plain in evaluation.evaluators]
    with weights.collecting() as found:
        for need in needs:
            before = len(found)
            try:
                need()
            except Missing as error:
                found.append(error)
            except (UserError, OSError):  # of a file beside a missing one
                if len(found) == before:
                    raise
    return list({error.command: error for error in found}.values())


def _distinct(cells: Sequence[Cell]) -> list[Cell]:
    """One of the cells that differ in the seed alone."""
    return list({_but_seed(cell): cell for cell in cells}.values())


def _but_seed(cell: Cell) -> str:
    """Equal for runs that differ in the seed alone: what can be checked of one holds for the other."""
    plain = settings(cell.spec) | {"protocol": settings(cell.protocol)}
    return content_id(plain | {"training": plain["training"] | {"seed": 0}})


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


# -- cells ------------------------------------------------------------------------------------------------------------


def _case(sweep: Sweep, document: Document, index: int, registry: Registry) -> Iterator[Cell]:
    """The cells of one case: one per point of the grid, or a single one if its method trains nothing."""
    where, case = document.path, sweep.cases[index]
    method = registry.make("method", case.method, f"{where}: cases[{index}].method")
    evaluation = {"protocol": settings(sweep.evaluation.protocol)}
    raw = {**settings(sweep.base), "method": settings(method), "evaluation": evaluation}
    raw = _resolved(raw, registry, f"{where}: base")
    axes = sweep.grid if method.trains else {}
    for values in itertools.product(*axes.values()):
        cell, label, notes = raw, case.label, []
        for axis, value in zip(axes, values):
            cell = _set(cell, axis, value, registry, f"{where}: grid")
            label += "" if axis == "training.seed" else f", {axis.rpartition('.')[2]}={value}"
        for i, override in enumerate(sweep.overrides):
            if matches(override.match, label, cell, f"{where}: overrides[{i}].match"):
                cell = _override(cell, override, registry, f"{where}: overrides[{i}]")
                notes.append({"set": override.set, "reason": override.reason})
        for axis, value in document.run_sets:
            if not axis.startswith("method.") or axis.split(".")[1] in method.__struct_fields__:
                cell = _set(cell, axis, value, registry, "command line", CELL_PARTS)
        protocol = decode(Protocol, cell["evaluation"]["protocol"], f"{where}: evaluation.protocol")
        own = {part: cell[part] for part in RUN_PARTS}
        spec = decode(RunSpec, {"label": label, **own}, f"{where}: cases[{index}]")
        yield Cell(spec, spec.training.seed if method.trains else UNTRAINED, protocol, notes)


def _override(cell: dict[str, Any], override: Override, registry: Registry, where: str) -> dict[str, Any]:
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
        cell = _set(cell, axis, value, registry, f"{where}.set", CELL_PARTS)
    return cell


def _set(
    cell: dict[str, Any], axis: str, value: Any, registry: Registry, where: str, parts: Sequence[str] = RUN_PARTS
) -> dict[str, Any]:
    """``cell`` with one setting of its ``parts`` changed, checked at once, so that an error names what changed it."""
    head = axis.partition(".")[0].partition("[")[0]
    if head not in parts:
        raise UserError(f"{where}: {axis}: a run has no such setting{did_you_mean(head, parts, 'settings')}")
    return _resolved(put(cell, axis, value, f"{where}: {axis}"), registry, f"{where}: ")


def _resolved(raw: dict[str, Any], registry: Registry, where: str) -> dict[str, Any]:
    """Every part decoded strictly and written out again, defaults included."""
    parts = raw["reward"] if isinstance(raw["reward"], list) else [raw["reward"]]
    if not parts:
        raise UserError(f"{join(where, 'reward')}: the list is empty; give at least one evaluator")
    places = [f"reward[{i}]" if isinstance(raw["reward"], list) else "reward" for i, _ in enumerate(parts)]
    rewards = [_resolved_reward(part, registry, join(where, place)) for part, place in zip(parts, places)]
    return {
        "backend": settings(registry.make("backend", raw["backend"], join(where, "backend"))),
        "method": settings(registry.make("method", raw["method"], join(where, "method"))),
        "reward": rewards if isinstance(raw["reward"], list) else rewards[0],
        "prompts": raw["prompts"],
        "training": settings(decode(Training, raw["training"], join(where, "training"))),
        "evaluation": {
            "protocol": settings(decode(Protocol, raw["evaluation"]["protocol"], join(where, "evaluation.protocol")))
        },
    }


def _resolved_reward(raw: Any, registry: Registry, where: str) -> dict[str, Any]:
    reward = decode(RewardSettings, raw, where)
    evaluator = registry.make("evaluator", reward.evaluator, join(where, "evaluator"))
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


# -- checks and ids ---------------------------------------------------------------------------------------------------


def load(name: str, where: str) -> list[Prompt]:
    """A prompt list, or UserError with the place that names it."""
    return prompt_lists.load_prompts(name, where)


def check_settings(spec: RunSpec, registry: Registry, where: str) -> None:
    """What can be known to fail from the settings alone, as a batch without whole groups, a reward without gradient."""
    method = registry.make("method", spec.method, "method")
    evaluators = [registry.make("evaluator", part["evaluator"], "reward.evaluator") for part in spec.rewards]
    for size in _micro_batches(spec.training) if method.trains else ():
        _prefixed(where, method.check, size, all(evaluator.differentiable for evaluator in evaluators))
    if method.trains:
        check_weights(spec.training.optimizer, spec.backend, where)


def check_run(spec: RunSpec, registry: Registry, where: str) -> None:
    """Whatever can be known to fail before a model is loaded: weights, prompts, a model that has no score."""
    backend = registry.make("backend", spec.backend, "backend")
    method = registry.make("method", spec.method, "method")
    _prefixed(where, backend.files)
    _prefixed(where, method.files)
    if not method.trains:
        return
    evaluators = [registry.make("evaluator", part["evaluator"], "reward.evaluator") for part in spec.rewards]
    if method.stochastic and (why := getattr(backend, "deterministic", None)):
        raise UserError(
            f"{where}: method.name: {method.name} samples by an SDE, and {why}; "
            "choose a model that is not distilled, or a method that follows the ODE"
        )
    prompts = load(spec.prompts, f"{where}: prompts")
    _check_prompts(spec.prompts, prompts, backend)
    for evaluator, part in zip(evaluators, spec.rewards, strict=True):
        _prefixed(where, evaluator.files)
        _prefixed(where, evaluator.check, prompts)
        if why := hinge.impossible(part["margin"], evaluator.reward_range):
            raise UserError(f"{where}: reward.margin: {evaluator.name}: {why}")


def warnings_of(plan: Plan, registry: Registry) -> list[str]:
    """What will run, and yet is hardly meant; each once."""
    found = dict[str, None]()
    for part in (part for cell in plan.cells if cell.trains for part in cell.spec.rewards):
        evaluator = registry.make("evaluator", part["evaluator"], "reward.evaluator")
        if why := hinge.pointless(part["margin"], evaluator.reward_range):
            found[f"{plan.document.path}: reward.margin: {evaluator.name}: {why}"] = None
    return list(found)


def check_evaluation(cell: Cell, evaluation: Evaluation, registry: Registry, where: str) -> None:
    """The same of the images that are made of a run."""
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
    backend = registry.make("backend", cell.spec.backend, "backend")
    if hasattr(backend, "check_size"):
        backend.check_size(protocol.size, f"{where}: evaluation.protocol.size")
    prompts = load(protocol.prompts, f"{where}: evaluation.protocol.prompts")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        what = f"{protocol.prompts} repeats prompts, whose pictures would count more than once"
        raise UserError(f"{where}: evaluation.protocol.prompts: {what}; choose a list for evaluation")
    _check_prompts(protocol.prompts, prompts[: evaluation.limit], backend)


def _prefixed(where: str, check: Any, *arguments: Any) -> None:
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


def identify(
    cell: Cell, prompts: Sequence[Prompt], registry: Registry, at_milestones: Sequence[Prompt] | None = None
) -> Cell:
    """``cell`` with the ids of its weights and of its images. ``at_milestones``: None for all prompts."""
    training_prompts = load(cell.spec.prompts, "prompts") if cell.trains else []
    name = f"{cell.spec.method['name']}-{run_id(cell.spec, registry, training_prompts)}"
    images = image_set_id(name, cell.trains, cell.protocol, prompts)
    fewer = prompts if at_milestones is None else at_milestones
    milestones = tuple(
        (update, image_set_id(name, True, cell.protocol, fewer, update))
        for update in (cell.spec.training.milestones if cell.trains else ())
    )
    published = not cell.trains and bool(registry.make("method", cell.spec.method, "method").files())
    spec, protocol = base_of(cell.spec, cell.protocol, registry)
    base = image_set_id(f"{BASE}-{run_id(spec, registry, [])}", False, protocol, prompts)
    return replace(cell, published=published, id=name, images=images, base=base, milestones=milestones)


def _trained_on(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The settings of every evaluator that some run is trained on."""
    return _different(part["evaluator"] for cell in cells for part in cell.spec.rewards)


def _different(plain: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in plain:
        if part not in found:
            found.append(part)
    return found


def _judge(evaluator: Any) -> tuple[str, list[Path]]:
    """What makes two evaluators the same opinion: in another unit it is still not held out."""
    return evaluator.name, evaluator.files()


def _names(evaluators: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(evaluator["name"] for evaluator in evaluators))


def _fitted(evaluator: Any, cells: Sequence[Cell], registry: Registry) -> Any:
    """An evaluator that asks for the side of the model's tokens (``patch: None``) is told, if there is but one."""
    if getattr(evaluator, "patch", 0) is not None:
        return evaluator
    backends = [registry.make("backend", plain, "backend") for plain in _different(cell.spec.backend for cell in cells)]
    sides = {getattr(backend, "patch", None) for backend in backends}
    return structs.replace(evaluator, patch=sides.pop()) if len(sides) == 1 else evaluator


def _scores(
    sweep: Sweep, cells: Sequence[Cell], prompts: Sequence[Prompt], registry: Registry, where: str
) -> list[Score]:
    """The evaluators of a sweep with their role. UserError for one that is there twice."""
    trained_on = [_judge(registry.make("evaluator", plain, "reward.evaluator")) for plain in _trained_on(cells)]
    scores: list[Score] = []
    for i, plain in enumerate(sweep.evaluation.evaluators):
        place = f"{where}: evaluation.evaluators[{i}]"
        evaluator = _fitted(registry.make("evaluator", plain, place), cells, registry)
        if evaluator.paired and evaluator.base is not None:
            raise UserError(f"{place}.base: a sweep makes the base model's pictures itself; leave it out")
        _prefixed(place, evaluator.files)
        _prefixed(place, evaluator.check, prompts)
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

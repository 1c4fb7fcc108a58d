"""From a sweep file to its cells: every run with all settings resolved, its ids, and what was overridden and why.

Everything that can be wrong is found here, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec import structs

from alignbench import weights
from alignbench.config import (
    Config,
    Missing,
    Requirement,
    UserError,
    decode,
    settings,
)
from alignbench.digests import content_id
from alignbench.evaluator import Evaluator
from alignbench.experiment import margins, resources
from alignbench.experiment.cells import PlannedRun, cells_of, distinct
from alignbench.experiment.checks import check_evaluation, check_run, check_settings, load, prefixed
from alignbench.experiment.document import RUN_PARTS, Document
from alignbench.experiment.ids import BASE, base_of, evaluator_content, image_set_id, run_id
from alignbench.experiment.roles import Score
from alignbench.experiment.spec import (
    Evaluation,
    Sweep,
)
from alignbench.plugins import NAME, Builder, Registry
from alignbench.prompts import Prompt
from alignbench.store.manifest import (
    Manifest,
    ManifestMetric,
    ManifestMilestone,
    ManifestNote,
    ManifestRun,
    ManifestScore,
)


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: what its manifest says, and what workers get."""

    document: Document
    evaluation: Evaluation
    evaluators: list[Evaluator]  # those of the evaluation, built
    cells: list[PlannedRun]
    scores: list[Score]
    prompts: list[Prompt]  # of the evaluation
    training_evaluator: str

    def scored(self, cell: PlannedRun) -> list[Score]:
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

    def _run(self, cell: PlannedRun) -> ManifestRun:
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

    def _scores(self, cell: PlannedRun, images: str) -> list[ManifestScore]:
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
    cells: list[PlannedRun]
    evaluators: list[Evaluator]  # those of the evaluation, built
    builder: Builder


def draft(document: Document, registry: Registry) -> Draft:
    """Every cell, its settings checked. UserError for the first thing that is wrong, with its place."""
    where, builder = document.path, Builder(registry)
    _refuse_case_settings(document)
    sweep = decode(Sweep, document.data, f"{where}: ")
    cells = cells_of(sweep, document, builder)
    resources.check_options(sweep.slurm, f"{where}: slurm", registry)
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
        if why := margins.pointless(margin, evaluator.reward_range):
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
    cell: PlannedRun, prompts: Sequence[Prompt], builder: Builder, at_milestones: Sequence[Prompt] | None = None
) -> PlannedRun:
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


def _trained_on(cells: Sequence[PlannedRun]) -> list[Evaluator]:
    """Return every evaluator that some run is trained on."""
    return _shared(term.evaluator for cell in cells for term in cell.rewards)


def _judge(evaluator: Evaluator) -> tuple[str, list[Path]]:
    """What makes two evaluators the same opinion: in another unit it is still not held out."""
    return evaluator.name, evaluator.files()


def _fitted(evaluator: Any, cells: Sequence[PlannedRun]) -> Any:
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

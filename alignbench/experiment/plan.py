"""From a sweep file to its plan: every run with resolved settings, ids, and its overrides with their reasons.

All mistakes that can be found without loading a model are found here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    did_you_mean,
    settings,
)
from alignbench.digests import content_id
from alignbench.evaluator import Evaluator
from alignbench.experiment import margins, resources
from alignbench.experiment.cells import PlannedRun, cells_of, distinct
from alignbench.experiment.checks import (
    check_evaluation,
    check_job,
    check_run,
    check_settings,
    cut_prompts,
    repeated_prompts,
    run_check,
)
from alignbench.experiment.document import Document, decoded
from alignbench.experiment.ids import BASE, base_of, image_set_id, run_id, score_content
from alignbench.experiment.roles import Score
from alignbench.experiment.spec import (
    Evaluation,
    Sweep,
)
from alignbench.plugins import NAME, Builder, Registry, blamed
from alignbench.prompts import Prompt, evaluation_prompts, load_prompts
from alignbench.store.manifest import (
    Manifest,
    ManifestMetric,
    ManifestMilestone,
    ManifestNote,
    ManifestRun,
    ManifestScore,
)
from alignbench.store.stages import Stage


@dataclass(frozen=True)
class Plan:
    """Resolved sweep, from which its manifest and the tasks of workers are made."""

    document: Document
    evaluation: Evaluation
    evaluators: list[Evaluator]  # of the evaluation
    cells: list[PlannedRun]
    scores: list[Score]
    prompts: list[Prompt]  # of the evaluation
    training_evaluator: str  # names of the rewards
    primary: str = ""  # metric, if the sweep names one
    remarks: Sequence[str] = ()  # of rows that are one run, and of methods on the models that they start from

    def scored(self, cell: PlannedRun) -> list[Score]:
        """Return the evaluators for one cell; a paired one's file name includes the id of the base model's images."""
        return [
            score
            if score.base is None
            else score._replace(base=cell.base, file=score.file.replace(".parquet", f"-{cell.base}.parquet"))
            for score in self.scores
        ]

    def manifest(self, plugins: Sequence[str] = ()) -> Manifest:
        """Return the manifest. ``plugins``: as typed."""
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
            primary=self.primary,
            cases=list(dict.fromkeys(cell.spec.label for cell in self.cells)),
            runs=[self._run(cell) for cell in self.cells],
            plugins=list(plugins),
            replaced=list(self.document.inherited.replaced),
            remarks=[remark.removeprefix(f"{self.document.path}: ") for remark in self.remarks],
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
        """Return the scores of one of the cell's image sets."""
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
    """Sweep resolved as far as possible without the files of models and prompt lists: its cells have no ids."""

    document: Document
    sweep: Sweep
    cells: list[PlannedRun]
    evaluators: list[Evaluator]  # of the evaluation
    builder: Builder


def draft(document: Document, registry: Registry) -> Draft:
    """Return every cell with its settings checked. Raise UserError for the first mistake, with its place."""
    where, builder = document.path, Builder(registry)
    sweep = decoded(document)
    cells = cells_of(sweep, document, builder)
    resources.check_options(sweep.slurm, f"{where}: slurm", registry)
    for cell in distinct(cells):
        check_settings(cell, f"{where}: {cell.spec.label}")
    evaluators = [
        builder.make("evaluator", plain, f"{where}: evaluation.evaluators[{i}]")
        for i, plain in enumerate(sweep.evaluation.evaluators)
    ]
    _check_primary(sweep.primary, evaluators, f"{where}: primary")
    return Draft(document, sweep, cells, evaluators, builder)


def resolve(document: Document, registry: Registry) -> Plan:
    """Return the plan of a sweep, without loading a model. Raise UserError for the first mistake, with its place."""
    return completed(draft(document, registry))


def completed(draft: Draft) -> Plan:
    """Return the plan of a draft. Raise UserError for the first file that is missing or wrong."""
    document, sweep, cells, evaluators, builder = draft
    where, evaluation = document.path, sweep.evaluation
    prompts = evaluation_prompts(evaluation.protocol.prompts, f"{where}: evaluation.protocol.prompts")[
        : evaluation.limit
    ]
    remarks: list[str] = []
    for cell in distinct(cells):
        remarks += check_run(cell, f"{where}: {cell.spec.label}")
        check_evaluation(cell, evaluation, where)
    scores = _scores(draft, prompts)
    fewer = prompts[: evaluation.at_milestones.limit]
    cells = [identify(cell, prompts, builder, fewer) for cell in cells]
    rewards = ", ".join(dict.fromkeys(evaluator.name for evaluator in _trained_on(cells)))
    if not document.rehearsal:  # which makes different budgets equally small
        remarks += _equal_rows(cells)
    remarks = list(dict.fromkeys(remarks))
    return Plan(document, evaluation, evaluators, cells, scores, prompts, rewards, sweep.primary, remarks)


def missing(draft: Draft) -> list[Requirement]:
    """Return everything to fetch before the sweep can start, once each. Raise UserError for what cannot be fetched."""
    path, needs = draft.document.path, list[Requirement]()
    for cell in distinct(draft.cells):
        where = f"{path}: {cell.spec.label}"
        needs += [*_absent(cell.backend, where), *_absent(cell.method, where)]
        if cell.trains:
            needs += _raised(where, load_prompts, cell.spec.prompts)
            needs += [need for term in cell.rewards for need in _absent(term.evaluator, where)]
    needs += _raised(path, load_prompts, draft.sweep.evaluation.protocol.prompts, "evaluation.protocol.prompts")
    for i, evaluator in enumerate(draft.evaluators):
        needs += _absent(evaluator, f"{path}: evaluation.evaluators[{i}]")
    return list({need.command: need for need in needs}.values())


def _absent(part: Config, where: str) -> list[Requirement]:
    """Return the files that ``part`` lacks. Raise UserError if all exist but cannot be used."""
    with blamed(part, where):
        absent = run_check(where, weights.absent, part)
    return absent or _raised(where, part.files)  # type: ignore[attr-defined]  # all three kinds have it


def _raised(where: str, check: Callable[..., Any], *arguments: Any) -> list[Requirement]:
    """Return the requirement named by the Missing that ``check`` raises, as plug-ins and prompt lists do.

    Raise any other error, and a Missing that names none, as ``run_check`` does.
    """
    try:
        run_check(where, check, *arguments)
    except Missing as error:
        if error.requirement is None:
            raise
        return [error.requirement]
    return []


def warnings_of(plan: Plan) -> list[str]:
    """Return warnings about settings that run but are hardly intended, once each."""
    warnings = dict[str, None]()
    for evaluator, margin, _ in (term for cell in plan.cells if cell.trains for term in cell.rewards):
        if why := margins.never_closes(margin, evaluator.reward_range):
            warnings[f"{plan.document.path}: reward.margin: {evaluator.name}: {why}"] = None
    for cell in (cell for cell in plan.cells if cell.trains):
        try:
            job = resources.resources(plan.document.data.get("slurm", {}), Stage.TRAIN, cell)
            check_job(cell, job, f"{plan.document.path}: slurm: {cell.spec.label}")
        except UserError as error:  # only a warning: another launcher or a cluster file may be chosen
            warnings[str(error)] = None
    for cell in distinct(plan.cells):
        for what in (*repeated_prompts(cell), *cut_prompts(cell, plan.prompts)):
            warnings[f"{plan.document.path}: {what}"] = None
    return [*plan.remarks, *warnings]


def _check_primary(name: str, evaluators: Sequence[Evaluator], where: str) -> None:
    """Raise UserError unless ``name`` is a metric of these evaluators that has a better direction, or is empty."""
    metrics = {metric.name: metric for evaluator in evaluators for metric in evaluator.metrics}
    if not name:
        return
    if name not in metrics:
        raise UserError(f"{where}: no evaluator of this sweep has a metric '{name}'{did_you_mean(name, metrics)}")
    if metrics[name].higher_is_better is None:
        directed = [metric.name for metric in metrics.values() if metric.higher_is_better is not None]
        what = f"neither direction of '{name}' is better, so it cannot decide"
        raise UserError(f"{where}: {what}; choose from {', '.join(directed) or 'other evaluators'}")


def identify(
    cell: PlannedRun, prompts: Sequence[Prompt], builder: Builder, at_milestones: Sequence[Prompt] | None = None
) -> PlannedRun:
    """Return ``cell`` with the ids of its weights and images. ``at_milestones``: prompts there; None for all."""
    training_prompts = load_prompts(cell.spec.prompts, "prompts") if cell.trains else []
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


def _equal_rows(cells: Sequence[PlannedRun]) -> Iterator[str]:
    """Yield a remark for every run in two rows: it is made once, and both rows have its scores."""
    rows: dict[tuple[str, str], str] = {}
    for cell in cells:
        label = cell.spec.label
        if (other := rows.setdefault((cell.id, cell.images), label)) != label:
            yield f"'{other}' and '{label}' are the same run: no setting that changes its images differs"


T = TypeVar("T")


def _shared(parts: Iterable[T]) -> list[T]:
    """Return every object once; equal settings of a draft share one object."""
    return list({id(part): part for part in parts}.values())


def _trained_on(cells: Sequence[PlannedRun]) -> list[Evaluator]:
    """Return every evaluator that any run is trained on."""
    return _shared(term.evaluator for cell in cells for term in cell.rewards)


def _judge(evaluator: Evaluator) -> tuple[str, list[Path]]:
    """Return the identity of an evaluator's judgement; another unit does not make it held out."""
    return evaluator.name, evaluator.files()


def _fitted(evaluator: Any, cells: Sequence[PlannedRun]) -> Any:
    """Fill in the side of the models' tokens for an evaluator that asks for it (``patch: None``), if all agree."""
    if getattr(evaluator, "patch", 0) is not None:
        return evaluator
    sides = {getattr(backend, "patch", None) for backend in _shared(cell.backend for cell in cells)}
    return structs.replace(evaluator, patch=sides.pop()) if len(sides) == 1 else evaluator


def _scores(draft: Draft, prompts: Sequence[Prompt]) -> list[Score]:
    """Return the evaluators of a sweep with their roles. Raise UserError for a duplicate or an unusable one."""
    where, registry = draft.document.path, draft.builder.registry
    trained_on = [_judge(evaluator) for evaluator in _trained_on(draft.cells)]
    scores: list[Score] = []
    for i, built in enumerate(draft.evaluators):
        place = f"{where}: evaluation.evaluators[{i}]"
        evaluator = _fitted(built, draft.cells)
        if evaluator.paired and evaluator.base is not None:
            raise UserError(f"{place}.base: a sweep makes the base model's images itself; leave it out")
        run_check(place, evaluator.files)
        run_check(place, evaluator.check, prompts)
        content = score_content(evaluator, registry)
        if not NAME.fullmatch(evaluator.version):
            what = f"version {evaluator.version!r} of {evaluator.name} becomes a part of file names"
            raise UserError(f"{place}: {what}; use letters, digits and . _ -")
        file = f"{evaluator.name}@{evaluator.version}-{content_id(content)}.parquet"
        if file in [score.file for score in scores]:
            raise UserError(f"{place}: {evaluator.name} is listed twice with the same settings; remove one")
        untrained = "held-out" if evaluator.files() else "check"  # without weights it is a rule, not a learnt judgement
        role = "train" if _judge(evaluator) in trained_on else untrained
        metrics = [dict(metric._asdict()) for metric in evaluator.metrics]
        base = "" if evaluator.paired else None
        scores.append(Score(settings(evaluator), evaluator.name, evaluator.version, file, metrics, role, base))
    names = [metric["name"] for score in scores for metric in score.metrics]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{where}: evaluation.evaluators: two evaluators make a column '{twice}'; keep one")
    return scores

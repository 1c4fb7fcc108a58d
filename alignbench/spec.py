"""What a run and a sweep are, as plain data, and the ids that follow from their content."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, structs

from alignbench.config import Config, UserError, settings
from alignbench.digests import content_id, fingerprint
from alignbench.evaluator import Evaluator, Term
from alignbench.method import AlignMethod
from alignbench.plugins import Builder, Registry
from alignbench.prompts import Prompt
from alignbench.prompts import digest as prompts_digest

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class Optimizer(Config):
    """AdamW, and what surrounds it. Defaults: LeapAlign section 6.1 (clip: FlowBP's; the paper is silent)."""

    lr: Positive = 1e-5
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 1e-4
    warmup: Annotated[int, Meta(ge=0)] = 0  # updates of linear warm-up
    clip: Positive | None = 1.0  # gradient norm, per parameter group
    ema: Share | None = 0.995
    # What the optimizer updates. master, stochastic: the network has its weights in bfloat16, with or without masters
    # in float32 beside it; needs a backend of that dtype.
    weights: Literal["float32", "master", "stochastic"] = "float32"
    moments: Literal["float32", "8bit"] = "float32"  # AdamW's; 8bit is another optimizer, and reports say so


class Budget(Config):
    """When training ends. Exactly one is set."""

    images: Count | None = None
    nfe: Count | None = None  # network forwards per image, with and without gradient, summed over images
    gpu_seconds: Positive | None = None
    updates: Count | None = None

    def __post_init__(self) -> None:
        chosen = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(chosen) != 1:
            got = " and ".join(chosen) or "none"
            raise UserError(f"budget: set exactly one of images, nfe, gpu_seconds, updates; got {got}")


class Training(Config):
    """Everything about training that is not the method's own."""

    budget: Budget
    optimizer: Optimizer = Optimizer()
    batch: Count = 64  # images per batch over all ranks
    micro_batch: Count | None = None  # images per backward on one rank; None: batch / ranks at once
    reward_slice: Count | None = None  # of these, decoded and rewarded at a time, with gradient; None: all at once
    ema_on_host: bool = False  # is the weights' average kept in the host's memory, or beside the weights?
    seed: Annotated[int, Meta(ge=0)] = 0
    checkpoint_every: Count = 25  # batches; not part of the run's id
    keep: Count = 2  # checkpoints, so that one which a disk has damaged is not the only one; no part of the id
    drift_every: Count | None = 10  # batches between two looks at the drift from the base model; no part of the id
    milestones: tuple[Count, ...] = ()  # updates after which the weights are also kept, and their pictures scored

    def __post_init__(self) -> None:
        if any(b <= a for a, b in itertools.pairwise(self.milestones)):
            raise UserError(f"milestones: {list(self.milestones)} do not increase; list each update once, in order")
        end = self.budget.updates
        if end is not None and self.milestones and self.milestones[-1] >= end:
            what = f"{self.milestones[-1]} is not before the end, update {end}, which is evaluated anyway"
            raise UserError(f"milestones: {what}; choose updates below {end}")


class Protocol(Config):
    """How evaluation images are made: part of every image set's id."""

    prompts: str
    images_per_prompt: Count = 4
    steps: Count = 50
    guidance: NotNegative = 3.5
    size: Count = 1024  # pixels, square
    weights: Literal["ema", "last"] = "ema"
    tuned_steps: Count | None = None  # the base model makes the steps after these (hybrid inference); None: no step
    seed: Annotated[int, Meta(ge=0)] = 0  # noise of image (prompt, index) comes from (seed, prompt id, index)


class RewardSettings(Config):
    """An evaluator that methods are trained on, and the margin (lambda) of the hinge relu(margin - score).

    Of several rewards, ``weight`` is this one's share; only ratios of weights matter.
    """

    evaluator: dict[str, Any]
    margin: float | None = None
    weight: Positive = 1.0


class RunSpec(Config):
    """One training run, resolved. ``backend``, ``method`` and ``reward`` hold their name and every field."""

    label: str  # the row of the table; not part of the id
    backend: dict[str, Any]
    method: dict[str, Any]
    reward: dict[str, Any] | list[dict[str, Any]]
    prompts: str
    training: Training

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """Each {evaluator, margin, weight}."""
        return self.reward if isinstance(self.reward, list) else [self.reward]


class Parts(NamedTuple):
    """What a run is made with, built from its settings."""

    backend: Any
    method: AlignMethod
    rewards: tuple[Term, ...]


def build(spec: RunSpec, registry: Registry | Builder) -> Parts:
    """Build the backend, the method and the rewards of a run."""
    rewards = (
        Term(registry.make("evaluator", part["evaluator"], "reward.evaluator"), part["margin"], part["weight"])
        for part in spec.rewards
    )
    backend = registry.make("backend", spec.backend, "backend")
    return Parts(backend, registry.make("method", spec.method, "method"), tuple(rewards))


class Base(Config):
    """What all runs of a sweep share, before ``grid`` and ``overrides``."""

    backend: dict[str, Any]
    reward: RewardSettings | Annotated[list[RewardSettings], Meta(min_length=1)]
    prompts: str
    training: Training


class Case(Config):
    """One row of the table."""

    label: Annotated[str, Meta(min_length=1)]
    method: dict[str, Any]


class Override(Config):
    """A visible exception: settings for the runs that ``match`` (all of them if it is empty), and why."""

    set: dict[str, Any]
    match: dict[str, Any] = msgspec.field(default_factory=dict)
    reason: str = ""


class Evaluation(Config):
    """Which images are made of every run, and who scores them."""

    protocol: Protocol
    evaluators: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    limit: Count | None = None  # the first prompts only: for a quick look; everything made of it says SUBSET
    milestone_prompts: Count | None = None  # at milestones only the first of these prompts; None: all

    @property
    def at_milestones(self) -> Evaluation:
        """What is made at a milestone: of ever fewer prompts, never of more."""
        counts = [count for count in (self.limit, self.milestone_prompts) if count is not None]
        return structs.replace(self, limit=min(counts, default=None))


class Sweep(Config):
    """A sweep file: ``cases`` times ``grid``, each a variation of ``base``."""

    schema: Literal[1]
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    base: Base
    cases: Annotated[list[Case], Meta(min_length=1)]
    evaluation: Evaluation
    grid: dict[str, Annotated[list[Any], Meta(min_length=1)]] = msgspec.field(default_factory=dict)
    overrides: list[Override] = msgspec.field(default_factory=list)
    slurm: dict[str, Any] = msgspec.field(default_factory=dict)  # what jobs ask for (slurm.Slurm); in no id


def check_ranks(training: Training, ranks: int, where: str) -> None:
    """UserError unless the global batch divides among ``ranks``, and a rank's share holds a micro-batch."""
    if training.batch % ranks:
        raise UserError(
            f"{where}: training.batch: {training.batch} samples do not divide among {ranks} ranks; choose a multiple"
        )
    local = training.batch // ranks
    if training.micro_batch is not None and training.micro_batch > local:
        raise UserError(
            f"{where}: training.micro_batch: {training.micro_batch} is more than a rank's {local} samples; "
            f"choose 1 to {local}"
        )


def check_weights(optimizer: Optimizer, backend: dict[str, Any], where: str) -> None:
    """UserError for weights in bfloat16 with a backend that computes in another type."""
    if optimizer.weights != "float32" and backend.get("dtype") != "bfloat16":
        raise UserError(
            f"{where}: training.optimizer.weights: {optimizer.weights!r} keeps them in bfloat16, and backend "
            f"{backend['name']} computes in {backend.get('dtype', 'a type of its own')}; choose 'float32', or "
            "backend.dtype: bfloat16"
        )


def check_parts(training: Training, parallel: str, where: str = "training") -> None:
    """UserError for an optimizer that several ranks cannot run with a part of every weight each."""
    if parallel != "fsdp":
        return
    if training.optimizer.moments != "float32":
        raise UserError(
            f"{where}: optimizer.moments: '8bit' has blocks of whole tensors, and fsdp divides these among ranks; "
            "choose 'float32', or parallel: ddp"
        )
    if training.optimizer.weights != "float32":
        raise UserError(
            f"{where}: optimizer.weights: {training.optimizer.weights!r} is not for fsdp, whose parts are float32 "
            "masters already, gathered in the backend's type; choose 'float32', or parallel: ddp"
        )


# -- ids: content in, ten hex digits out ------------------------------------------------------------------------------


def run_id(spec: RunSpec, parts: Parts, registry: Registry, prompts: Sequence[Prompt]) -> str:
    """Hash everything that determines the weights, hence not the label. ``prompts``: those of ``spec.prompts``.

    All methods that train nothing and bring no files share one id per backend: their weights are the same.
    """
    backend, method = parts.backend, parts.method
    described = {key: value for key, value in spec.backend.items() if key != "embeddings"}  # which move no bit
    for name, usual in (("compile", False), ("attention", "native")):  # with these the id is that of before they were
        if described.get(name) == usual:
            del described[name]
    files = method.files()
    brought: dict[str, Any] = {"method files": fingerprint(files)} if files else {}
    if not method.trains:
        own = set(getattr(backend, "training_only", ()))
        sampled = {key: value for key, value in described.items() if key not in own}
        if files:
            brought["method"] = {key: value for key, value in spec.method.items() if key != "steps"}  # of training
            brought["method source"] = registry.source("method", spec.method["name"])
        return content_id({"backend": sampled, "backend files": fingerprint(backend.files()), **brought})
    rewards = [
        {
            "reward": evaluator_content(term.evaluator, registry),
            "margin": term.margin,
            "weight": term.weight if len(parts.rewards) > 1 else 1.0,
        }
        for term in parts.rewards
    ]
    training = settings(spec.training)
    for name in ("checkpoint_every", "keep", "drift_every"):  # what moves no weight
        del training[name]
    for name in (
        "milestones",
        "reward_slice",
        "ema_on_host",
    ):  # without them the id is that of before they were there
        if not training[name]:
            del training[name]
    for name in ("weights", "moments"):
        if training["optimizer"][name] == "float32":
            del training["optimizer"][name]
    content = {
        "backend": described,
        "backend files": fingerprint(backend.files()),
        "method": spec.method,
        "method source": registry.source("method", spec.method["name"]),
        "rewards": rewards,
        "prompts": prompts_digest(prompts),
        "training": training,
        **brought,
    }
    return content_id(content)


def image_set_id(
    run: str, trains: bool, protocol: Protocol, prompts: Sequence[Prompt], update: int | None = None
) -> str:
    """Of the weights and everything that determines the images. ``prompts``: those of ``protocol.prompts``.

    ``update``: of the milestone at which the weights were kept; None: those of the end.
    """
    content = settings(protocol) | {"run": run, "prompts": prompts_digest(prompts)}
    if protocol.tuned_steps is None:  # then the id is that of before there was such a setting
        del content["tuned_steps"]
    if update is not None:
        content["update"] = update
    if not trains:  # no average is kept of weights that never move
        del content["weights"]
    return content_id(content)


BASE = "base"  # the method that trains nothing


def base_of(
    spec: RunSpec, parts: Parts, protocol: Protocol, registry: Registry | Builder
) -> tuple[RunSpec, Parts, Protocol]:
    """Return the untrained model's run and the protocol of its images, with which those of ``spec`` are paired."""
    method = registry.make("method", {"name": BASE}, "method")
    base = structs.replace(spec, label=BASE, method=settings(method))
    return base, parts._replace(method=method), structs.replace(protocol, tuned_steps=None)


def evaluator_content(evaluator: Evaluator, registry: Registry) -> dict[str, Any]:
    """Everything that determines the scores of given images."""
    return {
        "settings": settings(evaluator),
        "version": evaluator.version,
        "files": fingerprint(evaluator.files()),
        "source": registry.source("evaluator", evaluator.name),
    }

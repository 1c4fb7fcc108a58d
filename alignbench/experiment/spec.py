"""What a run and a sweep are, as plain data, and the ids that follow from their content."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, structs

from alignbench.config import Config, UserError

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

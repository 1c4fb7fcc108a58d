"""Settings of a run and of a sweep as plain data, one class per section of the YAML file."""

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
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # 64 bits, as in tables of scores
NAME_FORM = "at most 100 ASCII letters, digits, '_', '-' and '.': it becomes part of file names"
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z", description=NAME_FORM)]


class Optimizer(Config):
    """AdamW, warm-up, clipping and averaging. Defaults: LeapAlign section 6.1 (clip: FlowBP; the paper gives none)."""

    lr: Positive = 1e-5
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 1e-4
    warmup: Annotated[int, Meta(ge=0)] = 0  # updates of linear warm-up
    clip: Positive | None = 1.0  # gradient norm, per parameter group
    ema: Share | None = 0.995
    # The weights that the optimizer updates. "master" and "stochastic": the network has its weights in bfloat16, with
    # or without float32 masters beside it; needs a backend of that dtype.
    weights: Literal["float32", "master", "stochastic"] = "float32"
    moments: Literal["float32", "8bit"] = "float32"  # of AdamW; 8bit is a different optimizer, and reports say so


class Budget(Config):
    """Budget at which training ends. Exactly one field is set."""

    images: Count | None = None
    nfe: Count | None = None  # forward passes of the network, with and without gradient, summed over images
    gpu_seconds: Positive | None = None
    updates: Count | None = None

    def __post_init__(self) -> None:
        chosen = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(chosen) != 1:
            got = " and ".join(chosen) or "none"
            raise UserError(f"budget: set exactly one of images, nfe, gpu_seconds, updates; got {got}")


class Training(Config):
    """Training settings that do not belong to the method."""

    budget: Budget
    optimizer: Optimizer = Optimizer()
    batch: Count = 64  # images per batch over all ranks
    micro_batch: Count | None = None  # images per backward pass on one rank; None: batch / ranks
    reward_slice: Count | None = None  # images decoded and rewarded at a time, with gradient; None: a whole micro-batch
    ema_on_host: bool = False  # keep the average of the weights in host memory instead of beside the weights
    seed: Seed = 0
    checkpoint_every: Count = 25  # batches; not part of the run id
    keep: Count = 2  # checkpoints; more than one, in case the disk damages one; not part of the run id
    drift_every: Count | None = 10  # batches between measurements of drift from the base model; not part of the run id
    milestones: tuple[Count, ...] = ()  # updates after which the weights are also kept, and their images scored

    def __post_init__(self) -> None:
        if any(b <= a for a, b in itertools.pairwise(self.milestones)):
            raise UserError(f"milestones: {list(self.milestones)} do not increase; list each update once, in order")
        end = self.budget.updates
        if end is not None and self.milestones and self.milestones[-1] >= end:
            what = f"{self.milestones[-1]} is not before the end, update {end}, which is evaluated anyway"
            raise UserError(f"milestones: {what}; choose updates below {end}")


class Protocol(Config):
    """Settings for making evaluation images; part of the id of every image set."""

    prompts: str
    images_per_prompt: Count = 4
    steps: Count = 50
    guidance: NotNegative = 3.5
    size: Count = 1024  # pixels, square
    weights: Literal["ema", "last"] = "ema"
    tuned_steps: Count | None = None  # the base model takes the steps after these (hybrid inference); None: no step
    seed: Seed = 0  # the noise of image (prompt, index) comes from (seed, prompt id, index)


class RewardSettings(Config):
    """Evaluator that methods are trained on, with the margin (lambda) of the hinge relu(margin - score).

    ``weight``: share of this reward among several; only the ratios of weights matter.
    """

    evaluator: dict[str, Any]
    margin: float | None = None
    weight: Positive = 1.0


class RunSpec(Config):
    """Resolved run. ``backend``, ``method`` and ``reward`` hold their name and every field."""

    label: str  # row of the table; not part of the run id
    backend: dict[str, Any]
    method: dict[str, Any]
    reward: dict[str, Any] | list[dict[str, Any]]
    prompts: str
    training: Training

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """Rewards, each as {evaluator, margin, weight}."""
        return self.reward if isinstance(self.reward, list) else [self.reward]


class Base(Config):
    """Settings that all runs of a sweep share, before ``grid`` and ``overrides``."""

    backend: dict[str, Any]
    reward: RewardSettings | Annotated[list[RewardSettings], Meta(min_length=1)]
    prompts: str
    training: Training


class Case(Config):
    """Row of the table: a label and a method."""

    label: Annotated[str, Meta(pattern=r"\S", description="a name for the row")]
    method: dict[str, Any]


class Override(Config):
    """Declared exception: settings for the runs that ``match`` (all runs if it is empty), and the reason."""

    set: dict[str, Any]
    match: dict[str, Any] = msgspec.field(default_factory=dict)
    reason: str = ""


class Evaluation(Config):
    """Evaluation of every run: the protocol of its images and the evaluators that score them."""

    protocol: Protocol
    evaluators: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    limit: Count | None = None  # number of prompts, for a quick look; everything made from them is stamped SUBSET
    milestone_prompts: Count | None = None  # number of these prompts at milestones; None: all

    @property
    def at_milestones(self) -> Evaluation:
        """Evaluation at a milestone: on the same prompts or fewer, never on more."""
        counts = [count for count in (self.limit, self.milestone_prompts) if count is not None]
        return structs.replace(self, limit=min(counts, default=None))


class Sweep(Config):
    """Sweep file: ``cases`` times ``grid``, each a variation of ``base``."""

    schema: Literal[1]
    name: Name
    base: Base
    cases: Annotated[list[Case], Meta(min_length=1)]
    evaluation: Evaluation
    grid: dict[str, Annotated[list[Any], Meta(min_length=1)]] = msgspec.field(default_factory=dict)
    overrides: list[Override] = msgspec.field(default_factory=list)
    primary: str = ""  # metric that decides, with which reports begin; "": the first check, else held-out score
    slurm: dict[str, Any] = msgspec.field(default_factory=dict)  # resources of jobs (resources.Slurm); in no id


def check_ranks(training: Training, ranks: int, where: str) -> None:
    """Raise UserError unless ``ranks`` divides the global batch, and a rank's share is at least a micro-batch."""
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


def check_weight_dtype(optimizer: Optimizer, backend: dict[str, Any], where: str) -> None:
    """Raise UserError for weights in bfloat16 if the backend computes in another dtype."""
    if optimizer.weights != "float32" and backend.get("dtype") != "bfloat16":
        raise UserError(
            f"{where}: training.optimizer.weights: {optimizer.weights!r} keeps them in bfloat16, but backend "
            f"{backend['name']} computes in {backend.get('dtype', 'a fixed dtype')}; choose 'float32', or "
            "backend.dtype: bfloat16"
        )


def check_fsdp(training: Training, parallel: str, where: str = "training") -> None:
    """Raise UserError for an optimizer that cannot run on sharded weights."""
    if parallel != "fsdp":
        return
    if training.optimizer.moments != "float32":
        raise UserError(
            f"{where}: optimizer.moments: '8bit' quantizes blocks of whole tensors, which fsdp shards across ranks; "
            "choose 'float32', or parallel: ddp"
        )
    if training.optimizer.weights != "float32":
        raise UserError(
            f"{where}: optimizer.weights: {training.optimizer.weights!r} does not work with fsdp, whose shards are "
            "already float32 masters, gathered in the backend's dtype; choose 'float32', or parallel: ddp"
        )

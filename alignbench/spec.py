"""What a run and a sweep are, as plain data, and the ids that follow from their content."""

from __future__ import annotations

from typing import Any

from alignbench.config import Config, UserError


class Optimizer(Config):
    """AdamW, and what surrounds it. Defaults: LeapAlign section 6.1 (clip: FlowBP's; the paper is silent)."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup: int = 0  # updates of linear warm-up
    clip: float | None = 1.0  # gradient norm, per parameter group
    ema: float | None = 0.995


class Budget(Config):
    """When training ends. Exactly one is set."""

    images: int | None = None
    nfe: int | None = None  # network forwards per image, with and without gradient, summed over images
    gpu_seconds: float | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        chosen = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise UserError(f"budget: set exactly one of images, nfe, gpu_seconds, updates; got {', '.join(chosen) or 'none'}")


class Training(Config):
    """Everything about training that is not the method's own."""

    optimizer: Optimizer = Optimizer()
    budget: Budget
    batch: int = 64  # images per batch over all ranks
    micro_batch: int | None = None  # images per backward on one rank; None: batch / ranks at once
    seed: int = 0
    checkpoint_every: int = 25  # batches; not part of the run's id


class Protocol(Config):
    """How evaluation images are made: part of every image set's id."""

    prompts: str
    images_per_prompt: int = 4
    steps: int = 50
    guidance: float = 3.5
    size: int = 1024
    weights: str = "ema"  # or "last"
    seed: int = 0  # noise of image (prompt, index) comes from (seed, prompt id, index)


class RunSpec(Config):
    """One training run, resolved. ``backend``, ``method`` and ``reward`` hold their name and every field."""

    label: str  # the row of the table; not part of the id
    backend: dict[str, Any]
    method: dict[str, Any]
    reward: dict[str, Any]
    prompts: str
    training: Training

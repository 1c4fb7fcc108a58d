"""The one thing a researcher subclasses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from alignbench.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class Loss(NamedTuple):
    """``value``: scalar to minimise, a mean over the batch's samples. ``metrics``: numbers to record, not to train on."""

    value: Tensor
    metrics: dict[str, float | Tensor] = {}  # noqa: RUF012 - never mutated


class AlignMethod(Config):
    """An alignment method: its fields are its hyperparameters. Define ``loss``, or ``updates`` for several per rollout."""

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    steps: int = 25  # sampler steps of the training rollout

    def check(self, batch: int, differentiable: bool) -> None:
        """Raise UserError for settings that cannot work with ``batch`` samples per micro-batch and this reward."""

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        raise NotImplementedError(f"{type(self).__name__} defines neither loss() nor updates()")

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
        """Outer: one optimizer update each. Inner: one backward each; gradients of the inner losses add up."""
        yield (self.loss(flow, reward, batch) for _ in range(1))

    def modules(self, flow: Flow) -> dict[str, nn.Module]:
        """Further networks to train (a value network): each its own parameter group and clip."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, for an exact resume."""

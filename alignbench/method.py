"""The one thing a researcher subclasses."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, cast

from alignbench.config import Config, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class Loss(NamedTuple):
    """``value``: scalar to minimise, a mean over the batch's samples. ``metrics``: numbers to record, not to train on.

    The metric "reward" is the mean reward of the images; the record shows it as ``reward_mean``. Without it the record
    has the mean over all images that the reward was asked about. ``each``: the samples' own losses (B,), without
    gradient, from which an error says which sample went wrong.
    """

    value: Tensor
    metrics: dict[str, float | Tensor] = {}  # noqa: RUF012 - never mutated
    each: Tensor | None = None


class GatherBatch(NamedTuple):
    """Yielded by ``updates``, comes back as the whole batch's values: ``everyone = yield Pool(values)``.

    ``values``: (b,) of this micro-batch. Back come (B,), of all micro-batches and ranks in the order of the samples,
    for what is a property of the batch: a standard deviation, a quantile.
    """

    values: Tensor


Updates: TypeAlias = Iterator[Iterable[Loss] | GatherBatch]  # a generator, if it pools


class AlignMethod(Config):
    """An alignment method: its fields are its hyperparameters. Define ``loss``, or ``updates`` for several losses."""

    name: ClassVar[str]
    title: ClassVar[str] = ""  # full name ...
    paper: ClassVar[str] = ""  # ... and where it was published, for `alignbench ls methods`
    trains: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False  # needs the score, that is a velocity that no distillation has bent
    steps: int = 25  # sampler steps of the training rollout

    def check(self, batch: int, differentiable: bool) -> None:
        """Raise UserError for settings that cannot work with ``batch`` samples per micro-batch and this reward."""
        require(self.steps >= 1, "method.steps", f"{self.steps} sampler steps are too few", "choose 1 or more")

    def files(self) -> list[Path]:
        """Files that determine the trained weights beside the backend's and the reward's. UserError if unreadable."""
        return []

    def prepare(self, flow: Flow) -> None:
        """Called once with the loaded model, before training, or before sampling if the method trains nothing."""

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        raise NotImplementedError(f"{type(self).__name__} defines neither loss() nor updates()")

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Updates:
        """Outer: one optimizer update each. Inner: one backward each; gradients of the inner losses add up.

        How many there are may depend on the settings and on ``batch.step_rng``, never on the samples. What stands
        before the first yield (a rollout) sees the weights of before the first update.
        """
        yield (self.loss(flow, reward, batch) for _ in range(1))

    def modules(self, flow: Flow) -> dict[str, nn.Module]:
        """Further networks to train (a value network): each its own parameter group and clip."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What changes during training beside weights (a running quantile): tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, for an exact resume."""


class Pathwise(AlignMethod):
    """A method that differentiates the reward through the sampler; subclasses choose which path the gradient takes."""

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        why = f"{self.name} needs the gradient of the reward, and this evaluator has none"
        require(differentiable, "reward", why, "choose a differentiable evaluator, or a policy-gradient method")


def reward_loss(flow: Flow, reward: Reward, batch: Batch, x_0: Tensor, weight: Tensor | float = 1.0) -> Loss:
    """Mean over samples of ``weight`` (B,) times the reward's loss at the image of the latents ``x_0``."""
    if reward.at_once is None or not x_0.requires_grad:
        scores = reward(flow.decode(x_0), batch.prompts)
        own = reward.loss(scores)
    else:  # a sample's loss depends on its own latents alone: value and gradient there are all that a backward needs
        scores, gradient = reward_gradient(flow, reward, batch, x_0)
        own = reward.loss(scores) + ((x_0 - x_0.detach()) * gradient).flatten(1).sum(1)  # adds a zero, and its gradient
    each = weight * own
    return Loss(each.mean(), {"reward": reward.value(scores).detach().mean()}, each.detach())


def reward_gradient(flow: Flow, reward: Reward, batch: Batch, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """(M, B) scores at the latents ``x_0``, and the gradient there of each sample's own loss, of ``x_0``'s shape.

    ``reward.at_once`` samples at a time, so that decoder and reward keep no more than these for their backward.
    """
    import torch

    scores: list[Tensor] = []
    gradients: list[Tensor] = []
    rows = reward.at_once or len(x_0)
    for start in range(0, len(x_0), rows):
        part = slice(start, start + rows)
        x = x_0[part].detach().requires_grad_()
        score = reward(flow.decode(x), batch.prompts[part])
        gradients += torch.autograd.grad(reward.loss(score).sum(), x)
        scores.append(score.detach())
    return torch.cat(scores, 1), torch.cat(gradients)


def require(holds: bool, where: str, what: str, instead: str) -> None:
    """Raise UserError("where: what; what instead") unless the settings hold."""
    if not holds:
        raise UserError(f"{where}: {what}; {instead}")


def each_update(method: AlignMethod, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
    """The updates that a method makes of one batch, alone on one rank: what it pools comes back as it is.

    Its further networks, if it has any, are made first, as training makes them.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method.modules(flow)
    updates = method.updates(flow, reward, batch)
    item = next(updates, None)
    while item is not None:
        if isinstance(item, GatherBatch):
            item = resume(updates, item.values)
        else:
            yield item
            item = next(updates, None)


def resume(updates: Updates, answer: Tensor) -> Iterable[Loss] | GatherBatch | None:
    """What comes after a ``Pool`` has been answered; None if nothing does."""
    try:
        return cast("Generator[Any, Any, Any]", updates).send(answer)
    except StopIteration:
        return None

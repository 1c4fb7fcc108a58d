"""The class that a researcher subclasses, ``AlignMethod``, and the losses that it returns."""

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
    """The loss of one micro-batch, with numbers to record.

    ``value``: the scalar to minimise, a mean over the samples of the micro-batch.

    ``metrics``: numbers to record; they are not trained on. The metric "reward" is the mean reward of the images, and
    the record shows it as ``reward_mean``. Without it, the record has the mean over all images that were scored.

    ``per_sample``: (B,) losses of the samples, without gradient; errors use them to say which sample went wrong.
    """

    value: Tensor
    metrics: dict[str, float | Tensor] = {}  # noqa: RUF012 - never mutated
    per_sample: Tensor | None = None


class GatherBatch(NamedTuple):
    """A request from ``updates`` for the values of the whole batch: ``everyone = yield GatherBatch(values)``.

    ``values``: (b,) values of this micro-batch. The answer is (B,): those of all micro-batches and ranks, in the order
    of the samples. Use it for properties of the batch, such as a standard deviation or a quantile.
    """

    values: Tensor


Updates: TypeAlias = Iterator[Iterable[Loss] | GatherBatch]  # a generator, if it yields GatherBatch


class AlignMethod(Config):
    """An alignment method: its fields are its hyperparameters.

    Subclasses set ``name`` and define ``loss``, or ``updates`` for several losses per batch. All randomness comes from
    the batch; all network calls go through ``flow.velocity``.

    - ``name``: chooses the method in YAML.
    - ``title``, ``paper``: full name and publication, for ``alignbench ls methods``.
    - ``trains``: False for a method that trains nothing.
    - ``stochastic``: True if it needs the score, which a timestep-distilled model does not have.
    - ``steps``: sampler steps of the training rollout; the one setting that all methods share.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trains: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    steps: int = 25

    def check(self, batch: int, differentiable: bool) -> None:
        """Raise UserError for settings that cannot work. Called before any model is loaded.

        ``batch``: samples per micro-batch. ``differentiable``: whether the reward has a gradient.
        """
        require(self.steps >= 1, "method.steps", f"{self.steps} sampler steps are too few", "choose 1 or more")

    def files(self) -> list[Path]:
        """Return further files that determine the trained weights, beside those of the backend and the reward.

        They are hashed into the run's id. Raise UserError if one is missing or unreadable.
        """
        return []

    def fits(self, backend: Any) -> list[str]:
        """Return warnings about this method on this backend, whose files are there. Called before a model is loaded.

        Raise UserError if they cannot work together.
        """
        return []

    def prepare(self, flow: Flow) -> None:
        """Prepare ``flow``, once: after the model is loaded and before training.

        For a method that trains nothing (``trains = False``), before sampling.
        """

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        """Return the loss of one micro-batch. Define this for one backward pass and one update per batch.

        ``flow`` and ``reward`` count what is asked of them; ``batch`` holds the samples and their randomness.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither loss() nor updates()")

    def updates(self, flow: Flow, reward: Reward, batch: Batch) -> Updates:
        """Yield one iterable of losses per optimizer update. Define this for several updates or backward passes.

        Each loss of an iterable is back-propagated as it comes; their gradients add up. The number of updates and of
        losses may depend on the settings and on ``batch.step_rng``, never on the samples. Code before the first yield
        (a rollout) sees the weights as they were before the first update. The generator may also yield ``GatherBatch``.
        """
        yield (self.loss(flow, reward, batch) for _ in range(1))

    def modules(self, flow: Flow) -> dict[str, nn.Module]:
        """Return further networks to train, by name, such as a value network.

        Each becomes its own parameter group, with its own gradient clipping.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that changes during training beside weights, such as a running quantile.

        Only tensors and plain data. It is saved with every checkpoint.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned, so that a resumed run is exact."""


class Pathwise(AlignMethod):
    """A method that differentiates the reward through the sampler; subclasses choose which path the gradient takes."""

    def check(self, batch: int, differentiable: bool) -> None:
        """Raise UserError for settings that cannot work, and for a reward without a gradient."""
        super().check(batch, differentiable)
        why = f"{self.name} needs the gradient of the reward, and this evaluator has none"
        require(differentiable, "reward", why, "choose a differentiable evaluator, or a policy-gradient method")


def reward_loss(flow: Flow, reward: Reward, batch: Batch, x_0: Tensor, weight: Tensor | float = 1.0) -> Loss:
    """Return the mean over samples of ``weight`` times the reward's loss at the images of ``x_0``.

    ``x_0``: (B, ...) latents, decoded here. ``weight``: a number, or (B,) numbers. Decoder and reward run on
    ``reward.slice_size`` samples at a time, with the same gradient.
    """
    if reward.slice_size is None or not x_0.requires_grad:
        scores = reward(flow.decode(x_0), batch.prompts)
        losses = reward.loss(scores)
    else:  # a sample's loss depends on its own latents alone: a backward needs only its value and gradient there
        scores, gradient = reward_gradient(flow, reward, batch, x_0)
        linear = ((x_0 - x_0.detach()) * gradient).flatten(1).sum(1)  # zero, but it has the gradient
        losses = reward.loss(scores) + linear
    weighted = weight * losses
    return Loss(weighted.mean(), {"reward": reward.value(scores).detach().mean()}, weighted.detach())


def reward_gradient(flow: Flow, reward: Reward, batch: Batch, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (M, B) scores at the latents ``x_0``, and the gradient of each sample's loss, of ``x_0``'s shape.

    Decoder and reward run on ``reward.slice_size`` samples at a time, so that no more than these are kept in memory
    for the backward pass. Both results are without gradient.
    """
    import torch

    scores: list[Tensor] = []
    gradients: list[Tensor] = []
    rows = reward.slice_size or len(x_0)
    for start in range(0, len(x_0), rows):
        part = slice(start, start + rows)
        x = x_0[part].detach().requires_grad_()
        score = reward(flow.decode(x), batch.prompts[part])
        gradients += torch.autograd.grad(reward.loss(score).sum(), x)
        scores.append(score.detach())
    return torch.cat(scores, 1), torch.cat(gradients)


def require(holds: bool, where: str, what: str, instead: str) -> None:
    """Raise UserError("where: what; instead") unless ``holds``."""
    if not holds:
        raise UserError(f"{where}: {what}; {instead}")


def each_update(method: AlignMethod, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
    """Yield the updates that a method makes of one batch, on one rank and without the training loop.

    For tests: the batch is one micro-batch, so a ``GatherBatch`` is answered with its own values. Further networks are
    made before the first update, as in training, with seed 0.
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
    """Answer a ``GatherBatch`` and return what the generator yields next; None if it ends."""
    try:
        return cast("Generator[Any, Any, Any]", updates).send(answer)
    except StopIteration:
        return None

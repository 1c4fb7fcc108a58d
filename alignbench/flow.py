"""The one calling convention for every model, and the one integration that all methods differentiate.

t = 1 is noise, t = 0 the image; v = noise - image; ``x_next = x + (sigma_next - sigma) * v``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignbench.prompts import Prompt


@dataclass(frozen=True)
class Cond:
    """Text conditioning: named tensors that share the leading (sample) dimension B."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor) -> Cond:
        return Cond({name: t[index] for name, t in self.tensors.items()})


class Flow(Protocol):
    """A text-to-image flow model, or an analytic toy."""

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """v(x, sigma, cond), shape of ``x``. ``sigma``: a number (also as a 0-dim tensor), or one per sample (B,).

        ``reference``: the base model, as it was before training.
        """
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The sampler's grid, 1 -> 0: (steps + 1,) values, shifted as the model's own sampler shifts them."""
        ...

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """n initial latents x_1 ~ N(0, I), sample i drawn on the CPU from ``generators[i]``."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond: ...

    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> pixels (B, 3, H, W) in [0, 1], differentiable."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """The same parameters in the same order, each with the name it is saved under."""
        ...

    # A flow that is evaluated also has ``at(size=, guidance=)``: the same weights at evaluation's image size (pixels)
    # and guidance. A toy that is only trained needs none. One that takes published weights has ``load_transformer`` and
    # ``load_lora``, each of the files that ``weights.published`` gives.


@dataclass(frozen=True)
class Batch:
    """What one loss sees: B samples whose prompts, noise and randomness the harness drew from (seed, step, sample)."""

    prompts: Sequence[Prompt]
    cond: Cond
    noise: Tensor  # (B, ...) initial latents
    rngs: Sequence[torch.Generator]  # one per sample, so that a draw does not depend on how the batch was split
    step_rng: torch.Generator  # equal on all ranks and micro-batches: for choices of which network calls happen
    step: int  # batch number, from 0

    def __len__(self) -> int:
        return len(self.prompts)

    def randn_like(self, x: Tensor) -> Tensor:
        """Fresh N(0, I) of ``x``'s shape, row i from sample i's own generator (on the CPU, then moved)."""
        rows = [torch.randn(x.shape[1:], generator=rng, dtype=x.dtype) for rng in self.rngs]
        return torch.stack(rows).to(x.device)

    def select(self, index: Tensor) -> Batch:
        """The samples ``index``, each with its own generator (shared with this batch, not copied)."""
        prompts = [self.prompts[i] for i in index.tolist()]
        rngs = [self.rngs[i] for i in index.tolist()]
        return Batch(prompts, self.cond[index], self.noise[index], rngs, self.step_rng, self.step)

    def grouped(self, size: int) -> Batch:
        """As many samples, in groups of ``size`` that share prompt and noise: those of the group's first sample.

        Each sample keeps its own generator. Whole groups do not depend on how the batch was split.
        """
        first = torch.arange(len(self)) // size * size
        prompts = [self.prompts[i] for i in first.tolist()]
        return Batch(prompts, self.cond[first], self.noise[first], self.rngs, self.step_rng, self.step)


@dataclass(frozen=True)
class Trajectory:
    """A stochastic rollout of N steps, without gradient."""

    states: Tensor  # (B, N + 1, ...), noise first
    log_prob: Tensor  # (B, N) of each move, as ``log_normal`` gives it; 0 for a move without noise
    x_0: Tensor  # (B, ...) the image that the last velocity predicts, without the noise of the last move


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on ``key`` alone, whatever the device, rank or run before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def randint(low: int, high: int, rng: torch.Generator) -> int:
    """Uniform on low, ..., high: both ends included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def euler(x: Tensor, v: Tensor, at: float | Tensor, to: float | Tensor) -> Tensor:
    """From sigma ``at`` to sigma ``to`` in one go: a sampler step, a leap, or with to = 0 the predicted image."""
    return x + (to - at) * v.to(x.dtype)  # in the latents' precision, whatever the network's


def integrate(
    flow: Flow, x: Tensor, sigmas: Tensor, cond: Cond, *, grad: bool = False, reference: bool = False
) -> Tensor:
    """The sampler: Euler from sigmas[0] to sigmas[-1]. Without ``grad`` the result is a constant; with it, exact BPTT.

    The backward keeps one step at a time in memory, and makes every forward a second time for that.
    A part of a rollout is a part of its grid: ``integrate(flow, x_k, sigmas[k : j + 1], cond)`` is x_j.
    """

    def step(x: Tensor, at: Tensor, to: Tensor) -> Tensor:
        return euler(x, flow.velocity(x, at, cond, reference=reference), at, to)

    with torch.set_grad_enabled(grad):
        for at, to in itertools.pairwise(sigmas):
            x = checkpointed(step, x, at, to) if grad else step(x, at, to)
    return x if grad else x.detach()


recomputing = ContextVar("recomputing", default=False)  # is this forward a repetition, made for a backward?


def checkpointed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)`` with the same gradient, bitwise: its inside is not kept, but computed again backward."""
    return checkpoint(
        *(function, *arguments), use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _again()),
    )  # fmt: skip


@contextmanager
def _again() -> Iterator[None]:
    token = recomputing.set(True)
    try:
        yield
    finally:
        recomputing.reset(token)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` forward, exactly; the gradient goes to ``gradient`` alone (LeapAlign's latent connector)."""
    return value.detach() + (gradient - gradient.detach())  # the bracket is exactly zero, so nothing is rounded


def guided(
    positive: Callable[[], Tensor],
    negative: Callable[[], Tensor],
    guidance: float | Tensor,
    gradient: Literal["full", "stop"] = "full",
) -> Tensor:
    """Classifier-free guidance, v_neg + guidance (v_pos - v_neg), of two evaluations of the network.

    ``gradient``: "full" goes through both. "stop": v_neg is a constant, so that v_pos's counts ``guidance`` times.
    """
    with nullcontext() if gradient == "full" else torch.no_grad():
        v_neg = evaluated(negative())
    v_pos = evaluated(positive())
    return v_neg + guidance * (v_pos - v_neg)


_counters: ContextVar[tuple[list[tuple[int, bool]], ...]] = ContextVar("_counters", default=())


def evaluated(v: Tensor) -> Tensor:
    """``v``, the output of one evaluation of the network; whoever counts them is told.

    A velocity that is one evaluation need not say so.
    """
    for counter in _counters.get():
        counter.append((len(v), v.requires_grad))
    return v


def counted(velocity: Callable[..., Tensor], *arguments: Any, **named: Any) -> tuple[Tensor, list[tuple[int, bool]]]:
    """A velocity, and the evaluations of the network that it took: of how many samples, and whether with gradient."""
    calls: list[tuple[int, bool]] = []
    token = _counters.set((*_counters.get(), calls))
    try:
        v = velocity(*arguments, **named)
    finally:
        _counters.reset(token)
    return v, calls or [(len(v), v.requires_grad)]


def scale_grad(z: Tensor, factor: float) -> Tensor:
    """``z`` forward, exactly; ``factor`` times its gradient backward."""
    return z.detach() + factor * (z - z.detach())


def sde_step(
    x: Tensor, v: Tensor, at: float | Tensor, to: float | Tensor, eta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation (broadcastable) of one noisy move with the marginals of the flow.

    ``eta``: noise per square root of time; Dance-SDE: a constant. ``at``, ``to``, ``eta``: numbers, or (B,).
    mean = x - h v + eta^2 h score / 2 with score = -(x + (1 - t) v) / t and h = at - to; eta = 0 is Euler.
    """
    t, to, eta = (_column(s, x) for s in (at, to, eta))
    h, v = t - to, v.to(x.dtype)
    mean = x - h * v - eta.square() * h / (2 * t) * (x + (1 - t) * v)
    return mean, eta * h.sqrt()


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) log-density of N(mean, std^2) at ``x``, as a *mean* over the latent's dimensions, as all GRPO codes have it.

    A ratio of these is the d-th root of the true likelihood ratio; the usual clip range of 1e-4 is tuned to that.
    """
    density = -(x - mean).square() / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


@torch.no_grad()
def integrate_sde(flow: Flow, batch: Batch, sigmas: Tensor, eta: float | Tensor) -> Trajectory:
    """The stochastic sampler from ``batch.noise``, each sample's noise from its own generator.

    ``eta``: of every step, or (N,) one for each; a step with 0 is the sampler's own Euler, and draws no noise.
    """
    x, states, log_prob = batch.noise, [batch.noise], []
    etas = torch.as_tensor(eta, dtype=torch.float64).expand(len(sigmas) - 1).tolist()
    for at, to, noise in zip(sigmas[:-1], sigmas[1:], etas):
        v = flow.velocity(x, at.to(x).expand(len(x)), batch.cond)  # sigma per sample, as training will call it
        x_0 = euler(x, v, at, 0.0)
        if noise == 0:
            x = euler(x, v, at, to)
            log_prob.append(torch.zeros(len(x), dtype=x.dtype, device=x.device))
        else:
            mean, std = sde_step(x, v, at, to, noise)
            x = mean + std * batch.randn_like(x)
            log_prob.append(log_normal(x, mean, std))
        states.append(x)
    return Trajectory(torch.stack(states, 1), torch.stack(log_prob, 1), x_0)


def _column(s: float | Tensor, x: Tensor) -> Tensor:
    """A number or (B,) values, shaped to multiply ``x`` and in its precision."""
    return torch.as_tensor(s, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))

"""The calling convention of every model, and the integration that all methods differentiate.

t = 1 is noise and t = 0 the image; sigma is the same time. v = noise - image, hence
``x_next = x + (sigma_next - sigma) * v``. B is the number of samples, N that of sampler steps.
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

from alignbench.evaluator import Prompt


@dataclass(frozen=True)
class Cond:
    """Text conditioning: named tensors with the samples as first dimension (B, ...)."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor) -> Cond:
        """Return the conditioning of some samples."""
        return Cond({name: t[index] for name, t in self.tensors.items()})


class Flow(Protocol):
    """A text-to-image flow model, or an analytic toy.

    A flow that is evaluated also has ``at(size=, guidance=)``, which returns the same weights at the image size
    (pixels) and guidance of the evaluation. One that takes published weights has ``load_transformer`` and
    ``load_lora``, each of the files that ``weights.published`` returns, the second with the strength that the row says.
    A toy that is only trained needs none of these.
    """

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        """Return v(x, sigma, cond), of the shape of ``x``.

        ``x``: (B, ...) latents. ``sigma``: a number, a 0-dim tensor, or (B,) one per sample. ``reference``: evaluate
        the base model, as it was before training.
        """

    def sigmas(self, steps: int) -> Tensor:
        """Return the sampler's grid: (steps + 1,) sigmas from 1 to 0, shifted as the model's own sampler does."""

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return (n, ...) initial latents ~ N(0, I), sample i drawn on the CPU from ``generators[i]``."""

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Return the text conditioning of B prompts."""

    def decode(self, x0: Tensor) -> Tensor:
        """Return the pixels (B, 3, H, W) in [0, 1] of (B, ...) latents, differentiably."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that are trained."""

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Return the same parameters in the same order, each with the name under which it is saved."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples: the input of a loss.

    Prompts, noise and randomness are drawn from (seed, step, sample), hence the same for every method and however the
    batch is split.

    - ``prompts``: B prompts; ``cond``: their conditioning.
    - ``noise``: (B, ...) initial latents.
    - ``rngs``: one generator per sample, so that a draw does not depend on how the batch was split.
    - ``step_rng``: equal on all ranks and micro-batches, for choices that decide which network calls happen.
    - ``step``: number of the batch, from 0.
    """

    prompts: Sequence[Prompt]
    cond: Cond
    noise: Tensor
    rngs: Sequence[torch.Generator]
    step_rng: torch.Generator
    step: int

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.prompts)

    def randn_like(self, x: Tensor) -> Tensor:
        """Return fresh N(0, I) noise of the shape of ``x``, row i drawn on the CPU from sample i's generator."""
        rows = [torch.randn(x.shape[1:], generator=rng, dtype=x.dtype) for rng in self.rngs]
        return torch.stack(rows).to(x.device)

    def select(self, index: Tensor) -> Batch:
        """Return the samples at ``index``, each with its own generator (shared with this batch, not copied)."""
        prompts = [self.prompts[i] for i in index.tolist()]
        rngs = [self.rngs[i] for i in index.tolist()]
        return Batch(prompts, self.cond[index], self.noise[index], rngs, self.step_rng, self.step)

    def grouped(self, size: int) -> Batch:
        """Return as many samples in groups of ``size``, which share the prompt and the noise of the group's first one.

        Each sample keeps its own generator. As long as groups are whole, they do not depend on how the batch was split.
        """
        first = torch.arange(len(self)) // size * size
        prompts = [self.prompts[i] for i in first.tolist()]
        return Batch(prompts, self.cond[first], self.noise[first], self.rngs, self.step_rng, self.step)


@dataclass(frozen=True)
class Trajectory:
    """A stochastic rollout of N steps, without gradient.

    - ``states``: (B, N + 1, ...) latents, noise first.
    - ``log_prob``: (B, N) log-densities of the moves, as from ``log_normal``; 0 for a move without noise.
    - ``x_0``: (B, ...) latents that the last velocity predicts, without the noise of the last move.
    """

    states: Tensor
    log_prob: Tensor
    x_0: Tensor


def seeded(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on ``key`` alone, not on device, rank or earlier draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def randint(low: int, high: int, rng: torch.Generator) -> int:
    """Draw an integer uniformly from low, ..., high, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def euler(x: Tensor, v: Tensor, at: float | Tensor, to: float | Tensor) -> Tensor:
    """Return x + (to - at) v: a sampler step, a leap over several, or with ``to`` = 0 the predicted image.

    ``at``, ``to``: sigmas; numbers, or tensors that broadcast against ``x``.
    """
    return x + (to - at) * v.to(x.dtype)  # in the latents' precision, whatever the network's


def integrate(
    flow: Flow, x: Tensor, sigmas: Tensor, cond: Cond, *, grad: bool = False, reference: bool = False
) -> Tensor:
    """Return the latents at sigmas[-1]: the Euler sampler, started with ``x`` at sigmas[0].

    Part of a rollout is part of its grid: ``integrate(flow, x_k, sigmas[k : j + 1], cond)`` is x_j.

    ``grad``: False: the result is a constant. True: exact back-propagation through all steps; the backward pass keeps
    one step at a time in memory and repeats every forward for that. ``reference``: sample from the base model.
    """

    def step(x: Tensor, at: Tensor, to: Tensor) -> Tensor:
        return euler(x, flow.velocity(x, at, cond, reference=reference), at, to)

    with torch.set_grad_enabled(grad):
        for at, to in itertools.pairwise(sigmas):
            x = checkpointed(step, x, at, to) if grad else step(x, at, to)
    return x if grad else x.detach()


recomputing = ContextVar("recomputing", default=False)  # True in a forward that is repeated for a backward pass


def checkpointed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return ``function(*arguments)``, with the same gradient bitwise; its activations are recomputed, not kept.

    While they are recomputed, ``recomputing`` is True.
    """
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
    """Return ``value``, exactly, whose gradient goes to ``gradient`` alone (the latent connector of LeapAlign)."""
    return value.detach() + (gradient - gradient.detach())  # the bracket is exactly zero, so nothing is rounded


def guided(
    positive: Callable[[], Tensor],
    negative: Callable[[], Tensor],
    guidance: float | Tensor,
    gradient: Literal["full", "stop"] = "full",
) -> Tensor:
    """Return v_neg + guidance (v_pos - v_neg): classifier-free guidance from two evaluations of the network.

    ``positive``, ``negative``: return (B, ...) velocities with and without the prompt. ``gradient``: "full": through
    both. "stop": v_neg is a constant, so that the gradient of v_pos counts ``guidance`` times.
    """
    with nullcontext() if gradient == "full" else torch.no_grad():
        v_neg = evaluated(negative())
    v_pos = evaluated(positive())
    return v_neg + guidance * (v_pos - v_neg)


_counters: ContextVar[tuple[list[tuple[int, bool]], ...]] = ContextVar("_counters", default=())


def evaluated(v: Tensor) -> Tensor:
    """Return ``v``, the output of one evaluation of the network, and count it.

    For velocities that take several evaluations; one that never calls this counts as a single evaluation.
    """
    for counter in _counters.get():
        counter.append((len(v), v.requires_grad))
    return v


def counted(velocity: Callable[..., Tensor], *arguments: Any, **named: Any) -> tuple[Tensor, list[tuple[int, bool]]]:
    """Return ``velocity(...)`` and the evaluations of the network behind it: (samples, with gradient) of each."""
    calls: list[tuple[int, bool]] = []
    token = _counters.set((*_counters.get(), calls))
    try:
        v = velocity(*arguments, **named)
    finally:
        _counters.reset(token)
    return v, calls or [(len(v), v.requires_grad)]


def scale_grad(z: Tensor, factor: float) -> Tensor:
    """Return ``z``, exactly, whose gradient is multiplied by ``factor``."""
    return z.detach() + factor * (z - z.detach())


def sde_step(
    x: Tensor, v: Tensor, at: float | Tensor, to: float | Tensor, eta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean (B, ...) and standard deviation (broadcastable) of one noisy move with the marginals of the flow.

    mean = x - h v + eta^2 h score / 2 and std = eta sqrt(h), with score = -(x + (1 - t) v) / t, t = at, h = at - to.
    With eta = 0 it is ``euler``. ``eta``: noise per square root of time; Dance-SDE (arXiv 2505.07818) has a constant.
    ``at``, ``to``, ``eta``: numbers, or (B,) one per sample.
    """
    t, to, eta = (_column(s, x) for s in (at, to, eta))
    h, v = t - to, v.to(x.dtype)
    mean = x - h * v - eta.square() * h / (2 * t) * (x + (1 - t) * v)
    return mean, eta * h.sqrt()


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the (B,) log-densities of N(mean, std^2) at ``x``, as a *mean* over the d dimensions of the latent.

    The GRPO codes take this mean, too. A ratio of these densities is the d-th root of the true likelihood ratio; the
    usual clip range of 1e-4 is tuned to that.
    """
    density = -(x - mean).square() / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


@torch.no_grad()
def integrate_sde(flow: Flow, batch: Batch, sigmas: Tensor, eta: float | Tensor) -> Trajectory:
    """Sample from ``batch.noise`` with noisy moves; each sample's noise comes from its own generator.

    ``sigmas``: (N + 1,) grid. ``eta``: a number for all steps, or (N,) one for each; see ``sde_step``. A step with
    eta = 0 is a step of the plain Euler sampler and draws no noise.
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
    """Return a number or (B,) values, shaped to multiply ``x`` and in its precision."""
    return torch.as_tensor(s, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))

"""Pathwise methods at fixed steps on an affine flow, and the closed forms of their gradients."""

from __future__ import annotations

import torch

from alignbench.analytic import AffineFlow, QuadraticReward
from alignbench.flow import seeded
from alignbench.methods.drtune import DRTune
from alignbench.methods.leapalign import LeapAlign
from alignbench.methods.refl import ReFL
from alignbench.testing.method_contract import backpropagate, gradients_of
from alignbench.training.batches import make_batch

N, B, MU = 5, 3, 1.0
REWARD = QuadraticReward(MU)


class ReFLAt(ReFL):
    """ReFL at a given step."""

    s: int = 0

    def draw(self, rng):
        return self.s


class DRTuneAt(DRTune):
    """DRTune with given trained steps and stop."""

    trained: tuple[int, ...] = ()
    stop: int = 0

    def draw(self, rng):
        return set(self.trained), self.stop


class LeapAt(LeapAlign):
    """LeapAlign with given leaps."""

    at: tuple[int, int] = (0, 1)

    def draw(self, rng):
        return self.at


class RewardLog(QuadraticReward):
    """A reward that records the latents it is given."""

    def __init__(self, margin=None):
        super().__init__(MU, margin)
        self.seen = []

    def __call__(self, pixels, prompts):
        self.seen.append(pixels.detach())
        return super().__call__(pixels, prompts)


def make_flow(steps=N):
    """Return an affine flow with nonzero biases, as after training."""
    flow = AffineFlow(steps)
    with torch.no_grad():
        flow.bias.normal_(generator=seeded("bias", steps))
    return flow


def gradient(method, reward=REWARD, flow=None):
    """Return the gradient (N, dim) of the bias after one batch."""
    flow = flow or make_flow(method.steps)
    backpropagate(method, flow, reward, make_batch(flow, range(B)))
    return gradients_of(flow)[0]


class Path:
    """The deterministic trajectory and the other terms of the closed forms, from a plain loop."""

    def __init__(self, steps=N, flow=None):
        self.flow = flow or make_flow(steps)
        batch = make_batch(self.flow, range(B))
        self.t, self.c = self.flow.sigmas(steps), batch.cond
        self.h = self.t[:-1] - self.t[1:]
        self.x, self.v = [batch.noise], []
        with torch.no_grad():
            for i in range(steps):
                self.v.append(self.flow.velocity(self.x[i], self.t[i], self.c))
                self.x.append(self.x[i] - self.h[i] * self.v[i])
        self.g = self.x[-1] - MU
        self.identity = torch.eye(self.flow.dim, dtype=torch.float64)

    def predicted(self, i):
        """Return x0hat_i."""
        return self.x[i] - self.t[i] * self.v[i]

    def back(self, gradient, factor):
        """Return (I - factor A)^T gradient, for row vectors."""
        return gradient @ (self.identity - factor * self.flow.A)


def stacked(rows, steps=N):
    """Return (steps, dim): the mean over samples of {step: gradient (B, dim)}, zero for missing steps."""
    table = torch.zeros(steps, 3, dtype=torch.float64)
    for i, row in rows.items():
        table[i] = row.mean(0)
    return table


def close(actual, expected):
    """Assert equality up to float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)

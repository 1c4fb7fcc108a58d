"""Tiny backends with compiled blocks."""

from __future__ import annotations

import torch
from support.tiny import PROMPTS

from alignbench.flow import seeded
from alignbench.testing.method_contract import gradients_of


def calls(flow):
    """Return all that training computes: velocities, the base model's, and gradients of weights and input."""
    x, cond = flow.noise(2, [seeded("noise", i) for i in range(2)]), flow.encode(PROMPTS)
    with torch.no_grad():
        velocities = [flow.velocity(x, 0.5, cond), flow.velocity(x, 0.7, cond, reference=True)]
    flow.transformer.zero_grad()
    v = flow.velocity(flow.velocity(x, 0.5, cond), 0.3, cond)
    v.square().sum().backward()
    start = x.clone().requires_grad_()
    base = flow.velocity(start, 0.5, cond, reference=True)
    return [*velocities, v.detach(), *gradients_of(flow), *torch.autograd.grad(base.square().sum(), start)]


def near(ours, theirs, tolerance):
    """Assert that every relative difference is within the tolerance."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()

"""Tiny backends with compiled blocks, and a count of their graphs."""

from __future__ import annotations

import torch
from support.small_backends import PROMPTS

from alignbench.flow import seeded
from alignbench.testing.method_contract import gradients_of


def calls(flow):
    """All that training asks for: velocities without and with gradient, the base model's, that through its input."""
    x, cond = flow.noise(2, [seeded("noise", i) for i in range(2)]), flow.encode(PROMPTS)
    with torch.no_grad():
        found = [flow.velocity(x, 0.5, cond), flow.velocity(x, 0.7, cond, reference=True)]
    flow.transformer.zero_grad()
    v = flow.velocity(flow.velocity(x, 0.5, cond), 0.3, cond)
    v.square().sum().backward()
    start = x.clone().requires_grad_()
    base = flow.velocity(start, 0.5, cond, reference=True)
    return [*found, v.detach(), *gradients_of(flow), *torch.autograd.grad(base.square().sum(), start)]


def near(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()

"""Tiny backends with compiled blocks."""

from __future__ import annotations

import pytest
import torch
from support.tiny import PROMPTS

from alignbench.backends import kernels
from alignbench.flow import seeded
from alignbench.plugins import Registry
from alignbench.rehearsal.tiny_backends import backend
from alignbench.testing.method_contract import gradients_of


@pytest.fixture(scope="module", params=["flux", "sd3", "flux2"])
def load(request, tmp_path_factory):
    """A function that loads a tiny model with nonzero adapters."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    wanted = {"model": "shapes", "max_sequence_length": 16} if family == "flux" else backend(family, folder)
    wanted |= {"name": family, "size": 32, "dtype": "float32", "tune": "lora", "lora_rank": 4}

    def load(**changes):
        flow = Registry().make("backend", wanted | changes, "backend").load()
        if flow._settings.tune == "lora":
            with torch.no_grad():
                for i, p in enumerate(flow.parameters()):
                    p += 0.05 * torch.randn(p.shape, generator=seeded("adapter", i))
        return flow

    return load


@pytest.fixture
def traced(monkeypatch):
    """Compile as usual, but run the graphs with torch's own kernels: seconds, where inductor takes minutes."""
    monkeypatch.setattr(kernels, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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

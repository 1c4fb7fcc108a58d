"""Tiny backends with adapters, and compilation without inductor."""

from __future__ import annotations

import pytest
import torch

from alignbench.backends import kernels
from alignbench.flow import seeded
from alignbench.plugins import Registry
from alignbench.rehearsal.tiny_backends import backend


@pytest.fixture(scope="module", params=["flux", "sd3", "flux2"])
def load(request, tmp_path_factory):
    """A function that loads a small model, with adapters that have moved."""
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
    """Graphs are made as ever, and run by torch's own kernels: seconds, where inductor's take minutes."""
    monkeypatch.setattr(kernels, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

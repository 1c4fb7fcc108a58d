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
    """Return a function that loads a tiny model with adapters after an update."""
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
    """Trace graphs as usual but run them with torch's own kernels, in seconds instead of inductor's minutes."""
    monkeypatch.setattr(kernels, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

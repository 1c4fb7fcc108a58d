"""benchmarks/steps.py repeats exactly the calls that a method made."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "steps.py"


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("benchmark_steps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


class Line:
    """A flow with v = w x."""

    def __init__(self) -> None:
        self.w = torch.tensor(2.0, requires_grad=True)

    def velocity(self, x, sigma, cond, *, reference=False):
        return self.w * x


def test_a_call_is_repeated_with_its_own_backward(steps):
    """Gradients are equal without a graph, with an unused one, and with backward to the input or the weights."""
    flow, accelerator = Line(), SimpleNamespace(backward=lambda loss: loss.backward())
    recorder = steps.Recorder(flow, accelerator)
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    with torch.no_grad():
        recorder.velocity(x, 0.5, None)
    recorder.velocity(x, 0.5, None)
    torch.autograd.grad(recorder.velocity(x, 0.5, None).sum(), x)
    accelerator.backward(recorder.velocity(x.detach(), 0.5, None).sum())
    assert [call.backward for call in recorder.calls] == ["", "", "input", "all"]
    assert [call.grad for call in recorder.calls] == [False, True, True, True]
    assert [call.wants for call in recorder.calls] == [False, True, True, False]
    assert flow.w.grad == 4.0
    flow.w.grad = None
    for call in recorder.calls:
        call.repeat()
    assert flow.w.grad == 4.0


@pytest.mark.slow
def test_a_row_counts_the_methods_calls(steps):
    """LeapAlign takes ten steps per sample, two of them with gradient; both sides take time."""
    flow = steps.Flux(model="shapes", size=32, max_sequence_length=16, dtype="float32").load()
    row = steps.step("leapalign", flow, 2, pairs=1)
    assert (row["forward"], row["grad"], row["recomputed"]) == (8, 2, 0)
    assert row["least"] <= row["ratio"] <= row["largest"]
    assert row["ratio"] == pytest.approx(row["ours"] / row["other"])

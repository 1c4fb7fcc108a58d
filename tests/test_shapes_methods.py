"""Every method of the packaged sweep on the real (small) flow model, as far as seconds reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from alignbench.config import settings
from alignbench.evaluator import Reward, Term
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts
from alignbench.spec import Budget
from alignbench.sweep import Cell, read, resolve
from alignbench.testing import unclocked
from alignbench.train import train

SWEEP = Path(__file__).parent.parent / "sweeps" / "shapes_methods.yaml"
REGISTRY = Registry()
CELLS = [cell for cell in resolve(read(str(SWEEP)), REGISTRY).cells if cell.seed == 0]


def run(cell: Cell) -> tuple[list[dict], list[torch.Tensor]]:
    """Two batches of the cell's training, from a freshly loaded model: records and weights."""
    spec = cell.spec
    flow = REGISTRY.make("backend", spec.backend, "backend").load()
    method = REGISTRY.make("method", spec.method, "method")
    terms = [
        Term(REGISTRY.make("evaluator", part["evaluator"], "reward"), part["margin"], part["weight"])
        for part in spec.rewards
    ]
    training = type(spec.training)(**{**_fields(spec.training), "budget": Budget(images=2 * spec.training.batch)})
    prompts = load_prompts(spec.prompts)
    records = list(train(method, flow, Reward(*terms), prompts, training, accelerator=Accelerator(cpu=True)))
    return records, [p.detach().clone() for p in flow.parameters()]


def _fields(training):
    return {name: getattr(training, name) for name in training.__struct_fields__}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.spec.label)
def test_the_same_run_twice_is_bitwise_the_same(cell):
    """Every weight and every record but the clock; and the weights have moved, by finite numbers."""
    (records, weights), (again, same) = run(cell), run(cell)
    assert unclocked(records) == unclocked(again)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    base = REGISTRY.make("backend", cell.spec.backend, "backend").load().parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights, base))
    assert all(w.isfinite().all() for w in weights)


def test_the_sweep_has_every_method():
    """Each built-in method that trains has a row."""
    rows = {cell.spec.method["name"] for cell in CELLS}
    assert rows == {name for name in REGISTRY.names("method") if REGISTRY.get("method", name, "method").trains}


def test_equal_budgets_and_batches():
    """All rows train on the same number of images, in batches of the same size."""
    shared = [settings(cell.spec.training) for cell in CELLS]
    assert all(plain == shared[0] for plain in shared)

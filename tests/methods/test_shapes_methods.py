"""Every method of the packaged sweep on the real (small) flow model, within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support.tiny import flux_folder

from alignbench.analytic import PROMPTS, Quadratic
from alignbench.backends.flux import Flux
from alignbench.config import settings
from alignbench.evaluator import Reward, Term
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import Budget
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts
from alignbench.testing.method_contract import backpropagate, unclocked
from alignbench.training.batches import draw_batch
from alignbench.training.loop import train

SWEEP = Path(__file__).parents[2] / "sweeps" / "shapes_methods.yaml"
REGISTRY = Registry()
CELLS = [cell for cell in resolve(read(str(SWEEP)), REGISTRY).cells if cell.seed == 0]


def run(cell: PlannedRun) -> tuple[list[dict], list[torch.Tensor]]:
    """Train on two batches with a freshly loaded model. Return records and weights."""
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
    """All weights are equal, and all records but the times; the weights have changed, and are finite."""
    (records, weights), (again, same) = run(cell), run(cell)
    assert unclocked(records) == unclocked(again)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    base = REGISTRY.make("backend", cell.spec.backend, "backend").load().parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights, base))
    assert all(w.isfinite().all() for w in weights)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux") / "model", scale=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.spec.label)
def test_every_method_trains_a_flux_in_bfloat16(cell, checkpointing, tiny):
    """One update with frozen bfloat16 weights and LoRA, with and without block checkpointing: finite gradients."""
    settings = {"size": 32, "tune": "lora", "dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    flow = Flux(model=str(tiny), max_sequence_length=16, **settings).load()
    method = REGISTRY.make("method", cell.spec.method, "method")
    batch = draw_batch(flow, PROMPTS, cell.spec.training, 0, range(24), torch.device("cpu"))
    losses = backpropagate(method, flow, Reward(Term(Quadratic(target=1.0))), batch)
    gradients = [p.grad for p in flow.parameters() if p.grad is not None]
    assert all(loss.value.isfinite() for loss in losses)
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_the_sweep_has_every_method():
    """Each built-in method that trains has a row."""
    rows = {cell.spec.method["name"] for cell in CELLS}
    assert rows == {name for name in REGISTRY.names("method") if REGISTRY.get("method", name, "method").trains}


def test_equal_budgets_and_batches():
    """All rows train on the same number of images, in batches of the same size; what else differs has its reason."""
    assert len({(cell.spec.training.budget.images, cell.spec.training.batch) for cell in CELLS}) == 1
    shared = settings(CELLS[0].spec.training)
    assert all(settings(c.spec.training) == shared or any("lr" in str(n["set"]) for n in c.notes) for c in CELLS)

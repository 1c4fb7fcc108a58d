"""benchmarks/gpu.py measures correctly on small models, before it runs at full size, where minutes are expensive."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from alignbench.methods.leapalign import LeapAlign

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(gpu, tmp_path_factory):
    return gpu.world(True, CPU, tmp_path_factory.mktemp("world") / "model")


@pytest.fixture
def sheet(gpu, tmp_path):
    return gpu.Sheet(tmp_path, 5, {"name": "test", "card": "CPU"})


def test_flops_are_those_of_the_model_that_runs(world):
    """FLOPs are counted for the transformer's parameters, and no weight matrix is zero."""
    transformer = world.pipeline.transformer
    assert world.model.transformer.parameters == sum(p.numel() for p in transformer.parameters())
    assert all((p != 0).any() for p in transformer.parameters())


def test_a_forward_is_the_backends(gpu, world, sheet):
    """The row's output is ``velocity``'s and finite; its utilisation is FLOPs / seconds / peak."""
    answer = gpu.forward(world, sheet, "", world.size)
    x, cond = gpu.inputs(world, world.size, 1)
    with torch.no_grad():
        assert torch.equal(answer, world.flow.velocity(x, 0.5, cond))
    assert answer.isfinite().all()
    (row,) = sheet.rows
    assert row["mfu"] == pytest.approx(world.flops(world.size) / (row["value"] / 1e3) / gpu.PEAK)


@pytest.mark.slow
def test_a_training_sample_costs_its_forwards_and_backwards(gpu, world):
    """N steps of LeapAlign cost N forwards, 2 backwards, a decode and its backward; checkpointing repeats 2 and 1.

    Only the second and third of three updates count. Adapters move, and peak memory is measured.
    """
    trained = gpu.with_adapters(world)
    before = [p.detach().clone() for p in trained.flow.parameters()]
    found = gpu.step(trained, LeapAlign(steps=4), world.size)
    tokens = world.model.tokens(world.size, world.words)
    f, b = world.flops(world.size), world.model.transformer.backward(tokens, full=False)
    decode = world.model.decoder.forward(world.size)
    assert found.model == pytest.approx(4 * f + 2 * b + 2 * decode)
    assert found.hardware == pytest.approx(6 * f + 2 * b + 3 * decode)
    assert found.seconds > 0
    assert found.peak > 0
    assert all(not torch.equal(p, q) for p, q in zip(trained.flow.parameters(), before))


@pytest.mark.slow
def test_all_weights_train_after_the_adapters_are_deleted(gpu, tmp_path, sheet):
    """After adapters in bfloat16, every matrix of the model trains in bfloat16, and its backward is counted."""
    it = gpu.with_adapters(gpu.world(True, CPU, tmp_path / "model"))
    gpu.masters(it, sheet)
    assert {p.dtype for p in it.flow.parameters()} == {torch.bfloat16}
    own = {name: p for name, p in it.flow.transformer.named_parameters() if ".lora_" not in name}
    before = {name: p.detach().clone() for name, p in own.items()}
    gpu.all_weights(it, sheet)
    assert not [name for name, _ in it.flow.transformer.named_parameters() if ".lora_" in name]
    moved = [name for name, p in own.items() if not torch.equal(p.float(), before[name].float())]
    assert set(own) - set(moved) <= {name for name in own if own[name].ndim < 2}
    assert {p.dtype for p in own.values() if p.ndim > 1} == {torch.bfloat16}
    adapters, *_, everything = sheet.rows
    assert everything["mfu"] * everything["value"] > adapters["mfu"] * adapters["value"]


@pytest.mark.slow
def test_a_failed_or_skipped_phase_does_not_stop_the_others(gpu, world, sheet, tmp_path):
    """A phase that raises and one that would take too long are rows; later phases are measured and saved."""

    def broken(it, sheet):
        raise RuntimeError("no such\nkernel")

    def quick(it, sheet):
        sheet.add("quick", 1.0, "s")

    gpu.run(world, sheet, [gpu.Phase(broken, 0.1), gpu.Phase(quick, 99), gpu.Phase(quick, 0.1)])
    assert [row["unit"] for row in sheet.rows] == [
        "failed: RuntimeError: no such kernel",
        "skipped: it takes up to 99 minutes",
        "s",
    ]
    assert json.loads((tmp_path / "gpu-test.json").read_text())["rows"] == sheet.rows
    assert (tmp_path / "gpu-test.md").read_text().count("\n| ") == 4


def test_ceilings_are_weighted_like_the_blocks(gpu, world, sheet):
    """There is one rate per image size, between those of its slowest and fastest matrix."""
    gpu.ceilings(world, sheet)
    *rows, copy = sheet.rows
    assert len(sheet.ceilings) == len(world.sizes) == len(rows)
    for row in rows:
        rates = [value for key, value in row.items() if "x" in key]
        assert min(rates) <= row["value"] <= max(rates)
    assert copy["unit"] == "TB/s"

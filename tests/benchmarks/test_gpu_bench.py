"""benchmarks/gpu.py measures what it says, on small models: it runs at full size where minutes are dear."""

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


def test_the_arithmetic_is_of_the_model_that_runs(world):
    """The parameters that FLOPs are counted of are those of the transformer; none of its weights is zero."""
    transformer = world.pipeline.transformer
    assert world.model.transformer.parameters == sum(p.numel() for p in transformer.parameters())
    assert all((p != 0).any() for p in transformer.parameters())


def test_a_forward_is_the_backends_own(gpu, world, sheet):
    """The row's answer is ``velocity``'s, finite; its utilisation is FLOPs over seconds over the peak."""
    answer = gpu.forward(world, sheet, "", world.size)
    x, cond = gpu.inputs(world, world.size, 1)
    with torch.no_grad():
        assert torch.equal(answer, world.flow.velocity(x, 0.5, cond))
    assert answer.isfinite().all()
    (row,) = sheet.rows
    assert row["mfu"] == pytest.approx(world.flops(world.size) / (row["value"] / 1e3) / gpu.PEAK)


def test_a_training_sample_costs_its_forwards_and_backwards(gpu, world):
    """LeapAlign of N steps: N forwards, 2 backwards, one decode there and back; checkpointing repeats the latter two.

    The second and third update of three count. Adapters have a gradient, and memory is seen.
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
def test_all_weights_are_trained_once_the_adapters_are_gone(gpu, tmp_path, sheet):
    """After LeapAlign with adapters in bfloat16: every parameter of the model's own moves, and a backward through the
    weights counts; adapters are bfloat16 beside masters, all of the model's matrices afterwards too.
    """
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


def test_a_phase_fails_or_is_skipped_alone(gpu, world, sheet, tmp_path):
    """One that raises and one that would take too long are rows; what comes after them is measured, and kept."""

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


def test_ceilings_are_weighted_as_the_blocks_are(gpu, world, sheet):
    """One rate per image size, between the slowest and the fastest of its matrices."""
    gpu.ceilings(world, sheet)
    *rows, copy = sheet.rows
    assert len(sheet.ceilings) == len(world.sizes) == len(rows)
    for row in rows:
        rates = [value for key, value in row.items() if "x" in key]
        assert min(rates) <= row["value"] <= max(rates)
    assert copy["unit"] == "TB/s"

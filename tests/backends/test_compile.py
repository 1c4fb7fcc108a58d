"""``backend.compile``: the same model, compiled once for every kind of call."""

import pytest
import torch
from support.compiling import calls, near
from support.tiny import PROMPTS
from support.tiny_sweep import PLUGIN, sweep_file
from torch._dynamo.utils import counters

from alignbench.config import UserError
from alignbench.experiment import ids
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.flow import seeded
from alignbench.plugins import Registry
from alignbench.testing.method_contract import gradients_of


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"tune": "full"}], ids=["lora", "full"])
def test_compiled_blocks_are_the_same_and_compiled_once(load, traced, changes):
    """Velocities and gradients to 1e-5 in float32; after weights moved and adapters came and went, no graph more."""
    flow = load(compile=True, **changes)
    near(calls(flow), calls(load(**changes)), 1e-5)
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.01)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = calls(flow)
        near(calls(flow), again, 0)
    assert counters["stats"]["unique_graphs"] == made


@pytest.mark.slow
@pytest.mark.parametrize("load", ["flux2"], indirect=True)
def test_a_rollout_and_the_base_model_are_compiled_once(load, traced):
    """Velocities without gradient to 1e-5 in float32; the adapters' coming and going adds no graph."""

    def rollout(flow):
        x, cond = flow.noise(2, [seeded("noise", i) for i in range(2)]), flow.encode(PROMPTS)
        with torch.no_grad():
            return [flow.velocity(x, 0.5, cond, reference=base) for base in (False, True)]

    flow = load(compile=True)
    near(rollout(flow), rollout(load()), 1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        near(rollout(flow), rollout(flow), 0)


@pytest.mark.slow
def test_nothing_is_compiled_unless_asked(load, traced):
    """The default."""
    before = counters["stats"]["unique_graphs"]
    calls(load())
    assert counters["stats"]["unique_graphs"] == before


def test_parts_of_compiled_blocks_are_refused(load, traced):
    """FSDP2's hooks would be compiled with them: one line, before anything is split."""
    with pytest.raises(UserError, match=r"^backend.compile: .*; choose ddp, or false$"):
        load(compile=True).shard(lambda *_: pytest.fail("split"))


def test_uncompiled_runs_keep_their_ids(tmp_path, monkeypatch):
    """The hash has no such key unless blocks are compiled, which rounds differently; so has the base model's."""
    hashed = []
    monkeypatch.setattr(ids, "content_id", lambda content: hashed.append(content) or f"{len(hashed):010}")
    for changes in ({}, {"compile": True}):
        resolve(read(sweep_file(tmp_path, {"base": {"backend": changes}})), Registry([PLUGIN]))
    found = [content["backend"].get("compile") for content in hashed if "backend" in content]
    assert found == [None] * (len(found) // 2) + [True] * (len(found) // 2)
    assert len(found) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("load", ["flux"], indirect=True)
def test_inductor_rounds_no_worse_than_torch(load):
    """Its own kernels, in bfloat16: as near to the float32 network as uncompiled ones, within half; gradients too."""

    def trained(**changes):
        flow = load(**changes)
        v = flow.velocity(flow.noise(1, [seeded("noise")]), 0.5, flow.encode(PROMPTS[:1]))
        v.square().sum().backward()
        return v.detach(), torch.cat([g.flatten() for g in gradients_of(flow)])

    torch._dynamo.reset()
    exact, eager = trained(), trained(dtype="bfloat16")
    for ours, plain, true in zip(trained(dtype="bfloat16", compile=True), eager, exact, strict=True):
        assert 0 < (ours - true).norm() <= 1.5 * (plain - true).norm()
        assert (plain - true).norm() < 0.05 * true.norm()

"""AdamW's moments in 8 bits: what the levels are, what a moment loses, and that it is still AdamW."""

import pytest
import torch
from support.half_flow import HalfFlow
from support.tiny_sweep import PLUGIN, sweep_file
from support.training_runs import LEAP, newest, run, settings
from torch import nn

from alignbench.analytic import AffineFlow
from alignbench.config import UserError
from alignbench.experiment import ids
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import check_fsdp
from alignbench.methods.leapalign import LeapAlign
from alignbench.plugins import Registry
from alignbench.testing.method_contract import unclocked
from alignbench.training.adamw import AdamW
from alignbench.training.checkpoint import FINAL, load_records
from alignbench.training.quantization import BLOCK, SMALL, dequantize, levels, quantize

CPU = torch.device("cpu")
NAMED = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def large(rng, *shape):
    """Numbers of all sizes."""
    return torch.randn(shape, generator=rng) * 10.0 ** -(7 * torch.rand(shape, generator=rng))


def back(x, signed):
    return dequantize(*quantize(x, signed), signed, x)


@pytest.mark.parametrize(("signed", "count"), [(True, 256), (False, 255)])
def test_every_decade_has_half_the_levels_of_the_one_above(signed, count):
    """64, 32, ..., 1 positive levels of a signed number, twice as many of another; and 1, and a signed number's 0."""
    grid = levels(signed, CPU).double()
    assert len(grid) == count
    assert (grid.diff() > 0).all()
    assert grid[-1] == 1
    for e in range(7):
        decade = grid[(grid > 0.1 * 10.0**-e) & (grid < 10.0**-e)]
        assert len(decade) == 2 ** (6 - e + (not signed))
        torch.testing.assert_close(decade.diff(), (0.9 * 10.0**-e / len(decade)) * torch.ones(len(decade) - 1).double())
    assert (0 in grid) == signed
    if signed:
        assert torch.equal(grid[:127], -grid[128:255].flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_becomes_the_nearest_level(signed):
    """No other level of its block's scale is nearer. The largest of a block stays as it is, if it is positive."""
    x = large(torch.Generator().manual_seed(0), 16, BLOCK)
    x = x if signed else x.abs()
    scale = x.abs().amax(1, keepdim=True)
    every = (levels(signed, CPU)[None, None] * scale[..., None]).double()
    nearest = (every - x[..., None]).abs().amin(2)
    found = back(x, signed)
    torch.testing.assert_close((found.double() - x).abs(), nearest, rtol=1e-4, atol=1e-7 * scale.max().item())
    largest = x.max(1).values
    positive = largest == scale[:, 0]
    assert positive.sum() > 4
    assert torch.equal(found.max(1).values[positive], largest[positive])


def test_any_shape_is_taken():
    """A last block that is not full, and zeros, which stay zero; and shape and type come back."""
    x = large(torch.Generator().manual_seed(0), 7, 11, 13).double()
    codes, scale = quantize(x, True)
    assert codes.shape == (4, BLOCK)
    assert scale.shape == (4, 1)
    found = back(x, True)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    blocks = torch.cat([back(part, True) for part in x.flatten().split(BLOCK)])
    assert torch.equal(found.flatten(), blocks)
    for signed in (True, False):
        assert (back(torch.zeros(1000), signed) == 0).all()


def test_no_second_moment_becomes_zero():
    """A weight whose gradient is 1e-4 of its block's largest, and then zero, moves by less than lr in the next update;
    with a level at zero for the second moment it would move by thousands of it.
    """
    weight = nn.Parameter(torch.zeros(SMALL))
    optimizer = AdamW([{"params": [weight]}], **NAMED, seed=0, eight_bit=True)
    gradient = torch.full((SMALL,), 1e-4)
    gradient[0] = 1.0
    for g in (gradient, torch.zeros(SMALL)):
        before, weight.grad = weight.detach().clone(), g
        optimizer.step()
    assert (back(torch.full((SMALL,), 1e-30), False) > 0).all()
    assert 0 < (weight - before).abs().max() < NAMED["lr"]


def test_the_first_step_is_adamws():
    """Bit by bit, as moments lose nothing before they are kept; the second one's update to 5 % of its norm."""
    rng = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(2, SMALL, generator=rng), torch.randn(2, 2, SMALL, generator=rng)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], **NAMED)
    optimizer = AdamW([{"params": [ours]}], **NAMED, seed=0, eight_bit=True)
    for step, gradient in enumerate(gradients):
        before = theirs.detach().clone(), ours.detach().clone()
        for p, each in ((theirs, reference), (ours, optimizer)):
            p.grad = gradient.clone()
            each.step()
        if step == 0:
            assert torch.equal(theirs, ours)
    one, other = (p.detach() - was for p, was in zip((theirs, ours), before))
    assert 0 < (one - other).norm() < 0.05 * one.norm()


def test_a_quadratic_has_the_same_minimum():
    """Curvatures from 0.1 to 10: after 400 steps of lr, then 200 of a tenth, every weight is within lr / 5 of it, as
    AdamW's is.
    """
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(SMALL, generator=rng) - 0.5
    curvature = 10 ** (2 * torch.rand(SMALL, generator=rng) - 1)
    for eight in (False, True):
        weight = nn.Parameter(torch.zeros(SMALL))
        optimizer = AdamW([{"params": [weight]}], **NAMED, seed=0, eight_bit=eight)
        for n in range(600):
            optimizer.param_groups[0]["lr"] = NAMED["lr"] * (0.1 if n >= 400 else 1)
            weight.grad = curvature * (weight.detach() - target)
            optimizer.step()
        assert (weight - target).abs().max() < NAMED["lr"] / 5


def test_bytes_of_the_moments():
    """2 + 8 / 256 for a weight of a large tensor, 8 for one of a small tensor."""
    found = {}
    for size in (SMALL - 1, SMALL, 4 * SMALL):
        weight = nn.Parameter(torch.zeros(size))
        optimizer = AdamW([{"params": [weight]}], **NAMED, seed=0, eight_bit=True)
        weight.grad = torch.ones(size)
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        found[size] = sum(t.nbytes for name, t in state.items() if name != "step") / size
    assert found == {SMALL - 1: 8, SMALL: 2 + 8 / BLOCK, 4 * SMALL: 2 + 8 / BLOCK}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "master", "stochastic"])
def test_resumed_it_is_the_undisturbed_run(kind, tmp_path):
    """Bitwise, through checkpoints that hold codes and scales."""
    steps, dim = 2, SMALL // 2
    flow = AffineFlow if kind == "float32" else HalfFlow
    changes = {"optimizer": {"weights": kind, "moments": "8bit"}, "micro_batch": 4}
    method = LeapAlign(steps=steps)
    _, undisturbed = run(method, settings(4, **changes), tmp_path / "whole", flow=flow(steps, dim))
    for batches in (2, 4):
        run(method, settings(batches, **changes), tmp_path / "resumed", flow=flow(steps, dim))
    assert unclocked(load_records(tmp_path / "resumed")) == unclocked(undisturbed)
    assert (tmp_path / "resumed" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
    (state,) = newest(tmp_path / "resumed")["optimizer"]["state"].values()
    assert {name: t.dtype for name, t in state.items() if "exp" in name} == {
        "exp_avg": torch.uint8, "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32,
    }  # fmt: skip


def test_small_tensors_are_torchs_adamw():
    """A run whose tensors are all small: the very bits."""
    ends = [run(LEAP, settings(3, optimizer={"moments": moments}))[0].bias for moments in ("float32", "8bit")]
    assert torch.equal(*ends)


def test_blocks_are_of_whole_tensors():
    """With fsdp there is one line."""
    training = settings(optimizer={"moments": "8bit"})
    with pytest.raises(UserError, match=r"^training: optimizer.moments: '8bit' .* 'float32', or parallel: ddp$"):
        check_fsdp(training, "fsdp")
    check_fsdp(training, "ddp")


def test_float32_leaves_every_id_as_it_was(tmp_path, monkeypatch):
    """The hash of a run has the key only if it is not float32."""
    hashed = []
    monkeypatch.setattr(ids, "content_id", lambda content: hashed.append(content) or f"{len(hashed):010}")
    for training in ({}, {"optimizer": {"moments": "8bit"}}):
        resolve(read(sweep_file(tmp_path, {"base": {"training": training}})), Registry([PLUGIN]))
    found = [content["training"]["optimizer"].get("moments") for content in hashed if "training" in content]
    assert found == [None, None, "8bit", "8bit"]

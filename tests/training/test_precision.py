"""Trained weights in bfloat16: with masters they are float32's, alone they are right in the mean."""

import pytest
import torch
from accelerate import Accelerator
from support import tiny
from support.half_flow import HalfFlow
from support.tiny_sweep import PLUGIN, sweep_file
from support.training_runs import GRPO, LEAP, STEPS, newest, run, same_run, settings
from torch import nn

from alignbench.analytic import PROMPTS, AffineFlow, QuadraticReward
from alignbench.backends.flux import Flux
from alignbench.config import UserError
from alignbench.experiment import ids, spec
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import Optimizer, check_fsdp
from alignbench.methods.leapalign import LeapAlign
from alignbench.plugins import Registry
from alignbench.testing.method_contract import unclocked
from alignbench.training import loop
from alignbench.training.adamw import AdamW
from alignbench.training.checkpoint import FINAL, load_records, load_weights
from alignbench.training.precision import Weights, stochastic_round, total_norm

KINDS = ("float32", "master", "stochastic")
ULP = 2.0**-8  # of bfloat16 below 1


# -- stochastic rounding -----------------------------------------------------------------------------------------------


def test_what_bfloat16_represents_is_not_rounded():
    """Every finite number of it, both zeros and both infinities stay as they are."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    found = stochastic_round(every.float(), torch.Generator().manual_seed(0))
    assert torch.equal(found.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 1000, 2**15, 2**16 - 1])
def test_the_probability_is_exact(k, sign, monkeypatch):
    """Exactly k of the 65,536 draws take 1 + k / 65536 ulp away from zero, the others towards it."""
    monkeypatch.setattr(torch, "randint", lambda high, *_, **named: torch.arange(high, dtype=named["dtype"]))
    x = torch.full((2**16,), sign * (1 + k * 2.0**-23))
    found = stochastic_round(x, torch.Generator())
    assert (found == sign * (1 + 2.0**-7)).sum() == k
    assert (found == sign).sum() == 2**16 - k


def test_the_mean_of_many_draws_is_the_number():
    """2,000 numbers of all sizes, 4,000 draws each: within 5 sigma, where sigma^2 = p (1 - p) ulp^2 / draws."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=rng) * 10.0 ** torch.randint(-30, 30, (2000,), generator=rng)
    draws = 4000
    mean = stochastic_round(x.expand(draws, -1), rng).double().mean(0)
    low = (x.view(torch.int32) & -(2**16)).view(torch.float32).double()
    ulp = ((x.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32).double() - low
    p = (x.double() - low) / ulp
    assert ((mean - x).abs() <= 5 * ulp.abs() * (p * (1 - p) / draws).sqrt() + 1e-12 * x.abs()).all()


def updated(kind, n, lr, size):
    """Weights of one after ``n`` updates with a gradient of one, as the optimizer of a run has them."""
    if kind == "stochastic":
        weight = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        optimizer = AdamW([{"params": [weight]}], lr=lr, betas=(0.9, 0.999), eps=1e-30, weight_decay=0, seed=0)
    else:
        weight = nn.Parameter(torch.ones(size, dtype=torch.bfloat16 if kind == "plain" else torch.float32))
        optimizer = torch.optim.AdamW([weight], lr=lr, eps=1e-30, weight_decay=0)
    for _ in range(n):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().double()


def test_updates_below_half_an_ulp_are_made_in_the_mean():
    """AdamW's update is lr for a constant gradient. lr = 0.026 ulp: masters and the mean of weights are 1 - n lr after
    n updates, to 1e-6 and to 5 sigma of n lr ulp / weights; plain bfloat16 has not moved at all.
    """
    n, lr, size = 20, 1e-4, 2**13
    assert lr < ULP / 2
    assert (updated("plain", n, lr, size) == 1).all()
    assert updated("master", n, lr, size) == pytest.approx(1 - n * lr, abs=1e-6)
    assert updated("stochastic", n, lr, size).mean().item() == pytest.approx(
        1 - n * lr, abs=5 * (n * lr * ULP / size) ** 0.5
    )


def test_large_updates_are_adamws():
    """float32 weights: torch's own steps, bit by bit; bfloat16 ones: within an ulp of it after the first."""
    rng = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 40, generator=rng).bfloat16(), torch.randn(4, 3, 40, generator=rng)
    named = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    theirs, same, half = (nn.Parameter(start.float()), nn.Parameter(start.float()), nn.Parameter(start.clone()))
    reference = torch.optim.AdamW([theirs], **named)
    ours = [AdamW([{"params": [p]}], **named, seed=0) for p in (same, half)]
    for u, gradient in enumerate(gradients):
        for p, optimizer in ((theirs, reference), (same, ours[0]), (half, ours[1])):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
        assert torch.equal(same, theirs)
        if u == 0:
            assert ((half.float() - theirs).abs() <= 2.0**-7 * theirs.abs()).all()


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["master", "stochastic"])
def test_backwards_add_up_in_float32(kind):
    """512 gradients of one are 512; in bfloat16 they are 256. One backward alone leaves two bytes a weight."""
    flow = HalfFlow(STEPS)
    flow.bias.data = flow.bias.data.float()
    weights = Weights(flow, kind)
    plain = nn.Parameter(torch.zeros(STEPS, 3, dtype=torch.bfloat16))
    weights.start_update()
    for n in range(512):
        if n:
            weights.upcast_gradients()
        flow.bias.sum().backward()
        plain.sum().backward()
        if n == 0 and kind == "stochastic":
            assert flow.bias.grad.dtype == torch.bfloat16
    weights.gradients_to_masters()
    (master,) = weights.parameters.values()
    assert (master.grad == 512).all()
    assert master.grad.dtype == torch.float32
    assert (plain.grad == 256).all()
    master.grad = None
    weights.start_update()
    assert master.grad_dtype == (torch.bfloat16 if kind == "stochastic" else torch.float32)


def test_the_norm_of_gradients_in_bfloat16():
    """The norm of thousands of gradients has float32's precision, far beyond bfloat16's."""
    gradients = [torch.full((1000,), 0.1).bfloat16(), torch.full((7,), 3.0)]
    exact = torch.cat([g.double() for g in gradients]).norm()
    assert total_norm(gradients).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["master", "stochastic"])
@pytest.mark.parametrize("method", [LEAP, GRPO], ids=lambda m: m.name)
def test_micro_batches_are_one_batch(kind, method):
    """The first update's gradient norm, and loss: to the rounding of gradients to bfloat16."""
    found = []
    for micro in (None, 4):
        _, records = run(method, settings(1, micro_batch=micro, optimizer={"weights": kind}), flow=HalfFlow(STEPS))
        found.append([records[0]["loss"], records[0]["grad_norm"]])
    assert found[0] == pytest.approx(found[1], rel=2.0**-7, abs=1e-9)


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.flux_folder(tmp_path_factory.mktemp("flux"), scale=2.0)


def trained(folder, kind, store=None, lr=1e-3, **changes):
    """(flow, records) of a Flux in bfloat16."""
    flow = Flux(model=str(folder), size=32, max_sequence_length=16).load()
    optimizer = Optimizer(lr=lr, ema=0.9, weights=kind)
    training = settings(**{"batches": 3, "batch": 2, "drift_every": None} | changes)
    training = spec.structs.replace(training, optimizer=optimizer)
    stream = loop.train(
        LeapAlign(steps=4), flow, QuadraticReward(0.5), PROMPTS, training,
        accelerator=Accelerator(cpu=True), checkpoints=store,
    )  # fmt: skip
    return flow, list(stream)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 1])
def test_masters_are_float32_under_autocast(folder, tmp_path, micro):
    """Bit by bit: every record, weight and average of three updates, also where a backward goes through two uses of
    the network; but the network itself is in bfloat16, all but its vectors.
    """
    budget = spec.Budget(images=6)
    ends = [trained(folder, kind, tmp_path / kind, micro_batch=micro, budget=budget) for kind in KINDS[:2]]
    assert unclocked(ends[0][1]) == unclocked(ends[1][1])
    assert len(ends[0][1]) == 3
    files = [(tmp_path / kind / FINAL).read_bytes() for kind in KINDS[:2]]
    assert files[0] == files[1]
    named = dict(ends[1][0].named_parameters())
    assert all(p.dtype == (torch.float32 if p.ndim < 2 else torch.bfloat16) for p in named.values())
    stored = newest(tmp_path / "master")["flow"]
    assert all(torch.equal(p, stored[name].to(p.dtype)) for name, p in named.items())
    assert all(t.dtype == torch.float32 for t in stored.values())


@pytest.mark.slow
def test_stochastic_weights_learn_what_float32_does(folder, tmp_path):
    """After four large updates weights have moved as float32's: cosine above 0.9, less than half of the norm apart.
    Final weights are in bfloat16, their average in float32, and both load.
    """
    budget = spec.Budget(images=8)
    start = [p.detach().clone() for p in trained(folder, "float32", batches=1, lr=1e-30)[0].parameters()]
    change = {}
    for kind in KINDS[::2]:
        flow, _ = trained(folder, kind, tmp_path / kind, budget=budget, lr=5e-3)
        load_weights(flow, tmp_path / kind / FINAL, "last")
        change[kind] = torch.cat([(p.float() - s).flatten() for p, s in zip(flow.parameters(), start)]).detach()
    a, b = change.values()
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
    assert (a - b).norm() < 0.5 * a.norm()
    state = newest(tmp_path / "stochastic")
    assert {t.dtype for t in state["flow"].values()} == {torch.bfloat16, torch.float32}
    assert {t.dtype for t in state["ema"]} == {torch.float32}
    assert {t.dtype for values in state["optimizer"]["state"].values() for t in values.values()} == {torch.float32}
    fresh = Flux(model=str(folder), size=32, max_sequence_length=16).load()
    load_weights(fresh, tmp_path / "stochastic" / FINAL, "ema")
    assert all(torch.equal(p, t) for p, t in zip(fresh.parameters(), state["ema"], strict=True))


@pytest.mark.parametrize("kind", ["master", "stochastic"])
@pytest.mark.parametrize("method", [LEAP, GRPO], ids=lambda m: m.name)
def test_resumed_it_is_the_undisturbed_run(kind, method, tmp_path):
    """Bitwise, stopped twice; and a second run from the start is the first."""
    changes = {"optimizer": {"weights": kind}, "micro_batch": 4}
    _, undisturbed = run(method, settings(6, **changes), tmp_path / "whole", flow=HalfFlow(STEPS))
    _, again = run(method, settings(6, **changes), flow=HalfFlow(STEPS))
    assert unclocked(again) == unclocked(undisturbed)
    for batches in (2, 4, 6):
        flow, _ = run(method, settings(batches, **changes), tmp_path / "resumed", flow=HalfFlow(STEPS))
    records = load_records(tmp_path / "resumed")
    if kind == "stochastic":
        same_run(tmp_path, flow, undisturbed, records)
    assert unclocked(records) == unclocked(undisturbed)
    assert (tmp_path / "resumed" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
    assert torch.equal(flow.bias, newest(tmp_path / "whole")["flow"]["bias"].bfloat16())


def test_another_seed_rounds_otherwise():
    """The generator is of the run's seed, the update and the tensor."""
    ends = []
    for seed in (0, 0, 1):
        weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = AdamW([{"params": [weight]}], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, seed=seed)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# -- what is refused, and ids ------------------------------------------------------------------------------------------


def test_a_backend_of_another_type_is_refused(tmp_path):
    """While a sweep is read, and by the loop."""
    changes = {"base": {"training": {"optimizer": {"weights": "master"}}}}
    says = r"Last: training.optimizer.weights: 'master' .* computes in float32; choose 'float32', or backend.dtype: bfl"
    with pytest.raises(UserError, match=says):
        resolve(read(sweep_file(tmp_path, changes)), Registry([PLUGIN]))
    with pytest.raises(UserError, match=r"^training.optimizer.weights: 'stochastic' needs a backend"):
        run(LEAP, settings(optimizer={"weights": "stochastic"}), flow=AffineFlow(STEPS))


def test_parts_are_masters_already():
    """With fsdp there is one line; with ddp, and for float32, none."""
    training = settings(optimizer={"weights": "master"})
    with pytest.raises(UserError, match=r"^here: optimizer.weights: 'master' .* choose 'float32', or parallel: ddp$"):
        check_fsdp(training, "fsdp", "here")
    check_fsdp(training, "ddp")
    check_fsdp(settings(), "fsdp")


def test_float32_leaves_every_id_as_it_was(tmp_path, monkeypatch):
    """The hash of a run has the key only if it is not float32."""
    hashed = []
    monkeypatch.setattr(ids, "content_id", lambda content: hashed.append(content) or f"{len(hashed):010}")
    backend = {"dtype": "bfloat16"}
    for training in ({}, {"optimizer": {"weights": "stochastic"}}):
        changes = {"base": {"training": training, "backend": backend}}
        resolve(read(sweep_file(tmp_path, changes)), Registry([PLUGIN]))
    found = [content["training"]["optimizer"].get("weights") for content in hashed if "training" in content]
    assert found == [None, None, "stochastic", "stochastic"]

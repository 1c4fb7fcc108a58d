"""The training loop: what every method may rely on, and what a killed run loses (nothing but its current batch)."""

import itertools
import json
import math
import os
import random
import re
import resource
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from support.training_runs import BATCH, GRPO, LEAP, PROCESSES, STEPS, CtrlC, newest, run, same_run, settings
from torch import nn

from alignbench.analytic import PROMPTS, AffineFlow, Quadratic, QuadraticReward
from alignbench.config import Interrupted, UserError
from alignbench.evaluator import Reward, Term
from alignbench.experiment.spec import Budget
from alignbench.flow import euler, integrate, seeded
from alignbench.method import AlignMethod, GatherBatch, Loss, reward_loss
from alignbench.methods.base import Base
from alignbench.methods.dancegrpo import DanceGRPO
from alignbench.methods.draft import DRaFTK, DRaFTLV
from alignbench.methods.drtune import DRTune
from alignbench.methods.leapalign import LeapAlign
from alignbench.methods.refl import ReFL
from alignbench.testing.method_contract import unclocked
from alignbench.training import batches as batches_module
from alignbench.training import checkpoint, loop, state
from alignbench.training.checkpoint import (
    FINAL,
    load_records,
    load_weights,
    read_state,
    save_state,
    save_weights,
    saved_states,
)
from alignbench.training.meter import FIFTHS, GRAD_SHARES, Meter, metered
from alignbench.training.state import TrainState, budget_share

METHODS = [
    ReFL(steps=STEPS, last_n=2),
    DRaFTK(steps=STEPS, k=2),
    DRaFTLV(steps=STEPS),
    DRTune(steps=STEPS, m=2),
    LEAP,
    GRPO,
]


class Blackbox(AlignMethod):
    """Notes the batches it is given, and makes the smallest possible loss of them."""

    name: ClassVar[str] = "blackbox"
    steps: int = STEPS
    seen: ClassVar[list] = []

    def loss(self, flow, reward, batch):
        self.seen.append(batch)
        v = flow.velocity(batch.noise, 1.0, batch.cond)
        return reward_loss(flow, reward, batch, batch.noise - v)


# ---- what a batch is


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_common_random_numbers(method, micro, monkeypatch):
    """Batch t has the same prompts, text and noise whatever the method and the micro-batch."""
    seen, draw = [], state.draw_batch

    def spy(*args):
        seen.append(draw(*args))
        return seen[-1]

    monkeypatch.setattr(state, "draw_batch", spy)
    run(method, settings(batches=3, micro_batch=micro, drift_every=None))
    Blackbox.seen.clear()
    monkeypatch.setattr(state, "draw_batch", draw)
    run(Blackbox(), settings(batches=3))
    assert [p for b in seen for p in b.prompts] == [p for b in Blackbox.seen for p in b.prompts]
    assert torch.equal(torch.cat([b.noise for b in seen]), torch.cat([b.noise for b in Blackbox.seen]))
    assert {b.step for b in seen} == {0, 1, 2}


def test_micro_batches_share_the_step_generator():
    """Every micro-batch of a batch starts from the same ``step_rng``; another batch from another."""
    Blackbox.seen.clear()
    run(Blackbox(), settings(batches=2, micro_batch=2))
    draws = [torch.rand((), generator=batch.step_rng).item() for batch in Blackbox.seen]
    assert len(draws) == 8
    assert len(set(draws[:4])) == len(set(draws[4:])) == 1
    assert draws[0] != draws[4]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_one_global_batch(ranks):
    """Rank r of n has the r-th contiguous share: together they are the single process's batch."""
    every = [
        batches_module.micro_batches(settings(), SimpleNamespace(num_processes=ranks, process_index=rank))
        for rank in range(ranks)
    ]
    assert [i for parts in every for part in parts for i in part] == list(range(BATCH))


def test_every_epoch_sees_every_prompt_once():
    """Prompts are permuted anew each epoch, and depend on the seed alone."""
    n, count = 5, 7
    epochs = [[batches_module.prompt_index(0, e * count + i, count) for i in range(count)] for e in range(n)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == n
    assert [batches_module.prompt_index(1, i, count) for i in range(count)] != epochs[0]


# ---- what an update is


def test_an_update_is_adamw_on_the_mean_loss():
    """Weights, bitwise, are those of torch's AdamW in a plain loop with clipping."""
    trained, records = run(LEAP, settings(optimizer={"clip": 0.05, "weight_decay": 0.1}))
    flow, reward, training = AffineFlow(STEPS), QuadraticReward(), settings()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=0.03, weight_decay=0.1)
    for step in range(6):
        batch = batches_module.draw_batch(flow, PROMPTS, training, step, range(BATCH), torch.device("cpu"))
        optimizer.zero_grad()
        LEAP.loss(flow, reward, batch).value.backward()
        norm = nn.utils.clip_grad_norm_(flow.parameters(), 0.05)
        optimizer.step()
        assert records[step]["grad_norm"] == norm.item() > 0.05
    assert torch.equal(trained.bias, flow.bias)


def test_warm_up_is_linear():
    """Update u of w has (u + 1) / w of the learning rate, and all of it afterwards."""
    _, records = run(LEAP, settings(optimizer={"warmup": 4}))
    assert [r["lr"] / 0.03 for r in records] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("method", [LEAP, GRPO], ids=lambda m: m.name)
def test_average_follows_every_update(method, tmp_path):
    """EMA starts at the base weights and is lerped after each optimizer update, several per batch included."""
    base, weights = AffineFlow(STEPS).bias.detach().clone(), []
    flow = AffineFlow(STEPS)
    training = settings(batches=3, optimizer={"ema": 0.9})
    run_ = TrainState(method, flow, training, Accelerator(cpu=True))
    for _ in range(3):
        for _ in run_.train_batch(flow, QuadraticReward(), PROMPTS):
            weights.append(flow.bias.detach().clone())
    expected = base
    for w in weights:
        expected = 0.9 * expected + 0.1 * w
    assert len(weights) == (6 if method is GRPO else 3)
    torch.testing.assert_close(run_.ema.tensors[0], expected, rtol=1e-13, atol=1e-13)


def test_groups_are_clipped_by_themselves():
    """A value network's large gradient does not shrink the flow's, nor the other way round; no clip: untouched."""
    net = nn.Linear(2, 1, dtype=torch.float64)

    class WithNet(Blackbox):
        def modules(self, flow):
            return {"value": net}

    for clip, expected in ((1.0, (1.0, 0.5)), (None, (50.0, 0.5))):
        flow = AffineFlow(STEPS)
        run_ = TrainState(WithNet(), flow, settings(optimizer={"clip": clip}), Accelerator(cpu=True))
        flow.bias.grad = torch.full_like(flow.bias, 50 / flow.bias.numel() ** 0.5)
        net.weight.grad = torch.tensor([[0.3, 0.4]]).double()
        net.bias.grad = None
        norms = run_.synchronize_gradients()
        assert norms == pytest.approx({"grad_norm": 50.0, "grad_norm_value": 0.5})
        assert (flow.bias.grad.norm().item(), net.weight.grad.norm().item()) == pytest.approx(expected, rel=1e-6)
        assert len(run_.ema.tensors) == 1  # the flow's alone


def test_records_have_one_shape():
    """One record per update, costs as running totals, and the same keys in each."""
    _, records = run(GRPO)
    assert [(r["step"], r["update"]) for r in records] == [(u // 2, u) for u in range(12)]
    assert len({tuple(r) for r in records}) == 1
    assert {"loss", "reward_mean", "grad_norm", "lr", "seconds", "peak_memory_bytes", "ratio_off"} <= set(records[0])
    assert [r["images"] for r in records] == [BATCH * (u // 2 + 1) for u in range(12)]
    per_image = STEPS + GRPO.trained
    assert records[-1]["nfe_forward"] + records[-1]["nfe_grad"] == 6 * BATCH * per_image
    assert records[-1]["nfe_grad"] == 6 * BATCH * GRPO.trained
    seconds = [r["seconds"] for r in records]
    assert 0 < seconds[0] <= seconds[-1]
    assert all(r["peak_memory_bytes"] > 0 for r in records)


def test_the_hinge_is_recorded():
    """With a margin every record has the share of samples whose hinge is closed."""
    _, records = run(LEAP, reward=QuadraticReward(margin=-1.0))
    assert all(0 <= r["hinge_closed"] <= 1 for r in records)
    assert "hinge_closed" not in run(LEAP)[1][0]


@pytest.mark.parametrize(
    ("budget", "batches"),
    [
        (Budget(images=24), 3),
        (Budget(images=25), 4),
        (Budget(updates=3), 3),
        (Budget(nfe=3 * BATCH * STEPS), 3),
        (Budget(nfe=3 * BATCH * STEPS + 1), 4),
    ],
)
def test_budgets_end_at_a_batch_boundary(budget, batches):
    """Training stops after the first batch that spends the budget."""
    assert len(run(LEAP, settings(budget=budget))[1]) == batches


def test_waiting_costs_nothing_on_a_cpu(monkeypatch):
    """On a CPU seconds are the process's CPU time, which other processes cannot lengthen: a clock that ticks once
    whenever it is read gives one second per update, and the wall clock is not read."""
    monkeypatch.setattr(state, "time", SimpleNamespace(process_time=itertools.count().__next__))
    _, records = run(LEAP, settings(3))
    assert [record["seconds"] for record in records] == [1, 2, 3]


def test_a_budget_of_seconds():
    """Seconds of training are spent, on every rank: two ranks spend them twice as fast."""
    _, records = run(LEAP, settings(budget=Budget(gpu_seconds=0.05)))
    assert records[-1]["seconds"] >= 0.05
    assert all(record["seconds"] < 0.05 for record in records[:-1])  # none, if this machine is slow
    assert budget_share(Budget(gpu_seconds=10.0), {"seconds": 5.0}, ranks=2) == 1
    assert budget_share(Budget(updates=4), {}) == 0


def test_modules_start_from_the_seed():
    """A value network's first weights depend on the run's seed alone; torch's global generator stays as it was."""

    class WithNet(Blackbox):
        def modules(self, flow):
            return {"value": nn.Linear(3, 1)}

    def weight(seed):
        torch.rand(seed + 3)
        before = torch.get_rng_state()
        built = TrainState(WithNet(), AffineFlow(STEPS), settings(seed=seed), Accelerator(cpu=True))
        assert torch.equal(torch.get_rng_state(), before)
        return built.modules["value"].weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


# ---- what every record has for free


class OneStep(Blackbox):
    """Trains step ``s`` of the sampler alone."""

    s: int = 0

    def loss(self, flow, reward, batch):
        t = flow.sigmas(STEPS)
        x = integrate(flow, batch.noise, t[: self.s + 1], batch.cond)
        return reward_loss(flow, reward, batch, euler(x, flow.velocity(x, t[self.s], batch.cond), t[self.s], 0.0))


@pytest.mark.parametrize("s", range(STEPS))
def test_the_gradient_share_names_the_trained_step(s):
    """All of |dL/dv| lies in the fifth of the path that holds the trained step's sigma."""
    sigma = AffineFlow(STEPS).sigmas(STEPS)[s].item()
    _, records = run(OneStep(s=s))
    fifth = max(1, math.ceil(sigma * FIFTHS)) - 1
    expected = [float(i == fifth) for i in range(FIFTHS)]
    assert all([r[name] for name in GRAD_SHARES] == expected for r in records)


def test_gradient_shares_closed_form():
    """Full back-propagation: |dL/dv_i| = h_i |lam_{i+1}| per sample, summed over samples, as a share of the total."""
    flow, training = AffineFlow(STEPS), settings(batches=1)
    batch = batches_module.draw_batch(flow, PROMPTS, training, 0, range(BATCH), torch.device("cpu"))
    t = flow.sigmas(STEPS)
    lam = integrate(flow, batch.noise, t, batch.cond) - 1.0
    sums = [0.0] * FIFTHS
    for i in reversed(range(STEPS)):
        h = t[i] - t[i + 1]
        sums[math.ceil(t[i].item() * FIFTHS) - 1] += (h * lam.norm(dim=1)).sum().item()
        lam = lam - h * lam @ flow.A
    _, (record,) = run(DRaFTK(steps=STEPS, k=STEPS), training)
    assert [record[name] for name in GRAD_SHARES] == pytest.approx([x / sum(sums) for x in sums], rel=1e-12)


def test_gradients_that_a_method_takes_for_itself_are_no_share():
    """A vector-Jacobian product inside a loss is not the training gradient."""

    class Curious(OneStep):
        def loss(self, flow, reward, batch):
            x = batch.noise.clone().requires_grad_()
            torch.autograd.grad(flow.velocity(x, 0.1, batch.cond).sum(), x)
            return super().loss(flow, reward, batch)

    assert unspent(run(Curious(s=0))[1]) == unspent(run(OneStep(s=0))[1])


def unspent(records):
    return [{name: r[name] for name in (*GRAD_SHARES, "loss", "drift")} for r in records]


def test_drift_closed_form():
    """|v - v_base|^2 / |v_base|^2 over the sampler's steps: zero at first; a moved bias shows as its square."""
    flow, training = AffineFlow(STEPS), settings(drift_every=2)
    _, records = run(LEAP, training, flow=flow)
    drifts = [r["drift"] for r in records]
    assert drifts[0] == drifts[1] == 0 < drifts[2] == drifts[3] < drifts[4]
    (run_ := TrainState(LEAP, flow, training, Accelerator(cpu=True))).measure_drift(PROMPTS)
    batch = batches_module.draw_batch(flow, PROMPTS, training, 0, range(4), torch.device("cpu"))
    x, moved, base = batch.noise, 0.0, 0.0
    for i, (at, to) in enumerate(itertools.pairwise(flow.sigmas(STEPS))):
        v = flow.velocity(x, at, batch.cond).detach()
        moved += 4 * flow.bias[i].square().sum().item()
        base += (v - flow.bias[i]).square().sum().item()
        x = x + (to - at) * v
    assert run_.drift == pytest.approx(moved / base, rel=1e-12)


def test_looking_at_the_drift_changes_nothing():
    """Weights, and every other record, are bitwise those of a run that never looks."""
    (looked, records), (blind, others) = run(LEAP), run(LEAP, settings(drift_every=None))
    assert torch.equal(looked.bias, blind.bias)
    assert [r | {"drift": None} for r in unclocked(records)] == unclocked(others)


def test_rewards_are_recorded_without_the_methods_help():
    """A method that reports no reward has the mean over the images that it had scored."""

    class Silent(OneStep):
        def loss(self, flow, reward, batch):
            return super().loss(flow, reward, batch)._replace(metrics={})

    assert [r["reward_mean"] for r in run(Silent(s=1))[1]] == [r["reward_mean"] for r in run(OneStep(s=1))[1]]


def test_several_rewards_add_up():
    """Loss and reward are means weighted by normalised weights, each reward is recorded, each has its own hinge."""
    near, far = Quadratic(target=1.0), Quadratic(target=3.0)
    both = Reward(Term(near, None, 2.0), Term(far, -1e6, 6.0))
    _, (record,) = run(LEAP, settings(batches=1), reward=both)
    alone = [run(LEAP, settings(batches=1), reward=QuadraticReward(target))[1][0]["reward_mean"] for target in (1, 3)]
    assert record["reward_mean"] == pytest.approx(0.25 * alone[0] + 0.75 * alone[1])
    assert record["hinge_closed"] == 0.5
    scores = torch.tensor([[-1.0, -2.0], [5.0, -3e6]])
    assert both.loss(scores).tolist() == [0.25, 0.5 + 0.75 * 2e6]
    assert both.value(scores).tolist() == [-0.25 + 3.75, -0.5 - 0.75 * 3e6]


@pytest.mark.parametrize("micro", [None, 4, 2])
def test_what_micro_batches_pool_is_the_whole_batch(micro):
    """``yield GatherBatch(values)`` gives back the values of all samples in their order, twice in a row too."""

    class Pools(OneStep):
        seen: ClassVar[list] = []

        def updates(self, flow, reward, batch):
            everyone = yield GatherBatch(batch.noise[:, 0])
            again = yield GatherBatch(2 * batch.noise[:, 0])
            assert torch.equal(again, 2 * everyone)
            self.seen.append(everyone)
            yield from super().updates(flow, reward, batch)

    run(Pools(), settings(batches=1, micro_batch=micro))
    flow = AffineFlow(STEPS)
    whole = batches_module.draw_batch(flow, PROMPTS, settings(), 0, range(BATCH), torch.device("cpu")).noise[:, 0]
    assert len(Pools.seen) == BATCH // (micro or BATCH)
    assert all(torch.equal(everyone, whole) for everyone in Pools.seen)
    Pools.seen.clear()


def test_micro_batches_must_do_the_same():
    """One that makes another number of updates than its neighbour is an error, not a wait for ever."""

    class Uneven(OneStep):
        def updates(self, flow, reward, batch):
            for _ in range(1 + int(batch.noise.sum() > 0)):
                yield from super().updates(flow, reward, batch)

    with pytest.raises(UserError, match="different updates of different micro-batches"):
        run(Uneven(), settings(micro_batch=1))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "ranks", "where"),
    [
        ({"batch": 9}, 2, "training.batch"),
        ({"batch": 0}, 1, "training.batch"),
        ({"micro_batch": 9}, 1, "training.micro_batch"),
        ({"micro_batch": 5}, 2, "training.micro_batch"),
    ],
)
def test_batches_that_do_not_divide_are_refused(changes, ranks, where):
    """A global batch is equal shares of the ranks, a micro-batch part of a share."""
    with pytest.raises(UserError, match=rf"^{where}: .*; choose "):
        batches_module.micro_batches(settings(**changes), SimpleNamespace(num_processes=ranks, process_index=0))


def test_a_method_is_checked_before_it_runs():
    """A group that the micro-batch does not hold, and a reward without gradient, are refused before any batch."""
    with pytest.raises(UserError, match=r"^method.group: "):
        run(DanceGRPO(steps=STEPS), settings(micro_batch=4))
    blind = Reward(Term(SimpleNamespace(differentiable=False)))
    with pytest.raises(UserError, match=r"^reward: "):
        run(LEAP, reward=blind)


def test_half_precision_that_needs_loss_scaling_is_refused():
    """fp16 would underflow silently: it is not offered."""
    with pytest.raises(UserError, match="mixed_precision"):
        loop.check(LEAP, QuadraticReward(), settings(), SimpleNamespace(mixed_precision="fp16"))


def test_base_yields_and_writes_nothing(tmp_path):
    """A method with nothing to train makes no record and no file."""
    assert run(Base(), folder=tmp_path)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_makes_no_update_is_an_error():
    """It would otherwise never spend its budget."""

    class Idle(Blackbox):
        def updates(self, flow, reward, batch):
            return iter(())

    with pytest.raises(UserError, match=r"step 0.*made no update"):
        run(Idle())


class Failing(QuadraticReward):
    """A reward that gives ``value`` for one sample from its n-th call on."""

    def __init__(self, value, after):
        super().__init__()
        self.value, self.left = value, after

    def __call__(self, pixels, prompts):
        score = super().__call__(pixels, prompts)
        self.left -= 1
        if self.left < 0:
            score = score.clone()
            score[0, 1] = self.value
        return score


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_stops_the_run(value, tmp_path):
    """The error names step, prompt and value; the checkpoint before it stays and can be resumed."""
    with pytest.raises(UserError, match=rf"step 3.*reward quadratic is not finite.*{value} for prompt 'p\d'") as caught:
        run(LEAP, folder=tmp_path, reward=Failing(value, after=3))
    assert "\n" not in str(caught.value)
    flow, records = run(LEAP, folder=tmp_path)
    assert [r["step"] for r in records] == [3, 4, 5]
    assert torch.equal(flow.bias, run(LEAP)[0].bias)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """Before any weight is touched."""

    class Broken(Blackbox):
        def loss(self, flow, reward, batch):
            value, metrics, _ = super().loss(flow, reward, batch)
            return Loss(value * (float("nan") if batch.step == 2 else 1.0), metrics)

    flow = AffineFlow(STEPS)
    with pytest.raises(UserError, match=r"step 2, update 2: the loss is nan;"):
        run(Broken(), folder=tmp_path, flow=flow)
    assert flow.bias.isfinite().all()
    assert torch.equal(flow.bias, newest(tmp_path)["flow"]["bias"])


def test_a_loss_that_is_no_number_names_its_sample():
    """The error has the prompt and its value if the loss reports those of samples."""

    class Broken(Blackbox):
        def loss(self, flow, reward, batch):
            value, metrics, each = super().loss(flow, reward, batch)
            each[2] = float("inf")
            return Loss(value * float("inf"), metrics, each)

    flow = AffineFlow(STEPS)
    batch = batches_module.draw_batch(flow, PROMPTS, settings(), 0, range(BATCH), torch.device("cpu"))
    with pytest.raises(UserError, match=rf"step 0.*loss is inf \(inf for prompt '{batch.prompts[2].id}'\)"):
        run(Broken(), flow=flow)


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    """A finite loss may have an infinite slope (a square root at zero)."""

    class Steep(Blackbox):
        def loss(self, flow, reward, batch):
            value, metrics, _ = super().loss(flow, reward, batch)
            return Loss(value + (value - value.detach()).abs().sqrt(), metrics)

    flow = AffineFlow(STEPS)
    with pytest.raises(UserError, match=r"step 0.*grad_norm is (nan|inf)"):
        run(Steep(), folder=tmp_path, flow=flow)
    assert flow.bias.abs().max() == 0
    assert saved_states(tmp_path) == []


# ---- what a stopped run loses


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", [LEAP, GRPO, DRaFTLV(steps=STEPS)], ids=lambda m: m.name)
def test_stopped_anywhere_and_resumed(method, every, tmp_path):
    """Interrupted inside a random network call, three times over, and resumed: as if undisturbed, bitwise."""
    training, chance = settings(batches=8, checkpoint_every=every), random.Random(every)
    _, undisturbed = run(method, training, tmp_path / "whole")

    for _ in range(3):
        flow = CtrlC(STEPS)
        flow.left = chance.randint(2, 20)
        with pytest.raises(KeyboardInterrupt):
            run(method, training, tmp_path / "resumed", flow)
    flow, _ = run(method, training, tmp_path / "resumed")
    same_run(tmp_path, flow, undisturbed, load_records(tmp_path / "resumed"))


def test_what_a_method_prepares_is_where_training_starts(tmp_path):
    """Weights put in by ``prepare`` are the average's first, and a resumed run goes on from its own, not from them."""

    class FromElsewhere(LeapAlign):
        def prepare(self, flow):
            with torch.no_grad():
                flow.bias.fill_(0.5)

    method, training = FromElsewhere(steps=STEPS), settings(batches=4, optimizer={"ema": 0.9})
    _, undisturbed = run(method, training, tmp_path / "whole")
    run(method, settings(batches=2, optimizer={"ema": 0.9}), tmp_path / "resumed")
    again, _ = run(method, training, tmp_path / "resumed")
    same_run(tmp_path, again, undisturbed, load_records(tmp_path / "resumed"))
    run(method, settings(batches=1, optimizer={"ema": 0.9, "warmup": 10**9}), tmp_path / "still")
    average = newest(tmp_path / "still")["ema"][0]
    torch.testing.assert_close(average, torch.full_like(average, 0.5), rtol=0, atol=1e-6)


def test_records_of_a_resumed_run_are_only_the_new_ones(tmp_path):
    """Records that the checkpoint covers are not yielded again; once done, none are, and the final weights exist."""
    _, first = run(LEAP, settings(batches=2), tmp_path)
    _, rest = run(LEAP, settings(batches=5), tmp_path)
    assert [r["step"] for r in first + rest] == list(range(5))
    assert load_records(tmp_path) == first + rest
    (tmp_path / FINAL).unlink()
    assert run(LEAP, settings(batches=5), tmp_path)[1] == []
    assert (tmp_path / FINAL).exists()


def test_a_method_keeps_its_state(tmp_path):
    """A method's own state and its modules (weights and moments) survive a stop."""

    class Window(Blackbox):
        """Trains a value network and slides a window: both change the loss."""

        state: ClassVar[dict] = {}

        def modules(self, flow):
            return {"value": self.state["net"]}

        def state_dict(self):
            return {"window": self.state["window"]}

        def load_state_dict(self, state):
            self.state["window"] = state["window"]

        def loss(self, flow, reward, batch):
            self.state["window"] += 1
            value, metrics, _ = super().loss(flow, reward, batch)
            guess = self.state["net"](batch.noise).mean() * self.state["window"]
            return Loss(value * 0.1 + (guess - value.detach()) ** 2 + guess * value, metrics)

    def fresh():
        net = nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            net.weight.normal_(generator=seeded("net"))
            net.bias.zero_()
        Window.state.update(net=net, window=0)
        return net

    whole = fresh()
    flow, records = run(Window(), folder=tmp_path / "whole")
    fresh()
    run(Window(), settings(batches=3), tmp_path / "resumed")
    resumed = fresh()
    again, _ = run(Window(), folder=tmp_path / "resumed")
    assert torch.equal(flow.bias, again.bias)
    assert torch.equal(whole.weight, resumed.weight)
    assert Window.state["window"] == 6
    assert unclocked(load_records(tmp_path / "resumed")) == unclocked(records)


def test_kill_9_and_resume(tmp_path):
    """A process killed by SIGKILL at a random moment loses its current batch: resumed, the run is the same, bitwise."""
    training = settings(batches=25)
    _, undisturbed = run(LEAP, training, tmp_path / "whole")
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=train_slowly, args=(tmp_path / "resumed", theirs))
    process.start()
    for _ in range(random.randint(2, 12)):
        assert ours.poll(120)
        ours.recv()
    time.sleep(random.uniform(0, 0.02))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = load_records(tmp_path / "resumed")
    assert 2 <= len(kept) < 25
    flow, rest = run(LEAP, training, tmp_path / "resumed")
    assert len(kept) + len(rest) == 25
    same_run(tmp_path, flow, undisturbed, load_records(tmp_path / "resumed"))
    states = [path.name for path in reversed(saved_states(tmp_path / "resumed"))]
    assert names(tmp_path / "resumed") == [FINAL, "final.sha256", *states]
    assert [read_state(path)["step"] for path in saved_states(tmp_path / "resumed")] == [25, 24]


# ---- what is on the disk


def test_weights_come_back(tmp_path):
    """Both the last weights and their average are saved, and load into a fresh flow exactly."""
    flow, _ = run(LEAP, folder=tmp_path)
    state = newest(tmp_path)
    for which, expected in (("last", flow.bias.detach()), ("ema", state["ema"][0])):
        other = AffineFlow(STEPS)
        load_weights(other, tmp_path / FINAL, which)
        assert torch.equal(other.bias, expected)
    assert not torch.equal(flow.bias, state["ema"][0])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """No average saved, another model, no file, a damaged file: one line that names the file."""
    path = tmp_path / FINAL
    save_weights(dict(AffineFlow(STEPS).named_parameters()), path)
    with pytest.raises(UserError, match="no 'ema' weights in it; choose one of: last"):
        load_weights(AffineFlow(STEPS), path, "ema")
    with pytest.raises(UserError, match=r"bias is \(4, 3\) in the file and \(5, 3\) in the model"):
        load_weights(AffineFlow(5), path, "last")
    with pytest.raises(UserError, match=r"damaged \(it is missing"):
        load_weights(AffineFlow(STEPS), tmp_path / "absent.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"damaged \(its content is not what was written"):
        load_weights(AffineFlow(STEPS), path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "one bit": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 100),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path, capsys):
    """It is named in one line, and the run ends as if undisturbed, bitwise; no damaged file is left."""
    _, undisturbed = run(LEAP, folder=tmp_path / "whole")
    run(LEAP, settings(batches=4), tmp_path / "resumed")
    newest_one, _ = saved_states(tmp_path / "resumed")
    damage(newest_one)
    with pytest.raises(UserError, match="a damaged checkpoint"):
        load_records(tmp_path / "resumed")
    capsys.readouterr()
    flow, records = run(LEAP, folder=tmp_path / "resumed")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"alignbench: {newest_one}: a damaged checkpoint")
    assert line.endswith("the one before it is tried")
    assert [r["step"] for r in records] == [3, 4, 5]
    same_run(tmp_path, flow, undisturbed, load_records(tmp_path / "resumed"))
    assert [read_state(path)["step"] for path in saved_states(tmp_path / "resumed")] == [6, 5]


def test_where_every_checkpoint_is_damaged_training_starts_again(tmp_path, capsys):
    """Each is named, and the run ends as if undisturbed, bitwise."""
    _, undisturbed = run(LEAP, folder=tmp_path / "whole")
    run(LEAP, settings(batches=4), tmp_path / "resumed")
    for path, damage in zip(saved_states(tmp_path / "resumed"), DAMAGES.values()):
        damage(path)
    flow, records = run(LEAP, folder=tmp_path / "resumed")
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in lines] == [
        "the one before it is tried",
        "training starts from the beginning",
    ]
    assert [r["step"] for r in records] == list(range(6))
    same_run(tmp_path, flow, undisturbed, load_records(tmp_path / "resumed"))


MISFITS = {
    "do not fit the model": lambda state: {"flow": {"bias": torch.ones(9, 3)}},
    r"\(bias is absent in the file": lambda state: {"ema": None},
    "optimizer's state is of other": lambda state: {"optimizer": {"state": {}, "param_groups": []}},
    "has no 'records'": lambda state: {"records": None},
}


@pytest.mark.parametrize("reason", MISFITS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(reason, tmp_path, capsys):
    """A checkpoint of another model, optimizer or version is named, and training starts from the beginning."""
    _, undisturbed = run(LEAP, folder=tmp_path / "whole")
    state = newest(tmp_path / "whole")
    state |= {"flow": {"bias": state["flow"]["bias"] + 1}} | MISFITS[reason](state)
    save_state(
        tmp_path / "resumed", {name: value for name, value in state.items() if name == "ema" or value is not None}
    )
    flow, _ = run(LEAP, folder=tmp_path / "resumed")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(reason, line)
    same_run(tmp_path, flow, undisturbed, load_records(tmp_path / "resumed"))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_states_are_kept(keep, tmp_path):
    """As many as ``keep`` says, however often the run is resumed; leftovers of a killed writer are swept up."""
    left = tmp_path / ".step.new.12345.tmp"
    for batches in (2, 5):
        run(LEAP, settings(batches=batches, keep=keep), tmp_path)
        assert [read_state(path)["step"] for path in saved_states(tmp_path)] == [*range(batches, 0, -1)][:keep]
        assert not left.exists()
        left.write_bytes(b"half")
        (tmp_path / "step.new").write_bytes(b"whole, but killed before it had its name")
        assert len(load_records(tmp_path)) == batches


def test_asked_to_stop(tmp_path):
    """All up to that batch is yielded, saved and resumed bitwise; a stop in the last batch is no interruption."""
    training = settings(checkpoint_every=100)
    _, undisturbed = run(LEAP, training, tmp_path / "whole")
    asked = iter([False, True])
    parts = LEAP, AffineFlow(STEPS), QuadraticReward(), PROMPTS, training
    options = {"accelerator": Accelerator(cpu=True), "checkpoints": tmp_path / "resumed"}
    stream, seen = loop.train(*parts, **options, stop=lambda: next(asked)), []
    with pytest.raises(Interrupted, match="stopped after 2 batches"):
        seen.extend(stream)
    assert unclocked(seen) == unclocked(undisturbed[:2])
    assert load_records(tmp_path / "resumed") == seen
    flow, rest = run(LEAP, training, tmp_path / "resumed")
    assert len(rest) == 4
    same_run(tmp_path, flow, undisturbed, load_records(tmp_path / "resumed"))
    parts = LEAP, AffineFlow(STEPS), QuadraticReward(), PROMPTS, settings(batches=1)
    assert len(list(loop.train(*parts, accelerator=Accelerator(cpu=True), stop=lambda: True))) == 1


def test_a_state_whose_writing_is_interrupted_is_an_interruption(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a file, which torch reports as a broken file, is not a failure; the last state stays."""
    whole = save_state(tmp_path, {"step": 1, "records": [1]})

    write, sizes = checkpoint._HashingFile.write, []

    def interrupted(file, data):
        sizes.append(len(data))
        if len(sizes) == 5:  # once: torch then tries to end the file
            raise KeyboardInterrupt
        return write(file, data)

    monkeypatch.setattr(checkpoint._HashingFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, {"step": 2, "big": torch.zeros(100_000)})
    assert saved_states(tmp_path) == [whole]


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path):
    """A file where the folder should be, a full disk: one line with the path; the file that was there stays whole."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(dict(AffineFlow(STEPS).named_parameters()), tmp_path / "file" / FINAL)
    save_state(tmp_path, {"step": 1, "records": [1]})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written") as state:
            save_state(tmp_path, {"step": 2, "big": torch.zeros(10_000)})
        with pytest.raises(UserError, match="cannot be written") as weights:
            save_weights(dict(AffineFlow(1000).named_parameters()), tmp_path / FINAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(state.value) + str(weights.value)
    assert load_records(tmp_path) == [1]
    assert names(tmp_path) == ["file", *(path.name for path in saved_states(tmp_path))]


def test_a_checkpoint_holds_no_code(tmp_path):
    """An object smuggled into a checkpoint is not built: it is reported as unreadable."""
    save_state(tmp_path, {"step": 1, "records": [], "evil": SimpleNamespace(x=1)})
    with pytest.raises(UserError, match="not a readable checkpoint"):
        newest(tmp_path)


def test_a_metered_flow_is_otherwise_the_flow():
    """Everything but counting passes through, and reference forwards count too."""
    flow, meter = AffineFlow(STEPS), Meter()
    counting = metered(flow, meter)
    assert next(iter(counting.named_parameters()))[1] is flow.bias
    cond = counting.encode(["a", "b"])
    counting.velocity(torch.zeros(2, 3).double(), 1.0, cond, reference=True)
    counting.decode(torch.zeros(2, 3))
    assert (meter.nfe_forward, meter.nfe_grad, meter.decodes) == (2, 0, 2)


# ---- several ranks


def test_two_ranks_are_one(tmp_path):
    """Two real processes make the updates of one: same choices, weights, costs and statistics, to rounding.

    When one of them is asked to stop, both do, after the same batch, and one process goes on from what they saved; when
    one fails, it says where and waits for nobody, and the other ends, too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [PROCESSES.Process(target=train_as_rank, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["draws"] == second["draws"]
    assert first["bias"] == second["bias"]
    for name, method in (("leapalign", LEAP), ("dancegrpo", GRPO)):
        flow, records = run(method, settings(batches=3), reward=QuadraticReward(margin=-1.0))
        both = torch.tensor(first["bias"][name], dtype=torch.float64)
        torch.testing.assert_close(both, flow.bias.detach(), rtol=1e-9, atol=1e-9)
        for mine, theirs in itertools.chain(
            zip(unclocked(records), unclocked(first["records"][name]), strict=True),
            zip(unclocked(records), unclocked(second["records"][name]), strict=True),
        ):
            assert mine == pytest.approx(theirs, rel=1e-7, abs=1e-9)
    assert first["error"]
    assert "step 1" in second["error"]
    assert "reward quadratic is not finite" in second["error"]
    assert all(record["reward_std"] > 0 for record in first["records"]["leapalign"])
    assert first["stopped"] == second["stopped"] == "training: stopped after 2 batches"
    assert [record["step"] for record in run(LEAP, folder=tmp_path / "stopped")[1]] == [2, 3, 4, 5]


class LoggedLeap(LeapAlign):
    """LeapAlign that notes its draws."""

    draws: ClassVar[list] = []

    def draw(self, rng):
        self.draws.append(super().draw(rng))
        return self.draws[-1]


def train_as_rank(rank: int, port: str, folder: Path) -> None:
    """In one of two processes: train, then fail on the second rank alone."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    notes: dict = {"bias": {}, "records": {}}
    for name, method in (("leapalign", LoggedLeap(steps=STEPS)), ("dancegrpo", GRPO)):
        flow, records = run(method, settings(batches=3), folder / name, reward=QuadraticReward(margin=-1.0))
        notes["bias"][name], notes["records"][name] = flow.bias.tolist(), records
    notes["draws"] = LoggedLeap.draws
    asked = iter([False, rank == 1])
    parts = LEAP, AffineFlow(STEPS), QuadraticReward(), PROMPTS, settings(checkpoint_every=100)
    options = {"accelerator": Accelerator(cpu=True), "checkpoints": folder / "stopped"}
    try:
        list(loop.train(*parts, **options, stop=lambda: next(asked)))
    except Interrupted as error:
        notes["stopped"] = str(error)
    try:
        run(LEAP, reward=Failing(float("nan"), after=1) if rank == 1 else None)
    except (UserError, RuntimeError) as error:  # rank 0: the connection broke when rank 1 ended
        notes["error"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(notes))


def train_slowly(folder: Path, records) -> None:
    """In a process for another to kill: train with a pause in every network call, and send each record."""

    class Slow(AffineFlow):
        def velocity(self, *args, **kwargs):
            time.sleep(0.001)
            return super().velocity(*args, **kwargs)

    parts = (LEAP, Slow(STEPS), QuadraticReward(), PROMPTS, settings(batches=25))
    for record in loop.train(*parts, accelerator=Accelerator(cpu=True), checkpoints=folder):
        records.send(record)

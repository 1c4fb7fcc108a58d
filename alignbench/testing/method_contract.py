"""The contract test of a method.

The first sentence of a test's docstring is the promise that ``alignbench check-method`` prints.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from alignbench.analytic import PROMPTS, AffineFlow, CallLog, QuadraticReward
from alignbench.config import UserError
from alignbench.evaluator import Reward
from alignbench.experiment.spec import Budget, Optimizer, Training
from alignbench.flow import Batch, Flow, integrate, seeded
from alignbench.method import AlignMethod, Loss, each_update
from alignbench.training.batches import make_batch
from alignbench.training.checkpoint import load_records
from alignbench.training.loop import train
from alignbench.training.meter import Meter, metered, metered_reward


def backpropagate(method: AlignMethod, flow: Flow, reward: Reward, batch: Batch) -> list[Loss]:
    """Back-propagate every loss of the first update, and return them; gradients stay in the parameters."""
    losses = []
    for loss in next(each_update(method, flow, reward, batch)):
        loss.value.backward()
        losses.append(loss)
    return losses


class MethodContract:
    """The tests that every method has to pass, since training relies on them.

    Set ``method``; override ``flow`` and ``reward`` if the analytic ones do not suit it.
    """

    method: AlignMethod
    lr: float = 0.03  # learning rate
    updates: int = 60  # batches after which the toy reward must have risen

    def fresh(self) -> AlignMethod:
        """Return a new method with the same settings and no state of an earlier run."""
        return msgspec.structs.replace(self.method)

    def flow(self) -> Flow:
        """Return a new flow, always the same."""
        return AffineFlow(self.method.steps)

    def reward(self) -> Reward:
        """Return the training reward."""
        return QuadraticReward()

    @property
    def micro(self) -> int:
        """The smallest micro-batch that the method accepts, in samples."""
        for size in range(1, 257):
            try:
                self.method.check(size, self.reward().differentiable)
            except UserError as error:
                reason = error
            else:
                return size
        raise AssertionError(f"the method accepts no micro-batch up to 256: {reason}")

    @property
    def batch(self) -> int:
        """Samples per batch: four micro-batches of one sample, or two of the smallest size, if that is larger."""
        return 4 if self.micro == 1 else 2 * self.micro

    def run(self, flow: Flow, batches: int, micro: int | None = None, folder: Path | None = None) -> list[dict]:
        """Train ``flow`` on ``batches`` batches (in total, if resumed) and return the records.

        ``micro``: samples per micro-batch; ``folder``: of the checkpoints, for resuming.
        """
        training = Training(
            optimizer=Optimizer(lr=self.lr),
            budget=Budget(images=batches * self.batch),
            batch=self.batch,
            micro_batch=micro,
            checkpoint_every=1,
        )
        accelerator = Accelerator(cpu=True)
        parts = (self.fresh(), flow, self.reward(), PROMPTS, training)
        return list(train(*parts, accelerator=accelerator, checkpoints=folder))

    def test_losses_are_finite_and_reach_the_parameters(self) -> None:
        """Every loss is a finite scalar, and together they give a gradient."""
        flow = self.flow()
        losses = backpropagate(self.fresh(), flow, self.reward(), make_batch(flow, range(self.batch)))
        assert losses, "the first update has no loss"
        odd = [loss.value.tolist() for loss in losses if loss.value.ndim or not loss.value.isfinite()]
        assert not odd, f"a loss is {odd[0]}, not one finite number"
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients), "a gradient is not finite"
        assert any(g.abs().sum() > 0 for g in gradients), "no parameter of the flow has a gradient"

    def test_randomness_comes_from_the_batch_alone(self) -> None:
        """No global generator is read (the gradient does not depend on it) or advanced."""

        def gradients(seed: int) -> list[Tensor]:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - the global generator is what must stay untouched
            before = global_state()
            flow = self.flow()
            backpropagate(self.fresh(), flow, self.reward(), make_batch(flow, range(self.batch)))
            assert global_state() == before, "a global generator was advanced"
            return gradients_of(flow)

        same = all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(2)))
        assert same, "the gradient depends on a global generator's seed"

    def test_network_calls_do_not_depend_on_the_samples(self) -> None:
        """Other prompts and noise, same ``step_rng``: the same calls, and the generator ends in the same state.

        Otherwise ranks would wait for each other forever.
        """
        seen = []
        for samples in (range(self.batch), range(self.batch, 2 * self.batch)):
            flow = CallLog(self.flow())
            batch = make_batch(flow, samples)
            for losses in each_update(self.fresh(), flow, self.reward(), batch):
                for loss in losses:
                    loss.value.backward()
            seen.append((flow.calls, batch.step_rng.get_state().tolist()))
        (calls, state), (other_calls, other_state) = seen
        assert calls == other_calls, (
            f"the network calls depend on the samples: {len(calls)} for some, {len(other_calls)} for others"
        )
        assert state == other_state, "the number of draws from step_rng depends on the samples"

    def test_one_batch_equals_its_micro_batches(self) -> None:
        """One batch of 4 gives the gradients, the updates and the records of four batches of 1, up to rounding."""
        whole, split = self.flow(), self.flow()
        records = self.run(whole, 2), self.run(split, 2, self.micro)
        a, b = (unclocked(record) for record in records)
        assert_records(a, b, near, "the whole batch", "its micro-batches")
        same = all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(whole.parameters(), split.parameters()))
        assert same, "the weights differ"

    def test_forwards_are_metered(self) -> None:
        """Training spends forwards, at least one of them with gradient, and scores images."""
        flow, meter = self.flow(), Meter()
        counting = metered(flow, meter)
        backpropagate(self.fresh(), counting, metered_reward(self.reward(), meter), make_batch(flow, range(self.batch)))
        assert meter.nfe_grad > 0, "no forward with gradient was counted"
        assert meter.reward_calls > 0, "no image was scored"

    def test_the_meter_sees_every_call(self) -> None:
        """The forwards counted, with and without gradient, are the network calls that were made."""
        flow, meter = CallLog(self.flow()), Meter()
        parts = metered(flow, meter), metered_reward(self.reward(), meter), make_batch(flow, range(self.batch))
        for losses in each_update(self.fresh(), *parts):
            for loss in losses:
                loss.value.backward()
        made = [sum(rows for rows, grad, _ in flow.calls if grad is wanted) for wanted in (False, True)]
        counted = [meter.nfe_forward, meter.nfe_grad]
        assert counted == made, f"counted {counted} (without and with gradient), made {made}; call only flow.velocity"

    def test_a_repeated_run_is_the_same(self) -> None:
        """A second run in the same process gives the same weights and records, bitwise."""
        first, second = self.flow(), self.flow()
        records = [unclocked(self.run(flow, 2)) for flow in (first, second)]
        assert_same(records, [first, second], "the second run")

    def test_resuming_is_exact(self, tmp_path: Path) -> None:
        """A run stopped after two of four batches and resumed gives the same weights and records, bitwise."""
        through, resumed = self.flow(), self.flow()
        undisturbed = self.run(through, 4)
        self.run(self.flow(), 2, folder=tmp_path)
        self.run(resumed, 4, folder=tmp_path)
        records = [unclocked(undisturbed), unclocked(load_records(tmp_path))]
        assert_same(records, [through, resumed], "the resumed run")

    def test_training_raises_the_reward(self) -> None:
        """Training raises the reward of the plain sampler's images. After ``updates`` batches, on the same noise."""
        flow = self.flow()
        before = sampled_reward(self.method.steps, flow, self.reward())
        self.run(flow, self.updates)
        after = sampled_reward(self.method.steps, flow, self.reward())
        assert after > before, f"{before:.4g} before and {after:.4g} after"


def global_state() -> tuple[str, ...]:
    """Return the state of every global generator, for comparison."""
    numpy = np.random.get_state()  # noqa: NPY002 - the global generator must stay untouched
    return (
        str(torch.get_rng_state().tolist()),
        str(random.getstate()),
        str([np.asarray(part).tolist() for part in numpy]),
    )


def sampled_reward(steps: int, flow: Flow, reward: Reward, count: int = 32) -> float:
    """Return the mean reward of ``count`` images of the deterministic sampler, on fixed noise."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    noise = flow.noise(count, [seeded("held out", i) for i in range(count)])
    with torch.no_grad():
        x_0 = integrate(flow, noise, flow.sigmas(steps), flow.encode([p.text for p in prompts]))
        return reward(flow.decode(x_0), prompts).mean().item()


def gradients_of(flow: Flow) -> list[Tensor]:
    """Return the gradients of the flow's parameters, zeros for those that have none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in flow.parameters()]


def unclocked(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records without time and memory, which differ between any two runs."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory_bytes")} for r in records]


def near(a: float | None, b: float | None) -> bool:
    """Return whether two values of records agree up to rounding, or both are None."""
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))


def assert_records(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], same: Callable[[Any, Any], bool], first: str, second: str
) -> None:
    """Assert that two runs have as many records, with the same keys and values. ``first``, ``second``: their names."""
    assert len(a) == len(b), f"{first} has {len(a)} updates, {second} {len(b)}"
    pairs = [(key, x.get(key), y.get(key)) for x, y in zip(a, b) for key in x | y]
    odd = [f"{key} is {p} for {first}, {q} for {second}" for key, p, q in pairs if not same(p, q)]
    assert not odd, f"in the records {odd[0]}"


def assert_same(records: Sequence[Sequence[dict[str, Any]]], flows: Sequence[Flow], second: str) -> None:
    """Assert that two runs have the same records and weights, bitwise. ``second``: name of the second run."""
    assert_records(records[0], records[1], operator.eq, "the first run", second)
    same = all(torch.equal(p, q) for p, q in zip(*(flow.parameters() for flow in flows)))
    assert same, f"{second} has other weights"

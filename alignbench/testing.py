"""For authors of plug-ins: flows with closed forms, and the promises a plug-in has to keep, as test classes.

Subclass a contract in your own test file and set what it tests; pytest does the rest::

    class TestMine(MethodContract):
        method = Mine(steps=8)
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL.Image import Image, Resampling, fromarray
from PIL.ImageOps import mirror
from torch import Tensor, nn

from alignbench.checkpoint import load_records
from alignbench.config import UserError
from alignbench.evaluator import TEXTS, Evaluator, Reward, Term, to_tensor
from alignbench.flow import Batch, Cond, Flow, counted, integrate, recomputing, seeded
from alignbench.meter import Meter, metered, metered_reward
from alignbench.method import AlignMethod, Loss, Pool
from alignbench.prompts import Prompt
from alignbench.spec import Budget, Optimizer, Training
from alignbench.train import draw_batch, resume, train

if TYPE_CHECKING:
    import pandas as pd

PROMPTS = tuple(Prompt(f"p{i}", f"prompt number {i}") for i in range(7))


def shifted(steps: int, shift: float = 3.0) -> Tensor:
    """(steps + 1,) float64 sigmas, 1 -> 0, with unequal steps: as SD3's sampler shifts them."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


class Toy:
    """What the analytic flows share: float64 latents (B, dim) that are their own pixels."""

    dim: int

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.dim, generator=generators[i], dtype=torch.float64) for i in range(n)])

    def encode(self, prompts: Sequence[str]) -> Cond:
        rows = [torch.randn(self.dim, generator=seeded("prompt", text), dtype=torch.float64) for text in prompts]
        return Cond({"shift": 0.1 * torch.stack(rows)})

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def sigmas(self, steps: int) -> Tensor:
        return shifted(steps)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in vars(self).items() if isinstance(p, nn.Parameter))

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]


class AffineFlow(Toy):
    """v(x, t_i, c) = A x + b_i + c: affine in the latent, with a bias of its own for every step of its grid.

    ``bias`` (steps, dim) starts at zero and is trained; ``A`` is fixed and not symmetric, so that a Jacobian cannot be
    mistaken for its transpose.
    """

    def __init__(self, steps: int, dim: int = 3, grid: Tensor | None = None) -> None:
        generator = seeded("AffineFlow", dim)
        self.dim, self.grid = dim, shifted(steps) if grid is None else grid
        self.A = 0.5 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.bias = nn.Parameter(torch.zeros(steps, dim, dtype=torch.float64))
        self.base = self.bias.detach().clone()

    def sigmas(self, steps: int) -> Tensor:
        if steps != len(self.bias):
            raise ValueError(f"this flow was made for {len(self.bias)} steps, not {steps}")
        return self.grid

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        bias = self.base if reference else self.bias
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        nearest = (self.grid[:-1] - sigma).abs().argmin(1)
        return x @ self.A.T + bias[nearest] + cond.tensors["shift"]


class GaussianFlow(Toy):
    """The exact velocity of data N(bias, std^2 I): linear in x, so that the sampler's moments have closed forms."""

    def __init__(self, std: float = 0.5, dim: int = 3) -> None:
        self.std, self.dim = std, dim
        self.bias = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.base = self.bias.detach().clone()

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        mean = self.base if reference else self.bias
        t = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        return (t - (1 - t) * self.std**2) / variance * (x - (1 - t) * mean) - mean


class Quadratic(Evaluator):
    """-|x - target|^2 / 2 of latents that are their own pixels."""

    name: ClassVar[str] = "quadratic"
    version: ClassVar[str] = "1"
    differentiable: ClassVar[bool] = True
    target: float = 1.0  # in every dimension

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return -(pixels - self.target).square().flatten(1).sum(1) / 2


class QuadraticReward(Reward):
    """A reward whose gradient is target - x."""

    def __init__(self, target: float = 1.0, margin: float | None = None) -> None:
        super().__init__(Term(Quadratic(target=target), margin))


class CallLog:
    """A flow that notes every network call: rows, whether with gradient."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.calls: list[tuple[int, bool, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: Cond, *, reference: bool = False) -> Tensor:
        v, evaluations = counted(self._flow.velocity, x, sigma, cond, reference=reference)
        if not recomputing.get():
            self.calls += [(rows, grad, reference) for rows, grad in evaluations]
        return v


def make_batch(flow: Flow, samples: Sequence[int], step: int = 0, seed: int = 0) -> Batch:
    """The batch that training would draw: samples ``samples`` of global batch ``step``."""
    training = Training(budget=Budget(updates=1), batch=len(PROMPTS), seed=seed)
    return draw_batch(flow, PROMPTS, training, step, samples, torch.device("cpu"))


def each_update(method: AlignMethod, flow: Flow, reward: Reward, batch: Batch) -> Iterator[Iterable[Loss]]:
    """The updates that a method makes of one batch, alone on one rank: what it pools comes back as it is.

    Its further networks, if it has any, are made first, as training makes them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method.modules(flow)
    updates = method.updates(flow, reward, batch)
    item = next(updates, None)
    while item is not None:
        if isinstance(item, Pool):
            item = resume(updates, item.values)
        else:
            yield item
            item = next(updates, None)


def descend(method: AlignMethod, flow: Flow, reward: Reward, batch: Batch) -> list[Loss]:
    """Back-propagate every loss of the first update; gradients stay in the parameters."""
    losses = []
    for loss in next(each_update(method, flow, reward, batch)):
        loss.value.backward()
        losses.append(loss)
    return losses


class MethodContract:
    """What training relies on, whatever the method. Set ``method``; override ``flow`` and ``reward`` at will."""

    method: AlignMethod
    lr: float = 0.03
    updates: int = 60  # batches after which the toy reward must have risen

    def fresh(self) -> AlignMethod:
        """The method with its settings, and nothing left of an earlier run."""
        return msgspec.structs.replace(self.method)

    def flow(self) -> Flow:
        """A fresh flow, always the same."""
        return AffineFlow(self.method.steps)

    def reward(self) -> Reward:
        return QuadraticReward()

    @property
    def micro(self) -> int:
        """The smallest micro-batch that the method accepts."""
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
        """Samples per batch: four of the smallest micro-batches, or two where that is a group."""
        return 4 if self.micro == 1 else 2 * self.micro

    def run(self, flow: Flow, batches: int, micro: int | None = None, folder: Path | None = None) -> list[dict]:
        """Train on ``batches`` batches (in all, when resumed)."""
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
        losses = descend(self.fresh(), flow, self.reward(), make_batch(flow, range(self.batch)))
        assert losses, "the first update has no loss"
        odd = [loss.value.tolist() for loss in losses if loss.value.ndim or not loss.value.isfinite()]
        assert not odd, f"a loss is {odd[0]}, not one finite number"
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients), "a gradient is not finite"
        assert any(g.abs().sum() > 0 for g in gradients), "no parameter of the flow has a gradient"

    def test_randomness_comes_from_the_batch_alone(self) -> None:
        """No global generator is read (the gradient does not depend on it) or moved."""

        def gradients(seed: int) -> list[Tensor]:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - the global generator is what must stay untouched
            before = global_state()
            flow = self.flow()
            descend(self.fresh(), flow, self.reward(), make_batch(flow, range(self.batch)))
            assert global_state() == before, "a global generator was moved"
            return gradients_of(flow)

        same = all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(2)))
        assert same, "the gradient depends on a global generator's seed"

    def test_network_calls_do_not_depend_on_the_samples(self) -> None:
        """Other prompts and noise, same ``step_rng``: the same calls, and the generator is left in the same state.

        Ranks would otherwise wait for one another for ever.
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
            f"{len(calls)} network calls for some samples, {len(other_calls)} others for others"
        )
        assert state == other_state, "how much is drawn from step_rng depends on the samples"

    def test_one_batch_equals_its_micro_batches(self) -> None:
        """One batch of 4 gives the gradients, the updates and the records of four batches of 1, to rounding."""
        whole, split = self.flow(), self.flow()
        records = self.run(whole, 2), self.run(split, 2, self.micro)
        a, b = (unclocked(found) for found in records)
        assert_records(a, b, near, "the whole batch", "its micro-batches")
        same = all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(whole.parameters(), split.parameters()))
        assert same, "the weights differ"

    def test_forwards_are_metered(self) -> None:
        """Training spends forwards, at least one of them with gradient, and scores images."""
        flow, meter = self.flow(), Meter()
        counting = metered(flow, meter)
        descend(self.fresh(), counting, metered_reward(self.reward(), meter), make_batch(flow, range(self.batch)))
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
        assert counted == made, f"counted {counted} (without and with gradient), made {made}; call flow.velocity alone"

    def test_a_repeated_run_is_the_same(self) -> None:
        """A second run in the same process gives the weights and the records of the first, bitwise."""
        first, second = self.flow(), self.flow()
        records = [unclocked(self.run(flow, 2)) for flow in (first, second)]
        assert_same(records, [first, second], "the second run")

    def test_resuming_is_exact(self, tmp_path: Path) -> None:
        """Stopped after two of four batches and resumed: every weight and every record as if undisturbed, bitwise."""
        through, resumed = self.flow(), self.flow()
        undisturbed = self.run(through, 4)
        self.run(self.flow(), 2, folder=tmp_path)
        self.run(resumed, 4, folder=tmp_path)
        records = [unclocked(undisturbed), unclocked(load_records(tmp_path))]
        assert_same(records, [through, resumed], "the resumed run")

    def test_training_raises_the_reward(self) -> None:
        """Training raises the reward of the plain sampler's images. After ``updates`` batches, from the same noise."""
        flow = self.flow()
        before = sampled_reward(self.method.steps, flow, self.reward())
        self.run(flow, self.updates)
        after = sampled_reward(self.method.steps, flow, self.reward())
        assert after > before, f"{before:.4g} before and {after:.4g} after"


def global_state() -> tuple[str, ...]:
    """The state of every global generator, to compare."""
    numpy = np.random.get_state()  # noqa: NPY002 - the global generator is what must stay untouched
    return (
        str(torch.get_rng_state().tolist()),
        str(random.getstate()),
        str([np.asarray(part).tolist() for part in numpy]),
    )


def sampled_reward(steps: int, flow: Flow, reward: Reward, count: int = 32) -> float:
    """Mean reward of the deterministic sampler's images on fixed noise."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    noise = flow.noise(count, [seeded("held out", i) for i in range(count)])
    with torch.no_grad():
        x_0 = integrate(flow, noise, flow.sigmas(steps), flow.encode([p.text for p in prompts]))
        return reward(flow.decode(x_0), prompts).mean().item()


def gradients_of(flow: Flow) -> list[Tensor]:
    """The gradients of the flow's parameters, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in flow.parameters()]


def unclocked(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without wall-clock and memory, which no two runs share."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory_bytes")} for r in records]


def near(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))


def assert_records(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], same: Callable[[Any, Any], bool], first: str, second: str
) -> None:
    """Two runs have as many records, with the same keys and values."""
    assert len(a) == len(b), f"{first} has {len(a)} updates, {second} {len(b)}"
    pairs = [(key, x.get(key), y.get(key)) for x, y in zip(a, b) for key in x | y]
    odd = [f"{key} is {p} for {first}, {q} for {second}" for key, p, q in pairs if not same(p, q)]
    assert not odd, f"in the records {odd[0]}"


def assert_same(records: Sequence[Sequence[dict[str, Any]]], flows: Sequence[Flow], second: str) -> None:
    """Two runs have the same records and weights, bitwise."""
    assert_records(records[0], records[1], operator.eq, "the first run", second)
    same = all(torch.equal(p, q) for p, q in zip(*(flow.parameters() for flow in flows)))
    assert same, f"{second} has other weights"


class EvaluatorContract:
    """What tables and training rely on, whatever the evaluator. Set ``evaluator``; override the rest at will."""

    evaluator: Evaluator
    rtol: float = 1e-4  # of scores that must agree to rounding
    atol: float = 1e-5
    parity: float = 0.01  # how far the reward may be from the score, for instance through 8-bit rounding
    unit: float = 1.0  # the score's unit / the reward's

    def prompts(self) -> list[Prompt]:
        """Five prompts that the evaluator can score."""
        return list(PROMPTS[:5])

    def images(self) -> list[Image]:
        """As many images, all of one size: smooth, colourful, and different."""
        return [picture(64, 64, seed) for seed in range(5)]

    def pixels(self) -> Tensor:
        """The same images as (5, 3, H, W) in [0, 1]."""
        return torch.stack([to_tensor(image) for image in self.images()])

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if type(self.evaluator).reward is Evaluator.reward:
            assert not self.evaluator.differentiable
            pytest.skip("this evaluator gives no training reward, and says so")
        return self.evaluator.reward(pixels, prompts)

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """As the harness calls it: a paired evaluator compares each image with its own mirror image."""
        base = [[mirror(image) for image in images]] if self.evaluator.paired else []
        return self.evaluator.score(images, prompts, *base)

    def metrics(self) -> list[str]:
        return [metric.name for metric in self.evaluator.metrics]

    def scores(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> np.ndarray:
        return self.score(images, prompts)[self.metrics()].to_numpy(dtype=float)

    def test_its_files_are_there(self) -> None:
        """Every file that determines the score exists, and every prompt passes ``check``."""
        assert all(path.is_file() for path in self.evaluator.files())
        self.evaluator.check(self.prompts())

    def test_one_row_per_image_and_one_column_per_metric(self) -> None:
        """Finite floats, one row per image, exactly the declared columns, texts behind them; no image is no row."""
        frame = self.score(self.images(), self.prompts())
        assert [name for name in frame if name not in TEXTS] == self.metrics()
        assert list(frame)[: len(self.metrics())] == self.metrics()
        assert len(frame) == len(self.images())
        assert np.isfinite(frame[self.metrics()].to_numpy(dtype=float)).all()
        assert len(self.score([], [])) == 0

    def test_scores_are_deterministic(self) -> None:
        """A second call gives the same bits, and no global generator is moved."""
        before = global_state()
        frame = self.score(self.images(), self.prompts())
        assert frame.equals(self.score(self.images(), self.prompts()))
        assert global_state() == before

    def test_an_image_is_scored_by_itself(self) -> None:
        """The score depends neither on the other images nor on their order."""
        images, prompts = self.images(), self.prompts()
        together = self.scores(images, prompts)
        alone = [self.scores([i], [p])[0] for i, p in zip(images, prompts)]
        backwards = self.scores(images[::-1], prompts[::-1])[::-1]
        np.testing.assert_allclose(alone, together, rtol=self.rtol, atol=self.atol)
        np.testing.assert_allclose(backwards, together, rtol=self.rtol, atol=self.atol)

    def test_any_image_mode_is_read_as_rgb(self) -> None:
        """RGBA and grey images score as their RGB conversions do, and are left as they were."""
        rgba, grey = self.images()[0].convert("RGBA"), self.images()[1].convert("L")
        prompts = self.prompts()[:2]
        found = self.score([rgba, grey], prompts)
        assert found.equals(self.score([rgba.convert("RGB"), grey.convert("RGB")], prompts))
        assert (rgba.mode, grey.mode) == ("RGBA", "L")

    def test_the_reward_is_the_score(self) -> None:
        """What training maximises is what the table shows: the first metric, of every image."""
        with torch.no_grad():
            reward = self.reward(self.pixels(), self.prompts())
        score = self.score(self.images(), self.prompts()).iloc[:, 0].to_numpy(dtype=float)
        assert reward.shape == (len(score),)
        assert np.abs(reward.numpy() * self.unit - score).max() < self.parity * self.unit

    def test_rewards_are_aligned_with_their_prompts(self) -> None:
        """Image i is scored with prompt i alone: a batch equals its singles, also for other prompts in the batch."""
        pixels, prompts = self.pixels(), self.prompts()
        with torch.no_grad():
            together = self.reward(pixels, prompts)
            alone = [self.reward(pixels[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        torch.testing.assert_close(together, torch.cat(alone), rtol=self.rtol, atol=self.atol)

    def test_a_differentiable_reward_has_a_gradient(self) -> None:
        """Finite, not zero, and of each image's own reward alone."""
        if not self.evaluator.differentiable:
            return
        pixels = self.pixels().mul(0.8).add(0.1).requires_grad_()
        reward = self.reward(pixels, self.prompts())
        (gradient,) = torch.autograd.grad(reward[0], pixels)
        assert gradient.isfinite().all()
        assert gradient[0].abs().sum() > 0
        assert gradient[1:].abs().sum() == 0


def picture(height: int, width: int, seed: int) -> Image:
    """An RGB image of large smooth patches with a little noise: neither flat nor white noise."""
    rng = np.random.default_rng(seed)
    patches = fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Resampling.BICUBIC)
    noisy = np.asarray(patches).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return fromarray(noisy.clip(0, 255).astype(np.uint8))

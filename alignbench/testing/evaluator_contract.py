"""The contract test of an evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL.Image import Image, Resampling, fromarray
from PIL.ImageOps import mirror
from torch import Tensor

from alignbench.evaluator import TEXTS, Evaluator, to_tensor
from alignbench.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd
from alignbench.analytic import PROMPTS
from alignbench.testing.method_contract import global_state


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

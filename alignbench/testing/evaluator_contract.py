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

from alignbench.analytic import PROMPTS
from alignbench.evaluator import NOTES, Evaluator, to_tensor
from alignbench.prompts import Prompt
from alignbench.testing.method_contract import global_state

if TYPE_CHECKING:
    import pandas as pd


class EvaluatorContract:
    """The tests that every evaluator has to pass, since tables and training rely on them.

    Set ``evaluator``; override prompts, images and tolerances if the defaults do not suit it.
    """

    evaluator: Evaluator
    rtol: float = 1e-4  # relative tolerance of scores that must agree up to rounding
    atol: float = 1e-5  # absolute tolerance of the same
    parity: float = 0.01  # largest difference of reward and score, for instance through 8-bit rounding
    unit: float = 1.0  # the score's unit divided by the reward's

    def prompts(self) -> list[Prompt]:
        """Return five prompts that the evaluator can score."""
        return list(PROMPTS[:5])

    def images(self) -> list[Image]:
        """Return as many images, all of one size: smooth, colourful, and different."""
        return [random_image(64, 64, seed) for seed in range(5)]

    def pixels(self) -> Tensor:
        """Return the same images as (5, 3, H, W) pixels in [0, 1]."""
        return torch.stack([to_tensor(image) for image in self.images()])

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the evaluator's reward; skip the test if it has none and says so."""
        if type(self.evaluator).reward is Evaluator.reward:
            assert not self.evaluator.differentiable
            pytest.skip("this evaluator gives no training reward, and says so")
        return self.evaluator.reward(pixels, prompts)

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return the evaluator's data frame; a paired evaluator compares each image with its mirror image."""
        base = [[mirror(image) for image in images]] if self.evaluator.paired else []
        return self.evaluator.score(images, prompts, *base)

    def metrics(self) -> list[str]:
        """Return the names of the metrics."""
        return [metric.name for metric in self.evaluator.metrics]

    def scores(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> np.ndarray:
        """Return (images, metrics) scores."""
        return self.score(images, prompts)[self.metrics()].to_numpy(dtype=float)

    def test_its_files_are_there(self) -> None:
        """Every file that determines the score exists, and every prompt passes ``check``."""
        assert all(path.is_file() for path in self.evaluator.files())
        self.evaluator.check(self.prompts())

    def test_one_row_per_image_and_one_column_per_metric(self) -> None:
        """Scores are finite: a row per image, the declared columns in order, then texts; no images give no rows."""
        frame = self.score(self.images(), self.prompts())
        assert [name for name in frame if name not in NOTES] == self.metrics()
        assert list(frame)[: len(self.metrics())] == self.metrics()
        assert len(frame) == len(self.images())
        assert np.isfinite(frame[self.metrics()].to_numpy(dtype=float)).all()
        assert len(self.score([], [])) == 0

    def test_scores_are_deterministic(self) -> None:
        """A second call gives the same scores bitwise, and no global generator is advanced."""
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
        """RGBA and grey images score as their RGB conversions do, and are not modified."""
        rgba, grey = self.images()[0].convert("RGBA"), self.images()[1].convert("L")
        prompts = self.prompts()[:2]
        frame = self.score([rgba, grey], prompts)
        assert frame.equals(self.score([rgba.convert("RGB"), grey.convert("RGB")], prompts))
        assert (rgba.mode, grey.mode) == ("RGBA", "L")

    def test_the_reward_is_the_score(self) -> None:
        """Training maximises what the table shows: the first metric, for every image."""
        with torch.no_grad():
            reward = self.reward(self.pixels(), self.prompts())
        score = self.score(self.images(), self.prompts()).iloc[:, 0].to_numpy(dtype=float)
        assert reward.shape == (len(score),)
        assert np.abs(reward.numpy() * self.unit - score).max() < self.parity * self.unit

    def test_rewards_are_aligned_with_their_prompts(self) -> None:
        """Image i is scored with prompt i alone: a batch equals its images one by one."""
        pixels, prompts = self.pixels(), self.prompts()
        with torch.no_grad():
            together = self.reward(pixels, prompts)
            alone = [self.reward(pixels[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        torch.testing.assert_close(together, torch.cat(alone), rtol=self.rtol, atol=self.atol)

    def test_a_differentiable_reward_has_a_gradient(self) -> None:
        """The gradient is finite and not zero, and each image's reward depends on that image alone."""
        if not self.evaluator.differentiable:
            return
        pixels = self.pixels().mul(0.8).add(0.1).requires_grad_()
        reward = self.reward(pixels, self.prompts())
        (gradient,) = torch.autograd.grad(reward[0], pixels)
        assert gradient.isfinite().all()
        assert gradient[0].abs().sum() > 0
        assert gradient[1:].abs().sum() == 0


def random_image(height: int, width: int, seed: int) -> Image:
    """Return an RGB image of large smooth patches with a little noise: neither flat nor white noise."""
    rng = np.random.default_rng(seed)
    patches = fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Resampling.BICUBIC)
    noisy = np.asarray(patches).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return fromarray(noisy.clip(0, 255).astype(np.uint8))

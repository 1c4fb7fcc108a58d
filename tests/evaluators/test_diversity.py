"""Diversity within a prompt: identities of squared distances, on the packaged CLIP."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from alignbench.evaluators.diversity import Diversity
from alignbench.prompts import Prompt
from alignbench.testing.evaluator_contract import random_image

DIVERSITY = Diversity(weights="shapes")
A, B = Prompt("a", "a red circle"), Prompt("b", "a blue square")
IMAGES = [random_image(32, 32, seed) for seed in range(5)]
PROMPTS = [A, B, A, A, B]


def score(images, prompts, **settings):
    return Diversity(weights="shapes", **settings).score(images, prompts)["diversity"].to_numpy()


def test_diversity_is_the_mean_over_ordered_pairs():
    """The mean over a prompt's images is sum_{i != j} |f_i - f_j|^2 / (n (n - 1)), from a plain loop."""
    f = DIVERSITY.features(IMAGES)
    assert f.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    found = score(IMAGES, PROMPTS)
    for prompt in (A, B):
        rows = [i for i, p in enumerate(PROMPTS) if p is prompt]
        pairs = [float((f[i] - f[j]).square().sum()) for i in rows for j in rows if i != j]
        assert found[rows].mean() == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_diversity_is_twice_the_features_variance():
    """Half of it, DreamSim's form, is the trace of the features' unbiased covariance."""
    found = score(IMAGES, [A] * 5, form="dreamsim").mean()
    assert found == pytest.approx(DIVERSITY.features(IMAGES).var(0).sum().item(), rel=1e-12)
    assert score(IMAGES, [A] * 5).mean() == pytest.approx(2 * found, rel=1e-12)


def test_equal_images_have_none_and_order_does_not_matter():
    """Copies have distance zero; permuting the images permutes the values."""
    assert score([IMAGES[0]] * 3, [A] * 3).tolist() == [0, 0, 0]
    order = [3, 0, 4, 1, 2]
    permuted = score([IMAGES[i] for i in order], [PROMPTS[i] for i in order])
    np.testing.assert_allclose(permuted, score(IMAGES, PROMPTS)[order], rtol=1e-4)


def test_a_single_image_has_no_diversity():
    """Its value is NaN rather than zero; no images give no rows."""
    assert math.isnan(score(IMAGES[:1], [A])[0])
    assert len(score([], [])) == 0
    assert torch.equal(DIVERSITY.features([Image.new("RGB", (8, 8))])[0].isfinite().all(), torch.tensor(True))

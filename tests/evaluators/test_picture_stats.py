"""Picture statistics: closed forms of grids, greys, pure colours and noise."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.tiny_sweep import PLUGIN, sweep_file

from alignbench.analytic import PROMPTS
from alignbench.config import UserError
from alignbench.evaluators.picture_stats import PictureStats, grid_energy
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.plugins import Registry
from alignbench.testing import EvaluatorContract


class TestPictureStats(EvaluatorContract):
    evaluator = PictureStats()


def score(*images, **settings):
    return PictureStats(**settings).score(images, PROMPTS[: len(images)])


def plain(*color, size=64):
    return Image.new("RGB", (size, size), color)


def tiled(tile, size):
    """Return an image that repeats ``tile`` (p, p)."""
    times = size // len(tile) + 1
    return np.tile(tile, (times, times))[:size, :size]


@pytest.mark.parametrize("patch", [2, 4, 5, 16])
def test_a_pure_grid_has_all_its_energy_at_its_period(patch):
    """The energy is 1 for any tile, a cut one at the border included, and at half the contrast."""
    tile = np.random.default_rng(patch).random((patch, patch))
    for size in (4 * patch, 9 * patch + patch // 2):
        assert grid_energy(tiled(tile, size), patch) == pytest.approx(1, abs=1e-12)
        assert grid_energy(0.5 + tiled(tile, size) / 4, patch) == pytest.approx(1, abs=1e-12)


def test_lines_in_one_direction_have_half_the_energy():
    """The energy is the mean of both directions, and vertical lines leave columns constant."""
    row = np.tile([0.2, 0.2, 0.2, 0.9], 16)
    assert grid_energy(np.tile(row, (64, 1)), 4) == pytest.approx(0.5, abs=1e-12)


def test_another_period_is_not_a_grid():
    """Twice the period, or 3 for 4, adds nothing at the patch period; a constant image has no energy."""
    wave = 0.5 + 0.4 * np.sign(np.sin(2 * np.pi * (np.arange(64) + 0.5) / 8))
    assert grid_energy(np.tile(wave, (64, 1)), 4) == 0
    assert grid_energy(np.full((64, 64), 0.3), 16) == 0
    thirds = np.tile(np.random.default_rng(0).random(3), 64)[:96]
    assert grid_energy(np.tile(thirds, (96, 1)), 4) <= 0


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (64, 16), (256, 16)])
def test_noise_and_smooth_images_have_no_grid(size, patch):
    """White noise and a photograph's spectrum, 1 / f^2, have zero within three standard errors and 0.02."""
    rng = np.random.default_rng(size)
    noises = [rng.normal(size=(size, size)) for _ in range(60)]
    steep = [np.cumsum(np.cumsum(noise - noise.mean(), 0), 1) for noise in noises]
    for images in (noises, steep):
        energies = [grid_energy(image, patch) for image in images]
        assert abs(np.mean(energies)) < 3 * np.std(energies) / np.sqrt(len(energies)) + 0.02


def test_a_faint_grid_is_detected():
    """A grid of 2 % contrast under 5 % noise changes the number far more than images differ."""
    rng = np.random.default_rng(0)
    line = np.tile([1.0] + [0.0] * 15, 16)
    grid = 0.02 * np.maximum(line[:, None], line[None])
    noises = [0.05 * rng.normal(size=(256, 256)) for _ in range(20)]
    without, with_ = ([grid_energy(noise + extra, 16) for noise in noises] for extra in (0, grid))
    assert np.min(with_) > np.max(without) + 0.2


def test_pure_colours():
    """They have saturation 1 and their own luma; greys have saturation 0; half white, half red gives the mean."""
    colours = score(plain(255, 0, 0), plain(0, 255, 0), plain(0, 0, 255), plain(255, 255, 255), plain(0, 0, 0))
    assert colours["saturation"].tolist() == [1, 1, 1, 0, 0]
    assert colours["brightness"].tolist() == pytest.approx([0.299, 0.587, 0.114, 1, 0])
    assert colours["grid_energy"].tolist() == [0] * 5
    grey = score(plain(51, 51, 51))
    assert grey.iloc[0].tolist() == pytest.approx([0, 0, 0.2])
    half = plain(255, 255, 255)
    half.paste((255, 0, 0), (0, 0, 32, 64))
    assert score(half).iloc[0, 1:].tolist() == pytest.approx([0.5, 0.5 + 0.299 / 2])


def test_too_small_an_image_has_no_number():
    """With fewer than two periods along a side it is NaN; the period can be set."""
    assert np.isnan(score(plain(1, 2, 3, size=31))["grid_energy"][0])
    assert score(plain(1, 2, 3, size=31), patch=15)["grid_energy"][0] == 0
    with pytest.raises(UserError, match="patch"):
        Registry().make("evaluator", {"name": "picture_stats", "patch": 1}, "x")


def test_a_sweep_sets_its_models_period(tmp_path):
    """The shapes world's tokens are eight pixels wide; a patch that the sweep states is kept."""
    for given, patch in (({}, 8), ({"patch": 4}, 4)):
        changes = {"evaluation": {"evaluators": [{"name": "picture_stats", **given}]}}
        (score,) = resolve(read(sweep_file(tmp_path, changes)), Registry([PLUGIN])).scores
        assert score.settings["patch"] == patch

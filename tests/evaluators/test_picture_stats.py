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
    """A picture that repeats ``tile`` (p, p)."""
    times = size // len(tile) + 1
    return np.tile(tile, (times, times))[:size, :size]


@pytest.mark.parametrize("patch", [2, 4, 5, 16])
def test_a_pure_grid_has_all_its_energy_at_its_period(patch):
    """Whatever the tile, also if the picture does not end with a whole one: 1; with half the contrast as well."""
    tile = np.random.default_rng(patch).random((patch, patch))
    for size in (4 * patch, 9 * patch + patch // 2):
        assert grid_energy(tiled(tile, size), patch) == pytest.approx(1, abs=1e-12)
        assert grid_energy(0.5 + tiled(tile, size) / 4, patch) == pytest.approx(1, abs=1e-12)


def test_lines_across_one_side_alone_are_half_of_it():
    """The mean of both directions: vertical lines leave the columns even."""
    row = np.tile([0.2, 0.2, 0.2, 0.9], 16)
    assert grid_energy(np.tile(row, (64, 1)), 4) == pytest.approx(0.5, abs=1e-12)


def test_another_period_is_no_grid():
    """Twice the period or 3 for 4: nothing stands out at the patch period; an even picture has none at all."""
    wave = 0.5 + 0.4 * np.sign(np.sin(2 * np.pi * (np.arange(64) + 0.5) / 8))
    assert grid_energy(np.tile(wave, (64, 1)), 4) == 0
    assert grid_energy(np.full((64, 64), 0.3), 16) == 0
    thirds = np.tile(np.random.default_rng(0).random(3), 64)[:96]
    assert grid_energy(np.tile(thirds, (96, 1)), 4) <= 0


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (64, 16), (256, 16)])
def test_noise_and_smooth_pictures_have_no_grid(size, patch):
    """White noise: zero within three standard errors and 0.02; a photograph's spectrum, 1 / f^2, too."""
    rng = np.random.default_rng(size)
    noises = [rng.normal(size=(size, size)) for _ in range(60)]
    steep = [np.cumsum(np.cumsum(noise - noise.mean(), 0), 1) for noise in noises]
    for pictures in (noises, steep):
        found = [grid_energy(picture, patch) for picture in pictures]
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) + 0.02


def test_a_faint_grid_on_a_picture_shows():
    """Two per cent of contrast under noise of five move the number by far more than pictures differ."""
    rng = np.random.default_rng(0)
    line = np.tile([1.0] + [0.0] * 15, 16)
    grid = 0.02 * np.maximum(line[:, None], line[None])
    noises = [0.05 * rng.normal(size=(256, 256)) for _ in range(20)]
    without, with_ = ([grid_energy(noise + extra, 16) for noise in noises] for extra in (0, grid))
    assert np.min(with_) > np.max(without) + 0.2


def test_pure_colours():
    """Saturation 1 and the colour's own luma; greys have no saturation; half white, half red: the mean."""
    colours = score(plain(255, 0, 0), plain(0, 255, 0), plain(0, 0, 255), plain(255, 255, 255), plain(0, 0, 0))
    assert colours["saturation"].tolist() == [1, 1, 1, 0, 0]
    assert colours["brightness"].tolist() == pytest.approx([0.299, 0.587, 0.114, 1, 0])
    assert colours["grid_energy"].tolist() == [0] * 5
    grey = score(plain(51, 51, 51))
    assert grey.iloc[0].tolist() == pytest.approx([0, 0, 0.2])
    half = plain(255, 255, 255)
    half.paste((255, 0, 0), (0, 0, 32, 64))
    assert score(half).iloc[0, 1:].tolist() == pytest.approx([0.5, 0.5 + 0.299 / 2])


def test_too_small_a_picture_has_no_number():
    """Below two periods along a side: not a number; the period may be set."""
    assert np.isnan(score(plain(1, 2, 3, size=31))["grid_energy"][0])
    assert score(plain(1, 2, 3, size=31), patch=15)["grid_energy"][0] == 0
    with pytest.raises(UserError, match="patch"):
        Registry().make("evaluator", {"name": "picture_stats", "patch": 1}, "x")


def test_a_sweep_fills_in_its_models_period(tmp_path):
    """The shapes world's tokens have sides of eight pixels; a patch that the sweep names is kept."""
    for given, patch in (({}, 8), ({"patch": 4}, 4)):
        changes = {"evaluation": {"evaluators": [{"name": "picture_stats", **given}]}}
        (found,) = resolve(read(sweep_file(tmp_path, changes)), Registry([PLUGIN])).scores
        assert found.settings["patch"] == patch

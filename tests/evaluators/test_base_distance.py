"""Distance from the base model's images: closed forms, and in a sweep the exact images of the Base row."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, sweep_file, tables

from alignbench.cli import main
from alignbench.config import UserError
from alignbench.evaluation.scoring import score_rows
from alignbench.evaluators.base_distance import BaseDistance
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, load_prompts
from alignbench.reporting.analysis.comparison import Comparison, Measure, better, worse
from alignbench.reporting.analysis.stats import MeanEstimate
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json
from alignbench.testing import EvaluatorContract
from alignbench.testing.evaluator_contract import random_image

DISTANCE = BaseDistance(weights="shapes")
PROMPTS = [Prompt(text, text) for text in ("a red circle", "a blue square", "a red circle")]
IMAGES, OTHERS = ([random_image(32, 32, seed) for seed in range(start, start + 3)] for start in (0, 3))
BASE, LAST = {"label": "Base", "method": {"name": "base"}}, {"label": "Last", "method": {"name": "last"}}
DISTANCES = {"evaluators": [{"name": "base_distance", "weights": "shapes"}]}


def score(images, base):
    return DISTANCE.score(images, PROMPTS[: len(images)], base)["base_distance"].to_numpy()


class TestBaseDistance(EvaluatorContract):
    """The evaluator contract for a paired evaluator."""

    evaluator = DISTANCE


def test_distance_is_two_minus_two_cosines():
    """|f - g|^2 of unit features is 2 (1 - f.g), image by image, and symmetric in image and base."""
    f, g = DISTANCE._clip.features(IMAGES), DISTANCE._clip.features(OTHERS)
    found = score(IMAGES, OTHERS)
    np.testing.assert_allclose(found, 2 * (1 - (f * g).sum(1)), atol=1e-6)
    np.testing.assert_array_equal(found, score(OTHERS, IMAGES))
    assert (found > 1e-4).all()


def test_an_image_has_distance_zero_from_itself():
    """The distance is exactly zero, without rounding; no images give no rows."""
    assert score(IMAGES, [image.copy() for image in IMAGES]).tolist() == [0, 0, 0]
    assert len(score([], [])) == 0


def test_an_unreadable_base_image_costs_no_other_score():
    """Its row has the error; the others have the values that they have alone."""
    frame = score_rows(DISTANCE, IMAGES, PROMPTS, [OTHERS[0], "cannot be read: truncated", OTHERS[2]])
    assert frame["ok"].tolist() == [True, False, True]
    assert frame["error"][1] == "cannot be read: truncated"
    np.testing.assert_allclose(frame["base_distance"][[0, 2]], score(IMAGES, OTHERS)[[0, 2]], atol=1e-6)


# ---- in a sweep


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def alone(request, tmp_path_factory):
    """A finished sweep without a Base row, fully fine-tuned or with adapters: its folder and its changes."""
    folder = tmp_path_factory.mktemp(request.param)
    backend = {} if request.param == "full" else {"tune": "lora", "lora_rank": 2}
    changes = {"base": {"backend": backend}, "cases": [LAST], "grid": {"training.seed": [0]}, "evaluation": DISTANCES}
    assert debug_sweep(sweep_file(folder, changes), folder / "store") == 0
    return folder, changes


def image_sets(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return {image set: {file name: bytes}}."""
    return {
        path.name: {image.name: image.read_bytes() for image in path.glob("*.png")}
        for path in (folder / "store" / "images").iterdir()
    }


@pytest.mark.slow
def test_the_worker_generates_the_images_of_the_base_row(alone, tmp_path):
    """A sweep without a Base row has the image set that a Base row makes: same id, same bytes."""
    folder, changes = alone
    path = sweep_file(tmp_path, changes | {"cases": [BASE], "grid": {}})
    assert debug_sweep(path, tmp_path / "store") == 0
    ((name, images),) = image_sets(tmp_path).items()
    assert len(images) == 4
    assert image_sets(folder)[name] == images
    assert len(image_sets(folder)) == 2


def test_distances_of_a_sweep(alone):
    """Distances equal those computed by hand from the stored images, and training has moved all images."""
    folder, _ = alone
    run = read_json(Store(folder / "store").manifests()[0])["runs"][0]
    (entry,) = run["scores"]
    assert entry["base"] in entry["file"]
    assert entry["base"] != run["images"]
    frame = pd.read_parquet(folder / "store" / entry["file"])
    own, base = (folder / "store" / "images" / name for name in (run["images"], entry["base"]))
    files = [f"{row['prompt_id']}-{row['index']}.png" for _, row in frame.iterrows()]
    sides = [[Image.open(side / name).convert("RGB") for name in files] for side in (own, base)]
    expected = DISTANCE.score(sides[0], PROMPTS, sides[1])["base_distance"]
    assert frame["base_distance"].tolist() == expected.tolist()
    assert frame["ok"].all()
    assert (frame["base_distance"] > 0).all()


@pytest.mark.slow
def test_the_base_row_has_distance_zero(alone, tmp_path, capsys):
    """Added to the sweep, it adds no image set, its distances are exactly 0, and the report's column has no arrow."""
    folder, changes = alone
    shutil.copytree(folder / "store", tmp_path / "store")
    path = sweep_file(tmp_path, changes | {"cases": [BASE, LAST]})
    assert debug_sweep(path, tmp_path / "store") == 0
    assert "2 runs: 0 to train, 0 image sets to make, 1 scores to compute" in capsys.readouterr().err
    scores, costs = tables(tmp_path / "store")
    by_label = scores.groupby("label")["score"]
    assert by_label.max()["Base"] == 0
    assert by_label.min()["Last"] > 0
    assert costs["state"].tolist() == ["done", "done"]
    assert alignbench("report", path, "--out", str(tmp_path), store=tmp_path / "store", plugin=False) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("| method"))
    assert "A column without an arrow: neither direction is better in itself" in out
    assert "| base_distance (shapes), squared distance [held-out] |" in header


def test_further_is_neither_better_nor_worse():
    """No method wins by a distance, however certain the change, nor is it a sign of reward hacking."""
    (metric,) = DISTANCE.metrics
    neutral = Measure("base_distance", **metric._asdict())
    for change in (-0.1, 0.1):
        sure = Comparison(MeanEstimate(change, change - 0.01, change + 0.01, 0.005, 9.0, 1e-6, 90, 2), 1e-6)
        assert sure.verdict in ("up", "down")
        assert not better(sure, neutral)
        assert not worse(sure, neutral)


def compared(folder: Path, evaluation=None, **changes):
    """Return {label: (id of the base's image set, own id, file of the distances)}."""
    changes |= {"cases": [BASE, LAST], "evaluation": DISTANCES | (evaluation or {})}
    plan = resolve(read(sweep_file(folder, changes), seeds="0"), Registry([PLUGIN]))
    return {cell.spec.label: (cell.base, cell.images, plan.scored(cell)[0].file) for cell in plan.cells}


@pytest.mark.slow
def test_the_base_image_set_is_part_of_the_id(tmp_path):
    """Other evaluation steps change the base image set and the file; a row with hybrid inference keeps both."""
    first = compared(tmp_path)
    slower = compared(tmp_path, {"protocol": {"steps": 3}})
    why = {"match": {"label": "Last"}, "set": {"evaluation.protocol.tuned_steps": 1}, "reason": "its release does"}
    mixed = compared(tmp_path, overrides=[why])
    assert first["Base"][0] == first["Base"][1] == first["Last"][0]
    assert slower["Last"][0] != first["Last"][0]
    assert slower["Last"][2] != first["Last"][2]
    assert mixed["Last"][0] == first["Base"][1]
    assert mixed["Last"][1] != first["Last"][1]


@pytest.mark.slow
def test_failed_base_images_are_the_reason(tmp_path, capsys):
    """If they cannot be made (here: written), the distances say so, other scores exist, and a rerun repairs it."""
    evaluators = [*DISTANCES["evaluators"], {"name": "bright"}]
    changes = {"cases": [LAST], "grid": {"training.seed": [0]}, "evaluation": {"evaluators": evaluators}}
    path = sweep_file(tmp_path, changes)
    base = resolve(read(path), Registry([PLUGIN])).cells[0].base
    blocked = tmp_path / "store" / "images" / base
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder should be")
    assert debug_sweep(path, tmp_path / "store") == 2
    assert "the base model's images are missing" in capsys.readouterr().err
    assert set(tables(tmp_path / "store")[0]["metric"]) == {"brightness"}
    blocked.unlink()
    assert debug_sweep(path, tmp_path / "store") == 0
    assert set(tables(tmp_path / "store")[0]["metric"]) == {"brightness", "base_distance"}


@pytest.mark.slow
def test_the_base_model_has_no_milestones(tmp_path):
    """Its images are made only for the end; a milestone that training did not reach leaves no trace."""
    changes = {"cases": [LAST], "grid": {"training.seed": [0]}, "evaluation": DISTANCES}
    path = sweep_file(tmp_path, changes | {"base": {"training": {"milestones": [1, 9]}}})
    assert debug_sweep(path, tmp_path / "store") == 0
    (run,) = (read_json(Store(tmp_path / "store").manifests()[0]) or {})["runs"]
    made = {run["images"], run["milestones"][0]["images"], run["scores"][0]["base"]}
    assert image_sets(tmp_path).keys() == made
    assert [path.name for path in (tmp_path / "store" / "runs").iterdir()] == [run["id"]]


def test_a_sweep_refuses_a_base_folder(tmp_path):
    """``base`` is only for `alignbench score`; in a sweep it could contradict the sweep's base model."""
    path = sweep_file(tmp_path, {"evaluation": {"evaluators": [{"name": "base_distance", "base": str(tmp_path)}]}})
    with pytest.raises(UserError, match=r"evaluators\[0\].base: a sweep makes the base model's images itself"):
        resolve(read(path), Registry([PLUGIN]))


# ---- `alignbench score`


@pytest.fixture
def folders(tmp_path):
    """A list of two prompts, and two folders with two images of each, named as alignbench names them."""
    (tmp_path / "list.txt").write_text("a red circle\na blue square\n")
    for folder, start in (("tuned", 0), ("base", 10)):
        (tmp_path / folder).mkdir()
        for i, prompt in enumerate(load_prompts(str(tmp_path / "list.txt"))):
            for index in range(2):
                random_image(32, 32, start + 2 * i + index).save(tmp_path / folder / f"{prompt.id}-{index}.png")
    return tmp_path


def verb(folder, *words):
    command = [str(folder / "tuned"), "--prompts", str(folder / "list.txt"), "--out", str(folder / "scores.csv")]
    return main(["score", *command, "-e", "base_distance", "base_distance.weights=shapes", *words])


def test_score_pairs_two_folders(folders):
    """Images are paired by prompt and index; the settings beside the table name the base folder."""
    assert verb(folders, f"base_distance.base={folders / 'base'}") == 0
    table = pd.read_csv(folders / "scores.csv").set_index(["prompt_id", "index"])["score"]
    for i, prompt in enumerate(load_prompts(str(folders / "list.txt"))):
        for index in range(2):
            seed = 2 * i + index
            expected = score([random_image(32, 32, seed)], [random_image(32, 32, 10 + seed)])[0]
            assert table[prompt.id, index] == pytest.approx(expected, rel=1e-4)
    assert json.loads((folders / "scores.json").read_text())["base_distance"]["settings"]["base"].endswith("base")


def test_folders_that_do_not_match(folders, capsys):
    """The error names the folder and the first unpaired image; without a folder it says how to name one."""
    assert verb(folders) == 1
    assert "base_distance.base: name the folder of the base model's images" in capsys.readouterr().err
    lost = sorted((folders / "base").iterdir())[1]
    lost.unlink()
    assert verb(folders, f"base_distance.base={folders / 'base'}") == 1
    said = capsys.readouterr().err
    assert "base_distance.base" in said
    assert "image 1, is in only one of the two folders; images are paired by prompt and index" in said
    assert said.count("\n") == 1
    assert not (folders / "scores.csv").exists()

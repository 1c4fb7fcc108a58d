"""`--rehearse`: the same sweep, run by run, with small models, and never mistaken for a result."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_sweep import alignbench, sweep_file, tables

from alignbench.config import UserError
from alignbench.experiment.document import read, sweeps
from alignbench.experiment.plan import draft, resolve
from alignbench.plugins import Registry
from alignbench.rehearsal.sweep import rehearse

SWEEPS = sorted(sweeps())


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A store, shared by the tests, in which small checkpoints are made once."""
    return tmp_path_factory.mktemp("rehearsal")


@pytest.mark.parametrize("name", SWEEPS)
def test_a_rehearsal_has_the_sweeps_runs(name, small):
    """Runs, rows, seeds, overrides with their reasons, evaluators and the methods' settings are the sweep's."""
    real = draft(read(name), Registry())
    document = rehearse(read(name), small)
    rehearsed = resolve(document, Registry())
    assert [cell.title for cell in rehearsed.cells] == [cell.title for cell in real.cells]
    assert [[note["reason"] for note in cell.notes] for cell in rehearsed.cells] == [
        [note["reason"] for note in cell.notes] for cell in real.cells
    ]
    names = [evaluator["name"] for evaluator in real.sweep.evaluation.evaluators]
    assert [score.name for score in rehearsed.scores] == names
    for cell, original in zip(rehearsed.cells, real.cells):
        assert cell.spec.method == original.spec.method or cell.spec.method["name"] == "checkpoint"
        assert cell.spec.backend["tune"] == original.spec.backend["tune"]
        assert [part["margin"] for part in cell.spec.rewards] == [part["margin"] for part in original.spec.rewards]
    assert document.name.startswith(f"{real.document.name}-REHEARSAL")
    assert rehearsed.manifest().rehearsal


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "shapes"])
def test_a_rehearsal_shares_no_id_with_the_sweep(name, small):
    """No run, image set or manifest is shared, so a rehearsal never counts as finished work of the sweep."""
    real, rehearsed = resolve(read(name), Registry()), resolve(rehearse(read(name), small), Registry())
    trained = [{cell.id for cell in plan.cells if cell.trains} for plan in (real, rehearsed)]
    assert not trained[0] & trained[1]
    assert not {cell.images for cell in real.cells} & {cell.images for cell in rehearsed.cells}
    assert real.document.manifest != rehearsed.document.manifest


def test_command_line_settings_are_rehearsed(small):
    """Adapters stay adapters, a grid keeps its points, and a large size on the command line stays small."""
    words = ["backend.tune=lora", "backend.size=1024", "training.batch=96", "grid.training.optimizer.lr=[1e-5, 2e-5]"]
    cells = draft(rehearse(read("table2", words, seeds="0,1"), small), Registry()).cells
    assert len(cells) == 3 + 6 * 4
    assert {cell.spec.backend["tune"] for cell in cells} == {"lora"}
    assert {cell.spec.backend["size"] for cell in cells} == {32}
    assert max(cell.spec.training.batch for cell in cells) <= 24


def test_a_grid_over_batch_and_budget_keeps_its_points(small, tmp_path):
    """Different values stay different and in order."""
    path = sweep_file(tmp_path, {"grid": {"training.batch": [64, 128], "training.budget.images": [640, 1280]}})
    data = rehearse(read(path), small).data
    assert data["grid"]["training.batch"] == [24, 48]
    budgets = data["grid"]["training.budget.images"]
    assert budgets[1] == 2 * budgets[0]


def test_other_backends_have_no_rehearsal(small, tmp_path):
    """A backend without a small model is refused, not replaced by another kind of model."""
    path = sweep_file(tmp_path, {"base": {"backend": {"name": "mine"}}})
    with pytest.raises(UserError, match="only the backends flux, sd3"):
        rehearse(read(path), small)


@pytest.mark.slow
def test_a_rehearsal_from_nothing_to_its_report(tmp_path, capsys):
    """The trained row of the quickstart scores differently from its base model, and all files are stamped."""
    words = ("quickstart", "--rehearse", "--seeds", "0")
    only = ("--only", "method=base", "method=leapalign")
    store = tmp_path / "store"
    assert alignbench("sweep", *words, "--launcher", "debug", *only, store=store, plugin=False) == 0
    scores = tables(store)[0]
    seen = scores[scores["metric"] == "hpsv2.1"].pivot(index=["prompt_id", "index"], columns="label", values="score")
    assert ((seen["LeapAlign"] - seen["Base"]).abs() > 1e-4).all()
    capsys.readouterr()
    out = tmp_path / "out"
    assert alignbench("report", *words, "--out", str(out), store=store, plugin=False) == 0
    page = capsys.readouterr().out
    assert "# REHEARSAL: " in page
    assert "no number in it means anything" in page
    assert all("REHEARSAL" in file.name for file in [*out.iterdir(), *(store / "sweeps").iterdir()])
    assert {file.suffix for file in out.iterdir()} == {".md", ".csv", ".tex", ".html", ".svg", ".png", ".parquet"}


OTHERS = {
    "sd3": {"model": "stabilityai/stable-diffusion-3.5-medium", "spacing": "linear"},
    "flux2": {"model": "black-forest-labs/FLUX.2-klein-base-9B", "revision": "main"},
}


def other_family_sweep(family: str, folder: Path) -> str:
    """Write the tiny sweep for a hub model of SD3 or FLUX.2 at 512 px; return its path."""
    backend = {"name": family, **OTHERS[family], "size": 512, "guidance": 4.0, "dtype": "bfloat16"}
    reward = {"evaluator": {"name": "hpsv2"}, "margin": 0.55}
    methods = [{"name": "base"}, {"name": "leapalign", "steps": 3}, {"name": "checkpoint", "weights": "some/body"}]
    cases = [{"label": method["name"], "method": method} for method in methods]
    protocol = {"size": 512, "guidance": 4.0}
    data = {"base": {"backend": backend, "reward": reward}, "grid": {"training.seed": [0]}, "cases": cases}
    path = sweep_file(folder, {**data, "evaluation": {"protocol": protocol, "evaluators": [{"name": "hpsv2"}]}})
    text = Path(path).read_text().replace("      max_sequence_length: 16\n", "")
    return str(Path(path).write_text(text) and path)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_have_their_own_small_models(family, small, tmp_path):
    """The small model has the same family and is made once in the store; guidance and spacing stay."""
    rehearsed = resolve(rehearse(read(other_family_sweep(family, tmp_path)), small), Registry())
    backend = rehearsed.cells[1].spec.backend
    assert rehearsed.cells[2].spec.method["weights"] == backend["model"]
    assert Path(backend["model"]).parent == (small / "rehearsal").resolve()
    assert (backend["name"], backend["size"], backend["guidance"], backend["dtype"]) == (family, 32, 4.0, "float32")
    assert backend.get("spacing") == OTHERS[family].get("spacing")
    assert backend["revision"] is None
    before = {path: path.stat().st_mtime_ns for path in Path(backend["model"]).rglob("*")}
    rehearse(read(other_family_sweep(family, tmp_path)), small)
    assert before == {path: path.stat().st_mtime_ns for path in Path(backend["model"]).rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_from_nothing_to_scores(family, tmp_path):
    """A whole rehearsal trains, generates and scores; guidance costs two network evaluations where FLUX.1 needs one."""
    path, store = other_family_sweep(family, tmp_path), tmp_path / "store"
    assert alignbench("sweep", path, "--rehearse", "--launcher", "debug", store=store, plugin=False) == 0
    scores, costs = tables(store)
    row = costs[costs["label"] == "leapalign"].iloc[0]
    assert (row["nfe_forward"], row["nfe_grad"]) == (2 * row["images"], 4 * row["images"])
    seen = scores[scores["metric"] == "hpsv2.1"].pivot(index=["prompt_id", "index"], columns="label", values="score")
    assert ((seen["leapalign"] - seen["base"]).abs() > 1e-5).all()


@pytest.mark.slow
def test_an_ablation_sweep_is_rehearsed_to_its_report(tmp_path, capsys):
    """For figure 4b, more leaps take more forwards with gradient, and the report asks the figure's question."""
    store = tmp_path / "store"
    assert alignbench("sweep", "fig4b", "--rehearse", "--launcher", "debug", store=store, plugin=False) == 0
    costs = tables(store)[1].set_index("label")
    per_image = costs["nfe_grad"] / costs["images"]
    assert per_image[["LeapAlign, 1 leap", "LeapAlign", "LeapAlign, 3 leaps"]].tolist() == [1, 2, 3]
    capsys.readouterr()
    words = ("report", "fig4b", "--rehearse", "--out", str(tmp_path / "out"))
    assert alignbench(*words, store=store, plugin=False) == 0
    page = capsys.readouterr().out
    assert "# REHEARSAL: LeapAlign's figure 4b" in page
    assert "## LeapAlign against LeapAlign, 1 leap and LeapAlign, 3 leaps: the weights that were scored" in page

"""What a sweep has from the sweep that it extends, what it replaces there, and what reaches which run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_sweep import PLUGIN, SWEEP, alignbench, sweep_file

from alignbench.config import UserError
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.document import Document, read
from alignbench.experiment.plan import draft
from alignbench.plugins import Registry
from alignbench.reporting.disclosures import overrides_section
from alignbench.store.manifest import Manifest, ManifestNote, ManifestRun

REGISTRY = Registry([PLUGIN])
LR = {"set": {"training.optimizer.lr": 2e-4, "training.optimizer.warmup": 5}, "reason": "a small model"}
EMA = {"set": {"training.optimizer.ema": 0.9}, "reason": "few batches"}
STEPS = {"match": {"method": "last"}, "set": {"method.steps": 3}, "reason": "three are enough"}


def child(folder: Path, parent: dict[str, Any] | None = None, *words: str, **own: Any) -> Document:
    """Return a sweep that extends the tiny one, which has two overrides unless ``parent`` says otherwise."""
    sweep_file(folder, {"overrides": [LR, EMA], **(parent or {})})
    path = folder / "child.yaml"
    path.write_text(yaml.safe_dump({"extends": "tiny.yaml", "name": "child", **own}))
    return read(str(path), words)


def trained(document: Document) -> list[PlannedRun]:
    return [cell for cell in draft(document, REGISTRY).cells if cell.trains]


def test_overrides_are_replaced_or_appended_to(tmp_path):
    """``overrides`` drops those of the parent, which is said with their paths; ``overrides+`` keeps them."""
    alone, both = child(tmp_path, overrides=[STEPS]), child(tmp_path, **{"overrides+": [STEPS]})
    assert [cell.spec.training.optimizer.warmup for cell in trained(alone)] == [0, 0]
    assert [cell.spec.training.optimizer.warmup for cell in trained(both)] == [5, 5]
    assert {cell.spec.method["steps"] for cell in trained(both)} == {3}
    (line,) = alone.inherited.replaced
    lost = "2 (training.optimizer.lr, training.optimizer.warmup; training.optimizer.ema)"
    assert line == f"overrides: 1 (method.steps) in place of {lost} of tiny.yaml"
    assert both.inherited.replaced == ()


def test_validate_says_what_is_replaced(tmp_path, capsys):
    """It prints a line for each list after its verdict, and nothing for a sweep that extends none."""
    document = child(tmp_path, overrides=[STEPS])
    assert alignbench("validate", document.path, store=tmp_path / "store") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"  replaces {document.inherited.replaced[0]}"]
    assert alignbench("validate", str(tmp_path / "tiny.yaml"), store=tmp_path / "store") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_every_list_that_is_replaced_is_said(tmp_path):
    """Cases, evaluators, axes and lists of values, at any depth; equal and longer lists replace nothing."""
    base = {"training": {"milestones": [2]}}
    document = child(
        tmp_path,
        {"base": {"training": {"milestones": [1]}}},
        base=base,
        grid={"training.seed": [0, 1, 2]},
        cases=SWEEP["cases"][1:],
        evaluation={"evaluators": [{"name": "bright"}]},
        overrides=[],
    )
    assert document.inherited.replaced == (
        "base.training.milestones: [2] in place of [1] of tiny.yaml",
        "cases: 1 (Last) in place of 2 (Base; Last) of tiny.yaml",
        "evaluation.evaluators: 1 (bright) in place of 2 (bright; geneval) of tiny.yaml",
        "overrides: none in place of 2 (training.optimizer.lr, training.optimizer.warmup; training.optimizer.ema) "
        "of tiny.yaml",
    )
    assert child(tmp_path, grid={"training.seed": [0, 1, 2]}).inherited.replaced == ()


@pytest.mark.parametrize("budget", [{"nfe": 8000}, {"gpu_seconds": 5.0}, {"updates": 3, "images": None}])
def test_a_budget_of_another_kind_replaces_the_inherited_one(tmp_path, budget):
    """A run has exactly one; it is said that it was replaced. The same kind is an ordinary change."""
    document = child(tmp_path, base={"training": {"budget": budget}})
    (kind, value) = next(iter(budget.items()))
    assert {getattr(cell.spec.training.budget, kind) for cell in trained(document)} == {value}
    assert len(document.inherited.replaced) == 1
    assert document.inherited.replaced[0] == f"base.training.budget: {kind} {value} in place of images 8 of tiny.yaml"
    assert child(tmp_path, base={"training": {"budget": {"images": 9}}}).inherited.replaced == ()


@pytest.mark.parametrize("place", ["training.budget.nfe", "base.training.budget.nfe"])
def test_a_budget_is_replaced_wherever_it_is_set(tmp_path, place):
    """On the command line, by an override and on the grid, too."""
    assert trained(child(tmp_path, None, f"{place}=8000"))[0].spec.training.budget.nfe == 8000
    override = {"match": {"method": "last"}, "set": {"training.budget.nfe": 8000}, "reason": "equal work"}
    assert trained(child(tmp_path, overrides=[override]))[0].spec.training.budget.nfe == 8000
    grid = {"grid": {"training.budget.nfe": [8000, 9000]}}
    assert [cell.spec.training.budget.nfe for cell in trained(child(tmp_path, **grid))] == [8000, 9000] * 2


def test_a_reason_is_kept_where_its_values_hold(tmp_path):
    """Values that a later override, the grid or the command line replaces are not noted, and their reason is not."""
    later = {"set": {"training.optimizer.lr": 1e-4}, "reason": "it overshoots"}
    notes = trained(child(tmp_path, **{"overrides+": [later]}))[0].notes
    assert [(note["set"], note["reason"]) for note in notes] == [
        ({"training.optimizer.warmup": 5}, "a small model"),
        (EMA["set"], "few batches"),
        (later["set"], "it overshoots"),
    ]
    (run, _) = trained(child(tmp_path, None, "training.optimizer.ema=0.5"))
    assert [note["reason"] for note in run.notes] == ["a small model"]
    cells = trained(child(tmp_path, grid={"training.optimizer.lr": [1e-3, 1e-4], "training.seed": [0]}))
    assert [cell.spec.training.optimizer.lr for cell in cells] == [1e-3, 1e-4]
    assert [cell.spec.label for cell in cells] == ["Last, lr=0.001", "Last, lr=0.0001"]
    assert [cell.notes[0]["set"] for cell in cells] == [{"training.optimizer.warmup": 5}] * 2


def test_an_inherited_reason_says_under_which_settings_it_was_written(tmp_path):
    """A parent's reason is printed with those of its settings that the sweep changes; without changes, as it is."""
    assert "origin" not in trained(child(tmp_path, grid={"training.seed": [3]}))[0].notes[0]
    changed = {"training": {"batch": 4, "budget": {"images": 16}}}
    note = trained(child(tmp_path, base=changed))[0].notes[0]
    assert note["origin"] == "written in tiny.yaml, where base.training.budget.images is 8, base.training.batch is 2"
    run = ManifestRun(id="a", label="A", method="last", seed=0, notes=[ManifestNote(**note)], images="i", scores=[])
    manifest = Manifest(name="child", runs=[run], replaced=["cases: 1 (A) in place of 2 (A; B) of tiny.yaml"])
    text = "\n".join(overrides_section(manifest))
    assert "warmup = 5. a small model (written in tiny.yaml, where base.training.budget.images is 8," in text
    assert "- cases: 1 (A) in place of 2 (A; B) of tiny.yaml" in text


def test_a_model_or_reward_in_place_of_another_is_said(tmp_path):
    """With the settings that it has from the other's; a list in place of settings, and settings in place of a list."""
    reward = {"evaluator": {"name": "bright"}, "margin": 0.5}
    parent = {"base": {"reward": reward}}

    def said(**base):
        return child(tmp_path, parent, base=base).inherited.replaced

    (line,) = said(reward={"evaluator": {"name": "imagereward"}})
    assert line == "base.reward.evaluator.name: imagereward in place of bright, with the same margin of tiny.yaml"
    (line,) = said(backend={"name": "sd3", "model": "x", "size": 64, "max_sequence_length": 8})
    assert line == "base.backend.name: sd3 in place of flux, with the same dtype of tiny.yaml"
    (line,) = said(reward=[{"evaluator": {"name": "bright"}}])
    assert line == "base.reward: 1 (evaluator) in place of evaluator bright, margin 0.5 of tiny.yaml"
    parent = {"base": {"reward": [reward]}}
    (line,) = said(reward={"evaluator": {"name": "bright"}})
    assert line == "base.reward: evaluator bright in place of 1 (evaluator, margin) of tiny.yaml"


def test_a_base_that_an_inherited_override_replaces_is_refused(tmp_path):
    """What the sweep's own base sets anew would reach no run; an override of its own, or on top, does."""
    base = {"training": {"optimizer": {"lr": 1e-2}}}
    with pytest.raises(UserError, match=r"child.yaml: base.training.optimizer.lr: reaches no run, since an"):
        trained(child(tmp_path, base=base))
    own = {"set": {"training.optimizer.lr": 1e-2}, "reason": "tried"}
    assert trained(child(tmp_path, base=base, **{"overrides+": [own]}))[0].spec.training.optimizer.lr == 1e-2


LOST = {  # an override that reaches no run: (the override, what the error says)
    "another seed": ({"match": {"seed": 7}, "set": {"training.batch": 4}}, "reaches no run: no run matches"),
    "another seed, by its path": ({"match": {"training.seed": 7}, "set": {"training.batch": 4}}, "reaches no run"),
    "the untrained row's seed": (
        {"match": {"method": "base", "seed": 0}, "set": {"evaluation.protocol.steps": 3}},
        "reaches no run",
    ),
    "training of a row that trains nothing": (
        {"match": {"method": "base"}, "set": {"training.batch": 4}},
        "reaches no run",
    ),
    "another value of a method's setting": (
        {"match": {"method.steps": 9}, "set": {"training.batch": 4}},
        "reaches no run",
    ),
    "another method's setting": ({"match": {"method.tau": 0.1}, "set": {"training.batch": 4}}, "reaches no run"),
    "a method without a row": ({"match": {"method": "refl"}, "set": {"training.batch": 4}}, "reaches no run"),
    "a list of seeds": ({"match": {"seed": [0, 1]}, "set": {"training.batch": 4}}, "reaches no run"),
    "an empty set": ({"match": {"method": "last"}, "set": {}}, r"overrides\[0\].set: sets nothing"),
    "an axis of the grid": ({"set": {"training.seed": 5}}, "the grid or a later override sets the same"),
    "no path": ({"set": {"": 1}}, r"overrides\[0\].set: '' is not a setting's path"),
    "half a path": ({"set": {"training..batch": 1}}, "'training..batch' is not a setting's path"),
}


@pytest.mark.parametrize("what", LOST)
def test_an_override_that_reaches_no_run_is_an_error(tmp_path, what):
    """It is a typo, or says what does not hold: refused with its index."""
    override, line = LOST[what]
    sweep_file(tmp_path, {"overrides": [override | {"reason": "to see"}]})
    with pytest.raises(UserError, match=rf"tiny.yaml: overrides\[0\].*{line}|{line}"):
        trained(read(str(tmp_path / "tiny.yaml")))


def test_the_command_line_may_take_an_overrides_runs_away(tmp_path):
    """The file is right: other seeds, or the same setting on the command line, leave its override without a run."""
    override = {"match": {"seed": 1}, "set": {"training.batch": 4}, "reason": "to see"}
    path = sweep_file(tmp_path, {"overrides": [override]})
    assert [cell.notes for cell in trained(read(path, seeds="0"))] == [[]]
    assert [cell.notes for cell in trained(read(path, ["training.batch=8"]))] == [[], []]
    inherits = child(tmp_path, {"overrides": [override]}, grid={"training.seed": [0]})
    assert [cell.notes for cell in trained(inherits)] == [[]]


def test_axes_of_the_grid_do_not_set_the_same(tmp_path):
    """A row's label would name a value that it does not have."""
    for axes in (["training.budget.nfe", "training.budget.updates"], ["training.optimizer.lr", "training.optimizer"]):
        values = [{"ema": 0.5} if axis.endswith("optimizer") else 5 for axis in axes]
        grid = {axis: [value] for axis, value in zip(axes, values)}
        with pytest.raises(UserError, match=r"tiny.yaml: grid: training.\S+: another axis sets the same"):
            trained(read(sweep_file(tmp_path, {"grid": {"training.seed": [0], **grid}})))

"""Sweeps become cells, and ids follow from content: from everything that determines a result, and nothing else."""

from __future__ import annotations

import functools
import re
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from support.tiny_sweep import PLUGIN, SWEEP, sweep_file

from alignbench import plugins
from alignbench.config import UserError, decode, settings
from alignbench.digests import content_id, fingerprint
from alignbench.experiment.cells import select
from alignbench.experiment.document import read, sweeps
from alignbench.experiment.ids import evaluator_content, run_id, score_content
from alignbench.experiment.plan import Plan, completed, draft, missing, resolve, warnings_of
from alignbench.experiment.spec import Budget, Training
from alignbench.plugins import Registry

LAST = {"label": "Last", "method": {"name": "last"}}


@functools.cache
def registry(plugin: str) -> Registry:
    return Registry([plugin])


def plan(folder: Path, *assignments: str, plugin: str = PLUGIN, changes: dict[str, Any] | None = None, **more) -> Plan:
    return resolve(read(sweep_file(folder, changes), assignments, **more), registry(plugin))


def ids(plan: Plan) -> list[str]:
    return [cell.id for cell in plan.cells]


def images(plan: Plan) -> list[str]:
    return [cell.images for cell in plan.cells]


def scores(plan: Plan) -> list[str]:
    return [score.file for score in plan.scores]


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return plan(tmp_path)


# -- cells ------------------------------------------------------------------------------------------------------------


def test_cases_times_grid_and_untrained_once(tiny):
    """Every case runs at every point of the grid, in order; a method that trains nothing runs once."""
    assert [(cell.spec.label, cell.seed) for cell in tiny.cells] == [("Base", -1), ("Last", 0), ("Last", 1)]


def test_an_axis_other_than_the_seed_makes_rows(tmp_path):
    """A grid over a setting gives each value its own row, so that nothing is averaged over it."""
    changes = {"grid": {"training.seed": [0], "training.optimizer.lr": [1.0e-3, 1.0e-4]}}
    labels = [cell.spec.label for cell in plan(tmp_path, changes=changes).cells]
    assert labels == ["Base", "Last, lr=0.001", "Last, lr=0.0001"]


def test_one_reward_or_several(tmp_path):
    """A reward may be a list, each with margin and weight; roles, paths and ids follow; a single one has no weight."""
    rewards = [{"evaluator": {"name": "bright"}, "weight": 3}, {"evaluator": {"name": "bright", "power": 2.0}}]
    several = plan(tmp_path, changes={"base": {"reward": rewards}})
    assert [part["weight"] for part in several.cells[1].spec.rewards] == [3.0, 1.0]
    assert several.scores[0].role == "train"
    assert ids(several)[1:] != ids(plan(tmp_path))[1:]
    squared = plan(tmp_path, changes={"base": {"reward": {"evaluator": {"name": "bright", "power": 2.0}}}})
    assert squared.scores[0].role == "train", "the same evaluator on another scale is not held out"
    heavier = plan(tmp_path, "reward[1].weight=2", changes={"base": {"reward": rewards}})
    assert heavier.cells[1].spec.rewards[1]["weight"] == 2
    assert ids(heavier)[0] == ids(several)[0]
    assert ids(heavier)[1:] != ids(several)[1:]
    assert ids(plan(tmp_path, "reward.weight=7")) == ids(plan(tmp_path))
    with pytest.raises(UserError, match=r"reward\[1\]\.evaluator.*no evaluator 'brigt'"):
        plan(tmp_path, changes={"base": {"reward": [rewards[0], {"evaluator": {"name": "brigt"}}]}})
    for assignment in ([], ["reward=[]"]):
        with pytest.raises(UserError, match="reward"):
            plan(tmp_path, *assignment, changes={} if assignment else {"base": {"reward": []}})


def test_evaluation_has_each_prompt_of_a_list_once(tmp_path):
    """A list that repeats prompts is the same protocol as without; how many it repeats is a warning, by use."""
    (tmp_path / "once.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "twice.txt").write_text("a red circle\na blue square\n a red circle\n")
    changes = {"evaluation": {"evaluators": [{"name": "bright"}], "limit": None}}
    once, twice = (
        plan(
            tmp_path,
            f"evaluation.protocol.prompts={tmp_path}/{name}.txt",
            f"prompts={tmp_path}/twice.txt",
            changes=changes,
        )
        for name in ("once", "twice")
    )
    assert images(once) == images(twice)
    assert [prompt.text for prompt in twice.prompts] == ["a red circle", "a blue square"]
    (training,) = warnings_of(once)
    assert re.search(r": prompts: 1 of 3 prompts of \S+twice.txt repeat an earlier one; training draws them", training)
    (evaluation,) = {*warnings_of(twice)} - {training}
    assert re.search(
        r": evaluation.protocol.prompts: 1 of 3 prompts of \S+ repeat .*; evaluation uses each", evaluation
    )


def test_prompts_that_the_model_cuts_are_counted(tmp_path):
    """A prompt beyond a text encoder's limit runs, and a warning counts it, names the encoder and shows the first."""
    long = "a photo of " + " and ".join(20 * ["a red circle"])
    (tmp_path / "long.txt").write_text(f"a red circle\n{long}\n")
    changes = {"evaluation": {"evaluators": [{"name": "bright"}]}}
    found = warnings_of(plan(tmp_path, f"evaluation.protocol.prompts={tmp_path}/long.txt", changes=changes))
    for encoder in ("tokenizer", "tokenizer_2"):
        what = (
            rf"backend: 1 of 2 prompts of \S+long.txt are longer than the \d+ tokens of {encoder}; .* 'a photo of a red"
        )
        assert [line for line in found if re.search(what, line)]
    assert not warnings_of(plan(tmp_path))


def test_an_evaluator_without_a_reward_cannot_be_trained_on(tmp_path):
    """It is refused before anything is loaded, for policy gradients too."""
    with pytest.raises(UserError, match=r"reward\.evaluator: broken gives scores but no reward; choose"):
        plan(tmp_path, changes={"base": {"reward": {"evaluator": {"name": "broken"}}}})


def test_overrides_match_in_order_and_are_kept_with_their_reason(tmp_path):
    """An override changes the runs it matches and no others; the cells keep it with its reason."""
    override = {"match": {"method": "last", "training.seed": 1}, "set": {"training.batch": 4}, "reason": "to see"}
    cells = plan(tmp_path, changes={"overrides": [override]}).cells
    assert [cell.spec.training.batch for cell in cells] == [2, 2, 4]
    assert [cell.notes for cell in cells] == [[], [], [{"set": {"training.batch": 4}, "reason": "to see"}]]


def test_the_command_line_overrides_the_file(tmp_path):
    """``a.b=c`` applies after overrides and replaces a grid's axis; a method's setting goes to methods that have it."""
    override = {"match": {}, "set": {"training.batch": 4}, "reason": "to see"}
    changes = {"overrides": [override]}
    cells = plan(tmp_path, "training.batch=1", "seed=7", "method.steps=3", changes=changes).cells
    assert [(cell.spec.training.batch, cell.seed) for cell in cells] == [(1, -1), (1, 7)]
    assert {cell.spec.method["steps"] for cell in cells} == {3}
    cells = plan(tmp_path, "grid.training.seed=[4]", "evaluation.protocol.steps=3", "cases[1].label=Mine").cells
    assert [cell.title for cell in cells] == ["Base", "Mine, seed 4"]
    assert [cell.seed for cell in plan(tmp_path, seeds="3,5").cells] == [-1, 3, 5]


def test_only_selects(tiny):
    """Values of one key are alternatives, keys are combined, ``!`` excludes, and matching nothing is an error."""

    def titles(*patterns):
        return [cell.title for cell in select(tiny.cells, patterns)]

    assert titles() == titles("method=base", "method=last") == ["Base", "Last, seed 0", "Last, seed 1"]
    assert titles("method=last", "!seed=1") == titles("label=Last", "training.seed=0") == ["Last, seed 0"]
    assert titles("!method=last") == ["Base"]
    with pytest.raises(UserError, match=r"matches no run \(rows: Base, Last\)"):
        titles("method=refl")
    with pytest.raises(UserError, match="a run has no 'sed'"):
        titles("sed=1")


def test_roles(tmp_path):
    """The training reward is "train", a rule without weights "check", every other evaluator "held-out"."""
    evaluators = [{"name": "bright"}, {"name": "bright", "power": 2.0}, {"name": "geneval", "detector": "shapes"}]
    with pytest.raises(UserError, match="two evaluators make a column 'brightness'"):
        plan(tmp_path, changes={"evaluation": {"evaluators": evaluators}})
    evaluators = [{"name": "bright"}, {"name": "hpsv2", "weights": "shapes"}, {"name": "geneval", "detector": "shapes"}]
    found = plan(tmp_path, changes={"evaluation": {"evaluators": evaluators}}).scores
    assert [score.role for score in found] == ["train", "held-out", "check"]


@pytest.mark.slow
def test_the_packaged_sweeps_are_valid_and_share(tmp_path):
    """quickstart has six rows at two seeds or more with equal budgets; shapes has the same rows at five seeds."""
    quickstart, shapes = (resolve(read(name), registry(PLUGIN)) for name in ("quickstart", "shapes"))
    names = [cell.spec.method["name"] for cell in quickstart.cells]
    assert list(dict.fromkeys(names)) == ["base", "refl", "draft_lv", "drtune", "leapalign", "dancegrpo"]
    assert names.count("leapalign") >= 2
    assert len({content_id(cell.spec.training.budget) for cell in quickstart.cells if cell.trains}) == 1
    assert {cell.spec.label for cell in shapes.cells} == {cell.spec.label for cell in quickstart.cells}
    assert sum(cell.spec.method["name"] == "leapalign" for cell in shapes.cells) == 5
    assert {"quickstart", "shapes"} <= sweeps().keys()
    assert quickstart.document.name == "quickstart"


def test_an_installed_package_can_bring_methods(monkeypatch):
    """An entry point of ``alignbench.plugins`` names a module; its classes are listed and count as plug-ins."""
    point = EntryPoint("mine", "support.bright_plugin", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    found = Registry()
    assert "last" in found.names("method")
    assert found.get("method", "last", "x")(steps=3).steps == 3
    assert found.source("method", "last")
    assert found.source("method", "refl") is None


# -- each part is built once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(sweeps()))
def test_a_sweep_builds_each_part_once_or_twice(name, monkeypatch):
    """Each is built at most as written and as completed: no more than two builds per distinct part, however many
    cases, seeds, checks and ids there are."""
    built, make = [], Registry.make
    monkeypatch.setattr(Registry, "make", lambda self, *given: built.append(given) or make(self, *given))
    drafted = draft(read(name), registry(PLUGIN))
    if name in RESOLVED:
        completed(drafted)
    missing(drafted)
    parts = [part for cell in drafted.cells for part in (cell.backend, cell.method)]
    parts += [term.evaluator for cell in drafted.cells for term in cell.rewards] + drafted.evaluators
    assert len(built) <= 2 * len({content_id(settings(part)) for part in parts})


def test_two_rows_that_are_one_run_are_remarked(tmp_path, tiny):
    """The plan has both rows, and says that they are one run; of rows that differ it says nothing."""
    twice = plan(tmp_path, changes={"cases": [{"label": name, "method": {"name": "last"}} for name in ("A", "B")]})
    assert len(set(ids(twice))) < len(twice.cells)
    assert twice.remarks == ["'A' and 'B' are the same run: no setting that changes its images differs"]
    assert tiny.remarks == []


def test_equal_settings_are_one_object(tmp_path):
    """Cells share a part if its settings are equal, and have separate ones otherwise."""
    changes = {"grid": {"training.seed": [0, 1], "method.steps": [2, 3]}}
    _, *trained = plan(tmp_path, changes=changes).cells
    assert len({id(cell.backend) for cell in trained}) == len({id(cell.rewards[0].evaluator) for cell in trained}) == 1
    assert len({id(cell.method) for cell in trained}) == 2
    assert all(settings(cell.method) == cell.spec.method for cell in trained)


def test_mistakes_are_reported_with_their_place(tmp_path):
    """Errors name the grid, override, command line or case, although parts are built only once."""
    wrong = {
        "grid: method.stepz": {"grid": {"training.seed": [0], "method.stepz": [2, 3]}},
        "overrides[1].set: method.stepz": {
            "overrides": [
                {"match": {}, "set": {"method.steps": 3}, "reason": "fine"},
                {"match": {"method": "last"}, "set": {"method.steps": 2, "method.stepz": 3}, "reason": "not"},
            ]
        },
        "cases[1].method.stepz": {"cases": [SWEEP["cases"][0], {"label": "L", "method": {"name": "last", "stepz": 1}}]},
        "evaluation.evaluators[1].powr": {
            "evaluation": {"evaluators": [{"name": "bright"}, {"name": "bright", "powr": 2}]}
        },
    }
    for place, changes in wrong.items():
        with pytest.raises(UserError) as error:
            plan(tmp_path, changes=changes)
        assert f"tiny.yaml: {place}: " in str(error.value)
    with pytest.raises(UserError, match=r"^command line: training.batch: expected a whole number"):
        plan(tmp_path, "training.batch=many")


def test_a_sweep_names_its_primary_measure(tmp_path, tiny):
    """A metric of its evaluators goes into the manifest; any other is refused with the nearest, before files are read.

    A metric of which neither direction is better cannot decide.
    """
    assert tiny.manifest().primary == ""
    assert plan(tmp_path, "primary=geneval_strict").manifest().primary == "geneval_strict"
    with pytest.raises(UserError, match=r"^.*tiny.yaml: primary: .* metric 'genevl'; did you mean 'geneval'\? \("):
        plan(tmp_path, "primary=genevl")
    neutral = {"evaluation": {"evaluators": [{"name": "clipscore"}, {"name": "picture_stats"}]}}
    with pytest.raises(UserError, match=r"primary: neither direction of 'saturation' is better, .*; choose from clips"):
        plan(tmp_path, "primary=saturation", changes=neutral)


# -- ids --------------------------------------------------------------------------------------------------------------


RESOLVED = ("quickstart", "shapes", "shapes_curves", "shapes_methods")  # sweeps that need only packaged files
BEFORE = {  # digests of settings and ids, cell by cell, as of revision acc4a42
    "adjoint_matching_lambda": "8fc42c71f7",
    "fig4a": "f863b78204",
    "fig4b": "23c953e08b",
    "fig4c": "95d0bdd717",
    "fig4d": "5e4ceb2cb5",
    "fig4e": "a875fa220d",
    "fig4f": "5172fe1340",
    "fig5": "4e4c5bcb70",
    "fig6": "8f2c1ded67",
    "flowbp_flux1": "88b1dc1cc8",
    "flowbp_flux2": "ebafeb3101",
    "flowbp_geneval": "92d7fe74eb",
    "flowbp_sd35": "19e9897725",
    "quickstart": "c73011cd9b",
    "shapes": "5b8d513244",
    "shapes_curves": "c995a0ec5f",
    "shapes_methods": "cc2d877f62",  # FlowBP-Lagrange no longer has the note on the learning rate that it replaces
    "table2": "d358852f23",  # its published rows have the settings file, alpha and scale, which are not in their ids
    "table2_geneval": "d3ef14e958",
    "table3_hpsv3": "dd54c72ff8",
    "table3_pickscore": "90f3566265",
    "table4": "50c506b751",
    "table5": "4f50c2844c",
    "vggflow_aesthetic": "0210923035",
    "vggflow_hpsv2": "5f0a1d678d",
    "vggflow_pickscore": "98f2126fba",
}


@pytest.mark.parametrize("name", sorted(sweeps()))
def test_every_id_is_what_it_was(name, monkeypatch):
    """Settings, seeds and ids of every packaged sweep are unchanged; run ids are computed as if no part had files."""
    found = registry(PLUGIN)
    ids = None
    if name in RESOLVED:
        resolved = resolve(read(name), found)
        cells = [[cell.id, cell.images, cell.base, cell.milestones, cell.published] for cell in resolved.cells]
        ids = [cells, scores(resolved)]
    cells = draft(read(name), found).cells
    for cell in cells:
        for part in (cell.backend, cell.method, *(term.evaluator for term in cell.rewards)):
            monkeypatch.setattr(type(part), "files", lambda self: [])
    rows = [
        [
            settings(cell.spec),
            cell.seed,
            settings(cell.protocol),
            [note["set"] for note in cell.notes],
            run_id(cell.spec, cell.parts, found, []),
        ]
        for cell in cells
    ]
    assert content_id([rows, ids]) == BEFORE[name]


def test_ids_do_not_depend_on_names_and_order(tmp_path, tiny):
    """Labels, the order of cases and how often to save do not affect the weights, hence not the ids."""
    renamed = plan(tmp_path, "cases[1].label=Other", "training.checkpoint_every=3", "training.keep=5", "name=other")
    assert ids(renamed) == ids(tiny)
    assert images(renamed) == images(tiny)
    swapped = plan(tmp_path, changes={"cases": [LAST, SWEEP["cases"][0]]})
    assert sorted(ids(swapped)) == sorted(ids(tiny))


@pytest.mark.parametrize(
    "change",
    [
        "training.batch=4", "training.budget.images=10", "training.optimizer.lr=2e-3", "training.optimizer.ema=0.5",
        "method.steps=3", "reward.margin=0.5", "reward.evaluator.power=2.0", "prompts=shapes/val",
        "backend.guidance=2.0",
    ],
)  # fmt: skip
def test_whatever_changes_the_weights_changes_the_ids_of_run_and_images(tmp_path, tiny, change):
    """A change of method, reward, training or prompts makes new runs; ids of scores depend on evaluators alone."""
    changed = plan(tmp_path, change)
    assert not set(ids(changed)[1:]) & set(ids(tiny))
    assert not set(images(changed)[1:]) & set(images(tiny))
    assert scores(changed) == scores(tiny)


@pytest.mark.parametrize(
    "change", ["protocol.guidance=2.0", "protocol.steps=3", "protocol.seed=1", "protocol.prompts=shapes/val", "limit=3"]
)
def test_the_protocol_changes_image_sets_alone(tmp_path, tiny, change):
    """If only the protocol of evaluation changes, the trained weights are reused and every image set is new."""
    changed = plan(tmp_path, f"evaluation.{change}")
    assert ids(changed) == ids(tiny)
    assert not set(images(changed)) & set(images(tiny))


def test_ema_or_last_matters_to_trained_weights_only(tmp_path, tiny):
    """The base model has one set of weights, and one set of images."""
    changed = plan(tmp_path, "evaluation.protocol.weights=last")
    assert [a == b for a, b in zip(images(changed), images(tiny))] == [True, False, False]


def test_an_evaluators_settings_change_its_scores_alone(tmp_path, tiny):
    """Another setting of one evaluator makes its scores new, and nothing else."""
    changed = plan(tmp_path, "evaluation.evaluators[0].power=2.0")
    assert images(changed) == images(tiny)
    assert [a == b for a, b in zip(scores(changed), scores(tiny))] == [False, True]


def test_the_unit_of_a_reward_is_in_no_scores_id():
    """PickScore's table holds the logit whatever unit is trained on; a run's id has the unit."""
    found = Registry()
    plain = {"name": "pickscore", "weights": "shapes"}
    logit, cosine = (found.make("evaluator", plain | {"reward_unit": unit}, "") for unit in ("logit", "cosine"))
    assert score_content(logit, found) == score_content(cosine, found)
    assert evaluator_content(logit, found, logit.unhashed) != evaluator_content(cosine, found, cosine.unhashed)


def test_a_setting_that_changes_nothing_must_exist(monkeypatch):
    """A misspelt name in a plug-in's ``unhashed`` would leave the setting in the id."""
    found = Registry()
    stats = found.make("evaluator", {"name": "picture_stats"}, "")
    monkeypatch.setattr(type(stats), "unhashed", ("pacth",))
    with pytest.raises(UserError, match=r"^picture_stats: unhashed: there is no setting 'pacth'; did you mean 'patch'"):
        score_content(stats, found)


def test_methods_with_equal_fields_have_different_ids(tmp_path):
    """The name of a method is hashed with its fields."""
    changes = {"cases": [LAST, {"label": "Stopped", "method": {"name": "stopped"}}]}
    assert len(set(ids(plan(tmp_path, changes=changes)))) == 4


@pytest.mark.slow
def test_a_plugins_source_is_part_of_its_runs(tmp_path, tiny):
    """Editing a plug-in makes everything it trained or scored stale, but not the base model's images."""
    edited = tmp_path / "bright.py"
    edited.write_text(Path(PLUGIN).read_text() + "\n# edited\n")
    changed = plan(tmp_path, plugin=str(edited))
    assert [a == b for a, b in zip(ids(changed), ids(tiny))] == [True, False, False]
    assert [a == b for a, b in zip(scores(changed), scores(tiny))] == [False, True]


def test_weights_count_by_content_not_by_name(tmp_path, tiny):
    """A model's folder may move; one changed byte in it makes every run new."""
    backend = decode(Registry().get("backend", "flux", ""), {"model": "shapes", "size": 32}, "")
    copy = tmp_path / "moved"
    shutil.copytree(backend.folder, copy)
    moved = decode(type(backend), {"model": str(copy), "size": 32}, "")
    assert fingerprint(moved.files()) == fingerprint(backend.files())
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(moved.files()) != fingerprint(backend.files())


def test_prompts_count_by_content(tmp_path):
    """The same prompts under another file name give the same ids; one prompt more does not."""
    (tmp_path / "a.txt").write_text("a photo of a circle\na photo of a square\n")
    (tmp_path / "b.txt").write_text("a photo of a circle\r\na photo of a square")
    (tmp_path / "c.txt").write_text("a photo of a circle\na photo of a square\na photo of a cross\n")
    a, b, c = (ids(plan(tmp_path, f"prompts={tmp_path}/{name}.txt")) for name in "abc")
    assert a == b
    assert set(a[1:]).isdisjoint(c)


def test_a_budget_is_exactly_one():
    """Two budgets or none cannot be compared."""
    for data in ({}, {"images": 1, "nfe": 2}):
        with pytest.raises(UserError, match=r"^x: budget: set exactly one of images, nfe, gpu_seconds, updates; got"):
            decode(Training, {"budget": data}, "x")
    assert settings(Budget(images=3)) == {"images": 3, "nfe": None, "gpu_seconds": None, "updates": None}


def test_the_manifest_is_named_by_the_document_alone(tmp_path):
    """`report` finds it from the file and the typed words, without importing a method; SUBSET is part of the name."""
    path = sweep_file(tmp_path)
    assert read(path).manifest == read(path).manifest
    assert read(path).manifest != read(path, ["training.batch=4"]).manifest
    assert read(path).name == "tiny-SUBSET"
    assert read(path, ["evaluation.limit=null"]).name == "tiny"
    assert (
        read(path, ["training.batch=4"], seeds="0", limit=3).command == f"{path} training.batch=4 --seeds 0 --limit 3"
    )

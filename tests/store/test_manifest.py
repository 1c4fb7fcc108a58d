"""Manifests of every version decode into one type and are written in the same format as before."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs
from support.tiny_sweep import PLUGIN, alignbench, sweep_file

from alignbench.config import UserError, settings
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.document import read
from alignbench.experiment.plan import Plan, resolve
from alignbench.plugins import Registry
from alignbench.reporting import report
from alignbench.reporting.analysis.results import Results
from alignbench.store.artefacts import Store
from alignbench.store.files import write_json
from alignbench.store.manifest import (
    UNTRAINED,
    Manifest,
    ManifestRun,
    as_read,
    manifest_data,
    read_manifest,
    write_manifest,
)

MILESTONES = {"base": {"training": {"milestones": [1, 3]}}, "evaluation": {"milestone_prompts": 2}}
EXCEPTION = {"match": {"method": "last"}, "set": {"training.optimizer.lr": 1e-4}, "reason": 'små, "but" enough'}
RUN: dict[str, Any] = {"id": "last-1", "label": "Last", "method": "last", "seed": 0, "images": "i", "scores": []}


def planned(folder: Path, **changes: Any) -> Plan:
    return resolve(read(sweep_file(folder, changes)), Registry([PLUGIN]))


def as_dictionaries(plan: Plan, plugins: list[str]) -> dict[str, Any]:
    """Return the manifest as it was made before it had a type."""

    def scores(cell: PlannedRun, images: str) -> list[dict[str, Any]]:
        return [
            {
                "evaluator": score.name,
                "settings": score.settings,
                "version": score.version,
                "file": f"scores/{images}/{score.file}",
                "metrics": score.metrics,
                "role": score.role,
                **({"base": score.base} if score.base else {}),
            }
            for score in plan.scored(cell)
        ]

    def run(cell: PlannedRun) -> dict[str, Any]:
        milestones = [{"update": n, "images": images, "scores": scores(cell, images)} for n, images in cell.milestones]
        return {
            "id": cell.id,
            "label": cell.spec.label,
            "method": cell.spec.method["name"],
            "seed": cell.seed,
            "published": cell.published,
            "settings": settings(cell.spec),
            "protocol": settings(cell.protocol),
            "notes": cell.notes,
            "images": cell.images,
            "scores": scores(cell, cell.images),
            **({"milestones": milestones} if milestones else {}),
        }

    return {
        "name": plan.document.name,
        "sweep": plan.document.command,
        "world": plan.cells[0].spec.backend.get("model"),
        "training_evaluator": plan.training_evaluator,
        "protocol": settings(plan.evaluation.protocol),
        "subset": plan.evaluation.limit,
        "milestone_prompts": plan.evaluation.milestone_prompts,
        "rehearsal": plan.document.rehearsal,
        "prompts": len(plan.prompts),
        "cases": list(dict.fromkeys(cell.spec.label for cell in plan.cells)),
        "runs": [run(cell) for cell in plan.cells],
        "plugins": plugins,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluation": {"limit": None}, "overrides": [EXCEPTION]},
        MILESTONES,
        {"evaluation": {"evaluators": [{"name": "bright"}, {"name": "base_distance", "weights": "shapes"}]}},
    ],
    ids=["tiny", "overrides", "milestones", "paired"],
)
def test_the_file_is_what_it_was_before_it_had_a_type(tmp_path, changes):
    """The file is the same byte for byte, also when written again after reading: stores of all versions stay valid."""
    plan = planned(tmp_path, **changes)
    write_json(tmp_path / "old.json", as_dictionaries(plan, [PLUGIN]))
    write_manifest(tmp_path / "new.json", plan.manifest([PLUGIN]))
    old = (tmp_path / "old.json").read_bytes()
    assert (tmp_path / "new.json").read_bytes() == old
    found = read_manifest(tmp_path / "old.json")
    assert found == plan.manifest([PLUGIN])
    write_manifest(tmp_path / "new.json", found)
    assert (tmp_path / "new.json").read_bytes() == old


def test_manifests_of_earlier_versions_have_defaults(copy):
    """Keys that came later have defaults: one protocol for all runs, nothing published, no plug-ins. The numbers in
    the report are the same; that the shapes world's checker made them is known no longer."""
    path = Store(copy / "store").manifests()[0]
    today = read_manifest(path)
    old = json.loads(path.read_text())
    for key in ("world", "milestone_prompts", "rehearsal", "plugins"):
        del old[key]
    for run in old["runs"]:
        del run["published"], run["protocol"]
        for score in run["scores"]:
            del score["settings"]
    path.write_text(json.dumps(old))
    found = read_manifest(path)
    assert [run.protocol for run in found.runs] == [run.protocol for run in today.runs]
    assert not any(run.published or run.imported or run.milestones for run in found.runs)
    pages = [
        report.build(Results(copy / "store", manifest), copy / "out", ["md"])[0].read_text().partition("\n")[2]
        for manifest in (today, found)
    ]
    assert "GenEval (shapes)" in pages[0]
    numbers = [re.findall(r"-?\d+\.\d+", "".join(line for line in page.splitlines() if "|" in line)) for page in pages]
    assert numbers[0] == numbers[1]
    assert numbers[0]


def test_unknown_keys_are_ignored(tmp_path):
    """A store written by a later version can be read, too."""
    (tmp_path / "m.json").write_text(json.dumps({"name": "s", "later": 1, "runs": [RUN | {"later": {"a": [1]}}]}))
    assert read_manifest(tmp_path / "m.json") == Manifest(name="s", runs=[ManifestRun(**RUN)])


DAMAGED = {
    "empty": b"",
    "cut off": b'{"name": "s", "runs": [{"id": "la',
    "no object": b"[]",
    "no runs": b'{"name": "s"}',
    "a run without its id": json.dumps({"name": "s", "runs": [{"label": "Last"}]}).encode(),
    "another type": json.dumps({"name": "s", "runs": [RUN | {"seed": "first"}]}).encode(),
    "no text": b'{"name": "\xff\xfe", "runs": []}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest_gives_one_line_with_its_path(tmp_path, content):
    """The error is never a traceback, and the result never a sweep without runs."""
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"s\.json: is damaged, or not a manifest: .*run its sweep again$") as raised:
        read_manifest(path)
    assert "\n" not in str(raised.value)


def test_two_runs_of_one_name_are_refused(tmp_path):
    """Neither's scores silently replace the other's; the error names the run."""
    twice = [RUN, RUN | {"id": "last-2", "images": "j"}, RUN | {"id": "last-3", "seed": 1}]
    (tmp_path / "s.json").write_text(json.dumps({"name": "s", "runs": twice}))
    with pytest.raises(UserError, match=r"s\.json: two runs are called 'Last, seed 0'; give each row its own label"):
        read_manifest(tmp_path / "s.json")


@pytest.mark.parametrize("other", [{"seed": -1, "method": "base"}, {"seed": 1, "method": "refl"}])
def test_a_row_of_two_cases_is_refused(tmp_path, other):
    """Earlier versions averaged an untrained and a trained case of one label, or two methods, into one row."""
    runs = [RUN, RUN | {"id": "another", "images": "j"} | other]
    (tmp_path / "s.json").write_text(json.dumps({"name": "s", "runs": runs}))
    with pytest.raises(UserError, match=r"s\.json: the row 'Last' averages runs of several cases \(last, .*own label"):
        read_manifest(tmp_path / "s.json")


def test_names_that_read_alike():
    """Readers see neither case, extra or special spaces, composition nor invisible characters; they see all else."""
    alike = ["ReFL k=1", " refl  K=1 ", "ReFL\u00a0k=1", "Re\u200bFL k=1", "ReFL k\uff1d1", "ReFL k=\u20601"]
    assert {as_read(name) for name in alike} == {"refl k=1"}
    assert as_read("caf\u00e9") == as_read("cafe\u0301") != as_read("cafe")
    assert as_read("ReFL, k=1") != as_read("ReFL k=1")


def test_a_role_that_does_not_exist_is_unknown(tmp_path):
    """Its scores stay in the report, but count neither as held out nor as the training reward."""
    scores = [
        {"evaluator": "e", "version": "1", "file": "f", "metrics": [], "role": role} for role in ("test", "train")
    ]
    (tmp_path / "s.json").write_text(json.dumps({"name": "s", "runs": [RUN | {"scores": scores}]}))
    assert [score.role for score in read_manifest(tmp_path / "s.json").runs[0].scores] == ["unknown", "train"]


def test_a_damaged_manifest_stops_only_the_verbs_that_need_it(copy, capsys):
    """`status` and `report` of that sweep, and verbs that search all sweeps, print the error; the list of sweeps does
    too, and goes on with the others."""
    store = copy / "store"
    (store / "sweeps" / "broken.json").write_text("{")
    for words in (["status", "broken"], ["report", "broken"], ["compare", "Base", "Last"]):
        assert alignbench(*words, store=store, plugin=False) == 1
        assert "broken.json: is damaged" in capsys.readouterr().err
    assert alignbench("status", store=store, plugin=False) == 0
    said = capsys.readouterr()
    assert "broken.json: is damaged" in said.err
    assert "3 done" in said.out


def test_derived_facts_of_a_run():
    """The manifest answers whether a run was trained, its title and its rewards, once for all readers."""
    one = {"evaluator": {"name": "hpsv2"}, "margin": None, "weight": 1.0}
    run = ManifestRun(**RUN, settings={"reward": one})
    assert (run.trained, run.is_base, run.title, run.training) == (True, False, "Last, seed 0", "seed 0")
    assert run.rewards == [one]
    assert structs.replace(run, settings={"reward": [one, one]}).rewards == [one, one]
    assert structs.replace(run, settings={}).rewards == []
    base = structs.replace(run, seed=UNTRAINED)
    assert (base.trained, base.is_base, base.title, base.training) == (False, True, "Last", "not trained")
    published = structs.replace(base, published=True)
    assert (published.trained, published.is_base, published.training) == (False, False, "training unknown")


@pytest.mark.slow
def test_a_thousand_runs_are_decoded_fast(tmp_path):
    """Decoding into checked objects takes less time than json takes to make dictionaries: milliseconds."""
    manifest = planned(tmp_path).manifest()
    many = [structs.replace(run, id=f"{run.id}{n}") for n in range(334) for run in manifest.runs]
    content = json.dumps(manifest_data(manifest.only(many))).encode()

    def fastest(decode: Any) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            decode(content)
            times.append(time.process_time() - start)
        return min(times)

    assert fastest(lambda content: msgspec.json.decode(content, type=Manifest)) < fastest(json.loads)

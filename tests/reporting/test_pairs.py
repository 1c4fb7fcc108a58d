"""Two rows of a store side by side: the report's own numbers, and the prompts and images behind them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from PIL import Image
from support.report_tables import METRICS, draw_images, manifest, scores, with_files, with_runs
from support.tiny_sweep import alignbench

from alignbench.config import UserError
from alignbench.reporting import compare
from alignbench.reporting.analysis import pairs, stats
from alignbench.reporting.analysis.comparison import analyse
from alignbench.store import artefacts, files
from alignbench.store.manifest import UNTRAINED, ManifestRun, write_manifest

LABELS = ("base", "ReFL", "LeapAlign")
PROMPTS = 18


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with the sweep "made_up" of tests/test_report.py, to be looked at; its manifest and scores."""
    return make(tmp_path_factory.mktemp("made") / "store")


def make(root: Path, name: str = "made_up", seeds=(0, 1), protocol: dict[str, Any] | None = None, change=None):
    """Write the sweep; ``change``: of the frame of scores, before it is written."""
    plan, prefix = manifest(seeds, LABELS, name), "" if name == "made_up" else f"{name}-"
    plan = structs.replace(plan, prompts=PROMPTS)
    plan = with_runs(plan, lambda run: {"id": f"{prefix}{run.id}", "images": f"{prefix}{run.images}"})
    plan = with_runs(plan, lambda run: {"protocol": run.protocol | {"seed": 0} | (protocol or {})})
    plan = with_files(plan, "scores/{images}/{evaluator}@1-abc.parquet")
    frame = scores(plan, PROMPTS)
    frame = frame if change is None else change(frame)
    draw_images(root, plan, PROMPTS)
    for run in plan.runs:
        write_scores(root, run, frame[frame["run"] == run.id])
    write_manifest(root / "sweeps" / f"{name}-0123456789.json", plan)
    return artefacts.Store(root), plan, frame


def write_scores(root: Path, run: ManifestRun, frame: pd.DataFrame) -> None:
    for score in run.scores:
        part = frame[frame["evaluator"] == score.evaluator]
        wide = part.pivot(index=["prompt_id", "tag", "index"], columns="metric", values="score").reset_index()
        files.write_frame(root / score.file, wide.assign(ok=True, error=""))


def found(store: artefacts.Store, a: str, b: str, *only: str) -> dict[str, pairs.Result]:
    results, _ = pairs.compare(store, pairs.find(store, a), pairs.find(store, b), only)
    return {result.measure.name: result for result in results}


def cube(frame: pd.DataFrame, metric: str, label: str) -> np.ndarray:
    """(P, I, S)"""
    mine = frame[(frame["metric"] == metric) & (frame["label"] == label)].sort_values(["prompt_id", "index", "seed"])
    seeds = mine["seed"].nunique()
    return mine["score"].to_numpy().reshape(PROMPTS, -1, seeds)


# ---- numbers


def test_it_is_the_reports_own_change(made):
    """A row against base, and two trained rows: the estimate that the report makes, up to rounding."""
    store, plan, frame = made
    analysis = analyse(plan, frame)
    for label in ("ReFL", "LeapAlign"):
        for name, result in found(store, f"made_up:{label}", "made_up:base").items():
            measure = next(m for m in analysis.measures if m.name == name)
            assert result.change.estimate == pytest.approx(analysis.changes[measure][label].estimate, rel=1e-9)
    for result in found(store, "made_up:LeapAlign", "made_up:ReFL").values():
        (same,) = analysis.compare(result.measure, [("LeapAlign", "ReFL")])
        assert result.change.estimate == pytest.approx(same.estimate, rel=1e-9)


def test_holm_is_over_the_metrics_shown(made):
    """Four p-values are corrected together; one alone is not."""
    results = found(made[0], "LeapAlign", "base")
    adjusted = stats.holm([result.change.estimate.p for result in results.values()])
    assert [result.change.p_holm for result in results.values()] == list(adjusted)
    one = found(made[0], "LeapAlign", "base", "pickscore")["pickscore"]
    assert one.change.p_holm == one.change.estimate.p


def test_turned_round_the_signs_turn(made):
    """compare B A is compare A B with every sign, share and limit turned."""
    there, back = found(made[0], "LeapAlign", "ReFL"), found(made[0], "ReFL", "LeapAlign")
    for name, result in there.items():
        assert back[name].change.estimate.mean == pytest.approx(-result.change.estimate.mean)
        assert back[name].change.estimate.p == pytest.approx(result.change.estimate.p)
        assert back[name].higher == pytest.approx(1 - result.higher)
        assert back[name].means == result.means[::-1]


def test_a_constant_gain_is_exact(tmp_path):
    """B = A - 1/8 in every image: the difference is 1/8 without an interval, p is the sign test's, A is higher
    everywhere; two equal rows are called identical."""

    def change(frame):
        base = frame[frame["label"] == "base"].set_index(["metric", "prompt_id", "index"])["score"]
        key = pd.MultiIndex.from_frame(frame[["metric", "prompt_id", "index"]])
        rounded = np.round(base.loc[key].to_numpy() * 1024) / 1024
        return frame.assign(score=rounded + (frame["label"] == "LeapAlign") / 8)

    store, _, _ = make(tmp_path / "store", seeds=(0,), change=change)
    for result in found(store, "LeapAlign", "base").values():
        estimate = result.change.estimate
        assert (estimate.mean, estimate.se) == pytest.approx((0.125, 0), abs=1e-12)
        assert np.isnan([estimate.lo, estimate.hi]).all()
        assert estimate.p == 0.5 ** (estimate.prompts - 1)
        assert result.higher == 1
    for result in found(store, "ReFL", "base").values():
        assert (result.change.estimate.mean, result.higher, result.change.verdict) == (0, 0.5, "identical")
        a, b = pairs.find(store, "ReFL"), pairs.find(store, "base")
        assert pairs.disagreements(store, a, b, result) == []


def test_two_paths_to_the_difference_agree(tmp_path):
    """The mean of the prompts' own differences is the estimate's, and both leave the same prompts out: one that lacks
    a training's score, and one that lacks base's."""

    def change(frame):
        metric = frame["metric"] == "pickscore"
        gone = metric & (frame["run"] == "LeapAlign-1") & (frame["prompt_id"] == "p0003")
        gone |= metric & (frame["label"] == "base") & (frame["prompt_id"] == "p0005")
        gone |= metric & (frame["run"] == "ReFL-0") & (frame["prompt_id"] == "p0007") & (frame["index"] == 1)
        return frame.assign(score=frame["score"].where(~gone))

    store, _, _ = make(tmp_path / "store", change=change)
    for a, b, dropped in (("LeapAlign", "base", 2), ("LeapAlign", "ReFL", 1), ("ReFL", "base", 1)):
        result = found(store, a, b)["pickscore"]
        means = pairs._by_prompt(result.pairs)
        assert len(means) == result.change.estimate.prompts == PROMPTS - dropped
        assert result.change.estimate.dropped == dropped
        assert means["difference"].mean() == pytest.approx(result.change.estimate.mean)


def test_one_run_stands_for_itself(made):
    """By their ids two runs are compared as they are: the plain paired difference, no training's spread."""
    store, _, frame = made
    result = found(store, "LeapAlign-1", "ReFL-0")["pickscore"]
    values = [cube(frame, "pickscore", label) for label in ("LeapAlign", "ReFL")]
    assert result.change.estimate == stats.paired_difference(values[0][..., 1:], values[1][..., :1])


def test_two_sweeps_of_one_store(tmp_path):
    """Rows of two sweeps: the paired difference of the two arrays, seeds paired by number."""
    root = tmp_path / "store"
    store, _, frame = make(root)
    make(root, "other", change=lambda frame: frame.assign(score=frame["score"] * 1.25))
    result = found(store, "made_up:LeapAlign", "other:LeapAlign")["pickscore"]
    values = cube(frame, "pickscore", "LeapAlign")
    expected = stats.paired_difference(values, values * 1.25)
    assert result.change.estimate.mean == pytest.approx(expected.mean)
    assert result.change.estimate.seeds == 2


@pytest.mark.slow
def test_other_weights_are_not_compared(tmp_path, capsys):
    """An evaluator with another hash of settings and weights makes another quantity: said, and left out."""
    root = tmp_path / "store"
    store, _, _ = make(root)
    _, plan, _ = make(root, "other")
    text = (root / "sweeps/other-0123456789.json").read_text()
    (root / "sweeps/other-0123456789.json").write_text(text.replace("pickscore@1-abc", "pickscore@1-xyz"))
    for file in (score.file for run in plan.runs for score in run.scores if score.evaluator == "pickscore"):
        (root / file).rename(root / file.replace("abc", "xyz"))
    results, remarks = pairs.compare(store, pairs.find(store, "made_up:ReFL"), pairs.find(store, "other:ReFL"))
    assert "pickscore" not in [result.measure.name for result in results]
    assert remarks == ["pickscore: scored with different settings, weights or versions; not compared"]


# ---- prompts and images


def test_the_largest_differences_come_first(made):
    """The prompts of the page are those with the largest differences of their means, with the means of both."""
    store, _, frame = made
    a, b = pairs.find(store, "LeapAlign"), pairs.find(store, "base")
    result = found(store, "LeapAlign", "base")["pickscore"]
    shown = pairs.disagreements(store, a, b, result)
    gaps = cube(frame, "pickscore", "LeapAlign").mean((1, 2)) - cube(frame, "pickscore", "base").mean((1, 2))
    assert [each.a - each.b for each in shown] == pytest.approx(sorted(gaps, key=abs, reverse=True)[: pairs.TOP])


def test_the_images_are_of_that_prompt(made):
    """Each path leads to an image of the prompt, from a run of its side."""
    store, _, _ = made
    a, b = pairs.find(store, "LeapAlign"), pairs.find(store, "base")
    shown = pairs.disagreements(store, a, b, found(store, "LeapAlign", "base")["hpsv2.1"])
    tables = {path.parent: pd.read_parquet(path) for path in store.root.glob("images/*/manifest.parquet")}
    images = [(case, side, case.images[i]) for case in shown for i, side in enumerate((a, b)) if case.images[i]]
    assert images
    for case, side, image in images:
        table = tables[image.parent].set_index("file")
        assert table.loc[image.name, "text"] == case.prompt
        assert image.parent.name in [run.images for run in side.runs]


@pytest.mark.slow
def test_what_is_written(made, tmp_path, capsys):
    """--out has the page as printed, every number in full precision, and the images of both one above the other."""
    out = tmp_path / "out"
    words = ["compare", "made_up:LeapAlign", "base", "--out", str(out)]
    assert alignbench(*words, store=made[0].root, plugin=False) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.md", "compare.png"]
    assert printed.startswith((out / "compare.md").read_text())
    frame = pd.read_csv(out / "compare.csv").set_index("metric")
    for name, result in found(made[0], "LeapAlign", "base").items():
        assert frame.loc[name, "difference"] == pytest.approx(result.change.estimate.mean)
        assert frame.loc[name, "p_holm"] == pytest.approx(result.change.p_holm)
    with Image.open(out / "compare.png") as sheet:
        assert sheet.height > len(METRICS) * 2 * 128


# ---- words


@pytest.mark.slow
def test_protocols_that_differ_are_told_first(tmp_path):
    """Other settings stand before the table; with another size or seed the noise is not the same, and it is said."""
    root = tmp_path / "store"
    store, _, _ = make(root)
    make(root, "other", protocol={"size": 64, "steps": 20})
    sides = pairs.find(store, "made_up:ReFL"), pairs.find(store, "other:ReFL")
    lines = pairs.protocols(*sides)
    assert lines[:2] == ["not the same steps: 8 and 20", "not the same size: 32 and 64"]
    assert lines[-1] == "pairs share the prompt but not the noise"
    text = compare.page(store, *sides, *pairs.compare(store, *sides))
    assert text.index("not the same size") < text.index("## Paired differences")
    same = pairs.protocols(sides[0], pairs.find(store, "made_up:base"))
    assert same[-1] == "pairs share the prompt and the noise"


@pytest.mark.slow
def test_seeds_that_never_meet_are_told(tmp_path):
    """Trainings pair by their seed: without one in common there is no number, and the page says why."""
    root = tmp_path / "store"
    store, _, _ = make(root)
    make(root, "other", seeds=(5, 6))
    sides = pairs.find(store, "made_up:ReFL"), pairs.find(store, "other:ReFL")
    results, remarks = pairs.compare(store, *sides)
    assert all(np.isnan(result.change.estimate.mean) for result in results)
    assert "**The two share no training seed, so nothing can be paired" in compare.page(store, *sides, results, remarks)


def test_one_training_is_told(made):
    """The page of a run that stands for itself says before its first number that other training runs may differ; its
    verdicts are on these weights, in the file too. Two rows with two seeds each speak of their methods."""
    sides = pairs.find(made[0], "ReFL-0"), pairs.find(made[0], "made_up:base")
    results, remarks = pairs.compare(made[0], *sides)
    text = compare.page(made[0], *sides, results, remarks)
    assert "**A: one training run: every interval and verdict speaks of the weights that were scored;" in text
    assert text.index("**A: one training run") < text.index("## Paired differences")
    assert "down (these weights)" in text
    assert all(result.difference.of_weights for result in results)
    rows = pairs.find(made[0], "ReFL"), pairs.find(made[0], "made_up:base")
    whole = compare.page(made[0], *rows, *pairs.compare(made[0], *rows))
    assert "these weights" not in whole
    assert "one training run" not in whole


def test_a_metric_scored_for_one_seed_is_told(tmp_path):
    """Its verdict is on these weights, as in the report, though the two have two seeds on the other metrics."""
    store, _, _ = make(tmp_path / "store")
    for label in LABELS[1:]:
        (tmp_path / f"store/scores/{label}1/pickscore@1-abc.parquet").unlink()
    sides = pairs.find(store, "ReFL"), pairs.find(store, "made_up:base")
    results, remarks = pairs.compare(store, *sides)
    assert {result.measure.name for result in results if result.change.weights} == {"pickscore"}
    text = compare.page(store, *sides, results, remarks)
    assert "**A and B: one training run, on PickScore: every interval and verdict" in text


def test_the_base_model_is_no_training_run(made):
    """Named by its id, the base model is still the base model: it was not trained, and nothing is said of its runs."""
    store, plan, _ = made
    sides = pairs.find(store, "made_up:ReFL"), pairs.find(store, plan.rows["base"][0].id)
    assert not any(result.change.weights for result in pairs.compare(store, *sides)[0])


def test_names(made):
    """A sweep and a label, a beginning of the sweep's name, a label alone, an id, the beginning of an id."""
    store, plan, _ = made
    whole = [run.id for run in plan.rows["LeapAlign"]]
    for word in ("made_up-0123456789:LeapAlign", "made_up:LeapAlign", "made:LeapAlign", "LeapAlign"):
        side = pairs.find(store, word)
        assert ([run.id for run in side.runs], side.whole) == (whole, True)
    for word in ("LeapAlign-1", "ReFL-0"):
        assert [run.id for run in pairs.find(store, word).runs] == [word]
    assert pairs.find(store, "LeapAlign-0").title == "LeapAlign of made_up-0123456789, seed 0"
    assert pairs.find(store, "base").runs[0].seed == UNTRAINED


BAD = {  # what is wrong: (A, B, options, the line)
    "a misspelt label": ("made_up:LeapAling", "base", [], "has no row 'LeapAling'; did you mean 'LeapAlign'"),
    "a misspelt word": ("LeapAlgin", "base", [], "LeapAlgin: there is no such row or run; did you mean 'LeapAlign'"),
    "no such sweep": ("made_ip:ReFL", "base", [], "there is no sweep 'made_ip'; did you mean 'made_up'"),
    "several runs": ("LeapAlign-", "base", [], "matches several runs: LeapAlign-0, LeapAlign-1; name one"),
    "nothing": ("", "base", [], ": there is no such row or run"),
    "itself": ("base", "made_up:base", [], "cannot be compared with itself; name two"),
    "an unknown metric": ("ReFL", "base", ["-e", "pickscor"], "-e pickscor: .* did you mean 'pickscore'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_name_is_one_line(case, made, capsys):
    """The line says which names exist; the exit code is 1."""
    a, b, options, expected = BAD[case]
    assert alignbench("compare", a, b, *options, store=made[0].root, plugin=False) == 1
    said = capsys.readouterr()
    assert not said.out
    with pytest.raises(UserError, match=expected):
        raise UserError(said.err.strip())
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_row_of_two_sweeps_must_be_told_apart(tmp_path):
    """A label alone names a row only while one sweep has it; a sweep's name only while there is one of it."""
    root = tmp_path / "store"
    store, _, _ = make(root)
    make(root, "other")
    with pytest.raises(UserError, match=r"is a row of several sweeps; name one: .*other-0123456789:ReFL"):
        pairs.find(store, "ReFL")
    (root / "sweeps/other-9876543210.json").write_bytes((root / "sweeps/other-0123456789.json").read_bytes())
    with pytest.raises(UserError, match="'other' matches several sweeps"):
        pairs.find(store, "other:ReFL")


def test_an_empty_store_is_one_line(tmp_path, capsys):
    """Nothing was run there; nothing is made."""
    assert alignbench("compare", "a", "b", store=tmp_path / "store", plugin=False) == 1
    assert "contains no sweep, run or imported" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_it_needs_no_torch(made):
    """Nothing heavy is loaded."""
    words = ["compare", "ReFL", "base", "--store", str(made[0].root)]
    code = (
        f"import sys; from alignbench.cli import main; code = main({words}); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0

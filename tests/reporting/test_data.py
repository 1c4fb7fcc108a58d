"""Data for one's own plots: complete, the report's own numbers, and light to ask for."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from PIL import Image
from support.report_tables import LABELS, METRICS, TASKS, costs, manifest, on_disk, scores, section, stored, with_runs
from support.tiny_sweep import alignbench, sweep_file

from alignbench import UserError, load
from alignbench.reporting import compare, report, score_summary
from alignbench.reporting.analysis import pairs
from alignbench.reporting.analysis.comparison import Measure, analyse
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.data import SweepData
from alignbench.reporting.tables import title
from alignbench.reporting.text.table import number
from alignbench.store.artefacts import Store

NOTEBOOK = Path(__file__).parents[2] / "docs" / "data.ipynb"


def make(root: Path, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """Write a store with a sweep "quickstart" whose tasks have different sizes and levels, and some gaps."""
    plan = manifest(seeds, LABELS, "quickstart")
    plan = structs.replace(with_runs(plan, _renamed), cases=["Base", *LABELS[1:]])
    frame = scores(plan)
    rare = frame["prompt_id"] >= "p0036"
    frame["tag"] = frame["tag"].where(rare, TASKS[0])
    by_task = frame["metric"].str.startswith("geneval")
    frame["score"] += 0.3 * (by_task & ~rare)
    lost = (frame["run"] == "ReFL-0") & (frame["prompt_id"] == "p0050") & frame["metric"].isin(["geneval", "pickscore"])
    frame["score"] = frame["score"].where(~lost)
    on_disk(root, stored(root, plan, frame, costs(plan)))
    return root


def _renamed(run) -> dict[str, Any]:
    training = run.settings["training"] | {"optimizer": {"lr": 2e-4, "betas": [0.9, 0.999]}}
    return {"label": run.label.replace("base", "Base"), "settings": run.settings | {"training": training}}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def sweep(store) -> SweepData:
    return load(store, "quickstart")


# -- scores -----------------------------------------------------------------------------------------------------------


def test_every_score_is_there_with_what_it_means(sweep):
    """A row for each run, metric, prompt and image, with role, unit, direction, and the text of the prompt."""
    frame = sweep.scores
    assert len(frame) == 11 * len(METRICS) * 60 * 2
    assert not frame.duplicated(["run", "metric", "prompt_id", "index"]).any()
    about = frame.drop_duplicates("metric").set_index("metric")[["evaluator", "role", "unit", "higher_is_better"]]
    assert {name: tuple(row) for name, *row in about.itertuples()} == {
        name: (evaluator, role, unit, True) for evaluator, role, name, unit, *_ in METRICS
    }
    assert frame["prompt"].str.startswith("a photo of a").all()
    assert frame.groupby("prompt_id", observed=True)["prompt"].nunique().eq(1).all()
    assert set(frame.loc[frame["label"] == "Base", "seed"]) == {-1}


def test_means_of_the_scores_are_the_reports(sweep):
    """Means by task of each training run, taken from the scores by hand, are those of ``seeds`` and of the table."""
    whole = sweep.scores[sweep.scores["ok"] & (sweep.scores["label"] != "ReFL")]  # without a gap
    keys = ["metric", "label", "seed"]
    by_task = whole.groupby([*keys, "tag"], observed=True)["score"].mean().groupby(keys, observed=True).mean()
    plain = whole.groupby(keys, observed=True)["score"].mean()
    ours = sweep.seeds.set_index(keys)["mean"].drop("ReFL", level="label")
    table = sweep.table().set_index(["metric", "label"])["mean"]
    for metric, *_, grouped, _, _ in (entry[2:] for entry in METRICS):
        expected = (by_task if grouped else plain).loc[metric]
        np.testing.assert_allclose(ours.loc[metric].reindex(expected.index), expected)
        for label, mean in expected.groupby("label", observed=True).mean().items():
            assert table[metric, label] == pytest.approx(mean)
    assert not np.allclose(plain.loc["geneval"], by_task.loc["geneval"], atol=0.01)


def test_seeds_add_up_to_the_report_also_with_gaps(sweep):
    """The mean over training runs of means and of changes is the report's, for a row with missing scores as well."""
    table = sweep.table().set_index(["metric", "label"])
    found = sweep.seeds.groupby(["metric", "label"])[["mean", "change"]].mean()
    assert len(found) == len(METRICS) * len(LABELS)
    np.testing.assert_allclose(found["mean"], table["mean"].reindex(found.index).astype(float))
    np.testing.assert_allclose(found["change"], table["change"].reindex(found.index).astype(float))
    assert found["change"].isna().sum() == len(METRICS)  # base has none
    assert table.loc[("pickscore", "ReFL"), "prompts"] == 59


def test_a_task_without_scores_leaves_no_mean_of_a_training_run():
    """A mean by task is one over all tasks, or there is none; also of a single training run."""
    plan = manifest((0, 1), ("base", "ReFL"))
    frame = scores(plan)
    frame.loc[(frame["run"] == "ReFL-0") & (frame["tag"] == "counting"), "score"] = np.nan
    analysis = analyse(plan, frame)
    for measure in analysis.measures:
        found = analysis.seed_means(measure, "ReFL"), analysis.seed_changes(measure, "ReFL")
        assert [*map(len, found)] == ([0, 0] if measure.by_task else [2, 2])
        assert np.isnan(analysis.means[measure]["ReFL"].mean) == measure.by_task


# -- comparisons, table, runs -----------------------------------------------------------------------------------------


def test_compare_has_the_numbers_of_the_verb(store, sweep, tmp_path):
    """All metrics: the rows of compare.csv; one: its estimate, with p not corrected for metrics that were not asked."""
    words = ["compare", "LeapAlign", "ReFL", "--out", str(tmp_path)]
    assert alignbench(*words, store=store, plugin=False) == 0
    frame = sweep.compare("LeapAlign", "ReFL")
    written = pd.read_csv(tmp_path / "compare.csv")
    pd.testing.assert_frame_equal(frame, written, check_dtype=False, rtol=1e-8)
    one = sweep.compare("LeapAlign", "ReFL", "geneval")
    assert (one.difference, one.p) == tuple(frame.set_index("metric").loc["geneval", ["difference", "p"]])
    assert one.p_holm == one.p
    assert not one.of_weights


def test_compare_has_the_numbers_of_the_report(sweep):
    """Against base it is the change of the table; two runs are named by their ids."""
    table = sweep.table().set_index(["metric", "label"])
    for row in sweep.compare("LeapAlign", "Base").itertuples():
        told = table.loc[(row.metric, "LeapAlign"), ["change", "change_lo", "change_hi", "p"]].tolist()
        assert [row.difference, row.lo, row.hi, row.p] == pytest.approx(told)
    alone = sweep.compare("LeapAlign-0", "Base", "pickscore")
    seeds = sweep.seeds.set_index(["metric", "label", "seed"])["change"]
    assert alone.difference == pytest.approx(seeds["pickscore", "LeapAlign", 0])
    assert alone.of_weights


def test_one_training_run_speaks_of_these_weights(tmp_path):
    """With one seed, each comparison with a trained row is marked so, in the frame and in compare.csv."""
    sweep = load(make(tmp_path / "store", seeds=(0,)), "quickstart")
    assert sweep.compare("LeapAlign", "Base")["of_weights"].all()
    assert sweep.compare("LeapAlign", "ReFL", "geneval").of_weights


def test_the_table_is_the_csv(store, sweep, tmp_path):
    """Every number of <name>.csv, and nothing else."""
    given = Results(store, sweep._results.manifest)
    path, *_ = report.build(given, tmp_path, ["csv"])
    written = pd.read_csv(path).rename(columns={"method": "label"})
    texts = dict.fromkeys(["unit", "verdict", "improved_verdict", "between_trainings"], "")  # empty cells of a CSV
    ours, theirs = sweep.table().fillna(texts), written.fillna(texts)
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False, rtol=1e-8)


def test_runs_have_settings_by_their_paths_and_costs(sweep):
    """A column for each setting, with its type; a list is text; costs are those of the last record."""
    runs = sweep.runs.set_index("run")
    assert len(runs) == 11
    assert runs.loc["ReFL-1", ["label", "method", "seed", "state", "training"]].tolist() == [
        *("ReFL", "refl", 1, "done", "seed 1")
    ]
    assert runs.loc["base--1", "training"] == "not trained"
    assert (runs["training.optimizer.lr"] == 2e-4).all()
    assert runs["training.budget.images"].dtype == int
    assert runs.loc["ReFL-0", "training.optimizer.betas"] == "[0.9, 0.999]"
    assert (runs["evaluation.protocol.steps"] == 8).all()
    assert runs.loc["ReFL-0", ["nfe_grad", "peak_memory_bytes"]].tolist() == [960, 2**29]


def test_the_reports_files_are_these_frames(store, sweep, tmp_path):
    """Scores keep their types, seeds and costs their digits; --format data writes them and nothing else."""
    words = ["report", "quickstart-1", "--format", "data", "--out", str(tmp_path)]
    assert alignbench(*words, store=store, plugin=False) == 0
    names = ["quickstart-costs.csv", "quickstart-scores.parquet", "quickstart-seeds.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    scores, seeds, costs = (tmp_path / names[i] for i in (1, 2, 0))
    pd.testing.assert_frame_equal(pd.read_parquet(scores), sweep.scores)
    assert scores.stat().st_size < 20 * len(sweep.scores)
    pd.testing.assert_frame_equal(pd.read_csv(seeds), sweep.seeds, check_dtype=False, rtol=1e-8)
    with costs.open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["ReFL-0"]["peak_memory_bytes"] == str(2**29)


# -- which sweep ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda sweep: load(sweep._results.store, "quickstrat"), "did you mean 'quickstart'"),
        (lambda sweep: load(sweep._results.store, "shapes.yaml"), r"shapes\.yaml: "),
        (lambda sweep: load("nowhere", "quickstart"), "nowhere: contains no sweep, run or imported"),
        (lambda sweep: sweep.compare("LeapAlgin", "ReFL"), "has no row 'LeapAlgin'; did you mean 'LeapAlign'"),
        (lambda sweep: sweep.compare("LeapAlign", "ReFL", "gneval"), "no such metric; did you mean 'geneval'"),
        (lambda sweep: sweep.compare("ReFL", "ReFL"), "cannot be compared with itself"),
    ],
)
def test_mistakes_are_one_line(sweep, ask, error):
    """A wrong sweep, store, row or metric is named, with what was probably meant."""
    with pytest.raises(UserError, match=error) as raised:
        ask(sweep)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_asking_is_light(store):
    """`import alignbench` loads neither pandas nor torch, and all that ``load`` gives is made without torch."""
    script = f"""
import sys, alignbench
assert not {{"pandas", "torch", "matplotlib"}} & sys.modules.keys()
sweep = alignbench.load({str(store)!r}, "quickstart-1")
sweep.scores, sweep.runs, sweep.seeds, sweep.table(), sweep.compare("ReFL", "Base")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_imported_sweep_is_loaded_as_well(tmp_path):
    """Scores of another project: their own names and directions, roles unknown, costs unknown, and a paired comparison
    on what both rows have; what only one has is said."""
    for label, names in (("A", ["hpsv2", "mystery"]), ("B", ["hpsv2"])):
        rows, folder = [], tmp_path / label
        folder.mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 9, 9)).save(folder / f"{i:05}_00.png")
            row = {"prompt": f"prompt {i}", "prompt_idx": i, "img_idx": 0, "hpsv2": i / 10 + (label == "A") * (1 + i)}
            rows.append(row | {"mystery": 1.0})
        data = {"reward_names": names, "scores": rows}
        (folder / "scores.json").write_text(json.dumps(data))
        words = ["import", "flowbp", str(folder), "--label", label, "--sweep", "mine"]
        assert alignbench(*words, store=tmp_path / "store") == 0
    sweep = load(tmp_path / "store", "mine")
    about = sweep.scores.drop_duplicates("metric").set_index("metric")[["role", "higher_is_better"]]
    assert about.loc["hpsv2.1 (flowbp)"].tolist() == ["unknown", True]
    assert about.loc["mystery (flowbp)", "higher_is_better"] is pd.NA
    assert set(sweep.scores["prompt"]) == {f"prompt {i}" for i in range(6)}
    assert sweep.runs["seconds"].isna().all()
    with pytest.warns(UserWarning, match=r"mystery \(flowbp\): scored for A only"):
        found = sweep.compare("A", "B")
    assert found["difference"].tolist() == pytest.approx([3.5])
    with pytest.raises(UserError, match=r"mystery \(flowbp\): was not scored for both A and B"):
        sweep.compare("A", "B", "mystery (flowbp)")
    assert sweep.table().set_index("label").loc["B", "mean"].iloc[0] == pytest.approx(0.25)


def test_the_notebook_runs(store, monkeypatch, tmp_path):
    """Every cell of docs/data.ipynb runs, one after the other, on the sweep that it names; outputs are not kept."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    (tmp_path / "store").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    names: dict[str, Any] = {}
    for number_, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number_}", "exec"), names)
    assert len(names["runs"]) == 10
    assert names["found"].difference == names["sweep"].compare("LeapAlign", "ReFL", "geneval").difference
    assert names["axes"].lines


# -- one number for one thing -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mean_is_printed_alike_everywhere(tmp_path):
    """Of one training run: the report's table, `compare`, `alignbench run`, the CSV and the frames print one number."""
    store = make(tmp_path / "store", seeds=(0,))
    sweep = load(store, "quickstart")
    plan, results = sweep._results.manifest, sweep._results
    page = report.build(results, tmp_path / "out", ["md"])[0].read_text()
    root = Store(store)
    sides = [pairs.find(root, word) for word in ("quickstart:LeapAlign", "quickstart:Base")]
    shown = compare.table(pairs.compare(root, *sides)[0]).markdown()
    run = plan.by_seed["LeapAlign", 0]
    mine = Results(store, plan.only([run]))
    printed = score_summary.run_summary(run, mine.scores)
    exact = sweep.seeds[sweep.seeds["label"] == "LeapAlign"].set_index("metric")["mean"]
    result = mean_cells(section(page, "Results"), "LeapAlign")
    for place, measure in enumerate(sweep._analysis.measures):
        mean = exact[measure.name]
        assert sweep.compare("LeapAlign", "Base", measure.name).a == pytest.approx(mean)
        for text in (result[place], first_mean(shown, measure), first_mean(printed, measure)):
            assert text == number(mean, len(text.partition(".")[2]))
    plain = mine.scores[mine.scores["metric"] == "geneval"]["score"].mean()
    assert f"{plain:.3f}" != f"{exact['geneval']:.3f}"


def mean_cells(text: str, label: str) -> list[str]:
    """Return the means in a row of the report's table, in the order of its columns."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.split()[0].strip("*") for cell in row.split("|")[2:-1]]


def first_mean(table: str, measure: Measure) -> str:
    """Return the mean in the second column of the measure's row."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {title(measure)}, {measure.unit}"))
    return line.split("|")[2].split()[0]


@pytest.mark.slow
def test_the_verbs_print_one_number(tmp_path, capsys):
    """`alignbench run`, `report`, `compare`, and `score` on the stored images agree to the printed digit."""
    path, store = sweep_file(tmp_path, {"evaluation": {"limit": 7}, "grid": {"training.seed": [0]}}), tmp_path / "store"
    said = {}
    assert alignbench("run", path, "--method", "last", store=store) == 0
    said["run"] = capsys.readouterr().out
    assert alignbench("run", path, "--method", "base", store=store) == 0
    capsys.readouterr()
    assert alignbench("compare", "Last", "Base", store=store, plugin=False) == 0
    said["compare"] = capsys.readouterr().out
    assert alignbench("report", path, "--out", str(tmp_path / "out"), "--format", "md", store=store, plugin=False) == 0
    said["report"] = capsys.readouterr().out
    sweep = load(store, "tiny-SUBSET")
    images = next(run.images for run in sweep._results.manifest.runs if run.label == "Last")
    words = ["score", str(store / "images" / images), "--prompts", "shapes/test", "-e", "bright,geneval"]
    assert alignbench(*words, "geneval.detector=shapes", "--out", str(tmp_path / "scores.csv")) == 0
    said["score"] = capsys.readouterr().out
    result = mean_cells(section(said.pop("report"), "Results"), "Last")
    for place, measure in enumerate(sweep._analysis.measures):
        assert {first_mean(text, measure) for text in said.values()} == {result[place]}

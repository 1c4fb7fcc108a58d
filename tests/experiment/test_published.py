"""Published numbers are as printed, checked by a second path where there is one; sweeps have the published settings."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections import Counter
from contextlib import redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from alignbench.config import load_yaml, pick, settings
from alignbench.experiment.document import read, sweeps
from alignbench.experiment.plan import Draft, draft
from alignbench.planning import gradient_paths
from alignbench.plugins import Registry
from alignbench.reporting import report

ROOT = Path(__file__).parents[2] / "reports"
SOURCES = load_yaml(ROOT / "published" / "sources.yaml")
CURVES = {"leapalign-fig1a", "leapalign-fig5"}  # one value per update: plotted, not set beside a mean
TASKS = {"Single Obj.": 320, "Two Obj.": 396, "Counting": 320, "Colors": 376, "Position": 400, "Attr. Binding": 400}
FLOWBP_NAMES = {"Count": "Counting", "Color": "Colors"}
REGISTRY = Registry()
SWEEPS = sorted(sweeps())
WORDS = {name: report._words(name) for name in SWEEPS}


def rows(stem: str) -> list[dict[str, str]]:
    with (ROOT / "published" / f"{stem}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(stem: str) -> dict[tuple[str, str], str]:
    found = {(row["method"], row["metric"]): row["value"] for row in rows(stem)}
    assert len(found) == len(rows(stem)), f"{stem} has a cell twice"
    return found


@functools.cache
def drafted(name: str) -> Draft:
    return draft(read(name), REGISTRY)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_every_file_has_its_source_and_the_reverse():
    """Each file has a citation, URL, place and note, and the promised columns; only a standard error may be empty."""
    assert {path.stem for path in (ROOT / "published").glob("*.csv")} == SOURCES.keys()
    for stem, source in SOURCES.items():
        assert all(source[key] for key in ("citation", "url", "place", "note")), stem
        assert source.keys() - {"methods"} == {"citation", "url", "place", "note", "protocol", "metrics"}, stem
        header = (ROOT / "published" / f"{stem}.csv").read_text().splitlines()[0]
        assert header == ("method,update,metric,value" if stem in CURVES else "method,metric,value,se")
        for row in rows(stem):
            assert all(row[key] for key in ("method", "metric", "value"))
            assert row["value"] in ("yes", "no") or Decimal(row["value"]).is_finite()
            assert not row.get("se") or Decimal(row["se"]) > 0


def test_what_a_source_maps_is_printed():
    """Every mapped metric and method is in the file, with the stated number of decimals."""
    for stem, source in SOURCES.items():
        assert source["metrics"].keys() <= {row["metric"] for row in rows(stem)}, stem
        assert source.get("methods", {}).keys() <= {row["method"] for row in rows(stem)}, stem
        printed = {row["metric"]: set[int]() for row in rows(stem)}
        for row in rows(stem):
            printed[row["metric"]].add(len(row["value"].partition(".")[2]))
        for metric, ours in source["metrics"].items():
            assert max(printed[metric]) == ours["decimals"], f"{stem}, {metric}"


def exact_share(printed: str, images: int) -> Decimal:
    """Return the share of ``images`` that rounds to the printed percentage. Raise AssertionError if there is none."""
    count = round(Decimal(printed) * images / 100)
    assert abs(Decimal(100 * count) / images - Decimal(printed)) <= Decimal("0.005"), f"{printed} of {images}"
    return Decimal(count) / images


def test_leapaligns_geneval_is_one_run_of_2212_images_per_row():
    """Sub-scores are whole counts of GenEval's task sizes times 4; the overall score is their unweighted mean."""
    found = table("leapalign-table2-geneval")
    for method in dict.fromkeys(method for method, _ in found):
        shares = [exact_share(found[method, task], images) for task, images in TASKS.items()]
        assert abs(sum(shares) / 6 - Decimal(found[method, "Overall"])) <= Decimal("0.00005"), method


def test_flowbps_geneval_has_four_images_per_prompt():
    """Sub-scores are counts of four images per prompt and not of one or two; the overall score is the mean of six."""
    found = table("flowbp-geneval")
    for method in dict.fromkeys(method for method, _ in found):
        printed = {FLOWBP_NAMES.get(name, name): value for (row, name), value in found.items() if row == method}
        shares = [exact_share(printed[task], images) for task, images in TASKS.items()]
        assert abs(100 * sum(shares) / 6 - Decimal(printed["Overall"])) <= Decimal("0.005"), method
    for images in (80, 160):
        with pytest.raises(AssertionError):
            exact_share(found["LeapAlign", "Count"], images)


def test_tables_of_the_same_training_runs_agree():
    """Table 3's HPSv2.1 and base rows, table 5's default row and figure 5's ends equal table 2's values exactly."""
    general, geneval = table("leapalign-table2"), table("leapalign-table2-geneval")
    for (method, metric), value in table("leapalign-table3-hpsv2").items():
        assert general[method, metric] == value
    assert table("leapalign-table3-pickscore")["Flux", "PickScore"] == general["Flux", "PickScore"]
    assert table("leapalign-table3-hpsv3")["Flux", "HPSv3"] != general["Flux", "HPSv3"]  # of other prompts
    default = {metric: value for (row, metric), value in table("leapalign-table5").items() if row == "lambda = 0.55"}
    assert default == {metric: general["LeapAlign", metric] for metric in default}
    ends = {(row["method"], row["update"]): row["value"] for row in rows("leapalign-fig5")}
    for method in ("ReFL", "DRaFT-LV", "DRTune", "LeapAlign"):
        assert ends[method, "0"] == geneval["Flux", "Overall"]
        assert ends[method, "300"] == geneval[method, "Overall"]


def test_figure_1b_is_tables_2_and_3_rounded():
    """Each label is the table's value to the label's digits."""
    general = table("leapalign-table2")
    tables = dict.fromkeys(("HPSv2.1", "ImageReward", "UnifiedReward"), general)
    tables |= {name: table(f"leapalign-table3-{name.lower()}") for name in ("PickScore", "HPSv3")}
    for (method, metric), label in table("leapalign-fig1b").items():
        value = tables[metric][method, "UR-IQ" if metric == "UnifiedReward" else metric]
        assert Decimal(value).quantize(Decimal(label)) == Decimal(label), (method, metric)


def test_figure_4a_lies_where_its_text_says():
    """alpha = 0 is below the default and above every other row of table 2."""
    value = table("leapalign-fig4a")["alpha = 0", "HPSv2.1"]
    others = {method: v for (method, metric), v in table("leapalign-table2").items() if metric == "HPSv2.1"}
    assert max(v for method, v in others.items() if method != "LeapAlign") < value < others["LeapAlign"]


def test_adjoint_matching_moves_with_lambda():
    """With more reward, ImageReward and HPS rise and DreamSim's variance falls, in every one of four series."""
    for stem in ("adjoint-matching-default", "adjoint-matching-finetuning"):
        found = table(stem)
        for eta in ("0", "1"):
            methods = [method for method, metric in found if metric == "HPS" and method.endswith(f"eta = {eta}")]
            for metric, falls in (("ImageReward", False), ("HPS", False), ("DreamSimVar", True)):
                series = [found[method, metric] for method in methods]
                assert series == sorted(series, reverse=falls), (stem, eta, metric)
                assert len(set(series)) == 5


# -- table 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_1_is_what_the_gradients_do(monkeypatch):
    """Ticks measured on an analytic flow are those of the published table and of the committed file."""
    monkeypatch.setattr("sys.argv", ["capabilities", "table2"])
    with redirect_stdout(io.StringIO()) as out:
        gradient_paths.main()
    assert out.getvalue() == (ROOT / "measured-table1.csv").read_text()
    assert table("leapalign-table1") == {
        (row["method"], row["metric"]): row["value"] for row in csv.DictReader(io.StringIO(out.getvalue()))
    }
    assert WORDS["table2"].intro.count("| yes") == 6


@pytest.mark.parametrize(
    ("method", "early", "nested", "leaps", "several"),
    [
        ({"name": "bptt"}, True, True, False, True),
        ({"name": "draft_k", "k": 5}, False, True, False, True),
        ({"name": "leapalign", "alpha": 0.0}, True, False, True, True),
        ({"name": "flowbp_sparse"}, True, False, False, True),
        ({"name": "flowbp_bridge"}, True, True, False, True),
        ({"name": "flowbp_lagrange"}, True, True, True, True),
    ],
)
def test_other_methods_ticks_follow_from_their_definitions(method, early, nested, leaps, several):
    """Back-propagation is nested without leaps; with alpha = 0 nothing is nested; rescaling is not a leap."""
    found = gradient_paths.ticks(REGISTRY.make("method", method, "method"))
    assert list(found.values()) == [early, nested, leaps, several]


# -- sweeps ------------------------------------------------------------------------------------------------------------


def uses() -> list[tuple[str, str]]:
    """Return (sweep, table) for every published table that a report shows beside its numbers."""
    return [(name, stem) for name, words in WORDS.items() for stem in words.published]


def test_every_paper_sweep_has_its_published_table():
    """Reports name existing files only; a sweep outside the shapes world names at least one."""
    assert {stem for _, stem in uses()} <= SOURCES.keys() - CURVES
    alone = {name for name, words in WORDS.items() if not words.published}
    assert alone == {"quickstart", "shapes", "shapes_curves", "shapes_methods"}


@pytest.mark.parametrize(("name", "stem"), uses())
def test_mapped_metrics_are_made_by_the_sweep(name, stem):
    """Every metric of ours that is mapped to a published column comes from one of the sweep's evaluators."""
    evaluators = [REGISTRY.make("evaluator", plain, "e") for plain in drafted(name).sweep.evaluation.evaluators]
    made = {metric.name for evaluator in evaluators for metric in evaluator.metrics}
    assert {ours["metric"] for ours in SOURCES[stem]["metrics"].values()} <= made


@pytest.mark.parametrize("stem", sorted({stem for _, stem in uses()}))
def test_every_published_row_is_a_row_of_a_sweep(stem):
    """Rows match by their own or mapped name; only those sampled with noise (eta = 1) are not reproduced."""
    labels = {cell.spec.label for name, used in uses() if used == stem for cell in drafted(name).cells}
    methods = SOURCES[stem].get("methods", {})
    printed = dict.fromkeys(row["method"] for row in rows(stem) if not row["method"].endswith("eta = 1"))
    assert {methods.get(method, method) for method in printed} <= labels


@pytest.mark.parametrize("name", SWEEPS)
def test_questions_are_about_rows_of_the_sweep(name):
    """Subjects and rivals are labels; an absent rival would be dropped silently."""
    labels = {cell.spec.label for cell in drafted(name).cells}
    asked = {label for subject, rivals in WORDS[name].questions for label in (subject, *rivals)}
    assert asked <= labels


# Only a method's own released settings, and those that a table's other sweep varies, may differ.
GRPO = {"training.batch", "training.budget.updates"}
DEPARTURES = {
    "table2": {"DanceGRPO": GRPO | {"method.steps"}, "MixGRPO": GRPO},
    "table2_geneval": {"DanceGRPO": GRPO | {"method.steps"}, "MixGRPO": GRPO},
}
VGG = {"prompts"}
OTHER_MODEL = {"backend.model", "backend.guidance", "method.steps", "prompts", "training.batch"}
OTHER_EVALUATION = {"evaluation.prompts", "evaluation.images_per_prompt", "evaluation.steps", "evaluation.guidance"}


def expected_departures(name: str, stem: str, label: str) -> set[str]:
    """Return the stated settings from which a row departs, each with its reason in the sweep's first lines."""
    if name.startswith("vggflow"):
        return VGG | ({"method.steps"} if label == "Adjoint Matching" else set())
    if stem.startswith("adjoint-matching"):
        return OTHER_MODEL | OTHER_EVALUATION
    return DEPARTURES.get(name, {}).get(label, set())


@pytest.mark.parametrize(("name", "stem"), uses())
def test_a_sweep_has_the_published_settings(name, stem):
    """Every trained row has every stated setting, except for those listed here; settings "not stated" do not count."""
    for cell in drafted(name).cells:
        if cell.trains:
            made = settings(cell.spec) | {"evaluation": settings(cell.protocol)}
            made["reward.names"] = [part["evaluator"]["name"] for part in cell.spec.rewards]
            differ = {path for path, stated in SOURCES[stem]["protocol"].items() if stated != as_published(made, path)}
            silent = {path for path, stated in SOURCES[stem]["protocol"].items() if stated == "not stated"}
            assert differ - silent == expected_departures(name, stem, cell.spec.label), cell.spec.label


def as_published(made: dict[str, Any], path: str) -> Any:
    """Return a setting in its published form; ``reward`` is the evaluator's name."""
    value = made["reward.names"][0] if path == "reward" else pick(made, path)
    return list(value) if isinstance(value, tuple) else value


def test_every_paper_sweep_is_in_the_readme_and_the_page_on_reproduction():
    """README's table names every sweep of a paper; docs/reproducing.md shows its command or names it."""
    for page in ("README.md", "docs/reproducing.md"):
        text = (ROOT.parent / page).read_text(encoding="utf-8")
        missing = [name for name, words in WORDS.items() if words.published and not re.search(rf"\b{name}`", text)]
        assert not missing, page


def test_the_paper_sweeps_share_their_runs():
    """LeapAlign as published is one run in table 2, table 5 and figures 4a to 4d and 4f; only its label differs."""
    of = {"table5": "LeapAlign, margin=0.55"}
    specs = []
    for name in ("table2", "table5", "fig4a", "fig4b", "fig4c", "fig4d", "fig4f"):
        cells = [cell for cell in drafted(name).cells if cell.spec.label == of.get(name, "LeapAlign")]
        specs.append([{**settings(cell.spec), "label": ""} for cell in cells])
    assert Counter(map(len, specs)) == {1: 7}
    assert all(spec == specs[0] for spec in specs)

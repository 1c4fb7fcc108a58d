"""Imported rows: what a file says is kept, what it does not say stays unknown, and bad files change nothing."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.tiny_sweep import alignbench

from alignbench.config import UserError
from alignbench.evaluation import import_rows
from alignbench.evaluation.import_formats import FLOWBP_METRICS, read
from alignbench.launch import cleanup
from alignbench.plugins import Registry
from alignbench.prompts import prompt_id
from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.results import Results
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json
from alignbench.store.manifest import read_manifest

TEXTS = ["a red circle", "two blue squares", "a green ring 🙂", 'say "שלום", twice', "a | b `c`", "a cross"]
TASKS = ["single_object", "counting", "colors", "colors", "position", "counting"]


def draw(path: Path, color: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color % 256, 40, 90)).save(path)
    return path


def flowbp(folder: Path, gain: float = 0.0, texts: list[str] = TEXTS, each: int = 2, **changes: Any) -> Path:
    """Write what offline_ckpt_eval --score writes: images, and scores.json with the paths of another machine."""
    rng, rows = np.random.default_rng(0), []
    for i, text in enumerate(texts):
        for j in range(each):
            draw(folder / f"{i:05d}_{j:02d}.png", 20 * i + j + int(1000 * gain))
            scores = {"hpsv2": 0.28 + rng.normal() / 50 + gain, "pickscore": 0.9 + gain, "ur-align": 0.6 + i / 50}
            about = {"prompt_idx": i, "img_idx": j, "prompt": text, "image": f"/elsewhere/{i:05d}_{j:02d}.png"}
            rows.append({**about, **scores, "mean": sum(scores.values())})
    rows[2]["ur-align"] = -10.0
    size = {"height": 32, "width": 32, "num_steps": 50, "guidance_scale": 3.5, "seed": 42}
    about = {"model_name": "m", **size, "seed_formula": "seed + prompt_idx + img_idx * num_prompts"}
    data = about | {"reward_names": ["hpsv2", "pickscore", "ur-align"], "scores": rows} | changes
    (folder / "scores.json").write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder


def unirl(folder: Path) -> Path:
    """Write what benchmarks.run writes: images/, scores.jsonl, summary.json. One image has no score at all."""
    lines = []
    for i, text in enumerate(TEXTS):
        draw(folder / "images" / f"p{i:05d}_s0.png", 20 * i)
        row = None if i == 1 else {"hpsv3/hpsv3": 8.0 + i, "pickscore/pickscore": 0.8, "new/sharpness": float("nan")}
        lines.append(json.dumps({"image": f"p{i:05d}_s0.png", "prompt": text, "scores": row}))
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"benchmark": "image/preference", "subset": True}))
    return folder


def geneval(folder: Path, each: int = 2, times: int = 1) -> Path:
    """Write what evaluate_images.py writes, with the folders in an arbitrary order. ``times``: folders per prompt."""
    rng, lines = random.Random(0), []
    for i, (text, tag) in enumerate(zip(TEXTS * times, TASKS * times)):
        metadata = {"tag": tag, "include": [{"class": "circle", "count": 1}], "prompt": text}
        for j in range(each):
            file = draw(folder / f"{i:05d}/samples/{j:04d}.png", 20 * i + j)
            correct = rng.random() < 0.5
            row = {"filename": str(file), "tag": tag, "prompt": text, "correct": correct}
            row |= {"reason": "" if correct else "expected circle>=1, found 0\nand more", "details": "{}"}
            lines.append(json.dumps({**row, "metadata": json.dumps(metadata)}))
        (folder / f"{i:05d}/metadata.jsonl").write_text(json.dumps(metadata))
    rng.shuffle(lines)
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def do_import(store: Path, kind: str, path: Path, *options: str) -> int:
    return alignbench("import", kind, str(path), *options, store=store)


def sweep(store: Path, name: str = "imported") -> dict[str, Any]:
    manifest = read_json(store / "sweeps" / f"{name}.json")
    assert manifest is not None
    return manifest


def scores(store: Path, name: str = "imported") -> pd.DataFrame:
    return Results(store, read_manifest(store / "sweeps" / f"{name}.json")).scores


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return {path: (time, bytes)} of every file in ``folder``."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def report(store: Path, name: str = "imported") -> str:
    out = store.parent / "report"
    assert alignbench("report", name, "--out", str(out), store=store, plugin=False) == 0
    return (out / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}")[1].split("\n## ")[0]


# ---- FlowBP


def test_flowbps_scores_are_kept_as_they_are(tmp_path):
    """Every number of the file is in the store, in the file's own scale, under a name that says who made it."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    assert do_import(store, "flowbp", folder, "--label", "A") == 0
    rows = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]
    found = scores(store).set_index(["metric", "prompt_id", "index"])["score"]
    for key, name in (("hpsv2", "hpsv2.1"), ("pickscore", "pickscore")):
        for row in rows:
            assert found[f"{name} (flowbp)", prompt_id(row["prompt"]), row["img_idx"]] == row[key]
    assert set(scores(store)["metric"]) == {"hpsv2.1 (flowbp)", "pickscore (flowbp)", "ur-align (flowbp)"}
    units = {m["name"]: m["unit"] for entry in sweep(store)["runs"][0]["scores"] for m in entry["metrics"]}
    assert units["pickscore (flowbp)"] == "logit / 26"
    assert units["ur-align (flowbp)"] == "1-5, divided by 5"


def test_an_answer_without_a_score_is_missing_and_counted(tmp_path, capsys):
    """-10 from UnifiedReward is a missing score: the mean is over the other images, and the report counts it."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    assert do_import(store, "flowbp", folder, "--label", "A") == 0
    assert "ur-align (flowbp): 1 of 12 images have no score" in capsys.readouterr().out
    found = scores(store)
    judged = found[found["metric"] == "ur-align (flowbp)"]
    assert (~judged["ok"]).sum() == 1
    assert judged["score"].min() > 0
    assert "ur-align (flowbp), A: 11 of 12 scores" in section(report(store), "Coverage")


def test_minus_ten_of_another_scorer_is_a_number(tmp_path):
    """HPSv3 has no lower bound: -10 means a missing answer only for UnifiedReward."""
    folder = flowbp(tmp_path / "eval", reward_names=["hpsv3"])
    data = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    for row in data["scores"]:
        row["hpsv3"] = -10.0
    (folder / "scores.json").write_text(json.dumps(data))
    assert all(image.scores["hpsv3"] == -10.0 for image in read("flowbp", folder).images)


def test_the_report_says_which_scorers_are_absent(tmp_path):
    """FlowBP skips scorers silently; each of its scorers is either a column or named as absent."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "eval"), "--label", "A")
    text = report(store)
    for name, (ours, _) in FLOWBP_METRICS.items():
        there = name in ("hpsv2", "pickscore", "ur-align")
        assert (f"{ours} (flowbp)" in text) == there
        assert (name in section(text, "Imported rows").split("without ")[1].split(":")[0].split(", ")) != there


def test_aggregates_are_not_imported_as_scores(tmp_path):
    """FlowBP's "mean" adds up different scales and sentinels; its "<task>_accuracy" is stored with the wrong images."""
    found = read("flowbp", flowbp(tmp_path / "eval"))
    assert set(found.metrics) == {"hpsv2", "pickscore", "ur-align"}
    logged = {"step": 5, "avg_scores": {"hpsv2": 0.3, "mean": 1.0}, "scores": []}
    data = json.loads((tmp_path / "eval/scores.json").read_text(encoding="utf-8"))
    logged["scores"] = [{k: v for k, v in row.items() if k != "image"} for row in data["scores"]]
    (tmp_path / "eval_step_5.json").write_text(json.dumps(logged))
    online = read("flowbp", tmp_path / "eval_step_5.json")
    assert set(online.metrics) == {"hpsv2"}
    assert online.protocol == {}


def test_an_unknown_scorer_has_no_direction(tmp_path):
    """Its numbers are kept, but the report calls neither higher nor lower better."""
    folder = flowbp(tmp_path / "eval", reward_names=["hpsv2", "mystery"])
    metric = read("flowbp", folder).metrics["mystery"]
    assert (metric.unit, metric.higher_is_better) == ("unit unknown", None)
    assert all(image.scores["mystery"] is None for image in read("flowbp", folder).images)


def test_a_repeated_prompt_keeps_all_its_images(tmp_path):
    """If a list repeats a prompt, all its images count as images of one prompt; none is lost or replaced."""
    texts = ["a cross", "a ring", "a cross"]
    images = read("flowbp", flowbp(tmp_path / "eval", texts=texts)).images
    assert sorted((image.prompt.text, image.image_index) for image in images) == [
        *(("a cross", i) for i in range(4)),
        *(("a ring", i) for i in range(2)),
    ]


def test_a_complete_file_with_a_repeated_prompt_is_complete(tmp_path):
    """Coverage counts the images that each row has: 16 of 16 although one of its 7 prompts has 4 images, not 2."""
    store, names = tmp_path / "store", ["hpsv2", "pickscore"]
    texts = [*TEXTS, "a ring", "a cross"]
    assert do_import(store, "flowbp", flowbp(tmp_path / "a", texts=texts, reward_names=names), "--label", "A") == 0
    text = report(store)
    assert section(text, "Coverage").strip().startswith("Complete: every image of every run has every score (16 images")
    assert "its list repeats 1 prompts" in section(text, "Imported rows")
    assert "evaluation, images per prompt: 2" in section(text, "Protocol")


def test_a_row_of_fewer_images_is_not_one_with_missing_scores(tmp_path):
    """Beside a row of 6 prompts, one with 4 of them has 8 of 8 scores, and two prompts are left out of its mean."""
    store = tmp_path / "store"
    for label, texts in (("A", TEXTS), ("B", TEXTS[:4])):
        folder = flowbp(tmp_path / label, texts=texts, reward_names=["hpsv2"])
        assert do_import(store, "flowbp", folder, "--label", label) == 0
    (line,) = [line for line in section(report(store), "Coverage").splitlines() if line.startswith("- ")]
    assert line.startswith("- HPSv2.1 (flowbp), B: 8 of 8 scores; prompts left out: 2 of the mean")


# ---- UniRL


def test_unirls_scores_are_kept_as_they_are(tmp_path):
    """Every number of the file; null and NaN are missing; an unknown reward keeps its name."""
    folder, store = unirl(tmp_path / "bench"), tmp_path / "store"
    assert do_import(store, "unirl", folder, "--label", "A") == 0
    found = scores(store)
    kept = found[(found["metric"] == "hpsv3 (unirl)") & found["ok"]].set_index("prompt_id")["score"]
    assert kept.to_dict() == {prompt_id(text): 8.0 + i for i, text in enumerate(TEXTS) if i != 1}
    assert not found[found["metric"] == "new/sharpness (unirl)"]["ok"].any()
    assert "SUBSET" in section(report(store), "Imported rows")


def test_images_of_another_model_are_not_taken_for_those_of_a_file(tmp_path, monkeypatch, capsys):
    """A name relative to where the benchmark ran may be that of another image where we are: two files are refused."""
    folder, other = unirl(tmp_path / "bench"), tmp_path / "other"
    draw(other / "p00000_s0.png", 255)
    monkeypatch.chdir(other)
    assert do_import(tmp_path / "store", "unirl", folder, "--label", "A") == 1
    assert "p00000_s0.png differ; say which folder is meant with --images" in capsys.readouterr().err
    assert do_import(tmp_path / "store", "unirl", folder, "--label", "A", "--images", str(folder / "images")) == 0
    monkeypatch.chdir(folder / "images")
    assert do_import(tmp_path / "store", "unirl", folder, "--label", "B") == 0


def test_a_text_benchmark_is_refused(tmp_path, capsys):
    """UniRL's text benchmarks also write a scores.jsonl."""
    (tmp_path / "scores.jsonl").write_text('{"id": "a1", "acc": 0.5, "n": 4}\n')
    assert do_import(tmp_path / "store", "unirl", tmp_path, "--label", "A") == 1
    assert "scores.jsonl:1: a result of a text benchmark" in capsys.readouterr().err


# ---- GenEval


def test_genevals_score_equals_its_own_summary(tmp_path):
    """The mean in the table is the unweighted mean of the task means, as summary_scores.py prints it."""
    folder, store = geneval(tmp_path / "out"), tmp_path / "store"
    assert do_import(store, "geneval", folder, "--label", "A") == 0
    lines = pd.read_json(folder / "results.jsonl", orient="records", lines=True)
    overall = np.mean([task["correct"].mean() for _, task in lines.groupby("tag")])
    row = next(line for line in section(report(store), "Results").splitlines() if line.startswith("| A "))
    assert row.split("|")[2].split()[0] == f"{overall:.4f}"


def test_genevals_summary_counts_images_and_we_count_prompts(tmp_path, capsys):
    """With unequal numbers of images the two differ: the import and the page say so, with the official number."""
    folder, store = geneval(tmp_path / "out", each=3), tmp_path / "store"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not row["filename"].endswith(("00002/samples/0001.png", "00005/samples/0002.png"))]
    (folder / "results.jsonl").write_text(lines(*rows))
    official = pd.DataFrame(rows).groupby("tag")["correct"].mean().mean()
    prompts = pd.DataFrame(rows).groupby(["tag", "prompt"])["correct"].mean().groupby("tag").mean().mean()
    assert abs(official - prompts) > 0.001
    assert do_import(store, "geneval", folder, "--label", "A") == 0
    remark = "its prompts have 2 to 3 images and count alike in every mean; if every image counts alike, as in GenEval"
    assert f"{remark}'s own script, it is {official:.4f}" in capsys.readouterr().out
    text = report(store)
    assert remark in section(text, "Imported rows")
    row = next(line for line in section(text, "Results").splitlines() if line.startswith("| A "))
    assert row.split("|")[2].split()[0] == f"{prompts:.4f}"


@pytest.mark.parametrize("kind", ["images", "geneval"])
def test_flow_grpos_layout_is_imported(kind, tmp_path, capsys):
    """A folder for every line, each prompt four times: four images of each prompt, none lost and none twice."""
    folder, store = geneval(tmp_path / "out", each=1, times=4), tmp_path / "store"
    assert do_import(store, kind, folder, "--label", "A") == 0
    assert "its list repeats 18 prompts" in capsys.readouterr().out
    found = pd.read_parquet(store / "images" / sweep(store)["runs"][0]["images"] / "manifest.parquet")
    assert set(zip(found["text"], found["index"])) == {(text, i) for text in TEXTS for i in range(4)}
    assert len(found) == 24


def test_genevals_reasons_are_kept(tmp_path):
    """The reason is kept with the score, on one line; the prompt's metadata are available for scoring."""
    folder, store = geneval(tmp_path / "out"), tmp_path / "store"
    do_import(store, "geneval", folder, "--label", "A")
    table = pd.read_parquet(store / sweep(store)["runs"][0]["scores"][0]["file"])
    wrong = table[table["geneval (official)"] == 0]
    assert set(wrong["raw"]) == {"expected circle>=1, found 0 and more"}
    assert read("geneval", folder).images[0].prompt.metadata["include"] == [{"class": "circle", "count": 1}]


@pytest.mark.slow
def test_the_order_of_lines_does_not_matter(tmp_path):
    """os.listdir lists folders in any order: a file with its lines reversed is the same row."""
    folder, store = geneval(tmp_path / "out"), tmp_path / "store"
    do_import(store, "geneval", folder, "--label", "A")
    before = files(store)
    lines = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(reversed(lines)))
    assert do_import(store, "geneval", folder, "--label", "A") == 0
    assert files(store) == before


def test_moved_images_are_found(tmp_path):
    """--images names the folder that holds them now."""
    folder = geneval(tmp_path / "out")
    shutil.move(folder / "results.jsonl", tmp_path / "results.jsonl")
    shutil.move(folder, tmp_path / "moved")
    assert not any(image.file.is_file() for image in read("geneval", tmp_path / "results.jsonl").images)
    images = read("geneval", tmp_path / "results.jsonl", image_folder=tmp_path / "moved").images
    assert all(image.file.is_file() for image in images)


# ---- images, and our own scores of them


@pytest.mark.slow
def test_our_own_images_have_the_same_scores_when_imported(swept, tmp_path, capsys):
    """Images of a sweep, imported and scored by the same evaluators, have bitwise the sweep's scores.

    `compare` of the row with its own import therefore finds no difference in any metric.
    """
    store = tmp_path / "store"
    shutil.copytree(swept / "store", store)
    manifest = read_manifest(Store(store).manifests()[0])
    run = manifest.rows["Last"][0]
    folder, judges = store / "images" / run.images, ["-e", "bright,geneval", "geneval.detector=shapes"]
    options = ["--prompts", "shapes/test", "--label", "Again", *judges]
    assert do_import(store, "images", folder, *options) == 0
    own = Results(store, manifest.only([run])).scores
    place = {"metric": str, "prompt_id": str, "index": int}
    theirs, mine = (frame.astype(place).sort_values(list(place))["score"] for frame in (scores(store), own))
    assert np.array_equal(theirs.to_numpy(), mine.to_numpy())
    capsys.readouterr()
    assert alignbench("compare", "imported:Again", run.id, store=store, plugin=False) == 0
    text = capsys.readouterr().out
    assert [line.count("| identical") for line in text.splitlines() if line.startswith("|")].count(1) == 3
    assert text.count("\nNo prompt differs.") == 3


def test_images_are_copied_byte_by_byte(tmp_path):
    """The store has the same bytes; the report still works once the source is deleted."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    do_import(store, "flowbp", folder, "--label", "A")
    kept = store / "images" / sweep(store)["runs"][0]["images"]
    table = pd.read_parquet(kept / "manifest.parquet").set_index(["text", "index"])
    for i, text in enumerate(TEXTS):
        for j in range(2):
            row = table.loc[(text, j)]
            assert (kept / row["file"]).read_bytes() == (folder / f"{i:05d}_{j:02d}.png").read_bytes()
    shutil.rmtree(folder)
    report(store)
    assert (store.parent / "report" / "imported-grid.png").is_file()


def test_an_unreadable_image_is_marked(tmp_path, capsys):
    """It is counted, and all other images keep their places."""
    folder, store = flowbp(tmp_path / "eval", each=1), tmp_path / "store"
    (folder / "00001_00.png").write_bytes((folder / "00001_00.png").read_bytes()[:60])
    (folder / "00002_00.png").unlink()
    assert do_import(store, "flowbp", folder, "--label", "A", "-e", "bright") == 0
    assert "2 of 6 images are missing or cannot be read" in capsys.readouterr().out
    found = scores(store)
    bright = found[found["metric"] == "brightness"]
    assert bright["ok"].sum() == 4
    assert found[found["metric"] == "hpsv2.1 (flowbp)"]["ok"].all()  # the score was computed while the file existed
    assert "2 of 6 images" in report(store)


def test_every_prompt_gets_its_own_image(tmp_path, capsys):
    """2.png is that of prompt 2, whether names are unpadded or a list names them; a sheet among them is refused."""
    store, texts = tmp_path / "store", [f"thing {i}" for i in range(12)]
    files = [draw(tmp_path / f"images/{i}.png", 20 * i) for i in range(12)]
    (tmp_path / "list.txt").write_text("".join(f"{text}\n" for text in texts))
    named = [{"image": file.name, "prompt": text} for file, text in zip(files, texts)]
    (tmp_path / "named.jsonl").write_text(lines(*random.Random(0).sample(named, 12)))
    for name in ("named.jsonl", "list.txt"):
        options = ["--prompts", str(tmp_path / name), "--label", name]
        assert do_import(store, "images", tmp_path / "images", *options) == 0
        kept = store / "images" / sweep(store)["runs"][-1]["images"]
        table = pd.read_parquet(kept / "manifest.parquet").set_index("text")
        assert all((kept / table["file"][t]).read_bytes() == f.read_bytes() for f, t in zip(files, texts))
    assert "0.png with 'thing 0', 1.png with 'thing 1', 11.png with 'thing 11'" in capsys.readouterr().out
    draw(tmp_path / "images/grid.png")
    assert do_import(store, "images", tmp_path / "images", *options) == 1
    refused(capsys, "grid.png: its name is formed unlike the others'")


def test_images_without_scores_make_a_gallery(tmp_path, capsys):
    """Images alone make a page with a grid and no column of scores."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    assert do_import(store, "images", folder, "--prompts", str(tmp_path / "list.jsonl"), "--label", "A") == 0
    assert "scores: none (only a gallery; add scores with -e)" in capsys.readouterr().out
    assert "imported-grid.png" in report(store)


def test_scores_can_be_added_later(tmp_path, capsys):
    """Importing the same images again with -e gives one row with both scores; importing once more changes nothing."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    do_import(store, "flowbp", folder, "--label", "A")
    assert do_import(store, "flowbp", folder, "--label", "A", "-e", "bright") == 0
    assert set(scores(store)["evaluator"]) >= {"bright", "hpsv2.1 (flowbp)"}
    assert len(sweep(store)["runs"]) == 1
    before = files(store)
    assert do_import(store, "flowbp", folder, "--label", "A") == 0
    assert "already imported, nothing changed" in capsys.readouterr().out
    assert files(store) == before


def test_a_missing_score_is_a_dash(tmp_path):
    """A metric that only one row has is a dash in the others, which still count all their training runs."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "A")
    do_import(store, "flowbp", flowbp(tmp_path / "b", 0.1), "--label", "B", "-e", "bright")
    row = next(line for line in section(report(store), "Results").splitlines() if line.startswith("| A "))
    assert row.split("|")[1].strip() == "A"
    assert row.split("|")[5].strip() == "—"


def test_a_column_has_one_evaluator(tmp_path, capsys):
    """Rows scored with another setting of an evaluator are refused."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "A", "-e", "bright")
    before = files(store)
    code = do_import(store, "flowbp", flowbp(tmp_path / "b", 0.1), "--label", "B", "-e", "bright", "bright.power=2")
    assert code == 1
    assert "-e bright: other rows of this sweep were scored with other settings" in capsys.readouterr().err
    assert files(store) == before


# ---- the sweep


def test_importing_the_same_content_twice_changes_nothing(tmp_path):
    """No byte and no file time changes, even from a copy of the folder."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    do_import(store, "flowbp", folder, "--label", "A", "-e", "bright")
    before = files(store)
    shutil.copytree(folder, tmp_path / "copy")
    assert do_import(store, "flowbp", tmp_path / "copy", "--label", "A", "-e", "bright") == 0
    assert files(store) == before


@pytest.mark.slow
def test_what_is_damaged_is_imported_again(tmp_path, capsys):
    """A changed image, another program's table of scores and our own scores are named, and come back as they were."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    words = ("--label", "A", "-e", "bright")
    do_import(store, "flowbp", folder, *words)
    before = {name: content for name, (_, content) in files(store).items()}
    image = next(store.glob("images/*/*.png"))
    image.write_bytes(image.read_bytes() + b"x")
    tables = sorted(store.glob("scores/*/*.parquet"))
    for path in tables:
        pd.read_parquet(path)[1:].to_parquet(path, index=False)
    capsys.readouterr()
    assert do_import(store, "flowbp", folder, *words) == 0
    said = capsys.readouterr().err
    assert all(
        f"{path}: damaged (its content is not what was written); imported again" in said for path in (image, *tables)
    )
    after = {name: content for name, (_, content) in files(store).items()}
    assert {name: content for name, content in after.items() if not name.endswith(".damaged")} == before


@pytest.mark.parametrize("label", ["refl", "ReFL, seed 1"])
def test_two_rows_never_read_alike(tmp_path, capsys, label):
    """A label that differs from another's only in case, or is the name of one of its runs, is refused."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    do_import(store, "flowbp", folder, "--label", "ReFL", "--seed", "1")
    capsys.readouterr()
    assert do_import(store, "flowbp", folder, "--label", label, "--seed", "2") == 1
    assert f"--label {label}: reads like the row 'Re" in capsys.readouterr().err


def test_the_name_of_the_list_is_not_content(tmp_path):
    """The prompts count, not the name of their file."""
    folder, store = flowbp(tmp_path / "eval"), tmp_path / "store"
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    do_import(store, "images", folder, "--label", "A", "--prompts", str(tmp_path / "a.jsonl"))
    before = files(store)
    assert do_import(store, "images", folder, "--label", "A", "--prompts", str(tmp_path / "b.jsonl")) == 0
    assert files(store) == before


def test_different_content_under_a_label_is_refused(tmp_path, capsys):
    """The error says what differs and what to do; --replace does it, and gc can then delete the old images."""
    store, other = tmp_path / "store", flowbp(tmp_path / "b", 0.1)
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "A")
    old, before = sweep(store)["runs"][0]["images"], files(store)
    assert do_import(store, "flowbp", other, "--label", "A") == 1
    assert "other content (images, scores); use --replace, or choose another --label" in capsys.readouterr().err
    assert files(store) == before
    assert do_import(store, "flowbp", other, "--label", "A", "--replace") == 0
    assert [run["label"] for run in sweep(store)["runs"]] == ["A"]
    assert f"images {old}" in [item.what for item in cleanup.unused(Store(store))]


def test_imported_files_are_in_use(tmp_path, capsys):
    """gc finds nothing to delete; status shows every row as done."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "A", "-e", "bright")
    do_import(store, "geneval", geneval(tmp_path / "b"), "--label", "B", "--seed", "3")
    assert cleanup.unused(Store(store)) == []
    capsys.readouterr()
    assert alignbench("status", store=store, plugin=False) == 0
    assert "imported: 2 done" in capsys.readouterr().out


def test_concurrent_imports_lose_no_row(tmp_path):
    """Four at once into one sweep: four rows."""
    folders = [flowbp(tmp_path / name, i / 10) for i, name in enumerate("abcd")]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(import_flowbp, tmp_path / "store", f) for f in folders]:
            done.result()
    assert sorted(sweep(tmp_path / "store")["cases"]) == ["a", "b", "c", "d"]


def import_flowbp(store: Path, folder: Path, *evaluators: Any) -> None:
    request = import_rows.ImportRequest("flowbp", folder, folder.name, "imported", "")
    import_rows.import_row(Store(store), request, evaluators, Registry())


@pytest.mark.parametrize("after", [0, 13, 25, 31, 38])  # images, their table, scores, the sweep
def test_a_kill_leaves_nothing_half_made(tmp_path, monkeypatch, after):
    """Killed at any file, an import leaves no row, and the next one makes the same store as an undisturbed one."""
    folder, store, whole = flowbp(tmp_path / "eval"), tmp_path / "store", tmp_path / "whole"
    do_import(whole, "flowbp", folder, "--label", "A")
    written = [0]

    def flush(path: Path) -> None:
        written[0] += 1
        if written[0] > after:
            raise KeyboardInterrupt

    monkeypatch.setattr("alignbench.store.files.flush", flush)
    assert do_import(store, "flowbp", folder, "--label", "A") == 130
    monkeypatch.undo()
    assert Store(store).manifests() == []
    assert do_import(store, "flowbp", folder, "--label", "A") == 0
    content = [{name: data for name, (_, data) in files(root).items()} for root in (store, whole)]
    assert content[0] == content[1]


# ---- what is not known


def test_what_is_not_stated_is_unknown(tmp_path):
    """Costs, seeds, roles and settings are shown as unknown, neither zero nor guessed."""
    store = tmp_path / "store"
    do_import(store, "geneval", geneval(tmp_path / "a"), "--label", "Base", "--base")
    do_import(store, "geneval", geneval(tmp_path / "b"), "--label", "A")
    text = report(store)
    costs = pd.read_csv(store.parent / "report/imported-costs.csv").set_index("label")
    assert costs.loc["A", ["images", "seconds", "nfe_grad"]].isna().all()
    assert (costs.loc["Base", ["images", "seconds", "nfe_grad"]] == 0).all()
    assert "The cost of training is unknown." in text
    assert "[unknown]" in section(text, "Results")
    protocol = section(text, "Protocol")
    for setting in (
        "training seeds",
        "evaluation, steps",
        "evaluation, guidance",
        "evaluation, seed",
        "training reward",
    ):
        assert f"- {setting}: unknown" in protocol
    assert "- evaluation, size: 32" in protocol  # measured
    assert "**One training run of unknown seed: every interval and verdict speaks of the weights" in text
    assert "same prompt, noise unknown" in text
    assert "same noise" not in text
    frame = pd.read_csv(store.parent / "report/imported.csv")
    assert frame[(frame["role"] == "cost") & (frame["method"] == "A")]["mean"].isna().all()


@pytest.mark.slow
def test_intervals_are_computed_from_the_imported_scores(tmp_path):
    """Mean and interval are ``stats.mean_interval`` of the file's numbers; the change is that of their pairs."""
    store, folders = tmp_path / "store", [flowbp(tmp_path / "a"), flowbp(tmp_path / "b", 0.1)]
    do_import(store, "flowbp", folders[0], "--label", "Base", "--base")
    do_import(store, "flowbp", folders[1], "--label", "B")
    report(store)
    frame = pd.read_csv(store.parent / "report/imported.csv").set_index(["method", "metric"])
    cubes = []
    for folder in folders:
        rows = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]
        by_id = sorted(rows, key=lambda row: (prompt_id(row["prompt"]), row["img_idx"]))
        cubes.append(np.reshape([row["hpsv2"] for row in by_id], (len(TEXTS), 2, 1)))
    mean, change = stats.mean_interval(cubes[1]), stats.paired_difference(cubes[1], cubes[0])
    row = frame.loc[("B", "hpsv2.1 (flowbp)")]
    assert np.allclose([row["mean"], row["lo"], row["hi"]], mean[:3])
    assert np.allclose([row["change"], row["change_lo"], row["change_hi"]], change[:3], equal_nan=True)


@pytest.mark.slow
def test_numbered_imports_are_training_seeds(tmp_path):
    """Three imports with seeds are one row of three training runs, without the warning for a single run."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "base"), "--label", "Base", "--base")
    for seed in range(3):
        assert (
            do_import(
                store, "flowbp", flowbp(tmp_path / str(seed), 0.1 + seed / 20), "--label", "A", "--seed", str(seed)
            )
            == 0
        )
    text = report(store)
    assert "training seeds: 0, 1, 2" in text
    assert "one training" not in text.lower()
    assert "The cost of training is unknown." in text
    frame = pd.read_csv(store.parent / "report/imported.csv").set_index(["method", "metric"])
    assert frame.loc[("A", "hpsv2.1 (flowbp)"), "seeds"] == 3
    assert frame.loc[("A", "hpsv2.1 (flowbp)"), "change"] == pytest.approx(0.15)


def test_stated_settings_are_marked_as_stated(tmp_path):
    """--protocol sets what the file leaves open, and the page says that the importer stated it."""
    store = tmp_path / "store"
    do_import(store, "geneval", geneval(tmp_path / "a"), "--label", "A", "--protocol", "steps=50,guidance=3.5")
    text = report(store)
    assert "steps = 50 (as stated by the importer); guidance = 3.5 (as stated by the importer)" in text
    assert "size = 32 (measured on the images)" in text
    assert "unknown: prompts, weights, seed" in text


@pytest.mark.slow
def test_a_stated_reward_decides_the_roles(tmp_path):
    """The reward's column is [train], by another project's port too; others are [held-out] if all rows state theirs."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "Base", "--base")
    do_import(store, "flowbp", flowbp(tmp_path / "b", 0.1), "--label", "B", "--trained-on", "hpsv2.1")
    assert "HPSv2.1 (flowbp), cosine ↑ [train] | PickScore (flowbp), logit / 26 ↑ [held-out]" in report(store)
    do_import(store, "flowbp", flowbp(tmp_path / "c", 0.2), "--label", "C")
    assert "PickScore (flowbp), logit / 26 ↑ [unknown]" in report(store)


def test_differing_settings_are_listed_row_by_row(tmp_path):
    """A setting that differs between rows is shown for each row instead of for the sweep."""
    store = tmp_path / "store"
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "A")
    do_import(store, "flowbp", flowbp(tmp_path / "b", num_steps=28), "--label", "B")
    protocol = section(report(store), "Protocol")
    assert "- evaluation, steps: differs" in protocol
    assert "- **but A**: steps = 50" in protocol
    assert "- **but B**: steps = 28" in protocol


# ---- bad input


def lines(*items: Any) -> str:
    return "\n".join(item if isinstance(item, str) else json.dumps(item) for item in items) + "\n"


ROW = {"prompt_idx": 0, "img_idx": 0, "prompt": "a ring", "image": "x.png", "hpsv2": 0.3}
LINE = {"image": "p00000_s0.png", "prompt": "a ring", "scores": {"hpsv3/hpsv3": 1.0}}
RESULT = {"filename": "00000/samples/0000.png", "tag": "colors", "prompt": "a ring", "correct": True, "metadata": "{}"}


def table(*rows: Any, **changes: Any) -> str:
    return json.dumps({"reward_names": ["hpsv2"], "scores": list(rows), **changes})


def but(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (row | changes).items() if value is not ...}


BAD = {  # mistake: (kind, content of the file, error message)
    "cut off": ("flowbp", table(ROW)[:-9], r"scores.json: not JSON: .*; was it cut off"),
    "an empty file": ("flowbp", "", "scores.json: not JSON"),
    "meta.json": ("flowbp", json.dumps([ROW]), 'not a scores.json of FlowBP: expected an object with a list "scores"'),
    "no rows": ("flowbp", table(), "not a scores.json of FlowBP"),
    "no scorer": ("flowbp", table(ROW, reward_names=[]), "no scorers are named"),
    "no prompt": ("flowbp", table(but(ROW, prompt=...)), r'scores.json: scores\[0\]: "prompt" is missing'),
    "a prompt of numbers": ("flowbp", table(but(ROW, prompt=7)), r'scores\[0\]: "prompt": expected text, got 7'),
    "an empty prompt": ("flowbp", table(but(ROW, prompt="  ")), r"scores\[0\]: the prompt is empty"),
    "half a surrogate": ("flowbp", table(but(ROW, prompt="a \ud800")), r"scores\[0\]: the control character U\+D800"),
    "an index of text": ("flowbp", table(but(ROW, img_idx="0")), r'"img_idx": expected a whole number, got \'0\''),
    "a negative index": ("flowbp", table(but(ROW, prompt_idx=-1)), r'"prompt_idx": expected a whole number, got -1'),
    "a score of text": ("flowbp", table(but(ROW, hpsv2="0.3")), r"scores\[0\].hpsv2: expected a number, got '0.3'"),
    "a row twice": ("flowbp", table(ROW, ROW), "'a ring', image 0, appears twice"),
    "an image of two prompts": (
        "flowbp",
        table(ROW, but(ROW, prompt_idx=1, prompt="a cross")),
        "x.png is the image of 2 entries",
    ),
    "a row of text": ("flowbp", table("x"), r"scores\[0\]: expected an object"),
    "not UTF-8": ("flowbp", b'{"scores": "\xff"}', r"scores.json: not UTF-8 text \(byte 12\)"),
    "a line that is no JSON": ("unirl", lines(LINE, "nan?"), "scores.jsonl:2: not JSON"),
    "a last line cut off": ("unirl", lines(LINE) + json.dumps(LINE)[:20], "scores.jsonl:2: not JSON: .*cut off"),
    "no line": ("unirl", "\n", "scores.jsonl: the file is empty"),
    "no score at all": ("unirl", lines(but(LINE, scores=None)), "no line has a score"),
    "a list of scores": ("unirl", lines(but(LINE, scores=[1])), '"scores": expected an object of numbers, or null'),
    "another name": (
        "unirl",
        lines(but(LINE, image="a.png")),
        r"expected a name like p<prompt>_s<sample>.png, got 'a.png'",
    ),
    "an image twice": ("unirl", lines(LINE, LINE), "appears twice"),
    "no verdict": ("geneval", lines(but(RESULT, correct=None)), '"correct": expected true or false, got None'),
    "no task": ("geneval", lines(but(RESULT, tag=...)), 'results.jsonl:1: "tag" is missing'),
    "another layout": (
        "geneval",
        lines(but(RESULT, filename="a.png")),
        r"expected a path like 00000/samples/0000.png, got 'a.png'",
    ),
    "bad metadata": ("geneval", lines(but(RESULT, metadata="{")), '"metadata": expected JSON in a string'),
}
FILES = {"flowbp": "scores.json", "unirl": "scores.jsonl", "geneval": "results.jsonl"}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(case, tmp_path, capsys):
    """The error says where, what and what instead; the exit code is 1; no store is made."""
    kind, content, expected = BAD[case]
    (tmp_path / FILES[kind]).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    assert do_import(tmp_path / "store", kind, tmp_path, "--label", "A") == 1
    refused(capsys, expected)
    assert not (tmp_path / "store").exists()


def refused(capsys: Any, expected: str) -> None:
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(expected, error), error


OPTIONS = {  # mistake: (options, error message)
    "a negative seed": (["--seed", "-1"], "--seed -1: number training runs 0, 1"),
    "a base with a seed": (["--base", "--seed", "0"], "--base: this is the model before any training"),
    "a label of nothing": (["--label", " "], "--label ' ': give the row a name"),
    "a label of two lines": (["--label", "a\nb"], "give the row a name, on one line"),
    "a label that looks like another": (["--label", "A "], "--label 'A ': tables would not show its extra spaces"),
    "a sweep that is a path": (["--sweep", "../x"], "--sweep '../x': becomes a file name"),
    "a sweep of ours": (
        ["--sweep", "quickstart"],
        "--sweep quickstart: this name belongs to a sweep that alignbench runs",
    ),
    "an unknown setting": (
        ["--protocol", "step=50"],
        "--protocol step=50: write setting=value,...; the settings are steps, guidance",
    ),
    "a setting without value": (["--protocol", "steps"], "--protocol steps: write setting=value"),
    "half a step": (["--protocol", "guidance=1,steps=2.5"], r"--protocol.steps: expected a whole number"),
    "no steps": (["--protocol", "weights=mean"], r"--protocol.weights: .*choose one of ema, last"),
    "what the file denies": (["--protocol", "steps=28"], "--protocol steps=28: .* says 50; leave it out"),
    "a size that the file denies": (["--protocol", "size=64"], "--protocol size=64: .* says 32; leave it out"),
    "a list without the prompts": (["--prompts", "shapes/test"], "'a red circle' is not in --prompts shapes/test"),
    "an unknown evaluator": (["-e", "brigt"], "-e brigt: there is no such evaluator or metric; did you mean 'bright'"),
    "a setting of none": (
        ["bright.power=2"],
        "bright.power=2: there is no evaluator for this setting; name one with -e",
    ),
    "a check without metadata": (["-e", "geneval", "geneval.detector=shapes"], "GenEval|geneval|include"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_one_line(case, tmp_path, capsys):
    """The error comes before anything is written."""
    options, expected = OPTIONS[case]
    label = [] if "--label" in options else ["--label", "A"]
    assert do_import(tmp_path / "store", "flowbp", flowbp(tmp_path / "eval"), *label, *options) == 1
    refused(capsys, expected)
    assert not (tmp_path / "store").exists()


def test_a_stated_size_that_the_images_contradict_is_refused(tmp_path, capsys):
    """--protocol size=64 for images of 32 pixels is an error."""
    folder = geneval(tmp_path / "out")
    assert do_import(tmp_path / "store", "geneval", folder, "--label", "A", "--protocol", "size=64") == 1
    refused(capsys, "--protocol size=64: the images are 32 pixels; leave it out")


def test_a_size_that_contradicts_the_file_is_a_remark(tmp_path, capsys):
    """FlowBP reuses images that exist already: they may come from another run than the scores."""
    folder = flowbp(tmp_path / "eval", width=720, height=720)
    assert do_import(tmp_path / "store", "flowbp", folder, "--label", "A") == 0
    remark = "the images are 32 pixels, but its file says 720: are they the scored images?"
    assert remark in capsys.readouterr().out


def test_a_label_has_numbered_seeds_or_one_unknown_seed(tmp_path, capsys):
    """Mixing both under a label is refused, as one kind would be left out of the mean; --replace allows it."""
    store, other = tmp_path / "store", flowbp(tmp_path / "b", 0.1)
    do_import(store, "flowbp", flowbp(tmp_path / "a"), "--label", "A")
    assert do_import(store, "flowbp", other, "--label", "A", "--seed", "0") == 1
    refused(capsys, "--label A: has training runs with a seed and one without; number them all")
    assert do_import(store, "flowbp", other, "--label", "A", "--seed", "0", "--replace") == 0
    assert [run["seed"] for run in sweep(store)["runs"]] == [0]


PROMPTS = {  # mistake: (content of the list, error message)
    "another length": ("a\nb\nc\nd\ne\n", "12 images cannot be divided equally among the 5 prompts"),
    "an empty prompt": ("a ring\n\na disc\n", "--prompts: .*list.txt:2: the prompt is empty"),
    "not UTF-8": (b"a\xff\n", "list.txt: not UTF-8 text"),
    "nothing": ("", "list.txt: the file is empty"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_bad_list_is_one_line(case, tmp_path, capsys):
    """Images whose prompts are unclear are refused before anything is written."""
    content, expected = PROMPTS[case]
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    folder = flowbp(tmp_path / "eval")
    options = ["--prompts", str(tmp_path / "list.txt"), "--label", "A"]
    assert do_import(tmp_path / "store", "images", folder, *options) == 1
    refused(capsys, expected)
    assert not (tmp_path / "store").exists()


def test_metadata_that_is_not_utf8_is_one_line(tmp_path, capsys):
    """A metadata.jsonl of GenEval's layout that is not UTF-8 is a one-line error."""
    folder = geneval(tmp_path / "out")
    (folder / "00000/metadata.jsonl").write_bytes(b"\xff\xfe")
    assert do_import(tmp_path / "store", "images", folder, "--label", "A") == 1
    refused(capsys, "metadata.jsonl: not UTF-8 text")


def test_a_geneval_run_read_as_images_or_as_scores_has_the_same_prompts(tmp_path):
    """Its folder read as images and its results give the same prompts, indices and files."""
    folder = geneval(tmp_path / "out")
    as_images, as_scores = (
        {(image.prompt.id, image.prompt.tag, image.image_index, image.file) for image in read(kind, folder).images}
        for kind in ("images", "geneval")
    )
    assert as_images == as_scores


def test_a_list_supplies_the_prompts_tags(tmp_path):
    """FlowBP's and UniRL's files have no tags: --prompts supplies them by the text, whatever the spaces."""
    items = [{"prompt": f"{text}", "tag": tag} for text, tag in zip(TEXTS, TASKS)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    folder = flowbp(tmp_path / "eval", texts=[f" {text.replace(' ', '  ')}" for text in TEXTS])
    images = read("flowbp", folder, str(tmp_path / "list.jsonl")).images
    assert [image.prompt.tag for image in images] == [tag for tag in TASKS for _ in range(2)]
    assert [image.prompt.id for image in images] == [prompt_id(text) for text in TEXTS for _ in range(2)]


def test_a_paired_evaluator_is_refused(tmp_path):
    """It compares images of the same noise, which is unknown for imported images."""
    with pytest.raises(UserError, match="-e base_distance: compares with the base model's images of the same noise"):
        import_flowbp(tmp_path / "store", flowbp(tmp_path / "eval"), SimpleNamespace(name="base_distance", paired=True))


@pytest.mark.slow
def test_importing_does_not_load_torch(tmp_path):
    """Without -e, `alignbench import` does not load torch."""
    folder = flowbp(tmp_path / "eval")
    words = ["import", "flowbp", str(folder), "--label", "A", "--store", str(tmp_path / "store")]
    code = (
        f"import sys; from alignbench.cli import main; code = main({words}); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_image_that_changes_during_the_import_is_noticed(tmp_path, monkeypatch):
    """The bytes that were inspected are the bytes that are kept."""
    folder = flowbp(tmp_path / "eval")
    inspect = import_rows._inspect

    def inspect_and_change(file: Path) -> import_rows.Inspection:
        inspection = inspect(file)
        draw(file, 250)
        return inspection

    monkeypatch.setattr(import_rows, "_inspect", inspect_and_change)
    with pytest.raises(UserError, match="the file changed during the import"):
        import_flowbp(tmp_path / "store", folder)
    assert not (tmp_path / "store/sweeps").exists()

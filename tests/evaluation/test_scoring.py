"""Scoring any folder of images: what a bad image costs, what is written, what is said."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.image_folders import draw
from support.tiny_sweep import PLUGIN

from alignbench.cli import main
from alignbench.evaluation.folders import FolderImage, folder_images
from alignbench.evaluation.scoring import PER_PASS, Kept, make_evaluators, passes, score_images, score_rows
from alignbench.evaluator import Evaluator, Metric
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, prompt_id
from alignbench.reporting.score_summary import summary
from alignbench.testing.evaluator_contract import random_image


class Mean(Evaluator):
    """Mean brightness; fails for every call with an image that is ``bad`` pixels wide."""

    name = "mean"
    version = "1"
    metrics = (Metric("mean", "levels"),)
    bad: int = -1

    def score(self, images, prompts):
        if any(image.width == self.bad for image in images):
            raise RuntimeError("cannot look at this")
        return pd.DataFrame({"mean": [float(np.asarray(image).mean()) for image in images]})


# ---- scores


def test_bad_files_do_not_cost_others_their_scores(listed):
    """Truncated, empty and non-image files are marked with the reason; RGBA, grey, 1 x 1 and large ones are scored."""
    folder = listed / "images"
    random_image(40, 30, 0).save(folder / "0-good.png")
    random_image(40, 30, 1).convert("RGBA").save(folder / "1-alpha.png")
    random_image(40, 30, 2).convert("L").save(folder / "2-grey.png")
    Image.new("RGB", (1, 1)).save(folder / "3-small.png")
    Image.new("RGB", (3000, 2000)).save(folder / "4-large.png")
    (folder / "5-cut.png").write_bytes((folder / "0-good.png").read_bytes()[:200])
    (folder / "6-empty.png").write_bytes(b"")
    (folder / "7-text.png").write_text("hello")
    chosen = [FolderImage(file, Prompt("p", "p"), i) for i, file in enumerate(sorted(folder.iterdir()))]
    frame = score_images(Mean(), chosen, Kept(listed / "kept"))
    assert frame["ok"].tolist() == [True] * 5 + [False] * 3
    assert frame["mean"].notna().tolist() == frame["ok"].tolist()
    assert frame["error"][5:].str.startswith("cannot be read: ").all()
    assert frame["error"][:5].isna().all()


def test_an_evaluator_that_fails_for_one_image(listed):
    """Only that image is lost, alone in its pass too; if the evaluator fails for a plain image, its error is raised."""
    images = [Image.new("RGB", (size, 4), (9, 9, 9)) for size in (4, 5, 6)]
    prompts = [Prompt("p", "p")] * 3
    frame = score_rows(Mean(bad=5), images, prompts)
    assert frame["ok"].tolist() == [True, False, True]
    assert frame["error"][1] == "RuntimeError: cannot look at this"
    alone = score_rows(Mean(bad=5), images[1:2], prompts[:1])
    assert alone["error"].tolist() == ["RuntimeError: cannot look at this"]
    with pytest.raises(RuntimeError, match="cannot look"):
        score_rows(Mean(bad=512), [Image.new("RGB", (512, 4))], prompts[:1])


def test_answers_and_errors_of_a_judge_are_kept():
    """An evaluator's "raw" and "error" columns are kept, the error only where there is no score."""

    class Judge(Mean):
        def score(self, images, prompts):
            return pd.DataFrame({"mean": [1.0, float("nan")], "raw": ["one", "??"], "error": ["", "no number in it"]})

    frame = score_rows(Judge(), [Image.new("RGB", (4, 4))] * 2, [Prompt("p", "p")] * 2)
    assert frame["raw"].tolist() == ["one", "??"]
    assert frame["error"].tolist() == [None, "no number in it"]


def test_passes_keep_a_prompts_images_together():
    """Slices cover all rows in order, hold at most PER_PASS, and cut between prompts."""
    prompts = [str(i) for i in range(100) for _ in range(5)]
    slices = list(passes(Mean(), prompts, [1] * 500))
    assert [i for part in slices for i in range(500)[part]] == list(range(500))
    assert all(part.stop - part.start <= PER_PASS for part in slices)
    assert all(prompts[part.stop - 1] != prompts[part.stop] for part in slices[:-1])
    assert list(passes(Mean(), ["a"] * (PER_PASS + 1), [1] * (PER_PASS + 1))) == [slice(0, 128), slice(128, 129)]
    assert list(passes(Mean(), [], [])) == []


def test_passes_are_bounded_by_pixels_and_seconds():
    """24 images of 4096 x 4096 are read 8 at a time; a judge of 8 s an image answers 64 before they are written."""

    class Slow(Mean):
        seconds_per_image = 8.0

    class Together(Mean):
        by_prompt = True

    assert [part.stop for part in passes(Mean(), ["a"] * 24, [2**24] * 24)] == [8, 16, 24]
    assert [part.stop for part in passes(Slow(), ["a"] * 130, [1] * 130)] == [64, 128, 130]
    assert [part.stop for part in passes(Together(), ["a"] * 24 + ["b"], [2**24] * 25)] == [24, 25]


def test_images_of_one_prompt_are_scored_together(listed):
    """However the list orders its lines, an evaluator sees all images of a prompt at once."""

    class Count(Mean):
        def score(self, images, prompts):
            ids = [prompt.id for prompt in prompts]
            return pd.DataFrame({"mean": [float(ids.count(id)) for id in ids]})

    draw(listed / "images", ["0.png"])
    prompts = [Prompt(str(i), "") for i in range(PER_PASS // 2)]
    rounds = [FolderImage(listed / "images/0.png", prompt, j) for j in range(3) for prompt in prompts]
    frame = score_images(Count(), rounds, Kept(listed / "kept"))
    assert set(frame["mean"]) == {3.0}
    assert list(zip(frame["prompt_id"], frame["index"])) == [(prompt.id, j) for prompt in prompts for j in range(3)]


def test_the_summary_says_what_unequal_numbers_of_images_mean():
    """Prompts count alike: (1 + 0) / 2 of colors; images count alike in GenEval's own script: (3 + 0) / 4."""

    class Judge(Mean):
        metrics = (Metric("right", "fraction", by_task=True),)

    def said(ids, tags, right):
        about = {"file": "", "prompt_id": list(ids), "tag": tags, "index": range(len(ids)), "ok": True, "error": None}
        return summary([(Judge(), pd.DataFrame({**about, "right": right}))])

    uneven = said("aaabc", ["colors"] * 4 + ["counting"], [1.0, 1.0, 1.0, 0.0, 1.0])
    assert "| 0.750 " in uneven
    assert (
        "right, by task: prompts have 1 to 3 images and count alike; "
        "if every image counts alike, as in GenEval's own script, the mean is 0.875" in uneven
    )
    assert "count alike" not in said("aabbcc", ["colors"] * 4 + ["counting"] * 2, 1.0)


def test_the_summary_counts_what_failed(listed):
    """Means are over the images that have a score; the others are counted."""
    draw(listed / "images", [f"{i}_{j}.png" for i in range(3) for j in range(2)])
    (listed / "images" / "2_1.png").write_bytes(b"")
    chosen = folder_images(listed / "images", str(listed / "list.txt"))
    evaluator = Mean()
    line = summary([(evaluator, score_images(evaluator, chosen, Kept(listed / "kept")))]).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["6", "1", "3", "0"]
    assert "46.667" in line  # (10 + 50 + 80) / 3: the last prompt's mean is that of its valid image


def test_the_summary_says_why_a_number_is_unknown():
    """Without a valid image, or without one of a task, there is no mean; from one prompt there is no interval."""

    class Judge(Mean):
        metrics = (Metric("mean", "levels"), Metric("right", "fraction", by_task=True))

    def said(tags, ok):
        about = {"file": "", "prompt_id": [str(i) for i in range(len(tags))], "tag": tags, "index": 0, "error": None}
        scores = {name: np.where(ok, 0.5, np.nan) for name in ("mean", "right")}
        return summary([(Judge(), pd.DataFrame({**about, **scores, "ok": ok}))])

    assert "mean: no interval, since the list has too few prompts (1)" in said(["counting"], True)
    assert "right, by task: no interval, since counting has too few prompts (1)" in said(["counting"], True)
    assert "mean: no mean, since no image has a score" in said(["counting", "colors"], False)
    partly = said(["counting"] * 8 + ["colors"], [True] * 8 + [False])
    assert "right, by task: no mean, since no image of colors has a score" in partly
    assert "nan" not in partly


def test_a_repeated_prompt_is_one_prompt_with_more_images(tmp_path):
    """Two of GenEval's folders have the same prompt: all images are scored, as those of one prompt."""
    for number, text in enumerate(["a ring", "a cross", "a ring"]):
        (tmp_path / f"{number:05}").mkdir()
        (tmp_path / f"{number:05}/metadata.jsonl").write_text(json.dumps({"prompt": text, "tag": "single_object"}))
        draw(tmp_path / f"{number:05}/samples", ["0000.png", "0001.png"])
    images = folder_images(tmp_path)
    assert sorted((image.prompt.text, image.image_index) for image in images) == [
        *(("a cross", i) for i in range(2)),
        *(("a ring", i) for i in range(4)),
    ]
    line = summary([(Mean(), score_images(Mean(), images, Kept(tmp_path / "kept")))]).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["6", "0", "2", "0"]


# ---- the verb


def run(*words, capsys):
    code = main(["score", *map(str, words), "--plugin", PLUGIN])
    return code, capsys.readouterr()


def test_score_writes_a_table_and_what_made_it(listed, capsys):
    """One row per image and metric, settings and hashes beside it, exit code 2 if an image could not be scored."""
    draw(listed / "images", [f"{i}.png" for i in range(3)])
    words = [listed / "images", "--prompts", listed / "list.txt", "-e", "bright"]
    code, shown = run(*words, "--out", listed / "out.csv", capsys=capsys)
    assert code == 0
    assert "brightness, fraction" in shown.out
    table = pd.read_csv(listed / "out.csv")
    assert table["score"].tolist() == pytest.approx([0, 20 / 255, 40 / 255])
    assert table["metric"].tolist() == ["brightness"] * 3
    made = json.loads((listed / "out.json").read_text())
    assert made["bright"]["settings"]["power"] == 1.0
    (listed / "images" / "1.png").write_bytes(b"")
    code, _ = run(*words, "bright.power=2.0", "--out", listed / "out.parquet", capsys=capsys)
    assert code == 2
    assert pd.read_parquet(listed / "out.parquet")["ok"].tolist() == [True, False, True]


@pytest.mark.slow
def test_score_goes_on_where_it_stopped(listed, capsys, monkeypatch):
    """What is scored is kept until nothing is missing: the same command asks only for the rest, and for new files."""
    draw(listed / "images", [f"{i}_{j}.png" for i in range(3) for j in range(2)])
    words = [listed / "images", "--prompts", listed / "list.txt", "-e", "away,bright", "--out", listed / "out.parquet"]
    monkeypatch.setenv("ALIGNBENCH_TEST_AWAY", "2")
    code, shown = run(*words, capsys=capsys)
    assert code == 2
    assert "alignbench: away: 2 of 6 images lack a score: nobody is there\n" in shown.err
    assert f"kept in {listed / 'out.parts'}; the same command scores only the rest" in shown.err
    monkeypatch.delenv("ALIGNBENCH_TEST_AWAY")
    Image.new("RGB", (9, 9), (7, 7, 7)).save(listed / "images" / "2_1.png")
    assert run(*words, capsys=capsys)[0] == 0
    table = pd.read_parquet(listed / "out.parquet").set_index("evaluator")
    assert table.loc["away", "raw"].tolist() == ["shown 3", "shown 3", "shown 6", "shown 6", "shown 6", "shown 3"]
    assert table.loc["bright", "score"].iloc[5] == pytest.approx(7 / 255)
    assert not (listed / "out.parts").exists()


@pytest.mark.slow
def test_an_evaluator_that_fails_costs_no_other_its_scores(listed, capsys, monkeypatch):
    """The others' table is written, the error comes last, and the same command continues."""
    draw(listed / "images", [f"{i}.png" for i in range(3)])
    words = [listed / "images", "--prompts", listed / "list.txt", "-e", "broken,away", "--out", listed / "out.csv"]
    monkeypatch.setenv("ALIGNBENCH_TEST_BROKEN", "1")
    with pytest.raises(RuntimeError, match="the judge is ill"):
        run(*words, capsys=capsys)
    assert pd.read_csv(listed / "out.csv")["evaluator"].tolist() == ["away"] * 3
    monkeypatch.delenv("ALIGNBENCH_TEST_BROKEN")
    monkeypatch.setenv("ALIGNBENCH_TEST_AWAY", "3")  # not asked again
    assert run(*words, capsys=capsys)[0] == 2  # broken gives no number for one image
    assert pd.read_csv(listed / "out.csv").groupby("evaluator")["ok"].sum().to_dict() == {"away": 3, "broken": 2}


@pytest.mark.parametrize("out", ["file/out.csv", "images/deep.csv", "taken.csv"])
def test_outputs_that_cannot_be_written_are_refused_first(listed, out, capsys):
    """Below a file, or where a folder is: one line, before anything is scored or written."""
    draw(listed / "images", [f"{i}.png" for i in range(3)])
    (listed / "file").write_text("mine")
    (listed / "images" / "deep.json").mkdir()
    (listed / "taken.csv").mkdir()
    before = sorted(listed.rglob("*"))
    words = [listed / "images", "--prompts", listed / "list.txt", "-e", "bright", "--out", listed / out]
    code, shown = run(*words, capsys=capsys)
    assert code == 1
    assert re.fullmatch(r"alignbench: .*cannot be written: .*\n", shown.err)
    assert sorted(listed.rglob("*")) == before


def test_a_metric_without_a_number_costs_no_other_metric(listed):
    """Alignment counts in its mean where style is missing: 1, 5, 5, 5 is 4."""

    class Judge(Mean):
        metrics = (Metric("align", "1-5"), Metric("style", "1-5"))

        def score(self, images, prompts):
            return pd.DataFrame({"align": [1.0, 5, 5, 5], "style": [3.0, float("inf"), *[float("nan")] * 2]})

    draw(listed / "images", [f"{i}.png" for i in range(4)])
    chosen = [FolderImage(file, Prompt(file.stem, "p"), 0) for file in sorted((listed / "images").iterdir())]
    frame = score_images(Judge(), chosen, Kept(listed / "kept"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary([(Judge(), frame)]).splitlines()]
    assert [row[1].split()[0] for row in rows[2:4]] == ["4.000", "3.000"]
    assert [row[3] for row in rows[2:4]] == ["0", "3"]
    assert frame["ok"].tolist() == [True, False, False, False]


def test_a_bad_image_is_left_out_of_its_prompt(listed):
    """An evaluator that compares the images of a prompt compares the others, in one call."""

    class Count(Mean):
        by_prompt = True

        def score(self, images, prompts):
            if any(image.width == self.bad for image in images):
                raise RuntimeError("cannot look at this")
            return pd.DataFrame({"mean": [float(sum(p.id == q.id for q in prompts)) for p in prompts]})

    draw(listed / "images", ["0.png", "1.png"])
    Image.new("RGB", (5, 8)).save(listed / "images" / "2.png")
    chosen = [FolderImage(listed / f"images/{i}.png", Prompt(str(i % 2), "p"), i // 2) for i in (0, 1, 2, 1, 0)]
    chosen = [image._replace(image_index=i) for i, image in enumerate(chosen)]
    frame = score_images(Count(bad=5), chosen, Kept(listed / "kept"))
    assert frame["prompt_id"].tolist() == ["0", "0", "0", "1", "1"]
    assert frame["mean"].tolist()[::2] == [2, 2, 2]
    assert frame["error"].dropna().to_dict() == {1: "RuntimeError: cannot look at this"}


def test_score_gives_every_prompt_its_own_image(listed, capsys):
    """Prompt 2 has the score of 2.png, not that of 10.png, and the console shows how images were paired."""
    draw(listed / "images", [f"{i}.png" for i in range(12)])
    words = [listed / "images", "--prompts", listed / "twelve.txt", "-e", "bright", "--out", listed / "out.csv"]
    code, shown = run(*words, capsys=capsys)
    assert code == 0
    scores = pd.read_csv(listed / "out.csv").set_index("prompt_id")["score"]
    assert [scores[prompt_id(f"thing {i}")] for i in range(12)] == pytest.approx([20 * i / 255 for i in range(12)])
    assert "images: paired by the numbers in the names of the images: 0.png with 'thing 0', 1.png with" in shown.err
    draw(listed / "images", ["grid.png"])
    code, shown = run(*words, capsys=capsys)
    assert code == 1
    assert "grid.png: its name is formed unlike the others'" in shown.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-e", "brigt"], "did you mean 'bright'"),
        (["-e", "bright", "bright.powr=2"], "did you mean 'power'"),
        (["-e", "bright", "hpsv2.weights=shapes"], "write <evaluator>.<setting>=<value>; the evaluators are bright"),
        (["-e", "bright", "--out", "scores.xlsx"], "ends in .csv or .parquet"),
        (["-e", "bright", "--prompts", "hpdv2/test"], "hf download --repo-type dataset ymhao/HPDv2 test.json"),
    ],
)
def test_mistakes_are_one_line(listed, words, says, capsys, monkeypatch):
    """The exit code is 1, the error is one line, and nothing is written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    before = sorted(listed.rglob("*"))
    prompts = [] if "--prompts" in words else ["--prompts", listed / "list.txt"]
    code, shown = run(listed / "images", *prompts, *words, capsys=capsys)
    assert code == 1
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert sorted(listed.rglob("*")) == before


def test_evaluators_are_named_by_evaluator_or_metric():
    """hpsv2.1 is hpsv2's metric; either name makes the evaluator, with its settings."""
    registry = Registry([PLUGIN])
    for word in ("hpsv2", "hpsv2.1"):
        (evaluator,) = make_evaluators(registry, word, ["hpsv2.weights=shapes"])
        assert (evaluator.name, evaluator.weights) == ("hpsv2", "shapes")

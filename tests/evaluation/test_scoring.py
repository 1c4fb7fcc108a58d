"""Scoring anybody's pictures: which belongs to which prompt, what a bad one costs, and what is written down."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.tiny_sweep import PLUGIN

from alignbench.cli import main
from alignbench.config import UserError
from alignbench.evaluation.folders import Picture, pictures
from alignbench.evaluation.scoring import PER_PASS, judges, passes, score_pictures, score_rows
from alignbench.evaluator import Evaluator, Metric
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, prompt_id
from alignbench.reporting.score_summary import summary
from alignbench.testing.evaluator_contract import picture

TEXTS = ["a red circle", "two blue squares", "a green ring"]


class Mean(Evaluator):
    """Mean brightness; fails for whole passes that hold a picture of ``bad`` pixels."""

    name = "mean"
    version = "1"
    metrics = (Metric("mean", "levels"),)
    bad: int = -1

    def score(self, images, prompts):
        if any(image.width == self.bad for image in images):
            raise RuntimeError("cannot look at this")
        return pd.DataFrame({"mean": [float(np.asarray(image).mean()) for image in images]})


@pytest.fixture
def listed(tmp_path):
    """A prompt list, and a folder for pictures."""
    (tmp_path / "list.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "pictures").mkdir()
    return tmp_path


def draw(folder, names, size=8):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (20 * i,) * 3).save(path)


# ---- which picture belongs to which prompt


def test_in_the_order_of_their_names(listed):
    """Six pictures of three prompts: two each, prompt by prompt."""
    draw(listed / "pictures", [f"{i:03}.png" for i in range(6)])
    found = pictures(listed / "pictures", str(listed / "list.txt"))
    assert [(p.prompt.text, p.place) for p in found] == [(text, i) for text in TEXTS for i in range(2)]


def test_by_alignbenchs_own_names(listed):
    """<prompt id>-<index>.png, in any order and number."""
    names = [f"{prompt_id(TEXTS[2])}-0.png", f"{prompt_id(TEXTS[0])}-1.png", f"{prompt_id(TEXTS[0])}-0.png"]
    draw(listed / "pictures", names)
    found = {p.file.name: (p.prompt.text, p.place) for p in pictures(listed / "pictures", str(listed / "list.txt"))}
    assert found == dict(zip(names, [(TEXTS[2], 0), (TEXTS[0], 1), (TEXTS[0], 0)]))


def test_by_a_list_that_names_files(listed):
    """A .jsonl line has a prompt and its file; a prompt may come again."""
    draw(listed / "pictures", ["a.png", "b.png", "c.png"])
    lines = [{"prompt": TEXTS[i], "file": f"{name}.png"} for i, name in ((0, "b"), (1, "a"), (0, "c"))]
    (listed / "named.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = pictures(listed / "pictures", str(listed / "named.jsonl"))
    assert [(p.file.name, p.prompt.text, p.place) for p in found] == [
        ("b.png", TEXTS[0], 0),
        ("a.png", TEXTS[1], 0),
        ("c.png", TEXTS[0], 1),
    ]


def test_genevals_layout(listed):
    """00000/metadata.jsonl beside 00000/samples/*.png: no list is needed."""
    for i, text in enumerate(TEXTS):
        draw(listed / "pictures", [f"{i:05}/samples/{j:04}.png" for j in range(2)])
        metadata = {"prompt": text, "tag": "colors", "include": []}
        (listed / "pictures" / f"{i:05}" / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    found = pictures(listed / "pictures")
    assert [(p.prompt.text, p.prompt.tag, p.place) for p in found] == [
        (t, "colors", i) for t in TEXTS for i in range(2)
    ]
    assert found[0].prompt.metadata["include"] == []


@pytest.mark.parametrize(
    ("names", "prompts", "says"),
    [
        ([f"{i}.png" for i in range(5)], "list.txt", "5 pictures are no equal number for each of the 3 prompts"),
        (["notes.pdf"], "list.txt", "there are no pictures in it"),
        ([f"{'ab' * 6}-0.png"], "list.txt", "is not of a prompt of"),
        (["a.png"], None, "name the prompts with --prompts"),
    ],
)
def test_what_is_not_clear_is_refused(listed, names, prompts, says):
    """No picture is given to a prompt by guesswork."""
    for name in names:
        (listed / "pictures" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=says):
        pictures(listed / "pictures", prompts and str(listed / prompts))


def test_a_named_file_that_is_missing(listed):
    """With its line."""
    (listed / "named.jsonl").write_text(json.dumps({"prompt": "a", "file": "gone.png"}) + "\n")
    with pytest.raises(UserError, match=r"named.jsonl:1: .*gone.png is missing"):
        pictures(listed / "pictures", str(listed / "named.jsonl"))


# ---- scores


def test_bad_files_cost_no_other_its_score(listed):
    """Truncated, empty and no picture at all: marked with the reason; RGBA, grey, 1 x 1 and large ones are scored."""
    folder = listed / "pictures"
    picture(40, 30, 0).save(folder / "0-good.png")
    picture(40, 30, 1).convert("RGBA").save(folder / "1-alpha.png")
    picture(40, 30, 2).convert("L").save(folder / "2-grey.png")
    Image.new("RGB", (1, 1)).save(folder / "3-small.png")
    Image.new("RGB", (3000, 2000)).save(folder / "4-large.png")
    (folder / "5-cut.png").write_bytes((folder / "0-good.png").read_bytes()[:200])
    (folder / "6-empty.png").write_bytes(b"")
    (folder / "7-text.png").write_text("hello")
    chosen = [Picture(file, Prompt("p", "p"), i) for i, file in enumerate(sorted(folder.iterdir()))]
    frame = score_pictures(Mean(), chosen)
    assert frame["ok"].tolist() == [True] * 5 + [False] * 3
    assert frame["mean"].notna().tolist() == frame["ok"].tolist()
    assert frame["error"][5:].str.startswith("cannot be read: ").all()
    assert frame["error"][:5].isna().all()


def test_a_picture_that_would_fill_the_memory_is_not_opened(listed):
    """A file of a few kilobytes that claims 200 million pixels: marked, and its neighbour is scored."""
    folder = listed / "pictures"
    picture(40, 30, 0).save(folder / "0-good.png")
    Image.new("1", (20_000, 10_000)).save(folder / "1-bomb.png")
    assert (folder / "1-bomb.png").stat().st_size < 100_000
    chosen = [Picture(file, Prompt("p", "p"), i) for i, file in enumerate(sorted(folder.iterdir()))]
    frame = score_pictures(Mean(), chosen)
    assert frame["ok"].tolist() == [True, False]
    assert "exceeds limit" in frame["error"][1]


def test_an_evaluator_that_fails_for_one_picture(listed):
    """Only that picture is lost; if it fails for all of them, the error is raised."""
    images = [Image.new("RGB", (size, 4), (9, 9, 9)) for size in (4, 5, 6)]
    prompts = [Prompt("p", "p")] * 3
    frame = score_rows(Mean(bad=5), images, prompts)
    assert frame["ok"].tolist() == [True, False, True]
    assert frame["error"][1] == "RuntimeError: cannot look at this"
    with pytest.raises(RuntimeError, match="cannot look"):
        score_rows(Mean(bad=4), [images[0]] * 2, prompts[:2])


def test_answers_and_errors_of_a_judge_are_kept():
    """An evaluator's own "raw" and "error" columns come through, the error only where there is no score."""

    class Judge(Mean):
        def score(self, images, prompts):
            return pd.DataFrame({"mean": [1.0, float("nan")], "raw": ["one", "??"], "error": ["", "no number in it"]})

    frame = score_rows(Judge(), [Image.new("RGB", (4, 4))] * 2, [Prompt("p", "p")] * 2)
    assert frame["raw"].tolist() == ["one", "??"]
    assert frame["error"].tolist() == [None, "no number in it"]


def test_passes_do_not_part_a_prompts_pictures():
    """Slices cover all rows in order, hold at most PER_PASS, and cut between prompts."""
    prompts = [str(i) for i in range(100) for _ in range(5)]
    slices = list(passes(prompts))
    assert [i for part in slices for i in range(500)[part]] == list(range(500))
    assert all(part.stop - part.start <= PER_PASS for part in slices)
    assert all(prompts[part.stop - 1] != prompts[part.stop] for part in slices[:-1])
    assert list(passes(["a"] * (PER_PASS + 1))) == [slice(0, PER_PASS), slice(PER_PASS, PER_PASS + 1)]
    assert list(passes([])) == []


def test_the_summary_counts_what_failed(listed):
    """Means are over the pictures that have a score, with the number of those that have none."""
    draw(listed / "pictures", [f"{i}.png" for i in range(6)])
    (listed / "pictures" / "5.png").write_bytes(b"")
    chosen = pictures(listed / "pictures", str(listed / "list.txt"))
    evaluator = Mean()
    line = summary([(evaluator, score_pictures(evaluator, chosen))]).markdown().splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["6", "3", "1"]
    assert "46.6667" in line  # (10 + 50 + 80) / 3: the last prompt's mean is that of its valid picture


# ---- the verb


def run(*words, capsys):
    code = main(["score", *map(str, words), "--plugin", PLUGIN])
    return code, capsys.readouterr()


def test_score_writes_a_table_and_what_made_it(listed, capsys):
    """One row per picture and metric, settings and hashes beside it, exit code 2 if a picture could not be scored."""
    draw(listed / "pictures", [f"{i}.png" for i in range(3)])
    words = [listed / "pictures", "--prompts", listed / "list.txt", "-e", "bright"]
    code, shown = run(*words, "--out", listed / "out.csv", capsys=capsys)
    assert code == 0
    assert "brightness, fraction" in shown.out
    table = pd.read_csv(listed / "out.csv")
    assert table["score"].tolist() == pytest.approx([0, 20 / 255, 40 / 255])
    assert table["metric"].tolist() == ["brightness"] * 3
    made = json.loads((listed / "out.json").read_text())
    assert made["bright"]["settings"]["power"] == 1.0
    (listed / "pictures" / "1.png").write_bytes(b"")
    code, _ = run(*words, "bright.power=2.0", "--out", listed / "out.parquet", capsys=capsys)
    assert code == 2
    assert pd.read_parquet(listed / "out.parquet")["ok"].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-e", "brigt"], "did you mean 'bright'"),
        (["-e", "bright", "bright.powr=2"], "did you mean 'power'"),
        (["-e", "bright", "hpsv2.weights=shapes"], "write <evaluator>.<setting>=<value>, of bright"),
        (["-e", "bright", "--out", "scores.xlsx"], "ends in .csv or .parquet"),
        (["-e", "bright", "--prompts", "hpdv2/test"], "hf download --repo-type dataset ymhao/HPDv2 test.json"),
    ],
)
def test_mistakes_are_one_line(listed, words, says, capsys, monkeypatch):
    """Exit code 1, one line, and nothing written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw(listed / "pictures", ["0.png", "1.png", "2.png"])
    before = sorted(listed.rglob("*"))
    code, shown = run(listed / "pictures", "--prompts", listed / "list.txt", *words, capsys=capsys)
    assert code == 1
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert sorted(listed.rglob("*")) == before


def test_judges_are_named_by_evaluator_or_metric():
    """hpsv2.1 is hpsv2's metric; settings go to the evaluator by either name."""
    registry = Registry([PLUGIN])
    for word in ("hpsv2", "hpsv2.1"):
        (found,) = judges(registry, word, ["hpsv2.weights=shapes"])
        assert (found.name, found.weights) == ("hpsv2", "shapes")

"""A report of almost nothing is made like any other, and says what cannot be concluded."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from msgspec import structs
from support import fake_learning_curves
from support.report_tables import costs, draw_images, manifest, scores, stored, with_runs

from alignbench.reporting import report

TWO = ("base", "ReFL", "LeapAlign")


def sweep(root, labels=TWO, seeds=(0, 1), prompts=12, images=2, change=None, plan=None):
    """A store's results. ``change``: of the frame of scores; ``plan``: of the manifest, before scores are made."""
    made = structs.replace(manifest(seeds, labels), prompts=prompts)
    made = with_runs(made, lambda run: {"protocol": run.protocol | {"images_per_prompt": images}})
    made = structs.replace(made, protocol=made.protocol | {"images_per_prompt": images})
    made = plan(made) if plan else made
    draw_images(root, made, prompts)
    frame = scores(made, prompts, images)
    return stored(root, made, change(frame) if change else frame, costs(made))


def roles(role):
    return lambda plan: with_runs(
        plan, lambda run: {"scores": [structs.replace(score, role=role) for score in run.scores]}
    )


def other_seeds(plan):
    """LeapAlign's training seeds are 5 and 6."""
    return with_runs(plan, lambda run: {"seed": run.seed + 5} if run.label == "LeapAlign" else {})


def constant(frame, *labels):
    """One measure is the same everywhere, for all rows or for ``labels``."""
    mine = (frame["metric"] == "pickscore") & (frame["label"].isin(labels) if labels else True)
    return frame.assign(score=frame["score"].mask(mine, 0.5))


def as_base(frame):
    """Every row has base's scores."""
    key = ["metric", "prompt_id", "index"]
    base = frame[frame["label"] == "base"].set_index(key)["score"]
    return frame.assign(score=base.loc[pd.MultiIndex.from_frame(frame[key])].to_numpy())


def shifted(frame):
    """Every row differs from base by the same constant everywhere."""
    return as_base(frame).assign(score=lambda same: same["score"] + (same["label"] != "base") / 8)


CASES = {  # what is bad: (a store's results, a sentence of the page)
    "one prompt, one image, one method": (
        lambda root: sweep(root, TWO[:2], (0,), 1, 1),
        "One training seed",
    ),
    "one prompt": (lambda root: sweep(root, prompts=1), "spread unknown"),
    "two prompts": (lambda root: sweep(root, prompts=2), "spread unknown"),
    "one method": (lambda root: sweep(root, TWO[:2]), "the 2 seeds of one method, the only one here"),
    "the base model alone": (lambda root: sweep(root, TWO[:1]), "No summary over held-out measures"),
    "no base model": (lambda root: sweep(root, TWO[1:]), "no untrained method to compare with"),
    "no row of scores": (lambda root: sweep(root, change=lambda frame: frame.iloc[:0]), "0 of 48 scores"),
    "all scores missing": (lambda root: sweep(root, change=lambda f: f.assign(ok=False)), "0 of 48 scores"),
    "all scores nan": (lambda root: sweep(root, change=lambda f: f.assign(score=np.nan)), "not measured"),
    "infinite scores": (lambda root: sweep(root, change=lambda f: f.assign(score=np.inf)), "not measured"),
    "one row without scores": (
        lambda root: sweep(root, change=lambda f: f[f["label"] != "ReFL"]),
        "not measured",
    ),
    "base without scores": (lambda root: sweep(root, change=lambda f: f[f["label"] != "base"]), "not measured"),
    "a constant measure": (lambda root: sweep(root, change=constant), "PickScore (does not vary between prompts)"),
    "a measure constant for base": (
        lambda root: sweep(root, change=lambda f: constant(f, "base")),
        "PickScore (does not vary between prompts)",
    ),
    "rows that equal base": (lambda root: sweep(root, change=as_base), "no reward hacking shown"),
    "rows a constant away from base": (lambda root: sweep(root, change=shifted), "no reward hacking shown"),
    "an unknown role": (lambda root: sweep(root, plan=roles("unknown")), "none is known to be held out"),
    "a role that does not exist": (lambda root: sweep(root, plan=roles("jury")), "none is known to be held out"),
    "seeds that differ": (lambda root: sweep(root, plan=other_seeds), "training seeds: 0, 1 (ReFL); 5, 6 (LeapAlign)"),
    "seeds that differ, one each": (
        lambda root: sweep(root, seeds=(0,), plan=other_seeds),
        "training seeds: 0 (ReFL); 5 (LeapAlign)",
    ),
    "curves of one prompt": (
        lambda root: fake_learning_curves.made(root, (0,), 1, 1, labels=("Base", "ReFL")),
        "These curves are of one training run each",
    ),
    "curves of a prompt for each task": (
        lambda root: fake_learning_curves.made(root, (0, 1), 3, 1, labels=("Base", "ReFL", "DRTune")),
        "spread unknown",
    ),
}
FAST = ("one prompt, one image, one method", "all scores missing", "a constant measure", "curves of one prompt")
EMPTY = re.compile(r"(?<![\w.-])[-+−]?(nan|inf|infinity|none)(?![\w-])", re.IGNORECASE)
WIDTHLESS = re.compile(r"\[\s*([-+−$]*[\d.,]+?)\s*,\s*\1\s*\]")


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_bad_input_gives_a_page_that_says_what_cannot_be_concluded(case, tmp_path):
    """In every form: no traceback, no number that is none, no interval without width; and a sentence on what is
    unknown."""
    make, sentence = CASES[case]
    paths = report.build(make(tmp_path / "store"), tmp_path / "out")
    page = next(path for path in paths if path.suffix == ".md").read_text()
    assert sentence in " ".join(page.split())
    for path in paths:
        if path.suffix in (".png", ".parquet"):
            continue
        text = shown(path)
        lines = [line for line in text.splitlines() if "Traceback" in line or not_numbers(line)]
        assert not lines, f"{path.name}: {lines[:3]}"
        wide = WIDTHLESS.findall(text) + (widthless(path) if path.suffix == ".csv" else [])
        assert not wide, f"{path.name}: {wide[:3]}"


def not_numbers(line):
    return [word for word in EMPTY.findall(line) if word.lower() != "none"]


def shown(path):
    """Return the text of a file as a reader sees it: of a page without scripts, styles and drawings."""
    text = path.read_text()
    if path.suffix == ".svg":
        ET.fromstring(text)
        return " ".join(re.findall(r'\s(?:d|x|y|width|height|transform|points)="([^"]*)"', text))
    if path.suffix == ".html":
        text = re.sub(r"(?s)<(script|style|svg)\b.*?</\1>", "", text)
        text = re.sub(r"<[^>]+>", "", text)
    return text


def widthless(path):
    """Return (row, column) of the intervals of a table whose limits are one number."""
    frame = pd.read_csv(io.StringIO(path.read_text()))
    pairs = [("lo", "hi"), ("change_lo", "change_hi"), ("improved_lo", "improved_hi")]
    pairs += [("difference_lo", "difference_hi")]
    return [
        (*frame.loc[row, frame.columns[:2]], lo)
        for lo, hi in pairs
        if lo in frame
        for row in frame.index[frame[lo] == frame[hi]]
    ]

"""The numbers in docs/scaling.md follow from its formulas and the measured figures."""

from __future__ import annotations

import json
import re
from math import ceil
from pathlib import Path

import pytest
from support.tiny_sweep import alignbench

from alignbench.backends.cost.formulas import Model
from alignbench.backends.cost.published_configs import FLUX_1_DEV
from alignbench.backends.flux import Flux

ROOT = Path(__file__).parents[2]
ROWS = {row["what"]: row for row in json.loads((ROOT / "benchmarks/results/gpu-h200.json").read_text())["rows"]}
PAGE = (ROOT / "docs/scaling.md").read_text()
S = ROWS["LeapAlign, 720 px, batch 1"]["value"]
E = ROWS["evaluation image, 720 px, 50 steps, decoded and scored"]["value"]
DEV = Model.read(FLUX_1_DEV).transformer
B, U, V, R, BANDWIDTH = 64, 300, 1600, 1000, 350e9
PARAMETERS = {False: DEV.adapters(Flux().lora_targets, Flux().lora_rank), True: DEV.parameters}


def seconds(full: bool) -> float:
    """Return the seconds per sample: 25 forwards, two of them recomputed, and two backwards."""
    tokens = Model.read(FLUX_1_DEV).tokens(720, 512)
    adapters, flops = (27 * DEV.forward(tokens) + 2 * DEV.backward(tokens, each) for each in (False, full))
    return S * flops / adapters


def update(gpus: int, full: bool) -> float:
    return ceil(B / gpus) * seconds(full) + 2 * (gpus - 1) / gpus * 4 * PARAMETERS[full] / BANDWIDTH


@pytest.mark.parametrize("gpus", [1, 8, 16, 64])
def test_one_training_run(gpus):
    """The row of that many GPUs has the seconds, hours and GPU-hours of LoRA and full, and the share of computing."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {gpus} |"))
    said = [cell.strip().removesuffix(" %") for cell in row.strip("|").split("|")[1:]]
    expected = []
    for full in (False, True):
        it = update(gpus, full)
        expected += [it, U * it / 3600, gpus * U * it / 3600]
    expected.append(100 * ceil(B / gpus) * seconds(True) / update(gpus, True))
    for word, value in zip(said[:3] if gpus == 1 else said, expected):
        assert float(word) == pytest.approx(value, rel=0.004)


def test_a_thousand_training_runs():
    """GPU-hours, days, terabytes and files follow from the formulas."""
    evaluation = R * V * E / 3600
    for column, full, at_once, gpus in ((0, False, 64, 1), (1, True, 8, 8)):
        training = R * U * update(gpus, full) * gpus / 3600
        kept = R * (4 * PARAMETERS[full] * 2 + V * 720**2 * 2)
        state = at_once * 4 * PARAMETERS[full] * 4 * 2
        expected = {
            "GPU-hours of training": training,
            "GPU-hours of evaluation": evaluation,
            "days on 64 GPUs": (training + evaluation) / 64 / 24,
            "disk at the end": kept / 1e12,
            "more while training": state / 1e12,
            "files": R * (V + 6 + 2 + 2 * 5),
        }
        for name, value in expected.items():
            row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
            said = row.strip("|").split("|")[1 + column].strip().replace(",", "").removesuffix(" TB")
            assert float(said) == pytest.approx(value, rel=0.03), name


def test_all_weights_on_one_card(capsys):
    """The page's command says that LeapAlign fits in the gigabytes that the page names; likewise on 16 GPUs."""

    def row(*words: str) -> list[str]:
        assert alignbench("fit", *words, "--method", "leapalign", plugin=False) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("LeapAlign")).split()

    shown = next(line for line in PAGE.splitlines() if line.startswith("    alignbench fit table2"))
    *_, peak, _, micro, _ = row(*shown.split()[2:])
    assert f"({peak} GB at micro-batch {micro}, computed)" in PAGE
    *_, peak, _, _, _ = row("--gpu", "h100", "--ranks", "16", "--parallel", "fsdp")
    assert f"says {peak} GB each" in PAGE


def test_one_sample_per_gpu(capsys):
    """The page's command divides LeapAlign among 64 GPUs; with table 2's micro-batch it is refused."""
    *words, micro = re.search(r"`alignbench (fit fig4a [^`]+)`", PAGE)[1].split()
    assert alignbench(*words, micro, plugin=False) == 0
    assert alignbench(*words, plugin=False) == 1
    assert "training.micro_batch: 4 is more than a rank's 1 samples" in capsys.readouterr().err


def test_adapters_with_and_without_text_encoders(capsys):
    """The page names the gigabytes at batch 1 with text encoders and without."""
    peaks = []
    for more in ([], ["backend.embeddings=stored"]):
        words = ["fit", "fig4a", "--gpu", "h200", "backend.tune=lora", "training.micro_batch=1", *more]
        assert alignbench(*words, plugin=False) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("LeapAlign"))
        peaks.append(line.split()[-4])
    assert f"With adapters it is {peaks[0]} GB at batch 1" in PAGE
    assert f"it is {peaks[1]} GB, as measured" in PAGE


def test_the_inputs_are_the_measured_ones():
    """The first table holds the measured figures."""
    for figure in (f"{S:.2f}", f"{seconds(True):.2f}", f"{E:.2f}", f"{PARAMETERS[False] / 1e6:.0f} M"):
        assert f"| {figure} " in PAGE

"""`alignbench fit`: the memory of training agrees with what one H200 needed, and with itself; what is too large is told
before a model is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from world import PLUGIN, alignbench, sweep_file

from alignbench.config import UserError, settings
from alignbench.cost import FLUX_1_DEV, GPUS, Model
from alignbench.estimate import Memory, training_memory
from alignbench.fitting import check_room, page, remedies
from alignbench.plugins import Registry
from alignbench.run import Task, Work
from alignbench.spec import Budget, RunSpec, Training
from alignbench.store import Lock
from alignbench.sweep import read, resolve

RESULTS = json.loads((Path(__file__).parent.parent / "benchmarks/results/gpu-h200.json").read_text())
PEAKS = {row["what"]: row["peak_GB"] for row in RESULTS["rows"] if "peak_GB" in row}
BATCHES = {2: 40.0, 4: 51.2, 8: 73.6}  # LeapAlign at 720 px, printed while these results were made
TEXT = 2 * sum(encoder.parameters for encoder in Model.read(FLUX_1_DEV).encoders)  # bytes; the benchmark has none
CARD = 150.8e9  # bytes of its memory
LEAPALIGN = {"name": "leapalign", "steps": 25}
MIXGRPO = {"name": "mixgrpo", "steps": 25, "group": 4, "updates_per_rollout": 1, "window": 4}
MEASURED = [
    *((LEAPALIGN, size, 1, PEAKS[f"LeapAlign, {size} px, batch 1"]) for size in (512, 720, 1024)),
    *((LEAPALIGN, 720, batch, peak) for batch, peak in BATCHES.items()),
    (LEAPALIGN, 720, 16, PEAKS["largest batch tried that fits, LeapAlign, 720 px"]),
    ({"name": "refl", "steps": 25, "last_n": 11}, 720, 1, PEAKS["ReFL, 720 px, batch 1"]),
    ({"name": "drtune", "steps": 25, "m": 11}, 720, 1, PEAKS["DRTune, 720 px, batch 1"]),
    ({"name": "draft_lv", "steps": 25}, 720, 1, PEAKS["DRaFTLV, 720 px, batch 1"]),
    (MIXGRPO, 720, 4, PEAKS["MixGRPO, 720 px, a group of 4, 4 moves"]),
]
HUGE = {"model": "black-forest-labs/FLUX.1-dev", "size": 720, "tune": "lora", "gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def nothing(tmp_path, monkeypatch):
    """A hub cache with nothing in it: measures are the published ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def spec(method=LEAPALIGN, batch: int = 1, micro_batch: int | None = None, **backend) -> RunSpec:
    registry = Registry()
    made = registry.make("method", method, "method")
    return RunSpec(
        label=method["name"],
        backend={"name": "flux"} | settings(registry.make("backend", {"name": "flux", **HUGE, **backend}, "backend")),
        method={"name": method["name"]} | settings(made),
        reward={"evaluator": {"name": "hpsv2"}, "margin": None, "weight": 1.0},
        prompts="shapes/train",
        training=Training(budget=Budget(updates=3), batch=batch, micro_batch=micro_batch, drift_every=None),
    )


def memory(*arguments, ranks: int = 1, **backend) -> Memory:
    return training_memory(spec(*arguments, **backend), Registry(), ranks)


@pytest.mark.parametrize(("method", "size", "batch", "peak"), MEASURED)
def test_memory_is_what_one_h200_needed(method, size, batch, peak):
    """Within 3 % of every peak that was measured with LoRA and checkpointing: sizes, batches, methods."""
    found = memory(method, batch, size=size)
    assert (found.peak - TEXT) / 1e9 == pytest.approx(peak, rel=0.03)


def test_stored_embeddings_leave_the_text_encoders_out():
    """Exactly their bytes, so that what fits is what fitted the benchmark, which had none."""
    computed, stored = memory(), memory(embeddings="stored")
    assert computed.peak - stored.peak == pytest.approx(TEXT, rel=1e-12)
    assert (computed.peak / 1e9, stored.peak / 1e9) == pytest.approx((45.0, 35.2), abs=0.1)


def test_the_largest_batch_is_the_measured_one():
    """On that card 16 fit and 24 do not; what is called the largest fits, and one more does not."""
    found = memory(LEAPALIGN, 64)
    largest = found.largest(CARD + TEXT)
    assert 16 <= largest < 24
    assert found._replace(size=largest).peak <= CARD + TEXT < found._replace(size=largest + 1).peak


def test_full_training_is_more_than_one_gpu_has():
    """Weights, gradients and AdamW alone are 16 bytes a parameter; with no room for them not one image fits."""
    found = memory(tune="full")
    assert found.trained + found.optimizer == 16 * Model.read(FLUX_1_DEV).transformer.parameters
    assert found.largest(141e9) == 0


def test_ranks_share_a_batch():
    """Eight ranks with DDP: one of a batch of 16 holds what a batch of 2 takes."""
    assert memory(LEAPALIGN, 16, ranks=8) == memory(LEAPALIGN, 2)


def test_each_remedy_saves_what_is_said():
    """Applied, it saves what it promised; LoRA, checkpointing and small parts are offered, another size is not."""
    registry = Registry()
    asked = spec(LEAPALIGN, 16, tune="full", gradient_checkpointing=False)
    now = training_memory(asked, registry)
    found = remedies(asked, now, registry)
    texts = [text for text, *_ in found]
    kept = ["backend.tune=lora", "backend.gradient_checkpointing=true", "backend.embeddings=stored"]
    assert texts == [*kept, "training.micro_batch=1"]
    for _, saved, change in found:
        changed = change(asked)
        assert now.peak - training_memory(changed, registry).peak == saved > 0
        assert changed.backend["size"] == asked.backend["size"]


def test_a_group_is_not_divided():
    """Policy gradient: the smallest micro-batch that is offered is one whole group."""
    asked = spec(MIXGRPO, 16)
    found = [text for text, *_ in remedies(asked, training_memory(asked, Registry()), Registry())]
    assert found == ["backend.embeddings=stored", "training.micro_batch=4"]


def test_the_page_says_what_would_fit(capsys):
    """Table 2 trains all weights: exit code 2, and LoRA named with its saving; with it, 0, and the largest batch."""
    assert alignbench("fit", "--gpu", "h200", plugin=False) == 2
    out = capsys.readouterr().out
    assert re.search(r"LeapAlign +NO ", out)
    assert re.search(
        r"LeapAlign needs 320 GB, 180 GB too much\n  backend.tune=lora saves 260 GB\n  backend.embeddings=.*\n.*fits",
        out,
    )
    assert alignbench("fit", "--method", "leapalign", "backend.tune=lora", plugin=False) == 0
    out = capsys.readouterr().out
    assert re.search(r"LeapAlign +yes .* 4 +7\n", out)
    assert "ReFL" not in out


def test_a_method_that_no_sweep_has_is_added(capsys):
    """With its defaults; a model of unknown measures has a line instead of figures."""
    assert alignbench("fit", "--method", "draft_k", "backend.tune=lora", plugin=False) == 0
    assert re.search(r"draft_k +yes ", capsys.readouterr().out)
    unknown = spec(model="nobody/nothing")
    assert page("x", [unknown], Registry(), GPUS["h100"])[0].endswith("measures of backend flux are not known")


# -- before a run ------------------------------------------------------------------------------------------------------


def test_only_what_surely_does_not_fit_is_refused():
    """Free memory is enough: nothing. Not enough, but the card may be: a warning. By more than the error: UserError."""
    asked, registry = spec(LEAPALIGN, 16), Registry()
    peak = int(training_memory(asked, registry).peak)
    assert check_room(asked, registry, 1, peak + 1, peak + 1) == ""
    assert "training.micro_batch=1 saves 83 GB" in check_room(asked, registry, 1, peak // 2, peak)
    assert "are free" in check_room(asked, registry, 1, int(0.92 * peak), int(0.92 * peak))
    with pytest.raises(UserError, match=r"needs about 130 GB .* has 80 GB; .*, training.micro_batch=1 saves 83 GB"):
        check_room(asked, registry, 1, 80 * 10**9, 80 * 10**9)


def test_a_run_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch):
    """On a CUDA device with a few kilobytes of memory, with the figures; not on a CPU, nor under FSDP."""
    plan = resolve(read(sweep_file(tmp_path)), Registry([PLUGIN]))
    cell = next(cell for cell in plan.cells if cell.trains)
    task = Task(
        str(tmp_path / "store"), cell.id, cell.images, True, settings(cell.spec), settings(plan.evaluation),
        [], [PLUGIN], 1, str(tmp_path / "progress"), [],
    )  # fmt: skip

    def work(device: str, parallel: str = "ddp") -> Work:
        made = Work(task._replace(parallel=parallel), lambda: False)
        made.ranks = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device(device), num_processes=1))
        return made

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    work("cpu").check_room()
    work("cuda", "fsdp").check_room()
    refused = work("cuda")
    with pytest.raises(UserError, match=r"training needs about .* of GPU memory, and this GPU has"):
        refused._train(Lock(tmp_path / "lock"))
    assert "flow" not in vars(refused)

"""`alignbench fit`: the memory of training agrees with measurements on one H200 and is consistent.

A run that is too large is refused before its model is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from support.tiny_sweep import PLUGIN, alignbench, sweep_file

from alignbench.analytic import PROMPTS, QuadraticReward
from alignbench.backends.cost.formulas import GPUS, Model
from alignbench.backends.cost.published_configs import FLUX_1_DEV
from alignbench.config import UserError, settings
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import Budget, Optimizer, RunSpec, Training
from alignbench.methods.leapalign import LeapAlign
from alignbench.planning.fit_page import SINGLE_GPU, Group, check_room, page, remedies
from alignbench.planning.memory import Memory, training_memory
from alignbench.plugins import Registry
from alignbench.run import Task, train_stage
from alignbench.run.session import RunSession
from alignbench.store.locks import Lock
from alignbench.training.state import TrainState

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks/results/gpu-h200.json").read_text())
PEAKS = {row["what"]: row["peak_GB"] for row in RESULTS["rows"] if "peak_GB" in row}
BATCHES = {2: 40.0, 4: 51.2, 8: 73.6}  # LeapAlign at 720 px, printed while these results were made
PARAMETERS = Model.read(FLUX_1_DEV).transformer.parameters
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
def empty_hub(tmp_path, monkeypatch):
    """Use an empty hub cache, so that model configurations are the published ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def spec(
    method=LEAPALIGN, batch: int = 1, micro_batch: int | None = None, training: dict | None = None, **backend
) -> RunSpec:
    """Return a run's spec. ``training``: settings of training and its optimizer that differ from the defaults."""
    own = dict(training or {})
    optimizer = Optimizer(**{name: own.pop(name) for name in ("weights", "moments", "ema") if name in own})
    registry = Registry()
    made = registry.make("method", method, "method")
    return RunSpec(
        label=method["name"],
        backend={"name": "flux"} | settings(registry.make("backend", {"name": "flux", **HUGE, **backend}, "backend")),
        method={"name": method["name"]} | settings(made),
        reward={"evaluator": {"name": "hpsv2"}, "margin": None, "weight": 1.0},
        prompts="shapes/train",
        training=Training(
            budget=Budget(updates=3), batch=batch, micro_batch=micro_batch, drift_every=None, optimizer=optimizer, **own
        ),
    )


def memory(*arguments, ranks: int = 1, parallel: str = "ddp", **settings) -> Memory:
    return training_memory(spec(*arguments, **settings), Registry(), ranks, parallel)


def bytes_per_weight(memory: Memory) -> float:
    """Return the bytes of weight, gradient, moments and EMA for each weight of FLUX.1-dev."""
    return (memory.trained + memory.optimizer + memory.ema) / PARAMETERS


@pytest.mark.parametrize(("method", "size", "batch", "peak"), MEASURED)
def test_memory_is_what_one_h200_needed(method, size, batch, peak):
    """The estimate is within 3 % of every peak measured with LoRA and checkpointing: sizes, batches, methods."""
    found = memory(method, batch, size=size)
    assert (found.peak - TEXT) / 1e9 == pytest.approx(peak, rel=0.03)


def test_stored_embeddings_leave_the_text_encoders_out():
    """Stored embeddings save exactly the text encoders' bytes; the benchmark had no text encoders either."""
    computed, stored = memory(), memory(embeddings="stored")
    assert computed.peak - stored.peak == pytest.approx(TEXT, rel=1e-12)
    assert (computed.peak / 1e9, stored.peak / 1e9) == pytest.approx((45.0, 35.2), abs=0.1)


def test_the_largest_batch_is_the_measured_one():
    """On that card 16 images fit and 24 do not; the largest micro-batch fits, and one more image does not."""
    found = memory(LEAPALIGN, 64)
    largest = found.largest_micro_batch(CARD + TEXT)
    assert 16 <= largest < 24
    assert found._replace(size=largest).peak <= CARD + TEXT < found._replace(size=largest + 1).peak


def test_full_training_is_more_than_one_gpu_has():
    """Weights, gradients and AdamW take 16 bytes per parameter; without room for them not one image fits."""
    found = memory(tune="full")
    assert found.trained + found.optimizer == 16 * Model.read(FLUX_1_DEV).transformer.parameters
    assert found.largest_micro_batch(141e9) == 0


LEAST = {"weights": "stochastic", "moments": "8bit", "ema_on_host": True}


def test_all_weights_fit_one_card():
    """With the leanest settings a weight takes 6.03 bytes, all of them 71.4 GB within 1 %, and nothing is cast.

    These are bfloat16 weights and gradients, moments in 8 bits, and the EMA on the host. A card of 141 GB has room for
    an image beside text encoders and reward.
    """
    found = memory(tune="full", training=LEAST)
    assert bytes_per_weight(found) == 6 + 8 / 256
    assert found.trained + found.optimizer == pytest.approx(71.4e9, rel=0.01)
    assert found.casts == found.ema == 0
    assert found.fixed == found.trained + found.optimizer + found.frozen + found.rewards
    assert found.peak < 0.8 * 141e9
    assert memory(tune="full", training=LEAST | {"ema_on_host": False}).ema == 4 * PARAMETERS


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, 8 + 8 + 4),
        ({"moments": "8bit", "ema": None}, 8 + 2 + 8 / 256),
        ({"weights": "master", "ema_on_host": True}, 2 + 4 + 4 + 8),
        ({"weights": "stochastic"}, 2 + 2 + 8 + 4),
    ],
)
def test_bytes_of_a_weight(training, expected):
    """Weights, masters, gradients, moments and EMA add up; autocast copies no weight that is already bfloat16."""
    found = memory(tune="full", training=training)
    assert bytes_per_weight(found) == expected
    assert found.casts == (0 if "weights" in training else 2 * PARAMETERS)


@pytest.mark.slow
def test_gradients_of_several_backwards_are_float32():
    """Micro-batches, or a method with several backwards per update, take two more bytes per weight."""
    once = bytes_per_weight(memory(LEAPALIGN, 2, tune="full", training=LEAST))
    assert bytes_per_weight(memory(LEAPALIGN, 2, 1, tune="full", training=LEAST)) == once + 2
    assert bytes_per_weight(memory(MIXGRPO, 4, tune="full", training=LEAST)) == once + 2
    assert bytes_per_weight(memory(LEAPALIGN, 16, 2, tune="full", training=LEAST, ranks=8)) == once


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moments"), [("float32", "float32"), ("master", "float32"), ("stochastic", "8bit")])
def test_a_run_holds_what_is_computed(kind, moments):
    """The bytes of the shapes model's weights, gradients, moments and EMA after an update agree to 5 %.

    Its vectors and small tensors make up the difference.
    """
    flow = Registry().make("backend", {"name": "flux", "model": "shapes", "size": 32}, "backend").load()
    optimizer = Optimizer(weights=kind, moments=moments)
    training = Training(budget=Budget(updates=1), batch=1, drift_every=None, optimizer=optimizer)
    run = TrainState(LeapAlign(steps=3), flow, training, Accelerator(cpu=True))
    list(run.train_batch(flow, QuadraticReward(0.5), PROMPTS))
    held = {id(p): p for p in (*flow.parameters(), *run.parameters.values())}.values()
    tensors = [*held, *(p.grad for p in held if p.grad is not None), *run.ema.tensors]
    tensors += [t for state in run.optimizer.state.values() for name, t in state.items() if name != "step"]
    found = sum(t.nbytes for t in tensors) / sum(p.numel() for p in flow.parameters())
    assert found == pytest.approx(
        bytes_per_weight(memory(tune="full", training={"weights": kind, "moments": moments})), rel=0.05
    )


@pytest.mark.parametrize(("ranks", "gigabytes"), [(8, 29.8), (16, 14.9)])
def test_fsdp_divides_what_is_trained(ranks, gigabytes):
    """20 bytes per weight are divided among the ranks; each has 23.8 GB of gathered bfloat16 weights and all encoders.

    16 ranks of 80 GB have room for four images each.
    """
    alone, found = (memory(LEAPALIGN, 4 * n, tune="full", ranks=n, parallel="fsdp") for n in (1, ranks))
    assert (found.trained + found.optimizer + found.ema) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found.casts / 1e9 == pytest.approx(23.8, rel=0.01)
    assert (found.frozen, found.graphs, found.size) == (alone.frozen, alone.graphs, 4)
    assert found.peak < 80e9 or ranks == 8
    adapters = memory(LEAPALIGN, 4 * ranks, ranks=ranks, parallel="fsdp")
    assert adapters.frozen == pytest.approx(found.frozen + 2 * PARAMETERS / ranks)


@pytest.mark.slow
def test_what_fsdp_cannot_have_is_not_offered():
    """Neither bfloat16 weights nor 8 bits are offered; a page that asks for them is refused with one line."""
    asked, ranks = spec(LEAPALIGN, 64, tune="full"), Group(8, "fsdp")
    texts = [text for text, *_ in remedies(asked, ranks.memory(asked, Registry()), Registry(), ranks)]
    kept = ["backend.tune=lora", "training.ema_on_host=true", "backend.embeddings=stored"]
    assert texts == [*kept, "training.micro_batch=1"]
    with pytest.raises(UserError, match=r"^leapalign: training: optimizer.moments: '8bit' .* parallel: ddp$"):
        page("x", [spec(LEAPALIGN, 64, tune="full", training=LEAST)], Registry(), GPUS["h100"], ranks)


def test_ranks_share_a_batch():
    """With eight DDP ranks, each rank of a batch of 16 needs what a batch of 2 needs."""
    assert memory(LEAPALIGN, 16, ranks=8) == memory(LEAPALIGN, 2)


def test_each_remedy_saves_what_is_said():
    """Every remedy saves what it promises; LoRA, checkpointing and micro-batches are offered, another size is not."""
    registry = Registry()
    asked = spec(LEAPALIGN, 16, tune="full", gradient_checkpointing=False)
    now = training_memory(asked, registry)
    found = remedies(asked, now, registry)
    texts = [text for text, *_ in found]
    assert texts == [
        "backend.tune=lora", "training.ema_on_host=true", "training.optimizer.weights=stochastic",
        "training.optimizer.moments=8bit", "backend.gradient_checkpointing=true", "backend.embeddings=stored",
        "training.micro_batch=1",
    ]  # fmt: skip
    for _, saved, change in found:
        changed = change(asked)
        assert now.peak - training_memory(changed, registry).peak == saved > 0
        assert changed.backend["size"] == asked.backend["size"]


@pytest.mark.slow
def test_a_group_is_not_divided():
    """With a policy-gradient method, the smallest micro-batch offered is one whole group."""
    asked = spec(MIXGRPO, 16)
    found = [text for text, *_ in remedies(asked, training_memory(asked, Registry()), Registry())]
    assert found == ["backend.embeddings=stored", "training.micro_batch=4"]


@pytest.mark.slow
def test_the_page_says_what_would_fit(capsys):
    """Table 2 trains all weights: exit code 2, and LoRA is offered; with LoRA it is 0, with the largest micro-batch."""
    assert alignbench("fit", "--gpu", "h200", plugin=False) == 2
    out = capsys.readouterr().out
    assert re.search(r"LeapAlign +NO ", out)
    told = out[out.index("LeapAlign needs 320 GB, 180 GB too much\n  backend.tune=lora saves 260 GB\n") :]
    assert re.search(r"\n  with all of these 51 GB: fits\n  with all but backend.tune=lora 120 GB: fits(\n|$)", told)
    assert alignbench("fit", "--method", "leapalign", "backend.tune=lora", plugin=False) == 0
    out = capsys.readouterr().out
    assert re.search(r"LeapAlign +yes .* 4 +7\n", out)
    assert "ReFL" not in out
    sixteen = ("--gpu", "h100", "--ranks", "16", "--parallel", "fsdp")
    assert alignbench("fit", "--method", "leapalign", *sixteen, plugin=False) == 0
    assert "training on 16 x H100 of 80 GB; in GB of each, fsdp:" in capsys.readouterr().out


def test_a_method_that_no_sweep_has_is_added(capsys):
    """The method is added with its defaults; a model of unknown size gets a line instead of figures."""
    assert alignbench("fit", "--method", "draft_k", "backend.tune=lora", plugin=False) == 0
    assert re.search(r"draft_k +yes ", capsys.readouterr().out)
    unknown = spec(model="nobody/nothing")
    assert page("x", [unknown], Registry(), GPUS["h100"])[0].endswith("measures of backend flux are not known")


# -- before a run ------------------------------------------------------------------------------------------------------


def test_only_what_surely_does_not_fit_is_refused():
    """Enough free memory gives no message, too little a warning, and a card that is surely too small UserError.

    With FSDP, which was never measured, the last is a warning, too.
    """
    asked, registry = spec(LEAPALIGN, 16), Registry()
    peak = int(training_memory(asked, registry).peak)
    assert check_room(asked, registry, SINGLE_GPU, peak + 1, peak + 1) == ""
    assert "training.micro_batch=1 saves 83 GB" in check_room(asked, registry, SINGLE_GPU, peak // 2, peak)
    assert "are free" in check_room(asked, registry, SINGLE_GPU, int(0.92 * peak), int(0.92 * peak))
    with pytest.raises(UserError, match=r"needs about 130 GB .* has 80 GB; .*, training.micro_batch=1 saves 83 GB"):
        check_room(asked, registry, SINGLE_GPU, 80 * 10**9, 80 * 10**9)
    asked = spec(LEAPALIGN, 16, tune="full")
    told = check_room(asked, registry, Group(2, "fsdp"), 80 * 10**9, 80 * 10**9)
    assert told.startswith("training needs about")
    assert "are free" in told


@pytest.mark.slow
def test_a_run_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch):
    """A CUDA device with 2 kB of memory is refused, with the figures; a CPU is not."""
    plan = resolve(read(sweep_file(tmp_path)), Registry([PLUGIN]))
    cell = next(cell for cell in plan.cells if cell.trains)
    task = Task(
        str(tmp_path / "store"), cell.id, cell.images, True, settings(cell.spec), settings(plan.evaluation),
        [], [PLUGIN], 1, str(tmp_path / "progress"), [],
    )  # fmt: skip

    def session(device: str) -> RunSession:
        made = RunSession(task, lambda: False)
        made.group = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device(device), num_processes=1))
        return made

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    train_stage.check_room(session("cpu"))
    refused = session("cuda")
    with pytest.raises(UserError, match=r"training needs about .* of GPU memory, and this GPU has"):
        train_stage.make_weights(refused, Lock(tmp_path / "lock"))
    assert refused._flow is None

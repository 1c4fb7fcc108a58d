"""`alignbench plan`: costs agree with torch's counter, the meter and the files; everything missing is listed."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support.flops import counted
from support.tiny import flux_parts
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, sweep_file, tables

from alignbench import weights
from alignbench.analytic import PROMPTS, AffineFlow, GaussianFlow, QuadraticReward
from alignbench.backends.cost.formulas import GPUS, Decoder, FluxTransformer, Linear, Model, TextEncoder, Tokens
from alignbench.backends.cost.published_configs import FLUX_1_DEV
from alignbench.config import Missing, UserError
from alignbench.experiment.document import read, sweeps
from alignbench.experiment.plan import draft, resolve
from alignbench.experiment.spec import Budget, Training
from alignbench.planning.estimate import CostEstimate, estimate
from alignbench.planning.observe import Probe, observe_cached
from alignbench.planning.plan_page import about
from alignbench.plugins import Registry
from alignbench.rehearsal.doctor import DEFAULTS
from alignbench.training.loop import train

DEV = Model.read(FLUX_1_DEV)
METHODS = [name for name in Registry().names("method") if name not in ("base", "checkpoint")]


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """Use an empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "forward", "full", "lora", "decoder"),
    [(512, 21.50, 43.83, 23.98, 2.51), (720, 37.28, 76.82, 44.04, 5.04), (1024, 74.38, 156.21, 96.69, 10.47)],
)
def test_flux_1_dev_costs_what_was_counted(size, forward, full, lora, decoder):
    """TFLOP of an evaluation, forward and backward, and of a decode equal what torch counted on the real shapes."""
    tokens = DEV.tokens(size, 512)
    counts = [DEV.transformer.forward(tokens), *(DEV.transformer.backward(tokens, tune) for tune in (True, False))]
    counts.append(DEV.decoder.forward(size))
    assert [round(count / 1e12, 2) for count in counts] == [forward, full, lora, decoder]


def test_flux_1_dev_has_its_parameters():
    """The transformer has 11.901 B parameters, T5 4.762 B, CLIP 0.123 B, the autoencoder 84 M (to 3 %)."""
    counts = [DEV.transformer.parameters, *sorted((encoder.parameters for encoder in DEV.encoders), reverse=True)]
    assert [round(count / 1e9, 3) for count in counts] == [11.901, 4.762, 0.123]
    assert DEV.decoder.parameters == pytest.approx(83.8e6, rel=0.03)


def test_attention_and_block_checkpointing_take_the_memory_that_was_counted():
    """At 720 px an evaluation takes 0.89 GB with checkpointing and 23.3 without, a block 0.44, a decode 6.2 or 3.8."""
    tokens = DEV.tokens(720, 512)
    sizes = [DEV.transformer.activation_bytes(tokens, 2, checkpointing) for checkpointing in (True, False)]
    sizes += [
        DEV.transformer.block_bytes(tokens, 2),
        *(DEV.decoder.activation_bytes(720, 2, option) for option in (False, True)),
    ]
    assert [round(size / 1e9, 2) for size in sizes] == [0.89, 23.28, 0.44, 6.2, 3.78]


@pytest.fixture(scope="module")
def parts():
    return flux_parts()


def test_a_small_transformer_costs_what_torch_counts(parts):
    """Forward FLOPs, the linear part of the backward, and parameters are exact, with guidance or without."""
    network = parts["transformer"].train()
    measures = FluxTransformer.read(network.config)
    assert measures.parameters == sum(p.numel() for p in network.parameters())
    tokens = Tokens(image=16, text=5)

    def forward():
        return network(
            hidden_states=torch.randn(2, tokens.image, network.config.in_channels),
            timestep=torch.tensor([0.5, 0.5]),
            guidance=torch.tensor([3.5, 3.5]),
            pooled_projections=torch.randn(2, network.config.pooled_projection_dim),
            encoder_hidden_states=torch.randn(2, tokens.text, network.config.joint_attention_dim),
            txt_ids=torch.zeros(tokens.text, 3),
            img_ids=torch.zeros(tokens.image, 3),
            return_dict=False,
        )[0]

    assert counted(lambda: forward().detach()) == 2 * measures.forward(tokens)
    v = forward()
    seen = counted(lambda: v.sum().backward())
    inputs = [Linear("", measures.channels, measures.width, "image"), Linear("", measures.text, measures.width, "text")]
    unneeded = sum(2 * layer.n_in * layer.n_out * tokens.rows(layer) for layer in inputs)  # no gradient of the input
    assert seen == pytest.approx(2 * (measures.backward(tokens, full=True) - unneeded), rel=0.01)


def test_a_small_decoder_costs_what_torch_counts(parts):
    """Forward FLOPs of a decoder, middle attention included, agree to 1 %."""
    vae = parts["vae"]
    measures = Decoder.read(vae.config)
    z = torch.randn(1, vae.config.latent_channels, 16, 16)
    seen = counted(lambda: vae.decode(z, return_dict=False))
    assert measures.forward(16 * measures.scale // 2) == pytest.approx(seen, rel=0.01)


def test_text_encoders_have_the_parameters_of_their_models(parts):
    """Parameters of T5 and CLIP, computed from their configurations alone, are exact."""
    t5, clip = parts["text_encoder_2"], parts["text_encoder"]
    assert TextEncoder.t5(t5.config.to_dict()).parameters == sum(p.numel() for p in t5.parameters())
    assert TextEncoder.clip(clip.config.to_dict()).parameters == sum(p.numel() for p in clip.parameters())


def test_adapters_have_the_parameters_that_peft_makes():
    """The parameters of LoRA on the default layers of the shapes model are exact."""
    backend = Registry().make("backend", {"name": "flux", "model": "shapes", "size": 32, "tune": "lora"}, "backend")
    made = sum(parameter.numel() for parameter in backend.load().parameters())
    assert made == backend.cost_model.transformer.adapters(backend.lora_targets, backend.lora_rank)


# -- how often a method calls the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_predicted_evaluations_are_the_metered_ones(name):
    """Each built-in method's predicted forwards, decodes, rewards and images equal those of a real training loop."""
    method = Registry().make("method", {"name": name}, "method")
    group = getattr(method, "group", 1)
    training = Training(budget=Budget(images=3 * 2 * group), batch=2 * group, micro_batch=group, drift_every=None)
    usage = observe_cached(method, training, 1)
    records = list(
        train(method, AffineFlow(method.steps), QuadraticReward(), PROMPTS, training, accelerator=Accelerator(cpu=True))
    )
    images = usage.batches(training, 1.0) * training.batch
    predicted = [round(images * per_image) for per_image in (usage.mean[:4])]
    names = ("nfe_forward", "nfe_grad", "nfe_recomputed", "decodes")
    assert predicted == [records[-1][column] for column in names]
    assert images == records[-1]["images"]
    assert round(images * usage.mean.rewards) == records[-1]["reward_calls"]
    assert sum(usage.updates) == len(records)


@pytest.mark.parametrize(
    ("name", "live"),
    [("draft_k", 1), ("draft_lv", 1), ("leapalign", 2), ("flowbp_bridge", 5), ("bptt", 1), ("vggflow", 1)],
)
def test_graphs_alive_at_once(name, live):
    """A graph that a backward has used, or that is recomputed, takes no memory beside the next one."""
    method = Registry().make("method", {"name": name}, "method")
    assert observe_cached(method, Training(budget=Budget(updates=2), batch=2), 1).mean.live == live


@pytest.mark.parametrize(("budget", "batches"), [({"updates": 7}, 3), ({"nfe": 1201}, 5), ({"images": 25}, 3)])
def test_budgets_last_as_long_as_training_makes_them(budget, batches):
    """A batch has three updates and 12 x 25 evaluations; the batch in which the budget runs out is finished."""
    method = Registry().make("method", {"name": "dancegrpo"}, "method")
    training = Training(budget=Budget(**budget), batch=12, drift_every=None)
    assert observe_cached(method, training, 1).batches(training, 1.0) == batches


@pytest.mark.slow
def test_a_plan_agrees_with_the_run(tmp_path):
    """A plug-in's NFE and the bytes of its weights on disk are exact; the bytes of images have the right order."""
    path = sweep_file(tmp_path)
    plan = resolve(read(path), Registry([PLUGIN]))
    cell = next(cell for cell in plan.cells if cell.seed == 0)
    found = estimate(cell, plan.evaluation, plan.evaluators, GPUS["h100"])
    assert debug_sweep(path, tmp_path / "store", "--only", "seed=0") == 0
    costs = tables(tmp_path / "store")[1]
    row = costs[costs["run"] == cell.id].iloc[0]
    assert found.usage is not None
    assert [round(found.images * each) for each in found.usage[:2]] == [row["nfe_forward"], row["nfe_grad"]]
    assert found.weights == data_bytes(tmp_path / "store" / "runs" / cell.id / "weights.safetensors")
    made = sum(file.stat().st_size for file in (tmp_path / "store" / "images" / cell.images).glob("*.png"))
    assert 0.2 < found.image_files / made < 5
    assert 0 < found.memory < 1e9
    assert 0 < found.train < 0.01


def data_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file."""
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(header))
    return max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_2_without_any_file(empty_hub, tmp_path, capsys):
    """The page has every run's cost, commands for all missing files, and FLUX.1-dev's licence; the exit code is 1."""
    assert alignbench("plan", "table2", store=tmp_path / "store", plugin=False) == 1
    out = capsys.readouterr().out
    assert re.search(r"LeapAlign, seed 0 +not ready +19,200 +23 \+ 2 +21 h ", out)
    assert re.search(r"DanceGRPO, seed 0 +not ready +57,600 +16 \+ 9 ", out)
    assert "does not fit into one H100's 80 GB: DanceGRPO, MixGRPO, ReFL, DRaFT-LV, DRTune, LeapAlign" in out
    assert "training images differ between rows; 19,200 in most, but" in out
    for command in (
        "black-forest-labs/FLUX.1-dev",
        "tulvgengenr/MixGRPO",
        "--repo-type dataset ymhao/HPDv2 train.json",
    ):
        assert f"hf download {command}\n" in out
    for part in (
        "MizzenAI/HPSv3",
        "Qwen/Qwen2-VL-7B-Instruct",
        "THUDM/ImageReward",
        "google-bert",
        "UnifiedReward-qwen",
    ):
        assert part in out
    assert "gated: accept the FLUX.1 [dev]" in out
    assert out.count("hf download black-forest-labs") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(sweeps()))
def test_every_packaged_sweep_has_a_plan(name, empty_hub):
    """Without any weights, every run has finite figures; the cost in the file's first lines is their sum."""
    registry = Registry()
    plan = draft(read(name), registry)
    costs = [estimate(cell, plan.sweep.evaluation, plan.evaluators, GPUS["h100"]) for cell in plan.cells]
    for cell, cost in zip(plan.cells, costs):
        assert not cost.unknown
        figures = [cost.train, cost.generate, cost.score, cost.memory, cost.weights, cost.image_files]
        assert all(math.isfinite(figure) and figure >= 0 for figure in figures)
        assert min(cost.train, cost.images, cost.usage.grad if cost.usage else 0) > 0 or not cell.trains
    comments = " ".join(re.findall(r"(?m)^# ?(.*)", sweeps()[name].read_text()))
    sums = [sum(cost.train for cost in costs), sum(cost.generate + cost.score for cost in costs)]
    sums.append(sum(cost.weights + cost.image_files for cost in costs) / 1e9)
    pattern = r"about: (\S+) H100-hours of training[^,]*, (\S+) of evaluation, (\S+) GB of disk"
    assert re.findall(pattern, comments) in ([], [tuple(map(about, sums))])
    assert name in ("quickstart", "shapes", "shapes_curves", "shapes_methods") or re.search(pattern, comments)


def test_lora_fits_where_all_weights_do_not(empty_hub, tmp_path, capsys):
    """The same sweep with adapters fits into 80 GB; an unknown GPU is refused by name."""
    assert alignbench("plan", "table2", "backend.tune=lora", store=tmp_path / "store", plugin=False) == 1
    assert "does not fit" not in capsys.readouterr().out
    assert alignbench("plan", "table2", "--gpu", "h1000", store=tmp_path / "store", plugin=False) == 1
    assert "--gpu: there is no 'h1000'; did you mean 'h100'" in capsys.readouterr().err


def test_table_2_is_published_settings(empty_hub):
    """Settings are those of LeapAlign, section 6.1 and appendix E; the batches of GRPO are the only exceptions."""
    for name, count in (("table2", 9), ("table2_geneval", 7)):
        cells = draft(read(name), Registry()).cells
        assert len(cells) == count
        for cell in cells:
            spec, grpo = cell.spec, cell.spec.label in ("DanceGRPO", "MixGRPO")
            assert (spec.backend["model"], spec.backend["size"], spec.backend["tune"]) == (DEV_HUB, 720, "full")
            optimizer = spec.training.optimizer
            assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.ema) == (
                1e-5,
                (0.9, 0.999),
                1e-4,
                0.995,
            )
            assert (spec.training.batch, spec.training.budget.updates) == (64, 300) or grpo
            assert bool(cell.notes) == grpo
            assert (cell.protocol.steps, cell.protocol.guidance, cell.protocol.images_per_prompt) == (50, 3.5, 4)
            assert spec.reward["margin"] == 0.55
            assert spec.method["steps"] == 25 or spec.label == "DanceGRPO"


DEV_HUB = "black-forest-labs/FLUX.1-dev"


def test_validate_lists_everything_that_is_missing(empty_hub, tmp_path, capsys):
    """All missing files are listed at once, not only the first."""
    assert alignbench("validate", "table2", store=tmp_path / "store", plugin=False) == 1
    assert "missing, 13 in all" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [entry for entry in Registry().entries if entry[0] != "method"])
def test_what_is_required_is_what_is_looked_for(kind, name, empty_hub, tmp_path, monkeypatch):
    """On an empty machine a built-in part raises for the first of its requirements, all of them absent.

    A part without requirements has its files. Each requirement's text names the command that gets it.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    part = Registry().make(kind, {"name": name, **DEFAULTS.get(name, {})}, name)
    absent = weights.absent(part)
    assert absent == part.requirements()
    assert all(need.command in need.text for need in absent)
    if not absent:
        part.files()
        return
    with pytest.raises(Missing) as error:
        part.files()
    assert error.value.requirement in absent
    assert str(error.value) == error.value.requirement.text


def test_a_plugin_that_lists_no_requirements_is_checked_all_the_same(empty_hub, tmp_path, capsys):
    """Its files() raises, and its command is listed with those of the others."""
    plugin = tmp_path / "distant.py"
    plugin.write_text(DISTANT)
    path = sweep_file(tmp_path, {"cases": [{"label": "Distant", "method": {"name": "distant"}}]})
    words = ("plan", path, "backend.model=some/model", "--plugin", str(plugin))
    assert alignbench(*words, store=tmp_path / "store") == 1
    out = capsys.readouterr().out
    assert "missing, 2 in all" in out
    assert "  hf download some/model\n  hf download some/body data.pt\n" in out


DISTANT = """
from alignbench import weights
from alignbench.method import AlignMethod

class Distant(AlignMethod):
    name = "distant"

    def files(self):
        return weights.check([weights.locate("some/body", "method", files=["data.pt"]) / "data.pt"], "method")

    def loss(self, flow, reward, batch):
        raise NotImplementedError
"""


def test_a_plan_leaves_no_trace_in_a_method():
    """A copy is observed: cells share their method, and one that trains its own networks would keep the toy's."""
    plan = draft(read("vggflow_hpsv2"), Registry())
    cell = next(cell for cell in plan.cells if cell.spec.method["name"] == "vggflow")
    assert not estimate(cell, plan.sweep.evaluation, plan.evaluators, GPUS["h100"]).unknown
    assert vars(cell.method) == {}


def test_wrong_settings_are_told_before_missing_files(empty_hub, tmp_path, capsys):
    """A batch that is not a whole number of groups is refused, though the weights are missing, too."""
    words = ("plan", "table2", "training.micro_batch=6")
    assert alignbench(*words, store=tmp_path / "store", plugin=False) == 1
    assert "6 samples per micro-batch do not make whole groups of 12" in capsys.readouterr().err


def test_a_grid_over_the_batch_is_the_same_for_all_methods(tmp_path):
    """Batch and budget from base, grid or the command line apply to every row."""
    grid = {"grid": {"training.batch": [2, 4], "training.budget": [{"images": 8}, {"updates": 2}]}}
    cells = draft(
        read(sweep_file(tmp_path, {**grid, "cases": CASES}), ["training.optimizer.lr=0.1"]), Registry([PLUGIN])
    ).cells
    seen: dict[str, list] = {}
    for cell in cells:
        seen.setdefault(cell.spec.method["name"], []).append((cell.spec.training.batch, cell.spec.training.budget))
    assert len(seen["last"]) == 8  # seeds too
    assert seen["last"] == seen["refl"]


CASES = [
    {"label": "A", "method": {"name": "last"}},
    {"label": "B", "method": {"name": "refl", "steps": 2, "last_n": 1}},
]


@pytest.mark.parametrize(
    "set",
    [{"training.batch": 4}, {"training": {"budget": {"images": 8}, "batch": 4}}, {"training.budget": {"updates": 1}}],
)
def test_an_unequal_batch_or_budget_needs_a_reason(set, tmp_path):
    """An override of batch or budget without a reason is refused, however it is written and whatever it matches."""
    for match in ({"method": "last"}, {"seed": 1}, {"label": "Last"}):
        path = sweep_file(tmp_path, {"overrides": [{"match": match, "set": set}]})
        with pytest.raises(UserError, match="say why with 'reason"):
            draft(read(path), Registry([PLUGIN]))


def test_a_method_that_no_toy_can_run_is_not_estimated(tmp_path, capsys):
    """The page says why, and everything else is planned."""
    plugin = tmp_path / "odd.py"
    plugin.write_text(ODD)
    path = sweep_file(tmp_path, {"cases": [{"label": "Odd", "method": {"name": "odd"}}]})
    assert alignbench("plan", path, "--plugin", str(plugin), store=tmp_path / "store") == 0
    assert re.search(
        r"Odd, seed 0: no estimate: its method does not run on the toy flow \(AttributeError", capsys.readouterr().out
    )
    assert CostEstimate().unknown == ""


ODD = """
from alignbench.method import AlignMethod

class Odd(AlignMethod):
    name = "odd"

    def loss(self, flow, reward, batch):
        return flow.transformer.blocks
"""


HUBS = {
    "sd3": ("stabilityai/stable-diffusion-3.5-medium", "Stability AI Community licence"),
    "flux2": ("black-forest-labs/FLUX.2-klein-base-9B", "FLUX non-commercial licence"),
}


@pytest.mark.parametrize("family", HUBS)
def test_other_families_are_planned_without_any_file(family, empty_hub, tmp_path, capsys):
    """Published configurations suffice; the page has the download command and licence; guidance doubles evaluations."""
    model, licence = HUBS[family]
    path = Path(sweep_file(tmp_path, {"base": {"backend": {"name": family, "model": model, "size": 512}}}))
    path.write_text(path.read_text().replace("    max_sequence_length: 16\n", ""))
    runs = {}
    for guidance in ("1.0", "4.0"):
        words = ("plan", str(path), f"backend.guidance={guidance}", "--only", "seed=0")
        assert alignbench(*words, store=tmp_path / "store") == 1
        out = capsys.readouterr().out
        runs[guidance] = re.search(r"Last, seed 0 +not ready +8 +(\S+) \+ (\S+) ", out).groups()
    assert [2 * float(count) for count in runs["1.0"]] == [float(count) for count in runs["4.0"]]
    assert f"hf download {model}\n" in out
    assert f"gated: accept the {licence} at https://huggingface.co/{model}" in out


def test_a_constant_branch_costs_no_backward():
    """In guided training both branches are counted with gradient, or one of them without."""
    method, training = (
        Registry().make("method", {"name": "leapalign"}, "method"),
        Training(budget=Budget(updates=1), batch=2),
    )
    plain, full, stop = (observe_cached(method, training, 1, negative).mean for negative in (None, "full", "stop"))
    assert (plain.forward, plain.grad, plain.live) == (23, 2, 2)
    assert (full.forward, full.grad, full.live) == (46, 4, 4)
    assert (stop.forward, stop.grad, stop.live) == (48, 2, 2)


@pytest.mark.slow
def test_a_plan_of_guided_training_agrees_with_the_meter():
    """With two branches, the observed counts on the guided toy equal those of the training loop."""
    for name, negative in itertools.product(("draft_lv", "vggflow", "bptt", "adjoint_matching"), ("full", "stop")):
        method = Registry().make("method", {"name": name}, "method")
        training = Training(budget=Budget(images=4), batch=2, drift_every=None)
        flow = Probe(GaussianFlow(), negative)
        reward = QuadraticReward()
        record = list(train(method, flow, reward, PROMPTS, training, accelerator=Accelerator(cpu=True)))[-1]
        usage = observe_cached(method, training, 1, negative).mean
        predicted = [round(4 * count) for count in usage[:3]]
        assert predicted == [record[column] for column in ("nfe_forward", "nfe_grad", "nfe_recomputed")]

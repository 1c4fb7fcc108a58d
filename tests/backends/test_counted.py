"""Costs of a backend that has no arithmetic: torch counts them on its model without weights, to the same figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny_sweep import PLUGIN, sweep_file

from alignbench.backends.cost import formulas
from alignbench.backends.cost.counted import CountedModel, Outline, count_model
from alignbench.backends.cost.formulas import GPUS, Model
from alignbench.backends.cost.published_configs import FLUX_1_DEV
from alignbench.backends.flux import Flux, FluxFlow
from alignbench.config import UserError
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.flow import Cond
from alignbench.planning.estimate import estimate
from alignbench.planning.memory import training_memory
from alignbench.plugins import Registry
from alignbench.rehearsal import tiny_backends

SAME = """
from typing import ClassVar

from alignbench.backends.flux import Flux

class Plain(Flux):
    \"\"\"FLUX without cost formulas.\"\"\"
    name: ClassVar[str] = "plain"
    cost_model: ClassVar = None
"""
BROKEN = SAME + "\n    def outline(self):\n        raise ValueError('of the\\n plug-in')\n"
UNABLE = SAME + "\n    outline: ClassVar = None\n"


def dev() -> Outline:
    """FLUX.1-dev on the meta device, by its published configuration; its prompts are 512 states."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    with torch.device("meta"):
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        blocks |= dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), False)
        vae = AutoencoderKL(**FLUX_1_DEV["vae"], **blocks, shift_factor=0.1, scaling_factor=0.4)
        parts = SimpleNamespace(
            transformer=FluxTransformer2DModel(**FLUX_1_DEV["transformer"]), vae=vae, scheduler=None
        )
    cond = Cond({"text": torch.zeros(1, 512, 4096), "pooled": torch.zeros(1, 768)})
    settings = Flux(dtype="bfloat16", size=1024)
    settings.__dict__["folder"] = Path("nowhere")
    flow = FluxFlow(parts, settings, lambda prompts: cond, torch.device("cpu"))
    return Outline(flow, parts.transformer, [vae])


@pytest.mark.slow
def test_flux_1_dev_is_counted_as_it_is_computed(monkeypatch):
    """Parameters, FLOPs of an evaluation, of its backward and of a decode equal the formulas to the last digit;
    the bytes saved without checkpointing are within 3 % of them, and those of a checkpointed evaluation within 1 %.
    """
    monkeypatch.setattr(Flux, "check_size", lambda *_: None)  # there is no configuration to check it by
    found, known = CountedModel(dev, "bfloat16"), Model.read(FLUX_1_DEV)
    network, expected = found.transformer, known.transformer
    assert network.parameters == expected.parameters
    assert network.adapters(Flux().lora_targets, 32) == expected.adapters(Flux().lora_targets, 32)
    size = 720
    shape, tokens = found.tokens(size, 512), known.tokens(size, 512)
    assert network.forward(shape) == expected.forward(tokens)
    assert [network.backward(shape, full) for full in (True, False)] == [
        expected.backward(tokens, full) for full in (True, False)
    ]
    assert found.decoder.forward(size) == known.decoder.forward(size)
    assert network.block_bytes(shape, 2) == pytest.approx(expected.block_bytes(tokens, 2), rel=0.03)
    for checkpointing, rel, rel_decoder in ((False, 0.03, 0.03), (True, 0.01, 0.15)):
        saved = expected.activation_bytes(tokens, 2, checkpointing)
        assert network.activation_bytes(shape, 2, checkpointing) == pytest.approx(saved, rel=rel)
        saved = known.decoder.activation_bytes(size, 2, checkpointing)
        assert found.decoder.activation_bytes(size, 2, checkpointing) == pytest.approx(saved, rel=rel_decoder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3", "flux2"])
@pytest.mark.parametrize("embeddings", ["computed", "stored"])
def test_every_pipeline_is_counted_as_it_is_computed(family, embeddings, folder):
    """Small models, text encoders and all: parameters and FLOPs exactly, but for a convolution of the autoencoder that
    FLUX.2's has and arithmetic does not, and SD3's CLIPs, which read fewer words than T5; stored embeddings leave the
    text encoders out.
    """
    settings = {**tiny_backends.backend(family, folder), "name": family, "size": 32, "embeddings": embeddings}
    backend = Registry().make("backend", settings, "backend")
    found, known = count_model(backend), backend.cost_model
    shape, tokens = found.tokens(backend.size, 0), known.tokens(backend.size, backend.text_tokens)
    assert found.transformer.parameters == known.transformer.parameters
    assert found.transformer.text == known.transformer.text
    assert found.transformer.forward(shape) == known.transformer.forward(tokens)
    extra = 2 * 4**2 * 16**2 if family == "flux2" else 0  # a 1 x 1 convolution of 4 channels, on 16 x 16 positions
    assert found.decoder.forward(backend.size) == known.decoder.forward(backend.size) + extra
    decoder = sum(parameter.numel() for parameter in backend.load().vae.parameters())
    assert found.frozen - decoder == sum(encoder.parameters for encoder in known.encoders)
    assert found.encode(0) == known.encode(tokens.text) or found.encode(0) < known.encode(tokens.text) * (
        family == "sd3"
    )
    assert (found.encode(0) == 0) == (embeddings == "stored")


def cells(tmp_path, plugin: str):
    """A trained run of the tiny sweep, with the packaged backend and with the plug-in's."""
    file = tmp_path / "plain.py"
    file.write_text(plugin)
    registry = Registry([str(file), PLUGIN])
    found = []
    for name in ("flux", "plain"):
        plan = resolve(read(sweep_file(tmp_path, {"base": {"backend": {"name": name}}})), registry)
        found.append(next(cell for cell in plan.cells if cell.trains))
    return found, plan, registry


@pytest.mark.slow
def test_a_plug_in_needs_no_arithmetic(tmp_path):
    """The estimate of a run is that of the same model with arithmetic: its hours to 1e-6, its memory to 10 %."""
    (known, plain), plan, registry = cells(tmp_path, SAME)
    expected, found = (estimate(cell, plan.evaluation, plan.evaluators, GPUS["h100"]) for cell in (known, plain))
    assert found.unknown == ""
    assert (found.images, found.usage, found.weights) == (expected.images, expected.usage, expected.weights)
    assert found.train == pytest.approx(expected.train, rel=1e-6)
    assert found.memory == pytest.approx(expected.memory, rel=0.1)
    peaks = [training_memory(cell.spec, registry).peak for cell in (known, plain)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        (BROKEN, "backend plain: its model does not run without weights (ValueError: of the plug-in)"),
        (UNABLE, "the measures of backend plain are not known"),
    ],
)
def test_what_cannot_be_counted_is_said(tmp_path, plugin, why):
    """An outline that raises, and none at all: a run without an estimate, and with the reason."""
    (_, plain), plan, registry = cells(tmp_path, plugin)
    assert estimate(plain, plan.evaluation, plan.evaluators, GPUS["h100"]).unknown == why
    with pytest.raises(UserError) as caught:
        training_memory(plain.spec, registry)
    assert str(caught.value) == f"Last: no estimate: {why}"


@pytest.mark.parametrize(
    ("part", "setting"),
    [("transformer", "_class_name"), ("vae", "_class_name"), ("text_encoder_2", "model_type")],
)
def test_arithmetic_is_for_what_it_was_written_for(part, setting):
    """A part of another class than those known has none, rather than another's."""
    assert formulas.has_formulas(FLUX_1_DEV)
    assert not formulas.has_formulas({**FLUX_1_DEV, part: {**FLUX_1_DEV[part], setting: "Another"}})

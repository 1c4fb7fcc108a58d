"""Unusable models give one line before they are loaded; images that are not finite are not written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_sweep import alignbench, debug_sweep, sweep_file

from alignbench import weights
from alignbench.analytic import GaussianFlow
from alignbench.backends.pipeline import PipelineBackend
from alignbench.config import UserError
from alignbench.evaluation.images import generate
from alignbench.experiment.spec import Protocol
from alignbench.prompts import Prompt
from alignbench.rehearsal.tiny_backends import backend
from alignbench.store.files import read_json

SHAPES = weights.SHAPES / "model"
WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
SHARDS = tuple(f"{WEIGHTS}-0000{i}-of-00002.safetensors" for i in (1, 2))


def told(capsys, tmp_path, changes: dict, *words: str) -> str:
    """The one line of `alignbench validate`, whose exit code is 1."""
    capsys.readouterr()
    assert alignbench("validate", sweep_file(tmp_path, changes), *words, store=tmp_path / "store") == 1
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line


def of(**settings) -> dict:
    return {"base": {"backend": settings}}


@pytest.fixture
def model(tmp_path) -> Path:
    """The shapes model, its transformer in two shards, to be spoilt."""
    folder = shutil.copytree(SHAPES, tmp_path / "model")
    whole = folder / "transformer" / f"{WEIGHTS}.safetensors"
    tensors = list(load_file(whole).items())
    whole.unlink()
    place = {name: SHARDS[i % 2] for i, (name, _) in enumerate(tensors)}
    for shard in SHARDS:
        part = {name: tensor for name, tensor in tensors if place[name] == shard}
        save_file(part, folder / "transformer" / shard, {"format": "pt"})
    (folder / "transformer" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / SHARDS[1]).unlink(), rf"{SHARDS[1]} is missing$"),
        (lambda f: cut(f / SHARDS[0]), rf"{SHARDS[0]} cannot be read: truncated: \d+ bytes instead of \d+$"),
        (
            lambda f: (f / INDEX).write_text("{}"),
            r"index.json lists no weight files \(weight_map\); fetch it again$",
        ),
        (lambda f: (f / "config.json").unlink(), r"config.json is missing$"),
    ],
    ids=["no shard", "half a shard", "no index", "no config"],
)
def test_a_folder_that_is_not_whole(tmp_path, capsys, model, spoil, words):
    """The file is named; as it was, the folder is fine."""
    assert alignbench("validate", sweep_file(tmp_path, of(model=str(model))), store=tmp_path / "store") == 0
    spoil(model / "transformer")
    assert re.search(rf"^alignbench: .*backend.model: .*{words}", told(capsys, tmp_path, of(model=str(model))))


@pytest.mark.parametrize(
    ("asked", "given", "cls"),
    [
        ("flux", "flux2", "Flux2KleinPipeline"),
        ("flux", "sd3", "StableDiffusion3Pipeline"),
        ("sd3", "flux", "FluxPipeline"),
        ("flux2", "sd3", "StableDiffusion3Pipeline"),
    ],
)
def test_another_familys_folder(tmp_path, capsys, asked, given, cls):
    """The error says what the folder holds, what was needed, and which backend reads it."""
    folder = SHAPES if given == "flux" else backend(given, tmp_path)["model"]
    line = told(capsys, tmp_path, of(name=asked, model=str(folder)))
    assert re.search(rf"holds a {cls}; {asked} needs a \w+; choose backend.name: {given}$", line)


def test_a_pipeline_of_no_backend(tmp_path, capsys, model):
    """It says so, rather than to name the nearest."""
    (model / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    assert told(capsys, tmp_path, of(model=str(model))).endswith("no backend reads a SanaPipeline")


def test_a_size_without_whole_tokens(tmp_path, capsys):
    """Training and evaluation sizes are both checked."""
    line = told(capsys, tmp_path, of(size=36))
    assert line.endswith("backend.size: 36 pixels are not a multiple of 8, the side of this model's tokens")
    line = told(capsys, tmp_path, {"evaluation": {"protocol": {"size": 36}}})
    assert re.search(r"evaluation.protocol.size: 36 pixels are not a multiple of 8", line)


@pytest.mark.slow
def test_float16(tmp_path, capsys):
    """The error says what to use instead, and why float16 is missing."""
    line = told(capsys, tmp_path, of(dtype="float16"))
    assert re.search(r"base.backend.dtype: .*'float16'.*; choose one of float32, bfloat16 \(float16 ends at", line)
    assert "float16 ends" not in told(capsys, tmp_path, of(dtype="float8"))


@pytest.mark.parametrize("compiler", ["g++", "nvc++ --diag_suppress=1"])
def test_no_compiler(tmp_path, capsys, monkeypatch, compiler):
    """`backend.compile` is refused before the model is loaded, and that reason is on record."""
    monkeypatch.setattr(PipelineBackend, "_pipeline", lambda *_: pytest.fail("loaded"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert debug_sweep(sweep_file(tmp_path, of(compile=True)), tmp_path / "store", "--only", "seed=0") == 2
    (status,) = (tmp_path / "store").glob("runs/*/status.json")
    name = re.escape(compiler.split()[0])
    pattern = rf"^training: backend.compile: there is no C\+\+ compiler \({name}\), .*; install one, or choose false$"
    assert re.search(pattern, read_json(status)["reason"])


# -- images ------------------------------------------------------------------------------------------------------------


def overflow(folder: Path, part: str, name: str) -> None:
    """One infinite weight."""
    path = folder / part / f"{WEIGHTS}.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] = torch.inf
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("transformer", "proj_out.bias", "its latents are not finite after step 1 of 2"),
        ("vae", "decoder.conv_in.bias", "its decoded pixels are not finite"),
    ],
)
def test_no_black_image_is_written(tmp_path, capsys, part, name, words):
    """Weights that overflow: generation fails with the prompt and the step, and no image is written."""
    folder = shutil.copytree(SHAPES, tmp_path / "model")
    overflow(folder, part, name)
    path = sweep_file(tmp_path, of(model=str(folder)))
    assert debug_sweep(path, tmp_path / "store", "--only", "method=base") == 2
    (status,) = (tmp_path / "store").glob("images/*/status.json")
    reason = read_json(status)["reason"]
    assert re.search(rf"^generation: image 0 of the prompt '.*': {words}; set backend.dtype: float32 if", reason)
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "store").rglob("*.png"))


def test_the_image_and_the_step_are_the_right_ones():
    """Among several images, the error names the one that overflows, and the step after which it is not finite."""

    class Overflows(GaussianFlow):
        def at(self, **_):
            return self

        def velocity(self, x, sigma, cond, *, reference=False):
            v = super().velocity(x, sigma, cond, reference=reference).clone()
            if sigma < 0.6:
                v[1] = torch.nan
            return v

    prompts = [Prompt(str(i), text) for i, text in enumerate(("a", "b", "c"))]
    protocol = Protocol(prompts="x", images_per_prompt=1, steps=4)
    step = int((Overflows().sigmas(4) < 0.6).int().argmax()) + 1
    assert 1 < step <= 4
    with pytest.raises(
        UserError, match=rf"^image 0 of the prompt 'b': its latents are not finite after step {step} of"
    ):
        list(generate(Overflows(), prompts, protocol))

"""Whatever a pipeline loads is complete: a tensor that lacks, is unknown or has another shape is named, early."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_sweep import alignbench, sweep_file

from alignbench import weights
from alignbench.backends.flux import Flux
from alignbench.config import UserError

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
PARTS = {"text_encoder": TRANSFORMERS, "text_encoder_2": TRANSFORMERS, "vae": DIFFUSERS, "transformer": DIFFUSERS}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Return a copy of the packaged pipeline, with a cache of its own."""
    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path / "cache"))
    shutil.copytree(Flux(model="shapes").folder, tmp_path / "model")
    return tmp_path / "model"


def changed(path, change):
    """Change the tensors in a file; return the name that ``change`` returns."""
    state = load_file(path)
    name = change(state)
    save_file(state, path, metadata={"format": "pt"})
    return name


def drop(state):
    name = sorted(state)[5]
    del state[name]
    return name


def add(state):
    state["extra.weight"] = torch.ones(2)
    return "extra.weight"


def reshape(state):
    name = sorted(state)[0]
    state[name] = torch.ones(3, 3)
    return name


def quantize(state):
    name = sorted(state)[0]
    state[name] = state[name].to(torch.int8)
    return name


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [drop, add, reshape, quantize])
def test_a_part_with_other_tensors_is_refused_by_file_and_name(model, part, change):
    """Every part of the pipeline, before anything is loaded: its file and the tensor, in one line."""
    name = changed(model / part / PARTS[part], change)
    with pytest.raises(UserError, match=rf"^backend\.model: .*/{part}") as caught:
        Flux(model=str(model)).check_complete()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_complete_pipeline_is_looked_at_once(model, monkeypatch):
    """The second time no class is built; another tensor is another content, and is looked at again."""
    Flux(model=str(model)).check_complete()
    with monkeypatch.context() as patched:
        patched.setattr(weights, "_misfits", lambda *_: pytest.fail("built again"))
        Flux(model=str(model)).check_complete()
    changed(model / "text_encoder" / TRANSFORMERS, drop)
    with pytest.raises(UserError, match="lacks"):
        Flux(model=str(model)).check_complete()


def test_tied_weights_may_be_absent(tmp_path, monkeypatch):
    """T5's embedding has two names, and transformers saves one."""
    from transformers import T5Config, T5EncoderModel

    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path / "cache"))
    encoder = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    encoder.save_pretrained(tmp_path)
    assert set(encoder.state_dict()) - set(load_file(tmp_path / TRANSFORMERS)) == {"encoder.embed_tokens.weight"}
    weights.check_complete("transformers", "T5EncoderModel", tmp_path, "here")


def test_old_names_of_an_autoencoder_are_known(tmp_path, monkeypatch):
    """As in sd-vae-ft-mse: its attention has the names of diffusers 0.12, which its class converts."""
    from diffusers import AutoencoderKL

    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path / "cache"))
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state):
        for name in [name for name in state if ".attentions." in name]:
            renamed = name
            for new, before in old.items():
                renamed = renamed.replace(f".{new}.", f".{before}.")
            state[renamed] = state.pop(name)
        return [name for name in state if ".query." in name]

    assert changed(tmp_path / DIFFUSERS, rename)
    weights.check_complete("diffusers", "AutoencoderKL", tmp_path, "here")


def sharded(folder, file):
    """Split a part of a pipeline into two files with an index; return the second."""
    state = load_file(folder / file)
    (folder / file).unlink()
    names = sorted(state)
    stem = file.removesuffix(".safetensors")
    places = {name: f"{stem}-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        kept = {name: state[name] for name in names if places[name] == shard}
        save_file(kept, folder / shard, metadata={"format": "pt"})
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / places[names[1]]


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda file: file.unlink(), "-00002-of-00002.safetensors is missing"),
        (lambda file: changed(file, drop), " lacks "),
        (lambda file: changed(file, add), " has .*extra.weight"),
    ],
)
def test_shards_hold_what_their_index_says(model, part, change, line):
    """A missing file, a tensor fewer or more in one, although the index lists all: an error with the file."""
    shard = sharded(model / part, PARTS[part])
    Flux(model=str(model)).check_complete()
    change(shard)
    with pytest.raises(UserError, match=rf"/{part}/.*{line}"):
        Flux(model=str(model)).check_complete()


def test_an_index_may_list_tied_weights_that_no_file_has(model):
    """Transformers' older versions wrote such ones."""
    sharded(model / "text_encoder_2", TRANSFORMERS)
    index = model / "text_encoder_2" / f"{TRANSFORMERS}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["encoder.embed_tokens.weight"] = content["weight_map"]["shared.weight"]
    index.write_text(json.dumps(content))
    Flux(model=str(model)).check_complete()


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"x": [1]},
        {"x": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": "ab"}},
        {"__metadata__": {"a": 1}, "x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    ],
)
def test_headers_of_another_form_are_one_line(tmp_path, content):
    """Lists, numbers and texts in the place of others."""
    text = json.dumps(content).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(UserError, match=r"a\.safetensors cannot be read: its header is not that of a safetensors file"):
        weights.check([tmp_path / "a.safetensors"], "here")


def test_the_command_line_says_it_before_the_job(model, tmp_path, capsys):
    """``validate`` and ``sweep`` end with code 1 and the tensor's name; nothing is in the store."""
    name = changed(model / "text_encoder_2" / TRANSFORMERS, drop)
    path = sweep_file(tmp_path, {"base": {"backend": {"model": str(model)}}})
    for words in (["validate", path], ["sweep", path, "--launcher", "debug"]):
        assert alignbench(*words, store=tmp_path / "store") == 1
        assert f"text_encoder_2/{TRANSFORMERS}: lacks {name}; T5EncoderModel would be used" in capsys.readouterr().err
    assert not list((tmp_path / "store").rglob("*.png"))

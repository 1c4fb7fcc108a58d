"""Adapters: every tensor, key and companion is read or named, and their strength is what it was in training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from alignbench.backends.lora import read_lora
from alignbench.config import UserError
from alignbench.weights import published

D, WIDTH = 16, 3072  # of FLUX.1: sd-scripts' names of single blocks are converted at its own width only
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
Q, K = f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k"
QKV = [f"{BLOCK}.attn.to_{x}" for x in "qkv"]
FLUX = {
    **dict.fromkeys([*QKV, f"{BLOCK}.attn.to_out.0", f"{BLOCK}.attn.to_add_out"], (D, D)),
    **dict.fromkeys([f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"], (D, D)),
    **dict.fromkeys([f"{SINGLE}.attn.to_{x}" for x in "qkv"], (WIDTH, D)),
    f"{BLOCK}.ff.net.0.proj": (4 * D, D),
    f"{SINGLE}.proj_mlp": (4 * WIDTH, D),
    f"{SINGLE}.proj_out": (D, 5 * D),
    "x_embedder": (D, 64),
    "norm_out.linear": (2 * D, D),
}
FLUX_2 = {
    **dict.fromkeys([*QKV, f"{BLOCK}.attn.to_out.0"], (32, 32)),
    f"{SINGLE}.attn.to_qkv_mlp_proj": (288, 32),
    "single_stream_modulation.linear": (96, 32),
}
FILE = "pytorch_lora_weights.safetensors"
PEFT = {"r": 2, "lora_alpha": 4, "target_modules": [Q]}


def halves(layer, out=D, inner=D, down="lora_A", up="lora_B", alpha=None, dtype=torch.float32):
    """Random adapters of rank 2 for one layer, under the names of a trainer."""
    rng = torch.Generator().manual_seed(len(layer))
    a, b = torch.randn(2, inner, generator=rng), torch.randn(out, 2, generator=rng)
    state = {f"{layer}.{down}.weight": a.to(dtype), f"{layer}.{up}.weight": b.to(dtype)}
    return state if alpha is None else state | {f"{layer}.alpha": torch.tensor(float(alpha))}


def kohya(layer, out=D, inner=D, alpha=1):
    return halves(layer, out, inner, "lora_down", "lora_up", alpha)


def read(folder, state, layers=FLUX, pipeline="FluxPipeline", header=None, beside=None, **row):
    save_file(state, folder / FILE, metadata=header)
    for name, content in (beside or {}).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_lora(published(str(folder), "method.weights"), layers, pipeline, **row)


def update(lora, layer):
    return lora.tensors[f"{layer}.lora_B.weight"] @ lora.tensors[f"{layer}.lora_A.weight"]


def product(state):
    """B A of one layer, whatever its names."""
    a, b = (tensor for name, tensor in state.items() if not name.endswith("alpha"))
    return b @ a


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "targets", "strength"),
    [
        (halves(f"diffusion_model.{Q}"), [Q], 1),
        (halves(Q, down="lora_A.default", up="lora_B.default"), [Q], 1),
        (halves(f"transformer.{Q}", down="lora_down", up="lora_up", alpha=6), [Q], 3),
        (halves(f"transformer.{BLOCK}.attn.processor.to_q_lora", down="down", up="up"), [Q], 1),
        (
            halves(f"transformer.{BLOCK}.attn.processor.to_out_lora", down="down", up="up"),
            [f"{BLOCK}.attn.to_out.0"],
            1,
        ),
        (halves(f"transformer.{Q}", down="lora.down", up="lora.up"), [Q], 1),
        (halves(Q, down="lora_linear_layer.down", up="lora_linear_layer.up"), [Q], 1),
        (kohya("lora_transformer_transformer_blocks_0_attn_to_q", alpha=6), [Q], 3),
        (kohya("lora_unet_double_blocks_0_img_attn_qkv", 3 * D, alpha=6), QKV, 3),
        (kohya("diffusion_model.double_blocks.0.img_attn.qkv", 3 * D, alpha=6), QKV, 3),
        (halves("diffusion_model.double_blocks.0.img_attn.qkv", 3 * D), QKV, 1),
        (halves("base_model.model.double_blocks.0.img_attn.qkv", 3 * D), QKV, 1),
        (halves("double_blocks.0.processor.qkv_lora1", 3 * D, D, "down", "up"), QKV, 1),
        (halves("single_blocks.0.processor.proj_lora", D, 5 * D, "down", "up"), [f"{SINGLE}.proj_out"], 1),
        (
            kohya("lora_unet_single_blocks_0_linear1", 7 * WIDTH, alpha=6),
            [*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"],
            3,
        ),
        (kohya("lora_unet_img_in", D, 64, alpha=6), ["x_embedder"], 3),
    ],
)
def test_names_of_other_trainers_are_those_of_the_model(tmp_path, state, targets, strength):
    """The update of W is strength x B A, its rows in the order of the layers that the file has fused."""
    lora = read(tmp_path, state)
    assert set(lora.tensors) == {f"{layer}.lora_{x}.weight" for layer in targets for x in "AB"}
    torch.testing.assert_close(
        torch.cat([update(lora, layer) for layer in targets]), strength * product(state), rtol=1e-4, atol=1e-4
    )


def test_the_final_modulation_keeps_its_alpha(tmp_path):
    """Scale and shift change places, as in diffusers; alpha 6 of rank 2 makes it three times as strong."""
    state = kohya("lora_unet_final_layer_adaLN_modulation_1", 2 * D, alpha=6)
    shift, scale = (3 * product(state)).chunk(2)
    swapped = torch.cat([scale, shift])
    torch.testing.assert_close(update(read(tmp_path, state), "norm_out.linear"), swapped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("state", "targets"),
    [
        (halves("diffusion_model.double_blocks.0.img_attn.qkv", 96, 32), QKV),
        (halves("diffusion_model.single_blocks.0.linear1", 288, 32), [f"{SINGLE}.attn.to_qkv_mlp_proj"]),
        (halves("base_model.model.single_stream_modulation.lin", 96, 32), ["single_stream_modulation.linear"]),
        (kohya("lora_unet_double_blocks_0_img_attn_qkv", 96, 32, alpha=2), QKV),
    ],
)
def test_names_of_flux_2(tmp_path, state, targets):
    """The same for FLUX.2, by the converter of its own pipeline."""
    lora = read(tmp_path, state, FLUX_2, "Flux2KleinPipeline")
    torch.testing.assert_close(torch.cat([update(lora, layer) for layer in targets]), product(state))


@pytest.mark.parametrize(
    ("pipeline", "state", "line"),
    [
        (
            "FluxPipeline",
            kohya("lora_unet_double_blocks_77_img_attn_proj"),
            r"sd-scripts \(kohya\): diffusers converts",
        ),
        ("FluxPipeline", kohya("lora_unet_down_blocks_0_attentions_0_proj_in"), "adapters of a UNet"),
        ("FluxPipeline", halves(f"unet.{Q}"), "adapters of a UNet"),
        ("FluxPipeline", halves(f"lora.{Q}"), "diffusers converts no such name for FluxPipeline; rename it to diff"),
        ("StableDiffusion3Pipeline", kohya("lora_unet_joint_blocks_0_x_block_attn_qkv"), r"sd-scripts \(kohya\): dif"),
        ("StableDiffusion3Pipeline", halves("diffusion_model.joint_blocks.0.x_block.attn.qkv"), "Stability AI's own"),
        ("Flux2KleinPipeline", kohya("lora_unet_single_stream_modulation_lin"), "converts no such name for Flux2Klein"),
        ("FluxPipeline", halves(f"ema.{Q}"), "alignbench's own weights of a run: diffusers converts no such name"),
        ("SiTPipeline", kohya("lora_unet_blocks_0_attn_qkv"), "converts no such name for SiTPipeline"),
    ],
)
def test_names_that_diffusers_does_not_convert_are_named_with_their_format(tmp_path, pipeline, state, line):
    """Also those that its converter drops with no more than a warning."""
    with pytest.raises(UserError, match=line) as caught:
        read(tmp_path, state, pipeline=pipeline)
    assert next(iter(state)).split(".lora_")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{Q}.lora_magnitude_vector", "a magnitude of DoRA"),
        (f"{Q}.dora_scale", "a magnitude of DoRA"),
        (f"{Q}.hada_w1_a", "a part of LoHa"),
        (f"{Q}.lokr_w1", "a part of LoKr"),
        (f"{Q}.lora_mid.weight", "a convolution of LoCon"),
        (f"{Q}.diff", "the difference of a whole weight"),
        (f"{Q}.diff_b", "the difference of a whole weight"),
        (f"{Q}.lora_B.bias", "a bias of adapters"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "a changed norm"),
        (f"{Q}.scale_weight", "a scale of quantized weights"),
        ("base_model.model.proj_out.weight", "is not a lora_A, lora_B or alpha of a linear layer"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "belongs to a text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "belongs to a text encoder"),
    ],
)
def test_parts_that_are_not_loaded_are_named(tmp_path, name, what):
    """Beside whole adapters: the tensor's name, and what it is."""
    with pytest.raises(UserError, match=what) as caught:
        read(tmp_path, halves(Q) | {name: torch.ones(2)})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (
            halves(Q, down="lora_A.one", up="lora_B.one") | halves(Q, down="lora_A.two", up="lora_B.two"),
            r"\(one, two\)",
        ),
        (halves(Q) | halves(f"transformer.{Q}"), rf"transformer.{Q} and {Q} are both adapters of {Q}"),
        (halves(Q) | kohya("lora_unet_double_blocks_0_img_attn_qkv", 3 * D), "has no alpha while other layers have"),
        (dict(list(kohya("lora_unet_img_in", D, 64).items())[1:]), "lora_unet_img_in.lora_A.weight is missing"),
        (halves(Q, dtype=torch.int8), "is I8, not floating-point"),
        ({name: tensor * float("nan") for name, tensor in halves(Q).items()}, "values that are not finite"),
        (halves(Q) | {f"{Q}.lora_B.weight": torch.full((D, 2), float("inf"))}, "lora_B.weight has values that are not"),
        (halves(Q, 64, 64), "are they adapters of this model"),
        (halves(Q) | {f"{Q}.lora_B.weight": torch.ones(D, 3)}, "do not make a pair of matrices"),
        (halves(Q) | {f"{Q}.alpha": torch.ones(2)}, "is not one positive number"),
        (halves(Q, alpha=0), "is not one positive number"),
        (halves(Q) | {f"{Q}.lora_B.weight": torch.zeros(D, 2)}, "every lora_B is zero, as before training"),
        ({}, "there are no tensors in it"),
    ],
)
def test_files_that_cannot_be_right_are_refused(tmp_path, state, line):
    """Two adapters in one file, one layer twice, halves, numbers that are none, another base, no tensors."""
    with pytest.raises(UserError, match=line):
        read(tmp_path, state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_format_is_read_exactly(tmp_path, dtype):
    """The stored values, in float32."""
    state = halves(Q, dtype=dtype)
    assert torch.equal(update(read(tmp_path, state), Q), product({name: t.float() for name, t in state.items()}))


def test_shards_of_adapters_are_all_read(tmp_path):
    """Two files and their index: the adapters of both."""
    parts = {"a.safetensors": halves(Q), "b.safetensors": halves(K)}
    for name, state in parts.items():
        save_file(state, tmp_path / name)
    places = {tensor: name for name, state in parts.items() for tensor in state}
    (tmp_path / "all.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    lora = read_lora(published(str(tmp_path), "method.weights"), FLUX, "FluxPipeline")
    assert {name.split(".lora_")[0] for name in lora.tensors} == {Q, K}


# -- strength ---------------------------------------------------------------------------------------------------------

DANCE = {"step": 300, "lora_params": {"lora_rank": 2, "lora_alpha": 4, "target_modules": [Q]}}


@pytest.mark.parametrize(
    ("place", "row", "strength"),
    [
        ({"beside": {"lora_config.json": DANCE}}, {}, 2),
        ({"beside": {"lora_config.json": {"lora_rank": 2, "lora_alpha": 6}}}, {}, 3),
        ({"beside": {"adapter_config.json": PEFT}}, {}, 2),
        ({"beside": {"adapter_config.json": PEFT | {"use_rslora": True}}}, {}, 4 / 2**0.5),
        ({"beside": {"adapter_config.json": PEFT | {"alpha_pattern": {"attn.to_q": 6}}}}, {}, 3),
        ({"beside": {"adapter_config.json": PEFT | {"r": 8, "rank_pattern": {"to_q": 2}}}}, {}, 2),
        ({"beside": {"adapter_config.json": PEFT, "lora_config.json": DANCE}}, {}, 2),
        ({"header": {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}}, {}, 3),
        ({"header": {"lora_alpha": "6"}}, {}, 3),
        ({"header": {"ss_network_alpha": "6", "ss_network_dim": "2"}}, {}, 3),
        ({}, {"alpha": 6}, 3),
        ({}, {"scale": 6}, 6),
        ({"beside": {"adapter_config.json": PEFT}}, {"alpha": 6}, 3),
        ({"beside": {"adapter_config.json": PEFT | {"use_rslora": True}}}, {"alpha": 6}, 6 / 2**0.5),
        ({"beside": {"adapter_config.json": PEFT}}, {"scale": 0.5}, 0.5),
        ({"beside": {"config.yaml": "linear_alpha: 8", "README.md": "", "optimizer.pt": ""}}, {"scale": 3}, 3),
    ],
)
def test_strength_is_alpha_by_rank_wherever_alpha_stands(tmp_path, place, row, strength):
    """A trainer's file, peft's, the header; or the row, which decides."""
    state = halves(Q)
    lora = read(tmp_path, state, **place, **row)
    torch.testing.assert_close(update(lora, Q), strength * product(state))
    assert lora.stated


def test_a_strength_that_nothing_says_is_one_and_reported(tmp_path):
    """As diffusers takes it; XLabs' trainer has no alpha, so nothing is missing there."""
    state = halves(Q)
    lora = read(tmp_path, state)
    assert torch.equal(update(lora, Q), product(state))
    assert not lora.stated
    assert read(tmp_path, halves("double_blocks.0.processor.proj_lora1", D, D, "down", "up")).stated


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ({"training_config.json": {"alpha": 4}}, "training_config.json stands beside adapters and is unknown"),
        ({"config.json": {"alpha": 4}}, "config.json stands beside adapters and is unknown"),
        ({"training_args.json": {"lora_alpha": 4}}, "training_args.json stands beside adapters and is unknown"),
        ({"config.yaml": "linear_alpha: 8"}, "config.yaml stands beside adapters"),
        ({"pytorch_model.bin": "x"}, "pytorch_model.bin stands beside adapters and is not read"),
        ({"lora_config.json": {"lora_rank": 8, "lora_alpha": 4}}, f"lora_config.json: the rank of {Q} is 8, and its"),
        ({"lora_config.json": {"lora_rank": 2}}, "lora_config.json: there is no alpha in it; say the strength on"),
        ({"lora_config.json": DANCE | {"gamma": 2}}, r"the key gamma \(2\) is unknown"),
        ({"lora_config.json": {"lora_rank": 2, "lora_alpha": "4"}}, 'lora_alpha is "4", not a positive number'),
        ({"lora_config.json": [4]}, "expected keys and values, got a list"),
        ({"adapter_config.json": PEFT, "lora_config.json": {"lora_alpha": 6}}, "is 4 in .*adapter_config.* and 6 in"),
        ({"lora_config.json": DANCE | {"lora_alpha": 8}}, "lora_alpha is 8 and, again, 4"),
        ({"lora_config.json": {"lora_rank": 2, "r": 4, "lora_alpha": 4}}, "r is 2 and, again, 4"),
        ({"lora_config.json": {"lora_params": [4]}}, r"lora_params is \[4\], not keys and values"),
        ({"LORA_CONFIG.JSON": DANCE}, "LORA_CONFIG.JSON stands beside adapters and is unknown"),
        ({"more.SAFETENSORS": "x"}, "more.SAFETENSORS stands beside adapters and is not read"),
    ],
)
def test_companions_that_leave_the_strength_open_are_refused(tmp_path, place, line):
    """Unknown files and keys, no alpha, another rank, two places that contradict each other: with the remedy."""
    with pytest.raises(UserError, match=line) as caught:
        read(tmp_path, halves(Q), beside=place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"lora_alpha": "much"},
        {"network_scale": "2"},
        {"lora_adapter_metadata": "{"},
        {"alpha": "8", "lora_alpha": "4"},
        {"ss_network_alpha": "8", "lora_alpha": "4"},
        {"r": "8", "rank": "2", "lora_alpha": "4"},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "lora_alpha": 8})},
    ],
)
def test_headers_that_leave_the_strength_open_are_refused(tmp_path, header):
    """The key is named; keys that concern training or the file's format are none of these."""
    with pytest.raises(UserError, match=next(iter(header))):
        read(tmp_path, halves(Q), header=header)
    fine = {"format": "pt", "ss_network_module": "networks.lora_flux", "modelspec.title": "x", "software": "y"}
    read(tmp_path, halves(Q), header=fine)


# -- peft's configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", start) for start in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")),
        ("init_lora_weights", "a new start"),
        ("use_dora", True),
        ("modules_to_save", ["proj_out"]),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("peft_type", "LOKR"),
        ("megatron_config", {"a": 1}),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
        ("kasa_config", {"a": 1}),
        ("a_new_key", False),
        ("use_rslora", "false"),
        ("alpha_pattern", {"(": 4}),
        ("alpha_pattern", {"to_k": 8}),
        ("alpha_pattern", {f"transformer.{Q}": 8}),
        ("target_modules", "("),
        ("target_modules", 5),
        ("lora_alpha", None),
        ("lora_alpha", -4),
        ("r", 8),
        ("rank_pattern", {"to_q": 3}),
        ("target_modules", "all-linear"),
        ("target_modules", ["attn.to_q"]),
        ("exclude_modules", ["to_q"]),
    ],
)
def test_keys_that_cannot_be_honoured_are_named(tmp_path, key, value):
    """The base was changed, other parts were trained, layers lack, or nobody knows: one line with file and key."""
    with pytest.raises(UserError, match=r"adapter_config\.json: .*") as caught:
        read(tmp_path, halves(Q), beside={"adapter_config.json": PEFT | {key: value}})
    named = {"lora_alpha": "alpha", "r": "rank", "rank_pattern": "rank", "exclude_modules": "target_modules"}
    assert named.get(key, key) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_key_of_peft_is_known(tmp_path):
    """A configuration as peft writes it, all defaults included, is read: a key added to peft has to be classified."""
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=4, target_modules=[Q], inference_mode=True).to_dict()
    plain = json.loads(json.dumps(config | {"target_modules": [Q], "runtime_config": None}, default=str))
    state = halves(Q)
    torch.testing.assert_close(
        update(read(tmp_path, state, beside={"adapter_config.json": plain}), Q), 2 * product(state)
    )

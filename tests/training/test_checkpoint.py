"""Published weights as rows: what is loaded is what was published, all of it, and the base model stays the base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from msgspec import structs
from safetensors.torch import load_file, save_file
from support import tiny
from support.tiny_sweep import PLUGIN, SWEEP, alignbench, debug_sweep, sweep_file, tables

from alignbench.analytic import AffineFlow
from alignbench.backends.flux import Flux
from alignbench.config import UserError
from alignbench.experiment.document import read
from alignbench.experiment.ids import run_id
from alignbench.experiment.plan import resolve
from alignbench.flow import integrate
from alignbench.methods.checkpoint import Checkpoint
from alignbench.plugins import Registry

PROMPTS = ["a photo of a red circle", "two blue square"]
WORDS = 24
SINGLE = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.flux_folder(tmp_path_factory.mktemp("flux"), scale=2.0)


def load(folder, **settings):
    plain = {"size": 32, "dtype": "float32", "max_sequence_length": WORDS}
    return Flux(model=str(folder), **{**plain, **settings}).load()


def pipeline(folder):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators():
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def images(flow, reference=False):
    with torch.no_grad():
        x = flow.noise(2, generators())
        x = integrate(flow, x, flow.sigmas(4), flow.encode(PROMPTS), reference=reference)
        return flow.decode(x)


def theirs(pipe):
    call = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": WORDS, "output_type": "pt"}
    return pipe(PROMPTS, generator=generators(), **call).images


def perturbed(module):
    """``module``, moved far enough to be seen."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return module


@pytest.fixture(scope="module")
def tuned(folder):
    """A pipeline whose transformer has been trained."""
    pipe = pipeline(folder)
    perturbed(pipe.transformer)
    return pipe


@pytest.fixture(scope="module")
def published(tuned, tmp_path_factory):
    """The same transformer in every layout that is published: diffusers' single file, shards, file and no config."""
    top = tmp_path_factory.mktemp("published")
    tuned.transformer.save_pretrained(top / "single")
    tuned.transformer.save_pretrained(top / "shards", max_shard_size="60KB")
    assert len(list((top / "shards").glob("*.safetensors"))) > 2
    (top / "bare").mkdir()
    shutil.copy(top / "single" / SINGLE, top / "bare" / SINGLE)
    shutil.copytree(top / "single", top / "below" / "transformer")
    return top


def adapted(folder, targets=("attn.to_q", "ff.net.2"), rank=4, alpha=8, **more):
    """A pipeline whose transformer has trained adapters."""
    from peft import LoraConfig

    pipe = pipeline(folder)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False, **more)
    )
    return pipe


def adapters(pipe):
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(pipe.transformer)


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize(
    "where",
    [{"weights": "single"}, {"weights": "shards"}, {"weights": f"bare/{SINGLE}"}, {"weights": "bare"},
     {"weights": "below", "subfolder": "transformer"}],
    ids=lambda where: where["weights"],
)  # fmt: skip
def test_images_are_those_of_a_pipeline_with_these_weights(folder, tuned, published, where, tune):
    """Every layout, on a backend that trains everything or adapters: FluxPipeline's images to 1e-5, not the base's."""
    flow = load(folder, tune=tune)
    before = images(flow)
    Checkpoint(**where | {"weights": str(published / where["weights"])}).prepare(flow)
    assert (images(flow) - theirs(tuned)).abs().max() <= 1e-5
    assert (images(flow) - before).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_reference_is_still_the_base(folder, published, tune):
    """Bitwise, in a view made before and in one made after the weights were loaded."""
    flow = load(folder, tune=tune)
    base, early = images(flow), flow.at(guidance=3.5)
    Checkpoint(weights=str(published / "single")).prepare(flow)
    for view in (flow, early, flow.at(guidance=3.5)):
        assert torch.equal(images(view, reference=True), base)
        assert not torch.equal(images(view), base)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rank_pattern": {"to_q": 2}},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5, "transformer_blocks.1.ff.net.2": 3}},
        {"use_rslora": True},
    ],
    ids=["plain", "two ranks", "own strengths", "rank-stabilised"],
)
def test_adapters_have_the_strength_that_their_file_says(folder, tmp_path, more, tune):
    """diffusers' layout with its metadata: the images are those of the pipeline that saved them, the reference is base.

    Bitwise on a backend with adapters of its own, which are switched off.
    """
    pipe = adapted(folder, **more)
    pipe.transformer.save_lora_adapter(tmp_path)
    flow = load(folder, tune=tune, lora_rank=3)
    base = images(flow)
    Checkpoint(weights=str(tmp_path), kind="lora").prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5
    assert (images(flow) - base).abs().max() > 0.02
    assert torch.equal(images(flow, reference=True), base)
    assert torch.equal(images(flow.at(), reference=True), base)


def test_adapters_of_a_pipeline(folder, tmp_path):
    """FluxPipeline.save_lora_weights, names under "transformer.", no metadata: what load_lora_weights makes of it."""
    from diffusers import FluxPipeline

    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=adapters(adapted(folder)))
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path)
    flow = load(folder)
    Checkpoint(weights=str(tmp_path / LORA), kind="lora").prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5


def test_adapters_of_peft(folder, tmp_path):
    """peft's layout has alpha in adapter_config.json: the images of the model that was saved."""
    pipe = adapted(folder)
    save_file({f"base_model.model.{k}": v for k, v in adapters(pipe).items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    flow = load(folder)
    Checkpoint(weights=str(tmp_path), kind="lora").prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5


def test_adapters_of_dancegrpo(folder, tmp_path):
    """Its trainer keeps rank and alpha in lora_config.json: the images of the model that was trained."""
    from diffusers import FluxPipeline

    pipe = adapted(folder)
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=adapters(pipe), safe_serialization=True)
    said = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["attn.to_q", "ff.net.2"]}
    (tmp_path / "lora_config.json").write_text(json.dumps({"step": 300, "lora_params": said}))
    flow = load(folder)
    Checkpoint(weights=str(tmp_path), kind="lora").prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5


def kohya():
    """Adapters under the names of sd-scripts, with alpha 6 of rank 2, for layers that the tiny model has."""
    parts = {"attn_qkv": (96, 32), "attn_proj": (32, 32), "mlp_0": (128, 32), "mlp_2": (32, 128)}
    state = {}
    for stream in ("img", "txt"):
        for part, (out, inner) in parts.items():
            name = f"lora_unet_double_blocks_1_{stream}_{part}"
            state[f"{name}.lora_down.weight"] = 0.3 * torch.randn(
                2, inner, generator=torch.Generator().manual_seed(out)
            )
            state[f"{name}.lora_up.weight"] = 0.3 * torch.randn(out, 2, generator=torch.Generator().manual_seed(inner))
            state[f"{name}.alpha"] = torch.tensor(6.0)
    return state


def test_adapters_of_sd_scripts(folder, tmp_path):
    """Both streams of a double block: the images of a pipeline with load_lora_weights."""
    save_file(kohya(), tmp_path / LORA)
    pipe, flow = pipeline(folder), load(folder)
    before = images(flow)
    pipe.load_lora_weights(tmp_path)
    Checkpoint(weights=str(tmp_path), kind="lora").prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5
    assert (images(flow) - before).abs().max() > 0.02


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_changed_the_base_are_refused(folder, tmp_path, start):
    """Started from the base's own values, they are not what is added to it; diffusers' header says so."""
    from peft import LoraConfig

    pipe = pipeline(folder)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q"], init_lora_weights=start))
    pipe.transformer.save_lora_adapter(tmp_path)
    with pytest.raises(UserError, match=f"init_lora_weights is {start}, which changes the base model as well"):
        Checkpoint(weights=str(tmp_path), kind="lora").fits(Flux(model=str(folder), size=32))


def test_one_of_several_files(folder, tmp_path):
    """``file`` chooses; without it the folder is refused, and a wrong name gets the nearest."""
    for name, factor in (("early.safetensors", 1.0), ("late.safetensors", 2.0)):
        save_file({n: t if n.endswith("alpha") else factor * t for n, t in kohya().items()}, tmp_path / name)
    made = {"weights": str(tmp_path), "kind": "lora"}
    with pytest.raises(UserError, match=r"early.safetensors, late.safetensors\); name one file, .* method.file"):
        Checkpoint(**made).files()
    with pytest.raises(UserError, match=r"has no file 'lte.safetensors'; did you mean 'late.safetensors'"):
        Checkpoint(**made, file="lte.safetensors").files()
    chosen = Checkpoint(**made, file="late.safetensors")
    assert chosen.files() == [tmp_path / "late.safetensors"]
    assert chosen.fits(Flux(model=str(folder), size=32)) == []


def test_a_strength_on_the_row(folder, tmp_path):
    """``scale`` 0.5 is half of what diffusers adds; said twice, or of a transformer, it is refused."""
    adapted(folder).transformer.save_lora_adapter(tmp_path)
    made = {"weights": str(tmp_path), "kind": "lora"}
    pipe, flow = pipeline(folder), load(folder)
    pipe.transformer.load_lora_adapter(load_file(tmp_path / LORA), prefix=None)
    for layer in pipe.transformer.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default_0", 0.5)
    Checkpoint(**made, scale=0.5).prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5
    for wrong in ({"scale": 1.0, "alpha": 2.0}, {"scale": 0.0}, {"alpha": 1.0, "kind": "transformer"}):
        with pytest.raises(UserError, match=r"method\.(scale|alpha)"):
            Checkpoint(**made | wrong)


def test_alphas_beside_the_tensors(folder, tmp_path):
    """``<layer>.alpha``, as trainers write it."""
    pipe = adapted(folder)
    state = adapters(pipe)
    layers = {name.rpartition(".lora_")[0] for name in state}
    save_file(state | {f"{layer}.alpha": torch.tensor(8.0) for layer in layers}, tmp_path / LORA)
    flow = load(folder)
    Checkpoint(weights=str(tmp_path), kind="lora").prepare(flow)
    assert (images(flow) - theirs(pipe)).abs().max() <= 1e-5


@pytest.mark.slow
def test_bfloat16(folder, tuned, published, tmp_path):
    """Frozen parts in bfloat16: the velocity is within 5 % of float32's, and adapters themselves stay float32."""
    adapted(folder).transformer.save_lora_adapter(tmp_path)
    for made in (Checkpoint(weights=str(published / "single")), Checkpoint(weights=str(tmp_path), kind="lora")):
        exact, *rough = (load(folder), *(load(folder, dtype="bfloat16", tune=tune) for tune in ("full", "lora")))
        velocities = []
        for flow in (exact, *rough):
            made.prepare(flow)
            with torch.no_grad():
                at = flow.at(guidance=4.0)
                velocities.append(at.velocity(flow.noise(2, generators()), 0.5, at.encode(PROMPTS)))
            assert {p.dtype for name, p in flow.transformer.named_parameters() if "lora_" in name} <= {torch.float32}
        for v in velocities[1:]:
            assert (v - velocities[0]).norm() < 0.05 * velocities[0].norm()


# -- what does not fit ------------------------------------------------------------------------------------------------


def spoilt(source, target, change):
    """A copy of a weight file with its tensors changed."""
    state = load_file(source)
    change(state)
    save_file(state, target)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s.pop("proj_out.bias"), r"1 parameters do not fit the model \(proj_out.bias is absent in the file"),
        (lambda s: s.update(extra=torch.ones(1)), r"extra is \(1,\) in the file and absent in the model"),
        (lambda s: s.update({"proj_out.bias": torch.ones(3)}), r"proj_out.bias is \(3,\) in the file and \(16,\)"),
    ],
)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_transformer_that_does_not_fit_is_named_and_not_loaded(folder, published, tmp_path, change, line, tune):
    """A name too few, one too many, another shape: the first is named, and the flow is as it was."""
    spoilt(published / "single" / SINGLE, tmp_path / SINGLE, change)
    flow = load(folder, tune=tune)
    before = images(flow)
    with pytest.raises(UserError, match=line):
        Checkpoint(weights=str(tmp_path)).prepare(flow)
    assert torch.equal(images(flow), before)


def test_a_setting_that_shapes_do_not_show(folder, published, tmp_path):
    """Another rotary embedding has the same weights: the configurations are compared."""
    shutil.copytree(published / "single", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"axes_dims_rope": [8, 4, 4]}))
    with pytest.raises(UserError, match=r"axes_dims_rope is \[8, 4, 4\] and the model's is \[4, 6, 6\]; .* another mo"):
        Checkpoint(weights=str(tmp_path / "other")).prepare(load(folder))


Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s.pop(f"{Q}.lora_A.weight"), rf"{Q}.lora_A.weight is missing, although its counterpart is there"),
        (
            lambda s: s.update({f"{Q}.lora_A.weight": torch.ones(4, 5)}),
            r"to_q: lora_A \(4, 5\) and lora_B \(32, 4\) do",
        ),
        (lambda s: s.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector is not a lora_A"),
        (lambda s: s.update({"text_encoder.q.lora_A.weight": torch.ones(4, 5)}), "text_encoder.q.lora_A.weight is not"),
        (
            lambda s: s.update({f"norm_out.norm.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
            "norm_out.norm.lora_A.weight is not",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_named(folder, tmp_path, change, line):
    """A half adapter, a shape, DoRA's magnitudes, another network's adapters, a layer that is none."""
    adapted(folder).transformer.save_lora_adapter(tmp_path / "whole")
    spoilt(tmp_path / "whole" / LORA, tmp_path / LORA, change)
    flow = load(folder)
    before = images(flow)
    with pytest.raises(UserError, match=line):
        Checkpoint(weights=str(tmp_path), kind="lora").prepare(flow)
    assert torch.equal(images(flow), before)


def test_one_kind_is_not_taken_for_the_other(folder, published, tmp_path):
    """A transformer has no adapters, and adapters are no transformer."""
    adapted(folder).transformer.save_lora_adapter(tmp_path)
    with pytest.raises(UserError, match="is not a lora_A, lora_B or alpha"):
        Checkpoint(weights=str(published / "single"), kind="lora").prepare(load(folder))
    with pytest.raises(UserError, match=r"these are adapters, not a transformer; choose method\.kind: lora"):
        Checkpoint(weights=str(tmp_path)).prepare(load(folder))


def test_a_flow_that_cannot_load_weights_says_so(published):
    """A toy: one line, and what to choose."""
    line = r"^method.kind: this backend \(AffineFlow\) cannot load a published transformer; choose the backend flux"
    with pytest.raises(UserError, match=line):
        Checkpoint(weights=str(published / "single")).prepare(AffineFlow(4))


# -- files ------------------------------------------------------------------------------------------------------------


def truncate(folder):
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def add_another(folder):
    shutil.copy(folder / SINGLE, folder / "model.safetensors")


def move_below(folder):
    (folder / "transformer").mkdir()
    (folder / SINGLE).rename(folder / "transformer" / SINGLE)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda f: (f / SINGLE).unlink(), r"has no weights \(\*.safetensors\); name the folder or the file that has"),
        (move_below, r"has no weights \(\*.safetensors\); choose the subfolder transformer"),
        (add_another, rf"weights of several networks \({SINGLE}, model.safetensors\); name one file"),
        (truncate, "cannot be read: truncated"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    ],
)
def test_wrong_folders_are_one_clear_line(published, tmp_path, change, line):
    """No weights, weights below, several, half a file, a broken configuration: before any model is loaded."""
    shutil.copytree(published / "single", tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(UserError, match=rf"^method.weights: .*{line}") as caught:
        Checkpoint(weights=str(tmp_path / "copy")).files()
    assert "\n" not in str(caught.value)


def test_wrong_names_are_one_clear_line(published, tmp_path):
    """A path that is none, a hub id that was not fetched, a missing shard, a file of another kind."""
    with pytest.raises(UserError, match=r"^method.weights: there is no file or folder './none'; give a path, a hub id"):
        Checkpoint(weights="./none").files()
    with pytest.raises(UserError, match=r"fetch it once with `hf download no-such-owner/none --revision v2`"):
        Checkpoint(weights="no-such-owner/none", revision="v2").files()
    with pytest.raises(UserError, match=r"has no weights"):
        Checkpoint(weights=str(published), subfolder="none").files()
    (tmp_path / "model.bin").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"model.bin is not a safetensors file"):
        Checkpoint(weights=str(tmp_path / "model.bin")).files()
    shutil.copytree(published / "shards", tmp_path / "shards")
    next((tmp_path / "shards").glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match=r"00002-of-.* is missing"):
        Checkpoint(weights=str(tmp_path / "shards")).files()


# -- as rows of a sweep -----------------------------------------------------------------------------------------------


SCHNELL = "tiny.yaml: SDE: method.name: sde samples by an SDE, and .* is distilled to few steps, as FLUX.1-schnell is"
SDE = '''
"""A method that samples by an SDE."""

from typing import ClassVar

from alignbench.method import Pathwise


class SDE(Pathwise):
    name: ClassVar[str] = "sde"
    stochastic: ClassVar[bool] = True
'''


def published_row(weights, label="Published", **more):
    return {"label": label, "method": {"name": "checkpoint", "weights": str(weights), **more}}


HYBRID = {
    "match": {"label": "Hybrid"},
    "set": {"evaluation.protocol.tuned_steps": 1, "evaluation.protocol.guidance": 2.0},
    "reason": "its authors sample so",
}


def planned(folder, changes, *words, plugin=PLUGIN):
    return resolve(read(sweep_file(folder, changes), words), Registry([plugin]))


@pytest.mark.slow
def test_a_sweep_of_base_checkpoint_and_hybrid(tmp_path, capsys):
    """Through the command line: images differ, the report compares all rows with base and shows the departure."""
    weights = perturbed(pipeline(Flux(model="shapes").folder).transformer)
    weights.save_pretrained(tmp_path / "weights")
    cases = [published_row(tmp_path / "weights"), SWEEP["cases"][0], published_row(tmp_path / "weights", "Hybrid")]
    path = sweep_file(tmp_path, {"cases": cases, "overrides": [HYBRID]})
    assert debug_sweep(path, tmp_path / "store") == 0
    scores, costs = tables(tmp_path / "store")
    assert costs["state"].tolist() == ["done"] * 3
    assert costs["images"].isna().tolist() == [True, False, True]  # what a published training cost is not known
    means = scores[scores["metric"] == "brightness"].groupby("label")["score"].mean()
    assert means.nunique() == 3
    assert len(list((tmp_path / "store" / "runs").iterdir())) == 2  # a protocol is none of the weights' business
    capsys.readouterr()
    assert alignbench("report", path, "--out", str(tmp_path / "out"), store=tmp_path / "store", plugin=False) == 0
    page = capsys.readouterr().out
    assert "| Hybrid †" in page
    assert "the row takes these steps, the base model the rest: Hybrid, the first 1 of 2 steps." in page
    assert (
        "- Hybrid: evaluation.protocol.tuned_steps = 1, evaluation.protocol.guidance = 2.0. its authors sample so"
        in page
    )
    assert "- **but Hybrid**: guidance = 2.0, tuned steps = 1" in page
    changes = page.split("## Paired change against Base")[1].split("\n## ")[0]
    assert "| Published" in changes
    assert "| Hybrid" in changes
    assert "One training seed" not in page
    assert "No training run has finished" not in page


@pytest.mark.slow
def test_the_example_of_the_docs(tmp_path):
    """The YAML of docs/adding-a-method.md, with local weights in the place of the hub's, is a valid sweep."""
    text = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    changes = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    for case in changes["cases"][1:]:
        case["method"] |= {"weights": "shapes", "subfolder": "transformer"}
    changes["evaluation"] = {"protocol": {"steps": 50}}
    cells = planned(tmp_path, changes).cells
    assert [cell.protocol.tuned_steps for cell in cells] == [None, None, 30]
    assert cells[1].id == cells[2].id != cells[0].id
    assert cells[1].images != cells[2].images


def test_settings_that_a_row_leaves_out_keep_the_ids_of_older_stores(tmp_path):
    """``file``, ``alpha`` and ``scale`` are younger than the stores: absent, they are not hashed."""
    row = published_row("shapes", subfolder="transformer")
    cell = planned(tmp_path, {"cases": [SWEEP["cases"][0], row]}).cells[1]
    older = {key: value for key, value in cell.spec.method.items() if key not in ("file", "alpha", "scale")}
    assert len(older) == len(cell.spec.method) - 3
    made = run_id(structs.replace(cell.spec, method=older), cell.parts, Registry([PLUGIN]), [])
    assert cell.id == f"checkpoint-{made}"


@pytest.mark.slow
def test_ids_of_checkpoints(tmp_path):
    """Other weights or settings are other runs; the row's label, ``steps`` and what trains adapters are not."""
    own = load_file(Flux(model="shapes").folder / "transformer" / SINGLE)
    for name, factor in (("one", 1.0), ("two", 1.01)):
        (tmp_path / name).mkdir()
        save_file(own | {"proj_out.bias": factor * own["proj_out.bias"]}, tmp_path / name / SINGLE)
    rows, columns = own["proj_out.weight"].shape
    (tmp_path / "lora").mkdir()
    halves = {"proj_out.lora_A.weight": torch.ones(2, columns), "proj_out.lora_B.weight": torch.ones(rows, 2)}
    save_file(halves, tmp_path / "lora" / LORA)
    one = published_row(tmp_path / "one")

    def ids(*cases, words=()):
        return [cell.id for cell in planned(tmp_path, {"cases": [SWEEP["cases"][0], *cases]}, *words).cells]

    base, first = ids(one)
    others = [published_row(tmp_path / "two", "Two")]
    others += [published_row(tmp_path / "lora", f"LoRA {a}", kind="lora", alpha=a) for a in (None, 1.0, 2.0)]
    assert ids(one, *others)[:2] == [base, first]
    assert len(set(ids(one, *others))) == 6
    assert ids(one | {"label": "Other"}, words=["method.steps=3", "backend.lora_rank=2"]) == [base, first]
    shutil.copy(tmp_path / "two" / SINGLE, tmp_path / "one" / SINGLE)
    assert ids(one)[1] not in (base, first)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("transformer", r"tiny.yaml: Wrong: .*112 parameters do not fit the model \(.*; is it the same backend"),
        ("lora", r"tiny.yaml: Wrong: .*to_q: lora_A \(2, 7\) and lora_B \(7, 2\) do not fit .* adapters of this model"),
    ],
)
def test_weights_of_another_model_stop_the_sweep_at_once(tmp_path, kind, line):
    """From their headers, before any model is loaded."""
    state = {"proj_out.weight": torch.ones(4, 4)}
    if kind == "lora":
        state = {f"{Q}.lora_A.weight": torch.ones(2, 7), f"{Q}.lora_B.weight": torch.ones(7, 2)}
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(UserError, match=line):
        planned(tmp_path, {"cases": [SWEEP["cases"][0], published_row(tmp_path, "Wrong", kind=kind)]})


def test_a_strength_that_nothing_says_is_a_warning(tmp_path, capsys):
    """``validate`` names row and setting, with exit code 0, and reports repeat it; the setting silences both."""
    own = load_file(Flux(model="shapes").folder / "transformer" / SINGLE)
    rows, columns = own["proj_out.weight"].shape
    halves = {"proj_out.lora_A.weight": torch.ones(2, columns), "proj_out.lora_B.weight": torch.ones(rows, 2)}
    (tmp_path / "lora").mkdir()
    save_file(halves, tmp_path / "lora" / LORA)
    for more, said in (({}, True), ({"scale": 1}, False)):
        row = published_row(tmp_path / "lora", "Found", kind="lora", **more)
        path = sweep_file(tmp_path, {"cases": [SWEEP["cases"][0], row]})
        assert alignbench("validate", path, store=tmp_path / "store") == 0
        assert ("Found: method.weights: nothing says how strong" in capsys.readouterr().err) == said
        remarks = resolve(read(path), Registry([PLUGIN])).manifest().remarks
        assert [remark.partition(" how strong")[0] for remark in remarks] == [
            "Found: method.weights: nothing says"
        ] * said


def test_a_checkpoint_that_is_missing_stops_the_sweep_at_once(tmp_path):
    """Before any model is loaded, with the row and the setting."""
    with pytest.raises(UserError, match=r"tiny.yaml: Published: method.weights: there is no file or folder './none'"):
        planned(tmp_path, {"cases": [SWEEP["cases"][0], published_row("./none")]})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 3}, r"overrides\[0\].set: evaluation.protocol.seed: must be the same for every row, or images"),
        ({"prompts": "shapes/val"}, "evaluation.protocol.prompts: must be the same for every row"),
        ({"images_per_prompt": 2}, "evaluation.protocol.images_per_prompt: must be the same for every row"),
        ({"size": 64}, "choose from evaluation.protocol.steps, evaluation.protocol.guidance, evaluation.protocol.w"),
        ({"tuned_step": 1}, "evaluation.protocol.tuned_step: must be the same for every row"),
        ({"tuned_steps": 0}, r"evaluation.protocol.tuned_steps: expected a whole number >= 1"),
        ({"tuned_steps": 3}, r"Last: evaluation.protocol.tuned_steps: 3 are more than the sampler's 2 steps; choose 1"),
        ({"weights": "lsat"}, r"weights: .*choose one of ema, last"),
    ],
)  # fmt: skip
def test_what_a_row_may_not_have_of_its_own(tmp_path, changes, line):
    """Whatever pairs the images is the sweep's; a number of steps has to be possible. One line."""
    override = {"match": {"method": "last"}, "reason": "to see"}
    override["set"] = {f"evaluation.protocol.{name}": value for name, value in changes.items()}
    with pytest.raises(UserError, match=line) as caught:
        planned(tmp_path, {"overrides": [override]})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_rows_protocol_is_its_own_and_needs_a_reason(tmp_path):
    """Only the row's images are new, its weights are not; without a reason it is refused; the command line beats it."""
    override = {"match": {"method": "last", "seed": 1}, "reason": "to see"}
    override["set"] = {"evaluation.protocol.weights": "last", "evaluation.protocol.steps": 3}
    plain, changed = planned(tmp_path, {}), planned(tmp_path, {"overrides": [override]})
    assert [a.id == b.id for a, b in zip(plain.cells, changed.cells)] == [True, True, True]
    assert [a.images == b.images for a, b in zip(plain.cells, changed.cells)] == [True, True, False]
    assert [cell.protocol.steps for cell in changed.cells] == [2, 2, 3]
    typed = planned(tmp_path, {"overrides": [override]}, "evaluation.protocol.steps=4")
    assert [cell.protocol.steps for cell in typed.cells] == [4, 4, 4]
    with pytest.raises(UserError, match="an exception needs a reason"):
        planned(tmp_path, {"overrides": [override | {"reason": ""}]})
    with pytest.raises(UserError, match=r"grid: evaluation.protocol.steps: a run has no such setting"):
        planned(tmp_path, {"grid": {"evaluation.protocol.steps": [2, 3]}})


def test_an_sde_needs_a_model_that_is_not_distilled(tmp_path):
    """A model like FLUX.1-schnell refuses a stochastic method when the sweep is read, and takes one that is not."""
    plugin = tmp_path / "sde.py"
    plugin.write_text(SDE)
    case = {"label": "SDE", "method": {"name": "sde"}}
    evaluator = {"name": "hpsv2", "weights": "shapes"}
    for guidance in (True, False):
        tiny.flux_folder(tmp_path / str(guidance), guidance=guidance)
        backend = {"model": str(tmp_path / str(guidance))}
        base = {"backend": backend, "reward": {"evaluator": evaluator}}
        assert Flux(**backend).deterministic is None or not guidance
        changes = {"base": base, "cases": [case], "evaluation": {"evaluators": [evaluator]}}
        if guidance:
            planned(tmp_path, changes, plugin=str(plugin))
        else:
            with pytest.raises(UserError, match=SCHNELL):
                planned(tmp_path, changes, plugin=str(plugin))

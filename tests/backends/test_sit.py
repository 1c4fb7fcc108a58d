"""The SiT backend is the official network, opened for gradients. What it shares with others: test_backends.py."""

import math
import re
import shutil
from argparse import Namespace
from pathlib import Path

import msgspec
import pytest
import torch
from support.tiny_sweep import PLUGIN, alignbench, sweep_file, tables

from alignbench.analytic import Quadratic
from alignbench.backends import sit
from alignbench.backends.cost.formulas import Model
from alignbench.backends.cost.published_configs import SIT_XL_2
from alignbench.backends.pipeline import pack, unpack
from alignbench.backends.sit import CHECKPOINT, SiT, expected_shapes
from alignbench.backends.sit_network import SiTNetwork, position_embedding
from alignbench.config import UserError
from alignbench.evaluator import Reward, Term
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.flow import integrate
from alignbench.methods.dancegrpo import DanceGRPO
from alignbench.methods.leapalign import LeapAlign
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts
from alignbench.rehearsal.tiny_backends import sit_folder
from alignbench.testing import MethodContract
from alignbench.training.meter import Meter, metered

HEADS, GUIDANCE = 2, 4.0
PROMPTS = ["207", "class 3"]
LABELS = torch.tensor([207, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sit_folder(tmp_path_factory.mktemp("sit") / "small")


@pytest.fixture
def make(folder):
    usual = {"model": str(folder / CHECKPOINT), "vae": str(folder / "vae"), "heads": HEADS}
    return lambda **settings: SiT(**{**usual, "size": 32, "dtype": "float32", "guidance": GUIDANCE, **settings})


@pytest.fixture
def state(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)


def generators(n=2):
    return [torch.Generator().manual_seed(i) for i in range(n)]


# -- the official forward, told again with other operations ----------------------------------------------------------


def linear(state, name, x):
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def normed(x, shift, scale):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift


def attended(state, name, x):
    """One head at a time: of the layer's 3 D outputs, queries are the first D, a head's the next D / heads of them."""
    width = x.shape[-1]
    head, out = width // HEADS, []
    q, k, v = linear(state, f"{name}.qkv", x).split(width, -1)
    for start in range(0, width, head):
        part = slice(start, start + head)
        scores = torch.einsum("nd,md->nm", q[:, part], k[:, part]) / math.sqrt(head)
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        out.append(weights @ v[:, part] / weights.sum(-1, keepdim=True))
    return linear(state, f"{name}.proj", torch.cat(out, -1))


def official(state, z, t, label):
    """models.py's SiT.forward of one sample: z (4, H, W), its time and class -> the first half of its channels."""
    side = z.shape[-1] // 2
    patches = [z[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for r in range(side) for c in range(side)]
    kernel = state["x_embedder.proj.weight"].flatten(1)
    x = torch.stack(patches) @ kernel.T + state["x_embedder.proj.bias"] + state["pos_embed"][0]
    angles = torch.tensor([float(t) * 10000 ** (-i / 128) for i in range(128)])
    wave = torch.cat([torch.cos(angles), torch.sin(angles)])
    c = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", wave)))
    c = c + state["y_embedder.embedding_table.weight"][label]
    for i in range(2):
        six = linear(state, f"blocks.{i}.adaLN_modulation.1", silu(c)).split(x.shape[-1])
        x = x + six[2] * attended(state, f"blocks.{i}.attn", normed(x, six[0], six[1]))
        u = linear(state, f"blocks.{i}.mlp.fc1", normed(x, six[3], six[4]))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + six[5] * linear(state, f"blocks.{i}.mlp.fc2", u)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(c)).split(x.shape[-1])
    tokens = linear(state, "final_layer.linear", normed(x, shift, scale))
    out = torch.empty(8, 2 * side, 2 * side)
    for n, token in enumerate(tokens):
        row, column = 2 * (n // side), 2 * (n % side)
        out[:, row : row + 2, column : column + 2] = token.view(2, 2, 8).permute(2, 0, 1)
    return out[:4]


def official_guided(state, z, t, labels, guidance):
    """models.py's forward_with_cfg of doubled latents z (2B, 4, H, W), the second half of no class."""
    half = len(z) // 2
    v = torch.stack([official(state, z[i % half], t, label) for i, label in enumerate([*labels, *[1000] * half])])
    with_class, without = v[:half, :3], v[half:, :3]
    guided = without + guidance * (with_class - without)
    return torch.cat([torch.cat([guided, guided]), v[:, 3:]], 1)


@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_same_latents_in_same_velocities_out(make, state, t):
    """Ours at t = official's at 1 - t with the other sign: with guidance in three channels, in all, and without."""
    flow = make().load()
    x, cond = flow.noise(2, generators()), flow.encode(PROMPTS)
    z = unpack(x, flow.grid)
    with torch.no_grad():
        plain = torch.stack([official(state, z[i], 1 - t, LABELS[i]) for i in range(2)])
        none = torch.stack([official(state, z[i], 1 - t, 1000) for i in range(2)])
        doubled = official_guided(state, torch.cat([z, z]), 1 - t, LABELS, GUIDANCE)[:2]
        assert (plain - none).abs().max() > 0.1
        ours = {
            "plain": flow.at(guidance=1.0).velocity(x, t, cond),
            "three": flow.velocity(x, t, cond),
            "all": make(guided_channels=4).load().velocity(x, t, cond),
        }
    theirs = {"plain": plain, "three": doubled, "all": none + GUIDANCE * (plain - none)}
    for name, v in ours.items():
        torch.testing.assert_close(v, -pack(theirs[name]), rtol=1e-5, atol=2e-5)
    assert (ours["three"] - ours["all"]).abs().max() > 0.1


def test_same_latents_in_same_image_out(make, state, folder):
    """Euler in the official time, from t = 0 to 1, and sd-vae's decoder of z / 0.18215: to 1e-5."""
    from diffusers import AutoencoderKL

    flow, steps = make().load(), 5
    x = flow.noise(2, generators())
    z = unpack(x, flow.grid)
    with torch.no_grad():
        ours = flow.decode(integrate(flow, x, flow.sigmas(steps), flow.encode(PROMPTS)))
        z = torch.cat([z, z])
        for i in range(steps):
            z = z + official_guided(state, z, i / steps, LABELS, GUIDANCE) / steps
        theirs = AutoencoderKL.from_pretrained(folder / "vae").decode(z[:2] / 0.18215).sample / 2 + 0.5
    assert theirs.std() > 0.05
    assert (theirs[0] - theirs[1]).abs().max() > 0.05
    assert (ours - theirs.clamp(0, 1)).abs().max() <= 1e-5


@pytest.mark.slow
def test_a_perfect_network_would_lead_to_the_image(make, monkeypatch):
    """With the velocity that SiT is trained for, image - noise, any leap from any time lands on the image."""
    flow = make(guidance=1.0).load()
    noise, image = flow.noise(2, generators()), torch.ones(2, 64, 16)
    flow.transformer.forward = lambda z, t, label: unpack(image - noise, flow.grid)
    for t in (1.0, 0.3):
        x = t * noise + (1 - t) * image
        v = flow.velocity(x, t, flow.encode(PROMPTS))
        torch.testing.assert_close(x - t * v, image)


def test_the_grid_is_linear(make):
    """N steps of 1 / N: no shift."""
    assert make().load().sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_positions_are_those_of_the_official_table():
    """Columns before rows, sines before cosines, as numpy's meshgrid with x first has them."""
    side, width = 3, 16
    table = position_embedding(side, width)
    for token, i in ((0, 0), (1, 0), (5, 3), (7, 2)):
        row, column, frequency = token // side, token % side, 10000 ** (-i / 4)
        expected = [f(place * frequency) for place in (column, row) for f in (math.sin, math.cos)]
        assert table[token, i :: width // 4].tolist() == pytest.approx(expected)


def test_guidance_leaves_the_fourth_channel_alone(make):
    """As official: there it is the class's velocity and its gradient, and no class has none."""
    flow = make().load()
    x, cond = flow.noise(1, generators()), flow.encode(PROMPTS[:1])
    fourth = flow.velocity(x, 0.5, cond)[..., 12:]
    torch.testing.assert_close(fourth, flow.at(guidance=1.0).velocity(x, 0.5, cond)[..., 12:], rtol=1e-5, atol=1e-5)
    table = flow.transformer.y_embedder["embedding_table"].weight
    (of_fourth,) = torch.autograd.grad(fourth.square().sum(), table)
    (of_rest,) = torch.autograd.grad(flow.velocity(x, 0.5, cond)[..., :12].square().sum(), table)
    assert [rows.tolist() for rows in (of_fourth.abs().sum(1) > 0).nonzero(as_tuple=True)] == [[207]]
    assert (of_rest.abs().sum(1) > 0).nonzero().flatten().tolist() == [207, 1000]


def test_guidance_counts_two_evaluations(make):
    """Two evaluations per sample, and one without guidance."""
    for guidance, count in ((GUIDANCE, 4), (1.0, 2)):
        flow, meter = make(guidance=guidance).load(), Meter()
        with torch.no_grad():
            metered(flow, meter).velocity(flow.noise(2, generators()), 0.5, flow.encode(PROMPTS))
        assert (meter.nfe_forward, meter.nfe_grad) == (count, 0)
        assert make().branches(guidance) == count // 2


# -- the checkpoint ----------------------------------------------------------------------------------------------------

OUTSIDE = [
    "x_embedder.proj",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
]
INSIDE = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]


def test_the_full_size_has_the_official_names_and_parameters():
    """SiT-XL/2 on the meta device: 675,129,632 numbers, as the official code counts; 294,912 are the fixed table.

    The plan counts the 674,834,720 that are trained, and knows every tensor's name and shape.
    """
    config = SIT_XL_2["transformer"]
    with torch.device("meta"):
        network = SiTNetwork(**{key: value for key, value in config.items() if key != "_class_name"})
    found = network.state_dict()
    layers = OUTSIDE + [f"blocks.{i}.{name}" for i in range(28) for name in INSIDE]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert found.keys() == names | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert sum(tensor.numel() for tensor in found.values()) == 675_129_632
    trained = sum(parameter.numel() for parameter in network.parameters())
    assert trained == 675_129_632 - 256 * 1152
    measures = Model.read(SIT_XL_2)
    assert measures.transformer.parameters == trained
    tokens = measures.tokens(256, 0)
    assert round(measures.transformer.forward(tokens) / 2e9, 2) == 118.62  # multiply-adds; DiT's paper: 118.64 Gflops
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert shapes == expected_shapes(config)
    assert sit.infer_config(shapes, None, "") == config


def test_the_label_is_never_dropped(make):
    """In training mode, too: the same velocity twice, and no generator is moved."""
    flow = make().load()
    flow.transformer.train()
    x, cond, before = flow.noise(2, generators()), flow.encode(PROMPTS), torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(flow.velocity(x, 0.5, cond), flow.velocity(x, 0.5, cond))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_training_means_its_average(make, state, tmp_path):
    """train.py's file, its arguments and optimizer beside two state dicts: "ema" is read. Nothing else can run code."""
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    arguments = Namespace(model="SiT-XL/2", image_size=256)
    torch.save({"model": other, "ema": state, "opt": {"state": {}}, "args": arguments}, tmp_path / "0000001.pt")
    flow, plain = make(model=str(tmp_path / "0000001.pt")).load(), make().load()
    x, cond = plain.noise(2, generators()), plain.encode(PROMPTS)
    with torch.no_grad():
        assert torch.equal(flow.velocity(x, 0.5, cond), plain.velocity(x, 0.5, cond))
    torch.save({"ema": state, "args": Path("a")}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="holds more than tensors and plain data"):
        make(model=str(tmp_path / "odd.pt")).files()


def test_what_is_loaded_is_written_again(make, state):
    """The network's state dict is the checkpoint's: names, order of tokens, table and all, bitwise."""
    found = make().load().transformer.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_folder_with_the_checkpoint_is_the_same(make, folder):
    """Naming the file or its folder gives the same files and model."""
    assert make(model=str(folder)).files() == make().files()


def test_the_table_of_positions_is_not_trained(make):
    """Everything else is, and adapters train nothing else."""
    flow = make().load()
    assert set(flow.transformer.state_dict()) - dict(flow.named_parameters()).keys() == {"pos_embed"}
    assert all(".lora_" in name for name, _ in make(tune="lora", lora_rank=2).load().named_parameters())


# -- classes -----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_class(make, tmp_path):
    """By its index, alone or after "class", or by its name where there is a file of names."""
    names = [f"animal {i}" for i in range(998)] + ["crane", "crane"]
    (tmp_path / "names.txt").write_bytes("\r\n".join([*names, ""]).encode())
    plain, named = make(), make(classes=str(tmp_path / "names.txt"))
    assert [plain.label(text) for text in ("0", "207", "class 207", "999", "")] == [0, 207, 207, 999, 1000]
    assert [named.label(text) for text in ("animal 5", "5", "class 5")] == [5, 5, 5]
    for text in ("1000", "-1", "a red circle", "class", "Class 3", "2 07", "²", "animal 5"):
        with pytest.raises(UserError, match=r"is not a class of this model; write 0 to 999"):
            plain.label(text)
    with pytest.raises(UserError, match=r"did you mean 'animal 5'\?"):
        named.label("animall 5")
    with pytest.raises(UserError, match="the classes 998 and 999; give the index"):
        named.label("crane")
    assert named.files()[-1] == tmp_path / "names.txt"
    flow = plain.load()
    assert torch.equal(flow.encode(["207", "class 3"]).tensors["class"].argmax(1), LABELS)
    with pytest.raises(UserError, match="is not a class"):
        flow.encode(["a red circle"])


def test_every_class_is_a_prompt_of_imagenet_classes(make):
    """1,000 of them, in order, each its own class."""
    prompts, settings = load_prompts("imagenet/classes"), make()
    assert [settings.label(prompt.text) for prompt in prompts] == list(range(1000))
    assert len({prompt.id for prompt in prompts}) == 1000
    with pytest.raises(UserError, match=r"no prompts 'imagenet/class'; did you mean 'imagenet/classes'"):
        load_prompts("imagenet/class")


def test_prompts_that_are_no_classes_are_refused_before_anything_is_loaded(make, tmp_path):
    """Training and evaluation prompts are checked, with their line, when the sweep is read."""
    plain = {"name": "sit", **{k: v for k, v in msgspec.to_builtins(make()).items() if k in ("model", "vae", "heads")}}
    plain |= {"size": 32, "max_sequence_length": None}
    lists = {"prompts": "imagenet/classes"}
    good = {"base": {"backend": plain, **lists}, "evaluation": {"protocol": lists, "evaluators": [{"name": "bright"}]}}
    for change, says in (
        ({}, None),
        ({"base": {"prompts": "shapes/train"}}, r"train\.jsonl:1: .* is not a class"),
        ({"evaluation": {"protocol": {"prompts": "shapes/test"}}}, r"test\.jsonl:1: .* is not a class"),
    ):
        path = Path(sweep_file(tmp_path, merged(good, change)))
        path.write_text(path.read_text().replace("    max_sequence_length: null\n", ""))
        if says is None:
            path.write_text(path.read_text().replace("detector: shapes", ""))
            assert resolve(read(str(path)), Registry([PLUGIN])).cells
        else:
            with pytest.raises(UserError, match=says):
                resolve(read(str(path)), Registry([PLUGIN]))


def merged(base, top):
    from alignbench.config import merge

    return merge(base, top)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("blocks.1.attn.proj.bias"), r"missing: blocks\.1\.attn\.proj\.bias; sit needs a SiT of patch size 2"),
        (without("pos_embed"), "is not a checkpoint of SiT: 'pos_embed' is missing"),
        (lambda s: s | {"projectors.0.weight": s["pos_embed"]}, r"unexpected: projectors\.0\.weight"),
        (lambda s: s | {"blocks.0.mlp.fc1.bias": s["pos_embed"][0]}, r"of another shape: blocks\.0\.mlp\.fc1\.bias"),
        (lambda s: s | {"x_embedder.proj.weight": torch.zeros(32, 4, 4, 4)}, "a SiT of patch size 4"),
        (lambda s: {"ema": 0.9999}, "does not hold tensors by name"),
        (lambda s: s["pos_embed"], "does not hold tensors by name"),
        (lambda s: {}, "is not a checkpoint of SiT: 'x_embedder.proj.weight' is missing"),
    ],
)
def test_another_checkpoint_is_one_clear_line(make, state, tmp_path, change, says):
    """A tensor that is missing, unexpected or of another shape is named before anything is loaded."""
    torch.save(change(state), tmp_path / "other.pt")
    with pytest.raises(UserError, match=says) as error:
        make(model=str(tmp_path / "other.pt")).files()
    assert "\n" not in str(error.value)


def test_wrong_settings_are_one_clear_line(make, folder, tmp_path):
    """Another size, unknown heads, a truncated file, a DiT, no file, another autoencoder, names that are too few."""
    shutil.copy(folder / CHECKPOINT, tmp_path / "DiT-XL-2-256x256.pt")
    (tmp_path / "short.pt").write_bytes((folder / CHECKPOINT).read_bytes()[:-100])
    (tmp_path / "names.txt").write_text("a\nb\n")
    shutil.copytree(folder / "vae", tmp_path / "vae")
    config = (tmp_path / "vae/config.json").read_text()
    (tmp_path / "vae/config.json").write_text(config.replace('"latent_channels": 4', '"latent_channels": 16'))
    for settings, says in (
        ({"size": 64}, r"backend\.size: 64 pixels; this checkpoint has positions for 32"),
        ({"heads": None}, "the number of heads for 32 channels is unknown; set backend.heads"),
        ({"heads": 5}, "the number of heads for 32 channels is unknown"),
        ({"model": str(tmp_path / "short.pt")}, "truncated"),
        ({"model": str(tmp_path / "DiT-XL-2-256x256.pt")}, "a DiT predicts noise; sit needs a SiT"),
        ({"model": str(tmp_path / CHECKPOINT)}, re.escape("download.find_model('SiT-XL-2-256x256.pt')")),
        ({"model": str(tmp_path / "nothing.pt")}, "no file or folder"),
        ({"model": str(tmp_path)}, "is missing"),
        ({"vae": str(tmp_path / "vae")}, "latents of 16 channels, and the checkpoint 4"),
        ({"vae": "stabilityai/sd-vae-ft-mse"}, "hf download stabilityai/sd-vae-ft-mse config.json diffusion_pytorch"),
        ({"classes": str(tmp_path / "names.txt")}, "has 2 lines, and the checkpoint 1000 classes"),
        ({"classes": str(tmp_path / "no.txt")}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=says) as error:
            make(**settings).files()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="size: 64 pixels"):
        make().load().at(size=64)


# -- plans, rehearsals, methods ----------------------------------------------------------------------------------------


def test_it_is_planned_without_any_file(tmp_path, capsys):
    """The plan uses the published configuration and names the commands that fetch both parts."""
    path = Path(
        sweep_file(tmp_path, {"base": {"backend": {"name": "sit", "size": 256}, "prompts": "imagenet/classes"}})
    )
    text = path.read_text().replace("    max_sequence_length: 16\n", "").replace("    model: shapes\n", "")
    path.write_text(text.replace("shapes/test", "imagenet/classes"))
    assert alignbench("plan", str(path), "--only", "seed=0", store=tmp_path / "store") == 1
    out = capsys.readouterr().out
    assert re.search(r"Last, seed 0 +not ready +8 +(\S+) \+ (\S+) ", out)
    assert "download.find_model('SiT-XL-2-256x256.pt')" in out
    assert "hf download stabilityai/sd-vae-ft-mse config.json diffusion_pytorch_model.safetensors" in out


def sweep_of(tmp_path):
    backend = {"name": "sit", "size": 256, "guidance": 4.0, "dtype": "bfloat16"}
    reward = {"evaluator": {"name": "hpsv2"}, "margin": 0.55}
    methods = [{"name": "base"}, {"name": "leapalign", "steps": 3}, {"name": "checkpoint", "weights": "some/body"}]
    cases = [{"label": each["name"], "method": each} for each in methods]
    base = {"backend": backend, "reward": reward, "prompts": "imagenet/classes"}
    data = {"base": base, "grid": {"training.seed": [0]}, "cases": cases}
    protocol = {"size": 256, "guidance": 4.0, "prompts": "imagenet/classes"}
    path = sweep_file(tmp_path, {**data, "evaluation": {"protocol": protocol, "evaluators": [{"name": "hpsv2"}]}})
    text = Path(path).read_text().replace("    max_sequence_length: 16\n", "").replace("    model: shapes\n", "")
    return str(Path(path).write_text(text) and path)


@pytest.mark.slow
def test_a_rehearsal_from_nothing_to_its_scores(tmp_path):
    """Trained, generated, scored, published weights too; guidance spends two evaluations where FLUX.1 spends one."""
    store = tmp_path / "store"
    assert alignbench("sweep", sweep_of(tmp_path), "--rehearse", "--launcher", "debug", store=store, plugin=False) == 0
    scores, costs = tables(store)
    row = costs[costs["label"] == "leapalign"].iloc[0]
    assert (row["nfe_forward"], row["nfe_grad"]) == (2 * row["images"], 4 * row["images"])
    seen = scores[scores["metric"] == "hpsv2.1"].pivot(index=["prompt_id", "index"], columns="label", values="score")
    assert ((seen["leapalign"] - seen["base"]).abs() > 1e-5).all()
    assert (seen["checkpoint"] == seen["base"]).all()


@pytest.mark.parametrize(
    "method", [LeapAlign(steps=3), DanceGRPO(steps=3, group=4, updates_per_rollout=2)], ids=["leapalign", "dancegrpo"]
)
class TestTwoMethods(MethodContract):
    """Two methods keep the contract; all of them: test_backends.py."""

    lr = 1e-3
    updates = 20

    @pytest.fixture(autouse=True)
    def case(self, make, method, tmp_path):
        (tmp_path / "names.txt").write_text("\n".join(f"prompt number {i}" for i in range(1000)))
        self.method, self.settings = method, make(tune="lora", lora_rank=2, classes=str(tmp_path / "names.txt"))

    def flow(self):
        return self.settings.load()

    def reward(self):
        return Reward(Term(Quadratic(target=1.0)))

    def test_one_batch_equals_its_micro_batches(self) -> None:
        """In float32 with a random network: the loss and the gradient's norm agree to a hundredth."""
        (whole, *_), (split, *_) = self.run(self.flow(), 1), self.run(self.flow(), 1, self.micro)
        for name in ("loss", "grad_norm"):
            assert split[name] == pytest.approx(whole[name], rel=1e-2, abs=1e-6)

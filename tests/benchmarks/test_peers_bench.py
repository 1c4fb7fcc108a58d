"""benchmarks/peers.py compares with the given clone, and refuses one that is unusable or computes something else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignbench.plugins import Registry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCHEDULER = """
from diffusers import FlowMatchEulerDiscreteScheduler


class FlowMatchEulerDiscreteWithPredX0Scheduler(FlowMatchEulerDiscreteScheduler):
    pass
"""
REFL = """
import numpy as np
import torch
import torch.distributed as dist
import wandb
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flowbp.utils.logging_ import main_print

from alignbench.backends.pipeline import pack, unpack


def train_refl_one_step(
    args, inner, device, network, vae, scheduler, reward, tokenizer, optimizer, schedule, loader, preprocess, rng
):
    text, pooled, _, captions = next(loader)
    n, side = args.rollout_steps, args.w // 8
    s = n - int(torch.randint(1, args.refl_last_n_steps + 1, (1,), generator=rng))
    x = pack(torch.randn((len(text), 16, side, side), dtype=torch.bfloat16))
    config = scheduler.config
    mu = calculate_shift(
        x.shape[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n), mu=mu)
    t = scheduler.sigmas
    rows, columns = torch.meshgrid(torch.arange(side // 2), torch.arange(side // 2), indexing="ij")
    ids = torch.stack([torch.zeros(side * side // 4), rows.flatten(), columns.flatten()], 1)
    for i in range(s + 1):
        with torch.set_grad_enabled(i == s), torch.autocast("cuda", torch.bfloat16):
            v = network(
                hidden_states=x, timestep=scheduler.timesteps[i].expand(len(x)) / 1000, encoder_hidden_states=text,
                pooled_projections=pooled, guidance=torch.full((len(x),), args.cfg_guidance), img_ids=ids,
                txt_ids=torch.zeros(text.shape[1], 3), return_dict=False,
            )[0]
        x = x + ((t[i + 1] if i < s else 0) - t[i]) * v
    pixels = vae.decode(unpack(x, side // 2) / 0.3611 + 0.1159, return_dict=False)[0] * 0.5 + 0.5
    found = reward(preprocess(pixels.clamp(0, 1)), tokenizer(captions))
    score = torch.einsum("bc,bc->b", found["image_features"], found["text_features"])
    loss = torch.relu(args.loss_relu_clip - score).mean()
    loss.backward()
    dist.all_reduce(loss.detach(), op=dist.ReduceOp.AVG)
    network.clip_grad_norm_(args.max_grad_norm)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
"""


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))  # it shares its clock with benchmarks/steps.py
    spec = importlib.util.spec_from_file_location("benchmark_peers", BENCHMARKS / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def clone(tmp_path):
    """A folder with the layout of a clone, and our own ReFL in place of FlowBP's."""
    files = {"schedulers/fm_euler_discrete_with_pred_x0.py": SCHEDULER, "trainers/flux1/refl.py": REFL}
    files["trainers/__init__.py"] = "raise RuntimeError('the trainers of all models')"
    for name, text in files.items():
        path = tmp_path / "clone" / "flowbp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "clone"


def run(peers, clone: Path, results: Path):
    few = ["--methods", "refl", "--small", "--pairs", "1", "--precisions", "float32"]
    return peers.main(["--flowbp", str(clone), "--out", str(results), "--note", "written for a test", *few])


@pytest.mark.slow
def test_equal_steps_have_bitwise_equal_gradients_and_are_timed(peers, clone, tmp_path):
    """ReFL written again, with our noise, step, reward and weights, has equal gradients; results are saved."""
    run(peers, clone, tmp_path / "results")
    kept = json.loads((tmp_path / "results" / "peers.json").read_text())
    (row,) = kept["float32"]
    assert (row["method"], row["apart"]) == ("refl", 0.0)
    assert row["ours"] > 0
    assert row["other"] > 0
    assert row["ratio"] == row["ours"] / row["other"]
    table = (tmp_path / "results" / "peers.md").read_text()
    assert "- note: written for a test\n" in table
    assert "| refl | float32 | bitwise equal | none |" in table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("loss = torch.relu", "loss = 1.001 * torch.relu"),
        ("s = n - int", "s = n - 1 - int"),
    ],
    ids=["scale", "step"],
)
def test_different_gradients_stop_the_benchmark(peers, clone, tmp_path, was, now):
    """A loss that is off by a thousandth, or another step than the drawn one, stops it without results."""
    trainer = clone / "flowbp" / "trainers" / "flux1" / "refl.py"
    assert was in trainer.read_text()
    trainer.write_text(trainer.read_text().replace(was, now))
    with pytest.raises(SystemExit, match=r"refl, float32: gradients differ from FlowBP's by .*; 0e\+00 is allowed$"):
        run(peers, clone, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_unusable_clones_are_refused_in_one_line(peers, clone, tmp_path):
    """A missing folder, another folder, a missing file of a method and a clone that cannot be imported are refused."""
    with pytest.raises(
        SystemExit, match=r"--flowbp: .*nowhere is not a folder; get it with: git clone https://\S+ \S+$"
    ):
        peers.main(["--flowbp", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"not a clone of FlowBP: it has no flowbp/trainers/flux1/leapalign\.py; "):
        peers.main(["--flowbp", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"not a clone of FlowBP: it has no flowbp/trainers/flux1/drtune\.py; "):
        peers.main(["--flowbp", str(clone), "--methods", "refl,drtune"])
    (clone / "flowbp" / "trainers" / "flux1" / "refl.py").write_text("import flowbp.utils.elsewhere\n")
    with pytest.raises(SystemExit, match=r"cannot be imported: ModuleNotFoundError: No module named 'flowbp\.utils'$"):
        peers.main(["--flowbp", str(clone), "--methods", "refl"])
    with pytest.raises(SystemExit, match=r"--methods: FlowBP has no 'vggflow'; choose from leapalign, refl, .*$"):
        peers.main(["--flowbp", str(clone), "--methods", "refl,vggflow"])


def test_loading_leaves_no_trace(peers, clone):
    """Every load imports anew, and neither FlowBP nor the empty modules stay importable."""
    before, paths = dict(sys.modules), list(sys.path)
    loaded = peers.load(clone, "refl")
    assert Path(loaded.trainer.__file__).parent == clone / "flowbp" / "trainers" / "flux1"
    assert loaded.trainer in loaded.modules
    assert sys.path == paths
    assert not [name for name in sys.modules if name.split(".")[0] in ("flowbp", "wandb") and name not in before]
    assert peers.load(clone, "refl").trainer is not loaded.trainer


def test_a_version_is_the_commit_or_the_content(peers, clone):
    """The version is the commit, marked if there are changes, or without git a digest of the files that are run."""
    digest = peers.version(clone, ["refl"])
    assert digest.startswith("no commit is known; content ")
    trainer = clone / "flowbp" / "trainers" / "flux1" / "refl.py"
    trainer.write_text(REFL + "\n")
    assert peers.version(clone, ["refl"]) != digest
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(clone), *words], check=True)
    commit = peers.version(clone, ["refl"])
    assert len(commit) == 40
    trainer.write_text(REFL)
    assert peers.version(clone, ["refl"]) == f"{commit}, with changes"


@pytest.mark.parametrize("seed", range(20))
def test_every_active_step_is_handed_over(peers, seed):
    """FlowBP-Bridge asks for the active steps before j and after j; together with j they are the drawn ones."""
    method = Registry().make("method", {"name": "flowbp_bridge"}, "method")
    j, active = method.draw(peers.seeded(seed))
    functions = peers.TWINS["flowbp_bridge"].draws(method, peers.seeded(seed))
    indices, k, where = functions["sample_jk_indices"]()
    assert indices.tolist() == [method.steps - k, method.steps - j]
    assert where == j
    segment = functions["_sample_segment_indices"]
    assert [*segment(0, j), j, *segment(j + 1, method.steps - j - 1)] == sorted(active)

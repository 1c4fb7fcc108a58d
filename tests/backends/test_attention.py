"""``backend.attention``: the same network by another kernel, and clear words where there is no such kernel."""

import re

import pytest
import torch
from support import tiny
from support.compiling import calls, near
from support.tiny import PROMPTS
from support.tiny_sweep import PLUGIN, alignbench, sweep_file
from torch.utils._python_dispatch import TorchDispatchMode

from alignbench.backends import pipeline
from alignbench.config import UserError
from alignbench.experiment import ids
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.flow import seeded
from alignbench.plugins import Registry
from alignbench.rehearsal.sweep import rehearse
from alignbench.rehearsal.tiny_backends import backend

pytestmark = pytest.mark.slow  # every kernel on a whole model

KERNELS = ("_native_flash", "_native_math")  # that a CPU has


@pytest.fixture(scope="module", params=["flux", "flux2"])
def load(request, tmp_path_factory):
    """A function that loads a small model, with adapters that have moved."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "flux":
        wanted = {"model": str(tiny.flux_folder(folder / "flux", scale=2.0)), "max_sequence_length": 16}
    else:
        wanted = backend("flux2", folder)
    wanted |= {"name": request.param, "size": 32, "dtype": "float32", "lora_rank": 4}

    def load(**changes):
        flow = Registry().make("backend", wanted | changes, "backend").load()
        with torch.no_grad():
            for i, p in enumerate(flow.parameters()):
                p += 0.05 * torch.randn(p.shape, generator=seeded("adapter", i))
        return flow

    return load


class Operators(TorchDispatchMode):
    """The names of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def flash(self) -> bool:
        return "_scaled_dot_product_flash_attention_for_cpu" in self.seen


@pytest.mark.parametrize("changes", [{"tune": "lora", "gradient_checkpointing": True}, {"tune": "full"}])
def test_kernels_agree(load, changes):
    """Velocities and gradients of flash, of the plain kernel and of torch's choice: to 5e-5 in float32."""
    plain = calls(load(**changes))
    for kernel in KERNELS:
        near(calls(load(attention=kernel, **changes)), plain, 5e-5)


def test_the_kernel_that_was_asked_for_is_used(load):
    """By the model, its base and its views; a model loaded afterwards has torch's choice again."""
    for kernel in ("_native_math", "native", "_native_flash"):
        flow = load(attention=kernel)
        x, cond = flow.noise(1, [seeded("noise")]), flow.encode(PROMPTS[:1])
        flow.velocity(x, 0.5, cond)  # of guidance's empty prompt, too: its encoder has an attention of its own
        for view in (flow, flow.at(size=64)):
            for base in (False, True):
                with torch.no_grad(), Operators() as operators:
                    view.velocity(view.noise(1, [seeded("x")]), 0.5, cond, reference=base)
                assert operators.flash == (kernel != "_native_math")


def test_the_environments_choice_is_not_ours(load, monkeypatch):
    """A run ignores the environment variable from which diffusers would choose its kernel."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("_native_math"):
        flow = load()
        x, cond = flow.noise(1, [seeded("x")]), flow.encode(PROMPTS[:1])
        flow.velocity(x, 0.5, cond)
        with torch.no_grad(), Operators() as operators:
            flow.velocity(x, 0.5, cond)
    assert operators.flash


@pytest.mark.parametrize("load", ["flux"], indirect=True)
def test_compiled_blocks_have_it_too(load, traced):
    """Together with ``compile``: 1e-5 in float32."""
    changes = {"tune": "lora", "attention": "_native_math"}
    near(calls(load(compile=True, **changes)), calls(load(**changes)), 1e-5)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("falsh", r"there is no kernel 'falsh'; did you mean 'flash'\? \(kernels: .*native, .*\)$"),
        ("_flash_3", r"'_flash_3' is not usable because of missing package .* Or choose native$"),
    ],
)
def test_a_kernel_that_is_not_here_is_told_before_anything_is_made(tmp_path, capsys, kernel, words):
    """One line of `alignbench sweep`, exit code 1, and an empty store."""
    path = sweep_file(tmp_path, {"base": {"backend": {"attention": kernel}}})
    assert alignbench("sweep", path, store=tmp_path / "store") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"backend.attention: .*{words}", line)
    assert not list((tmp_path / "store").glob("runs/*"))


def test_a_kernel_that_this_device_has_not_is_told_before_the_model_is_loaded(load, monkeypatch):
    """One line with the device, the dtype and what to choose."""
    monkeypatch.setattr(pipeline.PipelineBackend, "_pipeline", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"^backend.attention: _native_cudnn does not work on cpu, .*; choose native$"):
        load(attention="_native_cudnn")


@pytest.mark.parametrize("family", ["sd3", "sit"])
def test_other_families_have_torchs_alone(tmp_path, family):
    """Their networks call it themselves: a choice that would be without effect is refused."""
    wanted = {"name": family, "size": 32, **backend(family, tmp_path), "attention": "flex"}
    made = Registry().make("backend", wanted, "backend")
    with pytest.raises(
        UserError, match=rf"^backend.attention: the attention of {family} is always torch's; choose nat"
    ):
        made.files()


def test_runs_by_torchs_choice_keep_their_ids(tmp_path, monkeypatch):
    """The hash has no such key unless another kernel is chosen, which rounds differently; so has the base's."""
    hashed = []
    monkeypatch.setattr(ids, "content_id", lambda content: hashed.append(content) or f"{len(hashed):010}")
    for changes in ({}, {"attention": "_native_math"}):
        resolve(read(sweep_file(tmp_path, {"base": {"backend": changes}})), Registry([PLUGIN]))
    found = [content["backend"].get("attention") for content in hashed if "backend" in content]
    assert found == [None] * (len(found) // 2) + ["_native_math"] * (len(found) // 2)
    assert len(found) >= 6


def test_a_rehearsal_needs_no_kernel(tmp_path):
    """It runs on any machine."""
    document = read(sweep_file(tmp_path, {"base": {"backend": {"attention": "_flash_3_hub"}}}))
    assert rehearse(document, tmp_path).data["base"]["backend"]["attention"] == "native"

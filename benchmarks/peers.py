"""Compare a training step of alignbench with the same step by FlowBP's own functions, on one CPU thread.

    git clone https://github.com/RuoyuWang-2077/FlowBP DIR
    python benchmarks/peers.py --flowbp DIR [--pairs 9] [--methods leapalign,refl]

No code of FlowBP (arXiv 2606.11075) is part of alignbench: its ``train_*_one_step`` functions are imported from the
clone and run unmodified. Both sides have the same Flux, weights, noise, embeddings, steps with gradient, reward and
optimizer, and the released settings for FLUX.1-dev. First the gradients of all parameters are compared; the benchmark
stops if they differ by more than rounding. Then both sides are timed in turn, in CPU seconds of one process; ratios are
medians over pairs.

What is replaced around FlowBP's code:
1. Modules that no step calls (``UNUSED``) are empty, so that neither wandb nor a GPU is needed.
2. In its modules, ``torch.randn`` returns our noise; ``torch.bfloat16`` is float32, because FlowBP rounds latents
   between steps and alignbench does not; autocast is the CPU's. ``dist`` is a group of one.
3. Functions that draw steps return those that our method draws.
4. The network and the decoder are called as our backend calls them: autocast only for the network, outputs in float32.
Neither side averages weights: FlowBP does so outside its step. Few CPUs have bfloat16 instructions, so in bfloat16 only
gradients are compared, at 64 px. Results go to benchmarks/results/peers.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple, NoReturn

import diffusers
import torch
from accelerate import Accelerator
from arguments import parse
from steps import WIDE, compare, figures, kept
from torch import Tensor, nn

from alignbench.backends.flux import Flux
from alignbench.backends.pipeline import unpack
from alignbench.digests import fingerprint
from alignbench.evaluator import Evaluator, Metric, Reward, Term
from alignbench.experiment.spec import Budget, Optimizer, Training
from alignbench.flow import seeded
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, load_prompts
from alignbench.training.batches import draw_batch
from alignbench.training.meter import metered, metered_reward
from alignbench.training.state import TrainState

HERE = Path(__file__).resolve().parent
URL = "https://github.com/RuoyuWang-2077/FlowBP"
TRAINERS = "flowbp.trainers.flux1"
SCHEDULER = "flowbp.schedulers.fm_euler_discrete_with_pred_x0"
UNUSED = (  # modules that the trainers import to start, save, log and evaluate a run
    *("wandb", "flowbp.eval.runners.online", "flowbp.dataset.latent_flux_rl_datasets"),
    *(f"flowbp.utils.{name}" for name in ("checkpoint", "communications_flux", "debug_utils", "ema_utils")),
    *(f"flowbp.utils.{name}" for name in ("fsdp_util", "hpsv2_transforms", "logging_", "parallel_states")),
)
MODEL = "a Flux of 2 + 4 blocks of width 256 with random weights, 256 image and 64 text tokens, 25 steps, one image"
MARGIN = 0.55  # of the hinge, as released
BOUND = {"float32": 5e-5, "bfloat16": 5e-2}  # on |difference| / |gradient|, over all parameters
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
VAE |= {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}


# -- the same settings and draws, by FlowBP's names -------------------------------------------------------------------


class Twin(NamedTuple):
    """The settings and draws of a method under FlowBP's names."""

    goal: float  # for our seconds over FlowBP's
    exact: dict[str, Any] | None  # settings that make gradients bitwise equal; None: FlowBP rounds differently
    named: dict[str, str]  # FlowBP's name of each of our settings
    draws: Callable[[Any, torch.Generator], dict[str, Callable[..., Any]]]  # (method, rng) -> {replaced name: function}
    settings: dict[str, Any] = {}  # noqa: RUF012 - never mutated; released settings that are not our defaults


def pair(steps: int, k: int, j: int) -> dict[str, Callable[..., Any]]:
    """Return the draw of a leap, whose steps FlowBP counts from the image: 1 is the last."""
    return {"sample_jk_indices": lambda *_: (torch.tensor([steps - k, steps - j]), k, j)}


def refl(method: Any, rng: torch.Generator) -> dict[str, Callable[..., Any]]:
    s = method.draw(rng)
    return {"randint": lambda *_, **__: torch.tensor([method.steps - s])}


def drtune(method: Any, rng: torch.Generator) -> dict[str, Callable[..., Any]]:
    trained, stop = method.draw(rng)
    return {
        "_sample_early_stop_idx": lambda *_, **__: stop,
        "_sample_equally_spaced_train_indices": lambda *_, **__: sorted(trained),
    }


def sparse(method: Any, rng: torch.Generator) -> dict[str, Callable[..., Any]]:
    active = sorted(method.chosen(method.window, method.k, method.window.start + 1, rng))
    return {"_sample_late_biased_indices": lambda *_, **__: active}


def bridge(method: Any, rng: torch.Generator) -> dict[str, Callable[..., Any]]:
    j, active = method.draw(rng)

    def within(start_idx: int, length: int, **_: Any) -> list[int]:
        return sorted(active & {*range(start_idx, start_idx + length)})

    return pair(method.steps, 0, j) | {"_sample_segment_indices": within}


LEAPS = {"alpha": "alpha", "tau": "tau"}
ACTIVE = {
    "k": "flowbp_sparse_num_active_steps",
    "late_bias": "flowbp_sparse_late_bias",
    "rescale": "flowbp_sparse_grad_rescale",
    "tail": "train_step_tail_ratio",
}
QUADRATURE = {
    "order": "flowbp_lagrange_connector_order",
    "mode": "flowbp_lagrange_grad_support_mode",
    "support_scale": "flowbp_lagrange_grad_support_scale",
    "rescale": "flowbp_lagrange_grad_rescale",
    "anchor": "flowbp_lagrange_anchor_lambda",
}
TWINS = {
    "leapalign": Twin(1.00, None, LEAPS, lambda m, rng: pair(m.steps, *m.draw(rng))),
    "refl": Twin(1.00, {}, {"last_n": "refl_last_n_steps"}, refl),
    "draft_lv": Twin(1.00, None, {"n": "draft_lv_num_noised_samples"}, lambda m, rng: {}, {"lv_reduction": "mean"}),
    "drtune": Twin(
        *(1.00, {}, {"k": "drtune_num_train_steps", "m": "drtune_early_stop_steps"}, drtune),
        {"k": 3, "m": 10, "draw_in_prefix": True},
    ),
    "flowbp_sparse": Twin(0.92, {"rescale": 0.0}, ACTIVE, sparse),
    "flowbp_bridge": Twin(0.90, None, {**ACTIVE, "alpha": "alpha"}, bridge),
    "flowbp_lagrange": Twin(0.90, None, {**LEAPS, **QUADRATURE}, lambda m, rng: pair(m.steps, *m.draw(rng))),
}


# -- what both sides share --------------------------------------------------------------------------------------------


class Judge(Evaluator):
    """The cosine of a small random network's features of the pixels and random features of the prompt."""

    name: ClassVar[str] = "judge"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("judge", "cosine"),)
    differentiable: ClassVar[bool] = True

    @cached_property
    def layers(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Conv2d(3, 32, 16, 16), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return layers.requires_grad_(False)

    @cached_property
    def words(self) -> Tensor:
        return torch.randn(1000, 128, generator=seeded("words"))

    @staticmethod
    def tokens(captions: Sequence[str]) -> Tensor:
        return torch.tensor([zlib.crc32(caption.encode()) % 1000 for caption in captions])

    def features(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        image, text = self.layers(pixels), self.words[tokens]
        return {"image_features": nn.functional.normalize(image), "text_features": nn.functional.normalize(text)}

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        features = self.features(pixels, self.tokens([prompt.text for prompt in prompts]))
        return torch.einsum("bc,bc->b", features["image_features"], features["text_features"])


def model(folder: Path, precision: str, small: bool) -> Any:
    """Return a Flux of 2 + 4 blocks of width 256 with random weights, or a smaller one."""
    from diffusers import AutoencoderKL
    from support.tiny import flux_folder

    if not folder.exists():
        flux_folder(folder, in_channels=64, scale=2.0, **({} if small else WIDE))
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = AutoencoderKL(**VAE, **blocks)
            vae.decoder.conv_out.weight.data.mul_(0.3)  # pixels well inside [0, 1], where no rounding meets the clamp
            vae.save_pretrained(folder / "vae")
    flow = Flux(model=str(folder), size=64 if small else 256, dtype=precision, max_sequence_length=64).load()
    for parameter in flow.transformer.parameters():
        # Weights from a file start anywhere in memory, copies at multiples of 64 bytes, which changes the rounding
        parameter.data = parameter.data.clone()
    return flow


TRAINING = Training(
    budget=Budget(updates=10**9),
    batch=1,
    drift_every=None,
    # weights hardly change and nothing is clipped, so that every repetition does the same work
    optimizer=Optimizer(lr=1e-12, clip=1e9, ema=None),
)
STEP = 1  # index of the batch that both sides train on


# -- our side ---------------------------------------------------------------------------------------------------------


class Ours:
    """Our side: a step as ``train`` makes it."""

    def __init__(self, method: Any, flow: Any, prompts: Sequence[Prompt]) -> None:
        self.run = TrainState(method, flow, TRAINING, Accelerator(cpu=True))
        reward = Reward(Term(Judge(), margin=MARGIN))
        self.flow, self.prompts = metered(flow, self.run.meter, self.run.watch), prompts
        self.reward = metered_reward(reward, self.run.meter, self.run.watch)

    def step(self) -> None:
        self.run.step = STEP
        self.run.records.clear()
        list(self.run.train_batch(self.flow, self.reward, self.prompts))

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.run.parameters.values()]


# -- FlowBP's side ----------------------------------------------------------------------------------------------------


class Clone(NamedTuple):
    """The modules imported for one method."""

    trainer: ModuleType
    modules: list[ModuleType]  # all of FlowBP's modules, including the trainer
    scheduler: Any


def load(path: Path, method: str) -> Clone:
    """Import FlowBP's trainer of this method afresh. Raise SystemExit with one line if that fails."""
    if not path.is_dir():
        refuse(f"{path} is not a folder; get it with: git clone {URL} {path}")
    for name in (f"{TRAINERS}.{method}", SCHEDULER):
        file = f"{name.replace('.', '/')}.py"
        if not (path / file).is_file():
            refuse(f"{path} is not a clone of FlowBP: it has no {file}; get one with: git clone {URL}")
    with importable(path):
        try:
            trainer = importlib.import_module(f"{TRAINERS}.{method}")
            scheduler = importlib.import_module(SCHEDULER).FlowMatchEulerDiscreteWithPredX0Scheduler
        except Exception as error:  # foreign modules may raise anything
            refuse(f"{path} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}")
        own = [m for name, m in sys.modules.items() if name.startswith("flowbp.") and getattr(m, "__file__", None)]
    return Clone(trainer, own, scheduler)


def refuse(what: str) -> NoReturn:
    raise SystemExit(f"benchmarks/peers.py: --flowbp: {what}")


class Unused(ModuleType):
    """A module from which any name can be imported, but nothing called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # in particular ``__file__``
            raise AttributeError(name)
        return Unused(f"{self.__name__}.{name}")


@contextmanager
def importable(path: Path) -> Iterator[None]:
    """Make ``flowbp`` importable from ``path``. Afterwards all modules are as they were before."""
    before = dict(sys.modules)
    package = ModuleType("flowbp.trainers")  # the original __init__ imports the trainers of all models
    package.__path__ = [str(path / "flowbp" / "trainers")]
    sys.modules.update({name: Unused(name) for name in UNUSED}, **{"flowbp.trainers": package})
    sys.path.insert(0, str(path.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(path.resolve()))
        for name in [name for name in sys.modules if name.split(".")[0] in ("flowbp", "wandb")]:
            del sys.modules[name]
        sys.modules.update(before)


class View:
    """A module with some of its names replaced."""

    def __init__(self, module: ModuleType, **own: Any) -> None:
        self._module = module
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Network:
    """The transformer as FSDP wraps it for one rank: it clips its own gradients. Its output is float32."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.gradients: list[Tensor | None] = []  # of the last step, which deletes them at its end

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        return (self.transformer(**inputs)[0].float(),)

    def clip_grad_norm_(self, limit: float) -> Tensor:
        parameters = list(self.transformer.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.gradients = [p.grad for p in parameters]
        return norm


class Decoder:
    """The autoencoder as our backend calls it: in its own precision, without autocast."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        with torch.autocast("cpu", enabled=False):
            return (self.vae.decode(z.to(self.vae.dtype), return_dict=return_dict)[0].float(),)


class Theirs:
    """FlowBP's step of one method, on a copy of ``flow``'s network with its initial weights."""

    def __init__(self, name: str, method: Any, flow: Any, prompts: Sequence[Prompt], clone: Clone) -> None:
        from diffusers.optimization import get_scheduler

        twin, device = TWINS[name], torch.device("cpu")
        batch = draw_batch(flow, prompts, TRAINING, STEP, range(TRAINING.batch), device)
        copies = method.n if name == "draft_lv" else 0
        noises = [unpack(batch.noise, flow.grid), *(batch.randn_like(batch.noise) for _ in range(copies))]
        draws = twin.draws(method, batch.step_rng)
        patch_modules(clone, itertools.cycle(noises), draws, flow._settings.dtype == "bfloat16")
        settings = TRAINING.optimizer
        self.network = Network(copy.deepcopy(flow.transformer))
        optimizer = torch.optim.AdamW(
            self.network.transformer.parameters(),
            lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
        )  # fmt: skip
        args = SimpleNamespace(
            w=flow.size, h=flow.size, cfg_guidance=flow.guidance,
            sampling_steps=method.steps, rollout_steps=method.steps,
            use_hpsv2=True, loss_relu_clip=MARGIN, loss_grad_scale=1.0,
            gradient_accumulation_steps=1, max_grad_norm=settings.clip,
            **{theirs: getattr(method, ours) for ours, theirs in twin.named.items()},
        )  # fmt: skip
        text, pooled = batch.cond.tensors["text"], batch.cond.tensors["pooled"]
        captions = [prompt.text for prompt in batch.prompts]
        loader = itertools.repeat((text, pooled, torch.zeros(1), captions))
        scheduler = clone.scheduler.from_config(flow.scheduler.config)
        judge = Judge()
        function = "train_one_step" if name == "leapalign" else f"train_{name}_one_step"
        self.work = getattr(clone.trainer, function)
        self.given = (
            *(args, 0, device, self.network, Decoder(flow.vae), scheduler, judge.features, judge.tokens),
            *(optimizer, get_scheduler("constant", optimizer), loader, lambda pixels: pixels, batch.step_rng),
        )

    def step(self) -> None:
        self.work(*self.given)

    @property
    def gradients(self) -> list[Tensor | None]:
        return self.network.gradients


def patch_modules(clone: Clone, noises: Iterator[Tensor], draws: dict[str, Any], half: bool) -> None:
    """Replace ``torch``, ``dist`` and the drawing functions in FlowBP's modules."""
    own = {"randn": lambda *_, **__: next(noises), "bfloat16": torch.float32}
    own["autocast"] = lambda *_, **__: torch.autocast("cpu", torch.bfloat16, enabled=half)
    own["amp"] = View(torch.amp, autocast=lambda *_: torch.autocast("cpu", enabled=False))  # around the reward
    for module in clone.modules:
        for name, value in draws.items():
            if name in vars(module):
                setattr(module, name, value)
        if "torch" in vars(module):
            module.torch = View(torch, **own, **{name: value for name, value in draws.items() if hasattr(torch, name)})
        if "dist" in vars(module):
            module.dist = View(torch.distributed, all_reduce=lambda *_, **__: None)


# -- rows and their table ---------------------------------------------------------------------------------------------


def relative_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor | None]) -> float:
    """Return |difference| / |theirs| over all parameters; a missing gradient counts as zero."""
    pairs = [(a.double(), torch.zeros_like(a).double() if b is None else b.double()) for a, b in zip(ours, theirs)]
    square = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    return square**0.5


def row(name: str, flow: Any, path: Path, pairs: int) -> dict[str, Any]:
    """Compare gradients, then time both sides, with float32 weights only. Raise SystemExit if gradients differ."""
    twin, precision = TWINS[name], flow._settings.dtype
    if twin.exact is not None:
        check_gradients(name, precision, sides(name, flow, path, twin.settings | twin.exact), 0.0)
    both = sides(name, flow, path, twin.settings)
    bound = 0.0 if twin.exact == {} else BOUND[precision]
    difference = check_gradients(name, precision, both, bound)
    measured = {"method": name, "apart": difference, "bound": bound, "exact": twin.exact}
    if precision == "float32":
        ours, theirs = both
        measured |= {**compare(ours.step, theirs.step, pairs)._asdict(), "goal": twin.goal}
    return measured


def sides(name: str, flow: Any, path: Path, settings: dict[str, Any]) -> tuple[Ours, Theirs]:
    method, prompts = Registry().make("method", {"name": name, **settings}, "method"), load_prompts("shapes/train")
    return Ours(method, flow, prompts), Theirs(name, method, flow, prompts, load(path, name))


def check_gradients(name: str, precision: str, both: tuple[Ours, Theirs], bound: float) -> float:
    """Return the relative difference of one step's gradients. Raise SystemExit if it exceeds ``bound``."""
    for side in both:
        side.step()
    ours, theirs = both
    difference = relative_difference(ours.gradients, theirs.gradients)
    if not difference <= bound:
        what = f"gradients differ from FlowBP's by {difference:.1e} of their norm; {bound:.0e} is allowed"
        raise SystemExit(f"benchmarks/peers.py: {name}, {precision}: {what}")
    return difference


def version(path: Path, methods: Sequence[str]) -> str:
    """Return the clone's commit, or without git a digest of the files that are run."""
    if (path / ".git").exists():
        commit, changes = (git(path, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
        return f"{commit}{', with changes' if changes else ''}"
    files = {module.__file__ for name in methods for module in load(path, name).modules}
    return f"no commit is known; content {fingerprint(Path(str(file)) for file in files)[:12]}"


def git(path: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(path), *words], capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def table(about: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["# A training step against FlowBP's own", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += ["", "Gradients of all parameters, |difference| / |gradient|; in bfloat16 of 64 px, 16 image tokens:", ""]
    lines += ["| method | network | as released | allowed |", "|---|---|---|---|"]
    lines += [f"| {row['method']} | {what} | {gradients(row)} |" for what, rows in found.items() for row in rows]
    lines += ["", "Time of a step, of one CPU thread, median over pairs; network in float32:", ""]
    lines += ["| method | alignbench | FlowBP | ratio | from, to | goal |", "|---|---:|---:|---:|---|---|"]
    lines += [f"| {row['method']} | {figures(row)} | {kept(row)} |" for row in found.get("float32", [])]
    return "\n".join(lines) + "\n"


def gradients(row: dict[str, Any]) -> str:
    allowed = f"{row['bound']:.0e}" if row["bound"] else "none"
    if row["exact"]:
        allowed += "".join(f"; none with {key} {value:g}" for key, value in row["exact"].items())
    return f"{row['apart']:.1e} | {allowed}" if row["apart"] else f"bitwise equal | {allowed}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flowbp", type=Path, required=True, help=f"a clone of {URL}")
    parser.add_argument("--pairs", type=int, default=9, help="how often both sides are timed")
    parser.add_argument("--methods", default=",".join(TWINS), help="only these, separated by commas")
    parser.add_argument("--precisions", default=",".join(BOUND), help="of the network, separated by commas")
    parser.add_argument("--note", help="a line on the clone, to store with the results")
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    given = parse(parser, arguments, free=["flowbp", "note"])
    names = given.methods.split(",")
    if odd := sorted(set(names) - set(TWINS)):
        raise SystemExit(f"benchmarks/peers.py: --methods: FlowBP has no {odd[0]!r}; choose from {', '.join(TWINS)}")
    for name in names:
        load(given.flowbp, name)  # refuses an unusable folder before anything is measured
    sys.path.insert(0, str(HERE.parent / "tests"))
    torch.set_num_threads(1)
    about = {"date": date.today().isoformat(), "FlowBP": version(given.flowbp, names)}
    about |= {"note": given.note} if given.note else {}
    about |= {"cpu": processor(), "pairs": given.pairs}
    about |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    about |= {"model": "small, figures mean nothing" if given.small else MODEL}
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for precision in given.precisions.split(","):
            flow = model(Path(temporary) / "model", precision, given.small)
            if precision == "bfloat16":
                flow = flow.at(size=64)
            rows = found[precision] = []
            for name in names:
                rows.append(row(name, flow, given.flowbp, given.pairs))
                seconds = [figures(rows[-1]), kept(rows[-1])] if "ratio" in rows[-1] else []
                print(" | ".join([precision, name, gradients(rows[-1]), *seconds]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "peers.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    (given.out / "peers.md").write_text(table(about, found))
    print(table(about, found))
    return {**about, **found}


if __name__ == "__main__":
    main()

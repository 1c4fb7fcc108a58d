"""Measure what alignbench adds to a model's own calls, on one CPU thread: training steps and sampling.

    python benchmarks/steps.py [--pairs 5] [--methods leapalign,refl]

- step: one batch of ``train`` with everything around it (noise, metrics, checks), against its parts alone: each call of
  the network, the decoder and the reward, repeated with the same input and its own backward, and the optimizer's
  update. Goal: at most 1.05.
- sampling with models of width 32 ("tiny") and 256 ("wide"): ``integrate`` against ``FluxPipeline.__call__`` with the
  same embeddings; their latents must agree. Goal: at most 0.95 and 1.00.
- twelve images at once against one after the other.

Both sides take turns in one process. Seconds are CPU seconds, which other load hardly changes; ratios are medians over
pairs. Results go to benchmarks/results/steps.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from arguments import parse

from alignbench.backends.flux import Flux
from alignbench.evaluator import Reward, Term
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.experiment.spec import Budget, Optimizer, Training
from alignbench.flow import integrate, seeded
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts
from alignbench.training.meter import metered, metered_reward
from alignbench.training.state import TrainState

HERE = Path(__file__).resolve().parent
STEPS = 10  # of the sampler in training
SETTINGS: dict[str, dict[str, Any]] = {  # published settings that need more steps or images
    "refl": {"last_n": 5},
    "drtune": {"m": 5},
    "dancegrpo": {"group": 4, "updates_per_rollout": 2},
    "flowgrpo": {"group": 4},
    "mixgrpo": {"group": 4},
    "adjoint_matching": {"late": 3, "early": 2},
}
WIDE = {"num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "num_single_layers": 4}
GOALS = {"step": 1.05, "tiny": 0.95, "wide": 1.00}


class Pair(NamedTuple):
    """Median seconds of both sides, and the median, least and largest of their ratios."""

    ours: float
    other: float
    ratio: float
    least: float
    largest: float


def compare(ours: Callable[[], Any], other: Callable[[], Any], pairs: int) -> Pair:
    """Time both in turn; the first call of each is not counted."""
    seconds = [(clock(ours), clock(other)) for _ in range(pairs + 1)][1:]
    ratios = [a / b for a, b in seconds]
    a, b = (statistics.median(side) for side in zip(*seconds))
    return Pair(a, b, statistics.median(ratios), min(ratios), max(ratios))


def clock(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


# -- a step and its parts ----------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call of a network, a decoder or a reward, which can be repeated alone."""

    work: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    wants: bool  # whether its input needs a gradient
    grad: bool  # whether a graph was built
    backward: str = ""  # "all": to input and weights; "input": to its input alone; "": none

    def repeat(self) -> None:
        x = self.x.clone().requires_grad_(self.wants)
        with torch.set_grad_enabled(self.grad):
            y = self.work(x)
        if self.backward == "all":
            y.backward(torch.ones_like(y))
        elif self.backward:
            torch.autograd.grad(y, x, torch.ones_like(y))


class Recorder:
    """A flow that records its calls, and those of a ``RecordedReward``."""

    def __init__(self, flow: Any, accelerator: Any) -> None:
        self._flow = flow
        self.calls: list[Call] = []
        self.inside = False  # whether a loss' backward is running
        inner = accelerator.backward

        def backward(loss: torch.Tensor) -> None:
            self.inside = True
            inner(loss)
            self.inside = False

        accelerator.backward = backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def record(self, work: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y = work(x)
        call = Call(work, x.detach().clone(), x.requires_grad and y.requires_grad, y.requires_grad)
        self.calls.append(call)
        if y.requires_grad:
            y.register_hook(lambda _: setattr(call, "backward", "all" if self.inside else "input"))
        return y

    def velocity(self, x: torch.Tensor, sigma: Any, cond: Any, *, reference: bool = False) -> torch.Tensor:
        sigma = sigma.detach() if isinstance(sigma, torch.Tensor) else sigma
        return self.record(lambda x: self._flow.velocity(x, sigma, cond, reference=reference), x)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        return self.record(self._flow.decode, x0)


class RecordedReward(Reward):
    def __init__(self, reward: Reward, recorder: Recorder) -> None:
        super().__init__(*reward.terms)
        self.inner, self.recorder = reward, recorder

    def __call__(self, pixels: torch.Tensor, prompts: Any) -> torch.Tensor:
        return self.recorder.record(lambda pixels: self.inner(pixels, prompts), pixels)


def step(name: str, flow: Any, batch: int, pairs: int) -> dict[str, Any]:
    """Return a row that compares a method's step with its parts."""
    settings = {"name": name, "steps": STEPS, **SETTINGS.get(name, {})}
    method = Registry().make("method", settings, "method")
    batch = max(batch, getattr(method, "group", 1))
    optimizer = Optimizer(lr=1e-12)  # so that every repetition does the same work
    training = Training(budget=Budget(updates=10**9), batch=batch, drift_every=None, optimizer=optimizer)
    prompts = load_prompts("shapes/train")
    reward = Reward(Term(HPSv2(weights="shapes"), margin=1.0))
    method.prepare(flow)

    def make(flow: Any, reward: Reward, run: TrainState) -> Callable[[], None]:
        flow, reward = metered(flow, run.meter, run.watch), metered_reward(reward, run.meter, run.watch)

        def work() -> None:
            run.step = 1
            run.records.clear()
            list(run.train_batch(flow, reward, prompts))

        return work

    run = TrainState(method, flow, training, Accelerator(cpu=True))
    recorder = Recorder(flow, run.accelerator)
    make(recorder, RecordedReward(reward, recorder), run)()
    updates, calls = len(run.records), recorder.calls
    counts = run.meter.state_dict()

    def alone() -> None:
        run.optimizer.zero_grad()
        for call in calls:
            call.repeat()
        for _ in range(updates):
            run.synchronize_gradients()
            run.optimizer_step()

    pair = compare(make(flow, reward, run), alone, pairs)
    nfe = {key: counts[f"nfe_{key}"] / batch for key in ("forward", "grad", "recomputed")}
    return {"method": name, "batch": batch, **nfe, **pair._asdict(), "goal": GOALS["step"]}


# -- sampling ----------------------------------------------------------------------------------------------------------


def sampling(folder: Path, size: int, pairs: int, what: str) -> dict[str, Any]:
    """Return a row that compares ``integrate`` with the pipeline's own loop, for 20 steps."""
    from diffusers import FluxPipeline

    steps = 20
    flow = Flux(model=str(folder), size=size, dtype="float32", max_sequence_length=64).load()
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    cond, noise = flow.encode(["a photo of red circle"]), flow.noise(1, [seeded("noise", 0)])
    given = {"prompt_embeds": cond.tensors["text"], "pooled_prompt_embeds": cond.tensors["pooled"]}
    given |= {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": flow.guidance}

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return integrate(flow, noise, flow.sigmas(steps), cond)

    def theirs() -> torch.Tensor:
        return pipeline(**given, latents=noise, output_type="latent").images

    difference = ((ours() - theirs()).norm() / theirs().norm()).item()
    assert difference < 1e-5, f"the two differ by {difference}"
    return {"model": what, **compare(ours, theirs, pairs)._asdict(), "goal": GOALS[what]}


def together(flow: Any, pairs: int, what: str, count: int = 12) -> dict[str, Any]:
    """Return a row that compares a rollout of ``count`` images with ``count`` rollouts of one."""
    texts = [f"a photo of {i} red circles" for i in range(count)]
    cond, noise = flow.encode(texts), flow.noise(count, [seeded("noise", i) for i in range(count)])
    sigmas = flow.sigmas(STEPS)

    @torch.no_grad()
    def at_once() -> None:
        integrate(flow, noise, sigmas, cond)

    @torch.no_grad()
    def singly() -> None:
        for i in range(count):
            integrate(flow, noise[i : i + 1], sigmas, flow.encode(texts[i : i + 1]))

    return {"model": what, "images": count, **compare(at_once, singly, pairs)._asdict()}


# -- what is kept ------------------------------------------------------------------------------------------------------


def table(about: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["# What alignbench adds to a model's own calls", "", *(f"- {k}: {v}" for k, v in about.items())]
    for model, rows in found["steps"].items():
        lines += ["", f"A training step against its parts alone, {model}:", ""]
        lines += ["| method | images | forward + grad (+ again) | step | parts | ratio | from, to | goal |"]
        lines += ["|---|---:|---|---:|---:|---:|---|---|"]
        for row in rows:
            nfe = f"{row['forward']:g} + {row['grad']:g}" + (f" + {row['recomputed']:g}" if row["recomputed"] else "")
            lines.append(f"| {row['method']} | {row['batch']} | {nfe} | {figures(row)} | {kept(row)} |")
    lines += ["", "Sampling one image against `FluxPipeline.__call__`, 20 steps:", ""]
    lines += ["| model | alignbench | pipeline | ratio | from, to | goal |", "|---|---:|---:|---:|---|---|"]
    lines += [f"| {row['model']} | {figures(row)} | {kept(row)} |" for row in found["sampling"]]
    lines += ["", f"A rollout of {STEPS} steps, twelve images at once against one after the other:", ""]
    lines += ["| model | at once | singly | ratio | from, to |", "|---|---:|---:|---:|---|"]
    lines += [f"| {row['model']} | {figures(row)} |" for row in found["together"]]
    return "\n".join(lines) + "\n"


def figures(row: dict[str, Any]) -> str:
    sides = f"{1e3 * row['ours']:.0f} ms | {1e3 * row['other']:.0f} ms"
    return f"{sides} | {row['ratio']:.3f} | {row['least']:.3f}, {row['largest']:.3f}"


def kept(row: dict[str, Any]) -> str:
    return f"{row['goal']:.2f}{'' if row['ratio'] <= row['goal'] else ', missed'}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="how often both sides are timed")
    parser.add_argument("--methods", help="only these, separated by commas")
    given = parse(parser, arguments)
    sys.path.insert(0, str(HERE.parent / "tests"))
    from support.tiny import flux_folder

    torch.set_num_threads(1)
    registry = Registry()
    trained = [n for n in registry.names("method") if n not in ("base", "checkpoint")]
    names = given.methods.split(",") if given.methods else trained
    about = {"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine()}
    about |= {"time": "of one CPU thread, median", "torch": torch.__version__, "pairs": given.pairs}
    found: dict[str, Any] = {"steps": {}, "sampling": [], "together": []}
    with tempfile.TemporaryDirectory() as temporary:
        tiny, wide = Path(temporary) / "tiny", Path(temporary) / "wide"
        tiny.mkdir()
        wide.mkdir()
        flux_folder(tiny)
        flux_folder(wide, **WIDE)
        shapes = {"model": "shapes", "size": 64, "max_sequence_length": 16, "dtype": "float32"}
        models = {
            "the shapes model at 64 px, float32": (shapes, 4),
            "2 + 4 blocks of width 256 with random weights, 32 px, float32": (
                {"model": str(wide), "size": 32, "max_sequence_length": 64, "dtype": "float32"},
                1,
            ),
        }
        for what, (settings, batch) in models.items():
            flow = Flux(**settings).load()
            rows = found["steps"][what] = []
            for name in names:
                rows.append(step(name, flow, batch, given.pairs))
                print(what, name, figures(rows[-1]), flush=True)
            found["together"].append(together(flow, given.pairs, what))
        for what, folder in (("tiny", tiny), ("wide", wide)):
            found["sampling"].append(sampling(folder, 32, given.pairs, what))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "steps.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    (given.out / "steps.md").write_text(table(about, found))
    print(table(about, found))
    return found


if __name__ == "__main__":
    main()

"""Measure what FLUX.1-dev costs on one GPU: a forward, a training sample of each method, the largest batch, an image.

    python benchmarks/gpu.py [--minutes 8] [--small]

The model has the real configuration with random weights (never zeros, which run faster), random text states and a
random ViT-H as HPSv2.1: nothing is downloaded. Timed is what users run: the backend's ``velocity``, ``train``,
``generate`` and ``score``. Text encoders are left out, since every prompt is encoded once per run. Results are printed
as they come and saved after each phase in benchmarks/results/gpu-<card>.json and .md; a phase that does not fit into
the minutes is skipped. ``--small`` runs every phase with small models, on a CPU if there is no GPU: its results mean
nothing.

Utilisation is the FLOPs of alignbench/backends/cost over time and rate. "MFU" counts what the mathematics needs,
against the card's peak. "HFU" adds what block checkpointing recomputes. "of ceiling" is the HFU against the rate at
which this card multiplies the matrices of the model's blocks, measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from arguments import parse
from msgspec import structs

from alignbench.backends.cost.formulas import Model
from alignbench.backends.cost.published_configs import FLUX_1_DEV
from alignbench.backends.flux import Flux, FluxFlow
from alignbench.backends.pipeline import PromptEncoder
from alignbench.evaluation.images import generate
from alignbench.evaluator import Reward, Term
from alignbench.evaluators.hpsv2 import HPSv2
from alignbench.experiment.spec import Budget, Optimizer, Protocol, Training
from alignbench.flow import Cond, seeded
from alignbench.methods.draft import DRaFTLV
from alignbench.methods.drtune import DRTune
from alignbench.methods.leapalign import LeapAlign
from alignbench.methods.mixgrpo import MixGRPO
from alignbench.methods.refl import ReFL
from alignbench.prompts import Prompt
from alignbench.training.loop import train

PEAK = 989e12  # FLOP/s: dense bfloat16 of an H100 or H200 SXM, by its datasheet
TEXT_ENCODERS = 9.8  # GB in bfloat16, which a real run keeps on the GPU
PROMPTS = [Prompt(str(i), f"a photo of {i} red circles above a blue square, oil on canvas") for i in range(64)]
VAE = {"in_channels": 3, "out_channels": 3, "scaling_factor": 0.3611, "shift_factor": 0.1159}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
SMALL: dict[str, dict[str, Any]] = {
    **FLUX_1_DEV,
    "transformer": {
        **{"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
        **{"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True},
    },
    "vae": {"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4},
}
SMALL_JUDGE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 80, "head_width": 40, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


class World(NamedTuple):
    """The model under test, and the image sizes (pixels) to measure; ``size`` is the main one."""

    device: torch.device
    model: Model  # FLOPs and memory
    flow: FluxFlow
    settings: Flux
    pipeline: Any
    judge: HPSv2
    sizes: tuple[int, ...]
    size: int
    words: int
    steps: int  # of a training rollout

    def flops(self, size: int) -> float:
        """Return the FLOPs of one forward of one sample."""
        return self.model.transformer.forward(self.model.tokens(size, self.words))


class Sheet:
    """A table of results, printed row by row and saved on disk."""

    def __init__(self, results: Path, minutes: float, about: dict[str, Any]) -> None:
        self.results, self.minutes, self.about = results, minutes, about
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.ceilings: dict[int, float] = {}  # FLOP/s, by rows of the matrices

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(self, what: str, value: float | None, unit: str, goal: str = "", **more: float | str) -> None:
        self.rows.append({"what": what, "value": value, "unit": unit, "goal": goal, **more})
        print(f"[{self.seconds:4.0f} s] {what}: {_line(self.rows[-1])}", flush=True)

    def used(self, hardware: float, seconds: float, tokens: int) -> dict[str, float]:
        """Return the FLOPs computed over those of the ceiling at the nearest number of tokens."""
        if not self.ceilings:
            return {}
        near = min(self.ceilings, key=lambda rows: abs(rows - tokens))
        return {"of_ceiling": hardware / seconds / self.ceilings[near]}

    def write(self) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"gpu-{self.about['name']}"
        path.with_suffix(".json").write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(self.table())

    def table(self) -> str:
        lines = ["# FLUX.1-dev on one GPU", "", *(f"- {key}: {value}" for key, value in self.about.items()), ""]
        lines += ["| what | figure | goal | MFU | HFU | of ceiling | more |", "|---|---:|---:|---:|---:|---:|---|"]
        for row in self.rows:
            shares = (f"{row[key]:.0%}" if key in row else "" for key in ("mfu", "hfu", "of_ceiling"))
            lines.append(f"| {row['what']} | {_figure(row)} | {row['goal']} | {' | '.join(shares)} | {_rest(row)} |")
        return "\n".join(lines) + "\n"


def _figure(row: dict[str, Any]) -> str:
    return f"{row['value']:.4g} {row['unit']}" if row["value"] is not None else row["unit"]


def _rest(row: dict[str, Any]) -> str:
    known = ("what", "value", "unit", "goal", "mfu", "hfu", "of_ceiling")
    shown = ((k, f"{v:.3g}" if isinstance(v, float) else v) for k, v in row.items() if k not in known)
    return ", ".join(f"{key} {value}" for key, value in shown)


def _line(row: dict[str, Any]) -> str:
    shares = [f"{key} {row[key]:.0%}" for key in ("mfu", "hfu", "of_ceiling") if key in row]
    goal = [f"goal {row['goal']}"] * bool(row["goal"])
    return "; ".join(filter(None, [_figure(row), *goal, *shares, _rest(row)]))


# -- the model --------------------------------------------------------------------------------------------------------


def world(small: bool, device: torch.device, folder: Path) -> World:
    """Build everything on ``device``. The backend reads the autoencoder's configuration from ``folder``."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    configs = SMALL if small else FLUX_1_DEV
    shape = {**configs["transformer"], **({"axes_dims_rope": (4, 6, 6)} if small else {})}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**shape).to(torch.bfloat16)
    transformer = randomised(transformer.to_empty(device=device))
    stages = len(configs["vae"]["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    with torch.device(device):
        vae = AutoencoderKL(**VAE, **configs["vae"], **blocks, norm_num_groups=4 if small else 32)
    pipeline = SimpleNamespace(
        transformer=transformer,
        vae=vae.to(torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        **{"text_encoder": torch.nn.Module(), "text_encoder_2": torch.nn.Module()},
        **{"tokenizer": None, "tokenizer_2": SimpleNamespace(model_max_length=512)},
    )
    for part in (transformer, pipeline.vae):
        part.requires_grad_(False).eval()
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps(configs["vae"]))
    sizes, words, steps = ((16, 24, 32), 8, 4) if small else ((512, 720, 1024), 512, 25)
    settings = Flux(model=str(folder), size=sizes[1], tune="lora", gradient_checkpointing=True)
    flow = FluxFlow(pipeline, settings, RandomText(shape, words, device), device)
    judge = random_judge(SMALL_JUDGE if small else None, device)
    return World(device, Model.read(configs), flow, settings, pipeline, judge, sizes, sizes[1], words, steps)


def randomised(module: Any, scale: float = 0.02) -> Any:
    """Draw the weights from N(0, scale^2), those of norms around 1; return the module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            norm = parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.normal_(float(norm), scale)
    return module


class RandomText(PromptEncoder):
    """Random text states in place of the encoders', equal for equal prompts."""

    def __init__(self, shape: dict[str, Any], words: int, device: torch.device) -> None:
        super().__init__(device)
        self.sizes = {"text": (words, shape["joint_attention_dim"]), "pooled": (shape["pooled_projection_dim"],)}

    def encode_one(self, prompt: str) -> dict[str, torch.Tensor]:
        rng = seeded("text", prompt)
        return {name: torch.randn(size, generator=rng).bfloat16() for name, size in self.sizes.items()}


def random_judge(config: dict[str, Any] | None, device: torch.device) -> HPSv2:
    """Return HPSv2.1 with random weights in memory instead of a checkpoint."""
    import open_clip

    config = config or open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    randomised(model.to_empty(device=device))
    n = model.context_length
    model.attn_mask = torch.full((n, n), float("-inf"), device=device).triu(1)
    judge = HPSv2()
    judge.__dict__.update(_model=model.eval().requires_grad_(False), _config=config)
    return judge


def with_adapters(it: World) -> World:
    """Add LoRA as for training, but with a nonzero B, since A has no gradient while B is zero."""
    it.settings.prepare(it.pipeline)
    flow = FluxFlow(it.pipeline, it.settings, it.flow._text, it.device)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)
    return it._replace(flow=flow)


# -- clocks -----------------------------------------------------------------------------------------------------------


def clock(work: Callable[[], Any], device: torch.device, repeats: int = 5, warm: int = 2) -> float:
    """Return the median seconds of ``work``, timed with events on a GPU."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def free_memory(device: torch.device) -> None:
    """Free cached GPU memory, and reset the record of its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- phases: each adds rows to the sheet ------------------------------------------------------------------------------


def ceilings(it: World, sheet: Sheet) -> None:
    """Measure the rate of the blocks' matrix products in bfloat16, weighted as in the model, and of a copy."""
    width = it.model.transformer.width
    layers = [linear for linear in it.model.transformer.linears() if linear.rows != "sample" and linear.n_in >= width]
    shapes = Counter((linear.n_in, linear.n_out) for linear in layers if linear.n_out >= width)
    shapes[width, 3 * width] = 0  # a fused projection, which the model does not have, for comparison
    for size in it.sizes:
        rows, flops, seconds, rates = it.model.tokens(size, it.words).both, 0.0, 0.0, {}
        for (n_in, n_out), count in shapes.items():
            x = torch.randn(rows, n_in, device=it.device, dtype=torch.bfloat16)
            w = torch.randn(n_out, n_in, device=it.device, dtype=torch.bfloat16)
            took = clock(lambda x=x, w=w: torch.nn.functional.linear(x, w), it.device, repeats=10)
            rates[f"{n_in}x{n_out}"] = 2.0 * rows * n_in * n_out / took / 1e12
            flops, seconds = flops + count * 2.0 * rows * n_in * n_out, seconds + count * took
        sheet.ceilings[rows] = flops / seconds
        sheet.add(f"matrix products of {rows} rows", flops / seconds / 1e12, "TFLOP/s", **rates)
    source = torch.randn(2**30 if it.device.type == "cuda" else 2**20, device=it.device)
    target = torch.empty_like(source)
    took = clock(lambda: target.copy_(source), it.device)
    sheet.add("copy, read and written", 2 * source.nbytes / took / 1e12, "TB/s")


def inputs(it: World, size: int, n: int) -> tuple[torch.Tensor, Cond]:
    flow = it.flow.at(size=size)
    return flow.noise(n, [seeded("noise", i) for i in range(n)]), flow.encode([p.text for p in PROMPTS[:n]])


def forward(it: World, sheet: Sheet, what: str, size: int, n: int = 1, goal: str = "", **more: Any) -> torch.Tensor:
    """Add a row for ``velocity`` without gradient, as in a rollout; return its output."""
    flow, (x, cond) = it.flow.at(size=size), inputs(it, size, n)
    with torch.no_grad():
        seconds = clock(lambda: flow.velocity(x, 0.5, cond), it.device)
        answer = flow.velocity(x, 0.5, cond)
    flops, tokens = n * it.flops(size), it.model.tokens(size, it.words).both
    shares = {"mfu": flops / seconds / PEAK, **sheet.used(flops, seconds, tokens)}
    sheet.add(f"forward, {size} px, batch {n}{what}", seconds * 1e3, "ms", goal, **shares, **more)
    return answer


def forwards(it: World, sheet: Sheet) -> None:
    """Time the network alone, uncompiled, by image size and batch."""
    for size, n in itertools.product(it.sizes, (1, 4)):
        goal = "75 ms" if (size, n) == (it.size, 1) else ""
        forward(it, sheet, "", size, n, goal)
    pure_bfloat16(it, sheet)


def pure_bfloat16(it: World, sheet: Sheet) -> None:
    """Time diffusers' own call for comparison, with every tensor in bfloat16 and no autocast."""
    flow, (x, cond) = it.flow, inputs(it, it.size, 1)
    call = {"hidden_states": x.bfloat16(), "encoder_hidden_states": cond.tensors["text"], "return_dict": False}
    call |= {"timestep": torch.full((1,), 0.5, device=it.device, dtype=torch.bfloat16)}
    call |= {"guidance": torch.full((1,), 3.5, device=it.device), "pooled_projections": cond.tensors["pooled"]}
    call |= {"txt_ids": flow._ids(0, it.words), "img_ids": flow._ids(flow.grid, 0)}
    with torch.no_grad():
        seconds = clock(lambda: flow.transformer(**call), it.device)
    flops = it.flops(it.size)
    shares = {"mfu": flops / seconds / PEAK}
    sheet.add(f"forward, {it.size} px, batch 1, as in FluxPipeline (all bfloat16)", seconds * 1e3, "ms", **shares)


def attention(it: World, sheet: Sheet) -> None:
    """Time the same forward with each attention kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        with (
            sdpa_kernel(getattr(SDPBackend, name)),
            failure_as_row(sheet, f"forward, {it.size} px, batch 1, {name.lower()}"),
        ):
            forward(it, sheet, f", {name.lower()}", it.size)


def adapted(it: World, sheet: Sheet) -> None:
    """Time a forward with adapters."""
    forward(it, sheet, ", with adapters", it.size)


class Step(NamedTuple):
    """The average cost of one training sample."""

    seconds: float
    peak: float  # GB
    model: float  # FLOPs that the mathematics needs
    hardware: float  # FLOPs with checkpointing's recomputation


def step(it: World, method: Any, size: int, n: int = 1, updates: int = 3, **more: Any) -> Step:
    """Measure ``updates`` updates of ``train`` with batches of n.

    The first update warms up and is not counted if there are more. ``more``: settings of training.
    """
    free_memory(it.device)
    reward = Reward(Term(it.judge, margin=None))
    training = Training(budget=Budget(updates=updates), batch=n, micro_batch=n, drift_every=None, **more)
    accelerator = Accelerator(cpu=it.device.type == "cpu")
    records = list(train(method, it.flow.at(size=size), reward, PROMPTS, training, accelerator=accelerator))
    first = records[0] if len(records) > 1 else dict.fromkeys(records[0], 0)
    spent = {k: records[-1][k] - first[k] for k in ("seconds", "nfe_forward", "nfe_grad", "decodes", "images")}
    tokens = it.model.tokens(size, it.words)
    full = it.flow._settings.tune == "full"
    f, b = it.model.transformer.forward(tokens), it.model.transformer.backward(tokens, full)
    decode = it.model.decoder.forward(size) * spent["decodes"]
    pathwise = 0 if method.stochastic else 1  # 1 if the decoder is differentiated
    model = spent["nfe_forward"] * f + spent["nfe_grad"] * (f + b) + decode * (1 + pathwise)
    hardware = model + spent["nfe_grad"] * f + decode * pathwise
    images = spent["images"] or records[-1]["images"]
    return Step(spent["seconds"] / images, records[-1]["peak_memory_bytes"] / 1e9, model / images, hardware / images)


def training_row(it: World, sheet: Sheet, what: str, cost: Step, size: int, goal: str = "") -> None:
    seconds, tokens = cost.seconds, it.model.tokens(size, it.words).both
    shares = {"mfu": cost.model / seconds / PEAK, "hfu": cost.hardware / seconds / PEAK}
    shares |= sheet.used(cost.hardware, seconds, tokens)
    sheet.add(what, seconds, "s per sample", goal, **shares, peak_GB=cost.peak)


def leapalign(it: World, sheet: Sheet) -> None:
    """Measure the main result."""
    cost = step(it, LeapAlign(steps=it.steps), it.size)
    training_row(it, sheet, f"LeapAlign, {it.size} px, batch 1", cost, it.size, "2.4 s")
    both = cost.peak + TEXT_ENCODERS
    sheet.add(f"peak memory, LeapAlign, {it.size} px, batch 1", cost.peak, "GB", "40 GB", with_text_encoders=both)


def methods(it: World, sheet: Sheet) -> None:
    """Measure other methods that differentiate the reward; ReFL and DRTune draw where to stop and need more updates."""
    few, some = it.steps // 2, max(1, it.steps // 2 - 1)
    for method, updates in (
        (ReFL(steps=it.steps, last_n=some), 5),
        (DRTune(steps=it.steps, m=some), 5),
        (DRaFTLV(steps=it.steps), 3),
    ):
        cost = step(it, method, it.size, updates=updates if few > 2 else 2)
        training_row(it, sheet, f"{type(method).__name__}, {it.size} px, batch 1", cost, it.size)


def other_sizes(it: World, sheet: Sheet) -> None:
    for size in it.sizes:
        if size != it.size:
            cost = step(it, LeapAlign(steps=it.steps), size)
            training_row(it, sheet, f"LeapAlign, {size} px, batch 1", cost, size)


def policy_gradient(it: World, sheet: Sheet) -> None:
    """Measure one group of four images: a rollout, and one update from four moves."""
    window = min(4, it.steps - 1)
    method = MixGRPO(steps=it.steps, group=4, updates_per_rollout=1, window=window)
    cost = step(it, method, it.size, n=4, updates=1)
    training_row(it, sheet, f"MixGRPO, {it.size} px, a group of 4, {window} moves", cost, it.size)


def largest_batch(it: World, sheet: Sheet) -> None:
    """Find LeapAlign's largest batch. Few sampling steps suffice, as steps without gradient keep nothing in memory."""
    fits, peak = 0, 0.0
    for n in (2, 4, 8, 16, 24, 32, 48) if it.device.type == "cuda" else (2, 4):
        try:
            cost = step(it, LeapAlign(steps=4), it.size, n, updates=1)
        except torch.OutOfMemoryError:
            sheet.add(f"LeapAlign, {it.size} px, batch {n}", None, "out of memory")
            break
        fits, peak = n, cost.peak
        print(f"[{sheet.seconds:4.0f} s] batch {n} fits: {peak:.1f} GB", flush=True)
        if sheet.seconds > 60 * sheet.minutes - 30:
            break
    free_memory(it.device)
    sheet.add(f"largest batch tried that fits, LeapAlign, {it.size} px", fits, "samples", peak_GB=peak)


def evaluation(it: World, sheet: Sheet, what: str = "", goal: str = "3.8 s") -> None:
    """Time images as for a report: 50 steps, decoded and scored."""
    steps = 50 if it.steps > 4 else 4
    protocol = Protocol(prompts="", images_per_prompt=1, steps=steps, size=it.size)

    def images(n: int) -> None:
        prompts = PROMPTS[:n]
        made = [image for _, _, image in generate(it.flow, prompts, protocol)]
        it.judge.score(made, prompts)

    free_memory(it.device)
    count = 2  # one pass of 720 px
    seconds = clock(lambda: images(count), it.device, repeats=1, warm=0) / count
    flops = steps * it.flops(it.size) + it.model.decoder.forward(it.size)
    shares = {"mfu": flops / seconds / PEAK, **sheet.used(flops, seconds, it.model.tokens(it.size, it.words).both)}
    what = f"evaluation image, {it.size} px, {steps} steps, decoded and scored{what}"
    sheet.add(what, seconds, "s", goal, **shares)


@contextlib.contextmanager
def compiled(transformer: Any) -> Iterator[None]:
    """Compile the blocks, one kind at a time, for exact shapes. On a CPU they are only traced, which is quick."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=32):
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        try:
            yield
        finally:
            for module in transformer.modules():
                module._compiled_call_impl = None
            torch._dynamo.reset()


def compiled_rollouts(it: World, sheet: Sheet) -> None:
    """Measure what ``backend.compile`` gains without gradient."""
    plain = forward(it, sheet, ", with adapters, again", it.size)
    with compiled(it.flow.transformer):
        x, cond = inputs(it, it.size, 1)
        with torch.no_grad():
            sheet.add("compiling, forward", clock(lambda: it.flow.velocity(x, 0.5, cond), it.device, 1, 0), "s")
        fast = forward(it, sheet, ", with adapters, compiled", it.size, goal="75 ms")
        apart = ((fast - plain).norm() / plain.norm()).item()
        sheet.add("compiled from uncompiled, of the velocity", apart, "relative")
        evaluation(it, sheet, ", compiling included")
        evaluation(it, sheet, ", compiled")


def compiled_training(it: World, sheet: Sheet) -> None:
    """Measure what ``backend.compile`` gains with gradient."""
    with compiled(it.flow.transformer):
        began = sheet.seconds
        cost = step(it, LeapAlign(steps=it.steps), it.size)
        training_row(it, sheet, f"LeapAlign, {it.size} px, batch 1, compiled", cost, it.size, "2.4 s")
        sheet.add("compiling, training: three updates with it", sheet.seconds - began, "s")


def masters(it: World, sheet: Sheet) -> None:
    """Measure adapters in bfloat16 with float32 masters: the same bits without casts. The adapters stay in bfloat16."""
    cost = step(it, LeapAlign(steps=it.steps), it.size, optimizer=Optimizer(weights="master"))
    training_row(it, sheet, f"LeapAlign, {it.size} px, batch 1, adapters in bfloat16", cost, it.size)
    forward(it, sheet, ", with adapters in bfloat16", it.size)
    with compiled(it.flow.transformer):
        forward(it, sheet, ", with adapters in bfloat16, compiled", it.size, goal="75 ms")


def all_weights(it: World, sheet: Sheet) -> None:
    """Measure a full fine-tune on one GPU: stochastically rounded bfloat16 weights, 8-bit moments, EMA on the host.

    This deletes the adapters and changes the network's weights.
    """
    transformer = it.flow.transformer
    transformer.delete_adapters("default")
    for parameter in transformer.parameters():
        parameter.requires_grad_(True)
        if parameter.ndim < 2:  # as the backend loads it; matrices would become bfloat16 again
            parameter.data = parameter.data.float()
    settings = structs.replace(it.settings, tune="full")
    it = it._replace(flow=FluxFlow(it.pipeline, settings, it.flow._text, it.device))
    optimizer = Optimizer(weights="stochastic", moments="8bit")
    cost = step(it, LeapAlign(steps=it.steps), it.size, optimizer=optimizer, ema_on_host=True)
    training_row(it, sheet, f"LeapAlign, {it.size} px, batch 1, all weights", cost, it.size)


def kernels(it: World, sheet: Sheet) -> None:
    """Write the kernels that take longest in a forward and a backward to gpu-<card>-kernels.txt."""
    from torch.profiler import ProfilerActivity, profile

    flow, (x, cond) = it.flow, inputs(it, it.size, 1)
    kinds = [ProfilerActivity.CUDA if it.device.type == "cuda" else ProfilerActivity.CPU]
    by = "self_cuda_time_total" if it.device.type == "cuda" else "self_cpu_time_total"
    tables = []
    for what in ("forward", "forward and backward"):
        with profile(activities=kinds) as profiled, torch.set_grad_enabled(what != "forward"):
            v = flow.velocity(x, 0.5, cond)
            if v.requires_grad:
                v.sum().backward()
            if it.device.type == "cuda":
                torch.cuda.synchronize()
        tables.append(f"{what}, {it.size} px, batch 1\n{profiled.key_averages().table(sort_by=by, row_limit=25)}")
    path = sheet.results / f"gpu-{sheet.about['name']}-kernels.txt"
    path.write_text("\n\n".join(tables))
    print(f"[{sheet.seconds:4.0f} s] {path}", flush=True)


@contextlib.contextmanager
def failure_as_row(sheet: Sheet, what: str) -> Iterator[None]:
    """Turn an exception into a row, so that the other phases still run: minutes on a GPU are expensive."""
    try:
        yield
    except Exception as error:  # kernels and compilers raise many types
        sheet.add(what, None, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Phase(NamedTuple):
    work: Callable[[World, Sheet], None]
    minutes: float  # at most, on an H100


BARE = (Phase(ceilings, 0.3), Phase(forwards, 0.4), Phase(attention, 0.2))
ADAPTED = (
    *(Phase(adapted, 0.1), Phase(leapalign, 0.5), Phase(kernels, 0.3), Phase(evaluation, 0.4)),
    *(Phase(compiled_rollouts, 1.0), Phase(methods, 1.2), Phase(other_sizes, 0.8), Phase(largest_batch, 1.0)),
    *(Phase(compiled_training, 1.5), Phase(policy_gradient, 0.5), Phase(masters, 1.0), Phase(all_weights, 1.5)),
)


def run(it: World, sheet: Sheet, phases: Sequence[Phase]) -> None:
    for work, minutes in phases:
        name = work.__name__.replace("_", " ")
        if sheet.seconds + 60 * minutes > 60 * sheet.minutes:
            sheet.add(name, None, f"skipped: it takes up to {minutes} minutes")
            continue
        with failure_as_row(sheet, name):
            work(it, sheet)
        free_memory(it.device)
        sheet.write()


def main(arguments: Sequence[str] | None = None) -> Sheet:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="skip phases that would end later")
    parser.add_argument("--small", action="store_true", help="small models, to try the benchmark itself")
    given = parse(parser, arguments)
    if not (torch.cuda.is_available() or given.small):
        raise SystemExit("benchmarks/gpu.py: torch finds no GPU; use --small to try the benchmark on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    about = {
        "name": "small" if given.small else "-".join(card.lower().removeprefix("nvidia").split()),
        "date": date.today().isoformat(),
        "card": card,
        "torch": torch.__version__,
        "model": "small" if given.small else "FLUX.1-dev's configuration, random weights, bfloat16; LoRA of rank 32",
    }
    sheet = Sheet(given.out, given.minutes, about)
    sheet.write()
    with tempfile.TemporaryDirectory() as temporary:
        it = world(given.small, device, Path(temporary) / "model")
        print(f"[{sheet.seconds:4.0f} s] the model is ready, on {card}", flush=True)
        run(it, sheet, BARE)
        run(with_adapters(it), sheet, ADAPTED)
    sheet.write()
    print(sheet.table())
    return sheet


if __name__ == "__main__":
    main()

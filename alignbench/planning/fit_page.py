"""The page that `alignbench fit` prints: the memory of training by part, and the settings that would make it fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from msgspec.structs import replace

from alignbench.backends.cost.formulas import GPU
from alignbench.config import UserError
from alignbench.experiment.spec import RunSpec, check_fsdp, check_ranks
from alignbench.planning.memory import MEMORY_ERROR, Memory, training_memory
from alignbench.planning.plan_page import GB, about, size
from alignbench.plugins import Registry
from alignbench.store.text_table import text_table

HEAD = (
    *("run", "fits", "frozen", "weights", "AdamW", "average", "base", "casts", "reward", "graphs", "work", "peak"),
    *("not checkpointed", "micro-batch", "largest"),
)
LEGEND = (
    "frozen: text encoders (unless embeddings are stored), autoencoder, and under LoRA the network; weights: trained",
    "weights with gradients; average: EMA; base: copy of the untrained model; casts: autocast's copies of trained",
    "weights, or the weights that FSDP gathers; graphs: activations that autograd keeps for one micro-batch; work: the",
    "backward of the decoder or of one block, beside the graphs; not checkpointed: the peak without gradient",
    "checkpointing; largest: largest micro-batch that fits",
)
Change = Callable[[RunSpec], RunSpec]


class Group(NamedTuple):
    """The number of GPUs that train a run, and how they share the model (``ddp`` or ``fsdp``)."""

    size: int = 1
    parallel: str = "ddp"

    def memory(self, spec: RunSpec, registry: Registry) -> Memory:
        """Return the memory of each of the GPUs."""
        return training_memory(spec, registry, *self)


SINGLE_GPU = Group()


LORA = "backend.tune=lora"


def page(
    name: str, specs: Sequence[RunSpec], registry: Registry, gpu: GPU, ranks: Group = SINGLE_GPU
) -> tuple[str, bool]:
    """Return the text, and whether every one of ``specs`` fits. Specs that differ only in their seed share a row."""
    room, rows, notes, fits = gpu.memory * GB, [], [], True
    for spec in specs:
        check_ranks(spec.training, ranks.size, spec.label)
        check_fsdp(spec.training, ranks.parallel, f"{spec.label}: training")
    for spec in {spec.label + repr(replace(spec.training, seed=0)): spec for spec in specs}.values():
        try:
            memory = ranks.memory(spec, registry)
        except UserError as error:
            notes.append(str(error))
            continue
        rows.append(_row(spec, memory, registry, room, ranks))
        if memory.peak > room:
            fits = False
            notes += _advice(spec, memory, registry, room, ranks)
    count, each = ("one", "") if ranks.size == 1 else (f"{ranks.size} x", f" of each, {ranks.parallel}")
    text = [
        f"{name}, training on {count} {gpu.name} of {gpu.memory:g} GB; in GB{each}:",
        text_table([HEAD, *rows], right=range(2, len(HEAD))),
        *LEGEND,
        f"Within 3 % of what was measured on one H200 with LoRA and checkpointing; otherwise allow {MEMORY_ERROR:.0%}",
        *([""] if notes else []),
        *notes,
    ]
    return "\n".join(text), fits


def check_room(spec: RunSpec, registry: Registry, ranks: Group, free: int, total: int) -> str:
    """Return a warning for a run whose model is not loaded yet, or "". ``free``, ``total``: bytes of its GPU.

    Raise UserError if training exceeds the whole GPU by more than the estimate's error. With FSDP, whose estimate was
    never compared with a measurement, this is only a warning.
    """
    try:
        memory = ranks.memory(spec, registry)
    except UserError:  # there is no estimate
        return ""
    if memory.peak <= free:
        return ""
    savings = [f"{text} saves {size(saved)}" for text, saved, _ in remedies(spec, memory, registry, ranks)]
    needed = f"training needs about {size(memory.peak)} of GPU memory"
    advice = ", ".join(savings) or "use a larger GPU"
    if memory.peak > total * (1 + MEMORY_ERROR) and ranks.parallel != "fsdp":
        raise UserError(f"{needed}, and this GPU has {size(total)}; {advice}")
    return f"{needed}, and {size(free)} of this GPU's {size(total)} are free; {advice}"


def remedies(
    spec: RunSpec, memory: Memory, registry: Registry, ranks: Group = SINGLE_GPU
) -> list[tuple[str, float, Change]]:
    """Return each setting that saves memory on its own: as it is typed, the bytes saved, and the change of the spec.

    The image size is never changed.
    """
    useful = []
    for text, change in _candidates(spec, registry, ranks):
        saved = memory.peak - ranks.memory(change(spec), registry).peak
        if saved >= GB / 10:
            useful.append((text, saved, change))
    return useful


def _advice(spec: RunSpec, memory: Memory, registry: Registry, room: float, ranks: Group) -> list[str]:
    """Return the settings that would make it fit, together with LoRA and, when all weights are trained, without."""
    useful = remedies(spec, memory, registry, ranks)
    needs = f"{spec.label} needs {size(memory.peak)}, {size(memory.peak - room)} too much"
    if not useful:
        return [f"{needs}; no setting saves any"]
    lines = [needs, *(f"  {text} saves {size(saved)}" for text, saved, _ in useful)]
    without_lora = [remedy for remedy in useful if remedy[0] != LORA]
    ways = {"with all of these": useful, f"with all but {LORA}": without_lora}
    for words, changes in ways.items():
        if changes and (changes is useful or len(changes) < len(useful)):
            left = ranks.memory(_changed(spec, changes), registry).peak
            lines.append(f"  {words} {size(left)}: {'fits' if left <= room else 'still too much'}")
    return lines


def _changed(spec: RunSpec, changes: Sequence[tuple[str, float, Change]]) -> RunSpec:
    for *_, change in changes:
        spec = change(spec)
    return spec


def _candidates(spec: RunSpec, registry: Registry, ranks: Group) -> Iterator[tuple[str, Change]]:
    """Yield the settings that may save memory, as they are typed, and what they change."""
    if spec.backend["tune"] != "lora":
        yield LORA, functools.partial(_with, tune="lora")
        yield from _full_training_candidates(spec, ranks)
    if not spec.backend["gradient_checkpointing"]:
        yield "backend.gradient_checkpointing=true", functools.partial(_with, gradient_checkpointing=True)
    if spec.backend.get("embeddings") == "computed":
        yield "backend.embeddings=stored", functools.partial(_with, embeddings="stored")
    method = registry.make("method", spec.method, "method")
    for count in range(1, spec.training.micro_batch or spec.training.batch // ranks.size):
        with suppress(UserError):
            method.check(count, True)  # GRPO's smallest is a group
            yield f"training.micro_batch={count}", functools.partial(_trained, micro_batch=count)
            return


def _full_training_candidates(spec: RunSpec, ranks: Group) -> Iterator[tuple[str, Change]]:
    """Yield the settings that matter only when all weights are trained; adapters have a hundredth of the weights."""
    training = spec.training
    if training.optimizer.ema is not None and not training.ema_on_host:
        yield "training.ema_on_host=true", functools.partial(_trained, ema_on_host=True)
    if training.drift_every is not None:
        yield "training.drift_every=null", functools.partial(_trained, drift_every=None)
    if ranks.parallel == "fsdp" and ranks.size > 1:
        return
    if spec.backend["dtype"] == "bfloat16" and training.optimizer.weights != "stochastic":
        yield "training.optimizer.weights=stochastic", functools.partial(_optimized, weights="stochastic")
    if training.optimizer.moments != "8bit":
        yield "training.optimizer.moments=8bit", functools.partial(_optimized, moments="8bit")


def _with(spec: RunSpec, **settings: Any) -> RunSpec:
    return replace(spec, backend=spec.backend | settings)


def _trained(spec: RunSpec, **settings: Any) -> RunSpec:
    return replace(spec, training=replace(spec.training, **settings))


def _optimized(spec: RunSpec, **settings: Any) -> RunSpec:
    return _trained(spec, optimizer=replace(spec.training.optimizer, **settings))


def _row(spec: RunSpec, memory: Memory, registry: Registry, room: float, ranks: Group) -> list[str]:
    parts = (*memory[:7], memory.graphs * memory.size, memory.work * memory.size, memory.peak)
    figures = [*parts, ranks.memory(_with(spec, gradient_checkpointing=False), registry).peak]
    largest = min(memory.largest_micro_batch(room), spec.training.batch // ranks.size)
    cells = [about(part / GB) if part else "-" for part in figures]
    return [spec.label, "yes" if memory.peak <= room else "NO", *cells, str(memory.size), str(largest)]

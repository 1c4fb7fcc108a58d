"""The page that `alignbench fit` prints: does training fit a GPU, part by part, and what would make it fit."""

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
    "frozen: text encoders (unless embeddings are stored), autoencoder, and under LoRA the network; weights: those",
    "trained, with gradients; base: a copy of the untrained model; casts: of trained weights, by autocast, or gathered",
    "by FSDP; graphs: what autograd keeps of the evaluations that one micro-batch differentiates; work: beside them,",
    "the decoder's backward or one block's; not checkpointed: the peak without gradient checkpointing; largest:",
    "micro-batch that fits",
)
Change = Callable[[RunSpec], RunSpec]


class Group(NamedTuple):
    """How many GPUs train a run, and how they share the model."""

    size: int = 1
    parallel: str = "ddp"

    def memory(self, spec: RunSpec, registry: Registry) -> Memory:
        """Of each of them."""
        return training_memory(spec, registry, *self)


ALONE = Group()


def page(name: str, specs: Sequence[RunSpec], registry: Registry, gpu: GPU, ranks: Group = ALONE) -> tuple[str, bool]:
    """The text, and whether every one of ``specs`` fits. Those that differ in their seed alone are told once."""
    room, rows, below, fits = gpu.memory * GB, [], [], True
    for spec in specs:
        check_ranks(spec.training, ranks.size, spec.label)
        check_fsdp(spec.training, ranks.parallel, f"{spec.label}: training")
    for spec in {spec.label + repr(replace(spec.training, seed=0)): spec for spec in specs}.values():
        try:
            memory = ranks.memory(spec, registry)
        except UserError as error:
            below.append(str(error))
            continue
        rows.append(_row(spec, memory, registry, room, ranks))
        if memory.peak > room:
            fits = False
            below += _told(spec, memory, registry, room, ranks)
    text = [
        f"{name}, training on {_counted(ranks)} {gpu.name} of {gpu.memory:g} GB; in GB{_each(ranks)}:",
        text_table([HEAD, *rows], right=range(2, len(HEAD))),
        *LEGEND,
        f"Within 3 % of what was measured on one H200 with LoRA and checkpointing; be prepared for {MEMORY_ERROR:.0%}",
        *([""] if below else []),
        *below,
    ]
    return "\n".join(text), fits


def check_room(spec: RunSpec, registry: Registry, ranks: Group, free: int, total: int) -> str:
    """What a run is to be warned of before its model is loaded; "" if nothing. Bytes of the GPU that it is on.

    UserError if training is too large for the whole GPU, by more than the estimate may be wrong; with FSDP, whose
    estimate was never held against a measurement, that is a warning too.
    """
    try:
        memory = ranks.memory(spec, registry)
    except UserError:  # nothing is known
        return ""
    if memory.peak <= free:
        return ""
    smaller = [f"{text} saves {size(saved)}" for text, saved, _ in remedies(spec, memory, registry, ranks)]
    needed, instead = (
        f"training needs about {size(memory.peak)} of GPU memory",
        ", ".join(smaller) or "use a larger one",
    )
    if memory.peak > total * (1 + MEMORY_ERROR) and ranks.parallel != "fsdp":
        raise UserError(f"{needed}, and this GPU has {size(total)}; {instead}")
    return f"{needed}, and {size(free)} of this GPU's {size(total)} are free; {instead}"


def remedies(
    spec: RunSpec, memory: Memory, registry: Registry, ranks: Group = ALONE
) -> list[tuple[str, float, Change]]:
    """Each setting that alone saves some of ``memory``, as it is typed, with the bytes; images stay as large."""
    found = []
    for text, change in _smaller(spec, registry, ranks):
        saved = memory.peak - ranks.memory(change(spec), registry).peak
        if saved >= GB / 10:
            found.append((text, saved, change))
    return found


def _told(spec: RunSpec, memory: Memory, registry: Registry, room: float, ranks: Group) -> list[str]:
    """What would make it fit; for all weights also what would without adapters."""
    found = remedies(spec, memory, registry, ranks)
    if not found:
        return [f"{spec.label} needs {size(memory.peak)}, {size(memory.peak - room)} too much; no setting saves any"]
    lines = [f"{spec.label} needs {size(memory.peak)}, {size(memory.peak - room)} too much"]
    lines += [f"  {text} saves {size(saved)}" for text, saved, _ in found]
    ways = {"with all of these": found, f"with all but {LORA}": [each for each in found if each[0] != LORA]}
    for words, changes in ways.items():
        if changes and (changes is found or len(changes) < len(found)):
            left = ranks.memory(_changed(spec, changes), registry).peak
            lines.append(f"  {words} {size(left)}: {'fits' if left <= room else 'still too much'}")
    return lines


def _changed(spec: RunSpec, changes: Sequence[tuple[str, float, Change]]) -> RunSpec:
    for *_, change in changes:
        spec = change(spec)
    return spec


LORA = "backend.tune=lora"


def _smaller(spec: RunSpec, registry: Registry, ranks: Group) -> Iterator[tuple[str, Change]]:
    if spec.backend["tune"] != "lora":
        yield LORA, functools.partial(_with, tune="lora")
        yield from _of_all_weights(spec, ranks)
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


def _of_all_weights(spec: RunSpec, ranks: Group) -> Iterator[tuple[str, Change]]:
    """Settings of training that matter where all weights are trained; adapters have a hundredth of them."""
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
    largest = min(memory.largest(room), spec.training.batch // ranks.size)
    shown = [about(part / GB) if part else "-" for part in figures]
    return [spec.label, "yes" if memory.peak <= room else "NO", *shown, str(memory.size), str(largest)]


def _counted(ranks: Group) -> str:
    return "one" if ranks.size == 1 else f"{ranks.size} x"


def _each(ranks: Group) -> str:
    return "" if ranks.size == 1 else f" of each, {ranks.parallel}"

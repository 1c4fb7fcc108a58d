"""The page that `alignbench fit` prints: does training fit a GPU, part by part, and what would make it fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from alignbench.config import UserError
from alignbench.cost import GPU
from alignbench.estimate import MEMORY_ERROR, Memory, training_memory
from alignbench.planning import GB, about, columns, size
from alignbench.plugins import Registry
from alignbench.spec import RunSpec

HEAD = (
    *("run", "fits", "frozen", "weights", "AdamW", "average", "base", "casts", "reward", "graphs", "work", "peak"),
    *("not checkpointed", "micro-batch", "largest"),
)
LEGEND = (
    "frozen: text encoders (unless embeddings are stored), autoencoder, and under LoRA the network;",
    "weights: those trained, with gradients, float32;",
    "base: a copy of the untrained model; casts: of trained weights, by autocast; graphs: what autograd keeps of the",
    "evaluations that one micro-batch differentiates; work: beside them, the decoder's backward or one block's;",
    "not checkpointed: the peak without gradient checkpointing; largest: micro-batch of this run that fits",
)
Change = Callable[[RunSpec], RunSpec]


def page(name: str, specs: Sequence[RunSpec], registry: Registry, gpu: GPU) -> tuple[str, bool]:
    """The text, and whether every one of ``specs`` fits. Those that differ in their seed alone are told once."""
    room, rows, below, fits = gpu.memory * GB, [], [], True
    for spec in {spec.label + repr(replace(spec.training, seed=0)): spec for spec in specs}.values():
        try:
            memory = training_memory(spec, registry)
        except UserError as error:
            below.append(str(error))
            continue
        rows.append(_row(spec, memory, registry, room))
        if memory.peak > room:
            fits = False
            below += _told(spec, memory, registry, room)
    text = [
        f"{name}, training on one {gpu.name} of {gpu.memory:g} GB; in GB:",
        *columns([HEAD, *rows]),
        *LEGEND,
        f"Within 3 % of what was measured on one H200 with LoRA and checkpointing; be prepared for {MEMORY_ERROR:.0%}",
        *([""] if below else []),
        *below,
    ]
    return "\n".join(text), fits


def check_room(spec: RunSpec, registry: Registry, ranks: int, free: int, total: int) -> str:
    """What a run is to be warned of before its model is loaded; "" if nothing. Bytes of the GPU that it is on.

    UserError if training is too large for the whole GPU, by more than the estimate may be wrong.
    """
    try:
        memory = training_memory(spec, registry, ranks)
    except UserError:  # nothing is known
        return ""
    if memory.peak <= free:
        return ""
    smaller = [f"{text} saves {size(saved)}" for text, saved, _ in remedies(spec, memory, registry, ranks)]
    needed, instead = (
        f"training needs about {size(memory.peak)} of GPU memory",
        ", ".join(smaller) or "use a larger one",
    )
    if memory.peak > total * (1 + MEMORY_ERROR):
        raise UserError(f"{needed}, and this GPU has {size(total)}; {instead}")
    return f"{needed}, and {size(free)} of this GPU's {size(total)} are free; {instead}"


def remedies(spec: RunSpec, memory: Memory, registry: Registry, ranks: int = 1) -> list[tuple[str, float, Change]]:
    """Each setting that alone saves some of ``memory``, as it is typed, with the bytes; images stay as large."""
    found = []
    for text, change in _smaller(spec, registry):
        saved = memory.peak - training_memory(change(spec), registry, ranks).peak
        if saved >= GB / 10:
            found.append((text, saved, change))
    return found


def _told(spec: RunSpec, memory: Memory, registry: Registry, room: float) -> list[str]:
    """What would make it fit."""
    found, every = remedies(spec, memory, registry), spec
    for *_, change in found:
        every = change(every)
    left = training_memory(every, registry).peak
    lines = [f"{spec.label} needs {size(memory.peak)}, {size(memory.peak - room)} too much"]
    lines += [f"  {text} saves {size(saved)}" for text, saved, _ in found]
    lines.append(f"  with all of these {size(left)}: {'fits' if left <= room else 'still too much'}")
    return lines if found else [f"{lines[0]}; no setting saves any"]


def _smaller(spec: RunSpec, registry: Registry) -> Iterator[tuple[str, Change]]:
    if spec.backend["tune"] != "lora":
        yield "backend.tune=lora", functools.partial(_with, tune="lora")
    if not spec.backend["gradient_checkpointing"]:
        yield "backend.gradient_checkpointing=true", functools.partial(_with, gradient_checkpointing=True)
    if spec.backend.get("embeddings") == "computed":
        yield "backend.embeddings=stored", functools.partial(_with, embeddings="stored")
    method = registry.make("method", spec.method, "method")
    for count in range(1, spec.training.micro_batch or spec.training.batch):
        with suppress(UserError):
            method.check(count, True)  # GRPO's smallest is a group
            yield f"training.micro_batch={count}", functools.partial(_in_parts, count=count)
            return


def _with(spec: RunSpec, **settings: Any) -> RunSpec:
    return replace(spec, backend=spec.backend | settings)


def _in_parts(spec: RunSpec, count: int) -> RunSpec:
    return replace(spec, training=replace(spec.training, micro_batch=count))


def _row(spec: RunSpec, memory: Memory, registry: Registry, room: float) -> list[str]:
    parts = (*memory[:7], memory.graphs * memory.size, memory.work * memory.size, memory.peak)
    figures = [*parts, training_memory(_with(spec, gradient_checkpointing=False), registry).peak]
    largest = min(memory.largest(room), spec.training.batch)
    shown = [about(part / GB) if part else "-" for part in figures]
    return [spec.label, "yes" if memory.peak <= room else "NO", *shown, str(memory.size), str(largest)]

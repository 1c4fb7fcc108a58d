"""The page that `alignbench plan` prints: each run with its state and cost, the totals, and the missing files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignbench.backends.cost.formulas import GPU, GPUS
from alignbench.config import Requirement, UserError, did_you_mean
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.plan import Draft, Plan
from alignbench.planning.estimate import CostEstimate, estimate, prompt_count
from alignbench.planning.memory import ITEM_BYTES, cost_model
from alignbench.store.artefacts import Store
from alignbench.store.manifest import ManifestRun
from alignbench.store.run_state import Jobs, run_state
from alignbench.store.stages import Stage
from alignbench.store.text_table import text_table

GB = 1e9
HEAD = ("run", "state", "images", "NFE/image", "train", "evaluate", "memory", "disk")


def gpu_named(name: str) -> GPU:
    """Return the GPU of that name. Raise UserError for an unknown one."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: there is no '{name}'{did_you_mean(name, GPUS, 'GPUs')}")
    return GPUS[name.lower()]


def page(
    draft: Draft,
    plan: Plan | None,
    cells: Sequence[PlannedRun],
    store: Store,
    gpu: GPU,
    gaps: list[Requirement],
    jobs: Callable[[], Jobs] = Jobs,
) -> str:
    """Return the page. ``plan``: None while there are ``gaps``; run states are then unknown.

    ``jobs``: as for ``run_state``.
    """
    estimates = [estimate(cell, draft.sweep.evaluation, draft.evaluators, gpu) for cell in cells]
    runs = {} if plan is None else plan.manifest().by_seed
    states, open_hours = [], 0.0
    for cell, cost in zip(cells, estimates):
        state, hours = _state(store, runs.get((cell.spec.label, cell.seed)), cost, jobs)
        states.append(state)
        open_hours += hours
    rows = [_row(cell, state, cost) for cell, state, cost in zip(cells, states, estimates)]
    lines = [
        f"{draft.document.name}, on one {gpu.name} per run; hours are GPU-hours, and all figures are approximate:",
        text_table([HEAD, *rows], right=range(2, len(HEAD))),
        "",
        _totals(estimates, open_hours, _embeddings(draft, cells, estimates)),
        _assumptions(gpu, draft),
        *_too_large(draft, cells, estimates, gpu),
        *_unequal(cells, estimates),
        *(f"{cell.title}: no estimate: {cost.unknown}" for cell, cost in zip(cells, estimates) if cost.unknown),
        *([""] if gaps else []),
        *describe_missing(gaps),
    ]
    return "\n".join(lines)


def _state(store: Store, run: ManifestRun | None, cost: CostEstimate, jobs: Callable[[], Jobs]) -> tuple[str, float]:
    """Return the state of a run, and the hours that are still to be spent on it."""
    if run is None:
        return "not ready", cost.train + cost.generate + cost.score
    status, sets = run_state(store, run, jobs), len(run.image_sets)
    counts = {Stage.TRAIN: 1, Stage.GENERATE: sets, Stage.SCORE: len(run.scores) * sets}
    return status.state, sum(getattr(cost, part.stage.verb) / counts[part.stage] for part in status.missing)


def _row(cell: PlannedRun, state: str, cost: CostEstimate) -> list[str]:
    if cost.unknown:
        return [cell.title, state, *["?"] * (len(HEAD) - 2)]
    nfe = "-" if cost.usage is None else f"{cost.usage.forward:.3g} + {cost.usage.grad:.3g}"
    return [
        cell.title,
        state,
        f"{cost.images:,}" if cost.usage else "-",
        nfe,
        f"{about(cost.train)} h" if cost.usage else "-",
        f"{about(cost.generate + cost.score)} h",
        size(cost.memory),
        size(cost.weights + cost.image_files),
    ]


def _embeddings(draft: Draft, cells: Sequence[PlannedRun], estimates: Sequence[CostEstimate]) -> float:
    """Return an upper bound on the bytes of stored prompt embeddings: as if no two seeds ever drew the same prompt."""
    size: dict[str, float] = {}  # of one embedding, by the encoder settings
    counts: dict[tuple[str, str], int] = {}  # of prompts, by encoder settings and prompt list
    for cell, cost in zip(cells, estimates):
        backend = cell.backend
        if getattr(backend, "embeddings", None) != "stored" or cost.unknown:
            continue
        encoder = f"{backend.name} {backend.model} {backend.revision} {backend.dtype} {backend.text_tokens}"
        size[encoder] = backend.text_tokens * cost_model(backend).transformer.text * ITEM_BYTES[backend.dtype]
        counts[encoder, "evaluation"] = prompt_count(cell.protocol.prompts, draft.sweep.evaluation.limit)
        if cost.images:
            counts[encoder, cell.spec.prompts] = counts.get((encoder, cell.spec.prompts), 0) + cost.images
    return sum(
        size[encoder] * (n if prompts == "evaluation" else prompt_count(prompts, n))
        for (encoder, prompts), n in counts.items()
    )


def _totals(estimates: Sequence[CostEstimate], open_hours: float, embeddings: float) -> str:
    hours = sum(cost.train + cost.generate + cost.score for cost in estimates)
    disk = sum(cost.weights + cost.image_files for cost in estimates)
    state = max((cost.state for cost in estimates), default=0)
    extra = f"; {size(state)} more for every run while it trains" if state else ""
    extra += f"; {size(embeddings)} of prompts' embeddings" if embeddings else ""
    return (
        f"all {len(estimates)} runs: {about(hours)} GPU-hours, {about(open_hours)} of them still to be spent; "
        f"{size(disk)} on disk{extra}"
    )


def _assumptions(gpu: GPU, draft: Draft) -> str:
    backend = draft.cells[0].spec.backend
    dtype = "float32" if backend.get("dtype") == "float32" else "bfloat16"
    why = f" ({gpu.why})" if dtype == "bfloat16" else ""
    return (
        f"assumed, not measured: {getattr(gpu, dtype):g} TFLOP/s in {dtype}{why}; the evaluators' seconds per image; "
        "2 bytes per pixel of an image. Not included: loading, waiting, failures. "
        "Allow for half as much again"
    )


def _too_large(draft: Draft, cells: Sequence[PlannedRun], estimates: Sequence[CostEstimate], gpu: GPU) -> list[str]:
    large = [cell.spec.label for cell, cost in zip(cells, estimates) if cost.memory > gpu.memory * GB]
    if not large:
        return []
    names = ", ".join(dict.fromkeys(large))
    what = f"does not fit into one {gpu.name}'s {gpu.memory:g} GB: {names}"
    return [f"{what}; to see what would: alignbench fit {draft.document.command} --gpu {gpu.name.lower()}"]


def _unequal(cells: Sequence[PlannedRun], estimates: Sequence[CostEstimate]) -> list[str]:
    """Return the rows that train on different numbers of images, with the reasons that the sweep gives."""
    images = {cell.spec.label: cost.images for cell, cost in zip(cells, estimates) if cost.usage}
    if len(set(images.values())) < 2:
        return []
    reasons = {cell.spec.label: [note["reason"] for note in cell.notes if _touches(note["set"])] for cell in cells}
    usual = max(images.values(), key=list(images.values()).count)
    lines = [f"training images differ between rows; {usual:,} in most, but"]
    for label, count in images.items():
        if count != usual:
            why = (
                " ".join(reasons[label])
                or "the budget counts something else, and this method spends it faster or slower"
            )
            lines.append(f"  {label}: {count:,}. {' '.join(why.split())}")
    return lines


def _touches(settings: dict[str, Any]) -> bool:
    return any(key == "training" or key.startswith(("training.batch", "training.budget")) for key in settings)


def describe_missing(gaps: Sequence[Requirement]) -> list[str]:
    """Return a line for each missing requirement, with the command that gets it."""
    if not gaps:
        return []
    lines = [f"missing, {len(gaps)} in all; get them with:"]
    for gap in gaps:
        lines += [f"  {gap.command}", *[f"    # {gap.note}"] * bool(gap.note)]
    return lines


# -- formatting --------------------------------------------------------------------------------------------------------


def about(value: float) -> str:
    """Return the value with two significant digits: no more is known."""
    if value < 0.01:
        return "0" if value == 0 else "<0.01"
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def size(count: float) -> str:
    """Return a number of bytes as gigabytes or megabytes."""
    return f"{about(count / GB)} GB" if count >= GB / 10 else f"{about(count / 1e6)} MB"

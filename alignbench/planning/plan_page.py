"""The page that `alignbench plan` prints: every run with its state and cost, the totals, and what is still missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignbench.backends.cost.formulas import GPU, GPUS
from alignbench.config import Requirement, UserError, did_you_mean
from alignbench.experiment.cells import PlannedRun
from alignbench.experiment.plan import Draft, Plan
from alignbench.planning.estimate import CostEstimate, estimate, prompt_count
from alignbench.planning.memory import ITEM, measures
from alignbench.store.artefacts import Store
from alignbench.store.manifest import ManifestRun
from alignbench.store.run_state import Jobs, run_state
from alignbench.store.stages import Stage
from alignbench.store.text_table import text_table

GB = 1e9
HEAD = ("run", "state", "images", "NFE/image", "train", "evaluate", "memory", "disk")


def gpu_named(name: str) -> GPU:
    """UserError for one whose speed nobody wrote down."""
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
    """Return the page. ``plan``: None as long as there are ``gaps``; then nothing is known of what the store has.

    ``jobs``: as for ``run_state``.
    """
    found = [estimate(cell, draft.sweep.evaluation, draft.evaluators, gpu) for cell in cells]
    runs = {} if plan is None else plan.manifest().by_seed
    states, open_hours = [], 0.0
    for cell, each in zip(cells, found):
        state, hours = _state(store, runs.get((cell.spec.label, cell.seed)), each, jobs)
        states.append(state)
        open_hours += hours
    rows = [_row(cell, state, each) for cell, state, each in zip(cells, states, found)]
    lines = [
        f"{draft.document.name}, on one {gpu.name} per run; hours are GPU-hours, and every figure is about:",
        text_table([HEAD, *rows], right=range(2, len(HEAD))),
        "",
        _totals(found, open_hours, _embeddings(draft, cells, found)),
        _assumptions(gpu, draft),
        *_does_not_fit(draft, cells, found, gpu),
        *_unequal(cells, found),
        *(f"{cell.title}: no estimate: {each.unknown}" for cell, each in zip(cells, found) if each.unknown),
        *([""] if gaps else []),
        *shopping(gaps),
    ]
    return "\n".join(lines)


def _state(store: Store, run: ManifestRun | None, each: CostEstimate, jobs: Callable[[], Jobs]) -> tuple[str, float]:
    """Return the state of a run, and the hours that are still to be spent on it."""
    if run is None:
        return "not ready", each.train + each.generate + each.score
    found, sets = run_state(store, run, jobs), len(run.image_sets)
    parts = {Stage.TRAIN: 1, Stage.GENERATE: sets, Stage.SCORE: len(run.scores) * sets}
    return found.state, sum(getattr(each, part.stage.verb) / parts[part.stage] for part in found.missing)


def _row(cell: PlannedRun, state: str, each: CostEstimate) -> list[str]:
    if each.unknown:
        return [cell.title, state, *["?"] * (len(HEAD) - 2)]
    nfe = "-" if each.usage is None else f"{each.usage.forward:.3g} + {each.usage.grad:.3g}"
    return [
        cell.title,
        state,
        f"{each.images:,}" if each.usage else "-",
        nfe,
        f"{about(each.train)} h" if each.usage else "-",
        f"{about(each.generate + each.score)} h",
        size(each.memory),
        size(each.weights + each.pictures),
    ]


def _embeddings(draft: Draft, cells: Sequence[PlannedRun], found: Sequence[CostEstimate]) -> float:
    """Bytes of the prompts' embeddings that are kept, at most: of all seeds together, no prompt is drawn twice."""
    size: dict[str, float] = {}  # of one, by what it is computed with
    counts: dict[tuple[str, str], int] = {}  # of prompts, by that and by their list
    for cell, each in zip(cells, found):
        backend = cell.backend
        if getattr(backend, "embeddings", None) != "stored" or each.unknown:
            continue
        by = f"{backend.name} {backend.model} {backend.revision} {backend.dtype} {backend.text_tokens}"
        size[by] = backend.text_tokens * measures(backend).transformer.text * ITEM[backend.dtype]
        counts[by, "evaluation"] = prompt_count(cell.protocol.prompts, draft.sweep.evaluation.limit)
        if each.images:
            counts[by, cell.spec.prompts] = counts.get((by, cell.spec.prompts), 0) + each.images
    return sum(size[by] * (n if of == "evaluation" else prompt_count(of, n)) for (by, of), n in counts.items())


def _totals(found: Sequence[CostEstimate], open_hours: float, embeddings: float) -> str:
    hours = sum(each.train + each.generate + each.score for each in found)
    disk = sum(each.weights + each.pictures for each in found)
    state = max((each.state for each in found), default=0)
    kept = f"; {size(state)} more for every run that is being trained" if state else ""
    kept += f"; {size(embeddings)} of prompts' embeddings" if embeddings else ""
    return (
        f"all {len(found)} runs: {about(hours)} GPU-hours, {about(open_hours)} of them still to be spent; "
        f"{size(disk)} on disk{kept}"
    )


def _assumptions(gpu: GPU, draft: Draft) -> str:
    backend = draft.cells[0].spec.backend
    dtype = "float32" if backend.get("dtype") == "float32" else "bfloat16"
    why = f" ({gpu.why})" if dtype == "bfloat16" else ""
    return (
        f"assumed, not measured: {getattr(gpu, dtype):g} TFLOP/s in {dtype}{why}; the evaluators' seconds per picture; "
        "2 bytes per pixel of a picture. Not in it: loading, waiting, failures. "
        "Be prepared for half as much again"
    )


def _does_not_fit(draft: Draft, cells: Sequence[PlannedRun], found: Sequence[CostEstimate], gpu: GPU) -> list[str]:
    large = [cell.spec.label for cell, each in zip(cells, found) if each.memory > gpu.memory * GB]
    if not large:
        return []
    names = ", ".join(dict.fromkeys(large))
    what = f"does not fit into one {gpu.name}'s {gpu.memory:g} GB: {names}"
    return [f"{what}; what would: alignbench fit {draft.document.command} --gpu {gpu.name.lower()}"]


def _unequal(cells: Sequence[PlannedRun], found: Sequence[CostEstimate]) -> list[str]:
    """Rows whose trainings look at different numbers of images; the reasons stand in the sweep."""
    images = {cell.spec.label: each.images for cell, each in zip(cells, found) if each.usage}
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


def shopping(gaps: Sequence[Requirement]) -> list[str]:
    """What is missing, and the command for each."""
    if not gaps:
        return []
    lines = [f"missing, {len(gaps)} in all; this gets them:"]
    for gap in gaps:
        lines += [f"  {gap.command}", *[f"    # {gap.note}"] * bool(gap.note)]
    return lines


# -- how it looks ------------------------------------------------------------------------------------------------------


def about(value: float) -> str:
    """Two significant digits: no more is known."""
    if value < 0.01:
        return "0" if value == 0 else "<0.01"
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def size(count: float) -> str:
    """Bytes, as gigabytes or megabytes."""
    return f"{about(count / GB)} GB" if count >= GB / 10 else f"{about(count / 1e6)} MB"

"""Sections of the report about how its numbers were made: budgets, overrides, settings, protocol, missing runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import Analysis
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.tables import DAGGER, DOUBLE_DAGGER, eight_bit, finished_runs, hybrid, title
from alignbench.reporting.text.table import escape, listed, number
from alignbench.store.manifest import UNTRAINED, Manifest, ManifestRun
from alignbench.store.score_gaps import Gap


def made_with(results: Results) -> list[str]:
    """Return the software and hardware of the finished runs, each distinct combination once."""
    distinct = dict[str, None]()
    for origin in results.origins.values():
        changed = f"with changes (code {origin['code']})" if origin.get("dirty") else ""
        code = " ".join(filter(None, ["alignbench", origin["alignbench"], origin["revision"], changed]))
        packages = [f"{name} {version}" for name, version in origin["packages"].items()]
        machine = [origin["machine"], *origin["devices"], f"{origin['processes']} x {origin['threads']} threads"]
        distinct[", ".join([code, f"Python {origin['python']}", *packages, *machine])] = None
    return list(distinct)


def moments_note(manifest: Manifest) -> str:
    """Return the footnote on rows trained with 8-bit optimizer moments; empty if there are none."""
    if not (labels := eight_bit(manifest)):
        return ""
    rows = escape(listed(labels))
    return f"{DOUBLE_DAGGER} AdamW with 8-bit moments, which is not the papers' optimizer: {rows}."


def hybrid_note(manifest: Manifest) -> str:
    """Return the footnote on rows whose last steps are the base model's; empty if there are none."""
    rows = "; ".join(f"{escape(label)}, {what}" for label, what in hybrid(manifest).items())
    return f"{DAGGER} Hybrid inference: the row takes these steps, the base model the rest: {rows}." if rows else ""


def budgets_note(analysis: Analysis, costs: pd.DataFrame) -> str:
    """Return whether the methods trained on equally many images, as measured."""
    done = finished_runs(costs, analysis.trained)
    if not analysis.trained:
        unknown = costs["state"].eq("done") & costs["images"].isna()
        return "The cost of training is unknown." if unknown.any() else ""
    if done.empty and costs["state"].eq("done").all():
        return "The cost of training is unknown."
    if done.empty:
        return "**No training run has finished.**"
    images = pd.to_numeric(done["images"])
    if images.nunique() == 1:
        return f"All methods are compared at equal images: {number(images.iloc[0], 0)} per training run."
    per = done.assign(images=images).groupby("label", sort=False)["images"].mean()
    listed = ", ".join(f"{escape(str(label))} {number(count, 0)}" for label, count in per.items())
    return f"**The numbers of training images differ**: {listed}."


def seeds_differ_note(analysis: Analysis) -> str:
    """Return which rows have other training seeds than others, and which share none; empty if all have the same."""
    rows: dict[tuple[int, ...], list[str]] = {}
    for label in analysis.trained:
        if analysis.seeds[label]:
            rows.setdefault(tuple(analysis.seeds[label]), []).append(escape(label))
    if len(rows) < 2:
        return ""
    seeds = "; ".join(f"{listed(labels)}: {', '.join(map(str, seeds))}" for seeds, labels in rows.items())
    apart = [(rows[a], rows[b]) for a, b in itertools.combinations(rows, 2) if not {*a} & {*b}]
    names = "; ".join(f"{listed(a)} and {listed(b)}" for a, b in apart)
    none = f" These share none, so nothing is known about their difference, not even that it is small: {names}."
    both = "Two trained rows are compared over the seeds that both have."
    return f"**The training seeds differ**: {seeds}. {both}{none * bool(apart)}"


def roles_note(analysis: Analysis) -> str:
    """Return what cannot be concluded from scores of which it is unknown whether a row was trained on them; or ""."""
    unknown = [escape(title(measure)) for measure in analysis.measures if measure.role == "unknown"]
    what = "it is not known whether a row was trained on this score, so a gain in it may be one of the training reward"
    return f"[unknown]: {what} ({listed(unknown)})." if unknown else ""


def imports_section(manifest: Manifest) -> list[str]:
    """Return the section on imported rows: their origin, and what is known and unknown about them."""
    lines = []
    for run in manifest.runs if manifest.imported else ():
        known = [f"{key} = {run.protocol[key]} ({where})" for key, where in run.known_from.items()]
        unknown = [key for key, value in run.protocol.items() if value == "unknown"]
        about = [run.imported, run.training, *known]
        about += [f"unknown: {', '.join(unknown)}"] if unknown else []
        about += [f"reportedly trained on {', '.join(run.trained_on)}"] if run.trained_on else []
        lines.append(f"- {escape(run.label)}: {escape('; '.join(about))}")
        lines += [f"  - {escape(remark)}" for remark in run.remarks]
    return ["## Imported rows", "\n".join(lines), IMPORTED_NOTE] if lines else []


IMPORTED_NOTE = """\
These images and scores were made elsewhere. A score with a name in brackets is that project's own, taken from its file:
neither its version nor its weights are verified."""


def overrides_section(manifest: Manifest) -> list[str]:
    """Return the section on overrides: every exception of the sweep, its reason, and the methods it applies to.

    What the sweep replaces in the one that it extends follows.
    """
    found: dict[str, dict[str, None]] = {}
    for run in manifest.runs:
        for note in run.notes:
            origin = f" ({note.origin})" if note.origin else ""
            text = f"{escape(_flat(note.set))}. {escape(note.reason + origin)}"
            found.setdefault(text, {})[run.label] = None
    every = len(manifest.rows)
    methods = {
        text: "all methods" if len(labels) == every else escape(listed([*labels])) for text, labels in found.items()
    }
    lines = [f"- {methods[text]}: {text}" for text in found]
    replaced = [f"- {escape(text)}" for text in manifest.replaced]
    both = ["\n".join(lines), *[REPLACED, "\n".join(replaced)] * bool(replaced)]
    return ["## Overrides, and why", *filter(None, both)] if lines or replaced else []


REPLACED = "This sweep extends another, of which it replaces:"


def _flat(settings: dict[str, Any], prefix: str = "") -> str:
    """Return ``{"a": {"b": 1}}`` as ``a.b = 1``; None is shown as ``none``, since it may be a departure."""
    nested = [
        _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} = {_said(value)}"
        for key, value in settings.items()
        if value not in ({}, [])
    ]
    return ", ".join(nested)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def settings_section(manifest: Manifest) -> list[str]:
    """Return the section on resolved settings: first those that all runs share, then each method's own."""
    shared = {part: _of_runs(manifest.runs, part) for part in ("backend", "reward", "prompts", "training")}
    lines = [f"- {part}, {escape(text)}" for part, texts in shared.items() if len(texts) == 1 for text in texts]
    for label, runs in manifest.rows.items():
        own = [
            *_of_runs(runs, "method"),
            *(text for part, texts in shared.items() if len(texts) > 1 for text in _of_runs(runs, part)),
        ]
        lines.append(f"- {escape(label)}: {escape('; '.join(own))}")
    return ["## Settings, as resolved", "\n".join(lines)] if shared["backend"] else []


def _of_runs(runs: Sequence[ManifestRun], part: str) -> list[str]:
    """Return the distinct settings of ``part`` over ``runs`` as texts, ignoring the training seed."""
    distinct = dict[str, None]()
    for run in runs:
        value = run.settings.get(part, {})
        if part == "training":
            value = {key: setting for key, setting in value.items() if key != "seed"}
        distinct[_flat(value) if isinstance(value, dict) else f"{value}"] = None
    return [text for text in distinct if text]


def warnings_section(manifest: Manifest, costs: pd.DataFrame) -> list[str]:
    """Return the section on rows, and on the records of training runs, that look unintended."""
    warned = [run for run in costs.to_dict("records") if isinstance(run.get("warning"), str) and run["warning"]]
    lines = [f"- **{escape(run['label'])}, seed {run['seed']}**: {escape(run['warning'])}" for run in warned]
    lines = [*(f"- {escape(remark)}" for remark in manifest.remarks), *lines]
    return ["## Warnings", "\n".join(lines)] if lines else []


SILENT = {"running": "still in progress", "queued": "waiting to start", "requeued": "waiting to resume"}


def missing_section(analysis: Analysis, costs: pd.DataFrame) -> list[str]:
    """Return the section on unfinished runs: their state and the reason."""
    lines = []
    for run in costs[costs["state"] != "done"].to_dict("records"):
        seed = "" if run["seed"] == UNTRAINED else f", seed {run['seed']}"
        reason = run.get("reason")
        why = reason if isinstance(reason, str) and reason else SILENT.get(run["state"], "no reason was recorded")
        lines.append(f"- {escape(run['label'])}{seed}: **{escape(run['state'])}**: {escape(why)}")
    return ["## Unfinished runs", "\n".join(lines)] if lines else []


def coverage_section(manifest: Manifest, analysis: Analysis, gaps: Sequence[Gap] = ()) -> list[str]:
    """Return the section on missing or invalid scores, why, and on the prompts left out because of them."""
    planned = manifest.prompts * manifest.protocol["images_per_prompt"]
    rows = {label: [run.image_count or planned for run in runs] for label, runs in manifest.rows.items()}
    lines = []
    for measure in analysis.measures:
        for label in analysis.labels:
            valid, expected = analysis.scored(measure, label), sum(rows.get(label, []))
            change = analysis.changes[measure].get(label)
            dropped = [analysis.means[measure][label].dropped, change.estimate.dropped if change else 0]
            if valid != expected or any(dropped):
                text = f"- {escape(title(measure))}, {escape(label)}: {valid} of {expected} scores; "
                lines.append(f"{text}prompts left out: {dropped[0]} of the mean, {dropped[1]} of the paired change")
    lines += [f"- {escape(str(gap))}" for gap in gaps]
    counts = sorted({count for row in rows.values() for count in row})
    per_run = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{(counts or [planned])[0]}"
    complete = f"Complete: every image of every run has every score ({per_run} images per run)."
    rule = "A prompt is left out if a seed, or one side of a pair, lacks a valid score of it; so is a seed without any."
    return ["## Coverage", "\n".join(lines) if lines else complete, rule if lines else ""]


def protocol_section(manifest: Manifest, analysis: Analysis, origins: Sequence[str]) -> list[str]:
    """Return the section on the protocol: seeds, evaluation settings, evaluators, software and hardware."""
    facts: dict[str, Any] = {"training seeds": _seeds(manifest, analysis)}
    facts |= {"evaluation, number of prompts": manifest.prompts}
    protocol = {key: value for key, value in manifest.protocol.items() if value is not None}
    facts |= {f"evaluation, {key.replace('_', ' ')}": value for key, value in protocol.items()}
    facts |= {"training reward": manifest.training_evaluator}
    versions = dict.fromkeys(f"{m.evaluator} {m.version}" for m in analysis.measures)  # several measures may share one
    facts |= {"evaluators": ", ".join(versions)}
    facts |= {"intervals": f"95 %, {stats.DRAWS:,} bootstrap draws, seed 0"}
    lines = [f"- {escape(key)}: {escape(value)}" for key, value in facts.items()]
    lines += _departures(manifest)
    lines += [f"- made with {escape(origin)}" for origin in origins]
    differ = "**The runs used different software or hardware: their times may not be comparable.**"
    return ["## Protocol", "\n".join(lines), differ if len(origins) > 1 else ""]


def _seeds(manifest: Manifest, analysis: Analysis) -> str:
    """Return the planned training seeds, ``0, 1``; by row, ``0, 1 (ReFL, DRTune); 0 (LeapAlign)``, if they differ."""
    planned: dict[str, list[str]] = {}
    for label in analysis.trained:
        planned.setdefault(", ".join(map(str, analysis.seeds[label])), []).append(label)
    if unknown := list(dict.fromkeys(run.label for run in manifest.runs if run.published)):
        planned["unknown"] = unknown
    by_row = [f"{seeds} ({', '.join(labels)})" for seeds, labels in planned.items()]
    return "; ".join(by_row if len(planned) > 1 else planned) or "none"


def _departures(manifest: Manifest) -> list[str]:
    """Return a line for each row evaluated under another protocol; the reasons are listed with the overrides."""
    lines = dict[str, None]()
    for run in manifest.runs:
        own = {key: value for key, value in run.protocol.items() if value != manifest.protocol.get(key)}
        if own:
            lines[f"- **but {escape(run.label)}**: {escape(_flat(own).replace('_', ' '))}"] = None
    return list(lines)

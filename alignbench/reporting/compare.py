"""Page, tables and image sheet of a comparison of two rows or runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignbench.reporting.analysis.pairs import Difference, Result, Side, disagreements, protocols
from alignbench.reporting.improvement_section import p_text
from alignbench.reporting.plots import image_grid
from alignbench.reporting.text.names import change_decimals, decimals, title
from alignbench.reporting.text.table import Cell, Column, Table, escape, interval, listed, number
from alignbench.store import artefacts, files
from alignbench.store.manifest import UNTRAINED

ONE_RUN = "every interval and verdict speaks of the weights that were scored; another training run may reverse them."


def _seeds(a: Side, b: Side, results: Sequence[Result]) -> list[str]:
    """Return what the intervals leave out, and why nothing can be paired, before the first number."""
    lines = []
    weights = [escape(title(result.measure)) for result in results if result.change.weights]
    if weights:
        alone = " and ".join(name for name, side in zip("AB", (a, b)) if _one_run(side))
        on = f", on {listed(weights)}" if len(weights) < len(results) else ""
        lines.append(f"**{alone or 'A and B'}: one training run{on}: {ONE_RUN}**")
    if a.whole and b.whole:
        seeds = [{run.seed for run in side.runs} for side in (a, b)]
        if UNTRAINED not in seeds[0] | seeds[1] and not seeds[0] & seeds[1]:
            lines.append("**The two share no training seed, so nothing can be paired: name two runs by their ids.**")
    return lines


def _one_run(side: Side) -> bool:
    return len(side.runs) == 1 and not side.runs[0].is_base


def table(results: Sequence[Result]) -> Table:
    """Return the table of the page, one row per metric."""
    names = ["metric", "A", "B", "A - B", "p", "p, Holm", "verdict", "A higher", "prompts", "left out", "seeds"]
    rows = []
    for result in results:
        digits = decimals(result.measure)
        estimate = result.change.estimate
        measure = result.measure
        texts = [Column(title(measure), measure.unit, measure.higher_is_better, measure.role).header]
        texts += [interval(*mean[:3], digits) for mean in result.means]
        texts += [interval(*estimate[:3], change_decimals(measure), signed=True)]
        texts += [p_text(estimate.p), p_text(result.change.p_holm), result.change.said, number(result.higher, 2)]
        rows.append([Cell(text) for text in [*texts, *map(str, (estimate.prompts, estimate.dropped, estimate.seeds))]])
    return Table([Column(name) for name in names], rows)


def tidy(results: Sequence[Result]) -> Table:
    """Return all numbers in full precision, one row per metric."""
    rows = [[Cell(value) for value in result.difference] for result in results]
    return Table([Column(name) for name in Difference._fields], rows)


NOTE = """\
A - B: mean difference, prompt by prompt, with its 95 % interval. p tests "no difference"; Holm: corrected for the
metrics shown; up, down: p < 0.05 after that correction. Cannot tell: not shown to differ, which does not mean equal.
A higher: the share of prompts on which A's mean is higher (a tie counts half)."""


def page(root: artefacts.Store, a: Side, b: Side, results: Sequence[Result], remarks: Sequence[str]) -> str:
    """Return the page as markdown that also reads well in a terminal."""
    lists = [protocols(a, b), remarks]
    parts = [
        f"# {escape(a.label)} and {escape(b.label)}",
        f"A: {escape(a.title)}  \nB: {escape(b.title)}",
        *_seeds(a, b, results),
        *("\n".join(f"- {escape(line)}" for line in lines) for lines in lists if lines),
        "## Paired differences",
        table(results).markdown().rstrip("\n"),
        NOTE,
        "## Prompts that differ most",
        *(text for result in results for text in _disagreeing(root, a, b, result)),
    ]
    return "\n\n".join(parts) + "\n"


def _disagreeing(root: artefacts.Store, a: Side, b: Side, result: Result) -> Iterator[str]:
    digits = decimals(result.measure)
    lines = []
    for case in disagreements(root, a, b, result):
        gap = number(case.a - case.b, digits, signed=True)
        lines.append(f"- {gap} ({number(case.a, digits)}, {number(case.b, digits)}): {escape(case.prompt)}")
        lines += [f"  - {name}: {path or 'no image'}" for name, path in zip("AB", case.images)]
    yield f"### {escape(title(result.measure))}"
    nothing = "No prompt differs." if len(result.pairs) else "No prompt has a score of both."
    yield "\n".join(lines) if lines else nothing


def sheet(root: artefacts.Store, a: Side, b: Side, results: Sequence[Result]) -> Any:
    """Return A's and B's images of the prompts that differ most, metric below metric; None without any image."""
    parts = []
    for result in results:
        cases = disagreements(root, a, b, result)
        if any(image for case in cases for image in case.images):
            gaps = [number(case.a - case.b, decimals(result.measure), signed=True) for case in cases]
            rows = [
                (f"{name}: {side.label}", [case.images[i] for case in cases])
                for i, (name, side) in enumerate(zip("AB", (a, b)))
            ]
            captions = [(f"{gap} {result.measure.name}", case.prompt) for gap, case in zip(gaps, cases)]
            parts.append(image_grid.draw(rows, captions))
    return image_grid.stack(parts) if parts else None


def build(root: artefacts.Store, a: Side, b: Side, results: Sequence[Result], text: str, out: Path) -> list[Path]:
    """Write compare.md, compare.csv and, if there are images, compare.png into ``out``; return the paths."""
    paths = [out / "compare.md", out / "compare.csv"]
    files.write(paths[0], text)
    files.write(paths[1], tidy(results).csv())
    if images := sheet(root, a, b, results):
        paths.append(out / "compare.png")
        files.write(paths[-1], lambda temporary: images.save(temporary, "PNG"))
    return paths

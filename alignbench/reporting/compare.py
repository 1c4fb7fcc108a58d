"""The page and tables of a comparison of two rows or runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignbench.reporting import image_grid
from alignbench.reporting.analysis.pairs import Result, Side, disagreements, protocols
from alignbench.reporting.table import DECIMALS, Cell, Column, Table, escape, interval, number
from alignbench.reporting.tables import title
from alignbench.store import artefacts, files
from alignbench.store.manifest import UNTRAINED


def _seeds(a: Side, b: Side) -> list[str]:
    """What the intervals do not hold."""
    lines = []
    if a.whole and b.whole:
        seeds = [{run.seed for run in side.runs} for side in (a, b)]
        if UNTRAINED not in seeds[0] | seeds[1] and not seeds[0] & seeds[1]:
            lines.append("no training seed is in both, so that nothing can be paired: name two runs by their ids")
    most = max(map(len, a.manifest.rows.values()))
    pooled = a.sweep == b.sweep and a.whole and b.whole and most > 1  # then the other rows' spread is in them
    alone = [name for name, side in zip("AB", (a, b)) if _one_training(side, pooled)]
    if alone:
        whose = " and ".join(alone)
        lines.append(f"of {whose} there is one training: how much trainings differ is unknown, and in no interval")
    return lines


def _one_training(side: Side, pooled: bool) -> bool:
    run = side.runs[0]
    return len(side.runs) == 1 and (run.published or (run.trained and not pooled))


def table(results: Sequence[Result]) -> Table:
    """A row per metric, to be read."""
    names = ["metric", "A", "B", "A - B", "p", "p, Holm", "verdict", "A higher", "prompts", "left out", "seeds"]
    rows = []
    for result in results:
        decimals = DECIMALS.get(result.measure.unit, 3)
        found = result.change.estimate
        measure = result.measure
        texts = [Column(title(measure), measure.unit, measure.higher_is_better, measure.role).header]
        texts += [interval(*mean[:3], decimals) for mean in result.means]
        texts += [interval(*found[:3], decimals + 1, signed=True), _p(found.p), _p(result.change.p_holm)]
        texts += [result.change.verdict, number(result.higher, 2)]
        rows.append([Cell(text) for text in [*texts, *map(str, (found.prompts, found.dropped, found.seeds))]])
    return Table([Column(name) for name in names], rows)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else number(value)


def tidy(results: Sequence[Result]) -> Table:
    """A row per metric, in full precision."""
    names = ["metric", "evaluator", "role", "unit", "a", "a_lo", "a_hi", "b", "b_lo", "b_hi", "difference", "lo", "hi"]
    names += ["se", "df", "p", "prompts", "seeds", "dropped", "p_holm", "verdict", "a_higher"]
    rows = []
    for measure, (a, b), change, higher, _ in results:
        about: list[Any] = [measure.name, measure.evaluator, measure.role, measure.unit, *a[:3], *b[:3]]
        found = change.estimate
        about += [*found[:3], found.se, found.df, found.p, found.prompts, found.seeds, found.dropped]
        rows.append([Cell(value) for value in [*about, change.p_holm, change.verdict, higher]])
    return Table([Column(name) for name in names], rows)


NOTE = """\
A - B: prompt by prompt, mean with its 95 % interval. p: of "no difference"; Holm: corrected for the metrics shown.
up, down: p < 0.05 after that. A higher: the share of prompts in which A's mean is higher (ties are half)."""


def page(root: artefacts.Store, a: Side, b: Side, results: Sequence[Result], remarks: Sequence[str]) -> str:
    """All of it as markdown, to be read in a terminal as well."""
    lists = [protocols(a, b), [*_seeds(a, b), *remarks]]
    parts = [
        f"# {escape(a.label)} and {escape(b.label)}",
        f"A: {escape(a.title)}  \nB: {escape(b.title)}",
        *("\n".join(f"- {escape(line)}" for line in lines) for lines in lists if lines),
        "## Paired differences",
        table(results).markdown().rstrip("\n"),
        NOTE,
        "## The prompts that differ most",
        *(text for result in results for text in _disagreeing(root, a, b, result)),
    ]
    return "\n\n".join(parts) + "\n"


def _disagreeing(root: artefacts.Store, a: Side, b: Side, result: Result) -> Iterator[str]:
    decimals = DECIMALS.get(result.measure.unit, 3)
    lines = []
    for found in disagreements(root, a, b, result):
        gap = number(found.a - found.b, decimals, signed=True)
        lines.append(f"- {gap} ({number(found.a, decimals)}, {number(found.b, decimals)}): {escape(found.prompt)}")
        lines += [f"  - {name}: {path or 'no picture'}" for name, path in zip("AB", found.pictures)]
    yield f"### {escape(title(result.measure))}"
    yield "\n".join(lines) if lines else "Nowhere."


def sheet(root: artefacts.Store, a: Side, b: Side, results: Sequence[Result]) -> Any:
    """Below one another for every metric: A's and B's pictures of the prompts that differ most. None without any."""
    parts = []
    for result in results:
        found = disagreements(root, a, b, result)
        if any(picture for each in found for picture in each.pictures):
            gaps = [number(each.a - each.b, DECIMALS.get(result.measure.unit, 3), signed=True) for each in found]
            rows = [
                (f"{name}: {side.label}", [each.pictures[i] for each in found])
                for i, (name, side) in enumerate(zip("AB", (a, b)))
            ]
            parts.append(
                image_grid.draw(rows, [(f"{gap} {result.measure.name}", each.prompt) for gap, each in zip(gaps, found)])
            )
    return image_grid.stack(parts) if parts else None


def build(root: artefacts.Store, a: Side, b: Side, results: Sequence[Result], text: str, out: Path) -> list[Path]:
    """Write compare.md, compare.csv and compare.png (if there is any picture) into ``out``; the paths."""
    paths = [out / "compare.md", out / "compare.csv"]
    files.write(paths[0], text)
    files.write(paths[1], tidy(results).csv())
    if picture := sheet(root, a, b, results):
        paths.append(out / "compare.png")
        files.write(paths[-1], lambda temporary: picture.save(temporary, "PNG"))
    return paths

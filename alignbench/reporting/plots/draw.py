"""Figures of a report, for a column of a paper and for the page: SVG and PNG by matplotlib, reproducible to the byte.

Every method keeps one colour, marker and line style in all figures, chosen by its row in the sweep and distinguishable
in grey print. Text in SVG is drawn as paths, because fonts differ between machines; the caption summarizes the figure
and serves as its alternative text. Panels are light, so that they are readable on a dark page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from alignbench.reporting.analysis import learning_curves
from alignbench.reporting.analysis.results import Results
from alignbench.reporting.analysis.swept import swept
from alignbench.reporting.headline import rows_in_order
from alignbench.reporting.plots.scores import draw_forest, draw_profiles, draw_swept, draw_tradeoff
from alignbench.reporting.plots.style import Figure
from alignbench.reporting.plots.training import draw_costs, draw_hacking, draw_scatter, draw_signs, draw_training

if TYPE_CHECKING:
    from alignbench.reporting.analysis.comparison import Analysis


def figures(results: Results, analysis: Analysis) -> list[Figure]:
    """Return every figure for which the store has numbers, the most informative first."""
    records = learning_curves.training(results)
    curves = learning_curves.learning_curves(results, analysis, records)
    manifest = results.manifest
    stamp = "REHEARSAL" if manifest.rehearsal else "SUBSET" if manifest.subset else ""  # required on every figure
    makers: list[Callable[[], Figure | None]] = [
        lambda: draw_forest(analysis, rows_in_order(analysis, manifest), stamp),
        lambda: draw_tradeoff(analysis, results.costs, stamp),
        *(partial(draw_swept, axis, analysis, stamp) for axis in swept(manifest)),
        lambda: draw_training(records, analysis, stamp),
        *(partial(draw_costs, curves, measure, analysis, stamp) for measure in learning_curves.directed(analysis)),
        lambda: draw_hacking(curves, analysis, stamp),
        lambda: draw_signs(curves, analysis, records, stamp),
        lambda: draw_scatter(curves, analysis, stamp),
        lambda: draw_profiles(analysis, stamp),
    ]
    return [figure for make in makers if (figure := make()) is not None]

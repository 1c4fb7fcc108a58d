"""Figures of a report, for a paper's column and for a page: matplotlib, SVG and PNG, the same numbers the same bytes.

Every method has one colour, marker and line style in all figures, by its row in the sweep; grey print tells them apart.
Text in the SVG is drawn as paths, because fonts differ between machines; what a figure says is in its caption, which
serves as alternative text. Panels are light, so that they can be read on a dark page, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from alignbench.reporting.analysis import learning_curves
from alignbench.reporting.analysis.results import Results

if TYPE_CHECKING:
    from alignbench.reporting.analysis.comparison import Analysis
from alignbench.reporting.plots.scores import draw_forest, draw_overview, draw_profiles
from alignbench.reporting.plots.style import Figure
from alignbench.reporting.plots.training import draw_costs, draw_hacking, draw_scatter, draw_signs, draw_training


def figures(results: Results, analysis: Analysis) -> list[Figure]:
    """All that the store has the numbers for, in the order in which they are worth looking at."""
    records = learning_curves.training(results)
    found = learning_curves.learning_curves(results, analysis, records)
    about = results.manifest
    stamp = "REHEARSAL" if about.rehearsal else "SUBSET" if about.subset else ""  # no figure may leave it out
    makers: list[Callable[[], Figure | None]] = [
        lambda: draw_overview(analysis, stamp),
        lambda: draw_forest(analysis, stamp),
        lambda: draw_training(records, analysis, stamp),
        *(partial(draw_costs, found, measure, analysis, stamp) for measure in learning_curves.directed(analysis)),
        lambda: draw_hacking(found, analysis, stamp),
        lambda: draw_signs(found, analysis, records, stamp),
        lambda: draw_scatter(found, analysis, stamp),
        lambda: draw_profiles(analysis, stamp),
    ]
    return [figure for make in makers if (figure := make()) is not None]

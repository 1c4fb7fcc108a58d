"""Style shared by all figures: colours, markers, panels, legends and file formats."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alignbench.reporting.text.names import measure_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from alignbench.reporting.analysis.comparison import Analysis, Measure

# Okabe and Ito's eight colours without yellow, which is invisible on a light ground; black first, for the base
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 1, 1, 1, 1, 1)))
PANEL = 22  # characters over a panel of half that width
WIDTH = 3.3  # inches: a column of a two-column paper
DPI = 200
GROUND, INK, GRID = "#FFFFFF", "#222222", "#DDDDDD"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 6.5,
    "axes.titlesize": 7,
    "axes.labelsize": 6.5,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "axes.titlepad": 3,
    "axes.labelpad": 2,
    "xtick.major.pad": 1.5,
    "ytick.major.pad": 1.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "alignbench",
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "savefig.facecolor": GROUND,
}


class Figure(NamedTuple):
    """A finished figure. ``name``: stem of its files; ``caption``: a description that can replace it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def colour(label: str, labels: Sequence[str]) -> str:
    """Return a method's #RRGGBB, by its position among the rows of the sweep."""
    return COLOURS[labels.index(label) % len(COLOURS)]


def marker(label: str, labels: Sequence[str]) -> str:
    """Return a method's marker, by its position among the rows of the sweep."""
    return MARKERS[labels.index(label) % len(MARKERS)]


def line(label: str, labels: Sequence[str]) -> Any:
    """Return a method's line style; with more than 35 methods, two may look alike."""
    return LINES[labels.index(label) % len(LINES)]


@contextmanager
def new_canvas(height: float, stamp: str) -> Iterator[Canvas]:
    """Yield a figure of column width, ``height`` inches high. ``stamp``: a word across it."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's settings, which would change the bytes
        matplotlib.rcParams.update(STYLE)
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        canvas.text(0.5, 0.5, stamp, size=26, rotation=25, alpha=0.25, ha="center", va="center", zorder=10)
        yield canvas


def finish(canvas: Canvas, name: str, title: str, caption: str) -> Figure:
    """Render the canvas as SVG and PNG without dates, so that equal figures are equal files."""
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def make_panels(canvas: Canvas, count: int, across: str = "", columns: int = 2, **shared: Any) -> list[Axes]:
    """Return ``count`` panels, row by row. ``across``: x label of the last panel of each column."""
    rows = -(-count // columns)
    axes = np.atleast_1d(canvas.subplots(rows, columns, squeeze=False, **shared)).ravel()
    for empty in axes[count:]:
        empty.set_visible(False)
    for last in axes[max(0, count - columns) : count]:
        last.tick_params(labelbottom=True)
        last.set_xlabel(across)
    return list(axes[:count])


def method_style(label: str, analysis: Analysis, **more: Any) -> dict[str, Any]:
    """Return matplotlib's keywords for a method's line."""
    labels = analysis.labels
    about = {"color": colour(label, labels), "marker": marker(label, labels), "linestyle": line(label, labels)}
    return about | {"label": label, "markeredgecolor": GROUND, "markeredgewidth": 0.3} | more


def draw_legend(
    canvas: Canvas, labels: Sequence[str], analysis: Analysis, names: Sequence[str] = (), **more: Any
) -> None:
    """Draw one legend for the whole figure, below it. ``names``: what to call the labels, if otherwise."""
    from matplotlib.lines import Line2D

    looks = [method_style(label, analysis, **more) for label in labels]
    handles = [Line2D([], [], **look | {"label": name}) for look, name in zip(looks, names or labels)]
    columns = _columns([str(handle.get_label()) for handle in handles])
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6)


def legend_height(labels: Sequence[str]) -> float:
    """Return the height in inches of ``draw_legend``'s legend."""
    return 0.13 * -(-len(labels) // _columns(labels)) + 0.05


def _columns(labels: Sequence[str]) -> int:
    """Return the largest number of columns in which the labels fit, filled one column after the other."""
    for columns in range(len(labels), 1, -1):
        parts = np.array_split([len(label) + 7 for label in labels], columns)
        if sum(max(part) for part in parts) <= 56:
            return columns
    return 1


def label_rows(panels: Sequence[Axes], text: str) -> None:
    """Write the y label at the first panel of each row: one for the whole figure would slip towards its legend."""
    for axes in panels:
        spec = axes.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axes.set_ylabel(text)


def short(value: float, _: int = 0) -> str:
    """Return 12k for 12,000, as the text of a tick."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def shorten_ticks(axis: Any, count: int = 4) -> None:
    """Draw few ticks, and write 12k for 12,000."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count))
    axis.set_major_formatter(FuncFormatter(short))


def set_scale(axes: Axes, values: Sequence[float], ratio: float = 5.0) -> None:
    """Make the x axis logarithmic if positive ``values`` span more than ``ratio``, with few and short tick labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) <= ratio * min(values):
        shorten_ticks(axes.xaxis)
        return
    axes.set_xscale("log")
    steps = (1.0, 2.0, 5.0) if max(values) < 200 * min(values) else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.xaxis.set_minor_formatter(NullFormatter())


def mark_values(axes: Axes, values: Sequence[float]) -> None:
    """Put ticks at these increasing ``values`` and name those that have room; a log axis if they are spaced so."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    gaps, ratios = np.diff(values), np.diff(np.log(values)) if values[0] > 0 else np.zeros(1)
    logarithmic = len(values) > 2 and ratios.min() > 0 and np.ptp(ratios) / ratios.max() < np.ptp(gaps) / gaps.max()
    if logarithmic:
        axes.set_xscale("log")
    places = np.log(values) if logarithmic else np.asarray(values)
    shown: list[int] = []
    for i, place in enumerate(places):
        if not shown or place - places[shown[-1]] > 0.18 * (places[-1] - places[0]):
            shown.append(i)
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FixedFormatter([short(v) if i in shown else "" for i, v in enumerate(values)]))
    axes.xaxis.set_minor_locator(NullLocator())


def primary_first(analysis: Analysis) -> list[Measure]:
    """Return all measures, the primary one first."""
    return sorted(analysis.measures, key=lambda measure: measure != analysis.primary)


def measure_title(measure: Measure, width: int = 1000) -> str:
    """Return the measure's name with its arrow and role; these on a second line if all is longer than ``width``."""
    arrow = {True: "\u2191 ", False: "\u2193 ", None: ""}[measure.higher_is_better]
    name, about = measure_name(measure), f"{arrow}[{measure.role}]"
    return f"{name} {about}" if len(name) + 1 + len(about) <= width else f"{name}\n{about}"


def finite(value: float) -> float:
    """Return the value, or -inf if it is nan, as a key for ``max``."""
    return value if np.isfinite(value) else -np.inf

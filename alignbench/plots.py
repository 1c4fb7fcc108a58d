"""Figures of a report, for a paper's column and for a page: matplotlib, SVG and PNG, the same numbers the same bytes.

Every method has one colour, marker and line style in all figures, by its row in the sweep; grey print tells them apart.
Text in the SVG is drawn as paths, because fonts differ between machines; what a figure says is in its caption, which
serves as alternative text. Panels are light, so that they can be read on a dark page, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from alignbench import curves
from alignbench.curves import AXES, Course, Parting
from alignbench.results import Results
from alignbench.stats import curve_draws
from alignbench.table import DECIMALS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from alignbench.analysis import Analysis, Measure

# Okabe and Ito's eight, without their yellow, which nobody sees on a light ground; black comes first, as the base does
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 1, 1, 1, 1, 1)))
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
    """``name``: of its files; ``caption``: what it shows, in words that can stand for it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def colour(label: str, labels: Sequence[str]) -> str:
    """#RRGGBB of a method, by its place among the rows of the sweep."""
    return COLOURS[labels.index(label) % len(COLOURS)]


def marker(label: str, labels: Sequence[str]) -> str:
    return MARKERS[labels.index(label) % len(MARKERS)]


def line(label: str, labels: Sequence[str]) -> Any:
    """A line style; with more than 35 methods, two of them may look alike."""
    return LINES[labels.index(label) % len(LINES)]


def figures(results: Results, analysis: Analysis) -> list[Figure]:
    """All that the store has the numbers for, in the order in which they are worth looking at."""
    records = curves.training(results)
    found = curves.courses(results, analysis, records)
    about = results.manifest
    stamp = "REHEARSAL" if about.rehearsal else "SUBSET" if about.subset else ""  # no figure may leave it out
    makers: list[Callable[[], Figure | None]] = [
        lambda: _overview(analysis, stamp),
        lambda: _forest(analysis, stamp),
        lambda: _training(records, analysis, stamp),
        *(partial(_costs, found, measure, analysis, stamp) for measure in curves.directed(analysis)),
        lambda: _hacking(found, analysis, stamp),
        lambda: _signs(found, analysis, records, stamp),
        lambda: _scatter(found, analysis, stamp),
        lambda: _profiles(analysis, stamp),
    ]
    return [figure for make in makers if (figure := make()) is not None]


# -- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _canvas(height: float, stamp: str) -> Iterator[Canvas]:
    """A figure of column width, ``height`` inches. ``stamp``: a word across it."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own settings would change the bytes
        matplotlib.rcParams.update(STYLE)
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        canvas.text(0.5, 0.5, stamp, size=26, rotation=25, alpha=0.25, ha="center", va="center", zorder=10)
        yield canvas


def _finished(canvas: Canvas, name: str, title: str, caption: str) -> Figure:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def _panels(canvas: Canvas, count: int, across: str = "", columns: int = 2, **shared: Any) -> list[Axes]:
    """``count`` panels, row by row; the places left over stay empty. ``across``: label below every column's last."""
    rows = -(-count // columns)
    axes = np.atleast_1d(canvas.subplots(rows, columns, squeeze=False, **shared)).ravel()
    for empty in axes[count:]:
        empty.set_visible(False)
    for last in axes[max(0, count - columns) : count]:
        last.tick_params(labelbottom=True)
        last.set_xlabel(across)
    return list(axes[:count])


def _look(label: str, analysis: Analysis, **more: Any) -> dict[str, Any]:
    """Of a method's line."""
    labels = analysis.labels
    about = {"color": colour(label, labels), "marker": marker(label, labels), "linestyle": line(label, labels)}
    return about | {"label": label, "markeredgecolor": GROUND, "markeredgewidth": 0.3} | more


def _legend(canvas: Canvas, labels: Sequence[str], analysis: Analysis, extra: Sequence[Any] = (), **more: Any) -> None:
    """One for the whole figure, below it."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(label, analysis, **more)) for label in labels] + list(extra)
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(len(handles), int(52 / (longest + 7))))
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6)


def _legend_height(labels: Sequence[str]) -> float:
    """Inches that ``_legend`` will take."""
    columns = max(1, int(52 / (max(map(len, labels), default=1) + 7)))
    return 0.13 * -(-len(labels) // columns) + 0.05


def _short_ticks(axis: Any, count: int = 4) -> None:
    """Few, and 12k for 12,000."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def said(value: float, _: int) -> str:
        for unit, size in (("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:g}{unit}"
        return f"{value:g}"

    axis.set_major_locator(MaxNLocator(count))
    axis.set_major_formatter(FuncFormatter(said))


def _titled(measure: Measure) -> str:
    arrow = {True: " \u2191", False: " \u2193", None: ""}[measure.higher_is_better]
    return f"{measure.name}{arrow} [{measure.role}]"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# -- at the end -------------------------------------------------------------------------------------------------------


def _overview(analysis: Analysis, stamp: str) -> Figure | None:
    """In place of the papers' radar charts (LeapAlign's figure 1b), whose areas depend on the order of their axes."""
    rows = []
    for measure in curves.directed(analysis):
        sign = 1.0 if measure.higher_is_better else -1.0
        changes = {label: change.estimate for label, change in analysis.changes[measure].items()}
        best = max((sign * each.mean for each in changes.values() if np.isfinite(each.mean)), default=0.0)
        if best > 0:
            scaled = {label: sign * np.array(each[:3]) / best for label, each in changes.items()}
            rows.append((measure, scaled))
    if not rows:
        return None
    labels = [label for label in analysis.compared if any(np.isfinite(scaled[label][0]) for _, scaled in rows)]
    height = 0.5 + len(rows) * (0.12 + 0.075 * len(labels)) + _legend_height(labels)
    with _canvas(height, stamp) as canvas:
        axes = canvas.subplots()
        for row, (_, scaled) in enumerate(rows):
            for i, label in enumerate(labels):
                mean, *limits = scaled[label]
                if np.isfinite(mean):
                    y = row + 0.7 * (i / max(len(labels) - 1, 1) - 0.5)
                    look = _look(label, analysis, linestyle="none", markersize=4.5)
                    _whisker(axes, mean, min(limits), max(limits), y, colour(label, analysis.labels))
                    axes.plot([mean], [y], **look)
        for at, style in ((0, "-"), (1, (0, (2, 2)))):
            axes.axvline(at, color=INK, linewidth=0.6, linestyle=style, zorder=0)
        axes.set_yticks(range(len(rows)), [_titled(measure) for measure, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.6)
        axes.set_xlabel(f"0: {analysis.base}, 1: best mean")
        _legend(canvas, labels, analysis, linestyle="none")
        best_of = [
            f"{measure.name}: {max(labels, key=lambda label: _finite(scaled[label][0]))}" for measure, scaled in rows
        ]
        caption = (
            f"Every score at the end of training, scaled so that {analysis.base} is 0 and the best mean is 1; bars are "
            f"95 % intervals of the paired change. Best means: {'; '.join(best_of)}."
        )
        return _finished(canvas, "overview", "All scores at the end", caption)


def _finite(value: float) -> float:
    return value if np.isfinite(value) else -np.inf


def _whisker(axes: Axes, mean: float, lo: float, hi: float, y: float, shade: str) -> None:
    """A 95 % interval, if it is known."""
    if np.isfinite(lo) and np.isfinite(hi):
        axes.plot([lo, hi], [y, y], color=shade, linewidth=0.9, solid_capstyle="butt", zorder=1.5)


def _forest(analysis: Analysis, stamp: str) -> Figure | None:
    """Paired changes against base, a panel per measure."""
    measures = [m for m in analysis.measures if any(np.isfinite(c.estimate.mean) for c in analysis.changes[m].values())]
    if not measures or analysis.base is None:
        return None
    labels = analysis.compared
    rows = -(-len(measures) // 2)
    with _canvas(rows * (0.38 + 0.125 * len(labels)) + 0.1, stamp) as canvas:
        for axes, measure in zip(_panels(canvas, len(measures), sharey=True), measures):
            for y, label in enumerate(labels):
                change = analysis.changes[measure][label]
                if np.isfinite(change.estimate.mean):
                    shade = colour(label, analysis.labels)
                    _whisker(axes, *change.estimate[:3], y, shade)
                    sure = change.verdict in ("up", "down")
                    face = {} if sure else {"markerfacecolor": GROUND, "markeredgecolor": shade, "markeredgewidth": 0.8}
                    axes.plot(
                        [change.estimate.mean], [y], **_look(label, analysis, linestyle="none", markersize=4.5, **face)
                    )
            axes.axvline(0, color=INK, linewidth=0.6, zorder=0)
            axes.set_title(_titled(measure))
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            _short_ticks(axes.xaxis)
        verdicts = [
            f"{measure.name}: {_and(told)}"
            for measure in measures
            if (
                told := [
                    f"{label} {c.verdict}"
                    for label, c in analysis.changes[measure].items()
                    if c.verdict in ("up", "down")
                ]
            )
        ]
        said = f" Told apart: {'; '.join(verdicts)}." if verdicts else " None of the changes can be told from zero."
        caption = (
            f"Paired change of every score against {analysis.base} (line at 0), with 95 % intervals over prompts and "
            f"training seeds. Filled: p < 0.05 after Holm's correction; open: cannot tell.{said}"
        )
        return _finished(canvas, "forest", f"Paired change against {analysis.base}", caption)


def _profiles(analysis: Analysis, stamp: str) -> Figure | None:
    scores = curves.normalised(analysis)
    if not scores:
        return None
    every = np.concatenate([each for found in scores.values() for each in found.values()])
    taus = np.linspace(min(0.0, float(every.min())) - 0.05, max(1.0, float(every.max())) + 0.05, 241)
    labels = [label for label in analysis.trained if any(len(found[label]) for found in scores.values())]
    with _canvas(1.75 + _legend_height(labels), stamp) as canvas:
        axes = canvas.subplots()
        halves = []
        for label in labels:
            share, lo, hi = curves.profile([found[label] for found in scores.values() if len(found[label])], taus)
            shade = colour(label, analysis.labels)
            if np.isfinite(lo).all():
                axes.fill_between(taus, lo, hi, color=shade, alpha=0.12, linewidth=0, step=None)
            axes.plot(taus, share, **_look(label, analysis, markevery=40))
            halves.append(f"{label} {share[int(np.abs(taus - 0.5).argmin())]:.0%}")
        axes.set_xlabel(f"normalised score \u03c4 (0: {analysis.base}, 1: best mean)")
        axes.set_ylabel("share of runs above \u03c4")
        axes.set_ylim(-0.03, 1.03)
        _legend(canvas, labels, analysis)
        names = _and([measure.name for measure in scores])
        caption = (
            f"Performance profiles at the end of training: the share of runs (measure x training seed; of {names})"
            " whose normalised score exceeds a threshold, with pointwise 95 % bands. "
            f"Above one half: {', '.join(halves)}."
        )
        return _finished(canvas, "profiles", "Performance profiles", caption)


# -- over training ----------------------------------------------------------------------------------------------------


def _training(records: pd.DataFrame, analysis: Analysis, stamp: str) -> Figure | None:
    """The training reward of every method against four costs: means over seeds, smoothed over a tenth of training."""
    known = set(records["label"].unique())
    labels = [label for label in analysis.trained if label in known]
    if not labels or "reward_mean" not in records:
        return None
    with _canvas(2.75 + _legend_height(labels), stamp) as canvas:
        for axes, (axis, name) in zip(_panels(canvas, len(AXES), sharey=True), AXES.items()):
            for label in labels:
                costs, rewards = _smoothed(records[records["label"] == label], axis)
                axes.plot(costs, rewards, **_look(label, analysis, markevery=max(1, len(costs) // 5)))
            axes.set_xlabel(name)
            axes.set_xlim(left=0)
            _short_ticks(axes.xaxis)
            _short_ticks(axes.yaxis)
        canvas.supylabel("training reward", fontsize=6.5)
        _legend(canvas, labels, analysis)
        ends = [f"{label} {_last(records[records['label'] == label]):.4g}" for label in labels]
        caption = (
            "Training reward, on the pictures that each method made while it trained, against updates, images, network "
            "evaluations (NFE) and GPU-seconds; means over seeds and a tenth of training. "
            f"Last tenth: {', '.join(ends)}."
        )
        return _finished(canvas, "training", "Training reward against cost", caption)


def _smoothed(mine: pd.DataFrame, axis: str) -> tuple[Any, Any]:
    """Mean cost and mean reward over seeds, by update; rewards as a centred mean over a tenth of the updates."""
    means = mine.groupby("update", sort=True).agg(cost=(axis, "mean"), reward=("reward_mean", "mean"))
    window = max(1, len(means) // 10)
    return means["cost"].to_numpy(), means["reward"].rolling(window, center=True, min_periods=1).mean().to_numpy()


def _last(mine: pd.DataFrame) -> float:
    return float(mine.loc[mine["update"] > 0.9 * mine["update"].max(), "reward_mean"].mean())


def _costs(found: Sequence[Course], measure: Measure, analysis: Analysis, stamp: str) -> Figure | None:
    """One score against four costs, from the base model on."""
    if not found:
        return None
    labels = [course.label for course in found]
    means = {course.label: _interval(course, measure) for course in found}
    with _canvas(2.75 + _legend_height(labels), stamp) as canvas:
        for axes, (axis, name) in zip(_panels(canvas, len(AXES), sharey=True), AXES.items()):
            for course in found:
                mean, lo, hi = means[course.label]
                shade = colour(course.label, analysis.labels)
                axes.fill_between(course.cost(axis), lo, hi, color=shade, alpha=0.12, linewidth=0)
                axes.plot(course.cost(axis), mean, **_look(course.label, analysis))
            axes.axhline(mean[0], color=INK, linewidth=0.5, zorder=0)
            axes.set_xlabel(name)
            axes.set_xlim(left=0)
            _short_ticks(axes.xaxis)
            _short_ticks(axes.yaxis)
        canvas.supylabel(_titled(measure), fontsize=6.5)
        _legend(canvas, labels, analysis)
        digits = DECIMALS.get(measure.unit, 3)
        ends = [f"{label} {each[0][-1]:.{digits}f}" for label, each in means.items()]
        caption = (
            f"{measure.name} [{measure.role}] at every milestone, against updates, images, network evaluations (NFE) "
            f"and GPU-seconds, with 95 % intervals of the paired change against {analysis.base}, whose "
            f"{mean[0]:.{digits}f} is the line. At the end: {', '.join(ends)}."
        )
        safe = re.sub(r"[^\w.-]", "_", measure.name)
        return _finished(canvas, f"cost-{safe}", f"{measure.name} against cost", caption)


def _interval(course: Course, measure: Measure) -> tuple[Any, Any, Any]:
    """(K,) means, and the limits of base's mean + the paired change."""
    sign = -1.0 if measure.higher_is_better is False else 1.0
    gains, draws = course.gains(measure)
    start = _base(course, measure)
    lo, hi = np.quantile(sign * draws, [0.025, 0.975], axis=0) if np.isfinite(gains).all() else (np.nan * gains,) * 2
    return start + sign * gains, start + lo, start + hi


def _base(course: Course, measure: Measure) -> float:
    return float(curve_draws(course.values[measure], course.strata(measure), draws=2)[0][0])


def _hacking(found: Sequence[Course], analysis: Analysis, stamp: str) -> Figure | None:
    """A panel per method: every score's gain, scaled by the best of any method, and where it parts from the reward."""
    parted = curves.partings(found) if found else {}
    if not parted:
        return None
    measures = curves.directed(analysis)
    scale = {m: max(float(np.nanmax(np.abs(c.gains(m)[0]))) for c in found) or 1.0 for m in measures}
    styles = dict(zip([m for m in measures if m.role != "train"], cycle(zip(LINES[1:], MARKERS))))
    from matplotlib.lines import Line2D

    with _canvas(-(-len(found) // 2) * 1.15 + 0.25 + 0.12 * -(-(len(measures) + 1) // 2), stamp) as canvas:
        for axes, course in zip(_panels(canvas, len(found), "updates", sharex=True, sharey=True), found):
            shade = colour(course.label, analysis.labels)
            for measure in measures:
                gains = course.gains(measure)[0] / scale[measure]
                style, mark = styles.get(measure, ("-", ""))
                width = 1.8 if measure.role == "train" else 0.9
                axes.plot(
                    course.updates, gains, color=shade, linestyle=style, marker=mark, linewidth=width, markersize=2.5
                )
                _mark_parting(axes, course, parted[course.label].get(measure), gains)
            axes.axhline(0, color=INK, linewidth=0.5, zorder=0)
            axes.set_title(course.label, color=INK)
            _short_ticks(axes.xaxis)
        canvas.supylabel(f"scaled gain over {analysis.base}", fontsize=6.5)
        handles = [
            Line2D([], [], color=INK, linestyle=styles.get(m, ("-", ""))[0], marker=styles.get(m, ("-", ""))[1],
                   linewidth=1.8 if m.role == "train" else 0.9, markersize=2.5, label=f"{m.name} [{m.role}]")
            for m in measures
        ]  # fmt: skip
        handles.append(Line2D([], [], **RING, label="parts from the reward"))
        canvas.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, handlelength=3)
        told = [
            f"{label}: {measure.name} from update {each.update:g}"
            for label, mine in parted.items()
            for measure, each in mine.items()
            if each.update is not None
        ]
        said = f"They part: {'; '.join(told)}." if told else "No score parts from the reward."
        caption = (
            f"Gain of every score over {analysis.base} at each milestone, one panel per method, as a share of the "
            "largest of any method. Thick: the training reward; circles: the first step at which a score is "
            f"significantly below its own earlier maximum while the reward still rises. {said}"
        )
        return _finished(canvas, "hacking", "Where reward and quality part", caption)


RING: Any = {"marker": "o", "markersize": 6, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}


def _mark_parting(axes: Axes, course: Course, parted: Parting | None, gains: Any) -> None:
    if parted is not None and parted.update is not None:
        k = int(np.flatnonzero(course.updates == parted.update)[0])
        axes.plot([parted.update], [gains[k]], **RING)


def _signs(found: Sequence[Course], analysis: Analysis, records: pd.DataFrame, stamp: str) -> Figure | None:
    """What is neither good nor bad in itself, over updates: distance from the base model, picture statistics, drift."""
    neutral = [measure for measure in analysis.measures if measure.higher_is_better is None]
    if not found:
        return None
    labels = [course.label for course in found]
    panels: list[tuple[str, Callable[[Course], tuple[Any, Any, Any]]]] = [
        (measure.name, partial(_interval, measure=measure)) for measure in neutral
    ]
    panels.append(("drift of the network", lambda course: (curves.drifts(course, records),) * 3))
    with _canvas(-(-len(panels) // 2) * 1.2 + 0.2 + _legend_height(labels), stamp) as canvas:
        for axes, (title, values) in zip(_panels(canvas, len(panels), "updates"), panels):
            for course in found:
                mean, lo, hi = values(course)
                axes.fill_between(
                    course.updates, lo, hi, color=colour(course.label, analysis.labels), alpha=0.12, linewidth=0
                )
                axes.plot(course.updates, mean, **_look(course.label, analysis))
            axes.set_title(title)
            axes.set_xlim(left=0)
            _short_ticks(axes.xaxis)
            _short_ticks(axes.yaxis)
        _legend(canvas, labels, analysis)
        names = _and([title for title, _ in panels])
        ends = {course.label: float(curves.drifts(course, records)[-1]) for course in found}
        moved = f" Furthest at the end: {max(ends, key=lambda label: _finite(ends[label]))}." if ends else ""
        caption = f"Signs of change over training that are neither good nor bad in themselves: {names}.{moved}"
        return _finished(canvas, "signs", "Signs of change", caption)


def _scatter(found: Sequence[Course], analysis: Analysis, stamp: str) -> Figure | None:
    """Other scores against the training reward: a method's path from the base model to its end."""
    rewards = [measure for measure in curves.directed(analysis) if measure.role == "train"]
    others = [measure for measure in curves.directed(analysis) if measure.role != "train"]
    if not found or not rewards or not others:
        return None
    reward, labels = rewards[0], [course.label for course in found]
    with _canvas(-(-len(others) // 2) * 1.3 + 0.2 + _legend_height(labels), stamp) as canvas:
        for axes, measure in zip(_panels(canvas, len(others), _titled(reward), sharex=True), others):
            for course in found:
                across, up = (_interval(course, each)[0] for each in (reward, measure))
                axes.plot(across, up, **_look(course.label, analysis, marker="", linewidth=0.8))
                axes.plot(across[1:-1], up[1:-1], **_look(course.label, analysis, linestyle="none", markersize=1.8))
                axes.plot(across[-1:], up[-1:], **_look(course.label, analysis, linestyle="none", markersize=5))
            axes.plot(across[:1], up[:1], marker="*", markersize=6, color=INK, linestyle="none", zorder=3)
            axes.set_title(_titled(measure))
            _short_ticks(axes.xaxis)
            _short_ticks(axes.yaxis)
        _legend(canvas, labels, analysis)
        caption = (
            f"Other scores against the training reward {reward.name}, on the same evaluation pictures: from "
            f"{analysis.base} (star) over the milestones (small) to the end (large). A path that turns down while it "
            "goes right trades quality for reward."
        )
        return _finished(canvas, "scatter", "Other scores against the training reward", caption)

"""Simulated studies whose truth is known, and the score of every interval and decision of their analysis.

    python -m tests.support.simulated_studies --design plain --studies 400
    python -m tests.support.simulated_studies --all

A design says how large a study is and what varies in it; `DESIGNS` names those of the table in docs/statistics.md. A
study is arrays of scores, analysed as a report's are (`completed`). Its model, in standard deviations of the prompts:

    base:    prompt + noise + own + image
    method:  prompt + noise + own + image + effect + shared[seed] + spread[seed] + interaction[prompt, seed]

*prompt* and *noise* (of the prompt's image) are common to all rows, *own* is a row's taste in prompts, *image* is its
residue. The seeds' effects are normal; all others have the tails of the law. Binary, Likert and lognormal scores are
functions of this sum, divided by its standard deviation, so that rows of equal effect have scores of equal law and the
expected score is known in closed form, over training runs and for the runs that were drawn.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from alignbench.reporting.analysis.comparison import UNTRAINED, Analysis, Comparison, Measure, Scores, completed

NOISE, OWN, INTERACTION, IMAGE = 0.5, 0.4, 0.3, 0.5  # standard deviations; the prompts' is 1
CUTS = (-1.2, -0.4, 0.4, 1.2)  # between the grades 1 to 5
SKEW = 0.8  # standard deviation of a lognormal score's logarithm
TASKS = (2, 10, 12, 14, 16, 16)
MISSING = {
    "": "nothing",
    "random": "5 % of all scores",
    "method": "20 hard prompts in one run of the last method",
    "runs": "all training runs of the last method but one",
    "lowest": "the lowest 5 % of each row's scores",
}
DECIDED = ("up", "down")
TINY = 1e-12  # rounding errors of a true difference


class Design(NamedTuple):
    """Size of a study, and what varies in it. The first ``affected`` methods have the ``effect``; others equal base."""

    prompts: int = 70
    images: int = 1
    seeds: int = 3
    methods: int = 6
    laws: tuple[str, ...] = ("gaussian",)  # one measure each: gaussian, t3, binary, likert, lognormal
    rate: float = 0.7  # of ones in binary scores of base
    tasks: tuple[int, ...] = ()  # numbers of prompts, if measures are means of task means; replaces ``prompts``
    spread: float = 0.15  # between the training runs of a method
    shared: float = 0.0  # between training seeds, common to all methods
    unstable: float = 1.0  # the last method's spread, in spreads
    missing: str = ""  # what is lacking, of MISSING
    affected: int = 0
    effect: float = 0.0

    @property
    def labels(self) -> list[str]:
        """Names of the methods."""
        return [f"method {i + 1}" for i in range(self.methods)]

    @property
    def odd(self) -> str | None:
        """The method that is unstable, if one is."""
        return self.labels[-1] if self.unstable > 1 else None

    @property
    def runs(self) -> list[int]:
        """Number of training runs of each method."""
        return [self.seeds] * (self.methods - 1) + [1 if self.missing == "runs" else self.seeds]


class Truth(NamedTuple):
    """Expected scores of one measure: label -> (T,), by task (a single one without tasks)."""

    methods: dict[str, np.ndarray]  # over all training runs
    weights: dict[str, np.ndarray]  # of the training runs that were drawn


class Study(NamedTuple):
    """An analysed study and its truth."""

    analysis: Analysis
    truths: dict[Measure, Truth]


class Rate(NamedTuple):
    """A share of all cells of all studies, and its standard error with studies as clusters."""

    share: float
    se: float
    cells: int


HALF = {"affected": 3, "effect": 0.5}
DESIGNS = {
    "plain": Design(),
    "plain, effects": Design(**HALF),
    "5 seeds, effects": Design(seeds=5, **HALF),
    "2 seeds": Design(seeds=2),
    "2 seeds, effects": Design(seeds=2, **HALF),
    "2 seeds, no seed effects": Design(seeds=2, spread=0),
    "no seed effects, effects": Design(spread=0, **HALF),
    "5 seeds, no seed effects": Design(seeds=5, spread=0),
    "1 method, 2 seeds": Design(methods=1, seeds=2),
    "1 method, 3 seeds": Design(methods=1),
    "2 methods, 2 seeds": Design(methods=2, seeds=2),
    "2 methods, 2 seeds, effects": Design(methods=2, seeds=2, affected=1, effect=1.0),
    "2 methods, 3 seeds": Design(methods=2),
    "2 methods, 5 seeds, 400 prompts": Design(methods=2, seeds=5, prompts=400),
    "18 methods, 2 seeds": Design(methods=18, seeds=2),
    "18 methods, effects": Design(methods=18, affected=9, effect=0.5),
    "20 prompts": Design(prompts=20),
    "20 prompts, 2 seeds, 4 images": Design(prompts=20, seeds=2, images=4),
    "20 prompts, 18 methods": Design(prompts=20, methods=18),
    "400 prompts, 2 seeds": Design(prompts=400, seeds=2),
    "400 prompts, 4 images, effects": Design(prompts=400, images=4, affected=3, effect=0.3),
    # laws
    "t3, 20 prompts": Design(laws=("t3",), prompts=20),
    "t3, 2 seeds, effects": Design(laws=("t3",), seeds=2, **HALF),
    "binary, 20 prompts": Design(laws=("binary",), prompts=20),
    "binary, 4 images, effects": Design(laws=("binary",), images=4, **HALF),
    "Likert, 2 seeds, effects": Design(laws=("likert",), seeds=2, **HALF),
    "lognormal, 20 prompts, 2 seeds": Design(laws=("lognormal",), prompts=20, seeds=2),
    "lognormal, effects": Design(laws=("lognormal",), **HALF),
    # by task
    "by task": Design(tasks=TASKS),
    "by task, 2 seeds, effects": Design(tasks=TASKS, seeds=2, **HALF),
    "by task, binary, 4 images": Design(tasks=TASKS, laws=("binary",), images=4),
    "by task, 95 % ones": Design(tasks=TASKS, laws=("binary",), rate=0.95, images=4),
    "by task, 98 % ones": Design(tasks=TASKS, laws=("binary",), rate=0.98, images=4, seeds=2),
    "small tasks, 95 % ones": Design(tasks=(2, 3, 5, 8, 12, 20), laws=("binary",), rate=0.95),
    # seed effects shared by all methods
    "shared, 2 seeds": Design(shared=0.15, spread=0.05, seeds=2),
    "shared, 3 seeds": Design(shared=0.15, spread=0.05),
    "shared, 3 seeds, effects": Design(shared=0.15, spread=0.05, **HALF),
    "shared, 5 seeds": Design(shared=0.15, spread=0.05, seeds=5),
    "shared and own, 3 seeds": Design(shared=0.15, spread=0.15),
    "shared only, 2 seeds": Design(shared=0.15, spread=0, seeds=2),
    "shared much, 3 seeds": Design(shared=0.5, spread=0.05),
    "shared, 2 methods, 3 seeds": Design(shared=0.15, spread=0.05, methods=2),
    "shared, 18 methods": Design(shared=0.15, spread=0.05, methods=18),
    "shared, 400 prompts": Design(shared=0.15, spread=0.05, prompts=400),
    "shared, 400 prompts, 2 seeds": Design(shared=0.15, spread=0.05, prompts=400, seeds=2),
    "shared much, 2 seeds": Design(shared=0.5, spread=0.05, seeds=2),
    # one unstable method
    "unstable, 2 seeds": Design(unstable=4, seeds=2),
    "unstable, 3 seeds": Design(unstable=4),
    "unstable, 3 seeds, effects": Design(unstable=4, **HALF),
    "unstable, 5 seeds, effects": Design(unstable=4, seeds=5, **HALF),
    "unstable, 18 methods": Design(unstable=4, methods=18),
    "unstable, 2 methods": Design(unstable=4, methods=2),
    "very unstable, 2 seeds": Design(unstable=10, seeds=2),
    "very unstable, 3 seeds, effects": Design(unstable=10, **HALF),
    # missing scores
    "missing at random": Design(missing="random"),
    "missing at random, 4 images, effects": Design(missing="random", images=4, **HALF),
    "missing by method": Design(missing="method", seeds=2),
    "missing by method, effects": Design(missing="method", affected=5, effect=0.5),
    "missing by method, 18 methods, effects": Design(missing="method", methods=18, affected=9, effect=0.5),
    "missing runs": Design(missing="runs"),
    "lowest missing": Design(missing="lowest"),
    "lowest missing, 2 seeds, 4 images": Design(missing="lowest", images=4, seeds=2),
    # one seed: statements about these weights
    "1 seed": Design(seeds=1),
    "1 seed, effects": Design(seeds=1, **HALF),
    "1 seed, no seed effects": Design(seeds=1, spread=0),
    "1 seed, shared, binary": Design(seeds=1, shared=0.15, laws=("binary",), images=4),
    "1 seed, 18 methods, 20 prompts": Design(seeds=1, methods=18, prompts=20),
    "1 seed, missing by method": Design(seeds=1, missing="method"),
    "1 seed, by task": Design(seeds=1, tasks=TASKS),
    # several measures: the table of improvements and the gains over them
    "3 measures, 1 seed": Design(seeds=1, spread=0, laws=("gaussian", "t3", "binary")),
    "3 measures, 2 seeds": Design(seeds=2, laws=("gaussian", "t3", "binary")),
    "3 measures, 3 seeds": Design(laws=("t3", "likert", "lognormal")),
}


# -- a study ----------------------------------------------------------------------------------------------------------


def study(design: Design, rng: np.random.Generator) -> Study:
    """Return one study of this design."""
    sizes = design.tasks or (design.prompts,)
    tags = np.repeat([f"task {i}" for i in range(len(sizes))], sizes)
    common = rng.normal(size=(len(tags), 1, 1))  # prompts that are hard in all measures
    found, truths = {}, {}
    for law in design.laws:
        measure = Measure(law, law, by_task=bool(design.tasks))
        values, truths[measure] = scores(design, law, sizes, common, rng)
        found[measure] = Scores(np.arange(len(tags)), tags, _without(design.missing, values, common, rng))
    seeds = {"base": [UNTRAINED], **{k: list(range(runs)) for k, runs in zip(design.labels, design.runs)}}
    return Study(completed(Analysis(["base", *design.labels], "base", seeds, list(found), found)), truths)


def scores(
    design: Design, law: str, sizes: Sequence[int], common: np.ndarray, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], Truth]:
    """Return label -> (P, I, S) scores of one measure, and their truth."""
    prompts, images, seeds = sum(sizes), design.images, design.seeds
    drawn = partial(draw, rng, law)
    levels = np.linspace(-0.8, 0.8, len(sizes)) if len(sizes) > 1 else np.zeros(1)
    task = np.repeat(levels, sizes)[:, None, None]
    prompt = (common + drawn(prompts, 1, 1)) / np.sqrt(2) + NOISE * drawn(prompts, images, 1)
    shared = design.shared * rng.normal(size=seeds)
    within = 1 + NOISE**2 + OWN**2 + INTERACTION**2 + IMAGE**2  # the variance of a method's score for given weights
    values, methods, weights = {}, {}, {}
    for place, label in enumerate(["base", *design.labels]):
        trained = place > 0
        effect = design.effect * (trained and place <= design.affected)
        spread = design.spread * (design.unstable if place == design.methods else 1.0)
        between = design.shared**2 + spread**2
        taste = prompt + OWN * drawn(prompts, 1, 1)
        if trained:
            moved = shared + spread * rng.normal(size=seeds)
            parts = taste + moved + INTERACTION * drawn(prompts, 1, seeds) + IMAGE * drawn(prompts, images, seeds)
        else:  # its scores have the law of a method's, whatever that is due to
            moved = np.zeros(1)
            residue = np.sqrt(INTERACTION**2 + IMAGE**2 + between)
            parts = taste + residue * drawn(prompts, images, 1)
        scale = 1.0 if law in ("gaussian", "t3") else np.sqrt(within + between)
        values[label] = _observed(law, task + effect + parts / scale, design.rate)
        methods[label] = _expected(law, levels + effect, 1.0, design.rate)
        left = within / scale**2 if trained else 1.0
        runs = design.runs[place - 1] if trained else 1
        given = [_expected(law, levels + effect + u / scale, left, design.rate) for u in moved[:runs]]
        weights[label] = np.mean(given, axis=0)
    return values, Truth(methods, weights)


def draw(rng: np.random.Generator, law: str, *shape: int) -> np.ndarray:
    """Return numbers of mean 0 and variance 1, with the tails of the law."""
    return rng.standard_t(3, size=shape) / np.sqrt(3) if law == "t3" else rng.normal(size=shape)


def _observed(law: str, z: np.ndarray, rate: float) -> np.ndarray:
    """Return the scores of latent values that have variance 1."""
    if law == "binary":
        return (z > -ndtri(rate)).astype(float)
    if law == "likert":
        return 1.0 + np.searchsorted(CUTS, z)
    return np.exp(SKEW * z) if law == "lognormal" else z


def _expected(law: str, mean: np.ndarray, variance: float, rate: float) -> np.ndarray:
    """Return the expected score of normal latent values."""
    if law == "binary":
        return ndtr((mean + ndtri(rate)) / np.sqrt(variance))
    if law == "likert":
        return 1 + sum(ndtr((mean - cut) / np.sqrt(variance)) for cut in CUTS)
    return np.exp(SKEW * mean + SKEW**2 * variance / 2) if law == "lognormal" else mean


def _without(
    missing: str, values: dict[str, np.ndarray], common: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return the scores with nan where they are missing.

    Prompts are hard by what is common to all rows: chosen by a row's own scores, the paired changes left would not be
    those of all prompts, which no analysis could know.
    """
    found = {label: value.copy() for label, value in values.items()}
    *_, last = found.values()
    if missing == "method":
        last[np.argsort(common.ravel())[:20], :, 0] = np.nan
    if missing == "runs":
        last[:, :, 1:] = np.nan
    for value in found.values():
        if missing == "random":
            value[rng.random(value.shape) < 0.05] = np.nan
        if missing == "lowest":
            value[value < np.quantile(value, 0.05)] = np.nan
    return found


# -- its score --------------------------------------------------------------------------------------------------------

Count = tuple[float, int]  # cells of which something holds, and all cells


def scored(design: Design, number: int) -> dict[str, Count]:
    """Return the figures of study ``number`` of a design."""
    made = study(design, np.random.default_rng((14, number)))
    found: dict[str, Count] = {}
    for measure, truth in made.truths.items():
        for name, (hits, cells) in figures(design, made.analysis, measure, truth).items():
            before = found.get(name, (0.0, 0))
            found[name] = (before[0] + hits, before[1] + cells)
    if design.seeds > 1 or not (design.spread or design.shared):  # else no two training runs are equal
        equal = design.labels[design.affected :]
        improved = [column[label] for column in made.analysis.improved.values() for label in equal]
        found["false improved"] = _any(each.verdict in DECIDED for each in improved)
        gains = [made.analysis.gains[label] for label in equal if made.analysis.gains]
        found["false gains"] = _any(each.verdict in DECIDED for each in gains)
    return found


def figures(design: Design, analysis: Analysis, measure: Measure, truth: Truth) -> dict[str, Count]:
    """Return the figures of one measure. A decision about weights is held against the truth of these weights."""
    methods = {label: float(value.mean()) for label, value in truth.methods.items()}
    weights = {label: float(value.mean()) for label, value in truth.weights.items()}
    pairs = analysis.pairs[measure]
    changes = {(label, "base"): each for label, each in analysis.changes[measure].items()}
    found: dict[str, Count] = {}
    for name, table in (("changes", changes), ("pairs", pairs)):
        true = {pair: _difference(weights if each.weights else methods, pair) for pair, each in table.items()}
        given = {
            pair for pair, each in table.items() if np.isfinite(each.estimate.lo) and np.isfinite(each.estimate.hi)
        }
        inside = {pair for pair in given if table[pair].estimate.lo <= true[pair] <= table[pair].estimate.hi}
        found[f"{name} covered"] = _count(pair in inside for pair in given if design.odd not in pair)
        found[f"unstable {name} covered"] = _count(pair in inside for pair in given if design.odd in pair)
        found[f"{name} given"] = _count(pair in given for pair in table)
        found[f"false {name}"] = _any(_false(each, true[pair]) for pair, each in table.items())
        real = [pair for pair in table if _difference(methods, pair) and design.odd not in pair]
        found[f"{name} found"] = _count(_right(table[pair], _difference(methods, pair)) for pair in real)
    if design.seeds == 1:
        over = [(each.estimate, _difference(methods, pair)) for pair, each in changes.items()]
        found["changes of methods covered"] = _count(estimate.lo <= true <= estimate.hi for estimate, true in over)
        found["said of weights"] = _count(each.weights for each in [*changes.values(), *pairs.values()])
    if design.odd:
        flagged = analysis.unstable.get(measure, [])
        found["unstable flagged"] = _count([design.odd in flagged])
        found["stable flagged"] = _any(label != design.odd for label in flagged)
    if design.tasks:
        found |= _by_task(analysis, measure, truth.weights if design.seeds == 1 else truth.methods)
    return found | _ranked(design, analysis, measure, weights if design.seeds == 1 else methods)


def _ranked(design: Design, analysis: Analysis, measure: Measure, truth: dict[str, float]) -> dict[str, Count]:
    """Return the figures of bold, the top group and the rank intervals."""
    ranking, bold, labels = analysis.rankings[measure], analysis.bold(measure), design.labels
    leader = ranking.leader
    outside = [label for label in labels if leader and label not in ranking.top]
    better = {label: sum(truth[other] > truth[label] + TINY for other in labels) for label in labels}
    worse = {label: sum(truth[other] < truth[label] - TINY for other in labels) for label in labels}
    ranks = ranking.ranks.items()
    beside = [analysis.pairs[measure].get((a, b)) for a in ranking.top for b in ranking.top if leader in (a, b)]
    found = {
        "bold": _count([bold is not None]),
        "false bold": _count([bold is not None and (design.seeds == 1 or truth[bold] <= truth["base"])]),
        "false top": _any(truth[label] >= truth[leader or ""] - TINY for label in outside),
        "false ranks": _any(lo > 1 + better[label] or hi < len(labels) - worse[label] for label, (lo, hi) in ranks),
        "leader": _count([leader is not None]),
        "top apart": _any(each is not None and each.verdict in DECIDED for each in beside),
    }
    if design.missing == "method":
        found["fewer marked"] = _count([list(ranking.fewer) == labels[-1:]])
        found["leader worse"] = _count([leader is not None and better[leader] > 0])
    return found


def _by_task(analysis: Analysis, measure: Measure, truth: dict[str, np.ndarray]) -> dict[str, Count]:
    """Return, by number of prompts, how many intervals of task means are given, and how many of these cover."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    tags = analysis.scores[measure].tags
    for place, (task, rows) in enumerate(analysis.tasks(measure).items()):
        size = f"{(tags == task).sum()} prompts"
        for label, estimate in rows.items():
            given = bool(np.isfinite(estimate.lo) and np.isfinite(estimate.hi))
            inside = given and estimate.lo - 1e-9 <= truth[label][place] <= estimate.hi + 1e-9
            found.setdefault(size, []).append((given, inside))
    shares: dict[str, Count] = {}
    for size, cells in found.items():
        shares[f"task of {size} given"] = _count(given for given, _ in cells)
        shares[f"task of {size} covered"] = _count(inside for given, inside in cells if given)
    return shares


def _difference(truth: dict[str, float], pair: tuple[str, str]) -> float:
    """Return the true difference of a pair, exactly 0 if there is none."""
    difference = truth[pair[0]] - truth[pair[1]]
    return difference if abs(difference) > TINY else 0.0


def _false(comparison: Comparison, true: float) -> bool:
    """Return whether a difference is called that is not there, or in the wrong direction."""
    return comparison.verdict in DECIDED and not _right(comparison, true)


def _right(comparison: Comparison, true: float) -> bool:
    return comparison.verdict == ("up" if true > 0 else "down" if true < 0 else "")


def _count(cells: Iterable[bool]) -> Count:
    cells = [bool(cell) for cell in cells]
    return float(sum(cells)), len(cells)


def _any(cells: Iterable[bool]) -> Count:
    return float(any(cells)), 1


# -- many studies -----------------------------------------------------------------------------------------------------


def simulate(design: Design, studies: int, map: Callable = map) -> dict[str, Rate]:
    """Return figure -> its rate over this many studies; a figure without any cell is left out."""
    found = list(map(scored, itertools.repeat(design, studies), range(studies)))
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    counts = {name: np.array([each.get(name, (0, 0)) for each in found], float) for name in names}
    return {name: _rate(*count.T) for name, count in counts.items() if count[:, 1].sum()}


def _rate(hits: np.ndarray, cells: np.ndarray) -> Rate:
    share = hits.sum() / cells.sum()
    return Rate(float(share), float(np.sqrt(((hits - share * cells) ** 2).sum()) / cells.sum()), int(cells.sum()))


HEAD = ("changes covered", "pairs covered", "unstable changes covered", "unstable pairs covered")
HEAD += ("false changes", "false bold", "false top", "false ranks", "false improved", "false gains")
HEAD += ("changes found", "pairs found")
USUAL = {"given": 1.0, "said of weights": 1.0, "marked": 1.0, "leader": 1.0, "top apart": 0.0, "leader worse": 0.0}


def table_row(name: str, rates: dict[str, Rate]) -> str:
    """Return the figures of a design as a row of a Markdown table, in per cent; unusual ones in the last cell."""
    cells = [f"{100 * rates[figure].share:.1f}" if figure in rates else "" for figure in HEAD]
    others = {figure: rate for figure, rate in rates.items() if figure not in (*HEAD, "bold", "false pairs")}
    usual = {
        figure for figure, rate in others.items() for end in USUAL if figure.endswith(end) and rate.share == USUAL[end]
    }
    said = "; ".join(f"{figure} {100 * rate.share:.1f}" for figure, rate in others.items() if figure not in usual)
    return f"| {name} | {' | '.join(cells)} | {said} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--design", action="append", default=[], choices=list(DESIGNS), metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--studies", type=int, default=800)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))  # of the workers
    names = list(DESIGNS) if arguments.all else arguments.design
    if not names:
        parser.error(f"name a design, or --all; there are {'; '.join(DESIGNS)}")
    print(f"| design | {' | '.join(HEAD)} | other |", "|---|" + "---:|" * len(HEAD) + "---|", sep="\n", flush=True)
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for name in names:
            rates = simulate(DESIGNS[name], arguments.studies, partial(pool.map, chunksize=10))
            print(table_row(name, rates), flush=True)


if __name__ == "__main__":
    main()

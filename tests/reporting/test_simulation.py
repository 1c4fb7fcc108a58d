"""What the report's intervals and decisions promise, in simulated studies whose truth is known.

`pytest -rP` prints every figure. A bar counts as missed if the simulated rate is two standard errors beyond it. Each
study has a seed of its own, so all figures are reproducible.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.simulated_studies import DESIGNS, Design, Truth, figures, scores, simulate, study, table_row

from alignbench.reporting.analysis.comparison import Analysis, Measure, Scores, completed

STUDIES = 300
NONE, ALL, FEW, COVERED = (0, 0), (1, 1), (0, 0.06), (0.93, 0.97)
BARS = {
    "changes given": ALL,
    "pairs given": ALL,
    "changes covered": COVERED,
    "pairs covered": COVERED,
    "unstable changes covered": (0.90, 1),
    "unstable pairs covered": (0.90, 1),
    "false changes": FEW,
    "false pairs": FEW,
    "false bold": FEW,
    "false top": FEW,
    "false ranks": FEW,
    "false improved": FEW,
    "false gains": FEW,
    "top apart": NONE,
    "fewer marked": ALL,
}
OWN = ("unstable changes covered", "unstable pairs covered")
FALSE = [figure for figure, bar in BARS.items() if bar == FEW]
LIMITS = {  # what these designs reach where that is less than the bars, as docs/statistics.md and the report's page say
    "by task, 98 % ones": {"changes covered": (0.93, 0.99), "pairs covered": (0.93, 1)},
    "small tasks, 95 % ones": {"pairs given": (0.99, 1), "changes covered": (0.93, 0.99), "pairs covered": (0.93, 1)},
    "lowest missing, 2 seeds, 4 images": dict.fromkeys(FALSE, (0, 0.09)),
    "unstable, 2 methods": {"changes covered": (0.93, 1), **dict.fromkeys(FALSE, (0, 0.09))},
    "unstable, 18 methods": {**dict.fromkeys(OWN, (0.85, 1)), **dict.fromkeys(FALSE, (0, 0.11))},
    "unstable, 2 seeds": {**dict.fromkeys(OWN, (0.82, 1)), **dict.fromkeys(FALSE, (0, 0.15))},
    "unstable, 3 seeds": {**dict.fromkeys(OWN, (0.87, 1)), **dict.fromkeys(FALSE, (0, 0.15))},
    "unstable, 3 seeds, effects": {**dict.fromkeys(OWN, (0.87, 1)), **dict.fromkeys(FALSE, (0, 0.16))},
    "very unstable, 2 seeds": {**dict.fromkeys(OWN, (0.83, 1)), **dict.fromkeys(FALSE, (0, 0.23))},
    "very unstable, 3 seeds, effects": dict.fromkeys(FALSE, (0, 0.18)),
}
POWER = {  # least share of the true changes, and of the true differences of pairs, that are found
    "plain, effects": (0.789, 0.489),
    "5 seeds, effects": (0.905, 0.802),
    "2 seeds, effects": (0.531, 0.248),
    "no seed effects, effects": (0.981, 0.988),
    "18 methods, effects": (0.686, 0.260),
    "400 prompts, 4 images, effects": (0.555, 0.160),
    "t3, 2 seeds, effects": (0.521, 0.200),
    "binary, 4 images, effects": (0.929, 0.693),
    "Likert, 2 seeds, effects": (0.720, 0.407),
    "lognormal, effects": (0.873, 0.659),
    "by task, 2 seeds, effects": (0.343, 0.105),
    "shared, 3 seeds, effects": (0, 0.960),
    "unstable, 3 seeds, effects": (0.476, 0.158),
    "unstable, 5 seeds, effects": (0.709, 0.298),
    "very unstable, 3 seeds, effects": (0.156, 0.036),
    "missing at random, 4 images, effects": (0.883, 0.519),
    "missing by method, effects": (0.828, 0.432),
    "missing by method, 18 methods, effects": (0.686, 0.252),
    "1 seed, effects": (0.844, 0.763),
}


def kind(design: Design) -> str:
    """Return what is special about a design."""
    kinds = {
        "one seed": design.seeds == 1,
        "several measures": len(design.laws) > 1,
        "missing": bool(design.missing),
        "unstable": design.unstable > 1,
        "shared": design.shared > 0,
        "by task": bool(design.tasks),
    }
    return next((name for name, holds in kinds.items() if holds), "alike")


def designs(chosen: str):
    return pytest.mark.parametrize("name", [name for name, design in DESIGNS.items() if kind(design) == chosen])


def missed(name: str, **others: tuple[float, float]) -> list[str]:
    """Return the figures of this design that miss their bars."""
    rates = simulate(DESIGNS[name], STUDIES)
    print(table_row(name, rates))
    bars = {**BARS, **{figure.replace("_", " "): bar for figure, bar in others.items()}}
    bars |= {figure: (0.90, 1) for figure in rates if figure.startswith("task of") and figure.endswith("covered")}
    bars |= LIMITS.get(name, {})
    bars |= {f"{table} found": (least, 1) for table, least in zip(("changes", "pairs"), POWER.get(name, ()))}
    return [
        f"{figure}: {rates[figure].share:.3f} (SE {rates[figure].se:.3f}), not in [{lowest}, {highest}]"
        for figure, (lowest, highest) in bars.items()
        if figure in rates
        if not lowest - 2 * rates[figure].se - 1e-9 <= rates[figure].share <= highest + 2 * rates[figure].se + 1e-9
    ]


@pytest.mark.slow
@designs("alike")
def test_two_seeds_are_enough_if_methods_are_alike(name):
    """93 to 97 % of intervals hold the truth, at most 6 % of tables call a false difference, true ones are found."""
    assert not missed(name)


@pytest.mark.slow
@designs("by task")
def test_tasks_count_alike_whatever_their_size(name):
    """The same holds for means of task means; a task's own interval holds its truth in 90 %, where one is given."""
    assert not missed(name)


@pytest.mark.slow
@designs("shared")
def test_training_seeds_may_move_all_methods_together(name):
    """The same holds if methods of one training seed share its effect, as by common prompts and noise."""
    assert not missed(name)


@pytest.mark.slow
@designs("unstable")
def test_one_method_may_be_unstable(name):
    """The same holds for all others if one method's training runs differ much more. Its own intervals hold in 90 % with
    five seeds, in less with two and three (``LIMITS``)."""
    assert not missed(name)


@pytest.mark.slow
@designs("missing")
def test_scores_may_be_missing(name):
    """The same holds; a row that rests on fewer prompts is marked, and none is in the top group that is shown apart."""
    assert not missed(name, leader_worse=FEW)


@pytest.mark.slow
@designs("one seed")
def test_one_seed_speaks_of_these_weights(name):
    """Every comparison says so and holds for the weights that were drawn; no row is bold."""
    assert not missed(name, said_of_weights=ALL, bold=NONE)


@pytest.mark.slow
@designs("several measures")
def test_a_table_of_improvements_is_right_as_a_whole(name):
    """Without differences, any cell of the improvements, of all methods and measures, is called in at most 6 %."""
    assert not missed(name)


# -- the simulation itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["gaussian", "t3", "binary", "likert", "lognormal"])
def test_the_truth_is_the_mean_of_many_prompts(law):
    """Over 200,000 prompts, scores average to what the drawn weights are said to score; over 5,000 runs, to the rest.

    Both by task, with an effect, shared effects of seeds and an unstable method.
    """
    rng, sizes = np.random.default_rng(0), (50_000, 150_000)
    design = Design(seeds=2, methods=2, affected=1, effect=0.5, spread=0.3, shared=0.2, unstable=3)
    values, truth = scores(design, law, sizes, rng.normal(size=(sum(sizes), 1, 1)), rng)
    for label, drawn in truth.weights.items():
        assert [part.mean() for part in np.split(values[label], sizes[:1])] == pytest.approx(drawn, abs=0.03)
    many = scores(design._replace(seeds=5000), law, (1, 1), np.zeros((2, 1, 1)), rng)[1]
    for label, all_runs in many.methods.items():
        assert all_runs == pytest.approx(many.weights[label], abs=0.06)


def test_a_wrong_statement_is_counted():
    """Were the large effect that a study finds not there, its interval, verdict, bold and ranks would all be wrong."""
    design = Design(methods=2, affected=1, effect=5.0)
    made = study(design, np.random.default_rng(0))
    ((measure, truth),) = made.truths.items()
    right = figures(design, made.analysis, measure, truth)
    assert right["changes found"] == right["pairs found"] == (1, 1)
    nothing = dict.fromkeys(truth.methods, np.zeros(1))
    wrong = figures(design, made.analysis, measure, Truth(nothing, nothing))
    for figure in ("false changes", "false pairs", "false bold", "false top", "false ranks"):
        assert (right[figure], wrong[figure]) == ((0, 1), (1, 1))
    assert (right["changes covered"], wrong["changes covered"]) == ((2, 2), (1, 2))


# -- the two further statistics ---------------------------------------------------------------------------------------


def test_a_table_of_improvements_is_one_family():
    """Holm's correction covers all methods and measures of the table: the least of 18 p-values is multiplied by 18."""
    made = study(Design(laws=("gaussian", "t3", "binary")), np.random.default_rng(0))
    cells = [cell for column in made.analysis.improved.values() for cell in column.values()]
    assert len(cells) == 18
    least = min(cells, key=lambda cell: cell.estimate.p)
    assert least.p_holm == pytest.approx(min(1, 18 * least.estimate.p))


def test_a_gain_counts_in_the_spread_of_base():
    """A shift by k standard deviations of base's prompts, in each measure that was not trained on, is a gain of k.

    Units do not matter, the training reward does not count, and a falling score is a gain where lower is better.
    """
    rng = np.random.default_rng(1)
    names = [
        Measure("t", "t", role="train"),
        Measure("a", "a"),
        Measure("b", "b", higher_is_better=False),
        Measure("n", "n", higher_is_better=None),
    ]
    found = {}
    for measure, unit, shift in zip(names, (1, 100, 0.01, 1), (9, 2, -2, 9)):
        base = rng.normal(size=(60, 1, 1)) * unit
        tags = np.repeat(["one", "other"], 30)
        found[measure] = Scores(np.arange(60), tags, {"base": base, "m": base + shift * base.std(ddof=1)})
    analysis = completed(Analysis(["base", "m"], "base", {"base": [-1], "m": [0]}, names, found))
    assert analysis.summed == names[1:3]
    assert analysis.gains["m"].estimate.mean == pytest.approx(2)

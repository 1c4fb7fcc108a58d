"""False alarms of the report's tables in simulated sweeps without differences, and the coverage of its intervals.

All simulated studies of a test share one seed, so results are reproducible. `pytest -rP` prints the observed rates.
"""

from __future__ import annotations

import numpy as np
import pytest

from alignbench.reporting.analysis import stats
from alignbench.reporting.analysis.comparison import UNTRAINED, Analysis, Measure, Scores, completed

STUDIES = 1000
LIMIT = 0.05 + 2 * np.sqrt(0.05 * 0.95 / STUDIES)  # a true rate of 5 % is seen above this in 2 of 100 tests
PROMPTS, METHODS = 60, 5
MEASURES = (
    Measure("a", "a", role="train"),
    Measure("b", "b"),
    Measure("c", "c", "fraction", by_task=True, role="check"),
)
TASK = np.arange(PROMPTS) % 6


def null_sweep(rng, seeds, spread):
    """Return a sweep of base and five methods with two scores and a check, in which nothing differs on average.

    Prompts are correlated: over methods (one prompt is hard for all), over measures, and within a task. All effects but
    those of the training runs have the tails of a t distribution with three degrees of freedom. ``spread``: the
    standard deviation of the effect of a training run on all of a method's scores.
    """
    labels = ["base", *(f"method {i}" for i in range(METHODS))]
    tail = lambda *shape: rng.standard_t(3, size=shape)  # noqa: E731
    prompt, task = tail(PROMPTS, 1, 1), rng.normal(size=6)[TASK][:, None, None]
    moved = {label: rng.normal(size=(1, 1, seeds)) * spread for label in labels}
    found = {}
    for measure in MEASURES:
        common = prompt + task + tail(PROMPTS, 1, 1) + tail(PROMPTS, 2, 1)  # its prompts, and their noise
        values = {"base": common + 0.7 * tail(PROMPTS, 2, 1)}
        for label in labels[1:]:
            own = 0.5 * tail(PROMPTS, 1, 1) + moved[label] + rng.normal(size=(1, 1, seeds)) * spread / 2
            values[label] = common + own + 0.7 * tail(PROMPTS, 2, seeds)
        if measure.by_task:
            values = {label: (each > 0).astype(float) for label, each in values.items()}
        found[measure] = Scores(np.arange(PROMPTS), TASK.astype(str), values)
    planned = {label: [UNTRAINED] if label == "base" else list(range(seeds)) for label in labels}
    return completed(Analysis(labels, "base", planned, list(MEASURES), found))


def alarms(analysis):
    """Return, for each column of the report's tables, whether anything in it is called different."""
    tables = {"change": analysis.changes, "improved": analysis.improved, "gain": {"": analysis.gains}}
    said = {
        f"{name} {getattr(measure, 'name', '')}".strip(): [comparison.verdict for comparison in column.values()]
        for name, table in tables.items()
        for measure, column in table.items()
    }
    bold = {f"bold {measure.name}": analysis.bold(measure) is not None for measure in MEASURES}
    improved = any(said[f"improved {measure.name}"].count("cannot tell") < METHODS for measure in MEASURES)
    return (
        {name: any(each in ("up", "down") for each in column) for name, column in said.items()}
        | bold
        | {"improved": improved}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (2, 0.3), (3, 0.3), (5, 0.3), (3, 0.0)])
def test_five_in_a_hundred_tables_call_anything_different(seeds, spread):
    """Without differences, a column has a bold mean, an "up" or a "down" in at most 5 % of 1,000 sweeps.

    (The bound is 6.4 %: two standard errors of a simulated rate above 5 %. The table of improvements also counts as a
    whole.) With one seed, this holds only if training runs do not differ; the report states that limit.
    """
    found = [alarms(null_sweep(np.random.default_rng((1, i)), seeds, spread)) for i in range(STUDIES)]
    rates = {name: np.mean([each[name] for each in found]) for name in found[0]}
    print(f"{seeds} seeds, spread {spread}:", ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))
    assert max(rates.values()) <= LIMIT
    assert rates["improved"] > 0.005  # else nothing was tested


def studies(seeds, sd, heavy):
    """Return (6000, P, 1, S) scores with true mean zero; ``sd``: deviations of prompt, training seed, interaction."""
    rng = np.random.default_rng((2, seeds))
    draw = (
        (lambda *shape: rng.standard_t(3, size=shape) / np.sqrt(3))
        if heavy
        else (lambda *shape: rng.normal(size=shape))
    )
    parts = [draw(6000, PROMPTS, 1, 1), rng.normal(size=(6000, 1, 1, seeds)), draw(6000, PROMPTS, 1, seeds)]
    return sum(scale * part for scale, part in zip(sd, parts))


@pytest.mark.slow
@pytest.mark.parametrize("strata", [None, np.sort(TASK)], ids=["all", "by task"])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy"])
@pytest.mark.parametrize(
    ("sd", "seeds"),
    [
        ((1, 0, 0), 1),
        ((0.7, 0, 1), 1),
        ((1, 0, 1), 3),
        ((1, 0.2, 1), 3),
        ((0.5, 0.5, 1), 3),
        ((1, 0.2, 1), 5),
        ((0.5, 0.5, 1), 5),
    ],
)
def test_intervals_cover(sd, seeds, heavy, strata):
    """In 6,000 studies, 93 to 97 % of the 95 % intervals hold the truth.

    With one seed if only prompts vary, and with three or five seeds if the training runs of all five methods vary alike
    (their spread is pooled).
    """
    values = studies(seeds, sd, heavy)
    inside = []
    for first in range(0, len(values), METHODS):
        table = list(values[first : first + METHODS])
        found = stats.mean_intervals(table, strata, pooled=stats.pool_seeds(table, strata), draws=1000)
        inside += [each.lo <= 0 <= each.hi for each in found]
    print(f"{sd} {seeds} seeds: {np.mean(inside):.3f}")
    assert 0.93 <= np.mean(inside) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sd", "seeds", "lowest"),
    [
        ((1, 0, 1), 2, 0.93),
        ((1, 0.2, 1), 2, 0.92),
        ((0.1, 0.5, 1), 2, 0.86),
        ((1, 0.2, 1), 3, 0.93),
        ((0.5, 0.5, 1), 3, 0.91),
    ],
)
def test_a_method_on_its_own_covers_less(sd, seeds, lowest):
    """Without other methods to pool with, intervals from few seeds cover less, as ``stats`` documents."""
    found = stats.mean_intervals(list(studies(seeds, sd, False)), draws=1000)
    assert lowest <= np.mean([each.lo <= 0 <= each.hi for each in found]) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "lowest"), [(2, 0.75), (3, 0.83), (5, 0.88)])
def test_an_outlier_among_methods_covers_less(seeds, lowest):
    """A method whose training runs vary while no other's do is covered less, as ``stats`` documents; others more."""
    odd, others = studies(seeds, (0.7, 0.5, 1), False), studies(seeds, (0.7, 0, 1), False)
    inside = []
    for i in range(0, len(odd) - 4, 3):
        table = [odd[i], *others[i + 1 : i + 5]]
        found = stats.mean_intervals(table, pooled=stats.pool_seeds(table), draws=500)
        inside.append([each.lo <= 0 <= each.hi for each in found])
    first, *rest = np.mean(inside, axis=0)
    assert lowest <= first <= 0.93
    assert min(rest) > 0.96


# -- the two further statistics ---------------------------------------------------------------------------------------


def test_a_table_of_improvements_is_one_family():
    """Holm's correction covers all methods and measures of the table: the least of 15 p-values is multiplied by 15."""
    analysis = null_sweep(np.random.default_rng(0), 3, 0.3)
    cells = [cell for column in analysis.improved.values() for cell in column.values()]
    assert len(cells) == 15
    least = min(cells, key=lambda cell: cell.estimate.p)
    assert least.p_holm == pytest.approx(min(1, 15 * least.estimate.p))


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
    scores = {}
    for measure, unit, shift in zip(names, (1, 100, 0.01, 1), (9, 2, -2, 9)):
        base = rng.normal(size=(PROMPTS, 1, 1)) * unit
        scores[measure] = Scores(
            np.arange(PROMPTS), TASK.astype(str), {"base": base, "m": base + shift * base.std(ddof=1)}
        )
    analysis = completed(Analysis(["base", "m"], "base", {"base": [-1], "m": [0]}, names, scores))
    assert analysis.summed == names[1:3]
    assert analysis.gains["m"].estimate[:3] == pytest.approx((2, 2, 2))

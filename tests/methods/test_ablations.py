"""LeapAlign's ablations: each setting against its closed form, and every published ablation as YAML alone."""

import itertools
from collections import Counter

import pytest
import torch
import yaml
from support.affine_methods import MU, REWARD, B, N, Path, ReFLAt, RewardLog, close, gradient, make_flow, stacked
from support.tiny_sweep import SWEEP

from alignbench.config import UserError
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.flow import integrate, seeded
from alignbench.methods.draft import BPTT
from alignbench.methods.leapalign import LeapAlign
from alignbench.plugins import Registry
from alignbench.testing import MethodContract
from alignbench.testing.method_contract import backpropagate
from alignbench.training.batches import make_batch


class LeapAt(LeapAlign):
    """LeapAlign whose leaps start at given steps."""

    at: tuple[int, ...] = (0, 1)

    def draw(self, rng):
        return self.at


def leaps(path, starts):
    """Return [(d (B, 1), x_end - leap)]: how far each leap from the real latent misses the next real latent."""
    ends = [*starts[1:], N]
    reached = [path.x[k] - (path.t[k] - path.t[j]) * path.v[k] for k, j in zip(starts, ends)]
    return [(path.x[j] - leap).abs().mean(1, keepdim=True) for leap, j in zip(reached, ends)]


def weight(distances, tau=0.1):
    return 1 / sum(d.clamp(min=tau) for d in distances)


# ---- figure 4b: one, two, three leaps


@pytest.mark.parametrize("k", range(N))
def test_one_leap(k):
    """dL/db_k = -w t_k g(x_N) with w = 1 / max(d_0, tau): ReFL's path, with the reward at the sampler's image."""
    path = Path()
    row = -weight(leaps(path, [k])) * path.t[k] * path.g
    close(gradient(LeapAt(steps=N, leaps=1, at=(k,))), stacked({k: row}))


def test_one_leap_from_the_last_step_is_refl():
    """The last step's prediction is the image: without the weight, one leap from there is ReFL there."""
    one = LeapAt(steps=N, leaps=1, at=(N - 1,), similarity="none")
    close(gradient(one), gradient(ReFLAt(steps=N, s=N - 1)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("starts", [(0, 1, 2), (0, 2, 4), (1, 3, 4)])
def test_three_leaps(starts, alpha):
    """Each step's term passes the later leaps: through (I - alpha t A)^T of each, w = 1 / sum of three distances."""
    path, (k, j, i) = Path(), starts
    w = weight(leaps(path, starts))
    at_i = path.g
    at_j = path.back(at_i, alpha * path.t[i])
    at_k = path.back(at_j, alpha * (path.t[j] - path.t[i]))
    rows = {
        i: -w * path.t[i] * at_i,
        j: -w * (path.t[j] - path.t[i]) * at_j,
        k: -w * (path.t[k] - path.t[j]) * at_k,
    }
    close(gradient(LeapAt(steps=N, leaps=3, at=starts, alpha=alpha)), stacked(rows))


def test_three_leaps_in_three_steps_are_exact():
    """N = 3, alpha = 1: exact back-propagation, w = 1 / (3 tau)."""
    close(gradient(LeapAlign(steps=3, leaps=3, alpha=1.0)) * 0.3, gradient(BPTT(steps=3)))


@pytest.mark.parametrize("leaps", [1, 2, 3])
def test_any_number_of_leaps_rewards_the_samplers_own_image(leaps):
    """The rewarded latent is the plain sampler's, bitwise."""
    flow, reward = make_flow(), RewardLog()
    batch = make_batch(flow, range(B))
    backpropagate(LeapAlign(steps=N, leaps=leaps), flow, reward, batch)
    assert torch.equal(reward.seen[0], integrate(flow, batch.noise, flow.sigmas(N), batch.cond))


# ---- figure 4c: the reward's input


@pytest.mark.parametrize(("k", "j"), itertools.combinations(range(N), 2))
def test_the_leaps_prediction_as_the_rewards_input(k, j):
    """The reward sees xhat_{0|j} of the real x_j, and g is taken there; path and weight stay as they are."""
    path, reward = Path(), RewardLog()
    g, w = path.predicted(j) - MU, weight(leaps(path, [k, j]))
    nested = path.back(g, 0.3 * path.t[j])
    rows = {j: -w * path.t[j] * g, k: -w * (path.t[k] - path.t[j]) * nested}
    close(gradient(LeapAt(steps=N, at=(k, j), reward_input="leap"), reward), stacked(rows))
    close(reward.seen[0], path.predicted(j))


# ---- figure 4d: the similarity weight


@pytest.mark.parametrize("similarity", ["both", "d_j", "d_0", "none"])
def test_the_weight_of_some_distances(similarity):
    """w = 1 / (max(d_j, tau) + max(d_0, tau)), 1 / max(d, tau) of one distance, or 1."""
    path = Path()
    d_j, d_0 = leaps(path, (1, 3))
    chosen = {"both": [d_j, d_0], "d_j": [d_j], "d_0": [d_0]}.get(similarity)
    w = weight(chosen) if chosen else torch.ones(B, 1, dtype=torch.float64)
    nested = path.back(path.g, 0.3 * path.t[3])
    rows = {3: -w * path.t[3] * path.g, 1: -w * (path.t[1] - path.t[3]) * nested}
    close(gradient(LeapAt(steps=N, at=(1, 3), similarity=similarity)), stacked(rows))


# ---- figures 4e, 4f: where k and j lie


@pytest.mark.parametrize(
    ("timesteps", "first", "last"), [((0.0, 0.5), 13, 24), ((0.5, 1.0), 0, 12), ((0.0, 1.0), 0, 24)]
)
def test_the_range_of_timesteps(timesteps, first, last):
    """[0, 1/2] draws from the 12 steps next to the image, uniformly over pairs; the whole range from all 25."""
    method, rng = LeapAlign(timesteps=timesteps), seeded(0)
    draws = Counter(method.draw(rng) for _ in range(20_000))
    pairs = list(itertools.combinations(range(first, last + 1), 2))
    assert set(draws) == set(pairs)
    mean = 20_000 / len(pairs)
    assert max(abs(n - mean) for n in draws.values()) < 5 * mean**0.5


def test_a_fixed_distance():
    """1/2: j is 12 of 25 steps behind k, and k is uniform where both fit."""
    method, rng = LeapAlign(distance=0.5), seeded(0)
    draws = Counter(method.draw(rng) for _ in range(5000))
    assert set(draws) == {(k, k + 12) for k in range(13)}
    assert max(abs(n - 5000 / 13) for n in draws.values()) < 5 * (5000 / 13) ** 0.5


# ---- figure 6: the nested gradient alone at k


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_nested_gradient_alone_at_k(alpha):
    """Eq. 14: j as ever; k gets + w alpha t_j (t_k - t_j) A^T g and nothing else, which is zero for alpha = 0."""
    path = Path()
    w = weight(leaps(path, (1, 3)))
    nested = alpha * path.t[3] * (path.t[1] - path.t[3]) * path.g @ path.flow.A
    rows = {3: -w * path.t[3] * path.g, 1: w * nested}
    actual = gradient(LeapAt(steps=N, at=(1, 3), alpha=alpha, single_step_at_k=False))
    close(actual, stacked(rows))
    assert alpha or (actual[1] == 0).all()


def test_both_parts_at_k_add_up():
    """Single-step and nested gradient: eq. 10 is eq. 14 plus what k has for alpha = 0."""
    full = gradient(LeapAt(steps=N, at=(1, 3)))
    nested = gradient(LeapAt(steps=N, at=(1, 3), single_step_at_k=False))
    single = gradient(LeapAt(steps=N, at=(1, 3), alpha=0.0))
    close(full[1], nested[1] + single[1])
    close(full[3], nested[3])


# ---- all of them from YAML

LEAP = {"name": "leapalign"}
ABLATIONS = {
    "figure 4a": [{"alpha": alpha} for alpha in (0.0, 0.1, 0.3, 0.5, 1.0)],
    "figure 4b": [{"leaps": n} for n in (1, 2, 3)],
    "figure 4c": [
        {"similarity": similarity, "reward_input": reward_input}
        for similarity in ("d_j", "both")
        for reward_input in ("x_0", "leap")
    ],
    "figure 4d": [{"similarity": similarity} for similarity in ("none", "d_j", "d_0", "both")],
    "figure 4e": [{"timesteps": [0.0, 0.5]}, {"timesteps": [0.0, 1.0]}],
    "figure 4f": [{"distance": 0.5}, {"distance": None}],
    "figure 6": [{"single_step_at_k": False, "alpha": alpha} for alpha in (0.0, 0.3, 1.0)],
}


def resolved(tmp_path, **changes):
    path = tmp_path / "ablation.yaml"
    base = SWEEP["base"] | {"reward": {"evaluator": {"name": "hpsv2", "weights": "shapes"}, "margin": 0.55}}
    evaluation = SWEEP["evaluation"] | {"evaluators": [{"name": "hpsv2", "weights": "shapes"}]}
    path.write_text(yaml.safe_dump(SWEEP | {"base": base, "evaluation": evaluation} | changes))
    return resolve(read(str(path)), Registry())


@pytest.mark.parametrize("figure", ABLATIONS)
def test_every_published_ablation_is_yaml(figure, tmp_path):
    """A figure is a list of cases that differ in the method's settings; each becomes a run of its own."""
    cases = [{"label": str(change), "method": LEAP | change} for change in ABLATIONS[figure]]
    plan = resolved(tmp_path, cases=cases, grid={})
    for cell, change in zip(plan.cells, ABLATIONS[figure], strict=True):
        assert {name: cell.spec.method[name] for name in change} == change
    assert len({cell.id for cell in plan.cells}) == len(cases)


def test_the_table_of_margins_is_yaml(tmp_path):
    """Table 5: lambda is an axis of the grid."""
    margins = [0.35, 0.55, 0.75, 0.95]
    plan = resolved(tmp_path, cases=[{"label": "LeapAlign", "method": LEAP}], grid={"reward.margin": margins})
    assert [cell.spec.rewards[0]["margin"] for cell in plan.cells] == margins
    assert len({cell.spec.label for cell in plan.cells}) == 4


@pytest.mark.parametrize(
    ("method", "where"),
    [
        (LeapAlign(steps=2, leaps=3), "method.steps"),
        (LeapAlign(timesteps=(0.5, 0.5)), "method.timesteps"),
        (LeapAlign(timesteps=(0.0, 1.5)), "method.timesteps"),
        (LeapAlign(timesteps=(0.0, 0.04)), "method.steps"),
        (LeapAlign(leaps=1, similarity="d_j"), "method.similarity"),
        (LeapAlign(leaps=1, single_step_at_k=False), "method.single_step_at_k"),
        (LeapAlign(leaps=3, distance=0.5), "method.distance"),
        (LeapAlign(distance=0.01), "method.distance"),
        (LeapAlign(distance=0.5, timesteps=(0.0, 0.4)), "method.distance"),
    ],
)
def test_impossible_ablations_are_refused(method, where):
    """Impossible settings are refused in one line that names the setting."""
    with pytest.raises(UserError, match=f"^{where}: .*; choose ") as caught:
        method.check(1, True)
    assert "\n" not in str(caught.value)


def test_defaults_are_the_paper():
    """Defaults are two leaps, the sampler's image, both distances, any pair of steps, and both parts at k."""
    method = LeapAlign()
    assert (method.leaps, method.reward_input, method.similarity) == (2, "x_0", "both")
    assert (method.timesteps, method.distance, method.single_step_at_k) == ((0.0, 1.0), None, True)
    assert REWARD.terms[0].margin is None


class TestOneLeap(MethodContract):
    method = LeapAlign(steps=5, leaps=1)


class TestThreeLeaps(MethodContract):
    method = LeapAlign(steps=5, leaps=3)


class TestNestedAloneAndFixedDistance(MethodContract):
    method = LeapAlign(steps=5, distance=0.4, single_step_at_k=False, reward_input="leap", similarity="d_0")

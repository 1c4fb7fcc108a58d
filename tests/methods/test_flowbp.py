"""Full back-propagation and FlowBP's three methods against their closed forms on the affine flow, in float64."""

import itertools

import pytest
import torch
from support.affine_methods import (
    MU,
    REWARD,
    B,
    DRTuneAt,
    LeapAt,
    N,
    Path,
    RewardLog,
    close,
    gradient,
    make_flow,
    stacked,
)
from test_methods import full_bptt

from alignbench.analytic import AffineFlow, QuadraticReward
from alignbench.config import UserError
from alignbench.flow import integrate, seeded
from alignbench.methods.draft import BPTT, DRaFTK
from alignbench.methods.flowbp import FlowBPBridge, FlowBPSparse
from alignbench.methods.flowbp_lagrange import FlowBPLagrange, quadrature, spread
from alignbench.testing import MethodContract
from alignbench.testing.method_contract import backpropagate, gradients_of
from alignbench.training.batches import make_batch
from alignbench.training.meter import Meter, metered, metered_reward


class SparseAt(FlowBPSparse):
    """FlowBP-Sparse with given active steps."""

    at: tuple[int, ...] = ()

    def chosen(self, steps, n, first, rng):
        return set(self.at)


class BridgeAt(FlowBPBridge):
    """FlowBP-Bridge with given j and active steps."""

    j: int = 1
    at: tuple[int, ...] = ()

    def draw(self, rng):
        return self.j, set(self.at)


class LagrangeAt(FlowBPLagrange):
    """FlowBP-Lagrange with given k and j."""

    at: tuple[int, int] = (0, 1)

    def draw(self, rng):
        return self.at


SUBSETS = [s for n in (1, 2, 3, 5) for s in itertools.combinations(range(N), n)]


def rho(path, active, rescale):
    return 1 + rescale * (1 / sum(path.h[i] for i in active) - 1)


# ---- full back-propagation


def test_bptt_closed_form():
    """dL/db_i = -h_i lam_{i+1}, lam_N = g(x_N), lam_i = (I - h_i A)^T lam_{i+1}."""
    close(gradient(BPTT(steps=N)), stacked(full_bptt()))


def test_checkpointed_gradients_are_autograds_bitwise():
    """Recomputing every step in the backward pass equals a plain loop that keeps all steps, bitwise."""
    flow, plain = make_flow(), make_flow()
    batch = make_batch(plain, range(B))
    x, t = batch.noise, plain.sigmas(N)
    for i in range(N):
        x = x + (t[i + 1] - t[i]) * plain.velocity(x, t[i], batch.cond)
    REWARD.loss(REWARD(x, batch.prompts)).mean().backward()
    backpropagate(BPTT(steps=N), flow, REWARD, make_batch(flow, range(B)))
    assert torch.equal(flow.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("steps", [3, 12])
def test_bptt_keeps_one_step_at_a_time(steps):
    """The forward pass stores one latent per step, however much a step computes."""

    class Wide(AffineFlow):
        def velocity(self, x, sigma, cond, *, reference=False):
            for _ in range(20):  # twenty stored tensors, if the step were kept
                x = x.tanh()
            return super().velocity(x, sigma, cond, reference=reference)

    flow, stored = Wide(steps), []
    batch = make_batch(flow, range(B))

    def keep(tensor):
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        BPTT(steps=steps).loss(flow, REWARD, batch)
    assert len(stored) < 6 * steps


def test_bptt_is_draft_of_all_steps():
    """DRaFT-K with K = N is full back-propagation."""
    close(gradient(BPTT(steps=N)), gradient(DRaFTK(steps=N, k=N)))


# ---- Sparse


@pytest.mark.parametrize("rescale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("active", SUBSETS)
def test_sparse_closed_form(active, rescale):
    """dL/db_i = -rho h_i g(x_N) for active i, exactly zero elsewhere; rho = 1 + rescale (sum h / sum_S h - 1)."""
    path = Path()
    rows = {i: -rho(path, active, rescale) * path.h[i] * path.g for i in active}
    actual = gradient(SparseAt(steps=N, at=active, rescale=rescale))
    close(actual, stacked(rows))
    assert (actual[[i for i in range(N) if i not in active]] == 0).all()


@pytest.mark.parametrize("active", SUBSETS)
def test_sparse_rescaled_moves_a_shared_bias_by_minus_g(active):
    """rescale = 1: whatever is active, the gradients add up to -g(x_N)."""
    close(gradient(SparseAt(steps=N, at=active, rescale=1.0)).sum(0), -Path().g.mean(0))


def test_sparse_is_drtune_without_a_stop():
    """All steps active and no rescaling: DRTune on all steps; the last step alone: DRaFT-1."""
    every = tuple(range(N))
    close(gradient(SparseAt(steps=N, at=every, rescale=0.0)), gradient(DRTuneAt(steps=N, trained=every, stop=N - 1)))
    close(gradient(SparseAt(steps=N, at=(N - 1,), rescale=0.0)), gradient(DRaFTK(steps=N, k=1)))


def test_the_window_is_what_stands_for_the_whole():
    """With a tail of 0.6 only the last three of five steps are drawn, and rho relates to them."""
    method, path = FlowBPSparse(steps=N, tail=0.6, k=1), Path()
    assert method.window == range(2, 5)
    draws = [method.chosen(method.window, 1, 3, rng) for rng in [seeded(0)] for _ in range(200)]
    assert set().union(*draws) == {2, 3, 4}
    assert method.rho(path.t, {4}) == pytest.approx(float(sum(path.h[2:]) / path.h[4]), rel=1e-14)


def test_late_steps_are_active_more_often():
    """A single active step i has the probability (i + 1)^b / sum; with b = 0 all are equally likely."""
    for bias in (0.0, 2.0):
        method, rng = FlowBPSparse(steps=4, k=1, late_bias=bias), seeded(0)
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[list(method.chosen(method.window, 1, 1, rng))] += 1
        weights = torch.arange(1, 5.0) ** bias
        expected = 4000 * weights / weights.sum()
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


# ---- Bridge


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(
    ("j", "active"), [(j, s) for j in range(1, N) for s in SUBSETS if len(s) > 1 and j in s and min(s) < j]
)
def test_bridge_closed_form(j, active, rescale, alpha):
    """After: -rho h_i g. Before: -rho h_i (I - rho alpha h_j A)^T g. Exactly zero elsewhere."""
    path = Path()
    scale = rho(path, active, rescale)
    early = path.back(path.g, scale * alpha * path.h[j])
    rows = {i: -scale * path.h[i] * (path.g if i >= j else early) for i in active}
    actual = gradient(BridgeAt(steps=N, j=j, at=active, rescale=rescale, alpha=alpha))
    close(actual, stacked(rows))
    assert (actual[[i for i in range(N) if i not in active]] == 0).all()


@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_bridge_without_the_nested_gradient_is_sparse(rescale):
    """alpha = 0: the same steps give the same gradient."""
    bridge = BridgeAt(steps=N, j=2, at=(0, 2, 4), rescale=rescale, alpha=0.0)
    close(gradient(bridge), gradient(SparseAt(steps=N, at=(0, 2, 4), rescale=rescale)))


def test_bridge_in_two_steps_is_exact():
    """Two steps, alpha = 1, no rescaling: exact back-propagation."""
    close(gradient(FlowBPBridge(steps=2, k=2, alpha=1.0, rescale=0.0)), gradient(BPTT(steps=2)))


def test_bridge_draws_both_sides():
    """j is active, at least one step before it is, and the budget is spent wherever both sides have room."""
    method, rng = FlowBPBridge(), seeded(0)
    for _ in range(500):
        j, active = method.draw(rng)
        assert 1 <= j <= 24
        assert j in active
        assert min(active) < j
        assert len(active) == min(method.k, 25)
    assert {method.draw(rng)[0] for _ in range(2000)} == set(range(1, 25))


# ---- Lagrange


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_supports_are_distinct_and_start_with_the_first(n, length):
    """At most n steps, within the leap, from its first to its last, without the target."""
    found = spread(length, n)
    assert found[0] == 0
    assert n == 1 or found[-1] == length - 1
    assert len(set(found)) == len(found) == min(n, length)
    assert set(range(length)) >= set(found)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_quadrature_is_exact_for_polynomials(n):
    """The weights integrate every polynomial of degree below n exactly, and add up to the (negative) length."""
    t = Path(25).t
    nodes, end = t[[2 * i for i in range(n)]], t[20]
    w = torch.tensor(quadrature(nodes, end), dtype=torch.float64)
    close(w.sum(), end - nodes[0])
    for degree in range(n):
        exact = (end ** (degree + 1) - nodes[0] ** (degree + 1)) / (degree + 1)
        torch.testing.assert_close((w * nodes**degree).sum(), exact, rtol=1e-10, atol=1e-12)


def legs(path, k, j, method):
    """Return {step: (weight, active or not, gradient scale)} and rho of each of the two legs."""
    found = []
    for start, end in ((k, j), (j, path.flow.bias.shape[0])):
        steps = [start + i for i in spread(end - start, method.order)]
        w = dict(zip(steps, quadrature(path.t[steps], path.t[end])))
        active = steps[: {"start": 1, "midpoint": 2, "all": None}[method.mode]]
        ratio = sum(abs(x) for x in w.values()) / sum(abs(w[i]) for i in active)
        found.append((w, active, 1 + method.rescale * (ratio - 1)))
    return found


@pytest.mark.parametrize("mode", ["start", "midpoint", "all"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("k", "j"), [(0, 1), (0, 4), (1, 3), (2, 4)])
def test_lagrange_closed_form(k, j, order, mode):
    """After j: w W2_i rho2 s_i g. Before: w W1_i rho1 s_i (I + alpha rho2 W2_j A)^T g; s_i = 1 for a leap's start."""
    path = Path()
    method = LagrangeAt(steps=N, at=(k, j), order=order, mode=mode, alpha=0.4, tau=0.05)
    (w1, active1, rho1), (w2, active2, rho2) = legs(path, k, j, method)
    leap_j = path.x[k] + sum(w * path.v[i] for i, w in w1.items())
    leap_0 = path.x[j] + sum(w * path.v[i] for i, w in w2.items())
    d_j, d_0 = ((a - b).abs().mean(1, keepdim=True) for a, b in ((path.x[j], leap_j), (path.x[N], leap_0)))
    w = 1 / (d_j.clamp(min=0.05) + d_0.clamp(min=0.05))
    early = path.back(path.g, -0.4 * rho2 * w2[j])
    rows = {i: w * w2[i] * rho2 * (1 if i == j else 0.25) * path.g for i in active2}
    rows |= {i: w * w1[i] * rho1 * (1 if i == k else 0.25) * early for i in active1}
    close(gradient(method), stacked(rows))


@pytest.mark.parametrize(("k", "j"), itertools.combinations(range(N), 2))
def test_lagrange_of_first_order_is_leapalign(k, j):
    """One support per leap is LeapAlign's straight leap: the same gradient, weight included."""
    lagrange = LagrangeAt(steps=N, at=(k, j), order=1, mode="start", rescale=0.0, alpha=0.3, tau=0.1)
    close(gradient(lagrange), gradient(LeapAt(steps=N, at=(k, j), alpha=0.3, tau=0.1)))


def test_without_anchor_the_first_leap_is_straight():
    """anchor = 0: from k to j only the start's velocity counts, with the whole length."""
    anchored = LagrangeAt(steps=N, at=(0, 3), order=3, anchor=0.0, mode="all", alpha=0.2, tau=100.0)
    actual, path = gradient(anchored), Path()
    (_, _, _), (w2, _, rho2) = legs(path, 0, 3, anchored)
    early = path.back(path.g, -0.2 * rho2 * w2[3])
    assert (actual[1:3] == 0).all()
    close(actual[0], (-(path.t[0] - path.t[3]) * early / 200).mean(0))


def test_lagrange_draws_three_parts():
    """Dirichlet: k < j < the last step, lengths near the concentration's shares; ``max_j`` and ``tail`` are kept."""
    method, rng = FlowBPLagrange(), seeded(0)
    draws = torch.tensor([method.draw(rng) for _ in range(2000)], dtype=torch.float64)
    k, j = draws.T
    assert ((k >= 0) & (k < j) & (j <= 23)).all()
    assert (24 - j).mean() / 25 == pytest.approx(2.5 / 10.5, abs=0.03)
    assert (j - k).mean() / 25 == pytest.approx(6.0 / 10.5, abs=0.03)
    bounded = FlowBPLagrange(max_j=10, tail=0.7)
    draws = [bounded.draw(rng) for _ in range(500)]
    assert min(k for k, _ in draws) >= 25 - 18
    assert min(j for _, j in draws) == 25 - 10
    uniform = FlowBPLagrange(pair="uniform")
    assert {uniform.draw(rng) for _ in range(5000)} == set(itertools.combinations(range(25), 2))


# ---- all of them

ALL = [
    BPTT(steps=N),
    SparseAt(steps=N, at=(0, 2, 4)),
    BridgeAt(steps=N, j=2, at=(0, 2, 3), alpha=0.5),
    LagrangeAt(steps=N, at=(0, 2)),
    LagrangeAt(steps=N, at=(1, 3), mode="all", order=2),
]


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_the_reward_sees_the_samplers_own_image(method):
    """Bitwise: neither the scaling of gradients nor the rebuilt path changes a value."""
    flow, reward = make_flow(), RewardLog()
    batch = make_batch(flow, range(B))
    backpropagate(method, flow, reward, batch)
    assert torch.equal(reward.seen[0], integrate(flow, batch.noise, flow.sigmas(N), batch.cond))


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_hinge(method):
    """Rewards above the margin give no gradient at all; all below it, the gradient of -R."""
    assert gradient(method, QuadraticReward(MU, margin=-1e6)).abs().max() == 0
    close(gradient(method, QuadraticReward(MU, margin=1e6)), gradient(method))


@pytest.mark.parametrize(
    ("method", "forward", "grad", "again"),
    [
        (BPTT(), 0, 25, 25),
        (FlowBPSparse(), 22, 3, 0),
        (FlowBPBridge(), 20, 5, 0),
        (LagrangeAt(steps=25, at=(3, 12)), 21, 4, 0),
        (LagrangeAt(steps=25, at=(11, 12)), 22, 3, 0),
        (LagrangeAt(steps=25, at=(3, 12), mode="start"), 23, 2, 0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_costs_per_image(method, forward, grad, again):
    """25 forwards in total, active ones with gradient and only once; BPTT repeats all its 25 in the backward pass."""
    flow, meter = AffineFlow(25), Meter()
    backpropagate(method, metered(flow, meter), metered_reward(REWARD, meter), make_batch(flow, range(2)))
    counted = (meter.nfe_forward, meter.nfe_grad, meter.nfe_recomputed, meter.decodes, meter.reward_calls)
    assert counted == (2 * forward, 2 * grad, 2 * again, 2, 2)
    assert gradients_of(flow)[0].abs().sum() > 0


def test_defaults_are_the_papers():
    """The released FLUX.1-dev settings."""
    sparse, bridge, lagrange = FlowBPSparse(), FlowBPBridge(), FlowBPLagrange()
    assert (sparse.k, sparse.late_bias, sparse.rescale, sparse.tail) == (3, 2.0, 1.0, 1.0)
    assert (bridge.k, bridge.late_bias, bridge.rescale, bridge.alpha) == (5, 2.0, 1.0, 0.1)
    assert (lagrange.alpha, lagrange.tau, lagrange.order, lagrange.mode) == (0.1, 0.2, 3, "midpoint")
    assert (lagrange.support_scale, lagrange.rescale, lagrange.concentration) == (0.25, 0.5, (2.5, 6.0, 2.0))


@pytest.mark.parametrize(
    ("method", "where"),
    [
        (FlowBPSparse(k=26), "method.k"),
        (FlowBPSparse(k=0), "method.k"),
        (FlowBPSparse(k=3, tail=0.05), "method.k"),
        (FlowBPSparse(tail=0.0), "method.tail"),
        (FlowBPSparse(late_bias=-1.0), "method.late_bias"),
        (FlowBPSparse(rescale=1.5), "method.rescale"),
        (FlowBPBridge(k=1), "method.k"),
        (FlowBPBridge(k=26), "method.k"),
        (FlowBPBridge(alpha=2.0), "method.alpha"),
        (FlowBPLagrange(order=0), "method.order"),
        (FlowBPLagrange(steps=2), "method.steps"),
        (FlowBPLagrange(tail=1.5), "method.tail"),
        (FlowBPLagrange(tau=0.0), "method.tau"),
        (FlowBPLagrange(max_j=1), "method.max_j"),
        (FlowBPLagrange(max_j=10, pair="uniform"), "method.max_j"),
        (FlowBPLagrange(concentration=(1.0, 0.0, 1.0)), "method.concentration"),
        (FlowBPLagrange(alpha=-0.1), "method.alpha"),
    ],
)
def test_impossible_settings_are_refused(method, where):
    """Impossible settings are refused in one line that names the setting, before anything runs."""
    with pytest.raises(UserError, match=f"^{where}: .*; choose ") as caught:
        method.check(1, True)
    assert "\n" not in str(caught.value)


class TestBPTT(MethodContract):
    method = BPTT(steps=5)


class TestFlowBPSparse(MethodContract):
    method = FlowBPSparse(steps=5)


class TestFlowBPBridge(MethodContract):
    method = FlowBPBridge(steps=5, k=3)


class TestFlowBPLagrange(MethodContract):
    method = FlowBPLagrange(steps=5)

"""The methods against their closed forms on an affine flow, in float64.

v(x, t_i) = A x + b_i + c, R(x) = -|x - mu|^2 / 2, so that -R has the gradient g(x) = x - mu, and one bias per step
shows which step is trained by how much. Gradients are means over the batch's samples.
"""

import functools
import itertools
from collections import Counter
from typing import ClassVar

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
    ReFLAt,
    RewardLog,
    close,
    gradient,
    make_flow,
    stacked,
)

from alignbench.analytic import AffineFlow, QuadraticReward
from alignbench.config import UserError
from alignbench.flow import integrate, seeded
from alignbench.method import Loss
from alignbench.methods.base import Base
from alignbench.methods.draft import DRaFTK, DRaFTLV
from alignbench.methods.drtune import DRTune
from alignbench.methods.leapalign import LeapAlign
from alignbench.methods.refl import ReFL
from alignbench.testing import MethodContract
from alignbench.testing.method_contract import backpropagate
from alignbench.training.batches import make_batch
from alignbench.training.meter import Meter, Watch, metered, metered_reward


def full_bptt(steps=N):
    """Return {i: -h_i lam_{i+1}} with lam_N = g(x_N), lam_i = (I - h_i A)^T lam_{i+1}."""
    path, rows = Path(steps), {}
    lam = path.g
    for i in reversed(range(steps)):
        rows[i] = -path.h[i] * lam
        lam = path.back(lam, path.h[i])
    return rows


# ---- closed forms


@pytest.mark.parametrize("k", range(1, N + 1))
def test_draft_k_is_truncated_back_propagation(k):
    """dL/db_i = -h_i lam_{i+1} for the last k steps, and exactly zero before."""
    expected = stacked({i: row for i, row in full_bptt().items() if i >= N - k})
    actual = gradient(DRaFTK(steps=N, k=k))
    close(actual, expected)
    assert (actual[: N - k] == 0).all()


def test_draft_n_is_autograd_through_a_plain_loop():
    """k = steps is exact back-propagation through the whole sampler."""
    flow = make_flow()
    batch = make_batch(flow, range(B))
    x, t = batch.noise, flow.sigmas(N)
    for i in range(N):
        x = x - (t[i] - t[i + 1]) * flow.velocity(x, t[i], batch.cond)
    (-REWARD(x, batch.prompts).mean()).backward()
    close(gradient(DRaFTK(steps=N, k=N)), flow.bias.grad)


@pytest.mark.parametrize("s", range(N))
def test_refl_trains_one_step_by_its_prediction(s):
    """dL/db_s = -t_s g(x0hat_s), exactly zero elsewhere; the reward sees x0hat_s."""
    path, reward = Path(), RewardLog()
    actual = gradient(ReFLAt(steps=N, s=s), reward)
    close(actual, stacked({s: -path.t[s] * (path.predicted(s) - MU)}))
    close(reward.seen[0], path.predicted(s))
    assert (actual[[i for i in range(N) if i != s]] == 0).all()


@pytest.mark.parametrize(
    ("trained", "stop"),
    [(s, e) for s in [(0,), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4)] for e in range(N) if min(s) <= e],
)
def test_drtune_sums_single_steps(trained, stop):
    """dL/db_i = -h_i g(x0hat_e) for trained i < e, -t_e g(x0hat_e) for a trained stop e; zero beyond the stop."""
    path, reward = Path(), RewardLog()
    g = path.predicted(stop) - MU
    rows = {i: -(path.h[i] if i < stop else path.t[stop]) * g for i in trained if i <= stop}
    close(gradient(DRTuneAt(steps=N, trained=trained, stop=stop), reward), stacked(rows))
    close(reward.seen[0], path.predicted(stop))


def test_drtune_has_no_jacobian_of_the_network():
    """With A trained too, dL/dA = -sum over trained steps of h_i g x_i^T: nothing flows through A x."""
    flow = make_flow()
    path = Path(flow=flow)
    flow.A.requires_grad_()
    gradient(DRTuneAt(steps=N, trained=(1, 3), stop=N - 1), flow=flow)
    g = path.predicted(N - 1) - MU
    close(flow.A.grad, -sum(path.h[i] * g.T @ path.x[i] for i in (1, 3)) / B)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("k", "j"), itertools.combinations(range(N), 2))
def test_leapalign_closed_form(k, j, alpha):
    """j: -w t_j g(x_N); k: -w (t_k - t_j) (I - alpha t_j A)^T g(x_N), w = 1 / (max(d_j, tau) + max(d_0, tau))."""
    path, tau = Path(), 0.1
    leap_j = path.x[k] - (path.t[k] - path.t[j]) * path.v[k]
    d_j = (path.x[j] - leap_j).abs().mean(1, keepdim=True)
    d_0 = (path.x[N] - path.predicted(j)).abs().mean(1, keepdim=True)
    w = 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))
    nested = path.back(path.g, alpha * path.t[j])
    rows = {j: -w * path.t[j] * path.g, k: -w * (path.t[k] - path.t[j]) * nested}
    close(gradient(LeapAt(steps=N, at=(k, j), alpha=alpha, tau=tau)), stacked(rows))


def test_draft_lv_closed_form():
    """Last sigma t: -t g(x_N), and every copy x' adds -t (x' - t (A x' + b + c) - mu); no other step is trained."""
    path, flow = Path(), make_flow()
    t, batch = path.t[N - 1], make_batch(flow, range(B))
    row = -t * path.g
    for _ in range(2):
        x = (1 - t) * path.x[N] + t * batch.randn_like(path.x[N])
        row = row - t * (x - t * flow.velocity(x, t, batch.cond).detach() - MU)
    close(gradient(DRaFTLV(steps=N)), stacked({N - 1: row}))
    close(gradient(DRaFTLV(steps=N, lv_reduction="mean")), stacked({N - 1: row / 3}))


# ---- identities


def test_four_names_of_the_last_step():
    """DRaFT-1 = ReFL(last) = DRTune({last}) = DRaFT-LV without copies."""
    draft = gradient(DRaFTK(steps=N, k=1))
    close(gradient(ReFLAt(steps=N, s=N - 1)), draft)
    close(gradient(DRTuneAt(steps=N, trained=(N - 1,), stop=N - 1)), draft)
    close(gradient(DRaFTLV(steps=N, n=0)), draft)


def test_drtune_on_all_steps_moves_a_shared_bias_by_minus_g():
    """Trained everywhere without an early stop, the steps' gradients add up to -g(x_N): the h_i sum to one."""
    total = gradient(DRTuneAt(steps=N, trained=tuple(range(N)), stop=N - 1)).sum(0)
    close(total, -Path().g.mean(0))


@pytest.mark.parametrize(("k", "j"), itertools.combinations(range(N), 2))
def test_leapalign_rewards_the_samplers_own_image(k, j):
    """The rewarded latent is the plain sampler's, bitwise: connectors and discount change no value."""
    flow, reward = make_flow(), RewardLog()
    batch = make_batch(flow, range(B))
    backpropagate(LeapAt(steps=N, at=(k, j)), flow, reward, batch)
    assert torch.equal(reward.seen[0], integrate(flow, batch.noise, flow.sigmas(N), batch.cond))


@pytest.mark.parametrize("tau", [0.1, 0.25])
def test_leapalign_in_two_steps_is_exact(tau):
    """Two steps and alpha = 1 equal exact back-propagation, alpha = 0 equals DRTune(all); w is 1 / (2 tau)."""
    exact = gradient(LeapAlign(steps=2, alpha=1.0, tau=tau)) * 2 * tau
    close(exact, gradient(DRaFTK(steps=2, k=2)))
    close(exact, stacked(full_bptt(2), 2))
    flat = gradient(LeapAlign(steps=2, alpha=0.0, tau=tau)) * 2 * tau
    close(flat, gradient(DRTuneAt(steps=2, trained=(0, 1), stop=1)))


def test_straight_trajectories_have_no_nested_gradient():
    """A = 0 and equal biases: leaps are exact (d = 0, w = 1 / (2 tau)), and alpha makes no difference."""
    gradients = []
    for alpha in (0.0, 0.3, 1.0):
        flow = AffineFlow(N)
        flow.A.zero_()
        (loss,) = backpropagate(LeapAlign(steps=N, alpha=alpha), flow, REWARD, make_batch(flow, range(B)))
        assert loss.metrics["leap_miss_j"] < 1e-14
        assert loss.metrics["leap_miss_0"] < 1e-14
        assert loss.metrics["weight"] == pytest.approx(5.0, rel=1e-12)
        gradients.append(flow.bias.grad)
    close(gradients[0], gradients[1])
    close(gradients[0], gradients[2])


@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
def test_leapalign_weight_is_bounded_and_falls_with_distance(tau):
    """0 < w <= 1 / (2 tau), with equality once tau exceeds both distances."""
    (loss,) = backpropagate(LeapAt(steps=N, at=(1, 3), tau=tau), make_flow(), REWARD, make_batch(make_flow(), range(B)))
    assert 0 < loss.metrics["weight"] <= 1 / (2 * tau) * (1 + 1e-12)
    if tau == 10.0:
        assert loss.metrics["weight"] == pytest.approx(1 / 20, rel=1e-12)


PATHWISE = [
    ReFL(steps=N, last_n=3),
    DRaFTK(steps=N, k=2),
    DRaFTLV(steps=N),
    DRTune(steps=N, m=3),
    LeapAlign(steps=N),
]


@pytest.mark.parametrize("method", PATHWISE, ids=lambda m: m.name)
def test_hinge(method):
    """Rewards above the margin give no gradient at all; all below it, the gradient of -R."""
    closed, opened = QuadraticReward(MU, margin=-1e6), QuadraticReward(MU, margin=1e6)
    assert gradient(method, closed).abs().max() == 0
    close(gradient(method, opened), gradient(method))
    for reward, share in ((closed, 1), (opened, 0)):
        watch = Watch()
        gradient(method, metered_reward(reward, Meter(), watch))
        assert watch.reward_means(reward)["hinge_closed"] == share


# ---- draws


def test_refl_draws_the_last_n_steps():
    """Over many draws exactly the last 11 of 25 steps appear."""
    rng, method = seeded(0), ReFL()
    assert {method.draw(rng) for _ in range(500)} == set(range(14, 25))


def test_leapalign_draws_every_pair_equally_and_never_the_image():
    """k < j, both executed steps: all 300 pairs appear, each as often as chance allows."""
    rng, method = seeded(0), LeapAlign()
    draws = Counter(method.draw(rng) for _ in range(30_000))
    assert set(draws) == set(itertools.combinations(range(25), 2))
    assert max(abs(n - 100) for n in draws.values()) < 50  # five standard deviations


def test_drtune_draws_the_papers_steps():
    """Two steps 12 apart, the later one among the last 13; the stop among the last 11; one at least is executed."""
    rng, method = seeded(0), DRTune()
    draws = [method.draw(rng) for _ in range(2000)]
    assert {tuple(sorted(trained)) for trained, _ in draws} == {(i, i + 12) for i in range(13)}
    assert {stop for _, stop in draws} == set(range(14, 25))


@pytest.mark.parametrize("settings", [{"k": 1}, {"k": 3, "draw_in_prefix": True}, {"k": 1, "m": 25}])
def test_drtune_always_trains_a_step(settings):
    """Whatever the settings, no draw leaves all trained steps beyond the stop; in the prefix, none is."""
    rng, method = seeded(0), DRTune(**settings)
    for _ in range(1000):
        trained, stop = method.draw(rng)
        assert len(trained) == method.k
        assert set(range(25)) >= trained
        assert (max if method.draw_in_prefix else min)(trained) <= stop


# ---- costs


@pytest.mark.parametrize(
    ("method", "batch", "forward", "grad", "decodes"),
    [
        (ReFLAt(s=14), 2, 14, 1, 1),
        (ReFLAt(s=24), 2, 24, 1, 1),
        (DRaFTK(k=1), 2, 24, 1, 1),
        (DRaFTK(k=10), 2, 15, 10, 1),
        (DRaFTLV(), 2, 24, 3, 3),
        (DRTuneAt(trained=(3, 15), stop=14), 2, 14, 1, 1),
        (DRTuneAt(trained=(3, 15), stop=20), 2, 19, 2, 1),
        (LeapAlign(), 2, 23, 2, 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_costs_per_image(method, batch, forward, grad, decodes):
    """Forwards without and with gradient, decodes and rewards per image are the published ones."""
    flow, meter = make_flow(method.steps), Meter()
    counting, reward = metered(flow, meter), metered_reward(REWARD, meter)
    for losses in method.updates(counting, reward, make_batch(flow, range(batch))):
        for loss in losses:
            loss.value.backward()
    counted = (meter.nfe_forward, meter.nfe_grad, meter.decodes, meter.reward_calls)
    assert counted == (batch * forward, batch * grad, batch * decodes, batch * decodes)


# ---- settings


def test_defaults_are_the_papers():
    """Defaults are those for FLUX.1-dev: LeapAlign alpha 0.3, tau 0.1, 25 steps; the baselines of its appendix E."""
    leap = LeapAlign()
    assert (leap.alpha, leap.tau, leap.steps) == (0.3, 0.1, 25)
    assert (ReFL().last_n, DRaFTLV().n, DRaFTLV().lv_reduction) == (11, 2, "sum")
    assert (DRTune().k, DRTune().m, DRTune().draw_in_prefix) == (2, 11, False)


@pytest.mark.parametrize(
    ("method", "batch", "where"),
    [
        (LeapAlign(steps=1), 1, "method.steps"),
        (LeapAlign(alpha=1.5), 1, "method.alpha"),
        (LeapAlign(tau=0.0), 1, "method.tau"),
        (ReFL(steps=0), 1, "method.steps"),
        (ReFL(steps=10, last_n=11), 1, "method.last_n"),
        (DRaFTK(k=26), 1, "method.k"),
        (DRaFTK(k=0), 1, "method.k"),
        (DRaFTLV(n=-1), 1, "method.n"),
        (DRTune(k=26), 1, "method.k"),
        (DRTune(k=16, draw_in_prefix=True), 1, "method.k"),
        (DRTune(m=26), 1, "method.m"),
    ],
)
def test_impossible_settings_are_refused(method, batch, where):
    """Impossible settings are refused in one line that names the setting, before anything runs."""
    with pytest.raises(UserError, match=f"^{where}: .*; choose ") as caught:
        method.check(batch, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", PATHWISE, ids=lambda m: m.name)
def test_direct_gradients_need_a_differentiable_reward(method):
    """A pathwise method refuses a reward without gradient."""
    with pytest.raises(UserError, match=r"^reward: "):
        method.check(1, False)
    method.check(1, True)


def test_base_trains_nothing():
    """The base model is a row like the others, with nothing to train."""
    assert Base.trains is False
    Base().check(7, False)


# ---- what training relies on, and that the contract sees it when it is broken


class Unlawful(ReFL):
    """A ReFL that breaks a promise."""

    steps: int = 4
    last_n: int = 2


class ReadsGlobalGenerator(Unlawful):
    def loss(self, flow, reward, batch):
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value * torch.rand(()), metrics)


class ForgetsToAverage(Unlawful):
    def loss(self, flow, reward, batch):
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value * len(batch), metrics)


class SharesOneGenerator(Unlawful):
    def loss(self, flow, reward, batch):
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value * torch.rand((), generator=batch.rngs[0]), metrics)


class AsksTheSamples(Unlawful):
    def loss(self, flow, reward, batch):
        if batch.noise.sum() > 0:
            flow.velocity(batch.noise, 1.0, batch.cond)
        return super().loss(flow, reward, batch)


class DrawsBySample(Unlawful):
    def loss(self, flow, reward, batch):
        torch.rand(int(batch.noise.abs().sum() * 10), generator=batch.step_rng)
        return super().loss(flow, reward, batch)


class Descends(Unlawful):
    def loss(self, flow, reward, batch):
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(-value, metrics)


class LosesTheGraph(Unlawful):
    def loss(self, flow, reward, batch):
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value.detach() + 0 * sum(p.sum() for p in flow.parameters()), metrics)


class Forgets(Unlawful):
    """A method with a count that checkpoints do not hold."""

    @functools.cached_property
    def seen(self):
        return []

    def loss(self, flow, reward, batch):
        self.seen.append(1)
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value, metrics | {"seen": float(len(self.seen))})


class GoesAroundTheMeter(Unlawful):
    def loss(self, flow, reward, batch):
        getattr(flow, "_flow", flow).velocity(batch.noise, 1.0, batch.cond)
        return super().loss(flow, reward, batch)


class RemembersForEver(Unlawful):
    """A method with a count that outlives the run."""

    seen: ClassVar[list[int]] = []

    def loss(self, flow, reward, batch):
        self.seen.append(1)
        value, metrics, _ = super().loss(flow, reward, batch)
        return Loss(value, metrics | {"seen": float(len(self.seen))})


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (ReadsGlobalGenerator(), "test_randomness_comes_from_the_batch_alone"),
        (ForgetsToAverage(), "test_one_batch_equals_its_micro_batches"),
        (SharesOneGenerator(), "test_one_batch_equals_its_micro_batches"),
        (AsksTheSamples(), "test_network_calls_do_not_depend_on_the_samples"),
        (DrawsBySample(), "test_network_calls_do_not_depend_on_the_samples"),
        (Descends(), "test_training_raises_the_reward"),
        (LosesTheGraph(), "test_losses_are_finite_and_reach_the_parameters"),
        (Forgets(), "test_resuming_is_exact"),
        (GoesAroundTheMeter(), "test_the_meter_sees_every_call"),
        (RemembersForEver(), "test_a_repeated_run_is_the_same"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ReFL) else value,
)
def test_the_contract_sees_broken_promises(broken, promise, tmp_path):
    """Each promise fails for a method that breaks it."""
    contract = MethodContract()
    contract.method = broken
    check = getattr(contract, promise)
    with pytest.raises(AssertionError):
        check(tmp_path) if promise == "test_resuming_is_exact" else check()


class TestReFL(MethodContract):
    method = ReFL(steps=5, last_n=3)


class TestDRaFTK(MethodContract):
    method = DRaFTK(steps=5, k=3)


class TestDRaFTLV(MethodContract):
    method = DRaFTLV(steps=5)


class TestDRTune(MethodContract):
    method = DRTune(steps=5, m=3)


class TestLeapAlign(MethodContract):
    method = LeapAlign(steps=5)

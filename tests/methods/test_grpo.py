"""The policy-gradient methods against their closed forms, in float64.

At t with noise sig and step h, a move is mean + s xi with s = sig sqrt(h), and the mean follows the velocity by
-h kappa, kappa = 1 + sig^2 (1 - t) / (2 t).
"""

import dataclasses
import itertools
import math

import pytest
import torch

from alignbench.analytic import AffineFlow, CallLog, GaussianFlow, Quadratic, QuadraticReward
from alignbench.config import UserError
from alignbench.evaluator import Reward, Term
from alignbench.flow import euler, integrate, integrate_sde, log_normal, sde_step, seeded
from alignbench.method import GatherBatch, Loss, each_update
from alignbench.methods.dancegrpo import DanceGRPO
from alignbench.methods.flowgrpo import FlowGRPO
from alignbench.methods.mixgrpo import MixGRPO, dpm_solver, thinned
from alignbench.policy import kl_divergence
from alignbench.testing import MethodContract
from alignbench.testing.method_contract import backpropagate
from alignbench.training.batches import make_batch
from alignbench.training.meter import Meter, metered, metered_reward

N, GROUP, MU = 5, 4, 1.0
REWARD = QuadraticReward(MU)
TWO = Reward(Term(Quadratic(target=MU), weight=2.0), Term(Quadratic(target=2.0)))
SMALL = {"steps": N, "group": GROUP, "shift": None}  # for an AffineFlow of N steps
DANCE = DanceGRPO(**SMALL, updates_per_rollout=1)
FLOW = FlowGRPO(**SMALL, updates_per_rollout=1, beta=0.0)
MIX = MixGRPO(**SMALL, updates_per_rollout=1, window=2, iters_per_window=1)
FLASH = MixGRPO(**SMALL, updates_per_rollout=1, window=2, strategy="frozen", compress=0.7)


class Constant(QuadraticReward):
    """A reward that gives all images the same score."""

    def __call__(self, pixels, prompts):
        return torch.full((1, len(pixels)), 0.3)


class MLPFlow(AffineFlow):
    """A nonlinear float32 network on the same latents, which are float32 too."""

    def __init__(self):
        super().__init__(N)
        g = seeded("MLPFlow")
        self.first = torch.nn.Parameter(torch.randn(4, 64, generator=g))
        self.second = torch.nn.Parameter(torch.randn(64, 3, generator=g))

    def noise(self, n, generators):
        return super().noise(n, generators).float()

    def velocity(self, x, sigma, cond, *, reference=False):
        t = torch.as_tensor(sigma, dtype=torch.float32).expand(len(x))[:, None]
        return torch.tanh(torch.cat([x, t], 1) @ self.first) @ self.second


def make_flow(steps=N):
    """Return an affine flow whose biases are not zero, as after training; those of its base model are."""
    flow = AffineFlow(steps)
    with torch.no_grad():
        flow.bias.normal_(generator=seeded("bias", steps))
    return flow


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def total_gradient(method, flow, reward=REWARD, samples=2 * GROUP):
    """Return the gradient of the mean over a rollout's updates, without an optimizer step between them."""
    updates = list(each_update(method, flow, reward, make_batch(flow, range(samples))))
    for loss in itertools.chain.from_iterable(updates):
        (loss.value / len(updates)).backward()
    return flow.bias.grad


def at_step(step, flow=None):
    return dataclasses.replace(make_batch(flow or make_flow(), range(GROUP)), step=step)


def kappa(t, sig):
    return 1 + sig**2 * (1 - t) / (2 * t)


# ---- advantages

ONE = torch.ones(1)


def advantages(method, rewards, everyone=None):
    """Return the advantages of one reward."""
    return method.advantages(rewards[None], ONE, everyone)


@pytest.mark.parametrize("method", [DanceGRPO(), FlowGRPO(), FlowGRPO(std="group")])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 27.123456789])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_exactly_zero_advantage(method, value, dtype):
    """Equal rewards give exactly zero, even where the rounded mean of twelve equal numbers is not that number."""
    rewards = torch.full((2, 12), value, dtype=dtype)
    everyone = rewards.double().view(1, 1, -1) if method.std == "batch" else None
    assert (advantages(method, rewards, everyone) == 0).all()


def test_advantages_are_normalised_within_each_group():
    """Zero mean and unit standard deviation per group; shift and scale of the rewards do not matter; clipped to 5."""
    rewards = torch.randn(3, 12, generator=seeded(0), dtype=torch.float64)
    a = advantages(DanceGRPO(), rewards)
    close(a.sum(1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(a.std(1), torch.ones(3, dtype=torch.float64), rtol=1e-7, atol=0)  # eps is 1e-8
    torch.testing.assert_close(advantages(DanceGRPO(), 7 + 3 * rewards), a, rtol=1e-6, atol=1e-6)
    lone = torch.zeros(1, 100)
    lone[0, 0] = 1.0
    assert advantages(DanceGRPO(), lone).max() == 5


def test_several_rewards_are_normalised_each_and_then_summed():
    """A = sum of w_m A_m, clipped at the end; a reward's shift and scale do not matter; weights only by their ratio."""
    rewards = torch.randn(2, 3, 12, generator=seeded(0), dtype=torch.float64)
    weights = torch.tensor([term.weight for term in TWO.terms], dtype=torch.float64)
    close(weights, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    a = MixGRPO().advantages(rewards, weights)
    close(a, sum(w * advantages(MixGRPO(), r) for w, r in zip(weights, rewards)))
    scaled = torch.stack([5 + 100 * rewards[0], 0.01 * rewards[1] - 3])
    torch.testing.assert_close(MixGRPO().advantages(scaled, weights), a, rtol=1e-5, atol=1e-6)
    heavier = Reward(*(term._replace(weight=10 * term.weight) for term in TWO.terms))
    close(total_gradient(MIX, make_flow(), heavier), total_gradient(MIX, make_flow(), TWO))


def test_rewards_can_be_summed_before_they_are_normalised():
    """``aggregate: reward`` is the one reward w_1 R_1 + w_2 R_2, and another gradient than summed advantages."""

    class Summed(QuadraticReward):
        def __call__(self, pixels, prompts):
            return TWO.value(TWO(pixels, prompts))[None]

    for cls in (DanceGRPO, FlowGRPO, MixGRPO):
        settings = {**SMALL, "updates_per_rollout": 1}
        summed = total_gradient(cls(**settings, aggregate="reward"), make_flow(), TWO)
        close(summed, total_gradient(cls(**settings), make_flow(), Summed()))
        assert (summed - total_gradient(cls(**settings), make_flow(), TWO)).abs().max() > 1e-6


def test_flow_grpo_measures_rewards_in_units_of_the_whole_batch():
    """A = (r - mean of the group) / (deviation of all rewards + 1e-4), per reward; what comes back decides the unit."""
    flow, batch = make_flow(), make_batch(make_flow(), range(2 * GROUP))
    updates = FLOW.updates(flow, TWO, batch)
    pools = [next(updates), updates.send(torch.tensor([0.0, 2.0]))]
    assert all(isinstance(pool, GatherBatch) and pool.values.shape == (2 * GROUP,) for pool in pools)
    assert not isinstance(updates.send(torch.tensor([0.0, 2.0])), GatherBatch)
    rewards = torch.stack([pool.values.view(2, GROUP) for pool in pools])
    everyone = torch.tensor([0.0, 2.0], dtype=torch.float64).expand(2, 1, 2)
    a = FLOW.advantages(rewards, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64), everyone)
    units = (rewards - rewards.mean(-1, keepdim=True)) / (1 + 1e-4)
    torch.testing.assert_close(a, ((2 * units[0] + units[1]) / 3).clamp(-5, 5), rtol=1e-12, atol=1e-12)
    alone = FlowGRPO(**SMALL, std="group").updates(flow, REWARD, batch)
    assert not isinstance(next(alone), GatherBatch)


def test_equal_rewards_give_no_policy_gradient():
    """A group whose images all have the same score has exactly zero gradient."""
    for method in (DANCE, FLOW, MIX, FLASH):
        assert total_gradient(method, make_flow(), Constant()).abs().max() == 0


# ---- noise


def test_noise_levels():
    """Dance-SDE: eta. Flow-SDE: eta sqrt(t / (1 - t)), at t = 1 sqrt(1 / (1 - t_1)). No move outside has noise."""
    t = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64)
    close(DANCE.levels(t), torch.full((N,), 0.3, dtype=torch.float64))
    close(FLOW.levels(t), 0.7 * torch.tensor([5, 4, 1, 1 / 4, 1 / 9], dtype=torch.float64).sqrt())
    flow = make_flow()
    for method, noisy in ((DANCE, {0, 1, 2, 3, 4}), (FLOW, {0, 1, 2, 3}), (MIX, {2, 3})):
        schedule = method.schedule(flow, at_step(2))
        assert set(schedule.eta.nonzero().flatten().tolist()) == noisy
        inside = list(schedule.noisy)
        assert torch.equal(schedule.eta[inside], method.levels(schedule.t)[inside])


@pytest.mark.parametrize(
    ("method", "variances"),
    [
        (DanceGRPO(), (0.195, 0.226, 0.244, 0.249)),
        (FlowGRPO(), (0.230, 0.244, 0.250, 0.251)),
        (FlowGRPO(eta=math.sqrt(2)), (0.254, 0.251, 0.250, 0.250)),  # the memoryless one
    ],
)
def test_every_schedule_keeps_the_marginals(method, variances):
    """On data N(0, 1/4) the sampler's variance, propagated exactly over the linear grid, tends to the data's."""
    flow, one = GaussianFlow(std=0.5, dim=1), torch.ones(1, 1, dtype=torch.float64)
    cond, found = flow.encode(["x"]), []
    for steps in (10, 25, 100, 1000):
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        variance = 1.0
        for at, to, eta in zip(t[:-1], t[1:], method.levels(t)):
            factor, std = sde_step(one, flow.velocity(one, at, cond), at, to, eta)  # linear: x = 1 gives the factor
            variance = factor.item() ** 2 * variance + std.item() ** 2
        found.append(variance)
    assert found == pytest.approx(variances, abs=5.1e-4)


def test_flow_sde_has_its_simple_form():
    """mean = x (1 - h eta^2 / (2 (1 - t))) - (1 + eta^2 / 2) h v for t < 1, the paper's own form."""
    x, v = torch.randn(2, 4, 3, generator=seeded(0), dtype=torch.float64)
    t = torch.tensor([1.0, 0.7, 0.6, 0.0], dtype=torch.float64)
    h, eta = 0.1, 0.7
    mean, std = sde_step(x, v, t[1], t[2], FlowGRPO(steps=3).levels(t)[1])
    close(mean, x * (1 - h * eta**2 / (2 * (1 - 0.7))) - (1 + eta**2 / 2) * h * v)
    close(std.item(), eta * math.sqrt(0.7 / 0.3 * h))


@pytest.mark.parametrize("method", [DANCE, FLOW, MIX], ids=lambda m: m.name)
def test_log_prob_of_the_rollout_is_that_of_its_noise(method):
    """The stored likelihood of a move is -mean(xi^2) / 2 - log s - log(2 pi) / 2; 0 for a move without noise."""
    flow, batch = make_flow(), at_step(2)
    schedule = method.schedule(flow, batch)
    path = method.rollout(flow, batch, schedule)
    draws, t = make_batch(flow, range(GROUP)), schedule.t
    for i in range(N):
        if i not in schedule.noisy:
            assert (path.log_prob[:, i] == 0).all()
            continue
        xi = draws.randn_like(batch.noise)
        s = schedule.eta[i] * (t[i] - t[i + 1]).sqrt()
        close(path.log_prob[:, i], -xi.square().mean(1) / 2 - s.log() - math.log(2 * math.pi) / 2)


# ---- the objective


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(2.0, 1.001, 0.0), (2.0, 0.999, 2.0), (-2.0, 0.999, 0.0), (-2.0, 1.001, -2.0), (2.0, 1.0, 2.0), (-2.0, 1.0, -2.0)],
)
def test_clipping_stops_only_what_has_moved_the_right_way(advantage, ratio, slope):
    """The gradient is A while the ratio is inside or on the wrong side; zero once it is outside on the right side."""
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    DanceGRPO().gain(torch.tensor([advantage], dtype=torch.float64), rho).sum().backward()
    assert rho.grad.item() == slope


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("method", [DANCE, FLOW, MIX, FLASH], ids=lambda m: f"{m.name}-{getattr(m, 'compress', 1.0)}")
def test_ratio_is_exactly_one_before_the_first_update(method, parts):
    """On policy the recomputed likelihoods are the rollout's to the last bit, float32 networks included."""
    settings = {f: getattr(method, f) for f in method.__struct_fields__} | {"updates_per_rollout": parts}
    method = type(method)(**settings)
    for flow in (make_flow(), MLPFlow()):
        for losses in each_update(method, flow, REWARD, make_batch(flow, range(8))):
            assert all(loss.metrics["ratio_off"] == 0 for loss in losses)


@pytest.mark.parametrize("method", [DANCE, FLOW, MIX], ids=lambda m: m.name)
def test_policy_gradient_closed_form(method):
    """dL/dv = A xi sqrt(h) kappa / (sig d), a mean over samples and trained moves; zero for every other move."""
    flow, step = make_flow(), 1
    batch = dataclasses.replace(make_batch(flow, range(2 * GROUP)), step=step)
    (part,) = method.parts(batch)
    schedule = method.schedule(flow, part)
    path, t = method.rollout(flow, part, schedule), schedule.t
    rewards = REWARD(path.x_0, part.prompts)[0].view(2, GROUP)
    unit = rewards.std(1, keepdim=True) + 1e-8 if method is not FLOW else rewards.std(correction=0) + 1e-4
    a = ((rewards - rewards.mean(1, keepdim=True)) / unit).flatten()
    moves, expected = method.moves(part, schedule.noisy), torch.zeros_like(flow.bias)
    for b, i in [(b, i) for row in moves.tolist() for b, i in enumerate(row)]:
        x, h, sig = path.states[b : b + 1, i], t[i] - t[i + 1], schedule.eta[i]
        v = flow.velocity(x, t[i], part.cond[b : b + 1]).detach()
        mean = x - h * v - sig**2 * h / (2 * t[i]) * (x + (1 - t[i]) * v)
        xi = ((path.states[b : b + 1, i + 1] - mean) / (sig * h.sqrt()))[0]
        expected[i] += a[b] * xi * h.sqrt() * kappa(t[i], sig) / (sig * flow.dim) / moves.numel()
    backpropagate(method, flow, REWARD, dataclasses.replace(make_batch(flow, range(2 * GROUP)), step=step))
    torch.testing.assert_close(flow.bias.grad, expected.detach(), rtol=1e-9, atol=1e-12)
    assert flow.bias.grad[moves.unique()].abs().sum(1).min() > 0


def test_the_last_move_is_never_trained():
    """The move to sigma = 0 is not trained: the gradient of the last step's bias is zero, those of others are not."""
    whole = MixGRPO(**SMALL, updates_per_rollout=1, window=N - 1)
    for method in (DanceGRPO(**SMALL, updates_per_rollout=1, timestep_fraction=1.0), FLOW, whole):
        gradient = total_gradient(method, make_flow())
        assert (gradient[-1] == 0).all()
        assert (gradient[:-1].abs().sum(1) > 0).all()


def test_updates_of_a_rollout_partition_its_samples():
    """Three updates see each sample once, the same share of every group, and their gradients average to the whole's."""
    for cls in (DanceGRPO, FlowGRPO, MixGRPO):
        settings = {**SMALL, "group": 6}
        whole = total_gradient(cls(**settings, updates_per_rollout=1), make_flow(), samples=12)
        parts = make_flow()
        rows = CallLog(parts)
        gradient = total_gradient(cls(**settings, updates_per_rollout=3), rows, samples=12)
        torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-12)
        assert {n for n, _, _ in rows.calls} == {4}


@pytest.mark.parametrize("method", [DANCE, FLOW], ids=lambda m: m.name)
def test_groups_share_their_prompt_and_if_asked_their_noise(method):
    """Every sample of a group has its first one's prompt and text; DanceGRPO's also start from its noise."""
    flow = make_flow()
    batch = make_batch(flow, range(2 * GROUP))
    (part,) = method.parts(batch)
    assert [p.id for p in part.prompts] == [batch.prompts[b // GROUP * GROUP].id for b in range(2 * GROUP)]
    assert torch.equal(part.cond.tensors["shift"], batch.grouped(GROUP).cond.tensors["shift"])
    assert torch.equal(part.noise, batch.grouped(GROUP).noise if method is DANCE else batch.noise)


# ---- the KL term


def test_divergence_is_h_times_the_true_one():
    """mean((m - m_ref)^2) / (2 sig^2) = h KL(N(m, sig^2 h) || N(m_ref, sig^2 h)), averaged over the latent."""
    mean, base = torch.randn(2, 4, 3, 5, generator=seeded(0), dtype=torch.float64)
    sig, h = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64), 0.07
    s = (sig * math.sqrt(h)).view(4, 1, 1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, s), torch.distributions.Normal(base, s))
    close(kl_divergence(mean, base, sig), h * kl.mean((1, 2)))


def test_kl_closed_form():
    """For velocities that differ by b: KL = h^2 kappa^2 mean(b^2) / (2 sig^2), and beta times its gradient is added."""
    method = FlowGRPO(**SMALL, updates_per_rollout=1, beta=0.04)
    flow = make_flow()
    losses = backpropagate(method, flow, Constant(), make_batch(flow, range(2 * GROUP)))
    t = flow.sigmas(N)
    h, sig = t[: N - 1] - t[1:N], method.levels(t)[: N - 1]
    scale = (h * kappa(t[: N - 1], sig) / sig).square()
    b = flow.bias.detach()[: N - 1]
    close(torch.stack([loss.metrics["kl"] for loss in losses]), scale * b.square().mean(1) / 2)
    close(flow.bias.grad[: N - 1], 0.04 * scale[:, None] * b / flow.dim / (N - 1))
    assert (flow.bias.grad[N - 1] == 0).all()


def test_without_kl_the_base_model_is_never_called():
    """beta = 0: no call of the reference. beta > 0: as many as trained moves, without gradient, and the term pulls."""
    for beta, calls in ((0.0, 0), (0.04, FLOW.trained)):
        flow = CallLog(make_flow())
        backpropagate(FlowGRPO(**SMALL, updates_per_rollout=1, beta=beta), flow, REWARD, make_batch(flow, range(GROUP)))
        reference = [gradient for _, gradient, reference in flow.calls if reference]
        assert reference == [False] * calls


# ---- DanceGRPO


def plain_dance(method, flow, reward, batch):
    """DanceGRPO's updates for one reward, written straight through: rollout, advantages, drawn moves, surrogate."""
    batch, t = batch.grouped(method.group), method.grid(flow)
    share = method.group // method.updates_per_rollout
    shares = torch.arange(len(batch)).view(-1, method.updates_per_rollout, share)
    parts = [batch.select(shares[:, u].flatten()) for u in range(method.updates_per_rollout)]
    paths = [integrate_sde(flow, part, t, method.eta) for part in parts]
    with torch.no_grad():
        scores = [reward.value(reward(flow.decode(path.x_0), part.prompts)) for part, path in zip(parts, paths)]
    rewards = torch.stack([score.view(-1, share) for score in scores], 1)
    r = rewards.flatten(1).double()
    r = r - r[:, :1]
    a = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)).clamp(-5, 5).view_as(rewards)
    for u, (part, path) in enumerate(zip(parts, paths)):
        yield plain_losses(method, flow, t, part, path, a[:, u].flatten().to(path.log_prob.dtype))


def plain_losses(method, flow, t, part, path, a):
    order = torch.stack([torch.randperm(method.steps - 1, generator=rng) for rng in part.rngs])
    rows = torch.arange(len(part))
    for i in order.T[: method.trained]:
        at, to = t[i].to(part.noise), t[i + 1].to(part.noise)
        x, x_next = path.states[rows, i], path.states[rows, i + 1]
        mean, std = sde_step(x, flow.velocity(x, at, part.cond), at, to, method.eta)
        ratio = (log_normal(x_next, mean, std) - path.log_prob[rows, i]).exp()
        gain = torch.minimum(a * ratio, a * ratio.clamp(1 - method.clip, 1 + method.clip))
        yield Loss(-gain.mean() / method.trained)


def stepped(flow, updates):
    """The values of all losses, with a gradient step after each update."""
    values = []
    for losses in updates:
        for loss in losses:
            loss.value.backward()
            values.append(loss.value.item())
        with torch.no_grad():
            for p in flow.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
    return values


@pytest.mark.parametrize("make", [make_flow, MLPFlow])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_dance_grpo_is_the_plain_algorithm_bitwise(make, shift):
    """Losses and weights over three updates with a step after each equal a straight implementation's, to the bit."""
    method = DanceGRPO(steps=N, group=6, shift=shift)
    shared, plain = make(), make()
    found = stepped(shared, each_update(method, shared, REWARD, make_batch(shared, range(12))))
    assert found == stepped(plain, plain_dance(method, plain, REWARD, make_batch(plain, range(12))))
    assert len(set(found)) > method.trained  # the later updates are off policy
    assert all(torch.equal(p, q) for p, q in zip(shared.parameters(), plain.parameters()))


# ---- MixGRPO


def test_the_window_slides_by_one_every_25_batches():
    """Over the paper's 300 batches l goes 0, ..., 11; it starts again at the noise after the last whole window."""
    starts = [MixGRPO().noisy(at_step(step)).start for step in range(1100)]
    assert starts[:300] == [step // 25 for step in range(300)]
    assert max(starts) == 20  # moves 20 to 23: the last of the 25, number 24, is never noisy
    assert starts == [step // 25 % 21 for step in range(1100)]
    assert MixGRPO().noisy(at_step(299)) == range(11, 15)
    strides = [MixGRPO(stride=4, iters_per_window=1).noisy(at_step(step)).start for step in range(8)]
    assert strides == [0, 4, 8, 12, 16, 20, 0, 4]


def test_a_frozen_window_stays_and_a_random_one_goes_everywhere():
    """frozen: always the first moves. random: every whole window before the last move, from the step's generator."""
    assert {MixGRPO(strategy="frozen").noisy(at_step(step)) for step in range(60)} == {range(4)}
    flow, method = make_flow(), MixGRPO(strategy="random")
    drawn = [method.noisy(make_batch(flow, [0], step)) for step in range(400)]
    assert {window.start for window in drawn} == set(range(21))
    assert all(len(window) == 4 for window in drawn)
    assert drawn == [method.noisy(make_batch(flow, [1], step)) for step in range(400)]


def test_a_group_parts_inside_the_window():
    """Two samples with the same noise are the same, bitwise, up to the window, and differ after its first move."""
    flow, batch = make_flow(), dataclasses.replace(make_batch(make_flow(), range(GROUP)), step=2)
    (part,) = MIX.parts(batch)
    schedule = MIX.schedule(flow, part)
    assert schedule.noisy == range(2, 4)
    path = MIX.rollout(flow, part, schedule)
    assert torch.equal(path.states[0, :3], path.states[1, :3])
    assert (path.states[0, 3:] != path.states[1, 3:]).all()
    close(path.states[:, :3][:, -1], integrate(flow, part.noise, schedule.t[:3], part.cond))
    close(path.x_0, integrate(flow, path.states[:, 4], schedule.t[4:], part.cond))


def test_a_window_over_all_moves_with_dance_sde_is_dance_grpo():
    """The two methods then move the weights alike, on policy (first update) and off it (second)."""
    settings = {**SMALL, "updates_per_rollout": 2, "sde": "dance", "eta": 0.3}
    mix, dance = MixGRPO(**settings, window=N - 1), DanceGRPO(**settings, timestep_fraction=1.0)
    flows = make_flow(), make_flow()
    for method, flow in zip((mix, dance), flows):
        stepped(flow, each_update(method, flow, REWARD, make_batch(flow, range(8))))
    close(flows[0].bias, flows[1].bias)
    assert (flows[0].bias - make_flow().bias).abs().max() > 1e-3


# ---- DPM-Solver++


def errors(solver, end, steps):
    """Return the largest error from the noise z to t = end, for each number of steps, on data N(1/2, 1/4 I).

    The exact latent is (1 - t) / 2 + sqrt((1 - t)^2 / 4 + t^2) z.
    """
    flow = GaussianFlow(std=0.5)
    with torch.no_grad():
        flow.bias.fill_(0.5)
    batch = make_batch(flow, range(3))
    exact = (1 - end) / 2 + math.sqrt((1 - end) ** 2 / 4 + end**2) * batch.noise
    grids = [torch.linspace(1, end, n + 1, dtype=torch.float64) for n in steps]
    return [(solver(flow, batch.noise, t, batch.cond) - exact).abs().max().item() for t in grids]


def test_dpm_solver_is_of_second_order():
    """Starting from noise, twice the steps give a quarter of the error, where Euler's is halved.

    Up to the image too it is a tenth of Euler's; lambda is infinite there, and the error falls as log(N) / N^2.
    """
    steps = (40, 80, 160)
    for (a, b), (c, d) in zip(
        itertools.pairwise(errors(dpm_solver, 0.1, steps)), itertools.pairwise(errors(integrate, 0.1, steps))
    ):
        assert 3.8 < a / b < 4.2
        assert 1.9 < c / d < 2.1
    second, first = errors(dpm_solver, 0.0, (80, 160, 320)), errors(integrate, 0.0, (80, 160, 320))
    assert all(3.2 < a / b < 4 for a, b in itertools.pairwise(second))
    assert all(b < a / 10 for a, b in zip(first, second))


def test_first_and_last_steps_are_eulers():
    """One step, or the two steps 1 -> t -> 0, are Euler's to rounding; so is a step whose history stands at t = 1."""
    flow = make_flow()
    batch = make_batch(flow, range(3))
    for t in ([0.8, 0.3], [1.0, 0.6], [0.5, 0.0], [1.0, 0.4, 0.0]):
        grid = torch.tensor(t, dtype=torch.float64)
        with torch.no_grad():
            close(dpm_solver(flow, batch.noise, grid, batch.cond), integrate(flow, batch.noise, grid, batch.cond))
    grid = torch.tensor([0.8, 0.3], dtype=torch.float64)
    before = (torch.tensor(1.0, dtype=torch.float64), torch.zeros_like(batch.noise))
    close(dpm_solver(flow, batch.noise, grid, batch.cond, before), integrate(flow, batch.noise, grid, batch.cond))


def test_a_second_order_step_has_the_papers_form():
    """x (t'/t) - (1 - t') (e^-h - 1) (x0 + (h / h_before) (x0 - x0_before) / 2), lambda = log((1 - t) / t)."""
    flow = make_flow()
    batch = make_batch(flow, range(3))
    lam = {t: math.log((1 - t) / t) for t in (0.9, 0.7, 0.4)}
    h_before, h = lam[0.7] - lam[0.9], lam[0.4] - lam[0.7]
    x, old = batch.noise, batch.randn_like(batch.noise)
    x_0 = euler(x, flow.velocity(x, 0.7, batch.cond).detach(), 0.7, 0.0)
    expected = x * 0.4 / 0.7 - 0.6 * (math.exp(-h) - 1) * (x_0 + h / h_before * (x_0 - old) / 2)
    grid = torch.tensor([0.7, 0.4], dtype=torch.float64)
    found = dpm_solver(flow, x, grid, batch.cond, (torch.tensor(0.9, dtype=torch.float64), old))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_thinned_grid_keeps_its_ends():
    """As many steps as asked, both ends, distinct sigmas of the grid in order; all of them if nothing is left out."""
    t = MixGRPO().grid(make_flow())[4:]
    for steps in range(1, 22):
        rest = thinned(t, steps)
        assert len(rest) == steps + 1
        assert (rest[0], rest[-1]) == (t[0], 0)
        assert (rest.diff() < 0).all()
        assert set(rest.tolist()) <= set(t.tolist())
    assert torch.equal(thinned(t, 21), t)


def test_flash_shortens_only_what_comes_after_the_window():
    """States and likelihoods up to the window's end are those without compression, bitwise; the image is near.

    The solver continues from the window's last prediction.
    """
    flow = GaussianFlow()
    batch = make_batch(flow, range(12))
    settings = {"steps": 25, "strategy": "frozen", "updates_per_rollout": 1}
    full, flash = MixGRPO(**settings), MixGRPO(**settings, compress=0.4)
    paths = []
    for method in (full, flash):
        (part,) = method.parts(make_batch(flow, range(12)))
        paths.append(method.rollout(flow, part, method.schedule(flow, part)))
    assert torch.equal(paths[0].states[:, :5], paths[1].states)
    assert torch.equal(paths[0].log_prob[:, :4], paths[1].log_prob)
    t, x = flash.grid(flow), paths[1].states[:, 3]
    predicted = euler(x, flow.velocity(x, t[3], part.cond).detach(), t[3], 0.0)
    close(paths[1].x_0, dpm_solver(flow, paths[1].states[:, 4], thinned(t[4:], 8), part.cond, (t[3], predicted)))
    gap = (paths[0].x_0 - paths[1].x_0).abs().max()
    assert 0 < gap < 0.1 * batch.noise.abs().max()


# ---- costs and settings


@pytest.mark.parametrize(
    ("method", "forward", "grad"),
    [
        (DanceGRPO(), 16, 9),
        (FlowGRPO(), 10 + 9, 9),  # 9 of the base model
        (FlowGRPO(beta=0.0), 10, 9),
        (MixGRPO(), 25, 4),
        (MixGRPO(compress=0.4), 12, 4),  # 16 on average over the 300 batches
        (MixGRPO(compress=0.2, strategy="frozen"), 8, 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_costs_per_image(method, forward, grad):
    """Forwards without and with gradient, decodes and rewards per image are the published ones."""
    flow, meter, n = GaussianFlow(), Meter(), 2 * method.group
    counting, reward = metered(flow, meter), metered_reward(REWARD, meter)
    for losses in each_update(method, counting, reward, make_batch(flow, range(n))):
        for loss in losses:
            loss.value.backward()
    assert (meter.nfe_forward, meter.nfe_grad, meter.decodes, meter.reward_calls) == (n * forward, n * grad, n, n)


def test_flash_samples_in_16_steps_on_average():
    """Over the 300 batches: l + 4 steps to the window's end, and 0.4 of the other 21 - l."""
    flow, method, calls = GaussianFlow(), MixGRPO(compress=0.4, group=2, updates_per_rollout=1), []
    for step in range(0, 300, 25):
        log = CallLog(flow)
        (part,) = method.parts(dataclasses.replace(make_batch(flow, range(2)), step=step))
        method.rollout(log, part, method.schedule(flow, part))
        calls.append(len(log.calls))
    assert round(sum(calls) / len(calls)) == 16


def test_defaults_are_the_papers():
    """DanceGRPO and MixGRPO for FLUX.1-dev, Flow-GRPO for GenEval."""
    dance, flow, mix = DanceGRPO(), FlowGRPO(), MixGRPO()
    assert (dance.group, dance.steps, dance.eta, dance.shift) == (12, 16, 0.3, 3.0)
    assert (dance.clip, dance.advantage_clip, dance.trained, dance.updates_per_rollout) == (1e-4, 5.0, 9, 3)
    assert (flow.group, flow.steps, flow.eta, flow.trained, flow.beta) == (24, 10, 0.7, 9, 0.04)
    assert (flow.clip, flow.advantage_clip, flow.updates_per_rollout, flow.std) == (1e-4, 5.0, 2, "batch")
    assert (mix.group, mix.steps, mix.eta, mix.window, mix.iters_per_window) == (12, 25, 0.7, 4, 25)
    assert (mix.clip, mix.advantage_clip, mix.updates_per_rollout, mix.shift) == (1e-4, 5.0, 4, 3.0)
    assert (dance.beta, mix.beta, dance.sde, flow.sde, mix.sde) == (0.0, 0.0, "dance", "flow", "flow")
    half = FlowGRPO(timestep_fraction=0.5)
    assert half.moves(half.parts(make_batch(make_flow(), range(24)))[0], range(9))[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "batch", "where"),
    [
        (DanceGRPO(group=1), 12, "method.group"),
        (DanceGRPO(), 64, "method.group"),
        (DanceGRPO(updates_per_rollout=5), 12, "method.updates_per_rollout"),
        (DanceGRPO(updates_per_rollout=0), 12, "method.updates_per_rollout"),
        (DanceGRPO(steps=1), 12, "method.steps"),
        (DanceGRPO(timestep_fraction=0.0), 12, "method.timestep_fraction"),
        (DanceGRPO(timestep_fraction=1.5), 12, "method.timestep_fraction"),
        (DanceGRPO(eta=0.0), 12, "method.eta"),
        (DanceGRPO(shift=0.0), 12, "method.shift"),
        (DanceGRPO(clip=0.0), 12, "method.clip"),
        (DanceGRPO(advantage_clip=-1.0), 12, "method.advantage_clip"),
        (DanceGRPO(beta=-0.1), 12, "method.beta"),
        (FlowGRPO(), 12, "method.group"),
        (FlowGRPO(timestep_fraction=1.0), 24, "method.timestep_fraction"),
        (FlowGRPO(timestep_fraction=0.05), 24, "method.timestep_fraction"),
        (FlowGRPO(eta=-0.7), 24, "method.eta"),
        (MixGRPO(window=25), 12, "method.window"),
        (MixGRPO(window=0), 12, "method.window"),
        (MixGRPO(iters_per_window=0), 12, "method.iters_per_window"),
        (MixGRPO(stride=0), 12, "method.stride"),
        (MixGRPO(compress=0.0), 12, "method.compress"),
        (MixGRPO(compress=1.5), 12, "method.compress"),
    ],
)
def test_impossible_settings_are_refused(method, batch, where):
    """Impossible settings are refused in one line that names the setting, before anything runs."""
    with pytest.raises(UserError, match=f"^{where}: .*; choose ") as caught:
        method.check(batch, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [DanceGRPO(), FlowGRPO(), MixGRPO()], ids=lambda m: m.name)
def test_policy_gradient_needs_no_differentiable_reward(method):
    """It asks the reward for numbers only; but the model must have a score, which a distilled one has not."""
    method.check(24, False)
    assert type(method).stochastic


# ---- what training relies on


class TestDanceGRPO(MethodContract):
    method = DanceGRPO(steps=N, group=GROUP, updates_per_rollout=2)


class TestFlowGRPO(MethodContract):
    method = FlowGRPO(steps=N, group=GROUP)


class TestFlowGRPOWithTwoRewards(MethodContract):
    method = FlowGRPO(steps=N, group=GROUP)

    def reward(self):
        return TWO


class TestMixGRPO(MethodContract):
    method = MixGRPO(steps=N, group=GROUP, updates_per_rollout=2, window=2, iters_per_window=2)


class TestMixGRPOFlash(MethodContract):
    method = MixGRPO(**SMALL, updates_per_rollout=2, window=2, strategy="random", compress=0.7)

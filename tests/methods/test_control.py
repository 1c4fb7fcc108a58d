"""The optimal-control methods against the closed forms of linear-quadratic problems, in float64."""

import itertools
import math

import pytest
import torch
from support.affine_methods import MU, REWARD, B, N, Path, ReFLAt, close, gradient, make_flow

import alignbench.methods.vggflow as vgg_module
from alignbench.analytic import AffineFlow, GaussianFlow
from alignbench.config import UserError
from alignbench.evaluator import Evaluator, Reward, Term
from alignbench.flow import Cond, sde_step, seeded
from alignbench.method import each_update
from alignbench.methods.adjoint_matching import AdjointMatching, sigma
from alignbench.methods.draft import DRaFTK
from alignbench.methods.ode_adjoint import ODEAdjointMatching
from alignbench.methods.vggflow import KEPT, VGGFlow, Visit
from alignbench.networks import LatentNet
from alignbench.testing import MethodContract
from alignbench.testing.method_contract import backpropagate, gradients_of
from alignbench.training.batches import make_batch
from alignbench.training.meter import Meter, metered, metered_reward

DIM = 3


class Linear(Evaluator):
    """The reward R(x) = c . x."""

    name = "linear"
    version = "1"
    differentiable = True
    c: tuple[float, float, float] = (0.3, -0.7, 1.1)

    def reward(self, pixels, prompts):
        return pixels @ torch.tensor(self.c, dtype=pixels.dtype)


LINEAR = Reward(Term(Linear()))
C = torch.tensor(Linear().c, dtype=torch.float64)


class Scaled(AffineFlow):
    """The flow v_base = a x, without text; the trained model adds a bias per step."""

    def __init__(self, steps, a):
        super().__init__(steps)
        self.A = a * torch.eye(DIM, dtype=torch.float64)

    def encode(self, prompts):
        return Cond({"shift": torch.zeros(len(prompts), DIM, dtype=torch.float64)})


def as_base(flow):
    """Return the flow with its present biases in the base model, too."""
    flow.base = flow.bias.detach().clone()
    return flow


# ---- deterministic adjoint matching


@pytest.mark.parametrize("adjoint", ["lean", "policy"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("k", range(1, N + 1))
def test_at_the_base_model_it_is_draft_k(k, beta, adjoint):
    """dL/dtheta is DRaFT-K's, bias by bias, whatever beta and whichever adjoint; full back-propagation for k = N."""
    method = ODEAdjointMatching(steps=N, k=k, beta=beta, adjoint=adjoint)
    close(gradient(method, flow=as_base(make_flow())), gradient(DRaFTK(steps=N, k=k), flow=as_base(make_flow())))


def objective(flow, batch, beta):
    """Return J = sum_i h_i beta / 2 |b_i|^2 - R(x_N), with the biases as an open-loop control, from a plain loop."""
    x, t, cost = batch.noise, flow.sigmas(N), 0.0
    for i, (at, to) in enumerate(itertools.pairwise(t)):
        x = x + (to - at) * flow.velocity(x, at, batch.cond)
        cost = cost + (at - to) * beta / 2 * flow.bias[i].square().sum()
    return cost + REWARD.loss(REWARD(x, batch.prompts)).mean()


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_the_gradient_is_that_of_the_control_problem(beta):
    """dJ/d delta_i = h_i (beta delta_i - p_{i+1}), for any control delta."""
    flow, plain = make_flow(), make_flow()
    objective(plain, make_batch(plain, range(B)), beta).backward()
    close(gradient(ODEAdjointMatching(steps=N, k=N, beta=beta), flow=flow), plain.bias.grad)


@pytest.mark.parametrize("a", [0.0, 0.4, -0.3])
def test_the_linear_quadratic_solution_is_stationary(a):
    """delta*_i = P_i (x_N - mu) / beta with x_N = (prod q x_0 + S mu / beta) / (1 + S / beta): no loss, no gradient.

    q_i = 1 - h_i a, P_i = prod_{m > i} q_m, S = sum h_i P_i^2.
    """
    beta, flow = 0.7, Scaled(N, a)
    batch = make_batch(flow, [0])
    t = flow.sigmas(N)
    h = t[:-1] - t[1:]
    q = 1 - h * a
    p = torch.stack([q[i + 1 :].prod() for i in range(N)])
    s = (h * p.square()).sum()
    end = (q.prod() * batch.noise + s * MU / beta) / (1 + s / beta)
    with torch.no_grad():
        flow.bias.copy_(p[:, None] * (end - MU) / beta)
    losses = backpropagate(ODEAdjointMatching(steps=N, k=N, beta=beta), flow, REWARD, batch)
    assert max(loss.value.item() for loss in losses) < 1e-14
    assert flow.bias.grad.abs().max() < 1e-13


class TwoFields(AffineFlow):
    """A policy whose Jacobian is not the base model's, and depends on x."""

    def velocity(self, x, sigma, cond, *, reference=False):
        v = super().velocity(x, sigma, cond, reference=reference)
        return v + 0.2 * x.sin() if reference else v + 0.3 * (x @ self.A).tanh()


def solved(flow, solver, x, t, cond, cost=None):
    """Sample in a plain loop. Return the end and the sum of ``cost(delta)``, weighted by each call's share."""
    total = 0.0
    for at, to in itertools.pairwise(t):
        calls, y, h = [], x, at - to
        for s in (at, to) if solver == "heun" and to > 0 else (at,):
            calls.append((y, s))
            y = x - h * flow.velocity(y, s, cond)
        velocities = [flow.velocity(y, s, cond) for y, s in calls]
        if cost:
            deltas = (v - flow.velocity(*call, cond, reference=True) for v, call in zip(velocities, calls))
            total = total + sum(h / len(calls) * cost(delta) for delta in deltas)
        x = x - h * sum(velocities) / len(calls)
    return x, total


@pytest.mark.parametrize("k", range(1, N + 1))
@pytest.mark.parametrize("adjoint", ["lean", "policy"])
def test_heun_at_the_base_model_is_exact(k, adjoint):
    """Each of Heun's velocities has its own target: together the gradient of the last k Heun steps, by autograd."""
    flow, plain = (as_base(make_flow()) for _ in range(2))
    batch, t = make_batch(plain, range(B)), plain.sigmas(N)
    with torch.no_grad():
        x, _ = solved(plain, "heun", batch.noise, t[: N - k + 1], batch.cond)
    x, _ = solved(plain, "heun", x, t[N - k :], batch.cond)
    REWARD.loss(REWARD(x, batch.prompts)).mean().backward()
    close(gradient(ODEAdjointMatching(steps=N, k=k, solver="heun", adjoint=adjoint), flow=flow), plain.bias.grad)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_policy_adjoint_is_the_gradient_of_the_cost_to_go(solver):
    """p_i = d/dx_i of (sum of weight phi(delta) from i on - R(x_N)) along the policy's own path, by autograd."""
    method, flow = ODEAdjointMatching(steps=N, k=N, beta=0.8, adjoint="policy", solver=solver), TwoFields(N)
    batch, t = make_batch(flow, range(B)), flow.sigmas(N)
    path = method.rollout(flow, batch, t)
    p = solved(flow, solver, batch.noise, t, batch.cond)[0].detach() - MU
    for i in reversed(range(N)):
        p, _ = method.adjoint_step(flow, batch, t[i], t[i + 1], path[i], p)
        start = path[i][0].x.clone().requires_grad_()
        x, cost = solved(flow, solver, start, t[i:], batch.cond, lambda delta: 0.4 * delta.square().sum())
        (expected,) = torch.autograd.grad(cost + 0.5 * (x - MU).square().sum(), start)
        close(p, expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_lean_adjoint_holds_the_control_fixed(solver):
    """p_i = J^T p_{i+1} of the step map of v_base + delta, delta a constant at every call, by autograd."""
    method, flow = ODEAdjointMatching(steps=N, k=N, solver=solver), TwoFields(N)
    batch, t = make_batch(flow, range(B)), flow.sigmas(N)
    path = method.rollout(flow, batch, t)
    p = torch.randn(B, DIM, generator=seeded("p"), dtype=torch.float64)

    class Held(TwoFields):
        def velocity(self, x, sigma, cond, *, reference=False):
            base = super().velocity(x, sigma, cond, reference=True)
            call = min(path[i], key=lambda call: abs(float(call.t - sigma)))
            fixed = call.v - super().velocity(call.x, call.t, cond, reference=True)
            return base + fixed.detach()

    for i in range(N):
        x = path[i][0].x.clone().requires_grad_()
        end, _ = solved(Held(N), solver, x, t[i : i + 2], batch.cond)
        (expected,) = torch.autograd.grad((end * p).sum(), x)
        close(method.adjoint_step(flow, batch, t[i], t[i + 1], path[i], p)[0], expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_both_adjoints_agree_at_the_base_model(solver):
    """delta = 0 everywhere: no running cost has a slope, and both Jacobians are one."""
    lean, policy = (
        gradient(ODEAdjointMatching(steps=N, k=N, adjoint=adjoint, solver=solver), flow=as_base(make_flow()))
        for adjoint in ("lean", "policy")
    )
    close(lean, policy)


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_target_of_a_power(q, beta):
    """delta* = beta^(-1/(q-1)) |p|^((2-q)/(q-1)) p is stationary for phi(d) - <p, d>, and the only zero of the loss."""
    method = ODEAdjointMatching(steps=N, beta=beta, q=q)
    p = torch.randn(B, DIM, generator=seeded("p"), dtype=torch.float64)
    norm = p.norm(dim=1, keepdim=True)
    target = (beta ** (-1 / (q - 1)) * norm ** ((2 - q) / (q - 1)) * p).requires_grad_()
    (slope,) = torch.autograd.grad((method.phi(target) - (p * target).sum(1)).sum(), target)
    assert slope.abs().max() < 1e-12
    assert (method.phi(target) + method.conjugate(p) - (p * target).sum(1)).abs().max() < 1e-12
    other = target + 0.1 * torch.randn(B, DIM, generator=seeded("other"), dtype=torch.float64)
    assert (method.phi(other) + method.conjugate(p) - (p * other).sum(1) > 1e-5).all()


def test_the_quadratic_loss_is_a_regression():
    """phi(d) + phi*(p) - <p, d> = beta / 2 |d - p / beta|^2."""
    method = ODEAdjointMatching(steps=N, beta=0.3)
    d, p = (torch.randn(B, DIM, generator=seeded(name), dtype=torch.float64) for name in "dp")
    loss = method.phi(d) + method.conjugate(p) - (d * p).sum(1)
    close(loss, 0.15 * (d - p / 0.3).square().sum(1))


def test_the_target_of_a_sparse_change_is_thresholded():
    """With sparsity s: delta* = sign(p) max(|p| - s, 0) / beta, where the loss is zero."""
    method = ODEAdjointMatching(steps=N, beta=0.5, sparsity=0.4)
    p = torch.randn(50, DIM, generator=seeded("p"), dtype=torch.float64)
    target = p.sign() * (p.abs() - 0.4).relu() / 0.5
    loss = method.phi(target) + method.conjugate(p) - (target * p).sum(1)
    assert (target == 0).any()
    assert loss.abs().max() < 1e-12
    assert (method.phi(target + 0.1) + method.conjugate(p) - ((target + 0.1) * p).sum(1) > 0).all()


def test_early_steps_are_skipped_or_frozen():
    """skip: exactly no gradient before the last k; freeze: -h_i p_{N-k} there, at the base model."""
    k = 2
    skipped = gradient(ODEAdjointMatching(steps=N, k=k), flow=as_base(make_flow()))
    assert (skipped[: N - k] == 0).all()
    frozen = gradient(ODEAdjointMatching(steps=N, k=k, before="freeze"), flow=as_base(make_flow()))
    close(frozen[N - k :], skipped[N - k :])
    path, p = Path(), Path().g
    for i in (N - 1, N - 2):
        p = path.back(p, path.h[i])
    close(frozen[: N - k], torch.stack([-h * p.mean(0) for h in path.h[: N - k]]))


# ---- Adjoint Matching


def lean(flow, steps, x, a):
    """Return the lean adjoints of states ``x`` from a_N = ``a``, on the uniform grid."""
    method = AdjointMatching(steps=steps, late=1, early=0)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    batch = make_batch(flow, range(len(a)))
    return method.lean_adjoints(flow, batch, t, x, a), t, batch


def test_the_lean_adjoint_is_the_base_drifts():
    """a_i = a_{i+1} + h grad_x [b(x)^T a_{i+1}] with b = -(2 v_base + x / (1 - t + h)), by autograd of b itself."""
    flow, steps = TwoFields(6), 6
    x = [torch.randn(B, DIM, generator=seeded("x", i), dtype=torch.float64) for i in range(steps + 1)]
    a = torch.randn(B, DIM, generator=seeded("a"), dtype=torch.float64)
    (adjoints, base), t, batch = lean(flow, steps, x, a)
    for i in reversed(range(steps)):
        h, x_i = t[i] - t[i + 1], x[i].clone().requires_grad_()
        drift = -(2 * flow.velocity(x_i, t[i], batch.cond, reference=True) + x_i / (1 - t[i] + h))
        (slope,) = torch.autograd.grad((drift * a).sum(), x_i)
        a = a + h * slope
        close(adjoints[i], a)
        close(base[i], flow.velocity(x[i], t[i], batch.cond, reference=True).detach())


def test_the_lean_adjoint_of_an_affine_flow():
    """a_i = ((1 - h / (1 - t_i + h)) I - 2 h A^T) a_{i+1}."""
    flow, steps = make_flow(4), 4
    x = [torch.zeros(B, DIM, dtype=torch.float64)] * (steps + 1)
    a = torch.randn(B, DIM, generator=seeded("a"), dtype=torch.float64)
    (adjoints, _), t, _ = lean(flow, steps, x, a)
    for i in reversed(range(steps)):
        h = t[i] - t[i + 1]
        a = (1 - h / (1 - t[i] + h)) * a - 2 * h * a @ flow.A
        close(adjoints[i], a)


@pytest.mark.parametrize("steps", [4, 40])
def test_without_a_base_velocity_the_adjoint_shrinks_linearly(steps):
    """v_base = 0 on the uniform grid: a_i = (1 - t_i) a_N exactly, a telescoping product."""
    flow = Scaled(steps, 0.0)
    a = torch.randn(B, DIM, generator=seeded("a"), dtype=torch.float64)
    (adjoints, _), t, _ = lean(flow, steps, [torch.zeros_like(a)] * (steps + 1), a)
    for i in range(steps):
        close(adjoints[i], (1 - t[i]) * a)


def test_the_memoryless_mean_is_flow_sdes():
    """For t < 1, x - h (2 v + x / (1 - t)) is the mean of the common SDE step with eta = sqrt(2 t / (1 - t))."""
    x, v = (torch.randn(B, DIM, generator=seeded(name), dtype=torch.float64) for name in "xv")
    for at, to in ((0.9, 0.7), (0.5, 0.2), (0.1, 0.0)):
        mean, std = sde_step(x, v, at, to, math.sqrt(2 * at / (1 - at)))
        close(mean, x - (at - to) * (2 * v + x / (1 - at)))
        assert std.item() == pytest.approx(math.sqrt(2 * at / (1 - at) * (at - to)))


class Shifted(GaussianFlow):
    """The optimum itself: v_base + sigma^2 a / 2 at every state."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def velocity(self, x, sigma, cond, *, reference=False):
        return self.answers[round(float(sigma), 9)]


def test_the_loss_is_zero_at_the_optimum():
    """v = v_base + sigma^2 a / 2 at every trained step."""
    method, steps = AdjointMatching(steps=8, late=4, early=4), 8
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    draws = [torch.randn(B, DIM, generator=seeded("draw", i), dtype=torch.float64) for i in range(3 * steps)]
    x, a, base = draws[:steps], draws[steps : 2 * steps], draws[2 * steps :]
    answers = {round(float(t[i]), 9): base[i] + sigma(t, i) ** 2 / 2 * a[i] for i in range(steps)}
    flow = Shifted(answers)
    parts = (make_batch(flow, range(B)), t, list(range(steps)), x, a, base, torch.zeros(()))
    assert all(loss.value < 1e-24 for loss in method.losses(flow, *parts))


def test_without_a_reward_the_base_model_is_optimal():
    """lam = 0: zero loss at the base model, though the path is noisy."""
    flow = as_base(make_flow())
    losses = backpropagate(
        AdjointMatching(steps=N, late=2, early=2, lam=0.0), Uniform.of(flow), REWARD, make_batch(flow, range(B))
    )
    assert all(loss.value == 0 for loss in losses)


class Uniform(AffineFlow):
    """An affine flow whose biases belong to the uniform grid."""

    @classmethod
    def of(cls, flow):
        made = cls(len(flow.bias), grid=torch.linspace(1, 0, len(flow.bias) + 1, dtype=torch.float64))
        with torch.no_grad():
            made.bias.copy_(flow.bias)
        made.base = flow.base
        return made


def test_the_gradient_of_the_regression():
    """At the base model dL/db_i = -(4 / |kappa|) mean a_i for trained i: 2 / sigma times -2 sigma a."""
    flow = Uniform.of(as_base(make_flow()))
    method = AdjointMatching(steps=N, late=N, early=0, lam=3.0)
    batch = make_batch(flow, range(B))
    t = flow.sigmas(N)
    x = method.rollout(flow, make_batch(flow, range(B)), t)
    close(x[-1], x[-2] - t[-2] * flow.velocity(x[-2], t[-2], batch.cond).detach())
    (adjoints, _) = method.lean_adjoints(flow, batch, t, x, 3.0 * (x[-1] - MU))
    backpropagate(method, flow, REWARD, batch)
    close(flow.bias.grad, torch.stack([-4 * a.mean(0) / N for a in adjoints]))


def test_clipped_losses_teach_nothing():
    """Above ``loss_clip``, a sample's loss at a step has no gradient."""
    flow = Uniform.of(as_base(make_flow()))
    losses = backpropagate(
        AdjointMatching(steps=N, late=N, early=0, loss_clip=1e-9), flow, REWARD, make_batch(flow, range(B))
    )
    assert flow.bias.grad.abs().max() == 0
    assert max(loss.value.item() for loss in losses) <= 1e-9


@pytest.mark.parametrize(("steps", "tolerance"), [(100, 0.04), (400, 0.012)])
def test_the_optimum_samples_the_tilted_distribution(steps, tolerance):
    """Base N(0, s0^2), R = -x^2 / 2: under the exact field of variance s1^2 = 1 / (1 / s0^2 + lam) the regression
    target sigma^2 a / 2 has the conditional mean v* - v_base, with an error of the order of the step."""

    class Tilted(GaussianFlow):
        def velocity(self, x, sigma, cond, *, reference=False):
            t, var = torch.as_tensor(sigma, dtype=torch.float64), self.std**2
            var = var if reference else 1 / (1 / var + 0.9)
            return (t - (1 - t) * var) / ((1 - t) ** 2 * var + t**2) * x

    flow, method = Tilted(0.8, dim=4000), AdjointMatching(steps=steps, late=1, early=0, lam=0.9)
    batch, t = make_batch(flow, range(5)), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = method.rollout(flow, batch, t)
    adjoints, base = method.lean_adjoints(flow, batch, t, x, 0.9 * x[-1])
    for i in (steps // 4, steps // 2, 3 * steps // 4):
        target = sigma(t, i) ** 2 / 2 * adjoints[i]
        slope = (target * x[i]).sum() / x[i].square().sum()
        exact = ((flow.velocity(x[i], t[i], batch.cond) - base[i]) / x[i]).mean()
        assert abs(slope - exact) < tolerance


def test_adjoint_matching_draws_the_papers_steps():
    """The last ten of 40 always, ten others of the first thirty (tau <= 0.725), drawn anew."""
    method, rng = AdjointMatching(), seeded(0)
    draws = [method.draw(rng) for _ in range(300)]
    assert all(draw[-10:] == list(range(30, 40)) and len(draw) == 20 and draw == sorted(set(draw)) for draw in draws)
    assert set().union(*draws) == set(range(40))


# ---- VGG-Flow


FREE = {"clip_quantile": None, "steps": N, "timestep_fraction": 0.4}


class VGGAt(VGGFlow):
    """VGG-Flow with given trained steps."""

    at: tuple[int, ...] = (1, 2, N - 1)

    def draw(self, rng):
        return list(self.at)


@pytest.mark.parametrize("eta", ["linear", "quadratic", "constant"])
def test_vgg_at_the_base_model(eta):
    """dL/db_i = -(2 / d) Rs eta_i g(x0hat_i) / T for trained i, exactly zero elsewhere."""
    path = Path(flow=as_base(make_flow()))
    actual = gradient(VGGAt(**FREE, reward_scale=0.3, eta_schedule=eta), flow=as_base(make_flow()))
    for i in range(N):
        trust = {"linear": 1 - path.t[i], "quadratic": (1 - path.t[i]) ** 2, "constant": 1.0}[eta]
        row = -2 / DIM * 0.3 * trust * (path.predicted(i) - MU).mean(0) / 3
        close(actual[i], row if i in (1, 2, N - 1) else torch.zeros(DIM, dtype=torch.float64))


@pytest.mark.parametrize("s", range(1, N))
def test_vgg_is_refl_where_its_pull_is_t(s):
    """If (2 / d T) Rs eta_s = t_s, the gradient at the base model is ReFL's."""
    path = Path()
    at = (s,) if s == N - 1 else (s, N - 1)
    method = VGGAt(**FREE, at=at, eta_schedule="constant", reward_scale=float(path.t[s]) * DIM / 2 * len(at))
    vgg, refl = (gradient(m, flow=as_base(make_flow())) for m in (method, ReFLAt(steps=N, s=s)))
    close(vgg[s], refl[s])


def test_vgg_with_a_linear_reward():
    """The reward's gradient is c at every state, and the loss vanishes at v_base - Rs eta c."""
    method, flow = VGGAt(**FREE, eta_schedule="constant", reward_scale=0.5), as_base(make_flow())
    with torch.no_grad():
        flow.bias += -0.5 * C
    losses = backpropagate(method, flow, LINEAR, make_batch(flow, range(B)))
    assert max(loss.value.item() for loss in losses) < 1e-28


def residual(flow, reward, nu, t, rs, monkeypatch, dt, eta="linear"):
    """Return the mean squared residual of the value-gradient equation for a given nu, at fixed states."""
    monkeypatch.setattr(vgg_module, "DT", dt)
    method = VGGAt(**FREE, reward_scale=rs, eta_schedule=eta, value_net="small")
    monkeypatch.setattr(VGGAt, "rest", lambda self, x, t, cond: rs * nu(x, t))
    x = torch.randn(B, DIM, generator=seeded("state"), dtype=torch.float64)
    batch, t = make_batch(flow, range(B)), torch.tensor(t, dtype=torch.float64)
    v = flow.velocity(x, t, batch.cond).detach()
    at = (x - t * v).requires_grad_()
    (slope,) = torch.autograd.grad(reward.loss(reward(at, batch.prompts)).sum(), at)
    x_in = x.clone().requires_grad_()
    base = flow.velocity(x_in, t, batch.cond, reference=True)
    n = rs * nu(x, t)
    g = method.trust(t) * rs * slope + n
    (pulled,) = torch.autograd.grad(base, x_in, g)
    parts = (Visit(t, x, rs * slope), n, base.detach() + g, pulled, 1)
    return method.consistency_loss(flow, reward, batch, *parts).value.item()


def test_without_a_base_velocity_a_linear_reward_needs_no_value_network(monkeypatch):
    """v_base = 0, constant eta, R = c x: G = -c solves the equation, so nu = 0 has no residual."""
    flow = Scaled(N, 0.0)
    assert residual(flow, LINEAR, lambda x, t: torch.zeros_like(x), 0.6, 0.7, monkeypatch, 0.01, "constant") < 1e-25


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_the_value_gradient_of_a_linear_reward(t, monkeypatch):
    """v_base = a x: G = -c e^(-a t), that is nu = c (eta_t - e^(-a t)); the residual is the finite difference's own."""
    a, flow = 0.9, Scaled(N, 0.9)

    def nu(x, t):
        return (C * ((1 - t) - torch.exp(-a * t))).expand_as(x)

    coarse, fine = (residual(flow, LINEAR, nu, t, 0.7, monkeypatch, dt) for dt in (0.02, 0.01))
    assert fine < 1e-4
    assert coarse / fine == pytest.approx(4, rel=0.05)
    wrong = residual(flow, LINEAR, lambda x, t: 1.2 * nu(x, t), t, 0.7, monkeypatch, 0.01)
    assert wrong > 20 * fine


def test_the_value_gradient_of_a_quadratic_reward(monkeypatch):
    """v_base = 0, R = -|x - mu|^2 / 2: Riccati, G = (x - mu) / (1 + Rs t), is constant along the optimal path."""
    rs, flow = 0.7, Scaled(N, 0.0)

    def nu(x, t):
        return (x - MU) / (1 + rs * t) - (1 - t) * (x - MU)  # x0hat = x: the guess is (1 - t) (x - mu)

    assert residual(flow, REWARD, nu, 0.6, rs, monkeypatch, 0.01) < 1e-22
    assert residual(flow, REWARD, lambda x, t: 1.2 * nu(x, t), 0.6, rs, monkeypatch, 0.01) > 1e-4


def test_the_closed_loop_of_the_quadratic_problem():
    """Following v* = Rs G from x_0 ends at (beta x_0 + mu) / (1 + beta), beta = 1 / Rs, as the step vanishes."""
    rs, x = 0.7, torch.randn(B, DIM, generator=seeded("state"), dtype=torch.float64)
    end = (x / rs + MU) / (1 + 1 / rs)
    for i in range(20_000):
        t = 1 - i / 20_000
        x = x - rs * (x - MU) / (1 + rs * t) / 20_000
    torch.testing.assert_close(x, end, rtol=0, atol=1e-4)


def test_each_network_has_its_own_loss():
    """The matching loss has no gradient in the value network, and the network's two losses have none in the model."""
    method = VGGAt(**FREE, value_net="small", reward_scale=0.3)
    flow = make_flow()
    for losses in each_update(method, flow, REWARD, make_batch(flow, range(B))):
        net = method.nets["value"]
        torch.nn.init.normal_(net.last.weight)  # away from the zero it starts at
        for i, loss in enumerate(losses):
            flow.bias.grad = None
            net.zero_grad()
            loss.value.backward()
            matching = i % 2 == 0 and i < 6
            assert (gradients_of(flow)[0].abs().sum() > 0) == matching
            assert (net.first.weight.grad is not None and bool(net.first.weight.grad.abs().sum() > 0)) != matching
    assert i == 6


def test_the_value_network_starts_at_zero():
    """nu = 0 at first, so that the first update is the default's; it sees text and time, and keeps the shape."""
    net = LatentNet(4, 5, 16).double()
    x, cond = torch.randn(2, 6, 4, dtype=torch.float64), Cond({"text": torch.randn(2, 3, 5, dtype=torch.float64)})
    assert net(x, torch.tensor(0.3), cond).abs().max() == 0
    torch.nn.init.normal_(net.last.weight)
    assert net(x, torch.tensor(0.3), cond).shape == x.shape
    assert not torch.equal(net(x, torch.tensor(0.3), cond), net(x, torch.tensor(0.4), cond))
    flow = make_flow()
    plain, with_net = (
        gradient(VGGAt(**FREE, value_net=v, reward_scale=0.3), flow=make_flow()) for v in ("none", "small")
    )
    close(plain, with_net)
    assert flow.bias.grad is None


def test_reward_gradients_are_clipped_at_a_running_quantile():
    """Gradients are clipped to the limit, which moves a tenth of the way to each batch's quantile.

    Closed hinges, whose gradient is zero, do not pull it down.
    """
    method = VGGFlow(reward_scale=2.0)
    first, second = torch.arange(1.0, 12.0), torch.arange(11.0, 22.0)
    method.update_limit(0, torch.cat([first, torch.zeros(50)]))
    assert method.state["limit"] == pytest.approx(9.0)
    method.update_limit(0, second)
    assert method.state["limit"] == pytest.approx(9.0), "asked again for the same batch, by another micro-batch"
    method.update_limit(1, second)
    assert method.state["limit"] == pytest.approx(KEPT * 9 + (1 - KEPT) * 19)
    rows = 6 * torch.randn(40, 2, 3, generator=seeded("rows"), dtype=torch.float64)
    norms, pulled = rows.flatten(1).norm(dim=1), method.pull(rows)
    close(pulled.flatten(1).norm(dim=1), 2 * norms.clamp(max=method.state["limit"]))
    close(pulled[norms < 10], 2 * rows[norms < 10])
    assert (method.pull(torch.zeros(1, 3)) == 0).all()
    blind = VGGFlow()
    blind.update_limit(0, torch.zeros(5))
    assert (blind.pull(torch.zeros(1, 3)) == 0).all()


def test_vgg_draws_strata():
    """Five different steps between the first and the last one, one of each stratum, and the last; never pure noise."""
    method, rng = VGGFlow(), seeded(0)
    draws = [method.draw(rng) for _ in range(500)]
    assert all(len(set(draw)) == 6 and draw == sorted(draw) and draw[-1] == 19 for draw in draws)
    assert set().union(*draws) == set(range(1, 20))


# ---- all of them


@pytest.mark.parametrize(
    ("method", "forward", "grad", "rewards"),
    [
        (VGGFlow(), 20 + 6, 6, 6),
        (AdjointMatching(), 40, 40 + 20, 1),
        (ODEAdjointMatching(), 25, 3 + 3, 1),
        (ODEAdjointMatching(k=10), 25, 10 + 10, 1),
        (ODEAdjointMatching(adjoint="policy"), 25, 2 * 3 + 3, 1),
        (ODEAdjointMatching(solver="heun"), 49, 5 + 5, 1),
        (VGGFlow(value_net="small"), 20 + 6, 6 + 6, 12),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_costs_per_image(method, forward, grad, rewards):
    """Forwards per image; those of a vector-Jacobian product count as with gradient, also in the base model."""
    grid = torch.linspace(1, 0, method.steps + 1, dtype=torch.float64) if isinstance(method, AdjointMatching) else None
    flow, meter = AffineFlow(method.steps, grid=grid), Meter()
    with torch.no_grad():
        flow.bias.normal_(generator=seeded("bias"))
    flow.A.requires_grad_()  # as in a real network, whose frozen parameters need no gradient but whose input does
    backpropagate(method, metered(flow, meter), metered_reward(REWARD, meter), make_batch(flow, range(2)))
    counted = (meter.nfe_forward, meter.nfe_grad, meter.decodes, meter.reward_calls)
    assert counted == (2 * forward, 2 * grad, 2 * rewards, 2 * rewards)


def test_defaults_are_the_papers():
    """VGG-Flow's Aesthetic run; Adjoint Matching's 40 steps, 10 and 10 of them trained, and its smallest lambda."""
    vgg, am = VGGFlow(), AdjointMatching()
    assert (vgg.steps, vgg.reward_scale, vgg.eta_schedule, vgg.others, vgg.clip_quantile) == (20, 1e4, "linear", 5, 0.8)
    assert (am.steps, am.late, am.early, am.lam) == (40, 10, 10, 1000.0)


@pytest.mark.parametrize(
    ("method", "where"),
    [
        (AdjointMatching(lam=0.0), "method.lam"),
        (AdjointMatching(late=41), "method.late"),
        (AdjointMatching(early=31), "method.early"),
        (AdjointMatching(late=0, early=0), "method.early"),
        (ODEAdjointMatching(k=26), "method.k"),
        (ODEAdjointMatching(k=0), "method.k"),
        (ODEAdjointMatching(beta=0.0), "method.beta"),
        (ODEAdjointMatching(q=1.0), "method.q"),
        (ODEAdjointMatching(sparsity=-1.0), "method.sparsity"),
        (ODEAdjointMatching(sparsity=1.0, q=3.0), "method.sparsity"),
        (VGGFlow(steps=1), "method.steps"),
        (VGGFlow(reward_scale=0.0), "method.reward_scale"),
        (VGGFlow(timestep_fraction=0.95), "method.timestep_fraction"),
        (VGGFlow(clip_quantile=0.0), "method.clip_quantile"),
        (VGGFlow(width=0), "method.width"),
    ],
)
def test_impossible_settings_are_refused(method, where):
    """Impossible settings are refused in one line that names the setting, before anything runs."""
    with pytest.raises(UserError, match=f"^{where}: .*; choose ") as caught:
        method.check(1, True)
    assert "\n" not in str(caught.value)


class TestODEAdjointMatching(MethodContract):
    method = ODEAdjointMatching(steps=5, beta=0.1)


class TestODEAdjointMatchingHeunPolicy(MethodContract):
    method = ODEAdjointMatching(steps=5, beta=0.1, solver="heun", adjoint="policy", q=1.5, before="freeze")


class TestAdjointMatching(MethodContract):
    method = AdjointMatching(steps=5, late=2, early=2, lam=10.0)

    def flow(self):
        return AffineFlow(5, grid=torch.linspace(1, 0, 6, dtype=torch.float64))


class TestVGGFlow(MethodContract):
    method = VGGFlow(steps=5, reward_scale=1.0, timestep_fraction=0.4)


class TestVGGFlowWithAValueNetwork(MethodContract):
    method = VGGFlow(steps=5, reward_scale=1.0, timestep_fraction=0.4, value_net="small", boundary=1.0)

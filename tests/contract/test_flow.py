"""The integration and its gradients, on flows with closed forms, in float64."""

import itertools
import math

import pytest
import torch

from alignbench.analytic import AffineFlow, GaussianFlow, shifted
from alignbench.flow import (
    euler,
    integrate,
    integrate_sde,
    log_normal,
    randint,
    scale_grad,
    sde_step,
    seeded,
    straight_through,
)
from alignbench.training.batches import make_batch


def test_a_sampler_is_its_parts():
    """Integrating to step k and on from there equals integrating in one go, bitwise; zero steps change nothing."""
    flow, batch = AffineFlow(6), make_batch(AffineFlow(6), range(4))
    t = flow.sigmas(6)
    through = integrate(flow, batch.noise, t, batch.cond)
    for k in range(7):
        x_k = integrate(flow, batch.noise, t[: k + 1], batch.cond)
        assert torch.equal(integrate(flow, x_k, t[k:], batch.cond), through)
    assert torch.equal(integrate(flow, batch.noise, t[:1], batch.cond), batch.noise)


def test_integration_keeps_a_graph_only_when_asked():
    """Without ``grad`` the result is a constant, even if its start is not."""
    flow, batch = AffineFlow(3), make_batch(AffineFlow(3), range(2))
    start = batch.noise.clone().requires_grad_()
    assert not integrate(flow, start, flow.sigmas(3), batch.cond).requires_grad
    assert not integrate(flow, start, flow.sigmas(3)[:1], batch.cond).requires_grad
    assert integrate(flow, start, flow.sigmas(3), batch.cond, grad=True).requires_grad


def test_euler_keeps_the_latents_precision():
    """A half-precision velocity does not round the latents to half precision."""
    x, v = torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.bfloat16)
    assert euler(x, v, 1.0, 1.0 - 2**-20).item() == 1 - 2**-20
    sigmas = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert euler(x, v, sigmas[0], sigmas[1]).dtype == torch.float32


def test_straight_through_is_exact():
    """The value is bitwise that of the first, unlike a + (b - a); the gradient is that of the second alone."""
    value = torch.randn(1000, generator=seeded(0), requires_grad=True)
    other = (1e3 * torch.randn(1000, generator=seeded(1))).requires_grad_()
    joined = straight_through(value, other)
    assert torch.equal(joined, value)
    assert not torch.equal(other + (value - other), value)
    joined.sum().backward()
    assert value.grad is None
    assert torch.equal(other.grad, torch.ones(1000))


def test_scale_grad_is_exact():
    """The value is unchanged to the last bit; the gradient is multiplied."""
    z = torch.randn(1000, generator=seeded(0), requires_grad=True)
    scaled = scale_grad(z, 0.3)
    assert torch.equal(scaled, z)
    scaled.sum().backward()
    torch.testing.assert_close(z.grad, torch.full((1000,), 0.3))


@pytest.mark.parametrize("x_scale", [0.0, 1.0])
def test_sde_step_follows_the_score(x_scale):
    """mean = x - h v + eta^2 h score / 2, with score = -(x - (1 - t) x0hat) / t^2 (DanceGRPO's own form)."""
    x = x_scale * torch.randn(5, 3, generator=seeded(0), dtype=torch.float64)
    v = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    t, to, eta = 0.7, 0.6, 0.3
    mean, std = sde_step(x, v, t, to, eta)
    score = -(x - (1 - t) * (x - t * v)) / t**2
    torch.testing.assert_close(mean, x - (t - to) * v + eta**2 * (t - to) * score / 2, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(std, torch.full_like(std, eta * math.sqrt(t - to)), rtol=1e-13, atol=0)


def test_sde_step_without_noise_is_euler():
    """eta = 0 is the deterministic sampler."""
    x, v = torch.randn(2, 4, 3, generator=seeded(0), dtype=torch.float64)
    mean, std = sde_step(x, v, 0.7, 0.6, 0.0)
    torch.testing.assert_close(mean, euler(x, v, 0.7, 0.6), rtol=1e-14, atol=1e-14)
    assert std.abs().max() == 0


def test_sde_step_takes_a_time_per_sample():
    """(B,) times and noise levels give row b what the numbers t_b give it, bitwise."""
    x, v = torch.randn(2, 4, 3, 2, generator=seeded(0), dtype=torch.float64)
    t, to = torch.tensor([0.9, 0.7, 0.5, 0.3]).double(), torch.tensor([0.8, 0.5, 0.4, 0.1]).double()
    mean, std = sde_step(x, v, t, to, 0.3)
    for b in range(4):
        row, deviation = sde_step(x[b : b + 1], v[b : b + 1], t[b], to[b], 0.3)
        assert torch.equal(mean[b : b + 1], row)
        assert std[b].item() == deviation.item()


# Variance of the result for data of variance 0.25 on the uniform grid, three digits of it.
VARIANCES = {
    "ode": {10: 0.186, 25: 0.222, 100: 0.243, 1000: 0.249},
    "dance": {10: 0.194, 25: 0.226, 100: 0.244, 1000: 0.249},
    "flow": {10: 0.230, 25: 0.244, 100: 0.250, 1000: 0.251},
}


def noise_level(kind: str, t: float, first: float) -> float:
    """Return the noise per square root of time: constant for Dance-SDE; for Flow-SDE, t = 1 becomes the next sigma."""
    return {"ode": 0.0, "dance": 0.3, "flow": 0.7 * math.sqrt(t / (1 - (t if t < 1 else first)))}[kind]


@pytest.mark.parametrize("kind", VARIANCES)
def test_sde_keeps_the_marginals(kind):
    """On Gaussian data the sampler's variance, propagated exactly, tends to the data's as steps get finer."""
    flow = GaussianFlow(std=0.5, dim=1)
    cond = flow.encode(["x"])
    one, variances = torch.ones(1, 1, dtype=torch.float64), {}
    for steps in VARIANCES[kind]:
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        variance = 1.0
        for at, to in itertools.pairwise(t):
            eta = noise_level(kind, at.item(), t[1].item())
            v = flow.velocity(one, at, cond)  # linear in x: x = 1 gives the factor
            factor, std = sde_step(one, v, at, to, eta)
            variance = factor.item() ** 2 * variance + std.item() ** 2
        variances[steps] = variance
    assert variances == pytest.approx(VARIANCES[kind], abs=1e-3)


def test_sampled_sde_has_the_propagated_variance():
    """10,000 samples of the stochastic sampler have the variance that propagation predicts (0.194 at 10 steps)."""
    flow = GaussianFlow(std=0.5, dim=10_000)
    batch = make_batch(flow, range(1))
    path = integrate_sde(flow, batch, torch.linspace(1, 0, 11, dtype=torch.float64), 0.3)
    assert path.states[0, -1].var().item() == pytest.approx(0.194, abs=0.194 * 4 * math.sqrt(2 / 10_000))


def test_log_normal_closed_form():
    """For x' = mean + s xi: -mean(xi^2) / 2 - log s - log(2 pi) / 2, a mean over every latent dimension."""
    mean = torch.randn(4, 3, 5, generator=seeded(0), dtype=torch.float64)
    xi = torch.randn(4, 3, 5, generator=seeded(1), dtype=torch.float64)
    s = torch.tensor([0.1, 0.2, 0.5, 2.0], dtype=torch.float64).reshape(4, 1, 1)
    expected = -xi.square().mean((1, 2)) / 2 - s.flatten().log() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_normal(mean + s * xi, mean, s), expected, rtol=1e-12, atol=1e-12)
    reference = torch.distributions.Normal(mean, s).log_prob(mean + s * xi).mean((1, 2))
    torch.testing.assert_close(log_normal(mean + s * xi, mean, s), reference, rtol=1e-12, atol=1e-12)


def test_a_trajectory_is_what_was_sampled():
    """Every move and likelihood of ``integrate_sde`` follows from its stored states; x_0 leaves the last noise out."""
    flow, t = AffineFlow(4), shifted(4)
    batch = make_batch(flow, range(3))
    path = integrate_sde(flow, batch, t, 0.3)
    assert path.states.shape == (3, 5, 3)
    assert path.log_prob.shape == (3, 4)
    for i in range(4):
        x = path.states[:, i]
        mean, std = sde_step(x, flow.velocity(x, t[i], batch.cond), t[i], t[i + 1], 0.3)
        torch.testing.assert_close(path.log_prob[:, i], log_normal(path.states[:, i + 1], mean, std))
    v = flow.velocity(path.states[:, 3], t[3], batch.cond)
    torch.testing.assert_close(path.x_0, euler(path.states[:, 3], v, t[3], 0.0))


def test_a_draw_does_not_depend_on_how_the_batch_was_split():
    """``randn_like`` and the SDE give sample b the same numbers in a batch of 4 as alone."""
    flow = AffineFlow(4)
    whole = integrate_sde(flow, make_batch(flow, range(4)), shifted(4), 0.3)
    for b in range(4):
        alone = integrate_sde(flow, make_batch(flow, [b]), shifted(4), 0.3)
        torch.testing.assert_close(alone.states[0], whole.states[b], rtol=1e-14, atol=1e-14)


def test_groups_share_prompt_and_noise_but_not_randomness():
    """A group has prompt, text and noise of its first sample, but every sample its own generator; splits agree."""
    flow = AffineFlow(4)
    grouped = make_batch(flow, range(6)).grouped(3)
    plain = make_batch(flow, range(6))
    for b in range(6):
        first = b // 3 * 3
        assert grouped.prompts[b] == plain.prompts[first]
        assert torch.equal(grouped.noise[b], plain.noise[first])
        assert torch.equal(grouped.cond.tensors["shift"][b], plain.cond.tensors["shift"][first])
    draws = grouped.randn_like(grouped.noise)
    assert torch.equal(draws, plain.randn_like(plain.noise))
    assert torch.equal(make_batch(flow, range(3, 6)).grouped(3).noise, grouped.noise[3:])


def test_seeded_depends_on_the_whole_key():
    """Equal keys give equal streams; any other key gives another stream."""
    keys = [("noise", 0, 1, 2), ("noise", 0, 2, 1), ("noise", 0, 12), ("step", 0, 1, 2), ("noise", 1, 1, 2)]
    draws = [torch.rand((), generator=seeded(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [torch.rand((), generator=seeded(*key)).item() for key in keys]


def test_randint_includes_both_ends():
    """Uniform on low, ..., high."""
    rng = seeded(0)
    assert {randint(2, 5, rng) for _ in range(200)} == {2, 3, 4, 5}

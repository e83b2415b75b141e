import math

import pytest
import torch
from torch import nn

from hf_diffusion.losses.adversarial import (
    DIVERGENCES,
    bounded_exp,
    fake_loss,
    generator_loss,
    gradient_penalty,
    normalise_spectrally,
    r1_penalty,
    r1_weight,
    real_loss,
    variational_bound,
)


Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)  # the data
P = torch.tensor([0.4, 0.1, 0.25, 0.25], dtype=torch.float64)  # the generator


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum()


def divergences() -> dict[str, torch.Tensor]:
    middle = (Q + P) / 2
    return {
        "js": kl(Q, middle) + kl(P, middle) - 2 * math.log(2),  # 2 JS - 2 log 2
        "hellinger": (Q.sqrt() - P.sqrt()).square().sum(),
        "reverse_kl": kl(P, Q),
        "total_variation": (Q - P).abs().sum() / 2,
        "wasserstein": (Q - P).cumsum(0).abs().sum(),  # points one apart on a line
    }


def best_critics() -> dict[str, torch.Tensor]:
    ratio = (Q / P).log()
    slopes = -(Q - P).cumsum(0)[:-1].sign()  # of a Kantorovich potential: +-1 between neighbours
    return {
        "js": ratio,
        "hellinger": ratio / 2,
        "reverse_kl": ratio,
        "total_variation": 40 * ratio.sign(),
        "wasserstein": torch.cat([slopes.new_zeros(1), slopes.cumsum(0)]),
    }


def bound(divergence: str, critic: torch.Tensor) -> torch.Tensor:
    return -((Q * real_loss(divergence, critic)).sum() + (P * fake_loss(divergence, critic)).sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_bound_reaches_the_divergence_at_the_best_critic(divergence):
    torch.testing.assert_close(bound(divergence, best_critics()[divergence]), divergences()[divergence])


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "wasserstein"])
def test_every_other_critic_stays_below_the_divergence(divergence):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        critic = 2 * torch.randn(4, dtype=torch.float64, generator=generator)
        assert bound(divergence, critic) < divergences()[divergence]


@pytest.mark.parametrize("divergence", ["js", "hellinger", "reverse_kl"])
def test_ascending_the_bound_finds_the_best_critic(divergence):
    critic = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([critic], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -bound(divergence, critic)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(critic.detach(), best_critics()[divergence], atol=1e-3, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_values_mean_real_for_every_divergence(divergence):
    """The critic raises V on data and lowers it on samples, where the generator raises it."""
    v = torch.linspace(-4, 4, 33, dtype=torch.float64)
    assert bool((real_loss(divergence, v).diff() < 0).all())
    assert bool((fake_loss(divergence, v).diff() > 0).all())
    for saturating in (True, False, None):
        assert bool((generator_loss(divergence, v, saturating).diff() < 0).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_saturating_generator_minimises_the_bound_itself(divergence):
    v = torch.linspace(-4, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(generator_loss(divergence, v, saturating=True), -fake_loss(divergence, v))
    torch.testing.assert_close(generator_loss(divergence, v, saturating=False), real_loss(divergence, v))


def test_the_default_generator_loss_is_the_one_that_trains():
    v = torch.linspace(-4, 4, 9)
    for divergence in DIVERGENCES:
        assert torch.equal(generator_loss(divergence, v), generator_loss(divergence, v, divergence != "js"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_critics_give_finite_losses_and_gradients(divergence, dtype):
    v = torch.tensor([-6e4, -200.0, -20.0, 0.0, 20.0, 200.0, 6e4]).to(dtype).float().requires_grad_()
    for loss in (real_loss, fake_loss, generator_loss, lambda d, v: generator_loss(d, v, False)):
        values = loss(divergence, v.to(dtype))
        assert values.dtype == torch.float32 and bool(values.isfinite().all())
        (gradient,) = torch.autograd.grad(loss(divergence, v).sum(), v)
        assert bool(gradient.isfinite().all())


def test_the_losses_stay_in_float32_under_autocast():
    layer = nn.Linear(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        value = layer(torch.randn(5, 3))[:, 0]
        assert value.dtype == torch.bfloat16
        assert all(real_loss(d, value).dtype == generator_loss(d, value).dtype == torch.float32 for d in DIVERGENCES)


def test_the_bounded_exponential_is_smooth_and_convex():
    x = torch.linspace(5, 15, 2001, dtype=torch.float64)
    y = bounded_exp(x)
    inside = x < 10
    torch.testing.assert_close(y[inside], x[inside].exp())
    slopes = y.diff()
    assert bool((slopes.diff() > -1e-6).all())
    torch.testing.assert_close(bounded_exp(torch.tensor(12.0)), torch.tensor(3 * math.exp(10)))


def test_the_bound_in_the_log_is_that_of_the_table():
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5])
    torch.testing.assert_close(variational_bound("wasserstein", real, fake), torch.tensor(1.75))
    zeros = torch.zeros(3)
    torch.testing.assert_close(variational_bound("js", zeros, zeros), torch.tensor(-2 * math.log(2)))
    assert all(variational_bound(d, zeros, zeros) == 0 for d in DIVERGENCES if d != "js")


def test_r1_of_a_linear_critic_is_half_gamma_its_squared_slope():
    slope, x = torch.randn(3, 2, 2), torch.randn(5, 3, 2, 2, requires_grad=True)
    penalty = r1_penalty((slope * x).sum(dim=(1, 2, 3)), x, gamma=0.3)
    torch.testing.assert_close(penalty, torch.full((5,), 0.15 * float(slope.square().sum())))


def test_r1_reaches_the_parameters_of_the_critic():
    critic, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 2, requires_grad=True)
    r1_penalty(critic(x)[:, 0], x, gamma=1.0).mean().backward()
    assert all(bool(p.grad.any()) for p in (critic[0].weight, critic[2].weight))
    with pytest.raises(ValueError, match="requires_grad_"):
        r1_penalty(critic(x.detach())[:, 0], x.detach(), gamma=1.0)


def test_lazy_r1_is_due_at_every_interval_from_step_zero():
    assert [r1_weight(0.5, step) for step in range(3)] == [0.5, 0.5, 0.5]
    assert [r1_weight(0.5, step, 3) for step in range(5)] == [0.5, 0.0, 0.0, 0.5, 0.0]
    assert [r1_weight(0.5, step, 3, multiply=True) for step in range(5)] == [1.5, 0.0, 0.0, 1.5, 0.0]
    assert sum(r1_weight(0.5, step, 4, multiply=True) for step in range(40)) == sum(
        r1_weight(0.5, s) for s in range(40)
    )
    with pytest.raises(ValueError, match="at least 1"):
        r1_weight(0.5, 0, 0)


def test_the_gradient_penalty_vanishes_for_unit_slope_and_scales_with_c():
    direction = torch.tensor([0.6, 0.8])
    x, y, mix = torch.randn(6, 2), torch.randn(6, 2), torch.rand(6)
    torch.testing.assert_close(gradient_penalty(lambda v: v @ direction, x, y, mix), torch.zeros(6), atol=1e-6, rtol=0)
    scale = torch.tensor([1.0, 0.5, 0.25, 0.5, 1.0, 0.5])
    steep = gradient_penalty(lambda v: (v @ direction) / scale, x, y, mix, weight=3.0, scale=scale)
    torch.testing.assert_close(steep, torch.zeros(6), atol=1e-5, rtol=0)
    double = gradient_penalty(lambda v: 2 * v @ direction, x, y, mix, weight=3.0)
    torch.testing.assert_close(double, torch.full((6,), 3.0))


def test_the_gradient_penalty_looks_between_the_two_samples_in_float32():
    seen = []

    def critic(x):
        seen.append(x)
        return x.sum(dim=1)

    real, fake = torch.ones(3, 2, requires_grad=True), torch.zeros(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        gradient_penalty(critic, real, fake, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(seen[0].detach(), torch.tensor([[0.0, 0.0], [0.25, 0.25], [1.0, 1.0]]))
    assert seen[0].is_leaf and seen[0].dtype == torch.float32


def test_spectral_normalisation_bounds_the_slope():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(10)
    critic = normalise_spectrally(critic)
    for _ in range(30):  # the power iteration of each forward pass in training mode
        critic(torch.randn(2, 4))
    critic.eval()
    x = torch.randn(500, 4, requires_grad=True)
    slopes = torch.autograd.grad(critic(x).sum(), x)[0].norm(dim=1)
    assert float(slopes.max()) <= 1.01
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        normalise_spectrally(nn.ReLU())


def test_an_unknown_divergence_is_refused():
    for loss in (real_loss, fake_loss, generator_loss):
        with pytest.raises(ValueError, match="unknown divergence 'kl'"):
            loss("kl", torch.zeros(2))

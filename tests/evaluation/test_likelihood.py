import math

import pytest
import torch
from torch import nn

from hf_diffusion.evaluation.likelihood import bits_per_dim, mean_and_standard_error, prior_bits_per_dim
from hf_diffusion.losses.gaussian import prediction_target
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, LinearDDPMScheduler


SCALE = 0.25  # standard deviation of the Gaussian data


class OptimalModel(nn.Module):
    """The best network for data ~ N(0, SCALE^2): conditional mean, true variance of x_s."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler, self.dropout = scheduler, nn.Dropout(0.5)
        self.calls = []

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        self.calls.append((t, class_labels))
        alpha_bar = self.scheduler.alpha_bar[t].reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        x_0 = alpha_bar.sqrt() * SCALE**2 / total_variance(alpha_bar) * x_t
        noise = (1 - alpha_bar).sqrt() / total_variance(alpha_bar) * x_t
        output = self.dropout(prediction_target(self.scheduler, x_0, x_t, noise, t))
        if self.scheduler.config.variance_type == "learned":
            output = torch.cat(
                [output, true_log_variance(self.scheduler, t).reshape(alpha_bar.shape).expand_as(x_t)], dim=1
            )
        return (output,)


def total_variance(alpha_bar):
    return alpha_bar * SCALE**2 + 1 - alpha_bar


def levels(scheduler, t):
    """alpha_bar at t and at the previous timestep s."""
    s = scheduler.previous_timestep(t)
    return scheduler.alpha_bar[t], torch.where(s < 0, 1.0, scheduler.alpha_bar[s.clamp(min=0)])


def true_log_variance(scheduler, t):
    """log Var(x_s | x_t) for the data above, both x_s and x_t being Gaussian."""
    alpha_bar_t, alpha_bar_s = levels(scheduler, t)
    gain = alpha_bar_t / alpha_bar_s
    return (total_variance(alpha_bar_s) * (1 - gain * total_variance(alpha_bar_s) / total_variance(alpha_bar_t))).log()


def gaussian_data(*shape, seed=0):
    x = SCALE * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1  # onto the 8-bit lattice; 6e-5 of the data lie outside


def coarse_scheduler(**options):
    """Few steps, the first of them wide against the bins of 8-bit data, the last near N(0, 1)."""
    return LinearDDPMScheduler(20, beta_start=0.02, beta_end=0.5, **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "previous_mean"])
def test_each_kl_of_the_optimal_model_is_the_closed_form(prediction_type):
    """Eq. 8 of DDPM for one sample: (coefficient of x_0 times its error)^2 over 2 variances."""
    scheduler = CosineDDPMScheduler(30, prediction_type=prediction_type)
    x_0, noise = gaussian_data(5, 2, 3), torch.randn(30, 5, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    result = bits_per_dim(OptimalModel(scheduler), scheduler, x_0, noise, clip=False)
    assert result.timesteps.tolist() == list(range(29, -1, -1))
    for column, t in enumerate(result.timesteps[:-1].tolist()):
        alpha_bar, alpha_bar_s = scheduler.alpha_bar[t], scheduler.alpha_bar[t - 1]
        beta = 1 - alpha_bar / alpha_bar_s
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise[column]
        error = x_0 - alpha_bar.sqrt() * SCALE**2 / total_variance(alpha_bar) * x_t
        variance = beta * (1 - alpha_bar_s) / (1 - alpha_bar)
        kl = (alpha_bar_s.sqrt() * beta / (1 - alpha_bar)) ** 2 * error.square().mean((1, 2)) / (2 * variance)
        torch.testing.assert_close(result.vb[:, column], kl / math.log(2), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(result.xstart_mse[:, column], error.square().mean((1, 2)))
        torch.testing.assert_close(result.mse[:, column], error.square().mean((1, 2)) * alpha_bar / (1 - alpha_bar))


def test_the_terms_of_the_optimal_model_have_their_analytic_expectations():
    scheduler = coarse_scheduler()
    x_0 = gaussian_data(20_000, 2)
    result = bits_per_dim(
        OptimalModel(scheduler), scheduler, x_0, generator=torch.Generator().manual_seed(1), clip=False
    )
    alpha_bar = scheduler.alpha_bar
    variance_of_x_0 = SCALE**2 * (1 - alpha_bar) / total_variance(alpha_bar)  # Var(x_0 | x_t)
    torch.testing.assert_close(result.xstart_mse.mean(0).flip(0), variance_of_x_0, rtol=0.03, atol=0)
    # The KL with the posterior variance is Var(x_0 | x_t) (SNR_s - SNR_t) / 2, Eq. 14 of VDM
    # (arXiv:2107.00630).
    snr = alpha_bar / (1 - alpha_bar)
    expected = variance_of_x_0[1:] * (snr[:-1] - snr[1:]) / 2 / math.log(2)
    torch.testing.assert_close(result.vb.mean(0).flip(0)[1:], expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("sections", [None, "8", "ddim10"])
def test_the_bound_of_the_optimal_model_with_its_true_variances_is_the_entropy_of_the_data(sections):
    """Where the reverse process is exact the bound is the data's entropy and the prior's gap."""
    scheduler = coarse_scheduler(variance_type="learned")
    if sections is not None:
        scheduler.set_timesteps(timesteps=sections)
    x_0 = gaussian_data(20_000, 2)
    result = bits_per_dim(
        OptimalModel(scheduler),
        scheduler,
        x_0,
        generator=torch.Generator().manual_seed(1),
        clip=False,
        timesteps_per_batch=5,
    )
    entropy = 0.5 * math.log2(2 * math.pi * math.e * SCALE**2) - math.log2(2 / 255)
    # Of x_T, which the prior takes for 1.
    variance = total_variance(scheduler.alpha_bar[scheduler.timesteps[0]]).item()
    gap = 0.5 * (variance - 1 - math.log(variance)) / math.log(2)
    mean, error = mean_and_standard_error(result.total_bpd)
    assert error < 0.01
    assert mean == pytest.approx(entropy + gap, abs=4 * error + 0.005)  # 0.005: the tanh CDF, and bins of finite width


def test_a_model_that_is_not_optimal_has_a_larger_bound():
    scheduler = coarse_scheduler()
    x_0, noise = gaussian_data(500, 2), torch.randn(20, 500, 2, generator=torch.Generator().manual_seed(1)).double()
    optimal = OptimalModel(scheduler)
    best = bits_per_dim(optimal, scheduler, x_0, noise).total_bpd
    worse = bits_per_dim(lambda x, t, **options: (0.8 * optimal(x, t)[0],), scheduler, x_0, noise).total_bpd
    assert best.mean() < worse.mean()


def test_the_total_is_the_sum_of_its_parts_and_the_prior_the_kl_to_unit_noise():
    scheduler = CosineDDPMScheduler(50)
    scheduler.set_timesteps(5)
    x_0 = gaussian_data(4, 3, 2, 2)
    result = bits_per_dim(OptimalModel(scheduler), scheduler, x_0, generator=torch.Generator().manual_seed(0))
    assert result.vb.shape == result.mse.shape == result.xstart_mse.shape == (4, 5)
    torch.testing.assert_close(result.total_bpd, result.vb.sum(1) + result.prior_bpd)
    alpha_bar = scheduler.alpha_bar[scheduler.timesteps[0]]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt()), normal(0.0, 1.0))
    torch.testing.assert_close(result.prior_bpd, kl.mean((1, 2, 3)) / math.log(2))


def test_the_prior_costs_nothing_without_terminal_signal():
    scheduler = CosineDDPMScheduler(50, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert torch.equal(prior_bits_per_dim(scheduler, gaussian_data(3, 4)), torch.zeros(3).double())


@pytest.mark.parametrize("timesteps_per_batch", [1, 3, 100])
def test_sharing_a_forward_pass_between_timesteps_changes_nothing_but_the_calls(timesteps_per_batch):
    scheduler = CosineDDPMScheduler(10)
    x_0, labels, model = gaussian_data(2, 3), torch.tensor([4, 7]), OptimalModel(scheduler)
    result = bits_per_dim(
        model,
        scheduler,
        x_0,
        generator=torch.Generator().manual_seed(0),
        class_labels=labels,
        timesteps_per_batch=timesteps_per_batch,
    )
    noise = torch.stack(
        [
            torch.randn(2, 3, generator=g, dtype=torch.float64)
            for g in [torch.Generator().manual_seed(0)]
            for _ in range(10)
        ]
    )
    torch.testing.assert_close(bits_per_dim(OptimalModel(scheduler), scheduler, x_0, noise).vb, result.vb)
    assert len(model.calls) == math.ceil(10 / timesteps_per_batch)
    assert torch.cat([t for t, _ in model.calls]).tolist() == [t for t in range(9, -1, -1) for _ in range(2)]
    assert torch.cat([label for _, label in model.calls]).tolist() == [4, 7] * 10


def test_dropout_is_off_while_measuring_and_back_on_afterwards():
    scheduler = CosineDDPMScheduler(10)
    x_0, noise = gaussian_data(2, 3), torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    model = OptimalModel(scheduler)
    training = bits_per_dim(model.train(), scheduler, x_0, noise)
    assert model.training
    assert torch.equal(training.vb, bits_per_dim(model.eval(), scheduler, x_0, noise).vb)
    assert not model.training


def test_the_standard_error_is_the_spread_of_repeated_means():
    values = torch.randn(500, 100, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor([mean_and_standard_error(row)[1] for row in values])
    assert errors.mean().item() == pytest.approx(values.mean(1).std().item(), rel=0.1)
    assert math.isnan(mean_and_standard_error(torch.ones(1))[1])


def test_wrong_input_is_refused_with_what_to_do():
    scheduler, x_0 = CosineDDPMScheduler(10), gaussian_data(2, 3)
    model = OptimalModel(scheduler)
    with pytest.raises(ValueError, match="pixel / 127.5 - 1"):
        bits_per_dim(model, scheduler, torch.randint(0, 256, (2, 3)))
    with pytest.raises(ValueError, match="up to 255"):
        bits_per_dim(model, scheduler, torch.full((2, 3), 255.0))
    with pytest.raises(ValueError, match=r"give \(10, 2, 3\)"):
        bits_per_dim(model, scheduler, x_0, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="not both"):
        bits_per_dim(model, scheduler, x_0, torch.zeros(10, 2, 3), torch.Generator())
    with pytest.raises(ValueError, match="timesteps_per_batch=0"):
        bits_per_dim(model, scheduler, x_0, timesteps_per_batch=0)

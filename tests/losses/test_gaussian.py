import math
from types import SimpleNamespace

import pytest
import torch

from hf_diffusion.losses.gaussian import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    hybrid_loss,
    loss_weight,
    mean_loss,
    min_snr_weight,
    normal_kl,
    p2_weight,
    prediction_target,
    simple_loss,
    variance_loss,
    vb_terms_bits,
    vlb_loss,
)
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, LinearDDPMScheduler


PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "previous_mean"]
SHAPES = [(2,), (3, 5), (3, 4, 4), (1, 2, 4, 4)]  # points, sequences, images, volumes


def batch(scheduler, shape=(3, 4, 4), samples=7, dtype=torch.float64, seed=0):
    """x_0 on the 8-bit lattice, noise, timesteps that include the first and the last, and x_t."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = (torch.randint(0, 256, (samples, *shape), generator=generator) / 127.5 - 1).to(dtype)
    noise = torch.randn(x_0.shape, generator=generator, dtype=dtype)
    last = len(scheduler.timesteps) - 1
    t = scheduler.timesteps[torch.randint(0, last + 1, (samples,), generator=generator)]
    t[0], t[1] = scheduler.timesteps[-1], scheduler.timesteps[0]
    return x_0, noise, t, scheduler.add_noise(x_0, noise, t)


def table(prediction_type, alpha_bar):
    """The part of a scheduler that a weight reads, with any alpha_bar."""
    timesteps = torch.arange(len(alpha_bar)).flip(0)
    return SimpleNamespace(
        alpha_bar=torch.tensor(alpha_bar, dtype=torch.float64),
        timesteps=timesteps,
        config=SimpleNamespace(prediction_type=prediction_type),
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_target_is_what_the_scheduler_turns_back_into_x_0(prediction_type, shape):
    scheduler = CosineDDPMScheduler(100, prediction_type=prediction_type)
    x_0, noise, t, x_t = batch(scheduler, shape)
    target = prediction_target(scheduler, x_0, x_t, noise, t)
    torch.testing.assert_close(scheduler.predict_x_0(target, t, x_t, clip=False), x_0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_simple_loss_of_the_target_is_zero_and_of_a_shifted_target_the_squared_shift(prediction_type):
    scheduler = LinearDDPMScheduler(1000, prediction_type=prediction_type)
    x_0, noise, t, x_t = batch(scheduler)
    target = prediction_target(scheduler, x_0, x_t, noise, t)
    shift = torch.arange(7.0, dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert torch.equal(simple_loss(scheduler, target, x_0, x_t, noise, t), torch.zeros(7, dtype=torch.float64))
    loss = simple_loss(scheduler, target + shift, x_0, x_t, noise, t)
    torch.testing.assert_close(loss, torch.arange(7.0, dtype=torch.float64) ** 2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighted_error_is_the_same_number_for_every_prediction_type(prediction_type, weighting):
    """One error in x_0, told in each target's terms, has the paper's weight in x_0."""
    scheduler = LinearDDPMScheduler(1000, prediction_type=prediction_type)
    x_0, noise, t, x_t = batch(scheduler, samples=50)
    wrong_x_0 = x_0 + 0.1 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=x_0.dtype)
    wrong_noise = scheduler.predict_noise(wrong_x_0, t, x_t)
    output = prediction_target(scheduler, wrong_x_0, x_t, wrong_noise, t)
    weighted = loss_weight(scheduler, t, weighting, 5.0, 0.5, 1.0) * simple_loss(scheduler, output, x_0, x_t, noise, t)

    snr = scheduler.alpha_bar[t] / (1 - scheduler.alpha_bar[t])
    on_x_0 = {"min_snr": snr.clamp(max=5), "p2": snr / (1 + snr) ** 0.5}[weighting]
    torch.testing.assert_close(weighted, on_x_0 * (wrong_x_0 - x_0).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_weights_are_the_closed_forms_in_snr():
    t = torch.arange(1000)
    for schedule in (LinearDDPMScheduler, CosineDDPMScheduler):
        for prediction_type, divisor in (
            ("epsilon", lambda snr: snr),
            ("sample", lambda snr: 1),
            ("v_prediction", lambda snr: snr + 1),
        ):
            scheduler = schedule(1000, prediction_type=prediction_type)
            snr = scheduler.alpha_bar / (1 - scheduler.alpha_bar)
            expected = snr.clamp(max=5) / divisor(snr)
            torch.testing.assert_close(loss_weight(scheduler, t, "min_snr"), expected.float())
            expected = snr / divisor(snr) / (1 + snr)
            torch.testing.assert_close(loss_weight(scheduler, t, "p2"), expected.float())
            assert torch.equal(loss_weight(scheduler, t), torch.ones(1000))


def test_min_snr_weights_have_their_limits_without_noise_and_without_signal():
    alpha_bar, t = [1.0, 0.5, 0.0], torch.arange(3)  # SNR inf, 1 and 0
    assert min_snr_weight(table("epsilon", alpha_bar), t, 0.5).tolist() == [0.0, 0.5, 1.0]
    assert min_snr_weight(table("sample", alpha_bar), t, 0.5).tolist() == [0.5, 0.5, 0.0]
    assert min_snr_weight(table("v_prediction", alpha_bar), t, 0.5).tolist() == [0.0, 0.25, 0.0]


def test_p2_weights_have_their_limits_without_noise_and_without_signal():
    alpha_bar, t = [1.0, 0.5, 0.0], torch.arange(3)
    assert p2_weight(table("epsilon", alpha_bar), t).tolist() == [0.0, 0.5, 1.0]
    assert p2_weight(table("v_prediction", alpha_bar), t).tolist() == [0.0, 0.25, 0.0]


def test_v_weights_are_finite_at_zero_terminal_snr():
    scheduler = CosineDDPMScheduler(100, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for weighting in ("min_snr", "p2"):
        weights = loss_weight(scheduler, torch.arange(100), weighting)
        assert weights.isfinite().all() and weights[-1] == 0 and (weights[:-1] > 0).all()


def test_a_weight_for_a_timestep_outside_the_run_is_nan_where_it_depends_on_the_run():
    scheduler = LinearDDPMScheduler(100, prediction_type="previous_mean")
    scheduler.set_timesteps(10)
    weights = loss_weight(scheduler, torch.arange(100), "min_snr")
    assert weights.isfinite().nonzero().flatten().tolist() == scheduler.timesteps.flip(0).tolist()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_kl_of_a_fixed_variance_is_the_mean_loss_and_a_constant(prediction_type, variance_type):
    """Eq. 5 of DDPM against its Eq. 8: the two differ by what does not depend on the network."""
    scheduler = LinearDDPMScheduler(
        50, rescale_betas_by_steps=True, prediction_type=prediction_type, variance_type=variance_type
    )
    x_0, noise, t, x_t = batch(scheduler)
    outputs = [prediction_target(scheduler, x_0, x_t, noise, t), noise, 0.3 * x_t]
    gaps = [
        vb_terms_bits(scheduler, output, x_0, x_t, t, clip=False).kl_bits * math.log(2)
        - mean_loss(scheduler, output, x_0, x_t, t)
        for output in outputs
    ]
    torch.testing.assert_close(gaps[1], gaps[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gaps[2], gaps[0], rtol=1e-7, atol=1e-9)
    if variance_type == "fixed_small":
        torch.testing.assert_close(gaps[0], torch.zeros_like(gaps[0]))


def test_the_kl_is_zero_between_equals_positive_otherwise_and_matches_torch():
    mean1, log_variance1, mean2, log_variance2 = torch.randn(
        4, 1000, generator=torch.Generator().manual_seed(0)
    ).double()
    kl = normal_kl(mean1, log_variance1, mean2, log_variance2)
    normal = torch.distributions.Normal
    p, q = normal(mean1, (0.5 * log_variance1).exp()), normal(mean2, (0.5 * log_variance2).exp())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))
    assert (kl > 0).all()
    torch.testing.assert_close(normal_kl(mean1, log_variance1, mean1, log_variance1), torch.zeros(1000).double())


def test_the_cdf_is_near_the_normal_one_and_finite_with_its_gradient_everywhere():
    z = torch.tensor([-1e30, -50.0, -1.0, 0.0, 1.0, 50.0, 1e30], requires_grad=True)
    cdf = approx_standard_normal_cdf(z)
    torch.testing.assert_close(cdf.detach(), torch.special.ndtr(z.detach()), rtol=0, atol=4e-4)
    cdf.sum().backward()
    assert z.grad.isfinite().all()


def test_the_probabilities_of_the_256_bins_sum_to_one():
    x = torch.arange(256).double() / 127.5 - 1
    for mean in (-1.2, -0.31, 0.5, 1.0):
        for log_scale in (-4.0, -1.0, 1.0):
            log_scales = torch.full_like(x, log_scale)
            probabilities = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), log_scales).exp()
            assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_hybrid_loss_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound(
    variance_type, prediction_type
):
    scheduler = CosineDDPMScheduler(40, prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise, t, x_t = batch(scheduler, (2, 3, 3))
    output = 0.3 * torch.randn(7, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.requires_grad_()
    weight = loss_weight(scheduler, t, "min_snr")
    (hybrid,) = torch.autograd.grad(
        hybrid_loss(scheduler, output, x_0, x_t, noise, t, vlb_weight=0.01, simple_weight=weight).sum(), output
    )
    (simple,) = torch.autograd.grad((weight * simple_loss(scheduler, output, x_0, x_t, noise, t)).sum(), output)
    (bound,) = torch.autograd.grad(vlb_loss(scheduler, output, x_0, x_t, t).sum(), output)
    torch.testing.assert_close(hybrid[:, :2], simple[:, :2], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(hybrid[:, 2:], 0.01 * bound[:, 2:], rtol=1e-9, atol=1e-15)
    assert (simple[:, 2:] == 0).all() and (bound[:, 2:] != 0).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_are_means_over_all_dimensions_however_these_are_arranged(shape):
    scheduler = CosineDDPMScheduler(40, variance_type="learned_range")
    x_0, noise, t, x_t = batch(scheduler, shape)
    values = 0.3 * torch.randn(2, *x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    as_given = hybrid_loss(scheduler, torch.cat([*values], dim=1), x_0, x_t, noise, t)
    as_points = hybrid_loss(
        scheduler, torch.cat([*values.flatten(2)], dim=1), *(x.flatten(1) for x in (x_0, x_t, noise)), t
    )
    assert as_given.shape == (7,)
    torch.testing.assert_close(as_given, as_points)


def test_the_bound_trains_a_prediction_of_x_0_beyond_the_data_range_too():
    """Its terms are (on_x_0 (x_0 - predicted))^2 / (2 variance), with the prediction as it is."""
    scheduler = LinearDDPMScheduler(1000, prediction_type="sample")
    x_0, noise, t, x_t = batch(scheduler)
    t = t.clamp(min=1)  # timestep 0 has the decoder's term
    x_t = scheduler.add_noise(x_0, noise, t)
    predicted = (3 * x_0).requires_grad_()
    loss = vlb_loss(scheduler, predicted, x_0, x_t, t, rescaled=False)
    zero = torch.zeros_like(x_0)
    on_x_0, variance = scheduler.posterior(zero + 1, zero, t, t - 1)
    terms = (on_x_0 * (x_0 - predicted)) ** 2 / (2 * variance) / math.log(2)
    torch.testing.assert_close(loss, terms.mean((1, 2, 3)), rtol=1e-7, atol=0)
    loss.sum().backward()
    assert (predicted.grad[x_0.abs() > 0.5] != 0).all()


def test_the_bound_uses_the_decoder_at_the_last_denoising_step_of_the_run_only():
    scheduler = LinearDDPMScheduler(100)
    scheduler.set_timesteps(timesteps=[80, 40, 7])
    x_0, noise, _, _ = batch(scheduler, samples=3)
    t = torch.tensor([7, 40, 80])
    terms = vb_terms_bits(scheduler, noise, x_0, scheduler.add_noise(x_0, noise, t), t)
    assert terms.bits[0] == terms.decoder_bits[0]
    assert torch.equal(terms.bits[1:], terms.kl_bits[1:])
    assert (terms.decoder_bits > 0).all()


@pytest.mark.parametrize("steps", [12, 40])
def test_the_mean_of_the_rescaled_bound_over_the_timesteps_of_a_run_is_their_sum(steps):
    scheduler = CosineDDPMScheduler(40)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps
    noise = torch.randn(steps, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = torch.zeros_like(noise)
    x_t = scheduler.add_noise(x_0, noise, t)
    rescaled, terms = (vlb_loss(scheduler, 0.5 * noise, x_0, x_t, t, rescaled=r) for r in (True, False))
    torch.testing.assert_close(rescaled.mean(), terms.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_lose_nothing_beyond_their_own_rounding(dtype):
    scheduler = CosineDDPMScheduler(1000, variance_type="learned_range")
    x_0, noise, t, x_t = batch(scheduler, dtype=torch.float32)
    output = (0.3 * torch.randn(7, 6, 4, 4, generator=torch.Generator().manual_seed(1))).to(dtype)
    half, full = (hybrid_loss(scheduler, o, x_0, x_t, noise, t) for o in (output, output.float()))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


def test_every_objective_gives_a_finite_float32_loss_and_gradient_at_every_timestep():
    t = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    for schedule in (LinearDDPMScheduler, CosineDDPMScheduler):
        for variance_type in ("learned_range", "learned"):
            scheduler = schedule(1000, variance_type=variance_type)
            x_0 = torch.randint(0, 256, (1000, 1, 2, 2), generator=generator) / 127.5 - 1
            noise = torch.randn(x_0.shape, generator=generator)
            x_t = scheduler.add_noise(x_0, noise, t)
            output = torch.randn(1000, 2, 2, 2, generator=generator).requires_grad_()
            for loss in (
                hybrid_loss(scheduler, output, x_0, x_t, noise, t),
                vlb_loss(scheduler, output, x_0, x_t, t),
            ):
                (gradient,) = torch.autograd.grad(loss.sum(), output)
                assert loss.shape == (1000,) and loss.dtype == torch.float32
                assert loss.isfinite().all() and gradient.isfinite().all()


def test_wrong_input_is_refused_with_what_to_do():
    scheduler = LinearDDPMScheduler(100, variance_type="learned_range")
    x_0, noise, t, x_t = batch(scheduler)
    with pytest.raises(ValueError, match="out_channels"):
        simple_loss(scheduler, noise, x_0, x_t, noise, t)
    with pytest.raises(ValueError, match="hybrid_loss"):
        mean_loss(scheduler, torch.cat([noise, noise], dim=1), x_0, x_t, t)
    with pytest.raises(ValueError, match="'min_snr', 'p2', 'uniform'"):
        loss_weight(scheduler, t, "snr")
    with pytest.raises(ValueError, match="min_snr_gamma=0"):
        loss_weight(scheduler, t, "min_snr", min_snr_gamma=0)
    with pytest.raises(ValueError, match="p2_k=0"):
        loss_weight(scheduler, t, "p2", p2_k=0)
    fixed = LinearDDPMScheduler(100)
    with pytest.raises(ValueError, match="learned_range"):
        variance_loss(fixed, noise, x_0, x_t, t)
    with pytest.raises(ValueError, match="out_channels"):
        simple_loss(fixed, torch.cat([noise, noise], dim=1), x_0, x_t, noise, t)


@pytest.mark.parametrize("function", [min_snr_weight, p2_weight])
def test_weights_refuse_a_prediction_type_of_another_scheduler(function):
    with pytest.raises(ValueError, match="'score'.*'v_prediction'"):
        function(table("score", [0.9, 0.1]), torch.arange(2))


def test_the_target_refuses_a_prediction_type_of_another_scheduler():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'score'.*'v_prediction'"):
        prediction_target(table("score", [0.9, 0.1]), x, x, x, torch.arange(2))

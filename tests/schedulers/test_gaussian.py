"""The three Gaussian schedulers: identities, statistics, agreement with diffusers, errors."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hf_diffusion.schedulers.scheduling_gaussian import (
    CosineDDPMScheduler,
    DDIMEtaScheduler,
    ImprovedPNDMScheduler,
    LinearDDPMScheduler,
    space_timesteps,
)


ALL = [LinearDDPMScheduler, CosineDDPMScheduler, DDIMEtaScheduler]
OWN = [*ALL, ImprovedPNDMScheduler]
SPACINGS = ["leading", "trailing", "linspace"]


def batch(seed=0, shape=(4, 3, 8, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


# --- identities of the process


@pytest.mark.parametrize("cls", ALL)
def test_posterior_along_the_mean_path_stays_on_it(cls):
    scheduler, (x_0, _, _) = cls(), batch()
    t, s = torch.tensor([999, 500, 10, 1]), torch.tensor([998, 0, 3, 0])
    along = scheduler.add_noise(x_0, torch.zeros_like(x_0), t)
    mean, _ = scheduler.posterior(x_0, along, t, s)
    torch.testing.assert_close(mean, scheduler.add_noise(x_0, torch.zeros_like(x_0), s), rtol=1e-9, atol=1e-12)


def test_posterior_at_clean_data_is_the_data():
    scheduler, (x_0, x_t, _) = LinearDDPMScheduler(), batch()
    mean, variance = scheduler.posterior(x_0, x_t, 300, -1)
    torch.testing.assert_close(mean, x_0)
    assert variance.abs().max() == 0


def test_noising_in_two_jumps_has_the_moments_of_one():
    """q(x_s | x_0) followed by the chain s -> t equals q(x_t | x_0)."""
    scheduler = CosineDDPMScheduler()
    s, t = 200, 700
    ratio = scheduler.alpha_bar[t] / scheduler.alpha_bar[s]
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    noise_s, noise_t = scheduler.add_noise(zero, one, s), scheduler.add_noise(zero, one, t)
    torch.testing.assert_close(ratio * noise_s**2 + (1 - ratio), noise_t**2)
    torch.testing.assert_close(ratio.sqrt() * scheduler.add_noise(one, zero, s), scheduler.add_noise(one, zero, t))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "previous_mean"])
@pytest.mark.parametrize("timesteps", [None, "10,10,5"])
def test_the_true_output_of_each_prediction_type_gives_back_x_0(kind, timesteps):
    scheduler, (x_0, noise, _) = LinearDDPMScheduler(prediction_type=kind, clip_sample=False), batch()
    if timesteps:
        scheduler.set_timesteps(timesteps=timesteps)
    t = scheduler.timesteps[[0, 3, 9, -1]]
    x_t = scheduler.add_noise(x_0, noise, t)
    s = scheduler.previous_timestep(t)
    truth = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": scheduler.get_velocity(x_0, noise, t),
        "previous_mean": scheduler.posterior(x_0, x_t, t, s)[0],
    }
    torch.testing.assert_close(scheduler.predict_x_0(truth[kind], t, x_t), x_0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(scheduler.predict_noise(x_0, t, x_t), noise, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 600, 1000])
def test_a_perfect_network_ends_at_x_0_for_any_spacing_and_step_count(spacing, steps):
    """Both kinds of step; LinearDDPMScheduler and CosineDDPMScheduler differ by a default only."""
    for cls in (CosineDDPMScheduler, DDIMEtaScheduler):
        scheduler = cls(clip_sample=False, timestep_spacing=spacing, prediction_type="v_prediction")
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps and (scheduler.timesteps.diff() < 0).all()
        x_0, noise, _ = batch(shape=(2, 1, 2, 2))
        x = scheduler.add_noise(x_0, noise, int(scheduler.timesteps[0]))
        generator = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            alpha_bar = scheduler.alpha_bar[t]
            eps = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
            v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
            x = scheduler.step(v, t, x, generator=generator).prev_sample
        torch.testing.assert_close(x, x_0, rtol=1e-6, atol=1e-6)


def test_ddim_with_eta_1_is_fixed_small_ddpm():
    x_t, noise, eps = batch()
    ddpm, ddim = LinearDDPMScheduler(), DDIMEtaScheduler(eta=1.0)
    for scheduler in (ddpm, ddim):
        scheduler.set_timesteps(25)
    for t in ddpm.timesteps:
        a = ddpm.step(eps, t, x_t, variance_noise=noise).prev_sample
        torch.testing.assert_close(ddim.step(eps, t, x_t, variance_noise=noise).prev_sample, a, rtol=1e-7, atol=1e-7)


def test_eta_of_the_step_overrides_the_configured_one():
    x_t, noise, eps = batch()
    quiet, noisy = DDIMEtaScheduler(eta=0.0), DDIMEtaScheduler(eta=0.7)
    same = quiet.step(eps, 500, x_t, eta=0.7, variance_noise=noise).prev_sample
    torch.testing.assert_close(noisy.step(eps, 500, x_t, variance_noise=noise).prev_sample, same, rtol=0, atol=0)
    assert (quiet.step(eps, 500, x_t).prev_sample - same).abs().max() > 0.01


@pytest.mark.parametrize("clip", [False, True])
def test_inversion_adds_the_noise_between_the_predicted_x_0_and_x_t_up_to_the_next_level(clip):
    """x_next = sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next) noise(x_0, x_t)."""
    scheduler, (x_0, noise, wrong) = DDIMEtaScheduler(clip_sample=clip), batch()
    scheduler.set_timesteps(20)
    t = scheduler.timesteps
    for low, high in zip(t[1:], t[:-1]):
        x_low = scheduler.add_noise(x_0, noise, low)
        out = scheduler.inverse_step(wrong, low, x_low)
        predicted = scheduler.predict_x_0(wrong, low, x_low)
        assert torch.equal(predicted.abs().max() > 1, torch.tensor(not clip))
        expected = scheduler.add_noise(predicted, scheduler.predict_noise(predicted, low, x_low), high)
        torch.testing.assert_close(out.pred_original_sample, predicted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.prev_sample, expected, rtol=1e-9, atol=1e-9)
    # beyond the noisiest timestep no x_0 is left
    last = scheduler.inverse_step(noise, t[0], scheduler.add_noise(x_0.clamp(-1, 1), noise, t[0]))
    torch.testing.assert_close(last.prev_sample, noise, rtol=1e-9, atol=1e-9)


def test_inversion_undoes_a_ddim_step_where_the_prediction_agrees():
    scheduler, (x_0, noise, _) = DDIMEtaScheduler(clip_sample=False), batch()
    scheduler.set_timesteps(20)
    for low, high in zip(scheduler.timesteps[1:], scheduler.timesteps[:-1]):
        x_high = scheduler.add_noise(x_0, noise, high)
        x_low = scheduler.step(noise, high, x_high).prev_sample
        torch.testing.assert_close(scheduler.inverse_step(noise, low, x_low).prev_sample, x_high)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_guided_ddim_step_is_the_step_of_the_shifted_noise(eta):
    """noise - sqrt(1 - alpha_bar) gradient, Algorithm 2 of arXiv:2105.05233, in x_s and in x_0."""
    scheduler, (x_t, gradient, eps) = DDIMEtaScheduler(clip_sample=False, eta=eta), batch()
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        shifted = eps - (1 - scheduler.alpha_bar[t]).sqrt() * gradient
        guided = scheduler.step(eps, t, x_t, variance_noise=gradient, gradient=gradient)
        expected = scheduler.step(shifted, t, x_t, variance_noise=gradient)
        torch.testing.assert_close(guided.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(guided.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-9)


def test_guidance_by_the_gradient_of_a_gaussian_class_samples_the_gaussian_class():
    """p(y | x_0) of N(0, 1) data is Gaussian: the guided x_0 is the mean of x_0 given x_t and y."""
    scheduler, (x_t, _, _) = DDIMEtaScheduler(clip_sample=False), batch()
    scheduler.set_timesteps(20)
    y, spread = 0.7, 0.3  # y = x_0 + spread * noise
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alpha_bar[t]
        eps = (1 - alpha_bar).sqrt() * x_t  # of data N(0, 1)
        total = 1 - alpha_bar + spread**2  # variance of y given x_t, whose mean is sqrt(alpha_bar) x_t
        gradient = alpha_bar.sqrt() * (y - alpha_bar.sqrt() * x_t) / total
        # the mean of x_0 given x_t, corrected by what y tells, by Bayes' rule for Gaussians
        mean = alpha_bar.sqrt() * x_t + (1 - alpha_bar) / total * (y - alpha_bar.sqrt() * x_t)
        x_0 = scheduler.step(eps, t, x_t, gradient=gradient).pred_original_sample
        torch.testing.assert_close(x_0, mean, rtol=1e-9, atol=1e-9)


def test_ancestral_steps_with_the_optimal_network_keep_gaussian_data_gaussian():
    """Data N(0, 0.25): E[noise | x_t] is linear in x_t, so the sampler's variance is known."""
    scheduler = CosineDDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alpha_bar[t]
        eps = (1 - alpha_bar).sqrt() * x / (alpha_bar * 0.25 + 1 - alpha_bar)
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    assert abs(x.std() - 0.5) < 0.015 and abs(x.mean()) < 0.015


def test_respaced_betas_multiply_to_the_same_process():
    scheduler = LinearDDPMScheduler()
    scheduler.set_timesteps(timesteps="ddim25")
    x_0, noise, _ = batch()
    t = scheduler.timesteps
    s = scheduler.previous_timestep(t)
    before = torch.where(s >= 0, scheduler.alpha_bar[s], 1.0)
    torch.testing.assert_close(
        torch.cumprod((scheduler.alpha_bar[t] / before).flip(0), 0), scheduler.alpha_bar[t].flip(0)
    )


def test_the_cosine_schedule_is_eq_17_capped_at_a_beta_of_0_999():
    for steps in (10, 1000):
        scheduler = CosineDDPMScheduler(steps)
        t = torch.arange(steps - 1).double()
        level = (((t + 1) / steps + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        closed_form = level / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close(scheduler.alpha_bar[:-1], closed_form, rtol=1e-9, atol=0)
        # f is 0 at the end, where the beta would be 1
        assert scheduler.betas[-1] == 0.999
        torch.testing.assert_close(scheduler.alpha_bar[-1], 0.001 * closed_form[-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("timesteps", ["25", "10,10,5", "ddim25", [900, 40, 3]])
def test_the_last_variance_of_fixed_large_is_the_posterior_variance_of_the_step_before(timesteps):
    """As in OpenAI's tables: every other variance is the beta of the run."""
    scheduler, (x_t, _, eps) = LinearDDPMScheduler(variance_type="fixed_large"), batch(shape=(1, 2))
    scheduler.set_timesteps(timesteps=timesteps)
    t, alpha_bar = scheduler.timesteps, scheduler.alpha_bar[scheduler.timesteps]
    betas = 1 - alpha_bar / torch.cat([alpha_bar[1:], torch.ones(1).double()])
    posterior = scheduler.posterior(x_t, x_t, int(t[-2]), int(t[-1]))[1].item()
    expected = [*betas[:-1].tolist(), posterior]
    assert posterior < 0.9 * betas[-2]
    for i, time in enumerate(t):
        _, variance, log_variance, _ = scheduler.p_mean_variance(eps, time, x_t)
        assert variance.unique().item() == pytest.approx(expected[i], rel=1e-12)
        assert log_variance.unique().item() == pytest.approx(math.log(expected[i]), rel=1e-12)
        assert scheduler.guidance_weight(eps, time, x_t) == pytest.approx(expected[i], rel=1e-12)


def test_a_run_of_one_step_takes_its_beta_for_the_last_variance():
    x_t, _, eps = batch(shape=(1, 2))
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = LinearDDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(timesteps=[700])
        log_variance = scheduler.p_mean_variance(eps, 700, x_t)[2].unique().item()
        assert log_variance == pytest.approx(math.log(1 - scheduler.alpha_bar[700].item()), rel=1e-12)


def test_space_timesteps_rounds_an_added_up_stride_half_to_even():
    assert space_timesteps(6, "3") == [0, 2, 5]  # 2.5 goes to 2
    assert space_timesteps(8, "3") == [0, 4, 7]  # 3.5 goes to 4
    # seven strides of 15 / 14 add up to less than 7.5, and i * stride would be 7.5, which goes to 8
    assert space_timesteps(16, "15") == [t for t in range(16) if t != 8]
    # sections of 4, 3 and 3: the first ones take what does not divide
    assert space_timesteps(10, "2,1,3") == [0, 3, 4, 7, 8, 9]
    assert space_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]


def test_learned_range_lies_between_the_two_fixed_variances():
    x_t, noise, eps = batch()
    t = torch.tensor([999, 500, 20, 1])
    learned = LinearDDPMScheduler(variance_type="learned_range")
    low = learned.p_mean_variance(torch.cat([eps, -torch.ones_like(eps)], 1), t, x_t)[2]
    high = learned.p_mean_variance(torch.cat([eps, torch.ones_like(eps)], 1), t, x_t)[2]
    torch.testing.assert_close(low, LinearDDPMScheduler().p_mean_variance(eps, t, x_t)[2])
    torch.testing.assert_close(high, LinearDDPMScheduler(variance_type="fixed_large").p_mean_variance(eps, t, x_t)[2])


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "previous_mean"])
def test_a_step_draws_from_p_mean_variance(variance_type, kind):
    scheduler, (x_t, noise, out) = CosineDDPMScheduler(variance_type=variance_type, prediction_type=kind), batch()
    scheduler.set_timesteps(40)
    out = torch.cat([out, 0.3 * noise], 1) if "learned" in variance_type else out
    for t in (scheduler.timesteps[0], scheduler.timesteps[17], scheduler.timesteps[-2], scheduler.timesteps[-1]):
        mean, _, log_variance, x_0 = scheduler.p_mean_variance(out, t, x_t)
        step = scheduler.step(out, t, x_t, variance_noise=noise)
        std = (0.5 * log_variance).exp() if t != scheduler.timesteps[-1] else 0
        torch.testing.assert_close(step.prev_sample, mean + std * noise, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.pred_original_sample, x_0, rtol=1e-9, atol=1e-9)


def test_any_rank_broadcasts():
    for shape in [(6,), (6, 2), (6, 1, 4), (6, 2, 3, 4, 5)]:
        x_0, noise, _ = batch(shape=shape)
        t = torch.tensor([0, 1, 5, 100, 500, 999])
        for cls in ALL:
            scheduler = cls()
            assert scheduler.add_noise(x_0, noise, t).shape == shape
            assert scheduler.step(noise, 500, x_0).prev_sample.shape == shape


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start():
    scheduler = LinearDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    x_0, noise, _ = batch()
    torch.testing.assert_close(scheduler.add_noise(x_0, noise, 999), noise, rtol=0, atol=0)
    torch.testing.assert_close(scheduler.alpha_bar[0], LinearDDPMScheduler().alpha_bar[0])
    scheduler.set_timesteps(10, device="cpu")
    assert scheduler.step(noise, scheduler.timesteps[0], noise).prev_sample.isfinite().all()


def test_dynamic_thresholding_brings_each_sample_to_its_quantile():
    scheduler = LinearDDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0, prediction_type="sample"
    )
    x, _, _ = batch()
    x = x * torch.tensor([0.1, 1.0, 3.0, 30.0]).reshape(4, 1, 1, 1).double()
    out = scheduler.predict_x_0(x, 10, x)
    torch.testing.assert_close(out[0], x[0])  # below 1: nothing to do
    assert out.abs().max() <= 1 and out[3].abs().mean() > 0.9  # 2.0 is the widest bound
    bound = torch.quantile(x[1].abs().flatten(), 0.9)
    torch.testing.assert_close(out[1], (x[1] / bound).clamp(-1, 1))


def test_rescaled_linear_betas_stand_in_the_config():
    scheduler = LinearDDPMScheduler(num_train_timesteps=100, rescale_betas_by_steps=True)
    assert math.isclose(scheduler.config.beta_end, 0.2) and not scheduler.config.rescale_betas_by_steps
    stock = DDPMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(stock.alphas_cumprod.double(), scheduler.alpha_bar, rtol=1e-4, atol=1e-6)


# --- against the stock schedulers


@pytest.mark.parametrize("steps", [10, 50, 250, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_the_stock_ones_where_n_divides_t(steps, spacing):
    ours, stock = LinearDDPMScheduler(timestep_spacing=spacing), DDPMScheduler(timestep_spacing=spacing)
    ours.set_timesteps(steps)
    stock.set_timesteps(steps)
    assert torch.equal(ours.timesteps, stock.timesteps)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_steps_agree_with_the_stock_schedulers_where_those_are_right(kind):
    x_t, noise, out = batch(dtype=torch.float32)
    ours, stock = LinearDDPMScheduler(prediction_type=kind), DDPMScheduler(prediction_type=kind)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    for t in stock.timesteps[:-2]:
        a = ours.step(out, t, x_t, generator=torch.manual_seed(3)).prev_sample
        b = stock.step(out, t, x_t, generator=torch.manual_seed(3)).prev_sample
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    ours, stock = DDIMEtaScheduler(prediction_type=kind), DDIMScheduler(prediction_type=kind)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    for t in stock.timesteps[:-1]:
        a = ours.step(out, t, x_t, eta=0.5, variance_noise=noise).prev_sample
        b = stock.step(out, t, x_t, eta=0.5, variance_noise=noise, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "other", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler]
)
@pytest.mark.parametrize("cls", ALL)
def test_swapping_the_scheduler_keeps_the_process_there_and_back(cls, other):
    ours = cls(prediction_type="v_prediction")
    stock = other.from_config(ours.config)
    torch.testing.assert_close(stock.alphas_cumprod.double(), ours.alpha_bar, rtol=1e-3, atol=1e-6)
    assert stock.config.prediction_type == "v_prediction"
    back = cls.from_config(stock.config)
    torch.testing.assert_close(back.alpha_bar, ours.alpha_bar, rtol=0, atol=0)
    assert {k: v for k, v in back.config.items() if k in ours.config and k != "timestep_spacing"} == {
        k: v for k, v in ours.config.items() if k != "timestep_spacing"
    }


def test_a_stock_solver_samples_the_model_of_a_cosine_scheduler_at_default_values(tmp_path):
    """The optimal network for N(0.3, 0.2^2): the swapped solver must know our schedule."""
    CosineDDPMScheduler().save_pretrained(tmp_path)
    for config in (CosineDDPMScheduler().config, CosineDDPMScheduler.from_pretrained(tmp_path).config):
        solver = DPMSolverMultistepScheduler.from_config(config)
        solver.set_timesteps(25)
        x = torch.randn(4000, 1, 1, 1, generator=torch.manual_seed(0))
        alpha_bar = CosineDDPMScheduler().alpha_bar.float()
        for t in solver.timesteps:
            a = alpha_bar[t]
            eps = (1 - a).sqrt() * (x - a.sqrt() * 0.3) / (a * 0.04 + 1 - a)
            x = solver.step(eps, t, x).prev_sample
        assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02


# --- defects of the stock schedulers that must not be here (reference/openai.md 9, peers.md 2E)


@pytest.mark.parametrize("spacing, steps", [("linspace", 10), ("trailing", 7), ("leading", 30), ("linspace", 33)])
def test_ddim_goes_to_the_next_timestep_of_the_list_not_a_fixed_stride_away(spacing, steps):
    scheduler, (x_0, noise, _) = DDIMEtaScheduler(timestep_spacing=spacing, clip_sample=False), batch()
    scheduler.set_timesteps(steps)
    for t, s in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:]):
        x_s = scheduler.step(noise, t, scheduler.add_noise(x_0, noise, t)).prev_sample
        torch.testing.assert_close(x_s, scheduler.add_noise(x_0, noise, s), rtol=1e-7, atol=1e-7)
        assert scheduler.previous_timestep(int(t)) == int(s)


def test_the_first_levels_have_float64_precision():
    for cls in (LinearDDPMScheduler, CosineDDPMScheduler):
        scheduler = cls()
        exact = scheduler.betas[0]
        assert abs(1 - scheduler.alpha_bar[0] - exact) / exact < 1e-9
        stock = DDPMScheduler(beta_schedule=scheduler.config.beta_schedule)
        assert abs(1 - stock.alphas_cumprod[0].double() - exact) / exact > 1e-5  # the defect that is absent here


def test_ddim_takes_learned_variance_outputs_and_ignores_their_second_half():
    x_t, noise, eps = batch()
    scheduler = DDIMEtaScheduler(variance_type="learned_range")
    a = scheduler.step(torch.cat([eps, noise], 1), 500, x_t).prev_sample
    torch.testing.assert_close(a, DDIMEtaScheduler().step(eps, 500, x_t).prev_sample, rtol=0, atol=0)


def test_learned_variance_is_finite_at_every_step():
    scheduler, (x_t, noise, eps) = LinearDDPMScheduler(variance_type="learned"), batch(shape=(1, 3, 2, 2))
    for t in scheduler.timesteps[::50]:
        assert (
            scheduler.step(torch.cat([eps, -3 + noise], 1), t, x_t, variance_noise=noise).prev_sample.isfinite().all()
        )


def test_ddim_derives_the_noise_anew_from_the_clipped_x_0():
    scheduler, (x_t, _, eps) = DDIMEtaScheduler(), batch()
    out = scheduler.step(3 * eps, 500, x_t)
    s_level = scheduler.add_noise(
        out.pred_original_sample, scheduler.predict_noise(out.pred_original_sample, 500, x_t), 499
    )
    torch.testing.assert_close(out.prev_sample, s_level, rtol=1e-7, atol=1e-7)


def test_a_full_run_with_an_offset_stays_inside_the_table():
    scheduler = DDIMEtaScheduler(steps_offset=1)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[-1] == 0
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 981 and scheduler.timesteps[-1] == 1


def test_eta_1_is_finite_where_the_radicand_rounds_below_zero():
    for total, timesteps in [(1000, "8"), (1000, "5,5"), (4000, "20"), (4000, "30"), (4000, "10,10,5")]:
        scheduler = DDIMEtaScheduler(num_train_timesteps=total, beta_schedule="squaredcos_cap_v2", eta=1.0)
        scheduler.set_timesteps(timesteps=timesteps)
        x_t, noise, eps = batch(dtype=torch.float32)
        assert all(
            scheduler.step(eps, t, x_t, variance_noise=noise).prev_sample.isfinite().all() for t in scheduler.timesteps
        )


# --- diffusers' contract for schedulers (SchedulerCommonTest), in our words


@pytest.mark.parametrize("cls", ALL)
class TestContract:
    def test_it_comes_back_from_a_folder_and_steps_alike(self, cls, tmp_path):
        scheduler = cls(beta_end=0.01, clip_sample=False)
        scheduler.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        config = dict(scheduler.config)
        config.pop("_use_default_values", None)
        assert config == dict(loaded.config)
        x_t, _, eps = batch()
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        a, b = (s.step(eps, 700, x_t, generator=g).prev_sample for s, g in zip((scheduler, loaded), generators))
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_every_compatible_scheduler_is_made_from_its_config_and_back(self, cls):
        scheduler = cls(beta_start=0.0002)
        stock = {getattr(diffusers, name) for name in cls._compatibles}
        assert set(scheduler.compatibles) == stock | set(OWN)
        assert len(scheduler.compatibles) == len(stock) + len(OWN)
        for other in scheduler.compatibles:
            back = cls.from_config(other.from_config(scheduler.config).config)
            kept = {k: v for k, v in back.config.items() if k in scheduler.config and k != "beta_schedule"}
            assert kept == {k: v for k, v in scheduler.config.items() if k != "beta_schedule"}, other
            assert torch.equal(back.alpha_bar, scheduler.alpha_bar)
            extra = set(back.config) - set(scheduler.config)
            assert not extra & set(inspect.signature(cls.__init__).parameters)

    def test_tuple_and_dataclass_outputs_agree(self, cls):
        x_t, _, eps = batch()
        outputs = [
            cls().step(eps, 500, x_t, generator=torch.manual_seed(0), return_dict=flag) for flag in (True, False)
        ]
        assert isinstance(outputs[1], tuple)
        for a, b in zip(outputs[0].to_tuple(), outputs[1]):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_trained_betas_are_the_betas(self, cls):
        betas = np.array([0.1, 0.3])
        scheduler = cls(trained_betas=betas)
        np.testing.assert_allclose(scheduler.betas.numpy(), betas)
        assert len(scheduler) == 2 and scheduler.timesteps.tolist() == [1, 0]

    def test_one_generator_per_sample_gives_each_sample_its_own_noise(self, cls):
        x_t, _, eps = batch()
        kwargs = {"eta": 0.8} if cls is DDIMEtaScheduler else {}
        whole = (
            cls()
            .step(eps, 500, x_t, generator=[torch.Generator().manual_seed(i) for i in range(4)], **kwargs)
            .prev_sample
        )
        for i in range(4):
            alone = (
                cls().step(eps[[i]], 500, x_t[[i]], generator=torch.Generator().manual_seed(i), **kwargs).prev_sample
            )
            torch.testing.assert_close(whole[[i]], alone, rtol=0, atol=0)

    def test_inputs_are_left_as_they_were(self, cls):
        x_t, _, eps = batch()
        kept = x_t.clone(), eps.clone()
        for t in (999, 1, 0):
            cls(prediction_type="sample", clip_sample=False).step(eps, t, x_t)
        assert torch.equal(x_t, kept[0]) and torch.equal(eps, kept[1])

    def test_surface_that_pipelines_use(self, cls):
        scheduler, (x_t, _, _) = cls(), batch()
        assert scheduler.order == 1 and scheduler.init_noise_sigma == 1.0 and len(scheduler) == 1000
        assert scheduler.scale_model_input(x_t, 5) is x_t
        assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
        assert scheduler.alphas_cumprod.dtype == torch.float32

    def test_half_precision_stays_half_precision(self, cls):
        x_t, _, eps = batch(dtype=torch.bfloat16)
        out = cls().step(eps, 500, x_t)
        assert out.prev_sample.dtype == torch.bfloat16
        wide = cls().step(eps.double(), 500, x_t.double()) if cls is DDIMEtaScheduler else None
        if wide is not None:
            torch.testing.assert_close(out.prev_sample.double(), wide.prev_sample, rtol=0.05, atol=0.05)


# --- what a scheduler says of itself


def test_only_ddim_without_noise_says_that_it_is_deterministic_and_it_is():
    x_t, _, eps = batch()
    assert [cls().is_deterministic() for cls in ALL] == [False, False, True]
    for scheduler, eta, expected in (
        (DDIMEtaScheduler(), 0.3, False),
        (DDIMEtaScheduler(eta=0.3), None, False),
        (DDIMEtaScheduler(eta=0.3), 0.0, True),
    ):
        assert scheduler.is_deterministic(eta) == expected
        a, b = (scheduler.step(eps, 500, x_t, eta, torch.manual_seed(seed)).prev_sample for seed in range(2))
        assert torch.equal(a, b) == expected


# --- errors


def of(x, *more, run=10, scheduler=None, **options):
    """A step at timestep 900 of a run of ten."""
    scheduler = scheduler or DDIMEtaScheduler()
    scheduler.set_timesteps(run)
    return scheduler.step(x, 900, *more, **options)


X, NOISE, EPS = batch()
DDIM, DDPM = DDIMEtaScheduler, LinearDDPMScheduler
ERRORS = {
    # of the constructor
    r"unknown beta_schedule 'cosin'; choose from \['linear'": lambda: DDPM(beta_schedule="cosin"),
    "unknown prediction_type 'noise'": lambda: DDPM(prediction_type="noise"),
    "unknown variance_type 'fixed_small_log'": lambda: DDPM(variance_type="fixed_small_log"),
    "unknown timestep_spacing 'even'": lambda: DDPM(timestep_spacing="even"),
    "num_train_timesteps=20 is too small.*use 21 steps or more": lambda: DDPM(20, rescale_betas_by_steps=True),
    "at least 1, not 0": lambda: DDPM(num_train_timesteps=0),
    "at least 1, not 10.5": lambda: DDPM(num_train_timesteps=10.5),
    "betas between 0 and 0.02; they must be one list": lambda: DDPM(beta_start=0.0),
    "betas between 1e-17 and 0.02; they": lambda: DDPM(beta_start=1e-17),
    "betas between 0.0001 and 1.5; they": lambda: DDPM(beta_end=1.5),
    "betas between 0.9 and 0.9; .* with signal left": lambda: DDPM(beta_schedule="const", beta_end=0.9),
    "trained_betas gives betas between -0.2": lambda: DDPM(trained_betas=[0.1, -0.2]),
    "betas between nan and nan": lambda: DDPM(trained_betas=[0.1, math.nan]),
    "no signal is left .*last beta of 1": lambda: DDPM(trained_betas=[0.1, 1.0]),
    "no signal is left .*use 'v_prediction' or 'sample'": lambda: DDPM(rescale_betas_zero_snr=True),
    "applies to beta_schedule 'linear'": lambda: CosineDDPMScheduler(rescale_betas_by_steps=True),
    "eta must be between 0 and 1, not 1.1": lambda: DDIM(eta=1.1),
    # of set_timesteps
    "pass either num_inference_steps or timesteps": lambda: DDIM().set_timesteps(),
    "num_inference_steps or timesteps, and not both": lambda: DDIM().set_timesteps(10, timesteps=[3, 2]),
    "between 1 and num_train_timesteps=1000, not 1001": lambda: DDIM().set_timesteps(1001),
    "num_train_timesteps=1000, not 0": lambda: DDIM().set_timesteps(0),
    r"strictly descending order, not \[1, 2, 3\]": lambda: DDIM().set_timesteps(timesteps=[1, 2, 3]),
    r"strictly descending order, not \[5, 5, 1\]": lambda: DDIM().set_timesteps(timesteps=[5, 5, 1]),
    r"strictly descending order, not \[\]": lambda: DDIM().set_timesteps(timesteps=[]),
    r"whole numbers in .*, not \[5.5, 1\]": lambda: DDIM().set_timesteps(timesteps=[5.5, 1]),
    "between 0 and 999, not between 1 and 1000": lambda: DDIM().set_timesteps(timesteps=[1000, 1]),
    "between 0 and 999, not between -1 and 10": lambda: DDIM().set_timesteps(timesteps=[10, -1]),
    "no integer stride takes 60 of 1000": lambda: DDIM().set_timesteps(timesteps="ddim60"),
    "'10,x' is not understood": lambda: DDIM().set_timesteps(timesteps="10,x"),
    "section 1 has 500 steps": lambda: DDIM().set_timesteps(timesteps="600,600"),
    # of a step
    r"timestep 900 is not one of this run's 3 timesteps \(666, 333, 0, ...\)": lambda: of(EPS, X, run=3),
    "timestep 7 is not one of": lambda: DDPM(5).previous_timestep(7),
    "timestep 8 is not one of": lambda: short_run().previous_timestep(torch.tensor([900, 8])),
    "eta must be between 0 and 1, not -0.1": lambda: of(EPS, X, eta=-0.1),
    "eta must be between 0 and 1, not nan": lambda: of(EPS, X, eta=math.nan),
    r"\(4, 6, 8, 8\) and sample \(4, 3, 8, 8\)": lambda: of(torch.cat([EPS, EPS], 1), X),
    "twice as many channels": lambda: of(EPS, X, scheduler=DDPM(variance_type="learned")),
    "either generator or variance_noise": lambda: of(
        EPS, X, scheduler=DDPM(), generator=torch.manual_seed(0), variance_noise=NOISE
    ),
    "variance_noise has shape": lambda: of(EPS, X, scheduler=DDPM(), variance_noise=NOISE[:1]),
    "gradient has shape": lambda: of(EPS, X, scheduler=DDPM(), gradient=NOISE[:1]),
    "timestep 900 has no signal": lambda: DDIM(
        trained_betas=[0.001] * 900 + [1.0], prediction_type="sample"
    ).guidance_weight(EPS, 900, X),
    # of the forward process
    "shapes .* differ": lambda: DDIM().add_noise(X, NOISE[:1], 5),
    "one number or one per sample": lambda: DDIM().add_noise(X, NOISE, torch.tensor([1, 2])),
    r"between 0 and 999, not \[1, 2, 3, 1000\]": lambda: DDIM().add_noise(X, NOISE, torch.tensor([1, 2, 3, 1000])),
    "timesteps must be whole numbers between 0 and 999, not 0.5": lambda: DDIM().add_noise(X, NOISE, 0.5),
}


def short_run():
    scheduler = DDIMEtaScheduler()
    scheduler.set_timesteps(10)
    return scheduler


def test_what_cannot_be_is_refused_with_the_value_and_what_is_allowed():
    for message, call in ERRORS.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_21_steps_of_the_rescaled_linear_schedule_work():
    assert LinearDDPMScheduler(num_train_timesteps=21, rescale_betas_by_steps=True).alpha_bar[-1] > 0

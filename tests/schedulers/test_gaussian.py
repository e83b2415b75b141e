"""LinearDDPMScheduler, CosineDDPMScheduler, DDIMEtaScheduler: identities, statistics, agreement with diffusers, errors."""

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

from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler, LinearDDPMScheduler


ALL = [LinearDDPMScheduler, CosineDDPMScheduler, DDIMEtaScheduler]
SPACINGS = ["leading", "trailing", "linspace"]


def batch(seed=0, shape=(4, 3, 8, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


# --- identities of the process ------------------------------------------------------------------------------------------


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
    """q(x_s | x_0) followed by the chain s -> t equals q(x_t | x_0): variance and signal multiply out."""
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


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 600, 1000])
def test_a_perfect_network_ends_at_x_0_for_any_spacing_and_step_count(cls, spacing, steps):
    scheduler = cls(clip_sample=False, timestep_spacing=spacing, prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps and (scheduler.timesteps.diff() < 0).all()
    x_0, noise, _ = batch(shape=(2, 1, 2, 2))
    x = scheduler.add_noise(x_0, noise, int(scheduler.timesteps[0]))
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alpha_bar[t]
        eps = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        x = scheduler.step(
            alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0, t, x, generator=generator
        ).prev_sample
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


def test_inversion_undoes_a_ddim_step_where_the_prediction_agrees():
    scheduler, (x_0, noise, _) = DDIMEtaScheduler(clip_sample=False), batch()
    scheduler.set_timesteps(20)
    t_low, t_high = int(scheduler.timesteps[5]), int(scheduler.timesteps[4])
    x_low, x_high = (scheduler.add_noise(x_0, noise, t) for t in (t_low, t_high))
    torch.testing.assert_close(scheduler.inverse_step(noise, t_low, x_low).prev_sample, x_high)
    torch.testing.assert_close(scheduler.step(noise, t_high, x_high).prev_sample, x_low)


def test_ancestral_steps_with_the_optimal_network_keep_gaussian_data_gaussian():
    """Data N(0, 0.25): E[noise | x_t] is linear in x_t, so the sampler's variance is known; 20,000 samples, seed 0."""
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


# --- against the stock schedulers -----------------------------------------------------------------------------------------


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
    """The optimal network for N(0.3, 0.2^2): the swapped solver must find mean and spread, which needs our schedule in its config."""
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


# --- defects of the stock schedulers that must not be here (reference/openai.md 9, peers.md 2E) ---------------------------------


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


# --- diffusers' contract for schedulers (SchedulerCommonTest), in our words ---------------------------------------------------


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
        assert len(scheduler.compatibles) == len(cls._compatibles) + (cls.__name__ in dir(diffusers))
        for other in scheduler.compatibles:
            back = cls.from_config(other.from_config(scheduler.config).config)
            assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(scheduler.config), other
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


# --- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"beta_schedule": "cosin"}, r"unknown beta_schedule 'cosin'; choose from \['linear'"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'"),
        ({"variance_type": "fixed_small_log"}, "unknown variance_type 'fixed_small_log'"),
        ({"timestep_spacing": "even"}, "unknown timestep_spacing 'even'"),
        (
            {"num_train_timesteps": 20, "rescale_betas_by_steps": True},
            "num_train_timesteps=20 is too small.*use 21 steps or more",
        ),
        ({"num_train_timesteps": 0}, "at least 1, not 0"),
        ({"num_train_timesteps": 10.5}, "at least 1, not 10.5"),
        ({"beta_start": 0.0}, "must be one list of numbers between 0 and 1"),
        ({"beta_end": 1.5}, "must be one list of numbers between 0 and 1"),
        ({"trained_betas": [0.1, -0.2]}, "trained_betas gives betas between -0.2"),
        ({"trained_betas": [0.1, 1.0]}, "the last beta is 1"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr needs prediction_type"),
        ({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_by_steps": True}, "applies to beta_schedule 'linear'"),
    ],
)
def test_wrong_constructor_arguments_say_what_is_allowed(arguments, message):
    for cls in ALL:
        with pytest.raises(ValueError, match=message):
            cls(**{"beta_schedule": "linear", **arguments})


def test_21_steps_of_the_rescaled_linear_schedule_work():
    assert LinearDDPMScheduler(num_train_timesteps=21, rescale_betas_by_steps=True).alpha_bar[-1] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 10, "timesteps": [3, 2]}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 1001}, "between 1 and num_train_timesteps=1000, not 1001"),
        ({"num_inference_steps": 0}, "not 0"),
        ({"timesteps": [1, 2, 3]}, "strictly descending"),
        ({"timesteps": [5, 5, 1]}, "strictly descending"),
        ({"timesteps": []}, "strictly descending"),
        ({"timesteps": [5.5, 1]}, "whole numbers"),
        ({"timesteps": [1000, 1]}, "between 0 and 999"),
        ({"timesteps": [10, -1]}, "between 0 and 999"),
        ({"timesteps": "ddim60"}, "no integer stride takes 60 of 1000"),
        ({"timesteps": "10,x"}, "'10,x' is not understood"),
        ({"timesteps": "600,600"}, "section 1 has 500 steps"),
    ],
)
def test_wrong_timesteps_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        DDIMEtaScheduler().set_timesteps(**arguments)


def test_wrong_step_arguments_say_what_is_allowed():
    x_t, noise, eps = batch()
    scheduler = DDIMEtaScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(
        ValueError, match=r"timestep 999 is not one of this run's 10 timesteps \(900, 800, 700, 600, ...\)"
    ):
        scheduler.step(eps, 999, x_t)
    with pytest.raises(ValueError, match="timestep 7 is not one of"):
        scheduler.previous_timestep(torch.tensor([900, 7]))
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta must be between 0 and 1"):
            scheduler.step(eps, 900, x_t, eta=eta)
        with pytest.raises(ValueError, match="eta must be between 0 and 1"):
            DDIMEtaScheduler(eta=eta)
    with pytest.raises(ValueError, match=r"\(4, 6, 8, 8\) and sample \(4, 3, 8, 8\)"):
        scheduler.step(torch.cat([eps, eps], 1), 900, x_t)
    with pytest.raises(ValueError, match="twice as many channels"):
        LinearDDPMScheduler(variance_type="learned").step(eps, 900, x_t)
    with pytest.raises(ValueError, match="either generator or variance_noise"):
        LinearDDPMScheduler().step(eps, 900, x_t, generator=torch.manual_seed(0), variance_noise=noise)
    with pytest.raises(ValueError, match="variance_noise has shape"):
        LinearDDPMScheduler().step(eps, 900, x_t, variance_noise=noise[:1])
    with pytest.raises(ValueError, match="shapes .* differ"):
        scheduler.add_noise(x_t, noise[:1], 5)
    with pytest.raises(ValueError, match="one number or one per sample"):
        scheduler.add_noise(x_t, noise, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="between 0 and 999"):
        scheduler.add_noise(x_t, noise, torch.tensor([1, 2, 3, 1000]))
    with pytest.raises(ValueError, match="whole numbers"):
        scheduler.add_noise(x_t, noise, 0.5)

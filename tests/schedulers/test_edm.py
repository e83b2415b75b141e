"""EDM's process: preconditionings, orders of solvers, churn, diffusers' schedulers beside it."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from hf_diffusion.schedulers.scheduling_edm import (
    PRECONDITIONINGS,
    EDMHeunScheduler,
    EDMPreconditioning,
    IDDPMPreconditioning,
    VPPreconditioning,
    along,
    noise_levels,
)


MEAN, VARIANCE = 0.2, 0.3
SIGMAS = torch.tensor([0.002, 0.05, 0.7, 3.0, 80.0], dtype=torch.float64)
generator = torch.Generator().manual_seed(0)
X = torch.randn(5, 2, dtype=torch.float64, generator=generator)


def gaussian(x, sigma):
    """D of data N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)


def exact(x, sigma):
    """Where the probability flow takes x from noise level sigma to 0."""
    return MEAN + (x - MEAN) * (VARIANCE / (VARIANCE + sigma**2)) ** 0.5


def walk(scheduler, x, denoiser=gaussian, noises=None, preconditioning=None):
    """The states before every call of the network, and the end."""
    made, states = preconditioning or scheduler.preconditioning, [x]
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[i]
        scale = scheduler.signal_scale(sigma) if hasattr(scheduler, "signal_scale") else 1.0
        output = made.target(denoiser(x / scale, sigma), x / scale, sigma)
        noise = {} if noises is None else {"noise": noises[i // scheduler.order]}
        x = scheduler.step(output, t, x, **noise).prev_sample
        states.append(x)
    return states


def error_order(make, counts=(20, 40, 80, 160)) -> tuple[float, float]:
    """The exponent of the step in the error on Gaussian data, and the last error."""
    x, errors = 20 * X, []
    for count in counts:
        scheduler = make()
        scheduler.set_timesteps(count)
        ended = walk(scheduler, x, preconditioning=EDMPreconditioning())[-1]
        errors.append(float((ended - exact(x, 20.0)).abs().max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors[-1]


# --- preconditioning ------------------------------------------------------------------------------


def test_edm_gives_the_network_inputs_and_targets_of_unit_variance():
    at = EDMPreconditioning(sigma_data=0.7).coefficients(SIGMAS)
    one = torch.ones_like(SIGMAS)
    torch.testing.assert_close(at.c_in**2 * (SIGMAS**2 + 0.49), one)
    torch.testing.assert_close(((1 - at.c_skip) ** 2 * 0.49 + at.c_skip**2 * SIGMAS**2) / at.c_out**2, one)
    # the choice of c_skip that makes the network's errors count least
    torch.testing.assert_close(at.c_skip * (SIGMAS**2 + 0.49), 0.49 * one)


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_the_output_that_is_asked_for_denoises_to_x_0_and_without_noise_nothing_changes(name):
    made, x = PRECONDITIONINGS[name](), X + along(SIGMAS, X)
    torch.testing.assert_close(made.denoised(made.target(X, x, SIGMAS), x, SIGMAS), X, rtol=1e-9, atol=1e-12)
    barely = torch.tensor(1e-9, dtype=torch.float64)
    torch.testing.assert_close(made.denoised(torch.ones_like(X), X, barely), X, rtol=0, atol=1e-8)


def test_vp_and_iddpm_predict_the_noise_and_ve_its_opposite():
    noise = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    x = X + along(SIGMAS, X) * noise
    for name, sign in (("vp", 1), ("iddpm", 1), ("ve", -1)):
        torch.testing.assert_close(PRECONDITIONINGS[name]().target(X, x, SIGMAS), sign * noise)


def test_vp_and_iddpm_tell_the_network_the_timestep_that_its_model_has():
    time = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    made = VPPreconditioning()
    torch.testing.assert_close(made.coefficients(made.time.sigma(time)).c_noise, 999 * time)
    made = IDDPMPreconditioning()
    # the cosine schedule: signal over noise of timestep j
    signal = torch.cos((torch.arange(1001).double() / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar, timesteps = (signal / signal[0])[1:], torch.tensor([0, 10, 500, 900])
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()[timesteps]
    assert made.coefficients(sigmas).c_noise.tolist() == timesteps.tolist()
    torch.testing.assert_close(made.round_sigmas(sigmas), sigmas)
    # whatever is asked for, a level of the table that is not 0
    assert torch.equal(made.round_sigmas(torch.tensor([1e-9, 1e9])), made.table[[-2, 0]])


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_training_draws_levels_that_rise_and_are_finite_from_the_first_to_the_last(name):
    level = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53])])
    sigmas = PRECONDITIONINGS[name]().training_sigmas(level)
    assert sigmas.isfinite().all() and (sigmas > 0).all() and (sigmas.diff() >= 0).all() and sigmas[-1] > 50


def test_edm_draws_log_normal_levels():
    level = (torch.arange(10_000) + 0.5).double() / 10_000
    logs = EDMPreconditioning(sigma_mean=-0.4, sigma_std=1.0).training_sigmas(level).log()
    assert float(logs.mean()) == pytest.approx(-0.4, abs=1e-6) and float(logs.std()) == pytest.approx(1.0, abs=1e-3)
    assert float((logs < -0.4 - 1.959964).double().mean()) == pytest.approx(0.025, abs=2e-4)


# --- solvers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, order",
    [
        ({}, 2),
        ({"alpha": 0.7}, 2),
        ({"log_midpoint": True}, 2),
        ({"sigma_schedule": "exponential"}, 2),
        ({"time_schedule": "vp", "signal_scaling": "vp", "sigma_schedule": "vp"}, 2),
        ({"solver_order": 1}, 1),
    ],
    ids=str,
)
def test_the_error_on_gaussian_data_falls_with_the_order_of_the_solver(options, order):
    def make():
        # sigma_min so small that the last step, which is Euler's, adds nothing
        return EDMHeunScheduler(sigma_min=1e-4, sigma_max=20.0, **options)

    if options.get("signal_scaling") == "vp":
        x, errors = 20 * X / 401**0.5, []
        for count in (20, 40, 80, 160):
            scheduler = make()
            scheduler.set_timesteps(count)
            errors.append(float((walk(scheduler, x)[-1] - exact(20 * X, 20.0)).abs().max()))
        found = -np.polyfit(np.log([20, 40, 80, 160]), np.log(errors), 1)[0]
    else:
        found, _ = error_order(make)
    assert order - 0.15 < found < order + 0.35, found


def test_schedulers_of_diffusers_made_from_ours_solve_the_same_flow():
    ours = EDMHeunScheduler(sigma_min=0.01, sigma_max=20.0, sigma_data=0.6)
    orders = {}
    for cls in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        scheduler = cls.from_config(ours.config)
        assert (scheduler.config.sigma_min, scheduler.config.sigma_data) == (0.01, 0.6)
        scheduler.set_timesteps(40)
        ended = walk(scheduler, 20 * X, preconditioning=ours.preconditioning)[-1]
        orders[cls] = float((ended - exact(20 * X, 20.0)).abs().max())
        # and back
        assert EDMHeunScheduler.from_config(scheduler.config).config.sigma_data == 0.6
    euler = EDMHeunScheduler.from_config(ours.config, solver_order=1)
    euler.set_timesteps(40)
    mine = float((walk(euler, 20 * X)[-1] - exact(20 * X, 20.0)).abs().max())
    assert orders[EDMEulerScheduler] == pytest.approx(mine, rel=1e-3)
    assert orders[EDMDPMSolverMultistepScheduler] < mine / 10


@pytest.mark.parametrize(
    "options",
    [
        {"s_churn": 5.0},
        {"s_churn": 50.0, "s_min": 0.05, "s_max": 5.0},
        {"eta": 1.0},
        {"eta": 0.5, "s_churn": 3.0},
        {"s_churn": 5.0, "signal_scaling": "vp"},
        {"s_churn": 5.0, "solver_order": 1},
    ],
    ids=str,
)
def test_the_sample_has_the_noise_of_the_next_call_however_much_is_added(options):
    """For data that are all 0, x is noise alone, whose deviation is that of its parts together."""
    scheduler = EDMHeunScheduler(**options)
    # with s(t) the flow of such data is no straight line, which steps follow only nearly
    steps, rtol = (200, 0.02) if "signal_scaling" in options else (12, 1e-9)
    scheduler.set_timesteps(steps)
    parts = torch.eye(steps + 1, dtype=torch.float64)
    first = parts[0] * scheduler.init_noise_sigma
    states = walk(scheduler, first, lambda x, sigma: torch.zeros_like(x), noises=parts[1:])
    starts = range(0, len(scheduler.timesteps), scheduler.order)
    for i in starts:
        sigma = scheduler.sigmas[i]
        found = states[i].norm() / scheduler.signal_scale(sigma)
        torch.testing.assert_close(found, sigma, rtol=rtol, atol=0)
    assert (states[-3] != 0).sum() > 4


def test_churn_leaves_the_distribution_as_it_was():
    """On Gaussian data every state is linear in independent parts, so its variance is exact."""
    for steps, allowed in ((40, 0.06), (160, 0.004)):
        scheduler = EDMHeunScheduler(s_churn=10.0)
        scheduler.set_timesteps(steps)
        parts = torch.eye(steps + 1, dtype=torch.float64)

        def centred(x, sigma):
            return VARIANCE / (VARIANCE + sigma**2) * x

        ended = walk(scheduler, parts[0] * scheduler.init_noise_sigma, centred, noises=parts[1:])[-1]
        assert abs(float(ended.square().sum()) / VARIANCE - 1) < allowed
        # most of what is left was drawn on the way
        assert float(ended[1:].square().sum()) > 0.5 * VARIANCE


def test_extra_noise_adds_variance_and_its_bounds_are_kept():
    scheduler = EDMHeunScheduler(s_churn=10.0, s_min=0.1, s_max=10.0, s_noise=1.01)
    scheduler.set_timesteps(18)
    levels = noise_levels("karras", 18, 0.002, 80.0)
    gamma = scheduler.sigmas[:-1:2] / levels - 1
    inside = (levels >= 0.1) & (levels <= 10)
    assert torch.equal(gamma > 1e-9, inside)
    torch.testing.assert_close(gamma[inside], torch.full_like(gamma[inside], math.sqrt(2) - 1))
    assert scheduler.init_noise_sigma == 80.0


# --- the run --------------------------------------------------------------------------------------


def test_levels_are_those_of_the_paper_and_calls_are_two_a_step_but_for_the_last():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    assert len(scheduler.timesteps) == 35 and scheduler.order == 2 and scheduler.init_noise_sigma == 80.0
    levels = scheduler.sigmas[:-1:2]
    torch.testing.assert_close(levels[[0, 1, -1]].float(), torch.tensor([80.0, 57.585984, 0.002]))
    torch.testing.assert_close(scheduler.timesteps, (scheduler.sigmas[:-1].log() / 4).float())
    own = EDMHeunScheduler()
    own.set_timesteps(sigmas=[5.0, 1.0, 0.1])
    assert own.sigmas.tolist() == [5.0, 1.0, 1.0, pytest.approx(0.1), pytest.approx(0.1), 0.0]


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 4, 4), (3, 1, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_rank_and_precision_comes_out_as_it_went_in(shape, dtype):
    scheduler = EDMHeunScheduler(s_churn=3.0)
    scheduler.set_timesteps(4)
    x = torch.randn(shape, generator=generator).to(dtype) * 80
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    assert x.shape == shape and x.dtype == dtype and x.isfinite().all()
    with pytest.raises(ValueError, match="begin another by set_timesteps"):
        scheduler.scale_model_input(x, t)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min=2.0 and sigma_max=1.0 must be positive and rise"),
        ({"preconditioning": "v"}, r"preconditioning is 'v'; choose from \['edm', 'vp', 've', 'iddpm'\]"),
        ({"solver_order": 3}, r"solver_order is 3; choose from \[1, 2\]"),
        ({"alpha": 0.0}, "alpha=0.0 above 0 and at most 1"),
        ({"eta": -1.0}, "eta=-1.0 at least 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        EDMHeunScheduler(**options)


def test_runs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number of at least 1, not 0"):
        EDMHeunScheduler().set_timesteps(0)
    with pytest.raises(ValueError, match=r"churn is \{'s_churn': -1.0\}; each must be at least 0"):
        EDMHeunScheduler().set_timesteps(4, s_churn=-1.0)
    for sigmas in ([1.0, 2.0], [1.0, 0.0], []):
        with pytest.raises(ValueError, match="sigmas must be noise levels above 0 that fall"):
            EDMHeunScheduler().set_timesteps(sigmas=sigmas)

"""Flow matching: the path, the orders of the solvers, the steps of diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from hf_diffusion.schedulers.scheduling_flow import (
    PREDICTION_TYPES,
    FlowMatchingScheduler,
    convert_prediction,
    resolution_shift,
    shift_sigmas,
)
from tests.schedulers.gaussian_flow import GaussianFlow, walk


# At s2 0.2 and shift 3 the leading term of the error of Heun happens to vanish.
FLOW = GaussianFlow(mu=-0.3, s2=0.5)
NOISE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXACT = FLOW.follow(NOISE, 1.0, 0.0)


def error(steps: int, **config) -> float:
    scheduler = FlowMatchingScheduler(**config)
    scheduler.set_timesteps(steps)
    return float((walk(scheduler, FLOW.velocity, NOISE) - EXACT).square().mean().sqrt())


def order(**config) -> float:
    """The slope of the error over the length of a step, by regression over 32 to 512 steps."""
    steps = 2 ** np.arange(5, 10)
    return -np.polyfit(np.log(steps), [math.log(error(int(n), **config)) for n in steps], 1)[0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_of_first_and_heun_of_second_order(shift):
    assert order(shift=shift) == pytest.approx(1, abs=0.05)
    assert order(shift=shift, solver="heun") == pytest.approx(2, abs=0.1)
    assert order(shift=shift, solver="heun", final_euler_step=False) == pytest.approx(2, abs=0.1)
    assert [FlowMatchingScheduler(solver=solver).order for solver in ("euler", "heun")] == [1, 2]


def test_at_equal_calls_heun_is_nearer():
    # 19 calls each
    assert error(10, solver="heun") < 0.5 * error(19)


# --- diffusers' schedulers ------------------------------------------------------------------------


def stock_run(scheduler, **steps) -> torch.Tensor:
    scheduler.set_timesteps(**steps)
    return walk(scheduler, FLOW.velocity, NOISE.float())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "solver, stock", [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)]
)
def test_on_the_levels_of_diffusers_the_samples_are_those_of_diffusers(solver, stock, shift):
    ours = FlowMatchingScheduler(shift=shift, solver=solver)
    theirs = stock.from_config(ours.config)
    assert theirs.config.shift == shift and theirs.config.num_train_timesteps == 1000
    expected = stock_run(theirs, num_inference_steps=10)
    # The stock schedulers shift even levels between ends that are shifted already.
    ours.set_timesteps(sigmas=np.linspace(theirs.sigma_max, theirs.sigma_min, 10))
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(walk(ours, FLOW.velocity, NOISE.float()), expected, rtol=1e-5, atol=2e-6)


def test_diffusers_euler_takes_our_own_levels_by_the_list_that_flux_gives_it():
    ours = FlowMatchingScheduler(shift=2.5)
    ours.set_timesteps(8)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    samples = stock_run(theirs, sigmas=np.linspace(1, 1 / 8, 8))
    torch.testing.assert_close(theirs.sigmas, ours.sigmas.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(samples, walk(ours, FLOW.velocity, NOISE.float()), rtol=1e-5, atol=2e-6)


def test_a_saved_configuration_is_that_of_diffusers_schedulers_too(tmp_path):
    FlowMatchingScheduler(500, shift=1.7, solver="heun").save_pretrained(tmp_path)
    for stock in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        config = stock.from_pretrained(tmp_path).config
        assert config.shift == 1.7 and config.num_train_timesteps == 500
    again = FlowMatchingScheduler.from_pretrained(tmp_path)
    assert again.config.solver == "heun" and again.config.shift == 1.7


# --- path and predictions -------------------------------------------------------------------------


def test_the_path_begins_in_the_data_and_ends_in_the_noise_with_the_velocity_as_its_slope():
    scheduler, x_0 = FlowMatchingScheduler(), EXACT
    assert torch.equal(scheduler.add_noise(x_0, NOISE, 0), x_0)
    assert torch.equal(scheduler.add_noise(x_0, NOISE, 1000), NOISE)
    t = torch.linspace(100, 900, len(x_0), dtype=torch.float64)
    slope = (scheduler.add_noise(x_0, NOISE, t + 1) - scheduler.add_noise(x_0, NOISE, t - 1)) * 1000 / 2
    x = scheduler.add_noise(x_0, NOISE, t)
    torch.testing.assert_close(slope, NOISE - x_0)
    torch.testing.assert_close(convert_prediction(x_0, x, t / 1000, "sample", "velocity"), slope)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 1, 4, 4)])
def test_each_prediction_tells_the_other_two_at_any_rank(shape):
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.97], dtype=torch.float64)
    x = FlowMatchingScheduler().add_noise(x_0, noise, 1000 * sigma)
    truth = {"velocity": noise - x_0, "sample": x_0, "epsilon": noise}
    for source in PREDICTION_TYPES:
        for target in PREDICTION_TYPES:
            converted = convert_prediction(truth[source], x, sigma, source, target)
            torch.testing.assert_close(converted, truth[target])


def test_a_floor_bounds_what_an_error_is_divided_by():
    x = torch.zeros(3, 1, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.01, 0.5], dtype=torch.float64)
    for source, levels in (("sample", sigma), ("epsilon", 1 - sigma)):
        velocity = convert_prediction(torch.ones_like(x), x, levels, source, "velocity", floor=0.05)
        torch.testing.assert_close(velocity.abs().flatten(), torch.tensor([20.0, 20, 2]).double())


def test_a_shift_moves_levels_towards_noise_keeps_the_ends_and_is_undone_by_its_inverse():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigmas(sigma, 3.0)
    assert bool((shifted[1:-1] > sigma[1:-1]).all()) and shifted[[0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(shift_sigmas(shifted, 1 / 3), sigma)
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_may_begin_in_the_middle():
    scheduler = FlowMatchingScheduler(solver="heun")
    scheduler.set_timesteps(256)
    # two calls a step, and step 128 begins at sigma 0.5
    scheduler.set_begin_index(256)
    x = FLOW.follow(NOISE, 1.0, 0.5)
    for t in scheduler.timesteps[256:]:
        sigma = t / 1000
        x = scheduler.step(FLOW.velocity(x, sigma), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, EXACT, rtol=1e-4, atol=1e-4)


def test_the_predicted_data_are_where_a_straight_line_leads_and_the_last_euler_step_goes_there():
    scheduler = FlowMatchingScheduler()
    scheduler.set_timesteps(4)
    x = NOISE
    for t in scheduler.timesteps:
        out = scheduler.step(FLOW.velocity(x, t / 1000), t, x)
        torch.testing.assert_close(out.pred_original_sample, FLOW.x_0(x, t / 1000))
        x = out.prev_sample
    torch.testing.assert_close(x, out.pred_original_sample)


def test_half_precision_samples_are_stepped_in_float32():
    scheduler, x = FlowMatchingScheduler(), NOISE.bfloat16()
    scheduler.set_timesteps(1000)
    out = scheduler.step(torch.ones_like(x), 1000.0, x)
    assert out.prev_sample.dtype == torch.bfloat16
    assert torch.equal(out.prev_sample, (x.float() - 0.001).bfloat16())


@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda s: FlowMatchingScheduler(solver="dpm"), "'dpm'; choose from .'euler', 'heun'."),
        (lambda s: FlowMatchingScheduler(shift=0), "shift must be above 0, got 0"),
        (lambda s: FlowMatchingScheduler(0), "num_train_timesteps must be an integer of at least 1, got 0"),
        (lambda s: s.set_timesteps(), "give num_inference_steps or sigmas"),
        (lambda s: s.set_timesteps(0), "at least 1, got 0"),
        (lambda s: s.set_timesteps(sigmas=[0.5, 0.7]), r"must fall .* got \[0.5, 0.7\]"),
        (lambda s: s.set_timesteps(sigmas=[1.2, 0.7]), "at most 1"),
        (lambda s: s.step(NOISE, 500.0, NOISE), "timestep 500.0 was given, but call 1 of 3 is at 1000.0"),
        (lambda s: walk(s, FLOW.velocity, walk(s, FLOW.velocity, NOISE)), "all 3 calls of this run are made"),
        (lambda s: s.set_begin_index(1), "in the middle of a step; take 2"),
        (lambda s: convert_prediction(NOISE, NOISE, 0.5, "v", "sample"), "'v'; choose from"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(mistake, message):
    scheduler = FlowMatchingScheduler(solver="heun")
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=message):
        mistake(scheduler)

"""ConsistencyScheduler: the boundary, what each kind of network means, the stock class, and
Gaussian data.
"""

import math

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler

from hf_diffusion import ConsistencyScheduler, LinearDDPMScheduler
from hf_diffusion.schedulers.scheduling_consistency import PARAMETRISATIONS


EVERY_KIND = pytest.mark.parametrize("kind", PARAMETRISATIONS)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wild(x, t, return_dict):
    """A network that answers anything but zero."""
    return (5 + x.square(),)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_lowest_level_the_function_is_the_identity_bit_for_bit(kind, dtype):
    scheduler = ConsistencyScheduler(prediction_type=kind, sigma_data=1.0)
    x = noise(3, 2, 4, 4).to(dtype)
    lowest = torch.full((3,), scheduler.config.sigma_min, dtype=torch.float64)
    assert torch.equal(scheduler.denoise(wild, x, lowest), x)
    assert not torch.allclose(scheduler.denoise(wild, x, 2 * lowest), x, atol=1e-4)


@EVERY_KIND
def test_without_the_shift_a_network_that_predicts_exactly_gives_the_data(kind):
    scheduler = ConsistencyScheduler(prediction_type=kind, sigma_data=1.0 if kind != "preconditioned" else 0.5)
    x_0, z, sigma = noise(6, 2).double(), noise(6, 2, seed=1).double(), torch.logspace(-2, 1.9, 6).double()
    s = sigma[:, None]
    r = (1 + s**2).sqrt()
    exact = {
        "preconditioned": ((x_0 - 0.25 / (s**2 + 0.25) * (x_0 + s * z)) * (s**2 + 0.25).sqrt() / (0.5 * s)),
        # of x_t = (x_0 + sigma z) / r
        "v_prediction": z / r - x_0 * s / r,
        "epsilon": z,
        "sample": x_0,
        "flow_velocity": z - x_0,
        "flow_epsilon": z,
        "flow_sample": x_0,
    }
    found = scheduler.denoise(lambda x, t, return_dict: (exact[kind],), x_0 + s * z, sigma, shift=0.0)
    torch.testing.assert_close(found, x_0, rtol=1e-9, atol=1e-9)


def test_a_denoiser_is_shown_what_its_own_process_would_show_it():
    process = LinearDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    alpha_bar = process.alphas_cumprod.double()
    sigmas = (1 / alpha_bar - 1).sqrt()
    scheduler = ConsistencyScheduler(
        prediction_type="v_prediction", sigma_data=1.0, trained_sigmas=tuple(sigmas.tolist())
    )
    t, x_0, z, seen = torch.tensor([0, 37, 500, 980]), noise(4, 1, 4, 4), noise(4, 1, 4, 4, seed=1), []
    x = scheduler.add_noise(x_0, z, sigmas[t])
    scheduler.denoise(lambda x, t, return_dict: (seen.extend([x, t]) or x,), x, sigmas[t])
    torch.testing.assert_close(seen[0], process.add_noise(x_0, z, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1], t.double(), rtol=1e-9, atol=1e-6)
    between = scheduler.network_timestep((sigmas[37] * sigmas[38]).sqrt()[None])
    assert float(between) == pytest.approx(37.5)
    beyond = scheduler.network_timestep(torch.tensor([1e-9, 0.0, 1e9]))
    assert beyond.tolist() == [0.0, 0.0, len(sigmas) - 1.0]


def run(scheduler, network, x, **steps) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(**steps)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [{"num_inference_steps": n} for n in (1, 2, 5, 40)] + [{"timesteps": [22, 0]}])
def test_the_stock_class_loads_its_configuration_and_draws_the_same(tmp_path, steps):
    ConsistencyScheduler(clip_denoised=False, sigma_data=0.6).save_pretrained(tmp_path)
    ours, stock = (cls.from_pretrained(tmp_path) for cls in (ConsistencyScheduler, CMStochasticIterativeScheduler))
    assert (stock.config.sigma_data, stock.config.clip_denoised) == (0.6, False)
    network = lambda x, t: 0.3 * x + torch.cos(x) * math.sin(float(t) / 300)  # noqa: E731
    x = 80 * noise(3, 2, 4, 4)
    torch.testing.assert_close(run(ours, network, x, **steps), run(stock, network, x, **steps), rtol=1e-4, atol=1e-4)
    assert isinstance(ours, CMStochasticIterativeScheduler)


def test_the_last_of_several_steps_is_finite_where_the_stock_class_gives_nan():
    bad = [0.009, 0.018, 0.019, 0.021, 0.029, 0.036, 0.038, 0.042, 0.047]
    x, network = noise(2, 4), lambda x, t: x
    for sigma_min in bad:
        assert (
            not run(CMStochasticIterativeScheduler(sigma_min=sigma_min), network, x, num_inference_steps=2)
            .isfinite()
            .all()
        )
    for sigma_min in [*bad, *(i / 1000 for i in range(1, 50))]:
        ours = run(ConsistencyScheduler(sigma_min=sigma_min), network, x, num_inference_steps=2)
        # and the last step ends in the estimate itself, which is clipped
        assert ours.abs().max() <= 1


def test_multistep_sampling_leaves_gaussian_data_as_they_are():
    """With the exact function of N(m, s^2) every step ends in N(m, s^2 + sigma_min^2), however many
    there are.
    """
    m, s2, eps = 0.3, 0.16, 0.002
    for steps in ({"num_inference_steps": 1}, {"num_inference_steps": 4}, {"sigmas": [80.0, 3.0, 0.4]}):
        scheduler = ConsistencyScheduler(clip_denoised=False)

        def exact(scaled, t, scheduler=scheduler):
            sigma = (t / 250).exp()
            c_in, c_skip, c_out = scheduler.scalings(sigma)
            x = scaled / c_in
            return (m + (x - m) * ((s2 + eps**2) / (s2 + sigma**2)).sqrt() - c_skip * x) / c_out

        start = m + (s2 + 80**2) ** 0.5 * noise(20000, 1).double()
        samples = run(scheduler, exact, start, **steps)
        assert float(samples.mean()) == pytest.approx(m, abs=0.01)
        assert float(samples.var()) == pytest.approx(s2 + eps**2, rel=0.03)


def test_the_level_of_the_last_step_can_be_chosen_once_for_any_number_of_steps():
    scheduler = ConsistencyScheduler(sampling_sigma_min=0.8)
    for steps in (1, 2, 5):
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas[:-1]
        assert len(scheduler.timesteps) == steps and float(levels[0]) == pytest.approx(80)
        assert steps == 1 or float(levels[-1]) == pytest.approx(0.8)
        gaps = (levels ** (1 / 7)).diff()
        assert steps == 1 or float(gaps.max() - gaps.min()) < 1e-9


def test_runs_visit_the_levels_that_the_network_was_trained_at_and_longer_ones_the_grid(tmp_path):
    ConsistencyScheduler(sampling_sigmas=(80.0, 6.0, 1.0, 0.3)).save_pretrained(tmp_path)
    scheduler = ConsistencyScheduler.from_pretrained(tmp_path)
    for steps, levels in ((1, [80]), (2, [80, 1]), (3, [80, 6, 1]), (4, [80, 6, 1, 0.3])):
        scheduler.set_timesteps(steps)
        assert scheduler.sigmas[:-1].tolist() == levels
    scheduler.set_timesteps(5)
    plain = ConsistencyScheduler()
    plain.set_timesteps(5)
    assert torch.equal(scheduler.sigmas, plain.sigmas)


def test_noise_can_be_given_and_levels_named():
    scheduler = ConsistencyScheduler(clip_denoised=False)
    scheduler.set_timesteps(sigmas=[80.0, 0.8])
    assert not scheduler.is_deterministic() and scheduler.init_noise_sigma == 80
    x, z = noise(2, 4), noise(2, 4, seed=1)
    result = scheduler.step(x, scheduler.timesteps[0], 80 * x, noise=z)
    spread = (result.prev_sample - result.pred_original_sample) / z
    torch.testing.assert_close(spread, torch.full_like(x, math.sqrt(0.8**2 - 0.002**2)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ConsistencyScheduler(sigma_min=3.0, sigma_max=2.0), "0 <= sigma_min < sigma_max"),
        (lambda: ConsistencyScheduler(prediction_type="noise"), "choose from"),
        (lambda: ConsistencyScheduler(trained_sigmas=[2.0, 1.0]), "must rise"),
        (lambda: ConsistencyScheduler(sampling_sigmas=(90.0, 1.0)), "must fall, from at most 80"),
        (lambda: ConsistencyScheduler(sampling_sigmas=()), "must fall"),
        (lambda: ConsistencyScheduler().set_timesteps(41), "from 1 to 40"),
        (lambda: ConsistencyScheduler().set_timesteps(timesteps=[0, 22]), "must fall"),
        (lambda: ConsistencyScheduler().set_timesteps(sigmas=[90.0, 1.0]), "at most 80"),
        (lambda: ConsistencyScheduler().set_timesteps(2, sigmas=[80.0]), "give one of"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()

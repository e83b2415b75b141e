import shutil

import pytest
import torch

from hf_diffusion.schedulers import scheduling_ddgan
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from tests.launching import run_claims


STEPS = range(1, 17)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", ["vp", "geometric"])
def test_every_number_of_steps_gives_pairs_and_posteriors_that_agree_with_the_marginals(schedule):
    bounds = {} if schedule == "vp" else {"beta_min": 0.01, "beta_max": 0.99}
    for steps in STEPS:
        s = DDGANScheduler(steps, schedule=schedule, **bounds)
        assert len(s) == steps and s.alpha_bar.dtype == torch.float64
        assert s.alpha_bar[0] == 1 and bool((s.alpha_bar.diff() < 0).all()) and s.alpha_bar[-1] < 0.02
        t, one, zero = (
            torch.arange(steps),
            torch.ones(steps, dtype=torch.float64),
            torch.zeros(steps, dtype=torch.float64),
        )
        # read off the coefficients of x_0 and of the two noises in x_{t+1}
        signal, first, second = (
            s.q_sample_pairs(x_0, t, noise_t, noise_tp1)[1]
            for x_0, noise_t, noise_tp1 in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
        )
        torch.testing.assert_close(signal**2, s.alpha_bar[1:])
        torch.testing.assert_close(first**2 + second**2, 1 - s.alpha_bar[1:])
        # unit Gaussian data stay so on the way back through the posterior
        c_0, c_tp1 = s.posterior(one, zero, t)[0], s.posterior(zero, one, t)[0]
        back = c_0**2 + c_tp1**2 + 2 * c_0 * c_tp1 * s.alpha_bar[1:].sqrt() + s.posterior_variance
        torch.testing.assert_close(back, one)


def test_posterior_along_the_mean_path_stays_on_it():
    for steps in STEPS:
        s = DDGANScheduler(steps)
        t = torch.arange(steps)
        x_0 = torch.randn(steps, 3, dtype=torch.float64, generator=seeded())
        mean, _ = s.posterior(x_0, s.alpha_bar[1:, None].sqrt() * x_0, t)
        torch.testing.assert_close(mean, s.alpha_bar[:-1, None].sqrt() * x_0)


def test_the_posterior_of_the_pairs_is_bayes_rule():
    """Regressing x_t on (x_0, x_{t+1}) finds the posterior's coefficients and variance."""
    s, count = DDGANScheduler(4), 400_000
    for t in range(1, 4):
        x_0 = torch.randn(count, dtype=torch.float64, generator=seeded(1))
        x_t, x_tp1 = s.q_sample_pairs(x_0, t, generator=seeded(2 + t))
        design = torch.stack([x_0, x_tp1], dim=1)
        solution = torch.linalg.lstsq(design, x_t[:, None]).solution[:, 0]
        expected = torch.stack([s.posterior_x_0_coefficient[t], s.posterior_x_tp1_coefficient[t]])
        torch.testing.assert_close(solution, expected, atol=0.01, rtol=0)
        variance = (x_t - design @ solution).var()
        torch.testing.assert_close(variance, s.posterior_variance[t], rtol=0.01, atol=0)


def test_four_steps_have_the_coefficients_of_the_paper():
    s = DDGANScheduler()
    torch.testing.assert_close(
        s.betas, torch.tensor([0.478255, 0.849206, 0.956418, 0.987404]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        s.posterior_x_0_coefficient, torch.tensor([1, 0.665778, 0.269191, 0.057822]).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4), (5, 1, 4, 6), (5, 1, 2, 3, 4)])
def test_every_rank_agrees_with_its_flattening(shape):
    s, t = DDGANScheduler(), torch.tensor([0, 1, 2, 3, 0])
    x_0, a, b, c = (torch.randn(shape, generator=seeded(i)) for i in range(4))
    flat = [x.reshape(5, -1) for x in (x_0, a, b, c)]
    x_t, x_tp1 = s.q_sample_pairs(x_0, t, a, b)
    flat_t, flat_tp1 = s.q_sample_pairs(flat[0], t, flat[1], flat[2])
    assert torch.equal(x_t.reshape(5, -1), flat_t) and torch.equal(x_tp1.reshape(5, -1), flat_tp1)
    drawn, flat_drawn = s.sample_posterior(x_0, x_tp1, t, c), s.sample_posterior(flat[0], flat_tp1, t, flat[3])
    assert drawn.shape == shape and torch.equal(drawn.reshape(5, -1), flat_drawn)


def test_one_t_for_all_is_the_same_as_one_t_each():
    s, x_0, noise = DDGANScheduler(), torch.randn(4, 3, generator=seeded()), torch.randn(4, 3, generator=seeded(1))
    for one in (2, torch.tensor(2)):
        assert torch.equal(s.q_sample(x_0, one, noise), s.q_sample(x_0, torch.full((4,), 2), noise))


def test_level_zero_is_the_data_itself_and_the_last_step_returns_the_prediction():
    s, x_0, x = DDGANScheduler(), torch.randn(4, 3, generator=seeded()), torch.randn(4, 3, generator=seeded(1))
    assert torch.equal(s.q_sample(x_0, 0, x), x_0)
    assert torch.equal(s.step(x_0, 0, x, generator=seeded()).prev_sample, x_0)


def test_explicit_noise_and_a_generator_give_the_same_draw():
    s, x_0, t = DDGANScheduler(), torch.randn(4, 3, generator=seeded()), torch.tensor([0, 1, 2, 3])
    g = seeded(7)
    noise_tp1, noise_t, posterior_noise = (torch.randn(4, 3, generator=g) for _ in range(3))
    g = seeded(7)
    drawn = s.q_sample_pairs(x_0, t, generator=g)
    given = s.q_sample_pairs(x_0, t, noise_t, noise_tp1)
    assert all(torch.equal(a, b) for a, b in zip(drawn, given, strict=True))
    a = s.step(x_0, 2, drawn[1], generator=g, return_dict=False)[0]
    assert torch.equal(a, s.step(x_0, 2, drawn[1], variance_noise=posterior_noise).prev_sample)


def test_add_noise_reaches_the_level_at_which_the_generator_is_called():
    s, x_0, noise = DDGANScheduler(), torch.randn(4, 3, generator=seeded()), torch.randn(4, 3, generator=seeded(1))
    t = torch.tensor([3, 0, 1, 2])
    assert torch.equal(s.add_noise(x_0, noise, t), s.q_sample(x_0, t + 1, noise))
    assert torch.equal(s.scale_model_input(x_0, 3), x_0) and s.init_noise_sigma == 1.0 and s.order == 1


def test_a_perfect_generator_samples_the_data_distribution():
    """With x_0 drawn from q(x_0 | x_{t+1}) the loop has the data's mean and variance."""
    s, mean, variance, g = DDGANScheduler(4), 0.5, 0.09, seeded()
    x = torch.randn(200_000, 1, dtype=torch.float64, generator=g)
    s.set_timesteps()
    for t in s.timesteps:
        signal, noise = s.alpha_bar[t + 1].sqrt(), 1 - s.alpha_bar[t + 1]
        gain = variance * signal / (signal**2 * variance + noise)
        spread = (variance * noise / (signal**2 * variance + noise)).sqrt()
        x_0 = mean + gain * (x - signal * mean) + spread * torch.randn(x.shape, dtype=x.dtype, generator=g)
        x = s.step(x_0, t, x, generator=g).prev_sample
    assert abs(float(x.mean()) - mean) < 0.005 and abs(float(x.var()) - variance) < 0.003


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_in_half(dtype):
    s, t = DDGANScheduler(), torch.tensor([0, 1, 2, 3])
    x_0, a, b = (torch.randn(4, 3, generator=seeded(i)).to(dtype) for i in range(3))
    x_t, x_tp1 = s.q_sample_pairs(x_0, t, a, b)
    assert x_t.dtype == x_tp1.dtype == dtype and s.step(x_0, 1, x_tp1, variance_noise=a).prev_sample.dtype == dtype
    assert torch.equal(x_t, s.q_sample(x_0.float(), t, a.float()).to(dtype))


def test_only_the_trained_number_of_steps_is_accepted():
    s = DDGANScheduler(4)
    for accepted in (None, 4):
        s.set_timesteps(accepted)
        assert s.timesteps.tolist() == [3, 2, 1, 0] and s.num_inference_steps == 4
    for refused in (0, 1, 3, 5, 50):
        with pytest.raises(ValueError, match=f"num_inference_steps={refused}.*4 transitions"):
            s.set_timesteps(refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, "at least 1, got 0"),
        ({"num_train_timesteps": 2.5}, "at least 1, got 2.5"),
        ({"schedule": "geometric"}, "0 < beta_min < beta_max < 1; got beta_min=0.1, beta_max=20"),
        ({"schedule": "geometric", "beta_min": 0.1, "beta_max": 1.0}, "0 < beta_min < beta_max < 1"),
        ({"schedule": "geometric", "beta_min": 0.0, "beta_max": 0.9}, "0 < beta_min < beta_max < 1"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; choose 'vp' or 'geometric'"),
        ({"beta_min": -1.0}, "0 <= beta_min <= beta_max"),
        ({"beta_min": 30.0}, "0 <= beta_min <= beta_max"),
        ({"beta_max": 1e5}, "strictly between 0 and 1"),
    ],
)
def test_settings_that_break_the_reference_are_refused_with_a_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        DDGANScheduler(**arguments)


def test_t_out_of_range_is_refused():
    s, x = DDGANScheduler(4), torch.zeros(2, 3)
    for t in (-1, 5, torch.tensor([0, 5])):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.4"):
            s.q_sample(x, t)
    for t in (-1, 4, torch.tensor([0, 4])):
        for call in (s.q_sample_pairs, lambda x, t: s.posterior(x, x, t), lambda x, t: s.add_noise(x, x, t)):
            with pytest.raises(ValueError, match=r"must lie in 0\.\.3"):
                call(x, t)
    with pytest.raises(ValueError, match="integer"):
        s.q_sample(x, torch.tensor([0.5, 1.0]))


def test_the_shipped_file_alone_loads_a_saved_scheduler_in_a_new_process(tmp_path):
    """The file travels to the Hub without this package: it imports torch and diffusers only."""
    shutil.copy(scheduling_ddgan.__file__, tmp_path)
    DDGANScheduler(8, 0.2, 15.0).save_pretrained(tmp_path / "scheduler")
    child = """
        sys.path.insert(0, "")
        from scheduling_ddgan import DDGANScheduler
        scheduler = DDGANScheduler.from_pretrained("scheduler")
        config = scheduler.config
        claims["scheduler"] = len(scheduler), config.beta_min, config.beta_max, scheduler.alpha_bar.tolist()
    """
    seen = run_claims(child, tmp_path, with_package=False)["scheduler"]
    assert seen == [8, 0.2, 15.0, DDGANScheduler(8, 0.2, 15.0).alpha_bar.tolist()]

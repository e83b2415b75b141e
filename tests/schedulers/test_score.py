"""Score SDEs and annealed Langevin dynamics: identities, orders, the reference's traps."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_diffusion.schedulers.scheduling_score import (
    VESDE,
    VPSDE,
    AnnealedLangevinScheduler,
    ScoreSdeSubVPScheduler,
    ScoreSdeVEScheduler,
    ScoreSdeVPScheduler,
    SubVPSDE,
    dormand_prince,
    heun,
    langevin_step_size,
    largest_distance,
    level_count,
    level_ratio,
    over,
)


SDES = {"ve": VESDE(1000, 0.02, 8.0), "vp": VPSDE(), "subvp": SubVPSDE()}
SCHEDULERS = {
    "ve": ScoreSdeVEScheduler(sigma_min=0.02, sigma_max=8.0),
    "vp": ScoreSdeVPScheduler(),
    "subvp": ScoreSdeSubVPScheduler(),
}
every_sde = pytest.mark.parametrize("name", SDES)
MEAN, VARIANCE = 0.3, 0.49


def gaussian_score(sde, x: Tensor, t: Tensor) -> Tensor:
    """The score of data N(MEAN, VARIANCE)."""
    scale, std = (over(value, x) for value in sde.scale_and_std(t))
    return -(x - scale * MEAN) / (scale**2 * VARIANCE + std**2)


def noise_like(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


# --- the equations ------------------------------------------------------------------------------


@every_sde
def test_drift_and_diffusion_have_the_stated_marginals(name):
    """d scale = rate scale dt and d var = (2 rate var + g^2) dt; VE begins with sigma_min^2."""
    sde, times = SDES[name], torch.linspace(0, 1, 4001, dtype=torch.float64)
    scale, variance = torch.ones(()).double(), torch.tensor(sde.scale_and_std(times[:1])[1].item() ** 2).double()
    step = 1 / 4000
    for t in times[:-1] + step / 2:
        # the midpoint rule, of order 2
        rate, g = sde.rate(t), sde.diffusion(t)
        middle = variance + step / 2 * (2 * rate * variance + g**2)
        variance = variance + step * (2 * rate * middle + g**2)
        scale = scale * (1 + step * rate + (step * rate) ** 2 / 2)
    expected = sde.scale_and_std(times[-1])
    torch.testing.assert_close(torch.stack([scale, variance.sqrt()]), torch.stack(expected), rtol=1e-4, atol=1e-6)


@every_sde
def test_the_score_carries_the_forward_equation_back(name):
    """What the forward drift adds to the log density's gradient, the reverse drift takes away."""
    sde, t = SDES[name], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = noise_like(torch.empty(3, 2).double())
    score = gaussian_score(sde, x, t)
    flow = sde.reverse_drift(x, t, score, probability_flow=True)
    # the flow is the mean of the forward and the reverse drift
    torch.testing.assert_close(flow, (sde.drift(x, t) + sde.reverse_drift(x, t, score)) / 2)


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
@every_sde
def test_the_variance_of_a_predictor_becomes_that_of_the_data_in_many_steps(name, predictor):
    """The chain is affine for Gaussian data, so its variance has a recursion without sampling."""
    if (name, predictor) == ("subvp", "ancestral"):
        with pytest.raises(ValueError, match="no ancestral sampling; use euler_maruyama"):
            SCHEDULERS[name].step_pred(torch.ones(1, 2), torch.tensor(0.5), torch.ones(1, 2), predictor=predictor)
        return
    scheduler, errors = SCHEDULERS[name], []
    for steps in (50, 1600):
        scheduler.set_timesteps(steps)
        # the state is slope * start + the accumulated noise of this variance
        variance = torch.tensor(scheduler.init_noise_sigma**2, dtype=torch.float64)
        for t in scheduler.timesteps:
            probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
            score = gaussian_score(scheduler.sde, probe, t)
            moved, mean = scheduler.step_pred(
                score, t, probe, predictor=predictor, noise=torch.ones_like(probe), return_dict=False
            )
            slope, added = mean[1, 0] - mean[0, 0], moved[0, 0] - mean[0, 0]
            last = slope**2 * variance
            variance = last + added**2
        errors.append(abs(float(last) - VARIANCE))
    scheduler.set_timesteps()
    assert errors[1] < 0.003 and errors[1] < errors[0] / 2, errors


# --- traps of the reference ---------------------------------------------------------------------


def test_correctors_of_sub_vp_take_the_step_sizes_of_vp():
    x, t = noise_like(torch.empty(4, 2).double()), torch.tensor(0.4).double()
    for corrector in ("langevin", "annealed"):
        moved = [
            SCHEDULERS[name].step_correct(-x, t, x, corrector=corrector, noise=noise_like(x, 1)).prev_sample
            for name in ("vp", "subvp")
        ]
        assert bool(moved[1].isfinite().all())
        assert torch.allclose(*moved) == (corrector == "langevin")


@every_sde
def test_euler_maruyama_of_the_probability_flow_is_eulers_method(name):
    scheduler, x = SCHEDULERS[name], noise_like(torch.empty(3, 2).double())
    t = scheduler.timesteps[300]
    score = gaussian_score(scheduler.sde, x, t)
    moved = scheduler.step_pred(score, t, x, predictor="euler_maruyama", probability_flow=True)
    expected = x - scheduler.velocity(score, t, x) / 1000
    torch.testing.assert_close(moved.prev_sample, expected)
    assert torch.equal(moved.prev_sample, moved.prev_sample_mean)


@pytest.mark.parametrize("steps", [2, 10, 20, 21])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
def test_fewer_steps_than_beta_max_give_finite_samples(steps, predictor):
    scheduler, x = ScoreSdeVPScheduler(), noise_like(torch.empty(4, 2))
    scheduler.set_timesteps(steps)
    betas = scheduler.sde.discrete_betas()
    assert bool(((betas > 0) & (betas < 1)).all())
    for t in scheduler.timesteps:
        score = gaussian_score(scheduler.sde, x, t)
        x = scheduler.step_correct(score, t, x, corrector="langevin", noise=noise_like(x, 2)).prev_sample
        score = gaussian_score(scheduler.sde, x, t)
        x = scheduler.step_pred(score, t, x, predictor=predictor, noise=noise_like(x, 1)).prev_sample
    assert bool(x.isfinite().all())


@every_sde
def test_every_step_of_the_chain_is_visited_once_however_many_there_are(name):
    scheduler = SCHEDULERS[name]
    for steps in (2, 11, 1000, 2000, 5000):
        scheduler.set_timesteps(steps)
        assert torch.equal(scheduler.chain_index(scheduler.timesteps), torch.arange(steps).flip(0)), steps
    # floor(t (N - 1)), as the reference has it, is another step for half of them
    floor = (torch.linspace(1, 1e-3, 2000, dtype=torch.float64) * 1999).floor()
    assert int((floor != torch.arange(2000).flip(0)).sum()) == 999
    scheduler.set_timesteps()


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_the_noise_at_the_earliest_times_is_exact(name):
    for t in (1e-5, 1e-4, 1e-3):
        std = SDES[name].scale_and_std(torch.tensor(t, dtype=torch.float32))[1]
        integral = t * 0.1 + t**2 * 19.9 / 2
        expected = -math.expm1(-integral)
        assert float(std) == pytest.approx(math.sqrt(expected) if name == "vp" else expected, rel=1e-6)


# --- correctors ---------------------------------------------------------------------------------


def test_langevins_step_has_the_stated_signal_to_noise_ratio_for_each_sample_alone():
    x, score, noise = (noise_like(torch.empty(5, 3, 4, 4).double(), seed) for seed in range(3))
    t = torch.tensor(0.5).double()
    scheduler = SCHEDULERS["ve"]
    score = score / scheduler.marginal(t)[1]
    whole = scheduler.step_correct(score, t, x, snr=0.2, noise=noise)
    signal = (whole.prev_sample_mean - x).flatten(1).norm(dim=1)
    added = (whole.prev_sample - whole.prev_sample_mean).flatten(1).norm(dim=1)
    torch.testing.assert_close(signal / added, torch.full((5,), 0.2).double())
    alone = scheduler.step_correct(score[2:3], t, x[2:3], snr=0.2, noise=noise[2:3]).prev_sample
    torch.testing.assert_close(alone, whole.prev_sample[2:3])


def test_a_score_that_vanishes_does_not_make_an_infinite_step():
    scheduler, x, t = SCHEDULERS["ve"], torch.zeros(1, 2).double(), torch.tensor(0.5).double()
    std, noise = scheduler.marginal(t)[1], torch.ones(1, 2).double()
    moved = scheduler.step_correct(torch.zeros_like(x), t, x, snr=0.2, noise=noise).prev_sample
    # step = 2 (snr |z| 2 std / sqrt(2))^2
    torch.testing.assert_close(moved, (4 * (0.2 * 2 * std) ** 2).sqrt().expand(1, 2))


def test_annealed_langevin_reaches_the_stationary_variance_of_its_autoregression():
    scheduler = AnnealedLangevinScheduler(5, 1.0, 0.1, step_lr=2e-3, n_steps_each=1)
    x = torch.zeros(40_000, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        score = gaussian_score(scheduler.sde, x, scheduler.times(torch.tensor(0)))
        x = scheduler.step(score, 0, x, generator, return_dict=False)[0]
    step, k = float(scheduler.step_sizes[0]), 1 / (VARIANCE + 1.0)
    assert step == pytest.approx(0.2)
    expected = 1 / (k * (1 - step * k / 2))
    assert float(x.var()) == pytest.approx(expected, rel=0.03)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)


def test_annealed_langevin_is_the_ald_corrector_of_ve_in_another_parametrisation():
    scheduler = AnnealedLangevinScheduler(7, 4.0, 0.05, step_lr=1e-4)
    x, noise = noise_like(torch.empty(2, 3).double()), noise_like(torch.empty(2, 3).double(), 1)
    snr = math.sqrt(1e-4 / 2) / 0.05
    for level in (0, 3, 6):
        t = scheduler.times(torch.tensor(level))
        expected = VESDE(7, 0.05, 4.0).annealed(x, t, -x, noise, snr)[0]
        torch.testing.assert_close(scheduler.step(-x, level, x, noise=noise).prev_sample, expected)


def test_tweedies_formula_removes_the_noise_of_the_last_level():
    scheduler = AnnealedLangevinScheduler(5, 1.0, 0.1)
    x = noise_like(torch.empty(3, 2).double())
    score = gaussian_score(scheduler.sde, x, torch.tensor(0.0))
    expected = (x * VARIANCE + MEAN * 0.01) / (VARIANCE + 0.01)
    torch.testing.assert_close(scheduler.denoise(score, torch.tensor(4), x), expected)


# --- NCSNv2's choices ---------------------------------------------------------------------------


def test_the_step_size_of_the_published_cifar_10_run_is_found():
    assert langevin_step_size(50.0, 0.01, 232, 5) == pytest.approx(6.2e-6, rel=0.01)


def test_neighbouring_levels_overlap_by_half():
    for dims in (64, 256, 3072):
        gamma, centre = level_ratio(dims), math.sqrt(2 * dims)
        normal = torch.distributions.Normal(0.0, 1.0)
        ends = torch.tensor([centre * (gamma - 1) + 3 * gamma, centre * (gamma - 1) - 3 * gamma])
        assert float(normal.cdf(ends)[0] - normal.cdf(ends)[1]) == pytest.approx(0.5, abs=1e-4)
    assert level_count(3072, 50.0, 0.01) == pytest.approx(232, abs=15)
    assert level_ratio(2) == 2.0 and level_count(2, 0.08, 0.01) == 4


def test_the_noisiest_level_is_the_largest_distance_of_two_samples():
    data = torch.zeros(5, 1, 2, 2)
    data[1, 0, 0, 0], data[2, 0, 1, 1] = 3.0, -4.0
    assert largest_distance(data) == pytest.approx(5.0)


# --- the probability flow -----------------------------------------------------------------------


def exact_flow(sde, x: Tensor, start: float, end: float) -> Tensor:
    """x_start of data N(MEAN, VARIANCE) carried to x_end in closed form."""
    places = []
    for t in (start, end):
        scale, std = sde.scale_and_std(torch.tensor(t, dtype=torch.float64))
        places.append((scale * MEAN, (scale**2 * VARIANCE + std**2).sqrt()))
    (m0, d0), (m1, d1) = places
    return m1 + d1 / d0 * (x - m0)


@every_sde
def test_the_adaptive_solver_is_as_exact_as_asked_and_heuns_method_of_order_two(name):
    scheduler, errors = SCHEDULERS[name], []
    x = scheduler.init_noise_sigma * noise_like(torch.empty(6, 2).double())

    def velocity(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return scheduler.velocity(gaussian_score(scheduler.sde, x, t), t, x)

    eps = 1e-2
    expected = exact_flow(scheduler.sde, x, 1.0, eps)
    exact, calls = scheduler.solve_flow(velocity, x, rtol=1e-8, atol=1e-8, eps=eps)
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)
    assert int(calls.min()) > 50
    for steps in (50, 100, 200):
        found, _ = scheduler.solve_flow(velocity, x, steps, eps=eps)
        errors.append(float((found - expected).abs().max()))
    order = -np.polyfit(np.log([50, 100, 200]), np.log(errors), 1)[0]
    assert 1.7 < order < 3.5, (order, errors)
    back, _ = scheduler.solve_flow(velocity, exact, rtol=1e-8, atol=1e-8, backward=False, eps=eps)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_few_steps_along_the_flow_are_short_where_the_signal_rises_above_the_noise(name, monkeypatch):
    scheduler = SCHEDULERS[name]

    def last_rise() -> float:
        """Of the logarithm of the signal-to-noise ratio, over the last of ten steps."""
        times = []

        def velocity(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            times.append(t[0])
            return torch.zeros_like(x)

        scheduler.solve_flow(velocity, torch.zeros(1, 2), 10)
        assert float(times[0]) == 1 and float(times[-1]) == pytest.approx(scheduler.sampling_eps)
        scale, std = scheduler.sde.scale_and_std(torch.stack(times[-2:]))
        return float((2 * (scale / std).log()).diff())

    chosen = last_rise()
    monkeypatch.setattr(type(scheduler), "flow_power", 1)
    assert 3 * chosen < last_rise(), (chosen, last_rise())


def swirl(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([x[:, 1] * (1 + t), -x[:, 0] + (5 * t).sin() * x[:, 1] ** 2], dim=1)


def test_one_sample_takes_the_steps_of_scipys_rk45():
    integrate = pytest.importorskip("scipy.integrate")
    x = torch.tensor([[1.0, 0.3]], dtype=torch.float64)

    def velocity(t: float, y: np.ndarray) -> np.ndarray:
        return swirl(torch.from_numpy(y)[None], torch.tensor([t]).double(), None)[0].numpy()

    for start, end in ((0.0, 2.0), (2.0, 0.0)):
        theirs = integrate.solve_ivp(velocity, (start, end), x[0].numpy(), rtol=1e-5, atol=1e-6, method="RK45")
        ours, calls = dormand_prince(swirl, x, start, end, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours[0].numpy(), theirs.y[:, -1], rtol=1e-9)
        assert int(calls) == theirs.nfev


def test_a_sample_does_not_depend_on_the_rest_of_its_batch():
    x = 0.7 * noise_like(torch.empty(7, 2).double())
    whole, calls = dormand_prince(swirl, x, 0.0, 2.0)
    assert len(calls.unique()) > 1
    for i in range(7):
        alone, mine = dormand_prince(swirl, x[i : i + 1], 0.0, 2.0)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-12, atol=1e-12)
        assert int(mine) == int(calls[i])


def test_a_velocity_that_is_not_finite_ends_in_a_sentence():
    with pytest.raises(ValueError, match="the network's output is not finite"):
        dormand_prince(lambda x, t, rows: x / 0, torch.ones(1, 2).double(), 0.0, 1.0)


def test_heuns_method_ends_where_its_times_end():
    x = heun(
        lambda x, t, rows: torch.ones_like(x) * t[:, None].float(), torch.zeros(2, 1), torch.tensor([0.0, 0.5, 2.0])
    )
    torch.testing.assert_close(x, torch.full((2, 1), 2.0))


# --- schedulers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4, 4)])
@every_sde
def test_the_noise_that_was_added_is_the_score_that_the_network_means(name, shape):
    scheduler = SCHEDULERS[name]
    x_0, noise = noise_like(torch.empty(shape)), noise_like(torch.empty(shape), 1)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, t)
    score, (scale, std) = scheduler.to_score(noise, t), scheduler.marginal(t)
    torch.testing.assert_close(score, -(x_t - over(scale, x_0) * x_0) / over(std, x_0) ** 2, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scheduler.denoise(score[:1], t[:1], x_t[:1]), x_0[:1], rtol=1e-4, atol=1e-4)


def test_the_network_of_an_exploding_process_sees_inputs_of_unit_size():
    scheduler = SCHEDULERS["ve"]
    for t in (torch.tensor(0.0), torch.tensor(1.0)):
        x_t = scheduler.add_noise(noise_like(torch.empty(4000, 1)), noise_like(torch.empty(4000, 1), 1), t)
        assert float(scheduler.scale_model_input(x_t, t).std()) == pytest.approx(1.0, rel=0.05)


def test_networks_are_told_time_sigma_or_the_number_of_a_level():
    t = torch.tensor([0.0, 0.5, 1.0])
    tell = {kind: ScoreSdeVEScheduler(11, 0.01, 1.0, conditioning=kind) for kind in ("time", "sigma", "index")}
    torch.testing.assert_close(tell["time"].network_time(t), torch.tensor([0.0, 499.5, 999.0]))
    torch.testing.assert_close(tell["sigma"].network_time(t), torch.tensor([0.01, 0.1, 1.0]))
    torch.testing.assert_close(tell["index"].network_time(t), torch.tensor([10.0, 5.0, 0.0]))
    discrete = ScoreSdeVPScheduler(100, conditioning="index")
    alpha_bar = discrete.sde.alpha_bar()
    torch.testing.assert_close(discrete.marginal(torch.arange(100) / 99)[0], alpha_bar.sqrt())


@pytest.mark.parametrize("cls", [ScoreSdeVEScheduler, ScoreSdeVPScheduler, ScoreSdeSubVPScheduler])
def test_a_saved_equation_comes_back(cls, tmp_path):
    scheduler = cls(50, sampling_eps=1e-2, snr=0.3)
    scheduler.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again.sde == scheduler.sde and torch.equal(again.timesteps, scheduler.timesteps)
    assert (again.config.snr, again.predictor) == (0.3, scheduler.predictor)


def test_saved_levels_come_back(tmp_path):
    AnnealedLangevinScheduler(6, 2.0, 0.1, 1e-3, 4, denoise=False).save_pretrained(tmp_path)
    again = AnnealedLangevinScheduler.from_pretrained(tmp_path)
    assert again.correct_steps == 4 and not again.denoises_apart and again.timesteps.tolist() == list(range(6))
    torch.testing.assert_close(again.sigmas, torch.logspace(math.log10(2.0), -1, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ScoreSdeVEScheduler(sigma_min=2.0, sigma_max=1.0), "sigma_min=2.0 and sigma_max=1.0 must be"),
        (lambda: ScoreSdeVPScheduler(beta_min=3.0, beta_max=1.0), "beta_min=3.0 and beta_max=1.0"),
        (lambda: ScoreSdeVPScheduler(prediction_type="noise"), "unknown prediction_type 'noise'; choose from"),
        (lambda: ScoreSdeSubVPScheduler(conditioning="index"), "has no discrete models"),
        (lambda: AnnealedLangevinScheduler(1), "num_levels=1"),
        (lambda: ScoreSdeVPScheduler().set_timesteps(1), "at least 2, not 1"),
        (
            lambda: ScoreSdeVPScheduler().step_pred(torch.ones(1), torch.ones(()), torch.ones(1), predictor="heun"),
            "unknown predictor 'heun'; choose from",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()

"""Likelihood by the probability flow: closed forms of Gaussian data, mixtures, and the measure."""

import math

import pytest
import torch
from torch import Tensor

import hf_diffusion
from hf_diffusion.data.loading import load_data
from hf_diffusion.evaluation.model_measures import ModelMeasureOptions, find_model_measure
from hf_diffusion.evaluation.ode_likelihood import (
    Flow,
    bits_per_dimension,
    draw_probe,
    flow_log_likelihood,
    gaussian_flow,
    score_flow,
)
from hf_diffusion.schedulers.scheduling_score import VESDE, VPSDE, SubVPSDE, over


SDES = {"ve": VESDE(), "vp": VPSDE(), "subvp": SubVPSDE()}
MEAN, VARIANCE, EPS = 0.3, 0.49, 1e-5


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def normal_logp(x: Tensor, mean: float, variance: float) -> Tensor:
    return torch.distributions.Normal(mean, math.sqrt(variance)).log_prob(x).flatten(1).sum(1)


def gaussian_data(shape=(4, 2, 3, 3)) -> Tensor:
    noise = torch.randn(shape, generator=seeds(0)[0], dtype=torch.float64)
    return MEAN + math.sqrt(VARIANCE) * noise


def flow_of(sde, score, prior_logp=None) -> Flow:
    def velocity(x: Tensor, t: Tensor, labels) -> Tensor:
        return sde.reverse_drift(x, t, score(x, t), probability_flow=True)

    return Flow(velocity, EPS, 1.0, prior_logp or sde.prior_logp)


def gaussian_flow_of(sde) -> Flow:
    def score(x: Tensor, t: Tensor) -> Tensor:
        scale, std = (over(value, x) for value in sde.scale_and_std(t))
        return -(x - scale * MEAN) / (scale**2 * VARIANCE + std**2)

    return flow_of(sde, score)


@pytest.mark.parametrize("probe", ["exact", "rademacher", "gaussian"])
@pytest.mark.parametrize("name", SDES)
def test_gaussian_data_have_the_bits_of_the_closed_form(name, probe):
    """At EPS they are N(scale m, scale^2 s2 + std^2); the prior is not quite where they end."""
    sde, x = SDES[name], gaussian_data()
    found = flow_log_likelihood(gaussian_flow_of(sde), x, draw_probe(probe, x, seeds(1, 2, 3, 4)))
    scale, std = (float(value) for value in sde.scale_and_std(torch.tensor(EPS)))
    end_scale, end_std = (float(value) for value in sde.scale_and_std(torch.tensor(1.0)))
    variance, end = scale**2 * VARIANCE + std**2, end_scale**2 * VARIANCE + end_std**2
    dims = x[0].numel()
    z = end_scale * MEAN + math.sqrt(end / variance) * (x - scale * MEAN)
    expected = normal_logp(z, 0.0, sde.prior_std**2) + dims / 2 * math.log(end / variance)
    bits, exact = bits_per_dimension(found.log_prob, dims), bits_per_dimension(expected, dims)
    if probe == "gaussian":
        # the divergence is the same everywhere, so only |probe|^2 makes the estimate differ
        length = (draw_probe(probe, x, seeds(1, 2, 3, 4)) ** 2).flatten(1).sum(1) / dims
        change = dims / 2 * math.log(end / variance)
        exact = bits_per_dimension(normal_logp(z, 0.0, sde.prior_std**2) + change * length, dims)
    assert float((bits - exact).abs().max()) < 2e-3
    torch.testing.assert_close(found.latents, z, rtol=1e-3, atol=5e-3)
    # and the model is the data's distribution, but for the prior of VE, which is wider than its end
    direct = bits_per_dimension(normal_logp(x, MEAN, VARIANCE), dims)
    if probe != "gaussian":
        assert float((bits - direct).abs().max()) < 0.02


def test_a_mixture_has_its_density_where_the_flow_bends():
    sde, centres = VPSDE(), torch.tensor([[-0.8, 0.0], [0.8, 0.3]], dtype=torch.float64)

    def logp(x: Tensor, t: Tensor) -> Tensor:
        scale, std = (over(value, x)[:, None] for value in sde.scale_and_std(t))
        variance = scale**2 * 0.04 + std**2
        gaps = -((x[:, None] - scale * centres) ** 2) / (2 * variance) - (2 * math.pi * variance).log() / 2
        return gaps.sum(2).logsumexp(1) - math.log(2)

    def score(x: Tensor, t: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(logp(x, t).sum(), x, create_graph=True)[0]

    x = torch.tensor([[0.0, 0.0], [-0.8, 0.1], [0.5, 0.4], [0.0, 1.0]], dtype=torch.float64)
    # where it ends is not quite the prior, which shows far from the centres
    flow = flow_of(sde, score, lambda z: logp(z, torch.ones(len(z))).detach())
    found = flow_log_likelihood(flow, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_prob, logp(x, torch.full((4,), EPS)).detach(), rtol=0, atol=2e-3)
    # Hutchinson's estimate is right in the mean
    probes = draw_probe("rademacher", x.repeat(50, 1), seeds(*range(200)))
    many = flow_log_likelihood(flow, x.repeat(50, 1), probes, rtol=1e-4, atol=1e-4)
    many = many.log_prob.reshape(50, 4)
    error = many.std(0) / 50**0.5
    assert bool(((many.mean(0) - found.log_prob).abs() < 4 * error + 1e-3).all())


def test_bits_are_those_of_whole_numbers_where_values_lie_apart():
    # uniform on 256 values in [-1, 1]: 8 bits
    logp = torch.tensor([-3 * math.log(256 * 2 / 255)], dtype=torch.float64)
    assert float(bits_per_dimension(logp, 3, 2 / 255)) == pytest.approx(8.0)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_denoising_models_in_discrete_time_have_the_closed_form(schedule, prediction_type):
    """The exact network of Gaussian data, told integer timesteps and fractions between them."""
    scheduler = hf_diffusion.LinearDDPMScheduler(1000, beta_schedule=schedule, prediction_type=prediction_type)
    log_ratio = ((1 - scheduler.alpha_bar) / scheduler.alpha_bar).log() / 2
    log_ratio = log_ratio[scheduler.alpha_bar > 1e-10]

    class Exact(torch.nn.Module):
        config = type("Config", (), {"in_channels": 2})

        def forward(self, x_t, t, class_labels=None, return_dict=False):
            below = t.double().floor().long().clamp(max=len(log_ratio) - 2)
            share = t.double() - below
            s = over((1 - share) * log_ratio[below] + share * log_ratio[below + 1], x_t)
            scale = (1 + (2 * s).exp()).rsqrt()
            std = s.exp() * scale
            noise = std * (x_t - scale * MEAN) / (scale**2 * VARIANCE + std**2)
            x_0 = (x_t - std * noise) / scale
            return ({"epsilon": noise, "sample": x_0, "v_prediction": scale * noise - std * x_0}[prediction_type],)

    pipeline = type("Pipeline", (), {"scheduler": scheduler, "unet": Exact(), "device": torch.device("cpu")})
    pipeline.sample_shape = (2, 3, 3)
    x = gaussian_data()
    found = flow_log_likelihood(gaussian_flow(pipeline), x, draw_probe("rademacher", x, seeds(1, 2, 3, 4)))
    variance = VARIANCE + math.exp(2 * float(log_ratio[0]))
    expected = normal_logp(x, MEAN, variance)
    # float32 timesteps, and a last level that is not quite the prior
    bits, exact = bits_per_dimension(found.log_prob, 18), bits_per_dimension(expected, 18)
    assert float((bits - exact).abs().max()) < 5e-3
    assert found.latents.shape == x.shape


# --- the measure --------------------------------------------------------------------------------


def measured(pipe, data, **options):
    """What the pipeline's own measure finds."""
    measure = find_model_measure(pipe, "bpd_ode")
    options = ModelMeasureOptions(progress=False, **options)
    measure.check(pipe, data, options)
    return measure(pipe, data, options)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def pipelines() -> dict:
    from tests.pipelines.tiny import make_classifier_free, make_points, make_score

    few = hf_diffusion.LinearDDPMScheduler(40, beta_end=0.2)
    pipes = {
        "score": make_score(classes=None),
        "score of classes": make_score(),
        "denoiser": make_classifier_free(few, classes=None),
        "points": make_points(None),
    }
    with torch.no_grad():
        for pipe in pipes.values():
            for parameter in pipe.unet.parameters():
                # smooth networks, which take tens of calls instead of hundreds
                parameter *= 0.3
    return pipes


@pytest.mark.parametrize("name", ["score", "denoiser"])
def test_the_measure_does_not_depend_on_batches_and_has_an_error_bar(name, pipelines, digits):
    found = measured(pipelines[name], digits, count=3, batch_size=3)
    again = measured(pipelines[name], digits, count=3, batch_size=2)
    bits, other = found.measures["bpd_ode"], again.measures["bpd_ode"]
    assert bits.value == pytest.approx(other.value, rel=1e-5) and bits.better == "lower"
    assert 0 < bits.error < abs(bits.value) and math.isfinite(bits.value)
    assert "3 samples, uniform dequantisation, Hutchinson's divergence" in bits.name
    assert found.protocol["dequantisation"] == "uniform" and found.protocol["network_calls"] > 10


def test_points_have_the_density_itself_and_the_exact_divergence(pipelines):
    found = measured(pipelines["points"], load_data("swiss_roll"), count=4)
    assert "of the density, exact divergence" in found.measures["bpd_ode"].name
    assert found.protocol["dequantisation"] == "none"


def test_the_flow_of_a_model_with_classes_is_that_of_the_class(pipelines):
    pipe = pipelines["score of classes"]
    x, t = torch.zeros(2, *pipe.sample_shape), torch.full((2,), 0.5, dtype=torch.float64)
    velocity = score_flow(pipe).velocity
    one, other = (velocity(x, t, torch.tensor(labels)) for labels in ([0, 1], [0, 2]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])


def test_what_has_no_flow_is_refused_in_a_sentence(pipelines, digits):
    pipe = pipelines["score"]
    scheduler = pipe.scheduler
    pipe.scheduler = hf_diffusion.LinearDDPMScheduler()
    try:
        with pytest.raises(ValueError, match="bpd_ode needs the probability flow of a score network"):
            measured(pipe, digits, count=2)
    finally:
        pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="unknown probe 'sign'; choose from"):
        draw_probe("sign", torch.zeros(1, 2), seeds(1))

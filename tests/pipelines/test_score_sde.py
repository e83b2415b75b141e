"""ScoreSdePipeline: samples of known data, guidance, and the two samplers."""

import math

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hf_diffusion import (
    AnnealedLangevinScheduler,
    LinearDDPMScheduler,
    ScoreSdePipeline,
    ScoreSdeSubVPScheduler,
    ScoreSdeVEScheduler,
    ScoreSdeVPScheduler,
)
from tests.pipelines.tiny import Recorder, make_score, quiet, seeds


MEANS, VARIANCE = (-0.6, 0.6), 0.04


class ExactNetwork(ModelMixin, ConfigMixin):
    """Predicts the noise of data N(m, 0.04), m of two classes, 0 of none; told the deviation."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: tuple = (), num_class_embeds: int = 2, null_class=True):
        super().__init__()
        self.means = nn.Parameter(torch.tensor([*MEANS, 0.0]))
        self.preserves_variance, self.is_sub = True, False

    def forward(self, sample: Tensor, timestep: Tensor, class_labels=None, return_dict: bool = True):
        std = timestep.reshape(-1, 1).to(sample.dtype)
        scale = torch.ones_like(std)
        if self.preserves_variance:
            scale = (1 - (std if self.is_sub else std**2)).clamp(min=0).sqrt()
        mean = self.means[class_labels][:, None]
        return (std * (sample - scale * mean) / (scale**2 * VARIANCE + std**2),)


def exact(cls, **options) -> ScoreSdePipeline:
    network = ExactNetwork()
    network.preserves_variance = cls in (ScoreSdeVPScheduler, ScoreSdeSubVPScheduler)
    network.is_sub = cls is ScoreSdeSubVPScheduler
    return quiet(ScoreSdePipeline(network, cls(conditioning="sigma", scale_input=False, **options)))


PIPES = {
    "ve": (ScoreSdeVEScheduler, {"sigma_max": 5.0, "corrector": "annealed"}),
    "vp": (ScoreSdeVPScheduler, {}),
    "subvp": (ScoreSdeSubVPScheduler, {}),
}


def moments(pipe: ScoreSdePipeline, labels: list[int], **options) -> tuple[float, float]:
    generator = seeds(0)[0]
    x = pipe(labels, generator=generator, output_type="latent", micro_batch_size=10_000, **options).images
    return float(x.mean()), float(x.var())


@pytest.mark.parametrize(
    "options", [{"num_inference_steps": 200}, {"sampler": "ode"}, {"sampler": "ode", "num_inference_steps": 100}]
)
@pytest.mark.parametrize("name", PIPES)
def test_every_process_and_sampler_draws_the_data_of_the_class(name, options):
    cls, settings = PIPES[name]
    mean, variance = moments(exact(cls, **settings), [1] * 2000, **options)
    assert mean == pytest.approx(MEANS[1], abs=0.03) and variance == pytest.approx(VARIANCE, rel=0.2)


@pytest.mark.parametrize("predictor, corrector", [("reverse_diffusion", "none"), ("ancestral", "annealed")])
def test_another_predictor_and_corrector_draw_the_same_data(predictor, corrector):
    options = {"num_inference_steps": 200, "predictor": predictor, "corrector": corrector}
    mean, variance = moments(exact(ScoreSdeVPScheduler), [0] * 2000, **options)
    assert mean == pytest.approx(MEANS[0], abs=0.03) and variance == pytest.approx(VARIANCE, rel=0.2)


def test_annealed_langevin_dynamics_draw_the_data_and_denoise_at_the_end():
    pipe = exact(AnnealedLangevinScheduler, num_levels=20, sigma_begin=3.0, sigma_end=0.1, step_lr=5e-4)
    pipe.scheduler.correct_steps = 20
    pipe.unet.preserves_variance = False
    mean, variance = moments(pipe, [1] * 2000, denoise=False)
    # the last level is data and its noise
    assert mean == pytest.approx(MEANS[1], abs=0.03) and variance == pytest.approx(VARIANCE + 0.01, rel=0.2)
    recorder = Recorder(pipe.unet)
    assert moments(pipe, [1] * 2000)[1] == pytest.approx(VARIANCE**2 / (VARIANCE + 0.01), rel=0.2)
    assert len(recorder.calls) == 20 * 20 + 1


def test_the_flow_gives_each_seed_its_sample_in_any_batch_and_micro_batch():
    pipe = exact(ScoreSdeVPScheduler)
    call = {"sampler": "ode", "output_type": "latent"}
    whole = pipe([0, 1, 0], generator=seeds(1, 2, 3), **call).images
    torch.testing.assert_close(pipe([1], generator=seeds(2), **call).images[0], whole[1], rtol=1e-5, atol=1e-6)
    parted = pipe([0, 1, 0], generator=seeds(1, 2, 3), micro_batch_size=2, **call).images
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-6)
    assert pipe.calls.shape == (3,) and int(pipe.calls.min()) > 10


def test_guidance_scales_the_difference_of_the_scores_within_its_interval():
    pipe = make_score()
    x, labels = torch.randn(2, *pipe.sample_shape, generator=seeds(0)[0]), torch.tensor([0, 1])
    t = torch.tensor(0.5, dtype=torch.float64)
    cond = pipe.predict_score(x, t, labels, None)
    uncond = pipe.predict_score(x, t, torch.full((2,), 4), None)
    torch.testing.assert_close(pipe.predict_score(x, t, labels, None, 3.0), uncond + 3 * (cond - uncond))
    each = pipe.predict_score(x, t, labels, 1, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(each, torch.stack([uncond[0], cond[1]]), rtol=1e-4, atol=1e-5)
    recorder = Recorder(pipe.unet)
    call = {"num_inference_steps": 5, "corrector": "none", "output_type": "latent", "generator": seeds(0, 1)}
    pipe([0, 1], guidance_scale=2.0, guidance_interval=(0.2, 0.6), **call)
    # times 1, 0.75, 0.5, 0.25 and 0: guided at two of them
    assert recorder.rows == [2, 2, 4, 4, 2]


def test_guidance_in_the_flow_ends_outside_of_its_interval():
    pipe = exact(ScoreSdeVPScheduler)
    call = {"sampler": "ode", "output_type": "latent", "tolerance": 1e-5}
    latents = torch.randn(4, 2, generator=seeds(0)[0])
    plain = pipe([1] * 4, latents=latents, **call).images
    never = pipe([1] * 4, latents=latents, guidance_scale=3.0, guidance_interval=(0.0, 0.0), **call).images
    torch.testing.assert_close(never, plain, rtol=1e-3, atol=1e-3)
    always = pipe([1] * 4, latents=latents, guidance_scale=3.0, **call).images
    assert float((always - plain).mean()) > 0.3


def test_without_labels_a_model_with_a_null_class_draws_from_all():
    pipe = exact(ScoreSdeVPScheduler)
    x = pipe(batch_size=1000, sampler="ode", generator=seeds(0)[0], output_type="latent").images
    assert float(x.mean()) == pytest.approx(0.0, abs=0.03) and math.sqrt(float(x.var())) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sampler": "euler"}, r"unknown sampler 'euler'; choose from \['pc', 'ode'\]"),
        ({"tolerance": 0.0}, "tolerance must be above 0, not 0.0"),
        ({"correct_steps": 0}, "correct_steps must be above 0, not 0"),
        ({"predictor": "heun"}, "unknown predictor 'heun'"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must be"),
        ({"class_labels": None, "batch_size": 2, "guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
    ],
)
def test_what_a_call_cannot_do_is_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        make_score()(**{"class_labels": [0, 1], "num_inference_steps": 3, **options})


def test_the_scheduler_of_another_family_is_refused():
    pipe = make_score()
    pipe.scheduler = LinearDDPMScheduler()
    with pytest.raises(ValueError, match="a LinearDDPMScheduler cannot sample from a score network"):
        pipe([0])

"""FlowMatchingPipeline: any prediction, any flow matching scheduler, guidance where asked for."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from hf_diffusion import FlowMatchingPipeline, FlowMatchingScheduler
from hf_diffusion.evaluation.ode_likelihood import flow_log_likelihood, matched_flow
from hf_diffusion.schedulers.scheduling_flow import PREDICTION_TYPES, convert_prediction, shift_sigmas
from tests.pipelines.tiny import TINY, Recorder, make_flow, quiet, sample
from tests.schedulers.gaussian_flow import GaussianFlow


STOCK = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}


class GaussianNetwork(ModelMixin, ConfigMixin):
    """The best answer to points of N(label, 0.3), in the kind of prediction that is asked for."""

    @register_to_config
    def __init__(self, prediction_type: str = "velocity", in_channels: int = 3, num_class_embeds: int = 2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, class_labels, return_dict=True):
        sigma = timestep / 1000
        velocity = GaussianFlow(class_labels[:, None], 0.3).velocity(sample, sigma)
        return (convert_prediction(velocity, sample, sigma, "velocity", self.config.prediction_type),)


def gaussian(prediction_type: str = "velocity", scheduler=None, **options) -> FlowMatchingPipeline:
    scheduler = FlowMatchingScheduler(shift=1.5) if scheduler is None else scheduler
    network = GaussianNetwork(prediction_type)
    options = {"prediction_type": prediction_type, "sigma_floor": 1e-4, **options}
    return quiet(FlowMatchingPipeline(network, scheduler, **options))


def levels_of(stock) -> list[float]:
    """The levels of a stock scheduler's run, before the shift."""
    sigmas = (stock.timesteps / 1000).unique().flip(0).double()
    return shift_sigmas(sigmas, 1 / stock.config.shift).tolist()


LATENTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
LABELS = [0, 1, 1, 0]
EXACT = torch.cat([GaussianFlow(label, 0.3).follow(row[None], 1.0, 0.0) for label, row in zip(LABELS, LATENTS)])


@pytest.mark.parametrize("solver", STOCK)
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_our_solvers_and_those_of_diffusers_follow_the_exact_flow_and_agree_to_rounding(prediction_type, solver):
    pipe = gaussian(prediction_type)
    near = {"rtol": 0, "atol": 0.03 if solver == "euler" else 1e-3}
    ours = sample(pipe, LABELS, latents=LATENTS, num_inference_steps=100, solver=solver)
    torch.testing.assert_close(ours, EXACT, **near)
    pipe.scheduler = STOCK[solver].from_config(pipe.scheduler.config)
    theirs = sample(pipe, LABELS, latents=LATENTS, num_inference_steps=100)
    torch.testing.assert_close(theirs, EXACT, **near)
    unshifted = levels_of(pipe.scheduler)
    pipe.scheduler = FlowMatchingScheduler.from_config(pipe.scheduler.config)
    again = sample(pipe, LABELS, latents=LATENTS, sigmas=unshifted, solver=solver)
    torch.testing.assert_close(again, theirs, rtol=1e-5, atol=2e-5)


def test_a_network_of_the_noise_draws_what_one_of_the_velocity_draws():
    # The noise tells no velocity at sigma 1.
    sigmas = torch.linspace(0.99, 0, 21)[:-1].tolist()
    noise, velocity = (
        sample(gaussian(kind), LABELS, latents=LATENTS, sigmas=sigmas, solver="heun")
        for kind in ("epsilon", "velocity")
    )
    torch.testing.assert_close(noise, velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_likelihood_of_gaussian_data_along_the_flow_is_exact(prediction_type):
    pipe, labels = gaussian(prediction_type, noise_scale=1.0), torch.tensor(LABELS)
    found = flow_log_likelihood(matched_flow(pipe), EXACT, labels=labels)
    normal = torch.distributions.Normal(labels[:, None].float(), 0.3**0.5)
    bits = (normal.log_prob(EXACT).sum(1) - found.log_prob).abs() / (3 * math.log(2))
    assert bits.max() < 2e-3
    # the way leads to the noise that the samples came from
    torch.testing.assert_close(found.latents.float(), LATENTS, rtol=0, atol=2e-3)


def test_stock_schedulers_are_read_from_the_folder_of_a_saved_model_and_sample_it(tmp_path):
    pipe = make_flow(FlowMatchingScheduler(shift=2.0), prediction_type="sample")
    pipe.save_pretrained(tmp_path)
    for solver, cls in STOCK.items():
        stock = cls.from_pretrained(tmp_path, subfolder="scheduler")
        loaded = quiet(FlowMatchingPipeline.from_pretrained(tmp_path, scheduler=stock))
        assert loaded.config.prediction_type == "sample" and stock.config.shift == 2.0
        theirs = sample(loaded, [0, 1], guidance_scale=2.0, num_inference_steps=6)
        ours = sample(pipe, [0, 1], guidance_scale=2.0, sigmas=levels_of(stock), solver=solver)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_heun_calls_the_network_twice_a_step_but_once_in_the_last():
    pipe = make_flow()
    for solver, calls in (("euler", 5), ("heun", 9)):
        recorder = Recorder(pipe.unet)
        sample(pipe, [1], num_inference_steps=5, solver=solver)
        assert len(recorder.calls) == calls == pipe.num_timesteps
    assert torch.equal(sample(make_flow(FlowMatchingScheduler(solver="heun")), [1]), sample(pipe, [1], solver="heun"))


def test_guidance_acts_strictly_within_the_interval_and_at_the_ends_that_it_reaches():
    pipe, recorder = make_flow(), None
    # sigma 1, 0.75, 0.5, 0.25
    for interval, guided in (
        ((0.0, 1.0), "1111"),
        ((0.25, 0.75), "0010"),
        ((0.25, 1.0), "1110"),
        ((0.0, 0.3), "0001"),
    ):
        recorder = Recorder(pipe.unet)
        sample(pipe, [1, 2], num_inference_steps=4, guidance_scale=2.0, guidance_interval=interval)
        assert recorder.rows == [4 if flag == "1" else 2 for flag in guided]
    # the second half of a Heun step goes by its own level
    recorder = Recorder(pipe.unet)
    options = {"guidance_scale": 2.0, "guidance_interval": (0.4, 0.6)}
    sample(pipe, [1, 2], num_inference_steps=4, solver="heun", **options)
    assert recorder.rows == [2, 2, 2, 4, 4, 2, 2]


def test_guidance_moves_along_the_difference_of_the_two_velocities():
    # one Euler step is affine in the velocity, and so in the scale
    pipe = make_flow(prediction_type="sample")
    one, two, four = (sample(pipe, [1], num_inference_steps=1, guidance_scale=w) for w in (1.0, 2.0, 4.0))
    assert (two - one).abs().max() > 0.05
    torch.testing.assert_close(four - one, 3 * (two - one), rtol=1e-4, atol=1e-4)


def test_without_labels_a_model_with_a_null_class_samples_unconditionally():
    pipe = make_flow()
    recorder = Recorder(pipe.unet)
    pipe(batch_size=2, num_inference_steps=2)
    assert recorder.labels == [[4, 4]] * 2


def test_networks_see_a_thousand_sigma_as_a_float():
    pipe = make_flow()
    recorder = Recorder(pipe.unet)
    sample(pipe, [0], num_inference_steps=3)
    seen = [float(args[1]) for _, args, _ in recorder.calls]
    assert seen == pytest.approx([1000, 2000 / 3, 1000 / 3])


def test_the_first_noise_has_the_deviation_of_the_training():
    pipe = gaussian(noise_scale=2.0)
    assert torch.equal(pipe.prepare_latents(4, None, LATENTS), 2 * LATENTS)
    drawn = pipe.prepare_latents(4000, torch.Generator().manual_seed(0), None)
    assert float(drawn.std()) == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize(
    "scheduler, call, message",
    [
        (DDIMScheduler(), {}, "a DDIMScheduler cannot sample from this network"),
        (UniPCMultistepScheduler(), {}, "a UniPCMultistepScheduler cannot sample"),
        (FlowMatchHeunDiscreteScheduler(), {"solver": "euler"}, "FlowMatchHeunDiscreteScheduler takes no solver"),
        (FlowMatchHeunDiscreteScheduler(), {"sigmas": [1.0]}, "FlowMatchHeunDiscreteScheduler takes no sigmas"),
        (None, {"solver": "dpm"}, "unknown solver 'dpm'"),
        (None, {"sigmas": [0.2, 0.5]}, "sigmas must fall"),
        (None, {"num_inference_steps": 0}, "at least 1, not 0"),
        (None, {"guidance_interval": (0.6, 0.2)}, r"0 <= low <= high <= 1, not \(0.6, 0.2\)"),
        (None, {"class_labels": None, "guidance_scale": 2.0}, "needs class_labels to guide towards"),
    ],
)
def test_mistakes_are_refused_in_a_sentence_before_the_network_is_asked(scheduler, call, message):
    pipe = make_flow(scheduler)
    recorder = Recorder(pipe.unet)
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0], **call})
    assert not recorder.calls


def test_a_model_without_a_null_class_is_not_guided_and_a_wrong_prediction_is_refused():
    with pytest.raises(ValueError, match="trained with a null class"):
        sample(make_flow(null_class=False), [0], guidance_scale=2.0)
    with pytest.raises(ValueError, match="unknown prediction_type 'v'; choose from"):
        TINY[FlowMatchingPipeline].make(prediction_type="v")

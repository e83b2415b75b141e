"""MeanFlowPipeline: the exact average velocity leads to the data in any number of steps."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from hf_diffusion import FlowMatchingScheduler, MeanFlowPipeline
from tests.pipelines.tiny import Recorder, make_mean_flow, quiet, sample
from tests.schedulers.gaussian_flow import GaussianFlow


class ExactAverage(ModelMixin, ConfigMixin):
    """The average velocity of points of N(label, variance 0.3); time 10 is noise."""

    @register_to_config
    def __init__(self, in_channels: int = 3, num_class_embeds: int = 2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, duration, class_labels, return_dict=True):
        t, lengths = float(timestep) / 10, duration[0].item() / 10
        reached = GaussianFlow(class_labels[:, None], 0.3).follow(sample.double(), t, t - lengths)
        return (((sample - reached) / lengths).to(sample.dtype),)


LATENTS, LABELS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), [0, 1, 1, 0]
DATA = torch.tensor(LABELS)[:, None] + 0.3**0.5 * LATENTS


@pytest.mark.parametrize("options", [{"num_inference_steps": n} for n in (1, 2, 5)] + [{"sigmas": (1.0, 0.7, 0.1)}])
def test_the_exact_average_lands_on_the_data_in_any_steps(options):
    pipe = quiet(MeanFlowPipeline(ExactAverage(), FlowMatchingScheduler(10)))
    found = sample(pipe, LABELS, latents=LATENTS, **options)
    torch.testing.assert_close(found, DATA, rtol=1e-4, atol=1e-4)


def test_each_step_is_one_call_that_is_told_where_it_begins_and_how_long_it_is():
    pipe = make_mean_flow()
    seen = Recorder(pipe.unet)
    sample(pipe, [0, 1], sigmas=(1.0, 0.7, 0.1))
    times = [float(args[1]) for _, args, _ in seen.calls]
    lengths = [args[2] for _, args, _ in seen.calls]
    assert times == pytest.approx([10, 7, 1])
    torch.testing.assert_close(torch.stack(lengths), torch.tensor([[3.0] * 2, [6.0] * 2, [1.0] * 2]))
    assert seen.labels == [[0, 1]] * 3


def test_guidance_goes_away_from_the_velocity_without_a_label():
    pipe = make_mean_flow()
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    one = {"num_inference_steps": 1, "latents": latents}
    cond, uncond = sample(pipe, [0, 1], **one), pipe(None, 2, output_type="latent", **one).images
    guided = sample(pipe, [0, 1], **one, guidance_scale=2.5)
    torch.testing.assert_close(guided, uncond + 2.5 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cond, uncond, atol=0.01)


@pytest.mark.parametrize("scheduler", [FlowMatchingScheduler(10, solver="heun"), DDIMScheduler()])
def test_steps_that_are_not_eulers_along_this_path_are_refused(scheduler):
    with pytest.raises(ValueError, match='solver="euler"'):
        sample(make_mean_flow(scheduler), [0])

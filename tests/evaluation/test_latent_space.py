"""DDIM's promises: consistency, spherical interpolation, inversion and reconstruction."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from hf_diffusion.evaluation.latent_space import (
    consistency,
    interpolate,
    invert,
    reconstruct,
    reconstruction_error,
    slerp,
)
from hf_diffusion.evaluation.sampling import draw
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler


class GaussianNoise(torch.nn.Module):
    """The exact noise prediction for data N(0, scale^2), for which DDIM's ODE has a closed solution."""

    def __init__(self, scheduler, scale: float):
        super().__init__()
        self.alpha_bar, self.scale = scheduler.alpha_bar, scale
        self.config, self.dtype = {}, torch.float64

    def forward(self, sample, timestep, return_dict=True):
        a = self.alpha_bar[int(timestep)]
        return ((1 - a).sqrt() / (a * self.scale**2 + 1 - a) * sample,)


class Exact:
    """What the functions here ask of a pipeline."""

    def __init__(self, scale: float):
        self.scheduler, self.device = DDIMEtaScheduler(beta_schedule="squaredcos_cap_v2"), torch.device("cpu")
        self.unet = GaussianNoise(self.scheduler, scale)


def test_slerp_keeps_the_length_of_noise_and_ends_where_it_should():
    a, b = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0), a)
    torch.testing.assert_close(slerp(a, b, 1), b)
    assert torch.allclose(slerp(a, b, 0.5).std((1, 2, 3)), torch.ones(4), atol=0.05)
    assert ((a + b) / 2).std() < 0.75  # what a straight line does
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    angle = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(slerp(*angle, 1 / 3), torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))


def test_interpolation_leads_from_one_seeds_image_to_the_others(conditional):
    images = interpolate(conditional, [(3, 4), (5, 6)], 5, [0, 2], num_inference_steps=3)
    assert images.shape == (10, 8, 8, 1)
    ends = draw(conditional, [3, 4, 5, 6], [0, 0, 2, 2], num_inference_steps=3)
    assert np.abs(images[[0, 4, 5, 9]].astype(int) - ends).max() <= 1
    assert np.abs(images[2].astype(int) - images[0]).max() > 1


def test_inversion_finds_the_noise_that_the_closed_solution_has():
    pipeline, scale = Exact(scale=0.5), 0.5
    images = torch.linspace(-0.9, 0.9, 7).reshape(7, 1, 1, 1)
    # along the ODE for Gaussian data x_t / std(x_t) is constant
    level = lambda a: math.sqrt(a * scale**2 + 1 - a)  # noqa: E731
    alpha_bar = pipeline.scheduler.alpha_bar
    first, last = float(alpha_bar[0]), float(alpha_bar[990])  # of 100 steps
    noise = invert(pipeline, images, None, 100)
    torch.testing.assert_close(noise, images * (level(last) / level(first)), rtol=0.03, atol=0)


def test_reconstruction_converges_with_the_number_of_steps():
    images = torch.linspace(-0.9, 0.9, 7).reshape(7, 1, 1, 1)
    errors = [float(reconstruction_error(Exact(0.5), images, None, steps).mean()) for steps in (10, 40, 160)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_reconstruction_of_a_network_with_classes_and_of_a_stock_pipeline(conditional):
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    labels = torch.tensor([0, 1, 2])
    again = reconstruct(conditional, invert(conditional, images, labels, 200), labels, 200)
    assert (again - images).abs().mean() < 0.3 * images.abs().mean()
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    stock = DDIMPipeline(unet, DDIMScheduler())
    assert reconstruction_error(stock, images, None, 20).shape == (3,)


def test_images_of_one_noise_agree_more_the_more_steps_and_much_more_than_those_of_another(pipeline):
    found = consistency(pipeline, range(8), None, [5, 20, 100])
    assert found[20] < found[5] < found[0] and found[20] < 0.5 * found[0]


def test_what_is_not_deterministic_or_cannot_start_from_noise_is_refused(pipeline):
    with pytest.raises(ValueError, match="eta=0.5 draws noise in every step"):
        consistency(pipeline, range(4), None, [2, 3], eta=0.5)
    with pytest.raises(ValueError, match="at least 2 step counts on at least 2 seeds"):
        consistency(pipeline, range(4), None, [2])
    with pytest.raises(ValueError, match="at least 2 columns"):
        interpolate(pipeline, [(0, 1)], 1)
    former = pipeline.scheduler
    pipeline.scheduler = CosineDDPMScheduler()
    with pytest.raises(ValueError, match="CosineDDPMScheduler draws noise in every step"):
        interpolate(pipeline, [(0, 1)], 3)
    pipeline.scheduler = former
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    with pytest.raises(ValueError, match="DDIMPipeline cannot start from given noise"):
        interpolate(DDIMPipeline(unet, DDIMScheduler()), [(0, 1)], 3)

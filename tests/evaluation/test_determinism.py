"""What deterministic sampling promises: consistency, inversion and reconstruction."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.determinism import (
    consistency,
    invert,
    measure_consistency,
    measure_inversion,
    reconstruct,
    reconstruction_error,
)
from hf_diffusion.evaluation.model_measures import ModelMeasureOptions
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler
from tests.evaluation.conftest import stock_pipeline, tiny_pipeline
from tests.evaluation.made_up import Puller, PullScheduler, VectorPipeline


class GaussianNoise(torch.nn.Module):
    """The exact noise prediction for data N(0, scale^2), whose ODE has a closed solution."""

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
    again = reconstruct(conditional, invert(conditional, images, labels, 60), labels, 60)
    assert (again - images).abs().mean() < 0.3 * images.abs().mean()
    assert reconstruction_error(stock_pipeline(), images, None, 20).shape == (3,)


def test_images_of_one_noise_agree_more_the_more_steps_and_much_more_than_those_of_another(pipeline):
    found = consistency(pipeline, range(8), None, [5, 20, 100])
    assert found[20] < found[5] < found[0] and found[20] < 0.5 * found[0]


def test_consistency_and_inversion_are_better_when_low_and_say_what_they_hold_for(conditional, image_folder):
    data = load_images(train_data_dir=str(image_folder), label_column="none")
    options = ModelMeasureOptions(count=6, steps=(2, 3), seed=4, labels=[0, 1, 2])
    measured = measure_consistency(conditional, data, options)
    assert set(measured.measures) == {"consistency_0", "consistency_2", "consistency_3"}
    assert measured.protocol["seeds"] == [4, 9] and measured.protocol["sampling"]["sampler"] == "DDIMEtaScheduler"
    assert measured.measures["consistency_2"].name == "difference of 2 steps from 6 steps (6 seeds)"
    inverted = measure_inversion(conditional, data, options)
    assert set(inverted.measures) == {"inversion_2", "inversion_3"}
    assert inverted.protocol == {"count": 6, "data": inverted.protocol["data"]}
    assert inverted.protocol["data"]["images"] == 120
    assert {m.better for found in (measured, inverted) for m in found.measures.values()} == {"lower"}


def test_determinism_is_seen_by_drawing_and_not_by_the_name_of_the_scheduler(pipeline):
    """A made-up sampler is deterministic until it adds noise, and so is a DDIM."""
    vectors = VectorPipeline(Puller(), PullScheduler())
    for sampled, quiet, noisy in ((vectors, {}, {"churn": 0.1}), (pipeline, {}, {"eta": 0.5})):
        measure_consistency.check(sampled, None, ModelMeasureOptions(steps=(3,), sampling=quiet))
        with pytest.raises(ValueError, match=f"{type(sampled.scheduler).__name__} draws noise in its steps"):
            measure_consistency.check(sampled, None, ModelMeasureOptions(steps=(3,), sampling=noisy))
    ancestral = tiny_pipeline()
    ancestral.scheduler = CosineDDPMScheduler()
    with pytest.raises(ValueError, match="CosineDDPMScheduler draws noise in its steps"):
        measure_consistency.check(ancestral, None, ModelMeasureOptions(steps=(3,)))


def test_vectors_of_one_noise_are_compared_as_they_are():
    """Each of n steps goes the same share of the way, so the difference has a closed form."""
    vectors = VectorPipeline(Puller(), PullScheduler(pull=0.5))
    found = measure_consistency(vectors, None, ModelMeasureOptions(count=50, steps=(1,))).measures
    reached = {n: (1 - 0.5 * (1 - 0.5 ** (1 / n))) ** n for n in (1, 2)}
    noise = torch.cat([torch.randn(1, 7, generator=torch.Generator().manual_seed(i)) for i in range(50)])
    expected = abs(reached[1] - reached[2]) * noise.square().mean().sqrt()
    assert found["consistency_1"].value == pytest.approx(float(expected), rel=1e-5)


def test_what_cannot_be_compared_or_inverted_is_refused_in_a_sentence(pipeline, image_folder):
    data = load_images(train_data_dir=str(image_folder), label_column="none")
    with pytest.raises(ValueError, match="at least 2 step counts on at least 2 seeds"):
        consistency(pipeline, range(4), None, [2])
    with pytest.raises(ValueError, match="samples of at least 2 seeds, not 1"):
        measure_consistency.check(pipeline, data, ModelMeasureOptions(count=1))
    with pytest.raises(ValueError, match="consistency over 1200 steps asks for more than the 1000 timesteps"):
        measure_consistency.check(pipeline, data, ModelMeasureOptions(steps=(600,)))
    with pytest.raises(ValueError, match="inversion over 2000 steps asks for more than the 1000 timesteps"):
        measure_inversion.check(pipeline, data, ModelMeasureOptions(steps=(10, 2000)))
    labelled = tiny_pipeline(classes=2, null_class=False)
    with pytest.raises(ValueError, match="the model needs classes, but .* has no labels"):
        measure_inversion.check(labelled, data, ModelMeasureOptions())
    flow = tiny_pipeline()
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="betas of a Gaussian process, and FlowMatchEulerDiscreteScheduler has none"):
        measure_inversion.check(flow, data, ModelMeasureOptions())

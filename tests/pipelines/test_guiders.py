"""Guiders of diffusers in the class-conditional pipeline, and classifier guidance as one."""

import textwrap

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)

from hf_diffusion import (
    ClassifierFreeGuidancePipeline,
    ClassifierGuidance,
    ClassifierGuidancePipeline,
    CosineDDPMScheduler,
    DDIMEtaScheduler,
)
from tests.pipelines.test_classifier_guidance import Mixture, MixtureClassifier, assert_moments
from tests.pipelines.tiny import make_classifier, sample
from tests.pipelines.tiny import make_classifier_free as make_pipe


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_stock_classifier_free_guider_gives_the_images_of_guidance_scale(learned_variance):
    scheduler = CosineDDPMScheduler(variance_type="learned_range" if learned_variance else "fixed_small")
    pipe = make_pipe(scheduler, learned_variance=learned_variance)
    by_guider = sample(pipe, [1, 2], guider=ClassifierFreeGuidance(guidance_scale=3.0))
    torch.testing.assert_close(by_guider, sample(pipe, [1, 2], guidance_scale=3.0), rtol=1e-4, atol=1e-5)
    halfway = sample(pipe, [1, 2], guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.4))
    within = sample(pipe, [1, 2], guidance_scale=3.0, guidance_interval=(0.0, 0.5))  # t = 666, 333, 0 of 1000
    torch.testing.assert_close(halfway, within, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "guider",
    [
        AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0, adaptive_projected_guidance_momentum=-0.5),
        ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
        TangentialClassifierFreeGuidance(guidance_scale=3.0),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_other_guiders_change_the_images_in_their_own_way(guider):
    pipe = make_pipe(DDIMEtaScheduler())
    images = sample(pipe, [1, 2], guider=guider)
    assert images.isfinite().all()
    assert not torch.allclose(images, sample(pipe, [1, 2]), atol=1e-3)
    assert not torch.allclose(images, sample(pipe, [1, 2], guidance_scale=3.0), atol=1e-3)


class ClassMixture(Mixture):
    """The known mixture as a network that ignores the labels and predicts what is asked for."""

    @register_to_config
    def __init__(
        self,
        alpha_bar: list,
        prediction_type: str = "epsilon",
        sample_size: tuple = (1, 2),
        in_channels: int = 1,
        num_class_embeds: int = 2,
    ):
        super().__init__(alpha_bar)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        t = torch.as_tensor(timestep).long()
        noise, alpha_bar = super().forward(sample, t)[0], self.levels[t]
        x_0 = (sample - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
        return ({"epsilon": noise, "sample": x_0, "v_prediction": velocity}[self.config.prediction_type],)


class ClassMixtureClassifier(MixtureClassifier):
    def forward(self, sample, timestep, return_dict=True):
        return super().forward(sample, torch.as_tensor(timestep).long())


def known_pipe(prediction_type: str = "epsilon") -> tuple[ClassifierFreeGuidancePipeline, ClassMixtureClassifier]:
    scheduler = DDIMEtaScheduler(clip_sample=False, prediction_type=prediction_type)
    alpha_bar = scheduler.alpha_bar.tolist()
    pipe = ClassifierFreeGuidancePipeline(ClassMixture(alpha_bar, prediction_type), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, ClassMixtureClassifier(alpha_bar)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_classifier_guidance_as_a_guider_is_the_pipeline_for_ddim(prediction_type):
    pipe, classifier = known_pipe(prediction_type)
    guider = ClassifierGuidance(guidance_scale=2.0, classifier=classifier, scheduler=pipe.scheduler)
    images = sample(pipe, [0, 1], num_inference_steps=20, guider=guider)
    guided = ClassifierGuidancePipeline(pipe.unet, classifier, pipe.scheduler)
    guided.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        images, sample(guided, [0, 1], num_inference_steps=20, guidance_scale=2.0), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(images, sample(pipe, [0, 1], num_inference_steps=20), atol=1e-2)


@pytest.mark.parametrize("other", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_a_guider_brings_classifier_guidance_to_stock_schedulers(other):
    pipe, classifier = known_pipe()
    pipe.scheduler = other.from_config(pipe.scheduler.config)
    guider = ClassifierGuidance(guidance_scale=1.0, classifier=classifier, scheduler=pipe.scheduler)
    options = {"num_inference_steps": 100, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    points = pipe(1, num_images_per_label=2000, guider=guider, **options).images.reshape(-1, 2)
    assert_moments(points, Mixture.MEANS[1], Mixture.STD**2 * torch.eye(2, dtype=torch.float64), slack=0.02)


def test_the_configuration_of_a_guider_survives_saving_without_its_networks(tmp_path):
    ClassifierGuidance(guidance_scale=2.5, stop=0.8, classifier=make_classifier()).save_pretrained(tmp_path)
    loaded = ClassifierGuidance.from_pretrained(tmp_path)
    assert loaded.guidance_scale == 2.5 and loaded.config["stop"] == 0.8 and loaded.classifier is None


def test_the_example_of_the_documentation_guides_by_a_multistep_solver():
    names = {"pipe": make_pipe(), "classifier": make_classifier()}
    text = ClassifierGuidance.__doc__.split("the same classes:\n")[1].split("    Guiders are")[0]
    exec(textwrap.dedent(text), names)
    assert len(names["images"]) == 2 and isinstance(names["pipe"].scheduler, DPMSolverMultistepScheduler)
    guider = ClassifierGuidance(2.0, classifier=names["classifier"], scheduler=names["scheduler"])
    guided = sample(names["pipe"], [0, 1], guider=guider)
    assert not torch.allclose(guided, sample(names["pipe"], [0, 1]), atol=1e-3)

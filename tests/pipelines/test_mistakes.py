"""The table of mistakes in calls of pipelines; each is named before a network is asked."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance

from hf_diffusion import (
    ClassifierFreeGuidancePipeline,
    ClassifierGuidance,
    ClassifierGuidancePipeline,
    DDGANPipeline,
    DDIMEtaScheduler,
)
from tests.pipelines.tiny import (
    TINY,
    make_classifier_free,
    make_consistency,
    make_discrete,
    make_edm,
    make_flow,
    make_score,
    public_pipelines,
    quiet,
    seeds,
)


NAN, ZERO_SNR = float("nan"), {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}

# Of every pipeline: (options of the tiny pipeline, arguments of the call, the sentence).
OF_EVERY = {
    "label too large": ({}, {"class_labels": [4]}, "class label 4 is not a class; this model knows 0 to 3"),
    "negative label": ({}, {"class_labels": [-1]}, "class label -1"),
    "fractional label": ({}, {"class_labels": torch.tensor([0.5])}, "class label 0.5"),
    "truth value as a label": ({}, {"class_labels": [True]}, "class label True"),
    "misspelt name": ({}, {"class_labels": ["dgo"]}, "did you mean 'dog'.*cat, dog"),
    "ambiguous name": ({}, {"class_labels": ["crane"]}, r"stands for the classes \[2, 3\]"),
    "no images": ({}, {"class_labels": []}, "at least 1"),
    "batch_size against labels": (
        {},
        {"class_labels": [0, 1], "batch_size": 3},
        "batch_size=3, but the labels make 2",
    ),
    "generators": ({}, {"class_labels": [0, 1], "generator": seeds(0)}, "1 generators were given for 2 images"),
    "a seed as generator": ({}, {"class_labels": [0], "generator": 5}, r"generator=5 is neither .*manual_seed\(seed"),
    "a tuple of generators": ({}, {"class_labels": [0], "generator": tuple(seeds(0))}, "nor a list of them"),
    "a fractional batch": ({}, {"batch_size": 1.5}, "batch_size must be a whole number, not 1.5"),
    "latents": (
        {},
        {"class_labels": [0], "latents": torch.zeros(1, 3, 8, 8)},
        r"\(1, 3, 8, 8\), but this call needs \(1, 1, 8, 8\)",
    ),
    "output_type": ({}, {"class_labels": [0], "output_type": "jpeg"}, "unknown output_type 'jpeg'.*'latent'"),
    "callback inputs": (
        {},
        {"class_labels": [0], "callback_on_step_end_tensor_inputs": ["t"]},
        r"knows \['latents'.*\], not \['t'\]",
    ),
    "micro_batch_size": ({}, {"class_labels": [0], "micro_batch_size": 0}, "micro_batch_size must be .* not 0"),
}
# Of pipelines whose steps the caller chooses.
OF_STEPS = {
    "no steps": ({}, {"class_labels": [0], "num_inference_steps": 0}, "num_inference_steps must be .* not 0"),
    "steps that are no number": ({}, {"class_labels": [0], "num_inference_steps": None}, "must be .* not None"),
    "too many steps": ({}, {"class_labels": [0], "num_inference_steps": 2000}, "between 1 and .*1000"),
    "eta that is no number": (
        {"scheduler": DDIMEtaScheduler()},
        {"class_labels": [0], "eta": NAN},
        "eta must be between 0 and 1, not nan",
    ),
    "eta": ({}, {"class_labels": [0], "eta": 0.5}, "LinearDDPMScheduler has no eta"),
    "interval": (
        {},
        {"class_labels": [0], "guidance_interval": (0.7, 0.2)},
        r"guidance_interval must be .*not \(0.7, 0.2\)",
    ),
    "interval of one": ({}, {"class_labels": [0], "guidance_interval": (0.7,)}, r"guidance_interval must be .*not"),
}
OWN = {
    ClassifierFreeGuidancePipeline: OF_STEPS
    | {
        "name without names": ({"id2label": None}, {"class_labels": ["cat"]}, "it has numbers only"),
        "labels without classes": ({"classes": None}, {"class_labels": [0]}, "a model without classes; leave"),
        "labels missing": ({"null_class": False}, {}, "class_labels are missing; this model needs one of 0 to 3"),
        "guidance without null class": (
            {"null_class": False},
            {"class_labels": [0], "guidance_scale": 2},
            "guidance_scale=2 needs a model .* null class",
        ),
        "guidance without labels": ({}, {"guidance_scale": 2}, "needs class_labels to guide towards"),
        "guidance without classes": ({"classes": None}, {"guidance_scale": 2}, "needs class_labels to guide towards"),
        "no number": ({}, {"class_labels": [0], "guidance_scale": NAN}, "guidance_scale must be .*finite.* not nan"),
        "rescale": ({}, {"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, not 1.5"),
        "timesteps of one's own": ({"scheduler": DDIMScheduler()}, {"timesteps": [5, 1]}, "takes no timesteps"),
        "two scales": (
            {},
            {"class_labels": [0], "guidance_scale": 2.0, "guider": ClassifierFreeGuidance()},
            "set the scale of the ClassifierFreeGuidance",
        ),
        "guider without labels": (
            {},
            {"guider": ClassifierFreeGuidance()},
            "ClassifierFreeGuidance needs class_labels",
        ),
        "guider without null class": (
            {"null_class": False},
            {"class_labels": [0], "guider": ClassifierFreeGuidance()},
            "ClassifierFreeGuidance needs a model .* null class",
        ),
    },
    ClassifierGuidancePipeline: OF_STEPS
    | {
        "class count": ({"classes": 3}, {}, "the classifier is one of 4 classes and the U-Net of 3"),
        "labels without classes": ({"classifier": None}, {"class_labels": [0]}, "a model without classes; leave"),
        "negative scale": ({}, {"class_labels": [0], "guidance_scale": -1.0}, "guidance_scale must be .* not -1.0"),
        "no number": ({}, {"class_labels": [0], "guidance_scale": NAN}, "guidance_scale must be .* not nan"),
        "negative classifier-free scale": (
            {"classes": 4},
            {"class_labels": [0], "classifier_free_guidance_scale": -1.0},
            "classifier_free_guidance_scale must be .* not -1.0",
        ),
        "classifier-free without null class": (
            {"classes": 4, "null_class": False},
            {"class_labels": [0], "classifier_free_guidance_scale": 2.0},
            "needs a U-Net that was trained with a null class",
        ),
        "scheduler": (
            {"scheduler": DPMSolverMultistepScheduler()},
            {"class_labels": [0]},
            "DPMSolverMultistepScheduler takes no gradient.*DDIMEtaScheduler",
        ),
        "scheduler without signal": (
            {"scheduler": DDIMEtaScheduler(**ZERO_SNR, timestep_spacing="trailing")},
            {"class_labels": [0], "guidance_interval": (0.0, 1.0)},
            "timestep 999 has no signal .*leave guidance_interval out",
        ),
        "labels missing": ({}, {}, "needs class_labels to guide towards"),
        "labels missing for the U-Net": (
            {"classes": 4, "null_class": False},
            {"guidance_scale": 0.0},
            "class_labels are missing; this model needs one of 0 to 3",
        ),
        "no classifier": ({"classifier": None}, {}, "needs a classifier or a guidance_fn"),
        "gradient_steps": ({}, {"class_labels": [0], "gradient_steps": 0}, "gradient_steps must be .* not 0"),
        "classifier_micro_batch_size": (
            {},
            {"class_labels": [0], "classifier_micro_batch_size": 0},
            "classifier_micro_batch_size must be .* not 0",
        ),
    },
    DDGANPipeline: {
        "name without names": ({"id2label": None}, {"class_labels": ["cat"]}, "it has numbers only"),
        "labels without classes": ({"classes": None}, {"class_labels": [0]}, "a model without classes; leave"),
        "labels missing": ({}, {}, "class_labels are missing; this model needs one of 0 to 3"),
    },
}


@pytest.mark.parametrize("cls", public_pipelines(), ids=lambda cls: cls.__name__)
def test_a_mistake_is_named_with_what_is_allowed_before_a_network_is_asked(cls):
    def was_asked(*_):
        pytest.fail("a network was asked")

    def make(**options):
        pipe = TINY[cls].make(**options)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.register_forward_pre_hook(was_asked)
        return pipe

    plain = make()
    for name, (options, call, message) in (OF_EVERY | OWN.get(cls, {})).items():
        try:
            (make(**options) if options else plain)(**call)
        except ValueError as error:
            assert re.search(message, str(error)), f"{name}: {error}"
        else:
            pytest.fail(f"{name} was accepted")


def test_a_callback_that_returns_no_dict_is_named():
    pipe = TINY[DDGANPipeline].make()
    with pytest.raises(ValueError, match="callback_on_step_end returned None; return a dict"):
        pipe([0], callback_on_step_end=lambda *_: None)


def test_a_guider_without_its_networks_says_so():
    pipe = TINY[ClassifierFreeGuidancePipeline].make()
    with pytest.raises(ValueError, match="has no classifier or no scheduler"):
        pipe([0], guider=ClassifierGuidance())
    with pytest.raises(ValueError, match="guidance_scale must be .* not -1"):
        ClassifierGuidance(guidance_scale=-1)


GUIDED = [make_classifier_free, make_edm, make_flow, make_consistency, make_discrete, make_score]


@pytest.mark.parametrize("make", GUIDED, ids=lambda make: make.__name__)
def test_every_family_refuses_a_scale_that_is_no_number_and_a_tensor_of_another_shape(make):
    pipe = quiet(make())
    for scale in (float("nan"), float("inf"), "big", None):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number, not "):
            pipe(class_labels=[0], num_inference_steps=3, guidance_scale=scale)
    if make is not make_score:
        with pytest.raises(ValueError, match="num_inference_steps must be a whole number of at least 1, not True"):
            pipe(class_labels=[0], num_inference_steps=True)
    for latents, given in ((torch.zeros(1, 2), r"\(1, 2\)"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"returned latents as {given}; its shape must stay \\(2, 1, 8, 8\\)"):
            pipe(
                class_labels=[0, 1],
                num_inference_steps=3,
                callback_on_step_end=lambda *_, latents=latents: {"latents": latents},
            )

"""TextToImagePipeline: texts, guidance between them, thresholds, mistakes."""

import logging

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from hf_diffusion import DDIMEtaScheduler, LinearDDPMScheduler, NoisyCLIP, TextToImagePipeline
from tests.pipelines.tiny import Recorder, make_text_to_image, seeds, with_random_weights


def draw(pipe, prompt=("a cat", "a dog"), **options):
    call = {"num_inference_steps": 3, "output_type": "latent", "generator": seeds(*range(len(prompt)))}
    return pipe(list(prompt), **{**call, **options}).images


def plain_process() -> DDIMEtaScheduler:
    """One step from noise, and the sample is what the network says."""
    return DDIMEtaScheduler(clip_sample=False, prediction_type="sample", timestep_spacing="trailing")


def test_a_class_is_its_caption_by_the_template():
    pipe = make_text_to_image()
    by_class = pipe(class_labels=["cat", "dog"], num_inference_steps=3, generator=seeds(0, 1), output_type="latent")
    assert torch.equal(by_class.images, draw(pipe)) and pipe.example_prompts[1] == "a dog"


def test_one_step_is_linear_in_the_guidance_scale():
    """negative + w * (cond - negative): the sample of scale 3 follows from those of 0 and 1."""
    pipe = make_text_to_image(plain_process())
    zero, one, three = (draw(pipe, num_inference_steps=1, guidance_scale=scale) for scale in (0.0, 1.0, 3.0))
    torch.testing.assert_close(three, zero + 3 * (one - zero), rtol=1e-4, atol=1e-4)
    assert (one - zero).abs().max() > 1e-3
    # at 0 it is the negative text alone
    away = draw(pipe, num_inference_steps=1, guidance_scale=0.0, negative_prompt=["a dog", "a crane"])
    torch.testing.assert_close(away, draw(pipe, ["a dog", "a crane"], num_inference_steps=1, guidance_scale=1.0))


def test_a_model_that_has_not_learned_the_empty_text_is_guided_by_a_negative_text_alone():
    pipe = make_text_to_image()
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=2.0)) and pipe.example_call()["guidance_scale"] == 2
    pipe.register_to_config(empty_text=False)
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=1.0)) and pipe.example_call()["guidance_scale"] == 1
    for negative in (None, ["a dog", ""]):
        with pytest.raises(
            ValueError, match="guidance_scale=2.0 leads away from the empty text, which this model has"
        ):
            draw(pipe, guidance_scale=2.0, negative_prompt=negative)
    assert not torch.equal(draw(pipe, guidance_scale=2.0, negative_prompt="a crane"), draw(pipe))


def test_only_guidance_costs_a_second_call_and_equal_texts_are_read_once():
    pipe = make_text_to_image()
    unet, encoder = Recorder(pipe.unet), []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: encoder.append(1))
    draw(pipe, ["a cat"] * 3, guidance_scale=1.0, micro_batch_size=9)
    assert unet.rows == [3, 3, 3] and len(encoder) == 2
    unet.calls.clear()
    draw(pipe, ["a cat"] * 3, guidance_interval=(0.3, 1.0), micro_batch_size=9)
    assert unet.rows == [6, 6, 3]
    unet.calls.clear()
    # led away from itself, an image goes nowhere
    draw(pipe, ["a cat"] * 3, negative_prompt="a cat", micro_batch_size=9)
    assert unet.rows == [3, 3, 3]


def test_guidance_is_brought_back_to_the_deviation_of_the_conditional_output():
    pipe = make_text_to_image(plain_process())
    wide, narrow = (draw(pipe, guidance_scale=8.0, guidance_rescale=phi).std() for phi in (0.0, 1.0))
    assert narrow < wide


def test_a_dynamic_threshold_clips_at_a_percentile_and_divides_by_it():
    pipe = make_text_to_image(plain_process())
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.6)
    # in one step to the end the sample is the predicted x_0
    free = draw(pipe, num_inference_steps=1, guidance_scale=5.0)
    bound = free.abs().flatten(1).quantile(0.9, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    assert bound.max() > 1
    found = draw(pipe, num_inference_steps=1, guidance_scale=5.0, dynamic_threshold=0.9)
    torch.testing.assert_close(found, free.clamp(-bound, bound) / bound, rtol=1e-4, atol=1e-5)
    assert not pipe.scheduler.config.thresholding


@pytest.mark.parametrize("solver", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_stock_solvers_draw_from_a_network_with_a_learned_variance(solver):
    pipe = make_text_to_image(LinearDDPMScheduler(variance_type="learned_range"), learned_variance=True)
    ancestral = draw(pipe)
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    assert draw(pipe).shape == ancestral.shape == (2, 1, 8, 8) and not torch.equal(draw(pipe), ancestral)


def test_flow_matching_is_drawn_by_the_stock_scheduler():
    pipe = make_text_to_image(FlowMatchEulerDiscreteScheduler())
    unguided, guided = (draw(pipe, guidance_scale=scale) for scale in (1.0, 3.0))
    assert unguided.isfinite().all() and not torch.equal(unguided, guided)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no dynamic thresholding; leave"):
        draw(pipe, dynamic_threshold=0.99)


def test_what_is_cut_from_a_prompt_is_told(caplog):
    pipe = make_text_to_image()
    with caplog.at_level(logging.WARNING):
        draw(pipe, ["a cat and another cat and a dog"])
    assert "the prompt 'a cat and another cat and a dog' has" in caplog.text and "after 8 are cut" in caplog.text


# --- guidance by a CLIP ---


def make_clip(**options) -> NoisyCLIP:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "sample_size": 8, "patch_size": 4, "width": 8, "num_layers": 1, "num_heads": 1}
    sizes |= {"embed_dim": 4, "vocab_size": 300, "text_length": 8, "text_width": 8, "text_layers": 1, "text_heads": 1}
    return with_random_weights(NoisyCLIP(**{**sizes, **options}), std=0.3)


def clipped(scheduler=None, **options) -> TextToImagePipeline:
    pipe = make_text_to_image(scheduler)
    pipe.register_modules(clip=make_clip(**options), clip_tokenizer=pipe.tokenizer)
    return pipe


def test_an_ancestral_step_moves_by_the_variance_times_the_gradient_of_the_clip():
    """Algorithm 1 of arXiv:2105.05233, with the clip's product in the place of the classifier."""
    scheduler = LinearDDPMScheduler(clip_sample=False)
    pipe, moved = clipped(scheduler), []

    def keep(pipe, i, t, tensors):
        moved.append(tensors["latents"])
        pipe._interrupt = True
        return {}

    start = torch.randn(1, 1, 8, 8, generator=seeds(1)[0])
    options = {"latents": start, "guidance_scale": 1.0, "callback_on_step_end": keep}
    for scale in (0.0, 3.0):
        draw(pipe, ["a cat"], clip_guidance_scale=scale, **options)
    scheduler.set_timesteps(3)
    t = scheduler.timesteps[0]
    gradient = pipe.clip_gradient(start, t, pipe.clip_texts(["a cat"]), None)
    variance = scheduler._fixed_variance(0)
    torch.testing.assert_close(moved[1] - moved[0], 3.0 * variance * gradient, rtol=1e-3, atol=1e-6)
    assert gradient.abs().max() > 1e-4


def test_the_gradient_of_the_clip_is_that_of_its_product():
    pipe = clipped()
    x, t, texts = torch.randn(2, 1, 8, 8), torch.tensor(400), pipe.clip_texts(["a cat", "a dog"])
    gradient = pipe.clip_gradient(x, t, texts, 1)

    def fit(x):
        return float(
            (pipe.clip.double().scale.detach() * pipe.clip.image_embeddings(x, t) * texts.double()).sum().detach()
        )

    step = torch.zeros_like(x).double()
    step[1, 0, 3, 5] = 1e-4
    measured = (fit(x.double() + step) - fit(x.double() - step)) / 2e-4
    assert measured == pytest.approx(float(gradient[1, 0, 3, 5]), rel=1e-3)


def test_a_pipeline_with_its_clip_is_saved_and_loaded(tmp_path):
    pipe = clipped()
    images = draw(pipe, clip_guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, clip_guidance_scale=2.0), images) and not torch.equal(draw(again), images)


def test_ddim_is_not_guided_where_the_gradient_would_be_multiplied_by_hundreds():
    cosine = DDIMEtaScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipe = clipped(cosine)
    pipe.scheduler.set_timesteps(10)
    guided = pipe.clip_guided_timesteps(None)
    assert guided[0] is False and all(guided[2:])


@pytest.mark.parametrize(
    "pipe, options, sentence",
    [
        (make_text_to_image, {}, "needs a clip and a clip_tokenizer, which this pipeline lacks"),
        (clipped, {"clip_guidance_scale": -1.0}, "clip_guidance_scale must be a number of at least 0, not -1.0"),
        (clipped, {"prompt": ["a cat", ""]}, "needs a prompt for each image; use 0 without"),
        (lambda: clipped(in_channels=3), {}, "the clip was trained with channels 3 and this model with 1"),
        (lambda: clipped(noise_schedule={"beta_schedule": "sigmoid"}), {}, "was trained with beta_schedule sigmoid"),
        (lambda: clipped(FlowMatchEulerDiscreteScheduler()), {}, "takes no gradient, so a CLIP cannot guide it; use"),
    ],
)
def test_a_clip_that_cannot_guide_is_met_by_a_sentence(pipe, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipe()(**{"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "clip_guidance_scale": 1.0, **options})


# --- mistakes ---


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"class_labels": [0, 1]}, "both say what to draw; give one"),
        ({"prompt": [3]}, "prompt must be a text or a list of texts, not \\[3\\]"),
        ({"prompt": []}, "prompt must be a text or a list of texts"),
        ({"batch_size": 3}, "batch_size=3, but the prompts make 2 images; leave it out"),
        ({"negative_prompt": ["a", "b", "c"]}, "does not go with 2 images; give one text, or one for each"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"dynamic_threshold": 1.5}, "dynamic_threshold must lie between 0 and 1, such as 0.995, not 1.5"),
        ({"guidance_rescale": 2.0}, "guidance_rescale must be between 0 and 1"),
    ],
)
def test_mistakes_are_met_by_a_sentence(options, sentence):
    pipe = make_text_to_image()
    with pytest.raises(ValueError, match=sentence):
        pipe(**{"prompt": ["a cat", "a dog"], "num_inference_steps": 2, **options})

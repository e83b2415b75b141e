"""Sampling with ClassifierFreeGuidancePipeline: guidance, labels, seeds, micro-batches, callbacks, errors."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline, rescale_guided
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler, LinearDDPMScheduler


NAMES = {0: "cat", 1: "dog", 2: "crane", 3: "crane"}


def make_unet(classes: int | None = 4, null_class: bool = True, learned_variance: bool = False, **options):
    torch.manual_seed(0)
    unet = ADMUNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 2 if learned_variance else 1,
            "model_channels": 8,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (2,),
            "num_heads": 2,
            "norm_num_groups": 4,
            "num_class_embeds": classes,
            "null_class": null_class and classes is not None,
            **options,
        }
    )
    with torch.no_grad():  # the output layers start at zero, which would hide labels and timesteps
        for parameter in unet.parameters():
            parameter.normal_(std=0.15)
        if classes is not None:
            unet.class_embedding.weight.normal_(std=2.0)
    return unet.eval()


def make_pipe(scheduler=None, id2label=NAMES, **options) -> ClassifierFreeGuidancePipeline:
    unet = make_unet(**options)
    if unet.config.num_class_embeds is None:
        id2label = None
    pipe = ClassifierFreeGuidancePipeline(unet, scheduler or LinearDDPMScheduler(), id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def sample(pipe, labels, **options) -> torch.Tensor:
    """x_0 as the scheduler leaves it; 3 steps, one seed for each image."""
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    if labels is not None:
        options.setdefault("generator", seeds(*range(len(labels))))
    return pipe(labels, **options).images


class Recorder:
    """Stands before a U-Net and keeps what it was called with."""

    def __init__(self, pipe):
        self.calls = []
        pipe.unet.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        self.calls.append((args[0].shape[0], args[0].dtype, kwargs.get("class_labels")))


# --- guidance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned_variance", [False, True])
def test_guided_images_equal_a_loop_written_by_hand_bit_for_bit(learned_variance):
    scheduler = CosineDDPMScheduler(variance_type="learned_range" if learned_variance else "fixed_small")
    pipe = make_pipe(scheduler, learned_variance=learned_variance)
    images = sample(pipe, [1, 2], guidance_scale=3.0)

    generators = seeds(0, 1)
    x_t = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators])
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipe.unet(torch.cat([x_t, x_t]), t, class_labels=torch.tensor([4, 4, 1, 2])).sample
        uncond, cond = output[:2, :1], output[2:, :1]
        guided = uncond + 3.0 * (cond - uncond)
        if learned_variance:
            guided = torch.cat([guided, output[2:, 1:]], dim=1)  # the variance is the conditional one
        noise = (
            torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators]) if t > 0 else torch.zeros(2, 1, 8, 8)
        )
        x_t = scheduler.step(guided, t, x_t, variance_noise=noise).prev_sample
    assert torch.equal(images, x_t)


def test_a_guidance_scale_of_1_is_plain_conditional_sampling_with_single_forwards():
    pipe = make_pipe()
    recorder = Recorder(pipe)
    images = sample(pipe, [0, 3], guidance_scale=1.0)
    assert [(size, labels.tolist()) for size, _, labels in recorder.calls] == [(2, [0, 3])] * 3
    plain = make_pipe(null_class=False)
    plain.unet.load_state_dict(
        {k: v[:4] if k == "class_embedding.weight" else v for k, v in pipe.unet.state_dict().items()}
    )
    assert torch.equal(images, sample(plain, [0, 3]))


def test_guidance_moves_along_the_difference_of_the_two_predictions():
    # one DDIM step is affine in the model output, hence affine in the scale
    pipe = make_pipe(DDIMEtaScheduler(clip_sample=False))
    one, two, four = (sample(pipe, [1], timesteps=[600], guidance_scale=w) for w in (1.0, 2.0, 4.0))
    assert (two - one).abs().max() > 0.05
    torch.testing.assert_close(four - one, 3 * (two - one), rtol=1e-3, atol=1e-3)


def test_guidance_acts_only_at_noise_levels_within_the_interval():
    pipe = make_pipe()
    recorder = Recorder(pipe)
    sample(pipe, [1, 2], num_inference_steps=5, guidance_scale=2.0, guidance_interval=(0.2, 0.6))
    # t = 800, 600, 400, 200, 0 of 1000
    assert [size for size, _, _ in recorder.calls] == [2, 4, 4, 4, 2]
    outside = sample(pipe, [1, 2], guidance_scale=9.0, guidance_interval=(0.95, 1.0))
    assert torch.equal(outside, sample(pipe, [1, 2]))


def test_full_rescaling_gives_the_guided_output_the_deviation_of_the_conditional_one():
    cond, guided = torch.randn(3, 2, 8, 8), 4 * torch.randn(3, 2, 8, 8) + 1
    std = cond.std((1, 2, 3))
    torch.testing.assert_close(rescale_guided(guided, cond, 1.0).std((1, 2, 3)), std)
    assert torch.equal(rescale_guided(guided, cond, 0.0), guided)
    pipe = make_pipe()
    kept, rescaled = (sample(pipe, [1], guidance_scale=4.0, guidance_rescale=phi) for phi in (0.0, 0.7))
    assert not torch.allclose(kept, rescaled)


# --- labels -------------------------------------------------------------------------------------------------------------


def test_names_numbers_and_tensors_name_the_same_classes():
    pipe = make_pipe()
    by_number = sample(pipe, [0, 1])
    for labels in (["cat", "dog"], [0, "dog"], torch.tensor([0, 1]), np.array([0, 1])):
        assert torch.equal(sample(pipe, labels), by_number)
    assert torch.equal(sample(pipe, [1, 1]), pipe("dog", num_images_per_label=2, num_inference_steps=3,
                                                  generator=seeds(0, 1), output_type="latent").images)  # fmt: skip


def test_different_classes_give_different_images():
    pipe = make_pipe()
    assert not torch.allclose(sample(pipe, [0]), sample(pipe, [1]))


def test_without_labels_a_model_with_a_null_class_samples_unconditionally():
    pipe = make_pipe()
    recorder = Recorder(pipe)
    pipe(batch_size=2, num_inference_steps=2)
    assert [labels.tolist() for _, _, labels in recorder.calls] == [[4, 4]] * 2


def test_a_model_without_classes_is_called_without_labels():
    pipe = make_pipe(classes=None)
    recorder = Recorder(pipe)
    images = pipe(batch_size=3, num_inference_steps=2).images
    assert len(images) == 3 and all(labels is None for _, _, labels in recorder.calls)
    assert pipe.num_classes is None and pipe.id2label is None


def test_class_names_survive_saving_with_numbers_as_keys(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    loaded = ClassifierFreeGuidancePipeline.from_pretrained(tmp_path)
    assert loaded.id2label == NAMES
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, ["cat", "dog"]), sample(pipe, [0, 1]))


# --- seeds and batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [LinearDDPMScheduler(), DDPMScheduler(), DDIMEtaScheduler(eta=1.0)])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(scheduler):
    pipe = make_pipe(scheduler)
    batch = sample(pipe, [0, 1, 2], generator=seeds(5, 6, 7), guidance_scale=2.0)
    alone = torch.cat([sample(pipe, [c], generator=seeds(5 + c), guidance_scale=2.0) for c in range(3)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)  # kernels may sum in another order


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_micro_batches_do_not_change_the_images(guidance_scale):
    pipe = make_pipe()
    recorder = Recorder(pipe)
    whole = sample(pipe, [0, 1, 2, 3, 0], guidance_scale=guidance_scale, micro_batch_size=100)
    recorder.calls.clear()
    parts = sample(pipe, [0, 1, 2, 3, 0], guidance_scale=guidance_scale, micro_batch_size=2)
    assert max(size for size, _, _ in recorder.calls) == 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_chosen_so_that_a_feature_map_stays_small_on_the_cpu():
    small, large = make_pipe(), make_pipe(sample_size=128, model_channels=64)
    assert small.default_micro_batch_size() > 1000
    assert 1 <= large.default_micro_batch_size() < 10


def test_given_latents_replace_the_first_noise():
    pipe = make_pipe(DDIMEtaScheduler())
    latents = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in seeds(0, 1)])
    assert torch.equal(sample(pipe, [0, 1]), sample(pipe, [0, 1], latents=latents))


# --- schedulers, dtypes, outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler,
     HeunDiscreteScheduler, PNDMScheduler, DDIMEtaScheduler],
)  # fmt: skip
@pytest.mark.parametrize("learned_variance", [False, True])
def test_schedulers_can_be_exchanged(other, learned_variance):
    pipe = make_pipe(
        CosineDDPMScheduler(variance_type="learned_range" if learned_variance else "fixed_small"),
        learned_variance=learned_variance,
    )
    pipe.scheduler = other.from_config(pipe.scheduler.config)
    images = sample(pipe, [0, 1], num_inference_steps=4, guidance_scale=1.5)
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_few_euler_steps_end_where_many_do():
    # exact for a network that knows the answer: the noise of a data set that holds only zeros is x_t / sigma
    pipe = make_pipe(classes=None)
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler

    class KnowsZero(UNet2DModel):
        def forward(self, sample, timestep, return_dict=False):
            alpha_bar = scheduler.alphas_cumprod[timestep.long()]
            return (sample / (1 - alpha_bar).sqrt(),)

    pipe.unet = KnowsZero(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=1,
                          down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    images = pipe(num_inference_steps=5, output_type="latent", generator=seeds(0)).images
    assert images.abs().max() < 0.02


def test_eta_reaches_the_scheduler():
    pipe = make_pipe(DDIMEtaScheduler(eta=0.0))
    still, noisy = sample(pipe, [0], eta=0.0), sample(pipe, [0], eta=1.0)
    assert torch.equal(still, sample(pipe, [0])) and not torch.allclose(still, noisy)


def test_timesteps_of_ones_own_are_walked():
    pipe, walked = make_pipe(), []

    def note(pipe, i, t, tensors):
        walked.append(int(t))
        return tensors

    sample(pipe, [0], timesteps=[900, 100, 5], callback_on_step_end=note)
    assert walked == [900, 100, 5] and pipe.num_timesteps == 3
    sample(pipe, [0], timesteps="1,1", callback_on_step_end=note)
    assert walked[3:] == [500, 0]


def test_latents_stay_in_float32_for_a_model_in_half_precision():
    pipe = make_pipe().to(dtype=torch.bfloat16)
    recorder = Recorder(pipe)
    images = sample(pipe, [0], guidance_scale=2.0)
    assert images.dtype == torch.float32 and {dtype for _, dtype, _ in recorder.calls} == {torch.bfloat16}


def test_output_types_hold_the_same_image():
    pipe = make_pipe()
    latent, pt, array, pil = (sample(pipe, [0, 1], output_type=kind) for kind in ("latent", "pt", "np", "pil"))
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert array.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0, :, :, 0] * 255).round().astype(np.uint8))
    as_tuple = pipe([0, 1], num_inference_steps=3, generator=seeds(0, 1), output_type="pt", return_dict=False)
    assert torch.equal(as_tuple[0], pt)


def test_images_need_not_be_square():
    pipe = make_pipe(sample_size=(4, 8))
    assert sample(pipe, [0]).shape == (1, 1, 4, 8) and pipe([0], num_inference_steps=1).images[0].size == (8, 4)


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_stock_pipelines_sample_an_unconditional_model_of_this_package(pipeline):
    # stock DDIM keeps the noise that belongs to the unclipped x_0, so the two agree where nothing is clipped
    scheduler = LinearDDPMScheduler() if pipeline is DDPMPipeline else DDIMEtaScheduler(clip_sample=False)
    pipe = pipeline(make_unet(classes=None), scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, generator=seeds(0, 1), output_type="np").images
    ours = make_pipe(scheduler, classes=None)(
        batch_size=2, num_inference_steps=3, generator=seeds(0, 1), output_type="np"
    ).images
    np.testing.assert_allclose(images, ours, atol=1e-6)


# --- callbacks ----------------------------------------------------------------------------------------------------------


def test_a_callback_can_change_the_latents():
    def erase(pipe, i, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else tensors

    assert sample(make_pipe(), [0, 1], callback_on_step_end=erase).abs().max() == 0


def test_a_callback_can_stop_the_run():
    pipe, steps = make_pipe(), []

    def stop(pipe, i, t, tensors):
        steps.append(i)
        pipe._interrupt = i == 1
        return tensors

    sample(pipe, [0], num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert len(sample(pipe, [0])) == 1 and not pipe.interrupt


# --- errors -------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "label too large": ({}, {"class_labels": [4]}, "class label 4 is not a class; this model knows 0 to 3"),
    "negative label": ({}, {"class_labels": [-1]}, "class label -1"),
    "fractional label": ({}, {"class_labels": torch.tensor([0.5])}, "class label 0.5"),
    "misspelt name": ({}, {"class_labels": ["dgo"]}, "did you mean 'dog'.*cat, dog"),
    "ambiguous name": ({}, {"class_labels": ["crane"]}, r"stands for the classes \[2, 3\]"),
    "name without names": ({"id2label": None}, {"class_labels": ["cat"]}, "it has numbers only"),
    "labels without classes": ({"classes": None}, {"class_labels": [0]}, "without classes"),
    "labels missing": ({"null_class": False}, {}, "class_labels are missing"),
    "guidance without null class": ({"null_class": False}, {"class_labels": [0], "guidance_scale": 2}, "null class"),
    "guidance without labels": ({}, {"guidance_scale": 2}, "needs class_labels to guide towards"),
    "guidance without classes": ({"classes": None}, {"guidance_scale": 2}, "needs class_labels to guide towards"),
    "interval": ({}, {"guidance_interval": (0.7, 0.2)}, r"guidance_interval must be .*not \(0.7, 0.2\)"),
    "rescale": ({}, {"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, not 1.5"),
    "no images": ({}, {"class_labels": []}, "at least 1"),
    "batch_size against labels": (
        {},
        {"class_labels": [0, 1], "batch_size": 3},
        "batch_size=3, but the labels make 2",
    ),
    "no steps": ({}, {"num_inference_steps": 0}, "num_inference_steps must be"),
    "too many steps": ({}, {"num_inference_steps": 2000}, "num_inference_steps must be between 1 and .*1000"),
    "timesteps of one's own": ({"scheduler": DDIMScheduler()}, {"timesteps": [5, 1]}, "takes no timesteps"),
    "eta": ({}, {"eta": 0.5}, "LinearDDPMScheduler has no eta"),
    "generators": ({}, {"class_labels": [0, 1], "generator": seeds(0)}, "1 generators were given for 2 images"),
    "latents": ({}, {"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\), but this call needs \(1, 1, 8, 8\)"),
    "output_type": ({}, {"output_type": "jpeg"}, "unknown output_type 'jpeg'.*'latent'"),
    "callback inputs": ({}, {"callback_on_step_end_tensor_inputs": ["t"]}, r"knows \['latents'\], not \['t'\]"),
    "micro_batch_size": ({}, {"micro_batch_size": 0}, "micro_batch_size must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_what_is_allowed(mistake):
    options, call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make_pipe(**options)(**call)

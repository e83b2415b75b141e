"""ClassifierFreeGuidancePipeline: guidance, schedulers and steps; see also test_contract.py."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from hf_diffusion import CosineDDPMScheduler, DDIMEtaScheduler, ImprovedPNDMScheduler, LinearDDPMScheduler
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import rescale_guided
from tests.pipelines.tiny import Recorder, make_unet, sample, seeds
from tests.pipelines.tiny import make_classifier_free as make_pipe


# --- guidance ---


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
    recorder = Recorder(pipe.unet)
    images = sample(pipe, [0, 3], guidance_scale=1.0)
    assert recorder.labels == [[0, 3]] * 3
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
    recorder = Recorder(pipe.unet)
    sample(pipe, [1, 2], num_inference_steps=5, guidance_scale=2.0, guidance_interval=(0.2, 0.6))
    # t = 800, 600, 400, 200, 0 of 1000
    assert recorder.rows == [2, 4, 4, 4, 2]
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


# --- labels ---


def test_without_labels_a_model_with_a_null_class_samples_unconditionally():
    pipe = make_pipe()
    recorder = Recorder(pipe.unet)
    pipe(batch_size=2, num_inference_steps=2)
    assert recorder.labels == [[4, 4]] * 2


def test_a_model_without_classes_is_called_without_labels():
    pipe = make_pipe(classes=None)
    recorder = Recorder(pipe.unet)
    assert len(pipe(batch_size=3, num_inference_steps=2).images) == 3 and recorder.labels == [None] * 2
    assert pipe.num_classes is None and pipe.id2label is None and pipe.null_class_id is None


# --- schedulers and steps ---


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMEtaScheduler(eta=1.0)])
def test_schedulers_that_draw_noise_keep_an_image_independent_of_its_batch(scheduler):
    pipe = make_pipe(scheduler)
    batch = sample(pipe, [0, 1, 2], generator=seeds(5, 6, 7), guidance_scale=2.0)
    alone = torch.cat([sample(pipe, [c], generator=seeds(5 + c), guidance_scale=2.0) for c in range(3)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)  # kernels may sum in another order


@pytest.mark.parametrize(
    "other",
    [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler,
     DEISMultistepScheduler, ImprovedPNDMScheduler, DDIMEtaScheduler],
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
    # exact for a network that knows the answer: the noise of a data set that holds only zeros is
    # x_t / sigma
    pipe = make_pipe(classes=None)
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler

    class KnowsZero(UNet2DModel):
        def forward(self, sample, timestep, return_dict=False):
            alpha_bar = scheduler.alphas_cumprod[timestep.long()]
            return (sample / (1 - alpha_bar).sqrt(),)

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    pipe.unet = KnowsZero(8, 1, 1, block_out_channels=(8,), norm_num_groups=1, **blocks)
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


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_stock_pipelines_sample_an_unconditional_model_of_this_package(pipeline):
    # stock DDIM keeps the noise that belongs to the unclipped x_0, so the two agree where nothing
    # is clipped
    scheduler = LinearDDPMScheduler() if pipeline is DDPMPipeline else DDIMEtaScheduler(clip_sample=False)
    pipe = pipeline(make_unet(classes=None), scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, generator=seeds(0, 1), output_type="np").images
    ours = make_pipe(scheduler, classes=None)(
        batch_size=2, num_inference_steps=3, generator=seeds(0, 1), output_type="np"
    ).images
    np.testing.assert_allclose(images, ours, atol=1e-6)

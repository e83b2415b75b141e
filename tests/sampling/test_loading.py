"""Which schedulers may take over which process, and that the process stays what it was."""

from typing import get_args

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from hf_diffusion.config.options import UsageError
from hf_diffusion.models.ncsnpp_ddgan import DDGANGenerator
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.sampling.loading import (
    DTYPES,
    SCHEDULERS,
    check_takes_others,
    guided_by,
    replace_scheduler,
    ways_of_its_own,
)
from hf_diffusion.sampling.options import SamplingOptions, SchedulerName
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.schedulers.scheduling_edm import EDMHeunScheduler
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler, LinearDDPMScheduler
from tests.pipelines.tiny import make_flow


def test_the_options_name_every_scheduler_and_precision():
    assert get_args(SchedulerName) == tuple(SCHEDULERS)
    assert get_args(SamplingOptions.__annotations__["dtype"]) == tuple(DTYPES)


GAUSSIAN = [name for name in SCHEDULERS if not name.startswith("edm")]


@pytest.mark.parametrize("name", GAUSSIAN)
def test_a_compatible_scheduler_takes_over_the_process(name):
    processes = [
        CosineDDPMScheduler(num_train_timesteps=20),
        LinearDDPMScheduler(num_train_timesteps=50, rescale_betas_by_steps=True, prediction_type="v_prediction"),
        DDIMEtaScheduler(beta_schedule="scaled_linear"),
        DDPMScheduler(num_train_timesteps=30, beta_schedule="squaredcos_cap_v2"),
    ]
    for former in processes:
        scheduler = replace_scheduler(former, name, "trailing")
        assert type(scheduler) is SCHEDULERS[name] and scheduler.config.timestep_spacing == "trailing"
        assert scheduler.config.prediction_type == former.config.prediction_type
        torch.testing.assert_close(scheduler.alphas_cumprod, former.alphas_cumprod)


@pytest.mark.parametrize("name", ["edm-heun", "edm-euler", "edm-dpm++"])
def test_a_preconditioned_network_is_sampled_by_schedulers_of_its_own_kind(name):
    former = EDMHeunScheduler(sigma_max=40.0, sigma_data=0.7)
    scheduler = replace_scheduler(former, name)
    assert type(scheduler) is SCHEDULERS[name]
    assert (scheduler.config.sigma_max, scheduler.config.sigma_data) == (40.0, 0.7)
    with pytest.raises(UsageError, match="choose from edm-heun, edm-euler, edm-dpm"):
        replace_scheduler(former, "unipc")


def test_a_family_without_other_schedulers_says_what_it_samples_by():
    pipeline = make_flow()
    with pytest.raises(UsageError, match="leave it out, FlowMatchingPipeline samples by --num_inference_steps, --set "
                       "solver=euler or heun, --guidance_scale, --guidance_interval"):  # fmt: skip
        replace_scheduler(pipeline.scheduler, "unipc", None, ways_of_its_own(pipeline))


@pytest.mark.parametrize("former", [DDGANScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_process_of_another_kind_is_refused_in_a_true_sentence(former):
    for name, cls in SCHEDULERS.items():
        if cls is former:
            continue
        instead = "choose from edm-euler" if former is EDMEulerScheduler else "leave it out"
        with pytest.raises(UsageError) as error:
            replace_scheduler(former(), name)
        assert str(error.value) == (
            f"--scheduler {name}: the process of this pipeline's {former.__name__} is not one that {cls.__name__} can "
            f"sample; {instead}"
        )


def test_a_stock_pipeline_keeps_the_scheduler_that_it_was_written_for():
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    with pytest.raises(UsageError, match="--scheduler unipc: DDIMPipeline asks DDIMScheduler for eta, generator, "):
        check_takes_others(DDIMPipeline(unet, DDIMScheduler()), "unipc")
    with pytest.raises(UsageError, match="DDPMPipeline asks DDPMScheduler for generator, which UniPC"):
        check_takes_others(DDPMPipeline(unet, DDPMScheduler()), "unipc")
    # which takes what ancestral steps take
    check_takes_others(DDPMPipeline(unet, DDPMScheduler()), "ddim")
    check_takes_others(make_flow(), "unipc")


def test_a_spacing_is_for_schedulers_that_know_one():
    assert replace_scheduler(LinearDDPMScheduler(), None, "linspace").config.timestep_spacing == "linspace"
    with pytest.raises(UsageError, match="--timestep_spacing trailing: DDGANScheduler has no spacing; leave it out"):
        replace_scheduler(DDGANScheduler(), None, "trailing")
    with pytest.raises(UsageError, match="--scheduler heun: there is no such scheduler; choose from ddim, ddpm"):
        replace_scheduler(LinearDDPMScheduler(), "heun")


def test_nothing_asked_for_keeps_the_scheduler_itself():
    scheduler = EDMEulerScheduler()
    assert replace_scheduler(scheduler) is scheduler


def test_a_classifier_guides_a_u_net_of_a_gaussian_process_alone():
    generator = DDGANGenerator(sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    pipeline = DDGANPipeline(generator, DDGANScheduler())
    with pytest.raises(UsageError, match="--guide_by: a DDGANPipeline has no U-Net that a classifier could guide"):
        guided_by(pipeline, "nowhere")
    pipeline.unet = generator
    with pytest.raises(UsageError, match="--guide_by: a classifier guides a Gaussian process, not that of DDGANSched"):
        guided_by(pipeline, "nowhere")

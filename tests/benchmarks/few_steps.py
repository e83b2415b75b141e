"""Sampling at 28x28: DDGAN in 4 steps against DDIM in 50 and DDPM in 1000, by equal networks."""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from hf_diffusion.models.ncsnpp_ddgan import DDGANGenerator
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from tests.benchmarks.networks import networks, operations, parameters
from tests.benchmarks.pairs import Comparison


IMAGES, SIZE, STEPS = 64, 28, 4
DDIM_STEPS, DDPM_STEPS, DDPM_TIMED = 50, 1000, 20  # a chain of 1000 steps is timed over 20 of them and scaled
SAME_COST = (0.8, 1.25)  # multiplications of one forward of the generator, relative to the U-Net's


def generator() -> DDGANGenerator:
    torch.manual_seed(0)
    settings = {"channel_mult": (1, 2, 2), "num_res_blocks": 1, "attention_sizes": (14, 7)}
    return DDGANGenerator(sample_size=SIZE, in_channels=1, model_channels=32, **settings).eval()


@torch.no_grad()
def generator_operations(model: DDGANGenerator) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, SIZE, SIZE), 0, torch.zeros(1, model.config.latent_dim))
    return counter.get_total_flops()


def draw(pipeline: DiffusionPipeline, steps: int) -> None:
    rng = torch.Generator().manual_seed(0)
    pipeline(batch_size=IMAGES, num_inference_steps=steps, generator=rng, output_type="np")


def comparisons() -> Iterator[Comparison]:
    unet, _ = networks(size=SIZE, channels=1, blocks=1)
    model = generator()
    cost = generator_operations(model) / operations(unet, SIZE, 1)
    if not SAME_COST[0] < cost < SAME_COST[1]:
        raise AssertionError(f"a forward of the generator costs {cost:.2f} forwards of the U-Net")
    ours = DDGANPipeline(model, DDGANScheduler(STEPS))
    others = (
        (f"DDIM-{DDIM_STEPS}", DDIMPipeline(unet, DDIMScheduler()), DDIM_STEPS, DDIM_STEPS, 0.2),
        (f"DDPM-{DDPM_STEPS}", DDPMPipeline(unet, DDPMScheduler()), DDPM_STEPS, DDPM_TIMED, 0.01),
    )
    for pipeline in (ours, *(other[1] for other in others)):
        pipeline.set_progress_bar_config(disable=True)
    draw(ours, STEPS)
    sizes = f"{parameters(model) / 1e6:.1f} and {parameters(unet) / 1e6:.1f} M, {IMAGES} of {SIZE}x{SIZE}"
    for name, pipeline, steps, timed, target in others:
        draw(pipeline, 1)  # warms up; a whole chain would take minutes
        note = "" if timed == steps else f" ({timed} timed)"
        yield Comparison(
            f"DDGAN-{STEPS} / {name}{note}, {sizes}",
            partial(draw, pipeline, timed),
            {"": (partial(draw, ours, STEPS), target)},
            most_rounds=3,
            warm_up=False,
            stock_scale=steps / timed,
        )

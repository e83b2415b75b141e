"""`step` of the schedulers: the CPU's arithmetic on small batches, where overhead shows."""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler, LinearDDPMScheduler
from tests.benchmarks.pairs import Comparison


SHAPES = ((64, 3, 32, 32), (1, 3, 256, 256))
CLASSES = (
    ("DDIM eta 0", DDIMScheduler, DDIMEtaScheduler, {"eta": 0.0}),
    ("DDPM", DDPMScheduler, LinearDDPMScheduler, {}),
)


def run(scheduler, arguments: dict, x_t: torch.Tensor, output: torch.Tensor) -> None:
    """Ten steps in the middle of a run of 50, all from one x_t.

    Each sample is freed before the next, as in a sampling loop.
    """
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps[20:30]:
        scheduler.step(output, t, x_t, generator=generator, return_dict=False, **arguments)


def comparisons() -> Iterator[Comparison]:
    for shape in SHAPES:
        x_t, output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        for name, stock_class, our_class, arguments in CLASSES:
            stock, ours = stock_class(), our_class()
            for scheduler in (stock, ours):
                scheduler.set_timesteps(50)
            works = [partial(run, scheduler, arguments, x_t, output) for scheduler in (stock, ours)]
            yield Comparison(f"10 steps, {name} {shape}", works[0], {"": (works[1], 0.4)}, calls=5)

"""Sampling 500 images of 28x28 in 50 DDIM steps: pipeline against pipeline, as users call them."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline

from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler
from tests.benchmarks.networks import networks, parameters
from tests.benchmarks.pairs import Comparison


IMAGES, STEPS, SIZE = 500, 50, 28


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated, it is slower than float32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def draw(pipeline: DiffusionPipeline, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(0)
    pipeline(batch_size=IMAGES, num_inference_steps=steps, generator=generator, output_type="np")


def comparisons() -> Iterator[Comparison]:
    stock, ours = networks(size=SIZE, channels=1, blocks=1)
    pipelines = {
        "stock": DDIMPipeline(stock, DDIMScheduler()),
        "float32": ClassifierFreeGuidancePipeline(ours, DDIMEtaScheduler()),
    }
    if has_bfloat16():
        half = copy.deepcopy(ours).to(torch.bfloat16)
        pipelines["bf16"] = ClassifierFreeGuidancePipeline(half, DDIMEtaScheduler())
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        draw(pipeline, steps=1)  # one step warms up; a whole run would take minutes
    works: dict[str, Callable] = {name: partial(draw, pipeline) for name, pipeline in pipelines.items()}
    targets = {"float32": 0.5, "bf16": 1 / 3}
    yield Comparison(
        f"DDIM-{STEPS}, {parameters(ours) / 1e6:.1f} M, {IMAGES} of {SIZE}x{SIZE}",
        works.pop("stock"),
        {name: (work, targets[name]) for name, work in works.items()},
        most_rounds=2,
        warm_up=False,
    )

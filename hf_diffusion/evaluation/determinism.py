"""What deterministic sampling promises: one noise, one sample, and the way back to the noise.

DDIM: Song et al. 2021, arXiv:2010.02502, sections 4.3 and 5.2 to 5.4. Letters: B samples, C
channels, H x W pixels.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.likelihood import mean_and_standard_error
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.model_measures import (
    ModelMeasureOptions,
    check_gaussian,
    checked_by,
    fetch,
    gather_columns,
    shared_batches,
)
from hf_diffusion.evaluation.protocol import data_protocol, sampling_protocol
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.sampling.interpolation import require_deterministic
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler


def check_consistency(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the first noise alone decides the sample, found by drawing."""
    if options.count < 2:
        raise ValueError(f"consistency compares samples of at least 2 seeds, not {options.count}; raise model_images")
    most = pipeline.scheduler.config.get("num_train_timesteps")
    if most is not None and 2 * options.steps[-1] > most:
        raise ValueError(
            f"consistency over {2 * options.steps[-1]} steps asks for more than the {most} timesteps of this model; "
            "give fewer"
        )
    labels = None if options.labels is None else options.labels[:1]
    # The most steps: a single one draws no noise, and some samplers draw it at some noise levels
    # only.
    call = {**options.sampling, "num_inference_steps": options.steps[-1]}
    require_deterministic(pipeline, labels, **call)


@checked_by(check_consistency)
def measure_consistency(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> Evaluation:
    """How much the samples of a noise change with the number of steps.

    Each is compared with that of twice the most steps. Every process computes it, it is small.
    """
    call = {name: value for name, value in options.sampling.items() if name != "num_inference_steps"}
    seeds = range(options.seed, options.seed + options.count)
    labels = options.labels and list(itertools.islice(itertools.cycle(options.labels), options.count))
    finest, measures = 2 * options.steps[-1], {}
    for n, value in consistency(pipeline, seeds, labels, [*options.steps, finest], **call).items():
        text = f"{n} steps" if n else "samples of other noise"
        name = f"difference of {text} from {finest} steps ({options.count} seeds)"
        measures[f"consistency_{n}"] = Measure(name, value, better="lower")
    protocol = {"count": options.count, "seeds": [seeds[0], seeds[-1]]}
    return Evaluation(measures, {**protocol, "sampling": sampling_protocol(pipeline, options.count, call)})


def consistency(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    step_counts: Sequence[int],
    **options,
) -> dict[int, float]:
    """Root mean squared difference of samples of the same noise to those of the most steps.

    Images are compared in [0, 1]. Returns a value for each step count but the largest. The
    comparison of samples of different noise gives the scale: its value is under the key 0.
    """
    counts = sorted(set(step_counts))
    if len(counts) < 2 or len(seeds) < 2:
        raise ValueError(
            f"consistency compares at least 2 step counts on at least 2 seeds, got {counts} and {len(seeds)} seeds"
        )
    samples = {n: _comparable(draw(pipeline, seeds, labels, num_inference_steps=n, **options)) for n in counts}
    finest = samples[counts[-1]]
    distances = {n: float(np.sqrt(np.mean((samples[n] - finest) ** 2))) for n in counts[:-1]}
    return {0: float(np.sqrt(np.mean((np.roll(finest, 1, axis=0) - finest) ** 2))), **distances}


def check_inversion(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the process is Gaussian, with enough timesteps, and has its classes."""
    check_gaussian(pipeline, "inversion", max(options.steps))
    fetch(pipeline, data, [0])


@checked_by(check_inversion)
def measure_inversion(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> Evaluation:
    """The mean squared error a dimension of real samples that were inverted and drawn again."""
    measures = {}
    for steps in sorted(set(options.steps)):
        parts = []
        for start, indices in shared_batches(data, options):
            x_0, labels = fetch(pipeline, data, indices)
            parts.append((start, reconstruction_error(pipeline, x_0, labels, steps)))
        (errors,) = gather_columns(parts)
        name = f"reconstruction error ({len(errors)} samples, {steps} steps)"
        measures[f"inversion_{steps}"] = Measure(name, *mean_and_standard_error(errors), better="lower")
    return Evaluation(measures, {"count": len(errors), "data": data_protocol(data)})


@torch.no_grad()
def invert(pipeline: DiffusionPipeline, x_0: Tensor, class_labels: Tensor | None, num_inference_steps: int) -> Tensor:
    """The noise (B, ...) from which DDIM would lead to x_0 (B, ...), by Euler steps, Eq. 14."""
    scheduler = inversion_scheduler(pipeline, num_inference_steps)
    x = x_0.to(pipeline.device, torch.float32)
    # The clean x_0 stands for x at the first timestep, whose noise is the least.
    for t in scheduler.timesteps.flip(0)[:-1]:
        x = scheduler.inverse_step(predict(pipeline, x, t, class_labels), t, x).prev_sample
    return x


@torch.no_grad()
def reconstruct(
    pipeline: DiffusionPipeline, latents: Tensor, class_labels: Tensor | None, num_inference_steps: int
) -> Tensor:
    """The x_0 (B, ...) of the noise that `invert` found with as many steps.

    It is clamped where the pipeline's own sampling clips it.
    """
    scheduler = inversion_scheduler(pipeline, num_inference_steps)
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(predict(pipeline, x, t, class_labels), t, x, eta=0.0).prev_sample
    config = pipeline.scheduler.config
    bound = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else float("inf")
    return x.clamp(-bound, bound)


def reconstruction_error(
    pipeline: DiffusionPipeline, x_0: Tensor, class_labels: Tensor | None, num_inference_steps: int
) -> Tensor:
    """Squared error (B,), a dimension, of x_0 drawn again, in [0, 1] as in Table 2 of DDIM."""
    noise = invert(pipeline, x_0, class_labels, num_inference_steps)
    again = reconstruct(pipeline, noise, class_labels, num_inference_steps)
    return ((again - x_0.to(again)) / 2).square().flatten(1).mean(1).cpu()


def inversion_scheduler(pipeline: DiffusionPipeline, num_inference_steps: int) -> DDIMEtaScheduler:
    """The pipeline's process without clipping, with timesteps that begin at the clean end.

    Clipping could not be undone.
    """
    changes = {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading", "steps_offset": 0}
    scheduler = DDIMEtaScheduler.from_config(pipeline.scheduler.config, eta=0.0, **changes)
    scheduler.set_timesteps(num_inference_steps, device=pipeline.device)
    return scheduler


def predict(pipeline: DiffusionPipeline, x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The U-Net's output without guidance; no labels means the null class where there is one."""
    labels = class_labels
    if labels is None and getattr(pipeline, "null_class_id", None) is not None:
        labels = torch.full((len(x_t),), pipeline.null_class_id)
    condition = {} if labels is None else {"class_labels": labels.to(x_t.device)}
    return pipeline.unet(x_t.to(pipeline.unet.dtype), t, **condition, return_dict=False)[0].to(x_t.dtype)


def _comparable(samples: np.ndarray) -> np.ndarray:
    """Images uint8 as floats in [0, 1], other samples as they are."""
    return samples / 255.0 if samples.dtype == np.uint8 else samples

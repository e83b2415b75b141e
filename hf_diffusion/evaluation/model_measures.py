"""Measures of a model that need no set of samples: bits per dimension, DDIM's consistency and inversion; over any number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.images import ImageData
from hf_diffusion.evaluation.latent_space import reconstruction_error
from hf_diffusion.evaluation.measures import Measure
from hf_diffusion.likelihood import bits_per_dim, mean_and_standard_error
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler


@dataclass(frozen=True)
class BoundMeasure:
    """The variational bound of N images: total and prior with standard errors, and the mean term of each timestep."""

    total: Measure
    prior: Measure
    timesteps: list[int]  # descending
    terms: list[float]  # bits a dimension; the last is the decoder's
    term_errors: list[float]
    count: int


def choose_real_images(data: ImageData, count: int) -> list[int]:
    """Indices of `count` evenly spaced images, which of a set sorted by class show every class; all where there are fewer."""
    count = min(count, len(data))
    return [place * len(data) // count for place in range(count)]


def check_model_measures(
    metrics: Sequence[str],
    pipeline: DiffusionPipeline,
    data: ImageData,
    step_counts: Sequence[int],
    bpd_steps: int | None,
) -> None:
    """ValueError, before anything is drawn, for measures of MODEL_METRICS that the pipeline's process or the data do not allow."""
    wanted = {"bpd": [bpd_steps or 1], "inversion": step_counts, "consistency": [*step_counts, 2 * step_counts[-1]]}
    for metric in (metric for metric in wanted if metric in metrics):
        if metric != "consistency":
            if not hasattr(pipeline, "unet"):
                raise ValueError(
                    f"{metric} needs a Gaussian process with a U-Net, which {type(pipeline).__name__} is not"
                )
            fetch(pipeline, data, [0])
        most = pipeline.scheduler.config.num_train_timesteps
        if max(wanted[metric]) > most:
            raise ValueError(
                f"{metric} over {max(wanted[metric])} steps asks for more than the {most} timesteps of this model; give fewer"
            )


def measure_bits_per_dim(
    pipeline: DiffusionPipeline,
    data: ImageData,
    count: int = 256,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> BoundMeasure:
    """Bits per dimension of `count` real images over all timesteps, or over a respaced process of fewer.

    Image i has the noise of seed + i, so that the value does not depend on batches and processes. A class-conditional model is
    given the images' classes. ValueError where those are missing.
    """
    scheduler = LinearDDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(num_inference_steps or scheduler.config.num_train_timesteps, device=pipeline.device)
    indices, state = choose_real_images(data, count), PartialState()
    starts = range(state.process_index * batch_size, len(indices), state.num_processes * batch_size)
    parts = []
    shown = progress and state.is_main_process
    for start in tqdm(starts, desc="bits per dimension", unit="batch", disable=not shown or len(starts) < 2):
        some = indices[start : start + batch_size]
        images, labels = fetch(pipeline, data, some)
        generators = [torch.Generator().manual_seed(seed + i) for i in some]
        bound = bits_per_dim(
            pipeline.unet,
            scheduler,
            images,
            generator=generators,
            class_labels=labels,
            progress=shown and len(starts) < 2,
        )
        parts.append((start, bound.total_bpd.cpu(), bound.prior_bpd.cpu(), bound.vb.cpu()))
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    total, prior, terms = (torch.cat([part[k] for part in parts]).double() for k in (1, 2, 3))
    errors = terms.std(0) / len(terms) ** 0.5 if len(terms) > 1 else torch.full_like(terms[0], float("nan"))
    name = f"bits per dimension ({len(total)} images, {len(scheduler.timesteps)} timesteps)"
    return BoundMeasure(
        Measure(name, *mean_and_standard_error(total)),
        Measure("prior's part of the bits per dimension", *mean_and_standard_error(prior)),
        scheduler.timesteps.tolist(),
        terms.mean(0).tolist(),
        errors.tolist(),
        len(total),
    )


def measure_inversion(
    pipeline: DiffusionPipeline, data: ImageData, step_counts: Sequence[int], count: int = 64, batch_size: int = 64
) -> dict[int, Measure]:
    """For each number of steps, the mean squared error a dimension of real images that were inverted and drawn again."""
    indices, state = choose_real_images(data, count), PartialState()
    starts = range(state.process_index * batch_size, len(indices), state.num_processes * batch_size)
    results = {}
    for steps in sorted(set(step_counts)):
        parts = []
        for start in starts:
            images, labels = fetch(pipeline, data, indices[start : start + batch_size])
            parts.append((start, reconstruction_error(pipeline, images, labels, steps)))
        errors = torch.cat([part for _, part in sorted(gather_object(parts), key=lambda part: part[0])])
        name = f"reconstruction error ({len(errors)} images, {steps} steps)"
        results[steps] = Measure(name, *mean_and_standard_error(errors))
    return results


def fetch(pipeline: DiffusionPipeline, data: ImageData, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, H, W) on the pipeline's device and, for a class-conditional model, their labels (B,)."""
    batch = data.fetch(indices, epoch=0)
    labels = None
    if pipeline.unet.config.get("num_class_embeds") is not None:
        labels = batch.get("labels")
        if labels is None and not pipeline.unet.config.get("null_class"):
            raise ValueError(
                f"the model needs classes, but {data.name} has no labels; name their column by --label_column"
            )
        labels = labels if labels is None else labels.to(pipeline.device)
    return batch["pixels"].to(pipeline.device), labels


def proportional_labels(real: np.ndarray, count: int) -> list[int]:
    """`count` classes in random but fixed order, as frequent as among `real` labels."""
    ranks = (2 * np.arange(count) + 1) * len(real) // (2 * count)
    return np.random.default_rng(0).permutation(np.sort(real)[ranks]).tolist()

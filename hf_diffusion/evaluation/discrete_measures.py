"""Measures of a model of categories: bits per dimension of its own bound."""

import math

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.likelihood import mean_and_standard_error
from hf_diffusion.evaluation.measures import Breakdown, Evaluation, Measure
from hf_diffusion.evaluation.model_measures import (
    ModelMeasureOptions,
    checked_by,
    fetch,
    gather_columns,
    shared_batches,
)
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.losses.discrete import bits_per_dim


def check_categories(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the process is one of categories, with enough timesteps."""
    if not hasattr(pipeline.scheduler, "to_categories"):
        raise ValueError(
            f"bpd here is the bound of a process of categories, and {type(pipeline.scheduler).__name__} has none; "
            "load the pipeline with the scheduler that it was trained with"
        )
    steps = pipeline.scheduler.config.num_train_timesteps
    if options.num_timesteps is not None and options.num_timesteps > steps:
        raise ValueError(
            f"bpd over {options.num_timesteps} timesteps asks for more than the {steps} of this model; give fewer"
        )


@checked_by(check_categories)
def measure_bits_per_dim(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> Evaluation:
    """Bits per dimension of real samples, rounded to the model's levels, by its variational bound.

    It is the bound of the sampler of so many timesteps: fewer skip by the products of their
    transitions. Image i has the noise of seed + i. A class-conditional model is given the classes.
    """
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    steps = options.num_timesteps or scheduler.config.num_train_timesteps
    scheduler.set_timesteps(steps, device=pipeline.device)
    shown, parts = options.progress and PartialState().is_main_process, []
    for start, some in tqdm(shared_batches(data, options), desc="bits per dimension", disable=not shown):
        values, labels = fetch(pipeline, data, some)
        parts.append((start, *terms_of_batch(pipeline, scheduler, values, labels, [options.seed + i for i in some])))
    terms, prior = (column.double() for column in gather_columns(parts))
    total, levels = terms.sum(1) + prior, scheduler.config.num_classes
    of_timesteps = Breakdown(
        "timestep (0 is the least noise)",
        "bits per dimension",
        scheduler.timesteps.tolist(),
        terms.mean(0).tolist(),
        (terms.std(0) / len(terms) ** 0.5).tolist() if len(terms) > 1 else None,
        "The bound in bits per dimension by timestep",
    )
    name = f"bits per dimension of {levels} levels ({len(total)} samples, {steps} timesteps)"
    measures = {
        "bpd": Measure(name, *mean_and_standard_error(total), better="lower", breakdown=of_timesteps),
        "prior_bpd": Measure(
            "prior's part of the bits per dimension", *mean_and_standard_error(prior), better="lower"
        ),
    }
    protocol = {
        "count": len(total),
        "levels": levels,
        # what a model that knows nothing needs
        "bits_of_uniform": math.log2(levels),
        "timesteps": steps,
        "noise_seed": options.seed,
        "data": data_protocol(data),
    }
    return Evaluation(measures, protocol)


def terms_of_batch(
    pipeline: DiffusionPipeline, scheduler, values: Tensor, labels: Tensor | None, seeds: list[int]
) -> tuple[Tensor, Tensor]:
    """Terms (B, T') and the prior's (B,) for values (B, ...) in [-1, 1], on the CPU."""
    network, generators = pipeline.unet, [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(shape: tuple[int, ...]) -> Tensor:
        rows = [torch.rand(shape[1:], generator=generator, dtype=torch.float64) for generator in generators]
        return torch.stack(rows).to(values.device)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        sample = scheduler.to_values(x_t).to(network.dtype)
        return network(sample, t, class_labels=labels, return_dict=False)[0].float()

    terms, prior = bits_per_dim(predict, scheduler, scheduler.to_categories(values), uniform)
    return terms.cpu(), prior.cpu()

"""Measures of the model itself, which a pipeline names in `measures`; here bits per dimension.

Each is a function `(pipeline, data, options: ModelMeasureOptions) -> Evaluation` that all processes
call together. A measure that can tell before any work that it does not apply has a check:
`@checked_by(check)`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.evaluation.inputs import class_names
from hf_diffusion.evaluation.likelihood import bits_per_dim, mean_and_standard_error
from hf_diffusion.evaluation.measures import Breakdown, Evaluation, Measure
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.schedulers.scheduling_gaussian import PREDICTION_TYPES, LinearDDPMScheduler


@dataclass(frozen=True)
class ModelMeasureOptions:
    """What a user says about measures of the model.

    count: real samples, or seeds, to look at. steps: numbers of sampling steps to measure at,
    ascending.
    num_timesteps: of a bound, None for all. labels: classes of drawn samples, in turn, None for
    none.
    sampling: options of the pipeline's call.
    """

    count: int = 64
    steps: tuple[int, ...] = (10, 25, 50)
    num_timesteps: int | None = None
    seed: int = 0
    batch_size: int = 64
    labels: Sequence[int] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    progress: bool = True


ModelMeasure = Callable[[DiffusionPipeline, TrainingData, ModelMeasureOptions], Evaluation]


def checked_by(check: Callable[[DiffusionPipeline, TrainingData, ModelMeasureOptions], None]) -> Callable:
    """Let `check` raise ValueError, before any work, for what the decorated measure cannot do."""

    def mark(measure: ModelMeasure) -> ModelMeasure:
        measure.check = check
        return measure

    return mark


def model_measures(pipeline: DiffusionPipeline) -> dict[str, str | ModelMeasure]:
    """The measures that the pipeline names: "module:function" or a function, by name.

    None of a model of latents: they are of what the network draws, and the data are images.
    """
    if getattr(pipeline, "vae", None) is not None:
        return {}
    return dict(getattr(pipeline, "measures", None) or {})


def find_model_measure(pipeline: DiffusionPipeline, name: str) -> ModelMeasure:
    """The function that measures `name` of the pipeline's model; ValueError where it is missing."""
    found = model_measures(pipeline)[name]
    if callable(found):
        return found
    module, _, function = found.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{type(pipeline).__name__} names {found!r} for {name}, which cannot be found ({error}); it must be "
            "'module:function'"
        ) from error


def check_bits_per_dim(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the process is Gaussian, with enough timesteps, and the data 8-bit."""
    check_gaussian(pipeline, "bpd", options.num_timesteps or 1)
    x_0, _ = fetch(pipeline, data, evenly_spaced(len(data), 16))
    levels = (x_0 + 1) * 127.5
    if x_0.abs().max() > 1 or (levels - levels.round()).abs().max() > 1e-2:
        raise ValueError(
            f"bpd is the code length of values of 8 bits, which those of {data.name} are not; measure distances of "
            "samples instead"
        )


@checked_by(check_bits_per_dim)
def measure_bits_per_dim(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> Evaluation:
    """Bits per dimension of real images over all timesteps, or over a respaced process of fewer.

    Image i has the noise of seed + i, so that the value does not depend on batches and processes. A
    class-conditional model is given the images' classes. ValueError where those are missing.
    """
    scheduler = LinearDDPMScheduler.from_config(pipeline.scheduler.config)
    steps = options.num_timesteps or scheduler.config.num_train_timesteps
    scheduler.set_timesteps(steps, device=pipeline.device)
    shown, parts = options.progress and PartialState().is_main_process, []
    batches = shared_batches(data, options)
    for start, some in tqdm(batches, desc="bits per dimension", disable=not shown or len(batches) < 2):
        images, labels = fetch(pipeline, data, some)
        bound = bits_per_dim(
            pipeline.unet,
            scheduler,
            images,
            generator=[torch.Generator().manual_seed(options.seed + i) for i in some],
            class_labels=labels,
            progress=shown and len(batches) < 2,
        )
        parts.append((start, bound.total_bpd.cpu(), bound.prior_bpd.cpu(), bound.vb.cpu()))
    total, prior, terms = (column.double() for column in gather_columns(parts))
    name = f"bits per dimension ({len(total)} images, {steps} timesteps)"
    of_timesteps = Breakdown(
        "timestep (0 is the least noise)",
        "bits per dimension",
        scheduler.timesteps.tolist(),
        terms.mean(0).tolist(),
        (terms.std(0) / len(terms) ** 0.5).tolist() if len(terms) > 1 else None,
        "The bound in bits per dimension by timestep",
    )
    measures = {
        "bpd": Measure(name, *mean_and_standard_error(total), better="lower", breakdown=of_timesteps),
        "prior_bpd": Measure(
            "prior's part of the bits per dimension", *mean_and_standard_error(prior), better="lower"
        ),
    }
    return Evaluation(measures, {"count": len(total), "noise_seed": options.seed, "data": data_protocol(data)})


def check_gaussian(pipeline: DiffusionPipeline, name: str, steps: int) -> None:
    """ValueError unless the process is Gaussian, in discrete time of at least `steps` timesteps."""
    config = pipeline.scheduler.config
    if config.get("beta_schedule") is None or config.get("prediction_type") not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} is defined by the betas of a Gaussian process, and {type(pipeline.scheduler).__name__} has none; "
            "load the pipeline with the scheduler that it was trained with"
        )
    if steps > config.num_train_timesteps:
        raise ValueError(
            f"{name} over {steps} steps asks for more than the {config.num_train_timesteps} timesteps of this model; "
            "give fewer"
        )


def shared_batches(data: TrainingData, options: ModelMeasureOptions) -> list[tuple[int, list[int]]]:
    """This process's batches of evenly spaced samples, as (place of the first, indices)."""
    state, indices = PartialState(), evenly_spaced(len(data), options.count)
    starts = range(state.process_index * options.batch_size, len(indices), state.num_processes * options.batch_size)
    return [(start, indices[start : start + options.batch_size]) for start in starts]


def gather_columns(parts: list[tuple]) -> list[Tensor]:
    """The columns of all processes' parts, each (place, tensors (B, ...)), in order of place."""
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    return [torch.cat(column) for column in list(zip(*parts, strict=True))[1:]]


def fetch(pipeline: DiffusionPipeline, data: TrainingData, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """x_0 (B, ...) on the pipeline's device and, for a class-conditional model, the labels (B,)."""
    batch = data.fetch(indices, epoch=0)
    labels = None
    if getattr(pipeline, "num_classes", None) is not None:
        labels = batch.get("labels")
        names = class_names(pipeline)
        if labels is not None and names and data.class_names and names != list(data.class_names):
            raise ValueError(
                f"the model's classes are {names} and those of {data.name} {list(data.class_names)}; give data of "
                "the model's classes, or --label_column none"
            )
        if labels is None and getattr(pipeline, "null_class_id", None) is None:
            raise ValueError(
                f"the model needs classes, but {data.name} has no labels; name their column by --label_column"
            )
        labels = labels if labels is None else labels.to(pipeline.device)
    return batch["x_0"].to(pipeline.device), labels

"""The two sides of an evaluation: real data, and what a pipeline says of its samples."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import nn

from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.waiting import main_first
from hf_diffusion.evaluation.options import DATA_OPTIONS, EvaluationOptions


def load_real_data(
    options: EvaluationOptions, shape: tuple[int, ...], form: dict[str, Any] | None = None
) -> TrainingData:
    """The real data in the form of samples of `shape`, images resized to it.

    form: what else `load_data` must be told, by a pipeline whose data are no images.

    Where the options name none they are those that the pipeline's config.yaml names. ValueError
    where nothing says which, and for data of another form.
    """
    chosen = {name: getattr(options, name) for name in DATA_OPTIONS}
    recorded = Path(options.pipeline) / "config.yaml"
    if not (options.dataset_name or options.train_data_dir) and recorded.is_file():
        config = yaml.safe_load(recorded.read_text(encoding="utf-8"))
        recorded_label = config.get("label_column") or "auto"
        chosen = {name: chosen[name] or config.get(name) for name in DATA_OPTIONS}
        if options.label_column == "auto":
            chosen["label_column"] = recorded_label
        # Of a run on captions; those made of classes are asked for by class.
        if config.get("caption_template") == []:
            chosen |= {"captioned": True, "caption_column": config.get("caption_column")}
    if chosen["label_column"] == "auto":
        chosen["label_column"] = None
    if not (chosen["dataset_name"] or chosen["train_data_dir"]):
        raise ValueError("there are no real data to measure against; give --dataset_name or --train_data_dir")
    chosen |= {"split": options.split, "max_train_samples": options.max_reference_images}
    other = "text_column" if form is None else "image_column"
    if chosen.pop(other):
        raise ValueError(f"{other} {getattr(options, other)!r}: the samples of this pipeline are none; leave it out")
    chosen |= form or {}
    if len(shape) == 3:
        chosen |= {"channels": shape[0], "fit_size": tuple(shape[1:])}
    with main_first(PartialState()):
        data = load_data(**chosen)
    if tuple(data.sample_shape) != tuple(shape):
        raise ValueError(
            f"the samples of {options.pipeline} have the shape {tuple(shape)} and those of {data.name} "
            f"{tuple(data.sample_shape)}; name the data that the model was trained on"
        )
    return data


def class_names(pipeline: DiffusionPipeline) -> list[str]:
    """The names of the pipeline's classes by number; [] where they have none."""
    names = getattr(pipeline, "id2label", None) or {}
    return [names[number] for number in sorted(names)]


def number_classes_alike(data: TrainingData, names: list[str]) -> None:
    """Number the classes of `data` as a model does, where it has all of them by name."""
    if names and data.class_names and set(data.class_names) <= set(names):
        data.use_classes(names)


def proportional_labels(real: np.ndarray, count: int) -> list[int]:
    """`count` classes in random but fixed order, as frequent as among `real` labels."""
    ranks = (2 * np.arange(count) + 1) * len(real) // (2 * count)
    return np.random.default_rng(0).permutation(np.sort(real)[ranks]).tolist()


def prompts_of(pipeline: DiffusionPipeline, data: TrainingData, count: int) -> list[str] | None:
    """A text for each of `count` samples: captions of evenly spaced real samples, the examples of
    the pipeline where these have none; None for a pipeline that is not asked by texts.
    """
    examples = getattr(pipeline, "example_prompts", None)
    captions = getattr(data, "captions", None)
    if not examples or getattr(pipeline, "num_classes", None) is not None:
        return None
    if captions is None:
        return [examples[i % len(examples)] for i in range(count)]
    rows = np.arange(count) * len(data) // count
    return [captions.texts[number] for number in captions.choose(np.zeros_like(rows), rows)]


def sample_shape(pipeline: DiffusionPipeline) -> tuple[int, ...]:
    """Shape of one sample, (C, H, W) for images, by the pipeline or by a network's configuration.

    ValueError where neither says it.
    """
    said = getattr(pipeline, "sample_shape", None)
    if said is not None:
        return tuple(said)
    for part in pipeline.components.values():
        config = getattr(part, "config", {})
        if isinstance(part, nn.Module) and {"in_channels", "sample_size"} <= set(config):
            size = config["sample_size"]
            return config["in_channels"], *((size, size) if isinstance(size, int) else tuple(size))
    raise ValueError(
        f"{type(pipeline).__name__} does not say the shape of its samples; give it a property sample_shape, such as "
        "(3, 32, 32) for images"
    )

"""The two sides of an evaluation: real data, and what a pipeline says of its samples."""

from pathlib import Path

import numpy as np
import yaml
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import nn

from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.options import DATA_OPTIONS, EvaluationOptions


def load_real_data(options: EvaluationOptions, shape: tuple[int, ...]) -> TrainingData:
    """The real data in the form of samples of `shape`, images resized to it.

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
    if chosen["label_column"] == "auto":
        chosen["label_column"] = None
    if not (chosen["dataset_name"] or chosen["train_data_dir"]):
        raise ValueError("there are no real data to measure against; give --dataset_name or --train_data_dir")
    chosen |= {"split": options.split, "max_train_samples": options.max_reference_images}
    if len(shape) == 3:
        chosen |= {"channels": shape[0], "fit_size": tuple(shape[1:])}
    with PartialState().main_process_first():
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

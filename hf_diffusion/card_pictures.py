"""The pictures that a card shows of a finished model beside its grid of samples: guidance, numbers of steps, nearest training images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from hf_diffusion.data.images import ImageData, StreamingImageData
from hf_diffusion.evaluation.sampling import draw
from hf_diffusion.figures import labelled_grid
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.model_card import NearestImages
from hf_diffusion.nearest_images import nearest_images


GUIDANCE_SCALES = (1.0, 1.5, 2.0, 4.0)
NETWORK_CALLS = (1, 2, 4, 8, 16)
COLUMNS = 10
MOST_PAIRS = 40  # of a sample and its nearest training image


@dataclass(frozen=True)
class Pictures:
    """Captions by file, relative to the folder, and the picture of nearest training images with what it has measured."""

    captions: dict[str, str]
    nearest: NearestImages


def draw_pictures(
    folder: Path,
    data: ImageData | StreamingImageData,
    count: int,
    seed: int,
    options: dict[str, Any],
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Pictures:
    """Draw from the pipeline that is saved in the folder into its `samples/`, image i with the seed `seed` + i.

    `count` samples are compared with the training data; options are those of the pipeline's call.
    """
    pipe = load_pipeline(folder).to(device)
    (folder / "samples").mkdir(exist_ok=True)
    classes = list(range(pipe.num_classes)) if pipe.num_classes else None
    captions = {}
    if getattr(pipe, "null_class_id", None) is not None:
        captions["samples/guidance.png"] = _guidance(pipe, classes, seed, options, folder / "samples/guidance.png")
    if hasattr(pipe, "generator"):
        captions["samples/steps.png"] = _network_calls(pipe, classes, seed, folder / "samples/steps.png")
    labels = None if classes is None else [classes[i % len(classes)] for i in range(count)]
    samples = draw(pipe, range(seed, seed + count), labels, **options)
    del pipe  # the search wants the memory
    nearest = nearest_images(samples, data, device, num_workers)
    name = "samples/nearest.png"
    _nearest_grid(samples, nearest.images, nearest.distances, folder / name)
    return Pictures(captions, NearestImages(name, nearest.sentence()))


def _some(classes: Sequence[int] | None) -> tuple[list[int], list[int] | None]:
    """The places of a row of images, and a class for each where there are classes: evenly spaced ones, if they are many."""
    places = list(range(COLUMNS))
    if classes is None:
        return places, None
    if len(classes) > COLUMNS:
        return places, [classes[i * len(classes) // COLUMNS] for i in places]
    return list(range(len(classes))), list(classes)


def _guidance(pipe: DiffusionPipeline, classes: Sequence[int], seed: int, options: dict[str, Any], path: Path) -> str:
    """A row for each guidance scale, with the same seeds and classes in all rows; the caption."""
    places, labels = _some(classes)
    seeds = [seed + place for place in places]
    rows = [draw(pipe, seeds, labels, **{**options, "guidance_scale": scale}) for scale in GUIDANCE_SCALES]
    labelled_grid(np.concatenate(rows), len(places), [f"w = {scale:g}" for scale in GUIDANCE_SCALES]).save(path)
    return (
        f"Classifier-free guidance: a row for each guidance_scale w (1 is none), the classes {_names(pipe, labels)} from left to right, the "
        "same seeds in each row"
    )


def _network_calls(pipe: DiffusionPipeline, classes: Sequence[int] | None, seed: int, path: Path) -> str:
    """A row for what the generator takes for the image after 1, 2, 4, ... of its T calls; the caption."""
    places, labels = _some(classes)
    predictions: list[torch.Tensor] = []  # of x_0, one a call, (B, C, H, W) in about [-1, 1]
    hook = pipe.generator.register_forward_hook(lambda module, given, output: predictions.append(output[0]))
    try:
        draw(pipe, [seed + place for place in places], labels, micro_batch_size=len(places))
    finally:
        hook.remove()
    calls = [n for n in NETWORK_CALLS if n < len(predictions)] + [len(predictions)]
    shown = torch.cat([predictions[n - 1] for n in calls]).float()
    images = pipe.image_processor.postprocess(shown, output_type="np")
    labels_of_rows = [f"{n} step{'s' if n > 1 else ''}" for n in calls]
    labelled_grid((images * 255).round().astype(np.uint8), len(places), labels_of_rows).save(path)
    named = "" if labels is None else f", the classes {_names(pipe, labels)} from left to right"
    return (
        f"The generator's prediction of the image after {', '.join(map(str, calls))} of its {len(predictions)} steps{named}; the number of "
        "steps is fixed by the training"
    )


def _names(pipe: DiffusionPipeline, labels: Sequence[int]) -> str:
    names = pipe.id2label or {}
    return ", ".join(names.get(label, str(label)) for label in labels)


def _nearest_grid(samples: np.ndarray, nearest: np.ndarray, distances: np.ndarray, path: Path) -> None:
    """Rows of samples, those with the smallest distances first, each above a row of their nearest training images."""
    order = np.argsort(distances, kind="stable")[:MOST_PAIRS]
    columns, rows, names = min(COLUMNS, len(order)), [], []
    for start in range(0, len(order), columns):
        chosen = order[start : start + columns]
        blank = np.full((columns - len(chosen), *samples.shape[1:]), 255, dtype=np.uint8)
        rows += [samples[chosen], blank, nearest[chosen], blank]
        names += ["samples", "training data"]
    labelled_grid(np.concatenate(rows), columns, names).save(path)

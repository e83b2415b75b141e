"""The pictures on the card of a finished model, as far as its pipeline has them to show.

Guidance, where the pipeline takes a scale and knows "no class"; its predictions on the way, where
its callback is given them; and the training samples that are nearest to its own. How samples are
drawn on paper is a matter of the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hf_diffusion.cards.model_card import NearestImages
from hf_diffusion.cards.nearest_images import nearest_images
from hf_diffusion.cards.texts import draw_texts, sentence_of_copies
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.files import write_whole
from hf_diffusion.sampling.drawing import draw, sampling_options


GUIDANCE_SCALES = (1.0, 1.5, 2.0, 4.0)
# Steps after which the prediction is shown, and the last one.
SHOWN_STEPS = (1, 2, 4, 8, 16)
COLUMNS = 10
# Of a sample and its nearest training sample.
MOST_PAIRS = 40


@dataclass(frozen=True)
class Pictures:
    """Captions by file, relative to the folder, and the picture of nearest training images."""

    captions: dict[str, str]
    nearest: NearestImages


def draw_pictures(
    folder: Path,
    pipe: DiffusionPipeline,
    data: TrainingData,
    count: int,
    seed: int,
    options: dict[str, Any],
    num_workers: int = 0,
) -> Pictures:
    """Draw from a pipeline into `samples/` of a folder, sample i with the seed `seed` + i.

    count: samples that are compared with the training data. options: of the pipeline's call.
    """
    (folder / "samples").mkdir(exist_ok=True)
    if getattr(pipe, "output_name", "images") == "texts":
        samples = draw(pipe, range(seed, seed + count), asked_in_turn(pipe, count), **options)
        copied = NearestImages(None, sentence_of_copies(samples, data))
        return Pictures(draw_texts(folder, pipe, data, seed, options), copied)
    captions: dict[str, str] = {}
    # Of texts and of classes; guidance leads away from none of them.
    has_empty = getattr(pipe, "example_prompts", None) and pipe.config.get("empty_text", True)
    is_guided = has_empty or getattr(pipe, "null_class_id", None) is not None
    if is_guided and "guidance_scale" in sampling_options(pipe):
        captions["samples/guidance.png"] = _guidance(pipe, data, seed, options, folder / "samples/guidance.png")
    if "x_0" in getattr(pipe, "_callback_tensor_inputs", ()):
        captions["samples/steps.png"] = _predictions(pipe, data, seed, options, folder / "samples/steps.png")
    samples = draw(pipe, range(seed, seed + count), asked_in_turn(pipe, count), **options)
    nearest = nearest_images(samples, data, pipe.device, num_workers)
    name = "samples/nearest.png"
    _nearest_grid(samples, nearest.images, nearest.distances, data, folder / name)
    return Pictures(captions, NearestImages(name, nearest.sentence()))


def asked_in_turn(pipe: DiffusionPipeline, count: int) -> list[int] | list[str] | None:
    """The texts or classes of `count` samples, each as often as others; None without any."""
    asked = getattr(pipe, "example_prompts", None) or range(getattr(pipe, "num_classes", None) or 0)
    return [asked[i % len(asked)] for i in range(count)] if asked else None


def _one_row(pipe: DiffusionPipeline, seed: int) -> tuple[list[int], list[int] | list[str] | None]:
    """The seeds of a row of samples and, where there are texts or classes, evenly spaced ones."""
    num_classes, prompts = getattr(pipe, "num_classes", None), getattr(pipe, "example_prompts", None)
    labels: list[int] | list[str] | None = evenly_spaced(num_classes, COLUMNS) if num_classes else None
    if prompts:
        labels = [prompts[place] for place in evenly_spaced(len(prompts), COLUMNS)]
    return list(range(seed, seed + (len(labels) if labels else COLUMNS))), labels


def _guidance(pipe: DiffusionPipeline, data: TrainingData, seed: int, options: dict[str, Any], path: Path) -> str:
    """A row for each guidance scale, with the same seeds and classes in all rows; the caption."""
    seeds, labels = _one_row(pipe, seed)
    rows = [draw(pipe, seeds, labels, **{**options, "guidance_scale": scale}) for scale in GUIDANCE_SCALES]
    names = [f"w = {scale:g}" for scale in GUIDANCE_SCALES]
    _save(_picture(pipe, data, np.concatenate(rows), labels, len(seeds), names), path)
    rows = "a row" if data.kind == "images" else "samples"
    named = _classes(pipe, data, labels)
    return f"Classifier-free guidance: {rows} for each guidance_scale w (1 is none){named}, the same seeds for each"


def _predictions(pipe: DiffusionPipeline, data: TrainingData, seed: int, options: dict[str, Any], path: Path) -> str:
    """A row for what the network predicts after 1, 2, 4, ... of its steps; the caption."""
    seeds, labels = _one_row(pipe, seed)
    predictions: list[torch.Tensor] = []

    def keep(pipe: DiffusionPipeline, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict:
        predictions.append(tensors["x_0"])
        return {}

    watched = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["x_0"]}
    draw(pipe, seeds, labels, **options, **watched)
    shown = [n for n in SHOWN_STEPS if n < len(predictions)] + [len(predictions)]
    rows = [data.to_samples({"x_0": predictions[n - 1]}) for n in shown]
    names = [f"{n} step{'s' if n > 1 else ''}" for n in shown]
    _save(_picture(pipe, data, np.concatenate(rows), labels, len(seeds), names), path)
    return (
        f"The network's prediction of the result after {', '.join(map(str, shown))} of its {len(predictions)} steps"
        f"{_classes(pipe, data, labels)}"
    )


def _picture(
    pipe: DiffusionPipeline,
    data: TrainingData,
    samples: np.ndarray,
    labels: Sequence[int] | Sequence[str] | None,
    columns: int,
    row_labels: Sequence[str],
) -> Image.Image:
    """The samples in rows, with the class of each column above it where they stand in a grid."""
    names = getattr(pipe, "id2label", None) or {}
    heads = {"column_labels": [names.get(label, str(label)) for label in labels]} if labels else {}
    return data.picture(samples, columns, row_labels, **(heads if data.kind == "images" else {}))


def _classes(pipe: DiffusionPipeline, data: TrainingData, labels: Sequence[int] | Sequence[str] | None) -> str:
    names = getattr(pipe, "id2label", None) or {}
    of_texts = bool(labels) and isinstance(labels[0], str)
    shown = ", ".join(repr(label) if of_texts else names.get(label, str(label)) for label in labels or ())
    # Images stand in a grid; where other kinds of samples stand is a matter of their values.
    place = " from left to right" if data.kind == "images" else ""
    return f", the {'prompts' if of_texts else 'classes'} {shown}{place}" if shown else ""


def _nearest_grid(
    samples: np.ndarray, nearest: np.ndarray, distances: np.ndarray, data: TrainingData, path: Path
) -> None:
    """Rows of samples, the nearest first, each above a row of their nearest training samples."""
    columns = min(COLUMNS, len(samples))
    order = np.argsort(distances, kind="stable")[: min(MOST_PAIRS, len(samples) // columns * columns)]
    rows = [part[order[i : i + columns]] for i in range(0, len(order), columns) for part in (samples, nearest)]
    names = ["samples", "training data"] * (len(rows) // 2)
    _save(data.picture(np.concatenate(rows), columns, names), path)


def _save(picture: Image.Image, path: Path) -> None:
    write_whole(path, lambda file: picture.save(file, format="PNG"))

"""The one place that calls a pipeline to draw: one seed a sample, finite values.

Letters: B samples, H x W pixels of C channels.
"""

import csv
import inspect
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_diffusion.config.coercion import coerce
from hf_diffusion.config.options import UsageError
from hf_diffusion.data.pixels import from_unit_range
from hf_diffusion.sampling.options import CALL_OPTIONS, SamplingOptions


def draw(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | Sequence[str] | None,
    progress: str | None = None,
    **options,
) -> np.ndarray:
    """One sample for each seed, of the class at its place in `labels`; of the text, where they are
    texts.

    progress: what the pipeline's progress bar says; None shows none.
    options: arguments of the pipeline's call, see `check_call`.

    Returns uint8 (B, H, W, C) for images, int64 (B, L) for tokens and float32 (B, ...) for anything
    else. ValueError names the seeds whose samples are not finite. UsageError where the pipeline
    does not give images in the precision of its weights.
    """
    samples = draw_floats(pipeline, seeds, labels, progress, **options)
    return from_unit_range(samples) if samples.ndim == 4 else samples


def draw_floats(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | Sequence[str] | None,
    progress: str | None = None,
    **options,
) -> np.ndarray:
    """As `draw`, but float32 as the pipeline returns it: images (B, H, W, C) lie in [0, 1]."""
    what: dict[str, Any] = {"batch_size": len(seeds)}
    if labels is not None:
        of_texts = isinstance(labels[0], str)
        what = {"prompt": list(labels)} if of_texts else {"class_labels": [int(label) for label in labels]}
    if "output_type" in inspect.signature(pipeline.__call__).parameters:
        what["output_type"] = "np"
    # On the CPU, so that a seed means the same noise on every device.
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    former = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=progress is None, desc=progress)
    try:
        samples = pipeline(**what, generator=generators, **options)[0]
    except TypeError as error:
        # numpy has no bfloat16, and diffusers' DDIMPipeline and DDPMPipeline do not convert it
        if "BFloat16" not in str(error):
            raise
        raise UsageError(
            f"--dtype bf16: {type(pipeline).__name__} cannot return images of this precision; give fp16 or float32"
        ) from error
    finally:
        pipeline._progress_bar_config = former
    if isinstance(samples, Tensor):
        samples = (samples.float() if samples.is_floating_point() else samples).cpu()
    samples = np.asarray(samples)
    # tokens stay whole numbers
    samples = samples if samples.dtype.kind == "i" else samples.astype(np.float32, copy=False)
    finite = np.isfinite(samples).reshape(len(samples), -1).all(axis=1)
    if not finite.all():
        bad = [int(seed) for seed, good in zip(seeds, finite) if not good]
        raise ValueError(
            f"the pipeline gives NaN or infinity for {len(bad)} of {len(samples)} samples (seeds {bad[:5]}, options "
            f"{options}); sample in float32, or look at the weights"
        )
    return samples


def draw_in_batches(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | Sequence[str] | None,
    batch_size: int,
    **options,
) -> np.ndarray:
    """As `draw`, `batch_size` samples at a time, each batch with a progress bar."""
    batches = []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        progress = f"samples {start + 1}-{start + len(seeds[rows])} of {len(seeds)}"
        batches.append(draw(pipeline, seeds[rows], None if labels is None else labels[rows], progress, **options))
    return np.concatenate(batches)


def sampling_options(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """The arguments of a pipeline's call that say how to sample.

    A pipeline that has no such attribute takes those of CALL_OPTIONS that are in its signature.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    return getattr(pipeline, "sampling_options", tuple(name for name in CALL_OPTIONS if name in accepted))


def check_call(pipeline: DiffusionPipeline, labelled: bool, options: dict[str, Any]) -> None:
    """UsageError for options that the pipeline does not take.

    UsageError, too, for a pipeline that needs more than noise and classes.
    """
    accepted, name = inspect.signature(pipeline.__call__).parameters, type(pipeline).__name__
    taken = sampling_options(pipeline)
    for option in options:
        if option not in taken:
            known = f"it takes {', '.join(taken)}" if taken else "it takes no options"
            raise UsageError(f"--{option}: {name} does not take it; leave it out, {known}")
    if labelled and "class_labels" not in accepted:
        raise UsageError(f"{name} has no classes; leave the labels out")
    if "generator" not in accepted or ("batch_size" not in accepted and not labelled):
        raise UsageError(f"{name} does not sample from noise or classes alone; call it from Python")


def call_options(pipeline: DiffusionPipeline, options: SamplingOptions) -> dict[str, Any]:
    """The arguments of the pipeline's call that the user gives, those of `--set` included.

    UsageError for a value that the annotation in the pipeline's signature does not take.
    """
    given, hints = options.of_call(), typing.get_type_hints(type(pipeline).__call__)
    for text in options.set_:
        name, equals, value = text.partition("=")
        if not equals or name not in sampling_options(pipeline):
            known = ", ".join(sampling_options(pipeline))
            raise UsageError(
                f"--set {text}: write NAME=VALUE, with NAME one of those of {type(pipeline).__name__}: {known}"
            )
        try:
            given[name] = coerce(value, hints[name], f"--set {name}")
        except ValueError as error:
            raise UsageError(str(error)) from None
    steps = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
    trained = getattr(getattr(pipeline, "scheduler", None), "config", {}).get("num_train_timesteps")
    # A default of 50 is no answer for a process of 20 steps.
    if steps is not None and isinstance(steps.default, int) and trained and steps.default > trained:
        given.setdefault("num_inference_steps", trained)
    return given


def choose_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[str] | None:
    """The texts that `--prompt` asks for, each once, else those that the pipeline has as examples.

    None for a pipeline that is asked by class, or by nothing. UsageError where it takes no texts.
    """
    if prompts and "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UsageError(f"--prompt {prompts[0]!r}: {type(pipeline).__name__} takes no texts; leave it out")
    if prompts or getattr(pipeline, "num_classes", None) is not None:
        return list(dict.fromkeys(prompts)) or None
    return getattr(pipeline, "example_prompts", None) or None


def choose_labels(pipeline: DiffusionPipeline, class_labels: str = "auto") -> list[int] | None:
    """The classes that `--class_labels` asks for; None for samples without a class.

    class_labels: numbers or names separated by commas, "all" or "auto" for every class, or "none".
    A name in double quotes is a name whatever it looks like: '"none","a,b"'.

    UsageError for a class that the pipeline does not have, and for a word with two meanings.
    """
    num_classes = getattr(pipeline, "num_classes", None)
    names = list((getattr(pipeline, "id2label", None) or {}).values())
    if class_labels in ("none", "all") and class_labels in names:
        raise UsageError(
            f"--class_labels {class_labels}: a class has this name, and the word has a meaning of its own; write "
            f"'\"{class_labels}\"' for the class, or its number {names.index(class_labels)}"
        )
    if class_labels == "none" or (num_classes is None and class_labels == "auto"):
        return None
    if num_classes is None:
        raise UsageError(f"--class_labels {class_labels}: this pipeline has no classes; leave it out")
    if class_labels in ("auto", "all"):
        return list(range(num_classes))
    try:
        return pipeline.get_label_ids([_label(word, names) for word in _words(class_labels, names)])
    except ValueError as error:
        quoted = "; a name with a comma is written in double quotes" if any("," in name for name in names) else ""
        raise UsageError(f"--class_labels {class_labels}: {error}{quoted}") from None


def _words(text: str, names: Sequence[str]) -> list[str]:
    """What stands between the commas, without its quotes; a text that is one name is one word."""
    try:
        words = next(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError("a quote is not closed, or not at the ends of a name") from error
    if text in names and not all(word.strip() in names for word in words):
        return [text]
    return words


def _label(word: str, names: Sequence[str]) -> int | str:
    # Digits may be names: class 3 of the digits is called "3". So may spaces be a part of one.
    word = word if word in names else word.strip()
    return int(word) if word.isdecimal() and word not in names else word

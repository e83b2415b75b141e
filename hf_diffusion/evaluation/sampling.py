"""Drawing many images: shared out over processes, one seed an image, kept on disk as they come so that nothing is drawn twice.

The images are cut into chunks that do not depend on the number of processes; chunk k is drawn by process k modulo that number and written
whole. A folder belongs to one protocol (weights, sampler, options, precision), whose hash is in its name, so a
second run finds what an interrupted one has drawn, and never the images of other settings.
"""

import hashlib
import inspect
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from hf_diffusion.evaluation.feature_networks import FeatureNetwork, hash_tensors


OPTIONS = ("num_inference_steps", "eta", "guidance_scale", "guidance_rescale")


@dataclass(frozen=True)
class Samples:
    """Images on disk in chunks: `bounds` of the positions (start, stop) of each, all drawn under one `protocol`."""

    folder: Path
    bounds: list[tuple[int, int]]
    protocol: dict[str, Any]

    def __len__(self) -> int:
        return self.bounds[-1][1]

    def chunks(
        self, process: int = 0, processes: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Yield (positions (B,), uint8 images (B, H, W, C), int64 labels (B,) or None) of every chunk of one process."""
        for start, stop in self.bounds[process::processes]:
            arrays = _read(_chunk_file(self.folder, start, stop))
            yield np.arange(start, stop), arrays["images"], arrays.get("labels")

    def images(self) -> np.ndarray:
        """All images, uint8 (N, H, W, C)."""
        return np.concatenate([images for _, images, _ in self.chunks()])

    def seconds_per_image(self) -> float:
        """The median over chunks of the time that one image of it took in one process."""
        files = ((_read(_chunk_file(self.folder, *bound)), bound) for bound in self.bounds)
        return float(np.median([arrays["seconds"] / (stop - start) for arrays, (start, stop) in files]))


def sample_images(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    folder: str | os.PathLike,
    chunk_size: int = 256,
    progress: bool = True,
    **options,
) -> Samples:
    """Draw one image for each seed, of the class at its place in `labels`, on all processes; returns when all are on disk.

    `folder` must be seen by all processes; the images lie in a sub-folder of it. `options` are those of OPTIONS, handed to
    the pipeline. Works for pipelines of this package and of diffusers that take `batch_size` or `class_labels`. ValueError for
    options that the pipeline does not take, and for images that are not finite.
    """
    if chunk_size < 1 or len(seeds) < 1:
        raise ValueError(f"{len(seeds)} seeds in chunks of {chunk_size} make no images; give at least one of each")
    if labels is not None and len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels for {len(seeds)} seeds; give one label a seed")
    check_call(pipeline, labels is not None, options)
    state = PartialState()
    protocol = sampling_protocol(pipeline, chunk_size, options)
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(folder) / f"samples-{digest}"
    if state.is_main_process:
        target.mkdir(parents=True, exist_ok=True)
        _write_whole(target / "protocol.json", json.dumps(protocol, indent=2).encode())
    state.wait_for_everyone()
    bounds = [(start, min(start + chunk_size, len(seeds))) for start in range(0, len(seeds), chunk_size)]
    mine = bounds[state.process_index :: state.num_processes]
    description = f"sampling (process 1 of {state.num_processes})" if state.num_processes > 1 else "sampling"
    shown = progress and state.is_main_process
    with tqdm(
        total=sum(stop - start for start, stop in mine), desc=description, unit="image", disable=not shown
    ) as bar:
        for start, stop in mine:
            wanted = {"seeds": np.array(seeds[start:stop], dtype=np.int64)}
            if labels is not None:
                wanted["labels"] = np.array(labels[start:stop], dtype=np.int64)
            _draw_chunk(pipeline, _chunk_file(target, start, stop), wanted, options)
            bar.update(stop - start)
    state.wait_for_everyone()
    return Samples(target, bounds, protocol)


def draw(pipeline: DiffusionPipeline, seeds: Sequence[int], labels: Sequence[int] | None, **options) -> np.ndarray:
    """uint8 images (B, H, W, C), one seed each, without a progress bar; ValueError where they are not finite."""
    former = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    what = {"batch_size": len(seeds)} if labels is None else {"class_labels": [int(label) for label in labels]}
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    try:
        images = pipeline(**what, generator=generators, output_type="np", **options).images
    finally:
        pipeline._progress_bar_config = former
    images = np.asarray(images, dtype=np.float32)
    if not np.isfinite(images).all():
        bad = [seed for seed, image in zip(seeds, images) if not np.isfinite(image).all()]
        raise ValueError(
            f"the pipeline gives NaN or infinity for {len(bad)} of {len(images)} images (seeds {bad[:5]}, options {options}); "
            "sample in float32, or look at the weights"
        )
    return (images * 255).round().clip(0, 255).astype(np.uint8)


def drawing_network(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The network that draws the images, whose config tells their size and classes: a U-Net, or the generator of a GAN."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.generator


def check_call(pipeline: DiffusionPipeline, labelled: bool, options: dict[str, Any]) -> None:
    """ValueError for options that the pipeline's call does not take, and for pipelines that need more than noise and classes."""
    accepted = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    for option in options:
        if option not in OPTIONS or option not in accepted:
            taken = [o for o in OPTIONS if o in accepted]
            raise ValueError(f"{name} does not take {option}; it takes {taken}")
    if labelled and "class_labels" not in accepted:
        raise ValueError(f"{name} has no classes; leave the labels out")
    if "generator" not in accepted or ("batch_size" not in accepted and not labelled):
        raise ValueError(f"{name} does not sample from noise or classes alone, which is what can be measured here")


def sampling_protocol(pipeline: DiffusionPipeline, chunk_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """All that decides which image belongs to a seed and a label, as plain values."""
    modules = {n: module for n, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(pipeline.__call__).parameters.items()
        if name in OPTIONS and parameter.default is not inspect.Parameter.empty
    }
    return {
        "pipeline": type(pipeline).__name__,
        "weights_sha256": {name: hash_tensors(module.state_dict()) for name, module in modules.items()},
        "sampler": type(pipeline.scheduler).__name__,
        "sampler_config": json.loads(json.dumps(scheduler, default=str)),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "chunk_size": chunk_size,  # images of other batch shapes differ in the last bit
        "options": {**defaults, **options},
    }


def images_protocol(
    count: int,
    seed: int | None,
    labels: Sequence[int] | None,
    sampling: dict[str, Any] | None,
    network: FeatureNetwork,
    classifier: FeatureNetwork | None = None,
) -> dict[str, Any]:
    """What the measures of `count` images hold for; `seed` is that of the first image, None for images that nobody drew here."""
    classes = None
    if labels is not None:
        classes = {int(label): int(number) for label, number in zip(*np.unique(labels, return_counts=True))}
    networks = {"features": network.describe()} if sampling is not None else {}
    if classifier is not None:
        networks["classifier"] = classifier.describe()
    seeds = None if seed is None else [seed, seed + count - 1]
    return {"count": count, "seeds": seeds, "images_of_class": classes, "sampling": sampling, **networks}


def _chunk_file(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start:08d}-{stop:08d}.npz"


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def _draw_chunk(
    pipeline: DiffusionPipeline, path: Path, wanted: dict[str, np.ndarray], options: dict[str, Any]
) -> None:
    """Draw and write a chunk, unless the file already holds the images of these seeds and labels."""
    if path.is_file():
        try:
            there = _read(path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # damaged: draw it again
            there = {}
        if {"images", "seconds"} <= set(there) and set(there) - {"images", "seconds"} == set(wanted):
            if all(np.array_equal(there[name], array) for name, array in wanted.items()):
                return
    began = time.perf_counter()
    images = draw(pipeline, wanted["seeds"].tolist(), wanted.get("labels"), **options)
    arrays = {**wanted, "images": images, "seconds": np.array(time.perf_counter() - began)}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)

"""Drawing many samples: one seed each, shared by processes, kept on disk and never drawn twice.

The samples are cut into chunks that do not depend on the number of processes. Chunk k is drawn by
process k modulo that number and written whole. A folder belongs to one protocol (weights, sampler,
options, precision), whose hash is in its name: a second run finds what an interrupted one has
drawn, and never the samples of other settings.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from hf_diffusion.evaluation.protocol import sampling_protocol
from hf_diffusion.files import remove_partials, write_whole
from hf_diffusion.sampling.drawing import check_call, draw, sampling_options


# The arrays of a chunk that are its result; the others say what was asked for.
DRAWN = {"images", "seconds"}


@dataclass(frozen=True)
class Samples:
    """Samples on disk in chunks of positions (start, stop), all drawn under one `protocol`."""

    folder: Path
    bounds: list[tuple[int, int]]
    protocol: dict[str, Any]

    def __len__(self) -> int:
        return self.bounds[-1][1]

    def chunks(
        self, process: int = 0, processes: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Yield (positions (B,), samples, labels (B,) or None) of every chunk of one process."""
        for start, stop in self.bounds[process::processes]:
            arrays = _read(_chunk_file(self.folder, start, stop))
            yield np.arange(start, stop), arrays["images"], arrays.get("labels")

    def samples(self) -> np.ndarray:
        """All samples as `draw` gives them: uint8 (N, H, W, C) or float32 (N, *shape)."""
        return np.concatenate([samples for _, samples, _ in self.chunks()])

    def seconds_per_image(self) -> float:
        """The median over chunks of the time that one sample of it took in one process."""
        files = ((_read(_chunk_file(self.folder, *bound)), bound) for bound in self.bounds)
        return float(np.median([arrays["seconds"] / (stop - start) for arrays, (start, stop) in files]))


def sample_images(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | Sequence[str] | None,
    folder: str | os.PathLike,
    chunk_size: int = 256,
    progress: bool = True,
    **options,
) -> Samples:
    """Draw one sample for each seed, of the class at its place in `labels`, on all processes.

    Returns when all are on disk. `folder` must be seen by all processes; the samples lie in a
    sub-folder of it. `options` are handed to the pipeline. ValueError for options that the pipeline
    does not take, and for samples that are not finite.
    """
    if chunk_size < 1 or len(seeds) < 1:
        raise ValueError(f"{len(seeds)} seeds in chunks of {chunk_size} make no samples; give at least one of each")
    if labels is not None and len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels for {len(seeds)} seeds; give one label a seed")
    check_call(pipeline, labels is not None, options)
    state = PartialState()
    protocol = sampling_protocol(pipeline, chunk_size, options)
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(folder) / f"samples-{digest}"
    if state.is_main_process:
        remove_partials(target)
        write_whole(target / "protocol.json", json.dumps(protocol, indent=2))
    state.wait_for_everyone()
    bounds = [(start, min(start + chunk_size, len(seeds))) for start in range(0, len(seeds), chunk_size)]
    mine = bounds[state.process_index :: state.num_processes]
    description = f"sampling (process 1 of {state.num_processes})" if state.num_processes > 1 else "sampling"
    shown = progress and state.is_main_process
    total = sum(stop - start for start, stop in mine)
    with tqdm(total=total, desc=description, unit="sample", disable=not shown) as bar:
        for start, stop in mine:
            wanted = {"seeds": np.array(seeds[start:stop], dtype=np.int64)}
            if labels is not None:
                # texts, or classes
                wanted["labels"] = np.array(labels[start:stop])
            _draw_chunk(pipeline, _chunk_file(target, start, stop), wanted, options)
            bar.update(stop - start)
    state.wait_for_everyone()
    return Samples(target, bounds, protocol)


def draw_two(
    pipeline: DiffusionPipeline, seed: int, labels: Sequence[int] | None, options: dict[str, Any]
) -> np.ndarray:
    """Two samples, in few steps where the pipeline lets their number be chosen.

    What the pipeline or a feature network refuses shows now, and not after hours. ValueError as
    from `draw`.
    """
    labels = None if labels is None else labels[:2]
    seeds = range(seed, seed + (2 if labels is None else len(labels)))
    steps = options.get("num_inference_steps")
    if "num_inference_steps" in sampling_options(pipeline) and (steps is None or steps > 2):
        try:
            return draw(pipeline, seeds, labels, **{**options, "num_inference_steps": 2})
        # A GAN has few steps, and takes neither fewer nor more: as asked for, then.
        except ValueError:
            return draw(pipeline, seeds, labels, **options)
    return draw(pipeline, seeds, labels, **options)


def _chunk_file(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start:08d}-{stop:08d}.npz"


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def _draw_chunk(
    pipeline: DiffusionPipeline, path: Path, wanted: dict[str, np.ndarray], options: dict[str, Any]
) -> None:
    """Draw and write a chunk, unless the file holds the samples of these seeds and labels."""
    if path.is_file():
        try:
            there = _read(path)
        # Damaged: draw it again.
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            there = {}
        if set(there) >= DRAWN and set(there) - DRAWN == set(wanted):
            if all(np.array_equal(there[name], array) for name, array in wanted.items()):
                return
    began = time.perf_counter()
    samples = draw(pipeline, wanted["seeds"].tolist(), wanted.get("labels"), **options)
    arrays = {**wanted, "images": samples, "seconds": np.array(time.perf_counter() - began)}
    write_whole(path, lambda file: np.savez(file, **arrays))

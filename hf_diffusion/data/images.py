"""Images and labels for training: Hub data set, folder, parquet, zip or digits -> (B, C, H, W) in [-1, 1].

Letters: B batch, C channels, H height, W width. Nothing here holds a position or a generator: a batch is a function of
the (epoch, index) pairs that the trainer asks for, so there is no loader state to save.
"""

import hashlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from torch import Tensor

from hf_diffusion.data.decoding import (
    PIL_MODES,
    PROBED_IMAGES,
    BadData,
    CorruptImage,
    Decoded,
    ImageTransform,
    RowDecoder,
    choose_transform,
    draws,
    encoded_bytes,
    to_network_range,
    too_many_bad,
)
from hf_diffusion.data.sources import find_image_column, find_label_column, open_source, read_labels
from hf_diffusion.data.streaming import StreamingImageData


logger = logging.getLogger(__name__)

CACHE_SHARE = 0.25  # of the available memory, for the decoded images of all processes on this machine together


class ImageData:
    """A map-style set of images of one size; decoded images are kept in memory as integers where they fit.

    A corrupt image is replaced by the next good one (index + 1, + 2, ..., wrapping round), with that one's label.
    With several processes each keeps its own images: after a first epoch it holds those that it met, and later batches
    decode no more images than those of the first epoch did, until all are held.

    Attributes: `channels`, `size` (H, W), `class_names` (None without labels), `num_classes` (None without labels),
    `labels` (int64 (len,) or None), `name`, `fingerprint` (hash of a sample of the images, of labels and transform, the
    same on any machine), `skipped` (corrupt images met by this process), `complete` (all images are decoded in memory).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: ImageTransform,
        *,
        name: str,
        image_column: str,
        labels: np.ndarray | None,
        class_names: list[str] | None,
        random_flip: bool,
        seed: int,
        max_bad_images: int,
        cache_bytes: int | None,
        facts: dict[str, Any],
    ):
        self.transform, self.channels, self.size = transform, transform.channels, transform.size
        self.name, self.class_names, self.labels = name, class_names, labels
        self.num_classes = len(class_names) if class_names else None
        self._random_flip, self._seed, self._max_bad_images = random_flip, seed, max_bad_images
        self._facts, self._bad = facts, {}
        dataset = dataset.select_columns([image_column])
        self._decoder = RowDecoder(dataset, image_column, transform, seed, max_bad_images)
        self.fingerprint = self._hash()
        shape = (len(dataset), self.channels, *self.size)
        dtype = np.dtype(np.uint8 if transform.bits == 8 else np.uint16)
        limit = _cache_limit() if cache_bytes is None else cache_bytes
        fits = not transform.varies and int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= limit
        # allocated lazily by the system, page by page as images come in
        self._cache = np.empty(shape, dtype) if fits else None
        self._sources = np.full(len(dataset), -1, np.int64)  # whose image a row of the cache holds, -1 for none yet
        self._missing = len(dataset)
        self._sweep = 0  # where the search for images to top a request up with goes on

    def __len__(self) -> int:
        return len(self._decoder)

    @property
    def skipped(self) -> int:
        """Corrupt images that this process met and replaced."""
        return len(self._bad)

    @property
    def complete(self) -> bool:
        """Whether every image is decoded in memory."""
        return self._missing == 0

    def describe(self) -> dict[str, Any]:
        """Return what a config or a card records about the data, as plain values."""
        return {
            "name": self.name,
            "streaming": False,
            "images": len(self),
            **self._facts,
            **self.transform.describe(),
            "random_flip": self._random_flip,
            "class_names": self.class_names,
            "skipped_images": self.skipped,
            "kept_in_memory": self._cache is not None,
            "fingerprint": self.fingerprint,
        }

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> dict[str, Tensor]:
        """Return {"pixels": float32 (B, C, H, W) in [-1, 1], "indices": int64 (B,), "labels": int64 (B,)}.

        Without labels in the data there is no "labels". `epoch` is one number or one for each index. "indices" names the
        images shown: another than asked where that one is corrupt. IndexError for an index outside 0..len-1; ValueError
        if too many images are corrupt.
        """
        epochs = np.broadcast_to(np.asarray(epoch), len(indices)).tolist()
        pairs = list(zip(epochs, map(int, indices)))
        request = self._request(pairs)
        return self._assemble(pairs, request, self._decoder.__getitems__(request))

    def _request(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the (epoch, index) pairs to decode for a batch: those not in memory, topped up to its size."""
        for _, index in pairs:
            if not 0 <= index < len(self):
                raise IndexError(f"index {index} is not in the data set {self.name!r}, which has 0..{len(self) - 1}")
        if self._cache is None:
            return pairs
        request = {index: epoch for epoch, index in pairs if self._sources[index] < 0}
        while len(request) < len(pairs) and self._sweep < len(self):
            if self._sources[self._sweep] < 0:
                request.setdefault(self._sweep, 0)
            self._sweep += 1
        return [(epoch, index) for index, epoch in request.items()]

    def _assemble(self, pairs: list, request: list, decoded: Decoded) -> dict[str, Tensor]:
        self.record(decoded.bad)
        if decoded.error:
            raise BadData(decoded.error)
        epochs, indices = np.array(pairs, np.int64).reshape(-1, 2).T
        pixels, sources = decoded.pixels, decoded.sources
        if self._cache is not None:
            if request:
                places = [index for _, index in request]
                self._missing -= int((self._sources[places] < 0).sum())
                self._cache[places], self._sources[places] = pixels, sources
            pixels, sources = self._cache[indices], self._sources[indices]
        if self._random_flip:
            flipped = draws(self._seed, epochs, indices, 0) < 0.5
            pixels[flipped] = pixels[flipped][..., ::-1]
        batch = {"pixels": to_network_range(pixels), "indices": torch.from_numpy(sources.copy())}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[sources])
        return batch

    def record(self, bad: dict[int, str]) -> None:
        """Count corrupt images (index -> name and reason), warn of the first few; ValueError beyond max_bad_images."""
        for index, reason in bad.items():
            if index not in self._bad and len(self._bad) < 5:
                logger.warning("skipped a corrupt image: %s", reason)
            self._bad[index] = reason
        if len(self._bad) > self._max_bad_images:
            raise too_many_bad(self._bad, self._max_bad_images)

    def _hash(self) -> str:
        """Hash 256 evenly spaced encoded images, all labels and the transform; no path or time enters."""
        digest = hashlib.sha256(repr((len(self), self.transform, self._random_flip, self.class_names)).encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        dataset, column = self._decoder.dataset, self._decoder.column
        for index in _evenly(len(self), 256):
            try:
                digest.update(encoded_bytes(dataset[index][column]))
            except CorruptImage:
                digest.update(b"corrupt")
        return digest.hexdigest()[:16]


def batches(
    data: ImageData,
    position_batches: Iterable[list[tuple[int, int]]],
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Yield `data.fetch` of each list of (epoch, index) pairs, in their order, which no `num_workers` changes.

    Worker processes decode ahead while images are missing in memory, and end when all are there. `position_batches`
    may be endless; it is read in this process, a few batches ahead of what was yielded.
    """
    pin = pin_memory and torch.cuda.is_available()
    pending, ahead = iter(position_batches), deque()
    if num_workers > 0 and not data.complete:
        decoded_batches = iter(_worker_loader(data, pending, ahead, num_workers))
        for decoded in decoded_batches:
            pairs, request = ahead.popleft()
            yield _pinned(data._assemble(pairs, request, decoded), pin)
            if data.complete:
                break
        del decoded_batches  # ends the workers
    for pairs in itertools.chain((pairs for pairs, _ in ahead), pending):
        yield _pinned(data.fetch([index for _, index in pairs], [epoch for epoch, _ in pairs]), pin)


def _worker_loader(data: ImageData, pending: Iterator, ahead: deque, num_workers: int) -> torch.utils.data.DataLoader:
    def requests() -> Iterator[list[tuple[int, int]]]:
        for pairs in pending:
            ahead.append((pairs, data._request(pairs)))
            yield ahead[-1][1]

    # Workers only decode: they return integers as numpy arrays, which travel by pipe and need no /dev/shm (64 MB in
    # many containers), and this process keeps the images, so every start method works and corrupt ones are all counted.
    return torch.utils.data.DataLoader(
        data._decoder,
        batch_sampler=requests(),
        num_workers=num_workers,
        collate_fn=_as_decoded,
        generator=torch.Generator(),  # the loader draws a seed, which must not move the global generator
    )


def _as_decoded(decoded: Decoded) -> Decoded:
    return decoded


def _pinned(batch: dict[str, Tensor], pin: bool) -> dict[str, Tensor]:
    return {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    center_crop: bool = True,
    random_flip: bool = False,
    channels: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    max_bad_images: int = 100,
    seed: int = 0,
    cache_bytes: int | None = None,
    shuffle_buffer: int = 1000,
) -> ImageData | StreamingImageData:
    """Open a set of images; columns, classes, channels and size come from the data where they are not given.

    `dataset_name` is a Hub id or "digits" (scikit-learn's 8x8 digits), `train_data_dir` a folder of images (sub-folders
    are classes) or of parquet files, a .parquet or a .zip file. `label_column` None takes a ClassLabel column, or an
    integer or string column called `label`; "none" takes no labels. `resolution` (a side or (H, W)) resizes with the
    aspect kept, then crops. `max_train_samples` takes evenly spaced images, of a stream the first ones. `cache_bytes`
    limits the decoded images kept in memory (None: a quarter of what is available, 0: none). `shuffle_buffer` counts
    rows of a stream.

    ValueError in one sentence for data that are missing, empty, of mixed size, wrongly labelled or unreadable beyond
    `max_bad_images`; ConnectionError if the Hub cannot be reached.
    """
    resolution = _checked_options(resolution, channels, max_train_samples, max_bad_images)
    source = open_source(dataset_name, dataset_config_name, train_data_dir, split, streaming, cache_dir)
    dataset, features = source.dataset, source.dataset.features
    if not streaming and not len(dataset):
        raise ValueError(f"the data set {source.name!r} is empty in split {split!r}; choose another split or data set")
    if features is None:
        raise ValueError(f"the columns of {source.name!r} are unknown while streaming; load it with streaming=False")
    image_column = find_image_column(features, image_column)
    label_column = find_label_column(features, label_column)
    labels, class_names = None, None
    if label_column is not None and streaming:
        class_names = _stream_classes(features, label_column)
    elif label_column is not None:
        labels, class_names = read_labels(dataset, label_column)
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if max_train_samples is not None:
        dataset, labels = _limited(dataset, labels, max_train_samples)
    rows = _probe_order(dataset, image_column)
    transform, bad, found = choose_transform(rows, resolution, channels, center_crop, max_bad_images)
    remarks = [text for text in (source.remark, *found) if text]
    for text in found:
        logger.warning("%s: %s", source.name, text)
    common = {
        "name": source.name,
        "image_column": image_column,
        "class_names": class_names,
        "random_flip": random_flip,
        "seed": seed,
        "max_bad_images": max_bad_images,
        "facts": {"split": split, "image_column": image_column, "label_column": label_column, "remarks": remarks},
    }
    if streaming:
        return StreamingImageData(
            dataset, transform, label_column=label_column, shuffle_buffer=shuffle_buffer, **common
        )
    data = ImageData(dataset, transform, labels=labels, cache_bytes=cache_bytes, **common)
    data.record(bad)
    return data


def _checked_options(
    resolution: int | Sequence[int] | None, channels: int | None, max_train_samples: int | None, max_bad_images: int
) -> tuple[int, int] | None:
    """Return the resolution as (H, W); ValueError for a value that no data could satisfy."""
    if channels not in (None, *PIL_MODES):
        raise ValueError(f"channels={channels} is not possible; choose 1, 3 or 4, or leave it out to take the data's")
    for option, value, least in (("max_train_samples", max_train_samples, 1), ("max_bad_images", max_bad_images, 0)):
        if value is not None and value < least:
            raise ValueError(f"{option}={value} is not possible; it must be at least {least}")
    if resolution is None:
        return None
    sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"resolution={resolution!r} is not possible; pass a side or (height, width) above 0")
    return sides


def _limited(dataset: Any, labels: np.ndarray | None, count: int) -> tuple[Any, np.ndarray | None]:
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(count), labels
    kept = _evenly(len(dataset), count)
    return dataset.select(kept), None if labels is None else labels[kept]


def _stream_classes(features: datasets.Features, column: str) -> list[str]:
    if not isinstance(features[column], datasets.ClassLabel):
        raise ValueError(
            f"column {column!r} is of type {features[column]}, whose classes are unknown before the stream was read; "
            "load with streaming=False, choose a ClassLabel column, or pass --label_column none"
        )
    return list(features[column].names)


def _probe_order(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> Iterator[tuple[int, dict]]:
    """Yield (index, undecoded image): of a stream in order, else evenly spaced rows and then all the others."""
    if isinstance(dataset, datasets.IterableDataset):
        yield from ((index, row[column]) for index, row in enumerate(dataset))
        return
    images = dataset.select_columns([column])
    sample = _evenly(len(dataset), PROBED_IMAGES)
    others = (index for index in range(len(dataset)) if index not in set(sample))
    yield from ((index, images[index][column]) for index in itertools.chain(sample, others))


def _evenly(total: int, count: int) -> list[int]:
    """Return up to `count` evenly spaced indices: of a set that is sorted by class they show every class."""
    count = min(total, count)
    return [position * total // count for position in range(count)]


def _cache_limit() -> int:
    """Return the bytes that decoded images may take in this process."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:  # a container's own limit, which psutil does not see
            available = min(available, int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max" for no limit
            continue
    return int(CACHE_SHARE * max(0, available) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

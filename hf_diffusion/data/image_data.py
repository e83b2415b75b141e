"""A set of images that is read by index.

Nothing here holds a position or a generator: a batch is a function of the (epoch, index) pairs that
the trainer asks for, so there is no loader state to save.

Letters: B batch, C channels, H height, W width.
"""

import hashlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from hf_diffusion.data.augmentation import FLIP, draws
from hf_diffusion.data.captions import Captions
from hf_diffusion.data.decoding import encoded_bytes
from hf_diffusion.data.errors import BadData, CorruptImage, too_many_bad
from hf_diffusion.data.memory import cache_limit
from hf_diffusion.data.pixels import image_samples, to_network_range
from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.data.row_decoder import Decoded, Request, RowDecoder
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.data.transforms import ImageTransform
from hf_diffusion.figures.grid import labelled_grid
from hf_diffusion.randomness import BatchOrder


logger = logging.getLogger(__name__)


class ImageData(TrainingData):
    """A set of images of one size; decoded ones are kept in memory as integers where they fit.

    With several processes each keeps its own images: after a first epoch it holds those that it
    met, and later batches decode no more images than those of the first epoch did, until all are
    held.

    Beside what all data have: `channels`, `size` (H, W), `skipped` (corrupt images met by this
    process), `altered` (images met whose format the set's cannot hold) and `complete` (all images
    are decoded in memory). `fingerprint` is a hash of a sample of the images, of labels and
    transform; no path or time enters.
    """

    kind = "images"
    picture = staticmethod(labelled_grid)
    to_samples = staticmethod(image_samples)

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
        captions: Captions | None = None,
    ):
        self.captions = captions
        self.transform, self.channels, self.size = transform, transform.channels, transform.size
        self.name, self.class_names, self.labels = name, class_names, labels
        self.num_samples, self.sample_shape = len(dataset), (transform.channels, *transform.size)
        self._random_flip, self._seed, self._max_bad_images = random_flip, seed, max_bad_images
        self._facts, self._bad, self._altered = facts, {}, {}
        dataset = dataset.select_columns([image_column])
        self._decoder = RowDecoder(dataset, image_column, transform, seed, max_bad_images)
        self.fingerprint = self._hash()
        shape = (len(dataset), *self.sample_shape)
        dtype = np.dtype(np.uint8 if transform.bits == 8 else np.uint16)
        limit = cache_limit() if cache_bytes is None else cache_bytes
        fits = not transform.varies and int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= limit
        # Allocated lazily by the system, page by page as images come in.
        self._cache = np.empty(shape, dtype) if fits else None
        # Whose image a row of the cache holds, -1 for none yet.
        self._sources = np.full(len(dataset), -1, np.int64)
        self._missing = len(dataset)
        # Where the search for images to top a request up with goes on.
        self._sweep = 0
        # The training reads ahead in a thread of its own, beside whoever measures.
        self._keeping = threading.Lock()

    @property
    def skipped(self) -> int:
        """Corrupt images that this process met and replaced."""
        return len(self._bad)

    @property
    def altered(self) -> int:
        """Images that this process met whose format the set's cannot hold."""
        return len(self._altered)

    @property
    def complete(self) -> bool:
        """Whether every image is decoded in memory."""
        return self._missing == 0

    def describe(self) -> dict[str, Any]:
        """Return what a config or a card records about the data, as plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "streaming": False,
            "images": len(self),
            **self._facts,
            **self.transform.describe(),
            "random_flip": self._random_flip,
            "class_names": self.class_names,
            "skipped_images": self.skipped,
            "altered_images": self.altered,
            "kept_in_memory": self._cache is not None,
            "fingerprint": self.fingerprint,
            **({} if self.captions is None else {"captions": self.captions.describe()}),
        }

    def form(self) -> dict[str, Any]:
        return self.transform.form() | super().form()

    def batches(self, order: BatchOrder, start_step: int, total_steps: int, num_workers: int = 0) -> Iterator[Batch]:
        return batches(self, order.positions(start_step, total_steps), num_workers)

    def once(self, batch_size: int, limit: int | None = None, num_workers: int = 0) -> Iterator[Batch]:
        chosen = [(0, index) for index in evenly_spaced(len(self), limit)]
        starts = range(0, len(chosen), batch_size)
        yield from batches(self, (chosen[start : start + batch_size] for start in starts), num_workers)

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """Return "x_0" float32 (B, C, H, W) in [-1, 1], "indices" and "labels" int64 (B,).

        Without labels in the data there is no "labels". With captions "captions" int64 (B,) are
        numbers of `captions.texts`, beside what the coder of `encode_captions` makes of them.
        `epoch` is one number or one for each index. "indices" names the images shown: another than
        asked where that one is corrupt. IndexError for an index outside 0..len-1; ValueError if too
        many images are corrupt.
        """
        epochs = np.broadcast_to(np.asarray(epoch), len(indices)).tolist()
        pairs = list(zip(epochs, map(int, indices)))
        return self.collate(pairs, self._decoder.__getitems__(self.request(pairs)))

    def request(self, pairs: Request) -> Request:
        """Return the pairs to decode for a batch: those not in memory, topped up to its size."""
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

    def collate(self, pairs: Request, decoded: Decoded) -> Batch:
        """Keep what was decoded for `request(pairs)`, and make the batch."""
        self.record(decoded.bad, decoded.altered)
        if decoded.error:
            raise BadData(decoded.error)
        epochs, indices = np.array(pairs, np.int64).reshape(-1, 2).T
        pixels, sources = decoded.pixels, decoded.sources
        if self._cache is not None:
            with self._keeping:
                self._missing -= int((self._sources[decoded.indices] < 0).sum())
                self._cache[decoded.indices], self._sources[decoded.indices] = pixels, sources
            pixels, sources = self._cache[indices], self._sources[indices]
        if self._random_flip:
            flipped = draws(self._seed, epochs, indices, FLIP) < 0.5
            pixels[flipped] = pixels[flipped][..., ::-1]
        batch = {"x_0": to_network_range(pixels), "indices": torch.from_numpy(sources.copy())}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[sources])
        return batch | self.captions_of(epochs, sources)

    def record(self, bad: dict[int, str], altered: dict[int, str] | None = None) -> None:
        """Count images by index and warn of the first; ValueError beyond max_bad_images."""
        for index, reason in bad.items():
            if index not in self._bad and len(self._bad) < 5:
                logger.warning("skipped a corrupt image: %s", reason)
            self._bad[index] = reason
        if altered and not self._altered:
            logger.warning("%s (further ones are counted)", next(iter(altered.values())))
        self._altered |= altered or {}
        if len(self._bad) > self._max_bad_images:
            raise too_many_bad(self._bad, self._max_bad_images)

    def _hash(self) -> str:
        described = f"({len(self)}, {self.transform.identity}, {self._random_flip}, {self.class_names!r})"
        digest = hashlib.sha256(described.encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        if self.captions is not None:
            digest.update(self.captions.digest())
        dataset, column = self._decoder.dataset, self._decoder.column
        for index in evenly_spaced(len(self), 256):
            try:
                digest.update(encoded_bytes(dataset[index][column]))
            except CorruptImage:
                digest.update(b"corrupt")
        return digest.hexdigest()[:16]


def batches(data: ImageData, position_batches: Iterable[Request], num_workers: int = 0) -> Iterator[Batch]:
    """Yield `data.fetch` of each list of (epoch, index) pairs; no `num_workers` changes anything.

    Worker processes decode ahead while images are missing in memory, and end when all are there.
    `position_batches` may be endless; it is read in this process, a few batches ahead of what was
    yielded.
    """
    pending, ahead = iter(position_batches), deque()
    if num_workers > 0 and not data.complete:
        decoded_batches = iter(_worker_loader(data, pending, ahead, num_workers))
        for decoded in decoded_batches:
            yield data.collate(ahead.popleft(), decoded)
            if data.complete:
                break
        # Ends the workers.
        del decoded_batches
    for pairs in itertools.chain(ahead, pending):
        yield data.fetch([index for _, index in pairs], [epoch for epoch, _ in pairs])


def _worker_loader(data: ImageData, pending: Iterator, ahead: deque, num_workers: int) -> torch.utils.data.DataLoader:
    def requests() -> Iterator[Request]:
        for pairs in pending:
            ahead.append(pairs)
            yield data.request(pairs)

    # Workers only decode: they return integers as numpy arrays, which travel by pipe and need no
    # /dev/shm (64 MB in many containers), and this process keeps the images, so every start method
    # works and corrupt ones are all counted.
    return torch.utils.data.DataLoader(
        data._decoder,
        batch_sampler=requests(),
        num_workers=num_workers,
        collate_fn=_as_decoded,
        # The loader draws a seed, which must not move the global generator.
        generator=torch.Generator(),
    )


def _as_decoded(decoded: Decoded) -> Decoded:
    return decoded

"""Images read while training, from a set that is neither downloaded first nor held in memory."""

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_diffusion.data.augmentation import CROP_X, CROP_Y, FLIP, draws
from hf_diffusion.data.captions import CaptionCoder, StreamedCaptions, number_of
from hf_diffusion.data.columns import check_label
from hf_diffusion.data.decoding import deviation, encoded_bytes, image_name, open_image, to_pixels
from hf_diffusion.data.errors import BadData, CorruptImage, too_many_bad
from hf_diffusion.data.pixels import image_samples, to_network_range
from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.data.transforms import ImageTransform
from hf_diffusion.figures.grid import labelled_grid
from hf_diffusion.randomness import BatchOrder


logger = logging.getLogger(__name__)


class StreamingImageData(TrainingData):
    """An endless shuffled stream of images, the same for any number of processes.

    Every process reads the whole stream and decodes only its own rows, so that the order does not
    depend on their number. With W processes the set is read W times. Order is shuffled through a
    buffer seeded by (seed, epoch). A corrupt image is replaced by the next good one of the stream,
    which is then seen twice, with its own caption.

    Beside what all data have: `channels`, `size` (H, W), `skipped` (corrupt images met by this
    process) and `epoch_length`, which is None until a whole epoch has been read. `fingerprint` is
    of the first rows and the transform.
    """

    kind = "images"
    num_samples = None
    picture = staticmethod(labelled_grid)
    to_samples = staticmethod(image_samples)

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: ImageTransform,
        *,
        name: str,
        image_column: str,
        label_column: str | None,
        class_names: list[str] | None,
        random_flip: bool,
        seed: int,
        max_bad_images: int,
        shuffle_buffer: int,
        facts: dict[str, Any],
        captions: StreamedCaptions | None = None,
    ):
        self.captions = captions
        self.transform, self.channels, self.size = transform, transform.channels, transform.size
        self.name, self.class_names, self.sample_shape = name, class_names, (transform.channels, *transform.size)
        self.epoch_length: int | None = None
        self._dataset, self._image_column, self._label_column = dataset, image_column, label_column
        self._stored_names = class_names
        self._random_flip, self._seed, self._max_bad_images = random_flip, seed, max_bad_images
        self._shuffle_buffer, self._facts, self._bad = shuffle_buffer, facts, {}
        # Whether an image was met whose format the set's cannot hold.
        self._altered = False
        self.fingerprint = self._hash()

    @property
    def skipped(self) -> int:
        """Corrupt images that this process met and replaced."""
        return len(self._bad)

    def describe(self) -> dict[str, Any]:
        """Return what a config or a card records about the data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "streaming": True,
            "shuffle_buffer": self._shuffle_buffer,
            "images": self.epoch_length,
            **self._facts,
            **self.transform.describe(),
            "random_flip": self._random_flip,
            "class_names": self.class_names,
            "skipped_images": self.skipped,
            "fingerprint": self.fingerprint,
            **({} if self.captions is None else {"captions": self.captions.describe()}),
        }

    def form(self) -> dict[str, Any]:
        return self.transform.form() | super().form()

    def encode_captions(self, coder: CaptionCoder) -> None:
        """Let batches hold what `coder` makes of their captions, batch by batch."""
        self.caption_coder = coder

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """TypeError: the images of a stream have no numbers to ask for them by."""
        raise TypeError(f"{self.name} is streamed and cannot be read by index; load it with streaming=False")

    def batches(self, order: BatchOrder, start_step: int, total_steps: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches; the stream counts its own way to their place."""
        position = start_step * order.total
        micro_batches = self.stream(position, order.rank, order.processes, order.batch_size, num_workers)
        yield from itertools.islice(micro_batches, (total_steps - start_step) * order.accumulation)

    def once(self, batch_size: int, limit: int | None = None, num_workers: int = 0) -> Iterator[Batch]:
        seen = 0
        for batch in self.stream(0, batch_size=batch_size, num_workers=num_workers):
            # The length is known once the stream has begun anew.
            left = min(number for number in (self.epoch_length, limit, seen + batch_size) if number) - seen
            if left <= 0:
                return
            seen += batch_size
            yield {name: values[:left] for name, values in batch.items()}

    def stream(
        self, start_position: int, rank: int = 0, world: int = 1, batch_size: int = 1, num_workers: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Yield batches endlessly; their "indices" are positions in the global stream.

        Batch k of this process holds the positions start_position + (k * world + rank) * batch_size
        + 0, 1, ... Resuming reads and discards the rows before `start_position` without decoding
        them, and one whole epoch if the start lies beyond the first and `epoch_length` is not
        known. `num_workers` > 0 threads decode, with one more reading ahead.
        """
        if not 0 <= rank < world or batch_size < 1 or start_position < 0:
            raise ValueError(
                f"got start_position={start_position}, rank={rank}, world={world}, batch_size={batch_size}; "
                "allowed are start_position >= 0, 0 <= rank < world and batch_size >= 1"
            )
        if num_workers == 0:
            yield from self._batches(start_position, rank, world, batch_size, map)
            return
        with ThreadPoolExecutor(num_workers) as pool:
            yield from read_ahead(self._batches(start_position, rank, world, batch_size, pool.map))

    def _batches(self, position: int, rank: int, world: int, batch_size: int, mapper: Any) -> Iterator[dict]:
        rows, pending = self._rows(position), deque()
        while True:
            own = range(rank * batch_size, (rank + 1) * batch_size)
            pending.extend(itertools.islice(rows, max(0, own.stop - len(pending))))
            decoded = list(mapper(self._decode, [pending[offset] for offset in own]))
            chosen = [pending[offset] for offset in own]
            for place, offset in enumerate(own):
                while isinstance(decoded[place], str):
                    self._record(chosen[place], decoded[place])
                    offset += 1
                    pending.extend(itertools.islice(rows, max(0, offset + 1 - len(pending))))
                    chosen[place] = pending[offset]
                    decoded[place] = self._decode(pending[offset])
            yield self._collate(decoded, chosen, position + rank * batch_size)
            for _ in range(world * batch_size):
                pending.popleft() if pending else next(rows)
            position += world * batch_size

    def _decode(self, entry: tuple[int, int, dict]) -> np.ndarray | str:
        """Return the pixels, flipped as (seed, epoch, place) says, or why there are none."""
        epoch, place, row = entry
        here = np.array([epoch]), np.array([place])
        flip, *crop = (draws(self._seed, *here, purpose)[0] for purpose in (FLIP, CROP_X, CROP_Y))
        crop = tuple(crop) if self.transform.varies else (0.5, 0.5)
        encoded = row[self._image_column]
        name = f"{image_name(encoded, place)} of the shuffled epoch {epoch}"
        try:
            image = open_image(encoded)
            pixels = to_pixels(image, self.transform, name, crop)
        except CorruptImage as error:
            return f"{name}: {error}"
        if not self._altered and (change := deviation(image, self.transform)):
            self._altered = True
            logger.warning("%s: %s (there may be more)", name, change)
        return pixels[..., ::-1] if self._random_flip and flip < 0.5 else pixels

    def _record(self, entry: tuple[int, int, dict], reason: str) -> None:
        encoded = entry[2][self._image_column] or {"path": None, "bytes": None}
        key = (encoded["path"], hash(encoded["bytes"]))  # rows of a shuffled stream have no number of their own
        if key in self._bad:
            return
        self._bad[key] = reason
        if len(self._bad) > self._max_bad_images:
            raise too_many_bad(self._bad, self._max_bad_images)
        if len(self._bad) <= 5:
            logger.warning("skipped a corrupt image: %s", reason)

    def _collate(self, decoded: list[np.ndarray], chosen: list[tuple], first: int) -> dict[str, Tensor]:
        batch = {
            "x_0": to_network_range(np.stack(decoded)),
            "indices": torch.arange(first, first + len(decoded)),
        }
        if self.class_names is not None:
            labels = [
                check_label(row[self._label_column], self._stored_names, self._label_column, f"row {place}")
                for _, place, row in chosen
            ]
            numbers = labels if self.renumbered is None else self.renumbered[labels]
            batch["labels"] = torch.as_tensor(numbers, dtype=torch.int64)
        if self.captions is not None:
            texts = [self.captions.choose(row, epoch, place) for epoch, place, row in chosen]
            batch["captions"] = torch.tensor([number_of(text) for text in texts])
            batch |= {} if self.caption_coder is None else self.caption_coder.conditions_of(texts)
        return batch

    def _rows(self, position: int) -> Iterator[tuple[int, int, dict]]:
        """Yield (epoch, place in the epoch, row) from a global position on."""
        epoch, skip = 0, position
        while True:
            if self.epoch_length:
                epoch, skip = epoch + skip // self.epoch_length, skip % self.epoch_length
            order = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            place = -1
            for place, row in enumerate(self._dataset.shuffle(seed=order, buffer_size=self._shuffle_buffer)):
                if place >= skip:
                    yield epoch, place, row
            if place < 0:
                raise BadData(f"the data set {self.name!r} is empty; check its split")
            self.epoch_length = place + 1
            epoch, skip = epoch + 1, max(0, skip - self.epoch_length)

    def _hash(self) -> str:
        digest = hashlib.sha256(f"({self.transform.identity}, {self._random_flip}, {self.class_names!r})".encode())
        for row in self._dataset.take(16):
            try:
                digest.update(encoded_bytes(row[self._image_column]))
            except CorruptImage:
                digest.update(b"corrupt")
            if self.captions is not None:
                digest.update("\n".join(self.captions.of_row(row)).encode())
        return digest.hexdigest()[:16]


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, two of which a thread reads before they are asked for."""
    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(next, batches, None) for _ in range(2))
        try:
            while (batch := ahead.popleft().result()) is not None:
                yield batch
                ahead.append(reader.submit(next, batches, None))
        finally:
            reader.shutdown(cancel_futures=True)

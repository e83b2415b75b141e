"""Decoding rows of a table: what a worker process does.

Letters: C channels, H height, W width.
"""

from typing import NamedTuple

import datasets
import numpy as np
import torch

from hf_diffusion.data.augmentation import CROP_X, CROP_Y, draws
from hf_diffusion.data.decoding import deviation, image_name, open_image, to_pixels
from hf_diffusion.data.errors import BadData, CorruptImage, too_many_bad
from hf_diffusion.data.transforms import ImageTransform


# Pairs of (epoch, index).
Request = list[tuple[int, int]]


class Decoded(NamedTuple):
    """What a worker makes of a request, in its order.

    indices: (rows,) what was asked for.
    pixels: (rows, C, H, W) uint8 or uint16.
    sources: (rows,) whose image each row shows: another than asked where the asked one is corrupt.
    bad, altered: index -> name and reason, of corrupt images and of those that the set's format
        cannot hold.
    error: why the set cannot be used at all.
    """

    indices: np.ndarray
    pixels: np.ndarray
    sources: np.ndarray
    bad: dict[int, str]
    altered: dict[int, str]
    error: str | None = None


class RowDecoder(torch.utils.data.Dataset):
    """Decodes rows of a table; what a worker process holds, free of state.

    A corrupt image is replaced by the next good one (index + 1, + 2, ..., wrapping round), whoever
    asks for it.
    """

    def __init__(
        self, dataset: datasets.Dataset, column: str, transform: ImageTransform, seed: int, max_bad_images: int
    ):
        self.dataset, self.column, self.transform = dataset, column, transform
        self.seed, self.max_bad_images = seed, max_bad_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, request: Request) -> Decoded:
        """Decode (epoch, index) pairs; torch's DataLoader asks for whole batches by this name."""
        epochs, indices = np.array(request, np.int64).reshape(-1, 2).T
        dtype = np.uint8 if self.transform.bits == 8 else np.uint16
        pixels = np.empty((len(request), self.transform.channels, *self.transform.size), dtype)
        decoded = Decoded(indices, pixels, np.empty(len(request), np.int64), {}, {})
        crops = [(0.5, 0.5)] * len(request)
        if self.transform.varies:
            crops = list(zip(*(draws(self.seed, epochs, indices, axis).tolist() for axis in (CROP_X, CROP_Y))))
        rows = self.dataset[indices.tolist()][self.column] if request else []
        try:
            for place, (index, row) in enumerate(zip(indices.tolist(), rows)):
                pixels[place], decoded.sources[place] = self._next_good(index, row, crops[place], decoded)
        # As a value: an exception of a worker process arrives as the text of its traceback.
        except ValueError as error:
            return decoded._replace(error=str(error))
        return decoded

    def _next_good(self, asked: int, row: dict, crop: tuple[float, float], decoded: Decoded) -> tuple[np.ndarray, int]:
        for offset in range(len(self)):
            index = (asked + offset) % len(self)
            row = row if offset == 0 else self.dataset[index][self.column]
            name = image_name(row, index)
            try:
                image = open_image(row)
                pixels = to_pixels(image, self.transform, name, crop)
            except CorruptImage as error:
                decoded.bad[index] = f"{name}: {error}"
                if len(decoded.bad) > self.max_bad_images:
                    raise too_many_bad(decoded.bad, self.max_bad_images) from error
                continue
            if change := deviation(image, self.transform):
                decoded.altered[index] = f"{name}: {change}"
            return pixels, index
        raise BadData(f"no image can be decoded: {'; '.join(list(decoded.bad.values())[:5])}")

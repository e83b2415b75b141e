"""From an encoded image (a file or bytes in a table) to integer pixels of one shape, and the draws of augmentation.

Letters: C channels, H height, W width.
"""

import functools
import io
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps


PROBED_IMAGES = 64  # enough to meet the rare grey or transparent image of a colour set, decoded in about a second
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Pillow converts these to "L", "RGB" and "RGBA" directly; everything else (CMYK, YCbCr, HSV, ...) goes through "RGB"
DIRECT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}


class CorruptImage(Exception):
    """One image cannot be decoded; the set as a whole may still be fine."""


class BadData(ValueError):
    """The set cannot be used; raised in one sentence, also in the middle of a run."""


@dataclass(frozen=True)
class ImageTransform:
    """What every image of a set becomes: (C, H, W) pixels of 8 or 16 bits, resized and cropped or as they are."""

    channels: int
    size: tuple[int, int]  # (H, W)
    bits: int
    resize: bool
    center_crop: bool

    def describe(self) -> dict[str, Any]:
        """Return the transform as plain values for a card or a config."""
        resize = "none, the images have this size"
        if self.resize:
            crop = "centre crop" if self.center_crop else "random crop"
            resize = f"aspect kept, bicubic with antialiasing (Pillow) to cover the target, then {crop}"
        return {"channels": self.channels, "size": list(self.size), "bits": self.bits, "resize": resize}

    @property
    def varies(self) -> bool:
        """Whether the same image gives other pixels in another epoch, so that they cannot be kept."""
        return self.resize and not self.center_crop


class Decoded(NamedTuple):
    """Rows decoded for a request, in its order."""

    pixels: np.ndarray  # (rows, C, H, W) uint8 or uint16
    sources: (
        np.ndarray
    )  # (rows,) the index whose image each row shows: another than asked where the asked one is corrupt
    bad: dict[int, str]  # index -> name and reason of the corrupt images met
    error: str | None  # why the set cannot be used at all


def draws(seed: int, epochs: np.ndarray, indices: np.ndarray, purpose: int) -> np.ndarray:
    """Return one number in [0, 1) for each (epoch, index), a function of (seed, epoch, index, purpose) alone.

    A counter-based generator (the SplitMix64 finalizer, Steele et al. 2014, OOPSLA) instead of a stateful one: the
    augmentation of an image does not depend on the batch, worker or process that asks for it.
    """
    state = np.full(len(indices), (seed * 8 + purpose) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for value in (epochs, indices):
        state = (state ^ np.asarray(value, dtype=np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=4)
def _zip_archive(path: str, process: int) -> zipfile.ZipFile:
    # one handle for each process: forked workers that share a file offset read each other's bytes
    return zipfile.ZipFile(path)


def encoded_bytes(row: dict[str, Any] | None) -> bytes:
    """Return the file contents of an undecoded `datasets` image ({"bytes", "path"}), from table, file or zip."""
    try:
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise CorruptImage("no image is stored")
        if row["bytes"] is not None:
            data = row["bytes"]
        elif row["path"].startswith("zip://") and os.path.isfile(archive := row["path"].split("::", 1)[1]):
            data = _zip_archive(archive, os.getpid()).read(row["path"].split("::", 1)[0].removeprefix("zip://"))
        else:
            with datasets.utils.file_utils.xopen(row["path"], "rb") as file:
                data = file.read()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptImage(f"cannot be read: {error}") from error
    if not data:
        raise CorruptImage("the file is empty")
    return data


def open_image(row: dict[str, Any] | None) -> Image.Image:
    """Decode the first frame, turned as its EXIF orientation says; CorruptImage if that is impossible."""
    data = encoded_bytes(row)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise almost any type on broken files
        raise CorruptImage(" ".join(str(error).split()) or type(error).__name__) from error
    return image


def image_name(row: dict[str, Any] | None, index: int) -> str:
    """Return what a person needs to find the image again: its file, if it has one, and its row."""
    path = row["path"] if row else None
    return f"{path} (row {index})" if path else f"row {index}"


def native_format(image: Image.Image, name: str) -> tuple[int, int]:
    """Return the channels (1, 3 or 4) and bits (8 or 16) that keep what the image holds."""
    if image.mode == "F":
        raise BadData(f"{name} has floating-point pixels of unknown range; store images with 8 or 16 bits")
    if image.mode.startswith("I"):
        return 1, 16
    if image.mode in ("1", "L"):
        return 1, 8
    return (4 if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info else 3), 8


def _cover_box(size: tuple[int, int], target: tuple[int, int], crop: tuple[float, float]) -> tuple[float, ...]:
    """Return the largest (left, top, right, bottom) of the target's shape inside an image of `size` (W, H)."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = min(size[0], target[0] / scale), min(size[1], target[1] / scale)
    left, top = (size[0] - width) * crop[0], (size[1] - height) * crop[1]
    return left, top, min(size[0], left + width), min(size[1], top + height)


def to_pixels(
    image: Image.Image, transform: ImageTransform, name: str, crop: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Return (C, H, W) uint8 or uint16 pixels; `crop` in [0, 1] is the place of the crop along x and y.

    Grey becomes colour by repetition, colour grey by ITU-R 601 luma; alpha is dropped unless C = 4 (255 where absent).
    BadData if the image has another size and the transform does not resize.
    """
    height, width = transform.size
    wide = native_format(image, name)[1] == 16
    if wide:
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise BadData(f"{name} has 32-bit pixels outside 0..65535; store images with 8 or 16 bits")
        image = Image.fromarray(values)  # Pillow resizes 32-bit floats with antialiasing, 16-bit modes not reliably
    elif image.mode != PIL_MODES[transform.channels]:
        try:
            image = image if image.mode in DIRECT_MODES else image.convert("RGB")
            image = image.convert(PIL_MODES[transform.channels])
        except ValueError as error:
            raise CorruptImage(str(error)) from error
    if image.size != (width, height):
        if not transform.resize:
            raise BadData(
                f"{name} is {image.height}x{image.width} (HxW) while the set began with {height}x{width}; "
                "pass --resolution to bring all images to one size"
            )
        box = _cover_box(image.size, (width, height), crop)
        # cropping inside resize: one pass, no intermediate rounding; Pillow widens the filter when it shrinks
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    if wide:
        pixels = np.rint(pixels.clip(0, 65535) / (1 if transform.bits == 16 else 257))
        pixels = pixels.astype(np.uint16 if transform.bits == 16 else np.uint8)
    elif transform.bits == 16:
        pixels = pixels.astype(np.uint16) * 257  # 255 * 257 = 65535
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], min(transform.channels, 3), axis=-1)
    if pixels.shape[-1] < transform.channels:
        opaque = np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
        pixels = np.concatenate([pixels, opaque], axis=-1)
    return pixels.transpose(2, 0, 1)


def to_network_range(pixels: np.ndarray) -> torch.Tensor:
    """Return uint8 or uint16 pixels as float32 in [-1, 1]; 0 is -1 and the largest value is 1."""
    half = np.iinfo(pixels.dtype).max / 2
    return torch.from_numpy(pixels.astype(np.float32)).div_(half).sub_(1)


def from_network_range(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8, rounded to the nearest and clamped; undoes `to_network_range` of 8-bit pixels exactly."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def too_many_bad(bad: dict[int, str], limit: int) -> BadData:
    """Return the error for more than `limit` corrupt images, naming the first few."""
    named = "; ".join(list(bad.values())[:5])
    return BadData(f"more than max_bad_images={limit} images cannot be decoded: {named}; repair or remove them")


def choose_transform(
    rows: Iterable[tuple[int, dict[str, Any] | None]],
    resolution: tuple[int, int] | None,
    channels: int | None,
    center_crop: bool,
    max_bad_images: int,
) -> tuple[ImageTransform, dict[int, str], list[str]]:
    """Choose channels, bits and size from the first rows; return the transform, the corrupt rows met and remarks.

    Reads PROBED_IMAGES rows, and more only while none of them could be decoded. Where channels or bits are mixed the
    most general wins. ValueError if sizes differ and no resolution is given, or if nothing can be decoded.
    """
    sizes, formats, modes, bad, animated = {}, [], set(), {}, None
    for count, (index, row) in enumerate(rows):
        if count >= PROBED_IMAGES and sizes:
            break
        try:
            image = open_image(row)
        except CorruptImage as error:
            bad[index] = f"{image_name(row, index)}: {error}"
            if len(bad) > max_bad_images:
                raise too_many_bad(bad, max_bad_images) from error
            continue
        formats.append(native_format(image, image_name(row, index)))
        sizes.setdefault((image.height, image.width), image_name(row, index))
        modes.add(image.mode)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            animated = animated or f"of {image_name(row, index)} only the first of its {frames} frames is used"
    if not sizes:
        raise ValueError(f"no image can be decoded: {'; '.join(list(bad.values())[:5]) or 'the data set is empty'}")
    if resolution is None and len(sizes) > 1:
        (first, first_name), (other, other_name) = list(sizes.items())[:2]
        raise ValueError(
            f"images differ in size: {first_name} is {first[0]}x{first[1]} (HxW), {other_name} is "
            f"{other[0]}x{other[1]}; pass --resolution to bring all images to one size"
        )
    chosen = channels or max(found for found, _ in formats)
    bits = max(bits for _, bits in formats)
    transform = ImageTransform(chosen, resolution or next(iter(sizes)), bits, resolution is not None, center_crop)
    remarks = [animated] if animated else []
    if any((found, depth) != (chosen, bits) for found, depth in formats):
        remarks.append(f"images of modes {sorted(modes)} are brought to {chosen} channels of {bits} bits")
    return transform, bad, remarks


class RowDecoder:
    """Decodes rows of a map-style data set; what a DataLoader worker holds, free of state.

    A corrupt image is replaced by the next good one (index + 1, + 2, ..., wrapping round), whoever asks for it.
    """

    def __init__(
        self, dataset: datasets.Dataset, column: str, transform: ImageTransform, seed: int, max_bad_images: int
    ):
        self.dataset, self.column, self.transform = dataset, column, transform
        self.seed, self.max_bad_images = seed, max_bad_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, request: list[tuple[int, int]]) -> Decoded:
        """Decode a list of (epoch, index); the name is the one by which torch's DataLoader asks for whole batches."""
        dtype = np.uint8 if self.transform.bits == 8 else np.uint16
        pixels = np.empty((len(request), self.transform.channels, *self.transform.size), dtype)
        sources = np.empty(len(request), np.int64)
        bad: dict[int, str] = {}
        rows = self.dataset[[int(index) for _, index in request]][self.column] if request else []
        crops = [(0.5, 0.5)] * len(request)
        if self.transform.varies and request:
            epochs, indices = np.asarray(request).T
            crops = list(zip(*(draws(self.seed, epochs, indices, purpose).tolist() for purpose in (1, 2))))
        for place, ((_, asked), row) in enumerate(zip(request, rows)):
            for index in ((int(asked) + offset) % len(self) for offset in range(len(self))):
                row = row if index == asked else self.dataset[index][self.column]
                try:
                    pixels[place] = to_pixels(open_image(row), self.transform, image_name(row, index), crops[place])
                    sources[place] = index
                    break
                except CorruptImage as error:
                    bad[index] = f"{image_name(row, index)}: {error}"
                    if len(bad) > self.max_bad_images:
                        return Decoded(pixels, sources, bad, str(too_many_bad(bad, self.max_bad_images)))
                except ValueError as error:
                    return Decoded(pixels, sources, bad, str(error))
            else:
                return Decoded(pixels, sources, bad, f"no image can be decoded: {'; '.join(list(bad.values())[:5])}")
        return Decoded(pixels, sources, bad, None)

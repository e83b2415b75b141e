"""From an encoded image (a file or bytes in a table) to integer pixels of one shape.

Letters: C channels, H height, W width.
"""

import io
import os
import re
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hf_diffusion.data.addresses import Unreadable, read_bytes, shown
from hf_diffusion.data.errors import BadData, CorruptImage
from hf_diffusion.data.transforms import PIL_MODES, ImageTransform


# Pillow converts these to "L", "RGB" and "RGBA" directly; everything else (CMYK, YCbCr, HSV, ...)
# goes through "RGB".
DIRECT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa", "La")
# Set in `image.info` where Pillow has read 16 bits a channel as 8.
CUT = "cut to 8 bits"


def encoded_bytes(row: dict[str, Any] | None) -> bytes:
    """Return the file contents of an undecoded image of `datasets`, {"bytes", "path"}."""
    if row is None or (row["bytes"] is None and row["path"] is None):
        raise CorruptImage("no image is stored")
    try:
        data = row["bytes"] if row["bytes"] is not None else read_bytes(row["path"])
    except Unreadable as error:
        raise CorruptImage(f"cannot be read: {error}") from error
    if not data:
        raise CorruptImage("the file is empty")
    return data


def open_image(row: dict[str, Any] | None) -> Image.Image:
    """Decode the first frame, turned as its EXIF says; CorruptImage if that is impossible."""
    data = encoded_bytes(row)
    try:
        image = Image.open(io.BytesIO(data))
        # Pillow has no mode of 16 bits for colours; its reader is told to drop the lower ones, as
        # in "RGB;16B".
        cut = not image.mode.startswith("I") and any(re.search(";16[BLN]", str(tile[3])) for tile in image.tile)
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    # Pillow's readers raise almost any type on broken files.
    except Exception as error:
        raise CorruptImage(" ".join(str(error).split()) or type(error).__name__) from error
    if cut:
        image.info[CUT] = True
    return image


def image_name(row: dict[str, Any] | None, index: int) -> str:
    """Return what a person needs to find the image again: its file, if it has one, and its row."""
    path = row["path"] if row else None
    return f"{shown(path)} (row {index})" if path else f"row {index}"


def brief_name(row: dict[str, Any] | None, index: int) -> str:
    """The same without the folders, for what is published."""
    return os.path.basename(image_name(row, index))


def has_alpha(image: Image.Image) -> bool:
    """Whether any pixel is transparent."""
    if "transparency" in image.info:
        return image.convert("RGBA").getextrema()[3][0] < 255
    return image.mode in WITH_ALPHA and image.getextrema()[-1][0] < 255


def native_format(image: Image.Image, name: str) -> tuple[int, int]:
    """Return the channels (1, 3 or 4) and bits (8 or 16) that keep what the image holds."""
    if image.mode == "F":
        raise BadData(f"{name} has floating-point pixels of unknown range; store images with 8 or 16 bits")
    if image.mode.startswith("I"):
        lowest, highest = image.getextrema()
        if lowest < 0 or highest > 65535:
            raise BadData(
                f"{name} has 32-bit pixels from {lowest:,} to {highest:,}, outside 0..65,535; "
                "store images with 8 or 16 bits"
            )
        return 1, 16
    if has_alpha(image):
        return 4, 8
    return (1 if image.mode in ("1", "L", "LA") else 3), 8


def deviation(image: Image.Image, transform: ImageTransform) -> str | None:
    """What of this image the set's format cannot hold, in words; None if it fits."""
    found = []
    if transform.channels != 4 and has_alpha(image):
        found.append(f"transparency is laid on {transform.background}")
    if transform.bits == 8 and image.mode.startswith("I"):
        found.append("16 bits become 8")
    if image.info.get(CUT):
        found.append("16 bits a channel are read as 8")
    if transform.channels == 1 and image.mode not in ("1", "L", "LA") and not image.mode.startswith("I"):
        found.append("colours become grey")
    return " and ".join(found) or None


def to_pixels(
    image: Image.Image, transform: ImageTransform, name: str, crop: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Return (C, H, W) uint8 or uint16 pixels; `crop` in [0, 1] is its place along x and y.

    Grey becomes colour by repetition, colour grey by ITU-R 601 luma. Alpha is laid on the
    background unless C = 4, where it is kept (255 where absent) and the colour of a fully
    transparent pixel is that of the background. BadData if the image has another size and the
    transform does not resize.
    """
    width, height = transform.size[::-1]
    wide = native_format(image, name)[1] == 16
    image = _in_levels(image, transform) if wide else _in_mode(image, transform)
    if image.size != (width, height):
        if not transform.resize:
            raise BadData(
                f"{name} is {image.height}x{image.width} (HxW) while the set began with {height}x{width}; "
                "pass --resolution to bring all images to one size"
            )
        box = _cover_box(image.size, (width, height), crop)
        # cropping inside resize: one pass, no intermediate rounding; Pillow widens the filter when
        # it shrinks
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    if wide:
        pixels = np.rint(pixels.clip(0, 65535) / (1 if transform.bits == 16 else 257))
        pixels = pixels.astype(np.uint16 if transform.bits == 16 else np.uint8)
    elif transform.bits == 16:
        # 255 * 257 = 65535
        pixels = pixels.astype(np.uint16) * 257
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], min(transform.channels, 3), axis=-1)
    if pixels.shape[-1] < transform.channels:
        opaque = np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
        pixels = np.concatenate([pixels, opaque], axis=-1)
    elif transform.channels == 4 and not pixels[..., 3].all():
        hidden = pixels[..., 3:] == 0
        colour = np.array(transform.background_colour, pixels.dtype) * (257 if transform.bits == 16 else 1)
        pixels = np.concatenate([np.where(hidden, colour, pixels[..., :3]), pixels[..., 3:]], axis=-1)
    return pixels.transpose(2, 0, 1)


def _in_levels(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """An image of 16 or 32 bits as floats in 0..65535, of which 65535 is the set's own white."""
    values = np.asarray(image).astype(np.float32)
    if values.max() > transform.white:
        raise CorruptImage(
            f"has the value {values.max():.0f}, and 0..{transform.white} is the range of the first images of the set"
        )
    # Pillow resizes 32-bit floats with antialiasing, 16-bit modes not reliably.
    return Image.fromarray(values if transform.white == 65535 else values * np.float32(65535 / transform.white))


def _in_mode(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """An image of 8 bits in the mode of the transform, without hidden colours."""
    try:
        if transform.channels != 4 and has_alpha(image):
            below = Image.new("RGBA", image.size, (*transform.background_colour, 255))
            image = Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
        if image.mode == PIL_MODES[transform.channels]:
            return image
        image = image if image.mode in DIRECT_MODES else image.convert("RGB")
        return image.convert(PIL_MODES[transform.channels])
    except ValueError as error:
        raise CorruptImage(str(error)) from error


def _cover_box(size: tuple[int, int], target: tuple[int, int], crop: tuple[float, float]) -> tuple[float, ...]:
    """Return the largest (left, top, right, bottom) of the target's shape in an image (W, H)."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = min(size[0], target[0] / scale), min(size[1], target[1] / scale)
    left, top = (size[0] - width) * crop[0], (size[1] - height) * crop[1]
    return left, top, min(size[0], left + width), min(size[1], top + height)

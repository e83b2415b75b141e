"""What the first images of a set say of all: their size, channels, bits and range."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from PIL import Image

from hf_diffusion.data.decoding import CUT, brief_name, has_alpha, image_name, native_format, open_image
from hf_diffusion.data.errors import CorruptImage, too_many_bad
from hf_diffusion.data.transforms import ImageTransform


# Enough to meet the rare grey or transparent image of a colour set, decoded in about a second.
PROBED_IMAGES = 64
# The largest values of 8, 10, 12, 14 and 16 bits, which cameras and scanners store in 16.
WHITES = (255, 1023, 4095, 16383, 65535)
# Images of 8 bits without a brighter pixel are masks or indices more often than photographs.
DARK = 63


class Probe(NamedTuple):
    """The transform for all images, the corrupt ones met by index, and remarks for people."""

    transform: ImageTransform
    bad: dict[int, str]
    remarks: list[str]


def choose_transform(
    rows: Iterable[tuple[int, dict[str, Any] | None]],
    resolution: tuple[int, int] | None,
    channels: int | None,
    center_crop: bool,
    max_bad_images: int,
    fit_size: tuple[int, int] | None = None,
    background: str = "white",
) -> Probe:
    """Choose channels, bits and size by the first rows.

    Reads PROBED_IMAGES rows, and more only while none of them could be decoded. Where channels or
    bits are mixed the most general wins. `fit_size` is the resolution of images that do not all
    have that size. ValueError if sizes differ and no resolution is given, or if nothing can be
    decoded.
    """
    sizes, formats, modes, bad, remarks = {}, [], set(), {}, []
    highest, brightest, transparent = 0, 0, False
    for count, (index, row) in enumerate(rows):
        if count >= PROBED_IMAGES and sizes:
            break
        name = image_name(row, index)
        try:
            image = open_image(row)
        except CorruptImage as error:
            bad[index] = f"{name}: {error}"
            if len(bad) > max_bad_images:
                raise too_many_bad(bad, max_bad_images) from error
            continue
        formats.append(native_format(image, name))
        sizes.setdefault((image.height, image.width), name)
        modes.add(image.mode)
        transparent |= has_alpha(image)
        if image.mode.startswith("I"):
            highest = max(highest, int(image.getextrema()[1]))
        else:
            brightest = max(brightest, *(high for _, high in image.convert("RGB").getextrema()))
        found = _of_one(image, brief_name(row, index))
        remarks += [remark for remark in found if remark[:20] not in {known[:20] for known in remarks}]
    if not sizes:
        raise ValueError(f"no image can be decoded: {'; '.join(list(bad.values())[:5]) or 'the data set is empty'}")
    if fit_size is not None and set(sizes) != {tuple(fit_size)}:
        resolution = tuple(fit_size)
        (height, width), *more = sizes
        others = f" and {len(more)} other sizes" if more else ""
        remarks.append(f"images of {height}x{width}{others} are resized to {resolution[0]}x{resolution[1]} (HxW)")
    if resolution is None and len(sizes) > 1:
        (first, first_name), (other, other_name) = list(sizes.items())[:2]
        raise ValueError(
            f"images differ in size: {first_name} is {first[0]}x{first[1]} (HxW), {other_name} is "
            f"{other[0]}x{other[1]}; pass --resolution to bring all images to one size"
        )
    chosen = channels or max(found for found, _ in formats)
    bits = max(bits for _, bits in formats)
    # Of black images only, nothing is known.
    white = next(white for white in WHITES if highest <= white) if highest else WHITES[-1]
    size = resolution or next(iter(sizes))
    transform = ImageTransform(chosen, size, bits, resolution is not None, center_crop, white, background)
    if bits == 16 and white < WHITES[-1]:
        remarks.append(
            f"the highest value of {len(formats)} images of 16 or 32 bits is {highest:,}: "
            f"0..{white:,} is taken for black to white"
        )
    if bits == 8 and brightest <= DARK:
        remarks.append(
            f"the highest value of {len(formats)} images is {brightest} of 255, so that networks see nearly black "
            "ones; store masks and other small numbers spread over 0..255"
        )
    if transparent and chosen != 4:
        remarks.append(f"transparent places are laid on {background}")
    if any((found, depth) != (chosen, bits) for found, depth in formats):
        remarks.append(f"images of modes {sorted(modes)} are brought to {chosen} channels of {bits} bits")
    return Probe(transform, bad, remarks)


def _of_one(image: Image.Image, name: str) -> list[str]:
    """Remarks on one image that hold for others like it."""
    remarks = []
    if (frames := getattr(image, "n_frames", 1)) > 1:
        remarks.append(f"of animations only the first frame is used: {name} has {frames}")
    if image.info.get(CUT):
        remarks.append(f"of images with 16 bits a channel, such as {name}, the upper 8 are read")
    return remarks

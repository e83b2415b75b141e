"""Samples as files: a picture with a row for each class, single images, arrays.

Letters: N samples, H x W pixels of C channels.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hf_diffusion.config.options import UsageError
from hf_diffusion.figures.grid import class_grid, labelled_grid
from hf_diffusion.figures.scatter import scatter_plot
from hf_diffusion.files import write_whole


# What `write_images` writes.
DRAWN = re.compile(r"\d{5,}\.png|metadata\.csv")
# Of pictures, by the ending of a file's name.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def picture_of(samples: np.ndarray, labels: Sequence[int] | None, id2label: dict[int, str] | None) -> Image.Image:
    """Images uint8 (N, H, W, C) as a grid, in rows by class; points (N, 2) as a scatter plot."""
    if samples.ndim == 4:
        return labelled_grid(samples) if labels is None else class_grid(samples, labels, id2label)
    if labels is None:
        return scatter_plot(samples)
    return scatter_plot(samples, labels, class_names(range(max(labels) + 1), id2label))


def class_names(classes: Sequence[int], id2label: dict[int, str] | None) -> list[str]:
    """The names of classes, their numbers where they have none."""
    return [(id2label or {}).get(label, str(label)) for label in classes]


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file's name asks for; UsageError for one that is none."""
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise UsageError(f"{path} does not end in the name of a picture's format; use {', '.join(FORMATS)}")
    return FORMATS[ending]


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its name."""
    form = picture_format(path)
    picture = picture.convert("RGB") if form == "JPEG" else picture
    write_whole(path, lambda file: picture.save(file, format=form, quality=95))


def write_images(images: np.ndarray, labels: Sequence[int] | None, folder: Path) -> None:
    """Write 00000.png, 00001.png, ... and, where there are labels, metadata.csv beside them.

    A folder that holds nothing but such files is emptied first: they are of an earlier call.
    """
    earlier = list(folder.iterdir()) if folder.is_dir() else []
    if all(DRAWN.fullmatch(file.name) for file in earlier):
        for file in earlier:
            file.unlink()
    for i, image in enumerate(images):
        write_picture(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), folder / f"{i:05d}.png")
    if labels is not None:
        rows = "".join(f"{i:05d}.png,{label}\n" for i, label in enumerate(labels))
        write_whole(folder / "metadata.csv", "file_name,label\n" + rows)


def write_arrays(samples: np.ndarray, labels: Sequence[int] | None, path: Path) -> str:
    """Write an .npz file with the samples and their labels; returns in words what it holds.

    Images are `images`, uint8 (N, H, W, C), (N, H, W) where C is 1; other samples are `samples`,
    float32 (N, ...).
    """
    if samples.ndim == 4:
        arrays = {"images": samples[..., 0] if samples.shape[-1] == 1 else samples}
    else:
        arrays = {"samples": samples}
    if labels is not None:
        arrays["labels"] = np.array(labels, dtype=np.int64)
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))
    return ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())

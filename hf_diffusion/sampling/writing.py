"""Samples as files: a picture with a row for each class, single images, arrays.

Letters: N samples, H x W pixels of C channels.
"""

import csv
import io
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


def picture_of(
    samples: np.ndarray, labels: Sequence[int] | Sequence[str] | None, id2label: dict[int, str] | None
) -> Image.Image:
    """Images uint8 (N, H, W, C) as a grid, in rows by class or text; points (N, 2) scattered."""
    if samples.ndim == 4:
        return labelled_grid(samples) if labels is None else class_grid(samples, labels, id2label)
    if labels is None:
        return scatter_plot(samples)
    return scatter_plot(samples, labels, class_names(range(max(labels) + 1), id2label))


def class_names(classes: Sequence[int] | Sequence[str], id2label: dict[int, str] | None) -> list[str]:
    """The names of classes, their numbers where they have none; texts as they are."""
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


def write_images(
    images: np.ndarray,
    labels: Sequence[int] | Sequence[str] | None,
    folder: Path,
    id2label: dict[int, str] | None = None,
) -> None:
    """Write 00000.png, 00001.png, ... and, where there are labels, metadata.csv beside them.

    It says the number of each image's class and, where there are any, its name.

    A folder that holds nothing but such files is emptied first: they are of an earlier call.
    """
    earlier = list(folder.iterdir()) if folder.is_dir() else []
    if all(DRAWN.fullmatch(file.name) for file in earlier):
        for file in earlier:
            file.unlink()
    for i, image in enumerate(images):
        write_picture(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), folder / f"{i:05d}.png")
    if labels is not None:
        of_texts = isinstance(labels[0], str)
        columns = ["file_name", "text"] if of_texts else ["file_name", "label", *(["class_name"] if id2label else [])]
        rows = zip((f"{i:05d}.png" for i in range(len(labels))), labels, class_names(labels, id2label))
        csv.writer(text := io.StringIO(), lineterminator="\n").writerows([columns, *(r[: len(columns)] for r in rows)])
        write_whole(folder / "metadata.csv", text.getvalue())


def numbered_texts(
    texts: Sequence[str], labels: Sequence[int] | None = None, id2label: dict[int, str] | None = None
) -> str:
    """Texts below each other, each below its number and its class."""
    names = [""] * len(texts) if labels is None else [f", {name}" for name in class_names(labels, id2label)]
    return "\n".join(f"--- {i + 1}{name} ---\n{text}\n" for i, (text, name) in enumerate(zip(texts, names)))


def check_text_name(path: Path) -> None:
    """UsageError for a file that is named as a picture."""
    if path.suffix.lower() in FORMATS:
        raise UsageError(
            f"{path} is named as a picture, and the samples are texts; use a name such as {path.stem}.txt"
        )


def write_arrays(
    samples: np.ndarray,
    labels: Sequence[int] | Sequence[str] | None,
    path: Path,
    id2label: dict[int, str] | None = None,
) -> str:
    """Write an .npz file with the samples and their labels or `prompts`; returns in words what it
    holds.

    Images are `images`, uint8 (N, H, W, C), (N, H, W) where C is 1; tokens are `samples`, int64
    (N, L), and so are others, float32 (N, ...). Beside `labels` stand `class_names`, in the order
    of the numbers, where there are any.
    """
    if samples.ndim == 4:
        arrays = {"images": samples[..., 0] if samples.shape[-1] == 1 else samples}
    else:
        arrays = {"samples": samples}
    if labels is not None and isinstance(labels[0], str):
        arrays["prompts"] = np.array(labels)
    elif labels is not None:
        arrays["labels"] = np.array(labels, dtype=np.int64)
        if id2label:
            arrays["class_names"] = np.array(class_names(range(max(id2label) + 1), id2label))
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))
    return ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())

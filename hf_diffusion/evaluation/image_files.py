"""Images that somebody else has drawn: an .npz or .npy file, or a folder of image files."""

import csv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from hf_diffusion.data.listing import list_folder
from hf_diffusion.data.pixels import from_unit_range


CHUNK = 256
FILES = (".npz", ".npy")
# Pillow's modes with eight bits a channel, as they are.
MODES = ("L", "RGB", "RGBA")
METADATA = "metadata.csv"


@dataclass(frozen=True)
class FileImages:
    """Images uint8 (N, H, W, C) of somebody else, in chunks as `sample_store.Samples` has them.

    labels: numbers int64 (N,), or names; None where there are none.
    """

    all_images: np.ndarray
    labels: np.ndarray | None
    protocol: dict[str, Any]

    def __len__(self) -> int:
        return len(self.all_images)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.all_images.shape
        return channels, height, width

    def chunks(
        self, process: int = 0, processes: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Yield (positions (B,), images, labels (B,) or None) of every chunk of one process."""
        for start in range(process * CHUNK, len(self.all_images), processes * CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(self.all_images)))
            yield rows, self.all_images[rows], None if self.labels is None else self.labels[rows]

    def label_numbers(self, names: Sequence[str] | None, num_classes: int | None) -> np.ndarray | None:
        """The labels as numbers of the real data's classes: names by name, numbers as they are.

        ValueError for a class that the real data do not have.
        """
        if self.labels is None or num_classes is None:
            return None if self.labels is None or self.labels.dtype.kind not in "iu" else self.labels
        if self.labels.dtype.kind in "iu":
            wrong = self.labels[(self.labels < 0) | (self.labels >= num_classes)]
            if len(wrong):
                raise ValueError(
                    f"{len(wrong)} labels are no class of the real data, such as {wrong[0]}; they must be 0 to "
                    f"{num_classes - 1}"
                )
            return self.labels
        unknown = sorted(set(self.labels.tolist()) - set(names or ()))
        if unknown:
            known = f"has {', '.join(map(str, names))}" if names else "has numbers only"
            raise ValueError(f"the label {unknown[0]!r} is no class of the real data, which {known}")
        return np.array([list(names).index(name) for name in self.labels.tolist()], dtype=np.int64)


def is_image_source(name: str) -> bool:
    """Whether a name is that of a file of images, or of a folder that holds no pipeline."""
    path = Path(name)
    if path.suffix in FILES:
        return True
    return path.is_dir() and not (path / "model_index.json").is_file() and bool(_files_of(path))


def load_image_files(path: Path) -> FileImages:
    """Images and labels of a file or folder; ValueError for what holds none.

    .npz: `images` uint8 (N, H, W[, C]), or floating-point in [0, 1], and perhaps `labels` (N,), of
    numbers or names, and `class_names` of the numbers; or arr_0 and arr_1 for images and labels.
    .npy: the images alone. A folder: images of one size, in the order of their names; labels from
    its metadata.csv (file_name, and class_name or label), or the names of its sub-folders.
    """
    if path.is_dir():
        images, labels = _from_folder(path)
    else:
        images, labels = _from_arrays(path)
    images = _checked_images(images, path)
    labels = _checked_labels(labels, len(images), path)
    protocol = {"sampler": f"images of {path.resolve().name}", "options": {}, "dtype": "uint8", "device": "file"}
    return FileImages(images, labels, protocol)


def _from_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False), None
        # np.load would take anything else for a pickle.
        with zipfile.ZipFile(path):
            arrays = dict(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, no {path.suffix} file, or holds Python objects, which could run code; store arrays "
            "of numbers by np.savez(file, images=...)"
        ) from error
    # As guided-diffusion writes them.
    arrays = {{"arr_0": "images", "arr_1": "labels"}.get(name, name): array for name, array in arrays.items()}
    if "images" not in arrays:
        raise ValueError(f"{path} holds {sorted(arrays)}; it needs the array 'images'")
    labels, names = arrays.get("labels"), arrays.get("class_names")
    if names is not None and labels is not None and labels.dtype.kind in "iu" and names.dtype.kind == "U":
        if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(f"{path} has labels {labels.min()} to {labels.max()} and {len(names)} class_names")
        labels = names[labels]
    return arrays["images"], labels


def _checked_images(images: np.ndarray, path: Path) -> np.ndarray:
    """uint8 (N, H, W, C)."""
    if images.ndim not in (3, 4) or len(images) == 0 or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise ValueError(
            f"the images of {path} have shape {images.shape}; they must be (N, H, W) or (N, H, W, 1 | 3 | 4)"
        )
    if np.issubdtype(images.dtype, np.floating):
        if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
            raise ValueError(f"the images of {path} hold NaN or values outside [0, 1]; give finite ones, or uint8")
        images = from_unit_range(images)
    if images.dtype != np.uint8:
        raise ValueError(f"the images of {path} are {images.dtype}; they must be uint8, or floating-point in [0, 1]")
    return images[..., None] if images.ndim == 3 else images


def _checked_labels(labels: np.ndarray | None, count: int, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,):
        raise ValueError(f"{path} has labels {labels.shape} for {count} images; give one an image")
    if labels.dtype.kind == "U":
        return labels
    if labels.dtype.kind not in "iu":
        raise ValueError(f"the labels of {path} are {labels.dtype}; they must be whole numbers or names")
    return labels.astype(np.int64)


def _files_of(folder: Path) -> list[Path]:
    return [folder / name for name in list_folder(folder).images]


def _from_folder(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    files, arrays, first = _files_of(folder), [], None
    if not files:
        raise ValueError(f"the folder {folder} holds neither a pipeline nor images")
    for file in files:
        try:
            with Image.open(file) as image:
                form = (image.mode, image.size)
                first = first or form
                if image.mode not in MODES or form != first:
                    raise ValueError(
                        f"{file} is an image of mode {form[0]} and {form[1][0]}x{form[1][1]} pixels; all must be "
                        f"{first[0]} of {first[1][0]}x{first[1][1]}, of mode {', '.join(MODES)}"
                    )
                arrays.append(np.asarray(image))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} cannot be read as an image; repair it or take it away") from error
    return np.stack(arrays), _labels_of(folder, files)


def _labels_of(folder: Path, files: Sequence[Path]) -> np.ndarray | None:
    if (folder / METADATA).is_file():
        with open(folder / METADATA, newline="", encoding="utf-8") as file:
            # A number may mean another class in the real data.
            found = list(csv.DictReader(file))
            named = bool(found) and "class_name" in found[0]
            rows = {row.get("file_name"): row.get("class_name") or row.get("label") for row in found}
        labels = [rows.get(str(file.relative_to(folder))) for file in files]
        missing = [file.name for file, label in zip(files, labels) if label is None]
        if missing:
            raise ValueError(
                f"{folder / METADATA} has no label of {missing[0]}; it needs the columns file_name, label"
            )
        numbered = all(map(str.isdecimal, labels)) and not named
        return np.array([int(label) for label in labels] if numbered else labels)
    within = [file.parent.relative_to(folder) for file in files]
    if all(parent == Path() for parent in within):
        return None
    if any(parent == Path() for parent in within):
        raise ValueError(f"{folder} holds images both in sub-folders, which are classes, and outside of them")
    return np.array([parent.parts[0] for parent in within])

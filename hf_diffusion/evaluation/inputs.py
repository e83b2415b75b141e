"""The two sides of an evaluation, where they are not drawn: real images, and generated ones that lie in a file."""

import argparse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState

from hf_diffusion.data.images import ImageData, load_images


DATA_KEYS = ("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column", "cache_dir")


@dataclass(frozen=True)
class FileImages:
    """Images that somebody else has drawn, in chunks like those of sample_store.Samples."""

    all_images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray | None
    protocol: dict[str, Any]

    def chunks(self, process: int = 0, processes: int = 1) -> Iterator[tuple]:
        for start in range(process * 256, len(self.all_images), processes * 256):
            rows = np.arange(start, min(start + 256, len(self.all_images)))
            yield rows, self.all_images[rows], None if self.labels is None else self.labels[rows]


def load_image_file(path: Path) -> FileImages:
    """Images uint8 (N, H, W[, C]), or floating-point in [0, 1], and labels of an .npz file; ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        with zipfile.ZipFile(path):  # np.load would take anything else for a pickle
            arrays = dict(np.load(path, allow_pickle=False))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of arrays: {error}") from error
    if "images" not in arrays:
        raise ValueError(f"{path} holds {sorted(arrays)}; it needs the array 'images'")
    images, labels = arrays["images"], arrays.get("labels")
    if images.ndim not in (3, 4) or len(images) == 0 or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise ValueError(
            f"the images of {path} have shape {images.shape}; they must be (N, H, W) or (N, H, W, 1 | 3 | 4)"
        )
    if np.issubdtype(images.dtype, np.floating):
        if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
            raise ValueError(f"the images of {path} hold NaN or values outside [0, 1]; give finite ones, or uint8")
        images = (images * 255).round().astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"the images of {path} are {images.dtype}; they must be uint8, or floating-point in [0, 1]")
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"{path} has labels {labels.shape} for {len(images)} images; give one an image")
    images = images[..., None] if images.ndim == 3 else images
    return FileImages(
        images, labels, {"sampler": f"images of {path.name}", "options": {}, "dtype": "uint8", "device": "file"}
    )


def load_reference_images(args: argparse.Namespace, size: tuple[int, int], channels: int) -> ImageData:
    """The real images at the size of the generated ones; ValueError where nothing says which."""
    chosen = {name: getattr(args, name) for name in DATA_KEYS}
    recorded = Path(str(args.pipeline)) / "config.yaml"
    if not (args.dataset_name or args.train_data_dir) and recorded.is_file():
        config = yaml.safe_load(recorded.read_text(encoding="utf-8"))
        chosen = {name: chosen[name] or config.get(name) for name in DATA_KEYS}
        chosen["label_column"] = None if chosen["label_column"] == "auto" else chosen["label_column"]
    if not (chosen["dataset_name"] or chosen["train_data_dir"]):
        raise ValueError("there are no real images to measure against; give --dataset_name or --train_data_dir")
    chosen |= {"split": args.split, "channels": channels, "max_train_samples": args.max_reference_images}
    with PartialState().main_process_first():
        try:
            data = load_images(**chosen)
        except ValueError:  # perhaps only because the images differ in size; any other reason shows again
            data = load_images(resolution=size, **chosen)
        return data if tuple(data.size) == tuple(size) else load_images(resolution=size, **chosen)

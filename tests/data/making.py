"""Small sets of images that the tests of data make."""

import io
import itertools
import zipfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def noise_image(seed: int, height: int = 6, width: int = 8, mode: str = "RGB") -> Image.Image:
    """An image of random pixels, which are those of the seed."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def png(image: Image.Image) -> bytes:
    """The image as the content of a PNG file."""
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def folder_of(root: Path, classes: dict[str, int], mode: str = "RGB") -> Path:
    """A folder with so many images a class; the seeds of the pixels count on over classes."""
    seed = itertools.count()
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise_image(next(seed), mode=mode).save(root / name / f"{number:02}.png")
    return root


def truncate(path: Path) -> None:
    """Cut off the end of a file."""
    path.write_bytes(path.read_bytes()[:-60])


def zip_of(path: Path, files: dict[str, bytes | str]) -> Path:
    """A zip with these entries."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def parquet_of(path: Path, columns: dict, features: dict) -> Path:
    """A parquet file in the Hub's form."""
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def labelled_parquet(path: Path, labels: list, label_feature) -> Path:
    """A parquet file of images with the seeds 0, 1, ... and these labels."""
    images = [{"bytes": png(noise_image(seed)), "path": None} for seed in range(len(labels))]
    return parquet_of(path, {"image": images, "label": labels}, {"image": datasets.Image(), "label": label_feature})


def positions(length: int, batch: int, epochs: int) -> list[list[tuple[int, int]]]:
    """The (epoch, index) pairs of some shuffled epochs, in batches."""
    order = [
        (epoch, int(index)) for epoch in range(epochs) for index in np.random.default_rng(epoch).permutation(length)
    ]
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def same(left: dict, right: dict) -> bool:
    """Whether two batches are equal to the bit."""
    return left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)

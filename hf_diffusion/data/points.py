"""Points of the plane from known distributions, for trying a method in seconds."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.data.selection import rows_of_split
from hf_diffusion.figures.scatter import scatter_plot
from hf_diffusion.randomness import derive_seed


# Points of each split: a training set that a network does not learn by heart, and enough others to
# measure against.
SPLITS = {"train": 65_536, "test": 16_384}


# What options of images are where nobody has asked for them.
NOT_ASKED_FOR = {"center_crop": True, "background": "white", "max_bad_images": 100}


class Shape(NamedTuple):
    """A distribution in [-1, 1]^2: `draw(count, rng)` gives points (count, 2) and class ids."""

    draw: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]
    class_names: list[str] | None = None


def _eight_gaussians(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussians of deviation 0.05 around eight places on the circle of radius 0.75."""
    labels = rng.integers(0, 8, count)
    angles = labels * np.pi / 4
    centres = 0.75 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return centres + 0.05 * rng.standard_normal((count, 2)), labels


def _swiss_roll(count: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    """A spiral of one and a half turns, radius 0.3 to 0.9, with noise of deviation 0.015."""
    angle = 1.5 * np.pi * (1 + 2 * rng.random(count))
    curve = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (0.9 * angle / (4.5 * np.pi))[:, None]
    return curve + 0.015 * rng.standard_normal((count, 2)), None


def _checkerboard(count: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    """Uniform on the eight dark squares of a board of four by four."""
    square = rng.integers(0, 8, count)
    column = square // 2
    row = 2 * (square % 2) + column % 2
    corners = np.stack([column, row], axis=1)
    return (corners + rng.random((count, 2))) / 2 - 1, None


COMPASS = ["east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east"]
SHAPES = {
    "eight_gaussians": Shape(_eight_gaussians, COMPASS),
    "swiss_roll": Shape(_swiss_roll),
    "checkerboard": Shape(_checkerboard),
}


class PointData(TrainingData):
    """Points (N, 2) in [-1, 1], as networks see them."""

    kind = "points"

    def __init__(
        self,
        name: str,
        points: np.ndarray,
        labels: np.ndarray | None,
        class_names: list[str] | None,
        facts: dict[str, Any],
    ):
        self.name, self.class_names, self.labels = name, class_names, labels
        self.num_samples, self.sample_shape = len(points), points.shape[1:]
        self._points, self._facts = torch.from_numpy(points.astype(np.float32)), facts
        # Of what makes the points, not of the points: the last bit of a cosine differs between
        # machines.
        self.fingerprint = hashlib.sha256(repr((name, class_names, facts, len(points))).encode()).hexdigest()[:16]

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """Return "x_0" float32 (B, 2), "indices", and "labels"; no epoch changes a point."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        for index in rows[(rows < 0) | (rows >= len(self))][:1].tolist():
            raise IndexError(f"index {index} is not in the data set {self.name!r}, which has 0..{len(self) - 1}")
        batch = {"x_0": self._points[rows], "indices": rows.clone()}
        return batch if self.labels is None else batch | {"labels": torch.from_numpy(self.labels)[rows]}

    def picture(
        self, samples: np.ndarray, columns: int | None = None, row_labels: Sequence[str] | None = None
    ) -> Image.Image:
        """A scatter plot of points (N, 2); rows of `columns` points with one label have one colour.

        A row without a label, "", belongs to the row above, as in a grid of images.
        """
        if not row_labels or columns is None:
            return scatter_plot(samples)
        names = [name for name in dict.fromkeys(row_labels) if name]
        current, of_row = 0, []
        for name in row_labels:
            current = names.index(name) if name else current
            of_row.append(current)
        return scatter_plot(samples, np.repeat(of_row, columns)[: len(samples)], names)

    def describe(self) -> dict[str, Any]:
        return super().describe() | self._facts


def load_points(
    dataset_name: str,
    split: str = "train",
    max_train_samples: int | None = None,
    seed: int = 0,
    label_column: str | None = None,
    **options: Any,
) -> PointData:
    """Draw the points of one of SHAPES from the seed; `split` is train, test, or a part of one.

    The splits share no point. `max_train_samples` takes the first ones. `label_column` "none" takes
    no classes. ValueError for another split and for options of images.
    """
    for option, value in options.items():
        if value not in (None, False, NOT_ASKED_FOR.get(option)):
            raise ValueError(f"{option}={value!r} is for images, and {dataset_name} holds points; leave it out")
    if label_column not in (None, "none"):
        raise ValueError(f"label_column {label_column!r}: {dataset_name} has no columns; give `none` or leave it out")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"max_train_samples={max_train_samples} is not possible; it must be at least 1")
    name, rows = rows_of_split(split, SPLITS, dataset_name)
    rows = rows[:max_train_samples]
    shape = SHAPES[dataset_name]
    points, labels = shape.draw(SPLITS[name], np.random.default_rng(derive_seed(seed, "points", dataset_name, name)))
    # A Gaussian has no bounds; five deviations lie inside.
    points = points.clip(-1, 1)[rows]
    with_classes = shape.class_names is not None and label_column != "none"
    data = PointData(
        dataset_name,
        points,
        labels[rows] if with_classes else None,
        shape.class_names if with_classes else None,
        {"split": split, "seed": seed},
    )
    data.split_rows = (name, np.array(rows))
    return data

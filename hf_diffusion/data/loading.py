"""The one way into the data: whatever kind is asked for comes back as `TrainingData`."""

from collections.abc import Callable
from typing import Any

from hf_diffusion.data.images import load_images
from hf_diffusion.data.points import SHAPES, load_points
from hf_diffusion.data.protocol import TrainingData


# Who opens a dataset_name that is no data set of images; a new kind of data adds its names here.
LOADERS: dict[str, Callable[..., TrainingData]] = dict.fromkeys(SHAPES, load_points)


def load_data(dataset_name: str | None = None, **options: Any) -> TrainingData:
    """Open points by name, images by anything else; the options are those of `load_images`.

    ValueError in one sentence for data that cannot be used; ConnectionError if the Hub cannot be
    reached.
    """
    return LOADERS.get(dataset_name, load_images)(dataset_name=dataset_name, **options)

"""The one way into the data: whatever kind is asked for comes back as `TrainingData`."""

from collections.abc import Callable
from typing import Any

from hf_diffusion.data.images import load_images
from hf_diffusion.data.latents import load_latents
from hf_diffusion.data.points import SHAPES, load_points
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.texts import load_text


# Who opens a dataset_name that is no data set of images; a new kind of data adds its names here.
LOADERS: dict[str, Callable[..., TrainingData]] = dict.fromkeys(SHAPES, load_points)


def load_data(
    dataset_name: str | None = None, vae: str | None = None, vae_posterior: str = "sample", **options: Any
) -> TrainingData:
    """Open points by name, texts where a tokenizer is given, images by anything else.

    The options are those of `load_images`, or of `load_text`.

    vae: a folder or Hub id of an autoencoder: then the samples are latents of the images, which are
        sampled from their posterior, or its mean.

    ValueError in one sentence for data that cannot be used; ConnectionError if the Hub cannot be
    reached.
    """
    if "tokenizer" in options:
        return load_text(dataset_name, **options)
    load = LOADERS.get(dataset_name, load_images)
    if vae is None:
        return load(dataset_name=dataset_name, **options)
    for option, needed in (("streaming", False), ("center_crop", True)):
        if options.get(option, needed) != needed:
            raise ValueError(
                f"{option}={options[option]} changes images from epoch to epoch, and latents are computed once; leave "
                f"it out, or the vae"
            )
    # Decoded once: images need no place in memory.
    images = load(dataset_name=dataset_name, **{**options, "random_flip": False, "cache_bytes": 0})
    return load_latents(images, vae, options.get("random_flip", False), vae_posterior, options.get("seed", 0))

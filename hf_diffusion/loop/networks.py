"""A new denoiser for the shape and the classes of the data."""

from typing import Any

import torch
from torch import nn

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.losses.augmentation import AUGMENT_DIM
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.models.transformer_pixel import PixelTransformer2DModel
from hf_diffusion.models.unet_adm import ADMUNet2DModel


def new_denoiser(config: Any, data: TrainingData, out_channels: int, **of_unet: Any) -> nn.Module:
    """The network that the settings name, with the run's seed; `of_unet` are further arguments of
    a U-Net.

    `config` mixes in DenoiserOptions and ClassOptions, and has a `label_dropout`.
    """
    classes = config.num_class_embeds(data)
    known = {
        "out_channels": out_channels,
        "num_class_embeds": classes,
        "null_class": classes is not None and config.label_dropout > 0,
    }
    if getattr(config, "augment_probability", 0) > 0:
        if data.kind != "images":
            raise ValueError(
                f"augment_probability {config.augment_probability} transforms images, and {data.name} are "
                f"{data.kind}; leave it out"
            )
        known["augment_dim"] = AUGMENT_DIM
    torch.manual_seed(config.seed)
    if data.kind == "points":
        return PointDenoiser(**config.mlp_shape(data.sample_shape), **known)
    if config.network == "transformer":
        return PixelTransformer2DModel(**config.transformer_shape(data.sample_shape), **known)
    return ADMUNet2DModel(**config.unet_shape(data.sample_shape), **of_unet, **known)

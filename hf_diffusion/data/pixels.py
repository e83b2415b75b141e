"""The ranges of pixels: stored integers, [-1, 1] of networks, [0, 1] of pipelines."""

import numpy as np
import torch
from torch import Tensor


def to_network_range(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 or uint16 as float32 in [-1, 1]; 0 is -1 and the largest value is 1."""
    half = np.iinfo(pixels.dtype).max / 2
    return torch.from_numpy(pixels.astype(np.float32)).div_(half).sub_(1)


def from_network_range(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded and clamped; undoes `to_network_range` of 8 bits."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_unit_range(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1], which is output_type "np" of pipelines, as uint8, rounded and clamped."""
    return (np.asarray(images, dtype=np.float32) * 255).round().clip(0, 255).astype(np.uint8)


def channels_last(pixels: Tensor) -> np.ndarray:
    """Images (B, C, H, W) as an array (B, H, W, C), which is how pictures are drawn and stored."""
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def image_samples(batch: dict[str, Tensor]) -> np.ndarray:
    """The images of a batch as sampling returns images: uint8 (B, H, W, C)."""
    return channels_last(from_network_range(batch["x_0"]))

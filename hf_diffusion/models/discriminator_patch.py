"""A critic that judges patches of images (Isola et al. 2017, arXiv:1611.07004, Section 3.2.2)."""

import math

from torch import Tensor, nn


# Levels that halve the image, and the factor by which the width may grow.
MOST_HALVINGS, WIDEST = 3, 8


class PatchDiscriminator(nn.Module):
    """One value for each patch of images (B, C, H, W): (B, 1, h, w), high for real ones.

    It takes part in training alone, so it is not saved with what users get. Group norms in the
    place of the reference's batch norms: an image's value must not depend on its batch, or the
    number of processes would change it.

    Args:
        channels: width of the first level; doubled at each further one.
        halvings: levels that halve the image; 1 to 3, as its size allows.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, halvings: int = MOST_HALVINGS, groups: int = 8):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        widths = [channels * min(2**level, WIDEST) for level in range(halvings + 1)]
        for level, (before, after) in enumerate(zip(widths[:-1], widths[1:]), 1):
            # The last level sees farther at the same resolution.
            stride = 2 if level < halvings else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.GroupNorm(groups, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def enable_gradient_checkpointing(self) -> None:
        """The loop asks every network; the activations of this one are few."""


def halvings_for(side: int) -> int:
    """Levels for images whose shorter side has so many pixels: patches, not the whole image."""
    return min(MOST_HALVINGS, int(math.log2(max(side, 16) / 8)))

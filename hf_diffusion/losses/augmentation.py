"""Augmentation that does not leak into samples: the network is told what was done to each image.

The geometric transformations of EDM, arXiv:2206.00364, appendix F.2: mirroring, scaling, rotation,
uneven scaling and translation, each with the same probability. Told that nothing was done, the
network draws images as they are. Shapes: B images (C, H, W) in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses.objective import Loss, Objective, Values
from hf_diffusion.randomness import Draw, FixedDraw


# What the network is told: two mirrorings, the scale, and two numbers each of the rotation, of the
# uneven scaling and of the translation.
AUGMENT_DIM = 9
# Standard deviations: of a scale in octaves, of a translation in sides of the image.
OCTAVES, SIDES = 0.2, 0.125


@dataclass(kw_only=True)
class AugmentationOptions:
    """Whether images are transformed, and the network told so."""

    # 0.12 is EDM's for CIFAR-10; sets of many images do without.
    augment_probability: float = option(
        0.0,
        "for small sets: probability of each of six transformations of an image (mirroring, scalings, rotation, "
        "translation), which the network is told, so that samples do not show them; such as 0.12",
        group="method",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True)
class Transformation:
    """What is done to each image: numbers (B,) in float64, 0 for nothing.

    flip_x, flip_y: 1 where flipped. octaves: of the scale, 2 to their power. angle: in radians.
    uneven: octaves by which one axis grows and the other shrinks; axis: its angle. shift_x,
    shift_y: in sides of the image.
    """

    flip_x: Tensor
    flip_y: Tensor
    octaves: Tensor
    angle: Tensor
    uneven: Tensor
    axis: Tensor
    shift_x: Tensor
    shift_y: Tensor

    def told(self) -> Tensor:
        """What the network is told (B, 9), in units of a standard deviation."""
        parts = [self.flip_x, self.flip_y, self.octaves / OCTAVES, self.angle.cos() - 1, self.angle.sin()]
        uneven = self.uneven / OCTAVES
        parts += [uneven * self.axis.cos(), uneven * self.axis.sin(), self.shift_x / SIDES, self.shift_y / SIDES]
        return torch.stack(parts, dim=1)

    def is_geometric(self) -> Tensor:
        """Whether more than mirroring is done (B,)."""
        return (self.octaves != 0) | (self.angle != 0) | (self.uneven != 0) | (self.shift_x != 0) | (self.shift_y != 0)

    def inverse(self, height: int, width: int) -> Tensor:
        """Where each pixel comes from (B, 2, 3), in the coordinates of `affine_grid`."""
        one, nothing = torch.ones_like(self.angle), torch.zeros_like(self.angle)

        def matrix(*values: Tensor) -> Tensor:
            return torch.stack(values, dim=1).unflatten(1, (2, 2))

        def turn(angle: Tensor) -> Tensor:
            return matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

        grown = 2.0**self.uneven
        uneven = turn(self.axis) @ matrix(1 / grown, nothing, nothing, grown) @ turn(-self.axis)
        linear = turn(-self.angle) @ uneven * (2.0**-self.octaves)[:, None, None]
        # pixels are square, and both sides are 2 long in these coordinates
        ratio = width / height
        linear = linear * matrix(one, one / ratio, one * ratio, one)
        shift = 2 * torch.stack([self.shift_x, self.shift_y], dim=1)[:, :, None]
        return torch.cat([linear, -linear @ shift], dim=2)

    def of(self, images: Tensor) -> Tensor:
        """The transformed images (B, C, H, W); those that nothing is done to are the very same."""

        def where(is_done: Tensor, changed: Tensor, images: Tensor) -> Tensor:
            return torch.where(is_done[:, None, None, None].bool(), changed, images)

        images = where(self.flip_x, images.flip(3), images)
        images = where(self.flip_y, images.flip(2), images)
        height, width = images.shape[2:]
        with torch.autocast(images.device.type, enabled=False):
            grid = F.affine_grid(self.inverse(height, width), (len(images), 1, 2 * height, 2 * width), False)
            # twice as fine, so that little is lost on the way
            fine = F.interpolate(images, scale_factor=2.0, mode="bicubic")
            moved = F.grid_sample(fine, grid.to(fine.dtype), padding_mode="reflection", align_corners=False)
            moved = F.avg_pool2d(moved, 2).clamp(-1, 1)
        return where(self.is_geometric(), moved, images)


def random_transformation(probability: float, draw: Draw | FixedDraw) -> Transformation:
    """Each of the six transformations with the same probability, on its own."""
    done = (draw.uniform(6) < probability).double().unbind(1)  # each (B,)
    uniform, normal = draw.uniform(4).double().unbind(1), draw.normal(4).double().unbind(1)
    return Transformation(
        flip_x=done[0] * (uniform[0] < 0.5),
        flip_y=done[1] * (uniform[1] < 0.5),
        octaves=done[2] * OCTAVES * normal[0],
        angle=done[3] * math.pi * (2 * uniform[2] - 1),
        uneven=done[4] * OCTAVES * normal[1],
        axis=math.pi * (2 * uniform[3] - 1),
        shift_x=done[5] * SIDES * normal[2],
        shift_y=done[5] * SIDES * normal[3],
    )


def with_augmentation(objective: Objective, options: AugmentationOptions) -> Objective:
    """The objective, whose first player learns from transformed images and is told so; in training
    alone.
    """
    if options.augment_probability > 0:
        player = objective.players[0]
        player.loss = _augmented(player.loss, options.augment_probability)
    return objective


def _augmented(loss: Loss, probability: float) -> Loss:
    def of_transformed(network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        if network.training:
            done = random_transformation(probability, draw)
            batch = {**batch, "x_0": done.of(batch["x_0"]), "augmentation": done.told()}
        return loss(network, batch, draw)

    return of_transformed


def told(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a network is told beside timestep and class, where images were transformed."""
    return {"augmentation": batch["augmentation"]} if "augmentation" in batch else {}

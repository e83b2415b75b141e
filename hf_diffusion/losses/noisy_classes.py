"""Telling the classes of noisy images apart, for classifier guidance (arXiv:2105.05233).

B images, C channels, H x W pixels, K classes.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_diffusion.losses.noise_levels import stratified, timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


class NoisyClassObjective(Objective):
    """Cross entropy at one random timestep an image.

    t is the scheduler's own index, as the pipeline gives it. `random_crop` is the smallest side of
    a crop at random, as a share of the image; 1 crops nothing.
    """

    shown: ClassVar[dict[str, str]] = {"loss": ".4f", "top1": ".2f"}

    def __init__(self, scheduler: Any, network: nn.Module, learning_rate: float, random_crop: float = 1.0):
        self.scheduler, self.random_crop = scheduler, random_crop
        self.num_timesteps = scheduler.config.num_train_timesteps
        super().__init__(Player(network, self.values, learning_rate, higher_is_better=("top1", "top5")))

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """Cross entropy and hits (B,) of a micro-batch; whole images in evaluation mode."""
        x_0, labels = batch["x_0"], batch["labels"]
        t = timesteps(draw.level(stratified), self.num_timesteps)
        noise = draw.normal(*x_0.shape[1:])
        if self.random_crop < 1 and network.training:
            x_0 = crop_at_random(x_0, self.random_crop, draw.uniform(), draw.uniform(), draw.uniform())
        logits = network(self.scheduler.add_noise(x_0, noise, t), t).logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "level": t / self.num_timesteps, **hits(logits, labels)}


def crop_at_random(x: Tensor, smallest: float, scale: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Crops of (B, C, H, W) whose sides are `smallest` to 1 of the image's, enlarged to its size.

    The rest (B,) in [0, 1) says how large, and where.
    """
    side = smallest + (1 - smallest) * scale
    theta = torch.zeros(len(x), 2, 3, device=x.device, dtype=x.dtype)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (1 - side) * (2 * across - 1), (1 - side) * (2 * down - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def hits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """1.0 where the label (B,) is the first, or in the first five, of the logits (B, K), else 0.0.

    Up to five classes have no top5.
    """
    # Classes that are ahead of the label.
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    return {f"top{k}": (ranks < k).float() for k in (1, 5) if k < logits.shape[1]}

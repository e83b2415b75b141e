"""Telling which text belongs to which noisy image, for CLIP guidance (arXiv:2112.10741).

B images with their texts, G of them in a group.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses.noise_levels import stratified, timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


@dataclass(kw_only=True)
class ContrastOptions:
    """What images and texts are told apart from."""

    # Groups begin at multiples of their size in the whole batch, so that the number of processes
    # does not change who is in a group.
    contrast_size: int = option(
        32,
        "images and texts among which each finds its own; divides train_batch_size",
        at_least=2,
        group="method",
    )

    def check(self) -> None:
        """ValueError for groups that would change with the number of processes."""
        if self.train_batch_size % self.contrast_size:
            raise ValueError(
                f"contrast_size {self.contrast_size} does not divide train_batch_size {self.train_batch_size}, so the "
                "groups would change with the number of processes; give a divisor"
            )


class NoisyCaptionObjective(Objective):
    """Cross entropy from images to texts and from texts to images, at one random timestep each.

    Images of a group with the same caption share it. A held-out batch is cut into groups, too.
    """

    shown: ClassVar[dict[str, str]] = {"loss": ".4f", "top1": ".2f"}

    def __init__(self, scheduler: Any, network: nn.Module, learning_rate: float, contrast_size: int, fingerprint: str):
        self.scheduler, self.contrast_size, self.fingerprint = scheduler, contrast_size, fingerprint
        self.num_timesteps = scheduler.config.num_train_timesteps
        super().__init__(Player(network, self.values, learning_rate, higher_is_better=("top1",)))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"text": self.fingerprint}

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss of each image and its text (B,), and whether its best text is its own."""
        x_0 = batch["x_0"]
        t = timesteps(draw.level(stratified), self.num_timesteps)
        x_t = self.scheduler.add_noise(x_0, draw.normal(*x_0.shape[1:]), t)
        images, texts, scale = network(x_t, t, batch["input_ids"], batch["attention_mask"])
        groups = (part.split(self.contrast_size) for part in (images.float(), texts.float(), batch["captions"]))
        losses, hits = zip(*(contrast(*group, scale) for group in zip(*groups)))
        return {"loss": torch.cat(losses), "level": t / self.num_timesteps, "top1": torch.cat(hits)}


def contrast(images: Tensor, texts: Tensor, captions: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (G,) of embeddings (G, D), and whether an image's best text is its own (G,).

    `captions` int64 (G,) are equal where the texts are.
    """
    logits = scale.float() * images @ texts.T
    same = (captions[:, None] == captions).float()
    target = same / same.sum(1, keepdim=True)
    loss = 0.5 * (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    )
    return loss, same.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)

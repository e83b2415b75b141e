"""Distribution matching as functions, and the network that knows the student's distribution.

Yin et al. 2023, arXiv:2311.18828 (DMD), and 2024, arXiv:2405.14867 (DMD2). Samples are (B, ...),
noise levels sigma (B,), x_t = x + sigma noise.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# What follows the features: the rest of the network, with a gradient or without, or nothing.
Rest = Literal["with gradient", "without gradient", "left out"]


def matching_loss(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Losses (B,) whose gradient in x is that of DMD, Eqs. 7 and 8, divided by the values of a x.

    `real` and `fake` estimate x_0 (B, ...) from the same x_t. The gradient is fake - real, divided
    by the mean of |x - real|; that of the estimates themselves is left out.
    """
    with torch.no_grad():
        size = (x - real).abs().flatten(1).mean(1)
        # a sample that the teacher leaves as it is needs no gradient
        gradient = (fake - real) / size.clamp(min=1e-5).reshape(-1, *(1,) * (x.ndim - 1))
        target = x - gradient
    return (x - target).square().flatten(1).mean(1) / 2


def levels(u: Tensor, low: float, high: float, spacing: str) -> Tensor:
    """Noise levels (B,) from `low` to `high` for u (B,) in [0, 1).

    "time" is even in arctan(sigma), the time of the cosine schedule, "log" in ln(sigma).
    """
    if spacing == "log":
        return (math.log(low) + u * math.log(high / low)).exp()
    start, end = math.atan(low), math.atan(high)
    return (start + u * (end - start)).tan()


def even_levels(count: int, highest: float) -> tuple[float, ...]:
    """Falling levels of so many calls: the highest, then even in the time of the cosine schedule.

    Four are those of the timesteps 999, 749, 499, 249 of 1,000 there.
    """
    return (highest, *(math.tan(math.pi / 2 * (1 - i / count)) for i in range(1, count)))


class RealnessHead(nn.Module):
    """Logits (B,) of features (B, C, h, w): halved by convolutions until one place is left."""

    def __init__(self, channels: int, sides: tuple[int, int]):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(math.ceil(math.log2(max(sides)))):
            # one group: of a small one hardly anything is left where there is one place
            layers += [nn.GroupNorm(1, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(1, channels), nn.SiLU(), nn.Flatten())
        self.linear = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.layers(features)).squeeze(1)


class FakeDenoiser(nn.Module):
    """A denoiser of the student's samples, and a head on its features.

    The features are the output of the U-Net's `mid_block`, or of the block in the middle of
    `blocks`. `classifies` False leaves the head out. Both kinds of samples go through one forward,
    since data parallelism joins the gradients of one. The head tells them apart.
    """

    def __init__(self, denoiser: nn.Module, classifies: bool = True):
        super().__init__()
        self.denoiser, self.head, self.grid = denoiser, None, (1, 1)
        if classifies:
            config, device = denoiser.config, next(denoiser.parameters()).device
            size = config.sample_size
            sides = (size, size) if isinstance(size, int) else tuple(size)
            # transformers have tokens in rows of patches
            self.grid = tuple(side // config.get("patch_size", 1) for side in sides) or (1, 1)
            label = None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64, device=device)
            with torch.no_grad():
                sample = torch.zeros(1, config.in_channels, *sides, device=device)
                _, features = self.look("left out", sample, torch.zeros(1, device=device), label)
            _, channels, *sides = self.as_map(features).shape
            self.head = RealnessHead(channels, tuple(sides))

    @property
    def layer(self) -> nn.Module:
        """The one whose output the head sees."""
        blocks = getattr(self.denoiser, "blocks", None)
        return self.denoiser.mid_block if blocks is None else blocks[len(blocks) // 2]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's activations in its backward pass."""
        self.denoiser.enable_gradient_checkpointing()

    def forward(
        self,
        fake: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        real: Tensor | None = None,
        rest: Rest = "with gradient",
    ) -> dict[str, Tensor]:
        """The raw "output" (B, ...) and the logits "fake" (B,) of x_t as the network takes it.

        With a head `real` (k B, ...), which has timesteps and labels of `fake` k times, has logits
        "real" (k B,). Large logits mean real.
        """
        output, features = self.look(rest, fake, timestep, class_labels)
        values = {} if output is None else {"output": output}
        if self.head is None:
            return values
        values["fake"] = self.head(self.as_map(features)).float()
        if real is not None:
            times = len(real) // len(fake)
            labels = None if class_labels is None else class_labels.repeat(times)
            _, of_real = self.look("left out", real, timestep.repeat(times), labels)
            values["real"] = self.head(self.as_map(of_real)).float()
        if output is None and torch.is_grad_enabled():
            # several processes wait for a gradient of every weight
            values["fake"] = values["fake"] + 0 * sum(p.sum() for p in self.denoiser.parameters())
        return values

    def look(
        self, rest: Rest, sample: Tensor, timestep: Tensor, class_labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """The network's output, where it is not left out, and its features."""
        found = []

        def keep(layer: nn.Module, given: tuple, features: Tensor) -> None:
            found.append(features)
            if rest == "left out":
                raise _Reached
            if rest == "without gradient":
                torch.set_grad_enabled(False)

        conditions, output = {} if class_labels is None else {"class_labels": class_labels}, None
        handle = self.layer.register_forward_hook(keep)
        try:
            # ends what `keep` has switched off
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                output = self.denoiser(sample, timestep, **conditions, return_dict=False)[0]
        except _Reached:
            pass
        finally:
            handle.remove()
        return output, found[0]

    def as_map(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) of maps, of tokens (B, h w, C), and of points (B, C)."""
        if features.ndim == 3:
            features = features.transpose(1, 2)
        return features if features.ndim == 4 else features.reshape(len(features), -1, *self.grid)


class _Reached(Exception):
    """The features are there, and what follows them is not wanted."""


def real_and_fake_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The head's loss on logits (B,), softplus(-real) + softplus(fake)."""
    return F.softplus(-real) + F.softplus(fake)


def check_levels(sigmas: Sequence[float], steps: int, highest: float | None) -> None:
    """ValueError for levels that are not so many, do not fall, or were never trained."""
    falls = all(a > b for a, b in zip(sigmas, sigmas[1:]))
    if len(sigmas) != steps or not falls or (highest is not None and sigmas[0] > highest):
        bound = "" if highest is None else f" from at most {highest:g}, the highest level of init_from,"
        raise ValueError(f"student_sigmas {', '.join(map(str, sigmas))} must be {steps} of them, falling{bound}")

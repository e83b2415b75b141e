"""A discriminator of denoising diffusion GANs that sees images as a trained denoiser does.

Its trunk is the way down of a denoiser, whose weights stay as they are (projected GANs, Sauer et
al. 2021, arXiv:2111.01007; DMD2, arXiv:2405.14867, has a head on a denoiser that learns). B images,
T transitions; x_t has the level t, from 0 (data) to T.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_diffusion.losses.consistency_objective import digest
from hf_diffusion.losses.distribution_matching import RealnessHead
from hf_diffusion.models.unet_adm import ADMUNet2DModel, run_block


class ScaleHead(nn.Module):
    """Logits (B,) of the features (B, C, h, w) of x_t and of x_{t+1} at one scale."""

    def __init__(self, features: int, sides: tuple[int, int], transitions: int, channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(2 * features, channels, 1)
        self.transition = nn.Embedding(transitions, channels)
        self.head = RealnessHead(channels, sides)

    def forward(self, seen: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        return self.head(self.conv_in(torch.cat([seen, condition], dim=1)) + self.transition(t)[:, :, None, None])


class DenoiserCritic(nn.Module):
    """Score a pair (x_t, x_{t+1}) by the features of a denoiser; it is called as
    `DDGANDiscriminator` is.

    Args:
        denoiser: a U-Net for images of a variance-preserving process. It is frozen, and is no part
            of what is trained and saved.
        timesteps: T + 1 of the denoiser's timesteps, for the levels 0 to T.
        channels: width of the heads, one for each size of the maps.
    """

    def __init__(self, denoiser: ADMUNet2DModel, timesteps: Sequence[float], channels: int):
        super().__init__()
        # a tuple hides it from `parameters`, `state_dict` and `train`
        self._trunk = (denoiser.eval().requires_grad_(False),)
        self.timesteps = tuple(timesteps)
        config = denoiser.config
        size = config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        labels = None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            maps = self.features(torch.zeros(1, config.in_channels, *sides), torch.zeros(1, dtype=torch.long), labels)
        self.heads = nn.ModuleList(
            ScaleHead(found.shape[1], tuple(found.shape[2:]), len(timesteps) - 1, channels) for found in maps
        )

    @property
    def denoiser(self) -> ADMUNet2DModel:
        """The frozen trunk."""
        return self._trunk[0]

    def features(self, x: Tensor, level: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The last map (B, C, h, w) of each size on the way down, of x (B, C, H, W) at levels (B,).

        The smallest is that of the middle.
        """
        network = self.denoiser
        times = torch.tensor(self.timesteps, dtype=torch.float32).to(x.device, non_blocking=True)[level]
        emb = F.silu(network.conditioning(x, times, labels))
        h = network.conv_in(F.pixel_unshuffle(x, network.config.patch_size))
        last = {}
        for block in network.down_blocks:
            h = run_block(network, block, h, emb)
            last[h.shape[2:]] = h
        return [*list(last.values())[:-1], run_block(network, network.mid_block, h, emb)]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        noisier_sample: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The logits (B,), large where x_t (B, C, H, W) looks real beside x_{t+1}, at t (B,)."""
        self.denoiser.to(sample.device)
        timestep = timestep.long()
        # R1 takes a derivative of a derivative, which fused attention does not have
        with sdpa_kernel(SDPBackend.MATH):
            seen = self.features(sample, timestep, class_labels)
            with torch.no_grad():
                condition = self.features(noisier_sample, timestep + 1, class_labels)
        logits = [head(a, b, timestep) for head, a, b in zip(self.heads, seen, condition, strict=True)]
        return (torch.stack(logits).sum(dim=0),)

    def identity(self) -> dict[str, str]:
        """The trunk that a checkpoint belongs to."""
        return {"trunk": digest(self.denoiser)}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the trunk's activations in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()

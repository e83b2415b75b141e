"""CLIP for noisy images: how well a text fits an x_t, for guidance by its gradient.

GLIDE: Nichol et al. 2022, arXiv:2112.10741, section 4. CLIP: Radford et al. 2021,
arXiv:2103.00020. B images and texts, C channels, H x W pixels, L tokens, N tokens of either, D
features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


# CLIP's: 1 / 0.07 at first, 100 at most.
FIRST_LOGIT_SCALE, HIGHEST_LOGIT_SCALE = math.log(1 / 0.07), math.log(100)
NORM_EPS = 1e-5


class CLIPBlock(nn.Module):
    """Attention and an MLP, each after a norm and added to what it is given; keys have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x (B, N, D)."""
        h = self.norm_1(x)
        q, k, v = (
            part(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, N, D / heads)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm_2(x))))


class CLIPTower(nn.Module):
    """Blocks with a norm before them and one, with a projection, behind the token that answers."""

    def __init__(self, width: int, layers: int, heads: int, embed_dim: int, is_causal: bool):
        super().__init__()
        self.is_causal = is_causal
        self.blocks = nn.ModuleList(CLIPBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width, NORM_EPS)
        self.project = nn.Linear(width, embed_dim, bias=False)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """Unit vectors (B, embed_dim) for tokens x (B, N, D), read at `place` int64 (B,)."""
        for block in self.blocks:
            x = block(x, self.is_causal)
        x = self.project(self.norm_out(x[torch.arange(len(x), device=x.device), place]))
        return x / (x.norm(dim=-1, keepdim=True) + 1e-12)


class NoisyCLIP(ModelMixin, ConfigMixin):
    """Embeddings of noisy images and of texts, whose product tells how well they fit.

    Args:
        num_timesteps: of the process; its timesteps have an embedding each, the token that answers.
        in_channels, sample_size, patch_size: of the images, a number or (H, W), and their patches.
        width, num_layers, num_heads: of the image tower.
        embed_dim: of what both towers give.
        vocab_size, text_length: of the tokens; 0 is padding.
        text_width, text_layers, text_heads: of the text tower, which is causal.
        image_mean, image_std: of each channel in units of [-1, 1], which images are normalised by;
            None for 0 and 1.
        noise_schedule: the scheduler's settings that say what a timestep means.
    """

    @register_to_config
    def __init__(
        self,
        num_timesteps: int = 1000,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 64,
        patch_size: int = 4,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        embed_dim: int = 512,
        vocab_size: int = 50257,
        text_length: int = 77,
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
        noise_schedule: dict[str, Any] | None = None,
    ):
        super().__init__()
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if any(side % patch_size for side in sides):
            raise ValueError(f"patch_size {patch_size} does not divide the sides {sides}; give one that does")
        for name, size, heads in (("num_heads", width, num_heads), ("text_heads", text_width, text_heads)):
            if size % heads:
                raise ValueError(f"{name} {heads} does not divide the width {size}; give one that does")
        patches = math.prod(side // patch_size for side in sides)
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size, bias=False)
        self.timesteps = nn.Embedding(num_timesteps, width)
        self.image_positions = nn.Parameter(0.01 * torch.randn(1 + patches, width))
        self.image_norm = nn.LayerNorm(width, NORM_EPS)
        self.image_tower = CLIPTower(width, num_layers, num_heads, embed_dim, is_causal=False)
        self.tokens = nn.Embedding(vocab_size, text_width)
        self.text_positions = nn.Parameter(0.01 * torch.randn(text_length, text_width))
        self.text_tower = CLIPTower(text_width, text_layers, text_heads, embed_dim, is_causal=True)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))
        for table in (self.tokens, self.timesteps):
            nn.init.normal_(table.weight, std=0.02)

    def image_embeddings(self, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Unit vectors (B, embed_dim) of images (B, C, H, W) at timesteps t () or (B,)."""
        config = self.config
        if config.image_mean is not None:
            mean, std = (x_t.new_tensor(v).view(1, -1, 1, 1) for v in (config.image_mean, config.image_std))
            x_t = (x_t - mean) / std
        patches = self.patches(x_t).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        t = torch.as_tensor(t, device=x_t.device).long().expand(len(x_t))
        x = torch.cat([self.timesteps(t)[:, None], patches], dim=1) + self.image_positions
        return self.image_tower(self.image_norm(x), torch.zeros_like(t))

    def text_embeddings(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors (B, embed_dim) of texts, int64 (B, L), read at their last token."""
        x = self.tokens(input_ids) + self.text_positions
        return self.text_tower(x, attention_mask.sum(1) - 1)

    @property
    def scale(self) -> Tensor:
        """What products of embeddings are multiplied by before a softmax."""
        return self.logit_scale.clamp(max=HIGHEST_LOGIT_SCALE).exp()

    def forward(self, x_t: Tensor, t: Tensor | int, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of images (B, embed_dim) and of texts, and the scale ()."""
        return self.image_embeddings(x_t, t), self.text_embeddings(input_ids, attention_mask), self.scale

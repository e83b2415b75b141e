"""Multilayer perceptrons for points: a denoiser, and the two players of a denoising diffusion GAN.

They are called as the networks of images are, with points (B, D) where those have (B, C, H, W).
`in_channels` is D, and `sample_size` is ().

Shapes: B points, D coordinates, W hidden units, L numbers of a latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class PointOutput(BaseOutput):
    """`sample` (B, out_channels): the prediction."""

    sample: Tensor


@dataclass
class PointDiscriminatorOutput(BaseOutput):
    """`logits` (B,): large where the first argument looks like a draw from q(x_t | x_{t+1})."""

    logits: Tensor


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids [cos | sin] (B, dim) of timesteps (B,), fractions too, in float32."""
    # float32 explicitly: from_pretrained(dtype=bfloat16) changes the default dtype, and bfloat16
    # cannot hold t = 999
    index = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-2 * math.log(max_period) / dim * index)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PointBlock(nn.Module):
    """Residual block of two linear maps; the conditioning vector is added between them."""

    def __init__(self, width: int, dropout: float, activation: nn.Module, normalise: bool):
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width) if normalise else nn.Identity()
        self.linear_1 = nn.Linear(width, width)
        self.time_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h (B, W) and emb (B, W), after its SiLU, -> (B, W)."""
        update = self.linear_1(self.activation(self.norm(h))) + self.time_proj(emb)
        return h + self.linear_2(self.dropout(self.activation(update)))


class PointNetwork(ModelMixin, ConfigMixin):
    """What the three networks share: time embedding, blocks, and checks of their inputs."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PointBlock"]
    _repeated_blocks = ["PointBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    # The denoiser learns faster with these. The players of the game do not: with them 0.46 of the
    # samples lie near a mode of eight Gaussians after 2,000 steps, without them 0.87 after 2,500.
    activation: Callable[[], nn.Module] = nn.SiLU
    normalises = True

    def _build(self, inputs: int, outputs: int) -> None:
        """Make the layers of the configuration; called by every constructor."""
        config = self.config
        counts = {"in_channels": config.in_channels, "num_res_blocks": config.num_res_blocks}
        counts["num_class_embeds"] = 1 if config.num_class_embeds is None else config.num_class_embeds
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be 1 or more")
        if len(config.sample_size) > 0:
            raise ValueError(
                f"sample_size is {config.sample_size}; it must be (), since a point has no height or width"
            )
        width = config.model_channels
        if width < 2 or width % 2:
            raise ValueError(f"model_channels is {width}; it must be an even number of 2 or more")
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.linear_in = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            PointBlock(width, config.dropout, self.activation(), self.normalises) for _ in range(config.num_res_blocks)
        )
        self.norm_out = nn.LayerNorm(width) if self.normalises else nn.Identity()
        self.activation_out = self.activation()
        self.linear_out = nn.Linear(width, outputs)
        self.gradient_checkpointing = False

    def embed_timesteps(self, timestep: Tensor | float, sample: Tensor, mlp: nn.Module | None = None) -> Tensor:
        """The conditioning vector (B, W) of a timestep: a number, () or (B,)."""
        batch, device = len(sample), sample.device
        if not isinstance(timestep, Tensor):
            timestep = torch.full((batch,), timestep, dtype=torch.float32, device=device)
        if timestep.ndim > 1 or timestep.numel() not in (1, batch):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a number, () or ({batch},) is expected")
        timestep = timestep.to(device).reshape(-1).expand(batch)
        sinusoids = timestep_embedding(timestep, self.config.model_channels).to(sample.dtype)
        return (self.time_mlp if mlp is None else mlp)(sinusoids)

    def features(self, inputs: Tensor, emb: Tensor) -> Tensor:
        """What the last linear map sees (B, W), from inputs and the conditioning vector."""
        h, emb = self.linear_in(inputs), F.silu(emb)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, emb)
            else:
                h = block(h, emb)
        return self.activation_out(self.norm_out(h))

    def check_points(self, **points: Tensor) -> None:
        """Raise ValueError for points, by their name, that are not (B, D)."""
        for name, tensor in points.items():
            if tensor.ndim != 2 or tensor.shape[1] != self.config.in_channels:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; points (batch, {self.config.in_channels}) are expected"
                )

    def check_labels(self, class_labels: Tensor | None, batch: int) -> None:
        """Raise ValueError for labels that the model does not know, lacks, or takes none of."""
        rows = self.config.num_class_embeds
        if rows is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes; leave them out")
            return
        rows += self.config.get("null_class", False)
        if class_labels is None:
            raise ValueError(f"class_labels are missing; give int64 labels ({batch},) from 0 to {rows - 1}")
        if class_labels.shape != (batch,):
            raise ValueError(f"class_labels have shape {tuple(class_labels.shape)}; ({batch},) is expected")
        # the values are looked at on the CPU only: on a GPU this would wait for the device
        if class_labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
            low, high = class_labels.min().item(), class_labels.max().item()
            if low < 0 or high >= rows:
                raise ValueError(f"class_labels run from {low} to {high}; this model knows 0 to {rows - 1}")


class PointDenoiser(PointNetwork, ModelMixin):
    """Predict noise, x_0 or v of noisy points; called as ADMUNet2DModel is.

    Args:
        out_channels: None for `in_channels`, or twice as many for a learned variance (the second
            half), or K times as many for K logits of each coordinate.
        model_channels: width of the hidden layers.
        num_class_embeds: number of classes; labels are then required, unless `null_class` adds the
            row `null_class_id`, which stands for "no label".

    Raises ValueError for settings that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        sample_size: tuple[int, ...] = (),
        out_channels: int | None = None,
        model_channels: int = 128,
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        null_class: bool = False,
    ):
        super().__init__()
        if out_channels is None:
            self.register_to_config(out_channels=in_channels)
        elif out_channels < 1 or in_channels > 0 and out_channels % in_channels:
            raise ValueError(
                f"out_channels {out_channels} does not fit in_channels {in_channels}; use {in_channels}, or "
                f"{2 * in_channels} for a learned variance, or K * {in_channels} for K logits of each coordinate"
            )
        if null_class and num_class_embeds is None:
            raise ValueError("null_class=True needs classes to leave out; set num_class_embeds to their number")
        self._build(in_channels, self.config.out_channels)
        self.null_class_id = num_class_embeds if null_class else None
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + int(null_class), model_channels)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> PointOutput | tuple[Tensor]:
        """Predict (B, out_channels) from noisy points `sample` (B, D).

        Args:
            timestep: a number or a tensor () of all points, or (B,); fractions allowed.
            class_labels: int64 (B,). Required iff the model has classes and no null class; None
                means "no label" otherwise.
        """
        points = self.linear_out(self.features(sample, self.conditioning(sample, timestep, class_labels)))
        return PointOutput(sample=points) if return_dict else (points,)

    def conditioning(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None) -> Tensor:
        """The conditioning vector (B, W) of timesteps and labels; checks the inputs."""
        self.check_points(sample=sample)
        if class_labels is None and self.null_class_id is not None:
            class_labels = torch.full((len(sample),), self.null_class_id, device=sample.device)
        self.check_labels(class_labels, len(sample))
        emb = self.embed_timesteps(timestep, sample)
        return (
            emb if class_labels is None else emb + self.class_embedding(class_labels.to(sample.device)).to(emb.dtype)
        )


class PointMeanFlowDenoiser(PointDenoiser, ModelMixin):
    """The same as an average velocity (arXiv:2505.13447), called as ADMMeanFlowUNet2DModel is.

    The arguments are those of PointDenoiser.
    """

    def _build(self, inputs: int, outputs: int) -> None:
        super()._build(inputs, outputs)
        width = self.config.model_channels
        self.duration_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        # at first all steps are like the shortest
        nn.init.zeros_(self.duration_mlp[-1].weight)
        nn.init.zeros_(self.duration_mlp[-1].bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        duration: Tensor | float = 0,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> PointOutput | tuple[Tensor]:
        """The velocity (B, D) at `sample` (B, D) and `timestep`, averaged over `duration`.

        Both are in units of timesteps, a number, () or (B,). At duration 0 it is that of the path.
        """
        emb = self.conditioning(sample, timestep, class_labels)  # (B, W)
        emb = emb + self.embed_timesteps(duration, sample, self.duration_mlp)
        points = self.linear_out(self.features(sample, emb))
        return PointOutput(sample=points) if return_dict else (points,)


class PointGenerator(PointNetwork, ModelMixin):
    """Predict x_0 from (x_{t+1}, t, latent), called as DDGANGenerator is.

    `latent_dim` is L. With `num_class_embeds` labels are required. Raises ValueError for settings
    that do not fit each other.
    """

    activation = partial(nn.LeakyReLU, 0.2)
    normalises = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        sample_size: tuple[int, ...] = (),
        latent_dim: int = 4,
        model_channels: int = 128,
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim is {latent_dim}; it must be 1 or more")
        self._build(in_channels + latent_dim, in_channels)
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, model_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        latent: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> PointOutput | tuple[Tensor]:
        """`sample` is x_{t+1} (B, D), `timestep` t () or (B,), `latent` (B, L) ~ N(0, I)."""
        self.check_points(sample=sample)
        self.check_labels(class_labels, len(sample))
        if latent.shape != (len(sample), self.config.latent_dim):
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}; ({len(sample)}, {self.config.latent_dim}) is expected"
            )
        emb = self.embed_timesteps(timestep, sample)  # (B, W)
        if class_labels is not None:
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        # the latent beside the point: both tell the blocks what to make of the other
        points = self.linear_out(self.features(torch.cat([sample, latent.to(sample.dtype)], dim=1), emb))
        return PointOutput(sample=points) if return_dict else (points,)


class PointDiscriminator(PointNetwork, ModelMixin):
    """Score a pair (x_t, x_{t+1}) for the transition t, called as DDGANDiscriminator is.

    `num_class_embeds` adds a projection of the label (arXiv:1802.05637); labels are then required.
    R1 and WGAN-GP can differentiate it twice. Raises ValueError for wrong settings.
    """

    activation = partial(nn.LeakyReLU, 0.2)
    normalises = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        sample_size: tuple[int, ...] = (),
        model_channels: int = 128,
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self._build(2 * in_channels, 1)
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, model_channels)
            nn.init.xavier_uniform_(self.class_embedding.weight)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        noisier_sample: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> PointDiscriminatorOutput | tuple[Tensor]:
        """`sample` is x_t (B, D), `noisier_sample` x_{t+1}, `timestep` t () or (B,)."""
        self.check_points(sample=sample, noisier_sample=noisier_sample)
        self.check_labels(class_labels, len(sample))
        pair = torch.cat([sample, noisier_sample], dim=1)
        h = self.features(pair, self.embed_timesteps(timestep, sample))  # (B, W)
        logits = self.linear_out(h).squeeze(1)  # (B,)
        if class_labels is not None:
            logits = logits + (self.class_embedding(class_labels) * h).sum(dim=1)
        return PointDiscriminatorOutput(logits=logits) if return_dict else (logits,)

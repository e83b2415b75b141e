"""The U-Net and the noisy classifier of ADM (arXiv:2105.05233).

They contain those of improved DDPM (arXiv:2102.09672) as settings. The U-Net also serves as the
generator of a denoising diffusion GAN.

Shapes: B images, C channels, H x W pixels, L = H * W tokens, D width of a head, E width of the
conditioning vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn


# Up to so many tokens, attention that is trained in bfloat16 on a CPU keeps its weights (L, L).
SHORT = 512


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, layout: str = "openai") -> Tensor:
    """Sinusoids (B, dim) of the timesteps (B,), fractions too; float32, zero-padded if odd.

    `layout` "openai" is [cos | sin] with frequencies max_period^(-i / half), "ddpm"
    (arXiv:2006.11239 and the DDIM code) is [sin | cos] with max_period^(-i / (half - 1)).
    """
    if layout not in ("openai", "ddpm"):
        raise ValueError(f"unknown layout {layout!r} of the timestep embedding; choose 'openai' or 'ddpm'")
    half = dim // 2
    steps = half if layout == "openai" else max(half - 1, 1)
    # float32 explicitly: from_pretrained(dtype=bfloat16) changes the default dtype, and bfloat16
    # cannot hold t = 999
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) / steps * index)  # (B, half)
    waves = (angles.cos(), angles.sin()) if layout == "openai" else (angles.sin(), angles.cos())
    embedding = torch.cat(waves, dim=1)  # (B, 2 * half)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v of each head, (B, heads, L, D)."""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.requires_grad and v.shape[-2] <= SHORT:
        # With its backward pass the kernel takes four times as long, a third of a training step.
        weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        with torch.autocast("cpu", enabled=False):
            return torch.softmax(weights, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def qkv_attention(qkv: Tensor, num_heads: int, new_order: bool = False) -> Tensor:
    """Self-attention from stacked projections (B, 3 * heads * D, L) to (B, heads * D, L).

    The channels hold q, k, v of one head after the other (the order of nearly all released models);
    with `new_order` q of all heads, then k, then v. Both orders load from the same shapes, so a
    wrong choice shows in the samples only.
    """
    batch, channels, length = qkv.shape
    tokens = qkv.transpose(1, 2)  # (B, L, 3 * heads * D)
    if new_order:
        q, k, v = tokens.reshape(batch, length, 3, num_heads, -1).unbind(2)  # each (B, L, heads, D)
    else:
        q, k, v = tokens.reshape(batch, length, num_heads, 3, -1).unbind(3)
    out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, L, D)
    return out.transpose(1, 2).reshape(batch, length, channels // 3).transpose(1, 2)


class _ChannelsLastGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def channels_last_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient has its layout where a compiled network works on channels-last maps.

    A convolution copies a gradient of another layout, or a part of a wider one, in a kernel of its
    own. Asked for here, that layout is what the kernel writes that computes the gradient.
    """
    if torch.compiler.is_compiling() and x.is_contiguous(memory_format=torch.channels_last):
        return _ChannelsLastGradient.apply(x)
    return x


def silu(x: Tensor) -> Tensor:
    """SiLU that overwrites `x` when no gradient is recorded."""
    # 13 % less time for a float32 forward pass of 64 images on a CPU
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ADMGroupNorm(nn.GroupNorm):
    """Group normalisation in float32 for half-precision inputs, whatever its parameters are in."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # torch's kernels accumulate half precision in float32 themselves
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def zero_init(module: nn.Module) -> nn.Module:
    """Set the parameters of an output map to zero, so that a fresh block is the identity."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class ADMTimeEmbedding(nn.Module):
    """Two linear maps from the sinusoids (B, model_channels) to the conditioning vector (B, E)."""

    def __init__(self, model_channels: int, emb_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(model_channels, emb_channels)
        self.linear_2 = nn.Linear(emb_channels, emb_channels)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ADMResBlock(nn.Module):
    """Residual block conditioned on a vector; may resample inside as BigGAN (arXiv:1809.11096).

    With `scale_shift` the vector modulates the second norm (adaptive group norm); otherwise it is
    added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resample: str | None = None,
        *,
        emb_channels: int,
        groups: int,
        dropout: float,
        scale_shift: bool,
        rescale: bool,
    ):
        super().__init__()
        self.resample = resample
        self.scale_shift = scale_shift
        self.output_scale = math.sqrt(0.5) if rescale else None
        self.norm_1 = ADMGroupNorm(groups, in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm_2 = ADMGroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, in_channels, H, W) and emb (B, E), after its SiLU, -> (B, out_channels, H', W')."""
        if self.resample is not None:
            x = channels_last_gradient(x)
        h = silu(self.norm_1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # (B, C, H / 2, W / 2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)  # (B, C, 2 * H, 2 * W)
        h = self.conv_1(h)
        emb = self.time_proj(emb)[:, :, None, None]  # (B, C or 2 * C, 1, 1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        else:
            h = self.norm_2(h + emb)
        h = self.conv_2(self.dropout(silu(h)))
        h = (x if self.shortcut is None else self.shortcut(x)) + h
        return h if self.output_scale is None else h * self.output_scale


class ADMAttention(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, num_heads: int, *, groups: int, new_order: bool, rescale: bool):
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.output_scale = math.sqrt(0.5) if rescale else None
        self.norm = ADMGroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last_gradient(x)
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        qkv = self.qkv(tokens).transpose(1, 2)  # (B, 3 * C, L)
        h = qkv_attention(qkv, self.num_heads, self.new_order)  # (B, C, L)
        h = self.proj(h.transpose(1, 2))  # (B, L, C)
        h = x + h.transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return h if self.output_scale is None else h * self.output_scale


class ADMDownsample(nn.Module):
    """Halve H and W by a strided 3x3 convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`emb` is not used: every block of the encoder is called alike."""
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class ADMUpsample(nn.Module):
    """Double H and W by repetition, then smooth with a 3x3 convolution unless `use_conv` is off."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`emb` is not used: this and the upsampling residual block are called alike."""
        x = F.interpolate(channels_last_gradient(x), scale_factor=2.0)
        return x if self.conv is None else self.conv(x)


class ADMLayer(nn.Module):
    """One step of the encoder or decoder: a residual block, and maybe attention and upsampling."""

    def __init__(self, resnet: ADMResBlock, attention: ADMAttention | None = None, upsample: nn.Module | None = None):
        super().__init__()
        self.resnet = resnet
        self.attention = attention
        self.upsample = upsample

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            # joined here and not by the caller: device_map may put each layer on its own device
            joined = [channels_last_gradient(x), channels_last_gradient(skip)]
            x = torch.cat(joined, dim=1)  # (B, C + C of the skip, H, W)
        x = self.resnet(x, emb)
        if self.attention is not None:
            x = self.attention(x)
        if self.upsample is not None:
            x = self.upsample(x, emb)  # (B, C, 2 * H, 2 * W)
        return x


class ADMMiddle(nn.Module):
    """The bottom of the U: residual block, attention, residual block."""

    def __init__(self, resnet_1: ADMResBlock, attention: ADMAttention, resnet_2: ADMResBlock):
        super().__init__()
        self.resnet_1 = resnet_1
        self.attention = attention
        self.resnet_2 = resnet_2

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.resnet_2(self.attention(self.resnet_1(x, emb)), emb)


def level_widths(model_channels: int, channel_mult: tuple[float, ...], groups: int) -> list[int]:
    """Channels of each level; ValueError if one does not divide into the groups of the norm."""
    if len(channel_mult) == 0:
        raise ValueError("channel_mult is empty; give one multiplier per resolution, such as (1, 2, 2)")
    if groups < 1:
        raise ValueError(f"norm_num_groups is {groups}; it must be 1 or more")
    widths = [int(mult * model_channels) for mult in channel_mult]
    for mult, width in zip(channel_mult, widths):
        if width < 1 or width % groups:
            divisor = math.gcd(*widths)
            fits = max([n for n in range(1, groups + 1) if divisor % n == 0], default=1)
            more = range(max(model_channels, 1), 65536)
            wider = next((n for n in more if all(int(m * n) % groups == 0 for m in channel_mult)), groups)
            raise ValueError(
                f"{width} channels (model_channels {model_channels} times {mult}) do not divide into norm_num_groups "
                f"{groups}; set norm_num_groups to {fits} or model_channels to {wider}"
            )
    return widths


def count_heads(width: int, num_heads: int, num_head_channels: int | None) -> int:
    """Attention heads at a width; raises ValueError if they do not divide it."""
    if num_head_channels is not None:
        if num_head_channels < 1 or width % num_head_channels:
            raise ValueError(
                f"{width} channels with attention do not divide into heads of num_head_channels {num_head_channels}; "
                f"choose a divisor of {width} or None to count heads by num_heads"
            )
        return width // num_head_channels
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{width} channels with attention do not divide into {num_heads} heads; choose a divisor of {width}"
        )
    return num_heads


def height_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of images that a side, or both, describe."""
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def check_sizes(sample_size: int | tuple[int, int], patch_size: int, levels: int, factors: tuple[int, ...]) -> None:
    """Raise ValueError if image, patches, levels and factors with attention do not fit."""
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; it must be 1 (no patches) or more")
    size = height_width(sample_size)
    multiple = patch_size * 2 ** (levels - 1)
    if len(size) != 2 or any(side < 1 or side % multiple for side in size):
        fits = tuple(max(math.ceil(side / multiple), 1) * multiple for side in size[:2])
        fits = fits[0] if isinstance(sample_size, int) else fits
        raise ValueError(
            f"sample_size {sample_size} must be a side or (height, width) in multiples of {multiple} (patch_size "
            f"{patch_size} times 2^{levels - 1} for {levels} entries in channel_mult); use {fits} or fewer levels"
        )
    allowed = [2**level for level in range(levels)]
    if any(factor not in allowed for factor in factors):
        raise ValueError(
            f"attention_resolutions {list(factors)} are downsampling factors, not pixels: with {levels} entries in "
            f"channel_mult choose from {allowed} (the side of the image after patches, divided by the factor, attends)"
        )


def check_counts(**counts: int) -> None:
    """Raise ValueError for a count below 1, by its name."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be 1 or more")


def build_encoder(
    widths: list[int],
    num_res_blocks: int,
    factors: tuple[int, ...],
    resnet: Callable[..., ADMResBlock],
    attention: Callable[[int], ADMAttention],
    resblock_updown: bool,
    conv_resample: bool,
) -> tuple[nn.ModuleList, list[int]]:
    """The blocks from the first convolution to the middle, and the channels of every skip."""
    blocks, skips = nn.ModuleList(), [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            attend = attention(width) if 2**level in factors else None
            blocks.append(ADMLayer(resnet(skips[-1], width), attend))
            skips.append(width)
        if level < len(widths) - 1:
            down = ADMLayer(resnet(width, width, "down")) if resblock_updown else ADMDownsample(width, conv_resample)
            blocks.append(down)
            skips.append(width)
    return blocks, skips


def run_block(model: ModelMixin, block: nn.Module, *args: Tensor) -> Tensor:
    """Call a block of the model; with gradient checkpointing its activations are not kept."""
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, *args)
    return block(*args)


def check_sample(sample: Tensor, channels: int, multiple: int) -> None:
    """Raise ValueError for an input that the network cannot halve and double back to its size."""
    if sample.ndim != 4 or sample.shape[1] != channels:
        raise ValueError(f"sample has shape {tuple(sample.shape)}; (batch, {channels}, height, width) is expected")
    if sample.shape[2] % multiple or sample.shape[3] % multiple:
        raise ValueError(
            f"sample has shape {tuple(sample.shape)}; height and width must be multiples of {multiple} "
            "(patch_size times 2^(levels - 1)): resize or pad the images"
        )


def batch_timesteps(timestep: Tensor | float, sample: Tensor) -> Tensor:
    """One timestep for each image (B,), from a number, a tensor () or a tensor (B,)."""
    batch = sample.shape[0]
    if not torch.is_tensor(timestep):
        return torch.full((batch,), timestep, dtype=torch.float32, device=sample.device)
    if timestep.ndim > 1 or timestep.numel() not in (1, batch):
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a number, () or ({batch},) is expected")
    return timestep.to(sample.device).reshape(-1).expand(batch)


class ADMUNet2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The U-Net of improved DDPM and ADM: a prediction (B, out_channels, H, W) of noisy images.

    Args:
        sample_size: side, or (height, width), that pipelines sample; the network takes any multiple
            of patch_size * 2^(levels - 1).
        out_channels: None for `in_channels`, or twice as many for a learned variance (the second
            half), or K times as many for K logits of each channel (discrete states). Fewer than
            `in_channels` is allowed for inputs that carry a condition in more channels.
        channel_mult: one multiplier of `model_channels` per level, fractions allowed; H and W halve
            between levels.
        attention_resolutions: downsampling factors (powers of two, 1 is the first level) of the
            levels with attention.
        num_head_channels: width of a head; if given, it decides the number of heads instead of
            `num_heads`.
        num_heads_upsample: heads in the decoder if they differ from `num_heads`.
        use_scale_shift_norm: adaptive group norm; otherwise the conditioning vector is added.
        resblock_updown: resample inside residual blocks as in BigGAN; otherwise by layers, with a
            convolution if `conv_resample`.
        use_new_attention_order: channel order of the attention's projection, see `qkv_attention`.
        residual_rescale: divide the sum of every residual connection by sqrt(2).
        patch_size: work on patches of this side (space to depth, inside the network; the process of
            the pixels is unchanged).
        num_class_embeds: number of classes; labels are then required, unless `null_class` adds the
            row `null_class_id`, which stands for "no label".
        augment_dim: numbers that tell how a training image was augmented; without them it was not.

    Raises ValueError for settings that do not fit each other, and names a setting that does.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMLayer", "ADMMiddle", "ADMDownsample"]
    _repeated_blocks = ["ADMResBlock", "ADMAttention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        model_channels: int = 128,
        channel_mult: tuple[float, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (2, 4),
        num_heads: int = 4,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        residual_rescale: bool = False,
        patch_size: int = 1,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        augment_dim: int | None = None,
    ):
        super().__init__()
        if out_channels is None:
            self.register_to_config(out_channels=in_channels)
        elif out_channels > in_channels > 0 and out_channels % in_channels:
            raise ValueError(
                f"out_channels {out_channels} does not fit in_channels {in_channels}; use {in_channels}, or "
                f"{2 * in_channels} for a learned variance, or K * {in_channels} for K logits of each channel"
            )
        self._build(self.config.out_channels)

    def _build(self, out_channels: int) -> None:
        """Make the layers of the configuration; the constructors of the subclasses call it, too."""
        config = self.config
        classes = config.num_class_embeds
        check_counts(
            in_channels=config.in_channels,
            out_channels=out_channels,
            num_res_blocks=config.num_res_blocks,
            num_class_embeds=1 if classes is None else classes,
        )
        if config.null_class and classes is None:
            raise ValueError("null_class=True needs classes to leave out; set num_class_embeds to their number")
        widths = level_widths(config.model_channels, config.channel_mult, config.norm_num_groups)
        check_sizes(config.sample_size, config.patch_size, len(widths), config.attention_resolutions)

        emb_channels = 4 * config.model_channels
        resnet = partial(
            ADMResBlock,
            emb_channels=emb_channels,
            groups=config.norm_num_groups,
            dropout=config.dropout,
            scale_shift=config.use_scale_shift_norm,
            rescale=config.residual_rescale,
        )

        def attention(width: int, num_heads: int = config.num_heads) -> ADMAttention:
            return ADMAttention(
                width,
                count_heads(width, num_heads, config.num_head_channels),
                groups=config.norm_num_groups,
                new_order=config.use_new_attention_order,
                rescale=config.residual_rescale,
            )

        self.null_class_id = classes if config.null_class else None
        self.multiple = config.patch_size * 2 ** (len(widths) - 1)
        self.time_embedding = ADMTimeEmbedding(config.model_channels, emb_channels)
        self.class_embedding = None
        if classes is not None:
            self.class_embedding = nn.Embedding(classes + int(config.null_class), emb_channels)

        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, widths[0], 3, padding=1)
        self.down_blocks, skips = build_encoder(
            widths,
            config.num_res_blocks,
            config.attention_resolutions,
            resnet,
            attention,
            config.resblock_updown,
            config.conv_resample,
        )
        width = widths[-1]
        self.mid_block = ADMMiddle(resnet(width, width), attention(width), resnet(width, width))
        self.up_blocks = nn.ModuleList()
        up_heads = config.num_heads if config.num_heads_upsample is None else config.num_heads_upsample
        for level, level_width in reversed(list(enumerate(widths))):
            for index in range(config.num_res_blocks + 1):
                block = resnet(width + skips.pop(), level_width)
                width = level_width
                attend = attention(width, up_heads) if 2**level in config.attention_resolutions else None
                upsample = None
                if level > 0 and index == config.num_res_blocks:
                    in_block = config.resblock_updown
                    upsample = resnet(width, width, "up") if in_block else ADMUpsample(width, config.conv_resample)
                self.up_blocks.append(ADMLayer(block, attend, upsample))
        self.norm_out = ADMGroupNorm(config.norm_num_groups, width)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels * config.patch_size**2, 3, padding=1))
        # last, so that the other weights begin as without it; subclasses need not have the setting
        self.augment_embedding = None
        if config.get("augment_dim"):
            self.augment_embedding = nn.Linear(config.augment_dim, emb_channels, bias=False)
            nn.init.zeros_(self.augment_embedding.weight)
        self.gradient_checkpointing = False

    def conditioning(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """The conditioning vector (B, E) of timesteps and labels, before its SiLU."""
        timesteps = batch_timesteps(timestep, sample)  # (B,)
        sinusoids = timestep_embedding(timesteps, self.config.model_channels).to(sample.dtype)
        emb = self.time_embedding(sinusoids)  # (B, E)
        if augmentation is not None and self.augment_embedding is None:
            raise ValueError("augmentation was given to a model without augment_dim; leave it out")
        if self.augment_embedding is not None and (augmentation is not None or self.training):
            # zeros add nothing, but in training every weight has a gradient on every process
            zeros = emb.new_zeros(len(sample), self.config.augment_dim)
            emb = emb + self.augment_embedding(zeros if augmentation is None else augmentation.to(emb))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes; leave them out")
            return emb
        if class_labels is None:
            if self.null_class_id is None:
                raise ValueError(
                    f"class_labels are missing; give int64 labels ({len(sample)},) from 0 to "
                    f"{self.class_embedding.num_embeddings - 1}"
                )
            class_labels = torch.full((len(sample),), self.null_class_id, device=sample.device)
        self._check_labels(class_labels, len(sample))
        return emb + self.class_embedding(class_labels.to(sample.device)).to(emb.dtype)

    def _check_labels(self, class_labels: Tensor, batch: int) -> None:
        if class_labels.shape != (batch,):
            raise ValueError(f"class_labels have shape {tuple(class_labels.shape)}; ({batch},) is expected")
        # the values are looked at on the CPU only: on a GPU this would wait for the device
        if class_labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
            low, high, rows = class_labels.min().item(), class_labels.max().item(), self.class_embedding.num_embeddings
            if low < 0 or high >= rows:
                raise ValueError(f"class_labels run from {low} to {high}; this model knows 0 to {rows - 1}")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        augmentation: Tensor | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict (B, out_channels, H, W) from `sample` (B, in_channels, H, W).

        Args:
            timestep: the diffusion step of all images (a number or a tensor of shape ()) or of each
                (B,); fractions allowed.
            class_labels: int64 (B,). Required iff the model has classes and no null class; None
                means "no label" otherwise.
            augmentation: (B, augment_dim), what was done to training images; None is nothing.
        """
        check_sample(sample, self.config.in_channels, self.multiple)
        h = self.transform(sample, self.conditioning(sample, timestep, class_labels, augmentation))
        return UNet2DOutput(sample=h) if return_dict else (h,)

    def transform(self, sample: Tensor, emb: Tensor) -> Tensor:
        """The U: (B, out_channels, H, W) from `sample` and the conditioning vector (B, E)."""
        emb = F.silu(emb)  # every block takes its SiLU
        if self.config.patch_size > 1:
            sample = F.pixel_unshuffle(sample, self.config.patch_size)  # (B, C * P^2, H / P, W / P)
        h = self.conv_in(sample)
        skips = [h]
        for block in self.down_blocks:
            h = run_block(self, block, h, emb)
            skips.append(h)
        h = run_block(self, self.mid_block, h, emb)
        for block in self.up_blocks:
            h = run_block(self, block, h, emb, skips.pop())
        h = self.conv_out(silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.config.patch_size) if self.config.patch_size > 1 else h


class ADMMeanFlowUNet2DModel(ADMUNet2DModel):
    """The U-Net as an average velocity (arXiv:2505.13447): it is told also how long a step is.

    The arguments are those of ADMUNet2DModel.
    """

    def _build(self, out_channels: int) -> None:
        super()._build(out_channels)
        # the last map starts at zero, so that at first all steps are like the shortest
        self.duration_embedding = ADMTimeEmbedding(self.config.model_channels, 4 * self.config.model_channels)
        zero_init(self.duration_embedding.linear_2)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        duration: Tensor | float = 0,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The velocity (B, C, H, W) at `sample` and `timestep`, averaged over `duration`.

        Both are in units of timesteps, a number, () or (B,). At duration 0 it is that of the path.
        """
        check_sample(sample, self.config.in_channels, self.multiple)
        emb = self.conditioning(sample, timestep, class_labels)  # (B, E)
        sinusoids = timestep_embedding(batch_timesteps(duration, sample), self.config.model_channels)
        h = self.transform(sample, emb + self.duration_embedding(sinusoids.to(sample.dtype)))
        return UNet2DOutput(sample=h) if return_dict else (h,)


class ADMGenerator(ADMUNet2DModel):
    """The U-Net as generator of a denoising diffusion GAN: x_0 from (x_{t+1}, t, latent).

    A U-Net that was trained to denoise is a good generator to begin with, see `from_denoiser`. The
    arguments that `ADMUNet2DModel` has too mean the same.

    Args:
        signals: T square roots of alpha_bar, the share of x_0 in x_1 to x_T.
        timesteps: T timesteps that tell the U-Net so much noise, fractions allowed.
        prediction_type: what the U-Net predicts, "epsilon", "v_prediction" or "sample"; x_0 follows
            from it.
        latent_dim: width of the latent, which enters as timesteps and labels do.

    Raises ValueError for settings that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: tuple[float, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (2, 4),
        num_heads: int = 4,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        residual_rescale: bool = False,
        patch_size: int = 1,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        signals: tuple[float, ...] = (0.7223, 0.2805, 0.0586, 0.0066),
        timesteps: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0),
        prediction_type: str = "sample",
        latent_dim: int = 64,
    ):
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"prediction_type {prediction_type!r} is unknown; choose 'epsilon', 'v_prediction' or 'sample'"
            )
        if len(signals) != len(timesteps) or not all(0 < signal < 1 for signal in signals):
            raise ValueError(
                f"signals {list(signals)} and timesteps {list(timesteps)} must be equally many, one for each step of "
                "the process, and the signals between 0 and 1"
            )
        # not the parent's constructor, which would register out_channels, no argument of this class
        ModelMixin.__init__(self)
        self._build(out_channels=in_channels)
        check_counts(latent_dim=latent_dim)
        emb_channels = 4 * model_channels
        self.latent_embedding = nn.Sequential(
            nn.Linear(latent_dim, emb_channels), nn.SiLU(), zero_init(nn.Linear(emb_channels, emb_channels))
        )

    @classmethod
    def from_denoiser(
        cls,
        unet: ADMUNet2DModel,
        alphas_cumprod: Tensor,
        prediction_type: str,
        alpha_bar: Tensor,
        latent_dim: int = 64,
    ) -> "ADMGenerator":
        """A generator that starts as the denoiser `unet`, whatever the latent.

        Args:
            alphas_cumprod: alpha_bar of the process that the U-Net was trained for, one for each of
                its timesteps.
            alpha_bar: (T,) of x_1 to x_T of the few-step process. The timestep of each is found by
                its signal-to-noise ratio, between two whole ones where need be.
        """
        ratios = (alphas_cumprod.double() / (1 - alphas_cumprod.double())).log()  # falls with the timestep
        wanted = (alpha_bar.double() / (1 - alpha_bar.double())).log()
        other = ("out_channels", "augment_dim")
        config = {name: value for name, value in unet.config.items() if not name.startswith("_") and name not in other}
        generator = cls(
            **config,
            signals=tuple(alpha_bar.sqrt().tolist()),
            timesteps=tuple(np.interp(-wanted.cpu().numpy(), -ratios.cpu().numpy(), np.arange(len(ratios))).tolist()),
            prediction_type=prediction_type,
            latent_dim=latent_dim,
        )
        rows = generator.conv_out.out_channels  # the first half, where the U-Net predicts a variance, too
        weights = {
            name: value[:rows] if name.startswith("conv_out.") else value
            for name, value in unet.state_dict().items()
            if not name.startswith("augment_embedding.")
        }
        generator.load_state_dict({**generator.state_dict(), **weights})
        return generator

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        latent: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """x_0 (B, C, H, W) from x_{t+1}, t of shape () or (B,), and a unit Gaussian latent."""
        config = self.config
        check_sample(sample, config.in_channels, self.multiple)
        if latent.shape != (len(sample), config.latent_dim):
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}; ({len(sample)}, {config.latent_dim}) is expected"
            )
        t = batch_timesteps(timestep, sample).long()  # (B,)
        times, signals = torch.tensor([config.timesteps, config.signals], device=sample.device)[:, t]  # (B,) each
        emb = self.conditioning(sample, times, class_labels) + self.latent_embedding(latent)  # (B, E)
        h = self.transform(sample, emb)  # (B, C, H, W)
        signal, noise = signals[:, None, None, None], (1 - signals**2).sqrt()[:, None, None, None]
        match config.prediction_type:
            case "epsilon":
                h = (sample - noise * h) / signal
            case "v_prediction":
                h = signal * sample - noise * h
        h = h.to(sample.dtype)
        return UNet2DOutput(sample=h) if return_dict else (h,)


@dataclass
class ADMClassifierOutput(BaseOutput):
    """Output of `ADMClassifier`: logits (B, num_classes)."""

    logits: Tensor


class AdaptivePool(nn.Module):
    """Average over the pixels, then a linear map to the classes that starts at zero."""

    def __init__(self, channels: int, num_classes: int, groups: int):
        super().__init__()
        self.norm = ADMGroupNorm(groups, channels)
        self.proj = zero_init(nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(silu(self.norm(x)).mean(dim=(2, 3)))  # (B, num_classes)


class AttentionPool(nn.Module):
    """Attention whose query is the mean over the pixels (the pooling of CLIP, arXiv:2103.00020)."""

    def __init__(self, channels: int, num_classes: int, groups: int, num_heads: int, num_pixels: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = ADMGroupNorm(groups, channels)
        self.positional_embedding = nn.Parameter(torch.randn(num_pixels + 1, channels) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = silu(self.norm(x)).flatten(2).transpose(1, 2)  # (B, L, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, L + 1, C)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        h = qkv_attention(self.qkv(tokens).transpose(1, 2), self.num_heads, new_order=True)  # (B, C, L + 1)
        return self.proj(h[:, :, 0])  # (B, num_classes)


class SpatialPool(nn.Module):
    """Two linear maps from the spatial means (B, features) of all blocks to the classes."""

    def __init__(self, features: int, num_classes: int, use_norm: bool):
        super().__init__()
        self.linear_1 = nn.Linear(features, 2048)
        self.norm = ADMGroupNorm(32, 2048) if use_norm else None
        self.linear_2 = nn.Linear(2048, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        h = self.linear_1(features)  # (B, 2048)
        h = F.relu(h) if self.norm is None else F.silu(self.norm(h))
        return self.linear_2(h)  # (B, num_classes)


class ADMClassifier(ModelMixin, ConfigMixin):
    """The encoder half of the U-Net with a pooling head: classifies noisy images (B, C, H, W).

    The arguments that `ADMUNet2DModel` has too mean the same. Input gradients work with frozen
    parameters and with gradient checkpointing.

    Args:
        pool: "adaptive" (average), "attention" (needs inputs of exactly `sample_size`), "spatial"
            or "spatial_v2" (means of the outputs of all blocks).
        id2label: the names of the classes by number; only recorded.
        noise_schedule: the scheduler arguments that define what a timestep meant in training, such
            as {"num_train_timesteps": 1000, "beta_schedule": "linear"}; only recorded, a pipeline
            compares them with its own.

    Raises ValueError for settings that do not fit each other, and names a setting that does.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMLayer", "ADMMiddle", "ADMDownsample", "AttentionPool"]
    _repeated_blocks = ["ADMResBlock", "ADMAttention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        model_channels: int = 128,
        channel_mult: tuple[float, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (2, 4),
        num_heads: int = 4,
        num_head_channels: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        conv_resample: bool = True,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        residual_rescale: bool = False,
        patch_size: int = 1,
        pool: str = "attention",
        id2label: dict[int, str] | None = None,
        noise_schedule: dict[str, int | float | str | bool] | None = None,
    ):
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes, num_res_blocks=num_res_blocks)
        widths = level_widths(model_channels, channel_mult, norm_num_groups)
        check_sizes(sample_size, patch_size, len(widths), attention_resolutions)
        self.multiple = patch_size * 2 ** (len(widths) - 1)
        emb_channels, width = 4 * model_channels, widths[-1]
        resnet = partial(
            ADMResBlock,
            emb_channels=emb_channels,
            groups=norm_num_groups,
            dropout=dropout,
            scale_shift=use_scale_shift_norm,
            rescale=residual_rescale,
        )

        def attention(width: int) -> ADMAttention:
            heads = count_heads(width, num_heads, num_head_channels)
            return ADMAttention(
                width, heads, groups=norm_num_groups, new_order=use_new_attention_order, rescale=residual_rescale
            )

        self.time_embedding = ADMTimeEmbedding(model_channels, emb_channels)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self.down_blocks, features = build_encoder(
            widths, num_res_blocks, attention_resolutions, resnet, attention, resblock_updown, conv_resample
        )
        self.mid_block = ADMMiddle(resnet(width, width), attention(width), resnet(width, width))
        self.input_size = height_width(sample_size)
        if pool == "adaptive":
            self.head = AdaptivePool(width, num_classes, norm_num_groups)
        elif pool == "attention":
            num_pixels = self.input_size[0] * self.input_size[1] // self.multiple**2
            heads = count_heads(width, num_heads, num_head_channels)
            self.head = AttentionPool(width, num_classes, norm_num_groups, heads, num_pixels)
        elif pool in ("spatial", "spatial_v2"):
            self.head = SpatialPool(sum(features) + width, num_classes, use_norm=pool == "spatial_v2")
        else:
            raise ValueError(f"unknown pool {pool!r}; choose from 'adaptive', 'attention', 'spatial', 'spatial_v2'")
        self.gradient_checkpointing = False

    def conditioning(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """The conditioning vector (B, E) of the timesteps, before its SiLU."""
        sinusoids = timestep_embedding(batch_timesteps(timestep, sample), self.config.model_channels)
        return self.time_embedding(sinusoids.to(sample.dtype))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> ADMClassifierOutput | tuple[Tensor]:
        """Logits (B, num_classes) of noisy images at a timestep (a number, () or (B,))."""
        check_sample(sample, self.config.in_channels, self.multiple)
        if self.config.pool == "attention" and tuple(sample.shape[2:]) != self.input_size:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; pool 'attention' takes {self.input_size} pixels only: it "
                "has one position embedding for each place; resize the images or choose another pool"
            )
        emb = F.silu(self.conditioning(sample, timestep))  # (B, E)
        if self.config.patch_size > 1:
            sample = F.pixel_unshuffle(sample, self.config.patch_size)  # (B, C * P^2, H / P, W / P)
        h = self.conv_in(sample)
        means = [h.mean(dim=(2, 3))] if self.config.pool.startswith("spatial") else None  # each (B, C)
        for block in (*self.down_blocks, self.mid_block):
            h = run_block(self, block, h, emb)
            if means is not None:
                means.append(h.mean(dim=(2, 3)))
        logits = self.head(h if means is None else torch.cat(means, dim=1))  # (B, num_classes)
        return ADMClassifierOutput(logits=logits) if return_dict else (logits,)

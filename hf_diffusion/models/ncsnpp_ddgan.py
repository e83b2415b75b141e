"""Generator and discriminators of denoising diffusion GANs (Xiao, Kreis and Vahdat,
arXiv:2112.07804).

The generator is NCSN++ (Song et al., arXiv:2011.13456) with a latent mapping and adaptive group
normalisation; resampling uses the small FIR filters of StyleGAN2 (arXiv:1912.04958) as depthwise
convolutions, which can be differentiated twice.

Shapes: B batch, C channels, H and W pixels, D width of the time embedding, S width of the latent
embedding (the style).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn


# side of a map up to which the CPU resamples by products of matrices, whose cost grows with it
LARGEST_PRODUCT = 64


@dataclass
class DDGANGeneratorOutput(BaseOutput):
    """`sample` (B, C, H, W): the prediction of x_0."""

    sample: Tensor


@dataclass
class DDGANDiscriminatorOutput(BaseOutput):
    """`logits` (B,): large where the first argument looks like a draw from q(x_t | x_{t+1})."""

    logits: Tensor


class DDGANGenerator(ModelMixin, ConfigMixin):
    """Predict x_0 from (x_{t+1}, t, latent), and a class label where `num_class_embeds` is set.

    `attention_sizes` are the heights of the feature maps (after `patch_size`) that get
    self-attention on the way down and up; the middle always has it. `block_type` is "biggan" (both
    normalisations of a block take the style) or "biggan_oneadagn" (the first only).
    `progressive_input` feeds a pyramid of the input to the levels ("residual", "input_skip"
    combined by "sum" or "cat", or "none"), `progressive_output` sums images of all levels
    ("output_skip") or reads the last ("none"). `time_embedding="fourier"` takes log(t), with t = 0
    read as 1/2. `centered=False` takes input in [0, 1]. `patch_size` p computes on H/p x W/p maps
    of p^2 C channels. Other values, and sizes that do not halve exactly, are a ValueError.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GeneratorBlock"]
    _repeated_blocks = ["GeneratorBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_sizes: tuple[int, ...] = (16,),
        latent_dim: int = 100,
        latent_embed_dim: int = 256,
        num_latent_layers: int = 4,
        dropout: float = 0.0,
        block_type: str = "biggan",
        progressive_input: str = "residual",
        progressive_combine: str = "sum",
        progressive_output: str = "none",
        fir: bool = True,
        fir_kernel: tuple[float, ...] = (1, 3, 3, 1),
        skip_rescale: bool = True,
        time_embedding: str = "positional",
        fourier_scale: float = 16.0,
        centered: bool = True,
        tanh: bool = True,
        num_class_embeds: int | None = None,
        patch_size: int = 1,
    ):
        super().__init__()
        _one_of("block_type", block_type, ("biggan", "biggan_oneadagn"))
        _one_of("progressive_input", progressive_input, ("residual", "input_skip", "none"))
        _one_of("progressive_combine", progressive_combine, ("sum", "cat"))
        _one_of("progressive_output", progressive_output, ("output_skip", "none"))
        _one_of("time_embedding", time_embedding, ("positional", "fourier"))
        if progressive_output == "output_skip" and not fir:
            raise ValueError(
                "progressive_output='output_skip' sums FIR-upsampled images; set fir=True or progressive_output='none'"
            )
        if model_channels < 4:
            raise ValueError(f"model_channels must be at least 4, got {model_channels}")
        size, levels = _height_width(sample_size), len(channel_mult)
        _check_halving(size, patch_size, levels)
        image_channels = in_channels * patch_size**2
        taps = tuple(fir_kernel) if fir else None
        style_everywhere = block_type == "biggan"
        time_dim = 4 * model_channels

        def block(in_ch: int, out_ch: int, resample: str | None = None) -> GeneratorBlock:
            return GeneratorBlock(
                in_ch, out_ch, time_dim, latent_embed_dim, resample, taps, dropout, skip_rescale, style_everywhere
            )

        def attention_at(level: int, channels: int) -> nn.Module | None:
            height = size[0] // patch_size // 2**level
            return SelfAttention(channels, skip_rescale) if height in attention_sizes else None

        if time_embedding == "fourier":
            self.time_features = FourierTimeFeatures(model_channels, fourier_scale)
        else:
            self.time_features = PositionalTimeFeatures(model_channels)
        self.time_mlp = nn.Sequential(
            _linear(self.time_features.width, time_dim), nn.SiLU(), _linear(time_dim, time_dim)
        )
        mapping: list[nn.Module] = [PixelNorm(), _linear(latent_dim, latent_embed_dim), nn.SiLU()]
        for _ in range(num_latent_layers):
            mapping += [_linear(latent_embed_dim, latent_embed_dim), nn.SiLU()]
        self.latent_mapping = nn.Sequential(*mapping)
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, latent_embed_dim)

        channels = model_channels
        pyramid_channels = image_channels
        self.conv_in = _conv(image_channels, channels)
        skip_channels = [channels]
        self.down_levels = nn.ModuleList()
        for level, mult in enumerate(channel_mult):
            down = DownLevel()
            for _ in range(num_res_blocks):
                down.blocks.append(block(channels, model_channels * mult))
                channels = model_channels * mult
                down.attentions.append(attention_at(level, channels) or nn.Identity())
                skip_channels.append(channels)
            if level != levels - 1:
                down.downsample = block(channels, channels, "down")
                if progressive_input == "residual":
                    down.pyramid = PyramidDownsample(pyramid_channels, channels, taps)
                    pyramid_channels = channels
                elif progressive_input == "input_skip":
                    down.pyramid = Combine(pyramid_channels, channels, progressive_combine)
                    channels *= 2 if progressive_combine == "cat" else 1
                skip_channels.append(channels)
            self.down_levels.append(down)
        if progressive_input == "input_skip":
            self.input_downsample = Resample("down", taps)

        self.mid_block_in = block(channels, channels)
        self.mid_attention = SelfAttention(channels, skip_rescale)
        self.mid_block_out = block(channels, channels)

        self.up_levels = nn.ModuleList()  # coarsest first
        for level in reversed(range(levels)):
            up = UpLevel()
            for _ in range(num_res_blocks + 1):
                up.blocks.append(block(channels + skip_channels.pop(), model_channels * channel_mult[level]))
                channels = model_channels * channel_mult[level]
            up.attention = attention_at(level, channels)
            if progressive_output == "output_skip":
                up.to_image = ToImage(channels, image_channels)
            if level != 0:
                up.upsample = block(channels, channels, "up")
            self.up_levels.append(up)
        if progressive_output == "output_skip":
            self.output_upsample = Resample("up", taps)
        else:
            self.to_image = ToImage(channels, image_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        latent: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDGANGeneratorOutput | tuple[Tensor]:
        """`sample` is x_{t+1} (B, C, H, W), `timestep` t () or (B,), `latent` (B, latent_dim)."""
        config = self.config
        _check_labels(class_labels, config.num_class_embeds)
        if latent.shape != (sample.shape[0], config.latent_dim):
            raise ValueError(
                f"latent must have shape {(sample.shape[0], config.latent_dim)}, got {tuple(latent.shape)}"
            )
        _check_halving(sample.shape[-2:], config.patch_size, len(config.channel_mult))
        features = self.time_features(_batched(timestep, sample)).to(self.dtype)
        time = F.silu(self.time_mlp(features))  # (B, D); every block applies the SiLU first
        style = self.latent_mapping(latent.to(self.dtype))  # (B, S)
        if class_labels is not None:
            style = style + self.class_embedding(class_labels)

        x = sample if config.centered else 2 * sample - 1
        x = F.pixel_unshuffle(x, config.patch_size)  # (B, p^2 C, H/p, W/p)
        h = self.conv_in(x)
        skips, pyramid = [h], x
        for down in self.down_levels:
            for res_block, attention in zip(down.blocks, down.attentions, strict=True):
                h = attention(self._run(res_block, h, time, style))
                skips.append(h)
            if down.downsample is not None:
                h = self._run(down.downsample, h, time, style)
                if config.progressive_input == "residual":
                    h = pyramid = _residual(down.pyramid(pyramid), h, config.skip_rescale)
                elif config.progressive_input == "input_skip":
                    pyramid = self.input_downsample(pyramid)
                    h = down.pyramid(pyramid, h)
                skips.append(h)

        h = self._run(self.mid_block_in, h, time, style)
        h = self._run(self.mid_block_out, self.mid_attention(h), time, style)

        image = None
        for up in self.up_levels:
            for res_block in up.blocks:
                h = self._run(res_block, torch.cat([h, skips.pop()], dim=1), time, style)
            if up.attention is not None:
                h = up.attention(h)
            if up.to_image is not None:
                image = up.to_image(h) if image is None else self.output_upsample(image) + up.to_image(h)
            if up.upsample is not None:
                h = self._run(up.upsample, h, time, style)
        image = self.to_image(h) if image is None else image
        image = F.pixel_shuffle(torch.tanh(image) if config.tanh else image, config.patch_size)
        return DDGANGeneratorOutput(sample=image) if return_dict else (image,)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class DDGANDiscriminator(ModelMixin, ConfigMixin):
    """Score a pair (x_t, x_{t+1}) for the transition t; large logits mean that x_t looks real.

    `variant="small"` halves the maps three times (images up to about 32 pixels), `"large"` six
    times (64 pixels and more). Statistics over groups of samples enter before the head: batches are
    split into groups of `stddev_group_size`, or of its largest smaller number that divides the
    batch. The reference's groups are strided (samples i, i + B/g, ...);
    `stddev_contiguous_groups=True` takes consecutive samples instead, so that the processes of a
    distributed run that hold consecutive rows compute what one process computes. `num_class_embeds`
    adds a projection of the label (arXiv:1802.05637). `patch_size` p computes on H/p x W/p maps.
    Wrong values are a ValueError.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiscriminatorBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        base_channels: int = 64,
        time_embed_dim: int = 256,
        variant: str = "small",
        negative_slope: float = 0.2,
        fir_kernel: tuple[float, ...] = (1, 3, 3, 1),
        stddev_group_size: int = 4,
        stddev_contiguous_groups: bool = False,
        num_class_embeds: int | None = None,
        patch_size: int = 1,
    ):
        super().__init__()
        _one_of("variant", variant, ("small", "large"))
        if time_embed_dim < 4:
            raise ValueError(f"time_embed_dim must be at least 4, got {time_embed_dim}")
        if stddev_group_size < 1:
            raise ValueError(f"stddev_group_size must be at least 1, got {stddev_group_size}")
        multiples = (2, 2, 4, 8, 8) if variant == "small" else (2, 4, 8, 8, 8, 8, 8)
        first_down = 1 if variant == "small" else 0
        _check_reduction(_height_width(sample_size), patch_size, len(multiples) - 1 - first_down, variant)
        widths = [m * base_channels for m in multiples]
        self.time_features = PositionalTimeFeatures(time_embed_dim)
        self.time_mlp = nn.Sequential(
            _linear(time_embed_dim, time_embed_dim),
            nn.LeakyReLU(negative_slope),
            _linear(time_embed_dim, time_embed_dim),
        )
        self.conv_in = _conv(2 * in_channels * patch_size**2, widths[0], kernel_size=1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(
                in_ch, out_ch, time_embed_dim, negative_slope, tuple(fir_kernel) if i >= first_down else None
            )
            for i, (in_ch, out_ch) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.conv_out = _conv(widths[-1] + 1, widths[-1], init_scale=0.0 if variant == "small" else 1.0)
        self.linear_out = _linear(widths[-1], 1)
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, widths[-1])
            nn.init.xavier_uniform_(self.class_embedding.weight)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,
        timestep: int | Tensor,
        noisier_sample: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDGANDiscriminatorOutput | tuple[Tensor]:
        """`sample` is x_t (B, C, H, W), `noisier_sample` x_{t+1}, `timestep` t () or (B,)."""
        config, slope = self.config, self.config.negative_slope
        _check_labels(class_labels, config.num_class_embeds)
        _check_reduction(sample.shape[-2:], config.patch_size, sum(b.downsamples for b in self.blocks), config.variant)
        features = self.time_features(_batched(timestep, sample)).to(self.dtype)
        time = F.leaky_relu(self.time_mlp(features), slope)
        h = F.pixel_unshuffle(torch.cat([sample, noisier_sample], dim=1), config.patch_size)
        h = self.conv_in(h)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, time)
            else:
                h = block(h, time)
        h = append_group_stddev(h, config.stddev_group_size, config.stddev_contiguous_groups)
        h = F.leaky_relu(self.conv_out(h), slope).sum(dim=(2, 3))
        logits = self.linear_out(h).squeeze(1)  # (B,)
        if class_labels is not None:
            logits = logits + (self.class_embedding(class_labels) * h).sum(dim=1)
        return DDGANDiscriminatorOutput(logits=logits) if return_dict else (logits,)


class GeneratorBlock(nn.Module):
    """BigGAN residual block: the style enters by adaptive normalisation, the time as a bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        style_dim: int,
        resample: str | None,
        taps: tuple[float, ...] | None,
        dropout: float,
        skip_rescale: bool,
        style_everywhere: bool,
    ):
        super().__init__()
        self.norm_in = AdaptiveGroupNorm(in_channels, style_dim)
        self.resample = Resample(resample, taps) if resample else None
        self.conv_in = _conv(in_channels, out_channels)
        self.time_proj = _linear(time_dim, out_channels)
        self.norm_out = AdaptiveGroupNorm(out_channels, style_dim) if style_everywhere else _group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = _conv(out_channels, out_channels, init_scale=0.0)
        needs_skip = in_channels != out_channels or resample is not None
        self.conv_skip = _conv(in_channels, out_channels, kernel_size=1) if needs_skip else None
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor, time: Tensor, style: Tensor) -> Tensor:
        h = F.silu(self.norm_in(x, style))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h) + self.time_proj(time)[:, :, None, None]
        h = self.norm_out(h, style) if isinstance(self.norm_out, AdaptiveGroupNorm) else self.norm_out(h)
        h = self.conv_out(self.dropout(F.silu(h)))
        if self.conv_skip is not None:
            x = self.conv_skip(x)
        return _residual(x, h, self.skip_rescale)


class DiscriminatorBlock(nn.Module):
    """Residual block of the discriminator; halves the map where `taps` are given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        negative_slope: float,
        taps: tuple[float, ...] | None,
    ):
        super().__init__()
        self.conv_in = _conv(in_channels, out_channels)
        self.time_proj = _linear(time_dim, out_channels)
        self.downsamples = taps is not None
        self.resample = Resample("down", taps) if self.downsamples else None
        self.conv_out = _conv(out_channels, out_channels, init_scale=0.0)
        self.conv_skip = _conv(in_channels, out_channels, kernel_size=1, bias=False)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_in(F.leaky_relu(x, self.negative_slope)) + self.time_proj(time)[:, :, None, None]
        h = F.leaky_relu(h, self.negative_slope)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        return _residual(self.conv_skip(x), self.conv_out(h), rescale=True)


class DownLevel(nn.Module):
    """Parts of one resolution on the way down; the last has no `downsample` and no `pyramid`."""

    def __init__(self):
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.downsample: nn.Module | None = None
        self.pyramid: nn.Module | None = None


class UpLevel(nn.Module):
    """Parts of one resolution on the way up; the last has no `upsample`."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention: nn.Module | None = None
        self.to_image: nn.Module | None = None
        self.upsample: nn.Module | None = None


class AdaptiveGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are linear in the style."""

    def __init__(self, channels: int, style_dim: int):
        super().__init__()
        self.norm = _group_norm(channels, affine=False)
        self.style_proj = _linear(style_dim, 2 * channels)
        nn.init.ones_(self.style_proj.bias[:channels])

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.style_proj(style)[:, :, None, None].chunk(2, dim=1)
        return scale * self.norm(x) + shift


class SelfAttention(nn.Module):
    """Self-attention with one head over the pixels of a map."""

    def __init__(self, channels: int, skip_rescale: bool):
        super().__init__()
        self.norm = _group_norm(channels)
        self.to_q, self.to_k, self.to_v = (_linear(channels, channels, init_scale=0.1) for _ in range(3))
        self.to_out = _linear(channels, channels, init_scale=0.0)
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        h = self.to_out(h).transpose(1, 2).reshape(x.shape)
        return _residual(x, h, self.skip_rescale)


class PyramidDownsample(nn.Module):
    """Halve a map by a convolution of stride 2, after a low-pass filter where `taps` are given."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[float, ...] | None):
        super().__init__()
        self.conv = _conv(in_channels, out_channels)
        self.fir = taps is not None
        if self.fir:
            self.register_buffer("kernel", fir_kernel_2d(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fir:
            return conv_downsample_2d(x, self.conv.weight, self.kernel, self.conv.bias)
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2)


class Combine(nn.Module):
    """Join a pyramid level with the features by a 1x1 convolution and a sum or a concatenation."""

    def __init__(self, pyramid_channels: int, channels: int, method: str):
        super().__init__()
        self.conv = _conv(pyramid_channels, channels, kernel_size=1)
        self.method = method

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        pyramid = self.conv(pyramid)
        return torch.cat([pyramid, h], dim=1) if self.method == "cat" else pyramid + h


class ToImage(nn.Module):
    """Normalisation, SiLU and the convolution to image channels."""

    def __init__(self, channels: int, image_channels: int):
        super().__init__()
        self.norm = _group_norm(channels)
        self.conv = _conv(channels, image_channels, init_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class Resample(nn.Module):
    """Double or halve a map by the FIR filter of `taps`, else by repetition or averaging."""

    def __init__(self, direction: str, taps: tuple[float, ...] | None):
        super().__init__()
        self.direction, self.fir = direction, taps is not None
        if self.fir:
            self.register_buffer("kernel", fir_kernel_2d(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fir and x.device.type == "cpu" and max(x.shape[-2:]) <= LARGEST_PRODUCT:
            return resample_by_products(x, self.kernel, self.direction)
        if self.direction == "up":
            return upsample_2d(x, self.kernel) if self.fir else repeat_upsample_2d(x)
        return downsample_2d(x, self.kernel) if self.fir else mean_downsample_2d(x)


class PixelNorm(nn.Module):
    """Scale each latent to a root mean square of one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class PositionalTimeFeatures(nn.Module):
    """[sin(t f), cos(t f)] of the raw integer t, f from 1 to 1/10000, zero-padded if odd."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(
            -math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float32, device=t.device)
        )
        angles = t.float()[:, None] * frequencies
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.width % 2))


class FourierTimeFeatures(nn.Module):
    """Random Fourier features of log t; t = 0, where the reference gives NaN, is read as 1/2."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.width = 2 * channels
        self.register_buffer("frequencies", scale * torch.randn(channels))

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t.float().clamp(min=0.5).log()[:, None] * self.frequencies.float()
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def append_group_stddev(x: Tensor, group_size: int, contiguous: bool) -> Tensor:
    """Append a channel: the standard deviation over a group of samples, averaged over a sample."""
    batch, _, height, width = x.shape
    group = next(g for g in range(min(batch, group_size), 0, -1) if batch % g == 0)
    groups = (batch // group, group) if contiguous else (group, batch // group)
    over = 1 if contiguous else 0
    variance = x.float().reshape(*groups, -1).var(dim=over, unbiased=False)  # (B / group, C H W)
    stddev = (variance + 1e-8).sqrt().mean(dim=1)
    per_sample = stddev.repeat_interleave(group) if contiguous else stddev.repeat(group)  # (B,)
    return torch.cat([x, per_sample.to(x.dtype)[:, None, None, None].expand(batch, 1, height, width)], dim=1)


def fir_kernel_2d(taps: tuple[float, ...]) -> Tensor:
    """Outer product of a filter with itself, normalised to sum 1."""
    if len(taps) < 2 or sum(taps) <= 0:
        raise ValueError(
            f"fir_kernel={tuple(taps)} must hold at least two taps with a positive sum, for example (1, 3, 3, 1)"
        )
    taps = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(taps, taps)
    return kernel / kernel.sum()


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert zeros (`up`), pad (may be negative), convolve with (k, k), keep every `down`-th."""
    batch, channels, height, width = x.shape
    if up > 1:
        x = F.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1)).reshape(
            batch, channels, height * up, width * up
        )
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1]))
    weight = kernel.to(x.dtype).flip(0, 1).expand(channels, 1, -1, -1)  # conv2d correlates, hence the flip
    return F.conv2d(x, weight, stride=down, groups=channels)


def upsample_2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Double a map (B, C, H, W) with a low-pass filter of sum 1.

    Equal to `upfirdn2d` with up=2, which inserts zeros first; the transposed convolution skips them
    and is three times faster.
    """
    height, width = x.shape[-2:]
    size = kernel.shape[0]
    weight = 4 * kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    cut = size - 2 - (size - 1) // 2  # an odd filter leaves one more row and column, at the end
    x = F.conv_transpose2d(x, weight, stride=2, padding=cut, groups=x.shape[1])
    return x[..., : 2 * height, : 2 * width]


def downsample_2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Halve a map (B, C, H, W) after a low-pass filter of sum 1."""
    excess = kernel.shape[0] - 2
    return upfirdn2d(x, kernel, down=2, pad=((excess + 1) // 2, excess // 2))


def resample_by_products(x: Tensor, kernel: Tensor, direction: str) -> Tensor:
    """`upsample_2d` ("up") or `downsample_2d` ("down") with an outer product as kernel, as two
    products with banded matrices.

    A CPU multiplies matrices faster than it convolves channel by channel. Forward and backward of
    (64, 32, 14, 14) on one core: up 25 ms by convolution and 4.8 ms here, down 3.0 and 1.3; in
    bfloat16 33 and 5.5, 17 and 2.3.
    """
    taps = kernel.sum(dim=0)
    rows, columns = (_axis_matrix(taps, side, direction).to(x.dtype) for side in x.shape[-2:])
    return rows @ x @ columns.T


def _axis_matrix(taps: Tensor, side: int, direction: str) -> Tensor:
    """Resampling of one axis, (2 side, side) or (side // 2, side)."""
    inputs, size = torch.arange(side, device=taps.device), len(taps)
    if direction == "up":
        outputs = torch.arange(2 * side, device=taps.device)
        places, weights = outputs[:, None] - 2 * inputs + size - 2 - (size - 1) // 2, 2 * taps
    else:
        outputs = torch.arange(side // 2, device=taps.device)
        places, weights = inputs - 2 * outputs[:, None] + (size - 1) // 2, taps.flip(0)
    inside = (places >= 0) & (places < size)
    return torch.where(inside, weights[places.clamp(0, size - 1)], 0.0)


def conv_downsample_2d(x: Tensor, weight: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Halve a map by a low-pass filter followed by the stride-2 convolution with `weight`."""
    excess = kernel.shape[0] - 2 + weight.shape[-1] - 1
    x = upfirdn2d(x, kernel, pad=((excess + 1) // 2, excess // 2))
    return F.conv2d(x, weight, bias, stride=2)


def repeat_upsample_2d(x: Tensor) -> Tensor:
    """Double a map by repeating its pixels."""
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def mean_downsample_2d(x: Tensor) -> Tensor:
    """Halve a map by averaging 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def _residual(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    return (x + h) / math.sqrt(2) if rescale else x + h


def _init(layer: nn.Module, scale: float) -> nn.Module:
    # scale 0 stands for "almost zero": exactly zero would give the layers before no gradient
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _linear(in_features: int, out_features: int, init_scale: float = 1.0) -> nn.Module:
    return _init(nn.Linear(in_features, out_features), init_scale)


def _conv(
    in_channels: int, out_channels: int, kernel_size: int = 3, init_scale: float = 1.0, bias: bool = True
) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    return _init(conv, init_scale)


def _group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"a layer of {channels} channels cannot be split into {groups} equal groups; choose model_channels and"
            " channel_mult so that every width, and every sum of two that a skip connection joins, is at least 4 and"
            " divisible by min(width // 4, 32), for example multiples of 32"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6, affine=affine)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported; choose one of {list(allowed)}")


def _height_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else (sample_size[0], sample_size[1])


def _check_halving(size: tuple[int, int], patch_size: int, levels: int) -> None:
    factor = patch_size * 2 ** (levels - 1)
    if size[0] % factor or size[1] % factor:
        padded = tuple(-(-side // factor) * factor for side in size)
        fitting = next(
            (n for n in range(levels, 0, -1) if not any(side % (patch_size * 2 ** (n - 1)) for side in size)), 0
        )
        fewer = f"use at most {fitting} entries in channel_mult, or " if fitting else ""
        raise ValueError(
            f"images of {size[0]}x{size[1]} do not halve exactly through {levels} levels with patch_size={patch_size};"
            f" {fewer}pad or resize them to {padded[0]}x{padded[1]}"
        )


def _check_reduction(size: tuple[int, int], patch_size: int, halvings: int, variant: str) -> None:
    smallest = patch_size * 2**halvings
    if size[0] % patch_size or size[1] % patch_size:
        raise ValueError(
            f"images of {size[0]}x{size[1]} cannot be cut into patches of {patch_size}; choose a patch_size that"
            " divides them"
        )
    if min(size) < smallest:
        fix = "use variant='small', a smaller patch_size" if variant == "large" else "use a smaller patch_size"
        raise ValueError(
            f"the {variant} discriminator with patch_size={patch_size} halves {halvings} times and needs images of at"
            f" least {smallest} pixels, got {size[0]}x{size[1]}; {fix} or larger images"
        )


def _check_labels(class_labels: Tensor | None, num_class_embeds: int | None) -> None:
    if (class_labels is None) != (num_class_embeds is None):
        needs = (
            "needs class_labels"
            if class_labels is None
            else "was built without num_class_embeds and takes no class_labels"
        )
        raise ValueError(f"this model has num_class_embeds={num_class_embeds} and {needs}")


def _batched(timestep: int | float | Tensor, sample: Tensor) -> Tensor:
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep)
    return timestep.to(sample.device).expand(sample.shape[0])

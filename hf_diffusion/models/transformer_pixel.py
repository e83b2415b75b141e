"""A transformer on patches of pixels: the alternative to the U-Net in every family of images.

A plain vision transformer as JiT trains it (arXiv:2511.13720): a patch is a token, timestep and
class modulate every block by adaptive norms that start at zero (DiT, arXiv:2212.09748), queries and
keys are normalised (arXiv:2302.05442) and rotated by their places (arXiv:2104.09864), and the
multilayer perceptrons are gated (SwiGLU, arXiv:2002.05202). With large patches it should predict
x_0 (`--prediction_type sample`): noise and velocity fill all of a patch's dimensions, and images do
not.

Shapes: B images, C channels, H x W pixels, P side of a patch, L = (H / P) * (W / P) tokens, D width
of a token, K heads of width D / K.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


# Up to so many tokens, attention that is trained in bfloat16 on a CPU keeps its weights (L, L).
SHORT = 512


def sinusoids(places: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """[cos | sin] (N, dim) of places (N,), fractions too, in float32."""
    # float32 explicitly: from_pretrained(dtype=bfloat16) changes the default dtype, and bfloat16
    # cannot hold t = 999
    index = torch.arange(dim // 2, dtype=torch.float32, device=places.device)
    angles = places.float()[:, None] * torch.exp(-2 * math.log(max_period) / dim * index)  # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_places(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column (L,) of each token of a grid, rows first."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    return rows, torch.arange(width, device=device).repeat(height)


def rotation(height: int, width: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, dim / 2) of rotary positions: half turn with the row, half with the
    column.
    """
    waves = [sinusoids(places, dim // 2, 100) for places in grid_places(height, width, device)]
    cos, sin = zip(*(wave.chunk(2, dim=1) for wave in waves))  # each (L, dim / 4)
    return torch.cat(cos, dim=1), torch.cat(sin, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of the last dimension of x (B, L, K, D / K) by the angles of their tokens."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (L, 1, D / K / 2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) scaled and shifted by vectors (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def goes_by_products(v: Tensor) -> bool:
    """Whether attention to v (B, L, K, D / K) is faster by plain products of matrices."""
    # With its backward pass in bfloat16 torch's kernel for CPUs takes four times as long.
    return v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.requires_grad and v.shape[1] <= SHORT


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(D / K)) v of each head, (B, K, L, D / K)."""
    weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    with torch.autocast("cpu", enabled=False):
        return torch.softmax(weights, dim=-1) @ v


class PixelAttentionProcessor:
    """Attention through diffusers' dispatcher: `set_attention_backend` chooses the kernel."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attention: "PixelAttention", x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).unbind(2)  # each (B, L, K, D / K)
        q, k = rotate(attention.norm_q(q), cos, sin), rotate(attention.norm_k(k), cos, sin)
        if self._attention_backend is None and goes_by_products(v):
            out = products(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        else:
            out = dispatch_attention_fn(
                q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config
            )  # (B, L, K, D / K)
        return attention.proj(out.flatten(2))


class PixelAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of tokens with normalised and rotated queries and keys."""

    _default_processor_cls = PixelAttentionProcessor
    _available_processors = [PixelAttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.proj = nn.Linear(width, width)
        self.set_processor(PixelAttentionProcessor())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.processor(self, x, cos, sin)


class PixelFeedForward(nn.Module):
    """SwiGLU: a gated multilayer perceptron."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(self.dropout(F.silu(gate) * value))


class PixelTransformerBlock(nn.Module):
    """Attention and a perceptron, both modulated and gated by the conditioning vector."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm_1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = PixelAttention(width, num_heads)
        self.norm_2 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = PixelFeedForward(width, hidden, dropout)
        self.modulation = nn.Linear(width, 6 * width)
        # a fresh block is the identity
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D) and emb (B, D), after its SiLU, -> (B, L, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(emb).chunk(6, dim=1)  # each (B, D)
        h = self.attention(modulate(self.norm_1(x), shift_1, scale_1), cos, sin)
        x = torch.addcmul(x, gate_1[:, None], h)
        h = self.mlp(modulate(self.norm_2(x), shift_2, scale_2))
        return torch.addcmul(x, gate_2[:, None], h)


class PixelTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A transformer on patches: a prediction (B, out_channels, H, W) of noisy images.

    Args:
        sample_size: side, or (height, width), that pipelines sample; the network takes any multiple
            of patch_size.
        out_channels: None for `in_channels`, or twice as many for a learned variance (the second
            half), or M times as many for M logits of each channel (discrete states).
        patch_size: side of a patch; a token holds in_channels * patch_size^2 numbers.
        hidden_size: D, the width of a token.
        num_head_channels: width of a head, a multiple of 4 that divides hidden_size.
        bottleneck: width that patches are pressed through on their way in, None for no such thing
            (JiT takes 128 for patches of 768 numbers).
        mlp_ratio: the perceptrons' width in units of hidden_size, before a third is given to the
            gate.
        num_class_embeds: number of classes; labels are then required, unless `null_class` adds the
            row `null_class_id`, which stands for "no label".
        augment_dim: numbers that tell how a training image was augmented; without them it was not.

    Raises ValueError for settings that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PixelTransformerBlock"]
    _repeated_blocks = ["PixelTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 4,
        hidden_size: int = 256,
        num_layers: int = 8,
        num_head_channels: int = 32,
        bottleneck: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        augment_dim: int | None = None,
    ):
        super().__init__()
        if out_channels is None:
            self.register_to_config(out_channels=in_channels)
        self._check()
        config = self.config
        self.null_class_id = num_class_embeds if null_class else None
        inputs = in_channels * patch_size**2
        self.patch_in = nn.Linear(inputs, hidden_size)
        if bottleneck is not None:
            self.patch_in = nn.Sequential(
                nn.Linear(inputs, bottleneck, bias=False), nn.Linear(bottleneck, hidden_size)
            )
        self.time_mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + int(null_class), hidden_size)
        heads, hidden = hidden_size // num_head_channels, int(hidden_size * mlp_ratio * 2 / 3)
        self.blocks = nn.ModuleList(
            PixelTransformerBlock(hidden_size, heads, hidden, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.patch_out = nn.Linear(hidden_size, config.out_channels * patch_size**2)
        for layer in (self.modulation_out, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # last, so that the other weights begin as without it
        self.augment_embedding = None
        if augment_dim is not None:
            self.augment_embedding = nn.Linear(augment_dim, hidden_size, bias=False)
            nn.init.zeros_(self.augment_embedding.weight)
        self.gradient_checkpointing = False

    def _check(self) -> None:
        """ValueError for a configuration that makes no network."""
        config = self.config
        for name in ("in_channels", "out_channels", "patch_size", "hidden_size", "num_layers", "num_head_channels"):
            if config[name] < 1:
                raise ValueError(f"{name} is {config[name]}; it must be 1 or more")
        head = config.num_head_channels
        if head % 4 or config.hidden_size % head:
            raise ValueError(
                f"num_head_channels {head} must be a multiple of 4 that divides hidden_size {config.hidden_size}; "
                "32 and 64 are usual"
            )
        if config.out_channels % config.in_channels:
            raise ValueError(
                f"out_channels {config.out_channels} does not fit in_channels {config.in_channels}; give a multiple"
            )
        if config.null_class and config.num_class_embeds is None:
            raise ValueError("null_class=True needs classes to leave out; set num_class_embeds to their number")
        size = config.sample_size
        for side in (size, size) if isinstance(size, int) else size:
            if side < config.patch_size or side % config.patch_size:
                raise ValueError(
                    f"sample_size {size} does not divide into patches of {config.patch_size}; give multiples of it, "
                    "or another patch_size"
                )

    def conditioning(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """The conditioning vector (B, D) of timesteps and labels, before its SiLU."""
        batch, device = len(sample), sample.device
        if not isinstance(timestep, Tensor):
            timestep = torch.full((batch,), timestep, dtype=torch.float32, device=device)
        if timestep.ndim > 1 or timestep.numel() not in (1, batch):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a number, () or ({batch},) is expected")
        timestep = timestep.to(device).reshape(-1).expand(batch)
        emb = self.time_mlp(sinusoids(timestep, self.config.hidden_size).to(sample.dtype))  # (B, D)
        if augmentation is not None and self.augment_embedding is None:
            raise ValueError("augmentation was given to a model without augment_dim; leave it out")
        if self.augment_embedding is not None and (augmentation is not None or self.training):
            # zeros add nothing, but in training every weight has a gradient on every process
            zeros = emb.new_zeros(batch, self.config.augment_dim)
            emb = emb + self.augment_embedding(zeros if augmentation is None else augmentation.to(emb))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes; leave them out")
            return emb
        rows = self.class_embedding.num_embeddings
        if class_labels is None:
            if self.null_class_id is None:
                raise ValueError(f"class_labels are missing; give int64 labels ({batch},) from 0 to {rows - 1}")
            class_labels = torch.full((batch,), self.null_class_id, device=device)
        if class_labels.shape != (batch,):
            raise ValueError(f"class_labels have shape {tuple(class_labels.shape)}; ({batch},) is expected")
        # the values are looked at on the CPU only: on a GPU this would wait for the device
        if class_labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
            low, high = class_labels.min().item(), class_labels.max().item()
            if low < 0 or high >= rows:
                raise ValueError(f"class_labels run from {low} to {high}; this model knows 0 to {rows - 1}")
        return emb + self.class_embedding(class_labels.to(device)).to(emb.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        augmentation: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict (B, out_channels, H, W) from `sample` (B, in_channels, H, W).

        Args:
            timestep: the diffusion step of all images (a number or a tensor of shape ()) or of each
                (B,); fractions allowed.
            class_labels: int64 (B,). Required iff the model has classes and no null class; None
                means "no label" otherwise.
            augmentation: (B, augment_dim), what was done to training images; None is nothing.
        """
        channels, side = self.config.in_channels, self.config.patch_size
        if sample.ndim != 4 or sample.shape[1] != channels or any(n == 0 or n % side for n in sample.shape[2:]):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; (batch, {channels}, height, width) with sides that divide "
                f"by {side} is expected"
            )
        emb = F.silu(self.conditioning(sample, timestep, class_labels, augmentation))  # (B, D)
        height, width = (n // side for n in sample.shape[2:])
        x = self.patch_in(F.pixel_unshuffle(sample, side).flatten(2).transpose(1, 2))  # (B, L, D)
        places = grid_places(height, width, sample.device)
        half = 2 * math.ceil(self.config.hidden_size / 4)
        # absolute places: rotations know distances only
        x = x + torch.cat([sinusoids(p, half) for p in places], dim=1)[:, : x.shape[2]].to(x.dtype)
        cos, sin = rotation(height, width, self.config.num_head_channels, sample.device)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, emb, cos, sin)
            else:
                x = block(x, emb, cos, sin)
        shift, scale = self.modulation_out(emb).chunk(2, dim=1)
        x = self.patch_out(modulate(self.norm_out(x), shift, scale))  # (B, L, out_channels * P^2)
        h = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (height, width)), side)
        return Transformer2DModelOutput(sample=h) if return_dict else (h,)

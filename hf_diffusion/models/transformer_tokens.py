"""A bidirectional transformer of tokens, which knows the noise level and the class where asked to.

Blocks and their adaptive norms: DiT, arXiv:2212.09748, as MDLM, arXiv:2406.07524, has them for
text. Rotary positions: arXiv:2104.09864. Normalised queries and keys: arXiv:2302.05442.

Shapes: B sequences of L tokens out of V, width W, H heads of D numbers, C numbers of conditioning.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn


# A level in [0, 1] is told apart as well as one of so many timesteps.
LEVELS = 1000
# Up to so many tokens, attention that is trained in bfloat16 on a CPU keeps its weights (L, L).
SHORT = 512


@dataclass
class TokenTransformerOutput(BaseOutput):
    """`sample` (B, L, V): logits of the clean tokens."""

    sample: Tensor


def level_embedding(level: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids [cos | sin] (B, dim) of levels (B,) in [0, 1], in float32."""
    index = torch.arange(dim // 2, dtype=torch.float32, device=level.device)
    angles = LEVELS * level.float()[:, None] * torch.exp(-2 * math.log(max_period) / dim * index)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotations(length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines (2, L, D / 2) by which pairs of numbers turn at each place, in float32."""
    speed = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * speed
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, H, L, D), whose i-th number turns with the i-th of its second half."""
    cos, sin = turns.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class TokenAttention(nn.Module):
    """Attention of all places to all; of the causal kind in a subclass that changes `attend`."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x (B, L, W) -> (B, L, W)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        q, k = rotate(self.norm_q(q), turns), rotate(self.norm_k(k), turns)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k / sqrt(D)) v (B, H, L, D)."""
        if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.requires_grad and v.shape[-2] <= SHORT:
            # With its backward pass the kernel takes four times as long, 40 % of a training step.
            weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            with torch.autocast("cpu", enabled=False):
                return torch.softmax(weights, dim=-1) @ v
        return F.scaled_dot_product_attention(q, k, v)


class TokenBlock(nn.Module):
    """Attention and a perceptron, each scaled, shifted and gated by the conditioning if there is
    any."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, condition: int | None, qk_norm: bool):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.attention = TokenAttention(width, heads, qk_norm)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.linear_1, self.linear_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = None if condition is None else nn.Linear(condition, 6 * width)

    def forward(self, x: Tensor, turns: Tensor, condition: Tensor | None) -> Tensor:
        """x (B, L, W) and condition (B, C), after its SiLU, -> (B, L, W)."""
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm_1(x), turns))
            return x + self.dropout(self.perceptron(self.norm_2(x)))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate_1 * self.dropout(self.attention(self.norm_1(x) * (1 + scale_1) + shift_1, turns))
        return x + gate_2 * self.dropout(self.perceptron(self.norm_2(x) * (1 + scale_2) + shift_2))

    def perceptron(self, x: Tensor) -> Tensor:
        """(B, L, W) -> (B, L, W), of each token alone."""
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class TokenTransformerModel(ModelMixin, ConfigMixin):
    """Predict the clean tokens of noisy ones.

    Args:
        vocab_size: V, the mask included where the noise has one.
        sequence_length: L of the training; others are taken, too, since positions are relative.
        mlp_ratio: width of the perceptrons in units of `hidden_size`.
        time_conditioning: whether the network is told the level; for masks it need not be, since it
            sees how many there are.
        condition_size: C.
        num_class_embeds: number of classes; labels are then required, unless `null_class` adds the
            row `null_class_id`, which stands for "no label".
        rope_theta: slowest turn of the rotary positions.

    Raises ValueError for settings that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TokenBlock"]
    _repeated_blocks = ["TokenBlock"]
    _skip_layerwise_casting_patterns = ["norm", "embedding"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        sequence_length: int = 1024,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        time_conditioning: bool = False,
        condition_size: int = 128,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        qk_norm: bool = True,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        self._check()
        has_condition = time_conditioning or num_class_embeds is not None
        condition = condition_size if has_condition else None
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        if time_conditioning:
            self.time_mlp = nn.Sequential(
                nn.Linear(condition_size, condition_size), nn.SiLU(), nn.Linear(condition_size, condition_size)
            )
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, condition_size)
        self.blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_attention_heads, mlp_ratio, dropout, condition, qk_norm)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, bias=False)
        self.modulation_out = nn.Linear(condition, 2 * hidden_size) if has_condition else None
        self.linear_out = nn.Linear(hidden_size, vocab_size)
        self.gradient_checkpointing = False
        self._initialise()

    def _check(self) -> None:
        config = self.config
        counts = ("vocab_size", "sequence_length", "num_layers", "num_attention_heads", "condition_size")
        for name in counts:
            if config[name] < 1:
                raise ValueError(f"{name} is {config[name]}; it must be 1 or more")
        if config.hidden_size % (2 * config.num_attention_heads):
            raise ValueError(
                f"hidden_size is {config.hidden_size}; it must be a multiple of twice the num_attention_heads, "
                f"{2 * config.num_attention_heads}, since rotary positions turn pairs"
            )
        if config.condition_size % 2:
            raise ValueError(f"condition_size is {config.condition_size}; it must be even")
        if config.null_class and config.num_class_embeds is None:
            raise ValueError("null_class=True needs num_class_embeds, the number of classes")

    def _initialise(self) -> None:
        """Small weights; blocks start as the identity where they are gated, and logits at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        gates = [block.modulation for block in self.blocks] + [self.modulation_out]
        for gate in (gate for gate in gates if gate is not None):
            nn.init.zeros_(gate.weight)
        nn.init.zeros_(self.linear_out.weight)

    @property
    def null_class_id(self) -> int | None:
        """The label that means "no class", None if the network has none."""
        return self.config.num_class_embeds if self.config.null_class else None

    def forward(
        self,
        input_ids: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenTransformerOutput | tuple[Tensor]:
        """Logits of the clean tokens for tokens int64 (B, L).

        timestep: the level in [0, 1], a number, () or (B,); not looked at without
        `time_conditioning`. class_labels: int64 (B,). ValueError for inputs of another form.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; give int64 tokens (batch, length)"
            )
        condition = self._condition(input_ids, timestep, class_labels)
        head = self.config.hidden_size // self.config.num_attention_heads
        turns = rotations(input_ids.shape[1], head, self.config.rope_theta, input_ids.device)
        x = self.token_embedding(input_ids)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, turns, condition)
            else:
                x = block(x, turns, condition)
        x = self.norm_out(x)
        if self.modulation_out is not None:
            shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        logits = self.linear_out(x)
        return TokenTransformerOutput(logits) if return_dict else (logits,)

    def _condition(self, tokens: Tensor, timestep: Tensor | float | None, labels: Tensor | None) -> Tensor | None:
        """What blocks are modulated by (B, C); None for a network without conditions."""
        batch, parts = len(tokens), []
        if self.config.time_conditioning:
            if timestep is None:
                raise ValueError("timestep is missing; this network was made with time_conditioning")
            level = torch.as_tensor(timestep, device=tokens.device).reshape(-1)
            if len(level) not in (1, batch):
                raise ValueError(f"timestep has {len(level)} levels; give one, or {batch}, one for each sequence")
            embedding = level_embedding(level.expand(batch), self.config.condition_size)
            parts.append(self.time_mlp(embedding.to(self.token_embedding.weight.dtype)))
        self._check_labels(labels, batch)
        if labels is not None:
            parts.append(self.class_embedding(labels))
        return F.silu(sum(parts)) if parts else None

    def _check_labels(self, labels: Tensor | None, batch: int) -> None:
        classes = self.config.num_class_embeds
        if (labels is None) != (classes is None):
            what = "are missing; give one for each sequence" if labels is None else "are unknown here; leave them out"
            raise ValueError(f"class_labels {what}: this model has {classes or 'no'} classes")
        if labels is not None and labels.shape != (batch,):
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}; ({batch},) is expected")

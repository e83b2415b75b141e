"""Checkpoints of OpenAI's glide-text2im into stock classes of diffusers and transformers.

GLIDE: Nichol et al. 2022, arXiv:2112.10741. Its U-Net is a UNet2DConditionModel whose attention
takes texts as added keys and values. Its text transformer is a SiglipTextModel: pre-norm, without
any mask, learned positions, a last norm. Where a text is padded GLIDE has one learned vector for
each position in place of token and position. They become tokens behind the vocabulary: number
n_vocab + i is padding at position i, which `TextToImagePipeline` puts there (`padding_id`).
A checkpoint tells its sizes. Beware: the number of heads leaves no trace in the weights.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import SiglipTextModel

from hf_diffusion.convert.glide_text import fill, known, take_layer, take_stacked, text_model_from_glide
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler


# diffusers' name of a layer -> theirs, inside a block and outside of the blocks
RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "transformer_proj",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def networks_from_glide(
    state: Mapping[str, Tensor],
    image_size: int = 64,
    num_head_channels: int = 64,
    xf_heads: int = 8,
    dropout: float = 0.1,
) -> tuple[UNet2DConditionModel, SiglipTextModel]:
    """U-Net and text transformer of a `Text2ImUNet`, in eval mode and float32.

    The U-Net takes `encoder_hidden_states`, all last states of the transformer (B, L, D), and
    `class_labels`, the last of them (B, D). The models for upsampling and inpainting differ by
    in_channels: (x_t, upsampled image) and (x_t, image * mask, mask). Defaults are those of theirs.
    Raises ValueError for a checkpoint that is no such network.
    """
    state = {name: tensor.float() for name, tensor in state.items()}
    left = dict(state)
    unet = _unet_from_glide(left, image_size, num_head_channels, dropout)
    encoder = text_model_from_glide(left, xf_heads)
    if left:
        raise ValueError(f"the checkpoint holds {len(left)} tensors that GLIDE does not have, such as {min(left)}")
    return unet, encoder


def scheduler_from_glide(
    diffusion_steps: int = 1000, noise_schedule: str = "squaredcos_cap_v2"
) -> LinearDDPMScheduler:
    """The process of the base model; that of the upsampler has noise_schedule "linear"."""
    if noise_schedule not in ("linear", "squaredcos_cap_v2"):
        raise ValueError(f"noise_schedule {noise_schedule!r} is not one of theirs; give linear or squaredcos_cap_v2")
    return LinearDDPMScheduler(
        diffusion_steps,
        beta_schedule=noise_schedule,
        variance_type="learned_range",
        # They keep the first and the last timestep.
        timestep_spacing="linspace",
        rescale_betas_by_steps=noise_schedule == "linear",
    )


def _levels(state: Mapping[str, Tensor]) -> tuple[int, list[int], list[bool]]:
    """Residual blocks of a level of the encoder; each level's width, and whether it attends.

    A level of the decoder ends with a residual block that doubles the sides, in the place of an
    attention or after it. That tells how long a level is.
    """
    decoder = [match for name in state if (match := re.match(r"output_blocks\.(\d+)\.(\d)\.(\w+)", name))]
    if not decoder or "time_embed.0.weight" not in state or "token_embedding.weight" not in state:
        raise ValueError("the checkpoint is no Text2ImUNet of glide-text2im: it lacks a text transformer or a U-Net")
    total = 1 + max(int(match[1]) for match in decoder)
    ends = {int(match[1]) for match in decoder if match[2] != "0" and match[3] == "in_layers"}
    per_level = 1 + min(ends, default=total - 1)
    if total % per_level or len(ends) != total // per_level - 1:
        raise ValueError("the checkpoint has no residual blocks that change the sides (resblock_updown), as GLIDE has")
    firsts = range(total - per_level, -1, -per_level)
    widths = [len(known(state, f"output_blocks.{first}.0.out_layers.3.weight")) for first in firsts]
    return per_level - 1, widths, [f"output_blocks.{first}.1.qkv.weight" in state for first in firsts]


def _unet_settings(state: Mapping[str, Tensor], num_head_channels: int) -> dict[str, Any]:
    """What the checkpoint tells of the UNet2DConditionModel."""
    layers, widths, attends = _levels(state)
    model_channels, text_width = state["time_embed.0.weight"].shape[1], state["token_embedding.weight"].shape[1]
    modulation = len(known(state, "output_blocks.0.0.emb_layers.1.weight"))
    # The middle always attends.
    heads = {width for width, attend in zip(widths, attends) if attend} | {widths[-1]}
    refused = {
        f"a first level of {widths[0]} channels for {model_channels} model channels": widths[0] != model_channels,
        "no scale and shift of its norms (use_scale_shift_norm)": modulation != 2 * widths[-1],
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"the checkpoint has {what}; UNet2DConditionModel cannot take it")
    if num_head_channels < 1 or any(width % num_head_channels for width in heads):
        raise ValueError(
            f"num_head_channels {num_head_channels} does not divide the {sorted(heads)} channels where the checkpoint "
            "attends; give the one that it was trained with"
        )
    down = ["SimpleCrossAttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends]
    up = ["SimpleCrossAttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends)]
    return {
        "in_channels": known(state, "input_blocks.0.0.weight").shape[1],
        "out_channels": len(known(state, "out.2.weight")),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": tuple(up),
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": num_head_channels,
        "cross_attention_dim": text_width,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": text_width,
    }


@torch.no_grad()
def _unet_from_glide(
    left: dict[str, Tensor], image_size: int, num_head_channels: int, dropout: float
) -> UNet2DConditionModel:
    settings = _unet_settings(left, num_head_channels)
    unet = UNet2DConditionModel(sample_size=image_size, dropout=dropout, **settings)
    state = {}
    for ours, theirs in OUTSIDE.items():
        state |= take_layer(left, ours, theirs)
    for ours, theirs in blocks_of(settings):
        if ".attentions." in ours:
            state |= _take_attention(left, ours, theirs, num_head_channels)
            continue
        for layer, other in RES_BLOCK.items():
            if layer != "conv_shortcut" or f"{theirs}.{other}.weight" in left:
                state |= take_layer(left, f"{ours}.{layer}", f"{theirs}.{other}")
    fill(unet, state)
    return unet.eval()


def blocks_of(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The name of each residual block and attention, here and in a `Text2ImUNet`."""
    layers, levels = settings["layers_per_block"], len(settings["block_out_channels"])
    names = [("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1")]
    names += [("mid_block.resnets.1", "middle_block.2")]
    # Their input block 0 is the first convolution.
    sides = [("down", "input_blocks", 1, layers), ("up", "output_blocks", 0, layers + 1)]
    for side, stack, first, count in sides:
        for level, kind in enumerate(settings[f"{side}_block_types"]):
            attends, ours = kind.startswith("SimpleCrossAttn"), f"{side}_blocks.{level}"
            start = first + level * (layers + 1)
            for place in range(count):
                names.append((f"{ours}.resnets.{place}", f"{stack}.{start + place}.0"))
                if attends:
                    names.append((f"{ours}.attentions.{place}", f"{stack}.{start + place}.1"))
            if level < levels - 1:
                last = f"{start + layers}.0" if side == "down" else f"{start + layers}.{1 + attends}"
                names.append((f"{ours}.{side}samplers.0", f"{stack}.{last}"))
    return names


def _take_attention(left: dict[str, Tensor], ours: str, theirs: str, head_channels: int) -> dict[str, Tensor]:
    state = take_layer(left, f"{ours}.group_norm", f"{theirs}.norm")
    heads = len(state[f"{ours}.group_norm.weight"]) // head_channels
    own, added = ("to_q", "to_k", "to_v"), ("add_k_proj", "add_v_proj")
    state |= take_stacked(left, f"{theirs}.qkv", tuple(f"{ours}.{name}" for name in own), heads)
    state |= take_stacked(left, f"{theirs}.encoder_kv", tuple(f"{ours}.{name}" for name in added), heads)
    out = take_layer(left, f"{ours}.to_out.0", f"{theirs}.proj_out")
    return state | {name: tensor[..., 0] if tensor.ndim == 3 else tensor for name, tensor in out.items()}

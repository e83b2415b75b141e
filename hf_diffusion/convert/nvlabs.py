"""Checkpoints of NVlabs/denoising-diffusion-gan <-> DDGANGenerator, bit for bit.

The reference keeps the generator's modules in one flat list in the order of their construction;
`_generator_modules` walks our attributes in that order. Its released weights are for non-commercial
use: converting them does not change their licence.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_diffusion.convert.checkpoints import read_checkpoint
from hf_diffusion.convert.nvlabs_flags import (
    DISCRIMINATOR_FLAGS,
    GENERATOR_FLAGS,
    Flags,
    discriminator_config,
    flags_of_namespace,
    generator_config,
    scheduler_config,
)
from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler


State = Mapping[str, Tensor]

_LINEAR = {"weight": "weight", "bias": "bias"}
_BLOCK = {
    "GroupNorm_0.style": "norm_in.style_proj",
    "Conv_0": "conv_in",
    "Dense_0": "time_proj",
    "Conv_1": "conv_out",
    "Conv_2": "conv_skip",
}
_ATTENTION = {"GroupNorm_0": "norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out"}
_DISCRIMINATOR_BLOCK = {"conv1.0": "conv_in", "dense_t1": "time_proj", "conv2.0": "conv_out", "skip.0": "conv_skip"}


def generator_from_nvlabs(state: State, flags: Flags) -> DDGANGenerator:
    """The generator of a reference state dict (`netG_<epoch>.pth`, or `netG_dict` of
    `content.pth`)."""
    model = DDGANGenerator(**generator_config(flags))
    _load(model, state, _generator_names(model), "generator")
    return model.eval()


def discriminator_from_nvlabs(state: State, flags: Flags) -> DDGANDiscriminator:
    """The discriminator of a reference state dict (`netD_dict` of `content.pth`)."""
    model = DDGANDiscriminator(**discriminator_config(flags))
    _load(model, state, _discriminator_names(model), "discriminator")
    return model.eval()


def generator_to_nvlabs(model: DDGANGenerator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the flags of the reference's generator that computes the same as `model`.

    Raises ValueError if the model uses what the reference does not have: classes, patches, images
    that are not square, a U-Net of ADM.
    """
    if not isinstance(model, DDGANGenerator):
        raise ValueError(
            f"the reference has no counterpart of a {type(model).__name__}; a DDGANGenerator can be exported"
        )
    _check_expressible(model)
    config = model.config
    flags = {theirs: config[ours] for theirs, ours in GENERATOR_FLAGS.items()}
    flags |= {"conditional": True, "resamp_with_conv": True, "not_use_tanh": not config.tanh}
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    return _rename(model, _generator_names(model)), flags


def discriminator_to_nvlabs(model: DDGANDiscriminator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the flags of the reference's discriminator that computes the same as
    `model`.

    Raises ValueError if the model uses what the reference does not have: classes, patches,
    contiguous groups, ...
    """
    _check_expressible(model)
    flags = {theirs: model.config[ours] for theirs, ours in DISCRIMINATOR_FLAGS.items()}
    return _rename(model, _discriminator_names(model)), flags


def scheduler_from_nvlabs(flags: Flags) -> DDGANScheduler:
    """The scheduler of a training run of the reference."""
    return DDGANScheduler(**scheduler_config(flags))


@dataclass(frozen=True)
class NvlabsCheckpoint:
    """State dicts and flags of a file of the reference; `kind` says which weights they are."""

    generator: State
    discriminator: State | None
    flags: dict[str, Any]
    kind: str


def read_nvlabs_checkpoint(path: Path) -> NvlabsCheckpoint:
    """What `netG_<epoch>.pth` or `content.pth` holds.

    The file of an epoch holds averaged weights, and no flags. A training state has its flags, the
    discriminator, and, where an average was kept, that beside the generator's weights in training.
    The average is taken then.
    """
    content = read_checkpoint(path, allowed=[argparse.Namespace])
    if "netG_dict" not in content:
        return NvlabsCheckpoint(_without_module_prefix(content), None, {}, "the weights of the file")
    state = _without_module_prefix(content["netG_dict"])
    discriminator = _without_module_prefix(content.get("netD_dict") or {}) or None
    flags = flags_of_namespace(content.get("args", {}))
    # Their optimizer numbers the parameters in the order of the state dict; fixed Fourier
    # frequencies have no average.
    slots = content.get("optimizerG", {}).get("state", {})
    averages = {name: slots[i]["ema"] for i, name in enumerate(state) if "ema" in slots.get(i, {})}
    complete = averages.keys() >= {name for name in state if name != "all_modules.0.W"}
    kind = "the weights in training of a training state, which holds no average"
    if complete and all(average.shape == state[name].shape for name, average in averages.items()):
        state, kind = state | averages, "the averaged weights of a training state"
    return NvlabsCheckpoint(state, discriminator, flags, kind)


def _without_module_prefix(state: State) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _generator_names(model: DDGANGenerator) -> dict[str, tuple[str, bool]]:
    """Reference name -> (our name, whether the matrix is transposed), of every tensor."""
    names = {}
    for index, (ours, parts) in enumerate(_generator_modules(model)):
        for theirs_part, our_part in parts.items():
            for theirs, leaf, transposed in _leaves(theirs_part):
                full = ".".join(filter(None, (ours, our_part if leaf is None else f"{our_part}.{leaf}")))
                names[f"all_modules.{index}.{theirs}"] = full, transposed
    for number in range(1 + model.config.num_latent_layers):
        for leaf in _LINEAR:
            # 0 is the normalisation, which has no tensors, then linear and SiLU in turn
            name = f"{2 * number + 1}.{leaf}"
            names[f"z_transform.{name}"] = f"latent_mapping.{name}", False
    tensors = model.state_dict()
    return {theirs: ours for theirs, ours in names.items() if ours[0] in tensors}


def _generator_modules(model: DDGANGenerator) -> Iterator[tuple[str, dict[str, str]]]:
    """(our prefix, parts) in the order of the reference's list."""
    second_norm = (
        {"GroupNorm_1.style": "norm_out.style_proj"}
        if model.config.block_type == "biggan"
        else {"GroupNorm_1": "norm_out"}
    )
    block = _BLOCK | second_norm
    if model.config.time_embedding == "fourier":
        yield "time_features", {"W": "frequencies"}
    yield from (("time_mlp.0", _LINEAR), ("time_mlp.2", _LINEAR), ("conv_in", _LINEAR))
    pyramid = {"Conv2d_0" if model.config.fir and model.config.progressive_input == "residual" else "Conv_0": "conv"}
    for level, down in enumerate(model.down_levels):
        for i, attention in enumerate(down.attentions):
            yield f"down_levels.{level}.blocks.{i}", block
            if not isinstance(attention, torch.nn.Identity):
                yield f"down_levels.{level}.attentions.{i}", _ATTENTION
        if down.downsample is not None:
            yield f"down_levels.{level}.downsample", block
        if down.pyramid is not None:
            yield f"down_levels.{level}.pyramid", pyramid
    yield from (("mid_block_in", block), ("mid_attention", _ATTENTION), ("mid_block_out", block))
    for level, up in enumerate(model.up_levels):
        for i in range(len(up.blocks)):
            yield f"up_levels.{level}.blocks.{i}", block
        if up.attention is not None:
            yield f"up_levels.{level}.attention", _ATTENTION
        if up.to_image is not None:
            yield from _to_image(f"up_levels.{level}.to_image")
        if up.upsample is not None:
            yield f"up_levels.{level}.upsample", block
    if model.config.progressive_output == "none":
        yield from _to_image("to_image")


def _to_image(prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    yield from ((f"{prefix}.norm", _LINEAR), (f"{prefix}.conv", _LINEAR))


def _leaves(part: str) -> list[tuple[str, str | None, bool]]:
    """(reference name, our leaf or None for a tensor, transposed) of one part of a module."""
    if part in ("weight", "bias", "W"):
        return [(part, None, False)]
    if part.startswith("NIN_"):  # stored (in, out), the transpose of a linear layer's matrix
        return [(f"{part}.W", "weight", True), (f"{part}.b", "bias", False)]
    return [(f"{part}.{leaf}", leaf, False) for leaf in _LINEAR]


def _discriminator_names(model: DDGANDiscriminator) -> dict[str, tuple[str, bool]]:
    parts = {f"t_embed.main.{i}": f"time_mlp.{i}" for i in (0, 2)}
    parts |= {"start_conv": "conv_in", "final_conv": "conv_out", "end_linear": "linear_out"}
    for i in range(len(model.blocks)):
        parts |= {f"conv{i + 1}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _DISCRIMINATOR_BLOCK.items()}
    tensors = model.state_dict()
    names = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in parts.items() for leaf in _LINEAR}
    return {theirs: (ours, False) for theirs, ours in names.items() if ours in tensors}


def _load(model: torch.nn.Module, state: State, names: dict[str, tuple[str, bool]], what: str) -> None:
    state = _without_module_prefix(state)
    missing, unknown = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"the checkpoint is not a {what} of these flags: {len(missing)} tensors are missing (first {missing[:3]}),"
            f" {len(unknown)} are unknown (first {unknown[:3]}); give the flags that it was trained with"
        )
    own = model.state_dict()
    for theirs, (ours, transposed) in names.items():
        tensor = state[theirs].T if transposed else state[theirs]
        if tensor.shape != own[ours].shape:
            raise ValueError(
                f"{theirs} has shape {tuple(tensor.shape)} but these flags give {tuple(own[ours].shape)}; give the"
                f" flags that the {what} was trained with"
            )
        own[ours].copy_(tensor)


def _rename(model: torch.nn.Module, names: dict[str, tuple[str, bool]]) -> State:
    own = model.state_dict()
    return {
        theirs: (own[ours].T if transposed else own[ours]).detach().cpu().clone().contiguous()
        for theirs, (ours, transposed) in names.items()
    }


def _check_expressible(model: DDGANGenerator | DDGANDiscriminator) -> None:
    config = model.config
    plain = {"num_class_embeds": None, "patch_size": 1}
    if isinstance(model, DDGANDiscriminator):
        plain |= {"fir_kernel": (1, 3, 3, 1), "stddev_group_size": 4, "stddev_contiguous_groups": False}
    ours = {name: config[name] for name, value in plain.items() if _comparable(config[name]) != value}
    if not isinstance(config.sample_size, int):
        ours["sample_size"] = config.sample_size
    if ours:
        raise ValueError(
            f"the reference has no counterpart of {ours}; only models with {plain} and square images can be exported"
        )


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

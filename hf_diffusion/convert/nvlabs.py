"""Checkpoints of NVlabs/denoising-diffusion-gan <-> DDGANGenerator, DDGANDiscriminator, bit for bit.

The reference keeps the generator's modules in one flat list in the order of their construction; `_generator_modules` walks our
attributes in that order. Its released weights are for non-commercial use: converting them does not change their licence.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler


State = Mapping[str, Tensor]
Flags = Mapping[str, Any]

# their flag -> our argument
GENERATOR_FLAGS = {
    "image_size": "sample_size",
    "num_channels": "in_channels",
    "num_channels_dae": "model_channels",
    "ch_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attention_sizes",
    "nz": "latent_dim",
    "z_emb_dim": "latent_embed_dim",
    "n_mlp": "num_latent_layers",
    "dropout": "dropout",
    "resblock_type": "block_type",
    "progressive_input": "progressive_input",
    "progressive_combine": "progressive_combine",
    "progressive": "progressive_output",
    "fir": "fir",
    "fir_kernel": "fir_kernel",
    "skip_rescale": "skip_rescale",
    "embedding_type": "time_embedding",
    "fourier_scale": "fourier_scale",
    "centered": "centered",
}
DISCRIMINATOR_FLAGS = {
    "image_size": "sample_size",
    "num_channels": "in_channels",
    "ngf": "base_channels",
    "t_emb_dim": "time_embed_dim",
    "kind": "variant",
    "leaky_relu_slope": "negative_slope",
}
SCRIPT_DEFAULTS = {"num_latent_layers": 3}  # where train_ddgan.py and the constructor of DDGANGenerator differ

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


def generator_config(flags: Flags) -> dict:
    """Arguments of DDGANGenerator for the flags of train_ddgan.py; a flag that is absent has the script's default."""
    if not flags.get("conditional", True):
        raise ValueError(
            "conditional=False (a generator without time) has no counterpart; T > 1 needs conditional=True"
        )
    if flags.get("resblock_type", "biggan") not in ("biggan", "biggan_oneadagn"):
        raise ValueError(
            f"resblock_type={flags['resblock_type']!r} fails in the reference; choose 'biggan' or 'biggan_oneadagn'"
        )
    if flags.get("progressive", "none") not in ("none", "output_skip"):
        raise ValueError(
            f"progressive={flags['progressive']!r} fails in the reference; choose 'none' or 'output_skip'"
        )
    config = {ours: flags[theirs] for theirs, ours in GENERATOR_FLAGS.items() if theirs in flags}
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return SCRIPT_DEFAULTS | config | {"tanh": not flags.get("not_use_tanh", False)}


def discriminator_config(flags: Flags) -> dict:
    """Arguments of DDGANDiscriminator for the flags of train_ddgan.py.

    `kind` ("small", "large") may be given; otherwise images of up to 32 pixels take the small one, as the script does by dataset.
    `nc`, the channels of both arguments together, may stand for `num_channels`.
    """
    config = {ours: flags[theirs] for theirs, ours in DISCRIMINATOR_FLAGS.items() if theirs in flags}
    config.setdefault("variant", "small" if flags["image_size"] <= 32 else "large")
    return config | ({"in_channels": flags["nc"] // 2} if "nc" in flags else {})


def scheduler_config(flags: Flags) -> dict:
    """Arguments of DDGANScheduler for the flags of train_ddgan.py."""
    return {
        "num_train_timesteps": flags.get("num_timesteps", 4),
        "beta_min": flags.get("beta_min", 0.1),
        "beta_max": flags.get("beta_max", 20.0),
        "schedule": "geometric" if flags.get("use_geometric", False) else "vp",
    }


def generator_from_nvlabs(state: State, flags: Flags) -> DDGANGenerator:
    """The generator of a reference state dict (`netG_<epoch>.pth`, or `netG_dict` of `content.pth`)."""
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

    Raises ValueError if the model uses what the reference does not have: classes, patches, images that are not square.
    """
    _check_expressible(model)
    config = model.config
    flags = {theirs: config[ours] for theirs, ours in GENERATOR_FLAGS.items()}
    flags |= {"conditional": True, "resamp_with_conv": True, "not_use_tanh": not config.tanh}
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    return _rename(model, _generator_names(model)), flags


def discriminator_to_nvlabs(model: DDGANDiscriminator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the flags of the reference's discriminator that computes the same as `model`.

    Raises ValueError if the model uses what the reference does not have: classes, patches, contiguous groups, ...
    """
    _check_expressible(model)
    flags = {theirs: model.config[ours] for theirs, ours in DISCRIMINATOR_FLAGS.items()}
    return _rename(model, _discriminator_names(model)), flags


def scheduler_from_nvlabs(flags: Flags) -> DDGANScheduler:
    """The scheduler of a training run of the reference."""
    return DDGANScheduler(**scheduler_config(flags))


def load_nvlabs_checkpoint(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """Read a `.pth` or `.safetensors` state dict without running code from it; `entry` names one of `content.pth`.

    The `module.` prefix of data-parallel training is removed.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}; give a .pth or .safetensors file")
    if Path(path).suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if entry is None and "netG_dict" in state:
        raise ValueError(f"{path} holds a whole training state; choose entry='netG_dict' or 'netD_dict'")
    if entry is not None and entry not in state:
        raise ValueError(f"{path} has no entry {entry!r}; it has {sorted(state)[:8]}")
    return _without_module_prefix(state if entry is None else state[entry])


def _without_module_prefix(state: State) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _generator_names(model: DDGANGenerator) -> dict[str, tuple[str, bool]]:
    """Reference name -> (our name, whether the matrix is transposed), for every tensor of a generator."""
    names = {}
    for index, (ours, parts) in enumerate(_generator_modules(model)):
        for theirs_part, our_part in parts.items():
            for theirs, leaf, transposed in _leaves(theirs_part):
                full = ".".join(filter(None, (ours, our_part if leaf is None else f"{our_part}.{leaf}")))
                names[f"all_modules.{index}.{theirs}"] = full, transposed
    for number in range(1 + model.config.num_latent_layers):
        for leaf in _LINEAR:
            name = f"{2 * number + 1}.{leaf}"  # 0 is the normalisation, which has no tensors, then linear and SiLU in turn
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
    """(reference name, our leaf or None where the part is a tensor, transposed) of one part of a module."""
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
                f"{theirs} has shape {tuple(tensor.shape)} but these flags give {tuple(own[ours].shape)}; give the flags that"
                f" the {what} was trained with"
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

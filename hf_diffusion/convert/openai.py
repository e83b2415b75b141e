"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion to and from our models, bit for
bit in float32.

A checkpoint of theirs is a state dict alone; its settings are the constructor arguments ("flags")
of their `UNetModel` or `EncoderUNetModel`, with attention_resolutions as downsampling factors.
`unet_flags` and `classifier_flags` make them from the flags of their scripts. Beware: head counts,
the attention order and dropout leave no trace in the weights, so a wrong value of those is found by
nobody.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_diffusion.convert.checkpoints import read_checkpoint
from hf_diffusion.models.unet_adm import ADMClassifier, ADMDownsample, ADMResBlock, ADMUNet2DModel


# our name of a layer -> theirs, inside a block
RES_BLOCK = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "shortcut": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}
# the same for whole models
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
HEADS = {
    "adaptive": {"head.norm": "out.0", "head.proj": "out.3"},
    "attention": {
        "head.norm": "out.0",
        "head.positional_embedding": "out.2.positional_embedding",
        "head.qkv": "out.2.qkv_proj",
        "head.proj": "out.2.c_proj",
    },
    "spatial": {"head.linear_1": "out.0", "head.linear_2": "out.2"},
    "spatial_v2": {"head.linear_1": "out.0", "head.norm": "out.1", "head.linear_2": "out.3"},
}

# defaults of their constructors; None marks what they require. These flags change no number of the
# float32 network
REQUIRED = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions")
DEFAULTS = {
    "dropout": 0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
IGNORED = ("use_checkpoint", "use_fp16")


def read_openai_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pt or .safetensors file of theirs; ValueError for what is none."""
    state_dict = read_checkpoint(path)
    if not all(torch.is_tensor(value) for value in state_dict.values()):
        raise ValueError(
            f"{path} holds no plain state dict; give modelNNNNNN.pt or ema_RATE_NNNNNN.pt, not the optimizer's file"
        )
    return state_dict


def unet_from_openai(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> ADMUNet2DModel:
    """Our U-Net, in eval mode, from the weights and the constructor arguments of a `UNetModel`.

    Raises ValueError if the weights do not fit the flags, and names the one that probably is wrong.
    """
    config = _config(flags, extra={"num_classes": None})
    upsample = flags.get("num_heads_upsample", -1)
    model = ADMUNet2DModel(
        **config,
        out_channels=flags["out_channels"],
        num_heads_upsample=None if upsample == -1 else upsample,
        num_class_embeds=flags.get("num_classes"),
    )
    return _load(model, state_dict)


def classifier_from_openai(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> ADMClassifier:
    """Our classifier, in eval mode, from weights and arguments of an `EncoderUNetModel`.

    Raises ValueError if the weights do not fit the flags, and names the one that probably is wrong.
    """
    config = _config(flags, extra={"pool": "adaptive"})
    model = ADMClassifier(**config, num_classes=flags["out_channels"], pool=flags.get("pool", "adaptive"))
    return _load(model, state_dict)


def unet_to_openai(model: ADMUNet2DModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and constructor arguments of the `UNetModel` that computes the same as `model`.

    Raises ValueError if the model uses what guided-diffusion does not have (patches, a null class,
    other norm groups, ...).
    """
    if model.config.null_class:
        raise ValueError("guided-diffusion has no null class; export a model without null_class")
    flags = _flags(model)
    flags["out_channels"] = model.config.out_channels
    flags["num_classes"] = model.config.num_class_embeds
    upsample = model.config.num_heads_upsample
    flags["num_heads_upsample"] = -1 if upsample is None else upsample
    return _export(model), flags


def classifier_to_openai(model: ADMClassifier) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and constructor arguments of the `EncoderUNetModel` that computes the same.

    Raises ValueError if the model uses what guided-diffusion does not have (patches, other norm
    groups, ...).
    """
    if model.config.pool == "attention" and model.config.num_head_channels is None:
        raise ValueError("pool 'attention' of guided-diffusion needs num_head_channels; set it to the width of a head")
    flags = _flags(model)
    flags["out_channels"] = model.config.num_classes
    flags["num_heads_upsample"] = -1
    flags["pool"] = model.config.pool
    return _export(model), flags


def unet_flags(
    image_size: int = 64,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    num_heads: int = 4,
    num_heads_upsample: int = -1,
    num_head_channels: int = -1,
    attention_resolutions: str = "16,8",
    channel_mult: str = "",
    dropout: float = 0.0,
    class_cond: bool = False,
    learn_sigma: bool = False,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    num_classes: int = 1000,
) -> dict[str, Any]:
    """Constructor arguments of the `UNetModel` that the scripts build from their flags (defaults as
    in script_util.py).

    `attention_resolutions` are sides in pixels here. `num_classes` is 1000 in their code; it counts
    with `class_cond` only.
    """
    return {
        "image_size": image_size,
        "in_channels": 3,
        "model_channels": num_channels,
        "out_channels": 6 if learn_sigma else 3,
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": _factors(image_size, attention_resolutions),
        "dropout": dropout,
        "channel_mult": _channel_mult(image_size, channel_mult),
        "num_classes": num_classes if class_cond else None,
        "num_heads": num_heads,
        "num_head_channels": num_head_channels,
        "num_heads_upsample": num_heads_upsample,
        "use_scale_shift_norm": use_scale_shift_norm,
        "resblock_updown": resblock_updown,
        "use_new_attention_order": use_new_attention_order,
    }


def classifier_flags(
    image_size: int = 64,
    classifier_width: int = 128,
    classifier_depth: int = 2,
    classifier_attention_resolutions: str = "32,16,8",
    classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True,
    classifier_pool: str = "attention",
    num_classes: int = 1000,
) -> dict[str, Any]:
    """Constructor arguments of the `EncoderUNetModel` that script_util.py builds from flags."""
    return {
        "image_size": image_size,
        "in_channels": 3,
        "model_channels": classifier_width,
        "out_channels": num_classes,
        "num_res_blocks": classifier_depth,
        "attention_resolutions": _factors(image_size, classifier_attention_resolutions),
        "channel_mult": _channel_mult(image_size, ""),
        "num_head_channels": 64,  # not a flag of the scripts
        "use_scale_shift_norm": classifier_use_scale_shift_norm,
        "resblock_updown": classifier_resblock_updown,
        "pool": classifier_pool,
    }


def _factors(image_size: int, resolutions: str) -> list[int]:
    return [image_size // int(side) for side in resolutions.split(",")]


def _channel_mult(image_size: int, channel_mult: str) -> list[float]:
    if channel_mult:
        return [float(mult) if "." in mult else int(mult) for mult in channel_mult.split(",")]
    defaults = {512: [0.5, 1, 1, 2, 2, 4, 4], 256: [1, 1, 2, 2, 4, 4], 128: [1, 1, 2, 3, 4], 64: [1, 2, 3, 4]}
    defaults[32] = [1, 2, 2, 2]  # improved-diffusion only
    if image_size not in defaults:
        raise ValueError(f"no default channel_mult for image_size {image_size}; give channel_mult, such as '1,2,2,2'")
    return defaults[image_size]


def _config(flags: Mapping[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Our constructor arguments that both networks share."""
    known = {*REQUIRED, *DEFAULTS, *IGNORED, *extra}
    unknown, missing = sorted(set(flags) - known), [name for name in REQUIRED if name not in flags]
    if unknown or missing:
        raise ValueError(
            f"flags of OpenAI's constructor: unknown {unknown}, missing {missing}; known are {sorted(known)} "
            "(from the flags of their scripts make them with unet_flags or classifier_flags)"
        )
    flags = {**DEFAULTS, **flags}
    if flags["dims"] != 2:
        raise ValueError(f"dims is {flags['dims']}; only networks for images (dims 2) can be converted")
    levels = [2**level for level in range(len(flags["channel_mult"]))]
    head_channels = flags["num_head_channels"]
    return {
        "sample_size": flags["image_size"],
        "in_channels": flags["in_channels"],
        "model_channels": flags["model_channels"],
        "channel_mult": tuple(flags["channel_mult"]),
        "num_res_blocks": flags["num_res_blocks"],
        # a factor of no level has no effect in their network, and is an error in ours
        "attention_resolutions": tuple(factor for factor in levels if factor in set(flags["attention_resolutions"])),
        "num_heads": flags["num_heads"],
        "num_head_channels": None if head_channels == -1 else head_channels,
        "use_scale_shift_norm": flags["use_scale_shift_norm"],
        "resblock_updown": flags["resblock_updown"],
        "conv_resample": flags["conv_resample"],
        "use_new_attention_order": flags["use_new_attention_order"],
        "dropout": flags["dropout"],
    }


def _flags(model: ADMUNet2DModel | ADMClassifier) -> dict[str, Any]:
    """Their constructor arguments that both networks share."""
    config = model.config
    theirs = {"norm_num_groups": 32, "residual_rescale": False, "patch_size": 1}
    ours = {name: config[name] for name, value in theirs.items() if config[name] != value}
    if ours or not isinstance(config.sample_size, int):
        ours |= {} if isinstance(config.sample_size, int) else {"sample_size": config.sample_size}
        raise ValueError(f"guided-diffusion has no {ours}; it needs {theirs} and a square sample_size")
    return {
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "model_channels": config.model_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
        "channel_mult": list(config.channel_mult),
        "conv_resample": config.conv_resample,
        "dims": 2,
        "num_heads": config.num_heads,
        "num_head_channels": -1 if config.num_head_channels is None else config.num_head_channels,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_new_attention_order": config.use_new_attention_order,
    }


def _names(model: ADMUNet2DModel | ADMClassifier) -> dict[str, str]:
    """Our name of every parameter -> theirs."""
    layers = dict(OUTSIDE)
    if isinstance(model, ADMClassifier):
        layers |= HEADS[model.config.pool]

    def rename(ours: str, theirs: str, block: nn.Module) -> None:
        if isinstance(block, ADMDownsample):
            table = {"conv": "op"}
        elif isinstance(block, ADMResBlock):
            table = RES_BLOCK
        else:
            table = ATTENTION | {"conv": "conv"}
        layers.update({f"{ours}.{name}": f"{theirs}.{other}" for name, other in table.items()})

    for position, (name, block) in enumerate(model.mid_block.named_children()):
        rename(f"mid_block.{name}", f"middle_block.{position}", block)
    stacks = [("down_blocks", "input_blocks", 1)]  # their first input block is our conv_in
    stacks += [("up_blocks", "output_blocks", 0)] if isinstance(model, ADMUNet2DModel) else []
    for ours, theirs, first in stacks:
        for index, layer in enumerate(getattr(model, ours)):
            if isinstance(layer, ADMDownsample):
                rename(f"{ours}.{index}", f"{theirs}.{index + first}.0", layer)
                continue
            for position, (name, block) in enumerate(layer.named_children()):
                rename(f"{ours}.{index}.{name}", f"{theirs}.{index + first}.{position}", block)

    names = {}
    for key in model.state_dict():
        layer, _, kind = key.rpartition(".")
        names[key] = layers[key] if key in layers else f"{layers[layer]}.{kind}"
    return names


def _to_theirs(name: str, tensor: Tensor) -> Tensor:
    """Their shape of a parameter: linear maps of feature maps are convolutions there."""
    if name.endswith(("qkv.weight", "proj_out.weight", "qkv_proj.weight", "c_proj.weight")):
        return tensor[:, :, None]
    # The map of pool "adaptive"; that of "spatial_v2" is linear.
    if name == "out.3.weight" and tensor.shape[1] != 2048:
        return tensor[:, :, None, None]
    return tensor.T if name == "out.2.positional_embedding" else tensor


def _export(model: ADMUNet2DModel | ADMClassifier) -> dict[str, Tensor]:
    names = _names(model)
    state_dict = {names[key]: value.detach().cpu() for key, value in model.state_dict().items()}
    return {name: _to_theirs(name, value).clone().contiguous() for name, value in state_dict.items()}


@torch.no_grad()
def _load(model: ADMUNet2DModel | ADMClassifier, state_dict: Mapping[str, Tensor]) -> Any:
    """Fill our model from their state dict; raises one ValueError for all that does not fit."""
    parameters = model.state_dict()
    targets = {theirs: _to_theirs(theirs, parameters[ours]) for ours, theirs in _names(model).items()}  # views
    unknown = [name for name in state_dict if name not in targets]
    missing = [name for name in targets if name not in state_dict]
    shapes = [
        f"{name} is {tuple(state_dict[name].shape)} instead of {tuple(target.shape)}"
        for name, target in targets.items()
        if name in state_dict and state_dict[name].shape != target.shape
    ]
    if unknown or missing or shapes:
        raise ValueError(
            f"the checkpoint does not fit the flags: {len(unknown)} unknown keys {unknown[:3]}, {len(missing)} "
            f"missing keys {missing[:3]}, {len(shapes)} other shapes {shapes[:3]}; {_wrong_flag(targets, state_dict)}"
        )
    for name, target in targets.items():
        target.copy_(state_dict[name])
    return model.eval()


def _wrong_flag(targets: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str:
    """The most likely reason why a checkpoint does not fit, as advice."""
    if "label_emb.weight" in state_dict and "label_emb.weight" not in targets:
        rows = len(state_dict["label_emb.weight"])
        return f"set num_classes to {rows} (class_cond), because it holds a class embedding"
    if "label_emb.weight" in targets and "label_emb.weight" not in state_dict:
        return "set num_classes to None (no class_cond), because it holds no class embedding"

    def differs(name: str, dim: int) -> int | None:
        """The checkpoint's size of a dimension where it is not the model's."""
        if name not in state_dict or name not in targets or state_dict[name].ndim != targets[name].ndim:
            return None
        size = state_dict[name].shape[dim]
        return size if size != targets[name].shape[dim] else None

    if size := differs("time_embed.0.weight", 1):
        return f"set model_channels (num_channels, classifier_width) to {size}"
    if size := differs("label_emb.weight", 0):
        return f"set num_classes to {size}"
    if size := differs("input_blocks.0.0.weight", 1):
        return f"set in_channels to {size}"
    if size := differs("out.2.weight", 0) or differs("out.2.c_proj.weight", 0) or differs("out.3.weight", 0):
        return f"set out_channels to {size} (twice the image's channels with learn_sigma; the classes of a classifier)"
    if size := differs("out.2.positional_embedding", 1):
        return f"check image_size, because it holds positions of {size - 1} pixels at the lowest resolution"
    if size := differs("middle_block.0.emb_layers.1.weight", 0):
        if 2 * size == len(targets["middle_block.0.emb_layers.1.weight"]):
            return "set use_scale_shift_norm to False (or check channel_mult)"
        if size == 2 * len(targets["middle_block.0.emb_layers.1.weight"]):
            return "set use_scale_shift_norm to True (or check channel_mult)"
        return "check channel_mult"
    resampling = any(".op." in name for name in state_dict)
    if resampling != any(".op." in name for name in targets):
        return f"set resblock_updown to {not resampling} (or check conv_resample)"
    if any(name.startswith("out.") for name in set(state_dict) ^ set(targets)):
        return "check pool"
    return "check num_res_blocks, channel_mult, attention_resolutions and resblock_updown"

"""Our pipelines in diffusers' own classes, which load anywhere and run no code of ours.

The U-Net of ADM without patches is a `UNet2DModel` under other names; DDPM and DDIM sampling are
`DDPMPipeline` and `DDIMPipeline`. What has no counterpart there is refused with the reason. Stock
schedulers keep their tables in float32, so that images agree within float error only.
"""

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from hf_diffusion.models.unet_adm import ADMDownsample, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import LEARNED, DDIMEtaScheduler, GaussianScheduler


RES_BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time_proj": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
}
OUTSIDE = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "time_embedding.linear_1": "time_embedding.linear_1",
    "time_embedding.linear_2": "time_embedding.linear_2",
}
KEPT = (
    "num_train_timesteps",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
)


def pipeline_to_stock(
    pipe: ClassifierFreeGuidancePipeline, class_label: int | str | None = None
) -> DDPMPipeline | DDIMPipeline:
    """The stock pipeline that samples the same images; one class of a class-conditional model, for
    diffusers has no such pipeline.

    A DDIMPipeline does so when it is called with `use_clipped_model_output=True` and the
    scheduler's eta, and with a number of steps that divides the training timesteps. `class_label`
    "none" takes the null class. ValueError says what cannot be expressed.
    """
    if not isinstance(pipe, ClassifierFreeGuidancePipeline) or not isinstance(pipe.unet, ADMUNet2DModel):
        network = getattr(pipe, "unet", None) or getattr(pipe, "generator", None)
        raise ValueError(f"a {type(pipe).__name__} with a {type(network).__name__} has no counterpart in diffusers")
    if not isinstance(pipe.scheduler, GaussianScheduler):
        raise ValueError(
            f"the scheduler is a {type(pipe.scheduler).__name__}, which no unconditional pipeline of diffusers takes"
        )
    unet, scheduler = unet_to_stock(pipe.unet, label_row(pipe, class_label)), scheduler_to_stock(pipe.scheduler)
    cls = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    return cls(unet=unet, scheduler=scheduler)


def label_row(pipe: ClassifierFreeGuidancePipeline, class_label: int | str | None) -> int | None:
    """The row of the class embedding that a class, by number or name, or "none" stands for; None
    for a model without classes."""
    if pipe.num_classes is None:
        if class_label is not None:
            raise ValueError(f"class_label {class_label!r} was given for a model without classes; leave it out")
        return None
    if class_label is None:
        raise ValueError(
            "no pipeline of diffusers hands class labels to a UNet2DModel; choose one class by --class_label, or "
            "'none' for the null class"
        )
    if class_label == "none":
        if pipe.null_class_id is None:
            raise ValueError("class_label 'none' needs a model that was trained with a null class; name a class")
        return pipe.null_class_id
    is_number = (
        isinstance(class_label, str) and class_label.isdecimal() and class_label not in (pipe.id2label or {}).values()
    )
    return pipe.get_label_ids(int(class_label) if is_number else class_label)[0]


@torch.no_grad()
def unet_to_stock(model: ADMUNet2DModel, row: int | None = None) -> UNet2DModel:
    """The `UNet2DModel` that computes the same as `model`, of one row of its class embedding;
    ValueError if there is none."""
    stock = UNet2DModel(**_stock_config(model))
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in OUTSIDE:
            state[f"{OUTSIDE[layer]}.{kind}"] = tensor
    if row is not None:  # one class for all images is a constant in the conditioning vector
        state["time_embedding.linear_2.bias"] = model.time_embedding.linear_2.bias + model.class_embedding.weight[row]
    mid = model.mid_block
    state |= _res_block(mid.resnet_1, "mid_block.resnets.0") | _res_block(mid.resnet_2, "mid_block.resnets.1")
    state |= _attention(mid.attention, "mid_block.attentions.0")
    per_level = model.config.num_res_blocks + 1  # in the encoder the last of a level is its downsampling
    for index, block in enumerate(model.down_blocks):
        level, place = divmod(index, per_level)
        if isinstance(block, ADMDownsample):
            state |= _renamed(block.conv, f"down_blocks.{level}.downsamplers.0.conv")
        elif place == per_level - 1:
            state |= _res_block(block.resnet, f"down_blocks.{level}.downsamplers.0")
        else:
            state |= _layer(block, f"down_blocks.{level}", place)
    for index, block in enumerate(model.up_blocks):
        level, place = divmod(index, per_level)
        state |= _layer(block, f"up_blocks.{level}", place)
        if block.upsample is not None:
            target = f"up_blocks.{level}.upsamplers.0"
            is_res_block = model.config.resblock_updown
            state |= (
                _res_block(block.upsample, target) if is_res_block else _renamed(block.upsample.conv, f"{target}.conv")
            )
    stock.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})
    return stock.eval()


def _stock_config(model: ADMUNet2DModel) -> dict:
    config = model.config
    widths = [int(mult * config.model_channels) for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    refused = {
        f"patch_size {config.patch_size}": config.patch_size != 1,
        "residual_rescale": config.residual_rescale,
        "resampling without convolutions (conv_resample=False)": not config.conv_resample
        and not config.resblock_updown,
        f"a first level that is not model_channels wide (channel_mult {config.channel_mult[0]})": widths[0]
        != config.model_channels,
        "another number of heads in the decoder (num_heads_upsample)": config.num_heads_upsample
        not in (None, config.num_heads)
        and config.num_head_channels is None,
    }
    wide = {width for width, attend in zip(widths, attends) if attend} | {widths[-1]}  # the middle always attends
    head = config.num_head_channels or max(wide) // config.num_heads
    refused["heads of different widths (num_heads at several widths)"] = (
        config.num_head_channels is None and len(wide) > 1
    )
    for what, is_there in refused.items():
        if is_there:
            raise ValueError(f"diffusers' UNet2DModel has no {what}, so this network stays with our class")
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if config.resblock_updown
        else ("DownBlock2D", "UpBlock2D")
    )
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "time_embedding_dim": 4 * config.model_channels,
        "down_block_types": tuple("AttnDownBlock2D" if attend else down for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else up for attend in reversed(attends)),
        "block_out_channels": tuple(widths),
        "layers_per_block": config.num_res_blocks,
        "downsample_type": "resnet" if config.resblock_updown else "conv",
        "upsample_type": "resnet" if config.resblock_updown else "conv",
        "dropout": config.dropout,
        "attention_head_dim": head,
        "norm_num_groups": config.norm_num_groups,
        "attn_norm_num_groups": config.norm_num_groups,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
    }


def _renamed(module: torch.nn.Module, target: str) -> dict[str, Tensor]:
    return {f"{target}.{name}": tensor for name, tensor in module.state_dict().items()}


def _res_block(block: torch.nn.Module, target: str) -> dict[str, Tensor]:
    named = (name.rpartition(".") for name in block.state_dict())
    state = block.state_dict()
    return {f"{target}.{RES_BLOCK[layer]}.{kind}": state[f"{layer}.{kind}"] for layer, _, kind in named}


def _attention(block: torch.nn.Module, target: str) -> dict[str, Tensor]:
    state = _renamed(block.norm, f"{target}.group_norm") | _renamed(block.proj, f"{target}.to_out.0")
    for kind, stacked in block.qkv.state_dict().items():  # (3 * C, C) or (3 * C,), see qkv_attention
        split = (3, block.num_heads, -1) if block.new_order else (block.num_heads, 3, -1)
        parts = stacked.reshape(*split, *stacked.shape[1:]).unbind(0 if block.new_order else 1)  # each (heads, D, ...)
        for name, part in zip(("to_q", "to_k", "to_v"), parts):
            state[f"{target}.{name}.{kind}"] = part.flatten(0, 1)
    return state


def _layer(block: torch.nn.Module, target: str, place: int) -> dict[str, Tensor]:
    state = _res_block(block.resnet, f"{target}.resnets.{place}")
    return state if block.attention is None else state | _attention(block.attention, f"{target}.attentions.{place}")


def scheduler_to_stock(scheduler: GaussianScheduler) -> DDPMScheduler | DDIMScheduler:
    """The stock scheduler of the same process; ValueError where its steps would differ."""
    config = scheduler.config
    is_ddim = isinstance(scheduler, DDIMEtaScheduler)
    if config.prediction_type == "previous_mean":
        raise ValueError(
            "diffusers' schedulers have no prediction_type 'previous_mean', so this pipeline stays with ours"
        )
    if is_ddim and config.variance_type in LEARNED:
        raise ValueError(
            "diffusers' DDIM does not take the second half of a learned variance; save with a DDPM scheduler"
        )
    if not is_ddim and config.timestep_spacing != "leading" and config.variance_type != "fixed_small":
        raise ValueError(
            f"diffusers' DDPM adds noise in the last step with timestep_spacing {config.timestep_spacing!r} and "
            f"variance_type {config.variance_type!r}; save with timestep_spacing 'leading'"
        )
    kept = {name: config[name] for name in KEPT}
    names = ("linear", "scaled_linear", "squaredcos_cap_v2") + (() if is_ddim else ("sigmoid",))
    if config.trained_betas is None and config.beta_schedule in names:
        kept |= {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")}
    else:
        kept["trained_betas"] = scheduler.betas.tolist()
    return DDIMScheduler(**kept) if is_ddim else DDPMScheduler(**kept, variance_type=config.variance_type)

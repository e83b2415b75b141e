"""One architecture in two classes: diffusers' UNet2DModel and ADMUNet2DModel."""

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from hf_diffusion.models.unet_adm import ADMUNet2DModel


WIDTHS = (32, 64, 96)


def networks(size: int, channels: int, blocks: int, scale_shift: bool = False) -> tuple[UNet2DModel, ADMUNet2DModel]:
    """Three levels of 32, 64 and 96 channels with `blocks` residual blocks each.

    The lower two have attention with 32 channels a head. Both networks have the same parameters and
    the same multiplications, which is checked. The output maps, zero in a fresh U-Net, are drawn
    anew: products with zeros or denormal numbers may take another time than a trained network's.
    """
    torch.manual_seed(0)
    stock = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=WIDTHS,
        layers_per_block=blocks,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    ).eval()
    ours = ADMUNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        model_channels=WIDTHS[0],
        channel_mult=tuple(width / WIDTHS[0] for width in WIDTHS),
        num_res_blocks=blocks,
        attention_resolutions=(2, 4),
        num_head_channels=32,
        norm_num_groups=32,
        use_scale_shift_norm=scale_shift,
    ).eval()
    for module in ours.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.reset_parameters()
    work = [(parameters(model), operations(model, size, channels)) for model in (stock, ours)]
    if not scale_shift and work[0] != work[1]:
        raise AssertionError(f"parameters and operations differ: UNet2DModel {work[0]}, ADMUNet2DModel {work[1]}")
    return stock, ours


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def operations(model: torch.nn.Module, size: int, channels: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, channels, size, size), 0)
    return counter.get_total_flops()

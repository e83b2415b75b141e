"""Tiny saved pipelines for the commands."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler


@pytest.fixture(scope="package")
def folders(tmp_path_factory):
    """Saved pipelines by name.

    "digits" has 3 classes named by digits that are not their numbers, "many" has 30. "plain" and
    "stock" have none.
    """
    parent = tmp_path_factory.mktemp("pipelines")
    options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1, 2),
               "num_res_blocks": 1, "attention_resolutions": (), "num_heads": 2, "norm_num_groups": 4}  # fmt: skip
    torch.manual_seed(0)
    for name, classes in (("digits", 3), ("plain", None), ("many", 30)):
        unet = ADMUNet2DModel(**options, num_class_embeds=classes, null_class=classes is not None)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.normal_(std=0.2)
        names = {0: "2", 1: "0", 2: "1"} if name == "digits" else None
        ClassifierFreeGuidancePipeline(unet, CosineDDPMScheduler(), id2label=names).save_pretrained(parent / name)
    blocks = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, norm_num_groups=2, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(parent / "stock")
    return parent

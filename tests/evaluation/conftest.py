"""Tiny pipelines with random weights, and a tiny data set of two kinds of images."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler


@pytest.fixture(autouse=True)
def on_the_cpu():
    PartialState(cpu=True)


def tiny_pipeline(classes: int | None = None, null_class: bool = True, **scheduler) -> ClassifierFreeGuidancePipeline:
    torch.manual_seed(0)
    unet = ADMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_heads=2, norm_num_groups=4, num_class_embeds=classes,
        null_class=null_class and classes is not None,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.1)
    pipeline = ClassifierFreeGuidancePipeline(unet.eval(), DDIMEtaScheduler(**scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_pipeline(channels: int = 1) -> DDIMPipeline:
    """A pipeline of diffusers alone, which says nothing of itself."""
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
                       norm_num_groups=2, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                       layers_per_block=1)  # fmt: skip
    return DDIMPipeline(unet, DDIMScheduler())


@pytest.fixture(scope="session")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def conditional():
    return tiny_pipeline(classes=3)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """120 grey 8x8 images in the class folders bright and dark, one third of them bright."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(120):
        name = "dark" if i % 3 else "bright"
        (folder / name).mkdir(exist_ok=True)
        pixels = generator.integers(0, 100, (8, 8), dtype=np.uint8) + (0 if i % 3 else 120)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder

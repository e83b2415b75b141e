"""Small models with what a card asks of them, made in milliseconds."""

import torch

from hf_diffusion import (
    ADMClassifier,
    ADMGenerator,
    ADMUNet2DModel,
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    DDGANGenerator,
    DDGANPipeline,
    DDGANScheduler,
    DDIMEtaScheduler,
)


NAMES = ["T-shirt/top", "Trouser", 'the "Bag"', "Sandal", "Coat"]
ID2LABEL = dict(enumerate(NAMES))
SHAPE = {"sample_size": 8, "in_channels": 1, "num_res_blocks": 1}
ADM = {**SHAPE, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": ()}


def unet(classes: bool) -> ADMUNet2DModel:
    torch.manual_seed(0)
    return ADMUNet2DModel(**ADM, out_channels=1, **({"num_class_embeds": 5, "null_class": True} if classes else {}))


def classifier() -> ADMClassifier:
    torch.manual_seed(0)
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    return ADMClassifier(**ADM, num_classes=5, num_head_channels=32, id2label=ID2LABEL, noise_schedule=schedule)


def generator(classes: bool) -> DDGANGenerator:
    torch.manual_seed(0)
    labels = {"num_class_embeds": 5} if classes else {}
    return DDGANGenerator(**SHAPE, model_channels=8, channel_mult=(1, 2), **labels)


def from_denoiser() -> DDGANPipeline:
    alpha_bars = DDIMEtaScheduler().alphas_cumprod, DDGANScheduler(4).alpha_bar[1:]
    network = ADMGenerator.from_denoiser(unet(True), alpha_bars[0], "epsilon", alpha_bars[1])
    return DDGANPipeline(network, DDGANScheduler(4), id2label=ID2LABEL)


PIPELINES = {
    "class-conditional": lambda: ClassifierFreeGuidancePipeline(unet(True), DDIMEtaScheduler(), id2label=ID2LABEL),
    "unconditional": lambda: ClassifierFreeGuidancePipeline(unet(False), DDIMEtaScheduler()),
    "guided by a classifier": lambda: ClassifierGuidancePipeline(unet(False), classifier(), DDIMEtaScheduler()),
    "guided by nothing yet": lambda: ClassifierGuidancePipeline(unet(True), None, DDIMEtaScheduler()),
    "few steps": lambda: DDGANPipeline(generator(True), DDGANScheduler(4), id2label=ID2LABEL),
    "few steps, from a diffusion model": from_denoiser,
    "few steps, no classes": lambda: DDGANPipeline(generator(False), DDGANScheduler(2)),
}

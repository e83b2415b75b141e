"""Recipes of other packages for the same minutes, as their own examples for such images have them.

Each is called with images, minutes and how many samples to draw, and returns its optimizer steps
and the samples, uint8 (N, H, W) or (N, H, W, 3). The packages are none of ours: pip install
torchcfm, or smalldiffusion, which needs torchvision.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hf_diffusion.data.image_data import ImageData


DRAWN_AT_ONCE = 250


class Batches(IterableDataset):
    """Batches (B, C, H, W) of shuffled images, one epoch after the other."""

    def __init__(self, data: ImageData, size: int):
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[Tensor]:
        for epoch in itertools.count():
            for rows in torch.randperm(len(self.data)).split(self.size):
                yield self.data.fetch(rows.tolist(), epoch)["x_0"]


def as_bytes(samples: list[Tensor], count: int) -> np.ndarray:
    images = torch.cat(samples)[:count].movedim(1, -1).squeeze(-1)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def train_torchcfm(data: ImageData, minutes: float, count: int) -> tuple[int, np.ndarray]:
    """Conditional flow matching by a U-Net of 1.1 M, Adam 1e-3, batch 128; 50 Euler steps."""
    matching = importlib.import_module("torchcfm.conditional_flow_matching")
    unet = importlib.import_module("torchcfm.models.unet")
    torch.manual_seed(0)
    model = unet.UNetModel(dim=tuple(data.sample_shape), num_channels=32, num_res_blocks=1)
    optimizer, matcher = torch.optim.Adam(model.parameters()), matching.ConditionalFlowMatcher(sigma=0.0)
    steps, end = 0, time.perf_counter() + 60 * minutes
    for x_1 in Batches(data, 128):
        t, x_t, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x_1), x_1)
        (model(t, x_t) - velocity).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if time.perf_counter() > end:
            break
    drawn = []
    with torch.no_grad():
        for _ in range(0, count, DRAWN_AT_ONCE):
            x = torch.randn(DRAWN_AT_ONCE, *data.sample_shape)
            for t in torch.linspace(0, 1, 51)[:-1]:
                x = x + model(t, x) / 50
            drawn.append(x)
    return steps, as_bytes(drawn, count)


def train_smalldiffusion(data: ImageData, minutes: float, count: int) -> tuple[int, np.ndarray]:
    """A transformer on patches of 2x2, AdamW 1e-3, batch 1,024, EMA 0.99; 20 accelerated steps."""
    package = importlib.import_module("smalldiffusion")
    torch.manual_seed(0)
    channels, side, _ = data.sample_shape
    shape = {"patch_size": 2, "depth": 6, "head_dim": 32, "num_heads": 6, "mlp_ratio": 4.0}
    model = package.DiT(in_dim=side, channels=channels, **shape)
    schedule = package.ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
    loader = DataLoader(Batches(data, 1024), batch_size=None)
    average = EMAModel(model.parameters(), decay=0.99)
    steps, end = 0, time.perf_counter() + 60 * minutes
    # a step is over when the next one is asked for
    for _ in package.training_loop(loader, model, schedule, epochs=1, lr=1e-3):
        steps += 1
        average.step(model.parameters())
        if time.perf_counter() > end:
            break
    average.copy_to(model.parameters())
    drawn = []
    for _ in range(0, count, DRAWN_AT_ONCE):
        *_, x_0 = package.samples(model, schedule.sample_sigmas(20), gam=1.6, batchsize=DRAWN_AT_ONCE)
        drawn.append(x_0)
    return steps, as_bytes(drawn, count)


OTHERS: dict[str, Callable[[ImageData, float, int], tuple[int, np.ndarray]]] = {
    "torchcfm": train_torchcfm,
    "smalldiffusion": train_smalldiffusion,
}


def why_missing(name: str) -> str | None:
    """In a sentence, why a package cannot be taken; None where it can."""
    try:
        importlib.import_module(name)
        return None
    except ImportError as error:
        return f"{name} is not here ({error}); pip install {name}, or leave it out of --others"

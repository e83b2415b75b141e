"""Images from PNG files to batches: the first epoch, which decodes them, and one that follows.

The other side does what diffusers' train_unconditional.py does with a folder of images: a data set
that opens, resizes and normalises an image whenever it is asked for, under a DataLoader.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hf_diffusion.data.images import load_images
from hf_diffusion.loop.feed import DeviceFeed
from hf_diffusion.randomness import BatchOrder
from tests.benchmarks.pairs import Comparison


IMAGES, SIDE, SIZE, BATCH = 1024, 48, 32, 64


class Decoded(Dataset):
    """An image is decoded whenever it is asked for."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def write_images(folder: Path) -> None:
    """Smooth pictures with some noise, which compress about as photographs do."""
    drawn = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(drawn.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + drawn.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.png")


def stock_epoch(folder: Path, device: torch.device) -> None:
    for batch in DataLoader(Decoded(folder), batch_size=BATCH, shuffle=True, drop_last=True):
        batch.to(device)


def opened(folder: Path):
    return load_images(train_data_dir=str(folder), resolution=SIZE)


def our_epoch(open_data: Callable, device: torch.device) -> None:
    """As the trainer reads it: in its order, through its feed."""
    data = open_data()
    order = BatchOrder(len(data), 0, BATCH, 1, 0, 1)
    for _ in DeviceFeed(data.batches(order, 0, len(data) // BATCH, 0), device):
        pass


def comparisons() -> Iterator[Comparison]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        kept = opened(folder)
        kept.fetch(list(range(len(kept))), 0)
        stock = partial(stock_epoch, folder, device)
        yield Comparison(
            f"epoch of {IMAGES} PNG of {SIDE} px, to {SIZE} on {device.type}",
            stock,
            {
                # opening and looking through the folder included
                "first, decoded": (partial(our_epoch, partial(opened, folder), device), 1.0),
                "later, kept": (partial(our_epoch, lambda: kept, device), 0.1),
            },
            warm_up=False,
        )

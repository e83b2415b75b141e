"""The training image that is nearest to each sample, in pixels: whether a model repeats its data, as far as such a distance can tell.

Letters: N samples, B training images at a time, C channels, H x W pixels, D = C H W. Distances are root mean squares over the D values,
in grey levels of 0 to 255.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.decoding import from_network_range
from hf_diffusion.data.images import ImageData, StreamingImageData, batches


MOST_SEARCHED = 100_000  # training images; of more, evenly spaced ones
CHUNK_VALUES = 2**23  # float32 values of training images in memory at a time, 32 MiB
GREY_LEVELS = 127.5  # in one unit of the network's range of -1 to 1


@dataclass(frozen=True)
class Nearest:
    """`distances` float (N,), `images` uint8 (N, H, W, C), found among `searched` training images.

    `real_distances` float (M,) are those from training images, evenly spaced, to the nearest other one: what a distance means.
    """

    distances: np.ndarray
    images: np.ndarray
    real_distances: np.ndarray
    searched: int

    def sentence(self) -> str:
        """What was measured, in plain numbers."""
        n, m = len(self.distances), len(self.real_distances)
        text = (
            f"From each of {n:,} samples to the nearest of {self.searched:,} training images, by the root mean square difference of the "
            f"pixels in grey levels of 0 to 255: median {np.median(self.distances):.1f}, smallest {self.distances.min():.1f}."
        )
        if m:
            nearer = int((self.distances < self.real_distances.min()).sum())
            text += (
                f" From each of {m:,} training images to the nearest other one: median {np.median(self.real_distances):.1f}, smallest "
                f"{self.real_distances.min():.1f}; {nearer or 'none'} of the samples {'are' if nearer > 1 else 'is'} nearer to a training "
                "image than that."
            )
        return text + " A distance of pixels does not see a copy that is shifted or recoloured."


@torch.no_grad()
def nearest_images(
    samples: np.ndarray,
    data: ImageData | StreamingImageData,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    limit: int = MOST_SEARCHED,
) -> Nearest:
    """Search the training images for the nearest to each sample, uint8 (N, H, W, C), in memory that does not grow with the data.

    Of a data set of more than `limit` images that many evenly spaced ones are searched, of a stream its first ones. Where training mirrors
    images at random, an image and its mirror image are both searched.
    """
    ours = torch.from_numpy(samples).to(device).movedim(-1, 1).float().div_(GREY_LEVELS).sub_(1)  # (N, C, H, W)
    chunk = max(1, min(512, CHUNK_VALUES // ours[0].numel()))
    real, real_indices = _spaced_images(data, len(samples), chunk)
    queries = torch.cat([ours, real.to(device)])  # (N + M, C, H, W)
    own = torch.cat([torch.full((len(ours),), -1), real_indices]).to(device)  # an image is not its own neighbour
    best = torch.full((len(queries),), float("inf"), device=device)
    found = torch.zeros(queries.shape, dtype=torch.uint8)
    mirrored, searched = data.describe()["random_flip"], 0
    for batch in _chunks(data, chunk, limit, num_workers):
        pixels, indices = batch["pixels"].to(device), batch["indices"].to(device)
        for x in (pixels, pixels.flip(-1)) if mirrored else (pixels,):
            squares = _squared_distances(queries, x)  # (N + M, B)
            squares[own[:, None] == indices] = float("inf")
            smallest, places = squares.min(dim=1)
            better = smallest < best
            best = torch.where(better, smallest, best)
            found[better.cpu()] = from_network_range(x[places[better]]).cpu()
        searched += len(indices)
    there = found.to(device).float().div_(GREY_LEVELS).sub_(1)
    # once more as a difference: a sum of products rounds away what is left between an image and its copy
    distances = (queries - there).square().flatten(1).mean(1).sqrt().mul(GREY_LEVELS).cpu().numpy()
    distances[best.isinf().cpu().numpy()] = np.inf  # from a set of one image there is no other
    n = len(ours)
    real_distances = distances[n:][np.isfinite(distances[n:])]
    return Nearest(distances[:n], found[:n].movedim(1, -1).numpy(), real_distances, searched)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, B) squared distances of (N, C, H, W) and (B, C, H, W), up to rounding."""
    a, b = a.flatten(1), b.flatten(1)
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)


def _spaced_images(data: ImageData | StreamingImageData, count: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Up to `count` evenly spaced images of the data, of a stream its first ones, and their indices."""
    if isinstance(data, ImageData):
        chosen = np.unique(np.linspace(0, len(data) - 1, count).round().astype(int)).tolist()
        parts = [data.fetch(chosen[start : start + chunk], epoch=0) for start in range(0, len(chosen), chunk)]
    else:
        parts, missing = [], count
        for batch in itertools.islice(data.stream(0, batch_size=chunk), -(-count // chunk)):
            parts.append({name: values[:missing] for name, values in batch.items()})
            missing -= len(batch["indices"])
    return torch.cat([part["pixels"] for part in parts]), torch.cat([part["indices"] for part in parts])


def _chunks(
    data: ImageData | StreamingImageData, chunk: int, limit: int, num_workers: int
) -> Iterator[dict[str, Tensor]]:
    """Batches that hold every image once, or `limit` of them."""
    if isinstance(data, ImageData):
        count = min(len(data), limit)
        spaced = [place * len(data) // count for place in range(count)]
        positions = ([(0, index) for index in spaced[start : start + chunk]] for start in range(0, count, chunk))
        yield from tqdm(
            batches(data, positions, num_workers), "nearest training images", -(-count // chunk), leave=False
        )
        return
    seen = 0
    for batch in data.stream(0, batch_size=chunk, num_workers=num_workers):
        left = min(data.epoch_length or limit, limit) - seen  # the length is known once the stream has begun anew
        if left <= 0:
            return
        seen += len(batch["indices"])
        yield {name: values[:left] for name, values in batch.items()}

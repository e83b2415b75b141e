"""The training image that is nearest to each sample: whether a model repeats its data.

Letters: N samples, M training images that are compared with all others, B training images at a
time, D values of one. Data say what their samples are, so that points and other vectors are
searched alike. Distances are root mean squares over the D values, of images in grey levels of 0 to
255.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.cards.tables import words_of
from hf_diffusion.data.protocol import TrainingData


# Training images; of more, evenly spaced ones are searched, of a stream the first.
MOST_SEARCHED = 100_000
# float32 values of training images in memory at a time, 32 MiB.
CHUNK_VALUES = 2**23


@dataclass(frozen=True)
class Nearest:
    """What was found among `searched` of `total` training images; None for a stream without an end.

    distances: (N,). images: (N, ...), the nearest training images, in the form of the samples.
    real_distances: (M,), from evenly spaced training images to the nearest other one: what a
        distance means.
    words: what the samples are called, many of them and one.
    """

    distances: np.ndarray
    images: np.ndarray
    real_distances: np.ndarray
    searched: int
    total: int | None
    words: tuple[str, str] = ("images", "image")

    def sentence(self) -> str:
        """What was measured, in plain numbers."""
        things, thing = self.words
        by = "the pixels in grey levels of 0 to 255" if things == "images" else "the values"
        text = (
            f"From each of {len(self.distances):,} samples to the nearest of {self._searched_in_words()}, by the root "
            f"mean square difference of {by}: {_in_words(self.distances)}."
        )
        if len(self.real_distances):
            nearer = int((self.distances < self.real_distances.min()).sum())
            text += (
                f" From each of {len(self.real_distances):,} training {things} to the nearest other one: "
                f"{_in_words(self.real_distances)}; {nearer or 'none'} of the samples {'are' if nearer > 1 else 'is'} "
                f"nearer to a training {thing} than that."
            )
        blind = " A distance of pixels does not see a copy that is shifted or recoloured."
        return text + (blind if things == "images" else "")

    def _searched_in_words(self) -> str:
        count = f"{self.searched:,} training {self.words[0]}"
        if self.total is None:
            return f"the first {count} of a stream, a part of the training set"
        if self.searched < self.total:
            return f"{count}, evenly spaced ones of {self.total:,}"
        return count


@torch.no_grad()
def nearest_images(
    samples: np.ndarray,
    data: TrainingData,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    limit: int = MOST_SEARCHED,
) -> Nearest:
    """The training images that are nearest to samples (N, ...), in memory that the data do not
    grow.

    samples: as drawn, uint8 (N, H, W, C) for images. limit: how many training images are searched
        at most.

    Where training mirrors images at random, an image and its mirror image are both searched.
    """
    chunk = max(1, min(512, CHUNK_VALUES // samples[0].size))
    spaced = list(data.once(chunk, limit=len(samples)))
    real = np.concatenate([data.to_samples(batch) for batch in spaced])
    asked = np.concatenate([samples, real])
    queries = _flat(asked, device)
    # An image is not its own neighbour.
    own = torch.cat([torch.full((len(samples),), -1), *(batch["indices"].cpu() for batch in spaced)])
    best = torch.full((len(queries),), float("inf"))
    found, searched, mirrored = np.zeros_like(asked), 0, data.describe().get("random_flip", False)
    for batch in tqdm(data.once(chunk, limit, num_workers), "nearest training images", leave=False):
        there, indices = data.to_samples(batch), batch["indices"].cpu()
        for candidates in (there, np.flip(there, -2).copy()) if mirrored else (there,):
            distances = torch.cdist(queries, _flat(candidates, device)).cpu()
            distances[own[:, None] == indices] = float("inf")
            smallest, places = distances.min(dim=1)
            better = smallest < best
            best[better] = smallest[better]
            found[better] = candidates[places[better]]
        searched += len(indices)
    # Once more as a difference: products, by which cdist goes, round away what a copy differs by.
    exact = (queries - _flat(found, device)).square().mean(dim=1).sqrt().cpu().numpy()
    n, total = len(samples), data.num_samples
    if total is None and searched < limit:
        total = searched
    # From a set of one image there is no other.
    real_distances = exact[n:][np.isfinite(best[n:].numpy())]
    return Nearest(exact[:n], found[:n], real_distances, searched, total, words_of(data.describe()))


def _flat(samples: np.ndarray, device: torch.device | str) -> Tensor:
    """float32 (B, D)."""
    return torch.from_numpy(samples).to(device).flatten(1).float()


def _in_words(distances: np.ndarray) -> str:
    # Of images tenths of a grey level; values of another scale need their leading digits.
    form = ".1f" if np.median(distances) >= 10 else ".3g"
    return f"median {np.median(distances):{form}}, smallest {distances.min():{form}}"

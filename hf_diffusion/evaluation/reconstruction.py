"""How well an autoencoder gives images back, measured while it trains.

Letters: B images of shape (C, H, W), latents (B, D, h, w).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.evaluation.distances import JACKKNIFE_GROUPS, Moments, frechet_with_error, jackknife_groups
from hf_diffusion.evaluation.feature_networks import load_feature_network
from hf_diffusion.evaluation.feature_training import features_for
from hf_diffusion.evaluation.in_training import Stopping, shares
from hf_diffusion.evaluation.measures import Evaluation, Measure, check_metrics, distance_name
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.evaluation.reference import Reference, reference_statistics
from hf_diffusion.losses.autoencoding import LatentStatistics, latent_statistics
from hf_diffusion.losses.autoencoding_game import Reconstructor


# Grey levels between black and white.
PEAK = 255.0
COLUMNS = 8


class ReconstructionEvaluator:
    """PSNR of reconstructions, and their Frechet distance from the training data.

    The distance of the very originals from the training data stands beside it, which is what a
    perfect autoencoder would have. metrics: of psnr, rfd. originals: real data, not augmented, of
    which `count` evenly spaced ones are given back, from the mean of their latents. data: the
    training data, not augmented. ValueError, before any training, for what cannot be measured.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: Sequence[str],
        originals: TrainingData,
        data: TrainingData,
        *,
        count: int,
        features: str,
        batch_size: int,
    ):
        self.accelerator, self.metrics, self.originals, self.data = accelerator, tuple(metrics), originals, data
        self.indices, self.batch_size = evenly_spaced(len(originals), count), batch_size
        self.reference: Reference | None = None
        self.network = None
        if "rfd" in metrics:
            spec, reason = features_for(features, data, ["fd"], len(self.indices))
            self.network = load_feature_network(spec, data.sample_shape, accelerator.device, reason=reason)
            named = ("eval_num_images, and the images of eval_split,", "max_train_samples")
            check_metrics(["fd"], len(self.indices), len(data), self.network, False, False, named)
        self.keys = [key for metric in metrics for key in (("rfd", "rfd_floor") if metric == "rfd" else (metric,))]

    def prepare(self) -> None:
        """Compute the statistics of the training data, or read them from the cache."""
        if self.network is not None:
            self.reference = reference_statistics(self.data, self.network)

    @torch.no_grad()
    def __call__(self, model: nn.Module, stopping: Stopping) -> Evaluation:
        """The measures of the model's reconstructions, by all processes together."""
        count, groups = len(self.indices), jackknife_groups(len(self.indices), None)
        device = self.accelerator.device
        ratios = torch.zeros(2, dtype=torch.float64, device=device)
        moments = [Moments(self.network.dimension, JACKKNIFE_GROUPS, device) for _ in range(2 if self.network else 0)]
        for rows in shares(count, self.batch_size, stopping):
            batch = self.originals.fetch([self.indices[row] for row in rows], epoch=0)
            with self.accelerator.autocast():
                samples = [self.originals.to_samples(pixels) for pixels in (batch, given_back(model, batch))]
            values = peak_signal_to_noise(*samples)
            ratios += torch.tensor([values.sum(), (values**2).sum()], dtype=torch.float64).to(device)
            for sums, images in zip(moments, samples):
                sums.add(self.network.features(images), groups[list(rows)])
        total, squares = reduce(ratios, "sum").tolist()
        measures = {}
        if "psnr" in self.metrics:
            mean, spread = total / count, max(0.0, squares / count - (total / count) ** 2)
            measures["psnr"] = Measure("PSNR of reconstructions, dB", mean, (spread / count) ** 0.5, better="higher")
        for sums, key, what in zip(moments, ("rfd_floor", "rfd"), ("originals", "reconstructions")):
            sums.reduce()
            distance = frechet_with_error(sums, (self.reference.mean, self.reference.covariance))
            name = f"{distance_name('F', count, self.network)} of {what}"
            measures[key] = Measure(name, *distance, better="lower")
        return Evaluation(measures, self._protocol(count))

    def _protocol(self, count: int) -> dict:
        protocol = {"count": count, "data": data_protocol(self.originals)}
        if self.reference is None:
            return protocol
        return protocol | {"features": self.network.describe(), "reference": self.reference.protocol}


def given_back(model: nn.Module, batch: Batch) -> Batch:
    """The batch with the images that a `Reconstructor` makes of its own, from latents' means."""
    device = next(model.parameters()).device
    x = batch["x_0"].to(device)
    noise = torch.zeros(len(x), *model.latent_shape(x.shape[1:]), device=device)
    return {**batch, "x_0": model(x, noise)["reconstruction"].cpu()}


def peak_signal_to_noise(images: np.ndarray, others: np.ndarray) -> Tensor:
    """PSNR (B,) in dB between images uint8 (B, H, W, C); equal ones have that of half a level."""
    error = torch.from_numpy(images.astype(np.float64) - others).square().flatten(1).mean(1)
    return 10 * (PEAK**2 / error.clamp(min=0.25)).log10()


@torch.no_grad()
def reconstruction_grid(model: nn.Module, originals: TrainingData, count: int) -> Image.Image:
    """Rows of real images, each above the row of their reconstructions."""
    indices = evenly_spaced(len(originals), count)
    batch = originals.fetch(indices, epoch=0)
    pairs = [originals.to_samples(images) for images in (batch, given_back(model, batch))]
    columns = min(COLUMNS, len(indices))
    starts = range(0, len(indices) // columns * columns, columns)
    rows = [images[start : start + columns] for start in starts for images in pairs]
    return originals.picture(np.concatenate(rows), columns, ["original", "reconstruction"] * len(starts))


@torch.no_grad()
def measured_latents(
    reconstructor: Reconstructor, data: TrainingData, count: int, batch_size: int
) -> LatentStatistics:
    """Statistics of the latents of `count` evenly spaced training images.

    Gaussian latents count as if they were sampled: the variance is that of their means and, added
    to it, the mean of theirs.
    """
    autoencoder, variances = reconstructor.autoencoder, []
    device = next(autoencoder.parameters()).device

    def means() -> Iterator[Tensor]:
        for batch in data.once(batch_size, limit=count):
            encoded = autoencoder.encode(batch["x_0"].to(device))
            if hasattr(encoded, "latents"):
                yield encoded.latents
                continue
            variances.append(encoded.latent_dist.var.double().mean((2, 3)).cpu())
            yield encoded.latent_dist.mean

    found = latent_statistics(means())
    if not variances:
        return found
    added = torch.cat(variances).mean(0)  # (D,)
    stds = tuple(math.hypot(std, math.sqrt(more)) for std, more in zip(found.channel_stds, added.tolist()))
    return found._replace(std=math.hypot(found.std, math.sqrt(float(added.mean()))), channel_stds=stds)

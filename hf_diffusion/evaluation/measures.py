"""How near generated images come to real ones: distances, precision and recall, label accuracy, over any number of processes.

A measure's name says how many images and which features stand behind it. Letters: B and N images, C channels, H x W pixels,
D features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from hf_diffusion.evaluation.distances import (
    JACKKNIFE_GROUPS,
    PR_NEIGHBOURS,
    Moments,
    frechet_with_error,
    in_order,
    jackknife_groups,
    kernel_distance,
    precision_recall_with_error,
    selection,
)
from hf_diffusion.evaluation.feature_networks import FeatureNetwork, network_range
from hf_diffusion.evaluation.reference import Reference


METRICS = ("fd", "kd", "pr", "label_accuracy")
PR_IMAGES = 2000
FEATURE_BATCH = 250
PUBLISHED_COUNT = 50_000  # what "FID" without a number means in papers


@dataclass(frozen=True)
class Measure:
    """One figure: `error` is its standard error over draws of the generated images, None where it has none."""

    name: str
    value: float
    error: float | None = None


def distance_name(letter: str, count: int, network: FeatureNetwork) -> str:
    """ "FD-5k (features X)", or "FID-5k" for Inception's 2048 features, or "FID" where N is that of published figures.

    letter: "F" for Frechet, "K" for kernel.
    """
    size = f"{count / 1000:g}k" if count >= 1000 else str(count)
    if not network.is_inception:
        return f"{letter}D-{size} (features {network.name})"
    return f"{letter}ID" if count >= PUBLISHED_COUNT else f"{letter}ID-{size}"


def check_metrics(
    metrics: Iterable[str],
    count: int,
    reference_count: int,
    network: FeatureNetwork,
    classifies: bool,
    labelled: bool,
    options: tuple[str, str] = ("num_images", "max_reference_images"),
) -> None:
    """Raise ValueError, before any image is drawn, for metrics that could not be computed from so many images.

    `options` are the settings that the messages name for more generated and more real images.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; choose from {list(METRICS)}")
    least = network.dimension + 1
    for side, images, option in (
        ("generated", count, options[0]),
        ("real", reference_count, options[1]),
    ):
        if "fd" in metrics and images < least:
            raise ValueError(
                f"{images} {side} images are too few for a Frechet distance in {network.dimension} features, whose covariance "
                f"has full rank from {least} images on; raise {option} to {least} or more, or measure kd, which needs fewer"
            )
        if "kd" in metrics and images < 20:
            raise ValueError(f"{images} {side} images are too few for a kernel distance; raise {option} to 20 or more")
        if "pr" in metrics and images <= PR_NEIGHBOURS:
            raise ValueError(f"{images} {side} images are too few for precision and recall; raise {option}")
    if "label_accuracy" in metrics and not labelled:
        raise ValueError("label_accuracy needs images that were asked for by class; this model or call has no classes")
    if "label_accuracy" in metrics and not classifies:
        raise ValueError("label_accuracy needs a classifier: give one, or a feature network that has one")


@torch.no_grad()
def measure_images(
    chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    count: int,
    network: FeatureNetwork,
    reference: Reference,
    metrics: Iterable[str],
    classifier: FeatureNetwork | None = None,
    all_labels: Sequence[int] | None = None,
) -> dict[str, Measure]:
    """The measures of `count` generated images against a reference, on all processes.

    chunks: this process's share as (positions (B,) among all images, uint8 images (B, H, W, C), labels (B,) or None); the
    result does not depend on how images are shared out. `classifier` None takes the feature network's own for label_accuracy. `all_labels`
    are the classes of all images, not of this share: with them the error is that of images of these classes.
    """
    chosen, _ = selection(count, reference.count)
    place = torch.full((count,), -1).index_copy(0, chosen, torch.arange(len(chosen)))
    groups = jackknife_groups(count, all_labels)
    moments = Moments(network.dimension, JACKKNIFE_GROUPS, network.device)
    kept, hits = [], torch.zeros(2, dtype=torch.float64, device=PartialState().device)
    for positions, images, labels in chunks:
        features = network_features(network, images)
        positions = torch.as_tensor(positions)
        if "fd" in metrics:
            moments.add(features, groups[positions])
        if "kd" in metrics or "pr" in metrics:
            wanted = place[positions] >= 0
            kept.append((place[positions][wanted].numpy(), features[wanted].numpy()))
        if "label_accuracy" in metrics:
            guesses = _in_batches(images, (classifier or network).classify).argmax(1).numpy()
            hits += torch.tensor([(guesses == labels).sum(), len(labels)]).to(hits)
    results = {}
    if "fd" in metrics:
        moments.reduce()
        value, error = frechet_with_error(moments, (reference.mean, reference.covariance))
        results["fd"] = Measure(distance_name("F", count, network), value, error)
    if "kd" in metrics or "pr" in metrics:
        fake = in_order(gather_object(kept), len(chosen))
        results |= _measures_of_single_images(metrics, reference.features, fake, count, network, groups[chosen])
    if "label_accuracy" in metrics:
        right, seen = reduce(hits, "sum").tolist()
        share = right / seen
        name = f"label accuracy ({(classifier or network).name})"
        results["label_accuracy"] = Measure(name, share, (share * (1 - share) / seen) ** 0.5)
    return results


def _measures_of_single_images(
    metrics: Iterable[str], real: Tensor, fake: Tensor, count: int, network: FeatureNetwork, groups: Tensor
) -> dict[str, Measure]:
    results = {}
    if "kd" in metrics:
        results["kd"] = Measure(distance_name("K", count, network), *kernel_distance(real, fake))
    if "pr" in metrics:
        real, fake = real[:PR_IMAGES], fake[:PR_IMAGES]
        described = f"(k={PR_NEIGHBOURS}, {len(real)} real, {len(fake)} generated, features {network.name})"
        precision, recall = precision_recall_with_error(real, fake, groups[:PR_IMAGES])
        results["precision"] = Measure(f"precision {described}", *precision)
        results["recall"] = Measure(f"recall {described}", *recall)
    return results


def network_features(network: FeatureNetwork, images: np.ndarray) -> Tensor:
    """Features float32 (N, D) on the CPU of uint8 images (N, H, W, C)."""
    return _in_batches(images, network)


def _in_batches(images: np.ndarray, function) -> Tensor:
    starts = range(0, len(images), FEATURE_BATCH)
    return torch.cat([function(network_range(images[start : start + FEATURE_BATCH])).cpu() for start in starts])

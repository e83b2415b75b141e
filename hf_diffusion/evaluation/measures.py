"""How near samples come to real data: distances, precision and recall, label accuracy.

A measure's name says how many samples and which features stand behind it. Letters: B and N samples,
C channels, H x W pixels, D features.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
from hf_diffusion.evaluation.feature_networks import FeatureNetwork
from hf_diffusion.evaluation.reference import Reference


METRICS = ("fd", "kd", "pr", "label_accuracy")
PR_SAMPLES = 2000
LEAST_FOR_KD = 20
# What "FID" without a number means in papers.
PUBLISHED_COUNT = 50_000


@dataclass(frozen=True)
class Breakdown:
    """The parts of a figure along some quantity, such as a bound by timestep, to be drawn.

    `along` and `unit` name the axes, `errors` are standard errors, None where there are none.
    """

    along: str
    unit: str
    places: list[float]
    values: list[float]
    errors: list[float] | None
    caption: str


@dataclass(frozen=True)
class Measure:
    """One figure and which way is better.

    `error` is its standard error over draws of the samples, None where it has none.
    """

    name: str
    value: float
    error: float | None = None
    better: Literal["lower", "higher"] = field(kw_only=True)
    breakdown: Breakdown | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better={self.better!r} of {self.name!r} must be 'lower' or 'higher'")

    def beats(self, other: float) -> bool:
        """Whether the value is strictly better than another one; NaN beats nothing."""
        return self.value < other if self.better == "lower" else self.value > other


@dataclass(frozen=True)
class Evaluation:
    """Measures by the keys that files and `--best_metric` use, and what they hold for."""

    measures: dict[str, Measure]
    protocol: dict[str, Any]

    def numbers(self) -> dict[str, float]:
        """Key -> value, and key_error -> standard error where there is one."""
        values = {key: measure.value for key, measure in self.measures.items()}
        errors = {key: m.error for key, m in self.measures.items() if m.error is not None and math.isfinite(m.error)}
        return values | {f"{key}_error": error for key, error in errors.items()}


def distance_name(letter: str, count: int, network: FeatureNetwork) -> str:
    """ "FD-5k (features X)", or "FID-5k" for Inception's 2048 features.

    It is "FID" alone where N is that of published figures. letter: "F" for Frechet, "K" for kernel.
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
    """Raise ValueError, before any sample is drawn, for metrics that so many samples cannot give.

    `options` are the settings that the messages name for more generated and more real samples.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; choose from {list(METRICS)}")
    least = network.dimension + 1
    for side, samples, option in (
        ("generated", count, options[0]),
        ("real", reference_count, options[1]),
    ):
        if "fd" in metrics and samples < least:
            raise ValueError(
                f"{samples} {side} samples are too few for a Frechet distance in {network.dimension} features, whose "
                f"covariance has full rank from {least} on; raise {option} to {least} or more, or measure kd, which "
                "needs fewer"
            )
        if "kd" in metrics and samples < LEAST_FOR_KD:
            raise ValueError(
                f"{samples} {side} samples are too few for a kernel distance; raise {option} to {LEAST_FOR_KD} or more"
            )
        if "pr" in metrics and samples <= PR_NEIGHBOURS:
            raise ValueError(f"{samples} {side} samples are too few for precision and recall; raise {option}")
    if "label_accuracy" in metrics and not labelled:
        raise ValueError(
            "label_accuracy needs samples that were asked for by class; this model or call has no classes"
        )
    if "label_accuracy" in metrics and not classifies:
        raise ValueError("label_accuracy needs a classifier: give one, or a feature network that has one")


@torch.no_grad()
def measure_samples(
    chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    count: int,
    network: FeatureNetwork,
    reference: Reference,
    metrics: Iterable[str],
    classifier: FeatureNetwork | None = None,
    all_labels: Sequence[int] | None = None,
) -> dict[str, Measure]:
    """The measures of `count` samples against a reference, on all processes.

    chunks: this process's share as (positions (B,) among all samples, samples as `draw` gives them,
    labels (B,) or None). The result does not depend on how samples are shared out. `classifier`
    None takes the feature network's own for label_accuracy. `all_labels` are the classes of all
    samples, not of this share: with them the error is that of samples of these classes.
    """
    chosen, _ = selection(count, reference.count)
    place = torch.full((count,), -1).index_copy(0, chosen, torch.arange(len(chosen)))
    groups = jackknife_groups(count, all_labels)
    moments = Moments(network.dimension, JACKKNIFE_GROUPS, network.device)
    kept, hits = [], torch.zeros(2, dtype=torch.float64, device=PartialState().device)
    for positions, samples, labels in chunks:
        features = network.features(samples)
        positions = torch.as_tensor(positions)
        if "fd" in metrics:
            moments.add(features, groups[positions])
        if "kd" in metrics or "pr" in metrics:
            wanted = place[positions] >= 0
            kept.append((place[positions][wanted].numpy(), features[wanted].numpy()))
        if "label_accuracy" in metrics:
            guesses = (classifier or network).logits(samples).argmax(1).numpy()
            hits += torch.tensor([(guesses == labels).sum(), len(labels)]).to(hits)
    results = {}
    if "fd" in metrics:
        moments.reduce()
        distance = frechet_with_error(moments, (reference.mean, reference.covariance))
        results["fd"] = Measure(distance_name("F", count, network), *distance, better="lower")
    if "kd" in metrics or "pr" in metrics:
        fake = in_order(gather_object(kept), len(chosen))
        results |= _measures_of_single_samples(metrics, reference.features, fake, count, network, groups[chosen])
    if "label_accuracy" in metrics:
        right, seen = reduce(hits, "sum").tolist()
        share = right / seen
        name = f"label accuracy ({(classifier or network).name})"
        results["label_accuracy"] = Measure(name, share, (share * (1 - share) / seen) ** 0.5, better="higher")
    return results


def _measures_of_single_samples(
    metrics: Iterable[str], real: Tensor, fake: Tensor, count: int, network: FeatureNetwork, groups: Tensor
) -> dict[str, Measure]:
    results = {}
    if "kd" in metrics:
        results["kd"] = Measure(distance_name("K", count, network), *kernel_distance(real, fake), better="lower")
    if "pr" in metrics:
        real, fake = real[:PR_SAMPLES], fake[:PR_SAMPLES]
        described = f"(k={PR_NEIGHBOURS}, {len(real)} real, {len(fake)} generated, features {network.name})"
        precision, recall = precision_recall_with_error(real, fake, groups[:PR_SAMPLES])
        results["precision"] = Measure(f"precision {described}", *precision, better="higher")
        results["recall"] = Measure(f"recall {described}", *recall, better="higher")
    return results

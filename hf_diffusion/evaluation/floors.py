"""What real data measure against other real data: what a perfect model would get from so many.

In many features a distance of few samples is mostly bias: of no use without this beside it.
Letters: M real samples, N of them put in the place of generated ones.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from hf_diffusion.evaluation.distances import Moments, frechet_distance, kernel_distance, precision_recall
from hf_diffusion.evaluation.measures import LEAST_FOR_KD, PR_NEIGHBOURS, PR_SAMPLES
from hf_diffusion.evaluation.reference import Reference


class Floor(NamedTuple):
    """A measure of `count` real samples against `others`, with its standard error if it has one."""

    value: float
    count: int
    others: int
    error: float | None = None


def floors(reference: Reference, count: int, metrics: Iterable[str]) -> dict[str, Floor]:
    """The measures of real samples, by the keys of measures, as near to `count` as there are.

    They are chosen at random among those whose features were kept, and measured against all others
    (fd), or others of those that were kept. No sample is on both sides, so N is half of them at
    most. A measure that needs more than there are has no floor.
    """
    kept, found = reference.features, {}
    n = min(count, len(kept), reference.count // 2)
    half = min(count, len(kept) // 2)
    if "fd" in metrics and n > kept.shape[1]:
        found["fd"] = Floor(_frechet_of_part(reference, kept[:n]), n, reference.count - n)
    if "kd" in metrics and half >= LEAST_FOR_KD:
        value, error = kernel_distance(kept[half : 2 * half], kept[:half])
        found["kd"] = Floor(value, half, half, error)
    half = min(half, PR_SAMPLES)
    if "pr" in metrics and half > PR_NEIGHBOURS:
        others = kept[half : half + PR_SAMPLES]
        precision, recall = precision_recall(others, kept[:half])
        found |= {"precision": Floor(precision, half, len(others)), "recall": Floor(recall, half, len(others))}
    return found


def _frechet_of_part(reference: Reference, part: Tensor) -> float:
    """The distance of some of the reference's samples, features (N, D), to all its others."""
    of_part, rest = Moments(part.shape[1]), Moments(part.shape[1])
    of_part.add(part)
    mean, total = reference.mean.cpu(), reference.count
    outer = (total - 1) * reference.covariance.cpu() + total * mean.outer(mean)
    rest.count, rest.total = total - of_part.count, total * mean - of_part.total
    rest.outer = outer - of_part.outer
    return frechet_distance(of_part.mean_and_covariance(), rest.mean_and_covariance())

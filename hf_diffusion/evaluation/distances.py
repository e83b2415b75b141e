"""Distances between sets of feature vectors, and their errors.

Frechet distance: Heusel et al. 2017, arXiv:1706.08500. Kernel distance: Binkowski et al. 2018,
arXiv:1801.01401. Precision and
recall: Kynkaanniemi et al. 2019, arXiv:1904.06991. Letters: N or M vectors, D features, G groups.
Features are float32, everything that is computed from them is float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor


# Of each side, for the measures that compare single samples.
KEPT_FEATURES = 10_000
PR_NEIGHBOURS = 3
JACKKNIFE_GROUPS = 10


class Moments:
    """Sums of features in float64 from which mean and covariance follow, apart for each group.

    The sums are added up over processes, so no process needs to hold all features.
    """

    def __init__(self, dimension: int, groups: int = 1, device: torch.device | str = "cpu"):
        where = {"dtype": torch.float64, "device": "cpu" if torch.device(device).type == "mps" else device}
        self.count = torch.zeros(groups, **where)
        self.total = torch.zeros(groups, dimension, **where)
        self.outer = torch.zeros(groups, dimension, dimension, **where)

    def add(self, features: Tensor, group: Tensor | None = None) -> None:
        """Add features (B, D); `group` int64 (B,) says which group each image belongs to."""
        features = features.to(self.total)
        group = torch.zeros(len(features), dtype=torch.long) if group is None else group
        for g in group.unique().tolist():
            rows = features[(group == g).to(features.device)]
            self.count[g] += len(rows)
            self.total[g] += rows.sum(0)
            self.outer[g] += rows.T @ rows

    def reduce(self) -> None:
        """Add up the sums of all processes; afterwards each of them has all."""
        self.count, self.total, self.outer = (reduce(sums, "sum") for sums in (self.count, self.total, self.outer))

    def mean_and_covariance(self, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean (D,) and unbiased covariance (D, D) of all images, or of all but one group."""
        kept = [g for g in range(len(self.count)) if g != without]
        count, total, outer = self.count[kept].sum(), self.total[kept].sum(0), self.outer[kept].sum(0)
        mean = total / count
        return mean, (outer - count * mean.outer(mean)) / (count - 1)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, Eq. 6 of 1706.08500.

    Each is given as (mean (D,), covariance (D, D)).
    """
    return _frechet_to(_square_root(b[1].double()), a, b)


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _frechet_to(root: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = (tuple(part.double().to(root.device) for part in side) for side in (a, b))
    # tr sqrt(A B) = tr sqrt(sqrt(B) A sqrt(B)), and the latter is symmetric: real eigenvalues, no
    # complex matrix root
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_with_error(samples: Moments, reference: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The distance of all samples and its standard error.

    One group of samples at a time is left out (jackknife).

    The error is that of drawing other samples against the same reference; the bias of a finite N is
    not in it.
    """
    root = _square_root(reference[1].double())
    value = _frechet_to(root, samples.mean_and_covariance(), reference)
    groups = len(samples.count)
    left_out = [_frechet_to(root, samples.mean_and_covariance(without=g), reference) for g in range(groups)]
    return value, float(np.sqrt((groups - 1) * np.var(left_out)))


def kernel_distance(real: Tensor, fake: Tensor, block: int | None = None) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^3, and its standard error.

    It is the mean over disjoint blocks.

    real (N, D), fake (M, D), each in random order. Blocks have `block` images, by default a tenth
    of the smaller side and at most 1000; they share no image, so that their spread tells the error.
    """
    smaller = min(len(real), len(fake))
    size = block or min(1000, smaller // 10)
    if size < 2 or smaller < 2 * size:
        raise ValueError(
            f"the kernel distance needs two blocks of at least 2 samples a side, got {len(real)} and {len(fake)} "
            f"samples with blocks of {size}; give at least 20"
        )
    blocks = [
        _squared_mmd(real[start : start + size].double(), fake[start : start + size].double())
        for start in range(0, smaller - size + 1, size)
    ]
    return float(np.mean(blocks)), float(np.std(blocks, ddof=1) / np.sqrt(len(blocks)))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, xx, yy = len(x), kernel(x, x), kernel(y, y)
    # Without the pairs of a sample with itself.
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = PR_NEIGHBOURS) -> tuple[float, float]:
    """Shares of fakes (M, D) within the k-nearest-neighbour balls of the reals (N, D), and of reals
    within those of the fakes."""
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more than {neighbours} samples a side, got "
            f"{len(real)} real and {len(fake)} generated ones"
        )
    real, fake = real.double(), fake.double()
    return _covered(fake, real, neighbours), _covered(real, fake, neighbours)


def precision_recall_with_error(
    real: Tensor, fake: Tensor, group: Tensor, neighbours: int = PR_NEIGHBOURS
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Precision and recall, each with its standard error; group int64 (M,) is that of each fake.

    One group of fakes at a time is left out (jackknife).

    The errors are those of drawing other fakes against the same reals, as for the Frechet distance;
    that of recall, which is no mean over images, comes out up to 1.4 times too large (N 300 to 500
    of 4 to 64 features). No bootstrap: a fake that is drawn twice is its own nearest neighbour,
    which shrinks the balls.
    """
    values = precision_recall(real, fake, neighbours)
    real, fake = real.double(), fake.double()
    # Of one fake no other fake decides.
    inside = _inside(fake, real, neighbours)
    kept = [group != g for g in group.unique().tolist()]
    precisions = [float(inside[rows].double().mean()) for rows in kept]
    recalls = [_covered(real, fake[rows], neighbours) for rows in kept]
    errors = (float(np.sqrt((len(kept) - 1) * np.var(parts))) for parts in (precisions, recalls))
    return tuple(zip(values, errors))


def _covered(points: Tensor, centres: Tensor, neighbours: int, rows: int = 1000) -> float:
    """Share of points that lie nearer to some centre than its k-th neighbour among the centres."""
    return float(_inside(points, centres, neighbours, rows).double().mean())


def _inside(points: Tensor, centres: Tensor, neighbours: int, rows: int = 1000) -> Tensor:
    """Which points (N,) lie nearer to some centre than its k-th neighbour among the centres."""
    # k + 1, because each centre is its own nearest.
    radius = torch.cat([torch.cdist(some, centres).kthvalue(neighbours + 1).values for some in centres.split(rows)])
    return torch.cat([(torch.cdist(some, centres) < radius).any(1) for some in points.split(rows)])


def jackknife_groups(
    count: int, labels: Sequence[int] | Sequence[str] | None, groups: int = JACKKNIFE_GROUPS
) -> Tensor:
    """A random but fixed group for each of `count` samples, int64 (count,).

    Each group has the same share of every class.

    The classes are asked for and not drawn, so their numbers must not add to the spread over
    groups.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    if labels is not None:
        # texts, too
        labels = np.unique(np.asarray(labels), return_inverse=True)[1]
        order = order[torch.as_tensor(labels)[order].argsort(stable=True)]
    return torch.empty(count, dtype=torch.long).index_copy(0, order, torch.arange(count) % groups)


def selection(count: int, reference_count: int) -> tuple[Tensor, Tensor]:
    """Which generated and which real samples, in which order, the measures of single samples see.

    They are the same on every machine.
    """
    generator = torch.Generator().manual_seed(0)
    real = torch.randperm(reference_count, generator=generator)[:KEPT_FEATURES]
    return torch.randperm(count, generator=generator)[:KEPT_FEATURES], real


def in_order(parts: list[tuple[np.ndarray, np.ndarray]], count: int) -> Tensor:
    """The rows of all parts, each (places (B,), rows (B, D)), at their places 0 to count - 1."""
    places, features = (np.concatenate(arrays) for arrays in zip(*parts))
    if len(places) != count:
        raise ValueError(
            f"{len(places)} of the {count} chosen samples were measured; some chunk is missing or counted twice"
        )
    ordered = np.empty_like(features)
    ordered[places] = features
    return torch.from_numpy(ordered)

"""Paths between noises: what lies between two images of a sampler that draws no noise of its own.

DDIM: Song et al. 2021, arXiv:2010.02502, section 5.3.
"""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_diffusion.config.options import UsageError
from hf_diffusion.sampling.drawing import draw, draw_floats


# Of samples in [0, 1] or of unit size: rounding on a GPU may differ between two runs, drawn noise
# differs by far more.
SAME_SAMPLE = 1e-4


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point at `weight` in [0, 1] of the great circle from each a to its b, Eq. 67 of DDIM.

    a and b have the shape (B, ...).
    Between two Gaussian noises it has the length of a Gaussian noise, which a straight line does
    not.
    """
    x, y = a.flatten(1).double(), b.flatten(1).double()
    angle = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1).arccos().unsqueeze(1)
    # The formula's limit for equal vectors is the vector, and its sine 0.
    angle = angle.clamp(min=1e-6)
    mixed = ((1 - weight) * angle).sin() / angle.sin() * x + (weight * angle).sin() / angle.sin() * y
    return mixed.reshape(a.shape).to(a.dtype)


def interpolate(
    pipeline: DiffusionPipeline,
    seed_pairs: Sequence[tuple[int, int]],
    columns: int,
    class_labels: Sequence[int] | None = None,
    **options,
) -> np.ndarray:
    """Samples (rows * columns, ...) as `draw` returns them, row by row.

    Row r leads from the noise of one seed of pair r to that of the other, and is of the r-th of
    `class_labels`. UsageError for fewer than 2 columns and for a pipeline whose call takes no
    latents, ValueError for one that draws noise while it samples.
    """
    if columns < 2:
        raise UsageError(f"an interpolation needs at least 2 columns, its two ends, not {columns}")
    require_deterministic(pipeline, class_labels, **options)
    ends = [torch.cat([unit_noise(pipeline, seed) for seed in seeds]) for seeds in zip(*seed_pairs)]
    path = torch.stack([slerp(*ends, column / (columns - 1)) for column in range(columns)], dim=1)
    rows = []
    for row, (latents, (seed, _)) in enumerate(zip(path, seed_pairs)):
        labels = None if class_labels is None else [class_labels[row]] * columns
        rows.append(draw(pipeline, [seed] * columns, labels, latents=latents, **options))
    return np.concatenate(rows)


def unit_noise(pipeline: DiffusionPipeline, seed: int) -> Tensor:
    """The noise (1, *noise_shape) from which a pipeline starts for a seed.

    UsageError where its call takes no noise.
    """
    shape = getattr(pipeline, "noise_shape", getattr(pipeline, "sample_shape", None))
    if shape is None or "latents" not in inspect.signature(pipeline.__call__).parameters:
        name = type(pipeline).__name__
        raise UsageError(f"{name} cannot start from given noise; load it as ClassifierFreeGuidancePipeline")
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(int(seed)))


def require_deterministic(pipeline: DiffusionPipeline, labels: Sequence[int] | None, **options) -> None:
    """ValueError unless the first noise alone decides the sample, seen by drawing one twice.

    Two samples start from the same noise, with different generators for whatever is drawn on the
    way.
    """
    latents, labels = unit_noise(pipeline, 0), None if labels is None else labels[:1]
    one, other = (draw_floats(pipeline, [seed], labels, latents=latents, **options) for seed in (1, 2))
    if np.abs(one - other).max() > SAME_SAMPLE:
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} draws noise in its steps (options {options}), so that one noise has "
            "many images; sample with a deterministic scheduler, such as DDIMEtaScheduler with eta=0"
        )

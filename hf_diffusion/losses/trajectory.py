"""A teacher's trajectories, and a student of few calls that learns to follow them.

Luhman and Luhman 2021, arXiv:2101.02388, for one call; several calls each take one part of the way,
as those of Salimans and Ho 2022, arXiv:2202.00512. Samples are x = x_0 + sigma z (B, ...).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor


# An estimate of x_0 (B, ...) from x (B, ...) at one level sigma.
Denoise = Callable[[Tensor, float], Tensor]


def finer(sigmas: Sequence[float], parts: int) -> list[float]:
    """Falling levels, each interval of `sigmas`, and that from the last one to 0, cut into parts.

    They are even in arctan(sigma), the time of the cosine schedule; 0 itself is left out.
    """
    angles = [*map(math.atan, sigmas), 0.0]
    cut = [start + (end - start) * i / parts for start, end in pairwise(angles) for i in range(parts)]
    return [sigmas[i // parts] if i % parts == 0 else math.tan(angle) for i, angle in enumerate(cut)]


def follow(denoise: Denoise, x: Tensor, levels: Sequence[float], every: int) -> list[Tensor]:
    """States (B, ...) on the way from x at levels[0] to the end: at each `every`-th level, and x_0.

    By DPM-Solver++ of second order, multistep (Lu et al. 2022, arXiv:2211.01095, Algorithm 2); the
    first step and the last are of first order.
    """
    states, former, h_former = [], None, math.nan
    for i, (sigma, following) in enumerate(pairwise([*levels, 0.0])):
        if i % every == 0:
            states.append(x)
        estimate = x_0 = denoise(x, sigma)
        if following > 0:
            h = math.log(sigma / following)
            if former is not None:
                estimate = x_0 + (x_0 - former) * (h / (2 * h_former))
            h_former = h
        x, former = euler(estimate, x, following / sigma), x_0
    return [*states, x]


def euler(x_0: Tensor, x: Tensor, kept: Tensor | float) -> Tensor:
    """The state at a lower level, which keeps a share of the noise of x (B, ...): the step of DDIM
    and of Euler's along the probability flow.
    """
    return x_0 + kept * (x - x_0)

"""The learning rate as a function of the optimizer step alone.

Nothing here counts calls, so the value is right under gradient accumulation, with several processes
and after a resume.
"""

import math
from collections.abc import Sequence
from typing import Any


WARMUP_SHARE, LONGEST_WARMUP = 0.05, 500  # of the run, and in steps, where no warm-up is given
DECAY_SHARE = 0.3  # of the run, where trapezoid is not told how long to decay


def lr_factor(
    step: int,
    total_steps: int,
    schedule: str = "trapezoid",
    warmup_steps: int | None = None,
    decay_steps: int | None = None,
    decay_ends: Sequence[int] = (),
) -> float:
    """The factor in [0, 1] on the learning rate of optimizer step `step`, counted from 0, in a run
    of `total_steps`.

    A linear warm-up from 0 comes first, by default over 5 % of the run and at most 500 steps.
    "constant", "linear" and "cosine" are those of `diffusers.optimization.get_scheduler` (the
    latter two reach 0 at `total_steps` and stay there), "trapezoid" stays at 1 and goes linearly to
    0 over the last `decay_steps`, by default 30 % of the run. ValueError for another schedule.

    decay_ends: of a trapezoid that was planned anew while it decayed, for the total that they end
        in: steps and the ends that the rate goes straight to from them on, as (80, 100, 90, 95).
    """
    if warmup_steps is None:
        warmup_steps = min(round(WARMUP_SHARE * total_steps), LONGEST_WARMUP)
    if decay_steps is None:
        decay_steps = max(1, round(DECAY_SHARE * total_steps))
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    progress = min(
        1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    )  # 0 until the warm-up is over
    if schedule == "constant":
        return warmup
    if schedule == "linear":
        return warmup * (1.0 - progress)
    if schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
    if (
        schedule == "trapezoid"
    ):  # the smaller of the two where a decay longer than the rest of the run overlaps the warm-up
        if decay_ends and decay_ends[-1] == total_steps:
            return min(warmup, _bent(step, decay_ends))
        return min(warmup, max(0, total_steps - step) / decay_steps)
    raise ValueError(f"unknown learning rate schedule {schedule!r}; choose from constant, linear, cosine, trapezoid")


def rate_settings(config: Any) -> tuple:
    """What `lr_factor` is told beside the step and the total."""
    return config.lr_scheduler, config.lr_warmup_steps, config.lr_decay_steps, config.lr_decay_ends


def _bent(step: int, decay_ends: Sequence[int]) -> float:
    """The product of the shares that are left of each straight piece."""
    starts, ends, factor = decay_ends[::2], decay_ends[1::2], 1.0
    for start, end, until in zip(starts, ends, (*starts[1:], math.inf)):
        if step > start:
            factor *= max(0, end - min(step, until)) / (end - start)
    return factor

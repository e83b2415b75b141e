"""Losses, curricula and noise levels of consistency models, as functions.

Consistency training and distillation: Song et al. 2023, arXiv:2303.01469. Improved training: Song
and Dhariwal 2024, arXiv:2310.14189. Easy consistency tuning: Geng et al. 2025, arXiv:2406.14548.
A `Denoise` is a function f(x, sigma) of samples (B, ...) and noise levels (B,), which estimates x_0
(B, ...). A `Distance` of two estimates is (B,).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


Denoise = Callable[[Tensor, Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


# --- distances ------------------------------------------------------------------------------------


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference (B,)."""
    return (a - b).abs().flatten(1).mean(dim=1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference (B,)."""
    return (a - b).square().flatten(1).mean(dim=1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(s + c^2) - c (B,) of the sum s of squared differences; sqrt(s) for c = 0.

    The gradient of sqrt is infinite at 0, where two estimates agree exactly, so s counts as no less
    than 1e-20.
    """
    total = (a - b).square().flatten(1).sum(dim=1)
    return (total + c**2 if c else total.clamp(min=1e-20)).sqrt() - c


def loss_weight(schedule: str, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The weights (B,) of the 2023 paper's code at noise levels sigma (B,)."""
    ratio = sigma**-2
    weights = {
        "snr": ratio,
        "snr+1": ratio + 1,
        "karras": ratio + sigma_data**-2,
        "truncated-snr": ratio.clamp(min=1),
        "uniform": torch.ones_like(ratio),
    }
    return weights[schedule]


# --- one pair of levels ---------------------------------------------------------------------------


def estimates(
    student: Denoise, target: Denoise, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """f(x_t, t), and the target's f(x_r, r) without a gradient; both networks drop the same units.

    The target comes first: the state of the generators that dropout uses is as before when the
    student's turn comes.
    """
    devices = [x_t.device] if x_t.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        aim = target(x_r, r)
    return student(x_t, t), aim


def consistency_loss(
    student: Denoise,
    target: Denoise,
    x_0: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    distance: Distance,
    teacher: Denoise | None = None,
    solver: str = "heun",
) -> Tensor:
    """Unweighted losses (B,) at neighbouring noise levels r < t (B,).

    Without a teacher, consistency training: x_r has the noise of x_t. With one, consistency
    distillation: x_r is where the teacher's ODE leads from x_t in one step of the solver.
    """
    x_t = x_0 + _like(t, x_0) * noise
    if teacher is None:
        x_r = x_0 + _like(r, x_0) * noise
    else:
        with torch.no_grad():
            x_r = ode_step(teacher, x_t, t, r, solver)
    return distance(*estimates(student, target, x_t, t, x_r, r))


def tuning_loss(
    student: Denoise, target: Denoise, x_0: Tensor, noise: Tensor, t: Tensor, r: Tensor, distance: Distance
) -> Tensor:
    """Losses (B,) of easy consistency tuning; where r is 0 the target is x_0 itself."""
    x_t, x_r = x_0 + _like(t, x_0) * noise, x_0 + _like(r, x_0) * noise
    is_clean = _like(r, x_0) == 0
    # The network is asked at t instead where it is not needed: the logarithm of level 0 is no input
    # for it.
    student_x_0, aim = estimates(student, target, x_t, t, x_r, torch.where(r > 0, r, t))
    return distance(student_x_0, torch.where(is_clean, x_0, aim)) / (t - r).to(student_x_0.dtype)


def progressive_distillation_loss(
    student: Denoise, teacher: Denoise, x_0: Tensor, noise: Tensor, levels: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Unweighted squared errors (B,) of one step in the place of the teacher's two Euler steps.

    `levels` are t, a level between and the last one, (B,) each (arXiv:2202.00512).
    """
    t, middle, last = levels
    x_t = x_0 + _like(t, x_0) * noise
    with torch.no_grad():
        reached = ode_step(teacher, ode_step(teacher, x_t, t, middle, "euler"), middle, last, "euler")
        start, end = _like(t, x_0), _like(last, x_0)
        # the x_0 that leads there in one Euler step
        aim = x_t - start * (reached - x_t) / (end - start)
    return l2(student(x_t, t), aim)


def ode_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor, solver: str = "heun") -> Tensor:
    """One step of dx/dsigma = (x - denoise(x, sigma)) / sigma, from levels t to r (B,).

    euler: order 1, one call. heun: order 2, two calls; Euler's where r is 0 for all. midpoint:
    order 2, two calls, the second in the middle of sigma^(1/3), as in DPM-Solver-2 of k-diffusion.
    """
    start, end = _like(t, x), _like(r, x)
    slope = (x - denoise(x, t)) / start
    reached = x + (end - start) * slope
    if solver == "heun" and bool((r > 0).all()):
        second = (reached - denoise(reached, r)) / end
        return x + (end - start) * (slope + second) / 2
    if solver == "midpoint":
        middle = ((t ** (1 / 3) + r ** (1 / 3)) / 2) ** 3
        between = x + (_like(middle, x) - start) * slope
        return x + (end - start) * (between - denoise(between, middle)) / _like(middle, x)
    return reached


# --- curricula ------------------------------------------------------------------------------------


def growing_levels(step: int, total_steps: int, first: int, last: int) -> int:
    """N(k) of arXiv:2303.01469, appendix C: intervals between levels, from `first` to `last`."""
    grown = math.sqrt(step / total_steps * ((last + 1) ** 2 - first**2) + first**2)
    return max(math.ceil(grown - 1), 1)


def growing_target_ema(intervals: int, first: int, ema: float) -> float:
    """mu(k) of the same appendix, the decay of the target: `ema` at `first` intervals."""
    return math.exp(first * math.log(ema) / intervals)


def doubling_levels(step: int, total_steps: int, first: int, last: int) -> int:
    """N(k) of arXiv:2310.14189: intervals, doubled from `first` to `last` at even distances."""
    length = max(total_steps // (int(math.log2(last / first)) + 1), 1)
    return min(first * 2 ** (step // length), last)


def halving_levels(step: int, steps_per_stage: int, first: int) -> int:
    """Steps of progressive distillation's student, halved at every stage.

    The last two stages are twice as long.
    """
    count = max(first // 2 ** (step // steps_per_stage), 2)
    if count > 2:
        return count
    late = max(step - steps_per_stage * (math.log2(first) - 1), 0)
    return max(2 // 2 ** int(late // (2 * steps_per_stage)), 1)


# --- which levels a batch visits ------------------------------------------------------------------


def neighbours(u: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring levels t > r (B,) of a falling grid (N + 1,) for u (B,) in [0, 1).

    All pairs are as likely.
    """
    grid = grid.to(u, non_blocking=True)
    i = (u * (len(grid) - 1)).long().clamp(max=len(grid) - 2)
    return grid.flip(0)[i + 1], grid.flip(0)[i]


def lognormal_neighbours(u: Tensor, grid: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """The same by arXiv:2310.14189: a pair's weight is the share of a log-normal between them."""
    rising = grid.to(u, non_blocking=True).flip(0)
    below = torch.erf((rising.log() - mean) / (math.sqrt(2) * std))
    shares = below.diff().cumsum(0)
    i = torch.searchsorted(shares, u * shares[-1], right=True).clamp(max=len(rising) - 2)
    return rising[i + 1], rising[i]


def lognormal_levels(u: Tensor, mean: float, std: float) -> Tensor:
    """Levels (B,) whose logarithm is Gaussian, for u (B,) in [0, 1)."""
    return (mean + std * torch.special.ndtri(u.clamp(min=1e-9, max=1 - 1e-9))).exp()


def tuning_partner(
    t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0, mapping: str = "sigmoid"
) -> Tensor:
    """The lower level r (B,) of t (B,) in a stage of tuning; it nears t by the factor q a stage.

    In early stages r is 0 at small t, where the loss is that of a denoiser.
    """
    widening = 1 + k * torch.sigmoid(-b * t) if mapping == "sigmoid" else torch.ones_like(t)
    return (t * (1 - widening / q ** (stage + 1))).clamp(min=0)


def _like(levels: Tensor, x: Tensor) -> Tensor:
    """Levels (B,) in x's precision, to broadcast over x (B, ...)."""
    return levels.to(x).reshape(-1, *(1,) * (x.ndim - 1))

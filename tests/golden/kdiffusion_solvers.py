"""Solvers of k-diffusion that neither our scheduler nor those of diffusers for EDM have.

They are here so that every case of its vectors is replayed: what they prove of the package is that
its noise levels, the split of ancestral steps and its preconditioned D are what k-diffusion means.
Each takes (denoised, x, sigmas, noise, split): `denoised(x, sigma)`, noise levels (N + 1,) that
end in 0, the draws in their order, and `split(sigma, sigma_next)`, how far an ancestral step goes
down. Sources: DPM-Solver (arXiv:2206.00927), DPM-Solver++ (arXiv:2211.01095).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


Denoised = Callable[[Tensor, Tensor], Tensor]
Split = Callable[[Tensor, Tensor], Tensor]
LMS_ORDER = 4


def lms(denoised: Denoised, x: Tensor, sigmas: Tensor, noise: Tensor | None, split: Split) -> Tensor:
    """The slope as a polynomial of sigma through the last four, integrated."""
    slopes: list[Tensor] = []
    for i, sigma in enumerate(sigmas[:-1]):
        slopes = [(x - denoised(x, sigma)) / sigma, *slopes][:LMS_ORDER]
        nodes = sigmas[i - len(slopes) + 1 : i + 1].flip(0).numpy()
        for j, slope in enumerate(slopes):
            others = np.delete(nodes, j)
            basis = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1]) / np.prod(nodes[j] - others)
            x = x + float(basis.integ()(float(sigmas[i + 1])) - basis.integ()(float(sigma))) * slope
    return x


def exponential_step(x: Tensor, denoised: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """From noise level `sigma` to `end` where D stays what it is."""
    return end / sigma * x + (1 - end / sigma) * denoised


def dpmpp_2s_ancestral(denoised: Denoised, x: Tensor, sigmas: Tensor, noise: Tensor, split: Split) -> Tensor:
    """D at the geometric mean of a step's levels, then fresh noise."""
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        down = split(sigma, following)
        middle = (sigma * down).sqrt()
        first = denoised(x, sigma)
        if following == 0:
            return first
        second = denoised(exponential_step(x, first, sigma, middle), middle)
        x = exponential_step(x, second, sigma, down) + (following**2 - down**2).sqrt() * noise[i]
    return x


def dpmpp_sde(denoised: Denoised, x: Tensor, sigmas: Tensor, noise: Tensor, split: Split) -> Tensor:
    """The same with fresh noise on the way to the middle, too."""
    draws = iter(noise)
    for sigma, following in zip(sigmas, sigmas[1:]):
        first = denoised(x, sigma)
        if following == 0:
            return first
        middle = (sigma * following).sqrt()
        down = split(sigma, middle)
        between = exponential_step(x, first, sigma, down) + (middle**2 - down**2).sqrt() * next(draws)
        second = denoised(between, middle)
        down = split(sigma, following)
        x = exponential_step(x, second, sigma, down) + (following**2 - down**2).sqrt() * next(draws)
    return x


def dpmpp_3m_sde(denoised: Denoised, x: Tensor, sigmas: Tensor, noise: Tensor, split: Split) -> Tensor:
    """D as a parabola of ln(sigma) through the last three, with fresh noise, eta = 1."""
    values: list[Tensor] = []
    steps: list[Tensor] = []
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        values = [denoised(x, sigma), *values][:3]
        if following == 0:
            return values[0]
        h = (sigma / following).log()
        x = (-2 * h).exp() * x - torch.expm1(-2 * h) * values[0]
        phi_2 = torch.expm1(-2 * h) / (2 * h) + 1
        ratios = [step / h for step in steps]
        if len(ratios) == 2:
            near, far = (values[0] - values[1]) / ratios[0], (values[1] - values[2]) / ratios[1]
            curve = (near - far) / sum(ratios)
            x = x + phi_2 * (near + curve * ratios[0]) - (phi_2 / (2 * h) - 0.5) * curve
        elif ratios:
            x = x + phi_2 * (values[0] - values[1]) / ratios[0]
        x = x + following * (-torch.expm1(-2 * h)).sqrt() * noise[i]
        steps = [h, *steps][:2]
    return x


def dpm_fast(denoised: Denoised, x: Tensor, sigma_min: float, sigma_max: float, calls: int) -> Tensor:
    """DPM-Solver-fast: steps of order 3 and less, even in ln(sigma), in so many calls of D.

    It ends at sigma_min.
    """
    orders = [3] * (calls // 3 - 1) + [2, 1] if calls % 3 == 0 else [3] * (calls // 3) + [calls % 3]
    times = -torch.linspace(np.log(sigma_max), np.log(sigma_min), len(orders) + 1, dtype=torch.float64)

    def noise_of(x: Tensor, t: Tensor) -> Tensor:
        return (x - denoised(x, (-t).exp())) / (-t).exp()

    for order, t, end in zip(orders, times, times[1:]):
        h, first = end - t, noise_of(x, t)
        grown, sigma = torch.expm1(h), (-end).exp()
        if order == 1:
            x = x - sigma * grown * first
            continue
        part = 1 / order
        s = t + part * h
        second = noise_of(x - (-s).exp() * torch.expm1(part * h) * first, s) - first
        if order == 2:
            x = x - sigma * grown * (first + second)
            continue
        s, span = t + 2 * part * h, 2 * part * h
        bent = first * torch.expm1(span) + 2 * (torch.expm1(span) / span - 1) * second
        third = noise_of(x - (-s).exp() * bent, s) - first
        x = x - sigma * (grown * first + 1.5 * (grown / h - 1) * third)
    return x


SOLVERS = {
    "lms": lms,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}

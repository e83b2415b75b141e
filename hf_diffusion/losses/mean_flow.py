"""MeanFlow (arXiv:2505.13447): an average velocity, whose one step leads from noise to data.

u(z, r, t) is the average over [r, t] of the path's velocity. z_t = (1 - t) x + t e with t = 1
noise, v = e - x, and z_r = z_t - (t - r) u(z_t, r, t). Its derivative in t
is the identity u = v - (t - r) (v du/dz + du/dt), with a Jacobian-vector product that the loss
takes as a constant.
"""

from collections.abc import Callable

import torch
from torch import Tensor


# u(z, r, t) (B, ...) of z (B, ...) and times r <= t (B,)
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_flow_times(draws: Tensor, equal: Tensor, ratio: float = 0.25) -> tuple[Tensor, Tensor]:
    """Times r <= t (B,) from draws in (0, 1) (B, 2); r is t where `equal` (B,) < 1 - ratio."""
    r, t = draws.sort(dim=1).values.unbind(1)
    return torch.where(equal < 1 - ratio, t, r), t


def straight_path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z_t and its velocity (B, ...) on the straight line from data x (B, ...) to noise."""
    column = _like(t, x)
    return (1 - column) * x + column * noise, noise - x


def cosine_path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z_t and its velocity (B, ...) on the quarter circle cos(pi t / 2) x + sin(pi t / 2) noise."""
    angle = torch.pi / 2 * _like(t, x)
    return angle.cos() * x + angle.sin() * noise, torch.pi / 2 * (angle.cos() * noise - angle.sin() * x)


def mean_flow_target(velocity: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """v - (t - r) (v du/dz + du/dt) (B, ...), and what stands in the last brackets, as constants.

    `velocity` must call the bare network, not a wrapper of several processes: forward-mode
    differentiation passes the hooks of DistributedDataParallel by. The loss calls the wrapper
    itself, so that gradients are reduced.
    """
    with torch.no_grad():
        tangents = (v, torch.zeros_like(r), torch.ones_like(t))
        _, derivative = torch.func.jvp(velocity, (z, r, t), tangents)
        return v - _like(t - r, z) * derivative, derivative


def mean_flow_loss(
    network: Velocity,
    z: Tensor,
    r: Tensor,
    t: Tensor,
    v: Tensor,
    bare_network: Velocity | None = None,
    power: float = 1.0,
    offset: float = 0.01,
) -> Tensor:
    """Losses s / (s + offset)^power (B,) of the sum s of squared errors.

    The denominator is a constant to the gradient. With power 0 the loss is s. `network` is what is
    trained, in the wrapper of several processes where there are some; `bare_network` is the same
    without its wrapper. Dropout must be off, since the two calls would drop others.
    """
    target, _ = mean_flow_target(network if bare_network is None else bare_network, z, r, t, v)
    error = (network(z, r, t) - target).square().flatten(1).sum(dim=1)
    return error / (error.detach() + offset) ** power


def guided_velocity(v: Tensor, cond: Tensor, uncond: Tensor, omega: float, kappa: float, is_guided: Tensor) -> Tensor:
    """omega v + kappa u_cond + (1 - omega - kappa) u_uncond (B, ...), where is_guided (B,), else v.

    `cond` and `uncond` are u(z, t, t) with and without the label. So guidance is learned, and costs
    nothing later.
    """
    mixed = omega * v + kappa * cond + (1 - omega - kappa) * uncond
    return torch.where(_like(is_guided, v).bool(), mixed, v)


@torch.no_grad()
def mean_flow_sample(velocity: Velocity, z: Tensor, steps: int) -> Tensor:
    """Data (B, ...) from noise z (B, ...) in so many even steps."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, r in zip(times, times[1:]):
        start, end = z.new_full((len(z),), t), z.new_full((len(z),), r)
        z = z - (t - r) * velocity(z, end, start)
    return z


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,) in x's precision, to broadcast over x (B, ...)."""
    return values.to(x).reshape(-1, *(1,) * (x.ndim - 1))

"""Divergences that an adversarial denoiser can minimise, and penalties on the critic.

Q = q(x_t | x_{t+1}) is the data's distribution, P the generator's, V the critic. The divergence is
approached from below by F(V) = E_Q[g(V)] - E_P[f*(g(V))]. There g maps the real line onto the
domain of the conjugate f* (f-GAN, Nowozin et al., arXiv:1606.00709, Tables 1, 2 and 6).
The critic maximises F, the generator minimises it. Large V means real for every divergence.
V has shape (B,). Every loss is one value a sample, in float32 or wider under autocast, too.

| divergence      | g(V)          | f*(g(V))    | best V             | F(best V)                |
|-----------------|---------------|-------------|--------------------|--------------------------|
| js              | -softplus(-V) | softplus(V) | log q/p            | 2 JS(Q, P) - 2 log 2     |
| hellinger       | 1 - e^-V      | e^V - 1     | (log q/p) / 2      | integral (q^.5 - p^.5)^2 |
| reverse_kl      | -e^-V         | V - 1       | log q/p            | KL(P, Q)                 |
| total_variation | tanh(V) / 2   | tanh(V) / 2 | +-infinity         | integral abs(q - p) / 2  |
| wasserstein     | V             | V           | 1-Lipschitz in x_t | W_1(Q, P)                |
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


DIVERGENCES = ("js", "hellinger", "reverse_kl", "total_variation", "wasserstein")
# exp is continued by its tangent from here on.
# That is far beyond the values of a healthy critic, and far below overflow.
EXP_LIMIT = 10.0


def real_loss(divergence: str, real: Tensor, exp_limit: float = EXP_LIMIT) -> Tensor:
    """The critic's loss on real pairs, -g(V); its mean plus the mean of `fake_loss` is -F(V)."""
    v = _widen(real)
    match divergence:
        case "js":
            return F.softplus(-v)
        case "hellinger":
            return bounded_exp(-v, exp_limit) - 1
        case "reverse_kl":
            return bounded_exp(-v, exp_limit)
        case "total_variation":
            return -0.5 * v.tanh()
        case "wasserstein":
            return -v
    raise _unknown(divergence)


def fake_loss(divergence: str, fake: Tensor, exp_limit: float = EXP_LIMIT) -> Tensor:
    """The critic's loss on generated pairs, f*(g(V))."""
    v = _widen(fake)
    match divergence:
        case "js":
            return F.softplus(v)
        case "hellinger":
            return bounded_exp(v, exp_limit) - 1
        case "reverse_kl":
            return v - 1
        case "total_variation":
            return 0.5 * v.tanh()
        case "wasserstein":
            return v
    raise _unknown(divergence)


def generator_loss(
    divergence: str, fake: Tensor, saturating: bool | None = None, exp_limit: float = EXP_LIMIT
) -> Tensor:
    """The generator's loss on generated pairs.

    `saturating=True` is -f*(g(V)), the min-max game itself. `False` is -g(V), Nowozin's trick: its
    gradient does not vanish where the critic is sure. None takes the choice that trains: not
    saturating for "js", saturating for the others. Total variation and Wasserstein have one form.
    """
    v = _widen(fake)
    if saturating is None:
        saturating = divergence != "js"
    if not saturating:
        return real_loss(divergence, v, exp_limit)
    if divergence == "hellinger":
        # Bounded from below: past the limit the critic is fooled, and the sample is left alone.
        return 1 - v.clamp(max=exp_limit).exp()
    return -fake_loss(divergence, v, exp_limit)


def variational_bound(divergence: str, real: Tensor, fake: Tensor) -> Tensor:
    """F(V), a scalar for logs: on average at most the divergence, which the best critic reaches."""
    return -(real_loss(divergence, real).mean() + fake_loss(divergence, fake).mean())


def bounded_exp(x: Tensor, limit: float = EXP_LIMIT) -> Tensor:
    """exp(x), continued by its tangent above `limit`: convex, with a continuous derivative."""
    return torch.where(x < limit, x.clamp(max=limit).exp(), math.exp(limit) * (1 + x - limit))


def r1_penalty(real: Tensor, x_t: Tensor, gamma: float | Tensor) -> Tensor:
    """gamma / 2 |grad_{x_t} V|^2 on real pairs (B,), Eq. 9 of Mescheder et al. (arXiv:1801.04406).

    `real` (B,) must have been computed from `x_t` (B, ...) with `x_t.requires_grad`. The result is
    differentiable in the critic's parameters. The square is summed over pixels, so a gamma suits
    one image size. `gamma` is a number or (B,).
    """
    if not x_t.requires_grad:
        raise ValueError("x_t does not require a gradient; call x_t.requires_grad_() before the critic sees it")
    (gradient,) = torch.autograd.grad(_widen(real).sum(), x_t, create_graph=True)
    return gamma / 2 * _widen(gradient).square().flatten(1).sum(dim=1)


def r1_weight(gamma: float, step: int, interval: int | None = None, multiply: bool = False) -> float:
    """gamma for the optimizer step `step` (from 0), or 0.0 where no penalty is due.

    A penalty is due every `interval` steps. The reference applies the bare gamma there;
    `multiply=True` applies gamma * interval, which keeps the mean strength.
    """
    if interval is None:
        return gamma
    if interval < 1:
        raise ValueError(f"interval must be at least 1 or None (every step), got {interval}")
    if step % interval:
        return 0.0
    return gamma * interval if multiply else gamma


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    x_real: Tensor,
    x_fake: Tensor,
    mix: Tensor,
    weight: float = 10.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """weight (scale |grad_x V| - 1)^2 (B,) at x = mix x_real + (1 - mix) x_fake.

    It is the penalty of WGAN-GP (Gulrajani et al., arXiv:1704.00028), always in float32 or wider.
    `critic` maps x_t (B, ...) to V (B,) or (B, 1), with x_{t+1} and t held fixed.
    `mix` is uniform on [0, 1), one a sample.
    `scale` is a number or (B,). 1 asks for a critic that is 1-Lipschitz in x_t; the posterior's
    coefficient of x_0 for one that is 1-Lipschitz in the predicted x_0.
    """
    x_real, x_fake = _widen(x_real.detach()), _widen(x_fake.detach())
    mix = mix.reshape(-1, *(1,) * (x_real.ndim - 1))
    x = (mix * x_real + (1 - mix) * x_fake).requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        value = critic(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return weight * (scale * gradient.flatten(1).norm(dim=1) - 1).square()


def normalise_spectrally(critic: nn.Module) -> nn.Module:
    """Divide every linear and convolution weight of `critic` by its spectral norm, in place.

    It bounds the critic's Lipschitz constant without a second derivative (arXiv:1802.05957).
    Weights become parametrizations, so state dicts have other names;
    `torch.nn.utils.parametrize.remove_parametrizations` undoes it for a layer.
    """
    layers = [m for m in critic.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not layers:
        raise ValueError(f"{type(critic).__name__} has no linear or convolution layer to normalise")
    for layer in layers:
        spectral_norm(layer)
    return critic


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unknown(divergence: str) -> ValueError:
    return ValueError(f"unknown divergence {divergence!r}; choose one of {list(DIVERGENCES)}")

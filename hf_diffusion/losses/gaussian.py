"""Objectives of Gaussian diffusion: simple, weighted, hybrid and variational.

Sources: DDPM (arXiv:2006.11239), improved DDPM (arXiv:2102.09672), min-SNR (arXiv:2303.09556), P2
(arXiv:2204.00227).

Every objective takes the scheduler as its first argument and returns one value a sample, shape
(B,), the mean over all other dimensions, so that it serves images, sequences and batches of points
(B, D) alike. Batch is dimension 0, channels are dimension 1; t is int64 (B,), 0 is the least noisy
timestep. Half precision is widened to float32 before anything else.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_diffusion.schedulers.scheduling_gaussian import LEARNED, PREDICTION_TYPES, GaussianScheduler


# Of alpha and sigma in the error of v: nearer an end of the process, one image would outweigh all.
LEAST_DIVISOR = 0.05


def prediction_target(scheduler: GaussianScheduler, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is asked to output for the scheduler's `prediction_type`, shaped as x_0."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            return scheduler.get_velocity(x_0, noise, t)  # Eq. in App. D of arXiv:2202.00512
        case "previous_mean":
            return scheduler.posterior(x_0, x_t, t, scheduler.previous_timestep(t))[0]  # Eq. 7 of DDPM
    raise _unknown_prediction_type(scheduler)


def simple_loss(
    scheduler: GaussianScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Mean squared error to the prediction target (B,), Eq. 14 of DDPM, without the variance."""
    prediction, _ = split_variance(scheduler, _widen(model_output), x_0)
    x_0, x_t, noise = _widen(x_0), _widen(x_t), _widen(noise)
    return mean_per_sample((prediction - prediction_target(scheduler, x_0, x_t, noise, t)) ** 2)


def mean_loss(scheduler: GaussianScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Squared distance of the means over twice the variance (B,), nats a dimension: the terms of
    Eq. 8 of DDPM.

    It is the bound without its constants, so it needs a fixed variance; `vlb_loss` and
    `hybrid_loss` learn the variance.
    """
    if scheduler.config.variance_type in LEARNED:
        raise ValueError(
            f"mean_loss is for fixed variances, not variance_type={scheduler.config.variance_type!r}: with a free "
            "variance it has no minimum; choose 'fixed_small' or 'fixed_large', or take hybrid_loss"
        )
    x_0, x_t = _widen(x_0), _widen(x_t)
    true_mean, _ = scheduler.posterior(x_0, x_t, t, scheduler.previous_timestep(t))
    mean, _, log_variance, _ = scheduler.p_mean_variance(_widen(model_output), t, x_t, clip=False)
    return mean_per_sample(0.5 * (true_mean - mean) ** 2 * torch.exp(-log_variance))


class VariationalTerms(NamedTuple):
    """Terms of the bound at one timestep a sample, and the prediction of x_0 behind them."""

    bits: Tensor  # (B,) the term of the bound: decoder_bits at the last denoising step, else kl_bits
    kl_bits: Tensor  # (B,) KL(q(x_s | x_t, x_0) || p(x_s | x_t)), bits a dimension
    decoder_bits: Tensor  # (B,) -log2 p(x_0 | x_t) over the bins of 8-bit data, bits a dimension
    denoised: Tensor  # as x_0


def vb_terms_bits(
    scheduler: GaussianScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, clip: bool = True
) -> VariationalTerms:
    """One term of the variational bound a sample, bits a dimension (Eq. 5 of DDPM), for the
    scheduler's current run.

    x_0 lies on the lattice k / 127.5 - 1. `clip` clamps the predicted x_0 to the scheduler's range:
    True to measure, False to train, as in the reference, where a clamped prediction would have no
    gradient.
    """
    model_output, x_0, x_t = _widen(model_output), _widen(x_0), _widen(x_t)
    previous = scheduler.previous_timestep(t)
    true_mean, _ = scheduler.posterior(x_0, x_t, t, previous)
    true_log_variance = _per_sample_factor(scheduler.posterior_log_variance_clipped(t), x_0)
    mean, _, log_variance, denoised = scheduler.p_mean_variance(model_output, t, x_t, clip=clip)

    kl = mean_per_sample(normal_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2)
    log_likelihood = discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)
    decoder = mean_per_sample(-log_likelihood) / math.log(2)
    return VariationalTerms(torch.where(previous < 0, decoder, kl), kl, decoder, denoised)


def vlb_loss(
    scheduler: GaussianScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, rescaled: bool = True
) -> Tensor:
    """The variational bound as a loss (B,), bits a dimension.

    `rescaled` multiplies by the number of timesteps, so that the mean over uniformly drawn t
    estimates the whole bound.
    """
    bits = vb_terms_bits(scheduler, model_output, x_0, x_t, t, clip=False).bits
    return bits * len(scheduler.timesteps) if rescaled else bits


def variance_loss(scheduler: GaussianScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """`vlb_loss` (B,) with the gradient stopped at the mean: it trains a learned variance."""
    prediction, variance_channels = split_variance(scheduler, _widen(model_output), x_0)
    if variance_channels is None:
        raise ValueError(
            f"variance_type={scheduler.config.variance_type!r} has no variance to learn; choose from {LEARNED}"
        )
    return vlb_loss(scheduler, torch.cat([prediction.detach(), variance_channels], dim=1), x_0, x_t, t)


def hybrid_loss(
    scheduler: GaussianScheduler,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    vlb_weight: float = 0.001,
    simple_weight: Tensor | float = 1.0,
) -> Tensor:
    """L_simple + lambda * L_vlb (B,), Eq. 16 of improved DDPM; the mean learns from L_simple alone.

    `simple_weight` is a factor (B,) on L_simple, see `loss_weight`. The reference's RESCALED_MSE is
    vlb_weight = 0.001, its MSE is vlb_weight = 1 / number of timesteps; both add bits to a unitless
    error.
    """
    simple = simple_loss(scheduler, model_output, x_0, x_t, noise, t)
    return simple_weight * simple + vlb_weight * variance_loss(scheduler, model_output, x_0, x_t, t)


def loss_weight(
    scheduler: GaussianScheduler,
    t: Tensor,
    weighting: str = "uniform",
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """Factor (B,) on `simple_loss` for the weighting "uniform", "min_snr", "p2" or "v", float32."""
    match weighting:
        case "uniform":
            return torch.ones(t.shape, device=t.device)
        case "min_snr":
            return min_snr_weight(scheduler, t, min_snr_gamma)
        case "p2":
            return p2_weight(scheduler, t, p2_gamma, p2_k)
        case "v":
            return v_weight(scheduler, t)
    raise ValueError(f"unknown loss weighting {weighting!r}; choose from ['min_snr', 'p2', 'uniform', 'v']")


def v_weight(scheduler: GaussianScheduler, t: Tensor) -> Tensor:
    """The error of v = alpha noise - sigma x_0 as a factor (B,) on the error of the target.

    That is 1 / sigma^2 for x_0 and 1 / alpha^2 for the noise, where alpha and sigma are at least
    0.05, as in JiT (arXiv:2511.13720).
    """
    alpha_bar = scheduler.alpha_bar
    match scheduler.config.prediction_type:
        case "epsilon":
            weights = 1 / alpha_bar.clamp(min=LEAST_DIVISOR**2)
        case "sample":
            weights = 1 / (1 - alpha_bar).clamp(min=LEAST_DIVISOR**2)
        case "v_prediction":
            weights = torch.ones_like(alpha_bar)
        case _:
            raise _unknown_prediction_type(scheduler)
    return _entries(weights, t)


def min_snr_weight(scheduler: GaussianScheduler, t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the error of x_0, Sec. 3.4 of arXiv:2303.09556, as a factor (B,) on the
    error of the target.

    That is min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v. Written in
    alpha_bar rather than SNR, so it is finite at zero terminal SNR and without noise.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr_gamma={gamma} must be positive; 5 is the paper's value")
    alpha_bar = scheduler.alpha_bar  # SNR = alpha_bar / (1 - alpha_bar)
    match scheduler.config.prediction_type:
        case "epsilon":
            weights = (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1)
        case "sample":
            weights = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma)
        case "v_prediction":
            weights = torch.minimum(alpha_bar, gamma * (1 - alpha_bar))
        case "previous_mean":
            weights = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma) / _x_0_in_posterior_mean(scheduler) ** 2
        case _:
            raise _unknown_prediction_type(scheduler)
    return _entries(weights, t)


def p2_weight(scheduler: GaussianScheduler, t: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """1 / (k + SNR)^gamma on the error of epsilon (arXiv:2204.00227), for that of the target."""
    if not (k > 0 and gamma >= 0):
        raise ValueError(
            f"p2_k={k} must be positive and p2_gamma={gamma} not negative; the paper takes 1 and 0.5 or 1"
        )
    alpha_bar = scheduler.alpha_bar
    weights = ((1 - alpha_bar) / (k * (1 - alpha_bar) + alpha_bar)) ** gamma  # 1 / (k + SNR)^gamma
    match scheduler.config.prediction_type:
        case "epsilon":
            pass
        case "sample":
            weights = weights * alpha_bar / (1 - alpha_bar)  # error of epsilon = SNR * error of x_0
        case "v_prediction":
            weights = weights * alpha_bar  # error of epsilon = alpha_bar * error of v
        case "previous_mean":
            weights = weights * alpha_bar / (1 - alpha_bar) / _x_0_in_posterior_mean(scheduler) ** 2
        case _:
            raise _unknown_prediction_type(scheduler)
    return _entries(weights, t)


def _entries(table: Tensor, t: Tensor) -> Tensor:
    """Entries t (B,) of a table (T,), in float32 and where t is; nobody waits for the copy."""
    return table.float().to(t.device, non_blocking=True)[t]


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) of each element, in nats."""
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (-1 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) + distance)


def approx_standard_normal_cdf(z: Tensor) -> Tensor:
    """CDF of the standard normal by the references' tanh formula, within 4e-4 of the erf form."""
    # The tanh is +-1 to the last bit long before 20; without the clamp z^3 overflows and has a
    # gradient of NaN.
    z = z.clamp(-20, 20)
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log probability in nats of the 8-bit bin around each element under N(means, e^(2
    log_scales)), Eq. 13 of DDPM.

    x lies on the lattice k / 127.5 - 1; the outermost bins are open. Probabilities are kept above
    1e-12.
    """
    inverse_scale = torch.exp(-log_scales)
    cdf_above = approx_standard_normal_cdf(inverse_scale * (x - means + 1 / 255))
    cdf_below = approx_standard_normal_cdf(inverse_scale * (x - means - 1 / 255))
    probability = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below))
    return probability.clamp(min=1e-12).log()


def split_variance(scheduler: GaussianScheduler, model_output: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prediction, shaped as x_0, and the variance channels (None for a fixed variance)."""
    learned = scheduler.config.variance_type in LEARNED
    expected = list(x_0.shape)
    if learned:
        expected[1] *= 2
    if list(model_output.shape) != expected:
        raise ValueError(
            f"the network returned {tuple(model_output.shape)} for data {tuple(x_0.shape)}, but variance_type="
            f"{scheduler.config.variance_type!r} needs {tuple(expected)}; set the network's out_channels or the "
            f"scheduler's variance_type, of which {LEARNED} take twice the channels"
        )
    return model_output.chunk(2, dim=1) if learned else (model_output, None)


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over all dimensions but the first, (B, ...) -> (B,)."""
    return x.reshape(x.shape[0], -1).mean(dim=1)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # losses of half precision are computed in float32


def _per_sample_factor(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))  # (B,) -> (B, 1, ...)


def _x_0_in_posterior_mean(scheduler: GaussianScheduler) -> Tensor:
    """Coefficient of x_0 in Eq. 7 of DDPM, float64 (T,); NaN for timesteps outside the run."""
    levels = torch.cat([scheduler.alpha_bar.new_ones(1), scheduler.alpha_bar])  # levels[0]: clean data
    t = scheduler.timesteps.cpu()
    alpha_bar_t, alpha_bar_s = levels[t + 1], levels[torch.cat([t[1:] + 1, t.new_zeros(1)])]
    coefficient = torch.full_like(scheduler.alpha_bar, math.nan)
    coefficient[t] = alpha_bar_s.sqrt() * (1 - alpha_bar_t / alpha_bar_s) / (1 - alpha_bar_t)
    return coefficient


def _unknown_prediction_type(scheduler: GaussianScheduler) -> ValueError:
    return ValueError(
        f"unknown prediction_type {scheduler.config.prediction_type!r}; choose from {list(PREDICTION_TYPES)}"
    )

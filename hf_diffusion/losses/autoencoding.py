"""What autoencoders are trained by whose latents diffuse, as functions of tensors.

Latent diffusion: Rombach et al. 2022, arXiv:2112.10752, Appendix G. The adaptive weight of the
adversarial loss and the quantised form: Esser et al. 2021, arXiv:2012.09841, Eqs. 4 to 7. Hinge
loss: Lim and Ye 2017, arXiv:1705.02894. Quantisation: van den Oord et al. 2017, arXiv:1711.00937.

Letters: B images of shape (C, H, W), latents (B, D, h, w), K codes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# Of the posterior's log variance, as in diffusers' DiagonalGaussianDistribution.
LOGVAR_RANGE = (-30.0, 20.0)
# Beside the norm of the adversarial gradient, and the highest adaptive weight.
GRADIENT_OFFSET, HIGHEST_WEIGHT = 1e-4, 1e4


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (B, D, h, w) of the latents, from moments (B, 2 D, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents mean + std * noise (B, D, h, w)."""
    mean, logvar = posterior(moments)
    return mean + (logvar / 2).exp() * noise


def posterior_kl(moments: Tensor) -> Tensor:
    """KL divergence (B,) of the latents from N(0, 1), summed over their values."""
    mean, logvar = posterior(moments)
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def reconstruction_errors(x: Tensor, reconstruction: Tensor, perceptual: Tensor | None = None) -> Tensor:
    """|x - reconstruction| (B, C, H, W), with a perceptual distance (B,) added to every value."""
    errors = (x - reconstruction).abs()
    return errors if perceptual is None else errors + perceptual.reshape(-1, 1, 1, 1)


def negative_log_likelihood(errors: Tensor, logvar: Tensor | float = 0.0) -> Tensor:
    """Laplace likelihood (B,) of errors (B, C, H, W) at the log scale `logvar`, summed over values.

    The sum is what a KL weight of 1e-6 was chosen for.
    """
    logvar = torch.as_tensor(logvar, dtype=errors.dtype, device=errors.device)
    return (errors / logvar.exp() + logvar).flatten(1).sum(1)


def critic_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss (B,) for its values (B, ...) of real and reconstructed images."""
    match kind:
        case "hinge":
            losses = F.relu(1 - real) + F.relu(1 + fake)
        case "vanilla":
            losses = F.softplus(-real) + F.softplus(fake)
        case _:
            raise ValueError(f"unknown critic_loss {kind!r}; choose from ['hinge', 'vanilla']")
    return 0.5 * losses.flatten(1).mean(1)


def fooling_loss(fake: Tensor) -> Tensor:
    """The autoencoder's loss (B,) for the critic's values (B, ...) of its reconstructions."""
    return -fake.flatten(1).mean(1)


def adaptive_weight(
    nll: Tensor, fooling: Tensor, last_layer: Tensor, average: Callable[[Tensor], Tensor] = lambda gradient: gradient
) -> Tensor:
    """How much stronger the likelihood pulls at the decoder's last layer than the critic does.

    A scalar without a gradient. `nll` and `fooling` are the scalars that are minimised; `average`
    joins the gradients of processes.
    """
    norms = [average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm() for loss in (nll, fooling)]
    return (norms[0] / (norms[1] + GRADIENT_OFFSET)).clamp(0, HIGHEST_WEIGHT).detach()


class Quantised(NamedTuple):
    """Codes z_q (B, D, h, w), whose gradient goes to z; the loss (B,); code numbers (B, h, w)."""

    z_q: Tensor
    loss: Tensor
    indices: Tensor


def quantise(z: Tensor, codebook: Tensor, commitment: float = 0.25, attraction: float = 1.0) -> Quantised:
    """The nearest codes of `codebook` (K, D) to z (B, D, h, w), Eq. 3 of 1711.00937.

    `commitment` weighs the term that moves z to its code, `attraction` the one that moves the code.
    diffusers' VectorQuantizer has the two weights the wrong way round (its `legacy`).
    """
    flat = z.movedim(1, -1)  # (B, h, w, D)
    indices = torch.cdist(flat.reshape(-1, z.shape[1]), codebook).argmin(1).reshape(flat.shape[:-1])
    z_q = codebook[indices].movedim(-1, 1)
    to_code, to_z = (z_q.detach() - z) ** 2, (z_q - z.detach()) ** 2
    loss = (commitment * to_code + attraction * to_z).flatten(1).mean(1)
    return Quantised(z + (z_q - z).detach(), loss, indices)


def perplexity(indices: Tensor, codes: int) -> Tensor:
    """exp of the entropy of the codes that are used, a scalar: how many of them are in even use."""
    share = torch.bincount(indices.flatten(), minlength=codes).double() / indices.numel()
    return torch.special.entr(share).sum().exp()


class LatentStatistics(NamedTuple):
    """Mean and unbiased standard deviation of all latents, and of each channel (D,)."""

    mean: float
    std: float
    channel_means: tuple[float, ...]
    channel_stds: tuple[float, ...]


def latent_statistics(batches: Iterable[Tensor]) -> LatentStatistics:
    """Statistics of latents in batches (B, D, h, w), in one pass and float64.

    Sums are taken about the first batch's mean, since squares of a large mean would cancel.
    """
    count, origin, sums, squares = 0, None, 0.0, 0.0
    for z in batches:
        z = z.detach().cpu().double().movedim(1, -1).flatten(0, -2)  # (B h w, D)
        origin = z.mean(0) if origin is None else origin
        count, sums, squares = count + len(z), sums + (z - origin).sum(0), squares + ((z - origin) ** 2).sum(0)
    if count < 2:
        raise ValueError(f"{count} latents tell no deviation; give at least 2")
    means = sums / count + origin
    spread = squares - sums**2 / count  # sum of squares about each channel's own mean
    stds, mean = (spread / (count - 1)).sqrt(), means.mean()
    total = spread.sum() + count * ((means - mean) ** 2).sum()
    std = (total / (count * len(means) - 1)).sqrt()
    return LatentStatistics(float(mean), float(std), tuple(means.tolist()), tuple(stds.tolist()))

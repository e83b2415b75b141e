"""Bits per dimension: the variational bound on given data, Eq. 5 of DDPM, arXiv:2006.11239."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_diffusion.losses.gaussian import mean_per_sample, normal_kl, vb_terms_bits


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N samples over T' timesteps, bits a dimension; column k is `timesteps[k]`."""

    timesteps: Tensor  # (T',) int64, descending, in the numbering of the training process
    total_bpd: Tensor  # (N,) vb.sum(1) + prior_bpd, an upper bound on the negative log2 likelihood a dimension
    prior_bpd: Tensor  # (N,) KL(q(x_T | x_0) || N(0, 1))
    vb: Tensor  # (N, T') KL(q(x_s | x_t, x_0) || p(x_s | x_t)); in the last column the decoder's -log2 p(x_0 | x_t)
    xstart_mse: Tensor  # (N, T') squared error of the predicted x_0
    mse: Tensor  # (N, T') squared error of the noise that the predicted x_0 implies


@torch.no_grad()
def bits_per_dim(
    model: Callable,
    scheduler,
    x_0: Tensor,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    class_labels: Tensor | None = None,
    clip: bool = True,
    timesteps_per_batch: int = 1,
    progress: bool = False,
) -> BitsPerDim:
    """The variational bound of each sample over the scheduler's current run, one x_t a timestep.

    model: called as model(x_t, t, class_labels=..., return_dict=False)[0] with int64 t (B,); a
    module is evaluated in eval mode. x_0: (N, ...) on the lattice k / 127.5 - 1 of 8-bit data.
    noise: (T', N, ...), entry k for the k-th timestep in descending order, drawn from `generator`
    where not given. class_labels: int64 (N,). clip: clamp the predicted x_0. timesteps_per_batch:
    timesteps that share a forward pass; it changes the speed, not the draw.
    """
    timesteps = scheduler.timesteps.to(x_0.device)
    _check_arguments(x_0, noise, generator, len(timesteps), timesteps_per_batch)
    columns = []
    with _evaluation_mode(model), tqdm(total=len(timesteps), disable=not progress, desc="bits per dimension") as bar:
        for start in range(0, len(timesteps), timesteps_per_batch):
            chunk = timesteps[start : start + timesteps_per_batch]
            # One draw a timestep, so that the numbers do not depend on timesteps_per_batch.
            drawn = (
                noise[start : start + timesteps_per_batch].to(x_0)
                if noise is not None
                else torch.stack([randn_tensor(x_0.shape, generator, x_0.device, x_0.dtype) for _ in chunk])
            )
            columns.append(_terms(model, scheduler, x_0, drawn, chunk, class_labels, clip))
            bar.update(len(chunk))
    vb, xstart_mse, mse = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
    prior_bpd = prior_bits_per_dim(scheduler, x_0)
    return BitsPerDim(timesteps, vb.sum(dim=1) + prior_bpd, prior_bpd, vb, xstart_mse, mse)


def prior_bits_per_dim(scheduler, x_0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) (N,), bits a dimension, at the noisiest timestep of the run."""
    alpha_bar = scheduler.alpha_bar[scheduler.timesteps[0].cpu()].item()
    log_variance = torch.full_like(x_0, math.log1p(-alpha_bar))
    zero = torch.zeros_like(x_0)
    return mean_per_sample(normal_kl(math.sqrt(alpha_bar) * x_0, log_variance, zero, zero)) / math.log(2)


def mean_and_standard_error(values: Tensor) -> tuple[float, float]:
    """Mean of values (N,) and its standard error, which is NaN for a single sample."""
    values = values.double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def _terms(
    model: Callable, scheduler, x_0: Tensor, noise: Tensor, timesteps: Tensor, class_labels: Tensor | None, clip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The (N, k) columns vb, xstart_mse and mse of k timesteps, from noise (k, N, ...)."""
    k, samples = len(timesteps), len(x_0)
    t = timesteps.repeat_interleave(samples)  # (k * N,), timestep-major
    x_0, noise = x_0.repeat(k, *[1] * (x_0.ndim - 1)), noise.flatten(0, 1)
    labels = None if class_labels is None else class_labels.to(x_0.device).repeat(k)
    x_t = scheduler.add_noise(x_0, noise, t)
    terms = vb_terms_bits(scheduler, model(x_t, t, class_labels=labels, return_dict=False)[0], x_0, x_t, t, clip)
    xstart_mse = mean_per_sample((terms.denoised - x_0) ** 2)
    mse = mean_per_sample((scheduler.predict_noise(terms.denoised, t, x_t) - noise) ** 2)
    return tuple(column.reshape(k, samples).T for column in (terms.bits, xstart_mse, mse))


def _check_arguments(
    x_0: Tensor, noise: Tensor | None, generator: torch.Generator | None, steps: int, timesteps_per_batch: int
) -> None:
    if not x_0.is_floating_point() or x_0.numel() == 0 or x_0.abs().max() > 1.001:
        shown = f"{tuple(x_0.shape)} {x_0.dtype}" + (f" up to {float(x_0.abs().max()):.4g}" if x_0.numel() else "")
        raise ValueError(f"x_0 is {shown}; give floating-point data in [-1, 1], for 8-bit images pixel / 127.5 - 1")
    if noise is not None and generator is not None:
        raise ValueError("pass either noise or generator, and not both")
    if noise is not None and noise.shape != (steps, *x_0.shape):
        raise ValueError(
            f"noise is {tuple(noise.shape)}; give {(steps, *x_0.shape)}, one entry a timestep of the scheduler's run"
        )
    if timesteps_per_batch < 1:
        raise ValueError(f"timesteps_per_batch={timesteps_per_batch} must be at least 1")


@contextlib.contextmanager
def _evaluation_mode(model: Callable) -> Iterator[None]:
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()  # with dropout the bound would be that of another, noisier model
    try:
        yield
    finally:
        if training:
            model.train()

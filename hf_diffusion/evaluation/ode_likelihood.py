"""Exact likelihood: the change of variables along the probability flow, arXiv:2011.13456, App. D.2.

A flow carries data at `start` to the prior at `end`. log p(x) is the prior's log density of where x
arrives, plus the integral of the velocity's divergence on the way. The divergence is exact where
samples have few dimensions, and elsewhere Hutchinson's estimate with one probe a sample. Each
sample has step sizes of its own (`dormand_prince`), so that its value depends on no other sample.

Bits per dimension of 8-bit data are those of the whole numbers: each is spread evenly over its bin
(uniform dequantisation) before the density is taken, which bounds the code length from above. Of
data that are no whole numbers they are those of the density itself, and may be negative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.evaluation.likelihood import mean_and_standard_error
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.model_measures import (
    ModelMeasureOptions,
    check_gaussian,
    checked_by,
    fetch,
    gather_columns,
    shared_batches,
)
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.randomness import derive_seed
from hf_diffusion.schedulers.scheduling_flow import convert_prediction
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from hf_diffusion.schedulers.scheduling_score import TRAINING_EPS, dormand_prince, over


Probe = Literal["exact", "rademacher", "gaussian"]
# So many dimensions cost so many products of a vector with the Jacobian, exactly.
EXACT_DIMENSIONS = 4
TOLERANCE = 1e-5
# Between two neighbouring values of 8 bits in [-1, 1].
BIN = 2 / 255


@dataclass(frozen=True)
class Flow:
    """dx/ds = velocity(x, s, labels) from data at `start` to the prior at `end`.

    velocity: (B, ...), float64 (B,), int64 (B,) or None -> (B, ...), differentiable in x.
    prior_logp: log density (B,) of arrivals (B, ...).
    log_volume: what a change of units at both ends adds to the log density of a sample.
    """

    velocity: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    start: float
    end: float
    prior_logp: Callable[[Tensor], Tensor]
    log_volume: float = 0.0


@dataclass(frozen=True)
class FlowLikelihood:
    """log p(x) in nats (N,), the arrivals (N, ...), and the calls of the velocity (N,)."""

    log_prob: Tensor
    latents: Tensor
    calls: Tensor


def flow_log_likelihood(
    flow: Flow,
    x: Tensor,
    probe: Tensor | None = None,
    labels: Tensor | None = None,
    rtol: float = TOLERANCE,
    atol: float = TOLERANCE,
) -> FlowLikelihood:
    """Log density of each of N samples x (N, ...).

    probe: (N, ...) of unit covariance for Hutchinson's estimate; None: the exact divergence.
    """
    shape = x.shape[1:]

    def velocity(state: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        some = None if probe is None else probe[rows]
        mine = None if labels is None else labels[rows]
        with torch.enable_grad():
            here = state[:, :-1].reshape(-1, *shape).to(x.dtype).requires_grad_()
            speed = flow.velocity(here, s, mine)
            divergence = _divergence(speed, here, some)
        return torch.cat([speed.detach().flatten(1).double(), divergence.double()[:, None]], dim=1)

    # in float64: the sum over thousands of small steps; the network has its own precision
    state = torch.cat([x.flatten(1).double(), torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
    state, calls = dormand_prince(velocity, state, flow.start, flow.end, rtol, atol)
    latents = state[:, :-1].reshape(x.shape)
    return FlowLikelihood(flow.prior_logp(latents) + state[:, -1] + flow.log_volume, latents, calls)


def _divergence(speed: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """The trace (B,) of d speed / d x, or probe^T (d speed / d x) probe."""
    if probe is not None:
        (product,) = torch.autograd.grad((speed * probe).sum(), x)
        return (product * probe).flatten(1).sum(1)
    flat = speed.flatten(1)
    trace = torch.zeros(len(x), dtype=speed.dtype, device=x.device)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        trace = trace + row.flatten(1)[:, i]
    return trace


def draw_probe(kind: Probe, like: Tensor, generators: list[torch.Generator]) -> Tensor | None:
    """Probes (B, ...) of unit covariance, one generator each; None for the exact divergence."""
    if kind == "exact":
        return None
    shape = like.shape[1:]
    if kind == "gaussian":
        drawn = [torch.randn(shape, generator=g) for g in generators]
    elif kind == "rademacher":
        drawn = [torch.randint(0, 2, shape, generator=g) * 2.0 - 1 for g in generators]
    else:
        raise ValueError(f"unknown probe {kind!r}; choose from ['exact', 'rademacher', 'gaussian']")
    return torch.stack(drawn).to(like)


def bits_per_dimension(log_prob: Tensor, dims: int, bin_width: float = 1.0) -> Tensor:
    """Bits per dimension (N,) of log densities in nats (N,), for values `bin_width` apart."""
    return -log_prob / (dims * math.log(2)) - math.log2(bin_width)


# --- the flows of three families ----------------------------------------------------------------


def score_flow(pipeline: DiffusionPipeline, eps: float = TRAINING_EPS) -> Flow:
    """The flow of a pipeline whose scheduler is one of `scheduling_score`, from time `eps` to 1."""
    scheduler = pipeline.scheduler

    def velocity(x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        t = scheduler.timestep_of(time)
        return scheduler.velocity(pipeline.predict_score(x, t, labels, None), t, x)

    return Flow(velocity, eps, 1.0, scheduler.trained_sde.prior_logp)


def gaussian_flow(pipeline: DiffusionPipeline) -> Flow:
    """The flow of a denoising model in discrete time, from its least noisy level to its noisiest.

    In y = x / sqrt(alpha_bar) and the logarithm s of y's noise sigma it is dy/ds = sigma noise, so
    that alpha_bar between timesteps does not matter but for what the network is told: the
    timestep, interpolated in s.
    """
    scheduler = LinearDDPMScheduler.from_config(pipeline.scheduler.config)
    alpha_bar = scheduler.alpha_bar.double()
    # a level of pure noise would lie at infinity
    alpha_bar = alpha_bar[alpha_bar > 1e-10].to(pipeline.device)
    levels = (((1 - alpha_bar) / alpha_bar).log() / 2).contiguous()  # ascending
    channels = pipeline.unet.config.in_channels
    kind = scheduler.config.prediction_type

    def velocity(y: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        below = (torch.searchsorted(levels, s.contiguous(), right=True) - 1).clamp(0, len(levels) - 2)
        t = below + ((s - levels[below]) / (levels[below + 1] - levels[below])).clamp(0, 1)
        sigma = s.exp()
        scale, std = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
        x_t = over(scale, y) * y
        output = pipeline.unet(x_t, t.float(), class_labels=labels, return_dict=False)[0][:, :channels]
        if kind == "v_prediction":
            output = over(scale, y) * output + over(std, y) * x_t
        elif kind == "sample":
            output = (x_t - over(scale, y) * output) / over(std, y)
        return over(sigma, y) * output

    last, dims = alpha_bar[-1].sqrt(), math.prod(pipeline.sample_shape)

    def prior_logp(y: Tensor) -> Tensor:
        x = y * last
        return -dims / 2 * math.log(2 * math.pi) - (x**2).flatten(1).sum(1) / 2

    return Flow(velocity, float(levels[0]), float(levels[-1]), prior_logp, dims * float(last.log()))


def matched_flow(pipeline: DiffusionPipeline) -> Flow:
    """The flow of a flow matching model, whose s is sigma: the one that its solvers follow."""
    config, std, dims = pipeline.config, pipeline.config.noise_scale, math.prod(pipeline.sample_shape)

    def velocity(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        t = (sigma * pipeline.scheduler.config.num_train_timesteps).to(x.dtype)
        conditions = {} if labels is None else {"class_labels": labels}
        output = pipeline.unet(x, t, **conditions, return_dict=False)[0]
        return convert_prediction(output, x, sigma, config.prediction_type, "velocity", config.sigma_floor)

    def prior_logp(x: Tensor) -> Tensor:
        return -dims / 2 * math.log(2 * math.pi * std**2) - (x / std).square().flatten(1).sum(1) / 2

    return Flow(velocity, 0.0, 1.0, prior_logp)


# --- the measure --------------------------------------------------------------------------------


def check_score(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the pipeline's scheduler is that of a score network."""
    if not hasattr(pipeline.scheduler, "trained_sde"):
        raise ValueError(
            f"bpd_ode needs the probability flow of a score network, and {type(pipeline.scheduler).__name__} has "
            "none; load the pipeline with the scheduler that it was trained with"
        )


def check_denoiser(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the process is Gaussian, in discrete time, and has a flow."""
    check_gaussian(pipeline, "bpd_ode", 1)
    if pipeline.scheduler.config.prediction_type == "previous_mean":
        raise ValueError("bpd_ode needs prediction_type epsilon, sample or v_prediction, and not previous_mean")


@checked_by(check_score)
def measure_score_bits_per_dim(
    pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions
) -> Evaluation:
    """Bits per dimension of real samples by the probability flow of a score network."""
    return measure_flow(score_flow(pipeline), pipeline, data, options)


@checked_by(check_denoiser)
def measure_gaussian_bits_per_dim(
    pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions
) -> Evaluation:
    """Bits per dimension of real samples by the probability flow of a denoising model."""
    return measure_flow(gaussian_flow(pipeline), pipeline, data, options)


def measure_matched_bits_per_dim(
    pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions
) -> Evaluation:
    """Bits per dimension of real samples by the flow of a flow matching model."""
    return measure_flow(matched_flow(pipeline), pipeline, data, options)


def measure_flow(
    flow: Flow, pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions
) -> Evaluation:
    """The measure `bpd_ode` of a flow, on all processes together.

    Sample i has the dequantisation and the probe of seed + i, so that the value does not depend on
    batches and processes. A class-conditional model is given the samples' classes.
    """
    first, _ = fetch(pipeline, data, evenly_spaced(len(data), 16))
    dims, is_8_bit = first[0].numel(), _is_8_bit(first)
    probe: Probe = "exact" if dims <= EXACT_DIMENSIONS else "rademacher"
    shown, parts = options.progress and PartialState().is_main_process, []
    for start, some in tqdm(shared_batches(data, options), desc="probability flow", disable=not shown):
        x_0, labels = fetch(pipeline, data, some)
        if labels is None and getattr(pipeline, "null_class_id", None) is not None:
            labels = torch.full((len(x_0),), pipeline.null_class_id, device=x_0.device)
        generators = [torch.Generator().manual_seed(derive_seed(options.seed + i, "flow")) for i in some]
        if is_8_bit:
            uniform = torch.stack([torch.rand(x_0.shape[1:], generator=g) for g in generators])
            x_0 = x_0 + (uniform.to(x_0) - 0.5) * BIN
        found = flow_log_likelihood(flow, x_0, draw_probe(probe, x_0, generators), labels)
        bits = bits_per_dimension(found.log_prob, dims, BIN if is_8_bit else 1.0)
        parts.append((start, bits.cpu(), found.calls.double().cpu()))
    bits, calls = gather_columns(parts)
    what = "uniform dequantisation" if is_8_bit else "of the density"
    divergence = "exact divergence" if probe == "exact" else "Hutchinson's divergence"
    name = f"bits per dimension by the probability flow ({len(bits)} samples, {what}, {divergence})"
    protocol = {
        "count": len(bits),
        "noise_seed": options.seed,
        "dequantisation": "uniform" if is_8_bit else "none",
        "divergence": probe,
        "tolerance": TOLERANCE,
        "network_calls": float(calls.mean()),
        "data": data_protocol(data),
    }
    return Evaluation({"bpd_ode": Measure(name, *mean_and_standard_error(bits), better="lower")}, protocol)


def _is_8_bit(x_0: Tensor) -> bool:
    levels = (x_0 + 1) * 127.5
    return x_0.ndim == 4 and bool(x_0.abs().max() <= 1 and (levels - levels.round()).abs().max() < 1e-2)

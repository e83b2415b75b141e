"""Replays of the losses, likelihoods and timestep sampling of OpenAI and ermongroup/ddim."""

import torch
from torch import Tensor

from hf_diffusion.evaluation.likelihood import bits_per_dim
from hf_diffusion.losses.gaussian import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    hybrid_loss,
    normal_kl,
    simple_loss,
    variance_loss,
    vb_terms_bits,
    vlb_loss,
)
from hf_diffusion.losses.noise_levels import LossSecondMomentSampler
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, LinearDDPMScheduler
from tests.golden.replay import Case, toy


PREDICTION_TYPES = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": "previous_mean"}
VARIANCE_TYPES = {name.upper(): name for name in ("fixed_small", "fixed_large", "learned", "learned_range")}


def scheduler_of(params: dict):
    """The scheduler with the process that a case describes."""
    schedule = {
        "linear": lambda **options: LinearDDPMScheduler(rescale_betas_by_steps=True, **options),
        "cosine": CosineDDPMScheduler,
    }[params["schedule"]]
    scheduler = schedule(
        num_train_timesteps=params["T"],
        prediction_type=PREDICTION_TYPES[params["mean_type"]],
        variance_type=VARIANCE_TYPES[params["var_type"]],
    )
    if params["respacing"] is not None:
        sections = params["respacing"]
        scheduler.set_timesteps(timesteps=sections if isinstance(sections, str) else ",".join(map(str, sections)))
    return scheduler


def kept_timesteps(scheduler) -> Tensor:
    """Index in the respaced process, as the reference counts -> timestep of training, as we do."""
    return scheduler.timesteps.flip(0)


def replay_training_losses(case: Case) -> None:
    scheduler, loss_type = scheduler_of(case.settings), case.settings["loss_type"]
    learned = scheduler.config.variance_type in ("learned", "learned_range")
    steps = len(scheduler.timesteps)
    for dtype in case.dtypes():
        x_0, noise, t = case.input("x_start", dtype), case.input("noise", dtype), case.input("t")
        t = kept_timesteps(scheduler)[t]
        model_output = case.input("model_output", dtype).requires_grad_()
        x_t = scheduler.add_noise(x_0, noise, t)
        if loss_type in ("KL", "RESCALED_KL"):
            loss = vlb_loss(scheduler, model_output, x_0, x_t, t, rescaled=loss_type == "RESCALED_KL")
        elif loss_type in ("MSE", "RESCALED_MSE"):
            simple = loss = simple_loss(scheduler, model_output, x_0, x_t, noise, t)
            case.check("mse", simple, dtype)
            if learned:
                weight = 0.001 if loss_type == "RESCALED_MSE" else 1 / steps
                case.check("vb", weight * variance_loss(scheduler, model_output, x_0, x_t, t), dtype)
                loss = hybrid_loss(scheduler, model_output, x_0, x_t, noise, t, vlb_weight=weight)
        else:
            raise AssertionError(f"{case}: unknown loss_type {loss_type!r}")
        case.check("loss", loss, dtype)
        case.check("grad_model_output", torch.autograd.grad(loss.sum(), model_output)[0], dtype)


def replay_vb_terms(case: Case) -> None:
    scheduler = scheduler_of(case.settings)
    for dtype in case.dtypes():
        x_0, x_t, t = case.input("x_start", dtype), case.input("x_t", dtype), case.input("t")
        output = case.input("model_output", dtype)
        terms = vb_terms_bits(
            scheduler, output, x_0, x_t, kept_timesteps(scheduler)[t], case.settings["clip_denoised"]
        )
        case.check("output", terms.bits, dtype)
        case.check("pred_xstart", terms.denoised, dtype)
        case.check("kl_bits", terms.kl_bits, dtype)
        case.check("decoder_nll_bits", torch.where(t == 0, terms.decoder_bits, 0), dtype)


def replay_bits_per_dim(case: Case) -> None:
    scheduler, params = scheduler_of(case.settings), case.settings
    formulas = case.manifest["toy_functions"]["network"]
    parts = [toy(formulas[params[part]]) for part in ("toy_mean", "toy_var") if params[part] is not None]
    scale = 1000 / params["T"] if params["rescale_timesteps"] else 1
    for dtype in case.dtypes():
        for timesteps_per_batch in (1, 4):
            calls = []

            def network(x, t, class_labels, return_dict, calls=calls):
                t = t.float() * scale if params["rescale_timesteps"] else t
                calls.append(t[:: len(case.arrays["input__x_start"])])
                t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
                return (torch.cat([part(x=x, t=t).expand_as(x) for part in parts], dim=1),)

            x_0, noise = case.input("x_start", dtype), case.input("noise_sequence", dtype)
            result = bits_per_dim(
                network, scheduler, x_0, noise, clip=params["clip_denoised"], timesteps_per_batch=timesteps_per_batch
            )
            for name in ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"):
                case.check(name, getattr(result, name), dtype)
            case.check("model_timesteps", torch.cat(calls), dtype)


def replay_likelihood_primitives(case: Case) -> None:
    primitives = {
        "kl": (normal_kl, ("mean1", "logvar1", "mean2", "logvar2")),
        "cdf": (approx_standard_normal_cdf, ("z",)),
        "log_probs": (discretized_gaussian_log_likelihood, ("x", "means", "log_scales")),
    }
    for dtype in case.dtypes():
        for name, (function, inputs) in primitives.items():
            if case.expects(name, dtype):
                case.check(name, function(*(case.input(i, dtype) for i in inputs)), dtype)


def replay_second_moment_sampler(case: Case) -> None:
    params = case.settings
    sampler = LossSecondMomentSampler(params["T"], params["history_per_term"], params["uniform_prob"])
    t, losses, prefix = case.input("ts"), case.input("losses"), params["warm_prefix"]
    sampler.update(t[:prefix], losses[:prefix])
    case.check("weights_before", sampler.weights())
    sampler.update(t[prefix:], losses[prefix:])
    case.check("weights", sampler.weights())
    case.check("loss_history", sampler.history)
    case.check("loss_counts", sampler.counts, None)
    # The reference's draws, asked for again: the middle of each one's share of [0, 1).
    shares = sampler.weights() / sampler.weights().sum()
    drawn, importance = sampler.sample((shares.cumsum(0) - shares / 2)[case.input("sampled_indices")])
    torch.testing.assert_close(drawn, case.input("sampled_indices"))
    case.check("importance_weights", importance)


def replay_ermon_loss(case: Case) -> None:
    """The 'loss' case of ermon_ddim.npz: a sum over all but the batch, where ours is a mean."""
    for dtype in case.dtypes():
        x_0, noise, t = case.input("x_start", dtype), case.input("noise", dtype), case.input("t")
        scheduler = LinearDDPMScheduler(num_train_timesteps=int(t.max()) + 1)
        x_t = scheduler.add_noise(x_0, noise, t)
        loss = simple_loss(scheduler, case.input("model_output", dtype), x_0, x_t, noise, t) * x_0[0].numel()
        case.check("loss_per_sample", loss, dtype)
        case.check("loss", loss.mean(), dtype)


REPLAYS = {
    "training losses": replay_training_losses,
    "variational bound terms": replay_vb_terms,
    "bits/dim evaluation": replay_bits_per_dim,
    "normal_kl, approximate normal CDF, discretized Gaussian log-likelihood": replay_likelihood_primitives,
    "importance sampling of timesteps": replay_second_moment_sampler,
}

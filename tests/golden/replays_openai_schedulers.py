"""Replays of the Gaussian process.

Schedules, respacing, forward process, reverse steps and whole loops.
"""

import math

import numpy as np
import pytest
import torch

from hf_diffusion.schedulers.scheduling_gaussian import (
    CosineDDPMScheduler,
    DDIMEtaScheduler,
    LinearDDPMScheduler,
    beta_table,
    space_timesteps,
)
from tests.golden.replay import Case, toy
from tests.golden.replays_openai_losses import replay_ermon_loss


PREDICTION = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": "previous_mean"}
SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler_of(params: dict, cls=None, **overrides):
    """Our scheduler for the process of a case; OpenAI scales the linear betas by 1000 / T."""
    cls = cls or (CosineDDPMScheduler if params["schedule"] == "cosine" else LinearDDPMScheduler)
    scheduler = cls(
        num_train_timesteps=params["T"],
        beta_schedule=SCHEDULE[params["schedule"]],
        rescale_betas_by_steps=params["schedule"] == "linear",
        prediction_type=PREDICTION[params.get("mean_type", "EPSILON")],
        variance_type=params.get("var_type", "FIXED_SMALL").lower(),
        clip_sample=params.get("clip_denoised", False),
        **overrides,
    )
    if params.get("respacing"):
        scheduler.set_timesteps(timesteps=params["respacing"])
    return scheduler


def kept_timesteps(scheduler) -> torch.Tensor:
    return scheduler.timesteps.flip(0)  # a case's t counts the kept steps upwards


def replay_schedule(case: Case) -> None:
    params = case.settings
    scale = 1000 / params["T"]
    betas = beta_table(SCHEDULE[params["schedule"]], params["T"], 0.0001 * scale, 0.02 * scale)
    if set(case.arrays) == {"expected_f64__betas"}:
        case.check("betas", betas)  # T so small that no process can be built from it
        return
    _check_tables(case, scheduler_of(params))


def replay_respaced_tables(case: Case) -> None:
    scheduler = scheduler_of(case.settings)
    case.check("timestep_map", kept_timesteps(scheduler), None)
    _check_tables(case, scheduler)


def _check_tables(case: Case, scheduler) -> None:
    t = kept_timesteps(scheduler)
    s = scheduler.previous_timestep(t)
    alpha_bar = scheduler.alpha_bar[t]
    previous = torch.where(s >= 0, scheduler.alpha_bar[s], torch.ones(()).double())
    one, zero = torch.ones(len(t), dtype=torch.float64), torch.zeros(len(t), dtype=torch.float64)
    from_x_0, variance = scheduler.posterior(one, zero, t, s)
    from_x_t, _ = scheduler.posterior(zero, one, t, s)
    betas = 1 - alpha_bar / previous
    large = scheduler_of({**case.settings, "var_type": "FIXED_LARGE"})
    _, large_variance, large_log, _ = large.p_mean_variance(zero, t, one)
    case.check("betas", betas)
    case.check("alphas_cumprod", alpha_bar)
    case.check("alphas_cumprod_prev", previous)
    case.check("alphas_cumprod_next", torch.cat([alpha_bar[1:], torch.zeros(1)]))
    case.check("sqrt_alphas_cumprod", scheduler.add_noise(one, zero, t))
    case.check("sqrt_one_minus_alphas_cumprod", scheduler.add_noise(zero, one, t))
    case.check("log_one_minus_alphas_cumprod", (1 - alpha_bar).log())
    case.check("sqrt_recip_alphas_cumprod", scheduler.predict_x_0(zero, t, one, clip=False))
    case.check("sqrt_recipm1_alphas_cumprod", -scheduler.predict_x_0(one, t, zero, clip=False))
    case.check("posterior_variance", variance)
    case.check("posterior_log_variance_clipped", scheduler.posterior_log_variance_clipped(t))
    case.check("posterior_mean_coef1", from_x_0)
    case.check("posterior_mean_coef2", from_x_t)
    case.check("fixed_large_variance", large_variance)
    case.check("fixed_large_log_variance", large_log)
    case.check("learned_range_max_log", _learned_bound(case.settings, t, one))


def _learned_bound(params: dict, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    learned = scheduler_of({**params, "var_type": "LEARNED_RANGE"})
    _, _, log_variance, _ = learned.p_mean_variance(torch.ones(len(t), 2).double(), t, x[:, None])
    return log_variance[:, 0]


def replay_space_timesteps(case: Case) -> None:
    total, sections = case.settings["T"], case.settings["section_counts"]
    case.check("timesteps", np.array(space_timesteps(total, sections)), None)
    for bad in case.record.entry.get("must_raise_ValueError", []):
        with pytest.raises(ValueError, match=str(bad["section_counts"])):
            space_timesteps(bad["T"], bad["section_counts"])


def replay_q_process(case: Case) -> None:
    scheduler = scheduler_of(case.settings)
    by_mean = scheduler_of({**case.settings, "mean_type": "PREVIOUS_X"})
    t = case.input("t")
    for dtype in case.dtypes():
        x_0, x_t, noise = (case.input(name, dtype) for name in ("x_start", "x_t", "noise"))
        one, zero = torch.ones_like(x_0), torch.zeros_like(x_0)
        variance = scheduler.add_noise(zero, one, t) ** 2
        mean, posterior_variance = scheduler.posterior(x_0, x_t, t, scheduler.previous_timestep(t))
        log_variance = scheduler.posterior_log_variance_clipped(t).to(dtype).reshape(-1, *[1] * (x_0.ndim - 1))
        case.check("q_sample", scheduler.add_noise(x_0, noise, t), dtype)
        case.check("q_mean", scheduler.add_noise(x_0, zero, t), dtype)
        case.check("q_variance", variance, dtype)
        case.check("q_log_variance", variance.log(), dtype)
        case.check("posterior_mean", mean, dtype)
        case.check("posterior_variance", posterior_variance.expand_as(x_0), dtype)
        case.check("posterior_log_variance_clipped", log_variance.expand_as(x_0), dtype)
        case.check("xstart_from_eps", scheduler.predict_x_0(noise, t, x_t, clip=False), dtype)
        case.check("eps_from_xstart", scheduler.predict_noise(x_0, t, x_t), dtype)
        case.check("xstart_from_xprev", by_mean.predict_x_0(noise, t, x_t, clip=False), dtype)


def replay_p_mean_variance(case: Case) -> None:
    scheduler = scheduler_of(case.settings)
    t = kept_timesteps(scheduler)[case.input("t")]
    denoised = toy(case.settings["denoised_fn"].split(":")[-1]) if case.settings.get("denoised_fn") else None
    for dtype in case.dtypes():
        output, x = case.input("model_output", dtype), case.input("x", dtype)
        if denoised is not None:
            _check_with_denoised_fn(case, scheduler, denoised, output, t, x, dtype)
            continue
        mean, variance, log_variance, x_0 = scheduler.p_mean_variance(output, t, x)
        for name, value in zip(
            ("mean", "variance", "log_variance", "pred_xstart"), (mean, variance, log_variance, x_0)
        ):
            case.check(name, value, dtype)


def _check_with_denoised_fn(case, scheduler, denoised, output, t, x, dtype) -> None:
    """A function on the predicted x_0 is the caller's business here.

    He predicts, transforms, clips, and asks for the posterior.
    """
    _, variance, log_variance, raw = scheduler.p_mean_variance(output, t, x, clip=False)
    x_0 = denoised(x=raw)
    x_0 = x_0.clamp(-1, 1) if case.settings["clip_denoised"] else x_0
    mean, _ = scheduler.posterior(x_0, x, t, scheduler.previous_timestep(t))
    for name, value in zip(("mean", "variance", "log_variance", "pred_xstart"), (mean, variance, log_variance, x_0)):
        case.check(name, value, dtype)


def _replay_steps(case: Case, scheduler, step, dtype: torch.dtype) -> None:
    """`step(scheduler, output, t, x, noise)` sample by sample: a step has one t for its batch."""
    t = kept_timesteps(scheduler)[case.input("t")]
    output, x = case.input("model_output", dtype), case.input("x", dtype)
    noise = case.input("noise", dtype) if case.has_input("noise") else torch.zeros_like(x)
    results = [step(scheduler, output[[i]], int(t[i]), x[[i]], noise[[i]]) for i in range(len(t))]
    case.check("sample", torch.cat([r.prev_sample for r in results]), dtype)
    case.check("pred_xstart", torch.cat([r.pred_original_sample for r in results]), dtype)


def replay_p_sample_step(case: Case) -> None:
    for dtype in case.dtypes():
        _replay_steps(
            case, scheduler_of(case.settings), lambda s, out, t, x, n: s.step(out, t, x, variance_noise=n), dtype
        )


def replay_ddim_step(case: Case) -> None:
    scheduler = scheduler_of(case.settings, DDIMEtaScheduler, eta=case.settings["eta"])
    for dtype in case.dtypes():
        _replay_steps(case, scheduler, lambda s, out, t, x, n: s.step(out, t, x, variance_noise=n), dtype)


def replay_ddim_reverse_step(case: Case) -> None:
    scheduler = scheduler_of(case.settings, DDIMEtaScheduler, eta=case.settings["eta"])
    for dtype in case.dtypes():
        _replay_steps(case, scheduler, lambda s, out, t, x, n: s.inverse_step(out, t, x), dtype)


def toy_network(case: Case):
    """(x, t) -> output, with the variance channels behind it.

    The time is mapped as the reference maps it before it asks its network.
    """
    formulas, params = case.manifest["toy_functions"]["network"], case.settings
    mean = toy(formulas[params["toy_mean"]])
    variance = toy(formulas[params["toy_var"]]) if params.get("toy_var") else None

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = model_timestep(params, t).to(x.dtype)
        return mean(x=x, t=t) if variance is None else torch.cat([mean(x=x, t=t), variance(x=x, t=t)], dim=1)

    return network


def model_timestep(params: dict, t: torch.Tensor) -> torch.Tensor:
    return t.float() * (1000.0 / params["T"]) if params.get("rescale_timesteps") else t


def replay_sampling_loop(case: Case) -> None:
    params, sampler = case.settings, case.settings["sampler"]
    cls = None if sampler == "ddpm" else DDIMEtaScheduler
    scheduler = scheduler_of(params, cls, **({} if cls is None else {"eta": params["eta"]}))
    network = toy_network(case)
    timesteps = scheduler.timesteps if sampler != "ddim_reverse" else kept_timesteps(scheduler)
    for dtype in case.dtypes():
        x, steps = case.input("x_T", dtype), []
        for k, t in enumerate(timesteps):
            if sampler == "ddim_reverse":
                out = scheduler.inverse_step(network(x, t), t, x)
            else:
                out = scheduler.step(network(x, t), t, x, variance_noise=case.input("step_noise", dtype)[k])
            steps.append((out.prev_sample, out.pred_original_sample, model_timestep(params, t)))
            x = out.prev_sample
        trajectory, x_0s, model_ts = (torch.stack(column) for column in zip(*steps))
        _check_loop(case, dtype, x, trajectory, x_0s, model_ts)


def _check_loop(case: Case, dtype, final, trajectory, x_0s, model_ts) -> None:
    if case.settings.get("f32_reference_is_nan") and dtype == torch.float32:
        # The reference's own float32 run is NaN here (a radicand of -6e-8); ours must stay finite
        # and follow the float64 run.
        for name, value in (("final", final), ("trajectory", trajectory), ("pred_xstart", x_0s)):
            want = case.arrays[f"expected_f64__{name}"]
            np.testing.assert_allclose(value.numpy(), want, rtol=0, atol=1e-4, err_msg=f"{case} {name}")
            case.seen.add(f"expected_f32__{name}")
        case.check("model_timesteps", model_ts, dtype)
        return
    case.check("final", final, dtype)
    case.check("trajectory", trajectory, dtype)
    case.check("pred_xstart", x_0s, dtype)
    case.check("model_timesteps", model_ts, dtype)


def replay_ermon(case: Case) -> None:
    """ermongroup/ddim: its schedules, its subsequences of timesteps, its two samplers, its loss."""
    params = case.settings
    if "loss" in case.record.name:
        replay_ermon_loss(case)
    elif "sampler" in params:
        _replay_ermon_run(case)
    elif "beta_schedule" in params:
        schedule = "scaled_linear" if params["beta_schedule"] == "quad" else params["beta_schedule"]
        case.check("betas", beta_table(schedule, params["T"], params["beta_start"], params["beta_end"]))
    elif "skip_type" in params:
        case.check("seq", np.array(_ermon_sequence(params)), None)
    else:
        pytest.fail(f"{case}: no replay knows params {params}")


def _ermon_sequence(params: dict) -> list[int]:
    """A subsequence of timesteps; quad repeats small t for many steps, as no list of ours does."""
    total, steps = params["T"], params["steps"]
    if params["skip_type"] == "uniform":
        return list(range(0, total, total // steps))
    return [int(s) for s in np.linspace(0, math.sqrt(total * 0.8), steps) ** 2]


def _replay_ermon_run(case: Case) -> None:
    params = case.settings
    noisy = params["sampler"] == "ddpm_noisy"
    common = {"num_train_timesteps": params["T"], "beta_start": params["beta_start"], "beta_end": params["beta_end"]}
    common |= {"beta_schedule": params["beta_schedule"], "clip_sample": noisy}
    scheduler = (
        LinearDDPMScheduler(variance_type="fixed_large", **common)
        if noisy
        else DDIMEtaScheduler(eta=params["eta"], **common)
    )
    scheduler.set_timesteps(timesteps=case.input("seq").flip(0))
    network = toy(case.manifest["toy_functions"]["network"][params["toy_mean"]])
    for dtype in case.dtypes():
        x, trajectory, x_0s = case.input("x_T", dtype), [], []
        for k, t in enumerate(scheduler.timesteps):
            out = scheduler.step(network(x=x, t=t.to(dtype)), t, x, variance_noise=case.input("step_noise", dtype)[k])
            x = out.prev_sample
            trajectory.append(x)
            x_0s.append(out.pred_original_sample)
        case.check("trajectory", torch.stack(trajectory), dtype)
        case.check("x0_preds", torch.stack(x_0s), dtype)


def replay_misc(case: Case) -> None:
    from diffusers.training_utils import EMAModel

    if case.has_input("sources"):
        for dtype in case.dtypes():
            parameter = torch.nn.Parameter(case.input("target_init", dtype).clone())
            ema = EMAModel([parameter], decay=case.settings["rate"], min_decay=case.settings["rate"])
            ema.optimization_step = 1  # the library copies at its first step; the reference averages from the start
            for source in case.input("sources", dtype):
                parameter.data.copy_(source)
                ema.step([parameter])
            case.check("ema", ema.shadow_params[0], dtype)
    elif case.has_input("pixels"):
        from hf_diffusion.data.pixels import to_network_range

        case.check("normalized", to_network_range(case.input("pixels").to(torch.uint8).numpy()).double())
    elif case.has_input("sample"):
        from hf_diffusion.data.pixels import from_network_range

        sample = case.input("sample", torch.float32)
        # The reference's rule; ours rounds to the nearest.
        truncated = ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        case.check("uint8", truncated, None)
        assert (from_network_range(sample).int() - truncated.int()).abs().max() <= 1
    else:
        pytest.fail(f"{case}: no replay knows inputs {sorted(case.arrays)}")


REPLAYS = {
    "beta schedule and derived tables": replay_schedule,
    "timestep respacing": replay_space_timesteps,
    "tables of a respaced process": replay_respaced_tables,
    "forward process and posterior": replay_q_process,
    "p_mean_variance": replay_p_mean_variance,
    "DDPM ancestral step": replay_p_sample_step,
    "DDIM step": replay_ddim_step,
    "DDIM inversion step": replay_ddim_reverse_step,
    "full sampling loops": replay_sampling_loop,
    "ermongroup/ddim schedules, samplers, loss": replay_ermon,
    "EMA update and image range conversion": replay_misc,
}

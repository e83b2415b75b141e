"""Replays of EDM: preconditioning, losses, the paper's solvers and those of k-diffusion.

The manifest gives the denoiser D of a sampler as a formula. A scheduler wants the network's output,
which is the one whose denoised sample is D.
"""

import inspect
import re
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_edm_dpmsolver_multistep
from torch import Tensor

from hf_diffusion.losses.preconditioned import level_weight, output_error
from hf_diffusion.schedulers.scheduling_edm import (
    PRECONDITIONINGS,
    EDMHeunScheduler,
    EDMPreconditioning,
    IDDPMPreconditioning,
    Preconditioning,
    VPTime,
    along,
    noise_levels,
)
from tests.golden.kdiffusion_solvers import SOLVERS, dpm_fast
from tests.golden.manifests import records
from tests.golden.replay import Case, toy


# Names of the reference that are not ours.
RENAMED = {
    "C_1": "c_1",
    "C_2": "c_2",
    "M": "num_train_timesteps",
    "epsilon_t": "first_time",
    "P_mean": "sigma_mean",
    "P_std": "sigma_std",
    "S_churn": "s_churn",
    "S_min": "s_min",
    "S_max": "s_max",
    "S_noise": "s_noise",
    "discretization": "sigma_schedule",
    "schedule": "time_schedule",
    "scaling": "signal_scaling",
}
# Words of the reference that are not ours: a VE model's levels are even in the logarithm.
LEVELS = {"ve": "exponential", "edm": "karras"}


def formula(text: str):
    """A function of a manifest, such as "F(x_in,c_noise)=0.6*tanh(0.8*x_in)"."""
    signature, body = re.search(r"(?:F|D)\(([^)]*)\)=([^;]*)", text).groups()
    function = toy(re.sub(r"(?<=[\w)]) (?=[a-z])", "*", body.split(";")[0].strip().replace("^", "**")))
    names = [name.strip() for name in signature.split(",")]
    return lambda *values, **constants: function(**dict(zip(names, values)), **constants)


def preconditioning_of(settings: dict[str, Any], name: str) -> Preconditioning:
    cls = PRECONDITIONINGS[name]
    given = {RENAMED.get(key, key): value for key, value in settings.items()}
    values = {key: given[key] for key in cls.__dataclass_fields__ if key in given}
    if name == "ve":
        values = {"sampling_range": (given["sigma_min"], given["sigma_max"])}
    return cls(**values)


def replay_preconditioning(case: Case) -> None:
    name, sigma, x = case.settings["precond"], case["sigma"], case["x"]
    made, network = preconditioning_of(case.settings, name), formula(case.settings["network"])
    for key, values in zip(("c_skip", "c_out", "c_in", "c_noise"), made.coefficients(sigma)):
        case.check(key, values)
    for key, dtype in (("D_float64", torch.float64), ("D", torch.float32)):
        seen, c_noise = made.inputs(x.to(dtype), sigma)
        if dtype == torch.float64:
            c_noise = made.coefficients(sigma).c_noise
        case.check(key, made.denoised(network(seen, along(c_noise, seen)), x.to(dtype), sigma))
    if name == "vp":
        ends = torch.tensor([made.first_time, 1.0], dtype=torch.float64)
        # the reference takes exp(x) - 1 in float32, whose steps beside 1 are 2^-23
        torch.testing.assert_close(made.time.sigma(ends) ** 2, case["sigma_range"] ** 2, rtol=1e-4, atol=2.0**-23)
        torch.testing.assert_close(made.training_sigmas(torch.tensor([0.0, 1.0])), made.time.sigma(ends))
        times = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
        case.check("sigma_of_t", made.time.sigma(times))
        torch.testing.assert_close(made.time.inverse(made.time.sigma(times)), times)
    if name == "iddpm":
        case.check("u", made.table[::37])
        case.check("round_sigma", made.round_sigmas(sigma))


def replay_loss(case: Case) -> None:
    settings, x_0, noise = case.settings, case["images"], case["noise"]
    made = preconditioning_of(settings, settings["loss"])
    drawn = case["level_noise"].flatten()
    # ours begin with the least noise; the reference draws the times of VP from the other end
    levels = {"edm": torch.special.ndtr(drawn), "vp": 1 - drawn, "ve": drawn}
    sigma = made.training_sigmas(levels[settings["loss"]])
    case.check("sigma", along(sigma, x_0))
    c_out = made.coefficients(sigma).c_out
    case.check("weight", along(c_out**-2, x_0))
    x = x_0 + along(sigma, x_0) * noise
    output = output_of(made, denoiser_of(settings)(x, along(sigma, x)), x, sigma)
    case.check("loss", (output - made.target(x_0, x, sigma)) ** 2)
    mean = case["loss"].flatten(1).mean(dim=1)
    torch.testing.assert_close(output_error(made, output, x_0, x, sigma), mean, rtol=1e-6, atol=1e-8)


def denoiser_of(settings: dict[str, Any]):
    """D(x, sigma) of a case."""
    constants = {name: settings[name] for name in ("m", "s2", "a")}
    denoiser = formula(settings["denoiser"])
    return lambda x, sigma: denoiser(x, sigma, **constants)


def output_of(made: Preconditioning, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The network's output that D is made of."""
    return made.target(denoised, x, sigma)


def solved(scheduler: EDMHeunScheduler, denoiser, x: Tensor, noise: Tensor | None, **run) -> Tensor:
    """What the pipeline's loop makes of x; `noise[i]` churns step i, or ends ancestral step i."""
    scheduler.set_timesteps(**run)
    if noise is not None and scheduler.config.eta == 0:
        x, noise = scheduler.add_fresh_noise(x, 0, noise=noise[0]), noise[1:]
    for i, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas)):
        scale = scheduler.signal_scale(sigma)
        output = output_of(scheduler.preconditioning, denoiser(x / scale, sigma), x / scale, sigma)
        step = i // scheduler.order
        drawn = noise[step] if noise is not None and step < len(noise) else None
        x = scheduler.step(output, t, x, noise=drawn).prev_sample
    return x


def scheduler_of(settings: dict[str, Any], **others: Any) -> EDMHeunScheduler:
    given = {RENAMED.get(key, key): value for key, value in settings.items()} | others
    levels = given.get("sigma_schedule", "edm")
    low, high = PRECONDITIONINGS[levels]().sampling_range
    given = {"sigma_min": low, "sigma_max": high} | given | {"sigma_schedule": LEVELS.get(levels, levels)}
    given["solver_order"] = {"euler": 1, "heun": 2}[given.get("solver", "heun")]
    known = inspect.signature(EDMHeunScheduler.__init__).parameters
    return EDMHeunScheduler(**{key: value for key, value in given.items() if key in known})


def iddpm_levels_in_float32(steps: int, config) -> Tensor:
    """The reference's noise levels, whose signal coefficients are float32."""
    made = IDDPMPreconditioning()
    time = torch.arange(made.num_train_timesteps + 1, dtype=torch.float32)
    signal = (0.5 * torch.pi * time / made.num_train_timesteps / (made.c_2 + 1)).sin() ** 2
    kept = (signal[:-1] / signal[1:]).clamp(min=made.c_1).double()
    levels = [torch.zeros((), dtype=torch.float64)]
    for ratio in kept.flip(0):
        levels.append(((levels[-1] ** 2 + 1) / ratio - 1).sqrt())
    table = torch.stack(levels[::-1])
    table = table[(table >= config.sigma_min) & (table <= config.sigma_max)]
    return table[(torch.linspace(0, 1, steps, dtype=torch.float64) * (len(table) - 1)).round().long()]


def replay_sampler(case: Case) -> None:
    settings, noise, latents = case.settings, case["noise"], case["latents"]
    steps, scheduler = settings["num_steps"], scheduler_of(settings)
    scheduler.set_timesteps(steps)
    if "t_steps" in case.arrays:
        config = scheduler.config
        levels = noise_levels("karras", steps, config.sigma_min, config.sigma_max, config.rho)
        case.check("t_steps", torch.cat([levels, torch.zeros(1)]))
        case.check("gamma", scheduler.sigmas[:-1:2] / levels - 1)
    calm = scheduler_of(settings, s_churn=0.0)
    calm.set_timesteps(steps)
    x = latents * calm.init_noise_sigma
    sample = solved(scheduler, denoiser_of(settings), x, noise, num_inference_steps=steps)
    if scheduler.config.sigma_schedule == "iddpm":
        case.check("sample", sample, rtol=1e-4, atol=1e-5)
        levels = iddpm_levels_in_float32(steps, scheduler.config)
        sample = solved(scheduler, denoiser_of(settings), latents * levels[0], noise, sigmas=levels)
    case.check("sample", sample)
    if "sample_exact_ode" in case.arrays:
        case.check("sample_exact_ode", sample)
        m, variance, first = settings["m"], settings["s2"], calm.init_noise_sigma
        case.check("sample_exact_ode", m + (x - m) * (variance / (variance + first**2)) ** 0.5, rtol=1e-12, atol=1e-12)


# --- k-diffusion ----------------------------------------------------------------------------------

ANCESTRAL = {"eta": 1.0}
# The samplers of k-diffusion that are settings of our scheduler.
OURS = {
    "euler": {"solver_order": 1},
    "heun": {},
    "dpm_2": {"log_midpoint": True},
    "euler_churn": {"solver_order": 1},
    "heun_churn": {},
    "dpm_2_churn": {"log_midpoint": True},
    "euler_ancestral": {"solver_order": 1, **ANCESTRAL},
    "dpm_2_ancestral": {"log_midpoint": True, **ANCESTRAL},
}
# Those that diffusers' scheduler for EDM has, made from ours; it keeps its levels in float32.
STOCK = {
    "dpmpp_2m": {},
    "dpmpp_2m_sde_midpoint": {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint"},
    "dpmpp_2m_sde_heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
}


def replay_kdiffusion(case: Case) -> None:
    if case.record.name == "schedules":
        return replay_schedules(case)
    if case.record.name.startswith("denoiser"):
        return replay_denoiser(case)
    if case.record.name == "common":
        settings = case.settings
        levels = noise_levels("karras", settings["n"], settings["sigma_min"], settings["sigma_max"])
        case.check("sigmas", torch.cat([levels, torch.zeros(1)]))
        return case.check("x", case["x"])
    common = next(record for record in records(case.record.folder) if record.name == "common")
    sampler, denoiser, common = case.settings["sampler"], denoiser_of(common.settings), Case(common)
    noise = case["noise"] if "noise" in case.arrays else None
    bounds = {"sigma_min": common.settings["sigma_min"], "sigma_max": common.settings["sigma_max"]}
    if sampler in OURS:
        scheduler = EDMHeunScheduler(**bounds, **OURS[sampler] | churn_of(case.settings))
        case.check("sample", solved(scheduler, denoiser, common["x"], noise, sigmas=common["sigmas"][:-1]))
    elif sampler in STOCK:
        ours = EDMHeunScheduler(**bounds)
        scheduler = EDMDPMSolverMultistepScheduler.from_config(ours.config, **STOCK[sampler])
        sample = solved_by_stock(scheduler, denoiser, common["x"], noise, len(common["sigmas"]) - 1)
        case.check("sample", sample, **case.tolerance("sample", torch.float32))
    elif sampler == "dpm_fast":
        settings = case.settings
        bounds = settings["sigma_min"], settings["sigma_max"], settings["n"]
        case.check("sample", dpm_fast(denoiser, common["x"], *bounds))
    else:
        levels = common["sigmas"]
        split = EDMHeunScheduler(eta=case.settings.get("eta", 1.0)).ancestral_sigmas
        case.check("sample", SOLVERS[sampler](denoiser, common["x"], levels, noise, split))


def churn_of(settings: dict[str, Any]) -> dict[str, float]:
    names = {"s_churn": "s_churn", "s_tmin": "s_min", "s_tmax": "s_max", "s_noise": "s_noise", "eta": "eta"}
    return {ours: settings[name] for name, ours in names.items() if name in settings}


def solved_by_stock(scheduler, denoiser, x: Tensor, noise: Tensor | None, steps: int) -> Tensor:
    """The same by a scheduler of diffusers, whose draws come from `noise`."""
    scheduler.set_timesteps(steps)
    draws = iter(() if noise is None else noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_edm_dpmsolver_multistep, "randn_tensor", lambda *_, **__: next(draws))
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            scheduler.scale_model_input(x, t)
            output = output_of(EDMPreconditioning(), denoiser(x, sigma), x, sigma)
            x = scheduler.step(output, t, x).prev_sample
    return x


def replay_schedules(case: Case) -> None:
    settings, zero = case.settings, torch.zeros(1, dtype=torch.float64)
    bounds = settings["n"], settings["sigma_min"], settings["sigma_max"]
    case.check("karras", torch.cat([noise_levels("karras", *bounds, settings["rho_karras"]), zero]))
    case.check("exponential", torch.cat([noise_levels("exponential", *bounds), zero]))
    case.check("polyexponential", torch.cat([noise_levels("polyexponential", *bounds, settings["rho_poly"]), zero]))
    first = settings["vp"]["eps_s"]
    time = VPTime(settings["vp"]["beta_d"], settings["vp"]["beta_min"])
    low, high = time.sigma(torch.tensor([first, 1.0], dtype=torch.float64)).tolist()
    case.check("vp", torch.cat([noise_levels("vp", settings["n"], low, high, first_time=first), zero]))
    for name in case.arrays:
        if name.startswith("ancestral_"):
            sigma, following = (torch.tensor(float(word), dtype=torch.float64) for word in name.split("_")[1:])
            down = EDMHeunScheduler(eta=0.7).ancestral_sigmas(sigma, following)
            case.check(name, torch.stack([down, (following**2 - down**2).sqrt()]))


def replay_denoiser(case: Case) -> None:
    settings, x_0, sigma = case.settings, case["input"], case["sigma"]
    made, network = EDMPreconditioning(settings["sigma_data"]), formula(settings["inner"])
    x = x_0 + along(sigma, x_0) * case["noise"]
    # its inner network is told sigma itself
    output = network(made.inputs(x, sigma)[0], along(sigma, x))
    case.check("denoised", made.denoised(output, x, sigma))
    weight = level_weight(WEIGHTS[settings["weighting"]], sigma, settings["sigma_data"])
    case.check("loss", weight * output_error(made, output, x_0, x, sigma))


WEIGHTS = {"karras": "edm", "snr": "snr", "soft-min-snr": "soft_min_snr"}
REPLAYS = {
    "precond": replay_preconditioning,
    "losses": replay_loss,
    "sampler": replay_sampler,
    "kdiffusion": replay_kdiffusion,
}

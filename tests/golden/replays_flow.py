"""Replays of flow matching: path, levels, JiT, Euler and Heun, diffusers' grids."""

import math
import re
from types import SimpleNamespace

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from hf_diffusion.losses.flow import FlowMatchingObjective, FlowMatchingOptions, levels, loss_weight
from hf_diffusion.pipelines.pipeline_flow_matching import FlowMatchingPipeline
from hf_diffusion.schedulers.scheduling_flow import (
    FlowMatchingScheduler,
    convert_prediction,
    resolution_shift,
    shift_sigmas,
)
from tests.golden.replay import Case, toy
from tests.losses.scripted import ScriptedDraw
from tests.schedulers.gaussian_flow import GaussianFlow, walk


def formula_of(case: Case, name: str, call: str):
    """A toy network of the manifest's conventions, whose text holds `call=formula`."""
    return toy(re.search(re.escape(call) + r"=(\S+)", case.manifest["conventions"][name])[1])


def toy_velocity(case: Case):
    network = formula_of(case, "velocity_network", "v(x,sigma)")
    return lambda x, sigma: network(x=x, sigma=sigma)


# --- path -----------------------------------------------------------------------------------------


def replay_path(case: Case) -> None:
    {"conversions": replay_conversions, "gaussian": replay_gaussian}[case.record.name](case)


def replay_conversions(case: Case) -> None:
    scheduler = FlowMatchingScheduler()
    x_0, noise, sigma = case["x0"], case["eps"], case["sigma"]
    t = sigma * len(scheduler)
    x = scheduler.add_noise(x_0, noise, t)
    case.check("x", x)

    def known(prediction: Tensor, source: str, target: str) -> Tensor:
        return convert_prediction(prediction, x, sigma, source, target)

    velocity = known(x_0, "sample", "velocity")
    case.check("v", velocity)
    case.check("v_from_x0", velocity)
    case.check("v_from_eps", known(noise, "epsilon", "velocity"))
    case.check("x0_from_v", known(velocity, "velocity", "sample"))
    predicted_noise = known(velocity, "velocity", "epsilon")
    case.check("eps_from_v", predicted_noise)
    torch.testing.assert_close(known(noise, "epsilon", "sample"), x_0)
    torch.testing.assert_close(known(x_0, "sample", "epsilon"), noise)
    # JiT's time runs from noise to data, and its velocity the other way
    case.check("t_jit", 1 - scheduler.sigma_of(t))
    case.check("v_jit", -velocity)
    case.check("score", -predicted_noise / sigma.view(-1, *[1] * (x.ndim - 1)))
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    signal, share = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
    case.check("alpha_bar_equivalent", signal**2 / (signal**2 + share**2))


def replay_gaussian(case: Case) -> None:
    flow = GaussianFlow(case.settings["mu"], case.settings["s2"])
    x, sigma = case["x"], case["sigma"]
    case.check("v", flow.velocity(x, sigma))
    for name in [name for name in case.arrays if name.startswith("x_at_")]:
        case.check(name, flow.follow(x, sigma, float(name.removeprefix("x_at_"))))
    # the solver of the package goes the same way
    ends = []
    for row, start in zip(x, sigma.tolist()):
        scheduler = FlowMatchingScheduler(solver="heun", final_euler_step=False)
        scheduler.set_timesteps(sigmas=torch.linspace(start, 0, 401, dtype=torch.float64)[:-1])
        ends.append(walk(scheduler, flow.velocity, row[None]))
    case.check("x_at_0", torch.cat(ends), rtol=1e-4, atol=1e-5)


# --- levels ---------------------------------------------------------------------------------------


def replay_times(case: Case) -> None:
    kind = re.match("[a-z]+", case.record.name)[0]
    known = {"density": replay_density, "weighting": replay_weighting, "shift": replay_shift, "dynamic": replay_mu}
    known[kind](case)


def replay_density(case: Case) -> None:
    s = case.settings
    options = FlowMatchingOptions(
        level_distribution="logit_normal", logit_mean=s["logit_mean"], logit_std=s["logit_std"]
    )
    u = torch.special.ndtr(case["z"])
    for suffix in ("", "_float64"):
        case.check(f"logit_normal{suffix}", levels(u, options))
        # the reference's falls with u
        middle = FlowMatchingOptions(level_distribution="mode", mode_scale=s["mode_scale"])
        case.check(f"mode{suffix}", 1 - levels(case["u"], middle))


def replay_weighting(case: Case) -> None:
    sigma = case["sigma"]
    for name in [name for name in case.arrays if name != "sigma"]:
        case.check(name, loss_weight(sigma, "uniform" if name == "none" else name))


def replay_shift(case: Case) -> None:
    shift, sigma = case.settings["shift"], case["sigma"]
    shifted = shift_sigmas(sigma, shift)
    case.check("sigma_shifted", shifted)
    case.check("inverse", shift_sigmas(shifted, 1 / shift))
    case.check("t", 1 - sigma)
    case.check("t_shifted", 1 - shift_sigmas(1 - case["t"], shift))


def replay_mu(case: Case) -> None:
    s = case.settings
    shift = resolution_shift(s["image_seq_len"], s["base_shift"], s["max_shift"], s["base_seq"], s["max_seq"])
    case.check("mu", torch.tensor(math.log(shift), dtype=torch.float64))
    case.check("sigma_shifted", shift_sigmas(case["sigma"], shift))


# --- JiT ------------------------------------------------------------------------------------------


class JiTNetwork(ModelMixin, ConfigMixin):
    """The toy network of a case with the call of ours; `scale` multiplies it."""

    @register_to_config
    def __init__(self, sample_size: tuple[int, int], in_channels: int, num_class_embeds: int, null_class: bool = True):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.formula, self.null_class_id, self.calls = None, num_class_embeds, []

    def forward(self, sample, timestep, class_labels, return_dict=True):
        t = (1 - timestep / 1000).expand(len(sample)).view(-1, 1, 1, 1)
        output = self.scale * self.formula(z=sample, t=t, y=class_labels.double().view(-1, 1, 1, 1))
        self.calls.append((sample, t.flatten(), class_labels, output))
        return SimpleNamespace(sample=output) if return_dict else (output,)


def jit_network(case: Case, x: Tensor) -> JiTNetwork:
    network = JiTNetwork(tuple(x.shape[2:]), x.shape[1], case.settings["num_classes"])
    network.formula = formula_of(case, "jit_network", "x(z,t,y)")
    return network


def replay_jit(case: Case) -> None:
    replay_jit_loss(case) if case.record.name == "loss" else replay_jit_sampler(case)


def replay_jit_loss(case: Case) -> None:
    s, x_0 = SimpleNamespace(**case.settings), case["x"]
    network = jit_network(case, x_0).train()
    options = FlowMatchingOptions(
        prediction_type="sample",
        sigma_floor=s.t_eps,
        level_distribution="logit_normal",
        # time runs the other way
        logit_mean=-s.P_mean,
        logit_std=s.P_std,
        label_dropout=s.drop,
        noise_scale=s.noise_scale,
    )
    objective = FlowMatchingObjective(FlowMatchingScheduler(), network, options, 1e-4)
    assert network.null_class_id == s.null_label
    draw = ScriptedDraw([torch.special.ndtr(-case["z_t_draw"])], [case["noise"]], [case["u_drop"]])
    values = objective.values(network, {"x_0": x_0, "labels": case["y"]}, draw)
    draw.assert_empty()
    ((z, t, labels, x_pred),) = network.calls
    case.check("z", z)
    case.check("t", t)
    case.check("y_used", labels)
    case.check("x_pred", x_pred)
    kinds = 1 - t, "sample", "velocity", s.t_eps
    # JiT's velocity leads from noise to data
    case.check("v_target", -convert_prediction(x_0, z, *kinds))
    case.check("v_pred", -convert_prediction(x_pred, z, *kinds))
    case.check("loss_per_example", values["loss"])
    case.check("loss", values["loss"].mean())
    (gradient,) = torch.autograd.grad(values["loss"].mean(), network.scale)
    case.check("grad_scale", gradient)


def replay_jit_sampler(case: Case) -> None:
    s, latents = SimpleNamespace(**case.settings), case["latents"]
    pipe = FlowMatchingPipeline(
        jit_network(case, latents),
        FlowMatchingScheduler(),
        prediction_type="sample",
        sigma_floor=s.t_eps,
        noise_scale=s.noise_scale,
    )
    pipe.set_progress_bar_config(disable=True)
    low, high = s.interval
    samples = pipe(
        case["y"],
        latents=latents,
        num_inference_steps=s.steps,
        solver=s.method,
        guidance_scale=s.cfg,
        guidance_interval=(1 - high, 1 - low),
        output_type="latent",
    ).images
    case.check("t_grid", 1 - pipe.scheduler.sigmas)
    case.check("sample", samples)


# --- solvers --------------------------------------------------------------------------------------


def gaussian_of(case: Case) -> GaussianFlow:
    """The Gaussian that an array's meaning states, or that of the file `path` in a small set."""
    cases = case.record.entry["cases"]
    keys = cases[case.record.name].get("keys", {})
    meaning = keys.get(f"{case.record.name}/gaussian_exact", {}).get("meaning", "")
    stated = {name: float(value) for name, value in re.findall(r"(mu|s2)=([\d.]+)", meaning)}
    if not stated:
        files = case.manifest["files"].items()
        stated = next(entry["cases"]["gaussian"]["settings"] for file, entry in files if file.startswith("path."))
    return GaussianFlow(**stated)


def replay_samplers(case: Case) -> None:
    steps, shift, latents = case.settings["steps"], case.settings["shift"], case["latents"]
    flow = gaussian_of(case)

    def end(velocity, **options) -> Tensor:
        scheduler = FlowMatchingScheduler(shift=shift, **options)
        scheduler.set_timesteps(steps)
        case.check("sigmas", scheduler.sigmas)
        return walk(scheduler, velocity, latents)

    whole = {"solver": "heun", "final_euler_step": False}
    case.check("euler", end(toy_velocity(case), solver="euler"))
    case.check("heun", end(toy_velocity(case), **whole))
    case.check("heun_last_euler", end(toy_velocity(case), solver="heun"))
    case.check("gaussian_exact", flow.follow(latents, 1.0, 0.0))
    case.check("gaussian_euler", end(flow.velocity, solver="euler"))
    case.check("gaussian_heun", end(flow.velocity, **whole))


# --- diffusers ------------------------------------------------------------------------------------


def stock_levels(steps: int, shift: float, num_train_timesteps: int) -> Tensor:
    """What diffusers' schedulers shift: even levels between the ends of a shifted table."""
    ends = shift_sigmas(torch.tensor([1, 1 / num_train_timesteps], dtype=torch.float64), shift)
    return torch.linspace(*ends.tolist(), steps, dtype=torch.float64)


def replay_diffusers(case: Case) -> None:
    kind = re.match("(euler|heun|[a-z_]+)", case.record.name)[1]
    known = {"euler": replay_stock_run, "heun": replay_stock_run, "custom_sigmas": replay_own_levels}
    known |= {"dynamic": replay_dynamic, "scale_noise": replay_scale_noise}
    known[kind](case)


def replay_stock_run(case: Case) -> None:
    s, solver = SimpleNamespace(**case.settings), re.match("[a-z]+", case.record.name)[0]
    scheduler = FlowMatchingScheduler(s.num_train_timesteps, shift=s.shift, solver=solver)
    scheduler.set_timesteps(sigmas=stock_levels(s.steps, s.shift, s.num_train_timesteps))
    case.check("timesteps", scheduler.timesteps)
    for name in [name for name in case.arrays if name in ("sigmas", "sigmas_float64", "grid")]:
        case.check(name, scheduler.sigmas)
    velocity, x = toy_velocity(case), case["latents"]
    if "first_step" in case.arrays:
        first = scheduler.step(velocity(x, scheduler.sigmas[0]), scheduler.timesteps[0], x).prev_sample
        case.check("first_step", first)
        scheduler.set_begin_index(0)
    sample = walk(scheduler, velocity, x)
    case.check("sample", sample)
    case.check("sample_float64", sample)


def replay_own_levels(case: Case) -> None:
    scheduler = FlowMatchingScheduler(case.settings["num_train_timesteps"], shift=case.settings["shift"])
    scheduler.set_timesteps(sigmas=case.settings["sigmas"])
    case.check("sigmas", scheduler.sigmas)
    case.check("timesteps", scheduler.timesteps)


def replay_dynamic(case: Case) -> None:
    scheduler = FlowMatchingScheduler(case.settings["num_train_timesteps"], shift=math.exp(case.settings["mu"]))
    scheduler.set_timesteps(case.settings["steps"])
    case.check("sigmas", scheduler.sigmas)
    case.check("timesteps", scheduler.timesteps)


def replay_scale_noise(case: Case) -> None:
    scheduler = FlowMatchingScheduler(case.settings["num_train_timesteps"], shift=case.settings["shift"])
    # as constructed, one step a timestep of the training
    t = scheduler.timesteps[case["index"]]
    case.check("timesteps", t)
    case.check("sigma", scheduler.sigma_of(t))
    case.check("x", scheduler.add_noise(case["x0"], case["noise"], t))


REPLAYS = {
    "path": replay_path,
    "times": replay_times,
    "jit": replay_jit,
    "samplers": replay_samplers,
    "diffusers": replay_diffusers,
}

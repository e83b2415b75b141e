"""Replays of the vectors of easy consistency tuning and of MeanFlow."""

import torch
from torch import Tensor

from hf_diffusion.losses import consistency as losses
from hf_diffusion.losses import mean_flow
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler
from tests.golden.replay import Case


def network(x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
    """The manifest's F(x_in, c_noise), called as our networks are, with 1,000 c_noise."""
    c_noise = (timestep / 1000).reshape(-1, *(1,) * (x.ndim - 1))
    return (0.8 * torch.tanh(1.1 * x) + 0.25 * x * torch.sin(c_noise / 3),)


def denoiser(sigma_data: float, sigma_min: float = 0.0):
    """D(x, sigma) in the form of training, or, with sigma_min, in that of sampling."""
    scheduler = ConsistencyScheduler(sigma_data=sigma_data, sigma_min=sigma_min, clip_denoised=False)
    return lambda x, sigma: scheduler.denoise(network, x, sigma)


# --- consistency tuning ---------------------------------------------------------------------------


def precond(case: Case) -> None:
    settings, sigma, x = case.settings, case["sigma"], case["x"]
    shift = settings["sigma_min"] if settings["mode"] == "eval" else 0.0
    scheduler = ConsistencyScheduler(sigma_data=settings["sigma_data"], sigma_min=settings["sigma_min"])
    for name, values in zip(("c_in", "c_skip", "c_out"), scheduler.scalings(sigma, shift)):
        case.check(name, values)
    case.check("D_float64", scheduler.denoise(network, x, sigma, shift))
    case.check("D", scheduler.denoise(network, x.float(), sigma, shift), torch.float32)


def mapping(case: Case) -> None:
    settings = case.settings
    numbers = {name: settings[name] for name in ("q", "k", "b", "mapping")}
    rows = [losses.tuning_partner(case["t"], stage, **numbers) for stage in settings["stages"]]
    case.check("r", torch.stack(rows))


def tuning_loss(case: Case) -> None:
    s, y, eps, z, seen = case.settings, case["images"], case["eps"], case["z"].flatten(), {}
    t = losses.lognormal_levels(torch.special.ndtr(z), s["P_mean"], s["P_std"])
    case.check("t", t)
    r = losses.tuning_partner(t, s["stage"], s["q"], s.get("k", 8.0), s.get("b", 1.0), s["adj"])
    case.check("r", r)
    bare = denoiser(s["sigma_data"])

    def watched(name: str):
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            seen[name] = bare(x, sigma)
            return seen[name]

        return denoise

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen["D_r"] = b
        return losses.pseudo_huber(a, b, s["c"])

    case.check("loss", losses.tuning_loss(watched("D_t"), bare, y, eps, t, r, distance))
    case.check("D_t", seen["D_t"])
    case.check("D_r", seen["D_r"])


def sampling(case: Case) -> None:
    """Our multistep sampler with sigma_min 0, which adds noise of the level itself."""
    settings, noise = case.settings, case["noise"]
    scheduler = ConsistencyScheduler(
        sigma_min=0.0, sigma_max=settings["t_max"], sigma_data=settings["sigma_data"], clip_denoised=False
    )
    scheduler.set_timesteps(sigmas=[settings["t_max"], *settings["mid_t"]])
    x = scheduler.init_noise_sigma * case["latents"]
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t)[0]
        x = scheduler.step(output, t, x, noise=noise[i] if i < len(noise) else torch.zeros_like(x)).prev_sample
    case.check("sample", x)


# --- MeanFlow -------------------------------------------------------------------------------------


def column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def velocity_of(labels: Tensor | None = None):
    """The manifest's toy u(z, r, t), with labels or without."""

    def velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        r, t = column(r, z), column(t, z)
        u = 0.8 * torch.tanh(1.1 * z + 0.3 * r) + 0.25 * z * torch.cos(2 * t) + 0.2 * r * t
        return u if labels is None else u + 0.3 * torch.sin(1.0 + column(labels.double(), z)) * z

    return velocity


def mean_flow_case(case: Case) -> None:
    name = case.record.name
    kinds = {"identity": identity, "times": times, "loss": mean_flow_loss, "sample": mean_flow_sample}
    kinds[name.split("_")[0]](case)


def identity(case: Case) -> None:
    """Our target of the exact average velocity is that velocity itself."""
    mu, s2, z, r, t = case.settings["mu"], case.settings["s2"], case["z"], case["r"], case["t"]
    variance = lambda t: (1 - t) ** 2 * s2 + t**2  # noqa: E731

    def marginal(z: Tensor, t: Tensor) -> Tensor:
        return -mu + (t - (1 - t) * s2) / variance(t) * (z - (1 - t) * mu)

    def average(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        r, t = column(r, z), column(t, z)
        reached = (1 - r) * mu + (variance(r) / variance(t)).sqrt() * (z - (1 - t) * mu)
        # the limit at r = t keeps the derivative finite
        return torch.where(r == t, marginal(z, t), (z - reached) / torch.where(r == t, 1.0, t - r))

    v = marginal(z, column(t, z))
    case.check("v", v)
    u = average(z, r, t)
    case.check("u", u)
    target, derivative = mean_flow.mean_flow_target(average, z, r, t, v)
    apart = r != t
    torch.testing.assert_close(target[apart], u[apart], rtol=1e-9, atol=1e-10)
    expected = case["dudt_total"]
    torch.testing.assert_close(derivative[apart], expected[apart], rtol=1e-8, atol=1e-10)
    still, one = torch.zeros_like(z), torch.ones_like(t)
    for key, tangents in {"du_dz": (torch.ones_like(z), 0 * t, 0 * t), "du_dt": (still, 0 * t, one)}.items():
        found = torch.func.jvp(average, (z, r, t), tangents)[1]
        torch.testing.assert_close(found[apart], case[key][apart], rtol=1e-8, atol=1e-10)
    case.check("z_r", z - column(t - r, z) * u)


def times(case: Case) -> None:
    settings, draws = case.settings, case["draws"]
    if settings["time_sampler"] == "logit_normal":
        draws = torch.sigmoid(settings["mu"] + settings["sigma"] * draws)
    r, t = mean_flow.mean_flow_times(draws, case["u_equal"], settings["ratio_r_not_equal_t"])
    case.check("r", r)
    case.check("t", t)


def mean_flow_loss(case: Case) -> None:
    s, x, noise = case.settings, case["images"], case["noise"]
    draws = torch.sigmoid(s["mu"] + s["sigma"] * case["time_normals"])
    r, t = mean_flow.mean_flow_times(draws, case["u_equal"], s["ratio_r_not_equal_t"])
    case.check("r", r)
    case.check("t", t)
    path = {"linear": mean_flow.straight_path, "cosine": mean_flow.cosine_path}[s["path_type"]]
    z, v = path(x, noise, t)
    case.check("z_t", z)
    velocity = velocity_of()
    if "cfg_omega" in s:
        null = 3
        used = torch.where(case["u_drop"] < 0.4, null, case["y"])
        case.check("y_used", used)
        velocity = velocity_of(used)
        is_guided = (t >= s["cfg_min_t"]) & (t <= s["cfg_max_t"]) & (used != null)
        uncond = velocity_of(torch.full_like(used, null))
        v = mean_flow.guided_velocity(v, velocity(z, t, t), uncond(z, t, t), s["cfg_omega"], s["cfg_kappa"], is_guided)
    case.check("v", v)
    case.check("u", velocity(z, r, t))
    target, derivative = mean_flow.mean_flow_target(velocity, z, r, t, v)
    case.check("dudt", derivative)
    case.check("u_target", target)
    plain = mean_flow.mean_flow_loss(velocity, z, r, t, v, power=0)
    case.check("squared_error", plain)
    power = s.get("adaptive_p", 1.0)
    case.check("loss_paper", mean_flow.mean_flow_loss(velocity, z, r, t, v, power=power))
    # That code weighs the square of s, and differently from the paper; we follow the paper.
    case.check("loss", plain**2 / (plain**2 + 1e-3) ** power if s["weighting"] == "adaptive" else plain)


def mean_flow_sample(case: Case) -> None:
    settings, labels = case.settings, case["y"]
    cond, scale = velocity_of(labels), settings["cfg_scale"]
    uncond = velocity_of(torch.full_like(labels, settings["unconditional_label"]))

    def velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return uncond(z, r, t) + scale * (cond(z, r, t) - uncond(z, r, t))

    case.check("sample", mean_flow.mean_flow_sample(velocity, case["latents"], settings["num_steps"]))


REPLAYS = {
    "precond": precond,
    "mapping": mapping,
    "losses": tuning_loss,
    "sampling": sampling,
    "meanflow": mean_flow_case,
}

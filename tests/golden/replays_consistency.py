"""Replays of the vectors of consistency models: levels, scalings, curricula, losses, samplers, the
Gaussian case.
"""

import torch
from torch import Tensor

from hf_diffusion.losses import consistency as losses
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler, karras_sigmas
from tests.golden.replay import Case


LEVELS = ("sigma_min", "sigma_max", "rho", "sigma_data")


def scheduler_of(settings: dict, **options) -> ConsistencyScheduler:
    return ConsistencyScheduler(**{name: settings[name] for name in LEVELS}, **options)


def network_of(settings: dict, role: str):
    """The toy network of a role, called as networks are."""
    a, b, c, d = settings["networks"][role]

    def network(x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        t = t.reshape(-1, *(1,) * (x.ndim - 1))
        return (a * torch.tanh(b * x) + c * x * torch.cos(t / d),)

    return network


def denoiser(settings: dict, role: str, shift: float | None = None):
    """f(x, sigma) of a role; with shift 0 its denoiser in the form of EDM."""
    scheduler, network = scheduler_of(settings), network_of(settings, role)
    return lambda x, sigma: scheduler.denoise(network, x, sigma, shift)


# --- schedule.npz ---------------------------------------------------------------------------------


def schedule(case: Case) -> None:
    settings = case.settings
    if "n" in settings:
        sigmas = karras_sigmas(settings["n"], settings["sigma_min"], settings["sigma_max"], settings["rho"])
        case.check("sigmas", torch.cat([sigmas, sigmas.new_zeros(1)]))
    elif "scale_mode" in settings:
        curriculum(case)
    else:
        sigma, scheduler = case["sigma"], scheduler_of(settings)
        for kind, shift in (("edm", 0.0), ("cm", None)):
            for name, values in zip(("c_in", "c_skip", "c_out"), scheduler.scalings(sigma, shift)):
                case.check(f"{kind}_{name}", values)
        case.check("t_in", scheduler.network_timestep(sigma))
        for name in case.named("weight_"):
            case.check(f"weight_{name}", losses.loss_weight(name, sigma, settings["sigma_data"]))


def curriculum(case: Case) -> None:
    s = case.settings
    first, last, ema = s["start_scales"], s["end_scales"], s["start_ema"]
    counts, decays = [], []
    for step in case["steps"].tolist():
        count, decay = first, ema
        if s["scale_mode"] == "progressive":
            count = losses.growing_levels(step, s["total_steps"], first, last) + 1
            if s["target_ema_mode"] == "adaptive":
                decay = losses.growing_target_ema(count - 1, first, ema)
        elif s["scale_mode"] == "progdist":
            # the student of progressive distillation replaces its teacher as a whole
            count, decay = losses.halving_levels(step, s["distill_steps_per_iter"], first), 1.0
        counts.append(count)
        decays.append(decay)
    case.check("num_scales", torch.tensor(counts))
    case.check("target_ema", torch.tensor(decays, dtype=torch.float64))


# --- denoise.npz, losses.npz ----------------------------------------------------------------------


def denoise(case: Case) -> None:
    x, sigma, settings = case["x"], case["sigma"], case.settings
    shift = None if case.record.name == "boundary" else 0.0
    scheduler, network = scheduler_of(settings), network_of(settings, settings["role"])
    c_in, _, _ = scheduler.scalings(sigma, shift)
    output = network(c_in.reshape(-1, 1, 1, 1) * x, scheduler.network_timestep(sigma))[0]
    case.check("model_output", output)
    case.check("denoised", scheduler.denoise(network, x, sigma, shift))


def one_loss(case: Case) -> None:
    settings, x_0, noise = case.settings, case["x_start"], case["noise"]
    weight = lambda sigma: losses.loss_weight(settings["weight_schedule"], sigma, settings["sigma_data"])  # noqa: E731
    if "role" in settings:
        sigma = case["sigmas"]
        x = scheduler_of(settings).add_noise(x_0, noise, sigma)
        error = losses.l2(denoiser(settings, settings["role"], 0.0)(x, sigma), x_0)
        case.check("xs_mse", error)
        case.check("loss", error * weight(sigma))
    elif "mode" in settings:
        neighbouring_levels(case, x_0, noise, weight)
    else:
        n, indices = settings["num_scales"], case["indices"].double()
        rho, high, low = settings["rho"], settings["sigma_max"], settings["sigma_min"]
        root = high ** (1 / rho), low ** (1 / rho)
        levels = tuple((root[0] + (indices + s) / n * (root[1] - root[0])) ** rho for s in (0.0, 0.5, 1.0))
        student, teacher = denoiser(settings, "student", 0.0), denoiser(settings, "teacher", 0.0)
        loss = losses.progressive_distillation_loss(student, teacher, x_0, noise, levels)
        case.check("loss", loss * weight(levels[0]))


def neighbouring_levels(case: Case, x_0: Tensor, noise: Tensor, weight) -> None:
    settings, indices, seen = case.settings, case["indices"].double(), {}
    scheduler = scheduler_of(settings)
    grid = scheduler.grid(settings["num_scales"])
    # the level that a batch's u means, in the middle of its interval
    pairs = len(grid) - 1
    t, t2 = losses.neighbours((pairs - 1 - indices + 0.5) / pairs, grid)
    case.check("t", t)
    case.check("t2", t2)

    def watched(name: str, input_name: str):
        function = denoiser(settings, name)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            seen[input_name], seen[name] = x, function(x, sigma)
            return seen[name]

        return denoise

    teacher = denoiser(settings, "teacher", 0.0) if "distillation" in settings["mode"] else None
    distance = {"l1": losses.l1, "l2": losses.l2}[settings["loss_norm"]]
    student, target = watched("student", "x_t"), watched("target", "x_t2")
    loss = losses.consistency_loss(student, target, x_0, noise, t, t2, distance, teacher)
    case.check("loss", loss * weight(t))
    for name, value in seen.items():
        case.check(name, value)


# --- samplers.npz ---------------------------------------------------------------------------------


def sampler(case: Case) -> None:
    """`multistep` is our scheduler; the others are loops over the solvers that distillation has."""
    settings, noise = case.settings, case["noise"]
    x = settings["sigma_max"] * case["x_T_unit"]
    if settings["sampler"] in ("onestep", "multistep"):
        sample = through_the_scheduler(settings, x, noise)
    else:
        sample = by_an_ode_solver(settings, x, noise)
    case.check("sample_unclamped", sample)
    low, high = settings["final_clamp"]
    case.check("sample", sample.clamp(low, high))


def through_the_scheduler(settings: dict, x: Tensor, noise: Tensor) -> Tensor:
    clip = settings["clip_denoised"]
    scheduler = scheduler_of(settings, num_train_timesteps=settings["steps"], clip_denoised=clip)
    network = network_of(settings, settings["role"])
    scheduler.set_timesteps(timesteps=settings.get("ts", [0, -1])[-2::-1])
    assert scheduler.init_noise_sigma == settings["sigma_max"]
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t)[0]
        x, _ = scheduler.step(output, t, x, noise=noise[i] if len(noise) else None, return_dict=False)
    return x


def by_an_ode_solver(settings: dict, x: Tensor, noise: Tensor) -> Tensor:
    kind = settings["sampler"]
    bare = denoiser(settings, settings["role"], 0.0)
    model = (lambda x, sigma: bare(x, sigma).clamp(-1, 1)) if settings["clip_denoised"] else bare
    steps = settings["steps"] + (kind == "progdist")
    sigmas = [*karras_sigmas(steps, *(settings[n] for n in LEVELS[:3])).tolist(), 0.0]
    sigmas = sigmas[:-1] if kind == "progdist" else sigmas
    solver = {"heun": "heun", "dpm": "midpoint"}.get(kind, "euler")
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        added = 0.0
        if settings.get("s_churn") and settings["s_tmin"] <= sigma <= settings["s_tmax"]:
            higher = sigma * (1 + min(settings["s_churn"] / (len(sigmas) - 1), 2**0.5 - 1))
            x = x + noise[i] * settings["s_noise"] * (higher**2 - sigma**2) ** 0.5
            sigma = higher
        if kind == "ancestral":
            added = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
            following = (following**2 - added**2) ** 0.5
        t, r = (x.new_full((len(x),), level) for level in (sigma, following))
        x = losses.ode_step(model, x, t, r, solver)
        x = x + added * noise[i] if added else x
    return x


# --- gaussian_closed_form.npz ---------------------------------------------------------------------


def gaussian(case: Case) -> None:
    """The network that is exact for N(m, s2) gives the closed forms; small steps of the solver
    follow its flow.
    """
    settings, t, x = case.settings, case["t"], case["x"]
    m, s2, eps = settings["m"], settings["s2"], settings["eps"]
    scheduler = scheduler_of(settings)

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        return m + s2 / (s2 + sigma**2) * (x - m)

    case.check("denoiser", exact(x, t))
    _, c_skip, c_out = scheduler.scalings(t)
    consistency = m + (x - m) * ((s2 + eps**2) / (s2 + t**2)).sqrt()
    target = torch.where(t > eps, (consistency - c_skip * x) / c_out, 0.0)
    case.check("network_target", target)
    network = lambda x, t, return_dict: (target[:, None],)  # noqa: E731
    case.check("consistency", scheduler.denoise(network, x[:, None], t)[:, 0])
    x, t = x[1:], t[1:]
    levels = [t + (case["t_next"] - t) * i / 3000 for i in range(3001)]
    for start, end in zip(levels, levels[1:]):
        x = losses.ode_step(exact, x, start, end)
    case.check("flow", x)


REPLAYS = {
    "schedule": schedule,
    "denoise": denoise,
    "losses": one_loss,
    "samplers": sampler,
    "gaussian_closed_form": gaussian,
}

"""Replays of score SDEs (yang-song/score_sde_pytorch) and of NCSN (ermongroup/ncsnv2)."""

import torch
from torch import Tensor

from hf_diffusion.evaluation.ode_likelihood import Flow, bits_per_dimension, flow_log_likelihood
from hf_diffusion.losses.score import denoising_loss
from hf_diffusion.schedulers.scheduling_score import (
    SDE,
    VESDE,
    VPSDE,
    AnnealedLangevinScheduler,
    ScoreScheduler,
    ScoreSdeSubVPScheduler,
    ScoreSdeVEScheduler,
    ScoreSdeVPScheduler,
    SubVPSDE,
    over,
)
from tests.golden.replay import Case, toy


SDES = {"ve": VESDE, "vp": VPSDE, "subvp": SubVPSDE}
SCHEDULERS = {"ve": ScoreSdeVEScheduler, "vp": ScoreSdeVPScheduler, "subvp": ScoreSdeSubVPScheduler}
# As the settings call them, and as we do.
PREDICTORS = {"euler_maruyama": "euler_maruyama", "reverse_diffusion": "reverse_diffusion", "none": "none"}
PREDICTORS |= {"ancestral_sampling": "ancestral"}
CORRECTORS = {"langevin": "langevin", "ald": "annealed", "none": "none"}
# The network's own form in the reference: (continuous, discrete) of each equation.
FORMS = {
    "ve": [{"prediction_type": "score", "conditioning": name, "scale_input": False} for name in ("sigma", "index")],
    "vp": [{"conditioning": name} for name in ("time", "index")],
    "subvp": [{"conditioning": "time"}],
}


def parameters(settings: dict) -> dict:
    return {name: settings[name] for name in ("sigma_min", "sigma_max", "beta_min", "beta_max") if name in settings}


def sde_of(settings: dict) -> SDE:
    return SDES[settings["sde"]](settings["N"], **parameters(settings))


def scheduler_of(settings: dict, **options) -> ScoreScheduler:
    return SCHEDULERS[settings["sde"]](settings["N"], **parameters(settings), **options)


def gaussian_score(sde: SDE, settings: dict):
    """The exact score of data N(m, s2 I)."""
    mean, variance = settings["data"]["m"], settings["data"]["s2"]

    def score(x: Tensor, t: Tensor) -> Tensor:
        scale, std = (over(value, x) for value in sde.scale_and_std(t))
        return -(x - scale * mean) / (scale**2 * variance + std**2)

    return score


def toy_network(case: Case):
    formula = case.settings["model"].split("=", 1)[1]
    return lambda x, labels: toy(formula)(x=x, labels=over(labels.double(), x))


def replay_sde(case: Case) -> None:
    sde, x, t = sde_of(case.settings), case["x"], case["t"]
    score = gaussian_score(sde, case.settings)(x, t)
    case.check("timestep_index", sde.index(t), None)
    for name, value in zip(("marginal_mean", "marginal_std"), sde.marginal_prob(x, t)):
        case.check(name, value)
    case.check("drift", sde.drift(x, t))
    case.check("diffusion", sde.diffusion(t))
    for name, value in zip(("discretize_f", "discretize_G"), sde.discretize(x, t)):
        case.check(name, value)
    case.check("prior_logp", sde.prior_logp(x))
    case.check("score", score)
    case.check("reverse_drift", sde.reverse_drift(x, t, score))
    case.check("reverse_diffusion", sde.diffusion(t))
    for name, value in zip(("reverse_discretize_f", "reverse_discretize_G"), sde.reverse_discretize(x, t, score)):
        case.check(name, value)
    case.check("ode_drift", sde.reverse_drift(x, t, score, probability_flow=True))
    for name, value in zip(("ode_discretize_f", "ode_discretize_G"), sde.reverse_discretize(x, t, score, None, True)):
        if case.expects(name):
            case.check(name, value)
    tables = {"discrete_sigmas": "discrete_sigmas", "discrete_betas": "discrete_betas", "alphas_cumprod": "alpha_bar"}
    for name, ours in tables.items():
        if case.expects(name):
            table = getattr(sde, ours)()
            case.check(name, table[:: max(1, len(table) // 50)])


def replay_predictor_corrector(case: Case) -> None:
    sde, x, t, z = sde_of(case.settings), case["x"], case["t"], case["z"]
    score_of = gaussian_score(sde, case.settings)
    score = score_of(x, t)
    for theirs, ours in PREDICTORS.items():
        if case.expects(f"{theirs}_x"):
            moved, mean = getattr(sde, ours)(x, t, score, z)
            # the reference rounds the next lower level of VE to float32, which a difference shows
            rounded = case.settings["sde"] == "ve" and ours != "euler_maruyama"
            allowed = {"rtol": 1e-5, "atol": 1e-6} if rounded else {}
            case.check(f"{theirs}_x", moved, **allowed)
            case.check(f"{theirs}_mean", mean, **allowed)
    case.check("reverse_diffusion_ode_x", sde.reverse_diffusion(x, t, score, z, probability_flow=True)[0])
    noise, snr = case["corrector_z"], case.settings["snr"]
    assert len(noise) == case.settings["langevin_n_steps"]
    for theirs, options in (("langevin", {"per_sample": False}), ("ald", {})):
        moved = mean = x
        for drawn in noise:
            update = getattr(sde, CORRECTORS[theirs])
            moved, mean = update(moved, t, score_of(moved, t), drawn, snr, **options)
        case.check(f"{theirs}_x", moved)
        case.check(f"{theirs}_mean", mean)


def replay_score_fn(case: Case) -> None:
    x, t, network = case["x"], case["t"], toy_network(case)
    for name, form in zip(("continuous", "discrete"), FORMS[case.settings["sde"]]):
        if not case.expects(f"score_{name}"):
            continue
        scheduler = scheduler_of(case.settings, **form)
        labels = scheduler.network_time(t)
        # a network is told in float32
        case.check(f"labels_{name}", labels.double(), rtol=1e-6)
        score = scheduler.to_score(network(scheduler.scale_model_input(x, t), labels), t)
        case.check(f"score_{name}", score, rtol=1e-5, atol=1e-6)


def replay_samplers(case: Case) -> None:
    settings = case.settings
    scheduler = scheduler_of(settings, sampling_eps=settings["eps"])
    score = gaussian_score(scheduler.sde, settings)
    if "method" in settings:
        assert settings["method"] == "RK45"

        def velocity(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return scheduler.velocity(score(x, t), t, x)

        sample, _ = scheduler.solve_flow(velocity, case["latent"], rtol=settings["rtol"], atol=settings["atol"])
        case.check("sample", sample)
        case.check("sample_exact", sample)
        return
    scheduler.set_timesteps(settings["N"])
    case.check("timesteps", scheduler.timesteps)
    case.check("timestep_index", scheduler.chain_index(scheduler.timesteps), None)
    predictor, corrector = PREDICTORS[settings["predictor"]], CORRECTORS[settings["corrector"]]
    x = mean = case["prior_noise"] * scheduler.init_noise_sigma
    calls, corrections = 0, 0 if corrector == "none" else settings["n_steps_each"]
    for t, drawn in zip(scheduler.timesteps, case["noise"]):
        for noise in drawn[:corrections]:
            update, index = getattr(scheduler.sde, corrector), scheduler.chain_index(t)
            # the reference's norms are means over the batch
            x, mean = update(x, t, score(x, t), noise, settings["snr"], index, per_sample=False)
            calls += 1
        # the reference's mean after no predictor is the sample itself, with the corrector's noise
        x, mean = scheduler.step_pred(score(x, t), t, x, predictor=predictor, noise=drawn[-1], return_dict=False)
        calls += predictor != "none"
    case.check("sample", mean if settings["denoise"] else x)
    # the reference counts a call of predictor and of every correction, whether it is made or not
    assert int(case["nfe"]) == settings["N"] * (settings["n_steps_each"] + 1) >= calls


def replay_likelihood(case: Case) -> None:
    settings, sde, x, probe = case.settings, sde_of(case.settings), case["x"], case["rademacher"]
    score = gaussian_score(sde, settings)
    flow = Flow(
        lambda x, t, labels: sde.reverse_drift(x, t, score(x, t), probability_flow=True),
        settings["eps"],
        1.0,
        sde.prior_logp,
    )
    for given in (probe, None):
        found = flow_log_likelihood(flow, x, given, rtol=settings["rtol"], atol=settings["atol"])
        for name in ("z", "z_exact"):
            case.check(name, found.latents)
        for name in ("logp_exact", "logp_data"):
            case.check(name, found.log_prob)
        case.check("prior_logp_exact", sde.prior_logp(found.latents))
        change = found.log_prob - sde.prior_logp(found.latents)
        case.check("delta_logp_exact", change.mean())
        assert float(change.std()) < 1e-3
        # the reference's data are k / 128 - 1 and k / 256
        for name, width in (("bpd_centered", 2 / 256), ("bpd_unit", 1 / 256)):
            for source in (name, f"{name}_exact"):
                case.check(source, bits_per_dimension(found.log_prob, x[0].numel(), width), rtol=0.0, atol=2e-3)
    assert bool((found.calls <= 2 * int(case["nfe"])).all())


def replay_losses(case: Case) -> None:
    settings, x, u, z, network = case.settings, case["x"], case["u"], case["z"], toy_network(case)
    forms = FORMS[settings["sde"]]
    scheduler = scheduler_of(settings, **forms[0])
    t = u * (1 - settings["eps"]) + settings["eps"]
    case.check("t", t)
    x_t = scheduler.add_noise(x, z, t)
    case.check("perturbed", x_t)
    case.check("g2", scheduler.sde.diffusion(t) ** 2)
    case.check("std2", scheduler.marginal(t)[1] ** 2)
    score = scheduler.to_score(network(x_t, scheduler.network_time(t)), t)
    for weighted in (0, 1):
        for mean in (0, 1):
            losses = denoising_loss(scheduler, score, z, t, bool(weighted), bool(mean))
            case.check(f"loss_lw{weighted}_mean{mean}", losses.mean(), rtol=1e-5)
    if settings["sde"] == "subvp":
        return
    # the losses of the discrete models, SMLD and DDPM
    scheduler, labels, count = scheduler_of(settings, **forms[1]), case["labels"], settings["N"]
    if settings["sde"] == "ve":
        name, t = "smld", (count - 1 - labels).double() / (count - 1)
        case.check("smld_sigmas", scheduler.marginal(t)[1])
    else:
        name, t = "ddpm", labels.double() / (count - 1)
    torch.testing.assert_close(scheduler.network_time(t), labels.float())
    x_t = scheduler.add_noise(x, z, t)
    score = scheduler.to_score(network(x_t, scheduler.network_time(t)), t)
    for mean in (0, 1):
        losses = denoising_loss(scheduler, score, z, t, reduce_mean=bool(mean))
        case.check(f"{name}_loss_mean{mean}", losses.mean(), rtol=1e-5)


def replay_ncsn(case: Case) -> None:
    settings = case.settings
    levels, steps = settings["num_classes"], settings["n_steps_each"]
    scheduler = AnnealedLangevinScheduler(
        levels, settings["sigma_begin"], settings["sigma_end"], settings["step_lr"], steps, settings["denoise"]
    )
    case.check("sigmas", scheduler.sigmas)
    case.check("step_sizes", scheduler.step_sizes)
    score = gaussian_score(scheduler.sde, settings)
    x, noise, after = case["x_init"], case["noise"], []
    for i, drawn in zip(scheduler.timesteps, noise):
        for each in drawn:
            x = scheduler.step(score(x, scheduler.times(i)), i, x, noise=each, return_dict=False)[0]
        after.append(x)
    case.check("levels", torch.stack(after))
    if scheduler.denoises_apart:
        x = scheduler.denoise(score(x, scheduler.times(i)), i, x)
    case.check("sample", x)
    x_0, z, labels = case["dsm_x"], case["dsm_noise"], case["dsm_labels"]
    sigma = over(scheduler.marginal(labels)[1], x_0)
    output = 0.7 * torch.tanh(0.9 * scheduler.add_noise(x_0, z, labels)) / sigma
    case.check("dsm_score_output", output)
    losses = denoising_loss(scheduler, output, z, labels, reduce_mean=False, anneal_power=settings["anneal_power"])
    case.check("dsm_loss_per_sample", losses)
    case.check("dsm_loss", losses.mean())


REPLAYS = {
    "sde": replay_sde,
    "predictor_corrector": replay_predictor_corrector,
    "score_fn": replay_score_fn,
    "samplers": replay_samplers,
    "likelihood": replay_likelihood,
    "losses": replay_losses,
    "ncsn": replay_ncsn,
}

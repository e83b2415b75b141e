"""Replays of MDLM, ReMDM, UDLM and discrete guidance: losses, posteriors, steps and loops."""

import torch
from torch import Tensor

from hf_diffusion.losses.masked import (
    continuous_times,
    discrete_masked_loss,
    discrete_times,
    discrete_uniform_loss,
    masked_loss,
    nll,
    per_token,
    score_entropy,
    sedd_log_score,
    uniform_loss,
)
from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.schedulers.scheduling_masked import MDLMScheduler, draw_tokens, guided, uniform_posterior
from tests.golden.replay import Case


REMASKING = {
    "remdm-cap": "cap",
    "remdm-rescale": "rescale",
    "remdm-conf": "confidence",
    "forward-backward": "forward_backward",
    "remdm-loop": "loop",
}


def scheduler_of(settings: dict, **options) -> MDLMScheduler:
    process = {"num_classes": settings.get("V", 11)}
    process |= {
        ours: settings[theirs]
        for ours, theirs in (("noise_schedule", "noise"), ("noise_eps", "eps"))
        if theirs in settings
    }
    if "mask_id" in settings:
        process["mask_token_id"] = settings["mask_id"]
    if "sampler" in settings:
        process["remasking"] = REMASKING[settings["sampler"]]
        process |= {name: settings[name] for name in ("eta", "t_on", "t_off", "alpha_on") if name in settings}
    return MDLMScheduler(**process | options)


def toy_network(settings: dict, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """The formula of the manifest: logits (B, L, V) of tokens (B, L) and sigma (B,)."""
    v, position = torch.arange(settings["V"]).double(), torch.arange(x.shape[1]).double()[:, None]
    now, before = x.double()[..., None], x.roll(1, dims=1).double()[..., None]
    logits = settings["a"] * torch.sin(1.3 * v + 0.7 * position + 0.9 * now)
    logits = logits + settings["b"] * torch.cos(0.5 * v * (1 + before))
    logits = logits + settings["d"] * sigma.double().reshape(-1, 1, 1) * torch.cos(1.1 * v)
    if cond is not None:
        logits = logits + 0.6 * torch.cos(0.4 * (cond.double().reshape(-1, 1, 1) + 1) * v)
    return logits


def conditioning(settings: dict, sigma: Tensor) -> Tensor:
    return sigma if settings.get("time_conditioning") else torch.zeros_like(sigma)


def replay_schedule(case: Case) -> None:
    scheduler = scheduler_of(case.settings)
    if "n" in case.settings:
        u, count = case["u"], case.settings["n"]
        levels = stratified(u, torch.arange(count), count) if case.settings["antithetic"] else u
        times = continuous_times(levels)
        if case.settings["importance"]:
            times = scheduler.importance_times(times)
        case.check("t", times)
        return
    t = case["t"]
    case.check("sigma", scheduler.total_noise(t))
    case.check("dsigma", scheduler.rate(t))
    case.check("alpha", scheduler.alpha(t))
    case.check("weight", scheduler.loss_weight(t))


def times_of(case: Case) -> Tensor:
    """The times of a batch, which the case has, too."""
    u, steps = case["u_t"], case.settings["T"]
    t = continuous_times(stratified(u, torch.arange(len(u)), len(u)))
    t = discrete_times(t, steps) if steps else t
    case.check("t", t)
    return case["t"]


def replay_losses(case: Case) -> None:
    settings, scheduler, x_0 = case.settings, scheduler_of(case.settings), case["x0"]
    t, counted = times_of(case), case["attention_mask"]
    sigma = scheduler.total_noise(t)
    case.check("sigma", sigma)
    x_t = scheduler.add_noise(x_0, case["u_mask"], t)
    case.check("x_t", x_t, None)
    logits = toy_network(settings, x_t, conditioning(settings, sigma))
    case.check("logits", logits)
    kind = settings["parameterization"]
    if kind == "sedd":
        score = sedd_log_score(logits, x_t, sigma)
        case.check("log_score", score)
        losses = score_entropy(scheduler, score, x_0, x_t, t)
    else:
        log_p = scheduler.x_0_log_probs(logits, x_t) if kind == "subs" else logits.log_softmax(-1)
        case.check("probs", log_p.exp())
        if settings["T"]:
            losses = discrete_masked_loss(scheduler, log_p, x_0, x_t, t, settings["T"])
            if kind == "d3pm":
                clean = toy_network(settings, x_0, torch.zeros_like(sigma))
                losses = losses + nll(clean.log_softmax(-1), x_0)
        else:
            losses = masked_loss(scheduler, logits, x_0, x_t, t)
    case.check("nlls", losses * counted)
    case.check("loss", per_token(losses, counted))


def check_draw(case: Case, weights: Tensor) -> None:
    case.check("x_s", draw_tokens(weights, case["u"]), None)
    if "min_gap" in case.arrays:
        assert case["min_gap"] > 0


def replay_sampling(case: Case) -> None:
    settings, scheduler = case.settings, scheduler_of(case.settings)
    if "steps" in settings:
        replay_loop(case, scheduler)
        return
    x_t, t = case["x_t"], case["t"][:, 0]
    sigma = scheduler.total_noise(t)
    case.check("sigma", sigma[:, None])
    p = scheduler.x_0_log_probs(toy_network(settings, x_t, conditioning(settings, sigma)), x_t).exp()
    weights = scheduler.posterior(p, x_t, 1 - scheduler.alpha(t), 1 - scheduler.alpha(t - settings["dt"]))
    case.check("posterior", weights)
    # not normalised in the reference, by a factor that the draw does not see
    given = case["probs_unnormalised"]
    is_masked = x_t == settings["mask_id"]
    torch.testing.assert_close((given / given.sum(-1, keepdim=True))[is_masked], weights[is_masked])
    check_draw(case, weights)


def replay_loop(case: Case, scheduler: MDLMScheduler) -> None:
    settings, noise = case.settings, case["u"]
    steps = settings["steps"]
    scheduler.set_timesteps(steps)
    x, doubt, states = torch.full(case["sample"].shape, settings["mask_id"]), None, []
    for t, uniform in zip(scheduler.timesteps, noise):
        logits = toy_network(settings, x, conditioning(settings, scheduler.total_noise(t).expand(len(x))))
        x, doubt = scheduler.step(logits, t, x, noise=uniform, doubt=doubt, return_dict=False)
        states.append(x)
    last = torch.full((len(x),), scheduler.config.last_time, dtype=torch.float64)
    logits = toy_network(settings, x, conditioning(settings, scheduler.total_noise(last)))
    if settings.get("predictor") == "analytic":
        # its last step draws, too
        x = draw_tokens(scheduler.x_0_log_probs(logits, x).exp(), noise[steps])
    else:
        x = scheduler.finish(logits, x)
    if "states" in case.arrays:
        case.check("states", torch.stack(states).to(torch.int16), None)
    case.check("sample", x, None)
    assert case["min_gap"] > 0


def replay_remdm(case: Case) -> None:
    settings, scheduler = case.settings, scheduler_of(case.settings)
    if "steps" in settings:
        replay_loop(case, scheduler)
        return
    scheduler.step_size = settings["dt"]
    x_t = case["x_t"]
    logits = toy_network(settings, x_t, torch.zeros(len(x_t)))
    p = scheduler.x_0_log_probs(logits, x_t).exp()
    doubt = case["conf"] if "conf" in case.arrays else None
    chance_t, chance_s, remasks = scheduler.chances(settings["t"])
    sigma = scheduler.remasking(x_t, chance_t, chance_s, doubt) if remasks else torch.zeros(()).double()
    if "sigma" in case.arrays:
        case.check("sigma", sigma)
    weights = scheduler.posterior(p, x_t, chance_t, chance_s, sigma)
    torch.testing.assert_close(weights.sum(-1), torch.ones(x_t.shape).double())
    if case.record.name == "remdm-loop-outside":
        # not normalised in the reference, which keeps what is set whatever is drawn
        given, is_masked = case["probs"], x_t == settings["mask_id"]
        torch.testing.assert_close(given[is_masked] / chance_t, weights[is_masked])
    else:
        case.check("probs", weights)
    check_draw(case, weights)
    stepped = scheduler.step(logits, settings["t"], x_t, noise=case["u"], doubt=doubt)
    case.check("x_s", stepped.prev_sample, None)
    if "conf_new" in case.arrays:
        case.check("conf_new", stepped.doubt)


def replay_udlm(case: Case) -> None:
    kinds = {
        "continuous": replay_udlm_loss,
        "discrete": replay_udlm_loss,
        "step": replay_udlm_step,
        "loop": replay_udlm_loop,
    }
    kinds |= {"cfg_uniform": replay_guidance, "cfg_absorbing": replay_guidance}
    kinds[case.record.name](case)


def replay_udlm_loss(case: Case) -> None:
    settings, scheduler, x_0, t = case.settings, scheduler_of(case.settings), case["x0"], times_of(case)
    sigma = scheduler.total_noise(t)
    case.check("sigma", sigma)
    x_t = scheduler.add_noise(x_0, case["u_move"], t, case["x_random"])
    case.check("x_t", x_t, None)
    p = toy_network(settings, x_t, sigma).softmax(-1)
    case.check("probs", p)
    if settings["T"]:
        found = discrete_uniform_loss(p, x_0, x_t, t, settings["T"])
    else:
        found = uniform_loss(p, x_0, x_t, 1 - t)
        case.check("duo_nll", found)
    clean = nll(toy_network(settings, x_0, torch.zeros_like(sigma)).log_softmax(-1), x_0)
    case.check("diffusion_loss", found)
    case.check("recon_loss", clean)
    case.check("loss", found + clean)


def replay_udlm_step(case: Case) -> None:
    settings, x_t, t = case.settings, case["x_t"], case["t"]
    p = toy_network(settings, x_t, -(1 - t).log()).softmax(-1)
    case.check("probs", p)
    weights = uniform_posterior(p, x_t, 1 - t, 1 - (t - settings["dt"]))
    case.check("posterior", weights)
    check_draw(case, weights)


def replay_udlm_loop(case: Case) -> None:
    settings, scheduler, x = case.settings, scheduler_of(case.settings), case["x_T"]
    scheduler.set_timesteps(settings["steps"])
    for t, uniform in zip(scheduler.timesteps, case["u"]):
        now, later = scheduler.alpha(torch.stack([t, t - scheduler.step_size])).expand(len(x), 2).T
        p = toy_network(settings, x, -now.log()).softmax(-1)
        x = draw_tokens(uniform_posterior(p, x, now, later), uniform)
    case.check("sample", x, None)
    assert case["min_gap"] > 0


def replay_guidance(case: Case) -> None:
    settings, x_t, t = case.settings, case["x_t"], case["t"]
    conditional, unconditional, s = case["p_cond"], case["p_uncond"], t - settings["dt"]
    if settings["mask_id"] >= 0:
        scheduler = scheduler_of(settings)
        weights = scheduler.posterior(guided(conditional, unconditional, settings["gamma"]), x_t, t, s)
    else:
        weights = guided(
            *(uniform_posterior(p, x_t, 1 - t, 1 - s) for p in (conditional, unconditional)), settings["gamma"]
        )
    case.check("posterior", weights)
    case.check("x_s", draw_tokens(weights, case["u"]), None)
    assert case["cond"].max() < settings["num_classes"]


REPLAYS = {
    "schedule": replay_schedule,
    "losses": replay_losses,
    "sampling": replay_sampling,
    "remdm": replay_remdm,
    "udlm": replay_udlm,
}

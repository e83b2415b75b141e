"""Replays of D3PM: matrices, posteriors, bounds and samples of the code for images and text."""

import torch
from torch import Tensor

from hf_diffusion.losses.discrete import bits_per_dim, bound_term, categorical_kl, cross_entropy, mean_bits, prior_term
from hf_diffusion.schedulers.scheduling_discrete import (
    D3PMScheduler,
    MixingKernel,
    information_removed,
    logistic_logits,
)
from tests.golden.manifests import records
from tests.golden.replay import Case


# What the text code calls its processes. "precomputed" are Gaussian.
TEXT_KINDS = {
    "beta-diagonal": {"transition_type": "uniform"},
    "mask": {"transition_type": "absorbing"},
    "band-diagonal": {"transition_type": "band_diagonal"},
    "band-diagonal-precomputed": {"transition_type": "gaussian", "gaussian_variant": "text_code"},
    "mask-band-diagonal-precomputed": {"transition_type": "absorbing_gaussian", "gaussian_variant": "text_code"},
}


def scheduler_of(settings: dict, **options) -> D3PMScheduler:
    """The process that the settings of a case describe."""
    schedule = settings.get("schedule") or {"T": len(settings["betas"])}
    process = {
        "num_classes": settings["K"],
        "num_train_timesteps": schedule["T"],
        "transition_type": settings["transition"],
        "transition_bands": settings.get("transition_bands"),
        "gaussian_variant": settings.get("gaussian_variant", "paper"),
        "mask_token_id": settings.get("mask_id"),
    }
    if "betas" in settings:
        process["trained_betas"] = settings["betas"]
    else:
        process["beta_schedule"] = schedule["kind"]
        process |= {
            ours: schedule[theirs]
            for ours, theirs in (("beta_start", "start"), ("beta_end", "stop"))
            if theirs in schedule
        }
    return D3PMScheduler(**process | options)


def referenced(case: Case, kind: str, name: str) -> Case:
    """Another case of the same system."""
    found = [record for record in records(case.record.folder) if (record.kind, record.name) == (kind, name)]
    assert found, f"{case} refers to {kind}/{name}, which is not there"
    return Case(found[0])


def process_of(case: Case, **options) -> D3PMScheduler:
    """The process of a case that names one in transitions."""
    return scheduler_of(referenced(case, "transitions", case.settings["case_in_transitions"]).settings, **options)


def matrices(scheduler: D3PMScheduler, steps: int) -> tuple[Tensor, Tensor]:
    one = [scheduler.transition_matrix(t) for t in range(steps)]
    return torch.stack(one), torch.stack([scheduler.cumulative_matrix(t) for t in range(steps)])


def replay_transitions(case: Case) -> None:
    if "K" not in case.settings:
        replay_schedules(case)
        return
    scheduler = scheduler_of(case.settings)
    if "rows" in case.settings:
        # a whole table of 1,000 x 256 x 256
        times, rows = case.settings["t"], case.settings["rows"]
        case.check("Q_rows", torch.stack([scheduler.transition_matrix(t)[rows] for t in times]))
        case.check("Qbar_rows", torch.stack([scheduler.cumulative_matrix(t)[rows] for t in times]))
        return
    steps = scheduler.config.num_train_timesteps
    one, cumulative = matrices(scheduler, steps)
    if case.expects("betas"):
        case.check("betas", scheduler.betas)
    case.check("Q", one)
    if case.expects("Qbar"):
        case.check("Qbar", cumulative)


def replay_schedules(case: Case) -> None:
    t = case["t"]
    for schedule in ("cosine", "jsd"):
        scheduler = D3PMScheduler(4, case.settings["T"], beta_schedule=schedule)
        assert isinstance(scheduler.kernel, MixingKernel)
        case.check(f"betas_{schedule}", scheduler.betas[t])
        case.check(f"abar_{schedule}", scheduler.kernel.kept[t + 1])


def replay_posterior(case: Case) -> None:
    x_0, x_t, t, logits = case["x0"], case["xt"], case["t"], case["x0_logits"]
    scheduler = process_of(case, eps=case.settings["eps"])
    case.check("posterior_logits_ids", scheduler.posterior_logits(x_0, x_t, t))
    case.check("posterior_logits_model", scheduler.predicted_logits(logits, x_t, t))
    exact, mixture = process_of(case), process_of(case, posterior_form="mixture")
    # which the reference makes in the form of float32, and these without eps
    close = {"rtol": 1e-9, "atol": 1e-12}
    case.check("posterior_probs_exact", exact.posterior_logits(x_0, x_t, t).softmax(-1), **close)
    case.check("model_probs_exact_joint", exact.predicted_logits(logits, x_t, t).softmax(-1), **close)
    case.check("model_probs_exact_mixture", mixture.predicted_logits(logits, x_t, t).softmax(-1), **close)


def replay_losses(case: Case) -> None:
    inputs = referenced(case, "posterior", case.record.name)
    x_0, x_t, t, logits = (inputs[name] for name in ("x0", "xt", "t", "x0_logits"))
    eps = case.settings["eps"]
    scheduler = process_of(case, eps=eps)
    for dtype in (torch.float64, torch.float32):
        bound = mean_bits(bound_term(scheduler, logits.to(dtype), x_0, x_t, t))
        entropy = mean_bits(cross_entropy(logits.to(dtype), x_0))
        case.check("vb_bpd", bound)
        case.check("ce_bpd", entropy)
        case.check("hybrid_bpd", bound + case.settings["hybrid_coeff"] * entropy)
    case.check("prior_bpd", mean_bits(prior_term(scheduler, x_0, eps)))
    case.check("vb_bpd_exact", mean_bits(bound_term(process_of(case), logits, x_0, x_t, t)))

    table, noise = case["loop_model_table"], case["loop_uniform"]
    steps = len(table)
    left = list(range(steps))

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return table[t[:, None], x_t]

    # entry t of the noise belongs to timestep t; the loop goes downwards
    terms, prior = bits_per_dim(network, scheduler, case["loop_x0"], lambda shape: noise[left.pop()], eps)
    case.check("loop_vbterms", terms.flip(1))
    case.check("loop_total", terms.sum(1) + prior)


def replay_sampling(case: Case) -> None:
    scheduler, t = process_of(case, eps=case.settings["eps"]), case["t"]
    case.check("q_sample", scheduler.add_noise(case["x0"], case["q_uniform"], t))
    logits, x_t = case["x0_logits"], case["xt"]
    case.check("p_logits", scheduler.predicted_logits(logits, x_t, t), rtol=1e-9, atol=1e-9)
    case.check("p_sample", scheduler.step(logits, t, x_t, noise=case["p_uniform"]).prev_sample)
    x, table, noise, states = case["loop_init"], case["loop_model_table"], case["loop_uniform"], []
    for t, uniform in zip(scheduler.timesteps, noise):
        x = scheduler.step(table[t][x], t, x, noise=uniform).prev_sample
        states.append(x)
    case.check("loop_traj", torch.stack(states))
    assert case["min_gap"] > 1e-6


def replay_logistic(case: Case) -> None:
    location, log_scale, eps = case["loc"], case["log_scale"], case.settings["eps"]
    for dtype in (torch.float64, torch.float32):
        logits = logistic_logits(location.to(dtype), log_scale.to(dtype), case.settings["K"], eps)
        case.check("probs", logits.softmax(-1))
    # float32 cannot tell logits of probabilities as small as eps apart
    case.check("logits", logistic_logits(location, log_scale, case.settings["K"], eps))
    exact = logistic_logits(location, log_scale, case.settings["K"], eps=0.0)
    case.check("probs_exact", exact.softmax(-1))


def replay_exact(case: Case) -> None:
    """One variable, of which everything can be counted."""
    scheduler = scheduler_of(case.settings)
    steps, classes = scheduler.config.num_train_timesteps, case.settings["K"]
    one, cumulative = matrices(scheduler, steps)
    p_data = case["p_data"]
    marginals = p_data @ cumulative
    for name, value in (("betas", scheduler.betas), ("Q", one), ("Qbar", cumulative), ("marginals", marginals)):
        case.check(name, value)
    joint = p_data[:, None] * cumulative
    bayes = (joint / marginals[:, None]).nan_to_num(1 / classes).transpose(1, 2)
    reached = marginals[..., None] > 0
    case.check("bayes_x0", torch.where(reached, bayes, 1 / classes))
    bayes = case["bayes_x0"]

    before = torch.cat([p_data[None], marginals[:-1]])
    reverse = (before[:, :, None] * one / marginals[:, None]).transpose(1, 2)
    expected = case["true_reverse"]
    torch.testing.assert_close(torch.where(reached, reverse, 0.0), torch.where(reached, expected, 0.0))

    mixture, text = (
        scheduler_of(case.settings, **{name: value})
        for name, value in (("posterior_form", "mixture"), ("decoder", "posterior"))
    )
    from_bayes = chain(scheduler, bayes)
    assert_where(reached, from_bayes, case["reverse_joint_bayes"])
    case.check("generated_joint_bayes", generated(from_bayes, marginals[-1]))
    from_prior = chain(scheduler, torch.cat([bayes[:1], p_data.expand(steps - 1, classes, classes)]))
    assert_where(reached, from_prior, case["reverse_joint_prior"])
    assert_where(reached, from_prior, expected)
    case.check("generated_mixture_bayes", generated(chain(mixture, bayes), marginals[-1]))
    torch.testing.assert_close(generated(chain(mixture, bayes), marginals[-1]), p_data)

    network = case["net_probs"]
    kernels, text_kernels = chain(scheduler, network), chain(text, network)
    stationary = torch.tensor(case.settings["stationary"], dtype=torch.float64)
    torch.testing.assert_close(scheduler.stationary, stationary)
    possible = cumulative.sum(dim=1)[..., None] > 0
    assert_where(possible, kernels, case["net_reverse"])
    case.check("net_reverse_t0_text", text_kernels[0])
    model, terms = generated(kernels, stationary), bound_terms(scheduler, network, cumulative)
    valid = p_data > 0
    case.check("p_theta_x0", model)
    case.check("p_theta_x0_text", generated(text_kernels, stationary))
    case.check("bound_terms_nats", torch.where(valid[:, None], terms, 0.0))
    text_terms = bound_terms(text, network, cumulative)
    case.check("bound_t0_text_nats", torch.where(valid, text_terms[:, 0], 0.0))
    nll = case["nll_nats"]
    torch.testing.assert_close(-model.log()[valid], nll[valid])
    assert (nll[valid] <= terms.sum(1)[valid] + 1e-12).all()


def assert_where(reached: Tensor, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(torch.where(reached, actual, 0.0), torch.where(reached, expected, 0.0))


def chain(scheduler: D3PMScheduler, network: Tensor) -> Tensor:
    """p(x_s | x_t) (T, K, K) of probabilities of x_0 (T, x_t, x_0)."""
    steps, classes = network.shape[:2]
    x_t = torch.arange(classes).expand(steps, classes)
    return scheduler.predicted_logits(network.log(), x_t, torch.arange(steps)).softmax(-1)


def generated(kernels: Tensor, start: Tensor) -> Tensor:
    """The distribution of x_0 (K,) of a reverse chain."""
    for kernel in kernels.flip(0):
        start = start @ kernel
    return start


def bound_terms(scheduler: D3PMScheduler, network: Tensor, cumulative: Tensor) -> Tensor:
    """E over q(x_t | x_0) of each term of the bound (K, T), and the prior's, in nats."""
    steps, classes = network.shape[:2]
    t, every = torch.arange(steps).repeat_interleave(classes), torch.arange(classes)
    # a row for each timestep and x_0; every x_t
    x_0, x_t = every.repeat(steps)[:, None].expand(-1, classes), every.expand(steps * classes, classes)
    logits = network.log().repeat_interleave(classes, dim=0)
    terms = bound_term(scheduler, logits, x_0, x_t, t).reshape(steps, classes, classes)
    mean = torch.where(cumulative > 0, cumulative * terms, 0.0)
    return torch.cat([mean.sum(-1).T, prior_term(scheduler, every[:, None])], dim=1)


def replay_text(case: Case) -> None:
    if case.record.name == "mutual_information":
        replay_mutual_information(case)
        return
    settings, betas = case.settings, case["betas"]
    steps, classes = len(betas), settings["dim"]
    process = TEXT_KINDS[settings["kind"]] | {"decoder": "posterior", "mask_token_id": settings["mask_id"]}
    if "width" in settings:
        process["transition_bands"] = settings["width"] // 2
    scheduler = D3PMScheduler(classes, steps, trained_betas=betas.tolist(), **process)
    one, cumulative = matrices(scheduler, steps)
    case.check("M", one.transpose(1, 2))
    eye = torch.eye(classes, dtype=torch.float64)[None]
    case.check("P", torch.cat([eye, cumulative.transpose(1, 2)]))
    case.check("stationary", scheduler.stationary)

    x_0, x_t, network = case["x0"].expand(steps, -1), case["x_t_plus_1"], case["net_probs"].log()
    t = torch.arange(steps)
    true = scheduler.posterior_logits(x_0, x_t, t).softmax(-1)
    case.check("posterior", true)
    case.check("model_posterior", scheduler.predicted_logits(network, x_t, t).softmax(-1))
    entropy = cross_entropy(network, x_0).sum(1)
    base = bound_term(scheduler, network, x_0, x_t, t).sum(1)
    case.check("x0_ce_nats", entropy)
    case.check("base_loss_nats", base)
    case.check("hybrid_loss_nats", base + 0.01 * entropy)
    true_logits, predicted = scheduler.posterior_logits(x_0, x_t, t), scheduler.predicted_logits(network, x_t, t)
    case.check("kl_nats", categorical_kl(true_logits, predicted).sum(1))

    # x_5 to x_3: levels, which are timesteps 4 and 2
    skipped, later, earlier = case["skip_x"][None], torch.tensor([4]), torch.tensor([2])
    case.check("skip_posterior", scheduler.posterior_logits(x_0[:1], skipped, later, earlier).softmax(-1)[0])
    case.check(
        "skip_model_posterior", scheduler.predicted_logits(network[3:4], skipped, later, earlier).softmax(-1)[0]
    )
    case.check("prior_kl_nats", prior_term(scheduler, x_0[:1], eps=1e-20).sum())


def replay_mutual_information(case: Case) -> None:
    classes, exponents = case.settings["dim"], case["exponents"]
    kept = (-exponents).exp()[:, None, None]
    eye = torch.eye(classes, dtype=torch.float64)
    mask = eye[case.settings["mask_id"]].expand(classes, -1)
    case.check("removal_mask", information_removed(kept * eye + (1 - kept) * mask, case["p0_mask"]))
    uniform = torch.full_like(eye, 1 / classes)
    case.check("removal_uniform", information_removed(kept * eye + (1 - kept) * uniform, case["p0_uniform"]))


REPLAYS = {
    "transitions": replay_transitions,
    "posterior": replay_posterior,
    "losses": replay_losses,
    "sampling": replay_sampling,
    "logistic": replay_logistic,
    "exact_small": replay_exact,
    "text": replay_text,
}

"""Masked and uniform tokens in continuous time: marginals, bounds and samplers, checked."""

import math

import pytest
import torch

from hf_diffusion.losses.discrete import bound_term
from hf_diffusion.losses.masked import (
    continuous_times,
    discrete_masked_loss,
    discrete_times,
    discrete_uniform_loss,
    masked_loss,
    per_token,
    uniform_loss,
)
from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.schedulers.scheduling_discrete import D3PMScheduler
from hf_diffusion.schedulers.scheduling_masked import MDLMScheduler, guided, uniform_posterior


V, MASK = 6, 5
generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 4, V, generator=generator, dtype=torch.float64)
X_0 = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2]])
X_T = torch.tensor([[MASK, 1, MASK, 3], [MASK, MASK, 1, MASK]])


def test_the_network_may_not_name_the_mask_and_keeps_what_it_sees():
    given = LOGITS.clone()
    p = MDLMScheduler(V).x_0_log_probs(LOGITS, X_T).exp()
    assert torch.equal(given, LOGITS)
    assert p[..., MASK].max() == 0 and torch.equal(p.argmax(-1)[X_T != MASK], X_T[X_T != MASK])
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4).double())


@pytest.mark.parametrize("schedule", ["loglinear", "cosine", "cosine_squared", "linear"])
def test_rates_and_weights_are_derivatives_of_alpha(schedule):
    scheduler, t = MDLMScheduler(V, noise_schedule=schedule), torch.linspace(0.1, 0.9, 9).double()
    h = 1e-6
    slope = (scheduler.alpha(t + h) - scheduler.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(scheduler.rate(t), -slope / scheduler.alpha(t), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scheduler.loss_weight(t), -slope / (1 - scheduler.alpha(t)), rtol=1e-6, atol=1e-8)


def test_masking_again_keeps_the_share_that_is_masked():
    """ReMDM, Theorem 1: whatever is masked again, the chance at s is that of the schedule."""
    # in the second, forward and backward would mask more than there may be
    for kind, chance_t, chance_s in (("cap", 0.6, 0.45), ("rescale", 0.6, 0.45), ("forward_backward", 0.05, 0.001)):
        scheduler = MDLMScheduler(V, remasking=kind, eta=0.3)
        sigma = scheduler.remasking(X_T, chance_t, chance_s)
        p = torch.nn.functional.one_hot(X_0, V).double()
        both = [scheduler.posterior(p, x, chance_t, chance_s, sigma) for x in (torch.full_like(X_0, MASK), X_0)]
        marginal = chance_t * both[0] + (1 - chance_t) * both[1]
        assert sigma.max() > 0 and min(weights.min() for weights in both) > -1e-12
        torch.testing.assert_close(marginal[..., MASK], torch.full((2, 4), chance_s).double())
        torch.testing.assert_close((marginal * p).sum(-1), torch.full((2, 4), 1 - chance_s).double())


def test_the_discrete_bound_of_masked_tokens_is_that_of_d3pm():
    steps = 8
    log_p = MDLMScheduler(V).x_0_log_probs(LOGITS, X_T)
    d3pm = D3PMScheduler(V, steps, "absorbing", beta_schedule="jsd", mask_token_id=MASK, decoder="posterior")
    # what is seen must be what it was
    x_0 = torch.where(X_T == MASK, X_0, X_T)
    for t in (1, 4, 6):
        ours = discrete_masked_loss(MDLMScheduler(V), log_p, x_0, X_T, torch.full((2,), (t + 1) / steps), steps)
        theirs = bound_term(d3pm, log_p.clamp(min=-1e4), x_0, X_T, torch.full((2,), t))
        torch.testing.assert_close(ours, steps * theirs, rtol=1e-6, atol=1e-8)


def test_the_first_discrete_time_has_a_finite_bound():
    steps, log_p = 10, LOGITS.log_softmax(-1)
    t = discrete_times(torch.full((2,), 0.01), steps)
    assert t.tolist() == [0.1, 0.1]
    assert discrete_masked_loss(MDLMScheduler(V), log_p, X_0, X_T, t, steps).isfinite().all()


def test_discrete_bounds_become_the_continuous_ones():
    t, steps = torch.tensor([0.3, 0.7]).double(), 10**5
    scheduler = MDLMScheduler(V, noise_eps=0.0)
    log_p = scheduler.x_0_log_probs(LOGITS, X_T)
    fine = discrete_masked_loss(scheduler, log_p, X_0, X_T, t, steps)
    torch.testing.assert_close(fine, masked_loss(scheduler, LOGITS, X_0, X_T, t), rtol=1e-4, atol=1e-6)
    p, x_t = LOGITS.softmax(-1), torch.randint(0, V, (2, 4), generator=generator)
    fine = discrete_uniform_loss(p, X_0, x_t, t, steps)
    torch.testing.assert_close(fine, uniform_loss(p, X_0, x_t, 1 - t), rtol=1e-3, atol=1e-4)


def test_the_mean_of_the_continuous_bound_is_the_entropy_for_tokens_that_are_independent():
    frequencies = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05, 0.0]).double()
    entropy = -float((frequencies[:5] * frequencies[:5].log()).sum())
    draws, count = torch.Generator().manual_seed(1), 20_000
    x_0 = torch.multinomial(frequencies.expand(count, V), 8, replacement=True, generator=draws)
    u = torch.rand(count, generator=draws, dtype=torch.float64)
    t, scheduler = continuous_times(stratified(u, torch.arange(count), count)), MDLMScheduler(V)
    x_t = scheduler.add_noise(x_0, torch.rand(count, 8, generator=draws), t)
    losses = masked_loss(scheduler, frequencies.clamp(min=1e-9).log().expand(count, 8, V), x_0, x_t, t)
    error = float(losses.mean(1).std() / math.sqrt(count))
    # times below 1e-3 are never drawn
    assert abs(float(per_token(losses)) - entropy) < 4 * error + 1e-3 * entropy


def test_guidance_of_one_is_the_conditional_model_and_more_leans_towards_it():
    p, q = torch.tensor([0.6, 0.4, 0.0]), torch.tensor([0.4, 0.6, 0.0])
    torch.testing.assert_close(guided(p, q, 1.0), p)
    torch.testing.assert_close(guided(p, q, 2.0), torch.tensor([0.9, 0.4**2 / 0.6, 0.0]) / (0.9 + 0.4**2 / 0.6))


def test_the_uniform_posterior_is_bayes_rule():
    d3pm = D3PMScheduler(V, 4, beta_schedule="jsd", decoder="posterior")
    alpha = d3pm.kernel.kept
    x_0, x_t = torch.arange(V)[:, None].expand(V, V), torch.arange(V).expand(V, V)
    p = torch.nn.functional.one_hot(x_0, V).double()
    exact = d3pm.posterior_logits(x_0, x_t, torch.full((V,), 2)).softmax(-1)
    torch.testing.assert_close(uniform_posterior(p, x_t, alpha[3], alpha[2]), exact)


@pytest.mark.parametrize("kind", ["none", "cap", "rescale", "confidence", "forward_backward", "loop"])
def test_every_sampler_draws_the_models_distribution_and_fills_in_around_a_prompt(kind):
    frequencies = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 1e-9]).double()
    scheduler, count = MDLMScheduler(V, remasking=kind, eta=0.05, t_off=0.11), 4000
    scheduler.set_timesteps(20)
    x = torch.full((count, 3), MASK)
    x[:, 1] = 4
    fixed, doubt, logits = x != MASK, None, frequencies.log().expand(count, 3, V)
    noise = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        x, doubt = scheduler.step(logits, t, x, generator=noise, doubt=doubt, fixed=fixed, return_dict=False)
    assert (x[:, 1] == 4).all()
    x = scheduler.finish(logits, x)
    assert (x != MASK).all()
    found = torch.bincount(x[:, [0, 2]].flatten(), minlength=V)[:5] / (2 * count)
    # masking unsure tokens first prefers the probable ones
    if kind != "confidence":
        assert (found - frequencies[:5]).abs().max() < 0.03


@pytest.mark.parametrize("wrong", [{"noise_schedule": "blue"}, {"remasking": "all"}, {"mask_token_id": 9}])
def test_a_process_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="choose from|give 0 to 5"):
        MDLMScheduler(V, **wrong)

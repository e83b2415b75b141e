"""Losses of tokens in continuous time: the bounds of MDLM, SEDD and UDLM.

Shapes: B sequences of L tokens out of V; x_0 and x_t int64 (B, L), p(x_0 | x_t) (B, L, V), times
(B,). Losses are nats of each token (B, L). `scheduler` is one of `scheduling_masked`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hf_diffusion.losses.discrete import cross_entropy
from hf_diffusion.schedulers.scheduling_masked import over_tokens, uniform_posterior


# The published code draws times from [1e-3, 1): the weight 1/t has no bound.
FIRST_TIME = 1e-3
# At 1 no token is left to learn from.
LAST_TIME = 1 - 1e-4


def continuous_times(u: Tensor) -> Tensor:
    """Times in [1e-3, 1) for levels u (B,) in [0, 1); stratified levels make it low-variance."""
    return (1 - FIRST_TIME) * u.double() + FIRST_TIME


def discrete_times(t: Tensor, steps: int) -> Tensor:
    """Times in (0, 1] moved up to the next of `steps` equal ones."""
    return (t * steps).long().double() / steps + 1 / steps


def nll(log_p: Tensor, x_0: Tensor) -> Tensor:
    """-log p(x_0 | x_t) (B, L)."""
    return -log_p.gather(-1, x_0[..., None])[..., 0]


def per_token(losses: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean of losses (B, L) over the tokens that count, by 0 and 1 (B, L)."""
    return losses.mean() if counted is None else (losses * counted).sum() / counted.sum()


def without_mask(scheduler: Any, logits: Tensor) -> Tensor:
    """Logits (B, L, V) of x_0, which holds no mask."""
    mask = torch.arange(logits.shape[-1], device=logits.device) == scheduler.mask_token_id
    return logits.masked_fill(mask, -math.inf)


def masked_loss(scheduler: Any, logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The bound of MDLM in continuous time: cross entropy of masked tokens by `loss_weight`."""
    # as `x_0_log_probs`, without its probabilities of what is known, which cost nothing
    return of_masked(scheduler, cross_entropy(without_mask(scheduler, logits), x_0), x_t, t)


def of_masked(scheduler: Any, entropies: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """`masked_loss` of the cross entropies (B, L) of all tokens."""
    weight = over_tokens(scheduler.loss_weight(t), entropies).to(entropies)
    return weight * torch.where(x_t == scheduler.mask_token_id, entropies, 0.0)


def discrete_masked_loss(scheduler: Any, log_p: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, steps: int) -> Tensor:
    """T times the term of the bound at time t of T = `steps`, the mask's probability x_m allowed.

    log_p: any log p(x_0 | x_t). For a p without the mask it is -log p(x_0) / t.
    """
    dt = 1 / steps
    t = over_tokens(t.double().clamp(max=LAST_TIME), x_0)
    # at t = 1/T nothing is left to be masked, where 0/0 is 0
    s = (t - dt).clamp(min=0)
    mask = log_p[..., scheduler.mask_token_id].exp()
    alpha_t, alpha_s = 1 - t, 1 - s
    of_mask = (alpha_t * mask / t + 1).log()
    stays = torch.where(s > 1e-12, of_mask - (alpha_s * mask / s.clamp(min=1e-12) + 1).log(), 0.0)
    term = dt / t * (of_mask + nll(log_p, x_0)) + (1 - dt / t) * stays
    return steps * torch.where(x_t == scheduler.mask_token_id, term, 0.0)


def sedd_log_score(logits: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """log of the ratios p_t(y) / p_t(x_t) (B, L, V) of SEDD, 0 at x_t."""
    sigma = over_tokens(sigma, logits)
    score = logits - torch.expm1(sigma).log() - math.log(logits.shape[-1] - 1)
    return score.scatter(-1, x_t[..., None], 0.0)


def score_entropy(scheduler: Any, log_score: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The denoising score entropy of SEDD for absorbing noise, by its rate."""
    ratio = over_tokens(1 / torch.expm1(scheduler.total_noise(t)), x_0)
    chosen = log_score.gather(-1, x_0[..., None])[..., 0]
    others = log_score.exp().sum(dim=-1) - log_score[..., scheduler.mask_token_id].exp()
    entropy = others - ratio * chosen + ratio * (ratio.log() - 1)
    return over_tokens(scheduler.rate(t), x_0) * torch.where(x_t == scheduler.mask_token_id, entropy, 0.0)


def uniform_loss(p: Tensor, x_0: Tensor, x_t: Tensor, alpha: Tensor, slope: Tensor | float = -1.0) -> Tensor:
    """The bound of UDLM in continuous time for p(x_0 | x_t), alpha (B,) and its derivative."""
    classes = p.shape[-1]
    alpha, slope = over_tokens(alpha, p), over_tokens(slope, p)
    true = classes * alpha * torch.nn.functional.one_hot(x_0, classes).to(p) + 1 - alpha
    model = classes * alpha * p + 1 - alpha
    true_t, model_t = true.gather(-1, x_t[..., None]), model.gather(-1, x_t[..., None])
    ratios = true / true_t * ((model_t / model).log() + (true / true_t).log())
    inner = classes / true_t - classes / model_t - ratios.sum(dim=-1, keepdim=True)
    return (slope / (classes * alpha) * inner)[..., 0]


def discrete_uniform_loss(p: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, steps: int) -> Tensor:
    """T times the term of UDLM's bound at time t of T = `steps`, with alpha = 1 - t."""
    t = t.double().clamp(max=LAST_TIME)
    alpha_t, alpha_s = 1 - t, 1 - (t - 1 / steps)
    clean = torch.nn.functional.one_hot(x_0, p.shape[-1]).to(p)
    true, model = (uniform_posterior(q, x_t, alpha_t, alpha_s) for q in (clean, p))
    return steps * (torch.special.xlogy(true, true) - torch.special.xlogy(true, model)).sum(dim=-1)

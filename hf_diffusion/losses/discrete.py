"""Objectives of diffusion of categories: D3PM, Austin et al. 2021, arXiv:2107.03006.

Shapes: B samples of shape (...), K categories; x_0 and x_t are int64 (B, ...), logits of x_0
(B, ..., K), timesteps t int64 (B,), of which `scheduling_discrete` tells the meaning. Terms are
in bits per dimension: the mean over (...), in units of log 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses.noise_levels import antithetic, stratified, timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


SPREADS = {"uniform": None, "stratified": stratified, "antithetic": antithetic}
DrawUniform = Callable[[tuple[int, ...]], Tensor]


def mean_bits(nats: Tensor) -> Tensor:
    """The mean (B,) of nats (B, ...) a dimension, in bits."""
    return nats.flatten(1).mean(dim=1) / math.log(2)


def cross_entropy(x_0_logits: Tensor, x_0: Tensor) -> Tensor:
    """-log p(x_0 | x_t) of each value (B, ...), in nats."""
    return F.cross_entropy(x_0_logits.movedim(-1, 1), x_0, reduction="none")


def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) (...) in nats of distributions by their logits (..., K)."""
    log_p, log_q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def bound_term(
    scheduler: Any, x_0_logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None
) -> Tensor:
    """The term of the variational bound at t, of each value (B, ...), in nats.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), and -log p(x_0 | x_t) where s is clean data. s: None is
    t - 1.
    """
    predicted = scheduler.predicted_logits(x_0_logits, x_t, t, s)
    true = scheduler.posterior_logits(x_0, x_t, t, s).to(predicted)
    is_last = (t == 0 if s is None else s < 0).reshape(-1, *(1,) * (x_0.ndim - 1))
    return torch.where(is_last, cross_entropy(predicted, x_0), categorical_kl(true, predicted))


def prior_term(scheduler: Any, x_0: Tensor, eps: float = 0.0) -> Tensor:
    """KL(q(x_T | x_0) || prior) of each value (B, ...), in nats; no network has a part in it.

    eps: added to the prior's probabilities before their logarithm. Without it the term is infinite
    for an absorbing process that does not absorb all.
    """
    last = torch.full((len(x_0),), scheduler.config.num_train_timesteps, device=x_0.device)
    p = scheduler.kernel.rows(x_0, last)
    prior = (scheduler.stationary.to(p) + eps).log()
    # no mass is no divergence, also where the prior has none
    terms = torch.where(p > 0, p * ((p + eps).clamp(min=1e-300).log() - prior), 0.0)
    return terms.sum(dim=-1)


@torch.no_grad()
def bits_per_dim(
    network: Callable[[Tensor, Tensor], Tensor], scheduler: Any, x_0: Tensor, draw: DrawUniform, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The terms (B, T') of the bound over the scheduler's run and the prior's (B,), in bits.

    network: gives the output for x_t and t (B,). draw: uniform numbers of a shape, once a timestep
    in descending order. Column k is timestep `scheduler.timesteps[k]`. A run of fewer timesteps has
    a bound of its own, that of the model that skips steps.
    """
    columns = []
    is_whole = len(scheduler.timesteps) == scheduler.config.num_train_timesteps
    for timestep in scheduler.timesteps:
        t = timestep.to(x_0.device).expand(len(x_0))
        x_t = scheduler.add_noise(x_0, draw(x_0.shape), t)
        logits = scheduler.x_0_logits(network(x_t, t), x_t).double()
        s = None if is_whole else scheduler.previous_timestep(t)
        columns.append(mean_bits(bound_term(scheduler, logits, x_0, x_t, t, s)))
    return torch.stack(columns, dim=1), mean_bits(prior_term(scheduler, x_0, eps))


@dataclass(kw_only=True)
class DiscreteOptions:
    """The process of categories, and what a network is trained by."""

    # As many as 8-bit images have; digits have 17, and fewer learn faster.
    num_levels: int = option(
        256, "levels that the values in [-1, 1] are rounded to", at_least=2, at_most=256, group="method"
    )
    # Neighbouring levels are alike: the noise that knows it has the best images in the paper.
    transition_type: Literal["uniform", "absorbing", "gaussian"] = option(
        "gaussian", "noise: any level, into grey, or to near levels by a discretised Gaussian"
    )
    d3pm_schedule: Literal["auto", "cosine", "linear", "jsd"] = option(
        "auto", "noise schedule; auto is the paper's: linear for gaussian, cosine for uniform, jsd for absorbing"
    )
    beta_start: float = option(0.0001, "first beta of the linear schedule", above=0)
    beta_end: float = option(0.02, "last beta of the linear schedule", above=0)
    transition_bands: int | None = option(
        None, "furthest that a step of uniform or gaussian noise moves, in levels; none is any", at_least=1
    )
    d3pm_num_steps: int = option(1000, "timesteps of the process, T", at_least=1)
    d3pm_prediction: Literal["logits", "logistic"] = option(
        "logits", "output of the network: logits of each level, or a truncated logistic distribution"
    )
    posterior_form: Literal["joint", "mixture"] = option(
        "joint", "how p(x_s | x_t) follows from p(x_0 | x_t): Eq. 4 of D3PM, or an average of posteriors"
    )
    objective: Literal["hybrid", "vlb", "cross_entropy"] = option(
        "hybrid", "vlb: variational bound; cross_entropy: of x_0; hybrid: vlb + cross_entropy_weight * cross_entropy"
    )
    cross_entropy_weight: float = option(0.001, "weight of the cross entropy in objective hybrid", at_least=0)
    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "stratified", "how a batch's timesteps are drawn"
    )
    label_dropout: float = option(
        0.1, "share of labels replaced by 'no class', for classifier-free guidance", at_least=0, below=1
    )

    def check(self) -> None:
        """ValueError for settings of the process that contradict each other."""
        if self.transition_bands is not None and self.transition_type == "absorbing":
            raise ValueError(
                "transition_bands are a limit of uniform and gaussian noise; leave them out for absorbing"
            )
        if (
            self.posterior_form == "joint"
            and self.objective == "cross_entropy"
            and self.transition_type != "absorbing"
        ):
            raise ValueError(
                f"objective cross_entropy finds p(x_0 | x_t), from which posterior_form joint samples with a bias for "
                f"{self.transition_type} noise; give --posterior_form mixture"
            )

    def process(self) -> dict[str, Any]:
        """The arguments of `D3PMScheduler`."""
        schedules = {"gaussian": "linear", "uniform": "cosine", "absorbing": "jsd"}
        is_chosen = self.d3pm_schedule != "auto"
        return {
            "num_classes": self.num_levels,
            "num_train_timesteps": self.d3pm_num_steps,
            "transition_type": self.transition_type,
            "beta_schedule": self.d3pm_schedule if is_chosen else schedules[self.transition_type],
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "transition_bands": self.transition_bands,
            "prediction_type": self.d3pm_prediction,
            "posterior_form": self.posterior_form,
        }

    def output_channels(self, channels: int) -> int:
        """Channels of the network's output for so many of the data."""
        return channels * (2 if self.d3pm_prediction == "logistic" else self.num_levels)


class DiscreteObjective(Objective):
    """One network, which predicts x_0 at one random timestep a sample.

    `scheduler` is a process of `scheduling_discrete`. The data are values in [-1, 1], which are
    rounded to its levels. The network gets labels where its config has `num_class_embeds`.
    """

    def __init__(self, scheduler: Any, network: nn.Module, options: DiscreteOptions, learning_rate: float):
        self.scheduler, self.options = scheduler, options
        self.class_conditional = network.config.num_class_embeds is not None
        self.null_class_id = network.null_class_id
        super().__init__(Player(network, self.values, learning_rate))

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,), the bound and the cross entropy; evaluation drops no label."""
        scheduler, steps = self.scheduler, self.scheduler.config.num_train_timesteps
        x_0, labels = scheduler.to_categories(batch["x_0"]), batch["labels"] if self.class_conditional else None
        t = timesteps(draw.level(SPREADS[self.options.timestep_sampling]), steps)
        x_t = scheduler.add_noise(x_0, draw.uniform(*x_0.shape[1:]), t)
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < self.options.label_dropout, self.null_class_id, labels)
        output = network(scheduler.to_values(x_t), t, labels).sample
        logits = scheduler.x_0_logits(output, x_t).float()
        bound = mean_bits(bound_term(scheduler, logits, x_0, x_t, t))
        entropy = mean_bits(cross_entropy(logits, x_0))
        return {
            "loss": self.loss(bound, entropy),
            "level": t / steps,
            # of a single term, as if all others were like it
            "bits_per_dim": steps * bound.detach(),
            "cross_entropy": entropy.detach(),
        }

    def loss(self, bound: Tensor, entropy: Tensor) -> Tensor:
        """What is minimised, of the terms of the bound and the cross entropies (B,)."""
        if self.options.objective == "vlb":
            return bound
        if self.options.objective == "cross_entropy":
            return entropy
        return bound + self.options.cross_entropy_weight * entropy

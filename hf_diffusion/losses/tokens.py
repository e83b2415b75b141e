"""The objectives of text: D3PM in T steps, MDLM and UDLM in continuous time, for one network.

Austin et al. 2021, arXiv:2107.03006; Sahoo et al. 2024, arXiv:2406.07524; Schiff et al. 2024,
arXiv:2412.10193. Shapes: B sequences of L tokens out of V, x_0 and x_t int64 (B, L), levels u (B,)
in [0, 1). Bounds are nats of each token (B, L) at one level, whose mean over levels is the bound.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses.discrete import SPREADS, bound_term, cross_entropy, prior_term
from hf_diffusion.losses.masked import LAST_TIME, continuous_times, of_masked, uniform_loss, without_mask
from hf_diffusion.losses.noise_levels import timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw
from hf_diffusion.schedulers.scheduling_discrete import D3PMScheduler
from hf_diffusion.schedulers.scheduling_masked import MDLMScheduler, UDLMScheduler


# Logits (B, L, V) of x_0 for x_t and what the network is told of the level (B,).
Predict = Callable[[Tensor, Tensor], Tensor]
DrawUniform = Callable[..., Tensor]
# Levels at which a weight 1/t would exceed float32's sense of a sum.
LOWEST = 1e-6


class Noised(NamedTuple):
    """What a level does: x_t (B, L), the bound and the cross entropy of x_0, nats (B, L)."""

    x_t: Tensor
    bound: Tensor
    cross_entropy: Tensor


def masked_bound(scheduler: MDLMScheduler, predict: Predict, x_0: Tensor, u: Tensor, draw: DrawUniform) -> Noised:
    """MDLM: the cross entropy of masked tokens, by -alpha' / (1 - alpha)."""
    t = u.double().clamp(min=LOWEST)
    x_t = scheduler.add_noise(x_0, draw(x_0.shape[1]), t)
    entropies = cross_entropy(without_mask(scheduler, predict(x_t, t).float()), x_0)
    return Noised(x_t, of_masked(scheduler, entropies, x_t, t), entropies)


def uniform_bound(scheduler: UDLMScheduler, predict: Predict, x_0: Tensor, u: Tensor, draw: DrawUniform) -> Noised:
    """UDLM: Eq. 16 of its paper, with alpha = 1 - t."""
    t = u.double().clamp(max=LAST_TIME)
    chance, which = draw(x_0.shape[1]), draw(x_0.shape[1])
    tokens = (which.double() * scheduler.config.num_classes).long()
    x_t = scheduler.add_noise(x_0, chance, t, tokens)
    logits = predict(x_t, t).float()
    bound = uniform_loss(logits.softmax(dim=-1), x_0, x_t, scheduler.alpha(t))
    return Noised(x_t, bound, cross_entropy(logits, x_0))


def stepped_bound(scheduler: D3PMScheduler, predict: Predict, x_0: Tensor, u: Tensor, draw: DrawUniform) -> Noised:
    """D3PM: T times the term of one timestep; the prior's term is none of a level."""
    steps = scheduler.config.num_train_timesteps
    t = timesteps(u, steps)
    x_t = scheduler.add_noise(x_0, draw(x_0.shape[1]), t)
    logits = predict(x_t, (t + 1) / steps).float()
    if scheduler.mask_token_id is not None:
        # as in MDLM; the published code lets the network find that out
        logits = without_mask(scheduler, logits)
    return Noised(x_t, steps * bound_term(scheduler, logits, x_0, x_t, t), cross_entropy(logits, x_0))


BOUNDS: dict[type[SchedulerMixin], Callable[..., Noised]] = {
    MDLMScheduler: masked_bound,
    UDLMScheduler: uniform_bound,
    D3PMScheduler: stepped_bound,
}


def bound_of_prior(scheduler: SchedulerMixin, x_0: Tensor) -> Tensor:
    """What the bound has beside its levels, nats (B, L): 0 where all is noise at the end."""
    if isinstance(scheduler, D3PMScheduler):
        return prior_term(scheduler, x_0)
    return torch.zeros(x_0.shape, dtype=torch.float64, device=x_0.device)


def predictor(network: nn.Module, labels: Tensor | None, is_masked_lm: bool) -> Predict:
    """How a network is asked: a masked language model of transformers sees tokens alone."""

    def predict(x_t: Tensor, level: Tensor) -> Tensor:
        if is_masked_lm:
            return network(input_ids=x_t).logits
        return network(x_t, level, labels, return_dict=False)[0]

    return predict


def mean_bits(nats: Tensor) -> Tensor:
    """The mean (B,) of nats (B, L) a token, in bits."""
    return nats.mean(dim=1) / math.log(2)


@dataclass(kw_only=True)
class TokenOptions:
    """The noise of tokens, and what a network is trained by."""

    noise: Literal["absorbing", "uniform"] = option(
        "absorbing", "noise: every token into a mask, or into any other token", group="method"
    )
    objective: Literal["continuous", "hybrid", "vlb", "cross_entropy"] = option(
        "continuous",
        "continuous: the bound in continuous time, which is MDLM for absorbing noise and UDLM for uniform; the others "
        "are D3PM's: variational bound, cross entropy of x_0, or hybrid, vlb + cross_entropy_weight * cross_entropy",
    )
    d3pm_num_steps: int = option(1000, "timesteps of D3PM's process, T", at_least=1)
    d3pm_schedule: Literal["auto", "cosine", "jsd"] = option(
        "auto", "D3PM's noise schedule; auto is the paper's: jsd for absorbing, cosine for uniform"
    )
    posterior_form: Literal["joint", "mixture"] = option(
        "joint", "how D3PM's p(x_s | x_t) follows from p(x_0 | x_t): Eq. 4 of the paper, or an average of posteriors"
    )
    # The paper's values for text. In continuous time, too, telling what is seen teaches to tell
    # what is not: 3.40 bits a character against 3.74 after 600 steps (docs/text.md).
    cross_entropy_weight: float | None = option(
        None,
        "weight of the cross entropy of all tokens, masked or not, beside one term of the bound, in hybrid and "
        "continuous; none is 0.01 for hybrid absorbing noise, else 0",
        at_least=0,
    )
    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "stratified", "how a batch's levels are drawn"
    )
    # MDLM does as well without: the number of masks tells the level.
    time_conditioning: bool | None = option(
        None, "tell the network the level; none does so but for absorbing noise in continuous time"
    )
    label_dropout: float = option(
        0.1, "share of labels replaced by 'no class', for classifier-free guidance", at_least=0, below=1
    )

    def check(self) -> None:
        """ValueError for an objective that samples with a bias."""
        if self.objective == "cross_entropy" and self.noise == "uniform" and self.posterior_form == "joint":
            raise ValueError(
                "objective cross_entropy finds p(x_0 | x_t), from which posterior_form joint samples with a bias for "
                "uniform noise; give --posterior_form mixture"
            )

    @property
    def is_told_time(self) -> bool:
        """Whether the network is told the level."""
        if self.time_conditioning is not None:
            return self.time_conditioning
        return self.noise == "uniform" or self.objective != "continuous"

    def process(self, num_classes: int, mask_token_id: int | None) -> SchedulerMixin:
        """The scheduler of so many tokens, the mask included where the noise has one.

        In continuous time all is noise at time 1, so that the bound is one.
        """
        if self.objective == "continuous" and self.noise == "absorbing":
            return MDLMScheduler(num_classes=num_classes, mask_token_id=mask_token_id, noise_eps=0.0)
        if self.objective == "continuous":
            return UDLMScheduler(num_classes=num_classes, noise_eps=0.0)
        schedule = {"absorbing": "jsd", "uniform": "cosine"}[self.noise]
        return D3PMScheduler(
            num_classes=num_classes,
            num_train_timesteps=self.d3pm_num_steps,
            transition_type=self.noise,
            beta_schedule=schedule if self.d3pm_schedule == "auto" else self.d3pm_schedule,
            mask_token_id=mask_token_id if self.noise == "absorbing" else None,
            posterior_form=self.posterior_form,
            # as the published code for text: what is known in the last step costs nothing
            decoder="posterior",
        )


class TokenObjective(Objective):
    """One network, which predicts x_0 at one random level a sequence.

    `scheduler` is one of BOUNDS. The network is a `TokenTransformerModel`, which gets labels where
    its config has `num_class_embeds`, or a masked language model of transformers.
    """

    def __init__(self, scheduler: SchedulerMixin, network: nn.Module, options: TokenOptions, learning_rate: float):
        self.scheduler, self.options = scheduler, options
        self.is_masked_lm = not isinstance(network, ModelMixin)
        self.class_conditional = getattr(network.config, "num_class_embeds", None) is not None
        self.null_class_id = getattr(network, "null_class_id", None)
        published = 0.01 if options.noise == "absorbing" and options.objective == "hybrid" else 0.0
        self.weight = published if options.cross_entropy_weight is None else options.cross_entropy_weight
        super().__init__(Player(network, self.values, learning_rate))

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) and the bound in bits; evaluation drops no label and omits no level."""
        x_0, labels = batch["x_0"], batch["labels"] if self.class_conditional else None
        u = draw.level(SPREADS[self.options.timestep_sampling])
        if network.training and self.options.objective == "continuous":
            # the weights near 0 have no bound, and a step of training meets them one at a time
            u = continuous_times(u)
        if self.null_class_id is not None:
            dropped = draw.uniform() < self.options.label_dropout
            labels = torch.where(dropped, self.null_class_id, labels) if network.training else labels
        predict = predictor(network, labels, self.is_masked_lm)
        found = BOUNDS[type(self.scheduler)](self.scheduler, predict, x_0, u, draw.uniform)
        bound, entropy = mean_bits(found.bound), mean_bits(found.cross_entropy)
        # the paper weighs the cross entropy beside one term of the bound
        term = bound / (1 if self.options.objective == "continuous" else self.options.d3pm_num_steps)
        return {"loss": self.loss(term, entropy), "level": u, "bits_per_token": bound.detach()}

    def loss(self, term: Tensor, entropy: Tensor) -> Tensor:
        """What is minimised, of a term of the bound and the cross entropies (B,)."""
        if self.options.objective == "cross_entropy":
            return entropy
        return term if self.options.objective == "vlb" else term + self.weight * entropy

"""Score matching, as an objective: denoising and sliced, of score SDEs and of NCSN.

Papers: denoising score matching (Vincent 2011; NCSN, arXiv:1907.05600, Eq. 5), sliced score
matching (Song et al. 2019, arXiv:1905.07088), score SDEs (arXiv:2011.13456, Eq. 7), likelihood
weighting (Song et al. 2021, arXiv:2101.09258). B samples of any shape (B, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses.noise_levels import antithetic, stratified, timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw
from hf_diffusion.schedulers.scheduling_score import TRAINING_EPS, over


SPREADS = {"uniform": None, "stratified": stratified, "antithetic": antithetic}


@dataclass(kw_only=True)
class ScoreOptions:
    """What a score network is trained by."""

    # Without dropped labels there is no unconditional score, and so nothing to guide away from.
    label_dropout: float = option(
        0.1,
        "share of labels replaced by 'no class', for classifier-free guidance",
        group="method",
        at_least=0,
        below=1,
    )
    matching: Literal["denoising", "sliced"] = option(
        "denoising", "denoising: the score of the noise that was added; sliced: no noise needs to be known"
    )
    # On the levels of SMLD and DDPM instead of at all times. NCSN has nothing but levels.
    discrete: bool = option(False, "train at the steps of the chain only")
    likelihood_weighting: bool = option(False, "weigh by g^2, which bounds the likelihood, instead of evenly")
    reduce_mean: bool = option(True, "mean over the dimensions instead of half their sum")
    # sigma^power |score + noise / sigma|^2: 2 weighs all noise levels evenly.
    anneal_power: float = option(2.0, "exponent of the noise level in the loss's weight", at_least=0)
    num_slices: int = option(1, "random directions a sample in sliced score matching", at_least=1)
    time_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "stratified", "how a batch's times are drawn"
    )

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.likelihood_weighting and self.anneal_power != 2:
            raise ValueError(
                f"likelihood_weighting and anneal_power {self.anneal_power} both weigh the noise levels; give one"
            )


def denoising_loss(
    scheduler: Any,
    score: Tensor,
    noise: Tensor,
    timestep: Tensor,
    likelihood_weighting: bool = False,
    reduce_mean: bool = True,
    anneal_power: float = 2.0,
) -> Tensor:
    """The weighted error (B,) of the score (B, ...) at x_t = scale x_0 + std noise.

    |std score + noise|^2, times std^(anneal_power - 2), or times (g / std)^2 for the likelihood;
    the mean over the dimensions, or half the sum.
    """
    _, std = scheduler.marginal(timestep)
    errors = (over(std, score) * score + noise).flatten(1) ** 2
    weight = std ** (anneal_power - 2)
    if likelihood_weighting:
        weight = (scheduler.trained_sde.diffusion(scheduler.times(timestep)) / std) ** 2
    return over(weight, errors[:, 0]).reshape(-1) * _reduced(errors, reduce_mean)


def sliced_loss(
    score_of: Callable[[Tensor], Tensor],
    x_t: Tensor,
    std: Tensor,
    directions: Tensor,
    reduce_mean: bool = True,
    anneal_power: float = 2.0,
) -> Tensor:
    """Sliced score matching (B,) with variance reduction, Eq. 8 of arXiv:1905.07088.

    v^T (ds/dx) v + |s|^2 / 2, times std^anneal_power, for `directions` v (K, B, ...) of unit
    covariance. In expectation it differs from half of `denoising_loss` by what no network changes.
    """
    # also where nothing is trained, as on held-out data
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        score = score_of(x_t)
        curvature = torch.zeros(len(x_t), dtype=score.dtype, device=score.device)
        for v in directions:
            (product,) = torch.autograd.grad((score * v).sum(), x_t, create_graph=True)
            curvature = curvature + (product * v).flatten(1).sum(1) / len(directions)
    loss = curvature + (score.flatten(1) ** 2).sum(1) / 2
    loss = over(std**anneal_power, loss).reshape(-1) * loss
    return 2 * loss / x_t[0].numel() if reduce_mean else loss


def _reduced(errors: Tensor, reduce_mean: bool) -> Tensor:
    return errors.mean(1) if reduce_mean else errors.sum(1) / 2


class ScoreObjective(Objective):
    """One network, at one random time a sample.

    `scheduler` is one of `scheduling_score`. The network gets labels where its config has
    `num_class_embeds`.
    """

    def __init__(self, scheduler: Any, network: nn.Module, options: ScoreOptions, learning_rate: float):
        self.scheduler, self.options = scheduler, options
        self.class_conditional = network.config.num_class_embeds is not None
        self.null_class_id = getattr(network, "null_class_id", None)
        is_sliced = options.matching == "sliced"
        super().__init__(Player(network, self.values, learning_rate, compilable=not is_sliced))

    def timesteps(self, u: Tensor) -> Tensor:
        """What the scheduler calls the times of levels u (B,) in [0, 1)."""
        count = len(self.scheduler)
        if not self.scheduler.timesteps.is_floating_point():
            # a number of a level, from the noisiest
            return count - 1 - timesteps(u, count)
        if self.options.discrete:
            return timesteps(u, count).double() / (count - 1)
        return u.double() * (1 - TRAINING_EPS) + TRAINING_EPS

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) of a micro-batch; without dropped labels in evaluation mode."""
        x_0, labels = batch["x_0"], batch["labels"] if self.class_conditional else None
        scheduler, options = self.scheduler, self.options
        u = draw.level(SPREADS[options.time_sampling])
        t, noise = self.timesteps(u), draw.normal(*x_0.shape[1:])
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < options.label_dropout, self.null_class_id, labels)
        x_t, time = scheduler.add_noise(x_0, noise, t), scheduler.network_time(t)

        def score_of(x_t: Tensor) -> Tensor:
            output = network(scheduler.scale_model_input(x_t, t), time, labels).sample
            return scheduler.to_score(output.float(), t)

        if options.matching == "sliced":
            directions = torch.stack([draw.normal(*x_0.shape[1:]) for _ in range(options.num_slices)])
            std = scheduler.marginal(t)[1]
            losses = sliced_loss(score_of, x_t, std, directions, options.reduce_mean, options.anneal_power)
        else:
            weights = options.likelihood_weighting, options.reduce_mean, options.anneal_power
            losses = denoising_loss(scheduler, score_of(x_t), noise, t, *weights)
        return {"loss": losses.float(), "level": u}

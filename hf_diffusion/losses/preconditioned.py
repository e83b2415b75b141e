"""Training a preconditioned denoiser, EDM (arXiv:2206.00364), also with learned weights of noise
levels (arXiv:2312.02696).

The network's own output is compared with what it should be. That is lambda(sigma) |D - x_0|^2 with
lambda = 1 / c_out^2, Eq. 8, whatever the preconditioning. B samples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_diffusion.config import preset
from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.losses.augmentation import told
from hf_diffusion.losses.noise_levels import antithetic, stratified
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw
from hf_diffusion.schedulers.scheduling_edm import PRECONDITIONINGS, Preconditioning, along


SPREADS = {"uniform": None, "stratified": stratified, "antithetic": antithetic}


@dataclass(kw_only=True)
class PreconditionedOptions:
    """What a preconditioned denoiser is trained by."""

    # Without dropped labels there is no unconditional prediction that one could guide away from.
    label_dropout: float = option(
        0.1,
        "share of labels replaced by 'no class', for classifier-free guidance",
        group="method",
        at_least=0,
        below=1,
    )
    # What diffusers' schedulers for EDM can sample is edm.
    preconditioning: Literal["edm", "vp", "ve", "iddpm"] = option(
        "edm", "what turns the network into a denoiser; vp, ve and iddpm draw noise levels as those models do"
    )
    sigma_data: float = option(0.5, "standard deviation of the data, for edm and the weights by SNR", above=0)
    # Most is learned between the levels at which x_0 is plain and those at which it is lost.
    sigma_mean: float = option(-1.2, "mean of ln(sigma) in training, for edm")
    sigma_std: float = option(1.2, "standard deviation of ln(sigma) in training, for edm", above=0)
    level_sampling: Literal["uniform", "stratified", "antithetic"] = option(
        "stratified", "how a batch's noise levels are spread over their distribution"
    )
    loss_weighting: Literal["edm", "snr", "soft_min_snr"] = option(
        "edm", "weight of the noise levels: edm weighs the network's output evenly, the others as k-diffusion does"
    )
    learned_weighting: bool = option(
        False, "divide each noise level's loss by what it is expected to be, which a small network learns"
    )

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """The optimizer and the weights of the levels that teach most in few minutes of a CPU."""
        given = {name: getattr(self, name) for name in self.given}
        chosen = preset.by_muon(super().auto_settings(circumstances), circumstances, given)
        return chosen | preset.edm_weights(circumstances, given)

    def make_preconditioning(self) -> Preconditioning:
        """The preconditioning of these settings."""
        own = {"sigma_data": self.sigma_data, "sigma_mean": self.sigma_mean, "sigma_std": self.sigma_std}
        return PRECONDITIONINGS[self.preconditioning](**own if self.preconditioning == "edm" else {})


def output_error(preconditioning: Preconditioning, output: Tensor, x_0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Mean square of output minus target (B,), which is lambda(sigma) times that of D - x_0."""
    target = preconditioning.target(x_0, x, sigma)
    return (output.to(target) - target).square().flatten(1).mean(dim=1)


def level_weight(kind: str, sigma: Tensor, sigma_data: float) -> Tensor:
    """Weights (B,) of the errors of outputs; those by signal-to-noise ratio as in k-diffusion."""
    total = sigma**2 + sigma_data**2
    match kind:
        case "edm":
            return torch.ones_like(sigma)
        case "snr":
            return sigma_data**2 / total
        case "soft_min_snr":
            return (sigma * sigma_data / total) ** 2
    raise ValueError(f"unknown loss_weighting {kind!r}; choose from ['edm', 'snr', 'soft_min_snr']")


class LevelUncertainty(nn.Module):
    """u(sigma), the logarithm of the loss that is expected at a noise level, Eq. 14 of EDM2.

    One linear map of `features` random waves of c_noise, which begins at 0.
    """

    def __init__(self, features: int = 128):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=generator))
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, c_noise: Tensor) -> Tensor:
        """u (B,) for c_noise (B,)."""
        waves = math.sqrt(2) * torch.cos(c_noise.float()[:, None] * self.frequencies + self.phases)
        return self.linear(waves / math.sqrt(len(self.phases))).squeeze(1)

    def enable_gradient_checkpointing(self) -> None:
        """The loop asks every network; this one keeps no activations that would be worth it."""


class PreconditionedObjective(Objective):
    """One network at one random noise level a sample; with learned weights, the network of those.

    The network gets labels where its config has `num_class_embeds`.
    """

    def __init__(self, network: nn.Module, options: PreconditionedOptions, learning_rate: float):
        self.options, self.preconditioning = options, options.make_preconditioning()
        self.class_conditional = network.config.num_class_embeds is not None
        self.null_class_id = network.null_class_id
        players, self.uncertainty = [Player(network, self.values, learning_rate)], None
        if options.learned_weighting:
            self.uncertainty = Player(
                LevelUncertainty(),
                self.uncertainty_values,
                learning_rate,
                "uncertainty",
                "_u",
                compilable=False,
                is_averaged=False,
            )
            players.append(self.uncertainty)
        # c_noise and error of each micro-batch of this step, for the second player
        self.seen: list[tuple[Tensor, Tensor]] = []
        super().__init__(*players)

    def turns(self, step: int) -> Iterator[Player]:
        """The network, and then what has seen its errors."""
        self.seen.clear()
        yield from self.players

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) of a micro-batch; without dropped labels in evaluation mode."""
        x_0, labels = batch["x_0"], batch["labels"] if self.class_conditional else None
        level = draw.level(SPREADS[self.options.level_sampling])
        sigma = self.preconditioning.training_sigmas(level)
        x = x_0 + along(sigma, x_0) * draw.normal(*x_0.shape[1:])
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < self.options.label_dropout, self.null_class_id, labels)
        inputs, c_noise = self.preconditioning.inputs(x, sigma)
        output = network(inputs, c_noise, labels, **told(batch)).sample
        error = output_error(self.preconditioning, output, x_0, x, sigma)
        error = level_weight(self.options.loss_weighting, sigma, self.options.sigma_data).to(error) * error
        if self.uncertainty is None:
            return {"loss": error, "level": level}
        if network.training:
            self.seen.append((c_noise, error.detach()))
        with torch.no_grad():
            expected = self.uncertainty.network(c_noise)
        return {"loss": error / expected.exp() + expected, "level": level, "error": error.detach()}

    def uncertainty_values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The same loss (B,), as a function of what was expected of the network's errors."""
        c_noise, error = self.seen.pop(0)
        expected = network(c_noise)
        return {"loss": error / expected.exp() + expected}

"""Training a network to know the velocity from noise to data, as an objective.

The path and the kinds of predictions are those of `schedulers.scheduling_flow`: sigma 1 is the
noise. B samples of shape (...).
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_diffusion.config import preset
from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.losses.augmentation import told
from hf_diffusion.losses.noise_levels import antithetic, logit_normal, stratified
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler, convert_prediction, shift_sigmas


SPREADS = {"independent": None, "stratified": stratified, "antithetic": antithetic}


@dataclass(kw_only=True)
class FlowMatchingOptions:
    """What a network of flow matching is trained by."""

    # Without dropped labels there is no unconditional prediction to guide away from.
    label_dropout: float = option(
        0.1,
        "share of labels replaced by 'no class', for classifier-free guidance",
        group="method",
        at_least=0,
        below=1,
    )
    # x_0 lies on the manifold of the data, which the velocity and the noise do not. With large
    # patches only x_0 can be learned (arXiv:2511.13720).
    prediction_type: Literal["velocity", "sample", "epsilon"] = option(
        "velocity", "what the network predicts: noise - x_0, x_0, or the noise"
    )
    loss_space: Literal["velocity", "sample", "epsilon"] = option(
        "velocity", "whose error is the loss, whatever the network predicts"
    )
    sigma_floor: float = option(
        0.05, "least distance to the end of the path that a prediction is divided by", above=0, below=1
    )
    level_distribution: Literal["uniform", "logit_normal", "mode"] = option(
        "uniform", "density of the noise levels in training; logit_normal and mode are those of Stable Diffusion 3"
    )
    # In time from noise to data, as JiT counts, the mean has the other sign: its -0.8 is 0.8 here.
    logit_mean: float = option(0.0, "mean of logit_normal; above 0 trains on more noise")
    logit_std: float = option(1.0, "standard deviation of logit_normal", above=0)
    # Within these limits the levels rise with u.
    mode_scale: float = option(1.29, "weight of the middle levels in mode", at_least=-1, at_most=2 / (math.pi - 2))
    time_shift: float | None = option(
        1.0, "moves levels towards noise, in training and sampling; none takes it from the size of the images", above=0
    )
    # The strata cover all noise levels in every batch, which takes noise out of the gradient.
    level_spread: Literal["independent", "stratified", "antithetic"] = option(
        "stratified", "how a batch's noise levels are drawn together"
    )
    loss_weighting: Literal["uniform", "sigma_sqrt", "cosmap"] = option(
        "uniform", "weight of the noise levels in the loss: 1, sigma^-2, or that of a cosine schedule"
    )
    noise_scale: float = option(1.0, "standard deviation of the noise; large images may want 2", above=0)
    pairing: Literal["independent", "knn", "assignment"] = option(
        "independent",
        "which noise an image meets: any, the nearest of knn_candidates, or the least total distance in a group",
    )
    knn_candidates: int = option(4, "noises among which pairing knn takes the nearest", at_least=2)
    # Groups begin at multiples of their size in the whole batch, so that the number of processes
    # does not change who is in a group.
    group_size: int = option(
        16, "rows that pairing assignment and the contrastive term see together; divides train_batch_size", at_least=2
    )
    contrastive_weight: float = option(
        0.0, "how much the velocity is pushed away from that of another image, such as 0.05", at_least=0, below=1
    )

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """The optimizer and the levels that teach most in few minutes of a CPU."""
        given = {name: getattr(self, name) for name in self.given}
        chosen = preset.by_muon(super().auto_settings(circumstances), circumstances, given)
        return chosen | preset.flow_levels(circumstances)

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        groups = self.pairing == "assignment" or self.contrastive_weight > 0
        batch_size = getattr(self, "train_batch_size", self.group_size)
        if groups and batch_size % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide train_batch_size {batch_size}, so the groups would "
                "change with the number of processes; give a divisor"
            )
        if self.contrastive_weight > 0 and self.loss_space != "velocity":
            raise ValueError(
                f"contrastive_weight {self.contrastive_weight} compares velocities, got loss_space {self.loss_space}; "
                "give velocity, or no contrastive_weight"
            )
        if self.pairing == "assignment" and importlib.util.find_spec("scipy") is None:
            raise ValueError('pairing assignment needs scipy; pip install "hf-diffusion[assignment]", or give knn')


def levels(u: Tensor, options: FlowMatchingOptions) -> Tensor:
    """Noise levels sigma (B,) for u (B,) in [0, 1), rising with u; before the shift."""
    if options.level_distribution == "logit_normal":
        return logit_normal(u, options.logit_mean, options.logit_std)
    if options.level_distribution == "mode":
        return u + options.mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    return u


def loss_weight(sigma: Tensor, weighting: str) -> Tensor:
    """Weights (B,) of the noise levels sigma (B,), Esser et al. 2024, section 3.1."""
    if weighting == "sigma_sqrt":
        return sigma**-2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def nearest(noises: Tensor, x_0: Tensor) -> Tensor:
    """Of K noises (B, K, ...) for each image (B, ...) the nearest (B, ...), arXiv:2505.18521.

    Beware: the noise that images meet leans towards them and is no unit Gaussian any more, as the
    noise of sampling is. Over thousands of dimensions that is little. In the plane it spoils the
    samples: the sliced Wasserstein distance of a swiss roll rises from 0.023 to 0.137.
    """
    distance = (noises - x_0[:, None]).flatten(2).square().sum(2)  # (B, K)
    return noises[torch.arange(len(x_0), device=x_0.device), distance.argmin(1)]


def assigned(noise: Tensor, x_0: Tensor, group_size: int) -> Tensor:
    """The noises of a group given to its images with the least sum of squared distances.

    Minibatch optimal transport, arXiv:2302.00482. The host waits for the distances.
    """
    # scipy is optional
    from scipy.optimize import linear_sum_assignment

    parts = []
    for noises, images in zip(noise.split(group_size), x_0.split(group_size)):
        cost = torch.cdist(images.flatten(1).double(), noises.flatten(1).double()).square()
        _, order = linear_sum_assignment(cost.cpu().numpy())
        parts.append(noises[torch.from_numpy(order).to(noise.device)])
    return torch.cat(parts)


def of_another(values: Tensor, group_size: int) -> Tensor:
    """The values (B, ...) of another row of the same group."""
    return torch.cat([part.roll(1, 0) for part in values.split(group_size)])


class FlowMatchingObjective(Objective):
    """One network, at one random noise level a sample.

    The network gets labels where its config has `num_class_embeds`. Pairing, the contrastive term
    and dropped labels are for training alone, so held-out losses of different settings compare.
    """

    def __init__(
        self,
        scheduler: FlowMatchingScheduler,
        network: nn.Module,
        options: FlowMatchingOptions,
        learning_rate: float,
    ):
        self.scheduler, self.options = scheduler, options
        self.class_conditional = getattr(network.config, "num_class_embeds", None) is not None
        self.null_class_id = getattr(network, "null_class_id", None)
        super().__init__(Player(network, self.values, learning_rate))

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) of a micro-batch."""
        x_0 = batch["x_0"]
        u = draw.level(SPREADS[self.options.level_spread])
        sigma = shift_sigmas(levels(u, self.options), self.scheduler.config.shift)  # (B,)
        noise = self.options.noise_scale * self.noise(x_0, draw, network.training)
        timesteps = sigma * self.scheduler.config.num_train_timesteps
        x = self.scheduler.add_noise(x_0, noise, timesteps)
        output = self.predict(network, x, timesteps.to(x.dtype), batch, draw)
        loss = self.losses(output, x_0, noise, x, sigma, network.training)
        # a level lies below 1, which very large shifts round up to
        return {"loss": loss, "level": sigma.clamp(max=1 - 1e-9)}

    def predict(
        self, network: nn.Module, x: Tensor, t: Tensor, batch: dict[str, Tensor], draw: Draw | FixedDraw
    ) -> Tensor:
        """The network's output for x (B, ...) and timesteps t (B,), told its class."""
        labels = batch["labels"] if self.class_conditional else None
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < self.options.label_dropout, self.null_class_id, labels)
        return network(x, t, labels, **told(batch)).sample

    def noise(self, x_0: Tensor, draw: Draw | FixedDraw, training: bool) -> Tensor:
        """Unit noise (B, ...), paired with the images as the options say."""
        shape = x_0.shape[1:]
        if not training or self.options.pairing == "independent":
            return draw.normal(*shape)
        if self.options.pairing == "knn":
            return nearest(draw.normal(self.options.knn_candidates, *shape), x_0)
        return assigned(draw.normal(*shape), x_0, self.options.group_size)

    def losses(self, output: Tensor, x_0: Tensor, noise: Tensor, x: Tensor, sigma: Tensor, training: bool) -> Tensor:
        """The loss (B,) of the network's output (B, ...) at x (B, ...)."""
        options, velocity = self.options, noise - x_0
        target = {"velocity": velocity, "sample": x_0, "epsilon": noise}[options.prediction_type]
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        # Both by the same floor, so that it only bounds the weight of the error.
        kinds = options.prediction_type, options.loss_space, options.sigma_floor
        predicted, target = (convert_prediction(value, x, sigma, *kinds) for value in (output, target))
        loss = (predicted - target).square().flatten(1).mean(1)
        if training and options.contrastive_weight > 0:
            # arXiv:2506.05350
            other = (predicted - of_another(velocity, options.group_size)).square().flatten(1).mean(1)
            loss = loss - options.contrastive_weight * other
        if options.loss_weighting != "uniform":
            loss = loss_weight(sigma.clamp(min=options.sigma_floor), options.loss_weighting).to(loss.dtype) * loss
        return loss

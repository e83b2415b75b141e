"""Training a network to undo Gaussian noise: which timesteps, which loss, which weight.

One image's losses are in `losses.gaussian`, the choice of timesteps in `losses.noise_levels`.
B images.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.config import preset
from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.losses.augmentation import told
from hf_diffusion.losses.gaussian import hybrid_loss, loss_weight, simple_loss, vlb_loss
from hf_diffusion.losses.noise_levels import LossSecondMomentSampler, antithetic, logit_normal, stratified, timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


SPREADS = {"uniform": None, "stratified": stratified, "antithetic": antithetic}


@dataclass(kw_only=True)
class DenoisingOptions:
    """What a denoising network is trained by."""

    # Without dropped labels no unconditional prediction is learned, so guidance has no origin.
    label_dropout: float = option(
        0.1,
        "share of labels replaced by 'no class', for classifier-free guidance",
        group="method",
        at_least=0,
        below=1,
    )
    # v keeps the target's scale at every noise level and, with it, few-step sampling works.
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("v_prediction", "what the network predicts")
    # The strata cover all noise levels in every batch: less noise in the gradient, at no cost.
    # loss_second_moment visits the timesteps that add most to the variational bound, for vlb.
    timestep_sampling: Literal["uniform", "stratified", "antithetic", "loss_second_moment"] = option(
        "stratified", "how a batch's timesteps are drawn"
    )
    level_distribution: Literal["uniform", "logit_normal"] = option(
        "uniform", "density of the timesteps in training; logit_normal is that of Stable Diffusion 3"
    )
    logit_mean: float = option(0.0, "mean of logit_normal; above 0 trains on more noise")
    logit_std: float = option(1.0, "standard deviation of logit_normal", above=0)
    objective: Literal["simple", "hybrid", "vlb"] = option(
        "simple", "simple: error of the prediction; vlb: variational bound; hybrid: simple + vlb_weight * vlb"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = option(
        "fixed_small", "variance of ancestral sampling; the learned ones need objective hybrid or vlb"
    )
    vlb_weight: float = option(0.001, "weight of the variational bound in objective hybrid", above=0)
    # With sample it is the loss of JiT: the network predicts x_0, which it can, and v is compared.
    loss_weighting: Literal["uniform", "min_snr", "p2", "v"] = option(
        "uniform", "weight of the timesteps in the loss; v makes it the error of v, whatever is predicted"
    )
    min_snr_gamma: float = option(5.0, "cap on the signal-to-noise ratio of min_snr", above=0)
    p2_gamma: float = option(1.0, "exponent of p2", at_least=0)
    p2_k: float = option(1.0, "offset of p2", above=0)

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """The optimizer and the target that teach most in few minutes of a CPU."""
        given = {name: getattr(self, name) for name in self.given}
        chosen = preset.by_muon(super().auto_settings(circumstances), circumstances, given)
        return chosen | preset.ddpm_target(circumstances, given)

    @property
    def learns_variance(self) -> bool:
        """Whether the network has channels for the variance."""
        return self.variance_type.startswith("learned")

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.timestep_sampling == "loss_second_moment" and self.level_distribution != "uniform":
            raise ValueError(
                f"timestep_sampling loss_second_moment and level_distribution {self.level_distribution} both say how "
                "often a timestep comes; give one"
            )
        if self.learns_variance and self.objective == "simple":
            raise ValueError(
                f"variance_type {self.variance_type} is trained by the variational bound only; give --objective "
                "hybrid or vlb"
            )
        if self.objective == "hybrid" and not self.learns_variance:
            raise ValueError(
                f"objective hybrid trains a learned variance, got variance_type {self.variance_type}; give "
                "learned_range"
            )


class DenoisingObjective(Objective):
    """One network, at one random timestep an image.

    `scheduler` is a process of `scheduling_gaussian`. The network gets labels where its config has
    `num_class_embeds`. The state of importance sampling joins the checkpoints.
    """

    def __init__(
        self,
        scheduler: Any,
        network: nn.Module,
        options: DenoisingOptions,
        learning_rate: float,
        accelerator: Accelerator,
    ):
        self.scheduler, self.options, self.accelerator = scheduler, options, accelerator
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.class_conditional = getattr(network.config, "num_class_embeds", None) is not None
        self.null_class_id = getattr(network, "null_class_id", None)
        self.importance = None
        if options.timestep_sampling == "loss_second_moment":
            self.importance = LossSecondMomentSampler(self.num_timesteps)
        state = () if self.importance is None else (self.importance,)
        super().__init__(Player(network, self.values, learning_rate), state=state)

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) of a micro-batch; evaluation mode drops no labels and weighs evenly."""
        x_0 = batch["x_0"]
        weighs = self.importance is not None and network.training
        if weighs:
            t, factor = self.importance.sample(draw.uniform())
        else:
            u = draw.level(SPREADS.get(self.options.timestep_sampling))
            if self.options.level_distribution == "logit_normal" and network.training:
                u = logit_normal(u, self.options.logit_mean, self.options.logit_std)
            t = timesteps(u, self.num_timesteps)
        noise = draw.normal(*x_0.shape[1:])
        x_t = self.scheduler.add_noise(x_0, noise, t)
        losses = self.losses(self.predict(network, x_t, t, batch, draw), x_0, x_t, noise, t)
        if weighs:
            # All processes keep the same history.
            gather = self.accelerator.gather
            self.importance.update(gather(t), gather(losses.detach()))
            losses = losses * factor
        return {"loss": losses.float(), "level": t / self.num_timesteps}

    def predict(
        self, network: nn.Module, x: Tensor, t: Tensor, batch: dict[str, Tensor], draw: Draw | FixedDraw
    ) -> Tensor:
        """The network's output for x (B, ...) and timesteps t (B,), told its class."""
        labels = batch["labels"] if self.class_conditional else None
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < self.options.label_dropout, self.null_class_id, labels)
        return network(x, t, labels, **told(batch)).sample

    def losses(self, output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each image (B,) for the network's output at timesteps t."""
        options, scheduler = self.options, self.scheduler
        if options.objective == "vlb":
            return vlb_loss(scheduler, output, x_0, x_t, t)
        gammas = options.min_snr_gamma, options.p2_gamma, options.p2_k
        weight = loss_weight(scheduler, t, options.loss_weighting, *gammas)
        if options.objective == "hybrid":
            return hybrid_loss(scheduler, output, x_0, x_t, noise, t, options.vlb_weight, weight)
        return weight * simple_loss(scheduler, output, x_0, x_t, noise, t)
